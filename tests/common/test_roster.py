"""Cards and rosters: one spelling, one signer, only forward; every defect by its name."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfideError, ConfigError
from common.identity import (
    MAX_CARD_BYTES,
    CardFormatError,
    CardProofError,
    ExposedKeyError,
    KeyExistsError,
    MissingKeyError,
    SiteCard,
    brief,
    create_private,
    fingerprint,
    is_named_by,
    load_card,
    make_card,
    read_private,
)
from common.roster import (
    MAX_ROSTER_BYTES,
    Member,
    OtherAuthorityError,
    OtherFederationError,
    RosterForkError,
    RosterFormatError,
    RosterRollbackError,
    RosterSignatureError,
    SignedRoster,
    load_roster,
    newer,
    sign_roster,
)
from common.secagg import keys
from common.secagg.keys import IdentityKey, Secret
from common.secagg.policy import check_roster
from tests.secagg_world import Stream

RANDOM = Stream(11)


def node_key(curve: ec.EllipticCurve) -> bytes:
    public = ec.generate_private_key(curve).public_key()
    return public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


AUTHORITY = IdentityKey.generate(RANDOM)
SITES = [IdentityKey.generate(RANDOM) for _ in range(6)]
MEMBERS = tuple(Member(i, f"site {i}", SITES[i].public) for i in (1, 2, 4))
RETIRED = (Member(3, "site 3", SITES[3].public),)
ROSTER = sign_roster("Heart study", 5, MEMBERS, RETIRED, AUTHORITY)
CARD = make_card("north", SITES[0])
NODE = node_key(ec.SECP384R1())

names = st.from_regex(r"[A-Za-z0-9](?:[A-Za-z0-9 ._-]{0,62}[A-Za-z0-9])?", fullmatch=True)


def signed(version: int = 6, **changes: Any) -> SignedRoster:
    fields = {"federation": "Heart study", "members": MEMBERS, "retired": RETIRED, "authority": AUTHORITY}
    fields |= changes
    return sign_roster(
        fields["federation"], version, fields["members"], fields["retired"], fields["authority"]
    )


# Cards


@given(name=names, seed=st.binary(min_size=32, max_size=32))
def test_a_card_comes_back_from_its_bytes(name: str, seed: bytes) -> None:
    card = make_card(name, IdentityKey(Secret(seed)))
    assert SiteCard.decode(card.encode()) == card


def card_with(**changes: object) -> bytes:
    fields = {**json.loads(CARD.encode()), **changes}
    return json.dumps({k: v for k, v in fields.items() if v is not ...}, indent=1).encode() + b"\n"


def flipped(text: str) -> str:
    return ("1" if text[0] == "0" else "0") + text[1:]


OTHER = make_card("south", SITES[1])
BAD_CARDS: dict[str, tuple[bytes, type[ConfideError]]] = {
    "another_name": (card_with(name="south"), CardProofError),
    "another_key": (card_with(public=SITES[1].public.hex()), CardProofError),
    "another_node": (card_with(node=NODE.hex()), CardProofError),
    "node_of_another_curve": (card_with(node=node_key(ec.SECP256R1()).hex()), CardFormatError),
    "node_that_is_no_key": (card_with(node="00" * 120), CardFormatError),
    "node_with_more": (card_with(node=NODE.hex() + "00"), CardFormatError),
    "another_proof": (card_with(proof=OTHER.proof.hex()), CardProofError),
    "changed_proof": (card_with(proof=flipped(CARD.proof.hex())), CardProofError),
    "another_format": (card_with(format="confide-site/1"), CardFormatError),
    "missing_proof": (card_with(proof=...), CardFormatError),
    "extra_field": (card_with(id=7), CardFormatError),
    "empty_name": (card_with(name=""), CardFormatError),
    "long_name": (card_with(name="n" * 65), CardFormatError),
    "name_with_control": (card_with(name="north\x1b[2J"), CardFormatError),
    "name_not_ascii": (card_with(name="nörth"), CardFormatError),
    "name_ends_in_newline": (card_with(name="north\n"), CardFormatError),
    "name_is_number": (card_with(name=5), CardFormatError),
    "short_key": (card_with(public=CARD.public.hex()[2:]), CardFormatError),
    "odd_hex": (card_with(public=CARD.public.hex()[1:]), CardFormatError),
    "upper_case_hex": (card_with(public=CARD.public.hex().upper()), CardFormatError),
    "spaced_hex": (card_with(public=CARD.public.hex(" ")), CardFormatError),
    "short_proof": (card_with(proof=CARD.proof.hex()[2:]), CardFormatError),
    "reindented": (json.dumps(json.loads(CARD.encode())).encode(), CardFormatError),
    "no_newline": (CARD.encode()[:-1], CardFormatError),
    "utf_16": (CARD.encode().decode().encode("utf-16"), CardFormatError),
    "key_twice": (CARD.encode().replace(b"{", b'{\n "name": "north",', 1), CardFormatError),
    "list": (b"[]\n", CardFormatError),
    "not_json": (b"site", CardFormatError),
    "not_utf_8": (b"\xff\xfe\xfd", CardFormatError),
    "empty": (b"", CardFormatError),
    "too_long": (b" " * (MAX_CARD_BYTES + 1), CardFormatError),
}


@pytest.mark.parametrize("name", BAD_CARDS)
def test_a_bad_card_is_refused(name: str, tmp_path: Path) -> None:
    data, error = BAD_CARDS[name]
    path = tmp_path / f"bad_{name}.pub"
    path.write_bytes(data)
    with pytest.raises(error) as caught:
        load_card(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 600
    assert str(caught.value).isprintable()


def test_no_card_is_made_for_a_name_that_is_none() -> None:
    for name in ("", " north", "a" * 65, "\udc80", "a\nb"):
        with pytest.raises(CardFormatError, match="name"):
            make_card(name, SITES[0])


ORDER_8 = bytes.fromhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a")
NOBODYS_KEYS = {
    "order_1": (1).to_bytes(32, "little"),
    "order_1_other_sign": (1 | 1 << 255).to_bytes(32, "little"),
    "order_2": (keys.FIELD_PRIME - 1).to_bytes(32, "little"),
    "order_4": bytes(32),
    "order_8": ORDER_8,
    "order_8_negative": ORDER_8[:-1] + bytes([ORDER_8[-1] | 0x80]),
    "order_8_other": bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"),
    "not_canonical": (keys.FIELD_PRIME + 1).to_bytes(32, "little"),
}


def test_anybody_signs_under_a_key_of_order_one() -> None:
    """Why such keys are refused: R = the identity, S = 0 holds for every message, without a private key."""
    forged = NOBODYS_KEYS["order_1"] + bytes(32)
    assert all(keys.verify(NOBODYS_KEYS["order_1"], os.urandom(32), forged) for _ in range(20))


@pytest.mark.parametrize("name", NOBODYS_KEYS)
def test_a_key_that_is_nobody_s_is_refused(name: str) -> None:
    with pytest.raises(CardFormatError, match="low order"):
        SiteCard("north", NOBODYS_KEYS[name], b"", NOBODYS_KEYS["order_1"] + bytes(32))
    with pytest.raises(RosterFormatError, match="low order"):
        Member(1, "north", NOBODYS_KEYS[name])


# Fingerprints


def test_a_fingerprint_can_be_read_out_and_typed_in() -> None:
    text = fingerprint(CARD.public)
    assert [len(group) for group in text.split("-")] == [4] * 8
    for typed in (text, text.lower(), text.replace("-", " "), text.replace("-", ""), CARD.public.hex()):
        assert is_named_by(CARD.public, typed)
        assert not is_named_by(OTHER.public, typed)
    assert len({fingerprint(site.public) for site in SITES}) == len(SITES)


@pytest.mark.parametrize("text", ["", "ABCD", "1" * 32, "g" * 64, "x" * 10_000])
def test_what_is_no_fingerprint_is_said_to_be_none(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a fingerprint") as caught:
        is_named_by(CARD.public, text)
    assert len(str(caught.value)) < 400


# Rosters


@st.composite
def rosters(draw: st.DrawFn) -> SignedRoster:
    ids = draw(st.lists(st.integers(1, 2**32 - 1), max_size=8, unique=True))
    seeds = draw(
        st.lists(st.binary(min_size=32, max_size=32), min_size=len(ids), max_size=len(ids), unique=True)
    )
    everybody = [
        Member(site, f"{draw(names)[:40]}{site}", IdentityKey(Secret(seed)).public)
        for site, seed in zip(sorted(ids), seeds, strict=True)
    ]
    gone = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    members = [one for one, out in zip(everybody, gone, strict=True) if not out]
    retired = [one for one, out in zip(everybody, gone, strict=True) if out]
    if len({one.name.lower() for one in members}) != len(members):
        members = []
    return sign_roster(draw(names), draw(st.integers(0, 2**32 - 1)), members, retired, AUTHORITY)


@settings(deadline=None, max_examples=50)
@given(roster=rosters())
def test_a_roster_comes_back_from_its_bytes(roster: SignedRoster) -> None:
    again = SignedRoster.decode(roster.encode())
    assert again == roster
    assert again.encode() == roster.encode()
    assert newer(roster, again) is again
    check_roster(again.keys)


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_a_changed_byte_is_never_a_roster(data: st.DataObject) -> None:
    whole = ROSTER.encode()
    place = data.draw(st.integers(0, len(whole) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda value: value != whole[place]))
    with pytest.raises((RosterFormatError, RosterSignatureError)):
        SignedRoster.decode(whole[:place] + bytes([byte]) + whole[place + 1 :])


def test_a_cut_roster_is_never_one() -> None:
    whole = ROSTER.encode()
    for length in range(len(whole)):
        with pytest.raises(RosterFormatError):
            SignedRoster.decode(whole[:length])


def test_its_keys_are_the_members_alone() -> None:
    assert ROSTER.keys == {1: SITES[1].public, 2: SITES[2].public, 4: SITES[4].public}
    check_roster(ROSTER.keys)
    assert ROSTER.member(SITES[2].public) == MEMBERS[1]
    assert ROSTER.member(SITES[3].public) is None


def roster_with(change: Callable[[dict[str, Any]], object]) -> bytes:
    fields = json.loads(ROSTER.encode())
    change(fields)
    return json.dumps(fields, indent=1).encode() + b"\n"


def put(*path: str | int, value: object) -> Callable[[dict[str, Any]], object]:
    def change(fields: Any) -> None:
        for step in path[:-1]:
            fields = fields[step]
        if value is ...:
            del fields[path[-1]]
        else:
            fields[path[-1]] = value

    return change


BAD_ROSTERS: dict[str, tuple[bytes, type[ConfideError]]] = {
    # every signed field, changed to another good value
    "other_federation": (roster_with(put("federation", value="Lung study")), RosterSignatureError),
    "other_version": (roster_with(put("version", value=6)), RosterSignatureError),
    "other_id": (roster_with(put("members", 2, "id", value=5)), RosterSignatureError),
    "other_name": (roster_with(put("members", 0, "name", value="site 9")), RosterSignatureError),
    "other_key": (
        roster_with(put("members", 0, "public", value=SITES[5].public.hex())),
        RosterSignatureError,
    ),
    "member_left_out": (roster_with(put("members", 1, value=...)), RosterSignatureError),
    "member_added": (
        roster_with(
            lambda f: f["members"].append({"id": 9, "name": "mole", "public": SITES[5].public.hex()})
        ),
        RosterSignatureError,
    ),
    "retired_forgotten": (roster_with(put("retired", value=[])), RosterSignatureError),
    "retired_brought_back": (
        roster_with(lambda f: f["members"].insert(2, f["retired"].pop())),
        RosterSignatureError,
    ),
    "other_authority": (roster_with(put("authority", value=SITES[5].public.hex())), RosterSignatureError),
    "other_signature": (roster_with(put("signature", value=CARD.proof.hex())), RosterSignatureError),
    # form
    "other_format": (roster_with(put("format", value="confide-roster/2")), RosterFormatError),
    "unknown_key": (roster_with(put("note", value="hello")), RosterFormatError),
    "unknown_key_of_member": (roster_with(put("members", 0, "role", value="admin")), RosterFormatError),
    "missing_retired": (roster_with(put("retired", value=...)), RosterFormatError),
    "missing_signature": (roster_with(put("signature", value=...)), RosterFormatError),
    "unsorted_ids": (roster_with(lambda f: f["members"].reverse()), RosterFormatError),
    "id_twice": (roster_with(put("members", 1, "id", value=1)), RosterFormatError),
    "id_that_is_retired": (roster_with(put("members", 2, "id", value=3)), RosterFormatError),
    "key_twice": (roster_with(put("members", 1, "public", value=SITES[1].public.hex())), RosterFormatError),
    "key_that_is_retired": (
        roster_with(put("members", 1, "public", value=SITES[3].public.hex())),
        RosterFormatError,
    ),
    "name_twice": (roster_with(put("members", 1, "name", value="SITE 1")), RosterFormatError),
    "id_zero": (roster_with(put("members", 0, "id", value=0)), RosterFormatError),
    "id_too_large": (roster_with(put("members", 2, "id", value=2**32)), RosterFormatError),
    "id_bool": (roster_with(put("members", 0, "id", value=True)), RosterFormatError),
    "id_float": (roster_with(put("members", 0, "id", value=1.0)), RosterFormatError),
    "id_text": (roster_with(put("members", 0, "id", value="1")), RosterFormatError),
    "version_negative": (roster_with(put("version", value=-1)), RosterFormatError),
    "version_bool": (roster_with(put("version", value=True)), RosterFormatError),
    "version_nan": (ROSTER.encode().replace(b'"version": 5', b'"version": NaN'), RosterFormatError),
    "version_endless": (
        ROSTER.encode().replace(b'"version": 5', b'"version": ' + b"9" * 5000),
        RosterFormatError,
    ),
    "name_with_markup": (roster_with(put("members", 0, "name", value="[red]x[/]")), RosterFormatError),
    "bad_hex": (roster_with(put("members", 0, "public", value="zz" * 32)), RosterFormatError),
    "short_key": (roster_with(put("members", 0, "public", value="00" * 31)), RosterFormatError),
    "short_signature": (roster_with(put("signature", value="00" * 63)), RosterFormatError),
    "members_no_list": (roster_with(put("members", value={})), RosterFormatError),
    "member_no_object": (roster_with(put("members", 0, value=7)), RosterFormatError),
    "field_twice": (ROSTER.encode().replace(b"{", b'{\n "version": 5,', 1), RosterFormatError),
    "other_order": (
        json.dumps(dict(reversed(json.loads(ROSTER.encode()).items())), indent=1).encode() + b"\n",
        RosterFormatError,
    ),
    "spaces": (ROSTER.encode() + b" ", RosterFormatError),
    "escapes": (ROSTER.encode().replace(b"Heart", b"\\u0048eart"), RosterFormatError),
    "windows_lines": (ROSTER.encode().replace(b"\n", b"\r\n"), RosterFormatError),
    "nested": (b"[" * 100_000, RosterFormatError),
    "not_json": (b"roster", RosterFormatError),
    "not_utf_8": (b"\xff\xfe\xfd", RosterFormatError),
    "empty": (b"", RosterFormatError),
    "a_card": (CARD.encode(), RosterFormatError),
}


@pytest.mark.parametrize("name", BAD_ROSTERS)
def test_a_bad_roster_is_refused(name: str, tmp_path: Path) -> None:
    data, error = BAD_ROSTERS[name]
    path = tmp_path / f"bad_{name}.json"
    path.write_bytes(data)
    for authority in (AUTHORITY.public, None):
        with pytest.raises(error) as caught:
            load_roster(path, authority)
        assert str(path) in str(caught.value)
        assert len(str(caught.value)) < 700
        assert str(caught.value).isprintable()


def test_an_oversized_roster_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "bad_oversized.json"
    with path.open("wb") as file:
        file.truncate(100 * MAX_ROSTER_BYTES)
    with pytest.raises(RosterFormatError, match="more than"):
        load_roster(path, None)


def test_a_roster_of_another_authority_is_refused(tmp_path: Path) -> None:
    """It is well signed, and its key is the only thing wrong with it."""
    path = tmp_path / "roster.json"
    path.write_bytes(signed(authority=SITES[5]).encode())
    assert load_roster(path, None).authority == SITES[5].public
    with pytest.raises(OtherAuthorityError, match=fingerprint(AUTHORITY.public)):
        load_roster(path, AUTHORITY.public)


def oracle(*fields: bytes) -> bytes:
    """SHA-256 of length-prefixed fields, written down a second time."""
    return hashlib.sha256(b"".join(len(field).to_bytes(8, "little") + field for field in fields)).digest()


def test_what_is_signed_is_what_the_format_says() -> None:
    """Other programs verify these too: the bytes under a signature never change by accident."""

    def rows(group: tuple[Member, ...]) -> list[bytes]:
        parts = [(one.id.to_bytes(4, "little"), one.name.encode(), one.public) for one in group]
        return [len(group).to_bytes(4, "little"), *(field for row in parts for field in row)]

    domain = b"confide/secagg/1"
    statement = oracle(
        domain,
        b"signed roster",
        b"Heart study",
        (5).to_bytes(4, "little"),
        *rows(MEMBERS),
        *rows(RETIRED),
        AUTHORITY.public,
    )
    assert ROSTER.statement == statement
    assert keys.verify(AUTHORITY.public, statement, ROSTER.signature)
    assert keys.verify(CARD.public, oracle(domain, b"site card", b"north", CARD.public, b""), CARD.proof)
    deployed = make_card("north", SITES[0], NODE)
    said = oracle(domain, b"site card", b"north", CARD.public, NODE)
    assert keys.verify(CARD.public, said, deployed.proof)
    finger = base64.b32encode(oracle(domain, b"fingerprint", CARD.public)[:20]).decode()
    assert fingerprint(CARD.public).replace("-", "") == finger


def test_a_site_s_card_is_no_signature_of_a_roster() -> None:
    """Labels differ, so what a key signs in one role counts for nothing in another."""
    with pytest.raises(RosterSignatureError):
        SignedRoster("north", 0, (), (), SITES[0].public, CARD.proof)


def test_a_missing_roster_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not there"):
        load_roster(tmp_path / "nowhere.json", None)


# Forward only

MOVED = Member(4, "site 4", SITES[5].public)
REFUSED: dict[str, tuple[Callable[[], SignedRoster], type[ConfideError]]] = {
    "older": (lambda: signed(4), RosterRollbackError),
    "same_version_other_members": (lambda: signed(5, members=MEMBERS[:2]), RosterForkError),
    "same_version_other_name": (
        lambda: signed(5, members=(Member(1, "renamed", SITES[1].public), *MEMBERS[1:])),
        RosterForkError,
    ),
    "other_authority": (lambda: signed(6, authority=SITES[5]), OtherAuthorityError),
    "other_federation": (lambda: signed(6, federation="Lung study"), OtherFederationError),
    "member_vanished": (lambda: signed(6, members=MEMBERS[:2]), RosterRollbackError),
    "id_has_another_key": (lambda: signed(6, members=(*MEMBERS[:2], MOVED)), RosterRollbackError),
    "retired_vanished": (lambda: signed(6, retired=()), RosterRollbackError),
    "retired_came_back": (
        lambda: signed(6, members=(*MEMBERS[:2], *RETIRED, MEMBERS[2]), retired=()),
        RosterRollbackError,
    ),
    "retired_id_has_another_key": (
        lambda: signed(6, retired=(Member(3, "site 3", SITES[5].public),)),
        RosterRollbackError,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_roster_that_does_not_follow_is_refused(name: str) -> None:
    make, error = REFUSED[name]
    with pytest.raises(error):
        newer(ROSTER, make())


def test_a_roster_that_follows_is_taken() -> None:
    new = Member(7, "site 7", SITES[5].public)
    renamed = (Member(1, "renamed", SITES[1].public), *MEMBERS[1:])
    for following in (
        signed(5),
        signed(6),
        signed(100, members=(*MEMBERS, new)),
        signed(6, members=MEMBERS[:2], retired=(*RETIRED, MEMBERS[2])),
        signed(6, members=renamed),
    ):
        assert newer(ROSTER, following) is following


def test_thousands_of_sites_are_read_in_a_moment() -> None:
    """Checks are linear: a large roster is no way to make a site work for hours."""
    members = tuple(
        Member(site, f"s{site}", IdentityKey(Secret(site.to_bytes(32, "big"))).public)
        for site in range(1, 4_001)
    )
    first = sign_roster("wide", 1, members[2000:], members[:2000], AUTHORITY)
    again = SignedRoster.decode(first.encode())
    assert newer(first, again) == first


# Secret files


def test_a_secret_file_is_its_owner_s_alone_whatever_the_umask(tmp_path: Path) -> None:
    for umask in (0o000, 0o022, 0o777):
        before = os.umask(umask)
        try:
            create_private(tmp_path / f"key{umask}", b"secret")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / f"key{umask}").stat().st_mode) == 0o600
        assert read_private(tmp_path / f"key{umask}", 32) == b"secret"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o644, 0o660, 0o610, 0o601])
def test_a_secret_file_that_others_can_use_is_refused(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "key"
    create_private(path, b"secret bytes")
    path.chmod(mode)
    with pytest.raises(ExposedKeyError, match=f"{mode:04o}") as caught:
        read_private(path, 32)
    assert caught.value.exit_code == 5
    assert "secret bytes" not in str(caught.value)


def test_a_secret_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "key"
    create_private(path, b"first")
    with pytest.raises(KeyExistsError, match="never overwritten"):
        create_private(path, b"second")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(KeyExistsError):  # nor written through a link to nowhere
        create_private(tmp_path / "link", b"second")
    assert path.read_bytes() == b"first"
    assert not (tmp_path / "target").exists()


def test_a_secret_file_is_on_disk_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bool] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        synced.append(stat.S_ISDIR(os.fstat(descriptor).st_mode))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    create_private(tmp_path / "key", b"secret")
    assert synced == [False, True]


def test_a_secret_file_that_cannot_be_written_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        create_private(tmp_path / "key", b"secret")
    assert not (tmp_path / "key").exists()


def test_a_secret_file_that_is_none(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path, tmp_path / "nowhere" / "deeper"):
        with pytest.raises(MissingKeyError):
            read_private(path, 32)


def test_a_stranger_s_value_is_shown_briefly() -> None:
    assert brief("x" * 1000) == "'" + "x" * 76 + "..."
    assert brief("\x1b[2J\udc80é") == r"'\x1b[2J\udc80\xe9'"
    assert brief([1, [2]]) == "a list"
