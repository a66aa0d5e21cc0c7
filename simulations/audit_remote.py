"""`confide audit remote`: look at the ledgers of many sites over the network, and check each of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.errors import ConfigError
from simulations.audit_ledger import (
    AsJson,
    Authority,
    Claims,
    NoPld,
    Receipts,
    Report,
    Roster,
    Strict,
    finish,
)

if TYPE_CHECKING:
    from common.roster import SignedRoster


def remote(
    sites: Annotated[
        list[str],
        typer.Argument(
            metavar="SITE=HOST:PORT...",
            help="Each site's id (or, with --roster, its name) and where it is shown.",
            show_default=False,
        ),
    ],
    ca: Annotated[Path, typer.Option(help="The authority that has certified the sites' servers, PEM.")],
    cert: Annotated[Path, typer.Option(help="Your own certificate, PEM, which the sites ask for.")],
    key: Annotated[Path, typer.Option(help="Its private key, PEM, mode 0600.")],
    receipts: Receipts = None,
    roster: Roster = None,
    authority: Authority = None,
    claims: Claims = [],  # noqa: B006
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep the exports here. One that is there already must be the beginning of the new one.",
            show_default=False,
        ),
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, max=600, help="Seconds for each call of a site.")] = 60.0,
    no_pld: NoPld = False,
    strict: Strict = False,
    as_json: AsJson = False,
    report: Report = None,
) -> None:
    """Fetch the ledgers of many sites at once (confide client serve), and audit them as `ledger` does.

    Besides, what a site shows must agree: its head lies in its export, and the totals it states are those
    of its entries. A site that cannot be reached is reported, and the others are audited. The exit codes
    are those of confide audit ledger; 20 also where a site could not be looked at.
    """
    from client.identity import MAX_PEM_BYTES
    from client.look import MAX_CERTIFICATES_BYTES, Certificates
    from common.identity import read_limited, read_private
    from simulations.audit_checks import audit
    from simulations.audit_fetch import fetch_all, keep, kept_before, source_of
    from simulations.audit_sources import read_terms

    terms = read_terms(
        None,
        own_sites=False,
        roster=roster,
        authority=authority,
        receipts=receipts,
        claims=claims,
        pld=not no_pld,
    )
    addresses = _addresses(sites, terms.roster)
    own = Certificates(
        chain=read_limited(cert, MAX_CERTIFICATES_BYTES),
        key=read_private(key, MAX_PEM_BYTES),
        authority=read_limited(ca, MAX_CERTIFICATES_BYTES),
    )
    looks = fetch_all(addresses, own, timeout)
    sources = [source_of(look, kept_before(out, look.site)) for look in looks]
    found = audit(sources, terms)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        for look, site in zip(looks, found.sites, strict=True):
            keep(out, look, site)
    finish(found, strict=strict, as_json=as_json, report=report)


def _addresses(texts: list[str], roster: SignedRoster | None) -> dict[int, str]:
    """Site → HOST:PORT. Raises ConfigError."""
    names = {member.name: member.id for member in roster.members} if roster else {}
    found: dict[int, str] = {}
    for text in texts:
        name, _, address = text.partition("=")
        site = names.get(name) or (int(name) if name.isdecimal() else 0)
        if not site or not address.rpartition(":")[2].isdecimal():
            raise ConfigError(
                f"expected SITE=HOST:PORT, as 3=site.example:7443, found {text!r:.100}; sites are named as "
                "in --roster"
            )
        if site in found:
            raise ConfigError(f"site {site} is there twice: leave one of the two out")
        found[site] = address
    return found
