"""Who masks with whom, and how many shares rebuild a secret.

Up to `complete_up_to` sites everybody is everybody's neighbour. Above, sites stand on a ring in an
order that nobody chooses, and each is joined to the k/2 before and the k/2 after it (a Harary graph):
k masks instead of n − 1. Source: Bell, Bonawitz, Gascón, Lepoint, Raykova 2020, "Secure Single-Server
Aggregation with (Poly)Logarithmic Overhead" (CCS 2020, ePrint 2020/704), whose random k-regular graph
and hypergeometric tails these are. Here they are computed in exact integers, with no normal
approximation and no floats, so that every site gets the same k.

What k and its threshold t_k must hold, with n sites, c_max colluders and d = ⌈dropout·n⌉ dropouts:

(1) With probability 1 − 2^−secrecy_bits, no site has more than a colluders among its neighbours.
(2) With probability 1 − 2^−abort_bits, no site loses more than d_max of its neighbours;
    t_k = k − d_max, so that secrets can be rebuilt.
(3) t_k − a ≥ min_cohort − c_max. A site's self-mask is rebuilt only with t_k shares, of which t_k − a
    come from honest neighbours that survived too, and it shares unbroken pair masks with each. So even
    a server that picks the dropouts learns only sums over groups with as many honest sites as the
    smallest cohort has. (On the complete graph it learns one sum, over all survivors.)
(4) With probability 1 − 2^−secrecy_bits, honest survivors stay connected under random dropouts: they
    fall apart only if k/2 consecutive sites of the ring collude or drop. So a server that does not
    pick the dropouts learns one sum.

The order is a hash of all advertisements, so colluders can try keys until it suits them. secrecy_bits
pays for that: 80 leaves 2^−40 after 2^40 tries, each of which has to hash the last advertisement anew.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from common.secagg.errors import PolicyError
from common.secagg.transcript import ring_position


@dataclass(frozen=True)
class GraphRule:
    """When the graph is sparse, and for how bad a day it is made.

    dropout: share of the cohort that may drop out in one session. secrecy_bits, abort_bits: see above.
    """

    complete_up_to: int = 256
    dropout: Fraction = Fraction(1, 10)
    secrecy_bits: int = 80
    abort_bits: int = 20

    def __post_init__(self) -> None:
        if self.complete_up_to < 1:
            raise PolicyError(f"complete_up_to must be >= 1, found {self.complete_up_to}")
        if not 0 <= self.dropout < 1:
            raise PolicyError(f"dropout must be in [0, 1), found {self.dropout}")
        if self.secrecy_bits < 1 or self.abort_bits < 1:
            raise PolicyError("secrecy_bits and abort_bits must be >= 1")


def threshold(n: int, gamma: Fraction) -> int:
    """t = ⌊(n + ⌊gamma·n⌋) / 2⌋ + 1: 7 of 10 and 67 of 100 at gamma = 1/3.

    2t > n + ⌊gamma·n⌋, and an honest site signs once. So two survivor sets with t signatures each
    would take more than ⌊gamma·n⌋ ≥ c_max sites that sign twice.
    """
    return (n + math.floor(gamma * n)) // 2 + 1


@functools.lru_cache(maxsize=256)
def regular_parameters(n: int, min_cohort: int, c_max: int, rule: GraphRule) -> tuple[int, int] | None:
    """The smallest even k below n − 1 that holds (1) to (4), with t_k; None if only completeness does."""
    # Doubling, then bisection. A k is returned only if it holds; that a smaller one might hold in
    # spite of a larger one failing costs a little speed, never safety.
    high = 2
    while (found := _local_threshold(n, high, min_cohort, c_max, rule)) is None:
        high *= 2
        if high >= n - 1:
            return None
    low = high // 2  # fails, or is below the smallest k
    while high - low > 2:
        middle = (low + high) // 4 * 2
        t_k = _local_threshold(n, middle, min_cohort, c_max, rule)
        if t_k is None:
            low = middle
        else:
            high, found = middle, t_k
    return high, found


def _local_threshold(n: int, k: int, min_cohort: int, c_max: int, rule: GraphRule) -> int | None:
    """t_k if (1) to (4) hold for an even k, or None."""
    if not 2 <= k < n - 1:
        return None
    dropped = math.ceil(rule.dropout * n)
    colluders = _tail_bound(n, c_max, k, rule.secrecy_bits)  # (1)
    t_k = k - _tail_bound(n, dropped, k, rule.abort_bits)  # (2)
    if t_k - colluders < max(min_cohort - c_max, 1):  # (3)
        return None
    if not _stays_connected(n, min(c_max + dropped, n), k // 2, rule.secrecy_bits):  # (4)
        return None
    return t_k


def _tail_bound(n: int, marked: int, k: int, bits: int) -> int:
    """The smallest a with n·P[X > a] ≤ 2^−bits, X = marked sites among k of n − 1 (hypergeometric)."""
    marked = min(marked, n - 1)
    budget = math.comb(n - 1, k)
    tail = 0
    for x in range(min(marked, k), -1, -1):
        tail += math.comb(marked, x) * math.comb(n - 1 - marked, k - x)
        if (tail * n) << bits > budget:
            return x
    return 0


def _stays_connected(n: int, lost: int, run: int, bits: int) -> bool:
    """Whether n·P[`run` given consecutive sites are all among the `lost`] ≤ 2^−bits."""
    if run > lost:
        return True
    return (n * math.comb(n - run, lost - run)) << bits <= math.comb(n, lost)


@dataclass(frozen=True)
class Graph:
    """The graph of one session: `ring` is U1 in ring order (in id order where it is complete).

    share_threshold: shares that rebuild a secret; holders are a site's neighbours and itself.
    """

    ring: tuple[int, ...]
    degree: int
    share_threshold: int

    @property
    def is_complete(self) -> bool:
        return self.degree == len(self.ring) - 1

    def neighbours(self, site: int) -> tuple[int, ...]:
        """Ascending ids. Raises ValueError if `site` is not in the graph."""
        if self.is_complete:
            if site not in self._positions:
                raise ValueError(f"site {site} is not in the graph")
            return tuple(other for other in self.ring if other != site)
        n = len(self.ring)
        if (place := self._positions.get(site)) is None:
            raise ValueError(f"site {site} is not in the graph")
        steps = range(1, self.degree // 2 + 1)
        around = [self.ring[(place + sign * step) % n] for step in steps for sign in (1, -1)]
        return tuple(sorted(around))

    @functools.cached_property
    def _positions(self) -> dict[int, int]:
        return {site: place for place, site in enumerate(self.ring)}


def build_graph(
    members: Sequence[int], h1: bytes, *, t: int, min_cohort: int, c_max: int, rule: GraphRule
) -> Graph:
    """The graph on U1 (`members`, ascending) that every member computes for itself."""
    n = len(members)
    if n > rule.complete_up_to:
        parameters = regular_parameters(n, min_cohort, c_max, rule)
        if parameters is not None:
            ring = tuple(sorted(members, key=lambda site: ring_position(h1, site)))
            return Graph(ring, *parameters)
    return Graph(tuple(members), n - 1, t)
