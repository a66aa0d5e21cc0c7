"""One answer a record: a label, several labels, or a number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from common.config import TaskKind
from common.examples import Batch, Examples, Ragged, pack
from common.tables import Table, label_ids
from common.targets import label_sets, numbers
from common.text_metrics import f1

MADE_UP_LENGTHS = (5, 9, 7)  # tokens of the records that the self-test makes up


@dataclass(frozen=True)
class SequenceClassification:
    """One label a record. Loss: cross-entropy, times the label's public weight; correct: the top class.

    Sums: for each class, in thirds, records that are it and are said to be, are said to be, and are.
    """

    labels: tuple[str, ...]
    weights: tuple[float, ...] = ()
    kind: TaskKind = TaskKind.SEQUENCE_CLASSIFICATION

    @property
    def outputs(self) -> int:
        return len(self.labels)

    def encode(self, table: Table, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Examples:
        return encode_text(table, tokenizer, max_length, label_ids(table, self.labels))

    def made_up(self, rng: np.random.Generator, tokenizer: PreTrainedTokenizerBase) -> Examples:
        return made_up_text(rng, tokenizer, rng.integers(0, self.outputs, len(MADE_UP_LENGTHS)))

    def record_losses(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        losses = functional.cross_entropy(logits.float(), batch.target, reduction="none")
        return losses * class_weights(self.weights, batch.target) if self.weights else losses

    def correct(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        return (logits.argmax(dim=-1) == batch.target).float()

    def record_sums(
        self, logits: torch.Tensor, batch: Batch, tokenizer: PreTrainedTokenizerBase
    ) -> torch.Tensor:
        said = functional.one_hot(logits.argmax(dim=-1), self.outputs)
        true = functional.one_hot(batch.target, self.outputs)
        return torch.cat([said & true, said, true], dim=1)

    def scores(self, sums: NDArray[np.float64], count: int) -> dict[str, float]:
        both, said, true = sums.reshape(3, -1)
        per_class = [f1(*triple) for triple in zip(both, said, true, strict=True) if triple[1] or triple[2]]
        return {"accuracy": float(both.sum()) / count, "macro F1": float(np.mean(per_class))}


@dataclass(frozen=True)
class MultiLabel:
    """Any number of labels a record. Loss: the mean over labels of the binary cross-entropy, where a label's
    weight counts for the records that have it; correct: exactly the record's labels.

    Sums: labels that are right, said, and wanted; records that are wholly right.
    """

    labels: tuple[str, ...]
    weights: tuple[float, ...] = ()
    kind: TaskKind = TaskKind.MULTI_LABEL

    @property
    def outputs(self) -> int:
        return len(self.labels)

    def encode(self, table: Table, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Examples:
        return encode_text(table, tokenizer, max_length, label_sets(table, self.labels))

    def made_up(self, rng: np.random.Generator, tokenizer: PreTrainedTokenizerBase) -> Examples:
        target = rng.integers(0, 2, (len(MADE_UP_LENGTHS), self.outputs)).astype(np.float32)
        return made_up_text(rng, tokenizer, target)

    def record_losses(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        weights = torch.tensor(self.weights, device=logits.device) if self.weights else None
        return functional.binary_cross_entropy_with_logits(
            logits.float(), batch.target, reduction="none", pos_weight=weights
        ).mean(dim=1)

    def correct(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        return ((logits > 0) == (batch.target > 0)).all(dim=1).float()

    def record_sums(
        self, logits: torch.Tensor, batch: Batch, tokenizer: PreTrainedTokenizerBase
    ) -> torch.Tensor:
        said, true = logits > 0, batch.target > 0
        counts = [(said & true).sum(dim=1), said.sum(dim=1), true.sum(dim=1)]
        return torch.stack([*counts, self.correct(logits, batch)], dim=1)

    def scores(self, sums: NDArray[np.float64], count: int) -> dict[str, float]:
        both, said, true, whole = sums.tolist()
        return {"micro F1": f1(both, said, true), "exact sets": whole / count}


@dataclass(frozen=True)
class Regression:
    """A number a record, within public bounds that lie at -1 and 1 for the model. Loss: the squared error on
    that scale; correct: 1 less the error as a share of the bounds' distance, at least 0.

    Sums: of x, y, x², y², xy, (x - y)² and |x - y|, on that scale; x is said, y is true.
    """

    bounds: tuple[float, float]
    labels: tuple[str, ...] = ()
    kind: TaskKind = TaskKind.REGRESSION
    outputs: int = 1

    def encode(self, table: Table, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Examples:
        return encode_text(table, tokenizer, max_length, numbers(table, self.bounds))

    def made_up(self, rng: np.random.Generator, tokenizer: PreTrainedTokenizerBase) -> Examples:
        target = rng.uniform(-1, 1, len(MADE_UP_LENGTHS)).astype(np.float32)
        return made_up_text(rng, tokenizer, target)

    def record_losses(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        return (logits.float().squeeze(-1) - batch.target).square()

    def correct(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        return (1 - (logits.float().squeeze(-1) - batch.target).abs() / 2).clamp(min=0)

    def record_sums(
        self, logits: torch.Tensor, batch: Batch, tokenizer: PreTrainedTokenizerBase
    ) -> torch.Tensor:
        x, y = logits.double().squeeze(-1), batch.target.double()
        return torch.stack([x, y, x * x, y * y, x * y, (x - y) ** 2, (x - y).abs()], dim=1)

    def scores(self, sums: NDArray[np.float64], count: int) -> dict[str, float]:
        x, y, xx, yy, xy, squared, absolute = (sums / count).tolist()
        spread = math.sqrt(max(xx - x * x, 0.0) * max(yy - y * y, 0.0))
        unit = (self.bounds[1] - self.bounds[0]) / 2  # from our scale to the label's
        return {
            "Pearson": (xy - x * y) / spread if spread > 1e-12 else 0.0,
            "mean squared error": squared * unit**2,
            "mean absolute error": absolute * unit,
        }


def encode_text(
    table: Table,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    target: Sequence[int] | NDArray[Any] | Ragged,
) -> Examples:
    """Each record's text, or its prompt and text as a pair, with token types where there are such."""
    first, second = (table.text, None) if table.prompt is None else (table.prompt, list(table.text))
    encoded = tokenizer(list(first), second, truncation=True, max_length=max_length)
    return pack(encoded["input_ids"], target, None if second is None else encoded.get("token_type_ids"))


def made_up_text(
    rng: np.random.Generator, tokenizer: PreTrainedTokenizerBase, target: NDArray[Any] | Ragged
) -> Examples:
    """Three records of random tokens, of unlike lengths."""
    ids = [rng.integers(0, int(tokenizer.vocab_size), length).tolist() for length in MADE_UP_LENGTHS]
    return pack(ids, target)


def class_weights(weights: Sequence[float], target: torch.Tensor) -> torch.Tensor:
    """The weight of each target's class, in the target's shape; of no class (negative), 0.

    Not divided by the batch's weights, as torch's own `weight` does it: then a record's gradient would
    depend on the others.
    """
    table = torch.tensor(weights, device=target.device)
    return table[target.clamp(min=0)] * (target >= 0)
