"""The signed head of a ledger: what a site hands out so that its history cannot be shortened or replaced.

A ledger cut at its end is still a valid chain. Only someone who has kept a later head can tell, so a head
travels with every message of a site, and the server keeps the newest.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from common.errors import PrivacyError
from common.ledger import HASH_BYTES, MAX_NUMBER, MAX_SITE, Entry, whole
from common.ledger_errors import (
    ForkError,
    HeadSignatureError,
    HeadWentBackError,
    LedgerFormatError,
    ReceiptError,
)
from common.secagg.keys import SIGNATURE_BYTES, IdentityKey, verify

_HEAD_SIGNATURE = b"confide/ledger-head/v1\0"
_HEAD = struct.Struct(f"<IQ{HASH_BYTES}s{SIGNATURE_BYTES}s")
HEAD_BYTES = _HEAD.size


@dataclass(frozen=True)
class SignedHead:
    """The length of a site's ledger and the hash of its last entry, signed.

    It travels with every message of the site. A ledger cut at its end is still a valid chain; only
    someone who has kept a later head can tell.
    """

    site: int
    seq: int
    hash: bytes
    signature: bytes

    def __post_init__(self) -> None:
        whole("site", self.site, 1, MAX_SITE)
        whole("seq", self.seq, 1, MAX_NUMBER)
        if len(self.hash) != HASH_BYTES or len(self.signature) != SIGNATURE_BYTES:
            raise PrivacyError(
                f"a head must have a hash of {HASH_BYTES} and a signature of {SIGNATURE_BYTES} bytes"
            )

    @classmethod
    def sign(cls, site: int, entry: Entry, identity: IdentityKey) -> SignedHead:
        unsigned = cls(site, entry.seq, entry.hash, bytes(SIGNATURE_BYTES))
        return cls(site, entry.seq, entry.hash, identity.sign(unsigned._message()))

    def _message(self) -> bytes:
        return _HEAD_SIGNATURE + self.encode()[:-SIGNATURE_BYTES]

    def is_signed_by(self, public: bytes) -> bool:
        return verify(public, self._message(), self.signature)

    def encode(self) -> bytes:
        """HEAD_BYTES = 108 bytes: site u32, seq u64 (little-endian), hash, signature."""
        return _HEAD.pack(self.site, self.seq, self.hash, self.signature)

    @classmethod
    def decode(cls, data: bytes) -> SignedHead:
        """Raises LedgerFormatError unless `data` is one encoded head. Says nothing about its signature."""
        try:
            return cls(*_HEAD.unpack(data))
        except (struct.error, PrivacyError) as error:
            raise LedgerFormatError(f"{len(data)} bytes that are no head ({error})") from error


def check_newer(old: SignedHead | None, new: SignedHead, public: bytes) -> None:
    """What a server asks of every head: signed by its site's roster key, and never behind the last one.

    Raises:
        HeadSignatureError: `new` is not signed by `public`.
        ReceiptError: the heads are of different sites.
        HeadWentBackError: `new` is shorter than `old`.
        ForkError: equally long, with another last entry.
    """
    if not new.is_signed_by(public):
        raise HeadSignatureError(f"another signature on the head of site {new.site}")
    if old is None:
        return
    if new.site != old.site:
        raise ReceiptError(f"a head of site {new.site} among those of site {old.site}")
    if new.seq < old.seq:
        raise HeadWentBackError(f"{new.seq} entries at site {new.site} after {old.seq}")
    if new.seq == old.seq and new.hash != old.hash:
        raise ForkError(f"two entries {new.seq} at site {new.site}")
