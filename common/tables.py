"""Records in memory: the table, its cleaning, its labels. A `Table` holds strings only."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.cells import (
    Cell,
    characters,
    filled,
    label_of,
    short,
    span_of,
    template_fields,
    text_of,
    value_of,
)
from common.errors import DataError
from common.turns import dialogue_of, halves, prompt_of, user_turn


@dataclass(frozen=True)
class Columns:
    """Which columns of a file the task reads; None: not used. How their cells are read: common.cells.

    Raises:
        DataError: a name is empty, or the template is malformed.
    """

    text: str
    label: str | None = None
    prompt: str | None = None
    group: str | None = None
    start: str | None = None  # where the label begins in the text; see `spans`
    template: str | None = None  # the text is made of columns: "age {age}, trade {trade}"
    joint: str | None = None  # between items of a list in label and text, or IMAGES; None: no lists
    spans: bool = False  # the label is a stretch of the text
    turns: bool = False  # the prompt may be a conversation; without a prompt the text is a whole dialogue

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """The columns that the text is made of."""
        return (self.text,) if self.template is None else template_fields(self.template)

    @property
    def conversations(self) -> str | None:
        """The column of conversations."""
        return (self.prompt or self.text) if self.turns else None

    def __post_init__(self) -> None:
        for role in ("text", "label", "prompt", "group", "start"):
            if getattr(self, role) == "":
                raise DataError(f"the {role} column must have a name, found ''. Name a column of the file.")
        if not self.parts:
            raise DataError(f"data.template must name a column in braces, found {short(self.template or '')}")

    @property
    def names(self) -> tuple[str, ...]:
        """The columns that are read, each once, in the order text, label, prompt, group, start."""
        used = (*self.parts, self.label, self.prompt, self.group, self.start)
        return tuple(dict.fromkeys(name for name in used if name is not None))


@dataclass(frozen=True, repr=False)
class Table:
    """Immutable records, column-wise. Every value is a string, labels too, as written in the file.

    All columns have the same length `(records,)`. `rows` holds the 1-based row of each record in its
    source: for csv and tsv the record's number counting the header as row 1, for jsonl the line, else
    the row. `repr` shows no record.

    Raises:
        DataError: the columns differ in length.
    """

    source: str  # the file's name, shown in errors
    text: tuple[str, ...]
    label: tuple[str, ...] | None
    prompt: tuple[str, ...] | None
    group: tuple[str, ...] | None
    rows: tuple[int, ...]
    start: tuple[int, ...] | None = None  # the label begins at this character of the text

    def __post_init__(self) -> None:
        columns: dict[str, Sequence[object] | None]
        columns = {"label": self.label, "prompt": self.prompt, "group": self.group}
        columns |= {"rows": self.rows, "start": self.start}
        for name, column in columns.items():
            if column is not None and len(column) != len(self.text):
                raise DataError(
                    f"{self.source}: every column must hold {len(self.text)} values, one a record, "
                    f"found {len(column)} in {name}."
                )

    def __len__(self) -> int:
        return len(self.text)

    def __repr__(self) -> str:
        optional = {"label": self.label, "prompt": self.prompt, "group": self.group}
        columns = ", ".join(["text", *(name for name, column in optional.items() if column is not None)])
        return f"Table(source={self.source!r}, records={len(self)}, columns=({columns}))"

    def take(self, indices: Sequence[int] | npt.NDArray[np.integer]) -> Table:
        """The records at `indices`, shape `(k,)`, in that order.

        Raises:
            DataError: an index is not an integer (a mask of bools, say) or not in [0, records).
        """
        chosen = np.asarray(indices)
        if chosen.size == 0:
            chosen = np.zeros(0, np.int64)
        if chosen.ndim != 1 or not np.issubdtype(chosen.dtype, np.integer):
            raise DataError(
                f"{self.source}: indices must be a flat list of integers, "
                f"found shape {chosen.shape} of {chosen.dtype}. Turn a mask into indices with np.flatnonzero."
            )
        if chosen.size and (int(chosen.min()) < 0 or int(chosen.max()) >= len(self)):
            raise DataError(
                f"{self.source}: indices must be in [0, {len(self)}), "
                f"found {int(chosen.min())} to {int(chosen.max())}."
            )
        where: list[int] = chosen.tolist()

        def pick(column: tuple[str, ...] | None) -> tuple[str, ...] | None:
            return None if column is None else tuple(column[i] for i in where)

        return Table(
            source=self.source,
            text=tuple(self.text[i] for i in where),
            label=pick(self.label),
            prompt=pick(self.prompt),
            group=pick(self.group),
            rows=tuple(self.rows[i] for i in where),
            start=None if self.start is None else tuple(self.start[i] for i in where),
        )


@dataclass(frozen=True)
class CleaningReport:
    """What cleaning dropped: read == kept + empty + duplicate + over_long. For the site's eyes only."""

    read: int
    kept: int
    empty: int
    duplicate: int
    over_long: int


Record = tuple[int, Mapping[str, object]]  # (row, {column: value})


def table_of(path: Path, columns: Columns, records: Iterable[Record]) -> Table:
    """The table of the records read from `path`.

    Raises:
        DataError: there is no record, or a value is not usable.
    """
    text: list[str] = []
    label: list[str] = []
    prompt: list[str] = []
    group: list[str] = []
    rows: list[int] = []
    starts: list[int] = []
    for row, cells in records:
        rows.append(row)
        where = Cell(path, row, columns.text)
        if columns.turns and columns.prompt is None:
            before, answered = halves(dialogue_of(cells[columns.text], where))
            prompt.append(before)
            text.append(answered)
        elif columns.turns and columns.text == columns.prompt:
            text.append("")  # asked, not trained: there is no answer yet
        else:
            read = text_of(cells, columns.template, columns.text, columns.joint, where)
            text.append(user_turn(read) if columns.turns else read)
        if columns.label is not None and columns.spans:
            begin = None if columns.start is None else cells[columns.start]
            answer, start = span_of(text[-1], cells[columns.label], begin, Cell(path, row, columns.label))
            label.append(answer)
            starts.append(start)
        elif columns.label is not None:
            label.append(label_of(cells[columns.label], columns.joint, Cell(path, row, columns.label)))
        if columns.prompt is not None:
            reading = prompt_of if columns.turns else value_of
            prompt.append(reading(cells[columns.prompt], Cell(path, row, columns.prompt)))
        if columns.group is not None:
            group.append(filled(cells[columns.group], Cell(path, row, columns.group)))
    if not rows:
        raise DataError(f"{path}: expected records, found none. Add records, or point at another file.")
    return Table(
        source=path.name,
        text=tuple(text),
        label=None if columns.label is None else tuple(label),
        prompt=tuple(prompt) if columns.prompt is not None or columns.turns else None,
        group=None if columns.group is None else tuple(group),
        rows=tuple(rows),
        start=tuple(starts) if columns.spans else None,
    )


# Cleaning and labels


def clean(table: Table, *, max_characters: int) -> tuple[Table, CleaningReport]:
    """Tidy the values and drop the records that should not be trained on. The order is kept.

    All columns are brought to Unicode NFC and lose white space at both ends, so that "fresh " and
    "fresh" are one label and one group is not two. Then a record is dropped, and counted once, when
    its text is empty; when prompt and text together have more than `max_characters` characters; or when
    an earlier kept record has the same prompt, text and label.

    Raises:
        DataError: `max_characters` < 1, or nothing is left.
    """
    if max_characters < 1:
        raise DataError(f"max_characters must be >= 1, found {max_characters}. Raise it.")
    tidy = Table(
        source=table.source,
        text=tuple(map(_tidy, table.text)),
        label=None if table.label is None else tuple(map(_tidy, table.label)),
        prompt=None if table.prompt is None else tuple(map(_tidy, table.prompt)),
        group=None if table.group is None else tuple(map(_tidy, table.group)),
        rows=table.rows,
        start=None if table.start is None else tuple(map(_moved, table.start, table.text)),
    )
    kept: list[int] = []
    seen: set[tuple[str, str, str]] = set()
    empty = duplicate = over_long = 0
    for i, text in enumerate(tidy.text):
        prompt = "" if tidy.prompt is None else tidy.prompt[i]
        key = (prompt, text, "" if tidy.label is None else tidy.label[i])
        if not text:
            empty += 1
        elif len(prompt) + len(text) > max_characters:
            over_long += 1
        elif key in seen:
            duplicate += 1
        else:
            seen.add(key)
            kept.append(i)
    if not kept:
        raise DataError(
            f"{table.source}: expected records after cleaning, found none of {len(table)}: {empty} empty, "
            f"{over_long} longer than {max_characters} characters. "
            "Check which column holds the text, or raise max_characters."
        )
    report = CleaningReport(len(tidy), len(kept), empty, duplicate, over_long)
    return tidy.take(kept), report


def _tidy(value: str) -> str:
    return unicodedata.normalize("NFC", value).strip()


def _moved(start: int, text: str) -> int:
    """Where character `start` of the text lies once the text is tidy."""
    lost = len(text) - len(text.lstrip())
    return len(unicodedata.normalize("NFC", text[min(lost, start) : start]))


def label_ids(table: Table, labels: Sequence[str]) -> npt.NDArray[np.int64]:
    """The place of each record's label in `labels`, shape `(records,)`.

    Raises:
        DataError: the table has no labels, `labels` names one twice, or a record has another label.
    """
    ids = {label: i for i, label in enumerate(labels)}
    if len(ids) != len(labels):
        twice = next(label for i, label in enumerate(labels) if label in labels[:i])
        raise DataError(f"labels must differ from each other, found {short(twice)} twice. Remove one.")
    found = _labels(table)
    for row, label in zip(table.rows, found, strict=True):
        if label not in ids:
            raise unknown_label(table, row, "label", label, labels)
    return np.fromiter((ids[label] for label in found), np.int64, len(found))


def unknown_label(table: Table, row: int, what: str, label: str, labels: Sequence[str]) -> DataError:
    """`label` is not among `labels`. Neither is shown: those may stand in the training data alone."""
    return DataError(
        f"{table.source}, row {row}, label column: expected one of {len(labels)} {what}s (task.labels, or "
        f"where it is empty those of the training data), found another, of {characters(label)}. Correct the "
        f"row, or add the {what} to task.labels."
    )


def label_names(table: Table) -> tuple[str, ...]:
    """The labels that occur, each once, sorted.

    Raises:
        DataError: the table has no labels.
    """
    return tuple(sorted(set(_labels(table))))


def _labels(table: Table) -> tuple[str, ...]:
    if table.label is None:
        raise DataError(f"{table.source}: expected a label column, but none was read. Name it in the config.")
    return table.label
