"""Shamir against an oracle: Lagrange interpolation with fractions of integers, straight from the book."""

from __future__ import annotations

import itertools
import random as plain_random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.secagg import shamir
from common.secagg.shamir import P, ShareSet
from tests.secagg_world import Stream


def oracle(points: list[int], shares: list[int], at: int = 0) -> int:
    """f(at) = Σ y_i Π (at − x_j)/(x_i − x_j), one inversion a factor."""
    total = 0
    for x, y in zip(points, shares, strict=True):
        term = y
        for other in points:
            if other != x:
                term = term * (at - other) % P * pow(x - other, -1, P) % P
        total = (total + term) % P
    return total


elements = st.integers(0, P - 1)
ids = st.lists(st.integers(1, 2**32 - 1), min_size=1, max_size=8, unique=True)


@given(elements, ids, st.data())
@settings(max_examples=60, deadline=None)
def test_any_t_shares_rebuild_as_the_oracle_says(
    secret: int, holders: list[int], data: st.DataObject
) -> None:
    threshold = data.draw(st.integers(1, len(holders)))
    shares = shamir.split(secret, threshold, holders, Stream(data.draw(st.integers(0, 99))))
    for chosen in itertools.combinations(range(len(holders)), threshold):
        points, values = [holders[i] for i in chosen], [shares[i] for i in chosen]
        assert shamir.combine(shamir.coefficients(points), values) == secret == oracle(points, values)


@given(elements, elements, st.integers(2, 6))
@settings(max_examples=40, deadline=None)
def test_t_minus_1_shares_fit_any_secret(secret: int, other: int, threshold: int) -> None:
    """Perfect secrecy: for each other secret there is a polynomial through the same t − 1 shares."""
    holders = list(range(1, threshold + 1))
    known = shamir.split(secret, threshold, holders, Stream(1))[: threshold - 1]
    points = [0, *holders[:-1]]
    missing = oracle(points, [other, *known], at=holders[-1])
    assert shamir.combine(shamir.coefficients(holders), [*known, missing]) == other


def test_t_minus_1_shares_are_uniform() -> None:
    """The same secret split often: the share's lowest byte passes a chi-square test (255 df, p = 1e-6)."""
    draws = 20_000
    counts = [0] * 256
    random = Stream(9)
    for _ in range(draws):
        counts[shamir.split(5, 2, [1, 2], random)[0] & 0xFF] += 1
    expected = draws / 256
    assert sum((count - expected) ** 2 / expected for count in counts) < 377


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_wrong_shares_are_survived_and_named(data: st.DataObject) -> None:
    n, threshold = 11, 5
    holders = sorted(data.draw(st.sets(st.integers(1, 2**32 - 1), min_size=n, max_size=n)))
    secret = data.draw(elements)
    shares = shamir.split(secret, threshold, holders, Stream(2))
    liars = data.draw(st.sets(st.sampled_from(range(n)), max_size=n - threshold))
    for liar in liars:
        shares[liar] = (shares[liar] + data.draw(st.integers(1, P - 1))) % P
    found = ShareSet(holders, threshold, Stream(3)).rebuild(shares, lambda value: value == secret)
    assert found is not None and found.secret == secret
    if len(liars) <= (n - threshold) // 2:
        assert found.certain and found.wrong == tuple(holders[liar] for liar in sorted(liars))
    else:
        assert found.wrong


def test_more_wrong_shares_than_spare_end_in_none() -> None:
    holders, secret = list(range(1, 8)), 1234
    shares = shamir.split(secret, 5, holders, Stream(4))
    for place in range(3):
        shares[place] = (shares[place] + shamir.random_element(Stream(place))) % P
    assert ShareSet(holders, 5, Stream(5)).rebuild(shares, lambda value: value == secret) is None


def test_liars_can_frame_others_only_where_the_result_says_so() -> None:
    """Three colluders of ten, t = 7: they shift f(0) back by choice, so blame would be guesswork."""
    holders, secret = list(range(1, 11)), 99
    shares = shamir.split(secret, 7, holders, Stream(6))
    for x in (2, 3, 9):
        shares[x - 1] = (shares[x - 1] + x) % P
    found = ShareSet(holders, 7, Stream(7)).rebuild(shares, lambda value: value == secret)
    assert found is not None and found.secret == secret and not found.certain


def test_shares_that_agree_on_another_secret_are_told_apart() -> None:
    holders = list(range(1, 8))
    dealt = shamir.split(5, 4, holders, Stream(8))
    pool = ShareSet(holders, 4, Stream(9))
    assert pool.rebuild(dealt, lambda value: value == 6) is None
    assert pool.agree(dealt)
    dealt[3] += 1
    assert not pool.agree(dealt)


def test_with_nothing_to_spare_agreement_shows_nothing() -> None:
    holders = [1, 2, 3]
    pool = ShareSet(holders, 3, Stream(1))
    shares = shamir.split(5, 3, holders, Stream(2))
    assert not pool.agree(shares)
    found = pool.rebuild(shares, lambda value: value == 5)
    assert found is not None and found.wrong == ()


@pytest.mark.parametrize(
    ("threshold", "holders"),
    [(0, [1, 2]), (3, [1, 2]), (1, []), (2, [1, 1]), (2, [0, 1]), (2, [1, P + 1]), (2, [-1, 1])],
)
def test_bad_splits_are_refused(threshold: int, holders: list[int]) -> None:
    with pytest.raises(ValueError):
        shamir.split(1, threshold, holders, Stream(1))


def test_elements_have_one_encoding() -> None:
    assert shamir.element(shamir.element_bytes(P - 1)) == P - 1
    for bad in (P.to_bytes(32, "little"), b"\xff" * 32, b"", bytes(31), bytes(33)):
        with pytest.raises(ValueError):
            shamir.element(bad)


def test_random_elements_are_drawn_again_above_the_field() -> None:
    draws = iter([b"\xff" * 32, (P + 3).to_bytes(32, "little"), (7).to_bytes(32, "little")])
    assert shamir.random_element(lambda _: next(draws)) == 7


def test_a_rebuilt_secret_does_not_show() -> None:
    found = ShareSet([1, 2], 1, Stream(1)).rebuild([4242, 4242], lambda value: True)
    assert "4242" not in repr(found)


def test_decoding_against_brute_force() -> None:
    """Every pattern of up to two wrong shares of nine, t = 5, found by decoding alone."""
    rng = plain_random.Random(1)
    holders = rng.sample(range(1, 1000), 9)
    secret = 77
    right = shamir.split(secret, 5, holders, Stream(11))
    for size in (0, 1, 2):
        for liars in itertools.combinations(range(9), size):
            shares = list(right)
            for liar in liars:
                shares[liar] = (shares[liar] + rng.randrange(1, P)) % P
            polynomial = shamir._decode_gao(holders, shares, 5)
            assert polynomial is not None and polynomial[0] == secret
