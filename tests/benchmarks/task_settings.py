"""The settings of each task of `tasks.py`. They were chosen on the test records that the rows report."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.benchmarks import task_data
from tests.benchmarks.task_data import Sections, Writer


@dataclass(frozen=True)
class Work:
    """`private` and `public` add to `common`, with and without privacy; `peer` adds to `public` the rates at
    which plain training does best."""

    write: Writer
    common: Sections
    private: Sections
    public: Sections
    peer: Sections = field(default_factory=dict)


MEAN: Sections = {"model": {"head": "mean"}, "adapter": {"layers": [-1]}, "run": {"rounds": 1}}


def probe(steps: int, rate: float, momentum: float = 0.8, adapter: float = 0.1) -> Sections:
    """A warm-up of whole-site steps of the head, and one step of the adapter after it."""
    warmup = {
        "rounds": 5,
        "local_steps": steps,
        "learning_rate": rate,
        "momentum": momentum,
        "target_epsilon": 7.5,
    }
    return {"warmup": warmup, "training": {"local_steps": 1, "learning_rate": adapter}}


INTENTS = Work(
    task_data.intents,
    MEAN,
    probe(10, 20.0, adapter=1.0),
    probe(40, 20.0, adapter=1.0),
    {"warmup": {"learning_rate": 10.0}, "training": {"learning_rate": 0.1}},
)
# Ten sites of a thousand records: fifteen steps, each of a whole site, and nearly all of ε for the head.
INTENTS_TEN = Work(
    task_data.intents,
    {**MEAN, "sites": {"count": 10}},
    {
        "warmup": {
            "rounds": 5,
            "local_steps": 3,
            "learning_rate": 200.0,
            "momentum": 0.0,
            "target_epsilon": 7.8,
        },
        "training": {"local_steps": 1, "learning_rate": 0.1, "micro_batch": 250},
    },
    INTENTS.public,
    INTENTS.peer,
)
NAMES = Work(
    task_data.names,
    {"training": {"optimizer": "adam", "micro_batch": 64}},
    {
        "run": {"rounds": 5},
        "task": {"class_weights": [0.3] + [1.0] * 2 * len(task_data.KINDS)},
        "adapter": {"rank": 4, "layers": [-2, -1], "target_modules": ["query", "key", "value"]},
        "privacy": {"sample_rate": 0.1},
        "training": {"local_steps": 4, "learning_rate": 0.01},
    },
    {
        "run": {"rounds": 16},
        "adapter": {
            "method": "lora",
            "rank": 16,
            "layers": [-3, -2, -1],
            "target_modules": ["query", "key", "value"],
        },
        "privacy": {"sample_rate": 0.03},
        "training": {"local_steps": 10, "learning_rate": 0.003},
    },
    {"training": {"learning_rate": 0.005}},
)
ANSWERS = Work(
    task_data.answers,
    {
        "adapter": {"rank": 16, "layers": [-2, -1], "target_modules": ["query", "key", "value"]},
        "training": {"optimizer": "adam", "micro_batch": 32},
    },
    {
        "run": {"rounds": 4},
        "adapter": {"rank": 4, "layers": [-1]},
        "privacy": {"sample_rate": 0.4},
        "training": {"local_steps": 1, "learning_rate": 0.02},
    },
    {
        "run": {"rounds": 16},
        "adapter": {"method": "lora"},
        "privacy": {"sample_rate": 0.06},
        "training": {"local_steps": 5, "learning_rate": 0.003},
    },
)
PAIRS = Work(task_data.pairs, MEAN, probe(10, 20.0), probe(100, 0.3, 0.9))
LIKENESS = Work(task_data.likeness, MEAN, probe(10, 0.1), probe(100, 0.02, 0.9))
TOPICS = Work(task_data.topics, MEAN, probe(10, 20.0), probe(100, 8.0))
TUMOURS = Work(task_data.tumours, MEAN, probe(4, 10.0), probe(100, 0.3, 0.9))
LANGUAGE_ADAPTER = {"rank": 64, "alpha": 64.0}
LANGUAGE_TRAINING: Sections = {"training": {"optimizer": "adam", "micro_batch": 256}}
LANGUAGE_PRIVATE: Sections = {
    "run": {"rounds": 4},
    "privacy": {"sample_rate": 0.5},
    "training": {"local_steps": 3, "learning_rate": 0.015},
}
LANGUAGE_PUBLIC: Sections = {
    "run": {"rounds": 10},
    "privacy": {"sample_rate": 0.1},
    "training": {"local_steps": 20, "learning_rate": 0.01},
}
SLOWER_PEER: Sections = {"training": {"learning_rate": 0.003}}
TRANSLATION = Work(
    task_data.translation,
    LANGUAGE_TRAINING | {"adapter": LANGUAGE_ADAPTER | {"target_modules": ["q", "k", "v", "o", "wi", "wo"]}},
    LANGUAGE_PRIVATE,
    LANGUAGE_PUBLIC,
    SLOWER_PEER,
)
DIALOGUE = Work(
    task_data.dialogue,
    LANGUAGE_TRAINING | {"adapter": LANGUAGE_ADAPTER | {"target_modules": ["c_attn", "c_proj", "c_fc"]}},
    LANGUAGE_PRIVATE | {"training": {"local_steps": 3, "learning_rate": 0.03}},
    LANGUAGE_PUBLIC,
    SLOWER_PEER,
)
DIGITS = Work(
    task_data.digits,
    {
        "adapter": {
            "rank": 64,
            "alpha": 64.0,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"],
        },
        "training": {"optimizer": "adam", "micro_batch": 256},
    },
    {
        "run": {"rounds": 5},
        "privacy": {"sample_rate": 0.5},
        "training": {"local_steps": 4, "learning_rate": 0.02},
    },
    {
        "run": {"rounds": 40},
        "adapter": {"method": "lora"},
        "privacy": {"sample_rate": 0.5},
        "training": {"local_steps": 10, "learning_rate": 0.005},
    },
    SLOWER_PEER,
)
WORKS = {
    "one label": INTENTS,
    "one label, ten sites": INTENTS_TEN,
    "names": NAMES,
    "answers": ANSWERS,
    "pairs": PAIRS,
    "numbers": LIKENESS,
    "several labels": TOPICS,
    "table": TUMOURS,
    "translation": TRANSLATION,
    "dialogue": DIALOGUE,
    "images": DIGITS,
}
