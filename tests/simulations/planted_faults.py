"""Faults of DP-SGD, each planted from outside in the code that sites run; the audit itself is not touched."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from opacus.optimizers import DPOptimizer

from client import training
from client.training import CsprngDPOptimizer
from common.noise import NoiseStream
from simulations.canary_bench import CLIP

Patch = pytest.MonkeyPatch


def scaled_noise(factor: float) -> Callable[[Patch], None]:
    def plant(patch: Patch) -> None:
        real = NoiseStream.gaussian
        patch.setattr(NoiseStream, "gaussian", lambda self, shape, std: factor * real(self, shape, std))

    return plant


def clipping_off(patch: Patch) -> None:
    real = DPOptimizer.clip_and_accumulate

    def accumulate(self: Any) -> None:
        norm, self.max_grad_norm = self.max_grad_norm, 1e9
        real(self)
        self.max_grad_norm = norm

    patch.setattr(CsprngDPOptimizer, "clip_and_accumulate", accumulate)


def twice_the_rate(patch: Patch) -> None:
    real = training.poisson_sample
    patch.setattr(training, "poisson_sample", lambda shard, q, noise: real(shard, min(1.0, 2 * q), noise))


def same_noise_each_step(patch: Patch) -> None:
    real = CsprngDPOptimizer.add_noise

    def add_noise(self: Any) -> None:
        if not hasattr(self, "frozen"):
            real(self)
            self.frozen = [p.grad - p.summed_grad for p in self.params]
        for p, noise in zip(self.params, self.frozen, strict=True):
            p.grad = p.summed_grad + noise

    patch.setattr(CsprngDPOptimizer, "add_noise", add_noise)


def same_noise_each_round(patch: Patch) -> None:
    real = CsprngDPOptimizer.__init__

    def build(self: Any, optimizer: Any, event: Any, noise: Any, mu: float = 0.0) -> None:
        real(self, optimizer, event, NoiseStream(bytes(32)), mu)

    patch.setattr(CsprngDPOptimizer, "__init__", build)


def empty_batches_skipped(patch: Patch) -> None:
    real = training.private_step

    def step(forward: Any, task: Any, micro: Any, optimizer: Any) -> None:
        if micro:
            real(forward, task, micro, optimizer)

    patch.setattr(training, "private_step", step)


def shuffling(patch: Patch) -> None:
    """Epochs of batches of the expected size, each record once an epoch."""
    left: dict[int, list[int]] = {}

    def sample(shard: Any, q: float, noise: Any) -> Any:
        size = max(1, round(q * len(shard)))
        queue = left.setdefault(id(shard), [])
        if len(queue) < size:
            queue[:] = [int(i) for i in shard.indices[np.argsort(noise.uniform(len(shard)))]]
        batch, queue[:] = np.array(queue[:size]), queue[size:]
        return batch

    patch.setattr(training, "poisson_sample", sample)


def normaliser_from_records(patch: Patch) -> None:
    real = training.train

    def train(model: Any, shard: Any, plan: Any, *rest: Any) -> Any:
        batch = max(1, round(plan.sample_rate * len(shard)))
        event = dataclasses.replace(plan.event, batch_size=batch)
        return real(model, shard, dataclasses.replace(plan, event=event), *rest)

    patch.setattr(training, "train", train)


def normaliser_from_batch(patch: Patch) -> None:
    real = training.private_step

    def step(forward: Any, task: Any, micro: Any, optimizer: Any) -> None:
        optimizer.expected_batch_size = max(1, sum(len(part) for part in micro))
        real(forward, task, micro, optimizer)

    patch.setattr(training, "private_step", step)


def batches_of_one_size(patch: Patch) -> None:
    """Drawn anew in each step, without replacement: each record as often as it should be."""

    def sample(shard: Any, q: float, noise: Any) -> Any:
        return shard.indices[np.argsort(noise.uniform(len(shard)))[: max(1, round(q * len(shard)))]]

    patch.setattr(training, "poisson_sample", sample)


def one_batch_a_round(patch: Patch) -> None:
    real, kept = training.poisson_sample, {}

    def sample(shard: Any, q: float, noise: Any) -> Any:
        if id(noise) not in kept:
            kept[id(noise)] = (noise, real(shard, q, noise))  # the stream is kept, or its id may come again
        return kept[id(noise)][1]

    patch.setattr(training, "poisson_sample", sample)


def clipping_layer_by_layer(patch: Patch) -> None:
    def accumulate(self: Any) -> None:
        for p in self.params:
            norms = p.grad_sample.flatten(1).norm(dim=1) if len(p.grad_sample) else p.grad_sample.sum((1, 2))
            factor = (self.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
            total = torch.einsum("i,i...", factor, p.grad_sample)
            p.summed_grad = total if p.summed_grad is None else p.summed_grad + total

    patch.setattr(CsprngDPOptimizer, "clip_and_accumulate", accumulate)


def clipping_of_batches(patch: Patch) -> None:
    def accumulate(self: Any) -> None:
        sums = [p.grad_sample.sum(dim=0) for p in self.params]
        norm = math.sqrt(sum(float(s.norm()) ** 2 for s in sums))
        for p, total in zip(self.params, sums, strict=True):
            clipped = total * min(1.0, self.max_grad_norm / (norm + 1e-6))
            p.summed_grad = clipped if p.summed_grad is None else p.summed_grad + clipped

    patch.setattr(CsprngDPOptimizer, "clip_and_accumulate", accumulate)


def noise_on_one_layer(patch: Patch) -> None:
    real = CsprngDPOptimizer.add_noise

    def add_noise(self: Any) -> None:
        real(self)
        self.params[-1].grad = self.params[-1].summed_grad

    patch.setattr(CsprngDPOptimizer, "add_noise", add_noise)


def noise_without_the_norm(patch: Patch) -> None:
    """Standard deviation σ instead of σ·C: too much here, too little where C is above 1."""
    real = NoiseStream.gaussian
    patch.setattr(NoiseStream, "gaussian", lambda self, shape, std: real(self, shape, std / CLIP))


def one_number_for_all(patch: Patch) -> None:
    real = NoiseStream.gaussian
    patch.setattr(NoiseStream, "gaussian", lambda self, shape, std: real(self, (1,), std).expand(shape))


def noise_of_another_shape(patch: Patch) -> None:
    """+std or −std: the right variance, but sums of few steps stay off the bell curve."""

    def signs(self: NoiseStream, shape: Any, std: float) -> torch.Tensor:
        coins = 2.0 * (self.uniform(math.prod(shape)) < 0.5) - 1.0
        return torch.from_numpy(coins * std).reshape(tuple(shape))

    patch.setattr(NoiseStream, "gaussian", signs)


def overflow_is_told(patch: Patch) -> None:
    """A gradient that is not finite goes through, so that training ends in an error."""
    patch.setattr(CsprngDPOptimizer, "clip_and_accumulate", DPOptimizer.clip_and_accumulate)


# fault -> a check that must be among those that fail
FAULTS: dict[str, tuple[Callable[[Patch], None], str]] = {
    "noise/2": (scaled_noise(0.5), "noise at the canaries left out"),
    "noise/10": (scaled_noise(0.1), "lower bound on ε from a site's updates"),
    "no noise": (scaled_noise(0.0), "lower bound on ε from the secure sums"),
    "clipping off": (clipping_off, "clipping is exact"),
    "q×2": (twice_the_rate, "records are sampled at the sample rate"),
    "same noise each step": (same_noise_each_step, "noise wherever no record reaches"),
    "empty batches skipped": (empty_batches_skipped, "empty batches are noised"),
    "shuffling": (shuffling, "records are sampled independently"),
    "normaliser from N": (normaliser_from_records, "one record more changes no other"),
}
MORE_FAULTS: dict[str, tuple[Callable[[Patch], None], str]] = {
    "noise 3% short": (scaled_noise(0.97), "noise wherever no record reaches"),
    "same noise each round": (same_noise_each_round, "noise of rounds and sites is unrelated"),
    "normaliser from the batch": (normaliser_from_batch, "clipping is exact"),
    "batches of one size": (batches_of_one_size, "batches vary in size as they must"),
    "one batch a round": (one_batch_a_round, "records are sampled independently"),
    "clipping layer by layer": (clipping_layer_by_layer, "clipping is exact"),
    "clipping of batches": (clipping_of_batches, "clipping is exact"),
    "noise on one layer": (noise_on_one_layer, "noise wherever no record reaches"),
    "noise without the norm": (noise_without_the_norm, "noise wherever no record reaches"),
    "one number for all": (one_number_for_all, "noise is Gaussian"),
    "overflow is told": (overflow_is_told, "a record that overflows changes no other"),
    "noise of another shape": (noise_of_another_shape, "noise is Gaussian"),
}
