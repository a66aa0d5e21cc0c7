"""Whole dialogues, one record each: every answer bears loss, and nothing else does."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from common.adapter import write_vector
from common.cells import Cell
from common.chat_template import TRAINING_DAY, answer_form, chat_ids, dialogue_ids
from common.datasets import read_table
from common.decoding import _questions
from common.errors import DataError
from common.examples import Examples, collate
from common.tables import Columns, Table, clean
from common.task_generate import CausalLM
from common.turns import (
    answers,
    conversation,
    dialogue_of,
    halves,
    prompt_of,
)
from tests.conftest import World, moved

Worlds = Callable[..., World]
CELL = Cell(Path("f"), 1, "c")
WHOLE = Columns("messages", turns=True)


TAGS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def turns_of(*said: str, system: str = "") -> list[dict[str, str]]:
    spoken = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    return [{"role": "system", "content": system}, *spoken] if system else spoken


TURNS = turns_of("w1 w2", "w3", "w4", "w5 w6", "w7", "good", system="be kind")


def jsonl(folder: Path, *dialogues: object) -> Path:
    path = folder / "d.jsonl"
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in dialogues))
    return path


def table_of(*dialogues: list[dict[str, str]]) -> Table:
    parts = [halves(dialogue_of(turns, CELL)) for turns in dialogues]
    prompts, texts = zip(*parts, strict=True)
    return Table("d.jsonl", texts, None, prompts, None, tuple(range(1, len(parts) + 1)))


def own_parts(examples: Examples, tokenizer: PreTrainedTokenizerBase, record: int = 0) -> list[str]:
    """The stretches of a record that bear loss, as text, special tokens and all: by a loop over tokens."""
    ids = examples.tokens[examples.starts[record] : examples.starts[record + 1]].tolist()
    places = examples.target[record].tolist()
    parts: list[list[int]] = []
    for position, token in enumerate(ids):
        begun = sum(place <= position for place in places)
        if begun % 2:
            if position in places or not parts:
                parts.append([])
            parts[-1].append(token)
    return [str(tokenizer.decode(part)) for part in parts]


# Reading


def test_a_dialogue_is_the_same_from_every_kind_of_file(tmp_path: Path) -> None:
    table = read_table(jsonl(tmp_path, TURNS, turns_of("w1", "w2")), WHOLE)
    assert table.prompt is not None
    assert conversation(table.prompt[0]) == TURNS[:2]
    assert answers(table.text[0]) == TURNS[2:]
    assert (table.prompt[1], table.text[1]) == ("w1", "w2")
    with (tmp_path / "d.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages"], [json.dumps(TURNS)]])
    Dataset.from_list([{"messages": TURNS}]).to_parquet(tmp_path / "d.parquet")
    for name in ("d.csv", "d.parquet"):
        other = read_table(tmp_path / name, WHOLE)
        assert (other.prompt, other.text) == (table.prompt[:1], table.text[:1]), name


def test_what_the_user_says_last_is_not_read(tmp_path: Path) -> None:
    """Whatever it looks like: two messages on end, and empty ones, are common there."""
    thanks = {"role": "user", "content": "thanks"}
    odd = [{"role": "user"}, {"role": "user", "content": ""}, {"role": "user", "content": None, "name": "x"}]
    path = jsonl(tmp_path, TURNS, [*TURNS, thanks], [*TURNS, thanks, thanks], [*TURNS, *odd])
    _, report = clean(read_table(path, WHOLE), max_characters=1000)
    assert (report.kept, report.duplicate) == (1, 3)


def test_a_dialogue_without_turns_is_an_empty_record(tmp_path: Path) -> None:
    """Of an array, as parquet has it, there is no other empty form."""
    _, report = clean(read_table(jsonl(tmp_path, TURNS, [], "[]", "", " "), WHOLE), max_characters=1000)
    assert (report.kept, report.empty) == (1, 4)


USER, ASSISTANT = ({"role": role, "content": "SECRET"} for role in ("user", "assistant"))


@pytest.mark.parametrize(
    "value",
    ["SECRET", 7, [USER], [ASSISTANT], [ASSISTANT, USER], [USER, USER, ASSISTANT],
     [{"role": "system", "content": "SECRET"}, ASSISTANT], [USER, ASSISTANT, ASSISTANT],
     [USER, {"role": "assistant", "content": " "}], [USER, {"role": "tool", "content": "SECRET"}]],
    ids=repr,
)  # fmt: skip
def test_what_is_no_dialogue_is_refused_by_row(tmp_path: Path, value: object) -> None:
    with pytest.raises(DataError, match="row 2, column 'messages': expected") as caught:
        read_table(jsonl(tmp_path, TURNS, value), WHOLE)
    assert "SECRET" not in str(caught.value)


said = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).map(lambda text: f"w{text}w")


@given(st.lists(st.tuples(said, said), min_size=1, max_size=4), st.booleans())
def test_both_halves_are_the_dialogue(pairs: list[tuple[str, str]], system: bool) -> None:
    turns = turns_of(*(text for pair in pairs for text in pair), system="s" if system else "")
    before, after = halves(dialogue := dialogue_of(turns, CELL))
    assert [*conversation(before), *answers(after)] == conversation(dialogue)
    assert [turn["role"] for turn in conversation(dialogue)] == [turn["role"] for turn in turns]
    assert len(conversation(before)) == 1 + system


# Tokens and loss


def test_every_answer_bears_loss_and_nothing_else(world: Worlds) -> None:
    this = world("bpe-dialogues-causal")
    tokenizer = this.model.tokenizer
    examples = this.model.task.encode(table_of(TURNS), tokenizer, 400)
    assert own_parts(examples, tokenizer) == ["w3</s>", "w5 w6</s>", "good</s>"]
    whole = tokenizer.decode(examples.tokens.tolist())
    assert whole == "be kind w1 w2 is\nw3</s>w4 is\nw5 w6</s>w7 is\ngood</s>"


def test_the_loss_is_the_mean_over_the_answers_tokens(world: Worlds) -> None:
    """Against a loop over tokens, in a batch with shorter dialogues."""
    this = world("bpe-dialogues-causal")
    task, device = this.model.task, torch.device("cpu")
    examples = task.encode(table_of(turns_of("w1", "w2"), TURNS, TURNS[:5]), this.model.tokenizer, 400)
    batch = collate(examples, [0, 1, 2], this.model.pad_id, device)
    write_vector(this.model.parameters, this.model.layout, moved(this.model))
    with torch.no_grad():
        logits = this.model.logits(batch.inputs)
    losses, correct = task.record_losses(logits, batch), task.correct(logits, batch)
    sums = task.record_sums(logits, batch, this.model.tokenizer)
    for record in range(3):
        ids = examples.tokens[examples.starts[record] : examples.starts[record + 1]].tolist()
        places = examples.target[record].tolist()
        own = [p for p in range(1, len(ids)) if sum(place <= p for place in places) % 2]
        each = [-float(logits[record, p - 1].log_softmax(dim=-1)[ids[p]]) for p in own]
        right = [float(logits[record, p - 1].argmax() == ids[p]) for p in own]
        assert float(losses[record]) == pytest.approx(float(np.mean(each)), rel=1e-5)
        assert float(correct[record]) == pytest.approx(float(np.mean(right)))
        assert sums[record, 1:].tolist() == pytest.approx([sum(each), len(own)], rel=1e-5)


def test_one_answer_is_the_record_that_prompt_and_answer_are(world: Worlds) -> None:
    """To the digest: who has such records can write them either way."""
    this = world("bpe-dialogues-causal")
    one = Table("t", ("w3",), None, ("w1 w2",), None, (1,))
    encode, tokenizer = this.model.task.encode, this.model.tokenizer
    either = [encode(table, tokenizer, 32) for table in (one, table_of(turns_of("w1 w2", "w3")))]
    first, second = (next(examples.contents([0])) for examples in either)
    assert first == second


@pytest.mark.parametrize("length", [8, 12, 20, 31])
def test_a_long_dialogue_keeps_the_end_of_its_first_question(world: Worlds, length: int) -> None:
    this = world("bpe-dialogues-causal")
    turns = turns_of("w1 " * 20 + "w9", "w3", "w4", "w5 w6", "w7", "good")
    encode, tokenizer = this.model.task.encode, this.model.tokenizer
    whole, cut = (encode(table_of(turns), tokenizer, most) for most in (1000, length))
    lost = int(whole.target[0][0]) - length // 2
    assert cut.tokens.tolist() == whole.tokens[lost : lost + length].tolist()
    assert [place for place in cut.target[0].tolist() if place < length] == [
        place - lost for place in whole.target[0].tolist() if place - lost < length
    ]
    assert own_parts(cut, tokenizer)[0].startswith("w3")


def test_an_answer_learns_from_what_was_said_before(world: Worlds) -> None:
    """And not from what is said after it: the loss of the first answer alone stays."""
    this = world("bpe-dialogues-causal")
    encode, tokenizer = this.model.task.encode, this.model.tokenizer
    write_vector(this.model.parameters, this.model.layout, moved(this.model))

    def losses(*said: str) -> list[float]:
        examples = encode(table_of(turns_of(*said)), tokenizer, 400)
        batch = collate(examples, [0], this.model.pad_id, torch.device("cpu"))
        with torch.no_grad():
            logits = this.model.logits(batch.inputs)[0].log_softmax(dim=-1)
        ids, (begin, end, last) = examples.tokens.tolist(), examples.target[0].tolist()
        return [
            sum(-float(logits[p - 1, ids[p]]) for p in part)
            for part in (range(begin, end), range(last, len(ids)))
        ]

    first, second = losses("w1", "w2", "w3", "w4")
    other = losses("w1", "w2", "w5", "w4")
    assert other[0] == pytest.approx(first) and abs(other[1] - second) > 1e-4


def test_the_first_answer_is_what_is_written_out(world: Worlds) -> None:
    this = world("bpe-dialogues-causal")
    examples = this.model.task.encode(table_of(TURNS), this.model.tokenizer, 400)
    (question,), (wanted,) = _questions(this.model, examples, np.arange(1))
    assert wanted == "w3"
    assert question == chat_ids(this.model.tokenizer, TURNS[:2], TRAINING_DAY)


@pytest.fixture
def tokenizer(world: Worlds, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    yield world("bpe-dialogues-causal").model.tokenizer
    monkeypatch.undo()


@pytest.mark.parametrize("length", [8, 16, 30, 60, 100])
def test_the_end_of_a_long_dialogue_is_not_read_turn_by_turn(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    """Each answer takes a reading of all before it: with sixty, minutes for a site's records."""
    monkeypatch.setattr(tokenizer, "chat_template", TAGS)
    turns = turns_of(*(f"w{i % 40} w{i % 7}" for i in range(120)))
    long, short = (halves(dialogue_of(part, CELL)) for part in (turns, turns[:20]))
    form = answer_form(tokenizer)
    whole, places = dialogue_ids(tokenizer, *long, form, TRAINING_DAY, 10_000)
    readings = []
    with monkeypatch.context() as patched:
        patched.setattr(
            "common.chat_template.chat_ids", lambda *given: readings.append(1) or chat_ids(*given)
        )
        ids, cut = dialogue_ids(tokenizer, *long, form, TRAINING_DAY, length)
    assert ids == whole and cut == places[: len(cut)] and cut[-1] >= cut[0] + length
    assert len(readings) < length
    task = CausalLM(chat=True)
    (one, two) = (Table("t", (text,), None, (prompt,), None, (1,)) for prompt, text in (long, short))
    if places[0] + length < places[18]:  # the same as of its beginning alone
        assert own_parts(task.encode(one, tokenizer, length), tokenizer) == own_parts(
            task.encode(two, tokenizer, length), tokenizer
        )


def test_texts_are_no_conversations(world: Worlds) -> None:
    this = world("bpe-dialogues-causal")
    with pytest.raises(DataError, match="expected conversations"):
        this.model.task.encode(Table("t", ("w1",), None, None, None, (1,)), this.model.tokenizer, 32)


def test_a_turn_is_written_alike_wherever_it_comes_from(world: Worlds) -> None:
    this = world("bpe-dialogues-causal")
    asked = [{"role": "user", "content": " cafe\u0301 \n"}]
    examples = this.model.task.encode(table_of(turns_of("caf\u00e9", "w1")), this.model.tokenizer, 64)
    ids = examples.tokens[: int(examples.target[0][0])].tolist()
    assert chat_ids(this.model.tokenizer, asked, TRAINING_DAY) == ids
    for lone in (" cafe\u0301 ", asked):
        assert chat_ids(this.model.tokenizer, conversation(prompt_of(lone, CELL)), TRAINING_DAY) == ids
