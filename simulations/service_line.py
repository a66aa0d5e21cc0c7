"""Who asks the service waits in line: one model, one thread that uses it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, TypeVar

from pydantic import AfterValidator, Discriminator, Tag

T = TypeVar("T")


@dataclass(eq=False)
class ServiceError(Exception):
    """What a caller is told: an HTTP status and a code for programs."""

    status: int
    code: str
    message: str
    param: str | None = None
    retry_after: int | None = None  # seconds


def bad_request(message: str, *, code: str = "invalid_request", param: str | None = None) -> ServiceError:
    return ServiceError(400, code, message, param)


def shutting_down() -> ServiceError:
    return ServiceError(503, "shutting_down", "the service is being shut down: ask again later")


def _whole(text: str) -> str:
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError("half of a surrogate pair is no character")
    return text


Words = Annotated[str, AfterValidator(_whole)]  # text of a caller's that a tokenizer can read
ONE, SEVERAL = Tag("one"), Tag("several")
ONE_OR_SEVERAL = Discriminator(lambda given: "several" if isinstance(given, list) else "one")


class Line:
    """At most `waiting` callers wait while one is served. Once `closing` is set nobody is served any more."""

    def __init__(self, waiting: int) -> None:
        self._most = 1 + waiting
        self._inside = 0
        self._count = threading.Lock()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self.closing = threading.Event()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """`work` is done when its turn comes, in the model's thread.

        Raises:
            ServiceError: the line is full, or the service is being shut down.
        """
        if self.closing.is_set():
            raise shutting_down()
        with self._count:
            if self._inside >= self._most:
                raise ServiceError(
                    429,
                    "too_many_requests",
                    f"{self._most} requests are being answered or wait already: ask again later",
                    retry_after=5,
                )
            self._inside += 1
        future = self._thread.submit(self._unless_closing, work)
        future.add_done_callback(self._left)
        return future

    def close(self) -> None:
        """Returns when the model is at rest."""
        self.closing.set()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _unless_closing(self, work: Callable[[], T]) -> T:
        if self.closing.is_set():
            raise shutting_down()
        return work()

    def _left(self, _: Future[T]) -> None:
        with self._count:
            self._inside -= 1
