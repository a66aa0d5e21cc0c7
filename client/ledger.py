"""The ledger of a site: charges on disk before anything is computed, in one SQLite file.

Durability. `journal_mode=DELETE` with `synchronous=EXTRA` syncs the folder after the journal is removed,
which is the moment of commit; with less, a power cut can bring the journal back and roll an acknowledged
charge away. Every method returns only when what it says is on disk. After an exception the entry may or
may not be there; both only over-count.

Many processes may share the file: each transaction first reads, and checks, what others have added.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

from client import ledger_file
from client.ledger_file import storage_errors
from client.ledger_witness import Witness
from common.errors import RepeatedRoundError
from common.files import sync_folder
from common.ledger import (
    Cancel,
    Charge,
    Complete,
    Entry,
    Genesis,
    Policy,
    Record,
    Reserve,
    Scope,
    Start,
    check_link,
    check_signature,
)
from common.ledger_checks import LedgerReport, export_ledger, verify_export
from common.ledger_errors import (
    ChainError,
    LedgerFormatError,
    RolledBackError,
    ScopeTermsError,
    WitnessError,
    WrongSiteError,
)
from common.ledger_head import SignedHead
from common.ledger_replay import Balance, History, Reservation, State, choose_order, filter_budget
from common.privacy import SampledGaussianEvent
from common.secagg.keys import IdentityKey


class Ledger:
    """What one site has spent, for ever. Opening makes the file if there is none.

    witness: a small file outside the site's folder that holds the last head, so that a ledger restored
    from a backup, or deleted, is noticed. busy_seconds: how long to wait for other processes.

    One object may be used from several threads, but not across a fork. Nothing else in the process may
    open the file, not even to copy it: closing it would drop SQLite's locks (POSIX). Use `export`.

    Raises:
        LedgerError: on opening, when the file is not this site's intact and newest ledger. Its subclass
            says which check failed; nothing may be computed on the site's data then.
    """

    def __init__(
        self,
        path: Path,
        identity: IdentityKey,
        site: int,
        *,
        witness: Path | None = None,
        busy_seconds: float = 60.0,
    ) -> None:
        self._path = path
        self._identity = identity
        self._site = site
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._witness: Witness | None = None
        self._folder_synced = False
        self._forget()
        with storage_errors(path):
            seen = None
            if witness is not None:
                self._witness = Witness(witness, ledger=path, site=site, public=identity.public)
                # Read before the ledger: while that is read others may add to both, and a witness that
                # is ahead would look like a rollback.
                seen = self._witness.newest()
            if not path.exists():
                self._begin(seen)
            ledger_file.sync_path(path)
            self._file = ledger_file.file_id(path)
            self._connection = ledger_file.connect(path, busy_seconds)
            try:
                ledger_file.check_file(self._connection)
                with self._transaction(witnessed=False):
                    pass
                self._meet_witness(seen)
            except BaseException:
                self._connection.close()
                raise

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Budgets

    def open_scope(
        self,
        name: str,
        *,
        target_epsilon: float,
        delta: float,
        planned: Sequence[SampledGaussianEvent] = (),
        order: float | None = None,
        inherits: Sequence[str] = (),
        note: str = "",
    ) -> Scope:
        """The budget of a data source, fixed for ever: (ε, δ) for one record, add-or-remove-one.

        `name` stands for records, whatever run or model uses them. `inherits` names every scope that may
        hold some of the same records: all their charges count in each other from now on. Without it the
        site states, signed, that no other scope has these records.
        `planned` only helps to choose the filter's order; give `order` to fix it. Asking again for the
        same terms returns what was opened; `planned` and `note` are not terms.

        Raises:
            ScopeTermsError: the name is open with other terms.
            UnknownScopeError: an inherited scope is not open.
            BudgetError: overlapping data have spent more than this budget, or theirs, allows.
            PrivacyError: a term is out of its range, or leaves no budget at any order.
        """
        with self._transaction() as history:
            if (known := history.scopes.get(name)) is not None:
                asked = (target_epsilon, delta, set(inherits), known.order if order is None else order)
                if asked != (known.target_epsilon, known.delta, set(known.inherits), known.order):
                    raise ScopeTermsError(f"{asked} for data source {name!r}, which is open as {known}")
                return known
            if order is None:
                order = choose_order(target_epsilon, delta, planned, history.spent(inherits))
            budget = filter_budget(target_epsilon, delta, order)
            scope = Scope(name, target_epsilon, delta, order, budget, tuple(inherits), note)
            history.check_opening(scope)
            self._append(scope)
            return scope

    def balance(self, scope: str) -> Balance:
        """Raises UnknownScopeError if `scope` is not open."""
        with self._transaction() as history:
            return history.balance(scope)

    # The life of a charge

    def reserve(self, charge: Charge, *, repeatable: bool = False, once: bool = False) -> Reservation:
        """Charge the full cost, or refuse. Its id is the entry's number.

        `repeatable` says that the noise is a function of `charge.context`, so that computing the same
        charge again releases the same numbers, which is free: an equal earlier repeatable reservation
        that was not cancelled is returned, whatever its state, and nothing is added. Without it every
        computation is a new charge.
        `once` keeps it to one computation for each round of a run: an earlier reservation of that round that
        was not started is returned if it is of this very charge, and otherwise cancelled.

        Raises:
            RepeatedRoundError: `once`, and the round was computed before, by other noise or on other terms.
            UnknownScopeError: the scope is not open.
            BudgetError: the charge would pass a budget. Nothing was recorded; nothing may be computed.
            LedgerStorageError: it could not be made durable; nothing may be computed.
        """
        with self._transaction() as history:
            if repeatable and (earlier := history.repetition(charge)) is not None:
                return earlier
            before = history.of_round(charge) if once and not repeatable else ()
            for earlier in before:
                if earlier.state is not State.RESERVED:
                    raise RepeatedRoundError(
                        f"round {charge.round} of run {charge.run} was computed before (entry {earlier.id}): "
                        "another answer would be charged again, so none is given"
                    )
                if earlier.charge == charge:
                    return earlier
            if not before:
                history.check_fits(charge)
                entry = self._append(Reserve(history.length + 1, charge, repeatable))
        if before:
            for earlier in before:
                self.cancel(earlier.id)
            return self.reserve(charge, once=True)
        return self._history.reservation(entry.seq)

    def start(self, number: int) -> Reservation:
        """Call right before anything is computed: from here on the charge is never given back.

        A repeatable reservation may be started again, whatever was done with it. Any other only once: a
        second computation would have fresh noise, and so needs a charge of its own.

        Raises:
            UnknownReservationError, WrongStateError: nothing may be computed.
        """
        with self._transaction() as history:
            reservation = history.reservation(number)
            again = reservation.repeatable and reservation.state in (State.STARTED, State.COMPLETED)
            if not again:
                self._append(Start(number))
        return self._history.reservation(number)

    def complete(self, number: int, output_sha256: str) -> Reservation:
        """The output is sealed on disk under this hash and may be sent, any number of times.

        Raises:
            OutputChangedError: it is completed with another output.
            UnknownReservationError, WrongStateError: it was never started.
        """
        with self._transaction() as history:
            reservation = history.reservation(number)
            if (reservation.state, reservation.output_sha256) != (State.COMPLETED, output_sha256):
                self._append(Complete(number, output_sha256))
        return self._history.reservation(number)

    def cancel(self, number: int) -> Reservation:
        """Give the charge back: nothing was computed, and nothing will be.

        Raises:
            UnknownReservationError, WrongStateError: it was started; the charge stays.
        """
        with self._transaction() as history:
            if history.reservation(number).state is not State.CANCELLED:
                self._append(Cancel(number))
        return self._history.reservation(number)

    def reservation(self, number: int) -> Reservation:
        """Raises UnknownReservationError if there is none with this id."""
        with self._transaction() as history:
            return history.reservation(number)

    def record_policy(self, text: str) -> Policy:
        """The rules the site has pinned from here on. Recording the same text again adds nothing."""
        policy = Policy.of(text)
        with self._transaction() as history:
            if history.policy != policy:
                self._append(policy)
        return policy

    # For others to check

    def head(self) -> SignedHead:
        """Send it with every message: who has kept it will notice a shorter or another history."""
        with self._transaction():
            return self._head()

    def entries(self) -> tuple[Entry, ...]:
        with self._transaction():
            return tuple(self._entries)

    def export(self) -> bytes:
        """Everything an auditor needs, as JSON lines; nothing in it was computed from a record."""
        with self._transaction():
            return export_ledger(self._entries, self._head())

    def verify(self, *, pld: bool = True) -> LedgerReport:
        """Read the whole file anew, and make every check that needs nothing from outside.

        pld: also compute ε by privacy loss distributions, which can take seconds.

        Raises:
            LedgerError: the numbered check that failed.
        """
        with self._lock, storage_errors(self._path):
            ledger_file.check_file(self._connection)
            self._forget()
            return verify_export(self.export(), public=self._identity.public, pld=pld)

    # Reading and writing

    def _head(self) -> SignedHead:
        return SignedHead.sign(self._site, self._entries[-1], self._identity)

    def _forget(self) -> None:
        self._history = History()
        self._entries: list[Entry] = []
        self._pending: list[Entry] = []

    @contextlib.contextmanager
    def _transaction(self, *, witnessed: bool = True) -> Iterator[History]:
        """One `BEGIN IMMEDIATE` … `COMMIT`: what is read in it is still true when it is written."""
        with self._lock, storage_errors(self._path):
            self._check_place()
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                self._pending = []
                self._catch_up()
                yield self._history
                self._connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")
                raise
            for entry in self._pending:
                self._take_in(entry)
            if not self._folder_synced:
                # SQLite skips its own sync of the folder when it cannot open it, and says nothing; and an
                # entry found in the file may be of a commit whose last step failed in another process.
                # Whoever relies on either must not be rolled back by a power cut.
                sync_folder(self._path.parent)
                self._folder_synced = True
            if witnessed and self._witness is not None:
                self._witness.advance(self._head())

    def _append(self, record: Record) -> Entry:
        self._history.check(record)
        entry = Entry.make(self._entries[-1], record, self._identity)
        ledger_file.insert(self._connection, entry)
        self._pending.append(entry)
        return entry

    def _take_in(self, entry: Entry) -> None:
        self._history.apply(entry.record)
        self._entries.append(entry)
        self._folder_synced = False

    def _catch_up(self) -> None:
        """Read and check what is in the file beyond the last entry seen."""
        known = self._entries[-1] if self._entries else None
        rows = ledger_file.rows_from(self._connection, known.seq if known else None)
        if known is not None:
            if not rows or not ledger_file.is_row_of(known, rows[0]):
                raise ChainError(f"entry {known.seq} changed or gone since this program read it")
            rows = rows[1:]
        elif not rows:
            raise LedgerFormatError(f"no entry in {self._path}")
        for row in rows:
            entry = ledger_file.entry_of(row)
            check_link(self._entries[-1] if self._entries else None, entry)
            if isinstance(entry.record, Genesis):
                self._check_owner(entry.record)
            check_signature(entry, self._identity.public)
            self._take_in(entry)

    def _check_owner(self, genesis: Genesis) -> None:
        own = Genesis(self._site, self._identity.public.hex())
        if genesis != own:
            raise WrongSiteError(f"{self._path} with {genesis}, opened as {own}")

    def _check_place(self) -> None:
        if os.getpid() != self._process:
            raise RuntimeError("a ledger must be opened in the process that uses it, after any fork")
        if ledger_file.file_id(self._path) != self._file:
            raise RolledBackError(f"another file at {self._path} than the one that was opened")

    def _begin(self, seen: SignedHead | None) -> None:
        if seen is not None:
            raise RolledBackError(f"no ledger at {self._path} where there were {seen.seq} entries")
        if self._path.with_name(f"{self._path.name}-journal").exists():
            raise RolledBackError(f"the journal of a ledger that is gone, beside {self._path}")
        first = Entry.make(None, Genesis(self._site, self._identity.public.hex()), self._identity)
        ledger_file.create(self._path, first)

    def _meet_witness(self, seen: SignedHead | None) -> None:
        if self._witness is None:
            return
        if seen is None and len(self._entries) > 1:
            # Another process may have made both since; again, first the witness, then the ledger.
            seen = self._witness.newest()
            with self._transaction(witnessed=False):
                pass
            if seen is None:
                raise WitnessError(
                    f"{len(self._entries)} entries in {self._path} and no witness at {self._witness.path}"
                )
        last = self._entries[-1]
        if seen is None:
            self._witness.create(self._head())
        elif seen.seq > last.seq:
            raise RolledBackError(f"{last.seq} entries in {self._path} where there were {seen.seq}")
        elif self._entries[seen.seq - 1].hash != seen.hash:
            raise RolledBackError(f"another entry {seen.seq} in {self._path} than there was")
        self._witness.advance(self._head())
        self._witness.sync()


def adopt_witness(path: Path, identity: IdentityKey, site: int, witness: Path) -> SignedHead:
    """Begin a witness for a ledger that has none. Only for a ledger that is known to be the newest:
    compare the head that is returned with the server's receipts.

    Raises:
        WitnessError: there is a witness already; it is never overruled.
    """
    watch = Witness(witness, ledger=path, site=site, public=identity.public)
    if not path.exists():
        raise WitnessError(f"no ledger at {path}")
    with storage_errors(witness):
        if watch.newest() is not None:
            raise WitnessError(f"a witness at {witness} already")
        with Ledger(path, identity, site) as ledger:
            head = ledger.head()
        watch.create(head)
        watch.advance(head)  # the file may have been there, empty
        watch.sync()
    return head
