"""A small federation on a tiny model, as a confide.toml."""

from __future__ import annotations

from pathlib import Path

import pytest


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
