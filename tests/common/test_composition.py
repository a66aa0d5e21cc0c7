"""The matrix says what is exact; arithmetic on a real adapter says whether it is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from common.adapter import Layout, Vector, write_vector
from common.composition import Combination, Verdict, aggregates, matrix, noise_is_linear, under_secure_sum
from common.config import AdapterMethod
from common.models import AdaptedModel, Part
from tests.conftest import World, moved


def weight_change(model: AdaptedModel, vector: Vector) -> torch.Tensor:
    """B·A of the first adapted layer, whether A trains or not."""
    write_vector(model.parameters, model.layout, vector)
    values = dict(model.module.named_parameters())
    name = next(n for n in sorted(values) if ".lora_B." in n)
    return (values[name] @ values[name.replace(".lora_B.", ".lora_A.")]).detach().clone()


def with_changes(model: AdaptedModel, part: Part, seed: int) -> Vector:
    """The common start, moved where a round of `part` trains."""
    vector = moved(model)
    positions = model.layout.positions(Layout.of(model.active(part)))
    vector[positions] += np.random.default_rng(seed).normal(size=positions.size).astype(np.float32)
    return vector


@pytest.mark.parametrize(
    ("method", "part"),
    [
        (AdapterMethod.FFA, Part.ALL),
        (AdapterMethod.ROLORA, Part.A_AND_HEAD),
        (AdapterMethod.ROLORA, Part.B_AND_HEAD),
        (AdapterMethod.LORA, Part.ALL),
    ],
)
def test_the_verdict_is_what_arithmetic_says(
    world: Callable[..., World], method: AdapterMethod, part: Part
) -> None:
    model = world("bert-mean", method.value).model
    sites = [with_changes(model, part, seed) for seed in (1, 2, 3)]
    mean_of_products = torch.stack([weight_change(model, v) for v in sites]).mean(dim=0)
    product_of_means = weight_change(model, np.mean(sites, axis=0).astype(np.float32))
    exact = torch.allclose(mean_of_products, product_of_means, atol=1e-5)
    assert exact == (aggregates(method, Combination.MEAN) is Verdict.EXACT)


def test_what_needs_each_site_s_factors_is_refused() -> None:
    for method in AdapterMethod:
        for combination in (Combination.STACKING, Combination.RESIDUAL):
            assert aggregates(method, combination) is Verdict.REFUSED
            assert not under_secure_sum(combination)


def test_the_matrix_has_every_pair_once() -> None:
    rows = matrix()
    assert len({row[:2] for row in rows}) == len(rows) == len(AdapterMethod) * len(Combination)
    assert ("ffa", "mean of the factors", "exact", "yes", "linear") in rows
    assert [m for m in AdapterMethod if not noise_is_linear(m)] == [AdapterMethod.LORA]
