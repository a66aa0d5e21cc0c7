"""The ten messages of the five exchanges, and their bytes.

One frozen dataclass a message. Constructing one checks types, lengths and ranges; decoding goes
through the same constructor. Whether a list is sorted, complete or signed is the state machines'
business, so that each refusal there has its own name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from common.secagg.binary import Reader, Writer
from common.secagg.errors import MessageError
from common.secagg.framing import (
    CRC_BYTES,
    HEADER_BYTES,
    MAX_SITES,
    Framed,
    check_bytes,
    check_ids,
    check_integer,
    check_table,
)
from common.secagg.keys import KEY_BYTES, PUBLIC_BYTES, SIGNATURE_BYTES, TAG_BYTES
from common.secagg.masks import Ring, ring_dtype, ring_memory
from common.secagg.shamir import ELEMENT_BYTES
from common.secagg.transcript import HASH_BYTES, MAX_ID

MAX_RUN_BYTES = 64
MAX_WORDS = 2**28
SHARES_BYTES = 2 * ELEMENT_BYTES  # share of s ‖ share of b
SEALED_BYTES = SHARES_BYTES + TAG_BYTES

Table = tuple[tuple[int, bytes], ...]
"""Rows of a site id and bytes of one length."""


# Exchange 0, ADVERTISE


@dataclass(frozen=True)
class AdvertiseRequest(Framed):
    """The server opens a session: what it is about, and whom it asks (U0)."""

    kind = 0
    run: bytes
    round: int
    attempt: int
    cohort: tuple[int, ...]
    roster_hash: bytes
    policy_hash: bytes
    context_hash: bytes

    def __post_init__(self) -> None:
        if not isinstance(self.run, bytes) or not 1 <= len(self.run) <= MAX_RUN_BYTES:
            raise MessageError(f"run must be 1 .. {MAX_RUN_BYTES} bytes")
        check_integer("round", self.round, 0, 2**32 - 1)
        check_integer("attempt", self.attempt, 0, 2**32 - 1)
        check_ids("cohort", self.cohort)
        for name in ("roster_hash", "policy_hash", "context_hash"):
            check_bytes(name, getattr(self, name), HASH_BYTES)

    def _write(self, writer: Writer) -> None:
        writer.sized(self.run).u32(self.round).u32(self.attempt).ids(self.cohort)
        writer.fixed(self.roster_hash).fixed(self.policy_hash).fixed(self.context_hash)

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(
            reader.sized(MAX_RUN_BYTES),
            reader.u32(),
            reader.u32(),
            reader.ids(MAX_SITES),
            reader.fixed(HASH_BYTES),
            reader.fixed(HASH_BYTES),
            reader.fixed(HASH_BYTES),
        )


@dataclass(frozen=True)
class Advertisement:
    """One site's ephemeral X25519 keys c (for sealing) and s (for masks), commit(b), and its signature."""

    site: int
    c: bytes
    s: bytes
    commitment: bytes
    signature: bytes

    BYTES: ClassVar[int] = 4 + 2 * PUBLIC_BYTES + HASH_BYTES + SIGNATURE_BYTES

    def __post_init__(self) -> None:
        check_integer("site", self.site, 1, MAX_ID)
        check_bytes("c", self.c, PUBLIC_BYTES)
        check_bytes("s", self.s, PUBLIC_BYTES)
        check_bytes("commitment", self.commitment, HASH_BYTES)
        check_bytes("signature", self.signature, SIGNATURE_BYTES)

    def to_bytes(self) -> bytes:
        """Without framing: as h1 hashes it."""
        return self.site.to_bytes(4, "little") + self.c + self.s + self.commitment + self.signature

    @classmethod
    def read(cls, reader: Reader) -> Advertisement:
        return cls(
            reader.u32(),
            reader.fixed(PUBLIC_BYTES),
            reader.fixed(PUBLIC_BYTES),
            reader.fixed(HASH_BYTES),
            reader.fixed(SIGNATURE_BYTES),
        )


@dataclass(frozen=True)
class AdvertiseReply(Framed):
    """A site joins the session."""

    kind = 1
    session: bytes
    advertisement: Advertisement

    def __post_init__(self) -> None:
        check_bytes("session", self.session, HASH_BYTES)
        if not isinstance(self.advertisement, Advertisement):
            raise MessageError("advertisement must be an Advertisement")

    def _write(self, writer: Writer) -> None:
        writer.fixed(self.session).fixed(self.advertisement.to_bytes())

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(reader.fixed(HASH_BYTES), Advertisement.read(reader))


# Exchange 1, SHARE


@dataclass(frozen=True)
class ShareRequest(Framed):
    """The advertisements of U1, in id order."""

    kind = 2
    session: bytes
    advertisements: tuple[Advertisement, ...]

    def __post_init__(self) -> None:
        check_bytes("session", self.session, HASH_BYTES)
        if not isinstance(self.advertisements, tuple) or len(self.advertisements) > MAX_SITES:
            raise MessageError(f"advertisements must be a tuple of at most {MAX_SITES}")
        if not all(isinstance(entry, Advertisement) for entry in self.advertisements):
            raise MessageError("advertisements must all be Advertisement")

    def _write(self, writer: Writer) -> None:
        writer.fixed(self.session).u32(len(self.advertisements))
        writer.fixed(b"".join(entry.to_bytes() for entry in self.advertisements))

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        session = reader.fixed(HASH_BYTES)
        count = reader.count(MAX_SITES, Advertisement.BYTES)
        return cls(session, tuple(Advertisement.read(reader) for _ in range(count)))


@dataclass(frozen=True)
class _SiteTable(Framed):
    """A session, a site, and rows of (id, bytes)."""

    session: bytes
    site: int
    rows: Table
    row_bytes: ClassVar[int]

    def __post_init__(self) -> None:
        check_bytes("session", self.session, HASH_BYTES)
        check_integer("site", self.site, 1, MAX_ID)
        check_table("rows", self.rows, self.row_bytes)

    def _write(self, writer: Writer) -> None:
        writer.fixed(self.session).u32(self.site).table(self.rows)

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(reader.fixed(HASH_BYTES), reader.u32(), reader.table(MAX_SITES, cls.row_bytes))


class ShareReply(_SiteTable):
    """Rows: (receiver, sealed share of s ‖ share of b), for each neighbour, in id order."""

    kind = 3
    row_bytes = SEALED_BYTES


# Exchange 2, MASK


@dataclass(frozen=True)
class MaskRequest(Framed):
    """U2, and the sealed shares (sender, ciphertext) that this site's neighbours in U2 sent it."""

    kind = 4
    session: bytes
    sharers: tuple[int, ...]
    sealed: Table

    def __post_init__(self) -> None:
        check_bytes("session", self.session, HASH_BYTES)
        check_ids("sharers", self.sharers)
        check_table("sealed", self.sealed, SEALED_BYTES)

    def _write(self, writer: Writer) -> None:
        writer.fixed(self.session).ids(self.sharers).table(self.sealed)

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(reader.fixed(HASH_BYTES), reader.ids(MAX_SITES), reader.table(MAX_SITES, SEALED_BYTES))


@dataclass(frozen=True, eq=False)
class MaskReply(Framed):
    """A site's masked vector, shape (words,), dtype <u4 or <u2. Decoded without a copy: read-only."""

    kind = 5
    session: bytes
    site: int
    vector: Ring

    def __post_init__(self) -> None:
        check_bytes("session", self.session, HASH_BYTES)
        check_integer("site", self.site, 1, MAX_ID)
        vector: Any = self.vector
        if not isinstance(vector, np.ndarray) or vector.dtype not in (ring_dtype(32), ring_dtype(16)):
            raise MessageError("vector must be an array of <u4 or <u2")
        if vector.ndim != 1 or not vector.flags.c_contiguous or not 1 <= len(vector) <= MAX_WORDS:
            raise MessageError(f"vector must be contiguous, of shape (1 .. {MAX_WORDS},)")

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, MaskReply)
            and (self.session, self.site) == (other.session, other.site)
            and self.vector.dtype == other.vector.dtype
            and np.array_equal(self.vector, other.vector)
        )

    __hash__ = None  # type: ignore[assignment]

    def _write(self, writer: Writer) -> None:
        writer.fixed(self.session).u32(self.site)
        writer.u8(8 * self.vector.itemsize).u32(len(self.vector)).view(ring_memory(self.vector))

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        session, site, bits = reader.fixed(HASH_BYTES), reader.u32(), reader.u8()
        if bits not in (16, 32):
            raise MessageError(f"ring bits must be 16 or 32, found {bits}")
        words = reader.count(MAX_WORDS, bits // 8)
        vector: Ring = np.frombuffer(reader.view(words * bits // 8), dtype=ring_dtype(bits))  # type: ignore[assignment]
        return cls(session, site, vector)


# Exchange 3, CONSIST


@dataclass(frozen=True)
class ConsistRequest(Framed):
    """U3: whose masked vectors have arrived."""

    kind = 6
    session: bytes
    survivors: tuple[int, ...]

    def __post_init__(self) -> None:
        check_bytes("session", self.session, HASH_BYTES)
        check_ids("survivors", self.survivors)

    def _write(self, writer: Writer) -> None:
        writer.fixed(self.session).ids(self.survivors)

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(reader.fixed(HASH_BYTES), reader.ids(MAX_SITES))


@dataclass(frozen=True)
class ConsistReply(Framed):
    """A site's signature over (sid, h1, U2, U3, site)."""

    kind = 7
    session: bytes
    site: int
    signature: bytes

    def __post_init__(self) -> None:
        check_bytes("session", self.session, HASH_BYTES)
        check_integer("site", self.site, 1, MAX_ID)
        check_bytes("signature", self.signature, SIGNATURE_BYTES)

    def _write(self, writer: Writer) -> None:
        writer.fixed(self.session).u32(self.site).fixed(self.signature)

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(reader.fixed(HASH_BYTES), reader.u32(), reader.fixed(SIGNATURE_BYTES))


# Exchange 4, UNMASK


@dataclass(frozen=True)
class UnmaskRequest(Framed):
    """Signatures (site, signature) of at least t members of U3."""

    kind = 8
    session: bytes
    signatures: Table

    def __post_init__(self) -> None:
        check_bytes("session", self.session, HASH_BYTES)
        check_table("signatures", self.signatures, SIGNATURE_BYTES)

    def _write(self, writer: Writer) -> None:
        writer.fixed(self.session).table(self.signatures)

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(reader.fixed(HASH_BYTES), reader.table(MAX_SITES, SIGNATURE_BYTES))


@dataclass(frozen=True)
class UnmaskReply(Framed):
    """Shares (owner, share) that a site gives: of b for survivors, of s for the dropped.

    Once sent they are no secret of this site any more, but `repr` hides them all the same.
    """

    kind = 9
    session: bytes
    site: int
    b_shares: Table
    s_shares: Table

    def __post_init__(self) -> None:
        check_bytes("session", self.session, HASH_BYTES)
        check_integer("site", self.site, 1, MAX_ID)
        check_table("b_shares", self.b_shares, KEY_BYTES)
        check_table("s_shares", self.s_shares, KEY_BYTES)

    def __repr__(self) -> str:
        return f"UnmaskReply(site={self.site}, {len(self.b_shares)} b, {len(self.s_shares)} s)"

    def _write(self, writer: Writer) -> None:
        writer.fixed(self.session).u32(self.site).table(self.b_shares).table(self.s_shares)

    @classmethod
    def _read(cls, reader: Reader) -> Self:
        return cls(
            reader.fixed(HASH_BYTES),
            reader.u32(),
            reader.table(MAX_SITES, ELEMENT_BYTES),
            reader.table(MAX_SITES, ELEMENT_BYTES),
        )


Message = (
    AdvertiseRequest
    | AdvertiseReply
    | ShareRequest
    | ShareReply
    | MaskRequest
    | MaskReply
    | ConsistRequest
    | ConsistReply
    | UnmaskRequest
    | UnmaskReply
)

MESSAGES: tuple[type[Framed], ...] = (
    AdvertiseRequest,
    AdvertiseReply,
    ShareRequest,
    ShareReply,
    MaskRequest,
    MaskReply,
    ConsistRequest,
    ConsistReply,
    UnmaskRequest,
    UnmaskReply,
)


def encoded_limit(kind: type[Framed], sites: int, words: int, ring_bits: int) -> int:
    """The largest encoding of a message in a session of at most `sites` sites, bytes.

    For the transport to refuse more before it reads it.
    """
    fixed = HEADER_BYTES + CRC_BYTES + HASH_BYTES + 4
    rows: tuple[int, ...]
    match kind.kind:
        case 0:
            fixed, rows = fixed + MAX_RUN_BYTES + 12 + 2 * HASH_BYTES + 4, (4,)
        case 1:
            fixed, rows = fixed + Advertisement.BYTES, ()
        case 2:
            rows = (Advertisement.BYTES,)
        case 3:
            rows = (4 + SEALED_BYTES,)
        case 4:
            rows = (4, 4 + SEALED_BYTES)
        case 5:
            fixed, rows = fixed + 5 + words * ring_bits // 8, ()
        case 6:
            rows = (4,)
        case 7:
            fixed, rows = fixed + SIGNATURE_BYTES, ()
        case 8:
            rows = (4 + SIGNATURE_BYTES,)
        case _:
            rows = (4 + ELEMENT_BYTES, 4 + ELEMENT_BYTES)
    return fixed + sum(4 + sites * row for row in rows)
