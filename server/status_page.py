"""The operator's status page: read-only, on the loopback, and /metrics for Prometheus."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from server.federation import FederationFolder
from server.status import look


def make_page(folder: FederationFolder) -> Starlette:
    def as_json(request: Request) -> Response:
        return JSONResponse(look(folder).to_json())

    def health(request: Request) -> Response:
        return PlainTextResponse("ok")

    return Starlette(
        routes=[Route("/status.json", as_json), Route("/health", health)],
    )
