"""From the mean of the sites' updates to the next global adapter."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.adapter import Vector
from common.config import ServerOptimizer, ServerSection
from common.errors import ProtocolError, RoundError

Floats = NDArray[np.float64]


class PlainSum:
    """Updates in the clear, for study: one accumulator, whatever the number of sites."""

    def __init__(self, size: int) -> None:
        self._sum = np.zeros(size, dtype=np.float64)
        self._sites = 0

    def add(self, vector: Vector) -> None:
        """Add `vector`, `(size,)` float32."""
        if vector.shape != self._sum.shape:
            raise ProtocolError(f"an update must have {self._sum.size} numbers, found {vector.size}")
        if not np.isfinite(vector).all():
            raise ProtocolError("an update must be finite")
        self._sum += vector.astype(np.float64)
        self._sites += 1

    def mean(self) -> Floats:
        """`(size,)` float64: the mean of what was added."""
        if not self._sites:
            raise RoundError("no update arrived in this round")
        return self._sum / self._sites


@dataclass(frozen=True)
class OptimizerState:
    """First and second moment, `(layout.size,)` float64; zeros where an optimizer does not use them."""

    momentum: Floats
    second: Floats

    @classmethod
    def zero(cls, size: int) -> OptimizerState:
        return cls(np.zeros(size), np.zeros(size))


def step(
    adapter: Vector,
    update: Floats,
    positions: NDArray[np.int64],
    state: OptimizerState,
    config: ServerSection,
) -> tuple[Vector, OptimizerState]:
    """The next adapter `(layout.size,)` and state.

    `update` is the mean change of the numbers at `positions`; the others stay. FedAvg: McMahan et al.
    2017. FedAvgM: Hsu et al. 2019, 1909.06335. FedAdam, FedYogi: Reddi et al. 2021, 2003.00295, Algorithm 2.
    """
    m, v = state.momentum[positions], state.second[positions]
    match config.optimizer:
        case ServerOptimizer.FEDAVG:
            change = update
        case ServerOptimizer.FEDAVGM:
            m = config.momentum * m + update
            change = m
        case ServerOptimizer.FEDADAM:
            m = config.momentum * m + (1 - config.momentum) * update
            v = config.beta2 * v + (1 - config.beta2) * update**2
            change = m / (np.sqrt(v) + config.tau)
        case ServerOptimizer.FEDYOGI:
            m = config.momentum * m + (1 - config.momentum) * update
            v = v - (1 - config.beta2) * update**2 * np.sign(v - update**2)
            change = m / (np.sqrt(v) + config.tau)
    momentum, second = state.momentum.copy(), state.second.copy()
    momentum[positions], second[positions] = m, v
    after = adapter.astype(np.float64)
    after[positions] += config.learning_rate * change
    return after.astype(np.float32), OptimizerState(momentum, second)
