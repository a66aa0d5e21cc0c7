"""What a report is made of: a run's folder, read, and ε of every site computed anew from the events."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from common.config import RunConfig
from common.errors import CheckpointError
from common.plan import make_plan
from common.privacy import SampledGaussianEvent, epsilon_rdp
from common.report_style import (
    number,
)
from server.charges import FREE
from server.record import RoundEvent, RunFolder, SessionEnd, SiteRound


@dataclass(frozen=True)
class Account:
    """One site over the whole run.

    `epsilon[i]` is what the events charge it up to round i. `epsilon_at_most` also counts the rounds in
    which it failed after it may have charged itself.
    """

    site: int
    asked: int
    answered: int
    failures: Counter[str]
    epsilon: tuple[float, ...]
    epsilon_at_most: float
    bytes_up: int
    held_out: float | None


@dataclass(frozen=True)
class Run:
    """What the page is made of."""

    config: RunConfig
    summary: dict[str, Any]
    rounds: list[RoundEvent]
    parts: list[SiteRound]
    sessions: list[SessionEnd]
    accounts: list[Account]
    toml: str

    @property
    def private(self) -> bool:
        study = self.config.privacy.insecure_disabled or self.config.study.noise_seed is not None
        return self.summary.get("private") is True and not study

    @property
    def delta(self) -> float:
        return make_plan(self.config).delta

    @property
    def worst_history(self) -> list[SampledGaussianEvent]:
        """The events of the site that spent most."""
        worst = max(self.accounts, key=lambda a: a.epsilon[-1]).site
        return [
            SampledGaussianEvent.from_json(event) for p in self.parts if p.site == worst for event in p.events
        ]

    @property
    def uncertain(self) -> list[Account]:
        """The sites that may have spent more than the events say."""
        return [a for a in self.accounts if a.epsilon_at_most > a.epsilon[-1]]


def read_run(folder: RunFolder, summary: dict[str, Any] | None = None) -> Run:
    """All that the page needs. summary: where the folder's is not written yet.

    Raises:
        CheckpointError: the run has no summary or no events yet.
    """
    config = folder.load_config()
    events = list(folder.read_events())
    rounds = sorted((e for e in events if isinstance(e, RoundEvent)), key=lambda e: e.round)
    parts = sorted((e for e in events if isinstance(e, SiteRound)), key=lambda e: (e.round, e.site))
    if (summary is None and not folder.summary.is_file()) or not rounds:
        raise CheckpointError(f"{folder.path} has no finished run yet: finish it, then write the report")
    sessions = [e for e in events if isinstance(e, SessionEnd)]
    summary = json.loads(folder.summary.read_text("utf-8")) if summary is None else summary
    accounts = _accounts(config, summary, rounds, parts)
    return Run(config, summary, rounds, parts, sessions, accounts, folder.config.read_text("utf-8"))


def _accounts(
    config: RunConfig, summary: dict[str, Any], rounds: list[RoundEvent], parts: list[SiteRound]
) -> list[Account]:
    plan = make_plan(config)
    held_out = summary.get("accuracy_by_group") or {}
    by_site: dict[int, list[SiteRound]] = {site: [] for site in range(1, config.sites.count + 1)}
    for part in parts:
        by_site.setdefault(part.site, []).append(part)
    last = max([r.round for r in rounds] + [p.round for p in parts])

    def account(site: int, own: list[SiteRound]) -> Account:
        spent: Counter[SampledGaussianEvent] = Counter()
        perhaps: Counter[SampledGaussianEvent] = Counter()
        epsilon = [0.0] * (last + 1)
        position = 0
        for this in range(1, last + 1):
            while position < len(own) and own[position].round == this:
                part = own[position]
                position += 1
                if part.events:
                    spent.update(SampledGaussianEvent.from_json(event) for event in part.events)
                elif part.status != "ok" and part.status not in FREE and this <= len(plan.rounds):
                    perhaps.update(plan.round(this).events)
            epsilon[this] = _epsilon(frozenset(spent.items()), plan.delta)
        return Account(
            site=site,
            asked=len(own),
            answered=sum(p.status == "ok" for p in own),
            failures=Counter(p.status for p in own if p.status != "ok"),
            epsilon=tuple(epsilon),
            epsilon_at_most=_epsilon(frozenset((spent + perhaps).items()), plan.delta),
            bytes_up=sum(p.bytes_up for p in own),
            held_out=number(held_out.get(str(site))),
        )

    return [account(site, own) for site, own in sorted(by_site.items())]


@lru_cache(maxsize=16_384)
def _epsilon(history: frozenset[tuple[SampledGaussianEvent, int]], delta: float) -> float:
    """ε of events and how often each came. The same for all sites with the same history, so computed once."""
    return epsilon_rdp([event for event, times in history for _ in range(times)], delta)
