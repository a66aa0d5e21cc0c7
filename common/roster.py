"""The roster: every site's id, name and key, signed by the federation's authority.

Each site pins the authority's key once, over a channel of its own, and from then on takes rosters that
it has signed and that do not go back. What is signed is `transcript.digest` of the fields under a label
that nothing else uses, never the JSON of `roster.json`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from common.errors import ConfigError, ProtocolError
from common.identity import (
    check_integer,
    check_key,
    check_name,
    check_signature,
    check_spelling,
    fingerprint,
    hex_bytes,
    json_bytes,
    read_json,
    read_limited,
    take,
)
from common.secagg import keys, transcript
from common.secagg.keys import IdentityKey

ROSTER_FORMAT = "confide-roster/1"
LABEL_ROSTER = b"signed roster"
MAX_MEMBERS = 2**16 - 1
MAX_VERSION = 2**32 - 1
MAX_ROSTER_BYTES = 16 * 1024 * 1024


class RosterFormatError(ConfigError):
    """A roster is not what `sign_roster` writes: changed by hand, cut off, or not a roster at all."""


class RosterSignatureError(ProtocolError):
    """A roster is not signed by the authority that it names."""


class OtherAuthorityError(ProtocolError):
    """A roster is signed, but not by the authority that is pinned."""


class OtherFederationError(ProtocolError):
    """A roster belongs to another federation than the pinned one."""


class RosterRollbackError(ProtocolError):
    """A roster is older than the pinned one, or has forgotten what that one says."""


class RosterForkError(ProtocolError):
    """Two rosters have the same version and different content: somebody is shown another federation."""


@dataclass(frozen=True)
class Member:
    """One site of the federation. An id stands for one key for ever.

    Raises:
        RosterFormatError: a field is out of range.
    """

    id: int
    name: str
    public: bytes

    def __post_init__(self) -> None:
        try:
            check_integer("id", self.id, 1, transcript.MAX_ID)
            check_name(self.name)
            check_key(f"the key of site {self.id}", self.public)
        except ValueError as error:
            raise RosterFormatError(f"not a member of a roster: {error}") from None


@dataclass(frozen=True)
class SignedRoster:
    """The sites of a federation, signed. One that exists has a signature that holds.

    members, retired: ascending ids. A retired site takes no part; its id and key are never used again.
    authority: the Ed25519 public key that has signed. Whether it is the right one, only a site that has
    pinned it can say: see `load_roster`.

    Raises:
        RosterFormatError: the fields contradict each other. RosterSignatureError: the signature fails.
    """

    federation: str
    version: int
    members: tuple[Member, ...]
    retired: tuple[Member, ...]
    authority: bytes
    signature: bytes

    def __post_init__(self) -> None:
        try:
            check_name(self.federation)
            check_integer("version", self.version, 0, MAX_VERSION)
            check_key("the authority's key", self.authority)
            check_signature(self.signature)
            _check_members(self.members, self.retired)
        except ValueError as error:
            raise RosterFormatError(f"not a roster: {error}") from None
        if not keys.verify(self.authority, self.statement, self.signature):
            raise RosterSignatureError(
                f"version {self.version} of the roster of {self.federation!r} is not signed by the authority "
                "that it names: it was changed after signing. Get it again from the federation"
            )

    @property
    def keys(self) -> dict[int, bytes]:
        """Site id → Ed25519 public key: the `Roster` of secure aggregation."""
        return {member.id: member.public for member in self.members}

    @cached_property
    def statement(self) -> bytes:
        """What is signed: every field but the signature, lists behind their length."""
        return _roster_statement(self.federation, self.version, self.members, self.retired, self.authority)

    def member(self, public: bytes) -> Member | None:
        """The member with this key."""
        return next((member for member in self.members if member.public == public), None)

    def encode(self) -> bytes:
        return json_bytes(
            {
                "format": ROSTER_FORMAT,
                "federation": self.federation,
                "version": self.version,
                "members": [_member_fields(member) for member in self.members],
                "retired": [_member_fields(member) for member in self.retired],
                "authority": self.authority.hex(),
                "signature": self.signature.hex(),
            }
        )

    @classmethod
    def decode(cls, data: bytes) -> SignedRoster:
        """Raises RosterFormatError, RosterSignatureError."""
        try:
            names = ("federation", "version", "members", "retired", "authority", "signature")
            fields = take(read_json(data, MAX_ROSTER_BYTES), ROSTER_FORMAT, *names)
            federation, version, members, retired, authority, signature = fields
            roster = cls(
                federation,
                version,
                _read_members("members", members),
                _read_members("retired", retired),
                hex_bytes("authority", authority),
                hex_bytes("signature", signature),
            )
            check_spelling(roster.encode(), data)
        except ValueError as error:
            raise RosterFormatError(f"not a roster: {error}. Get it again from the federation") from None
        return roster


def sign_roster(
    federation: str,
    version: int,
    members: Sequence[Member],
    retired: Sequence[Member],
    authority: IdentityKey,
) -> SignedRoster:
    """Raises RosterFormatError: the fields do not make a roster."""
    try:
        check_name(federation)
        check_integer("version", version, 0, MAX_VERSION)
    except ValueError as error:
        raise RosterFormatError(f"not a roster: {error}") from None
    fields = (federation, version, tuple(members), tuple(retired), authority.public)
    return SignedRoster(*fields, authority.sign(_roster_statement(*fields)))


def load_roster(path: Path, authority: bytes | None) -> SignedRoster:
    """The roster in a file, signed by `authority`.

    With None it says only that the roster is signed by the key that it names itself, which anybody can
    make true: compare `fingerprint(roster.authority)` with one from another channel before using it.

    Raises:
        RosterFormatError, RosterSignatureError, OtherAuthorityError.
    """
    try:
        roster = SignedRoster.decode(read_limited(path, MAX_ROSTER_BYTES))
    except RosterFormatError as error:
        raise RosterFormatError(f"{path}: {error}") from None
    except RosterSignatureError as error:
        raise RosterSignatureError(f"{path}: {error}") from None
    if authority is not None and roster.authority != authority:
        raise OtherAuthorityError(
            f"{path} is signed by the authority {fingerprint(roster.authority)}, but the pinned one is "
            f"{fingerprint(authority)}. Ask the federation's people, over a channel of your own"
        )
    return roster


def newer(old: SignedRoster, new: SignedRoster) -> SignedRoster:
    """`new`, if it can follow `old`; the same roster again can.

    Raises:
        OtherAuthorityError, OtherFederationError: it is not of the same federation.
        RosterRollbackError: its version is lower, or it has lost an id or given it to another key.
        RosterForkError: the same version says something else.
    """
    if new.authority != old.authority:
        raise OtherAuthorityError(
            f"the roster is signed by {fingerprint(new.authority)}, the pinned one by "
            f"{fingerprint(old.authority)}. Ask the federation's people, over a channel of your own"
        )
    if new.federation != old.federation:
        raise OtherFederationError(
            f"the roster is of the federation {new.federation!r}, the pinned one of {old.federation!r}"
        )
    if new.version < old.version:
        raise RosterRollbackError(
            f"version {old.version} of the roster is pinned, found version {new.version}: rosters only move "
            "forward. Get the newest one"
        )
    if new.version == old.version and new.statement != old.statement:
        raise RosterForkError(
            f"another version {new.version} of the roster is pinned: the authority has signed two that "
            "differ. Do not use it; tell the other sites"
        )
    known = {member.id: member.public for member in (*new.members, *new.retired)}
    out = {member.id for member in new.retired}
    lost = [member for member in (*old.members, *old.retired) if known.get(member.id) != member.public]
    back = [member for member in old.retired if member.id not in out]
    for member in (*lost, *back):
        raise RosterRollbackError(
            f"site {member.id} ({member.name!r}) of the pinned version {old.version} is missing in version "
            f"{new.version}, has another key there, or is back after it was retired. Do not use it; ask the "
            "federation's people"
        )
    return new


def _roster_statement(
    federation: str, version: int, members: Sequence[Member], retired: Sequence[Member], authority: bytes
) -> bytes:
    fields: list[bytes] = [federation.encode(), version.to_bytes(4, "little")]
    for group in (members, retired):
        fields.append(len(group).to_bytes(4, "little"))
        for member in group:
            fields += [transcript.id_bytes(member.id), member.name.encode(), member.public]
    return transcript.digest(LABEL_ROSTER, *fields, authority)


def _check_members(members: Sequence[Member], retired: Sequence[Member]) -> None:
    everybody = (*members, *retired)
    if len(everybody) > MAX_MEMBERS:
        raise ValueError(f"at most {MAX_MEMBERS} sites, found {len(everybody)}")
    for what, group in (("members", members), ("retired", retired)):
        for left, right in itertools.pairwise(member.id for member in group):
            if left >= right:
                raise ValueError(f"{what} must have strictly ascending ids, found {right} after {left}")
    _check_distinct("id", [member.id for member in everybody])
    _check_distinct("key", [member.public.hex() for member in everybody])
    _check_distinct("name", [member.name.lower() for member in members])


def _check_distinct(what: str, values: Sequence[object]) -> None:
    seen = set()
    for value in values:
        if value in seen:
            raise ValueError(f"two sites have the {what} {value}: one would count as two")
        seen.add(value)


def _read_members(what: str, rows: object) -> tuple[Member, ...]:
    if not isinstance(rows, list):
        raise ValueError(f"{what} must be a list")
    taken = (take(row, None, "id", "name", "public") for row in rows)
    return tuple(Member(site, name, hex_bytes("public", public)) for site, name, public in taken)


def _member_fields(member: Member) -> dict[str, Any]:
    return {"id": member.id, "name": member.name, "public": member.public.hex()}
