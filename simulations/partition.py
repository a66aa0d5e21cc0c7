"""Who holds which record: ways to split one data set among simulated sites.

Every function returns sorted int64 arrays of record indices that are disjoint and together cover all
records. The result depends on nothing but the arguments and the state of `rng`.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from common.errors import DataError

Indices: TypeAlias = npt.NDArray[np.int64]


def iid(n: int, sites: int, rng: np.random.Generator) -> list[Indices]:
    """`n` records dealt at random; the sites' sizes differ by at most one.

    Returns: `sites` arrays, the s-th of shape `(n_s,)`.

    Raises:
        DataError: `sites` < 1, or more sites than records.
    """
    _check_sites(sites, n, "records")
    return _sorted(np.array_split(rng.permutation(n), sites))


def dirichlet(
    labels: npt.NDArray[np.integer],
    sites: int,
    alpha: float,
    rng: np.random.Generator,
    *,
    minimum: int = 1,
) -> list[Indices]:
    """Label skew: each class is divided among the sites by its own draw from Dirichlet(alpha, ..., alpha).

    `labels` has shape `(n,)`. Small alpha: a site sees few classes; large alpha: like `iid`. After the
    draw (as in Yurochkin et al., 2019, arXiv:1905.12022) a site with fewer than `minimum`
    records is filled up, one record at a time, each taken at random from the site that is largest at
    that moment. Redrawing instead would never end for many sites and a small alpha.

    Raises:
        DataError: `sites` < 1, alpha not a finite number > 0, `minimum` < 0, or fewer records than
            sites x max(minimum, 1).
    """
    if labels.ndim != 1:
        raise DataError(f"labels must be a flat array, one a record, found shape {labels.shape}.")
    n = len(labels)
    _check_sites(sites, n, "records")
    if not (alpha > 0 and math.isfinite(alpha)):
        raise DataError(
            f"alpha must be a finite number > 0, found {alpha}. "
            "Try 0.5 for a strong label skew, or choose iid for none."
        )
    if minimum < 0:
        raise DataError(f"minimum must be >= 0, found {minimum}. 1 leaves no site empty.")
    if sites * minimum > n:
        raise DataError(
            f"{sites} sites with at least {minimum} records each need {sites * minimum} records, found {n}. "
            f"Use at most {n // minimum} sites, or lower the minimum."
        )
    site_of = np.empty(n, np.int64)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        ends = np.cumsum(_shares(sites, alpha, rng)) * len(members)
        # Record j of the class goes to the site whose interval holds j + 1/2.
        # The half also keeps the last record inside when the last end is rounded down.
        site_of[members] = np.searchsorted(ends, np.arange(len(members)) + 0.5)
    shards = [shard.tolist() for shard in _shards(site_of, sites)]
    _fill_up(shards, minimum, rng)
    return _sorted([np.array(shard, np.int64) for shard in shards])


def by_group(groups: Sequence[str], sites: int, rng: np.random.Generator) -> list[Indices]:
    """Natural skew: whole groups (a film, a patient) go to one site each, balanced by record count.

    `groups` names each record's group, length n. The largest group goes first, each to the site with
    the fewest records so far; groups of one size go in random order. No site stays empty.
    O(n log n), whatever the number of sites.

    Raises:
        DataError: `sites` < 1, or more sites than groups.
    """
    codes = _codes(groups)
    sizes = np.bincount(codes)
    _check_sites(sites, len(sizes), "groups")
    order = rng.permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]
    site_of_group = np.empty(len(sizes), np.int64)
    lightest = [(0, site) for site in range(sites)]  # a heap of (records, site); sorted, so it is one
    for group in order.tolist():
        load, site = lightest[0]
        site_of_group[group] = site
        heapq.heapreplace(lightest, (load + int(sizes[group]), site))
    return _shards(site_of_group[codes], sites)


def hold_out(
    n: int, fraction: float, rng: np.random.Generator, *, groups: Sequence[str] | None
) -> tuple[Indices, Indices]:
    """Set about `fraction` of `n` records aside at random: (kept, held out), neither empty.

    With `groups` (length n) whole groups are set aside: they are visited in random order, and one is
    taken if that brings the count nearer to fraction x n. So no group is in both parts.

    Raises:
        DataError: `fraction` not in (0, 1), fewer than two records or groups, or `groups` of another
            length than n.
    """
    if not 0 < fraction < 1:
        raise DataError(f"the held-out fraction must be in (0, 1), found {fraction}. Try 0.1.")
    if groups is not None and len(groups) != n:
        raise DataError(f"groups must name one group a record: expected {n} names, found {len(groups)}.")
    # Without groups each record is a group of its own.
    codes = np.arange(n) if groups is None else _codes(groups)
    sizes = np.bincount(codes)
    if len(sizes) < 2:
        what = "records" if groups is None else "groups"
        raise DataError(
            f"holding {what} out needs at least 2 {what}, found {len(sizes)}. "
            "Add data, or name a file of its own to test on."
        )
    target = fraction * n
    held = np.zeros(len(sizes), np.bool_)
    count = 0
    order = rng.permutation(len(sizes))
    for group in order.tolist():
        size = int(sizes[group])
        if abs(count + size - target) < abs(count - target):
            held[group] = True
            count += size
    smallest = order[np.argmin(sizes[order])]  # the first of them in random order
    if not held.any():
        held[smallest] = True
    if held.all():
        held[smallest] = False
    is_held = held[codes]
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)


def _check_sites(sites: int, available: int, what: str) -> None:
    if sites < 1:
        raise DataError(f"sites must be >= 1, found {sites}. Set the number of sites.")
    if sites > available:
        raise DataError(
            f"{sites} sites need at least {sites} {what}, found {available}. "
            f"Use at most {available} sites, or add data."
        )


def _shares(sites: int, alpha: float, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """One draw from the symmetric Dirichlet distribution, shape `(sites,)`, summing to 1."""
    shares = rng.dirichlet(np.full(sites, alpha))
    total = float(shares.sum())
    # At an alpha near the largest float the draw overflows; its limit is equal shares.
    return shares / total if total > 0 and math.isfinite(total) else np.full(sites, 1 / sites)


def _fill_up(shards: list[list[int]], minimum: int, rng: np.random.Generator) -> None:
    """Move single records from the largest shard until every shard holds `minimum`. In place.

    It ends: while a shard is short the largest holds more than `minimum`, as the mean is not below it.
    """
    largest = [(-len(shard), site) for site, shard in enumerate(shards) if len(shard) > minimum]
    heapq.heapify(largest)
    for shard in shards:
        while len(shard) < minimum:
            negative, site = largest[0]
            donor = shards[site]
            drawn = int(rng.integers(len(donor)))
            donor[drawn], donor[-1] = donor[-1], donor[drawn]
            shard.append(donor.pop())
            heapq.heapreplace(largest, (negative + 1, site))


def _codes(groups: Sequence[str]) -> Indices:
    """Each record's group as a number, shape `(n,)`; groups are numbered as they first occur."""
    numbers: dict[str, int] = {}
    return np.fromiter((numbers.setdefault(group, len(numbers)) for group in groups), np.int64, len(groups))


def _shards(site_of: Indices, sites: int) -> list[Indices]:
    """The sorted record indices of each site, from each record's site, shape `(n,)`."""
    order = np.argsort(site_of, kind="stable")  # stable: so each shard is sorted
    return np.split(order, np.cumsum(np.bincount(site_of, minlength=sites))[:-1])


def _sorted(shards: Sequence[Indices]) -> list[Indices]:
    return [np.sort(shard) for shard in shards]
