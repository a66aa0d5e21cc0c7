"""The last step: secrets from shares, and masks off the sum. Wrong shares are survived and named."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from common.secagg import derivation, keys, masks, shamir, transcript
from common.secagg.errors import Blame, CannotRebuildError, Exchange, Fault
from common.secagg.graph import Graph
from common.secagg.keys import RandomBytes, Secret
from common.secagg.masks import Ring
from common.secagg.messages import Advertisement

SHARE_SETS_KEPT = 16
"""On the complete graph all owners have the same responders; above, each has its own."""

Shares = Mapping[int, Mapping[int, int]]
"""Owner → giver → share, a field element."""


@dataclass(frozen=True)
class Unmasking:
    """What is known when UNMASK closes, but for the shares themselves."""

    sid: bytes
    h1: bytes
    graph: Graph
    advertisements: Mapping[int, Advertisement]
    survivors: tuple[int, ...]
    dropped: tuple[int, ...]  # U2∖U3: their pair masks are in the sum, their vectors are not


class Rebuilder:
    """Rebuilds secrets that share a threshold, computing once for each set of responders."""

    def __init__(self, threshold: int, random_bytes: RandomBytes, blame: Callable[[Blame], None]) -> None:
        self._threshold = threshold
        self._random_bytes = random_bytes
        self._blame = blame
        self._sets: dict[tuple[int, ...], shamir.ShareSet] = {}
        self._suspects: set[int] = set()

    def rebuild(self, owner: int, shares: Mapping[int, int], is_right: Callable[[int], bool]) -> Secret:
        """The secret that `shares` (giver → element) lead to and `is_right` accepts, 32 bytes.

        Raises:
            CannotRebuildError: too few shares, or too many wrong ones.
        """
        if len(shares) < self._threshold:
            raise CannotRebuildError(owner, f"{len(shares)} shares, {self._threshold} needed")
        everyone = tuple(sorted(shares))
        trusted = tuple(giver for giver in everyone if giver not in self._suspects)
        # Without the givers of earlier wrong shares it is usually quick; with them it may still succeed
        for givers in dict.fromkeys((trusted, everyone)):
            if len(givers) < self._threshold:
                continue
            found = self._set(givers).rebuild([shares[giver] for giver in givers], is_right)
            if found is not None:
                fault = Fault.WRONG_SHARE if found.certain else Fault.SUSPECT_SHARE
                for giver in found.wrong:
                    self._suspects.add(giver)
                    self._blame(Blame(giver, Exchange.UNMASK, fault, about=owner))
                return Secret(shamir.element_bytes(found.secret))
        if self._set(everyone).agree([shares[giver] for giver in everyone]):
            self._blame(Blame(owner, Exchange.SHARE, Fault.BAD_DEALING, about=owner))
            raise CannotRebuildError(owner, "its shares agree, but not with what it had published")
        raise CannotRebuildError(owner, f"too many of its {len(shares)} shares are wrong")

    def _set(self, givers: tuple[int, ...]) -> shamir.ShareSet:
        if givers not in self._sets:
            if len(self._sets) >= SHARE_SETS_KEPT:
                self._sets.clear()
            self._sets[givers] = shamir.ShareSet(givers, self._threshold, self._random_bytes)
        return self._sets[givers]


def remove_masks(
    total: Ring,
    known: Unmasking,
    b_shares: Shares,
    s_shares: Shares,
    rebuilder: Rebuilder,
    threads: int,
) -> None:
    """Turn the sum of masked vectors into the sum of the survivors' vectors, in place.

    Raises:
        CannotRebuildError: for the first secret that cannot be; `total` is then untouched.
    """
    seeds = [
        *_self_seeds(known, b_shares, rebuilder),
        *_pair_seeds(known, s_shares, rebuilder),
    ]
    masks.apply_masks(total, seeds, threads)


def _self_seeds(known: Unmasking, shares: Shares, rebuilder: Rebuilder) -> Iterable[tuple[Secret, int]]:
    """Each survivor's own mask. Its b must open the commitment of its advertisement."""
    for owner in known.survivors:
        published = known.advertisements[owner].commitment

        def opens(value: int, owner: int = owner, published: bytes = published) -> bool:
            b = Secret(shamir.element_bytes(value))
            return keys.equal(transcript.commitment(known.sid, owner, b), published)

        b = rebuilder.rebuild(owner, shares.get(owner, {}), opens)
        yield derivation.self_seed(b, known.sid), masks.SUBTRACT


def _pair_seeds(known: Unmasking, shares: Shares, rebuilder: Rebuilder) -> Iterable[tuple[Secret, int]]:
    """The masks that survivors share with a dropped site. Its s must give its advertised public key."""
    survivors = set(known.survivors)
    for owner in known.dropped:
        published = known.advertisements[owner].s

        def gives(value: int, published: bytes = published) -> bool:
            s = Secret(shamir.element_bytes(value))
            return keys.equal(derivation.mask_key(s, known.sid).public, published)

        s = rebuilder.rebuild(owner, shares.get(owner, {}), gives)
        key = derivation.mask_key(s, known.sid)
        for peer in known.graph.neighbours(owner):
            if peer in survivors:
                public = known.advertisements[peer].s
                seed = derivation.pair_seed(key, public, known.sid, known.h1, owner, peer)
                yield seed, -derivation.pair_sign(peer, owner)  # what the survivor had put on
