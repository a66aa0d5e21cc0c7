"""A plan as a page: noise against rounds and batch, and what is proposed. Self-contained."""

from __future__ import annotations

from collections.abc import Sequence

from common.report_plots import Curve, plot_curves
from common.report_style import figure, general, page, pairs, rounded_up, safe, table
from simulations.planning import NoiseCurve, Question, Row

_STYLE = "tr.best td { font-weight: 650; color: var(--first); }\n"


def plan_page(
    question: Question, rows: Sequence[Row], chosen: int, curves: Sequence[NoiseCurve], toml: str
) -> str:
    """rows: growing batches, of which `chosen` is proposed. curves: of some of them. toml: to paste."""
    best = rows[chosen]
    head = f"ε = {question.epsilon:g} over {question.rounds:,} rounds"
    facts = (
        f"{question.steps_per_round} steps a round · {question.sites} sites of at least "
        f"{question.records:,} records · δ = {general(question.delta)} · nothing is spent by planning"
    )
    body = (
        f'<p class="over">Confide plan</p>\n<h1>{head}</h1>\n<p class="facts">{facts}</p>\n'
        f'<p class="verdict">Proposed: batches of <strong>{best.batch_size:,}</strong> records with '
        f"noise_multiplier <strong>{best.noise_multiplier:g}</strong>.</p>\n"
        + _tiles(best)
        + "<h2>Noise</h2>\n"
        + f'<div class="plots">{_rounds_plot(question, best, curves)}{_batch_plot(rows, best)}</div>\n'
        + "<h2>Batches</h2>\n"
        + _table(rows, chosen)
        + _criterion(question)
        + f"<h2>To paste into confide.toml</h2>\n<pre><code>{safe(toml)}</code></pre>\n"
    )
    return page(f"Confide plan: {head}", body, style=_STYLE)


def _tiles(best: Row) -> str:
    return pairs(
        [
            ("sample rate", f"{best.sample_rate:g}<small>of a site's records in a step</small>"),
            ("noise_multiplier", f"{best.noise_multiplier:g}<small>times max_grad_norm</small>"),
            ("steps", f"{best.question.steps:,}<small>of a site, in all rounds</small>"),
            ("ε (Rényi)", f"{rounded_up(best.epsilon_rdp)}<small>enforced</small>"),
            ("ε (loss distributions)", f"{rounded_up(best.epsilon_pld)}<small>reported, tighter</small>"),
        ],
        "tiles",
    )


def _rounds_plot(question: Question, best: Row, curves: Sequence[NoiseCurve]) -> str:
    drawn = [Curve(f"batch {c.row.batch_size:,}", c.rounds, c.noise) for c in curves]
    proposed = Curve("proposed", [question.rounds], [best.noise_multiplier], dots=True)
    svg = plot_curves("Noise against rounds", [*drawn, proposed], across="rounds", log=True)
    note = f"the least that keeps {question.steps_per_round} steps a round within ε = {question.epsilon:g}"
    return figure("noise_multiplier against rounds", note, svg)


def _batch_plot(rows: Sequence[Row], best: Row) -> str:
    size, noise = [row.batch_size for row in rows], [row.total_noise for row in rows]
    curves = [
        Curve("calibrated", size, noise),
        Curve("proposed", [best.batch_size], [best.total_noise], dots=True),
    ]
    svg = plot_curves("Noise of the average against batch", curves, across="batch", log=True)
    return figure(
        "noise of the average against batch", "each coordinate of the mean gradient, over max_grad_norm", svg
    )


def _table(rows: Sequence[Row], chosen: int) -> str:
    columns = [
        (name, "")
        for name in (
            "batch",
            "sample rate",
            "noise_multiplier",
            "noise a step",
            "noise of the average",
            "gradients of a site",
            "ε (Rényi)",
        )
    ]
    return table(
        columns,
        [
            (
                "best" if place == chosen else "",
                (
                    f"{row.batch_size:,}",
                    f"{row.sample_rate:g}",
                    f"{row.noise_multiplier:.4f}",
                    f"{row.step_noise:.2e}",
                    f"{row.total_noise:.2e}",
                    f"{row.gradients:,}",
                    rounded_up(row.epsilon_rdp),
                ),
            )
            for place, row in enumerate(rows)
        ],
    )


def _criterion(question: Question) -> str:
    from simulations.plan_cli import CRITERION

    return (
        f"<p>{CRITERION}</p>\n<p>Noise is the standard deviation of each coordinate of a mean gradient, over "
        f"max_grad_norm; of the average, over all {question.steps:,} steps and {question.sites} sites. "
        "Beside a gradient's norm it counts times the square root of the number of trained parameters.</p>\n"
    )
