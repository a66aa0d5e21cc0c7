"""What the operator's process asks of Flower's SuperLink: which nodes and runs it has; start, stop.

It uses Flower's own client of the Control API, which is not a public interface of Flower; the tests of
deployment fail when it moves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from flwr.common.constant import Status
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fab_pb2 import Fab
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from common.errors import ConfideError


class SuperLinkAwayError(ConfideError):
    """SuperLink does not answer, or not as asked."""


@dataclass(frozen=True)
class NodeInfo:
    """A node as SuperLink knows it. public: PEM. status: registered, online, offline or unregistered."""

    id: int
    public: bytes
    status: str
    last_seen: str  # ISO 8601; empty: never


class SuperLink:
    """A connection to the Control API at https://`address`."""

    def __init__(self, address: str, authority: Path, timeout: float = 10.0) -> None:
        self._client = ControlHttpClient(
            f"https://{address}",
            interceptors=[RuntimeVersionHttpInterceptor(component_name="confide")],
            verify=str(authority),
            timeout=timeout,
        )

    def close(self) -> None:
        self._client.close()

    def nodes(self) -> list[NodeInfo]:
        with _answers():
            found = self._client.ListNodes(ListNodesRequest()).nodes_info
        return [
            NodeInfo(n.node_id, bytes(n.public_key), n.status, n.last_activated_at or "")
            for n in found
            if n.status != "unregistered"
        ]

    def register(self, public: bytes) -> None:
        with _answers():
            self._client.RegisterNode(RegisterNodeRequest(public_key=public))

    def unregister(self, node: int) -> None:
        with _answers():
            self._client.UnregisterNode(UnregisterNodeRequest(node_id=node))

    def unfinished(self) -> dict[int, str]:
        """Flower's id of each run that has not ended → the bundle's hash."""
        with _answers():
            runs = self._client.ListRuns(ListRunsRequest()).run_dict
        return {run_id: run.fab_hash for run_id, run in runs.items() if run.status.status != Status.FINISHED}

    def start(self, bundle: bytes) -> int:
        """Flower's id of a new run with this bundle."""
        fab = Fab(hash_str=hashlib.sha256(bundle).hexdigest(), content=bundle)
        with _answers():
            answer = self._client.StartRun(StartRunRequest(fab=fab))
        if not answer.run_id:
            raise SuperLinkAwayError("SuperLink did not start the run: its log says why")
        return int(answer.run_id)

    def stop(self, run: int) -> None:
        with _answers():
            self._client.StopRun(StopRunRequest(run_id=run))


@contextmanager
def _answers() -> Iterator[None]:
    try:
        yield
    except (httpx.HTTPError, OSError) as error:
        said = ""
        if isinstance(error, httpx.HTTPStatusError):
            said = f" ({error.response.status_code})"
        raise SuperLinkAwayError(
            f"SuperLink does not answer: {type(error).__name__}{said}. Is confide server run at work?"
        ) from None
