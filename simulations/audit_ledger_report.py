"""The page of an audit of ledgers, for a person who is no specialist.

Self-contained: no scripts, nothing loaded from anywhere, every value escaped; the same audit gives the same
bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

from common.identity import fingerprint
from common.ledger_checks import ScopeReport
from common.report_style import STYLE, alarm, bullets, general, many, pairs, rounded_up, safe, table
from simulations.audit_types import MEANINGS, Audit, Check, Outcome, SiteAudit, endings, plain, worst

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_EXTRA = """
.passed { color: var(--first); font-weight: 600; } .failed { color: var(--alarm); font-weight: 600; }
.partly, .skipped { color: #9a6a00; font-weight: 600; } .not-reached { color: var(--faint); }
@media (prefers-color-scheme: dark) { .partly, .skipped { color: #e0b040; } }
td.wrap { white-space: normal; min-width: 230px; text-align: left; } th.wrap { text-align: left; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: 4px 22px 16px; margin: 16px 0;
  break-inside: avoid; } .card.bad { border: 2px solid var(--alarm); }
.card h3 { font-size: 18px; margin: 12px 0 4px; display: flex; gap: 12px; justify-content: space-between;
  flex-wrap: wrap; } .card h3 small { font-size: 14px; font-weight: 500; }
.spent { display: grid; grid-template-columns: minmax(110px, 1fr) minmax(160px, 3fr) minmax(150px, 1fr);
  gap: 4px 16px; align-items: center; margin: 12px 0 4px; font-variant-numeric: tabular-nums; }
.spent p { margin: 0; } .spent .of { color: var(--faint); font-size: 14px; }
.bar { height: 12px; border-radius: 6px; background: var(--shade); }
.bar .in { fill: var(--first); } .bar .over { fill: var(--alarm); }
.steps { display: flex; flex-wrap: wrap; gap: 6px; margin: 12px 0; padding: 0; list-style: none; }
.steps li { border: 1px solid var(--line); border-radius: 14px; padding: 1px 11px; font-size: 13.5px; }
.origin { overflow-wrap: anywhere; }
@media (max-width: 600px) { .card { padding: 4px 14px 12px; } .spent { grid-template-columns: 1fr; } }
"""
_SIGNS = {
    Outcome.PASSED: "✓",
    Outcome.PARTLY: "≈",
    Outcome.SKIPPED: "–",
    Outcome.UNREACHED: "·",
    Outcome.FAILED: "✗",
}
_UNFOLDED = 24  # cards that are shown at once; failed ones come first

_LIMITS = """<h2>What this audit does not show</h2>
<div class="box">
<ul>
<li>That the noise was really added. A ledger says what was <em>charged</em>, not what was computed:
<code>confide audit mechanism</code> plants made-up records in the training code and looks for them.</li>
<li>A computation that was never charged at all, by a program that does not ask the ledger.</li>
<li>What was cut off after the last head that somebody else kept. The more often a site shows its head, to the
server or to an auditor, the less there is to cut.</li>
<li>That the records of two data sources are different ones, where the site says so; and that a person has
only one record. A record at k sites, or a person with k records, is protected less.</li>
<li>Anything about the model itself, or about sites that are not on this page.</li>
</ul></div>
"""
_WORDS = """<h2>The words on this page</h2>
<div class="box"><ul>
<li><strong>ε</strong> (epsilon) bounds how much anyone can learn about one single record from all that the
site ever sent: at ε = 0 nothing, at ε = 1 little, and above 10 the bound says next to nothing.
<strong>δ</strong> is the small chance that the bound is missed.</li>
<li>A <strong>ledger</strong> is the site's own book of what each computation on its records has cost, kept
so that nothing can be taken out again.</li>
<li>The <strong>budget</strong> is the most that may ever be spent on the records of a data source. The site
fixed it before the first computation.</li>
<li>The <strong>head</strong> of a ledger is its length and a fingerprint of all of it, signed by the site.
Who keeps one can tell later whether the book was shortened or rewritten.</li>
</ul></div>
"""


def ledger_page(found: Audit, strict: bool) -> str:
    bad = [check for check in found.checks if check.outcome is Outcome.FAILED]
    gaps = found.gaps()
    failed = found.exit_code(strict) != 0
    head = "The ledgers hold" if not failed else "The ledgers do not hold"
    if failed and not bad:
        head = "The audit is not complete"
    elif gaps and not failed:
        head = "The ledgers hold, as far as they were checked"
    entries = sum(site.entries for site in found.sites)
    facts = f"{many(len(found.sites), 'ledger')} · {entries:,} entries · nine checks of each"
    body = (
        f'<p class="over">Confide ledger audit</p>\n<h1>{head}</h1>\n<p class="facts">{facts}</p>\n'
        f'<p class="verdict">{_verdict(found, bad, gaps, failed)}</p>\n'
        + "".join(alarm(_failure(check, whose)) for check, whose in found.failures())
        + (
            f'<div class="care"><p>Not, or not wholly, checked:</p>\n{bullets(_gaps(found))}</div>\n'
            if gaps
            else ""
        )
        + _tiles(found)
        + "<h2>The sites</h2>\n"
        + _cards(found)
        + _checks(found)
        + _LIMITS
        + _WORDS
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Confide ledger audit: {head}</title>\n<style>{STYLE}{_EXTRA}</style>\n</head>\n<body>\n"
        f"<main>\n{body}</main>\n</body>\n</html>\n"
    )


def _verdict(found: Audit, bad: Sequence[Check], gaps: Sequence[str], failed: bool) -> str:
    if bad:
        numbers = sorted({check.number for check in bad if check.number})
        which = f"Check {', '.join(map(str, numbers))} failed." if numbers else "A ledger could not be read."
        return (
            f"<strong>{which}</strong> Do not rely on what these sites or this run say about privacy before "
            "it is known why."
        )
    spent = [(s.epsilon_rdp, s.scope.target_epsilon) for site in found.sites for s in site.scopes]
    most = f" At most ε = {rounded_up(max(spent)[0])} was spent on any site's records." if spent else ""
    if failed:
        return f"Nothing was found wrong, but not everything was checked, and everything was asked for.{most}"
    if gaps:
        return f"Nothing was found wrong in what was checked; what was not is listed below.{most}"
    return f"Every check of every ledger passed: no site has spent more than its own budget.{most}"


def _failure(check: Check, whose: str) -> str:
    name = f"Check {check.number}, {MEANINGS[check.number].name}" if check.number else "Not read"
    return f"<strong>{name}</strong> ({_safe(whose)}; <code>{_safe(check.error)}</code>): {_safe(check.note)}"


def _gaps(found: Audit) -> list[str]:
    seen: dict[tuple[int, str], int] = {}
    for check in sorted(found.checks, key=lambda check: check.number):
        if check.outcome in (Outcome.PARTLY, Outcome.SKIPPED):
            seen[check.number, check.note] = seen.get((check.number, check.note), 0) + 1
    lines = [
        f"check {number}, {MEANINGS[number].name}, of {many(count, 'ledger')}: {_safe(note)}"
        if number
        else f"{many(count, 'site')}: {_safe(note)}"
        for (number, note), count in seen.items()
    ]
    if found.absent:
        listed = ", ".join(map(str, found.absent[:20])) + (" …" if len(found.absent) > 20 else "")
        lines.append(f"no ledger was given of {many(len(found.absent), 'site')}: {listed}")
    return lines


def _tiles(found: Audit) -> str:
    spent = [(s.epsilon_rdp, s.scope) for site in found.sites for s in site.scopes]
    charges = sum(sum(site.states.values()) for site in found.sites)
    given_back = sum(site.states.get("cancelled", 0) for site in found.sites)
    made = [c.outcome for site in found.sites for c in site.checks if c.number]
    tiles = [
        ("ledgers", f"{len(found.sites):,}"),
        ("checks passed", f"{made.count(Outcome.PASSED):,} of {len(made):,}"),
        (
            "charges",
            f"{charges:,}<small>{given_back:,} of them given back, before anything was computed</small>",
        ),
    ]
    if spent:
        most, scope = max(spent, key=lambda item: item[0])
        tiles.append(
            (
                "most spent",
                f"ε = {rounded_up(most)}<small>of a budget of {general(scope.target_epsilon)}, δ = "
                f"{general(scope.delta)}</small>",
            )
        )
    return pairs(tiles, "tiles")


def _cards(found: Audit) -> str:
    sites = sorted(found.sites, key=lambda site: worst(site.checks) is not Outcome.FAILED)
    cards = [_card(site) for site in sites]
    folded = "".join(cards[_UNFOLDED:])
    rest = f"<details><summary>{many(len(cards) - _UNFOLDED, 'more site')}</summary>\n{folded}</details>\n"
    return "".join(cards[:_UNFOLDED]) + (rest if folded else "")


def _card(site: SiteAudit) -> str:
    end = worst(site.checks)
    said = {
        Outcome.PASSED: "all nine checks passed",
        Outcome.FAILED: "failed",
    }.get(end, "passed, as far as it was checked")
    steps = "".join(
        f'<li class="{_kind(c.outcome)}" title="{c.outcome.value}">{c.number} {MEANINGS[c.number].name} '
        f"{_SIGNS[c.outcome]}</li>"
        for c in site.checks
        if c.number
    )
    charges = ", ".join(f"{count:,} {state}" for state, count in sorted(site.states.items())) or "none"
    facts = [("entries", f"{site.entries:,}"), ("charges", charges)]
    facts += [(f"check {c.number}", _safe(c.note)) for c in site.checks if c.note and c.number > 5]
    if site.public:
        facts.append(("key", f"<code>{fingerprint(bytes.fromhex(site.public))}</code>"))
    if site.policy:
        facts.append(("rules in force", f"SHA-256 <code>{site.policy[:16]}…</code>"))
    facts.append(("read from", f'<span class="origin">{_safe(site.origin)}</span>'))
    return (
        f'<section class="card{" bad" if end is Outcome.FAILED else ""}">\n'
        f'<h3>Site {_safe(site.called)} <small class="{_kind(end)}">{said}</small></h3>\n'
        + "".join(_spent(report) for report in site.scopes)
        + f'<ul class="steps">{steps}</ul>\n{pairs(facts)}</section>\n'
    )


def _kind(outcome: Outcome) -> str:
    return outcome.value.replace(" ", "-")


def _spent(report: ScopeReport) -> str:
    scope, share = report.scope, report.epsilon_rdp / report.scope.target_epsilon
    width = max(0.0, min(100.0, 100 * share))
    label = f"ε = {rounded_up(report.epsilon_rdp)} of {general(scope.target_epsilon)}"
    other = "" if report.epsilon_pld is None else f", {rounded_up(report.epsilon_pld)} by loss distributions"
    return (
        f'<div class="spent"><p><strong>{_safe(scope.name)}</strong></p>'
        f'<svg class="bar" viewBox="0 0 100 12" preserveAspectRatio="none" role="img" aria-label="{label}">'
        f'<rect class="{"in" if share <= 1 else "over"}" width="{width:.2f}" height="12"/></svg>'
        f'<p>{label}</p><p></p><p class="of">{many(report.reservations, "charge")}{other}</p>'
        f'<p class="of">δ = {general(scope.delta)}</p></div>\n'
    )


def _checks(found: Audit) -> str:
    columns = [("", "text"), ("check", "text"), ("result", "text"), ("what it shows when it passes", "wrap")]
    rows = []
    for number, meaning in MEANINGS.items():
        made = [check for check in found.checks if check.number == number]
        end = worst(made)
        text = end.value if len({c.outcome for c in made}) <= 1 else endings(made)
        rows.append(
            (
                "out" if end is Outcome.FAILED else "",
                [str(number), meaning.name, f'<span class="{_kind(end)}">{text}</span>', meaning.shows],
            )
        )
    return f"<h2>The nine checks</h2>\n{table(columns, rows)}"


def _safe(text: str) -> str:
    return safe(plain(text))
