"""`confide audit remote`: many sites at once, each checked as a file would be, and none of them believed."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from client import look
from client.identity import SiteFolder
from client.ledger_reader import LedgerReader
from client.ledger_witness import Witness
from client.look import LookServer, Shown, TokenBuckets, signed, witnessed
from common import ledger_checks
from common.errors import ConfigError
from common.identity import fingerprint
from common.ledger import Policy
from common.ledger_checks import export_ledger
from tests import audit_world as world
from tests import certificates
from tests.audit_world import failed, head, identity, outcomes, resigned
from tests.certificates import Authority

SITES = (1, 2, 3)


@pytest.fixture(autouse=True)
def without_opacus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_checks, "_opacus_step", lambda *_: None)


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


class Federation:
    """Three sites that are shown on ports of this machine, and an auditor with all that one needs."""

    def __init__(self, folder: Path, authority: Authority) -> None:
        self.folder = folder
        self._authority = authority
        self.servers: dict[int, LookServer] = {}
        for site in SITES:
            with world.open_ledger(self.place(site), site) as ledger:
                world.live(ledger, range(1, 2 + site))
            self.start(site, self.show(site))
        own = certificates.of(authority, "auditor", server=False)
        (folder / "roster.json").write_bytes(world.roster().encode())
        self.receipts = world.write_receipts(
            folder / "receipts.jsonl", [head(self.show(site)().entries[6], site) for site in SITES]
        )
        self.options: list[str | Path] = [
            *certificates.options(certificates.written(folder / "tls", own)),
            *("--roster", folder / "roster.json", "--authority", fingerprint(world.AUTHORITY.public)),
            *("--receipts", self.receipts),
        ]

    def place(self, site: int) -> Path:
        return self.folder / "sites" / world.NAMES[site]

    def show(self, site: int) -> Callable[[], Shown]:
        place, public = SiteFolder(self.place(site)), identity(site).public
        reader = LedgerReader(place.ledger, site, public)
        return witnessed(reader, Witness(place.witness, ledger=place.ledger, site=site, public=public))

    def start(self, site: int, show: Callable[[], Shown]) -> None:
        if site in self.servers:
            self.servers.pop(site).stop(0)
        own = certificates.of(self._authority, world.NAMES[site], server=True)
        self.servers[site] = LookServer("127.0.0.1:0", own, show, TokenBuckets(1000, 1000, lambda: 0.0))

    def addresses(self) -> list[str]:
        return [f"{site}=127.0.0.1:{server.port}" for site, server in sorted(self.servers.items())]

    def audit(self, *more: str | Path, addresses: list[str] | None = None) -> tuple[int, dict[str, Any]]:
        return world.audit("remote", *(addresses or self.addresses()), *self.options, *more)

    def stop(self) -> None:
        for server in self.servers.values():
            server.stop(0)


@pytest.fixture
def federation(tmp_path: Path, authority: Authority) -> Iterator[Federation]:
    made = Federation(tmp_path, authority)
    yield made
    made.stop()


def test_all_sites_are_looked_at_checked_and_kept(federation: Federation, tmp_path: Path) -> None:
    out = tmp_path / "kept"
    before = world.snapshot(federation.folder / "sites")
    code, found = federation.audit("--out", out, "--strict", "--report", tmp_path / "page.html")
    assert (code, failed(found), found["absent"]) == (0, [], [])
    assert world.snapshot(federation.folder / "sites") == before
    for site, seen in zip(SITES, found["sites"], strict=True):
        assert (seen["site"], seen["name"]) == (site, world.NAMES[site])
        assert set(outcomes(seen).values()) == {"passed"}
        assert seen["checks"][8]["note"] == "its totals are those of its entries"
        with world.open_ledger(federation.place(site), site) as ledger:
            assert (out / f"site-{site:04d}.jsonl").read_bytes() == ledger.export()
    assert "The ledgers hold" in (tmp_path / "page.html").read_text()
    # Offline, later, from what was kept.
    files = sorted(out.iterdir())
    assert len(files) == 3
    assert world.audit("ledger", *files, *federation.options[6:], "--no-pld")[0] == 0


def test_sites_may_be_named_as_in_the_roster(federation: Federation) -> None:
    by_name = [text.replace("3=", "west=") for text in federation.addresses()]
    assert federation.audit("--no-pld", addresses=by_name)[0] == 0
    for wrong in (["3"], ["3=host"], ["east=host:1"], ["0=host:1"], ["3=a:1", "west=b:2"]):
        with pytest.raises(ConfigError):
            federation.audit(addresses=wrong)


def test_a_site_that_is_down_or_never_answers_does_not_hide_the_others(federation: Federation) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        federation.servers.pop(1).stop(0)
        addresses = [f"1=127.0.0.1:{silent.getsockname()[1]}", *federation.addresses()]
        code, found = federation.audit("--no-pld", "--timeout", "2", addresses=addresses)
        assert (code, failed(found)) == (20, [(0, "UnreachableError")])
        assert outcomes(found["sites"][1])[8] == outcomes(found["sites"][2])[8] == "passed"
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        addresses[0] = f"1=127.0.0.1:{nobody.getsockname()[1]}"
    code, found = federation.audit("--no-pld", addresses=addresses)
    assert (code, failed(found)) == (20, [(0, "UnreachableError")])
    assert "UNAVAILABLE" in found["sites"][0]["checks"][0]["note"]
    # What was found wrong elsewhere comes before what could not be looked at.
    federation.start(2, cut(federation, 2))
    addresses[1:] = federation.addresses()
    assert federation.audit("--no-pld", addresses=addresses)[0] == 28


def cut(federation: Federation, site: int) -> Callable[[], Shown]:
    """A shorter ledger, signed by the site itself."""
    entries = federation.show(site)().entries[:5]
    return lambda: Shown(entries, head(entries[-1], site))


def forked(federation: Federation, site: int, at: int) -> Shown:
    entries = federation.show(site)().entries
    others = [Policy.of(f"Other rules {number}") for number in range(30)]
    chain = resigned([*(e.record for e in entries[:at]), *others], identity(site))
    return Shown(tuple(chain), head(chain[-1], site))


def test_a_ledger_that_lacks_what_the_server_has_receipts_for_fails(federation: Federation) -> None:
    federation.start(2, cut(federation, 2))
    code, found = federation.audit("--no-pld")
    assert (code, failed(found)) == (28, [(8, "HeadWentBackError")])


def test_what_was_kept_last_time_must_be_the_beginning(federation: Federation, tmp_path: Path) -> None:
    """A fork behind the newest receipt: only the auditor's own copy shows it."""
    out = tmp_path / "kept"
    assert federation.audit("--no-pld", "--out", out)[0] == 0
    before = (out / "site-0003.jsonl").read_bytes()
    fork = forked(federation, 3, 9)
    federation.start(3, lambda: fork)
    assert federation.audit("--no-pld")[0] == 0
    code, found = federation.audit("--no-pld", "--out", out)
    assert (code, failed(found)) == (28, [(8, "ForkError")])
    # The evidence is kept, and the good copy is not lost for it.
    assert (out / "site-0003.jsonl").read_bytes() == before
    assert (out / "site-0003.failed.jsonl").read_bytes() == export_ledger(fork.entries, fork.head)


def test_a_head_that_is_not_of_the_export_fails(federation: Federation) -> None:
    intact, fork, calls = federation.show(1), forked(federation, 1, 7), []

    def two_stories() -> Shown:
        calls.append(1)
        return fork if len(calls) == 1 else intact()

    federation.start(1, two_stories)
    code, found = federation.audit("--no-pld")
    assert (code, failed(found)[0][0]) == (28, 8)


@pytest.mark.parametrize("lie", ["spent", "entries", "a scope less", "no json", "no object"])
def test_totals_that_are_not_those_of_the_entries_fail(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, lie: str
) -> None:
    honest = look.totals

    def stated(entries: Any) -> Any:
        found = honest(entries)
        match lie:
            case "spent":
                found["scopes"][0]["spent"] *= 0.99
            case "entries":
                found["entries"] = -1
            case "a scope less":
                found["scopes"].pop()
            case "no object":
                return [1]
        return found

    # The auditor has a name of its own for the function.
    monkeypatch.setattr(look, "totals", stated)
    if lie == "no json":
        monkeypatch.setattr(look, "canonical", lambda _: "x")
    code, found = federation.audit("--no-pld")
    assert (code, failed(found)) == (29, [(9, "ClaimError")] * 3)


def test_another_site_at_an_address_fails(federation: Federation) -> None:
    place = SiteFolder(federation.place(1))
    federation.start(2, signed(LedgerReader(place.ledger, 1, identity(1).public), identity(1), 1))
    code, found = federation.audit("--no-pld")
    assert (code, failed(found)) == (23, [(3, "NotInRosterError")])


def test_an_endless_export_is_cut_off(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simulations.audit_fetch.MAX_EXPORT_BYTES", 1000)
    code, found = federation.audit("--no-pld")
    assert (code, failed(found)) == (21, [(1, "LedgerFormatError")] * 3)


def test_people_see_which_site_failed(federation: Federation) -> None:
    federation.start(2, cut(federation, 2))
    arguments = ("audit", "remote", *federation.addresses(), *federation.options, "--no-pld")
    code, text = world.printed(*arguments)
    assert code == 28
    assert "check 8, HeadWentBackError (site 2 south)" in text
