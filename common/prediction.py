"""A trained adapter at work: open its folder, read texts, give answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from common.config import Head, TaskKind, TaskSection
from common.decoding import greedy
from common.errors import ModelError
from common.exported import Description, Form, describe
from common.models import (
    AdaptedModel,
    MeanPooledClassifier,
    end_answers,
    load_image_processor,
    load_tokenizer,
    model_path,
    pick_device,
)
from common.tables import Table
from common.targets import OUTSIDE
from common.task_tokens import ExtractiveQA, first_tokens
from common.tasks import Batch, Examples, collate, make_task
from common.text_metrics import entities


@dataclass(frozen=True)
class Predictor:
    """What was trained, as it was exported."""

    model: AdaptedModel
    described: Description

    @property
    def section(self) -> TaskSection:
        return self.described.section

    @property
    def kind(self) -> TaskKind:
        return self.section.kind

    @property
    def max_length(self) -> int:
        return self.described.base.max_length

    @property
    def pairs(self) -> bool:
        return self.described.pairs

    def __call__(self, table: Table, batch_size: int = 32) -> Iterator[dict[str, Any]]:
        """The answer to each record, in order. The records' labels are not read.

        Raises:
            ModelError: the adapter was trained on pairs and the records are none, or the other way round.
        """
        if self.pairs != (table.prompt is not None) and not self.kind.writes:
            wanted = "a prompt and a text" if self.pairs else "a text alone"
            raise ModelError(f"this adapter was trained on {wanted}: give {wanted}")
        for start in range(0, len(table), batch_size):
            yield from self._answers(table.take(range(start, min(start + batch_size, len(table)))))

    @torch.no_grad()
    def _answers(self, table: Table) -> Iterator[dict[str, Any]]:
        model, task = self.model, self.model.task
        examples = task.encode(_unlabelled(table, self.section), model.tokenizer, self.max_length)
        if self.kind.writes:
            questions = [_question(examples, i, self) for i in range(len(table))]
            longest = max(self.max_length // 2, 8)
            yield from ({"text": text} for text in greedy(model, questions, longest))
            return
        batch = collate(examples, range(len(table)), model.pad_id, model.device)
        logits = model.logits(batch.inputs)
        for i in range(len(table)):
            yield self._answer(table, i, logits, batch)

    def _answer(self, table: Table, i: int, logits: torch.Tensor, batch: Batch) -> dict[str, Any]:
        labels, row = self.model.task.labels, logits[i].float()
        match self.kind:
            case TaskKind.SEQUENCE_CLASSIFICATION | TaskKind.IMAGE_CLASSIFICATION:
                likely = row.softmax(dim=-1)
                best = int(likely.argmax())
                return {"label": labels[best], "probability": round(float(likely[best]), 6)}
            case TaskKind.MULTI_LABEL:
                likely = row.sigmoid()
                found = {labels[j]: round(float(p), 6) for j, p in enumerate(likely) if p > 0.5}
                return {"labels": found}
            case TaskKind.REGRESSION:
                low, high = self.section.range or (-1.0, 1.0)
                return {"value": low + (float(row[0]) + 1) * (high - low) / 2}
            case TaskKind.TOKEN_CLASSIFICATION:
                return {"entities": _named(self, table.text[i], row)}
            case _:
                one = Batch({}, batch.target[i : i + 1])
                return {"answer": _stretch(self, table, i, logits[i : i + 1], one)}


def open_adapter(path: Path, device: str = "auto") -> Predictor:
    """What a run exported, or `confide export` made of it. `path`: that folder, or the run's.

    Raises:
        ModelError: the folder holds none, or its base model is not to be had.
    """
    described = describe(path)
    kind, section = described.kind, described.section
    task = make_task(kind, section.labels, section)
    place = pick_device(device)
    whole, module = _load(described, task.outputs)
    beside = described.base.model_copy(update={"name": str(described.folder), "gguf_file": None})
    images = kind is TaskKind.IMAGE_CLASSIFICATION
    tokenizer = load_image_processor(beside) if images else load_tokenizer(beside)
    module.eval().to(place)
    model = AdaptedModel(module, whole, tokenizer, task, {}, place)
    base_config: Any = model.base.config
    if kind is TaskKind.CAUSAL_LM:
        end_answers(model.base, tokenizer)
    if not images and base_config.pad_token_id is None:
        base_config.pad_token_id = tokenizer.pad_token_id  # decoders that classify read the last real token
    return Predictor(model, described)


def _load(described: Description, outputs: int) -> tuple[PeftModel | PreTrainedModel, torch.nn.Module]:
    """The model that writes or reads, and what gives the logits: itself, or our head on it."""
    section, folder, mean = described.base, described.folder, described.head is Head.MEAN
    auto: Any = getattr(transformers, "AutoModel" if mean else described.kind.needs.auto)
    options: dict[str, Any] = {"trust_remote_code": False, "dtype": torch.float32}
    if section.gguf_file:
        options["gguf_file"] = section.gguf_file
    if outputs and not mean:
        options["num_labels"] = outputs
    try:
        base = auto.from_pretrained(model_path(section.name), **options)
        whole = PeftModel.from_pretrained(base, str(folder)) if described.form is Form.PEFT else base
        if not mean:
            return whole, whole
        module = MeanPooledClassifier(whole, base.config.hidden_size, outputs)
        module.head.load_state_dict(load_file(folder / "head.safetensors"))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"cannot load {section.name} with the weights in {folder}: {' '.join(str(error).split())[:300]}"
        ) from None
    return whole, module


def _unlabelled(table: Table, section: TaskSection) -> Table:
    """The table with targets that fit and mean nothing, so that it can be tokenised as in training."""
    match section.kind:
        case TaskKind.SEQUENCE_CLASSIFICATION | TaskKind.IMAGE_CLASSIFICATION:
            return replace(table, label=(section.labels[0],) * len(table))
        case TaskKind.MULTI_LABEL:
            return replace(table, label=("",) * len(table))
        case TaskKind.REGRESSION:
            return replace(table, label=(str((section.range or (0.0, 0.0))[0]),) * len(table))
        case TaskKind.TOKEN_CLASSIFICATION:
            return replace(table, label=tuple(" ".join([OUTSIDE] * (t.count(" ") + 1)) for t in table.text))
        case TaskKind.QUESTION_ANSWERING:
            return replace(table, label=tuple(t[:1] for t in table.text), start=(0,) * len(table))
        case TaskKind.CAUSAL_LM | TaskKind.SEQ2SEQ:
            # What is given is what the answer follows: the prompt, or the text where there was none.
            return replace(table, prompt=table.prompt or table.text, text=("",) * len(table))


def _question(examples: Examples, i: int, predictor: Predictor) -> list[int]:
    ids: Sequence[int] = examples.tokens[examples.starts[i] : examples.starts[i + 1]].tolist()
    if predictor.kind is TaskKind.SEQ2SEQ:
        return list(ids)
    return list(ids[: int(examples.target[i][0])])


def _named(predictor: Predictor, text: str, row: torch.Tensor) -> list[dict[str, Any]]:
    """The entities of one text, with their words."""
    encoded = predictor.model.tokenizer(
        text, truncation=True, max_length=predictor.max_length, return_offsets_mapping=True
    )
    words, labels = text.split(" "), predictor.model.task.labels
    tags = [OUTSIDE] * len(words)
    for place, word in enumerate(first_tokens(text, encoded["offset_mapping"])):
        if word is not None:
            tags[word] = labels[int(row[place].argmax())]
    found = sorted(entities(tags), key=lambda entity: entity[1])
    return [{"type": t, "text": " ".join(words[a : b + 1]), "words": [a, b]} for t, a, b in found]


def _stretch(predictor: Predictor, table: Table, i: int, logits: torch.Tensor, batch: Batch) -> str:
    """The stretch of the context that answers best, as it is written there."""
    task = predictor.model.task
    if not isinstance(task, ExtractiveQA) or table.prompt is None:
        raise ModelError(f"no answers in a context from {predictor.kind.value}")
    first, last = (int(t) for t in task.answers(logits, batch)[0])
    offsets = predictor.model.tokenizer(
        table.prompt[i],
        table.text[i],
        truncation=True,
        max_length=predictor.max_length,
        return_offsets_mapping=True,
    )["offset_mapping"]
    return table.text[i][offsets[first][0] : offsets[last][1]]
