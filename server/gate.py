"""The gate: what the network sees of a federation's server. Flower's Fleet API, and nothing else.

SuperLink serves three APIs on one port: Fleet for sites, Control for the operator, Runtime for the operator's
own processes. Whoever reaches the second can start jobs, and so run code on the server. SuperLink therefore
listens on the loopback, and this small proxy hands over POST requests below /v1/fleet/ alone.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import AsyncIterator
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path

import httpx
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.supercore.constant import (
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    FLEET_HTTP_SIGNATURE_HEADER,
    FLWR_COMPONENT_NAME_METADATA_KEY,
    FLWR_PACKAGE_NAME_METADATA_KEY,
    FLWR_PACKAGE_VERSION_METADATA_KEY,
)
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

FLEET = "/v1/fleet/"
# Of a request: what Flower's node sends. Everything else, cookies and forwarding headers too, stays outside.
_PASSED = frozenset(
    {
        "content-type",
        "content-length",
        "accept",
        FLEET_HTTP_PUBLIC_KEY_HEADER,
        FLEET_HTTP_SIGNATURE_HEADER,
        TIMESTAMP_HEADER,
        FLWR_COMPONENT_NAME_METADATA_KEY,
        FLWR_PACKAGE_NAME_METADATA_KEY,
        FLWR_PACKAGE_VERSION_METADATA_KEY,
    }
)
_CALL = re.compile(r"[a-z]+(-[a-z]+)*")
_RETURNED = frozenset({"content-type", "content-length"})


def make_gate(superlink: str, authority: Path, longest: int) -> Starlette:
    """The ASGI app. superlink: its https address on this machine; longest: bytes of one request."""
    context = ssl.create_default_context(cafile=str(authority))
    client = httpx.AsyncClient(
        verify=context,
        timeout=httpx.Timeout(60.0, connect=5.0),
        base_url=superlink,
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),  # what one site gets, no other sends
        trust_env=False,
    )

    async def hand_over(request: Request) -> Response:
        # The path is built anew from a name without dots, slashes and percent signs: nothing else of what was
        # asked, such as a Host header that looks like a path, decides what SuperLink is asked.
        call = request.path_params["call"]
        if not _CALL.fullmatch(call):
            return PlainTextResponse("not found", 404)
        said = request.headers.get("content-length", "")
        if not said.isdigit():
            return PlainTextResponse("length required", 411)
        if int(said) > longest:
            return PlainTextResponse("too large", 413)

        async def body() -> AsyncIterator[bytes]:
            size = 0
            async for piece in request.stream():
                size += len(piece)
                if size > longest:
                    raise ValueError("more than was said")
                yield piece

        headers = [(name, value) for name, value in request.headers.items() if name in _PASSED]
        asked = client.build_request("POST", FLEET + call, headers=headers, content=body())
        try:
            answer = await client.send(asked, stream=True)
        except (httpx.HTTPError, ClientDisconnect, ValueError):
            return PlainTextResponse("not available", 503)
        kept = {name: value for name, value in answer.headers.items() if name.lower() in _RETURNED}

        async def content() -> AsyncIterator[bytes]:
            try:
                async for piece in answer.aiter_raw():
                    yield piece
            finally:
                await answer.aclose()

        return StreamingResponse(content(), answer.status_code, headers=kept)

    return Starlette(routes=[Route(FLEET + "{call:str}", hand_over, methods=["POST"])])
