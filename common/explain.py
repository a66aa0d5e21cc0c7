"""What is wrong with a settings file, in words: key, file, what was found, and the nearest right key."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from pydantic import BaseModel, ValidationError


def keys_of(model: type[BaseModel]) -> list[str]:
    """The sections of `model`, and `section.key` of each."""
    found = []
    for name, field in model.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            found += [name, *(f"{name}.{key}" for key in section.model_fields)]
    return found


def explain(error: ValidationError, source: str, keys: Sequence[str]) -> str:
    """What is wrong in `source`, a line for each key; `keys` are the right ones."""
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"]) or "configuration"
        match item["type"]:
            case "extra_forbidden":
                longer = [right for right in keys if right.startswith(key)]
                near = longer or difflib.get_close_matches(key, keys, n=1, cutoff=0.3)
                hint = f"; did you mean {near[0]}?" if near else ""
                lines.append(f"unknown key {key}{hint}")
            case "missing":
                lines.append(f"{key} is missing: set it")
            case "value_error":
                lines.append(str(item["ctx"]["error"]))
            case _:
                found = repr(item["input"])
                found = found if len(found) <= 60 else found[:57] + "..."
                lines.append(f"{key}: {item['msg'][0].lower()}{item['msg'][1:]}, found {found}")
    return "\n".join(f"{line} (in {source})" for line in lines[:10])
