"""A small federation on a tiny model, as a confide.toml."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import World, tiny_config, tiny_model
from tests.e2e.service import Service, adapter, serving


@pytest.fixture
def config(tmp_path: Path, bert_folder: Path, data_file: Path) -> Path:
    path = tmp_path / "confide.toml"
    path.write_text(
        f"""
[run]
name = "tiny"
rounds = 3
threads = 1
[model]
name = "{bert_folder}"
head = "mean"
max_length = 32
[adapter]
rank = 2
[data]
train = "{data_file}"
group = "group"
[sites]
count = 3
holdout = 0.1
[privacy]
sample_rate = 0.3
delta = 1e-3
[warmup]
rounds = 1
local_steps = 3
target_epsilon = 4.0
[training]
local_steps = 2
"""
    )
    return path


@pytest.fixture(scope="session")
def talker(bpe_folder: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(bpe_folder, data_file, task={"kind": "causal-lm"})
    return adapter(tiny_model(config), config, tmp_path_factory.mktemp("run") / "adapter")


@pytest.fixture(scope="session")
def chat(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    log = tmp_path_factory.mktemp("chat") / "log"
    with serving(talker, log, "--waiting", "1", "--max-tokens", "4000", "--max-megabytes", "1") as service:
        yield service


@pytest.fixture(scope="session")
def judge(world: Callable[..., World], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    this, folder = world("bert-mean"), tmp_path_factory.mktemp("judge")
    with serving(adapter(this.model, this.config, folder / "adapter"), folder / "log") as service:
        yield service
