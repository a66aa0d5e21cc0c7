"""Take part in a federation: from a kit to a site's folder that is ready to run."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from client.identity import Pinned, SiteFolder, pin
from client.settings import TEMPLATE
from common.errors import ConfigError
from common.files import write_atomically
from common.kit import check_address, read_kit


@dataclass(frozen=True)
class ServerAddress:
    """Where the server is, as the authority has signed it."""

    federation: str
    address: str


def join(folder: SiteFolder, source: Path, authority: str | None) -> Pinned:
    """Pin the kit's roster, then keep the server's address and certificate authority.

    authority: its fingerprint, from its people. Needed the first time; later kits must be of the same one.

    Raises:
        KitFormatError, KitSignatureError; all of `pin`. Nothing is changed then.
    """
    kit = read_kit(source)
    with tempfile.TemporaryDirectory() as aside:
        roster = Path(aside) / "roster.json"
        roster.write_bytes(kit.roster.encode())
        pinned = pin(folder, roster, authority)
    # The kit's signature is of its roster's authority, which is the pinned one.
    write_atomically(folder.authority_tls, kit.authority_tls)
    told = {"federation": kit.federation, "address": kit.address}
    write_atomically(folder.server, json.dumps(told, indent=1).encode() + b"\n")
    if not folder.settings.exists():
        write_atomically(folder.settings, TEMPLATE.encode())
    if not folder.policy.exists():
        write_atomically(folder.policy, kit.policy.encode())
    return pinned


def load_server(folder: SiteFolder) -> ServerAddress:
    """Raises ConfigError: the site has not joined, or the file is damaged."""
    if not folder.server.is_file() or not folder.authority_tls.is_file():
        raise ConfigError(f"{folder.path} has joined no federation yet: confide client join FOLDER KIT")
    try:
        told = json.loads(folder.server.read_bytes())
        return ServerAddress(str(told["federation"]), check_address(told["address"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder.server} is damaged ({error}): join again with the kit") from None
