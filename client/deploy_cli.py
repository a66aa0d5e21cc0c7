"""`confide client join | approve | run`: a site takes part in a deployed federation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from client.cli_options import (
    AsJson,
    AskPassphrase,
    Folder,
    PassphraseFile,
    WitnessFile,
    print_json,
    read_passphrase,
    say,
)
from common.errors import ConfigError, PolicyRefusedError

if TYPE_CHECKING:
    from client.approval import Review

NodePort = Annotated[int, typer.Option(help="Of this machine's loopback, between node and executor.")]


def join(
    folder: Folder,
    kit: Annotated[Path, typer.Argument(metavar="KIT", help="The kit that you were sent: folder or tar.")],
    authority: Annotated[
        str | None,
        typer.Option(
            metavar="FINGERPRINT",
            help="The authority's fingerprint, as its people have read it to you. Needed the first time.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Take a kit: pin its roster, and keep the server's address and the certificate authority to trust.

    Both are signed by the authority whose fingerprint you give, so it does not matter how the kit travelled.
    A newer kit is taken the same way, without --authority. Exit codes: 2 not a kit, or this site is not in
    its roster; 6 another authority, a changed kit, or an older roster than the pinned one.
    """
    from client.identity import SiteFolder
    from client.join import join as take_part
    from client.join import load_server

    place = SiteFolder(folder)
    pinned = take_part(place, kit, authority)
    server = load_server(place)
    if as_json:
        print_json(
            {
                "federation": server.federation,
                "address": server.address,
                "site": pinned.member.id,
                "roster": pinned.roster.version,
            }
        )
        return
    say(
        f"joined: {server.federation}, roster version {pinned.roster.version}, as site {pinned.member.id}",
        f"server: {server.address}",
        f"next: say in {place.settings} where your records are, and give them a budget, once and for ever:",
        f"      confide client scope {folder} records --job JOB.fab   (or --epsilon EPSILON --delta DELTA)",
    )


def rekey(
    folder: Folder,
    passphrase_file: PassphraseFile = None,
    ask_passphrase: AskPassphrase = False,
) -> None:
    """Make new keys for this site's node and executor, after a scare or once a year. The ledger goes on.

    Send the new site.pub to the federation: confide server enroll takes it as this site's, without a new id,
    roster or kit. Then restart confide client run. The identity key stays: who loses that is enrolled anew.
    Exit codes: 2 no site's folder; 5 a key that others can read, or a wrong passphrase.
    """
    import os

    from client.identity import SiteFolder, rekey_site
    from common.identity import fingerprint

    place = SiteFolder(folder)
    card = rekey_site(place, os.urandom, read_passphrase(passphrase_file, ask_passphrase))
    say(
        f"new keys: {place.node_key} and {place.executor_secret}",
        f"fingerprint: {fingerprint(card.public)}, as before",
        f"next: send {place.card} to the federation; when they have it, restart confide client run {folder}",
    )


def approve(
    folder: Folder,
    bundle: Annotated[
        Path | None,
        typer.Argument(
            metavar="BUNDLE.fab",
            help="The job that you were sent. None: the last one that the server asked for in vain.",
            show_default=False,
        ),
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Only show it; approve nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    widen: Annotated[
        bool,
        typer.Option("--widen", help="Where your policy is narrower than the job, widen it to just that."),
    ] = False,
    passphrase_file: PassphraseFile = None,
    ask_passphrase: AskPassphrase = False,
    witness: WitnessFile = None,
    as_json: AsJson = False,
) -> None:
    """Look at a job, against the last approved one, and allow it: its code, its model, its data source.

    A job is known by the SHA-256 of its bundle: with one byte changed it is another job. What your policy
    refuses in it is listed; bounds are widened only with --widen. The new policy is signed into the ledger.
    Exit codes: 2 not a job, or no budget for your records yet; 4 its model cannot be loaded here; 5 your
    policy refuses it.
    """
    from client import approval
    from client.bundles import load_bundle, pending
    from client.identity import SiteFolder
    from client.ledger_cli import open_ledger

    place = SiteFolder(folder)
    source = bundle if bundle is not None else pending(place)
    if bundle is None and not source.exists():
        raise ConfigError("no job waits to be approved: give the bundle that you were sent")
    data, _ = load_bundle(source)
    passphrase = read_passphrase(passphrase_file, ask_passphrase)
    with open_ledger(place, passphrase, witness) as ledger:
        found = approval.review(place, data, ledger)
        if as_json:
            print_json(_fields(found))
        else:
            _show(found)
        if show:
            return
        if found.broken and not widen:
            raise PolicyRefusedError(
                f"{place.policy} does not allow this job ({len(found.broken)} bounds, listed above). Nothing "
                "was changed. Change the policy, or run this again with --widen"
            )
        if not yes and not typer.confirm("Allow this job to train on your records?", err=True):
            raise typer.Exit(1)
        approval.approve(place, data, ledger, found.wider if widen else found.policy)
    if not as_json:
        say(f"approved: job {found.bundle.job}, bundle {found.bundle.digest}")


def run(
    folder: Folder,
    port: NodePort = 9194,
    health_port: Annotated[int, typer.Option(help="gRPC health of the node, on the loopback.")] = 9195,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Take part: run this site's Flower node and its own executor until Ctrl-C or a TERM signal.

    Both are restarted, with backoff, when they end. Only the client that is installed here runs; code that
    the server sends never does. Nothing listens outside this machine's loopback. Their words go to
    FOLDER/log, one JSON object a line; what the site did and refused goes to FOLDER/site.log. Exit codes: 2
    not joined yet; 5 a secret that others may read; 7 it runs already.
    """
    from client.running import run_site

    run_site(folder, port, health_port, passphrase_file)


def health(
    health_port: Annotated[int, typer.Option(help="As of confide client run.")] = 9195,
) -> None:
    """Whether this site's node serves, by the gRPC health protocol: for probes. Exit code 1: it does not."""
    from common.health import is_serving

    well = is_serving(health_port)
    say("serving" if well else "not serving")
    if not well:
        raise typer.Exit(1)


def execute(
    folder: Folder,
    port: NodePort = 9194,
    passphrase_file: PassphraseFile = None,
) -> None:
    """The executor alone; `confide client run` starts it."""
    import logging

    from client.executor import Node, Worksites, load_secret, only_one
    from client.executor import execute as take_tasks
    from client.identity import SiteFolder
    from common.supervise import stop_on_signals

    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("confide").setLevel(logging.INFO)
    place = SiteFolder(folder)
    passphrase = read_passphrase(passphrase_file, False)
    with only_one(place):
        ended = stop_on_signals()
        node = Node(f"127.0.0.1:{port}", load_secret(place))
        take_tasks(place, node, Worksites(place, passphrase), ended.is_set)


def _fields(found: Review) -> dict[str, Any]:
    return {
        "job": found.bundle.job,
        "bundle": found.bundle.digest,
        "model": found.model,
        "source": found.source,
        "rounds": len(found.plan.rounds),
        "epsilon": found.epsilon,
        "rounds_affordable": found.affordable,
        "delta": found.plan.delta,
        "changed": [{"key": key, "before": old, "now": new} for key, old, new in found.changed],
        "refused": found.broken,
    }


def _allowed(found: Review) -> str:
    rounds = len(found.plan.rounds)
    if found.affordable == rounds:
        return f"all {rounds} rounds"
    return f"{found.affordable} of {rounds} rounds; this site will refuse the rest"


def _show(found: Review) -> None:
    out = Console(highlight=False)
    config = found.bundle.config
    table = Table(title=f"Job {found.bundle.job}", title_justify="left", show_header=False)
    table.add_column("what", no_wrap=True)
    table.add_column("value", overflow="fold")
    rows = [
        ("bundle (SHA-256)", found.bundle.digest),
        ("task", config.task.kind.value),
        ("model", config.model.name),
        ("model, as loaded here", found.model),
        ("your records", found.source),
        ("rounds", str(len(found.plan.rounds))),
        ("cost of all rounds", f"ε = {found.epsilon:.4f} at δ = {found.plan.delta:g}, for each record"),
        ("your budget allows", _allowed(found)),
        ("fewest sites in a sum", str(config.aggregation.min_cohort)),
    ]
    for row in rows:
        table.add_row(*map(escape, row))
    out.print(table)
    before = any(old for _, old, _ in found.changed)
    if found.changed and before:
        diff = Table(title="Changed since the last approved job", title_justify="left")
        for column in ("key", "before", "now"):
            diff.add_column(column, overflow="fold")
        for line in found.changed:
            diff.add_row(*map(escape, line))
        out.print(diff)
    elif found.changed:
        out.print("No job was approved here before: its whole configuration follows.")
        for key, _, now in found.changed:
            out.print(f"  {escape(key)} = {escape(now)}", soft_wrap=True)
    else:
        out.print("Nothing has changed since the last approved job.")
    for text in found.broken:
        out.print(f"[bold red]refused by your policy:[/] {escape(text)}", soft_wrap=True)
