"""`confide client policy | scope | budget | export` on a site of its own and on simulated ones."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from client.identity import (
    KeyFormatError,
    NotPinnedError,
    PassphraseError,
    SiteFolder,
    load_identity,
    own_card,
)
from client.ledger import Ledger
from client.policy import STRICT
from common.config import load_config
from common.errors import BudgetError, ConfigError
from common.ledger import Charge, Policy
from common.ledger_checks import Claim, verify_export
from common.ledger_errors import RolledBackError, ScopeTermsError
from common.privacy import SampledGaussianEvent
from common.roster import load_roster
from server.record import RunFolder
from simulations.fleet import open_fleet
from simulations.run import create_folder, prepare
from tests.e2e.command import ROOT, invoke

PHRASE = "five quite random short words\n"


def ask(*arguments: str | Path) -> Any:
    return json.loads(invoke(*arguments, "--json"))


def contents(*folders: Path) -> dict[Path, tuple[int, bytes]]:
    return {
        p: (p.stat().st_mtime_ns, p.read_bytes())
        for f in folders
        for p in sorted(f.rglob("*"))
        if p.is_file()
    }


# A site of its own


@pytest.fixture
def north(tmp_path: Path) -> Path:
    """Enrolled, and its roster pinned; nothing is allowed or opened yet."""
    federation = tmp_path / "federation"
    invoke("server", "init", federation, "--name", "Heart study")
    invoke("client", "init", tmp_path / "north")
    invoke("server", "enroll", tmp_path / "north" / "site.pub", "--federation", federation)
    authority = ask("server", "roster", federation)["authority"]
    invoke("client", "pin", tmp_path / "north", federation / "roster.json", "--authority", authority)
    return tmp_path / "north"


def test_a_new_site_allows_nothing(north: Path) -> None:
    shown = ask("client", "policy", north, "--explain")
    assert (shown["from"], shown["entry"]) == ("file", None)
    assert shown["policy"] == STRICT.model_dump(mode="json")
    assert {one["key"] for one in shown["explained"]} >= {
        "training.noise_multiplier",
        "aggregation.min_cohort",
    }
    assert invoke("client", "policy", north) == (north / "policy.toml").read_text("utf-8") == STRICT.to_toml()
    text = invoke("client", "policy", north, "--explain")
    assert "run.rounds = 100  (default 100)" in text and "Stops: " in text
    with pytest.raises(ConfigError, match="is there already"):
        invoke("client", "policy", north, "--write")
    (north / "policy.toml").unlink()
    assert ask("client", "policy", north)["from"] == "default"
    invoke("client", "policy", north, "--write")
    assert (north / "policy.toml").read_text("utf-8") == STRICT.to_toml()


def test_a_budget_is_opened_once_and_a_policy_put_in_force(north: Path, tmp_path: Path) -> None:
    terms = ("--epsilon", "3", "--delta", "1e-5", "--planned", "0.1,2.0,60")
    opened = ask("client", "scope", north, "letters", *terms)
    assert opened["target_epsilon"] == 3.0 and opened["order"] > 1
    assert ask("client", "scope", north, "letters", *terms) == opened
    with pytest.raises(ScopeTermsError):
        invoke("client", "scope", north, "letters", "--epsilon", "4", "--delta", "1e-5")
    both = ask(
        "client", "scope", north, "notes", "--epsilon", "3", "--delta", "1e-5", "--inherits", "letters"
    )
    assert both["inherits"] == ["letters"]
    # What the command says to add is what a policy takes.
    new = tmp_path / "new.toml"
    new.write_text(f"{opened['policy_toml']}\n{both['policy_toml']}\n[training]\nsteps = 7\n", "utf-8")
    said = invoke("client", "policy", north, "--set", new)
    assert "entry 4 of the ledger" in said and "training.steps: 50 → 7" in said
    assert (north / "policy.toml").read_bytes() == new.read_bytes()
    shown = ask("client", "policy", north)
    assert (shown["from"], shown["entry"], shown["policy"]["training"]["steps"]) == ("file", 4, 7)
    assert set(shown["policy"]["sources"]) == {"letters", "notes"}
    # The same text again is no entry; an edit that was not put in force is seen; a mistake changes nothing.
    invoke("client", "policy", north, "--set", north / "policy.toml")
    assert ask("client", "budget", north)["entries"] == 4
    edited = new.read_text("utf-8").replace("steps = 7", "steps = 8")
    (north / "policy.toml").write_text(edited, "utf-8")
    assert ask("client", "policy", north)["entry"] is None
    said = invoke("client", "policy", north, "--set", north / "policy.toml")
    assert "entry 5 of the ledger" in said and "training.steps: 7 → 8" in said
    (north / "policy.toml").write_text("[trainin]\n")
    with pytest.raises(ConfigError, match=r"did you mean training"):
        invoke("client", "policy", north)
    invoke("client", "policy", north, "--set", new)  # a broken file is replaced
    before = contents(north, north.with_name("north.witness"))
    new.write_text("[training]\nstep = 9\n")
    with pytest.raises(ConfigError, match=r"did you mean training.steps\?"):
        invoke("client", "policy", north, "--set", new)
    new.write_text("[study]\nplain_updates = true\n")
    with pytest.raises(ConfigError, match=r"study.plain_updates must be false"):
        invoke("client", "policy", north, "--set", new)
    assert contents(north, north.with_name("north.witness")) == before


def test_the_budget_in_numbers_in_words_and_as_a_page(north: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no ledger at"):
        invoke("client", "budget", north)
    invoke("client", "scope", north, "letters", "--epsilon", "2", "--delta", "1e-5", "--planned", "0.2,2,20")
    event = SampledGaussianEvent(0.2, 2.0, 1, 0.5, 10)
    place = SiteFolder(north)

    def spend(*rounds: int) -> None:
        with Ledger(place.ledger, load_identity(place.identity, None), 1, witness=place.witness) as ledger:
            for number in rounds:
                found = Charge("letters", "study-1", number, "00", "model", "plan", (event,))
                ledger.start(ledger.reserve(found).id)

    spend(1, 2, 3)
    before = contents(north, place.witness.parent)
    found = ask("client", "budget", north, "--html", tmp_path / "budget.html")
    (one,) = found["sources"]
    assert (found["site"], found["entries"], found["witness"]) == (1, 8, "intact")
    assert (one["name"], one["runs"][0]["run"], one["runs"][0]["rounds"]) == ("letters", "study-1", 3)
    assert one["epsilon_spent"] + one["epsilon_reserved"] + one["epsilon_left"] == pytest.approx(2.0)
    assert one["last"]["round"] == 3 and one["last"]["events"] == [event.to_json()]
    text = invoke("client", "budget", north, "--scope", "letters")
    assert f" {one['rounds_left']}" in text and "study-1" in text and "█ spent" in text
    page = (tmp_path / "budget.html").read_text("utf-8")
    assert f"{one['rounds_left']} more rounds" in page and "<svg" in page and "<script" not in page
    with pytest.raises(ConfigError, match=r"--scope must be one of \['letters'\], found 'notes'"):
        invoke("client", "budget", north, "--scope", "notes")
    invoke("client", "export", north, tmp_path / "out.jsonl")
    assert contents(north, place.witness.parent) == before  # those that look change nothing
    # As many as it said, and not one more.
    spend(*range(4, 4 + one["rounds_left"]))
    assert ask("client", "budget", north)["sources"][0]["rounds_left"] == 0
    with pytest.raises(BudgetError):
        spend(99)
    assert "Not one more round" in _page(north, tmp_path)


def _page(north: Path, tmp_path: Path) -> str:
    invoke("client", "budget", north, "--html", tmp_path / "again.html")
    return (tmp_path / "again.html").read_text("utf-8")


def test_an_export_is_what_the_ledger_itself_would_hand_out(north: Path, tmp_path: Path) -> None:
    invoke("client", "scope", north, "letters", "--epsilon", "2", "--delta", "1e-5", "--note", "until 2023")
    invoke("client", "policy", north, "--set", north / "policy.toml")
    place, out = SiteFolder(north), tmp_path / "out.jsonl"
    exported = ask("client", "export", north, out)
    with Ledger(place.ledger, load_identity(place.identity, None), 1, witness=place.witness) as ledger:
        assert out.read_bytes() == ledger.export()
        entries = ledger.entries()
    assert exported["entries"] == len(entries) == 3
    report = verify_export(out.read_bytes(), public=own_card(place).public, pld=False)
    assert (report.site, report.head.seq) == (1, 3)
    assert "until 2023" in out.read_text()
    # Over an older export; over nothing else. Without a witness the identity signs the same head.
    first = out.read_bytes()
    invoke("client", "export", north, out, "--witness", tmp_path / "none")
    assert out.read_bytes() == first
    for path in (place.ledger, place.identity, place.policy):
        kept = path.read_bytes()
        with pytest.raises(ConfigError, match="is no export"):
            invoke("client", "export", north, path)
        assert path.read_bytes() == kept


def test_a_restored_ledger_is_refused_by_all_commands(north: Path, tmp_path: Path) -> None:
    invoke("client", "scope", north, "letters", "--epsilon", "2", "--delta", "1e-5")
    backup = shutil.copy(north / "ledger.sqlite", tmp_path / "backup")
    invoke("client", "scope", north, "notes", "--epsilon", "2", "--delta", "1e-5")
    shutil.copy(backup, north / "ledger.sqlite")
    for command in (
        ("budget", north),
        ("export", north, tmp_path / "out"),
        ("policy", north),
        ("policy", north, "--set", north / "policy.toml"),
        ("scope", north, "more", "--epsilon", "2", "--delta", "1e-5"),
    ):
        with pytest.raises(RolledBackError) as caught:
            invoke("client", *command)
        assert caught.value.exit_code == 5
    assert not (tmp_path / "out").exists()


def test_an_identity_under_a_passphrase_signs_only_with_it(tmp_path: Path) -> None:
    phrase = tmp_path / "phrase"
    phrase.write_text(PHRASE)
    federation, east = tmp_path / "federation", tmp_path / "east"
    invoke("server", "init", federation, "--name", "Heart study")
    invoke("client", "init", east, "--passphrase-file", phrase)
    opening = ("client", "scope", east, "letters", "--epsilon", "2", "--delta", "1e-5")
    with pytest.raises(NotPinnedError):
        invoke(*opening, "--passphrase-file", phrase)
    invoke("server", "enroll", east / "site.pub", "--federation", federation)
    authority = ask("server", "roster", federation)["authority"]
    invoke("client", "pin", east, federation / "roster.json", "--authority", authority)
    with pytest.raises(PassphraseError):
        invoke(*opening)
    invoke(*opening, "--passphrase-file", phrase)
    # Looking and exporting need no secret.
    assert ask("client", "budget", east)["sources"][0]["name"] == "letters"
    invoke("client", "export", east, tmp_path / "out")
    with pytest.raises((PassphraseError, KeyFormatError)):
        invoke("client", "export", east, tmp_path / "out", "--witness", tmp_path / "none")


@pytest.mark.parametrize("planned", ["0.1", "0.1,1", "0.1,1,2,3", "0.1,one,2", "0.1,1,2.5"])
def test_a_plan_that_is_none(north: Path, planned: str) -> None:
    with pytest.raises(ConfigError, match="--planned expects"):
        invoke("client", "scope", north, "a", "--epsilon", "2", "--delta", "1e-5", "--planned", planned)
    assert not (north / "ledger.sqlite").exists()


# Simulated sites


@dataclass(frozen=True)
class Simulated:
    folder: RunFolder
    summary: dict[str, Any]
    strict: str  # the second site's policy.toml

    def site(self, number: int) -> Path:
        return self.folder.site(number)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory, bert_folder: Path, data_file: Path) -> Simulated:
    """Four sites. The people of the second have put a policy.toml there: a step less than the run wants."""
    path = tmp_path_factory.mktemp("policy") / "confide.toml"
    path.write_text(
        f"""
[run]
name = "tiny"
rounds = 2
threads = 1
[model]
name = "{bert_folder}"
head = "mean"
max_length = 32
[adapter]
rank = 2
[data]
train = "{data_file}"
[sites]
count = 4
[privacy]
sample_rate = 0.3
delta = 1e-3
noise_multiplier = 2.0
[warmup]
rounds = 1
local_steps = 3
target_epsilon = 4.0
noise_multiplier = 4.0
[training]
local_steps = 2
"""
    )
    resolved, _ = prepare(load_config(path))
    folder = create_folder(path.parent / "runs", resolved)
    allowed = open_fleet(folder.path).site(2).policy  # its first: exactly the run
    strict = allowed.to_toml().replace("\nsteps = 2\n", "\nsteps = 1\n")
    (folder.site(2) / "policy.toml").write_text(strict, "utf-8")
    return Simulated(folder, ask("simulate", "--resume", folder.path), strict)


def test_a_simulated_site_allows_exactly_its_run(simulated: Simulated) -> None:
    shown = ask("client", "policy", simulated.site(1))
    assert (shown["from"], shown["entry"]) == ("ledger", 3)
    policy = shown["policy"]
    assert policy["run"] == {"tasks": ["sequence-classification"], "rounds": 3, "max_grad_norm": 0.5}
    assert policy["training"] == {"noise_multiplier": 2.0, "sample_rate": 0.3, "steps": 2}
    assert policy["warmup"] == {"noise_multiplier": 4.0, "sample_rate": 1.0, "steps": 3}
    assert policy["aggregation"] == {"min_cohort": 3, "c_max": 0}
    assert not policy["metrics"]["allowed"] and not any(policy["study"].values())
    assert len(policy["models"]["allowed"]) == 1
    source = policy["sources"]["records"]
    assert (source["target_epsilon"], source["delta"]) == (8.0, 1e-3)


def test_budget_and_export_of_a_simulated_site(simulated: Simulated, tmp_path: Path) -> None:
    before = contents(simulated.folder.path)
    for number in (1, 2):
        found = ask("client", "budget", simulated.site(number))
        assert (found["site"], found["witness"]) == (number, "intact")
        (one,) = found["sources"]
        assert one["epsilon_rdp"] == simulated.summary["epsilon_by_site"][str(number)]
        assert one["rounds_left"] > 0
        invoke("client", "export", simulated.site(number), tmp_path / "out")
        public = load_roster(simulated.folder.roster, None).keys[number]
        run = one["runs"][0]["run"]
        claims = [Claim(run, simulated.summary["epsilon_rdp_max"], simulated.summary["delta"])]
        report = verify_export((tmp_path / "out").read_bytes(), public=public, claims=claims, pld=False)
        assert report.runs[run] == one["runs"][0]["epsilon"]
    assert contents(simulated.folder.path) == before


def test_a_policy_in_a_site_s_folder_holds_and_the_others_go_on(simulated: Simulated) -> None:
    site, summary = simulated.site(2), simulated.summary
    assert summary["refusals"] == 2 and summary["rounds_without_sum"] == 0
    statuses = [(r.round, r.status, bool(r.events)) for r in simulated.folder.site_rounds() if r.site == 2]
    assert statuses == [(1, "ok", True), (2, "refused-policy", False), (3, "refused-policy", False)]
    log = (site / "site.log").read_text("utf-8")
    assert log.count("training.steps allows at most 1, found 2") == 2
    (own,) = ask("client", "budget", site)["sources"]
    (other,) = ask("client", "budget", simulated.site(1))["sources"]
    assert own["runs"][0]["rounds"] == 1 and other["runs"][0]["rounds"] == 3
    assert own["epsilon_spent"] < other["epsilon_spent"]
    # The report counts the refusals, and does not suspect the site of having been charged for them.
    report = simulated.folder.report.read_text("utf-8")
    assert "2 × refused-policy" in report and "may have spent more" not in report


def test_each_policy_of_a_site_is_a_signed_entry(simulated: Simulated, tmp_path: Path) -> None:
    copied = shutil.copytree(simulated.folder.path, tmp_path / "run")
    site, wider = copied / "sites" / "0002", tmp_path / "wider.toml"
    assert ask("client", "policy", site)["entry"] == 4
    wider.write_text(simulated.strict.replace("\nsteps = 1\n", "\nsteps = 2\n"), "utf-8")
    assert "training.steps: 1 → 2" in invoke("client", "policy", site, "--set", wider)
    invoke("client", "export", site, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    texts = [line["body"]["text"] for line in lines if line.get("body", {}).get("kind") == "policy"]
    assert texts == [wider.read_text("utf-8"), simulated.strict, wider.read_text("utf-8")]
    assert Policy.of(texts[2]).sha256 == lines[-2]["body"]["sha256"]


# As people start them


def test_looking_at_a_policy_or_a_budget_loads_no_model_library(north: Path, tmp_path: Path) -> None:
    """And an error is one screen with its exit code, as from a terminal."""
    invoke("client", "scope", north, "a", "--epsilon", "2", "--delta", "1e-5")
    commands = [["policy", str(north), "--explain"], ["budget", str(north)], ["budget", str(tmp_path)]]
    script = (
        "import sys, confide\n"
        f"for words in {commands!r}:\n"
        "    sys.argv = ['confide', 'client', *words]\n"
        "    try:\n        confide.main()\n"
        "    except SystemExit as done:\n        print('exit', done.code or 0)\n"
        "print([name for name in ('torch', 'flwr', 'transformers') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("exit")] == ["exit 0", "exit 0", "exit 2"], done.stderr
    assert lines[-1] == "[]" and "confide client init" in done.stderr and "Traceback" not in done.stderr
