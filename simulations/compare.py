"""Several runs side by side: what was set differently, what it cost, what came of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.report_style import number
from server.record import RunFolder
from server.report_accounts import Run, read_run

_UNTOLD = ("run.name",)  # says nothing about what was done


@dataclass(frozen=True)
class Compared:
    """One run. The lists have an entry for each round, the start (round 0) included.

    `metric`: of the chief score; None where it was not measured. `epsilon`: of the site that spent most.
    `bytes_up`: of all sites, cumulated. `scores`: final, by name.
    """

    label: str
    run: Run
    settings: dict[str, Any]
    rounds: list[int]
    metric: list[float | None]
    epsilon: list[float]
    bytes_up: list[int]

    @property
    def chief(self) -> str:
        return str(self.run.summary.get("metric", "accuracy"))

    @property
    def scores(self) -> dict[str, float]:
        found = self.run.summary.get("scores_final") or {self.chief: self.run.summary.get("accuracy_final")}
        return {name: value for name, value in found.items() if number(value) is not None}

    @property
    def outcome(self) -> dict[str, Any]:
        """What it cost and what came of it, by the names that --json has."""
        s = self.run.summary
        return {
            "metric": self.chief,
            "metric_initial": s.get("accuracy_initial"),
            "metric_final": s.get("accuracy_final"),
            "loss_initial": s.get("loss_initial"),
            "loss_final": s.get("loss_final"),
            "private": self.run.private,
            "epsilon_rdp": s.get("epsilon_rdp_max"),
            "epsilon_pld": s.get("epsilon_pld_max"),
            "delta": s.get("delta"),
            "rounds": self.rounds[-1],
            "rounds_without_sum": sum(not r.counted for r in self.run.rounds if r.round),
            "sites": self.run.config.sites.count,
            "bytes_up": self.bytes_up[-1],
            "bytes_up_per_site_round": s.get("bytes_up_per_site_round"),
            "seconds": number(s.get("wall_seconds")) or sum(r.seconds for r in self.run.rounds),
        }


def compare(folders: Sequence[Path]) -> list[Compared]:
    """
    Raises:
        ConfigError: there are fewer than two, or one is named twice.
        CheckpointError: one is no run, or not finished.
    """
    resolved = [folder.resolve() for folder in folders]
    if len(folders) < 2:
        raise ConfigError(f"compare needs at least two runs, found {len(folders)}: name another one's folder")
    for place, folder in enumerate(resolved):
        if folder in resolved[:place]:
            first = folders[resolved.index(folder)]
            raise ConfigError(
                f"expected runs that are each named once, found {first} and {folders[place]}, which are the "
                "same folder: leave one out"
            )
    names = [folder.name for folder in resolved]
    labels = [
        name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)
    ]
    return [_read(folder, label) for folder, label in zip(resolved, labels, strict=True)]


def _read(folder: Path, label: str) -> Compared:
    run = read_run(RunFolder(folder))
    rounds = [r.round for r in run.rounds]
    sent = {r: 0 for r in rounds}
    for part in run.parts:
        sent[part.round] = sent.get(part.round, 0) + part.bytes_up
    worst = [max((a.epsilon[r] for a in run.accounts), default=0.0) for r in rounds]
    return Compared(
        label=label,
        run=run,
        settings=dict(_flat(run.config.model_dump(mode="json"))),
        rounds=rounds,
        metric=[number(r.accuracy) for r in run.rounds],
        epsilon=worst,
        bytes_up=list(accumulate(sent[r] for r in rounds)),
    )


def differing(runs: Sequence[Compared]) -> dict[str, list[Any]]:
    """The keys of the configuration in which runs differ, with each run's value."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    found = {key: [run.settings.get(key) for run in runs] for key in keys if key not in _UNTOLD}
    return {key: values for key, values in found.items() if any(v != values[0] for v in values)}


def _flat(data: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield above + key, value


def as_json(runs: Sequence[Compared]) -> dict[str, Any]:
    return {
        "differs": differing(runs),
        "runs": [
            {
                "run": run.label,
                **run.outcome,
                "scores_final": run.scores,
                "by_round": {
                    "round": run.rounds,
                    "metric": run.metric,
                    "epsilon_rdp": run.epsilon,
                    "bytes_up": run.bytes_up,
                },
            }
            for run in runs
        ],
    }
