"""`confide client ...` with an onlooker: `watched.py FOLDER client run SITE`.

The executor that it starts writes each vector that it masks to FOLDER, before it is sent: with these a test
knows what a round's sum must be. Nothing else of the client differs.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np

import client.running
import confide
from client.secagg import SecAggClient
from common.supervise import PYTHON


def watch(folder: Path) -> None:
    services, mask = client.running.services, SecAggClient.mask

    def watched_services(*arguments: Any) -> Any:
        node, executor = services(*arguments)
        own = [*PYTHON, "-m", "confide"]
        assert executor.command[: len(own)] == own
        command = [*PYTHON, str(Path(__file__).resolve()), str(folder), *executor.command[len(own) :]]
        return node, dataclasses.replace(executor, command=command)

    def watched_mask(self: SecAggClient, request: Any, update: Any) -> Any:
        reply = mask(self, request, update)
        assert self.mark is not None
        number, attempt = self.mark
        name = vector_name(self.site.run.decode(), number, attempt, self.site.id)
        aside = folder / f".{name}"
        with aside.open("wb") as file:
            np.save(file, update.vector)
        aside.rename(folder / name)
        return reply

    client.running.services = watched_services
    SecAggClient.mask = watched_mask  # type: ignore[method-assign]


def vector_name(run: str, number: int, attempt: int, site: int) -> str:
    return f"{run}-{number}-{attempt}-{site}.npy"


if __name__ == "__main__":
    watch(Path(sys.argv.pop(1)))
    confide.main()
