"""What the entries of a ledger say together: which budgets there are, and what has been spent of them.

Stopping rule: a Rényi filter at one order α*, fixed when a data source is opened (Feldman & Zrnic 2021,
2008.11193): a charge t is allowed only if Σ_s ρ_s(α*) + ρ_t(α*) ≤ B. It holds also when each charge is
chosen after seeing everything released before, and by Haney et al. 2023 (2309.05901) when computations
overlap in time. "Stop when ε passes" is sound in neither case.

Overlap. Scopes that are linked by `inherits`, in any number of steps, form one family, and every charge
on one of them counts in all, before and after. A record may lie in several of them, and which ones only
the site knows; counting every charge for every scope over-counts at worst. Scopes of different families
hold different records by the site's signed statement, so what is spent in one costs the other nothing.

The order of a scope that joins a family is fixed after the others have released something. Its new
records have not been in those releases, so for them the filter is as good as any; records of an older
scope keep the older (ε, δ), whose order was fixed before. The later (ε, δ) holds for the older records
too if its terms were not chosen in view of the releases, and with δ times the number of orders if they
were.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property, lru_cache

from common.errors import BudgetError, PrivacyError
from common.ledger import Cancel, Charge, Complete, Genesis, Policy, Record, Reserve, Scope, Start
from common.ledger_errors import (
    LifecycleError,
    OutputChangedError,
    ScopeTermsError,
    UnknownReservationError,
    UnknownScopeError,
    WrongStateError,
)
from common.privacy import ORDERS, SampledGaussianEvent, epsilon_pld, epsilon_rdp, rdp

Steps = Mapping[tuple[float, float], int]
"""(sample_rate, noise_multiplier) → number of steps. All that a Rényi divergence depends on."""

_PLACE = {order: place for place, order in enumerate(ORDERS)}


# The filter


def count_steps(events: Iterable[SampledGaussianEvent]) -> Counter[tuple[float, float]]:
    steps: Counter[tuple[float, float]] = Counter()
    for event in events:
        steps[event.sample_rate, event.noise_multiplier] += event.steps
    return steps


@lru_cache(maxsize=16384)
def _one_step(sample_rate: float, noise_multiplier: float) -> tuple[float, ...]:
    return rdp([SampledGaussianEvent(sample_rate, noise_multiplier, 1, 1.0, 1)])


def rho(steps: Steps, order: float) -> float:
    """Rényi divergence of all `steps` at `order`, which must be one of `ORDERS`.

    Equal to the last bit to what `epsilon_rdp` sums at this order: whole steps are counted first, which
    is exact, and the products are added in sorted order, one by one. So it does not matter in which
    pieces or order the charges came, a plan that `epsilon_rdp` allows is not refused for a rounding
    error, and nothing is accepted that `epsilon_rdp` would not allow. Adding a step never lowers it:
    rounding is monotone.
    """
    total = 0.0
    for setting, count in sorted(steps.items()):
        total += count * _one_step(*setting)[_PLACE[order]]
    return total


def epsilon_at(divergence: float, order: float, delta: float) -> float:
    """ε at `delta` from a Rényi divergence at one order, in the very operations of `epsilon_rdp`.

    Conversion: Canonne, Kamath & Steinke 2020, 2004.00010v4, Proposition 12.
    """
    return divergence + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)


def filter_budget(epsilon: float, delta: float, order: float) -> float:
    """B = ε − ln(1 − 1/α) + ln(δα)/(α − 1): the divergence at `order` that (ε, δ) allows; may be negative.

    Raises:
        PrivacyError: ε or δ is out of its range, or `order` is not one of `ORDERS`.
    """
    if not (0 < epsilon < math.inf and 0 < delta < 1):
        raise PrivacyError(f"target_epsilon must be > 0 and delta in (0, 1), found {epsilon} and {delta}")
    if order not in _PLACE:
        raise PrivacyError(f"the order must be one of the accountant's {len(ORDERS)}, found {order!r:.80}")
    return epsilon - math.log1p(-1 / order) + math.log(delta * order) / (order - 1)


def choose_order(
    epsilon: float,
    delta: float,
    planned: Sequence[SampledGaussianEvent] = (),
    before: Sequence[SampledGaussianEvent] = (),
) -> float:
    """α* for a new scope: the order of `ORDERS` at which (ε, δ) buys most.

    With a plan: the largest B(α) / ρ_planned(α). Without: the largest B(α) / α, which is the best order
    for a Gaussian without sampling. What was spent `before` on overlapping data is taken off B(α).

    Orders at which the plan fits go before all others, by the comparison that the filter itself makes: so
    a plan fits to its last step whenever `epsilon_rdp([*before, *planned], delta) <= epsilon`.

    Raises:
        PrivacyError: no order leaves any budget; ε is too small for this δ.
    """
    spent, plan = count_steps(before), count_steps(planned)

    def worth(order: float) -> tuple[bool, float]:
        left = filter_budget(epsilon, delta, order) - rho(spent, order)
        if not plan:
            return left > 0, left / order
        cost = rho(plan, order)
        fits = epsilon_at(rho(spent + plan, order), order, delta) <= epsilon
        return fits, left / cost if cost > 0 else math.inf

    usable = [order for order in ORDERS if filter_budget(epsilon, delta, order) > 0]
    if not usable:
        raise PrivacyError(
            f"target_epsilon = {epsilon} at delta = {delta:g} leaves no budget at any order: raise either"
        )
    return max(usable, key=worth)


# The history


class State(Enum):
    """How far a reservation has come."""

    RESERVED = "reserved"
    STARTED = "started"
    COMPLETED = "completed"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class Reservation:
    """A charge and its state. output_sha256: hex, once it is completed."""

    id: int
    charge: Charge
    repeatable: bool
    state: State = State.RESERVED
    output_sha256: str | None = None


@dataclass(frozen=True)
class Balance:
    """What has been spent of one scope: every charge on it and on the scopes that overlap it.

    Unit: one record. Neighbours: add-or-remove-one. reservations: all but the cancelled ones.
    """

    scope: Scope
    reservations: tuple[Reservation, ...]

    @cached_property
    def events(self) -> tuple[SampledGaussianEvent, ...]:
        return tuple(event for r in self.reservations for event in r.charge.events)

    @property
    def reserved(self) -> tuple[Reservation, ...]:
        """Those that can still be cancelled."""
        return tuple(r for r in self.reservations if r.state is State.RESERVED)

    @cached_property
    def rho(self) -> float:
        """Spent, as a Rényi divergence at the scope's order; at most `scope.budget`."""
        return rho(count_steps(self.events), self.scope.order)

    @property
    def epsilon_left(self) -> float:
        """By how much ε at the scope's order may still rise. Only this decides what is allowed."""
        return max(0.0, self.scope.budget - self.rho)

    @cached_property
    def epsilon_rdp(self) -> float:
        return epsilon_rdp(self.events, self.scope.delta)

    @cached_property
    def epsilon_pld(self) -> float:
        """Tighter, for a plan that was fixed in advance; can take seconds for many settings."""
        return epsilon_pld(self.events, self.scope.delta)

    def epsilon_pld_on(self, grid: float) -> float:
        """The same on a finer grid than the usual one, which is too coarse for very many small steps."""
        return epsilon_pld(self.events, self.scope.delta, grid)


class _Family:
    """Scopes that may share records, and the one spend that they share."""

    def __init__(self, scopes: Sequence[Scope], steps: Counter[tuple[float, float]]) -> None:
        self.scopes = list(scopes)
        self.steps = steps


class History:
    """The replay of a chain, one entry after the other. Chain and signatures are checked elsewhere."""

    def __init__(self) -> None:
        self.length = 0
        self.genesis: Genesis | None = None
        self.policy: Policy | None = None
        self.scopes: dict[str, Scope] = {}
        self.reservations: dict[int, Reservation] = {}
        self._families: dict[str, _Family] = {}
        self._repeatable: dict[Charge, int] = {}

    def check(self, record: Record) -> None:
        """Whether `record` may come next in the life cycle. The filter is another question: `check_fits`.

        Raises:
            LifecycleError: one of its subclasses says why not.
        """
        if isinstance(record, Genesis) != (self.genesis is None):
            raise LifecycleError(f"{type(record).__name__} as entry {self.length + 1}")
        match record:
            case Scope(name, inherits=inherits):
                if name in self.scopes:
                    raise ScopeTermsError(f"data source {name!r} opened again")
                for other in inherits:
                    self.scope(other)
            case Reserve(number, charge):
                self.scope(charge.scope)
                if number != self.length + 1:
                    raise UnknownReservationError(f"reservation {number} as entry {self.length + 1}")
            case Start(number) | Cancel(number):
                self._expect(number, State.RESERVED, record)
            case Complete(number, output):
                if (known := self.reservation(number).output_sha256) not in (None, output):
                    raise OutputChangedError(f"output {output[:16]}… after {str(known)[:16]}… of {number}")
                self._expect(number, State.STARTED, record)
            case Genesis() | Policy():
                pass

    def apply(self, record: Record) -> None:
        """Take in the next entry. Raises what `check` raises, and then changes nothing."""
        self.check(record)
        match record:
            case Genesis():
                self.genesis = record
            case Policy():
                self.policy = record
            case Scope():
                self._open(record)
            case Reserve(number, charge, repeatable):
                self.reservations[number] = Reservation(number, charge, repeatable)
                self._families[charge.scope].steps.update(count_steps(charge.events))
                if repeatable:
                    self._repeatable.setdefault(charge, number)
            case Start(number):
                self._move(number, State.STARTED)
            case Complete(number, output):
                self._move(number, State.COMPLETED, output)
            case Cancel(number):
                self._move(number, State.CANCELLED)
                charge = self.reservations[number].charge
                family = self._families[charge.scope]
                # `-` drops settings of which no step is left; counts are whole, so this is exact.
                family.steps = family.steps - count_steps(charge.events)
                if self._repeatable.get(charge) == number:
                    del self._repeatable[charge]
        self.length += 1

    def scope(self, name: str) -> Scope:
        """Raises UnknownScopeError if no scope of this name was opened."""
        if name not in self.scopes:
            raise UnknownScopeError(f"no data source {name!r}")
        return self.scopes[name]

    def reservation(self, number: int) -> Reservation:
        """Raises UnknownReservationError if there is none with this id."""
        if number not in self.reservations:
            raise UnknownReservationError(f"no reservation {number}")
        return self.reservations[number]

    def repetition(self, charge: Charge) -> Reservation | None:
        """The repeatable reservation of exactly this charge, unless it was cancelled."""
        number = self._repeatable.get(charge)
        return None if number is None else self.reservations[number]

    def of_round(self, charge: Charge) -> tuple[Reservation, ...]:
        """What was reserved for the round of this charge, on this data source, and not cancelled."""
        asked = (charge.scope, charge.run, charge.round)
        return tuple(
            r
            for r in self.reservations.values()
            if (r.charge.scope, r.charge.run, r.charge.round) == asked and r.state is not State.CANCELLED
        )

    def check_fits(self, charge: Charge) -> None:
        """Whether the filters of all scopes that the charge counts in allow it.

        Raises:
            UnknownScopeError: the scope was never opened.
            BudgetError: a budget would be passed; nothing may be computed.
            PrivacyError: the accountant cannot bound the charge.
        """
        self.scope(charge.scope)
        family = self._families[charge.scope]
        after = family.steps + count_steps(charge.events)
        for scope in family.scopes:
            if (over := _epsilon(scope, after)) > scope.target_epsilon:
                raise BudgetError(
                    f"the charge for round {charge.round} of run {charge.run} would bring ε of data source "
                    f"{scope.name!r} from {_epsilon(scope, family.steps):.4f} to {over:.4f} at order "
                    f"{scope.order}, over its target_epsilon = {scope.target_epsilon} (delta = "
                    f"{scope.delta:g}): nothing was computed. Stop here, or plan fewer rounds or more noise"
                )

    def check_opening(self, scope: Scope) -> None:
        """Whether what overlapping data have spent fits into the budgets of all, `scope` among them.

        Raises:
            UnknownScopeError: an inherited scope was never opened.
            BudgetError: a budget would be passed by what has already been spent.
        """
        family = self._joined(scope)
        for member in family.scopes:
            if (over := _epsilon(member, family.steps)) > member.target_epsilon and family.steps:
                raise BudgetError(
                    f"with data source {scope.name!r} the overlapping data have spent ε = {over:.4f} at "
                    f"order {member.order}, and {member.name!r} has target_epsilon = "
                    f"{member.target_epsilon}: nothing was opened. Name a larger budget, or use data that "
                    "were not used before"
                )

    def over_budget(self, name: str, slack: float) -> Scope | None:
        """A scope that shares its spend with `name` and is over `slack` times its target, if any."""
        family = self._families[self.scope(name).name]
        over = (s for s in family.scopes if _epsilon(s, family.steps) > s.target_epsilon * slack)
        return next(over, None)

    def spent(self, names: Iterable[str]) -> list[SampledGaussianEvent]:
        """All events that count in any of these scopes."""
        families = {id(self._families[self.scope(name).name]) for name in names}
        return [
            event
            for r in self.reservations.values()
            if r.state is not State.CANCELLED and id(self._families[r.charge.scope]) in families
            for event in r.charge.events
        ]

    def overlapping(self, name: str) -> tuple[Scope, ...]:
        """Every scope that shares its spend with this one, itself included."""
        self.scope(name)
        return tuple(self._families[name].scopes)

    def balance(self, name: str) -> Balance:
        """Raises UnknownScopeError if no scope of this name was opened."""
        family = {scope.name for scope in self.overlapping(name)}
        counted = (r for r in self.reservations.values() if r.charge.scope in family)
        return Balance(self.scope(name), tuple(r for r in counted if r.state is not State.CANCELLED))

    def _expect(self, number: int, state: State, record: Record) -> None:
        if (found := self.reservation(number).state) is not state:
            raise WrongStateError(
                f"{type(record).__name__.lower()} of reservation {number}, which is {found.value}"
            )

    def _move(self, number: int, state: State, output: str | None = None) -> None:
        self.reservations[number] = replace(self.reservations[number], state=state, output_sha256=output)

    def _joined(self, scope: Scope) -> _Family:
        joined = {
            id(family): family for family in (self._families[self.scope(n).name] for n in scope.inherits)
        }
        steps: Counter[tuple[float, float]] = Counter()
        for family in joined.values():
            steps.update(family.steps)
        return _Family([*(s for family in joined.values() for s in family.scopes), scope], steps)

    def _open(self, scope: Scope) -> None:
        self.scopes[scope.name] = scope
        family = self._joined(scope)
        for member in family.scopes:
            self._families[member.name] = family


def _epsilon(scope: Scope, steps: Steps) -> float:
    """ε at the scope's own order. Equivalent to ρ ≤ B, with the conversion on the other side."""
    return epsilon_at(rho(steps, scope.order), scope.order, scope.delta)
