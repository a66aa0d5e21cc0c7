"""The file under a ledger: made whole or not at all, opened with every sync that SQLite knows, checked."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

from common.errors import PrivacyError
from common.files import sync_folder
from common.ledger import Entry
from common.ledger_errors import LedgerFormatError, LedgerStorageError

# EXTRA syncs the folder after the journal is removed, which is the moment of commit. With FULL, a power
# cut can bring the journal back, and with it roll away a charge that was acknowledged.
_SYNCHRONOUS = "EXTRA"

_SCHEMA = {
    "entries": (
        "CREATE TABLE entries (seq INTEGER PRIMARY KEY, body TEXT NOT NULL, hash BLOB NOT NULL, "
        "signature BLOB NOT NULL)"
    ),
    "no_update": (
        "CREATE TRIGGER no_update BEFORE UPDATE ON entries "
        "BEGIN SELECT RAISE(ABORT, 'an entry is never changed'); END"
    ),
    "no_delete": (
        "CREATE TRIGGER no_delete BEFORE DELETE ON entries "
        "BEGIN SELECT RAISE(ABORT, 'an entry is never removed'); END"
    ),
}

# What SQLite reports when the disk or another process is at fault, and not the content of the file.
_STORAGE_CODES = frozenset(
    {
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
    }
)

Row = tuple[object, object, object, object]


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """What SQLite and the file system raise, as the ledger's own errors."""
    try:
        yield
    except sqlite3.ProgrammingError:
        raise  # a use after `close`, say: no fault of the file or the disk
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        found = f"{path}: {error} ({getattr(error, 'sqlite_errorname', type(error).__name__)})"
        if code in _STORAGE_CODES:
            raise LedgerStorageError(found) from error
        raise LedgerFormatError(found) from error
    except UnicodeDecodeError as error:  # SQLite quotes what it has found in a damaged schema
        raise LedgerFormatError(f"{path}: a damaged file ({error})") from error
    except OSError as error:
        raise LedgerStorageError(f"{path}: {error}") from error


@contextlib.contextmanager
def whole_or_none(path: Path) -> Iterator[Path]:
    """Another name, mode 0600, to write a new file under; at the end `path` stands for it.

    When another process was faster, `path` stays what that one made. The bytes must be synced by whoever
    writes them, and the name by `sync_path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".new", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        with contextlib.suppress(FileExistsError):
            path.hardlink_to(temporary)
    finally:
        temporary.unlink()


def create(path: Path, first: Entry) -> None:
    """The file with its first entry. So a file without entries is never a ledger that was being made: it is
    one that was cut to nothing, and is refused.
    """
    with whole_or_none(path) as temporary, contextlib.closing(connect(temporary, 0)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        for statement in _SCHEMA.values():
            connection.execute(statement)
        insert(connection, first)
        connection.execute("COMMIT")


def sync_path(path: Path) -> None:
    """Make the names that lead to `path` durable. At every opening: whoever made them may have died first."""
    for folder in (path.parent, path.parent.parent, path.parent.parent.parent):
        with contextlib.suppress(PermissionError):  # then it is not one that we could have made
            sync_folder(folder)


def file_id(path: Path) -> tuple[int, int] | None:
    """Which file the name stands for; None if for none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def connect(path: Path, busy_seconds: float) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=busy_seconds, isolation_level=None, check_same_thread=False)
    try:
        connection.text_factory = bytes
        mode = connection.execute("PRAGMA journal_mode=DELETE").fetchone()
        connection.execute(f"PRAGMA synchronous={_SYNCHRONOUS}")
        connection.execute("PRAGMA fullfsync=ON")  # where fsync alone does not reach the disk (macOS)
        if mode != (b"delete",):
            raise LedgerFormatError(f"{path} with journal mode {mode!r:.80}")
    except BaseException:
        connection.close()
        raise
    return connection


def check_file(connection: sqlite3.Connection) -> None:
    """Whether SQLite finds its own structures whole, and only ours in them, and may write to them.

    A cell that is missing at the end of a page would read as a shorter ledger; only this finds it.

    Raises:
        LedgerFormatError: it does not.
        sqlite3.Error: it may not write.
    """
    found = connection.execute("SELECT name, sql FROM sqlite_master").fetchall()
    if sorted(found, key=repr) != sorted(((n.encode(), s.encode()) for n, s in _SCHEMA.items()), key=repr):
        raise LedgerFormatError(f"a file with the tables and triggers {[name for name, _ in found]!r:.120}")
    report = connection.execute("PRAGMA quick_check").fetchall()
    if report != [(b"ok",)]:
        raise LedgerFormatError(f"a damaged file: {report!r:.300}")
    # SQLite opens read-only what it cannot open otherwise, and says so at the first write. No row is met.
    connection.execute("DELETE FROM entries WHERE 0")


def insert(connection: sqlite3.Connection, entry: Entry) -> None:
    connection.execute(
        "INSERT INTO entries (seq, body, hash, signature) VALUES (?, ?, ?, ?)",
        (entry.seq, entry.body, entry.hash, entry.signature),
    )


def rows_from(connection: sqlite3.Connection, first: int | None) -> list[Row]:
    """Every row from number `first` on, in order; None: every row there is, whatever its number."""
    return connection.execute(
        "SELECT seq, body, hash, signature FROM entries WHERE seq >= ? ORDER BY seq",
        (-(2**63) if first is None else first,),
    ).fetchall()


def is_row_of(entry: Entry, row: Row) -> bool:
    return row == (entry.seq, entry.body.encode(), entry.hash, entry.signature)


def entry_of(row: Row) -> Entry:
    """Raises LedgerFormatError unless the row holds an entry."""
    seq, body, digest, signature = row
    if not (isinstance(body, bytes) and isinstance(digest, bytes) and isinstance(signature, bytes)):
        raise LedgerFormatError(f"values of other types in row {seq!r:.40}")
    try:
        entry = Entry.read(body.decode("ascii"), digest, signature)
    except (UnicodeDecodeError, PrivacyError) as error:
        raise LedgerFormatError(f"in row {seq!r:.40} {error}") from error
    if entry.seq != seq:
        raise LedgerFormatError(f"entry {entry.seq} in row {seq!r:.40}")
    return entry
