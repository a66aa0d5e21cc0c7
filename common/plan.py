"""What a configuration means: which round trains what, with which noise, at which cost.

A plan is a pure function of a *resolved* configuration, so the server, every site and an auditor compute
the same one. A site follows its own plan; the server can only name a round of it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

from common.config import AdapterMethod, AggregationSection, LocalOptimizer, RunConfig
from common.errors import ConfigError, PrivacyError
from common.models import Part
from common.privacy import (
    SampledGaussianEvent,
    calibrate_noise_multiplier,
    default_delta,
    epsilon_pld,
    epsilon_rdp,
)
from common.secagg.policy import SMALLEST_COHORT


@dataclass(frozen=True)
class RoundPlan:
    """One site's part in one round.

    `event` is what training costs, `None` where a study has turned privacy off; `metrics` what the metrics
    of the site's own records cost, `None` where none are asked for. `batch_size` normalises the summed
    gradients: a public constant, never the size of the batch that was drawn.
    """

    part: Part
    event: SampledGaussianEvent | None
    metrics: SampledGaussianEvent | None
    steps: int
    sample_rate: float
    batch_size: int
    learning_rate: float
    momentum: float
    optimizer: LocalOptimizer
    fedprox_mu: float
    micro_batch: int

    @property
    def events(self) -> tuple[SampledGaussianEvent, ...]:
        """All that the round costs a site."""
        return tuple(e for e in (self.event, self.metrics) if e is not None)


@dataclass(frozen=True)
class Plan:
    """The rounds in order; `rounds[0]` is round 1."""

    rounds: tuple[RoundPlan, ...]
    target_epsilon: float
    delta: float
    private: bool

    def round(self, number: int) -> RoundPlan:
        if not 1 <= number <= len(self.rounds):
            raise ConfigError(f"round must lie between 1 and {len(self.rounds)}, found {number}")
        return self.rounds[number - 1]

    @cached_property
    def events(self) -> tuple[SampledGaussianEvent, ...]:
        """The events of a site that is asked in every round."""
        return tuple(event for r in self.rounds for event in r.events)

    @property
    def epsilon_rdp(self) -> float | None:
        """ε of one site over the whole run; `None` where privacy is off."""
        return epsilon_rdp(self.events, self.delta) if self.private else None

    @property
    def epsilon_pld(self) -> float | None:
        return epsilon_pld(self.events, self.delta) if self.private else None


def resolve(config: RunConfig, *, smallest_site: int, labels: Sequence[str], threads: int) -> RunConfig:
    """Fill in every value that the configuration leaves open, so that it says all there is.

    `smallest_site` is the number of records of the smallest site; where `privacy.nominal_records` is not
    given it becomes the public size, rounded down to two digits.

    Raises:
        PrivacyError: delta at or above one over the records, a batch larger than a site, or a target that
            cannot be met.
    """
    privacy, warmup = config.privacy, config.warmup
    if smallest_site < 1:
        raise PrivacyError("the smallest site holds no records: use fewer sites, or leave it out")
    read = list(privacy.read_from_data)
    if privacy.nominal_records is None:
        read.append("privacy.nominal_records")
    if labels and not config.task.labels:
        read.append("task.labels")
    nominal = privacy.nominal_records or _two_digits(smallest_site)
    if nominal > smallest_site:
        raise PrivacyError(
            f"privacy.nominal_records = {nominal}, but the smallest site holds {smallest_site} records: "
            "lower it, or leave smaller sites out"
        )
    delta = default_delta(nominal) if privacy.delta is None else privacy.delta
    if delta >= 1 / nominal:
        raise PrivacyError(
            f"delta must be below one over a site's records (1/{nominal} = {1 / nominal:.2g}), "
            f"found {delta:g} (privacy.delta)"
        )
    for name, rate in (("privacy", privacy.sample_rate), ("warmup", warmup.sample_rate)):
        if rate * nominal < 1:
            raise PrivacyError(
                f"{name}.sample_rate = {rate} of {nominal} records is less than one record a batch: raise it "
                f"to at least {1 / nominal:.2g}"
            )
    noise, warmup_noise = privacy.noise_multiplier, warmup.noise_multiplier
    metrics = _metrics_event(config, nominal)
    if not privacy.insecure_disabled:
        if warmup.rounds and warmup_noise is None:
            warmup_noise = calibrate_noise_multiplier(
                target_epsilon=warmup.target_epsilon,
                delta=delta,
                sample_rate=warmup.sample_rate,
                steps=warmup.rounds * warmup.local_steps,
            )
        if noise is None:
            before = [metrics] * (warmup.rounds + config.run.rounds) if metrics is not None else []
            if warmup_noise and warmup.rounds:
                steps = warmup.rounds * warmup.local_steps
                before.append(SampledGaussianEvent(warmup.sample_rate, warmup_noise, steps, 1, 1))
            noise = calibrate_noise_multiplier(
                target_epsilon=privacy.target_epsilon,
                delta=delta,
                sample_rate=privacy.sample_rate,
                steps=config.run.rounds * config.training.local_steps,
                before=before,
            )
    resolved = config.model_copy(
        update={
            "run": config.run.model_copy(update={"threads": threads}),
            "task": config.task.model_copy(update={"labels": tuple(labels)}),
            "privacy": privacy.model_copy(
                update={
                    "nominal_records": nominal,
                    "delta": delta,
                    "noise_multiplier": noise,
                    "read_from_data": tuple(read),
                }
            ),
            "warmup": warmup.model_copy(update={"noise_multiplier": warmup_noise}),
            "aggregation": _aggregation(config),
        }
    )
    plan = make_plan(resolved)
    if plan.epsilon_rdp is not None and plan.epsilon_rdp > privacy.target_epsilon:
        raise PrivacyError(
            f"the plan costs ε = {plan.epsilon_rdp:.4f} at delta = {delta:g}, over privacy.target_epsilon = "
            f"{privacy.target_epsilon}: raise noise_multiplier (or leave it out to have it calibrated), or "
            "plan fewer rounds"
        )
    if plan.epsilon_pld is not None and not math.isfinite(plan.epsilon_pld):
        raise PrivacyError(
            f"no finite ε by privacy loss distributions at delta = {delta:g}: raise privacy.delta"
        )
    return resolved


def _aggregation(config: RunConfig) -> AggregationSection:
    """Cohort sizes that hold: see common/secagg/policy.py for why."""
    asked, count, plain = config.aggregation, config.sites.count, config.study.plain_updates
    min_cohort = asked.min_cohort or (min(2, count) if plain else SMALLEST_COHORT)
    c_max = (min_cohort - 1) // 3 if asked.c_max is None else asked.c_max
    if not plain:
        if count < SMALLEST_COHORT:
            raise ConfigError(
                f"secure aggregation needs at least {SMALLEST_COHORT} sites, found sites.count = {count}: of "
                "a sum of two, each finds the other's update by subtracting its own. Use more sites, or, to "
                "study only, --insecure-plain-updates"
            )
        least = max(SMALLEST_COHORT, 3 * c_max + 1)
        if min_cohort < least:
            raise ConfigError(
                f"aggregation.min_cohort must be at least max(3, 3*c_max + 1) = {least}, found {min_cohort}: "
                "the server picks the cohort, so a smaller one could be a victim and its colluders"
            )
    if min_cohort > count:
        raise ConfigError(f"aggregation.min_cohort must be at most sites.count = {count}, found {min_cohort}")
    return asked.model_copy(update={"min_cohort": min_cohort, "c_max": c_max})


def _metrics_event(config: RunConfig, nominal: int) -> SampledGaussianEvent | None:
    """What one round's metrics of a site's own records cost: one noisy sum of vectors of norm at most 1."""
    metrics = config.metrics
    if not metrics.enabled or config.privacy.insecure_disabled:
        return None
    batch = max(1, int(metrics.sample_rate * nominal))
    return SampledGaussianEvent(metrics.sample_rate, metrics.noise_multiplier, 1, 1.0, batch)


def make_plan(config: RunConfig) -> Plan:
    """The plan of a resolved configuration.

    Raises:
        ConfigError: when the configuration still has open values.
    """
    privacy, warmup, training = config.privacy, config.warmup, config.training
    private = not privacy.insecure_disabled
    nominal, delta = privacy.nominal_records, privacy.delta
    if nominal is None or delta is None:
        raise ConfigError("privacy.nominal_records and privacy.delta must be set in a resolved configuration")

    def one(
        part: Part, steps: int, rate: float, sigma: float | None, learning_rate: float, momentum: float
    ) -> RoundPlan:
        batch = max(1, int(rate * nominal))
        event = None
        if private:
            if sigma is None:
                raise ConfigError("noise_multiplier must be set in a resolved configuration")
            event = SampledGaussianEvent(rate, sigma, steps, privacy.max_grad_norm, batch)
        # Head-only steps read features, not tokens: a thousand of them weigh less than one sentence.
        micro = max(training.micro_batch, 2048) if part is Part.HEAD else training.micro_batch
        return RoundPlan(
            part=part,
            event=event,
            metrics=_metrics_event(config, nominal),
            steps=steps,
            sample_rate=rate,
            batch_size=batch,
            learning_rate=learning_rate,
            momentum=momentum,
            optimizer=training.optimizer,
            fedprox_mu=training.fedprox_mu,
            micro_batch=micro,
        )

    probe = (
        one(
            Part.HEAD,
            warmup.local_steps,
            warmup.sample_rate,
            warmup.noise_multiplier,
            warmup.learning_rate,
            warmup.momentum,
        )
        if warmup.rounds
        else None
    )
    tune = [
        one(
            _part(config.adapter.method, number),
            training.local_steps,
            privacy.sample_rate,
            privacy.noise_multiplier,
            training.learning_rate,
            training.momentum,
        )
        for number in range(config.run.rounds)
    ]
    rounds = [probe] * warmup.rounds + tune if probe is not None else tune
    return Plan(tuple(rounds), privacy.target_epsilon, delta, private)


def plan_digest(plan: Plan) -> str:
    """SHA-256, hex, of the plan in canonical JSON: server and sites hold the same one or nothing runs."""
    text = json.dumps(asdict(plan), sort_keys=True, separators=(",", ":"), default=lambda e: e.value)
    return hashlib.sha256(b"confide/plan/v1" + text.encode()).hexdigest()


def _part(method: AdapterMethod, number: int) -> Part:
    match method:
        case AdapterMethod.FFA | AdapterMethod.LORA:
            return Part.ALL
        case AdapterMethod.ROLORA:
            # B first: while B is zero, A has no gradient.
            return Part.A_AND_HEAD if number % 2 else Part.B_AND_HEAD


def _two_digits(n: int) -> int:
    step = int(10 ** max(0, len(str(n)) - 2))
    return n // step * step
