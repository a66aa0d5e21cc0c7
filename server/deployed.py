"""The ServerApp of a deployed job: it opens the job's folder and runs its rounds.

Flower starts it with a bundle that only says which job; everything else is in the federation's folder, which
the operator's processes know from CONFIDE_FEDERATION. It may be killed at any time: the next one goes on from
the newest checkpoint, under the same job id.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.superlink.grid import http_grid

from common.aggregation import setting_of
from common.config import RunConfig
from common.datasets import read_table
from common.errors import ConfideError, ConfigError
from common.evaluation import evaluate
from common.export import PrivacyClaim, export_adapter
from common.features import FeatureCache
from common.files import write_atomically
from common.models import AdaptedModel, load_model
from common.plan import make_plan, plan_digest
from common.privacy import epsilon_pld, epsilon_rdp
from common.secagg.errors import Exchange
from common.secagg.policy import Roster
from common.tables import clean
from common.targets import check_records, columns_of
from common.tasks import Examples, make_task
from common.waiting import hurry
from server.checkpoint import Checkpoint
from server.federation import FEDERATION, FederationFolder, load_federation
from server.jobs import JobFolder, find_job, write_fields
from server.receipts import Receipts
from server.record import RoundEvent
from server.report import write_report
from server.rounds import Job, run
from server.summary import summary_of

_PATIENCE_SECONDS = 30.0
app = ServerApp()
site = ClientApp()  # a bundle must name one; no site runs it


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run, or go on with, the job that the bundle names."""
    folder = FederationFolder(Path(os.environ[FEDERATION]))
    job = find_job(folder, str(context.run_config["job"]))
    # The one before may be about to end; and the keeper looks whether somebody is at work.
    with job.locked(patience=_PATIENCE_SECONDS):
        try:
            _run(folder, job, grid)
        except ConfideError as error:
            # It would fail again: the operator decides. The exit code tells what kind of failure it is.
            said = {"error": str(error), "kind": type(error).__name__, "code": error.exit_code}
            write_fields(job.ended, said)
            raise
        except Exception:
            write_fields(job.progress, {"stage": "failed", "error": traceback.format_exc(limit=-3)})
            raise


def _run(folder: FederationFolder, place: JobFolder, grid: Grid) -> None:
    if place.is_done():
        return
    began = time.monotonic()
    watcher = Progress(place, time.time)
    watcher.say("loading")
    job = open_job(folder, place, lambda live: _names(folder, live), watcher.called)
    # No answer of another site is taken in while the parts of one are waited for: that must end.
    # Each may have as long as for its whole answer.
    longest = max(job.config.server.deadline_seconds, job.config.aggregation.deadline_seconds)
    hurry(http_grid, "pull_objects", longest)
    end = run(job, grid, watcher)
    watcher.say("exporting")
    finish(job, place, end, time.monotonic() - began)


def open_job(
    folder: FederationFolder,
    place: JobFolder,
    names: Callable[[Grid], dict[int, int]],
    called: Callable[[list[int], dict[int, str]], None],
) -> Job:
    """Load the model and the public records of the job.

    Raises:
        ConfigError, DataError, ModelError: as `rehearse` would have said when the job was submitted.
    """
    config = place.load_config()

    def membership() -> Roster:
        newest = load_federation(folder)
        if not place.roster.exists() or place.roster.read_bytes() != newest.encode():
            write_atomically(place.roster, newest.encode())
        return newest.keys

    roster = membership()
    torch.set_num_threads(config.run.threads or os.cpu_count() or 1)
    model, public = load_public(config)
    plan = make_plan(config)
    return Job(
        run_id=place.id,
        folder=place,
        config=config,
        config_digest=_digest(config, model, public),
        plan=plan,
        plan_digest=plan_digest(plan),
        model=model,
        public=public,
        features=FeatureCache(),
        roster=roster,
        receipts=Receipts(folder.receipts, roster),
        membership=membership,
        names=names,
        called=called,
    )


def load_public(config: RunConfig) -> tuple[AdaptedModel, Examples]:
    """The model with its adapter, and the public records on which it is evaluated.

    Raises:
        DataError, ModelError: one of them cannot be used.
    """
    kind = config.task.kind
    task = make_task(kind, config.task.labels, config.task)
    if config.data.test is None:
        raise ConfigError("data.test must name the public records on which the server evaluates: set it")
    table, _ = clean(
        read_table(config.data.test, columns_of(config.data, kind, config.task.chat)),
        max_characters=config.data.max_characters,
    )
    check_records(kind, table, config.task.labels, config.task.range)
    model = load_model(config, task)
    return model, task.encode(table, model.tokenizer, config.model.max_length)


def _digest(config: RunConfig, model: AdaptedModel, public: Examples) -> str:
    """SHA-256, hex, of all that a resumed job must find as it was."""
    h = hashlib.sha256(b"confide/job/v1" + setting_of(config, model))
    for content in public.contents(range(len(public))):
        h.update(len(content).to_bytes(8, "little") + content)
    return h.hexdigest()


def _names(folder: FederationFolder, grid: Grid) -> dict[int, int]:
    """Live node → site, by the key with which the site was enrolled. Who is in no roster is not there."""
    enrolled = folder.nodes()
    members = load_federation(folder).keys
    live = {node.node_id: bytes(node.public_key) for node in grid.get_nodes()}
    known = {node: enrolled[key] for node, key in live.items() if key in enrolled}
    return {node: site_id for node, site_id in known.items() if site_id in members}


class Progress:
    """A Watcher that keeps `progress.json` for `confide server status`, and the times of all stages."""

    def __init__(self, place: JobFolder, clock: Callable[[], float]) -> None:
        self._place = place
        self._clock = clock
        self._fields: dict[str, Any] = {"round": 0, "present": [], "absent": {}, "answered": 0, "asked": 0}

    def say(self, stage: str, **fields: Any) -> None:
        self._fields |= {"stage": stage, "since": self._clock(), **fields}
        write_fields(self._place.progress, self._fields)

    def called(self, present: list[int], absent: dict[int, str]) -> None:
        self.say("called", present=present, absent={str(key): why for key, why in absent.items()})

    def site_done(self, round_number: int, asked: int) -> None:
        new = round_number != self._fields["round"] or self._fields["stage"] != "training"
        answered = 1 if new else self._fields["answered"] + 1
        self.say("training", round=round_number, asked=asked, answered=answered)

    def stage(self, round_number: int, exchange: Exchange) -> None:
        line = {"round": round_number, "exchange": exchange.name.lower(), "at": round(self._clock(), 3)}
        with (self._place.path / "stages.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.say(exchange.name.lower(), round=round_number)

    def round_done(self, event: RoundEvent) -> None:
        self.say("between rounds", round=event.round, answered=event.answered, asked=event.asked)


def finish(job: Job, place: JobFolder, end: Checkpoint, seconds: float) -> None:
    """Export the adapter; write receipts, report and, last, the summary: with it the job is done."""
    claim = claim_of(job)
    export_adapter(job.model, end.adapter, job.config, claim, place.adapter)
    if job.receipts is not None and job.receipts.newest:
        shutil.copyfile(job.receipts.path, place.receipts)
    summary = _summary(job, place, end, claim, seconds)
    write_report(place, summary)
    text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
    write_atomically(place.summary, text.encode())


def claim_of(job: Job) -> PrivacyClaim:
    """The most that any site was asked to charge itself in this job. What sites spent, their ledgers say."""
    most = charged(job.folder) if job.plan.private else {}
    events = max(most.values(), key=lambda found: epsilon_rdp(found, job.plan.delta), default=())
    private = job.plan.private
    return PrivacyClaim(
        epsilon_rdp=epsilon_rdp(events, job.plan.delta) if private else None,
        epsilon_pld=epsilon_pld(events, job.plan.delta) if private else None,
        delta=job.plan.delta,
        secure_aggregation=not job.config.study.plain_updates,
        read_from_data=(),
        repeatable_noise=False,
    )


def charged(folder: Any) -> dict[int, tuple[Any, ...]]:
    """Site → the events of all rounds that it may have been charged, by the server's record."""
    from common.privacy import SampledGaussianEvent

    found: dict[int, tuple[Any, ...]] = {}
    for entry in folder.site_rounds():
        events = tuple(SampledGaussianEvent.from_json(event) for event in entry.events)
        found[entry.site] = found.get(entry.site, ()) + events
    return found


def _summary(
    job: Job, place: JobFolder, end: Checkpoint, claim: PrivacyClaim, seconds: float
) -> dict[str, Any]:
    """The result for scripts, with the names that a simulation's summary has."""
    sites, delta = place.site_rounds(), job.plan.delta
    sums = evaluate(job.model, end.adapter, job.public, np.arange(len(job.public)))
    return {
        **summary_of(job.config, job.plan, claim, place.rounds(), sites, sums.scores),
        "run_id": job.run_id,
        "sites": len({entry.site for entry in sites}),
        "records_evaluated": len(job.public),
        "majority_class": None,
        "epsilon_by_site": {
            str(site): epsilon_rdp(events, delta) for site, events in sorted(charged(place).items())
        },
        "trainable_parameters": job.model.layout.size,
        "engine": "deployed",
        "wall_seconds": round(seconds, 1),
        "adapter_dir": str(place.adapter),
    }
