"""From a configuration to rounds and their cost: every open value filled in, never over the target."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.config import AdapterMethod, LocalOptimizer, RunConfig, load_config
from common.errors import ConfigError, PrivacyError
from common.models import Part
from common.plan import Plan, make_plan, plan_digest, resolve
from common.privacy import SampledGaussianEvent, epsilon_rdp
from tests.conftest import LABELS, tiny_config

WARM = {"model": {"head": "mean"}, "warmup": {"rounds": 2, "local_steps": 3, "target_epsilon": 1.5}}
OPEN = {"delta": None, "nominal_records": None}


def config(privacy: dict[str, Any] | None = None, **sections: dict[str, Any]) -> RunConfig:
    return tiny_config(Path("m"), Path("d.csv"), privacy={**OPEN, **(privacy or {})}, **sections)


def resolved(smallest: int = 480, **sections: dict[str, Any]) -> RunConfig:
    return resolve(config(**sections), smallest_site=smallest, labels=LABELS, threads=3)


def plan(smallest: int = 480, **sections: dict[str, Any]) -> Plan:
    return make_plan(resolved(smallest, **sections))


def test_every_open_value_is_filled_in() -> None:
    done = resolved(487)
    assert done.privacy.nominal_records == 480  # published, so two digits
    assert done.privacy.delta == 1e-5
    assert done.privacy.noise_multiplier is not None
    assert (done.task.labels, done.run.threads) == (LABELS, 3)


@pytest.mark.parametrize(
    ("smallest", "nominal"), [(7, 7), (99, 99), (100, 100), (119, 110), (12_752, 12_000)]
)
def test_the_published_size_has_two_digits_and_never_exceeds_the_real_one(
    smallest: int, nominal: int
) -> None:
    done = resolved(smallest, privacy={"sample_rate": 0.5, "noise_multiplier": 30.0})
    assert done.privacy.nominal_records == nominal


@pytest.mark.parametrize("sections", [{}, WARM], ids=["plain", "warm-up"])
def test_resolving_again_changes_nothing(sections: dict[str, Any], tmp_path: Path) -> None:
    once = resolved(480, **sections)
    assert resolve(once, smallest_site=480, labels=LABELS, threads=3) == once
    # Nor does the way through a file: the plan of server, site and auditor is one.
    path = tmp_path / "c.toml"
    path.write_text(once.to_toml())
    stored = load_config(path)
    assert plan_digest(make_plan(stored)) == plan_digest(make_plan(once))


@pytest.mark.parametrize("target", [0.5, 3.0, 8.0])
@pytest.mark.parametrize("sections", [{}, WARM], ids=["plain", "warm-up"])
def test_the_plan_spends_the_target_and_not_more(target: float, sections: dict[str, Any]) -> None:
    if sections:
        sections = {**sections, "warmup": {**sections["warmup"], "target_epsilon": 0.6 * target}}
    made = plan(privacy={"target_epsilon": target}, **sections)
    assert made.epsilon_rdp is not None and made.epsilon_pld is not None
    assert 0.99 * target < made.epsilon_rdp <= target
    assert made.epsilon_pld <= made.epsilon_rdp
    # One event a round, one step a local step.
    assert len(made.events) == len(made.rounds)
    assert sum(e.steps for e in made.events) == sum(r.steps for r in made.rounds)


def test_rounds_of_a_plan() -> None:
    made = plan(
        training={
            "local_steps": 5,
            "learning_rate": 0.7,
            "momentum": 0.3,
            "fedprox_mu": 0.1,
            "micro_batch": 9,
        },
        privacy={"sample_rate": 0.1, "max_grad_norm": 0.25, "noise_multiplier": 3.0},
        run={"rounds": 4},
    )
    assert len(made.rounds) == 4
    one = made.round(1)
    assert one.event == SampledGaussianEvent(0.1, 3.0, 5, 0.25, 48)
    assert (one.steps, one.sample_rate, one.batch_size) == (5, 0.1, 48)
    assert (one.learning_rate, one.momentum, one.fedprox_mu, one.micro_batch) == (0.7, 0.3, 0.1, 9)
    assert (one.part, one.optimizer) == (Part.ALL, LocalOptimizer.SGD)


@pytest.mark.parametrize("number", [0, -1, 3])
def test_a_round_outside_the_plan(number: int) -> None:
    made = plan()
    assert made.round(1) is made.rounds[0] and made.round(2) is made.rounds[1]
    with pytest.raises(ConfigError, match="between 1 and 2"):
        made.round(number)


def test_a_warm_up_comes_first_and_trains_the_head_only() -> None:
    made = plan(**WARM, run={"rounds": 3}, privacy={"sample_rate": 0.1})
    assert [r.part for r in made.rounds] == [Part.HEAD] * 2 + [Part.ALL] * 3
    probe, tune = made.round(1), made.round(3)
    assert probe.event is not None and tune.event is not None
    assert (probe.sample_rate, probe.batch_size, probe.steps) == (1.0, 480, 3)
    assert probe.event.noise_multiplier != tune.event.noise_multiplier
    assert epsilon_rdp(made.events[:2], made.delta) <= 1.5


def test_rolora_takes_turns_and_begins_with_b() -> None:
    made = plan(
        adapter={"method": AdapterMethod.ROLORA.value},
        run={"rounds": 4},
        privacy={"noise_multiplier": 3.0},
    )
    assert [r.part for r in made.rounds] == [Part.B_AND_HEAD, Part.A_AND_HEAD] * 2


def test_the_normaliser_is_a_function_of_public_numbers_only() -> None:
    """Two sites of unlike sizes, and a site before and after one record, have one plan."""
    shared = {"privacy": {"nominal_records": 400, "delta": 1e-5, "noise_multiplier": 3.0}}
    assert (
        plan_digest(plan(401, **shared))
        == plan_digest(plan(400, **shared))
        == plan_digest(plan(999, **shared))
    )


def test_without_privacy_there_is_nothing_to_spend() -> None:
    made = plan(privacy={"insecure_disabled": True})
    assert not made.private and made.events == ()
    assert made.epsilon_rdp is None and made.epsilon_pld is None
    assert all(r.event is None for r in made.rounds)


@pytest.mark.parametrize(
    ("smallest", "sections", "message"),
    [
        (300, {"privacy": {"nominal_records": 301}}, "smallest site holds 300"),
        (300, {"privacy": {"delta": 1 / 300}}, "below one over"),
        (300, {"privacy": {"sample_rate": 0.003}}, r"privacy\.sample_rate"),
        (300, {**WARM, "warmup": {**WARM["warmup"], "sample_rate": 0.003}}, r"warmup\.sample_rate"),
        (300, {"privacy": {"noise_multiplier": 0.3}}, "over privacy.target_epsilon"),
        (300, {"privacy": {"target_epsilon": 1e-9}}, "cannot be reached"),
    ],
    ids=["nominal", "delta", "rate", "warm-up rate", "too little noise", "target out of reach"],
)
def test_what_cannot_be_kept_is_refused(smallest: int, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(PrivacyError, match=message):
        resolved(smallest, **sections)


def test_an_empty_site_is_refused() -> None:
    with pytest.raises(PrivacyError):
        resolved(0)


@pytest.mark.parametrize("missing", ["nominal_records", "delta", "noise_multiplier"])
def test_an_unresolved_configuration_has_no_plan(missing: str) -> None:
    done = resolved()
    with pytest.raises(ConfigError, match="resolved configuration"):
        make_plan(done.model_copy(update={"privacy": done.privacy.model_copy(update={missing: None})}))


@pytest.mark.parametrize(
    "change",
    [
        {"training": {"learning_rate": 0.9}},
        {"training": {"local_steps": 3}},
        {"privacy": {"max_grad_norm": 0.6}},
        {"privacy": {"target_epsilon": 7.0}},
        {"privacy": {"insecure_disabled": True}},
        {"adapter": {"method": "rolora"}},
        {"run": {"rounds": 3}},
        {"privacy": {"noise_multiplier": 3.1}},
    ],
    ids=json.dumps,
)
def test_the_plan_s_digest_tells_plans_apart(change: dict[str, Any]) -> None:
    base: dict[str, dict[str, Any]] = {"privacy": {"noise_multiplier": 3.0}}
    changed = {**base, **change, "privacy": {**base["privacy"], **change.get("privacy", {})}}
    assert plan_digest(plan(**changed)) != plan_digest(plan(**base))
