"""What a report says of secure aggregation: who sees what, what is pinned, how the sessions went."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

from common.report_style import (
    bullets,
    fixed,
    many,
    pairs,
    safe,
    table,
    tally,
)
from common.secagg.graph import GraphRule, threshold
from server.report_accounts import Run

_SHOWN = 50  # sessions and faults, the newest

_WHO = (
    ("a site's records, gradients, loss", "no", "no", "no"),
    ("a site's update", "no", "no", "no"),
    ("how many records a site has", "no", "no", "no"),
    ("the sum over {least} sites or more", "<b>yes</b>", "no", "<b>yes</b>, less its own"),
    ("the adapter after each round", "<b>yes</b>", "<b>yes</b>", "<b>yes</b>"),
    ("who took part, and where one dropped out", "<b>yes</b>", "<b>yes</b>", "<b>yes</b>"),
    ("that a site refused, and a code for why", "<b>yes</b>", "no", "<b>yes</b>"),
)


def sums(run: Run) -> str:
    """The section; where updates travelled in the clear, a sentence that says so."""
    if run.config.study.plain_updates:
        return (
            '<h2>Who sees what</h2>\n<div class="box"><p><strong>The server saw each site\'s '
            "update.</strong> This run was a study without secure aggregation.</p></div>\n"
        )
    section = run.config.aggregation
    least, c_max = section.min_cohort or 0, section.c_max or 0
    asked = max((r.asked for r in run.rounds), default=0)
    rule = GraphRule()
    needed = threshold(asked, Fraction(c_max, max(least, 1))) if asked else 0
    facts = [
        ("Smallest sum", f"{least} sites; a session with fewer aborts, and reveals nothing"),
        (
            "Colluders",
            f"up to {many(c_max, 'site')} together with the server learn the sum of the others, at least "
            f"{least - c_max}"
            if c_max
            else "none besides the server: raise aggregation.min_cohort to 4 for one",
        ),
        ("Threshold", f"{needed} of {asked} sites that were asked must stay to the end"),
        (
            "Graph",
            "every site shares with every other"
            if asked <= rule.complete_up_to
            else "each site shares with its neighbours on a ring; see docs/protocol.md for what that weakens",
        ),
        ("Words", f"{section.ring_bits.value} bits each"),
        ("Sessions", _sessions(run)),
    ]
    heads = [("", "text"), ("the server", "text"), ("another site", "text")]
    if c_max:
        heads.append((f"{many(c_max, 'colluding site')} and the server", "text"))
    rows = [("", [cell.format(least=least) for cell in row[: len(heads)]]) for row in _WHO]
    stops = [
        "What the sum itself says, and what two sums differ by: that is what differential privacy is for.",
        "Poisoning: nobody sees single updates, so a site can send a harmful one, up to the encoding's clip.",
        "Refusal: any site, and the server, can make a round fail. Nothing is revealed then.",
    ]
    return (
        f'<h2>Who sees what</h2>\n<div class="box">{table(heads, rows)}'
        f"<h3>Not stopped by it</h3>\n{bullets(stops)}"
        f"<h3>How it ran</h3>\n{pairs(facts)}{_faults(run)}</div>\n{_metrics(run)}"
    )


def _sessions(run: Run) -> str:
    if not run.sessions:
        return "none"
    ended = Counter("with a sum" if s.outcome == "sum" else "without" for s in run.sessions)
    said = f"{len(run.sessions):,}: {tally(ended)}"
    reasons = Counter(s.outcome.split(":")[0] for s in run.sessions if s.outcome != "sum")
    return said + (f"; fell short in {tally(reasons)}" if reasons else "")


def _faults(run: Run) -> str:
    rows = [
        ("out", [str(s.round), str(s.attempt), str(site), safe(exchange), safe(fault), str(about or "–")])
        for s in run.sessions
        for site, exchange, fault, about in s.blames
    ]
    if not rows:
        return "<p>No site sent anything wrong.</p>"
    heads = [
        ("round", ""),
        ("attempt", ""),
        ("site", ""),
        ("exchange", "text"),
        ("fault", "text"),
        ("share of", ""),
    ]
    return f"<h3>What sites sent wrong</h3>\n{table(heads, rows[-_SHOWN:])}"


def _metrics(run: Run) -> str:
    """Of sites' own records, where the federation has them on."""
    measured = [(r.round, r.metrics) for r in run.rounds if r.metrics]
    if not measured:
        return ""
    heads = [("before round", ""), ("records", ""), ("accuracy", ""), ("loss", ""), ("by label", "text")]
    rows = []
    for number, m in measured[-_SHOWN:]:
        labels = ", ".join(
            f"{safe(label)} {fixed(accuracy)}" for label, (_, accuracy) in (m.get("by_label") or {}).items()
        )
        rows.append(
            ("", [str(number), f"{m['records']:,.0f}", fixed(m["accuracy"]), fixed(m["loss"]), labels])
        )
    return (
        '<h2>On the sites\' own records</h2>\n<p class="small">Sums over the sites of a round, with each '
        "site's noise in them, and charged to each site like training. The adapter is the one that the round "
        f"began with; losses are clipped to {run.config.metrics.loss_clip:g} a record.</p>\n"
        + table(heads, rows)
    )
