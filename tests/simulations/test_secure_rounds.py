"""Whole runs with secure aggregation, on tiny models: exact sums, dropouts, what sites send, restarts."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import simulations.fleet
from client.identity import SiteFolder
from client.site import Site
from common import wire
from common.adapter import Layout
from common.aggregation import policy_of
from common.config import load_config
from common.errors import ConfideError, ConfigError, ProtocolError
from common.evaluation import evaluate
from common.metrics import read_counts
from common.noise import derived_key
from common.secagg.errors import Exchange
from common.secagg.messages import (
    AdvertiseReply,
    ConsistReply,
    MaskReply,
    ShareReply,
    UnmaskReply,
)
from simulations.faults import LossyGrid
from simulations.fleet import Fleet
from simulations.run import DEMO, fill_folder
from tests.federation import (
    ROUTES,
    Fleets,
    Inside,
    Network,
    Oracle,
    adapters,
    attempts,
    chi_square,
    patch_fleets,
    run,
    small_config,
    windows,
)

REPLIES = (AdvertiseReply, ShareReply, MaskReply, ConsistReply, UnmaskReply)
UNLIKELY = 377  # chi-square of 255 degrees of freedom: above it with chance 1e-6


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut does is tested elsewhere; here it would only take time."""
    monkeypatch.setattr("os.fsync", lambda _: None)
    monkeypatch.setattr("client.ledger_file._SYNCHRONOUS", "OFF")


Make = Callable[..., Fleets]


@pytest.fixture(scope="module")
def make(bert_folder: Path, data_file: Path) -> Make:
    """`make(**sections)`: the fleets of a configuration, each built once."""
    built: dict[str, Fleets] = {}

    def fleets(**sections: dict[str, Any]) -> Fleets:
        key = repr(sorted(sections.items()))
        if key not in built:
            built[key] = Fleets(small_config(bert_folder, data_file, **sections))
        return built[key]

    return fleets


@pytest.fixture
def begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Fleet]:
    """`begin(fleets, name)`: the fleet of a run that has not begun."""

    def start(fleets: Fleets, name: str = "run") -> Fleet:
        patch_fleets(monkeypatch, fleets)
        (tmp_path / name).mkdir()
        fill_folder(tmp_path / name, fleets.config)
        return fleets.open(tmp_path / name)

    return start


Begin = Callable[..., Fleet]


def twin(fleets: Fleets, fleet: Fleet, name: str) -> Fleet:
    """The same run once more, as it is now: the same secret and keys, another folder."""
    fleets.close(fleet.folder.path)
    other = fleet.folder.path.with_name(name)
    shutil.copytree(fleet.folder.path, other)
    return fleets.open(other)


# Exact sums


@pytest.mark.parametrize("bits", [32, 16])
def test_every_sum_is_the_plain_integer_sum(
    bits: int, make: Make, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a warm-up round and two others, whose vectors differ in length, with metrics in the same vectors."""
    fleets = make(
        metrics={"enabled": True, "by_label": True}, aggregation={"min_cohort": 4, "ring_bits": bits}
    )
    fleet = begin(fleets)
    oracle = Oracle().watch(monkeypatch)
    run(fleets, fleet, Network(fleet.folder.path, 6))
    assert oracle.check(fleet.folder) == 3
    assert {key: set(vectors) for key, vectors in oracle.vectors.items()} == {
        (number, 1): set(range(1, 7)) for number in (1, 2, 3)
    }
    assert {result.total.dtype.itemsize * 8 for result in oracle.sums.values()} == {bits}
    assert len({len(result.total) for result in oracle.sums.values()}) == 2
    found = adapters(fleet)
    for number, event in enumerate(fleet.folder.rounds()[1:], start=1):
        # The numbers that people read are the sums of the sites' numbers.
        counts = oracle.counts[6 * (number - 1) : 6 * number]
        total = {name: sum(count[name] for count in counts) for name in counts[0]}
        read = read_counts(fleet.config, fleet.plan.round(number), total)
        assert read is not None and event.metrics is not None
        assert event.metrics == json.loads(json.dumps(dataclasses.asdict(read)))
        # And the step is the mean of the updates, up to rounding in the ring and of float32.
        part = Layout.of(fleet.model.active(fleet.plan.round(number).part))
        updates = oracle.updates[6 * (number - 1) : 6 * number]
        step = (found[number] - found[number - 1])[fleet.model.layout.positions(part)]
        policy = policy_of(fleet.config, fleet.model, fleet.plan.round(number))
        rounding = max(1 / policy.codec.scale(tensor) for tensor in policy.codec.tensors)
        assert np.abs(step - np.mean(updates, axis=0)).max() <= rounding + 1e-6
        assert rounding < (1e-6 if bits == 32 else 1e-2)


# Dropouts


def check_unfinished(fleet: Fleet, network: Network | None = None) -> Counter[str]:
    """What must hold whoever has dropped out; the reasons for which sessions ended."""
    folder, found = fleet.folder, adapters(fleet)
    ends = {(end.round, end.attempt): end for end in folder.sessions()}
    tried = defaultdict(list)
    for attempt in attempts(folder):
        tried[attempt.round].append(attempt)
    lines = [json.loads(line) for line in folder.events.read_text("utf-8").splitlines()]
    keys = [(line["round"], line["attempt"]) for line in lines if line["kind"] == "attempt"]
    assert len(keys) == len(set(keys)), "a (round, attempt) was used again"
    reasons: Counter[str] = Counter()
    for event in folder.rounds()[1:]:
        number = event.round
        statuses = {s.site: s.status for s in folder.site_rounds() if s.round == number}
        answered = {site for site, status in statuses.items() if status == "ok"}
        sessions = [ends[number, attempt.attempt] for attempt in tried[number]]
        # Unfinished: the adapter is bit for bit what it was, and no site counts.
        if not event.counted:
            assert found[number].tobytes() == found[number - 1].tobytes()
            assert not answered and event.answered == 0
        else:
            assert found[number].tobytes() != found[number - 1].tobytes()
            assert answered == set(sessions[-1].survivors) and event.answered == len(answered)
            assert len(answered) >= fleet.config.aggregation.min_cohort
        # Every reason is on record: of each session, and of each site in which exchange it was lost.
        assert all(end.outcome for end in sessions) and sessions
        assert (sessions[-1].outcome == "sum") == event.counted
        assert len(statuses) == fleet.config.sites.count
        for site, status in statuses.items():
            exchange = status.partition(":")[0]
            assert site in answered or exchange in {e.name.lower() for e in Exchange}, status
        # Another session only where the one before ended before any vector was asked for, with fewer sites.
        for before, after, attempt in zip(sessions, sessions[1:], tried[number][1:], strict=False):
            assert before.outcome.partition(":")[0] in ("advertise", "share"), before.outcome
            assert after.attempt == before.attempt + 1
            assert set(attempt.cohort) < set(tried[number][0].cohort)
        reasons.update(end.outcome.partition(":")[0] for end in sessions)
    if network is not None:
        check_order(network)
    return reasons


def check_order(network: Network) -> None:
    """No site is asked to advertise again in a round after anybody was asked for a masked vector."""
    masked: set[str] = set()
    for call in network.calls:
        if call.kind == ROUTES[Exchange.MASK]:
            masked.add(call.group)
        assert call.kind != ROUTES[Exchange.ADVERTISE] or call.group not in masked


@pytest.mark.parametrize(
    ("dropout", "seed"),
    [(0.3, 0), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(0.3, 1), (0.3, 2), (0.1, 3)])],
)
def test_dropouts_leave_exact_sums_or_nothing(
    dropout: float, seed: int, make: Make, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleets = make(
        run={"rounds": 2, "seed": seed},
        warmup={"rounds": 18, "local_steps": 1, "target_epsilon": 30.0},
        sites={"count": 8, "dropout": dropout},
        server={"give_up_after": 0},
        aggregation={"min_cohort": 3},
        privacy={"target_epsilon": 40.0},
    )
    fleet = begin(fleets)
    oracle = Oracle().watch(monkeypatch)
    network = Network(fleet.folder.path, 8)
    end = run(fleets, fleet, LossyGrid(network, dropout, seed))
    assert end.round == 20
    sums = oracle.check(fleet.folder)
    reasons = check_unfinished(fleet, network)
    assert reasons["sum"] == sums > 0 and reasons.total() - sums > 0
    # Nothing that was uploaded was uploaded again.
    everything = [(site, v.tobytes()) for vectors in oracle.vectors.values() for site, v in vectors.items()]
    assert len(set(everything)) == len(everything)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("dropout", [0.3, 0.1])
def test_dropouts_of_the_demo_for_twenty_rounds(
    dropout: float, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [
        "run.rounds=18",
        "run.checkpoints=100",
        "run.threads=1",
        f"sites.dropout={dropout}",
        "server.give_up_after=0",
        "aggregation.min_cohort=3",  # of eight: with four, hardly a round survives three dropouts in ten
        "training.local_steps=1",
        "privacy.sample_rate=0.01",
        "model.max_length=16",  # so that twenty rounds take minutes
        "evaluation.every=0",
    ]
    fleets = Fleets(load_config(DEMO, overrides))
    fleet = begin(fleets)
    oracle = Oracle().watch(monkeypatch)
    network = Network(fleet.folder.path, 8)
    assert run(fleets, fleet, LossyGrid(network, dropout, 0)).round == 20
    sums = oracle.check(fleet.folder)
    reasons = check_unfinished(fleet, network)
    assert reasons["sum"] == sums > 0
    print(f"dropout {dropout}: {sums} sums, sessions ended {dict(reasons)}")


@pytest.mark.parametrize("how", ["unsent", "unanswered"])
def test_one_site_lost_at_each_exchange_in_turn(
    how: str, make: Make, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In round k, site 2 is lost at the k-th exchange: the request, or its answer. All five rounds finish."""
    fleets = make(warmup={"rounds": 4}, sites={"count": 5})
    fleet = begin(fleets)
    oracle = Oracle().watch(monkeypatch)
    network = Network(fleet.folder.path, 5)

    def lose(node: int, kind: str) -> str:
        number = 1 + sum(event.round > 0 for event in fleet.folder.rounds())
        return how if node == 2 and kind == ROUTES[Exchange(number - 1)] else "sent"

    network._lose = lose
    run(fleets, fleet, network)
    assert oracle.check(fleet.folder) == 5
    check_unfinished(fleet, network)
    everybody, others = (1, 2, 3, 4, 5), (1, 3, 4, 5)
    survivors = {key: result.survivors for key, result in oracle.sums.items()}
    assert survivors == {
        (1, 1): others,  # before its shares: it is out
        (2, 1): others,
        (3, 1): others,  # after its shares: its pair masks are rebuilt
        (4, 1): everybody,  # after its vector: it counts
        (5, 1): everybody,
    }
    fates = {s.round: s.status for s in fleet.folder.site_rounds() if s.site == 2}
    reason = {"unsent": "not-sent", "unanswered": "transport-5"}[how]
    assert fates == {1: f"advertise:{reason}", 2: f"share:{reason}", 3: f"mask:{reason}", 4: "ok", 5: "ok"}


def test_a_session_that_falls_short_before_any_upload_is_tried_again(
    make: Make, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of seven are gone at SHARE: too few for the threshold of seven, enough for a new session."""
    fleets = make(warmup={"rounds": 1}, sites={"count": 7}, aggregation={"min_cohort": 4, "c_max": 1})
    fleet = begin(fleets)
    oracle = Oracle().watch(monkeypatch)
    gone = {5, 6, 7}
    share = ROUTES[Exchange.SHARE]
    network = Network(
        fleet.folder.path,
        7,
        lose=lambda node, kind: "unanswered" if node in gone and kind == share else "sent",
    )
    run(fleets, fleet, network)
    assert oracle.check(fleet.folder) == 2
    check_unfinished(fleet, network)
    assert [(a.round, a.attempt, len(a.cohort)) for a in attempts(fleet.folder)] == [
        (1, 1, 7),
        (1, 2, 4),
        (2, 1, 7),
        (2, 2, 4),
    ]
    # The second session has other keys, other masks, and the updates that waited: nobody has trained again.
    assert len(oracle.updates) == 2 * 7
    assert {key for key in oracle.vectors} == {(1, 2), (2, 2)}


# What sites send


def replies(network: Network) -> list[wire.Message]:
    return [call.message for call in network.calls]


def test_sites_send_nothing_but_replies_of_the_protocol(
    make: Make, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every byte is accounted for: each answer decodes, and written again it is what was sent."""
    fleets = make(metrics={"enabled": True}, sites={"count": 6, "dropout": 0.1})
    fleet = begin(fleets)
    network = Network(fleet.folder.path, 6)
    run(fleets, fleet, LossyGrid(network, 0.1, 0))
    kinds = {
        "query.hello": wire.Hello,
        "train": wire.Ready,
        **{ROUTES[exchange]: REPLIES[exchange] for exchange in Exchange},
    }
    assert {call.kind for call in network.calls} == set(kinds)
    for call in network.calls:
        message = call.message
        assert type(message) in (kinds[call.kind], wire.Refusal)
        assert call.reply is not None
        head = call.reply.config_records["confide"]["ledger"]
        assert isinstance(head, bytes)
        assert dict(wire.encode(message, head)) == dict(call.reply)
        match message:
            case wire.Hello(site) | wire.Refusal(site, _) | wire.Ready(site, _):
                assert site == call.node
            case AdvertiseReply():
                assert message.advertisement.site == call.node
            case _:
                assert message.site == call.node


def test_nothing_of_an_update_or_a_record_is_in_what_sites_send(
    make: Make, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleets = make(metrics={"enabled": True, "by_label": True})
    fleet = begin(fleets)
    oracle = Oracle().watch(monkeypatch)
    network = Network(fleet.folder.path, 6)
    run(fleets, fleet, network)
    sent = b"".join(call.wire for call in network.calls)
    found = {sent[i : i + 8] for i in range(len(sent) - 7)}
    needles: set[bytes] = set()
    for update in oracle.updates:  # any two numbers on end, as float32 and float64
        needles.update(windows(update.tobytes(), 8, 4), windows(update.astype("<f8").tobytes(), 8, 8))
    for vectors in oracle.vectors.values():
        for vector in vectors.values():  # any two words on end of an encoded vector; its weight and counts
            needles.update(windows(vector.tobytes(), 8, 4))
            assert vector[-7:].tobytes() not in sent
    scores = [
        evaluate(fleet.model, adapter, fleet.examples, fleet.split.sites[site - 1])
        for adapter in adapters(fleet).values()
        for site in range(1, 7)
    ]
    for score in scores:  # losses and accuracies as numbers and as text; sums of them, too
        for number in (score.mean_loss, score.mean_loss * score.count, score.accuracy or 0.0):
            needles.update(windows(np.float64(number).tobytes(), 8, 8))
            needles.update(windows(f"{number:.17g}".encode()[:8], 8, 8))
    assert len(needles) > 3_000 and len(sent) > 20_000
    assert not needles & found
    # The test has teeth: what is sent in the clear is found.
    clear = make(metrics={"enabled": True, "by_label": True}, study={"plain_updates": True})
    fleet, seen = begin(clear, "clear"), Oracle().watch(monkeypatch)
    network = Network(fleet.folder.path, 6)
    run(clear, fleet, network)
    sent = b"".join(call.wire for call in network.calls)
    assert all(next(windows(update.tobytes(), 8, 4)) in sent for update in seen.updates)


def test_masked_vectors_are_noise_and_no_two_share_a_mask(
    make: Make, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each site's vectors, their differences between sites, and those between two runs of the same round."""
    fleets = make(adapter={"rank": 16}, metrics={"enabled": True})
    first = begin(fleets, "first")
    second = twin(fleets, first, "second")
    masked, plain = [], []
    for fleet in (first, second):
        with monkeypatch.context() as patch:
            oracle = Oracle().watch(patch)
            run(fleets, fleet, Network(fleet.folder.path, 6))
            masked.append(oracle.masked)
            plain.append(oracle.vectors)
    for key, vectors in plain[0].items():  # twins: in the clear they are the same
        assert all(np.array_equal(vectors[site], plain[1][key][site]) for site in vectors)

    def pool(columns: Iterator[np.ndarray]) -> bytes:
        return b"".join(column.tobytes() for column in columns)

    rounds = masked[0].keys()
    for site in range(1, 7):
        own = [pool(run[key][site] for key in rounds) for run in masked]
        again = pool(masked[0][key][site] - masked[1][key][site] for key in rounds)
        for data in (*own, again):
            assert len(data) > 5 * 256 and chi_square(data) < UNLIKELY
        for other in range(site + 1, 7):
            difference = pool(masked[0][key][site] - masked[0][key][other] for key in rounds)
            assert chi_square(difference) < UNLIKELY
    # The test has teeth: what is in the clear fails it by far.
    assert chi_square(pool(plain[0][key][1] for key in rounds)) > 4 * UNLIKELY


def test_lengths_do_not_depend_on_the_data(make: Make, begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two divisions of the records, one uneven: message by message, the same number of bytes."""
    lengths = []
    for name, partition in (("even", "iid"), ("uneven", "dirichlet")):
        fleets = make(
            sites={"count": 4, "partition": partition, "dirichlet_alpha": 0.5},
            privacy={"nominal_records": 8, "noise_multiplier": 8.0},
            metrics={"enabled": True},
        )
        fleet = begin(fleets, name)
        network = Network(fleet.folder.path, 4)
        run(fleets, fleet, network)
        lengths.append([(c.node, c.kind, wire.payload_bytes(c.reply)) for c in network.calls if c.reply])
        sizes = {len(part) for part in fleet.split.sites}
    assert len(sizes) > 2
    assert lengths[0] == lengths[1] and len(lengths[0]) == 4 + 3 * 4 * 6
    assert len({length for _, kind, length in lengths[0] if kind == "train"}) == 1


# With and without


@pytest.mark.parametrize("bits", [32, 16])
def test_secure_and_plain_federations_reach_the_same_adapter(
    bits: int, make: Make, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One configuration and one noise, once with secure aggregation and once in the clear: up to rounding.

    The noise is keyed by site and round here: its usual key depends on the last bit of the adapter.
    """
    sections = {"sites": {"count": 4}, "aggregation": {"min_cohort": 4, "ring_bits": bits}}
    fleets = {plain: make(study={"plain_updates": plain}, **sections) for plain in (False, True)}
    ends = {}
    for plain, name in ((False, "secure"), (True, "plain")):
        fleet = begin(fleets[plain], name)
        trained: Counter[int] = Counter()

        def site(
            self: Fleet, number: int, trained: Counter[int] = trained, open_site: Any = Fleet.site
        ) -> Site:
            def key(_: bytes) -> bytes:
                trained[number] += 1
                return derived_key(bytes(32), bytes([number, trained[number]]))

            return dataclasses.replace(open_site(self, number), noise_key=key)

        with monkeypatch.context() as patch:
            patch.setattr(Fleet, "site", site)
            network = Network(fleet.folder.path, 4)
            run(fleets[plain], fleet, network)
        ends[plain] = adapters(fleet)
        assert trained == dict.fromkeys(range(1, 5), 3)
        sent = {type(message) for message in replies(network)}
        assert (wire.PlainUpdate in sent) == plain and (MaskReply in sent) != plain
    moved = np.abs(ends[True][3] - ends[True][0]).max()
    apart = np.abs(ends[True][3] - ends[False][3]).max()
    plans = fleets[False].open(fleet.folder.path.with_name("secure")).plan.rounds
    codecs = [policy_of(fleets[False].config, fleet.model, plan).codec for plan in plans]
    rounding = sum(max(1 / codec.scale(t) for t in codec.tensors) for codec in codecs)
    print(f"{bits} bits: moved {moved:.3g}, apart {apart:.3g}, rounding at most {rounding:.3g}")
    assert moved > 1000 * 3e-6
    # A round's rounding goes through the rounds after it, which hardly stretch it at this learning rate.
    assert apart <= 5e-7 + 1.5 * rounding
    assert 0 < apart <= (1e-6 if bits == 32 else 0.01 * moved)


# Restarts


class KilledError(BaseException):
    """The process is gone: nothing may catch it."""


def same_end(fleet: Fleet, other: Fleet) -> None:
    one, two = adapters(fleet), adapters(other)
    assert one.keys() == two.keys()
    assert all(one[number].tobytes() == two[number].tobytes() for number in one)


def test_sites_and_server_restart_between_any_two_exchanges(
    make: Make, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sites that hold nothing in memory: each exchange meets a process that has just begun."""
    fleets = make(warmup={"rounds": 1})
    fleet = begin(fleets)
    other = twin(fleets, fleet, "undisturbed")
    run(fleets, other, Network(other.folder.path, 6))
    opened = []

    def fresh(path: Path) -> Fleet:
        opened.append(path)
        return Fleet(fleet.folder, fleets.config, fleets.split)

    cached = lru_cache(maxsize=1)(fresh)
    monkeypatch.setattr(simulations.fleet, "open_fleet", cached)
    before: list[str] = []

    def restart(node: int, kind: str) -> None:
        if before[-1:] != [kind]:
            cached.cache_clear()
        before.append(kind)

    run(fleets, fleet, Network(fleet.folder.path, 6, before=restart))
    assert len(opened) == 1 + 2 * 6
    same_end(fleet, other)
    assert [attempt.attempt for attempt in attempts(fleet.folder)] == [1, 1]


def kill_and_resume(
    fleets: Fleets, fleet: Fleet, points: list[tuple[str, int]], number: int
) -> list[Network]:
    """Kill the run before it asks the n-th site in each of `points`, one after the other, in round `number`;
    then let it finish."""
    networks = []
    for kind, place in points:
        seen: Counter[str] = Counter()

        def strike(node: int, asked: str, kind: str = kind, place: int = place, seen: Any = seen) -> None:
            if fleet.folder.rounds() and fleet.folder.rounds()[-1].round == number - 1:
                if (asked, seen[asked]) == (kind, place):
                    raise KilledError
                seen[asked] += 1

        networks.append(Network(fleet.folder.path, fleets.config.sites.count, before=strike))
        with pytest.raises(KilledError):
            run(fleets, fleet, networks[-1])
        fleets.close(fleet.folder.path)
    networks.append(Network(fleet.folder.path, fleets.config.sites.count))
    run(fleets, fleet, networks[-1])
    return networks


POINTS = [(kind, place) for kind in ("train", *ROUTES.values()) for place in (0, 3)]


def test_killed_at_each_exchange_and_resumed_equals_undisturbed(
    make: Make, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One round, killed before and amid its training and each of its exchanges in turn, twelve times."""
    fleets = make()
    fleet = begin(fleets)
    other = twin(fleets, fleet, "undisturbed")
    run(fleets, other, Network(other.folder.path, 6))
    oracle = Oracle().watch(monkeypatch)
    kill_and_resume(fleets, fleet, POINTS, 2)
    same_end(fleet, other)
    oracle.check(fleet.folder)
    # Ten of the kills were after a session had been opened: each number is used once, and they grow.
    assert [a.attempt for a in attempts(fleet.folder) if a.round == 2] == list(range(1, 12))
    assert [a.attempt for a in attempts(fleet.folder) if a.round != 2] == [1, 1]
    # What was charged is what the plan says, in spite of thirteen beginnings.
    assert all(Inside(fleet, site).charges == 3 == Inside(other, site).charges for site in range(1, 7))


@pytest.mark.slow
@pytest.mark.parametrize("point", [(kind, place) for kind, _ in POINTS[::2] for place in range(6)])
def test_killed_once_anywhere_and_resumed_equals_undisturbed(
    point: tuple[str, int], make: Make, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleets = make()
    fleet = begin(fleets)
    other = twin(fleets, fleet, "undisturbed")
    run(fleets, other, Network(other.folder.path, 6))
    kill_and_resume(fleets, fleet, [point], 2)
    same_end(fleet, other)


def restore(fleet: Fleet, site: int, backup: Path, names: tuple[str, ...] = ()) -> None:
    """The site's folder, or some files of it, as they were."""
    folder = fleet.folder.site(site)
    if not names:
        shutil.rmtree(folder)
        shutil.copytree(backup, folder)
    for name in names:
        if (backup / name).exists():
            shutil.copy2(backup / name, folder / name)
        else:
            (folder / name).unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("names", "code", "said"),
    [
        (("secagg.state", "waiting.update"), "refused-protocol", "it was restored from a backup"),
        ((), "refused-privacy", "than the one that was opened"),  # the ledger is even before the state
    ],
    ids=["state", "folder"],
)
def test_a_site_that_is_restored_from_a_backup_in_mid_run_refuses(
    names: tuple[str, ...],
    code: str,
    said: str,
    make: Make,
    begin: Begin,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The backup is of after round 1; it comes back before round 3. The others go on."""
    fleets = make()
    fleet = begin(fleets)
    backup = tmp_path / "backup"

    def strike(node: int, kind: str) -> None:
        done = [event.round for event in fleet.folder.rounds()][-1:]
        if (done, node, kind) == ([1], 3, "train"):
            shutil.copytree(fleet.folder.site(3), backup)
        if (done, node, kind) == ([2], 3, "train"):
            restore(fleet, 3, backup, names)

    caplog.set_level(logging.INFO, logger="confide.site")
    network = Network(fleet.folder.path, 6, before=strike)
    run(fleets, fleet, network)
    assert [event.answered for event in fleet.folder.rounds()[1:]] == [6, 6, 5]
    status = [s for s in fleet.folder.site_rounds() if s.site == 3]
    assert [s.status for s in status] == ["ok", "ok", code] and status[2].events == []
    assert any(said in record.getMessage() for record in caplog.records)
    if names:  # a site that could be opened has it in its own log, too
        assert said in Inside(fleet, 3).log[-1]
        assert Inside(fleet, 3).charges == 2  # it refuses before it is charged, not after
    refused = [call for call in network.calls if call.node == 3 and call.group == "3"]
    assert [type(call.message) for call in refused] == [wire.Refusal]


def test_a_site_that_was_restored_while_it_was_down_takes_no_part(
    make: Make, begin: Begin, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fleets = make()
    fleet = begin(fleets)
    backup = tmp_path / "backup"

    def strike(node: int, kind: str) -> None:
        done = [event.round for event in fleet.folder.rounds()][-1:]
        if (done, node, kind) == ([1], 1, "train"):
            fleets.close(fleet.folder.path)
            shutil.copytree(fleet.folder.site(3), backup)
        if (done, node, kind) == ([2], 1, "train"):
            raise KilledError

    with pytest.raises(KilledError):
        run(fleets, fleet, Network(fleet.folder.path, 6, before=strike))
    fleets.close(fleet.folder.path)
    restore(fleet, 3, backup)
    run(fleets, fleet, Network(fleet.folder.path, 6))
    last = fleet.folder.rounds()[-1]
    assert (last.round, last.asked, last.answered, last.counted) == (3, 5, 5, True)
    assert any("where there were" in record.getMessage() for record in caplog.records)
    with pytest.raises(ConfideError, match="where there were"):
        fleet.check_ledgers()  # a simulation, whose owner has all sites, does not even begin


# Keys and the roster


def test_a_roster_that_was_changed_is_refused(make: Make, begin: Begin) -> None:
    fleets = make()
    fleet = begin(fleets)
    path = fleet.folder.roster
    good = json.loads(path.read_text("utf-8"))
    assert set(fleet.roster) == set(range(1, 7))
    changes = {
        "another key": lambda d: d["members"][0].update(public=d["members"][1]["public"][::-1]),
        "another id": lambda d: d["members"][5].update(id=7),
        "one less": lambda d: d["members"].pop(),
        "another version": lambda d: d.update(version=2),
        "another authority": lambda d: d.update(authority=d["members"][0]["public"]),
    }
    for name, change in changes.items():
        bad = json.loads(json.dumps(good))
        change(bad)
        path.write_text(json.dumps(bad, indent=1) + "\n", encoding="utf-8")
        fleets.close(fleet.folder.path)
        with pytest.raises((ConfigError, ProtocolError), match=r"roster\.json"):
            run(fleets, fleet, Network(fleet.folder.path, 6))
        assert not fleet.folder.events.exists(), name


def swap(fleet: Fleet) -> None:
    one, two = (SiteFolder(fleet.folder.site(site)).identity for site in (1, 2))
    key = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(key)


def expose(fleet: Fleet) -> None:
    for site in (1, 2):
        SiteFolder(fleet.folder.site(site)).identity.chmod(0o640)


@pytest.mark.parametrize(
    ("change", "said"),
    [(swap, "is not the key that the roster has"), (expose, "must be for its owner alone")],
    ids=["swapped", "group-readable"],
)
def test_keys_that_are_another_site_s_or_exposed_are_refused(
    change: Callable[[Fleet], None],
    said: str,
    make: Make,
    begin: Begin,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Between rounds 1 and 2, at two sites of six. They take no part, and the others go on."""
    fleets = make()
    fleet = begin(fleets)

    def strike(node: int, kind: str) -> None:
        if (len(fleet.folder.rounds()), node, kind) == (2, 1, "train"):
            fleets.close(fleet.folder.path)
            change(fleet)

    caplog.set_level(logging.INFO, logger="confide.site")
    network = Network(fleet.folder.path, 6, before=strike)
    run(fleets, fleet, network)
    assert [event.answered for event in fleet.folder.rounds()[1:]] == [6, 4, 4]
    said_so = [record.getMessage() for record in caplog.records if said in record.getMessage()]
    assert len(said_so) >= 2
    answers = [call.message for call in network.calls if call.node in (1, 2) and call.group in "23"]
    assert len(answers) == 4 and all(isinstance(answer, wire.Refusal) for answer in answers)
    refused = [s for s in fleet.folder.site_rounds() if s.site in (1, 2) and s.round > 1]
    assert all(s.status.startswith("refused-") and s.events == [] for s in refused) and len(refused) == 4


def test_a_swapped_key_leaves_no_ledger_behind_that_is_another_site_s(
    make: Make, begin: Begin, caplog: pytest.LogCaptureFixture
) -> None:
    """From the start. When the keys are back in their places, all six sites take part."""
    fleets = make(warmup={"rounds": 1})
    fleet = begin(fleets)
    swap(fleet)

    def stop(node: int, kind: str) -> None:
        if len(fleet.folder.rounds()) == 2:
            raise KilledError

    with pytest.raises(KilledError):
        run(fleets, fleet, Network(fleet.folder.path, 6, before=stop))
    assert [e.asked for e in fleet.folder.rounds()] == [0, 4]
    assert any("is not the key that the roster has" in record.getMessage() for record in caplog.records)
    fleets.close(fleet.folder.path)
    swap(fleet)
    run(fleets, fleet, Network(fleet.folder.path, 6))
    assert [e.answered for e in fleet.folder.rounds()] == [0, 4, 6]
