"""What a site is, what it remembers between exchanges, and its bytes for the site's store.

Each exchange leaves exactly what later ones need: a secret that has been used up is not in the next
state, so storing the next state erases it. Between sessions only the journal's numbers are left.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Protocol

from common.secagg import errors, transcript
from common.secagg.binary import Reader, Writer
from common.secagg.errors import MessageError, RollbackError
from common.secagg.framing import MAX_SITES
from common.secagg.keys import KEY_BYTES, IdentityKey, Secret
from common.secagg.masks import Ring
from common.secagg.messages import MAX_RUN_BYTES, SHARES_BYTES, Advertisement
from common.secagg.policy import Policy, Roster, check_roster
from common.secagg.shamir import ELEMENT_BYTES
from common.secagg.transcript import HASH_BYTES

MAGIC = b"CFSJ"
VERSION = 1


class Store(Protocol):
    """Where one site keeps its state of one run. One process at a time: hold a lock."""

    def load(self) -> bytes | None:
        """What was saved last, or None if nothing ever was."""

    def save(self, data: bytes) -> None:
        """Replace what was saved, durably: once this returns, a power cut does not undo it."""


@dataclass(frozen=True)
class Site:
    """Who this site is and what it has pinned. None of it comes from the server."""

    id: int
    identity: IdentityKey
    roster: Roster
    policy: Policy
    run: bytes

    def __post_init__(self) -> None:
        check_roster(self.roster)
        if self.roster.get(self.id) != self.identity.public:
            raise errors.PolicyError(f"the roster must have this site's key under id {self.id}")
        if not 1 <= len(self.run) <= MAX_RUN_BYTES:
            raise errors.PolicyError(f"a run id must be 1 .. {MAX_RUN_BYTES} bytes, found {len(self.run)}")

    @cached_property
    def roster_hash(self) -> bytes:
        return transcript.roster_hash(self.roster)


@dataclass(frozen=True, eq=False)
class Update:
    """An encoded update, and a number that grows with every training (the ledger's reservation, say).

    vector: shape (policy.words,), from `Codec.encode`.
    """

    number: int
    vector: Ring

    def __repr__(self) -> str:
        return f"Update(number={self.number}, {len(self.vector)} words)"


class Ending(Enum):
    """How the last session ended."""

    NONE = 0  # there was none yet
    DONE = 1
    ABORTED = 2


@dataclass(frozen=True)
class Closed:
    """No session is open and no secret is held."""

    how: Ending


@dataclass(frozen=True)
class Advertised:
    """After ADVERTISE. c: X25519 scalar for sealing. s, b: field elements, 32 bytes."""

    session: bytes
    cohort: tuple[int, ...]
    own: Advertisement
    c: Secret
    s: Secret
    b: Secret


@dataclass(frozen=True)
class Shared:
    """After SHARE. s and c are gone; what they agreed on with each neighbour is left.

    open_keys: key_ji, to open what neighbour j sealed. own_share: this site's own share of its b.
    """

    session: bytes
    h1: bytes
    members: tuple[int, ...]
    pair_seeds: dict[int, Secret]
    open_keys: dict[int, Secret]
    b: Secret
    own_share: Secret


@dataclass(frozen=True)
class Masked:
    """After MASK. b and every seed are gone.

    holdings: for each neighbour in U2 whose share could be opened, its share of s ‖ share of b.
    """

    session: bytes
    h1: bytes
    members: tuple[int, ...]
    sharers: tuple[int, ...]
    holdings: dict[int, Secret]
    own_share: Secret


@dataclass(frozen=True)
class Signed:
    """After CONSIST: the one survivor set that this site has signed."""

    masked: Masked
    survivors: tuple[int, ...]

    @property
    def session(self) -> bytes:
        return self.masked.session


SessionState = Closed | Advertised | Shared | Masked | Signed


@dataclass(frozen=True)
class Journal:
    """All that is stored.

    serial: number of saves so far, so an older copy can be told. mark: the highest (round, attempt)
    answered. consumed: number of the last update that was uploaded.
    """

    run: bytes
    site: int
    serial: int = 0
    mark: tuple[int, int] | None = None
    consumed: int = 0
    session: SessionState = field(default_factory=lambda: Closed(Ending.NONE))

    def encode(self) -> bytes:
        """Holds secrets while a session is open: seal it under a site-local key before it is written."""
        writer = Writer().fixed(MAGIC).u8(VERSION).sized(self.run).u32(self.site)
        writer.u64(self.serial).u64(self.consumed).u8(self.mark is not None)
        for number in self.mark or ():
            writer.u32(number)
        _write_session(writer, self.session)
        return writer.done()

    @classmethod
    def decode(cls, data: bytes) -> Journal:
        """Raises RollbackError if these are not the bytes of a journal."""
        try:
            return cls._decode(Reader(data))
        except MessageError as error:
            raise RollbackError(f"the stored state of secure aggregation is damaged: {error}") from error

    @classmethod
    def _decode(cls, reader: Reader) -> Journal:
        if reader.fixed(len(MAGIC)) != MAGIC or reader.u8() != VERSION:
            raise MessageError("not a journal of this version")
        run, site = reader.sized(MAX_RUN_BYTES), reader.u32()
        serial, consumed = reader.u64(), reader.u64()
        mark = (reader.u32(), reader.u32()) if reader.u8() else None
        session = _read_session(reader)
        reader.finish()
        return cls(run, site, serial, mark, consumed, session)


def _secrets(secrets: dict[int, Secret]) -> list[tuple[int, bytes]]:
    return [(site, secret.reveal()) for site, secret in secrets.items()]


def _read_secrets(reader: Reader, length: int) -> dict[int, Secret]:
    return {site: Secret(data) for site, data in reader.table(MAX_SITES, length)}


def _write_session(writer: Writer, state: SessionState) -> None:
    match state:
        case Closed():
            writer.u8(0).u8(state.how.value)
        case Advertised():
            writer.u8(1).fixed(state.session).ids(state.cohort).fixed(state.own.to_bytes())
            writer.fixed(state.c.reveal()).fixed(state.s.reveal()).fixed(state.b.reveal())
        case Shared():
            writer.u8(2).fixed(state.session).fixed(state.h1).ids(state.members)
            writer.table(_secrets(state.pair_seeds)).table(_secrets(state.open_keys))
            writer.fixed(state.b.reveal()).fixed(state.own_share.reveal())
        case Masked():
            writer.u8(3)
            _write_masked(writer, state)
        case Signed():
            writer.u8(4)
            _write_masked(writer, state.masked)
            writer.ids(state.survivors)


def _write_masked(writer: Writer, state: Masked) -> None:
    writer.fixed(state.session).fixed(state.h1).ids(state.members).ids(state.sharers)
    writer.table(_secrets(state.holdings)).fixed(state.own_share.reveal())


def _read_session(reader: Reader) -> SessionState:
    match reader.u8():
        case 0:
            how = reader.u8()
            if how not in {ending.value for ending in Ending}:
                raise MessageError(f"no ending has number {how}")
            return Closed(Ending(how))
        case 1:
            return Advertised(
                reader.fixed(HASH_BYTES),
                reader.ids(MAX_SITES),
                Advertisement.read(reader),
                Secret(reader.fixed(KEY_BYTES)),
                Secret(reader.fixed(ELEMENT_BYTES)),
                Secret(reader.fixed(ELEMENT_BYTES)),
            )
        case 2:
            return Shared(
                reader.fixed(HASH_BYTES),
                reader.fixed(HASH_BYTES),
                reader.ids(MAX_SITES),
                _read_secrets(reader, KEY_BYTES),
                _read_secrets(reader, KEY_BYTES),
                Secret(reader.fixed(ELEMENT_BYTES)),
                Secret(reader.fixed(ELEMENT_BYTES)),
            )
        case 3:
            return _read_masked(reader)
        case 4:
            return Signed(_read_masked(reader), reader.ids(MAX_SITES))
        case other:
            raise MessageError(f"no state has number {other}")


def _read_masked(reader: Reader) -> Masked:
    return Masked(
        reader.fixed(HASH_BYTES),
        reader.fixed(HASH_BYTES),
        reader.ids(MAX_SITES),
        reader.ids(MAX_SITES),
        _read_secrets(reader, SHARES_BYTES),
        Secret(reader.fixed(ELEMENT_BYTES)),
    )
