"""Two forms in which annotated text comes: CoNLL columns, and SQuAD's nested JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import DataError
from common.tables import Record


def conll_records(text: str, path: Path, first_line: int = 1) -> Iterator[Record]:
    """`tokens` and `tags` of sentences with a blank line between them.

    A word a line: first the word, last its tag; fields are parted by tabs, or by blanks where the line has no
    tab. A record's row is its first line, counted from `first_line`. Lines `-DOCSTART-` and lines that begin
    with `# ` are skipped.
    """
    words: list[str] = []
    tags: list[str] = []
    first = 0
    for number, line in enumerate([*text.split("\n"), ""], start=first_line):
        fields = line.strip("\r").split("\t") if "\t" in line else line.split()
        fields = [field.strip() for field in fields]
        if not any(fields):
            if words:
                yield first, {"tokens": words, "tags": tags}
            words, tags = [], []
            continue
        if fields[0] == "-DOCSTART-" or (line.startswith("# ") and "\t" not in line):
            continue
        if len(fields) < 2 or not fields[0] or not fields[-1]:
            raise DataError(
                f"{path}, row {number}: expected a word and its tag, found {len([f for f in fields if f])} "
                "field. Part them by a tab, and sentences by a blank line."
            )
        if not words:
            first = number
        words.append(fields[0])
        tags.append(fields[-1])


def squad_records(text: str, path: Path) -> Iterator[Record]:
    """`question`, `context`, `answers` and `title` of a file in the form of SQuAD; where a question has no
    answer, as SQuAD 2 has them, `answers` is an empty list.

    A record's row is the question's number, from 1.
    """
    try:
        data: Any = json.loads(text)
        articles = data["data"]
        row = 0
        for article in articles:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    row += 1
                    yield (
                        row,
                        {
                            "question": question["question"],
                            "context": paragraph["context"],
                            "answers": [] if question.get("is_impossible") else question["answers"],
                            "title": article.get("title", "untitled"),
                        },
                    )
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: expected JSON, found a fault at character {error.pos + 1}: {error.msg}. If it holds "
            "one object a line, rename it to .jsonl."
        ) from None
    except (KeyError, TypeError, AttributeError) as error:
        found = f"no {error}" if isinstance(error, KeyError) else "another structure"
        raise DataError(
            f"{path}: expected SQuAD's form (data, paragraphs, context, qas, question, answers), found "
            f"{found}. If it holds one object a line, rename it to .jsonl."
        ) from None
