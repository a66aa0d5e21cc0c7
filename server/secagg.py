"""The server's side of secure aggregation: five exchanges, one accumulator, and who is to blame.

No clock and no network: the caller sends each request to `asked`, hands replies to `take_…` as they
come, and calls `close_…` when all are there or its deadline has passed. A reply that does not hold
up is dropped and its sender named in `blames`; it never ends the round by itself.

    advertise_request → take_advertisement … close_advertise
                      → take_shares        … close_share
                      → take_masked        … close_mask
                      → take_signature     … close_consist
                      → take_unmask        … close_unmask → SecureSum

Nothing here keeps a site's update apart: `take_masked` adds it to the accumulator and forgets it. But
sites do not rely on this server being honest; see client/secagg.py for what they check.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from common.secagg import derivation, errors, keys, masks, shamir, transcript
from common.secagg.errors import Blame, Exchange, Fault, TooFewSitesError
from common.secagg.graph import Graph
from common.secagg.keys import RandomBytes
from common.secagg.masks import Ring
from common.secagg.messages import (
    Advertisement,
    AdvertiseReply,
    AdvertiseRequest,
    ConsistReply,
    ConsistRequest,
    MaskReply,
    MaskRequest,
    ShareReply,
    ShareRequest,
    Table,
    UnmaskReply,
    UnmaskRequest,
)
from common.secagg.policy import Policy, Roster, check_roster
from server.unmasking import Rebuilder, Unmasking, remove_masks


class Stage(IntEnum):
    """Which exchange is open; the first five are `Exchange`."""

    ADVERTISE = 0
    SHARE = 1
    MASK = 2
    CONSIST = 3
    UNMASK = 4
    DONE = 5
    ABORTED = 6


@dataclass(frozen=True, eq=False)
class SecureSum:
    """The sum of the survivors' encoded vectors modulo 2^b, shape (words,), and whose they are."""

    total: Ring
    survivors: tuple[int, ...]


class SecAggServer:
    """One session.

    Args:
        policy, roster: the federation's; sites refuse others.
        run, round_number, attempt: (round_number, attempt) must grow with every session of a run.
        cohort: U0, whom to ask; any order.
        context: `transcript.context_hash` of the adapter and configuration that sites trained on.
        random_bytes: `os.urandom`. Only finds wrong shares; no secret depends on it.
        threads: for taking masks off.

    Raises:
        PolicyError: the cohort is too small or too large, or not in the roster.
    """

    def __init__(
        self,
        *,
        policy: Policy,
        roster: Roster,
        run: bytes,
        round_number: int,
        attempt: int,
        cohort: Sequence[int],
        context: bytes,
        random_bytes: RandomBytes,
        threads: int = 1,
    ) -> None:
        check_roster(roster)
        if not policy.min_cohort <= len(set(cohort)) == len(cohort) <= policy.n_max:
            raise errors.PolicyError(
                f"a cohort must be {policy.min_cohort} .. {policy.n_max} distinct sites, found {len(cohort)}"
            )
        if strangers := sorted(set(cohort).difference(roster)):
            raise errors.PolicyError(f"sites {strangers[:5]} are not in the roster")
        self.policy, self.roster = policy, roster
        self.request = AdvertiseRequest(
            run,
            round_number,
            attempt,
            tuple(sorted(cohort)),
            transcript.roster_hash(roster),
            policy.hash,
            context,
        )
        self.sid = transcript.session_id(
            run=run,
            round_number=round_number,
            attempt=attempt,
            roster=self.request.roster_hash,
            policy=policy.hash,
            cohort=self.request.cohort,
            context=context,
        )
        self.stage = Stage.ADVERTISE
        self.blames: list[Blame] = []
        self._random_bytes = random_bytes
        self._threads = threads
        self._asked = self.request.cohort
        self._seen: set[int] = set()  # who has replied in this exchange
        self._advertised: dict[int, Advertisement] = {}
        self._keys_seen: set[bytes] = set()
        self._h1 = b""
        self._graph = Graph((), 0, 0)
        self._sealed: dict[int, Table] = {}
        self._u1: tuple[int, ...] = ()
        self._u2: tuple[int, ...] = ()
        self._u3: tuple[int, ...] = ()
        self._total: Ring | None = None
        self._signatures: dict[int, bytes] = {}
        self._b_shares: dict[int, dict[int, int]] = {}  # owner → giver → share
        self._s_shares: dict[int, dict[int, int]] = {}

    @property
    def asked(self) -> tuple[int, ...]:
        """Whom to send the current request, ascending."""
        return self._asked

    @property
    def replied(self) -> frozenset[int]:
        """Who has replied to it, rightly or wrongly."""
        return frozenset(self._seen)

    # Exchange 0

    def advertise_request(self) -> AdvertiseRequest:
        """The same for all of U0."""
        return self.request

    def take_advertisement(self, sender: int, reply: AdvertiseReply) -> bool:
        """Whether it was accepted; if not, `blames` says why. So with every `take_…`."""
        entry = reply.advertisement
        if not self._admits(Stage.ADVERTISE, sender, entry.site, reply.session):
            return False
        if any(not keys.is_canonical_point(k) or keys.is_low_order_point(k) for k in (entry.c, entry.s)):
            return self._reject(sender, Fault.BAD_POINT)
        if not derivation.is_signed(entry, self.sid, self.roster):
            return self._reject(sender, Fault.BAD_SIGNATURE)
        if entry.c == entry.s or not self._keys_seen.isdisjoint((entry.c, entry.s)):
            return self._reject(sender, Fault.DUPLICATE_KEY)
        self._keys_seen.update((entry.c, entry.s))
        self._advertised[sender] = entry
        return True

    def close_advertise(self) -> ShareRequest:
        """U1 is who has advertised. The same request for all of U1.

        Raises:
            TooFewSitesError: the round is over. So with every `close_…`.
        """
        self._close(Stage.ADVERTISE, len(self._advertised), self.policy.min_cohort)
        self._u1 = self._ask(self._advertised)
        entries = tuple(self._advertised[site] for site in self._u1)
        self._h1 = transcript.u1_hash(self.sid, (entry.to_bytes() for entry in entries))
        self._graph = self.policy.graph_of(self._u1, self._h1)
        return ShareRequest(self.sid, entries)

    # Exchange 1

    def take_shares(self, sender: int, reply: ShareReply) -> bool:
        if not self._admits(Stage.SHARE, sender, reply.site, reply.session):
            return False
        if tuple(receiver for receiver, _ in reply.rows) != self._graph.neighbours(sender):
            return self._reject(sender, Fault.WRONG_RECIPIENTS)
        self._sealed[sender] = reply.rows
        return True

    def close_share(self) -> dict[int, MaskRequest]:
        """U2 is who has shared. To each of U2 its own request: what its neighbours sealed for it."""
        self._close(Stage.SHARE, len(self._sealed), self.policy.smallest(len(self._u1)))
        self._u2 = self._ask(self._sealed)
        inboxes: dict[int, list[tuple[int, bytes]]] = {site: [] for site in self._u2}
        for sender in self._u2:  # ascending, so each inbox is too
            for receiver, sealed in self._sealed[sender]:
                if receiver in inboxes:
                    inboxes[receiver].append((sender, sealed))
        self._sealed.clear()
        self._total = np.zeros(self.policy.words, dtype=masks.ring_dtype(self.policy.ring_bits))
        return {site: MaskRequest(self.sid, self._u2, tuple(inbox)) for site, inbox in inboxes.items()}

    # Exchange 2

    def take_masked(self, sender: int, reply: MaskReply) -> bool:
        """Add one masked vector to the accumulator. It is not kept."""
        if not self._admits(Stage.MASK, sender, reply.site, reply.session) or self._total is None:
            return False
        if reply.vector.shape != self._total.shape or reply.vector.dtype != self._total.dtype:
            return self._reject(sender, Fault.WRONG_SIZE)
        np.add(self._total, reply.vector, out=self._total)  # unsigned: wraps modulo 2^b
        self._u3 += (sender,)
        return True

    def close_mask(self) -> ConsistRequest:
        """U3 is whose vector is in the accumulator. The same request for all of U3."""
        self._close(Stage.MASK, len(self._u3), self.policy.smallest(len(self._u1)))
        self._u3 = self._ask(self._u3)
        survivors = set(self._u3)
        for owner in self._u2:  # can every secret be rebuilt that will be needed?
            holders = survivors.intersection((*self._graph.neighbours(owner), owner))
            if len(holders) < self._graph.share_threshold:
                self._abort()
                raise TooFewSitesError(Exchange.MASK, len(holders), self._graph.share_threshold)
        return ConsistRequest(self.sid, self._u3)

    # Exchange 3

    def take_signature(self, sender: int, reply: ConsistReply) -> bool:
        if not self._admits(Stage.CONSIST, sender, reply.site, reply.session):
            return False
        digest = transcript.consist_digest(self.sid, self._h1, self._u2, self._u3, sender)
        if not keys.verify(self.roster[sender], digest, reply.signature):
            return self._reject(sender, Fault.BAD_SIGNATURE)
        self._signatures[sender] = reply.signature
        return True

    def close_consist(self) -> UnmaskRequest:
        """Any t signatures do; more would only be more to verify. The same request for all signers."""
        needed = self.policy.threshold(len(self._u1))
        self._close(Stage.CONSIST, len(self._signatures), needed)
        signers = self._ask(self._signatures)
        return UnmaskRequest(self.sid, tuple((site, self._signatures[site]) for site in signers[:needed]))

    # Exchange 4

    def take_unmask(self, sender: int, reply: UnmaskReply) -> bool:
        if not self._admits(Stage.UNMASK, sender, reply.site, reply.session):
            return False
        survivors, neighbours = set(self._u3), self._graph.neighbours(sender)
        due_b = survivors.intersection((*neighbours, sender))
        due_s = set(self._u2).difference(survivors).intersection(neighbours)
        given: list[dict[int, int]] = []
        for rows, due in ((reply.b_shares, due_b), (reply.s_shares, due_s)):
            owners = [owner for owner, _ in rows]
            if not transcript.is_ascending(owners) or not due.issuperset(owners):
                return self._reject(sender, Fault.UNASKED_SHARE)
            try:
                given.append({owner: shamir.element(share) for owner, share in rows})
            except ValueError:
                return self._reject(sender, Fault.MALFORMED)
            for owner in sorted(due.difference(owners)):  # it could not open it, or says so
                self.blames.append(Blame(sender, Exchange.UNMASK, Fault.MISSING_SHARE, about=owner))
        for shares, target in zip(given, (self._b_shares, self._s_shares), strict=True):
            for owner, share in shares.items():
                target.setdefault(owner, {})[sender] = share
        return True

    def close_unmask(self) -> SecureSum:
        """Take the masks off and return the exact sum over U3.

        Raises:
            TooFewSitesError: too few have replied.
            CannotRebuildError: too many shares of one secret are wrong.
        """
        # Only a lower bound: on the k-regular graph each secret has its own holders
        responders = {giver for shares in self._b_shares.values() for giver in shares}
        self._close(Stage.UNMASK, len(responders), self._graph.share_threshold)
        total, self._total = self._total, None
        if total is None:
            raise errors.ServerOutOfOrderError("there is no accumulator to unmask")
        known = Unmasking(
            self.sid,
            self._h1,
            self._graph,
            self._advertised,
            self._u3,
            tuple(sorted(set(self._u2).difference(self._u3))),
        )
        rebuilder = Rebuilder(self._graph.share_threshold, self._random_bytes, self.blames.append)
        try:
            remove_masks(total, known, self._b_shares, self._s_shares, rebuilder, self._threads)
        except errors.CannotRebuildError:
            self._abort()
            raise
        self._b_shares, self._s_shares = {}, {}
        return SecureSum(total, self._u3)

    # Plumbing

    def report(self, sender: int, fault: Fault = Fault.MALFORMED) -> None:
        """Name a site whose reply could not even be decoded."""
        self.blames.append(Blame(sender, Exchange(min(self.stage, Stage.UNMASK)), fault))

    def _admits(self, stage: Stage, sender: int, site: int, session: bytes) -> bool:
        """Whether a reply is to the open exchange of this session, from a site that was asked, its first."""
        if self.stage is not stage:
            return False  # late or early: no fault, no effect
        if sender not in self._asked:
            return self._reject(sender, Fault.UNEXPECTED_SENDER)
        if session != self.sid or site != sender:
            return self._reject(sender, Fault.WRONG_SESSION)
        if sender in self._seen:
            return self._reject(sender, Fault.REPEATED)
        self._seen.add(sender)
        return True

    def _reject(self, sender: int, fault: Fault) -> bool:
        self.report(sender, fault)
        return False

    def _ask(self, sites: Iterable[int]) -> tuple[int, ...]:
        self._asked = tuple(sorted(sites))
        return self._asked

    def _close(self, stage: Stage, found: int, needed: int) -> None:
        if self.stage is not stage:
            raise errors.ServerOutOfOrderError(f"{stage.name} cannot be closed in {self.stage.name}")
        if found < needed:
            self._abort()
            raise TooFewSitesError(Exchange(stage), found, needed)
        self.stage = Stage(stage + 1)
        self._seen = set()

    def _abort(self) -> None:
        self.stage = Stage.ABORTED
        self._total = None
        self._sealed, self._b_shares, self._s_shares = {}, {}, {}
