"""What a key stands for: names, fingerprints, a site's card, and files that hold secrets.

A card (`site.pub`) is what a site hands to the federation: its name, its Ed25519 public key, the public key
of its Flower node, and a signature that proves that it has the private one and has named all of them
together. Cards and rosters are JSON files with one spelling only: what does not encode back to the same
bytes is refused.
"""

from __future__ import annotations

import base64
import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from common.errors import ConfigError, PrivacyError, ProtocolError
from common.files import sync_folder
from common.secagg import keys, transcript
from common.secagg.keys import PUBLIC_BYTES, SIGNATURE_BYTES, IdentityKey

CARD_FORMAT = "confide-site/2"
LABEL_CARD = b"site card"
LABEL_FINGERPRINT = b"fingerprint"
MAX_CARD_BYTES = 4096
FINGERPRINT_BYTES = 20
"""160 bits: nobody finds a second key with the same ones, and 32 letters can be read out on the phone."""

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9 ._-]{0,62}[A-Za-z0-9])?")

# The y-coordinates of the points of order 1, 2, 4 and 8 on edwards25519. A signature that holds under
# such a key can be made without a private key, so the key would be nobody's.
_LOW_ORDER_Y = frozenset(
    {
        0,
        1,
        keys.FIELD_PRIME - 1,
        0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD84D3D706A17C7,
        0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826,
    }
)


class CardFormatError(ConfigError):
    """A file is not a site's card."""


class CardProofError(ProtocolError):
    """A card's signature does not prove that its site has the private key."""


class KeyExistsError(ConfigError):
    """A secret file is already there. It is never overwritten."""


class MissingKeyError(ConfigError):
    """A secret file is not there."""


class ExposedKeyError(PrivacyError):
    """Others on this machine may read or change a secret file."""


# Keys and names


def fingerprint(public: bytes) -> str:
    """What people compare over the phone: eight groups of four letters and digits (base32, 160 bits)."""
    text = base64.b32encode(transcript.digest(LABEL_FINGERPRINT, public)[:FINGERPRINT_BYTES]).decode()
    return "-".join(text[i : i + 4] for i in range(0, len(text), 4))


def is_named_by(public: bytes, text: str) -> bool:
    """Whether `text` is this key's fingerprint, or the key itself in hex; spaces and hyphens do not count.

    Raises:
        ConfigError: it is neither of any key.
    """
    bare = re.sub(r"[\s:-]", "", text).upper()
    if re.fullmatch(r"[0-9A-F]{64}", bare):
        return bytes.fromhex(bare) == public
    if re.fullmatch(r"[A-Z2-7]{32}", bare):
        return bare == fingerprint(public).replace("-", "")
    raise ConfigError(
        "expected a fingerprint (32 letters and digits, in groups of four) or a key (64 hex digits), found "
        f"{brief(text)}: the federation's people read theirs with `confide server roster FOLDER`"
    )


def check_name(name: object) -> str:
    """Raises ValueError unless this can be the name of a site or a federation."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            "a name has 1 to 64 letters, digits, spaces or ._-, with a letter or digit at both ends, "
            f"found {brief(name)}"
        )
    return name


def check_key(what: str, public: object) -> None:
    """Raises ValueError unless only the holder of a private key can sign for `public`."""
    if not isinstance(public, bytes) or len(public) != PUBLIC_BYTES:
        raise ValueError(f"{what} must be the 32 bytes of an Ed25519 public key")
    y = int.from_bytes(public, "little") & (2**255 - 1)
    if y >= keys.FIELD_PRIME or y in _LOW_ORDER_Y:
        raise ValueError(f"{what} is malformed or of low order: others could sign for it")


def check_node(node: object) -> None:
    """Raises ValueError unless it is empty, or the one spelling of a P-384 public key in DER."""
    if node == b"":
        return
    try:
        key = load_der_public_key(node) if isinstance(node, bytes) else None
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ValueError("the node's key must be a P-384 public key in DER")
    if key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) != node:
        raise ValueError("the node's key is spelled in another way")


def check_signature(signature: object) -> None:
    """Raises ValueError unless it has the length of one."""
    if not isinstance(signature, bytes) or len(signature) != SIGNATURE_BYTES:
        raise ValueError(f"a signature must have {SIGNATURE_BYTES} bytes")


def check_integer(what: str, value: object, least: int, most: int) -> None:
    """Raises ValueError unless it is one, and no `bool`, within both bounds."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{what} must be a whole number from {least} to {most}, found {brief(value)}")


def brief(value: object) -> str:
    """For a message: a stranger's value in plain letters, cut off where it gets long."""
    if isinstance(value, str | int | float | None):
        text = ascii(value)
        return text if len(text) <= 80 else text[:77] + "..."
    return f"a {type(value).__name__}"


# The card


@dataclass(frozen=True)
class SiteCard:
    """A site's name and public key, and the signature that proves it has the private one.

    node: the P-384 key under which its Flower node shows itself, SubjectPublicKeyInfo in DER; empty for a
    site that is only simulated.

    Raises:
        CardFormatError: a field has another form. CardProofError: the proof does not hold.
    """

    name: str
    public: bytes
    node: bytes
    proof: bytes

    def __post_init__(self) -> None:
        try:
            check_name(self.name)
            check_key("the site's key", self.public)
            check_node(self.node)
            check_signature(self.proof)
        except ValueError as error:
            raise CardFormatError(f"not a site's card: {error}") from None
        if not keys.verify(self.public, _card_statement(self.name, self.public, self.node), self.proof):
            raise CardProofError(
                f"the card of {self.name!r} is not signed by the key that it names: it was changed on its "
                "way, or its sender does not have the key. Ask the site for its site.pub again"
            )

    def encode(self) -> bytes:
        return json_bytes(
            {
                "format": CARD_FORMAT,
                "name": self.name,
                "public": self.public.hex(),
                "node": self.node.hex(),
                "proof": self.proof.hex(),
            }
        )

    @classmethod
    def decode(cls, data: bytes) -> SiteCard:
        """Raises CardFormatError, CardProofError."""
        try:
            fields = read_json(data, MAX_CARD_BYTES)
            name, public, node, proof = take(fields, CARD_FORMAT, "name", "public", "node", "proof")
            card = cls(
                check_name(name),
                hex_bytes("public", public),
                hex_bytes("node", node),
                hex_bytes("proof", proof),
            )
            check_spelling(card.encode(), data)
        except ValueError as error:
            raise CardFormatError(f"not a site's card: {error}. Ask the site for it again") from None
        return card


def make_card(name: str, identity: IdentityKey, node: bytes = b"") -> SiteCard:
    """Raises CardFormatError: `name` or `node` cannot be one."""
    try:
        check_node(node)
        statement = _card_statement(check_name(name), identity.public, node)
    except ValueError as error:
        raise CardFormatError(str(error)) from None
    return SiteCard(name, identity.public, node, identity.sign(statement))


def load_card(path: Path) -> SiteCard:
    """Raises CardFormatError, CardProofError."""
    try:
        return SiteCard.decode(read_limited(path, MAX_CARD_BYTES))
    except CardFormatError as error:
        raise CardFormatError(f"{path}: {error}") from None
    except CardProofError as error:
        raise CardProofError(f"{path}: {error}") from None


def _card_statement(name: str, public: bytes, node: bytes) -> bytes:
    return transcript.digest(LABEL_CARD, name.encode(), public, node)


# JSON that has one spelling


def json_bytes(fields: dict[str, Any]) -> bytes:
    """The one spelling: keys in the order given, one a line, ASCII, a newline at the end."""
    return json.dumps(fields, indent=1, ensure_ascii=True).encode() + b"\n"


def read_json(data: bytes, limit: int) -> object:
    """Raises ValueError: not JSON, or longer than `limit`. What JSON allows twice, `check_spelling` finds."""
    if len(data) > limit:
        raise ValueError(f"more than {limit} bytes")
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("lists within lists within lists") from None


def take(fields: object, form: str | None, *names: str) -> list[Any]:
    """The values under `names`. Raises ValueError: one is missing, another is there, or another format."""
    wanted = {*names, "format"} if form else {*names}
    if not isinstance(fields, dict) or fields.keys() != wanted:
        found = ", ".join(sorted(fields)) if isinstance(fields, dict) else fields
        raise ValueError(f"expected the keys {', '.join(sorted(wanted))}, found {brief(found)}")
    if form and fields["format"] != form:
        raise ValueError(f"expected the format {form}, found {brief(fields['format'])}")
    return [fields[name] for name in names]


def hex_bytes(what: str, value: object) -> bytes:
    """Raises ValueError unless it is lower-case hex."""
    if not isinstance(value, str) or not re.fullmatch(r"(?:[0-9a-f]{2})*", value):
        raise ValueError(f"{what} must be lower-case hex")
    return bytes.fromhex(value)


def check_spelling(expected: bytes, found: bytes) -> None:
    """Raises ValueError unless the file is what we would have written."""
    if expected != found:
        raise ValueError("it is spelled in another way (spaces, order, escapes, a key twice): it was edited")


def read_limited(path: Path, limit: int) -> bytes:
    """At most one byte more than `limit`, so that too long is noticed and not read."""
    if not path.is_file():
        raise ConfigError(f"{path} is not there: check the path")
    with path.open("rb") as file:
        return file.read(limit + 1)


# Secret files


def make_folder(folder: Path) -> None:
    """A folder for its owner alone, durably, and those above it; one that is there stays as it is.

    A file survives a power cut only with every folder on its path.
    """
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)
    sync_folder(folder.parent)


def create_private(path: Path, data: bytes) -> None:
    """A new file that only its owner can read, durably, the folder's entry included.

    Raises:
        KeyExistsError: something is there already; it is not touched.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise KeyExistsError(
            f"{path} is there already and is never overwritten: choose another folder, or move it away if "
            "you are sure that nothing needs it"
        ) from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o600)  # whatever the umask took away
            file.write(data)
            file.flush()
            os.fsync(descriptor)
    except BaseException:
        path.unlink()
        raise
    sync_folder(path.parent)


def replace_private(path: Path, data: bytes) -> None:
    """Put new bytes in the place of an old secret, whole or not at all; only its owner can read them."""
    aside = path.with_name(f".{path.name}.new")
    aside.unlink(missing_ok=True)  # what a crash has left
    create_private(aside, data)
    aside.replace(path)
    sync_folder(path.parent)


def read_private(path: Path, limit: int) -> bytes:
    """The bytes of a file that only its owner can read; at most one byte more than `limit`.

    Raises:
        MissingKeyError: it is not there, or not a file. ExposedKeyError: others may read or change it.
    """
    try:
        file = path.open("rb", buffering=0)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise MissingKeyError(f"{path} is not there: check the folder, or restore it from a backup") from None
    with file:
        mode = os.fstat(file.fileno()).st_mode
        if not stat.S_ISREG(mode):
            raise MissingKeyError(f"{path} is not a file: check the folder")
        if mode & 0o077:
            raise ExposedKeyError(
                f"{path} must be for its owner alone (mode 0600), found {stat.S_IMODE(mode):04o}: others "
                "on this machine may have read it. If nobody has, chmod 600 it; if somebody may have, make "
                "a new one and have this one revoked"
            )
        return file.read(limit + 1)
