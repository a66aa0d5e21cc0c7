"""The statistics of the audits, against the formula by hand, scipy and another implementation."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from simulations import audit_stats
from simulations.audit_stats import GUESSES, one_run_bound, one_run_claim_p, one_run_p
from simulations.canary_bench import calibrated


def brute_force(guesses: int, right: int, canaries: int, epsilon: float, delta: float) -> float:
    """The formula of PRIVACY in fractions, term by term."""
    q = Fraction(1 / (1 + math.exp(-epsilon)))

    def binomial(low: int, high: int) -> Fraction:
        return sum(
            (math.comb(guesses, k) * q**k * (1 - q) ** (guesses - k) for k in range(max(0, low), high)),
            Fraction(0),
        )

    slack = max((binomial(right - i, right) / i for i in range(1, right + 1)), default=Fraction(0))
    return min(1.0, float(binomial(right, guesses + 1) + 2 * canaries * Fraction(delta) * slack))


@pytest.mark.parametrize("guesses", [1, 2, 7, 20])
@pytest.mark.parametrize("epsilon, delta", [(0.0, 0.0), (0.5, 1e-5), (1.0, 1e-3), (4.0, 1e-5), (9.0, 0.01)])
def test_p_is_the_formula(guesses: int, epsilon: float, delta: float) -> None:
    for right in range(guesses + 1):
        expected = brute_force(guesses, right, 200, epsilon, delta)
        assert one_run_p(guesses, right, 200, epsilon, delta) == pytest.approx(expected, rel=1e-9)


# (canaries, guesses, right, ε, δ, p, lower bound at 95%), by jax_privacy 2.0.0
KNOWN = [
    (200, 10, 10, 1, 1e-5, 0.04451882943298205, 1.0445890582363753),
    (200, 24, 24, 2, 1e-5, 0.0483800410795046, 2.011723323257757),
    (200, 166, 166, 4, 1e-5, 0.04995128680427317, 4.000330332525826),
    (200, 200, 150, 0.5, 1e-5, 0.00019558703053187165, 0.8211125035846253),
    (1000, 300, 280, 2.0, 1e-6, 0.0019312366461071337, 2.249148372906509),
    (200, 40, 33, 1.0, 0.0, 0.1201414858916105, 0.8297134309374645),
    (200, 80, 0, 1.0, 1e-5, 1.0, 0.0),
    (200, 120, 119, 3.3, 1e-3, 0.1376726343693217, 2.807231338397025),
]


@pytest.mark.parametrize("m, r, v, epsilon, delta, p, bound", KNOWN)
def test_known_answers(m: int, r: int, v: int, epsilon: float, delta: float, p: float, bound: float) -> None:
    assert one_run_p(r, v, m, epsilon, delta) == pytest.approx(p, rel=1e-9)
    assert audit_stats._largest_refuted(r, v, m, delta, 0.05) == pytest.approx(bound, abs=2e-6)


def test_perfect_guesses_that_an_epsilon_takes() -> None:
    for epsilon, needed in ((1, 10), (2, 24), (4, 166)):
        p = [one_run_p(r, r, 200, epsilon, 1e-5) for r in (needed - 1, needed)]
        assert p[0] >= 0.05 > p[1]


def test_the_bound_and_the_p_value_of_a_claim_agree() -> None:
    rng = np.random.default_rng(0)
    included = rng.random(200) < 0.5
    for shift in (0.0, 0.5, 1.0, 2.0, 50.0):
        scores = rng.normal(size=200) + shift * included
        bound = one_run_bound(included, scores, 1e-5, 0.05).epsilon
        assert one_run_claim_p(included, scores, bound + 1e-3, 1e-5) >= 0.05
        if bound > 0:
            assert one_run_claim_p(included, scores, bound - 1e-3, 1e-5) < 0.05
    assert 3.4 < bound < 3.6


def test_p_values_are_those_of_scipy() -> None:
    rng = np.random.default_rng(0)
    for freedom, x in ((1, 0.3), (20, 0.0), (100, 50.0), (24_000, 24_900.0), (24_000, 1e9)):
        expected = 2 * min(stats.chi2.cdf(x, freedom), stats.chi2.sf(x, freedom))
        assert audit_stats.chi_square_p(x, freedom) == pytest.approx(min(1.0, expected), rel=1e-6, abs=1e-300)
    for z in (0.0, -1.3, 3.5, 20.0):
        assert audit_stats.normal_p(z) == pytest.approx(2 * stats.norm.sf(abs(z)))
    for scale in (1.0, 1.05, 1.2):
        values = scale * rng.normal(size=5000)
        expected = stats.kstest(values, "norm", method="asymp")
        distance, p = audit_stats.gaussian_p(values)
        assert distance == pytest.approx(expected.statistic)
        assert p == pytest.approx(expected.pvalue, rel=0.15)


def test_what_is_no_number_never_passes() -> None:
    for value in (math.nan, math.inf):
        values = np.array([0.0, 1.0, value])
        assert audit_stats.chi_square_p(value, 3) == 0.0
        assert audit_stats.gaussian_p(values)[1] == 0.0
        assert audit_stats.correlation_p(np.vstack([values, np.ones(3)]))[1] == 0.0


def test_related_rows_are_found_and_unrelated_ones_are_not() -> None:
    rows = np.random.default_rng(0).normal(size=(20, 4096))
    assert audit_stats.correlation_p(rows)[1] > 0.01
    assert audit_stats.correlation_p(np.vstack([rows, rows[:1]])) == (pytest.approx(1.0), 0.0)
    assert audit_stats.correlation_p(np.vstack([rows, -rows[:1]])) == (pytest.approx(-1.0), 0.0)
    assert audit_stats.correlation_p(np.vstack([rows, 0.1 * rows[:1] + rows[1:2]]))[1] < 1e-6
    assert audit_stats.correlation_p(np.zeros((2, 10))) == (1.0, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("sample_rate, steps", [(1.0, 4), (0.1, 50)])
def test_the_lower_bound_of_an_ideal_mechanism_stays_below_the_claim(sample_rate: float, steps: int) -> None:
    """The share of FALSE_ALARMS that lower bounds have: 0.2% for four bounds, so 0.05% for each."""
    claim, rng, audits = calibrated(1.0, 1e-5, sample_rate, steps, 1), np.random.default_rng(0), 20_000
    least = {
        r: next(v for v in range(r + 1) if one_run_p(r, v, 200, 1.0, 1e-5) < 0.05 / len(GUESSES))
        for r in GUESSES
    }
    wrong = 0
    for _ in range(audits):
        included = rng.random(200) < 0.5
        noise = rng.normal(0, claim.noise_multiplier * math.sqrt(steps), 200)
        scores = noise + included * rng.binomial(steps, sample_rate, 200)
        wrong += any(right >= least[r] for r, right in audit_stats.guess(included, scores))
    assert wrong <= 0.0005 * audits
