"""The mechanism audit: faults planted from outside are found, and an honest mechanism passes."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from common.errors import ConfigError, PrivacyError
from common.noise import NoiseStream
from common.plan import make_plan
from common.privacy import SampledGaussianEvent, epsilon_rdp
from simulations import audit_cli, canary_bench
from simulations.canaries import FALSE_ALARMS, MechanismAudit, alpha_of, audit_mechanism
from simulations.canary_bench import (
    Claim,
    bench,
    calibrated,
    claims_of,
    default_claims,
    plan_of,
    run_claim,
)
from tests.conftest import tiny_config
from tests.simulations.planted_faults import FAULTS, MORE_FAULTS, scaled_noise

Patch = pytest.MonkeyPatch


def audit(seed: int, claims: Sequence[Claim] | None = None) -> MechanismAudit:
    return audit_mechanism(claims or default_claims(), np.random.default_rng(seed))


def failed(found: MechanismAudit) -> Counter[str]:
    return Counter(check.name for check in found.checks if not check.passed)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(monkeypatch: Patch, fault: str) -> None:
    """With one of the two claims, which is quicker; with both, and with ten seeds, in the slow suite."""
    plant, check = FAULTS[fault]
    plant(monkeypatch)
    found = audit(1, default_claims()[:1])
    assert not found.passed
    assert check in failed(found)


@pytest.mark.slow
@pytest.mark.parametrize("fault", MORE_FAULTS)
def test_another_planted_fault_is_found(monkeypatch: Patch, fault: str) -> None:
    plant, check = MORE_FAULTS[fault]
    plant(monkeypatch)
    assert check in failed(audit(1))


@pytest.mark.slow
@pytest.mark.parametrize("fault", {**FAULTS, **MORE_FAULTS})
def test_no_fault_is_found_by_luck(monkeypatch: Patch, fault: str) -> None:
    {**FAULTS, **MORE_FAULTS}[fault][0](monkeypatch)
    assert [seed for seed in range(5) if audit(seed).passed] == []


@pytest.mark.parametrize("seed", [0, 1])
def test_an_honest_mechanism_passes(seed: int) -> None:
    found = audit(seed)
    assert failed(found) == Counter()
    assert found.passed
    assert found.lower_bound <= found.claimed_epsilon == 1.0
    moments = [c.level for c in found.checks if c.level is not None and not c.at_most]
    assert len(moments) == 2 * 6 + 6
    assert sum(moments) == pytest.approx(0.008)
    assert FALSE_ALARMS == 0.01


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_false_alarms_in_200_honest_audits() -> None:
    """At a true rate of 1%, more than 6 of 200 are seen once in 200 times."""
    alarms = {seed: failed(found) for seed in range(1000, 1200) if not (found := audit(seed)).passed}
    print(f"{len(alarms)} false alarms in 200 honest audits: {alarms}")
    assert len(alarms) <= 6


# The bench.


def test_a_record_moves_its_own_number_and_no_other() -> None:
    world, plan = bench(), plan_of(1.0, 1e-6, 1)
    records = np.concatenate([[0, 63, 64, 4095], np.arange(100, 100 + canary_bench.OTHERS)])
    update = world.train(plan, records, world.start(), NoiseStream(bytes(32)))
    along, across = world.read(plan, update)
    expected = np.zeros(canary_bench.CELLS)
    expected[records] = 1.0
    assert np.abs(along - expected).max() < 1e-3
    assert np.abs(across).max() < 1e-3


def test_a_record_that_overflows_is_one_without_a_gradient() -> None:
    world, plan = bench(), plan_of(1.0, 1e-6, 1)
    records = np.append(np.arange(canary_bench.OTHERS), canary_bench.OVERFLOW)
    update = world.train(plan, records, world.start(), NoiseStream(bytes(32)))
    along, _ = world.read(plan, update)
    assert np.flatnonzero(np.abs(along) > 0.5).tolist() == list(range(canary_bench.OTHERS))


def test_sites_that_hold_less_than_a_batch_are_refused_here_too() -> None:
    world, plan = bench(), plan_of(1.0, 1.0, 1)
    with pytest.raises(PrivacyError, match="at least one batch"):
        world.train(plan, np.arange(5), world.start(), NoiseStream(bytes(32)))


def test_lower_bounds_have_their_share_of_false_alarms() -> None:
    below_one = calibrated(0.5, 1e-5, 1.0, 1, 1)
    assert alpha_of(below_one, 2) * 4 == pytest.approx(0.002)
    assert alpha_of(default_claims()[0], 2) == 0.05


def test_one_seed_is_one_audit() -> None:
    claims = (calibrated(1.0, 1e-5, 1.0, 2, 1),)
    world = bench()
    readings = [run_claim(world, claims[0], 60, np.random.default_rng(seed)) for seed in (5, 5, 6)]
    assert np.array_equal(readings[0].own, readings[1].own)
    assert not np.array_equal(readings[0].own, readings[2].own)


@pytest.mark.parametrize("canaries", [0, 39, 4096])
def test_too_few_or_too_many_canaries_are_refused(canaries: int) -> None:
    with pytest.raises(ConfigError, match="canaries must lie between 40 and 4006"):
        audit_mechanism(default_claims(), np.random.default_rng(0), canaries=canaries)


def test_a_claim_must_make_sense() -> None:
    with pytest.raises(PrivacyError, match="sample_rate"):
        Claim("x", 1.5, 1.0, 4, 1, 1.0, 1e-5)
    with pytest.raises(ConfigError, match="local_steps"):
        Claim("x", 1.0, 1.0, 4, 5, 1.0, 1e-5)
    with pytest.raises(ConfigError, match="epsilon > 0"):
        Claim("x", 1.0, 1.0, 4, 1, 0.0, 1e-5)
    assert Claim("x", 1.0, 1.0, 7, 3, 1.0, 1e-5).rounds == (3, 3, 1)


def test_a_plan_is_one_claim_for_each_setting(bert_folder: Path, data_file: Path) -> None:
    config = tiny_config(
        bert_folder,
        data_file,
        model={"name": str(bert_folder), "head": "mean"},
        privacy={"sample_rate": 0.25, "noise_multiplier": 1.5, "nominal_records": 40, "delta": 1e-3},
        warmup={"rounds": 2, "local_steps": 3, "noise_multiplier": 4.0},
    )
    warmup, training_ = claims_of(make_plan(config))
    assert (warmup.sample_rate, warmup.noise_multiplier, warmup.steps, warmup.local_steps) == (1.0, 4.0, 6, 3)
    assert (training_.sample_rate, training_.noise_multiplier, training_.steps) == (0.25, 1.5, 4)
    event = SampledGaussianEvent(0.25, 1.5, 4, 1.0, 1)
    assert training_.epsilon == epsilon_rdp([event], 1e-3)


# The command.


def mechanism(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(audit_cli.app, ["mechanism", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code
    return result.stdout


SMALL = ("--set", "sample_rate=1.0", "--set", "steps=2", "--set", "canaries=60", "--seed", "1")


def test_the_command_prints_writes_and_exits(tmp_path: Path, monkeypatch: Patch) -> None:
    page = tmp_path / "audit.html"
    found = json.loads(mechanism(*SMALL, "--json", "--report", str(page)))
    assert found["passed"] is True
    assert found["seed"] == 1
    assert found["claims"][0]["sample_rate"] == 1.0
    html = page.read_text("utf-8")
    assert "The noise is there" in html
    assert "<script" not in html
    assert "http" not in html.replace("http-equiv", "")
    scaled_noise(0.1)(monkeypatch)
    shown = mechanism(*SMALL, "--report", str(page), code=5)
    assert "noise wherever no record reaches: as with" in " ".join(shown.split())
    html = page.read_text("utf-8")
    assert "not what it claims to be" in html
    assert html.count('role="alert"') >= 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--set", "sigma=1"], "--set expects KEY=VALUE"),
        (["--set", "steps=many"], "steps must be int"),
        (["--set", "steps=4"], "needs sample_rate and steps"),
        (["--set", "privacy.sample_rate=0.1"], "give it with --config"),
        (["--config", "nowhere.toml"], "no configuration at nowhere.toml"),
    ],
)
def test_the_command_refuses_what_it_does_not_understand(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mechanism(*arguments)


def test_the_command_audits_a_configuration(tmp_path: Path, bert_folder: Path, data_file: Path) -> None:
    path = tmp_path / "confide.toml"
    noise = {"sample_rate": 0.2, "nominal_records": 40, "delta": 1e-3, "noise_multiplier": 1.5}
    path.write_text(tiny_config(bert_folder, data_file, privacy=noise).to_toml(), "utf-8")
    found = json.loads(mechanism("--config", str(path), "--set", "run.rounds=1", "--seed", "1", "--json"))
    assert [claim["steps"] for claim in found["claims"]] == [2]
    assert found["claims"][0]["noise_multiplier"] == 1.5
    with pytest.raises(ConfigError, match="leave --set steps out"):
        mechanism("--config", str(path), "--set", "steps=3")


def test_the_command_is_part_of_confide() -> None:
    confide = importlib.import_module("confide")
    assert "mechanism" in CliRunner().invoke(confide.app, ["audit", "--help"]).stdout
