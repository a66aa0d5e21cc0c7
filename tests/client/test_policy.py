"""A site's own rules: every bound refuses, nothing is charged, nothing that the server sends widens one."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import client.app
from client.identity import SiteFolder, load_identity, load_local_key
from client.ledger import Ledger
from client.policy import (
    SMALLEST_COHORT,
    STRICT,
    SitePolicy,
    explained,
    open_policy,
    parse_policy,
)
from client.policy_check import Asked, check, model_digest, policy_of_run
from client.site import Pinned, Site
from client.store import FileStore
from client.training import Shard
from common import wire
from common.errors import ConfigError, PolicyRefusedError, StatusCode, status_of
from common.ledger import Charge, Policy
from common.ledger_checks import verify_export
from common.ledger_errors import RolledBackError
from common.plan import make_plan, plan_digest
from common.privacy import SampledGaussianEvent
from common.secagg import policy as secagg
from common.secagg.keys import Secret
from tests.client import test_app
from tests.client.test_app import Client
from tests.conftest import World, moved, tiny_config, tiny_model

subject = test_app.subject

DIGEST = "ab" * 32
STRICT_TEXT = STRICT.to_toml()


def changed(site: Site, **sections: dict[str, Any]) -> Site:
    """The site with other values in its configuration and plan, and the policy that allows just those."""
    config = site.config.model_copy(
        update={name: getattr(site.config, name).model_copy(update=keys) for name, keys in sections.items()}
    )
    plan = make_plan(config)
    policy = policy_of_run(config, plan, source=site.scope, model=site.model_digest)
    return dataclasses.replace(site, config=config, plan=plan, plan_digest=plan_digest(plan), policy=policy)


def tightened(policy: SitePolicy, key: str, value: object) -> SitePolicy:
    data: dict[str, Any] = policy.model_dump(mode="json")
    *path, last = key.split(".")
    at = data
    for part in path:
        at = at[part]
    at[last] = value
    return SitePolicy.model_validate(data)


def asked(site: Site, number: int = 1) -> Asked:
    scope = None if site.ledger is None else site.ledger.balance(site.scope).scope
    return Asked(site.config, site.plan, number, site.scope, scope, site.model_digest, site.bundle)


# The file


def test_the_default_allows_nothing_and_is_what_the_template_says() -> None:
    assert (
        parse_policy(STRICT_TEXT, "policy.toml") == STRICT == parse_policy("", "policy.toml") == SitePolicy()
    )
    assert STRICT.models.allowed == () and not STRICT.sources and not STRICT.code.bundles
    assert not STRICT.metrics.allowed and not any(dict(STRICT.study).values())


def test_what_is_written_reads_as_the_same(subject: Client) -> None:
    policy = tightened(
        subject.site.policy,
        "sources",
        {'a "b" [c]\n': {"target_epsilon": 2.5, "delta": 1e-7, "inherits": ["x", "ÿ"]}},
    )
    assert parse_policy(policy.to_toml(), "policy.toml") == policy


def test_every_key_is_explained_with_its_value_and_default() -> None:
    policy = tightened(STRICT, "sources", {"a": {"target_epsilon": 1.0, "delta": 1e-5}})
    found = {one.key: one for one in explained(policy)}
    names = [f"{s}.{k}" for s, keys in policy.model_dump(exclude={"sources"}).items() for k in keys]
    assert list(found) == [f"sources.a.{key}" for key in ("target_epsilon", "delta", "inherits")] + names
    assert all(one.says and one.stops.endswith(".") for one in found.values())
    assert (found["run.rounds"].value, found["run.rounds"].default) == (100, 100)
    assert found["sources.a.target_epsilon"].default is None


def test_the_smallest_cohort_is_that_of_secure_aggregation() -> None:
    assert SMALLEST_COHORT == secagg.SMALLEST_COHORT


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[trainig]\nsteps = 3", r"unknown key trainig; did you mean training\b"),
        ("[training]\nnoise = 3.0", r"unknown key training.noise; did you mean training.noise_multiplier\?"),
        ("[training]\nsteps = 2.5", r"training.steps: .*integer, found 2.5"),
        ("[training]\nsteps = true", r"training.steps"),
        ("[training]\nnoise_multiplier = '1'", r"training.noise_multiplier: .*number, found '1'"),
        ("[training]\nnoise_multiplier = nan", r"training.noise_multiplier"),
        ("[training]\nnoise_multiplier = 0", r"training.noise_multiplier: .*greater than 0"),
        ("[training]\nsample_rate = 1.5", r"training.sample_rate"),
        ("[aggregation]\nmin_cohort = 2", r"aggregation.min_cohort: .*3, found 2"),
        ("[aggregation]\nc_max = -1", r"aggregation.c_max"),
        ("[models]\nallowed = ['all-minilm']", r"models.allowed.0"),
        ("[models]\nallowed = 'all-minilm'", r"models.allowed"),
        ("[run]\ntasks = ['anything']", r"run.tasks.0: .*'causal-lm'"),
        ("[metrics]\nallowed = 1", r"metrics.allowed"),
        ("[sources.a]\ntarget_epsilon = 1.0", r"sources.a.delta is missing"),
        ("[sources.a]\ntarget_epsilon = inf\ndelta = 1e-5", r"sources.a.target_epsilon"),
        (
            "[sources.a]\ntarget_epsilon = 1.0\ndelta = 1e-5\ninherit = []",
            r"did you mean sources.a.inherits\?",
        ),
        ("sources = 3", r"sources"),
        ("[study]\nplain_updates = true", r"study.plain_updates must be false in policy.toml, found true"),
        ("[study]\ninsecure_no_privacy = true", r"study.insecure_no_privacy must be false"),
        ("[study]\nnoise_seed = true", r"study.noise_seed must be false"),
        ("[training", r"not valid TOML"),
    ],
)
def test_a_file_that_is_not_a_policy_is_refused_by_its_key(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_policy(text, "policy.toml")
    assert "policy.toml" in str(caught.value)


def test_only_a_simulation_says_yes_in_a_study() -> None:
    text = "[study]\nplain_updates = true\n"
    assert parse_policy(text, "policy.toml", simulated=True).study.plain_updates


# Bounds

WARMUP = {"warmup": {"rounds": 1, "local_steps": 2, "noise_multiplier": 4.0, "sample_rate": 1.0}}
METRICS = {
    "metrics": {"enabled": True, "by_label": True, "noise_multiplier": 16.0},
    "task": {"labels": ("a", "b")},
}

# key, a value that is one notch stricter than the run, what the run has besides
BOUNDS: list[tuple[str, object, dict[str, Any]]] = [
    ("sources", {}, {}),
    ("sources.records.target_epsilon", 7.9, {}),
    ("sources.records.target_epsilon", 8.1, {}),
    ("sources.records.delta", 1e-4, {}),
    ("sources.records.inherits", ["images"], {}),
    ("models.allowed", [DIGEST], {}),
    ("code.bundles", [DIGEST], {"bundle": "cd" * 32}),
    ("run.tasks", ["causal-lm"], {}),
    ("run.tasks", [], {}),
    ("run.rounds", 1, {}),
    ("run.max_grad_norm", 0.49, {}),
    ("training.noise_multiplier", 2.01, {"privacy": {"noise_multiplier": 2.0}}),
    ("training.sample_rate", 0.19, {}),
    ("training.steps", 1, {}),
    ("warmup.noise_multiplier", 4.01, WARMUP),
    ("warmup.sample_rate", 0.99, WARMUP),
    ("warmup.steps", 1, WARMUP),
    ("aggregation.min_cohort", 4, {}),
    ("aggregation.c_max", 1, {}),
    ("metrics.allowed", False, METRICS),
    ("metrics.by_label", False, METRICS),
    ("metrics.noise_multiplier", 16.01, METRICS),
    ("study.noise_seed", False, {"study": {"noise_seed": 7}}),
    ("study.plain_updates", False, {"study": {"plain_updates": True}}),
    ("study.insecure_no_privacy", False, {"privacy": {"insecure_disabled": True}}),
]


def run_with(site: Site, extra: dict[str, Any]) -> Site:
    sections = {name: keys for name, keys in extra.items() if name != "bundle"}
    if (study := sections.get("study")) and study.get("plain_updates"):
        site = dataclasses.replace(site, config=_plain(site), pinned=None)
    if sections.get("privacy", {}).get("insecure_disabled"):
        config = site.config.model_copy(
            update={"privacy": site.config.privacy.model_copy(update=sections["privacy"])}
        )
        site = dataclasses.replace(site, config=config, plan=make_plan(config), ledger=None)
    site = changed(site, **sections)
    if bundle := extra.get("bundle"):
        site = dataclasses.replace(
            site, bundle=bundle, policy=tightened(site.policy, "code.bundles", [bundle])
        )
    return site


def _plain(site: Site) -> Any:
    study = site.config.study.model_copy(update={"plain_updates": True})
    return site.config.model_copy(update={"study": study})


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """No record is looked at, and nothing is computed."""

    def never(*_: object) -> None:
        raise AssertionError("the policy comes before the data")

    for name in ("check_shard", "train", "measure"):
        monkeypatch.setattr(client.app, name, never)


@pytest.mark.parametrize(("key", "value", "extra"), BOUNDS, ids=[f"{k}={v}"[:60] for k, v, _ in BOUNDS])
@pytest.mark.usefixtures("untouched")
def test_each_bound_refuses_by_its_key_and_nothing_is_charged(
    subject: Client, key: str, value: object, extra: dict[str, Any]
) -> None:
    fair = run_with(subject.site, extra)
    check(fair.policy, asked(fair))  # what is allowed is exactly the run
    strict = Client(dataclasses.replace(fair, policy=tightened(fair.policy, key, value)))
    assert subject.site.ledger is not None
    before = subject.site.ledger.entries()
    assert strict.ask(strict.request()) == wire.Refusal(3, StatusCode.REFUSED_POLICY)
    assert f"{key} " in strict.log and "policy.toml" in strict.log and strict.log.count("\n") == 1
    assert strict.log.count("; ") == 0  # this key, and no other
    assert subject.site.ledger.entries() == before and subject.charges == 0


@pytest.mark.usefixtures("untouched")
def test_the_strict_default_refuses_every_run(subject: Client) -> None:
    strict = Client(dataclasses.replace(subject.site, policy=STRICT))
    assert strict.ask(strict.request()) == wire.Refusal(3, StatusCode.REFUSED_POLICY)
    assert strict.charges == 0
    # Whoever reads the log can copy what to add, if they agree to it.
    assert f'models.allowed lacks "{subject.site.model_digest}"' in strict.log
    assert "add a table [sources.records]" in strict.log


def test_a_policy_without_the_source_s_ledger_does_not_open_one(subject: Client) -> None:
    site = dataclasses.replace(
        subject.site, scope="others", policy=tightened(subject.site.policy, "sources", {"others": TERMS})
    )
    refused = Client(site)
    assert refused.ask(refused.request()) == wire.Refusal(3, StatusCode.REFUSED_PRIVACY)
    assert "opened before it is named" in refused.log


TERMS = {"target_epsilon": 8.0, "delta": 1e-3}


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.usefixtures("untouched")
def test_the_bounds_of_a_round_are_those_of_its_part(subject: Client, number: int) -> None:
    """A warm-up round is held to [warmup], the others to [training]: naming another round helps nobody."""
    site = changed(subject.site, **WARMUP)
    for key, refused in (("warmup.steps", [1]), ("training.steps", [2, 3])):
        policy = tightened(site.policy, key, 1)
        client_ = Client(dataclasses.replace(site, policy=policy))
        if number in refused:
            answer = client_.ask(client_.request(round=number))
            assert answer == wire.Refusal(3, StatusCode.REFUSED_POLICY)
        else:
            check(policy, asked(site, number))


@pytest.mark.usefixtures("untouched")
def test_whatever_the_server_sends_it_gets_nothing_wider(subject: Client) -> None:
    """All that it can say, against a policy that the site's own configuration does not meet."""
    refused = Client(
        dataclasses.replace(subject.site, policy=tightened(subject.site.policy, "training.steps", 1))
    )
    wider = changed(subject.site, training={"local_steps": 50}, privacy={"noise_multiplier": 0.3})
    requests = [
        refused.request(round=number, vector=moved(subject.site.model, seed), **names)
        for number in (0, 1, 2, 3, 2**32 - 1)
        for seed in (0, 1)
        for names in (
            {},
            {"plan_digest": wider.plan_digest},
            {"run_id": "run'; training.steps = 50"},
            {"layout_digest": DIGEST},
        )
    ]
    for request in requests:
        answer = refused.ask(request)
        assert isinstance(answer, wire.Refusal)
    assert refused.ask(refused.request()) == wire.Refusal(3, StatusCode.REFUSED_POLICY)
    assert refused.charges == 0


def test_a_refusal_is_a_code_of_its_own_and_its_text_stays(subject: Client) -> None:
    assert status_of(PolicyRefusedError("x")) is StatusCode.REFUSED_POLICY
    refused = Client(dataclasses.replace(subject.site, policy=STRICT))
    content = refused.send(wire.encode(refused.request()))
    assert "refused-policy" in dict(content.config_records["confide"]).values()
    assert subject.site.model_digest not in repr(content) and "models" not in repr(content)


def test_an_update_that_waits_is_not_uploaded_under_a_stricter_policy(subject: Client) -> None:
    subject.vector(subject.request())
    refused = Client(dataclasses.replace(subject.site, policy=STRICT))
    assert refused.ask(refused.request()) == wire.Refusal(3, StatusCode.REFUSED_POLICY)
    assert subject.ask(subject.request()) == wire.Ready(3, 1)
    assert subject.charges == 1


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.integers(1, 6),
    rate=st.sampled_from([0.05, 0.2, 0.5, 1.0]),
    noise=st.sampled_from([0.5, 1.0, 2.0, 5.0]),
    rounds=st.integers(1, 5),
    clip=st.sampled_from([0.1, 0.5, 1.0]),
    limits=st.tuples(
        st.integers(1, 6),
        st.sampled_from([0.05, 0.2, 0.5, 1.0]),
        st.sampled_from([0.5, 1.0, 2.0, 5.0]),
        st.integers(1, 5),
        st.sampled_from([0.1, 0.5, 1.0]),
    ),
)
def test_a_run_is_allowed_exactly_when_every_value_is_within_its_bound(
    subject: Client,
    steps: int,
    rate: float,
    noise: float,
    rounds: int,
    clip: float,
    limits: tuple[int, float, float, int, float],
) -> None:
    site = changed(
        subject.site,
        training={"local_steps": steps},
        privacy={"sample_rate": rate, "noise_multiplier": noise, "max_grad_norm": clip},
        run={"rounds": rounds},
    )
    names = (
        "training.steps",
        "training.sample_rate",
        "training.noise_multiplier",
        "run.rounds",
        "run.max_grad_norm",
    )
    policy = site.policy
    for name, limit in zip(names, limits, strict=True):
        policy = tightened(policy, name, limit)
    broken = {
        name
        for name, limit, found in zip(names, limits, (steps, rate, noise, rounds, clip), strict=True)
        if (found < limit if name.endswith("noise_multiplier") else found > limit)
    }
    if not broken:
        check(policy, asked(site))
        return
    with pytest.raises(PolicyRefusedError) as caught:
        check(policy, asked(site))
    assert {name for name in names if f"{name} " in str(caught.value)} == broken


def test_a_model_is_its_frozen_weights_and_the_shape_of_what_trains(
    bert_folder: Path, gpt2_folder: Path, data_file: Path, world: Callable[..., World]
) -> None:
    mean = {"model": {"name": str(bert_folder), "head": "mean", "max_length": 32}}
    first = model_digest(tiny_model(tiny_config(bert_folder, data_file, **mean)))
    other_start = model_digest(tiny_model(tiny_config(bert_folder, data_file, **mean, run={"seed": 5})))
    assert first == other_start  # not of the adapter's seeded start
    model = tiny_model(tiny_config(bert_folder, data_file, **mean))
    for parameter in model.parameters.values():
        parameter.data += 1.0
    assert model_digest(model) == first  # nor of what a round has put into it
    ranks = tiny_config(bert_folder, data_file, **mean, adapter={"rank": 3})
    assert model_digest(tiny_model(ranks)) != first
    frozen = next(
        p for name, p in model.module.named_parameters() if name.endswith("query.base_layer.weight")
    )
    frozen.data[0, 0] += 1e-3
    assert model_digest(model) != first
    classifier = {"model": {"name": str(gpt2_folder), "max_length": 32}}
    seeds = {
        model_digest(tiny_model(tiny_config(gpt2_folder, data_file, **classifier, run={"seed": seed})))
        for seed in (0, 1)
    }
    assert len(seeds) == 1


# In the ledger


def test_a_policy_is_in_the_ledger_before_it_is_used_and_each_change_is_an_entry(
    subject: Client, tmp_path: Path
) -> None:
    ledger, path = subject.site.ledger, tmp_path / "policy.toml"
    assert ledger is not None and subject.site.pinned is not None
    before = len(ledger.entries())
    assert open_policy(path, ledger) == STRICT  # no file: nothing is allowed
    assert [e.record for e in ledger.entries()[before:]] == [Policy.of(STRICT_TEXT)]
    path.write_text("# our rules, agreed on in May\r\n[run]\r\nrounds = 5\r\n")
    assert open_policy(path, ledger).run.rounds == open_policy(path, ledger).run.rounds == 5
    path.write_text(path.read_text() + "max_grad_norm = 0.7\n")
    open_policy(path, ledger)
    recorded = [e.record for e in ledger.entries()[before:]]
    assert len(recorded) == 3
    path.write_text("[run]\nround = 5\n")
    with pytest.raises(ConfigError, match=r"run.rounds"):
        open_policy(path, ledger)
    assert len(ledger.entries()) == before + 3
    # An auditor sees each text, byte for byte, in an export that verifies.
    data = ledger.export()
    verify_export(data, public=subject.site.pinned.identity.public, pld=False)
    texts = [json.loads(line)["body"]["text"] for line in data.splitlines() if b'"kind":"policy"' in line]
    assert texts == [record.text for record in recorded if isinstance(record, Policy)]
    assert "agreed on in May" in texts[1] and "max_grad_norm" in texts[2]


# One unit of ε is left, and a run asks for three


def charge(ledger: Ledger, event: SampledGaussianEvent, number: int) -> None:
    found = Charge("records", "an earlier run", number, "00", "model", "plan", (event,))
    ledger.start(ledger.reserve(found).id)


def reopened(site: Site, tmp_path: Path, run_id: str = "run") -> Site:
    """As a new process finds it: from the files alone."""
    folder = SiteFolder(site.folder)
    identity, local_key = load_identity(folder.identity, None), load_local_key(folder.local_key)
    assert site.ledger is not None and site.pinned is not None
    site.ledger.close()
    ledger = Ledger(folder.ledger, identity, 3, witness=tmp_path / "ledger.witness")
    store = FileStore(
        folder.path / "secagg.state",
        tmp_path / "witness",
        key=local_key,
        site=3,
        run=run_id.encode(),
        random_bytes=os.urandom,
    )
    pinned = Pinned(identity, site.pinned.roster, store, Secret(local_key.reveal()), os.urandom)
    return dataclasses.replace(site, ledger=ledger, pinned=pinned, run_id=run_id)


def test_a_site_with_one_left_refuses_a_run_worth_three_at_the_right_round_and_ever_after(
    subject: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.app, "train", lambda model, *_: np.zeros(model.layout.size, dtype=np.float32))
    site = changed(
        subject.site, run={"rounds": 12}, privacy={"noise_multiplier": 2.0}, training={"local_steps": 20}
    )
    ledger, (event, *_) = site.ledger, site.plan.events
    assert ledger is not None
    scope = ledger.balance("records").scope
    # Earlier runs leave just one: steps of another noise, as many as fit below target − 1.
    earlier = SampledGaussianEvent(0.2, 1.5, 1, 0.5, 8)
    number = 0
    while ledger.balance("records").epsilon_left > 1.0:
        charge(ledger, dataclasses.replace(earlier, steps=5), number := number + 1)
    left = ledger.balance("records").epsilon_left
    assert 0.5 < left <= 1.0
    # The oracle: Rényi divergences at the one order, added up by dp-accounting.
    each = _divergence(event, scope.order)
    assert 2.5 < 12 * each < 3.5
    fits = int(left / each)
    assert 0 < fits < 12
    running = Client(site)
    for number in range(1, fits + 1):
        assert running.ask(running.request(round=number)) == wire.Ready(3, number)
    refused = wire.Refusal(3, StatusCode.REFUSED_BUDGET)
    spent = ledger.entries()
    for number in range(fits + 1, 13):
        assert running.ask(running.request(round=number)) == refused
    assert "'records' from" in running.log and "nothing was computed" in running.log
    # After a restart, with a record edited or left out, and under the name of another run.
    again = reopened(site, tmp_path)
    records = site.shard.examples
    for shard in (site.shard, Shard(records, np.arange(49)), Shard(records, np.arange(1, 51))):
        one = Client(dataclasses.replace(again, shard=shard))
        assert one.ask(one.request(round=fits + 1)) == refused
    # After a reinstallation that keeps the site's keys and ledger and nothing else.
    for path in site.folder.iterdir():
        if path.name not in ("identity.pem", "local.key", "site.pub", "ledger.sqlite"):
            path.unlink()
    for witness in tmp_path.glob("witness*"):
        witness.unlink()
    other = reopened(again, tmp_path, run_id="another-run")
    one = Client(other)
    assert one.ask(one.request(run_id="another-run", round=1)) == refused
    assert other.ledger is not None and other.ledger.entries() == spent
    # Without its ledger it does not begin a new one.
    other.ledger.close()
    SiteFolder(site.folder).ledger.unlink()
    with pytest.raises(RolledBackError):
        reopened(other, tmp_path)


def _divergence(event: SampledGaussianEvent, order: float) -> float:
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(orders=[order])
    sampled = dp_accounting.PoissonSampledDpEvent(
        event.sample_rate, dp_accounting.GaussianDpEvent(event.noise_multiplier)
    )
    accountant.compose(dp_accounting.SelfComposedDpEvent(sampled, event.steps))
    return float(accountant._rdp[0])
