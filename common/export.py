"""A trained adapter as a folder that plain peft loads, with nothing of ours."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from common.adapter import Vector, write_vector
from common.chat_template import opening
from common.config import RunConfig, TaskKind
from common.models import AdaptedModel, model_path
from common.privacy import epsilon_text


@dataclass(frozen=True)
class PrivacyClaim:
    """What is claimed of an adapter. `epsilon_*` are upper bounds for one record of one site."""

    epsilon_rdp: float | None  # None: trained without privacy
    epsilon_pld: float | None
    delta: float
    secure_aggregation: bool
    read_from_data: tuple[str, ...]  # keys whose values came from the data and are taken as public
    repeatable_noise: bool  # a study's noise, keyed by a public number: no claim holds

    @property
    def holds(self) -> bool:
        return self.epsilon_rdp is not None and not self.repeatable_noise

    def sentence(self) -> str:
        """The claim in one sentence, with unit, neighbours and onlooker."""
        if self.epsilon_rdp is None or self.epsilon_pld is None:
            return "NOT PRIVATE: trained without clipping or noise, for study (--insecure-no-privacy)."
        if self.repeatable_noise:
            return "NOT PRIVATE: the noise is keyed by a public number, for study (--study-noise-seed)."
        return (
            f"({epsilon_text(self.epsilon_rdp)}, {self.delta:g})-differentially private for each single "
            "training record (add-or-remove neighbours) of each site, against whoever sees all updates of "
            f"that site, the server included; enforced by Rényi accounting, {epsilon_text(self.epsilon_pld)} "
            "by privacy loss distributions."
            + (
                f" This takes {' and '.join(self.read_from_data)} as public, which were read from the data."
                if self.read_from_data
                else ""
            )
        )


def export_adapter(
    model: AdaptedModel, vector: Vector, config: RunConfig, claim: PrivacyClaim, folder: Path
) -> None:
    """Write `folder`: the PEFT adapter, the head where it is ours, the tokenizer and a model card.

    The folder appears whole or not at all; an older one of that name is replaced.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        write_vector(model.parameters, model.layout, vector)
        model.peft.save_pretrained(str(temporary), safe_serialization=True)
        model.tokenizer.save_pretrained(str(temporary))
        if model.head is not None:
            state = {name: p.detach().cpu().contiguous() for name, p in model.head.state_dict().items()}
            save_file(state, str(temporary / "head.safetensors"))
        described = {
            "task": config.task.kind.value,
            "labels": list(model.task.labels),
            "range": config.task.range,
            "chat": config.task.chat,
            "pairs": config.data.prompt is not None and not config.task.kind.writes,
            "model": config.model.name,
            "gguf_file": config.model.gguf_file,
            "head": config.model.head.value,
            "max_length": config.model.max_length,
            "privacy": claim.sentence(),
        }
        (temporary / "confide.json").write_text(json.dumps(described, indent=2, ensure_ascii=False) + "\n")
        (temporary / "README.md").write_text(model_card(model, config, claim), encoding="utf-8")
        temporary.chmod(0o755)
        old = folder.with_name(f".{folder.name}.old.{os.getpid()}")
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(temporary)


def model_card(model: AdaptedModel, config: RunConfig, claim: PrivacyClaim) -> str:
    """Markdown: what was trained on what, which privacy is claimed, and how to load it."""
    privacy, adapter = config.privacy, config.adapter
    source = config.data.sample or (config.data.train.name if config.data.train else "")
    aggregation = (
        f"secure: the server learnt sums over at least {config.aggregation.min_cohort} sites"
        if claim.secure_aggregation
        else "in the clear (--insecure-plain-updates): the server saw each site's update"
    )
    mechanism = (
        f"DP-SGD: noise multiplier {privacy.noise_multiplier}, sample rate {privacy.sample_rate}, "
        f"max grad norm {privacy.max_grad_norm}"
        if claim.epsilon_rdp is not None
        else "none"
    )
    if claim.epsilon_rdp is not None and config.warmup.rounds:
        mechanism += (
            f"; warm-up of the head: noise multiplier {config.warmup.noise_multiplier}, sample rate "
            f"{config.warmup.sample_rate}"
        )
    return f"""---
library_name: peft
base_model: {config.model.name}
tags: [lora, federated, differential-privacy]
---

# {config.run.name}

A LoRA adapter ({adapter.method.value}, rank {adapter.rank}, alpha {adapter.alpha:g}) for
`{config.model.name}`, task {config.task.kind.value}, fine-tuned by {config.sites.count} sites in
{config.warmup.rounds + config.run.rounds} rounds with Confide.

## Privacy

{claim.sentence()}

- unit: one training {privacy.unit.value}; neighbours: add or remove one; trust: {privacy.trust.value}
- {mechanism}
- accountant: Rényi DP at fixed orders (dp-accounting); delta = {claim.delta:g}
- aggregation: {aggregation}
- a record that lies at k sites is protected k times less: Rényi divergences add up

## Data

`{source}`, {config.sites.count} sites ({config.sites.partition.value} partition), at least
{privacy.nominal_records} records each. Labels: {", ".join(model.task.labels) or "none"}.

## How to load it

```python
{_loading_code(model, config)}```
"""


def _loading_code(model: AdaptedModel, config: RunConfig) -> str:
    base = f'"{model_path(config.model.name)}"'
    if config.model.gguf_file:
        base += f', gguf_file="{config.model.gguf_file}"'
    if model.head is not None:
        return f"""import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

folder = "."  # this folder
encoder = PeftModel.from_pretrained(AutoModel.from_pretrained({base}), folder).eval()
head = load_file(folder + "/head.safetensors")
batch = AutoTokenizer.from_pretrained(folder)({_input(model, config)}, return_tensors="pt", padding=True)
hidden, mask = encoder(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
logits = (hidden * mask).sum(1) / mask.sum(1) @ head["weight"].T + head["bias"]
{_reading(model, config)}
"""
    auto = config.task.kind.needs.auto
    options = f", num_labels={model.task.outputs}" if model.task.outputs else ""
    if config.task.kind is TaskKind.IMAGE_CLASSIFICATION:
        return f"""from peft import PeftModel
from PIL import Image
from transformers import {auto}, AutoImageProcessor

folder = "."  # this folder
model = PeftModel.from_pretrained({auto}.from_pretrained({base}{options}), folder).eval()
image = Image.new("RGB", (64, 64))  # or Image.open("some.jpg").convert("RGB")
batch = AutoImageProcessor.from_pretrained(folder)(images=[image], return_tensors="pt")
{_reading(model, config)}
"""
    return f"""from peft import PeftModel
from transformers import {auto}, AutoTokenizer

folder = "."  # this folder
model = PeftModel.from_pretrained({auto}.from_pretrained({base}{options}), folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
batch = {_batch(model, config)}
{_reading(model, config)}
"""


def _batch(model: AdaptedModel, config: RunConfig) -> str:
    """How the card's example makes tokens of what it reads."""
    if config.task.chat:
        said = {"system": "how to answer", "user": "a question"}
        turns = json.dumps([{**turn, "content": said[turn["role"]]} for turn in opening(model.tokenizer)])
        how = 'add_generation_prompt=True, return_dict=True, return_tensors="pt"'
        return f"tokenizer.apply_chat_template(\n    {turns}, {how}\n)"
    return f'tokenizer({_input(model, config)}, return_tensors="pt")'


def _input(model: AdaptedModel, config: RunConfig) -> str:
    """What the card's example reads, as the records were read."""
    match config.task.kind:
        case TaskKind.QUESTION_ANSWERING:
            return '"a question", "some text that answers it"'
        case TaskKind.CAUSAL_LM | TaskKind.SEQ2SEQ | TaskKind.TOKEN_CLASSIFICATION:
            return '"some text"'
        case _ if config.data.prompt is not None:
            return '["some text"], ["another text"]'
        case _:
            return '["some text"]'


def _reading(model: AdaptedModel, config: RunConfig) -> str:
    """What the card's example makes of the model's output."""
    labels = list(model.task.labels)
    logits = "logits" if model.head is not None else "model(**batch).logits"
    match config.task.kind:
        case TaskKind.SEQUENCE_CLASSIFICATION | TaskKind.IMAGE_CLASSIFICATION:
            return f"print([{labels!r}[i] for i in {logits}.argmax(-1)])"
        case TaskKind.MULTI_LABEL:
            return f"print([[l for l, s in zip({labels!r}, row) if s > 0] for row in {logits}])"
        case TaskKind.REGRESSION:
            low, high = config.task.range or (-1.0, 1.0)
            return f"print({low} + ({logits}.squeeze(-1) + 1) * {(high - low) / 2})"
        case TaskKind.TOKEN_CLASSIFICATION:
            return f"print([{labels!r}[i] for i in {logits}[0].argmax(-1)])  # a tag a token"
        case TaskKind.QUESTION_ANSWERING:
            return """out = model(**batch)
inside = [i for i, part in enumerate(batch.sequence_ids(0)) if part == 1]  # the text, not the question
first, last = (inside[int(s[0, inside].argmax())] for s in (out.start_logits, out.end_logits))
print(tokenizer.decode(batch["input_ids"][0, first : last + 1]))"""
        case TaskKind.CAUSAL_LM:
            base: Any = model.base
            options = f"max_new_tokens=64, eos_token_id={base.generation_config.eos_token_id}"
            return f"print(tokenizer.decode(model.generate(**batch, {options})[0]))"
        case TaskKind.SEQ2SEQ:
            return "print(tokenizer.decode(model.generate(**batch, max_new_tokens=64)[0]))"
