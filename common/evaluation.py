"""Loss and accuracy of an adapter on records that are public, or that the reader owns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from common.adapter import Vector, write_vector
from common.features import FeatureCache
from common.models import AdaptedModel
from common.tasks import Batch, Examples, IntArray, by_length, collate


@dataclass(frozen=True)
class MetricSums:
    """Sums over records, so that they add up over parts."""

    loss: float
    correct: float
    count: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.count

    @property
    def mean_loss(self) -> float:
        return self.loss / self.count


@torch.no_grad()
def record_scores(
    model: AdaptedModel,
    vector: Vector,
    examples: Examples,
    indices: IntArray,
    features: FeatureCache | None = None,
    micro_batch: int = 64,
) -> Iterator[tuple[IntArray, torch.Tensor, torch.Tensor]]:
    """(records, their losses, how right each is), micro-batch by micro-batch, in evaluation mode.

    `features` saves the encoder's work while rounds train the head only.
    """
    write_vector(model.parameters, model.layout, vector)
    for part in by_length(examples, indices, micro_batch):
        if features is not None and model.head is not None:
            cached = features.of(model, examples, part)[part]
            logits = model.head(cached.to(model.device))
            batch = Batch({}, torch.from_numpy(examples.target[part]).to(model.device))
        else:
            batch = collate(examples, part, model.pad_id, model.device)
            logits = model.logits(batch.inputs)
        yield (
            part,
            model.task.record_losses(logits, batch).double(),
            model.task.correct(logits, batch).double(),
        )


def evaluate(
    model: AdaptedModel,
    vector: Vector,
    examples: Examples,
    indices: IntArray,
    features: FeatureCache | None = None,
    micro_batch: int = 64,
) -> MetricSums:
    """Sums over `indices` with the adapter `vector`, `(model.layout.size,)`; see `record_scores`."""
    loss = correct = 0.0
    for _, losses, right in record_scores(model, vector, examples, indices, features, micro_batch):
        loss += float(losses.sum())
        correct += float(right.sum())
    return MetricSums(loss, correct, len(indices))
