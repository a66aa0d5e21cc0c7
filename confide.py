"""Confide: fine-tune one language model together, on data that nobody shares.

The one command. `confide simulate` runs a federation of simulated sites on this machine;
`confide doctor` checks the installation.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from common.errors import ConfideError

app = typer.Typer(
    name="confide",
    help=__doc__,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point: an error that a person should read is one screen, without a traceback."""
    _quiet_libraries()
    try:
        app()
    except ConfideError as error:
        Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {_plain(error)}")
        sys.exit(error.exit_code)


def _plain(error: ConfideError) -> str:
    return str(error).replace("[", r"\[")


def _quiet_libraries() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")


if __name__ == "__main__":
    main()
