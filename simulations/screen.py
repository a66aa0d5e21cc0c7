"""What a person sees in the terminal: a bar per round, the plan before, the table after."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from common.privacy import epsilon_text
from common.secagg.errors import Exchange
from server.record import RoundEvent


class RoundBars:
    """A Watcher that draws one bar a round and keeps each finished round's line on the screen."""

    def __init__(self, console: Console, rounds: int) -> None:
        self._rounds = rounds
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("sites"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._task = self._progress.add_task("before the first round", total=None, note="evaluating")

    def __enter__(self) -> RoundBars:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def site_done(self, round_number: int, asked: int) -> None:
        self._progress.update(self._task, total=asked, advance=1)

    def stage(self, round_number: int, exchange: Exchange) -> None:
        self._progress.update(self._task, note=f"secure sum, {exchange + 1} of 5: {exchange.name.lower()}")

    def round_done(self, event: RoundEvent) -> None:
        note = "" if event.accuracy is None else f"accuracy {event.accuracy:.3f}  loss {event.loss:.3f}"
        if not event.counted:
            note = "[red]no sum: not counted[/]"
        elif event.answered < event.asked:
            note += f"  {event.answered} of {event.asked} sites in the sum"
        done = max(event.answered, 1)
        self._progress.update(self._task, total=done, completed=done, note=note)
        self._progress.stop_task(self._task)
        if event.round < self._rounds:
            self._task = self._progress.add_task(
                f"round {event.round + 1}/{self._rounds}", total=None, note="training"
            )


class Silent:
    """A Watcher for scripts."""

    def site_done(self, round_number: int, asked: int) -> None:
        pass

    def stage(self, round_number: int, exchange: Exchange) -> None:
        pass

    def round_done(self, event: RoundEvent) -> None:
        pass


def plan_table(plan: dict[str, Any]) -> Table:
    table = Table(title="Plan", show_header=False, title_justify="left")
    rows = [
        ("rounds", str(plan["rounds"])),
        ("steps of a site, in all", str(plan["steps"])),
        ("sample rate", str(plan["sample_rate"])),
        ("public batch size", str(plan["batch_size"])),
        ("noise multiplier", str(plan["noise_multiplier"])),
    ]
    if plan["warmup_noise_multiplier"] is not None:
        rows += [
            ("warm-up: sample rate", str(plan["warmup_sample_rate"])),
            ("warm-up: noise multiplier", str(plan["warmup_noise_multiplier"])),
        ]
    rows += [
        ("delta", f"{plan['delta']:g}"),
        ("ε of a site (Rényi, enforced)", epsilon_text(plan["epsilon_rdp"])),
        ("ε of a site (loss distributions)", epsilon_text(plan["epsilon_pld"])),
        ("trainable parameters", f"{plan['trainable_parameters']:,}"),
        ("bytes up per site and round", f"{plan['bytes_up_per_site_round']:,}"),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def rounds_table(epsilons: list[tuple[int, str, float]]) -> Table:
    table = Table(title="ε of a site after each round", title_justify="left")
    for name in ("round", "trains", "ε (Rényi)"):
        table.add_column(name, justify="right" if name != "trains" else "left")
    for number, part, epsilon in epsilons:
        table.add_row(str(number), part, epsilon_text(epsilon))
    return table


def summary_table(summary: dict[str, Any]) -> Table:
    """The final table of a run."""
    table = Table(title=f"Run {summary['name']}", show_header=False, title_justify="left")

    def percent(value: float | None) -> str:
        return "none" if value is None else f"{value:.3f}"

    table.add_row(
        f"{summary['metric']} before → after",
        f"{percent(summary['accuracy_initial'])} → {percent(summary['accuracy_final'])}",
    )
    if summary["loss_final"] is not None:
        table.add_row("loss before → after", f"{summary['loss_initial']:.3f} → {summary['loss_final']:.3f}")
    initial = summary["scores_initial"]
    for name, value in list(summary["scores_final"].items())[1:]:
        before = f"{initial[name]:.3f} → " if name in initial else ""
        table.add_row(name, f"{before}{value:.3f}")
    if summary["majority_class"] is not None:
        table.add_row("always saying the commonest label", percent(summary["majority_class"]))
    if summary["worst_site"] is not None:
        accuracy, site = percent(summary["accuracy_worst_site"]), summary["worst_site"]
        table.add_row(
            "worst site",
            f"{accuracy} (site {site}, on {summary['records_by_group'][site]} records that it held out)",
        )
    table.add_row(
        "ε of a site, worst",
        f"{epsilon_text(summary['epsilon_rdp_max'])} (Rényi, enforced; target "
        f"{summary['target_epsilon']:g}), {epsilon_text(summary['epsilon_pld_max'])} (loss distributions), "
        f"δ = {summary['delta']:g}",
    )
    by_site = summary["epsilon_by_site"]
    if len(set(by_site.values())) > 1:
        listed = ", ".join(f"{site}: {epsilon_text(e)}" for site, e in list(by_site.items())[:20])
        table.add_row("ε by site", listed)
    elif by_site:
        table.add_row("ε by site", f"{epsilon_text(summary['epsilon_rdp_max'])} each of {len(by_site)}")
    table.add_row("bytes up per site and round", f"{summary['bytes_up_per_site_round']:,}")
    table.add_row("seconds", f"{summary['wall_seconds']:.0f}")
    table.add_row("adapter", escape(summary["adapter_dir"]))
    return table


def warnings(summary: dict[str, Any]) -> list[str]:
    """What must not be overlooked, in the words of the report."""
    found = []
    if not summary["private"]:
        found.append(summary["privacy_statement"])
    if not summary["secure_aggregation"]:
        found.append(
            "Updates travelled in the clear (--insecure-plain-updates): the server saw each site's update."
        )
    return found
