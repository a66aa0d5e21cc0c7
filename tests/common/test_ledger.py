"""A ledger as an auditor sees it: entries, what they add up to, and every way to falsify an export."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from common import ledger_checks
from common.errors import BudgetError, PrivacyError
from common.ledger import (
    Cancel,
    Charge,
    Complete,
    Entry,
    Genesis,
    Policy,
    Record,
    Reserve,
    Scope,
    Start,
    canonical,
    check_link,
    check_signature,
)
from common.ledger_checks import Claim, LedgerReport, export_ledger, verify_export
from common.ledger_errors import (
    AccountantsDisagreeError,
    ChainError,
    ClaimError,
    EntrySignatureError,
    FilterError,
    ForkError,
    HeadError,
    HeadSignatureError,
    HeadWentBackError,
    LedgerError,
    LedgerFormatError,
    LifecycleError,
    OutputChangedError,
    ReceiptError,
    ScopeTermsError,
    UnknownReservationError,
    UnknownScopeError,
    WrongStateError,
)
from common.ledger_head import HEAD_BYTES, SignedHead, check_newer
from common.ledger_replay import (
    History,
    State,
    choose_order,
    count_steps,
    epsilon_at,
    filter_budget,
    rho,
)
from common.privacy import (
    ORDERS,
    SampledGaussianEvent,
    calibrate_noise_multiplier,
    epsilon_pld,
    epsilon_rdp,
    rdp,
)
from common.secagg.keys import IdentityKey, Secret

DELTA = 1e-5
SITE = 3
IDENTITY = IdentityKey(Secret(bytes(range(32))))
STRANGER = IdentityKey(Secret(bytes(32)))

# Few settings, so that each is bounded once: the accountants take 50 ms for a new one.
POOL = [(0.01, 0.8), (0.02, 1.0), (0.05, 1.3), (0.1, 2.0), (0.3, 5.0), (0.008, 1.0)]


def event(sample_rate: float = 0.02, noise: float = 1.0, steps: int = 10) -> SampledGaussianEvent:
    return SampledGaussianEvent(sample_rate, noise, steps, 0.5, 16)


EVENTS = st.builds(lambda s, n: event(*s, n), st.sampled_from(POOL), st.integers(1, 400))


def charge(number: int = 1, *events: SampledGaussianEvent, scope: str = "notes", run: str = "run") -> Charge:
    return Charge(scope, run, number, f"{number:08x}", "model", "plan", events or (event(),))


def scope(
    name: str = "notes", epsilon: float = 8.0, order: float | None = None, inherits: tuple[str, ...] = ()
) -> Scope:
    order = choose_order(epsilon, DELTA) if order is None else order
    return Scope(name, epsilon, DELTA, order, filter_budget(epsilon, DELTA, order), inherits)


def chain(*records: Record, identity: IdentityKey = IDENTITY, genesis: bool = True) -> list[Entry]:
    """Signed entries of anything, sensible or not."""
    first = (Genesis(SITE, identity.public.hex()),) if genesis else ()
    entries: list[Entry] = []
    for record in (*first, *records):
        entries.append(Entry.make(entries[-1] if entries else None, record, identity))
    return entries


def export(entries: Sequence[Entry], identity: IdentityKey = IDENTITY) -> bytes:
    return export_ledger(entries, SignedHead.sign(SITE, entries[-1], identity))


def check(data: bytes, **more: Any) -> LedgerReport:
    return verify_export(data, **{"public": IDENTITY.public, "pld": False, **more})


@functools.cache
def long_ledger() -> tuple[Entry, ...]:
    """200 entries of every kind, two data sources and some cancelled charges."""
    records: list[Record] = [scope(), scope("images", 4.0), Policy.of("Clip to 1.")]
    number = len(records) + 2  # the genesis is entry 1
    while len(records) < 199:
        records.append(Reserve(number, charge(number, scope="images" if number % 3 else "notes")))
        records += [Cancel(number)] if number % 5 == 0 else [Start(number), Complete(number, "ab" * 32)]
        number = len(records) + 2
    return tuple(chain(*records[:199]))


# Entries

RECORDS: list[Record] = [
    Genesis(SITE, IDENTITY.public.hex()),
    Scope("notes", 8.0, 1e-5, 4.5, 3.3916435516540617, ("a", "b"), "wörds \n\0"),
    Reserve(2, charge(7, event(), event(0.1, 2.0, 3)), True),
    Start(2),
    Complete(2, "0f" * 32),
    Cancel(2),
    Policy.of('rules: "1"'),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: type(r).__name__)
def test_an_entry_survives_being_written(record: Record) -> None:
    entry = Entry.make(None, record, IDENTITY)
    assert Entry.read(entry.body, entry.hash, entry.signature) == entry
    assert json.loads(entry.line())["body"] == json.loads(entry.body)
    check_link(None, entry)
    check_signature(entry, IDENTITY.public)


@given(
    epsilon=st.floats(1e-3, 1e6),
    delta=st.floats(1e-300, 1, exclude_max=True),
    budget=st.floats(5e-324, 1e299),
    order=st.sampled_from(ORDERS),
    note=st.text(st.characters(codec="utf-8"), max_size=20),
)
def test_numbers_and_text_survive_to_the_last_bit(
    epsilon: float, delta: float, budget: float, order: float, note: str
) -> None:
    record = Scope("notes", epsilon, delta, order, budget, (), note)
    entry = Entry.make(None, record, IDENTITY)
    assert Entry.read(entry.body, entry.hash, entry.signature).record == record


GOOD_SCOPE = json.loads(Entry.make(None, RECORDS[1], IDENTITY).body)
GOOD_RESERVE = json.loads(Entry.make(None, RECORDS[2], IDENTITY).body)
GOOD_COMPLETE = json.loads(Entry.make(None, RECORDS[4], IDENTITY).body)
BAD_BODIES: dict[str, str] = {
    "bad_empty": "",
    "bad_not_json": "{",
    "bad_list": "[]",
    "bad_number": "7",
    "bad_deep": "[" * 100_000,
    "bad_huge_number": '{"seq":' + "9" * 5000 + "}",
    "bad_spaces": json.dumps(GOOD_SCOPE, sort_keys=True),
    "bad_key_order": json.dumps(GOOD_SCOPE, separators=(",", ":")).replace('"budget"', '"zudget"'),
    "bad_twice": canonical(GOOD_COMPLETE).replace('"id":2,', '"id":2,"id":2,'),
    "bad_not_ascii": canonical(GOOD_SCOPE).replace("\\u00f6", "ö"),
    "bad_kind": canonical({**GOOD_SCOPE, "kind": "refund"}),
    "bad_no_kind": canonical({k: v for k, v in GOOD_SCOPE.items() if k != "kind"}),
    "bad_extra_field": canonical({**GOOD_COMPLETE, "time": 1}),
    "bad_missing_field": canonical({k: v for k, v in GOOD_SCOPE.items() if k != "note"}),
    "bad_seq_zero": canonical({**GOOD_COMPLETE, "seq": 0}),
    "bad_seq_true": canonical({**GOOD_COMPLETE, "seq": True}),
    "bad_seq_float": canonical({**GOOD_COMPLETE, "seq": 1.0}),
    "bad_prev_upper_case": canonical({**GOOD_COMPLETE, "prev": "AB" * 32}),
    "bad_prev_short": canonical({**GOOD_COMPLETE, "prev": "ab" * 31}),
    "bad_output": canonical({**GOOD_COMPLETE, "output_sha256": "ab"}),
    "bad_unit": canonical({**GOOD_SCOPE, "unit": "site"}),
    "bad_neighbours": canonical({**GOOD_SCOPE, "neighbours": "replace-one"}),
    "bad_order": canonical({**GOOD_SCOPE, "order": 4.55}),
    "bad_delta": canonical({**GOOD_SCOPE, "delta": 1}),
    "bad_epsilon": canonical({**GOOD_SCOPE, "target_epsilon": -8}),
    "bad_epsilon_text": canonical({**GOOD_SCOPE, "target_epsilon": "8"}),
    "bad_epsilon_huge": canonical({**GOOD_SCOPE, "target_epsilon": 10**400}),
    "bad_infinite": canonical(GOOD_SCOPE).replace('"target_epsilon":8.0', '"target_epsilon":Infinity'),
    "bad_budget": canonical({**GOOD_SCOPE, "budget": 0}),
    "bad_inherits_itself": canonical({**GOOD_SCOPE, "inherits": ["notes"]}),
    "bad_inherits_twice": canonical({**GOOD_SCOPE, "inherits": ["a", "a"]}),
    "bad_inherits_text": canonical({**GOOD_SCOPE, "inherits": "ab"}),
    "bad_scope_empty": canonical({**GOOD_SCOPE, "scope": ""}),
    "bad_scope_list": canonical({**GOOD_SCOPE, "scope": ["notes"]}),
    "bad_scope_half_a_character": canonical({**GOOD_SCOPE, "scope": "\ud800"}),
    "bad_no_events": canonical({**GOOD_RESERVE, "events": []}),
    "bad_event": canonical({**GOOD_RESERVE, "events": [{**event().to_json(), "noise_multiplier": 0}]}),
    "bad_event_text": canonical({**GOOD_RESERVE, "events": ["noise"]}),
    "bad_event_steps": canonical({**GOOD_RESERVE, "events": [{**event().to_json(), "steps": 2**60}]}),
    "bad_event_noise": canonical(
        {**GOOD_RESERVE, "events": [{**event().to_json(), "noise_multiplier": 10**400}]}
    ),
    "bad_context": canonical({**GOOD_RESERVE, "context": "xyz"}),
    "bad_round": canonical({**GOOD_RESERVE, "round": -1}),
    "bad_repeatable": canonical({**GOOD_RESERVE, "repeatable": 1}),
    "bad_policy": canonical(
        {"kind": "policy", "prev": "00" * 32, "seq": 1, "sha256": "00" * 32, "text": "x"}
    ),
    "bad_version": Entry.make(None, RECORDS[0], IDENTITY).body.replace('"version":1', '"version":2'),
    "bad_version_true": Entry.make(None, RECORDS[0], IDENTITY).body.replace('"version":1', '"version":true'),
    "bad_public_key": canonical(
        {**json.loads(Entry.make(None, RECORDS[0], IDENTITY).body), "public_key": "00"}
    ),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_bodies_are_refused(name: str) -> None:
    with pytest.raises(LedgerFormatError):
        Entry.read(BAD_BODIES[name], bytes(32), bytes(64))


@settings(max_examples=40)
@given(st.text(max_size=30) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps))
def test_anything_else_is_refused_too(body: str) -> None:
    with pytest.raises(LedgerFormatError):
        Entry.read(body, bytes(32), bytes(64))


# The filter


def test_known_answers() -> None:
    plan = [event(0.02, 0.7678, 1000)]
    order = choose_order(8, DELTA, plan)
    assert order == pytest.approx(3.2, abs=0.11)
    assert filter_budget(8, DELTA, order) == pytest.approx(
        8 - math.log(1 - 1 / order) + math.log(DELTA * order) / (order - 1), rel=1e-12
    )
    rounds = [event(32 / 4000, 1.0, 125)] * 100
    order = choose_order(6, DELTA, rounds)
    assert epsilon_at(rho(count_steps(rounds), order), order, DELTA) == pytest.approx(5.88, abs=0.02)


@pytest.mark.parametrize(("epsilon", "delta"), [(8, 1e-5), (1, 1e-6), (0.1, 1e-5), (0.05, 1e-8)])
def test_without_a_plan_the_order_is_that_of_a_plain_gaussian(epsilon: float, delta: float) -> None:
    worth = {a: filter_budget(epsilon, delta, a) / a for a in ORDERS}
    chosen = choose_order(epsilon, delta)
    assert worth[chosen] == max(worth.values()) > 0


def test_an_epsilon_that_no_order_can_keep_is_refused() -> None:
    with pytest.raises(PrivacyError, match="no budget at any order"):
        choose_order(0.01, 1e-8)


@pytest.mark.parametrize(("epsilon", "delta"), [(0, 1e-5), (-1, 1e-5), (math.nan, 1e-5), (1, 0), (1, 1)])
def test_terms_out_of_range_are_refused(epsilon: float, delta: float) -> None:
    with pytest.raises(PrivacyError):
        choose_order(epsilon, delta)


def pieces(events: Iterable[SampledGaussianEvent], rng: random.Random) -> list[SampledGaussianEvent]:
    """The same steps, cut into charges of any size, in any order."""
    parts = []
    for whole in events:
        left = whole.steps
        while left:
            steps = rng.randint(1, left)
            parts.append(dataclasses.replace(whole, steps=steps))
            left -= steps
    rng.shuffle(parts)
    return parts


def opened(*scopes: Scope) -> History:
    history = History()
    for entry in chain(*scopes):
        history.apply(entry.record)
    return history


def spend(history: History, *events: SampledGaussianEvent, scope: str = "notes") -> None:
    wanted = charge(1, *events, scope=scope)
    history.check_fits(wanted)
    history.apply(Reserve(history.length + 1, wanted))


@settings(max_examples=60, deadline=None)
@given(
    plan=st.lists(EVENTS, min_size=1, max_size=5),
    before=st.lists(EVENTS, max_size=2),
    room=st.sampled_from([0.0, 0.0, 1e-15, 0.01]),
    seed=st.integers(0, 2**32),
)
def test_a_plan_that_fits_by_its_epsilon_fits_to_the_last_step(
    plan: list[SampledGaussianEvent], before: list[SampledGaussianEvent], room: float, seed: int
) -> None:
    """Also when its ε is the target to the last bit, in pieces of any size and order."""
    target = epsilon_rdp([*before, *plan], DELTA) * (1 + room)
    history = opened(scope("old", 1e6))
    for old in before:
        spend(history, old, scope="old")
    order = choose_order(target, DELTA, plan, before)
    new = scope("notes", target, order, ("old",))
    history.check_opening(new)
    history.apply(new)
    for part in pieces(plan, random.Random(seed)):
        spend(history, part)
    balance = history.balance("notes")
    assert balance.epsilon_rdp <= target
    assert count_steps(balance.events) == count_steps([*before, *plan])
    assert balance.rho == rdp([*before, *plan])[ORDERS.index(order)]  # bit for bit


@settings(max_examples=60, deadline=None)
@given(
    target=st.floats(0.5, 10),
    wanted=st.lists(st.tuples(EVENTS, st.booleans()), max_size=40),
)
def test_charges_chosen_adaptively_never_pass_the_filter(
    target: float, wanted: list[tuple[SampledGaussianEvent, bool]]
) -> None:
    """σ, q and the number of steps change at will; a refused charge is tried again with fewer steps."""
    history = opened(scope(epsilon=target))
    own = history.scope("notes")
    for first, insist in wanted:
        tries = [first, *(dataclasses.replace(first, steps=n) for n in (first.steps // 2, 1) if n and insist)]
        for attempt in tries:
            exact = math.fsum(
                [*(e.steps * rdp_of(e, own.order) for e in [*history.balance("notes").events, attempt])]
            )
            try:
                spend(history, attempt)
            except BudgetError as error:
                assert "nothing was computed" in str(error)
                assert exact > own.budget * (1 - 1e-12)
            else:
                assert exact <= own.budget * (1 + 1e-12)
                break
        balance = history.balance("notes")
        assert balance.epsilon_rdp <= target  # no tolerance
        assert balance.rho <= own.budget * (1 + 1e-15)
        assert balance.epsilon_left == max(0.0, own.budget - balance.rho)


@functools.cache
def rdp_of(one: SampledGaussianEvent, order: float) -> float:
    return rdp([dataclasses.replace(one, steps=1)])[ORDERS.index(order)]


@pytest.mark.parametrize("target", [0.7, 3.0, 9.0])
def test_the_filter_has_no_slack(target: float) -> None:
    """A budget one bit too small is too small."""
    plan = [event(0.05, 1.3, 40), event(0.02, 1.0, 7)]
    order = choose_order(target, DELTA, plan)
    cost = epsilon_at(rho(count_steps(plan), order), order, DELTA)
    for epsilon, fits in ((cost, True), (math.nextafter(cost, 0), False)):
        history = opened(scope(epsilon=epsilon, order=order))
        if fits:
            spend(history, *plan)
        else:
            with pytest.raises(BudgetError):
                spend(history, *plan)


def test_the_filter_refuses_what_epsilon_would_have_let_pass() -> None:
    """At another order than the plan's, ε is still below the target when the filter is full: choosing the
    best order after the fact is what adaptivity forbids."""
    history = opened(scope(epsilon=2.0, order=16.0))
    while True:
        try:
            spend(history, event(0.02, 1.0, 20))
        except BudgetError:
            break
    assert epsilon_rdp([*history.balance("notes").events, event(0.02, 1.0, 20)], DELTA) < 1.9


# Overlap


def test_overlapping_data_are_charged_in_every_scope_before_and_after() -> None:
    history = opened(scope("a"), scope("b"), scope("apart"))
    spend(history, event(steps=10), scope="a")
    spend(history, event(steps=20), scope="b")
    spend(history, event(steps=70), scope="apart")
    history.apply(scope("both", inherits=("a", "b")))
    steps = {name: sum(e.steps for e in history.balance(name).events) for name in history.scopes}
    assert steps == {"a": 30, "b": 30, "both": 30, "apart": 70}
    spend(history, event(steps=5), scope="b")  # a later charge on one
    history.apply(scope("part", inherits=("both",)))
    spend(history, event(steps=3), scope="part")
    steps = {name: sum(e.steps for e in history.balance(name).events) for name in history.scopes}
    assert steps == {"a": 38, "b": 38, "both": 38, "part": 38, "apart": 70}
    assert [s.name for s in history.overlapping("a")] == ["a", "b", "both", "part"]
    assert len(history.spent(["a", "both"])) == 4  # each charge once
    assert len(history.spent(["a", "apart"])) == 5


def test_a_charge_must_fit_into_every_overlapping_budget() -> None:
    order = choose_order(2.0, DELTA, [event(steps=100)])
    history = opened(scope("small", 2.0, order), scope("large", 8.0, order, ("small",)))
    with pytest.raises(BudgetError, match="'small'"):
        spend(history, event(steps=2000), scope="large")
    spend(history, event(steps=100), scope="large")
    assert history.balance("small").epsilon_rdp == history.balance("large").epsilon_rdp > 0


def test_a_scope_that_would_begin_overdrawn_is_not_opened() -> None:
    history = opened(scope("old"))
    spend(history, event(steps=1000), scope="old")
    with pytest.raises(BudgetError, match="nothing was opened"):
        history.check_opening(scope("new", 1.0, inherits=("old",)))
    with pytest.raises(UnknownScopeError):
        history.check_opening(scope("new", inherits=("never",)))
    history.check_opening(scope("new", 1.0))


# The life of a charge

STEPS: dict[str, Callable[[int], Record]] = {
    "start": Start,
    "complete": lambda n: Complete(n, "ab" * 32),
    "cancel": Cancel,
}
ALLOWED = {
    ("start",): State.STARTED,
    ("start", "complete"): State.COMPLETED,
    ("cancel",): State.CANCELLED,
    (): State.RESERVED,
}


@pytest.mark.parametrize("before", ALLOWED, ids="-".join)
@pytest.mark.parametrize("step", STEPS)
def test_every_other_order_is_refused(before: tuple[str, ...], step: str) -> None:
    history = opened(scope())
    history.apply(Reserve(3, charge()))
    for name in before:
        history.apply(STEPS[name](3))
    assert history.reservation(3).state is ALLOWED[before]
    charged = history.balance("notes").events
    if (*before, step) in ALLOWED:
        history.apply(STEPS[step](3))
        assert history.reservation(3).state is ALLOWED[*before, step]
        assert history.balance("notes").events == (() if step == "cancel" else charged)
    else:
        with pytest.raises(WrongStateError, match=f"{step} of reservation 3"):
            history.apply(STEPS[step](3))
        assert history.reservation(3).state is ALLOWED[before]
        assert history.balance("notes").events == charged


BAD_LIVES: dict[str, tuple[type[LifecycleError], list[Entry]]] = {
    "bad_no_genesis": (LifecycleError, chain(scope(), genesis=False)),
    "bad_two_geneses": (LifecycleError, chain(Genesis(SITE, IDENTITY.public.hex()))),
    "bad_charge_before_scope": (UnknownScopeError, chain(Reserve(2, charge()))),
    "bad_other_scope": (UnknownScopeError, chain(scope(), Reserve(3, charge(scope="other")))),
    "bad_inherits": (UnknownScopeError, chain(scope(inherits=("other",)))),
    "bad_scope_twice": (ScopeTermsError, chain(scope(), scope())),
    "bad_scope_twice_with_more": (ScopeTermsError, chain(scope(), scope(epsilon=9))),
    "bad_id": (UnknownReservationError, chain(scope(), Reserve(2, charge()))),
    "bad_start": (UnknownReservationError, chain(scope(), Start(2))),
    "bad_complete": (UnknownReservationError, chain(scope(), Complete(9, "ab" * 32))),
    "bad_started_twice": (WrongStateError, chain(scope(), Reserve(3, charge()), Start(3), Start(3))),
    "bad_cancelled_after_start": (WrongStateError, chain(scope(), Reserve(3, charge()), Start(3), Cancel(3))),
    "bad_completed_before_start": (
        WrongStateError,
        chain(scope(), Reserve(3, charge()), Complete(3, "ab" * 32)),
    ),
    "bad_second_output": (
        OutputChangedError,
        chain(scope(), Reserve(3, charge()), Start(3), Complete(3, "ab" * 32), Complete(3, "cd" * 32)),
    ),
}


@pytest.mark.parametrize("name", BAD_LIVES)
def test_an_export_with_an_impossible_life_is_refused(name: str) -> None:
    error, entries = BAD_LIVES[name]
    wanted = LedgerFormatError if name == "bad_no_genesis" else error
    with pytest.raises(wanted) as caught:
        check(export(entries))
    assert type(caught.value) is wanted
    assert caught.value.check == (1 if name == "bad_no_genesis" else 4)


@dataclasses.dataclass
class Plain:
    """The slow, obvious ledger: a list of what happened, read from the beginning for every question."""

    happened: list[tuple[Any, ...]] = dataclasses.field(default_factory=list)

    def scopes(self) -> list[Scope]:
        return [h[1] for h in self.happened if h[0] == "open"]

    def related(self, name: str) -> set[str]:
        found = {name}
        for _ in self.happened:
            for s in self.scopes():
                if found & {s.name, *s.inherits}:
                    found |= {s.name, *s.inherits}
        return found

    def state(self, number: int) -> str:
        return [h[0] for h in self.happened if h[1] == number and h[0] != "open"][-1]

    def events(self, name: str) -> list[SampledGaussianEvent]:
        return [
            e
            for h in self.happened
            if h[0] == "reserve" and h[2].scope in self.related(name) and self.state(h[1]) != "cancel"
            for e in h[2].events
        ]

    def over(self, more: Charge) -> float:
        """How far over its budget, as a share, the fullest scope would be."""
        shares = []
        for s in self.scopes():
            if s.name in self.related(more.scope):
                costs = [e.steps * rdp_of(e, s.order) for e in [*self.events(s.name), *more.events]]
                shares.append(math.fsum(costs) / s.budget - 1)
        return max(shares)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_histories_agree_with_the_slow_ledger(data: st.DataObject) -> None:
    history, plain = opened(), Plain()
    names = ["a", "b", "c", "d"]
    records: list[Record] = []

    def add(record: Record) -> None:
        history.apply(record)
        records.append(record)

    for _ in range(data.draw(st.integers(1, 25))):
        open_names = [s.name for s in plain.scopes()]
        numbers = [h[1] for h in plain.happened if h[0] == "reserve"]
        action = data.draw(
            st.sampled_from(["open", "reserve", "reserve", "reserve", "start", "complete", "cancel"])
        )
        if action == "open" and (free := [n for n in names if n not in open_names]):
            inherits = tuple(data.draw(st.sets(st.sampled_from(open_names)))) if open_names else ()
            new = scope(free[0], data.draw(st.sampled_from([1.0, 3.0, 8.0])), inherits=inherits)
            try:
                history.check_opening(new)
            except BudgetError:
                assert (
                    plain.over(dataclasses.replace(charge(1), scope=inherits[0])) > -1
                )  # something was spent
                continue
            add(new)
            plain.happened.append(("open", new))
        elif action == "reserve" and open_names:
            name = data.draw(st.sampled_from(open_names))
            wanted = charge(1, *data.draw(st.lists(EVENTS, min_size=1, max_size=3)), scope=name)
            over = plain.over(wanted)
            try:
                history.check_fits(wanted)
            except BudgetError:
                assert over > -1e-12
            else:
                assert over <= 1e-12
                number = history.length + 1
                add(Reserve(number, wanted))
                plain.happened.append(("reserve", number, wanted))
        elif action in STEPS and numbers:
            number = data.draw(st.sampled_from(numbers))
            possible = (plain.state(number), action) in {
                ("reserve", "start"),
                ("reserve", "cancel"),
                ("start", "complete"),
            }
            try:
                add(STEPS[action](number))
            except WrongStateError:
                assert not possible
            else:
                assert possible
                plain.happened.append((action, number))
        for s in plain.scopes():
            balance = history.balance(s.name)
            assert {o.name for o in history.overlapping(s.name)} == plain.related(s.name)
            assert sorted(balance.events, key=repr) == sorted(plain.events(s.name), key=repr)
            assert balance.epsilon_rdp <= s.target_epsilon
            if balance.events:
                assert rho(count_steps(balance.events), s.order) == pytest.approx(
                    math.fsum(e.steps * rdp_of(e, s.order) for e in plain.events(s.name)), rel=1e-12
                )
    assert check(export(chain(*records))).head.seq == history.length


# Heads


def test_a_head_is_108_bytes() -> None:
    head = SignedHead.sign(SITE, long_ledger()[-1], IDENTITY)
    assert len(head.encode()) == HEAD_BYTES == 108
    assert SignedHead.decode(head.encode()) == head
    assert head.is_signed_by(IDENTITY.public)
    assert not head.is_signed_by(STRANGER.public)


@pytest.mark.parametrize("place", range(0, 108, 3))
def test_a_head_changed_anywhere_is_not_signed(place: int) -> None:
    data = bytearray(SignedHead.sign(SITE, long_ledger()[-1], IDENTITY).encode())
    data[place] ^= 1
    try:
        head = SignedHead.decode(bytes(data))
    except LedgerFormatError:
        return
    with pytest.raises(HeadSignatureError):
        check_newer(None, head, IDENTITY.public)


@pytest.mark.parametrize("length", [0, 107, 109])
def test_a_head_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(LedgerFormatError):
        SignedHead.decode((SignedHead.sign(SITE, long_ledger()[-1], IDENTITY).encode() + b"\0")[:length])


def test_heads_only_move_on() -> None:
    entries, other = chain(scope(), Policy.of("a")), chain(scope(), Policy.of("b"))
    two, three = (SignedHead.sign(SITE, entries[n], IDENTITY) for n in (1, 2))
    fork = SignedHead.sign(SITE, other[2], IDENTITY)
    check_newer(None, two, IDENTITY.public)
    check_newer(two, three, IDENTITY.public)
    check_newer(three, three, IDENTITY.public)
    with pytest.raises(HeadWentBackError):
        check_newer(three, two, IDENTITY.public)
    with pytest.raises(ForkError):
        check_newer(three, fork, IDENTITY.public)
    with pytest.raises(HeadSignatureError):
        check_newer(two, three, STRANGER.public)
    with pytest.raises(ReceiptError):
        check_newer(two, SignedHead.sign(SITE + 1, entries[2], IDENTITY), IDENTITY.public)


def test_an_entry_s_signature_is_no_head_s() -> None:
    """Labels keep what is signed for one purpose from standing for another."""
    entry = long_ledger()[-1]
    assert not SignedHead(SITE, entry.seq, entry.hash, entry.signature).is_signed_by(IDENTITY.public)
    head = SignedHead.sign(SITE, entry, IDENTITY)
    with pytest.raises(EntrySignatureError):
        check_signature(dataclasses.replace(entry, signature=head.signature), IDENTITY.public)


# Exports


def test_an_honest_ledger_passes_every_check() -> None:
    entries = long_ledger()
    receipts = [SignedHead.sign(SITE, entries[n], IDENTITY) for n in (0, 7, 99, 199)]
    report = check(export(entries), receipts=receipts, claims=[Claim("run", 4.0, DELTA)])
    assert (report.site, report.head.seq, report.receipts) == (SITE, 200, 4)
    assert report.public_key == IDENTITY.public.hex()
    assert 0 < report.runs["run"] < 4
    assert [s.scope.name for s in report.scopes] == ["notes", "images"]
    for s in report.scopes:
        assert s.second_epsilon == pytest.approx(s.epsilon_rdp, rel=1e-3)
        assert s.rho <= s.scope.budget
    assert report.skipped == ("ε by privacy loss distributions: not asked for",)
    assert verify_export(export(entries)).skipped == ()


def refused(data: bytes, **more: Any) -> LedgerError:
    with pytest.raises(LedgerError) as caught:
        check(data, **more)
    return caught.value


def edited(line: str, at: int, rng: random.Random) -> str:
    return (
        line[:at]
        + rng.choice([c for c in '0123456789abcdef"{}:,.-xE \n\0' if c != line[at]])
        + line[at + 1 :]
    )


def find_edit(entries: Sequence[Entry], number: int, line: str) -> LedgerError:
    """What checks 1 to 3 say of the chain with this line in it: its neighbours are all that it touches."""
    try:
        entry = ledger_checks._parse_entry(line)
        check_link(entries[number - 1] if number else None, entry)
        if number + 1 < len(entries):
            check_link(entry, entries[number + 1])
        check_signature(entry, IDENTITY.public)
    except LedgerError as error:
        return error
    raise AssertionError(f"not found: {line}")


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 23])
def test_every_byte_of_every_entry_is_guarded(every: int) -> None:
    rng, entries = random.Random(1), long_ledger()
    for number, entry in enumerate(entries):
        line = entry.line()
        hash_at, signature_at = len(line) - 209, len(line) - 130
        assert line[hash_at : hash_at + 64] == entry.hash.hex()
        assert line[signature_at : signature_at + 128] == entry.signature.hex()
        for at in range(rng.randrange(every), len(line), every):
            changed = edited(line, at, rng)
            error = find_edit(entries, number, changed)
            if changed[at] in "0123456789abcdef" and hash_at <= at < hash_at + 64:
                assert type(error) is ChainError
            elif changed[at] in "0123456789abcdef" and signature_at <= at < signature_at + 128:
                assert type(error) is EntrySignatureError
            else:
                assert type(error) in (LedgerFormatError, ChainError)


def test_a_byte_changed_in_the_whole_export_is_found() -> None:
    rng, data = random.Random(2), export(long_ledger()).decode()
    head_at = data.index('{"head"')
    places = [*rng.sample(range(len(data)), 30), *rng.sample(range(head_at, len(data)), 15), *range(0, 40, 8)]
    for at in places:
        error = refused(edited(data, at, rng).encode())
        assert error.check in (1, 2, 3) if at < head_at else error.check in (1, 7), at


def lines_of(entries: Sequence[Entry]) -> list[bytes]:
    return export(entries).splitlines(keepends=True)


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 17])
def test_a_missing_repeated_or_moved_entry_is_found(every: int) -> None:
    lines = lines_of(long_ledger())
    count = len(lines) - 2
    for at in range(1, count + 1, every):
        without = refused(b"".join(lines[:at] + lines[at + 1 :]))
        assert type(without) is (HeadError if at == count else ChainError)
        assert type(refused(b"".join(lines[: at + 1] + lines[at:]))) is ChainError
        other = at % count + 1
        lines[at], lines[other] = lines[other], lines[at]
        assert type(refused(b"".join(lines))) is ChainError
        lines[at], lines[other] = lines[other], lines[at]


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 17])
def test_a_truncated_export_is_found(every: int) -> None:
    lines = lines_of(long_ledger())
    whole = b"".join(lines)
    for kept in range(1, len(lines) - 2, every):
        assert type(refused(b"".join(lines[: 1 + kept]))) is LedgerFormatError  # the head went too
        assert type(refused(b"".join([*lines[: 1 + kept], lines[-1]]))) is HeadError
    for cut in range(0, len(whole), every * 1000):
        assert type(refused(whole[:cut])) is LedgerFormatError
    for extra in (b"\n", b" ", lines[1], b"\xff"):
        assert refused(whole + extra).check == 1


def test_a_rollback_with_its_own_valid_head_is_found_by_a_receipt() -> None:
    entries = long_ledger()
    receipt = SignedHead.sign(SITE, entries[150], IDENTITY)
    for length in (1, 2, 100, 150):
        older = export(entries[:length])
        assert check(older).head.seq == length  # nothing inside the export can tell
        assert type(refused(older, receipts=[receipt])) is HeadWentBackError
    check(export(entries[:151]), receipts=[receipt])


@pytest.mark.parametrize("at", [2, 50, 199])
def test_a_fork_with_valid_signatures_is_found_by_a_receipt(at: int) -> None:
    entries = list(long_ledger())
    fork = entries[:at]
    while len(fork) < 200:
        fork.append(Entry.make(fork[-1], Policy.of(f"another story {len(fork)}"), IDENTITY))
    check(export(fork))
    for seen in {at, 199}:
        assert (
            type(refused(export(fork), receipts=[SignedHead.sign(SITE, entries[seen], IDENTITY)]))
            is ForkError
        )
    check(export(fork), receipts=[SignedHead.sign(SITE, entries[at - 1], IDENTITY)])


@pytest.mark.parametrize("at", [2, 198])
def test_an_entry_of_a_fork_put_into_the_chain_is_found(at: int) -> None:
    """Signed, with the right number; only what it names as the entry before is another."""
    entries = list(long_ledger())
    fork = [*entries[: at - 1], Entry.make(entries[at - 2], Policy.of("another story"), IDENTITY)]
    entries[at] = Entry.make(fork[-1], entries[at].record, IDENTITY)
    assert entries[at].seq == at + 1
    assert type(refused(export(entries[: at + 1]))) is ChainError


def test_a_receipt_that_the_site_never_signed_is_no_evidence() -> None:
    entries = long_ledger()
    for receipt in (
        SignedHead.sign(SITE, entries[9], STRANGER),
        SignedHead.sign(SITE + 1, entries[9], IDENTITY),
    ):
        assert type(refused(export(entries), receipts=[receipt])) is ReceiptError


def test_a_ledger_forged_whole_by_another_key_is_found() -> None:
    forged = chain(scope(), identity=STRANGER)
    assert type(refused(export(forged, STRANGER))) is EntrySignatureError
    verify_export(
        export(forged, STRANGER)
    )  # whoever does not know the key can only see that it is consistent
    pretended = [Entry.make(None, Genesis(SITE, IDENTITY.public.hex()), STRANGER)]
    assert type(refused(export(pretended, STRANGER))) is EntrySignatureError


def test_a_head_that_is_not_the_last_entry_s_is_found() -> None:
    entries = long_ledger()
    wrong = {
        "older": (HeadError, SignedHead.sign(SITE, entries[50], IDENTITY)),
        "other site": (HeadError, SignedHead.sign(SITE + 1, entries[-1], IDENTITY)),
        "other key": (HeadSignatureError, SignedHead.sign(SITE, entries[-1], STRANGER)),
    }
    for name, (error, head) in wrong.items():
        assert type(refused(export_ledger(entries, head))) is error, name


def test_overspending_that_the_site_has_signed_is_found() -> None:
    one = event(0.1, 1.0, 100)
    small = scope(
        epsilon=epsilon_rdp([one] * 2, DELTA), order=choose_order(epsilon_rdp([one] * 2, DELTA), DELTA, [one])
    )
    check(export(chain(small, Reserve(3, charge(1, one)), Reserve(4, charge(2, one)))))
    error = refused(export(chain(small, *(Reserve(n, charge(n, one)) for n in (3, 4, 5)), Cancel(5))))
    assert type(error) is FilterError  # although it was taken back later
    assert "entry 5" in str(error)
    inherited = scope("more", 1.0, inherits=("notes",))
    assert type(refused(export(chain(small, Reserve(3, charge(1, one)), inherited)))) is FilterError


def test_a_budget_that_does_not_follow_from_epsilon_is_found() -> None:
    generous = dataclasses.replace(scope(), budget=scope().budget * 1.01)
    assert type(refused(export(chain(generous)))) is FilterError


def test_a_charge_without_a_bound_is_neither_made_nor_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    def unbounded(*_: float) -> tuple[float, ...]:
        raise PrivacyError("not finite")

    history, data = opened(scope()), export(chain(scope(), Reserve(3, charge())))
    monkeypatch.setattr("common.ledger_replay._one_step", unbounded)
    with pytest.raises(PrivacyError, match="not finite"):
        history.check_fits(charge())
    assert type(refused(data)) is FilterError


@pytest.mark.parametrize("factor", [1.02, 0.98])
def test_accountants_that_disagree_are_reported(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    step = ledger_checks._opacus_step
    monkeypatch.setattr(
        ledger_checks, "_opacus_step", lambda q, s: tuple(factor * r for r in step(q, s) or ())
    )
    error = refused(export(chain(scope(), Reserve(3, charge(1, event(steps=400))))))
    assert type(error) is AccountantsDisagreeError


def test_loss_distributions_above_the_bound_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    data = export(chain(scope(), Reserve(3, charge())))
    verify_export(data)
    monkeypatch.setattr("common.ledger_replay.epsilon_pld", lambda *_: 7.0)
    with pytest.raises(AccountantsDisagreeError, match="privacy loss distributions"):
        verify_export(data)


def test_without_opacus_the_rest_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger_checks._opacus_step.cache_clear()
    monkeypatch.setitem(sys.modules, "opacus.accountants.analysis", None)
    try:
        report = check(export(long_ledger()))
    finally:
        ledger_checks._opacus_step.cache_clear()
    assert report.scopes[0].second_epsilon is None
    assert "the second accountant: Opacus is not installed" in report.skipped


def test_claims() -> None:
    entries = chain(
        scope("a"),
        scope("b"),
        scope("both a", inherits=("a",)),
        Reserve(5, charge(1, event(steps=200), scope="a", run="one")),
        Reserve(6, charge(1, event(steps=200), scope="both a", run="one")),
        Reserve(7, charge(1, event(steps=900), scope="b", run="two")),
        Reserve(8, charge(1, event(steps=100), scope="b", run="one")),
        Reserve(9, charge(2, event(steps=900), scope="b", run="one")),
        Cancel(9),
    )
    cost = epsilon_rdp([event(steps=400)], DELTA)  # a and both a overlap, b is apart
    report = check(export(entries), claims=[Claim("one", cost, DELTA), Claim("two", 8.0, DELTA)])
    assert report.runs == {"one": cost, "two": epsilon_rdp([event(steps=900)], DELTA)}
    assert type(refused(export(entries), claims=[Claim("one", cost - 1e-6, DELTA)])) is ClaimError
    assert type(refused(export(entries), claims=[Claim("three", 8.0, DELTA)])) is ClaimError


# Accountants


def random_histories(count: int, rng: random.Random, settings: int) -> Iterable[list[SampledGaussianEvent]]:
    pool = [(10 ** rng.uniform(-3, -0.7), 10 ** rng.uniform(-0.12, 1)) for _ in range(settings)]
    for _ in range(count):
        yield [event(*rng.choice(pool), rng.randint(1, 1500)) for _ in range(rng.randint(1, 3))]


@pytest.mark.parametrize(
    ("seed", "count", "settings_", "losses"),
    [(0, 60, 5, 30), *(pytest.param(seed, 100, 20, 1, marks=pytest.mark.slow) for seed in range(1, 11))],
)
def test_accountants_agree_on_random_histories(seed: int, count: int, settings_: int, losses: int) -> None:
    """Within 1e-3: dp-accounting at any ε, Opacus at whole orders. PLD, of every `losses`-th, never above."""
    rng = random.Random(seed)
    for number, history in enumerate(random_histories(count, rng, settings_)):
        own = epsilon_rdp(history, DELTA)
        accountant = RdpAccountant(ORDERS, NeighboringRelation.ADD_OR_REMOVE_ONE)
        for e in history:
            step = PoissonSampledDpEvent(e.sample_rate, GaussianDpEvent(e.noise_multiplier))
            accountant.compose(SelfComposedDpEvent(step, e.steps))
        assert accountant.get_epsilon(DELTA) == pytest.approx(own, rel=1e-3, abs=1e-6), history
        entries = chain(scope(epsilon=10_000.0), Reserve(3, charge(1, *history)))
        report = check(export(entries)).scopes[0]  # compares with Opacus, event by event
        assert report.second_epsilon is not None
        assert report.second_epsilon <= own * (1 + 1e-3)
        if own < 3:
            assert report.second_epsilon == pytest.approx(own, rel=1e-3, abs=1e-6), history
        if number % losses == 0:
            assert epsilon_pld(history, DELTA) <= own * (1 + 1e-6) + 1e-6, history


def test_calibrated_noise_fits_a_scope_that_was_opened_for_it() -> None:
    sigma = calibrate_noise_multiplier(target_epsilon=2.0, delta=DELTA, sample_rate=0.05, steps=200)
    plan = [event(0.05, sigma, 4)] * 50
    history = opened(scope(epsilon=2.0, order=choose_order(2.0, DELTA, plan)))
    for one in plan:
        spend(history, one)
    with pytest.raises(BudgetError):
        spend(history, event(0.05, sigma, 4))
