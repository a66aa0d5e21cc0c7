"""Loss and accuracy of an adapter on records that are public, or that the reader owns."""

from __future__ import annotations

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
    write_vector(model.parameters, model.layout, vector)
    loss = correct = 0.0
    for part in by_length(examples, indices, micro_batch):
        if features is not None and model.head is not None:
            cached = features.of(model, examples, part)[part]
            logits = model.head(cached.to(model.device))
            batch = Batch({}, torch.from_numpy(examples.target[part]).to(model.device))
        else:
            batch = collate(examples, part, model.pad_id, model.device)
            logits = model.logits(batch.inputs)
        loss += float(model.task.record_losses(logits, batch).double().sum())
        correct += float(model.task.correct(logits, batch).double().sum())
    return MetricSums(loss, correct, len(indices))
