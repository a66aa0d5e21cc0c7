"""Flower's SuperNode, changed in two places: `python -m client.node SECONDS OPTIONS...`.

It asks for messages more often. Left alone it rests three seconds between questions, and secure aggregation
has five exchanges a round. Its resting time cannot be set, so the module that rests is given another clock.

And it forgets a message whose run ends while it comes in (`forgetful`).

Nothing else of it is touched; tests/client/test_executor.py notices where Flower moves it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import flwr.supernode.start_client_internal as loop
from flwr.supercore.run import RunNotRunningException
from flwr.supernode.cli import flower_supernode

EXECUTOR_SECONDS = 0.1  # between looks whether the executor has answered: both are on this machine
BUSY_SECONDS = 0.25  # between questions to the server while a round is likely to be going on
BUSY_FOR = 20.0  # seconds after the last answer


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
    """Flower's `_pull_and_store_message`, which clears away a message whose run ends while its objects come.

    Its task is open to the executor by then. Flower takes it back after an Exception, and that a run has
    ended is none: the executor would wait for the rest of the message, and the node for the executor, for an
    hour and more.
    """

    def pull_or_forget(**given: Any) -> int | None:
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


def main() -> None:
    longest = float(sys.argv.pop(1))
    vars(loop)["time"] = Clock(longest)
    vars(loop)["_pull_and_store_message"] = forgetful(loop._pull_and_store_message)
    flower_supernode()


if __name__ == "__main__":
    main()
