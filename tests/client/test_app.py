"""The client's handlers: what is checked, charged and computed in which order, and what never leaves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

import client.app
from client.budget import Budget
from client.site import Site
from client.training import Shard
from common import wire
from common.errors import DataError, ModelError, PrivacyError, StatusCode
from common.features import FeatureCache
from common.noise import derived_key
from common.plan import make_plan, resolve
from simulations.engines import InlineGrid
from simulations.fleet import plan_digest
from tests.conftest import LABELS, World, moved

SECRET = "the record of a patient, born in 1961"


class Client:
    """One site behind its Flower app, and a server that sends what it likes."""

    def __init__(self, site: Site, open_site: Callable[[Context], Site] | None = None) -> None:
        self.site = site
        self._grid = InlineGrid(client.app.make_app(open_site or (lambda _: site)), 1)

    def send(self, content: RecordDict, kind: str = "train") -> RecordDict:
        (reply,) = self._grid.send_and_receive([Message(content, 1, kind)])
        assert not reply.has_error()
        return reply.content

    def ask(self, request: wire.Message, kind: str = "train") -> wire.Message:
        return wire.decode(self.send(wire.encode(request), kind))

    def request(self, **changes: Any) -> wire.TrainRequest:
        model = self.site.model
        good = wire.TrainRequest("run", 1, 1, self.site.plan_digest, model.layout.digest, moved(model))
        return dataclasses.replace(good, **changes)

    @property
    def charges(self) -> int:
        path = self.site.folder / "spend.jsonl"
        return len(path.read_bytes().splitlines()) if path.exists() else 0

    @property
    def log(self) -> str:
        path = self.site.folder / "site.log"
        return path.read_text("utf-8") if path.exists() else ""


@pytest.fixture
def subject(tmp_path: Path, world: Callable[..., World]) -> Client:
    this = world("bert-mean")
    config = resolve(this.config, smallest_site=50, labels=LABELS, threads=1)
    plan = make_plan(config)
    return Client(
        Site(
            site_id=3,
            folder=tmp_path,
            shard=Shard(this.examples, np.arange(50)),
            model=this.model,
            plan=plan,
            plan_digest=plan_digest(plan),
            setting=b"a configuration and a base model",
            budget=Budget(tmp_path / "spend.jsonl", target_epsilon=plan.target_epsilon, delta=plan.delta),
            noise_key=lambda context: derived_key(bytes(32), context),
            repeatable_noise=True,
            features=FeatureCache(),
        )
    )


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_: object) -> None:
        raise AssertionError("nothing may be trained here")

    monkeypatch.setattr(client.app, "train", train)


def test_hello(subject: Client) -> None:
    assert subject.ask(wire.Hello(0), "query.hello") == wire.Hello(3)


def test_a_round_is_charged_and_answered(subject: Client) -> None:
    answer = subject.ask(subject.request())
    assert isinstance(answer, wire.Update)
    assert (answer.site, answer.round, answer.attempt, answer.weight) == (3, 1, 1, 1.0)
    assert answer.layout_digest == subject.site.model.layout.digest
    assert np.isfinite(answer.vector).all() and np.abs(answer.vector).max() > 0
    assert subject.charges == 1


def test_the_same_question_gets_the_same_answer_for_one_charge(subject: Client) -> None:
    answers = [subject.ask(subject.request()) for _ in range(2)]
    assert all(isinstance(answer, wire.Update) for answer in answers)
    assert answers[0].vector.tobytes() == answers[1].vector.tobytes()  # type: ignore[union-attr]
    assert subject.charges == 1


@pytest.mark.parametrize("change", ["run_id", "attempt", "vector", "round"])
def test_another_question_gets_other_noise_and_another_charge(subject: Client, change: str) -> None:
    """A server that asks twice must not be able to take the difference of two answers."""
    other = {"run_id": "run2", "attempt": 2, "vector": moved(subject.site.model, 1), "round": 2}[change]
    first, second = subject.ask(subject.request()), subject.ask(subject.request(**{change: other}))
    assert isinstance(first, wire.Update) and isinstance(second, wire.Update)
    assert np.mean(first.vector == second.vector) < 0.01
    assert subject.charges == 2


def test_fresh_noise_is_charged_again(subject: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = iter([bytes(32), bytes([1] * 32)])
    fresh = dataclasses.replace(subject.site, repeatable_noise=False, noise_key=lambda _: next(keys))
    deployed = Client(fresh)
    first, second = deployed.ask(deployed.request()), deployed.ask(deployed.request())
    assert isinstance(first, wire.Update) and isinstance(second, wire.Update)
    assert not np.array_equal(first.vector, second.vector)
    assert deployed.charges == 2


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"plan_digest": "0" * 64}, StatusCode.REFUSED_CONFIG),
        ({"layout_digest": "0" * 64}, StatusCode.REFUSED_PROTOCOL),
        ({"round": 3}, StatusCode.REFUSED_CONFIG),
        ({"round": 2**31}, StatusCode.REFUSED_CONFIG),
    ],
    ids=["plan", "layout", "round after the last", "round far away"],
)
@pytest.mark.usefixtures("no_training")
def test_what_the_site_did_not_agree_to_is_refused_and_not_charged(
    subject: Client, change: dict[str, Any], code: StatusCode
) -> None:
    assert subject.ask(subject.request(**change)) == wire.Refusal(3, code)
    assert subject.charges == 0
    assert subject.log.count("\n") == 1


@pytest.mark.usefixtures("no_training")
def test_a_shard_smaller_than_a_batch_is_refused_and_not_charged(subject: Client) -> None:
    small = Shard(subject.site.shard.examples, np.arange(subject.site.plan.round(1).batch_size - 1))
    asked = Client(dataclasses.replace(subject.site, shard=small))
    assert asked.ask(asked.request()) == wire.Refusal(3, StatusCode.REFUSED_PRIVACY)
    assert asked.charges == 0


@pytest.mark.parametrize("fault", ["too long", "not finite"])
def test_a_vector_that_cannot_be_trained_from_is_not_charged(subject: Client, fault: str) -> None:
    good = moved(subject.site.model)
    bad = {"too long": np.append(good, np.float32(0)), "not finite": np.full_like(good, np.nan)}[fault]
    assert isinstance(subject.ask(subject.request(vector=bad)), wire.Refusal)
    assert subject.charges == 0


@pytest.mark.parametrize(
    "message",
    [
        wire.Hello(0),
        wire.Refusal(1, StatusCode.FAILED_DATA),
        wire.Update(3, 1, 1, "0", 1.0, np.ones(2, "f4")),
    ],
    ids=["hello", "refusal", "update"],
)
@pytest.mark.usefixtures("no_training")
def test_only_a_train_request_trains(subject: Client, message: wire.Message) -> None:
    assert subject.ask(message) == wire.Refusal(3, StatusCode.REFUSED_PROTOCOL)


@pytest.mark.parametrize("kind", ["train", "query.hello"])
@pytest.mark.usefixtures("no_training")
def test_a_message_that_does_not_decode_is_refused(subject: Client, kind: str) -> None:
    for content in (RecordDict(), RecordDict({"confide": ConfigRecord({"kind": "train"})})):
        assert wire.decode(subject.send(content, kind)) == wire.Refusal(3, StatusCode.REFUSED_PROTOCOL)


def test_the_charge_precedes_training(subject: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def train(*_: object) -> None:
        seen.append(subject.charges)
        raise RuntimeError("the machine died")

    monkeypatch.setattr(client.app, "train", train)
    assert subject.ask(subject.request()) == wire.Refusal(3, StatusCode.FAILED_INTERNAL)
    assert seen == [1] and subject.charges == 1


@pytest.mark.usefixtures("no_training")
def test_a_charge_that_is_not_written_stops_everything(
    subject: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Budget, "reserve", full)
    assert subject.ask(subject.request()) == wire.Refusal(3, StatusCode.FAILED_INTERNAL)


def test_a_spent_budget_refuses(subject: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    for attempt in range(1, 50):
        answer = subject.ask(subject.request(attempt=attempt))
        if isinstance(answer, wire.Refusal):
            break
    assert answer == wire.Refusal(3, StatusCode.REFUSED_BUDGET)
    # The plan has two rounds, so two answers fit, whatever the server calls them.
    assert subject.charges == 2
    assert subject.site.budget.epsilon_rdp <= subject.site.plan.target_epsilon


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError(SECRET), StatusCode.FAILED_INTERNAL),
        (MemoryError(SECRET), StatusCode.FAILED_INTERNAL),
        (DataError(SECRET), StatusCode.FAILED_DATA),
        (ModelError(SECRET), StatusCode.FAILED_MODEL),
        (PrivacyError(SECRET), StatusCode.REFUSED_PRIVACY),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_an_exception_s_text_stays_at_the_site(
    subject: Client, monkeypatch: pytest.MonkeyPatch, error: Exception, code: StatusCode
) -> None:
    def train(*_: object) -> None:
        raise error

    monkeypatch.setattr(client.app, "train", train)
    content = subject.send(wire.encode(subject.request()))
    assert wire.decode(content) == wire.Refusal(3, code)
    assert "patient" not in repr(content) + str(dict(content))
    assert SECRET in subject.log


def test_a_site_that_cannot_be_opened_says_only_that(subject: Client) -> None:
    def closed(_: Context) -> Site:
        raise PrivacyError(SECRET)

    content = Client(subject.site, closed).send(wire.encode(subject.request()))
    assert wire.decode(content) == wire.Refusal(0, StatusCode.REFUSED_PRIVACY)


def test_a_log_that_cannot_be_written_leaks_nothing(subject: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(SECRET)

    monkeypatch.setattr(Site, "log", full)
    answer = subject.ask(subject.request(round=9))
    assert answer == wire.Refusal(3, StatusCode.REFUSED_CONFIG)


def test_other_records_are_another_charge(subject: Client) -> None:
    """One key over two versions of the data would give their difference without noise."""
    first = subject.ask(subject.request())
    fewer = dataclasses.replace(subject.site, shard=Shard(subject.site.shard.examples, np.arange(49)))
    second = Client(fewer).ask(subject.request())
    assert isinstance(first, wire.Update) and isinstance(second, wire.Update)
    assert subject.charges == 2


def test_a_study_without_privacy_is_charged_nothing(subject: Client) -> None:
    plan = subject.site.plan
    rounds = tuple(dataclasses.replace(r, event=None) for r in plan.rounds)
    study = Client(
        dataclasses.replace(subject.site, plan=dataclasses.replace(plan, rounds=rounds, private=False))
    )
    assert isinstance(study.ask(study.request()), wire.Update)
    assert study.charges == 0
