"""A folder with what was trained, as its confide.json describes it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from common.config import Head, ModelSection, TaskKind, TaskSection
from common.errors import ModelError


class Form(Enum):
    """How what was trained lies in a folder."""

    PEFT = "peft"  # the adapter alone; its base model lies elsewhere
    MERGED = "merged"  # a whole model, as transformers writes it
    GGUF = "gguf"  # a whole model in one file, as llama.cpp reads it


@dataclass(frozen=True)
class Description:
    """What confide.json says. `base` is where the weights are that the adapter, if any, is put on."""

    folder: Path
    form: Form
    section: TaskSection
    head: Head
    base: ModelSection
    pairs: bool  # it was trained on a prompt and a text
    privacy: str  # the claim, which must travel wherever the weights go
    told: dict[str, Any]

    @property
    def kind(self) -> TaskKind:
        return self.section.kind

    @property
    def name(self) -> str:
        """The run's name where the folder is the one in a run, otherwise the folder's."""
        folder = self.folder.resolve()
        return folder.parent.name if folder.name == "adapter" and folder.parent.name else folder.name


def describe(path: Path) -> Description:
    """Read confide.json of an exported folder, or of the folder `adapter` of the run at `path`.

    Raises:
        ModelError: there is none, or it says nothing that can be used.
    """
    folder = path / "adapter" if (path / "adapter" / "confide.json").is_file() else path
    try:
        told = json.loads((folder / "confide.json").read_text("utf-8"))
        form = Form(told.get("format", Form.PEFT.value))
        bounds = told.get("range")
        section = TaskSection(
            kind=TaskKind(told["task"]),
            labels=tuple(told["labels"]),
            range=None if bounds is None else tuple(bounds),
            chat=bool(told.get("chat", False)),
        )
        if form is Form.PEFT:
            adapter = json.loads((folder / "adapter_config.json").read_text("utf-8"))
            name = told.get("model") or adapter["base_model_name_or_path"]
        else:
            name = str(folder)
        base = ModelSection(name=name, gguf_file=told.get("gguf_file"), max_length=told["max_length"])
        return Description(
            folder,
            form,
            section,
            Head(told["head"]),
            base,
            bool(told.get("pairs", False)),
            str(told["privacy"]),
            told,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{path} is no adapter of a run ({type(error).__name__}): expected the folder of a run, its "
            "folder `adapter`, or one that confide export wrote, with confide.json in it"
        ) from None
