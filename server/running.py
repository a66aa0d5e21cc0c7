"""`confide server run`: SuperLink, SuperExec, the gate and the status page, side by side, and the keeper."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

from common.identity import make_folder, read_private
from common.supervise import PYTHON, Service, Supervisor, flower_environment, installed, stop_on_signals
from server.federation import FEDERATION, FederationFolder, load_federation
from server.jobs import write_fields
from server.keeper import Keeper
from server.settings import ServerSettings, load_server_settings
from server.superlink import SuperLink
from server.tls import TlsFolder

_MAX_KEY_BYTES = 16 * 1024
_KEEP_SECONDS = 2.0
_log = logging.getLogger("confide.running")


def services(folder: FederationFolder, settings: ServerSettings) -> list[Service]:
    """In the order in which they start.

    Raises:
        MissingKeyError, ExposedKeyError: a secret is not as it must be.
    """
    files = TlsFolder(folder.tls)
    for secret in (files.server_key, folder.superexec_secret):
        read_private(secret, _MAX_KEY_BYTES)
    make_folder(folder.flower)
    local = settings.local
    certificates = [
        *("--ssl-certfile", str(files.server)),
        *("--ssl-keyfile", str(files.server_key)),
        *("--ssl-ca-certfile", str(files.authority)),
    ]
    # Without its own process and secret, anybody who reaches SuperLink could claim a ServerApp's task.
    superlink = [
        installed("flower-superlink"),
        *("--host", "127.0.0.1", "--port", str(local.superlink_port)),
        *certificates,
        "--enable-supernode-auth",
        *("--isolation", "process"),
        *("--superexec-auth-secret-file", str(folder.superexec_secret)),
        *("--database", str(folder.flower / "superlink.db")),
        *("--health-server-address", f"127.0.0.1:{local.health_port}"),
        "--disable-runtime-dependency-installation",
    ]
    superexec = [
        installed("flower-superexec"),
        *("--runtime-api-address", f"127.0.0.1:{local.superlink_port}"),
        *("--root-certificates", str(files.authority)),
        *("--superexec-auth-secret-file", str(folder.superexec_secret)),
        *("--health-server-address", f"127.0.0.1:{local.superexec_health_port}"),
    ]
    own = [*PYTHON, "-m", "server.serve"]
    environment = flower_environment(folder.flower) | {FEDERATION: str(folder.path)}
    found = [
        Service("superlink", superlink, folder.flower, environment),
        Service("superexec", superexec, folder.flower, environment),
        Service("status", [*own, "status", str(folder.path)], folder.flower, environment),
    ]
    if settings.gate.embedded:
        found.append(Service("gate", [*own, "gate", str(folder.path)], folder.flower, environment))
    return found


class Telling:
    """Keeps a file for `status`. A full disk must not end the server: it is tried again at the next call."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written: dict[str, Any] = {}
        self._failed = False

    def __call__(self, fields: dict[str, Any]) -> None:
        if fields == self._written:
            return
        try:
            write_fields(self._path, fields)
        except OSError as error:
            if not self._failed:
                _log.error("%s cannot be written: %s", self._path, error.strerror)
            self._failed = True
            return
        self._written, self._failed = fields, False


def run_server(path: Path) -> None:
    """Until a signal ends it.

    Raises:
        ConfigError, PrivacyError: a setting or a secret is not as it must be. FederationError: it runs.
    """
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    logging.getLogger("confide").setLevel(logging.INFO)
    os.umask(0o077)  # Flower's database and everything else here is the operator's alone
    folder = FederationFolder(path.resolve())
    name = load_federation(folder).federation
    settings = load_server_settings(folder.settings)
    with folder.serving():
        supervisor = Supervisor(services(folder, settings), folder.logs)
        superlink = SuperLink(f"127.0.0.1:{settings.local.superlink_port}", TlsFolder(folder.tls).authority)
        keeper = Keeper(folder, superlink)
        due = 0.0
        tell = Telling(folder.serving_file)

        def tick() -> None:
            nonlocal due
            tell({"pid": os.getpid(), "pids": supervisor.pids(), "restarts": supervisor.restarts()})
            if time.monotonic() >= due:
                keeper.look()
                due = time.monotonic() + _KEEP_SECONDS

        gate, local = settings.gate, settings.local
        print(
            f"{name}: sites on port {gate.port}; status on http://127.0.0.1:{local.status_port}", flush=True
        )
        try:
            supervisor.run(stop_on_signals(), tick, superlink.close)
        finally:
            folder.serving_file.unlink(missing_ok=True)
