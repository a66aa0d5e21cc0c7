"""`confide client run`: the site's Flower node and its executor, side by side."""

from __future__ import annotations

import logging
from pathlib import Path

from client.executor import load_secret, only_one
from client.identity import SiteFolder, load_pinned
from client.join import load_server
from client.settings import load_settings
from common.identity import read_private
from common.supervise import PYTHON, Service, Supervisor, flower_environment, stop_on_signals

_MAX_KEY_BYTES = 16 * 1024


def services(
    folder: SiteFolder, port: int, health_port: int, passphrase_file: Path | None
) -> tuple[Service, Service]:
    """The node, then the executor. port: of the loopback, between the two.

    Raises:
        ConfigError: the site has not joined. MissingKeyError, ExposedKeyError: a secret is not as it must be.
    """
    server = load_server(folder)
    load_pinned(folder)
    poll = load_settings(folder.settings).machine.poll_seconds
    load_secret(folder)
    read_private(folder.node_key, _MAX_KEY_BYTES)
    home = folder.path / "flwr"
    home.mkdir(mode=0o700, exist_ok=True)
    node = [
        *(*PYTHON, "-m", "client.node", str(poll)),
        *("--superlink", server.address),
        *("--root-certificates", str(folder.authority_tls)),
        *("--auth-supernode-private-key", str(folder.node_key)),
        *("--isolation", "process"),
        *("--superexec-auth-secret-file", str(folder.executor_secret)),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--health-server-address", f"127.0.0.1:{health_port}"),
    ]
    executor = [*PYTHON, "-m", "confide", "client", "execute", str(folder.path), "--port", str(port)]
    if passphrase_file is not None:
        executor += ["--passphrase-file", str(passphrase_file.resolve())]
    environment = flower_environment(home)
    return Service("node", node, home, environment), Service("executor", executor, home, environment)


def run_site(path: Path, port: int, health_port: int, passphrase_file: Path | None) -> None:
    """Until a signal ends it.

    Raises:
        All of `services`. CheckpointError: this site runs already.
    """
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    logging.getLogger("confide").setLevel(logging.INFO)
    folder = SiteFolder(path.resolve())
    supervisor = Supervisor(services(folder, port, health_port, passphrase_file), folder.logs)
    server = load_server(folder)
    with only_one(folder, "client"):
        print(f"{server.federation}: taking part through {server.address}; Ctrl-C ends it", flush=True)
        supervisor.run(stop_on_signals())
