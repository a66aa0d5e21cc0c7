"""A kit is what the authority has signed: an address and a certificate of somebody else are noticed."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from client.identity import SiteFolder, create_site
from client.join import join, load_server
from common.errors import ConfideError
from common.identity import fingerprint, load_card
from common.kit import CA_FILE, KIT_FILE, ROSTER_FILE, KitFormatError, KitSignatureError, make_kit, read_kit
from common.roster import Member, OtherAuthorityError, RosterRollbackError, sign_roster
from common.secagg.keys import IdentityKey

AUTHORITY = IdentityKey.generate(os.urandom)
OTHER = IdentityKey.generate(os.urandom)


@pytest.fixture
def site(tmp_path: Path) -> SiteFolder:
    place = SiteFolder(tmp_path / "north")
    create_site(place, "north", os.urandom, None, deployed=True)
    return place


def kit_for(
    site: SiteFolder, authority: IdentityKey = AUTHORITY, version: int = 1, address: str = "a.example:9092"
):  # type: ignore[no-untyped-def]
    member = Member(1, "north", load_card(site.card).public)
    roster = sign_roster("Heart study", version, [member], (), authority)
    return make_kit(roster, address, b"a certificate", "# policy\n", "# readme\n", authority)


def written(kit, path: Path) -> Path:  # type: ignore[no-untyped-def]
    path.write_bytes(kit.tar())
    return path


def test_a_kit_comes_back_from_tar_and_folder(site: SiteFolder, tmp_path: Path) -> None:
    kit = kit_for(site)
    assert read_kit(written(kit, tmp_path / "kit.tar")) == kit
    folder = tmp_path / "kit"
    folder.mkdir()
    for name, data in kit.files().items():
        (folder / name).write_bytes(data)
    assert read_kit(folder) == kit


def test_joining_pins_and_keeps_the_address(site: SiteFolder, tmp_path: Path) -> None:
    pinned = join(site, written(kit_for(site), tmp_path / "kit.tar"), fingerprint(AUTHORITY.public))
    assert pinned.member.name == "north"
    assert load_server(site).address == "a.example:9092"
    assert site.authority_tls.read_bytes() == b"a certificate"
    assert site.settings.exists() and site.policy.exists()
    newer = written(kit_for(site, version=2, address="b.example:1"), tmp_path / "newer.tar")
    join(site, newer, None)
    assert load_server(site).address == "b.example:1"
    with pytest.raises(RosterRollbackError):
        join(site, written(kit_for(site), tmp_path / "older.tar"), None)
    assert load_server(site).address == "b.example:1"


def test_a_kit_of_another_authority_changes_nothing(site: SiteFolder, tmp_path: Path) -> None:
    foreign = written(kit_for(site, authority=OTHER), tmp_path / "kit.tar")
    with pytest.raises(OtherAuthorityError):
        join(site, foreign, fingerprint(AUTHORITY.public))
    assert not site.server.exists() and not site.roster.exists() and not site.authority_tls.exists()


@pytest.mark.parametrize("part", ["address", "certificate", "roster", "signature"])
def test_a_changed_kit_is_refused(site: SiteFolder, tmp_path: Path, part: str) -> None:
    files = kit_for(site).files()
    match part:
        case "address":
            files[KIT_FILE] = files[KIT_FILE].replace(b"a.example", b"e.example")
        case "certificate":
            files[CA_FILE] = b"another certificate"
        case "roster":
            files[ROSTER_FILE] = kit_for(site, authority=OTHER).files()[ROSTER_FILE]
        case "signature":
            files[KIT_FILE] = kit_for(site, authority=OTHER).files()[KIT_FILE]
    folder = tmp_path / "kit"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    with pytest.raises(KitSignatureError):
        join(site, folder, fingerprint(AUTHORITY.public))
    assert not site.server.exists()


def tar_of(*entries: tuple[str, bytes, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data, kind in entries:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(data), kind, "/etc/passwd"
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no tar",
        tar_of(("../evil", b"x", tarfile.REGTYPE)),
        tar_of(("kit/kit.json", b"", tarfile.SYMTYPE)),
        tar_of(("kit/kit.json", b"{}", tarfile.REGTYPE)),
        tar_of(("kit/ca.pem", b"", tarfile.REGTYPE), ("kit/ca.pem", b"", tarfile.REGTYPE)),
        tar_of(("kit/ca.pem", bytes(100_000), tarfile.REGTYPE)),
    ],
    ids=["empty", "no_tar", "leaves_the_folder", "link", "too_few", "twice", "too_long"],
)
def test_what_is_no_kit_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "kit.tar"
    path.write_bytes(data)
    with pytest.raises(KitFormatError) as caught:
        read_kit(path)
    assert isinstance(caught.value, ConfideError)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kit.tar"]


@pytest.mark.parametrize("address", ["", "host", "host:", ":9092", "host:0", "host:70000", "a b:1", "h\n:1"])
def test_an_address_that_is_none_makes_no_kit(site: SiteFolder, address: str) -> None:
    with pytest.raises(KitFormatError):
        kit_for(site, address=address)
