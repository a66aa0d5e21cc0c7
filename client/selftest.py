"""Run at every start: is training on this machine, with these versions, really private?

Library versions have broken per-sample gradients of LoRA silently before (Opacus issue 820), so nothing is
taken on trust. A few made-up records, a fraction of a second.
"""

from __future__ import annotations

import numpy as np
import torch

from client.training import CsprngDPOptimizer, Shard, forward_of, per_sample_gradients, private_step
from common.adapter import Layout, Vector, read_vector, write_vector
from common.errors import PrivacyError
from common.features import FeatureCache
from common.models import AdaptedModel, Part
from common.noise import NoiseStream
from common.privacy import SampledGaussianEvent
from common.tasks import Batch, IntArray, collate

_RECORDS = 3
_TOLERANCE = 1e-3  # relative; float32 sums in another order differ by less
_SMALL = 1e-3  # of a record's whole gradient: a part below it is held to what it adds to the whole


def self_test(model: AdaptedModel, part: Part) -> None:
    """Check `part` of the adapter; the adapter is left as it was.

    1. The adapter changes the output.
    2. Per-sample gradients equal those of one record at a time.
    3. Every trainable parameter is clipped and noised: gradient = clipped sum + noise, all of it.

    Raises:
        PrivacyError: naming the check that failed. Nothing may be trained then.
    """
    before = read_vector(model.parameters, model.layout)
    try:
        shard = Shard(model.task.made_up(np.random.default_rng(0), model.tokenizer), np.arange(_RECORDS))
        _check_output_moves(model, shard, before)
        # From a generic point: at the start, B = 0 hides every fault behind it.
        write_vector(model.parameters, model.layout, _shifted(before))
        _check_gradients(model, part, shard)
    finally:
        write_vector(model.parameters, model.layout, before)


def _shifted(vector: Vector) -> Vector:
    rng = np.random.default_rng(1)
    return (vector + rng.normal(0, 0.05, vector.size)).astype(np.float32)


def _refuse(what: str) -> PrivacyError:
    return PrivacyError(
        f"self-test failed: {what}. Training on this machine would not be what it claims; install the pinned "
        "versions (constraints.txt) and run `confide doctor`. If that passes, it is this model: choose "
        "linear layers of it in adapter.target_modules"
    )


def _batch(model: AdaptedModel, shard: Shard, indices: IntArray) -> Batch:
    return collate(shard.examples, indices, model.pad_id, model.device)


@torch.no_grad()
def _check_output_moves(model: AdaptedModel, shard: Shard, before: Vector) -> None:
    """Two adapters that differ in the LoRA numbers only; a head that starts at zero is moved in both."""
    batch = _batch(model, shard, shard.indices)
    lora = np.concatenate(
        [
            np.full(size, ".lora_" in name)
            for (name, _), size in zip(model.layout.entries, model.layout.sizes, strict=True)
        ]
    )
    moved = _shifted(before)
    outputs = []
    for vector in (moved, np.where(lora, before, moved).astype(np.float32)):
        write_vector(model.parameters, model.layout, vector)
        outputs.append(model.logits(batch.inputs))
    if torch.equal(*outputs):
        raise _refuse("the adapter does not change the model's output")


def _check_gradients(model: AdaptedModel, part: Part, shard: Shard) -> None:
    active = model.active(part)
    layout = Layout.of(active)
    parameters = [active[name] for name, _ in layout.entries]

    # The very path that training takes: for the head alone, hooks on it and features from a cache.
    module, forward = forward_of(model, shard, part, FeatureCache())

    def whole(indices: IntArray) -> tuple[torch.Tensor, Batch]:
        batch = _batch(model, shard, indices)
        return model.logits(batch.inputs), batch

    with model.training(active, dropout=False):
        oracle = []
        for i in shard.indices:
            for p in parameters:
                p.grad = None
            logits, batch = whole(np.array([i]))
            model.task.record_losses(logits, batch).sum().backward()  # type: ignore[no-untyped-call]
            if any(p.grad is None for p in parameters):
                raise _refuse("a trainable parameter takes no part in the loss")
            oracle.append([p.grad.detach().clone() for p in parameters if p.grad is not None])
            for p in parameters:
                p.grad = None
        norms = [float(torch.stack([g.norm() for g in record]).norm()) for record in oracle]
        if not min(norms) > 0:
            raise _refuse("a record has no gradient at all")
        clip = 0.7 * min(norms)  # so that every record is clipped
        event = SampledGaussianEvent(0.5, 1.0, 1, clip, 2)
        key = bytes(range(32))
        optimizer = CsprngDPOptimizer(torch.optim.SGD(parameters, lr=1.0), event, NoiseStream(key))
        start = [p.detach().clone() for p in parameters]
        with per_sample_gradients(module):
            logits, batch = forward(shard.indices)
            model.task.record_losses(logits, batch).sum().backward()  # type: ignore[no-untyped-call]
            for number, p in enumerate(parameters):
                got = getattr(p, "grad_sample", None)
                if got is None or got.shape[0] != _RECORDS:
                    raise _refuse("a trainable parameter has no per-sample gradient")
                want = torch.stack([record[number] for record in oracle])
                if float((got - want).norm()) > _TOLERANCE * max(float(want.norm()), _SMALL * max(norms)):
                    raise _refuse("per-sample gradients differ from those of one record at a time")
            optimizer.zero_grad(set_to_none=True)
            private_step(forward, model.task, [shard.indices[:2], shard.indices[2:]], optimizer)
        noise = NoiseStream(key)
        for number, p in enumerate(parameters):
            clipped = sum(record[number] * (clip / norm) for record, norm in zip(oracle, norms, strict=True))
            drawn = noise.gaussian(p.shape, event.noise_multiplier * clip).to(p.device, p.dtype)
            moved = (start[number] - p.detach()) * event.batch_size
            if float((moved - (clipped + drawn)).norm()) > _TOLERANCE * float(drawn.norm()):
                raise _refuse("a step is not the clipped sum plus noise")
