"""Runs side by side, in the terminal and as a page that loads nothing from anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from common.report_plots import Curve, plot_curves
from common.report_style import alarm, figure, fixed, general, many, page, rounded_up, safe, table
from simulations.compare import Compared, differing

_STYLE = """
.bars { display: grid; grid-template-columns: minmax(70px, max-content) 1fr max-content; gap: 5px 12px;
  align-items: center; font-size: 14.5px; font-variant-numeric: tabular-nums; margin: 6px 0 18px; }
.bars i { display: block; background: var(--first); height: 14px; border-radius: 3px; min-width: 1px; }
.bars span { overflow-wrap: anywhere; } td.value { white-space: normal; min-width: 90px; }
"""


def rows(runs: Sequence[Compared]) -> list[tuple[str, list[str]]]:
    """What there is to compare: a name, and each run's value as text."""
    found = [(key, [_value(v) for v in values]) for key, values in differing(runs).items()]
    shown: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("metric", lambda o: str(o["metric"])),
        ("metric before → after", lambda o: f"{fixed(o['metric_initial'])} → {fixed(o['metric_final'])}"),
        ("loss before → after", lambda o: f"{fixed(o['loss_initial'])} → {fixed(o['loss_final'])}"),
        ("ε (Rényi, enforced)", lambda o: rounded_up(o["epsilon_rdp"]) if o["private"] else "NOT PRIVATE"),
        ("ε (loss distributions)", lambda o: rounded_up(o["epsilon_pld"]) if o["private"] else "NOT PRIVATE"),
        ("δ", lambda o: general(o["delta"])),
        ("sites", lambda o: f"{o['sites']:,}"),
        ("rounds", lambda o: f"{o['rounds']:,}"),
        ("rounds without a sum", lambda o: f"{o['rounds_without_sum']:,}"),
        ("bytes up, all sites", lambda o: f"{o['bytes_up']:,}"),
        ("seconds", lambda o: fixed(o["seconds"], 0)),
    ]
    outcomes = [run.outcome for run in runs]
    return found + [(name, [write(o) for o in outcomes]) for name, write in shown]


def _value(value: Any) -> str:
    match value:
        case None:
            return "–"
        case list():
            return ", ".join(map(str, value)) or "–"
        case _:
            return str(value)


def terminal_table(runs: Sequence[Compared]) -> Table:
    out = Table(title=f"{len(runs)} runs", title_justify="left")
    out.add_column("")
    for run in runs:
        out.add_column(escape(run.label), justify="right", overflow="fold")
    changed = len(differing(runs))
    for place, (name, values) in enumerate(rows(runs), start=1):
        out.add_row(escape(name), *map(escape, values), end_section=place == changed)
    return out


def compare_page(runs: Sequence[Compared]) -> str:
    title = "Confide: " + ", ".join(safe(run.label) for run in runs)
    open_runs = [safe(run.label) for run in runs if not run.run.private]
    warning = (
        alarm(f"NOT PRIVATE: {', '.join(open_runs)}. No ε of theirs bounds anything.") if open_runs else ""
    )
    columns = [("", "text"), *((safe(run.label), "value") for run in runs)]
    changed = len(differing(runs))
    cells = [("", [safe(name), *map(safe, values)]) for name, values in rows(runs)]
    settings = (
        table(columns, cells[:changed])
        if changed
        else '<p class="small">The configurations are the same but for the name.</p>\n'
    )
    drawn = "".join(_plots(runs))
    return page(
        title,
        f'<p class="over">Confide comparison</p>\n<h1>{many(len(runs), "run")} side by side</h1>\n{warning}'
        f"<h2>What was set differently</h2>\n{settings}"
        f"<h2>What came of it</h2>\n{table(columns, cells[changed:])}"
        + (f'<h2>By round, ε and bytes</h2>\n<div class="plots">\n{drawn}</div>\n' if drawn else "")
        + f"<h2>Final scores</h2>\n{''.join(_bars(runs))}",
        style=_STYLE,
    )


def _plots(runs: Sequence[Compared]) -> Iterator[str]:
    """The chief metric over three things; nothing where the runs have not the same one."""
    names = {run.chief for run in runs}
    if len(names) != 1:
        yield (
            f"<p>The runs have different chief metrics ({safe(', '.join(sorted(names)))}), so no curve could "
            "be compared.</p>\n"
        )
        return
    (name,) = names
    title = name[:1].upper() + name[1:]
    private = [run for run in runs if run.run.private]
    over: tuple[tuple[str, str, Sequence[Compared], Callable[[Compared], Sequence[float]]], ...] = (
        ("round", "on public records", runs, lambda run: run.rounds),
        ("ε (Rényi)", "of the site that spent most", private, lambda run: run.epsilon),
        ("1,000 bytes up", "of all sites together", runs, lambda run: [b / 1000 for b in run.bytes_up]),
    )
    for across, note, shown, x in over:
        curves = []
        for run in shown:
            points = [(a, y) for a, y in zip(x(run), run.metric, strict=True) if y is not None]
            if points:
                curves.append(Curve(safe(run.label), [a for a, _ in points], [y for _, y in points]))
        if curves:
            heading = f"{safe(title)} by {across}"
            yield figure(heading, note, plot_curves(heading, curves, across=across, from_zero=False))


def _bars(runs: Sequence[Compared]) -> Iterator[str]:
    for name in dict.fromkeys(name for run in runs for name in run.scores):
        found = [(run.label, run.scores[name]) for run in runs if name in run.scores]
        most = max((abs(value) for _, value in found), default=0.0) or 1.0
        inside = "".join(
            f'<span>{safe(label)}</span><i style="width: {100 * max(value, 0) / most:.1f}%"></i>'
            f"<span>{fixed(value)}</span>\n"
            for label, value in found
        )
        yield f'<h3>{safe(name)}</h3>\n<div class="bars">\n{inside}</div>\n'
