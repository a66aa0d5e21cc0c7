"""The five exchanges end to end: exact sums with dropouts everywhere, and every attack refused by name."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.secagg import SecAggClient
from client.secagg_state import Advertised, Closed, Ending, Journal, Shared, Site, Update
from common.secagg import derivation, errors, keys, shamir, transcript
from common.secagg.encoding import Codec, Count, Tensor
from common.secagg.errors import Blame, Exchange, Fault
from common.secagg.graph import GraphRule
from common.secagg.keys import EphemeralKey, Secret
from common.secagg.messages import (
    Advertisement,
    AdvertiseRequest,
    ConsistReply,
    ConsistRequest,
    MaskReply,
    MaskRequest,
    ShareRequest,
    UnmaskReply,
    UnmaskRequest,
)
from common.secagg.policy import Policy
from server.secagg import SecAggServer, Stage
from tests.secagg_world import CONTEXT, RUN, Stream, World, small_policy

SPARSE = GraphRule(complete_up_to=8, secrecy_bits=16, abort_bits=8)
A, S, M, C, U = Exchange


# Sums


@pytest.mark.parametrize("n", [4, 5, 10])
@pytest.mark.parametrize("bits", [16, 32])
def test_all_sites_sum(n: int, bits: int) -> None:
    world = World(n, policy=small_policy(ring_bits=bits))
    assert world.run().survivors == world.ids


@pytest.mark.parametrize("how", ["lost", "silent"])
@pytest.mark.parametrize("exchange", Exchange)
def test_dropouts_at_each_exchange(exchange: Exchange, how: str) -> None:
    """`lost`: the site did its part, the reply never arrived. `silent`: it never heard."""
    world = World(10)
    gone = [2, 9, 10]
    result = world.run(**{how: {exchange: gone}})
    assert set(result.survivors) == set(world.ids) - (set(gone) if exchange <= M else set())


def test_dropouts_at_every_exchange_of_one_session() -> None:
    world = World(15)  # U1 has 14, t = 10
    lost = {A: [1], S: [2], M: [3], C: [4], U: [5]}
    assert set(world.run(lost=lost).survivors) == set(world.ids) - {1, 2, 3}


def test_a_sparse_graph_with_dropouts_at_every_exchange() -> None:
    world = World(48, policy=small_policy(rule=SPARSE))
    server = world.server()
    result = world.run(server, lost={A: [1], S: [2], M: [3, 30], C: [4], U: [5]})
    assert server._graph.degree < 46
    assert set(result.survivors) == set(world.ids) - {1, 2, 3, 30}


def test_ids_need_not_be_small_or_dense() -> None:
    world = World(ids=(1, 77, 5_000, 2**31, 2**32 - 1))
    assert world.run(lost={M: [77]}).survivors == (1, 5_000, 2**31, 2**32 - 1)


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_any_survivors_above_the_threshold_sum_exactly(data: st.DataObject) -> None:
    n = data.draw(st.integers(4, 9))
    world = World(n, seed=data.draw(st.integers(0, 1000)))
    lost: dict[Exchange, list[int]] = {}
    left = set(world.ids)
    for exchange in Exchange:
        lost[exchange] = sorted(data.draw(st.sets(st.sampled_from(sorted(left)), max_size=2))) if left else []
        left -= set(lost[exchange])
    server = world.server()
    try:
        world.run(server, lost=lost)  # compares with the plain sum
    except errors.TooFewSitesError as error:
        assert server.stage is Stage.ABORTED and server._total is None
        assert error.found < error.needed


def test_encoded_updates_average() -> None:
    codec = Codec(32, 20, 50, (Tensor(300, 0.5),), (Count("correct", 1000),))
    world = World(5, policy=Policy(codec, bytes(32), 4, 1))
    rng = np.random.default_rng(1)
    updates = {site: rng.uniform(-0.5, 0.5, 300) for site in world.ids}
    for site in world.ids:
        world.vectors[site] = codec.encode(updates[site], 10 * site, world.random, {"correct": -site})
    result = world.run(lost={M: [2]})
    decoded = codec.decode_sum(result.total, len(result.survivors))
    weights = {site: 10 * site for site in result.survivors}
    mean = sum(weights[site] * updates[site] for site in result.survivors) / sum(weights.values())
    assert decoded.weight == sum(weights.values()) and decoded.counts["correct"] == -13
    assert np.abs(decoded.mean - mean).max() < 1e-7


def test_a_second_round_and_a_second_attempt() -> None:
    world = World(5)
    for round_number, attempt in ((1, 0), (1, 1), (2, 0), (2, 7), (3, 0)):
        world.number += 1
        world.run(world.server(round_number, attempt))
        assert world.clients[1].mark == (round_number, attempt)
        assert world.clients[1].consumed == world.number


def test_sites_restart_between_any_two_exchanges() -> None:
    world = World(5)
    server = world.server()
    for step in (world.advertise, world.share, world.mask, world.consist):
        step(server)
        world.clients = {site: world.client(site, witness=world.clients[site].serial) for site in world.ids}
    assert world.unmask(server).total.tolist() == world.plain_sum(world.ids)


# What is on the wire and in the store


def record(world: World, server: SecAggServer) -> dict[int, Any]:
    """Run a session and keep the masked vectors."""
    seen: dict[int, Any] = {}
    take = server.take_masked

    def taking(sender: int, reply: MaskReply) -> bool:
        seen[sender] = reply.vector.copy()
        return take(sender, reply)

    server.take_masked = taking  # type: ignore[method-assign]
    world.run(server)
    return seen


def test_masked_vectors_are_uniform_and_two_sessions_share_no_mask() -> None:
    world = World(5, policy=small_policy(words=20_000))
    for site in world.ids:
        world.vectors[site][:] = 7
    first = record(world, world.server(1))
    world.number += 1
    second = record(world, world.server(2))
    for vector in (*first.values(), *second.values()):
        counts = np.bincount(vector.view("u1"), minlength=256)
        expected = vector.nbytes / 256
        assert (((counts - expected) ** 2) / expected).sum() < 377  # 255 df, p = 1e-6
    everything = [vector - np.uint32(7) for vector in (*first.values(), *second.values())]
    for i, mask in enumerate(everything):
        assert all((mask != other).mean() > 0.99 for other in everything[:i])


def secrets_in(value: object) -> Iterator[bytes]:
    """Every secret in a state, however deep."""
    if isinstance(value, Secret):
        yield value.reveal()
    elif isinstance(value, dict):
        for item in value.values():
            yield from secrets_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from secrets_in(getattr(value, field.name))


def test_each_exchange_erases_what_it_has_used_up() -> None:
    world = World(5)
    server, store = world.server(), world.stores[1]
    seen: list[Any] = []
    for step in (world.advertise, world.share, world.mask, world.consist, world.unmask):
        step(server)
        seen.append(world.clients[1].state)
    advertised, shared = seen[0], seen[1]
    assert isinstance(advertised, Advertised) and isinstance(shared, Shared)
    assert advertised.s.reveal() not in store.saves[1] and advertised.c.reveal() not in store.saves[1]
    used_up = [shared.b.reveal(), *(s.reveal() for s in shared.pair_seeds.values())]
    used_up += [key.reveal() for key in shared.open_keys.values()]
    assert not any(secret in store.saves[2] for secret in used_up)
    everything = [secret for state in seen for secret in secrets_in(state)]
    assert len(everything) > 15 and not any(secret in store.saves[4] for secret in everything)
    assert seen[4] == Closed(Ending.DONE)


class DiskFullError(Exception):
    """What a store raises that cannot save."""


@pytest.mark.parametrize("exchange", Exchange)
def test_nothing_is_sent_that_was_not_saved(exchange: Exchange) -> None:
    scene = attack(exchange)
    store = scene.world.stores[1]
    before = list(store.saves)

    def fail(_: bytes) -> None:
        raise DiskFullError

    store.save = fail  # type: ignore[method-assign]
    with pytest.raises(DiskFullError):
        scene.send(scene.request)
    assert store.saves == before
    del store.save
    scene.send(scene.request)  # nothing had left, so it may be asked again
    assert len(store.saves) == len(before) + 1


def test_secrets_do_not_show_in_any_repr() -> None:
    world = World(5)
    server = world.server()
    for step in (world.advertise, world.share, world.mask, world.consist):
        step(server)
        state = world.clients[1].state
        shown = repr(state) + repr(world.clients[1].site) + repr(Journal.decode(world.stores[1].saves[-1]))
        for secret in secrets_in(state):
            assert secret.hex() not in shown and repr(secret)[2:-1] not in shown


# Attacks. The server is the adversary unless it says otherwise; up to c_max = 1 sites help it.


@dataclass
class Attack:
    """A session just before an exchange, and the request that an honest server would send to site 1."""

    world: World
    server: SecAggServer
    client: SecAggClient
    request: Any

    def send(self, request: Any) -> object:
        match request:
            case AdvertiseRequest():
                return self.client.advertise(request, CONTEXT)
            case ShareRequest():
                return self.client.share(request)
            case MaskRequest():
                return self.client.mask(request, self.world.update(1))
            case ConsistRequest():
                return self.client.consist(request)
            case UnmaskRequest():
                return self.client.unmask(request)
        raise TypeError

    def is_refused(self, request: Any, error: type[errors.CheckError], check: str) -> None:
        """The right error, the right number, the session closed, and no secret left in the store."""
        secrets = list(secrets_in(self.client.state))
        was_open = not isinstance(self.client.state, Closed)
        with pytest.raises(error) as caught:
            self.send(request)
        assert type(caught.value) is error and caught.value.check == check
        for secret in secrets:
            assert secret not in self.world.stores[1].saves[-1] and secret.hex() not in str(caught.value)
        if was_open:
            assert self.client.state == Closed(Ending.ABORTED)
            if not isinstance(request, AdvertiseRequest):
                with pytest.raises(errors.OutOfOrderError):
                    self.send(self.request)


def attack(exchange: Exchange, n: int = 6, lost: dict[Exchange, list[int]] | None = None) -> Attack:
    world, lost = World(n), lost or {}
    server = world.server()
    steps = (world.advertise, world.share, world.mask, world.consist, world.unmask)
    for earlier, step in list(zip(Exchange, steps, strict=True))[:exchange]:
        step(server, lost.get(earlier, ()))
    request: Any
    match exchange:
        case Exchange.ADVERTISE:
            request = server.advertise_request()
        case Exchange.SHARE:
            request = server.close_advertise()
        case Exchange.MASK:
            request = server.close_share()[1]
        case Exchange.CONSIST:
            request = server.close_mask()
        case Exchange.UNMASK:
            request = server.close_consist()
    return Attack(world, server, world.clients[1], request)


# ADVERTISE


@pytest.mark.parametrize(
    ("changes", "error", "check"),
    [
        ({"run": b"another"}, errors.WrongRunError, "0.1"),
        ({"cohort": (2, 1, 3, 4)}, errors.UnsortedIdsError, "0.3"),
        ({"cohort": (1, 2, 2, 3, 4)}, errors.UnsortedIdsError, "0.3"),
        ({"cohort": (1, 2, 3, 4, 99)}, errors.NotInRosterError, "0.4"),
        ({"cohort": (2, 3, 4, 5)}, errors.NotListedError, "0.5"),
        ({"cohort": (1, 2, 3)}, errors.CohortOutOfRangeError, "0.6"),
        ({"cohort": (1,)}, errors.CohortOutOfRangeError, "0.6"),
        ({"cohort": ()}, errors.NotListedError, "0.5"),
        ({"roster_hash": bytes(32)}, errors.RosterMismatchError, "0.7"),
        ({"policy_hash": bytes(32)}, errors.PolicyMismatchError, "0.8"),
        ({"context_hash": bytes(32)}, errors.ContextMismatchError, "0.9"),
    ],
)
def test_false_openings(changes: dict[str, Any], error: type[errors.CheckError], check: str) -> None:
    scene = attack(A)
    scene.is_refused(replace(scene.request, **changes), error, check)
    scene.send(scene.request)  # a refused opening has used nothing up


def test_a_cohort_above_n_max() -> None:
    world = World(6, policy=small_policy(n_max=5))
    server = world.server(cohort=range(1, 6))
    request = replace(server.advertise_request(), cohort=world.ids)
    with pytest.raises(errors.CohortOutOfRangeError):
        world.clients[1].advertise(request, CONTEXT)


def test_replay_across_rounds_and_attempts() -> None:
    world = World(5)
    old = world.server(3, 1).advertise_request()
    world.run(world.server(3, 1))
    for round_number, attempt in ((3, 1), (3, 0), (2, 9), (0, 0)):
        with pytest.raises(errors.NotAboveMarkError):
            world.clients[1].advertise(replace(old, round=round_number, attempt=attempt), CONTEXT)


def test_replay_across_runs() -> None:
    """Another run's site is another store; its advertisements are signed over another session."""
    world = World(5)
    server = world.server()
    world.advertise(server)
    request = server.close_advertise()
    other = World(5)  # the same keys, another run
    other.roster, other.identities = world.roster, world.identities
    other.clients = {site: other.client(site, run=b"other") for site in other.ids}
    opening = other.server(run=b"other").advertise_request()
    for client in other.clients.values():
        client.advertise(opening, CONTEXT)
    with pytest.raises(errors.WrongSessionError):
        other.clients[1].share(request)


def test_replay_of_an_old_opening_ends_the_open_session() -> None:
    scene = attack(S)
    scene.is_refused(scene.server.advertise_request(), errors.NotAboveMarkError, "0.2")


def test_a_newer_session_replaces_an_open_one() -> None:
    scene = attack(C)
    before = list(secrets_in(scene.client.state))
    scene.client.advertise(scene.world.server(2).advertise_request(), CONTEXT)
    assert isinstance(scene.client.state, Advertised)
    assert not any(secret in scene.world.stores[1].saves[-1] for secret in before)
    with pytest.raises(errors.OutOfOrderError):
        scene.send(scene.request)


def test_different_models_for_different_sites() -> None:
    """Site 1 was sent a model of its own. Its session has another id, so its signature is another's."""
    world = World(6)
    mine, theirs = b"m" * 32, CONTEXT
    server = world.server()
    special = replace(server.advertise_request(), context_hash=mine)
    reply = world.clients[1].advertise(special, mine)
    assert not server.take_advertisement(1, reply)
    assert server.blames == [Blame(1, A, Fault.WRONG_SESSION)]
    for site in world.ids[1:]:
        world.clients[site].advertise(server.advertise_request(), theirs)
    entries = [world.clients[site].state.own for site in world.ids]  # type: ignore[union-attr]
    sid = world.clients[2].state.session  # type: ignore[union-attr]
    with pytest.raises(errors.BadAdvertisementSignatureError):  # even if it lies about the session's id
        world.clients[2].share(ShareRequest(sid, tuple(entries)))


# SHARE


def with_entry(request: ShareRequest, site: int, **changes: Any) -> ShareRequest:
    """The request with one advertisement changed, and not signed anew."""
    entries = [replace(e, **changes) if e.site == site else e for e in request.advertisements]
    return replace(request, advertisements=tuple(entries))


def signed_entry(world: World, server: SecAggServer, site: int, **changes: Any) -> Advertisement:
    """A colluder's advertisement: whatever it likes, properly signed."""
    entry = replace(server._advertised[site], **changes)
    digest = transcript.advertisement_digest(server.sid, site, entry.c, entry.s, entry.commitment)
    return replace(entry, signature=world.identities[site].sign(digest))


@pytest.mark.parametrize("field", ["c", "s", "commitment", "signature"])
def test_substituted_keys(field: str) -> None:
    scene = attack(S)
    new = EphemeralKey(Secret(bytes([3] * 32))).public if field in "cs" else bytes([3] * 32)
    changes = {field: new if field != "signature" else bytes([3] * 64)}
    request = with_entry(scene.request, 4, **changes)
    scene.is_refused(request, errors.BadAdvertisementSignatureError, "1.7")


@pytest.mark.parametrize("field", ["c", "s", "commitment", "signature"])
def test_my_own_advertisement_changed(field: str) -> None:
    scene = attack(S)
    entry = scene.request.advertisements[0]
    value = bytes(b ^ 1 for b in getattr(entry, field))
    scene.is_refused(
        with_entry(scene.request, 1, **{field: value}), errors.OwnAdvertisementChangedError, "1.3"
    )


def test_relabelled_keys() -> None:
    """Site 4's advertisement under site 5's id."""
    scene = attack(S)
    fourth = scene.request.advertisements[3]
    changes = {name: getattr(fourth, name) for name in ("c", "s", "commitment", "signature")}
    entries = [e for e in scene.request.advertisements if e.site != 4]
    request = with_entry(replace(scene.request, advertisements=tuple(entries)), 5, **changes)
    scene.is_refused(request, errors.BadAdvertisementSignatureError, "1.7")


def test_a_colluder_copies_a_victims_keys() -> None:
    scene = attack(S)
    victim = scene.request.advertisements[2]
    for changes in ({"c": victim.c}, {"s": victim.s}, {"c": victim.s}):
        scene = attack(S)
        entry = signed_entry(scene.world, scene.server, 4, **changes)
        entries = tuple(entry if e.site == 4 else e for e in scene.request.advertisements)
        scene.is_refused(replace(scene.request, advertisements=entries), errors.DuplicateKeyError, "1.6")


def test_a_colluder_uses_one_key_twice() -> None:
    scene = attack(S)
    entry = signed_entry(scene.world, scene.server, 4, c=scene.request.advertisements[3].s)
    entries = tuple(entry if e.site == 4 else e for e in scene.request.advertisements)
    scene.is_refused(replace(scene.request, advertisements=entries), errors.DuplicateKeyError, "1.6")


def test_replayed_advertisements_of_an_earlier_round() -> None:
    scene = attack(S)
    old = scene.request.advertisements[3]
    world = scene.world
    server = world.server(2)
    world.advertise(server)
    request = server.close_advertise()
    entries = tuple(old if e.site == 4 else e for e in request.advertisements)
    scene.is_refused(replace(request, advertisements=entries), errors.BadAdvertisementSignatureError, "1.7")


LOW_ORDER = [0, 1, keys.FIELD_PRIME - 1, *sorted(keys._LOW_ORDER)[2:4]]


@pytest.mark.parametrize("field", ["c", "s"])
@pytest.mark.parametrize("u", LOW_ORDER)
def test_low_order_points_from_a_colluder_to_a_site(u: int, field: str) -> None:
    scene = attack(S)
    entry = signed_entry(scene.world, scene.server, 4, **{field: u.to_bytes(32, "little")})
    entries = tuple(entry if e.site == 4 else e for e in scene.request.advertisements)
    scene.is_refused(replace(scene.request, advertisements=entries), errors.LowOrderPointError, "1.5")


@pytest.mark.parametrize("u", [keys.FIELD_PRIME + 9, 2**255 + 9, keys.FIELD_PRIME, 2**256 - 1])
def test_points_that_are_not_canonical(u: int) -> None:
    scene = attack(S)
    entry = signed_entry(scene.world, scene.server, 4, s=u.to_bytes(32, "little"))
    entries = tuple(entry if e.site == 4 else e for e in scene.request.advertisements)
    scene.is_refused(replace(scene.request, advertisements=entries), errors.MalformedPointError, "1.5")


@pytest.mark.parametrize("u", LOW_ORDER)
def test_low_order_points_from_a_site_to_the_server(u: int) -> None:
    world = World(6)
    server = world.server()
    request = server.advertise_request()
    replies = {site: world.clients[site].advertise(request, CONTEXT) for site in world.ids}
    server._advertised[4] = replies[4].advertisement  # for signed_entry
    bad = signed_entry(world, server, 4, s=u.to_bytes(32, "little"))
    del server._advertised[4]
    assert not server.take_advertisement(4, replace(replies[4], advertisement=bad))
    assert server.blames == [Blame(4, A, Fault.BAD_POINT)]


@pytest.mark.parametrize(
    ("order", "error", "check"),
    [
        ((2, 1, 3, 4, 5, 6), errors.UnsortedIdsError, "1.1"),
        ((1, 2, 2, 3, 4, 5), errors.UnsortedIdsError, "1.1"),
        ((2, 3, 4, 5, 6), errors.NotListedError, "1.3"),
        ((1, 2, 3), errors.TooFewMembersError, "1.4"),
        ((), errors.NotListedError, "1.3"),
    ],
)
def test_false_u1_lists(order: tuple[int, ...], error: type[errors.CheckError], check: str) -> None:
    scene = attack(S)
    entries = {entry.site: entry for entry in scene.request.advertisements}
    request = replace(scene.request, advertisements=tuple(entries[site] for site in order))
    scene.is_refused(request, error, check)


def test_u1_beyond_u0() -> None:
    """A roster member that was not invited, with a good signature over this very session."""
    world = World(7)
    server = world.server(cohort=range(1, 7))
    world.advertise(server)
    request = server.close_advertise()
    entry = replace(request.advertisements[0], site=7)
    digest = transcript.advertisement_digest(server.sid, 7, entry.c, entry.s, entry.commitment)
    entry = replace(entry, signature=world.identities[7].sign(digest))
    scene = Attack(world, server, world.clients[1], request)
    extended = replace(request, advertisements=(*request.advertisements, entry))
    scene.is_refused(extended, errors.NotSubsetError, "1.2")


# MASK


@pytest.mark.parametrize(
    ("sharers", "error", "check"),
    [
        ((2, 1, 3, 4, 5, 6), errors.UnsortedIdsError, "2.1"),
        ((1, 2, 3, 3, 4, 5), errors.UnsortedIdsError, "2.1"),
        ((1, 2, 3, 4, 5, 6, 7), errors.NotSubsetError, "2.2"),
        ((2, 3, 4, 5, 6), errors.NotListedError, "2.3"),
        ((1, 2, 3, 4), errors.TooFewMembersError, "2.4"),  # t = 5 of 6
        ((1, 2), errors.TooFewMembersError, "2.4"),
    ],
)
def test_false_u2_lists(sharers: tuple[int, ...], error: type[errors.CheckError], check: str) -> None:
    scene = attack(M)
    sealed = tuple(row for row in scene.request.sealed if row[0] in sharers)
    scene.is_refused(replace(scene.request, sharers=sharers, sealed=sealed), error, check)


def ciphertext_attacks() -> dict[str, Callable[[Any], Any]]:
    return {
        "one missing": lambda rows: rows[1:],
        "none": lambda rows: (),
        "one twice": lambda rows: (*rows, rows[-1]),
        "out of order": lambda rows: rows[::-1],
        "from myself": lambda rows: ((1, rows[0][1]), *rows),
        "from a stranger": lambda rows: (*rows[:-1], (9, rows[-1][1])),
    }


@pytest.mark.parametrize("name", ciphertext_attacks())
def test_false_ciphertext_sets(name: str) -> None:
    scene = attack(M)
    rows = ciphertext_attacks()[name](scene.request.sealed)
    scene.is_refused(replace(scene.request, sealed=rows), errors.WrongCiphertextSetError, "2.5")


def test_swapped_ciphertexts_are_not_opened_and_named() -> None:
    """With n = 6, t = 5 one can be spared; swapping two leaves four shares."""
    scene = attack(M)
    (a, first), (b, second), *rest = scene.request.sealed
    swapped = replace(scene.request, sealed=((a, second), (b, first), *rest))
    scene.is_refused(swapped, errors.TooFewSharesError, "2.6")
    assert scene.world.blamed[1] == [
        Blame(a, S, Fault.UNOPENED_SHARE, about=a),
        Blame(b, S, Fault.UNOPENED_SHARE, about=b),
    ]


def test_one_bad_ciphertext_is_survived_and_named() -> None:
    scene = attack(M)
    (sender, _), *rest = scene.request.sealed
    bad = replace(scene.request, sealed=((sender, bytes(80)), *rest))
    assert isinstance(scene.send(bad), MaskReply)
    assert scene.world.blamed[1] == [Blame(sender, S, Fault.UNOPENED_SHARE, about=sender)]


@pytest.mark.parametrize("length", [0, 1, 79, 81, 160])
def test_truncated_and_oversized_ciphertexts_cannot_even_be_written(length: int) -> None:
    scene = attack(M)
    (sender, _), *rest = scene.request.sealed
    with pytest.raises(errors.MessageError):
        replace(scene.request, sealed=((sender, bytes(length)), *rest))


def test_a_colluders_shares_that_are_no_field_elements() -> None:
    """Properly sealed, but 2^256 − 1 twice."""
    scene = attack(M)
    state = scene.client.state
    assert isinstance(state, Shared)
    aad = transcript.share_aad(state.session, state.h1, 4, 1)
    forged = keys.seal_once(state.open_keys[4], Secret(b"\xff" * 64), aad)
    rows = tuple((site, forged if site == 4 else sealed) for site, sealed in scene.request.sealed)
    assert isinstance(scene.send(replace(scene.request, sealed=rows)), MaskReply)
    assert scene.world.blamed[1] == [Blame(4, S, Fault.UNOPENED_SHARE, about=4)]


@pytest.mark.parametrize(
    "vector",
    [
        np.zeros(4, dtype="<u4"),
        np.zeros(6, dtype="<u4"),
        np.zeros(5, dtype="<u2"),
        np.zeros(5, dtype="<i4"),
        np.zeros(5),
        np.zeros((5, 1), dtype="<u4"),
    ],
)
def test_wrong_vectors_of_ones_own(vector: Any) -> None:
    scene = attack(M)
    with pytest.raises(errors.WrongVectorError):
        scene.client.mask(scene.request, Update(1, vector))
    assert scene.client.state == Closed(Ending.ABORTED) and scene.client.consumed == 0


def test_nan_and_infinity_never_reach_the_ring() -> None:
    codec = small_policy().codec
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(errors.NonFiniteError):
            codec.encode(np.array([0.0, bad, 0.0, 0.0]), 1, Stream(1))


def test_abort_and_retry_with_the_same_update() -> None:
    """The server aborts after MASK and asks again without one victim: the difference would be its update."""
    scene = attack(C)
    world, server = scene.world, scene.world.server(1, 1, cohort=(1, 2, 3, 4, 5))
    assert scene.client.consumed == world.number
    world.advertise(server)
    world.share(server)
    request = server.close_share()[1]
    retry = Attack(world, server, scene.client, request)
    retry.is_refused(request, errors.UpdateConsumedError, "2.7")


def test_an_update_is_consumed_only_by_its_upload() -> None:
    scene = attack(M)
    scene.client.abort()
    assert scene.client.consumed == 0
    scene.world.run(scene.world.server(1, 1))
    assert scene.client.consumed == 1


# CONSIST


@pytest.mark.parametrize(
    ("survivors", "error", "check"),
    [
        ((2, 1, 3, 4, 5), errors.UnsortedIdsError, "3.1"),
        ((1, 1, 2, 3, 4, 5), errors.UnsortedIdsError, "3.1"),
        ((1, 2, 3, 4, 5, 6, 7), errors.NotSubsetError, "3.2"),
        ((2, 3, 4, 5, 6), errors.NotListedError, "3.3"),
        ((1, 2, 3, 4), errors.TooFewMembersError, "3.4"),
        ((1,), errors.TooFewMembersError, "3.4"),
    ],
)
def test_false_survivor_sets(survivors: tuple[int, ...], error: type[errors.CheckError], check: str) -> None:
    scene = attack(C)
    scene.is_refused(replace(scene.request, survivors=survivors), error, check)


def test_a_survivor_that_was_not_in_u2() -> None:
    """Site 6 dropped before its shares came: nobody has a share of its secrets."""
    scene = attack(C, lost={S: [6]})
    scene.is_refused(replace(scene.request, survivors=scene.world.ids), errors.NotSubsetError, "3.2")


def test_two_survivor_sets() -> None:
    scene = attack(C)
    assert isinstance(scene.send(scene.request), ConsistReply)
    other = replace(scene.request, survivors=(1, 2, 3, 4, 5))
    scene.is_refused(other, errors.OutOfOrderError, "3.0")


def test_too_few_of_a_sites_own_neighbourhood_survive() -> None:
    world = World(48, policy=small_policy(rule=SPARSE))
    server = world.server()
    for step in (world.advertise, world.share, world.mask):
        step(server)
    request = server.close_mask()
    graph = server._graph
    dropped = graph.neighbours(1)[: graph.degree - graph.share_threshold + 2]
    survivors = tuple(site for site in world.ids if site not in dropped)
    assert len(survivors) >= world.policy.smallest(48)
    scene = Attack(world, server, world.clients[1], request)
    scene.is_refused(replace(request, survivors=survivors), errors.TooFewMembersError, "3.5")


# UNMASK


def test_too_few_signatures() -> None:
    scene = attack(U)
    scene.is_refused(
        replace(scene.request, signatures=scene.request.signatures[:-1]), errors.TooFewSignaturesError, "4.2"
    )


def signature_attacks() -> dict[str, Callable[[Any], Any]]:
    return {
        "one twice": lambda rows: (rows[0], rows[0], *rows[2:]),
        "out of order": lambda rows: rows[::-1],
        "a stranger": lambda rows: (*rows[:-1], (9, rows[-1][1])),
        "a dropped site": lambda rows: (*rows[:-1], (6, rows[-1][1])),
    }


@pytest.mark.parametrize("name", signature_attacks())
def test_false_signer_sets(name: str) -> None:
    scene = attack(U, lost={M: [6]})
    rows = signature_attacks()[name](scene.request.signatures)
    scene.is_refused(replace(scene.request, signatures=rows), errors.BadSignerSetError, "4.1")


@pytest.mark.parametrize("place", range(5))
def test_each_signature_is_checked(place: int) -> None:
    scene = attack(U)
    rows = list(scene.request.signatures)
    site, signature = rows[place]
    rows[place] = (site, bytes([signature[0] ^ 1]) + signature[1:])
    scene.is_refused(replace(scene.request, signatures=tuple(rows)), errors.BadConsistSignatureError, "4.3")


def test_equivocation_about_the_survivors() -> None:
    """n = 6, t = 5. Sites 1 to 3 are told that all survive, 4 to 6 that site 1 has dropped.

    A colluder signs both. Neither set gets five signatures, so nobody unmasks.
    """
    scene = attack(C)
    world, sid = scene.world, scene.server.sid
    everyone, without = world.ids, world.ids[1:]
    first = {s: world.clients[s].consist(ConsistRequest(sid, everyone)).signature for s in (1, 2, 3)}
    second = {s: world.clients[s].consist(ConsistRequest(sid, without)).signature for s in (4, 5, 6)}
    u2, h1 = scene.server._u2, scene.server._h1
    for signatures, survivors in ((first, everyone), (second, without)):
        digest = transcript.consist_digest(sid, h1, u2, survivors, 4)  # site 4 helps the server
        signatures[4] = world.identities[4].sign(digest)
    assert max(len(first), len(second)) < world.policy.threshold(6)
    mixed = {**second, **first}
    assert len(mixed) >= 5
    with pytest.raises(errors.BadConsistSignatureError):
        world.clients[1].unmask(UnmaskRequest(sid, tuple(sorted(mixed.items()))))
    with pytest.raises(errors.TooFewSignaturesError):
        world.clients[2].unmask(UnmaskRequest(sid, tuple(sorted(first.items()))))
    with pytest.raises(errors.BadConsistSignatureError):
        world.clients[5].unmask(UnmaskRequest(sid, tuple(sorted((first | second).items()))[1:]))


def test_equivocation_about_u2() -> None:
    """Site 1 masks with all, the others without site 6: the signatures stand for different U2."""
    scene = attack(M)
    world, sid, without = scene.world, scene.server.sid, scene.world.ids[:5]
    world.clients[1].mask(scene.request, world.update(1))
    for site in without[1:]:
        inbox = world.inbox(site, without)
        world.clients[site].mask(MaskRequest(sid, without, inbox), world.update(site))
    request = ConsistRequest(sid, without)
    rows = tuple((site, world.clients[site].consist(request).signature) for site in without)
    for site in without:
        with pytest.raises(errors.BadConsistSignatureError):
            world.clients[site].unmask(UnmaskRequest(sid, rows))


def test_equivocation_about_u1() -> None:
    """Site 1 is shown U1 without site 6: other h1, other keys, so no sealed share opens."""
    scene = attack(S)
    world, sid = scene.world, scene.server.sid
    world.share_all(replace(scene.request, advertisements=scene.request.advertisements[:5]), [1])
    world.share_all(scene.request, world.ids[1:])
    request = MaskRequest(sid, (1, 2, 3, 4, 5), world.inbox(1, (2, 3, 4, 5)))
    scene.is_refused(request, errors.TooFewSharesError, "2.6")


def test_survivors_and_dropped_never_overlap() -> None:
    """One id in both lists is how Flower's SecAgg+ reveals both shares. Here there is one list, U3, and
    each site takes the dropped from its own U2: for no id are both kinds given, by anybody."""
    world = World(10)
    server = world.server()
    world.advertise(server)
    world.share(server, lost=[10])
    world.mask(server, lost=[3, 7])
    world.consist(server)
    replies: list[UnmaskReply] = []

    def keep(reply: UnmaskReply) -> UnmaskReply:
        replies.append(reply)
        return reply

    world.unmask(server, tamper=keep)
    assert len(replies) == 7
    for reply in replies:
        b_owners, s_owners = ({owner for owner, _ in rows} for rows in (reply.b_shares, reply.s_shares))
        assert b_owners == {1, 2, 4, 5, 6, 8, 9} and s_owners == {3, 7}


# Order, replay and state


@pytest.mark.parametrize("asked", [S, M, C, U])
@pytest.mark.parametrize("due", Exchange)
def test_exchanges_out_of_order_or_twice(due: Exchange, asked: Exchange) -> None:
    """In the state before `due`, the request of `asked`, taken from the very same session."""
    if asked is due:
        pytest.skip("in order")
    scene = attack(max(due, asked))
    if due < asked:  # put site 1's store back to where it was
        store = scene.world.stores[1]
        del store.saves[due:]
        scene.client = scene.world.client(1)
        request = scene.request
    else:
        requests = {S: ShareRequest, M: MaskRequest, C: ConsistRequest, U: UnmaskRequest}
        sid = scene.server.sid
        request = {
            S: ShareRequest(sid, tuple(scene.server._advertised.values())),
            M: MaskRequest(sid, scene.world.ids, scene.world.inbox(1, scene.world.ids)),
            C: ConsistRequest(sid, scene.world.ids),
        }[asked]
        assert isinstance(request, requests[asked])
    scene.request = request
    scene.is_refused(request, errors.OutOfOrderError, f"{int(asked)}.0")


@pytest.mark.parametrize("exchange", Exchange)
def test_the_same_request_twice(exchange: Exchange) -> None:
    scene = attack(exchange)
    scene.send(scene.request)
    error = errors.NotAboveMarkError if exchange is A else errors.OutOfOrderError
    scene.is_refused(scene.request, error, "0.2" if exchange is A else f"{int(exchange)}.0")


@pytest.mark.parametrize("exchange", [S, M, C, U])
def test_another_sessions_request(exchange: Exchange) -> None:
    scene = attack(exchange)
    scene.is_refused(
        replace(scene.request, session=bytes(32)), errors.WrongSessionError, f"{int(exchange)}.0"
    )


def test_rollback_while_the_site_runs() -> None:
    scene = attack(C)
    store = scene.world.stores[1]
    store.saves.append(store.saves[1])  # after SHARE, before MASK: it would mask once more
    count = len(store.saves)
    with pytest.raises(errors.RollbackError):
        scene.client.mask(MaskRequest(scene.server.sid, scene.world.ids, ()), scene.world.update(1))
    assert len(store.saves) == count  # the store is left for a person to look at


def test_rollback_while_the_site_is_down() -> None:
    world = World(5)
    world.run()
    backup, serial = world.stores[1].saves[0], world.clients[1].serial
    world.stores[1].saves.append(backup)
    with pytest.raises(errors.RollbackError):
        world.client(1, witness=serial).advertise(world.server(2).advertise_request(), CONTEXT)


def test_a_lost_store_is_a_rollback_too() -> None:
    world = World(5)
    world.run()
    serial = world.clients[1].serial
    world.stores[1].saves.clear()
    for client in (world.clients[1], world.client(1, witness=serial)):
        with pytest.raises(errors.RollbackError):
            client.advertise(world.server(2).advertise_request(), CONTEXT)


def test_a_store_of_another_site_or_run() -> None:
    world = World(5)
    world.run()
    world.stores[1].saves.append(world.stores[2].saves[-1])
    with pytest.raises(errors.RollbackError):
        _ = world.client(1).serial
    with pytest.raises(errors.RollbackError):
        _ = world.client(2, run=b"another").serial


def test_a_damaged_store_is_refused_at_every_byte_it_can_be_cut() -> None:
    scene = attack(C)
    data = scene.world.stores[1].saves[-1]
    for length in range(len(data)):
        with pytest.raises(errors.RollbackError):
            Journal.decode(data[:length])
    with pytest.raises(errors.RollbackError):
        Journal.decode(data + b"\0")


@pytest.mark.parametrize("exchange", Exchange)
def test_every_state_is_stored_whole(exchange: Exchange) -> None:
    scene = attack(exchange)
    if exchange is not A:
        data = scene.world.stores[1].saves[-1]
        assert Journal.decode(data).encode() == data


def test_a_site_must_stand_in_its_own_roster() -> None:
    world = World(4)
    with pytest.raises(errors.PolicyError):
        Site(1, world.identities[2], world.roster, world.policy, RUN)
    with pytest.raises(errors.PolicyError):
        Site(9, world.identities[1], world.roster, world.policy, RUN)
    with pytest.raises(errors.PolicyError):
        Site(1, world.identities[1], world.roster, world.policy, b"")


def test_every_refusal_says_what_and_what_to_do() -> None:
    scene = attack(C)
    with pytest.raises(errors.TooFewMembersError) as caught:
        scene.send(replace(scene.request, survivors=(1, 2)))
    assert str(caught.value) == (
        "secure aggregation, check 3.4: enough sites must be left, found 2, needed 5. "
        "Nothing was revealed. Start a new attempt with a new update and more sites."
    )


# Bad sites, seen by the server


def test_forged_advertisements_are_dropped_and_named() -> None:
    world = World(8)
    server = world.server()
    request = server.advertise_request()
    replies = {site: world.clients[site].advertise(request, CONTEXT) for site in world.ids}
    forged = replace(replies[2], advertisement=replace(replies[2].advertisement, commitment=bytes(32)))
    assert not server.take_advertisement(2, forged)
    assert not server.take_advertisement(3, replies[4])
    assert server.take_advertisement(5, replies[5])
    assert not server.take_advertisement(5, replies[5])
    assert not server.take_advertisement(99, replies[6])
    server._advertised[6] = replies[6].advertisement
    copied = signed_entry(world, server, 6, s=replies[5].advertisement.s)
    del server._advertised[6]
    assert not server.take_advertisement(6, replace(replies[6], advertisement=copied))
    assert server.blames == [
        Blame(2, A, Fault.BAD_SIGNATURE),
        Blame(3, A, Fault.WRONG_SESSION),
        Blame(5, A, Fault.REPEATED),
        Blame(99, A, Fault.UNEXPECTED_SENDER),
        Blame(6, A, Fault.DUPLICATE_KEY),
    ]
    for site in (1, 4, 7, 8):
        assert server.take_advertisement(site, replies[site])
    assert [entry.site for entry in server.close_advertise().advertisements] == [1, 4, 5, 7, 8]


def test_shares_for_the_wrong_receivers_are_dropped_and_named() -> None:
    scene = attack(S, 10)
    for site in scene.world.ids:
        reply = scene.world.clients[site].share(scene.request)
        if site == 3:
            reply = replace(reply, rows=reply.rows[:-1])
        if site == 4:
            reply = replace(reply, rows=((4, reply.rows[0][1]), *reply.rows[1:]))
        assert scene.server.take_shares(site, reply) == (site not in (3, 4))
    assert scene.server.blames == [Blame(site, S, Fault.WRONG_RECIPIENTS) for site in (3, 4)]
    assert set(scene.server.close_share()) == set(scene.world.ids) - {3, 4}


@pytest.mark.parametrize("vector", [np.zeros(4, "<u4"), np.zeros(6, "<u4"), np.zeros(5, "<u2")])
def test_vectors_of_the_wrong_size_leave_the_accumulator_alone(vector: Any) -> None:
    scene = attack(M, 10)
    server, world = scene.server, scene.world
    assert not server.take_masked(3, MaskReply(server.sid, 3, vector))
    assert server._total is not None and not server._total.any()
    assert server.blames == [Blame(3, M, Fault.WRONG_SIZE)]
    requests = {site: MaskRequest(server.sid, world.ids, world.inbox(site, world.ids)) for site in world.ids}
    for site in world.ids:
        if site != 3:
            assert server.take_masked(site, world.clients[site].mask(requests[site], world.update(site)))
    world.consist(server)
    assert world.unmask(server).total.tolist() == world.plain_sum(set(world.ids) - {3})


def test_a_vector_counts_once_and_not_when_late() -> None:
    scene = attack(M, 10)
    server, world = scene.server, scene.world
    replies = {
        site: world.clients[site].mask(
            MaskRequest(server.sid, world.ids, world.inbox(site, world.ids)), world.update(site)
        )
        for site in world.ids
    }
    for site in world.ids[:-1]:
        assert server.take_masked(site, replies[site])
        assert not server.take_masked(site, replies[site])
    assert {blame.fault for blame in server.blames} == {Fault.REPEATED}
    request = server.close_mask()
    assert not server.take_masked(10, replies[10])
    for site in server.asked:
        assert server.take_signature(site, world.clients[site].consist(request))
    assert world.unmask(server).total.tolist() == world.plain_sum(world.ids[:-1])


def test_false_signatures_are_dropped_and_named() -> None:
    scene = attack(C, 10)
    for site in scene.world.ids:
        reply = scene.world.clients[site].consist(scene.request)
        if site == 2:
            reply = replace(reply, signature=bytes(64))
        assert scene.server.take_signature(site, reply) == (site != 2)
    assert scene.server.blames == [Blame(2, C, Fault.BAD_SIGNATURE)]
    assert scene.world.unmask(scene.server).survivors == scene.world.ids


def spoil(rows: Any, *owners: int) -> Any:
    """Change the shares of these owners (of all, if none is named)."""
    return tuple(
        (owner, shamir.element_bytes((shamir.element(share) + 1 + owner) % shamir.P))
        if owner in owners or not owners
        else (owner, share)
        for owner, share in rows
    )


@pytest.mark.parametrize("liars", [[1], [9], [4, 7]])
def test_wrong_shares_are_survived_and_their_givers_named(liars: list[int]) -> None:
    """n = 20, t = 14, one dropped: 19 shares of each secret, of which two may be wrong."""
    world = World(20)
    server = world.server()
    world.advertise(server)
    world.share(server)
    world.mask(server, lost=[20])
    world.consist(server)

    def lie(reply: UnmaskReply) -> UnmaskReply:
        if reply.site not in liars:
            return reply
        return replace(reply, b_shares=spoil(reply.b_shares), s_shares=spoil(reply.s_shares))

    result = world.unmask(server, tamper=lie)
    assert result.total.tolist() == world.plain_sum(world.ids[:-1])
    assert {blame.site for blame in server.blames} == set(liars)
    assert {blame.fault for blame in server.blames} == {Fault.WRONG_SHARE}


def test_a_wrong_share_of_one_secret() -> None:
    scene = attack(U, 10, lost={M: [10]})
    world, server = scene.world, scene.server
    for site in server.asked:
        reply = world.clients[site].unmask(scene.request)
        if site == 2:
            reply = replace(reply, s_shares=spoil(reply.s_shares, 10))
        assert server.take_unmask(site, reply)
    assert server.close_unmask().total.tolist() == world.plain_sum(world.ids[:-1])
    assert server.blames == [Blame(2, U, Fault.WRONG_SHARE, about=10)]


def test_too_many_wrong_shares_abort_without_a_sum() -> None:
    """Seven of ten needed and exactly seven left: one wrong share cannot be told."""
    world = World(10)
    server = world.server()
    world.advertise(server)
    world.share(server)
    world.mask(server)
    world.consist(server)

    def lie(reply: UnmaskReply) -> UnmaskReply:
        return replace(reply, b_shares=spoil(reply.b_shares, 5)) if reply.site == 2 else reply

    with pytest.raises(errors.CannotRebuildError) as caught:
        world.unmask(server, silent=[8, 9, 10], tamper=lie)
    assert caught.value.owner == 5 and server.stage is Stage.ABORTED


def test_a_site_that_dealt_another_secret_is_named() -> None:
    """Site 4 commits to one b and deals shares of another: its shares agree, so it is its doing."""
    world = World(10)
    server = world.server()
    world.advertise(server)
    store = world.stores[4]
    journal = Journal.decode(store.saves[-1])
    assert isinstance(journal.session, Advertised)
    forged = replace(journal, session=replace(journal.session, b=Secret(bytes(32))))
    store.saves[-1] = forged.encode()
    for step in (world.share, world.mask, world.consist):
        step(server)
    with pytest.raises(errors.CannotRebuildError) as caught:
        world.unmask(server)
    assert caught.value.owner == 4
    assert server.blames == [Blame(4, S, Fault.BAD_DEALING, about=4)]


def unmask_attacks() -> dict[str, tuple[Callable[[UnmaskReply], UnmaskReply], Fault]]:
    return {
        "both kinds": (
            lambda r: replace(r, s_shares=tuple(sorted((*r.s_shares, r.b_shares[0])))),
            Fault.UNASKED_SHARE,
        ),
        "a stranger's": (lambda r: replace(r, b_shares=(*r.b_shares, (99, bytes(32)))), Fault.UNASKED_SHARE),
        "out of order": (lambda r: replace(r, b_shares=r.b_shares[::-1]), Fault.UNASKED_SHARE),
        "twice": (lambda r: replace(r, b_shares=(r.b_shares[0], *r.b_shares)), Fault.UNASKED_SHARE),
        "not an element": (
            lambda r: replace(r, b_shares=((r.b_shares[0][0], b"\xff" * 32), *r.b_shares[1:])),
            Fault.MALFORMED,
        ),
        "another session": (lambda r: replace(r, session=bytes(32)), Fault.WRONG_SESSION),
        "another site": (lambda r: replace(r, site=3), Fault.WRONG_SESSION),
        "one missing": (lambda r: replace(r, b_shares=r.b_shares[1:]), Fault.MISSING_SHARE),
    }


@pytest.mark.parametrize("name", unmask_attacks())
def test_false_unmask_replies_are_named_and_the_sum_is_exact(name: str) -> None:
    change, fault = unmask_attacks()[name]
    world = World(10)
    server = world.server()
    world.advertise(server)
    world.share(server)
    world.mask(server, lost=[10])
    world.consist(server)
    result = world.unmask(server, tamper=lambda reply: change(reply) if reply.site == 2 else reply)
    assert result.total.tolist() == world.plain_sum(world.ids[:-1])
    assert [(blame.site, blame.fault) for blame in server.blames] == [(2, fault)]


def test_unopened_shares_reach_the_servers_blame_list() -> None:
    """Site 2 seals garbage for site 1; site 1 goes on without, and gives no share of site 2's b."""
    scene = attack(S, 10)
    world, server = scene.world, scene.server
    for site in world.ids:
        reply = world.clients[site].share(scene.request)
        if site == 2:
            reply = replace(reply, rows=((1, bytes(80)), *reply.rows[1:]))
        assert server.take_shares(site, reply)
    for step in (world.mask, world.consist):
        step(server)
    assert world.unmask(server).total.tolist() == world.plain_sum(world.ids)
    assert server.blames == [Blame(1, U, Fault.MISSING_SHARE, about=2)]
    assert world.blamed[1] == [Blame(2, S, Fault.UNOPENED_SHARE, about=2)]


@pytest.mark.parametrize(
    ("exchange", "gone"), [(A, 7), (S, 4), (M, 4), (C, 4), (U, 4)], ids=lambda value: str(value)
)
def test_below_the_threshold_the_round_aborts_and_the_next_goes_on(exchange: Exchange, gone: int) -> None:
    world = World(10)
    server = world.server()
    with pytest.raises(errors.TooFewSitesError) as caught:
        world.run(server, silent={exchange: world.ids[:gone]})
    assert server.stage is Stage.ABORTED and server._total is None
    assert "Nothing was revealed" in str(caught.value)
    world.number += 1
    world.run(world.server(1, 1))


def test_the_servers_own_order() -> None:
    world = World(4)
    server = world.server()
    for call in (server.close_share, server.close_mask, server.close_consist, server.close_unmask):
        with pytest.raises(errors.ServerOutOfOrderError):
            call()
    world.run(server)
    assert server.stage is Stage.DONE
    with pytest.raises(errors.ServerOutOfOrderError):
        server.close_unmask()


@pytest.mark.parametrize(
    "changes",
    [{"cohort": (1, 2, 3)}, {"cohort": (1, 2, 3, 3)}, {"cohort": (1, 2, 3, 99)}, {"roster": {0: bytes(32)}}],
)
def test_cohorts_that_no_site_would_accept(changes: dict[str, Any]) -> None:
    with pytest.raises(errors.PolicyError):
        World(5).server(**changes)


def test_undecodable_replies_can_be_named() -> None:
    server = World(5).server()
    server.report(3)
    assert server.blames == [Blame(3, A, Fault.MALFORMED)]


def test_the_server_holds_one_accumulator_and_the_shares() -> None:
    """Vectors of 80 kB: after 5 and after 20 sites the server holds as much, but for the small rows."""
    sizes = {}
    for n in (5, 20):
        world = World(n, policy=small_policy(words=20_000))
        server = world.server()
        for step in (world.advertise, world.share, world.mask, world.consist):
            step(server)
        arrays = [value for value in vars(server).values() if isinstance(value, np.ndarray)]
        sizes[n] = sum(array.nbytes for array in arrays)
        assert world.unmask(server).total.tolist() == world.plain_sum(world.ids)
    assert sizes[5] == sizes[20] == 80_000


def test_both_sides_derive_the_same_pair_seed() -> None:
    scene = attack(M)
    states = {site: scene.world.clients[site].state for site in (1, 2)}
    one, other = states[1], states[2]
    assert isinstance(one, Shared) and isinstance(other, Shared)
    assert one.pair_seeds[2] == other.pair_seeds[1]
    assert derivation.pair_sign(1, 2) == -derivation.pair_sign(2, 1)
    assert isinstance(scene.client, SecAggClient)


def test_every_check_of_the_client_is_in_the_documentation() -> None:
    root = Path(__file__).parents[1]
    in_code = set(re.findall(r'"(\d\.\d)"', (root / "client" / "secagg.py").read_text()))
    in_document = set(re.findall(r"\b\d\.\d\b", (root / "docs" / "protocol.md").read_text()))
    assert len(in_code) > 25 and in_code <= in_document
