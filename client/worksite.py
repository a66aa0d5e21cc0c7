"""A deployed site at one job: its records, model and plan, loaded once and kept while the process lives."""

from __future__ import annotations

import contextlib
import os
from functools import cached_property

import numpy as np
import torch

from client.identity import SiteFolder, load_identity, load_local_key, load_pinned
from client.ledger import Ledger
from client.policy import open_policy
from client.policy_check import model_digest
from client.selftest import self_test
from client.settings import SiteSettings, load_settings
from client.site import Pinned, Site
from client.store import FileStore
from client.training import Shard
from common.aggregation import setting_of
from common.bundle import Bundle
from common.config import RunConfig
from common.datasets import read_table
from common.errors import DataError, PrivacyError
from common.features import FeatureCache
from common.identity import make_folder
from common.kinds import TaskKind
from common.ledger_errors import UnknownScopeError
from common.models import AdaptedModel, load_model
from common.noise import fresh_key
from common.plan import Plan, make_plan, plan_digest
from common.tables import clean
from common.targets import check_records, columns_of
from common.tasks import Examples, make_task

_NO_LIMIT = 2**62


class Worksite:
    """Opened for one approved bundle.

    Raises:
        ConfigError: nothing is pinned, or site.toml or the job does not fit. DataError, ModelError.
        PrivacyError: the self-test fails, or δ is too large for these records. LedgerError.
    """

    def __init__(self, folder: SiteFolder, bundle: Bundle, passphrase: bytes | None) -> None:
        self._folder = folder
        self._bundle = bundle
        self._settings: SiteSettings = load_settings(folder.settings)
        self._identity = load_identity(folder.identity, passphrase)
        self._member = load_pinned(folder).member
        self.config: RunConfig = self._settings.applied_to(bundle.config)
        self.plan: Plan = make_plan(bundle.config)
        if not self.plan.private:
            raise PrivacyError("a deployed site trains with privacy only: the job must not turn it off")
        torch.set_num_threads(self.config.run.threads or os.cpu_count() or 1)
        task = make_task(self.config.task.kind, self.config.task.labels, self.config.task)
        self.model: AdaptedModel = load_model(self.config, task)
        self.examples: Examples = self._read()
        for part in {r.part for r in self.plan.rounds}:
            self_test(self.model, part)
        self._features = FeatureCache()
        self._setting = setting_of(self.config, self.model)
        self._model_digest = model_digest(self.model)

    def _read(self) -> Examples:
        config, kind = self.config, self.config.task.kind
        path, nominal = config.data.train, config.privacy.nominal_records or 0
        if path is None:
            raise DataError(f"{self._folder.settings} must name this site's records: data.train")
        longest = _NO_LIMIT if kind is TaskKind.IMAGE_CLASSIFICATION else config.data.max_characters
        table, _ = clean(
            read_table(path, columns_of(config.data, kind, config.task.chat)), max_characters=longest
        )
        check_records(kind, table, config.task.labels, config.task.range)
        if len(table) < nominal:
            raise DataError(
                f"{path} holds {len(table)} usable records, but the job counts on privacy.nominal_records = "
                f"{nominal} at every site: take no part, or agree on a smaller number"
            )
        if self.plan.delta >= 1 / len(table):
            raise PrivacyError(
                f"the job's delta = {self.plan.delta:g} must be below one over this site's records "
                f"(1/{len(table)}): ask for a job with a smaller one"
            )
        return self.model.task.encode(table, self.model.tokenizer, config.model.max_length)

    @cached_property
    def _ledger(self) -> Ledger:
        place = self._folder
        ledger = Ledger(place.ledger, self._identity, self._member.id, witness=place.witness)
        # Only this process charges here (client/executor.py). What was reserved and never started was cut
        # off before anything was computed: it is given back.
        with contextlib.suppress(UnknownScopeError):
            for left in ledger.balance(self._settings.data.source).reserved:
                ledger.cancel(left.id)
        return ledger

    def site(self) -> Site:
        """The site as it is now: roster and policy are read anew, so that a change counts at once.

        Raises:
            ConfigError, LedgerError: what is in the folder cannot be used.
        """
        self._settings_unchanged()
        return Site(
            site_id=self._member.id,
            run_id=self._bundle.job,
            folder=self._folder.path,
            shard=self._shard,
            model=self.model,
            config=self.config,
            plan=self.plan,
            plan_digest=plan_digest(self.plan),
            setting=self._setting,
            policy=open_policy(self._folder.policy, self._ledger),
            model_digest=self._model_digest,
            ledger=self._ledger,
            scope=self._settings.data.source,
            noise_key=lambda _: fresh_key(),
            repeatable_noise=False,
            features=self._features,
            pinned=self._pinned(),
            bundle=self._bundle.digest,
        )

    @cached_property
    def _shard(self) -> Shard:
        return Shard(self.examples, np.arange(len(self.examples)))

    def _settings_unchanged(self) -> None:
        """A data source's name decides which budget pays: it must be that of the records in memory."""
        if load_settings(self._folder.settings) != self._settings:
            raise DataError(
                f"{self._folder.settings} has changed since this job's records were read: restart the client"
            )

    def _pinned(self) -> Pinned:
        roster = load_pinned(self._folder).roster
        local_key = load_local_key(self._folder.local_key)
        states, witnesses = self._folder.path / "secagg", self._folder.witness.parent
        make_folder(states)
        make_folder(witnesses)
        store = FileStore(
            states / f"{self._bundle.job}.state",
            witnesses / f"{self._bundle.job}.secagg",
            key=local_key,
            site=self._member.id,
            run=self._bundle.job.encode(),
            random_bytes=os.urandom,
        )
        return Pinned(self._identity, roster.keys, store, local_key, os.urandom)

    def close(self) -> None:
        if "_ledger" in self.__dict__:
            self._ledger.close()
