"""Tokenised records in memory, and batches of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

IntArray = NDArray[np.int64]

NO_TARGET = -100  # in a target: this place bears no loss; what torch's cross-entropy ignores


@dataclass(frozen=True)
class Ragged:
    """Rows of unlike length, end to end: row i is `values[starts[i]:starts[i+1]]`."""

    values: NDArray[Any]  # (total,)
    starts: IntArray  # (rows + 1,)

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], dtype: type[np.integer] = np.int32) -> Ragged:
        starts = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=starts[1:])
        return cls(np.fromiter((v for row in rows for v in row), dtype, count=int(starts[-1])), starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> NDArray[Any]:
        values: NDArray[Any] = self.values[self.starts[row] : self.starts[row + 1]]
        return values

    def padded(self, rows: Sequence[int] | IntArray, pad: int) -> IntArray:
        """`(len(rows), longest)`: these rows, filled up on the right with `pad`."""
        longest = max((int(self.starts[row + 1] - self.starts[row]) for row in rows), default=1)
        table = np.full((len(rows), max(longest, 1)), pad, dtype=np.int64)
        for place, row in enumerate(rows):
            values = self[row]
            table[place, : len(values)] = values
        return table


@dataclass(frozen=True)
class ImageForm:
    """How a record's pixels become the model's input: `(pixels / 255 - mean) / std`, channel by channel."""

    shape: tuple[int, int, int]  # channels, height, width
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Examples:
    """Records as the model reads them, ragged, in flat arrays: thousands of sites can share one of these.

    Record i's tokens are `tokens[starts[i]:starts[i+1]]`; `target[i]` is what the task makes of it: a
    number, a row of numbers, or, where `target` is ragged, as many as there are tokens to predict.
    """

    tokens: NDArray[Any]  # (total tokens,) int32; of images uint8 pixels
    starts: IntArray  # (records + 1,)
    target: NDArray[Any] | Ragged  # (records, ...)
    types: NDArray[np.int8] | None = None  # (total tokens,): 1 in the second text of a pair
    image: ImageForm | None = None  # tokens are pixels of this form
    decodes: bool = False  # the target is what a decoder reads, too: shifted by one, as the model does it

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> IntArray:
        return np.diff(self.starts)

    def targets(self, indices: Sequence[int] | IntArray) -> torch.Tensor:
        """`(n, ...)`: the targets of these records; ragged ones are filled up with `NO_TARGET`."""
        if isinstance(self.target, Ragged):
            return torch.from_numpy(self.target.padded(indices, NO_TARGET))
        return torch.from_numpy(self.target[np.asarray(indices, dtype=np.int64)])

    def contents(self, indices: Sequence[int] | IntArray) -> Iterator[bytes]:
        """All that a model reads of each of these records, for digests."""
        for i in indices:
            start, end = int(self.starts[i]), int(self.starts[i + 1])
            parts = [self.tokens[start:end], np.asarray(self.target[i])]
            if self.types is not None:
                parts.append(self.types[start:end])
            yield b"".join(len(p.tobytes()).to_bytes(8, "little") + p.tobytes() for p in parts)


@dataclass(frozen=True)
class Batch:
    """`inputs`: what the model is called with, `(n, longest)`; `target`: `(n, ...)`."""

    inputs: dict[str, torch.Tensor]
    target: torch.Tensor

    def __len__(self) -> int:
        return len(self.target)


def pack(
    ids: Sequence[Sequence[int]],
    target: Sequence[int] | NDArray[Any] | Ragged,
    types: Sequence[Sequence[int]] | None = None,
    *,
    decodes: bool = False,
) -> Examples:
    """Examples of token ids, one list a record. Token types that are all 0 are what models assume anyway."""
    tokens = Ragged.of(ids)
    kinds = None if types is None else Ragged.of(types, np.int8).values
    return Examples(
        tokens.values,
        tokens.starts,
        target if isinstance(target, Ragged) else np.asarray(target),
        kinds if kinds is not None and kinds.any() else None,
        decodes=decodes,
    )


def collate(
    examples: Examples, indices: Sequence[int] | IntArray, pad_id: int, device: torch.device
) -> Batch:
    """Records `indices`, right-padded to the longest of them."""
    target = examples.targets(indices).to(device)
    if examples.image is not None:
        return Batch({"pixel_values": _pixels(examples, examples.image, indices).to(device)}, target)
    tokens = Ragged(examples.tokens, examples.starts).padded(indices, pad_id)
    lengths = examples.lengths[np.asarray(indices, dtype=np.int64)]
    inputs = {
        "input_ids": tokens,
        "attention_mask": (np.arange(tokens.shape[1]) < lengths[:, None]).astype(np.int64),
    }
    if examples.types is not None:
        inputs["token_type_ids"] = Ragged(examples.types, examples.starts).padded(indices, 0)
    batch = Batch({name: torch.from_numpy(value).to(device) for name, value in inputs.items()}, target)
    if examples.decodes:
        batch.inputs["labels"] = target
    return batch


def _pixels(examples: Examples, form: ImageForm, indices: Sequence[int] | IntArray) -> torch.Tensor:
    """`(n, channels, height, width)` float32."""
    size = int(np.prod(form.shape))
    flat = examples.tokens.reshape(-1, size)[np.asarray(indices, dtype=np.int64)]
    pixels = torch.from_numpy(flat).reshape(-1, *form.shape).float() / 255
    mean, std = (torch.tensor(values).reshape(1, -1, 1, 1) for values in (form.mean, form.std))
    scaled: torch.Tensor = (pixels - mean) / std
    return scaled


def by_length(examples: Examples, indices: IntArray, size: int) -> list[IntArray]:
    """`indices` in micro-batches of at most `size` records of like length, so that little is padding."""
    order = indices[np.argsort(examples.lengths[indices], kind="stable")]
    return [order[start : start + size] for start in range(0, len(order), size)]
