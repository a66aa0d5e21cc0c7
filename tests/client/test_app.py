"""The client's handlers: what is checked, charged and computed in which order, and what never leaves."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

import client.app
import client.site
from client.identity import SiteFolder, create_site, load_identity, load_local_key
from client.ledger import Ledger
from client.policy_check import model_digest, policy_of_run
from client.site import Pinned, Site
from client.store import FileStore, drop_waiting, load_waiting
from client.training import Shard
from common import wire
from common.aggregation import policy_of
from common.errors import (
    ConfideError,
    ConfigError,
    DataError,
    ModelError,
    PrivacyError,
    ProtocolError,
    StatusCode,
)
from common.features import FeatureCache
from common.ledger import Charge
from common.ledger_errors import LedgerStorageError, WitnessError
from common.ledger_head import HEAD_BYTES, SignedHead
from common.ledger_replay import State
from common.noise import derived_key, fresh_key
from common.plan import make_plan, plan_digest, resolve
from common.secagg.keys import IdentityKey
from common.secagg.masks import Ring
from common.secagg.transcript import roster_hash
from simulations.engines import InlineGrid
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
        return wire.decode_reply(self.send(wire.encode(request), kind))[0]

    def vector(self, request: wire.TrainRequest) -> Ring:
        """The encoded update that waits after the site has said that it is ready."""
        assert self.ask(request) == wire.Ready(self.site.site_id, request.round)
        pinned = self.site.pinned
        assert pinned is not None
        waiting = load_waiting(self.site.waiting, pinned.local_key)
        assert waiting is not None and waiting.round == request.round
        return waiting.vector

    def forget(self) -> None:
        """The update is gone, as after its upload."""
        drop_waiting(self.site.waiting)

    def request(self, **changes: Any) -> wire.TrainRequest:
        model = self.site.model
        good = wire.TrainRequest("run", 1, self.site.plan_digest, model.layout.digest, moved(model))
        return dataclasses.replace(good, **changes)

    @property
    def hello(self) -> wire.Hello:
        assert self.site.pinned is not None
        return wire.Hello(0, roster_hash(self.site.pinned.roster))

    @property
    def charges(self) -> int:
        assert self.site.ledger is not None
        return len(self.site.ledger.balance("records").reservations)

    @property
    def log(self) -> str:
        path = self.site.folder / "site.log"
        return path.read_text("utf-8") if path.exists() else ""


def agreeing(site: Site) -> Client:
    """A client whose site's own people allow just what it is configured for."""
    policy = policy_of_run(site.config, site.plan, source=site.scope, model=site.model_digest)
    return Client(dataclasses.replace(site, policy=policy))


@pytest.fixture
def subject(tmp_path: Path, world: Callable[..., World]) -> Client:
    this = world("bert-mean")
    config = resolve(this.config, smallest_site=50, labels=LABELS, threads=1)
    plan = make_plan(config)
    folder = SiteFolder(tmp_path / "site")
    card = create_site(folder, "site", os.urandom, None)
    others = {number: IdentityKey.generate(os.urandom).public for number in (1, 2)}
    local_key = load_local_key(folder.local_key)
    store = FileStore(
        folder.path / "secagg.state",
        tmp_path / "witness",
        key=local_key,
        site=3,
        run=b"run",
        random_bytes=os.urandom,
    )
    identity = load_identity(folder.identity, None)
    ledger = Ledger(folder.path / "ledger.sqlite", identity, 3, witness=tmp_path / "ledger.witness")
    ledger.open_scope("records", target_epsilon=plan.target_epsilon, delta=plan.delta, planned=plan.events)
    return Client(
        Site(
            site_id=3,
            run_id="run",
            folder=folder.path,
            shard=Shard(this.examples, np.arange(50)),
            model=this.model,
            config=config,
            plan=plan,
            plan_digest=plan_digest(plan),
            setting=b"a configuration and a base model",
            policy=policy_of_run(config, plan, source="records", model=model_digest(this.model)),
            model_digest=model_digest(this.model),
            ledger=ledger,
            scope="records",
            noise_key=lambda context: derived_key(bytes(32), context),
            repeatable_noise=True,
            features=FeatureCache(),
            pinned=Pinned(identity, {**others, 3: card.public}, store, local_key, os.urandom),
        )
    )


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_: object) -> None:
        raise AssertionError("nothing may be trained here")

    monkeypatch.setattr(client.app, "train", train)


def test_hello(subject: Client) -> None:
    assert subject.ask(subject.hello, "query.hello") == wire.Hello(3)


def test_another_roster_is_said_before_anything_is_trained_or_charged(
    subject: Client, no_training: None
) -> None:
    """A round with it could not be summed: it would cost a round's budget for nothing."""
    assert subject.site.pinned is not None
    older = {site: key for site, key in subject.site.pinned.roster.items() if site != 1}
    for asked in (wire.Hello(0, roster_hash(older)), wire.Hello(0)):
        assert subject.ask(asked, "query.hello") == wire.Refusal(3, StatusCode.REFUSED_ROSTER)
    assert subject.charges == 0
    assert "confide client join" in subject.log


def test_a_round_is_charged_and_answered(subject: Client) -> None:
    vector = subject.vector(subject.request())
    policy = policy_of(subject.site.config, subject.site.model, subject.site.plan.round(1))
    read = policy.codec.decode_sum(vector, 1)
    assert read.weight == 1 and read.mean.shape == (subject.site.model.layout.size,)
    assert 0 < np.abs(read.mean).max() < policy.codec.tensors[0].clip
    assert subject.charges == 1


def test_ready_is_all_that_is_said(subject: Client) -> None:
    """Not how long it took, how many records there are, nor anything of the update."""
    content = subject.send(wire.encode(subject.request()))
    assert sorted(content) == ["confide"]
    said = dict(content.config_records["confide"])
    signed = said.pop("ledger")  # the signed head of its ledger
    assert isinstance(signed, bytes) and len(signed) == HEAD_BYTES
    assert said == {"kind": "ready", "version": wire.VERSION, "site": 3, "round": 1}
    _, head = wire.decode_reply(content)
    assert head is not None and head.site == 3


def test_every_answer_carries_the_newest_head(subject: Client) -> None:
    """A refusal too: whoever keeps heads sees that nothing was forgotten in between."""

    def head(content: RecordDict) -> SignedHead:
        _, found = wire.decode_reply(content)
        assert found is not None and subject.site.pinned is not None
        assert found.is_signed_by(subject.site.pinned.identity.public)
        return found

    before = head(subject.send(wire.encode(subject.hello), "query.hello"))
    after = head(subject.send(wire.encode(subject.request())))
    refused = head(subject.send(wire.encode(subject.request(round=99))))
    assert before.seq < after.seq == refused.seq and after.hash == refused.hash


def test_a_repeated_computation_with_another_result_is_refused(
    subject: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two results under one noise differ by what the noise was to hide."""
    first = subject.vector(subject.request())
    subject.forget()
    real = client.app.train

    def drifts(*arguments: Any) -> Any:
        return real(*arguments) + np.float32(0.1)

    monkeypatch.setattr(client.app, "train", drifts)
    assert subject.ask(subject.request()) == wire.Refusal(3, StatusCode.REFUSED_PRIVACY)
    assert "output" in subject.log
    assert not subject.site.waiting.exists() and len(first)


def test_an_update_that_waits_is_the_answer_to_its_question(
    subject: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that was restarted asks again: nothing is computed a second time, nothing is charged."""
    vector = subject.vector(subject.request())
    deployed = Client(dataclasses.replace(subject.site, repeatable_noise=False))
    monkeypatch.setattr(client.app, "train", None)
    assert np.array_equal(deployed.vector(deployed.request()), vector)
    assert subject.charges == 1


def test_an_update_at_rest_is_sealed(subject: Client) -> None:
    vector = subject.vector(subject.request())
    stored = subject.site.waiting.read_bytes()
    assert vector.tobytes()[:16] not in stored
    assert subject.site.folder.stat().st_mode & 0o077 == 0


def test_another_run_is_refused_and_not_charged(subject: Client) -> None:
    answer = subject.ask(subject.request(run_id="another"))
    assert answer == wire.Refusal(3, StatusCode.REFUSED_PROTOCOL) and subject.charges == 0


def test_only_a_site_that_says_so_sends_a_plain_update(subject: Client) -> None:
    with pytest.raises(PrivacyError, match="--insecure-plain-updates"):
        dataclasses.replace(subject.site, pinned=None)
    study = subject.site.config.study.model_copy(update={"plain_updates": True})
    config = subject.site.config.model_copy(update={"study": study})
    with pytest.raises(PrivacyError, match="--insecure-plain-updates"):
        dataclasses.replace(subject.site, config=config)
    plain = agreeing(dataclasses.replace(subject.site, config=config, pinned=None))
    answer = plain.ask(plain.request())
    assert isinstance(answer, wire.PlainUpdate) and np.abs(answer.vector).max() > 0
    assert (answer.site, answer.round) == (3, 1)
    assert answer.layout_digest == subject.site.model.layout.digest


def test_metrics_are_charged_with_training(subject: Client) -> None:
    section = subject.site.config.metrics.model_copy(update={"enabled": True})
    config = subject.site.config.model_copy(update={"metrics": section})
    plan = make_plan(config)
    asked = dataclasses.replace(subject.site, config=config, plan=plan, plan_digest=plan_digest(plan))
    both = agreeing(asked)
    vector = both.vector(both.request())
    policy = policy_of(config, subject.site.model, plan.round(1))
    assert set(policy.codec.decode_sum(vector, 1).counts) == {"records", "correct", "loss"}
    assert both.site.ledger is not None
    (reservation,) = both.site.ledger.balance("records").reservations
    assert [e.steps for e in reservation.charge.events] == [plan.round(1).steps, 1]
    assert reservation.state is State.COMPLETED


def test_the_same_question_gets_the_same_answer_for_one_charge(subject: Client) -> None:
    first = subject.vector(subject.request())
    subject.forget()
    assert np.array_equal(first, subject.vector(subject.request()))
    assert subject.charges == 1


@pytest.mark.parametrize("change", ["vector", "round"])
def test_another_question_gets_other_noise_and_another_charge(subject: Client, change: str) -> None:
    """A server that asks twice must not be able to take the difference of two answers."""
    other = {"vector": moved(subject.site.model, 1), "round": 2}[change]
    first, second = subject.vector(subject.request()), subject.vector(subject.request(**{change: other}))
    assert np.mean(first == second) < 0.01 + 1 / len(first)
    assert subject.charges == 2


def test_with_fresh_noise_a_round_is_computed_and_charged_once(subject: Client) -> None:
    """Another answer to the same question would have other noise, so it would be a second charge."""
    fresh = dataclasses.replace(subject.site, repeatable_noise=False, noise_key=lambda _: fresh_key())
    deployed = Client(fresh)
    deployed.vector(deployed.request())
    deployed.forget()
    assert deployed.ask(deployed.request()) == wire.Refusal(3, StatusCode.REFUSED_REPEAT)
    assert deployed.charges == 1
    deployed.vector(deployed.request(round=2))
    assert deployed.charges == 2


def test_what_was_reserved_and_never_computed_is_used_or_given_back(subject: Client) -> None:
    fresh = dataclasses.replace(subject.site, repeatable_noise=False, noise_key=lambda _: fresh_key())
    deployed = Client(fresh)
    ledger = deployed.site.ledger
    assert ledger is not None
    cut = ledger.reserve(
        Charge(deployed.site.scope, "run", 1, "00" * 32, "m", "p", deployed.site.plan.round(1).events),
        once=True,
    )
    again = ledger.reserve(cut.charge, once=True)
    assert again.id == cut.id
    deployed.vector(deployed.request())  # on other terms: the adapter is another
    assert ledger.reservation(cut.id).state is State.CANCELLED
    assert deployed.charges == 1


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


@pytest.mark.parametrize("where", ["start", "train", "keep"])
@pytest.mark.parametrize("kind", [ProtocolError, ConfigError, LedgerStorageError, WitnessError])
def test_what_fails_after_the_charge_is_no_refusal(
    subject: Client, kind: type[ConfideError], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as an update that is not finite: to the server a refusal is a round without a charge."""

    def fail(*_: object, **__: object) -> None:
        raise kind("it went wrong")

    assert subject.site.ledger is not None
    match where:
        case "start":  # the entry may be written, and its witness not
            monkeypatch.setattr(subject.site.ledger, "start", fail)
        case "train":
            monkeypatch.setattr(client.app, "train", fail)
        case _:
            monkeypatch.setattr(client.app.exchanges, "keep", fail)
    assert subject.ask(subject.request()) == wire.Refusal(3, StatusCode.FAILED_INTERNAL)
    assert subject.charges == 1
    assert "after the charge: " in subject.log and "it went wrong" in subject.log


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
        wire.Ready(3, 1),
        wire.PlainUpdate(3, 1, "0", np.ones(2, "f4")),
    ],
    ids=["hello", "refusal", "ready", "update"],
)
@pytest.mark.usefixtures("no_training")
def test_only_a_train_request_trains(subject: Client, message: wire.Message) -> None:
    assert subject.ask(message) == wire.Refusal(3, StatusCode.REFUSED_PROTOCOL)


@pytest.mark.parametrize("kind", ["train", "query.hello"])
@pytest.mark.usefixtures("no_training")
def test_a_message_that_does_not_decode_is_refused(subject: Client, kind: str) -> None:
    for content in (RecordDict(), RecordDict({"confide": ConfigRecord({"kind": "train"})})):
        answer, _ = wire.decode_reply(subject.send(content, kind))
        assert answer == wire.Refusal(3, StatusCode.REFUSED_PROTOCOL)


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

    for step in ("reserve", "start"):
        with monkeypatch.context() as patch:
            patch.setattr(Ledger, step, full)
            assert subject.ask(subject.request()) == wire.Refusal(3, StatusCode.FAILED_INTERNAL)


def test_a_spent_budget_refuses(subject: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(1, 50):
        answer = subject.ask(subject.request(vector=moved(subject.site.model, seed)))
        if isinstance(answer, wire.Refusal):
            break
    assert answer == wire.Refusal(3, StatusCode.REFUSED_BUDGET)
    # The plan has two rounds, so two answers fit, whatever the server calls them.
    assert subject.charges == 2
    assert subject.site.ledger is not None
    assert subject.site.ledger.balance("records").epsilon_rdp <= subject.site.plan.target_epsilon


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
    assert wire.decode_reply(content)[0] == wire.Refusal(3, code)
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
    subject.vector(subject.request())
    subject.forget()
    fewer = dataclasses.replace(subject.site, shard=Shard(subject.site.shard.examples, np.arange(49)))
    Client(fewer).vector(subject.request())
    assert subject.charges == 2


def test_a_study_without_privacy_is_charged_nothing(subject: Client) -> None:
    plan = subject.site.plan
    rounds = tuple(dataclasses.replace(r, event=None) for r in plan.rounds)
    open_plan = dataclasses.replace(plan, rounds=rounds, private=False)
    with pytest.raises(PrivacyError, match="without a ledger"):
        dataclasses.replace(subject.site, ledger=None)
    with pytest.raises(PrivacyError, match="without a ledger"):
        dataclasses.replace(subject.site, plan=open_plan)
    privacy = subject.site.config.privacy.model_copy(update={"insecure_disabled": True})
    config = subject.site.config.model_copy(update={"privacy": privacy})
    study = agreeing(dataclasses.replace(subject.site, config=config, plan=open_plan, ledger=None))
    study.vector(study.request())
    assert subject.charges == 0


def test_a_site_s_log_stays_small(subject: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.site, "LARGEST_LOG", 200)
    for number in range(100):
        subject.site.log(f"entry {number} of many")
    folder = subject.site.folder
    older, newer = ((folder / name).read_text("utf-8") for name in ("site.log.1", "site.log"))
    lines = (older + newer).splitlines()
    assert lines == [f"entry {number} of many" for number in range(100 - len(lines), 100)]
    assert len(lines) > 10 and max(len(older), len(newer)) < 300
    assert sorted(p.name for p in folder.glob("site.log*")) == ["site.log", "site.log.1"]
