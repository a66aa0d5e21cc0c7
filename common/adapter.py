"""Adapter parameters as one flat float32 vector, and the vector's layout.

The layout (names, shapes, order) is agreed by hash before numbers are exchanged: two sites that would
read the same vector differently must never reach a sum.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from common.errors import ModelError

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class Layout:
    """Which parameters, of which shapes, lie one after another in a vector of `size` numbers."""

    entries: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, parameters: Mapping[str, torch.Tensor]) -> Layout:
        """The layout of `parameters`, in the order of their names."""
        return cls(tuple((name, tuple(parameters[name].shape)) for name in sorted(parameters)))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        return tuple(int(np.prod(shape, dtype=np.int64)) for _, shape in self.entries)

    @cached_property
    def size(self) -> int:
        return sum(self.sizes)

    @cached_property
    def digest(self) -> str:
        """SHA-256, hex, of the names and shapes in order."""
        text = json.dumps([[name, list(shape)] for name, shape in self.entries], separators=(",", ":"))
        return hashlib.sha256(b"confide/layout/v1" + text.encode()).hexdigest()

    def positions(self, part: Layout) -> NDArray[np.int64]:
        """`(part.size,)`: where the numbers of `part`, a subset of this layout, lie in this one."""
        starts = dict(zip((name for name, _ in self.entries), np.cumsum((0, *self.sizes)), strict=False))
        missing = [name for name, _ in part.entries if name not in starts]
        if missing:
            raise ModelError(f"the layout lacks {missing[:3]}: it belongs to another adapter")
        pieces = [
            np.arange(starts[name], starts[name] + size)
            for (name, _), size in zip(part.entries, part.sizes, strict=True)
        ]
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)


@torch.no_grad()
def read_vector(parameters: Mapping[str, torch.Tensor], layout: Layout) -> Vector:
    """`(layout.size,)` float32: a copy of the parameters' values."""
    vector = np.empty(layout.size, dtype=np.float32)
    start = 0
    for (name, _), size in zip(layout.entries, layout.sizes, strict=True):
        vector[start : start + size] = parameters[name].detach().reshape(-1).float().cpu().numpy()
        start += size
    return vector


def check_vector(layout: Layout, vector: Vector) -> None:
    """Refuse a vector that is no adapter of this layout.

    Raises:
        ModelError: on a wrong length or type, or a value that is not finite.
    """
    if vector.shape != (layout.size,) or vector.dtype != np.float32:
        raise ModelError(
            f"an adapter vector must be float32 of length {layout.size}, "
            f"found {vector.dtype} of shape {vector.shape}"
        )
    if not np.isfinite(vector).all():
        raise ModelError(
            "the adapter has values that are not finite: training diverged. Lower training.learning_rate "
            "(or server.learning_rate) and resume from an earlier checkpoint"
        )


@torch.no_grad()
def write_vector(parameters: Mapping[str, torch.Tensor], layout: Layout, vector: Vector) -> None:
    """Copy `vector`, `(layout.size,)` float32, into the parameters.

    Raises:
        ModelError: on a wrong length or type, or a value that is not finite; nothing is written then.
    """
    check_vector(layout, vector)
    start = 0
    source = torch.from_numpy(np.array(vector))
    for (name, shape), size in zip(layout.entries, layout.sizes, strict=True):
        parameters[name].copy_(source[start : start + size].reshape(shape))
        start += size
