"""Two ways to run the same two Flower apps: in this process, or on Flower's Ray simulation."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from uuid import uuid4

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

import client.app
from simulations.fleet import SimulatedSites


class InlineGrid(Grid):
    """Flower's Grid with the client app called in this process, one message at a pull.

    Nodes are 1..n and answer in the order in which they were asked, so a run is deterministic, and a reply
    is dropped as soon as the server has read it, so memory does not grow with the number of sites.
    """

    def __init__(self, app: ClientApp, sites: int) -> None:
        self._app = app
        self._sites = sites
        self._queue: deque[Message] = deque()
        self._run = Run.create_empty(run_id=1)
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return range(1, self._sites + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            self._queue.append(message)
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = set(message_ids)
        while self._queue:
            message = self._queue.popleft()
            if message.metadata.message_id in wanted:
                return [self._app(message, self._context(message.metadata.dst_node_id))]
        return []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        ids = set(self.push_messages(messages))
        replies: list[Message] = []
        while arrived := list(self.pull_messages(ids)):
            replies += arrived
        return replies

    def _context(self, node: int) -> Context:
        return Context(
            run_id=1,
            node_id=node,
            node_config={"partition-id": node - 1, "num-partitions": self._sites},
            state=RecordDict(),
            run_config={},
        )


def run_inline(server: ServerApp, path: Path, sites: int) -> None:
    grid = InlineGrid(client.app.make_app(SimulatedSites(path)), sites)
    server(grid, Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={}))


def run_ray(server: ServerApp, path: Path, sites: int) -> None:
    """Flower's simulation: one warm model per Ray actor, as many actors as cores.

    Runs from the run's folder: actors import from the working directory first, and a folder that holds a
    `client` or `server` of its own would take the place of ours.
    """
    from flwr.server.superlink.fleet.vce.backend.backend import BackendConfig
    from flwr.simulation import run_simulation

    app = client.app.make_app(SimulatedSites(path))
    backend: BackendConfig = {
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        "init_args": {"log_to_driver": False, "logging_level": "error"},
    }
    logging.getLogger("flwr").setLevel(logging.ERROR)
    before = Path.cwd()
    os.chdir(path)
    try:
        run_simulation(server, app, num_supernodes=sites, backend_config=backend)
    finally:
        os.chdir(before)
