"""A service in a process of its own, on a port that was free."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from common.config import RunConfig
from common.export import PrivacyClaim, export_adapter
from common.models import AdaptedModel
from tests.conftest import moved
from tests.e2e.command import ROOT, command

CLAIM = PrivacyClaim(1.0, 1.0, 1e-5, secure_aggregation=True, read_from_data=(), repeatable_noise=False)


def adapter(model: AdaptedModel, config: RunConfig, folder: Path) -> Path:
    export_adapter(model, moved(model), config, CLAIM, folder)
    return folder


@dataclass(frozen=True)
class Service:
    url: str
    process: subprocess.Popen[str]
    log: Path

    def client(self, **options: object) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120, trust_env=False, **options)  # type: ignore[arg-type]


@contextmanager
def serving(folder: Path, log: Path, *options: str) -> Iterator[Service]:
    with log.open("w") as written:
        process = subprocess.Popen(
            command("serve", folder, "--port", "0", "--device", "cpu", *options),
            stdout=subprocess.PIPE,
            stderr=written,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        found = re.search(r"listening on (https?://\S+)", said)
        assert found, said + log.read_text()
        yield Service(found[1], process, log)
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(60)
