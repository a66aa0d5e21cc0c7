"""A check reports every planted fault with its rows, and finds nothing where there is nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import confide
from client.data.check import Checked, check
from client.data.findings import ERRORS_EXIT, WARNINGS_EXIT, Code, Severity, listed_rows
from client.data.subject import subject_of
from common.errors import ConfigError, DataError
from tests.client.data.planted import PLANTED, Record, as_csv, as_jsonl, planted, public, sound, write

SECRETS = ("jane.roe@example.org", "7946 0958", "0532 0130", "1111 1111", "90-4399", "86095742719", "Schmidt")


def rows_of(checked: Checked, code: Code) -> set[int]:
    return {row for f in checked.findings if f.code is code and not f.in_test for row in f.rows}


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(confide.app, ["client", "data", *map(str, arguments)], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


@pytest.mark.parametrize(("form", "first"), [("csv", 2), ("jsonl", 1)])
def test_every_planted_fault_is_reported_with_its_row(tmp_path: Path, form: str, first: int) -> None:
    """31 faults of 28 kinds in the rows, and more in the bytes."""
    write_as = as_csv if form == "csv" else as_jsonl
    records = planted()
    lines = write_as(records).split(b"\n")
    lines[39 + first - 1] = lines[39 + first - 1].replace(b"usual", b"\xfcblich")  # ISO 8859-1
    lines += [b'"never closed,card,p900' if form == "csv" else b'{"text": "never closed"', b""]
    broken = len(lines) - 1
    if form == "csv":
        lines.insert(broken, b"only,two")
    else:
        lines.insert(broken, b'["no", "object"]')
    train = write(tmp_path, f"train.{form}", b"\xef\xbb\xbf" + b"\n".join(lines))
    test = write(tmp_path, f"test.{form}", write_as(public(records)))

    checked = check(subject_of(train, test=test, person="person"))

    assert len(PLANTED) == 31
    assert len({code for code, _ in PLANTED.values()}) == 28
    missed = {
        (place, code.label)
        for place, (code, _) in PLANTED.items()
        if place + first not in rows_of(checked, code)
    }
    assert missed == set()
    assert rows_of(checked, Code.INVALID_UTF8) == {39 + first}
    assert rows_of(checked, Code.UNREADABLE_ROW) == {broken, broken + 1}
    assert rows_of(checked, Code.BYTE_ORDER_MARK) == {1}
    assert 0 + first in rows_of(checked, Code.SEVERAL_RECORDS)
    assert {1 + first} & rows_of(checked, Code.DUPLICATE) == set()  # the first of two is none
    assert rows_of(checked, Code.CONFLICT) == {4 + first, 22 + first}
    # Nothing else is alarmed at: each finding's rows are those where something was planted.
    for code in (
        Code.EMAIL,
        Code.PHONE,
        Code.IBAN,
        Code.CARD,
        Code.NATIONAL_ID,
        Code.BIRTH_DATE,
        Code.IP_ADDRESS,
    ):
        assert rows_of(checked, code) == {place + first for place, (c, _) in PLANTED.items() if c is code}


def test_faults_of_types_and_columns_in_jsonl(tmp_path: Path) -> None:
    rows: list[object] = [record.cells() for record in sound()]
    rows[2] = {"label": "card", "person": "p"}
    rows[3] = {"text": None, "label": "card", "person": "q"}
    rows[4] = {"text": {"nested": 1}, "label": "card", "person": "r"}
    rows[5] = {"text": float("nan"), "label": "card", "person": "s"}
    rows[6] = {"text": "half of a character \ud800 here", "label": "card", "person": "t"}
    rows[7] = {"text": "a label that is a number", "label": 1, "person": "u"}
    rows[8] = {**sound()[8].cells(), "note": "only here"}
    lines = [json.dumps(row).encode() for row in rows]
    lines[9] = lines[9][:-1] + b', "label": "loan"}'
    train = write(
        tmp_path, "train.jsonl", b"\r\n".join(lines[:20]) + b"\r\n" + b"\n".join(lines[20:]) + b"\n"
    )
    checked = check(subject_of(train, person="person"))
    assert rows_of(checked, Code.MISSING_VALUE) == {3, 4, 6}
    assert rows_of(checked, Code.WRONG_TYPE) == {5, 7}
    assert rows_of(checked, Code.MIXED_TYPES) == {8}
    assert rows_of(checked, Code.EXTRA_COLUMN) == {9}
    assert rows_of(checked, Code.DUPLICATE_COLUMN) == {10}
    assert rows_of(checked, Code.MIXED_NEWLINES) == {21}


def test_a_first_line_that_may_be_a_record_is_not_shown(tmp_path: Path) -> None:
    """It was listed as names of columns, four times."""
    path = write(
        tmp_path, "a.csv", b"Ada has hepatitis,positive,ada@lovelace.org\nBob has none,negative,b@c.org\n"
    )
    page = tmp_path / "page.html"
    for options in ((), ("--json",), ("--html", page)):
        code, shown = run("check", path, *options)
        assert code == ERRORS_EXIT and "3 fields in the first line, which may be a record" in shown
        assert "Ada" not in shown and "lovelace" not in shown
    assert "Ada" not in page.read_text("utf-8")
    _, shown = run("check", write(tmp_path, "b.csv", b"message;category\nw1;x\n"))
    assert "The header holds ';': expected ','" in shown.replace("\n", " ") and "message" not in shown


def test_missing_double_and_constant_columns(tmp_path: Path) -> None:
    data = as_csv(sound()).replace(b"text,label,person", b"txt,label,label")
    found = {(f.code, f.column): f for f in check(subject_of(write(tmp_path, "a.csv", data))).findings}
    assert "Is it 'txt'?" in found[Code.MISSING_COLUMN, "text"].says
    assert (Code.DUPLICATE_COLUMN, "label") in found
    constant = [Record(record.text, "card", record.person) for record in sound()]
    checked = check(subject_of(write(tmp_path, "b.csv", as_csv(constant)), person="person"))
    assert [(f.code, f.column) for f in checked.findings] == [(Code.CONSTANT_COLUMN, "label")]


def test_what_a_configuration_says_is_held_against_the_file(tmp_path: Path) -> None:
    records = sound()
    records[3].label = "crad"
    write(tmp_path, "train.csv", as_csv(records))
    config = tmp_path / "confide.toml"
    config.write_text(
        '[task]\nlabels = ["card", "loan", "transfer"]\n[model]\nname = "sample:all-minilm-l6-v2"\n'
        "max_length = 16\n"
        '[data]\ntrain = "train.csv"\nmax_characters = 75\n[privacy]\ntarget_epsilon = 2.0\n'
    )
    checked = check(subject_of(config, person="person"))
    unknown = next(f for f in checked.findings if f.code is Code.UNKNOWN_LABEL)
    assert unknown.rows == (5,)
    assert "'card'" in unknown.says
    assert [lengths.unit for lengths in checked.lengths] == ["characters", "tokens"]
    assert len(rows_of(checked, Code.OVER_LONG)) == sum(len(str(r.text)) > 75 for r in records) > 0
    assert len(rows_of(checked, Code.CUT_OFF)) == checked.lengths[1].beyond > 0


@pytest.mark.parametrize(
    ("task", "label", "code", "rows"),
    [
        ('kind = "regression"\nrange = [0, 5]', ["1", "2.5", "many", "7", "0"], Code.BAD_NUMBER, {4, 5}),
        ('kind = "multi-label"\nlabels = ["a", "b"]', ["a", "a|b", "c|b", "", "b"], Code.UNKNOWN_LABEL, {4}),
    ],
)
def test_numbers_and_several_labels(
    tmp_path: Path, task: str, label: list[str], code: Code, rows: set[int]
) -> None:
    records = [Record(sound()[i].text, one, "") for i, one in enumerate(label)]
    write(tmp_path, "train.csv", as_csv(records))
    config = tmp_path / "confide.toml"
    config.write_text(f'[task]\n{task}\n[model]\nname = "x"\n[data]\ntrain = "train.csv"\n')
    subject = subject_of(config)
    from dataclasses import replace

    checked = check(replace(subject, model=None))
    assert rows_of(checked, code) == rows
    assert rows_of(checked, Code.EMPTY_LABEL) == set()


def test_tags_and_words(tmp_path: Path) -> None:
    good = "Ada\tB-person\nwrote\tO\n\n"
    text = good * 1 + "Bob\tB-person\nLee\tI-place\n\nalone\n\nNo\tX-what\ntag\tO\n\n"
    checked = check(subject_of(write(tmp_path, "a.conll", text.encode())))
    assert rows_of(checked, Code.BROKEN_ENTITY) == {4}
    assert rows_of(checked, Code.UNREADABLE_ROW) == {7}
    assert rows_of(checked, Code.BAD_TAGS) == {9}
    rows = [{"tokens": ["a", "b"], "tags": ["O"]}, {"tokens": ["c"], "tags": ["O"]}]
    config = tmp_path / "confide.toml"
    write(tmp_path, "t.jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    config.write_text(
        '[task]\nkind = "token-classification"\n[model]\nname = "sample:all-minilm-l6-v2"\n'
        '[data]\ntrain = "t.jsonl"\ntext = "tokens"\nlabel = "tags"\n'
    )
    assert rows_of(check(subject_of(config)), Code.BAD_TAGS) == {1}


def test_answers_that_stand_nowhere(tmp_path: Path) -> None:
    answers = [{"text": ["Bern"], "answer_start": [0]}, {"text": ["Rome"], "answer_start": [3]}]
    questions = [
        {
            "question": f"Which of them is it, number {i}?",
            "answers": [{"text": a["text"][0], "answer_start": a["answer_start"][0]}],
        }
        for i, a in enumerate(answers)
    ]
    data = {"data": [{"paragraphs": [{"context": "Bern is a town, and not the largest.", "qas": questions}]}]}
    checked = check(subject_of(write(tmp_path, "a.json", json.dumps(data).encode())))
    assert rows_of(checked, Code.BAD_ANSWER) == {2}


def test_questions_of_squad_2_without_an_answer(tmp_path: Path) -> None:
    answer = {"text": "Bern", "answer_start": 0}
    questions = [
        {"question": "Which one?", "answers": [answer], "is_impossible": False},
        {"question": "Which other?", "answers": [], "plausible_answers": [answer], "is_impossible": True},
        {"question": "Why?", "answers": [], "is_impossible": True},
    ]
    data = {"data": [{"paragraphs": [{"context": "Bern is a town.", "qas": questions}]}]}
    checked = check(subject_of(write(tmp_path, "a.json", json.dumps(data).encode())))
    assert rows_of(checked, Code.NO_ANSWER) == {2, 3} and rows_of(checked, Code.BAD_ANSWER) == set()


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet", "tsv"])
def test_sound_data_gives_no_finding(tmp_path: Path, form: str) -> None:
    if form == "parquet":
        train = tmp_path / "train.parquet"
        pq.write_table(pa.Table.from_pylist([record.cells() for record in sound()]), train)
    elif form == "tsv":
        train = write(tmp_path, "train.tsv", as_csv(sound()).replace(b",", b"\t"))
        train.write_bytes(
            "\n".join(
                ["text\tlabel\tperson", *("\t".join(map(str, r.cells().values())) for r in sound())]
            ).encode()
        )
    else:
        train = write(tmp_path, f"train.{form}", (as_csv if form == "csv" else as_jsonl)(sound()))
    test = write(tmp_path, "test.csv", as_csv(public(sound())[:3]))
    checked = check(subject_of(train, test=test, person="person"))
    train_side = [f for f in checked.findings if not f.in_test]
    assert train_side == []
    code, shown = run("check", train, "--person", "person")
    assert code == 0
    assert "nothing found" in shown


def test_a_line_break_in_a_field_does_not_shift_the_lines(tmp_path: Path) -> None:
    records = sound()
    records[2].text = "first line\nand the second of the same record"
    records[9].text = ""
    checked = check(subject_of(write(tmp_path, "a.csv", as_csv(records))))
    assert rows_of(checked, Code.EMPTY_TEXT) == {12}


def test_languages_emoji_and_scripts_are_no_faults(tmp_path: Path) -> None:
    texts = [
        "Ein schönes Straßenfest, naïve Fälle, l’été à Genève – 5 € pro Person",
        "👩‍👩‍👧 family, 🏳️‍🌈 flag and 👍🏽 thumbs",
        "می‌خواهم به خانه بروم",  # needs its zero-width non-joiner
        "क्‍ष और हिन्दी के शब्द",
        "今日は良い天気ですね。明日も晴れるでしょう",
        "Is 3 < 5 and 7 > 2? AT&T says a<b, x -> y; see <user> and {name}",
        "Meeting 2024-01-02 at 10:30, order 123456789, version 1.2.3, pages 100-200, 1,000,000.00",
        "Build 20240131 took 1706659200000 ms; ISBN 978-3-16-148410-0; 10% off until 01/02",
    ]
    train = write(tmp_path, "a.jsonl", b"".join(json.dumps({"text": t}).encode() + b"\n" for t in texts))
    assert [(f.code.label, f.rows, f.says) for f in check(subject_of(train)).findings] == []


def test_what_is_printed_shows_no_personal_data(tmp_path: Path) -> None:
    train = write(tmp_path, "train.csv", as_csv(planted()))
    page = tmp_path / "page.html"
    code, shown = run("check", train, "--person", "person", "--html", page)
    assert code == ERRORS_EXIT
    _, as_json = run("check", train, "--person", "person", "--json")
    for output in (shown, as_json, page.read_text("utf-8")):
        assert not [secret for secret in SECRETS if secret in output]
        assert "personal-data-in-label" in output
    fields = json.loads(as_json)
    assert {finding["severity"] for finding in fields["findings"]} == {s.value for s in Severity}
    html = page.read_text("utf-8")
    assert "<script" not in html
    assert re.search(r"(?:src|href)=", html) is None
    assert "<p>Copied" not in html


def test_exit_codes(tmp_path: Path) -> None:
    records = sound()
    records[5].text = "write to jane.roe@example.org"
    assert run("check", write(tmp_path, "a.csv", as_csv(records)), "--person", "person")[0] == WARNINGS_EXIT
    records[5].label = ""
    assert run("check", write(tmp_path, "b.csv", as_csv(records)), "--person", "person")[0] == ERRORS_EXIT


def test_a_person_with_several_records_is_told_what_that_means(tmp_path: Path) -> None:
    records = sound()
    for record in records[:4]:
        record.person = "same"
    checked = check(subject_of(write(tmp_path, "a.csv", as_csv(records)), person="person"))
    says = next(f.says for f in checked.findings if f.code is Code.SEVERAL_RECORDS)
    assert "covered only at 4 × 8 = 32" in says
    assert "at most 1 record a person" in says
    assert "37 of 40 records stay" in says


# What is hardly a file


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.tsv", "a.conll", "a.json"])
@pytest.mark.parametrize("data", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_a_finding(tmp_path: Path, name: str, data: bytes) -> None:
    checked = check(subject_of(write(tmp_path, name, data)))
    assert Code.NO_RECORDS in [finding.code for finding in checked.findings]


def test_a_header_alone_and_one_row(tmp_path: Path) -> None:
    assert Code.NO_RECORDS in [
        f.code for f in check(subject_of(write(tmp_path, "a.csv", b"text,label\n"))).findings
    ]
    checked = check(subject_of(write(tmp_path, "b.csv", b"text,label\nquite alone here,card\n")))
    assert [f.code for f in checked.findings] == [Code.RARE_LABEL]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet", "a.json", "a.conll"])
def test_binary_junk_is_refused_in_words(tmp_path: Path, name: str) -> None:
    junk = bytes((i * 7919 + i // 256) % 256 for i in range(20000))
    with pytest.raises(DataError, match="expected"):
        check(subject_of(write(tmp_path, name, junk)))


def test_utf_16_a_missing_file_and_an_unknown_kind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="UTF-16"):
        check(subject_of(write(tmp_path, "a.csv", "text\nhello\n".encode("utf-16"))))
    with pytest.raises(DataError, match="no such file"):
        subject_of(tmp_path / "nowhere.csv")
    with pytest.raises(DataError, match=r"found '\.xlsx'"):
        subject_of(write(tmp_path, "a.xlsx", b"x"))


def test_a_sample_is_no_file(tmp_path: Path) -> None:
    config = tmp_path / "confide.toml"
    config.write_text('[model]\nname = "x"\n[data]\nsample = "rotten-tomatoes"\n')
    with pytest.raises(ConfigError, match="built-in sample"):
        subject_of(config)


def test_the_page_never_takes_the_place_of_the_data(tmp_path: Path) -> None:
    train = write(tmp_path, "a.csv", as_csv(sound()))
    with pytest.raises(ConfigError, match="name another"):
        run("check", train, "--html", train)
    assert train.read_bytes() == as_csv(sound())


def test_one_huge_line(tmp_path: Path) -> None:
    line = "1234567890 abc@ <b &x; +1 (555 " * 20_000
    checked = check(subject_of(write(tmp_path, "a.jsonl", json.dumps({"text": line}).encode())))
    assert rows_of(checked, Code.OVER_LONG) == {1}


def test_rows_are_drawn_together() -> None:
    assert listed_rows([1, 2, 3, 7, 9, 10], 2) == "1–3, 7 and 2 more"
    assert listed_rows([], 2) == ""


@pytest.mark.slow
def test_a_hundred_thousand_rows_in_minutes(tmp_path: Path) -> None:
    """Half of them alike, which is the worst case of a search for near-duplicates."""
    import time

    words = [
        f"{a}{b}" for a in ("al", "be", "ga", "de", "ep", "ze", "et", "th") for b in ("ra", "mo", "ki", "su")
    ]
    lines = ["text,label"]
    for i in range(100_000):
        own = " ".join(words[(i * k + i // 7) % 32] for k in (1, 3, 5, 7, 11, 13, 17, 19, 23, 29))
        lines.append(f"{'the same words again ' + str(i % 1000) if i % 2 else own + ' ' + str(i)},l{i % 3}")
    began = time.monotonic()
    checked = check(subject_of(write(tmp_path, "a.csv", "\n".join(lines).encode())))
    assert len(checked.raw.rows) == 100_000
    assert time.monotonic() - began < 300
