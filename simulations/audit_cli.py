"""`confide audit`: look for what a guarantee on paper cannot show."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from common.errors import ConfigError
from simulations import audit_ledger, audit_remote

if TYPE_CHECKING:  # heavy: torch and transformers are loaded only to run something
    from simulations.attack import Attacked
    from simulations.canaries import MechanismAudit
    from simulations.canary_bench import Claim

FAILED = 5  # exit code, as of every privacy precondition that does not hold

app = typer.Typer(no_args_is_help=True, help="Test what a federation claims of its privacy.")

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts.")]
# --set of `mechanism` without --config; the same names as in a claim.
_KEYS = {
    "sample_rate": float,
    "noise_multiplier": float,
    "steps": int,
    "local_steps": int,
    "epsilon": float,
    "delta": float,
    "canaries": int,
}


app.command()(audit_ledger.ledger)
app.command()(audit_remote.remote)


@app.callback()
def _audit() -> None:
    """Runs before every command."""


@app.command()
def mechanism(
    config: Annotated[
        Path | None,
        typer.Option(
            help="Audit the noise, sample rate and steps of this confide.toml. None: ε = 1 twice.",
            show_default=False,
        ),
    ] = None,
    overrides: Annotated[
        list[str],
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help=f"{', '.join(_KEYS)}; with --config also SECTION.KEY=VALUE. May be repeated.",
        ),
    ] = [],  # noqa: B006
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Repeats an audit exactly. None: a new one each time.", show_default=False),
    ] = None,
    as_json: AsJson = False,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Also write a page.", show_default=False)
    ] = None,
) -> None:
    """Plant canaries in the training that sites run, and test that the noise which hides them is there.

    Seconds, no data. Catches noise that is too small, missing or used twice, clipping that is off, batches
    that are not Poisson samples, steps that are skipped, and normalisers that follow the data. An honest
    mechanism fails less than one audit in a hundred. Exit code 5 when a check fails.
    """
    import numpy as np
    import torch

    from common.files import write_atomically
    from simulations.audit_report import mechanism_page
    from simulations.canaries import CANARIES, audit_mechanism

    torch.set_num_threads(1)  # the layers are tiny
    keys = [text for text in overrides if "." not in text.partition("=")[0]]
    settings = _settings(keys)
    canaries = int(settings.pop("canaries", CANARIES))
    if config is not None:
        claims = _claims_of(config, [text for text in overrides if text not in keys])
        if settings:
            raise ConfigError(f"--config says what {sorted(settings)} are: leave --set {min(settings)} out")
    elif len(keys) < len(overrides):
        raise ConfigError("--set SECTION.KEY=VALUE changes a configuration: give it with --config")
    else:
        claims = _claims(settings)
    used = secrets.randbits(63) if seed is None else seed
    audit = audit_mechanism(claims, np.random.default_rng(used), canaries=canaries)
    if report is not None:
        write_atomically(report, mechanism_page(audit, used).encode())
    if as_json:
        found = {**audit.to_json(), "seed": used, "report": None if report is None else str(report)}
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        _show_mechanism(audit, used, report)
    if not audit.passed:
        raise typer.Exit(FAILED)


@app.command()
def attack(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished simulation.")],
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN2",
            help="The same run without privacy (--insecure-no-privacy), to compare with.",
            show_default=False,
        ),
    ] = None,
    site: Annotated[
        int | None, typer.Option(min=1, help="Only this site's records. None: all.", show_default=False)
    ] = None,
    records: Annotated[int, typer.Option(min=2, help="At most so many members, and so many others.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Which records are drawn where there are more.")] = 0,
    as_json: AsJson = False,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="The page. None: RUN/audit-attack.html.", show_default=False),
    ] = None,
) -> None:
    """Guess who was in the training data, from the final adapter's losses: membership inference.

    A report, not a gate: the exit code is 0 however well the attack does.
    """
    from common.files import write_atomically
    from simulations.attack import attack_run, check_twins
    from simulations.attack_report import attack_page

    first = attack_run(run, site=site, records=records, seed=seed)
    second = None
    if against is not None:
        second = attack_run(against, site=site, records=records, seed=seed)
        check_twins(first, second)
    page = report or run / "audit-attack.html"
    write_atomically(page, attack_page(first, second).encode())
    if as_json:
        found = {**first.to_json(), "against": second and second.to_json(), "report": str(page)}
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        _show_attack([first, *([second] if second else [])], page)


def _settings(overrides: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text in overrides:
        key, separator, value = text.partition("=")
        kind = _KEYS.get(key.strip())
        if kind is None or not separator:
            raise ConfigError(f"--set expects KEY=VALUE with a key of {', '.join(_KEYS)}, found {text!r}")
        try:
            found[key.strip()] = kind(value)
        except ValueError:
            raise ConfigError(f"--set {key.strip()} must be {kind.__name__}, found {value!r}") from None
    return found


def _claims(settings: dict[str, Any]) -> tuple[Claim, ...]:
    """Of --set: the two built-in settings, or one of which everything is said."""
    from common.privacy import SampledGaussianEvent, epsilon_rdp
    from simulations.canary_bench import CLIP, Claim, calibrated, default_claims

    epsilon, delta = settings.get("epsilon", 1.0), settings.get("delta", 1e-5)
    own = {"sample_rate", "noise_multiplier", "steps", "local_steps"} & set(settings)
    if not own:
        return default_claims(epsilon, delta)
    if not {"sample_rate", "steps"} <= own:
        raise ConfigError(f"a setting of your own needs sample_rate and steps, found {sorted(own)}")
    rate, steps = settings["sample_rate"], settings["steps"]
    local = settings.get("local_steps", max(1, steps // 5))
    if "noise_multiplier" not in settings:
        return (calibrated(epsilon, delta, rate, steps, local),)
    sigma = settings["noise_multiplier"]
    cost = epsilon_rdp([SampledGaussianEvent(rate, sigma, steps, CLIP, 1)], delta)
    claimed = settings.get("epsilon", cost)
    return (Claim(f"q = {rate:g}, {steps} steps", rate, sigma, steps, local, claimed, delta),)


def _claims_of(path: Path, overrides: list[str]) -> tuple[Claim, ...]:
    """Of a configuration; its data is read only where the plan depends on it."""
    from common.config import load_config
    from common.plan import make_plan, resolve
    from simulations.canary_bench import claims_of

    config = load_config(path, overrides)
    open_values = (config.privacy.nominal_records, config.privacy.delta, config.privacy.noise_multiplier)
    if None in open_values or (config.warmup.rounds and config.warmup.noise_multiplier is None):
        from simulations.fleet import split_data

        split = split_data(config)
        smallest = min(len(site) for site in split.sites)
        config = resolve(config, smallest_site=smallest, labels=split.labels, threads=1)
    return claims_of(make_plan(config))


def _show_mechanism(audit: MechanismAudit, seed: int, report: Path | None) -> None:
    from simulations.audit_report import p_text

    out = Console(highlight=False)
    claims = Table("claim", "noise", "claimed ε", "found at least", box=box.SIMPLE)
    for found in audit.claims:
        claim = found.claim
        color = "red" if found.lower_bound > claim.epsilon else "green"
        claims.add_row(
            escape(claim.name),
            f"{claim.noise_multiplier:g}",
            f"{claim.epsilon:.3g} (δ = {claim.delta:g})",
            f"[{color}]{found.lower_bound:.2f}[/]",
        )
    out.print(claims)
    for of in dict.fromkeys(check.of for check in audit.checks):
        title = f"Checks of {of}" if of else "Checks of the mechanism as such"
        checks = Table(
            "check", "expected", "found", "p", "", title=escape(title), title_justify="left", box=box.SIMPLE
        )
        for check in audit.checks:
            if check.of == of:
                checks.add_row(
                    escape(check.name),
                    f"{'≤ ' if check.at_most else ''}{check.expected:.4g}",
                    f"{check.found:.4g}",
                    p_text(check.p_value),
                    "[green]ok[/]" if check.passed else "[bold red]FAILED[/]",
                )
        out.print(checks)
    for check in audit.checks:
        if not check.passed:
            out.print(f"[bold red]{escape(check.name)}[/]: as with {escape(check.catches)}")
    bad = sum(not check.passed for check in audit.checks)
    verdict = "[green]passed[/]" if audit.passed else f"[bold red]{bad} check{'s' * (bad > 1)} FAILED[/]"
    out.print(f"{verdict} in {audit.seconds:.1f} s; --seed {seed} repeats it")
    if report is not None:
        out.print(f"report: {escape(str(report))}")


def _show_attack(runs: list[Attacked], page: Path) -> None:
    from simulations.attack import FALSE_POSITIVE_RATES, learnt_less

    def share(value: float | None) -> str:
        return "–" if value is None else f"{value:.1%}"

    heads = [f"found at {rate:.1%}" for rate in FALSE_POSITIVE_RATES]
    table = Table("run", "attack", "AUC", "95%", *heads, box=box.SIMPLE)
    for run in runs:
        for attack in (*run.attacks, run.control):
            found = [share(attack.tpr[rate]) for rate in FALSE_POSITIVE_RATES]
            between = f"{attack.low:.3f}–{attack.high:.3f}"
            table.add_row(escape(run.path.name), attack.name, f"{attack.auc:.3f}", between, *found)
        if run.epsilon is not None:
            most = [share(run.max_tpr(rate)) for rate in FALSE_POSITIVE_RATES]
            table.add_row(escape(run.path.name), f"most at ε = {run.epsilon:.3g}", "", "", *most)
    out = Console(highlight=False)
    out.print(table)
    if len(runs) > 1 and learnt_less(runs[1], runs[0]):
        out.print(
            f"[yellow]{escape(runs[1].path.name)} has learnt less, so there is less to find in it: no fair "
            "comparison.[/] Without clipping, learning rates must be far lower."
        )
    out.print("An AUC of 0.5 is guessing. It shows that this attack fails, not that every attack does.")
    out.print(f"report: {escape(str(page))}")
