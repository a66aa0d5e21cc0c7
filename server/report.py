"""`report.html`: one run on one page, for a person who decides whether to trust it.

Made from the run's folder alone. ε is not copied from the summary but computed anew from the events, and
the page says so in red where the two differ. Every value is escaped; nothing is loaded from anywhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

from common.files import write_atomically
from common.report_plots import Line, plot_bars, plot_epsilon, plot_metric
from common.report_style import (
    STYLE,
    figure,
    fixed,
    many,
    number,
    rounded_down,
    rounded_up,
    safe,
    table,
    tally,
)
from server.record import RoundEvent, RunFolder
from server.report_accounts import Account, Run, read_run
from server.report_sums import sums
from server.report_words import banners, capital, chief, header, privacy, tiles

_ALL_SITES = 50  # up to so many sites the table has all of them
_WORST_SITES = 20  # otherwise these
_LINES = 6  # up to so many different histories of ε are drawn one by one
_OPEN_ROUNDS = 40  # longer tables of rounds start folded

# No scripts, and no requests to anywhere.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

_RECOMPUTE = """import json
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.rdp import RdpAccountant

charged = {}
for line in open("events.jsonl"):
    entry = json.loads(line)
    if entry["kind"] == "site":  # of several lines for one round the last counts: it is one charge
        charged[entry["site"], entry["round"]] = entry["events"] or []
for site in sorted({site for (site, _), events in charged.items() if events}):
    accountant = RdpAccountant()  # or PLDAccountant, from dp_accounting.pld
    for event in [e for (of, _), events in charged.items() if of == site for e in events]:
        noise = GaussianDpEvent(event["noise_multiplier"])
        step = PoissonSampledDpEvent(event["sample_rate"], noise)
        accountant.compose(SelfComposedDpEvent(step, event["steps"]))
    print(site, accountant.get_epsilon(DELTA))
"""


def write_report(folder: RunFolder, summary: dict[str, Any] | None = None) -> None:
    """Write `folder.report`, whole or not at all. summary: None, that of the folder.

    Raises:
        CheckpointError: the run has no summary or no events yet.
    """
    write_atomically(folder.report, _page(read_run(folder, summary)).encode())


def _page(run: Run) -> str:
    name = safe(run.config.run.name)
    sections: tuple[Callable[[Run], str], ...] = (
        header,
        banners,
        tiles,
        privacy,
        sums,
        _plots,
        _sites,
        _rounds,
        _settings,
        _footer,
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}: Confide run report</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "".join(section(run) for section in sections)
        + "</main>\n</body>\n</html>\n"
    )


def _plots(run: Run) -> str:
    drawn = [*_metrics(run), *_epsilon_plot(run), *_costs(run)]
    return f'<h2>By round</h2>\n<div class="plots">\n{"".join(drawn)}</div>\n'


def _metrics(run: Run) -> Iterator[str]:
    most = max(r.evaluated_records for r in run.rounds)
    fewer = sorted({r.evaluated_records for r in run.rounds if 0 < r.evaluated_records < most})
    note = f"on {most:,} public records"
    if fewer:
        note += f"; hollow points on {' or '.join(f'{n:,}' for n in fewer)} of them"
    common = number(run.summary.get("majority_class"))
    level = None if common is None else ("commonest label", common)
    for title, name, values in (
        (capital(chief(run.summary)), "accuracy", [r.accuracy for r in run.rounds]),
        ("Loss", "loss", [r.loss for r in run.rounds]),
    ):
        points = [
            (r, y) for r, value in zip(run.rounds, values, strict=True) if (y := number(value)) is not None
        ]
        if points:
            line = Line(
                name,
                [r.round for r, _ in points],
                [y for _, y in points],
                [r.evaluated_records < most for r, _ in points],
            )
            svg = plot_metric(
                f"{title} by round",
                line,
                warmup=run.config.warmup.rounds,
                level=level if name == "accuracy" else None,
            )
            yield figure(title, note, svg)


def _epsilon_plot(run: Run) -> Iterator[str]:
    """One line for each history that differs; of many, the highest, the median and the lowest."""
    groups: dict[tuple[float, ...], list[int]] = {}
    for account in run.accounts:
        groups.setdefault(account.epsilon, []).append(account.site)
    if not any(max(history) > 0 for history in groups):
        return
    x = list(range(len(run.accounts[0].epsilon)))
    band = None
    if len(groups) <= _LINES:
        lines = [Line(_named(sites, len(run.accounts)), x, history) for history, sites in groups.items()]
    else:
        spread = list(zip(*(a.epsilon for a in run.accounts), strict=True))
        low, high = Line("lowest", x, [min(s) for s in spread]), Line("highest", x, [max(s) for s in spread])
        lines = [high, Line("median", x, [median(s) for s in spread]), low]
        band = (low, high)
    budget = run.config.privacy.target_epsilon
    svg = plot_epsilon("ε of a site by round", lines, band, budget, run.config.warmup.rounds)
    note = "Rényi, cumulated, computed anew from the events"
    if not run.private:
        note += "; the run is NOT PRIVATE, so it bounds nothing"
    yield figure("ε of a site against its budget", note, svg)


def _named(sites: list[int], of: int) -> str:
    if len(sites) == of:
        return f"each of {many(of, 'site')}" if of > 1 else f"site {sites[0]}"
    return f"site {sites[0]}" if len(sites) == 1 else f"{len(sites)} sites, as site {sites[0]}"


def _costs(run: Run) -> Iterator[str]:
    rounds = [r for r in run.rounds if r.round > 0]
    if not rounds:
        return
    x = [r.round for r in rounds]
    lines = [
        Line("in the sum", x, [float(r.answered) for r in rounds]),
        Line("not", x, [float(r.asked - r.answered) for r in rounds]),
    ]
    note = "whose update is in the sum, and whose is not"
    yield figure("Sites asked", note, plot_bars("Sites asked by round", lines, stacked=True))
    up = dict.fromkeys(x, 0.0)
    down = dict.fromkeys(x, 0.0)
    for part in run.parts:
        up[part.round] = max(up.get(part.round, 0.0), part.bytes_up / 1000)
        down[part.round] = max(down.get(part.round, 0.0), part.bytes_down / 1000)
    lines = [Line("up", x, [up[n] for n in x]), Line("down", x, [down[n] for n in x])]
    note = "in 1,000 bytes, the largest of the round"
    if run.config.warmup.rounds:
        note += "; warm-up: head only"
    yield figure("Bytes per site", note, plot_bars("Bytes per site by round", lines))
    bars = [Line("seconds", x, [r.seconds for r in rounds])]
    note = "all sites and the evaluation"
    yield figure("Seconds", note, plot_bars("Seconds by round", bars))


def _sites(run: Run) -> str:
    budget = run.config.privacy.target_epsilon
    extra = bool(run.uncertain)
    columns = [
        ("site", ""),
        ("asked", ""),
        ("in the sum", ""),
        ("otherwise", "text codes"),
        ("ε (Rényi)", ""),
        *([("ε at most", "")] if extra else []),
        ("budget left", ""),
        ("bytes up", ""),
        ("held-out accuracy", ""),
    ]

    def spend(a: Account) -> list[str]:
        if run.config.privacy.insecure_disabled:
            return ["–", "–"]  # nothing is charged, so no site can have spent more either
        at_most = [rounded_up(a.epsilon_at_most)] if extra else []
        return [rounded_up(a.epsilon[-1]), *at_most, rounded_down(budget - a.epsilon_at_most)]

    rows = [
        (
            "",
            [
                str(a.site),
                f"{a.asked:,}",
                f"{a.answered:,}",
                tally(a.failures),
                *spend(a),
                f"{a.bytes_up:,}",
                fixed(a.held_out),
            ],
        )
        for a in _shown(run.accounts)
    ]
    total = len(run.accounts)
    which = f"All {many(total, 'site')}."
    if total > _ALL_SITES:
        failures = sum((a.failures for a in run.accounts), Counter[str]())
        which = (
            f"The {len(rows)} worst of {total:,} sites, taken in turn from those with the most failures, the "
            f"lowest held-out accuracy and the highest ε. Failures of all sites: {tally(failures)}."
        )
    notes = [which, f"Budget: ε = {budget:g}." if run.private else "NOT PRIVATE: no ε here bounds anything."]
    if any(a.held_out is not None for a in run.accounts):
        notes.append("Held-out accuracy: simulation only.")
    return f'<h2>Sites</h2>\n<p class="small">{" ".join(notes)}</p>\n{table(columns, rows)}'


def _shown(accounts: list[Account]) -> list[Account]:
    """All of few sites; of many, the worst by three measures in turn, by number."""
    if len(accounts) <= _ALL_SITES:
        return accounts
    failing = [a for a in accounts if a.failures]
    measured = [a for a in accounts if a.held_out is not None]
    orders = [
        iter(sorted(failing, key=lambda a: -a.failures.total())),
        iter(sorted(measured, key=lambda a: a.held_out or 0.0)),
        iter(sorted(accounts, key=lambda a: -a.epsilon_at_most)),
    ]
    chosen: dict[int, Account] = {}
    while len(chosen) < _WORST_SITES:
        for order in orders:
            new = next((a for a in order if a.site not in chosen), None)
            if new is not None and len(chosen) < _WORST_SITES:
                chosen[new.site] = new
    return [chosen[site] for site in sorted(chosen)]


def _rounds(run: Run) -> str:
    columns = [
        ("round", ""),
        ("trains", "text"),
        ("asked", ""),
        ("trained", ""),
        ("in the sum", ""),
        ("counted", "text"),
        ("accuracy", ""),
        ("loss", ""),
        ("measured on", ""),
        ("highest ε", ""),
        ("seconds", ""),
    ]

    off = run.config.privacy.insecure_disabled

    def cells(r: RoundEvent) -> list[str]:
        asked = [f"{r.asked:,}", f"{r.trained:,}", f"{r.answered:,}", "yes" if r.counted else "no"]
        return [
            str(r.round),
            safe(r.part),
            *(asked if r.round else ["–"] * 4),
            fixed(r.accuracy),
            fixed(r.loss),
            f"{r.evaluated_records:,}",
            "–" if off else rounded_up(max(a.epsilon[r.round] for a in run.accounts)),
            fixed(r.seconds, 1) if r.round else "–",
        ]

    rows = [("" if r.counted else "out", cells(r)) for r in run.rounds]
    unfolded = " open" if len(rows) <= _OPEN_ROUNDS else ""
    return (
        f"<h2>Rounds</h2>\n<details{unfolded}><summary>{many(len(rows), 'row')}; round 0 is the "
        f"start</summary>\n{table(columns, rows)}</details>\n"
    )


def _settings(run: Run) -> str:
    return (
        "<h2>Configuration</h2>\n<details><summary>config.toml, complete</summary>\n"
        f"<pre>{safe(run.toml)}</pre></details>\n"
    )


def _footer(run: Run) -> str:
    code = safe(_RECOMPUTE.replace("DELTA", f"{run.delta!r}"))
    return (
        "<footer>\n<h2>Recompute ε yourself</h2>\n<p>Each line of <code>events.jsonl</code> that is of the "
        "kind <code>site</code> holds what that site was charged in that round: <code>steps</code> steps of "
        "the Gaussian mechanism, Poisson-sampled with <code>sample_rate</code>, its noise "
        "<code>noise_multiplier</code> times the clipping norm, for neighbours that differ in one added or "
        "removed record. Any accountant that knows this mechanism will do. With dp-accounting, in the "
        f"run's folder:</p>\n<pre><code>{code}</code></pre>\n"
        "<p>Accountants differ in the Rényi orders that they try, so expect the third digit to move. What a "
        "site has charged itself stands in its own <code>ledger.sqlite</code>, which is written before it "
        "computes and decides.</p>\n</footer>\n"
    )
