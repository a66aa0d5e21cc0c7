"""A server that lies, over real Flower messages, to real sites; and sites that lie to an honest server.

Whatever an honest server would not have sent, a site answers with a fixed code and nothing else, says in its
own log which check failed, and closes the session, so that the honest continuation comes too late.
"""

from __future__ import annotations

import shutil
import time
import tracemalloc
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from opacus.optimizers import DPOptimizer

import client.app
import client.exchanges
from client.identity import SiteFolder, load_identity
from client.secagg_state import Closed, Ending
from client.store import save_waiting
from client.training import CsprngDPOptimizer
from common import wire
from common.adapter import Layout, Vector, read_vector, write_vector
from common.aggregation import context_of, policy_of
from common.errors import StatusCode
from common.noise import fresh_key
from common.secagg import keys, transcript
from common.secagg.errors import Exchange
from common.secagg.framing import CRC_BYTES, Framed
from common.secagg.keys import EphemeralKey, Secret
from common.secagg.messages import (
    Advertisement,
    AdvertiseReply,
    ConsistReply,
    ConsistRequest,
    MaskReply,
    ShareReply,
    ShareRequest,
    UnmaskReply,
    UnmaskRequest,
)
from server.receipts import Receipts
from server.secagg import SecAggServer
from simulations.fleet import Fleet
from simulations.run import fill_folder
from tests.federation import (
    ROUTES,
    Call,
    Fleets,
    Inside,
    Network,
    Oracle,
    adapters,
    patch_fleets,
    run,
    small_config,
)
from tests.secagg_world import Stream
from tests.test_secagg_protocol import spoil

A, S, M, C, U = Exchange
EVERYBODY = tuple(range(1, 8))  # U0 and U1; site 8 is in the roster, but not asked
U2, U3 = (1, 2, 3, 4, 5, 6), (1, 2, 3, 4, 5)  # site 7 is lost at SHARE, site 6 at MASK
VICTIM, COLLUDER = 1, 4
NUMBER, ATTEMPT = 2, 2  # the session that is attacked: a tuning round, its second attempt
REFUSED, CONFIG, INTERNAL = (
    StatusCode.REFUSED_PROTOCOL,
    StatusCode.REFUSED_CONFIG,
    StatusCode.FAILED_INTERNAL,
)
Requests = dict[int, Framed]


@pytest.fixture(scope="module", autouse=True)
def _no_sync() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        patch.setattr("client.ledger_file._SYNCHRONOUS", "OFF")
        yield


@pytest.fixture(scope="module")
def fleets(bert_folder: Path, data_file: Path) -> Iterator[Fleets]:
    config = small_config(
        bert_folder,
        data_file,
        run={"rounds": 2},
        warmup={"rounds": 1},
        sites={"count": 8},
        server={"fraction": 0.875},
    )
    with pytest.MonkeyPatch.context() as patch:
        found = Fleets(config)
        patch_fleets(patch, found)
        yield found


# A server's own tools


def train_request(
    fleet: Fleet, number: int, vector: Vector | None = None, **changes: Any
) -> wire.TrainRequest:
    layout = fleet.model.layout
    adapter = np.full(layout.size, 0.01, dtype=np.float32) if vector is None else vector
    return replace(
        wire.TrainRequest(fleet.run_id, number, fleet.plan_digest, layout.digest, adapter), **changes
    )


def context_for(fleet: Fleet, request: wire.TrainRequest) -> bytes:
    return context_of(fleet.run_id, request.vector, fleet.plan_digest, request.layout_digest, request.round)


def open_session(
    fleet: Fleet, number: int, attempt: int, cohort: Collection[int] = EVERYBODY, context: bytes | None = None
) -> SecAggServer:
    policy = policy_of(fleet.config, fleet.model, fleet.plan.round(number))
    return SecAggServer(
        policy=policy,
        roster=fleet.roster,
        run=fleet.run_id.encode(),
        round_number=number,
        attempt=attempt,
        cohort=tuple(cohort),
        context=context or context_for(fleet, train_request(fleet, number)),
        random_bytes=Stream(attempt),
    )


TAKES = {A: "take_advertisement", S: "take_shares", M: "take_masked", C: "take_signature", U: "take_unmask"}
CLOSES = {A: "close_advertise", S: "close_share", M: "close_mask", C: "close_consist"}


def due(server: SecAggServer, exchange: Exchange, lost: Collection[int] = ()) -> Requests:
    """What an honest server asks next; `lost`: whose answers to the exchange before never came."""
    if exchange is A:
        return dict.fromkeys(server.asked, server.advertise_request())
    request = getattr(server, CLOSES[Exchange(exchange - 1)])()
    return request if isinstance(request, dict) else dict.fromkeys(server.asked, request)


def ask_all(
    network: Network, server: SecAggServer, exchange: Exchange, requests: Requests, lost: Collection[int] = ()
) -> None:
    for site, request in requests.items():
        reply, _ = wire.decode_reply(network.ask(site, ROUTES[exchange], request))
        assert not isinstance(reply, wire.Refusal), (site, exchange)
        if site not in lost:
            assert getattr(server, TAKES[exchange])(site, reply)


def train_all(network: Network, fleet: Fleet, number: int, sites: Collection[int] = EVERYBODY) -> None:
    for site in sites:
        reply, _ = wire.decode_reply(network.ask(site, "train", train_request(fleet, number)))
        assert reply == wire.Ready(site, number)


def go_on(
    network: Network,
    server: SecAggServer,
    until: Exchange,
    lost: dict[Exchange, Collection[int]] | None = None,
) -> Requests:
    """All exchanges before `until`; what an honest server asks in that one."""
    for exchange in Exchange:
        requests = due(server, exchange)
        if exchange is until:
            return requests
        ask_all(network, server, exchange, requests, (lost or {}).get(exchange, ()))
    raise AssertionError


# One session, stopped before each of its exchanges


@dataclass
class Stage:
    """The run's folder just before an exchange, and the honest request of that exchange for each site."""

    path: Path
    requests: Requests
    kept: Path  # of the victim, to go back to

    def rewind(self) -> None:
        """The victim as it was, witness included: only a test can do that."""
        for name in ("secagg.state", "waiting.update"):
            (self.path / "sites/0001" / name).unlink(missing_ok=True)
            if (self.kept / name).exists():
                shutil.copy2(self.kept / name, self.path / "sites/0001" / name)
        shutil.copy2(self.kept / "witness", self.path / "witnesses/0001.secagg")

    def copy(self, fleets: Fleets, path: Path) -> Fleet:
        """All of it in another folder, for what changes other sites too."""
        self.rewind()
        fleets.close(self.path)
        shutil.copytree(self.path, path)
        return fleets.open(path)

    def keep(self) -> None:
        shutil.copytree(self.path / "sites/0001", self.kept)
        shutil.copy2(self.path / "witnesses/0001.secagg", self.kept / "witness")


@dataclass
class Story:
    """Rounds 1 and 2 of a run: what was sent, and each stage of the session that is attacked."""

    stages: dict[Exchange, Stage]
    sid: bytes
    h1: bytes
    honest: dict[Exchange, Requests]
    old_round: dict[Exchange, Framed]  # what the victim was sent in round 1 …
    old_attempt: dict[Exchange, Framed]  # … and in the first attempt of round 2
    other_run: dict[Exchange, Framed]  # … and in another run of the same sites, with the same adapter


def requests_of(network: Network, since: int) -> dict[Exchange, Framed]:
    found = {}
    for call in network.calls[since:]:
        if call.node == VICTIM and call.kind != "train":
            exchange = next(e for e, route in ROUTES.items() if route == call.kind)
            found[exchange] = wire.decode(call.request)
    return found


@pytest.fixture(scope="module")
def story(fleets: Fleets, tmp_path_factory: pytest.TempPathFactory) -> Story:
    root = tmp_path_factory.mktemp("story")
    path = root / "run"
    path.mkdir()
    fill_folder(path, fleets.config)
    # Another run of the same sites: all but the secret, and so the run's id, is the same.
    shutil.copytree(path, root / "other")
    (root / "other" / "secret.key").write_bytes(bytes(range(32)))
    other = fleets.open(root / "other")
    network = Network(root / "other", 8)
    train_all(network, other, NUMBER)
    go_on(network, open_session(other, NUMBER, 1), U)
    other_run = requests_of(network, 0)

    fleet = fleets.open(path)
    network = Network(path, 8)
    # Round 1, whole.
    train_all(network, fleet, 1)
    server = open_session(fleet, 1, 1)
    ask_all(network, server, U, go_on(network, server, U))
    server.close_unmask()
    old_round, since = requests_of(network, 0), len(network.calls)
    # Round 2: a first attempt that ends before any upload, and a second one.
    train_all(network, fleet, NUMBER)
    go_on(network, open_session(fleet, NUMBER, 1), M)
    old_attempt = requests_of(network, since)
    server = open_session(fleet, NUMBER, ATTEMPT)
    stages, honest = {}, {}
    lost = {S: (7,), M: (6,)}
    for exchange in Exchange:
        honest[exchange] = due(server, exchange)
        fleets.close(path)
        shutil.copytree(path, root / exchange.name)
        stages[exchange] = Stage(root / exchange.name, honest[exchange], root / f"kept-{exchange.name}")
        stages[exchange].keep()
        ask_all(network, server, exchange, honest[exchange], lost.get(exchange, ()))
    assert server.close_unmask().survivors == U3
    return Story(stages, server.sid, server._h1, honest, old_round, old_attempt, other_run)


class Scene:
    """The victim just before an exchange, and a server that may send it anything."""

    def __init__(self, fleets: Fleets, stage: Stage, exchange: Exchange) -> None:
        self.fleet = fleets.open(stage.path)
        self.exchange = exchange
        self.stage = stage
        self.network = Network(stage.path, 8)
        self.inside = Inside(self.fleet, VICTIM)
        self.honest = stage.requests[VICTIM]
        stage.rewind()

    def send(self, request: Any, route: str | None = None) -> RecordDict:
        return self.network.ask(VICTIM, route or ROUTES[self.exchange], request)

    def answer(self, request: Any, route: str | None = None) -> wire.Message:
        return wire.decode_reply(self.send(request, route))[0]

    def refuses(
        self, request: Any, said: str, *, route: str | None = None, code: StatusCode = REFUSED
    ) -> None:
        """A code and nothing else; the check in the site's own log; the session closed; nothing used up."""
        before, waiting, entries = self.inside.journal, self.inside.waiting, len(self.inside.log)
        assert before is not None
        check_refusal(self.send(request, route), code)
        said = f"check {said}:" if said[:1].isdigit() else said
        assert len(self.inside.log) == entries + 1 and said in self.inside.log[-1], self.inside.log[-1]
        self.is_closed()
        # The honest continuation comes too late.
        check_refusal(self.send(self.honest), REFUSED)
        after, still = self.inside.journal, self.inside.waiting
        assert after is not None and after.consumed == before.consumed
        assert (still is None) == (waiting is None)
        assert still is None or waiting is None or np.array_equal(still.vector, waiting.vector)
        assert not any(isinstance(call.message, Framed) for call in self.network.calls)

    def is_closed(self) -> None:
        journal = self.inside.journal
        assert journal is not None and journal.session == Closed(Ending.ABORTED)


def head_of(content: RecordDict) -> bytes:
    head = content.config_records["confide"]["ledger"]
    assert isinstance(head, bytes)
    return head


def check_refusal(content: RecordDict, code: StatusCode, site: int = VICTIM) -> None:
    """Four fields that are known beforehand, and the head of the ledger."""
    assert set(content) == {"confide"} and not content.array_records
    said = dict(content.config_records["confide"])
    head = said.pop("ledger")
    assert isinstance(head, bytes) and len(head) == 108
    assert said == {"kind": "refusal", "version": wire.VERSION, "site": site, "code": code.value}


@pytest.fixture
def scene(fleets: Fleets, story: Story) -> Callable[[Exchange], Scene]:
    return lambda exchange: Scene(fleets, story.stages[exchange], exchange)


Scenes = Callable[[Exchange], Scene]


def test_the_honest_session_goes_through(scene: Scenes, story: Story) -> None:
    """So the refusals below are of the lies."""
    replies = (AdvertiseReply, ShareReply, MaskReply, ConsistReply, UnmaskReply)
    for exchange, kind in zip(Exchange, replies, strict=True):
        here = scene(exchange)
        answer = here.answer(here.honest)
        assert type(answer) is kind
    assert isinstance(answer, UnmaskReply)
    # For each id one kind of share: of b for who survives, of s for who dropped in between, none for others.
    assert {owner for owner, _ in answer.b_shares} == set(U3)
    assert {owner for owner, _ in answer.s_shares} == set(U2) - set(U3)


# ADVERTISE


def openings(story: Story) -> dict[str, tuple[dict[str, Any], str]]:
    old = story.old_round[A]
    return {
        "another run": ({"run": b"another"}, "0.1"),
        "the same attempt": ({"attempt": ATTEMPT}, "0.2"),
        "an earlier attempt": ({"attempt": 1}, "0.2"),
        "an earlier round": ({"round": 1, "attempt": 9}, "0.2"),
        "unsorted": ({"cohort": (2, 1, 3, 4, 5, 6, 7)}, "0.3"),
        "a site twice": ({"cohort": (1, 2, 3, 3, 4, 5, 6)}, "0.3"),
        "a stranger": ({"cohort": (*EVERYBODY[:-1], 99)}, "0.4"),
        "without the victim": ({"cohort": EVERYBODY[1:]}, "0.5"),
        "empty": ({"cohort": ()}, "0.5"),
        "the victim alone": ({"cohort": (1,)}, "0.6"),
        "below the minimum": ({"cohort": (1, 2, 4)}, "0.6"),
        "above n_max": ({"cohort": (*EVERYBODY, 8)}, "0.6"),
        "another roster": ({"roster_hash": bytes(32)}, "0.7"),
        "another policy": ({"policy_hash": bytes(32)}, "0.8"),
        "the warm-up's policy": ({"policy_hash": old.policy_hash}, "0.8"),
        "another context": ({"context_hash": bytes(32)}, "0.9"),
        "the context of round 1": ({"context_hash": old.context_hash}, "0.9"),
        "a later round": ({"round": 3}, "0.9"),
    }


OPENINGS = 18


@pytest.mark.parametrize("place", range(OPENINGS))
def test_false_openings_close_the_open_session(place: int, scene: Scenes, story: Story) -> None:
    cases = openings(story)
    assert len(cases) == OPENINGS
    changes, check = list(cases.values())[place]
    here = scene(S)
    opening = replace(story.honest[A][VICTIM], **{"attempt": 3, **changes})
    here.refuses(opening, check, route=ROUTES[A])


@pytest.mark.parametrize("number", [0, 4, 2**32 - 1])
def test_rounds_that_the_plan_does_not_have(number: int, scene: Scenes, story: Story) -> None:
    opening = replace(story.honest[A][VICTIM], round=number)
    scene(S).refuses(opening, "round must lie between 1 and 3", route=ROUTES[A], code=CONFIG)


def test_a_refused_opening_has_used_nothing_up(scene: Scenes, story: Story) -> None:
    here = scene(A)
    check_refusal(here.send(replace(here.honest, context_hash=bytes(32))), REFUSED)
    assert isinstance(here.answer(here.honest), AdvertiseReply)


def test_the_highest_attempt_only_ends_the_round(scene: Scenes) -> None:
    """A server can use the numbers up; what it gets is no round."""
    here = scene(A)
    assert isinstance(here.answer(replace(here.honest, attempt=2**32 - 1)), AdvertiseReply)
    check_refusal(here.send(here.honest), REFUSED)
    assert "check 0.2:" in here.inside.log[-1]


# SHARE


def signed(story: Story, scene: Scene, site: int, **changes: Any) -> Advertisement:
    """A colluder's advertisement: whatever it likes, properly signed for this session."""
    entry = replace(entry_of(scene.honest, site), **changes)
    identity = load_identity(SiteFolder(scene.fleet.folder.site(site)).identity, None)
    digest = transcript.advertisement_digest(story.sid, site, entry.c, entry.s, entry.commitment)
    return replace(entry, signature=identity.sign(digest))


def entry_of(request: ShareRequest, site: int) -> Advertisement:
    return next(entry for entry in request.advertisements if entry.site == site)


def with_entry(request: ShareRequest, entry: Advertisement) -> ShareRequest:
    return replace(
        request, advertisements=tuple(entry if e.site == entry.site else e for e in request.advertisements)
    )


OWN_KEY = EphemeralKey(Secret(bytes([3] * 32))).public  # whose secret the server knows


@pytest.mark.parametrize("field", ["c", "s", "commitment", "signature"])
@pytest.mark.parametrize(("site", "check"), [(VICTIM, "1.3"), (3, "1.7")])
def test_substituted_keys(site: int, check: str, field: str, scene: Scenes) -> None:
    here = scene(S)
    value = OWN_KEY if field in "cs" else bytes([3]) * len(getattr(entry_of(here.honest, site), field))
    here.refuses(with_entry(here.honest, replace(entry_of(here.honest, site), **{field: value})), check)


def test_one_site_s_advertisement_relabelled(scene: Scenes) -> None:
    """Site 4's as site 5's, in whose place it stands: as it was, and signed anew by site 4."""
    for forge in (
        lambda here: replace(entry_of(here.honest, COLLUDER), site=5),
        lambda here: signed_as(here, 4, 5),
    ):
        here = scene(S)
        others = tuple(e for e in here.honest.advertisements if e.site != COLLUDER)
        here.refuses(with_entry(replace(here.honest, advertisements=others), forge(here)), "1.7")


def signed_as(scene: Scene, signer: int, site: int) -> Advertisement:
    entry = replace(entry_of(scene.honest, signer), site=site)
    identity = load_identity(SiteFolder(scene.fleet.folder.site(signer)).identity, None)
    request = scene.honest
    digest = transcript.advertisement_digest(request.session, site, entry.c, entry.s, entry.commitment)
    return replace(entry, signature=identity.sign(digest))


LOW_ORDER = [0, 1, keys.FIELD_PRIME - 1, *sorted(keys._LOW_ORDER)[2:4]]


@pytest.mark.parametrize("field", ["c", "s"])
@pytest.mark.parametrize("point", [*LOW_ORDER, keys.FIELD_PRIME, keys.FIELD_PRIME + 9, 2**256 - 1])
def test_a_colluder_s_points_without_a_secret(point: int, field: str, scene: Scenes, story: Story) -> None:
    here = scene(S)
    entry = signed(story, here, COLLUDER, **{field: point.to_bytes(32, "little")})
    here.refuses(with_entry(here.honest, entry), "1.5")


@pytest.mark.parametrize("changes", ["c as another's c", "s as the victim's s", "c as its own s"])
def test_duplicate_keys(changes: str, scene: Scenes, story: Story) -> None:
    here = scene(S)
    key = {
        "c as another's c": {"c": entry_of(here.honest, 2).c},
        "s as the victim's s": {"s": entry_of(here.honest, VICTIM).s},
        "c as its own s": {"c": entry_of(here.honest, COLLUDER).s},
    }[changes]
    here.refuses(with_entry(here.honest, signed(story, here, COLLUDER, **key)), "1.6")


@pytest.mark.parametrize(
    ("order", "check"),
    [
        ((2, 1, 3, 4, 5, 6, 7), "1.1"),
        ((1, 2, 2, 3, 4, 5, 6), "1.1"),
        ((2, 3, 4, 5, 6, 7), "1.3"),
        ((1, 2, 4), "1.4"),
        ((1,), "1.4"),
        ((), "1.3"),
    ],
)
def test_false_lists_of_who_advertised(order: tuple[int, ...], check: str, scene: Scenes) -> None:
    here = scene(S)
    entries = tuple(entry_of(here.honest, site) for site in order)
    here.refuses(replace(here.honest, advertisements=entries), check)


def test_a_member_of_the_roster_that_was_not_asked(scene: Scenes) -> None:
    here = scene(S)
    stranger = signed_as(here, 7, 8)
    here.refuses(replace(here.honest, advertisements=(*here.honest.advertisements, stranger)), "1.2")


# MASK


@pytest.mark.parametrize(
    ("sharers", "check"),
    [
        ((2, 1, 3, 4, 5, 6), "2.1"),
        ((1, 2, 3, 3, 4, 5), "2.1"),
        ((1, 2, 3, 4, 5, 6, 8), "2.2"),
        ((2, 3, 4, 5, 6), "2.3"),
        ((1, 2, 3, 4), "2.4"),  # five of seven
        ((1, 4), "2.4"),
        ((1,), "2.4"),
    ],
)
def test_false_lists_of_who_shared(sharers: tuple[int, ...], check: str, scene: Scenes) -> None:
    here = scene(M)
    sealed = tuple(row for row in here.honest.sealed if row[0] in sharers)
    here.refuses(replace(here.honest, sharers=sharers, sealed=sealed), check)


def test_a_site_that_did_not_share_is_not_in_u2(scene: Scenes) -> None:
    """Site 7 has advertised; the server has no ciphertext of it."""
    here = scene(M)
    here.refuses(replace(here.honest, sharers=(*U2, 7)), "2.5")


@pytest.mark.parametrize("name", ["one missing", "none", "one twice", "out of order", "of a stranger"])
def test_false_sets_of_ciphertexts(name: str, scene: Scenes) -> None:
    here = scene(M)
    rows = here.honest.sealed
    changed = {
        "one missing": rows[1:],
        "none": (),
        "one twice": (*rows, rows[-1]),
        "out of order": rows[::-1],
        "of a stranger": (*rows[:-1], (8, rows[-1][1])),
    }[name]
    here.refuses(replace(here.honest, sealed=changed), "2.5")


def test_swapped_ciphertexts(scene: Scenes) -> None:
    """Five shares are needed, its own counts, and there are six: two that do not open are too many."""
    here = scene(M)
    (a, first), (b, second), *rest = here.honest.sealed
    here_before = len(here.inside.log)
    request = replace(here.honest, sealed=((a, second), (b, first), *rest))
    check_refusal(here.send(request), REFUSED)
    log = here.inside.log[here_before:]
    assert len(log) == 3 and "check 2.6:" in log[-1]
    assert all("UNOPENED_SHARE" in line for line in log[:2])
    here.is_closed()
    check_refusal(here.send(here.honest), REFUSED)


def test_mask_twice(scene: Scenes) -> None:
    here = scene(M)
    assert isinstance(here.answer(here.honest), MaskReply)
    assert here.inside.waiting is None
    check_refusal(here.send(here.honest), REFUSED)
    assert "check 2.0:" in here.inside.log[-1]
    here.is_closed()
    journal = here.inside.journal
    assert journal is not None and journal.consumed == 2
    assert sum(isinstance(call.message, MaskReply) for call in here.network.calls) == 1


# CONSIST


@pytest.mark.parametrize(
    ("survivors", "check"),
    [
        ((2, 1, 3, 4, 5), "3.1"),
        ((1, 2, 3, 4, 5, 5), "3.1"),
        ((1, 2, 3, 4, 5, 7), "3.2"),  # in U1, but its shares never came: nobody holds any
        ((1, 2, 3, 4, 5, 8), "3.2"),
        ((2, 3, 4, 5, 6), "3.3"),
        ((1, 2, 3, 4), "3.4"),
        ((1,), "3.4"),
        ((), "3.3"),
    ],
)
def test_false_lists_of_survivors(survivors: tuple[int, ...], check: str, scene: Scenes) -> None:
    here = scene(C)
    here.refuses(replace(here.honest, survivors=survivors), check)


@pytest.mark.parametrize("second", [U3, U2, (1, 2, 3, 4, 6)], ids=["the same", "larger", "another"])
def test_a_second_survivor_set(second: tuple[int, ...], scene: Scenes) -> None:
    here = scene(C)
    assert isinstance(here.answer(here.honest), ConsistReply)
    check_refusal(here.send(replace(here.honest, survivors=second)), REFUSED)
    assert "check 3.0:" in here.inside.log[-1]
    here.is_closed()
    check_refusal(here.send(UnmaskRequest(here.honest.session, ()), ROUTES[U]), REFUSED)


def test_two_stories_about_the_survivors(fleets: Fleets, story: Story, tmp_path: Path) -> None:
    """Sites 1 to 3 hear that all of U2 survive, 5 and 6 that 1 did not; site 4 signs both. Nobody unmasks."""
    fleet = story.stages[C].copy(fleets, tmp_path / "run")
    network, session = Network(tmp_path / "run", 8), story.sid
    without = U2[1:]
    signatures: dict[tuple[int, ...], dict[int, bytes]] = {U2: {}, without: {}}
    for survivors, sites in ((U2, (1, 2, 3)), (without, (5, 6))):
        for site in sites:
            reply, _ = wire.decode_reply(network.ask(site, ROUTES[C], ConsistRequest(session, survivors)))
            assert isinstance(reply, ConsistReply)
            signatures[survivors][site] = reply.signature
        identity = load_identity(SiteFolder(fleet.folder.site(4)).identity, None)
        digest = transcript.consist_digest(session, story.h1, U2, survivors, 4)
        signatures[survivors][4] = identity.sign(digest)
    mixed = tuple(sorted((signatures[without] | signatures[U2]).items()))
    asked = {
        1: (mixed[:5], "4.3"),
        2: (tuple(sorted(signatures[U2].items())), "4.2"),
        5: (tuple(row for row in mixed if row[0] != 1), "4.3"),
        6: (tuple(sorted(signatures[without].items())), "4.2"),
    }
    for site, (rows, check) in asked.items():
        check_refusal(network.ask(site, ROUTES[U], UnmaskRequest(session, rows)), REFUSED, site)
        assert f"check {check}:" in Inside(fleet, site).log[-1]
    fleets.close(tmp_path / "run")


# UNMASK


def test_unmask_before_consist(scene: Scenes, story: Story) -> None:
    scene(C).refuses(story.honest[U][VICTIM], "4.0", route=ROUTES[U])


@pytest.mark.parametrize(
    "name", ["too few", "none", "one twice", "unsorted", "a dropped site's", "a stranger's"]
)
def test_false_sets_of_signatures(name: str, scene: Scenes) -> None:
    here = scene(U)
    rows = here.honest.signatures
    changed, check = {
        "too few": (rows[:-1], "4.2"),
        "none": ((), "4.2"),
        "one twice": ((*rows[:-1], rows[-2]), "4.1"),
        "unsorted": (rows[::-1], "4.1"),
        "a dropped site's": ((*rows[:-1], (6, rows[-1][1])), "4.1"),
        "a stranger's": ((*rows[:-1], (8, rows[-1][1])), "4.1"),
    }[name]
    here.refuses(replace(here.honest, signatures=changed), check)


@pytest.mark.parametrize("place", range(5))
def test_each_signature_counts(place: int, scene: Scenes) -> None:
    here = scene(U)
    rows = list(here.honest.signatures)
    rows[place] = (rows[place][0], rows[(place + 1) % 5][1])
    here.refuses(replace(here.honest, signatures=tuple(rows)), "4.3")


def test_unmask_twice(scene: Scenes) -> None:
    here = scene(U)
    assert isinstance(here.answer(here.honest), UnmaskReply)
    check_refusal(here.send(here.honest), REFUSED)
    assert "check 4.0:" in here.inside.log[-1]
    journal = here.inside.journal
    assert journal is not None and journal.session == Closed(Ending.DONE)


# Order, replays, routes


@pytest.mark.parametrize(("now", "asked"), [(n, a) for n in Exchange for a in (S, M, C, U) if n is not a])
def test_exchanges_out_of_order(now: Exchange, asked: Exchange, scene: Scenes, story: Story) -> None:
    """Where `now` is due, the honest request of another exchange of this very session."""
    here = scene(now)
    if now is A:  # no session is open
        check_refusal(here.send(story.honest[asked][VICTIM], ROUTES[asked]), REFUSED)
        assert f"check {asked.value}.0:" in here.inside.log[-1]
    else:
        here.refuses(story.honest[asked][VICTIM], f"{asked.value}.0", route=ROUTES[asked])


@pytest.mark.parametrize(
    ("old", "now"),
    # The first attempt and the other run ended before MASK and before UNMASK.
    [*(("round", e) for e in (S, M, C, U)), ("attempt", S), *(("run", e) for e in (S, M, C))],
)
def test_replays_of_old_messages(old: str, now: Exchange, scene: Scenes, story: Story) -> None:
    recorded = {"round": story.old_round, "attempt": story.old_attempt, "run": story.other_run}[old]
    scene(now).refuses(recorded[now], f"{now.value}.0")
    scene(now).refuses(recorded[A], "0.1" if old == "run" else "0.2", route=ROUTES[A])


@pytest.mark.parametrize("old", ["round", "run", "attempt"])
def test_old_advertisements_under_the_new_session(old: str, scene: Scenes, story: Story) -> None:
    """Keys whose secrets a broken site may have lost since, in the open session's own request."""
    recorded = {"round": story.old_round, "attempt": story.old_attempt, "run": story.other_run}[old]
    here = scene(S)
    here.refuses(with_entry(here.honest, entry_of(recorded[S], 3)), "1.7")


@pytest.mark.parametrize(("now", "route"), [(n, r) for n in Exchange for r in Exchange if n is not r])
def test_a_request_on_another_s_route(now: Exchange, route: Exchange, scene: Scenes) -> None:
    here = scene(now)
    if now is A:
        check_refusal(here.send(here.honest, ROUTES[route]), REFUSED)
        assert f"{route.name} does not begin with AdvertiseRequest" in here.inside.log[-1]
    else:
        said = f"{route.name} does not begin with {type(here.honest).__name__}"
        here.refuses(here.honest, said, route=ROUTES[route])


OTHERS: dict[str, wire.Message] = {
    "hello": wire.Hello(0),
    "ready": wire.Ready(2, 2),
    "refusal": wire.Refusal(2, StatusCode.FAILED_DATA),
    "plain update": wire.PlainUpdate(2, 2, "0" * 64, np.ones(3, "f4")),
    "train": wire.TrainRequest("run", 2, "0" * 64, "0" * 64, np.ones(3, "f4")),
    "advertise reply": AdvertiseReply(bytes(32), Advertisement(2, *(bytes(32),) * 3, bytes(64))),
    "share reply": ShareReply(bytes(32), 2, ((1, bytes(80)),)),
    "mask reply": MaskReply(bytes(32), 2, np.zeros(9, "<u4")),
    "consist reply": ConsistReply(bytes(32), 2, bytes(64)),
    "unmask reply": UnmaskReply(bytes(32), 2, ((1, bytes(32)),), ()),
}


@pytest.mark.parametrize("now", [S, M, C, U])
@pytest.mark.parametrize("name", OTHERS)
def test_messages_that_begin_no_exchange(name: str, now: Exchange, scene: Scenes) -> None:
    kind = type(OTHERS[name]).__name__
    scene(now).refuses(OTHERS[name], f"{now.name} does not begin with {kind}")


@pytest.mark.parametrize("route", ["query.hello", "train"])
@pytest.mark.parametrize("now", [S, M, C, U])
def test_an_exchange_is_answered_on_no_other_route(now: Exchange, route: str, scene: Scenes) -> None:
    """Not by what it asks for, that is; the session, which was not asked for anything, stays open."""
    here = scene(now)
    check_refusal(here.send(here.honest, route), REFUSED)
    assert isinstance(here.answer(here.honest), Framed)


@pytest.mark.parametrize("route", ["query.unknown", "evaluate", "query", "train.more"])
def test_routes_that_there_are_not_say_nothing_of_the_site(route: str, scene: Scenes) -> None:
    """Flower itself answers with an exception, whose text the server gets: only the name that it had sent."""
    here = scene(M)
    with pytest.raises(ValueError, match=r"^No \w+ function registered with name '\w+'$"):
        here.send(here.honest, route)
    assert isinstance(here.answer(here.honest), MaskReply)


# Bodies


def with_body(request: Framed, change: Callable[[bytes], bytes], **array: Any) -> RecordDict:
    content = wire.encode(request)
    record = content.config_records["confide"]
    sent = record.pop("data")
    assert isinstance(sent, bytes)
    data = change(sent)
    if not array and len(data) <= wire.INLINE_BYTES:
        record["data"] = data
        return content
    fields = {"dtype": "uint8", "shape": (len(data),), "stype": "confide.secagg", "data": data, **array}
    content["array"] = ArrayRecord({"array": Array(**fields)})
    return content


BODIES: dict[str, Callable[[bytes], bytes]] = {
    "empty but for a byte": lambda data: data[:1],
    "without its last byte": lambda data: data[:-1],
    "cut in the middle": lambda data: data[: len(data) // 2],
    "a byte more": lambda data: data + b"\0",
    "twice": lambda data: data + data,
    "another magic": lambda data: b"CFSB" + data[4:],
    "another version": lambda data: data[:4] + b"\2" + data[5:],
    "another kind": lambda data: data[:5] + bytes([data[5] ^ 1]) + data[6:],
    "no checksum": lambda data: data[:-CRC_BYTES] + bytes(CRC_BYTES),
    "zeros": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("now", [S, M, C, U])
@pytest.mark.parametrize("name", BODIES)
def test_bodies_that_are_no_message(name: str, now: Exchange, scene: Scenes) -> None:
    here = scene(now)
    here.refuses(with_body(here.honest, BODIES[name]), "")


@pytest.mark.parametrize(
    ("now", "mended"),
    # A bit of a sealed share is its sender's matter, and one of its receivers goes on without it.
    [*((e, False) for e in (S, M, C, U)), *((e, True) for e in (S, C, U))],
)
def test_flipped_bits(now: Exchange, mended: bool, scene: Scenes) -> None:
    """Each is refused: with the checksum as it was, and with one that fits."""
    here = scene(now)
    data = here.honest.encode()
    rng = np.random.default_rng(now.value)
    end = 8 * (len(data) - CRC_BYTES if mended else len(data))
    for place in rng.choice(end, size=25, replace=False):
        here.stage.rewind()
        changed = bytearray(data)
        changed[int(place) // 8] ^= 1 << (int(place) % 8)
        if mended:
            changed[-CRC_BYTES:] = zlib.crc32(changed[:-CRC_BYTES]).to_bytes(CRC_BYTES, "little")
        check_refusal(here.send(with_body(here.honest, lambda _, body=bytes(changed): body)), REFUSED)
        here.is_closed()


@pytest.mark.parametrize("name", ["dtype", "stype", "pickle", "shape", "two dimensions", "field", "record"])
def test_records_that_are_no_message(name: str, scene: Scenes) -> None:
    here = scene(M)
    same = lambda data: data  # noqa: E731
    content = {
        "dtype": lambda: with_body(here.honest, same, dtype="float32"),
        "stype": lambda: with_body(here.honest, same, stype="confide.float32.le"),
        "pickle": lambda: with_body(here.honest, same, stype="numpy.ndarray"),
        "shape": lambda: with_body(here.honest, same, shape=(1,)),
        "two dimensions": lambda: with_body(here.honest, same, shape=(1, len(here.honest.encode()))),
        "field": lambda: with_field(wire.encode(here.honest)),
        "record": lambda: RecordDict({**wire.encode(here.honest), "more": ConfigRecord({"a": 1})}),
    }[name]()
    here.refuses(content, "")


def with_field(content: RecordDict) -> RecordDict:
    content.config_records["confide"]["more"] = 1
    return content


@pytest.mark.parametrize("extra", [1, 16 * 2**20])
def test_bodies_that_are_too_long_are_not_even_read(extra: int, scene: Scenes) -> None:
    here = scene(M)
    longest = client.exchanges.longest_request(here.fleet.site(VICTIM))
    assert len(here.honest.encode()) <= longest < 5_000
    content = with_body(here.honest, lambda data: data + bytes(longest + extra - len(data)))
    site = here.fleet.site(VICTIM)
    tracemalloc.start()
    began = time.monotonic()
    with pytest.raises(Exception, match="where at most"):
        wire.decode(content, client.exchanges.longest_request(site))
    taken, peak = time.monotonic() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000 and taken < 1
    here.refuses(content, "where at most")


def test_a_long_name_does_not_fill_the_log(scene: Scenes) -> None:
    here = scene(M)
    content = wire.encode(here.honest)
    content["\x1b[2J\n" + "x" * 1_000_000] = ConfigRecord({"a": 1})
    before = (here.inside.folder.path / "site.log").stat().st_size
    here.refuses(content, "a message must hold exactly one record")
    added = (here.inside.folder.path / "site.log").read_bytes()[before:]
    assert len(added) < 12_000 and b"\x1b" not in added


# Training while a session is open


def other_adapter(fleet: Fleet) -> Vector:
    return np.full(fleet.model.layout.size, 0.02, dtype=np.float32)


@pytest.mark.parametrize("now", [S, M, C, U])
@pytest.mark.parametrize("what", ["another adapter", "another round", "round 1 again"])
def test_training_on_something_else_closes_the_session(what: str, now: Exchange, scene: Scenes) -> None:
    """What is uploaded in a session is what the session's context is about, whatever was trained since."""
    here = scene(now)
    request = {
        "another adapter": train_request(here.fleet, 2, other_adapter(here.fleet)),
        "another round": train_request(here.fleet, 3),
        "round 1 again": train_request(here.fleet, 1),
    }[what]
    consumed = here.inside.journal.consumed
    assert here.answer(request, "train") == wire.Ready(VICTIM, request.round)
    here.is_closed()
    check_refusal(here.send(here.honest), REFUSED)
    assert f"check {now.value}.0:" in here.inside.log[-1]
    waiting = here.inside.waiting
    assert waiting is not None and waiting.context == context_for(here.fleet, request)
    # Not in another session about the old adapter, either.
    again = replace(opening_of(here), attempt=9)
    check_refusal(here.send(again, ROUTES[A]), REFUSED)
    assert "check 0.9:" in here.inside.log[-1]
    assert here.inside.journal.consumed == consumed


def opening_of(scene: Scene) -> Any:
    return open_session(scene.fleet, NUMBER, ATTEMPT).advertise_request()


@pytest.mark.parametrize("now", [A, S, M])
def test_the_same_question_again_is_free_and_leaves_the_session_open(now: Exchange, scene: Scenes) -> None:
    here = scene(now)
    charges, before = here.inside.charges, here.inside.journal
    for _ in range(3):
        assert here.answer(train_request(here.fleet, 2), "train") == wire.Ready(VICTIM, 2)
    assert here.inside.charges == charges and here.inside.journal == before
    assert isinstance(here.answer(here.honest), Framed)


@pytest.mark.parametrize("now", [S, M])
def test_training_that_is_refused_leaves_the_session_open(now: Exchange, scene: Scenes) -> None:
    here = scene(now)
    charges = here.inside.charges
    wrong = {"run_id": "another"}, {"plan_digest": "0" * 64}, {"layout_digest": "0" * 64}, {"round": 4}
    for changes in wrong:
        code = CONFIG if {"plan_digest", "round"} & set(changes) else REFUSED
        check_refusal(here.send(train_request(here.fleet, 2, **changes), "train"), code)
    assert here.inside.charges == charges
    assert isinstance(here.answer(here.honest), Framed)


def test_other_adapters_for_one_site(fleets: Fleets, story: Story, tmp_path: Path) -> None:
    """The victim has trained on an adapter of its own. It is in another session, where it is alone."""
    fleet = story.stages[A].copy(fleets, tmp_path / "run")
    network = Network(tmp_path / "run", 8)
    special = train_request(fleet, NUMBER, other_adapter(fleet))
    assert wire.decode_reply(network.ask(VICTIM, "train", special))[0] == wire.Ready(VICTIM, NUMBER)
    ours, theirs = (
        open_session(fleet, NUMBER, 3, context=context_for(fleet, special)),
        open_session(fleet, NUMBER, 3),
    )
    # Asked about the others' adapter, it refuses.
    check_refusal(network.ask(VICTIM, ROUTES[A], theirs.advertise_request()), REFUSED)
    assert "check 0.9:" in Inside(fleet, VICTIM).log[-1]
    # Asked about its own, it advertises, for a session that the others are not in.
    reply, _ = wire.decode_reply(network.ask(VICTIM, ROUTES[A], ours.advertise_request()))
    assert isinstance(reply, AdvertiseReply)
    entries = [reply.advertisement]
    for site in EVERYBODY[1:]:
        other, _ = wire.decode_reply(network.ask(site, ROUTES[A], theirs.advertise_request()))
        assert isinstance(other, AdvertiseReply) and other.session != reply.session
        entries.append(other.advertisement)
    request = ShareRequest(reply.session, tuple(entries))
    check_refusal(network.ask(VICTIM, ROUTES[S], request), REFUSED)
    assert "check 1.7:" in Inside(fleet, VICTIM).log[-1]
    request = ShareRequest(other.session, tuple(entries))
    check_refusal(network.ask(2, ROUTES[S], request), REFUSED, 2)
    assert "check 1.7:" in Inside(fleet, 2).log[-1]
    fleets.close(tmp_path / "run")


# The update that waits, after an abort and after a crash


@pytest.mark.parametrize("now", [S, M, C, U])
def test_the_update_after_an_abort(
    now: Exchange, fleets: Fleets, story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its upload it goes into the next session, after it into none; without new training, that is."""
    fleet = story.stages[now].copy(fleets, tmp_path / "run")
    network = Network(tmp_path / "run", 8)
    oracle = Oracle().watch(monkeypatch)
    for site in story.honest[now]:  # garbage for all, so that all close
        assert isinstance(wire.decode_reply(network.ask(site, ROUTES[now], wire.Hello(0)))[0], wire.Refusal)
    server = open_session(fleet, NUMBER, 3, cohort=U2)
    if now in (S, M):
        ask_all(network, server, U, go_on(network, server, U))
        result = server.close_unmask()
        assert result.total.tolist() == oracle.plain_sum((NUMBER, 3), U2)
    else:
        for site in U2:
            check_refusal(network.ask(site, ROUTES[A], server.advertise_request()), REFUSED, site)
            assert "check 0.9:" in Inside(fleet, site).log[-1]
            assert Inside(fleet, site).journal.consumed == 2
    fleets.close(tmp_path / "run")


class KilledError(BaseException):
    """The process is gone."""


def test_a_crash_between_the_journal_and_the_removal_of_the_update(
    fleets: Fleets, story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update is used up and still there. It answers no question, and is not uploaded again."""
    fleet = story.stages[M].copy(fleets, tmp_path / "run")
    network, inside = Network(tmp_path / "run", 8), Inside(fleet, VICTIM)

    def dies(_: Path) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(client.exchanges, "drop_waiting", dies)
        with pytest.raises(KilledError):
            network.ask(VICTIM, ROUTES[M], story.honest[M][VICTIM])
    left = inside.waiting
    assert left is not None and left.number == inside.journal.consumed == 2
    # It opens no session, in which it would be missed only after the shares.
    server = open_session(fleet, NUMBER, 3, cohort=U2)
    check_refusal(network.ask(VICTIM, ROUTES[A], server.advertise_request()), REFUSED)
    assert "check 0.9:" in inside.log[-1]
    # A new training makes a new one (here with the same noise, as a simulation's is keyed by its context).
    assert isinstance(wire.decode_reply(network.ask(VICTIM, "train", train_request(fleet, 2)))[0], wire.Ready)
    assert inside.waiting.number == 3
    fleets.close(tmp_path / "run")


def test_an_update_that_was_uploaded_is_not_uploaded_again(scene: Scenes) -> None:
    """Somebody has put its file back while a session was open for another one."""
    here = scene(M)
    waiting, pinned = here.inside.waiting, here.fleet.site(VICTIM).pinned
    assert waiting is not None and pinned is not None
    old = replace(waiting, number=here.inside.journal.consumed)
    save_waiting(here.inside.folder.waiting, pinned.local_key, old, pinned.random_bytes)
    here.refuses(here.honest, "2.7")


def test_an_update_that_waits_from_another_run_answers_nothing(
    fleets: Fleets, story: Story, tmp_path: Path
) -> None:
    """A crash has left one that was uploaded in another run, from the same adapter in the same round."""
    one = story.stages[M].copy(fleets, tmp_path / "run")
    left = Inside(one, VICTIM).waiting
    assert left is not None
    (tmp_path / "run" / "secret.key").write_bytes(bytes([9] * 32))
    (tmp_path / "run" / "sites/0001/secagg.state").unlink()
    (tmp_path / "run" / "witnesses/0001.secagg").unlink()
    network = Network(tmp_path / "run", 8)
    server = open_session(one, NUMBER, 1)
    assert left.context != server.request.context_hash
    check_refusal(network.ask(VICTIM, ROUTES[A], server.advertise_request()), REFUSED)
    assert "check 0.9:" in Inside(one, VICTIM).log[-1]
    assert isinstance(wire.decode_reply(network.ask(VICTIM, "train", train_request(one, 2)))[0], wire.Ready)
    assert not np.array_equal(Inside(one, VICTIM).waiting.vector, left.vector)
    fleets.close(tmp_path / "run")


# What else a server could try


def test_a_server_cannot_make_a_site_spend_more_than_its_budget(
    fleets: Fleets, story: Story, tmp_path: Path
) -> None:
    """Training again and again, on new adapters: each is charged, until the site refuses."""
    fleet = story.stages[A].copy(fleets, tmp_path / "run")
    network, inside = Network(tmp_path / "run", 8), Inside(fleet, VICTIM)
    before = inside.charges
    for seed in range(500):
        vector = np.random.default_rng(seed).normal(0, 0.01, fleet.model.layout.size).astype(np.float32)
        content = network.ask(VICTIM, "train", train_request(fleet, 1, vector))
        if isinstance(wire.decode_reply(content)[0], wire.Refusal):
            break
    check_refusal(content, StatusCode.REFUSED_BUDGET)
    assert inside.charges == before + seed and seed > 3
    assert fleet.balance(VICTIM).epsilon_rdp <= fleet.plan.target_epsilon
    # The refused question was for nothing: what was trained last still waits.
    assert inside.waiting is not None and inside.waiting.round == 1
    fleets.close(tmp_path / "run")


def overflowing(fleet: Fleet, target: int, hidden: np.ndarray) -> Vector:
    """An adapter whose head overflows on row `target` of `hidden` alone: there w·h + b is no float."""
    wanted = np.zeros(len(hidden))
    wanted[target] = 1.0
    direction, *_ = np.linalg.lstsq(hidden, wanted, rcond=1e-6)
    scores = hidden @ direction
    largest = float(np.finfo(np.float32).max)
    scale = 0.1 * largest / np.abs(direction).max()
    vector, place = np.zeros(fleet.model.layout.size), 0
    for name, shape in fleet.model.layout.entries:
        size = int(np.prod(shape))
        if name.endswith("head.weight"):
            vector[place : place + size].reshape(shape)[1] = direction * scale
        elif name.endswith("head.bias"):
            vector[place + 1] = largest - (scores[target] + np.delete(scores, target).max()) / 2 * scale
        place += size
    return vector.astype(np.float32)


def test_an_adapter_that_overflows_on_one_record_does_not_tell_whether_it_is_there(
    fleets: Fleets, story: Story, tmp_path: Path
) -> None:
    """An error would: the server would have tested membership of a record, without any noise."""
    fleet = story.stages[A].copy(fleets, tmp_path / "run")
    records = fleet.split.sites[0]
    write_vector(fleet.model.parameters, fleet.model.layout, np.zeros(fleet.model.layout.size, dtype="f4"))
    hidden = fleet._features.of(fleet.model, fleet.examples, records)[records].double().numpy()
    vector = overflowing(fleet, 0, hidden)
    write_vector(fleet.model.parameters, fleet.model.layout, vector)
    assert fleet.model.head is not None
    logits = fleet.model.head(torch.from_numpy(hidden).float()).detach().numpy()
    assert np.isfinite(logits).all(axis=1).tolist() == [False] + [True] * (len(records) - 1)

    def answers() -> list[wire.Message]:
        found = []
        for kept in (records, records[1:]):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(fleet, "split", replace(fleet.split, sites=(kept, *fleet.split.sites[1:])))
                # Of the warm-up, in which every record is in every step.
                content = Network(tmp_path / "run", 8).ask(VICTIM, "train", train_request(fleet, 1, vector))
            found.append(wire.decode_reply(content)[0])
        return found

    with pytest.MonkeyPatch.context() as patch:  # as Opacus has it, the server would know
        patch.setattr(CsprngDPOptimizer, "clip_and_accumulate", DPOptimizer.clip_and_accumulate)
        assert answers() == [wire.Refusal(VICTIM, StatusCode.FAILED_MODEL), wire.Ready(VICTIM, 1)]
    SiteFolder(fleet.folder.site(VICTIM)).waiting.unlink()
    assert answers() == [wire.Ready(VICTIM, 1), wire.Ready(VICTIM, 1)]
    fleets.close(tmp_path / "run")


def deployed(patch: pytest.MonkeyPatch) -> None:
    """Sites whose noise is fresh each time, as outside of a simulation."""
    real = Fleet.site
    patch.setattr(
        Fleet,
        "site",
        lambda self, number: replace(
            real(self, number), repeatable_noise=False, noise_key=lambda _: fresh_key()
        ),
    )


def test_a_second_sum_of_a_round_is_refused(
    fleets: Fleets, story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole session, then the same round again without one site. With the same updates the difference
    would be that site's; with others they would be charged again. A deployed site does neither."""
    fleet = story.stages[M].copy(fleets, tmp_path / "run")
    deployed(monkeypatch)
    network, inside = Network(tmp_path / "run", 8), Inside(fleet, VICTIM)
    charges = inside.charges
    server = open_session(fleet, NUMBER, 3, cohort=U2)
    ask_all(network, server, U, go_on(network, server, U))
    server.close_unmask()
    for _ in range(2):
        check_refusal(network.ask(VICTIM, "train", train_request(fleet, NUMBER)), StatusCode.REFUSED_REPEAT)
    assert (inside.charges, inside.waiting) == (charges, None)
    fleets.close(tmp_path / "run")


def test_an_output_that_the_ledger_refuses_is_not_kept(
    fleets: Fleets, story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same charge with the same noise, but another update: their difference would be without noise."""
    fleet = story.stages[A].copy(fleets, tmp_path / "run")
    network, inside = Network(tmp_path / "run", 8), Inside(fleet, VICTIM)
    inside.folder.waiting.unlink()
    real = client.app.train
    monkeypatch.setattr(client.app, "train", lambda *arguments: real(*arguments) * np.float32(0.5))
    for _ in range(2):  # nor does asking again help
        check_refusal(network.ask(VICTIM, "train", train_request(fleet, 2)), StatusCode.REFUSED_PRIVACY)
        assert inside.waiting is None
    monkeypatch.setattr(client.app, "train", real)
    content = network.ask(VICTIM, "train", train_request(fleet, 2))
    assert wire.decode_reply(content)[0] == wire.Ready(VICTIM, 2)
    fleets.close(tmp_path / "run")


def test_a_busy_store_is_a_code_and_no_more(scene: Scenes) -> None:
    """Two processes of one site: the second is refused, and leaves the first one's session alone."""
    here = scene(M)
    pinned = here.fleet.site(VICTIM).pinned
    assert pinned is not None
    with pinned.store.lock():
        check_refusal(here.send(here.honest), INTERNAL)
        check_refusal(here.send(train_request(here.fleet, 3), "train"), INTERNAL)
    assert "in use by another process" in here.inside.log[-1]
    assert isinstance(here.answer(here.honest), MaskReply)


@pytest.mark.parametrize("now", Exchange)
def test_what_fails_inside_says_nothing_outside(
    now: Exchange, scene: Scenes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception with a secret in its text, out of the depths: a code, and the text in the site's log."""
    here = scene(now)
    secret = "the record of a patient, born in 1961"

    def fails(*_: object) -> None:
        raise OSError(secret)

    monkeypatch.setattr("client.store.write_atomically", fails)
    content = here.send(here.honest)
    check_refusal(content, INTERNAL)
    assert "patient" not in str(content) and any(secret in line for line in here.inside.log)


def test_a_reply_that_cannot_be_made_says_nothing(scene: Scenes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a log nor a ledger nor a session that cannot be closed gets an exception to Flower."""
    here = scene(M)

    def fails(*_: object) -> None:
        raise ValueError("a secret")

    for name in ("client.app.exchanges.close", "client.site.Site.log", "client.app.exchanges.answer"):
        monkeypatch.setattr(name, fails)
    check_refusal(here.send(here.honest), INTERNAL)
    monkeypatch.setattr("client.app._head", fails)
    content = here.send(here.honest)
    assert set(content) == {"confide"} and "secret" not in str(content)
    assert wire.decode(content) == wire.Refusal(VICTIM, INTERNAL)


# Sites that lie, to an honest server


LIAR = 3


@pytest.fixture(scope="module")
def trained(fleets: Fleets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose sites have all trained for round 1, and wait."""
    path = tmp_path_factory.mktemp("trained") / "run"
    path.mkdir()
    fill_folder(path, fleets.config)
    fleet = fleets.open(path)
    fleets.start_over()
    start = read_vector(fleet.model.parameters, fleet.model.layout)
    network = Network(path, 8)
    for site in range(1, 9):
        network.ask(site, "train", train_request(fleet, 1, start))
    fleets.close(path)
    return path


class StopError(BaseException):
    """The first round is over."""


@dataclass
class Outcome:
    """Of round 1. blames: (site, exchange, fault, about). fates: site → status, of those that were asked."""

    blames: set[tuple[int, str, str, int | None]]
    fates: dict[int, str]
    counted: bool
    ending: str

    @property
    def survivors(self) -> set[int]:
        return {site for site, fate in self.fates.items() if fate == "ok"}


Lie = Callable[[Fleet, Any], wire.Message | RecordDict | None]


def round_with_a_liar(
    fleets: Fleets, path: Path, patch: pytest.MonkeyPatch, lie: Lie, *, exact: bool = True
) -> Outcome:
    """Round 1 of the run in `path`, in which site 3 answers `lie(fleet, message)`; `None`: the truth."""
    fleet = fleets.open(path)
    oracle = Oracle().watch(patch)

    def bend(call: Call) -> RecordDict | None:
        if call.node != LIAR or call.reply is None:
            return None
        said = lie(fleet, call.message)
        if said is None or isinstance(said, RecordDict):
            return said
        return wire.encode(said, head_of(call.reply))

    def before(node: int, kind: str) -> None:
        if len(fleet.folder.rounds()) > 1:
            raise StopError

    with pytest.raises(StopError):
        run(fleets, fleet, Network(path, 8, bend=bend, before=before))
    event, found = fleet.folder.rounds()[1], adapters(fleet)
    assert event.counted == (found[0].tobytes() != found[1].tobytes())
    assert (oracle.check(fleet.folder) == 1) if exact else not event.counted
    ends = fleet.folder.sessions()
    fates = {s.site: s.status for s in fleet.folder.site_rounds()}
    fleets.close(path)
    return Outcome({tuple(row) for end in ends for row in end.blames}, fates, event.counted, ends[-1].outcome)


def when(kind: type[Framed], change: Callable[[Fleet, Any], wire.Message | RecordDict]) -> Lie:
    return lambda fleet, message: change(fleet, message) if type(message) is kind else None


def alter(kind: type[Framed], **changes: Any) -> Lie:
    """Other fields in an answer of this kind; a function makes one from the answer."""

    def change(_: Fleet, message: Any) -> wire.Message:
        made = {name: value(message) if callable(value) else value for name, value in changes.items()}
        return replace(message, **made)

    return when(kind, change)


def own_advertisement(fleet: Fleet, message: AdvertiseReply, **changes: Any) -> AdvertiseReply:
    entry = replace(message.advertisement, **changes)
    identity = load_identity(SiteFolder(fleet.folder.site(LIAR)).identity, None)
    digest = transcript.advertisement_digest(message.session, LIAR, entry.c, entry.s, entry.commitment)
    return replace(message, advertisement=replace(entry, signature=identity.sign(digest)))


def long_body(size: int) -> Callable[[Fleet, Any], RecordDict]:
    return lambda _, message: with_body(message, lambda data: data + bytes(size))


def of_advertisement(name: str, value: Any) -> Callable[[Any], Advertisement]:
    return lambda message: replace(message.advertisement, **{name: value})


# The lie; what the liar is blamed for; whether its update counts all the same.
LIES: dict[str, tuple[Lie, tuple[str, str], bool]] = {
    "advertise: another session": (
        alter(AdvertiseReply, session=bytes(32)),
        ("advertise", "wrong_session"),
        False,
    ),
    "advertise: as another site": (
        alter(AdvertiseReply, advertisement=of_advertisement("site", 4)),
        ("advertise", "wrong_session"),
        False,
    ),
    "advertise: a bad signature": (
        alter(AdvertiseReply, advertisement=of_advertisement("signature", bytes(64))),
        ("advertise", "bad_signature"),
        False,
    ),
    "advertise: a point of low order": (
        when(AdvertiseReply, lambda fleet, m: own_advertisement(fleet, m, s=bytes(32))),
        ("advertise", "bad_point"),
        False,
    ),
    "advertise: a point that is not canonical": (
        when(AdvertiseReply, lambda fleet, m: own_advertisement(fleet, m, c=b"\xff" * 32)),
        ("advertise", "bad_point"),
        False,
    ),
    "advertise: one key twice": (
        when(AdvertiseReply, lambda fleet, m: own_advertisement(fleet, m, c=m.advertisement.s)),
        ("advertise", "duplicate_key"),
        False,
    ),
    "share: another session": (alter(ShareReply, session=bytes(32)), ("share", "wrong_session"), False),
    "share: not for all": (
        alter(ShareReply, rows=lambda m: m.rows[1:]),
        ("share", "wrong_recipients"),
        False,
    ),
    "share: for itself": (
        alter(ShareReply, rows=lambda m: ((LIAR, bytes(80)), *m.rows[1:])),
        ("share", "wrong_recipients"),
        False,
    ),
    "mask: another session": (alter(MaskReply, session=bytes(32)), ("mask", "wrong_session"), False),
    "mask: as another site": (alter(MaskReply, site=4), ("mask", "wrong_session"), False),
    "mask: a word less": (alter(MaskReply, vector=lambda m: m.vector[:-1]), ("mask", "wrong_size"), False),
    "mask: another ring": (
        alter(MaskReply, vector=lambda m: m.vector.astype("<u2")),
        ("mask", "wrong_size"),
        False,
    ),
    "mask: a word more": (
        alter(MaskReply, vector=lambda m: np.append(m.vector, m.vector[:1])),
        ("mask", "malformed"),
        False,
    ),
    "mask: a hundred megabytes": (when(MaskReply, long_body(100 * 2**20)), ("mask", "malformed"), False),
    "mask: a byte more": (when(MaskReply, long_body(1)), ("mask", "malformed"), False),
    "mask: another answer": (when(MaskReply, lambda *_: wire.Ready(LIAR, 1)), ("mask", "malformed"), False),
    "consist: a bad signature": (
        alter(ConsistReply, signature=bytes(64)),
        ("consist", "bad_signature"),
        True,
    ),
    "consist: another session": (alter(ConsistReply, session=bytes(32)), ("consist", "wrong_session"), True),
    "unmask: wrong shares": (
        alter(UnmaskReply, b_shares=lambda m: spoil(m.b_shares, *(o for o, _ in m.b_shares if o != LIAR))),
        ("unmask", "wrong_share"),
        True,
    ),
    "unmask: both kinds": (
        alter(UnmaskReply, s_shares=lambda m: m.b_shares[:1]),
        ("unmask", "unasked_share"),
        True,
    ),
    "unmask: of a stranger": (
        alter(UnmaskReply, b_shares=lambda m: (*m.b_shares, (99, bytes(32)))),
        ("unmask", "unasked_share"),
        True,
    ),
    "unmask: no field elements": (
        alter(UnmaskReply, b_shares=lambda m: tuple((owner, b"\xff" * 32) for owner, _ in m.b_shares)),
        ("unmask", "malformed"),
        True,
    ),
    "unmask: another session": (alter(UnmaskReply, session=bytes(32)), ("unmask", "wrong_session"), True),
}


@pytest.mark.parametrize("name", LIES)
def test_a_site_that_lies_is_named_and_the_sum_is_exact(
    name: str, fleets: Fleets, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lie, (exchange, fault), counts = LIES[name]
    shutil.copytree(trained, tmp_path / "run")
    outcome = round_with_a_liar(fleets, tmp_path / "run", monkeypatch, lie)
    assert outcome.counted and LIAR in outcome.fates and len(outcome.fates) == 7
    assert {row[:3] for row in outcome.blames} == {(LIAR, exchange, fault)}
    assert outcome.survivors == set(outcome.fates) - (set() if counts else {LIAR})
    if not counts:
        assert outcome.fates[LIAR] == f"{exchange}:malformed"


def test_a_site_that_refuses_is_not_blamed(
    fleets: Fleets, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    lie = when(MaskReply, lambda *_: wire.Refusal(LIAR, REFUSED))
    outcome = round_with_a_liar(fleets, tmp_path / "run", monkeypatch, lie)
    assert outcome.blames == set() and outcome.fates[LIAR] == "mask:refused-protocol"


def test_a_sealed_share_that_one_site_cannot_open_is_named(
    fleets: Fleets, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Site 3 seals garbage for one other site, which goes on without, and says which share is missing."""
    shutil.copytree(trained, tmp_path / "run")
    receiver: list[int] = []

    def spoiled(message: Any) -> Any:
        receiver.append(message.rows[0][0])
        return ((message.rows[0][0], bytes(80)), *message.rows[1:])

    outcome = round_with_a_liar(fleets, tmp_path / "run", monkeypatch, alter(ShareReply, rows=spoiled))
    assert outcome.blames == {(receiver[0], "unmask", "missing_share", LIAR)}
    assert outcome.survivors == set(outcome.fates)
    log = Inside(fleets.open(tmp_path / "run"), receiver[0]).log
    assert f"site {LIAR} did not follow the protocol" in log[-1]
    fleets.close(tmp_path / "run")


def plus(words: dict[int, int]) -> Callable[[Any], np.ndarray]:
    """The masked vector with something added in the clear: under the masks it is part of the update."""

    def change(message: Any) -> np.ndarray:
        vector = message.vector.copy()
        for place, value in words.items():
            vector[place : place + 1 or None] += np.uint32(value % 2**32)  # an array: it wraps, silently
        return vector

    return change


@pytest.mark.parametrize("name", ["noise", "weight 4", "weight 0", "weight -4", "shares of nothing"])
def test_without_an_exact_sum_there_is_none(
    name: str, fleets: Fleets, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What nobody can see in one vector shows in the sum, or stops it; the adapter stays as it was."""
    shutil.copytree(trained, tmp_path / "run")
    rng = np.random.default_rng(0)
    lie = {
        "noise": alter(MaskReply, vector=lambda m: rng.integers(0, 2**32, len(m.vector)).astype("<u4")),
        "weight 4": alter(MaskReply, vector=plus({-1: 3})),
        "weight 0": alter(MaskReply, vector=plus({-1: -1})),
        "weight -4": alter(MaskReply, vector=plus({-1: -5})),
        "shares of nothing": alter(ShareReply, rows=lambda m: tuple((to, bytes(80)) for to, _ in m.rows)),
    }[name]
    outcome = round_with_a_liar(fleets, tmp_path / "run", monkeypatch, lie, exact=False)
    assert not outcome.counted and outcome.survivors == set()
    said = (
        f"the secret of site {LIAR} cannot be rebuilt" if "shares" in name else "did not follow the encoding"
    )
    assert said in outcome.ending


TRAINED_LIES: dict[str, Callable[[Fleet], wire.Message]] = {
    "ready, as another site": lambda _: wire.Ready(4, 1),
    "ready, for another round": lambda _: wire.Ready(LIAR, 2),
    "an update in the clear": lambda fleet: wire.PlainUpdate(LIAR, 1, "0" * 64, np.ones(5, "f4")),
    "NaN in the clear": lambda fleet: wire.PlainUpdate(LIAR, 1, "0" * 64, np.full(5, np.nan, "f4")),
    "a masked vector": lambda _: MaskReply(bytes(32), LIAR, np.zeros(9, "<u4")),
    "a hello": lambda _: wire.Hello(LIAR),
}


@pytest.mark.parametrize("name", TRAINED_LIES)
def test_a_site_that_is_not_ready_is_not_in_the_session(
    name: str, fleets: Fleets, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained, tmp_path / "run")

    def lie(fleet: Fleet, message: Any) -> wire.Message | None:
        return TRAINED_LIES[name](fleet) if isinstance(message, wire.Ready) else None

    outcome = round_with_a_liar(fleets, tmp_path / "run", monkeypatch, lie)
    assert outcome.fates[LIAR] == "malformed" and outcome.survivors == set(outcome.fates) - {LIAR}


@pytest.mark.parametrize("site", [0, 99, 2**32 - 1])
def test_a_node_that_names_itself_by_no_id_of_the_roster_is_not_asked(
    site: int, fleets: Fleets, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server could not even open a session with it; the round goes on with the others."""
    shutil.copytree(trained, tmp_path / "run")

    def lie(_: Fleet, message: Any) -> RecordDict | None:
        # Without a head, so that only the roster can stop it.
        return wire.encode(wire.Hello(site)) if isinstance(message, wire.Hello) else None

    with monkeypatch.context() as patch:
        patch.setattr(Receipts, "accept", lambda *_, **__: True)
        outcome = round_with_a_liar(fleets, tmp_path / "run", patch, lie)
    assert outcome.counted and site not in outcome.fates and LIAR not in outcome.fates


def test_nan_in_a_plain_update_is_not_summed(
    bert_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(bert_folder, data_file, study={"plain_updates": True}, warmup={"rounds": 1})
    plain = Fleets(config)
    patch_fleets(monkeypatch, plain)
    (tmp_path / "run").mkdir()
    fill_folder(tmp_path / "run", plain.config)
    fleet = plain.open(tmp_path / "run")

    def bend(call: Call) -> RecordDict | None:
        if call.node != LIAR or not isinstance(call.message, wire.PlainUpdate):
            return None
        vector = call.message.vector.copy()
        vector[7] = np.nan
        assert call.reply is not None
        return wire.encode(replace(call.message, vector=vector), head_of(call.reply))

    oracle = Oracle().watch(monkeypatch)
    network = Network(tmp_path / "run", 6, bend=bend)
    run(plain, fleet, network)
    fates = {s.site: s.status for s in fleet.folder.site_rounds() if s.round == 1}
    assert fates == {site: "malformed" if site == LIAR else "ok" for site in range(1, 7)}
    others = [update for site, update in enumerate(oracle.updates[:6], start=1) if site != LIAR]
    found = adapters(fleet)
    part = Layout.of(fleet.model.active(fleet.plan.round(1).part))
    step = (found[1] - found[0])[fleet.model.layout.positions(part)]
    assert np.allclose(step, np.mean(others, axis=0), atol=1e-6)
    # Such a site has no exchanges, whatever it is asked.
    check_refusal(network.ask(VICTIM, ROUTES[C], ConsistRequest(bytes(32), U3)), CONFIG)
    plain.close(tmp_path / "run")
