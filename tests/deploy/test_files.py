"""Every file of deploy/ reads, says what it must, and holds no secret."""

from __future__ import annotations

import fnmatch
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from configparser import RawConfigParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from grpc_health.v1 import health as grpc_health
from grpc_health.v1 import health_pb2, health_pb2_grpc

from server.gate import _PASSED
from server.settings import ServerSettings

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
COMPOSE = yaml.safe_load((DEPLOY / "docker" / "compose.yaml").read_text())
DOCKERFILE = (DEPLOY / "docker" / "Dockerfile").read_text()
GATE, *LOCAL = [ServerSettings().gate.port, 9093, 9094, 9095, 9096]


# systemd

YES = """
NoNewPrivileges PrivateTmp PrivateDevices ProtectHome ProtectClock ProtectHostname ProtectKernelLogs
ProtectKernelModules ProtectKernelTunables ProtectControlGroups RestrictNamespaces RestrictRealtime
RestrictSUIDSGID LockPersonality RemoveIPC
"""


class Unit(RawConfigParser):
    """A unit: keys keep their case, and may come twice."""

    def __init__(self, path: Path) -> None:
        super().__init__(strict=False, delimiters=("=",), comment_prefixes=("#", ";"), allow_no_value=False)
        self.optionxform = str  # type: ignore[assignment, method-assign]
        self.read_string(path.read_text("utf-8"))


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_a_unit_is_hardened(path: Path) -> None:
    unit = Unit(path)["Service"]
    for key in YES.split():
        assert unit[key] == "yes", key
    assert unit["ProtectSystem"] == "strict"
    assert unit["ReadWritePaths"] == f"/var/lib/{unit['StateDirectory']}"
    assert unit["CapabilityBoundingSet"] == unit["AmbientCapabilities"] == ""
    assert unit["SystemCallFilter"] == "@system-service"
    assert set(unit["RestrictAddressFamilies"].split()) == {"AF_INET", "AF_INET6", "AF_UNIX"}
    assert (unit["UMask"], unit["StateDirectoryMode"]) == ("0077", "0700")
    assert unit["User"] == unit["Group"] == path.stem
    assert "MemoryDenyWriteExecute" not in unit  # torch could not run
    assert "MemoryDenyWriteExecute is left out" in path.read_text()


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_a_unit_ends_in_order_and_starts_again_within_limits(path: Path) -> None:
    unit = Unit(path)
    service = unit["Service"]
    assert (service["Restart"], service["KillMode"]) == ("on-failure", "mixed")
    assert int(service["TimeoutStopSec"]) >= 30  # the supervisor gives its own fifteen seconds
    assert service["RestartPreventExitStatus"].split() == ["2", "5"]
    assert int(unit["Unit"]["StartLimitBurst"]) <= 5
    user = path.stem
    for other in ("sysusers.conf", "tmpfiles.conf"):
        assert re.search(rf"\b{user}\b", (DEPLOY / "systemd" / other).read_text())


def test_the_passphrase_comes_as_a_credential() -> None:
    unit = Unit(DEPLOY / "systemd" / "passphrase.conf")["Service"]
    name, _, source = unit["LoadCredential"].partition(":")
    assert unit["ExecStart"].endswith(f"--passphrase-file %d/{name}")
    assert source.startswith("/etc/confide/")
    plain = Unit(DEPLOY / "systemd" / "confide-site.service")["Service"]["ExecStart"]
    assert unit["ExecStart"].startswith(plain)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_systemd_knows_every_key(path: Path, tmp_path: Path) -> None:
    """Also with the drop-ins. The program is not installed in /opt here: that is all it may complain of."""
    copy = tmp_path / path.name
    shutil.copyfile(path, copy)
    if path.stem == "confide-site":
        (tmp_path / f"{path.name}.d").mkdir()
        for extra in ("passphrase.conf", "gpu.conf"):
            shutil.copyfile(DEPLOY / "systemd" / extra, tmp_path / f"{path.name}.d" / extra)
    done = subprocess.run(
        ["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, check=False
    )
    said = [
        line
        for line in (done.stdout + done.stderr).splitlines()
        if line.startswith((path.name, str(tmp_path)))
    ]
    assert [line for line in said if "is not executable" not in line] == []


# Docker


def instructions() -> list[tuple[str, str]]:
    joined = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE))
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def test_the_image_runs_as_nobody_in_particular_and_is_asked_for_its_health() -> None:
    told = instructions()
    known = {"ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY", "USER", "VOLUME", "EXPOSE", "STOPSIGNAL"}
    assert {name for name, _ in told} <= known | {"HEALTHCHECK", "ENTRYPOINT", "CMD"}
    last = [name for name, _ in told][::-1]
    assert [value for name, value in told if name == "USER"] == ["10001:10001"]
    assert last.index("USER") < last.index("RUN")
    assert [value for name, value in told if name == "EXPOSE"] == [str(GATE)]
    assert "health.py" in dict(told)["HEALTHCHECK"]
    assert "-c constraints.txt" in DOCKERFILE
    assert not re.search(r"\b(ADD|curl|wget|sudo|chmod 777)\b", DOCKERFILE)
    assert "TORCH_INDEX" in dict(told)["ARG"] or "ARG TORCH_INDEX" in DOCKERFILE


def ignored(path: str) -> bool:
    """As Docker reads .dockerignore: the last line that matches the path, or a folder above it, decides."""
    parts = path.split("/")
    above = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    out = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        found = pattern.removeprefix("**/")
        deep = found != pattern
        for one in above:
            same = one.count("/") == found.count("/") and fnmatch.fnmatchcase(one, found)
            if same or (deep and fnmatch.fnmatchcase(one.rpartition("/")[2], found)):
                out = not line.startswith("!")
    return out


def test_the_build_sees_what_it_copies_and_nothing_else() -> None:
    sources = [word for name, value in instructions() if name == "COPY" and "--from" not in value
               for word in value.split()[:-1] if not word.startswith("--")]  # fmt: skip
    assert {"common", "client", "server", "simulations", "pyproject.toml"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert not ignored(source), source
    for path in (
        "runs/demo/sites/0001/identity.pem",
        ".git/config",
        ".venv/bin/python",
        "federation/authority.key",
        "tests/conftest.py",
        "tests/client/test_app.py",
        "deploy/kubernetes/site.yaml",
        "common/__pycache__/x.pyc",
        "docs/privacy.md",
    ):
        assert ignored(path), path


def test_compose_locks_every_service() -> None:
    assert set(COMPOSE["services"]) == {"server", "north", "west", "south", "auditor"}
    for name, service in COMPOSE["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["user"] == "10001:10001", name
        assert (
            not {"privileged", "network_mode", "pid", "devices", "cap_add"} & service.keys()
            or name == "auditor"
        )
        assert int(service["stop_grace_period"].removesuffix("s")) >= 30
    auditor = COMPOSE["services"]["auditor"]
    assert auditor["profiles"] == ["audit"] and auditor["network_mode"] == "none"


def test_compose_lets_sites_reach_the_gate_and_nothing_else() -> None:
    """Each shares an internal network with the server, in whose container all but the gate is on loopback."""
    server = COMPOSE["services"]["server"]
    assert server["ports"] == [f"{GATE}:{GATE}"]
    for name in ("north", "west", "south"):
        site = COMPOSE["services"][name]
        assert site["networks"] == [name]
        assert COMPOSE["networks"][name] == {"internal": True}
        assert server["networks"][name] == {"aliases": ["federation.example"]}
        assert "ports" not in site and "expose" not in site
        (secret,) = site["secrets"]
        assert COMPOSE["secrets"][secret["source"]]["file"].startswith("./secrets/")
        volumes = [volume.split(":")[1] for volume in site["volumes"]]
        assert "/data/site.witness" in volumes  # not in the volume that is restored


def test_health_asks_a_page_and_a_node() -> None:
    def code(address: str) -> int:
        program = [sys.executable, "-I", str(DEPLOY / "docker" / "health.py"), address]
        return subprocess.run(program, capture_output=True, check=False).returncode

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 503)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    page = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=page.serve_forever, daemon=True).start()
    node = grpc.server(ThreadPoolExecutor(1))
    servicer = grpc_health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, node)
    port = node.add_insecure_port("127.0.0.1:0")
    node.start()
    try:
        assert code(f"http://127.0.0.1:{page.server_port}/health") == 0
        assert code(f"http://127.0.0.1:{page.server_port}/other") == 1
        servicer.set("", health_pb2.HealthCheckResponse.SERVING)
        assert code(f"127.0.0.1:{port}") == 0
        servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        assert code(f"127.0.0.1:{port}") == 1
    finally:
        page.shutdown()
        node.stop(None)
    assert code(f"127.0.0.1:{port}") == code(f"http://127.0.0.1:{port}/health") == 1


# Kubernetes


def objects() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in MANIFESTS:
        for one in yaml.safe_load_all(path.read_text("utf-8")):
            yield path.name, one


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    for _, one in objects():
        if one["kind"] == "Pod":
            yield one["metadata"]["name"], one["spec"]
        elif one["kind"] == "StatefulSet":
            yield one["metadata"]["name"], one["spec"]["template"]["spec"]


def test_every_pod_is_locked_and_limited() -> None:
    found = dict(pods())
    assert set(found) == {"confide-server", "confide-site", "confide-server-setup", "confide-site-setup"}
    for name, spec in found.items():
        outer = spec["securityContext"]
        assert outer["runAsNonRoot"] is True and outer["runAsUser"] == 10001, name
        assert outer["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert outer["fsGroupChangePolicy"] == "OnRootMismatch", name  # or secrets would become the group's
        assert spec["automountServiceAccountToken"] is False, name
        for container in spec["containers"]:
            inner = container["securityContext"]
            assert inner["allowPrivilegeEscalation"] is False and inner["readOnlyRootFilesystem"] is True
            assert inner["capabilities"] == {"drop": ["ALL"]}
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
            assert "memory" in container["resources"]["limits"]
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            assert {volume["name"] for volume in spec["volumes"]} <= mounted


def test_whoever_serves_is_asked_from_inside() -> None:
    for name in ("confide-server", "confide-site"):
        (container,) = dict(pods())[name]["containers"]
        for probe in ("startupProbe", "livenessProbe"):
            command = container[probe]["exec"]["command"]
            assert command[:3] == ["python", "-I", "/opt/confide/health.py"], name
            assert re.fullmatch(r"(http://)?127\.0\.0\.1:9\d+(/health)?", command[3])
    server, site = (dict(pods())[name]["containers"][0] for name in ("confide-server", "confide-site"))
    assert str(LOCAL[3]) in server["livenessProbe"]["exec"]["command"][3]
    assert server["readinessProbe"]["tcpSocket"] == {"port": "gate"}
    assert "9195" in site["livenessProbe"]["exec"]["command"][3]


def test_the_network_sees_the_gate_and_sites_are_not_seen() -> None:
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for _, one in objects():
        by_kind.setdefault(one["kind"], []).append(one)
    (service,) = by_kind["Service"]
    assert [port["port"] for port in service["spec"]["ports"]] == [GATE]
    policies = {one["metadata"]["name"]: one["spec"] for one in by_kind["NetworkPolicy"]}
    for policy in policies.values():
        assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policies["confide-server"]["ingress"] == [{"ports": [{"port": GATE, "protocol": "TCP"}]}]
    assert policies["confide-server"]["egress"] == [] == policies["confide-site"]["ingress"]
    out = [port["port"] for rule in policies["confide-site"]["egress"] for port in rule["ports"]]
    assert sorted(set(out)) == [53, GATE]
    for stateful in by_kind["StatefulSet"]:
        assert stateful["spec"]["replicas"] == 1
        assert stateful["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] >= 30
    assert "Secret" not in by_kind  # people make it: a manifest would hold its value


# Proxies


def code_of(name: str) -> str:
    text = (DEPLOY / "proxy" / name).read_text("utf-8")
    return "\n".join(re.split(r"(?:^|\s)#", line)[0] for line in text.splitlines())


@pytest.mark.parametrize("name", ["nginx.conf", "haproxy.cfg", "Caddyfile"])
def test_a_proxy_hands_over_fleet_and_nothing_else(name: str) -> None:
    """What they do is in test_proxies.py, where they are installed; this reads."""
    text = code_of(name)
    assert re.findall(r"/v1/\w+", text) and set(re.findall(r"/v1/\w+", text)) == {"/v1/fleet"}
    assert "POST" in text
    assert set(re.findall(r"127\.0\.0\.1:(\d+)", text)) == {str(LOCAL[0])}
    assert set(re.findall(r":?\b(90\d\d)\b", text)) == {str(GATE), str(LOCAL[0])}
    assert "tls/ca.pem" in text and "tls/server.pem" in text
    assert re.search(r"1024m|1073741824", text)  # max_message_mb
    assert not re.search(r"verify off|verify none|insecure", text)


@pytest.mark.parametrize("name", ["nginx.conf", "haproxy.cfg"])
def test_a_proxy_passes_the_gate_s_headers(name: str) -> None:
    text = code_of(name).lower()
    for header in _PASSED - {"content-length"}:
        assert header in text, header


# All of it


def test_no_file_holds_a_secret_or_a_place_of_this_machine() -> None:
    for path in [*DEPLOY.rglob("*"), ROOT / ".dockerignore", ROOT / "docs" / "deployment.md"]:
        if not path.is_file() or "__pycache__" in path.parts:
            continue
        text = path.read_text("utf-8")
        assert "PRIVATE KEY" not in text, path
        assert not re.search(
            r"(?i)(password|passphrase|secret|token)\s*[:=]\s*[\"']?(?![./])[A-Za-z0-9+/]{8,}", text
        ), path
        assert not re.search(r"(?<![\w./`])/(home|root|work)/", text), path
        assert max(map(len, text.splitlines()), default=0) <= 250 or path.suffix == ".cfg", path


def test_every_file_is_in_the_readme() -> None:
    readme = (DEPLOY / "README.md").read_text("utf-8")
    for folder in ("systemd", "docker", "kubernetes", "proxy"):
        assert f"`{folder}/" in readme
    assert "never built or run" in readme and "Never applied" in readme
    for word in re.findall(r"(?<!tests/)deploy/([\w/.-]+\.\w+)", readme):
        assert (DEPLOY / word).is_file(), word
