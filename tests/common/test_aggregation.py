"""What secure aggregation pins of a run: bounds that hold, policies that differ where they must."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from client.training import Shard, train
from common.adapter import write_vector
from common.aggregation import cohort_size, context_of, largest_change, policy_of
from common.config import LocalOptimizer, RingBits, RunConfig
from common.errors import ConfigError
from common.features import FeatureCache
from common.noise import NoiseStream
from common.plan import RoundPlan, make_plan, resolve
from tests.conftest import LABELS, World, moved


def resolved(this: World, **sections: dict[str, Any]) -> RunConfig:
    update = {
        name: getattr(this.config, name).model_copy(update=changes) for name, changes in sections.items()
    }
    return resolve(this.config.model_copy(update=update), smallest_site=50, labels=LABELS, threads=1)


@pytest.mark.parametrize("optimizer", LocalOptimizer)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_no_honest_update_reaches_the_clip(
    world: Callable[..., World], optimizer: LocalOptimizer, momentum: float
) -> None:
    """Small noise, so that the signal is what could reach it: every record pulls the same way."""
    this = world("bert-mean")
    plan = make_plan(resolved(this)).round(1)
    assert plan.event is not None
    event = dataclasses.replace(plan.event, noise_multiplier=0.2)
    plan = dataclasses.replace(plan, optimizer=optimizer, momentum=momentum, event=event, steps=4)
    bound = largest_change(plan, RingBits.B32)
    for seed in range(3):
        start = moved(this.model, seed)
        write_vector(this.model.parameters, this.model.layout, start)
        shard = Shard(this.examples, np.arange(50))
        noise = NoiseStream(bytes([seed] * 32))
        update = train(this.model, shard, plan, start, noise, FeatureCache())
        assert 0 < np.abs(update).max() < bound


def test_the_bound_grows_with_what_it_bounds(world: Callable[..., World]) -> None:
    plan = make_plan(resolved(world("bert-mean"))).round(1)
    assert plan.event is not None
    louder = dataclasses.replace(plan.event, noise_multiplier=plan.event.noise_multiplier * 2)
    changes: list[dict[str, Any]] = [
        {"learning_rate": plan.learning_rate * 2},
        {"steps": plan.steps + 1},
        {"momentum": 0.9, "steps": 3},
        {"event": louder},
    ]
    for change in changes:
        less = dataclasses.replace(plan, steps=3) if "momentum" in change else plan
        assert largest_change(dataclasses.replace(plan, **change), RingBits.B32) > largest_change(
            less, RingBits.B32
        )


def test_without_clipping_sixteen_bits_want_a_bound(world: Callable[..., World]) -> None:
    this = world("bert-mean")
    unclipped = dataclasses.replace(make_plan(resolved(this)).round(1), event=None)
    assert largest_change(unclipped, RingBits.B32) > 1
    with pytest.raises(ConfigError, match=r"aggregation\.clip"):
        largest_change(unclipped, RingBits.B16)
    given = resolved(this, aggregation={"ring_bits": RingBits.B16, "clip": 2.0})
    assert policy_of(given, this.model, unclipped).codec.tensors[0].clip == 2.0


def test_policies_differ_where_sums_must_not_mix(world: Callable[..., World]) -> None:
    this = world("bert-mean")
    config = resolved(this)
    plan = make_plan(config).round(1)
    assert plan.event is not None
    other: list[tuple[RunConfig, RoundPlan]] = [
        (resolved(this, aggregation={"ring_bits": RingBits.B16}), plan),
        (resolved(this, aggregation={"min_cohort": 4}, sites={"count": 5}), plan),
        (resolved(this, aggregation={"clip": 9.0}), plan),
        (resolved(this, sites={"count": 5}), plan),
        (config, dataclasses.replace(plan, event=dataclasses.replace(plan.event, noise_multiplier=9.0))),
        (config, dataclasses.replace(plan, learning_rate=plan.learning_rate * 2)),
    ]
    hashes = {policy_of(changed, this.model, round_plan).hash for changed, round_plan in other}
    assert len(hashes) == len(other)
    assert policy_of(config, this.model, plan).hash not in hashes


def test_the_context_binds_adapter_plan_layout_and_round() -> None:
    adapter = np.ones(3, dtype=np.float32)
    moved_one = adapter.copy()
    moved_one[2] = np.nextafter(np.float32(1), np.float32(2))
    contexts = {
        context_of("r", adapter, "p", "l", 1),
        context_of("r", moved_one, "p", "l", 1),
        context_of("r", adapter, "q", "l", 1),
        context_of("r", adapter, "p", "m", 1),
        context_of("r", adapter, "p", "l", 2),
        context_of("s", adapter, "p", "l", 1),
    }
    assert len(contexts) == 6
    assert context_of("r", adapter.copy(), "p", "l", 1) in contexts


@pytest.mark.parametrize(
    ("fraction", "live", "size"), [(1.0, 8, 8), (0.5, 8, 4), (0.1, 8, 3), (0.1, 2, 2), (1.0, 1000, 1000)]
)
def test_cohorts(world: Callable[..., World], fraction: float, live: int, size: int) -> None:
    config = resolved(world("bert-mean"), server={"fraction": fraction})
    assert cohort_size(config, live) == size
