"""A site's own executor: it takes its node's tasks and runs the installed client, never what the server sent.

Flower's executor unpacks and imports the bundle that came with a task. This one compares the bundle's whole
SHA-256 with what the site's people have approved, reads the job's configuration out of its bytes, and answers
with the client that is installed here. Model and torch stay warm between tasks.

It uses modules of Flower that are not its public interface; tests/client/test_executor.py fails when they
move.
"""

from __future__ import annotations

import fcntl
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.proto.task_pb2 import Task
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime import run_clientapp
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

import client.app
from client.bundles import admit
from client.identity import SiteFolder
from client.site import Site
from client.worksite import Worksite
from common.errors import CheckpointError
from common.identity import read_private
from common.waiting import hurry

POLL_SECONDS = 0.1
_AWAY_SECONDS = 1.0  # between questions to a node that is not there
_ACQUIRE = frozenset({"/flwr.proto.Runtime/AcquireTask"})
_NAME = "confide-executor"
_MAX_SECRET_BYTES = 1024
_log = logging.getLogger("confide.executor")


@contextmanager
def only_one(folder: SiteFolder, what: str = "executor") -> Iterator[None]:
    """Inside: no other executor, or whatever it is called, works in this folder.

    Raises:
        CheckpointError: one does.
    """
    with (folder.path / f".{what}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(f"the {what} of {folder.path} runs already: stop it first") from None
        yield


class Worksites:
    """The job that was worked on last, opened; another takes its place."""

    def __init__(self, folder: SiteFolder, passphrase: bytes | None) -> None:
        self._folder = folder
        self._passphrase = passphrase
        self._open: tuple[str, Worksite] | None = None

    def site(self, bundle: bytes, said: str) -> Site:
        """The site at the job of this bundle.

        Raises:
            PolicyRefusedError: the bundle is not approved. All of `Worksite`.
        """
        job = admit(self._folder, bundle, said)
        if self._open is None or self._open[0] != job.digest:
            self.close()
            self._open = job.digest, Worksite(self._folder, job, self._passphrase)
        return self._open[1].site()

    def close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None


@dataclass(frozen=True)
class Node:
    """Where the site's own SuperNode gives out tasks. address: host:port, on this machine."""

    address: str
    secret: bytes

    def claimer(self) -> RuntimeHttpClient:
        """Asks for tasks; signs each question with the secret that it shares with the node."""
        signed = SuperExecAuthHttpInterceptor(master_secret=self.secret, protected_methods=_ACQUIRE)
        return self._client(signed)

    def worker(self, token: str) -> RuntimeHttpClient:
        return self._client(RuntimeTokenHttpInterceptor(token))

    def _client(self, interceptor: Any) -> RuntimeHttpClient:
        named = RuntimeVersionHttpInterceptor(component_name=_NAME)
        return RuntimeHttpClient.from_server_address(
            server_address=self.address,
            insecure=True,
            root_certificates=None,
            interceptors=[named, interceptor],
        )


def execute(
    folder: SiteFolder,
    node: Node,
    worksites: Worksites,
    ended: Callable[[], bool],
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Take tasks, one after another, until `ended` says so. A node that is away is waited for."""
    # A task is given out before its message is whole.
    hurry(run_clientapp, "pull_and_inflate_object_from_tree")
    claimer = node.claimer()
    try:
        while not ended():
            try:
                task, token = claim(claimer)
            except (httpx.HTTPError, OSError) as error:
                _log.info("the node does not answer (%s)", type(error).__name__)
                sleep(_AWAY_SECONDS)
                continue
            if task is None:
                sleep(POLL_SECONDS)
                continue
            try:
                work(node, task, token, worksites)
            except Exception as error:
                # What went wrong between node and executor: the site's own failures are answers.
                _log.warning("a task was lost: %s", type(error).__name__)
    finally:
        claimer.close()
        worksites.close()


def claim(claimer: RuntimeHttpClient) -> tuple[Task | None, str]:
    """The next task and its token. Only tasks of client apps: this is no server's or agent's executor."""
    answer = claimer.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
    if not answer.HasField("task") or not answer.token:
        return None, ""
    return answer.task, answer.token


def work(node: Node, task: Task, token: str, worksites: Worksites) -> None:
    """One task: its message in, the site's answer out."""
    runtime = node.worker(token)
    beats = HeartbeatSender(_heartbeat(runtime))
    beats.start()
    status, context = SubStatus.FAILED, None
    try:
        message, context, _, fab = pull_task_input(runtime)
        began = time.monotonic()
        reply = answer(message, context, fab, task, worksites)
        _log.info("%s answered in %.2f s", message.metadata.message_type, time.monotonic() - began)
        context.state = RecordDict()  # nothing of the site is kept in Flower
        push_message(runtime, reply, context)
        status = SubStatus.COMPLETED
    finally:
        # A fixed text: that of an exception stays here.
        push_task_output(runtime, context, status, "" if status == SubStatus.COMPLETED else "failed")
        if beats.is_running:
            beats.stop()
        runtime.close()


def _heartbeat(runtime: RuntimeHttpClient) -> Callable[[], bool]:
    """One that fails is tried again: only a node that hears none for long gives the task up."""
    beat = make_task_heartbeat_fn_http(runtime)

    def once() -> bool:
        try:
            return bool(beat())
        except (httpx.HTTPError, OSError):
            return False

    return once


def answer(message: Message, context: Context, fab: Fab, task: Task, worksites: Worksites) -> Message:
    """The installed client's answer. The bundle is checked first; a refusal is an answer as well."""

    def open_site(_: Context) -> Site:
        # Three names for one thing, of which only the bytes count.
        said = fab.hash_str if fab.hash_str == task.fab_hash else f"{fab.hash_str} and {task.fab_hash}"
        return worksites.site(fab.content, said)

    app: ClientApp = client.app.make_app(open_site)
    return app(message, context)


def load_secret(folder: SiteFolder) -> bytes:
    """Raises MissingKeyError, ExposedKeyError."""
    return read_private(folder.executor_secret, _MAX_SECRET_BYTES)
