"""A federation's gate on a bad network: `rough_gate.py FEDERATION FLAG SEED`.

While the file FLAG is there, requests and answers are delayed, which reorders them, lost, handed over twice,
or handed over again seconds later. Otherwise it is the gate that `confide server run` starts.
"""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path
from typing import Any

import uvicorn

from server.federation import FederationFolder
from server.serve import gate

KINDS = {"pass": 50, "delay": 20, "twice": 10, "again": 10, "request": 5, "answer": 5}  # in per cent
LOST = [
    {"type": "http.response.start", "status": 503, "headers": [(b"content-length", b"0")]},
    {"type": "http.response.body", "body": b""},
]


class Rough:
    """An ASGI app around another."""

    def __init__(self, app: Any, flag: Path, seed: int) -> None:
        self._app = app
        self._flag = flag
        self._rng = random.Random(seed)
        self._later: set[asyncio.Task[Any]] = set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or not self._flag.exists():
            await self._app(scope, receive, send)
            return
        body, more = b"", True
        while more:
            part = await receive()
            body += part.get("body", b"")
            more = part.get("more_body", False)
        answer: list[Any] = []
        match self._rng.choices(list(KINDS), list(KINDS.values()))[0]:
            case "pass":
                answer = await self._hand_over(scope, body)
            case "delay":
                await asyncio.sleep(self._rng.uniform(0, 2))
                answer = await self._hand_over(scope, body)
                await asyncio.sleep(self._rng.uniform(0, 1))
            case "twice":
                both = await asyncio.gather(self._hand_over(scope, body), self._hand_over(scope, body))
                answer = self._rng.choice(both)
            case "again":
                answer = await self._hand_over(scope, body)
                task = asyncio.create_task(self._replay(scope, body, self._rng.uniform(0.5, 6)))
                self._later.add(task)
                task.add_done_callback(self._later.discard)
            case "request":
                answer = LOST
            case "answer":
                await self._hand_over(scope, body)
                answer = LOST
        for part in answer:
            await send(part)

    async def _hand_over(self, scope: Any, body: bytes) -> list[Any]:
        asked = iter([{"type": "http.request", "body": body, "more_body": False}])
        answer: list[Any] = []

        async def receive() -> Any:
            for part in asked:
                return part
            await asyncio.Event().wait()  # it does not hang up

        async def send(part: Any) -> None:
            answer.append(part)

        await self._app(dict(scope), receive, send)
        return answer

    async def _replay(self, scope: Any, body: bytes, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self._hand_over(scope, body)


def main() -> None:
    folder, flag, seed = FederationFolder(Path(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3])
    config = gate(folder)
    config.app = Rough(config.app, flag, seed)
    uvicorn.Server(config).run()


if __name__ == "__main__":
    main()
