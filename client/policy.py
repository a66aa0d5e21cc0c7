"""A site's own rules, in its policy.toml: which of its data may be used, for what, within which bounds.

The server never sees them, and nothing that it sends can widen one. A bound that the file leaves out has its
default, which refuses what is unusual: with no file at all, or an empty one, nothing is allowed. The rules in
force are in the site's ledger, signed, from before the first computation under them (`open_policy`).
`client/policy_check.py` compares a round with them.
"""

from __future__ import annotations

import textwrap
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError
from pydantic.fields import FieldInfo

from common.config import Count, Fraction, NonNegative, Positive, TaskKind
from common.errors import ConfigError
from common.explain import explain, keys_of

if TYPE_CHECKING:
    from client.ledger import Ledger  # brings the accountants, which nobody needs to read a policy

Rate = Annotated[float, Field(strict=True, gt=0, le=1)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(min_length=1)]
SMALLEST_COHORT = 3  # as in common/secagg/policy.py, which takes a quarter of a second to load


@dataclass(frozen=True)
class Rule:
    """What a key says, and what its bound keeps from happening."""

    says: str
    stops: str


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(_Section):
    """A data source that may be used, with the terms under which its budget was opened in the ledger."""

    target_epsilon: Annotated[
        Positive,
        Rule(
            "ε of one record, over everything that is ever computed on this data",
            "Spending more than the ledger allows: the ledger refuses by itself. Other terms here than there "
            "mean that somebody believes in another budget, so nothing runs then.",
        ),
    ]
    delta: Annotated[
        Fraction, Rule("δ of the same guarantee", "The same: other terms than those of the ledger.")
    ]
    inherits: Annotated[
        tuple[Name, ...],
        Rule(
            "data sources that may hold some of the same records",
            "A record that gets a second budget under another name.",
        ),
    ] = ()


class Models(_Section):
    allowed: Annotated[
        tuple[Digest, ...],
        Rule(
            "digests of the models that may be trained here: frozen weights and shape of the adapter. The "
            "log names the digest that was asked for",
            "Another base model, or another adapter on it, than your people have looked at.",
        ),
    ] = ()


class Code(_Section):
    bundles: Annotated[
        tuple[Digest, ...],
        Rule(
            "hashes of the code bundles that may run here (deployed sites)",
            "Code that somebody has sent, or changed.",
        ),
    ] = ()


class RunBounds(_Section):
    tasks: Annotated[
        tuple[TaskKind, ...],
        Rule(
            "kinds of task",
            "A language model that learns to write texts like your records, where only a classifier was "
            "agreed on.",
        ),
    ] = (TaskKind.SEQUENCE_CLASSIFICATION,)
    rounds: Annotated[
        Count,
        Rule(
            "most rounds of a run, warm-up included",
            "A run that goes on for longer than anybody has planned.",
        ),
    ] = 100
    max_grad_norm: Annotated[
        Positive,
        Rule(
            "largest norm to which a record's gradient is clipped",
            "Settings that let one record move the update far. Noise grows with it, so it costs no ε: a "
            "very large one is a sign of a mistake.",
        ),
    ] = 1.0


class StepBounds(_Section):
    noise_multiplier: Annotated[
        Positive,
        Rule(
            "least noise: its standard deviation over max_grad_norm",
            "Rounds that spend the budget in a few steps with hardly any noise in each.",
        ),
    ] = 0.5
    sample_rate: Annotated[
        Rate,
        Rule(
            "largest share of the records that a step draws",
            "Losing what privacy gains from sampling: a step that reads every record hides none of them by "
            "chance.",
        ),
    ] = 0.1
    steps: Annotated[
        Count,
        Rule(
            "most steps of one round",
            "A single question that spends what was meant for many.",
        ),
    ] = 50


class WarmupBounds(StepBounds):
    """Steps that train the head alone usually read the whole site, under much more noise."""

    noise_multiplier: Annotated[
        Positive,
        Rule(
            "least noise: its standard deviation over max_grad_norm",
            "What it stops in training. Where every record is drawn the noise must be larger.",
        ),
    ] = 3.0
    sample_rate: Annotated[
        Rate,
        Rule(
            "largest share of the records that a step draws",
            "Nothing, at 1: the head alone trains here, and every record is drawn under much more noise.",
        ),
    ] = 1.0
    steps: Annotated[
        Count, Rule("most steps of one round", "A single question that spends what was meant for many.")
    ] = 50


class AggregationBounds(_Section):
    min_cohort: Annotated[
        Annotated[int, Field(strict=True, ge=SMALLEST_COHORT)],
        Rule(
            "fewest sites in a sum",
            "A sum of so few sites that the others can subtract their own part and read yours. Without "
            "secure aggregation there is no sum, so that is refused as well, but in a study.",
        ),
    ] = SMALLEST_COHORT
    c_max: Annotated[
        Annotated[int, Field(strict=True, ge=0)],
        Rule(
            "fewest sites that may collude with the server and still learn nothing",
            "A run in which one dishonest partner is enough to help the server read your update.",
        ),
    ] = 0


class MetricsBounds(_Section):
    allowed: Annotated[
        StrictBool,
        Rule(
            "whether noised numbers about your own records may join the sum: how many there are, how many "
            "were right, their loss",
            "Statistics of your records, however private, that nobody here has agreed to publish.",
        ),
    ] = False
    by_label: Annotated[
        StrictBool, Rule("whether also for each label apart", "Publishing how your records divide by label.")
    ] = False
    noise_multiplier: Annotated[
        NonNegative, Rule("least noise on them", "Statistics that spend much of the budget in every round.")
    ] = 16.0


class StudySwitches(_Section):
    """Only a simulation says yes here, of sites that it owns. A site's own file cannot."""

    insecure_no_privacy: Annotated[
        StrictBool,
        Rule("training without clipping, noise and ledger", "A run that keeps nothing of your records back."),
    ] = False
    plain_updates: Annotated[
        StrictBool,
        Rule("sending an update in the clear", "A server that asks for your update alone."),
    ] = False
    noise_seed: Annotated[
        StrictBool,
        Rule("noise keyed by a number that is public", "Noise that anybody can subtract."),
    ] = False


class SitePolicy(_Section):
    """Everything that a site allows. The constructor's defaults allow nothing."""

    sources: Mapping[Name, Source] = {}
    models: Models = Models()
    code: Code = Code()
    run: RunBounds = RunBounds()
    training: StepBounds = StepBounds()
    warmup: WarmupBounds = WarmupBounds()
    aggregation: AggregationBounds = AggregationBounds()
    metrics: MetricsBounds = MetricsBounds()
    study: StudySwitches = StudySwitches()

    def to_toml(self) -> str:
        """The whole policy with a comment above each key; `parse_policy` reads the same policy from it."""
        return "\n".join(_document(self))


STRICT = SitePolicy()

_HEADER = """\
# What this site allows. The server never sees this file, and nothing that it sends can widen a bound.
# A key that is left out has the strict default that `confide client policy --explain` shows.
# After a change: confide client policy FOLDER --set FOLDER/policy.toml, which signs it into the ledger.
"""
_SECTIONS = {
    "models": "Models. None until your people have approved one.",
    "code": "Code",
    "run": "Bounds of a whole run",
    "training": "Bounds of a step, where the adapter trains",
    "warmup": "Bounds of a step in warm-up rounds, where only the head trains",
    "aggregation": "Secure aggregation",
    "metrics": "Metrics of your own records",
    "study": "Studies. A simulation may say yes here; in a site's own file these must stay false.",
}


# Reading


def parse_policy(text: str, source: str, *, simulated: bool = False) -> SitePolicy:
    """Validate `text`, which errors call `source`. simulated: whether a simulation has written it.

    Raises:
        ConfigError: naming the key, what was found and the nearest right key.
    """
    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{source} is not valid TOML: {error!s:.200}") from None
    try:
        policy = SitePolicy.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain(error, source, ["sources", *keys_of(SitePolicy), *_names(data)])) from None
    said = [f"study.{key}" for key, value in policy.study if value]
    if said and not simulated:
        raise ConfigError(
            f"{said[0]} must be false in {source}, found true: only a simulation may say otherwise, of sites "
            "that it owns. Remove the line"
        )
    return policy


def _names(data: dict[str, Any]) -> Iterator[str]:
    """The right keys of each data source that `data` names."""
    sources = data.get("sources")
    for name in sources if isinstance(sources, dict) else ():
        yield from (f"sources.{name}.{key}" for key in Source.model_fields)


def read_text(path: Path) -> str:
    """The bytes of `path` as text, unchanged, so that what is recorded is what is there.

    Raises:
        ConfigError: there is no such file, or it is not UTF-8.
    """
    if not path.is_file():
        raise ConfigError(f"no policy at {path}: expected a TOML file")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def open_policy(path: Path, ledger: Ledger | None, *, simulated: bool = False) -> SitePolicy:
    """The rules in `path`, in force from now on: recorded in the ledger, if they are others than before.

    Without a file they are the strict defaults, which allow nothing. ledger: None in a study without one.

    Raises:
        ConfigError: the file is no policy. LedgerError: it could not be recorded; nothing may run then.
    """
    text = read_text(path) if path.exists() else STRICT.to_toml()
    policy = parse_policy(text, str(path), simulated=simulated)
    if ledger is not None:
        ledger.record_policy(text)
    return policy


# Explaining


@dataclass(frozen=True)
class Explained:
    """One key of a policy, for people. default: None where there is none."""

    key: str
    value: Any
    default: Any
    says: str
    stops: str


def explained(policy: SitePolicy) -> Iterator[Explained]:
    """Every key, in the order of the file."""
    plain, strict = policy.model_dump(mode="json"), STRICT.model_dump(mode="json")
    for name in policy.sources:
        for key, field in Source.model_fields.items():
            rule, default = _rule(field), None if field.is_required() else list(field.default)
            value = plain["sources"][name][key]
            yield Explained(f"sources.{name}.{key}", value, default, rule.says, rule.stops)
    for section, key, field in _bounds():
        rule = _rule(field)
        yield Explained(f"{section}.{key}", plain[section][key], strict[section][key], rule.says, rule.stops)


def _bounds() -> Iterator[tuple[str, str, FieldInfo]]:
    for section in _SECTIONS:
        for key, field in type(getattr(STRICT, section)).model_fields.items():
            yield section, key, field


def _rule(field: FieldInfo) -> Rule:
    return next(found for found in field.metadata if isinstance(found, Rule))


def _document(policy: SitePolicy) -> Iterator[str]:
    data = policy.model_dump(mode="json")
    yield _HEADER
    yield "# Data sources: one table for each, with the terms that `confide client scope` opened it with."
    if not policy.sources:
        yield "#   [sources.NAME]"
        for key, field in Source.model_fields.items():
            example = {"target_epsilon": "3.0", "delta": "1e-5", "inherits": "[]"}[key]
            yield f"#   {key} = {example}  # {_rule(field).says}"
    for name, source in data["sources"].items():
        yield tomli_w.dumps({"sources": {name: source}}).strip()
    last = ""
    for section, key, field in _bounds():
        if section != last:
            yield f"\n# {_SECTIONS[section]}\n[{section}]"
            last = section
        yield from textwrap.wrap(_rule(field).says, 100, initial_indent="# ", subsequent_indent="# ")
        yield tomli_w.dumps({key: data[section][key]}).strip()
    yield ""
