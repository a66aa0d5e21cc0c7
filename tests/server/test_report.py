"""The report says what the run's folder says, and says in red what takes a claim away."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from common.config import parse_config
from common.errors import CheckpointError
from common.plan import make_plan
from common.privacy import epsilon_rdp, epsilon_text
from server.charges import FREE
from server.record import ASKED, RoundEvent, RunFolder, SiteRound
from server.report import write_report

SCRIPT = "<script>alert('x')</script>"
CLEAR = "Updates travelled in the clear (--insecure-plain-updates): the server saw each site's update"
NOT_PRIVATE = "NOT PRIVATE"


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves the half second of drawing where a test reads words."""
    monkeypatch.setattr("common.report_plots._svg", lambda title, draw: "<svg></svg>")


def make_run(
    path: Path,
    *,
    sites: int = 3,
    status: Callable[[int, int], str] = lambda site, round: "ok",
    measured: bool = True,
    summary: dict[str, Any] | None = None,
    **sections: dict[str, Any],
) -> RunFolder:
    """A finished run that nobody trained: two rounds of warm-up and three of tuning, as a server records it.

    `status(site, round)` is what became of a request; `summary` replaces keys of the summary.
    """
    keys: dict[str, dict[str, Any]] = {
        "run": {"name": "made-up", "rounds": 3},
        "model": {"name": "sample:all-minilm-l6-v2", "head": "mean"},
        "data": {"sample": "rotten-tomatoes"},
        "sites": {"count": sites},
        "warmup": {"rounds": 2, "noise_multiplier": 20.0, "target_epsilon": 1.0},
        "study": {"plain_updates": True},
        "privacy": {"target_epsilon": 4.0, "delta": 1e-5, "nominal_records": 1000, "noise_multiplier": 1.1},
    }
    for section, extra in sections.items():
        keys[section] = {**keys.get(section, {}), **extra}
    config = parse_config(keys, source="a test")
    plan = make_plan(config)
    path.mkdir(parents=True)
    folder = RunFolder(path)
    folder.config.write_text(config.to_toml(), "utf-8")
    events: list[SiteRound | RoundEvent] = [RoundEvent(0, "start", 0, 0, 0, True, 0.5, 0.69, 900, 0.0, None)]
    for number, planned in enumerate(plan.rounds, start=1):
        got = {site: status(site, number) for site in range(1, sites + 1)}
        answered = sum(s == "ok" for s in got.values())
        for site, what in got.items():
            charged = [e.to_json() for e in planned.events] if what == "ok" else []
            events.append(SiteRound(number, site, what, 3000 * (what == "ok"), 52_000, charged))
        accuracy, loss = (0.5 + number / 20, 0.69 - number / 50) if measured else (None, None)
        counted = answered >= 2
        events.append(
            RoundEvent(
                number,
                planned.part.value,
                sites,
                sites,
                answered,
                counted,
                accuracy,
                loss,
                400,
                1.5 * number,
                None,
            )
        )
    lines = [
        json.dumps({"kind": "site" if isinstance(e, SiteRound) else "round", **vars(e)}) + "\n"
        for e in events
    ]
    folder.events.write_text("".join(lines), "utf-8")
    written: dict[str, Any] = {
        "name": config.run.name,
        "task": "sequence-classification",
        "records_evaluated": 900,
        "accuracy_initial": 0.5012,
        "accuracy_final": 0.7534,
        "loss_initial": 0.6931,
        "loss_final": 0.5913,
        "majority_class": 0.5123,
        "accuracy_by_group": {str(site): 0.6 + site / (10 * sites) for site in range(1, sites + 1)},
        "worst_site": "1",
        "accuracy_worst_site": 0.6789,
        "epsilon_rdp_max": epsilon_rdp(plan.events, plan.delta) if plan.private else None,
        "epsilon_pld_max": 1.2341 if plan.private else None,
        "target_epsilon": plan.target_epsilon,
        "delta": plan.delta,
        "privacy_statement": "a statement of what is claimed",
        "private": plan.private and config.study.noise_seed is None,
        "secure_aggregation": False,
        "trainable_parameters": 13_058,
        "bytes_up_per_site_round": 52_388,
        "engine": "inline",
        "wall_seconds": 279.2,
    }
    folder.summary.write_text(json.dumps({**written, **(summary or {})}), "utf-8")
    return folder


def page(folder: RunFolder) -> str:
    write_report(folder)
    return folder.report.read_text("utf-8")


class Reader(HTMLParser):
    """Tags with attributes, rows of tables, and code of a page; checks that tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.code: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "meta":  # the only one that is never closed
            return
        self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "pre":
            self.code.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.text += data
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data
        if "pre" in self._open:
            self.code[-1] += data


def alarms(text: str) -> list[str]:
    found = re.findall(r'<div class="alarm"[^>]*><p>(.*?)</p></div>', text, re.DOTALL)
    return [unescape(re.sub(r"<[^>]*>", "", block)) for block in found]


def site_rows(text: str) -> list[list[str]]:
    rows = Reader(text).rows
    start = next(i for i, row in enumerate(rows) if row[0] == "site")
    end = next(i for i, row in enumerate(rows) if row[0] == "round")
    return rows[start + 1 : end]


@pytest.mark.usefixtures("undrawn")
def test_numbers_are_those_of_the_summary(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    summary = json.loads(folder.summary.read_text())
    text = Reader(page(folder)).text
    assert "Accuracy on 900 public records: 0.501 → 0.753." in text
    assert "Always saying the commonest label reaches 0.512." in text
    assert "Worst site: 0.679 (site 1, on records that it held out)." in text
    for shown in ("52,388", "13,058 parameters", "279", "a statement of what is claimed", "δ = 1e-05"):
        assert shown in text
    for key in ("epsilon_rdp_max", "epsilon_pld_max"):
        assert epsilon_text(summary[key]) in text


@pytest.mark.usefixtures("undrawn")
def test_epsilon_of_every_site_is_recomputed_from_its_events(tmp_path: Path) -> None:
    missing = {(2, 3), (3, 1), (3, 5)}
    folder = make_run(
        tmp_path / "run", status=lambda site, round: "deadline" if (site, round) in missing else "ok"
    )
    plan = make_plan(folder.load_config())
    rows = site_rows(page(folder))
    assert [row[0] for row in rows] == ["1", "2", "3"]
    for row in rows:
        site = int(row[0])
        events = [r.event for n, r in enumerate(plan.rounds, 1) if (site, n) not in missing and r.event]
        assert row[4] == epsilon_text(epsilon_rdp(events, plan.delta))


@pytest.mark.usefixtures("undrawn")
def test_a_late_site_may_have_spent_what_the_server_did_not_see(tmp_path: Path) -> None:
    """A site charges itself before it computes: only a refusal that comes before that costs nothing."""
    codes = {1: "deadline", 2: "refused-budget", 3: "ok"}
    folder = make_run(tmp_path / "run", status=lambda site, round: codes[site] if round == 4 else "ok")
    plan = make_plan(folder.load_config())
    everything = epsilon_text(epsilon_rdp(plan.events, plan.delta))
    less = epsilon_text(epsilon_rdp([e for n, e in enumerate(plan.events, 1) if n != 4], plan.delta))
    text = page(folder)
    assert [row[3:6] for row in site_rows(text)] == [
        ["1 × deadline", less, everything],
        ["1 × refused-budget", less, less],
        ["none", everything, everything],
    ]
    assert "1 site may have spent more than the events show" in Reader(text).text


@pytest.mark.usefixtures("undrawn")
def test_what_the_claim_takes_for_free_the_report_does(tmp_path: Path) -> None:
    for number, code in enumerate(sorted(FREE)):
        place = tmp_path / str(number)
        folder = make_run(place, status=lambda site, round, code=code: code if round == 4 else "ok")
        assert "may have spent more than" not in Reader(page(folder)).text, code


@pytest.mark.usefixtures("undrawn")
def test_rounds_are_listed_with_what_they_cost(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", status=lambda site, round: "deadline" if round == 4 else "ok")
    plan = make_plan(folder.load_config())
    rows = Reader(page(folder)).rows
    table = rows[next(i for i, row in enumerate(rows) if row[0] == "round") + 1 :]
    assert [[*row[:3], *row[4:6]] for row in table] == [
        ["0", "start", "–", "–", "–"],
        ["1", "head", "3", "3", "yes"],
        ["2", "head", "3", "3", "yes"],
        ["3", "all", "3", "3", "yes"],
        ["4", "all", "3", "0", "no"],
        ["5", "all", "3", "3", "yes"],
    ]
    assert table[2][9] == epsilon_text(epsilon_rdp(plan.events[:2], plan.delta))
    assert table[4][9] == table[3][9] == epsilon_text(epsilon_rdp(plan.events[:3], plan.delta))


def test_values_are_escaped(tmp_path: Path) -> None:
    folder = make_run(
        tmp_path / "run",
        status=lambda site, round: SCRIPT if site == 2 else "ok",
        summary={
            "privacy_statement": SCRIPT,
            "engine": SCRIPT,
            "worst_site": SCRIPT,
            "task": SCRIPT,
            "accuracy_final": SCRIPT,
            "loss_final": SCRIPT,
            "majority_class": SCRIPT,
            "wall_seconds": SCRIPT,
        },
        task={"labels": [SCRIPT, "rotten"]},
        model={"name": f'{SCRIPT}" onload="alert(1)'},
    )
    text = page(folder)
    assert "<script" not in text
    reader = Reader(text)
    assert not any(name.startswith("on") for _, attributes in reader.tags for name in attributes)
    assert SCRIPT in reader.text


@pytest.mark.usefixtures("undrawn")
def test_a_clear_run_says_so_in_red(tmp_path: Path) -> None:
    clear = alarms(page(make_run(tmp_path / "clear")))
    assert len(clear) == 1 and clear[0].startswith(CLEAR)
    assert "holds against the server too" in clear[0]
    secure = page(make_run(tmp_path / "secure", summary={"secure_aggregation": True}))
    assert alarms(secure) == [] and "in the clear" not in Reader(secure).text


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("said", [None, "yes"])
def test_only_a_plain_true_takes_the_banner_away(tmp_path: Path, said: object) -> None:
    folder = make_run(tmp_path / "run", summary={"secure_aggregation": said})
    assert alarms(page(folder))[0].startswith(CLEAR)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("sections", "summary", "words"),
    [
        ({"privacy": {"insecure_disabled": True}}, {}, "without clipping"),
        ({"study": {"noise_seed": 7}}, {}, "study.noise_seed = 7"),
        ({"study": {"noise_seed": 7}}, {"private": True}, "study.noise_seed = 7"),
        ({}, {"private": False, "privacy_statement": "no claim <here>"}, "no claim <here>"),
        ({}, {"private": None}, "a statement"),
    ],
)
def test_a_run_without_privacy_claims_nothing(
    tmp_path: Path, sections: dict[str, dict[str, Any]], summary: dict[str, Any], words: str
) -> None:
    folder = make_run(tmp_path / "run", summary=summary, **sections)
    text = page(folder)
    red = alarms(text)
    assert red[0].startswith(NOT_PRIVATE) and words in red[0]
    assert any(line.startswith(CLEAR) for line in red)
    read = Reader(text).text
    assert "Nothing is claimed of this run." in read
    assert "What this does not cover" not in read and "holds against the server too" not in read
    if folder.load_config().privacy.insecure_disabled:
        assert {(row[4], row[5]) for row in site_rows(text)} == {("–", "–")}


@pytest.mark.usefixtures("undrawn")
def test_a_private_run_says_what_it_claims_and_what_not(tmp_path: Path) -> None:
    read = Reader(page(make_run(tmp_path / "run"))).text
    assert NOT_PRIVATE not in read
    for words in ("add or remove one", "the default, min(1e-5, 1/(10 × 1,000))", "A person who has several"):
        assert words in read
    other = make_run(tmp_path / "other", privacy={"delta": 3e-6})
    assert "3e-06: set in the configuration" in Reader(page(other)).text


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("summary", "words"),
    [
        ({"epsilon_rdp_max": 0.5}, "summary.json says 0.500"),
        ({"epsilon_rdp_max": None}, "summary.json has no ε"),
        ({"epsilon_rdp_max": 9.0}, "of a budget of 4"),
    ],
)
def test_a_summary_that_the_events_contradict_is_red(
    tmp_path: Path, summary: dict[str, Any], words: str
) -> None:
    text = page(make_run(tmp_path / "run", summary=summary))
    assert any(line.startswith("ε does not add up") and words in line for line in alarms(text))
    assert "see the warning above" in Reader(text).text


def test_nothing_is_loaded_from_outside(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", model={"name": "https://example.org/model"})
    text = page(folder)
    loading = {"src", "href", "xlink:href", "srcset", "data", "action", "poster", "background", "ping"}
    reader = Reader(text)
    for tag, attributes in reader.tags:
        assert tag not in {"script", "link", "img", "iframe", "object", "embed", "base", "image", "form"}
        assert all((attributes[name] or "").startswith("#") for name in loading & set(attributes))
    assert "@import" not in text and all(url.startswith("#") for url in re.findall(r"url\(([^)]*)\)", text))
    assert "http" not in text.replace("https://example.org/model", "").replace("http-equiv", "")


def test_the_same_folder_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    assert page(folder) == page(folder)
    ids = re.findall(r' id="([^"]+)"', folder.report.read_text())
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_missing_values_are_dashes(tmp_path: Path, missing: float | None) -> None:
    keys = ("accuracy", "loss")
    summary: dict[str, Any] = {f"{key}_{when}": missing for key in keys for when in ("initial", "final")}
    summary |= dict.fromkeys(("majority_class", "accuracy_by_group", "worst_site", "accuracy_worst_site"))
    folder = make_run(tmp_path / "run", measured=False, summary=summary)
    rows = site_rows(page(folder))
    assert [row[-1] for row in rows] == ["–", "–", "–"]
    bare = {"private": True, "epsilon_rdp_max": json.loads(folder.summary.read_text())["epsilon_rdp_max"]}
    folder.summary.write_text(json.dumps(bare))
    assert "Worst site:" not in Reader(page(folder)).text


def test_many_sites_show_the_worst(tmp_path: Path) -> None:
    """Sites 10, 20, … are late in one round of five; the others always answer. 200 has the best accuracy."""
    folder = make_run(
        tmp_path / "run",
        sites=200,
        status=lambda site, round: "deadline" if site % 10 == 0 and round == site // 10 % 5 + 1 else "ok",
    )
    text = page(folder)
    rows = site_rows(text)
    assert len(rows) == 20
    numbers = [int(row[0]) for row in rows]
    assert numbers == sorted(numbers) and {1, 2, 3, 10, 20} <= set(numbers)
    read = Reader(text).text
    assert "The 20 worst of 200 sites" in read and "Failures of all sites: 20 × deadline." in read
    assert len(text) < 200_000


@pytest.mark.usefixtures("undrawn")
def test_the_code_in_the_footer_computes_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path / "run", status=lambda site, round: "ok" if round <= site + 2 else "deadline")
    first = next(entry for entry in folder.site_rounds() if entry.events)
    folder.append(first)  # a round that was cut off by a crash is run and told again
    last = max(entry.round for entry in folder.site_rounds())
    folder.append(SiteRound(last, 3, ASKED, 0, 0, first.events))  # and who is asked may refuse
    folder.append(SiteRound(last, 3, "refused-policy", 0, 0, []))
    text = page(folder)
    monkeypatch.chdir(folder.path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(Reader(text).code[-1], "footer", "exec"), {})
    recomputed = dict(line.split() for line in printed.getvalue().splitlines())
    rows = site_rows(text)
    assert len(rows) == len(recomputed) == 3
    for row in rows:
        assert float(recomputed[row[0]]) == pytest.approx(float(row[4]), abs=0.01)


def test_an_unfinished_run_has_no_report(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    folder.summary.unlink()
    with pytest.raises(CheckpointError, match="no finished run"):
        write_report(folder)
    assert not folder.report.exists()
