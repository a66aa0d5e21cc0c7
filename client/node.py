"""Flower's SuperNode, which asks for messages more often: `python -m client.node SECONDS OPTIONS...`.

Left alone it rests three seconds between questions, and secure aggregation has five exchanges a round. Its
resting time cannot be set, so the module that rests is given a clock that rests less. Nothing else of it is
touched; where Flower moves it, the node only rests as long as before (tests/client/test_executor.py notices).
"""

from __future__ import annotations

import sys
import time
from typing import Any

import flwr.supernode.start_client_internal as loop
from flwr.supernode.cli import flower_supernode


class Clock:
    """The module `time`, but for `sleep`: at most `longest` seconds."""

    def __init__(self, longest: float) -> None:
        self._longest = longest

    def sleep(self, seconds: float) -> None:
        time.sleep(min(seconds, self._longest))

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def main() -> None:
    longest = float(sys.argv.pop(1))
    vars(loop)["time"] = Clock(longest)
    flower_supernode()


if __name__ == "__main__":
    main()
