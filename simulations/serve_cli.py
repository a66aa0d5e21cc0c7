"""`confide serve`: what was trained, over HTTP."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from common.errors import ConfigError

if TYPE_CHECKING:
    from simulations.service_line import Line

_SHORTEST_TOKEN = 16  # characters
_PATIENCE = 20  # seconds for answers that are on their way when the service is ended


def serve(
    adapter: Annotated[
        Path, typer.Argument(help="A run's folder, its `adapter`, or what confide export wrote.")
    ],
    host: Annotated[
        str, typer.Option(help="Address to listen on. Others than this machine's own need a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    token_file: Annotated[
        Path | None,
        typer.Option(help="Its first line is the bearer token that callers must send.", show_default=False),
    ] = None,
    insecure_no_token: Annotated[
        bool,
        typer.Option(
            "--insecure-no-token", help="Let whoever reaches the port ask, from other machines too."
        ),
    ] = False,
    certificate: Annotated[
        Path | None, typer.Option(help="PEM file, for HTTPS; with --key.", show_default=False)
    ] = None,
    key: Annotated[Path | None, typer.Option(help="PEM file of its key.", show_default=False)] = None,
    longest: Annotated[int, typer.Option("--max-tokens", min=1, help="Of an answer, at most.")] = 1024,
    waiting: Annotated[int, typer.Option(min=0, help="Callers in line; more are turned away.")] = 8,
    megabytes: Annotated[int, typer.Option("--max-megabytes", min=1, max=1024, help="Of a request.")] = 4,
    plain: Annotated[
        bool,
        typer.Option("--plain", help="Write each question alone, as prompts were in training."),
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Serve an adapter over HTTP, with a page to try it.

    Language models answer POST /v1/chat/completions as OpenAI's clients know it, every other kind POST
    /predict. One request is answered at a time. What callers send is not logged.
    """
    local = _is_local(host)
    if not local and token_file is None and not insecure_no_token:
        raise ConfigError(
            f"--host {host} can be reached from other machines: give --token-file, so that only who knows "
            "the token may ask, or --insecure-no-token"
        )
    if (certificate is None) != (key is None):
        raise ConfigError("HTTPS needs both --certificate and --key")
    token = None if token_file is None else _read_token(token_file)
    with _listen(host, port) as listening:
        from common.prediction import open_adapter
        from simulations.service import make_service
        from simulations.service_gate import Entry
        from simulations.service_line import Line

        names = {"localhost", "127.0.0.1", "::1", host.lower()}
        open_to_all = not local or token is not None
        entry = Entry(token, None if open_to_all else frozenset(names), megabytes * 1_000_000)
        line = Line(waiting)
        app = make_service(open_adapter(adapter, device), entry, line, longest=longest, plain=plain)
        if not local and certificate is None:
            Console(stderr=True, highlight=False).print(
                "[bold red]Plain HTTP: on the way, everyone can read questions, answers and the token.[/] "
                "Give --certificate and --key, or keep it behind a proxy that speaks TLS."
            )
        _run(app, listening, line, host, certificate, key)


def _run(
    app: object, listening: socket.socket, line: Line, host: str, certificate: Path | None, key: Path | None
) -> None:
    import uvicorn

    shown = f"[{host}]" if ":" in host else host
    address = f"{'http' if certificate is None else 'https'}://{shown}:{listening.getsockname()[1]}"

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                Console(highlight=False, soft_wrap=True).print(escape(f"listening on {address}"))

        def handle_exit(self, sig: int, frame: object) -> None:
            line.closing.set()  # the model stops after the next token
            super().handle_exit(sig, frame)  # type: ignore[arg-type]

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    for loud in ("httpx", "transformers", "asyncio"):
        logging.getLogger(loud).setLevel(logging.ERROR)
    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        log_config=None,
        log_level="warning",
        access_log=False,  # it would have query strings in it
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=_PATIENCE,
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )
    # uvicorn raises the signal again when it is done: ended as asked is no failure.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    try:
        Server(config).run(sockets=[listening])
    finally:
        line.close()


def _listen(host: str, port: int) -> contextlib.closing[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return contextlib.closing(socket.create_server((host, port), family=family))
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}, port {port} ({error.strerror}): choose another --host or --port; 0 "
            "takes any port that is free"
        ) from None


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _read_token(file: Path) -> str:
    try:
        token = (file.read_text("utf-8").splitlines() or [""])[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read --token-file {file} ({type(error).__name__})") from None
    if len(token) < _SHORTEST_TOKEN or not token.isascii() or any(c.isspace() for c in token):
        raise ConfigError(
            f"--token-file {file}: expected a first line of at least {_SHORTEST_TOKEN} ASCII characters "
            "without blanks: head -c 24 /dev/urandom | base64"
        )
    return token
