"""Membership inference on runs whose answer is known: one that has learnt its records by heart, one that has
learnt nothing."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from typer.testing import CliRunner

from common.adapter import Vector, read_vector
from common.config import RunConfig
from common.errors import CheckpointError, ConfigError, DataError
from common.export import PrivacyClaim, export_adapter
from common.privacy import SampledGaussianEvent, epsilon_rdp
from common.tasks import collate
from server.record import RunFolder
from simulations import attack, audit_cli
from simulations.attack import attack_run, exported_adapter, judge, losses, max_tpr
from simulations.attack_report import attack_page
from simulations.fleet import Fleet, open_fleet
from tests.conftest import KINDS, LABELS, WORDS, World, moved, tiny_config

Worlds = Callable[..., World]


@pytest.fixture(scope="module")
def chance(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 records whose label is a coin, so that whoever knows it has seen the record."""
    path = tmp_path_factory.mktemp("chance") / "records.csv"
    rng = np.random.default_rng(0)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for _ in range(150):
            writer.writerow([" ".join(rng.choice(WORDS[:40], size=8)), LABELS[int(rng.integers(2))]])
    return path


def config_of(folder: Path, data: Path) -> RunConfig:
    return tiny_config(
        folder,
        data,
        model={"name": str(folder), "head": "mean", "max_length": 32},
        adapter={"rank": 8, "method": "lora", "target_modules": ["query", "value", "dense"]},
        sites={"count": 3, "holdout": 0.3},
        task={"labels": list(LABELS)},
        privacy={
            "sample_rate": 0.2,
            "nominal_records": 20,
            "delta": 1e-3,
            "noise_multiplier": 2.0,
            "insecure_disabled": True,
        },
    )


def finish(path: Path, config: RunConfig, learn: Callable[[Fleet], Vector], epsilon: float | None) -> Path:
    """A folder as a finished run leaves it, as far as an attack looks."""
    path.mkdir(parents=True)
    folder = RunFolder(path)
    folder.config.write_text(config.to_toml(), "utf-8")
    open_fleet.cache_clear()
    fleet = open_fleet(path.resolve())
    claim = PrivacyClaim(
        epsilon_rdp=epsilon,
        epsilon_pld=epsilon,
        delta=1e-3,
        secure_aggregation=False,
        read_from_data=(),
        repeatable_noise=False,
    )
    export_adapter(fleet.model, learn(fleet), config, claim, folder.adapter)
    summary = {"private": epsilon is not None, "epsilon_rdp_max": epsilon, "delta": 1e-3}
    folder.summary.write_text(json.dumps(summary), "utf-8")
    open_fleet.cache_clear()
    return path


def by_heart(fleet: Fleet) -> Vector:
    """Full batches, no clipping, no noise, until the labels are known."""
    model, records = fleet.model, np.concatenate(fleet.split.sites)
    batch = collate(fleet.examples, records, model.pad_id, model.device)
    optimizer = torch.optim.Adam(model.parameters.values(), lr=0.02)
    with model.training(model.parameters):
        for _ in range(120):
            optimizer.zero_grad()
            loss = model.task.record_losses(model.logits(batch.inputs), batch).mean()
            loss.backward()
            optimizer.step()
    return read_vector(model.parameters, model.layout)


def nothing(fleet: Fleet) -> Vector:
    """As with a lot of noise: a little away from the start, in a random direction."""
    start = read_vector(fleet.model.parameters, fleet.model.layout)
    return (start + np.random.default_rng(1).normal(0, 0.02, start.size)).astype(np.float32)


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory, bert_folder: Path, chance: Path) -> Path:
    path = tmp_path_factory.mktemp("runs") / "plain-1"
    return finish(path, config_of(bert_folder, chance), by_heart, None)


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory, bert_folder: Path, chance: Path) -> Path:
    path = tmp_path_factory.mktemp("runs") / "private-1"
    return finish(path, config_of(bert_folder, chance), nothing, 2.0)


def test_what_was_learnt_by_heart_is_found(learnt: Path) -> None:
    found = attack_run(learnt)
    by_loss, calibrated = found.attacks
    assert by_loss.low > 0.65
    assert by_loss.low <= by_loss.auc <= by_loss.high
    assert calibrated.low > 0.65
    assert found.loss[0] < found.loss[1]
    assert found.correct[0] > found.correct[1]
    assert found.control.low <= 0.5 <= found.control.high
    assert (found.private, found.epsilon) == (False, None)
    assert found.max_tpr(0.01) == 1.0


def test_what_was_not_learnt_is_not_found(private: Path) -> None:
    found = attack_run(private)
    for one in (*found.attacks, found.control):
        assert one.low <= 0.5 <= one.high
    assert found.epsilon == 2.0
    assert found.attacks[0].tpr[0.001] is None  # fewer than a thousand outsiders


def test_members_are_the_training_records_and_nobody_else(
    learnt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, list[int]]] = []
    real = losses

    def watch(model: Any, adapter: Any, examples: Any, indices: Any) -> Any:
        asked.append((examples, [int(i) for i in indices]))
        return real(model, adapter, examples, indices)

    monkeypatch.setattr(attack, "losses", watch)
    found = attack_run(learnt, site=2)
    fleet = open_fleet(learnt.resolve())
    members, held, public = asked[:3]
    assert members == (fleet.examples, [int(i) for i in fleet.split.sites[1]])
    assert held == (fleet.examples, [int(i) for i in fleet.split.held[1]])
    assert public == (fleet.public, list(range(len(fleet.public))))
    assert (found.members, found.held_out) == (len(members[1]), len(held[1]))
    assert found.outsiders == len(held[1]) + len(public[1])


def test_few_records_are_drawn_by_the_seed(learnt: Path) -> None:
    one, same, other = (attack_run(learnt, records=20, seed=seed) for seed in (1, 1, 2))
    assert (one.members, one.outsiders) == (20, 20)
    assert one.records == same.records != other.records
    assert one.attacks[0].auc == same.attacks[0].auc


def test_only_finished_runs_are_attacked(tmp_path: Path, bert_folder: Path, chance: Path) -> None:
    with pytest.raises(CheckpointError, match="not the folder of a run"):
        attack_run(tmp_path)
    (tmp_path / "config.toml").write_text(config_of(bert_folder, chance).to_toml(), "utf-8")
    with pytest.raises(CheckpointError, match="not finished"):
        attack_run(tmp_path)


def test_a_site_that_does_not_exist_is_refused(learnt: Path) -> None:
    with pytest.raises(ConfigError, match="between 1 and 3, found 4"):
        attack_run(learnt, site=4)


def test_a_damaged_adapter_is_refused(tmp_path: Path, bert_folder: Path, chance: Path) -> None:
    path = finish(tmp_path / "damaged", config_of(bert_folder, chance), nothing, None)
    (path / "adapter" / "head.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="does not fit the run's model"):
        attack_run(path)


@pytest.mark.parametrize("kind, method", [("bert-mean", "ffa"), *((kind, "lora") for kind in KINDS)])
def test_the_exported_adapter_and_its_losses_of_every_task(
    world: Worlds, tmp_path: Path, kind: str, method: str
) -> None:
    there = world(kind, method)
    model, wanted = there.model, moved(there.model, 3)
    claim = PrivacyClaim(
        epsilon_rdp=None,
        epsilon_pld=None,
        delta=1e-3,
        secure_aggregation=False,
        read_from_data=(),
        repeatable_noise=False,
    )
    folder = RunFolder(tmp_path)
    export_adapter(model, wanted, there.config, claim, folder.adapter)
    model_before = moved(model, 4)
    losses(model, model_before, there.examples, np.arange(3))
    assert np.array_equal(exported_adapter(model, folder), wanted)
    order = np.array([9, 2, 30])
    together, _ = losses(model, wanted, there.examples, order)
    one_by_one = [losses(model, wanted, there.examples, order[i : i + 1])[0][0] for i in range(3)]
    assert together == pytest.approx(one_by_one, rel=1e-4)


# The figures.


@pytest.mark.parametrize("ties", [False, True])
def test_figures_are_those_of_the_definitions(ties: bool) -> None:
    rng = np.random.default_rng(0)
    members, outsiders = rng.normal(0.4, 1, 700), rng.normal(0, 1, 1500)
    if ties:
        members, outsiders = np.round(members, 1), np.round(outsiders, 1)
    found = judge("loss", members, outsiders, np.random.default_rng(1))
    assert found.auc == pytest.approx(stats.mannwhitneyu(members, outsiders).statistic / (700 * 1500))
    assert found.low < found.auc < found.high
    assert found.high - found.low == pytest.approx(4 * 0.0132, rel=0.25)  # Hanley & McNeil 1982
    thresholds = np.concatenate([[np.inf], np.unique(np.concatenate([members, outsiders]))[::-1]])
    fpr = np.array([(outsiders >= t).mean() for t in thresholds])
    tpr = np.array([(members >= t).mean() for t in thresholds])
    for rate in (0.01, 0.001):
        assert found.tpr[rate] == pytest.approx(tpr[fpr <= rate].max())
    points = set(zip(fpr.round(9), tpr.round(9), strict=True))
    assert set(zip(found.fpr_curve.round(9), found.tpr_curve.round(9), strict=True)) <= points
    assert (found.fpr_curve[0], found.tpr_curve[0]) == (0, 0)
    assert (found.fpr_curve[-1], found.tpr_curve[-1]) == (1, 1)
    assert np.diff(found.fpr_curve).max() < 0.1


def test_scores_that_are_all_alike_tell_nothing() -> None:
    found = judge("loss", np.zeros(10), np.zeros(2000), np.random.default_rng(0))
    assert (found.auc, found.low, found.high) == (0.5, 0.5, 0.5)
    assert found.tpr == {0.01: 0.0, 0.001: 0.0}


@pytest.mark.parametrize("epsilon, delta", [(0.0, 0.0), (0.1, 0.0), (1.0, 1e-5), (8.0, 1e-5), (900.0, 0.1)])
def test_the_most_that_a_claim_allows(epsilon: float, delta: float) -> None:
    rates = np.linspace(0, 1, 101)
    allowed = np.array([max_tpr(float(rate), epsilon, delta) for rate in rates])
    assert np.all(np.diff(allowed) >= 0)
    assert np.all((allowed >= rates - 1e-12) & (allowed <= 1))
    assert allowed[0] == pytest.approx(min(1.0, delta))
    assert allowed[-1] == 1.0
    if epsilon == 0 and delta == 0:
        assert allowed == pytest.approx(rates)
    # Both inequalities of the definition, for the attack and for its opposite.
    if epsilon < 700:
        assert np.all(allowed <= math.exp(epsilon) * rates + delta + 1e-12)
        assert np.all(1 - rates <= math.exp(epsilon) * (1 - allowed) + delta + 1e-12)


def test_the_gaussian_mechanism_stays_below_what_its_claim_allows() -> None:
    """The best attack on one Gaussian query of (1, δ) privacy, exactly: TPR = Φ(Φ⁻¹(FPR) + 1/σ)."""
    for sigma in (0.8, 2.0, 5.0):
        epsilon = epsilon_rdp([SampledGaussianEvent(1.0, sigma, 1, 1.0, 1)], 1e-5)
        for rate in np.geomspace(1e-6, 1, 50):
            best = stats.norm.cdf(stats.norm.ppf(rate) + 1 / sigma)
            assert best <= max_tpr(float(rate), epsilon, 1e-5) + 1e-12


# The command and its page.


def command(*arguments: str | Path) -> str:
    result = CliRunner().invoke(audit_cli.app, ["attack", *map(str, arguments)])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_the_command_compares_two_runs(private: Path, learnt: Path) -> None:
    found = json.loads(command(private, "--against", learnt, "--json"))
    assert found["against"]["attacks"]["loss"]["auc"] > 0.65 > found["attacks"]["loss"]["auc"]
    assert found["max_tpr_at_fpr"]["0.01"] == pytest.approx(math.exp(2) * 0.01 + 1e-3)
    assert found["report"] == str(private / "audit-attack.html")
    page = (private / "audit-attack.html").read_text("utf-8")
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert "plain-1" in page
    assert "most that ε = 2.000 allows" in page
    assert "without privacy" in page


def test_the_command_prints_a_table(learnt: Path, tmp_path: Path) -> None:
    shown = command(learnt, "--report", tmp_path / "page.html")
    assert "plain-1" in shown
    assert "not that every attack does" in " ".join(shown.split())
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "claims no privacy" in page
    assert not (learnt / "audit-attack.html").exists()


def test_runs_on_other_records_are_not_compared(
    tmp_path: Path, private: Path, bert_folder: Path, chance: Path
) -> None:
    config = config_of(bert_folder, chance)
    other = config.model_copy(update={"run": config.run.model_copy(update={"seed": 9})})
    path = finish(tmp_path / "other", other, nothing, None)
    with pytest.raises(ConfigError, match="cannot be compared"):
        command(private, "--against", path)


def test_names_reach_the_page_as_text(private: Path) -> None:
    found = dataclasses.replace(attack_run(private), name="<b>x</b>", path=Path("<i>y</i>"), shifted=True)
    page = attack_page(found, found)
    assert "<b>x" not in page
    assert "<i>y" not in page
    assert "data.group" in page
    assert "no fair comparison" not in page
    worse = dataclasses.replace(found, correct=(0.5, found.correct[1] - 0.1))
    assert "no fair comparison" in attack_page(found, worse)


def test_a_loss_that_is_not_finite_is_refused(world: Worlds) -> None:
    there = world("bert-mean")
    vector = np.full(there.model.layout.size, 3e38, dtype=np.float32)
    with pytest.raises(DataError, match="not finite"):
        losses(there.model, vector, there.examples, np.arange(4))
