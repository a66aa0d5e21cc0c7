"""What each step of a recipe does to the rows of a file."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from client.data.characters import (
    collapse_space,
    fix_mojibake,
    normalise_unicode,
    strip_control,
    strip_html,
    strip_invisible,
)
from client.data.near import near_duplicates
from client.data.personal import mask_parts
from client.data.reading import RawFile, Row
from client.data.recipe import Step, StepKind
from client.data.sheet import Sheet, sheet_of
from client.data.subject import Subject
from client.data.text_checks import duplicates
from common.cells import Cell, short
from common.errors import ConfigError, DataError
from common.kinds import TaskKind
from common.targets import SEPARATOR
from common.turns import content_of, turns_in


@dataclass(frozen=True, repr=False)
class Outcome:
    """Rows after a step; numbers (of the input file) of rows that it changed and left out."""

    rows: tuple[Row, ...]
    changed: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()


def apply(step: Step, raw: RawFile, subject: Subject, public: frozenset[tuple[str, ...]] | None) -> Outcome:
    """`step` done to the rows of `raw`. public: the evaluation set's records; None: there is none.

    Raises:
        ConfigError: the step does not fit the task, or needs a person column or an evaluation set.
        DataError: a row says not whose it is.
    """
    match step.kind:
        case StepKind.DECODE | StepKind.DROP_UNREADABLE:
            return Outcome(raw.rows)  # done while reading
        case StepKind.FIX_MOJIBAKE:
            return _rewrite(raw, subject, _each(fix_mojibake), step)
        case StepKind.STRIP_INVISIBLE:
            return _rewrite(raw, subject, _each(lambda text: strip_invisible(strip_control(text))), step)
        case StepKind.STRIP_HTML:
            return _rewrite(raw, subject, _each(strip_html), step)
        case StepKind.NORMALISE_UNICODE:
            return _rewrite(raw, subject, _each(normalise_unicode), step)
        case StepKind.COLLAPSE_SPACE:
            return _rewrite(raw, subject, _each(collapse_space), step)
        case StepKind.MASK:
            return _rewrite(raw, subject, lambda parts: mask_parts(parts, step.kinds), step)
        case StepKind.MAP_LABELS:
            return _map_labels(raw, subject, step.map)
        case StepKind.CAP_PERSON:
            return _left_out(raw, _beyond_cap(_sheet(raw, subject), step.records))
        case StepKind.DROP_IN_TEST:
            if public is None:
                raise ConfigError("drop-in-test needs the public evaluation set: data.test, or --test FILE")
            records = _sheet(raw, subject).records
            return _left_out(raw, {i for i, record in enumerate(records) if record in public})
        case _:
            return _left_out(raw, _unwanted(step, _sheet(raw, subject)))


def _sheet(raw: RawFile, subject: Subject) -> Sheet:
    return sheet_of(raw, subject)[0]


def _left_out(raw: RawFile, places: set[int]) -> Outcome:
    if not places:
        return Outcome(raw.rows)
    return Outcome(
        tuple(row for i, row in enumerate(raw.rows) if i not in places),
        dropped=tuple(raw.rows[i].number for i in sorted(places)),
    )


def _unwanted(step: Step, sheet: Sheet) -> set[int]:
    """The places of rows that a step which only drops leaves out."""
    records = sheet.records
    match step.kind:
        case StepKind.DROP_EMPTY:
            return {i for i, record in enumerate(records) if not record[-1] and not _no_dialogue(sheet, i)}
        case StepKind.DROP_LONG:
            return {i for i, record in enumerate(records) if sum(map(len, record)) > step.characters}
        case StepKind.DROP_DUPLICATES:
            return set(duplicates(records, sheet.label))
        case StepKind.DROP_CONFLICTS:
            labels: dict[tuple[str, ...], set[str]] = defaultdict(set)
            for record, label in zip(records, sheet.label, strict=True):
                if any(record) and label and label.strip():
                    labels[record].add(label.strip())
            return {i for i, record in enumerate(records) if len(labels.get(record, ())) > 1}
        case _:
            return set(near_duplicates(records, similarity=step.similarity))


def _no_dialogue(sheet: Sheet, place: int) -> bool:
    """Somebody said something there, but it is no conversation: left to people."""
    column = sheet.subject.columns.conversations
    if column is None or sheet.column(column)[place] is not None:
        return False
    return sheet.raw.rows[place].cells.get(column) is not None


# Steps that change cells


_Cure = Callable[[Sequence[str]], list[str]]  # of the parts of one text, such as turns


def _each(cure: Callable[[str], str]) -> _Cure:
    return lambda parts: [cure(part) for part in parts]


def _rewrite(raw: RawFile, subject: Subject, cure: _Cure, step: Step) -> Outcome:
    """`cure` the texts, and what stands beside them as a label of several words."""
    if subject.kind is TaskKind.QUESTION_ANSWERING:
        raise ConfigError(
            f"{step.kind.label}: an answer has its place in the context, which would move. Tidy the contexts "
            "before answers are marked; steps that leave rows out can be used"
        )
    columns = list(subject.texts)
    if step.kind is not StepKind.MASK and subject.classes and subject.columns.label is not None:
        columns.append(subject.columns.label)
    words = subject.kind is TaskKind.TOKEN_CLASSIFICATION

    def cured(value: object) -> object:
        match value:
            case str() if words:
                return " ".join(_word(word, cure) for word in value.split(" "))
            case str():
                return cure([value])[0]
            case list():
                return [_word(item, cure) if words else cured(item) for item in value]
            case _:
                return value

    changes: dict[str, Callable[[object], object]] = dict.fromkeys(columns, cured)
    if subject.columns.conversations is not None:
        cell = Cell(raw.path, 0, subject.columns.conversations)
        changes[subject.columns.conversations] = lambda value: _cured_turns(value, cure, cell)
    return _changed(raw, changes)


def _cured_turns(value: object, cure: _Cure, cell: Cell) -> object:
    """A conversation whose turns are cured together, as training reads them, in the form that it had; text as
    a lone turn."""
    turns = turns_in(value)
    if turns is None:
        return cure([value])[0] if isinstance(value, str) else value
    try:
        said = [content_of(turn["content"], cell) for turn in turns]
    except (DataError, LookupError, TypeError):
        return value  # no conversation: left to people
    # A turn of which nothing would be left stays: an empty one is refused in training.
    cured = [new or old for new, old in zip(map(str.strip, cure(said)), said, strict=True)]
    if cured == said:
        return value
    new = [{**turn, "content": content} for turn, content in zip(turns, cured, strict=True)]
    return new if isinstance(value, list) else json.dumps(new, ensure_ascii=False)


def _word(word: Any, cure: _Cure) -> Any:
    """A word stays one word, since it has a tag: where nothing or several would be left it stays as it is."""
    if not isinstance(word, str):
        return word
    (found,) = cure([word])
    return found if len(found.split()) == 1 else word


def _map_labels(raw: RawFile, subject: Subject, names: Mapping[str, str]) -> Outcome:
    label = subject.columns.label
    if label is None or not subject.classes:
        raise ConfigError("map-labels: there is no column of labels with names; name it with --label")
    several = subject.kind is TaskKind.MULTI_LABEL

    def mapped(value: object) -> object:
        match value:
            case str() if several:
                return SEPARATOR.join(names.get(part.strip(), part) for part in value.split(SEPARATOR))
            case str():
                return names.get(value.strip(), value)
            case list():
                return [mapped(item) for item in value]
            case _:
                return value

    return _changed(raw, {label: mapped})


def _changed(raw: RawFile, changes: Mapping[str, Callable[[object], object]]) -> Outcome:
    """`changes`: of a column's cells."""
    rows: list[Row] = []
    changed: list[int] = []
    for row in raw.rows:
        new = {name: change(row.cells[name]) for name, change in changes.items() if name in row.cells}
        if any(new[name] != row.cells[name] for name in new):
            changed.append(row.number)
            row = replace(row, cells={**row.cells, **new})
        rows.append(row)
    return Outcome(tuple(rows), tuple(changed)) if changed else Outcome(raw.rows)


# A cap


def _beyond_cap(sheet: Sheet, records: int) -> set[int]:
    """The places of a person's records beyond `records`: those whose hash is greatest."""
    column = sheet.subject.person
    if column is None or column not in sheet.cells:
        found = "none was named" if column is None else f"there is none named {short(column)}"
        raise ConfigError(
            f"cap-person needs the column that says whose a record is; {found}: --person COLUMN"
        )
    places: dict[str, list[int]] = defaultdict(list)
    for i, person in enumerate(sheet.column(column)):
        if person is None or not person.strip():
            raise DataError(
                f"{sheet.raw.path}, {sheet.raw.unit} {sheet.numbers[i]}, column {short(column)}: expected "
                "whose record it is, found nothing. Fill it in, or remove the row."
            )
        places[person.strip()].append(i)
    return {
        i
        for those in places.values()
        for i in sorted(those, key=lambda i: (_hash(sheet.raw.rows[i]), i))[records:]
    }


def _hash(row: Row) -> bytes:
    """Of the record itself: the choice does not depend on the file's order."""
    text = json.dumps(row.cells, sort_keys=True, default=str)
    return hashlib.sha256(b"confide/data/cap-person/v1" + text.encode()).digest()
