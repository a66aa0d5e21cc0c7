"""A recipe: the steps that tidy a data file, in order, as TOML that people write and read.

[[step]]
do = "drop-long"
characters = 4000
"""

from __future__ import annotations

import codecs
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from client.data.near import SIMILARITY
from client.data.personal import Personal
from common.cells import listed, nearest, short
from common.errors import ConfigError, PrivacyError


class StepKind(Enum):
    """What a step does; the value names it in a recipe. `options`: those it takes, and needs."""

    DECODE = ("decode", ("encoding",))  # lines that are not UTF-8 are read in this encoding
    DROP_UNREADABLE = ("drop-unreadable", ())
    FIX_MOJIBAKE = ("fix-mojibake", ())
    STRIP_INVISIBLE = ("strip-invisible", ())  # control characters, and what has no width
    STRIP_HTML = ("strip-html", ())
    NORMALISE_UNICODE = ("normalise-unicode", ())  # to NFC
    COLLAPSE_SPACE = ("collapse-space", ())
    MASK = ("mask", ("kinds",))  # personal data, by rules
    MAP_LABELS = ("map-labels", ("map",))
    DROP_EMPTY = ("drop-empty", ())
    DROP_LONG = ("drop-long", ("characters",))  # prompt and text together
    DROP_CONFLICTS = ("drop-conflicts", ())  # all records of a text that has several labels
    DROP_DUPLICATES = ("drop-duplicates", ())  # but the first
    DROP_NEAR_DUPLICATES = ("drop-near-duplicates", ("similarity",), False)  # but the first
    DROP_IN_TEST = ("drop-in-test", ())  # what the public evaluation set has, too
    CAP_PERSON = ("cap-person", ("records",))  # chosen by a hash of the record, not by order

    def __init__(self, label: str, options: tuple[str, ...], needed: bool = True) -> None:
        self.label = label
        self.options = options
        self.needed = needed


@dataclass(frozen=True)
class Step:
    """One step; options that its kind does not take keep their defaults, unused."""

    kind: StepKind
    encoding: str = "utf-8"
    kinds: tuple[Personal, ...] = ()
    map: Mapping[str, str] = field(default_factory=dict)
    characters: int = 0
    similarity: float = SIMILARITY
    records: int = 0

    def to_json(self) -> dict[str, Any]:
        """As it stands in a recipe, defaults filled in."""
        values: dict[str, Any] = {
            **{name: getattr(self, name) for name in self.kind.options},
            **({"kinds": [kind.label for kind in self.kinds]} if "kinds" in self.kind.options else {}),
            **({"map": dict(self.map)} if "map" in self.kind.options else {}),
        }
        return {"do": self.kind.label, **values}


_AUGMENTATION = (
    "augmentation is refused. To training a copy is a record of its own, so whoever has c copies is covered "
    "only at c times ε. Copies that count as one record would have to be averaged into the record's gradient "
    "before it is clipped (De et al. 2022, 2204.13650), inside training; a file cannot say that. Leave the "
    "step out."
)


def load_recipe(path: Path) -> tuple[Step, ...]:
    """The steps of a recipe, at least one.

    Raises:
        ConfigError: it is not there, no TOML, or a step or an option is unknown, missing or wrong.
        PrivacyError: it asks for augmented copies.
    """
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no recipe at {path}: --propose writes one") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    steps = data.pop("step", [])
    if data or not isinstance(steps, list) or not steps or not all(isinstance(one, dict) for one in steps):
        found = listed(list(data)) if data else "no step"
        raise ConfigError(f'{path}: expected a list of steps, each as [[step]] with do = "…"; found {found}')
    return tuple(_step(one, f"{path}, step {i}") for i, one in enumerate(steps, start=1))


def _step(given: dict[str, Any], where: str) -> Step:
    by_name = {kind.label: kind for kind in StepKind}
    name = given.get("do")
    if isinstance(name, str) and name.startswith("augment"):
        raise PrivacyError(f"{where}: {_AUGMENTATION}")
    if name not in by_name:
        near = nearest(str(name), list(by_name))
        hint = f"Did you mean {short(near)}?" if near else f"There are {', '.join(by_name)}."
        found = "none" if name is None else short(str(name))
        raise ConfigError(f"{where}: do must name a step, found {found}. {hint}")
    kind = by_name[name]
    for option in given:
        if option != "do" and option not in kind.options:
            near = nearest(option, list(kind.options))
            hint = f" Did you mean {near}?" if near else f" It takes {', '.join(kind.options) or 'none'}."
            raise ConfigError(f"{where}: {name} takes no option {short(option)}.{hint}")
    for option in kind.options:
        if kind.needed and option not in given:
            raise ConfigError(f"{where}: {name} needs the option {option}")
    return Step(kind, **{option: _value(option, given[option], where) for option in given if option != "do"})


def _value(option: str, value: Any, where: str) -> Any:
    def wrong(expected: str) -> ConfigError:
        return ConfigError(f"{where}: {option} must be {expected}, found {short(str(value))}")

    match option:
        case "encoding":
            try:
                return codecs.lookup(str(value)).name
            except LookupError:
                raise wrong('the name of an encoding, such as "windows-1252"') from None
        case "kinds":
            names = {kind.label: kind for kind in Personal}
            if not isinstance(value, list) or not value or not set(map(str, value)) <= set(names):
                raise wrong(f"a list of {', '.join(names)}")
            return tuple(names[name] for name in dict.fromkeys(value))
        case "map":
            if (
                not isinstance(value, dict)
                or not value
                or not all(isinstance(to, str) for to in value.values())
            ):
                raise wrong('a table of labels, such as { "Fresh" = "fresh" }')
            if both := [to for to in value.values() if value.get(to, to) != to]:
                raise wrong(
                    f"a table in which no label leads on: {short(both[0])} stands on both sides; it is"
                )
            if not all(to.strip() for to in value.values()):
                raise wrong("a table without empty labels")
            return dict(value)
        case "similarity":
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0.5 <= value <= 1:
                raise wrong("a number from 0.5 to 1")
            return float(value)
        case _:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise wrong("a whole number >= 1")
            return value
