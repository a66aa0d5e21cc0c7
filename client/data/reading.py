"""Read a data file as far as it can be read, and say of the rest where it cannot.

Training refuses a file at its first fault (common/datasets.py); here every fault is wanted at once.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from client.data.findings import Code, Finding
from common.cells import quoting_fault, short, type_name
from common.corpora import conll_records, squad_records
from common.datasets import FileKind, arrow_records, folder_table, kind_of, parquet_table, raw_bytes
from common.errors import DataError

FALLBACK = "windows-1252"  # how a line that is not UTF-8 is read, so that the rest of it can be looked at
_BOM = b"\xef\xbb\xbf"
_PROBE = 65536  # bytes that tell a text from something else
_ENDS = {"\r\n": "CR LF", "\n": "LF", "\r": "CR"}
_JUNK = 0.05  # share of control characters that no text has


@dataclass(frozen=True, repr=False)
class Row:
    """`number`: its first line in a text file, else its place, from 1."""

    number: int
    cells: Mapping[str, object]


@dataclass(frozen=True, repr=False)
class RawFile:
    """What could be read.."""

    path: Path
    kind: FileKind
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    findings: tuple[Finding, ...]
    sha256: str | None  # of the file as it lies there; None: a folder

    @property
    def unit(self) -> str:
        """What `Row.number` counts."""
        by_lines = (FileKind.CSV, FileKind.TSV, FileKind.JSONL, FileKind.CONLL)
        return "line" if self.kind in by_lines else "row"

    def found(self, code: Code) -> tuple[int, ...]:
        """The rows with this finding."""
        return tuple(row for finding in self.findings if finding.code is code for row in finding.rows)


@dataclass(frozen=True)
class _Fault:
    row: int
    code: Code
    says: str
    column: str | None = None


_Read = Row | _Fault


def read_raw(path: Path, encoding: str = FALLBACK, errors: str = "replace") -> RawFile:
    """Every row that can be read. `encoding`: of lines that are not UTF-8; `errors`: what becomes of bytes
    that are not in it either, as of `bytes.decode`.

    Raises:
        DataError: nothing is there, it is of no known kind, or it is no text at all.
    """
    kind = kind_of(path)
    if kind is FileKind.FOLDER:
        return _file(path, kind, arrow_records(folder_table(path), path), (), None)
    digest = _sha256(path)
    if kind is FileKind.PARQUET:
        return _file(path, kind, arrow_records(parquet_table(path), path), (), digest)
    text, faults = _decoded(path, encoding, errors)
    match kind:
        case FileKind.CSV:
            reading: Iterator[_Read] = _delimited(text, ",")
        case FileKind.TSV:
            reading = _delimited(text, "\t")
        case FileKind.JSONL:
            reading = _json_lines(text)
        case FileKind.CONLL:
            reading = _conll(text, path)
        case _:
            reading = (Row(row, cells) for row, cells in (squad_records(text, path) if text.strip() else ()))
    rows: list[Row] = []
    for read in reading:
        if isinstance(read, Row):
            rows.append(read)
        else:
            faults.append(read)
    return _file(path, kind, ((row.number, row.cells) for row in rows), faults, digest)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except PermissionError:
        raise DataError(f"{path}: may not be read. Give this user read access to it.") from None


def _file(
    path: Path,
    kind: FileKind,
    records: Iterator[tuple[int, Mapping[str, object]]],
    faults: Sequence[_Fault],
    digest: str | None,
) -> RawFile:
    rows = tuple(Row(number, cells) for number, cells in records)
    columns = dict.fromkeys(name for row in rows for name in row.cells)
    findings = [*_gathered(faults)]
    if not rows:
        findings.append(Finding(Code.NO_RECORDS, (), f"{path.name} holds no record that can be read."))
    return RawFile(path, kind, tuple(columns), rows, tuple(findings), digest)


def _gathered(faults: Sequence[_Fault]) -> Iterator[Finding]:
    """One finding for each kind of fault and column."""
    together: dict[tuple[Code, str | None], list[_Fault]] = {}
    for fault in faults:
        together.setdefault((fault.code, fault.column), []).append(fault)
    for (code, column), those in together.items():
        rows = tuple(sorted({fault.row for fault in those if fault.row}))
        yield Finding(code, rows, those[0].says, column)


# Bytes to text


def _decoded(path: Path, encoding: str, errors: str) -> tuple[str, list[_Fault]]:
    data = raw_bytes(path)
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path}: expected UTF-8, found UTF-16. Save it as UTF-8, for example with iconv.")
    probe = data[:_PROBE]
    junk = sum(probe.count(byte) for byte in range(32) if byte not in b"\t\n\r\f\x1b")
    if probe and junk > 8 and junk / len(probe) > _JUNK:
        raise DataError(
            f"{path}: expected text ({path.suffix}), found something else: {junk / len(probe):.0%} of its "
            "first bytes are control characters. Give the file the suffix of what it holds."
        )
    faults = []
    if data.startswith(_BOM):
        faults.append(_Fault(1, Code.BYTE_ORDER_MARK, "The file begins with a byte order mark."))
        data = data[len(_BOM) :]
    try:
        return data.decode("utf-8"), faults
    except UnicodeDecodeError:
        pass
    lines = data.split(b"\n")
    texts = []
    for number, line in enumerate(lines, start=1):
        try:
            texts.append(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            says = f"Bytes that are not UTF-8, such as 0x{line[error.start]:02x}; read as {encoding} here."
            faults.append(_Fault(number, Code.INVALID_UTF8, says))
            texts.append(line.decode(encoding, errors))
    return "\n".join(texts), faults


def _turns(ends: Iterator[tuple[int, str]]) -> Iterator[_Fault]:
    """The first line that ends in another way than those before it. ends: line numbers, and how each ends."""
    first: str | None = None
    for number, end in ends:
        if first is None:
            first = end
        elif end and end != first:
            says = f"Lines end in {_ENDS[first]} before it; it ends in {_ENDS[end]}."
            yield _Fault(number, Code.MIXED_NEWLINES, says)
            return


def _end(line: str) -> str:
    return line[len(line.rstrip("\r\n")) :][-2:]


# Text to rows


def _delimited(text: str, delimiter: str) -> Iterator[_Read]:
    """After a fault reading goes on in the next line: a quote left open does not swallow the file."""
    lines = io.StringIO(text, newline="").readlines()
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    header: list[str] | None = None
    ends: list[tuple[int, str]] = []  # of records: a line break inside a quoted field is text
    at = 0
    while at < len(lines):
        first = at
        reader = csv.reader((lines[i] for i in range(first, len(lines))), delimiter=delimiter, strict=True)
        while True:
            start = first + reader.line_num
            at = start + 1  # where to go on after a fault
            try:
                fields = next(reader)
            except StopIteration:
                at = len(lines)
                break
            except csv.Error as error:
                says = quoting_fault(error, first + reader.line_num - (start + 1))
                yield _Fault(start + 1, Code.UNREADABLE_ROW, f"{says[0].upper()}{says[1:]}.")
                break
            if not fields:
                continue
            if header is None:
                header = fields
                for name in sorted({name for name in header if header.count(name) > 1}):
                    yield _Fault(start + 1, Code.DUPLICATE_COLUMN, "The header names it twice.", name)
                continue
            if len(fields) != len(header):
                says = f"{len(fields)} fields, where the header has {len(header)}."
                yield _Fault(start + 1, Code.UNREADABLE_ROW, says)
                if first + reader.line_num > start + 1:
                    break
                continue
            yield Row(start + 1, dict(zip(header, fields, strict=True)))
            ends.append((start + 1, _end(lines[first + reader.line_num - 1])))
    yield from _turns(iter(ends))


def _json_lines(text: str) -> Iterator[_Read]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        repeated: list[str] = []

        def once(pairs: list[tuple[str, object]], repeated: list[str] = repeated) -> dict[str, object]:
            found = dict(pairs)
            if len(found) < len(pairs):
                names = [name for name, _ in pairs]
                repeated += sorted({name for name in names if names.count(name) > 1})
            return found

        try:
            record = json.loads(line, object_pairs_hook=once)
        except json.JSONDecodeError as error:
            yield _Fault(number, Code.UNREADABLE_ROW, f"No JSON: {error.msg}, at character {error.pos + 1}.")
            continue
        except (ValueError, RecursionError):
            yield _Fault(number, Code.UNREADABLE_ROW, "No JSON: a number or a nesting too large to read.")
            continue
        for name in repeated:
            yield _Fault(number, Code.DUPLICATE_COLUMN, "The object has the key twice.", name)
        if isinstance(record, dict):
            yield Row(number, record)
        else:
            yield _Fault(number, Code.UNREADABLE_ROW, f"Expected a JSON object, found {type_name(record)}.")
    yield from _turns(_line_ends(text))


def _line_ends(text: str) -> Iterator[tuple[int, str]]:
    if "\r" in text:
        for number, line in enumerate(text.split("\n")[:-1], start=1):
            yield number, "\r\n" if line.endswith("\r") else "\n"


def _conll(text: str, path: Path) -> Iterator[_Read]:
    """A sentence with a fault is left out whole."""
    lines = text.split("\n")
    first = 0
    for number in range(len(lines) + 1):
        if number < len(lines) and lines[number].strip():
            continue
        block = lines[first:number]
        try:
            for row, cells in conll_records("\n".join(block), path, first + 1):
                yield Row(row, cells)
        except DataError:
            bad = next(
                (
                    first + i + 1
                    for i, line in enumerate(block)
                    if len(line.split()) < 2 and line.strip() != "-DOCSTART-"
                ),
                first + 1,
            )
            says = f"Expected a word and its tag, found {short(lines[bad - 1].strip()[:1] + '…')} alone."
            yield _Fault(bad, Code.UNREADABLE_ROW, says)
        first = number + 1
    yield from _turns(_line_ends(text))
