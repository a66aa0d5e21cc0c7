"""docs/auditing.md is true: its transcripts are what the commands print, and its program finds forgeries."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import confide
from common import ledger_checks
from common.ledger import Entry
from common.ledger_errors import LedgerError
from simulations.audit_types import MEANINGS
from tests import audit_world as world
from tests.audit_world import export, head, identity, resigned
from tests.e2e.command import ROOT

DOCUMENT = (ROOT / "docs" / "auditing.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", DOCUMENT, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the document says that the auditor was sent: north is honest, west has forgotten two charges."""
    folder = tmp_path_factory.mktemp("auditor")
    receipts = []
    for site in (1, 3):
        with world.open_ledger(folder / "sites" / world.NAMES[site], site) as ledger:
            world.live(ledger)
            entries = ledger.entries()
        receipts += [head(entry, site) for entry in entries[6:16:3]]
        sent = entries if site == 1 else forgetful(entries)
        (folder / f"{world.NAMES[site]}.jsonl").write_bytes(export(sent, site))
    (folder / "roster.json").write_bytes(world.roster(1, 3).encode())
    world.write_receipts(folder / "receipts.jsonl", receipts)
    return folder


def forgetful(entries: tuple[Entry, ...]) -> list[Entry]:
    """The chain without the second and third charge, renumbered and signed anew by the site itself."""
    first = [entry.record for entry in entries[:7]]
    return resigned([*first, *world.renumbered(entries[13:], 13 - 7)], identity(3))


def test_every_transcript_is_what_the_command_prints(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_checks, "_opacus_step", lambda *_: None)
    monkeypatch.chdir(folder)
    commands = 0
    for block in blocks("console"):
        code = None
        for step in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            joined = step.replace("\\\n", " ")
            line, _, expected = joined.partition("\n")
            if line == "echo $?":
                assert expected.strip() == str(code)
                continue
            name, *arguments = shlex.split(line)
            assert name == "confide"
            code, text = world.printed(*arguments)
            assert text.strip("\n") == expected.rstrip().strip("\n"), text
            commands += 1
    assert commands >= 3


def by_hand(folder: Path, *files: str) -> subprocess.CompletedProcess[str]:
    (program,) = (block for block in blocks("python") if "hashlib" in block)
    assert len([line for line in program.splitlines() if line.strip()]) <= 40
    assert set(re.findall(r"^(?:import|from) (\w+)", program, flags=re.MULTILINE)) <= {
        "hashlib",
        "json",
        "sys",
        "collections",
        "cryptography",
    }
    (folder / "by_hand.py").write_text(program)
    return subprocess.run(
        [sys.executable, "-I", "by_hand.py", *files], cwd=folder, capture_output=True, text=True
    )


def test_the_program_for_checking_by_hand_finds_what_the_command_finds(folder: Path) -> None:
    good = by_hand(folder, "north.jsonl", "receipts.jsonl")
    assert (good.returncode, good.stderr) == (0, "")
    assert "18 entries of site 1" in good.stdout
    assert "sample rate 0.1, noise 2.0: 25 steps" in good.stdout  # five charges of five; one was given back
    forged = by_hand(folder, "west.jsonl", "receipts.jsonl")
    assert (forged.returncode, forged.stderr.strip()) == (
        1,
        "entry 10 is not the one that the site has signed before",
    )
    data = (folder / "north.jsonl").read_bytes()
    lines = data.splitlines(keepends=True)
    for number, spoilt in enumerate(
        [
            data.replace(b'"steps":5', b'"steps":1', 1),
            b"".join([*lines[:5], *lines[6:]]),
            b"".join([*lines[:-2], lines[-1]]),
            b"".join([*lines[:-1], other_site(lines[-1])]),
            export(resigned([e.record for e in chain(data)], world.STRANGER), 1),
        ]
    ):
        (folder / "spoilt.jsonl").write_bytes(spoilt)
        assert by_hand(folder, "spoilt.jsonl").returncode != 0, number
        with pytest.raises(LedgerError):
            ledger_checks.verify_export(spoilt, pld=False)


def other_site(line: bytes) -> bytes:
    """The last line of an export, its head said to be of site 2."""
    start = len(b'{"head":"')
    return line[:start] + b"02000000" + line[start + 8 :]


def chain(data: bytes) -> list[Entry]:
    return ledger_checks.read_export(data)[0]


def test_every_check_is_in_the_table_with_its_exit_code() -> None:
    rows = re.findall(r"^\| (\d) (.+?) \| .+ \| (\d\d) \|$", DOCUMENT, flags=re.MULTILINE)
    assert rows == [(str(n), meaning.name, str(20 + n)) for n, meaning in MEANINGS.items()]


def test_every_command_and_option_in_the_document_exists() -> None:
    text = " ".join(blocks("sh") + blocks("console")).replace("\\\n", " ")
    used = re.findall(r"confide ((?:audit|client) \w+)([^\n]*)", text)
    assert {"audit ledger", "audit remote", "client serve", "client export"} <= {name for name, _ in used}
    for name, rest in used:
        shown = CliRunner().invoke(confide.app, [*name.split(), "--help"], env={"COLUMNS": "200"}).stdout
        for option in re.findall(r"(--[a-z-]+)", rest):
            assert option in shown, (name, option)
    for link in re.findall(r"\]\(([\w.-]+\.md)", DOCUMENT):
        assert (ROOT / "docs" / link).is_file(), link
