"""`confide client data check | clean`: look at a data file, and tidy it, before anything is trained on it.

Both work at the site; nothing leaves it.
"""

from __future__ import annotations

import shlex
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from client.cli_options import AsJson, print_json, say
from common.errors import ConfigError

if TYPE_CHECKING:
    from client.data.check import Checked
    from client.data.cleaning import Cleaned
    from client.data.subject import Subject

app = typer.Typer(
    help="Look at a site's data file and tidy it. Nothing leaves the site, and no file is ever overwritten.",
    no_args_is_help=True,
)

_ROWS = 6  # runs of row numbers in a line of the terminal

Given = Annotated[
    Path, typer.Argument(metavar="CONFIG_OR_FILE", help="confide.toml, or a data file by itself.")
]
Test = Annotated[
    Path | None, typer.Option(help="The public evaluation set, as data.test.", show_default=False)
]
Person = Annotated[
    str | None,
    typer.Option(metavar="COLUMN", help="The column that says whose a record is.", show_default=False),
]
TextColumn = Annotated[
    str | None, typer.Option("--text", metavar="COLUMN", help="As data.text.", show_default=False)
]
LabelColumn = Annotated[
    str | None, typer.Option("--label", metavar="COLUMN", help="As data.label.", show_default=False)
]
PromptColumn = Annotated[
    str | None, typer.Option("--prompt", metavar="COLUMN", help="As data.prompt.", show_default=False)
]


@app.command()
def check(
    given: Given,
    test: Test = None,
    person: Person = None,
    text: TextColumn = None,
    label: LabelColumn = None,
    prompt: PromptColumn = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write a page.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say everything that is wrong with a data file, with the rows, before anybody trains on it.

    Columns, encoding, duplicates, labels, lengths, records of a person, personal data. Row numbers are lines
    of the file; of parquet, records. Personal data is shown masked, and rules do not find all of it. Exit
    codes: 0 nothing but notes; 10 warnings; 11 errors; 2 the configuration is wrong; 3 no such file, or no
    data.
    """
    from client.data.check import check as look
    from client.data.findings import exit_code
    from common.files import write_atomically

    checked = look(_subject(given, test, person, text, label, prompt))
    if html is not None:
        from client.data.report import check_page

        if html.resolve() in (checked.raw.path.resolve(), given.resolve()):
            raise ConfigError(f"--html {html}: that is the file which is looked at; name another one")
        write_atomically(html, check_page(checked).encode())
    if as_json:
        print_json(checked.to_json())
    else:
        _print_check(checked)
    raise typer.Exit(exit_code(checked.findings))


@app.command()
def clean(
    given: Given,
    recipe: Annotated[
        Path | None, typer.Option(metavar="FILE.toml", help="What to do, in order.", show_default=False)
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT",
            help="The new data file (or, with --propose, the new recipe). It must not exist.",
            show_default=False,
        ),
    ] = None,
    propose: Annotated[
        bool, typer.Option("--propose", help="Write a recipe from what check finds, to be read and changed.")
    ] = False,
    test: Test = None,
    person: Person = None,
    text: TextColumn = None,
    label: LabelColumn = None,
    prompt: PromptColumn = None,
    as_json: AsJson = False,
) -> None:
    """Tidy a data file by a written recipe, into a new file. The same input gives the same bytes.

    The steps are gone through until they change nothing any more. Beside OUT stands OUT.recipe.json: what
    each step did to which rows, and SHA-256 of both files. Exit codes: 2 the recipe or the configuration is
    wrong, or OUT exists; 3 the file cannot be read as it is: the message names the step that allows it; 5 the
    recipe asks for augmented copies.
    """
    subject = _subject(given, test, person, text, label, prompt)
    if to is None:
        raise ConfigError("--to OUT is missing: name the file to be written")
    if propose == (recipe is not None):
        raise ConfigError("give --recipe FILE.toml, or --propose to have one written: exactly one of them")
    if recipe is None:
        from client.data.check import check as look
        from client.data.propose import proposed
        from client.data.writing import refuse_existing, write_together

        refuse_existing([to])
        write_together((to, proposed(look(subject)).encode()))
        out = _clean_file(subject.train, beside=to)
        named = {"--test": test, "--person": person, "--text": text, "--label": label, "--prompt": prompt}
        options = [part for option, value in named.items() if value is not None for part in (option, value)]
        data = f"./{given}" if str(given).startswith("-") else given  # else it reads as an option
        then = ["confide", "client", "data", "clean", data, "--recipe", to, "--to", out, *options]
        say(f"recipe: {to}", "next: read it, change it, then", f"  {shlex.join(map(str, then))}")
        return
    from client.data.cleaning import clean as tidy

    cleaned = tidy(subject, recipe, to)
    if as_json:
        print_json(cleaned.to_json())
    else:
        _print_clean(cleaned)


def _subject(
    given: Path,
    test: Path | None,
    person: str | None,
    text: str | None,
    label: str | None,
    prompt: str | None,
) -> Subject:
    from client.data.subject import subject_of

    return subject_of(given, test=test, person=person, text=text, label=label, prompt=prompt)


def _clean_file(data: Path, beside: Path) -> Path:
    """A name for what `clean` makes of `data`, in its form where that is written; nothing is there yet."""
    from client.data.writing import record_of
    from common.datasets import FileKind, kind_of

    name = f"{data.stem}.jsonl" if kind_of(data) in (FileKind.FOLDER, FileKind.SQUAD) else data.name
    for number in count(1):
        out = beside.with_name(f"clean-{name}" if number == 1 else f"clean-{number}-{name}")
        if not any(path.exists() or path.is_symlink() for path in (out, record_of(out))):
            break
    return out


def _print_check(checked: Checked) -> None:
    from client.data.findings import Severity, listed_rows
    from client.data.report import BLIND, summary_lines
    from common.cells import short

    console = Console(highlight=False)
    for line in summary_lines(checked):
        console.print(escape(line), soft_wrap=True)
    if not checked.findings:
        console.print("[bold green]nothing found[/]")
        console.print(escape(BLIND), style="dim")
        return
    colour = {Severity.ERROR: "red", Severity.WARNING: "yellow", Severity.NOTE: "cyan"}
    table = Table(box=box.SIMPLE_HEAD, expand=True)
    table.add_column("what", no_wrap=True)
    table.add_column("where, and what to do", overflow="fold", ratio=1)
    for finding in checked.findings:
        where = [f"column {short(finding.column)}"] if finding.column else []
        several = "s" if len(finding.rows) > 1 else ""
        where += [f"{checked.raw.unit}{several} {listed_rows(finding.rows, _ROWS)}"] if finding.rows else []
        file = " (test file)" if finding.in_test else ""
        table.add_row(
            f"[bold {colour[finding.severity]}]{finding.severity.value}[/]\n{finding.code.label}{file}",
            f"{escape(', '.join(where))}\n{escape(finding.says)}\n[dim]{escape(finding.code.remedy)}[/]",
        )
    console.print(table)
    counts = {severity: sum(f.severity is severity for f in checked.findings) for severity in Severity}
    words = ", ".join(f"{count} {s.value}{'s' if count != 1 else ''}" for s, count in counts.items() if count)
    console.print(f"[bold]{words}[/]")
    console.print(escape(BLIND), style="dim")


def _print_clean(cleaned: Cleaned) -> None:
    console = Console(highlight=False)
    table = Table(box=box.SIMPLE_HEAD)
    for name, justify in (("step", "left"), ("rows changed", "right"), ("rows left out", "right")):
        table.add_column(name, justify="right" if justify == "right" else "left")
    for step in cleaned.steps:
        table.add_row(step.name, f"{len(step.changed):,}", f"{len(step.dropped):,}")
    console.print(table)
    say(
        f"read: {cleaned.read:,} rows of {cleaned.source}",
        f"written: {cleaned.kept:,} rows to {cleaned.out}, SHA-256 {cleaned.out_sha256}",
        f"record: {cleaned.record}",
    )
