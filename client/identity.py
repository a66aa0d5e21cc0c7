"""A site's identity: its Ed25519 key, its local key, and what it has pinned, in one folder.

    identity.pem   the site's long-term private key: secret, perhaps under a passphrase
    local.key      32 random bytes that seal what the site stores: secret, of use at this site only
    node.key       under which its Flower node shows itself to the server: secret (deployed sites)
    site.pub       the card that the federation enrolls
    authority.pub  the pinned key of the federation's authority
    roster.json    the pinned roster
    waiting.update an encoded update between training and its upload, sealed (client/store.py)
    policy.toml    what the site allows, in its own words (client/policy.py)
    ledger.sqlite  what has been spent of its records' privacy (client/ledger.py)
    site.toml      where its records lie, and how this machine runs them (client/settings.py)
    server.json    where the server is, and ca.pem, whose certificate it must show (client/kit.py)
    bundles/       jobs that its people have approved, and the last one that they have not (client/bundles.py)

None of it ever comes from the server: people carry `site.pub` and `roster.json`, and compare fingerprints.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from common.errors import ConfigError
from common.files import write_atomically
from common.identity import (
    CardFormatError,
    KeyExistsError,
    SiteCard,
    check_name,
    create_private,
    fingerprint,
    is_named_by,
    load_card,
    make_card,
    make_folder,
    read_private,
    replace_private,
)
from common.roster import Member, OtherAuthorityError, SignedRoster, load_roster, newer
from common.secagg.keys import KEY_BYTES, PUBLIC_BYTES, IdentityKey, RandomBytes, Secret

MAX_PEM_BYTES = 16 * 1024
LONGEST_PASSPHRASE = 1000
SHORTEST_PASSPHRASE = 12
"""Bytes. `BestAvailableEncryption` stretches with 2,048 rounds of PBKDF2-HMAC-SHA-256, which slows a search
down by little: the passphrase itself must be long. A file re-encrypted with `openssl pkcs8 -topk8 -scrypt`
opens as well."""


class PassphraseError(ConfigError):
    """The passphrase is wrong, missing, too short, or given for a key that has none."""


class KeyFormatError(ConfigError):
    """A secret file does not hold the kind of key that it should."""


class NotPinnedError(ConfigError):
    """The site has not pinned an authority and a roster yet."""


class NotAMemberError(ConfigError):
    """The roster does not have this site's key."""


@dataclass(frozen=True)
class SiteFolder:
    """Names of what lies in a site's folder."""

    path: Path

    @property
    def identity(self) -> Path:
        return self.path / "identity.pem"

    @property
    def local_key(self) -> Path:
        return self.path / "local.key"

    @property
    def node_key(self) -> Path:
        return self.path / "node.key"

    @property
    def executor_secret(self) -> Path:
        """Shared by the site's node and its executor: nobody else on this machine may claim its tasks."""
        return self.path / "executor.key"

    @property
    def settings(self) -> Path:
        return self.path / "site.toml"

    @property
    def server(self) -> Path:
        return self.path / "server.json"

    @property
    def authority_tls(self) -> Path:
        return self.path / "ca.pem"

    @property
    def bundles(self) -> Path:
        return self.path / "bundles"

    @property
    def logs(self) -> Path:
        return self.path / "log"

    @property
    def card(self) -> Path:
        return self.path / "site.pub"

    @property
    def authority(self) -> Path:
        return self.path / "authority.pub"

    @property
    def roster(self) -> Path:
        return self.path / "roster.json"

    @property
    def waiting(self) -> Path:
        return self.path / "waiting.update"

    @property
    def policy(self) -> Path:
        return self.path / "policy.toml"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.sqlite"

    @property
    def witness(self) -> Path:
        """Of the ledger. Beside the folder, so that a restored backup of that is noticed.

        `north` has `north.witness/ledger`; a simulated site, as `sites/0001`, has `witnesses/0001.ledger`
        in the folder of its run.
        """
        here = self.path.resolve()
        of_run = here.parent.parent / "witnesses"
        if here.parent.name == "sites" and of_run.is_dir():
            return of_run / f"{here.name}.ledger"
        return here.with_name(f"{here.name}.witness") / "ledger"


# Secret keys


def create_identity(path: Path, random_bytes: RandomBytes, passphrase: bytes | None) -> IdentityKey:
    """A new identity in a new file: PKCS#8 PEM, mode 0600, encrypted if there is a passphrase.

    Raises:
        KeyExistsError: the file is there already. PassphraseError: the passphrase is too short or too long.
    """
    if passphrase is not None and not SHORTEST_PASSPHRASE <= len(passphrase) <= LONGEST_PASSPHRASE:
        raise PassphraseError(
            f"a passphrase must have {SHORTEST_PASSPHRASE} to {LONGEST_PASSPHRASE} bytes, found "
            f"{len(passphrase)}: take five random words, for example"
        )
    seed = Secret(random_bytes(KEY_BYTES))
    encryption: KeySerializationEncryption = (
        NoEncryption() if passphrase is None else BestAvailableEncryption(passphrase)
    )
    key = Ed25519PrivateKey.from_private_bytes(seed.reveal())
    create_private(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
    return IdentityKey(seed)


def load_identity(path: Path, passphrase: bytes | None) -> IdentityKey:
    """The identity in `path`.

    Raises:
        MissingKeyError, ExposedKeyError: see `read_private`. PassphraseError: see there.
        KeyFormatError: it is not a PKCS#8 PEM file, or holds another type of key.
    """
    pem = read_private(path, MAX_PEM_BYTES)
    encrypted = pem.startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----")
    if not encrypted and not pem.startswith(b"-----BEGIN PRIVATE KEY-----"):
        raise KeyFormatError(f"{path} is not a private key in PKCS#8 PEM: restore the file from a backup")
    if encrypted and passphrase is None:
        raise PassphraseError(f"{path} is under a passphrase, and none was given: use --passphrase-file")
    if not encrypted and passphrase is not None:
        raise PassphraseError(
            f"{path} is under no passphrase, but one was given: leave it out, if that is as it should be"
        )
    try:
        key = load_pem_private_key(pem, passphrase)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        if encrypted:
            raise PassphraseError(
                f"{path} does not open: the passphrase is wrong or the file damaged"
            ) from None
        raise KeyFormatError(f"{path} is damaged: restore the file from a backup") from None
    if not isinstance(key, Ed25519PrivateKey):
        kind = type(key).__name__.lstrip("_")
        raise KeyFormatError(
            f"{path} must hold an Ed25519 key, found {kind}: make one with confide client init"
        )
    return IdentityKey(Secret(key.private_bytes_raw()))


def load_local_key(path: Path) -> Secret:
    """Raises MissingKeyError, ExposedKeyError, or KeyFormatError: it is not 32 bytes."""
    key = read_private(path, KEY_BYTES)
    if len(key) != KEY_BYTES:
        raise KeyFormatError(f"{path} must have {KEY_BYTES} bytes: restore the file from a backup")
    return Secret(key)


def create_node_key() -> tuple[bytes, bytes]:
    """A new P-384 key, in OpenSSH's form as Flower reads it, and its public half."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    return private, key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def create_site(
    folder: SiteFolder,
    name: str,
    random_bytes: RandomBytes,
    passphrase: bytes | None,
    *,
    deployed: bool = False,
) -> SiteCard:
    """Make the folder's keys and its card. A folder that has any of them is left as it is.

    deployed: with a key for its Flower node and a secret for its executor; a simulated site has no node.

    Raises:
        KeyExistsError, PassphraseError, CardFormatError.
    """
    own = (folder.identity, folder.local_key, folder.card, folder.node_key, folder.executor_secret)
    for path in own:
        if path.exists():
            raise KeyExistsError(
                f"{path} is there already and is never overwritten: choose another folder. If an earlier "
                "init was cut off, remove what it left"
            )
    try:
        check_name(name)
    except ValueError as error:
        raise CardFormatError(f"{error}. Choose one with --name") from None
    make_folder(folder.path)
    identity = create_identity(folder.identity, random_bytes, passphrase)
    create_private(folder.local_key, random_bytes(KEY_BYTES))
    node = b""
    if deployed:
        private, node = create_node_key()
        create_private(folder.node_key, private)
        create_private(folder.executor_secret, random_bytes(KEY_BYTES))
    card = make_card(name, identity, node)
    write_atomically(folder.card, card.encode())
    return card


def rekey_site(folder: SiteFolder, random_bytes: RandomBytes, passphrase: bytes | None) -> SiteCard:
    """A new key for the site's node and a new secret for its executor, and the card that says so.

    The site stays who it is: its identity signs the new card, and its ledger goes on. The card is written
    first: cut off after that, the node still has the old key, and the next call makes both anew.

    Raises:
        ConfigError: a simulated site, which has no node. All of `own_card` and `load_identity`. Nothing is
        changed then.
    """
    old = own_card(folder)
    if not old.node:
        raise ConfigError(f"the site in {folder.path} has no node to make a key for: it is only simulated")
    identity = load_identity(folder.identity, passphrase)
    private, node = create_node_key()
    card = make_card(old.name, identity, node)
    write_atomically(folder.card, card.encode())
    replace_private(folder.node_key, private)
    replace_private(folder.executor_secret, random_bytes(KEY_BYTES))
    return card


def own_card(folder: SiteFolder) -> SiteCard:
    """Raises ConfigError: this is no site's folder. CardFormatError, CardProofError: its card is damaged."""
    if not folder.card.is_file():
        raise ConfigError(f"{folder.path} is no site's folder: make one with confide client init")
    return load_card(folder.card)


# What is pinned


@dataclass(frozen=True)
class Pinned:
    """A site's own entry in the roster that it has pinned."""

    member: Member
    roster: SignedRoster


def pin(folder: SiteFolder, source: Path, authority: str | None) -> Pinned:
    """Pin the roster in the file `source`; the first time, its authority too.

    authority: fingerprint or key in hex. Needed the first time; later it must still be the same one.

    Raises:
        NotPinnedError: there is no authority yet. NotAMemberError: the roster is without this site's key.
        All of `load_roster` and `newer`.
    """
    card = own_card(folder)
    pinned = _load_authority(folder) if folder.authority.exists() else None
    # 1. Signed by the authority that is pinned, or that is named now.
    if pinned is None and authority is None:
        raise NotPinnedError(
            f"no authority is pinned in {folder.path} yet: give its fingerprint with --authority, as the "
            "federation's people told you over a channel of your own, not as the roster's file says"
        )
    roster = load_roster(source, pinned)
    if authority is not None and not is_named_by(roster.authority, authority):
        raise OtherAuthorityError(
            f"{source} is signed by the authority {fingerprint(roster.authority)}, not by the one that was "
            "given: do not use it before the federation's people have confirmed which is theirs"
        )
    # 2. Forward from the pinned roster.
    if pinned is not None and folder.roster.exists():
        newer(load_roster(folder.roster, pinned), roster)
    # 3. With this site in it.
    member = _own_entry(card, roster)
    write_atomically(folder.authority, roster.authority.hex().encode() + b"\n")
    write_atomically(folder.roster, roster.encode())
    return Pinned(member, roster)


def load_pinned(folder: SiteFolder) -> Pinned:
    """What this site has pinned, verified again.

    Raises:
        NotPinnedError, NotAMemberError; all of `load_roster`.
    """
    card = own_card(folder)
    if not folder.authority.exists() or not folder.roster.exists():
        raise NotPinnedError(
            f"no roster is pinned in {folder.path} yet: have {folder.card.name} enrolled by the federation, "
            "then run confide client pin"
        )
    roster = load_roster(folder.roster, _load_authority(folder))
    return Pinned(_own_entry(card, roster), roster)


def _load_authority(folder: SiteFolder) -> bytes:
    text = folder.authority.read_bytes()
    if not re.fullmatch(rb"[0-9a-f]{%d}\n" % (2 * PUBLIC_BYTES), text):
        raise KeyFormatError(
            f"{folder.authority} must hold the authority's key as {2 * PUBLIC_BYTES} hex digits: remove it "
            "and pin again with --authority"
        )
    return bytes.fromhex(text.decode())


def _own_entry(card: SiteCard, roster: SignedRoster) -> Member:
    member = roster.member(card.public)
    if member is not None:
        return member
    own = f"this site's key {fingerprint(card.public)}"
    if any(gone.public == card.public for gone in roster.retired):
        raise NotAMemberError(
            f"{own} was revoked: make a new one with confide client init, in another folder"
        )
    raise NotAMemberError(
        f"{own} is not in version {roster.version} of the roster: have {card.name!r} enrolled with its "
        "site.pub, then pin the roster that comes of it"
    )
