"""Programs are kept running, their words are kept, and none is left behind, however the supervisor ends."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.supervise import PYTHON, Service, Supervisor

ROOT = Path(__file__).resolve().parents[2]


def service(folder: Path, code: str, name: str = "one") -> Service:
    return Service(name, [sys.executable, "-c", code], folder, {"PYTHONPATH": str(ROOT)})


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] != "Z"


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for the tether


def running(supervisor: Supervisor) -> tuple[threading.Event, threading.Thread]:
    ended = threading.Event()
    thread = threading.Thread(target=lambda: supervisor.run(ended, every=0.05))
    thread.start()
    return ended, thread


def test_what_ends_is_started_again_and_what_it_says_is_kept(tmp_path: Path) -> None:
    now = [0.0]
    code = "import sys; print('said'); print('erred', file=sys.stderr); sys.exit(3)"
    supervisor = Supervisor([service(tmp_path, code)], tmp_path / "log", lambda: now[0])
    ended = threading.Event()

    def tick() -> None:
        now[0] += 0.5
        time.sleep(0.02)
        if supervisor.restarts()["one"] == 3:
            ended.set()

    supervisor.run(ended, tick, every=0.01)
    until(lambda: (tmp_path / "log/one.jsonl").read_text().count("said") >= 3)
    lines = [json.loads(line) for line in (tmp_path / "log/one.jsonl").read_text().splitlines()]
    assert {line["text"] for line in lines} == {"said", "erred"}
    assert {line["service"] for line in lines} == {"one"}


def test_restarts_become_rarer_while_it_keeps_failing(tmp_path: Path) -> None:
    now, starts, ended = [0.0], [], threading.Event()
    supervisor = Supervisor([service(tmp_path, "")], tmp_path / "log", lambda: now[0])
    seen = [-1]

    def tick() -> None:
        count = supervisor.restarts()["one"]
        if count != seen[0]:
            seen[0] = count
            starts.append(now[0])
        until(lambda: not supervisor.pids())
        now[0] += 1.0
        if now[0] > 200:
            ended.set()

    supervisor.run(ended, tick, every=0.0)
    gaps = [b - a for a, b in itertools.pairwise(starts)]
    assert gaps == sorted(gaps)
    assert gaps[0] <= 3
    assert 30 <= gaps[-1] <= 32


def test_stop_ends_what_does_not_want_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.supervise.GRACE", 1.0)
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); "
        "time.sleep(600)"
    )
    supervisor = Supervisor([service(tmp_path, stubborn)], tmp_path / "log")
    ended, thread = running(supervisor)
    until(lambda: (tmp_path / "log/one.jsonl").exists() and "up" in (tmp_path / "log/one.jsonl").read_text())
    (pid,) = supervisor.pids().values()
    ended.set()
    thread.join(20)
    assert not alive(pid)


def test_a_supervisor_that_is_killed_takes_its_programs_with_it(tmp_path: Path) -> None:
    """SIGKILL leaves it no time to stop anything: the kernel tells the programs."""
    code = f"""
import sys, threading
from pathlib import Path
from common.supervise import Service, Supervisor
child = Service("child", [sys.executable, "-c", "import time; time.sleep(600)"], Path({str(tmp_path)!r}))
supervisor = Supervisor([child], Path({str(tmp_path / "log")!r}))
supervisor.run(threading.Event(), lambda: print(*supervisor.pids().values(), flush=True), every=0.1)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert parent.stdout is not None
    child = 0
    while not child:
        child = int(parent.stdout.readline().strip() or 0)
    until(lambda: "sleep" in Path(f"/proc/{child}/cmdline").read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait(20)
    until(lambda: not alive(child))


def test_nothing_is_imported_from_the_folder_it_runs_in(tmp_path: Path) -> None:
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "__init__.py").write_text("raise SystemExit('foreign code')")
    done = subprocess.run(
        [*PYTHON, "-m", "common.tether", str(os.getpid()), sys.executable, "-c", "print('ours')"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "ours\n", done.stderr


@pytest.mark.parametrize("full", [True, False])
def test_a_log_that_cannot_be_written_stops_neither_a_service_nor_the_reading_of_what_it_says(
    full: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """More is said than a pipe holds: a service that nobody reads would hang."""
    logs = tmp_path / "log"
    logs.mkdir(mode=0o700)
    if full:
        (logs / "one.jsonl").symlink_to("/dev/full")
    else:
        (logs / "one.jsonl").mkdir()  # it cannot even be opened
    code = "print('x' * 999 + chr(10), end='', flush=True);" * 300 + "open('done', 'w'); input()"
    ended, thread = running(Supervisor([service(tmp_path, code)], logs))
    until(lambda: (tmp_path / "done").exists())
    ended.set()
    thread.join(30)
    (said,) = (r.getMessage() for r in caplog.records if "cannot be written" in r.getMessage())
    assert said.startswith(f"{logs / 'one.jsonl'} cannot be written: [Errno {28 if full else 21}]")


def test_a_machine_that_can_start_nothing_now_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start, failures = subprocess.Popen, [OSError(12, "Cannot allocate memory")] * 2

    def popen(*given: Any, **more: Any) -> Any:
        if failures:
            raise failures.pop()
        return start(*given, **more)

    monkeypatch.setattr(subprocess, "Popen", popen)
    times = itertools.count(0.0, 0.5)
    supervisor = Supervisor(
        [service(tmp_path, "import time; time.sleep(60)")], tmp_path / "log", lambda: next(times)
    )
    ended, thread = running(supervisor)
    until(lambda: bool(supervisor.pids()))
    ended.set()
    thread.join(30)
    said = [r.getMessage() for r in caplog.records if "did not start" in r.getMessage()]
    assert len(said) == 2 and "again in 2 s" in said[0] and "again in 4 s" in said[1]


def test_what_the_server_tells_waits_for_room(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from server.running import Telling

    place = tmp_path / "folder" / "serving.json"
    tell = Telling(place)
    tell({"pid": 1})
    tell({"pid": 1})  # it cannot be written: there is no such folder yet
    assert len(caplog.records) == 1
    place.parent.mkdir()
    tell({"pid": 1})
    assert json.loads(place.read_text()) == {"pid": 1}
