"""Rows as the bytes of a data file, and files that are written once."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Sequence
from pathlib import Path

from client.data.reading import RawFile, Row
from common import files
from common.cells import short, type_name
from common.datasets import FileKind, folder_table, named_kind, parquet_table
from common.errors import ConfigError, DataError


def rows_as_bytes(raw: RawFile, out: Path) -> bytes:
    """The rows of `raw` in the form that the suffix of `out` names. The same rows give the same bytes.

    Raises:
        DataError: that form is not written here, or cannot hold what the rows hold.
    """
    match named_kind(out):
        case FileKind.CSV:
            data = _delimited(raw, out, ",")
        case FileKind.TSV:
            data = _delimited(raw, out, "\t")
        case FileKind.JSONL:
            data = b"".join(_json_line(row, raw, out) for row in raw.rows)
        case FileKind.CONLL:
            data = _conll(raw, out)
        case FileKind.PARQUET:
            return _parquet(raw, out)
        case _:
            raise DataError(
                f"{out}: expected .csv, .tsv, .jsonl, .conll or .parquet to write; choose one of them."
            )
    match out.suffix.lower():
        case ".gz":
            return gzip.compress(data, mtime=0)
        case ".bz2":
            return bz2.compress(data)
        case ".xz":
            return lzma.compress(data)
        case _:
            return data


class _Lines(list[str]):
    """What csv writes, with LF at line ends. Told to end lines so itself, it would leave a CR unquoted."""

    def write(self, line: str) -> None:
        self.append(line.removesuffix("\r\n") + "\n")


def _delimited(raw: RawFile, out: Path, delimiter: str) -> bytes:
    lines = _Lines()
    writer = csv.writer(lines, delimiter=delimiter)
    writer.writerow(raw.columns)
    for row in raw.rows:
        cells = {name: _as_json(value) for name, value in row.cells.items()}
        for name, value in cells.items():
            if not isinstance(value, str | int | float | None):
                found = f"column {short(name)}, {raw.unit} {row.number}: {type_name(value)}"
                raise DataError(f"{out}: a table of text cannot hold {found}. Write .jsonl instead.")
        writer.writerow(["" if (value := cells.get(name)) is None else value for name in raw.columns])
    return _encoded("".join(lines), out)


def _as_json(value: object) -> object:
    """Of a conversation its JSON, which training reads as the same one; all else as it is."""
    turns = isinstance(value, list) and value and all(isinstance(t, dict) and "role" in t for t in value)
    return json.dumps(value, ensure_ascii=False) if turns else value


def _json_line(row: Row, raw: RawFile, out: Path) -> bytes:
    try:
        return json.dumps(row.cells, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair, as it was read
        return json.dumps(row.cells).encode() + b"\n"
    except TypeError:
        raise DataError(
            f"{out}: {raw.unit} {row.number} holds what JSON has no form for. Write .parquet instead."
        ) from None


def _conll(raw: RawFile, out: Path) -> bytes:
    lines: list[str] = []
    for row in raw.rows:
        words, tags = row.cells.get("tokens"), row.cells.get("tags")
        if not isinstance(words, list) or not isinstance(tags, list) or len(words) != len(tags):
            raise DataError(
                f"{out}: {raw.unit} {row.number} has no lists tokens and tags of one length. "
                "Write .jsonl instead."
            )
        lines += [*(f"{word}\t{tag}" for word, tag in zip(words, tags, strict=True)), ""]
    return _encoded("\n".join(lines) + "\n" if lines else "", out)


def _encoded(text: str, out: Path) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{out}: a cell holds half a surrogate pair, which UTF-8 has no form for.") from None


def _parquet(raw: RawFile, out: Path) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = None
    if raw.kind is FileKind.PARQUET:
        schema = parquet_table(raw.path).schema
    elif raw.kind is FileKind.FOLDER:
        schema = folder_table(raw.path).schema
    try:
        table = pa.Table.from_pylist([dict(row.cells) for row in raw.rows], schema=schema)
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
    except (pa.ArrowException, UnicodeEncodeError):
        raise DataError(f"{out}: cells of one column are of several types. Write .jsonl instead.") from None
    return buffer.getvalue()


def record_of(out: Path) -> Path:
    """Where it is written what was done to make `out`."""
    return out.with_name(out.name + ".recipe.json")


def refuse_existing(paths: Sequence[Path]) -> None:
    """Nothing is overwritten, not even through a link.

    Raises:
        ConfigError: something is at one of them, or its folder is not there.
    """
    for path in paths:
        if path.is_symlink() or path.exists():
            raise ConfigError(
                f"{path} is there already, and nothing is overwritten: name a new file, or move it"
            )
        if not path.parent.is_dir():
            raise ConfigError(f"{path.parent} is no folder: make it, or name another file")


def write_together(*written: tuple[Path, bytes]) -> None:
    """All of them, or none.

    Raises:
        ConfigError: something is there already.
        OSError: the disk is full, or the folder may not be written.
    """
    refuse_existing([path for path, _ in written])
    done: list[Path] = []
    try:
        for path, data in written:
            files.write_new(path, data)
            done.append(path)
    except BaseException:
        for path in done:
            path.unlink()
        raise
