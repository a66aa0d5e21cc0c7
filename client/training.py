"""DP-SGD on the adapter: one site's local steps of a round.

Record-level, add-or-remove neighbours, local trust: see common.privacy for what an event costs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from opacus.grad_sample.grad_sample_module import GradSampleHooks
from opacus.optimizers import DPOptimizer
from torch import nn

from common.adapter import Layout, Vector, read_vector, write_vector
from common.config import LocalOptimizer
from common.errors import ModelError, PrivacyError
from common.features import FeatureCache
from common.models import AdaptedModel, Part
from common.noise import NoiseStream
from common.plan import RoundPlan
from common.privacy import SampledGaussianEvent
from common.tasks import Batch, Examples, IntArray, Task, by_length, collate


@dataclass(frozen=True)
class Shard:
    """One site's records: `indices` into `examples`, which sites of one process may share."""

    examples: Examples
    indices: IntArray

    def __len__(self) -> int:
        return len(self.indices)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the records, in order."""
        h = hashlib.sha256(b"confide/shard/v1")
        for content in self.examples.contents(self.indices):
            h.update(len(content).to_bytes(8, "little") + content)
        return h.digest()


class CsprngDPOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus's DPOptimizer with noise from a `NoiseStream`, plus FedProx's pull to the global adapter.

    clip → accumulate → add_noise → scale_grad (divide by the public batch size) → proximal pull → step.
    The pull reads parameters only, never data, so it costs no privacy (Li et al. 2020, 1812.06127).

    A record whose gradient is not finite counts as one whose gradient is zero. The server chooses the
    adapter, and could choose one that overflows on a certain record alone: an error would then tell, without
    any noise, that the record is there.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        event: SampledGaussianEvent,
        noise: NoiseStream,
        fedprox_mu: float = 0.0,
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=event.noise_multiplier,
            max_grad_norm=event.max_grad_norm,
            expected_batch_size=event.batch_size,
            loss_reduction="mean",
        )
        self._noise = noise
        self._mu = fedprox_mu
        self._anchor = [p.detach().clone() for p in self.params] if fedprox_mu else []

    def clip_and_accumulate(self) -> None:
        samples = self.grad_samples
        finite = torch.stack([g.flatten(1).isfinite().all(1) for g in samples]).all(0)
        for p, g in zip(self.params, samples, strict=True):
            p.grad_sample = torch.where(finite.view(-1, *[1] * (g.dim() - 1)), g, 0.0)
        super().clip_and_accumulate()

    def add_noise(self) -> None:
        for p in self.params:
            noise = self._noise.gaussian(p.summed_grad.shape, self.noise_multiplier * self.max_grad_norm)
            p.grad = p.summed_grad + noise.to(device=p.device, dtype=p.summed_grad.dtype)

    def scale_grad(self) -> None:
        super().scale_grad()
        for p, anchor in zip(self.params, self._anchor, strict=False):
            p.grad.add_(p.detach() - anchor, alpha=self._mu)


@contextmanager
def per_sample_gradients(module: nn.Module) -> Iterator[None]:
    """Inside, backward passes leave `(n, *shape)` in `p.grad_sample` of every trainable parameter.

    Hooks are removed and their attributes deleted at the end, so a warm model carries nothing over.
    """
    hooks = GradSampleHooks(module, batch_first=True, loss_reduction="sum")
    try:
        yield
    finally:
        hooks.cleanup()
        for layer in module.modules():
            layer.__dict__.pop("activations", None)


# From record indices to the records' logits and targets.
Forward = Callable[[IntArray], tuple[torch.Tensor, Batch]]


def check_shard(shard: Shard, plan: RoundPlan) -> None:
    """Refuse to train on less than one batch.

    Raises:
        PrivacyError: the shard has fewer records than the public batch size.
    """
    if len(shard) < plan.batch_size:
        raise PrivacyError(
            f"a site must hold at least one batch: expected {plan.batch_size} records or more, found "
            f"{len(shard)}. Lower privacy.sample_rate, or use fewer, larger sites"
        )


def train(
    model: AdaptedModel,
    shard: Shard,
    plan: RoundPlan,
    start: Vector,
    noise: NoiseStream,
    features: FeatureCache,
) -> Vector:
    """Run `plan.steps` local steps from the global adapter `start`; return the update.

    `start` is `(model.layout.size,)`; the update is float32 in the layout of `model.active(plan.part)`: the
    adapter after the steps minus before. The model's adapter is left at an arbitrary value.

    Raises:
        PrivacyError: the shard has fewer records than the public batch size.
        ModelError: the adapter is not finite; without privacy, a loss is not.
    """
    check_shard(shard, plan)
    write_vector(model.parameters, model.layout, start)
    active = model.active(plan.part)
    layout = Layout.of(active)
    before = read_vector(active, layout)
    parameters = [active[name] for name, _ in layout.entries]
    module, forward = forward_of(model, shard, plan.part, features)
    with model.training(active), torch.random.fork_rng():
        # Dropout draws from torch's generator: seeded from the site's key, so that a repeated computation
        # is the same one, and not the same noise over another mask.
        if model.has_dropout:
            torch.manual_seed(noise.seed())
        optimizer = _local_optimizer(plan, parameters)
        if plan.event is None:
            _steps_without_privacy(forward, model.task, shard, plan, optimizer, noise)
        else:
            private = CsprngDPOptimizer(optimizer, plan.event, noise, plan.fedprox_mu)
            with per_sample_gradients(module):
                for _ in range(plan.steps):
                    sampled = poisson_sample(shard, plan.sample_rate, noise)
                    private_step(
                        forward, model.task, by_length(shard.examples, sampled, plan.micro_batch), private
                    )
    after = read_vector(active, layout)
    if not np.isfinite(after).all():
        raise ModelError("the adapter is not finite after training: lower training.learning_rate")
    return after - before


def forward_of(
    model: AdaptedModel, shard: Shard, part: Part, features: FeatureCache
) -> tuple[nn.Module, Forward]:
    """The module whose parameters train, and how records go through it."""
    if part is Part.HEAD and model.head is not None:
        head = model.head
        cached = features.of(model, shard.examples, shard.indices)

        def probe(indices: IntArray) -> tuple[torch.Tensor, Batch]:
            target = shard.examples.targets(indices).to(model.device)
            return head(cached[indices].to(model.device)), Batch({}, target)

        return head, probe

    def tune(indices: IntArray) -> tuple[torch.Tensor, Batch]:
        batch = collate(shard.examples, indices, model.pad_id, model.device)
        return model.logits(batch.inputs), batch

    return model.module, tune


def _local_optimizer(plan: RoundPlan, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    match plan.optimizer:
        case LocalOptimizer.SGD:
            return torch.optim.SGD(parameters, lr=plan.learning_rate, momentum=plan.momentum)
        case LocalOptimizer.ADAM:
            return torch.optim.Adam(parameters, lr=plan.learning_rate)


def poisson_sample(shard: Shard, sample_rate: float, noise: NoiseStream) -> IntArray:
    """Each record of the shard independently with probability `sample_rate`; may be empty."""
    sampled: IntArray = shard.indices[noise.bernoulli(len(shard), sample_rate)]
    return sampled


def private_step(
    forward: Forward, task: Task, micro_batches: Sequence[IntArray], optimizer: CsprngDPOptimizer
) -> None:
    """One logical step: one privacy event, in however many micro-batches, none for an empty sample."""
    optimizer.zero_grad(set_to_none=True)
    if not micro_batches:
        # Encoders refuse an empty batch. The step still happens, or its absence would tell.
        for p in optimizer.params:
            p.grad_sample = p.new_zeros((0, *p.shape))
        optimizer.step()
    for number, indices in enumerate(micro_batches, start=1):
        logits, batch = forward(indices)
        task.record_losses(logits, batch).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.signal_skip_step(do_skip=number < len(micro_batches))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _backward(task: Task, logits: torch.Tensor, batch: Batch) -> None:
    """Without privacy only: the error says something about the records."""
    losses = task.record_losses(logits, batch)
    if not torch.isfinite(losses).all():
        raise ModelError(
            "a training loss is not finite: the model diverged or a record is malformed. Lower "
            "training.learning_rate, and check the data"
        )
    losses.sum().backward()  # type: ignore[no-untyped-call]


def _steps_without_privacy(
    forward: Forward,
    task: Task,
    shard: Shard,
    plan: RoundPlan,
    optimizer: torch.optim.Optimizer,
    noise: NoiseStream,
) -> None:
    """The same sampling and normalisation, neither clipped nor noised: what privacy is compared with."""
    parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
    anchor = [p.detach().clone() for p in parameters]
    for _ in range(plan.steps):
        sampled = poisson_sample(shard, plan.sample_rate, noise)
        optimizer.zero_grad(set_to_none=True)
        for indices in by_length(shard.examples, sampled, plan.micro_batch):
            _backward(task, *forward(indices))
        for p, origin in zip(parameters, anchor, strict=True):
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad / plan.batch_size
            p.grad.add_(p.detach() - origin, alpha=plan.fedprox_mu)
        optimizer.step()
