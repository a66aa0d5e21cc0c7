"""Keys: Ed25519 identities, ephemeral X25519 keys, HKDF, and sealing with AES-256-GCM.

Sources: RFC 8032 (Ed25519), RFC 7748 (X25519), RFC 5869 (HKDF), NIST SP 800-38D (GCM). All of them
are pyca/cryptography's; this module only fixes parameters and refuses inputs that would be unsafe.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from functools import lru_cache
from typing import NoReturn

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

RandomBytes = Callable[[int], bytes]
"""`os.urandom`, or something that behaves like it. Tests pass a seeded stream."""

KEY_BYTES = 32
PUBLIC_BYTES = 32
SIGNATURE_BYTES = 64
TAG_BYTES = 16
NONCE_BYTES = 12

FIELD_PRIME = 2**255 - 19

# The u-coordinates of every point of order 1, 2, 4 or 8 on Curve25519 and of order 1, 2 or 4 on its
# twist (RFC 7748, section 6.1 and 7). X25519 of any of them is all zeros whatever the scalar.
_LOW_ORDER = frozenset(
    {
        0,
        1,
        FIELD_PRIME - 1,
        0x00B8495F16056286FDB1329CEB8D09DA6AC49FF1FAE35616AEB8413B7C7AEBE0,
        0x57119FD0DD4E22D8868E1C58C45C44045BEF839C55B1D0B1248C50A3BC959C5F,
    }
)


class Secret:
    """Bytes that must not show up in a log.

    `repr`, `str` and `format` say only the length, comparing takes constant time, pickling is refused.
    Python cannot promise to overwrite memory; erasing a secret means dropping every reference to it
    and never writing it to the store again.
    """

    __slots__ = ("_value",)

    def __init__(self, value: bytes) -> None:
        self._value = bytes(value)

    def reveal(self) -> bytes:
        """The bytes themselves, for the primitive that needs them."""
        return self._value

    def __len__(self) -> int:
        return len(self._value)

    def __repr__(self) -> str:
        return f"Secret({len(self._value)} bytes)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and equal(self._value, other._value)

    __hash__ = None  # type: ignore[assignment]  # a hash table would compare in variable time

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret cannot be pickled: write it through the site's sealed store")


def equal(left: bytes, right: bytes) -> bool:
    """Compare in time that depends on the lengths alone."""
    return hmac.compare_digest(left, right)


# Identity


class IdentityKey:
    """A site's long-term Ed25519 key. The public half stands in the roster under the site's id."""

    __slots__ = ("_key", "public")

    def __init__(self, seed: Secret) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(seed.reveal())
        self.public = self._key.public_key().public_bytes_raw()

    @classmethod
    def generate(cls, random_bytes: RandomBytes) -> IdentityKey:
        return cls(Secret(random_bytes(KEY_BYTES)))

    def sign(self, message: bytes) -> bytes:
        """The 64-byte signature. Deterministic (RFC 8032, section 5.1.6), so it needs no randomness."""
        return self._key.sign(message)

    def __repr__(self) -> str:
        return f"IdentityKey(public={self.public.hex()})"


# Remembered, since the sites of a simulation check the same signatures: a thousand sites a million times.
@lru_cache(maxsize=4096)
def verify(public: bytes, message: bytes, signature: bytes) -> bool:
    """Whether `signature` is the Ed25519 signature of `message` under `public` (RFC 8032, 5.1.7)."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


# Key agreement


class EphemeralKey:
    """An X25519 key for one session (RFC 7748, section 6.1). Clamping is X25519's own."""

    __slots__ = ("_key", "public")

    def __init__(self, scalar: Secret) -> None:
        self._key = X25519PrivateKey.from_private_bytes(scalar.reveal())
        self.public = self._key.public_key().public_bytes_raw()

    def agree(self, peer: bytes) -> Secret:
        """The 32 shared bytes with the holder of `peer`. Never use them as a key: derive one.

        Raises:
            ValueError: `peer` has low order, so the shared bytes would be zero (RFC 7748, section 6.1).
        """
        return Secret(self._key.exchange(X25519PublicKey.from_public_bytes(peer)))

    def __repr__(self) -> str:
        return f"EphemeralKey(public={self.public.hex()})"


def is_canonical_point(public: bytes) -> bool:
    """Whether these are 32 bytes of a u-coordinate below 2^255 - 19.

    X25519 itself ignores the top bit and reduces, so one point has several encodings; allowing one
    only makes "all keys are distinct" mean that all points are.
    """
    return len(public) == PUBLIC_BYTES and int.from_bytes(public, "little") < FIELD_PRIME


def is_low_order_point(public: bytes) -> bool:
    """Whether X25519 with this key is zero for every scalar, in any of the point's encodings."""
    u = (int.from_bytes(public, "little") & (2**255 - 1)) % FIELD_PRIME
    return u in _LOW_ORDER


def hkdf(secret: Secret, salt: bytes, info: bytes, length: int = KEY_BYTES) -> Secret:
    """HKDF-SHA-256, extract and expand (RFC 5869). `info` names the use and the parties."""
    derived = HKDF(algorithm=SHA256(), length=length, salt=salt, info=info).derive(secret.reveal())
    return Secret(derived)


# Sealing

_ZERO_NONCE = bytes(NONCE_BYTES)


def seal_once(key: Secret, plaintext: Secret, aad: bytes) -> bytes:
    """AES-256-GCM under a key that is used for this one message; returns ciphertext ‖ tag.

    The nonce is zero. That is safe only because the key is: it is derived for one sender, one
    receiver and one session, and the client's state has moved on before the ciphertext leaves.
    """
    return AESGCM(key.reveal()).encrypt(_ZERO_NONCE, plaintext.reveal(), aad)


def open_once(key: Secret, sealed: bytes, aad: bytes) -> Secret | None:
    """The plaintext of `seal_once`, or None if it was not sealed with this key and `aad`."""
    try:
        return Secret(AESGCM(key.reveal()).decrypt(_ZERO_NONCE, sealed, aad))
    except (InvalidTag, ValueError):
        return None


def seal_at_rest(key: Secret, plaintext: bytes, aad: bytes, random_bytes: RandomBytes) -> bytes:
    """AES-256-GCM for a site's own store; returns nonce ‖ ciphertext ‖ tag.

    This key lives long, so the nonce is random. At 96 bits, 2^32 records keep the chance of a
    repeat below 2^-32 (SP 800-38D, section 8.3).
    """
    nonce = random_bytes(NONCE_BYTES)
    return nonce + AESGCM(key.reveal()).encrypt(nonce, plaintext, aad)


def open_at_rest(key: Secret, sealed: bytes, aad: bytes) -> bytes | None:
    """The plaintext of `seal_at_rest`, or None if it was not sealed with this key and `aad`."""
    if len(sealed) < NONCE_BYTES + TAG_BYTES:
        return None
    try:
        return AESGCM(key.reveal()).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], aad)
    except InvalidTag:
        return None
