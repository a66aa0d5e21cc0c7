"""Founding a federation, enrolling sites and pinning its roster: the real commands, as people run them."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import confide
from client.identity import NotAMemberError, NotPinnedError, PassphraseError, SiteFolder, load_identity
from common.errors import ConfideError, ConfigError
from common.identity import (
    CardFormatError,
    CardProofError,
    ExposedKeyError,
    KeyExistsError,
    MissingKeyError,
    load_card,
)
from common.roster import (
    OtherAuthorityError,
    RosterFormatError,
    RosterRollbackError,
    RosterSignatureError,
    load_roster,
)
from common.secagg.policy import check_roster
from server.federation import EnrollmentError, FederationError, FederationFolder
from tests.e2e.command import ROOT, invoke, run_process


def ask(*arguments: str | Path) -> Any:
    return json.loads(invoke(*arguments, "--json"))


@pytest.fixture
def federation(tmp_path: Path) -> Path:
    """Two enrolled sites, north and south; their folders lie beside the federation's."""
    folder = tmp_path / "federation"
    invoke("server", "init", folder, "--name", "Heart study")
    for name in ("north", "south"):
        invoke("client", "init", tmp_path / name)
        invoke("server", "enroll", tmp_path / name / "site.pub", "--federation", folder)
    return folder


def fingerprint_of(federation: Path) -> str:
    return str(ask("server", "roster", federation)["authority_fingerprint"])


def test_init_enroll_pin_show(tmp_path: Path) -> None:
    """What docs and `--help` tell people to do, in processes of their own."""

    def run(*arguments: str | Path) -> str:
        done = run_process(*arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return done.stdout

    founded = run("server", "init", "federation", "--name", "Heart study")
    authority = next(line.split()[1] for line in founded.splitlines() if line.startswith("authority:"))
    made = run("client", "init", "north")
    finger = next(line.split()[1] for line in made.splitlines() if line.startswith("fingerprint:"))
    assert "confide client join north KIT --authority" in made
    enrolled = run("server", "enroll", "north/site.pub", "--federation", "federation")
    assert "enrolled: site 1, north" in enrolled
    assert finger in enrolled
    assert authority in enrolled
    assert finger in run("server", "roster", "federation")
    pinned = run("client", "pin", "north", "federation/roster.json", "--authority", authority)
    assert "this site: 1, north" in pinned
    shown = run("client", "show", "north")
    assert finger in shown
    assert authority in shown
    assert "version 1, 1 member" in shown
    assert "0600" in shown


def test_every_file_has_the_mode_it_should(tmp_path: Path, federation: Path) -> None:
    invoke(
        "client",
        "pin",
        tmp_path / "north",
        federation / "roster.json",
        "--authority",
        fingerprint_of(federation),
    )
    for path in (
        tmp_path / "north" / "identity.pem",
        tmp_path / "north" / "local.key",
        federation / "authority.key",
    ):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for folder in (tmp_path / "north", federation):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    shown = ask("client", "show", tmp_path / "north")
    assert shown["files"]["identity.pem"] == shown["files"]["local.key"] == "0600"
    assert shown["exposed"] == []


def test_what_the_commands_say_as_json(tmp_path: Path, federation: Path) -> None:
    roster = ask("server", "roster", federation)
    assert [(one["id"], one["name"]) for one in roster["members"]] == [(1, "north"), (2, "south")]
    assert roster["version"] == 2
    assert roster["retired"] == []
    before = ask("client", "show", tmp_path / "north")
    assert before["id"] is None
    assert before["pinned"] is None
    pinned = ask(
        "client", "pin", tmp_path / "north", federation / "roster.json", "--authority", roster["authority"]
    )
    assert pinned == ask("client", "show", tmp_path / "north")
    assert pinned["id"] == 1
    assert pinned["fingerprint"] == before["fingerprint"] == roster["members"][0]["fingerprint"]
    assert pinned["pinned"]["authority_fingerprint"] == roster["authority_fingerprint"]
    assert pinned["pinned"]["members"] == 2
    new = ask("client", "init", tmp_path / "third", "--name", "West Wing")
    assert new["name"] == "West Wing"
    assert not new["encrypted"]
    enrolled = ask(
        "server", "enroll", tmp_path / "third" / "site.pub", "--federation", federation, "--id", "9"
    )
    assert (enrolled["id"], enrolled["version"], enrolled["public"]) == (9, 3, new["public"])
    assert ask("server", "revoke", federation, "--id", "9")["version"] == 4
    assert ask("server", "init", tmp_path / "other", "--name", "Other")["members"] == []


def test_the_roster_is_fit_for_secure_aggregation(federation: Path, tmp_path: Path) -> None:
    roster = load_roster(federation / "roster.json", None)
    check_roster(roster.keys)
    for site, name in ((1, "north"), (2, "south")):
        identity = load_identity(SiteFolder(tmp_path / name).identity, None)
        assert roster.keys[site] == identity.public


def test_no_secret_is_printed(tmp_path: Path, federation: Path) -> None:
    secrets = [(tmp_path / "north" / "local.key").read_bytes(), (federation / "authority.key").read_bytes()]
    pem = (tmp_path / "north" / "identity.pem").read_text().splitlines()[1]
    said = "".join(
        invoke(*words)
        for words in (
            ("server", "roster", federation),
            ("server", "roster", federation, "--json"),
            ("client", "show", tmp_path / "north"),
            ("client", "show", tmp_path / "north", "--json"),
        )
    )
    assert pem not in said
    assert not any(secret.hex() in said for secret in secrets)


# Enrolling


CARD_DEFECTS: dict[str, tuple[dict[str, str], type[ConfideError]]] = {
    "another_name": ({"name": "East"}, CardProofError),
    "another_key": ({"public": "11" * 32}, CardProofError),
    "another_proof": ({"proof": "22" * 64}, CardProofError),
    "another_format": ({"format": "confide-site/9"}, CardFormatError),
    "one_field_more": ({"id": "7"}, CardFormatError),
}


@pytest.mark.parametrize("name", CARD_DEFECTS)
def test_a_tampered_card_is_not_enrolled(name: str, tmp_path: Path, federation: Path) -> None:
    changes, error = CARD_DEFECTS[name]
    invoke("client", "init", tmp_path / "east")
    card = tmp_path / "east" / "site.pub"
    card.write_text(json.dumps({**json.loads(card.read_text()), **changes}, indent=1) + "\n")
    before = (federation / "roster.json").read_bytes()
    with pytest.raises(error, match=r"site\.pub"):
        invoke("server", "enroll", card, "--federation", federation)
    assert (federation / "roster.json").read_bytes() == before


def test_a_site_is_enrolled_once(tmp_path: Path, federation: Path) -> None:
    before = (federation / "roster.json").read_bytes()
    with pytest.raises(EnrollmentError, match="enrolled already, as site 1"):
        invoke("server", "enroll", tmp_path / "north" / "site.pub", "--federation", federation)
    with pytest.raises(EnrollmentError, match="enrolled already"):
        invoke("server", "enroll", tmp_path / "north" / "site.pub", "--federation", federation, "--id", "7")
    invoke("client", "init", tmp_path / "copy", "--name", "NORTH")
    with pytest.raises(EnrollmentError, match="has the name"):
        invoke("server", "enroll", tmp_path / "copy" / "site.pub", "--federation", federation)
    assert (federation / "roster.json").read_bytes() == before


@pytest.mark.parametrize("site_id", ["1", "2", "0", "-1", "4294967296"])
def test_an_id_that_cannot_be_given(site_id: str, tmp_path: Path, federation: Path) -> None:
    invoke("client", "init", tmp_path / "east")
    with pytest.raises(EnrollmentError, match="--id"):
        invoke(
            "server", "enroll", tmp_path / "east" / "site.pub", "--federation", federation, "--id", site_id
        )


def test_a_revoked_id_and_key_do_not_come_back(tmp_path: Path, federation: Path) -> None:
    invoke("server", "revoke", federation, "--id", "2")
    roster = ask("server", "roster", federation)
    assert [one["id"] for one in roster["members"]] == [1]
    assert [one["id"] for one in roster["retired"]] == [2]
    with pytest.raises(EnrollmentError, match="was revoked already, as site 2"):
        invoke("server", "enroll", tmp_path / "south" / "site.pub", "--federation", federation)
    with pytest.raises(EnrollmentError, match="revoked already"):
        invoke("server", "revoke", federation, "--id", "2")
    with pytest.raises(EnrollmentError, match="no member"):
        invoke("server", "revoke", federation, "--id", "5")
    # The same institution under a new key gets a new id, and may keep its name.
    invoke("client", "init", tmp_path / "again", "--name", "south")
    assert ask("server", "enroll", tmp_path / "again" / "site.pub", "--federation", federation)["id"] == 3
    with pytest.raises(EnrollmentError, match="--id"):
        invoke("client", "init", tmp_path / "east")
        invoke("server", "enroll", tmp_path / "east" / "site.pub", "--federation", federation, "--id", "2")
    assert "retired" in invoke("server", "roster", federation)


def test_two_enrollments_at_a_time_cannot_fork_the_roster(tmp_path: Path, federation: Path) -> None:
    invoke("client", "init", tmp_path / "east")
    with FederationFolder(federation).locked(), pytest.raises(FederationError, match="another process"):
        invoke("server", "enroll", tmp_path / "east" / "site.pub", "--federation", federation)
    assert ask("server", "enroll", tmp_path / "east" / "site.pub", "--federation", federation)["id"] == 3


def test_a_federation_is_never_overwritten(federation: Path) -> None:
    before = {path: path.read_bytes() for path in federation.rglob("*") if path.is_file()}
    with pytest.raises(KeyExistsError, match="never overwritten"):
        invoke("server", "init", federation, "--name", "Another")
    (federation / "authority.key").rename(federation / "moved")
    with pytest.raises(KeyExistsError):
        invoke("server", "init", federation, "--name", "Another")
    (federation / "moved").rename(federation / "authority.key")
    assert {path: path.read_bytes() for path in federation.rglob("*") if path.is_file()} == before


def test_a_federation_with_a_bad_name_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RosterFormatError, match="name"):
        invoke("server", "init", tmp_path / "federation", "--name", " ")
    assert not (tmp_path / "federation").exists()


def test_a_folder_that_is_no_federation(tmp_path: Path) -> None:
    invoke("client", "init", tmp_path / "north")
    card = tmp_path / "north" / "site.pub"
    for folder, error in ((tmp_path / "nowhere", FederationError), (tmp_path / "north", MissingKeyError)):
        with pytest.raises(error):
            invoke("server", "enroll", card, "--federation", folder)
        with pytest.raises(MissingKeyError):
            invoke("server", "roster", folder)


def test_a_damaged_federation_signs_nothing(tmp_path: Path, federation: Path) -> None:
    invoke("client", "init", tmp_path / "east")
    card = tmp_path / "east" / "site.pub"
    roster = federation / "roster.json"
    whole = roster.read_bytes()
    roster.write_bytes(whole.replace(b'"south"', b'"sauth"'))
    with pytest.raises(RosterSignatureError):
        invoke("server", "enroll", card, "--federation", federation)
    roster.write_bytes(whole)
    key = federation / "authority.key"
    key.write_bytes(key.read_bytes()[:-1])
    with pytest.raises(FederationError, match="32 bytes"):
        invoke("server", "revoke", federation, "--id", "1")
    key.write_bytes(bytes(32))
    with pytest.raises(OtherAuthorityError):
        invoke("server", "enroll", card, "--federation", federation)
    assert roster.read_bytes() == whole


def test_an_authority_s_key_that_others_can_read_signs_nothing(tmp_path: Path, federation: Path) -> None:
    (federation / "authority.key").chmod(0o640)
    invoke("client", "init", tmp_path / "east")
    done = run_process(
        "server", "enroll", tmp_path / "east" / "site.pub", "--federation", federation, cwd=tmp_path
    )
    assert done.returncode == 5
    assert "0640" in done.stderr
    assert "Traceback" not in done.stderr


# A site's own side


def test_a_site_is_never_overwritten(tmp_path: Path) -> None:
    invoke("client", "init", tmp_path / "north")
    before = {path: path.read_bytes() for path in (tmp_path / "north").iterdir()}
    done = run_process("client", "init", "north", cwd=tmp_path)
    assert done.returncode == 2
    assert "never overwritten" in " ".join(done.stderr.split())
    assert {path: path.read_bytes() for path in (tmp_path / "north").iterdir()} == before


def test_a_group_readable_key_is_refused(tmp_path: Path, federation: Path) -> None:
    folder = SiteFolder(tmp_path / "north")
    folder.identity.chmod(0o640)
    with pytest.raises(ExposedKeyError, match="0640"):
        load_identity(folder.identity, None)
    assert ask("client", "show", folder.path)["exposed"] == ["identity.pem"]
    assert "others may read it" in invoke("client", "show", folder.path)


def test_a_passphrase_from_a_file(tmp_path: Path) -> None:
    words = tmp_path / "passphrase"
    words.write_text("correct horse battery\nsecond line\n")
    invoke("client", "init", tmp_path / "north", "--passphrase-file", words)
    path = SiteFolder(tmp_path / "north").identity
    assert (
        load_identity(path, b"correct horse battery").public
        == load_card(tmp_path / "north" / "site.pub").public
    )
    with pytest.raises(PassphraseError):
        load_identity(path, None)
    for text, error in (("", PassphraseError), ("short\n", PassphraseError), (None, ConfigError)):
        if text is None:
            words.unlink()
        else:
            words.write_text(text)
        with pytest.raises(error):
            invoke("client", "init", tmp_path / "south", "--passphrase-file", words)
    with pytest.raises(ConfigError, match="exclude each other"):
        invoke("client", "init", tmp_path / "south", "--passphrase-file", words, "--ask-passphrase")
    assert not (tmp_path / "south" / "identity.pem").exists()


def test_a_passphrase_from_the_keyboard_is_not_shown(tmp_path: Path) -> None:
    typed = "correct horse battery"
    result = CliRunner().invoke(
        confide.app,
        ["client", "init", str(tmp_path / "north"), "--ask-passphrase"],
        input=f"{typed}\n{typed}\n",
    )
    assert result.exit_code == 0
    assert typed not in result.output
    assert load_identity(SiteFolder(tmp_path / "north").identity, typed.encode())


def test_pinning_says_why_it_refuses(tmp_path: Path, federation: Path) -> None:
    north, roster = tmp_path / "north", federation / "roster.json"
    with pytest.raises(NotPinnedError, match="--authority"):
        invoke("client", "pin", north, roster)
    invoke("server", "init", tmp_path / "impostor", "--name", "Heart study")
    invoke("server", "enroll", north / "site.pub", "--federation", tmp_path / "impostor")
    with pytest.raises(OtherAuthorityError):
        invoke(
            "client",
            "pin",
            north,
            tmp_path / "impostor" / "roster.json",
            "--authority",
            fingerprint_of(federation),
        )
    with pytest.raises(ConfigError, match="expected a fingerprint"):
        invoke("client", "pin", north, roster, "--authority", "Heart study")
    invoke("client", "init", tmp_path / "stranger")
    with pytest.raises(NotAMemberError):
        invoke("client", "pin", tmp_path / "stranger", roster, "--authority", fingerprint_of(federation))
    for words in (("pin", tmp_path / "nowhere", roster), ("show", tmp_path / "nowhere")):
        with pytest.raises(ConfigError, match="no site's folder"):
            invoke("client", *words)
    with pytest.raises(ConfigError, match="is not there"):
        invoke("client", "pin", north, tmp_path / "nowhere.json", "--authority", fingerprint_of(federation))
    assert ask("client", "show", north)["pinned"] is None


def test_rosters_only_move_forward(tmp_path: Path, federation: Path) -> None:
    north = tmp_path / "north"
    old = tmp_path / "old.json"
    old.write_bytes((federation / "roster.json").read_bytes())
    invoke("client", "init", tmp_path / "east")
    invoke("server", "enroll", tmp_path / "east" / "site.pub", "--federation", federation)
    invoke("client", "pin", north, federation / "roster.json", "--authority", fingerprint_of(federation))
    invoke("client", "pin", north, federation / "roster.json")  # again is fine
    with pytest.raises(RosterRollbackError, match="only move forward"):
        invoke("client", "pin", north, old)
    assert ask("client", "show", north)["pinned"]["version"] == 3
    done = run_process("client", "pin", north, old, cwd=tmp_path)
    assert done.returncode == 6
    # A federation's folder that was restored from a backup signs version 3 a second time.
    (federation / "roster.json").write_bytes(old.read_bytes())
    invoke("server", "revoke", federation, "--id", "2")
    with pytest.raises(ConfideError, match="two that differ"):
        invoke("client", "pin", north, federation / "roster.json")


# The commands themselves


@pytest.mark.parametrize(
    "words",
    [
        ("client",),
        ("server",),
        ("client", "init"),
        ("client", "pin"),
        ("client", "show"),
        ("server", "init"),
        ("server", "enroll"),
        ("server", "roster"),
        ("server", "revoke"),
    ],
    ids=" ".join,
)
def test_help_teaches(words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(confide.app, [*words, "--help"], env={"COLUMNS": "110"})
    assert result.exit_code == 0
    if len(words) == 2:
        assert "--json" in result.stdout
        assert "Exit code" in result.stdout


def test_the_commands_start_without_what_they_do_not_need(tmp_path: Path) -> None:
    """Training's libraries take seconds to import."""
    script = (
        "import sys, confide\n"
        "sys.argv = ['confide', 'client', 'init', 'north']\n"
        "try:\n    confide.main()\n"
        "except SystemExit as done:\n    assert not done.code, done.code\n"
        "print([name for name in ('torch', 'flwr', 'transformers', 'numpy') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
