"""DP-SGD against a slow oracle: one record at a time, no hooks, no micro-batches; and planted faults."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from opacus.optimizers import DPOptimizer
from scipy import stats

import client.training
from client.selftest import self_test
from client.training import CsprngDPOptimizer, Shard, poisson_sample, train
from common.adapter import Layout, Vector, read_vector, write_vector
from common.config import LocalOptimizer
from common.errors import ModelError, PrivacyError
from common.features import FeatureCache
from common.models import AdaptedModel, Part
from common.noise import NoiseStream
from common.plan import RoundPlan
from common.privacy import SampledGaussianEvent
from common.tasks import collate
from tests.conftest import KINDS, World, moved, tiny_config, tiny_model

KEY = bytes(range(32))
Worlds = Callable[..., World]


def round_plan(
    *,
    part: Part = Part.ALL,
    steps: int = 2,
    rate: float = 0.1,
    sigma: float = 0.3,
    clip: float = 0.1,
    batch: int = 4,
    private: bool = True,
    **changes: Any,
) -> RoundPlan:
    event = SampledGaussianEvent(rate, sigma, steps, clip, batch) if private else None
    plan = RoundPlan(part, event, None, steps, rate, batch, 0.5, 0.0, LocalOptimizer.SGD, 0.0, 8)
    return dataclasses.replace(plan, **changes)


def shard_of(world: World, records: int = 60) -> Shard:
    return Shard(world.examples, np.arange(7, 7 + records))


def trained(world: World, plan: RoundPlan, *, key: bytes = KEY, records: int = 60) -> Vector:
    shard = shard_of(world, records)
    return train(world.model, shard, plan, moved(world.model), NoiseStream(key), FeatureCache())


def record_gradients(model: AdaptedModel, shard: Shard, index: int, active: dict[str, Any]) -> list[Any]:
    for p in active.values():
        p.grad = None
    batch = collate(shard.examples, [index], model.pad_id, model.device)
    model.task.record_losses(model.logits(batch.inputs), batch).sum().backward()
    return [active[name].grad.detach().clone() for name in sorted(active)]


def oracle(world: World, plan: RoundPlan, *, key: bytes = KEY, records: int = 60) -> Vector:
    """What `train` should return, written the slow way."""
    model, shard, noise = world.model, shard_of(world, records), NoiseStream(key)
    write_vector(model.parameters, model.layout, moved(model))
    active = model.active(plan.part)
    parameters = [active[name] for name in sorted(active)]
    layout = Layout.of(active)
    before = read_vector(active, layout)
    anchor = [p.detach().clone() for p in parameters]
    optimizer: torch.optim.Optimizer
    if plan.optimizer is LocalOptimizer.SGD:
        optimizer = torch.optim.SGD(parameters, lr=plan.learning_rate, momentum=plan.momentum)
    else:
        optimizer = torch.optim.Adam(parameters, lr=plan.learning_rate)
    with model.training(active):
        for _ in range(plan.steps):
            total = [torch.zeros_like(p) for p in parameters]
            for index in shard.indices[noise.uniform(len(shard)) < plan.sample_rate]:
                gradients = record_gradients(model, shard, int(index), active)
                norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
                factor = min(1.0, plan.event.max_grad_norm / norm) if plan.event and norm else 1.0
                for t, g in zip(total, gradients, strict=True):
                    t += factor * g
            for p, t, origin in zip(parameters, total, anchor, strict=True):
                if plan.event:
                    t += noise.gaussian(p.shape, plan.event.noise_multiplier * plan.event.max_grad_norm)
                p.grad = t / plan.batch_size + plan.fedprox_mu * (p.detach() - origin)
            optimizer.step()
    return read_vector(active, layout) - before


def agrees(world: World, plan: RoundPlan, *, key: bytes = KEY) -> bool:
    got, want = trained(world, plan, key=key), oracle(world, plan, key=key)
    return got.shape == want.shape and bool(np.linalg.norm(got - want) <= 1e-4 * np.linalg.norm(want))


ALL_PARTS = [
    ("bert-mean", "ffa", Part.ALL),
    ("bert-mean", "ffa", Part.HEAD),
    ("bert-mean", "rolora", Part.A_AND_HEAD),
    ("bert-default", "ffa", Part.ALL),
    ("bert-default", "lora", Part.ALL),
    ("gpt2-classify", "rolora", Part.B_AND_HEAD),
    ("gpt2-causal", "ffa", Part.ALL),
    ("llama-causal", "lora", Part.ALL),
]


@pytest.mark.parametrize(("kind", "method", "part"), ALL_PARTS)
def test_a_round_is_the_oracle_s(world: Worlds, kind: str, method: str, part: Part) -> None:
    rng = np.random.default_rng(len(kind + method + part.value))
    for _ in range(3):
        plan = round_plan(
            part=part,
            steps=int(rng.integers(1, 4)),
            rate=float(rng.uniform(0.02, 0.3)),
            sigma=float(rng.uniform(0.05, 1)),
            clip=float(10 ** rng.uniform(-2, 1)),  # from all clipped to none
            batch=int(rng.integers(1, 20)),
            learning_rate=float(rng.uniform(0.1, 1)),
            momentum=float(rng.choice([0, 0.8])),
            fedprox_mu=float(rng.choice([0, 0.5])),
            micro_batch=int(rng.integers(1, 20)),
        )
        assert agrees(world(kind, method), plan, key=rng.bytes(32)), plan


def test_adam_takes_the_private_gradient(world: Worlds) -> None:
    assert agrees(world("bert-mean"), round_plan(optimizer=LocalOptimizer.ADAM, learning_rate=0.01, steps=3))


@pytest.mark.parametrize("mu", [0.0, 0.7])
def test_without_privacy_nothing_is_clipped_or_noised(world: Worlds, mu: float) -> None:
    plan = round_plan(private=False, steps=3, fedprox_mu=mu)
    assert agrees(world("bert-default"), plan)


@pytest.mark.parametrize("kind", ["bert-mean", "gpt2-causal"])
def test_the_micro_batch_changes_nothing_but_rounding(world: Worlds, kind: str) -> None:
    plans = [round_plan(rate=0.4, steps=3, micro_batch=size) for size in (1, 7, 64)]
    updates = [trained(world(kind), plan) for plan in plans]
    for other in updates[1:]:
        assert np.linalg.norm(other - updates[0]) <= 1e-5 * np.linalg.norm(updates[0])


def test_an_empty_batch_still_steps_with_noise(world: Worlds) -> None:
    this, plan = world("bert-mean"), round_plan(rate=1e-9, steps=1)
    assert len(poisson_sample(shard_of(this), plan.sample_rate, NoiseStream(KEY))) == 0
    update = trained(this, plan)
    assert plan.event is not None
    noise = NoiseStream(KEY)
    noise.uniform(60)
    std = plan.event.noise_multiplier * plan.event.max_grad_norm
    expected = [noise.gaussian(shape, std).reshape(-1).numpy() for _, shape in this.model.layout.entries]
    assert np.allclose(update, -plan.learning_rate * np.concatenate(expected) / plan.batch_size, atol=1e-6)


def test_an_empty_batch_among_others(world: Worlds) -> None:
    plan = round_plan(rate=0.02, steps=6)
    noise, sizes = NoiseStream(KEY), []
    for _ in range(plan.steps):
        sizes.append(int(noise.bernoulli(60, plan.sample_rate).sum()))
        for _, shape in world("bert-mean").model.layout.entries:
            noise.gaussian(shape, 1.0)
    assert 0 in sizes and max(sizes) > 0, "choose another key"
    assert agrees(world("bert-mean"), plan)


def test_one_key_gives_one_update_bit_for_bit(world: Worlds) -> None:
    plan = round_plan(rate=0.3)
    first = trained(world("bert-default"), plan)
    assert first.tobytes() == trained(world("bert-default"), plan).tobytes()
    other = trained(world("bert-default"), plan, key=bytes(32))
    assert np.mean(first == other) < 0.01


@pytest.mark.parametrize("kind", ["bert-mean", "gpt2-causal"])
def test_noise_has_the_promised_size(world: Worlds, kind: str) -> None:
    """Empty batches leave the noise alone: σC/b on every number, and none that goes without."""
    plan = round_plan(rate=1e-9, steps=1, sigma=1.3, clip=0.7, batch=5)
    drawn = np.stack([trained(world(kind), plan, key=bytes([i]) * 32) for i in range(40)])
    scaled = drawn / (-plan.learning_rate * 1.3 * 0.7 / 5)
    assert stats.kstest(scaled.reshape(-1), "norm").pvalue > 0.01
    assert stats.chi2.cdf(float((scaled**2).sum()), scaled.size) == pytest.approx(0.5, abs=0.495)
    assert (scaled.std(axis=0) > 0.4).all()


def test_no_record_moves_the_update_by_more_than_its_clip(world: Worlds) -> None:
    """The sensitivity itself: add a record, keep the noise, and measure."""
    this = world("bert-default")
    plan = round_plan(rate=1.0, steps=1, clip=0.05, batch=4)
    for records in (20, 33):
        wide, slim = (Shard(this.examples, np.arange(n)) for n in (records + 1, records))
        outputs = []
        for shard in (wide, slim):
            stream = NoiseStream(KEY)
            stream.uniform(40 - len(shard))  # so that both draw the same noise
            outputs.append(train(this.model, shard, plan, moved(this.model), stream, FeatureCache()))
        distance = np.linalg.norm((outputs[0] - outputs[1]).astype(np.float64)) / plan.learning_rate
        assert 0.9 * 0.05 / 4 < distance <= 1.0001 * 0.05 / 4


def test_fedprox_pulls_towards_the_start(world: Worlds) -> None:
    lengths = [
        np.linalg.norm(
            trained(world("bert-mean"), round_plan(steps=8, rate=0.5, learning_rate=0.1, fedprox_mu=mu))
        )
        for mu in (0.0, 1.0, 5.0)
    ]
    assert lengths == sorted(lengths, reverse=True)


def test_a_loss_that_is_not_finite_raises_where_nothing_is_private(world: Worlds) -> None:
    this = world("bert-mean")
    start = np.full(this.model.layout.size, 3e38, dtype=np.float32)
    with pytest.raises(ModelError, match="a training loss is not finite"):
        train(
            this.model,
            shard_of(this),
            round_plan(rate=0.5, private=False),
            start,
            NoiseStream(KEY),
            FeatureCache(),
        )


@pytest.mark.parametrize("factor", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["bert-mean", "gpt2-classify"])
def test_a_gradient_that_is_not_finite_counts_as_none(
    kind: str, factor: float, world: Worlds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error would tell the server, without noise, that such a record is there. So would NaN in the sum."""
    this, plan = world(kind), round_plan(rate=0.5, micro_batch=4)

    def with_first(first: float) -> bytes:
        """The loss of the first record of each micro-batch times `first`."""

        def losses(task: Any, logits: Any, batch: Any) -> Any:
            good = torch.nn.functional.cross_entropy(logits, batch.target, reduction="none")
            scale = torch.ones(len(good))
            scale[0] = first
            return good * scale

        with monkeypatch.context() as patch:
            patch.setattr(type(this.model.task), "record_losses", losses)
            return trained(this, plan).tobytes()

    assert with_first(factor) == with_first(0.0) != with_first(1.0)


def test_an_adapter_that_leaves_the_numbers_raises(world: Worlds) -> None:
    with pytest.raises(ModelError, match="the adapter is not finite after training"):
        trained(world("bert-mean"), round_plan(learning_rate=1e38, sigma=1e3, clip=1e3, steps=1))


def test_a_shard_smaller_than_a_batch_raises(world: Worlds) -> None:
    plan = round_plan(batch=20)
    trained(world("bert-mean"), plan, records=20)
    with pytest.raises(PrivacyError, match="expected 20 records or more, found 19"):
        trained(world("bert-mean"), plan, records=19)


def test_a_warm_model_carries_nothing_over(world: Worlds) -> None:
    plan = round_plan(rate=0.3, momentum=0.8)
    warm = world("bert-mean")
    other = moved(warm.model, seed=1)
    train(warm.model, shard_of(warm, 40), round_plan(), other, NoiseStream(bytes(32)), FeatureCache())
    after = trained(warm, plan)
    cold = dataclasses.replace(warm, model=tiny_model(warm.config))
    assert after.tobytes() == trained(cold, plan).tobytes()
    for p in warm.model.module.parameters():
        assert p.grad is None and not p.requires_grad
        assert getattr(p, "grad_sample", None) is None and getattr(p, "summed_grad", None) is None
    assert not any("activations" in layer.__dict__ for layer in warm.model.module.modules())
    assert not any(layer.training for layer in warm.model.module.modules())


def test_a_training_that_failed_leaves_nothing_behind(world: Worlds, monkeypatch: pytest.MonkeyPatch) -> None:
    this, plan = world("bert-default"), round_plan(rate=0.5, micro_batch=4)
    expected = trained(this, plan)
    for fail_at in (1, 2, 3):  # before any backward pass, and between micro-batches
        calls = []

        def losses(task: Any, logits: Any, batch: Any, calls: Any = calls, n: int = fail_at) -> Any:
            calls.append(None)
            if len(calls) == n:
                raise ModelError("a fault between two micro-batches")
            return torch.nn.functional.cross_entropy(logits, batch.target, reduction="none")

        with monkeypatch.context() as patch:
            patch.setattr(type(this.model.task), "record_losses", losses)
            with pytest.raises(ModelError):
                trained(this, plan)
        assert trained(this, plan).tobytes() == expected.tobytes(), fail_at


# Planted faults. Each must be caught: those of one step by the self-test that runs at every start, all by
# the comparison with the oracle.


def half_the_noise(self: CsprngDPOptimizer) -> None:
    for p in self.params:
        p.grad = p.summed_grad + 0.5 * self._noise.gaussian(
            p.summed_grad.shape, self.noise_multiplier * self.max_grad_norm
        ).to(p.dtype)


def no_noise(self: CsprngDPOptimizer) -> None:
    for p in self.params:
        self._noise.gaussian(p.summed_grad.shape, 1.0)
        p.grad = p.summed_grad


def one_parameter_without_noise(self: CsprngDPOptimizer) -> None:
    for number, p in enumerate(self.params):
        noise = self._noise.gaussian(p.summed_grad.shape, self.noise_multiplier * self.max_grad_norm)
        p.grad = p.summed_grad + (noise.to(p.dtype) if number else 0)


def no_clipping(self: CsprngDPOptimizer) -> None:
    for p in self.params:
        total = p.grad_sample.sum(dim=0)
        p.summed_grad = total if p.summed_grad is None else p.summed_grad + total


def clipping_by_layer(self: CsprngDPOptimizer) -> None:
    for p in self.params:
        norms = p.grad_sample.flatten(1).norm(dim=1) + 1e-12
        total = torch.einsum("i,i...", (self.max_grad_norm / norms).clamp(max=1), p.grad_sample)
        p.summed_grad = total if p.summed_grad is None else p.summed_grad + total


def normalised_by_the_batch_drawn(self: CsprngDPOptimizer) -> None:
    for p in self.params:
        p.grad /= max(1, self.drawn)


def count_the_batch(forward: Any, task: Any, micro_batches: Any, optimizer: Any) -> None:
    optimizer.drawn = sum(len(part) for part in micro_batches)
    PRIVATE_STEP(forward, task, micro_batches, optimizer)


def skip_empty(forward: Any, task: Any, micro_batches: Any, optimizer: Any) -> None:
    if micro_batches:
        PRIVATE_STEP(forward, task, micro_batches, optimizer)


PRIVATE_STEP = client.training.private_step
PLANTED: dict[str, tuple[tuple[Any, str, Any], ...]] = {
    "noise halved": ((CsprngDPOptimizer, "add_noise", half_the_noise),),
    "no noise": ((CsprngDPOptimizer, "add_noise", no_noise),),
    "one parameter without noise": ((CsprngDPOptimizer, "add_noise", one_parameter_without_noise),),
    "no clipping": ((CsprngDPOptimizer, "clip_and_accumulate", no_clipping),),
    "clipping by layer": ((CsprngDPOptimizer, "clip_and_accumulate", clipping_by_layer),),
    "noise of torch": ((CsprngDPOptimizer, "add_noise", DPOptimizer.add_noise),),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_the_self_test_catches(fault: str, world: Worlds, monkeypatch: pytest.MonkeyPatch) -> None:
    model = world("bert-default").model
    self_test(model, Part.ALL)
    for owner, name, planted in PLANTED[fault]:
        monkeypatch.setattr(owner, name, planted)
    with pytest.raises(PrivacyError, match="self-test failed: a step is not the clipped sum plus noise"):
        self_test(model, Part.ALL)


@pytest.mark.parametrize("fault", PLANTED)
def test_the_oracle_catches(fault: str, world: Worlds, monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name, planted in PLANTED[fault]:
        monkeypatch.setattr(owner, name, planted)
    assert not agrees(world("bert-default"), round_plan(rate=0.3))


def test_the_oracle_catches_a_normaliser_from_the_data(
    world: Worlds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.training, "private_step", count_the_batch)
    assert agrees(world("bert-mean"), round_plan(rate=0.3))
    monkeypatch.setattr(CsprngDPOptimizer, "scale_grad", normalised_by_the_batch_drawn)
    assert not agrees(world("bert-mean"), round_plan(rate=0.3))


def test_the_oracle_catches_skipped_empty_batches(world: Worlds, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = round_plan(rate=0.02, steps=6)
    assert agrees(world("bert-mean"), plan)
    monkeypatch.setattr(client.training, "private_step", skip_empty)
    assert not agrees(world("bert-mean"), plan)


@pytest.mark.parametrize("sampling", ["twice the rate", "fixed size", "noise repeated"])
def test_the_oracle_catches_wrong_randomness(
    sampling: str, world: Worlds, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(shard: Shard, rate: float, noise: NoiseStream) -> Any:
        return shard.indices[noise.bernoulli(len(shard), 2 * rate)]

    def fixed(shard: Shard, rate: float, noise: NoiseStream) -> Any:
        return shard.indices[np.argsort(noise.uniform(len(shard)))[: int(rate * len(shard))]]

    original = client.training.poisson_sample

    def rewound(shard: Shard, rate: float, noise: NoiseStream) -> Any:
        noise._stream = NoiseStream(KEY)._stream
        return original(shard, rate, noise)

    planted = {"twice the rate": twice, "fixed size": fixed, "noise repeated": rewound}[sampling]
    monkeypatch.setattr(client.training, "poisson_sample", planted)
    assert not agrees(world("bert-mean"), round_plan(rate=0.2, steps=2))


@pytest.mark.parametrize(("kind", "method", "part"), ALL_PARTS)
def test_the_self_test_passes_and_leaves_the_adapter_alone(
    world: Worlds, kind: str, method: str, part: Part
) -> None:
    model = world(kind, method).model
    write_vector(model.parameters, model.layout, moved(model))
    self_test(model, part)
    assert np.array_equal(read_vector(model.parameters, model.layout), moved(model))


@pytest.mark.parametrize("kind", KINDS)
def test_the_self_test_passes_for_every_task(world: Worlds, kind: str) -> None:
    self_test(world(kind, "lora").model, Part.ALL)


def test_the_self_test_catches_an_adapter_that_is_switched_off(world: Worlds) -> None:
    model = tiny_model(world("bert-mean").config)  # one of its own: peft leaves it changed
    with model.peft.disable_adapter(), pytest.raises(PrivacyError, match="does not change"):
        self_test(model, Part.ALL)


def test_the_self_test_catches_wrong_gradients(world: Worlds, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Opacus issue 820 was: per-sample gradients that are plausible and wrong."""
    from opacus.grad_sample import GradSampleModule

    linear = torch.nn.Linear
    right = GradSampleModule.GRAD_SAMPLERS[linear]

    def shuffled(layer: Any, activations: Any, backprops: Any) -> Any:
        return {p: g.flip(0) for p, g in right(layer, activations, backprops).items()}

    monkeypatch.setitem(GradSampleModule.GRAD_SAMPLERS, linear, shuffled)
    with pytest.raises(PrivacyError, match="per-sample gradients differ"):
        self_test(world("bert-default").model, Part.ALL)


def with_dropout(folder: Path, data: Path, world: Worlds) -> World:
    config = tiny_config(folder, data, adapter={"dropout": 0.3}, model={"head": "mean"})
    return dataclasses.replace(world("bert-mean"), config=config, model=tiny_model(config))


def test_the_self_test_passes_with_dropout(bert_folder: Path, data_file: Path, world: Worlds) -> None:
    self_test(with_dropout(bert_folder, data_file, world).model, Part.ALL)


def test_one_key_gives_one_update_with_dropout(bert_folder: Path, data_file: Path, world: Worlds) -> None:
    """A charge that is repeated must release the same numbers: under the same noise, another mask shows the
    difference of two sums of gradients without any noise."""
    this, plan = with_dropout(bert_folder, data_file, world), round_plan(rate=0.3)
    assert trained(this, plan).tobytes() == trained(this, plan).tobytes()
