"""`confide audit ledger`: check what sites say that they have spent, from their ledgers alone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from common.errors import ConfigError

if TYPE_CHECKING:  # the accountants take seconds to load
    from common.ledger_checks import ScopeReport
    from simulations.audit_types import Audit, Check, Outcome, SiteAudit

Roster = Annotated[
    Path | None,
    typer.Option(
        metavar="ROSTER.json", help="The federation's roster: whose key is whose.", show_default=False
    ),
]
Authority = Annotated[
    str | None,
    typer.Option(
        metavar="FINGERPRINT",
        help="Who must have signed the roster: a fingerprint, or a key in hex.",
        show_default=False,
    ),
]
Receipts = Annotated[
    Path | None,
    typer.Option(
        metavar="receipts.jsonl", help="The heads that the server has kept of every site.", show_default=False
    ),
]
Claims = Annotated[
    list[str],
    typer.Option(
        "--claim", metavar="RUN_ID:EPSILON:DELTA", help="What is claimed of a run. May be repeated."
    ),
]
NoPld = Annotated[
    bool, typer.Option("--no-pld", help="Leave out ε by privacy loss distributions, which can take seconds.")
]
Strict = Annotated[
    bool, typer.Option("--strict", help="A check that was skipped, or made in part, counts as failed.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts.")]
Report = Annotated[
    Path | None, typer.Option(metavar="FILE.html", help="Also write a page.", show_default=False)
]


def ledger(
    exports: Annotated[
        list[Path],
        typer.Argument(
            metavar="EXPORT...",
            help="Exports (JSON lines), ledger files, folders of sites, or the folder of one run.",
            show_default=False,
        ),
    ] = [],  # noqa: B006
    run: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN_FOLDER",
            help="A run: its roster, receipts and claims, and without EXPORT its sites' ledgers.",
            show_default=False,
        ),
    ] = None,
    roster: Roster = None,
    authority: Authority = None,
    receipts: Receipts = None,
    claims: Claims = [],  # noqa: B006
    no_pld: NoPld = False,
    strict: Strict = False,
    as_json: AsJson = False,
    report: Report = None,
) -> None:
    """Verify ledgers: nine numbered checks of each, offline, from the files alone; nothing is changed.

    1 format, 2 chain, 3 signatures, 4 life cycle, 5 the filter at every entry, 6 every event by two
    accountants, 7 the signed head, 8 the server's receipts, 9 the claims made for a run.

    Exit code: 0 all passed; 21 … 29 the number of the first check that failed, plus 20; 20 a ledger that
    could not be read at all; 2, 6, 7 a roster or receipts that are not what they should be.
    """
    from simulations.audit_checks import audit
    from simulations.audit_sources import find_sources, read_terms

    if not exports and run is None:
        raise ConfigError("nothing to audit: give exports, or a run's folder with --run")
    sources, folder = find_sources(exports, run)
    own = folder is not None and all(source.site is not None for source in sources)
    terms = read_terms(
        folder,
        own_sites=own,
        roster=roster,
        authority=authority,
        receipts=receipts,
        claims=claims,
        pld=not no_pld,
    )
    if not any(source.read for source in sources) and terms.run is None and not terms.receipts:
        raise ConfigError(
            f"{run or exports[0]} has no ledgers and claims no privacy: there is nothing to audit"
        )
    finish(audit(sources, terms), strict=strict, as_json=as_json, report=report)


def finish(found: Audit, *, strict: bool, as_json: bool, report: Path | None) -> None:
    """Show what was found, and exit with its code."""
    code = found.exit_code(strict)
    if report is not None:
        from common.files import write_atomically
        from simulations.audit_ledger_report import ledger_page

        write_atomically(report, ledger_page(found, strict).encode())
    if as_json:
        page = None if report is None else str(report)
        print(json.dumps({**to_json(found, strict), "report": page}, indent=2))
    else:
        _show(found, strict)
        if report is not None:
            Console(highlight=False).print(f"report: {escape(str(report))}", soft_wrap=True)
    if code:
        raise typer.Exit(code)


# JSON


def to_json(found: Audit, strict: bool) -> dict[str, Any]:
    return {
        "passed": found.exit_code(strict) == 0,
        "exit_code": found.exit_code(strict),
        "strict": strict,
        "sites": [_site_json(site) for site in found.sites],
        "run": [_check_json(check) for check in found.about_run],
        "absent": list(found.absent),
    }


def _site_json(site: SiteAudit) -> dict[str, Any]:
    scopes = [
        {
            "scope": s.scope.name,
            "target_epsilon": s.scope.target_epsilon,
            "delta": s.scope.delta,
            "order": s.scope.order,
            "budget": s.scope.budget,
            "rho": s.rho,
            "reservations": s.reservations,
            "epsilon_rdp": s.epsilon_rdp,
            "epsilon_opacus": s.second_epsilon,
            "epsilon_pld": s.epsilon_pld,
        }
        for s in site.scopes
    ]
    return {
        "origin": site.origin,
        "site": site.site,
        "name": site.member.name if site.member else None,
        "public_key": site.public or None,
        "entries": site.entries,
        "charges": dict(site.states),
        "policy_sha256": site.policy or None,
        "scopes": scopes,
        "checks": [_check_json(check) for check in site.checks],
    }


def _check_json(check: Check) -> dict[str, Any]:
    from simulations.audit_types import MEANINGS

    return {
        "number": check.number,
        "name": MEANINGS[check.number].name if check.number else "reading",
        "outcome": check.outcome.value,
        "note": check.note,
        "error": check.error or None,
    }


# For people


def _show(found: Audit, strict: bool) -> None:
    from simulations.audit_types import MEANINGS, Outcome, worst

    out = Console(highlight=False)
    checks = Table("", "check", "result", "", box=box.SIMPLE)
    for number, meaning in MEANINGS.items():
        made = [check for check in found.checks if check.number == number]
        checks.add_row(str(number), meaning.name, _coloured(worst(made)), _safe(_summary(made)))
    out.print(checks)
    heads = ("site", "entries", "data source", "ε spent", "PLD", "of", "δ", "checks")
    sites = Table(*heads, box=box.SIMPLE)
    for site in found.sites:
        passed = sum(check.outcome is Outcome.PASSED for check in site.checks)
        result = "" if passed == len(MEANINGS) else f", {_coloured(worst(site.checks))}"
        for index, cells in enumerate([_scope_cells(s) for s in site.scopes] or [("–",) * 5]):
            own = (_safe(site.called), f"{site.entries:,}") if index == 0 else ("", "")
            sites.add_row(*own, *cells, f"{passed} of {len(MEANINGS)}{result}" if index == 0 else "")
    out.print(sites)
    for check, whose in found.failures():
        name = f"check {check.number}" if check.number else "not read"
        line = f"[bold red]{name}, {check.error}[/] ({_safe(whose)}): {_safe(check.note)}"
        out.print(line, soft_wrap=True)
    if found.absent:
        out.print(f"[yellow]no ledger given of: {_sites(found.absent)}[/]", soft_wrap=True)
    out.print(_verdict(found, strict), soft_wrap=True)


def _scope_cells(report: ScopeReport) -> tuple[str, ...]:
    from common.privacy import epsilon_text

    scope, pld = report.scope, report.epsilon_pld
    by_pld = "–" if pld is None else epsilon_text(pld)
    terms = f"{scope.target_epsilon:g}", f"{scope.delta:g}"
    return _safe(scope.name), epsilon_text(report.epsilon_rdp), by_pld, *terms


def _summary(checks: list[Check]) -> str:
    """One note where it is the same for all, and otherwise how many ended how."""
    from simulations.audit_types import Outcome, endings

    notes = dict.fromkeys(check.note for check in checks if check.outcome is not Outcome.FAILED)
    if len({check.outcome for check in checks}) == 1 and len(notes) == 1:
        return next(iter(notes))
    return endings(checks)


def _safe(text: str) -> str:
    from simulations.audit_types import plain

    return escape(plain(text))


def _coloured(outcome: Outcome) -> str:
    from simulations.audit_types import Outcome

    match outcome:
        case Outcome.PASSED:
            return "[green]passed[/]"
        case Outcome.FAILED:
            return "[bold red]FAILED[/]"
        case Outcome.UNREACHED:
            return "[dim]not reached[/]"
        case _:
            return f"[yellow]{outcome.value}[/]"


def _verdict(found: Audit, strict: bool) -> str:
    code, gaps = found.exit_code(strict), ", ".join(found.gaps())
    if code and found.failures():
        return f"[bold red]FAILED[/] (exit code {code})"
    if code:
        return f"[bold red]FAILED[/] (exit code {code}), by --strict alone: {gaps}"
    if not gaps:
        return "[green]passed[/]: all nine checks of every ledger"
    return f"[green]passed[/], [yellow]as far as it was checked: {gaps}[/] (--strict: a failure)"


def _sites(numbers: Iterable[int]) -> str:
    listed = [str(number) for number in numbers]
    return ", ".join(listed[:20]) + (f" and {len(listed) - 20} more" if len(listed) > 20 else "")
