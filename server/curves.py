"""A run's curves for TensorBoard, written as rounds finish: `tensorboard --logdir runs`."""

from __future__ import annotations

from pathlib import Path

from server.record import RoundEvent


class Curves:
    """Appends to the event files in `folder`. What an interrupted run wrote after `after_round` is purged."""

    def __init__(self, folder: Path, after_round: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = after_round + 1 if folder.exists() else None
        self._writer = SummaryWriter(str(folder), purge_step=purge)

    def add(self, event: RoundEvent) -> None:
        values = {
            "public/accuracy": event.accuracy,
            "public/loss": event.loss,
            "round/answered": event.answered,
            "round/seconds": event.seconds,
        }
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, event.round)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
