"""Seeded schedules of what goes wrong between machines, over a federation of processes.

CONFIDE_CHAOS says which: `100`, or `40-59`. Ten jobs in a row share a federation, each with a schedule of its
own: kill -9 of any process, pauses, cut and slow links, and a gate that delays, loses, doubles and replays.
Every job must end done, with each round counted once, each charge made once and claimed by the server, and
each adapter exactly what the vectors say that the sites masked.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import confide
from common.adapter import Layout
from common.aggregation import policy_of
from common.plan import make_plan
from server.aggregation import step
from server.checkpoint import _load
from server.deployed import load_public
from server.jobs import JobFolder
from tests.e2e.cluster import (
    ROLES,
    check_end,
    children,
    divide,
    kill,
    local_cluster,
    named,
    rounds_of,
    until,
    write_job,
)
from tests.e2e.command import ROOT
from tests.e2e.watched import vector_name

TOGETHER = 10  # jobs that share a federation
ROUNDS = 3
SECONDS = 400.0  # for a job, chaos and all


def seeds() -> list[int]:
    asked = os.environ.get("CONFIDE_CHAOS", "3")
    first, _, last = asked.partition("-")
    return list(range(int(first), int(last) + 1)) if last else list(range(int(first)))


@contextmanager
def federation(folder: Path, data: Path) -> Iterator[Any]:
    """Three sites with an onlooker each, and a gate that can be told to be rough."""
    module = local_cluster()
    cluster = module.Cluster(folder, 3, module.Network.best(f"cc{os.getpid() % 10000}"))
    gate: subprocess.Popen[bytes] | None = None
    try:
        cluster.found()
        divide(cluster, data)
        (cluster.folder / "masked").mkdir()
        watched = str(ROOT / "tests" / "e2e" / "watched.py")
        cluster.site_program = [sys.executable, "-P", watched, str(cluster.folder / "masked")]
        settings = cluster.server / "server.toml"
        settings.write_text(settings.read_text().replace("[gate]", "[gate]\nembedded = false", 1))
        for number in range(1, 4):
            terms = ["records", "--epsilon", "10000", "--delta", "1e-3"]
            cluster.confide("client", "scope", cluster.site(number), *terms)
        rough = [str(ROOT / "tests" / "e2e" / "rough_gate.py"), str(cluster.server), str(flag(cluster)), "0"]
        with (cluster.folder / "gate.out").open("ab") as out:
            gate = subprocess.Popen(
                [*cluster.network.inside(0), sys.executable, "-P", *rough],
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        cluster.start_all()
        yield cluster
        for number in range(4):
            assert cluster.stop(number) == 0, number
    finally:
        if gate is not None:
            gate.kill()
            gate.wait()
        cluster.stop_all()


def flag(cluster: Any) -> Path:
    return Path(cluster.folder / "rough")


def type_in(*arguments: str | Path) -> str:
    """A command, in this process."""
    result = CliRunner().invoke(confide.app, list(map(str, arguments)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return str(result.stdout)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_chaos(bert_folder: Path, data_file: Path, tmp_path: Path) -> None:
    os.environ["PYTHONPATH"] = str(ROOT)
    todo = seeds()
    for begin in range(0, len(todo), TOGETHER):
        block = todo[begin : begin + TOGETHER]
        with federation(tmp_path / f"from-{block[0]}", data_file) as cluster:
            config = write_job(cluster, bert_folder, ROUNDS, 15.0)
            for seed in block:
                began = time.monotonic()
                counted = one_job(cluster, config, seed)
                print(f"schedule {seed}: {counted} sums, {time.monotonic() - began:.0f} s", flush=True)


def one_job(cluster: Any, config: Path, seed: int) -> int:
    """How many of its rounds have a sum."""
    rng = random.Random(seed)
    job = str(json.loads(type_in("server", "submit", cluster.server, config, "--json"))["job"])
    for number in range(1, 4):
        type_in("client", "approve", cluster.site(number), cluster.job(job) / "job.fab", "--yes", "--widen")
    # The first fault comes at any moment, before the job has begun too.
    time.sleep(rng.uniform(0, 15))
    try:
        for _ in range(rng.randint(3, 5)):
            upset(rng, cluster)
            time.sleep(rng.uniform(0.5, 6))
    finally:
        calm(cluster)
    cluster.wait(job, SECONDS)
    check_end(cluster, job, ROUNDS)
    until(lambda: not named(cluster.processes[0].pid, "flwr-serverapp"), 60, "the end of the ServerApp")
    return check_sums(cluster, job)


def check_sums(cluster: Any, job: str) -> int:
    """Each checkpoint is the one before and the mean of what the survivors masked, to the last bit."""
    place = JobFolder(cluster.job(job))
    config = place.load_config()
    model, _ = load_public(config)
    plan = make_plan(config)
    checkpoints = [_any(path) for path in sorted(place.checkpoints.glob("*.safetensors"))]
    assert [found.round for found in checkpoints] == list(range(ROUNDS + 1))
    sums = {e.round: e for e in place.sessions() if e.outcome == "sum"}
    counted = 0
    for (before, after), event in zip(itertools.pairwise(checkpoints), place.rounds()[1:], strict=True):
        assert after.round == event.round
        if not event.counted:
            assert np.array_equal(before.adapter, after.adapter)
            continue
        counted += 1
        session, part = sums[event.round], plan.round(event.round)
        masked = [
            np.load(cluster.folder / "masked" / vector_name(job, event.round, session.attempt, site))
            for site in session.survivors
        ]
        assert len(masked) == event.answered >= 3
        codec = policy_of(config, model, part).codec
        total = np.sum(masked, axis=0, dtype=masked[0].dtype)
        mean = codec.decode_sum(total, len(masked)).mean
        positions = model.layout.positions(Layout.of(model.active(part.part)))
        expected, _ = step(before.adapter, mean, positions, before.state, config.server)
        assert np.array_equal(expected, after.adapter)
    assert rounds_of(cluster, job)[-1]["round"] == ROUNDS
    return counted


def _any(path: Path) -> Any:
    from safetensors import safe_open

    with safe_open(str(path), framework="numpy") as file:
        metadata = file.metadata()
    return _load(path, metadata["config"], metadata["layout"])


def upset(rng: random.Random, cluster: Any) -> None:
    number = rng.randint(1, cluster.sites)
    kinds = ["kill", "kill", "pause", "rough"] + (["cut"] if cluster.network.namespaces else [])
    kinds += ["slow"] if cluster.network.can_be_slow() else []
    match rng.choice(kinds):
        case "kill":
            role = rng.choice(ROLES)
            victims = [one for p in cluster.processes.values() for one in named(p.pid, role)]
            if victims:
                kill(rng.choice(victims))
        case "pause":
            victims = [one for p in cluster.processes.values() for one in children(p.pid)]
            victim = rng.choice(victims)
            subprocess.run(["kill", "-STOP", str(victim)], check=False)
            time.sleep(rng.uniform(1, 8))
            subprocess.run(["kill", "-CONT", str(victim)], check=False)
        case "rough":
            flag(cluster).touch()
            time.sleep(rng.uniform(2, 10))
            flag(cluster).unlink()
        case "cut":
            cluster.network.cut(number, True)
            time.sleep(rng.uniform(1, 8))
            cluster.network.cut(number, False)
        case "slow":
            cluster.network.slow(number, rng.choice([50, 300, 1000]), rng.choice([0.0, 0.02]))


def calm(cluster: Any) -> None:
    flag(cluster).unlink(missing_ok=True)
    if cluster.network.can_be_slow():
        for number in range(1, cluster.sites + 1):
            cluster.network.slow(number, 0)
