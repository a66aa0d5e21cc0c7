"""Encoding against an oracle in exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.secagg.encoding import Codec, Count, Tensor
from common.secagg.errors import EncodingError, NonFiniteError, PolicyError
from common.secagg.masks import ring_dtype
from tests.secagg_world import Stream


def codec(bits: int = 32, n_max: int = 100, w_max: int = 1, **changes: object) -> Codec:
    fields: dict = {"tensors": (Tensor(4, 1.0), Tensor(3, 0.25))} | changes
    return Codec(bits, n_max, w_max, **fields)


def signed(word: int, bits: int) -> int:
    return word - 2**bits if word >= 2 ** (bits - 1) else word


sizes = st.sampled_from([16, 32])
values = st.lists(st.floats(-2, 2), min_size=7, max_size=7)


@given(sizes, st.integers(1, 1000), values, st.data())
@settings(max_examples=100, deadline=None)
def test_a_word_is_one_of_the_two_integers_around_its_value(
    bits: int, w_max: int, update: list[float], data: st.DataObject
) -> None:
    c = codec(bits, w_max=w_max)
    weight = data.draw(st.integers(0, w_max))
    vector = c.encode(np.array(update), weight, Stream(data.draw(st.integers(0, 9))))
    clips = [1.0] * 4 + [0.25] * 3
    for word, value, clip in zip(vector.tolist(), update, clips, strict=False):
        clipped = Fraction(max(-clip, min(clip, value)))
        exact = clipped / Fraction(clip) * (c.headroom - 1) * Fraction(weight, w_max)
        assert exact - 1 - Fraction(1, 2**20) < signed(word, bits) < exact + 1 + Fraction(1, 2**20)
        assert abs(signed(word, bits)) <= c.headroom


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("n_max", [1, 3, 100, 1000])
@pytest.mark.parametrize("noise_bound", [0, 5])
def test_n_max_sites_at_the_clip_never_wrap(bits: int, n_max: int, noise_bound: int) -> None:
    c = codec(bits, n_max, noise_bound=noise_bound)
    for sign in (1, -1):
        vector = c.encode(np.full(7, 1e30 * sign), 1, Stream(1))
        worst = max(abs(signed(word, bits)) for word in vector[:7].tolist()) + noise_bound
        assert worst * n_max <= 2 ** (bits - 1) - 1
    # and the bound is not only kept by these draws: the largest word possible is `headroom`
    assert (c.headroom + noise_bound) * n_max <= 2 ** (bits - 1) - 1


@given(sizes, st.integers(1, 12), st.integers(1, 50), st.data())
@settings(max_examples=60, deadline=None)
def test_the_decoded_mean_is_the_weighted_mean(
    bits: int, sites: int, w_max: int, data: st.DataObject
) -> None:
    counts = (Count("correct", 10_000), Count("loss", 3))
    c = codec(bits, n_max=20, w_max=w_max, counts=counts)
    total = np.zeros(c.words, dtype=ring_dtype(bits))
    numerator, weights, reported = np.zeros(7), 0, {"correct": 0, "loss": 0}
    for site in range(sites):
        update = np.array(data.draw(st.lists(st.floats(-0.25, 0.25), min_size=7, max_size=7)))
        weight = data.draw(st.integers(1, w_max))
        mine = {count.name: data.draw(st.integers(-count.limit, count.limit)) for count in counts}
        total += c.encode(update, weight, Stream(site), mine)
        numerator += weight * update
        weights += weight
        reported = {name: reported[name] + mine[name] for name in reported}
    decoded = c.decode_sum(total, sites)
    assert decoded.weight == weights
    assert dict(decoded.counts) == reported
    quantum = np.array([1.0] * 4 + [0.25] * 3) / (c.headroom - 1)
    assert (np.abs(decoded.mean - numerator / weights) <= sites * quantum * w_max / weights).all()


def test_rounding_is_unbiased() -> None:
    c = codec(16, 100, tensors=(Tensor(40_000, 1.0),))
    value = 0.3 / (c.headroom - 1)  # three tenths of a word
    vector = c.encode(np.full(40_000, value), 1, Stream(5))[:-1].astype(np.int64)
    assert set(vector.tolist()) == {0, 1}
    assert abs(vector.mean() - 0.3) < 5 * math.sqrt(0.21 / 40_000)


def test_rounding_uses_fresh_randomness_in_every_call_and_chunk() -> None:
    c = codec(16, 100, tensors=(Tensor(70_000, 1.0),))
    update, random = np.full(70_000, 0.5 / (c.headroom - 1)), Stream(6)
    one, other = (c.encode(update, 1, random)[:-1] for _ in range(2))
    assert 0.45 < np.mean(one == other) < 0.55
    assert 0.45 < np.mean(one[:32_768] == one[32_768:65_536]) < 0.55


def test_scale_is_the_protocols() -> None:
    c = codec(32, 100)
    assert c.scale(c.tensors[0]) == ((2**31 - 1) // 100 - 1) / 1.0
    assert c.scale(c.tensors[1]) == ((2**31 - 1) // 100 - 1) / 0.25


@pytest.mark.parametrize(("bits", "bound"), [(32, 2e-9), (16, 1.5e-4)])
def test_error_of_the_mean_at_100_sites(bits: int, bound: float) -> None:
    """Root mean square error over clip, as docs/protocol.md states it."""
    size, sites = 2000, 100
    c = codec(bits, sites, tensors=(Tensor(size, 1.0),))
    rng = np.random.default_rng(1)
    total, exact = np.zeros(c.words, dtype=ring_dtype(bits)), np.zeros(size)
    for site in range(sites):
        update = rng.uniform(-1, 1, size)
        total += c.encode(update, 1, Stream(site))
        exact += update / sites
    error = np.sqrt(np.mean((c.decode_sum(total, sites).mean - exact) ** 2))
    assert error <= bound * 1.05


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4"])
def test_float_types(dtype: str) -> None:
    vector = codec().encode(np.full(7, 0.125, dtype=dtype), 1, Stream(1))
    assert abs(int(vector[0]) - 0.125 * (codec().headroom - 1)) <= 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 3, 6])
def test_non_finite_updates_are_refused(bad: float, place: int) -> None:
    update = np.zeros(7)
    update[place] = bad
    with pytest.raises(NonFiniteError):
        codec().encode(update, 1, Stream(1))


@pytest.mark.parametrize(
    "update",
    [
        np.zeros(6),
        np.zeros(8),
        np.zeros((7, 1)),
        np.zeros(7, dtype=int),
        np.zeros(7, dtype=object),
        [0.0] * 6,
    ],
)
def test_other_shapes_and_types_are_refused(update: object) -> None:
    with pytest.raises(EncodingError):
        codec().encode(update, 1, Stream(1))  # type: ignore[arg-type]


def test_refusals_do_not_tell_private_numbers() -> None:
    c = codec(w_max=10, counts=(Count("loss", 5),))
    for weight, counts in ((987654, {"loss": 1}), (1, {"loss": 987654})):
        with pytest.raises(EncodingError) as caught:
            c.encode(np.zeros(7), weight, Stream(1), counts)
        assert "987654" not in str(caught.value)


@pytest.mark.parametrize("bits", [16, 32])
@given(st.integers(1, 2**40), st.integers(1, 30), st.data())
@settings(max_examples=50, deadline=None)
def test_counts_of_any_size_sum_exactly(bits: int, limit: int, sites: int, data: st.DataObject) -> None:
    c = codec(bits, n_max=30, counts=(Count("a", limit),))
    total, plain = np.zeros(c.words, dtype=ring_dtype(bits)), 0
    for _ in range(sites):
        value = data.draw(st.one_of(st.integers(-limit, limit), st.sampled_from([-limit, limit])))
        total += c.encode(np.zeros(7), 1, Stream(1), {"a": value})
        plain += value
    assert c.decode_sum(total, sites).counts["a"] == plain


@pytest.mark.parametrize(
    "changes",
    [
        {"bits": 8},
        {"n_max": 0},
        {"w_max": 0},
        {"noise_bound": -1},
        {"bits": 16, "n_max": 16_384},
        {"tensors": ()},
        {"counts": (Count("a", 1), Count("a", 2))},
    ],
)
def test_bad_codecs_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(PolicyError):
        codec(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("size", "clip"), [(0, 1.0), (1, 0.0), (1, -1.0), (1, math.inf), (1, math.nan)])
def test_bad_tensors_are_refused(size: int, clip: float) -> None:
    with pytest.raises(PolicyError):
        Tensor(size, clip)
