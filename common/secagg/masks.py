"""Masks: the keystream of AES-256-CTR, added to a vector modulo 2^32 or 2^16.

Source: NIST SP 800-38A, section 6.5 (CTR). The counter starts at zero because every seed is used
for one vector in one session; it is derived for that by HKDF, so no two vectors share a keystream.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from common.secagg.keys import Secret

Ring = NDArray[np.uint32] | NDArray[np.uint16]
"""A vector in Z_2^b, shape (words,), dtype little-endian u4 (b = 32) or u2 (b = 16)."""

CHUNK_BYTES = 256 * 1024
"""Zeros, keystream and the part of the vector that is added to fit a core's second-level cache."""

SPLIT_BYTES = 1024 * 1024
"""Vectors shorter than this stay on one thread: starting a second costs more than it saves."""

BATCH = 64
"""Ciphers that are open at a time, about 1 kB each."""

BLOCK_BYTES = 16
ADD, SUBTRACT = 1, -1

_ZEROS = bytes(CHUNK_BYTES)


def ring_dtype(ring_bits: int) -> np.dtype[np.uint32] | np.dtype[np.uint16]:
    """The element type of Z_2^ring_bits. Raises ValueError unless it is 16 or 32."""
    match ring_bits:
        case 32:
            return np.dtype("<u4")
        case 16:
            return np.dtype("<u2")
        case _:
            raise ValueError(f"ring_bits must be 16 or 32, found {ring_bits}")


def ring_memory(vector: NDArray[Any]) -> memoryview:
    """A contiguous vector's own bytes, not copied."""
    return memoryview(vector).cast("B")  # type: ignore[arg-type]  # numpy's stubs do not say Buffer


def keystream(seed: Secret, words: int, ring_bits: int) -> Ring:
    """PRG(seed): `words` ring elements. For tests and small vectors; `apply_masks` never holds it whole."""
    mask = np.zeros(words, dtype=ring_dtype(ring_bits))
    apply_masks(mask, [(seed, ADD)])
    return mask


def apply_masks(vector: Ring, masks: Sequence[tuple[Secret, int]], threads: int = 1) -> None:
    """vector += Σ sign·PRG(seed) modulo 2^b, in place, for (seed, sign) in `masks`.

    Memory: two chunks and BATCH ciphers a thread, whatever the number of masks. With threads > 1 each
    takes a range of the vector for itself and enters the keystream there, so the result does not
    depend on `threads` (the cipher and numpy both release Python's lock).

    Raises:
        ValueError: a sign is not ±1, a seed is not 32 bytes, or the vector is not one contiguous
            little-endian u4 or u2 array.
    """
    if vector.dtype not in (ring_dtype(32), ring_dtype(16)):
        raise ValueError(f"a ring vector must be <u4 or <u2, found {vector.dtype}")
    if vector.ndim != 1 or not vector.flags.c_contiguous or not vector.flags.writeable:
        raise ValueError("a ring vector must be writable, contiguous and of shape (words,)")
    if any(sign not in (ADD, SUBTRACT) for _, sign in masks) or any(len(seed) != 32 for seed, _ in masks):
        raise ValueError("each mask must be a 32-byte seed and +1 or -1")
    parts = threads if vector.nbytes >= SPLIT_BYTES else 1
    ranges = list(_ranges(len(vector), vector.itemsize, parts))
    if len(ranges) < 2 or not masks:
        add_keystream(vector, 0, masks)
        return
    with ThreadPoolExecutor(len(ranges)) as pool:
        jobs = [
            pool.submit(add_keystream, vector[low:high], low * vector.itemsize // BLOCK_BYTES, masks)
            for low, high in ranges
        ]
        for job in jobs:
            job.result()


def _ranges(words: int, itemsize: int, parts: int) -> Iterable[tuple[int, int]]:
    """Cut range(words) into at most `parts`, on chunk borders, which are cipher block borders too."""
    chunk_words = CHUNK_BYTES // itemsize
    chunks = -(-words // chunk_words)
    step = -(-chunks // max(parts, 1)) * chunk_words
    for low in range(0, words, max(step, 1)):
        yield low, min(low + step, words)


def add_keystream(part: Ring, first_block: int, masks: Sequence[tuple[Secret, int]]) -> None:
    """Add the masks to `part`, entering each keystream at 16-byte block `first_block`."""
    counter = modes.CTR(first_block.to_bytes(BLOCK_BYTES, "big"))
    chunk_words = CHUNK_BYTES // part.itemsize
    buffer = np.empty(chunk_words, dtype=part.dtype)
    zeros, stream = memoryview(_ZEROS), ring_memory(buffer)
    for start in range(0, len(masks), BATCH):
        # All of a batch go over one chunk of the vector while it is in the cache, then over the next
        batch = [
            (
                Cipher(algorithms.AES256(seed.reveal()), counter).encryptor(),
                np.add if sign == ADD else np.subtract,
            )
            for seed, sign in masks[start : start + BATCH]
        ]
        for low in range(0, len(part), chunk_words):
            target = part[low : low + chunk_words]
            plain, added = zeros[: target.nbytes], buffer[: len(target)]
            for encryptor, combine in batch:
                encryptor.update_into(plain, stream)  # a keystream is zeros, encrypted
                combine(target, added, out=target)  # unsigned: wraps modulo 2^b
