"""Confide: fine-tune one language model together, on data that nobody shares.

The one command. `confide simulate` runs a federation of simulated sites on this machine;
`confide doctor` checks the installation.
"""

from __future__ import annotations

import os
import sys
import warnings

import typer
from rich.console import Console
from rich.markup import escape

from client import cli as client_cli
from common.errors import ConfideError
from server import cli as server_cli
from simulations import audit_cli, cli, compare_cli, doctor, plan_cli, serve_cli, use_cli

app = typer.Typer(
    name="confide",
    help=__doc__,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.command()(cli.simulate)
app.command()(cli.report)
app.command()(compare_cli.compare)
app.command()(plan_cli.plan)
app.command()(use_cli.predict)
app.command()(use_cli.ask)
app.command()(serve_cli.serve)
app.command()(use_cli.export)
app.command()(doctor.doctor)
app.add_typer(client_cli.app, name="client")
app.add_typer(server_cli.app, name="server")
app.add_typer(audit_cli.app, name="audit")


@app.callback()
def _settings() -> None:
    """Runs before every command."""


def main() -> None:
    """Entry point: an error that a person should read is one screen, without a traceback."""
    settle_environment()
    try:
        app()
    except ConfideError as error:
        Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {escape(str(error))}")
        sys.exit(error.exit_code)
    except OSError as error:
        Console(stderr=True, highlight=False, markup=False).print(f"error: {error}")
        sys.exit(1)


def settle_environment() -> None:
    """Defaults that libraries read when they are first imported; what the user has set stays.

    No telemetry, no update checks, no progress bars of their own. OMP_WAIT_POLICY: threads that wait for
    each other sleep instead of spinning, which is four times faster as soon as a core has other work.
    """
    for name, value in {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONWARNINGS": "ignore",  # of processes that Ray starts
    }.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")


if __name__ == "__main__":
    main()
