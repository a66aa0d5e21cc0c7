"""The result of a run for scripts: what a simulation and a deployed job tell under the same names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from common.config import RunConfig
from common.export import PrivacyClaim
from common.plan import Plan
from server.record import RoundEvent, SiteRound


def summary_of(
    config: RunConfig,
    plan: Plan,
    claim: PrivacyClaim,
    rounds: Sequence[RoundEvent],
    sites: Sequence[SiteRound],
    scores: Mapping[str, float],
) -> dict[str, Any]:
    """`rounds`: the evaluation before training first. `scores`: every metric of the adapter at the end, the
    chief one first; `accuracy_*` is that one, in every round."""
    first, last, chief = rounds[0], rounds[-1], next(iter(scores))
    return {
        "name": config.run.name,
        "task": config.task.kind.value,
        "model": config.model.name,
        "rounds": len(plan.rounds),
        "cohort": max((r.asked for r in rounds), default=0),
        "seed": config.run.seed,
        "accuracy_initial": first.accuracy,
        "accuracy_final": last.accuracy,
        "loss_initial": first.loss,
        "loss_final": last.loss,
        "metric": chief,
        "scores_initial": {} if first.accuracy is None else {chief: first.accuracy},
        "scores_final": dict(scores),
        "epsilon_rdp_max": claim.epsilon_rdp,
        "epsilon_pld_max": claim.epsilon_pld,
        "target_epsilon": plan.target_epsilon,
        "delta": claim.delta,
        "privacy_unit": config.privacy.unit.value,
        "privacy_trust": config.privacy.trust.value,
        "privacy_statement": claim.sentence(),
        "private": claim.holds,
        "secure_aggregation": claim.secure_aggregation,
        "min_cohort": config.aggregation.min_cohort,
        "ring_bits": None if config.study.plain_updates else config.aggregation.ring_bits.value,
        "rounds_without_sum": sum(not r.counted for r in rounds),
        "site_metrics": last.metrics,
        "noise_multiplier": config.privacy.noise_multiplier,
        "sample_rate": config.privacy.sample_rate,
        "bytes_up_per_site_round": max((s.bytes_up for s in sites if s.status == "ok"), default=0),
        "refusals": sum(s.status != "ok" for s in sites),
    }
