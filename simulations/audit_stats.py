"""The statistics of an audit: p-values, and the one-run lower bound on ε. Nothing here knows of a model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from common.errors import ConfigError

Floats = NDArray[np.float64]
Bits = NDArray[np.bool_]

# How many canaries an auditor dares to guess, each tried. Fewer than 40 would do for a leak that shows at a
# few canaries only, but ours are all alike, and an honest mechanism is lucky with few guesses more often.
GUESSES = (40, 80, 120, 160, 200)
_HIGHEST = 30.0  # no lower bound above it is looked for


def shares(values: Floats, edges: Floats) -> Floats:
    """`(len(edges) - 1,)`: the share of `values` in each bin; what lies beyond is in the end bins."""
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    found: Floats = counts / max(1, len(values))
    return found


def normal_p(z: float) -> float:
    """P[|N(0, 1)| ≥ |z|]."""
    return math.erfc(abs(z) / math.sqrt(2))


def chi_square_p(statistic: float, freedom: int) -> float:
    """Two-sided: twice the smaller tail of χ² with `freedom` degrees, at most 1; 0 if it is no number."""
    if not math.isfinite(statistic):
        return 0.0
    half, x = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    lower, upper = float(torch.special.gammainc(half, x)), float(torch.special.gammaincc(half, x))
    return min(1.0, 2 * min(lower, upper))


def gaussian_p(values: Floats) -> tuple[float, float]:
    """(largest distance D between the distribution of `values` and N(0, 1), its p-value).

    Kolmogorov-Smirnov; the p-value by Stephens's (1970) approximation, good to a few per cent from n = 20.
    """
    if not np.isfinite(values).all():
        return 1.0, 0.0
    ordered = np.sort(values)
    n = len(ordered)
    normal = (0.5 * torch.special.erfc(torch.from_numpy(-ordered / math.sqrt(2)))).numpy()
    steps = np.arange(n + 1) / n
    distance = float(max((steps[1:] - normal).max(), (normal - steps[:-1]).max()))
    scaled = distance * (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n))
    if scaled < 0.2:
        return distance, 1.0  # the series below does not converge there; it is 1 to twelve digits
    terms = ((-1) ** (j - 1) * math.exp(-2 * (j * scaled) ** 2) for j in range(1, 101))
    return distance, min(1.0, max(0.0, 2 * sum(terms)))


def correlation_p(vectors: Floats) -> tuple[float, float]:
    """(the largest correlation of any two rows of `vectors`, its p-value, Bonferroni over the pairs).

    `vectors` is `(count, length)`, of mean 0. Under independence Fisher's atanh(r)·√(length − 2) is N(0, 1).
    """
    count, length = vectors.shape
    norms = np.linalg.norm(vectors, axis=1)
    if not (np.isfinite(norms).all() and norms.all()):
        return 1.0, 0.0  # a row of zeros is no noise at all
    products = np.einsum("ik,jk->ij", vectors, vectors) / np.outer(norms, norms)
    pairs = products[np.triu_indices(count, 1)]
    largest = float(pairs[np.argmax(np.abs(pairs))])
    z = math.atanh(max(-1 + 1e-15, min(1 - 1e-15, largest))) * math.sqrt(length - 2)
    return largest, min(1.0, len(pairs) * normal_p(z))


def _binomial(n: int, epsilon: float) -> Floats:
    """`(n + 1,)`: P[Bin(n, q) = k], q = 1/(1 + e^−ε), in logarithms until the end."""
    k = np.arange(1, n + 1)
    choose = np.concatenate([[0.0], np.cumsum(np.log(n - k + 1) - np.log(k))])
    log_q = -math.log1p(math.exp(-epsilon))
    counts = np.arange(n + 1)
    probabilities: Floats = np.exp(choose + counts * log_q + (n - counts) * (log_q - epsilon))
    return probabilities


def one_run_p(guesses: int, right: int, canaries: int, epsilon: float, delta: float) -> float:
    """How likely `right` or more of `guesses` are right, at most, if the mechanism is (ε, δ)-DP.

    p(ε) = P[Bin(r, q) ≥ v] + 2mδ · max over 1 ≤ i ≤ v of P[v > Bin(r, q) ≥ v − i]/i, q = 1/(1 + e^−ε),
    with r = `guesses`, v = `right`, m = `canaries`: Steinke, Nasr & Jagielski 2023, 2305.08846,
    Theorem 5.2. It holds for canaries that are in or out by fair, independent coins.
    """
    tail = np.cumsum(_binomial(guesses, epsilon)[::-1])[::-1]  # tail[k] = P[Bin ≥ k]
    if right == 0:
        return 1.0
    i = np.arange(1, right + 1)
    slack = float(((tail[right - i] - tail[right]) / i).max())
    return min(1.0, float(tail[right]) + 2 * canaries * delta * slack)


@dataclass(frozen=True)
class OneRun:
    """A lower bound on ε that holds with confidence 1 − `alpha`, and the guesses that gave it."""

    epsilon: float
    guesses: int
    right: int
    alpha: float


def guess(included: Bits, scores: Floats) -> Iterator[tuple[int, int]]:
    """(guesses, how many are right): of k canaries the half with the highest scores is said to be in, the
    half with the lowest out."""
    order = np.argsort(scores, kind="stable")
    for count in sorted({min(g, len(scores) // 2 * 2) for g in GUESSES}):
        half = count // 2
        yield count, int(included[order[-half:]].sum() + (~included[order[:half]]).sum())


def one_run_claim_p(included: Bits, scores: Floats, epsilon: float, delta: float) -> float:
    """The p-value of the claim (ε, δ): the smallest over the guess counts, Bonferroni over them."""
    found = [one_run_p(r, v, len(scores), epsilon, delta) for r, v in guess(included, scores)]
    return min(1.0, len(found) * min(found))


def one_run_bound(included: Bits, scores: Floats, delta: float, alpha: float) -> OneRun:
    """The largest ε that is refuted: sup{ε : p(ε) < α}, α shared equally by the guess counts; 0 if none is.

    Raises:
        ConfigError: fewer than two canaries.
    """
    if len(scores) < 2:
        raise ConfigError(f"a one-run audit needs at least 2 canaries, found {len(scores)}")
    tried = list(guess(included, scores))
    share = alpha / len(tried)
    return max(
        (OneRun(_largest_refuted(r, v, len(scores), delta, share), r, v, alpha) for r, v in tried),
        key=lambda bound: bound.epsilon,
    )


def _largest_refuted(guesses: int, right: int, canaries: int, delta: float, alpha: float) -> float:
    """By bisection, rounded down: p grows with ε."""
    low, high = 0.0, _HIGHEST
    if one_run_p(guesses, right, canaries, low, delta) >= alpha:
        return 0.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        if one_run_p(guesses, right, canaries, middle, delta) < alpha:
            low = middle
        else:
            high = middle
    return low
