"""A site's ledger for those who only look: read while the site goes on with it, and never written.

Its folder stays as it is, to the last byte and name. What is read is checked like everything that comes
from a file: its form here, its chain and signatures in `LedgerReader`.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import tempfile
import threading
from pathlib import Path

from client import ledger_file
from client.ledger_file import Row, storage_errors
from common.ledger import Entry, Genesis, check_link, check_signature
from common.ledger_errors import (
    ChainError,
    LedgerFormatError,
    LedgerStorageError,
    RolledBackError,
    WrongSiteError,
)
from common.ledger_replay import History

SQLITE_MAGIC = b"SQLite format 3\0"
_READ_VERSION = 19  # the byte of the header that is 2 where a reader would make files of its own (WAL)
_ATTEMPTS = 5
_BUSY_SECONDS = 10.0


def read_rows(path: Path) -> list[Row]:
    """Every row of the ledger in `path`, in order.

    A process that was killed while it wrote leaves a journal, and only a writer may roll it back: that is
    done to a copy, elsewhere.

    Raises:
        LedgerFormatError: it is no ledger's file, or a damaged one. LedgerStorageError: it cannot be read.
    """
    with storage_errors(path):
        _check_header(path)
        try:
            return _rows(f"{path.absolute().as_uri()}?mode=ro")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_READONLY_ROLLBACK:
                raise
        with tempfile.TemporaryDirectory() as folder:
            copy = _copy(path, Path(folder))
            return _rows(f"{copy.as_uri()}?mode=rw")


def read_entries(path: Path) -> list[Entry]:
    """Every entry in `path`, each in the right form; nothing is said about their chain.

    Raises:
        LedgerFormatError, LedgerStorageError: see `read_rows`.
    """
    return [ledger_file.entry_of(row) for row in read_rows(path)]


def _check_header(path: Path) -> None:
    with path.open("rb") as file:
        header = file.read(_READ_VERSION + 1)
    if not header.startswith(SQLITE_MAGIC) or header[_READ_VERSION] != 1:
        raise LedgerFormatError(f"{path}, which is not in the format of a ledger's file")


def _rows(uri: str) -> list[Row]:
    with contextlib.closing(
        sqlite3.connect(uri, uri=True, timeout=_BUSY_SECONDS, isolation_level=None)
    ) as db:
        db.text_factory = bytes
        db.execute("BEGIN")  # what is checked is what is read
        ledger_file.check_content(db)
        return ledger_file.rows_from(db, None)


def _copy(path: Path, folder: Path) -> Path:
    """File and journal, as they are together."""
    journal = path.with_name(f"{path.name}-journal")
    for _ in range(_ATTEMPTS):
        before = _stamp(path), _stamp(journal)
        with contextlib.suppress(FileNotFoundError):  # rolled back by the site just now
            shutil.copyfile(path, folder / path.name)
            shutil.copyfile(journal, folder / journal.name)
        if before == (_stamp(path), _stamp(journal)):
            return folder / path.name
    raise LedgerStorageError(f"{path}: another process is repairing it; try again")


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


class LedgerReader:
    """The ledger of one site as it grows, each entry checked once.

    Raises:
        LedgerError: on construction and at each reading, when the file is not this site's intact ledger,
            or not a continuation of what was read before.
    """

    def __init__(self, path: Path, site: int, public: bytes) -> None:
        self._path = path
        self._owner = Genesis(site, public.hex())
        self._public = public
        self._lock = threading.Lock()
        self._entries: list[Entry] = []
        self._history = History()
        self.read()

    def read(self) -> tuple[Entry, ...]:
        """All entries there are now."""
        with self._lock:
            self._catch_up()
            return tuple(self._entries)

    def _catch_up(self) -> None:
        rows = read_rows(self._path)
        known = len(self._entries)
        if len(rows) < known:
            raise RolledBackError(f"{len(rows)} entries in {self._path} where there were {known}")
        for entry, row in zip(self._entries, rows, strict=False):
            if not ledger_file.is_row_of(entry, row):
                raise ChainError(f"entry {entry.seq} changed since this program read it")
        for row in rows[known:]:
            self._take_in(ledger_file.entry_of(row))
        if not self._entries:
            raise LedgerFormatError(f"no entry in {self._path}")

    def _take_in(self, entry: Entry) -> None:
        check_link(self._entries[-1] if self._entries else None, entry)
        if isinstance(entry.record, Genesis) and entry.record != self._owner:
            raise WrongSiteError(f"{self._path} with {entry.record}, opened as {self._owner}")
        check_signature(entry, self._public)
        self._history.apply(entry.record)
        self._entries.append(entry)
