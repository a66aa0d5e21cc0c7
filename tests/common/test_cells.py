"""Cells: lists, answers in a text, templates; a fault names row and column."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from transformers import ViTImageProcessor

from common.cells import IMAGES
from common.config import DataSection, TaskKind
from common.datasets import read_table
from common.errors import DataError
from common.images import open_image
from common.tables import Columns, Table, clean
from common.targets import check_records, columns_of, found_labels, label_sets, numbers, tag_ids
from common.tasks import make_task

TAGS = Columns("tokens", "tags", joint=" ")
SEVERAL = Columns("text", "label", joint="|")
SPANS = Columns("context", "answers", "question", spans=True)


def lines(tmp_path: Path, *records: object) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in records), encoding="utf-8")
    return path


def refusal(path: Path, columns: Columns) -> str:
    with pytest.raises(DataError) as error:
        read_table(path, columns)
    return str(error.value)


def test_lists_of_words_and_tags(tmp_path: Path) -> None:
    path = lines(tmp_path, {"tokens": ["New", "York", "won"], "tags": ["B-loc", "I-loc", "O"]})
    table = read_table(path, TAGS)
    assert table.text == ("New York won",) and table.label == ("B-loc I-loc O",)
    assert found_labels(TaskKind.TOKEN_CLASSIFICATION, table) == ("O", "B-loc", "I-loc")


@pytest.mark.parametrize("words", [["New York", "won"], ["", "won"], [" ", "won"], ["a\u00a0b", "won"]])
def test_a_word_with_a_blank_is_refused(tmp_path: Path, words: list[str]) -> None:
    ok = {"tokens": ["a"], "tags": ["O"]}
    said = refusal(lines(tmp_path, ok, {"tokens": words, "tags": ["O", "O"]}), TAGS)
    assert "row 2, column 'tokens'" in said and "white space" in said


def test_a_list_where_none_is_wanted_is_refused(tmp_path: Path) -> None:
    path = lines(tmp_path, {"text": ["a"], "label": "b"})
    assert "value of type list" in refusal(path, Columns("text", "label"))


def test_several_labels_none_too(tmp_path: Path) -> None:
    path = lines(
        tmp_path,
        {"text": "a", "label": ["x", "y"]},
        {"text": "b", "label": "y | z"},
        {"text": "c", "label": []},
        {"text": "d", "label": None},
    )
    table = read_table(path, SEVERAL)
    labels = found_labels(TaskKind.MULTI_LABEL, table)
    assert labels == ("x", "y", "z")
    assert label_sets(table, labels).tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 0], [0, 0, 0]]
    with pytest.raises(DataError, match=r"row 2, label column.*of 1 character\."):
        label_sets(table, ["x", "y"])


def test_a_label_that_holds_the_separator_is_refused(tmp_path: Path) -> None:
    assert "without a '|'" in refusal(lines(tmp_path, {"text": "a", "label": ["x|y"]}), SEVERAL)


CONTEXT = "Ada met Bob. Bob left."


@pytest.mark.parametrize(
    ("answers", "start"),
    [
        ({"text": ["Bob", "Ada"], "answer_start": [13, 0]}, 13),
        ([{"text": "Bob", "answer_start": 13}], 13),
        ("Bob", 8),  # no start: where it first occurs
    ],
)
def test_the_forms_of_an_answer(tmp_path: Path, answers: object, start: int) -> None:
    path = lines(tmp_path, {"context": CONTEXT, "question": "who?", "answers": answers})
    table = read_table(path, SPANS)
    assert table.label == ("Bob",) and table.start == (start,)


def test_a_column_for_the_start(tmp_path: Path) -> None:
    columns = Columns("context", "answer", "question", start="at", spans=True)
    ok = {"context": CONTEXT, "question": "who?", "answer": "Bob", "at": 13}
    assert read_table(lines(tmp_path, ok), columns).start == (13,)
    said = refusal(lines(tmp_path, ok, {**ok, "at": 12}), columns)
    assert "row 2, column 'answer'" in said and "It stands at character 8" in said
    blank = read_table(lines(tmp_path, {**ok, "answer": " Bob", "at": 12}), columns)
    assert (blank.label, blank.start) == (("Bob",), (13,))
    assert "nowhere" in refusal(lines(tmp_path, {**ok, "answer": "Eve"}), columns)
    for none in (-1, "nine", "1" * 5000):
        said = refusal(lines(tmp_path, {**ok, "at": none}), columns)
        assert "the place where the answer begins" in said and "nine" not in said


@pytest.mark.parametrize("answers", [{"text": [], "answer_start": []}, [], {"start": 1}, "Eve"])
def test_a_question_without_an_answer_is_refused(tmp_path: Path, answers: object) -> None:
    ok = {"context": CONTEXT, "question": "who?", "answers": "Ada"}
    said = refusal(lines(tmp_path, ok, {**ok, "answers": answers}), SPANS)
    assert "row 2, column 'answers'" in said


def test_an_answer_keeps_its_place_when_the_text_is_tidied(tmp_path: Path) -> None:
    context = "  Ame\u0301lie met Bob "  # blanks in front, and an accent that is composed
    path = lines(tmp_path, {"context": context, "question": "who?", "answers": "Bob"})
    table, _ = clean(read_table(path, SPANS), max_characters=100)
    assert table.start is not None and table.label is not None
    assert table.text[0][table.start[0] :] == table.label[0] == "Bob"
    assert len(table.text[0]) < len(context.strip())


def test_a_template_over_columns(tmp_path: Path) -> None:
    columns = Columns("text", "label", template="age {age}, {{trade}} {trade of}")
    assert columns.names == ("age", "trade of", "label")
    path = lines(
        tmp_path, {"age": 31, "trade of": "smith", "label": "y"}, {"age": None, "trade of": "", "label": 1}
    )
    assert read_table(path, columns).text == ("age 31, {trade} smith", "age , {trade} ")
    assert "'aged'" in refusal(path, Columns("text", template="{aged}"))


@pytest.mark.parametrize("template", ["no column", "{", "{}", "{age:>3}", "{age!r}", "{age.real}", "{a[0]}"])
def test_a_malformed_template_is_refused(template: str) -> None:
    with pytest.raises(DataError, match=r"data\.template"):
        Columns("text", template=template)


def tagged(text: str, tags: str) -> Table:
    return Table("t.conll", (text,), (tags,), None, None, (7,))


def test_tags_are_checked() -> None:
    labels = ("O", "B-loc", "I-loc")
    assert tag_ids(tagged("New York won", "B-loc I-loc O"), labels) == [[1, 2, 0]]
    assert tag_ids(tagged("New York won", "1 2 0"), labels) == [[1, 2, 0]]  # places in task.labels
    for text, tags, said in [
        ("New York", "O", "row 7.*2 words and 1 tags"),
        ("New", "B-lok", "row 7.*one of 3 tags.*of 5 characters"),
        ("New", "3", "row 7.*one of 3 tags.*of 1 character"),
    ]:
        with pytest.raises(DataError, match=said):
            tag_ids(tagged(text, tags), labels)
    with pytest.raises(DataError, match=r"row 7, label column: expected BIO tags.*1 of 2.*task.labels"):
        tag_ids(tagged("New", "S-loc"), ("O", "S-loc"))


def test_numbers_are_scaled_and_checked() -> None:
    table = Table("t", ("a", "b", "c"), ("0", "5", "2.5"), None, None, (2, 3, 4))
    assert numbers(table, (0, 5)).tolist() == [-1, 1, 0]
    with pytest.raises(DataError, match=r"row 3.*0 to 4.*task.range.*found a greater one"):
        numbers(table, (0, 4))
    with pytest.raises(DataError, match=r"row 2.*found a smaller one"):
        numbers(table, (1, 5))
    for bad in ("much", "nan"):
        with pytest.raises(DataError, match=f"row 9.*text of {len(bad)} characters"):
            numbers(Table("t", ("a",), (bad,), None, None, (9,)), (0, 5))


SECRET = "Jane"


@pytest.mark.parametrize(
    ("columns", "record"),
    [
        (SPANS, {"context": CONTEXT, "question": "who?", "answers": SECRET}),
        (SPANS, {"context": CONTEXT, "question": "?", "answers": {"text": [SECRET], "answer_start": [1]}}),
        (
            SPANS,
            {"context": CONTEXT, "question": "?", "answers": {"text": ["Bob"], "answer_start": [SECRET]}},
        ),
        (TAGS, {"tokens": [f"{SECRET} Doe"], "tags": ["O"]}),
        (SEVERAL, {"text": "a", "label": [f"{SECRET}|Joe"]}),
        (Columns("text", "label", joint=IMAGES), {"text": f"{SECRET}/scan.png", "label": "a"}),
        (Columns("text", "label", joint=IMAGES), {"text": SECRET * 2000, "label": "a"}),
    ],
)
def test_a_refused_cell_is_not_shown(tmp_path: Path, columns: Columns, record: dict[str, object]) -> None:
    said = refusal(lines(tmp_path, record), columns)
    assert "row 1, column" in said and "expected" in said and SECRET not in said


@pytest.mark.parametrize(
    ("kind", "label", "labels"),
    [
        (TaskKind.SEQUENCE_CLASSIFICATION, SECRET, ("a", "Joe")),
        (TaskKind.MULTI_LABEL, f"a|{SECRET}", ("a", "Joe")),
        (TaskKind.TOKEN_CLASSIFICATION, f"B-{SECRET}", ("O", "B-Joe")),
        (TaskKind.TOKEN_CLASSIFICATION, SECRET, (SECRET, "Joe")),  # found in the data: no tags
        (TaskKind.REGRESSION, SECRET, ()),
        (TaskKind.REGRESSION, "1961.25", ()),
    ],
)
def test_a_refused_label_is_not_shown(kind: TaskKind, label: str, labels: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match=r"t, row 7, label column: expected") as caught:
        check_records(kind, Table("t", ("a",), (label,), None, None, (7,)), labels, (0, 5))
    assert not any(word in str(caught.value) for word in (SECRET, "Joe", "1961"))


IMAGE = Columns("text", "label", joint=IMAGES)
PIXELS = [[[0, 128, 255], [9, 9, 9]]]


def test_the_forms_of_an_image(tmp_path: Path) -> None:
    """A path beside the data file, bytes, and pixels: the same image."""
    Image.fromarray(np.array(PIXELS, dtype=np.uint8)).save(tmp_path / "a.png")
    path = lines(tmp_path, {"text": "a.png", "label": "x"}, {"text": PIXELS, "label": "x"})
    rows = pa.table({"text": [{"bytes": (tmp_path / "a.png").read_bytes(), "path": None}], "label": ["x"]})
    pq.write_table(rows, tmp_path / "a.parquet")
    texts = read_table(path, IMAGE).text + read_table(tmp_path / "a.parquet", IMAGE).text
    assert [np.asarray(open_image(text)).tolist() for text in texts] == [PIXELS] * 3
    gray = read_table(lines(tmp_path, {"text": [[0, 255]], "label": "x"}), IMAGE)
    assert np.asarray(open_image(gray.text[0])).tolist() == [[[0] * 3, [255] * 3]]


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("b.png", "5 characters at which no file is"),
        ("b" * 9999, "9,999 characters at which no file is"),
        ([[1, 2], [3]], "equal length"),
        ([[1, 256]], "0 to 255"),
        ([1, 2], "shape"),
        (None, "expected the path of an image"),
    ],
)
def test_what_is_no_image_is_refused(tmp_path: Path, image: object, said: str) -> None:
    path = lines(tmp_path, {"text": PIXELS, "label": "x"}, {"text": image, "label": "x"})
    refused = refusal(path, IMAGE)
    assert "row 2, column 'text'" in refused and said in refused


@pytest.mark.parametrize("damage", ["none", "a chunk"])
def test_a_damaged_image_names_its_row(tmp_path: Path, damage: str) -> None:
    """Of a PNG with a broken chunk PIL raises a SyntaxError, with bytes of the file in it."""
    content = b"no image"
    if damage == "a chunk":  # the second half of the pixels, under a name that is none
        buffer = io.BytesIO()
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(buffer, "PNG")
        whole = buffer.getvalue()
        at = whole.index(b"IDAT") + 4
        (length,) = struct.unpack(">I", whole[at - 8 : at - 4])
        pixels = whole[at : at + length]
        content = whole[: at - 8]
        for name, part in ((b"IDAT", pixels[: length // 2]), (b"\0\1\2\3", pixels[length // 2 :])):
            checked = struct.pack(">I", zlib.crc32(name + part))
            content += struct.pack(">I", len(part)) + name + part + checked
    (tmp_path / "a.png").write_bytes(content)
    table = read_table(lines(tmp_path, {"text": "a.png", "label": "x"}), IMAGE)
    with pytest.raises(DataError, match=r"row 1, text column: an image that cannot be read"):
        make_task(TaskKind.IMAGE_CLASSIFICATION, ["x", "y"]).encode(table, ViTImageProcessor(), 8)


@pytest.mark.parametrize("kind", TaskKind)
def test_every_kind_says_which_columns_it_reads(kind: TaskKind) -> None:
    columns = columns_of(DataSection(text="t", label="l", prompt="p"), kind)
    assert (columns.label == "l") is kind.needs.label
    text = Table("s", ("a",), ("O" if kind is TaskKind.TOKEN_CLASSIFICATION else "1",), ("p",), None, (1,))
    check_records(kind, text, found_labels(kind, text), (0, 5))


CONLL = "-DOCSTART-\tO\n\n# a comment\nNew\tNNP\tB-loc\nYork\tNNP\tI-loc\n\n\nhe O\r\nleft O\n"


def test_conll(tmp_path: Path) -> None:
    path = tmp_path / "a.conll"
    path.write_text(CONLL)
    table = read_table(path, TAGS)
    assert table.text == ("New York", "he left")
    assert table.label == ("B-loc I-loc", "O O")
    assert table.rows == (4, 8)
    path.write_text("New\tB-loc\nYork\n")
    assert "row 2: expected a word and its tag" in refusal(path, TAGS)
    path.write_text(CONLL)
    assert "expected a column 'word'" in refusal(path, Columns("word", "tags", joint=" "))


SQUAD = {
    "data": [
        {
            "title": "People",
            "paragraphs": [
                {
                    "context": CONTEXT,
                    "qas": [{"question": "who?", "answers": [{"text": "Ada", "answer_start": 0}]}],
                }
            ],
        }
    ]
}


def test_squad(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(SQUAD))
    table = read_table(path, Columns("context", "answers", "question", "title", spans=True))
    assert (table.text, table.label, table.prompt, table.group) == (
        (CONTEXT,),
        ("Ada",),
        ("who?",),
        ("People",),
    )
    for broken in ({"data": [{"paragraphs": [{}]}]}, {"version": 1}, [1], {"data": 3}):
        path.write_text(json.dumps(broken))
        assert "rename it to .jsonl" in refusal(path, SPANS)


@pytest.mark.parametrize(
    "unanswerable", [{"answers": [], "is_impossible": True}, {"answers": []}, {"is_impossible": True}]
)
def test_a_question_of_squad_2_without_an_answer(tmp_path: Path, unanswerable: dict[str, object]) -> None:
    asked = [{"question": "who?", "answers": [{"text": "Ada", "answer_start": 0}]}]
    paragraph = {"context": CONTEXT, "qas": [*asked, {"question": "why?", **unanswerable}]}
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"data": [{"paragraphs": [paragraph]}]}))
    said = refusal(path, SPANS)
    assert "row 2, column 'answers': expected an answer (questions without one, as SQuAD 2" in said
    assert "take SQuAD 1.1" in said


def test_a_list_of_texts_that_is_empty_is_no_answer(tmp_path: Path) -> None:
    """As the data sets of the hub have SQuAD 2."""
    record = {"context": CONTEXT, "question": "why?", "answers": {"text": [], "answer_start": []}}
    assert "SQuAD 2" in refusal(lines(tmp_path, record), SPANS)
