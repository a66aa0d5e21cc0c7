"""Task kinds: how records become tokens, what one record's loss is, and which sums measure success.

To add a task: one class with the members of `Task`, one member of `TaskKind`, one line in `make_task`.
Every loss is *per record* and depends on that record alone; anything else has no bounded sensitivity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from common.config import TaskKind
from common.errors import ConfigError, DataError
from common.tables import Table, label_ids

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Examples:
    """Tokenised records, ragged, in flat arrays: thousands of sites can share one of these.

    Record i's tokens are `tokens[starts[i]:starts[i+1]]`; `target[i]` is what the task makes of it.
    """

    tokens: NDArray[np.int32]  # (total tokens,)
    starts: IntArray  # (records + 1,)
    target: IntArray  # (records,)

    def __len__(self) -> int:
        return len(self.target)

    @property
    def lengths(self) -> IntArray:
        return np.diff(self.starts)


@dataclass(frozen=True)
class Batch:
    """`inputs`: what the model is called with, `(n, longest)`; `target`: `(n,)` int64."""

    inputs: dict[str, torch.Tensor]
    target: torch.Tensor

    def __len__(self) -> int:
        return len(self.target)


class Task(Protocol):
    """What a task must say. Metrics are sums over records, so that they can be aggregated securely."""

    @property
    def kind(self) -> TaskKind: ...
    @property
    def labels(self) -> tuple[str, ...]: ...  # of a classifier's outputs; empty where there are none
    @property
    def peft_task_type(self) -> str: ...  # as peft names it, for the exported adapter

    def encode(self, table: Table, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Examples: ...

    def record_losses(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """`(n,)`: the loss of each record, from that record alone."""
        ...

    def correct(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """`(n,)` in [0, 1]: how right each record's answer is."""
        ...


def collate(
    examples: Examples, indices: Sequence[int] | IntArray, pad_id: int, device: torch.device
) -> Batch:
    """Records `indices`, right-padded to the longest of them."""
    lengths = examples.lengths[indices]
    longest = int(lengths.max(initial=1))
    tokens = np.full((len(indices), longest), pad_id, dtype=np.int64)
    for row, (index, length) in enumerate(zip(indices, lengths, strict=True)):
        start = examples.starts[index]
        tokens[row, :length] = examples.tokens[start : start + length]
    mask = (np.arange(longest) < lengths[:, None]).astype(np.int64)
    return Batch(
        {
            "input_ids": torch.from_numpy(tokens).to(device),
            "attention_mask": torch.from_numpy(mask).to(device),
        },
        torch.from_numpy(examples.target[np.asarray(indices, dtype=np.int64)]).to(device),
    )


def by_length(examples: Examples, indices: IntArray, size: int) -> list[IntArray]:
    """`indices` in micro-batches of at most `size` records of like length, so that little is padding."""
    order = indices[np.argsort(examples.lengths[indices], kind="stable")]
    return [order[start : start + size] for start in range(0, len(order), size)]


def _pack(ids: Sequence[Sequence[int]], target: Sequence[int] | IntArray) -> Examples:
    starts = np.zeros(len(ids) + 1, dtype=np.int64)
    np.cumsum([len(i) for i in ids], out=starts[1:])
    tokens = np.fromiter((t for i in ids for t in i), dtype=np.int32, count=int(starts[-1]))
    return Examples(tokens, starts, np.asarray(target, dtype=np.int64))


@dataclass(frozen=True)
class SequenceClassification:
    """One label a record. Loss: cross-entropy; correct: the top class is the label."""

    labels: tuple[str, ...]
    kind: TaskKind = TaskKind.SEQUENCE_CLASSIFICATION
    peft_task_type: str = "SEQ_CLS"

    def encode(self, table: Table, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Examples:
        pair = None if table.prompt is None else list(table.prompt)
        first = list(table.text) if pair is None else pair
        second = None if pair is None else list(table.text)
        encoded: Mapping[str, Any] = tokenizer(first, second, truncation=True, max_length=max_length)
        return _pack(encoded["input_ids"], label_ids(table, self.labels))

    def record_losses(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        return functional.cross_entropy(logits.float(), batch.target, reduction="none")

    def correct(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        return (logits.argmax(dim=-1) == batch.target).float()


@dataclass(frozen=True)
class CausalLM:
    """Continue the prompt, or model the text where there is none.

    A record's loss is the mean over *its own* answer tokens. The usual mean over a batch's tokens makes
    one record's gradient depend on the others' lengths, which no clipping bounds.
    `target` holds the number of leading prompt tokens, which bear no loss.
    """

    labels: tuple[str, ...] = ()
    kind: TaskKind = TaskKind.CAUSAL_LM
    peft_task_type: str = "CAUSAL_LM"

    def encode(self, table: Table, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Examples:
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no end-of-sequence token, which causal-lm needs")
        end = [int(tokenizer.eos_token_id)]
        texts = tokenizer(list(table.text), add_special_tokens=False)["input_ids"]
        prompts = (
            [[] for _ in texts]
            if table.prompt is None
            else tokenizer(list(table.prompt), add_special_tokens=False)["input_ids"]
        )
        start = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
        ids, masked = [], []
        for prompt, text in zip(prompts, texts, strict=True):
            # A long prompt keeps its end, and at least half of the length is left to the answer.
            room = max_length // 2 - len(start)
            head = start + prompt[len(prompt) - min(room, len(prompt)) :]
            ids.append((head + text + end)[:max_length])
            masked.append(max(len(head), 1))
        return _pack(ids, masked)

    def _own_tokens(self, logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Next-token labels `(n, longest - 1)` and which of them belong to the answer."""
        labels = batch.inputs["input_ids"][:, 1:]
        position = torch.arange(1, labels.shape[1] + 1, device=labels.device)
        own = (batch.inputs["attention_mask"][:, 1:] == 1) & (position >= batch.target[:, None])
        return labels, own

    @staticmethod
    def _own_mean(values: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        return (values * own).sum(dim=1) / own.sum(dim=1).clamp(min=1)

    def record_losses(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        labels, own = self._own_tokens(logits, batch)
        losses = functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels, reduction="none")
        return self._own_mean(losses, own)

    def correct(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        labels, own = self._own_tokens(logits, batch)
        return self._own_mean((logits[:, :-1].argmax(dim=-1) == labels).float(), own)


def make_task(kind: TaskKind, labels: Sequence[str]) -> Task:
    match kind:
        case TaskKind.SEQUENCE_CLASSIFICATION:
            if len(labels) < 2:
                raise ConfigError(
                    f"sequence-classification needs at least two labels, found {list(labels)}: "
                    "check data.label, or set task.labels"
                )
            return SequenceClassification(tuple(labels))
        case TaskKind.CAUSAL_LM:
            return CausalLM()
