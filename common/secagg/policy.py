"""The policy that a federation agrees on and every site pins, and the roster of its keys."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property

from common.secagg import graph, transcript
from common.secagg.encoding import Codec
from common.secagg.errors import PolicyError
from common.secagg.graph import Graph, GraphRule

Roster = Mapping[int, bytes]
"""Site id (u32 ≥ 1) → Ed25519 public key (32 bytes)."""

SMALLEST_COHORT = 3
"""In a sum of two, each site finds the other's update by subtracting its own."""


@dataclass(frozen=True)
class Policy:
    """What a site insists on in every session, whatever the server asks.

    codec: how updates become vectors (ring, clip, weight, n_max). layout_hash: 32 bytes that name
    which parameter each word is. c_max: most roster members that may collude with the server.
    min_cohort: fewest sites in a sum. gamma: see `graph.threshold`. noise: names the noise mechanism
    and its parameters, so that sites with different ones never sum.

    Raises:
        PolicyError: min_cohort < 3·c_max + 1 (the server picks the cohort, so it could surround one
            victim with its friends), or the thresholds would allow two survivor sets.
    """

    codec: Codec
    layout_hash: bytes
    min_cohort: int
    c_max: int
    gamma: Fraction = Fraction(1, 3)
    graph: GraphRule = field(default_factory=GraphRule)
    noise: str = "none"

    def __post_init__(self) -> None:
        if len(self.layout_hash) != transcript.HASH_BYTES:
            raise PolicyError(f"layout_hash must be 32 bytes, found {len(self.layout_hash)}")
        if self.c_max < 0:
            raise PolicyError(f"c_max must be >= 0, found {self.c_max}")
        least = max(SMALLEST_COHORT, 3 * self.c_max + 1)
        if self.min_cohort < least:
            raise PolicyError(
                f"min_cohort must be >= max(3, 3*c_max + 1) = {least}, found {self.min_cohort}: "
                "the server picks the cohort, so a smaller one could be a victim and its colluders"
            )
        if self.n_max < self.min_cohort:
            raise PolicyError(f"n_max must be >= min_cohort = {self.min_cohort}, found {self.n_max}")
        if not 0 <= self.gamma < 1 or math.floor(self.gamma * self.min_cohort) < self.c_max:
            raise PolicyError(
                f"gamma must be in [0, 1) with floor(gamma*min_cohort) >= c_max = {self.c_max}, "
                f"found {self.gamma}: two survivor sets could both be signed"
            )

    @property
    def n_max(self) -> int:
        return self.codec.n_max

    @property
    def words(self) -> int:
        return self.codec.words

    @property
    def ring_bits(self) -> int:
        return self.codec.ring_bits

    def threshold(self, n: int) -> int:
        """t for |U1| = n: signatures on one survivor set, and shares on the complete graph."""
        return graph.threshold(n, self.gamma)

    def smallest(self, n: int) -> int:
        """Fewest sites in U2 and U3, for |U1| = n."""
        return max(self.threshold(n), self.min_cohort)

    def graph_of(self, members: Sequence[int], h1: bytes) -> Graph:
        """The graph on U1 = `members`, ascending."""
        return graph.build_graph(
            members,
            h1,
            t=self.threshold(len(members)),
            min_cohort=self.min_cohort,
            c_max=self.c_max,
            rule=self.graph,
        )

    @cached_property
    def hash(self) -> bytes:
        """H(policy): every field, in this order. Floats as IEEE 754 doubles, fractions as two integers."""
        codec, rule = self.codec, self.graph
        fields: list[bytes] = [
            *map(_number, (codec.ring_bits, codec.n_max, codec.w_max, codec.noise_bound)),
            b"".join(struct.pack("<Qd", tensor.size, tensor.clip) for tensor in codec.tensors),
            _number(len(codec.counts)),
        ]
        for count in codec.counts:
            fields += [count.name.encode(), _number(count.limit)]
        fields += [
            self.layout_hash,
            *map(_number, (self.min_cohort, self.c_max, self.gamma.numerator, self.gamma.denominator)),
            *map(_number, (rule.complete_up_to, rule.dropout.numerator, rule.dropout.denominator)),
            *map(_number, (rule.secrecy_bits, rule.abort_bits)),
            self.noise.encode(),
        ]
        return transcript.digest(b"policy", *fields)


def _number(value: int) -> bytes:
    return str(value).encode()


def check_roster(roster: Roster) -> None:
    """Raises PolicyError unless every id is a u32 >= 1 and every key is 32 bytes that nobody shares."""
    for site, key in roster.items():
        if not 1 <= site <= transcript.MAX_ID or len(key) != transcript.HASH_BYTES:
            raise PolicyError(f"roster entry {site} must be a u32 >= 1 with a 32-byte Ed25519 key")
    if len(set(roster.values())) != len(roster):
        raise PolicyError("two ids of the roster have the same key: one site would count as two")
