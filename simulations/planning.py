"""Planning a run before anything is spent: which batch, and how much noise that needs. Reads no data.

Noise is what each coordinate of a mean gradient gets, as a standard deviation over max_grad_norm: a batch of
b records with noise multiplier σ has σ/b in each step, and averaged over T steps and M sites σ/(b·√(T·M)).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from common.errors import ConfigError
from common.ledger_replay import filter_budget
from common.privacy import (
    ORDERS,
    SampledGaussianEvent,
    calibrate_noise_multiplier,
    epsilon_pld,
    epsilon_rdp,
    rdp,
)

_RATES = (*(float(f"{digit}e-{power}") for power in range(6, 0, -1) for digit in (1, 2, 5)), 1.0)
_FEW_RECORDS = 32  # a batch below this is all noise, wherever there are more
_MOST_ROWS = 6
_AROUND = (0.7, 0.85, 1.0, 1.2, 1.45)  # times σ: what a curve is drawn through
_LEAST_NOISE = 0.2  # below, the accountant's orders stop converging


@dataclass(frozen=True)
class Question:
    """What somebody wants to run. records: of a site, at least. max_batch: what a site can compute a step.

    Raises:
        ConfigError: on construction, naming the option.
    """

    records: int
    epsilon: float
    delta: float
    rounds: int
    steps_per_round: int
    sites: int
    max_batch: int

    def __post_init__(self) -> None:
        for option in ("records", "rounds", "steps_per_round", "sites", "max_batch"):
            if (found := getattr(self, option)) < 1:
                raise ConfigError(f"--{option.replace('_', '-')} must be at least 1, found {found}")
        if not (self.epsilon > 0 and math.isfinite(self.epsilon)):
            raise ConfigError(f"--epsilon must be > 0, found {self.epsilon}")
        if not 0 < self.delta < 1 / self.records:
            raise ConfigError(
                f"--delta must be above 0 and below one over the records (1/{self.records} = "
                f"{1 / self.records:.2g}), found {self.delta:g}"
            )

    @property
    def steps(self) -> int:
        return self.rounds * self.steps_per_round


@dataclass(frozen=True)
class Row:
    """One batch size, with the least noise that keeps the whole run within ε."""

    question: Question
    sample_rate: float
    noise_multiplier: float

    @property
    def batch_size(self) -> int:
        """The public normaliser, as in `common.plan.make_plan`."""
        return max(1, int(self.sample_rate * self.question.records))

    @property
    def step_noise(self) -> float:
        return self.noise_multiplier / self.batch_size

    @property
    def total_noise(self) -> float:
        return self.step_noise / math.sqrt(self.question.steps * self.question.sites)

    @property
    def gradients(self) -> int:
        """Records whose gradient a site computes, in expectation, over the whole run."""
        return round(self.sample_rate * self.question.records * self.question.steps)

    @property
    def event(self) -> SampledGaussianEvent:
        steps = self.question.steps
        return SampledGaussianEvent(self.sample_rate, self.noise_multiplier, steps, 1.0, self.batch_size)

    @cached_property
    def epsilon_rdp(self) -> float:
        return epsilon_rdp([self.event], self.question.delta)

    @cached_property
    def epsilon_pld(self) -> float:
        return epsilon_pld([self.event], self.question.delta)


def rates(question: Question) -> tuple[float, ...]:
    """Sample rates worth a look, ascending: batches that are not all noise and that a site can compute.

    Raises:
        ConfigError: no rate has a batch of at most `max_batch`.
    """
    least = min(_FEW_RECORDS, max(1, question.records // 4))
    fit = [rate for rate in _RATES if 1 <= int(rate * question.records) <= question.max_batch]
    if not fit:
        raise ConfigError(f"--max-batch = {question.max_batch} is too small for {question.records} records")
    return tuple(rate for rate in fit if int(rate * question.records) >= least)[-_MOST_ROWS:] or (fit[-1],)


def solve(question: Question, rate: float) -> Row:
    """Raises PrivacyError if no noise is enough."""
    sigma = calibrate_noise_multiplier(
        target_epsilon=question.epsilon, delta=question.delta, sample_rate=rate, steps=question.steps
    )
    return Row(question, rate, sigma)


def propose(rows: Sequence[Row]) -> int:
    """Which of `rows`, whose batches grow: the first one from which a larger batch does not pay.

    Computing twice as many gradients lowers the noise by √2 when they are averaged at the noise there is, as
    over more sites. A batch that is twice as large and gains less than that is not worth its computing.
    """
    for place, (row, larger) in enumerate(itertools.pairwise(rows)):
        if row.total_noise / larger.total_noise < math.sqrt(larger.batch_size / row.batch_size):
            return place
    return len(rows) - 1


def rounds_for(question: Question, rate: float, sigma: float) -> float:
    """How many rounds ε allows with this noise; not whole, for drawing."""
    step = rdp([SampledGaussianEvent(rate, sigma, 1, 1.0, 1)])
    steps = max(
        filter_budget(question.epsilon, question.delta, order) / cost if cost > 0 else math.inf
        for order, cost in zip(ORDERS, step, strict=True)
    )
    return steps / question.steps_per_round


@dataclass(frozen=True)
class NoiseCurve:
    """noise[i] allows rounds[i], both growing."""

    row: Row
    rounds: tuple[float, ...]
    noise: tuple[float, ...]

    def at(self, rounds: float) -> float | None:
        """About the noise that so many rounds need; None beyond what was computed."""
        points = itertools.pairwise(zip(self.rounds, self.noise, strict=True))
        for (fewer, less), (more, noisier) in points:
            if fewer <= rounds <= more:
                part = math.log(rounds / fewer) / math.log(more / fewer)
                return math.exp((1 - part) * math.log(less) + part * math.log(noisier))
        return None


def curve(row: Row) -> NoiseCurve:
    """Through the row's own noise and some around it."""
    noise = [row.noise_multiplier * factor for factor in _AROUND]
    kept = tuple(sigma for sigma in noise if sigma >= _LEAST_NOISE)
    rounds = tuple(rounds_for(row.question, row.sample_rate, sigma) for sigma in kept)
    return NoiseCurve(row, rounds, kept)
