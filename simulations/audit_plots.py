"""Plots of the audit pages as plain SVG, in the colours of the reports' style sheet.

The same numbers give the same bytes. Labels must be safe HTML already.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from simulations.audit_stats import Floats

FIRST, SECOND, ALARM, INK, FAINT, LINE = (
    f"var(--{name})" for name in ("first", "second", "alarm", "ink", "faint", "line")
)
_WIDTH, _HEIGHT = 570, 330
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 34, 44  # margins
_FONT = 'font-family="system-ui, sans-serif" font-size="13"'


@dataclass(frozen=True)
class Scale:
    """From values to places between `start` and `end`; linear, or by powers of ten."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        inside = min(max(value, self.low), self.high)
        a, b, x = (math.log10(v) if self.log else v for v in (self.low, self.high, inside))
        return self.start + (x - a) / (b - a) * (self.end - self.start)

    def ticks(self) -> Iterator[tuple[float, str]]:
        if self.log:
            for power in range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high)) + 1):
                yield 10.0**power, f"{10.0**power:g}"
            return
        rough = (self.high - self.low) / 6
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * k for k in (1, 2, 5, 10) if unit * k >= rough)
        for k in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1):
            yield k * step, f"{k * step:g}".replace("-", "−")


@dataclass(frozen=True)
class Curve:
    label: str
    x: Floats
    y: Floats
    color: str
    dash: str = ""
    area: bool = False  # shaded down to the axis


@dataclass(frozen=True)
class Mark:
    """A vertical line; one without a label belongs to the one before."""

    label: str
    x: float
    color: str
    dash: str = "5 4"


def plot(
    title: str,
    x_label: str,
    curves: Sequence[Curve],
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    *,
    marks: Sequence[Mark] = (),
    log: bool = False,
) -> str:
    """`curves` and `marks` in one frame, the legend above it; `log`: both axes by powers of ten."""
    x = Scale(*x_range, _LEFT, _WIDTH - _RIGHT, log)
    legend = [(c.label, c.color, c.dash) for c in curves] + [
        (m.label, m.color, m.dash) for m in marks if m.label
    ]
    rows = _legend_rows(legend)
    top = _TOP + 18 * (len(rows) - 1)
    y = Scale(*y_range, _HEIGHT - _BOTTOM, top, log)
    parts = [*_frame(x, y, x_label), *_legend(rows)]
    for curve in curves:
        points = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(curve.x, curve.y, strict=True))
        if curve.area:
            ends = f"{x(curve.x[0]):.1f},{y(y.low):.1f} {points} {x(curve.x[-1]):.1f},{y(y.low):.1f}"
            parts.append(f'<polygon points="{ends}" fill="{curve.color}" fill-opacity="0.16"/>')
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{curve.color}" stroke-width="2"'
            f'{_dash(curve.dash)} stroke-linejoin="round"/>'
        )
    for mark in marks:
        parts.append(_line(x(mark.x), top, x(mark.x), _HEIGHT - _BOTTOM, mark.color, 1.6, mark.dash))
    return _svg(title, _HEIGHT, parts)


def outline(heights: Floats, edges: Floats) -> tuple[Floats, Floats]:
    """Of a histogram: x and y of a curve that goes round its bars."""
    x: Floats = np.repeat(edges, 2)
    y: Floats = np.concatenate([[0.0], np.repeat(heights, 2), [0.0]])
    return x, y


def bars(title: str, rows: Sequence[tuple[str, float, float]], labels: tuple[str, str]) -> str:
    """(label, value, limit): a bar as long as the value, red where it passes its limit, which is a line."""
    high = 1.15 * max(max(value, limit) for _, value, limit in rows)
    base = 36 + 52 * len(rows)
    x = Scale(0, high, 8, _WIDTH - _RIGHT)
    parts = list(_legend(_legend_rows([(labels[0], FIRST, ""), (labels[1], FAINT, "5 4")])))
    for number, (label, value, limit) in enumerate(rows):
        top = 36 + 52 * number
        parts.append(_text(8, top + 12, label, INK))
        for length, color in (
            (x(high) - 8, "var(--shade)"),
            (max(2.0, x(value) - 8), _bar_color(value, limit)),
        ):
            parts.append(f'<rect x="8" y="{top + 19}" width="{length:.1f}" height="14" fill="{color}"/>')
        parts.append(_line(x(limit), top + 15, x(limit), top + 37, FAINT, 2, "5 4"))
    parts += [_text(x(value), base + 8, text, FAINT, "middle") for value, text in x.ticks()]
    return _svg(title, base + 22, parts)


def _bar_color(value: float, limit: float) -> str:
    return ALARM if value > limit else FIRST


def _frame(x: Scale, y: Scale, x_label: str) -> Iterator[str]:
    base = y.start
    for value, text in y.ticks():
        yield _line(x.start, y(value), x.end, y(value), LINE, 0.8)
        yield _text(x.start - 6, y(value) + 4, text, FAINT, "end")
    for value, text in x.ticks():
        at = x(value)
        yield _line(at, base, at, base + 4, LINE, 1)
        yield _text(at, base + 18, text, FAINT, "end" if at > x.end - 14 else "middle")
    yield _text((x.start + x.end) / 2, base + 38, x_label, FAINT, "middle")


def _legend_rows(entries: Sequence[tuple[str, str, str]]) -> list[list[tuple[float, str, str, str]]]:
    """(place, label, color, dash) row by row; a character is taken to be 6.6 wide."""
    rows: list[list[tuple[float, str, str, str]]] = [[]]
    at = float(_LEFT)
    for label, color, dash in entries:
        width = 26 + 6.6 * len(label) + 16
        if rows[-1] and at + width > _WIDTH:
            rows.append([])
            at = float(_LEFT)
        rows[-1].append((at, label, color, dash))
        at += width
    return rows


def _legend(rows: list[list[tuple[float, str, str, str]]]) -> Iterator[str]:
    for number, row in enumerate(rows):
        y = 14 + 18 * number
        for at, label, color, dash in row:
            yield _line(at, y, at + 20, y, color, 2.4, dash)
            yield _text(at + 26, y + 4, label, INK)


def _line(x1: float, y1: float, x2: float, y2: float, color: str, width: float, dash: str = "") -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}" '
        f'stroke-width="{width}"{_dash(dash)}/>'
    )


def _text(x: float, y: float, text: str, color: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}" {_FONT}>{text}</text>'


def _dash(dash: str) -> str:
    return f' stroke-dasharray="{dash}"' if dash else ""


def _svg(title: str, height: int, parts: Sequence[str]) -> str:
    inside = "\n".join(parts)
    return f'<svg role="img" aria-label="{title}" viewBox="0 0 {_WIDTH} {height}">\n{inside}\n</svg>'


def sampled(curve: Callable[[float], float], x: Floats) -> Floats:
    """The values of `curve` at `x`."""
    found: Floats = np.array([curve(float(value)) for value in x])
    return found
