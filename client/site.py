"""A site as its client sees it: its data, its plan, its budget, and where its noise comes from."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from client.budget import Budget
from client.training import Shard
from common.features import FeatureCache
from common.models import AdaptedModel
from common.plan import Plan


@dataclass(frozen=True)
class Site:
    """Everything that one site's handlers need. Nothing in it comes from the server.

    `noise_key(context)` gives the 32-byte key of a round's noise: fresh from the operating system at a
    deployed site, derived from the run's secret and `context` in a simulation (`repeatable_noise`).
    """

    site_id: int  # >= 1
    folder: Path
    shard: Shard
    model: AdaptedModel
    plan: Plan
    plan_digest: str
    setting: bytes  # hash of the configuration and of the base model's weights
    budget: Budget
    noise_key: Callable[[bytes], bytes]
    repeatable_noise: bool
    features: FeatureCache

    def log(self, text: str) -> None:
        """A plain sentence for the site's own people: it stays in the site's folder."""
        logging.getLogger("confide.site").info("site %d: %s", self.site_id, text)
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "site.log").open("a", encoding="utf-8") as file:
            file.write(text.replace("\n", " ") + "\n")
