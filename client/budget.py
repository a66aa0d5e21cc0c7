"""What a site has spent and what is left, by its own ledger. Reads entries; knows no folder.

ε stands at the order that was fixed when a data source was opened, since only that decides what is allowed
(`common.ledger_replay`). It is 0 before the first charge, which then also pays what it costs to turn a Rényi
bound into (ε, δ). So spent + reserved + left is the target, at every moment.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from common.errors import BudgetError, ConfigError
from common.ledger import MAX_NUMBER, Cancel, Charge, Entry, Reserve, Scope
from common.ledger_replay import Balance, History, Reservation, State, count_steps, epsilon_at, rho
from common.privacy import SampledGaussianEvent, epsilon_rdp

MOST_ROUNDS = 1_000_000
"""Beyond so many the answer is "more than that"."""


@dataclass(frozen=True)
class RunSpend:
    """One run's charges on a data source and on those that overlap it.

    epsilon: what the run alone has cost, at the best order; so ε of several runs do not add up.
    divergence: its part of what is spent, at the scope's order; those do.
    """

    run: str
    rounds: int
    charges: int
    steps: int
    epsilon: float
    divergence: float


@dataclass(frozen=True)
class SourceBudget:
    """One data source. spent, reserved, left: parts of `scope.target_epsilon`. reserved: not started yet.

    overlaps: other scopes whose charges count here. rounds_left: how many more charges like `last` the
    filter would take; None for more than `MOST_ROUNDS`, or where nothing was ever charged.
    """

    scope: Scope
    overlaps: tuple[str, ...]
    spent: float
    reserved: float
    epsilon_rdp: float
    last: Reservation | None
    rounds_left: int | None
    runs: tuple[RunSpend, ...]

    @property
    def left(self) -> float:
        return max(0.0, self.scope.target_epsilon - self.spent - self.reserved)

    @property
    def unlimited(self) -> bool:
        """Whether charges like the last one cost next to nothing."""
        return self.last is not None and self.rounds_left is None


def budgets(history: History, only: str | None = None) -> tuple[SourceBudget, ...]:
    """Every data source, or `only` the one of this name.

    Raises:
        ConfigError: none has this name.
    """
    if only is not None and only not in history.scopes:
        raise ConfigError(f"--scope must be one of {sorted(history.scopes)}, found {only!r}")
    return tuple(_budget(history, name) for name in history.scopes if only in (None, name))


def _budget(history: History, name: str) -> SourceBudget:
    balance = history.balance(name)
    last = max(balance.reservations, key=lambda r: r.id, default=None)
    done = [e for r in balance.reservations if r.state is not State.RESERVED for e in r.charge.events]
    spent = _epsilon(balance.scope, done)
    return SourceBudget(
        scope=balance.scope,
        overlaps=tuple(other.name for other in history.overlapping(name) if other.name != name),
        spent=spent,
        reserved=_epsilon(balance.scope, balance.events) - spent,
        epsilon_rdp=balance.epsilon_rdp,
        last=last,
        rounds_left=None if last is None else more_like(history, last.charge),
        runs=_runs(balance),
    )


def _epsilon(scope: Scope, events: Sequence[SampledGaussianEvent]) -> float:
    """ε of `events` at the order of `scope`; nothing costs nothing."""
    if not events:
        return 0.0
    return epsilon_at(rho(count_steps(events), scope.order), scope.order, scope.delta)


def _runs(balance: Balance) -> tuple[RunSpend, ...]:
    by_run: dict[str, list[Charge]] = {}
    for reservation in balance.reservations:
        by_run.setdefault(reservation.charge.run, []).append(reservation.charge)
    return tuple(_run(balance.scope, run, charges) for run, charges in by_run.items())


def _run(scope: Scope, run: str, charges: Sequence[Charge]) -> RunSpend:
    events = [event for charge in charges for event in charge.events]
    return RunSpend(
        run=run,
        rounds=len({charge.round for charge in charges}),
        charges=len(charges),
        steps=sum(event.steps for event in events),
        epsilon=epsilon_rdp(events, scope.delta),
        divergence=rho(count_steps(events), scope.order),
    )


def more_like(history: History, charge: Charge) -> int | None:
    """How many more charges that cost the same as `charge` the filter takes, one after the other.

    It is the filter itself that is asked, and its rounding too: `n` charges sum to the very number that one
    charge of n times the steps does. None: more than `MOST_ROUNDS`.
    """
    most = min(MOST_ROUNDS, MAX_NUMBER // max(event.steps for event in charge.events))

    def fits(count: int) -> bool:
        many = tuple(replace(event, steps=event.steps * count) for event in charge.events)
        try:
            history.check_fits(replace(charge, events=many))
        except BudgetError:
            return False
        return True

    if fits(most):
        return None
    fit, over = 0, most
    while over - fit > 1:
        middle = (fit + over) // 2
        fit, over = (middle, over) if fits(middle) else (fit, middle)
    return fit


def spend_by_entry(
    entries: Sequence[Entry], history: History, name: str
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The numbers of the entries that changed what counts on a data source, and ε after each of them.

    A scope that was opened later, with `inherits`, counts from the start what it inherits.
    """
    scope, family = history.scope(name), {s.name for s in history.overlapping(name)}
    charges: dict[int, Charge] = {}
    steps: Counter[tuple[float, float]] = Counter()
    numbers, epsilons = [1], [0.0]
    for entry in entries:
        match entry.record:
            case Reserve(number, charge) if charge.scope in family:
                charges[number] = charge
                steps.update(count_steps(charge.events))
            case Cancel(number) if number in charges:
                steps = steps - count_steps(charges[number].events)
            case _:
                continue
        numbers.append(entry.seq)
        epsilons.append(epsilon_at(rho(steps, scope.order), scope.order, scope.delta) if steps else 0.0)
    return tuple(numbers), tuple(epsilons)
