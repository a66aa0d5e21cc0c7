"""A site's kit: what it needs to take part, and no secret of anybody's. A folder, or a tar of one.

    kit.json     the server's address, and the authority's signature over it, ca.pem and the site
    roster.json  the roster, signed by the same authority
    ca.pem       whose certificate the server must show
    policy.toml  the strict policy, to be filled in by the site's own people
    README.md    what to type

A site takes it only if the authority that its people have named on the phone has signed both.
"""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

from common.errors import ConfigError, ProtocolError
from common.identity import (
    check_name,
    check_signature,
    check_spelling,
    fingerprint,
    hex_bytes,
    json_bytes,
    read_json,
    take,
)
from common.roster import MAX_ROSTER_BYTES, SignedRoster
from common.secagg import keys, transcript
from common.secagg.keys import IdentityKey

KIT_FORMAT = "confide-kit/1"
LABEL_KIT = b"site kit"
KIT_FILE, ROSTER_FILE, CA_FILE, POLICY_FILE, README_FILE = (
    "kit.json",
    "roster.json",
    "ca.pem",
    "policy.toml",
    "README.md",
)
_NAMES = frozenset({KIT_FILE, ROSTER_FILE, CA_FILE, POLICY_FILE, README_FILE})
_MAX_SMALL_BYTES = 64 * 1024
MAX_KIT_BYTES = MAX_ROSTER_BYTES + 8 * _MAX_SMALL_BYTES


class KitFormatError(ConfigError):
    """A folder or file is not a kit."""


class KitSignatureError(ProtocolError):
    """A kit is not signed by the authority of its roster: it was changed, or somebody else made it."""


@dataclass(frozen=True)
class Kit:
    """address: host:port of the gate. authority_tls: PEM. signature: of the roster's authority.

    Raises:
        KitFormatError: a field has another form. KitSignatureError: the signature does not hold.
    """

    federation: str
    address: str
    roster: SignedRoster
    authority_tls: bytes
    policy: str
    readme: str
    signature: bytes

    def __post_init__(self) -> None:
        try:
            check_name(self.federation)
            check_address(self.address)
            check_signature(self.signature)
        except ValueError as error:
            raise KitFormatError(f"not a kit: {error}") from None
        said = _statement(self.federation, self.address, self.authority_tls)
        signed = keys.verify(self.roster.authority, said, self.signature)
        if not signed or self.federation != self.roster.federation:
            raise KitSignatureError(
                "this kit is not signed by the authority "
                f"{fingerprint(self.roster.authority)} of its roster: it was changed on its way. Ask the "
                "federation's people for it again"
            )

    def files(self) -> dict[str, bytes]:
        told = {
            "format": KIT_FORMAT,
            "federation": self.federation,
            "address": self.address,
            "signature": self.signature.hex(),
        }
        return {
            KIT_FILE: json_bytes(told),
            ROSTER_FILE: self.roster.encode(),
            CA_FILE: self.authority_tls,
            POLICY_FILE: self.policy.encode(),
            README_FILE: self.readme.encode(),
        }

    def tar(self) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for name, data in self.files().items():
                info = tarfile.TarInfo(f"kit/{name}")
                info.size, info.mode = len(data), 0o644
                archive.addfile(info, io.BytesIO(data))
        return out.getvalue()


def make_kit(
    roster: SignedRoster, address: str, authority_tls: bytes, policy: str, readme: str, authority: IdentityKey
) -> Kit:
    """Raises KitFormatError: the address is none."""
    signature = authority.sign(_statement(roster.federation, address, authority_tls))
    return Kit(roster.federation, address, roster, authority_tls, policy, readme, signature)


def read_kit(path: Path) -> Kit:
    """A kit in a folder or a tar.

    Raises:
        KitFormatError, KitSignatureError; all of `SignedRoster.decode`.
    """
    files = _folder(path) if path.is_dir() else _tar(path)
    if files.keys() != _NAMES:
        raise KitFormatError(
            f"{path} is no kit: expected {', '.join(sorted(_NAMES))}, found "
            f"{', '.join(sorted(files)) or 'none'}"
        )
    try:
        told = files[KIT_FILE]
        federation, address, signature = take(
            read_json(told, _MAX_SMALL_BYTES), KIT_FORMAT, "federation", "address", "signature"
        )
        kit = Kit(
            check_name(federation),
            check_address(address),
            SignedRoster.decode(files[ROSTER_FILE]),
            files[CA_FILE],
            files[POLICY_FILE].decode("utf-8"),
            files[README_FILE].decode("utf-8"),
            hex_bytes("signature", signature),
        )
        check_spelling(kit.files()[KIT_FILE], told)
    except ValueError as error:
        raise KitFormatError(f"{path} is no kit: {error}") from None
    return kit


def check_address(address: object) -> str:
    """Raises ValueError unless it is host:port."""
    host, _, port = address.rpartition(":") if isinstance(address, str) else ("", "", "")
    plain = host and len(host) <= 255 and all(c.isascii() and (c.isalnum() or c in ".-:[]_") for c in host)
    if not plain or not port.isdigit() or not 1 <= int(port) <= 65535:
        raise ValueError(f"an address is host:port, found {str(address)[:80]!r}")
    return str(address)


def _statement(federation: str, address: str, authority_tls: bytes) -> bytes:
    return transcript.digest(LABEL_KIT, federation.encode(), address.encode(), authority_tls)


def _folder(path: Path) -> dict[str, bytes]:
    found = {}
    for name in sorted(_NAMES):
        if (path / name).is_file():
            found[name] = _limited(name, (path / name).read_bytes())
    return found


def _tar(path: Path) -> dict[str, bytes]:
    if not path.is_file():
        raise KitFormatError(f"no kit at {path}: expected the folder or tar that you were sent")
    if path.stat().st_size > MAX_KIT_BYTES:
        raise KitFormatError(f"{path} is too large for a kit")
    found = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for info in archive:
                name = info.name.removeprefix("kit/")
                file = archive.extractfile(info) if info.isfile() and name in _NAMES else None
                if file is None or name in found:
                    raise KitFormatError(f"{path} is no kit: it holds {info.name[:80]!r}")
                found[name] = _limited(name, file.read(MAX_KIT_BYTES))
    except tarfile.TarError as error:
        raise KitFormatError(f"{path} is no kit: {error}") from None
    return found


def _limited(name: str, data: bytes) -> bytes:
    limit = MAX_ROSTER_BYTES if name == ROSTER_FILE else _MAX_SMALL_BYTES
    if len(data) > limit:
        raise KitFormatError(f"{name} of the kit has more than {limit} bytes")
    return data
