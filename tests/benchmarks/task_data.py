"""The data of `tasks.py`: each writer puts train and test files into a folder, the same ones every time,
and gives the sections of a configuration that read them.

From banking77 (Casanueva et al. 2020), wnut17 (Derczynski et al. 2017), XQuAD's English part (Artetxe et al.
2020), scikit-learn's two sets that it carries, and a made-up language of three words a sentence.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.task_models import ENGLISH, save_decoder, save_translator, save_vision, sentences

Sections = dict[str, dict[str, Any]]
Writer = Callable[[Path, Path], Sections]
SAMPLE = "sample:all-minilm-l6-v2"
KINDS = ("corporation", "creative-work", "group", "location", "person", "product")
TOPICS = (
    "account", "balance", "card", "cash", "charge", "exchange", "fee", "identity", "limits", "payment",
    "pending", "pin", "rate", "refund", "top", "transfer", "virtual", "withdrawal", "wrong",
)  # fmt: skip
SIZES = ("tiny", "small", "medium", "large", "huge")


def intents(data: Path, folder: Path) -> Sections:
    """77 intents of questions to a bank."""
    files = {part: str(data / "banking77" / f"{part}.csv") for part in ("train", "test")}
    return {"model": {"name": SAMPLE, "max_length": 48}, "data": {**files, "label": "category"}}


def names(data: Path, folder: Path) -> Sections:
    """Names of six types in posts."""
    files = {part: str(data / "wnut17" / f"{part}.conll") for part in ("train", "test")}
    tags = [f"{mark}-{kind}" for kind in KINDS for mark in "BI"]
    return {
        "task": {"kind": "token-classification", "labels": ["O", *tags]},
        "model": {"name": SAMPLE, "max_length": 64},
        "data": {**files, "text": "tokens", "label": "tags"},
    }


def answers(data: Path, folder: Path) -> Sections:
    """Questions, each on the sentence that holds its answer; every fourth article is public."""
    articles = json.loads((data / "xquad" / "en.json").read_text("utf-8"))["data"]
    for part, chosen in {"train": (1, 2, 3), "test": (0,)}.items():
        paragraphs = [
            p for i, article in enumerate(articles) if i % 4 in chosen for p in article["paragraphs"]
        ]
        rows = [_near(p["context"], question) for p in paragraphs for question in p["qas"]]
        _write_jsonl(folder / f"{part}.jsonl", rows)
    columns = {"prompt": "question", "text": "context", "label": "answer", "start": "start"}
    return {
        "task": {"kind": "question-answering"},
        "model": {"name": SAMPLE, "max_length": 128},
        "data": _files(folder, "jsonl") | columns,
    }


def _near(context: str, question: dict[str, Any]) -> dict[str, Any]:
    """The question, with the sentence of its context that holds the answer."""
    answer = question["answers"][0]
    start, end = answer["answer_start"], answer["answer_start"] + len(answer["text"])
    breaks = [0, *(found.end() for found in re.finditer(r"[.!?] ", context)), len(context)]
    first = max(b for b in breaks if b <= start)
    last = min(b for b in breaks if b >= end)
    return {
        "question": question["question"],
        "context": context[first:last],
        "answer": answer["text"],
        "start": start - first,
    }


def pairs(data: Path, folder: Path) -> Sections:
    """Two questions: of the same intent or not, half and half."""

    def rows(questions: list[tuple[str, str]], rng: np.random.Generator) -> list[tuple[object, ...]]:
        made = _pairs(questions, rng)
        return [(a, b, "same" if one == other else "other") for a, b, one, other in made]

    _write_pairs(data, folder, rows)
    return {
        "task": {"labels": ["other", "same"]},
        "model": {"name": SAMPLE, "max_length": 80},
        "data": _files(folder, "csv") | {"prompt": "first", "text": "second", "label": "value"},
    }


def likeness(data: Path, folder: Path) -> Sections:
    """Two questions: five times the share of words that the names of their intents have in common."""

    def rows(questions: list[tuple[str, str]], rng: np.random.Generator) -> list[tuple[object, ...]]:
        return [(a, b, round(5 * shared(one, other), 2)) for a, b, one, other in _pairs(questions, rng)]

    _write_pairs(data, folder, rows)
    return {
        "task": {"kind": "regression", "range": [0, 5]},
        "model": {"name": SAMPLE, "max_length": 80},
        "data": _files(folder, "csv") | {"prompt": "first", "text": "second", "label": "value"},
    }


def topics(data: Path, folder: Path) -> Sections:
    """The topics of a question: those words of its intent's name that several intents share."""
    for part in ("train", "test"):
        part_of = _bank(data, part)[::4]
        rows = [(text, "|".join(w for w in TOPICS if w in words(name))) for text, name in part_of]
        _write_csv(folder / f"{part}.csv", ("text", "topics"), rows)
    return {
        "task": {"kind": "multi-label", "labels": list(TOPICS)},
        "model": {"name": SAMPLE, "max_length": 48},
        "data": _files(folder, "csv") | {"label": "topics"},
    }


def tumours(data: Path, folder: Path) -> Sections:
    """Ten measurements of a tumour, in words whose bounds are quintiles of the public rows."""
    from sklearn.datasets import load_breast_cancer

    bunch = load_breast_cancer()
    columns = [name.removeprefix("worst ") for name in bunch.feature_names[20:]]
    values, order = bunch.data[:, 20:], np.random.default_rng(0).permutation(len(bunch.data))
    split = {"test": order[:143], "train": order[143:]}
    bounds = np.quantile(values[split["test"]], [0.2, 0.4, 0.6, 0.8], axis=0)
    for part, chosen in split.items():
        rows = []
        for i in chosen:
            sizes = [SIZES[int(np.searchsorted(b, v))] for b, v in zip(bounds.T, values[i], strict=True)]
            rows.append((*sizes, bunch.target_names[bunch.target[i]]))
        _write_csv(folder / f"{part}.csv", (*columns, "finding"), rows)
    template = ", ".join(f"{{{name}}} {name}" for name in columns)
    return {
        "task": {"labels": ["malignant", "benign"]},
        "model": {"name": SAMPLE, "max_length": 64},
        "data": _files(folder, "csv") | {"template": template, "label": "finding"},
    }


def translation(data: Path, folder: Path) -> Sections:
    """Sentences of a made-up language, which the model knows, in an order of words that it does not."""
    _write_sentences(folder, 3000, 500)
    return {
        "task": {"kind": "sequence-to-sequence"},
        "model": {"name": str(save_translator(folder / "model")), "max_length": 16},
        "data": _files(folder, "jsonl") | {"prompt": "english", "text": "foreign"},
    }


def dialogue(data: Path, folder: Path) -> Sections:
    """The same of a decoder: prompts for a translation, and answers."""
    _write_sentences(folder, 3000, 500)
    return {
        "task": {"kind": "causal-lm"},
        "model": {"name": str(save_decoder(folder / "model")), "max_length": 16},
        "data": _files(folder, "jsonl") | {"prompt": "english", "text": "foreign"},
    }


def digits(data: Path, folder: Path) -> Sections:
    """Handwritten digits of 8 by 8 pixels, for a model that has learnt others in a mirror."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images, digits = (bunch.images * 15.9).astype(int), bunch.target
    order = np.random.default_rng(0).permutation(len(images))
    for part, chosen in {"test": order[:360], "train": order[360:1360]}.items():
        rows = [{"text": images[i].tolist(), "label": str(digits[i])} for i in chosen]
        _write_jsonl(folder / f"{part}.jsonl", rows)
    return {
        "task": {"kind": "image-classification", "labels": [str(digit) for digit in range(10)]},
        "model": {"name": str(save_vision(folder / "model", images[order[1360:]], digits[order[1360:]]))},
        "data": _files(folder, "jsonl"),
    }


def words(name: str) -> set[str]:
    return set(name.rstrip("?").lower().split("_"))


def shared(one: str, other: str) -> float:
    """Jaccard's share of the words of two intents' names."""
    return len(words(one) & words(other)) / len(words(one) | words(other))


def _bank(data: Path, part: str) -> list[tuple[str, str]]:
    with (data / "banking77" / f"{part}.csv").open(newline="", encoding="utf-8") as file:
        return [(row["text"], row["category"]) for row in csv.DictReader(file)]


def _pairs(questions: list[tuple[str, str]], rng: np.random.Generator) -> list[tuple[str, str, str, str]]:
    """Each question once: with another of its intent, or with one of any intent."""
    order = [questions[i] for i in rng.permutation(len(questions))]
    half = len(order) // 2
    alike = sorted(order[:half], key=lambda question: question[1])
    found = [
        *zip(alike[::2], alike[1::2], strict=False),
        *zip(order[half::2], order[half + 1 :: 2], strict=False),
    ]
    return [(a, b, one, other) for (a, one), (b, other) in (found[i] for i in rng.permutation(len(found)))]


def _write_pairs(
    data: Path,
    folder: Path,
    rows: Callable[[list[tuple[str, str]], np.random.Generator], list[tuple[object, ...]]],
) -> None:
    for seed, part in enumerate(("train", "test")):
        made = rows(_bank(data, part)[::2], np.random.default_rng(seed))
        _write_csv(folder / f"{part}.csv", ("first", "second", "value"), made)


def _write_sentences(folder: Path, train: int, test: int) -> None:
    """Subject, verb, object become object, subject, verb, each in the other language."""
    size = len(ENGLISH[0])
    chosen = np.random.default_rng(0).choice(size**3, train + test, replace=False)
    places = [(int(i) // size**2, int(i) // size % size, int(i) % size) for i in chosen]
    table = sentences(places, (2, 0, 1))
    rows = [
        {"english": english, "foreign": foreign}
        for english, foreign in zip(table.prompt or (), table.text, strict=True)
    ]
    _write_jsonl(folder / "test.jsonl", rows[:test])
    _write_jsonl(folder / "train.jsonl", rows[test:])


def _files(folder: Path, ending: str) -> dict[str, Any]:
    return {part: str(folder / f"{part}.{ending}") for part in ("train", "test")}


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])


def _write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
