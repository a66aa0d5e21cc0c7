"""Many sites in one process: one base model, one set of examples, a site's part of them by index."""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from flwr.app import Context

from client.identity import SiteFolder, load_identity, load_local_key
from client.ledger import Ledger
from client.policy import SitePolicy, open_policy
from client.policy_check import model_digest, policy_of_run
from client.selftest import self_test
from client.site import Pinned, Site
from client.store import FileStore
from client.training import Shard
from common.adapter import Vector, read_vector
from common.aggregation import setting_of
from common.config import DataSection, Partition, RunConfig, TaskKind
from common.datasets import Sample, read_sample, read_table
from common.decoding import decoded_scores
from common.errors import ConfigError, DataError, PrivacyError
from common.evaluation import MetricSums, evaluate
from common.features import FeatureCache
from common.ledger_errors import RolledBackError
from common.ledger_replay import Balance
from common.models import AdaptedModel, load_model
from common.noise import KEY_BYTES, derived_key
from common.plan import Plan, make_plan, plan_digest
from common.roster import load_roster
from common.secagg.keys import IdentityKey
from common.secagg.policy import Roster
from common.tables import CleaningReport, Columns, Table, clean, label_ids
from common.targets import check_records, columns_of, found_labels
from common.tasks import Examples, IntArray, make_task
from server.receipts import Receipts
from server.record import RunFolder
from server.rounds import Job
from simulations.partition import by_group, dirichlet, hold_out, iid

SCOPE = "records"  # what a simulated site calls its data in its ledger
_OPEN_LEDGERS = 64
_NO_LIMIT = 2**62  # characters of an image, which stands in a table as its bytes


@dataclass(frozen=True)
class Split:
    """Which records are whose. `sites[i]` are the training records of site i + 1, `held[i]` those of its
    own that it never trains on: only a simulation, which owns all the data, may look at them."""

    table: Table
    cleaning: CleaningReport
    overlap: int  # records of data.test that are training records too, and were left out of it
    labels: tuple[str, ...]
    sites: tuple[IntArray, ...]
    held: tuple[IntArray, ...]
    public: Table


def split_data(config: RunConfig) -> Split:
    """Read, clean and divide the data as `config` says; the same division each time for one seed.

    Raises:
        DataError: the data does not fit, or is too little for so many sites.
    """
    data = config.data
    columns = columns_of(data, config.task.kind, config.task.chat)
    overlap = 0
    longest = _NO_LIMIT if config.task.kind is TaskKind.IMAGE_CLASSIFICATION else data.max_characters
    table, cleaning = clean(_read(data, columns), max_characters=longest)
    labels = config.task.labels or found_labels(config.task.kind, table)
    # Every label known, or an error that names the row.
    check_records(config.task.kind, table, labels, config.task.range)
    if data.test is not None:
        # Nothing reads the groups of public records, so their file need not name them.
        public, _ = clean(read_table(data.test, replace(columns, group=None)), max_characters=longest)
        public, overlap = _without(public, table)
        check_records(config.task.kind, public, labels, config.task.range)
        kept: IntArray = np.arange(len(table))
    else:
        kept, away = hold_out(
            len(table), data.test_fraction, _rng(config, 1), groups=table.group if data.group else None
        )
        public = table.take(away)
    parts = [kept[part] for part in _divide(config, table.take(kept), labels)]
    rng = _rng(config, 3)
    sites, held = [], []
    for part in parts:
        if config.sites.holdout and len(part) > 1:
            train, away = hold_out(len(part), config.sites.holdout, rng, groups=None)
            sites.append(part[train])
            held.append(part[away])
        else:
            sites.append(part)
            held.append(part[:0])
    return Split(table, cleaning, overlap, labels, tuple(sites), tuple(held), public)


def _without(public: Table, private: Table) -> tuple[Table, int]:
    """`public` without the records that lie in `private` too: those would be measured exactly, uncharged."""

    def keys(table: Table) -> list[tuple[str, ...]]:
        parts = [column for column in (table.prompt, table.text, table.label) if column is not None]
        return list(zip(*parts, strict=True))

    known = set(keys(private))
    kept = [i for i, key in enumerate(keys(public)) if key not in known]
    if not kept:
        raise DataError(
            f"every record of {public.source} (data.test) is a training record too: public records must "
            "belong to no site"
        )
    return public.take(kept), len(public) - len(kept)


def _rng(config: RunConfig, purpose: int) -> np.random.Generator:
    return np.random.default_rng([config.run.seed, purpose])


def _read(data: DataSection, columns: Columns) -> Table:
    if data.train is not None:
        return read_table(data.train, columns)
    if data.sample is None:
        raise ConfigError("data: set exactly one of data.sample and data.train to simulate")
    try:
        sample = Sample(data.sample)
    except ValueError:
        raise ConfigError(
            f"data.sample = {data.sample!r} is not built in: expected one of {[s.value for s in Sample]}"
        ) from None
    return read_sample(sample)


def _divide(config: RunConfig, table: Table, labels: tuple[str, ...]) -> list[IntArray]:
    sites, rng = config.sites, _rng(config, 2)
    match sites.partition:
        case Partition.IID:
            return iid(len(table), sites.count, rng)
        case Partition.DIRICHLET:
            if config.task.kind not in (TaskKind.SEQUENCE_CLASSIFICATION, TaskKind.IMAGE_CLASSIFICATION):
                raise ConfigError(
                    "sites.partition = 'dirichlet' divides by label, but "
                    f"{config.task.kind.value} has no one label a record"
                )
            return dirichlet(
                label_ids(table, labels), sites.count, sites.dirichlet_alpha, rng, minimum=_minimum(config)
            )
        case Partition.GROUPS:
            if table.group is None:
                raise DataError(
                    "sites.partition = 'groups' needs data.group, the column that names the group"
                )
            return by_group(table.group, sites.count, rng)


def _minimum(config: RunConfig) -> int:
    """The fewest records with which a site can train: the public size, or one record a batch."""
    rates = [config.privacy.sample_rate] + [config.warmup.sample_rate] * bool(config.warmup.rounds)
    return config.privacy.nominal_records or math.ceil(1 / min(rates))


class Fleet:
    """All simulated sites of a run, and what they share. One of these serves a process."""

    def __init__(self, folder: RunFolder, config: RunConfig, split: Split) -> None:
        torch.set_num_threads(config.run.threads or os.cpu_count() or 1)
        self.folder = folder
        self.config = config
        self.split = split
        self.plan: Plan = make_plan(config)
        self.plan_digest = plan_digest(self.plan)
        task = make_task(config.task.kind, split.labels, config.task)
        self.model: AdaptedModel = load_model(config, task)
        self.initial = read_vector(self.model.parameters, self.model.layout)
        self.examples: Examples = task.encode(split.table, self.model.tokenizer, config.model.max_length)
        self.public: Examples = task.encode(split.public, self.model.tokenizer, config.model.max_length)
        self._features = FeatureCache()
        self._ledgers: dict[int, Ledger] = {}
        self._setting = setting_of(config, self.model)
        self._model_digest = model_digest(self.model)
        self._own_policy = policy_of_run(config, self.plan, source=SCOPE, model=self._model_digest)
        self._policy_text = self._own_policy.to_toml()
        if self.plan.private:
            for part in {r.part for r in self.plan.rounds}:
                self_test(self.model, part)

    @property
    def run_id(self) -> str:
        """A name for this run that no other run has: from the secret, which it does not tell."""
        return hashlib.sha256(b"confide/run-id/v1" + self._secret()).hexdigest()[:16]

    def _secret(self) -> bytes:
        """The 32 bytes that key the noise; of a study, a hash of its public number."""
        seed = self.config.study.noise_seed
        if seed is not None:
            return hashlib.sha256(b"confide/study-noise/v1" + seed.to_bytes(8, "little")).digest()
        try:
            secret = self.folder.secret.read_bytes()
        except OSError:
            secret = b""
        if len(secret) != KEY_BYTES:
            raise PrivacyError(
                f"{self.folder.secret} must hold the {KEY_BYTES} bytes that key the noise, found "
                f"{len(secret)}: without them the run cannot go on. Restore the file, or begin a new run"
            )
        return secret

    def _digest(self) -> str:
        """SHA-256, hex, of all that a resumed run must find as it was: setting, data, division, secret."""
        h = hashlib.sha256(b"confide/run/v1" + self._setting + self.run_id.encode())
        for indices in (*self.split.sites, *self.split.held):
            h.update(len(indices).to_bytes(8, "little") + indices.tobytes())
        for examples in (self.examples, self.public):
            for content in examples.contents(range(len(examples))):
                h.update(len(content).to_bytes(8, "little") + content)
        return h.hexdigest()

    def site(self, site_id: int) -> Site:
        secret = self._secret()
        return Site(
            site_id=site_id,
            run_id=self.run_id,
            folder=self.folder.site(site_id),
            shard=Shard(self.examples, self.split.sites[site_id - 1]),
            model=self.model,
            config=self.config,
            plan=self.plan,
            plan_digest=self.plan_digest,
            setting=self._setting,
            policy=self._policy(site_id),
            model_digest=self._model_digest,
            ledger=self.ledger(site_id) if self.plan.private else None,
            scope=SCOPE,
            noise_key=lambda context: derived_key(secret, site_id.to_bytes(4, "little"), context),
            repeatable_noise=True,
            features=self._features,
            pinned=None if self.config.study.plain_updates else self._pinned(site_id),
        )

    def _pinned(self, site_id: int) -> Pinned:
        """What this site has in its folder: the same keys and files as a deployed one."""
        folder = SiteFolder(self.folder.site(site_id))
        local_key = load_local_key(folder.local_key)
        store = FileStore(
            folder.path / "secagg.state",
            self.folder.witness(site_id, "secagg"),
            key=local_key,
            site=site_id,
            run=self.run_id.encode(),
            random_bytes=os.urandom,
        )
        return Pinned(self._identity(site_id), self.roster, store, local_key, os.urandom)

    def _policy(self, site_id: int) -> SitePolicy:
        """It allows exactly this run, unless somebody has put another policy.toml into the site's folder."""
        ledger = self.ledger(site_id) if self.plan.private else None
        path = SiteFolder(self.folder.site(site_id)).policy
        if path.exists():
            return open_policy(path, ledger, simulated=True)
        if ledger is not None:
            ledger.record_policy(self._policy_text)
        return self._own_policy

    def _identity(self, site_id: int) -> IdentityKey:
        """The site's key. Checked before a ledger is begun with it, which would be of another site for ever.

        Raises:
            ConfigError: it is not the one that the roster has for this site.
        """
        path = SiteFolder(self.folder.site(site_id)).identity
        identity = load_identity(path, None)
        if self.roster.get(site_id) != identity.public:
            raise ConfigError(f"{path} is not the key that the roster has for site {site_id}: restore it")
        return identity

    @cached_property
    def roster(self) -> Roster:
        """The public keys of all sites."""
        return load_roster(self.folder.roster, None).keys

    def ledger(self, site_id: int) -> Ledger:
        """The site's ledger, its budget opened. A few stay open: of a thousand sites each has a file."""
        if (ledger := self._ledgers.pop(site_id, None)) is None:
            while len(self._ledgers) >= _OPEN_LEDGERS:
                self._ledgers.pop(next(iter(self._ledgers))).close()
            witness = self.folder.witness(site_id, "ledger")
            ledger = Ledger(self.folder.ledger(site_id), self._identity(site_id), site_id, witness=witness)
            ledger.open_scope(
                SCOPE,
                target_epsilon=self.plan.target_epsilon,
                delta=self.plan.delta,
                planned=self.plan.events,
            )
        self._ledgers[site_id] = ledger  # the newest last
        return ledger

    def balance(self, site_id: int) -> Balance:
        """What the site has spent, by its own ledger."""
        return self.ledger(site_id).balance(SCOPE)

    def check_ledgers(self) -> None:
        """Each site's ledger must hold what the server has receipts for.

        Raises:
            LedgerError: one was lost, cut short or replaced: its site would start again with a full budget.
        """
        if not self.plan.private:
            return
        for site, receipt in Receipts(self.folder.receipts, self.roster).newest.items():
            entries = self.ledger(site).entries()
            if len(entries) < receipt.seq or entries[receipt.seq - 1].hash != receipt.hash:
                raise RolledBackError(
                    f"another ledger in {self.folder.ledger(site)} than the one of which the server has a "
                    f"receipt over {receipt.seq} entries"
                )

    def job(self) -> Job:
        return Job(
            run_id=self.run_id,
            folder=self.folder,
            config=self.config,
            config_digest=self._digest(),
            plan=self.plan,
            plan_digest=self.plan_digest,
            model=self.model,
            public=self.public,
            features=FeatureCache(),
            roster=self.roster,
            receipts=Receipts(self.folder.receipts, self.roster) if self.plan.private else None,
        )

    def scores(self, adapter: Vector) -> dict[str, float]:
        """Every metric of the task on the public records, of which some are answered in full."""
        found = dict(evaluate(self.model, adapter, self.public, np.arange(len(self.public))).scores)
        return found | self.decoded(adapter)

    def decoded(self, adapter: Vector) -> dict[str, float]:
        """Metrics of answers written in full, where the task writes any."""
        count = min(self.config.evaluation.decoded, len(self.public))
        chosen = _rng(self.config, 4).permutation(len(self.public))[:count]
        return decoded_scores(self.model, adapter, self.public, chosen, self.config.model.max_length // 2)

    def held_out(self, adapter: np.ndarray) -> dict[str, MetricSums]:
        """The adapter on what each site held out. Simulation only: a deployed site tells nobody."""
        return {
            str(i): evaluate(self.model, adapter, self.examples, held)
            for i, held in enumerate(self.split.held, start=1)
            if len(held)
        }


@lru_cache(maxsize=1)
def open_fleet(path: Path) -> Fleet:
    """The fleet of the run in `path`; one for a process, since it holds the base model."""
    folder = RunFolder(path)
    config = folder.load_config()
    return Fleet(folder, config, split_data(config))


@dataclass(frozen=True)
class SimulatedSites:
    """Finds the site of a Flower node: partition i is site i + 1. Small: Ray copies it to its actors."""

    path: Path

    def __call__(self, context: Context) -> Site:
        return open_fleet(self.path).site(int(context.node_config["partition-id"]) + 1)
