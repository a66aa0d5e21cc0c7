"""The checks of the mechanism audit: what was read at the canaries against what an honest mechanism gives.

Each is a test with a level, or exact. simulations/canaries.py says how the levels are shared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from simulations.audit_stats import Floats, chi_square_p, correlation_p, gaussian_p, normal_p
from simulations.canary_bench import SITES, Bench, Reading, Sampling, run_empty, run_scale

# Tests with a level: of each claim, and of the mechanism as such.
OF_CLAIM, OF_ALL = 6, 6
_EXACT = 0.1  # contributions: how far a number may lie from the one it must be where there is hardly noise


@dataclass(frozen=True)
class Check:
    """One question put to the mechanism: `found` against `expected`, or against at most that (`at_most`).

    `p_value`: how often an honest mechanism looks so bad or worse; the check fails below `level`. Both are
    `None` where chance plays no part.
    """

    name: str
    of: str  # the claim's name; empty: the mechanism as such
    unit: str
    expected: float
    found: float
    at_most: bool
    p_value: float | None
    level: float | None
    passed: bool
    catches: str


def _test(
    name: str, of: str, unit: str, expected: float, found: float, p: float, level: float, catches: str
) -> Check:
    p = p if math.isfinite(p) else 0.0  # numbers that are not finite are no noise
    return Check(name, of, unit, expected, found, False, p, level, p >= level, catches)


def moment_checks(reading: Reading, level: float) -> Iterator[Check]:
    """Variance and mean, at one site and in the sum of all."""
    claim = reading.claim
    q, sigma, steps = claim.sample_rate, claim.noise_multiplier, claim.steps
    out, into = ~reading.included, reading.included

    def noise(name: str, values: Floats, sites: int, catches: str) -> Check:
        """Σx²/(sites · T · σ²) is χ² with as many degrees of freedom as there are values."""
        mean_square = float((values**2).mean()) / (sites * steps) if len(values) else math.nan
        p = chi_square_p(len(values) * mean_square / sigma**2, max(1, len(values)))
        unit = "σ of one step"
        return _test(name, claim.name, unit, sigma, math.sqrt(mean_square), p, level, catches)

    def mean(name: str, values: Floats, sites: int, rate: float, catches: str) -> Check:
        """The mean of n values is N(rate · T, (sites · T · σ² + T · rate · (1 − rate))/n)."""
        found = float(values.mean()) if len(values) else math.nan
        variance = (sites * steps * sigma**2 + steps * rate * (1 - rate)) / max(1, len(values))
        p = normal_p((found - rate * steps) / math.sqrt(variance))
        return _test(name, claim.name, "contributions", rate * steps, found, p, level, catches)

    yield noise(
        "noise at the canaries left out",
        reading.own[out],
        1,
        "noise that is halved, a tenth, absent, or the same in every step",
    )
    yield noise(
        "noise wherever no record reaches",
        reading.untouched,
        1,
        "too little noise, even by 2%, since there are 24,000 such numbers; clipping layer by layer",
    )
    yield mean(
        "canaries left out read zero",
        reading.own[out],
        1,
        0.0,
        "records that show though they are not in the data; noise that is not centred",
    )
    yield mean(
        "canaries included read q·T",
        reading.own[into],
        1,
        q,
        "records that count for more than the clipping norm, or more often than the sample rate says",
    )
    yield noise(
        "noise in the secure sum",
        reading.untouched_sum,
        SITES,
        "sites that share their noise, or noise lost in the encoding of secure aggregation",
    )
    yield mean(
        "canaries included read q·T in the sum",
        reading.summed[into],
        SITES,
        q,
        "contributions that the encoding changes",
    )


def noise_checks(scaled: Floats, readings: Sequence[Reading], level: float) -> Iterator[Check]:
    distance, p = gaussian_p(scaled)
    yield _test(
        "noise is Gaussian",
        "",
        "distance from N(0, 1)",
        0.0,
        distance,
        p,
        level,
        "noise of another shape: cut off, rounded, or one number used many times",
    )
    largest, p = correlation_p(np.concatenate([r.rounds for r in readings]))
    yield _test(
        "noise of rounds and sites is unrelated",
        "",
        "largest correlation",
        0.0,
        largest,
        p,
        level,
        "noise that is used twice, so that it cancels when two updates are subtracted",
    )


def empty_checks(world: Bench, rng: np.random.Generator, level: float) -> Iterator[Check]:
    untouched, std, share = run_empty(world, rng)
    ratio = float((untouched**2).mean()) / std**2
    yield _test(
        "empty batches are noised",
        "",
        f"share of steps with noise, {share:.0%} of them empty",
        1.0,
        ratio,
        chi_square_p(len(untouched) * ratio, len(untouched)),
        level,
        "steps skipped because nobody was sampled: their absence tells that nobody was there",
    )


def sampling_checks(sampling: Sampling, level: float) -> Iterator[Check]:
    """Each count of a record in a round is Bin(steps, q) and all are independent, so their sums are too."""
    q, counts = sampling.sample_rate, sampling.counts
    rounds, records = counts.shape
    trials = rounds * records * sampling.steps
    z = (float(counts.sum()) - trials * q) / math.sqrt(trials * q * (1 - q))
    yield _test(
        "records are sampled at the sample rate",
        "",
        "rate",
        q,
        float(counts.sum()) / trials,
        normal_p(z),
        level,
        "a sample rate that is not the one accounted for, such as twice as much",
    )
    for name, sums, each, catches in (
        (
            "records are sampled independently",
            counts.sum(axis=0),
            rounds * sampling.steps,
            "shuffled batches, in which every record is taken equally often; the same batch again and again",
        ),
        (
            "batches vary in size as they must",
            counts.sum(axis=1),
            records * sampling.steps,
            "batches of fixed size, however they are drawn",
        ),
    ):
        ratio = float(((sums - each * q) ** 2).mean()) / (each * q * (1 - q))
        p = chi_square_p(len(sums) * ratio, len(sums))
        yield _test(name, "", "variance over Poisson's", 1.0, ratio, p, level, catches)


def _at_most(name: str, unit: str, most: float, found: float, catches: str) -> Check:
    """No chance plays a part."""
    return Check(name, "", unit, most, found, True, None, None, found <= most, catches)


def exact_checks(
    sampling: Sampling, world: Bench, readings: Sequence[Reading], rng: np.random.Generator
) -> Iterator[Check]:
    yield _at_most(
        "clipping is exact",
        "contributions off",
        _EXACT,
        sampling.off,
        "clipping that is off, or that clips sums instead of records; division by the batch that was drawn",
    )
    usual, overflow = run_scale(world, rng)
    yield _at_most(
        "one record more changes no other",
        "contributions off",
        _EXACT,
        usual,
        "a normaliser taken from the number of records, which tells it",
    )
    yield _at_most(
        "a record that overflows changes no other",
        "contributions off",
        _EXACT,
        overflow,
        "training that stops at a number that is not finite, which tells that the record is there",
    )
    yield _at_most(
        "the secure sum decodes to the sum",
        "steps of the encoding",
        1.0,
        max(reading.decoding for reading in readings),
        "sums that wrap, or numbers cut off by the encoding",
    )
