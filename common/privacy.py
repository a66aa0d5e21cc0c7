"""Privacy spending as events, and ε as a view of them.

Unit: one training record. Neighbours: two data sets of which one has a record more (add-or-remove);
that bound also covers zero-out neighbours, under which the number of records is public. Trust: local,
so the bound holds against whoever sees every update of this site, the server included.

The mechanism is the Poisson-subsampled Gaussian of DP-SGD (Abadi et al. 2016, 1607.00133): every step
takes each record independently with probability `sample_rate`, clips its gradient to `max_grad_norm`
in the Euclidean norm, and adds N(0, (noise_multiplier · max_grad_norm)²) to every coordinate of the sum.
Empty batches count like any other step.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any

from absl import logging as absl_logging
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from common.errors import PrivacyError

# Fixed, so that ε never depends on which orders happened to be tried: tenths up to 11 serve large ε, high
# orders small ε.
ORDERS: tuple[float, ...] = (
    *(k / 10 for k in range(11, 111)),
    *(float(a) for a in range(12, 65)),
    *(float(a) for a in (72, 80, 96, 128, 192, 256, 384, 512)),
)

_SIGMA_STEP = 1e-4  # the grid on which noise_multiplier is calibrated


@dataclass(frozen=True)
class SampledGaussianEvent:
    """`steps` steps of the Poisson-subsampled Gaussian with one setting.

    `noise_multiplier` is the standard deviation of the noise over `max_grad_norm` (no unit).
    `max_grad_norm` and `batch_size` do not enter ε; they are what an auditor needs to recompute the
    mechanism: noise of std noise_multiplier · max_grad_norm / batch_size on the mean gradient.

    Raises:
        PrivacyError: on construction, when a value is out of its range.
    """

    sample_rate: float
    noise_multiplier: float
    steps: int
    max_grad_norm: float
    batch_size: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise PrivacyError(f"{field.name} must be a finite number, found {value!r}")
            if value <= 0:
                raise PrivacyError(f"{field.name} must be > 0, found {value}")
        if self.sample_rate > 1:
            raise PrivacyError(f"sample_rate must be at most 1, found {self.sample_rate}")
        if self.steps != int(self.steps) or self.batch_size != int(self.batch_size):
            raise PrivacyError(
                f"steps and batch_size must be whole numbers, found {self.steps} and {self.batch_size}"
            )

    def to_json(self) -> dict[str, Any]:
        return {"mechanism": "poisson-sampled-gaussian", "neighbours": "add-or-remove-one", **asdict(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> SampledGaussianEvent:
        expected = {"mechanism", "neighbours", *(f.name for f in fields(cls))}
        if set(data) != expected:
            raise PrivacyError(f"a privacy event must have the keys {sorted(expected)}, found {sorted(data)}")
        if data["mechanism"] != "poisson-sampled-gaussian" or data["neighbours"] != "add-or-remove-one":
            raise PrivacyError(
                f"unknown mechanism {data['mechanism']!r} with neighbours {data['neighbours']!r}; "
                "this accountant knows poisson-sampled-gaussian, add-or-remove-one"
            )
        return cls(**{f.name: data[f.name] for f in fields(cls)})


def _merged(events: Iterable[SampledGaussianEvent]) -> tuple[tuple[float, float, int], ...]:
    """(sample_rate, noise_multiplier, total steps), one row for each distinct setting, sorted."""
    steps: Counter[tuple[float, float]] = Counter()
    for event in events:
        steps[event.sample_rate, event.noise_multiplier] += event.steps
    return tuple((q, sigma, count) for (q, sigma), count in sorted(steps.items()))


@lru_cache(maxsize=4096)
def _rdp_step(sample_rate: float, noise_multiplier: float) -> tuple[float, ...]:
    """Rényi divergence of one step at each of `ORDERS` (Mironov, Talwar & Zhang 2019, 1908.10530).

    Whole orders have a closed form. The series of a fractional order may fail to converge; dp-accounting
    then drops the order without a word. Here such an order gets the chord between its whole neighbours
    instead: (α - 1)·D_α is convex in α and 0 at α = 1 (van Erven & Harremoës 2014, Corollary 2), so the
    chord lies above it and the result stays an upper bound.
    """
    accountant = RdpAccountant(orders=ORDERS, neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)
    level = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        accountant.compose(PoissonSampledDpEvent(sample_rate, GaussianDpEvent(noise_multiplier)))
    finally:
        absl_logging.set_verbosity(level)
    # The accountant's public result is ε; what composes over different settings is the vector behind it.
    divergence = {a: float(r) for a, r in zip(ORDERS, accountant._rdp, strict=True)}
    whole = {int(a): r for a, r in divergence.items() if a == int(a)}
    if bad := [a for a, r in whole.items() if not (math.isfinite(r) and r >= 0)]:
        raise PrivacyError(
            f"the Rényi divergence of sample_rate {sample_rate}, noise_multiplier {noise_multiplier} is not "
            f"finite at orders {bad[:5]}: use a noise_multiplier of at least 0.2"
        )

    def bounded(a: float, r: float) -> float:
        if math.isfinite(r) and r >= 0:
            return r
        below = math.floor(a)
        left = (below - 1) * whole.get(below, 0.0)
        right = below * whole[below + 1]
        return (left + (a - below) * (right - left)) / (a - 1)

    return tuple(bounded(a, r) for a, r in divergence.items())


def rdp(events: Iterable[SampledGaussianEvent]) -> tuple[float, ...]:
    """Rényi divergence of the whole history at each of `ORDERS`; divergences add up under composition."""
    total = [0.0] * len(ORDERS)
    for sample_rate, noise_multiplier, steps in _merged(events):
        for i, r in enumerate(_rdp_step(sample_rate, noise_multiplier)):
            total[i] += steps * r
    return tuple(total)


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise PrivacyError(f"delta must lie between 0 and 1, found {delta} (privacy.delta)")


def epsilon_rdp(events: Sequence[SampledGaussianEvent], delta: float) -> float:
    """Upper bound on ε at `delta`, by Rényi DP at the fixed `ORDERS`. This is the bound that is enforced.

    Conversion: Canonne, Kamath & Steinke 2020, 2004.00010v4, Proposition 12.
    """
    _check_delta(delta)
    if not events:
        return 0.0
    divergences = rdp(events)
    best = min(
        r + math.log1p(-1 / a) - math.log(delta * a) / (a - 1)
        for a, r in zip(ORDERS, divergences, strict=True)
    )
    return max(0.0, best)


@lru_cache(maxsize=256)
def _epsilon_pld(merged: tuple[tuple[float, float, int], ...], delta: float, grid: float) -> float:
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=grid)
    for sample_rate, noise_multiplier, steps in merged:
        step = PoissonSampledDpEvent(sample_rate, GaussianDpEvent(noise_multiplier))
        accountant.compose(SelfComposedDpEvent(step, steps))
    return float(accountant.get_epsilon(delta))


def epsilon_pld(events: Sequence[SampledGaussianEvent], delta: float, grid: float = 1e-4) -> float:
    """Tighter upper bound on ε by privacy loss distributions, pessimistic discretisation (`grid`).

    Each step is rounded up, so that for very many small steps a coarse grid can lie above the Rényi bound.
    Reported beside the Rényi bound, never enforced: stopping on it is unsound when settings are chosen
    adaptively (Feldman & Zrnic 2021, 2008.11193).
    """
    _check_delta(delta)
    return _epsilon_pld(_merged(events), delta, grid) if events else 0.0


def calibrate_noise_multiplier(
    *,
    target_epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    before: Sequence[SampledGaussianEvent] = (),
) -> float:
    """The smallest noise_multiplier, on a grid of 1e-4, with which all of it costs at most `target_epsilon`:
    `steps` steps, and what was spent `before`.

    Rounds towards privacy: the returned value itself satisfies the bound, by `epsilon_rdp`.

    Raises:
        PrivacyError: when the target is not positive, or is not reached by any multiplier up to 10,000.
    """
    if not target_epsilon > 0 or not math.isfinite(target_epsilon):
        raise PrivacyError(f"target_epsilon must be > 0, found {target_epsilon} (privacy.target_epsilon)")

    def cost(grid: int) -> float:
        event = SampledGaussianEvent(sample_rate, round(grid * _SIGMA_STEP, 4), steps, 1.0, 1)
        return epsilon_rdp([*before, event], delta)

    low, high = 2000, 4000  # 0.2 and 0.4: below 0.2 the orders stop converging
    if cost(low) <= target_epsilon:
        return round(low * _SIGMA_STEP, 4)
    while cost(high) > target_epsilon:
        low, high = high, high * 2
        if high * _SIGMA_STEP > 10_000:
            raise PrivacyError(
                f"target_epsilon = {target_epsilon} cannot be reached at delta = {delta:g} in {steps} steps: "
                "raise privacy.target_epsilon or privacy.delta, or run fewer rounds"
            )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) > target_epsilon else (low, middle)
    return round(high * _SIGMA_STEP, 4)


def default_delta(nominal_records: int) -> float:
    """δ = min(1e-5, 1/(10·nominal_records)): well below one over the records of a site.

    δ bounds the chance that the ε guarantee fails outright; at 1/records, publishing one whole record at
    random would already satisfy it, so a factor of ten is kept at the least.
    """
    return min(1e-5, 1.0 / (10 * nominal_records))


def epsilon_text(epsilon: float | None) -> str:
    """Three digits, rounded up, so that what people read is still an upper bound."""
    return "none" if epsilon is None else f"{math.ceil(epsilon * 1000) / 1000:.3f}"
