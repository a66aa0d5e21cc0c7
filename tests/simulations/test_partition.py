"""Partitions of records among sites: properties that hold for any data, and each refusal."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from common.errors import DataError
from simulations.partition import by_group, dirichlet, hold_out, iid

SEEDS = st.integers(0, 2**32)
GROUPS = st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=80)


def check(parts: Sequence[npt.NDArray[np.int64]], n: int) -> None:
    """Sorted int64 arrays, disjoint, together all of range(n)."""
    for part in parts:
        assert part.dtype == np.int64 and part.ndim == 1
        assert (np.diff(part) > 0).all()
    assert sorted(np.concatenate(parts).tolist()) == list(range(n))


def skew(labels: npt.NDArray[np.int64], shards: Sequence[npt.NDArray[np.int64]]) -> float:
    """Mean share of the commonest class at a site."""
    return float(np.mean([np.bincount(labels[shard]).max() / len(shard) for shard in shards]))


# iid


@settings(deadline=None)
@given(SEEDS, st.integers(1, 200), st.integers(1, 50))
def test_iid_covers_all_in_equal_parts(seed: int, n: int, sites: int) -> None:
    assume(sites <= n)
    shards = iid(n, sites, np.random.default_rng(seed))
    assert len(shards) == sites
    check(shards, n)
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= 1


def test_iid_is_shuffled() -> None:
    first = iid(1000, 2, np.random.default_rng(0))[0]
    assert 400 < np.mean(first) < 600  # not the first half


# dirichlet


@settings(deadline=None)
@given(
    SEEDS,
    st.lists(st.integers(0, 5), min_size=1, max_size=120),
    st.integers(1, 20),
    st.floats(0, exclude_min=True, allow_nan=False, allow_infinity=False),
    st.integers(0, 6),
)
@example(seed=0, labels=[0] * 20, sites=4, alpha=1e308, minimum=1)
@example(seed=0, labels=[0] * 20, sites=4, alpha=5e-324, minimum=1)
def test_dirichlet_covers_all_and_leaves_none_short(
    seed: int, labels: list[int], sites: int, alpha: float, minimum: int
) -> None:
    assume(sites * max(minimum, 1) <= len(labels))
    shards = dirichlet(np.array(labels), sites, alpha, np.random.default_rng(seed), minimum=minimum)
    assert len(shards) == sites
    check(shards, len(labels))
    assert min(len(shard) for shard in shards) >= minimum


def test_dirichlet_skews_more_as_alpha_falls() -> None:
    labels = np.random.default_rng(0).integers(0, 10, 5000)
    strong, mild, none = (
        skew(labels, dirichlet(labels, 10, alpha, np.random.default_rng(1))) for alpha in (0.05, 1.0, 1000.0)
    )
    assert strong > 0.5 > mild > 0.15 > none


def test_dirichlet_shares_have_the_moments_of_the_distribution() -> None:
    # A site's share of a class is Beta(alpha, (sites - 1) alpha): mean 1/4, variance 3/16 / (4 alpha + 1).
    labels = np.repeat(np.arange(400), 200)
    shards = dirichlet(labels, 4, 0.5, np.random.default_rng(2))
    shares = np.stack([np.bincount(labels[shard], minlength=400) / 200 for shard in shards])
    assert np.allclose(shares.mean(axis=1), 0.25, atol=0.05)
    assert shares.var() == pytest.approx(3 / 16 / 3, rel=0.1)


def test_dirichlet_of_overflowing_alpha_is_equal_shares() -> None:
    shards = dirichlet(np.zeros(20, int), 4, 1e308, np.random.default_rng(0))
    assert [len(shard) for shard in shards] == [5, 5, 5, 5]


def test_dirichlet_shuffles_within_a_class() -> None:
    first = dirichlet(np.zeros(1000, int), 2, 1000.0, np.random.default_rng(0))[0]
    assert 400 < np.mean(first) < 600  # not the first half


def test_dirichlet_fills_up_a_thousand_sites() -> None:
    labels = np.random.default_rng(0).integers(0, 3, 20_000)
    shards = dirichlet(labels, 1000, 0.01, np.random.default_rng(1), minimum=10)
    check(shards, 20_000)
    assert min(len(shard) for shard in shards) == 10


# by_group


@settings(deadline=None)
@given(SEEDS, GROUPS, st.integers(1, 10))
def test_by_group_keeps_groups_whole_and_no_site_empty(seed: int, groups: list[str], sites: int) -> None:
    assume(sites <= len(set(groups)))
    shards = by_group(groups, sites, np.random.default_rng(seed))
    assert len(shards) == sites
    check(shards, len(groups))
    held = [{groups[i] for i in shard} for shard in shards]
    assert all(held) and sum(map(len, held)) == len(set(groups))
    # Greedy: without its last group no site was the fuller one, so the spread is one group at most.
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= max(groups.count(group) for group in set(groups))


def test_by_group_balances() -> None:
    groups = ["big"] * 6 + ["mid"] * 4 + ["one", "two"]
    shards = by_group(groups, 2, np.random.default_rng(0))
    assert sorted(len(shard) for shard in shards) == [6, 6]


def test_by_group_of_equal_groups_depends_on_the_generator() -> None:
    groups = [str(i) for i in range(100)]
    one, two = (by_group(groups, 2, np.random.default_rng(seed))[0].tolist() for seed in (0, 1))
    assert one != two


def test_by_group_is_fast_for_a_thousand_sites() -> None:
    groups = [f"group {i}" for i in np.random.default_rng(0).integers(0, 20_000, 100_000)]
    start = time.process_time()
    shards = by_group(groups, 1000, np.random.default_rng(1))
    assert time.process_time() - start < 2
    check(shards, 100_000)
    assert max(map(len, shards)) - min(map(len, shards)) <= 5


# hold_out


@settings(deadline=None)
@given(SEEDS, st.integers(2, 200), st.floats(0.001, 0.999))
def test_hold_out_takes_the_fraction(seed: int, n: int, fraction: float) -> None:
    kept, held = hold_out(n, fraction, np.random.default_rng(seed), groups=None)
    check([kept, held], n)
    assert len(kept) and len(held)
    assert abs(len(held) - fraction * n) <= 1


@settings(deadline=None)
@given(SEEDS, GROUPS, st.floats(0.001, 0.999))
def test_hold_out_keeps_groups_whole(seed: int, groups: list[str], fraction: float) -> None:
    assume(len(set(groups)) >= 2)
    kept, held = hold_out(len(groups), fraction, np.random.default_rng(seed), groups=groups)
    check([kept, held], len(groups))
    assert len(kept) and len(held)
    assert not {groups[i] for i in kept} & {groups[i] for i in held}


def test_hold_out_of_small_groups_comes_near_the_fraction() -> None:
    groups = [f"{i}" for i in np.random.default_rng(0).integers(0, 500, 10_000)]
    _, held = hold_out(10_000, 0.2, np.random.default_rng(1), groups=groups)
    assert abs(len(held) - 2000) <= 20


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_hold_out_of_a_single_record_is_random(fraction: float) -> None:
    parts = [hold_out(10, fraction, np.random.default_rng(seed), groups=None) for seed in range(40)]
    single = {int(min(pair, key=len)[0]) for pair in parts}
    assert len(single) > 5


# All of them


@pytest.mark.parametrize(
    "split",
    [
        lambda rng: iid(50, 5, rng),
        lambda rng: dirichlet(np.arange(50) % 3, 5, 0.3, rng, minimum=4),
        lambda rng: by_group([str(i % 20) for i in range(50)], 5, rng),
        lambda rng: hold_out(50, 0.3, rng, groups=None),
        lambda rng: hold_out(50, 0.3, rng, groups=[str(i % 20) for i in range(50)]),
    ],
)
def test_one_seed_gives_one_partition(split: Callable[[np.random.Generator], Sequence[object]]) -> None:
    one, two, other = (split(np.random.default_rng(seed)) for seed in (7, 7, 8))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


# Refusals


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (lambda rng: iid(3, 4, rng), "4 sites need at least 4 records, found 3. Use at most 3"),
        (lambda rng: iid(3, 0, rng), "sites must be >= 1, found 0"),
        (lambda rng: dirichlet(np.zeros(3, int), 4, 1.0, rng, minimum=0), "4 sites need at least 4 records"),
        (lambda rng: dirichlet(np.zeros(3, int), -1, 1.0, rng), "sites must be >= 1, found -1"),
        (lambda rng: dirichlet(np.zeros(3, int), 2, 1.0, rng, minimum=2), "need 4 records, found 3"),
        (lambda rng: dirichlet(np.zeros(3, int), 2, 1.0, rng, minimum=-1), "minimum must be >= 0, found -1"),
        (lambda rng: dirichlet(np.zeros((3, 1), int), 2, 1.0, rng), "labels must be a flat array"),
        (lambda rng: by_group(["a", "a", "b"], 3, rng), "3 sites need at least 3 groups, found 2"),
        (lambda rng: by_group(["a"], 0, rng), "sites must be >= 1, found 0"),
        (lambda rng: by_group([], 1, rng), "1 sites need at least 1 groups, found 0"),
        (lambda rng: hold_out(1, 0.5, rng, groups=None), "at least 2 records, found 1"),
        (lambda rng: hold_out(0, 0.5, rng, groups=None), "at least 2 records, found 0"),
        (lambda rng: hold_out(3, 0.5, rng, groups=["a"] * 3), "at least 2 groups, found 1"),
        (lambda rng: hold_out(3, 0.5, rng, groups=["a", "b"]), "expected 3 names, found 2"),
    ],
)
def test_refusal_says_what_was_found(split: Callable[[np.random.Generator], object], message: str) -> None:
    with pytest.raises(DataError) as caught:
        split(np.random.default_rng(0))
    assert message in str(caught.value)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_alpha_that_is_no_positive_number(alpha: float) -> None:
    with pytest.raises(DataError, match="alpha must be a finite number > 0"):
        dirichlet(np.zeros(3, int), 2, alpha, np.random.default_rng(0))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.1, float("nan")])
def test_fraction_outside_the_open_interval(fraction: float) -> None:
    with pytest.raises(DataError, match=r"fraction must be in \(0, 1\)"):
        hold_out(10, fraction, np.random.default_rng(0), groups=None)
