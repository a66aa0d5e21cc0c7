"""Whole federations for tests: real sites behind Flower messages, a network that a test can bend, an oracle.

Messages travel as the bytes that Flower would send. The base model of a federation is loaded once, however
many folders it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Error, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from safetensors.numpy import load_file

import client.app
import simulations.fleet
from client.identity import SiteFolder, load_local_key
from client.secagg import SecAggClient
from client.secagg_state import Journal, Update
from client.store import WaitingUpdate, load_waiting
from common import wire
from common.adapter import Vector, read_vector, write_vector
from common.config import RunConfig
from common.ledger import Reserve
from common.models import AdaptedModel
from common.secagg.errors import Exchange
from common.secagg.masks import Ring
from common.secagg.messages import MaskReply, MaskRequest
from server import rounds
from server.checkpoint import Checkpoint
from server.record import Attempt, RoundEvent, RunFolder
from server.secagg import SecAggServer, SecureSum
from simulations.engines import InlineGrid
from simulations.fleet import Fleet, SimulatedSites
from simulations.run import prepare
from tests.conftest import tiny_config

ROUTES = {exchange: f"query.{exchange.name.lower()}" for exchange in Exchange}


def small_config(folder: Path, train: Path, /, **sections: dict[str, Any]) -> RunConfig:
    """Not resolved: two warm-up rounds and one more, of few steps, whose cost needs no calibration."""
    data: dict[str, dict[str, Any]] = {
        "run": {"rounds": 1, "checkpoints": 100},
        "model": {"head": "mean"},
        "sites": {"count": 6},
        "privacy": {
            "sample_rate": 0.5,
            "nominal_records": 12,
            "noise_multiplier": 4.0,
            "target_epsilon": 12.0,
        },
        "warmup": {
            "rounds": 2,
            "local_steps": 2,
            "learning_rate": 0.5,
            "noise_multiplier": 4.0,
            "target_epsilon": 6.0,
        },
        "training": {"local_steps": 1, "learning_rate": 0.5},
        "aggregation": {"min_cohort": 4},
        "evaluation": {"every": 0},
    }
    for section, keys in sections.items():
        data[section] = {**data.get(section, {}), **keys}
    data["model"] = {"name": str(folder), "max_length": 32, **data["model"]}
    return tiny_config(folder, train, **data)


class Fleets:
    """Stands in for `open_fleet`: one model in memory for all the folders of one configuration."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.split = prepare(config)
        self._opened: dict[Path, Fleet] = {}
        self._model: AdaptedModel | None = None
        self._injected = np.empty(0, dtype=np.float32)

    def open(self, path: Path) -> Fleet:
        if path in self._opened:
            return self._opened[path]
        with pytest.MonkeyPatch.context() as patch:
            if (model := self._model) is not None:  # which has been tested
                self.start_over()
                patch.setattr(simulations.fleet, "load_model", lambda *_: model)
                patch.setattr(simulations.fleet, "self_test", lambda *_: None)
            fleet = Fleet(RunFolder(path), self.config, self.split)
        if model is None:
            self._model = fleet.model
            self._injected = read_vector(fleet.model.parameters, fleet.model.layout)
        self._opened[path] = fleet
        return fleet

    def start_over(self) -> None:
        """The adapter as it was injected: another run has left it somewhere."""
        assert self._model is not None
        write_vector(self._model.parameters, self._model.layout, self._injected)

    def close(self, path: Path) -> None:
        """As if the process that had opened it were gone. Before its files are copied or replaced."""
        if (fleet := self._opened.get(path)) is None:
            return
        while fleet._ledgers:
            fleet._ledgers.popitem()[1].close()
        fleet.__dict__.pop("roster", None)


def patch_fleets(patch: pytest.MonkeyPatch, fleets: Fleets) -> None:
    patch.setattr(simulations.fleet, "open_fleet", fleets.open)


# The network


@dataclass(frozen=True)
class Call:
    """One message and what came back. `wire`: the reply's bytes on Flower's transport."""

    node: int
    kind: str
    group: str
    request: RecordDict
    reply: RecordDict | None
    wire: bytes

    @property
    def message(self) -> wire.Message:
        assert self.reply is not None
        return wire.decode_reply(self.reply)[0]


def _over_the_wire(message: Message) -> tuple[Message, bytes]:
    data = message_to_proto(message).SerializeToString()
    return message_from_proto(ProtoMessage.FromString(data)), data


class Network(InlineGrid):
    """Between an honest server and the sites of the run in `path`: keeps everything, and may bend it.

    lose: (node, kind) → "sent", "unsent" (the site never hears) or "unanswered" (the reply never arrives).
    bend: (call, reply) → another reply of that site. before: called before each message reaches its site.
    """

    def __init__(
        self,
        path: Path,
        sites: int,
        *,
        lose: Callable[[int, str], str] = lambda node, kind: "sent",
        bend: Callable[[Call], RecordDict | None] = lambda call: None,
        before: Callable[[int, str], None] = lambda node, kind: None,
    ) -> None:
        app = client.app.make_app(SimulatedSites(path))
        super().__init__(lambda message, context: self._deliver(app, message, context), sites)  # type: ignore[arg-type]
        self.calls: list[Call] = []
        self._lose, self._bend, self._before = lose, bend, before

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in list(messages):
            if self._lose(message.metadata.dst_node_id, message.metadata.message_type) == "unsent":
                ids.append("")
            else:
                ids += super().push_messages([message])
        return ids

    def _deliver(self, app: Any, message: Message, context: Context) -> Message:
        node, kind = message.metadata.dst_node_id, message.metadata.message_type
        self._before(node, kind)
        request, _ = _over_the_wire(message)
        reply, data = _over_the_wire(app(request, context))
        content = reply.content if reply.has_content() else None
        call = Call(node, kind, message.metadata.group_id, request.content, content, data)
        self.calls.append(call)
        if self._lose(node, kind) == "unanswered":
            return Message(Error(5, "lost"), reply_to=message)
        bent = self._bend(call)
        return reply if bent is None else Message(bent, reply_to=message)

    def ask(self, node: int, kind: str, request: wire.Message | RecordDict) -> RecordDict:
        """What a lying server does: any message to any site on any route."""
        content = request if isinstance(request, RecordDict) else wire.encode(request)
        (reply,) = self.send_and_receive([Message(content, node, kind, group_id="1")])
        assert not reply.has_error()
        return reply.content


# The oracle


@dataclass
class Oracle:
    """What sites have masked and what the server has unmasked, by (round, attempt), added up as integers.

    It watches from outside: the product does not know of it.
    """

    vectors: dict[tuple[int, int], dict[int, Ring]] = field(default_factory=dict)
    masked: dict[tuple[int, int], dict[int, Ring]] = field(default_factory=dict)
    sums: dict[tuple[int, int], SecureSum] = field(default_factory=dict)
    updates: list[Vector] = field(default_factory=list)  # in the clear, in the order of training
    counts: list[dict[str, int]] = field(default_factory=list)

    def watch(self, patch: pytest.MonkeyPatch) -> Oracle:
        mask, close, train, measure = (
            SecAggClient.mask,
            SecAggServer.close_unmask,
            client.app.train,
            client.app.measure,
        )

        def masking(this: SecAggClient, request: MaskRequest, update: Update) -> MaskReply:
            vector = update.vector.copy()
            reply = mask(this, request, update)
            key = this.mark
            assert key is not None and this.site.id not in self.vectors.get(key, {})
            self.vectors.setdefault(key, {})[this.site.id] = vector
            self.masked.setdefault(key, {})[this.site.id] = reply.vector.copy()
            return reply

        def closing(this: SecAggServer) -> SecureSum:
            result = close(this)
            self.sums[this.request.round, this.request.attempt] = result
            return result

        def training(*arguments: Any) -> Vector:
            self.updates.append(train(*arguments))
            return self.updates[-1]

        def measuring(*arguments: Any) -> dict[str, int]:
            self.counts.append(measure(*arguments))
            return self.counts[-1]

        patch.setattr(SecAggClient, "mask", masking)
        patch.setattr(SecAggServer, "close_unmask", closing)
        patch.setattr(client.app, "train", training)
        patch.setattr(client.app, "measure", measuring)
        return self

    def plain_sum(self, key: tuple[int, int], sites: Iterable[int]) -> list[int]:
        """Python integers, one by one."""
        vectors = [self.vectors[key][site] for site in sites]
        modulus = 2 ** (8 * vectors[0].itemsize)
        return [sum(map(int, column)) % modulus for column in zip(*vectors, strict=True)]

    def check(self, run: RunFolder) -> int:
        """Every sum is exact, over whom the record says, and every counted round had one. How many."""
        counted = {event.round for event in run.rounds()[1:] if event.counted}
        ends = {(end.round, end.attempt): end for end in run.sessions()}
        assert {key[0] for key in self.sums} >= counted
        for key, result in self.sums.items():
            assert result.total.tolist() == self.plain_sum(key, result.survivors)
            assert ends[key].survivors == list(result.survivors)
            assert (ends[key].outcome == "sum") == (key[0] in counted)
        return len(self.sums)


# Runs


class Watch:
    """Keeps what people would see."""

    def __init__(self) -> None:
        self.stages: list[tuple[int, Exchange]] = []

    def site_done(self, round_number: int, asked: int) -> None: ...

    def stage(self, round_number: int, exchange: Exchange) -> None:
        self.stages.append((round_number, exchange))

    def round_done(self, event: RoundEvent) -> None: ...


def run(fleets: Fleets, fleet: Fleet, grid: Any) -> Checkpoint:
    fleets.start_over()
    return rounds.run(fleet.job(), grid, Watch())


def adapters(fleet: Fleet) -> dict[int, Vector]:
    """The global adapter after each round, of the checkpoints that are kept."""
    files = fleet.folder.checkpoints.glob("round-*.safetensors")
    return {int(path.stem.removeprefix("round-")): load_file(path)["adapter"] for path in sorted(files)}


def attempts(run: RunFolder) -> list[Attempt]:
    return [event for event in run.read_events() if isinstance(event, Attempt)]


# A site, looked at from the inside


@dataclass(frozen=True)
class Inside:
    """Of one site of a run: what it has kept, and what it has written for its own people."""

    fleet: Fleet
    site: int

    @property
    def folder(self) -> SiteFolder:
        return SiteFolder(self.fleet.folder.site(self.site))

    @property
    def log(self) -> list[str]:
        path = self.folder.path / "site.log"
        return path.read_text("utf-8").splitlines() if path.exists() else []

    @property
    def journal(self) -> Journal | None:
        pinned = self.fleet.site(self.site).pinned
        assert pinned is not None
        data = pinned.store.load()
        return None if data is None else Journal.decode(data)

    @property
    def waiting(self) -> WaitingUpdate | None:
        return load_waiting(self.folder.waiting, load_local_key(self.folder.local_key))

    @property
    def charges(self) -> int:
        return sum(isinstance(entry.record, Reserve) for entry in self.fleet.ledger(self.site).entries())


def windows(data: bytes, size: int, step: int) -> Iterator[bytes]:
    """Each run of `size` bytes, unless it is too plain to be told from chance."""
    for start in range(0, len(data) - size + 1, step):
        part = data[start : start + size]
        if len(set(part)) > size // 2:
            yield part


def chi_square(data: bytes) -> float:
    """Of byte values against the uniform distribution: 255 degrees of freedom, 1e-6 above 377."""
    counts = np.bincount(np.frombuffer(data, dtype=np.uint8), minlength=256)
    expected = len(data) / 256
    return float((((counts - expected) ** 2) / expected).sum())
