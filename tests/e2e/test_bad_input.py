"""Bad input: a clear one-screen error, an exit code that means something, and nothing half-written."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from common.errors import (
    CheckpointError,
    ConfideError,
    ConfigError,
    DataError,
    ModelError,
    PrivacyError,
    RoundError,
)
from common.ledger_errors import RolledBackError
from tests.e2e.command import invoke, run_process

Fault = tuple[str, list[str], type[ConfideError], str]

_PLAIN = ['model.head="default"', "warmup.rounds=0"]  # the tasks that have no mean-pooled head
_NUMBERS = ['task.kind="regression"', 'data.label="number"']

# name, overrides, error, what the message must say
FAULTS: list[Fault] = [
    ("missing file", ['data.train="nowhere.csv"'], DataError, "nowhere.csv"),
    ("missing column", ['data.text="txt"'], DataError, "txt"),
    ("unseen label", ['task.labels=["bad","worse"]'], DataError, "task.labels"),
    ("target epsilon not positive", ["privacy.target_epsilon=0"], ConfigError, "privacy.target_epsilon"),
    ("negative noise", ["privacy.noise_multiplier=-1.0"], ConfigError, "privacy.noise_multiplier"),
    ("too little noise for the target", ["privacy.noise_multiplier=0.4"], PrivacyError, "target_epsilon"),
    ("batch larger than a site", ["privacy.nominal_records=4000"], PrivacyError, "nominal_records"),
    ("more sites than records", ["sites.count=1000"], DataError, "1000"),
    ("more sites than groups", ['sites.partition="groups"', "sites.count=20"], DataError, "20"),
    ("delta above one over the records", ["privacy.delta=0.5"], PrivacyError, "privacy.delta"),
    ("unknown target module", ['adapter.target_modules=["q_proj"]'], ModelError, "query"),
    ("layer that is not there", ["adapter.layers=[7]"], ModelError, "adapter.layers"),
    ("missing model", ['model.name="no/such/model"'], ModelError, "no/such/model"),
    ("unknown key", ["privacy.epsilon=3"], ConfigError, "target_epsilon"),
    ("unknown device", ['run.device="tpu9"'], ModelError, "run.device"),
    ("more tokens than positions", ["model.max_length=600"], ModelError, "model.max_length"),
    ("a language model of an encoder", ['task.kind="causal-lm"'], ConfigError, "model.head"),
    ("tags that are none", [*_PLAIN, 'task.kind="token-classification"'], DataError, "BIO tags"),
    ("no question", [*_PLAIN, 'task.kind="question-answering"'], ConfigError, "data.prompt"),
    (
        "an answer that is nowhere",
        [*_PLAIN, 'task.kind="question-answering"', 'data.prompt="prompt"', 'data.label="prompt"'],
        DataError,
        "word for word",
    ),
    ("numbers without bounds", ['task.kind="regression"'], ConfigError, "task.range"),
    ("numbers beyond their bounds", [*_NUMBERS, "task.range=[0, 5]"], DataError, "task.range"),
    (
        "numbers divided by label",
        [*_NUMBERS, "task.range=[0, 10]", 'sites.partition="dirichlet"'],
        ConfigError,
        "no one label a record",
    ),
    ("weights without labels", ["task.class_weights=[1, 2]"], ConfigError, "task.class_weights"),
    (
        "labels of a language model",
        [*_PLAIN, 'task.kind="causal-lm"', 'task.labels=["a"]'],
        ConfigError,
        "labels",
    ),
    ("a template of no column", ['data.template="{wieght}"'], DataError, "wieght"),
    ("a device that hides", ['run.device="meta"'], ModelError, "run.device"),
    ("a flag that is text", ['adapter.train_head="yes"'], ConfigError, "adapter.train_head"),
    ("a seed without bounds", ["run.seed=1180591620717411303424"], ConfigError, "run.seed"),
    ("min_cohort above count", ["aggregation.min_cohort=9"], ConfigError, "aggregation.min_cohort"),
    ("two sites", ["sites.count=2", "sites.partition=iid"], ConfigError, "--insecure-plain-updates"),
    ("min_cohort of two", ["aggregation.min_cohort=2"], ConfigError, "3*c_max + 1"),
    ("too many colluders", ["aggregation.c_max=2"], ConfigError, "3*c_max + 1"),
    ("warm-up without its head", ['model.head="default"'], ConfigError, "warmup.rounds"),
]


@pytest.mark.parametrize(("name", "overrides", "error", "says"), FAULTS, ids=[f[0] for f in FAULTS])
def test_fault(
    name: str,
    overrides: list[str],
    error: type[ConfideError],
    says: str,
    config: Path,
    tmp_path: Path,
) -> None:
    runs = tmp_path / "runs"
    options = [part for key in overrides for part in ("--set", key)]
    with pytest.raises(error) as caught:
        invoke("simulate", config, "--runs", runs, "--json", *options)
    message = str(caught.value)
    assert says in message
    assert len(message) < 1500
    assert message.count("\n") < 12
    assert not runs.exists()


def test_the_command_line_prints_no_traceback(config: Path, tmp_path: Path) -> None:
    done = run_process("simulate", config, "--set", "privacy.epsilon=3", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "did you mean privacy.target_epsilon" in " ".join(done.stderr.split())


def test_nan_in_the_data(config: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text("text,label,group\nfine,good,g1\nnan,bad,g2\n")
    with pytest.raises(DataError, match="row 3"):
        invoke("simulate", config, "--set", f'data.train="{bad}"')


def test_an_empty_site(config: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.csv"
    empty.write_text("text,label,group\n")
    with pytest.raises(DataError, match=r"empty\.csv"):
        invoke("simulate", config, "--set", f'data.train="{empty}"')


def test_training_that_diverges_stops_with_a_reason(config: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    keys = ("warmup.learning_rate=3e38", "warmup.momentum=0.99", "warmup.local_steps=60")
    options = [part for key in keys for part in ("--set", key)]
    with pytest.raises(RoundError, match=r"failed-model.*learning_rate"):
        invoke("simulate", config, "--runs", runs, *options, "--json")
    assert not (runs / "tiny" / "summary.json").exists()
    assert not (runs / "tiny" / "adapter").exists()


def test_a_model_whose_weights_are_not_finite(config: Path, tmp_path: Path, bert_folder: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(bert_folder, broken)
    weights = load_file(broken / "model.safetensors")
    name = "encoder.layer.0.output.dense.weight"
    weights[name] = np.full_like(weights[name], np.nan)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="not finite"):
        invoke("simulate", config, "--set", f'model.name="{broken}"', "--json", "--runs", tmp_path / "runs")


def test_a_corrupt_checkpoint_is_named(config: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    invoke("simulate", config, "--runs", runs, "--json")
    newest = sorted((runs / "tiny" / "checkpoints").glob("*.safetensors"))[-1]
    data = bytearray(newest.read_bytes())
    data[-3] ^= 1
    newest.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=newest.name):
        invoke("simulate", "--resume", runs / "tiny", "--json")


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.toml"):
        invoke("simulate", "--resume", tmp_path)


def test_a_changed_configuration_is_noticed(config: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    invoke("simulate", config, "--runs", runs, "--json")
    resolved = (runs / "tiny" / "config.toml").resolve()
    resolved.write_text(resolved.read_text().replace("max_grad_norm = 0.5", "max_grad_norm = 5.0"))
    with pytest.raises(CheckpointError, match="another configuration"):
        invoke("simulate", "--resume", runs / "tiny", "--json")


def test_data_that_changed_under_a_run(config: Path, tmp_path: Path, data_file: Path) -> None:
    """One edited record would be trained on under the noise of the old one."""
    own = tmp_path / "own.csv"
    shutil.copy(data_file, own)
    runs = tmp_path / "runs"
    invoke("simulate", config, "--runs", runs, "--json", "--set", f'data.train="{own}"')
    own.write_text(own.read_text().replace("w1 ", "w2 ", 1))
    with pytest.raises(CheckpointError, match="other data"):
        invoke("simulate", "--resume", runs / "tiny", "--json")


def test_a_ledger_that_was_lost(config: Path, tmp_path: Path) -> None:
    """Without it the site would begin again with a full budget, and the claim would be zero."""
    runs = tmp_path / "runs"
    invoke("simulate", config, "--runs", runs, "--json")
    run = runs / "tiny"
    (run / "sites" / "0002" / "ledger.sqlite").unlink()
    with pytest.raises(RolledBackError, match="0002"):
        invoke("simulate", "--resume", run, "--json")
    # Neither does it help to lose the witness as well: the server has receipts.
    (run / "witnesses" / "0002.ledger").unlink()
    with pytest.raises(RolledBackError, match="0002"):
        invoke("simulate", "--resume", run, "--json")


@pytest.mark.parametrize("content", [b"", b"short"])
def test_a_secret_that_is_no_key(config: Path, tmp_path: Path, content: bytes) -> None:
    runs = tmp_path / "runs"
    invoke("simulate", config, "--runs", runs, "--json")
    (runs / "tiny" / "secret.key").write_bytes(content)
    with pytest.raises(PrivacyError, match="key the noise"):
        invoke("simulate", "--resume", runs / "tiny", "--json")


def test_a_resumed_configuration_does_not_turn_privacy_off(config: Path, tmp_path: Path) -> None:
    from common.config import load_config
    from simulations.run import create_folder, prepare

    resolved, _ = prepare(load_config(config))
    folder = create_folder(tmp_path / "runs", resolved)
    text = folder.config.read_text().replace("insecure_disabled = false", "insecure_disabled = true")
    folder.config.write_text(text)
    with pytest.raises(ConfigError, match="insecure-no-privacy"):
        invoke("simulate", "--resume", folder.path, "--json")


def test_public_records_that_are_training_records(config: Path, tmp_path: Path, data_file: Path) -> None:
    with pytest.raises(DataError, match="public records"):
        invoke("simulate", config, "--runs", tmp_path / "runs", "--set", f'data.test="{data_file}"')


def test_a_folder_for_runs_that_is_a_file(config: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("in the way")
    with pytest.raises(ConfigError, match="--runs"):
        invoke("simulate", config, "--runs", tmp_path / "runs", "--json")
