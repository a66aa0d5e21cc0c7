"""`confide plan`: batch, noise and steps before anything is spent, or the price of a given mechanism."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from common.errors import ConfigError

if TYPE_CHECKING:  # the accountants take a second to load
    from simulations.planning import NoiseCurve, Question, Row

CRITERION = (
    "Proposed is the smallest batch from which a larger one does not pay: twice the computing lowers the "
    "noise by √2 when it is averaged at the noise there is, as over twice the sites, and a batch of twice "
    "the size gains less. This knows nothing of your model: where computing is cheap, take a larger batch."
)
_UNSET = typer.Option(show_default=False)


def plan(
    records: Annotated[
        int | None, typer.Option(help="Records of a site, at least. Public.", show_default=False)
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="ε of one record over the whole run.", show_default=False)
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds of the run.", show_default=False)] = None,
    steps_per_round: Annotated[int, typer.Option(help="Steps of a site in a round.")] = 3,
    sites: Annotated[int, typer.Option(help="Sites whose updates are averaged.")] = 8,
    max_batch: Annotated[
        int, typer.Option(help="The most records of which a site can compute a step.")
    ] = 1024,
    delta: Annotated[
        float | None,
        typer.Option(help="None: min(1e-5, 1/(10 x records)).", show_default=False),
    ] = None,
    sample_rate: Annotated[
        float | None, typer.Option(help="Of a given mechanism: its price is computed.", show_default=False)
    ] = None,
    noise_multiplier: Annotated[float | None, _UNSET] = None,
    steps: Annotated[int | None, typer.Option(help="All steps of the run.", show_default=False)] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write a page.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts.")] = False,
) -> None:
    """Plan a run: which batch, and how much noise keeps it within ε. Spends nothing and reads no data.

    With --records, --epsilon and --rounds: a table over batch sizes, each with the least noise that is
    enough, and the lines of confide.toml for the proposed one. With --sample-rate, --noise-multiplier,
    --steps and --delta: what that mechanism costs, by both accountants.
    """
    mechanism = {"sample_rate": sample_rate, "noise_multiplier": noise_multiplier, "steps": steps}
    question = {"records": records, "epsilon": epsilon, "rounds": rounds}
    asked = [key for key, value in {**question, **mechanism}.items() if value is not None]
    if asked and set(asked) <= set(mechanism):
        if html is not None:
            raise ConfigError("--html draws a plan: give --records, --epsilon and --rounds")
        _price(_complete({**mechanism, "delta": delta}, "to price a mechanism"), as_json)
        return
    if set(asked) & set(mechanism):
        raise ConfigError(
            "--records, --epsilon and --rounds plan a run; --sample-rate, --noise-multiplier and --steps "
            f"price a given one: found {', '.join(map(_option, asked))}"
        )
    _propose(_complete(question, "to plan a run"), steps_per_round, sites, max_batch, delta, html, as_json)


def _option(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _complete(values: dict[str, Any], why: str) -> dict[str, Any]:
    missing = [_option(key) for key, value in values.items() if value is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)} must be given {why}: see confide plan --help")
    return values


def _price(mechanism: dict[str, Any], as_json: bool) -> None:
    from common.privacy import SampledGaussianEvent, epsilon_pld, epsilon_rdp, epsilon_text

    rate, sigma, steps = mechanism["sample_rate"], mechanism["noise_multiplier"], mechanism["steps"]
    event = SampledGaussianEvent(rate, sigma, steps, 1.0, 1)
    delta = mechanism["delta"]
    found = {"epsilon_rdp": epsilon_rdp([event], delta), "epsilon_pld": epsilon_pld([event], delta)}
    if as_json:
        print(json.dumps({**found, **mechanism}, indent=2))
        return
    print(
        f"ε = {epsilon_text(found['epsilon_rdp'])} by Rényi divergences (enforced), "
        f"{epsilon_text(found['epsilon_pld'])} by privacy loss distributions (reported), at δ = {delta:g}"
    )


def _propose(
    asked: dict[str, Any],
    steps_per_round: int,
    sites: int,
    max_batch: int,
    delta: float | None,
    html: Path | None,
    as_json: bool,
) -> None:
    from common.files import write_atomically
    from common.privacy import default_delta
    from simulations.planning import Question, curve, propose, rates, solve

    question = Question(
        **asked,
        delta=default_delta(max(1, asked["records"])) if delta is None else delta,
        steps_per_round=steps_per_round,
        sites=sites,
        max_batch=max_batch,
    )
    screen = Console(stderr=True)

    def slowly(items: Any, what: str) -> Any:
        return track(items, description=what, console=screen, transient=True, disable=not screen.is_terminal)

    rows: list[Row] = [solve(question, rate) for rate in slowly(rates(question), "calibrating noise")]
    chosen = propose(rows)
    near = rows[max(0, chosen - 1) : chosen + 2]
    curves = [] if as_json and html is None else [curve(row) for row in slowly(near, "drawing curves")]
    if html is not None:
        from simulations.plan_report import plan_page

        write_atomically(html, plan_page(question, rows, chosen, curves, toml_of(rows[chosen])).encode())
    if as_json:
        print(json.dumps(_to_json(question, rows, chosen, html), indent=2))
        return
    _show(question, rows, chosen, curves)
    if html is not None:
        print(f"page: {html}")


def toml_of(row: Row) -> str:
    """The lines of confide.toml that ask for this row. A warm-up takes its part of the same ε."""
    question = row.question
    return (
        f"[run]\nrounds = {question.rounds}\n\n"
        f"[privacy]\ntarget_epsilon = {question.epsilon!r}\ndelta = {question.delta!r}\n"
        f"nominal_records = {question.records}\nsample_rate = {row.sample_rate!r}\n"
        f"noise_multiplier = {row.noise_multiplier!r}\n\n"
        f"[training]\nlocal_steps = {question.steps_per_round}\n"
    )


def planned_of(row: Row) -> str:
    """What opens a budget that serves this run best."""
    question = row.question
    return (
        f"confide client scope FOLDER NAME --epsilon {question.epsilon:g} --delta {question.delta!r} "
        f"--planned {row.sample_rate!r},{row.noise_multiplier!r},{question.steps}"
    )


def refused_by_default(row: Row) -> list[str]:
    """Keys of a site's policy whose strict default the row does not meet."""
    from client.policy import STRICT

    bounds = STRICT.training
    found = {
        "training.sample_rate": row.sample_rate > bounds.sample_rate,
        "training.noise_multiplier": row.noise_multiplier < bounds.noise_multiplier,
        "training.steps": row.question.steps_per_round > bounds.steps,
        "run.rounds": row.question.rounds > STRICT.run.rounds,
    }
    return [key for key, broken in found.items() if broken]


def _row_json(row: Row) -> dict[str, Any]:
    return {
        "sample_rate": row.sample_rate,
        "batch_size": row.batch_size,
        "noise_multiplier": row.noise_multiplier,
        "noise_per_step": row.step_noise,
        "noise_of_average": row.total_noise,
        "gradients": row.gradients,
        "epsilon_rdp": row.epsilon_rdp,
    }


def _to_json(question: Question, rows: list[Row], chosen: int, html: Path | None) -> dict[str, Any]:
    best = rows[chosen]
    return {
        **vars(question),
        "steps": question.steps,
        "rows": [_row_json(row) for row in rows],
        "proposal": {**_row_json(best), "epsilon_pld": best.epsilon_pld},
        "policy_defaults_refuse": refused_by_default(best),
        "toml": toml_of(best),
        "scope": planned_of(best),
        "html": None if html is None else str(html),
    }


def _show(question: Question, rows: list[Row], chosen: int, curves: list[NoiseCurve]) -> None:
    from common.privacy import epsilon_text

    out = Console(highlight=False)
    out.print(
        f"{question.rounds:,} rounds of {question.steps_per_round} steps at {question.sites} sites of at "
        f"least {question.records:,} records, within ε = {question.epsilon:g} at δ = {question.delta:g}"
    )
    heads = ("", "batch", "rate", "noise_multiplier", "noise a step", "of average", "gradients")
    table = Table(*heads, box=box.SIMPLE)
    for place, row in enumerate(rows):
        table.add_row(
            "→" if place == chosen else "",
            f"{row.batch_size:,}",
            f"{row.sample_rate:g}",
            f"{row.noise_multiplier:.4f}",
            f"{row.step_noise:.2e}",
            f"{row.total_noise:.2e}",
            f"{row.gradients:,}",
            style="bold" if place == chosen else None,
        )
    out.print(table)
    out.print(
        "Noise: standard deviation of each coordinate of a mean gradient, over max_grad_norm; of average, "
        f"over all steps and {question.sites} sites. Gradients: of one site."
    )
    out.print(f"→ {CRITERION}")
    out.print(_noise_table(question, curves))
    best = rows[chosen]
    out.print(
        f"ε = {epsilon_text(best.epsilon_rdp)} by Rényi divergences (enforced), "
        f"{epsilon_text(best.epsilon_pld)} by privacy loss distributions (reported)"
    )
    if keys := refused_by_default(best):
        out.print(f"A site's strict default policy refuses this: it must agree in {', '.join(keys)}")
    print(f"\n{toml_of(best)}\n# open the sites' budgets for it:\n# {planned_of(best)}")


def _noise_table(question: Question, curves: list[NoiseCurve]) -> Table:
    """About the noise that fewer and more rounds need."""
    several = sorted({max(1, question.rounds // 2), question.rounds, 2 * question.rounds})
    table = Table(
        "noise_multiplier, about",
        *(f"{count:,} rounds" for count in several),
        box=box.SIMPLE,
    )
    for one in curves:
        about = (one.at(count) for count in several)
        cells = ("–" if sigma is None else f"{sigma:.2f}" for sigma in about)
        table.add_row(f"batch {one.row.batch_size:,}", *cells)
    return table
