"""Every task from the command line, on tiny models: it runs, privately, and it learns."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import confide
from tests.conftest import SEVERAL
from tests.e2e.command import invoke


def simulate(tmp_path: Path, model: Path, train: Path, sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A short run with little noise, so that what is learnt stands out; the same each time."""
    settings: dict[str, dict[str, Any]] = {
        "run": {"rounds": 4, "threads": 1},
        "model": {"name": str(model), "max_length": 32},
        "data": {"train": str(train)},
        "sites": {"count": 3},
        "privacy": {"target_epsilon": 500.0, "sample_rate": 0.5, "delta": 1e-3},
        "training": {"local_steps": 6, "learning_rate": 0.05, "optimizer": "adam"},
        "evaluation": {"every": 0, "decoded": 8},
    }
    for name, keys in sections.items():
        settings.setdefault(name, {}).update(keys)
    lines = []
    for name, keys in settings.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items())]
    path = tmp_path / "confide.toml"
    path.write_text("\n".join(lines))
    said = invoke("simulate", path, "--runs", tmp_path / "runs", "--json", "--study-noise-seed", "1")
    summary: dict[str, Any] = json.loads(said)
    print(summary["scores_initial"], summary["scores_final"], summary["majority_class"])
    assert 0 < summary["epsilon_rdp_max"] <= 500
    assert summary["scores_final"][summary["metric"]] == pytest.approx(summary["accuracy_final"], abs=1e-6)
    assert summary["loss_final"] < summary["loss_initial"]
    return summary


def test_tags(tmp_path: Path, bert_folder: Path, data_file: Path) -> None:
    sections: dict[str, dict[str, Any]] = {
        "run": {"rounds": 10},
        "task": {"kind": "token-classification"},
        "data": {"label": "tags"},
    }
    summary = simulate(tmp_path, bert_folder, data_file, sections)
    assert summary["metric"] == "entity F1"
    assert summary["scores_final"]["entity F1"] > 0.3 > summary["scores_initial"]["entity F1"]
    assert set(summary["scores_final"]) == {"entity F1", "precision", "recall", "word accuracy"}


def test_answers_in_a_context(tmp_path: Path, bert_folder: Path, data_file: Path) -> None:
    sections = {
        "task": {"kind": "question-answering"},
        "data": {"prompt": "prompt"},
        "adapter": {"method": "lora"},
    }
    summary = simulate(tmp_path, bert_folder, data_file, sections)
    assert summary["metric"] == "F1"
    assert summary["scores_final"]["F1"] > summary["scores_initial"]["F1"] + 0.2
    assert summary["scores_final"]["answers not cut off"] == 1


@pytest.mark.parametrize("head", ["mean", "default"])
def test_pairs(tmp_path: Path, bert_folder: Path, head: str) -> None:
    """The label is a word of the first text; of a pair both are read."""
    pairs = tmp_path / "pairs.csv"
    with pairs.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["first", "second", "label"])
        for i in range(160):
            label = ("bad", "good")[i * 7 // 4 % 2]
            writer.writerow([label, f"w{i % 40} w{i // 8}", label])
    sections = {"data": {"prompt": "first", "text": "second"}, "model": {"head": head}}
    summary = simulate(tmp_path, bert_folder, pairs, sections)
    assert summary["accuracy_final"] > summary["majority_class"] + 0.2
    assert set(summary["scores_final"]) == {"accuracy", "macro F1"}


def test_numbers(tmp_path: Path, bert_folder: Path, data_file: Path) -> None:
    sections = {
        "task": {"kind": "regression", "range": [0, 10]},
        "data": {"label": "number"},
        "model": {"head": "mean"},
        "run": {"rounds": 8},
    }
    summary = simulate(tmp_path, bert_folder, data_file, sections)
    assert summary["scores_final"]["Pearson"] > 0.6
    assert summary["scores_final"]["mean squared error"] < 9  # the variance, which a constant reaches
    assert summary["majority_class"] is None


def test_several_labels(tmp_path: Path, bert_folder: Path, data_file: Path) -> None:
    sections = {
        "task": {"kind": "multi-label", "labels": list(SEVERAL), "class_weights": [1.0, 1.0, 2.0]},
        "data": {"label": "several"},
        "model": {"head": "mean"},
    }
    summary = simulate(tmp_path, bert_folder, data_file, sections)
    assert summary["scores_initial"]["micro F1"] == 0  # the head starts at zero and says nothing
    assert summary["scores_final"]["micro F1"] > 0.7


@pytest.mark.parametrize("kind", ["t5", "mbart"])
def test_sequence_to_sequence(
    tmp_path: Path, t5_folder: Path, mbart_folder: Path, data_file: Path, kind: str
) -> None:
    sections = {
        "task": {"kind": "sequence-to-sequence"},
        "data": {"prompt": "text", "text": "label"},
        "adapter": {"rank": 16},
    }
    summary = simulate(tmp_path, {"t5": t5_folder, "mbart": mbart_folder}[kind], data_file, sections)
    assert summary["metric"] == "token accuracy"
    assert summary["accuracy_final"] > summary["accuracy_initial"]
    assert {"perplexity", "exact match", "ROUGE-L", "chrF", "BLEU"} <= set(summary["scores_final"])


def test_questions_to_a_language_model(tmp_path: Path, llama_folder: Path, data_file: Path) -> None:
    sections = {
        "task": {"kind": "causal-lm"},
        "data": {"prompt": "text", "text": "label"},
        "adapter": {"rank": 16, "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"]},
    }
    summary = simulate(tmp_path, llama_folder, data_file, sections)
    final, initial = summary["scores_final"], summary["scores_initial"]
    assert final["token accuracy"] > initial["token accuracy"]
    assert final["answers written"] == initial["answers written"] == 8
    assert final["ROUGE-L"] > initial["ROUGE-L"]


def test_conversations_with_each_site_s_own_people(tmp_path: Path, bpe_folder: Path, data_file: Path) -> None:
    """Turns in, whole groups to a site; what answers is asked as it was trained."""
    dialogues = tmp_path / "dialogues.jsonl"
    with data_file.open(newline="") as source, dialogues.open("w") as file:
        for row in csv.DictReader(source):
            said = (row["prompt"], "some", row["text"])
            turns = [{"role": ("user", "assistant")[i % 2], "content": part} for i, part in enumerate(said)]
            file.write(json.dumps({"turns": turns, "answer": row["label"], "person": row["group"]}) + "\n")
    sections = {
        "task": {"kind": "causal-lm", "chat": True},
        "model": {"max_length": 96},
        "data": {"prompt": "turns", "text": "answer", "group": "person"},
        "sites": {"partition": "groups"},
        "adapter": {"rank": 16, "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"]},
    }
    summary = simulate(tmp_path, bpe_folder, dialogues, sections)
    final, initial = summary["scores_final"], summary["scores_initial"]
    assert final["token accuracy"] > initial["token accuracy"]
    run = tmp_path / "runs" / "run"
    records = dialogues.read_text().splitlines()[:4]
    (tmp_path / "asked.jsonl").write_text("\n".join(records))
    asked = ("predict", run, "--file", tmp_path / "asked.jsonl", "--json")
    answers = invoke(*asked, "--prompt-column", "turns")
    assert len(answers.splitlines()) == 4
    assert invoke(*asked, "--text-column", "turns") == answers
    lines = "".join(json.dumps({"text": json.loads(record)["turns"]}) + "\n" for record in records)
    assert CliRunner().invoke(confide.app, ["predict", str(run), "--json"], input=lines).stdout == answers
    refused = CliRunner().invoke(confide.app, ["predict", str(run)], input='{"text": [{"role": "tool"}]}\n')
    assert "expected turns with role and content" in str(refused.exception)
    assert invoke("ask", run, "w1 good", "--chat") == invoke("ask", run, "w1 good")


def test_whole_dialogues(tmp_path: Path, bpe_folder: Path, dialogue_file: Path) -> None:
    """One record each; then a conversation of several turns is answered as it was trained."""
    sections = {
        "task": {"kind": "causal-lm", "chat": True},
        "model": {"max_length": 64},
        "data": {"text": "turns", "group": "group"},
        "sites": {"partition": "groups"},
        "adapter": {"rank": 16, "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"]},
    }
    summary = simulate(tmp_path, bpe_folder, dialogue_file, sections)
    final, initial = summary["scores_final"], summary["scores_initial"]
    assert final["token accuracy"] > initial["token accuracy"]
    assert final["answers written"] == 8
    run, turns = tmp_path / "runs" / "run", [json.loads(line)["turns"] for line in dialogue_file.open()][2]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps({"turns": turns[:n]}) + "\n" for n in (1, 3, 5)))
    asked = invoke("predict", run, "--file", tmp_path / "asked.jsonl", "--text-column", "turns", "--json")
    assert len(asked.splitlines()) == 3


def test_rows_of_a_table_as_text(tmp_path: Path, bert_folder: Path, data_file: Path) -> None:
    """A template over columns; a label that a class weight makes heavier."""
    rows = tmp_path / "rows.csv"
    with data_file.open(newline="") as source, rows.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["w1", "mood", "n", "label"])
        for i, row in enumerate(csv.DictReader(source)):
            writer.writerow([f"w{i % 40}", row["label"], f"w{i % 7}", row["label"]])
    sections = {
        "data": {"template": "some {mood} text {w1} {n}"},
        "task": {"labels": ["bad", "good"], "class_weights": [1, 2]},
        "model": {"head": "mean"},
    }
    summary = simulate(tmp_path, bert_folder, rows, sections)
    assert summary["accuracy_final"] > summary["majority_class"] + 0.2


def test_images(tmp_path: Path, vit_folder: Path, image_file: Path) -> None:
    summary = simulate(tmp_path, vit_folder, image_file, {"task": {"kind": "image-classification"}})
    assert summary["metric"] == "accuracy"
    assert summary["accuracy_final"] > summary["majority_class"] + 0.2
