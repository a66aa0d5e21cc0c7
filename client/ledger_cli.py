"""`confide client scope | budget | export`: what a site may spend, and what it has spent.

Commands that only look read the ledger without opening it for writing; the site may go on meanwhile.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

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
from common.errors import ConfigError

if TYPE_CHECKING:  # the accountants take a second to load
    from client.budget import SourceBudget
    from client.identity import SiteFolder
    from client.ledger import Ledger
    from client.ledger_view import LedgerView
    from common.privacy import SampledGaussianEvent

_BAR = 40  # characters
_EXPORT_BEGINS = b'{"format":"confide-ledger"'


def scope(
    folder: Folder,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Your name for these records.")],
    epsilon: Annotated[
        float | None,
        typer.Option(help="ε of one record, over everything, for ever. None: that of --job."),
    ] = None,
    delta: Annotated[
        float | None,
        typer.Option(help="δ of the same guarantee: below one over the records. None: that of --job."),
    ] = None,
    inherits: Annotated[
        str, typer.Option(metavar="A,B", help="Data sources that may hold some of the same records.")
    ] = "",
    note: Annotated[str, typer.Option(help="A sentence for whoever audits the ledger.")] = "",
    planned: Annotated[
        list[str],
        typer.Option(
            metavar="Q,SIGMA,STEPS",
            help="Sample rate, noise multiplier and steps of a planned run: the budget then serves it best. "
            "May be repeated; confide plan prints it.",
        ),
    ] = [],  # noqa: B006
    job: Annotated[
        Path | None,
        typer.Option(
            metavar="BUNDLE.fab",
            help="A deployed job that these records are to serve: the budget then just holds all its rounds.",
            show_default=False,
        ),
    ] = None,
    passphrase_file: PassphraseFile = None,
    ask_passphrase: AskPassphrase = False,
    witness: WitnessFile = None,
    as_json: AsJson = False,
) -> None:
    """Open a data source: give these records a budget, once and for ever, as a signed entry of the ledger.

    A budget belongs to records, not to a file, a run or a model. Records that are in no other data source
    need no --inherits, and the entry is the site's signed statement that they are not. Exit codes: 2 no
    roster is pinned yet; 5 the name is open with other terms, or overlapping data have spent too much.
    """
    from client.identity import SiteFolder
    from client.policy import Source

    place = SiteFolder(folder)
    others = tuple(part.strip() for part in inherits.split(",") if part.strip())
    events = [_planned(text) for text in planned]
    if job is not None:
        from client.bundles import load_bundle
        from common.plan import make_plan

        plan = make_plan(load_bundle(job)[1].config)
        events += plan.events
        epsilon = plan.target_epsilon if epsilon is None else epsilon
        delta = plan.delta if delta is None else delta
    if epsilon is None or delta is None:
        raise ConfigError("a budget needs --epsilon and --delta, or --job, whose terms it then takes")
    with open_ledger(place, read_passphrase(passphrase_file, ask_passphrase), witness) as ledger:
        opened = ledger.open_scope(
            name, target_epsilon=epsilon, delta=delta, planned=events, inherits=others, note=note
        )
    lines = _source_lines(name, Source(target_epsilon=epsilon, delta=delta, inherits=others))
    if as_json:
        terms = {"name": name, "target_epsilon": epsilon, "delta": delta, "inherits": list(others)}
        print_json({**terms, "order": opened.order, "budget": opened.budget, "policy_toml": lines})
        return
    say(
        f"open: data source {name}, ε = {epsilon:g} at δ = {delta:g} for each of its records, for ever",
        f"rule: a Rényi filter at order {opened.order:g}",
        "next: allow it in policy.toml, then put that in force with confide client policy --set:",
        *lines.splitlines(),
    )


def budget(
    folder: Folder,
    only: Annotated[
        str | None,
        typer.Option("--scope", metavar="NAME", help="Only this data source.", show_default=False),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write a page.", show_default=False)
    ] = None,
    witness: WitnessFile = None,
    as_json: AsJson = False,
) -> None:
    """Show what is spent, reserved and left of each data source, and how many more rounds that is.

    ε is counted at the order that was fixed when the data source was opened: only that decides what is
    allowed. The whole ledger is verified before a number is shown, and nothing is changed. Exit codes: 2 no
    ledger there; 5 the ledger is damaged, another site's, or older than its witness.
    """
    from client.budget import budgets
    from client.identity import SiteFolder
    from client.ledger_view import look
    from common.files import write_atomically

    place = SiteFolder(folder)
    view = look(place, witness)
    found = budgets(view.history, only)
    if html is not None:
        from client.budget_report import budget_page

        write_atomically(html, budget_page(_name(place), view, found).encode())
    if as_json:
        print_json(
            {
                "folder": str(folder),
                "site": view.site,
                "entries": len(view.entries),
                "witness": "missing" if view.witness is None else "intact",
                "sources": [_budget_json(one) for one in found],
                "html": None if html is None else str(html),
            }
        )
        return
    _show_budget(place, view, found)
    if html is not None:
        print(f"page: {html}")


def export(
    folder: Folder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write, as JSON lines.")],
    passphrase_file: PassphraseFile = None,
    ask_passphrase: AskPassphrase = False,
    witness: WitnessFile = None,
    as_json: AsJson = False,
) -> None:
    """Write the ledger for an auditor: every signed entry, the policies too, and nothing computed from data.

    The signed head comes from the witness, so that no secret is needed. Where there is none the identity
    signs it, and its passphrase may be asked for. Exit codes: as of confide client budget; 2 also if OUT is
    something else than an export.
    """
    from client.identity import SiteFolder, load_identity
    from client.ledger_view import look
    from common.files import write_atomically
    from common.ledger_checks import export_ledger
    from common.ledger_head import SignedHead

    place = SiteFolder(folder)
    view = look(place, witness)
    _check_replaceable(out, place)
    head = view.head
    if head is None:
        identity = load_identity(place.identity, read_passphrase(passphrase_file, ask_passphrase))
        head = SignedHead.sign(view.site, view.entries[-1], identity)
    data = export_ledger(view.entries, head)
    write_atomically(out, data)
    if as_json:
        size = {"entries": len(view.entries), "bytes": len(data)}
        print_json({"file": str(out), "site": view.site, **size, "head": head.encode().hex()})
        return
    say(f"export: {out}, {len(view.entries):,} entries of site {view.site}, {len(data):,} bytes")


# The site's folder


def _name(place: SiteFolder) -> str:
    from client.identity import own_card

    return own_card(place).name


def open_ledger(place: SiteFolder, passphrase: bytes | None, witness: Path | None) -> Ledger:
    """For writing. Its site's id comes from the ledger itself, or, for a new one, from the pinned roster."""
    from client.identity import load_identity, load_pinned
    from client.ledger import Ledger
    from client.ledger_view import look

    identity = load_identity(place.identity, passphrase)
    site = look(place, witness).site if place.ledger.is_file() else load_pinned(place).member.id
    return Ledger(place.ledger, identity, site, witness=place.witness if witness is None else witness)


def _check_replaceable(out: Path, place: SiteFolder) -> None:
    """An export may take the place of an older one, and of nothing else: not of a ledger or a key, say."""
    if out.exists():
        with out.open("rb") as file:
            begins = file.read(len(_EXPORT_BEGINS))
        if begins != _EXPORT_BEGINS:
            raise ConfigError(f"{out} is there already, and is no export of a ledger: choose another name")


def _planned(text: str) -> SampledGaussianEvent:
    from common.privacy import SampledGaussianEvent

    try:
        rate, noise, steps = text.split(",")
        return SampledGaussianEvent(float(rate), float(noise), int(steps), 1.0, 1)
    except ValueError:
        raise ConfigError(
            f"--planned expects sample rate, noise multiplier and steps, as 0.05,0.9,60: found {text!r}"
        ) from None


def _source_lines(name: str, source: Any) -> str:
    import tomli_w

    return tomli_w.dumps({"sources": {name: source.model_dump(mode="json")}}).strip()


def _rounds_text(found: SourceBudget) -> str:
    from client.budget import MOST_ROUNDS

    if found.last is None:
        return "–"
    return f"more than {MOST_ROUNDS:,}" if found.rounds_left is None else f"{found.rounds_left:,}"


def _show_budget(place: SiteFolder, view: LedgerView, found: tuple[SourceBudget, ...]) -> None:
    from common.report_style import rounded_down, rounded_up

    out = Console(highlight=False)
    out.print(f"site {view.site}, {escape(_name(place))}: {len(view.entries):,} entries, all verified")
    if view.witness is None:
        out.print("[bold red]no witness[/]: a ledger restored from a backup would not be noticed")
    if not found:
        out.print("no data source yet: confide client scope")
    heads = ("data source", "target ε", "spent", "reserved", "left", "rounds like the last one")
    table = Table(*heads, box=box.SIMPLE)
    for one in found:
        table.add_row(
            escape(one.scope.name),
            f"{one.scope.target_epsilon:g} (δ = {one.scope.delta:g})",
            rounded_up(one.spent),
            rounded_up(one.reserved),
            rounded_down(one.left),
            _rounds_text(one),
        )
    if found:
        out.print(table)
    for one in found:
        out.print(_bar(one))
        if one.overlaps:
            out.print(f"  shares its spend with {escape(', '.join(one.overlaps))}")
    runs = Table("run", "data source", "rounds", "steps", "ε of the run alone", box=box.SIMPLE)
    for one in found:
        for run in one.runs:
            epsilon = rounded_up(run.epsilon)
            runs.add_row(escape(run.run), escape(one.scope.name), str(run.rounds), f"{run.steps:,}", epsilon)
    if any(one.runs for one in found):
        out.print(runs)


def _bar(one: SourceBudget) -> Text:
    """Spent and reserved are rounded up to whole characters, so that what is left never looks more."""
    spent, reserved = _shares(one, _BAR)
    bar = Text("  ")
    bar.append("█" * spent, "blue").append("▒" * reserved, "yellow").append("·" * (_BAR - spent - reserved))
    return bar.append(f"  {one.scope.name}: █ spent  ▒ reserved  · left")


def _shares(one: SourceBudget, whole: int) -> tuple[int, int]:
    """What is spent and what is reserved, of `whole`."""
    import math

    target = one.scope.target_epsilon
    spent = min(whole, math.ceil(whole * one.spent / target - 1e-9))
    both = min(whole, math.ceil(whole * (one.spent + one.reserved) / target - 1e-9))
    return spent, both - spent


def _budget_json(one: SourceBudget) -> dict[str, Any]:
    scope, last = one.scope, one.last
    return {
        "name": scope.name,
        "target_epsilon": scope.target_epsilon,
        "delta": scope.delta,
        "order": scope.order,
        "inherits": list(scope.inherits),
        "overlaps": list(one.overlaps),
        "epsilon_spent": one.spent,
        "epsilon_reserved": one.reserved,
        "epsilon_left": one.left,
        "epsilon_rdp": one.epsilon_rdp,
        "rounds_left": one.rounds_left,
        "rounds_left_is_huge": one.unlimited,
        "last": last
        and {
            "reservation": last.id,
            "run": last.charge.run,
            "round": last.charge.round,
            "events": [event.to_json() for event in last.charge.events],
        },
        "runs": [vars(run) for run in one.runs],
    }
