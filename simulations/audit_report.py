"""The page of a mechanism audit, for a person who decides whether to trust a federation.

Self-contained: no scripts, nothing loaded from anywhere, every value escaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from common.report_style import alarm, figure, fixed, general, many, page, pairs, safe, table
from simulations.audit_plots import FAINT, FIRST, SECOND, Curve, Mark, bars, outline, plot
from simulations.audit_stats import Floats, shares
from simulations.canaries import FALSE_ALARMS, NOISE_EDGES, ClaimAudit, MechanismAudit
from simulations.canary_bench import OTHERS, SITES, Claim
from simulations.canary_checks import Check

EXTRA_STYLE = """
.passed { color: var(--first); font-weight: 600; } .failed { color: var(--alarm); font-weight: 600; }
td.wrap { white-space: normal; min-width: 230px; text-align: left; } td.name { white-space: normal;
  min-width: 170px; text-align: left; } th.wrap, th.name, th.unit { text-align: left; }
td.unit { white-space: normal; min-width: 110px; text-align: left; }
"""
_DASH = "6 4"


def p_text(p: float | None) -> str:
    if p is None:
        return "exact"
    return "< 1e-12" if p < 1e-12 else f"{p:.2g}"


def mechanism_page(audit: MechanismAudit, seed: int) -> str:
    """One audit of the mechanism; `seed` repeats it."""
    bad = [check for check in audit.checks if not check.passed]
    head = "The noise is there" if not bad else "The mechanism is not what it claims to be"
    facts = (
        f"{many(len(audit.checks), 'check')} · {len(audit.claims[0].included):,} canaries at {SITES} sites · "
        f"seed {seed} · {audit.seconds:.1f} seconds"
    )
    return page(
        f"Confide mechanism audit: {head}",
        f'<p class="over">Confide mechanism audit</p>\n<h1>{head}</h1>\n<p class="facts">{facts}</p>\n'
        f'<p class="verdict">{_verdict(audit, len(bad))}</p>\n'
        + "".join(alarm(_failure(check)) for check in bad)
        + _mechanism_tiles(audit)
        + _METHOD
        + f'<h2>What was seen</h2>\n<div class="plots">\n{"".join(_mechanism_plots(audit))}</div>\n'
        + _checks(audit)
        + _MECHANISM_LIMITS,
        style=EXTRA_STYLE,
    )


def _verdict(audit: MechanismAudit, bad: int) -> str:
    claims = " and ".join(
        f'ε = {general(c.claim.epsilon)} (<span class="whole">{safe(c.claim.name)}</span>)'
        for c in audit.claims
    )
    if bad:
        return (
            f"<strong>{bad} of {many(len(audit.checks), 'check')} failed.</strong> The code that trains does "
            f"not do what is claimed of it: {claims}. Do not train on private data with it. An honest "
            f"mechanism fails by chance in less than {FALSE_ALARMS:.0%} of audits, so one more audit with "
            "another seed settles whether this was one of them."
        )
    return (
        f"All {many(len(audit.checks), 'check')} passed. The code that trains was asked to keep {claims}. "
        "Its noise, its sampling and its clipping are, as far as these checks can see, what that takes."
    )


def _failure(check: Check) -> str:
    of = f" ({safe(check.of)})" if check.of else ""
    return (
        f"<strong>{safe(check.name)}</strong>{of}: expected {'at most ' if check.at_most else ''}"
        f"{_value(check.expected)}, found {_value(check.found)} ({safe(check.unit)}). This is how it looks "
        f"with {safe(check.catches)}."
    )


def _value(value: float) -> str:
    return f"{value:,.4g}".replace("-", "−") if math.isfinite(value) else "no number"


def _mechanism_tiles(audit: MechanismAudit) -> str:
    passed = sum(check.passed for check in audit.checks)
    noise = [check for check in audit.checks if check.name == "noise wherever no record reaches"]
    furthest = max(noise, key=lambda check: abs(check.found / check.expected - 1))
    return pairs(
        [
            ("checks passed", f"{passed} of {len(audit.checks)}"),
            ("claimed", f"ε = {general(audit.claimed_epsilon)}<small>an upper bound, by accounting</small>"),
            (
                "found at least",
                f"ε = {fixed(audit.lower_bound, 2)}<small>a lower bound, by guessing who was in</small>",
            ),
            (
                "noise found",
                f"{furthest.found / furthest.expected:.1%}<small>of what was promised, where it was furthest "
                "off</small>",
            ),
        ],
        "tiles",
    )


_METHOD = f"""<h2>What was done</h2>
<div class="box"><p>Made-up records, <strong>canaries</strong>, were planted in the training data of
{SITES} sites, and then looked for in what the sites send.</p>
<ul>
<li>Each canary pulls at one number of the adapter that no other record touches, a hundred times harder
than a single record is allowed to. Clipping must cut it down to the same small contribution as any
record.</li>
<li>A coin decided for each canary whether it is in the data. At those that are out there is noise and
nothing else, so it can be measured. At those that are in, the contribution can be measured on top.</li>
<li>Training, sampling, clipping, noise, planning and the encoding for secure aggregation are the code
that sites run. Only the model and the records are made up. Each site has {OTHERS} other records
besides.</li>
<li>Each check compares what was found with what an honest mechanism must give. All checks together fail
an honest mechanism in less than {FALSE_ALARMS:.0%} of audits.</li>
</ul></div>
"""

_MECHANISM_LIMITS = """<h2>What this does not show</h2>
<div class="box">
<ul>
<li>That ε is as small as the lower bound. The truth lies between the bound and the claim; guessing who
was in is a weak instrument, so a bound near zero is what an honest mechanism gives too.</li>
<li>Noise that is less than 2% off, or a fault that shows only with your model. Whether the gradients of
your model and machine are right is tested at the start of every run (<code>confide doctor</code> does
it on demand).</li>
<li>How a site draws the key of its noise, what it has spent before, or that a site runs this code at
all.</li>
<li>What time, failures or log files may give away.</li>
</ul></div>
<footer><p class="small">Lower bound on ε: Steinke, Nasr &amp; Jagielski 2023, “Privacy Auditing with
One (1) Training Run”. Of the canaries, those with the highest scores are said to be in and those with
the lowest out. If the claim holds, of r guesses v or more are right with a probability of at most
P[Bin(r, q) ≥ v] + 2mδ·max<sub>i</sub> P[v &gt; Bin(r, q) ≥ v − i]/i, where q = 1/(1 + e<sup>−ε</sup>)
and m is the number of canaries. The bound is the largest ε that this refutes, corrected for trying
several r.</p></footer>
"""


def _mechanism_plots(audit: MechanismAudit) -> Iterator[str]:
    for found in audit.claims:
        yield _scores(found)
    x = np.linspace(-4, 4, 161)
    width = float(NOISE_EDGES[1] - NOISE_EDGES[0])
    curve = width * np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    curves = [
        Curve("found", *outline(audit.noise, NOISE_EDGES), FIRST, area=True),
        Curve("promised", x, curve, SECOND, _DASH),
    ]
    high = 1.1 * max(float(curve.max()), float(audit.noise.max()))
    svg = plot("Noise, found and promised", "promised standard deviations", curves, (-4, 4), (0, high))
    yield figure("Noise, found and promised", "at numbers that no record touches; share of them", svg)
    rows = [(safe(c.claim.name), c.lower_bound, c.claim.epsilon) for c in audit.claims]
    svg = bars("Claim and lower bound", rows, ("lower bound on ε", "claimed ε"))
    yield figure("Claim and lower bound", "a bar that passes its line would refute the claim", svg)


def _scores(found: ClaimAudit) -> str:
    claim, into = found.claim, found.included
    edges: Floats = np.linspace(*_padded(found.own), 29)
    parts = [shares(found.own[chosen], edges) for chosen in (~into, into)]
    ordered = np.sort(found.own)
    half = found.bound.guesses // 2
    middle = claim.sample_rate * claim.steps
    curves = [
        Curve("left out", *outline(parts[0], edges), FIRST, area=True),
        Curve("included", *outline(parts[1], edges), SECOND, area=True),
    ]
    marks = [
        Mark("0 and q·T", 0.0, FAINT, ""),
        Mark("", middle, FAINT, ""),
        Mark("guess “out” below, “in” above", float(ordered[half - 1]), FAINT, "2 4"),
        Mark("", float(ordered[-half]), FAINT, "2 4"),
    ]
    high = 1.1 * max(float(part.max()) for part in parts)
    title = f"Canaries: {safe(claim.name)}"
    svg = plot(
        title, "contributions read", curves, (float(edges[0]), float(edges[-1])), (0, high), marks=marks
    )
    note = (
        "share of canaries by what is read of them; noise of σ·√T = "
        f"{claim.noise_multiplier:.2f}·√{claim.steps} must hide {middle:g}. Best of the guesses: "
        f"{found.bound.right} right of {found.bound.guesses}"
    )
    return figure(title, note, svg)


def _padded(values: Floats) -> tuple[float, float]:
    low, high = float(min(values.min(), 0.0)), float(max(values.max(), 0.0))
    margin = 0.04 * (high - low) or 1.0
    return low - margin, high + margin


def _checks(audit: MechanismAudit) -> str:
    columns = [
        ("check", "name"),
        ("expected", ""),
        ("found", ""),
        ("unit", "unit"),
        ("p", ""),
        ("fails below", ""),
        ("", "text"),
        ("what it would have caught", "wrap"),
    ]

    def cells(check: Check) -> list[str]:
        return [
            safe(check.name),
            ("≤ " if check.at_most else "") + _value(check.expected),
            _value(check.found),
            safe(check.unit),
            p_text(check.p_value),
            "–" if check.level is None else f"{check.level:.2g}",
            '<span class="passed">ok</span>' if check.passed else '<span class="failed">failed</span>',
            safe(check.catches),
        ]

    text = "<h2>Every check</h2>\n"
    for of in [*(c.claim.name for c in audit.claims), ""]:
        rows = [("" if c.passed else "out", cells(c)) for c in audit.checks if c.of == of]
        claim = next((c.claim for c in audit.claims if c.claim.name == of), None)
        text += f"<h3>{_heading(claim) if claim else 'The mechanism as such'}</h3>\n{table(columns, rows)}"
    return (
        text + '<p class="small">p: how often an honest mechanism looks so bad or worse. “exact”: chance '
        "plays no part, or none that could be met. A contribution is what one clipped record adds in one "
        "step.</p>\n"
    )


def _heading(claim: Claim) -> str:
    return (
        f"{safe(claim.name)}: claimed ε = {general(claim.epsilon)} at δ = {claim.delta:g}, with noise of "
        f"{claim.noise_multiplier:g} contributions a step"
    )
