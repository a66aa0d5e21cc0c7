"""Shamir's secret sharing over GF(2^255 - 19), with wrong shares found and survived.

Source: Shamir 1979, "How to share a secret". Decoding: Gao 2003, "A new algorithm for decoding
Reed-Solomon codes". A share's x-coordinate is its holder's site id, which is never 0, where the
secret is. The field is that of X25519, so a uniform element is also a good 255-bit seed.

Python's integers are not constant-time. Who can time a site to a microsecond is on its machine,
which is outside the threat model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from common.secagg.keys import FIELD_PRIME, RandomBytes

P = FIELD_PRIME
ELEMENT_BYTES = 32

MAX_EXCLUSIONS = 2_000
"""How many sets of suspects `ShareSet.rebuild` tries, at about 1 ms each, before it gives up."""


def random_element(random_bytes: RandomBytes) -> int:
    """Uniform in GF(2^255 - 19): 255 random bits, drawn again in the 19 cases of 2^255 above P."""
    while True:
        value = int.from_bytes(random_bytes(ELEMENT_BYTES), "little") & (2**255 - 1)
        if value < P:
            return value


def element_bytes(value: int) -> bytes:
    return value.to_bytes(ELEMENT_BYTES, "little")


def element(data: bytes) -> int:
    """The field element that these 32 little-endian bytes encode.

    Raises:
        ValueError: not 32 bytes, or not below P (an element has one encoding).
    """
    value = int.from_bytes(data, "little")
    if len(data) != ELEMENT_BYTES or value >= P:
        raise ValueError("a field element must be 32 bytes below 2^255 - 19")
    return value


def split(secret: int, threshold: int, holders: Sequence[int], random_bytes: RandomBytes) -> list[int]:
    """Shares of `secret`, one for each of `holders`, any `threshold` of which rebuild it.

    The polynomial's other coefficients are uniform, so threshold − 1 shares fit every secret equally.

    Raises:
        ValueError: holders repeat or are 0 modulo P, or threshold is not in 1 … len(holders).
    """
    _check_points(holders)
    if not 1 <= threshold <= len(holders):
        raise ValueError(f"threshold must be in 1 .. {len(holders)}, found {threshold}")
    descending = [random_element(random_bytes) for _ in range(threshold - 1)] + [secret]
    shares = []
    for x in holders:
        value = 0
        for coefficient in descending:  # Horner
            value = (value * x + coefficient) % P
        shares.append(value)
    return shares


def coefficients(points: Sequence[int]) -> list[int]:
    """Lagrange coefficients at 0: Σ coefficients[i]·f(points[i]) = f(0) for deg f < len(points)."""
    _check_points(points)
    # λ_i = Π_{j≠i} x_j / (x_j − x_i) = (Π_j x_j) / (x_i · Π_{j≠i} (x_j − x_i))
    product = 1
    for x in points:
        product = product * x % P
    denominators = []
    for i, x in enumerate(points):
        denominator = x
        for j, other in enumerate(points):
            if j != i:
                denominator = denominator * (other - x) % P
        denominators.append(denominator)
    return [product * inverse % P for inverse in _inverses(denominators)]


def combine(weights: Sequence[int], shares: Sequence[int]) -> int:
    """f(0) from shares and the `coefficients` of their points."""
    return sum(w * y for w, y in zip(weights, shares, strict=True)) % P


@dataclass(frozen=True)
class Rebuilt:
    """A secret that passed the caller's check, and the points whose shares are off its polynomial.

    certain: decoding was unique. If so, and no more shares are wrong than that allows for, `wrong` are
    the liars. If not, the secret is right all the same, but liars could have picked their shares so
    that a polynomial through the right secret has honest shares off it.
    """

    secret: int
    wrong: tuple[int, ...]
    certain: bool

    def __repr__(self) -> str:
        return f"Rebuilt(secret=hidden, wrong={self.wrong}, certain={self.certain})"


class ShareSet:
    """One set of responders and all that is computed once for it, whoever's secret they hold.

    Rebuilding costs `threshold` products, and checking that *every* share lies on one polynomial
    len(points) more, so a wrong share is noticed even where it was not needed.
    """

    def __init__(self, points: Sequence[int], threshold: int, random_bytes: RandomBytes) -> None:
        """Raises ValueError if fewer than `threshold` points, or points repeat."""
        if len(points) < threshold:
            raise ValueError(f"{threshold} shares needed, found {len(points)}")
        self.points = tuple(points)
        self.threshold = threshold
        self._weights = coefficients(self.points[:threshold])
        self._parity = _parity_weights(self.points, threshold, random_bytes)

    def rebuild(self, shares: Sequence[int], is_right: Callable[[int], bool]) -> Rebuilt | None:
        """The secret of `shares[i] = f(points[i])`, or None if no attempt leads to a right one.

        `is_right` checks a candidate against something that its owner published before. Up to
        ⌊(r − t)/2⌋ wrong shares of r are always survived (Gao); beyond it, and up to r − t, as long
        as one of the first MAX_EXCLUSIONS choices of suspects is the right one.
        """
        if len(shares) != len(self.points):
            raise ValueError(f"{len(self.points)} shares expected, found {len(shares)}")
        # 1. All agree: the usual case
        if not self._disagree(shares):
            secret = combine(self._weights, shares[: self.threshold])
            return Rebuilt(secret, (), True) if is_right(secret) else None
        # 2. Some do not: decode
        polynomial = _decode_gao(self.points, shares, self.threshold)
        if polynomial is not None and is_right(polynomial[0]):
            return Rebuilt(polynomial[0], self._off(polynomial, shares), True)
        # 3. Too many for that: leave out suspects, one, two, ... at a time
        return self._rebuild_without_suspects(shares, is_right)

    def agree(self, shares: Sequence[int]) -> bool:
        """Whether all shares lie on one polynomial, and there is one to spare that shows it."""
        return len(self.points) > self.threshold and not self._disagree(shares)

    def _disagree(self, shares: Sequence[int]) -> bool:
        return combine(self._parity, shares) != 0

    def _rebuild_without_suspects(
        self, shares: Sequence[int], is_right: Callable[[int], bool]
    ) -> Rebuilt | None:
        spare = len(self.points) - self.threshold
        everyone = range(len(self.points))
        choices = itertools.chain.from_iterable(
            itertools.combinations(everyone, size) for size in range(1, spare + 1)
        )
        for suspects in itertools.islice(choices, MAX_EXCLUSIONS):
            kept = [i for i in everyone if i not in suspects][: self.threshold]
            points, values = [self.points[i] for i in kept], [shares[i] for i in kept]
            secret = combine(coefficients(points), values)
            if is_right(secret):
                return Rebuilt(secret, self._off(_interpolate(points, values), shares), False)
        return None

    def _off(self, polynomial: Sequence[int], shares: Sequence[int]) -> tuple[int, ...]:
        return tuple(x for x, y in zip(self.points, shares, strict=True) if _evaluate(polynomial, x) != y % P)


def _parity_weights(points: Sequence[int], threshold: int, random_bytes: RandomBytes) -> list[int]:
    """Weights h with Σ h_i·f(x_i) = 0 for every f of degree < threshold.

    h_i = g(x_i) / Π_{j≠i} (x_i − x_j) with g random of degree r − t − 1: a random word of the dual
    code. Shares that are on no such polynomial pass with probability 1/P. With r = t nothing is
    spare, and there is nothing to check.
    """
    spare = len(points) - threshold
    if spare == 0:
        return [0] * len(points)
    g = [random_element(random_bytes) for _ in range(spare)]
    denominators = []
    for i, x in enumerate(points):
        denominator = 1
        for j, other in enumerate(points):
            if j != i:
                denominator = denominator * (x - other) % P
        denominators.append(denominator)
    return [_evaluate(g, x) * inverse % P for x, inverse in zip(points, _inverses(denominators), strict=True)]


def _check_points(points: Sequence[int]) -> None:
    if len(set(points)) != len(points) or not all(0 < x < P for x in points):
        raise ValueError("points must be distinct and in 1 .. P - 1")


def _inverses(values: Iterable[int]) -> list[int]:
    """Inverses modulo P, all with one exponentiation (Montgomery's trick)."""
    values = list(values)
    prefixes, running = [], 1
    for value in values:
        prefixes.append(running)
        running = running * value % P
    inverse = pow(running, -1, P)
    result = [0] * len(values)
    for i in range(len(values) - 1, -1, -1):
        result[i] = inverse * prefixes[i] % P
        inverse = inverse * values[i] % P
    return result


# Polynomials over GF(P): lists of coefficients, lowest first, no trailing zeros


def _evaluate(polynomial: Sequence[int], x: int) -> int:
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * x + coefficient) % P
    return value


def _trim(polynomial: list[int]) -> list[int]:
    while polynomial and polynomial[-1] == 0:
        polynomial.pop()
    return polynomial


def _multiply(left: Sequence[int], right: Sequence[int]) -> list[int]:
    if not left or not right:
        return []
    result = [0] * (len(left) + len(right) - 1)
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            result[i + j] += a * b
    return _trim([value % P for value in result])


def _subtract(left: Sequence[int], right: Sequence[int]) -> list[int]:
    pairs = itertools.zip_longest(left, right, fillvalue=0)
    return _trim([(a - b) % P for a, b in pairs])


def _divide(numerator: Sequence[int], divisor: Sequence[int]) -> tuple[list[int], list[int]]:
    rest = list(numerator)
    quotient = [0] * max(len(rest) - len(divisor) + 1, 0)
    lead = pow(divisor[-1], -1, P)
    for shift in range(len(quotient) - 1, -1, -1):
        factor = rest[shift + len(divisor) - 1] * lead % P
        quotient[shift] = factor
        for i, coefficient in enumerate(divisor):
            rest[shift + i] = (rest[shift + i] - factor * coefficient) % P
    return _trim(quotient), _trim(rest)


def _from_roots(points: Sequence[int]) -> list[int]:
    product = [1]
    for x in points:
        product = _multiply(product, [-x % P, 1])
    return product


def _interpolate(points: Sequence[int], values: Sequence[int]) -> list[int]:
    """The polynomial of degree < len(points) through all (x, y), by Newton's divided differences."""
    n = len(points)
    inverses = _inverses(
        [points[i] - points[i - level] for level in range(1, n) for i in range(n - 1, level - 1, -1)]
    )
    steps = iter(inverses)
    table = list(values)
    for level in range(1, n):
        for i in range(n - 1, level - 1, -1):
            table[i] = (table[i] - table[i - 1]) * next(steps) % P
    result: list[int] = []
    for i in range(n - 1, -1, -1):  # result = result·(x − x_i) + table_i
        shifted = [0, *result]
        for j, coefficient in enumerate(result):
            shifted[j] = (shifted[j] - coefficient * points[i]) % P
        shifted[0] = (shifted[0] + table[i]) % P
        result = shifted
    return _trim(result)


def _decode_gao(points: Sequence[int], shares: Sequence[int], threshold: int) -> list[int] | None:
    """The polynomial of degree < threshold that all but ⌊(r − t)/2⌋ shares lie on, if there is one."""
    # Gao 2003, algorithm 1: extended Euclid on Π(x − x_i) and the polynomial through all shares,
    # stopped when the remainder's degree falls below (r + t)/2; it is then f times the error locator.
    g0, g1 = _from_roots(points), _interpolate(points, shares)
    v0: list[int] = []
    v1: list[int] = [1]
    while g1 and 2 * (len(g1) - 1) >= len(points) + threshold:
        quotient, rest = _divide(g0, g1)
        g0, g1 = g1, rest
        v0, v1 = v1, _subtract(v0, _multiply(quotient, v1))
    polynomial, rest = _divide(g1, v1)
    if rest or len(polynomial) > threshold:
        return None
    return polynomial or [0]
