"""What real data sets give at ε = 8 and without privacy, with the small sample encoder, on three
sites, or ten.

`python tests/benchmarks/tasks.py DATA [NAME ...] [--json]`. DATA holds banking77/{train,test}.csv (Casanueva
et al. 2020) and wnut17/{train,test}.conll (Derczynski et al. 2017). Some minutes of one core for each run.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from harness import row

Sections = dict[str, dict[str, Any]]
TAGS = [
    f"{m}-{t}"
    for t in ("corporation", "creative-work", "group", "location", "person", "product")
    for m in "BI"
]

INTENTS: Sections = {
    "run": {"rounds": 1},
    "model": {"head": "mean", "max_length": 48},
    "adapter": {"layers": [-1]},
    "data": {"train": "banking77/train.csv", "test": "banking77/test.csv", "label": "category"},
    "warmup": {"rounds": 5, "local_steps": 40, "learning_rate": 20.0},
    "training": {"local_steps": 1},
}
# Under privacy fewer, larger steps of fewer numbers; O, which is nearly every word, weighs less.
INTENTS_PRIVATE: Sections = INTENTS | {
    "warmup": {"rounds": 5, "local_steps": 10, "learning_rate": 20.0, "target_epsilon": 7.5}
}
# Ten sites of a thousand records: fifteen steps, each of a whole site, and nearly all of ε for the head.
INTENTS_TEN: Sections = INTENTS | {
    "sites": {"count": 10},
    "warmup": {"rounds": 5, "local_steps": 3, "learning_rate": 200.0, "momentum": 0.0, "target_epsilon": 7.8},
    "training": {"local_steps": 1, "learning_rate": 0.1, "micro_batch": 250},
}
NAMES: Sections = {
    "run": {"rounds": 4},
    "task": {"kind": "token-classification", "labels": ["O", *TAGS]},
    "model": {"max_length": 64},
    "adapter": {"rank": 16, "layers": [-3, -2, -1], "target_modules": ["query", "key", "value"]},
    "data": {"train": "wnut17/train.conll", "test": "wnut17/test.conll", "text": "tokens", "label": "tags"},
    "privacy": {"sample_rate": 0.03},
    "training": {"local_steps": 20, "learning_rate": 0.005, "optimizer": "adam", "micro_batch": 64},
}
NAMES_PRIVATE: Sections = NAMES | {
    "run": {"rounds": 5},
    "task": NAMES["task"] | {"class_weights": [0.3] + [1.0] * len(TAGS)},
    "adapter": {"rank": 4, "layers": [-2, -1]},
    "privacy": {"sample_rate": 0.1},
    "training": NAMES["training"] | {"local_steps": 4, "learning_rate": 0.01},
}
RUNS = {
    "banking77": ("accuracy", INTENTS_PRIVATE, INTENTS),
    "banking77-ten": ("accuracy", INTENTS_TEN, INTENTS | {"sites": {"count": 10}}),
    "wnut17": ("entity F1", NAMES_PRIVATE, NAMES),
}


def score(data: Path, sections: Sections, metric: str, private: bool) -> float:
    """The metric of one run, on the public test set."""
    import confide
    from common.config import Engine, parse_config
    from simulations.run import create_folder, prepare, simulate
    from simulations.screen import Silent

    confide.settle_environment()
    settings = {"sites": {"count": 3}, **sections, "evaluation": {"every": 0}}
    settings["run"] = {**sections["run"], "threads": 1, "name": "benchmark"}
    settings["model"] = {**sections["model"], "name": "sample:all-minilm-l6-v2"}
    config = parse_config(settings, source="benchmark", base=data)
    off = config.privacy.model_copy(update={"insecure_disabled": not private})
    with tempfile.TemporaryDirectory() as folder:
        resolved, _ = prepare(config.model_copy(update={"privacy": off}))
        outcome = simulate(create_folder(Path(folder) / "runs", resolved), Engine.INLINE, Silent())
    found: float = outcome.summary["scores_final"][metric]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(RUNS)}; none: all")
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    asked = parser.parse_args()
    for name in asked.names or RUNS:
        metric, private, plain = RUNS[name]
        data = asked.data.resolve()
        ours = score(data, private, metric, private=True)
        peer = score(data, plain, metric, private=False)
        found = row(f"{name} at ε = 8, peer without privacy", ours, peer, metric)
        text = f"{found.work}: {ours:.3f}, {peer:.3f} {metric}"
        print(json.dumps(asdict(found)) if asked.json else text, flush=True)


if __name__ == "__main__":
    main()
