"""A site's keys: made once, read by their owner alone, and what they are pinned to."""

from __future__ import annotations

import stat
import traceback
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa, x25519
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

import client.identity
from client.identity import (
    KeyFormatError,
    NotAMemberError,
    NotPinnedError,
    PassphraseError,
    SiteFolder,
    create_identity,
    create_site,
    load_identity,
    load_local_key,
    load_pinned,
    pin,
    rekey_site,
)
from common.errors import ConfideError, ConfigError
from common.identity import (
    CardFormatError,
    CardProofError,
    ExposedKeyError,
    KeyExistsError,
    MissingKeyError,
    fingerprint,
    load_card,
)
from common.roster import (
    Member,
    OtherAuthorityError,
    OtherFederationError,
    RosterForkError,
    RosterFormatError,
    RosterRollbackError,
    RosterSignatureError,
    SignedRoster,
    sign_roster,
)
from common.secagg.keys import IdentityKey, verify
from tests.secagg_world import Stream

PASSPHRASE = b"correct horse battery"
AUTHORITY = IdentityKey.generate(Stream(1))
IMPOSTOR = IdentityKey.generate(Stream(2))


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def secrets_in(error: BaseException, *secrets: bytes) -> bool:
    text = "".join(traceback.format_exception(error)) + repr(error)
    return any(form in text for secret in secrets for form in (secret.hex(), repr(secret)[2:-1]))


# Identity files


@pytest.mark.parametrize("passphrase", [None, PASSPHRASE], ids=["plain", "passphrase"])
def test_an_identity_comes_back_from_its_file(passphrase: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "identity.pem"
    made = create_identity(path, Stream(3), passphrase)
    assert mode_of(path) == 0o600
    found = load_identity(path, passphrase)
    assert found.public == made.public
    assert verify(made.public, b"message", found.sign(b"message"))
    assert (b"ENCRYPTED" in path.read_bytes()) == (passphrase is not None)
    assert Stream(3)(32) not in path.read_bytes()


def test_an_identity_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "identity.pem"
    create_identity(path, Stream(3), None)
    before = path.read_bytes()
    with pytest.raises(KeyExistsError, match=r"identity\.pem"):
        create_identity(path, Stream(4), None)
    assert path.read_bytes() == before


@pytest.mark.parametrize("passphrase", [b"", b"short", b"x" * 1001], ids=len)
def test_a_passphrase_that_protects_little_is_refused(passphrase: bytes, tmp_path: Path) -> None:
    with pytest.raises(PassphraseError, match="12 to 1000"):
        create_identity(tmp_path / "identity.pem", Stream(3), passphrase)
    assert not (tmp_path / "identity.pem").exists()


@pytest.mark.parametrize(
    ("made_with", "given", "says"),
    [
        (PASSPHRASE, b"wrong horse battery", "wrong"),
        (PASSPHRASE, None, "--passphrase-file"),
        (None, PASSPHRASE, "under no passphrase"),
    ],
    ids=["wrong", "missing", "not encrypted"],
)
def test_a_passphrase_that_does_not_fit(
    made_with: bytes | None, given: bytes | None, says: str, tmp_path: Path
) -> None:
    path = tmp_path / "identity.pem"
    create_identity(path, Stream(3), made_with)
    with pytest.raises(PassphraseError, match=says) as caught:
        load_identity(path, given)
    assert not secrets_in(caught.value, PASSPHRASE, b"wrong horse battery", Stream(3)(32))


def pem(key: object, format: PrivateFormat = PrivateFormat.PKCS8, passphrase: bytes | None = None) -> bytes:
    encryption = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
    return key.private_bytes(Encoding.PEM, format, encryption)  # type: ignore[attr-defined,no-any-return]


ED25519 = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
BAD_KEYS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "PKCS#8"),
    "not_pem": (b"key", "PKCS#8"),
    "x25519": (pem(x25519.X25519PrivateKey.generate()), "X25519"),
    "elliptic_curve": (pem(ec.generate_private_key(ec.SECP256R1())), "Ed25519"),
    "rsa": (pem(rsa.generate_private_key(65537, 2048)), "RSA"),
    "public_key": (
        ED25519.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        "PKCS#8",
    ),
    "openssh": (pem(ED25519, PrivateFormat.OpenSSH), "PKCS#8"),
    "cut_off": (pem(ED25519)[:60], "damaged"),
    "changed": (pem(ED25519).replace(b"MC4C", b"MC5C"), "damaged"),
    "too_long": (pem(ED25519)[:40] + b"A" * 20_000, "damaged"),
}


@pytest.mark.parametrize("name", BAD_KEYS)
def test_a_file_that_is_no_identity_is_refused(name: str, tmp_path: Path) -> None:
    data, says = BAD_KEYS[name]
    path = tmp_path / f"bad_{name}.pem"
    path.write_bytes(data)
    path.chmod(0o600)
    with pytest.raises(KeyFormatError, match=says) as caught:
        load_identity(path, None)
    assert str(path) in str(caught.value)
    assert not secrets_in(caught.value, bytes(range(32)))


def test_another_type_of_key_under_a_passphrase(tmp_path: Path) -> None:
    path = tmp_path / "identity.pem"
    path.write_bytes(pem(x25519.X25519PrivateKey.generate(), passphrase=PASSPHRASE))
    path.chmod(0o600)
    with pytest.raises(KeyFormatError, match="X25519"):
        load_identity(path, PASSPHRASE)


def test_a_file_that_openssl_has_encrypted_with_scrypt_opens(tmp_path: Path) -> None:
    """`openssl pkcs8 -topk8 -scrypt -scrypt_N 16384`: slower to guess at than what we write ourselves."""
    path = tmp_path / "identity.pem"
    path.write_text(
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\n"
        "MIGTME8GCSqGSIb3DQEFDTBCMCEGCSsGAQQB2kcECzAUBAioSNU1Lvx0lAICQAAC\n"
        "AQgCAQUwHQYJYIZIAWUDBAEqBBD3QWCViJRJZbVULdg3znShBEA8hcSv2Qw9hGtZ\n"
        "8o9hLH/l0GcdL6IYyYa9yM9++0eCdSz2TzwjCcGU3/KaY9H8nkeO0o2RqMfU0lg4\n"
        "CFPCBnZ/\n"
        "-----END ENCRYPTED PRIVATE KEY-----\n"
    )
    path.chmod(0o600)
    assert len(load_identity(path, b"abcabcabcabc").public) == 32
    with pytest.raises(PassphraseError):
        load_identity(path, b"abcabcabcabd")


def test_an_exposed_or_missing_identity_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "identity.pem"
    with pytest.raises(MissingKeyError, match=r"identity\.pem"):
        load_identity(path, None)
    create_identity(path, Stream(3), None)
    path.chmod(0o640)
    with pytest.raises(ExposedKeyError, match="0640"):
        load_identity(path, None)


# A site's folder


def make_site(tmp_path: Path, name: str = "north", seed: int = 5) -> SiteFolder:
    folder = SiteFolder(tmp_path / name)
    create_site(folder, name, Stream(seed), None)
    return folder


def test_a_new_site_has_its_keys_and_its_card(tmp_path: Path) -> None:
    folder = make_site(tmp_path)
    assert {path.name for path in folder.path.iterdir()} == {"identity.pem", "local.key", "site.pub"}
    assert mode_of(folder.path) == 0o700
    assert mode_of(folder.identity) == mode_of(folder.local_key) == 0o600
    card = load_card(folder.card)
    assert card.name == "north"
    assert card.public == load_identity(folder.identity, None).public
    local = load_local_key(folder.local_key)
    assert len(local) == 32
    assert local.reveal() not in folder.card.read_bytes() + folder.identity.read_bytes()
    assert local.reveal().hex() not in repr(local) + repr(folder) + repr(card)


def test_new_keys_for_the_node_and_the_site_stays_who_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = SiteFolder(tmp_path / "north")
    old = create_site(folder, "north", Stream(5), None, deployed=True)
    kept = {path: path.read_bytes() for path in (folder.identity, folder.local_key)}
    changed = {path: path.read_bytes() for path in (folder.node_key, folder.executor_secret)}
    card = rekey_site(folder, Stream(6), None)
    assert (card.name, card.public) == (old.name, old.public) and card.node != old.node
    assert load_card(folder.card) == card
    assert all(path.read_bytes() == data for path, data in kept.items())
    assert all(path.read_bytes() != data and mode_of(path) == 0o600 for path, data in changed.items())
    key = load_ssh_private_key(folder.node_key.read_bytes(), None)
    public = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert public == card.node
    # Cut off before the key was replaced: the next call makes both anew.
    with monkeypatch.context() as patch:
        patch.setattr(client.identity, "replace_private", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            rekey_site(folder, Stream(7), None)
    (folder.path / ".node.key.new").write_bytes(b"half a k")
    again = rekey_site(folder, Stream(8), None)
    key = load_ssh_private_key(folder.node_key.read_bytes(), None)
    assert key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) == again.node
    assert not (folder.path / ".node.key.new").exists()


def test_a_simulated_site_has_no_node_to_make_a_key_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="only simulated"):
        rekey_site(make_site(tmp_path), Stream(6), None)


@pytest.mark.parametrize("left", ["identity", "local_key", "card"])
def test_a_folder_with_anything_of_a_site_is_left_alone(left: str, tmp_path: Path) -> None:
    folder = SiteFolder(tmp_path)
    getattr(folder, left).write_bytes(b"there before")
    with pytest.raises(KeyExistsError, match="never"):
        create_site(folder, "north", Stream(5), None)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"there before"]


def test_a_bad_name_or_passphrase_leaves_nothing(tmp_path: Path) -> None:
    folder = SiteFolder(tmp_path / "site")
    with pytest.raises(CardFormatError, match="--name"):
        create_site(folder, "nörth", Stream(5), None)
    assert not folder.path.exists()
    with pytest.raises(PassphraseError):
        create_site(folder, "north", Stream(5), b"short")
    assert list(folder.path.iterdir()) == []
    create_site(folder, "north", Stream(5), None)


@pytest.mark.parametrize("size", [0, 31, 33, 1000])
def test_a_local_key_of_another_length_is_refused(size: int, tmp_path: Path) -> None:
    folder = make_site(tmp_path)
    folder.local_key.write_bytes(bytes(size))
    with pytest.raises(KeyFormatError, match="32 bytes"):
        load_local_key(folder.local_key)


# Pinning


def roster_of(
    *folders: SiteFolder,
    version: int = 1,
    authority: IdentityKey = AUTHORITY,
    federation: str = "study",
    retired: tuple[SiteFolder, ...] = (),
) -> SignedRoster:
    cards = {folder: load_card(folder.card) for folder in (*folders, *retired)}
    ids = {folder: number for number, folder in enumerate(cards, start=1)}
    rows = {folder: Member(ids[folder], card.name, card.public) for folder, card in cards.items()}
    return sign_roster(
        federation,
        version,
        [rows[folder] for folder in folders],
        [rows[folder] for folder in retired],
        authority,
    )


def put(tmp_path: Path, roster: SignedRoster) -> Path:
    path = tmp_path / "arrived.json"
    path.write_bytes(roster.encode())
    return path


def test_a_pinned_roster_comes_back(tmp_path: Path) -> None:
    folder, other = make_site(tmp_path), make_site(tmp_path, "south", 6)
    roster = roster_of(other, folder)
    with pytest.raises(NotPinnedError, match="confide client pin"):
        load_pinned(folder)
    pinned = pin(folder, put(tmp_path, roster), fingerprint(AUTHORITY.public))
    assert pinned == load_pinned(folder)
    assert (pinned.member.id, pinned.member.name, pinned.roster) == (2, "north", roster)
    assert pinned.roster.keys[2] == load_identity(folder.identity, None).public
    # Later: the authority is known, again or by name or not.
    newer = roster_of(other, folder, version=2)
    for authority in (None, AUTHORITY.public.hex(), fingerprint(AUTHORITY.public)):
        assert pin(folder, put(tmp_path, newer), authority).roster.version == 2


REFUSALS: dict[str, tuple[dict[str, object], type[ConfideError]]] = {
    "older": ({"version": 4}, RosterRollbackError),
    "fork": ({"with_other": False}, RosterForkError),
    "other_authority": ({"version": 6, "authority": IMPOSTOR}, OtherAuthorityError),
    "other_federation": ({"version": 6, "federation": "trial"}, OtherFederationError),
    "without_this_site": ({"version": 6, "with_own": False}, RosterRollbackError),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_follow_is_not_pinned(name: str, tmp_path: Path) -> None:
    changes, error = REFUSALS[name]
    changes = dict(changes)
    folder, other = make_site(tmp_path), make_site(tmp_path, "south", 6)
    pin(folder, put(tmp_path, roster_of(folder, other, version=5)), fingerprint(AUTHORITY.public))
    before = {path: path.read_bytes() for path in folder.path.iterdir()}
    folders = [folder] if changes.pop("with_own", True) else []
    folders += [other] if changes.pop("with_other", True) else []
    offered = roster_of(*folders, **{"version": 5, **changes})  # type: ignore[arg-type]
    with pytest.raises(error):
        pin(folder, put(tmp_path, offered), None)
    assert {path: path.read_bytes() for path in folder.path.iterdir()} == before


def test_the_first_pin_needs_the_authority_by_name(tmp_path: Path) -> None:
    folder = make_site(tmp_path)
    genuine, forged = roster_of(folder), roster_of(folder, authority=IMPOSTOR)
    with pytest.raises(NotPinnedError, match="--authority"):
        pin(folder, put(tmp_path, genuine), None)
    with pytest.raises(OtherAuthorityError):
        pin(folder, put(tmp_path, forged), fingerprint(AUTHORITY.public))
    with pytest.raises(ConfigError, match="expected a fingerprint"):
        pin(folder, put(tmp_path, genuine), "our authority")
    assert not folder.authority.exists()
    assert not folder.roster.exists()


def test_another_authority_by_name_does_not_replace_the_pinned_one(tmp_path: Path) -> None:
    folder = make_site(tmp_path)
    pin(folder, put(tmp_path, roster_of(folder)), fingerprint(AUTHORITY.public))
    for authority, offered in ((IMPOSTOR, IMPOSTOR), (IMPOSTOR, AUTHORITY)):
        with pytest.raises(OtherAuthorityError):
            roster = roster_of(folder, version=2, authority=offered)
            pin(folder, put(tmp_path, roster), fingerprint(authority.public))
    assert load_pinned(folder).roster.authority == AUTHORITY.public


def test_the_authority_stays_pinned_when_the_roster_is_lost(tmp_path: Path) -> None:
    folder = make_site(tmp_path)
    pin(folder, put(tmp_path, roster_of(folder)), fingerprint(AUTHORITY.public))
    folder.roster.unlink()
    with pytest.raises(NotPinnedError):
        load_pinned(folder)
    with pytest.raises(OtherAuthorityError):
        pin(folder, put(tmp_path, roster_of(folder, authority=IMPOSTOR)), None)
    assert pin(folder, put(tmp_path, roster_of(folder)), None).member.id == 1


def test_a_site_that_is_not_in_the_roster(tmp_path: Path) -> None:
    folder, other = make_site(tmp_path), make_site(tmp_path, "south", 6)
    with pytest.raises(NotAMemberError, match="enrolled"):
        pin(folder, put(tmp_path, roster_of(other)), fingerprint(AUTHORITY.public))
    with pytest.raises(NotAMemberError, match="revoked"):
        revoked = roster_of(other, retired=(folder,))
        pin(folder, put(tmp_path, revoked), fingerprint(AUTHORITY.public))


def test_damage_to_what_is_pinned_is_noticed(tmp_path: Path) -> None:
    folder = make_site(tmp_path)
    roster = roster_of(folder)
    pin(folder, put(tmp_path, roster), fingerprint(AUTHORITY.public))
    good = {path: path.read_bytes() for path in (folder.authority, folder.roster, folder.card)}
    forged = roster_of(folder, authority=IMPOSTOR).encode()
    bad: list[tuple[Path, bytes, type[ConfideError]]] = [
        (folder.roster, good[folder.roster][:-1], RosterFormatError),
        (folder.roster, good[folder.roster].replace(b"north", b"nurth"), RosterSignatureError),
        (folder.roster, forged, OtherAuthorityError),
        (folder.authority, IMPOSTOR.public.hex().encode() + b"\n", OtherAuthorityError),
        (folder.authority, b"", KeyFormatError),
        (folder.authority, good[folder.authority].upper(), KeyFormatError),
        (folder.card, good[folder.card].replace(b"north", b"nurth"), CardProofError),
        (folder.card, make_site(tmp_path, "south", 6).card.read_bytes(), NotAMemberError),
    ]
    for path, data, error in bad:
        path.write_bytes(data)
        with pytest.raises(error):
            load_pinned(folder)
        path.write_bytes(good[path])
    assert load_pinned(folder).roster == roster
