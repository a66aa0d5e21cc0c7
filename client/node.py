"""Flower's SuperNode, changed in three places: `python -m client.node SECONDS OPTIONS...`.

It asks more often, for messages and for their parts. Left alone it rests three seconds between questions,
and secure aggregation has five exchanges a round. Its resting time cannot be set, so the module that rests is
given another clock.

It forgets what is left of a message that led to nothing (`forgetful`), and waits for no answer that cannot
come (`attentive`). Else a killed job or executor could leave the whole site waiting, for an hour or for ever.

Nothing else of it is touched; tests/client/test_executor.py notices where Flower moves it.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import Any

import flwr.supernode.start_client_internal as loop
from flwr.common.constant import Status
from flwr.supercore.run import RunNotRunningException
from flwr.supernode.cli import flower_supernode

from common.waiting import hurry

EXECUTOR_SECONDS = 0.1  # between looks whether the executor has answered: both are on this machine
BUSY_SECONDS = 0.25  # between questions to the server while a round is likely to be going on
BUSY_FOR = 20.0  # seconds after the last answer
PART_SECONDS = 60.0  # for the rest of an answer that the executor has begun to hand over
_OPEN = (Status.PENDING, Status.STARTING, Status.RUNNING)
_log = logging.getLogger("confide.node")


class Clock:
    """The module `time`, but for `sleep`: at most `longest` seconds, and less soon after a message.

    Flower's loop rests half a second at most while it waits for the executor, and longer only between
    questions to the server: by this the two are told apart.
    """

    def __init__(
        self,
        longest: float,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._longest = longest
        self._sleep = sleep
        self._clock = clock
        self._answered = -BUSY_FOR

    def sleep(self, seconds: float) -> None:
        if seconds <= 0.5:
            self._answered = self._clock()
            self._sleep(min(seconds, EXECUTOR_SECONDS))
        elif self._clock() - self._answered < BUSY_FOR:
            self._sleep(min(seconds, self._longest, BUSY_SECONDS))
        else:
            self._sleep(min(seconds, self._longest))

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def forgetful(pull: Callable[..., int | None]) -> Callable[..., int | None]:
    """Flower's `_pull_and_store_message`, which leaves nothing of a message that led to nothing.

    Where a run ends while its message comes in, the task is open to the executor already. Flower takes it
    back after an Exception, and that a run has ended is none: the executor would wait for the rest of the
    message, and the node for the executor.

    There is one message at a time, so what is there before the next is an answer too late. Flower would take
    it for the next one's, and that one's for the one's after it, and so on.
    """

    def pull_or_forget(**given: Any) -> int | None:
        given["state"].delete_messages()
        given["object_store"].clear()
        for name in ("pull_object", "confirm_message_received"):
            given[name] = _failing(given[name])
        return pull(**given)

    return pull_or_forget


def _failing(ask: Callable[..., Any]) -> Callable[..., Any]:
    def asked(*arguments: Any) -> Any:
        try:
            return ask(*arguments)
        except RunNotRunningException:
            raise RuntimeError("its run has ended") from None

    return asked


class NoAnswerError(Exception):
    """What is waited for cannot come: the executor has given its task up."""


def attentive(push: Callable[..., None], clock: Callable[[], float] = time.monotonic) -> Callable[..., None]:
    """Flower's `_push_messages`, which ends when no answer can come any more.

    It waits until there is an answer, then until all its parts are there. An executor that was killed just
    as it took a task or halfway through its answer, or that failed before it had one, leaves none.
    """

    def push_or_forget(**given: Any) -> None:
        given["state"] = _Answers(given["state"])
        given["object_store"] = _Parts(given["object_store"], clock)
        try:
            push(**given)
        except NoAnswerError:
            _log.warning("the executor gave a task up without an answer")

    return push_or_forget


class _Answers:
    """The node's state, which says when no answer can come any more."""

    def __init__(self, state: Any) -> None:
        self._state = state

    def get_messages_legacy(self, **asked: Any) -> Any:
        # In this order: an answer is handed over before its task is done.
        still_open = self._state.get_tasks(statuses=_OPEN)
        found = self._state.get_messages_legacy(**asked)
        if not found and not still_open:
            raise NoAnswerError
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)


class _Parts:
    """The node's objects, which says when the rest of an answer does not come. Flower then drops it."""

    def __init__(self, store: Any, clock: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock
        self._since: dict[str, float] = {}

    def get(self, name: str) -> bytes | None:
        content: bytes | None = self._store.get(name)
        if content == b"" and self._clock() - self._since.setdefault(name, self._clock()) > PART_SECONDS:
            raise NoAnswerError("the executor gave up in the middle of its answer")
        return content

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def main() -> None:
    longest = float(sys.argv.pop(1))
    vars(loop)["time"] = Clock(longest)
    vars(loop)["_pull_and_store_message"] = forgetful(loop._pull_and_store_message)
    hurry(loop, "pull_objects")
    vars(loop)["_push_messages"] = attentive(loop._push_messages)
    flower_supernode()


if __name__ == "__main__":
    main()
