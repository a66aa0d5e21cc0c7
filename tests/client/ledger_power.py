"""Kills, full disks and power cuts, on demand: a process of its own, so that it can be preloaded and forked.

`python ledger_power.py ROOT` takes commands, one JSON object a line, and answers each with one. With the
shim preloaded every change to the files below $SHIM_ROOT is logged with its bytes. `Disk` replays such a
log and says what a disk may hold when the power fails: what was synced, and of the rest whatever it likes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import client.ledger
from client import ledger_file
from client.ledger import Ledger
from client.ledger_witness import Witness
from common.errors import BudgetError
from common.ledger import Charge
from common.ledger_errors import LedgerStorageError, WrongStateError
from common.privacy import SampledGaussianEvent, epsilon_rdp
from common.secagg.keys import IdentityKey, Secret

IDENTITY = IdentityKey(Secret(bytes(range(32))))
SITE = 3
EVENT = SampledGaussianEvent(0.1, 2.0, 1, 0.5, 10)
PASS, FAIL, SHORT, KILL_BEFORE, KILL_AFTER = range(5)
SECTOR = 512


def open_ledger(root: Path) -> Ledger:
    return Ledger(root / "site" / "ledger.sqlite", IDENTITY, SITE, witness=root / "away" / "witness")


def fresh(root: Path) -> Path:
    shutil.rmtree(root, ignore_errors=True)
    (root / "site").mkdir(parents=True)
    (root / "away").mkdir()
    return root


def charge(number: int, scope: str = "notes") -> Charge:
    return Charge(scope, "run", number, f"{number:08x}", "model", "plan", (EVENT,))


def output(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


Ack = tuple[int, str]


def last(ledger: Ledger) -> Ack:
    entry = ledger.entries()[-1]
    return entry.seq, entry.hash.hex()


def missing(root: Path, acks: set[Ack]) -> str:
    """Open what is left, as after any crash. What was acknowledged and is not there, or what went wrong."""
    path, watched = root / "site" / "ledger.sqlite", root / "away" / "witness"
    try:
        kept = Witness(watched, ledger=path, site=SITE, public=IDENTITY.public).newest()
        if acks and (kept is None or kept.seq < max(acks)[0]):
            return f"the witness knows {kept} of {len(acks)}"
        with open_ledger(root) as ledger:
            found = {(entry.seq, entry.hash.hex()) for entry in ledger.entries()}
            if lost := acks - found:
                return f"lost {sorted(lost)[:3]} of {len(acks)}"
            ledger.open_scope("after", target_epsilon=8.0, delta=1e-5)
            ledger.reserve(charge(0, "after"))
            return ""
    except Exception as error:
        return f"{type(error).__name__}: {error}"


# The shim


class Shim:
    """The preloaded library, or nothing."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        self.present = hasattr(self._library, "shim_arm")

    def arm(self, number: int, what: int, error: int = 0, sticky: bool = False) -> None:
        if self.present:
            self._library.shim_arm(ctypes.c_long(number), what, error, int(sticky))

    def disarm(self) -> int:
        """Operations since it was armed."""
        count = int(self._library.shim_count()) if self.present else 0
        self.arm(0, PASS)
        return count

    def log(self, path: Path | None) -> None:
        if self._library.shim_log(None if path is None else str(path).encode()) < 0 and path is not None:
            raise OSError(f"cannot log to {path}")


# The disk


@dataclass
class Inode:
    durable: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)  # (at, data) or (length, None)

    def sync(self) -> None:
        self.durable = self.now()
        self.pending = []

    def now(self) -> bytearray:
        content = bytearray(self.durable)
        for at, data in self.pending:
            _write(content, at, data)
        return content

    def cut(self, rng: random.Random) -> bytes:
        content = bytearray(self.durable)
        for place, kept in enumerate(_survivors(len(self.pending), rng)):
            at, data = self.pending[place]
            if data is None:
                if kept:
                    _write(content, at, None)
            elif not kept:
                if rng.random() < 0.3:  # the new length is there, the data is not
                    content.extend(bytes(max(0, at + len(data) - len(content))))
            elif rng.random() < 0.3:
                for start in range(0, len(data), SECTOR):
                    if rng.random() < 0.5:
                        _write(content, at + start, data[start : start + SECTOR])
            else:
                _write(content, at, data)
        return bytes(content)


def _write(content: bytearray, at: int, data: bytes | None) -> None:
    if data is None:
        del content[at:]
        data = b""
    content.extend(bytes(max(0, at - len(content))))
    content[at : at + len(data)] = data


def _survivors(count: int, rng: random.Random) -> list[bool]:
    """Nothing, all, the first few, or any of the operations that were not synced."""
    match rng.choice(("none", "all", "first", "any")):
        case "none":
            return [False] * count
        case "all":
            return [True] * count
        case "first":
            whole = rng.randint(0, count)
            return [place < whole for place in range(count)]
        case _:
            return [rng.random() < 0.5 for _ in range(count)]


class Disk:
    """Replays a log of the shim. Names are durable once their folder is synced, bytes once their file is."""

    def __init__(self, files: dict[str, bytes] | None = None) -> None:
        self.acks: set[Ack] = set()
        self._inodes = {name: Inode(bytearray(data)) for name, data in (files or {}).items()}
        self._durable = dict(self._inodes)
        self._pending: dict[str, list[tuple[str | None, str | None, Inode]]] = {}  # (removed, added, inode)
        self._open: dict[int, Inode | str] = {}

    def apply(self, operation: str, a: int, b: int, path: str, other: str, data: bytes) -> None:
        match operation:
            case "O" if b == 2:
                self._open[a] = path
            case "O":
                if b == 1:
                    self._change(None, path, Inode())
                self._open[a] = self._inodes[path]
                if b == 3:
                    self._inodes[path].pending.append((0, None))
            case "C":
                self._open.pop(a, None)  # it may have been opened before the log began
            case "W":
                file = self._file(a)
                if file is self._inodes.get(self._acks_name()):
                    self.acks |= {_ack(line) for line in data.splitlines()}
                else:
                    file.pending.append((b, data))
            case "T":
                self._file(a).pending.append((b, None))
            case "S":
                match self._open[a]:
                    case Inode() as file:
                        file.sync()
                    case folder:
                        for removed, added, inode in self._pending.pop(folder, []):
                            _rename(self._durable, removed, added, inode)
            case "X":
                # After a sync that failed the kernel takes the pages for clean: a later sync writes none.
                match self._open[a]:
                    case Inode() as file:
                        file.pending = []
                    case _:
                        pass  # a folder's changes are in the journal of the file system
            case "U":
                self._change(path, None, self._inodes[path])
            case "R":
                self._change(path, other, self._inodes[path])
            case "L":
                self._change(None, other, self._inodes[path])
            case _:
                raise ValueError(f"unknown operation {operation!r}")

    def cut(self, rng: random.Random) -> dict[str, bytes]:
        """What may be found on the disk if the power fails now."""
        names = dict(self._durable)
        for changes in self._pending.values():
            for change, kept in zip(changes, _survivors(len(changes), rng), strict=True):
                if kept:
                    _rename(names, *change)
        contents = {id(inode): inode.cut(rng) for inode in names.values()}
        return {name: contents[id(inode)] for name, inode in names.items()}

    def _acks_name(self) -> str:
        return next((name for name in self._inodes if name.endswith("/acks")), "")

    def _file(self, descriptor: int) -> Inode:
        match self._open[descriptor]:
            case Inode() as file:
                return file
            case folder:
                raise ValueError(f"a write to the folder {folder}")

    def _change(self, removed: str | None, added: str | None, inode: Inode) -> None:
        _rename(self._inodes, removed, added, inode)
        folder = str(Path(removed or added or "").parent)
        self._pending.setdefault(folder, []).append((removed, added, inode))


def _rename(names: dict[str, Inode], removed: str | None, added: str | None, inode: Inode) -> None:
    if removed is not None:
        names.pop(removed, None)
    if added is not None:
        names[added] = inode


def _ack(line: bytes) -> Ack:
    seq, digest = line.split()
    return int(seq), digest.decode()


Operation = tuple[str, int, int, str, str, bytes]


def read_log(path: Path, start: int = 0) -> tuple[list[Operation], int]:
    data = path.read_bytes()
    operations: list[Operation] = []
    while start < len(data):
        end = data.index(b"\n", start)
        name, a, b, length, path_, other = data[start:end].decode().split(" ")
        start = end + 1 + int(length)
        operations.append((name, int(a), int(b), path_, other, data[end + 1 : start]))
    return operations, start


def put_files(files: dict[str, bytes], source: Path, target: Path) -> Path:
    fresh(target)
    for name, data in files.items():
        place = target / Path(name).relative_to(source)
        if place.name != "acks":
            place.write_bytes(data)
            place.chmod(0o600)
    return target


# What a site does


def live(root: Path, actions: int, rng: random.Random, say: Callable[[Ack], None]) -> None:
    """Open, and then `actions` entries of every kind. Says what was acknowledged, each time."""
    with open_ledger(root) as ledger:
        say(last(ledger))
        ledger.open_scope("notes", target_epsilon=500.0, delta=1e-5)
        say(last(ledger))
        reserved: list[int] = []
        started: list[int] = []
        for number in range(actions):
            match rng.choice(("reserve", "reserve", "start", "complete", "cancel", "policy")):
                case "start" if reserved:
                    started.append(ledger.start(reserved.pop()).id)
                case "complete" if started:
                    ledger.complete(started.pop(), output(number))
                case "cancel" if reserved:
                    ledger.cancel(reserved.pop())
                case "policy":
                    ledger.record_policy(f"rule {number}")
                case _:
                    reserved.append(ledger.reserve(charge(number)).id)
            say(last(ledger))


@contextlib.contextmanager
def ack_file(root: Path) -> Iterator[Callable[[Ack], None]]:
    """Acknowledgements go through the shim too, so the log has them in their place."""
    descriptor = os.open(root / "acks", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        yield lambda ack: _send(descriptor, ack)
    finally:
        os.close(descriptor)


def _send(descriptor: int, ack: Ack) -> None:
    os.write(descriptor, f"{ack[0]} {ack[1]}\n".encode())


# Commands


@contextlib.contextmanager
def weakened() -> Iterator[None]:
    with (
        mock.patch.object(ledger_file, "_SYNCHRONOUS", "FULL"),
        mock.patch.object(client.ledger, "sync_folder", lambda _: None),
    ):
        yield


def cuts(root: Path, seed: int, histories: int, actions: int, count: int, control: bool) -> dict[str, object]:
    """Power cuts at random places of random histories; every fourth is cut again while it recovers.

    control: SQLite as it comes, `synchronous=FULL` and no sync of ours, which is known to lose commits.
    """
    rng, shim = random.Random(seed), Shim()
    failures: list[str] = []
    done = again = operations = 0
    for _ in range(histories):
        place = fresh(root / "shimmed")
        shim.log(root / "log")
        with ack_file(place) as say, weakened() if control else contextlib.nullcontext():
            live(place, actions, rng, say)
        shim.log(None)
        log, _ = read_log(root / "log")
        operations += len(log)
        disk, wanted = Disk(), sorted(rng.randrange(1, len(log) + 1) for _ in range(count // histories))
        for place_in_log, operation in enumerate(log, start=1):
            disk.apply(*operation)
            while wanted and wanted[0] == place_in_log:
                wanted.pop(0)
                done += 1
                files = disk.cut(rng)
                if done % 4 == 0:
                    again += 1
                    found = _cut_again(root, files, place, disk.acks, rng, shim)
                else:
                    found = missing(put_files(files, place, root / "found"), disk.acks)
                if found:
                    failures.append(f"after operation {place_in_log} of {len(log)}: {found}")
    return {
        "cuts": done,
        "again": again,
        "operations": operations,
        "lost": len(failures),
        "first": failures[:3],
    }


def _cut_again(
    root: Path, files: dict[str, bytes], source: Path, acks: set[Ack], rng: random.Random, shim: Shim
) -> str:
    """The power fails a second time, somewhere in opening what the first time left."""
    place = put_files(files, source, root / "shimmed-again")
    kept = {str(place / Path(n).relative_to(source)): d for n, d in files.items() if not n.endswith("/acks")}
    shim.log(root / "log-again")
    found = missing(place, acks)
    shim.log(None)
    if found:
        return found
    log, _ = read_log(root / "log-again")
    disk = Disk(kept)
    for operation in log[: rng.randrange(len(log) + 1)]:
        disk.apply(*operation)
    return missing(put_files(disk.cut(rng), place, root / "found"), acks)


def faults(root: Path, seed: int, kinds: list[str], modes: list[str], cuts: int) -> dict[str, object]:
    """Every operation of every step fails once, in every mode; then there is space again, and then a cut."""
    ways = {
        "full": (FAIL, errno.ENOSPC, True),
        "full-half-way": (SHORT, errno.ENOSPC, True),
        "once-full": (FAIL, errno.ENOSPC, False),
        "broken": (FAIL, errno.EIO, True),
        "once-broken": (FAIL, errno.EIO, False),
        "no-descriptors": (FAIL, errno.EMFILE, False),
    }
    rng, shim = random.Random(seed), Shim()
    failures: list[str] = []
    refused = passed = cut = 0
    for kind in kinds:
        for mode in modes:
            what, error, sticky = ways[mode]
            place = fresh(root / "shimmed")
            shim.log(root / "log")
            disk, read, number, acks = Disk(), 0, 0, set[Ack]()
            ledger = None if kind == "open" else open_ledger(place)
            if ledger is not None:
                ledger.open_scope("notes", target_epsilon=500.0, delta=1e-5)
            while True:
                number += 1
                if kind == "open":
                    place = fresh(root / "shimmed")
                    shim.log(root / "log")
                    disk, read, acks = Disk(), 0, set()
                ready = _prepare(ledger, kind, number)
                shim.arm(number, what, error, sticky)
                try:
                    ledger = _step(ledger, kind, ready, number, place)
                    happened = True
                except LedgerStorageError:
                    happened = False
                except Exception as other:
                    happened = False
                    failures.append(f"{kind}, {mode}, {number}: {type(other).__name__}: {other}")
                reached = shim.disarm() >= number
                refused += not happened
                passed += happened
                if happened and ledger is not None:
                    acks.add(last(ledger))
                try:  # there is space again
                    if not happened:
                        with contextlib.suppress(WrongStateError):
                            ledger = _step(ledger, kind, ready, number, place)
                    if ledger is None:
                        raise RuntimeError("no ledger")
                    acks.add(last(ledger))
                    for _ in range(cuts):
                        operations, read = read_log(root / "log", read)
                        for operation in operations:
                            disk.apply(*operation)
                        cut += 1
                        found = missing(put_files(disk.cut(rng), place, root / "found"), acks)
                        if found:
                            failures.append(f"{kind}, {mode}, {number}, cut: {found}")
                    ledger.record_policy(f"{number}")
                    acks.add(last(ledger))
                except Exception as other:
                    failures.append(f"{kind}, {mode}, {number}, after: {type(other).__name__}: {other}")
                if kind == "open" and ledger is not None:
                    ledger.close()
                    ledger = None
                if not reached:
                    break
            shim.log(None)
    return {"refused": refused, "passed": passed, "cuts": cut, "lost": len(failures), "first": failures[:3]}


def _prepare(ledger: Ledger | None, kind: str, number: int) -> int:
    if ledger is None or kind not in ("start", "complete", "cancel"):
        return 0
    reservation = ledger.reserve(charge(number)).id
    if kind == "complete":
        ledger.start(reservation)
    return reservation


def _step(ledger: Ledger | None, kind: str, ready: int, number: int, root: Path) -> Ledger:
    if ledger is None:
        return open_ledger(root)
    match kind:
        case "scope":
            ledger.open_scope(f"scope {number}", target_epsilon=8.0, delta=1e-5)
        case "reserve":
            ledger.reserve(charge(number))
        case "repeatable":
            ledger.reserve(charge(number), repeatable=True)
        case "start":
            ledger.start(ready)
        case "complete":
            ledger.complete(ready, output(number))
        case "cancel":
            ledger.cancel(ready)
        case _:
            raise ValueError(kind)
    return ledger


def kills(root: Path, seed: int, count: int, every: int) -> dict[str, object]:
    """`kill -9` before and after every `every`-th operation (0: none), and `count` at random moments."""
    rng, shim = random.Random(seed), Shim()
    failures: list[str] = []
    done = finished = points = 0
    if every:
        number, alive = 1 + seed % every, True
        while alive:
            for what in (KILL_BEFORE, KILL_AFTER):
                points += 1
                found, killed = _kill(fresh(root / "shimmed"), 1, 14, (number, what), 0.0, shim)
                alive = killed
                if found:
                    failures.append(f"operation {number}: {found}")
            number += every
    for _ in range(count):
        place = root / "killed"
        if done % 20 == 0:
            fresh(place)
        done += 1
        found, killed = _kill(place, seed + done, 200, None, rng.uniform(0, 0.03), shim)
        finished += not killed
        if found:
            failures.append(f"kill {done}: {found}")
    return {
        "kills": done,
        "points": points,
        "finished": finished,
        "lost": len(failures),
        "first": failures[:3],
    }


def _kill(
    root: Path, seed: int, actions: int, point: tuple[int, int] | None, after: float, shim: Shim
) -> tuple[str, bool]:
    """What was lost, and whether the child died of a kill."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            if point is not None:
                shim.arm(*point)
            live(root, actions, random.Random(seed), lambda ack: _send(writer, ack))
        finally:
            os._exit(0)
    os.close(writer)
    if point is None:
        os.read(reader, 1)  # it has begun; one digit of the first number is gone, so that line is dropped
        time.sleep(after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    with os.fdopen(reader, "rb") as pipe:
        lines = pipe.read().splitlines(keepends=True)
    _, status = os.waitpid(child, 0)
    whole = [line for line in lines[point is None :] if line.endswith(b"\n")]
    return missing(root, {_ack(line) for line in whole}), os.WIFSIGNALED(status)


def race(root: Path, processes: int, target: float) -> dict[str, object]:
    """All open a ledger that is not there yet, and reserve at once until each is refused."""
    place = fresh(root / "race")
    children, gate = [], os.pipe()
    reader, writer = os.pipe()
    for number in range(processes):
        child = os.fork()
        if child == 0:
            try:
                os.read(gate[0], 1)
                with open_ledger(place) as ledger:
                    ledger.open_scope("notes", target_epsilon=target, delta=1e-5, planned=[EVENT])
                    with contextlib.suppress(BudgetError):
                        for attempt in range(10_000):
                            reservation = ledger.reserve(charge(number * 10_000 + attempt))
                            _send(writer, (reservation.id, "00"))
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    os.write(gate[1], bytes(processes))
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        granted = [_ack(line)[0] for line in pipe.read().splitlines()]
    failed = sum(os.waitpid(child, 0)[1] != 0 for child in children)
    with open_ledger(place) as ledger:
        balance = ledger.balance("notes")
    return {
        "granted": len(granted),
        "distinct": len(set(granted)),
        "charged": len(balance.reservations),
        "failed": failed,
        "rho": balance.rho,
        "budget": balance.scope.budget,
        "one": balance.rho / max(1, len(balance.reservations)),
    }


COMMANDS: dict[str, Callable[..., dict[str, object]]] = {
    "cuts": cuts,
    "faults": faults,
    "kills": kills,
    "race": race,
}


def main() -> None:
    root = Path(sys.argv[1])
    epsilon_rdp([EVENT], 1e-5)  # computed once here, not in every child
    for line in sys.stdin:
        arguments = json.loads(line)
        print(json.dumps(COMMANDS[arguments.pop("command")](root, **arguments)), flush=True)


if __name__ == "__main__":
    main()
