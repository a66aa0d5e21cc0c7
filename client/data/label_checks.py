"""What is wrong with labels: names, numbers, tags, and how often each occurs."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from client.data.findings import Code, Finding
from client.data.personal import Personal, mask
from client.data.sheet import Sheet
from common.cells import nearest, short
from common.kinds import TaskKind
from common.targets import OUTSIDE, SEPARATOR

RARE = 10  # records of a label that are too few to learn it from under privacy
_IMBALANCED = 10  # times that the most frequent label is more frequent than the least
_EXAMPLES = 5
_FREE_TEXT = 0.5  # distinct labels to records, from which on labels nobody named are no classes


def label_findings(sheet: Sheet) -> Iterator[Finding]:
    subject, column = sheet.subject, sheet.subject.columns.label
    if column is None or column not in sheet.cells:
        return
    yield from _empty(sheet, column)
    match subject.kind:
        case TaskKind.REGRESSION:
            yield from _numbers(sheet, column)
        case TaskKind.TOKEN_CLASSIFICATION:
            yield from _tags(sheet, column)
        case _ if subject.classes and not _free_text(sheet):
            yield from _classes(sheet, column)
    if subject.kind is not TaskKind.TOKEN_CLASSIFICATION:
        yield from _conflicts(sheet, column)


def class_counts(sheet: Sheet) -> Counter[str]:
    """Records (or entities, of tags) of each label as it is written; empty where labels are no classes."""
    if sheet.subject.kind is TaskKind.TOKEN_CLASSIFICATION:
        tags = (tag for label in sheet.label if label for tag in label.split(" "))
        return Counter(tag[2:] for tag in tags if tag.startswith("B-"))
    if not sheet.subject.classes or _free_text(sheet):
        return Counter()
    return Counter(name for label in sheet.label if label for name in _names(sheet, label))


def labels_in_test(train: Sheet, test: Sheet) -> Iterator[Finding]:
    """Labels of the evaluation set that training never sees."""
    column, known = train.subject.columns.label, set(class_counts(train))
    if column is None or not known:
        return
    for name in sorted(set(class_counts(test)) - known):
        rows = [n for n, label in zip(test.numbers, test.label, strict=True) if label and name in label]
        says = f"The label {_shown(name)} occurs in the evaluation set alone ({len(rows):,} rows)."
        yield Finding(Code.UNKNOWN_LABEL, tuple(rows), says, column, in_test=True)


def _names(sheet: Sheet, label: str) -> list[str]:
    parts = label.split(SEPARATOR) if sheet.subject.kind is TaskKind.MULTI_LABEL else [label]
    return [part.strip() for part in parts if part.strip()]


def _free_text(sheet: Sheet) -> bool:
    """Nobody said that these labels are classes, and they look like answers."""
    if sheet.subject.kind is not None:
        return False
    labels = [label for label in sheet.label if label]
    return len(labels) > 20 and len(set(labels)) > _FREE_TEXT * len(labels)


def _empty(sheet: Sheet, column: str) -> Iterator[Finding]:
    if sheet.subject.kind is TaskKind.MULTI_LABEL:
        return  # no label at all is an answer, too
    rows = [
        n
        for n, label in zip(sheet.numbers, sheet.label, strict=True)
        if label is not None and not label.strip()
    ]
    if rows:
        yield Finding(Code.EMPTY_LABEL, tuple(rows), f"{_rows(rows)} without a label.", column)


def _classes(sheet: Sheet, column: str) -> Iterator[Finding]:
    rows: dict[str, list[int]] = defaultdict(list)
    written: dict[str, list[int]] = defaultdict(list)  # blanks at the ends and all
    for number, label in zip(sheet.numbers, sheet.label, strict=True):
        if label and label.strip():
            for name in _names(sheet, label):
                rows[name].append(number)
            for name in label.split(SEPARATOR) if sheet.subject.kind is TaskKind.MULTI_LABEL else [label]:
                written[name].append(number)
    known = sheet.subject.labels
    for name in sorted(set(rows) - set(known)) if known else ():
        near = nearest(name, known)
        hint = f" Is it {_shown(near)}?" if near else ""
        says = f"{_rows(rows[name])} with {_shown(name)}, which is not among task.labels.{hint}"
        yield Finding(Code.UNKNOWN_LABEL, tuple(rows[name]), says, column)
    folded: dict[str, list[str]] = defaultdict(list)
    for name in written:
        folded[label_key(name)].append(name)
    for names in folded.values():
        if len(names) > 1:
            usual, *others = sorted(names, key=lambda name: (-len(written[name]), name))
            where = sorted(number for name in others for number in written[name])
            shown = ", ".join(map(_shown, sorted(others)))
            says = f"{shown}: is it {_shown(usual)}, as in {_rows(written[usual])}?"
            yield Finding(Code.LABEL_VARIANTS, tuple(where), says, column)
    yield from _balance({name: len(those) for name, those in rows.items()}, rows, column)


def label_key(name: str) -> str:
    """Equal for labels that differ by case, blanks, hyphens or underscores alone."""
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def _balance(counts: dict[str, int], rows: dict[str, list[int]], column: str) -> Iterator[Finding]:
    rare = {name: count for name, count in counts.items() if count < RARE}
    if rare:
        listed = ", ".join(f"{_shown(name)} ({count})" for name, count in sorted(rare.items())[:_EXAMPLES])
        more = f" and {len(rare) - _EXAMPLES:,} more" if len(rare) > _EXAMPLES else ""
        where = sorted({number for name in rare for number in rows[name]})
        says = f"{len(rare):,} of {len(counts):,} labels occur fewer than {RARE} times: {listed}{more}."
        yield Finding(Code.RARE_LABEL, tuple(where), says, column)
    most, least = (
        max(counts, key=counts.__getitem__, default=""),
        min(counts, key=counts.__getitem__, default=""),
    )
    if counts and counts[most] > _IMBALANCED * counts[least]:
        says = f"{_shown(most)} occurs {counts[most]:,} times, {_shown(least)} {counts[least]:,} times."
        yield Finding(Code.IMBALANCE, (), says, column)


def _numbers(sheet: Sheet, column: str) -> Iterator[Finding]:
    low, high = sheet.subject.bounds or (-math.inf, math.inf)
    words: list[int] = []
    beyond: list[int] = []
    for number, label in zip(sheet.numbers, sheet.label, strict=True):
        if label is None or not label.strip():
            continue
        try:
            value = float(label)
        except ValueError:
            words.append(number)
            continue
        if not low <= value <= high:
            beyond.append(number)
    if words:
        yield Finding(Code.BAD_NUMBER, tuple(words), f"{_rows(words)} whose label is no number.", column)
    if beyond:
        says = f"{_rows(beyond)} with a number beyond task.range, {low:g} to {high:g}."
        yield Finding(Code.BAD_NUMBER, tuple(beyond), says, column)


def _tags(sheet: Sheet, column: str) -> Iterator[Finding]:
    uneven: list[int] = []
    broken: list[int] = []
    no_tag: list[int] = []
    rows: dict[str, list[int]] = defaultdict(list)
    counts: Counter[str] = Counter()
    known = sheet.subject.labels
    places = {str(i): name for i, name in enumerate(known)}
    for number, text, label in zip(sheet.numbers, sheet.text, sheet.label, strict=True):
        if not label or not text:
            continue
        tags = [places.get(tag, tag) for tag in label.split(" ")]
        if len(tags) != len(text.split(" ")):
            uneven.append(number)
        if any(tag != OUTSIDE and tag[:2] not in ("B-", "I-") for tag in tags):
            no_tag.append(number)
        before = OUTSIDE
        for tag in tags:
            if tag.startswith("I-") and before[2:] != tag[2:]:
                broken.append(number)
                break
            before = tag
        for tag in dict.fromkeys(tags):
            rows[tag[2:] if tag[:2] == "I-" else tag.removeprefix("B-")].append(number)
        counts.update(tag[2:] for tag in tags if tag.startswith("B-"))
    if uneven:
        yield Finding(Code.BAD_TAGS, tuple(uneven), f"{_rows(uneven)} without one tag for each word.", column)
    if no_tag:
        says = f"{_rows(no_tag)} with tags that are none of O, B-NAME and I-NAME."
        yield Finding(Code.BAD_TAGS, tuple(no_tag), says, column)
    if broken:
        says = f"{_rows(broken)} in which an entity goes on (I-) that did not begin (B-)."
        yield Finding(Code.BROKEN_ENTITY, tuple(broken), says, column)
    names = {tag[2:] for tag in known if tag != OUTSIDE}
    for name in sorted(set(counts) - names) if known else ():
        says = f"{_rows(rows[name])} with the entity {_shown(name)}, which is not in task.labels."
        yield Finding(Code.UNKNOWN_LABEL, tuple(rows[name]), says, column)
    yield from _balance(dict(counts), rows, column)


def _conflicts(sheet: Sheet, column: str) -> Iterator[Finding]:
    """The same prompt and text, with another label."""
    by_text: dict[tuple[str, ...], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for number, record, label in zip(sheet.numbers, sheet.records, sheet.label, strict=True):
        if any(record) and label and label.strip():
            by_text[record][label.strip()].append(number)
    both = [labels for labels in by_text.values() if len(labels) > 1]
    if both:
        rows = sorted(number for labels in both for numbers in labels.values() for number in numbers)
        shown = "; ".join(
            " and ".join(f"{_shown(label)} in {numbers[0]}" for label, numbers in labels.items())
            for labels in both[:2]
        )
        says = f"{len(both):,} text{'s' if len(both) != 1 else ''} with more than one label: {shown}."
        yield Finding(Code.CONFLICT, tuple(rows), says, column)


def _shown(label: str) -> str:
    """A label that may stand in a message."""
    return short(mask(label, tuple(Personal)))


def _rows(rows: Sequence[int]) -> str:
    return f"{len(rows):,} row{'s' if len(rows) != 1 else ''}"
