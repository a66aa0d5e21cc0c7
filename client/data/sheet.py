"""The columns that training reads, as strings, row by row; and every cell that is none."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from client.data.findings import Code, Finding
from client.data.reading import RawFile
from client.data.subject import Subject
from common.cells import (
    Cell,
    answerless,
    listed,
    nearest,
    other_delimiter,
    short,
    span_of,
    text_of,
    type_name,
)
from common.datasets import FileKind
from common.errors import CellError, DataError
from common.kinds import TaskKind
from common.turns import conversation, dialogue_of, halves, looks_like_turns, prompt_of, user_turn

_NOT_A_NUMBER = frozenset({"nan", "NaN", "NAN"})


@dataclass(frozen=True, repr=False)
class Sheet:
    """`cells[column]`: `(records,)` strings, None where a cell is missing or is no text."""

    raw: RawFile
    subject: Subject
    cells: Mapping[str, tuple[str | None, ...]]

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        return tuple(row.number for row in self.raw.rows)

    def __len__(self) -> int:
        return len(self.raw.rows)

    def column(self, name: str | None) -> tuple[str | None, ...]:
        """Nothing but None for a column that is not there."""
        return (None,) * len(self) if name is None else self.cells.get(name, (None,) * len(self))

    def parts(self, name: str) -> tuple[tuple[str, ...], ...]:
        """What people wrote in a column: of a conversation each turn, else the value; nothing where None."""
        turns = name == self.subject.columns.conversations
        return tuple(
            ()
            if value is None
            else tuple(turn["content"] for turn in conversation(value))
            if turns
            else (value,)
            for value in self.column(name)
        )

    @cached_property
    def text(self) -> tuple[str, ...]:
        """What training reads as the text: of one column, or put together by the template."""
        columns = self.subject.columns
        if columns.template is None:
            return tuple(value or "" for value in self.column(columns.text))
        parts = [self.column(name) for name in columns.parts]
        cell = Cell(self.raw.path, 0, columns.text)
        return tuple(
            text_of(dict(zip(columns.parts, values, strict=True)), columns.template, columns.text, None, cell)
            for values in zip(*parts, strict=True)
        )

    @cached_property
    def label(self) -> tuple[str | None, ...]:
        return self.column(self.subject.columns.label)

    @cached_property
    def records(self) -> tuple[tuple[str, ...], ...]:
        """Text, or prompt and text, of each record: what makes two records the same."""
        columns = self.subject.columns
        if columns.turns and columns.prompt is None:
            return tuple(map(halves, self.text))
        if columns.prompt is None:
            return tuple((text.strip(),) for text in self.text)
        prompt = self.column(columns.prompt)
        return tuple(((p or "").strip(), t.strip()) for p, t in zip(prompt, self.text, strict=True))


def sheet_of(raw: RawFile, subject: Subject) -> tuple[Sheet, tuple[Finding, ...]]:
    """The sheet, and what is wrong with its columns and with the types of its cells."""
    findings = list(_columns(raw, subject)) if raw.rows else []
    cells = {}
    for name in _used(subject):
        if name in raw.columns:
            cells[name], wrong = _strings(raw, subject, name)
            findings += wrong
    return Sheet(raw, subject, cells), tuple(findings)


def headless(raw: RawFile, subject: Subject) -> bool:
    """Whether the first line may be a record, since it names no column to be read: it is not shown then."""
    return raw.kind in (FileKind.CSV, FileKind.TSV) and not set(_used(subject)) & set(raw.columns)


def _used(subject: Subject) -> tuple[str, ...]:
    names = (*subject.columns.names, subject.person)
    return tuple(dict.fromkeys(name for name in names if name is not None))


def _columns(raw: RawFile, subject: Subject) -> Iterator[Finding]:
    used = _used(subject)
    bare = headless(raw, subject)
    always = {FileKind.CONLL: {"tokens", "tags"}, FileKind.SQUAD: {"question", "context", "answers", "title"}}
    for name in used:
        if name in raw.columns or (name == subject.columns.label and subject.guessed_label):
            continue
        near = nearest(name, raw.columns)
        hint = f"Is it {short(near)}?" if near else ""
        others = listed(raw.columns)
        if bare:
            others = f"{len(raw.columns)} fields in the first line, which may be a record"
            hint = hint or other_delimiter(raw.columns, "," if raw.kind is FileKind.CSV else "\t")
        says = f"There is no column {short(name)}, but {others}. {hint}".rstrip()
        yield Finding(Code.MISSING_COLUMN, (), says, name)
    if bare:
        return
    for name in raw.columns:
        if name not in used and name not in always.get(raw.kind, set()):
            rows = tuple(row.number for row in raw.rows if name in row.cells)
            every = len(rows) == len(raw.rows)
            says = "A column that training does not read" + (
                "." if every else f", in {len(rows):,} of {len(raw.rows):,} rows."
            )
            yield Finding(Code.EXTRA_COLUMN, () if every else rows, says, name)


def _strings(raw: RawFile, subject: Subject, name: str) -> tuple[tuple[str | None, ...], list[Finding]]:
    """A column's cells as strings; faults gathered by what they are."""
    wrong: dict[tuple[Code, str], list[int]] = defaultdict(list)
    types: dict[str, list[int]] = defaultdict(list)
    answers = name == subject.columns.label and subject.kind is TaskKind.QUESTION_ANSWERING
    lists = subject.columns.joint is not None and name in (subject.columns.text, subject.columns.label)
    chat = name == subject.columns.conversations
    whole = chat and subject.columns.prompt is None
    found: list[str | None] = []
    for row in raw.rows:
        value = row.cells.get(name)
        if subject.columns.turns and isinstance(value, str):
            value = user_turn(value)  # the marks that keep turns apart stand in no text
        if name not in row.cells:
            wrong[Code.MISSING_VALUE, "without it"].append(row.number)
        elif value is None and name in subject.columns.parts and subject.columns.template is not None:
            pass  # a null in a template is empty
        elif value is None:
            wrong[Code.MISSING_VALUE, "with null"].append(row.number)
        elif (isinstance(value, float) and not math.isfinite(value)) or (
            isinstance(value, str) and value in _NOT_A_NUMBER and raw.kind in (FileKind.CSV, FileKind.TSV)
        ):
            wrong[Code.MISSING_VALUE, "with NaN or an infinity"].append(row.number)
        elif answers:
            found.append(_answer(raw, subject, row.number, row.cells, wrong))
            continue
        elif chat and (whole or looks_like_turns(value)):
            found.append(
                _conversation(raw, row.number, name, value, wrong, dialogue_of if whole else prompt_of)
            )
            continue
        elif isinstance(value, list) and lists and all(isinstance(item, str | int) for item in value):
            found.append((subject.columns.joint or " ").join(map(str, value)))
            continue
        elif not isinstance(value, str | int | float):
            wrong[Code.WRONG_TYPE, f"with {type_name(value)}"].append(row.number)
        elif isinstance(value, str) and _torn(value):
            wrong[Code.WRONG_TYPE, "with half a surrogate pair, which is no character,"].append(row.number)
            found.append(value.encode("utf-8", "replace").decode())
            continue
        else:
            types["text" if isinstance(value, str) else _number(value)].append(row.number)
            found.append(str(int(value)) if isinstance(value, float) and value.is_integer() else str(value))
            continue
        found.append(None)
    findings = [
        Finding(code, tuple(rows), f"{_rows(rows)} {says}.", name) for (code, says), rows in wrong.items()
    ]
    if len(types) > 1:
        usual = max(types, key=lambda kind: len(types[kind]))
        rows = sorted(n for kind, numbers in types.items() if kind != usual for n in numbers)
        others = " and ".join(sorted(kind for kind in types if kind != usual))
        says = f"{_rows(rows)} with {others}, where the others have {usual}."
        findings.append(Finding(Code.MIXED_TYPES, tuple(rows), says, name))
    return tuple(found), findings


def _answer(
    raw: RawFile,
    subject: Subject,
    number: int,
    cells: Mapping[str, object],
    wrong: dict[tuple[Code, str], list[int]],
) -> str | None:
    columns = subject.columns
    start = None if columns.start is None else cells.get(columns.start)
    if answerless(cells[columns.label or ""]):
        wrong[Code.NO_ANSWER, "whose question has no answer, as in SQuAD 2"].append(number)
        return None
    try:
        text = str(cells.get(columns.text) or "")
        return span_of(text, cells[columns.label or ""], start, Cell(raw.path, number, columns.label or ""))[
            0
        ]
    except DataError:
        wrong[Code.BAD_ANSWER, "whose answer does not stand in the context, where it should"].append(number)
        return None


def _conversation(
    raw: RawFile,
    number: int,
    name: str,
    value: object,
    wrong: dict[tuple[Code, str], list[int]],
    reading: Callable[[object, Cell], str],
) -> str | None:
    try:
        return reading(value, Cell(raw.path, number, name))
    except CellError as error:
        wrong[Code.BAD_TURNS, f"where {error.expected} should be"].append(number)
    except DataError:
        wrong[Code.BAD_TURNS, "with a turn that cannot be read"].append(number)
    return None


def _torn(value: str) -> bool:
    return not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value)


def _number(value: object) -> str:
    return "true or false" if isinstance(value, bool) else "numbers"


def _rows(rows: list[int]) -> str:
    return f"{len(rows):,} row{'s' if len(rows) != 1 else ''}"
