"""A site's own metrics, where the federation has them on: measured, clipped, noised. See common.metrics."""

from __future__ import annotations

import numpy as np

from client.training import Shard, poisson_sample
from common.adapter import Vector
from common.config import RunConfig
from common.evaluation import record_scores
from common.features import FeatureCache
from common.metrics import counts_of, site_counts
from common.models import AdaptedModel, Part
from common.noise import NoiseStream
from common.plan import RoundPlan


def measure(
    model: AdaptedModel,
    config: RunConfig,
    plan: RoundPlan,
    shard: Shard,
    adapter: Vector,
    noise: NoiseStream,
    features: FeatureCache,
) -> dict[str, int]:
    """Noised counts of the global `adapter` on this site's records; empty where metrics are off.

    The caller has charged `plan.metrics`, which is what this costs.
    """
    if plan.metrics is None:
        return {}
    sampled = poisson_sample(shard, plan.metrics.sample_rate, noise)
    cache = features if plan.part is Part.HEAD else None
    losses, correct, order = [np.empty(0)], [np.empty(0)], [np.empty(0, dtype=np.int64)]
    for part, loss, right in record_scores(model, adapter, shard.examples, sampled, cache):
        losses.append(loss.cpu().numpy())
        correct.append(right.cpu().numpy())
        order.append(part)
    target = shard.examples.targets(np.concatenate(order)).numpy()
    size = (len(counts_of(config, plan)),)
    noised = noise.gaussian(size, plan.metrics.noise_multiplier).numpy()
    return site_counts(config, plan, np.concatenate(losses), np.concatenate(correct), target, noised)
