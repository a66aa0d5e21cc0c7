"""A federation's folder: the authority's key, and the roster that it signs.

    authority.key  the authority's 32-byte Ed25519 private key: secret, and the root of everybody's trust
    roster.json    the newest roster; hand it to every site
    nodes/         the key of each member's Flower node, as on its card
    server.toml    where the server listens (server/settings.py)
    tls/           its certificate, and the authority that has signed it (server/tls.py)
    superexec.key  what Flower's SuperLink and SuperExec share: secret
    jobs/          jobs, one folder each (server/jobs.py)
    receipts.jsonl heads of the sites' ledgers, over all jobs
    flwr/, log/    Flower's state; what the server's processes have said

The coordinator that runs rounds needs everything but authority.key. Keep that one on a machine that sites do
not reach, if you can: who has it can put sites of their own into the roster.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from common.errors import ConfigError
from common.files import write_atomically
from common.identity import (
    KeyExistsError,
    SiteCard,
    create_private,
    fingerprint,
    make_folder,
    read_private,
)
from common.roster import MAX_VERSION, Member, SignedRoster, load_roster, newer, sign_roster
from common.secagg.keys import KEY_BYTES, IdentityKey, RandomBytes, Secret
from common.secagg.transcript import MAX_ID

FEDERATION = "CONFIDE_FEDERATION"  # of the environment: the folder, as the operator's processes know it


class FederationError(ConfigError):
    """A folder is not a federation's, or is being worked on."""


class EnrollmentError(ConfigError):
    """A site cannot be enrolled or revoked as asked."""


@dataclass(frozen=True)
class FederationFolder:
    """Names of what lies in a federation's folder."""

    path: Path

    @property
    def authority(self) -> Path:
        return self.path / "authority.key"

    @property
    def roster(self) -> Path:
        return self.path / "roster.json"

    @property
    def settings(self) -> Path:
        return self.path / "server.toml"

    @property
    def tls(self) -> Path:
        return self.path / "tls"

    @property
    def superexec_secret(self) -> Path:
        return self.path / "superexec.key"

    @property
    def jobs(self) -> Path:
        return self.path / "jobs"

    @property
    def receipts(self) -> Path:
        return self.path / "receipts.jsonl"

    @property
    def flower(self) -> Path:
        return self.path / "flwr"

    @property
    def logs(self) -> Path:
        return self.path / "log"

    def node(self, site_id: int) -> Path:
        return self.path / "nodes" / f"{site_id}.pem"

    def nodes(self) -> dict[bytes, int]:
        """The public key of each enrolled node, PEM, → its site."""
        found = (self.path / "nodes").glob("*.pem")
        return {path.read_bytes(): int(path.stem) for path in found if path.stem.isdigit()}

    @property
    def serving_file(self) -> Path:
        """Process ids, while `confide server run` is at work."""
        return self.path / "serving.json"

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Inside: no other `confide server run` works on this federation.

        Raises:
            FederationError: one does.
        """
        with (self.path / ".serving.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise FederationError(f"{self.path} is being served already: stop that first") from None
            yield

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside: nobody else signs. Two at a time could sign two rosters of one version.

        Raises:
            FederationError: somebody does, or there is no such folder.
        """
        if not self.path.is_dir():
            raise FederationError(f"{self.path} is no folder: make a federation with confide server init")
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise FederationError(f"another process is changing {self.path}: wait for it") from None
            yield


def create_federation(folder: FederationFolder, name: str, random_bytes: RandomBytes) -> SignedRoster:
    """A new authority and its empty roster, version 0.

    Raises:
        KeyExistsError: the folder has one of the two already. RosterFormatError: the name cannot be one.
    """
    for path in (folder.authority, folder.roster):
        if path.exists():
            raise KeyExistsError(f"{path} is there already and is never overwritten: choose another folder")
    seed = Secret(random_bytes(KEY_BYTES))
    roster = sign_roster(name, 0, (), (), IdentityKey(seed))
    make_folder(folder.path)
    create_private(folder.authority, seed.reveal())
    write_atomically(folder.roster, roster.encode())
    return roster


def load_authority(folder: FederationFolder) -> IdentityKey:
    """Raises MissingKeyError, ExposedKeyError, FederationError."""
    seed = read_private(folder.authority, KEY_BYTES)
    if len(seed) != KEY_BYTES:
        raise FederationError(f"{folder.authority} must have {KEY_BYTES} bytes: restore it from a backup")
    return IdentityKey(Secret(seed))


def load_federation(folder: FederationFolder) -> SignedRoster:
    """The newest roster, as this folder's authority has signed it.

    Where authority.key is kept on another machine, the roster names its authority itself: sites check it.
    """
    if folder.roster.is_file() and not folder.authority.exists():
        return load_roster(folder.roster, None)
    return load_roster(folder.roster, load_authority(folder).public)


def enroll_site(
    folder: FederationFolder, card: SiteCard, site_id: int | None = None
) -> tuple[Member, SignedRoster]:
    """Give the card's site an id, the next one or `site_id`, and sign the roster that has it.

    Raises:
        EnrollmentError: the key or name is known, or the id is or was another site's.
        FederationError: the folder is in use.
    """
    with folder.locked():
        authority = load_authority(folder)
        roster = load_roster(folder.roster, authority.public)
        everybody = (*roster.members, *roster.retired)
        for known in everybody:
            if known.public == card.public:
                gone = "was revoked" if known in roster.retired else "is enrolled"
                raise EnrollmentError(
                    f"the key {fingerprint(card.public)} {gone} already, as site {known.id} "
                    f"({known.name!r}): a site has one key, and a revoked one does not come back"
                )
        for known in roster.members:
            if known.name.lower() == card.name.lower():
                raise EnrollmentError(
                    f"site {known.id} has the name {known.name!r} already: have the new site take another, "
                    f"or revoke {known.id} first if it is the same one with a new key"
                )
        taken = {known.id for known in everybody}
        if site_id is None:
            site_id = max(taken, default=0) + 1
        if not 1 <= site_id <= MAX_ID or site_id in taken:
            raise EnrollmentError(
                f"an id must be from 1 to {MAX_ID} and never have been used, found {site_id}: choose another "
                "with --id"
            )
        if card.node:
            make_folder(folder.node(site_id).parent)
            _check_node(folder, card)
            write_atomically(folder.node(site_id), _pem(card))
        member = Member(site_id, card.name, card.public)
        members = sorted((*roster.members, member), key=lambda one: one.id)
        return member, _sign(folder, authority, roster, members, roster.retired)


def renew_node(folder: FederationFolder, card: SiteCard) -> Member | None:
    """Take a member's new card, with another node's key: nothing else changes. None: the card is no member's,
    or has the key that is known.

    Raises:
        EnrollmentError: the name is another, or the node is another site's. FederationError: the folder is in
        use.
    """
    with folder.locked():
        roster = load_federation(folder)
        member = next((one for one in roster.members if one.public == card.public), None)
        if member is None or not card.node or folder.nodes().get(_pem(card)) == member.id:
            return None
        if card.name != member.name:
            raise EnrollmentError(
                f"site {member.id} is enrolled as {member.name!r}, but its new card says {card.name!r}: a "
                "site keeps its name"
            )
        _check_node(folder, card)
        write_atomically(folder.node(member.id), _pem(card))
        return member


def _pem(card: SiteCard) -> bytes:
    return load_der_public_key(card.node).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _check_node(folder: FederationFolder, card: SiteCard) -> None:
    known = folder.nodes().get(_pem(card))
    if known is not None:
        raise EnrollmentError(
            f"the node's key on this card is that of site {known} already: have the site make a new folder "
            "with confide client init"
        )


def revoke_site(folder: FederationFolder, site_id: int) -> tuple[Member, SignedRoster]:
    """Retire a site: it is no member any more, and its id and key are never used again.

    Raises:
        EnrollmentError: there is no such member. FederationError: the folder is in use.
    """
    with folder.locked():
        authority = load_authority(folder)
        roster = load_roster(folder.roster, authority.public)
        member = next((one for one in roster.members if one.id == site_id), None)
        if member is None:
            why = (
                "was revoked already" if any(one.id == site_id for one in roster.retired) else "is no member"
            )
            raise EnrollmentError(f"site {site_id} {why}: confide server roster lists the members")
        folder.node(site_id).unlink(missing_ok=True)  # first: a node without a roster entry does nothing
        members = [one for one in roster.members if one != member]
        retired = sorted((*roster.retired, member), key=lambda one: one.id)
        return member, _sign(folder, authority, roster, members, retired)


def _sign(
    folder: FederationFolder,
    authority: IdentityKey,
    old: SignedRoster,
    members: list[Member],
    retired: list[Member] | tuple[Member, ...],
) -> SignedRoster:
    """The next version, signed and on disk. It passes what every site will check."""
    if old.version == MAX_VERSION:
        raise FederationError(f"the roster has had {MAX_VERSION} versions: make a new federation")
    new = newer(old, sign_roster(old.federation, old.version + 1, members, retired, authority))
    write_atomically(folder.roster, new.encode())
    return new
