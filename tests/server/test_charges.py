"""What the server claims of sites' charges, when it dies and they come, go and refuse."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common.plan import RoundPlan
from server import charges
from server.record import ASKED, RunFolder
from tests.server.test_rounds import SITES, Federation, federation

__all__ = ["federation"]


@pytest.fixture
def plan(federation: Any) -> RoundPlan:
    found: RoundPlan = federation().job.plan.round(1)
    assert found.event is not None
    return found


def trained(**refused: str) -> Any:
    return SimpleNamespace(
        refused={int(site[1:]): why for site, why in refused.items()},
        bytes_up=Counter(),
        bytes_down=Counter(),
    )


def claimed(folder: RunFolder) -> dict[int, tuple[str, bool]]:
    return {entry.site: (entry.status, bool(entry.events)) for entry in folder.site_rounds()}


def test_who_was_asked_counts_as_charged_until_more_is_known(tmp_path: Path, plan: RoundPlan) -> None:
    folder = RunFolder(tmp_path)
    assert charges.owed(folder, 1) == frozenset()
    charges.record_asked(folder, 1, plan, [1, 2, 3])
    assert claimed(folder) == {site: (ASKED, True) for site in (1, 2, 3)}
    fates = {1: "ok", 2: "mask:deadline"}
    charges.record_fates(folder, 1, plan, trained(s3="refused-budget"), fates, frozenset())
    assert claimed(folder) == {1: ("ok", True), 2: ("mask:deadline", True), 3: ("refused-budget", False)}


def test_a_server_that_died_in_a_round_claims_what_its_sites_were_charged(
    tmp_path: Path, plan: RoundPlan
) -> None:
    """Three sites were asked, then the server was killed. In its second life site 1 is away, site 2's people
    have changed their policy meanwhile, and site 3 says that it has been charged."""
    folder = RunFolder(tmp_path)
    charges.record_asked(folder, 1, plan, [1, 2, 3])
    owed = charges.owed(folder, 1)
    assert owed == {1, 2, 3}
    charges.record_asked(folder, 1, plan, [2, 3, 4])
    refused = trained(s2="refused-policy", s3="refused-repeat", s4="refused-policy")
    charges.record_fates(folder, 1, plan, refused, {}, owed)
    assert claimed(folder) == {
        1: (ASKED, True),
        2: ("refused-policy", True),
        3: ("refused-repeat", True),
        4: ("refused-policy", False),
    }
    assert charges.owed(folder, 1) == {1, 2, 3}  # and so on, if it dies again
    assert charges.owed(folder, 2) == frozenset()


def test_a_deployed_run_writes_down_whom_it_asks_before_it_asks(federation: Any) -> None:
    run: Federation = federation()
    seen: list[dict[int, str]] = []
    for site in range(1, SITES + 1):
        good = run.answers[site]

        def answer(request: Any, good: Any = good) -> Any:
            seen.append(run.statuses(request.round))
            return good(request)

        run.answers[site] = answer
    run.job = dataclasses.replace(run.job, names=lambda _: {n: n for n in range(1, SITES + 1)})
    assert run.run().round == 2
    assert seen[0] == dict.fromkeys(range(1, SITES + 1), ASKED)
    assert run.statuses(1) == dict.fromkeys(range(1, SITES + 1), "ok")
