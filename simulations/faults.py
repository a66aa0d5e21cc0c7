"""Sites that drop out: a grid that loses messages of the five exchanges, as a network or a crash would."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from common.secagg.errors import Exchange

_EXCHANGES = {f"query.{exchange.name.lower()}": exchange for exchange in Exchange}
_UNAVAILABLE = 5  # what Flower says of a node that is gone


class LossyGrid(Grid):
    """`grid`, but each exchange loses each site with chance `dropout`: half the time before it has heard of
    it, half the time after it has answered.

    Whom it loses is a function of seed, round, exchange and node, so a run that was killed and resumed
    loses the same sites (inline; Ray's nodes have new ids each time).
    """

    def __init__(self, grid: Grid, dropout: float, seed: int) -> None:
        self._grid = grid
        self._dropout = dropout
        self._seed = seed
        self._lost: dict[str, Message] = {}  # of requests that get an error for an answer

    def set_run(self, run: Run) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        wanted = list(messages)
        fates = [self._fate(message) for message in wanted]
        sent = iter(
            self._grid.push_messages([m for m, f in zip(wanted, fates, strict=True) if f != "unsent"])
        )
        ids = []
        for message, fate in zip(wanted, fates, strict=True):
            ids.append("" if fate == "unsent" else next(sent, ""))
            if fate == "unanswered" and ids[-1]:
                self._lost[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        arrived = []
        for message in self._grid.pull_messages(message_ids):
            asked = self._lost.pop(message.metadata.reply_to_message_id, None)
            arrived.append(message if asked is None else Message(Error(_UNAVAILABLE, "lost"), reply_to=asked))
        return arrived

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self._grid.send_and_receive(messages, timeout=timeout)

    def _fate(self, message: Message) -> str:
        exchange = _EXCHANGES.get(message.metadata.message_type)
        if exchange is None:
            return "sent"
        round_number, node = int(message.metadata.group_id), message.metadata.dst_node_id
        key = [self._seed, round_number, exchange.value, node, 0xD809]
        draw, half = np.random.default_rng(key).random(2)
        if draw >= self._dropout:
            return "sent"
        return "unsent" if half < 0.5 else "unanswered"
