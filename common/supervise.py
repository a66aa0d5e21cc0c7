"""Keep a few programs running: started in order, restarted with backoff, stopped together."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import IO

from common.identity import make_folder

FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0  # seconds before a restart; doubled while it keeps failing
STEADY = 60.0  # seconds of running after which an end counts as the first
GRACE = 15.0  # seconds between TERM and KILL
_LOG_BYTES, _LOGS = 10 * 1024 * 1024, 3
_LONGEST_LINE = 4000
PYTHON = (sys.executable, "-P")  # -P: nothing is imported from the folder that it is started in
_log = logging.getLogger("confide.supervise")


@dataclass(frozen=True)
class Service:
    """A program and its arguments. environment: beside that of this process.

    folder: in which it runs. One of ours: Python programs import what lies in their folder first.
    """

    name: str
    command: Sequence[str]
    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class _Running:
    service: Service
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    wait: float = FIRST_WAIT
    due: float = 0.0
    restarts: int = -1


class Supervisor:
    """`run` keeps the services going until it is told to stop. logs: a folder, a file for each service."""

    def __init__(
        self, services: Sequence[Service], logs: Path, clock: Callable[[], float] = time.monotonic
    ) -> None:
        make_folder(logs)
        self._logs = logs
        self._clock = clock
        self._all = [_Running(service) for service in services]

    def pids(self) -> dict[str, int]:
        """Of what runs now."""
        return {r.service.name: r.process.pid for r in self._all if r.process and r.process.poll() is None}

    def restarts(self) -> dict[str, int]:
        return {r.service.name: max(r.restarts, 0) for r in self._all}

    def run(
        self,
        ended: threading.Event,
        tick: Callable[[], None] = lambda: None,
        last: Callable[[], None] = lambda: None,
        every: float = 1.0,
    ) -> None:
        """Until `ended` is set. `tick` is called every so many seconds, `last` before the services are
        stopped; neither may raise anything."""
        try:
            while not ended.is_set():
                for running in self._all:
                    self._look_after(running)
                tick()
                ended.wait(every)
        finally:
            last()
            self.stop()

    def _look_after(self, running: _Running) -> None:
        now = self._clock()
        if running.process is not None:
            if (code := running.process.poll()) is None:
                return
            running.wait = (
                FIRST_WAIT if now - running.started >= STEADY else min(running.wait * 2, LONGEST_WAIT)
            )
            running.due, running.process = now + running.wait, None
            _log.warning("%s ended (%s); again in %.0f s", running.service.name, code, running.wait)
        if now < running.due:
            return
        running.started, running.restarts = now, running.restarts + 1
        try:
            running.process = self._start(running.service)
        except OSError as error:  # no memory, no more processes
            running.wait = min(running.wait * 2, LONGEST_WAIT)
            running.due = now + running.wait
            _log.error("%s did not start (%s); again in %.0f s", running.service.name, error, running.wait)
            return
        _log.info("%s started (process %d)", running.service.name, running.process.pid)

    def _start(self, service: Service) -> subprocess.Popen[bytes]:
        tether = [*PYTHON, "-m", "common.tether", str(os.getpid())]
        process = subprocess.Popen(
            [*tether, *service.command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **service.environment},
            cwd=service.folder,
            start_new_session=True,  # Ctrl-C in the terminal is ours to pass on
        )
        writer = threading.Thread(target=_keep, args=(process.stdout, self._logs, service.name), daemon=True)
        writer.start()
        return process

    def stop(self) -> None:
        """TERM to all, in the opposite order; KILL to those that do not end in time."""
        for running in reversed(self._all):
            if running.process is not None and running.process.poll() is None:
                running.process.terminate()
        end = self._clock() + GRACE
        for running in reversed(self._all):
            if running.process is None:
                continue
            try:
                running.process.wait(max(0.0, end - self._clock()))
            except subprocess.TimeoutExpired:
                _log.warning("%s did not end in %.0f s: killed", running.service.name, GRACE)
                running.process.kill()
                running.process.wait()
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(running.process.pid, signal.SIGTERM)  # what it has left behind


class _LogFile(RotatingFileHandler):
    """A file that is kept small. Where it cannot be written lines are lost, which is said once: nobody must
    stop reading what a service says, or the service would wait for it."""

    told = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not self.told:
            _log.error("%s cannot be written: %s", self.baseFilename, sys.exc_info()[1])
        self.told = True


def _keep(stream: IO[bytes], logs: Path, name: str) -> None:
    """Each line that a service says, as one JSON object."""
    handler = _LogFile(logs / f"{name}.jsonl", maxBytes=_LOG_BYTES, backupCount=_LOGS, delay=True)
    for line in stream:
        text = line.decode("utf-8", "replace").rstrip()[:_LONGEST_LINE]
        if text:
            entry = {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "service": name,
                "text": text,
            }
            handler.emit(logging.makeLogRecord({"msg": json.dumps(entry, ensure_ascii=False)}))
    with contextlib.suppress(OSError):
        handler.close()


def stop_on_signals() -> threading.Event:
    """An event that Ctrl-C and TERM set."""
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    return ended


def installed(program: str) -> str:
    """The program of this very installation, which stands beside its Python."""
    return str(Path(sys.executable).parent / program)


def flower_environment(home: Path) -> dict[str, str]:
    """What Flower's programs need to be told: a home of ours, no telemetry, and this installation first."""
    beside = str(Path(sys.executable).parent)
    return {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",
        "PATH": os.pathsep.join([beside, os.environ.get("PATH", "")]),
    }
