"""What a job would do at this site, before its people say yes; and what their yes changes in the policy."""

from __future__ import annotations

from dataclasses import dataclass

from client.bundles import keep_approved, last_approved, own_policy
from client.identity import SiteFolder
from client.ledger import Ledger
from client.policy import (
    AggregationBounds,
    Code,
    MetricsBounds,
    Models,
    RunBounds,
    SitePolicy,
    Source,
    StepBounds,
    WarmupBounds,
)
from client.policy_check import Asked, check, model_digest, policy_of_run
from client.settings import load_settings
from common.bundle import Bundle, changes, read_bundle
from common.config import RunConfig
from common.errors import ConfigError, PolicyRefusedError
from common.files import write_atomically
from common.ledger_errors import UnknownScopeError
from common.ledger_replay import Balance, count_steps, rho
from common.models import load_model
from common.plan import Plan, make_plan
from common.tasks import make_task


@dataclass(frozen=True)
class Review:
    """A job as this site sees it.

    changed: (key, before, now) against the job that was approved last. epsilon: what all its rounds cost, at
    the job's δ. policy: the site's rules with this job's code and model, and the source's terms, added.
    broken: what these rules still refuse. wider: the same rules, widened to what the job needs.
    affordable: how many of its rounds, from the first on, the data source's budget still allows.
    """

    bundle: Bundle
    changed: list[tuple[str, str, str]]
    plan: Plan
    epsilon: float | None
    model: str
    source: str
    policy: SitePolicy
    broken: list[str]
    wider: SitePolicy
    affordable: int


def review(folder: SiteFolder, data: bytes, ledger: Ledger) -> Review:
    """Loads the model, trains nothing, changes nothing.

    Raises:
        ConfigError: it is no job, or the site's data source has no budget yet. ModelError.
    """
    bundle = read_bundle(data)
    settings = load_settings(folder.settings)
    config: RunConfig = settings.applied_to(bundle.config)
    plan = make_plan(bundle.config)
    source = settings.data.source
    try:
        balance = ledger.balance(source)
    except UnknownScopeError:
        raise ConfigError(
            f"data source {source!r} ({folder.settings}) has no budget yet: open it with confide client "
            f"scope {folder.path} {source} --job BUNDLE.fab, or with --epsilon and --delta"
        ) from None
    scope = balance.scope
    model = model_digest(load_model(config, make_task(config.task.kind, config.task.labels, config.task)))
    before = own_policy(folder)
    terms = Source(target_epsilon=scope.target_epsilon, delta=scope.delta, inherits=scope.inherits)
    policy = before.model_copy(
        update={
            "sources": {**before.sources, source: terms},
            "models": Models(allowed=_with(before.models.allowed, model)),
            "code": Code(bundles=_with(before.code.bundles, bundle.digest)),
        }
    )
    broken: list[str] = []
    for number in range(1, len(plan.rounds) + 1):
        asked = Asked(config, plan, number, source, scope, model, bundle.digest)
        try:
            check(policy, asked)
        except PolicyRefusedError as error:
            text = str(error).split(": ", 1)[1].split(". Nothing was")[0]
            broken += [part for part in text.split("; ") if part not in broken]
    return Review(
        bundle=bundle,
        changed=changes(last_approved(folder), bundle),
        plan=plan,
        epsilon=plan.epsilon_rdp,
        model=model,
        source=source,
        policy=policy,
        broken=broken,
        wider=_widened(policy, policy_of_run(config, plan, source=source, model=model)),
        affordable=affordable(plan, balance),
    )


def affordable(plan: Plan, balance: Balance) -> int:
    """How many rounds of the plan, from the first on, still fit in a data source's budget."""
    events = balance.events
    for number, one in enumerate(plan.rounds):
        events = (*events, *one.events)
        if rho(count_steps(events), balance.scope.order) > balance.scope.budget:
            return number
    return len(plan.rounds)


def approve(folder: SiteFolder, data: bytes, ledger: Ledger, policy: SitePolicy) -> None:
    """Put `policy` in force, signed into the ledger, and keep the bundle it names."""
    text = policy.to_toml()
    ledger.record_policy(text)
    write_atomically(folder.policy, text.encode())
    keep_approved(folder, data)


def _with(known: tuple[str, ...], new: str) -> tuple[str, ...]:
    return known if new in known else (*known, new)


def _widened(policy: SitePolicy, wanted: SitePolicy) -> SitePolicy:
    """The rules that allow what either allows, key by key, and nothing else."""
    run, want = policy.run, wanted.run
    return policy.model_copy(
        update={
            "run": RunBounds(
                tasks=tuple(dict.fromkeys((*run.tasks, *want.tasks))),
                rounds=max(run.rounds, want.rounds),
                max_grad_norm=max(run.max_grad_norm, want.max_grad_norm),
            ),
            "training": StepBounds.model_validate(_wider_steps(policy.training, wanted.training)),
            "warmup": WarmupBounds.model_validate(_wider_steps(policy.warmup, wanted.warmup)),
            "aggregation": AggregationBounds(
                min_cohort=min(policy.aggregation.min_cohort, wanted.aggregation.min_cohort),
                c_max=min(policy.aggregation.c_max, wanted.aggregation.c_max),
            ),
            "metrics": MetricsBounds(
                allowed=policy.metrics.allowed or wanted.metrics.allowed,
                by_label=policy.metrics.by_label or wanted.metrics.by_label,
                noise_multiplier=min(policy.metrics.noise_multiplier, wanted.metrics.noise_multiplier)
                if wanted.metrics.allowed
                else policy.metrics.noise_multiplier,
            ),
        }
    )


def _wider_steps(mine: StepBounds, wanted: StepBounds) -> dict[str, float | int]:
    return {
        "noise_multiplier": min(mine.noise_multiplier, wanted.noise_multiplier),
        "sample_rate": max(mine.sample_rate, wanted.sample_rate),
        "steps": max(mine.steps, wanted.steps),
    }
