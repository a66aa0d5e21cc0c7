"""Parts of messages that come late: asked for again soon, and not waited for beyond what was said."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import flwr.supernode.start_client_internal as node_loop
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import PullObjectRequest, PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectUnavailableError
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import http_grid
from flwr.supernode.runtime import run_clientapp

from common.waiting import FIRST_SECONDS, MOST_SECONDS, hurry

HURRIED = [
    (node_loop, "pull_objects", "_pull_and_store_message"),
    (run_clientapp, "pull_and_inflate_object_from_tree", "pull_task_input"),
    (http_grid, "pull_objects", "HttpGrid"),
]


@pytest.mark.parametrize(("module", "name", "user"), HURRIED)
def test_flower_still_waits_in_the_functions_that_are_hurried(
    module: ModuleType, name: str, user: str
) -> None:
    assert f"{name}(" in inspect.getsource(getattr(module, user))
    wanted = {"max_time", "max_tries_per_object", "initial_backoff", "backoff_cap"}
    assert wanted <= inspect.signature(getattr(module, name)).parameters.keys()


def late(times: int) -> tuple[list[str], Callable[[str], bytes]]:
    asked: list[str] = []

    def pull(name: str) -> bytes:
        asked.append(name)
        if len(asked) <= times:
            raise ObjectUnavailableError(name)
        return b"here"

    return asked, pull


def hurried(longest: float | None = None) -> Callable[..., dict[str, bytes]]:
    module = ModuleType("somewhere")
    vars(module)["pull_objects"] = inflatable_utils.pull_objects
    hurry(module, "pull_objects", longest)
    found: Callable[..., dict[str, bytes]] = vars(module)["pull_objects"]
    return found


def test_a_part_is_asked_for_again_soon_then_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    rests: list[float] = []

    class Event:
        def is_set(self) -> bool:
            return False

        def set(self) -> None:
            pass

        def wait(self, seconds: float) -> None:
            rests.append(seconds)

    monkeypatch.setattr(inflatable_utils, "threading", SimpleNamespace(Event=Event, Lock=threading.Lock))
    monkeypatch.setattr(inflatable_utils, "random", SimpleNamespace(uniform=lambda low, high: 0.0))
    asked, pull = late(700)  # more often than Flower itself would
    assert hurried()(["part"], pull) == {"part": b"here"}
    assert len(asked) == 701
    assert rests[:5] == [FIRST_SECONDS, 0.1, 0.2, 0.4, MOST_SECONDS]
    assert set(rests[5:]) == {MOST_SECONDS}


def test_a_part_that_never_comes_is_given_up() -> None:
    asked, pull = late(10**9)
    with pytest.raises(ObjectPullError):
        hurried(0.3)(["part"], pull)
    assert len(asked) > 1


def test_a_site_that_announces_an_answer_and_sends_no_part_of_it_is_an_error_among_the_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Through Flower's own grid: the other site's answer comes in."""
    monkeypatch.setattr(http_grid, "pull_objects", inflatable_utils.pull_objects)
    hurry(http_grid, "pull_objects", 0.3)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 7, 11, 1
    answers = [Message(RecordDict({"n": ConfigRecord({"n": n})}), 1, "query") for n in (0, 1)]
    for answer in answers:
        answer.metadata.__dict__["_message_id"] = answer.object_id
    whole = get_all_nested_objects(answers[1])
    trees = [get_object_tree(answer) for answer in answers]

    def pull_object(request: PullObjectRequest) -> PullObjectResponse:
        part = whole.get(request.object_id)
        content = b"" if part is None else part.deflate()
        return PullObjectResponse(
            object_found=True, object_available=part is not None, object_content=content
        )

    grid = http_grid.HttpGrid(token="token")
    grid.set_run(Run.create_empty(7))
    grid._client = SimpleNamespace(  # type: ignore[assignment]
        PullMessages=lambda request: PullAppMessagesResponse(
            messages_list=[message_to_proto(remove_content_from_message(answer)) for answer in answers],
            message_object_trees=trees,
        ),
        PullObject=pull_object,
        ConfirmMessageReceived=lambda request: None,
    )
    missing, there = grid.pull_messages(["a", "b"])
    assert missing.error.code == ErrorCode.MESSAGE_UNAVAILABLE
    assert there.content["n"]["n"] == 1
