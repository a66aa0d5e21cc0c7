"""Server optimizers against a slow oracle, number by number, and the one accumulator."""

from __future__ import annotations

import math

import numpy as np
import pytest

from common.config import ServerOptimizer, ServerSection
from common.errors import ProtocolError, RoundError
from server.aggregation import OptimizerState, PlainSum, step


def oracle(
    optimizer: ServerOptimizer, adapter: list[float], updates: list[list[float]], c: ServerSection
) -> list[float]:
    """The papers' recursions for plain floats: Reddi et al. 2021, Algorithm 2; Hsu et al. 2019."""
    after = []
    for i, x in enumerate(adapter):
        m = v = 0.0
        for update in updates:
            d = update[i]
            if optimizer is ServerOptimizer.FEDAVG:
                x += c.learning_rate * d
            elif optimizer is ServerOptimizer.FEDAVGM:
                m = c.momentum * m + d
                x += c.learning_rate * m
            else:
                m = c.momentum * m + (1 - c.momentum) * d
                if optimizer is ServerOptimizer.FEDADAM:
                    v = c.beta2 * v + (1 - c.beta2) * d * d
                else:
                    sign = (v > d * d) - (v < d * d)
                    v = v - (1 - c.beta2) * d * d * sign
                x += c.learning_rate * m / (math.sqrt(v) + c.tau)
            x = float(np.float32(x))
        after.append(x)
    return after


@pytest.mark.parametrize("optimizer", ServerOptimizer)
def test_each_optimizer_is_its_paper_s(optimizer: ServerOptimizer) -> None:
    rng = np.random.default_rng(0)
    config = ServerSection(optimizer=optimizer, learning_rate=0.3, momentum=0.8, beta2=0.9, tau=0.01)
    adapter = rng.normal(size=6).astype(np.float32)
    # Large steps, then small ones: only Yogi's second moment tells them apart by sign.
    updates = [rng.normal(size=6) * scale for scale in (1, 2, 0.01, 0.01, 1)]
    now, state = adapter, OptimizerState.zero(6)
    for update in updates:
        now, state = step(now, update, np.arange(6), state, config)
    expected = oracle(optimizer, adapter.tolist(), [u.tolist() for u in updates], config)
    assert now.dtype == np.float32
    assert np.allclose(now, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", ServerOptimizer)
def test_numbers_that_did_not_travel_stay(optimizer: ServerOptimizer) -> None:
    config = ServerSection(optimizer=optimizer)
    adapter = np.arange(6, dtype=np.float32)
    positions = np.array([1, 4])
    busy = OptimizerState(np.ones(6), np.ones(6))
    after, state = step(adapter, np.array([0.5, -0.5]), positions, busy, config)
    others = [0, 2, 3, 5]
    assert np.array_equal(after[others], adapter[others])
    assert (after[positions] != adapter[positions]).all()
    assert (state.momentum[others] == 1).all() and (state.second[others] == 1).all()
    assert np.array_equal(adapter, np.arange(6)) and (busy.momentum == 1).all()  # inputs are left alone


def test_federated_averaging_is_the_mean() -> None:
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(7, 5)).astype(np.float32)
    total = PlainSum(5)
    for vector in vectors:
        total.add(vector)
    after, _ = step(np.zeros(5, "f4"), total.mean(), np.arange(5), OptimizerState.zero(5), ServerSection())
    assert np.allclose(after, vectors.mean(axis=0), rtol=1e-6)


def test_a_thousand_updates_lose_nothing_to_rounding() -> None:
    total = PlainSum(1)
    for _ in range(100_000):
        total.add(np.array([0.1], dtype=np.float32))
    assert total.mean()[0] == pytest.approx(float(np.float32(0.1)), rel=1e-12)


def test_what_cannot_be_summed_is_refused_and_not_half_added() -> None:
    total = PlainSum(3)
    total.add(np.ones(3, dtype=np.float32))
    for bad in (
        np.ones(2, "f4"),
        np.ones((3, 1), "f4"),
        np.array([1, np.nan, 1], "f4"),
        np.full(3, np.inf, "f4"),
    ):
        with pytest.raises(ProtocolError):
            total.add(bad)
    assert total.mean().tolist() == [1, 1, 1]


def test_the_mean_of_nothing_is_an_error() -> None:
    with pytest.raises(RoundError):
        PlainSum(3).mean()
