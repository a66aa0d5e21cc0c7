"""The configuration of a run: one TOML file, frozen and validated, every key overridable.

Each key says here what it means, its unit and its default; `confide simulate --dry-run` prints the plan
that follows from it. Unknown keys and wrong types are errors that name the key and the nearest right one.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import tomli_w
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    field_validator,
    model_validator,
)

from common.errors import ConfigError
from common.explain import explain, keys_of
from common.kinds import TaskKind as TaskKind
from common.kinds import misfit

Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Fraction = Annotated[float, Field(strict=True, gt=0, lt=1)]
Count = Annotated[int, Field(strict=True, ge=1)]


class Head(Enum):
    DEFAULT = "default"  # transformers' own head
    MEAN = "mean"  # mean pooling over tokens, then one linear layer of ours


class AdapterMethod(Enum):
    FFA = "ffa"  # A frozen at its seeded start, B trained: aggregates exactly
    ROLORA = "rolora"  # A and B trained in alternate rounds: aggregates exactly
    LORA = "lora"  # both at once: mean(B)·mean(A) is not mean(B·A), so aggregation is inexact


class Partition(Enum):
    IID = "iid"
    DIRICHLET = "dirichlet"
    GROUPS = "groups"


class Unit(Enum):
    RECORD = "record"


class Trust(Enum):
    LOCAL = "local"


class LocalOptimizer(Enum):
    SGD = "sgd"
    ADAM = "adam"


class ServerOptimizer(Enum):
    FEDAVG = "fedavg"
    FEDAVGM = "fedavgm"
    FEDADAM = "fedadam"
    FEDYOGI = "fedyogi"


class Engine(Enum):
    """How simulated sites run. Not part of a run's configuration: it changes no number."""

    INLINE = "inline"
    RAY = "ray"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RunSection(_Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = "run"
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**63)] = (
        0  # partition, adapter start, cohorts. Never the noise.
    )
    rounds: Count = 10  # in which the adapter trains; warmup.rounds come before
    threads: Annotated[int, Field(strict=True, ge=0)] = (
        0  # torch threads; 0: all cores. Kept, since sums depend on it.
    )
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    checkpoints: Count = 3  # how many of the newest checkpoints are kept


class TaskSection(_Section):
    kind: TaskKind = TaskKind.SEQUENCE_CLASSIFICATION
    labels: tuple[str, ...] = ()  # names of classes or tags; empty: those found in the training data
    class_weights: tuple[Positive, ...] = ()  # public; of each label's loss, in the order of labels
    range: tuple[Finite, Finite] | None = None  # regression: public bounds of its numbers
    chat: StrictBool = False  # causal-lm: records are conversations, written by the model's chat template


class ModelSection(_Section):
    name: str  # a folder, a hub id, or sample:all-minilm-l6-v2
    gguf_file: str | None = None  # a GGUF file inside that folder
    head: Head = Head.DEFAULT
    max_length: Annotated[int, Field(strict=True, ge=8)] = 128  # tokens kept of a record
    allow_pickle: StrictBool = False  # weights only in .bin files run code when loaded: off


class AdapterSection(_Section):
    method: AdapterMethod = AdapterMethod.FFA
    rank: Count = 8
    alpha: Positive = 16.0
    dropout: Annotated[float, Field(strict=True, ge=0, lt=1)] = 0.0
    target_modules: tuple[str, ...] = ()  # empty: attention's query and value, by architecture
    layers: tuple[int, ...] = ()  # indices of adapted layers, negative from the end; empty: all
    train_head: StrictBool = True


class DataSection(_Section):
    sample: str | None = None  # a built-in sample: rotten-tomatoes
    train: Path | None = None  # csv, tsv, jsonl, parquet (also .gz, .bz2, .xz) or a `datasets` folder
    test: Path | None = None  # the server's public evaluation set; none: test_fraction of train
    text: str = "text"  # column names
    label: str | None = "label"  # "": none
    prompt: str | None = None
    start: str | None = None  # question-answering: where the answer begins; none: where it first occurs
    template: str | None = None  # the text from several columns: "age {age}, trade {trade}"
    group: str | None = None
    test_fraction: Fraction = 0.2  # held out as public evaluation set, by whole groups where group is set
    max_characters: Count = 20_000  # longer records are left out

    @field_validator("label", "prompt", mode="before")
    @classmethod
    def _no_column(cls, value: object) -> object:
        return None if value == "" else value


class SitesSection(_Section):
    count: Annotated[int, Field(strict=True, ge=1)] = 8
    partition: Partition = Partition.IID
    dirichlet_alpha: Positive = 0.5
    holdout: Annotated[float, Field(strict=True, ge=0, lt=1)] = (
        0.0  # of each site, never trained on; simulation only
    )
    dropout: Annotated[float, Field(strict=True, ge=0, lt=1)] = (
        0.0  # chance that a site drops out, in each of the five exchanges; simulation only
    )


class PrivacySection(_Section):
    unit: Unit = Unit.RECORD
    trust: Trust = Trust.LOCAL
    target_epsilon: Positive = 8.0  # of one site over all rounds
    delta: Annotated[float, Field(strict=True, ge=1e-30, lt=1)] | None = (
        None  # none: see common.privacy.default_delta
    )
    sample_rate: Annotated[float, Field(strict=True, gt=0, le=1)] = (
        0.05  # of Poisson sampling; public, one for all sites
    )
    max_grad_norm: Positive = 0.5
    noise_multiplier: Positive | None = None  # none: calibrated to target_epsilon
    nominal_records: Count | None = None  # published records of a site; none: read from the data
    read_from_data: tuple[str, ...] = ()  # keys that were: filled in, not set. Taken as public.
    insecure_disabled: StrictBool = False  # study only: no clipping, no noise, no claim


class WarmupSection(_Section):
    """Rounds before the others in which only the mean-pooled head trains, on features computed once.

    Probing first, then tuning: a head at its random start sends noise into the adapter (Kumar et al.
    2022, 2202.10054), and under DP head-only steps are cheap: few parameters, whole-site batches.
    """

    rounds: Annotated[int, Field(strict=True, ge=0)] = 0
    local_steps: Count = 10
    learning_rate: Positive = 12.0
    momentum: Annotated[float, Field(strict=True, ge=0, lt=1)] = 0.8  # of local SGD, within one round
    sample_rate: Annotated[float, Field(strict=True, gt=0, le=1)] = 1.0
    target_epsilon: Positive = 2.0  # of privacy.target_epsilon, what the warm-up alone may spend
    noise_multiplier: Positive | None = None  # none: calibrated to warmup.target_epsilon


class TrainingSection(_Section):
    local_steps: Count = 3
    learning_rate: Positive = 1.0
    optimizer: LocalOptimizer = LocalOptimizer.SGD
    momentum: Annotated[float, Field(strict=True, ge=0, lt=1)] = 0.0  # of local SGD, within one round
    fedprox_mu: NonNegative = 0.0
    micro_batch: Count = 32  # records in one forward pass; no influence on the result but rounding


class ServerSection(_Section):
    optimizer: ServerOptimizer = ServerOptimizer.FEDAVG
    learning_rate: Positive = 1.0
    momentum: Annotated[float, Field(strict=True, ge=0, lt=1)] = (
        0.9  # FedAvgM; first moment of FedAdam and FedYogi
    )
    beta2: Annotated[float, Field(strict=True, ge=0, lt=1)] = 0.99
    tau: Positive = 1e-3  # adaptivity, Reddi et al. 2021
    fraction: Annotated[float, Field(strict=True, gt=0, le=1)] = 1.0  # of the live sites, asked in a round
    deadline_seconds: Positive = 3600.0  # of training, for a site
    give_up_after: Annotated[int, Field(strict=True, ge=0)] = (
        3  # rounds on end without a sum, then the run stops; 0: never
    )


class RingBits(Enum):
    """Bits of a word of a masked vector. 16 halve the upload and round a thousand times more coarsely."""

    B32 = 32
    B16 = 16


class AggregationSection(_Section):
    """Secure aggregation: the server learns sums over at least min_cohort sites, and nothing smaller."""

    min_cohort: Count | None = None  # fewest sites in a sum; none: 3 (2 with plain updates)
    c_max: Annotated[int, Field(strict=True, ge=0)] | None = (
        None  # sites that may collude with the server; none: (min_cohort - 1) // 3, which is the most
    )
    ring_bits: RingBits = RingBits.B32
    clip: Positive | None = None  # of each number of an update; none: what clipping, steps and noise allow
    deadline_seconds: Positive = 300.0  # of each of the five exchanges
    attempts: Count = 3  # in a round, as long as no masked vector was sent


class MetricsSection(_Section):
    """Metrics on sites' own records, summed under the same masks, noised, and charged like training."""

    enabled: StrictBool = False
    noise_multiplier: Positive = 16.0  # of the sums; a record's contribution has norm 1
    sample_rate: Annotated[float, Field(strict=True, gt=0, le=1)] = 1.0  # of Poisson sampling
    loss_clip: Positive = 4.0  # of one record's loss
    by_label: StrictBool = False  # also for each label apart; classification


class EvaluationSection(_Section):
    every: Annotated[int, Field(strict=True, ge=0)] = (
        1  # rounds between evaluations; 0: only before and after
    )
    records: Annotated[int, Field(strict=True, ge=0)] = (
        0  # of an evaluation between; 0: all. Before and after: all.
    )
    decoded: Annotated[int, Field(strict=True, ge=0)] = (
        32  # public records that a generating model answers in full, before and after
    )


class StudySection(_Section):
    noise_seed: Annotated[int, Field(strict=True, ge=0, lt=2**63)] | None = (
        None  # repeatable noise: not private, stamps the report
    )
    plain_updates: StrictBool = False  # no secure aggregation: the server sees each update


class RunConfig(_Section):
    """Everything that a run depends on. See each section's keys."""

    run: RunSection = RunSection()
    task: TaskSection = TaskSection()
    model: ModelSection
    adapter: AdapterSection = AdapterSection()
    data: DataSection
    sites: SitesSection = SitesSection()
    privacy: PrivacySection = PrivacySection()
    warmup: WarmupSection = WarmupSection()
    training: TrainingSection = TrainingSection()
    server: ServerSection = ServerSection()
    aggregation: AggregationSection = AggregationSection()
    metrics: MetricsSection = MetricsSection()
    evaluation: EvaluationSection = EvaluationSection()
    study: StudySection = StudySection()

    @model_validator(mode="after")
    def _fits_together(self) -> RunConfig:
        if self.data.sample is not None and self.data.train is not None:
            raise ValueError("data: set exactly one of data.sample and data.train")
        if self.task.chat and self.data.sample is not None:
            raise ValueError("task.chat: data.sample is no conversations: set data.train")
        if fault := self.misfit():
            raise ValueError(fault)
        if self.sites.partition is Partition.GROUPS and self.data.group is None:
            raise ValueError("sites.partition: 'groups' needs data.group, the column that names the group")
        if self.model.head is Head.MEAN and not self.adapter.train_head:
            raise ValueError("adapter.train_head: a mean-pooled head starts at zero, so it must train")
        if self.warmup.rounds:
            if self.model.head is not Head.MEAN or not self.adapter.train_head:
                raise ValueError("warmup.rounds: a warm-up needs model.head = 'mean' and adapter.train_head")
            if self.warmup.target_epsilon >= self.privacy.target_epsilon:
                raise ValueError(
                    "warmup.target_epsilon: must be less than privacy.target_epsilon = "
                    f"{self.privacy.target_epsilon}, found {self.warmup.target_epsilon}"
                )
        if self.metrics.by_label and self.task.kind is not TaskKind.SEQUENCE_CLASSIFICATION:
            raise ValueError("metrics.by_label: only sequence-classification has labels")
        return self

    def misfit(self) -> str | None:
        """What of it does not fit its kind of task; `None` where all does."""
        return misfit(
            self.task.kind,
            labels=self.task.labels,
            class_weights=self.task.class_weights,
            range_=self.task.range,
            chat=self.task.chat,
            label=self.data.label,
            prompt=self.data.prompt,
            template=self.data.template,
            mean_head=self.model.head is Head.MEAN,
        )

    def to_toml(self) -> str:
        """The complete configuration; keys that are not set are left out, since TOML has no null."""
        data = self.model_dump(mode="json", exclude_none=True)
        if self.data.label is None:
            data["data"]["label"] = ""  # TOML has no null, and the default is a column
        return tomli_w.dumps(data)

    def digest(self) -> bytes:
        """SHA-256 of the configuration in canonical JSON."""
        data = self.model_dump(mode="json")
        if not self.task.chat:
            del data["task"]["chat"]  # runs that began before there was this key go on
        text = json.dumps(data, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(b"confide/config/v1" + text.encode()).digest()


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read `path`, apply `section.key=value` overrides, validate.

    Relative paths in the file are relative to the file.

    Raises:
        ConfigError: naming key, file, what was found and the nearest right key.
    """
    if not path.is_file():
        raise ConfigError(f"no configuration at {path}: expected a TOML file")
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    for override in overrides:
        _apply(data, override)
    return parse_config(data, source=str(path), base=path.resolve().parent)


def refuse_study(config: RunConfig) -> None:
    """Study switches come from the command line alone, so that no file can turn privacy off unseen.

    Raises:
        ConfigError: the configuration sets one.
    """
    study = config.study
    if config.privacy.insecure_disabled or study.noise_seed is not None or study.plain_updates:
        raise ConfigError(
            "privacy.insecure_disabled, study.noise_seed and study.plain_updates cannot be set in a file or "
            "by --set: give --insecure-no-privacy, --study-noise-seed or --insecure-plain-updates on the "
            "command line"
        )


def parse_config(data: dict[str, Any], *, source: str, base: Path | None = None) -> RunConfig:
    """Validate `data` as a RunConfig; `source` is named in errors, relative paths are resolved on `base`."""
    try:
        config = RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain(error, source, keys_of(RunConfig))) from None
    if base is None:
        return config
    paths = {
        key: (base / value).resolve()
        for key in ("train", "test")
        if (value := getattr(config.data, key)) is not None
    }
    model = config.model
    if not model.name.startswith("sample:") and (base / model.name).is_dir():
        model = model.model_copy(update={"name": str((base / model.name).resolve())})
    return config.model_copy(update={"data": config.data.model_copy(update=paths), "model": model})


def _apply(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or len(parts) != 2 or not all(parts):
        raise ConfigError(f"--set expects section.key=value, found {override!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word is a string
    section = data.setdefault(parts[0], {})
    if not isinstance(section, dict):
        raise ConfigError(f"--set {override}: {parts[0]} is not a section of the configuration")
    section[parts[1]] = value
