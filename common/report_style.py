"""How a page for people looks: its style sheet, values as safe text, and blocks. Knows of no run or site."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape

from common.privacy import epsilon_text

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d2127; --faint: #626b77; --line: #dfe3e8;
  --panel: #f6f7f9; --first: #27609c; --second: #b4602a; --shade: #eceff3; --alarm: #a3201a;
  --alarm-paper: #fdecea; --alarm-ink: #6d1410; --care-paper: #fdf5e2; --care-line: #d9a520; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181c; --ink: #e3e6ea; --faint: #98a1ad;
  --line: #333a43; --panel: #1d2126; --first: #7fb2e8; --second: #e39b66; --shade: #242a31;
  --alarm: #e5635b; --alarm-paper: #3b1715; --alarm-ink: #ffd9d5; --care-paper: #302810;
  --care-line: #a9821f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: break-word;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 36px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 4px; font-weight: 650; }
h2 { font-size: 20px; margin: 44px 0 12px; font-weight: 650; }
h3 { font-size: 15px; margin: 20px 0 6px; font-weight: 650; }
p { margin: 8px 0; max-width: 76ch; }
.over { color: var(--faint); font-size: 13px; letter-spacing: .05em; text-transform: uppercase; margin: 0; }
.facts code { white-space: normal; }
.facts, figcaption span, .small { color: var(--faint); font-size: 14px; }
.verdict { font-size: 19px; line-height: 1.5; margin: 18px 0 8px; }
.alarm, .care { border-left: 5px solid var(--alarm); background: var(--alarm-paper);
  color: var(--alarm-ink); padding: 10px 16px; margin: 12px 0; border-radius: 0 6px 6px 0; }
.alarm p, .care p { max-width: none; margin: 0; }
.care { border-color: var(--care-line); background: var(--care-paper); color: var(--ink); }
.care ul { margin: 0; padding-left: 18px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 12px;
  margin: 20px 0 0; padding: 0; }
.tiles div { background: var(--panel); border: 1px solid var(--line); border-radius: 8px;
  padding: 10px 14px; }
.tiles dt { color: var(--faint); font-size: 13px; }
.tiles dd { margin: 2px 0 0; font-size: 21px; font-variant-numeric: tabular-nums; }
.tiles dd small { display: block; font-size: 13px; line-height: 1.35; color: var(--faint); }
.box { border: 1px solid var(--line); background: var(--panel); border-radius: 8px; padding: 6px 22px 16px; }
.box > p:first-child { font-size: 17px; margin-top: 12px; }
.pairs { margin: 14px 0; }
.pairs div { display: grid; grid-template-columns: 180px 1fr; gap: 20px; margin: 5px 0; }
.pairs dt { color: var(--faint); }
.pairs dd { margin: 0; }
.box ul { margin: 4px 0; padding-left: 20px; }
.box li { margin: 4px 0; max-width: 82ch; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr));
  gap: 30px 36px; }
figure { margin: 0; min-width: 0; }
figcaption { font-weight: 600; font-size: 15px; line-height: 1.4; min-height: 2.9em; }
figcaption span { display: block; font-weight: 400; }
svg { display: block; width: 100%; height: auto; }
.wide { overflow-x: auto; margin: 8px 0; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--faint); font-weight: 500; vertical-align: bottom; }
th.text, td.text { text-align: left; }
td.codes { white-space: normal; min-width: 150px; }
tr.out td { color: var(--alarm); }
summary { cursor: pointer; font-weight: 600; margin: 12px 0; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 12px 16px;
  overflow-x: auto; font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
code, .whole { white-space: nowrap; }
pre code { white-space: pre; }
code { font: 0.92em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
footer { margin-top: 48px; border-top: 1px solid var(--line); }
@media (max-width: 600px) { main { padding: 20px 14px 40px; } h1 { font-size: 25px; }
  .verdict { font-size: 17px; } .tiles dd { font-size: 19px; }
  .box { padding: 4px 14px 12px; } figcaption { min-height: 0; }
  .pairs div { grid-template-columns: 1fr; gap: 0; margin: 10px 0; } }
@media print { main { max-width: none; padding: 0; } figure, .box, tr { break-inside: avoid; } }
"""

_CONTENT = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(title: str, body: str, *, style: str = "") -> str:
    """A whole page that loads nothing and runs nothing. `title` and `body` must be safe already."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_CONTENT}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n<main>\n{body}</main>\n"
        "</body>\n</html>\n"
    )


# Values as safe text. Nothing from a run's folder reaches a page by any other way.


def safe(value: object) -> str:
    return escape(str(value), quote=True)


def number(value: object) -> float | None:
    """`value` if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def fixed(value: object, digits: int = 3) -> str:
    """With `digits` after the point, or a dash where there is no number."""
    found = number(value)
    return "–" if found is None else f"{found:,.{digits}f}"


def general(value: object) -> str:
    found = number(value)
    return "–" if found is None else f"{found:g}"


def rounded_up(epsilon: object) -> str:
    """An upper bound that stays one."""
    found = number(epsilon)
    return "–" if found is None else epsilon_text(found)


def rounded_down(value: float) -> str:
    return f"{max(0.0, math.floor(value * 1000) / 1000):.3f}"


def many(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def tally(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} × {safe(what)}" for what, count in counts.most_common()) or "none"


# Blocks. What they are given must be safe already.


def alarm(text: str) -> str:
    return f'<div class="alarm" role="alert"><p>{text}</p></div>\n'


def pairs(items: Iterable[tuple[str, str]], kind: str = "pairs") -> str:
    inside = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>\n" for name, value in items)
    return f'<dl class="{kind}">\n{inside}</dl>\n'


def bullets(items: Iterable[str]) -> str:
    return "<ul>\n" + "".join(f"<li>{item}</li>\n" for item in items) + "</ul>\n"


def table(columns: Sequence[tuple[str, str]], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """`columns`: heading and class; `rows`: the row's class and its cells."""
    head = "".join(f'<th class="{kind}" scope="col">{name}</th>' for name, kind in columns)
    body = "".join(
        f'<tr class="{kind}">'
        + "".join(f'<td class="{c[1]}">{cell}</td>' for c, cell in zip(columns, cells, strict=True))
        + "</tr>\n"
        for kind, cells in rows
    )
    inside = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>"
    return f'<div class="wide"><table>\n{inside}\n</table></div>\n'


def figure(title: str, note: str, svg: str) -> str:
    return f"<figure><figcaption>{title}<span>{note}</span></figcaption>\n{svg}</figure>\n"
