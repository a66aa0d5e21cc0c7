"""The shape of the repository: names that are ours alone, no privacy behind `assert`, files one can read."""

from __future__ import annotations

import ast
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("common", "client", "server", "simulations")
PRODUCT = sorted([ROOT / "confide.py", *(p for room in ROOMS for p in (ROOT / room).rglob("*.py"))])
LONGEST = 450


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("name", [*ROOMS, "confide"])
def test_no_other_distribution_owns_our_names(name: str) -> None:
    assert set(packages_distributions().get(name, [])) <= {"confide"}


@pytest.mark.parametrize("name", [*ROOMS, "confide"])
def test_the_code_tested_is_this_repository_s(name: str) -> None:
    module = __import__(name)
    assert module.__file__ is not None
    assert Path(module.__file__).resolve().is_relative_to(ROOT)


@pytest.mark.parametrize("path", PRODUCT, ids=named)
def test_no_assert_guards_anything(path: Path) -> None:
    """`python -O` leaves them out."""
    tree = ast.parse(path.read_text("utf-8"))
    assert [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)] == []


@pytest.mark.parametrize("path", PRODUCT, ids=named)
def test_a_file_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) < LONGEST
