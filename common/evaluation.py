"""Loss and accuracy of an adapter on records that are public, or that the reader owns."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from common.adapter import Vector, write_vector
from common.models import AdaptedModel
from common.tasks import Examples, IntArray, by_length, collate


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
    model: AdaptedModel, vector: Vector, examples: Examples, indices: IntArray, micro_batch: int = 64
) -> MetricSums:
    """Sums over `indices` with the adapter `vector`, `(model.layout.size,)`, in evaluation mode."""
    write_vector(model.parameters, model.layout, vector)
    loss = correct = 0.0
    for part in by_length(examples, indices, micro_batch):
        batch = collate(examples, part, model.pad_id, model.device)
        logits = model.logits(batch.inputs)
        loss += float(model.task.record_losses(logits, batch).double().sum())
        correct += float(model.task.correct(logits, batch).double().sum())
    return MetricSums(loss, correct, len(indices))
