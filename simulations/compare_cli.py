"""`confide compare`: runs side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Folders of finished runs.")],
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a page with plots, too.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts.")] = False,
) -> None:
    """Compare runs: what was set differently, ε, metrics, bytes and time.

    Of the configurations only the keys are shown in which the runs differ.
    """
    from common.files import write_atomically
    from simulations import compare as compared
    from simulations.compare_report import compare_page, terminal_table

    found = compared.compare(runs)
    if html is not None:
        write_atomically(html, compare_page(found).encode())
    if as_json:
        print(json.dumps(compared.as_json(found), indent=2, ensure_ascii=False))
        return
    out = Console(highlight=False)
    out.print(terminal_table(found))
    if html is not None:
        print(html)
