"""The encoder's pooled output of each record, computed once while the encoder does not change."""

from __future__ import annotations

import numpy as np
import torch

from common.adapter import Layout, read_vector
from common.errors import ModelError
from common.models import AdaptedModel, MeanPooledClassifier
from common.tasks import Examples, IntArray, by_length, collate

_MICRO_BATCH = 64


class FeatureCache:
    """Features of one set of examples: what the mean-pooled head reads.

    A record's features depend on the record and the encoder only, so the simulated sites of a process can
    share one cache. Kept on the CPU, `(records, hidden_size)` float32, filled as records are asked for, and
    forgotten as soon as the encoder's adapter, or the set of examples, is another.
    """

    def __init__(self) -> None:
        self._adapter = np.empty(0, dtype=np.float32)
        self._examples: Examples | None = None
        self._values = torch.empty(0, 0)
        self._known = np.empty(0, dtype=bool)

    @torch.no_grad()
    def of(self, model: AdaptedModel, examples: Examples, indices: IntArray) -> torch.Tensor:
        """`(len(examples), hidden_size)`, of which the rows `indices` are filled; on the CPU.

        Raises:
            ModelError: the model has no mean-pooled head.
        """
        module = model.module
        if not isinstance(module, MeanPooledClassifier):
            raise ModelError("features are read by the mean-pooled head: set model.head = 'mean'")
        encoder = {name: p for name, p in model.parameters.items() if ".lora_" in name}
        adapter = read_vector(encoder, Layout.of(encoder))
        if self._examples is not examples or not np.array_equal(adapter, self._adapter):
            self._adapter, self._examples = adapter, examples
            self._values = torch.empty(len(examples), module.head.in_features)
            self._known = np.zeros(len(examples), dtype=bool)
        missing = indices[~self._known[indices]]
        for part in by_length(examples, missing, _MICRO_BATCH):
            batch = collate(examples, part, model.pad_id, model.device)
            self._values[part] = module.features(**batch.inputs).float().cpu()
        self._known[missing] = True
        return self._values
