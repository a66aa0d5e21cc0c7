"""`POST /v1/chat/completions` as OpenAI's clients know it, for a causal adapter."""

from __future__ import annotations

import asyncio
import json
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from common.chat_template import chat_ids
from common.errors import ModelError
from common.prediction import Predictor
from common.speaking import Draw, Said, question_ids, room_after, speak
from simulations.service_line import (
    ONE,
    ONE_OR_SEVERAL,
    SEVERAL,
    Line,
    ServiceError,
    Words,
    bad_request,
    shutting_down,
)


class _Request(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class TextPart(_Request):
    type: Literal["text"]
    text: Words


class Message(_Request):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Annotated[Words, ONE] | Annotated[list[TextPart], SEVERAL], ONE_OR_SEVERAL]

    @property
    def turn(self) -> dict[str, str]:
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(_Request):
    include_usage: bool = False


class ChatRequest(_Request):
    """What is read of OpenAI's request. A `temperature` left out is 0: always the likeliest token."""

    messages: list[Message] = Field(min_length=1)
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: (
        Annotated[
            Annotated[Words, ONE] | Annotated[list[Words], Field(max_length=256), SEVERAL], ONE_OR_SEVERAL
        ]
        | None
    ) = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=1)
    # Another answer would be given than was asked for, so these are refused.
    tools: None = None
    functions: None = None
    response_format: None = None
    logprobs: Literal[False] | None = None

    @property
    def stops(self) -> list[str]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in given if text]


@dataclass
class _Cut:
    """Lets text through until one of `stops` comes; what may be its beginning is held back."""

    stops: list[str]
    tell: Callable[[str], None]
    held: str = ""
    found: bool = False

    def __call__(self, text: str) -> None:
        if self.found:
            return
        self.held += text
        places = [at for at in (self.held.find(stop) for stop in self.stops) if at >= 0]
        if places:
            self.held, self.found = self.held[: min(places)], True
        keep = 0 if self.found else max((len(stop) - 1 for stop in self.stops), default=0)
        self._let(len(self.held) - keep)

    def finish(self) -> None:
        self._let(len(self.held))

    def _let(self, length: int) -> None:
        if length > 0:
            self.tell(self.held[:length])
            self.held = self.held[length:]


@dataclass(frozen=True)
class _Begun:
    prompt_tokens: int


@dataclass(frozen=True)
class _Done:
    said: Said
    finish: Literal["stop", "length"]


_Event = _Begun | str | _Done | ServiceError


@dataclass(frozen=True)
class Answer:
    """One answer on its way: its text as it comes, then how it ended."""

    id: str
    created: int
    prompt_tokens: int
    events: asyncio.Queue[_Event]
    stop: threading.Event  # set it, and the model stops after the next token

    async def pieces(self) -> AsyncIterator[str | _Done]:
        """
        Raises:
            ServiceError: it was cut off.
        """
        while True:
            match await self.events.get():
                case ServiceError() as error:
                    raise error
                case _Done() as done:
                    yield done
                    return
                case str(piece):
                    yield piece


@dataclass
class Chat:
    """A causal adapter that answers. `template`: conversations are written as the model's template says."""

    predictor: Predictor
    name: str
    line: Line
    longest: int
    template: bool
    created: int = field(default_factory=lambda: int(time.time()))

    async def begin(self, asked: ChatRequest) -> Answer:
        """Wait for the model, and let it begin.

        Raises:
            ServiceError: the request does not fit, or the line is full.
        """
        if asked.model is not None and asked.model != self.name:
            message = f"there is no model {asked.model[:80]!r} here: this service has {self.name!r}"
            raise ServiceError(404, "model_not_found", message, "model")
        if not self.template and len(asked.messages) > 1:
            raise bad_request(
                "this model answers questions that stand alone: send one message, found "
                f"{len(asked.messages)}",
                param="messages",
            )
        if asked.messages[-1].role != "user":
            raise bad_request(
                f"the last message is the user's, to be answered: found one of {asked.messages[-1].role}",
                param="messages",
            )
        events: asyncio.Queue[_Event] = asyncio.Queue()
        stop, loop = threading.Event(), asyncio.get_running_loop()

        def put(event: _Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        def failed(future: Any) -> None:
            error = None if future.cancelled() else future.exception()
            if future.cancelled():
                put(shutting_down())
            elif isinstance(error, ServiceError):
                put(error)
            elif error is not None:
                put(ServiceError(500, "internal", f"the model failed ({type(error).__name__})"))

        self.line.submit(lambda: self._speak(asked, put, stop)).add_done_callback(failed)
        try:
            begun = await events.get()
        except asyncio.CancelledError:
            stop.set()
            raise
        if isinstance(begun, ServiceError):
            raise begun
        if not isinstance(begun, _Begun):
            raise ServiceError(500, "internal", "the model did not begin")
        answer_id = f"chatcmpl-{secrets.token_hex(12)}"
        return Answer(answer_id, int(time.time()), begun.prompt_tokens, events, stop)

    def _speak(self, asked: ChatRequest, put: Callable[[_Event], None], stop: threading.Event) -> None:
        """In the model's thread."""
        ids = self._prompt(asked)
        longest = min(asked.max_completion_tokens or asked.max_tokens or self.longest, self.longest)
        try:
            room = room_after(self.predictor.model, ids)
        except ModelError as error:
            raise bad_request(str(error), code="context_length_exceeded", param="messages") from None
        longest = longest if room is None else min(longest, room)
        put(_Begun(len(ids)))
        cut = _Cut(asked.stops, put)
        draw = Draw(longest, asked.temperature or 0.0, asked.top_p or 1.0, asked.seed)
        closing = self.line.closing
        said = speak(
            self.predictor.model,
            ids,
            draw,
            cut,
            lambda: cut.found or stop.is_set() or closing.is_set(),
        )
        if closing.is_set() and not (said.ended or cut.found):
            raise shutting_down()
        cut.finish()
        put(_Done(said, "stop" if said.ended or cut.found else "length"))

    def _prompt(self, asked: ChatRequest) -> list[int]:
        turns = [message.turn for message in asked.messages]
        if not self.template:
            return question_ids(self.predictor, turns[0]["content"])
        try:
            return chat_ids(self.predictor.model.tokenizer, turns)
        except ModelError as error:
            raise bad_request(str(error), param="messages") from None


def usage(answer: Answer, said: Said) -> dict[str, int]:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": said.tokens,
        "total_tokens": answer.prompt_tokens + said.tokens,
    }


async def whole(chat: Chat, answer: Answer) -> dict[str, Any]:
    """The answer as one object."""
    text = ""
    async for piece in answer.pieces():
        if isinstance(piece, str):
            text += piece
        else:
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "message": message, "finish_reason": piece.finish, "logprobs": None}
            head = _head(chat, answer, "chat.completion")
            return {**head, "choices": [choice], "usage": usage(answer, piece.said)}
    raise ServiceError(500, "internal", "the answer has no end")


async def events(chat: Chat, answer: Answer, *, with_usage: bool) -> AsyncIterator[str]:
    """The answer as server-sent events; an error comes as one, too, since the status is sent by then."""
    head = _head(chat, answer, "chat.completion.chunk")

    def chunk(delta: dict[str, str], finish: str | None = None) -> str:
        return _event({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

    try:
        yield chunk({"role": "assistant", "content": ""})
        async for piece in answer.pieces():
            if isinstance(piece, str):
                yield chunk({"content": piece})
                continue
            yield chunk({}, piece.finish)
            if with_usage:
                yield _event({**head, "choices": [], "usage": usage(answer, piece.said)})
        yield "data: [DONE]\n\n"
    except ServiceError as error:
        yield _event(error_object(error))


def error_object(error: ServiceError) -> dict[str, Any]:
    """As OpenAI writes errors."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    told = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    return {"error": told}


def _head(chat: Chat, answer: Answer, kind: str) -> dict[str, Any]:
    return {"id": answer.id, "object": kind, "created": answer.created, "model": chat.name}


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
