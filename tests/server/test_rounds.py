"""A whole run on a grid whose sites answer as they like: what is summed, what counts, what is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Error, Message

from common import wire
from common.adapter import Layout, read_vector, write_vector
from common.config import ServerOptimizer
from common.errors import CheckpointError, RoundError, StatusCode
from common.features import FeatureCache
from common.models import Part
from common.plan import make_plan, plan_digest, resolve
from common.secagg.errors import Exchange
from common.secagg.transcript import roster_hash
from server import checkpoint, cohort, rounds
from server.record import RoundEvent, RunFolder
from server.rounds import Job
from simulations.engines import InlineGrid
from tests.conftest import LABELS, World, moved

Answer = Callable[[wire.TrainRequest], wire.Message | Error]
SITES = 4


class Watch:
    """Keeps what people would see."""

    def __init__(self) -> None:
        self.events: list[RoundEvent] = []
        self.sites = 0

    def site_done(self, round_number: int, asked: int) -> None:
        self.sites += 1

    def stage(self, round_number: int, exchange: Exchange) -> None:
        raise AssertionError("a study with plain updates has no exchanges")

    def round_done(self, event: RoundEvent) -> None:
        self.events.append(event)


class Federation:
    """A job and the answers of its sites; site n sits at node n."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.asked: list[tuple[int, wire.TrainRequest]] = []
        self.answers: dict[int, Answer] = {n: self.good(n) for n in range(1, SITES + 1)}

    def change(self, site: int, part: Layout) -> np.ndarray:
        return np.full(part.size, 0.01 * site, dtype=np.float32)

    def part(self, number: int) -> Layout:
        return Layout.of(self.job.model.active(self.job.plan.round(number).part))

    def good(self, site: int, /, **changes: Any) -> Answer:
        def answer(request: wire.TrainRequest) -> wire.Message:
            part = self.part(request.round)
            update = wire.PlainUpdate(site, request.round, part.digest, self.change(site, part))
            return dataclasses.replace(update, **changes)

        return answer

    def hello(self, site: int, request: wire.Hello) -> wire.Message:
        return wire.Hello(site)

    def __call__(self, message: Message, context: Context) -> Message:
        request = wire.decode(message.content)
        if isinstance(request, wire.Hello):
            return Message(wire.encode(self.hello(context.node_id, request)), reply_to=message)
        assert isinstance(request, wire.TrainRequest)
        self.asked.append((context.node_id, request))
        answer = self.answers[context.node_id](request)
        content = answer if isinstance(answer, Error) else wire.encode(answer)
        return Message(content, reply_to=message)

    def run(self) -> checkpoint.Checkpoint:
        self.watch = Watch()
        return rounds.run(self.job, InlineGrid(self, SITES), self.watch)  # type: ignore[arg-type]

    def statuses(self, number: int) -> dict[int, str]:
        return {e.site: e.status for e in self.job.folder.site_rounds() if e.round == number}


@pytest.fixture
def federation(tmp_path: Path, world: Callable[..., World]) -> Callable[..., Federation]:
    def build(kind: str = "bert-mean", method: str = "ffa", **server: Any) -> Federation:
        this = world(kind, method)
        config = this.config.model_copy(
            update={
                "server": this.config.server.model_copy(update=server),
                "aggregation": this.config.aggregation.model_copy(update={"min_cohort": 3}),
                "study": this.config.study.model_copy(update={"plain_updates": True}),
                "sites": this.config.sites.model_copy(update={"count": SITES}),
            }
        )
        config = resolve(config, smallest_site=50, labels=LABELS, threads=1)
        plan = make_plan(config)
        model = this.model
        write_vector(model.parameters, model.layout, moved(model))
        return Federation(
            Job(
                run_id="run",
                folder=RunFolder(tmp_path),
                config=config,
                config_digest=config.digest().hex(),
                plan=plan,
                plan_digest=plan_digest(plan),
                model=model,
                public=this.examples,
                features=FeatureCache(),
                roster={},
                receipts=None,
            )
        )

    return build


def test_a_run_sums_evaluates_and_keeps(federation: Callable[..., Federation]) -> None:
    run = federation()
    start = read_vector(run.job.model.parameters, run.job.model.layout)
    end = run.run()
    mean = 0.01 * np.mean(range(1, SITES + 1))
    assert end.round == 2
    assert np.allclose(end.adapter, start + 2 * mean, atol=1e-6)
    # Every site was asked once a round, from the adapter of that round.
    assert [node for node, _ in run.asked] == [1, 2, 3, 4] * 2
    assert all(np.array_equal(request.vector, start) for _, request in run.asked[:SITES])
    assert np.allclose(run.asked[-1][1].vector, start + mean, atol=1e-6)
    assert {request.plan_digest for _, request in run.asked} == {run.job.plan_digest}
    # Round 0 measures the start; every round is recorded, evaluated and shown.
    events = run.job.folder.rounds()
    assert events == run.watch.events and [e.round for e in events] == [0, 1, 2]
    assert all(e.accuracy is not None and e.evaluated_records == 160 for e in events)
    assert run.watch.sites == 2 * SITES
    sites = run.job.folder.site_rounds()
    assert all(s.status == "ok" and s.bytes_up > 4 * run.part(1).size for s in sites)
    event = run.job.plan.rounds[0].event
    assert event is not None and [s.events for s in sites] == [[event.to_json()]] * 2 * SITES


def test_a_finished_run_is_not_run_again(federation: Callable[..., Federation]) -> None:
    run = federation()
    end = run.run()
    before = run.job.folder.events.read_bytes()
    run.asked.clear()
    assert np.array_equal(run.run().adapter, end.adapter)
    assert run.asked == [] and run.job.folder.events.read_bytes() == before


def test_a_run_goes_on_from_its_checkpoint(federation: Callable[..., Federation]) -> None:
    run = federation(optimizer=ServerOptimizer.FEDADAM)
    expected = run.run()
    newest = sorted(run.job.folder.checkpoints.iterdir())[-1]
    newest.unlink()
    run.asked.clear()
    again = run.run()
    assert {request.round for _, request in run.asked} == {2}
    assert again.adapter.tobytes() == expected.adapter.tobytes()
    assert again.state.second.tobytes() == expected.state.second.tobytes()


def test_another_plan_s_checkpoint_is_not_taken(federation: Callable[..., Federation]) -> None:
    run = federation()
    run.run()
    run.job = dataclasses.replace(run.job, config_digest="0" * 64)
    with pytest.raises(CheckpointError, match="another configuration"):
        run.run()


@pytest.mark.parametrize("method", ["rolora", "lora"])
def test_only_what_trains_in_a_round_travels_and_changes(
    federation: Callable[..., Federation], method: str
) -> None:
    run = federation("bert-default", method)
    start = read_vector(run.job.model.parameters, run.job.model.layout)
    end = run.run()
    layout = run.job.model.layout
    expected = start.astype(np.float64)
    for number in (1, 2):
        expected[layout.positions(run.part(number))] += 0.025
    assert np.allclose(end.adapter, expected, atol=1e-6)
    if method == "rolora":
        assert [run.job.plan.round(n).part for n in (1, 2)] == [Part.B_AND_HEAD, Part.A_AND_HEAD]
        assert run.part(1).size < layout.size


def test_too_few_answers_do_not_count(federation: Callable[..., Federation]) -> None:
    run = federation()
    start = read_vector(run.job.model.parameters, run.job.model.layout)
    refuse = lambda _: wire.Refusal(1, StatusCode.REFUSED_BUDGET)  # noqa: E731
    run.answers[1] = run.answers[2] = refuse
    end = run.run()
    assert end.adapter.tobytes() == start.tobytes()
    assert end.round == 2
    for event in run.job.folder.rounds()[1:]:
        assert (event.asked, event.trained, event.answered, event.counted) == (SITES, 2, 0, False)
    assert run.statuses(1) == {1: "refused-budget", 2: "refused-budget", 3: "too-few", 4: "too-few"}


def test_three_failed_rounds_on_end_stop_the_run(federation: Callable[..., Federation]) -> None:
    run = federation()
    config = run.job.config.model_copy(
        update={"run": run.job.config.run.model_copy(update={"rounds": 5}), "privacy": run.job.config.privacy}
    )
    run.job = dataclasses.replace(run.job, plan=make_plan(config))
    run.answers = dict.fromkeys(run.answers, lambda _: Error(1, "out of memory"))
    with pytest.raises(RoundError, match="3 rounds on end"):
        run.run()
    assert [e.round for e in run.job.folder.rounds()] == [0, 1, 2, 3]
    assert run.statuses(3) == dict.fromkeys(range(1, SITES + 1), "transport-1")


BAD_UPDATES: dict[str, dict[str, Any]] = {
    "bad_other_site": {"site": 2},
    "bad_unknown_site": {"site": 99},
    "bad_round": {"round": 7},
    "bad_layout": {"layout_digest": "0" * 64},
    "bad_length": {"vector": np.ones(3, dtype=np.float32)},
    "bad_nan": {"vector": None},
}


@pytest.mark.parametrize("name", BAD_UPDATES)
def test_a_malformed_update_is_not_summed(federation: Callable[..., Federation], name: str) -> None:
    run = federation()
    changes = dict(BAD_UPDATES[name])
    if name == "bad_nan":
        vector = np.ones(run.part(1).size, dtype=np.float32)
        vector[-1] = np.nan
        changes["vector"] = vector
    start = read_vector(run.job.model.parameters, run.job.model.layout)
    run.answers[1] = run.good(1, **changes)
    end = run.run()
    assert run.statuses(1) == {1: "malformed", 2: "ok", 3: "ok", 4: "ok"}
    assert np.allclose(end.adapter, start + 2 * 0.03, atol=1e-6)


@pytest.mark.parametrize(
    "answer",
    [wire.Hello(1), wire.TrainRequest("run", 1, "x", "x", np.ones(1, dtype=np.float32)), wire.Ready(3, 1)],
    ids=["hello", "request", "ready, where the study wants the update"],
)
def test_an_answer_of_another_kind_is_not_summed(
    federation: Callable[..., Federation], answer: wire.Message
) -> None:
    run = federation()
    run.answers[3] = lambda _: answer
    run.run()
    assert run.statuses(1)[3] == "malformed"


@pytest.mark.parametrize("failure", ["failed-model", "transport", "malformed"])
def test_a_site_that_may_have_been_charged_is_recorded_as_charged(
    federation: Callable[..., Federation], failure: str
) -> None:
    """The charge comes first at the site: only a refusal that precedes it is known to be free."""
    run = federation()
    run.answers[1] = {
        "failed-model": lambda _: wire.Refusal(1, StatusCode.FAILED_MODEL),
        "transport": lambda _: Error(1, "died"),
        "malformed": run.good(1, site=2),
    }[failure]
    run.run()
    assert [bool(s.events) for s in run.job.folder.site_rounds() if s.site == 1] == [True, True]


@pytest.mark.parametrize("code", StatusCode)
def test_only_a_refusal_is_free(federation: Callable[..., Federation], code: StatusCode) -> None:
    run = federation()
    run.answers[1] = lambda _: wire.Refusal(1, code)
    run.run()
    charged = {bool(s.events) for s in run.job.folder.site_rounds() if s.site == 1}
    # Who refuses to repeat a round was charged for it before.
    assert charged == {code is StatusCode.REFUSED_REPEAT or not code.value.startswith("refused-")}


def test_a_part_of_the_sites_is_asked(federation: Callable[..., Federation]) -> None:
    run = federation(fraction=0.75)
    run.run()
    for number in (1, 2):
        assert len([n for n, request in run.asked if request.round == number]) == 3
    assert [e.asked for e in run.job.folder.rounds()[1:]] == [3, 3]


@pytest.mark.parametrize(("every", "measured"), [(0, [True, False, True]), (1, [True, True, True])])
def test_evaluation_is_as_often_as_asked(
    federation: Callable[..., Federation], every: int, measured: list[bool]
) -> None:
    run = federation()
    section = run.job.config.evaluation.model_copy(update={"every": every, "records": 20})
    run.job = dataclasses.replace(run.job, config=run.job.config.model_copy(update={"evaluation": section}))
    run.run()
    events = run.job.folder.rounds()
    assert [e.accuracy is not None for e in events] == measured
    # Before and after, all records; between, as many as asked for.
    assert [e.evaluated_records for e in events] == [160, 20 if every else 0, 160]


def test_a_crash_between_record_and_checkpoint_repeats_the_round(
    federation: Callable[..., Federation], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = federation()
    expected = run.run()
    other = federation()
    other.job = dataclasses.replace(other.job, folder=RunFolder(run.job.folder.path / "other"))
    other.job.folder.path.mkdir()
    original = checkpoint.save

    def dies(folder: Path, state: checkpoint.Checkpoint, **options: Any) -> Path:
        if state.round == 1:
            raise KeyboardInterrupt
        return original(folder, state, **options)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", dies)
        with pytest.raises(KeyboardInterrupt):
            other.run()
    assert other.run().adapter.tobytes() == expected.adapter.tobytes()
    assert [e.round for e in other.job.folder.rounds()] == [0, 1, 2]
    assert len(other.job.folder.site_rounds()) == 2 * SITES


# Deployed sites come and go


def test_a_deployed_run_waits_for_enough_sites_and_calls_who_is_new(
    federation: Callable[..., Federation], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = federation()
    live = [{1: 1}, {1: 1, 2: 2}, {1: 1, 2: 2}, {1: 1, 2: 2, 3: 3}]
    calls: list[list[int]] = []

    def names(grid: object) -> dict[int, int]:
        now = live[0] if len(live) == 1 else live.pop(0)
        # Site 4 comes when round 1 is over.
        return now | ({4: 4} if run.watch.events and run.watch.events[-1].round >= 1 else {})

    monkeypatch.setattr(rounds, "_WAIT_SECONDS", 0.0)
    run.job = dataclasses.replace(run.job, names=names, called=lambda present, absent: calls.append(present))
    end = run.run()
    assert end.round == 2
    assert [sorted(node for node, r in run.asked if r.round == number) for number in (1, 2)] == [
        [1, 2, 3],
        [1, 2, 3, 4],
    ]
    assert calls[-2:] == [[1, 2, 3], [1, 2, 3, 4]]
    assert [1, 2] in calls  # too few: the run waited


def test_after_a_round_without_a_sum_all_are_called_before_anybody_is_charged_again(
    federation: Callable[..., Federation], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower takes a node that has just gone for a live one, for a minute."""
    run = federation(give_up_after=0)
    gone = {2, 4}
    calls: list[list[int]] = []

    def lost(request: wire.TrainRequest) -> wire.Message | Error:
        return Error(3)

    def hello(site: int, request: wire.Hello) -> wire.Message:
        # They come back when they have been called twice in vain.
        if len(calls) >= 3:
            gone.clear()
        return wire.Refusal(site, StatusCode.FAILED_INTERNAL) if site in gone and calls else wire.Hello(site)

    good = {site: run.answers[site] for site in gone}
    for site in (2, 4):
        run.answers[site] = lambda request, site=site: lost(request) if site in gone else good[site](request)
    monkeypatch.setattr(run, "hello", hello)
    monkeypatch.setattr(rounds, "_WAIT_SECONDS", 0.0)
    run.job = dataclasses.replace(
        run.job,
        names=lambda _: {n: n for n in range(1, SITES + 1)},
        called=lambda present, absent: calls.append(present),
    )
    assert run.run().round == 2
    assert calls == [[1, 2, 3, 4], [1, 3], [1, 3], [1, 2, 3, 4]]
    assert [event.counted for event in run.job.folder.rounds()] == [True, False, True]
    assert sorted(node for node, r in run.asked if r.round == 2) == [1, 2, 3, 4]


def test_who_holds_an_older_roster_is_left_out_until_it_has_the_newer_one(
    federation: Callable[..., Federation], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site is enrolled while round 1 runs. Nobody stops the job: those who lag are not asked to train."""
    run = federation()
    old, new = {n: bytes([n]) * 32 for n in range(1, 4)}, {n: bytes([n]) * 32 for n in range(1, 5)}
    behind = {1: 2, 2: 1, 3: 0}  # how many more questions site n answers by its old roster
    said: list[tuple[list[int], dict[int, str]]] = []

    def hello(site: int, request: wire.Hello) -> wire.Message:
        if request.roster == roster_hash(new) and behind.get(site, 0) > 0:
            behind[site] -= 1
            return wire.Refusal(site, StatusCode.REFUSED_ROSTER)
        return wire.Hello(site)

    monkeypatch.setattr(run, "hello", hello)
    monkeypatch.setattr(rounds, "_WAIT_SECONDS", 0.0)
    # The roll call as with secure aggregation, the rest in the clear.
    call = cohort.roll_call

    def with_roster(*arguments: Any, roster: bytes, **more: Any) -> dict[int, int]:
        return call(*arguments, roster=roster_hash(run.roster), **more)

    def membership() -> dict[int, bytes]:
        run.roster = new if len(run.watch.events) == 2 else old
        return run.roster

    monkeypatch.setattr(cohort, "roll_call", with_roster)
    run.roster = old
    run.job = dataclasses.replace(
        run.job,
        roster=old,
        membership=membership,
        names=lambda _: {n: n for n in run.roster},
        called=lambda present, absent: said.append((present, dict(absent))),
    )
    assert run.run().round == 2
    assert said[0] == ([1, 2, 3], {})
    assert ([3, 4], {1: "refused-roster", 2: "refused-roster"}) in said  # fewer than three: the run waits
    assert ([2, 3, 4], {1: "refused-roster"}) in said
    trained = [sorted(node for node, r in run.asked if r.round == number) for number in (1, 2)]
    assert trained == [[1, 2, 3], [2, 3, 4]]


def test_when_every_site_has_answered_a_round_before_the_run_goes_on(
    federation: Callable[..., Federation],
) -> None:
    """A server that was killed after a round's uploads asks again: no site computes it twice."""
    run = federation(give_up_after=0)
    for site in range(1, SITES + 1):
        good = run.answers[site]
        run.answers[site] = lambda request, site=site, good=good: (
            wire.Refusal(site, StatusCode.REFUSED_REPEAT) if request.round == 1 else good(request)
        )
    end = run.run()
    assert end.round == 2
    assert [event.counted for event in run.job.folder.rounds()] == [True, False, True]
    # They were charged for it once, and no record of that was left: the claim must count it.
    event = run.job.plan.round(1).event
    assert event is not None
    assert [s.events for s in run.job.folder.site_rounds() if s.round == 1] == [[event.to_json()]] * SITES
