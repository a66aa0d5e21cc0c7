"""Randomness that privacy rests on: Poisson sampling and Gaussian noise from AES-256-CTR.

torch's own generators (Mersenne Twister, Philox) are not cryptographic: noise that can be predicted from
a seed can be subtracted. A deployed site keys this stream from the operating system, freshly each time.
A simulated site keys it by a secret kept in the run's folder, so that a killed run can be resumed exactly.
"""

from __future__ import annotations

import hashlib
import hmac
import os

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from common.errors import PrivacyError

KEY_BYTES = 32


class NoiseStream:
    """An AES-256-CTR keystream read as uniform and Gaussian numbers.

    One key serves one stream and is never reused: the counter starts at zero, so two streams of one key
    would be equal.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise PrivacyError(f"a noise key must have {KEY_BYTES} bytes, found {len(key)}")
        self._stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def __repr__(self) -> str:
        return "NoiseStream(<key hidden>)"

    def _words(self, count: int) -> np.ndarray:
        return np.frombuffer(self._stream.update(bytes(8 * count)), dtype="<u8")

    def uniform(self, count: int) -> np.ndarray:
        """`(count,)` float64 in [0, 1), 53 random bits each."""
        return (self._words(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def random_bytes(self, count: int) -> bytes:
        """`count` bytes, as `os.urandom` gives them: for rounding an update."""
        return self._stream.update(bytes(count))

    def seed(self) -> int:
        """63 bits for a generator that is not cryptographic."""
        return int(self._words(1)[0] >> np.uint64(1))

    def bernoulli(self, count: int, probability: float) -> np.ndarray:
        """`(count,)` bool, each true with `probability`: one Poisson-sampled batch."""
        return self.uniform(count) < probability

    def _box_muller(self, count: int) -> np.ndarray:
        pairs = (count + 1) // 2
        radius = np.sqrt(-2.0 * np.log1p(-self.uniform(pairs)))  # 1 - u lies in (0, 1]
        angle = (2.0 * np.pi) * self.uniform(pairs)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]

    def gaussian(self, shape: torch.Size | tuple[int, ...], std: float) -> torch.Tensor:
        """float64 N(0, std²) of `shape`.

        Each number is the halved sum of four Box-Muller draws, which has the same distribution but makes
        the low bits of a single floating-point draw (Mironov 2012) far harder to invert: Holohan & Braghin
        2021, 2107.10138, with n = 2.
        """
        if not std > 0 or not np.isfinite(std):
            raise PrivacyError(f"the standard deviation of noise must be > 0, found {std}")
        count = int(np.prod(shape, dtype=np.int64))
        total = sum(self._box_muller(count) for _ in range(4))
        return torch.from_numpy(np.asarray(total * (std / 2.0))).reshape(tuple(shape))


def fresh_key() -> bytes:
    """A key from the operating system: what a deployed site uses, once."""
    return os.urandom(KEY_BYTES)


def derived_key(secret: bytes, *context: bytes) -> bytes:
    """HMAC-SHA-256 of length-prefixed `context` under `secret`: what a simulated site uses.

    The context must pin everything that the output depends on (site, round, attempt, hash of the global
    adapter and of the training setting), so that two different questions never share noise.
    """
    message = b"".join(len(c).to_bytes(4, "little") + c for c in (b"confide/noise/v1", *context))
    return hmac.digest(secret, message, hashlib.sha256)
