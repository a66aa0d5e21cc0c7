"""Metrics as sums: the same in parts, in any micro-batch, with and without features."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from common.adapter import Layout
from common.errors import ModelError
from common.evaluation import MetricSums, evaluate
from common.features import FeatureCache
from common.models import Part
from common.tasks import collate
from tests.conftest import KINDS, World, moved

Worlds = Callable[..., World]


@pytest.mark.parametrize("kind", KINDS)
def test_parts_add_up_to_the_whole(world: Worlds, kind: str) -> None:
    this = world(kind)
    vector = moved(this.model)
    order = np.random.default_rng(0).permutation(len(this.examples))
    whole = evaluate(this.model, vector, this.examples, order)
    parts = [evaluate(this.model, vector, this.examples, p, micro_batch=7) for p in np.split(order, [30, 31])]
    assert whole.count == len(this.examples) == sum(p.count for p in parts)
    assert sum(p.loss for p in parts) == pytest.approx(whole.loss, rel=1e-5)
    assert sum(p.correct for p in parts) == pytest.approx(whole.correct, rel=1e-5)


def test_accuracy_is_the_share_of_right_answers(world: Worlds) -> None:
    this = world("bert-default")
    sums = evaluate(this.model, moved(this.model), this.examples, np.arange(40))
    right = 0
    for i in range(40):
        batch = collate(this.examples, [i], this.model.pad_id, this.model.device)
        with torch.no_grad():
            right += int(this.model.logits(batch.inputs).argmax()) == int(this.examples.target[i])
    assert 0 < right < 40, "choose another vector"
    assert sums.accuracy == right / 40
    assert MetricSums(6.0, 1.0, 4).mean_loss == 1.5


def test_the_adapter_asked_for_is_the_one_evaluated(world: Worlds) -> None:
    this = world("bert-mean")
    losses = {
        evaluate(this.model, moved(this.model, s), this.examples, np.arange(20)).loss for s in (1, 2, 1)
    }
    assert len(losses) == 2


def test_features_save_the_encoder_s_work_and_change_nothing(
    world: Worlds, monkeypatch: pytest.MonkeyPatch
) -> None:
    this = world("bert-mean")
    model, cache, indices = this.model, FeatureCache(), np.arange(0, 160, 2)
    calls: list[int] = []
    features = type(model.module).features
    monkeypatch.setattr(
        type(model.module), "features", lambda *a, **k: (calls.append(1), features(*a, **k))[1]
    )

    def measure(vector: np.ndarray, cached: bool) -> MetricSums:
        calls.clear()
        return evaluate(model, vector, this.examples, indices, cache if cached else None)

    vector = moved(model)
    head = model.layout.positions(Layout.of(model.active(Part.HEAD)))
    other_head, other_encoder = vector.copy(), vector + np.float32(0.3)
    other_head[head] += 0.3
    other_encoder[head] -= 0.3
    for candidate, fresh in [(vector, True), (vector, False), (other_head, False), (other_encoder, True)]:
        cached = measure(candidate, True)
        assert bool(calls) is fresh
        plain = measure(candidate, False)
        assert cached.loss == pytest.approx(plain.loss, rel=1e-5)
        assert (cached.correct, cached.count) == (plain.correct, plain.count)


def test_features_of_other_examples_are_not_taken(world: Worlds) -> None:
    this = world("bert-mean")
    cache, vector = FeatureCache(), moved(this.model)
    first = evaluate(this.model, vector, this.examples, np.arange(10), cache)
    swapped = type(this.examples)(
        this.examples.tokens[::-1].copy(), this.examples.starts, this.examples.target
    )
    second = evaluate(this.model, vector, swapped, np.arange(10), cache)
    assert second.loss == pytest.approx(evaluate(this.model, vector, swapped, np.arange(10)).loss, rel=1e-5)
    assert second.loss != first.loss


def test_features_need_the_mean_head(world: Worlds) -> None:
    this = world("bert-default")
    with pytest.raises(ModelError, match="mean-pooled head"):
        FeatureCache().of(this.model, this.examples, np.arange(3))
