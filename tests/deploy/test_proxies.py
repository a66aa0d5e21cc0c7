"""Whoever stands in front of SuperLink hands over POST /v1/fleet/* and nothing else.

That is the embedded gate, and the proxies of deploy/proxy wherever nginx, HAProxy or Caddy is installed, or
lies in the folder CONFIDE_PROXIES.
"""

from __future__ import annotations

import datetime
import http.client
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from server import tls
from server.federation import FederationFolder, create_federation
from server.serving import create_serving

ROOT = Path(__file__).resolve().parents[2]
PROXY = ROOT / "deploy" / "proxy"
FOLDER = "/var/lib/confide/federation"
NAMES = ("gate", "nginx", "haproxy", "caddy")
SENT = {
    "content-type": "application/x-protobuf",
    "accept": "application/x-protobuf",
    "flwr-public-key": "key",
    "flwr-signature": "signature",
    "flwr-timestamp": "now",
    "flwr-component-name": "flower-supernode",
    "flwr-package-name": "flwr",
    "flwr-package-version": "1",
}
STRANGE = {
    "authorization": "Bearer x",
    "cookie": "a=b",
    "forwarded": "for=1.2.3.4",
    "x-forwarded-for": "1.2.3.4",
    "x-real-ip": "1.2.3.4",
}


@dataclass
class SuperLink:
    """Stands in for Flower's: it keeps what reaches it."""

    port: int
    seen: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> FederationFolder:
    folder = FederationFolder(tmp_path_factory.mktemp("proxies") / "federation")
    create_federation(folder, "tests", os.urandom)
    create_serving(folder, "tests", ["localhost"], 9092, os.urandom, datetime.datetime.now(datetime.UTC))
    return folder


@pytest.fixture(scope="module")
def superlink(federation: FederationFolder) -> Iterator[SuperLink]:
    files = tls.TlsFolder(federation.tls)
    found = SuperLink(0)

    class Keeps(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            found.seen.append((self.command, self.path, headers, body))
            self.send_response(200)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", "6")
            self.send_header("set-cookie", "a=b")
            self.end_headers()
            self.wfile.write(b"answer")

        do_GET = do_PUT = do_POST  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Keeps)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.server, files.server_key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    found.port = server.server_address[1]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield found
    server.shutdown()


def program(name: str) -> str | None:
    beside = os.environ.get("CONFIDE_PROXIES", "")
    places = os.pathsep.join([beside, os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    return shutil.which(name, path=places)


def configured(name: str, folder: FederationFolder, port: int, superlink: int, aside: Path) -> list[str]:
    """The command of a front, with the file of deploy/proxy under this test's ports and paths."""
    if name == "gate":
        settings = folder.settings.read_text().replace("port = 9092", f"port = {port}", 1)
        folder.settings.write_text(settings.replace("superlink_port = 9093", f"superlink_port = {superlink}"))
        return [sys.executable, "-P", "-m", "server.serve", "gate", str(folder.path)]
    file = {"nginx": "nginx.conf", "haproxy": "haproxy.cfg", "caddy": "Caddyfile"}[name]
    text = (PROXY / file).read_text()
    text = text.replace(FOLDER, str(folder.path)).replace("9092", str(port)).replace("9093", str(superlink))
    text = text.replace("/var/log/nginx/", f"{aside}/").replace("/run/nginx.pid", f"{aside}/nginx.pid")
    (aside / file).write_text(text)
    own = program(name) or ""
    match name:
        case "nginx":
            return [
                own,
                "-p",
                str(aside),
                "-e",
                f"{aside}/error.log",
                "-c",
                str(aside / file),
                "-g",
                "daemon off;",
            ]
        case "haproxy":
            beside = folder.tls / "server.pem.key"
            if not beside.exists():
                beside.symlink_to("server.key")
            return [own, "-db", "-f", str(aside / file)]
        case _:
            return [own, "run", "--adapter", "caddyfile", "--config", str(aside / file)]


@pytest.fixture(scope="module", params=NAMES)
def front(
    request: pytest.FixtureRequest,
    federation: FederationFolder,
    superlink: SuperLink,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[str, int]]:
    """(name, port) of a front that is at work."""
    name = request.param
    if name != "gate" and program(name) is None:
        pytest.skip(f"{name} is not installed")
    port, aside = free_port(), tmp_path_factory.mktemp(name)
    process = subprocess.Popen(
        configured(name, federation, port, superlink.port, aside),
        env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(aside), "XDG_DATA_HOME": str(aside)},
        cwd=aside,
        stdout=(aside / "out").open("wb"),
        stderr=subprocess.STDOUT,
    )
    try:
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert process.poll() is None, (aside / "out").read_text()
                time.sleep(0.1)
        else:
            pytest.fail((aside / "out").read_text())
        yield name, port
    finally:
        process.terminate()
        process.wait(20)


def ask(
    folder: FederationFolder,
    port: int,
    target: str,
    method: str = "POST",
    headers: dict[str, str] | None = None,
    body: bytes = b"question",
) -> tuple[int, bytes, dict[str, str]]:
    """Raw: nothing of the target or the headers is changed on this side."""
    context = ssl.create_default_context(cafile=str(tls.TlsFolder(folder.tls).authority))
    connection = http.client.HTTPSConnection("localhost", port, context=context, timeout=20)
    given = {"host": "localhost", "content-length": str(len(body)), **(headers or {})}
    connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
    for name, value in given.items():
        if value:
            connection.putheader(name, value)
    connection.endheaders(body)
    answer = connection.getresponse()
    found = answer.status, answer.read(), {key.lower(): value for key, value in answer.getheaders()}
    connection.close()
    return found


def test_what_a_node_sends_arrives_and_the_answer_comes_back(
    front: tuple[str, int], federation: FederationFolder, superlink: SuperLink
) -> None:
    name, port = front
    superlink.seen.clear()
    status, body, _ = ask(federation, port, "/v1/fleet/pull-messages", headers=SENT)
    assert (status, body) == (200, b"answer")
    (method, path, headers, sent) = superlink.seen[0]
    assert (method, path, sent) == ("POST", "/v1/fleet/pull-messages", b"question")
    assert {key: headers.get(key) for key in SENT} == SENT, name


def test_other_headers_stay_outside(
    front: tuple[str, int], federation: FederationFolder, superlink: SuperLink
) -> None:
    name, port = front
    superlink.seen.clear()
    _, _, came = ask(federation, port, "/v1/fleet/get-run?a=b", headers={**SENT, **STRANGE, "foreign": "1"})
    (_, path, headers, _) = superlink.seen[0]
    assert path == "/v1/fleet/get-run"
    added = {"caddy": {"x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "foreign"}}.get(
        name, set()
    )
    left = headers.keys() & (STRANGE.keys() | {"foreign"}) - added
    assert not left, left
    assert headers.get("x-forwarded-for") != "1.2.3.4"
    if name in ("gate", "haproxy"):  # the others cannot list what may go out
        assert "set-cookie" not in came


@pytest.mark.parametrize(
    "target",
    [
        "/v1/control/start-run",
        "/v1/runtime/acquire-task",
        "/",
        "/v1/fleet",
        "/v1/fleet/",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/..%2fcontrol%2fstart-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet//v1/control/start-run",
        "/v1/fleet/x/../../control/start-run",
        "//v1/control/start-run",
        "/V1/CONTROL/start-run",
        "/v1/fleet/a?/../../control/start-run",
    ],
)
def test_nothing_else_can_be_reached(
    target: str, front: tuple[str, int], federation: FederationFolder, superlink: SuperLink
) -> None:
    superlink.seen.clear()
    status, _, _ = ask(federation, front[1], target)
    reached = [path for _, path, _, _ in superlink.seen]
    assert reached in ([], ["/v1/fleet/a"]), reached  # the last one's path is just that
    assert (status >= 400) == (not reached), status


def test_a_host_that_looks_like_a_path_reaches_nothing_else(
    front: tuple[str, int], federation: FederationFolder, superlink: SuperLink
) -> None:
    superlink.seen.clear()
    for host in ("x/v1/control/start-run?", "x/v1/control/start-run#", "evil.example"):
        ask(federation, front[1], "/v1/fleet/get-run", headers={"host": host})
    assert {path for _, path, _, _ in superlink.seen} <= {"/v1/fleet/get-run"}
    assert all("evil" not in headers.get("host", "") for _, _, headers, _ in superlink.seen)


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS", "TRACE"])
def test_only_post(
    method: str, front: tuple[str, int], federation: FederationFolder, superlink: SuperLink
) -> None:
    superlink.seen.clear()
    status, _, _ = ask(federation, front[1], "/v1/fleet/pull-messages", method, body=b"")
    assert status >= 400
    assert superlink.seen == []


def test_a_body_that_is_too_long_or_of_unknown_length_is_not_taken(
    front: tuple[str, int], federation: FederationFolder, superlink: SuperLink
) -> None:
    superlink.seen.clear()
    for headers in (
        {"content-length": str(1024 * 2**20 + 1)},
        {"content-length": "", "transfer-encoding": "chunked"},
    ):
        body = b"8\r\nquestion\r\n0\r\n\r\n" if "transfer-encoding" in headers else b""
        try:
            status, _, _ = ask(federation, front[1], "/v1/fleet/push-messages", headers=headers, body=body)
            assert status in (400, 404, 411, 413)
        except (ConnectionError, http.client.HTTPException):
            pass  # closed without a word
    assert superlink.seen == [], json.dumps([path for _, path, _, _ in superlink.seen])


def test_a_superlink_of_another_authority_is_not_asked(
    front: tuple[str, int], federation: FederationFolder, superlink: SuperLink, tmp_path: Path
) -> None:
    """The front has the right authority's file; a front of another federation must refuse this SuperLink."""
    name, _ = front
    other = FederationFolder(tmp_path / "other")
    create_federation(other, "other", os.urandom)
    create_serving(other, "other", ["localhost"], 9092, os.urandom, datetime.datetime.now(datetime.UTC))
    port = free_port()
    process = subprocess.Popen(
        configured(name, other, port, superlink.port, tmp_path),
        env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path)},
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    superlink.seen.clear()
    try:
        for _ in range(200):
            try:
                status, _, _ = ask(other, port, "/v1/fleet/pull-messages", headers=SENT)
                break
            except OSError:
                assert process.poll() is None
                time.sleep(0.1)
        else:
            pytest.fail("it did not start")
        assert status in (502, 503)
        assert superlink.seen == []
    finally:
        process.terminate()
        process.wait(20)
