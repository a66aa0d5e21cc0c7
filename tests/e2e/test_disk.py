"""A disk that is full, at a site and at the server: it stops cleanly, and goes on when there is room."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from server.record import RunFolder
from tests.e2e.cluster import check_end, rounds_of, tiny_cluster, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def small_disk(folder: Path, megabytes: int, stack: ExitStack) -> None:
    """Put what is in `folder` on a disk of its own."""
    aside = folder.with_name(f"{folder.name}-before")
    folder.rename(aside)
    folder.mkdir(mode=0o700)
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=700", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("nothing can be mounted here")
    stack.callback(subprocess.run, ["umount", "-l", str(folder)], check=False)
    shutil.copytree(aside, folder, dirs_exist_ok=True)


@contextmanager
def full(folder: Path) -> Iterator[None]:
    """Inside: not a byte is left."""
    ballast = folder / "ballast"
    try:
        with ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    except OSError:
        pass
    try:
        yield
    finally:
        ballast.unlink()


def fates(cluster: Any, job: str, site: int) -> dict[int, str]:
    return {e.round: e.status for e in RunFolder(cluster.job(job)).site_rounds() if e.site == site}


def test_a_site_whose_disk_is_full_is_left_out_and_comes_back(
    bert_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    with (
        ExitStack() as disks,
        tiny_cluster(tmp_path / "c", bert_folder, data_file, sites=4, rounds=6, deadline=20) as (
            cluster,
            job,
        ),
    ):
        small_disk(cluster.site(2), 8, disks)
        cluster.start_all()
        until(lambda: len(rounds_of(cluster, job)) >= 2, 240, "the first round")
        with full(cluster.site(2)):
            until(lambda: len(rounds_of(cluster, job)) >= 5, 300, "rounds without the site")
            lost = fates(cluster, job, 2)
        cluster.wait(job, 500)
        check_end(cluster, job, 6, sites=4)
        assert any(status != "ok" for status in lost.values()), lost
        assert all(event["counted"] for event in rounds_of(cluster, job))  # three others are enough
        assert fates(cluster, job, 2)[6] == "ok"


def test_a_server_whose_disk_is_full_goes_on_when_there_is_room(
    bert_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    with (
        ExitStack() as disks,
        tiny_cluster(tmp_path / "c", bert_folder, data_file, rounds=4, deadline=20) as (cluster, job),
    ):
        small_disk(cluster.server, 32, disks)
        cluster.start_all()
        until(lambda: len(rounds_of(cluster, job)) >= 2, 240, "the first round")
        before = len(rounds_of(cluster, job))
        with full(cluster.server):
            # Nothing is recorded that is not whole; the processes may come and go.
            with pytest.raises(AssertionError):
                until(lambda: len(rounds_of(cluster, job)) > before + 1, 60, "a round on a full disk")
            assert cluster.processes[0].poll() is None
        cluster.wait(job, 500)
        check_end(cluster, job, 4)
