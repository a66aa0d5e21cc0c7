"""The folder of a run, and its events: append-only, one JSON line a round and site."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from common.config import RunConfig, load_config
from common.errors import CheckpointError
from common.files import write_atomically

ASKED = "asked"


@dataclass(frozen=True)
class SiteRound:
    """One site's part in one round. `events` is the most that it was charged; empty where that is nothing.

    `status`: "ok" where its update is in the sum; `ASKED` where a server that died has left no more, so that
    the site may have been charged. Otherwise a site's refusal code, "deadline", "malformed"
    or what the transport said; behind the name of the exchange ("mask:deadline") where it had trained.
    """

    round: int
    site: int
    status: str
    bytes_up: int
    bytes_down: int
    events: list[dict[str, Any]]


@dataclass(frozen=True)
class RoundEvent:
    """What the server knows after a round. `accuracy` and `loss` are of the public evaluation set.

    `trained`: sites that said "ready"; `answered`: sites in the sum. `metrics`: of sites' own records,
    noised and summed, where the federation has them on.
    """

    round: int
    part: str
    asked: int
    trained: int
    answered: int
    counted: bool
    accuracy: float | None
    loss: float | None
    evaluated_records: int
    seconds: float
    metrics: dict[str, Any] | None


@dataclass(frozen=True)
class Attempt:
    """A session of secure aggregation is about to be opened; sites never answer a number twice."""

    round: int
    attempt: int
    cohort: list[int]


@dataclass(frozen=True)
class SessionEnd:
    """How it ended: the survivors, or in which exchange it fell short, and what sites did wrong.

    `blames`: (site, exchange, fault, owner of the share or None).
    """

    round: int
    attempt: int
    outcome: str  # "sum", or why there is none
    survivors: list[int]
    blames: list[list[Any]]


Event = SiteRound | RoundEvent | Attempt | SessionEnd
_KINDS: dict[str, type[Event]] = {
    "site": SiteRound,
    "round": RoundEvent,
    "attempt": Attempt,
    "session": SessionEnd,
}
_COLUMNS = (
    "round",
    "part",
    "asked",
    "trained",
    "answered",
    "counted",
    "accuracy",
    "loss",
    "evaluated_records",
    "seconds",
)


@dataclass(frozen=True)
class RunFolder:
    """Names of what lies in `runs/<name>/`."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.csv"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def secret(self) -> Path:
        return self.path / "secret.key"

    @property
    def receipts(self) -> Path:
        """Heads of the sites' ledgers, as they came with their messages."""
        return self.path / "receipts.jsonl"

    @property
    def roster(self) -> Path:
        return self.path / "roster.json"

    def witness(self, site_id: int, of: str) -> Path:
        """Outside the site's folder, so that a restored backup of that is noticed."""
        return self.path / "witnesses" / f"{site_id:04d}.{of}"

    def site(self, site_id: int) -> Path:
        return self.path / "sites" / f"{site_id:04d}"

    def ledger(self, site_id: int) -> Path:
        return self.site(site_id) / "ledger.sqlite"

    @contextmanager
    def locked(self, patience: float = 0.0) -> Iterator[None]:
        """Inside: no other process works on this run. patience: seconds for another one to end.

        Raises:
            CheckpointError: another one does.
        """
        end = time.monotonic() + patience
        with (self.path / ".lock").open("w") as file:
            while not _flock(file):
                if time.monotonic() >= end:
                    raise CheckpointError(f"{self.path} is being worked on by another process: wait for it")
                time.sleep(0.2)
            yield

    def is_worked_on(self) -> bool:
        """Whether a process is inside `locked` now. Looking holds the lock for a moment itself."""
        if not (self.path / ".lock").exists():
            return False
        with (self.path / ".lock").open("r") as file:
            return not _flock(file)

    def load_config(self) -> RunConfig:
        """The resolved configuration of this run."""
        if not self.config.is_file():
            raise CheckpointError(f"{self.path} is not the folder of a run: it has no config.toml")
        return load_config(self.config)

    def append(self, event: Event) -> None:
        """Add one line. A line is either whole or, after a crash, cut off by `read_events`."""
        kind = next(name for name, cls in _KINDS.items() if cls is type(event))
        line = json.dumps({"kind": kind, **asdict(event)}, separators=(",", ":"))
        with self.events.open("ab") as file:
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def read_events(self) -> Iterator[Event]:
        """All whole events in order; of events for one round (and site) the last, since a round that was
        cut off by a crash is run again."""
        if not self.events.exists():
            return
        data = self.events.read_bytes()
        found: dict[tuple[str, int, int, int], Event] = {}
        for line in data[: data.rfind(b"\n") + 1].splitlines():
            try:
                fields = json.loads(line)
                kind = fields.pop("kind")
                key = (kind, fields["round"], fields.get("site", 0), fields.get("attempt", 0))
                event = _KINDS[kind](**fields)
            except (ValueError, TypeError, KeyError, AttributeError):
                raise CheckpointError(
                    f"{self.events} has a line that is no event: restore the file"
                ) from None
            found[key] = event
        yield from found.values()

    def rounds(self) -> list[RoundEvent]:
        return sorted((e for e in self.read_events() if isinstance(e, RoundEvent)), key=lambda e: e.round)

    def site_rounds(self) -> list[SiteRound]:
        return sorted(
            (e for e in self.read_events() if isinstance(e, SiteRound)), key=lambda e: (e.round, e.site)
        )

    def sessions(self) -> list[SessionEnd]:
        return [e for e in self.read_events() if isinstance(e, SessionEnd)]

    def next_attempt(self, round_number: int) -> int:
        """A number that no session of this round has had, not even one that was cut off by a crash."""
        used = [e.attempt for e in self.read_events() if isinstance(e, Attempt) and e.round == round_number]
        return max(used, default=0) + 1

    def repair(self) -> None:
        """Cut a torn last line off, so that the next event starts on a line of its own."""
        if self.events.exists():
            data = self.events.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if len(whole) != len(data):
                write_atomically(self.events, whole)

    def write_metrics(self) -> None:
        """`metrics.csv`, a view of the events: one row a round."""
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=_COLUMNS, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(asdict(event) for event in self.rounds())
        write_atomically(self.metrics, text.getvalue().encode())


def _flock(file: IO[str]) -> bool:
    """Whether the lock could be taken. It is given back when the file is closed, or the process ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
