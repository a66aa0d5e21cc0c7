"""Federations of processes for tests: a tiny model, few records, real TLS, keys, ledgers and commands."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from common.datasets import read_table
from common.ledger import Complete, Reserve, Start
from common.targets import columns_of
from server.receipts import read_receipts
from server.record import RunFolder
from tests.conftest import LABELS
from tests.e2e.command import ROOT

ROLES = ("flower-superlink", "flower-superexec", "flwr-serverapp", "client.node", "execute")
CONFIG = """
[run]
name = "tiny"
rounds = {rounds}
threads = 1
device = "cpu"
checkpoints = 10

[task]
labels = {labels}

[model]
name = {model}
max_length = 32

[adapter]
rank = 2

[data]
test = "public.jsonl"

[privacy]
sample_rate = 0.2
nominal_records = {nominal}
delta = 1e-3
noise_multiplier = 2.0

[training]
local_steps = 2

[aggregation]
min_cohort = 3
deadline_seconds = {deadline}
attempts = 2

[server]
deadline_seconds = {deadline}
give_up_after = 0
"""


def local_cluster() -> ModuleType:
    """deploy/local_cluster.py, which is a script and no package."""
    spec = importlib.util.spec_from_file_location("local_cluster", ROOT / "deploy" / "local_cluster.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["local_cluster"] = module
    spec.loader.exec_module(module)
    return module


@contextmanager
def tiny_cluster(
    folder: Path,
    model: Path,
    data: Path,
    *,
    sites: int = 3,
    rounds: int = 2,
    deadline: float = 60.0,
    chat: str = "",
) -> Iterator[tuple[Any, str]]:
    """A founded federation with an approved job; nothing runs yet. All that was started is stopped.

    chat: the columns of [data] that make the records conversations.
    """
    os.environ["PYTHONPATH"] = str(ROOT)
    module = local_cluster()
    cluster = module.Cluster(folder, sites, module.Network.best(f"ct{os.getpid() % 10000}"))
    try:
        cluster.found()
        divide(cluster, data)
        job = cluster.submit(write_job(cluster, model, rounds, deadline, chat))
        cluster.approve(job)
        yield cluster, job
    finally:
        cluster.stop_all()


def write_job(cluster: Any, model: Path, rounds: int, deadline: float, chat: str = "") -> Path:
    config: Path = cluster.folder / "job.toml"
    labels, name = json.dumps(list(LABELS)), json.dumps(str(model))
    nominal = 120 // cluster.sites
    text = CONFIG.format(rounds=rounds, labels=labels, model=name, deadline=deadline, nominal=nominal)
    if chat:
        text = text.replace(f"labels = {labels}", 'kind = "causal-lm"\nchat = true')
        text = text.replace("[data]\n", f"[data]\n{chat}\n")
    config.write_text(text)
    return config


def divide(cluster: Any, data: Path) -> None:
    from common.config import DataSection, TaskKind

    table = read_table(data, columns_of(DataSection(train=data), TaskKind.SEQUENCE_CLASSIFICATION))
    rows = []
    for t, label in zip(table.text, table.label or (), strict=True):
        turns = [("user", "w1 w2"), ("assistant", "some"), ("user", t)]
        messages = [{"role": role, "content": content} for role, content in turns]
        whole = [*messages, {"role": "assistant", "content": label}]
        record = {"text": t, "label": label, "messages": messages, "answer": label, "whole": whole}
        rows.append(json.dumps(record))
    rows = list(dict.fromkeys(rows))
    each = (len(rows) - 20) // cluster.sites
    (cluster.folder / "public.jsonl").write_text("\n".join(rows[:20]) + "\n")
    for number in range(1, cluster.sites + 1):
        path = cluster.folder / f"records-{number}.jsonl"
        path.write_text("\n".join(rows[20 + each * (number - 1) : 20 + each * number]) + "\n")
        cluster.give_records(number, path)


def until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not in {seconds:g} s"
        time.sleep(0.2)


def children(pid: int) -> list[int]:
    """All processes below `pid`, itself included."""
    found, todo = [], [pid]
    while todo:
        one = todo.pop()
        found.append(one)
        for path in Path(f"/proc/{one}/task").glob("*/children"):
            try:
                todo += [int(child) for child in path.read_text().split()]
            except OSError:
                continue
    return found


def named(pid: int, word: str) -> list[int]:
    """Processes below `pid` whose command line has `word` as its program or module."""
    found = []
    for one in children(pid):
        try:
            parts = Path(f"/proc/{one}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if any(part == word.encode() or part.endswith(f"/{word}".encode()) for part in parts):
            found.append(one)
    return found


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def rounds_of(cluster: Any, job: str) -> list[dict[str, Any]]:
    path = cluster.job(job) / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [event for event in map(json.loads, lines) if event["kind"] == "round"]


def check_end(cluster: Any, job: str, rounds: int, sites: int = 3) -> None:
    """What holds however the job went: each round counted once, each site charged at most once a round, and
    no charge that the server's record does not claim."""
    events = rounds_of(cluster, job)
    assert [event["round"] for event in events] == sorted({event["round"] for event in events})
    assert events[-1]["round"] == rounds
    claimed = {(e.site, e.round) for e in RunFolder(cluster.job(job)).site_rounds() if e.events}
    for number in range(1, sites + 1):
        found = charges(cluster, number, job)
        assert set(found.values()) <= {1}, found
        assert set(found) <= set(range(1, rounds + 1))
        assert {(number, charged) for charged in found} <= claimed
    receipts = {head.site: head.seq for head in read_receipts(cluster.server / "receipts.jsonl")}
    assert set(receipts) == set(range(1, sites + 1))


def charges(cluster: Any, number: int, job: str) -> dict[int, int]:
    """Round → how often the site was charged for it, by its own ledger, which is verified first."""
    from client.identity import SiteFolder
    from client.ledger_view import look

    view = look(SiteFolder(cluster.site(number)))
    reserved = {e.seq: e.record.charge for e in view.entries if isinstance(e.record, Reserve)}
    started = {e.record.id for e in view.entries if isinstance(e.record, Start)}
    completed = {e.record.id for e in view.entries if isinstance(e.record, Complete)}
    assert completed <= started <= reserved.keys()
    return dict(Counter(reserved[seq].round for seq in started if reserved[seq].run == job))
