"""The run, round by round. `run_round` is the whole of a round, in call order."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from typing import Protocol

import numpy as np
from flwr.serverapp import Grid

from common import wire
from common.adapter import Layout, read_vector
from common.aggregation import context_of, policy_of
from common.config import RunConfig
from common.errors import RoundError, StatusCode
from common.evaluation import MetricSums, evaluate
from common.features import FeatureCache
from common.metrics import SiteMetrics, read_counts
from common.models import AdaptedModel, Part
from common.plan import Plan
from common.secagg.errors import Exchange
from common.secagg.policy import Roster
from common.secagg.transcript import roster_hash
from common.tasks import Examples, IntArray
from server import charges, checkpoint, cohort
from server.aggregation import Floats, OptimizerState, PlainSum, step
from server.checkpoint import Checkpoint
from server.curves import Curves
from server.gather import Gatherer
from server.receipts import Receipts
from server.record import RoundEvent, RunFolder

_WAIT_SECONDS = 3.0  # between looks at which sites are there, while there are too few
_REFUSALS = {code.value for code in StatusCode}


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
    roster: Roster
    receipts: Receipts | None  # of the sites' ledgers; None in a study without privacy
    membership: Callable[[], Roster] | None = None  # deployed: the newest roster; sites come in and go
    names: Callable[[Grid], dict[int, int]] | None = None  # deployed: live nodes → sites, by enrolled keys
    called: Callable[[list[int], dict[int, str]], None] = lambda present, absent: None  # hears of roll calls


class Watcher(Protocol):
    """Who shows people how far the run is."""

    def site_done(self, round_number: int, asked: int) -> None:
        """One of the `asked` sites has answered, or has run out of time."""
        ...

    def stage(self, round_number: int, exchange: Exchange) -> None:
        """Secure aggregation has come to this exchange."""
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
        RoundError: no sum in `server.give_up_after` rounds on end.
    """
    now = start(job)
    limit = job.config.server.give_up_after
    with closing(Curves(job.folder.tensorboard, now.round)) as curves:
        if now.round == 0 and not job.folder.rounds():
            event = _event(_measure(job, now, everything=True), 0, "start")
            _finish(job, now, event)
            curves.add(event)
            watcher.round_done(event)
        sites = _roll_call(job, grid)
        failed, owed = 0, charges.owed(job.folder, now.round + 1)
        while now.round < len(job.plan.rounds):
            job, sites = _present(job, grid, sites)
            now, event = run_round(job, grid, now, sites, watcher, owed)
            owed = frozenset()
            curves.add(event)
            watcher.round_done(event)
            failed = 0 if event.counted else failed + 1
            if not event.counted and job.names is not None:
                sites = {}  # call all: who has gone would cost the others another round for nothing
            if limit and failed == limit:
                raise RoundError(
                    f"{failed} rounds on end had no sum of at least aggregation.min_cohort = "
                    f"{job.config.aggregation.min_cohort} sites; the reasons stand in {job.folder.events}. "
                    "Resume the run when the sites can answer (server.give_up_after = 0 never stops)"
                )
    return now


def _roll_call(job: Job, grid: Grid) -> dict[int, int]:
    """The live sites. Who names itself by an id that the roster does not have could sign nothing: it is not
    asked, or the round could not be opened. Nor is who holds another roster, who would train in vain."""
    absent: dict[int, str] = {}
    secure = not job.config.study.plain_updates
    found = cohort.roll_call(
        grid,
        min(job.config.server.deadline_seconds, job.config.aggregation.deadline_seconds),
        receipts=job.receipts,
        names=None if job.names is None else job.names(grid),
        absent=absent.__setitem__,
        roster=roster_hash(job.roster) if secure else b"",
    )
    if secure:
        found = {site: node for site, node in found.items() if site in job.roster}
    job.called(sorted(found), absent)
    return found


def _present(
    job: Job, grid: Grid, sites: dict[int, int], rest: Callable[[float], None] = time.sleep
) -> tuple[Job, dict[int, int]]:
    """The job with the newest roster, and who is there now. Deployed sites come and go: whoever is new, or
    was away, is called, all are when the roster has changed, and a round with too few of them waits.
    Simulated sites stay as they were called at first."""
    names = job.names
    if names is None:
        return job, sites
    while True:
        newest = job.membership() if job.membership else job.roster
        if newest != job.roster:
            job, sites = replace(job, roster=newest), {}
            if job.receipts is not None:
                job.receipts.roster = newest
        if set(names(grid)) != set(sites.values()):
            sites = _roll_call(job, grid)
        if len(sites) >= (job.config.aggregation.min_cohort or 1):
            return job, sites
        rest(_WAIT_SECONDS)


def run_round(
    job: Job,
    grid: Grid,
    before: Checkpoint,
    sites: dict[int, int],
    watcher: Watcher,
    owed: frozenset[int] = frozenset(),
) -> tuple[Checkpoint, RoundEvent]:
    """One round: the state after it, and what is recorded of it. owed: see `charges.owed`.

    1. cohort   2. train   3. secure sum   4. step   5. evaluate   6. checkpoint, then record
    """
    began = time.monotonic()
    number = before.round + 1
    plan = job.plan.round(number)
    part = Layout.of(job.model.active(plan.part))

    # 1. Who is asked.
    asked = cohort.sample(list(sites), job.config, number)
    if job.names is not None:  # simulated sites die with the server, and repeat their charges
        charges.record_asked(job.folder, number, plan, asked)

    # 2. Train. Each site follows its own plan; the request only names the round. "Ready" is all that comes
    #    back: the update waits at the site, so long training is over before any secret is shared.
    trained = _train(job, grid, before, sites, asked, watcher, owed)

    # 3. The sum, in five exchanges. No update is ever seen, and no sum of fewer than min_cohort.
    if job.config.study.plain_updates:
        total = _plain(job, trained)
    else:
        total = _secure(job, grid, before, sites, trained, watcher)
    charges.record_fates(job.folder, number, plan, trained, total.fates, owed)

    # 4. Step, unless there is no sum: then the adapter stays as it was.
    adapter, state = before.adapter, before.state
    if total.mean is not None:
        adapter, state = step(adapter, total.mean, job.model.layout.positions(part), state, job.config.server)
    after = Checkpoint(number, adapter, state)

    # 5. Evaluate on public records only.
    last = number == len(job.plan.rounds)
    every = job.config.evaluation.every
    due = last or (every > 0 and number % every == 0)
    sums = _measure(job, after, everything=last) if due else None

    # 6. The round is done once its checkpoint is: a crash before that runs it again, to the same end.
    event = _event(
        sums,
        number,
        plan.part.value,
        len(asked),
        len(trained.ready),
        sum(fate == "ok" for fate in total.fates.values()),
        total.mean is not None,
        time.monotonic() - began,
        total.metrics,
    )
    _finish(job, after, event)
    return after, event


@dataclass
class _Trained:
    """How training went. refused: site → why it is not ready. plain: of a study, the sum in the clear."""

    plain: PlainSum
    ready: list[int] = field(default_factory=list)
    refused: dict[int, str] = field(default_factory=dict)
    bytes_up: Counter[int] = field(default_factory=Counter)
    bytes_down: Counter[int] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Total:
    """mean: of the updates, `(part.size,)`; `None` where there is no sum. fates: of sites that were ready."""

    mean: Floats | None
    metrics: SiteMetrics | None
    fates: dict[int, str]


def _train(
    job: Job,
    grid: Grid,
    before: Checkpoint,
    sites: dict[int, int],
    asked: list[int],
    watcher: Watcher,
    owed: frozenset[int],
) -> _Trained:
    number = before.round + 1
    part = Layout.of(job.model.active(job.plan.round(number).part))
    request = wire.TrainRequest(job.run_id, number, job.plan_digest, job.model.layout.digest, before.adapter)
    trained = _Trained(PlainSum(part.size))
    deadline = job.config.server.deadline_seconds
    requests = {sites[site]: request for site in asked}
    answers = cohort.exchange(grid, requests, "train", str(number), deadline, asked, receipts=job.receipts)
    for answer in answers:
        trained.bytes_down[answer.site] += answer.bytes_down
        if isinstance(answer, cohort.Failure):
            trained.refused[answer.site] = answer.reason
        else:
            trained.bytes_up[answer.site] += answer.bytes_up
            if _is_ready(job, answer, number, part, trained.plain):
                trained.ready.append(answer.site)
            else:
                trained.refused[answer.site] = cohort.MALFORMED
        watcher.site_done(number, len(asked))
    if not trained.ready and set(trained.refused.values()) <= _REFUSALS - {StatusCode.REFUSED_REPEAT.value}:
        # Every site has said no: asking again would not change that.
        charges.record_fates(job.folder, number, job.plan.round(number), trained, {}, owed)
        codes = Counter(trained.refused.values())
        raise RoundError(
            f"no site took part in round {number}: "
            + ", ".join(f"{count} × {code}" for code, count in sorted(codes.items()))
            + ". Each site's own log says why"
        )
    return trained


def _is_ready(job: Job, answer: cohort.Reply, number: int, part: Layout, plain: PlainSum) -> bool:
    """Whether a site did as asked. The node answers for one site: not in another's name, nor to another
    question; and with its update in the clear only where the study says so."""
    match answer.message:
        case wire.Ready(site, of) if not job.config.study.plain_updates:
            return (site, of) == (answer.site, number)
        case wire.PlainUpdate(site, of, digest, vector) if job.config.study.plain_updates:
            if (site, of, digest, vector.size) != (answer.site, number, part.digest, part.size):
                return False
            if not np.isfinite(vector).all():
                return False
            plain.add(vector)
            return True
        case _:
            return False


def _secure(
    job: Job, grid: Grid, before: Checkpoint, sites: dict[int, int], trained: _Trained, watcher: Watcher
) -> _Total:
    number = before.round + 1
    plan = job.plan.round(number)
    gatherer = Gatherer(
        grid=grid,
        nodes=sites,
        config=job.config,
        run_id=job.run_id,
        roster=job.roster,
        folder=job.folder,
        receipts=job.receipts,
        stage=lambda exchange: watcher.stage(number, exchange),
    )
    context = context_of(job.run_id, before.adapter, job.plan_digest, job.model.layout.digest, number)
    gathered = gatherer.gather(policy_of(job.config, job.model, plan), trained.ready, number, context)
    trained.bytes_up.update(gathered.bytes_up)
    trained.bytes_down.update(gathered.bytes_down)
    if gathered.sum is None:
        return _Total(None, None, gathered.fates)
    return _Total(gathered.sum.mean, read_counts(job.config, plan, gathered.sum.counts), gathered.fates)


def _plain(job: Job, trained: _Trained) -> _Total:
    """In the clear, for study."""
    enough = len(trained.ready) >= (job.config.aggregation.min_cohort or 1)
    fate = "ok" if enough else "too-few"
    return _Total(trained.plain.mean() if enough else None, None, dict.fromkeys(trained.ready, fate))


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
    trained: int = 0,
    answered: int = 0,
    counted: bool = True,
    seconds: float = 0.0,
    metrics: SiteMetrics | None = None,
) -> RoundEvent:
    return RoundEvent(
        number,
        part,
        asked,
        trained,
        answered,
        counted,
        None if sums is None else sums.accuracy,
        None if sums is None or not math.isfinite(sums.mean_loss) else sums.mean_loss,
        0 if sums is None else sums.count,
        seconds,
        None if metrics is None else asdict(metrics),
    )
