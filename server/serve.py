"""The two small web services of an operator, each a process of its own: the gate and the status page.

Each imports only what it needs: the gate, which the network talks to, knows of no model and no job.
"""

from __future__ import annotations

import sys
from pathlib import Path

import uvicorn

from server.federation import FederationFolder
from server.settings import load_server_settings
from server.tls import TlsFolder


def gate(folder: FederationFolder) -> uvicorn.Config:
    """Over TLS, on the network."""
    from server.gate import make_gate

    settings, files = load_server_settings(folder.settings), TlsFolder(folder.tls)
    superlink = f"https://127.0.0.1:{settings.local.superlink_port}"
    return uvicorn.Config(
        make_gate(superlink, files.authority, settings.gate.max_message_mb * 2**20),
        host=settings.gate.host,
        port=settings.gate.port,
        ssl_certfile=str(files.server),
        ssl_keyfile=str(files.server_key),
        access_log=False,
        log_level="warning",
        server_header=False,
        limit_concurrency=512,
        timeout_keep_alive=30,
    )


def status(folder: FederationFolder) -> uvicorn.Config:
    """On this machine's loopback only."""
    from server.status_page import make_page

    settings = load_server_settings(folder.settings)
    return uvicorn.Config(
        make_page(folder),
        host="127.0.0.1",
        port=settings.local.status_port,
        access_log=False,
        log_level="warning",
        server_header=False,
    )


def main() -> None:
    folder = FederationFolder(Path(sys.argv[2]))
    match sys.argv[1]:
        case "gate":
            config = gate(folder)
        case "status":
            config = status(folder)
        case other:
            sys.exit(f"expected gate or status, found {other}")
    uvicorn.Server(config).run()


if __name__ == "__main__":
    main()
