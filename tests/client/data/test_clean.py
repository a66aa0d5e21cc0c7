"""A recipe tidies a file into a new one: as it says, the same each time, and nothing twice."""

from __future__ import annotations

import csv
import hashlib
import json
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.data.check import check
from client.data.cleaning import Cleaned, clean
from client.data.findings import Code, Severity
from client.data.propose import proposed
from client.data.reading import read_raw
from client.data.recipe import StepKind, load_recipe
from client.data.subject import subject_of
from common.datasets import read_table
from common.errors import ConfigError, DataError, PrivacyError
from common.tables import Columns
from tests.client.data.planted import Record, as_csv, as_jsonl, planted, public, sound, write
from tests.client.data.test_check import run

ALL = """
[[step]]
do = "fix-mojibake"
[[step]]
do = "strip-html"
[[step]]
do = "strip-invisible"
[[step]]
do = "normalise-unicode"
[[step]]
do = "collapse-space"
[[step]]
do = "mask"
kinds = ["email", "phone", "iban", "payment-card", "national-id", "ip-address", "date-of-birth", "name"]
[[step]]
do = "map-labels"
map = { "Card" = "card", "CARD" = "card" }
[[step]]
do = "drop-empty"
[[step]]
do = "drop-long"
characters = 300
[[step]]
do = "drop-conflicts"
[[step]]
do = "drop-duplicates"
[[step]]
do = "drop-near-duplicates"
[[step]]
do = "cap-person"
records = 2
"""


def recipe(folder: Path, text: str = ALL) -> Path:
    return write(folder, "recipe.toml", text.encode())


def tidy(source: Path, steps: Path, out: Path, **named: Any) -> Cleaned:
    return clean(subject_of(source, **{"person": "person", **named}), steps, out)


def texts(path: Path) -> list[object]:
    return [row.cells["text"] for row in read_raw(path).rows]


def test_planted_faults_are_proposed_away(tmp_path: Path) -> None:
    """What --propose writes and clean does leaves nothing but what is left to people."""
    records = planted()
    for place in (35, 36, 37):  # labels and people that no step makes up
        records[place] = sound()[place]
    train = write(tmp_path, "train.csv", as_csv(records) + b"only,two\n")
    test = write(tmp_path, "test.csv", as_csv(public(records)))
    subject = subject_of(train, test=test, person="person")
    steps = write(tmp_path, "recipe.toml", proposed(check(subject)).encode())
    before = train.read_bytes()
    out = tmp_path / "out.csv"
    clean(subject, steps, out)
    assert train.read_bytes() == before
    left = [f for f in check(subject_of(out, test=test, person="person")).findings if not f.in_test]
    assert {f.code for f in left} == {
        Code.REPLACEMENT,
        Code.RARE_LABEL,
        Code.NAME,
        Code.NEAR_TEST,
        Code.IMBALANCE,
    }
    assert len(read_table(out, Columns("text", "label"))) == len(read_raw(out).rows)


def test_each_step_says_what_it_did(tmp_path: Path) -> None:
    records = sound()[:10]
    records[1].text = "Write to jane@example.org  or to the CafÃ©"
    records[2].label = "CARD"
    records[3].text = ""
    records[4].text = records[5].text
    records[4].label = records[5].label
    for record in records[6:]:
        record.person = "same"
    source, out = write(tmp_path, "a.csv", as_csv(records)), tmp_path / "b.csv"
    done = tidy(source, recipe(tmp_path), out)
    fields = json.loads(done.record.read_text("utf-8"))
    by_name = {step["do"]: step for step in fields["steps"]}
    assert by_name["fix-mojibake"]["changed"] == {"count": 1, "rows": [3]}
    assert by_name["collapse-space"]["changed"]["rows"] == [3]
    assert by_name["mask"]["changed"]["rows"] == [3]
    assert by_name["map-labels"]["changed"]["rows"] == [4]
    assert by_name["drop-empty"]["dropped"]["rows"] == [5]
    assert by_name["drop-duplicates"]["dropped"]["rows"] == [7]
    assert by_name["cap-person"]["dropped"]["count"] == 2
    assert fields["input"] == {"sha256": hashlib.sha256(source.read_bytes()).hexdigest(), "rows": 10}
    assert fields["output"] == {"sha256": hashlib.sha256(out.read_bytes()).hexdigest(), "rows": 6}
    assert texts(out)[1] == "Write to [EMAIL] or to the Café"


def test_twice_gives_the_same_bytes_and_again_changes_nothing(tmp_path: Path) -> None:
    records = planted()
    records[37].person = "p037"
    source, steps = write(tmp_path, "a.jsonl", as_jsonl(records)), recipe(tmp_path)
    first = tidy(source, steps, tmp_path / "b.jsonl")
    second = tidy(source, steps, tmp_path / "c.jsonl")
    again = tidy(first.out, steps, tmp_path / "d.jsonl")
    assert first.out.read_bytes() == second.out.read_bytes() == again.out.read_bytes()
    assert first.record.read_bytes() == second.record.read_bytes()
    assert sum(len(step.changed) + len(step.dropped) for step in again.steps) == 0


_PIECES = st.sampled_from(
    [
        "a",
        "Card",
        " ",
        "  ",
        "\t",
        "\n",
        "&amp;",
        "&lt;",
        "b>",
        "<b",
        "<br>",
        "é",
        "e\u0301",
        "\u200b",
        "\u200d",
        "Ã©",
        "â€™",
        "\x07",
        "\x85",
        "jane@example.org",
        "Anna",
        "Schmidt",
        "Dr.",
        "+44 20 7946 0958",
        "&#769;",
        "ﬁ",
        "😀",
    ]
)
_TEXT = st.one_of(st.lists(_PIECES, max_size=8).map("".join), st.text(max_size=20))
_RECORD = st.tuples(_TEXT, st.sampled_from(["card", "Card", "CARD", "loan"]), st.sampled_from("pqr"))


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=st.lists(_RECORD, min_size=1, max_size=8), form=st.sampled_from(["csv", "jsonl"]))
def test_cleaning_is_idempotent(tmp_path: Path, records: list[tuple[str, str, str]], form: str) -> None:
    for path in tmp_path.iterdir():
        path.unlink()
    those = [Record(*record) for record in [*records, ("some words that stay here", "loan", "s")]]
    data = as_csv(those, csv.QUOTE_ALL) if form == "csv" else as_jsonl(those)
    source = write(tmp_path, f"a.{form}", data)
    steps = recipe(tmp_path)
    once = tidy(source, steps, tmp_path / f"b.{form}")
    twice = tidy(once.out, steps, tmp_path / f"c.{form}")
    assert once.out.read_bytes() == twice.out.read_bytes()
    wanted = {
        Code.MOJIBAKE,
        Code.HTML,
        Code.CONTROL,
        Code.NOT_NFC,
        Code.SPARE_SPACE,
        Code.EMPTY_TEXT,
        Code.DUPLICATE,
        Code.CONFLICT,
        Code.NEAR_DUPLICATE,
        Code.INVISIBLE,
        Code.EMAIL,
    }
    assert {f.code for f in check(subject_of(once.out, person="person")).findings} & wanted == set()


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(12)), cap=st.integers(1, 4))
def test_a_cap_does_not_depend_on_the_order(tmp_path: Path, order: list[int], cap: int) -> None:
    for path in tmp_path.iterdir():
        path.unlink()
    records = sound()[:12]
    for i, record in enumerate(records):
        record.person = f"p{i % 3}"
    steps = recipe(tmp_path, f'[[step]]\ndo = "cap-person"\nrecords = {cap}\n')
    one = tidy(write(tmp_path, "a.csv", as_csv(records)), steps, tmp_path / "b.csv")
    other = tidy(write(tmp_path, "c.csv", as_csv([records[i] for i in order])), steps, tmp_path / "d.csv")
    assert sorted(map(str, texts(one.out))) == sorted(map(str, texts(other.out)))
    people = Counter(row.cells["person"] for row in read_raw(one.out).rows)
    assert set(people.values()) == {cap}


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet", "csv.gz", "jsonl.xz", "jsonl.bz2"])
def test_every_form_is_written_and_read_back(tmp_path: Path, suffix: str) -> None:
    records = sound()
    records[0].text = 'quoted "words",\nand a line of its own'
    records[1].text = "a carriage\rreturn"
    source = write(tmp_path, "a.csv", as_csv(records, csv.QUOTE_ALL))
    steps = recipe(tmp_path, '[[step]]\ndo = "drop-empty"\n')
    done = tidy(source, steps, tmp_path / f"b.{suffix}")
    other = tidy(source, steps, tmp_path / f"c.{suffix}")
    assert done.out.read_bytes() == other.out.read_bytes()
    assert list(read_table(done.out, Columns("text")).text) == [record.text for record in records]


def test_parquet_keeps_its_schema(tmp_path: Path) -> None:
    source = tmp_path / "a.parquet"
    rows = [{**record.cells(), "when": i, "many": [1, 2]} for i, record in enumerate(sound())]
    pq.write_table(pa.Table.from_pylist(rows), source)
    done = tidy(source, recipe(tmp_path), tmp_path / "b.parquet")
    assert pq.read_schema(done.out).equals(pq.read_schema(source))


def test_words_keep_their_tags(tmp_path: Path) -> None:
    text = "Ada\tB-person\n\u200b\tO\n&amp;\tO\njane@example.org\tO\n\nA\tO\n\n"
    steps = recipe(
        tmp_path,
        '[[step]]\ndo="strip-html"\n[[step]]\ndo="strip-invisible"\n[[step]]\ndo="mask"\nkinds=["email"]\n',
    )
    done = tidy(write(tmp_path, "a.conll", text.encode()), steps, tmp_path / "b.conll", person=None)
    assert done.out.read_text("utf-8") == "Ada\tB-person\n\u200b\tO\n&\tO\n[EMAIL]\tO\n\nA\tO\n\n"


def test_the_context_of_an_answer_stays_as_it_is(tmp_path: Path) -> None:
    question = {"question": "Where?", "answers": [{"text": "Bern", "answer_start": 0}]}
    data = {"data": [{"paragraphs": [{"context": "Bern  &amp; more", "qas": [question]}]}]}
    source = write(tmp_path, "a.json", json.dumps(data).encode())
    with pytest.raises(ConfigError, match="place in the context"):
        tidy(source, recipe(tmp_path, '[[step]]\ndo = "strip-html"\n'), tmp_path / "b.jsonl", person=None)
    proposal = proposed(check(subject_of(source)))
    assert "strip-html" not in [
        step.kind.label for step in load_recipe(write(tmp_path, "r.toml", proposal.encode()))
    ]


def test_what_stands_in_the_public_set_is_left_out(tmp_path: Path) -> None:
    records = sound()
    source, steps = (
        write(tmp_path, "a.csv", as_csv(records)),
        recipe(tmp_path, '[[step]]\ndo = "drop-in-test"\n'),
    )
    test = write(tmp_path, "test.csv", as_csv(public(records)))
    assert tidy(source, steps, tmp_path / "b.csv", test=test).kept == 39
    with pytest.raises(ConfigError, match="--test"):
        tidy(source, steps, tmp_path / "c.csv")


# What is refused, with nothing written


def test_bytes_and_rows_that_cannot_be_read_need_a_word(tmp_path: Path) -> None:
    source = write(tmp_path, "a.csv", as_csv(sound()).replace(b"harbour", b"H\xe4fen", 1) + b"only,two\n")
    steps = '[[step]]\ndo = "collapse-space"\n'
    with pytest.raises(DataError, match=r"lines 2\..*decode"):
        tidy(source, recipe(tmp_path, steps), tmp_path / "b.csv")
    steps += '[[step]]\ndo = "decode"\nencoding = "windows-1252"\n'
    with pytest.raises(DataError, match=r"lines 42 .*drop-unreadable"):
        tidy(source, recipe(tmp_path, steps), tmp_path / "b.csv")
    steps += '[[step]]\ndo = "drop-unreadable"\n'
    done = tidy(source, recipe(tmp_path, steps), tmp_path / "b.csv")
    assert "Häfen" in str(texts(done.out)[0])
    assert next(step.dropped for step in done.steps if step.name == "drop-unreadable") == (42,)


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ('[[step]]\ndo = "drop-dupes"', ConfigError, "Did you mean 'drop-duplicates'"),
        ('[[step]]\ndo = "drop-long"', ConfigError, "needs the option characters"),
        ('[[step]]\ndo = "drop-long"\ncharacters = 0', ConfigError, "whole number >= 1"),
        ('[[step]]\ndo = "cap-person"\nrecord = 3', ConfigError, "Did you mean records"),
        ('[[step]]\ndo = "mask"\nkinds = ["e-mail"]', ConfigError, "a list of email"),
        ('[[step]]\ndo = "map-labels"\nmap = { a = "b", b = "a" }', ConfigError, "both sides"),
        ('[[step]]\ndo = "decode"\nencoding = "klingon"', ConfigError, "name of an encoding"),
        ('[[step]]\ndo = "drop-near-duplicates"\nsimilarity = 2', ConfigError, "from 0.5 to 1"),
        ('[[steps]]\ndo = "mask"', ConfigError, "found 'steps'"),
        ("", ConfigError, "no step"),
        ("do = ", ConfigError, "not valid TOML"),
        ('[[step]]\ndo = "augment"\ncopies = 3', PrivacyError, "covered only at c times ε"),
    ],
)
def test_a_wrong_recipe_is_explained(tmp_path: Path, text: str, error: type[Exception], says: str) -> None:
    source = write(tmp_path, "a.csv", as_csv(sound()))
    with pytest.raises(error, match=says):
        tidy(source, recipe(tmp_path, text), tmp_path / "b.csv")
    assert not (tmp_path / "b.csv").exists()


def test_nothing_is_ever_overwritten(tmp_path: Path) -> None:
    source, steps = write(tmp_path, "a.csv", as_csv(sound())), recipe(tmp_path)
    before = source.read_bytes()
    link, dangling, taken = tmp_path / "link.csv", tmp_path / "dangling.csv", tmp_path / "taken.csv"
    link.symlink_to(source)
    dangling.symlink_to(tmp_path / "nowhere.csv")
    write(tmp_path, "taken.csv.recipe.json", b"mine")
    for out in (source, link, dangling, taken, tmp_path):
        with pytest.raises(ConfigError, match="is there already"):
            tidy(source, steps, out)
    with pytest.raises(ConfigError, match="no folder"):
        tidy(source, steps, tmp_path / "no" / "b.csv")
    assert source.read_bytes() == before
    assert (tmp_path / "taken.csv.recipe.json").read_bytes() == b"mine"
    assert not taken.exists()
    assert tidy(link, steps, tmp_path / "b.csv").kept == 40  # to read through a link is fine


@pytest.mark.parametrize("fails", [1, 2])
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: int) -> None:
    from common import files

    source, steps = write(tmp_path, "a.csv", as_csv(sound())), recipe(tmp_path)
    there = sorted(tmp_path.iterdir())
    calls: list[int] = []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2 * fails - 1:  # each file, then its folder
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        tidy(source, steps, tmp_path / "b.csv")
    assert sorted(tmp_path.iterdir()) == there


def test_a_recipe_that_leaves_nothing_or_a_row_of_nobody(tmp_path: Path) -> None:
    records = sound()
    source = write(tmp_path, "a.csv", as_csv(records))
    with pytest.raises(DataError, match="none of 40 rows"):
        tidy(source, recipe(tmp_path, '[[step]]\ndo = "drop-long"\ncharacters = 3\n'), tmp_path / "b.csv")
    records[3].person = " "
    source = write(tmp_path, "c.csv", as_csv(records))
    with pytest.raises(DataError, match="line 5, column 'person'"):
        tidy(source, recipe(tmp_path), tmp_path / "b.csv")
    with pytest.raises(ConfigError, match="--person"):
        tidy(source, recipe(tmp_path), tmp_path / "b.csv", person=None)
    for role in ("text", "label", "prompt", "person"):
        with pytest.raises(DataError, match="expected a column 'nowhere'"):
            tidy(source, recipe(tmp_path), tmp_path / "b.csv", **{role: "nowhere"})
    assert not (tmp_path / "b.csv").exists()


def test_from_the_command_line(tmp_path: Path) -> None:
    source, out = write(tmp_path, "a.csv", as_csv(planted())), tmp_path / "b.csv"
    steps = tmp_path / "recipe.toml"
    code, shown = run("clean", source, "--propose", "--to", steps)
    assert (code, "next: read it" in shown) == (0, True)
    code, shown = run("clean", source, "--recipe", steps, "--to", out, "--json")
    assert json.loads(shown)["rows_written"] == len(read_raw(out).rows)
    for arguments in (["--to", out], ["--recipe", steps], ["--recipe", steps, "--propose", "--to", out]):
        with pytest.raises(ConfigError, match="--"):
            run("clean", source, *arguments)
    with pytest.raises(ConfigError, match="is there already"):
        run("clean", source, "--propose", "--to", steps)


@pytest.mark.parametrize(
    ("name", "data", "rows"),
    [
        ("a.csv", b'text,label\ncaf\xe9,1\n"two\nlines \x81",2\nok,3\n"x\n",4\n\xfc,5\n', [2, 3, 8]),
        ("b.csv", b"text,gr\xf6\xdfe\nok,1\ncaf\xe9,2\n", [3]),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "caf\xe9", "n": NaN}\n{"text": "ok", "n": NaN}\n', [2]),
        ("a.conll", b"# caf\xe9\nok\tO\n\ncaf\xe9\tO\n", [4]),
    ],
)
def test_decode_says_which_rows_it_changed(tmp_path: Path, name: str, data: bytes, rows: list[int]) -> None:
    steps = recipe(tmp_path, '[[step]]\ndo = "decode"\nencoding = "windows-1252"\n')
    source, out = write(tmp_path, name, data), tmp_path / f"out-{name}"
    done = tidy(source, steps, out, person=None)
    assert list(done.steps[0].changed) == rows
    fields = json.loads(done.record.read_text("utf-8"))
    assert fields["steps"][0]["changed"] == {"count": len(rows), "rows": rows}


def test_propose_prints_the_next_command_whole(tmp_path: Path) -> None:
    """As it stands it runs, and looks at what was looked at: columns, people, the evaluation set."""
    records = sound()
    records[1] = records[0]
    header, columns = b"text,label,person", b"body,topic,who"
    source = write(tmp_path, "a file.csv", as_csv(records).replace(header, columns))
    test = write(tmp_path, "the public.csv", as_csv(records[:1]).replace(header, columns))
    named = ["--text", "body", "--label", "topic", "--person", "who", "--test", test]
    steps = tmp_path / "my recipe.toml"
    write(tmp_path, "clean-a file.csv", b"made before")
    _, shown = run("clean", source, "--propose", "--to", steps, *named)
    confide, client, data, *command = shlex.split(shown.splitlines()[-1])
    assert [confide, client, data] == ["confide", "client", "data"]
    code, shown = run(*command, "--json")
    assert code == 0 and Path(json.loads(shown)["out"]).parent == tmp_path
    fields = json.loads(Path(json.loads(shown)["record"]).read_text("utf-8"))
    assert fields["columns"] == {"text": ["body"], "label": "topic", "prompt": None, "person": "who"}
    assert fields["public"] is not None


def test_propose_of_a_file_whose_name_reads_as_an_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "-x.csv", as_csv([sound()[0], *sound()]))
    _, shown = run("clean", "./-x.csv", "--propose", "--to", "recipe.toml")
    assert run(*shlex.split(shown.splitlines()[-1])[3:])[0] == 0


def test_propose_names_a_form_that_is_written(tmp_path: Path) -> None:
    asked = [{"question": "?", "answers": [{"text": "a", "answer_start": 0}]}] * 2
    data = {"data": [{"paragraphs": [{"context": "a b", "qas": asked}]}]}
    source = write(tmp_path, "squad.json", json.dumps(data).encode())
    _, shown = run("clean", source, "--propose", "--to", tmp_path / "recipe.toml")
    assert run(*shlex.split(shown.splitlines()[-1])[3:])[0] == 0
    assert (tmp_path / "clean-squad.jsonl").exists()


def test_every_remedy_names_steps_that_exist() -> None:
    import re

    names = {kind.label for kind in StepKind}
    for code in Code:
        for named in re.findall(r"[Tt]he step ([a-z-]+)", code.remedy):
            assert named in names, code
    assert {code.severity for code in Code} == set(Severity)
