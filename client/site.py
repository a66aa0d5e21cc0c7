"""A site as its client sees it: its data, its plan, its budget, its keys, and where its noise comes from."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from client.identity import SiteFolder
from client.ledger import Ledger
from client.policy import SitePolicy
from client.store import FileStore
from client.training import Shard
from common.config import RunConfig
from common.errors import PrivacyError
from common.features import FeatureCache
from common.models import AdaptedModel
from common.plan import Plan
from common.secagg.keys import IdentityKey, RandomBytes, Secret
from common.secagg.policy import Roster

LONGEST_ENTRY = 10_000
"""Characters of an entry in a site's log. An error may quote what the server has sent, however long."""
LARGEST_LOG = 10_000_000
"""Bytes after which a site's log is set aside; the one set aside before is dropped."""


@dataclass(frozen=True)
class Pinned:
    """What a site has pinned for secure aggregation, and where its state of one run lies."""

    identity: IdentityKey
    roster: Roster
    store: FileStore
    local_key: Secret  # seals what waits in the site's folder
    random_bytes: RandomBytes  # of keys, masks and shares: os.urandom


@dataclass(frozen=True)
class Site:
    """Everything that one site's handlers need. Nothing in it comes from the server.

    `noise_key(context)` gives the 32-byte key of a round's noise: fresh from the operating system at a
    deployed site, derived from the run's secret and `context` in a simulation (`repeatable_noise`).
    `pinned` is `None` in a study without secure aggregation, `ledger` in one without privacy, and only there.
    """

    site_id: int  # >= 1
    run_id: str  # the run that this site has joined
    folder: Path
    shard: Shard
    model: AdaptedModel
    config: RunConfig
    plan: Plan
    plan_digest: str
    setting: bytes  # hash of the configuration and of the base model's weights
    policy: SitePolicy  # what the site allows; recorded in its ledger
    model_digest: str  # which model it is, for the policy: see client/policy_check.py
    ledger: Ledger | None
    scope: str  # the ledger's name of the data source that `shard` is
    noise_key: Callable[[bytes], bytes]
    repeatable_noise: bool
    features: FeatureCache
    pinned: Pinned | None
    bundle: str | None = None  # hash of the code that runs, where a site runs code by its hash

    def __post_init__(self) -> None:
        if (self.pinned is None) != self.config.study.plain_updates:
            raise PrivacyError(
                "a site sends plain updates only in a study that says so (--insecure-plain-updates); "
                "otherwise it needs its identity and the roster"
            )
        if (self.ledger is None) == self.plan.private:
            raise PrivacyError("a site trains without a ledger only in a study without privacy")

    @property
    def waiting(self) -> Path:
        """Where the update of the last training waits for its upload, sealed."""
        return SiteFolder(self.folder).waiting

    def log(self, text: str) -> None:
        """A plain sentence for the site's own people: it stays in the site's folder."""
        if len(text) > LONGEST_ENTRY:
            text = f"{text[: LONGEST_ENTRY // 2]} … {text[-LONGEST_ENTRY // 2 :]}"
        logging.getLogger("confide.site").info("site %d: %s", self.site_id, text)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "site.log"
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_size > LARGEST_LOG:
                path.replace(path.with_name("site.log.1"))
        with path.open("a", encoding="utf-8") as file:
            file.write(text.replace("\n", " ") + "\n")
