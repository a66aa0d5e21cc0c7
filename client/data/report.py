"""The findings of a check as a page for the site's own people. Self-contained; every value is escaped."""

from __future__ import annotations

from client.data.check import Checked
from client.data.findings import Finding, Severity, listed_rows
from client.data.personal import Personal, mask
from common.cells import short
from common.report_style import bullets, many, page, pairs, safe, table

BLIND = (
    "Rules find personal data by its form. They do not see names in no list, addresses, illnesses, or what "
    "somebody is recognised by: a file without findings is not anonymous."
)
_ROWS = 30  # runs of row numbers in a line of the page
_LABELS = 40  # labels in its table
_STYLE = """
td { vertical-align: top; } td.text { white-space: normal; } td.text code { white-space: normal; }
tr.error td:first-child { color: var(--alarm); font-weight: 600; }
tr.warning td:first-child { color: var(--second); font-weight: 600; }
"""


def summary_lines(checked: Checked) -> list[str]:
    """What is in the file, in a few plain lines."""
    rows = len(checked.raw.rows)
    columns = ", ".join(map(short, checked.columns)) or "without names that are known"
    lines = [f"{checked.raw.path}: {rows:,} rows, columns {columns}"]
    for one in checked.lengths:
        beyond = f"; {one.beyond:,} do not fit into {one.limit:,}" if one.beyond else ""
        lines.append(
            f"length in {one.unit}: {one.least:,} to {one.most:,}, half up to {one.median:,}{beyond}"
        )
    if checked.classes:
        counts = checked.classes.most_common()
        (most, many_), (least, few) = counts[0], counts[-1]
        lines.append(
            f"labels: {len(counts):,}, from {_label(most)} ({many_:,} times) "
            f"to {_label(least)} ({few:,} times)"
        )
    if checked.people is None:
        lines.append(
            "people: no person column was named (--person), so records of one person are not counted"
        )
    else:
        people = checked.people
        lines.append(f"people: {len(people.counts):,}, with up to {people.most:,} records each")
        if people.most > 1:
            lines += [
                f"  at most {cap.records:,} each: {cap.kept:,} records stay, ε = {cap.epsilon:g} for a person"
                for cap in people.choices
            ]
    if checked.test is not None:
        lines.append(f"public evaluation set: {checked.test.path}, {len(checked.test.rows):,} rows")
    return lines


def _label(name: str) -> str:
    return short(mask(name, tuple(Personal)))


def check_page(checked: Checked) -> str:
    name = safe(checked.raw.path.name)
    counts = {severity: sum(f.severity is severity for f in checked.findings) for severity in Severity}
    found = ", ".join(many(count, severity.value) for severity, count in counts.items() if count)
    body = (
        f'<p class="over">Confide data check</p>\n<h1>{name}</h1>\n'
        f'<p class="facts">SHA-256 <code>{safe(checked.raw.sha256 or "of a folder: none")}</code></p>\n'
        f'<p class="verdict">{f"<strong>{found}.</strong>" if found else "Nothing found."}</p>\n'
        + _tiles(checked)
        + _findings(checked)
        + _people(checked)
        + _labels(checked)
        + _MEANING
    )
    return page(f"Confide data check: {name}", body, style=_STYLE)


def _tiles(checked: Checked) -> str:
    tiles = [("rows", f"{len(checked.raw.rows):,}<small>that can be read</small>")]
    for one in checked.lengths:
        beyond = f"{one.beyond:,} do not fit into {one.limit:,}"
        tiles.append(
            (f"median {one.unit}", f"{one.median:,}<small>{one.least:,} to {one.most:,}; {beyond}</small>")
        )
    if checked.classes:
        tiles.append(("labels", f"{len(checked.classes):,}"))
    if checked.people is not None:
        tiles.append(
            (
                "people",
                f"{len(checked.people.counts):,}<small>up to {checked.people.most:,} records each</small>",
            )
        )
    if checked.test is not None:
        tiles.append(
            ("public rows", f"{len(checked.test.rows):,}<small>{safe(checked.test.path.name)}</small>")
        )
    return pairs(tiles, "tiles")


def _findings(checked: Checked) -> str:
    if not checked.findings:
        return ""
    columns = [
        ("", "text"),
        ("what", "text"),
        ("column", "text"),
        (f"{checked.raw.unit}s", "text"),
        ("found", "text"),
        ("what to do", "text"),
    ]
    return "<h2>Findings</h2>\n" + table(columns, ((f.severity.value, _row(f)) for f in checked.findings))


def _row(finding: Finding) -> list[str]:
    where = " (test)" if finding.in_test else ""
    return [
        finding.severity.value,
        f"<code>{finding.code.label}</code>{where}",
        f"<code>{safe(finding.column)}</code>" if finding.column else "–",
        listed_rows(finding.rows, _ROWS) or "–",
        safe(finding.says),
        safe(finding.code.remedy),
    ]


def _people(checked: Checked) -> str:
    people = checked.people
    if people is None or people.most < 2:
        return ""
    rows = [
        (
            "",
            (
                f"{cap.records:,}",
                f"{cap.kept:,}",
                f"{cap.epsilon:g}",
                "–" if cap != people.proposed else "proposed",
            ),
        )
        for cap in people.choices
    ]
    return (
        "<h2>Records of one person</h2>\n"
        f"<p>Privacy is promised to a record, at ε = {people.epsilon:g}. Whoever has several records is "
        "covered only by that ε times their number; δ grows as well. A cap bounds both.</p>\n"
        + table(
            [("at most each", ""), ("records that stay", ""), ("ε for a person", ""), ("", "text")],
            rows,
        )
    )


def _labels(checked: Checked) -> str:
    if not checked.classes:
        return ""
    counts = checked.classes.most_common()
    shown = counts if len(counts) <= _LABELS else counts[: _LABELS // 2] + counts[-_LABELS // 2 :]
    rest = len(counts) - len(shown)
    note = f'<p class="small">{rest:,} labels between these are left out.</p>\n' if rest else ""
    rows = [("", (f"<code>{safe(_label(name))}</code>", f"{count:,}")) for name, count in shown]
    return "<h2>Labels</h2>\n" + note + table([("label", "text"), ("records", "")], rows)


_MEANING = (
    '<h2>What this says</h2>\n<div class="box">'
    + bullets(
        [
            "Nothing left the site, and nothing was changed. This page itself shows row numbers, labels and "
            "how often they occur: it is for the site's own people.",
            "An error stops training, or makes it learn something wrong. A warning makes the result worse, "
            "or says more about people than it should. A note is worth knowing.",
            safe(BLIND),
            "Privacy noise hides what single records add to the model. It does not hide what names of labels "
            "say, since they are public; nor does it help whoever stands in many records.",
        ]
    )
    + "</div>\n"
)
