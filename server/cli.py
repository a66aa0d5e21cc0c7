"""`confide server`: found a federation, enroll its sites, and look at its roster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from server import deploy_cli

if TYPE_CHECKING:
    from common.roster import Member, SignedRoster

app = typer.Typer(
    help="Found a federation and keep its roster: who takes part, under which key.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.command()(deploy_cli.kit)
app.command()(deploy_cli.certificate)
app.command()(deploy_cli.run)
app.command()(deploy_cli.submit)
app.command()(deploy_cli.status)
app.command()(deploy_cli.stop)
app.command()(deploy_cli.resume)

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="The federation's folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts.")]


@app.command()
def init(
    folder: Folder,
    name: Annotated[
        str | None,
        typer.Option(help="The federation's name, for people. None: the folder's.", show_default=False),
    ] = None,
    hosts: Annotated[
        list[str],
        typer.Option(
            "--host",
            metavar="HOST",
            help="A host name or address by which sites reach this server; may be repeated.",
            show_default="this machine alone",
        ),
    ] = [],  # noqa: B006
    port: Annotated[
        int, typer.Option(help="Of the gate; the four after it are used on the loopback.")
    ] = 9092,
    as_json: AsJson = False,
) -> None:
    """Make a federation: its authority's key, an empty signed roster, and TLS for its server.

    FOLDER/authority.key (mode 0600) decides who is in the federation: back it up and show it to nobody. Read
    the fingerprint that is printed to every site's people over a channel of its own, such as the telephone;
    they pin it. Exit code 2: the folder has a federation already, or the name or a host cannot be one.
    """
    import datetime
    import os

    from server.federation import FederationFolder, create_federation
    from server.serving import create_serving

    place = FederationFolder(folder)
    roster = create_federation(place, name if name is not None else folder.resolve().name, os.urandom)
    create_serving(place, roster.federation, hosts, port, os.urandom, datetime.datetime.now(datetime.UTC))
    if as_json:
        _print_json(_roster_fields(roster))
        return
    _say(
        f"federation: {roster.federation}, roster version 0",
        f"authority: {_finger(roster.authority)}",
        f"secret: {place.authority} (mode 0600; back it up, show it to nobody)",
        "next: read the authority's fingerprint to every site's people over a channel of its own, and enroll",
        f"      their cards: confide server enroll SITE.pub --federation {folder}",
    )


@app.command()
def enroll(
    card: Annotated[Path, typer.Argument(metavar="SITE.pub", help="The card that the site has sent.")],
    federation: Annotated[
        Path, typer.Option(metavar="FOLDER", help="The federation's folder.", show_default=False)
    ],
    site_id: Annotated[
        int | None,
        typer.Option(
            "--id", help="The site's id. None: one above the highest ever used.", show_default=False
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Add a site to the roster and sign the next version; or take a member's new card (confide client rekey).

    The card must prove that its sender has the key. That it is the right sender, only people can say:
    compare the printed fingerprint with the one that the site's people read from `confide client show`.
    Exit codes: 2 the card is none, or the key, name or id is taken; 5 authority.key is readable by others;
    6 the card's proof does not hold.
    """
    from common.identity import load_card
    from server.federation import FederationFolder, enroll_site, load_federation, renew_node

    place = FederationFolder(federation)
    read = load_card(card)
    renewed = renew_node(place, read) if site_id is None else None
    if renewed is not None and not as_json:
        _say(
            f"renewed: the node of site {renewed.id}, {renewed.name}; the roster stays, nobody needs a kit",
            f"fingerprint: {_finger(renewed.public)}",
            "next: its people restart confide client run; its old node can connect no more",
        )
        return
    member, roster = (renewed, load_federation(place)) if renewed else enroll_site(place, read, site_id)
    if as_json:
        _print_json({**_member_fields(member), "federation": roster.federation, "version": roster.version})
        return
    _say(
        f"enrolled: site {member.id}, {member.name}",
        f"fingerprint: {_finger(member.public)} (compare it with what the site's people read out)",
        f"roster: {place.roster}, version {roster.version}, {_count(roster)}",
        f"next: make the site's kit with confide server kit {federation} {member.id}, and send it;",
        f"      read its people the authority's fingerprint: {_finger(roster.authority)}",
        "      sites that have joined take the new roster from a new kit, or with confide client pin",
    )


@app.command("roster")
def show_roster(folder: Folder, as_json: AsJson = False) -> None:
    """Show the members, the retired ids, and the fingerprints to compare.

    The file is checked first: it must be signed by the authority in FOLDER. Exit code 6: it is not.
    """
    from server.federation import FederationFolder, load_federation

    roster = load_federation(FederationFolder(folder))
    if as_json:
        _print_json(_roster_fields(roster))
        return
    table = Table(
        title=f"{roster.federation}, roster version {roster.version}, {_count(roster)}", title_justify="left"
    )
    table.add_column("id", justify="right")
    for column in ("name", "fingerprint", "standing"):
        table.add_column(column, overflow="fold")
    rows = [(one, "member") for one in roster.members] + [(one, "retired") for one in roster.retired]
    for one, standing in sorted(rows, key=lambda row: row[0].id):
        table.add_row(str(one.id), escape(one.name), _finger(one.public), standing)
    Console(highlight=False).print(table)
    _say(f"authority: {_finger(roster.authority)}")


@app.command()
def revoke(
    folder: Folder,
    site_id: Annotated[int, typer.Option("--id", help="The site's id.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Take a site out of the roster and sign the next version. Its id and key are never used again.

    It counts at a site once that site has pinned the new roster, so send it to all. A site that goes on
    under a new key runs `confide client init` in a new folder and is enrolled again. Exit code 2: no such
    member.
    """
    from server.federation import FederationFolder, revoke_site

    place = FederationFolder(folder)
    member, roster = revoke_site(place, site_id)
    if as_json:
        _print_json({**_member_fields(member), "federation": roster.federation, "version": roster.version})
        return
    _say(
        f"revoked: site {member.id}, {member.name}",
        f"roster: {place.roster}, version {roster.version}, {_count(roster)}",
        f"next: send {place.roster.name} to every site, which runs confide client pin",
    )


def _count(roster: SignedRoster) -> str:
    count = len(roster.members)
    return f"{count:,} member{'s' if count != 1 else ''}, {len(roster.retired):,} retired"


def _finger(public: bytes) -> str:
    from common.identity import fingerprint

    return fingerprint(public)


def _member_fields(member: Member) -> dict[str, Any]:
    return {
        "id": member.id,
        "name": member.name,
        "public": member.public.hex(),
        "fingerprint": _finger(member.public),
    }


def _roster_fields(roster: SignedRoster) -> dict[str, Any]:
    return {
        "federation": roster.federation,
        "version": roster.version,
        "authority": roster.authority.hex(),
        "authority_fingerprint": _finger(roster.authority),
        "members": [_member_fields(member) for member in roster.members],
        "retired": [_member_fields(member) for member in roster.retired],
    }


def _say(*lines: str) -> None:
    """Plain lines: nothing in them is markup, and none is wrapped, so that they can be copied."""
    for line in lines:
        print(line)


def _print_json(fields: dict[str, Any]) -> None:
    print(json.dumps(fields, indent=2))
