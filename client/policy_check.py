"""Whether a site's policy allows a round: asked before a record is looked at and before anything is charged.

What is compared is the site's own configuration, plan, model and ledger. Of all that the server has sent only
the number of the round comes in, so it cannot ask for more than the site allows, whatever it says.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from client.policy import (
    STRICT,
    AggregationBounds,
    MetricsBounds,
    Models,
    RunBounds,
    SitePolicy,
    Source,
    StepBounds,
    StudySwitches,
    WarmupBounds,
)
from common.config import RunConfig
from common.errors import PolicyRefusedError
from common.ledger import Scope
from common.models import AdaptedModel, Part
from common.plan import Plan, RoundPlan


@dataclass(frozen=True)
class Asked:
    """A round that a site is about to compute, as the site itself sees it.

    source: its name of the data. scope: the terms of that in its ledger; None in a study without one.
    model: see `model_digest`. bundle: hash of the code that runs, where the site runs code by its hash.
    """

    config: RunConfig
    plan: Plan
    round: int
    source: str
    scope: Scope | None
    model: str
    bundle: str | None


def check(policy: SitePolicy, asked: Asked) -> None:
    """Raises PolicyRefusedError unless every rule allows the round; it names every key that does not."""
    broken = [
        *_study(policy.study, asked),
        *_source(policy, asked),
        *_model(policy, asked),
        *_run(policy.run, asked),
        *_steps(policy, asked),
        *_aggregation(policy.aggregation, asked.config),
        *_metrics(policy.metrics, asked),
    ]
    if broken:
        raise PolicyRefusedError(
            f"this site's policy.toml does not allow round {asked.round}: {'; '.join(broken)}. Nothing was "
            "computed or charged. Ask for a run within the policy, or, if this site's people agree to it, "
            "change the policy with confide client policy FOLDER --set FILE"
        )


def _at_most(key: str, limit: float, found: float) -> Iterator[str]:
    if not found <= limit:
        yield f"{key} allows at most {limit:g}, found {found:g}"


def _at_least(key: str, limit: float, found: float) -> Iterator[str]:
    if not found >= limit:
        yield f"{key} asks for at least {limit:g}, found {found:g}"


def _study(switches: StudySwitches, asked: Asked) -> Iterator[str]:
    study, events = asked.config.study, [r.event for r in asked.plan.rounds]
    bare = asked.config.privacy.insecure_disabled or not asked.plan.private or None in events
    said = {
        "insecure_no_privacy": (bare, "training without clipping, noise or charge"),
        "plain_updates": (study.plain_updates, "an update in the clear"),
        "noise_seed": (study.noise_seed is not None, "noise that is keyed by a public number"),
    }
    for key, (wanted, what) in said.items():
        if wanted and not getattr(switches, key):
            yield f"study.{key} is false, found a run with {what}"


def _source(policy: SitePolicy, asked: Asked) -> Iterator[str]:
    source, scope = policy.sources.get(asked.source), asked.scope
    if source is None:
        yield (
            f"sources names {sorted(policy.sources)}, found data source {asked.source!r}: add a table "
            f"[sources.{asked.source}] with the terms of its budget"
        )
        return
    if scope is None:
        return
    for key, allowed, found in (
        ("target_epsilon", source.target_epsilon, scope.target_epsilon),
        ("delta", source.delta, scope.delta),
        ("inherits", sorted(source.inherits), sorted(scope.inherits)),
    ):
        if allowed != found:
            yield (f"sources.{asked.source}.{key} must be as the budget was opened, {found}, found {allowed}")


def _model(policy: SitePolicy, asked: Asked) -> Iterator[str]:
    if asked.model not in policy.models.allowed:
        yield (
            f'models.allowed lacks "{asked.model}", the digest of {asked.config.model.name!r} with its '
            "adapter: add it there if this model may be trained"
        )
    if asked.bundle is not None and asked.bundle not in policy.code.bundles:
        yield f'code.bundles lacks "{asked.bundle}", the code that would run: add it there if it may'


def _run(bounds: RunBounds, asked: Asked) -> Iterator[str]:
    kind = asked.config.task.kind
    if kind not in bounds.tasks:
        yield f"run.tasks allows {[task.value for task in bounds.tasks]}, found {kind.value!r}"
    yield from _at_most("run.rounds", bounds.rounds, len(asked.plan.rounds))
    event = asked.plan.round(asked.round).event
    if event is not None:
        yield from _at_most("run.max_grad_norm", bounds.max_grad_norm, event.max_grad_norm)


def _steps(policy: SitePolicy, asked: Asked) -> Iterator[str]:
    plan = asked.plan.round(asked.round)
    name, bounds = _bounds_of(policy, plan)
    yield from _at_most(f"{name}.sample_rate", bounds.sample_rate, plan.sample_rate)
    yield from _at_most(f"{name}.steps", bounds.steps, plan.steps)
    if plan.event is not None:
        yield from _at_least(f"{name}.noise_multiplier", bounds.noise_multiplier, plan.event.noise_multiplier)


def _bounds_of(policy: SitePolicy, plan: RoundPlan) -> tuple[str, StepBounds]:
    match plan.part:
        case Part.HEAD:
            return "warmup", policy.warmup
        case Part.ALL | Part.A_AND_HEAD | Part.B_AND_HEAD:
            return "training", policy.training


def _aggregation(bounds: AggregationBounds, config: RunConfig) -> Iterator[str]:
    if config.study.plain_updates:
        return  # nothing is summed in secret: that is another key's question
    section = config.aggregation
    for key, limit, found in (
        ("min_cohort", bounds.min_cohort, section.min_cohort),
        ("c_max", bounds.c_max, section.c_max),
    ):
        yield from _at_least(f"aggregation.{key}", limit, -1 if found is None else found)


def _metrics(bounds: MetricsBounds, asked: Asked) -> Iterator[str]:
    section, event = asked.config.metrics, asked.plan.round(asked.round).metrics
    if not section.enabled and event is None:
        return
    if not bounds.allowed:
        yield "metrics.allowed is false, found a run with metrics of this site's records"
    if section.by_label and not bounds.by_label:
        yield "metrics.by_label is false, found a run with metrics of each label"
    found = 0.0 if event is None else event.noise_multiplier
    yield from _at_least("metrics.noise_multiplier", bounds.noise_multiplier, found)


# For those who run a simulation: its sites allow exactly it


def policy_of_run(config: RunConfig, plan: Plan, *, source: str, model: str) -> SitePolicy:
    """What a simulated site allows: this run on this model, and nothing that goes beyond it in any key.

    config, plan: resolved. Bounds of what the run does not do keep their strict defaults.
    """
    training, warmup, metrics, study = config.training, config.warmup, config.metrics, config.study
    privacy = config.privacy
    return SitePolicy(
        sources={source: Source(target_epsilon=plan.target_epsilon, delta=plan.delta)},
        models=Models(allowed=(model,)),
        run=RunBounds(
            tasks=(config.task.kind,), rounds=len(plan.rounds), max_grad_norm=privacy.max_grad_norm
        ),
        training=StepBounds(
            noise_multiplier=privacy.noise_multiplier or STRICT.training.noise_multiplier,
            sample_rate=privacy.sample_rate,
            steps=training.local_steps,
        ),
        warmup=WarmupBounds(
            noise_multiplier=warmup.noise_multiplier or STRICT.warmup.noise_multiplier,
            sample_rate=warmup.sample_rate,
            steps=warmup.local_steps,
        )
        if warmup.rounds
        else STRICT.warmup,
        aggregation=_cohorts_of(config),
        metrics=MetricsBounds(
            allowed=True,
            by_label=metrics.by_label,
            noise_multiplier=0.0 if privacy.insecure_disabled else metrics.noise_multiplier,
        )
        if metrics.enabled
        else STRICT.metrics,
        study=StudySwitches(
            insecure_no_privacy=privacy.insecure_disabled,
            plain_updates=study.plain_updates,
            noise_seed=study.noise_seed is not None,
        ),
    )


def _cohorts_of(config: RunConfig) -> AggregationBounds:
    min_cohort, c_max = config.aggregation.min_cohort, config.aggregation.c_max
    if config.study.plain_updates or min_cohort is None or c_max is None:
        return STRICT.aggregation
    return AggregationBounds(min_cohort=min_cohort, c_max=c_max)


def model_digest(model: AdaptedModel) -> str:
    """SHA-256, hex, of what a site approves: the frozen weights, and the names and shapes of what trains.

    Not of what the adapter holds, which is another in every round, nor of its seeded start.
    """
    h = hashlib.sha256(b"confide/model/v1" + model.layout.digest.encode())
    for name, value in sorted(model.module.state_dict().items()):
        # peft keeps the head as it was before it was copied to be trained; nothing reads it.
        if name in model.parameters or ".lora_" in name or ".original_module." in name:
            continue
        h.update(f"{name}:{tuple(value.shape)};".encode() + value.cpu().contiguous().numpy().tobytes())
    return h.hexdigest()
