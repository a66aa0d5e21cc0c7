"""What a site has spent: charged before anything is computed, kept in the site's folder across rounds."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from common.errors import PrivacyError
from common.files import sync_folder
from common.privacy import SampledGaussianEvent, check_spend, epsilon_pld, epsilon_rdp


@dataclass(frozen=True)
class Charge:
    """One reservation. `context` is the hash of everything that the computed output depends on."""

    round: int
    context: str
    events: tuple[SampledGaussianEvent, ...]


class Budget:
    """The spend of one site, an append-only file of charges, one JSON line each.

    A charge is on disk (fsync) before `reserve` returns, so a crash at any moment over-counts at worst.
    The last line may be torn by a crash; it was then never acknowledged, and is cut off at opening.

    Raises:
        PrivacyError: when the file cannot be read as charges.
    """

    def __init__(self, path: Path, *, target_epsilon: float, delta: float) -> None:
        self._path = path
        self._target_epsilon = target_epsilon
        self._delta = delta
        self._charges = _read(path)

    @property
    def events(self) -> list[SampledGaussianEvent]:
        return [event for charge in self._charges for event in charge.events]

    @property
    def epsilon_rdp(self) -> float:
        return epsilon_rdp(self.events, self._delta)

    @property
    def epsilon_pld(self) -> float:
        return epsilon_pld(self.events, self._delta)

    def reserve(self, charge: Charge, *, repeatable: bool) -> None:
        """Charge, or refuse.

        `repeatable` says that the noise is a function of `charge.context`, so that computing the same
        charge again releases the same numbers, which is free. Without it every computation is a new charge.

        Raises:
            BudgetError: the charge would pass the target; nothing may be computed.
        """
        if repeatable and charge in self._charges:
            return
        check_spend(self.events, charge.events, target_epsilon=self._target_epsilon, delta=self._delta)
        line = {
            "round": charge.round,
            "context": charge.context,
            "events": [event.to_json() for event in charge.events],
        }
        _append(self._path, json.dumps(line, separators=(",", ":")).encode() + b"\n")
        self._charges.append(charge)


def _append(path: Path, line: bytes) -> None:
    """The whole line on disk, file and folders included, or, after an error, nothing of it."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        length = file.seek(0, os.SEEK_END)
        try:
            if file.write(line) != len(line):
                raise OSError("short write")
            os.fsync(file.fileno())
        except OSError:
            file.truncate(length)
            raise
    if new:
        for folder in (path.parent, path.parent.parent, path.parent.parent.parent):
            sync_folder(folder)


def _read(path: Path) -> list[Charge]:
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) != len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
            os.fsync(file.fileno())
    charges = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            fields = json.loads(line)
            events = tuple(SampledGaussianEvent.from_json(event) for event in fields.pop("events"))
            charges.append(Charge(events=events, **fields))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise PrivacyError(
                f"{path}, line {number}, is not a charge ({type(error).__name__}): the spend of this site is "
                "unknown, so nothing more may be computed on its data. Restore the file"
            ) from None
    return charges
