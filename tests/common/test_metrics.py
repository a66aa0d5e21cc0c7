"""Metrics of sites' own records: bounded per record, noised as charged, summed exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.metrics import measure
from client.training import Shard
from common.config import RunConfig, parse_config
from common.evaluation import evaluate
from common.features import FeatureCache
from common.metrics import counts_of, read_counts, site_counts
from common.noise import NoiseStream
from common.plan import RoundPlan, make_plan, resolve
from tests.conftest import World, moved


def settings(**metrics: Any) -> tuple[RunConfig, RoundPlan]:
    keys: dict[str, Any] = {
        "model": {"name": "x", "head": "mean"},
        "data": {"sample": "rotten-tomatoes"},
        "privacy": {"nominal_records": 100, "delta": 1e-3, "sample_rate": 0.5},
        "metrics": {"enabled": True, **metrics},
    }
    config = resolve(parse_config(keys, source="a test"), smallest_site=100, labels=("no", "yes"), threads=1)
    return config, make_plan(config).round(1)


@pytest.mark.parametrize("by_label", [False, True])
@hypothesis.settings(deadline=None)  # the first example calibrates noise
@given(
    loss=st.floats(allow_nan=True, allow_infinity=True),
    correct=st.floats(-5, 5),
    label=st.integers(0, 1),
)
def test_one_record_moves_the_sums_by_at_most_one(
    by_label: bool, loss: float, correct: float, label: int
) -> None:
    config, plan = settings(by_label=by_label)
    size = len(counts_of(config, plan))
    quiet = np.zeros(size)

    def counts(losses: list[float], right: list[float], target: list[int]) -> np.ndarray:
        values = site_counts(
            config, plan, np.array(losses), np.array(right), np.array(target, dtype=np.int64), quiet
        )
        return np.array(list(values.values())) / 64

    without, with_it = counts([1.0], [1.0], [1]), counts([1.0, loss], [1.0, correct], [1, label])
    rounding = np.sqrt(size) / 64
    assert np.linalg.norm(with_it - without) <= 1 + rounding


def test_the_mechanism_is_the_one_that_is_charged() -> None:
    config, plan = settings(noise_multiplier=7.0, sample_rate=0.25)
    event = plan.metrics
    assert event is not None
    assert (event.noise_multiplier, event.sample_rate, event.steps, event.max_grad_norm) == (
        7.0,
        0.25,
        1,
        1.0,
    )
    assert event in plan.events
    off, silent = settings(enabled=False)
    assert silent.metrics is None and counts_of(off, silent) == ()
    # What metrics cost, training does not have: its own noise has to grow.
    assert config.privacy.noise_multiplier > off.privacy.noise_multiplier  # type: ignore[operator]
    assert make_plan(config).epsilon_rdp <= config.privacy.target_epsilon  # type: ignore[operator]


def test_noise_has_the_spread_that_is_charged(world: Callable[..., World]) -> None:
    this = world("bert-mean")
    config, plan = settings(noise_multiplier=20.0)
    shard, adapter = Shard(this.examples, np.arange(60)), moved(this.model)
    found = [
        list(
            measure(
                this.model, config, plan, shard, adapter, NoiseStream(bytes([k] * 32)), FeatureCache()
            ).values()
        )
        for k in range(60)
    ]
    spread = np.std(np.array(found) / 64, axis=0)
    # χ² with 59 degrees of freedom: within 0.68 and 1.36 of σ but for a chance of 1e-4
    assert np.all((spread > 0.68 * 20) & (spread < 1.36 * 20))


@pytest.mark.parametrize("by_label", [False, True])
def test_sums_read_back_as_the_truth_without_noise(world: Callable[..., World], by_label: bool) -> None:
    this = world("bert-mean")
    config, plan = settings(by_label=by_label, loss_clip=50.0)
    assert plan.metrics is not None
    plan = dataclasses.replace(plan, metrics=dataclasses.replace(plan.metrics, noise_multiplier=1e-9))
    adapter = moved(this.model)
    shards = [Shard(this.examples, np.arange(start, start + 40)) for start in (0, 40, 80)]
    total: dict[str, int] = {}
    for shard in shards:
        counts = measure(this.model, config, plan, shard, adapter, NoiseStream(bytes(32)), FeatureCache())
        for name, value in counts.items():
            total[name] = total.get(name, 0) + value
    read = read_counts(config, plan, total)
    truth = evaluate(this.model, adapter, this.examples, np.arange(120))
    assert read is not None
    assert read.records == pytest.approx(120, abs=0.2)
    assert read.accuracy == pytest.approx(truth.accuracy, abs=0.01)
    assert read.loss == pytest.approx(truth.mean_loss, rel=0.02)
    assert set(read.by_label) == (set(config.task.labels) if by_label else set())


def test_where_noise_wins_nothing_is_made_up() -> None:
    config, plan = settings()
    read = read_counts(config, plan, {"records": -40, "correct": 5, "loss": 9})
    assert read is not None and read.accuracy is None and read.loss is None
