"""`site.toml`: where a site's records lie, which data source they are, and how this machine runs the model.

What a job says of its columns and its device is a proposal: a site's own file comes first.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.config import Count, DataSection, RunConfig
from common.errors import ConfigError
from common.explain import explain, keys_of

Name = Annotated[str, Field(min_length=1)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SiteData(_Section):
    """A column that is left out has the name that the job proposes."""

    source: Name  # the data source whose budget the ledger keeps: confide client scope
    train: Path  # csv, tsv, jsonl, parquet or a `datasets` folder
    text: Name | None = None
    label: str | None = None  # "": none
    prompt: str | None = None  # "": none
    start: Name | None = None
    template: str | None = None  # "": none, as where the text is named here
    max_characters: Count | None = None


class Machine(_Section):
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    threads: Annotated[int, Field(strict=True, ge=0)] = 0  # of torch; 0: all cores
    poll_seconds: Annotated[float, Field(ge=0.1, le=60, allow_inf_nan=False)] = (
        1.0  # between questions to the server while nothing is going on
    )


class SiteSettings(_Section):
    data: SiteData
    machine: Machine = Machine()

    def applied_to(self, config: RunConfig) -> RunConfig:
        """The job's configuration with this site's records and machine. The plan does not depend on them.

        Raises:
            ConfigError: these columns do not fit the job's task.
        """
        own = self.data.model_dump(exclude={"source"}, exclude_none=True)
        if "text" in own:
            own.setdefault("template", None)
        own |= {name: None for name in ("label", "prompt", "template") if own.get(name) == ""}
        data: DataSection = config.data.model_copy(update=own)
        run = config.run.model_copy(update=self.machine.model_dump(exclude={"poll_seconds"}))
        applied = config.model_copy(update={"data": data, "run": run})
        if fault := applied.misfit():
            raise ConfigError(f"{fault} (the job's task, with the columns of this site's settings)")
        return applied


TEMPLATE = """\
# This site's own settings. Nothing here is ever sent.

[data]
source = "records"            # your name for them: confide client scope FOLDER records ...
train = "records.jsonl"       # csv, tsv, jsonl, parquet or a `datasets` folder; relative to this file
# text = "text"               # columns, where they have other names than the job proposes
# label = "label"
# prompt = "prompt"           # "": this site has none

[machine]
device = "auto"               # auto, cpu, cuda, cuda:1
threads = 0                   # of torch; 0: all cores
poll_seconds = 1.0            # between questions to the server while nothing is going on
"""


def load_settings(path: Path) -> SiteSettings:
    """Read `path`; a relative data.train is relative to its folder.

    Raises:
        ConfigError: naming the key, what was found and the nearest right key.
    """
    if not path.is_file():
        raise ConfigError(f"no settings at {path}: expected a TOML file, as confide client join leaves one")
    try:
        data = tomllib.loads(path.read_text("utf-8"))
        found = SiteSettings.model_validate(data)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error!s:.200}") from None
    except ValidationError as error:
        raise ConfigError(explain(error, str(path), keys_of(SiteSettings))) from None
    where = path.resolve().parent / found.data.train.expanduser()
    return found.model_copy(update={"data": found.data.model_copy(update={"train": where})})
