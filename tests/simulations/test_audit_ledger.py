"""`confide audit ledger`: each of the nine checks fails as it should, and nothing is passed silently."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from client.identity import SiteFolder
from client.ledger import Ledger
from common import ledger_checks
from common.errors import CheckpointError, ConfigError
from common.identity import fingerprint
from common.ledger import Entry, Policy, Reserve, Scope, Start
from common.ledger_head import SignedHead
from common.ledger_replay import Balance
from common.privacy import epsilon_rdp
from common.roster import OtherAuthorityError, RosterSignatureError
from common.secagg.keys import IdentityKey
from simulations import audit_sources
from tests import audit_world as world
from tests.audit_world import (
    DELTA,
    EVENT,
    STRANGER,
    audit,
    export,
    failed,
    head,
    identity,
    outcomes,
    resigned,
)
from tests.e2e.command import ROOT

SITE = 3


@pytest.fixture(autouse=True)
def without_opacus(monkeypatch: pytest.MonkeyPatch) -> None:
    """It brings seconds of imports; a test of its own has the real one."""
    monkeypatch.setattr(ledger_checks, "_opacus_step", lambda *_: None)


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> tuple[Entry, ...]:
    with world.open_ledger(tmp_path_factory.mktemp("whole") / "west", SITE) as ledger:
        world.live(ledger)
        return ledger.entries()


@pytest.fixture
def put(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(data: bytes, name: str = "export.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


@pytest.fixture
def roster(tmp_path: Path) -> Path:
    path = tmp_path / "roster.json"
    path.write_bytes(world.roster().encode())
    return path


AUTHORITY = ("--authority", fingerprint(world.AUTHORITY.public))


def everything(tmp_path: Path, roster: Path, entries: Sequence[Entry]) -> list[str | Path]:
    """The options with which no check is skipped."""
    receipts = world.write_receipts(tmp_path / "receipts.jsonl", [head(e, SITE) for e in entries[4:9]])
    cost = epsilon_rdp([EVENT] * 3, DELTA)
    return ["--roster", roster, *AUTHORITY, "--receipts", receipts, "--claim", f"alpha:{cost + 0.01}:{DELTA}"]


# A ledger that is as it should be


def test_an_intact_export_passes_every_check(
    entries: tuple[Entry, ...], put: Callable[..., Path], tmp_path: Path, roster: Path
) -> None:
    path = put(export(entries, SITE))
    code, found = audit("ledger", path, *everything(tmp_path, roster, entries))
    assert (code, failed(found)) == (0, [])
    (site,) = found["sites"]
    assert set(outcomes(site).values()) == {"passed"}
    assert (site["site"], site["name"], site["entries"]) == (3, "west", len(entries))
    assert site["charges"] == {"completed": 3, "cancelled": 1, "started": 1, "reserved": 1}
    notes, images = site["scopes"]
    # The cancelled charge costs nothing, the one of the other run does.
    assert notes["epsilon_rdp"] == pytest.approx(epsilon_rdp([EVENT] * 4, DELTA))
    assert images["epsilon_rdp"] == pytest.approx(epsilon_rdp([EVENT], DELTA))
    assert notes["epsilon_pld"] < notes["epsilon_rdp"] < notes["target_epsilon"]
    # All of it, and the roster lists two more sites: with --strict that is not everything.
    assert found["absent"] == [1, 2]
    assert audit("ledger", path, *everything(tmp_path, roster, entries), "--strict")[0] == 20


def test_strict_passes_where_nothing_was_left_out(
    entries: tuple[Entry, ...], put: Callable[..., Path], tmp_path: Path
) -> None:
    alone = tmp_path / "alone.json"
    alone.write_bytes(world.roster(SITE).encode())
    path = put(export(entries, SITE))
    assert audit("ledger", path, *everything(tmp_path, alone, entries), "--strict")[0] == 0


def test_what_was_not_checked_is_said(entries: tuple[Entry, ...], put: Callable[..., Path]) -> None:
    path = put(export(entries, SITE))
    code, found = audit("ledger", path, "--no-pld")
    assert code == 0
    assert outcomes(found["sites"][0]) == {
        **{n: "passed" for n in (1, 2, 4, 5, 7)},
        3: "partly",
        6: "partly",
        8: "skipped",
        9: "skipped",
    }
    assert audit("ledger", path, "--no-pld", "--strict")[0] == 23
    code, text = world.printed("audit", "ledger", path, "--no-pld")
    assert "skipped   no receipts given" in text
    assert "as far as it was checked" in text and "no roster given" in text


# The nine failures

Forge = Callable[[tuple[Entry, ...], pytest.MonkeyPatch], bytes]


def records(entries: Sequence[Entry]) -> list[Any]:
    return [entry.record for entry in entries]


def first(entries: Sequence[Entry], kind: type) -> int:
    return next(i for i, entry in enumerate(entries) if isinstance(entry.record, kind))


def cut_in_a_line(entries: tuple[Entry, ...], _: pytest.MonkeyPatch) -> bytes:
    return export(entries, SITE)[:-40]


def an_entry_edited(entries: tuple[Entry, ...], _: pytest.MonkeyPatch) -> bytes:
    return export(entries, SITE).replace(b'"steps":5', b'"steps":1', 1)


def an_entry_removed(entries: tuple[Entry, ...], _: pytest.MonkeyPatch) -> bytes:
    return export([*entries[:5], *entries[6:]], SITE)


def two_entries_swapped(entries: tuple[Entry, ...], _: pytest.MonkeyPatch) -> bytes:
    return export([*entries[:5], entries[6], entries[5], *entries[7:]], SITE)


def signed_by_a_stranger(entries: tuple[Entry, ...], _: pytest.MonkeyPatch) -> bytes:
    return export([*resigned(records(entries), STRANGER)], SITE)


def under_another_key(entries: tuple[Entry, ...], _: pytest.MonkeyPatch) -> bytes:
    genesis = dataclasses.replace(entries[0].record, public_key=STRANGER.public.hex())  # type: ignore[type-var]
    return export(resigned([genesis, *records(entries[1:])], STRANGER), SITE, STRANGER)


def of_no_site(entries: tuple[Entry, ...], _: pytest.MonkeyPatch) -> bytes:
    genesis = dataclasses.replace(entries[0].record, site=7)  # type: ignore[type-var]
    forged = resigned([genesis, *records(entries[1:])], identity(SITE))
    return export(forged, 7, identity(SITE))


def started_twice(entries: tuple[Entry, ...], _: pytest.MonkeyPatch) -> bytes:
    number = first(entries, Start)
    return export(resigned([*records(entries), entries[number].record], identity(SITE)), SITE)


def an_unopened_source(entries: tuple[Entry, ...], _: pytest.MonkeyPatch) -> bytes:
    number = first(entries, Scope)
    return export(resigned(records([*entries[:number], *entries[number + 1 :]]), identity(SITE)), SITE)


def over_budget(entries: tuple[Entry, ...], _: pytest.MonkeyPatch) -> bytes:
    more = Reserve(len(entries) + 1, world.charge(60, steps=100_000))
    return export(resigned([*records(entries), more], identity(SITE)), SITE)


def a_budget_of_its_own(entries: tuple[Entry, ...], _: pytest.MonkeyPatch) -> bytes:
    number = first(entries, Scope)
    wider = dataclasses.replace(entries[number].record, budget=50.0)  # type: ignore[type-var]
    changed = [*records(entries[:number]), wider, *records(entries[number + 1 :])]
    return export(resigned(changed, identity(SITE)), SITE)


def accountants_differ(entries: tuple[Entry, ...], monkeypatch: pytest.MonkeyPatch) -> bytes:
    monkeypatch.setattr(Balance, "epsilon_pld", 7.0)
    monkeypatch.setattr(Balance, "epsilon_pld_on", lambda *_: 6.9)
    return export(entries, SITE)


def an_older_head(entries: tuple[Entry, ...], _: pytest.MonkeyPatch) -> bytes:
    return ledger_checks.export_ledger(entries, head(entries[-2], SITE))


def a_head_of_a_stranger(entries: tuple[Entry, ...], _: pytest.MonkeyPatch) -> bytes:
    return export(entries, SITE, STRANGER)


def cut_at_the_end(entries: tuple[Entry, ...], _: pytest.MonkeyPatch) -> bytes:
    return export(entries[:6], SITE)


def a_fork(entries: tuple[Entry, ...], _: pytest.MonkeyPatch) -> bytes:
    return export(forked(entries), SITE)


def forked(entries: Sequence[Entry]) -> list[Entry]:
    """Without the second charge and all that followed, and gone on with as if it had never been."""
    others = [Policy.of(f"Other rules {number}") for number in range(8)]
    return resigned([*records(entries[:7]), *others], identity(SITE))


FAILURES: list[tuple[Forge, int, str]] = [
    (cut_in_a_line, 1, "LedgerFormatError"),
    (an_entry_edited, 2, "ChainError"),
    (an_entry_removed, 2, "ChainError"),
    (two_entries_swapped, 2, "ChainError"),
    (signed_by_a_stranger, 3, "EntrySignatureError"),
    (under_another_key, 3, "NotInRosterError"),
    (of_no_site, 3, "NotInRosterError"),
    (started_twice, 4, "WrongStateError"),
    (an_unopened_source, 4, "UnknownScopeError"),
    (over_budget, 5, "FilterError"),
    (a_budget_of_its_own, 5, "FilterError"),
    (accountants_differ, 6, "AccountantsDisagreeError"),
    (an_older_head, 7, "HeadError"),
    (a_head_of_a_stranger, 7, "HeadSignatureError"),
    (cut_at_the_end, 8, "HeadWentBackError"),
    (a_fork, 8, "ForkError"),
]


@pytest.mark.parametrize(("forge", "number", "error"), FAILURES, ids=[f.__name__ for f, _, _ in FAILURES])
def test_each_forgery_fails_its_check(
    forge: Forge,
    number: int,
    error: str,
    entries: tuple[Entry, ...],
    put: Callable[..., Path],
    tmp_path: Path,
    roster: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = put(forge(entries, monkeypatch))
    options = everything(tmp_path, roster, entries)
    code, found = audit("ledger", path, *options)
    assert code == 20 + number
    assert failed(found) == [(number, error)]
    ends = outcomes(found["sites"][0])
    assert all(ends[before] == "passed" for before in range(1, number))
    # 7, 8 and 9 do not need each other; before them nothing is looked at behind a failure.
    later = "passed" if number >= 7 else "not reached"
    assert all(ends[after] == later for after in range(number + 1, 10))
    code, text = world.printed("audit", "ledger", path, *options)
    assert code == 20 + number
    assert f"check {number}, {error} (site" in text
    assert re.search(rf"^ +{number} .* FAILED", text, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        (f"alpha:0.1:{DELTA}", "for run 'alpha' where 0.1 is claimed"),
        (f"gamma:8:{DELTA}", "no charge of run 'gamma'"),
    ],
)
def test_a_claim_that_does_not_hold_fails_check_9(
    claim: str, said: str, entries: tuple[Entry, ...], put: Callable[..., Path]
) -> None:
    code, found = audit("ledger", put(export(entries, SITE)), "--claim", claim, "--no-pld")
    assert (code, failed(found)) == (29, [(9, "ClaimError")])
    assert said in found["sites"][0]["checks"][-1]["note"]


def test_of_several_failures_the_first_number_is_the_exit_code(
    entries: tuple[Entry, ...], put: Callable[..., Path], tmp_path: Path
) -> None:
    receipts = world.write_receipts(tmp_path / "r.jsonl", [head(forked(entries)[9], SITE)])
    path = put(ledger_checks.export_ledger(entries, head(entries[-2], SITE)))
    options = ("--receipts", receipts, "--claim", f"alpha:0.1:{DELTA}", "--no-pld")
    code, found = audit("ledger", path, *options)
    assert (code, failed(found)) == (27, [(7, "HeadError"), (8, "ForkError"), (9, "ClaimError")])


@pytest.mark.parametrize(
    ("rate", "noise", "steps", "end"),
    [
        (1.0, 1e150, 2**53, "partly"),  # a step that costs nothing, composed one by one
        (1e-9, 0.5, 2**53, "partly"),
        (1.0, 1e150, 1, "passed"),
        (1e-300, 1e-5, 2**53, "failed"),
        (1.0, 1e-150, 1, "failed"),
    ],
)
def test_a_ledger_made_to_stall_an_auditor_does_not(
    rate: float, noise: float, steps: int, end: str, put: Callable[..., Path]
) -> None:
    event = dataclasses.replace(EVENT, sample_rate=rate, noise_multiplier=noise, steps=steps)
    charge = dataclasses.replace(world.charge(1), events=(event,))
    chain = resigned([world.genesis(SITE), world.scope("notes"), Reserve(3, charge)], identity(SITE))
    code, found = audit("ledger", put(export(chain, SITE)))
    assert (code, outcomes(found["sites"][0])[6 if end != "failed" else 5]) == (25 * (end == "failed"), end)


def test_many_small_steps_are_no_disagreement(put: Callable[..., Path]) -> None:
    """Loss distributions round up at each step: on the usual grid they give 0.060 where Rényi gives 0.052."""
    event = dataclasses.replace(EVENT, sample_rate=0.0005, noise_multiplier=10.0, steps=100_000)
    charge = dataclasses.replace(world.charge(1), events=(event,))
    chain = resigned([world.genesis(SITE), world.scope("notes"), Reserve(3, charge)], identity(SITE))
    code, found = audit("ledger", put(export(chain, SITE)))
    assert code == 0
    (scope,) = found["sites"][0]["scopes"]
    assert 0.04 < scope["epsilon_pld"] < scope["epsilon_rdp"] < 0.052


# Several ledgers


def test_ledgers_of_several_sites_are_told_apart(
    entries: tuple[Entry, ...], put: Callable[..., Path], tmp_path: Path, roster: Path
) -> None:
    with world.open_ledger(tmp_path / "north", 1) as ledger:
        world.live(ledger)
        good = put(ledger.export(), "north.jsonl")
    bad = put(export(forked(entries), SITE), "west.jsonl")
    receipts = world.write_receipts(tmp_path / "r.jsonl", [head(entries[9], SITE)])
    code, found = audit(
        "ledger", good, bad, "--roster", roster, *AUTHORITY, "--receipts", receipts, "--no-pld"
    )
    assert code == 28
    north, west = found["sites"]
    assert outcomes(north)[8] == "skipped"
    assert outcomes(west)[8] == "failed"
    assert found["absent"] == [2]
    text = world.printed("audit", "ledger", good, bad, "--roster", roster, "--no-pld")[1]
    assert "no ledger given of: 2" in text


def test_an_older_export_of_one_site_is_the_beginning_of_a_newer_one(
    entries: tuple[Entry, ...], put: Callable[..., Path]
) -> None:
    newer, older = put(export(entries, SITE), "new.jsonl"), put(export(entries[:8], SITE), "old.jsonl")
    assert audit("ledger", older, newer, "--no-pld")[0] == 0
    other = put(export(forked(entries)[:9], SITE), "fork.jsonl")
    code, found = audit("ledger", newer, other, "--no-pld")
    assert (code, failed(found)) == (28, [(8, "ForkError")])
    # What somebody else has signed is no evidence against the site.
    strange = put(export(resigned(records(entries[:8]), STRANGER), SITE, STRANGER), "strange.jsonl")
    assert [error for _, error in failed(audit("ledger", newer, strange, "--no-pld")[1])] == [
        "EntrySignatureError"
    ]


# A site's own file


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "place" / "west"
    with world.open_ledger(folder, SITE) as ledger:
        world.live(ledger)
    return folder


def test_a_site_s_folder_is_read_and_not_touched(site: Path) -> None:
    before = world.snapshot(site.parent)
    # A folder's witness has the signed head; a file alone has none.
    for path, ends in (
        (site, {7: "passed", 8: "partly"}),
        (site / "ledger.sqlite", {7: "skipped", 8: "skipped"}),
    ):
        code, found = audit("ledger", path, "--no-pld")
        assert code == 0
        assert outcomes(found["sites"][0]).items() >= ends.items()
        assert found["sites"][0]["entries"] == 18
    assert world.snapshot(site.parent) == before


def test_a_witness_that_has_seen_more_or_is_damaged_fails_check_8(site: Path) -> None:
    shutil.copy(site / "ledger.sqlite", site.parent / "backup")
    with world.open_ledger(site, SITE) as ledger:
        ledger.reserve(world.charge(60))
    shutil.copy(site.parent / "backup", site / "ledger.sqlite")
    code, found = audit("ledger", site, "--no-pld")
    assert (code, failed(found)) == (28, [(8, "HeadWentBackError")])
    SiteFolder(site).witness.write_bytes(b"damaged")
    code, found = audit("ledger", site, "--no-pld")
    assert (code, failed(found)) == (28, [(8, "WitnessError")])


def test_a_site_that_goes_on_between_two_readings_has_not_gone_back(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, once = audit_sources.read_entries, [True]

    def overtaken(path: Path) -> list[Entry]:
        found = read(path)
        if once:
            once.clear()
            with world.open_ledger(site, SITE) as ledger:
                ledger.reserve(world.charge(60))
        return found

    monkeypatch.setattr(audit_sources, "read_entries", overtaken)
    code, found = audit("ledger", site, "--no-pld")
    assert (code, found["sites"][0]["entries"], outcomes(found["sites"][0])[7]) == (0, 19, "passed")


def test_receipts_can_hold_the_signed_head_of_a_file(site: Path, tmp_path: Path) -> None:
    with world.open_ledger(site, SITE) as ledger:
        newest = ledger.head()
    receipts = world.write_receipts(tmp_path / "r.jsonl", [newest])
    code, found = audit("ledger", site / "ledger.sqlite", "--receipts", receipts, "--no-pld")
    assert (code, outcomes(found["sites"][0])[7]) == (0, "passed")


def test_a_ledger_can_be_audited_while_its_site_goes_on(site: Path) -> None:
    with world.open_ledger(site, SITE) as ledger:
        for number in range(60, 64):
            ledger.reserve(world.charge(number))
            assert audit("ledger", site, "--no-pld")[1]["sites"][0]["entries"] == len(ledger.entries())


def test_what_a_killed_process_left_is_rolled_back_in_a_copy(site: Path) -> None:
    """As SQLite leaves it: pages of an unfinished transaction in the file, the journal beside it."""
    path, away = site / "ledger.sqlite", site.parent / "away"
    away.mkdir()
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA cache_size=1")
        db.execute("BEGIN IMMEDIATE")
        row = db.execute("SELECT body, hash, signature FROM entries").fetchone()
        db.executemany("INSERT INTO entries (body, hash, signature) VALUES (?, ?, ?)", [row] * 500)
        for name in ("ledger.sqlite", "ledger.sqlite-journal"):
            shutil.copy(site / name, away / name)
    assert (away / "ledger.sqlite-journal").stat().st_size > 0
    before = world.snapshot(away)
    code, found = audit("ledger", away, "--no-pld")
    assert (code, found["sites"][0]["entries"]) == (0, 18)
    assert world.snapshot(away) == before


@pytest.mark.parametrize("spoil", ["wal", "trigger", "cut", "text", "empty"])
def test_a_file_that_is_no_ledger_fails_check_1(site: Path, spoil: str) -> None:
    path = site / "ledger.sqlite"
    match spoil:
        case "wal" | "trigger":
            with closing(sqlite3.connect(path)) as db:
                db.execute("PRAGMA journal_mode=WAL" if spoil == "wal" else "DROP TRIGGER no_delete")
                db.commit()
        case "cut":
            path.write_bytes(path.read_bytes()[:5000])
        case "text":
            path.write_text("entries")
        case "empty":
            path.write_bytes(b"")
    before = world.snapshot(site)
    code, found = audit("ledger", site)
    assert (code, failed(found)) == (21, [(1, "LedgerFormatError")])
    assert world.snapshot(site) == before


# What cannot be used at all


def test_inputs_that_are_not_what_they_should_be(
    entries: tuple[Entry, ...], put: Callable[..., Path], tmp_path: Path, roster: Path
) -> None:
    path, empty = put(export(entries, SITE)), tmp_path / "empty"
    empty.mkdir()
    for arguments in (
        [],
        [tmp_path / "nothing"],
        [empty],
        [path, "--run", empty],
        [path, "--receipts", tmp_path / "nothing"],
        [path, *AUTHORITY],
        [path, "--roster", roster, "--authority", "no fingerprint"],
        [path, "--claim", "alpha"],
        [path, "--claim", "alpha:nan:1e-5"],
        [path, "--claim", "alpha:1:1"],
    ):
        with pytest.raises(ConfigError):
            audit("ledger", *arguments)
    with pytest.raises(OtherAuthorityError):
        audit("ledger", path, "--roster", roster, "--authority", STRANGER.public.hex())
    roster.write_bytes(roster.read_bytes().replace(b"north", b"nerth"))
    with pytest.raises(RosterSignatureError):
        audit("ledger", path, "--roster", roster)
    with pytest.raises(CheckpointError):
        audit("ledger", path, "--receipts", put(b"no receipt\n", "r.jsonl"))


def test_a_ledger_that_cannot_be_read_is_reported_and_the_others_audited(
    entries: tuple[Entry, ...], put: Callable[..., Path], site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.ledger_reader._BUSY_SECONDS", 0.1)
    with closing(sqlite3.connect(site / "ledger.sqlite", isolation_level=None)) as db:
        db.execute("BEGIN EXCLUSIVE")
        code, found = audit("ledger", site, put(export(entries, SITE)), "--no-pld")
    assert (code, failed(found)) == (20, [(0, "LedgerStorageError")])
    assert set(outcomes(found["sites"][0]).values()) == {"failed", "not reached"}
    assert outcomes(found["sites"][1])[5] == "passed"


# The page


def test_the_page_is_self_contained_and_says_what_was_found(
    entries: tuple[Entry, ...], put: Callable[..., Path], tmp_path: Path, roster: Path
) -> None:
    page, path = tmp_path / "audit.html", put(export(entries, SITE))
    options = everything(tmp_path, roster, entries)
    code, found = audit("ledger", path, *options, "--report", page)
    assert (code, found["report"]) == (0, str(page))
    first = page.read_bytes()
    text = first.decode()
    assert "The ledgers hold" in text and "Site 3 west" in text and "all nine checks passed" in text
    assert "confide audit mechanism" in text
    assert "<script" not in text and "http" not in text.replace("http-equiv", "")
    audit("ledger", path, *options, "--report", page)
    assert page.read_bytes() == first
    assert audit("ledger", put(export(forked(entries), SITE)), *options, "--report", page)[0] == 28
    text = page.read_text()
    assert "The ledgers do not hold" in text and "ForkError" in text and 'class="card bad"' in text


def test_names_in_a_ledger_are_text_on_the_page_and_in_the_terminal(tmp_path: Path) -> None:
    """Neither HTML nor markup, nor codes that would let a ledger write over the verdict."""
    codes = "\x1b[2K\x1b[1A\u202e\x9b\r"
    name = "<script>alert(1)</script> [bold red]x[/] & 'y'"
    with world.open_ledger(tmp_path / "north", 1) as ledger:
        ledger.open_scope(name + codes, target_epsilon=8.0, delta=DELTA)
        ledger.reserve(world.charge(1, scope=name + codes, run="<b>[/]"))
        path = tmp_path / "e.jsonl"
        path.write_bytes(ledger.export())
    claim = f"<b>[/]:8:{DELTA}"
    code, text = world.printed(
        "audit", "ledger", path, "--report", tmp_path / "a.html", "--claim", claim, columns=200
    )
    assert code == 0
    assert name + r"\x1b[2K\x1b[1A\u202e\x9b\r" in text and "<b>[/]" in text
    page = (tmp_path / "a.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page and "<b>" not in page
    assert not set(codes[:1] + codes[-3:]) & set(text + page)


# A run's folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, bert_folder: Path, data_file: Path) -> Path:
    """A run of three sites and two rounds."""
    from tests.e2e.command import invoke

    folder = tmp_path_factory.mktemp("run")
    (folder / "confide.toml").write_text(
        f"""
[run]
name = "tiny"
rounds = 2
threads = 1
[model]
name = "{bert_folder}"
head = "mean"
max_length = 32
[adapter]
rank = 2
[data]
train = "{data_file}"
[sites]
count = 3
[privacy]
sample_rate = 0.3
delta = 1e-3
[training]
local_steps = 2
"""
    )
    invoke("simulate", folder / "confide.toml", "--runs", folder / "runs", "--json")
    return folder / "runs" / "tiny-1"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def audit_run(run: Path) -> tuple[int, list[tuple[int, str]], dict[str, Any]]:
    code, found = audit("ledger", "--run", run, "--no-pld")
    return code, failed(found), found


def test_a_simulated_run_passes_and_is_not_touched(finished: Path) -> None:
    before = world.snapshot(finished)
    code, found = audit("ledger", "--run", finished)
    assert (code, failed(found)) == (0, [])
    summary = json.loads((finished / "summary.json").read_bytes())
    assert [site["site"] for site in found["sites"]] == [1, 2, 3]
    for site in found["sites"]:
        # All but that nobody has said whose signature on the roster counts.
        assert outcomes(site) == {**dict.fromkeys(range(1, 10), "passed"), 3: "partly"}
        assert summary["run_id"] in site["checks"][-1]["note"]
        (scope,) = site["scopes"]
        assert scope["epsilon_rdp"] == summary["epsilon_by_site"][str(site["site"])]
        assert scope["epsilon_pld"] <= summary["epsilon_pld_max"]
    assert [check["outcome"] for check in found["run"]] == ["passed"]
    assert world.snapshot(finished) == before
    # The folder alone, and with the authority confirmed.
    authority = json.loads((finished / "roster.json").read_bytes())["authority"]
    assert audit("ledger", finished, "--authority", authority, "--strict")[0] == 0


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads(path.read_bytes())
    change(data)
    path.write_text(json.dumps(data))


def test_a_lower_epsilon_in_the_summary_fails(run: Path) -> None:
    def lower(summary: dict[str, Any]) -> None:
        summary["epsilon_rdp_max"] = 1.0
        summary["epsilon_by_site"] = dict.fromkeys(summary["epsilon_by_site"], 1.0)

    edit(run / "summary.json", lower)
    code, errors, found = audit_run(run)
    # Each ledger says so, and so does the model card.
    assert (code, set(errors), len(errors)) == (29, {(9, "ClaimError")}, 4)
    assert "where 1.0 is claimed" in found["sites"][0]["checks"][-1]["note"]


@pytest.mark.parametrize("file", ["adapter/README.md", "adapter/confide.json"])
def test_an_edited_model_card_fails(run: Path, file: str) -> None:
    path = run / file
    text = path.read_text()
    epsilon = re.findall(r"\((\d+\.\d+), 0\.001\)-diff", text)[0]
    path.write_text(text.replace(f"({epsilon}, ", "(1.000, "))
    assert audit_run(run)[:2] == (29, [(9, "ClaimError")])


def test_a_second_claim_in_the_model_card_fails(run: Path) -> None:
    path = run / "adapter" / "README.md"
    path.write_text(path.read_text() + "\nBy our analysis it is (0.5, 1e-9)-differentially private.\n")
    assert audit_run(run)[:2] == (29, [(9, "ClaimError")])


def test_all_texts_lowered_alike_fail_by_the_ledgers(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_bytes())
    old = f"({re.findall(r'[(]([0-9.]+), ', summary['privacy_statement'])[0]}, "
    for name in ("summary.json", "adapter/README.md", "adapter/confide.json"):
        (run / name).write_text((run / name).read_text().replace(old, "(1.000, "))

    def lower(data: dict[str, Any]) -> None:
        data["epsilon_rdp_max"] = 1.0
        data["epsilon_by_site"] = dict.fromkeys(data["epsilon_by_site"], 1.0)

    edit(run / "summary.json", lower)
    code, errors, found = audit_run(run)
    assert (code, errors) == (29, [(9, "ClaimError")] * 3)
    assert [check["outcome"] for check in found["run"]] == ["passed"]


@pytest.mark.parametrize(
    ("key", "value", "sites"),
    [
        ("epsilon_pld_max", 0.5, 3),
        ("run_id", "another", 3),
        ("epsilon_by_site", {"1": 0.5}, 3),
        ("delta", 2, 0),
    ],
)
def test_other_numbers_of_the_summary_are_checked(run: Path, key: str, value: object, sites: int) -> None:
    edit(run / "summary.json", lambda summary: summary.update({key: value}))
    code, found = audit("ledger", "--run", run)
    assert code == 29
    assert sum(outcomes(site)[9] == "failed" for site in found["sites"]) == sites


def rewrite(path: Path, change: Callable[[sqlite3.Connection], object]) -> None:
    """As somebody would who knows how the file is made: its triggers are there again afterwards."""
    with closing(sqlite3.connect(path)) as db:
        triggers = db.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            db.execute(f"DROP TRIGGER {name}")
        change(db)
        for _, statement in triggers:
            db.execute(statement)
        db.commit()


def test_dropped_entries_fail_by_the_receipts(run: Path) -> None:
    path = run / "sites" / "0002" / "ledger.sqlite"
    rewrite(path, lambda db: db.execute("DELETE FROM entries WHERE seq > 5"))
    code, errors, found = audit_run(run)
    assert (code, errors[0]) == (28, (8, "HeadWentBackError"))
    assert outcomes(found["sites"][1])[7] == "skipped"
    assert outcomes(found["sites"][0])[8] == outcomes(found["sites"][2])[8] == "passed"


def fresh(run: Path, key: IdentityKey) -> None:
    path = run / "sites" / "0002" / "ledger.sqlite"
    path.unlink()
    with Ledger(path, key, 2) as ledger:
        ledger.open_scope("records", target_epsilon=8.0, delta=1e-3)


def own_key(run: Path, site: int) -> IdentityKey:
    from client.identity import load_identity

    return load_identity(run / "sites" / f"{site:04d}" / "identity.pem", None)


def test_a_fresh_ledger_fails_by_the_receipts_or_by_its_key(run: Path) -> None:
    fresh(run, own_key(run, 2))
    code, errors, _ = audit_run(run)
    assert (code, errors[0]) == (28, (8, "HeadWentBackError"))
    fresh(run, STRANGER)
    code, errors, _ = audit_run(run)
    assert (code, errors) == (23, [(3, "NotInRosterError")])


def test_a_ledger_that_is_gone_or_of_another_site_fails(run: Path) -> None:
    one, two = (run / "sites" / name / "ledger.sqlite" for name in ("0001", "0002"))
    shutil.copy(one, two)
    assert audit_run(run)[:2] == (23, [(3, "NotInRosterError")])
    two.unlink()
    assert audit_run(run)[:2] == (28, [(8, "HeadWentBackError"), (9, "ClaimError")])


def test_fewer_receipts_pass_and_are_counted(run: Path) -> None:
    def receipts() -> list[str]:
        return [site["checks"][7]["note"].split()[0] for site in audit_run(run)[2]["sites"]]

    before = receipts()
    path = run / "receipts.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    site = json.loads(lines[-1])["site"]
    path.write_text("".join(lines[:-1]))
    after = receipts()
    assert int(after[site - 1]) == int(before[site - 1]) - 1
    assert [a for i, a in enumerate(after, 1) if i != site] == [
        b for i, b in enumerate(before, 1) if i != site
    ]
    path.unlink()
    code, errors, found = audit_run(run)
    assert (code, errors) == (0, [])
    # The witnesses have the newest heads, but they lie in the same folder.
    assert {outcomes(site)[8] for site in found["sites"]} == {"partly"}


def test_a_receipt_of_a_fork_fails(run: Path) -> None:
    path = run / "receipts.jsonl"
    newest = [json.loads(line) for line in path.read_text().splitlines() if '"site": 2,' in line][-1]
    other = dataclasses.replace(SignedHead.decode(bytes.fromhex(newest["head"])), hash=bytes(32))
    signature = own_key(run, 2).sign(other._message())
    line = {
        "site": 2,
        "seq": other.seq,
        "head": dataclasses.replace(other, signature=signature).encode().hex(),
    }
    path.write_text(path.read_text() + json.dumps(line) + "\n")
    assert audit_run(run)[:2] == (28, [(8, "ForkError")])


def test_a_run_without_privacy_has_nothing_to_audit(run: Path) -> None:
    for path in run.glob("sites/*/ledger.sqlite"):
        path.unlink()
    for name in ("receipts.jsonl", "adapter/README.md", "adapter/confide.json"):
        (run / name).unlink()
    edit(run / "summary.json", lambda s: s.update(private=False, privacy_statement="NOT PRIVATE: for study."))
    with pytest.raises(ConfigError, match="nothing to audit"):
        audit("ledger", "--run", run)


FORBIDDEN = (
    "torch", "flwr", "transformers", "peft", "opacus", "datasets", "gguf", "grpc", "matplotlib", "pyarrow",
    "ray", "safetensors", "tensorboard", "tokenizers",
)  # fmt: skip


def test_an_auditor_s_machine_needs_no_model_library(finished: Path, tmp_path: Path) -> None:
    """The command in a process in which none of them can be imported."""
    script = tmp_path / "auditor.py"
    script.write_text(
        f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {FORBIDDEN!r}:
            raise ModuleNotFoundError(f"{{name}} is not on this machine", name=name)
sys.meta_path.insert(0, Blocker())
sys.path.insert(0, {str(ROOT)!r})
import confide
sys.argv = ["confide", "audit", "ledger", "--run", {str(finished)!r}, "--json"]
confide.main()
"""
    )
    before = world.snapshot(finished)
    done = subprocess.run(
        [sys.executable, "-I", str(script)], cwd=tmp_path, capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["passed"] and len(found["sites"]) == 3
    notes = [check["note"] for check in found["sites"][0]["checks"] if check["number"] == 6]
    assert notes == ["by Rényi divergences and loss distributions"]
    assert world.snapshot(finished) == before
