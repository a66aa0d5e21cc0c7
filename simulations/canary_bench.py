"""Canaries through the training that sites run, `client.training.train`, and what is read of them.

A canary is a made-up record whose gradient is known: far longer than max_grad_norm, and along a direction
that no other record has. So one number of the update, the canary's own, tells all that the record did:
each time it is sampled it adds max_grad_norm / batch_size, no more and no less, and noise comes on top. Half
of the canaries are in the data, by fair coins; what is read at those left out is noise and nothing else.

Everything that counts is the real thing: peft's LoRA layers, Opacus's per-sample gradients, Poisson
sampling, clipping, noise from a NoiseStream, a plan from `make_plan`, and the encoding of secure
aggregation, whose integer sum is what the server learns (masks cancel exactly). Only the model and the data
are made up.

Unit of all readings: one contribution, which is what one clipped record adds in one step. In it the noise
of one step has standard deviation `noise_multiplier`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import PreTrainedTokenizerFast

from client import training
from common.adapter import Layout, Vector
from common.aggregation import largest_change
from common.config import RingBits, parse_config
from common.errors import ConfigError, ModelError
from common.features import FeatureCache
from common.models import AdaptedModel, Part
from common.noise import KEY_BYTES, NoiseStream
from common.plan import Plan, RoundPlan, make_plan
from common.privacy import SampledGaussianEvent, calibrate_noise_multiplier, epsilon_rdp
from common.secagg.encoding import Codec, Tensor
from common.task_classify import SequenceClassification
from common.tasks import Batch, Examples, IntArray
from simulations.audit_stats import Bits, Floats

SITES = 3
SIDE = 64
CELLS = SIDE * SIDE  # directions of one layer, and so of records: one each
OTHERS = 30  # records of each site beside the canaries, so that it always has a batch; also the public size
CLIP = 0.5
_LENGTH = 100.0  # of a record's gradient, over CLIP
_LEARNING_RATE = 0.5
_ALONG = (0.6, 0.8)  # how a record's gradient is shared by the two layers; norm 1
_MICRO_BATCH = 16  # below a full batch, so that steps are gathered from several passes
OVERFLOW = CELLS  # a record more, whose gradient is not finite
_HARDLY = 1e-3  # noise_multiplier with which single contributions can be counted


class _Probe(nn.Module):
    """logits = length · (0.6 · first(x) + 0.8 · second(x)), x the one-hot vector of the record's first token.

    The gradient of −logits[target] is then −length · (0.6, 0.8) at (target, token) of the two layers,
    whatever their values: a Dirac canary. One token more stands for infinity.
    """

    def __init__(self) -> None:
        super().__init__()
        rows = torch.cat([torch.eye(SIDE), torch.full((1, SIDE), torch.inf)])
        self.embedding = nn.Embedding(SIDE + 1, SIDE, _weight=rows)
        self.first = nn.Linear(SIDE, SIDE, bias=False)
        self.second = nn.Linear(SIDE, SIDE, bias=False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids[:, 0])
        logits: torch.Tensor = _ALONG[0] * self.first(x) + _ALONG[1] * self.second(x)
        return _LENGTH * CLIP * logits


class _Dirac(SequenceClassification):
    """Loss = −logits[target]: its gradient is the same at every adapter."""

    def record_losses(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        return -logits.gather(1, batch.target[:, None])[:, 0]


@dataclass(frozen=True)
class Bench:
    """The model and every record there is: record c moves cell c = target · SIDE + token of both layers.

    OVERFLOW is the record after them.
    """

    model: AdaptedModel
    examples: Examples

    @cached_property
    def layout(self) -> Layout:
        return Layout.of(self.model.active(Part.ALL))

    def start(self) -> Vector:
        return np.zeros(self.layout.size, dtype=np.float32)

    def train(self, plan: RoundPlan, records: IntArray, start: Vector, noise: NoiseStream) -> Vector:
        """A site's update for one round, by the code that sites run."""
        shard = training.Shard(self.examples, np.sort(records))
        return training.train(self.model, shard, plan, start, noise, FeatureCache())

    def read(self, plan: RoundPlan, update: Vector | Floats) -> Floats:
        """`(2, CELLS)`, in contributions: along the records' direction, and across it.

        Records lie wholly along; across there is noise only, unless layers were clipped one by one.
        """
        first, second = update.astype(np.float64).reshape(2, CELLS) * (
            plan.batch_size / (plan.learning_rate * CLIP)
        )
        a, b = _ALONG
        return np.stack([a * first + b * second, b * first - a * second])


@lru_cache(maxsize=1)
def bench() -> Bench:
    """Built once: a LoRA layer of full rank with A = identity, so that B's numbers are the cells."""
    with torch.random.fork_rng(devices=[]):
        lora = LoraConfig(r=SIDE, lora_alpha=SIDE, lora_dropout=0.0, target_modules=["first", "second"])
        module: Any = get_peft_model(_Probe(), lora)
    parameters = {}
    for name, p in module.named_parameters():
        p.requires_grad_(False)
        if ".lora_A." in name:
            p.copy_(torch.eye(SIDE))
        if ".lora_B." in name:
            p.zero_()
            parameters[name] = p
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"[PAD]": 0}, unk_token="[PAD]")), pad_token="[PAD]"
    )
    task = _Dirac(tuple(str(i) for i in range(SIDE)))
    model = AdaptedModel(module.eval(), module, words, task, parameters, torch.device("cpu"))
    target, token = np.divmod(np.arange(CELLS + 1), SIDE)
    token[OVERFLOW], target[OVERFLOW] = SIDE, 0
    lengths = 1 + np.arange(CELLS + 1) % 3  # unlike lengths, so that micro-batches are padded and reordered
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return Bench(model, Examples(np.repeat(token, lengths).astype(np.int32), starts, target))


@dataclass(frozen=True)
class Claim:
    """`steps` steps of (sample_rate, noise_multiplier) in rounds of `local_steps`, of which it is said that
    they cost at most `epsilon` at `delta`: one record, add or remove."""

    name: str
    sample_rate: float
    noise_multiplier: float
    steps: int
    local_steps: int
    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        SampledGaussianEvent(self.sample_rate, self.noise_multiplier, self.steps, CLIP, 1)
        if not 1 <= self.local_steps <= self.steps:
            raise ConfigError(f"local_steps must lie between 1 and {self.steps}, found {self.local_steps}")
        if not (self.epsilon > 0 and 0 < self.delta < 1):
            raise ConfigError(
                f"a claim needs epsilon > 0 and delta between 0 and 1, found {self.epsilon}, {self.delta}"
            )

    @property
    def rounds(self) -> tuple[int, ...]:
        """Steps of each round."""
        whole, rest = divmod(self.steps, self.local_steps)
        return (self.local_steps,) * whole + ((rest,) if rest else ())


def calibrated(epsilon: float, delta: float, sample_rate: float, steps: int, local_steps: int) -> Claim:
    """A claim with the least noise that this system would add for it."""
    sigma = calibrate_noise_multiplier(
        target_epsilon=epsilon, delta=delta, sample_rate=sample_rate, steps=steps
    )
    name = f"q = {sample_rate:g}, {steps} steps"
    return Claim(name, sample_rate, sigma, steps, local_steps, epsilon, delta)


def default_claims(epsilon: float = 1.0, delta: float = 1e-5) -> tuple[Claim, ...]:
    """Every record in every step, and a tenth of them: sampling errors show in the one or in the other."""
    return (calibrated(epsilon, delta, 1.0, 4, 2), calibrated(epsilon, delta, 0.1, 50, 10))


def claims_of(plan: Plan) -> tuple[Claim, ...]:
    """One claim for each setting that a plan trains with: its steps by themselves, at the plan's δ.

    Raises:
        ConfigError: the plan has privacy turned off.
    """
    settings: dict[tuple[float, float], list[RoundPlan]] = {}
    for part in plan.rounds:
        if part.event is not None:
            key = (part.sample_rate, part.event.noise_multiplier)
            settings.setdefault(key, []).append(part)
    if not settings:
        raise ConfigError("the plan has privacy turned off: there is no claim to audit")
    found = []
    for (rate, sigma), rounds in settings.items():
        steps = sum(part.steps for part in rounds)
        epsilon = epsilon_rdp([SampledGaussianEvent(rate, sigma, steps, CLIP, 1)], plan.delta)
        name = f"{rounds[0].part.value}: q = {rate:g}, {steps} steps"
        found.append(Claim(name, rate, sigma, steps, rounds[0].steps, epsilon, plan.delta))
    return tuple(found)


def plan_of(sample_rate: float, noise_multiplier: float, steps: int) -> RoundPlan:
    """A round as `make_plan` plans it, for sites that publish OTHERS as their size."""
    config = parse_config(
        {
            "run": {"rounds": 1},
            "model": {"name": "canaries"},
            "data": {"train": "canaries"},
            "privacy": {
                "sample_rate": float(sample_rate),
                "noise_multiplier": float(noise_multiplier),
                "max_grad_norm": CLIP,
                "nominal_records": OTHERS,
                "delta": 1e-3,
            },
            "training": {"local_steps": steps, "learning_rate": _LEARNING_RATE, "micro_batch": _MICRO_BATCH},
        },
        source="the mechanism audit",
    )
    return make_plan(config).round(1)


@dataclass(frozen=True)
class Reading:
    """What a claim's run left behind, in contributions.

    `included`, `home` (which site a canary belongs to), `own` (its number in the sum of its site's updates)
    and `summed` (the same in the decoded secure sums) are `(m,)`. `untouched` and `untouched_sum` are numbers
    that no record moves, over all rounds; `rounds` is `(rounds · SITES, CELLS)`, across, of standard
    deviation 1 each; `decoding` the largest distance between a decoded sum and the updates', in steps of
    the encoding.
    """

    claim: Claim
    included: Bits
    own: Floats
    summed: Floats
    untouched: Floats
    untouched_sum: Floats
    rounds: Floats
    decoding: float


def run_claim(bench: Bench, claim: Claim, canaries: int, rng: np.random.Generator) -> Reading:
    """Train SITES sites for the claim's rounds, on half of the canaries and on other records."""
    cells = rng.permutation(CELLS)
    canary = cells[:canaries]
    included = rng.integers(0, 2, canaries).astype(bool)
    home = np.arange(canaries) % SITES
    others = cells[canaries : canaries + SITES * OTHERS].reshape(SITES, OTHERS)
    records = [np.concatenate([canary[included & (home == s)], others[s]]) for s in range(SITES)]
    own = np.zeros((SITES, 2, CELLS))
    summed = np.zeros((2, CELLS))
    rounds, decoding = [], 0.0
    adapter = bench.start()
    for steps in claim.rounds:
        plan = plan_of(claim.sample_rate, claim.noise_multiplier, steps)
        updates = [bench.train(plan, part, adapter, NoiseStream(rng.bytes(KEY_BYTES))) for part in records]
        mean, error = secure_mean(bench.layout, plan, updates, rng)
        read = np.stack([bench.read(plan, update) for update in updates])
        own += read
        summed += SITES * bench.read(plan, mean)
        rounds.append(read[:, 1] / (claim.noise_multiplier * steps**0.5))
        decoding = max(decoding, error)
        adapter = (adapter + mean).astype(np.float32)
    free = np.ones((SITES, CELLS), dtype=bool)
    for s, part in enumerate(records):
        free[s, part] = False
    return Reading(
        claim=claim,
        included=included,
        own=own[home, 0, canary],
        summed=summed[0, canary],
        untouched=np.concatenate([own[:, 0][free], own[:, 1].reshape(-1)]),
        untouched_sum=np.concatenate([summed[0, free.all(axis=0)], summed[1]]),
        rounds=np.concatenate(rounds),
        decoding=decoding,
    )


def secure_mean(
    layout: Layout, plan: RoundPlan, updates: list[Vector], rng: np.random.Generator
) -> tuple[Floats, float]:
    """(what the server decodes from the integer sum, its largest error in steps of the encoding)."""
    clip = largest_change(plan, RingBits.B32)
    codec = Codec(32, len(updates), 1, tuple(Tensor(size, clip) for size in layout.sizes))
    total = np.zeros(codec.words, dtype=np.uint32)
    for update in updates:
        total += codec.encode(update, 1, rng.bytes)
    mean = codec.decode_sum(total, len(updates)).mean
    error = np.abs(mean - np.mean(np.asarray(updates, dtype=np.float64), axis=0)).max()
    return mean, float(error * codec.scale(codec.tensors[0]))


def run_empty(bench: Bench, rng: np.random.Generator) -> tuple[Floats, float, float]:
    """(untouched numbers, their standard deviation if every step is noised, the share of empty batches).

    Ten records, each with probability 0.05: six batches in ten are empty.
    """
    few, rate, sigma, steps, rounds = 10, 0.05, 1.0, 20, 3
    plan = plan_of(rate, sigma, steps)
    records = rng.permutation(CELLS)[:few]
    total = np.zeros((2, CELLS))
    for _ in range(rounds):
        update = bench.train(plan, records, bench.start(), NoiseStream(rng.bytes(KEY_BYTES)))
        total += bench.read(plan, update)
    free = np.delete(total[0], records)
    return np.concatenate([free, total[1]]), sigma * (steps * rounds) ** 0.5, (1 - rate) ** few


@dataclass(frozen=True)
class Sampling:
    """How often each of 100 records was taken in each of 12 rounds of 10 steps, with hardly any noise.

    `counts` is `(rounds, records)`; `off` the largest distance of any number of the update from a whole
    number of contributions between none and one a step.
    """

    counts: Floats
    off: float
    steps: int
    sample_rate: float


def run_sampling(bench: Bench, rng: np.random.Generator) -> Sampling:
    plan = plan_of(0.1, _HARDLY, 10)
    records = rng.permutation(CELLS)[:100]
    counts, off = [], 0.0
    for _ in range(12):
        update = bench.train(plan, records, bench.start(), NoiseStream(rng.bytes(KEY_BYTES)))
        along, across = bench.read(plan, update)
        taken = np.zeros(CELLS)
        taken[records] = np.clip(np.rint(along[records]), 0, plan.steps)
        off = max(off, float(np.abs(along - taken).max()), float(np.abs(across).max()))
        counts.append(along[records])
    return Sampling(np.asarray(counts), off, plan.steps, plan.sample_rate)


def run_scale(bench: Bench, rng: np.random.Generator) -> tuple[float, float]:
    """Two full steps of 50 records, with hardly any noise, and again with one record more.

    Each record must contribute exactly twice and every other number stay zero. How far the worst number is
    off: (for 50 records and for 51, for 50 and one whose gradient is not finite).
    """
    plan = plan_of(1.0, _HARDLY, 2)
    records = rng.permutation(CELLS)[:51]

    def off(part: IntArray) -> float:
        expected = np.zeros(CELLS)
        expected[part[part < CELLS]] = plan.steps
        try:
            update = bench.train(plan, part, bench.start(), NoiseStream(rng.bytes(KEY_BYTES)))
        except ModelError:
            return math.inf
        along, across = bench.read(plan, update)
        return float(max(np.abs(along - expected).max(), np.abs(across).max()))

    usual = max(off(records[:-1]), off(records))
    return usual, off(np.append(records[:-1], OVERFLOW))
