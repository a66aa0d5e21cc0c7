"""Sites with real ledgers, always the same to the last byte, and what an auditor holds them against."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

import confide
from client.identity import SiteFolder, create_site
from client.ledger import Ledger
from common.ledger import Cancel, Charge, Complete, Entry, Genesis, Record, Reserve, Scope, Start
from common.ledger_checks import export_ledger
from common.ledger_head import SignedHead
from common.ledger_replay import choose_order, filter_budget
from common.privacy import SampledGaussianEvent
from common.roster import Member, SignedRoster, sign_roster
from common.secagg.keys import KEY_BYTES, IdentityKey, Secret

AUTHORITY = IdentityKey(Secret(bytes([99]) * KEY_BYTES))
STRANGER = IdentityKey(Secret(bytes([98]) * KEY_BYTES))
DELTA = 1e-5
EVENT = SampledGaussianEvent(0.1, 2.0, 5, 0.5, 10)
DONE = "ab" * 32
NAMES = {1: "north", 2: "south", 3: "west"}


def identity(site: int) -> IdentityKey:
    return IdentityKey(Secret(bytes([site]) * KEY_BYTES))


def roster(*sites: int) -> SignedRoster:
    members = [Member(site, NAMES[site], identity(site).public) for site in sites or NAMES]
    return sign_roster("Heart study", 1, members, (), AUTHORITY)


def charge(number: int, *, run: str = "alpha", scope: str = "notes", steps: int = 5) -> Charge:
    event = SampledGaussianEvent(0.1, 2.0, steps, 0.5, 10)
    return Charge(scope, run, number, f"{number:08x}", "model", "plan", (event,))


def genesis(site: int) -> Genesis:
    return Genesis(site, identity(site).public.hex())


def scope(name: str, epsilon: float = 8.0) -> Scope:
    order = choose_order(epsilon, DELTA)
    return Scope(name, epsilon, DELTA, order, filter_budget(epsilon, DELTA, order))


def open_ledger(folder: Path, site: int) -> Ledger:
    """Of a folder as `confide client init` makes it; the witness lies beside it."""
    place = SiteFolder(folder)
    if not place.card.exists():
        create_site(place, NAMES[site], lambda size: bytes([site]) * size, None)
    return Ledger(place.ledger, identity(site), site, witness=place.witness)


def live(ledger: Ledger, rounds: Iterable[int] = range(1, 4)) -> None:
    """Two data sources, two runs, a policy; one charge given back, one repeatable, one cut off by a crash."""
    ledger.open_scope("notes", target_epsilon=8.0, delta=DELTA)
    ledger.open_scope("images", target_epsilon=4.0, delta=DELTA)
    ledger.record_policy("Rounds of at most 5 steps.")
    for number in rounds:
        done = ledger.reserve(charge(number))
        ledger.start(done.id)
        ledger.complete(done.id, DONE)
    ledger.cancel(ledger.reserve(charge(50)).id)
    ledger.start(ledger.reserve(charge(51, scope="images"), repeatable=True).id)
    ledger.reserve(charge(52, run="beta"))


def head(entry: Entry, site: int, key: IdentityKey | None = None) -> SignedHead:
    return SignedHead.sign(site, entry, key or identity(site))


def export(entries: Sequence[Entry], site: int, key: IdentityKey | None = None) -> bytes:
    return export_ledger(entries, head(entries[-1], site, key))


def resigned(records: Iterable[Record], key: IdentityKey) -> list[Entry]:
    """A chain of anything that `key` can sign, sensible or not."""
    entries: list[Entry] = []
    for record in records:
        entries.append(Entry.make(entries[-1] if entries else None, record, key))
    return entries


def renumbered(entries: Iterable[Entry], by: int) -> list[Record]:
    """The end of a chain, for one that is `by` entries shorter: a reservation's id is its entry's number."""
    found: list[Record] = []
    for entry in entries:
        record = entry.record
        if isinstance(record, Reserve | Start | Complete | Cancel):
            record = dataclasses.replace(record, id=record.id - by)
        found.append(record)
    return found


def write_receipts(path: Path, heads: Iterable[SignedHead]) -> Path:
    lines = [json.dumps({"site": h.site, "seq": h.seq, "head": h.encode().hex()}) for h in heads]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def audit(*arguments: str | Path) -> tuple[int, dict[str, Any]]:
    """`confide audit …` in this process: its exit code and its JSON; an error is raised."""
    result = CliRunner().invoke(confide.app, ["audit", *map(str, arguments), "--json"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, json.loads(result.stdout)


def printed(*arguments: str | Path, columns: int = 100) -> tuple[int, str]:
    """What people see, without colours."""
    env = {"COLUMNS": str(columns), "NO_COLOR": "1", "TERM": "dumb"}
    result = CliRunner().invoke(confide.app, [*map(str, arguments)], env=env)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, "\n".join(line.rstrip() for line in result.stdout.splitlines())


def failed(found: dict[str, Any]) -> list[tuple[int, str]]:
    """(check, error) of all that failed, of sites and of the run."""
    checks = [check for site in found["sites"] for check in site["checks"]] + found["run"]
    return [(check["number"], check["error"]) for check in checks if check["outcome"] == "failed"]


def outcomes(site: dict[str, Any]) -> dict[int, str]:
    return {check["number"]: check["outcome"] for check in site["checks"]}


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Everything in `folder`: name → mode, time of change, content."""
    found = {}
    for path in sorted([folder, *folder.rglob("*")]):
        status = os.lstat(path)
        content = path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(folder))] = (status.st_mode, status.st_mtime_ns, content)
    return found
