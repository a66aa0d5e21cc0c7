"""What an operator wants to know, from the federation's folder and SuperLink: never from a site."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from common.errors import ConfideError
from common.health import is_serving
from server.federation import FederationFolder, load_federation
from server.jobs import JobFolder, Standing, all_jobs, read_fields
from server.receipts import read_receipts
from server.settings import load_server_settings
from server.superlink import NodeInfo, SuperLink
from server.tls import TlsFolder, expires


@dataclass(frozen=True)
class SiteStatus:
    """One member. node: online, offline, registered (never seen), or unknown while SuperLink is away.

    absent: why it took no part in the last roll call. fate: of its last round. receipts: entries of
    its ledger that the server has a signed head over.
    """

    id: int
    name: str
    node: str
    last_seen: str
    absent: str
    fate: str
    rounds: int  # in whose sum it was
    bytes_up: int
    bytes_down: int
    receipts: int


@dataclass(frozen=True)
class JobStatus:
    """One job. stage and since (seconds of the clock): what its ServerApp has said last."""

    id: str
    name: str
    standing: str
    round: int
    rounds: int
    stage: str
    since: float
    answered: int
    asked: int
    accuracy: list[float | None]
    loss: list[float | None]
    counted: list[bool]
    ended: str  # why it does not go on by itself


@dataclass(frozen=True)
class ServerStatus:
    """serving: it was started, and SuperLink answers. healthy: what each of Flower's programs says itself."""

    federation: str
    serving: bool
    healthy: dict[str, bool]
    processes: dict[str, int]
    restarts: dict[str, int]
    certificate_until: str
    roster_version: int
    sites: list[SiteStatus]
    jobs: list[JobStatus]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def look(folder: FederationFolder) -> ServerStatus:
    """As it is now. Raises what `load_federation` raises; what SuperLink does not tell is unknown."""
    roster = load_federation(folder)
    serving = read_fields(folder.serving_file)
    nodes, running = _superlink(folder)
    jobs = all_jobs(folder)
    known = {folder.nodes().get(node.public, 0): node for node in nodes or ()}
    newest = {head.site: head.seq for head in read_receipts(folder.receipts)}
    recorded, absent = [], {}
    for job in jobs:  # of the last that can be read, the roll call; `_job` says which cannot
        with contextlib.suppress(ConfideError, OSError):
            recorded += job.site_rounds()
            absent = read_fields(job.progress).get("absent", {})
    sites = []
    for member in roster.members:
        node = known.get(member.id)
        own = [entry for entry in recorded if entry.site == member.id]
        sites.append(
            SiteStatus(
                id=member.id,
                name=member.name,
                node=node.status if node else ("registered" if nodes is not None else "unknown"),
                last_seen=node.last_seen if node else "",
                absent=str(absent.get(str(member.id), "")),
                fate=own[-1].status if own else "",
                rounds=sum(entry.status == "ok" for entry in own),
                bytes_up=sum(entry.bytes_up for entry in own),
                bytes_down=sum(entry.bytes_down for entry in own),
                receipts=newest.get(member.id, 0),
            )
        )
    return ServerStatus(
        federation=roster.federation,
        serving=bool(serving) and nodes is not None,
        healthy=_healthy(folder),
        processes=serving.get("pids", {}),
        restarts=serving.get("restarts", {}),
        certificate_until=f"{expires(TlsFolder(folder.tls).server):%Y-%m-%d}",
        roster_version=roster.version,
        sites=sites,
        jobs=[_job(job, running) for job in jobs],
    )


def _healthy(folder: FederationFolder) -> dict[str, bool]:
    local = load_server_settings(folder.settings).local
    ports = {"superlink": local.health_port, "superexec": local.superexec_health_port}
    return {name: is_serving(port) for name, port in ports.items()}


def _superlink(folder: FederationFolder) -> tuple[list[NodeInfo] | None, set[str]]:
    """The nodes, and the hashes of the bundles that run; None while it is away."""
    settings = load_server_settings(folder.settings)
    address = f"127.0.0.1:{settings.local.superlink_port}"
    with contextlib.suppress(ConfideError):
        link = SuperLink(address, TlsFolder(folder.tls).authority, timeout=3.0)
        try:
            return link.nodes(), set(link.unfinished().values())
        finally:
            link.close()
    return None, set()


def _job(job: JobFolder, running: set[str]) -> JobStatus:
    try:
        return _whole_job(job, running)
    except (ConfideError, OSError) as error:
        standing = Standing.DAMAGED.value
        return JobStatus(job.id, "", standing, 0, 0, "", 0.0, 0, 0, [], [], [], str(error))


def _whole_job(job: JobFolder, running: set[str]) -> JobStatus:
    at_work = hashlib.sha256(job.bundle.read_bytes()).hexdigest() in running
    progress, ended, rounds = read_fields(job.progress), read_fields(job.ended), job.rounds()
    config = job.load_config()
    return JobStatus(
        id=job.id,
        name=config.run.name,
        standing=job.standing(at_work).value,
        round=rounds[-1].round if rounds else 0,
        rounds=config.warmup.rounds + config.run.rounds,
        stage=str(progress.get("stage", "")),
        since=float(progress.get("since", 0.0)),
        answered=int(progress.get("answered", 0)),
        asked=int(progress.get("asked", 0)),
        accuracy=[event.accuracy for event in rounds],
        loss=[event.loss for event in rounds],
        counted=[event.counted for event in rounds],
        ended=str(ended.get("error", "")),
    )


def screen(found: ServerStatus, clock: Callable[[], float] = time.time) -> Group:
    """For the terminal."""
    head = Table(title=found.federation, title_justify="left", show_header=False)
    head.add_column("what")
    head.add_column("value", overflow="fold")
    said = "at work" if found.serving else "[bold red]not running: confide server run[/]"
    ill = ", ".join(name for name, healthy in found.healthy.items() if not healthy)
    if found.serving and ill:
        said += f"; [bold red]not healthy: {ill}[/]"
    again = ", ".join(f"{name} ×{count}" for name, count in found.restarts.items() if count)
    head.add_row("server", said + (f"; restarted: {escape(again)}" if again else ""))
    head.add_row("certificate", f"until {found.certificate_until}")
    head.add_row("roster", f"version {found.roster_version}, {len(found.sites)} members")
    sites = Table(title="Sites", title_justify="left")
    for column in ("id", "name", "node", "last round", "in sums", "up", "down", "ledger"):
        sites.add_column(
            column, justify="right" if column in ("id", "in sums", "up", "down", "ledger") else "left"
        )
    for site in found.sites:
        fate = site.absent or site.fate or "–"
        colour = "red" if site.absent or (site.fate and site.fate != "ok") else "default"
        sites.add_row(
            str(site.id),
            escape(site.name),
            site.node,
            f"[{colour}]{escape(fate)}[/]",
            str(site.rounds),
            size(site.bytes_up),
            size(site.bytes_down),
            f"{site.receipts:,}",
        )
    jobs = Table(title="Jobs", title_justify="left")
    for column in ("job", "name", "standing", "round", "at", "metric"):
        jobs.add_column(column, overflow="fold")
    for job in found.jobs:
        at = job.stage
        if job.standing == Standing.RUNNING.value:
            at = f"{job.stage}, {max(0.0, clock() - job.since):.0f} s"
            if job.stage == "training":
                at += f", {job.answered} of {job.asked} answered"
        measured = [value for value in job.accuracy if value is not None]
        jobs.add_row(
            job.id,
            escape(job.name),
            job.standing + (f": {escape(job.ended)}" if job.ended else ""),
            f"{job.round}/{job.rounds}",
            escape(at),
            f"{measured[-1]:.3f}" if measured else "–",
        )
    return Group(head, sites, jobs)


def refusals(found: ServerStatus) -> Counter[str]:
    """How many sites stand at each code other than "ok"."""
    return Counter(
        site.absent or site.fate for site in found.sites if (site.absent or site.fate) not in ("", "ok")
    )


def size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{count / 1e3:.1f} kB"
