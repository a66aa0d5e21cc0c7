"""`confide simulate` as people run it, on tiny models."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from common.errors import ConfideError
from common.privacy import SampledGaussianEvent, epsilon_rdp
from simulations.fleet import open_fleet
from tests.e2e.command import ROOT, command, invoke, run_process

KEYS = {
    "task",
    "model",
    "sites",
    "rounds",
    "cohort",
    "engine",
    "accuracy_initial",
    "accuracy_final",
    "accuracy_by_group",
    "epsilon_rdp_max",
    "epsilon_pld_max",
    "delta",
    "privacy_unit",
    "privacy_trust",
    "secure_aggregation",
    "bytes_up_per_site_round",
    "wall_seconds",
    "adapter_dir",
}


def test_a_run_leaves_all_that_it_promises(config: Path, tmp_path: Path) -> None:
    summary = json.loads(invoke("simulate", config, "--runs", tmp_path / "runs", "--json"))
    assert set(summary) >= KEYS
    run = tmp_path / "runs" / "tiny"
    assert run.is_symlink()
    assert run.resolve().name == "tiny-1"
    for name in (
        "config.toml",
        "events.jsonl",
        "metrics.csv",
        "summary.json",
        "report.html",
        "adapter/README.md",
    ):
        assert (run / name).stat().st_size > 0, name
    assert list((run / "tensorboard").glob("events.*"))
    assert (run / "secret.key").stat().st_mode & 0o777 == 0o600
    assert summary["epsilon_pld_max"] <= summary["epsilon_rdp_max"] <= 8.0
    assert summary["secure_aggregation"] is True
    assert len(summary["accuracy_by_group"]) == 3
    text = (run / "report.html").read_text()
    assert "Who sees what" in text and "in the clear" not in text
    assert "secure: the server learnt sums" in (run / "adapter" / "README.md").read_text()
    # The secret of the noise is nowhere else.
    secret = (run / "secret.key").read_bytes()
    for path in run.resolve().rglob("*"):
        if path.is_file() and path.name != "secret.key":
            content = path.read_bytes()
            assert secret not in content
            assert secret.hex().encode() not in content


def test_epsilon_is_what_the_events_say(config: Path, tmp_path: Path) -> None:
    summary = json.loads(invoke("simulate", config, "--runs", tmp_path / "runs", "--json"))
    events: dict[int, list[SampledGaussianEvent]] = {}
    for line in (tmp_path / "runs" / "tiny" / "events.jsonl").read_text().splitlines():
        item = json.loads(line)
        if item["kind"] == "site":
            events.setdefault(item["site"], []).extend(map(SampledGaussianEvent.from_json, item["events"]))
    worst = max(epsilon_rdp(e, summary["delta"]) for e in events.values())
    assert worst == pytest.approx(summary["epsilon_rdp_max"], abs=1e-9)
    assert all(sum(e.steps for e in site) == 3 + 3 * 2 for site in events.values())


def test_a_second_run_does_not_destroy_the_first(config: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    invoke("simulate", config, "--runs", runs, "--json")
    first = (runs / "tiny-1" / "adapter" / "adapter_model.safetensors").read_bytes()
    invoke("simulate", config, "--runs", runs, "--json")
    assert (runs / "tiny").resolve().name == "tiny-2"
    assert (runs / "tiny-1" / "adapter" / "adapter_model.safetensors").read_bytes() == first
    # One seed, two runs: the noise differs.
    assert (runs / "tiny-2" / "adapter" / "adapter_model.safetensors").read_bytes() != first


def test_the_model_card_loads_the_adapter_with_plain_peft(config: Path, tmp_path: Path) -> None:
    """The card's own code, run where none of our packages can be imported, gives the accuracy we claim."""
    summary = json.loads(invoke("simulate", config, "--runs", tmp_path / "runs", "--json"))
    adapter = (tmp_path / "runs" / "tiny" / "adapter").resolve()
    card = (adapter / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    fleet = open_fleet((tmp_path / "runs" / "tiny-1").resolve())
    public = fleet.split.public
    texts = tmp_path / "public.json"
    texts.write_text(json.dumps([public.text, public.label]))
    code = code.replace('["some text"]', f"__import__('json').load(open({str(texts)!r}))[0]")
    code += f"""
import json, sys
assert not {{"common", "client", "server", "simulations"}} & set(sys.modules)
said = [{list(fleet.split.labels)!r}[i] for i in logits.argmax(-1)]
wanted = json.load(open({str(texts)!r}))[1]
print("ACCURACY", sum(a == b for a, b in zip(said, wanted)) / len(wanted))
"""
    script = tmp_path / "card.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, "-I", str(script)], cwd=adapter, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    accuracy = float(done.stdout.split("ACCURACY")[1])
    assert accuracy == pytest.approx(summary["accuracy_final"], abs=1e-9)


def _kill_and_resume(run: Path, cwd: Path, delays: list[float]) -> int:
    """Resume the run, kill it -9 after each delay, then let it finish; how many kills hit a live run."""
    kills = 0
    for delay in delays:
        process = subprocess.Popen(
            command("simulate", "--resume", run, "--json"),
            cwd=cwd,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        events = run / "events.jsonl"
        before = events.stat().st_size if events.exists() else 0
        # Wait until it works, then a random moment more: most kills should hit training, not imports.
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if events.exists() and events.stat().st_size > before:
                break
            time.sleep(0.01)
        time.sleep(delay)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    return kills


def _result(run: Path) -> dict[str, bytes]:
    newest = sorted((run / "checkpoints").glob("round-*.safetensors"))[-1]
    assert newest.name == "round-000007.safetensors"
    names = ["adapter/adapter_model.safetensors", "adapter/head.safetensors"]
    found = {name: (run / name).read_bytes() for name in names}
    found.update({name: value.tobytes() for name, value in load_file(newest).items()})
    for ledger in sorted((run / "sites").glob("*/ledger.sqlite")):
        with closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)) as connection:
            rows = connection.execute("SELECT body, hash, signature FROM entries ORDER BY seq").fetchall()
        found[ledger.parent.name] = repr(rows).encode()
    assert len(found) > 5
    return found


def _twins(config: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two folders of one run that has not begun: the same configuration, secret and keys."""
    from common.config import load_config
    from simulations.run import create_folder, prepare

    resolved, _ = prepare(load_config(config, ["run.rounds=6", "training.local_steps=8"]))
    first = create_folder(tmp_path / "runs", resolved).path
    second = tmp_path / "runs" / "twin"
    shutil.copytree(first, second)
    return first, second


def test_killed_and_resumed_equals_undisturbed(config: Path, tmp_path: Path) -> None:
    first, second = _twins(config, tmp_path)
    undisturbed = run_process("simulate", "--resume", first, "--json", cwd=tmp_path)
    assert undisturbed.returncode == 0, undisturbed.stderr
    rng = np.random.default_rng()
    kills = _kill_and_resume(second, tmp_path, list(rng.uniform(0, 0.4, 3)))
    done = run_process("simulate", "--resume", second, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert kills > 0
    assert _result(first) == _result(second)
    a, b = json.loads(undisturbed.stdout), json.loads(done.stdout)
    assert (a["accuracy_final"], a["epsilon_rdp_max"]) == (b["accuracy_final"], b["epsilon_rdp_max"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_thirty_random_points(config: Path, tmp_path: Path) -> None:
    first, second = _twins(config, tmp_path)
    pristine = shutil.copytree(first, tmp_path / "pristine")
    assert run_process("simulate", "--resume", first, "--json", cwd=tmp_path).returncode == 0
    rng = np.random.default_rng()
    for _ in range(10):
        shutil.rmtree(second)
        shutil.copytree(pristine, second)
        _kill_and_resume(second, tmp_path, list(rng.uniform(0, 0.5, 3)))
        assert run_process("simulate", "--resume", second, "--json", cwd=tmp_path).returncode == 0
        assert _result(first) == _result(second)


def test_study_switches_stamp_everything(config: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    plain = json.loads(invoke("simulate", config, "--runs", runs, "--json", "--insecure-plain-updates"))
    assert plain["private"] and not plain["secure_aggregation"]
    for file in ("report.html", "adapter/README.md"):
        assert "in the clear (--insecure-plain-updates)" in (runs / "tiny" / file).read_text()
    for switch in (["--insecure-no-privacy"], ["--study-noise-seed", "7"]):
        summary = json.loads(invoke("simulate", config, "--runs", runs, "--json", *switch))
        assert not summary["private"]
        assert "NOT PRIVATE" in summary["privacy_statement"]
        assert "NOT PRIVATE" in (runs / "tiny" / "adapter" / "README.md").read_text()
        assert "NOT PRIVATE" in (runs / "tiny" / "report.html").read_text()
    first = load_file(runs / "tiny-3" / "adapter" / "adapter_model.safetensors")
    invoke("simulate", config, "--runs", runs, "--json", "--study-noise-seed", "7")
    again = load_file(runs / "tiny-4" / "adapter" / "adapter_model.safetensors")
    assert all(np.array_equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(
    "key", ["privacy.insecure_disabled=true", "study.noise_seed=1", "study.plain_updates=true"]
)
def test_no_file_and_no_override_turns_privacy_off(config: Path, key: str) -> None:
    with pytest.raises(ConfideError, match="command line"):
        invoke("simulate", config, "--set", key)


def test_dry_run_prints_the_plan_and_spends_nothing(config: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    plan = json.loads(invoke("simulate", config, "--runs", runs, "--dry-run", "--json"))
    assert set(plan) >= {
        "noise_multiplier",
        "sample_rate",
        "steps",
        "delta",
        "epsilon_rdp",
        "epsilon_pld",
        "trainable_parameters",
        "bytes_up_per_site_round",
    }
    assert plan["steps"] == 3 + 3 * 2
    assert plan["epsilon_rdp"] <= 8.0
    assert not runs.exists()
    assert "ε of a site after each round" in invoke("simulate", config, "--runs", runs, "--dry-run")


def test_doctor_passes(tmp_path: Path) -> None:
    report = json.loads(invoke("doctor", "--json"))
    assert report["self_test_passed"]
    assert len(report["composition"]) == 9


@pytest.mark.parametrize("arguments", [["--help"], ["simulate", "--help"], ["doctor", "--help"]])
def test_help_teaches(arguments: list[str]) -> None:
    assert "Usage" in invoke(*arguments)


def test_a_language_model_learns_to_answer(tmp_path: Path, llama_folder: Path, data_file: Path) -> None:
    """causal-lm from the command line, in alternate rounds of A and B, with a server optimizer."""
    path = tmp_path / "confide.toml"
    path.write_text(
        f"""
[run]
rounds = 4
threads = 1
[task]
kind = "causal-lm"
[model]
name = "{llama_folder}"
max_length = 24
[adapter]
method = "rolora"
[data]
train = "{data_file}"
prompt = "prompt"
[sites]
count = 3
[privacy]
delta = 1e-3
sample_rate = 0.5
[training]
learning_rate = 0.3
[server]
optimizer = "fedavgm"
"""
    )
    summary = json.loads(
        invoke("simulate", path, "--runs", tmp_path / "runs", "--json", "--study-noise-seed", "1")
    )
    assert summary["task"] == "causal-lm"
    assert summary["loss_final"] < summary["loss_initial"]
    assert summary["epsilon_rdp_max"] <= 8.0
    parts = [
        json.loads(line)["part"]
        for line in (tmp_path / "runs" / "run" / "events.jsonl").read_text().splitlines()
        if '"kind":"round"' in line
    ]
    assert parts == ["start", "b+head", "a+head", "b+head", "a+head"]


@pytest.mark.slow
def test_ray_and_inline_agree(config: Path, tmp_path: Path) -> None:
    """The same apps, the same secret: the two engines differ by the order of a float64 sum at most."""
    first, second = _twins(config, tmp_path)
    for run, engine in ((first, "inline"), (second, "ray")):
        done = run_process("simulate", "--resume", run, "--engine", engine, "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["engine"] == engine
    a = load_file(first / "adapter" / "adapter_model.safetensors")
    b = load_file(second / "adapter" / "adapter_model.safetensors")
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=1e-5, err_msg=name)
