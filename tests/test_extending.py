"""The example of docs/extending.md is a task: it passes what every task must pass, and it learns."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client.selftest import self_test
from client.training import Shard, train
from common.adapter import read_vector, write_vector
from common.evaluation import evaluate
from common.features import FeatureCache
from common.models import load_model
from common.noise import NoiseStream
from common.plan import make_plan, resolve
from common.tables import Table
from common.tasks import Task, collate
from tests.common.test_tasks import first_gradient
from tests.conftest import moved, tiny_config

TEXT = (Path(__file__).parents[1] / "docs" / "extending.md").read_text("utf-8")
LEVELS = ("one", "two", "three")


@pytest.fixture
def rating() -> Any:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    module = types.ModuleType("extending_example")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(code, module.__dict__)
    return module.__dict__["Rating"](LEVELS)


def test_it_takes_under_eighty_lines() -> None:
    assert len(TEXT.splitlines()) <= 80


def test_the_example_passes_and_learns(rating: Task, bert_folder: Path, data_file: Path) -> None:
    config = tiny_config(bert_folder, data_file, model={"head": "mean"}, privacy={"target_epsilon": 300.0})
    config = resolve(config, smallest_site=60, labels=(), threads=1)
    model = load_model(config, rating)
    rng = np.random.default_rng(0)
    marks = rng.integers(0, 3, 60)
    texts = tuple(" ".join([("bad", "some", "good")[m]] * 2 + [f"w{i % 40}"]) for i, m in enumerate(marks))
    table = Table("t", texts, tuple(LEVELS[m] for m in marks), None, None, tuple(range(60)))
    examples = rating.encode(table, model.tokenizer, 32)
    start = read_vector(model.parameters, model.layout)
    for part in {r.part for r in make_plan(config).rounds}:
        self_test(model, part)
    alone = first_gradient(model, examples, [0])
    assert float((first_gradient(model, examples, [0, 5, 9]) - alone).norm()) <= 1e-5 * float(alone.norm())
    write_vector(model.parameters, model.layout, moved(model))
    batch = collate(examples, range(9), model.pad_id, model.device)
    with torch.no_grad():
        assert rating.record_losses(model.logits(batch.inputs), batch).shape == (9,)
    plan = make_plan(
        config.model_copy(
            update={
                "training": config.training.model_copy(update={"local_steps": 40, "learning_rate": 5.0}),
                "privacy": config.privacy.model_copy(update={"sample_rate": 0.9, "max_grad_norm": 1.0}),
            }
        )
    ).round(1)
    shard = Shard(examples, np.arange(60))
    update = train(model, shard, plan, start, NoiseStream(bytes(32)), FeatureCache())
    before, after = (evaluate(model, v, examples, np.arange(60)) for v in (start, start + update))
    assert after.scores["accuracy"] > before.scores["accuracy"] + 0.2
    assert after.scores["steps off"] < before.scores["steps off"]
