"""What the commands of `confide client` share: their options, and how they say things."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from common.errors import ConfigError

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="The site's folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts.")]
PassphraseFile = Annotated[
    Path | None,
    typer.Option(help="identity.pem is under the first line of this file.", show_default=False),
]
AskPassphrase = Annotated[bool, typer.Option("--ask-passphrase", help="Ask here for its passphrase.")]
WitnessFile = Annotated[
    Path | None,
    typer.Option(
        "--witness",
        metavar="FILE",
        help="The ledger's witness. None: FOLDER.witness/ledger, or that of the simulated run.",
        show_default=False,
    ),
]


def read_passphrase(file: Path | None, ask: bool, *, new: bool = False) -> bytes | None:
    """From a file's first line or from the keyboard. It is in no message and no argument list.

    new: asked for twice, since what is mistyped now opens nothing later.
    """
    if file is not None and ask:
        raise ConfigError("--passphrase-file and --ask-passphrase exclude each other: give one")
    if ask:
        asked: str = typer.prompt("Passphrase", hide_input=True, confirmation_prompt=new, err=True)
        return asked.encode()
    if file is None:
        return None
    if not file.exists():
        raise ConfigError(f"{file} is not there: --passphrase-file must be a file with the passphrase")
    with file.open("rb") as opened:
        return opened.readline(4096).rstrip(b"\r\n")


def say(*lines: str) -> None:
    """Plain lines: nothing in them is markup, and none is wrapped, so that they can be copied."""
    for line in lines:
        print(line)


def print_json(fields: dict[str, Any]) -> None:
    print(json.dumps(fields, indent=2))
