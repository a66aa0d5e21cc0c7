"""The HTTP service of `confide serve`: chat for causal adapters, answers to records for every other."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from common.config import TaskKind
from common.prediction import Predictor
from simulations.service_chat import Chat, ChatRequest, events, whole
from simulations.service_gate import Entry, Gate, answer_with
from simulations.service_line import Line, ServiceError, bad_request
from simulations.service_page import About, page
from simulations.service_records import Record, Records, answer, table_of

_LOOK = 0.5  # seconds between two looks whether the caller is still there


def make_service(predictor: Predictor, entry: Entry, line: Line, *, longest: int, plain: bool) -> ASGIApp:
    """The whole service.

    `longest`: tokens of an answer at most. `plain`: questions are written as prompts were in training,
    although the model has a chat template.
    """
    described, causal = predictor.described, predictor.kind is TaskKind.CAUSAL_LM
    name = described.name
    template = causal and not plain and bool(predictor.model.tokenizer.chat_template)
    chat = Chat(predictor, name, line, longest, template)
    shown = page(
        About(
            name=name,
            task=predictor.kind,
            base=str(described.told.get("model") or described.base.name),
            labels=predictor.section.labels,
            pairs=described.pairs,
            privacy=described.privacy,
            conversation=template,
            longest=longest,
            needs_token=entry.token is not None,
        )
    )

    @asynccontextmanager
    async def at_rest_in_the_end(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(line.close)

    app = FastAPI(
        title=f"Confide: {name}",
        description=described.privacy,
        docs_url=None,  # they would load scripts from elsewhere
        redoc_url=None,
        openapi_url=None,
        lifespan=at_rest_in_the_end,
    )
    app.add_exception_handler(ServiceError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _no_route)

    @app.get("/")
    async def try_it() -> Response:
        return HTMLResponse(shown.html, headers={"content-security-policy": shown.policy})

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "closing" if line.closing.is_set() else "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        about = {"task": predictor.kind.value, "privacy": described.privacy}
        model = {"id": name, "object": "model", "created": chat.created, "owned_by": "confide", **about}
        return {"object": "list", "data": [model]}

    @app.post("/v1/chat/completions")
    async def complete(asked: ChatRequest, request: Request) -> Response:
        if not causal:
            raise _elsewhere(predictor.kind, "/predict")
        begun = await chat.begin(asked)
        if asked.stream:
            options = asked.stream_options
            told = events(chat, begun, with_usage=options is not None and options.include_usage)
            return _Stream(told, begun.stop)
        async with _while_there(request, begun.stop):
            return JSONResponse(await whole(chat, begun))

    @app.post("/predict")
    async def predict(asked: Records) -> Any:
        if causal:
            raise _elsewhere(predictor.kind, "/v1/chat/completions")
        records = [asked] if isinstance(asked, Record) else asked
        table = table_of(predictor.kind, records)
        found = await asyncio.wrap_future(line.submit(lambda: answer(predictor, line, table)))
        return JSONResponse(found[0] if isinstance(asked, Record) else found)

    return Gate(app, entry)


class _Stream(StreamingResponse):
    """Server-sent events; however they end, the model stops, even if the caller left before the first."""

    def __init__(self, told: AsyncIterator[str], stop: threading.Event) -> None:
        super().__init__(told, media_type="text/event-stream")
        self._stop = stop

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._stop.set()


@asynccontextmanager
async def _while_there(request: Request, stop: threading.Event) -> AsyncIterator[None]:
    """Inside: a caller that leaves stops the model."""

    async def look() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(_LOOK)
        stop.set()

    looking = asyncio.create_task(look())
    try:
        yield
    finally:
        looking.cancel()
        with suppress(asyncio.CancelledError):
            await looking


def _elsewhere(kind: TaskKind, route: str) -> ServiceError:
    return ServiceError(404, "wrong_endpoint", f"this adapter is of {kind.value}: use POST {route}")


async def _refused(_: Request, error: Exception) -> Response:
    return answer_with(error) if isinstance(error, ServiceError) else Response(status_code=500)


async def _invalid(_: Request, error: Exception) -> Response:
    """Which part of the body is wrong, and how; never what it held."""
    if not isinstance(error, RequestValidationError):
        return Response(status_code=500)
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"][1:] if part not in ("one", "several"))
    if first["type"] == "json_invalid":
        return answer_with(bad_request("the body is no JSON"))
    says = first["msg"].removeprefix("Value error, ")
    return answer_with(bad_request(f"{path or 'the body'}: {says}", param=path or None))


async def _no_route(_: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        return Response(status_code=500)
    codes = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}
    code = codes.get(error.status_code, "invalid_request")
    return answer_with(ServiceError(error.status_code, code, str(error.detail)))
