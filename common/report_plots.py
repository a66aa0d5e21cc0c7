"""Plots as SVG for pages. Their colours come from the style sheet; the same numbers give the same bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

# Matplotlib knows no CSS variables: it draws in these colours, and they are replaced in what it wrote.
_INK, _FAINT, _LINE, _SHADE = "#010101", "#010102", "#010103", "#010104"
_FIRST, _SECOND, _ALARM, _PAPER = "#010105", "#010106", "#010107", "#010108"
_VARIABLES = {
    _INK: "--ink",
    _FAINT: "--faint",
    _LINE: "--line",
    _SHADE: "--shade",
    _FIRST: "--first",
    _SECOND: "--second",
    _ALARM: "--alarm",
    _PAPER: "--paper",
}
_SETTINGS = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": _INK,
    "axes.labelcolor": _FAINT,
    "axes.edgecolor": _LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _LINE,
    "grid.linewidth": 0.7,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _FAINT,
    "ytick.labelcolor": _FAINT,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
}


@dataclass(frozen=True)
class Line:
    """`y[i]` belongs to `x[i]`, a round; `hollow` points were measured on fewer records than the others."""

    label: str
    x: Sequence[int]
    y: Sequence[float]
    hollow: Sequence[bool] = ()


def plot_metric(title: str, line: Line, *, warmup: int, level: tuple[str, float] | None = None) -> str:
    """One metric by round, with the warm-up shaded and a `level` to compare with."""

    def draw(axes: Any) -> None:
        _shade_warmup(axes, warmup)
        if level is not None:
            axes.axhline(level[1], color=_FAINT, linewidth=1.2, linestyle=(0, (4, 3)), label=level[0])
        axes.plot(line.x, line.y, color=_FIRST, linewidth=2)
        for hollow in (False, True):
            at = [i for i in range(len(line.x)) if (i < len(line.hollow) and line.hollow[i]) == hollow]
            label = line.label if not hollow else "fewer records"
            face = _PAPER if hollow else _FIRST
            if at:
                axes.plot(
                    [line.x[i] for i in at],
                    [line.y[i] for i in at],
                    color=_FIRST,
                    linestyle="none",
                    marker="o",
                    markersize=5 if len(line.x) <= 40 else 2.5,
                    markerfacecolor=face,
                    label=label,
                )
        _legend(axes)

    return _svg(title, draw)


def plot_epsilon(
    title: str, lines: Sequence[Line], band: tuple[Line, Line] | None, budget: float, warmup: int
) -> str:
    """ε by round against the budget; `band` shades what lies between its two lines."""

    def draw(axes: Any) -> None:
        _shade_warmup(axes, warmup)
        axes.axhline(budget, color=_ALARM, linewidth=1.4, linestyle=(0, (4, 3)), label=f"budget {budget:g}")
        if band is not None:
            axes.fill_between(band[0].x, band[0].y, band[1].y, color=_FIRST, alpha=0.18, linewidth=0)
        for index, line in enumerate(lines):
            color = (_FIRST, _SECOND, _FAINT, _INK)[index % 4]
            style = ("-", (0, (6, 2)), (0, (2, 1.5)))[index // 4 % 3]
            axes.plot(line.x, line.y, color=color, linewidth=2, linestyle=style, label=line.label)
        highest = max([budget, *(y for line in lines for y in line.y)])
        axes.set_ylim(0, highest * 1.08)
        _legend(axes)

    return _svg(title, draw)


@dataclass(frozen=True)
class Curve:
    """`y[i]` at `x[i]`. A line, or only dots."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    dots: bool = False


def plot_curves(
    title: str,
    curves: Sequence[Curve],
    *,
    across: str,
    level: tuple[str, float] | None = None,
    steps: bool = False,
    log: bool = False,
    from_zero: bool = True,
) -> str:
    """Curves over any x. steps: each y holds until the next x. log: both axes; otherwise y begins at 0,
    unless from_zero says that it need not."""

    def draw(axes: Any) -> None:
        if level is not None:
            axes.axhline(level[1], color=_ALARM, linewidth=1.4, linestyle=(0, (4, 3)), label=level[0])
        for index, curve in enumerate(curves):
            axes.plot(
                curve.x,
                curve.y,
                color=(_FIRST, _SECOND, _FAINT, _INK)[index % 4],
                linestyle="none" if curve.dots else ("-", (0, (6, 2)), (0, (2, 1.5)))[index // 4 % 3],
                linewidth=2,
                marker="o" if curve.dots else None,
                drawstyle="steps-post" if steps else "default",
                label=curve.label,
            )
        if log:
            _log_axes(axes)
        elif from_zero:
            values = [y for curve in curves for y in curve.y]
            axes.set_ylim(0, max([*values, *([level[1]] if level else [])], default=1.0) * 1.08)
        _legend(axes)

    return _svg(title, draw, across)


def _log_axes(axes: Any) -> None:
    """Labelled at 1, 2 and 5 of each power of ten, as plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(_plain_number)
        axis.set_minor_formatter(NullFormatter())


def plot_bars(title: str, lines: Sequence[Line], *, stacked: bool = False) -> str:
    """Bars by round, side by side, or stacked with the last of them in red."""

    def draw(axes: Any) -> None:
        base = [0.0] * len(lines[0].x)
        width = 0.72 if stacked else 0.72 / len(lines)
        for index, line in enumerate(lines):
            shift = 0.0 if stacked else (index - (len(lines) - 1) / 2) * width
            color = _ALARM if stacked and index == len(lines) - 1 else (_FIRST, _SECOND)[index % 2]
            axes.bar(
                [x + shift for x in line.x],
                line.y,
                width,
                bottom=base if stacked else None,
                color=color,
                label=line.label,
            )
            if stacked:
                base = [b + y for b, y in zip(base, line.y, strict=True)]
        high = max([max(line.y, default=0.0) for line in lines] + (base if stacked else []))
        axes.set_ylim(0, (high or 1.0) * 1.05)
        axes.yaxis.set_major_formatter(_plain_number)
        if len(lines) > 1:
            _legend(axes)

    return _svg(title, draw)


def _plain_number(value: float, _: int | None = None) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:g}"


def _shade_warmup(axes: Any, warmup: int) -> None:
    if warmup:
        axes.axvspan(0, warmup, color=_SHADE, linewidth=0, label="warm-up")


def _legend(axes: Any) -> None:
    """Above the plot, where it hides nothing."""
    count = len(axes.get_legend_handles_labels()[0])
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=count if count <= 4 else 3,
        columnspacing=1.3,
        handlelength=1.6,
        borderaxespad=0.2,
    )


def _svg(title: str, draw: Callable[[Any], None], across: str = "round") -> str:
    """What `draw` draws over `across`, as an `<svg>` element with the accessible name `title`.

    Both must be safe HTML.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": title}):
        figure = Figure(figsize=(5.7, 3.3), layout="constrained")
        axes = figure.add_subplot()
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
        draw(axes)
        axes.set_xlabel(across)
        written = io.BytesIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    text = written.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)  # needless inside HTML
    text = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", text)  # names of groups, the same in every plot
    text = text.replace("xlink:href", "href")
    text = text.replace("font-family: 'DejaVu Sans'", "font-family: system-ui, sans-serif")
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    return text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1).strip()
