"""What a federation without privacy is compared with: an ordinary training loop on the pooled records."""

from __future__ import annotations

import numpy as np
import torch

from client.training import Shard, forward_of
from common.adapter import read_vector
from common.config import AdapterMethod, LocalOptimizer, RunConfig
from common.evaluation import evaluate
from common.features import FeatureCache
from common.models import AdaptedModel, load_model
from common.plan import RoundPlan, make_plan
from common.tasks import by_length, make_task
from simulations.run import prepare


def plain(config: RunConfig) -> dict[str, float]:
    """Every metric after as many steps as a site of `config` takes, on batches of all sites' records.

    Both factors of the adapter train, as PEFT has it, whatever the federation freezes; a warm-up of the head
    is one here, too. The mean of a batch's losses, one optimizer from the first step of a phase to its last.
    """
    adapter = config.adapter.model_copy(update={"method": AdapterMethod.LORA})
    resolved, split = prepare(config.model_copy(update={"adapter": adapter}))
    torch.set_num_threads(resolved.run.threads)
    task = make_task(resolved.task.kind, split.labels, resolved.task)
    model, length = load_model(resolved, task), resolved.model.max_length
    train, public = (task.encode(table, model.tokenizer, length) for table in (split.table, split.public))
    pooled, rng = Shard(train, np.concatenate(split.sites)), np.random.default_rng(resolved.run.seed)
    rounds = make_plan(resolved).rounds
    for part in dict.fromkeys(r.part for r in rounds):
        phase = [r for r in rounds if r.part is part]
        _steps(model, pooled, phase[0], sum(r.steps for r in phase), rng)
    vector = read_vector(model.parameters, model.layout)
    return dict(evaluate(model, vector, public, np.arange(len(public))).scores)


def _steps(model: AdaptedModel, pooled: Shard, plan: RoundPlan, steps: int, rng: np.random.Generator) -> None:
    active = model.active(plan.part)
    _, forward = forward_of(model, pooled, plan.part, FeatureCache())
    parameters = list(active.values())
    optimizer: torch.optim.Optimizer = (
        torch.optim.Adam(parameters, lr=plan.learning_rate)
        if plan.optimizer is LocalOptimizer.ADAM
        else torch.optim.SGD(parameters, lr=plan.learning_rate, momentum=plan.momentum)
    )
    size = max(1, round(plan.sample_rate * len(pooled)))
    with model.training(active):
        for _ in range(steps):
            optimizer.zero_grad()
            batch = rng.choice(pooled.indices, size, replace=False)
            for indices in by_length(pooled.examples, batch, plan.micro_batch):
                logits, targets = forward(indices)
                (model.task.record_losses(logits, targets).sum() / size).backward()
            optimizer.step()
