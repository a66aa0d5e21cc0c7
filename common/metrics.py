"""Metrics on sites' own records: clipped per record, noised, and summed under the same masks as updates.

A record contributes the vector (1, correct, loss / loss_clip) / √3, of norm at most 1; by label, in the
coordinates of its own label only. Each site adds N(0, noise_multiplier²) to each coordinate of its sum, so
the sum is a Gaussian mechanism of sensitivity 1 under add-or-remove neighbours, and is charged as one step
of it. Even the number of records is noised: it is as private as the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.config import RunConfig
from common.plan import RoundPlan
from common.secagg.encoding import Count

_NORM = math.sqrt(3.0)
_UNIT = 1 / 64  # of a count in the ring; rounding after the noise costs no privacy
_FIELDS = ("records", "correct", "loss")


@dataclass(frozen=True)
class SiteMetrics:
    """What the server learns: noisy sums over the survivors' records, as means. `None` where noise wins."""

    records: float
    accuracy: float | None
    loss: float | None
    by_label: Mapping[str, tuple[float, float | None]]  # label → (records, accuracy)


def counts_of(config: RunConfig, plan: RoundPlan) -> tuple[Count, ...]:
    """The counts that ride in the vector of this round; none where metrics are off."""
    if plan.metrics is None:
        return ()
    # A site with more than four times the nominal records is clipped there; noise has its own room.
    largest = 4 * (config.privacy.nominal_records or 1) + 16 * plan.metrics.noise_multiplier
    limit = math.ceil(largest / _UNIT)
    return tuple(Count(f"{name}{of}", limit) for of in _groups(config) for name in _FIELDS)


def _groups(config: RunConfig) -> list[str]:
    return [f":{label}" for label in config.task.labels] if config.metrics.by_label else [""]


def site_counts(
    config: RunConfig,
    plan: RoundPlan,
    losses: NDArray[np.float64],
    correct: NDArray[np.float64],
    target: NDArray[np.int64],
    noise: NDArray[np.float64],
) -> dict[str, int]:
    """One site's counts. `losses`, `correct`, `target`: `(n,)`, of the sampled records.

    `noise`: `(counts,)`, N(0, noise_multiplier²), from the site's own stream.
    """
    counts = counts_of(config, plan)
    clip = config.metrics.loss_clip
    clipped = np.nan_to_num(losses, nan=clip, posinf=clip, neginf=0.0).clip(0.0, clip) / clip
    rows = np.stack([np.ones_like(clipped), correct.clip(0.0, 1.0), clipped], axis=1) / _NORM
    groups = len(_groups(config))
    sums = np.zeros((groups, len(_FIELDS)))
    np.add.at(sums, target if config.metrics.by_label else np.zeros(len(rows), dtype=np.int64), rows)
    noised = np.rint((sums.reshape(-1) + noise) / _UNIT)
    return {
        count.name: int(np.clip(value, -count.limit, count.limit))
        for count, value in zip(counts, noised, strict=True)
    }


def read_counts(config: RunConfig, plan: RoundPlan, counts: Mapping[str, int]) -> SiteMetrics | None:
    """The survivors' summed counts as numbers that people read."""
    if plan.metrics is None:
        return None

    def sums(of: str) -> list[float]:
        return [counts[f"{name}{of}"] * _UNIT * _NORM / config.metrics.sample_rate for name in _FIELDS]

    each = {of: sums(of) for of in _groups(config)}
    records, correct, loss = (sum(column) for column in zip(*each.values(), strict=True))
    labels = {of[1:]: (row[0], _ratio(row[1], row[0])) for of, row in each.items() if of}
    mean_loss = _ratio(loss, records, high=math.inf)
    return SiteMetrics(
        records,
        _ratio(correct, records),
        None if mean_loss is None else mean_loss * config.metrics.loss_clip,
        labels,
    )


def _ratio(part: float, whole: float, high: float = 1.0) -> float | None:
    return min(max(part / whole, 0.0), high) if whole >= 1 else None
