"""`confide client`: make a site's identity, pin the federation's roster, and look at both.

What a site allows is in client/policy_cli.py, what it has spent in client/ledger_cli.py, its data in
client/data_cli.py.
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from client import data_cli, deploy_cli, ledger_cli, look_cli, policy_cli
from client.cli_options import AsJson, Folder, print_json, read_passphrase, say

if TYPE_CHECKING:
    from client.identity import SiteFolder

app = typer.Typer(
    help="Set up one site: its identity, the federation that it takes part in, what it allows and has spent.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.command()(policy_cli.policy)
app.command()(ledger_cli.scope)
app.command()(ledger_cli.budget)
app.command()(ledger_cli.export)
app.command()(look_cli.serve)
app.command()(deploy_cli.join)
app.command()(deploy_cli.rekey)
app.command()(deploy_cli.approve)
app.command()(deploy_cli.run)
app.command()(deploy_cli.health)
app.command(hidden=True)(deploy_cli.execute)
app.add_typer(data_cli.app, name="data")


@app.command()
def init(
    folder: Folder,
    name: Annotated[
        str | None, typer.Option(help="The site's name. None: the folder's.", show_default=False)
    ] = None,
    passphrase_file: Annotated[
        Path | None,
        typer.Option(help="Encrypt identity.pem with the first line of this file.", show_default=False),
    ] = None,
    ask_passphrase: Annotated[
        bool, typer.Option("--ask-passphrase", help="Encrypt identity.pem; ask for the passphrase here.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make a site's identity: secret keys that never leave FOLDER, and the card to hand in.

    Send FOLDER/site.pub to the federation's people and read them the fingerprint that is printed, over a
    channel of its own, such as the telephone. Exit code 2: FOLDER has an identity already (none is ever
    overwritten), the name cannot be one, or the passphrase has fewer than 12 bytes.
    """
    import os

    from client.identity import SiteFolder, create_site
    from client.policy import STRICT
    from common.files import write_atomically

    place = SiteFolder(folder)
    passphrase = read_passphrase(passphrase_file, ask_passphrase, new=True)
    called = name if name is not None else folder.resolve().name
    card = create_site(place, called, os.urandom, passphrase, deployed=True)
    if not place.policy.exists():
        write_atomically(place.policy, STRICT.to_toml().encode())
    finger = _finger(card.public)
    if as_json:
        fields = {"name": card.name, "public": card.public.hex(), "fingerprint": finger}
        print_json({**fields, "encrypted": passphrase is not None, "files": _modes(place)})
        return
    say(
        f"site: {card.name}",
        f"fingerprint: {finger}",
        f"secret: {place.identity} ({'under a passphrase' if passphrase else 'no passphrase'}), "
        f"{place.local_key}, {place.node_key}, {place.executor_secret} (mode 0600; show them to nobody)",
        f"next: send {place.card} to the federation's people and read them the fingerprint over a channel of",
        "      its own. They send back a kit and read you theirs; then run",
        f"      confide client join {folder} KIT --authority THEIR-FINGERPRINT",
        f"policy: {place.policy} allows nothing yet: confide client policy {folder} --explain",
    )


@app.command()
def pin(
    folder: Folder,
    roster: Annotated[Path, typer.Argument(metavar="ROSTER.json", help="The roster that you were sent.")],
    authority: Annotated[
        str | None,
        typer.Option(
            metavar="FINGERPRINT",
            help="The authority's fingerprint, or its key in hex. Needed the first time.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Pin a roster: from now on this site takes part with these sites, under these keys, and no others.

    The first time, --authority says whose signature counts: take the fingerprint from the federation's
    people themselves, not from where the roster came from. It is pinned too, and later rosters must be
    signed by it and only move forward. Exit codes: 2 not a roster, or this site is not in it; 6 signed by
    another authority, or older than the pinned one.
    """
    from client import identity

    pinned = identity.pin(identity.SiteFolder(folder), roster, authority)
    if as_json:
        print_json(_describe(identity.SiteFolder(folder)))
        return
    say(
        f"pinned: {pinned.roster.federation}, roster version {pinned.roster.version}, "
        f"{_count(len(pinned.roster.members))}",
        f"authority: {_finger(pinned.roster.authority)}",
        f"this site: {pinned.member.id}, {pinned.member.name}",
    )


@app.command()
def show(folder: Folder, as_json: AsJson = False) -> None:
    """Show a site's id, name and fingerprint, what it has pinned, and whether its files are private.

    What is pinned is verified again. Nothing secret is read. Exit codes: 2 no identity there; 6 the pinned
    roster is not signed by the pinned authority.
    """
    from client.identity import SiteFolder

    fields = _describe(SiteFolder(folder))
    if as_json:
        print_json(fields)
        return
    table = Table(show_header=False)
    table.add_column("what")
    table.add_column("value", overflow="fold")
    table.add_row("site", "not enrolled here yet" if fields["id"] is None else str(fields["id"]))
    table.add_row("name", escape(fields["name"]))
    table.add_row("fingerprint", fields["fingerprint"])
    if fields["pinned"] is None:
        table.add_row("roster", "none pinned: confide client pin")
    else:
        pinned = fields["pinned"]
        table.add_row("federation", escape(pinned["federation"]))
        table.add_row("roster", f"version {pinned['version']}, {_count(pinned['members'])}")
        table.add_row("authority", pinned["authority_fingerprint"])
    for name, mode in fields["files"].items():
        exposed = name in fields["exposed"]
        note = "[bold red]others may read it: chmod 600[/]" if exposed else ""
        table.add_row(name, f"{mode or 'missing'} {note}".rstrip())
    Console(highlight=False).print(table)


def _describe(place: SiteFolder) -> dict[str, Any]:
    from client.identity import NotPinnedError, load_pinned, own_card

    card = own_card(place)
    try:
        pinned = load_pinned(place)
    except NotPinnedError:
        pinned = None
    modes = _modes(place)
    return {
        "id": pinned.member.id if pinned else None,
        "name": card.name,
        "public": card.public.hex(),
        "fingerprint": _finger(card.public),
        "pinned": {
            "federation": pinned.roster.federation,
            "version": pinned.roster.version,
            "members": len(pinned.roster.members),
            "authority": pinned.roster.authority.hex(),
            "authority_fingerprint": _finger(pinned.roster.authority),
        }
        if pinned
        else None,
        "files": modes,
        "exposed": [
            path.name
            for path in (place.identity, place.local_key, place.node_key, place.executor_secret)
            if (mode := modes[path.name]) is not None and int(mode, 8) & 0o077
        ],
    }


def _modes(place: SiteFolder) -> dict[str, str | None]:
    """Each file's permission bits in octal; None where it is missing."""
    secret = (place.identity, place.local_key, place.node_key, place.executor_secret)
    paths = (*secret, place.card, place.authority, place.roster)
    return {
        path.name: f"{stat.S_IMODE(path.stat().st_mode):04o}" if path.exists() else None for path in paths
    }


def _count(members: int) -> str:
    return f"{members:,} member{'s' if members != 1 else ''}"


def _finger(public: bytes) -> str:
    from common.identity import fingerprint

    return fingerprint(public)
