"""One simulation from a configuration to a usable adapter, kept in a folder of its own."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import server.app
from client.identity import SiteFolder, create_site
from client.selftest import self_test
from common import wire
from common.adapter import Layout
from common.aggregation import policy_of
from common.config import Engine, RunConfig, TaskKind
from common.errors import CheckpointError, ConfigError, RoundError
from common.evaluation import MetricSums
from common.export import PrivacyClaim, export_adapter
from common.files import write_atomically
from common.models import AdaptedModel, load_model, pick_device
from common.noise import fresh_key
from common.plan import RoundPlan, make_plan, resolve
from common.roster import Member, sign_roster
from common.secagg.keys import IdentityKey
from common.secagg.messages import (
    AdvertiseReply,
    ConsistReply,
    MaskReply,
    ShareReply,
    UnmaskReply,
    encoded_limit,
)
from common.tasks import make_task
from server.checkpoint import Checkpoint
from server.record import RunFolder
from server.report import write_report
from server.rounds import Watcher, start
from server.summary import summary_of
from simulations.engines import run_inline, run_ray
from simulations.faults import LossyGrid
from simulations.fleet import Fleet, Split, open_fleet, split_data

_ENVELOPE = 64  # bytes that a record around a message takes, about
DEMO = Path(__file__).with_name("demo.toml")


def prepare(config: RunConfig) -> tuple[RunConfig, Split]:
    """The resolved configuration and the division of the data. Touches no folder and trains nothing."""
    split = split_data(config)
    smallest = min(len(site) for site in split.sites)
    threads = config.run.threads or os.cpu_count() or 1
    device = str(pick_device(config.run.device))
    placed = config.model_copy(update={"run": config.run.model_copy(update={"device": device})})
    resolved = resolve(placed, smallest_site=smallest, labels=split.labels, threads=threads)
    return resolved, split


def rehearse(config: RunConfig, split: Split) -> None:
    """Load the model and test it before anything is written.

    Raises:
        ModelError, PrivacyError: what would stop the run stops it now, and leaves no folder behind.
    """
    torch.set_num_threads(config.run.threads)
    task = make_task(config.task.kind, split.labels, config.task)
    model = load_model(config, task)
    task.encode(
        split.public.take(range(min(100, len(split.public)))), model.tokenizer, config.model.max_length
    )
    plan = make_plan(config)
    for part in {r.part for r in plan.rounds} if plan.private else ():
        self_test(model, part)


def create_folder(runs: Path, config: RunConfig) -> RunFolder:
    """`runs/<name>-<k>` with the first free k, and `runs/<name>` pointing to it; nothing is overwritten."""
    try:
        runs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"runs cannot be kept in {runs}: {error.strerror}. Choose another --runs folder"
        ) from None
    name = config.run.name
    link = runs / name
    if link.exists() and not link.is_symlink():
        raise ConfigError(
            f"{link} is in the way: expected a link to the newest run of that name. Move it away"
        )
    number = 1
    while True:
        try:
            (runs / f"{name}-{number}").mkdir()
            break
        except FileExistsError:
            number += 1
    folder = fill_folder(runs / f"{name}-{number}", config)
    temporary = runs / f".{name}.{os.getpid()}.link"
    temporary.symlink_to(folder.path.name)
    temporary.replace(link)
    return folder


def fill_folder(path: Path, config: RunConfig) -> RunFolder:
    """Put the run's secret (mode 0600) and, last, its configuration into an empty folder."""
    folder = RunFolder(path)
    descriptor = os.open(folder.secret, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(fresh_key())
        file.flush()
        os.fsync(file.fileno())
    enrol(folder, config)
    write_atomically(folder.config, config.to_toml().encode())
    return folder


def enrol(folder: RunFolder, config: RunConfig) -> None:
    """Give every simulated site keys of its own, and all of them the signed roster."""
    members = []
    for site in range(1, config.sites.count + 1):
        card = create_site(SiteFolder(folder.site(site)), f"site-{site:04d}", os.urandom, None)
        members.append(Member(site, card.name, card.public))
    folder.witness(1, "").parent.mkdir()
    authority = IdentityKey.generate(os.urandom)  # needed once: a simulated federation never grows
    write_atomically(folder.roster, sign_roster("simulation", 1, members, (), authority).encode())


@dataclass(frozen=True)
class Outcome:
    folder: RunFolder
    summary: dict[str, Any]


def simulate(folder: RunFolder, engine: Engine, watcher: Watcher) -> Outcome:
    """Run, or go on with, the run in `folder`; leave adapter, summary and report there."""
    began = time.monotonic()
    with folder.locked():
        return _simulate(folder, engine, watcher, began)


def _simulate(folder: RunFolder, engine: Engine, watcher: Watcher, began: float) -> Outcome:
    fleet = open_fleet(folder.path.resolve())
    fleet.check_ledgers()
    job = fleet.job()
    dropout = fleet.config.sites.dropout
    app = server.app.make_app(
        lambda _: job,
        watcher,
        lambda grid: LossyGrid(grid, dropout, fleet.config.run.seed) if dropout else grid,
    )
    try:
        match engine:
            case Engine.INLINE:
                run_inline(app, folder.path.resolve(), fleet.config.sites.count)
            case Engine.RAY:
                run_ray(app, folder.path.resolve(), fleet.config.sites.count)
    except RoundError as error:
        # A deployed server could not read this; whoever simulates owns the sites.
        for log in sorted(folder.path.glob("sites/*/site.log"))[:1]:
            reason = log.read_text(encoding="utf-8").splitlines()[-1]
            raise RoundError(f"{error}. Site {int(log.parent.name)}: {reason}") from None
        raise
    end = start(job)
    if end.round != len(job.plan.rounds):
        raise CheckpointError(f"the run ended after round {end.round}; resume it: --resume {folder.path}")
    return finish(fleet, end, engine, began)


def finish(fleet: Fleet, end: Checkpoint, engine: Engine, began: float) -> Outcome:
    """Export the adapter, write the summary and the report."""
    folder, config = fleet.folder, fleet.config
    fleet.check_ledgers()
    claim = _claim(fleet)
    export_adapter(fleet.model, end.adapter, config, claim, folder.adapter)
    held_out = fleet.held_out(end.adapter)
    summary = {
        **_summary(fleet, claim, fleet.scores(end.adapter), held_out),
        "engine": engine.value,
        "wall_seconds": round(time.monotonic() - began, 1),
        "adapter_dir": str(folder.adapter),
    }
    write_atomically(folder.summary, (json.dumps(summary, indent=2, ensure_ascii=False) + "\n").encode())
    write_report(folder)
    return Outcome(folder, summary)


def _claim(fleet: Fleet) -> PrivacyClaim:
    """The worst site's spend, as its own ledger has it."""
    private = fleet.plan.private
    balances = [fleet.balance(i) for i in range(1, fleet.config.sites.count + 1)] if private else []
    return PrivacyClaim(
        epsilon_rdp=max(b.epsilon_rdp for b in balances) if balances else None,
        epsilon_pld=max(b.epsilon_pld for b in balances) if balances else None,
        delta=fleet.plan.delta,
        secure_aggregation=not fleet.config.study.plain_updates,
        read_from_data=fleet.config.privacy.read_from_data,
        repeatable_noise=fleet.config.study.noise_seed is not None,
    )


def _summary(
    fleet: Fleet, claim: PrivacyClaim, scores: dict[str, float], held_out: dict[str, MetricSums]
) -> dict[str, Any]:
    rounds = fleet.folder.rounds()
    told = summary_of(fleet.config, fleet.plan, claim, rounds, fleet.folder.site_rounds(), scores)
    by_site = {site: sums.accuracy for site, sums in held_out.items()}
    worst = min(by_site, key=lambda site: by_site[site]) if by_site else None
    return {
        **told,
        "run_id": fleet.run_id,  # as the sites' ledgers name it
        "sites": fleet.config.sites.count,
        "records_evaluated": len(fleet.public),
        "majority_class": majority_share(fleet),
        "accuracy_by_group": by_site,
        "accuracy_by_group_of": "records that each simulated site held out of training",
        "records_by_group": {site: sums.count for site, sums in held_out.items()},
        "worst_site": worst,
        "accuracy_worst_site": None if worst is None else by_site[worst],
        "epsilon_by_site": epsilon_by_site(fleet),
        "scores_initial": told["scores_initial"] | fleet.decoded(fleet.initial),
        "trainable_parameters": fleet.model.layout.size,
    }


def epsilon_by_site(fleet: Fleet) -> dict[str, float]:
    """What each site has spent, by its own ledger; empty where privacy is off."""
    if not fleet.plan.private:
        return {}
    return {str(i): fleet.balance(i).epsilon_rdp for i in range(1, fleet.config.sites.count + 1)}


def majority_share(fleet: Fleet) -> float | None:
    """The share of the commonest label among the public records: what saying always the same would reach."""
    labels = fleet.split.public.label
    if fleet.config.task.kind not in (TaskKind.SEQUENCE_CLASSIFICATION, TaskKind.IMAGE_CLASSIFICATION):
        return None
    return max(labels.count(name) for name in set(labels)) / len(labels) if labels else None


def describe(config: RunConfig, split: Split) -> dict[str, Any]:
    """The plan of a resolved configuration as numbers, before anyone spends anything."""
    plan = make_plan(config)
    model = load_model(config, make_task(config.task.kind, split.labels, config.task))
    return {
        "rounds": len(plan.rounds),
        "noise_multiplier": config.privacy.noise_multiplier,
        "sample_rate": config.privacy.sample_rate,
        "steps": sum(r.steps for r in plan.rounds),
        "batch_size": plan.rounds[-1].batch_size,
        "warmup_noise_multiplier": config.warmup.noise_multiplier if config.warmup.rounds else None,
        "warmup_sample_rate": config.warmup.sample_rate if config.warmup.rounds else None,
        "delta": plan.delta,
        "epsilon_rdp": plan.epsilon_rdp,
        "epsilon_pld": plan.epsilon_pld,
        "target_epsilon": plan.target_epsilon,
        "trainable_parameters": model.layout.size,
        "secure_aggregation": not config.study.plain_updates,
        "min_cohort": config.aggregation.min_cohort,
        "bytes_up_per_site_round": max(_bytes_up(config, model, r) for r in plan.rounds),
    }


def _bytes_up(config: RunConfig, model: AdaptedModel, plan: RoundPlan) -> int:
    """Of one site in one round, where all sites stay: the vector, and what the protocol adds to it."""
    if config.study.plain_updates:
        blank = np.zeros(Layout.of(model.active(plan.part)).size, dtype=np.float32)
        return wire.payload_bytes(wire.encode(wire.PlainUpdate(1, 1, "0" * 64, blank)))
    policy = policy_of(config, model, plan)
    ready = wire.payload_bytes(wire.encode(wire.Ready(1, 1)))
    replies = (AdvertiseReply, ShareReply, MaskReply, ConsistReply, UnmaskReply)
    limits = [encoded_limit(kind, policy.n_max, policy.words, policy.ring_bits) for kind in replies]
    return ready + sum(limits) + len(replies) * _ENVELOPE
