"""DP training against plain PEFT training of the same records: `python tests/benchmarks/dp_step.py`.

Peer: transformers + peft without privacy, as people do it: shuffled batches, padded to the longest of the
batch, one optimizer step a batch. Ours: DP-SGD, logical batches sorted by length into micro-batches. CPU
seconds, the two in turns, the best of several turns each.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
warnings.simplefilter("ignore")

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from client.training import Shard, train
from common.adapter import read_vector, write_vector
from common.config import LocalOptimizer, parse_config
from common.datasets import Sample, read_sample
from common.features import FeatureCache
from common.models import Part, load_model
from common.noise import NoiseStream
from common.plan import RoundPlan
from common.privacy import SampledGaussianEvent
from common.tables import clean, label_names
from common.tasks import collate, make_task
from tests.benchmarks.harness import Row, row, show

RECORDS, BATCH, MICRO, TURNS = 512, 128, 32, 3


def compare(layers: tuple[int, ...], name: str) -> Row:
    config = parse_config(
        {
            "model": {"name": "sample:all-minilm-l6-v2", "head": "mean", "max_length": 128},
            "data": {"sample": "rotten-tomatoes"},
            "adapter": {"layers": list(layers)},
        },
        source="benchmark",
    )
    table, _ = clean(read_sample(Sample.ROTTEN_TOMATOES), max_characters=20_000)
    task = make_task(config.task.kind, label_names(table))
    model = load_model(config, task)
    rng = np.random.default_rng(0)
    chosen = np.sort(rng.permutation(len(table))[:RECORDS])
    examples = task.encode(table.take(chosen), model.tokenizer, 128)
    start = read_vector(model.parameters, model.layout)
    steps = RECORDS // BATCH
    event = SampledGaussianEvent(BATCH / RECORDS, 1.0, steps, 0.5, BATCH)
    plan = RoundPlan(Part.ALL, event, steps, BATCH / RECORDS, BATCH, 1.0, 0.0, LocalOptimizer.SGD, 0.0, MICRO)
    shard = Shard(examples, np.arange(RECORDS))
    key = bytes(32)
    sampled: list[int] = []

    class CountingStream(NoiseStream):
        def bernoulli(self, count: int, probability: float) -> np.ndarray:
            drawn = super().bernoulli(count, probability)
            sampled.append(int(drawn.sum()))
            return drawn

    def ours() -> int:
        sampled.clear()
        train(model, shard, plan, start, CountingStream(key), FeatureCache())
        return sum(sampled)

    def peer() -> int:
        write_vector(model.parameters, model.layout, start)
        active = model.active(Part.ALL)
        with model.training(active):
            optimizer = torch.optim.SGD(list(active.values()), lr=1.0)
            order = rng.permutation(RECORDS)
            for at in range(0, RECORDS, MICRO):
                batch = collate(examples, order[at : at + MICRO], model.pad_id, model.device)
                optimizer.zero_grad(set_to_none=True)
                task.record_losses(model.logits(batch.inputs), batch).mean().backward()
                optimizer.step()
        return RECORDS

    best = {ours: np.inf, peer: np.inf}
    for _ in range(TURNS):
        for work in (ours, peer):
            began = time.process_time()
            records = work()
            best[work] = min(best[work], (time.process_time() - began) / records)
    return row(f"DP-SGD step, {name}, per record", best[ours] * 1e3, best[peer] * 1e3, "CPU ms")


def main() -> None:
    show([compare((-2, -1), "last two layers"), compare((), "all layers")], __doc__ or "")


if __name__ == "__main__":
    main()
