"""From outside nothing but the Fleet API can be reached: a real gate over TLS, before a server that tells."""

from __future__ import annotations

import datetime
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from common.errors import ConfigError
from server import tls
from server.gate import make_gate
from server.tls import TlsFolder

LONGEST = 100_000
NOW = datetime.datetime.now(datetime.UTC)


@contextmanager
def serving(app: Starlette, files: TlsFolder) -> Iterator[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host="127.0.0.1",
            port=port,
            ssl_certfile=str(files.server),
            ssl_keyfile=str(files.server_key),
            log_level="critical",
            server_header=False,
        )
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield port
    finally:
        server.should_exit = True
        thread.join(20)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TlsFolder:
    folder = TlsFolder(tmp_path_factory.mktemp("tls") / "tls")
    tls.create_authority(folder, "Heart study", NOW)
    tls.issue_server(folder, ["fed.example.org", "10.1.2.3"], NOW)
    return folder


def superlink(seen: list[str]) -> Starlette:
    """It answers everything, and says what it was asked."""

    async def anything(request: Request) -> Response:
        body = await request.body()
        seen.append(request.url.path)
        told = {"path": request.url.path, "bytes": len(body), "headers": dict(request.headers)}
        return JSONResponse(told, headers={"x-internal": "secret", "set-cookie": "a=b"})

    return Starlette(routes=[Route("/{path:path}", anything, methods=["GET", "POST", "PUT", "DELETE"])])


@pytest.fixture(scope="module")
def gate(files: TlsFolder) -> Iterator[tuple[httpx.Client, list[str]]]:
    seen: list[str] = []
    with serving(superlink(seen), files) as behind:
        app = make_gate(f"https://127.0.0.1:{behind}", files.authority, LONGEST)
        context = ssl.create_default_context(cafile=str(files.authority))
        with (
            serving(app, files) as port,
            httpx.Client(verify=context, base_url=f"https://127.0.0.1:{port}") as client,
        ):
            yield client, seen


def test_fleet_calls_go_through_with_their_body(gate: tuple[httpx.Client, list[str]]) -> None:
    client, _ = gate
    answer = client.post("/v1/fleet/pull-messages", content=b"x" * LONGEST)
    assert answer.status_code == 200
    assert (answer.json()["path"], answer.json()["bytes"]) == ("/v1/fleet/pull-messages", LONGEST)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/runtime/acquire-task",
        "/v1/runtime/pull-task-input",
        "/",
        "/docs",
        "/openapi.json",
        "/health",
        "/v1/fleet",
        "/v1/fleet/",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet/..%2fcontrol%2fstart-run",
        "/v1/fleet//v1/control/start-run",
        "//v1/control/start-run",
        "/V1/CONTROL/START-RUN",
        "/v1/fleet/a/b",
    ],
)
def test_nothing_else_does(gate: tuple[httpx.Client, list[str]], path: str) -> None:
    client, seen = gate
    seen.clear()
    url = httpx.URL(str(client.base_url).rstrip("/")).copy_with(raw_path=path.encode())
    for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD"):
        answer = client.request(method, url)
        assert answer.status_code in (404, 405, 400) or all(p.startswith("/v1/fleet/") for p in seen), path
    assert not [p for p in seen if "control" in p and not p.startswith("/v1/fleet/..")], seen
    assert not [p for p in seen if p.startswith(("/v1/control", "/v1/runtime"))], seen


def test_only_the_headers_that_a_node_sends_go_through(gate: tuple[httpx.Client, list[str]]) -> None:
    client, _ = gate
    sent = {
        "flwr-public-key": "k",
        "flwr-signature": "s",
        "flwr-timestamp": "t",
        "flwr-task-token": "token",
        "flwr-superexec-signature": "forged",
        "authorization": "Bearer x",
        "cookie": "a=b",
        "x-forwarded-for": "1.2.3.4",
    }
    answer = client.post("/v1/fleet/get-run", content=b"x", headers=sent)
    got = answer.json()["headers"]
    assert {name: got[name] for name in ("flwr-public-key", "flwr-signature", "flwr-timestamp")} == {
        "flwr-public-key": "k",
        "flwr-signature": "s",
        "flwr-timestamp": "t",
    }
    for name in ("flwr-task-token", "flwr-superexec-signature", "authorization", "cookie", "x-forwarded-for"):
        assert name not in got
    assert "x-internal" not in answer.headers and "set-cookie" not in answer.headers


def test_a_request_that_is_too_long_is_not_handed_over(gate: tuple[httpx.Client, list[str]]) -> None:
    client, seen = gate
    seen.clear()
    assert client.post("/v1/fleet/push-object", content=b"x" * (LONGEST + 1)).status_code == 413
    assert client.post("/v1/fleet/push-object", content=iter([b"x"])).status_code == 411
    assert seen == []


def test_a_superlink_that_is_away_is_said_so(files: TlsFolder) -> None:
    context = ssl.create_default_context(cafile=str(files.authority))
    with serving(make_gate("https://127.0.0.1:1", files.authority, LONGEST), files) as port:
        answer = httpx.post(f"https://127.0.0.1:{port}/v1/fleet/get-run", content=b"x", verify=context)
    assert answer.status_code == 503


# Certificates


def test_the_server_is_known_by_its_names_and_by_no_other(files: TlsFolder) -> None:
    assert tls.hosts_of(files.server) == ["fed.example.org", "10.1.2.3"]
    assert round((tls.expires(files.server) - NOW).total_seconds() / 86400, 1) == tls.SERVER_DAYS
    with serving(superlink([]), files) as port:
        trusts = ssl.create_default_context(cafile=str(files.authority))
        for name, good in (("fed.example.org", True), ("localhost", True), ("evil.example", False)):
            with socket.create_connection(("127.0.0.1", port)) as plain:
                try:
                    trusts.wrap_socket(plain, server_hostname=name).close()
                    found = True
                except ssl.SSLCertVerificationError:
                    found = False
            assert found is good, name


def test_secrets_are_for_their_owner_alone(files: TlsFolder) -> None:
    for path in (files.authority_key, files.server_key):
        assert path.stat().st_mode & 0o777 == 0o600


def test_an_authority_is_replaced_in_steps(tmp_path: Path) -> None:
    """Old kits work until the operator drops the old authority; new ones before that."""
    folder = TlsFolder(tmp_path / "tls")
    tls.create_authority(folder, "Heart study", NOW)
    tls.issue_server(folder, ["localhost"], NOW)
    old_trust = tmp_path / "old.pem"
    old_trust.write_bytes(folder.authority.read_bytes())
    tls.create_authority(folder, "Heart study", NOW)
    both = tmp_path / "both.pem"
    both.write_bytes(folder.authority.read_bytes())

    def accepted(trust: Path) -> bool:
        with serving(superlink([]), folder) as port:
            context = ssl.create_default_context(cafile=str(trust))
            try:
                httpx.get(f"https://localhost:{port}/", verify=context)
            except httpx.ConnectError:
                return False
            return True

    assert accepted(old_trust) and accepted(both)  # the certificate is still the old authority's
    tls.issue_server(folder, tls.hosts_of(folder.server) or ["localhost"], NOW)
    assert accepted(both) and not accepted(old_trust)
    assert tls.drop_old_authorities(folder) == 1
    assert accepted(folder.authority)


def test_a_host_that_is_none_gets_no_certificate(files: TlsFolder) -> None:
    with pytest.raises(ConfigError):
        tls.issue_server(files, ["a b\x00"], NOW)
    with pytest.raises(ConfigError):
        tls.issue_server(files, [], NOW)
    assert json.dumps(tls.hosts_of(files.server))
