"""`confide serve`: a real process over real HTTP, asked as clients ask, and as they should not."""

from __future__ import annotations

import base64
import io
import json
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from common.errors import ConfigError, ModelError
from common.exported import Form
from common.release import release
from tests.conftest import LABELS, World
from tests.e2e.command import invoke
from tests.e2e.service import CLAIM, Service, adapter, serving

Worlds = Callable[..., World]
CHAT, MARK = "/v1/chat/completions", "Zebra-4711"
LONG = {"messages": [{"role": "user", "content": "w1 w2"}], "max_tokens": 4000}


def streamed(client: httpx.Client, body: dict[str, Any]) -> list[dict[str, Any]]:
    with client.stream("POST", CHAT, json={**body, "stream": True}) as reply:
        assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/event-stream")
        data = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert data[-1] == "[DONE]"
    return [json.loads(line) for line in data[:-1]]


def said(events: list[dict[str, Any]]) -> str:
    return "".join(e["choices"][0]["delta"].get("content", "") for e in events if e["choices"])


def test_an_answer_whole_and_streamed(chat: Service, talker: Path) -> None:
    body = {"messages": [{"role": "user", "content": "w1 gute Nacht 北京 🙂"}], "max_tokens": 12}
    with chat.client() as client:
        whole = client.post(CHAT, json=body).json()
        events = streamed(client, {**body, "stream_options": {"include_usage": True}})
        (model,) = client.get("/v1/models").json()["data"]
        assert client.get("/health").json() == {"status": "ok"}
    (choice,) = whole["choices"]
    assert choice["message"]["role"] == "assistant" and choice["finish_reason"] in ("stop", "length")
    assert said(events) == choice["message"]["content"]
    assert events[-1]["usage"] == whole["usage"]
    assert whole["usage"]["completion_tokens"] <= 12
    assert sum(whole["usage"].values()) == 2 * whole["usage"]["total_tokens"]
    assert [e["choices"][0]["finish_reason"] for e in events[:-1]][-1] == choice["finish_reason"]
    assert {e["id"] for e in events} == {events[0]["id"]} != {whole["id"]}
    assert model["id"] == whole["model"] == talker.parent.name and model["privacy"] == CLAIM.sentence()
    asked = body["messages"][0]["content"]  # type: ignore[index]
    assert invoke("ask", talker, asked, "--chat", "--max-tokens", "12").strip() == said(events).strip()


def test_drawing_and_stopping(chat: Service) -> None:
    body = {"messages": [{"role": "user", "content": "w1"}], "max_tokens": 30, "temperature": 1.5}
    with chat.client() as client:
        texts = [
            client.post(CHAT, json={**body, "seed": seed}).json()["choices"][0]["message"]["content"]
            for seed in (1, 1, 2)
        ]
        assert texts[0] == texts[1] != texts[2]
        stop = texts[0][8:11]
        for answer in (
            client.post(CHAT, json={**body, "seed": 1, "stop": [stop, "never"]}).json()["choices"][0],
            {
                "message": {"content": said(streamed(client, {**body, "seed": 1, "stop": stop}))},
                "finish_reason": "stop",
            },
        ):
            assert answer["message"]["content"] == texts[0][: texts[0].index(stop)]
            assert answer["finish_reason"] == "stop"


USER = [{"role": "user", "content": MARK}]
BAD: list[tuple[str, bytes, int, str]] = [
    ("no JSON", b'{"messages": [' + MARK.encode(), 400, "no JSON"),
    ("empty", b"", 400, ""),
    ("a list", json.dumps([MARK]).encode(), 400, "the body"),
    ("not UTF-8", b'{"messages": "\xff\xfe"}', 400, ""),
    ("no messages", json.dumps({"text": MARK}).encode(), 400, "messages"),
    ("none", json.dumps({"messages": []}).encode(), 400, "messages"),
    ("a role", json.dumps({"messages": [{"role": MARK, "content": "x"}]}).encode(), 400, "messages.0.role"),
    (
        "no text",
        json.dumps({"messages": [{"role": "user", "content": 7}]}).encode(),
        400,
        "messages.0.content: Input should be a valid string",
    ),
    (
        "a picture",
        json.dumps({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}).encode(),
        400,
        "messages.0.content.0.type: Input should be 'text'",
    ),
    (
        "nobody asks",
        json.dumps({"messages": [*USER, {"role": "assistant", "content": MARK}]}).encode(),
        400,
        "the last message is the user's",
    ),
    ("heat", json.dumps({"messages": USER, "temperature": 9}).encode(), 400, "temperature"),
    ("heat", b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', 400, "temperature"),
    ("two", json.dumps({"messages": USER, "n": 2}).encode(), 400, "n"),
    ("tools", json.dumps({"messages": USER, "tools": [{}]}).encode(), 400, "tools"),
    ("tokens", json.dumps({"messages": USER, "max_tokens": 0}).encode(), 400, "max_tokens"),
    ("tokens", json.dumps({"messages": USER, "max_tokens": "5"}).encode(), 400, "max_tokens"),
    ("model", json.dumps({"messages": USER, "model": "gpt"}).encode(), 404, "there is no model"),
    ("half a character", b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "messages"),
    ("long", json.dumps({"messages": [{"role": "user", "content": "w1 " * 9000}]}).encode(), 400, "tokens"),
    ("deep", b"[" * 200_000, 400, ""),
    (
        "large",
        json.dumps({"messages": [{"role": "user", "content": "x" * 1_000_001}]}).encode(),
        413,
        "bytes",
    ),
]


@pytest.mark.parametrize(("body", "status", "reason"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
@pytest.mark.parametrize("in_parts", [False, True])
def test_what_is_no_question(chat: Service, body: bytes, status: int, reason: str, in_parts: bool) -> None:
    content = iter([body[:7], body[7:]]) if in_parts else body
    with chat.client() as client:
        reply = client.post(CHAT, content=content, headers={"content-type": "application/json"})
        assert reply.status_code == status, reply.text
        error = reply.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and reason in error["message"]
        assert MARK not in reply.text
        assert client.get("/health").status_code == 200


def test_other_ways_in(chat: Service) -> None:
    with chat.client() as client:
        assert client.post(CHAT, content=json.dumps(LONG)).status_code == 415
        assert client.post("/predict", json={"text": MARK}).status_code == 404
        assert client.get(f"/{MARK}?q={MARK}").status_code == 404
        assert client.get(CHAT).status_code == 405
        assert client.get("/docs").status_code == 404
        wrong = client.get("/health", headers={"host": "evil.example"})
        assert wrong.status_code == 403
        assert client.get("/health", headers={"host": "localhost:99"}).status_code == 200
    assert MARK not in chat.log.read_text()
    assert "POST /v1/chat/completions 400" in chat.log.read_text()


def test_a_caller_who_leaves_makes_room(chat: Service) -> None:
    """4,000 tokens would take far longer than what is waited here."""
    with chat.client() as client:
        for stream in (True, False):
            if stream:
                with client.stream("POST", CHAT, json={**LONG, "stream": True}) as reply:
                    next(reply.iter_lines())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post(CHAT, json=LONG, timeout=1.0)
            began = time.monotonic()
            assert client.post(CHAT, json={**LONG, "max_tokens": 1}).status_code == 200
            assert time.monotonic() - began < 3


def test_a_line_that_is_full(chat: Service) -> None:
    """One is answered, one waits, the third is told to come again; whoever waited gets the same answer."""
    answers: list[httpx.Response] = []
    body = {**LONG, "max_tokens": 600}

    def ask() -> None:
        with chat.client() as client:
            answers.append(client.post(CHAT, json=body))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(a.status_code for a in answers) == [200, 200, 429]
    texts = {a.json()["choices"][0]["message"]["content"] for a in answers if a.status_code == 200}
    assert len(texts) == 1
    (refused,) = (a for a in answers if a.status_code == 429)
    assert refused.json()["error"]["type"] == "rate_limit_error" and refused.headers["retry-after"] == "5"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_in_the_middle_of_an_answer(talker: Path, tmp_path: Path, number: signal.Signals) -> None:
    with serving(talker, tmp_path / "log", "--max-tokens", "4000") as service, service.client() as client:
        with client.stream("POST", CHAT, json={**LONG, "stream": True}) as reply:
            lines = reply.iter_lines()
            next(lines)
            began = time.monotonic()
            service.process.send_signal(number)
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert service.process.wait(15) == 0
        assert time.monotonic() - began < 10
        with pytest.raises(httpx.ConnectError):
            client.get("/health")
        assert "Traceback" not in service.log.read_text()


def test_a_token_and_a_merged_model(talker: Path, tmp_path: Path) -> None:
    release(talker, tmp_path / "merged", Form.MERGED)
    (tmp_path / "token").write_text("0123456789abcdef0123\n")
    options = ["--token-file", str(tmp_path / "token"), "--host", "0.0.0.0", "--plain"]
    with serving(tmp_path / "merged", tmp_path / "log", *options) as service, service.client() as client:
        assert "Plain HTTP" in service.log.read_text()
        short = {**LONG, "max_tokens": 3}
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "0123456789abcdef0123"}):
            for reply in (
                client.post(CHAT, json=short, headers=headers),
                client.get("/v1/models", headers=headers),
            ):
                assert reply.status_code == 401 and reply.headers["www-authenticate"] == "Bearer"
        assert client.get("/health").status_code == client.get("/").status_code == 200
        client.headers["authorization"] = "Bearer 0123456789abcdef0123"
        assert client.post(CHAT, json=short).status_code == 200
        two = {**short, "messages": short["messages"] * 2}  # type: ignore[operator]
        assert "stand alone" in client.post(CHAT, json=two).json()["error"]["message"]
    assert "0123456789abcdef" not in (tmp_path / "log").read_text()


def test_records_one_and_many(judge: Service, world: Worlds, tmp_path: Path) -> None:
    this = world("bert-mean")
    folder = adapter(this.model, this.config, tmp_path / "adapter")
    wanted = json.loads(invoke("predict", folder, "some good text", "--json"))
    with judge.client() as client:
        assert client.post("/predict", json={"text": "some good text"}).json() == wanted
        several = client.post("/predict", json=[{"text": "w1"}, {"text": "some good text"}] * 40).json()
        assert len(several) == 80 and several[1]["label"] == wanted["label"]
        assert several[1]["probability"] == pytest.approx(wanted["probability"], abs=1e-5)
        for body, status in (
            ([], 400),
            ([{"text": "w"}] * 257, 400),
            ({"text": ""}, 400),
            ({"text": 7}, 400),
            ({"text": "\ud800"}, 400),
            ({"words": "x"}, 400),
            ({"text": "w1", "extra": MARK}, 400),
            ({"text": "w1", "prompt": MARK}, 400),
            ([{"text": "w1"}, {"text": "w1", "prompt": MARK}], 400),
            ({"image": "/etc/passwd"}, 400),
            ("text", 400),
            (None, 400),
        ):
            reply = client.post(
                "/predict", content=json.dumps(body), headers={"content-type": "application/json"}
            )
            assert reply.status_code == status, (body, reply.text)
            assert reply.json()["error"]["message"] and MARK not in reply.text
        assert client.post(CHAT, json=LONG).status_code == 404
        assert client.post("/predict", json={"text": "naïve 北京 \u0000 🙂 " * 100}).status_code == 200


def test_images_are_sent_never_named(world: Worlds, tmp_path: Path) -> None:
    this = world("vit-images")
    folder = adapter(this.model, this.config, tmp_path / "adapter")
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10), "red").save(buffer, "PNG")
    (tmp_path / "red.png").write_bytes(buffer.getvalue())
    with serving(folder, tmp_path / "log") as service, service.client() as client:
        image = base64.b64encode(buffer.getvalue()).decode()
        assert client.post("/predict", json={"image": image}).json()["label"] in LABELS
        for body in (
            {"text": str(tmp_path / "red.png")},
            {"image": str(tmp_path / "red.png")},
            {"image": base64.b64encode(b"no image").decode()},
        ):
            assert client.post("/predict", json=body).status_code == 400


def test_what_cannot_be_served(talker: Path, tmp_path: Path) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    with taken, pytest.raises(ConfigError, match="cannot listen"):
        invoke("serve", talker, "--port", str(taken.getsockname()[1]))
    with pytest.raises(ConfigError, match="--token-file"):
        invoke("serve", talker, "--host", "0.0.0.0", "--port", "0")
    with pytest.raises(ModelError, match="is no adapter"):
        invoke("serve", tmp_path / "nothing", "--port", "0")
    (tmp_path / "token").write_text("short\n")
    with pytest.raises(ConfigError, match="16"):
        invoke("serve", talker, "--port", "0", "--token-file", tmp_path / "token")
    with pytest.raises(ConfigError, match="cannot read"):
        invoke("serve", talker, "--port", "0", "--token-file", tmp_path / "none")
    with pytest.raises(ConfigError, match="--key"):
        invoke("serve", talker, "--port", "0", "--certificate", tmp_path / "token")
