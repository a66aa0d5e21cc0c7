"""One label an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from common.config import TaskKind
from common.errors import DataError
from common.examples import Batch, Examples, ImageForm
from common.images import open_image
from common.tables import Table, label_ids
from common.task_classify import MADE_UP_LENGTHS, SequenceClassification


@dataclass(frozen=True)
class ImageClassification:
    """The label of an image. Loss, correctness and sums are those of `SequenceClassification`.

    What is a tokenizer to other tasks is the model's image processor here. Images are kept in memory at the
    model's size, one byte a colour: a thousand of 224 by 224 pixels take 150 MB.
    """

    labels: tuple[str, ...]
    weights: tuple[float, ...] = ()
    kind: TaskKind = TaskKind.IMAGE_CLASSIFICATION

    @property
    def outputs(self) -> int:
        return len(self.labels)

    @property
    def _answer(self) -> SequenceClassification:
        return SequenceClassification(self.labels, self.weights)

    def encode(self, table: Table, tokenizer: Any, max_length: int) -> Examples:
        images = []
        for row, text in zip(table.rows, table.text, strict=True):
            try:
                images.append(_pixels(tokenizer, open_image(text)))
            except DataError as error:
                raise DataError(f"{table.source}, row {row}, text column: {error}. Replace it.") from None
        return _pack(images, label_ids(table, self.labels), tokenizer)

    def made_up(self, rng: np.random.Generator, tokenizer: Any) -> Examples:
        shape = _pixels(tokenizer, np.zeros((64, 64, 3), dtype=np.uint8)).shape
        images = [rng.integers(0, 256, shape).astype(np.uint8) for _ in MADE_UP_LENGTHS]
        return _pack(images, rng.integers(0, self.outputs, len(images)), tokenizer)

    def record_losses(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        return self._answer.record_losses(logits, batch)

    def correct(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        return self._answer.correct(logits, batch)

    def record_sums(self, logits: torch.Tensor, batch: Batch, tokenizer: Any) -> torch.Tensor:
        return self._answer.record_sums(logits, batch, tokenizer)

    def scores(self, sums: NDArray[np.float64], count: int) -> dict[str, float]:
        return self._answer.scores(sums, count)


def _pixels(processor: Any, image: Any) -> NDArray[np.uint8]:
    """`(channels, height, width)`: the image as the processor cuts and scales it, before it is normalised."""
    made = processor(images=[image], do_rescale=False, do_normalize=False, return_tensors="np")
    pixels: NDArray[np.uint8] = np.clip(np.rint(made["pixel_values"][0]), 0, 255).astype(np.uint8)
    return pixels


def _pack(images: list[NDArray[np.uint8]], target: NDArray[np.int64], processor: Any) -> Examples:
    shape = images[0].shape
    if any(image.shape != shape for image in images):
        raise DataError(
            "the model's image processor gives images of unlike sizes: give preprocessor_config.json one size"
        )
    plain = not getattr(processor, "do_normalize", True)
    mean, std = (
        ((0.0,) * shape[0], (1.0,) * shape[0]) if plain else (processor.image_mean, processor.image_std)
    )
    return Examples(
        np.concatenate([image.reshape(-1) for image in images]),
        np.arange(len(images) + 1, dtype=np.int64) * int(np.prod(shape)),
        np.asarray(target),
        image=ImageForm((shape[0], shape[1], shape[2]), tuple(mean), tuple(std)),
    )
