"""Parameters as one vector: exact both ways, and a layout that cannot be mistaken for another."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from common.adapter import Layout, read_vector, write_vector
from common.errors import ModelError

SHAPES = {"b": (2, 3), "a": (4,), "c": (), "d": (0, 5)}


def parameters(value: float = 0.0) -> dict[str, torch.nn.Parameter]:
    return {name: torch.nn.Parameter(torch.full(shape, value)) for name, shape in SHAPES.items()}


def test_a_layout_is_in_the_order_of_names() -> None:
    layout = Layout.of(parameters())
    assert [name for name, _ in layout.entries] == ["a", "b", "c", "d"]
    assert layout.sizes == (4, 6, 1, 0) and layout.size == 11


def test_what_is_written_is_read_bit_for_bit() -> None:
    owners = parameters()
    layout = Layout.of(owners)
    vector = np.random.default_rng(0).normal(size=11).astype(np.float32)
    vector[0] = -0.0
    write_vector(owners, layout, vector)
    assert owners["b"].tolist() == vector[4:10].reshape(2, 3).tolist()
    assert read_vector(owners, layout).tobytes() == vector.tobytes()


def test_vectors_and_parameters_share_no_memory() -> None:
    owners = parameters()
    layout = Layout.of(owners)
    read = read_vector(owners, layout)
    read[:] = 5
    assert float(owners["a"].detach().abs().sum()) == 0
    write_vector(owners, layout, read)
    read[:] = 7
    assert owners["a"].tolist() == [5] * 4


@pytest.mark.parametrize(
    "bad",
    [
        np.ones(10, np.float32),
        np.ones(12, np.float32),
        np.ones((11, 1), np.float32),
        np.ones(11, np.float64),
        np.ones(11, np.int32),
        np.r_[np.ones(10), np.nan].astype(np.float32),
        np.r_[np.inf, np.ones(10)].astype(np.float32),
    ],
    ids=["short", "long", "matrix", "float64", "int32", "nan", "inf"],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(bad: np.ndarray) -> None:
    owners = parameters(3.0)
    layout = Layout.of(owners)
    with pytest.raises(ModelError):
        write_vector(owners, layout, bad)
    assert (read_vector(owners, layout) == 3).all()


def test_the_digest_tells_layouts_apart() -> None:
    layouts = [
        Layout((("a", (2, 3)), ("b", (4,)))),
        Layout((("b", (4,)), ("a", (2, 3)))),
        Layout((("a", (3, 2)), ("b", (4,)))),
        Layout((("a", (6,)), ("b", (4,)))),
        Layout((("a", (2, 3)), ("c", (4,)))),
        Layout((("a", (2, 3)),)),
        Layout(()),
    ]
    assert len({layout.digest for layout in layouts}) == len(layouts)
    # Pinned: sites of two releases compare digests.
    expected = hashlib.sha256(b'confide/layout/v1[["a",[2,3]]]').hexdigest()
    assert layouts[-2].digest == expected


def test_positions_find_a_part_in_the_whole() -> None:
    owners = parameters()
    whole = Layout.of(owners)
    part = Layout.of({name: owners[name] for name in ("c", "a")})
    vector = np.arange(11, dtype=np.float32)
    write_vector(owners, whole, vector)
    assert np.array_equal(vector[whole.positions(part)], read_vector(owners, part))
    assert whole.positions(Layout(())).size == 0
    with pytest.raises(ModelError, match="lacks"):
        part.positions(whole)
