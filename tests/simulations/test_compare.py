"""`confide compare`: two real runs side by side."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from common.errors import CheckpointError, ConfigError
from server.record import RunFolder
from simulations.compare import compare, differing
from tests.e2e.command import invoke


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory, bert_folder: Path, data_file: Path) -> list[Path]:
    home = tmp_path_factory.mktemp("compare")
    config = home / "confide.toml"
    config.write_text(
        f"""
[run]
name = "tiny"
rounds = 2
threads = 1
[model]
name = "{bert_folder}"
head = "mean"
max_length = 32
[adapter]
rank = 2
[data]
train = "{data_file}"
[sites]
count = 3
[privacy]
sample_rate = 0.3
delta = 1e-3
[training]
local_steps = 2
"""
    )
    for options in (
        [],
        ["--set", "privacy.target_epsilon=2", "--set", "run.rounds=3", "--set", "run.name=other"],
    ):
        invoke("simulate", config, "--runs", home / "runs", "--json", *options)
    return sorted(p for p in (home / "runs").iterdir() if not p.is_symlink())


def test_what_differs_and_what_came_of_it(two_runs: list[Path]) -> None:
    found = json.loads(invoke("compare", *two_runs, "--json"))
    changed = found["differs"]
    assert {"privacy.target_epsilon", "run.rounds"} <= set(changed) and "run.name" not in changed
    assert "model.name" not in changed and "adapter.rank" not in changed
    for folder, run in zip(two_runs, found["runs"], strict=True):
        summary = json.loads(RunFolder(folder).summary.read_text())
        assert run["metric_final"] == summary["accuracy_final"] == run["by_round"]["metric"][-1]
        assert run["epsilon_rdp"] == summary["epsilon_rdp_max"]
        assert run["by_round"]["epsilon_rdp"][-1] == pytest.approx(summary["epsilon_rdp_max"], abs=1e-6)
        assert run["by_round"]["epsilon_rdp"] == sorted(run["by_round"]["epsilon_rdp"])
        sent = sum(part.bytes_up for part in RunFolder(folder).site_rounds())
        assert run["bytes_up"] == run["by_round"]["bytes_up"][-1] == sent > 0
        assert run["rounds"] == summary["rounds"] == len(run["by_round"]["round"]) - 1


def test_the_page(two_runs: list[Path], tmp_path: Path) -> None:
    invoke("compare", *two_runs, "--html", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text("utf-8")
    assert text.count("<svg") == 3 and "<script" not in text
    assert not re.search(r"(src|href)=[\"']?(http|//)", text)
    for value in ("privacy.target_epsilon", "ε (Rényi, enforced)", "Final scores"):
        assert value in text
    invoke("compare", *two_runs, "--html", tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == (tmp_path / "page.html").read_bytes()


def test_a_run_that_is_not_private_says_so(two_runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from simulations.compare_report import compare_page, rows

    runs = compare(two_runs)
    runs[0].run.summary["private"] = False
    assert "NOT PRIVATE" in compare_page(runs)
    assert dict(rows(runs))["ε (Rényi, enforced)"][0] == "NOT PRIVATE"
    runs[0].run.summary["metric"] = "another"
    assert "<svg" not in compare_page(runs)


def test_what_cannot_be_compared(two_runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least two"):
        invoke("compare", two_runs[0])
    with pytest.raises(ConfigError, match="named once"):
        invoke("compare", two_runs[0], two_runs[0])
    link = tmp_path / "latest"
    link.symlink_to(two_runs[1])
    with pytest.raises(ConfigError, match=f"{two_runs[1]} and {link}, which are the same folder"):
        invoke("compare", *two_runs, link)
    with pytest.raises(CheckpointError, match="not the folder of a run"):
        invoke("compare", two_runs[0], tmp_path)
    assert differing(compare(two_runs))
