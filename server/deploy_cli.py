"""`confide server kit | certificate | run | submit | status | stop | resume`: a federation at work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from common.errors import ConfigError

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="The federation's folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts.")]
Job = Annotated[
    str | None,
    typer.Option("--job", metavar="ID", help="A job's id, or its beginning. None: the newest."),
]


def kit(
    folder: Folder,
    site_id: Annotated[int, typer.Argument(metavar="SITE", help="The site's id in the roster.")],
    to: Annotated[
        Path | None,
        typer.Option(
            help="Where to: a name that ends in .tar, or a new folder.", show_default="SITE.kit.tar"
        ),
    ] = None,
) -> None:
    """Make a site's kit: roster, server address, certificate authority, policy template. No secret is in it.

    It is signed by the federation's authority, so it may travel over any channel; the site's people need the
    fingerprint over a channel of its own. Exit code 2: no such member, or the kit is there already.
    """
    from common.identity import fingerprint
    from server.federation import FederationFolder
    from server.serving import kit_of

    target = to if to is not None else Path(f"{site_id}.kit.tar")
    if target.exists():
        raise ConfigError(f"{target} is there already and is not overwritten: choose another name with --to")
    made = kit_of(FederationFolder(folder), site_id, target.name)
    if target.suffix == ".tar":
        target.write_bytes(made.tar())
    else:
        target.mkdir(parents=True)
        for name, data in made.files().items():
            (target / name).write_bytes(data)
    _say(
        f"kit: {target}, for site {site_id}, to {made.address}",
        f"next: send it; its people run confide client join FOLDER {target.name} --authority FINGERPRINT",
        f"      with the fingerprint that you read to them: {fingerprint(made.roster.authority)}",
    )


def certificate(
    folder: Folder,
    hosts: Annotated[
        list[str],
        typer.Option("--host", help="Host names of the new certificate. None: those of the old one."),
    ] = [],  # noqa: B006
    new_authority: Annotated[
        bool,
        typer.Option(
            "--new-authority", help="Also a new certificate authority; the old one stays trusted for now."
        ),
    ] = False,
    drop_old: Annotated[
        bool,
        typer.Option("--drop-old", help="Only stop trusting older authorities, once sites have new kits."),
    ] = False,
    auditor: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Only make a certificate with which an auditor looks at sites' ledgers."
        ),
    ] = None,
) -> None:
    """Renew the server's TLS certificate; or, step by step, the authority behind it.

    A new certificate under the same authority needs nothing at sites: restart confide server run. To replace
    the authority: --new-authority, send kits to all sites (confide client join), restart, --drop-old.
    """
    import datetime

    from common.identity import create_private
    from server import tls
    from server.federation import FederationFolder, load_federation

    place = FederationFolder(folder)
    files = tls.TlsFolder(place.tls)
    now = datetime.datetime.now(datetime.UTC)
    if auditor is not None:
        cert, key = tls.issue_auditor(files, auditor, now)
        for path, data in ((Path("auditor.pem"), cert), (Path("auditor.key"), key)):
            create_private(path, data)
        _say(f"auditor.pem and auditor.key: for {auditor}, with --ca {files.authority}")
        return
    if drop_old:
        _say(f"{tls.drop_old_authorities(files)} older authorities are trusted no more")
        return
    names = hosts or tls.hosts_of(files.server) or ["localhost"]  # as confide server init without --host
    tls.check_hosts(names)  # before the authority is replaced
    if new_authority:
        tls.create_authority(files, load_federation(place).federation, now)
    tls.issue_server(files, names, now)
    _say(f"{files.server}: until {tls.expires(files.server):%Y-%m-%d}; restart confide server run")


def run(folder: Folder) -> None:
    """Serve the federation until Ctrl-C or a TERM signal: SuperLink, SuperExec, the gate and the status page.

    All of them are restarted, with backoff, when they end; jobs go on from their last round. From outside
    only the gate can be reached (server.toml). Their words go to FOLDER/log, one JSON object a line. Exit
    codes: 2 a setting is wrong; 5 a secret that others may read.
    """
    from server.running import run_server

    run_server(folder)


def submit(
    folder: Folder,
    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="The job's configuration.")],
    overrides: Annotated[
        list[str], typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key.")
    ] = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Make a job: check it, load its model and public records once, and leave it for confide server run.

    Sites take part once their people have approved the bundle that is printed: send it to them, or let them
    look at it after the first question: confide client approve. Exit codes: 2 configuration, 3 data, 4 model,
    5 privacy.
    """
    import os

    from common.bundle import read_bundle
    from server.federation import FederationFolder
    from server.jobs import create_job

    def rehearse(resolved: Any) -> None:
        from server.deployed import load_public

        load_public(resolved)

    job = create_job(FederationFolder(folder), config, overrides, os.urandom, os.cpu_count() or 1, rehearse)
    digest = read_bundle(job.bundle.read_bytes()).digest
    if as_json:
        print(json.dumps({"job": job.id, "bundle": str(job.bundle), "sha256": digest}, indent=2))
        return
    _say(
        f"job: {job.id}",
        f"bundle: {job.bundle}",
        f"SHA-256: {digest}",
        "next: sites approve it (confide client approve), and confide server run starts it",
    )


def status(
    folder: Folder,
    watch: Annotated[bool, typer.Option("--watch", help="Go on showing it, until Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the federation: its processes, its sites, the job, rounds, refusals and bytes.

    Reads the federation's folder and asks SuperLink. Exit code 1: the server does not run.
    """
    from rich.live import Live

    from server.federation import FederationFolder
    from server.status import look, screen

    place = FederationFolder(folder)
    if as_json:
        found = look(place)
        print(json.dumps(found.to_json(), indent=2))
        raise typer.Exit(0 if found.serving else 1)
    console = Console(highlight=False)
    if not watch:
        found = look(place)
        console.print(screen(found))
        raise typer.Exit(0 if found.serving else 1)
    import time

    with Live(console=console, screen=False, auto_refresh=False) as live:
        while True:
            live.update(screen(look(place)), refresh=True)
            time.sleep(2)


def stop(folder: Folder, job: Job = None) -> None:
    """Stop a job after what it is doing; confide server resume goes on from its last whole round."""
    from server.federation import FederationFolder
    from server.jobs import Wanted, find_job

    found = find_job(FederationFolder(folder), job)
    found.want(Wanted.STOPPED)
    _say(f"job {found.id} is to stop")


def resume(folder: Folder, job: Job = None) -> None:
    """Go on with a job that was stopped or has ended by itself, from its last round, under the same id."""
    from server.federation import FederationFolder
    from server.jobs import Wanted, find_job

    found = find_job(FederationFolder(folder), job)
    if found.is_done():
        raise ConfigError(f"job {found.id} is done: its adapter is in {found.adapter}")
    found.ended.unlink(missing_ok=True)
    found.want(Wanted.RUNNING)
    _say(f"job {found.id} is to go on")


def _say(*lines: str) -> None:
    for line in lines:
        print(line)
