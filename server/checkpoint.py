"""The state of a run between rounds: written atomically, checked when read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialize

from common.adapter import Vector
from common.errors import CheckpointError
from common.files import write_atomically
from server.aggregation import OptimizerState

_NAME = re.compile(r"^round-(\d{6})\.safetensors$")


@dataclass(frozen=True)
class Checkpoint:
    """After round `round` (0: before the first): the global adapter and the server optimizer.

    No random state is kept: every draw is a function of seed and round, or of the run's secret and the
    round, so there is none.
    """

    round: int
    adapter: Vector
    state: OptimizerState


def _digest(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    h = hashlib.sha256(b"confide/checkpoint/v1")
    for name in sorted(tensors):
        t = tensors[name]
        h.update(f"{name}:{t.dtype.str}:{t.shape};".encode() + t.tobytes())
    for key in sorted(metadata):
        h.update(f"{key}={metadata[key]};".encode())
    return h.hexdigest()


def save(folder: Path, checkpoint: Checkpoint, *, config_digest: str, layout_digest: str, keep: int) -> Path:
    """Write `checkpoint` and remove all but the newest `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, np.ndarray] = {
        "adapter": checkpoint.adapter,
        "momentum": checkpoint.state.momentum,
        "second": checkpoint.state.second,
    }
    metadata = {"round": str(checkpoint.round), "config": config_digest, "layout": layout_digest}
    metadata["sha256"] = _digest(tensors, metadata)
    path = folder / f"round-{checkpoint.round:06d}.safetensors"
    write_atomically(path, serialize(tensors, metadata))
    for old in _list(folder)[:-keep]:
        old.unlink()
    return path


def load_newest(folder: Path, *, config_digest: str, layout_digest: str) -> Checkpoint | None:
    """The newest checkpoint, or `None` where there is none yet.

    Raises:
        CheckpointError: it is corrupt, or belongs to another configuration or layout.
    """
    found = _list(folder)
    return _load(found[-1], config_digest, layout_digest) if found else None


def _list(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("round-*.safetensors") if _NAME.match(p.name))


def _load(path: Path, config_digest: str, layout_digest: str) -> Checkpoint:
    def refuse(why: str) -> CheckpointError:
        return CheckpointError(
            f"checkpoint {path} cannot be used: {why}. Remove it to resume from the one before"
        )

    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = dict(file.metadata() or {})
            get: Callable[[str], np.ndarray] = file.get_tensor
            names: list[str] = list(file.keys())
            tensors = {name: get(name) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise refuse(f"it is corrupt ({type(error).__name__})") from None
    stored = metadata.pop("sha256", "")
    if set(tensors) != {"adapter", "momentum", "second"} or stored != _digest(tensors, metadata):
        raise refuse("its checksum does not match its content")
    if metadata.get("config") != config_digest:
        raise refuse(
            "it was written under another configuration, "
            "or with other data, another base model or another secret"
        )
    if metadata.get("layout") != layout_digest:
        raise refuse("its adapter has another layout than this model's")
    return Checkpoint(
        int(metadata["round"]),
        tensors["adapter"],
        OptimizerState(tensors["momentum"], tensors["second"]),
    )
