"""One file, every key checked, every key overridable, and a digest that tells two apart."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from common.config import AdapterMethod, RunConfig, load_config, parse_config
from common.errors import ConfigError

MINIMAL = '[model]\nname = "sample:all-minilm-l6-v2"\n[data]\nsample = "rotten-tomatoes"\n'
SECTIONS = {
    name: field.annotation
    for name, field in RunConfig.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
}
KEYS = [(section, key) for section, model in SECTIONS.items() for key in model.model_fields]


def write(folder: Path, text: str) -> Path:
    path = folder / "confide.toml"
    path.write_text(text, encoding="utf-8")
    return path


def loaded(folder: Path, text: str = MINIMAL, *overrides: str) -> RunConfig:
    return load_config(write(folder, text), overrides)


def refusal(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(folder, text, *overrides)
    return str(caught.value)


def test_defaults(tmp_path: Path) -> None:
    config = loaded(tmp_path)
    assert config.adapter.method is AdapterMethod.FFA
    assert not config.privacy.insecure_disabled and config.study.noise_seed is None
    assert not config.model.allow_pickle


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("[privacy]\ntarget_epsilo = 3\n", "privacy.target_epsilon"),
        ("[training]\nlearning_rat = 3\n", "training.learning_rate"),
        ("[sever]\nfraction = 0.5\n", "server"),
        ("[privacy]\nepsilon = 3\n", "privacy.target_epsilon"),
    ],
)
def test_an_unknown_key_names_the_nearest_right_one(tmp_path: Path, wrong: str, nearest: str) -> None:
    text = refusal(tmp_path, MINIMAL + wrong)
    assert f"did you mean {nearest}?" in text and "confide.toml" in text


@pytest.mark.parametrize(
    ("override", "key", "found"),
    [
        ('run.rounds="ten"', "run.rounds", "'ten'"),
        ("run.rounds=0", "run.rounds", "0"),
        ("run.rounds=1.5", "run.rounds", "1.5"),
        ("privacy.target_epsilon=0", "privacy.target_epsilon", "0"),
        ("privacy.target_epsilon=-1", "privacy.target_epsilon", "-1"),
        ("privacy.target_epsilon=inf", "privacy.target_epsilon", "inf"),
        ("privacy.target_epsilon=nan", "privacy.target_epsilon", "nan"),
        ("privacy.sample_rate=1.01", "privacy.sample_rate", "1.01"),
        ("privacy.noise_multiplier=0", "privacy.noise_multiplier", "0"),
        ("privacy.delta=1", "privacy.delta", "1"),
        ("privacy.unit=site", "privacy.unit", "'site'"),
        ("adapter.method=dora", "adapter.method", "'dora'"),
        ("adapter.layers=[0.5]", "adapter.layers.0", "0.5"),
        ("run.name=../elsewhere", "run.name", "'../elsewhere'"),
    ],
)
def test_a_wrong_value_names_key_and_value(tmp_path: Path, override: str, key: str, found: str) -> None:
    text = refusal(tmp_path, MINIMAL, override)
    assert text.startswith(f"{key}: ") and f"found {found}" in text


@pytest.mark.parametrize(
    "override",
    ['privacy.insecure_disabled="yes"', "privacy.insecure_disabled=1", 'run.rounds="3"', "run.rounds=true"],
)
def test_a_value_of_another_type_is_not_guessed_at(tmp_path: Path, override: str) -> None:
    refusal(tmp_path, MINIMAL, override)


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    text = refusal(tmp_path, "[run]\nrounds = 0\nname = 3\n[modle]\n")
    assert [line.split()[0] for line in text.splitlines()] == [
        "run.name:",
        "run.rounds:",
        "model",
        "data",
        "unknown",
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train=x.csv"], "exactly one of data.sample and data.train"),
        (["model.head=mean", "task.kind=causal-lm"], "model.head"),
        (["sites.partition=groups"], "needs data.group"),
        (["warmup.rounds=1"], "needs model.head = 'mean'"),
        (["warmup.rounds=1", "model.head=mean", "adapter.train_head=false"], "adapter.train_head"),
        (
            ["warmup.rounds=1", "model.head=mean", "privacy.target_epsilon=2"],
            "less than privacy.target_epsilon",
        ),
        (["server.give_up_after=-1"], "server.give_up_after"),
    ],
)
def test_keys_that_do_not_fit_together(tmp_path: Path, overrides: list[str], message: str) -> None:
    assert message in refusal(tmp_path, MINIMAL, *overrides)


def test_overrides(tmp_path: Path) -> None:
    config = loaded(
        tmp_path,
        MINIMAL + "[privacy]\ntarget_epsilon = 8\n",
        "privacy.target_epsilon=3",
        "run.name=words-need-no-quotes",
        'data.text = "the text"',
        "adapter.layers=[-2, -1]",
        "adapter.train_head=false",
        "privacy.delta=1e-6",
    )
    assert config.privacy.target_epsilon == 3
    assert config.run.name == "words-need-no-quotes"
    assert config.data.text == "the text"
    assert config.adapter.layers == (-2, -1)
    assert not config.adapter.train_head
    assert config.privacy.delta == 1e-6


@pytest.mark.parametrize("override", ["privacy", "=3", "rounds=3", "a.b.c=3", ".rounds=3", "run.=3", ""])
def test_an_override_of_another_form_is_refused(tmp_path: Path, override: str) -> None:
    assert "--set expects section.key=value" in refusal(tmp_path, MINIMAL, override)


def test_an_override_of_what_is_no_section_is_refused(tmp_path: Path) -> None:
    assert "not a section" in refusal(tmp_path, "model = 3\n", "model.name=x")


@pytest.mark.parametrize("content", [b"[run\n", b"\xff\xfe", b"a = 1\na = 2\n"])
def test_a_file_that_is_no_toml(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "confide.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(path)
    with pytest.raises(ConfigError, match="no configuration at"):
        load_config(tmp_path)


def test_relative_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "models").mkdir()
    text = '[model]\nname = "../models"\n[data]\ntrain = "../d/train.csv"\ntest = "/abs/test.csv"\n'
    config = loaded(tmp_path / "conf", text)
    assert config.data.train == tmp_path / "d" / "train.csv"
    assert config.data.test == Path("/abs/test.csv")
    assert config.model.name == str(tmp_path / "models")
    # What is no folder beside the file is a hub id, whatever the current folder holds.
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        assert loaded(tmp_path / "conf", text.replace("../models", "models")).model.name == "models"
    finally:
        os.chdir(here)


def changed(value: Any) -> Any:
    match value:
        case bool():
            return not value
        case Enum():
            return next((m for m in type(value) if m is not value), "another")
        case int() | float():
            return value + 1
        case str() | Path():
            return f"{value}x"
        case tuple():
            return (*value, 1)
        case _:
            return 1


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.parametrize(("section", "key"), KEYS)
def test_the_digest_depends_on_every_key(section: str, key: str) -> None:
    config = parse_config({"model": {"name": "m"}, "data": {"sample": "s"}}, source="a test")
    part = getattr(config, section)
    other = config.model_copy(update={section: part.model_copy(update={key: changed(getattr(part, key))})})
    assert other.digest() != config.digest()


def test_a_configuration_survives_its_own_toml(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    text = """
    [run]
    name = "n"
    [task]
    labels = ["ä", "b \\"quoted\\""]
    [model]
    name = "model"
    head = "mean"
    [adapter]
    layers = [-1]
    target_modules = ["query"]
    [data]
    train = "train.csv"
    group = "g"
    [sites]
    partition = "groups"
    [warmup]
    rounds = 2
    [privacy]
    delta = 1e-6
    noise_multiplier = 0.8375
    [study]
    noise_seed = 5
    """
    config = loaded(tmp_path, text)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    again = loaded(elsewhere, config.to_toml())
    assert again == config and again.digest() == config.digest()
    assert loaded(elsewhere, again.to_toml()).to_toml() == config.to_toml()


def test_no_label_column_survives_toml(tmp_path: Path) -> None:
    data = {"model": {"name": "m"}, "data": {"sample": "s", "label": None}, "task": {"kind": "causal-lm"}}
    config = parse_config(data, source="a test")
    assert loaded(tmp_path, config.to_toml()) == config


def test_a_configuration_is_frozen() -> None:
    config = parse_config({"model": {"name": "m"}, "data": {"sample": "s"}}, source="a test")
    with pytest.raises(ValueError, match="frozen"):
        config.privacy.target_epsilon = 9  # type: ignore[misc]
