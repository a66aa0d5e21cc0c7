"""The real clients against a server that does what it likes, explored by hypothesis.

Five sites, t = 4, min_cohort = 4, c_max = 1. Site 5 is the server's: its key signs anything and its store
is open. In every order, with any sets, over several sessions, these must hold:

1. For no id are both kinds of share ever given by honest sites.
2. An honest site signs one survivor set in a session, and no two of one U1 reach t signatures.
3. No mask and no update is used twice.
4. From all that the server and site 5 have ever seen, no sum follows over fewer than
   min_cohort − c_max honest sites; and where shares rebuild all that is needed, the sum is exact.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

import client.secagg
from client.secagg import SecAggClient
from client.secagg_state import Journal, Masked, Signed, Update
from common.errors import ProtocolError
from common.secagg import masks, shamir, transcript
from common.secagg.errors import CannotRebuildError
from common.secagg.messages import (
    Advertisement,
    ConsistRequest,
    MaskRequest,
    ShareRequest,
    Table,
    UnmaskRequest,
)
from server.unmasking import Rebuilder, Unmasking, remove_masks
from tests.secagg_world import CONTEXT, Stream, World, small_policy

SITES = (1, 2, 3, 4, 5)
COLLUDER = 5
HONEST = SITES[:-1]

sites = st.sampled_from(SITES)
subsets = st.sampled_from([s for size in (5, 4, 3, 2) for s in combinations(SITES, size)])
large = st.one_of(st.just(SITES), st.sampled_from([*combinations(SITES, 4)]))
mostly_all = st.one_of(st.just(SITES), large, subsets)


@dataclass
class Session:
    """All that the server has collected under one opening."""

    request: Any
    sid: bytes
    adverts: dict[int, Advertisement] = field(default_factory=dict)
    sealed: dict[int, Table] = field(default_factory=dict)
    # By site: the sets that its own state had when it answered
    views: dict[int, tuple[bytes, tuple[int, ...]]] = field(default_factory=dict)  # h1, U2
    vectors: dict[int, tuple[int, Any]] = field(default_factory=dict)  # update number, y
    signed: dict[int, list[tuple[bytes, tuple[int, ...], tuple[int, ...]]]] = field(default_factory=dict)
    signatures: dict[tuple[Any, int], bytes] = field(default_factory=dict)
    b_shares: dict[int, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))
    s_shares: dict[int, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))


class LyingServer(RuleBasedStateMachine):
    """Every rule asks one or all sites something; a refusal is fine, a broken invariant is not."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(5, policy=small_policy(words=4))
        self.sessions: list[Session] = []
        self.number = 0
        self.updates: dict[tuple[int, int], Any] = {}  # by number and site
        self.latest: dict[int, int] = {}
        self.t = self.world.policy.threshold(5)
        self.seeds_used: dict[int, list[bytes]] = defaultdict(list)
        self.asking = 0
        self.apply_masks = masks.apply_masks

        def recording(vector: Any, seeds: Any, threads: int = 1) -> None:
            if self.asking:  # a site masks; otherwise an invariant unmasks
                self.seeds_used[self.asking] += [seed.reveal() for seed, _ in seeds]
            self.apply_masks(vector, seeds, threads)

        client.secagg.masks.apply_masks = recording  # type: ignore[attr-defined]

    def teardown(self) -> None:
        client.secagg.masks.apply_masks = self.apply_masks  # type: ignore[attr-defined]

    def ask(self, site: int, call: Any) -> Any:
        """The reply, or None where the site refuses."""
        self.asking = site
        try:
            return call(self.world.clients[site])
        except ProtocolError:
            return None
        finally:
            self.asking = 0

    def session(self, index: int) -> Session | None:
        return self.sessions[index % len(self.sessions)] if self.sessions else None

    # What the server can do

    @rule(cohort=mostly_all, bump=st.sampled_from(["round", "attempt", "neither"]), other=st.booleans())
    def open(self, cohort: tuple[int, ...], bump: str, other: bool) -> None:
        if len(self.sessions) >= 3 or len(cohort) < 4:
            return
        last = self.sessions[-1].request if self.sessions else None
        round_number = (last.round if last else 1) + (bump == "round")
        attempt = 0 if bump == "round" or not last else last.attempt + (bump == "attempt")
        context = bytes(32) if other and last else CONTEXT
        made = self.world.server(round_number, attempt, cohort, context=context)
        self.sessions.append(Session(made.request, made.sid))
        for site in SITES:
            self.advertise(site, -1)

    def advertise(self, site: int, index: int) -> None:
        session = self.session(index)
        if session is None:
            return
        reply = self.ask(site, lambda c: c.advertise(session.request, session.request.context_hash))
        if reply is not None:
            session.adverts[site] = reply.advertisement

    @rule(site=sites, index=st.integers(0, 2))
    def advertise_again(self, site: int, index: int) -> None:
        self.advertise(site, index)

    @rule(index=st.integers(-1, 2), shown=mostly_all, to=mostly_all)
    def share(self, index: int, shown: tuple[int, ...], to: tuple[int, ...]) -> None:
        session = self.session(index)
        if session is None:
            return
        entries = tuple(session.adverts[site] for site in shown if site in session.adverts)
        for site in to:
            reply = self.ask(site, lambda c: c.share(ShareRequest(session.sid, entries)))
            if reply is not None:
                session.sealed[site] = reply.rows

    @rule(index=st.integers(-1, 2), sharers=mostly_all, to=mostly_all, same=st.booleans())
    def mask(self, index: int, sharers: tuple[int, ...], to: tuple[int, ...], same: bool) -> None:
        session = self.session(index)
        if session is None:
            return
        sharers = tuple(site for site in sharers if site in session.sealed)
        for site in to:
            if not same or site not in self.latest:
                self.number += 1
                self.updates[self.number, site] = self.world.vector()
                self.latest[site] = self.number
            number = self.latest[site]
            vector = self.updates[number, site]
            inbox = tuple(
                (sender, data)
                for sender in sharers
                for receiver, data in session.sealed[sender]
                if receiver == site
            )
            request = MaskRequest(session.sid, sharers, inbox)
            reply = self.ask(site, lambda c: c.mask(request, Update(number, vector)))  # noqa: B023
            if reply is not None:
                assert site not in session.vectors, "two vectors in one session"
                session.vectors[site] = (number, reply.vector)
                state = self.world.clients[site].state
                assert isinstance(state, Masked)
                session.views[site] = (state.h1, state.sharers)

    @rule(index=st.integers(-1, 2), survivors=mostly_all, to=mostly_all)
    def consist(self, index: int, survivors: tuple[int, ...], to: tuple[int, ...]) -> None:
        session = self.session(index)
        if session is None:
            return
        survivors = tuple(site for site in survivors if site in session.vectors)
        for site in to:
            reply = self.ask(site, lambda c: c.consist(ConsistRequest(session.sid, survivors)))
            if reply is not None:
                sets = (*session.views[site], survivors)
                session.signed.setdefault(site, []).append(sets)
                session.signatures[sets, site] = reply.signature

    @rule(index=st.integers(-1, 2), which=st.integers(0, 3), to=mostly_all, mixed=st.booleans())
    def unmask(self, index: int, which: int, to: tuple[int, ...], mixed: bool) -> None:
        """Ask with the signatures on one of the sets that somebody signed, site 5's forged; or, `mixed`,
        with everybody's on whatever they signed."""
        session = self.session(index)
        if session is None or not session.signatures:
            return
        views = sorted({sets for sets, _ in session.signatures})
        chosen = views[which % len(views)]
        rows = {
            s: sig
            for (of, s), sig in session.signatures.items()
            if of == chosen or (mixed and s in chosen[2])
        }
        if COLLUDER in chosen[2]:
            digest = transcript.consist_digest(session.sid, *chosen, COLLUDER)
            rows[COLLUDER] = self.world.identities[COLLUDER].sign(digest)
        request = UnmaskRequest(session.sid, tuple(sorted(rows.items())))
        for site in to:
            if session.signed.get(site, [chosen])[-1] != chosen:
                continue  # it would refuse, and be lost for the question with its own set
            reply = self.ask(site, lambda c: c.unmask(request))
            if reply is not None:
                for table, shares in ((reply.b_shares, session.b_shares), (reply.s_shares, session.s_shares)):
                    for owner, share in table:
                        shares[owner][site] = shamir.element(share)

    @rule(
        sets=st.tuples(mostly_all, large, large, large),
        told_first=mostly_all,
        same=st.booleans(),
        again=st.sampled_from([False, False, True]),
        mixed=st.booleans(),
    )
    def split_world(
        self,
        sets: tuple[tuple[int, ...], ...],
        told_first: tuple[int, ...],
        same: bool,
        again: bool,
        mixed: bool,
    ) -> None:
        """One session to its end, with two survivor sets: each site is told one of them (`again`: then
        the other), then asked to unmask with the signatures on its own set, or with all there are."""
        to, sharers, first, second = sets
        self.open(SITES, "attempt", False)
        self.share(-1, SITES, SITES)
        self.mask(-1, sharers, to, same)
        for site in SITES:
            self.consist(-1, first if site in told_first else second, (site,))
        if again:
            self.consist(-1, second, SITES)
        for which in (0, 1):
            self.unmask(-1, which, SITES, mixed)

    @rule(site=sites)
    def restart(self, site: int) -> None:
        self.world.clients[site] = self.world.client(site, witness=self.world.clients[site].serial)

    @rule(site=sites)
    def give_up(self, site: int) -> None:
        self.world.clients[site].abort()

    # What must hold

    @invariant()
    def never_both_kinds_of_share(self) -> None:
        for session in self.sessions:
            for owner in SITES:
                kinds = [
                    any(giver in HONEST for giver in shares.get(owner, {}))
                    for shares in (session.b_shares, session.s_shares)
                ]
                assert kinds != [True, True], f"both shares of site {owner}"

    @invariant()
    def never_two_survivor_sets(self) -> None:
        for session in self.sessions:
            for site in HONEST:
                assert len(session.signed.get(site, [])) <= 1, f"site {site} signed twice"
            votes: dict[bytes, Counter[Any]] = defaultdict(Counter)
            for site in HONEST:
                for sets in session.signed.get(site, []):
                    votes[sets[0]][sets] += 1
            for of_one_h1 in votes.values():  # sites that were shown another U1 are another cohort
                reached = sum(count + 1 >= self.t for count in of_one_h1.values())
                assert reached <= 1, "two sets could have t signatures"

    @invariant()
    def never_a_mask_or_an_update_twice(self) -> None:
        for site in SITES:
            assert len(set(self.seeds_used[site])) == len(self.seeds_used[site]), "a seed was used twice"
        uploads = [
            (site, number) for session in self.sessions for site, (number, _) in session.vectors.items()
        ]
        assert len(set(uploads)) == len(uploads), "an update was uploaded twice"

    @invariant()
    def never_a_sum_over_few(self) -> None:
        for session in self.sessions:
            for group in self.exposed_groups(session):
                assert len(group) >= self.world.policy.min_cohort - 1, f"the sum over {group} is exposed"

    def colluders_shares(self) -> dict[bytes, set[int]]:
        """Session → owners whose shares site 5 could open: it has both kinds of each."""
        held: dict[bytes, set[int]] = defaultdict(set)
        for data in self.world.stores[COLLUDER].saves:
            state = Journal.decode(data).session
            masked = state.masked if isinstance(state, Signed) else state
            if isinstance(masked, Masked):
                held[masked.session] |= set(masked.holdings)
        return held

    def exposed_groups(self, session: Session) -> Iterable[Collection[int]]:
        """Groups of honest sites whose sum follows from the vectors, the shares and what site 5 knows.

        A self-mask falls with t shares of b, a pair mask with t shares of either's s, or if site 5 is one
        of the pair. A pair mask that stays goes out in a sum with the peer's vector if the peer put on
        the same one; if it did not, it hides its site for good.
        """
        held = self.colluders_shares()[session.sid]

        def falls(shares: dict[int, dict[int, int]], owner: int) -> bool:
            givers = {giver for giver in shares.get(owner, {}) if giver != COLLUDER}
            return len(givers) + (owner in held) >= self.t

        graph, hidden = nx.Graph(), set()
        graph.add_nodes_from(site for site in session.vectors if site in HONEST)
        for site in graph.nodes:
            h1, sharers = session.views[site]
            if not falls(session.b_shares, site):
                hidden.add(site)
            for peer in set(sharers).intersection(HONEST) - {site}:
                if falls(session.s_shares, site) or falls(session.s_shares, peer):
                    continue
                their_h1, their_sharers = session.views.get(peer, (b"", ()))
                if peer in session.vectors and their_h1 == h1 and site in their_sharers:
                    graph.add_edge(site, peer)
                else:
                    hidden.add(site)
        for group in nx.connected_components(graph):
            if hidden.isdisjoint(group):
                yield group

    @invariant()
    def abort_or_exact_sum(self) -> None:
        """Put together what an honest server would from the same replies."""
        for session in self.sessions:
            for h1, u2, u3 in {sets for signed in session.signed.values() for sets in signed}:
                if any(session.views.get(site) != (h1, u2) for site in u3):
                    continue
                members = tuple(sorted(session.adverts))
                policy = self.world.policy
                entries = (session.adverts[site].to_bytes() for site in members)
                if transcript.u1_hash(session.sid, entries) != h1:
                    continue
                graph = policy.graph_of(members, h1)
                dropped = tuple(site for site in u2 if site not in u3)
                known = Unmasking(session.sid, h1, graph, session.adverts, u3, dropped)
                total = np.zeros(policy.words, dtype="<u4")
                plain = np.zeros(policy.words, dtype="<u4")
                for site in u3:
                    number, vector = session.vectors[site]
                    total += vector
                    plain += self.updates[number, site]
                rebuilder = Rebuilder(graph.share_threshold, Stream(1), lambda _: None)
                try:
                    remove_masks(total, known, session.b_shares, session.s_shares, rebuilder, 1)
                except CannotRebuildError:
                    continue
                assert np.array_equal(total, plain), "a sum that is not exact"
                EXACT.append(len(u3))


EXACT: list[int] = []
"""Sizes of the sums that came out, to know that the machine gets that far."""


def explore(examples: int, steps: int = 14, **changes: Any) -> None:
    chosen = {"derandomize": True, "database": None, "report_multiple_bugs": False} | changes
    run_state_machine_as_test(
        LyingServer,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            **chosen,
        ),
    )


def test_a_lying_server_gets_nothing() -> None:
    EXACT.clear()
    explore(400)
    assert len(EXACT) > 20 and set(EXACT) >= {4, 5}  # it did get to the end, with and without dropouts


def test_the_machine_reaches_sums() -> None:
    """The straight path through the rules ends in an exact sum, so the machine can get there."""
    EXACT.clear()
    machine = LyingServer()
    try:
        machine.open(SITES, "round", False)
        machine.share(-1, SITES, SITES)
        machine.mask(-1, SITES, SITES, False)
        machine.consist(-1, SITES, SITES)
        machine.unmask(-1, 0, SITES, False)
        for check in (
            machine.never_both_kinds_of_share,
            machine.never_two_survivor_sets,
            machine.never_a_mask_or_an_update_twice,
            machine.never_a_sum_over_few,
            machine.abort_or_exact_sum,
        ):
            check()
    finally:
        machine.teardown()
    assert EXACT == [5]
    assert [set(group) for group in machine.exposed_groups(machine.sessions[0])] == [set(HONEST)]


@pytest.mark.slow
def test_a_lying_server_gets_nothing_however_long_it_tries() -> None:
    explore(1_500, 25, derandomize=False)


# The invariants can fail: clients with one rule taken out


def without_signature_checks(patch: pytest.MonkeyPatch) -> None:
    """And so without an agreed survivor set."""
    patch.setattr(client.secagg.keys, "verify", lambda *_: True)


def signing_twice(patch: pytest.MonkeyPatch) -> None:
    save = SecAggClient._save

    def saving(self: SecAggClient, journal: Journal, session: Any) -> None:
        if not isinstance(session, Signed):
            save(self, journal, session)

    patch.setattr(SecAggClient, "_save", saving)


def with_low_threshold(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("common.secagg.graph.threshold", lambda n, gamma: 2)
    patch.setattr("common.secagg.policy.Policy.smallest", lambda self, n: 2)


def without_marks_and_consumption(patch: pytest.MonkeyPatch) -> None:
    decode = Journal.decode

    def forgetful(data: bytes) -> Journal:
        journal = decode(data)
        session = journal.session
        return Journal(journal.run, journal.site, journal.serial, None, 0, session)

    patch.setattr(client.secagg.Journal, "decode", forgetful)


@pytest.mark.parametrize(
    ("weaken", "found"),
    [
        pytest.param(without_signature_checks, "exposed|both shares", marks=pytest.mark.slow),
        (signing_twice, "signed|two sets"),
        (with_low_threshold, "exposed|both shares|two sets"),
        (without_marks_and_consumption, "uploaded twice"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_weakened_client_is_caught(weaken: Any, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weaken(monkeypatch)
    with pytest.raises(AssertionError, match=found):
        explore(1_000, phases=[Phase.generate])
