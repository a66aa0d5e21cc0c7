"""`confide plan`: known prices, a proposal that holds what it says, and lines that can be pasted."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from client.policy import STRICT
from common.config import parse_config
from common.errors import ConfigError, PrivacyError
from common.plan import make_plan, resolve
from common.privacy import SampledGaussianEvent, epsilon_rdp
from simulations.planning import NoiseCurve, Question, Row, propose, rates, rounds_for, solve
from tests.e2e.command import ROOT, invoke

SMALL = ("--records", "80", "--epsilon", "8", "--rounds", "4", "--delta", "1e-3")


def ask(*arguments: str | Path) -> Any:
    return json.loads(invoke("plan", *arguments, "--json"))


def question(**changes: Any) -> Question:
    usual: dict[str, Any] = {
        "records": 5000,
        "epsilon": 8.0,
        "delta": 1e-5,
        "rounds": 20,
        "steps_per_round": 3,
        "sites": 8,
        "max_batch": 1024,
    }
    return Question(**{**usual, **changes})


# A given mechanism


def test_the_price_of_a_mechanism_is_the_known_answer() -> None:
    asked = ("--sample-rate", "0.01", "--noise-multiplier", "1", "--steps", "1000", "--delta", "1e-5")
    found = ask(*asked)
    assert set(found) == {"epsilon_rdp", "epsilon_pld", "delta", "sample_rate", "noise_multiplier", "steps"}
    assert found["epsilon_rdp"] == pytest.approx(2.101, abs=1e-3)
    assert found["epsilon_pld"] == pytest.approx(1.828, abs=1e-3)
    assert (found["steps"], found["sample_rate"], found["noise_multiplier"], found["delta"]) == (
        1000,
        0.01,
        1,
        1e-5,
    )
    assert "2.102 by Rényi divergences (enforced), 1.829 by privacy loss" in invoke("plan", *asked)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), r"--records, --epsilon, --rounds must be given"),
        (("--records", "100", "--epsilon", "3"), r"--rounds must be given to plan a run"),
        (("--sample-rate", "0.1", "--steps", "3"), r"--noise-multiplier, --delta must be given to price"),
        (("--records", "100", "--sample-rate", "0.1"), r"found --records, --sample-rate"),
        (("--records", "0", "--epsilon", "3", "--rounds", "1"), r"--records must be at least 1, found 0"),
        (("--records", "99", "--epsilon", "0", "--rounds", "1"), r"--epsilon must be > 0"),
        (("--records", "99", "--epsilon", "3", "--rounds", "1", "--delta", "0.02"), r"--delta must .*1/99"),
        (("--records", "99", "--epsilon", "3", "--rounds", "1", "--max-batch", "0"), r"--max-batch"),
        (
            (
                "--sample-rate",
                "0.1",
                "--noise-multiplier",
                "1",
                "--steps",
                "3",
                "--delta",
                "1e-5",
                "--html",
                "x",
            ),
            r"--html draws a plan",
        ),
    ],
)
def test_what_is_missing_or_wrong_is_named(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        invoke("plan", *arguments)


def test_a_mechanism_out_of_range_is_refused() -> None:
    with pytest.raises(PrivacyError, match="sample_rate must be at most 1"):
        invoke("plan", "--sample-rate", "2", "--noise-multiplier", "1", "--steps", "9", "--delta", "1e-5")


# A proposal


def test_a_plan_holds_what_it_says(tmp_path: Path) -> None:
    found = ask(*SMALL, "--html", tmp_path / "plan.html")
    assert found["steps"] == 12 and found["delta"] == 1e-3
    assert [row["batch_size"] for row in found["rows"]] == [40, 80]
    for row in found["rows"]:
        assert row["epsilon_rdp"] <= 8.0
        event = SampledGaussianEvent(row["sample_rate"], row["noise_multiplier"], 12, 1.0, 1)
        assert epsilon_rdp([event], 1e-3) == row["epsilon_rdp"]
        weaker = SampledGaussianEvent(
            row["sample_rate"], round(row["noise_multiplier"] - 1e-4, 4), 12, 1.0, 1
        )
        assert epsilon_rdp([weaker], 1e-3) > 8.0  # the least noise
        assert row["noise_per_step"] == row["noise_multiplier"] / row["batch_size"]
        assert row["noise_of_average"] == pytest.approx(row["noise_per_step"] / math.sqrt(12 * 8))
        assert row["gradients"] == round(row["sample_rate"] * 80 * 12)
    best = found["proposal"]
    assert best["epsilon_pld"] <= best["epsilon_rdp"]
    # The lines that are to be pasted make this very plan.
    pasted = {"model": {"name": "m"}, "data": {"train": "d.csv"}, **tomllib.loads(found["toml"])}
    config = resolve(parse_config(pasted, source="the plan"), smallest_site=80, labels=("a", "b"), threads=1)
    plan = make_plan(config)
    assert plan.epsilon_rdp == best["epsilon_rdp"] <= plan.target_epsilon == 8.0
    assert sum(r.steps for r in plan.rounds) == 12 and plan.rounds[0].batch_size == best["batch_size"]
    assert found["scope"].endswith(f"--planned {best['sample_rate']},{best['noise_multiplier']},12")
    # Only what a strict site would refuse is named.
    assert found["policy_defaults_refuse"] == ["training.sample_rate"]
    assert best["sample_rate"] > STRICT.training.sample_rate
    page = (tmp_path / "plan.html").read_text("utf-8")
    assert page.count("<svg") == 2 and "<script" not in page and "noise_multiplier = " in page


def test_a_plan_in_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    text = invoke("plan", *SMALL)
    for words in (
        "→",
        "noise_multiplier, about",
        "4 rounds",
        "[privacy]",
        "confide client scope",
        "enforced",
    ):
        assert words in text


def test_the_proposal_is_where_a_larger_batch_stops_paying() -> None:
    asked = question()

    def rows(*noise: float) -> list[Row]:
        return [Row(asked, rate, sigma) for rate, sigma in zip((0.01, 0.02, 0.05, 0.1), noise, strict=False)]

    # Batches 50, 100, 250, 500. As long as σ hardly grows, a larger batch pays.
    assert propose(rows(0.5, 0.5, 0.5, 0.5)) == 3
    # σ/batch falls by 1.25 where the batch doubles: less than √2.
    assert propose(rows(0.5, 0.8, 0.8, 0.8)) == 0
    assert propose(rows(0.5, 0.6, 1.4, 1.4)) == 1
    assert propose(rows(0.5)) == 0


@pytest.mark.parametrize(
    ("changes", "batches"),
    [
        ({}, [50, 100, 250, 500, 1000]),
        ({"records": 1_000_000, "delta": 1e-8}, [50, 100, 200, 500, 1000]),
        ({"records": 1_000_000, "delta": 1e-8, "max_batch": 100}, [50, 100]),
        ({"records": 20}, [10, 20]),
        ({"records": 1, "delta": 0.1}, [1]),
        ({"records": 3, "delta": 0.1, "max_batch": 1}, [1]),
        ({"max_batch": 10}, [10]),
    ],
)
def test_batches_are_worth_a_look(changes: dict[str, Any], batches: list[int]) -> None:
    asked = question(**changes)
    found = rates(asked)
    assert [Row(asked, rate, 1.0).batch_size for rate in found] == batches
    assert list(found) == sorted(found) and all(0 < rate <= 1 for rate in found)


def test_rounds_for_a_noise_are_those_that_its_calibration_was_made_for() -> None:
    asked = question(records=100, delta=1e-3, rounds=5)
    row = solve(asked, 1.0)
    # The least noise for five rounds allows five, and not much more.
    assert 5 <= rounds_for(asked, 1.0, row.noise_multiplier) < 5.01
    assert rounds_for(asked, 1.0, 2 * row.noise_multiplier) > 15


def test_a_curve_is_read_between_its_points_and_not_beyond() -> None:
    drawn = NoiseCurve(Row(question(), 0.1, 1.0), (1.0, 4.0, 16.0), (0.5, 1.0, 2.0))
    assert drawn.at(4.0) == pytest.approx(1.0) and drawn.at(2.0) == pytest.approx(math.sqrt(0.5))
    assert drawn.at(0.5) is None and drawn.at(17.0) is None


def test_planning_loads_no_model_library() -> None:
    script = (
        "import sys, confide\n"
        "sys.argv = ['confide', 'plan', '--sample-rate', '1', '--noise-multiplier', '9', '--steps', '2', "
        "'--delta', '1e-3', '--json']\n"
        "try:\n    confide.main()\n"
        "except SystemExit as done:\n    assert not done.code, done.code\n"
        "import simulations.planning\n"
        "print([name for name in ('torch', 'flwr', 'transformers', 'matplotlib') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
