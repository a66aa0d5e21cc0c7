"""The graph: thresholds against scipy's hypergeometric tails, connectivity against networkx."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import combinations

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import hypergeom

from common.secagg import graph
from common.secagg.errors import PolicyError
from common.secagg.graph import GraphRule, build_graph, regular_parameters, threshold
from common.secagg.transcript import digest

THIRD = Fraction(1, 3)
WEAK = GraphRule(complete_up_to=8, secrecy_bits=16, abort_bits=8)


@pytest.mark.parametrize(("n", "t"), [(3, 3), (4, 3), (6, 5), (8, 6), (10, 7), (100, 67), (1000, 667)])
def test_thresholds_of_the_protocol(n: int, t: int) -> None:
    assert threshold(n, THIRD) == t


@given(st.integers(1, 20_000), st.fractions(0, Fraction(99, 100)))
def test_two_survivor_sets_need_more_liars_than_there_are(n: int, gamma: Fraction) -> None:
    t = threshold(n, gamma)
    assert 2 * t > n + math.floor(gamma * n)
    assert t <= n or n <= 2 or gamma > Fraction(n - 2, n)


CASES = [(257, 30, 9), (1000, 64, 21), (1000, 200, 66), (5000, 100, 33)]


@pytest.mark.parametrize(("n", "min_cohort", "c_max"), CASES)
@pytest.mark.parametrize("dropout", [Fraction(1, 10), THIRD])
def test_degree_holds_what_it_promises(n: int, min_cohort: int, c_max: int, dropout: Fraction) -> None:
    rule = GraphRule(dropout=dropout)
    found = regular_parameters(n, min_cohort, c_max, rule)
    assert found is not None
    k, t_k = found
    assert k % 2 == 0 and 2 <= k < n - 1 and 1 <= t_k <= k
    dropped = math.ceil(dropout * n)
    # (1) and (3): the most colluders next to anybody, by scipy's floating-point tail
    colluders = hypergeom(n - 1, c_max, k)
    a = next(x for x in range(k + 1) if n * colluders.sf(x) <= 2.0**-rule.secrecy_bits)
    assert t_k - a >= min_cohort - c_max
    # (2)
    assert n * hypergeom(n - 1, dropped, k).sf(k - t_k) <= 2.0**-rule.abort_bits * (1 + 1e-6)
    # (4): k/2 sites in a row all lost
    lost, run = c_max + dropped, k // 2
    log_run = sum(math.log2((lost - i) / (n - i)) for i in range(run)) if run <= lost else -math.inf
    assert math.log2(n) + log_run <= -rule.secrecy_bits
    # and two less would not do
    assert graph._local_threshold(n, k - 2, min_cohort, c_max, rule) is None


@pytest.mark.parametrize("n", [20, 101, 1000])
@pytest.mark.parametrize("marked", [0, 1, 9, 20])
@pytest.mark.parametrize("bits", [1, 10, 40])
def test_tail_bound_against_scipy(n: int, marked: int, bits: int) -> None:
    k = 10
    bound = graph._tail_bound(n, marked, k, bits)
    tail = hypergeom(n - 1, min(marked, n - 1), k)
    assert n * tail.sf(bound) <= 2.0**-bits * (1 + 1e-9)
    assert bound == 0 or n * tail.sf(bound - 1) > 2.0**-bits * (1 - 1e-9)


def test_a_large_minimum_cohort_needs_the_complete_graph() -> None:
    assert regular_parameters(300, 250, 83, GraphRule()) is None


@given(st.integers(9, 60), st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_everybody_computes_the_same_symmetric_graph(n: int, seed: int) -> None:
    members = tuple(range(3, 3 + 2 * n, 2))
    h1 = digest(b"t", bytes([seed]))
    made = build_graph(members, h1, t=threshold(n, THIRD), min_cohort=3, c_max=0, rule=WEAK)
    for site in members:
        around = made.neighbours(site)
        assert list(around) == sorted(set(around)) and site not in around and len(around) == made.degree
        assert all(site in made.neighbours(other) for other in around)


def test_the_order_depends_on_h1() -> None:
    members = tuple(range(1, 41))
    rings = {
        build_graph(members, digest(b"t", bytes([i])), t=27, min_cohort=3, c_max=0, rule=WEAK).ring
        for i in range(4)
    }
    assert len(rings) == 4


def test_up_to_the_limit_the_graph_is_complete_and_keeps_t() -> None:
    members = tuple(range(1, 257))
    made = build_graph(members, bytes(32), t=171, min_cohort=30, c_max=9, rule=GraphRule())
    assert made.is_complete and made.share_threshold == 171
    assert made.neighbours(7) == tuple(site for site in members if site != 7)
    sparse = build_graph((*members, 257), bytes(32), t=172, min_cohort=30, c_max=9, rule=GraphRule())
    assert not sparse.is_complete and sparse.degree < 256


def test_strangers_have_no_neighbours() -> None:
    for n in (5, 40):
        made = build_graph(tuple(range(1, n + 1)), bytes(32), t=4, min_cohort=3, c_max=0, rule=WEAK)
        with pytest.raises(ValueError):
            made.neighbours(n + 1)


def test_a_ring_falls_apart_only_by_two_runs_of_half_its_degree() -> None:
    """The claim behind (4), by brute force on a small ring: 14 sites, degree 4, any 4 lost."""
    n, k = 14, 4
    full = nx.circulant_graph(n, range(1, k // 2 + 1))
    for lost in combinations(range(n), 4):
        rest = full.copy()
        rest.remove_nodes_from(lost)
        runs = sum(all((start + i) % n in lost for i in range(k // 2)) for start in range(n))
        assert nx.is_connected(rest) or runs >= 2


@pytest.mark.parametrize(
    "changes", [{"complete_up_to": 0}, {"dropout": Fraction(1)}, {"secrecy_bits": 0}, {"abort_bits": 0}]
)
def test_bad_rules_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(PolicyError):
        GraphRule(**changes)  # type: ignore[arg-type]
