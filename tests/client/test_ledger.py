"""The ledger of a site: never an under-count, whatever dies, fills up, races, or is put back."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import resource
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import client.ledger
from client import ledger_file
from client.ledger import Ledger, adopt_witness
from client.ledger_witness import Witness
from common.errors import BudgetError, PrivacyError
from common.ledger import Charge, Entry, Policy
from common.ledger_checks import Claim, export_ledger, verify_export
from common.ledger_errors import (
    ChainError,
    EntrySignatureError,
    ForkError,
    HeadWentBackError,
    LedgerError,
    LedgerFormatError,
    LedgerStorageError,
    LifecycleError,
    OutputChangedError,
    RolledBackError,
    ScopeTermsError,
    UnknownReservationError,
    UnknownScopeError,
    WitnessError,
    WrongSiteError,
    WrongStateError,
)
from common.ledger_head import SignedHead, check_newer
from common.ledger_replay import State
from common.privacy import SampledGaussianEvent, calibrate_noise_multiplier, epsilon_pld, epsilon_rdp
from common.secagg.keys import IdentityKey, Secret

DELTA = 1e-5
SITE = 3
IDENTITY = IdentityKey(Secret(bytes(range(32))))
STRANGER = IdentityKey(Secret(bytes(32)))
EVENT = SampledGaussianEvent(0.1, 2.0, 5, 0.5, 10)
DONE = "ab" * 32


def charge(number: int = 1, *events: SampledGaussianEvent, scope: str = "notes") -> Charge:
    return Charge(scope, "run", number, f"{number:08x}", "model", "plan", events or (EVENT,))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "site" / "ledger.sqlite"


@pytest.fixture
def witness(tmp_path: Path) -> Path:
    return tmp_path / "away" / "witness"


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of thousands of openings that are not about what is on disk."""
    monkeypatch.setattr(ledger_file, "_SYNCHRONOUS", "OFF")
    monkeypatch.setattr(ledger_file, "sync_folder", lambda _: None)
    monkeypatch.setattr(client.ledger, "sync_folder", lambda _: None)
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with Ledger(path, IDENTITY, SITE) as opened:
        opened.open_scope("notes", target_epsilon=8.0, delta=DELTA)
        yield opened


def reopened(path: Path, **more: Any) -> Ledger:
    return Ledger(path, IDENTITY, SITE, **more)


# What is on disk, and when


def test_the_file_is_private_and_every_commit_is_synced(path: Path) -> None:
    with reopened(path) as ledger:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert [p.name for p in path.parent.iterdir()] == ["ledger.sqlite"]
        assert ledger._connection.execute("PRAGMA synchronous").fetchone() == (3,)
        assert ledger._connection.execute("PRAGMA journal_mode").fetchone() == (b"delete",)


def test_a_charge_is_on_disk_and_its_folder_synced_when_reserve_returns(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    sync_folder = ledger_file.sync_folder

    def watched(folder: Path) -> None:
        sync_folder(folder)
        synced.append(folder)

    monkeypatch.setattr(ledger_file, "sync_folder", watched)
    monkeypatch.setattr(client.ledger, "sync_folder", watched)
    with reopened(path) as ledger:
        assert {path.parent, path.parent.parent} <= set(synced)
        ledger.open_scope("notes", target_epsilon=8.0, delta=DELTA)
        synced.clear()
        reservation = ledger.reserve(charge())
        assert synced == [path.parent]
        with sqlite3.connect(path) as other:
            body = other.execute("SELECT body FROM entries ORDER BY seq DESC").fetchone()[0]
    assert json.loads(body)["id"] == reservation.id


def test_one_hundred_rounds_cost_what_they_cost(path: Path) -> None:
    """A batch of 32 in 4000, 125 steps a round, σ = 1: five rounds or a hundred are not the same."""
    one = SampledGaussianEvent(32 / 4000, 1.0, 125, 1.0, 32)
    with reopened(path) as ledger:
        ledger.open_scope("notes", target_epsilon=8.0, delta=1e-5, planned=[one] * 100)
        for number in range(100):
            ledger.reserve(charge(number, one))
            if number == 4:
                assert ledger.balance("notes").epsilon_rdp < 2.5
        assert ledger.balance("notes").epsilon_rdp == pytest.approx(5.88, abs=0.02)
    with reopened(path) as ledger:
        balance = ledger.balance("notes")
        assert balance.epsilon_rdp == pytest.approx(5.88, abs=0.02)
        assert balance.epsilon_pld == epsilon_pld([one] * 100, 1e-5) < balance.epsilon_rdp
        assert len(balance.reserved) == len(balance.reservations) == 100
        assert balance.epsilon_left == balance.scope.budget - balance.rho > 0


def test_a_planned_run_fits_to_the_last_round_and_no_further(path: Path, unsynced: None) -> None:
    rounds, target = 10, 2.0
    sigma = calibrate_noise_multiplier(target_epsilon=target, delta=DELTA, sample_rate=0.1, steps=rounds * 5)
    one = SampledGaussianEvent(0.1, sigma, 5, 0.5, 10)
    ledger = reopened(path)
    ledger.open_scope("notes", target_epsilon=target, delta=DELTA, planned=[one] * rounds)
    for number in range(rounds):
        if number == 4:
            ledger.close()
            ledger = reopened(path)
        ledger.reserve(charge(number, one), repeatable=number == 9)
    balance = ledger.balance("notes")
    assert target * 0.98 < balance.epsilon_rdp <= target
    before = ledger.entries()
    for again in (ledger, reopened(path)):
        with pytest.raises(BudgetError, match="nothing was computed"):
            again.reserve(charge(rounds, one))
        # A repeated charge releases nothing new, so a spent budget does not stop it.
        assert again.reserve(charge(9, one), repeatable=True).id == before[-1].seq
    assert ledger.entries() == before


def test_a_reservation_of_several_events_costs_their_sum(ledger: Ledger) -> None:
    events = (EVENT, SampledGaussianEvent(0.02, 1.0, 30, 1.0, 20), EVENT)
    ledger.reserve(charge(1, *events))
    assert ledger.balance("notes").events == events
    assert ledger.balance("notes").epsilon_rdp == epsilon_rdp(events, DELTA)


# The life of a charge


def advance(ledger: Ledger, number: int, state: State) -> None:
    match state:
        case State.STARTED:
            ledger.start(number)
        case State.COMPLETED:
            ledger.start(number)
            ledger.complete(number, DONE)
        case State.CANCELLED:
            ledger.cancel(number)
        case State.RESERVED:
            pass


OUTCOMES: dict[tuple[State, str, bool], State | type[LifecycleError]] = {
    (State.RESERVED, "start", False): State.STARTED,
    (State.RESERVED, "complete", False): WrongStateError,
    (State.RESERVED, "cancel", False): State.CANCELLED,
    (State.STARTED, "start", False): WrongStateError,  # fresh noise is a new charge
    (State.STARTED, "start", True): State.STARTED,
    (State.STARTED, "complete", False): State.COMPLETED,
    (State.STARTED, "cancel", False): WrongStateError,
    (State.STARTED, "cancel", True): WrongStateError,
    (State.COMPLETED, "start", False): WrongStateError,
    (State.COMPLETED, "start", True): State.COMPLETED,
    (State.COMPLETED, "complete", False): State.COMPLETED,
    (State.COMPLETED, "complete with another output", False): OutputChangedError,
    (State.COMPLETED, "complete with another output", True): OutputChangedError,
    (State.COMPLETED, "cancel", False): WrongStateError,
    (State.CANCELLED, "start", False): WrongStateError,
    (State.CANCELLED, "start", True): WrongStateError,
    (State.CANCELLED, "complete", False): WrongStateError,
    (State.CANCELLED, "cancel", False): State.CANCELLED,
}


@pytest.mark.parametrize(("state", "step", "repeatable"), OUTCOMES, ids=str)
def test_every_step_in_every_state(
    path: Path, unsynced: None, state: State, step: str, repeatable: bool
) -> None:
    with reopened(path) as ledger:
        ledger.open_scope("notes", target_epsilon=8.0, delta=DELTA)
        number = ledger.reserve(charge(), repeatable=repeatable).id
        advance(ledger, number, state)
        before = ledger.entries()
        steps: dict[str, Callable[[], object]] = {
            "start": lambda: ledger.start(number),
            "complete": lambda: ledger.complete(number, DONE),
            "complete with another output": lambda: ledger.complete(number, "cd" * 32),
            "cancel": lambda: ledger.cancel(number),
        }
        match OUTCOMES[state, step, repeatable]:
            case State() as wanted:
                steps[step]()
                added = int(wanted is not state)
            case error:
                wanted, added = state, 0
                with pytest.raises(error):
                    steps[step]()
        assert ledger.reservation(number).state is wanted
        assert len(ledger.entries()) == len(before) + added
        charged = () if wanted is State.CANCELLED else (EVENT,)
        assert ledger.balance("notes").events == charged
    with reopened(path) as ledger:
        assert ledger.reservation(number).state is wanted
        assert ledger.balance("notes").events == charged


def test_what_is_not_there_is_refused(ledger: Ledger) -> None:
    before = ledger.entries()
    for call in (ledger.start, ledger.cancel, ledger.reservation, lambda n: ledger.complete(n, DONE)):
        for number in (1, 2, 3, 99):
            with pytest.raises(UnknownReservationError):
                call(number)
    for unknown in (lambda: ledger.reserve(charge(scope="other")), lambda: ledger.balance("other")):
        with pytest.raises(UnknownScopeError):
            unknown()
    with pytest.raises(PrivacyError):
        ledger.complete(1, "not a hash")
    assert ledger.entries() == before


def test_repeating_a_repeatable_charge_is_free(path: Path, ledger: Ledger) -> None:
    first = ledger.reserve(charge(1), repeatable=True)
    ledger.start(first.id)
    ledger.complete(first.id, DONE)
    before = ledger.entries()
    for again in (ledger, reopened(path)):
        found = again.reserve(charge(1), repeatable=True)
        assert (found.id, found.state, found.output_sha256) == (first.id, State.COMPLETED, DONE)
        again.start(found.id)
        again.complete(found.id, DONE)
    assert ledger.entries() == before


@pytest.mark.parametrize(
    "change",
    [
        {"scope": "images"},
        {"run": "other"},
        {"round": 2},
        {"context": "00"},
        {"model": "other"},
        {"plan": "other"},
        {"events": (EVENT, EVENT)},
        {"events": (dataclasses.replace(EVENT, noise_multiplier=3.0),)},
    ],
    ids=str,
)
def test_anything_else_is_a_charge_of_its_own(ledger: Ledger, change: dict[str, Any]) -> None:
    ledger.open_scope("images", target_epsilon=8.0, delta=DELTA)
    first = ledger.reserve(charge(1), repeatable=True)
    assert ledger.reserve(dataclasses.replace(charge(1), **change), repeatable=True).id != first.id


def test_fresh_noise_is_charged_each_time_and_never_shared(ledger: Ledger) -> None:
    """A repeatable charge is free only after a repeatable one: the noise of any other was used up."""
    for number in (1, 2, 3):
        ledger.reserve(charge(1))
        assert len(ledger.balance("notes").events) == number
    repeatable = ledger.reserve(charge(1), repeatable=True)
    assert len(ledger.balance("notes").events) == 4
    ledger.cancel(repeatable.id)
    assert ledger.reserve(charge(1), repeatable=True).id > repeatable.id
    assert len(ledger.balance("notes").events) == 4


# Budgets


def test_the_terms_of_a_scope_are_fixed(path: Path, ledger: Ledger) -> None:
    first = ledger.open_scope("notes", target_epsilon=8.0, delta=DELTA)
    before = ledger.entries()
    same = ledger.open_scope("notes", target_epsilon=8, delta=DELTA, planned=[EVENT], note="again")
    assert (
        same
        == first
        == reopened(path).open_scope("notes", target_epsilon=8.0, delta=DELTA, order=first.order)
    )
    ledger.open_scope("images", target_epsilon=8.0, delta=DELTA)
    for other in (
        {"target_epsilon": 8.1, "delta": DELTA},
        {"target_epsilon": 8.0, "delta": 1e-6},
        {"target_epsilon": 8.0, "delta": DELTA, "order": 2.0},
        {"target_epsilon": 8.0, "delta": DELTA, "inherits": ["images"]},
    ):
        with pytest.raises(ScopeTermsError, match="mint budget"):
            ledger.open_scope("notes", **other)
    assert len(ledger.entries()) == len(before) + 1


@pytest.mark.parametrize(
    "terms",
    [
        {"target_epsilon": 0.0},
        {"target_epsilon": -1.0},
        {"target_epsilon": 1e-3, "delta": 1e-9},
        {"delta": 0.0},
        {"delta": 1.0},
        {"order": 1.0},
        {"order": 4.55},
        {"order": 1.1, "target_epsilon": 1.0},  # no budget at this order
        {"inherits": ["notes2"]},
        {"inherits": ["never opened"]},
        {"note": "x" * 2_000_000},
    ],
    ids=lambda terms: ",".join(terms),
)
def test_bad_terms_open_nothing(ledger: Ledger, terms: dict[str, Any]) -> None:
    before = ledger.entries()
    with pytest.raises(PrivacyError):
        ledger.open_scope("notes2", **{"target_epsilon": 8.0, "delta": DELTA, **terms})
    assert ledger.entries() == before


def test_overlapping_data_begin_with_what_was_spent_and_share_what_comes(ledger: Ledger) -> None:
    plan = [SampledGaussianEvent(0.02, 1.0, 50, 1.0, 20)] * 8
    ledger.reserve(charge(1, *plan[:4]))
    target = epsilon_rdp(plan, DELTA)
    ledger.open_scope("newer notes", target_epsilon=target, delta=DELTA, planned=plan[4:], inherits=["notes"])
    for number, one in enumerate(plan[4:]):
        ledger.reserve(charge(number, one, scope="newer notes" if number % 2 else "notes"))
    for name in ("notes", "newer notes"):
        assert ledger.balance(name).epsilon_rdp == target
    for name in ("notes", "newer notes"):
        with pytest.raises(BudgetError, match="'newer notes'"):
            ledger.reserve(charge(9, plan[0], scope=name))
    ledger.open_scope("apart", target_epsilon=1.0, delta=DELTA)
    assert ledger.balance("apart").events == ()


def test_a_policy_is_recorded_once(path: Path, ledger: Ledger) -> None:
    text = "Clip to 1.\nNoise: 1.2\n"
    assert ledger.record_policy(text) == Policy(text, hashlib.sha256(text.encode()).hexdigest())
    before = ledger.entries()
    ledger.record_policy(text)
    reopened(path).record_policy(text)
    assert ledger.entries() == before
    ledger.record_policy("other")
    ledger.record_policy(text)
    assert len(ledger.entries()) == len(before) + 2


# Several users of one file


def test_two_processes_see_each_other(path: Path, ledger: Ledger) -> None:
    other = reopened(path)
    a = ledger.reserve(charge(1))
    b = other.reserve(charge(2))
    assert (a.id, b.id) == (3, 4)
    ledger.start(b.id)
    assert other.reservation(b.id).state is State.STARTED
    assert ledger.entries() == other.entries()
    assert ledger.head() == other.head()


def test_threads_may_share_one_object(ledger: Ledger) -> None:
    def reserve() -> None:
        for number in range(5):
            ledger.start(ledger.reserve(charge(number)).id)

    threads = [threading.Thread(target=reserve) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ledger.balance("notes").reservations) == 20
    ledger.verify(pld=False)


def test_a_ledger_from_before_a_fork_is_not_used(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(RuntimeError, match="fork"):
        ledger.reserve(charge())


@pytest.mark.parametrize("how", ["replaced", "deleted"])
def test_a_file_swapped_under_a_running_site_is_noticed(path: Path, ledger: Ledger, how: str) -> None:
    copy = path.with_name("copy")
    shutil.copy(path, copy)
    ledger.reserve(charge())
    if how == "replaced":
        copy.replace(path)
    else:
        path.unlink()
    with pytest.raises(RolledBackError):
        ledger.reserve(charge())


def test_a_file_changed_back_under_a_running_site_is_noticed(path: Path, ledger: Ledger) -> None:
    ledger.reserve(charge())
    with tampering(path) as other:
        other.execute("DELETE FROM entries WHERE seq = 3")
    with pytest.raises(ChainError, match="changed or gone"):
        ledger.reserve(charge())


def test_a_lock_that_is_never_released_is_a_refusal(path: Path, ledger: Ledger) -> None:
    other = reopened(path, busy_seconds=0.05)
    ledger._connection.execute("BEGIN IMMEDIATE")
    with pytest.raises(LedgerStorageError, match="locked"):
        other.reserve(charge())
    ledger._connection.execute("ROLLBACK")
    other.reserve(charge())


# Falsified files


class tampering:  # noqa: N801 - reads as a statement
    """A connection that may change entries, as somebody with a text editor would."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path)

    def __enter__(self) -> sqlite3.Connection:
        self._triggers = self._connection.execute("SELECT name, sql FROM sqlite_master WHERE type='trigger'")
        self._saved = self._triggers.fetchall()
        for name, _ in self._saved:
            self._connection.execute(f"DROP TRIGGER {name}")
        return self._connection

    def __exit__(self, *_: object) -> None:
        for _, statement in self._saved:
            self._connection.execute(statement)
        self._connection.commit()
        self._connection.close()


@pytest.fixture
def written(path: Path, unsynced: None) -> Path:
    """Six entries."""
    with reopened(path) as ledger:
        ledger.open_scope("notes", target_epsilon=8.0, delta=DELTA)
        number = ledger.reserve(charge(), repeatable=True).id
        ledger.start(number)
        ledger.complete(number, DONE)
        ledger.reserve(charge(2))
    return path


FORGED = Entry.make(None, Policy.of("x"), STRANGER)

TAMPERED: dict[str, tuple[type[LedgerError], str]] = {
    "one-step-less": (
        ChainError,
        "UPDATE entries SET body = replace(body, '\"steps\":5', '\"steps\":4') WHERE seq=3",
    ),
    "unknown-kind": (
        LedgerFormatError,
        "UPDATE entries SET body = replace(body, 'reserve', 'refund') WHERE seq=3",
    ),
    "not-json": (LedgerFormatError, "UPDATE entries SET body = 'x' WHERE seq = 2"),
    "not-text": (LedgerFormatError, "UPDATE entries SET body = x'ff' WHERE seq = 2"),
    "a-number": (LedgerFormatError, "UPDATE entries SET hash = 7 WHERE seq = 2"),
    "another-hash": (ChainError, "UPDATE entries SET hash = randomblob(32) WHERE seq = 3"),
    "another-last-hash": (ChainError, "UPDATE entries SET hash = randomblob(32) WHERE seq = 6"),
    "short-hash": (LedgerFormatError, "UPDATE entries SET hash = x'00' WHERE seq = 3"),
    "another-signature": (EntrySignatureError, "UPDATE entries SET signature = randomblob(64) WHERE seq = 6"),
    "first-gone": (ChainError, "DELETE FROM entries WHERE seq = 1"),
    "middle-gone": (ChainError, "DELETE FROM entries WHERE seq = 3"),
    "all-gone": (LedgerFormatError, "DELETE FROM entries"),
    "moved": (LedgerFormatError, "UPDATE entries SET seq = 9 - seq WHERE seq IN (4, 5)"),
    "below-zero": (LedgerFormatError, "UPDATE entries SET seq = -seq WHERE seq = 3"),
    "another-table": (LedgerFormatError, "CREATE TABLE more (x)"),
    "another-column": (LedgerFormatError, "ALTER TABLE entries ADD COLUMN time"),
    "no-table": (LedgerFormatError, "DROP TABLE entries"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_file_is_not_opened(written: Path, name: str) -> None:
    error, statement = TAMPERED[name]
    if name == "moved":
        statement = (
            "UPDATE entries SET seq = 99 WHERE seq = 4; UPDATE entries SET seq = 4 WHERE seq = 5; "
            "UPDATE entries SET seq = 5 WHERE seq = 99"
        )
    with tampering(written) as connection:
        connection.executescript(statement)
        if name == "no-table":
            connection.executescript("CREATE TABLE entries (seq)")
    before = written.read_bytes()
    with pytest.raises(LedgerError) as caught:
        reopened(written)
    assert type(caught.value) is error
    assert "Nothing may be computed" in str(caught.value)
    assert written.read_bytes() == before  # nothing is repaired


def test_an_entry_by_another_key_is_not_read(written: Path) -> None:
    with reopened(written) as ledger:
        last = ledger.entries()[-1]
    forged = Entry.make(last, Policy.of("x"), STRANGER)
    with tampering(written) as connection:
        values = (forged.seq, forged.body, forged.hash, forged.signature)
        connection.execute("INSERT INTO entries VALUES (?, ?, ?, ?)", values)
    with pytest.raises(EntrySignatureError):
        reopened(written)


def test_entries_cannot_be_changed_by_mistake(written: Path) -> None:
    connection = sqlite3.connect(written)
    for statement in ("UPDATE entries SET body = ''", "DELETE FROM entries WHERE seq = 6"):
        with pytest.raises(sqlite3.IntegrityError, match="never"):
            connection.execute(statement)


def test_the_ledger_of_another_site_is_not_opened(written: Path) -> None:
    for identity, site in ((STRANGER, SITE), (IDENTITY, SITE + 1)):
        with pytest.raises(WrongSiteError):
            Ledger(written, identity, site)


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 4096, b"SQLite format 3\0", b"round 1\n" * 99], ids=range(4)
)
def test_a_file_that_is_no_ledger_is_not_opened(path: Path, content: bytes) -> None:
    """An empty one too: a new ledger gets its name only once it has a first entry."""
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(LedgerFormatError, match="restore the ledger file"):
        reopened(path)
    assert path.read_bytes() == content


def test_the_journal_of_a_lost_ledger_is_not_taken_for_a_new_one(path: Path) -> None:
    path.parent.mkdir()
    path.with_name("ledger.sqlite-journal").write_bytes(b"\0" * 512)
    with pytest.raises(RolledBackError):
        reopened(path)


def test_a_folder_where_nothing_can_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerStorageError):
        reopened(tmp_path / "file" / "ledger.sqlite")


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 53])
def test_a_byte_changed_anywhere_is_refused_or_changes_nothing(written: Path, every: int) -> None:
    rng, whole = random.Random(every), written.read_bytes()
    with reopened(written) as ledger:
        entries = ledger.entries()
    refused = 0
    for at in range(rng.randrange(every), len(whole), every):
        byte = rng.choice([b for b in range(256) if b != whole[at]])
        for leftover in written.parent.glob("ledger.sqlite?*"):
            leftover.unlink()
        written.write_bytes(whole[:at] + bytes([byte]) + whole[at + 1 :])
        try:
            with reopened(written, busy_seconds=0) as ledger:
                assert ledger.entries() == entries, at
        except LedgerError:
            refused += 1
    assert refused > 0.2 * len(whole) / every


@pytest.mark.parametrize("cut", [1, 100, 4096, 5000])
def test_a_file_cut_short_is_refused(written: Path, cut: int) -> None:
    whole = written.read_bytes()
    written.write_bytes(whole[:-cut])
    with pytest.raises(LedgerError):
        reopened(written)


# The witness


def fill(path: Path, witness: Path | None, count: int = 2) -> None:
    with reopened(path, witness=witness) as ledger:
        ledger.open_scope("notes", target_epsilon=50.0, delta=DELTA)
        for number in range(count):
            ledger.reserve(charge(number))


def test_the_witness_keeps_the_last_head(path: Path, witness: Path) -> None:
    with reopened(path, witness=witness) as ledger:
        for number in range(5):
            ledger.record_policy(f"rule {number}")
            kept = Witness(witness, ledger=path, site=SITE, public=IDENTITY.public).newest()
            assert kept == ledger.head()
    assert stat.S_IMODE(witness.stat().st_mode) == 0o600
    assert witness.stat().st_size <= 1024
    with reopened(path, witness=witness) as ledger:
        assert ledger.head() == kept


@pytest.mark.parametrize("what", ["restored", "deleted", "forked", "emptied"])
def test_a_ledger_that_forgot_is_refused_by_its_witness(path: Path, witness: Path, what: str) -> None:
    fill(path, witness)
    backup = path.read_bytes()
    fill(path, witness)
    match what:
        case "restored":
            path.write_bytes(backup)
        case "deleted":
            path.unlink()
        case "emptied":
            path.write_bytes(b"")
        case "forked":
            path.write_bytes(backup)
            with reopened(path) as ledger:
                for number in range(7):
                    ledger.reserve(charge(100 + number))
    before = path.read_bytes() if path.exists() else None
    for _ in range(2):  # and not forgotten by trying
        with pytest.raises(LedgerFormatError if what == "emptied" else RolledBackError, match="restore"):
            reopened(path, witness=witness)
    assert (path.read_bytes() if path.exists() else None) == before
    with pytest.raises(WitnessError, match="a witness at"):
        path.touch()
        adopt_witness(path, IDENTITY, SITE, witness)  # never overrules one that is there


def test_a_ledger_ahead_of_its_witness_goes_on(path: Path, witness: Path) -> None:
    """As after a crash between the commit and the witness."""
    fill(path, witness)
    older = witness.read_bytes()
    fill(path, witness)
    witness.write_bytes(older)
    with reopened(path, witness=witness) as ledger:
        head = ledger.head()
    assert Witness(witness, ledger=path, site=SITE, public=IDENTITY.public).newest() == head


def test_a_missing_witness_must_be_adopted(path: Path, witness: Path) -> None:
    fill(path, witness)
    witness.unlink()
    with pytest.raises(WitnessError, match="adopt"):
        reopened(path, witness=witness)
    assert not witness.exists()
    head = adopt_witness(path, IDENTITY, SITE, witness)
    with reopened(path, witness=witness) as ledger:
        assert ledger.head() == head
    with pytest.raises(WitnessError):
        adopt_witness(path, IDENTITY, SITE, witness)


def test_a_witness_may_be_begun_with_the_ledger_or_right_after_it(path: Path, witness: Path) -> None:
    reopened(path).close()  # a crash before the witness was made: nothing has been spent
    with reopened(path, witness=witness) as ledger:
        assert len(ledger.entries()) == 1
    with pytest.raises(WitnessError, match="no ledger"):
        adopt_witness(path.with_name("other.sqlite"), IDENTITY, SITE, witness.with_name("other"))


def test_a_witness_lost_while_running_stops_the_site(path: Path, witness: Path) -> None:
    with reopened(path, witness=witness) as ledger:
        ledger.open_scope("notes", target_epsilon=8.0, delta=DELTA)
        witness.unlink()
        with pytest.raises(LedgerStorageError):
            ledger.reserve(charge())


def test_a_witness_does_not_move_back(path: Path, witness: Path) -> None:
    with reopened(path, witness=witness) as ledger:
        older, _, _ = ledger.head(), ledger.record_policy("a"), ledger.record_policy("b")
        newer = ledger.head()
    slow = Witness(witness, ledger=path, site=SITE, public=IDENTITY.public)
    slow.advance(older)
    assert slow.newest() == newer


@pytest.mark.parametrize("slot", [0, 512])
def test_a_witness_torn_in_one_place_still_knows(path: Path, witness: Path, slot: int) -> None:
    fill(path, witness)
    whole = witness.read_bytes()
    witness.write_bytes(whole[:slot] + b"torn" + whole[slot + 4 :])
    with reopened(path, witness=witness) as ledger:
        head = ledger.head()
    assert Witness(witness, ledger=path, site=SITE, public=IDENTITY.public).newest() == head


@pytest.mark.parametrize("content", [b"\1" * 620, b"x"], ids=["noise", "a-byte"])
def test_a_witness_of_something_else_is_refused(path: Path, witness: Path, content: bytes) -> None:
    witness.parent.mkdir()
    witness.write_bytes(content)
    with pytest.raises(WitnessError, match="no head of site"):
        reopened(path, witness=witness)
    other = Ledger(path.with_name("other.sqlite"), STRANGER, SITE, witness=witness.with_name("other"))
    with pytest.raises(WitnessError, match="no head of site"):
        reopened(path, witness=witness.with_name("other"))
    other.record_policy("still mine")


def test_an_empty_witness_is_one_to_begin(path: Path, witness: Path) -> None:
    witness.parent.mkdir()
    witness.touch()
    fill(path, witness)
    fill(path, witness)


def test_a_witness_in_the_ledger_s_folder_is_refused(path: Path) -> None:
    for place in (path.with_name("witness"), path.parent / "deeper" / "witness"):
        with pytest.raises(WitnessError, match="backup would restore both"):
            reopened(path, witness=place)


# Export


def test_an_export_passes_the_audit_and_holds_nothing_else(written: Path) -> None:
    with reopened(written) as ledger:
        data, head, report = ledger.export(), ledger.head(), ledger.verify()
        entries = ledger.entries()
        check_newer(None, head, IDENTITY.public)
    assert report.head == head
    assert data == export_ledger(entries, head)
    checked = verify_export(
        data,
        public=IDENTITY.public,
        receipts=[head],
        claims=[Claim("run", report.scopes[0].epsilon_rdp, DELTA)],
    )
    assert checked.scopes == report.scopes
    keys = {key for line in data.splitlines()[1:-1] for key in json.loads(line)["body"]}
    assert keys == {
        *("seq", "prev", "kind", "site", "public_key", "version", "scope", "target_epsilon", "delta", "unit"),
        *("neighbours", "order", "budget", "inherits", "note", "id", "repeatable", "run", "round", "context"),
        *("model", "plan", "events", "output_sha256"),
    }


def test_verify_reads_the_file_and_not_the_memory(written: Path) -> None:
    with reopened(written) as ledger:
        ledger.verify(pld=False)
        with tampering(written) as connection:
            connection.execute("UPDATE entries SET signature = randomblob(64) WHERE seq = 3")
        ledger.head()  # the last entry is still what it was
        with pytest.raises(EntrySignatureError):
            ledger.verify()


def test_a_server_notices_a_restored_ledger_by_its_heads(path: Path) -> None:
    fill(path, None)
    backup = path.read_bytes()
    fill(path, None)
    with reopened(path) as ledger:
        kept = ledger.head()
    path.write_bytes(backup)
    with reopened(path) as ledger:
        with pytest.raises(HeadWentBackError):
            check_newer(kept, SignedHead.decode(ledger.head().encode()), IDENTITY.public)
        while ledger.head().seq < kept.seq:
            ledger.record_policy(f"{ledger.head().seq}")
        with pytest.raises(ForkError):
            check_newer(kept, ledger.head(), IDENTITY.public)


# Random histories on a real file


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    actions=st.lists(st.tuples(st.sampled_from(["reserve", "again", "start", "complete", "cancel", "reopen"]),
                               st.integers(0, 5)), max_size=30)
)  # fmt: skip
def test_two_users_never_pass_the_budget_and_never_forget(
    tmp_path_factory: pytest.TempPathFactory, unsynced: None, actions: list[tuple[str, int]]
) -> None:
    path = tmp_path_factory.mktemp("history") / "site" / "ledger.sqlite"
    users = [reopened(path), reopened(path)]
    users[0].open_scope("notes", target_epsilon=2.0, delta=DELTA, planned=[EVENT])
    charged: dict[int, tuple[SampledGaussianEvent, ...]] = {}
    for place, (action, pick) in enumerate(actions):
        user = users[place % 2]
        wanted = charge(pick, *[EVENT] * (1 + pick % 3))
        numbers = sorted(charged)
        try:
            match action:
                case "reserve":
                    charged[user.reserve(wanted).id] = wanted.events
                case "again":
                    charged[user.reserve(wanted, repeatable=True).id] = wanted.events
                case "start" if numbers:
                    user.start(numbers[pick % len(numbers)])
                case "complete" if numbers:
                    user.complete(numbers[pick % len(numbers)], DONE)
                case "cancel" if numbers:
                    user.cancel(numbers[pick % len(numbers)])
                    del charged[numbers[pick % len(numbers)]]
                case "reopen":
                    user.close()
                    users[place % 2] = reopened(path)
        except (BudgetError, WrongStateError):
            pass
        events = [e for number in sorted(charged) for e in charged[number]]
        for one in users:
            balance = one.balance("notes")
            assert list(balance.events) == events
            assert balance.epsilon_rdp == epsilon_rdp(events, DELTA) <= 2.0
    report = users[0].verify(pld=False)
    assert report.scopes[0].reservations == len(charged)


# Full disks, kills, races and power cuts

POWER = Path(__file__).with_name("ledger_power.py")
ROOT = Path(__file__).parent.parent.parent


def test_a_disk_that_fills_up_refuses_and_loses_nothing(path: Path, witness: Path) -> None:
    """Without the shim: a limit on the size of files. Later there is room again."""
    fill(path, witness, 3)
    with reopened(path, witness=witness) as ledger:
        before = ledger.entries()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, hard))
        try:
            with pytest.raises(LedgerStorageError, match="on disk before anything is computed"):
                while True:
                    ledger.reserve(charge(9))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        kept = ledger.entries()
        assert kept[: len(before)] == before
        ledger.reserve(charge(10))
        ledger.verify(pld=False)
    with reopened(path, witness=witness) as ledger:
        assert len(ledger.entries()) == len(kept) + 1


class Power:
    """`ledger_power.py`, started once, with the shim where there is a compiler."""

    def __init__(self, folder: Path, root: str) -> None:
        self.shimmed = shutil.which("gcc") is not None and sys.platform == "linux"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "SHIM_ROOT": f"{root}/shimmed"}
        if self.shimmed:
            library = environment["LD_PRELOAD"] = str(folder / "ledger_shim.so")
            source = POWER.with_name("ledger_shim.c")
            subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", library, source], check=True)
        self._errors = folder / "errors"
        self.process = subprocess.Popen(
            [sys.executable, str(POWER), root],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors.open("w"),
            env=environment,
            text=True,
        )

    def __call__(self, command: str, **arguments: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps({"command": command, **arguments}), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        assert answer, self._errors.read_text()
        result: dict[str, Any] = json.loads(answer)
        return result


@pytest.fixture(scope="module")
def power(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Power]:
    """In memory where there is such a folder: what counts is the order of the operations, not the disk."""
    memory = Path("/dev/shm")
    where = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="ledger", dir=where) as root:
        running = Power(tmp_path_factory.mktemp("power"), root)
        with running.process:
            yield running
            running.process.kill()


@pytest.fixture
def shimmed(power: Power) -> Power:
    if not power.shimmed:
        pytest.skip("needs gcc and LD_PRELOAD")
    return power


slow = pytest.mark.slow


@pytest.mark.parametrize("count", [pytest.param(1000, marks=slow), 12])
def test_kill_9_at_any_moment_loses_nothing_acknowledged(power: Power, count: int) -> None:
    result = power("kills", seed=count, count=count, every=0)
    assert result["lost"] == 0, result
    assert result["kills"] == count
    assert result["finished"] < count / 2


@pytest.mark.parametrize("every", [pytest.param(1, marks=slow), 23])
def test_kill_9_at_every_operation_of_every_step_loses_nothing(shimmed: Power, every: int) -> None:
    """Before and after each `every`-th change to a file, in a history with a step of each kind."""
    result = shimmed("kills", seed=every, count=0, every=every)
    assert result["lost"] == 0, result
    assert result["points"] >= 250 / every


@pytest.mark.parametrize(("processes", "target"), [pytest.param(64, 4.0, marks=slow), (8, 1.0)])
def test_a_race_for_the_last_budget_overspends_nothing(power: Power, processes: int, target: float) -> None:
    result = power("race", processes=processes, target=target)
    assert result["failed"] == 0
    assert result["granted"] == result["distinct"] == result["charged"] > processes
    assert result["rho"] <= result["budget"] < result["rho"] + result["one"]  # and wastes nothing


@pytest.mark.parametrize(
    ("histories", "actions", "count"), [pytest.param(100, 30, 10_000, marks=slow), (3, 12, 240)]
)
def test_a_power_cut_never_loses_what_was_acknowledged(
    shimmed: Power, histories: int, actions: int, count: int
) -> None:
    result = shimmed("cuts", seed=count, histories=histories, actions=actions, count=count, control=False)
    assert result["lost"] == 0, result
    assert result["cuts"] == count // histories * histories
    assert result["again"] == result["cuts"] // 4


def test_the_power_cuts_do_find_a_weaker_setting(shimmed: Power) -> None:
    """`synchronous=FULL`, without our own sync of the folder, is known to lose commits."""
    result = shimmed("cuts", seed=1, histories=1, actions=15, count=60, control=True)
    assert result["lost"] >= 3, result


EVERY_STEP = ["open", "scope", "reserve", "repeatable", "start", "complete", "cancel"]
EVERY_FAULT = ["full", "full-half-way", "once-full", "broken", "once-broken", "no-descriptors"]


@pytest.mark.parametrize(
    ("steps", "faults", "cuts"),
    [
        pytest.param(EVERY_STEP, EVERY_FAULT, 4, marks=slow),
        (["reserve"], ["full-half-way", "once-broken", "no-descriptors"], 1),
        (["open"], ["full"], 1),
    ],
    ids=["everything", "reserve", "open"],
)
def test_a_disk_that_fails_at_any_operation_loses_nothing(
    shimmed: Power, steps: list[str], faults: list[str], cuts: int
) -> None:
    """Each operation of each step fails; then the disk works again, and then the power fails."""
    result = shimmed("faults", seed=1, kinds=steps, modes=faults, cuts=cuts)
    assert result["lost"] == 0, result
    assert result["refused"] > 8 * len(steps) * len(faults)
