"""Tidy a data file by a recipe, into a new file, with a record of what was done."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from client.data.findings import Code, listed_rows
from client.data.reading import FALLBACK, RawFile, Row, read_raw
from client.data.recipe import Step, StepKind, load_recipe
from client.data.sheet import sheet_of
from client.data.steps import apply
from client.data.subject import Subject
from client.data.writing import record_of, refuse_existing, rows_as_bytes, write_together
from common.cells import listed, short
from common.datasets import FileKind
from common.errors import ConfigError, DataError

_PASSES = 25  # a step can make work for one before it; more passes than this mean that they fight


@dataclass(frozen=True)
class StepDone:
    """A step of the recipe; numbers, in the input file, of the rows that it changed and left out."""

    name: str
    options: dict[str, Any]
    changed: tuple[int, ...]
    dropped: tuple[int, ...]


@dataclass(frozen=True)
class Cleaned:
    """What was done. `record`: the file that says so, beside `out`."""

    source: Path
    out: Path
    record: Path
    out_sha256: str
    read: int
    kept: int
    steps: tuple[StepDone, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "record": str(self.record),
            "sha256": self.out_sha256,
            "rows_read": self.read,
            "rows_written": self.kept,
            "steps": [
                {"do": step.name, "changed": len(step.changed), "dropped": len(step.dropped)}
                for step in self.steps
            ],
        }


def clean(subject: Subject, recipe: Path, out: Path) -> Cleaned:
    """Write `out` and `out`.recipe.json, or neither. The input is only read.

    All steps are gone through again until none changes anything: tidying what is tidy changes nothing.

    Raises:
        ConfigError: the recipe is wrong or does not fit, or `out` is there already.
        DataError: the file cannot be read as it is, or nothing is left of it.
    """
    record = record_of(out)
    refuse_existing([out, record])
    steps = load_recipe(recipe)
    raw = _read(subject, steps)
    public, public_sha256 = _public(subject, steps)
    before, decoded = len(raw.rows), _decoded(raw)
    raw, done = _settled(raw, subject, steps, public)
    if not raw.rows:
        raise DataError(
            f"{subject.train}: none of {before:,} rows would be left: look at the recipe's steps."
        )
    done = _with_reading(done, decoded, raw.found(Code.UNREADABLE_ROW))
    data = rows_as_bytes(raw, out)
    out_sha256 = hashlib.sha256(data).hexdigest()
    columns = subject.columns
    described = {
        "format": "confide-data-recipe/1",
        "input": {"sha256": raw.sha256, "rows": before},
        "output": {"sha256": out_sha256, "rows": len(raw.rows)},
        "public": public_sha256,
        "columns": {
            "text": list(columns.parts),
            "label": columns.label,
            "prompt": columns.prompt,
            "person": subject.person,
        },
        "rows_are": f"{raw.unit}s of the input",
        "steps": [
            {**step.options, "changed": _rows(step.changed), "dropped": _rows(step.dropped)} for step in done
        ],
    }
    write_together(
        (out, data), (record, json.dumps(described, indent=1, ensure_ascii=False).encode() + b"\n")
    )
    return Cleaned(subject.train, out, record, out_sha256, before, len(raw.rows), done)


def _rows(numbers: Sequence[int]) -> dict[str, Any]:
    return {"count": len(numbers), "rows": list(numbers)}


def _read(subject: Subject, steps: Sequence[Step]) -> RawFile:
    """The input, where the recipe says what to do with what cannot be read."""
    decode = [step.encoding for step in steps if step.kind is StepKind.DECODE]
    raw = read_raw(subject.train, decode[0] if decode else FALLBACK)
    if not decode and (rows := raw.found(Code.INVALID_UTF8)):
        raise DataError(
            f"{subject.train}: expected UTF-8, found other bytes in {raw.unit}s {listed_rows(rows, 6)}. "
            'Save it as UTF-8, or begin the recipe with do = "decode" and encoding = "windows-1252", '
            "if that is what it is."
        )
    skips = any(step.kind is StepKind.DROP_UNREADABLE for step in steps)
    if not skips and (rows := raw.found(Code.UNREADABLE_ROW)):
        raise DataError(
            f"{subject.train}: {raw.unit}s {listed_rows(rows, 6)} cannot be read. Correct them, or leave "
            'them out with do = "drop-unreadable".'
        )
    if doubled := [f.column for f in raw.findings if f.code is Code.DUPLICATE_COLUMN]:
        raise DataError(
            f"{subject.train}: the column {short(doubled[0] or '')} stands there twice. Rename one."
        )
    if not raw.rows:
        raise DataError(f"{subject.train}: expected records, found none. Point at another file.")
    for name in (*subject.columns.names, subject.person):
        if name is None or (name == subject.columns.label and subject.guessed_label):
            continue
        if name not in raw.columns:
            raise DataError(
                f"{subject.train}: expected a column {short(name)}, found {listed(raw.columns)}. Name the "
                "columns in the configuration, or with --text, --label, --prompt and --person."
            )
    return raw


def _public(
    subject: Subject, steps: Sequence[Step]
) -> tuple[frozenset[tuple[str, ...]] | None, dict[str, Any] | None]:
    """The evaluation set's records, if a step wants them, and the hash of their file."""
    if subject.test is None or all(step.kind is not StepKind.DROP_IN_TEST for step in steps):
        return None, None
    raw = read_raw(subject.test)
    records = sheet_of(raw, replace(subject, person=None))[0].records
    return frozenset(record for record in records if any(record)), {
        "sha256": raw.sha256,
        "rows": len(raw.rows),
    }


def _settled(
    raw: RawFile, subject: Subject, steps: Sequence[Step], public: frozenset[tuple[str, ...]] | None
) -> tuple[RawFile, tuple[StepDone, ...]]:
    changed: dict[int, set[int]] = defaultdict(set)
    dropped: dict[int, set[int]] = defaultdict(set)
    for _ in range(_PASSES):
        still = True
        for i, step in enumerate(steps):
            outcome = apply(step, raw, subject, public)
            changed[i].update(outcome.changed)
            dropped[i].update(outcome.dropped)
            if outcome.changed or outcome.dropped:
                still = False
                raw = replace(raw, rows=outcome.rows)
        if still:
            return raw, tuple(
                StepDone(
                    step.kind.label, step.to_json(), tuple(sorted(changed[i])), tuple(sorted(dropped[i]))
                )
                for i, step in enumerate(steps)
            )
    raise ConfigError(
        f"the recipe still changes rows after {_PASSES} passes: two of its steps undo each other. "
        "Leave one out"
    )


def _decoded(raw: RawFile) -> tuple[int, ...]:
    """The rows that were not UTF-8: where bytes that are not are kept as they are, they read differently."""
    if not raw.found(Code.INVALID_UTF8):
        return ()

    def content(row: Row) -> str:  # names that stand in a header are no part of a row
        return repr(row.cells if raw.kind is FileKind.JSONL else list(row.cells.values()))

    kept = read_raw(raw.path, "utf-8", "surrogateescape")
    undecoded = {row.number: content(row) for row in kept.rows}
    return tuple(row.number for row in raw.rows if undecoded.get(row.number) != content(row))


def _with_reading(
    done: Sequence[StepDone], decoded: tuple[int, ...], unreadable: tuple[int, ...]
) -> tuple[StepDone, ...]:
    """With what the steps did that are done while reading."""
    changed, dropped = {StepKind.DECODE.label: decoded}, {StepKind.DROP_UNREADABLE.label: unreadable}
    return tuple(
        replace(
            step, changed=changed.get(step.name, step.changed), dropped=dropped.get(step.name, step.dropped)
        )
        for step in done
    )
