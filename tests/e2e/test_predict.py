"""`confide predict` and `confide ask` on exported adapters: the answers are the trained model's own."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import confide
from common.adapter import write_vector
from common.chat_template import chat_ids
from common.decoding import _text
from common.errors import ConfigError, DataError, ModelError
from common.evaluation import evaluate
from common.export import PrivacyClaim, export_adapter
from common.prediction import open_adapter
from common.speaking import Speaker, question_ids
from common.tasks import collate
from tests.conftest import KINDS, LABELS, World, moved
from tests.e2e.command import invoke

Worlds = Callable[..., World]
CLAIM = PrivacyClaim(1.0, 1.0, 1e-5, secure_aggregation=False, read_from_data=(), repeatable_noise=False)


def exported(this: World, folder: Path) -> Path:
    export_adapter(this.model, moved(this.model), this.config, CLAIM, folder)
    write_vector(this.model.parameters, this.model.layout, moved(this.model))
    return folder


def answers(*arguments: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in invoke("predict", *arguments, "--json").splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_every_exported_adapter_opens_as_it_was(world: Worlds, kind: str, tmp_path: Path) -> None:
    this = world(kind)
    predictor = open_adapter(exported(this, tmp_path / "adapter"), "cpu")
    batch = collate(this.examples, [0, 1, 2], this.model.pad_id, this.model.device)
    with torch.no_grad():
        ours, theirs = this.model.logits(batch.inputs), predictor.model.logits(batch.inputs)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_file_in_its_order(world: Worlds, data_file: Path, tmp_path: Path) -> None:
    """The share of right answers is the accuracy that a run would measure; batches change nothing."""
    this = world("bert-mean")
    folder = exported(this, tmp_path / "adapter")
    found = answers(folder, "--file", data_file)
    with data_file.open(newline="") as file:
        labels = [row["label"] for row in csv.DictReader(file)]
    right = sum(a["label"] == b for a, b in zip(found, labels, strict=True))
    sums = evaluate(this.model, moved(this.model), this.examples, np.arange(len(labels)))
    assert right / len(labels) == sums.accuracy
    assert [a["label"] for a in answers(folder, "--file", data_file, "--batch", "7")] == [
        a["label"] for a in found
    ]
    assert 0.5 <= found[0]["probability"] <= 1


def test_one_text_and_standard_input(world: Worlds, tmp_path: Path) -> None:
    folder = exported(world("bert-mean"), tmp_path / "adapter")
    (one,) = answers(folder, "some good text")
    assert one["label"] in LABELS
    assert invoke("predict", folder, "some good text") == f"{one['label']}\t{one['probability']:.3f}\n"
    lines = 'some good text\n\n{"text": "w1"}\n'
    said = CliRunner().invoke(confide.app, ["predict", str(folder), "--json"], input=lines).stdout
    assert [json.loads(line) for line in said.splitlines()] == [one, *answers(folder, "w1")]
    texts = tmp_path / "texts.txt"
    texts.write_text("some good text\nw1\n")
    assert answers(folder, "--file", texts) == [one, *answers(folder, "w1")]


def test_a_pair_needs_both(world: Worlds, data_file: Path, tmp_path: Path) -> None:
    folder = exported(world("bert-pair"), tmp_path / "adapter")
    (one,) = answers(folder, "some good text", "--prompt", "is this")
    said = CliRunner().invoke(
        confide.app,
        ["predict", str(folder), "--json"],
        input='{"text": "some good text", "prompt": "is this"}\n',
    )
    assert json.loads(said.stdout) == one
    assert len(answers(folder, "--file", data_file, "--prompt-column", "prompt")) == 160
    with pytest.raises(ModelError, match="a prompt and a text"):
        invoke("predict", folder, "some good text")


def test_answers_of_each_kind(world: Worlds, tmp_path: Path) -> None:
    def of(kind: str, *arguments: str) -> dict[str, Any]:
        (answer,) = answers(exported(world(kind), tmp_path / kind), *arguments)
        return answer

    text = "w1 some good text w3"
    assert of("bert-answers", text, "--prompt", "is this")["answer"] in text
    assert set(of("bert-several", text)["labels"]) <= {"fine", "poor", "low"}
    assert isinstance(of("bert-number", text)["value"], float)
    for entity in of("bert-tags", text)["entities"]:
        first, last = entity["words"]
        assert entity["text"] == " ".join(text.split(" ")[first : last + 1])
    for kind in ("llama-causal", "gpt2-causal", "t5-writes", "mbart-writes"):
        assert isinstance(of(kind, text)["text"], str)


def test_a_tagger_names_what_it_was_taught(world: Worlds, tmp_path: Path) -> None:
    """The tags of the exported adapter are those of the model's own logits, word by word."""
    this = world("bert-tags")
    folder = exported(this, tmp_path / "adapter")
    text = "w1 good w30 bad"
    encoded = this.model.tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        best = this.model.logits({k: encoded[k] for k in ("input_ids", "attention_mask")})[0].argmax(dim=-1)
    tags = [this.model.task.labels[i] for i in best[1:-1].tolist()]
    assert [e["words"][0] for e in answers(folder, text)[0]["entities"]] == [
        i for i, tag in enumerate(tags) if tag != "O"
    ]


def test_images(world: Worlds, image_file: Path, tmp_path: Path) -> None:
    folder = exported(world("vit-images"), tmp_path / "adapter")
    assert [a["label"] in LABELS for a in answers(folder, "--file", image_file)] == [True] * 160


def test_ask_writes_what_predict_says(world: Worlds, tmp_path: Path) -> None:
    folder = exported(world("llama-causal"), tmp_path / "adapter")
    (one,) = answers(folder, "w1 w2")
    assert invoke("ask", folder, "w1 w2", "--max-tokens", "16").strip() == one["text"].strip()
    two = (
        CliRunner().invoke(confide.app, ["ask", str(folder), "--max-tokens", "4"], input="w1\nw2\n\n").stdout
    )
    assert len(two.strip("\n").splitlines()) == 2
    drawn = [
        invoke("ask", folder, "w1", "--max-tokens", "12", "--temperature", "5", "--seed", s) for s in "112"
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(ModelError, match="chat template"):
        invoke("ask", folder, "w1", "--chat")
    with pytest.raises(ModelError, match="causal-lm"):
        invoke("ask", exported(world("bert-mean"), tmp_path / "other"), "w1")


@pytest.mark.parametrize("kind", ["gpt2-causal", "llama-causal"])
def test_an_answer_stays_within_what_the_model_reads(world: Worlds, kind: str, tmp_path: Path) -> None:
    """Learnt positions end in an error of an index, turned ones in nonsense."""
    folder = exported(world(kind), tmp_path / "adapter")
    assert len(invoke("ask", folder, "w1", "--max-tokens", "1000").split()) <= 64
    assert invoke("ask", folder, "w1 " * 500, "--max-tokens", "1000")  # a prompt is cut, as in training
    result = CliRunner().invoke(confide.app, ["ask", str(folder), "w1", "--seed", str(2**64)])
    assert result.exit_code == 2 and "--seed" in result.output


def test_a_conversation_that_cannot_be_answered_is_said(world: Worlds, tmp_path: Path) -> None:
    predictor = open_adapter(exported(world("gpt2-causal"), tmp_path / "adapter"), "cpu")
    once = "{{ raise_exception('SECRET') if messages | length > 1 }}{{ messages[0].content }} is"
    predictor.model.tokenizer.chat_template = once
    speaker = Speaker.of(predictor, 4, 0.0, 1.0, None, chat=True)
    speaker.answer("w1", io.StringIO())
    kept = list(speaker.turns)
    with pytest.raises(ModelError, match=r"does not take this conversation .*several questions") as caught:
        speaker.answer("w2", io.StringIO())
    assert "SECRET" not in str(caught.value)
    assert speaker.turns == kept  # and the conversation goes on without it
    speaker = Speaker.of(predictor, 4, 0.0, 1.0, None, chat=True)
    with pytest.raises(ModelError, match=r"has 71 tokens, the model reads at most 64 .* new conversation"):
        speaker.answer("w1 " * 70, io.StringIO())


def test_a_conversation_goes_on_after_a_question_that_is_too_long(world: Worlds, tmp_path: Path) -> None:
    """It ended there, and what had been said was lost."""
    this = world("gpt2-causal")
    folder = exported(this, tmp_path / "adapter")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}is")
    lines = "w1\n" + "w1 " * 70 + "\nw2\n\n"
    ask = ["ask", str(folder), "--chat", "--max-tokens", "2"]
    done = CliRunner().invoke(confide.app, ask, input=lines)
    assert done.exit_code == ModelError.exit_code and "the model reads at most 64" in done.stderr
    assert done.stdout == CliRunner().invoke(confide.app, ask, input="w1\nw2\n\n").stdout


def test_a_system_turn_comes_first(world: Worlds, tmp_path: Path) -> None:
    """A model whose template wants one could not be asked."""
    predictor = open_adapter(exported(world("bpe-chat-causal"), tmp_path / "adapter"), "cpu")
    tokenizer = predictor.model.tokenizer
    wants = "{{ raise_exception('no') if messages[0].role != 'system' }}"
    tokenizer.chat_template = wants + tokenizer.chat_template
    asked = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "w1"}]
    assert question_ids(predictor, "w1", "be kind") == chat_ids(tokenizer, asked)
    for chat in (True, False):
        speaker = Speaker.of(predictor, 4, 0.0, 1.0, None, chat, "be kind")
        assert speaker._ids("w1") == chat_ids(tokenizer, asked)
        speaker.answer("w1", io.StringIO())
    with pytest.raises(ModelError, match=r"does not take .* want a system turn"):
        Speaker.of(predictor, 4, 0.0, 1.0, None, chat=True).answer("w1", io.StringIO())
    blank = Speaker.of(predictor, 4, 0.0, 1.0, None, True, " ")
    assert blank.system == ""  # as where each question stands alone
    texts = exported(world("gpt2-causal"), tmp_path / "texts")
    with pytest.raises(ModelError, match="leave --system out"):
        invoke("ask", texts, "w1", "--system", "be kind")


@pytest.mark.parametrize("text", ['[{"id": 1}] what is this?', "[{x},{y}] what set?"])
def test_a_text_that_begins_like_a_list_is_answered(world: Worlds, tmp_path: Path, text: str) -> None:
    """In a column of conversations it is refused; what somebody asks is a question."""
    folder = exported(world("bpe-chat-causal"), tmp_path / "adapter")
    (one,) = answers(folder, text)
    result = CliRunner().invoke(confide.app, ["predict", str(folder), "--json"], input=f"{text}\nw1\n")
    assert result.exit_code == 0 and json.loads(result.stdout.splitlines()[0]) == one


def test_a_question_that_is_refused_ends_nothing(world: Worlds, tmp_path: Path) -> None:
    folder = exported(world("bpe-chat-causal"), tmp_path / "adapter")
    template = (folder / "chat_template.jinja").read_text("utf-8")
    refusing = "{{ raise_exception('no') if messages[-1].content == 'bad' }}"
    (folder / "chat_template.jinja").write_text(refusing + template, "utf-8")
    ask = ["ask", str(folder), "--max-tokens", "2"]
    done = CliRunner().invoke(confide.app, ask, input="w1\nbad\nw2\n\n")
    assert done.exit_code == DataError.exit_code and "does not take this conversation" in done.stderr
    assert done.stdout == CliRunner().invoke(confide.app, ask, input="w1\nw2\n\n").stdout


def test_padding_stands_in_no_answer(world: Worlds, tmp_path: Path) -> None:
    """Where a tokenizer has no padding it is the first word, and stood after the end of shorter answers."""
    this = world("bpe-chat-causal")
    tokenizer = this.model.tokenizer
    end, word = tokenizer.eos_token_id, tokenizer("w1")["input_ids"]
    assert _text(this.model, [*word, end, *word, *word]) == "w1"
    assert _text(this.model, word) == "w1"


def test_a_chat_keeps_its_turns(world: Worlds, tmp_path: Path) -> None:
    predictor = open_adapter(exported(world("llama-causal"), tmp_path / "adapter"), "cpu")
    predictor.model.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}is"
    speaker = Speaker.of(predictor, 4, 0.0, 1.0, None, chat=True)
    with (tmp_path / "said").open("w") as out:
        speaker.answer("w1", out)
        first = speaker._ids("w2")
    assert [turn["role"] for turn in speaker.turns] == ["user", "assistant"]
    vocabulary = predictor.model.tokenizer.get_vocab()
    assert vocabulary["w1"] in first and vocabulary["w2"] in first


def test_what_cannot_be_answered_is_said(world: Worlds, data_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no adapter of a run"):
        invoke("predict", tmp_path, "w1")
    folder = exported(world("bert-mean"), tmp_path / "adapter")
    with pytest.raises(ConfigError, match="not both"):
        invoke("predict", folder, "w1", "--file", data_file)
    result = CliRunner().invoke(confide.app, ["predict", str(folder)], input='{"words": 1}\n')
    assert isinstance(result.exception, DataError) and "row 1" in str(result.exception)
    result = CliRunner().invoke(confide.app, ["predict", str(folder)], input="\n")
    assert isinstance(result.exception, DataError)


def test_input_that_is_not_utf8_names_row_and_byte(world: Worlds, tmp_path: Path) -> None:
    folder = exported(world("bert-mean"), tmp_path / "adapter")
    texts = tmp_path / "texts.txt"
    texts.write_bytes(b"w1\nw2 \xff w3\n")
    result = CliRunner().invoke(confide.app, ["predict", str(folder)], input=texts.read_bytes())
    assert isinstance(result.exception, DataError)
    assert "standard input, row 2" in str(result.exception)
    with pytest.raises(DataError, match=r"texts\.txt, row 2 .*expected UTF-8, found the byte 0xff"):
        invoke("predict", folder, "--file", texts)


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ('{"text": null, "prompt": "w2"}', "row 3, column 'text': expected text or a number, found null"),
        (
            '{"text": ["w1"], "prompt": "w2"}',
            "row 3, column 'text': expected text or a number, found a value of type",
        ),
        ('{"text": "w1", "prompt": {}}', "row 3, column 'prompt': expected text or a number, found a value"),
        ('{"text": "w1"}', "row 3: expected a prompt, as other records have one, found none"),
        ('{"text":' * 100_000, "row 3: expected a text, or a JSON object with `text`"),
    ],
)
def test_a_json_line_without_a_text_is_refused(world: Worlds, tmp_path: Path, record: str, says: str) -> None:
    folder = exported(world("bert-pair"), tmp_path / "adapter")
    lines = '{"text": "w1", "prompt": "w2"}\n\n' + record + "\n"
    result = CliRunner().invoke(confide.app, ["predict", str(folder)], input=lines)
    assert isinstance(result.exception, DataError) and says in str(result.exception)


def test_a_line_of_json_may_hold_line_separators_and_words(world: Worlds, tmp_path: Path) -> None:
    folder = exported(world("bert-tags"), tmp_path / "adapter")
    lines = '{"text": ["w1", "good"]}\n{"text": "w1\u2028w2"}\n'
    said = CliRunner().invoke(confide.app, ["predict", str(folder), "--json"], input=lines)
    assert said.exception is None and len(said.stdout.split("\n")) == 3


def test_a_path_of_an_image_starts_where_the_command_runs(
    world: Worlds, image_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    folder = exported(world("vit-images"), tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("a.png")
    (one,) = answers(folder, "a.png")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "paths.txt").write_text("a.png\n")
    assert answers(folder, "--file", tmp_path / "elsewhere" / "paths.txt") == [one]
    with pytest.raises(DataError, match="row 1, column 'text': expected the path of an image"):
        invoke("predict", folder, "b.png")
