"""What stands before the service: who may ask, how much at once, and what is written in the log.

The log has method, route, status and seconds. Nothing that a caller sent is in it, nor in an error's trace.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from simulations.service_chat import error_object
from simulations.service_line import ServiceError

ROUTES = ("/", "/health", "/v1/models", "/v1/chat/completions", "/predict")
_OPEN = ("/", "/health")  # neither holds anything of anyone's; a browser and a probe send no token
_SLOWEST = 30.0  # seconds to send the next part of a body
_log = logging.getLogger("confide.serve")


@dataclass(frozen=True)
class Entry:
    """`token` None: whoever reaches the port may ask. `hosts`: the names it may be called by; None: any."""

    token: str | None
    hosts: frozenset[str] | None
    most_bytes: int


@dataclass(frozen=True)
class Gate:
    """The outermost layer. Errors become objects as OpenAI's clients expect them."""

    app: ASGIApp
    entry: Entry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 0

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(
                    {"cache-control": "no-store", "x-content-type-options": "nosniff"}
                )
            await send(message)

        try:
            self._check(scope)
            await self.app(scope, self._bounded(receive), sent)
        except ServiceError as error:
            await answer_with(error)(scope, receive, sent)
        except Exception as error:
            _log.error("%s at %s", type(error).__name__, _where(error))
            if not status:
                failed = ServiceError(500, "internal", f"the service failed ({type(error).__name__})")
                await answer_with(failed)(scope, receive, sent)
        finally:
            route = scope["path"] if scope["path"] in ROUTES else "(no route)"
            seconds = time.monotonic() - began
            _log.info("%s %s %s %.2f s", scope["method"], route, status or "cut off", seconds)

    def _check(self, scope: Scope) -> None:
        headers, entry = Headers(scope=scope), self.entry
        if entry.hosts is not None and _host(headers.get("host", "")) not in entry.hosts:
            # Otherwise a page anywhere could have its own name resolved to this machine, and ask.
            raise ServiceError(403, "wrong_host", "this service answers to the name of this machine only")
        if entry.token is not None and scope["path"] not in _OPEN:
            given = headers.get("authorization", "").encode()
            if not hmac.compare_digest(given, f"Bearer {entry.token}".encode()):
                raise ServiceError(401, "unauthorized", "send the header Authorization: Bearer TOKEN")
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise ServiceError(415, "unsupported_media_type", "send content-type: application/json")
            length = headers.get("content-length", "0")
            if length.isdecimal() and int(length[:20]) > entry.most_bytes:
                raise self._too_large()

    def _bounded(self, receive: Receive) -> Receive:
        size, whole = 0, False

        async def bounded() -> Message:
            nonlocal size, whole
            if whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), _SLOWEST)
            except TimeoutError:
                raise HTTPException(408, f"the body did not go on for {_SLOWEST:.0f} seconds") from None
            size += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if size > self.entry.most_bytes:
                refused = self._too_large()
                raise HTTPException(refused.status, refused.message)
            return message

        return bounded

    def _too_large(self) -> ServiceError:
        most = self.entry.most_bytes
        return ServiceError(413, "too_large", f"a request may have {most:,} bytes: send less at once")


def answer_with(error: ServiceError) -> Response:
    headers = {}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.retry_after is not None:
        headers["retry-after"] = str(error.retry_after)
    return JSONResponse(error_object(error), error.status, headers)


def _host(header: str) -> str:
    try:
        return (urlsplit(f"//{header}").hostname or "").lower()
    except ValueError:
        return ""


def _where(error: BaseException) -> str:
    """File and line, without the error's text: it could hold what a caller sent."""
    frames: Any = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
