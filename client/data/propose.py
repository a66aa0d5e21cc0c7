"""A recipe from the findings of a check, for people to read and to change."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import tomli_w

from client.data.check import Checked
from client.data.findings import Code, Finding, listed_rows
from client.data.label_checks import label_key
from client.data.personal import Personal
from client.data.reading import FALLBACK
from client.data.recipe import StepKind
from common.kinds import TaskKind

_SIMPLE = {  # the step that cures a finding by itself, in the order in which they should run
    Code.UNREADABLE_ROW: StepKind.DROP_UNREADABLE,
    Code.MOJIBAKE: StepKind.FIX_MOJIBAKE,
    Code.CONTROL: StepKind.STRIP_INVISIBLE,
    Code.INVISIBLE: StepKind.STRIP_INVISIBLE,
    Code.HTML: StepKind.STRIP_HTML,
    Code.NOT_NFC: StepKind.NORMALISE_UNICODE,
    Code.SPARE_SPACE: StepKind.COLLAPSE_SPACE,
    Code.EMPTY_TEXT: StepKind.DROP_EMPTY,
    Code.OVER_LONG: StepKind.DROP_LONG,
    Code.IN_TEST: StepKind.DROP_IN_TEST,
    Code.CONFLICT: StepKind.DROP_CONFLICTS,
    Code.DUPLICATE: StepKind.DROP_DUPLICATES,
    Code.NEAR_DUPLICATE: StepKind.DROP_NEAR_DUPLICATES,
    Code.SEVERAL_RECORDS: StepKind.CAP_PERSON,
}
_WRITING = (Code.BYTE_ORDER_MARK, Code.MIXED_NEWLINES)  # gone by writing the file anew
_REWRITES = (
    StepKind.FIX_MOJIBAKE,
    StepKind.STRIP_INVISIBLE,
    StepKind.STRIP_HTML,
    StepKind.NORMALISE_UNICODE,
    StepKind.COLLAPSE_SPACE,
    StepKind.MASK,
)
_HEAD = """\
# Proposed by `confide client data clean --propose`. Read it: each step changes data or leaves records out.
# Steps run in this order, again and again until none changes anything.
"""


def proposed(checked: Checked) -> str:
    """The recipe as TOML. A finding that no step cures stands in it as a comment."""
    by_code: dict[Code, list[Finding]] = defaultdict(list)
    for finding in checked.findings:
        if not finding.in_test:
            by_code[finding.code].append(finding)
    why: dict[StepKind, list[Finding]] = defaultdict(list)
    kinds: list[Personal] = []
    cured: set[Code] = set(_WRITING)
    for code, step in _SIMPLE.items():
        why[step] += by_code.get(code, [])
    why[StepKind.DECODE] = by_code.get(Code.INVALID_UTF8, [])
    names = _variants(checked) if by_code.get(Code.LABEL_VARIANTS) else {}
    if not names:
        cured.add(Code.LABEL_VARIANTS)  # blanks alone: collapse-space
    why[StepKind.MAP_LABELS] = by_code.get(Code.LABEL_VARIANTS, []) if names else []
    for kind in Personal:
        if kind is not Personal.NAME and by_code.get(kind.code):
            kinds.append(kind)
            why[StepKind.MASK] += by_code[kind.code]
    if checked.subject.kind is TaskKind.QUESTION_ANSWERING:
        for step in _REWRITES:
            why[step] = []
    parts = [_HEAD]
    for step in StepKind:
        if why[step]:
            cured |= {finding.code for finding in why[step]}
            comments = "".join(f"# {_comment(finding, checked)}\n" for finding in why[step])
            options = _options(step, checked, kinds, names)
            parts.append(comments + _written(step, options))
    if len(parts) == 1:
        parts.append("# Nothing was found that a step cures.\n" + _written(StepKind.DROP_EMPTY, {}))
    left = [finding for code, found in by_code.items() if code not in cured for finding in found]
    if left:
        parts.append(
            "# Left to people:\n" + "".join(f"# - {_comment(f, checked)} {f.code.remedy}\n" for f in left)
        )
    return "\n".join(parts)


def _written(step: StepKind, options: dict[str, Any]) -> str:
    plain = {name: value for name, value in options.items() if not isinstance(value, dict)}
    tables = {name: value for name, value in options.items() if isinstance(value, dict)}
    text = "[[step]]\n" + tomli_w.dumps({"do": step.label, **plain})
    return text + "".join(f"[step.{name}]\n{tomli_w.dumps(value)}" for name, value in tables.items())


def _comment(finding: Finding, checked: Checked) -> str:
    where = f", {checked.raw.unit}s {listed_rows(finding.rows, 6)}" if finding.rows else ""
    text = f"{finding.code.label}{f' in {finding.column}' if finding.column else ''}{where}: {finding.says}"
    return "".join(char if char.isprintable() else "�" for char in text)


def _options(
    step: StepKind, checked: Checked, kinds: list[Personal], names: dict[str, str]
) -> dict[str, Any]:
    match step:
        case StepKind.DECODE:
            return {"encoding": FALLBACK}
        case StepKind.MASK:
            return {"kinds": [kind.label for kind in kinds]}
        case StepKind.MAP_LABELS:
            return {"map": names}
        case StepKind.DROP_LONG:
            return {"characters": checked.subject.max_characters}
        case StepKind.CAP_PERSON:
            return {"records": checked.people.proposed.records if checked.people else 1}
        case _:
            return {}


def _variants(checked: Checked) -> dict[str, str]:
    """Each other spelling of a label, to the usual one (or to that which task.labels has)."""
    return dict(_spellings(checked))


def _spellings(checked: Checked) -> Iterator[tuple[str, str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name in checked.classes:
        groups[label_key(name)].append(name)
    known = checked.subject.labels
    for names in groups.values():
        usual = min(names, key=lambda name: (name not in known, -checked.classes[name], name))
        yield from ((name, usual) for name in sorted(names) if name != usual)
