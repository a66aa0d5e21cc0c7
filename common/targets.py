"""Which columns a kind of task reads, and its labels as numbers. A fault names file, row and column."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from common.cells import IMAGES, characters
from common.config import DataSection, TaskKind
from common.errors import DataError
from common.tables import Columns, Table, label_ids, label_names, unknown_label

SEPARATOR = "|"  # between the labels of a record, where it may have several
OUTSIDE = "O"  # the tag of a word that belongs to no entity


def columns_of(data: DataSection, kind: TaskKind, chat: bool = False) -> Columns:
    """What is read of a file of records for this kind of task; `chat`: task.chat."""
    if data.sample is not None:
        return Columns("text", "label", None, "group")
    joint = {
        TaskKind.TOKEN_CLASSIFICATION: " ",
        TaskKind.MULTI_LABEL: SEPARATOR,
        TaskKind.IMAGE_CLASSIFICATION: IMAGES,
    }.get(kind)
    return Columns(
        data.text,
        data.label if kind.needs.label else None,
        data.prompt,
        data.group,
        start=data.start,
        template=data.template,
        joint=joint,
        spans=kind is TaskKind.QUESTION_ANSWERING,
        turns=chat,
    )


def found_labels(kind: TaskKind, table: Table) -> tuple[str, ...]:
    """The labels that occur in the data, each once; of BIO tags O first."""
    if not kind.needs.names:
        return ()
    match kind:
        case TaskKind.MULTI_LABEL:
            return tuple(sorted({label for labels in _labels(table) for label in _several(labels)}))
        case TaskKind.TOKEN_CLASSIFICATION:
            tags = {tag for sentence in _labels(table) for tag in sentence.split(" ")}
            return (OUTSIDE, *sorted(tags - {OUTSIDE}))
        case _:
            return label_names(table)


def check_records(
    kind: TaskKind, table: Table, labels: Sequence[str], bounds: tuple[float, float] | None
) -> None:
    """Every record has a target of this kind.

    Raises:
        DataError: naming the row that has not.
    """
    match kind:
        case TaskKind.SEQUENCE_CLASSIFICATION | TaskKind.IMAGE_CLASSIFICATION:
            label_ids(table, labels)
        case TaskKind.MULTI_LABEL:
            label_sets(table, labels)
        case TaskKind.TOKEN_CLASSIFICATION:
            tag_ids(table, labels)
        case TaskKind.REGRESSION:
            numbers(table, bounds or (-math.inf, math.inf))
        case TaskKind.QUESTION_ANSWERING | TaskKind.CAUSAL_LM | TaskKind.SEQ2SEQ:
            pass  # an answer's place was checked as it was read


def label_sets(table: Table, labels: Sequence[str]) -> NDArray[np.float32]:
    """`(records, len(labels))`: 1 where the record has the label. Labels stand as `a|b`, or in a list.

    Raises:
        DataError: a record has a label that is not among `labels`.
    """
    ids = {label: i for i, label in enumerate(labels)}
    found = np.zeros((len(table), len(labels)), dtype=np.float32)
    for record, (row, several) in enumerate(zip(table.rows, _labels(table), strict=True)):
        for label in _several(several):
            if label not in ids:
                raise unknown_label(table, row, "label", label, labels)
            found[record, ids[label]] = 1
    return found


def numbers(table: Table, bounds: tuple[float, float]) -> NDArray[np.float32]:
    """`(records,)`: the labels as numbers, scaled so that the public `bounds` lie at -1 and 1.

    Raises:
        DataError: a label is no number, or lies out of bounds.
    """
    low, high = bounds
    found = np.zeros(len(table), dtype=np.float64)
    for record, (row, label) in enumerate(zip(table.rows, _labels(table), strict=True)):
        try:
            value = float(label)
        except ValueError:
            value = math.nan
        if math.isnan(value):
            text = f"text of {characters(label)} that is none"
            raise _fault(table, row, "expected a number", text, "Correct the row.")
        if not low <= value <= high:
            raise _fault(
                table,
                row,
                f"expected a number from {low:g} to {high:g} (task.range)",
                "a smaller one" if value < low else "a greater one",
                "Correct the row, or widen task.range.",
            )
        found[record] = value
    if not (math.isfinite(low) and math.isfinite(high)):
        return found.astype(np.float32)
    return ((found - low) * 2 / (high - low) - 1).astype(np.float32)


def tag_ids(table: Table, labels: Sequence[str]) -> list[list[int]]:
    """Each record's BIO tags, one a word, as places in `labels`. Digits that are no tag are such places.

    Raises:
        DataError: `labels` are no BIO tags; a record has as many tags as words not, or an unknown tag.
    """
    if bad := {label for label in labels if label != OUTSIDE and label[:2] not in ("B-", "I-")}:
        rows = (
            row for row, tags in zip(table.rows, _labels(table), strict=True) if bad & set(tags.split(" "))
        )
        row = next(rows, None)
        where = "" if row is None else f", row {row}"
        raise DataError(
            f"{table.source}{where}, label column: expected BIO tags (O, B-NAME, I-NAME), found "
            f"{len(bad)} of {len(labels)} in another form. Where tags are numbers in the file, name them in "
            "task.labels, in that order."
        )
    ids = {label: i for i, label in enumerate(labels)}
    ids |= {str(i): i for i in range(len(labels)) if str(i) not in ids}
    found = []
    for row, text, tags in zip(table.rows, table.text, _labels(table), strict=True):
        words, names = text.split(" "), tags.split(" ")
        if len(words) != len(names):
            raise _fault(
                table,
                row,
                "expected one tag a word",
                f"{len(words)} words and {len(names)} tags",
                "Put one blank between words, and between tags.",
            )
        for name in names:
            if name not in ids:
                raise unknown_label(table, row, "tag", name, labels)
        found.append([ids[name] for name in names])
    return found


def _several(labels: str) -> list[str]:
    return [label.strip() for label in labels.split(SEPARATOR) if label.strip()]


def _labels(table: Table) -> tuple[str, ...]:
    if table.label is None:
        raise DataError(f"{table.source}: expected a label column, but none was read. Name it in the config.")
    return table.label


def _fault(table: Table, row: int, expected: str, found: str, hint: str) -> DataError:
    return DataError(f"{table.source}, row {row}, label column: {expected}, found {found}. {hint}")
