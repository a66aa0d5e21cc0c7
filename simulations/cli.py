"""`confide simulate` and `confide report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from common.config import Engine, RunConfig, load_config, refuse_study
from common.errors import ConfigError

if TYPE_CHECKING:
    from simulations.fleet import Split  # heavy: torch and transformers are loaded only to run something

Overrides = Annotated[
    list[str], typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key; may be repeated.")
]


def simulate(
    config: Annotated[
        Path | None, typer.Argument(help="A confide.toml. None: the built-in demo.", show_default=False)
    ] = None,
    overrides: Overrides = [],  # noqa: B006
    engine: Annotated[
        Engine, typer.Option(help="inline: in this process. ray: Flower's simulation, all cores.")
    ] = Engine.INLINE,
    runs: Annotated[Path, typer.Option(help="Folder in which runs are kept.")] = Path("runs"),
    resume: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Go on with the run in this folder.", show_default=False),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; train nothing.")] = False,
    study_noise_seed: Annotated[
        int | None,
        typer.Option(
            help="STUDY ONLY: repeatable noise. Not private; stamps the report.", show_default=False
        ),
    ] = None,
    insecure_no_privacy: Annotated[
        bool,
        typer.Option("--insecure-no-privacy", help="STUDY ONLY: no clipping, no noise. Stamps the report."),
    ] = False,
    insecure_plain_updates: Annotated[
        bool,
        typer.Option(
            "--insecure-plain-updates",
            help="STUDY ONLY: no secure aggregation, the server sees each update. Stamps the report.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts.")] = False,
) -> None:
    """Fine-tune one adapter across simulated sites, with record-level differential privacy.

    Leaves a folder runs/NAME-K with the adapter, the events, a summary and a report; runs/NAME points to
    the newest. Exit codes: 2 configuration, 3 data, 4 model, 5 privacy, 7 checkpoint, 8 round.
    """
    from server.record import RunFolder
    from simulations import run, screen

    console = Console(stderr=True, highlight=False)
    if resume is not None:
        if config is not None or overrides or dry_run:
            raise ConfigError("--resume goes on with a run as it was begun: leave the other options out")
        folder = RunFolder(resume)
        resolved = folder.load_config()
        asked = (insecure_no_privacy, study_noise_seed, insecure_plain_updates)
        study = resolved.study
        if asked != (resolved.privacy.insecure_disabled, study.noise_seed, study.plain_updates):
            raise ConfigError(
                f"{folder.config} and the command line disagree about --insecure-no-privacy, "
                "--study-noise-seed or --insecure-plain-updates: give them as the run was begun. No file "
                "alone turns privacy off"
            )
    else:
        wanted = _with_study(
            load_config(config or run.DEMO, overrides),
            study_noise_seed,
            insecure_no_privacy,
            insecure_plain_updates,
        )
        resolved, split = run.prepare(wanted)
        if dry_run:
            _print_plan(resolved, run.describe(resolved, split), as_json)
            return
        console.print(_cleaning(split))
        run.rehearse(resolved, split)
        folder = run.create_folder(runs, resolved)
    rounds = resolved.warmup.rounds + resolved.run.rounds
    if as_json:
        outcome = run.simulate(folder, engine, screen.Silent())
        print(json.dumps(outcome.summary, indent=2, ensure_ascii=False))
        return
    with screen.RoundBars(console, rounds) as bars:
        outcome = run.simulate(folder, engine, bars)
    out = Console(highlight=False)
    out.print(screen.summary_table(outcome.summary))
    for warning in screen.warnings(outcome.summary):
        out.print(f"[bold red]{warning}[/]")
    if outcome.summary["private"]:
        out.print(outcome.summary["privacy_statement"])
    out.print(f"report: {escape(str(outcome.folder.report))}")


def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
) -> None:
    """Write RUN/report.html again from the run's own records."""
    from server.record import RunFolder
    from server.report import write_report

    folder = RunFolder(run_folder)
    folder.load_config()
    if not folder.summary.is_file():
        raise ConfigError(f"{run_folder} has no summary.json yet: finish it with confide simulate --resume")
    write_report(folder)
    print(folder.report)


def _with_study(
    config: RunConfig, noise_seed: int | None, no_privacy: bool, plain_updates: bool
) -> RunConfig:
    """Study switches come from the command line alone, so that no file can turn privacy off unseen."""
    refuse_study(config)
    if noise_seed is not None and not 0 <= noise_seed < 2**63:
        raise ConfigError(f"--study-noise-seed must lie between 0 and 2^63, found {noise_seed}")
    return config.model_copy(
        update={
            "privacy": config.privacy.model_copy(update={"insecure_disabled": no_privacy}),
            "study": config.study.model_copy(
                update={"noise_seed": noise_seed, "plain_updates": plain_updates}
            ),
        }
    )


def _print_plan(config: RunConfig, plan: dict[str, object], as_json: bool) -> None:
    from common.plan import make_plan
    from common.privacy import epsilon_rdp
    from simulations import screen

    if as_json:
        print(json.dumps(plan, indent=2))
        return
    out = Console(highlight=False)
    out.print(screen.plan_table(plan))
    full = make_plan(config)
    if full.private:
        after = [
            (number, r.part.value, epsilon_rdp(full.events[:number], full.delta))
            for number, r in enumerate(full.rounds, start=1)
        ]
        out.print(screen.rounds_table(after))
    else:
        out.print("[bold red]NOT PRIVATE: --insecure-no-privacy[/]")


def _cleaning(split: Split) -> str:
    c = split.cleaning
    sizes = [len(s) for s in split.sites]
    return (
        f"data: {c.read:,} records read, {c.kept:,} kept ({c.empty} empty, {c.duplicate} duplicate, "
        f"{c.over_long} over-long left out); {len(sizes)} sites of {min(sizes):,} to {max(sizes):,}; "
        f"{len(split.public):,} public records for evaluation"
        + (f" ({split.overlap} left out that are training records too)" if split.overlap else "")
    )
