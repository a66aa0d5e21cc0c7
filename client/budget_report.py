"""A site's budget as a page for its own people. Self-contained: nothing is loaded, every value is escaped."""

from __future__ import annotations

from collections.abc import Sequence

from client.budget import MOST_ROUNDS, SourceBudget, spend_by_entry
from client.ledger_view import LedgerView
from common.report_plots import Curve, plot_curves
from common.report_style import (
    alarm,
    bullets,
    figure,
    general,
    many,
    page,
    pairs,
    rounded_down,
    rounded_up,
    safe,
    table,
)

_STYLE = """
.bar { display: flex; height: 22px; border: 1px solid var(--line); border-radius: 6px; overflow: hidden;
  background: var(--shade); margin: 18px 0 4px; }
.bar span { display: block; } .bar .spent { background: var(--first); }
.bar .kept { background: var(--second); }
.plot { max-width: 640px; margin-top: 28px; }
.key { color: var(--faint); font-size: 14px; } .key b { font-weight: 400; color: var(--ink); }
.key i { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin: 0 4px 0 14px;
  border: 1px solid var(--line); } .key i:first-child { margin-left: 0; }
"""


def budget_page(name: str, view: LedgerView, found: Sequence[SourceBudget]) -> str:
    """name: the site's. found: what is shown of its ledger."""
    witnessed = "the witness agrees" if view.witness is not None else "no witness"
    facts = f"site {view.site} · {len(view.entries):,} entries"
    unwatched = "<strong>No witness:</strong> a ledger restored from a backup would not be noticed."
    alarms = alarm(unwatched) if view.witness is None else ""
    body = (
        f'<p class="over">Confide budget</p>\n<h1>{safe(name)}</h1>\n'
        f'<p class="facts">{facts}, each verified · {witnessed}</p>\n{alarms}'
        + "".join(_source(view, one) for one in found)
        + _MEANING
    )
    return page(f"Confide budget: {safe(name)}", body, style=_STYLE)


def _source(view: LedgerView, one: SourceBudget) -> str:
    scope = one.scope
    shared = (
        f" It shares its spend with {safe(', '.join(one.overlaps))}, whose records may be the same."
        if one.overlaps
        else ""
    )
    return (
        f"<h2>Data source {safe(scope.name)}</h2>\n<p class='verdict'>{_verdict(one)}{shared}</p>\n"
        + _bar(one)
        + _tiles(one)
        + f'<div class="plot">{_plot(view, one)}</div>\n'
        + _runs(one)
    )


def _verdict(one: SourceBudget) -> str:
    if one.last is None:
        return "Nothing was ever charged here: the whole budget is left."
    if one.rounds_left == 0:
        more = "<strong>Not one more round like the last one fits.</strong>"
    elif one.rounds_left is None:
        more = f"More than {MOST_ROUNDS:,} more rounds like the last one fit."
    else:
        more = f"<strong>{many(one.rounds_left, 'more round')}</strong> like the last one would fit."
    return f"ε {rounded_up(one.spent + one.reserved)} of {one.scope.target_epsilon:g} is used. {more}"


def _bar(one: SourceBudget) -> str:
    spent, kept = (100 * part / one.scope.target_epsilon for part in (one.spent, one.reserved))
    return (
        '<div class="bar" role="img" aria-label="spent, reserved and left">'
        f'<span class="spent" style="width: {spent:.3f}%"></span>'
        f'<span class="kept" style="width: {kept:.3f}%"></span></div>\n'
        '<p class="key"><i style="background: var(--first)"></i>spent '
        f'<b>{rounded_up(one.spent)}</b><i style="background: var(--second)"></i>reserved, not begun '
        f'<b>{rounded_up(one.reserved)}</b><i style="background: var(--shade)"></i>left '
        f"<b>{rounded_down(one.left)}</b></p>\n"
    )


def _tiles(one: SourceBudget) -> str:
    scope = one.scope
    rounds = "–" if one.last is None else f"> {MOST_ROUNDS:,}" if one.unlimited else f"{one.rounds_left:,}"
    last = (
        "" if one.last is None else f"like round {one.last.charge.round} of run {safe(one.last.charge.run)}"
    )
    return pairs(
        [
            ("ε left", f"{rounded_down(one.left)}<small>of {scope.target_epsilon:g}</small>"),
            ("rounds left", f"{rounds}<small>{last}</small>"),
            ("δ", f"{general(scope.delta)}<small>one record, added or removed</small>"),
            ("order", f"{general(scope.order)}<small>fixed at opening: it alone decides</small>"),
            ("ε (Rényi), best order", f"{rounded_up(one.epsilon_rdp)}<small>what a report prints</small>"),
        ],
        "tiles",
    )


def _plot(view: LedgerView, one: SourceBudget) -> str:
    numbers, epsilons = spend_by_entry(view.entries, view.history, one.scope.name)
    x, y = (*numbers, len(view.entries)), (*epsilons, epsilons[-1])
    target = one.scope.target_epsilon
    svg = plot_curves(
        f"ε of {safe(one.scope.name)} after each entry of the ledger",
        [Curve("charged", x, y)],
        across="entry of the ledger",
        level=(f"target {target:g}", target),
        steps=True,
    )
    return figure(
        "ε after each entry of the ledger",
        "A step up is a charge, written before anything was computed; a step down one that was given back.",
        svg,
    )


def _runs(one: SourceBudget) -> str:
    if not one.runs:
        return ""
    whole = sum(run.divergence for run in one.runs)
    columns = [
        ("run", "text"),
        ("rounds", ""),
        ("charges", ""),
        ("steps", ""),
        ("share of what is used", ""),
        ("ε of the run alone", ""),
    ]
    rows = [
        (
            "",
            (
                f"<code>{safe(run.run)}</code>",
                f"{run.rounds:,}",
                f"{run.charges:,}",
                f"{run.steps:,}",
                f"{run.divergence / whole:.1%}" if whole else "–",
                rounded_up(run.epsilon),
            ),
        )
        for run in one.runs
    ]
    return "<h3>Runs</h3>\n" + table(columns, rows)


_MEANING = (
    '<h2>What this says</h2>\n<div class="box">'
    + bullets(
        [
            "ε bounds how much better anybody can tell whether one record was used, whatever they know, see "
            "or compute. It is one number for all runs on a data source together; it never gets smaller.",
            "It is counted at one order that was fixed when the data source was opened. A charge is taken if "
            "it fits there, so the last sliver may stay unspent. The best order gives the smaller ε that "
            "reports print.",
            "ε of runs do not add up; their shares do. The first charge also pays what it costs to turn the "
            "bound that adds up into ε and δ.",
            "Rounds left were found by asking the site's own filter, for charges that cost what the last one "
            "did. More noise, fewer steps or smaller batches make more of them.",
            "A charge counts from before anything is computed, also if the round then failed.",
        ]
    )
    + "</div>\n"
)
