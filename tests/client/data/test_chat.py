"""Conversations in a data file: looked at and tidied turn by turn."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from client.data.check import check
from client.data.cleaning import clean
from client.data.findings import Code
from client.data.reading import read_raw
from client.data.subject import Subject, subject_of
from common.datasets import read_table
from common.tables import Columns
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


def subject(folder: Path, form: str, model: str = "") -> Subject:
    if form == "jsonl":
        lines = (json.dumps({"messages": turns, "answer": answer}) + "\n" for turns, answer in RECORDS)
        write(folder, "chat.jsonl", "".join(lines).encode())
    else:
        with (folder / "chat.csv").open("w", newline="") as file:
            rows = [(t if isinstance(t, str) else json.dumps(t), answer) for t, answer in RECORDS]
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
    from common.models import load_tokenizer
    from common.turns import chat_ids

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
