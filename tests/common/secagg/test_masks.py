"""Masks against an oracle: the counter blocks, encrypted one by one with AES-ECB, added as integers."""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from common.secagg import masks
from common.secagg.keys import Secret
from common.secagg.masks import ADD, SUBTRACT, apply_masks, keystream, ring_dtype
from tests.secagg_world import Stream


def oracle(seed: bytes, words: int, bits: int) -> list[int]:
    size = bits // 8
    encryptor = Cipher(algorithms.AES(seed), modes.ECB()).encryptor()
    blocks = -(-words * size // 16)
    stream = b"".join(encryptor.update(block.to_bytes(16, "big")) for block in range(blocks))
    return [int.from_bytes(stream[i * size : (i + 1) * size], "little") for i in range(words)]


@pytest.mark.parametrize("bits", [16, 32])
@given(
    st.integers(1, 300), st.lists(st.tuples(st.integers(0, 50), st.sampled_from([ADD, SUBTRACT])), max_size=4)
)
@settings(max_examples=40, deadline=None)
def test_masks_are_sums_of_keystreams(bits: int, words: int, chosen: list[tuple[int, int]]) -> None:
    start = Stream(1)(words * bits // 8)
    vector = np.frombuffer(start, dtype=ring_dtype(bits)).copy()
    plain = [int(word) for word in vector]
    seeds = [(Stream(number)(32), sign) for number, sign in chosen]
    apply_masks(vector, [(Secret(seed), sign) for seed, sign in seeds])
    for seed, sign in seeds:
        plain = [(a + sign * b) % 2**bits for a, b in zip(plain, oracle(seed, words, bits), strict=True)]
    assert vector.tolist() == plain


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("chunk", [16, 48, 256, 4096])
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_chunks_and_threads_change_nothing(
    monkeypatch: pytest.MonkeyPatch, bits: int, chunk: int, threads: int
) -> None:
    seeds = [(Secret(Stream(i)(32)), sign) for i, sign in enumerate((ADD, SUBTRACT, ADD))]
    expected = np.zeros(5003, dtype=ring_dtype(bits))
    apply_masks(expected, seeds)
    monkeypatch.setattr(masks, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(masks, "SPLIT_BYTES", 0)
    found = np.zeros(5003, dtype=ring_dtype(bits))
    apply_masks(found, seeds, threads)
    assert np.array_equal(found, expected)


def test_real_chunk_borders() -> None:
    words = masks.CHUNK_BYTES // 4 + 5
    seed = Stream(3)(32)
    assert keystream(Secret(seed), words, 32)[-10:].tolist() == oracle(seed, words, 32)[-10:]


def test_adding_and_subtracting_cancel() -> None:
    vector = np.frombuffer(Stream(1)(4000), dtype="<u4").copy()
    before = vector.copy()
    seed = Secret(Stream(2)(32))
    apply_masks(vector, [(seed, ADD)])
    assert not np.array_equal(vector, before)
    apply_masks(vector, [(seed, SUBTRACT)])
    assert np.array_equal(vector, before)


def test_a_masked_constant_looks_uniform() -> None:
    """Chi-square over bytes of a masked all-zero vector: 255 df, p = 1e-6 at 377."""
    vector = keystream(Secret(Stream(4)(32)), 65_536, 32)
    counts = np.bincount(vector.view("u1"), minlength=256)
    expected = vector.nbytes / 256
    assert (((counts - expected) ** 2) / expected).sum() < 377


@pytest.mark.parametrize(
    "vector",
    [
        np.zeros(4, dtype=">u4"),
        np.zeros(4, dtype="<i4"),
        np.zeros(4, dtype="<u8"),
        np.zeros(4, dtype="<f4"),
        np.zeros((2, 2), dtype="<u4"),
        np.zeros(8, dtype="<u4")[::2],
        np.frombuffer(bytes(16), dtype="<u4"),
    ],
    ids=["big-endian", "signed", "64 bits", "float", "matrix", "strided", "read-only"],
)
def test_other_arrays_are_refused(vector: np.ndarray) -> None:
    with pytest.raises(ValueError):
        apply_masks(vector, [(Secret(bytes(32)), ADD)])
