"""What is spent and left, against sums made by another library, and against the filter itself."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import dp_accounting
import pytest
from dp_accounting.rdp import RdpAccountant

from client import budget
from client.budget import budgets, more_like, spend_by_entry
from client.budget_report import budget_page
from client.identity import SiteFolder, create_site, load_identity
from client.ledger import Ledger
from client.ledger_view import LedgerView, look, read_ledger
from common.errors import BudgetError, ConfigError
from common.ledger import Charge, Scope
from common.ledger_errors import ChainError, RolledBackError, WrongSiteError
from common.ledger_replay import Balance
from common.privacy import SampledGaussianEvent, epsilon_rdp
from common.secagg.keys import IdentityKey

TRAIN = SampledGaussianEvent(0.1, 3.0, 20, 0.5, 100)
METRICS = SampledGaussianEvent(1.0, 16.0, 1, 1.0, 1000)


@pytest.fixture
def place(tmp_path: Path) -> SiteFolder:
    folder = SiteFolder(tmp_path / "north")
    create_site(folder, "north", os.urandom, None)
    return folder


@pytest.fixture
def ledger(place: SiteFolder) -> Iterator[Ledger]:
    with Ledger(place.ledger, load_identity(place.identity, None), 7, witness=place.witness) as opened:
        yield opened


def charge(scope: str, number: int, *events: SampledGaussianEvent, run: str = "run") -> Charge:
    return Charge(scope, run, number, "00", "model", "plan", events)


def oracle(scope: Scope, events: list[SampledGaussianEvent]) -> float:
    """ε at the scope's order: dp-accounting's divergences, and Proposition 12 of 2004.00010 by hand."""
    accountant = RdpAccountant(orders=[scope.order])
    for e in events:
        step = dp_accounting.PoissonSampledDpEvent(
            e.sample_rate, dp_accounting.GaussianDpEvent(e.noise_multiplier)
        )
        accountant.compose(dp_accounting.SelfComposedDpEvent(step, e.steps))
    a = scope.order
    return float(accountant._rdp[0]) + math.log((a - 1) / a) - (math.log(scope.delta) + math.log(a)) / (a - 1)


def test_the_numbers_are_those_of_another_library(ledger: Ledger, place: SiteFolder) -> None:
    scope = ledger.open_scope("texts", target_epsilon=3.0, delta=1e-5, planned=[TRAIN])
    (empty,) = budgets(look(place).history)
    assert (empty.spent, empty.reserved, empty.left, empty.last) == (0.0, 0.0, 3.0, None)
    assert (empty.rounds_left, empty.unlimited, empty.runs) == (None, False, ())
    done = ledger.reserve(charge("texts", 1, TRAIN, METRICS, run="first"))
    ledger.start(done.id)
    ledger.complete(done.id, "00" * 32)
    ledger.start(ledger.reserve(charge("texts", 1, TRAIN, run="second")).id)
    given_back = ledger.reserve(charge("texts", 2, TRAIN, run="second"))
    ledger.cancel(given_back.id)
    waiting = ledger.reserve(charge("texts", 3, METRICS, run="second"))
    (one,) = budgets(look(place).history)
    spent = [TRAIN, METRICS, TRAIN]
    assert one.spent == pytest.approx(oracle(scope, spent), rel=1e-9)
    assert one.spent + one.reserved == pytest.approx(oracle(scope, [*spent, METRICS]), rel=1e-9)
    assert one.reserved > 0
    assert one.spent + one.reserved + one.left == pytest.approx(3.0, abs=1e-12)
    assert one.left == pytest.approx(ledger.balance("texts").epsilon_left, abs=1e-12)
    assert one.epsilon_rdp == epsilon_rdp([*spent, METRICS], 1e-5)
    assert one.last is not None and one.last.id == waiting.id
    first, second = one.runs
    assert (first.run, first.rounds, first.charges, first.steps) == ("first", 1, 1, 21)
    assert (second.run, second.rounds, second.charges, second.steps) == ("second", 2, 2, 21)
    assert first.epsilon == epsilon_rdp([TRAIN, METRICS], 1e-5)
    # Parts of the divergence add up; ε of runs do not.
    assert first.divergence + second.divergence == pytest.approx(ledger.balance("texts").rho, rel=1e-12)
    assert first.epsilon + second.epsilon > one.epsilon_rdp


@pytest.mark.parametrize(
    ("target", "event"),
    [
        (1.0, SampledGaussianEvent(0.05, 2.0, 10, 0.5, 10)),
        (2.0, SampledGaussianEvent(0.2, 2.0, 1, 0.5, 10)),
        (0.8, SampledGaussianEvent(1.0, 20.0, 1, 0.5, 10)),
        (6.0, SampledGaussianEvent(0.01, 0.5, 3, 0.5, 10)),
    ],
)
@pytest.mark.parametrize("other", [False, True])
def test_as_many_rounds_as_it_says_fit_and_not_one_more(
    ledger: Ledger, target: float, event: SampledGaussianEvent, other: bool
) -> None:
    """By reserving them, one after the other."""
    planned = [replace(event, steps=event.steps * 20)]
    ledger.open_scope("texts", target_epsilon=target, delta=1e-5, planned=planned)
    each = charge("texts", 1, event, METRICS) if other else charge("texts", 1, event)
    history = ledger._history
    promised = more_like(history, each)
    assert promised is not None and 3 <= promised < 80
    for left in range(promised, 0, -1):
        assert more_like(history, each) == left
        ledger.reserve(each)
    assert more_like(history, each) == 0
    with pytest.raises(BudgetError):
        ledger.reserve(each)


def test_what_costs_next_to_nothing_has_no_number(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.open_scope("texts", target_epsilon=8.0, delta=1e-5)
    cheap = charge("texts", 1, SampledGaussianEvent(0.001, 200.0, 1, 1.0, 1))
    ledger.reserve(cheap)
    assert more_like(ledger._history, cheap) is None
    (one,) = budgets(ledger._history)
    assert one.rounds_left is None and one.unlimited
    monkeypatch.setattr(budget, "MOST_ROUNDS", 1)
    assert more_like(ledger._history, cheap) is None
    huge = charge("texts", 2, SampledGaussianEvent(0.001, 200.0, 2**52, 1.0, 1))
    assert more_like(ledger._history, huge) in (0, None)  # no count beyond what a ledger can hold


def test_data_that_overlap_share_the_spend_and_the_tighter_budget_decides(
    ledger: Ledger, place: SiteFolder
) -> None:
    ledger.open_scope("texts", target_epsilon=6.0, delta=1e-5, planned=[TRAIN])
    ledger.open_scope("images", target_epsilon=6.0, delta=1e-5, planned=[TRAIN])
    first = charge("texts", 1, TRAIN)
    ledger.reserve(first)
    alone = more_like(ledger._history, first)
    ledger.open_scope("both", target_epsilon=2.0, delta=1e-5, planned=[TRAIN], inherits=["texts"])
    view = look(place)
    texts, images, both = budgets(view.history)
    assert (texts.overlaps, images.overlaps, both.overlaps) == (("both",), (), ("texts",))
    assert images.last is None and texts.last is not None and both.last == texts.last
    assert alone is not None and texts.rounds_left is not None
    assert texts.rounds_left == both.rounds_left < alone
    for _ in range(texts.rounds_left):
        ledger.reserve(charge("both", 1, TRAIN))
    with pytest.raises(BudgetError, match="'both'"):
        ledger.reserve(first)
    assert budgets(look(place).history, "both")[0].overlaps == ("texts",)
    with pytest.raises(
        ConfigError, match=r"--scope must be one of \['both', 'images', 'texts'\], found 'text'"
    ):
        budgets(view.history, "text")


def test_the_curve_ends_where_the_balance_stands(ledger: Ledger, place: SiteFolder) -> None:
    ledger.open_scope("texts", target_epsilon=6.0, delta=1e-5, planned=[TRAIN])
    ledger.reserve(charge("texts", 1, TRAIN))
    given_back = ledger.reserve(charge("texts", 2, TRAIN))
    ledger.cancel(given_back.id)
    ledger.open_scope("more", target_epsilon=5.0, delta=1e-6, planned=[TRAIN], inherits=["texts"])
    ledger.open_scope("others", target_epsilon=5.0, delta=1e-6, planned=[TRAIN])
    ledger.reserve(charge("others", 2, METRICS))
    ledger.reserve(charge("more", 2, METRICS))
    view = look(place)
    for name in ("texts", "more"):
        numbers, epsilons = spend_by_entry(view.entries, view.history, name)
        scope = view.history.scope(name)
        (one,) = budgets(view.history, name)
        assert epsilons[-1] == pytest.approx(one.spent + one.reserved, rel=1e-12)
        assert epsilons == pytest.approx(
            [0.0, *(oracle(scope, e) for e in ([TRAIN], [TRAIN] * 2, [TRAIN], [TRAIN, METRICS]))], rel=1e-9
        )
        assert list(numbers) == sorted(set(numbers)) and numbers[-1] == len(view.entries)
    assert spend_by_entry(view.entries, view.history, "others")[1] == pytest.approx(
        [0.0, oracle(view.history.scope("others"), [METRICS])], rel=1e-9
    )


# Reading, without writing


def test_looking_changes_nothing_and_sees_what_others_write(ledger: Ledger, place: SiteFolder) -> None:
    ledger.open_scope("texts", target_epsilon=6.0, delta=1e-5, planned=[TRAIN])
    before = {p: (p.read_bytes() if p != place.ledger else b"", p.stat().st_mtime_ns) for p in _files(place)}
    view = look(place)
    assert (view.site, len(view.entries), view.head) == (7, 2, ledger.head())
    assert {
        p: (p.read_bytes() if p != place.ledger else b"", p.stat().st_mtime_ns) for p in _files(place)
    } == before
    ledger.reserve(charge("texts", 1, TRAIN))
    assert len(look(place).entries) == 3


def _files(place: SiteFolder) -> list[Path]:
    return sorted([*place.path.iterdir(), *place.witness.parent.iterdir()])


def test_a_ledger_that_is_not_there_or_not_this_site_s(place: SiteFolder, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no ledger at .*confide client scope"):
        look(place)
    with pytest.raises(ConfigError, match="no site's folder"):
        look(SiteFolder(tmp_path))
    stranger = IdentityKey.generate(os.urandom)
    with Ledger(place.ledger, stranger, 7, witness=place.witness):
        pass
    with pytest.raises(WrongSiteError):
        look(place)
    assert read_ledger(place.ledger, stranger.public).site == 7


def test_a_ledger_restored_from_a_backup_is_noticed_by_its_witness(ledger: Ledger, place: SiteFolder) -> None:
    ledger.open_scope("texts", target_epsilon=6.0, delta=1e-5, planned=[TRAIN])
    ledger.close()
    backup = place.ledger.read_bytes()
    with Ledger(place.ledger, load_identity(place.identity, None), 7, witness=place.witness) as again:
        again.reserve(charge("texts", 1, TRAIN))
    place.ledger.write_bytes(backup)
    with pytest.raises(RolledBackError):
        look(place)
    # Elsewhere, without its witness, nobody can tell; the view says so.
    assert look(place, place.path.parent / "elsewhere").witness is None


def test_an_edited_entry_is_noticed(ledger: Ledger, place: SiteFolder) -> None:
    ledger.open_scope("texts", target_epsilon=6.0, delta=1e-5, planned=[TRAIN])
    ledger.close()
    data = place.ledger.read_bytes()
    assert data.count(b'"target_epsilon":6.0') == 1
    place.ledger.write_bytes(data.replace(b'"target_epsilon":6.0', b'"target_epsilon":9.0'))
    with pytest.raises(ChainError):
        look(place)


# The page


def test_the_page_loads_nothing_and_escapes_everything(ledger: Ledger, place: SiteFolder) -> None:
    name = "<script>alert('texts')</script> $x$"
    ledger.open_scope(name, target_epsilon=6.0, delta=1e-5, planned=[TRAIN])
    empty = budget_page("north", look(place), budgets(look(place).history))
    assert "the whole budget is left" in empty
    ledger.reserve(charge(name, 1, TRAIN, run="<b>run</b>"))
    view = look(place)
    page = budget_page("<i>north</i>", view, budgets(view.history))
    assert "<script" not in page and "<b>run" not in page and "<i>north" not in page
    assert (
        "&lt;script&gt;" in page and "http://" not in page and "https://" not in page and "src=" not in page
    )
    assert page.count("<svg") == 1 and "more rounds" in page and "No witness" not in page
    assert "No witness" in budget_page("north", replace(view, witness=None), ())


def test_a_balance_of_the_filter_and_of_people_agree(ledger: Ledger) -> None:
    """What people see as left is what the filter still allows, to the last step."""
    ledger.open_scope("texts", target_epsilon=2.0, delta=1e-5, planned=[TRAIN])
    ledger.reserve(charge("texts", 1, TRAIN))
    balance: Balance = ledger.balance("texts")
    (one,) = budgets(ledger._history)
    one_step = charge("texts", 1, replace(TRAIN, steps=1))
    steps = more_like(ledger._history, one_step)
    assert steps is not None
    ledger.reserve(charge("texts", 2, replace(TRAIN, steps=steps)))
    assert one.left == pytest.approx(balance.epsilon_left, abs=1e-12)
    assert more_like(ledger._history, one_step) == 0
    (after,) = budgets(ledger._history)
    assert 0 <= after.left < one.left / steps * 1.001


def test_a_view_is_of_one_moment(ledger: Ledger, place: SiteFolder) -> None:
    view: LedgerView = look(place)
    assert view.policy is None
    ledger.record_policy("a = 1\n")
    ledger.record_policy("a = 2\n")
    found = look(place).policy
    assert found is not None and (found[0], found[1].text) == (3, "a = 2\n")
    assert view.policy is None
