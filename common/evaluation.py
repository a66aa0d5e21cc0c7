"""Loss and metrics of an adapter on records that are public, or that the reader owns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from common.adapter import Vector, write_vector
from common.features import FeatureCache
from common.models import AdaptedModel
from common.tasks import Batch, Examples, IntArray, by_length, collate


@dataclass(frozen=True)
class MetricSums:
    """Sums over records, so that they add up over parts; `scores` is what the task makes of its own."""

    loss: float
    correct: float
    count: int
    scores: Mapping[str, float] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """The task's chief metric: accuracy, entity F1, ..."""
        return next(iter(self.scores.values()), self.correct / self.count)

    @property
    def accuracy(self) -> float:
        """The chief metric, under the name by which events and reports know it."""
        return self.score

    @property
    def mean_loss(self) -> float:
        return self.loss / self.count


@torch.no_grad()
def _answered(
    model: AdaptedModel,
    vector: Vector,
    examples: Examples,
    indices: IntArray,
    features: FeatureCache | None,
    micro_batch: int,
) -> Iterator[tuple[IntArray, torch.Tensor, Batch]]:
    """(records, the model's outputs, their batch), micro-batch by micro-batch, in evaluation mode.

    `features` saves the encoder's work while rounds train the head only.
    """
    write_vector(model.parameters, model.layout, vector)
    for part in by_length(examples, indices, micro_batch):
        if features is not None and model.head is not None:
            cached = features.of(model, examples, part)[part]
            yield (
                part,
                model.head(cached.to(model.device)),
                Batch({}, examples.targets(part).to(model.device)),
            )
        else:
            batch = collate(examples, part, model.pad_id, model.device)
            yield part, model.logits(batch.inputs), batch


def record_scores(
    model: AdaptedModel,
    vector: Vector,
    examples: Examples,
    indices: IntArray,
    features: FeatureCache | None = None,
    micro_batch: int = 64,
) -> Iterator[tuple[IntArray, torch.Tensor, torch.Tensor]]:
    """(records, their losses, how right each is), micro-batch by micro-batch, as for `evaluate`."""
    for part, logits, batch in _answered(model, vector, examples, indices, features, micro_batch):
        losses, correct = model.task.record_losses(logits, batch), model.task.correct(logits, batch)
        yield part, losses.double(), correct.double()


def evaluate(
    model: AdaptedModel,
    vector: Vector,
    examples: Examples,
    indices: IntArray,
    features: FeatureCache | None = None,
    micro_batch: int = 64,
) -> MetricSums:
    """Sums over `indices` with the adapter `vector`, `(model.layout.size,)`, in evaluation mode.

    `features` saves the encoder's work while rounds train the head only.
    """
    loss = correct = 0.0
    sums: np.ndarray | None = None
    for _, logits, batch in _answered(model, vector, examples, indices, features, micro_batch):
        loss += float(model.task.record_losses(logits, batch).double().sum())
        correct += float(model.task.correct(logits, batch).double().sum())
        own = model.task.record_sums(logits, batch, model.tokenizer).double().sum(dim=0).cpu().numpy()
        sums = own if sums is None else sums + own
    scores = {} if sums is None else model.task.scores(sums, len(indices))
    return MetricSums(loss, correct, len(indices), scores)
