"""What was trained, handed on: the adapter as it is, merged into its base, or as one GGUF file.

A whole model is read back before it counts as written, and must give the adapter's own logits. The card and
the privacy claim go wherever the weights go.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers.utils import cached_file

from common.config import Head, TaskKind
from common.errors import ConfigError, ModelError
from common.exported import Description, Form, describe
from common.gguf_file import write_gguf
from common.models import AdaptedModel, load_tokenizer, model_path
from common.prediction import Predictor, open_adapter
from common.tasks import Batch, collate

TOLERANCE = 1e-4  # logits may differ by this much of the largest one; of small ones, by this much
_GGUF = "model.gguf"
_TEXTS = ("Is this 1 text, or 42?", "It's naïve: 北京 🙂\n\n  two  lines\t", "some text")


@dataclass(frozen=True)
class Released:
    """`difference`: the most that a logit moved on made-up records; None where no weight was touched."""

    folder: Path
    form: Form
    difference: float | None
    privacy: str


def release(source: Path, target: Path, form: Form) -> Released:
    """Write the folder `target`, whole or not at all. `source`: a run's folder, or an adapter's.

    Raises:
        ConfigError: `target` is there already, or cannot be made.
        ModelError: `source` holds no adapter, or the model as written does not give its logits.
    """
    described = describe(source)
    if described.form is not Form.PEFT:
        raise ModelError(
            f"{source} is {described.form.value} already: expected an adapter, as a run leaves it"
        )
    _check_target(target, described.folder)
    predictor = open_adapter(described.folder, "cpu")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ConfigError(
            f"cannot write to {target.parent} ({error.strerror}): choose another --to"
        ) from None
    try:
        difference = None
        if form is Form.PEFT:
            shutil.copytree(described.folder, temporary, dirs_exist_ok=True)
        else:
            difference = _write_whole(predictor, form, temporary)
        temporary.chmod(0o755)
        temporary.rename(target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(temporary)
    return Released(target, form, difference, described.privacy)


def _check_target(target: Path, source: Path) -> None:
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{target} is there already: remove it, or choose another --to")
    if target.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"{target} lies inside the adapter {source}: choose a --to outside it")


def _write_whole(predictor: Predictor, form: Form, folder: Path) -> float:
    """The model with the adapter merged into it; how far its logits are from those of the two."""
    described, model = predictor.described, predictor.model
    if form is Form.GGUF and described.kind is not TaskKind.CAUSAL_LM:
        raise ModelError(
            f"--format gguf is for causal-lm, this adapter is of {described.kind.value}: use --format merged"
        )
    batch = _made_up(model)
    wanted = _logits(model, batch)
    if not isinstance(model.peft, PeftModel):
        raise ModelError(f"{described.folder} holds no adapter")
    base: Any = model.peft.merge_and_unload()
    _name_labels(base.config, described)
    if getattr(base, "hf_quantizer", None) is not None:
        base.hf_quantizer.remove_quantization_config(base)  # of a GGUF base, whose weights are 32-bit by now
    if form is Form.GGUF:
        gguf_base = described.base.gguf_file
        tokenizer_of = (
            Path(cached_file(model_path(described.base.name), gguf_base)) if gguf_base is not None else None
        )
        write_gguf(
            base,
            model.tokenizer,
            folder / _GGUF,
            name=described.name,
            description=described.privacy,
            tokenizer_of=tokenizer_of,
        )
    else:
        base.save_pretrained(str(folder), safe_serialization=True)
        if model.head is not None:
            save_file(
                {n: p.contiguous() for n, p in model.head.state_dict().items()}, folder / "head.safetensors"
            )
    model.tokenizer.save_pretrained(str(folder))
    told = {
        **described.told,
        "format": form.value,
        "model": described.base.name,  # where it came from; the weights are here
        "gguf_file": _GGUF if form is Form.GGUF else None,
    }
    (folder / "confide.json").write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", "utf-8")
    (folder / "README.md").write_text(_card(described, form), "utf-8")
    difference = _compared(wanted, _logits(open_adapter(folder, "cpu").model, batch))
    if form is Form.GGUF:
        _check_tokenizer(model, described, folder)
    return difference


def _made_up(model: AdaptedModel) -> Batch:
    """Three records of nobody, as pairs of texts where the model tells these apart."""
    examples = model.task.made_up(np.random.default_rng(0), model.tokenizer)
    batch = collate(examples, range(len(examples)), model.pad_id, model.device)
    if "token_type_ids" in getattr(model.tokenizer, "model_input_names", ()):
        batch.inputs["token_type_ids"] = (batch.inputs["attention_mask"].cumsum(dim=1) > 2).long()
    return batch


@torch.no_grad()
def _logits(model: AdaptedModel, batch: Batch) -> torch.Tensor:
    return model.logits(batch.inputs).float()


def _compared(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """The largest difference.

    Raises:
        ModelError: it is beyond TOLERANCE, or the logits are of another shape.
    """
    if wanted.shape != found.shape:
        raise ModelError(
            f"the model as written answers with shape {tuple(found.shape)}, the adapter on its base with "
            f"{tuple(wanted.shape)}: nothing was written"
        )
    difference = float((wanted - found).abs().max())
    allowed = TOLERANCE * max(1.0, float(wanted.abs().max()))
    if not difference <= allowed:
        raise ModelError(
            f"the model as written does not give the adapter's logits: they differ by {difference:.2g}, more "
            f"than {allowed:.2g}. Nothing was written: use --format peft"
        )
    return difference


def _check_tokenizer(model: AdaptedModel, described: Description, folder: Path) -> None:
    """The tokenizer inside the file reads as the adapter's does: read where no other lies beside it."""
    with tempfile.TemporaryDirectory() as alone:
        (Path(alone) / _GGUF).symlink_to((folder / _GGUF).resolve())
        section = described.base.model_copy(update={"name": alone, "gguf_file": _GGUF})
        inside: Any = load_tokenizer(section)
    ours: Any = model.tokenizer
    for text in _TEXTS:
        wanted, found = ours(text)["input_ids"], inside(text)["input_ids"]
        if wanted != found:
            raise ModelError(
                f"the tokenizer in the GGUF file reads {text!r} as {found}, the adapter's as {wanted}. "
                "Nothing was written: use --format merged"
            )


def _name_labels(config: Any, described: Description) -> None:
    if described.section.labels and described.head is not Head.MEAN:
        config.id2label = dict(enumerate(described.section.labels))
        config.label2id = {label: i for i, label in enumerate(described.section.labels)}


def _card(described: Description, form: Form) -> str:
    """The adapter's card, with the code for the whole model; the claim is in it, whatever the card said."""
    path = described.folder / "README.md"
    card = path.read_text("utf-8") if path.is_file() else f"# {described.name}\n"
    if described.privacy not in card:
        card += f"\n## Privacy\n\n{described.privacy}\n"
    gguf = f', gguf_file="{_GGUF}"' if form is Form.GGUF else ""
    card = card.replace("library_name: peft", "library_name: transformers", 1)
    card = card.replace("from peft import PeftModel\n", "", 1)
    card = re.sub(
        r"PeftModel\.from_pretrained\((Auto\w+)\.from_pretrained\(.*\), folder\)",
        rf"\1.from_pretrained(folder{gguf})",
        card,
        count=1,
    )
    what = (
        "in one GGUF file of 32-bit weights, for llama.cpp and its kin"
        if gguf
        else "as transformers loads it"
    )
    note = (
        f"This is the whole model: the adapter below, merged into `{described.base.name}`, {what}. Its "
        "logits were compared with the adapter's on its base. The base model's licence holds for it too.\n"
    )
    if described.head is Head.MEAN:
        note += (
            "\nThe task's head is not the model's own: it reads the mean of the tokens' last hidden state, "
            "and lies in `head.safetensors`. The code below shows how.\n"
        )
    return re.sub(r"^(# .*\n)", lambda m: f"{m[1]}\n{note}", card, count=1, flags=re.MULTILINE)
