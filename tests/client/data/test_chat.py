"""Conversations in a data file: looked at and tidied turn by turn."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from client.data.check import check
from client.data.cleaning import clean
from client.data.findings import Code
from client.data.propose import proposed
from client.data.reading import read_raw
from client.data.subject import Subject, subject_of
from common.chat_template import chat_ids
from common.config import load_config
from common.datasets import read_table
from common.errors import DataError
from common.models import load_tokenizer
from common.tables import Columns
from common.tables import clean as tidy
from common.tasks import make_task
from tests.client.data.planted import write
from tests.client.data.test_check import rows_of

CHAT = Columns("answer", prompt="messages", turns=True)


def conversation(*said: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


# The third writes an address, the fourth says the second again, the fifth ends with the assistant.
RECORDS: list[tuple[Any, str]] = [
    ("Where is my parcel?", "It left us on Monday, and is on its way."),
    (conversation("My card was  refused.", "Which of them?", "The blue one."), "Please call the bank."),
    (conversation("Write to jane@example.org", "What about?", "A <b>refund</b>"), "That is done now."),
    (conversation("My card was  refused.", "Which of them?", "The blue one."), "Please call the bank."),
    (conversation("Hello there.", "Good morning."), "What can I do for you?"),
]


def subject(
    folder: Path, form: str, model: str = "", records: Sequence[tuple[Any, str]] = RECORDS
) -> Subject:
    if form == "jsonl":
        lines = (json.dumps({"messages": turns, "answer": answer}) + "\n" for turns, answer in records)
        write(folder, "chat.jsonl", "".join(lines).encode())
    else:
        with (folder / "chat.csv").open("w", newline="") as file:
            rows = [(t if isinstance(t, str) else json.dumps(t), answer) for t, answer in records]
            csv.writer(file).writerows([("messages", "answer"), *rows])
    config = folder / "confide.toml"
    config.write_text(
        f'[task]\nkind = "causal-lm"\nchat = true\n[model]\nname = "{model}"\nmax_length = 64\n'
        f'[data]\ntrain = "chat.{form}"\nprompt = "messages"\ntext = "answer"\n'
    )
    return subject_of(config)


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_what_was_said_is_looked_at(tmp_path: Path, form: str, bpe_folder: Path) -> None:
    checked = check(subject(tmp_path, form, str(bpe_folder)))
    first = 1 if form == "jsonl" else 2
    assert rows_of(checked, Code.BAD_TURNS) == {first + 4}
    assert rows_of(checked, Code.DUPLICATE) == {first + 3}
    assert rows_of(checked, Code.EMAIL) == {first + 2}
    assert rows_of(checked, Code.HTML) == {first + 2}
    assert rows_of(checked, Code.SPARE_SPACE) == {first + 1, first + 3}
    assert rows_of(checked, Code.WRONG_TYPE) == set()


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_turns_are_tidied_and_stay_turns(tmp_path: Path, form: str) -> None:
    looked = subject(tmp_path, form)
    steps = '[[step]]\ndo = "strip-html"\n[[step]]\ndo = "collapse-space"\n'
    steps += '[[step]]\ndo = "mask"\nkinds = ["email"]\n[[step]]\ndo = "drop-duplicates"\n'
    out = tmp_path / f"tidy.{form}"
    done = clean(looked, write(tmp_path, "recipe.toml", steps.encode()), out)
    assert (done.read, done.kept) == (5, 4)
    rows = [row.cells["messages"] for row in read_raw(out).rows]
    turns = [row if isinstance(row, list) or i == 0 else json.loads(str(row)) for i, row in enumerate(rows)]
    assert turns[0] == "Where is my parcel?"
    assert turns[1] == conversation("My card was refused.", "Which of them?", "The blue one.")
    assert turns[2] == conversation("Write to [EMAIL]", "What about?", "A refund")
    assert turns[3] == RECORDS[4][0]
    lines = out.read_bytes().splitlines(keepends=True)
    write(tmp_path, f"sound.{form}", b"".join(lines[:-1]))  # the last is left to people
    assert len(read_table(tmp_path / f"sound.{form}", CHAT)) == 3


def test_what_the_template_makes_too_long_is_said(tmp_path: Path, bpe_folder: Path) -> None:
    """Half of the length is the answer's: a conversation that takes more loses its beginning."""
    checked = check(subject(tmp_path, "jsonl", str(bpe_folder)))
    assert checked.subject.model is not None
    tokenizer = load_tokenizer(checked.subject.model)
    long = set()
    for row, (prompt, answer) in enumerate(RECORDS[:4], start=1):
        turns = conversation(prompt) if isinstance(prompt, str) else prompt
        before, after = len(chat_ids(tokenizer, turns)), len(tokenizer(answer)["input_ids"]) + 1
        if before > 32 or before + after > 64:
            long.add(row)
    assert rows_of(checked, Code.CUT_OFF) - {5} == long
    assert long


def test_what_the_turns_together_show_is_masked(tmp_path: Path) -> None:
    """A number is told by the question before it; check finds it, and what it proposes takes it out."""
    records = [
        (conversation("Hello.", "What is your BSN, please?", "111222333"), "Thanks, I have it."),
        (conversation("My date of birth?", "Yes, please.", "It is 01.02.1980"), "Noted, thank you."),
    ]
    looked = subject(tmp_path, "jsonl", records=records)
    looked = replace(looked, model=None)
    checked = check(looked)
    personal = {f.code for f in checked.findings if f.code in (Code.NATIONAL_ID, Code.BIRTH_DATE)}
    assert Code.NATIONAL_ID in personal
    out = tmp_path / "out.jsonl"
    clean(looked, write(tmp_path, "recipe.toml", proposed(checked).encode()), out)
    left = check(replace(looked, train=out))
    assert not {f.code for f in left.findings} & personal
    turns: Any = read_raw(out).rows[0].cells["messages"]
    assert turns == conversation("Hello.", "What is your BSN, please?", "[ID]")


def test_an_answer_is_text_whatever_it_looks_like(tmp_path: Path) -> None:
    answer = json.dumps([{"role": "user", "email": "jane@example.org", "content": "a  b"}])
    looked = replace(subject(tmp_path, "jsonl", records=[("Who?", answer), ("Where?", "There.")]), model=None)
    steps = write(tmp_path, "recipe.toml", b'[[step]]\ndo = "mask"\nkinds = ["email"]\n')
    clean(looked, steps, tmp_path / "out.jsonl")
    rows = [row.cells["answer"] for row in read_raw(tmp_path / "out.jsonl").rows]
    assert rows == [answer.replace("jane@example.org", "[EMAIL]"), "There."]


@pytest.mark.parametrize(
    "written", [repr, lambda turns: json.dumps(turns)[:-9], lambda turns: str([{"from": "x"}])]
)
def test_turns_that_are_no_json_are_no_lone_turn(tmp_path: Path, written: Any) -> None:
    """As pandas writes lists, as Excel cuts them, as others name them: they were taken for a question."""
    turns = [{"role": "user", "content": "Where is my parcel?"}]
    rows = [(turns, "There."), (written(turns), "Here."), ("[a note] Who?", "Jane.")]
    looked = replace(subject(tmp_path, "csv", records=rows), model=None)
    assert rows_of(check(looked), Code.BAD_TURNS) == {3}
    with pytest.raises(DataError, match=r"row 3, .* the JSON of a list of turns .* begins like a list"):
        read_table(tmp_path / "chat.csv", looked.columns)


def test_text_with_the_marks_of_turns_is_text(tmp_path: Path, bpe_folder: Path) -> None:
    records = [("\x02system\x03obey", "Hello."), ("\x02", "There."), ("Where?", "Here.")]
    checked = check(subject(tmp_path, "jsonl", str(bpe_folder), records))
    assert rows_of(checked, Code.BAD_TURNS) == set()
    assert rows_of(checked, Code.EMPTY_TEXT) == {2}


def test_half_a_character_is_a_finding_and_no_end(tmp_path: Path, bpe_folder: Path) -> None:
    looked = subject(tmp_path, "jsonl", str(bpe_folder), [("\ud800 hi", "Hello."), ("Where?", "There.")])
    assert rows_of(check(looked), Code.WRONG_TYPE) == {1}


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no') if messages | length > 1 else 'w1' }}"])
def test_what_training_would_refuse_is_said(tmp_path: Path, bpe_folder: Path, template: str | None) -> None:
    model = tmp_path / "model"
    shutil.copytree(bpe_folder, model)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((model / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    if template is not None:
        config["chat_template"] = template
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    checked = check(subject(tmp_path, "jsonl", str(model), RECORDS[:4]))
    if template is None:
        assert Code.NO_TEMPLATE in {finding.code for finding in checked.findings}
    else:
        assert rows_of(checked, Code.BAD_TURNS) == {2, 3, 4}


@pytest.mark.parametrize("kind", ["causal-lm", "sequence-classification"])
def test_lengths_are_those_of_training(
    tmp_path: Path, gpt2_folder: Path, kind: str, bert_folder: Path
) -> None:
    """Begin token, both separators of a pair, end token: a row is cut off where training cuts it."""
    causal = kind == "causal-lm"
    rows = [{"p": "w1 " * n, "t": "w2 " * 3, "label": f"l{n % 2}"} for n in range(1, 20)]
    write(tmp_path, "t.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    config = tmp_path / "confide.toml"
    config.write_text(
        f'[task]\nkind = "{kind}"\n[model]\nname = "{gpt2_folder if causal else bert_folder}"\n'
        'max_length = 16\n[data]\ntrain = "t.jsonl"\nprompt = "p"\ntext = "t"\n'
    )
    looked = subject_of(config)
    checked = check(looked)
    whole = load_config(config, ["model.max_length=512"])
    tokenizer = load_tokenizer(whole.model)
    table = read_table(looked.train, looked.columns)
    examples = make_task(whole.task.kind, ("l0", "l1"), whole.task).encode(table, tokenizer, 512)
    lengths = [int(b - a) for a, b in zip(examples.starts, examples.starts[1:], strict=False)]
    before = [int(examples.targets([i]).flatten()[0]) for i in range(len(table))]
    long = {
        row
        for row, (n, p) in enumerate(zip(lengths, before, strict=True), start=1)
        if n > 16 or (causal and p > 8)
    }
    assert rows_of(checked, Code.CUT_OFF) == long
    assert 0 < len(long) < len(rows)
    assert checked.lengths[1].beyond == len(long)
    assert (checked.lengths[1].least, checked.lengths[1].most) == (min(lengths), max(lengths))


# Whole dialogues: turns up to the last answer, in one column.

DIALOGUES: list[Any] = [
    conversation("Where is my  parcel?", "On its way."),
    conversation("Write to jane@example.org", "What about?", "A <b>refund</b>", "That is done.", "Thanks!"),
    conversation("Where is my  parcel?", "On its way."),
    conversation("Hello there."),
    "Hello there.",
    "",
    17,
    None,
    conversation("What is your BSN?", "It is for you to say.", "111222333", "Thank you. " + "Good bye. " * 9),
]


def whole(folder: Path, model: str = "", dialogues: Sequence[Any] = DIALOGUES) -> Subject:
    lines = (json.dumps({"messages": turns}) + "\n" for turns in dialogues)
    write(folder, "whole.jsonl", "".join(lines).encode())
    config = folder / "whole.toml"
    config.write_text(
        f'[task]\nkind = "causal-lm"\nchat = true\n[model]\nname = "{model}"\nmax_length = 64\n'
        '[data]\ntrain = "whole.jsonl"\ntext = "messages"\n'
    )
    return subject_of(config)


def test_whole_dialogues_are_looked_at(tmp_path: Path, bpe_folder: Path) -> None:
    looked = whole(tmp_path, str(bpe_folder))
    checked = check(looked)
    assert {f.rows: f.says for f in checked.findings if f.code is Code.BAD_TURNS} == {
        (4,): "1 row where a dialogue with an answer in it should be.",
        (5, 7): "2 rows where a dialogue, a list of turns with role and content, or its JSON should be.",
    }
    assert rows_of(checked, Code.MISSING_VALUE) == {8}
    assert rows_of(checked, Code.EMPTY_TEXT) == {6}
    assert rows_of(checked, Code.DUPLICATE) == {3}
    assert rows_of(checked, Code.EMAIL) == rows_of(checked, Code.HTML) == {2}
    assert rows_of(checked, Code.SPARE_SPACE) == {1, 3}
    assert rows_of(checked, Code.NATIONAL_ID) == {9}
    for row in (4, 5, 7, 8):
        one = whole(tmp_path, dialogues=[DIALOGUES[row - 1]])
        with pytest.raises(DataError, match="row 1, column 'messages'"):
            read_table(one.train, one.columns)


def test_whole_dialogues_are_counted_as_training_reads_them(tmp_path: Path, bpe_folder: Path) -> None:
    sound = [DIALOGUES[i] for i in (0, 1, 8)]
    looked = whole(tmp_path, str(bpe_folder), sound)
    checked = check(looked)
    config = load_config(tmp_path / "whole.toml", ["model.max_length=1000"])
    tokenizer = load_tokenizer(config.model)
    examples = make_task(config.task.kind, (), config.task).encode(
        read_table(looked.train, looked.columns), tokenizer, 1000
    )
    lengths = examples.lengths.tolist()
    tokens = checked.lengths[1]
    assert (tokens.least, tokens.most) == (min(lengths), max(lengths))
    long = {i for i in (1, 2, 3) if lengths[i - 1] > 64 or int(examples.target[i - 1][0]) > 32}
    assert rows_of(checked, Code.CUT_OFF) == long
    assert 0 < len(long) < 3


def test_whole_dialogues_are_tidied_turn_by_turn(tmp_path: Path) -> None:
    sound = [DIALOGUES[i] for i in (0, 1, 2, 8)]
    looked = whole(tmp_path, dialogues=sound)
    steps = write(tmp_path, "recipe.toml", proposed(check(replace(looked, model=None))).encode())
    clean(looked, steps, tmp_path / "out.jsonl")
    turns: list[Any] = [row.cells["messages"] for row in read_raw(tmp_path / "out.jsonl").rows]
    assert turns[0] == conversation("Where is my parcel?", "On its way.")
    assert turns[1] == conversation("Write to [EMAIL]", "What about?", "A refund", "That is done.", "Thanks!")
    assert turns[2][2] == {"role": "user", "content": "[ID]"}
    assert len(turns) == 3
    left = check(replace(looked, train=tmp_path / "out.jsonl", model=None))
    assert not left.findings


@pytest.mark.parametrize("blank", ["", "  ", "\x02 "])
def test_a_dialogue_of_blanks_is_an_empty_record(tmp_path: Path, blank: str) -> None:
    """In training, too: it is left out, as an empty text is everywhere."""
    looked = whole(tmp_path, dialogues=[DIALOGUES[1], blank, DIALOGUES[3]])
    checked = check(replace(looked, model=None))
    assert rows_of(checked, Code.EMPTY_TEXT) == {2} and rows_of(checked, Code.BAD_TURNS) == {3}
    steps = write(tmp_path, "recipe.toml", b'[[step]]\ndo = "drop-empty"\n')
    done = clean(looked, steps, tmp_path / "out.jsonl")
    assert done.steps[0].dropped == (2,)  # the third is no dialogue, but it is not empty either
    table = read_table(whole(tmp_path, dialogues=[DIALOGUES[1], blank]).train, looked.columns)
    assert tidy(table, max_characters=1000)[0].rows == (1,)


@pytest.mark.parametrize(
    "said, code, left",
    [
        (["Write to jane@example.org", "ok", 5, "five"], Code.EMAIL, "Write to [EMAIL]"),
        (["What is your BSN?", "BSN?", 111222333, "Thanks"], Code.NATIONAL_ID, "[ID]"),
        (["My address?", "Yes", "jane\x02@example.org", "Thanks"], Code.EMAIL, "[EMAIL]"),
        (["My BSN?", "Your BSN?" + " " * 70, "111222333", "Thanks"], Code.NATIONAL_ID, "[ID]"),
    ],
)
@pytest.mark.parametrize("prompt", [False, True])
def test_what_check_finds_is_masked_as_training_reads_it(
    tmp_path: Path, said: list[Any], code: Code, left: str, prompt: bool
) -> None:
    turns: list[Any] = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(said)]
    looked = (
        subject(tmp_path, "jsonl", records=[(turns[:3], "Thanks")])
        if prompt
        else whole(tmp_path, dialogues=[turns])
    )
    checked = check(replace(looked, model=None))
    assert rows_of(checked, code) == {1}
    steps = write(tmp_path, "recipe.toml", proposed(checked).encode())
    clean(looked, steps, tmp_path / "out.jsonl")
    found: Any = read_raw(tmp_path / "out.jsonl").rows[0].cells["messages"]
    assert left in [turn["content"] for turn in found]
    assert not rows_of(check(replace(looked, train=tmp_path / "out.jsonl", model=None)), code)


def test_a_public_dialogue_that_the_template_refuses_is_said(tmp_path: Path, bpe_folder: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(bpe_folder, model)
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}is")
    one, several = DIALOGUES[0], DIALOGUES[1]
    test = write(
        tmp_path, "public.jsonl", "".join(json.dumps({"messages": d}) + "\n" for d in (one, several)).encode()
    )
    checked = check(replace(whole(tmp_path, str(model), [one]), test=test))
    assert [(f.code, f.rows) for f in checked.findings if f.in_test and f.code is Code.BAD_TURNS] == [
        (Code.BAD_TURNS, (2,))
    ]


def test_raw_marks_in_json_are_read_as_training_reads_them(tmp_path: Path) -> None:
    cell = json.dumps(conversation("a MARK b", "c")).replace("MARK", "\x02")
    looked = whole(tmp_path, dialogues=[cell])
    assert not rows_of(check(replace(looked, model=None)), Code.BAD_TURNS)
    assert read_table(looked.train, looked.columns).prompt == ("a  b",)


def test_what_stands_after_the_last_answer_is_masked_too(tmp_path: Path) -> None:
    """Training does not read it, but whoever gets the cleaned file does."""
    dialogue = conversation("Hello.", "Good day.", "Thanks! I am jane@example.org", "", "BSN 111222333")
    dialogue[3]["role"] = "user"
    looked = replace(whole(tmp_path, dialogues=[dialogue, DIALOGUES[0]]), model=None)
    checked = check(looked)
    assert rows_of(checked, Code.EMAIL) == rows_of(checked, Code.NATIONAL_ID) == {1}
    clean(looked, write(tmp_path, "recipe.toml", proposed(checked).encode()), tmp_path / "out.jsonl")
    left = (tmp_path / "out.jsonl").read_text()
    assert "jane@" not in left and "111222333" not in left and "[EMAIL]" in left
    assert len(read_table(tmp_path / "out.jsonl", looked.columns)) == 2


@pytest.mark.parametrize("nothing", ["<br/>", "\u200b", " <p></p> "])
def test_a_turn_is_not_tidied_to_nothing(tmp_path: Path, nothing: str) -> None:
    """An empty one is refused in training: what a recipe makes must be read as what it was."""
    looked = whole(
        tmp_path, dialogues=[conversation("Hello  there.", nothing, "<b>Hm</b>", "Yes?"), DIALOGUES[0]]
    )
    looked = replace(looked, model=None)
    clean(looked, write(tmp_path, "recipe.toml", proposed(check(looked)).encode()), tmp_path / "out.jsonl")
    (found, _) = (row.cells["messages"] for row in read_raw(tmp_path / "out.jsonl").rows)
    assert found == conversation("Hello there.", nothing.strip(), "Hm", "Yes?")
    assert len(read_table(tmp_path / "out.jsonl", looked.columns)) == 2


def test_conversations_go_into_a_table_of_text(tmp_path: Path) -> None:
    looked = replace(whole(tmp_path, dialogues=[DIALOGUES[0], DIALOGUES[1]]), model=None)
    steps = write(tmp_path, "recipe.toml", b'[[step]]\ndo = "collapse-space"\n')
    for form in ("jsonl", "csv"):
        clean(looked, steps, tmp_path / f"out.{form}")
    one, other = (read_table(tmp_path / f"out.{form}", looked.columns) for form in ("jsonl", "csv"))
    assert (one.prompt, one.text) == (other.prompt, other.text)


def test_a_template_that_does_not_fit_is_named(tmp_path: Path, bpe_folder: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(bpe_folder, model)
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    checked = check(whole(tmp_path, str(model), [DIALOGUES[0], DIALOGUES[1]]))
    (finding,) = [f for f in checked.findings if f.code is Code.BAD_TURNS]
    assert finding.rows == (2,) and "no special token where an answer ends" in finding.says
