"""The noise stream: published cipher blocks, the distributions, and what must not coincide."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from common.errors import PrivacyError
from common.noise import NoiseStream, derived_key, fresh_key

KEY = bytes(range(32))


def test_keystream_known_answer() -> None:
    """AES-256 of counters 0, 1 and 2 under the zero key: the hash key and the first two blocks of test
    cases 13 and 14 of McGrew & Viega's GCM specification."""
    published = bytes.fromhex(
        "dc95c078a2408989ad48a21492842087530f8afbc74536b9a963b4f1c4cb738bcea7403d4d606b6e074ec5d3baf39d18"
    )
    words = NoiseStream(bytes(32))._words(6)
    assert words.tobytes() == published
    assert int(words[0]) == int.from_bytes(published[:8], "little")


def test_uniform_reads_the_words_in_order() -> None:
    words = NoiseStream(KEY)._words(10)
    stream = NoiseStream(KEY)
    drawn = np.concatenate([stream.uniform(3), stream.uniform(7)])
    assert np.array_equal(drawn, [(int(w) >> 11) / 2**53 for w in words])


def test_uniform_lies_in_the_half_open_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = NoiseStream(KEY).uniform(50_000)
    assert drawn.min() >= 0 and drawn.max() < 1
    assert stats.kstest(drawn, "uniform").pvalue > 0.01
    stream = NoiseStream(KEY)
    for word in (0, 2**64 - 1):  # the ends give finite noise too
        monkeypatch.setattr(stream, "_words", lambda n, w=word: np.full(n, w, dtype=np.uint64))
        assert 0 <= stream.uniform(1)[0] < 1
        assert math.isfinite(float(stream.gaussian((1,), 1.0)))


@pytest.mark.parametrize("std", [0.01, 1.0, 30.0])
def test_gaussian_distribution(std: float) -> None:
    drawn = NoiseStream(KEY).gaussian((200, 250), std).numpy().reshape(-1) / std
    assert drawn.dtype == np.float64
    assert stats.kstest(drawn, "norm").pvalue > 0.01
    n = len(drawn)
    assert abs(drawn.mean()) < 4 / math.sqrt(n)
    assert abs(drawn.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs(stats.skew(drawn)) < 4 * math.sqrt(6 / n)
    assert abs(stats.kurtosis(drawn)) < 4 * math.sqrt(24 / n)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_odd_and_even_counts_are_noisy_throughout(count: int) -> None:
    """The halves of a Box-Muller pair must not be equal, nor the last number be left out."""
    drawn = np.stack([NoiseStream(bytes([i]) * 32).gaussian((count,), 1.0).numpy() for i in range(256)])
    assert np.all(np.abs(drawn.std(axis=0) - 1) < 0.2)
    correlation = np.corrcoef(drawn.T).reshape(count, count) - np.eye(count)
    assert np.abs(correlation).max() < 0.25


def test_shapes() -> None:
    stream = NoiseStream(KEY)
    assert stream.gaussian((), 1.0).shape == ()
    assert stream.gaussian((0, 3), 1.0).shape == (0, 3)
    assert stream.gaussian((2, 3, 4), 1.0).shape == (2, 3, 4)
    assert stream.uniform(0).shape == (0,)


@pytest.mark.parametrize("std", [0.0, -1.0, math.nan, math.inf])
def test_noise_that_is_none_is_refused(std: float) -> None:
    with pytest.raises(PrivacyError, match="must be > 0"):
        NoiseStream(KEY).gaussian((3,), std)


@pytest.mark.parametrize("probability", [0.001, 0.05, 0.5, 0.99])
def test_bernoulli_rate(probability: float) -> None:
    n = 200_000
    hits = int(NoiseStream(KEY).bernoulli(n, probability).sum())
    assert stats.binomtest(hits, n, probability).pvalue > 0.01


def test_bernoulli_of_one_takes_all() -> None:
    assert NoiseStream(KEY).bernoulli(10_000, 1.0).all()


def test_one_key_gives_one_stream_and_draws_never_repeat() -> None:
    one, two = NoiseStream(KEY), NoiseStream(KEY)
    first = one.gaussian((1000,), 1.0)
    assert np.array_equal(first, two.gaussian((1000,), 1.0))
    assert not np.intersect1d(first, one.gaussian((1000,), 1.0)).size


def test_keys_give_independent_streams() -> None:
    n = 20_000
    one = NoiseStream(KEY).gaussian((n,), 1.0).numpy()
    for other in (bytes([1, *KEY[1:]]), bytes([*KEY[:-1], 32])):
        two = NoiseStream(other).gaussian((n,), 1.0).numpy()
        assert abs(np.corrcoef(one, two)[0, 1]) < 4 / math.sqrt(n)
        assert stats.kstest((one - two) / math.sqrt(2), "norm").pvalue > 0.01


@pytest.mark.parametrize("length", [0, 16, 31, 33])
def test_a_key_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(PrivacyError, match="32 bytes"):
        NoiseStream(bytes(length))


def test_repr_hides_the_key() -> None:
    key = b"0123456789abcdef0123456789ABCDEF"
    text = repr(NoiseStream(key)) + str(NoiseStream(key))
    assert key.decode() not in text and key.hex() not in text


def test_derived_keys_are_keyed_by_every_part_of_the_context() -> None:
    contexts = [(), (b"",), (b"", b""), (b"ab",), (b"a", b"b"), (b"ab", b""), (b"", b"ab"), (b"b", b"a")]
    keys = {derived_key(KEY, *context) for context in contexts}
    keys |= {derived_key(bytes(32), *context) for context in contexts}
    assert len(keys) == 2 * len(contexts)
    assert {len(key) for key in keys} == {32}


def test_a_length_prefix_cannot_be_forged() -> None:
    """One part that spells out another's prefix is not two parts."""
    assert derived_key(KEY, b"a", b"b") != derived_key(KEY, b"a" + (1).to_bytes(4, "little") + b"b")


def test_fresh_keys_are_fresh() -> None:
    assert len({fresh_key() for _ in range(100)}) == 100
