"""Policies that would not protect are refused, and every field is in the hash."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest

from common.secagg.encoding import Codec, Count, Tensor
from common.secagg.errors import PolicyError
from common.secagg.graph import GraphRule
from common.secagg.policy import Policy, check_roster

CODEC = Codec(32, 100, 10, (Tensor(4, 1.0), Tensor(2, 0.5)), (Count("correct", 10),))
POLICY = Policy(CODEC, bytes(32), min_cohort=10, c_max=3)


@pytest.mark.parametrize(
    "changes",
    [
        {"min_cohort": 9},
        {"min_cohort": 2, "c_max": 0},
        {"c_max": -1},
        {"c_max": 4},
        {"min_cohort": 101},
        {"gamma": Fraction(1, 4)},
        {"gamma": Fraction(1)},
        {"gamma": Fraction(-1, 3)},
        {"layout_hash": bytes(31)},
    ],
)
def test_policies_that_do_not_protect_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(PolicyError):
        replace(POLICY, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"min_cohort": 11},
        {"c_max": 2},
        {"gamma": Fraction(2, 5)},
        {"layout_hash": bytes(31) + b"\1"},
        {"noise": "gaussian 0.5"},
        {"graph": GraphRule(complete_up_to=255)},
        {"graph": GraphRule(dropout=Fraction(1, 5))},
        {"graph": GraphRule(secrecy_bits=81)},
        {"graph": GraphRule(abort_bits=21)},
        {"codec": replace(CODEC, ring_bits=16)},
        {"codec": replace(CODEC, n_max=101)},
        {"codec": replace(CODEC, w_max=11)},
        {"codec": replace(CODEC, noise_bound=1)},
        {"codec": replace(CODEC, tensors=(Tensor(4, 1.0), Tensor(2, 0.25)))},
        {"codec": replace(CODEC, tensors=(Tensor(2, 0.5), Tensor(4, 1.0)))},
        {"codec": replace(CODEC, tensors=(Tensor(6, 1.0),))},
        {"codec": replace(CODEC, counts=())},
        {"codec": replace(CODEC, counts=(Count("correct", 11),))},
        {"codec": replace(CODEC, counts=(Count("wrong", 10),))},
    ],
)
def test_every_field_is_in_the_hash(changes: dict[str, object]) -> None:
    assert replace(POLICY, **changes).hash != POLICY.hash


def test_the_hash_does_not_depend_on_when_it_is_taken() -> None:
    assert Policy(CODEC, bytes(32), 10, 3).hash == POLICY.hash


@pytest.mark.parametrize(
    "roster", [{0: bytes(32)}, {2**32: bytes(32)}, {1: bytes(31)}, {1: bytes(32), 2: bytes(32)}]
)
def test_bad_rosters_are_refused(roster: dict[int, bytes]) -> None:
    with pytest.raises(PolicyError):
        check_roster(roster)
