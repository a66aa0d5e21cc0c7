"""What composes with what: which way to train an adapter survives which way to sum it.

mean(B)·mean(A) is not mean(B·A), so the mean of LoRA factors is exact only while one factor is the same at
every site (FFA-LoRA: Sun et al. 2024, 2403.12313; RoLoRA: Chen et al. 2024, 2409.02346). Stacking (FLoRA:
Wang et al. 2024, 2409.05976) and residuals (FedEx-LoRA: Singhal et al. 2024, 2410.09432) are exact too, but
need every site's factors one by one, which a secure sum never shows.
"""

from __future__ import annotations

from enum import Enum

from common.config import AdapterMethod


class Combination(Enum):
    """How updates become one adapter."""

    MEAN = "mean of the factors"
    STACKING = "stacking (FLoRA)"
    RESIDUAL = "residuals (FedEx-LoRA)"


class Verdict(Enum):
    EXACT = "exact"
    INEXACT = "inexact"
    REFUSED = "refused"


def aggregates(method: AdapterMethod, combination: Combination) -> Verdict:
    """Whether the combined adapter is the mean of the sites' adapters."""
    match combination, method:
        case Combination.MEAN, AdapterMethod.FFA | AdapterMethod.ROLORA:
            return Verdict.EXACT
        case Combination.MEAN, AdapterMethod.LORA:
            return Verdict.INEXACT
        case _:
            return Verdict.REFUSED  # not offered: it would need each site's factors in the clear


def under_secure_sum(combination: Combination) -> bool:
    """Whether the server can combine updates that it only sees the sum of."""
    return combination is Combination.MEAN


def noise_is_linear(method: AdapterMethod) -> bool:
    """Whether DP noise enters the weight change linearly; in plain LoRA noise in A meets noise in B."""
    return method is not AdapterMethod.LORA


def matrix() -> list[tuple[str, str, str, str, str]]:
    """Rows for people: method, combination, aggregate, under a secure sum, DP noise."""
    return [
        (
            method.value,
            combination.value,
            aggregates(method, combination).value,
            "yes" if under_secure_sum(combination) else "no",
            "linear" if noise_is_linear(method) else "product of noises",
        )
        for method in AdapterMethod
        for combination in Combination
    ]
