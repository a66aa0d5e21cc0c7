"""Whole dialogues, one record each: every answer bears loss, and nothing else does."""

from __future__ import annotations

import copy
import csv
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from common.adapter import write_vector
from common.cells import Cell
from common.datasets import read_table
from common.decoding import _questions, greedy
from common.errors import DataError
from common.examples import Examples, collate
from common.export import PrivacyClaim, export_adapter
from common.exported import Form
from common.prediction import open_adapter
from common.release import release
from common.speaking import Draw, speak
from common.tables import Columns, Table, clean
from common.task_generate import CausalLM
from common.turns import (
    TRAINING_DAY,
    answers,
    chat_ids,
    conversation,
    dialogue_ids,
    dialogue_of,
    end_id,
    halves,
    prompt_of,
)
from tests.conftest import KINDS, World, moved, tiny_config, tiny_model

Worlds = Callable[..., World]
CELL = Cell(Path("f"), 1, "c")
WHOLE = Columns("messages", turns=True)


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


# Templates

TAGS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}%END%{% endfor %}"
ASKS = "{% if add_generation_prompt %}<assistant>{% endif %}"
NEWEST = "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}"
# By shape, as their models publish them.
OWN_ENDS = {
    "the end of a turn": (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        "<|end|>",
    ),
    "the user's turn": (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        "<|user|>",
    ),
    "the end of text, and a beginning": (
        "{% for m in messages %}{% if m.role == 'user' %}<s>[{{ m.content }}]{% else %} {{ m.content }} </s>"
        "{% endif %}{% endfor %}",
        "</s>",
    ),
    "no token, and a beginning": (
        "{% for m in messages %}{% if m.role == 'user' %}<s>[{{ m.content }}]{% else %} {{ m.content }} "
        "{% endif %}{% endfor %}",
        None,
    ),
}
REFUSED = {
    "writes no turn as it was asked for": "{% for m in messages %}{{ m.content }} {% endfor %}is",
    "numbers what is left": "{% for m in messages %}{{ messages | length }}{{ m.content }}</s>{% endfor %}"
    + ASKS,
    "forgets": "{{ messages[-1].content }}</s>" + ASKS,
    "ends a turn with a word": TAGS.replace("%END%", "<end>\n") + ASKS,
    "ends the last turn only": TAGS.replace("%END%", "<end>")
    + "{% if not add_generation_prompt %}</s>{% endif %}"
    + ASKS,
}


@pytest.fixture
def tokenizer(world: Worlds, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    yield world("bpe-dialogues-causal").model.tokenizer
    monkeypatch.undo()


@pytest.mark.parametrize(
    "template, own",
    [
        (TAGS.replace("%END%", "</s>") + ASKS, ["w3</s>", "w5 w6</s>", "good</s>"]),
        (TAGS.replace("%END%", "</s>\n") + ASKS, ["w3</s>", "w5 w6</s>", "good</s>"]),
        # Thoughts are written in the newest answer only.
        (
            TAGS.replace("{{ m.content }}", NEWEST + "{{ m.content }}").replace("%END%", "</s>") + ASKS,
            ["w3</s>", "w5 w6</s>", "good</s>"],
        ),
    ],
)
def test_an_answer_ends_where_the_template_ends_it(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, template: str, own: list[str]
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    assert own_parts(CausalLM(chat=True).encode(table_of(TURNS), tokenizer, 400), tokenizer) == own


def own_ended(tokenizer: Any, template: str) -> Any:
    """A tokenizer that has, as those of models tuned on conversations do, special tokens for turns."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|end|>"]})
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", OWN_ENDS)
def test_an_answer_ends_with_the_model_s_own_token(world: Worlds, name: str) -> None:
    """Of the last answer, too, whose end is not in what the template writes."""
    template, end = OWN_ENDS[name]
    tokenizer = own_ended(world("bpe-dialogues-causal").model.tokenizer, template)
    assert end_id(tokenizer) == tokenizer.convert_tokens_to_ids(end or "</s>")
    encode = CausalLM(chat=True).encode
    lone = encode(table_of(TURNS[1:3]), tokenizer, 400)
    assert own_parts(lone, tokenizer)[-1] == f"w3{end or '</s>'}"
    if end is None:
        with pytest.raises(DataError, match=r"writes no special token .* Make records of one answer each"):
            encode(table_of(TURNS[1:]), tokenizer, 400)
    else:
        said = ["w3", "w5 w6", "good"]
        own = own_parts(encode(table_of(TURNS[1:]), tokenizer, 400), tokenizer)
        assert [part.replace(" ", "") for part in own] == [part.replace(" ", "") + end for part in said]


def test_a_model_with_an_end_of_its_own_learns_when_to_stop(
    bpe_folder: Path, dialogue_file: Path, tmp_path: Path
) -> None:
    """It knows of the tokenizer's end only; what it writes, and what others write with what it became, ends
    where training's answers ended."""
    import gguf

    base = shutil.copytree(bpe_folder, tmp_path / "base")
    own_ended(AutoTokenizer.from_pretrained(base), OWN_ENDS["the end of a turn"][0]).save_pretrained(base)
    sections = {**KINDS["bpe-dialogues-causal"][1], "adapter": {"method": "lora"}}
    config = tiny_config(base, dialogue_file, **sections)
    model = tiny_model(config)
    end = model.tokenizer.convert_tokens_to_ids("<|end|>")
    assert json.loads((base / "generation_config.json").read_text())["eos_token_id"] == 1
    examples = model.task.encode(table_of(turns_of("w1 w2", "w3", "w4", "w5 w6")), model.tokenizer, 64)
    batch = collate(examples, [0], model.pad_id, model.device)
    parameters = list(model.base.parameters())
    optimizer = torch.optim.Adam([p.requires_grad_() for p in parameters], lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        model.task.record_losses(model.logits(batch.inputs), batch).sum().backward()
        optimizer.step()
    ids = chat_ids(model.tokenizer, turns_of("w1 w2"), TRAINING_DAY)
    said = speak(model, ids, Draw(12), lambda text: None)
    assert (said.text, said.ended) == ("w3", True)
    assert greedy(model, [ids], 12) == ["w3"]

    claim = PrivacyClaim(2.9, 2.5, 1e-5, secure_aggregation=False, read_from_data=(), repeatable_noise=False)
    export_adapter(model, moved(model), config, claim, tmp_path / "adapter")
    release(tmp_path / "adapter", tmp_path / "merged", Form.MERGED)
    for folder in ("adapter", "merged"):
        used: Any = open_adapter(tmp_path / folder, "cpu").model.base
        assert used.generation_config.eos_token_id == [1, end]
    assert GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id == [1, end]
    release(tmp_path / "adapter", tmp_path / "gguf", Form.GGUF)
    fields = gguf.GGUFReader(str(tmp_path / "gguf" / "model.gguf")).fields
    assert fields["tokenizer.ggml.eot_token_id"].contents() == end


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_writes_the_past_anew_is_refused(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Else loss would lie on tokens that are no answer."""
    monkeypatch.setattr(tokenizer, "chat_template", REFUSED[name])
    encode = CausalLM(chat=True).encode
    assert len(encode(table_of(turns_of("w1", "w2")), tokenizer, 64)) == 1
    with pytest.raises(DataError, match=r"d\.jsonl, row 2: .* Make records of one answer each"):
        encode(table_of(turns_of("w1", "w2"), TURNS), tokenizer, 64)


@pytest.mark.parametrize("end", ["</s>", "<end>", "</s><end>"])
def test_what_the_user_says_bears_no_loss_whatever_it_is(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """An end token in it was once taken for the end of the answer before."""
    monkeypatch.setattr(tokenizer, "chat_template", TAGS.replace("%END%", end) + ASKS)
    table = table_of(turns_of("</s>", "w1 </s> w2", "w3 </s> w4", "w5", "</s> w6", "good"))
    if "</s>" in end:
        own = own_parts(CausalLM(chat=True).encode(table, tokenizer, 400), tokenizer)
        assert own == ["w1 </s> w2</s>", "w5</s>", "good</s>"]
    else:
        table = table_of(turns_of("</s>", "w1", "w3 </s> w4", "w5", "</s> w6", "good"))
        with pytest.raises(DataError, match="writes no special token"):
            CausalLM(chat=True).encode(table, tokenizer, 400)


@pytest.mark.parametrize("length", [8, 16, 30, 60, 100])
def test_the_end_of_a_long_dialogue_is_not_read_turn_by_turn(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    """Each answer takes a reading of all before it: with sixty, minutes for a site's records."""
    monkeypatch.setattr(tokenizer, "chat_template", TAGS.replace("%END%", "</s>\n") + ASKS)
    turns = turns_of(*(f"w{i % 40} w{i % 7}" for i in range(120)))
    long, short = (halves(dialogue_of(part, CELL)) for part in (turns, turns[:20]))
    whole, places = dialogue_ids(tokenizer, *long, tokenizer.eos_token_id, TRAINING_DAY, 10_000)
    readings = []
    monkeypatch.setattr("common.turns.chat_ids", lambda *given: readings.append(1) or chat_ids(*given))
    ids, cut = dialogue_ids(tokenizer, *long, tokenizer.eos_token_id, TRAINING_DAY, length)
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


def test_one_end_token_is_the_answer_s(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the same token begins each turn, too."""
    template = TAGS.replace("<{{ m.role }}>", "</s><{{ m.role }}>").replace("%END%", "</s>")
    template += ASKS.replace("<assistant>", "</s><assistant>")
    monkeypatch.setattr(tokenizer, "chat_template", template)
    own = own_parts(CausalLM(chat=True).encode(table_of(TURNS), tokenizer, 400), tokenizer)
    assert own == ["w3</s>", "w5 w6</s>", "good</s>"]


def test_an_answer_whose_end_cannot_be_told_is_refused(
    world: Worlds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A word that the tokenizer does not know looks like any other; the end of the user's turn was taken."""
    tokenizer = world("gpt2-causal").model.tokenizer
    template = "{% for m in messages %}{{ m.content }} [EOS] {% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    known = table_of(turns_of("w1", "w2", "w3", "w4"))
    assert len(CausalLM(chat=True).encode(known, tokenizer, 64)) == 1
    with pytest.raises(DataError, match=r"too few words .* Make records of one answer each"):
        CausalLM(chat=True).encode(table_of(turns_of("w1", "w2", "neverseen", "w4")), tokenizer, 64)


def test_a_turn_is_written_alike_wherever_it_comes_from(world: Worlds) -> None:
    this = world("bpe-dialogues-causal")
    asked = [{"role": "user", "content": " cafe\u0301 \n"}]
    examples = this.model.task.encode(table_of(turns_of("caf\u00e9", "w1")), this.model.tokenizer, 64)
    ids = examples.tokens[: int(examples.target[0][0])].tolist()
    assert chat_ids(this.model.tokenizer, asked, TRAINING_DAY) == ids
    for lone in (" cafe\u0301 ", asked):
        assert chat_ids(this.model.tokenizer, conversation(prompt_of(lone, CELL)), TRAINING_DAY) == ids
