"""Jobs of a federation: one folder each, and what the operator wants of it.

    jobs/ID/job.fab        the bundle that sites approve: the same bytes as long as the job lives
    jobs/ID/config.toml    the resolved configuration, with the server's own paths
    jobs/ID/wanted.json    whether it should run; `confide server run` sees to it
    jobs/ID/progress.json  where it is, as its ServerApp has said last
    jobs/ID/ended.json     why it does not go on by itself

and what every run has: checkpoints, events, in the end summary, report and adapter (server/record.py). ID is
the run id of ledgers and messages. Flower's own run ids change with every restart and mean nothing here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.bundle import make_bundle
from common.config import RunConfig, load_config, refuse_study
from common.errors import CheckpointError, ConfigError
from common.files import write_atomically
from server.federation import FederationFolder, load_federation
from server.record import RunFolder

if TYPE_CHECKING:  # it loads torch, and who only looks at jobs needs none
    from common.plan import Plan

_ID = re.compile(r"[0-9a-f]{16}")


class Wanted(Enum):
    RUNNING = "running"
    STOPPED = "stopped"


class Standing(Enum):
    """What has become of a job."""

    QUEUED = "queued"  # another runs, or the server is down
    RUNNING = "running"
    STOPPED = "stopped"  # the operator has said so
    ENDED = "ended"  # it cannot go on by itself: see ended.json
    DONE = "done"
    DAMAGED = "damaged"  # its folder cannot be read


@dataclass(frozen=True)
class JobFolder(RunFolder):
    """A run's folder, and what a deployed job has besides."""

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def bundle(self) -> Path:
        return self.path / "job.fab"

    @property
    def wanted(self) -> Path:
        return self.path / "wanted.json"

    @property
    def progress(self) -> Path:
        return self.path / "progress.json"

    @property
    def ended(self) -> Path:
        return self.path / "ended.json"

    def wants(self) -> Wanted:
        return Wanted(read_fields(self.wanted).get("state", Wanted.STOPPED.value))

    def want(self, state: Wanted) -> None:
        write_fields(self.wanted, {"state": state.value})

    def is_done(self) -> bool:
        return self.summary.exists()

    def standing(self, running: bool) -> Standing:
        """running: whether its ServerApp is at work now."""
        if self.is_done():
            return Standing.DONE
        if running:
            return Standing.RUNNING
        if self.ended.exists():
            return Standing.ENDED
        return Standing.QUEUED if self.wants() is Wanted.RUNNING else Standing.STOPPED


def read_fields(path: Path) -> dict[str, Any]:
    """A small JSON object; empty where there is none."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError:
        raise CheckpointError(f"{path} is damaged: restore it, or remove it") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is no JSON object: restore it, or remove it")
    return found


def write_fields(path: Path, fields: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(fields, indent=1, ensure_ascii=False).encode() + b"\n")


def all_jobs(folder: FederationFolder) -> list[JobFolder]:
    """In the order in which they were submitted."""
    found = [JobFolder(path) for path in folder.jobs.glob("*") if _ID.fullmatch(path.name)]
    whole = [job for job in found if job.wanted.exists()]

    def submitted(job: JobFolder) -> tuple[int, str]:
        # A damaged job has its place too: who lists jobs must not fail because of one.
        return (job.bundle.stat().st_mtime_ns if job.bundle.exists() else 0), job.id

    return sorted(whole, key=submitted)


def find_job(folder: FederationFolder, said: str | None) -> JobFolder:
    """The job whose id begins so; without one, the newest.

    Raises:
        ConfigError: none does, or more than one.
    """
    jobs = all_jobs(folder)
    found = jobs[-1:] if said is None else [job for job in jobs if job.id.startswith(said)]
    if len(found) != 1:
        known = ", ".join(job.id for job in jobs) or "none"
        raise ConfigError(f"expected one job {said or ''}, found {len(found)}; the federation has {known}")
    return found[0]


# Making one


def prepare_job(config: RunConfig, sites: int, threads: int) -> tuple[RunConfig, Plan]:
    """The resolved configuration of a deployed job for so many sites, and its plan.

    The server sees no site's records, so what a simulation reads from them must be said.

    Raises:
        ConfigError, PrivacyError: what is missing, or does not hold.
    """
    from common.plan import make_plan, resolve

    refuse_study(config)
    if config.data.train is not None or config.data.sample is not None:
        raise ConfigError(
            "data.train and data.sample are for simulations: each site names its own records in its "
            "site.toml. Leave them out"
        )
    if config.data.test is None:
        raise ConfigError("data.test must name the public records on which the server evaluates: set it")
    if config.task.kind.needs.names and not config.task.labels:
        raise ConfigError("task.labels must name the labels: the server cannot read them from sites' records")
    nominal = config.privacy.nominal_records
    if nominal is None:
        raise ConfigError(
            "privacy.nominal_records must be set: the number of records that each site is publicly said to "
            "hold, at least"
        )
    counted = config.model_copy(update={"sites": config.sites.model_copy(update={"count": sites})})
    resolved = resolve(counted, smallest_site=nominal, labels=config.task.labels, threads=threads)
    return resolved, make_plan(resolved)


def create_job(
    folder: FederationFolder,
    config: Path,
    overrides: list[str],
    random_bytes: Callable[[int], bytes],
    threads: int,
    rehearse: Callable[[RunConfig], None],
) -> JobFolder:
    """A new job that waits for `confide server run`. rehearse: raises what would stop it, before it is there.

    Raises:
        ConfigError, PrivacyError, DataError, ModelError: nothing is left behind.
    """
    roster = load_federation(folder)
    resolved, _ = prepare_job(load_config(config, overrides), len(roster.members), threads)
    rehearse(resolved)
    job = random_bytes(8).hex()
    bundle = make_bundle(job, resolved)
    made = JobFolder(folder.jobs / job)
    made.path.mkdir(parents=True, mode=0o700)
    write_atomically(made.config, resolved.to_toml().encode())
    write_atomically(made.roster, roster.encode())
    write_atomically(made.bundle, bundle)
    made.want(Wanted.RUNNING)  # last: before, it is no job
    return made
