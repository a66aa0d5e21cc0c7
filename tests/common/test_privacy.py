"""Accounting against published figures, another implementation, and what any accountant must satisfy."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opacus.accountants.analysis import rdp as opacus_rdp
from scipy.integrate import quad

from common.errors import PrivacyError
from common.privacy import (
    ORDERS,
    SampledGaussianEvent,
    _rdp_step,
    calibrate_noise_multiplier,
    default_delta,
    epsilon_pld,
    epsilon_rdp,
    epsilon_text,
    rdp,
)

DELTA = 1e-5
Accountant = Callable[[Sequence[SampledGaussianEvent], float], float]


def event(sample_rate: float, noise_multiplier: float, steps: int) -> SampledGaussianEvent:
    return SampledGaussianEvent(sample_rate, noise_multiplier, steps, 0.5, 16)


def random_history(
    rng: np.random.Generator, rows: int, largest_rate: float = 0.3, most_steps: int = 1000
) -> list[SampledGaussianEvent]:
    def one() -> SampledGaussianEvent:
        rate = 10 ** rng.uniform(-3, math.log10(largest_rate))
        return event(float(rate), float(10 ** rng.uniform(-0.15, 1)), int(rng.integers(1, most_steps)))

    return [one() for _ in range(rows)]


@pytest.mark.parametrize(
    ("spent", "rdp_epsilon", "pld_epsilon"),
    [
        (event(0.01, 1.0, 1000), 2.101, 1.828),
        (event(0.1, 1.0, 100), 7.90, 7.05),
        (event(32 / 4000, 1.0, 12_500), 5.88, None),
    ],
)
def test_known_answers(spent: SampledGaussianEvent, rdp_epsilon: float, pld_epsilon: float | None) -> None:
    assert epsilon_rdp([spent], DELTA) == pytest.approx(rdp_epsilon, abs=6e-3)
    if pld_epsilon is not None:
        assert epsilon_pld([spent], DELTA) == pytest.approx(pld_epsilon, abs=6e-3)


def test_known_calibration() -> None:
    sigma = calibrate_noise_multiplier(target_epsilon=8, delta=DELTA, sample_rate=0.02, steps=1000)
    assert sigma == 0.7678


@pytest.mark.parametrize("epsilon", [epsilon_rdp, epsilon_pld])
class TestEveryAccountant:
    """What must hold whatever the method."""

    def test_nothing_spent_is_zero(self, epsilon: Accountant) -> None:
        assert epsilon([], DELTA) == 0

    def test_grows_with_steps(self, epsilon: Accountant) -> None:
        values = [epsilon([event(0.1, 1.0, n)], DELTA) for n in (1, 2, 10)]
        assert values == sorted(set(values))

    def test_grows_with_the_sample_rate(self, epsilon: Accountant) -> None:
        values = [epsilon([event(q, 1.0, 5)], DELTA) for q in (0.01, 0.1, 1.0)]
        assert values == sorted(set(values))

    def test_falls_with_noise(self, epsilon: Accountant) -> None:
        values = [epsilon([event(0.1, sigma, 5)], DELTA) for sigma in (4.0, 1.0, 0.6)]
        assert values == sorted(set(values))

    def test_falls_with_delta(self, epsilon: Accountant) -> None:
        values = [epsilon([event(0.1, 1.0, 5)], delta) for delta in (1e-2, 1e-5, 1e-8)]
        assert values == sorted(set(values))

    def test_a_history_in_pieces_is_the_whole_history(self, epsilon: Accountant) -> None:
        whole = [event(0.05, 1.0, 60), event(0.2, 2.0, 30)]
        pieces = [event(0.2, 2.0, 10), *[event(0.05, 1.0, 20)] * 3, event(0.2, 2.0, 20)]
        assert epsilon(pieces, DELTA) == pytest.approx(epsilon(whole, DELTA), rel=1e-12)

    def test_more_of_anything_costs_more(self, epsilon: Accountant) -> None:
        history = [event(0.05, 1.0, 60)]
        assert epsilon([*history, event(0.01, 4.0, 1)], DELTA) >= epsilon(history, DELTA)

    @pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
    def test_a_delta_out_of_range_is_refused(self, epsilon: Accountant, delta: float) -> None:
        with pytest.raises(PrivacyError, match="delta"):
            epsilon([event(0.1, 1.0, 1)], delta)


def test_pld_is_never_above_rdp() -> None:
    rng = np.random.default_rng(0)
    for rows in (1, 1, 2, 2):
        history = random_history(rng, rows)
        assert epsilon_pld(history, DELTA) <= epsilon_rdp(history, DELTA) + 1e-6, history


def test_agrees_with_opacus() -> None:
    """Within 1e-3 at any ε below 3; above, ours may be larger, since dp-accounting's series for fractional
    orders adds up absolute values."""
    rng = np.random.default_rng(1)
    compared = 0
    for number in range(30):
        history = random_history(rng, 1 + number % 2, largest_rate=0.1, most_steps=300)
        theirs = np.zeros(len(ORDERS))
        for e in history:
            theirs += opacus_rdp.compute_rdp(
                q=e.sample_rate, noise_multiplier=e.noise_multiplier, steps=e.steps, orders=list(ORDERS)
            )
        finite = np.isfinite(theirs)
        orders = [a for a, ok in zip(ORDERS, finite, strict=True) if ok]
        expected, _ = opacus_rdp.get_privacy_spent(orders=orders, rdp=list(theirs[finite]), delta=DELTA)
        ours = epsilon_rdp(history, DELTA)
        assert ours >= expected - 1e-6, history
        if expected < 3:
            compared += 1
            assert ours == pytest.approx(max(expected, 0), abs=1e-3), history
    assert compared >= 25


def test_five_and_fifty_rounds_differ_as_composition_says() -> None:
    one_round = event(0.05, 1.2, 4)
    five, fifty = [one_round] * 5, [one_round] * 50
    assert np.allclose(rdp(fifty), 10 * np.array(rdp(five)), rtol=1e-12)
    # An engine of its own for each round would print the same ε for both.
    assert epsilon_rdp(fifty, DELTA) > 2 * epsilon_rdp(five, DELTA)


@pytest.mark.parametrize(("q", "sigma", "order"), [(0.05, 1.0, 4), (0.5, 3.0, 17), (1.0, 2.0, 8)])
def test_whole_orders_against_the_closed_form(q: float, sigma: float, order: int) -> None:
    terms = [
        math.comb(order, k) * (1 - q) ** (order - k) * q**k * math.exp(k * (k - 1) / (2 * sigma**2))
        for k in range(order + 1)
    ]
    expected = math.log(sum(terms)) / (order - 1)
    assert _rdp_step(q, sigma)[ORDERS.index(float(order))] == pytest.approx(expected, rel=1e-9)


def divergence(q: float, sigma: float, order: float) -> float:
    """E over N(0, σ²) of ((1 - q) + q·exp((2z - 1)/2σ²))^α, by numerical integration."""

    def integrand(z: float) -> float:
        ratio = np.logaddexp(
            math.log1p(-q) if q < 1 else -math.inf, math.log(q) + (2 * z - 1) / (2 * sigma**2)
        )
        return math.exp(order * float(ratio) - z * z / (2 * sigma**2)) / math.sqrt(2 * math.pi * sigma**2)

    low, high = -12 * sigma, order + 12 * sigma
    points = [0.0, 0.5, order / 2, order]
    value, _ = quad(integrand, low, high, points=points, limit=500, epsabs=0, epsrel=1e-10)
    return math.log(value) / (order - 1)


@pytest.mark.parametrize(("q", "sigma"), [(0.001, 0.35), (0.01, 0.3), (0.3, 0.4), (0.9, 0.5), (0.2, 5.0)])
def test_no_order_lies_below_the_true_divergence(q: float, sigma: float) -> None:
    """Also where the series does not converge and the chord takes its place."""
    step = _rdp_step(q, sigma)
    for order in (1.1, 1.5, 1.9, 2.5, 3.3, 4.7, 7.9, 10.5):
        exact = divergence(q, sigma, order)
        assert step[ORDERS.index(order)] >= exact * (1 - 1e-6), order


def test_the_chord_stands_in_where_the_series_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fractional order lost, the whole ones kept: still an upper bound, and a usable one."""
    import common.privacy

    class Lossy(common.privacy.RdpAccountant):  # type: ignore[misc]
        def compose(self, *arguments: Any) -> Any:
            result = super().compose(*arguments)
            self._rdp = [r if a == int(a) else math.inf for a, r in zip(ORDERS, self._rdp, strict=True)]
            return result

    q, sigma = 0.05, 0.8
    exact = _rdp_step(q, sigma)
    _rdp_step.cache_clear()
    monkeypatch.setattr(common.privacy, "RdpAccountant", Lossy)
    try:
        chord = _rdp_step(q, sigma)
    finally:
        _rdp_step.cache_clear()
    for order, bound, value in zip(ORDERS, chord, exact, strict=True):
        assert bound == value if order == int(order) else value <= bound < math.inf, order
    assert divergence(q, sigma, 2.5) <= chord[ORDERS.index(2.5)] <= 1.5 * divergence(q, sigma, 2.5)


@pytest.mark.parametrize("target", [0.3, 1.0, 8.0])
@pytest.mark.parametrize("before", [[], [event(1.0, 60.0, 20)]], ids=["fresh", "after-a-warm-up"])
def test_calibration_keeps_the_target_and_wastes_nothing(
    target: float, before: list[SampledGaussianEvent]
) -> None:
    sigma = calibrate_noise_multiplier(
        target_epsilon=target, delta=DELTA, sample_rate=0.05, steps=40, before=before
    )
    assert epsilon_rdp([*before, event(0.05, sigma, 40)], DELTA) <= target
    assert epsilon_rdp([*before, event(0.05, round(sigma - 1e-4, 4), 40)], DELTA) > target


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan, math.inf])
def test_a_target_that_is_no_target_is_refused(target: float) -> None:
    with pytest.raises(PrivacyError, match="target_epsilon must be > 0"):
        calibrate_noise_multiplier(target_epsilon=target, delta=DELTA, sample_rate=0.1, steps=1)


def test_a_target_already_spent_is_refused() -> None:
    with pytest.raises(PrivacyError, match="cannot be reached"):
        calibrate_noise_multiplier(
            target_epsilon=1, delta=DELTA, sample_rate=0.1, steps=1, before=[event(0.1, 1.0, 100)]
        )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_too_little_noise_is_refused() -> None:
    with pytest.raises(PrivacyError, match=r"at least 0\.2"):
        epsilon_rdp([event(0.1, 1e-160, 1)], DELTA)
    assert epsilon_rdp([event(0.1, 0.01, 1)], DELTA) > 1000  # finite, and beyond what anyone would allow


@given(
    st.floats(1e-6, 1.0),
    st.floats(0.2, 1e3),
    st.integers(1, 10**6),
    st.floats(1e-3, 1e3),
    st.integers(1, 10**9),
)
def test_events_survive_json(q: float, sigma: float, steps: int, clip: float, batch: int) -> None:
    stored = json.dumps(SampledGaussianEvent(q, sigma, steps, clip, batch).to_json())
    loaded = SampledGaussianEvent.from_json(json.loads(stored))
    assert json.dumps(loaded.to_json()) == stored


GOOD = event(0.1, 1.0, 3).to_json()
BAD_EVENTS: dict[str, dict[str, Any]] = {
    "bad_extra_key": {**GOOD, "note": ""},
    "bad_missing_key": {key: value for key, value in GOOD.items() if key != "steps"},
    "bad_mechanism": {**GOOD, "mechanism": "laplace"},
    "bad_neighbours": {**GOOD, "neighbours": "replace-one"},
    "bad_rate_above_one": {**GOOD, "sample_rate": 1.01},
    "bad_rate_zero": {**GOOD, "sample_rate": 0.0},
    "bad_no_noise": {**GOOD, "noise_multiplier": 0.0},
    "bad_negative_noise": {**GOOD, "noise_multiplier": -1.0},
    "bad_infinite_noise": {**GOOD, "noise_multiplier": math.inf},
    "bad_not_a_number": {**GOOD, "noise_multiplier": math.nan},
    "bad_text": {**GOOD, "noise_multiplier": "1"},
    "bad_truth": {**GOOD, "steps": True},
    "bad_half_a_step": {**GOOD, "steps": 2.5},
    "bad_no_steps": {**GOOD, "steps": 0},
    "bad_null": {**GOOD, "batch_size": None},
    "bad_clip": {**GOOD, "max_grad_norm": 0},
}


@pytest.mark.parametrize("name", BAD_EVENTS)
def test_bad_events_are_refused(name: str) -> None:
    with pytest.raises(PrivacyError):
        SampledGaussianEvent.from_json(BAD_EVENTS[name])


def test_default_delta_is_well_below_one_over_the_records() -> None:
    assert default_delta(100) == pytest.approx(1e-5)
    assert default_delta(1_000_000) == pytest.approx(1e-7)


def test_epsilon_is_printed_rounded_up() -> None:
    assert [epsilon_text(e) for e in (None, 2.0, 2.0001, 7.8999)] == ["none", "2.000", "2.001", "7.900"]
