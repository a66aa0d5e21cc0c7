"""The command line, in this process or in one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

import confide
from simulations.fleet import open_fleet

ROOT = Path(__file__).resolve().parents[2]


def invoke(*arguments: str | Path) -> str:
    """Run in this process; an error is raised as the command line would report it."""
    open_fleet.cache_clear()
    result = CliRunner().invoke(confide.app, [str(a) for a in arguments])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "confide", *map(str, arguments)]


def run_process(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
