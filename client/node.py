"""Flower's SuperNode, which asks for messages more often: `python -m client.node SECONDS OPTIONS...`.

Left alone it rests three seconds between questions, and secure aggregation has five exchanges a round. Its
resting time cannot be set, so the module that rests is given a clock that rests less. Nothing else of it is
touched; where Flower moves it, the node only rests as long as before (tests/client/test_executor.py notices).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import flwr.supernode.start_client_internal as loop
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


def main() -> None:
    longest = float(sys.argv.pop(1))
    vars(loop)["time"] = Clock(longest)
    flower_supernode()


if __name__ == "__main__":
    main()
