"""How long Flower waits for the parts of a message that has been announced.

A message in Flower is announced first, and its objects follow one by one. Who asks too early waits for a
second, then for two, four, up to ten, though the rest is there a moment later. On the way of each exchange
this happens at node, executor and server.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType

FIRST_SECONDS = 0.05  # before a part is asked for again; twice as long each time
MOST_SECONDS = 0.5


def hurry(module: ModuleType, name: str, longest: float | None = None) -> None:
    """Have `module`'s function `name` ask again sooner, and give up after `longest` seconds.

    `name` is one of Flower's functions with the keywords of `pull_objects`. longest: None leaves Flower's two
    hours.
    """
    limits = {} if longest is None else {"max_time": longest}
    vars(module)[name] = partial(
        getattr(module, name),
        initial_backoff=FIRST_SECONDS,
        backoff_cap=MOST_SECONDS,
        max_tries_per_object=None,
        **limits,
    )
