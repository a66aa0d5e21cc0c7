"""What a federation's server needs to be reached: certificates, a secret, settings; and sites' kits."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from common.errors import ConfigError
from common.files import write_atomically
from common.identity import create_private
from common.kit import Kit, make_kit
from common.secagg.keys import KEY_BYTES, RandomBytes
from server import tls
from server.federation import FederationFolder, load_authority, load_federation
from server.settings import load_server_settings, template
from server.tls import TlsFolder

_README = """\
# Take part in {federation}

    confide client join FOLDER {kit} --authority THE-FINGERPRINT-THAT-WAS-READ-TO-YOU
    confide client run FOLDER        # after site.toml, confide client scope and confide client approve
"""
_POLICY = """\
# What this site allows. The server never sees this file, and nothing that it sends can widen a bound.
# Empty, it allows nothing; confide client policy FOLDER --explain says what every key means.
# confide client approve FOLDER adds a job, its model and your data source, and signs them into the ledger.
"""


def create_serving(
    folder: FederationFolder,
    name: str,
    hosts: Sequence[str],
    port: int,
    random_bytes: RandomBytes,
    now: datetime.datetime,
) -> None:
    """A certificate authority, the server's certificate for `hosts`, Flower's secret, and server.toml.

    Raises:
        ConfigError: a host or the port cannot be one.
    """
    if not 1 <= port <= 65531:
        raise ConfigError(f"--port must lie between 1 and 65531, found {port}")
    place = TlsFolder(folder.tls)
    tls.create_authority(place, name, now)
    tls.issue_server(place, hosts or ["localhost"], now)
    create_private(folder.superexec_secret, random_bytes(KEY_BYTES))
    write_atomically(folder.settings, template(hosts[0] if hosts else "localhost", port).encode())


def kit_of(folder: FederationFolder, site_id: int, file: str) -> Kit:
    """The kit of a member: the newest roster, the address, the authority to trust. file: its name.

    Raises:
        ConfigError: no such member.
    """
    roster = load_federation(folder)
    if site_id not in roster.keys:
        raise ConfigError(f"site {site_id} is no member: confide server roster {folder.path} lists them")
    address = load_server_settings(folder.settings).gate.address
    readme = _README.format(federation=roster.federation, kit=file)
    trusted = TlsFolder(folder.tls).authority.read_bytes()
    return make_kit(roster, address, trusted, _POLICY, readme, load_authority(folder))
