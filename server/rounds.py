"""The run, round by round. `run_round` is the whole of a round, in call order."""

from __future__ import annotations

import math
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from flwr.serverapp import Grid

from common import wire
from common.adapter import Layout, read_vector
from common.config import RunConfig
from common.errors import RoundError, StatusCode
from common.evaluation import MetricSums, evaluate
from common.features import FeatureCache
from common.models import AdaptedModel, Part
from common.plan import Plan
from common.tasks import Examples, IntArray
from server import checkpoint, cohort
from server.aggregation import OptimizerState, PlainSum, step
from server.checkpoint import Checkpoint
from server.curves import Curves
from server.record import RoundEvent, RunFolder, SiteRound

_REFUSALS = {code.value for code in StatusCode}
# Answers that say that nothing was charged; see the order of checks in client/app.py.
_FREE = {
    StatusCode.REFUSED_BUDGET.value,
    StatusCode.REFUSED_PRIVACY.value,
    StatusCode.REFUSED_CONFIG.value,
    StatusCode.REFUSED_PROTOCOL.value,
}


@dataclass(frozen=True)
class Job:
    """What the coordinator works with. `public` are records that belong to no site."""

    run_id: str
    folder: RunFolder
    config: RunConfig
    config_digest: str
    plan: Plan
    plan_digest: str
    model: AdaptedModel
    public: Examples
    features: FeatureCache  # of the public records, while rounds train the head only


class Watcher(Protocol):
    """Who shows people how far the run is."""

    def site_done(self, round_number: int, asked: int) -> None:
        """One of the `asked` sites has answered, or has run out of time."""
        ...

    def round_done(self, event: RoundEvent) -> None: ...


def start(job: Job) -> Checkpoint:
    """The newest checkpoint, or round 0: the adapter as it was injected."""
    job.folder.repair()
    found = checkpoint.load_newest(
        job.folder.checkpoints, config_digest=job.config_digest, layout_digest=job.model.layout.digest
    )
    if found is not None:
        return found
    adapter = read_vector(job.model.parameters, job.model.layout)
    return Checkpoint(0, adapter, OptimizerState.zero(adapter.size))


def run(job: Job, grid: Grid, watcher: Watcher) -> Checkpoint:
    """All rounds that are left; the state after the last.

    Raises:
        RoundError: fewer than min_sites answered in three rounds on end.
    """
    now = start(job)
    with closing(Curves(job.folder.tensorboard, now.round)) as curves:
        if now.round == 0 and not job.folder.rounds():
            event = _event(_measure(job, now, everything=True), 0, "start")
            _finish(job, now, event)
            curves.add(event)
            watcher.round_done(event)
        sites = cohort.roll_call(grid, job.config.server.deadline_seconds)
        failed = 0
        while now.round < len(job.plan.rounds):
            now, event = run_round(job, grid, now, sites, watcher)
            curves.add(event)
            watcher.round_done(event)
            failed = 0 if event.counted else failed + 1
            if failed == 3:
                raise RoundError(
                    "three rounds on end had fewer answers than server.min_sites = "
                    f"{job.config.server.min_sites}; the reasons stand in {job.folder.events}. Resume the "
                    "run when the sites can answer"
                )
    return now


def run_round(
    job: Job,
    grid: Grid,
    before: Checkpoint,
    sites: dict[int, int],
    watcher: Watcher,
) -> tuple[Checkpoint, RoundEvent]:
    """One round: the state after it, and what is recorded of it.

    1. cohort   2. ask   3. sum as replies come   4. step   5. evaluate   6. checkpoint, then record
    """
    began = time.monotonic()
    number = before.round + 1
    plan = job.plan.round(number)
    part = Layout.of(job.model.active(plan.part))

    # 1. Who is asked.
    asked = cohort.sample(list(sites), job.config.server, job.config.run.seed, number)

    # 2. Ask. Each site follows its own plan; the request only names the round.
    request = wire.TrainRequest(
        job.run_id, number, 1, job.plan_digest, job.model.layout.digest, before.adapter
    )
    bytes_down = wire.payload_bytes(wire.encode(request))
    answers = cohort.exchange(
        grid,
        {sites[site]: request for site in asked},
        "train",
        str(number),
        job.config.server.deadline_seconds,
        asked,
    )

    # 3. Sum as replies come: one accumulator, whatever the number of sites.
    total = PlainSum(part.size)
    statuses: Counter[str] = Counter()
    for answer in answers:
        status, bytes_up = _take(answer, total, number, part), 0
        if isinstance(answer, cohort.Reply):
            bytes_up = answer.bytes_up
        statuses[status] += 1
        # A site charges itself before it trains: whatever is not a refusal may have cost it this much.
        free = plan.event is None or status in _FREE
        charged = None if free or plan.event is None else plan.event.to_json()
        job.folder.append(SiteRound(number, answer.site, status, bytes_up, bytes_down, charged))
        watcher.site_done(number, len(asked))

    answered = statuses["ok"]
    if not answered and set(statuses) <= _REFUSALS:
        # Every site has said no: asking again would not change that.
        raise RoundError(
            f"no site took part in round {number}: "
            + ", ".join(f"{count} × {code}" for code, count in sorted(statuses.items()))
            + ". Each site's own log says why"
        )

    # 4. Step, unless too few answered: then the adapter stays as it was.
    counted = answered >= job.config.server.min_sites
    adapter, state = before.adapter, before.state
    if counted:
        adapter, state = step(
            adapter, total.mean(), job.model.layout.positions(part), state, job.config.server
        )
    after = Checkpoint(number, adapter, state)

    # 5. Evaluate on public records only.
    last = number == len(job.plan.rounds)
    every = job.config.evaluation.every
    due = last or (every > 0 and number % every == 0)
    sums = _measure(job, after, everything=last) if due else None

    # 6. The round is done once its checkpoint is: a crash before that runs it again, to the same end.
    seconds = time.monotonic() - began
    event = _event(sums, number, plan.part.value, len(asked), answered, counted, seconds)
    _finish(job, after, event)
    return after, event


def _take(answer: cohort.Reply | cohort.Failure, total: PlainSum, number: int, part: Layout) -> str:
    """Add a good update; say what became of the answer."""
    if isinstance(answer, cohort.Failure):
        return answer.reason
    update = answer.message
    if not isinstance(update, wire.Update):
        return "malformed"
    # The node answers for one site; an answer in another's name, or to another question, is not counted.
    if update.site != answer.site or (update.round, update.attempt) != (number, 1):
        return "malformed"
    if update.weight != 1.0:  # every site counts alike; a site cannot make itself heavier
        return "malformed"
    if update.layout_digest != part.digest or update.vector.size != part.size:
        return "malformed"
    if not np.isfinite(update.vector).all():
        return "malformed"
    total.add(update.vector, update.weight)
    return "ok"


def _measure(job: Job, now: Checkpoint, *, everything: bool) -> MetricSums:
    """The adapter on public records. While the encoder rests, all of them cost next to nothing."""
    head_only = job.plan.round(max(now.round, 1)).part is Part.HEAD
    indices = np.arange(len(job.public))
    limit = job.config.evaluation.records
    if limit and not (everything or head_only) and limit < len(indices):
        indices = _subset(len(indices), limit, job.config.run.seed)
    return evaluate(job.model, now.adapter, job.public, indices, job.features if head_only else None)


def _subset(count: int, limit: int, seed: int) -> IntArray:
    """The same public records in every round, so that rounds can be compared."""
    chosen: IntArray = np.sort(np.random.default_rng([seed, 0xE7A1]).permutation(count)[:limit])
    return chosen


def _finish(job: Job, state: Checkpoint, event: RoundEvent) -> None:
    """Record first: of events for one round the last counts, while a checkpoint ends the round for good."""
    job.folder.append(event)
    job.folder.write_metrics()
    checkpoint.save(
        job.folder.checkpoints,
        state,
        config_digest=job.config_digest,
        layout_digest=job.model.layout.digest,
        keep=job.config.run.checkpoints,
    )


def _event(
    sums: MetricSums | None,
    number: int,
    part: str,
    asked: int = 0,
    answered: int = 0,
    counted: bool = True,
    seconds: float = 0.0,
) -> RoundEvent:
    return RoundEvent(
        number,
        part,
        asked,
        answered,
        counted,
        None if sums is None else sums.accuracy,
        None if sums is None or not math.isfinite(sums.mean_loss) else sums.mean_loss,
        0 if sums is None else sums.count,
        seconds,
    )
