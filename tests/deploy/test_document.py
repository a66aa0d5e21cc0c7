"""docs/deployment.md is true: its commands, in its order, found a federation, run a job and look after it.

Code blocks of the document say where they are typed: `sh operator`, `sh site` (at each site, with its name in
place of north), `sh north`; `toml operator:FILE` and `toml site:FILE` are files. What the document has people
send, `post` carries between the machines' folders.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from typer.testing import CliRunner

import confide
from client.executor import only_one
from client.identity import SiteFolder
from common.config import parse_config
from common.errors import CheckpointError, StatusCode
from server import cohort
from server.jobs import prepare_job

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "deployment.md").read_text("utf-8")
SITES = ("north", "west", "south")
# What makes the document's job small: a tiny model, few records, two rounds.
TINY: dict[str, dict[str, Any]] = {
    "run": {"rounds": 2, "threads": 1, "device": "cpu"},
    "model": {"max_length": 32},
    "adapter": {"rank": 2},
    "privacy": {"sample_rate": 0.2, "nominal_records": 40, "delta": 1e-3},
    "training": {"local_steps": 2},
    "server": {"deadline_seconds": 300.0},
}


@dataclass(frozen=True)
class Block:
    section: str
    language: str
    where: str  # operator, site, north; with " background": it goes on
    text: str

    def lines(self) -> list[str]:
        return self.text.replace("\\\n", " ").splitlines()


def blocks() -> Iterator[Block]:
    section = ""
    for match in re.finditer(r"^(#+ .*)$|^```(\w*) ?(.*)\n((?:.*\n)*?)```$", DOCUMENT, flags=re.MULTILINE):
        if match[1]:
            section = match[1].strip("# ")
        else:
            yield Block(section, match[2], match[3], match[4])


@dataclass
class People:
    """Everybody of the document, each in a folder of their own on this machine."""

    folder: Path
    model: Path
    records: Path
    deployed: bool
    port: int = 9092
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)

    def at(self, who: str) -> Path:
        place = self.folder / who
        place.mkdir(exist_ok=True)
        return place

    def post(self) -> None:
        """Cards to the operator, kits, roster and the newest bundle to the sites."""
        operator = self.at("operator")
        for name in (*SITES, "east"):
            card = self.at(name) / name / "site.pub"
            if card.is_file():
                shutil.copyfile(card, operator / f"{name}.pub")
            for kit in operator.glob(f"{name}*.kit.tar"):
                shutil.copyfile(kit, self.at(name) / kit.name)
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(operator / "federation" / "roster.json", self.at(name) / "roster.json")
        bundles = sorted(operator.glob("federation/jobs/*/job.fab"), key=lambda path: path.stat().st_mtime_ns)
        for bundle, called in zip(bundles, ("job.fab", "job2.fab"), strict=False):
            for name in (*SITES, "east"):
                shutil.copyfile(bundle, self.at(name) / called)

    def run(self, block: Block) -> None:
        self.post()
        where, _, background = block.where.partition(" ")
        if block.language == "toml":
            where, _, file = where.partition(":")
            for name in SITES if where == "site" else (where,):
                self.write(name, file.replace("north", name), block.text)
            return
        for name in SITES if where == "site" else (where,):
            for line in block.lines():
                self.type(name, line.replace("north", name) if where == "site" else line, bool(background))

    def write(self, who: str, file: str, text: str) -> None:
        fields = tomllib.loads(text)
        if who == "operator":
            for section, keys in TINY.items():
                fields[section] = {**fields.get(section, {}), **keys}
            fields["model"]["name"] = str(self.model)
            fields["data"]["test"] = str(self.records)
        else:
            fields["data"]["train"] = str(self.records)
            fields["machine"] = {"device": "cpu", "threads": 1, "poll_seconds": 0.3}
        (self.at(who) / file).write_text(tomli_w.dumps(fields))

    def type(self, who: str, line: str, background: bool) -> None:
        if "FINGERPRINT" in line:
            shown = self.confide("operator", ["server", "roster", "federation", "--json"])
            line = line.replace("FINGERPRINT", json.loads(shown)["authority_fingerprint"])
        name, *arguments = shlex.split(line, comments=True)
        assert name == "confide", line
        if arguments[:2] == ["server", "init"]:
            arguments[arguments.index("--host") + 1] = "127.0.0.1"
            arguments += ["--port", str(self.port)]
        self.ran.append(" ".join(arguments[:2]))
        if not background:
            self.confide(who, arguments)
        elif self.deployed:
            self.start(who, arguments)

    def confide(self, who: str, arguments: list[str]) -> str:
        """In this process, as if typed in `who`'s folder; a question is answered with yes."""
        with contextlib.chdir(self.at(who)):
            result = CliRunner().invoke(confide.app, arguments, input="y\n")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        allowed = (0, 1) if arguments[:2] == ["server", "status"] else (0,)  # 1: it does not run
        assert result.exit_code in allowed, (arguments, result.output)
        return str(result.stdout)

    def start(self, who: str, arguments: list[str]) -> None:
        if who != "operator":
            first = self.port + 10 + 2 * SITES.index(who)
            arguments = [*arguments, "--port", str(first), "--health-port", str(first + 1)]
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "confide", *arguments],
            cwd=self.at(who),
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=(self.at(who) / "out").open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.running.append(process)

    def stop(self) -> None:
        for process in self.running:
            process.terminate()
        for process in self.running:
            process.wait(60)
        self.running.clear()

    def status(self) -> dict[str, Any]:
        shown = self.confide("operator", ["server", "status", "federation", "--json"])
        found: dict[str, Any] = json.loads(shown)
        return found

    def do(self, *, until: str = "", after: str = "") -> None:
        """Every block of the sections behind `after` and before `until`."""
        begun = not after
        for block in blocks():
            if block.section == until:
                return
            if begun and block.where:
                if "east.pub" in block.text:
                    self.come("east", before=True)
                self.run(block)
                if "east.pub" in block.text:
                    self.come("east", before=False)
            begun = begun or block.section == after

    def come(self, name: str, *, before: bool) -> None:
        """A site that comes later does steps 2, then 5 and 7, like the others."""
        self.post()
        for block in blocks():
            if block.where == "site" and (block.section[:1] == "2") == before and block.section[:1] in "257":
                for line in block.lines():
                    self.type(name, line.replace("north", name), False)
            elif block.where.startswith("site:") and not before:
                self.write(name, block.where.partition(":")[2].replace("north", name), block.text)


def free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody listens on."""
    for first in range(21000, 60000, 97):
        with contextlib.ExitStack() as taken:
            try:
                for port in range(first, first + count):
                    taken.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise OSError("no ports")


@pytest.fixture
def people(
    request: pytest.FixtureRequest, tmp_path: Path, bert_folder: Path, data_file: Path
) -> Iterator[People]:
    found = People(tmp_path, bert_folder, data_file, "slow" in request.node.keywords, free_ports(20))
    yield found
    found.stop()


def test_every_command_works_in_the_order_of_the_document(people: People) -> None:
    """Without the processes: those that look at a federation say that it does not run."""
    people.do()
    found = people.status()
    assert [site["name"] for site in found["sites"]] == ["north", "west", "east"]
    assert [job["standing"] for job in found["jobs"]] == ["queued", "queued"]
    assert len(people.ran) > 60
    ran = set(people.ran)
    assert {
        "server run",
        "client run",
        "client approve",
        "server certificate",
        "client pin",
        "server stop",
    } <= ran
    budget = json.loads(people.confide("north", ["client", "budget", "north", "--json"]))
    assert budget["sources"][0]["target_epsilon"] == 3.0
    assert budget["sources"][0]["epsilon_spent"] == 0
    place = SiteFolder(people.at("north") / "north")
    with only_one(place, "client"), pytest.raises(CheckpointError, match="runs already"):
        people.confide("north", ["client", "run", "north"])


@pytest.mark.slow
def test_the_federation_of_the_document_does_its_job(people: People) -> None:
    people.do(until="8. Running")
    for secret in ("authority.key", "tls/ca.key"):  # not needed by what runs, as the document says
        (people.at("operator") / "federation" / secret).rename(people.folder / Path(secret).name)
    people.do(after="7. The site decides (each site)", until="9. Watching it (operator)")
    (job,) = people.at("operator").glob("federation/jobs/*")
    end = time.monotonic() + 500
    while not (job / "report.html").exists():
        assert time.monotonic() < end, people.status()
        assert not (job / "ended.json").exists(), (job / "ended.json").read_text()
        time.sleep(2)
    found = people.status()
    assert found["serving"]
    assert [(site["node"], site["fate"], site["rounds"]) for site in found["sites"]] == [
        ("online", "ok", 2)
    ] * 3
    assert found["jobs"][0]["standing"] == "done"
    assert (job / "adapter" / "adapter_config.json").is_file()
    for name in SITES:
        budget = json.loads(people.confide(name, ["client", "budget", name, "--json"]))
        assert 0 < budget["sources"][0]["epsilon_spent"] <= 3.0
    # Later: the rest of the document, while all of it runs.
    for secret in ("authority.key", "tls/ca.key"):
        (people.folder / Path(secret).name).rename(people.at("operator") / "federation" / secret)
    people.do(after="8. Running")
    people.stop()


def test_the_job_of_the_document_is_one() -> None:
    (text,) = (block.text for block in blocks() if block.where == "operator:job.toml")
    config, plan = prepare_job(parse_config(tomllib.loads(text), source="docs/deployment.md"), 3, 1)
    assert config.aggregation.min_cohort == 3
    assert plan.epsilon_rdp is not None and plan.epsilon_rdp <= 3.0


def test_every_command_and_option_in_the_document_exists() -> None:
    text = DOCUMENT.replace("\\\n", " ")
    used = re.findall(r"confide ((?:server|client) \w+)([^`\n#]*)", text)
    assert {"server certificate", "client serve", "client export"} <= {name for name, _ in used}
    for name, rest in used:
        shown = CliRunner().invoke(confide.app, [*name.split(), "--help"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0, name
        for option in re.findall(r"(--[a-z-]+)", rest):
            assert option in shown.stdout, (name, option)
    options = CliRunner().invoke(confide.app, ["server", "init", "--help"], env={"COLUMNS": "200"}).stdout
    assert "--port" in options


def test_links_lead_somewhere() -> None:
    heads = {
        re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-")
        for h in re.findall(r"^#+ (.*)$", DOCUMENT, re.M)
    }
    for path, anchor in re.findall(r"\]\(([\w./-]*)(?:#([\w-]+))?\)", DOCUMENT):
        assert not path or (ROOT / "docs" / path).exists(), path
        assert not anchor or anchor in heads, anchor


def test_every_code_that_the_status_may_show_is_explained() -> None:
    codes = {code.value for code in StatusCode} | {cohort.IMPOSTOR, cohort.LEDGER, cohort.MALFORMED}
    for code in codes | {"deadline", "not-sent", "transport-N"}:
        assert f"| `{code}`" in DOCUMENT, code


def test_ports_and_secrets_are_those_of_the_program(people: People) -> None:
    people.do(until="3. Enrolling (operator)")
    settings = tomllib.loads((people.at("operator") / "federation" / "server.toml").read_text())
    ports = [settings["gate"]["port"], *settings["local"].values()]
    documented = [int(port) for port in re.findall(r"^\| (90\d\d) \|", DOCUMENT, flags=re.MULTILINE)]
    assert [port - people.port for port in ports] == [port - 9092 for port in documented]
    secrets = set(re.findall(r"^\| `((?:federation|north)/[\w./]+)` \| (?:operator|site) \|", DOCUMENT, re.M))
    found = set()
    for who in ("operator", "north"):
        for path in people.at(who).rglob("*"):
            if (
                path.is_file()
                and path.suffix in (".key", ".pem")
                and "PUBLIC" not in path.read_text("latin-1")
            ) and b"CERTIFICATE" not in path.read_bytes():
                assert path.stat().st_mode & 0o077 == 0, path
                found.add(str(path.relative_to(people.at(who))))
    assert found == secrets
