"""The executor against Flower's own node: a real Runtime API over HTTP, real tasks, real refusals.

This is the contract with modules of Flower that are not its public interface: when they move, it fails here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import flwr.supernode.start_client_internal as node_loop
import httpx
import pytest
import uvicorn
from flwr.app import Context, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.runtime_pb2 import PullTaskInputRequest
from flwr.proto.task_pb2 import Task
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeState, NodeStateFactory
from flwr.supernode.runtime import run_clientapp

from client import executor
from client.bundles import admit, keep_pending, pending
from client.executor import Node, Worksites, claim, execute, work
from client.identity import SiteFolder, create_site
from client.node import BUSY_FOR, BUSY_SECONDS, EXECUTOR_SECONDS, PART_SECONDS, Clock, attentive, forgetful
from client.policy import Code, SitePolicy
from client.site import Site
from common import wire
from common.bundle import MAX_BUNDLE_BYTES, make_bundle
from common.errors import CheckpointError, ConfideError, PolicyRefusedError, StatusCode
from tests.common.test_bundle import JOB, config

SECRET = b"s" * 32
RUN, HERE = 7, 11
BUNDLE = make_bundle(JOB, config())
DIGEST = hashlib.sha256(BUNDLE).hexdigest()


@dataclass
class RunningNode:
    """A SuperNode's Runtime API, on a port of its own; its state is filled by hand instead of by a server."""

    state: NodeState
    port: int

    @property
    def node(self) -> Node:
        return Node(f"127.0.0.1:{self.port}", SECRET)

    def ask(self, message_type: str = "query.hello", fab: bytes = BUNDLE, said: str | None = None) -> None:
        """As SuperNode does when a message has come: run, bundle, context and task, then the message."""
        digest = self.know(fab, said)
        assert self.state.create_task(task_type=TaskType.CLIENT_APP, run_id=RUN, fab_hash=digest)
        node_loop._insert_message(self.message(message_type), self.state, self.state.object_store)

    def know(self, fab: bytes = BUNDLE, said: str | None = None) -> str:
        """Run, bundle and context; the bundle's hash."""
        digest = said if said is not None else hashlib.sha256(fab).hexdigest()
        run = dataclasses.replace(Run.create_empty(RUN), fab_hash=digest, series_id=3)
        self.state.set_node_id(HERE)
        self.state.set_run_series_context(3, Context(RUN, HERE, {}, RecordDict(), {}))
        self.state.store_run(run)
        self.state.store_fab(Fab(digest, fab, {}))
        return digest

    def message(self, message_type: str = "query.hello") -> Message:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN, SUPERLINK_NODE_ID, 1
        return Message(wire.encode(wire.Hello(0)), HERE, message_type)

    def send(self, now: Callable[[], float] = time.monotonic) -> list[Message]:
        """SuperNode's own way with the answers that it waits for: what it would have sent."""
        sent: list[Message] = []

        def send(message: Message, tree: ObjectTree, seconds: float) -> tuple[set[str], str]:
            sent.append(message)
            return {tree.object_id}, "session"

        attentive(node_loop._push_messages, now)(
            state=self.state,
            object_store=self.state.object_store,
            send=send,
            push_object=lambda run, session, name, content: None,
        )
        return sent

    def take(self) -> tuple[Task, str]:
        task, token = claim(self.node.claimer())
        assert task is not None
        return task, token

    def answers_the_next(self) -> bool:
        """Nothing is left of a message: the next one is taken in and worked on, and its answer sent."""
        assert self.receive() == RUN
        (asked,) = self.state.get_messages_legacy(is_reply=False)
        vars(self.state.msg_store[asked.metadata.message_id])["is_retrieved"] = False
        work(self.node, *self.take(), Refusing())
        (sent,) = self.send()
        return sent.metadata.reply_to_message_id == asked.metadata.message_id

    def receive(self, fail_at: str = "", meanwhile: Callable[[], object] = lambda: None) -> int | None:
        """SuperNode's own way with a message that comes in; its run ends at the call `fail_at`, after what
        happens `meanwhile`."""
        self.know()
        message = self.message()
        message.metadata.__dict__["_message_id"] = message.object_id
        objects = {name: found.deflate() for name, found in get_all_nested_objects(message).items()}

        def pull_object(run: int, name: str) -> bytes:
            if fail_at == "pull_object":
                raise RunNotRunningException
            return objects[name]

        def confirm(run: int, name: str) -> None:
            if fail_at == "confirm":
                meanwhile()
                raise RunNotRunningException

        tree = get_object_tree(message)
        return forgetful(node_loop._pull_and_store_message)(
            state=self.state,
            object_store=self.state.object_store,
            node_config={},
            receive=lambda: (remove_content_from_message(message), tree),
            get_run=None,
            get_fab=None,
            pull_object=pull_object,
            confirm_message_received=confirm,
            trusted_entities=None,
        )

    def answers(self) -> list[Message]:
        return list(self.state.get_messages_legacy(is_reply=True))


@pytest.fixture
def running() -> Iterator[RunningNode]:
    factory = NodeStateFactory(ObjectStoreFactory())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app = create_app(state_factory=factory, superexec_auth_secret=SECRET)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield RunningNode(factory.state(), port)
    server.should_exit = True
    thread.join(20)


@pytest.fixture
def folder(tmp_path: Path) -> SiteFolder:
    import os

    place = SiteFolder(tmp_path / "north")
    create_site(place, "north", os.urandom, None, deployed=True)
    return place


class Refusing(Worksites):
    """A site that was opened, and says so by what it raises: what is behind it is tested elsewhere."""

    def __init__(self) -> None:
        self.asked: list[tuple[bytes, str]] = []

    def site(self, bundle: bytes, said: str) -> Site:
        self.asked.append((bundle, said))
        raise PolicyRefusedError("not here")

    def close(self) -> None:
        pass


def test_a_task_is_claimed_answered_and_done(running: RunningNode) -> None:
    running.ask()
    sites = Refusing()
    task, token = claim(running.node.claimer())
    assert task is not None
    work(running.node, task, token, sites)
    assert sites.asked == [(BUNDLE, DIGEST)]
    assert claim(running.node.claimer()) == (None, "")
    (answer,) = running.answers()
    assert not answer.has_error()


def test_a_node_gives_no_task_to_who_has_no_secret(running: RunningNode) -> None:
    running.ask()
    with pytest.raises(httpx.HTTPStatusError) as caught:
        claim(dataclasses.replace(running.node, secret=b"another").claimer())
    assert caught.value.response.status_code in (401, 403)
    assert claim(running.node.claimer())[0] is not None


def test_only_tasks_of_client_apps_are_claimed(running: RunningNode) -> None:
    running.state.set_node_id(HERE)
    for kind in (TaskType.SERVER_APP, TaskType.AGENT_APP):
        running.state.create_task(task_type=kind, run_id=RUN, fab_hash=DIGEST)
    assert claim(running.node.claimer()) == (None, "")


def test_a_refusal_goes_back_as_a_fixed_code(
    running: RunningNode, folder: SiteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the whole way: an unapproved bundle, the real executor, the bytes that SuperNode would send."""
    running.ask()
    sent: list[Message] = []
    push = executor.push_message
    monkeypatch.setattr(executor, "push_message", lambda r, m, c: (sent.append(m), push(r, m, c))[1])
    task, token = claim(running.node.claimer())
    assert task is not None
    work(running.node, task, token, Worksites(folder, None))
    decoded, head = wire.decode_reply(sent[0].content)
    assert decoded == wire.Refusal(0, StatusCode.REFUSED_POLICY)
    assert head is None
    assert pending(folder).read_bytes() == BUNDLE


def test_the_loop_goes_on_after_a_node_that_is_away_and_a_task_that_is_lost(
    running: RunningNode, folder: SiteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def claims(claimer: object) -> tuple[object, str]:
        calls.append("claim")
        match len(calls):
            case 1:
                raise httpx.ConnectError("away")
            case 2:
                return object(), "no token"  # `work` fails: the node knows no such task
            case _:
                return None, ""

    monkeypatch.setattr(executor, "claim", claims)
    rests: list[float] = []
    execute(folder, running.node, Worksites(folder, None), lambda: len(calls) >= 4, rests.append)
    assert len(calls) == 4
    assert rests == [1.0, executor.POLL_SECONDS, executor.POLL_SECONDS]


# What is admitted


def approve(folder: SiteFolder, *digests: str) -> None:
    folder.policy.write_text(SitePolicy(code=Code(bundles=digests)).to_toml())


def test_only_an_approved_hash_is_admitted(folder: SiteFolder) -> None:
    with pytest.raises(PolicyRefusedError, match="confide client approve"):
        admit(folder, BUNDLE, DIGEST)
    approve(folder, DIGEST)
    assert admit(folder, BUNDLE, DIGEST).job == JOB


def test_one_byte_of_an_approved_bundle_changed_is_refused(folder: SiteFolder) -> None:
    approve(folder, DIGEST)
    for at in range(0, len(BUNDLE), 37):
        changed = bytearray(BUNDLE)
        changed[at] ^= 1
        for said in (DIGEST, hashlib.sha256(changed).hexdigest()):
            with pytest.raises(PolicyRefusedError):
                admit(folder, bytes(changed), said)


def test_a_name_that_is_not_the_hash_is_refused(folder: SiteFolder) -> None:
    approve(folder, DIGEST)
    with pytest.raises(PolicyRefusedError, match="changed on its way"):
        admit(folder, BUNDLE, "0" * 64)


def test_nothing_of_a_bundle_is_ever_imported(folder: SiteFolder, tmp_path: Path) -> None:
    """A bundle whose module would leave a mark, approved by its hash: it is no job, so it is an error."""
    import io
    import zipfile

    mark = tmp_path / "mark"
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(BUNDLE)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name == "confide_job.py":
                data += f"\nopen({str(mark)!r}, 'w')\n".encode()
            new.writestr(name, data)
    evil = out.getvalue()
    approve(folder, hashlib.sha256(evil).hexdigest())
    with pytest.raises(ConfideError):
        Worksites(folder, None).site(evil, hashlib.sha256(evil).hexdigest())
    assert not mark.exists()


def test_of_what_is_not_approved_only_the_last_is_kept_and_nothing_long(folder: SiteFolder) -> None:
    keep_pending(folder, BUNDLE)
    keep_pending(folder, bytes(MAX_BUNDLE_BYTES + 1))
    assert pending(folder).read_bytes() == BUNDLE
    keep_pending(folder, b"another")
    assert [path.name for path in folder.bundles.iterdir()] == ["pending.fab"]


def test_two_executors_do_not_share_a_folder(folder: SiteFolder) -> None:
    with executor.only_one(folder), pytest.raises(CheckpointError, match="runs already"):  # noqa: SIM117
        with executor.only_one(folder):
            pass


# What the changes to the node lean on


def test_a_message_that_came_in_is_a_task(running: RunningNode) -> None:
    assert running.receive() == RUN
    task, token = running.take()
    sites = Refusing()
    work(running.node, task, token, sites)
    assert sites.asked == [(BUNDLE, DIGEST)]


@pytest.mark.parametrize("moment", ["pull_object", "confirm"])
def test_a_message_whose_run_ended_while_it_came_leaves_nothing_to_wait_for(
    running: RunningNode, moment: str
) -> None:
    """Seen in chaos: a job was started again just as its sites fetched a message, and all hung on it."""
    assert running.receive(moment) is None
    assert claim(running.node.claimer()) == (None, "")
    assert running.state.get_messages_legacy(is_reply=False) == []
    assert running.answers_the_next()


def test_an_answer_to_a_run_that_has_ended_is_not_taken_for_the_next_one_s(running: RunningNode) -> None:
    """A quick executor: it answers before the node has confirmed the message. The site would be one answer
    late from then on."""
    assert running.receive("confirm", lambda: work(running.node, *running.take(), Refusing())) is None
    assert running.answers_the_next()


def test_an_answer_is_sent_on(running: RunningNode) -> None:
    running.receive()
    task, token = running.take()
    work(running.node, task, token, Refusing())
    (sent,) = running.send()
    assert not sent.has_error()
    assert running.answers_the_next()


def test_an_executor_that_fails_before_it_has_the_message_is_not_waited_for(
    running: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    running.receive()
    task, token = running.take()

    def fails(runtime: RuntimeHttpClient) -> None:
        runtime.PullTaskInput(PullTaskInputRequest())
        raise RuntimeError

    with monkeypatch.context() as patched, pytest.raises(RuntimeError):
        patched.setattr(executor, "pull_task_input", fails)
        work(running.node, task, token, Refusing())
    assert running.send() == []
    assert running.answers_the_next()


def test_an_executor_that_is_killed_as_it_takes_a_task_is_not_waited_for(running: RunningNode) -> None:
    running.receive()
    _, token = claim(running.node.claimer())
    running.node.worker(token).PullTaskInput(PullTaskInputRequest())
    for record in running.state.task_token_store.values():  # no heartbeat for long
        record.active_until -= timedelta(days=1)
    assert running.send() == []
    assert running.answers_the_next()


def test_an_executor_that_is_killed_in_the_middle_of_its_answer_is_not_waited_for(
    running: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    running.receive()
    task, token = running.take()
    with monkeypatch.context() as patched:
        patched.setattr(run_clientapp, "push_objects", lambda *given, **more: None)
        work(running.node, task, token, Refusing())
    times = iter([0.0, 0.0, PART_SECONDS / 2, PART_SECONDS + 1, PART_SECONDS + 2])
    (begun,) = running.send(lambda: next(times))
    assert not begun.has_error()
    assert running.answers_the_next()


def test_the_node_still_works_by_the_functions_that_are_wrapped() -> None:
    source = inspect.getsource(node_loop.start_client_internal)
    wanted = {
        "_pull_and_store_message": {"pull_object", "confirm_message_received"},
        "_push_messages": {"state", "object_store"},
    }
    for name, given in wanted.items():
        assert f"{name}(" in source
        assert given <= inspect.signature(getattr(node_loop, name)).parameters.keys()


def test_the_node_still_rests_by_the_module_that_is_given_a_faster_clock() -> None:
    source = inspect.getsource(node_loop)
    assert "time.sleep(3)" in source
    assert inspect.ismodule(node_loop.time)

    assert "time.sleep(0.5)" in source


def test_the_node_asks_often_during_a_round_and_seldom_before_and_after_it() -> None:
    rests: list[float] = []
    now = 0.0
    clock = Clock(1.0, rests.append, lambda: now)
    clock.sleep(3)  # nothing has come yet
    clock.sleep(0.5)  # a message came: its answer is waited for
    now += BUSY_FOR / 2
    clock.sleep(3)
    now += BUSY_FOR
    clock.sleep(3)
    assert rests == [1.0, EXECUTOR_SECONDS, BUSY_SECONDS, 1.0]
    assert clock.monotonic is time.monotonic


def test_a_site_that_asks_for_more_gets_it() -> None:
    rests: list[float] = []
    clock = Clock(0.1, rests.append)
    clock.sleep(0.5)
    clock.sleep(3)
    assert rests == [EXECUTOR_SECONDS, 0.1]
