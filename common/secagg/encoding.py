"""Encoding: an update and its weight as one vector in Z_2^b, and the sum of such vectors back.

A site's vector is, in this order:

    parameters    one word each: round(S_t · clip_t(x) · w / w_max), S_t = (M - 1) / clip of its tensor
    weight        w, exactly, in limbs
    counts        whatever else a site reports, exactly, in limbs

so nothing about one site travels outside the masked sum.

Headroom. M = ⌊(2^(b−1) − 1) / n_max⌋ − noise_bound. Clipping and w ≤ w_max leave |S·x·w/w_max| ≤ M − 1;
stochastic rounding moves a value by less than 1, so an encoded word is at most M; integer noise of at
most noise_bound leaves ⌊(2^(b−1) − 1) / n_max⌋; n ≤ n_max of them sum to at most 2^(b−1) − 1. So the sum
of honest sites never wraps, and read as two's complement it is the integer sum. At n_max = 100 and
b = 32, M = 21,474,836: a word resolves clip / 21,474,835.

Stochastic rounding, ⌊v + u⌋ with u uniform in [0, 1), has mean v: what rounding loses is noise of
variance at most 1/4 a site, not bias. u comes from a CSPRNG, since a predictable u would show which
way a value was rounded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.secagg.errors import EncodingError, NonFiniteError, PolicyError
from common.secagg.keys import KEY_BYTES, RandomBytes, Secret
from common.secagg.masks import Ring, keystream, ring_dtype

CHUNK = 64 * 1024  # elements; what a chunk costs beyond its elements is small, and so is its memory


@dataclass(frozen=True)
class Tensor:
    """`size` consecutive parameters, each clipped to ±`clip`: a public constant, the same at every site."""

    size: int
    clip: float

    def __post_init__(self) -> None:
        if self.size < 1:
            raise PolicyError(f"a tensor's size must be >= 1, found {self.size}")
        if not (math.isfinite(self.clip) and self.clip > 0):
            raise PolicyError(f"a tensor's clip must be finite and > 0, found {self.clip}")


@dataclass(frozen=True)
class Count:
    """An integer in −limit … limit that every site reports inside the sum (a noised metric, say)."""

    name: str
    limit: int

    def __post_init__(self) -> None:
        if not self.name:
            raise PolicyError("a count needs a name")
        if self.limit < 1:
            raise PolicyError(f"the limit of count {self.name!r} must be >= 1, found {self.limit}")


@dataclass(frozen=True)
class DecodedSum:
    """What the server learns from a sum.

    mean: Σ w·x / Σ w, shape (num_params,), float64, in the update's own unit.
    weight: Σ w. counts: the sum of each count.
    """

    mean: NDArray[np.float64]
    weight: int
    counts: Mapping[str, int]


@dataclass(frozen=True)
class Codec:
    """How updates become ring vectors. Part of the policy, so pinned at every site.

    ring_bits: 32, or 16 where bandwidth matters. n_max: most sites in one sum. w_max: largest weight
    (1 if all sites weigh the same). noise_bound: largest integer noise that a site adds to a word
    after encoding, in words' own unit; 0 if noise is added before.
    """

    ring_bits: int
    n_max: int
    w_max: int
    tensors: tuple[Tensor, ...]
    counts: tuple[Count, ...] = ()
    noise_bound: int = 0

    def __post_init__(self) -> None:
        if self.ring_bits not in (16, 32):
            raise PolicyError(f"ring_bits must be 16 or 32, found {self.ring_bits}")
        if self.n_max < 1 or self.w_max < 1:
            raise PolicyError(f"n_max and w_max must be >= 1, found {self.n_max} and {self.w_max}")
        if self.noise_bound < 0:
            raise PolicyError(f"noise_bound must be >= 0, found {self.noise_bound}")
        if not self.tensors:
            raise PolicyError("a codec needs at least one tensor")
        if len({count.name for count in self.counts}) != len(self.counts):
            raise PolicyError("two counts have the same name")
        if self.headroom < 2:
            raise PolicyError(
                f"{self.ring_bits} bits leave no room for {self.n_max} sites and noise up to "
                f"{self.noise_bound}: use 32 bits, fewer sites or less noise"
            )

    @property
    def num_params(self) -> int:
        return sum(tensor.size for tensor in self.tensors)

    @property
    def words(self) -> int:
        """Length of a site's vector."""
        limits = (self.w_max, *(count.limit for count in self.counts))
        return self.num_params + sum(map(self._limbs, limits))

    @property
    def headroom(self) -> int:
        """M, the largest absolute value of an encoded word."""
        return self._share - self.noise_bound

    def scale(self, tensor: Tensor) -> float:
        """S of this tensor: words per unit of a parameter, at full weight."""
        return (self.headroom - 1) / tensor.clip

    @property
    def _share(self) -> int:
        """One site's part of the signed range."""
        return ((1 << self.ring_bits - 1) - 1) // self.n_max

    @property
    def _limb_bits(self) -> int:
        """Largest r with (2^r − 1)·n_max ≤ 2^(b−1) − 1: sums of such digits never wrap either."""
        return (self._share + 1).bit_length() - 1

    def _limbs(self, limit: int) -> int:
        return -(-limit.bit_length() // self._limb_bits)

    def encode(
        self,
        update: ArrayLike,
        weight: int,
        random_bytes: RandomBytes,
        counts: Mapping[str, int] | None = None,
    ) -> Ring:
        """One site's vector, shape (words,).

        Args:
            update: shape (num_params,), float. Values beyond a tensor's clip are clipped to it.
            weight: 0 … w_max.
            counts: exactly the names of `self.counts`.

        Raises:
            NonFiniteError: NaN or an infinity in the update. It is refused, not clipped: something
                is broken at this site.
            EncodingError: wrong shape, weight or counts.
        """
        values = np.asarray(update)
        if values.shape != (self.num_params,) or values.dtype.kind != "f":
            raise EncodingError(
                f"an update must be floats of shape ({self.num_params},), "
                f"found {values.dtype} of shape {values.shape}"
            )
        if not 0 <= weight <= self.w_max:
            raise EncodingError(f"a weight must be in 0 .. {self.w_max}")  # its value is private
        vector = np.empty(self.words, dtype=ring_dtype(self.ring_bits))
        self._encode_parameters(values, weight, random_bytes, vector)
        vector[self.num_params :] = self._encode_limbs(weight, counts or {})
        return vector

    def _encode_parameters(
        self, values: NDArray[np.floating], weight: int, random_bytes: RandomBytes, out: Ring
    ) -> None:
        signed = np.dtype("<i4" if self.ring_bits == 32 else "<i2")
        start = 0
        for tensor in self.tensors:
            factor = self.scale(tensor) * (weight / self.w_max)
            for low in range(start, start + tensor.size, CHUNK):
                high = min(low + CHUNK, start + tensor.size)
                chunk = values[low:high].astype(np.float64)
                if not np.isfinite(chunk).all():
                    raise NonFiniteError(
                        "the update holds NaN or an infinity, so it was not encoded and nothing was sent. "
                        "Look at this site's data and learning rate."
                    )
                np.clip(chunk, -tensor.clip, tensor.clip, out=chunk)
                chunk *= factor  # at most M - 1, and 2^-21 for the product's own rounding
                chunk += _uniform(high - low, random_bytes)
                np.floor(chunk, out=chunk)
                out[low:high] = chunk.astype(signed).view(out.dtype)
            start += tensor.size

    def _encode_limbs(self, weight: int, counts: Mapping[str, int]) -> list[int]:
        if set(counts) != {count.name for count in self.counts}:
            expected = sorted(count.name for count in self.counts)
            raise EncodingError(f"counts must be {expected}, found {sorted(counts)}")
        limbs: list[int] = []
        for value, limit in [(weight, self.w_max), *((counts[c.name], c.limit) for c in self.counts)]:
            if abs(value) > limit:
                raise EncodingError(f"a count must be in -{limit} .. {limit}")  # its value is private
            sign, rest = (-1 if value < 0 else 1), abs(value)
            for _ in range(self._limbs(limit)):
                digit = rest & (2**self._limb_bits - 1)
                limbs.append(sign * digit % 2**self.ring_bits)
                rest >>= self._limb_bits
        return limbs

    def decode_sum(self, total: Ring, sites: int) -> DecodedSum:
        """The weighted mean and the counts from the sum of `sites` vectors.

        Raises:
            EncodingError: wrong length, or a weight or count that no `sites` honest sites can reach.
        """
        if total.shape != (self.words,) or total.dtype != ring_dtype(self.ring_bits):
            raise EncodingError(
                f"a sum must be {ring_dtype(self.ring_bits)} of shape ({self.words},), "
                f"found {total.dtype} of shape {total.shape}"
            )
        if not 1 <= sites <= self.n_max:
            raise EncodingError(f"a sum must be over 1 .. {self.n_max} sites, found {sites}")
        signed = total.view(np.dtype("<i4" if self.ring_bits == 32 else "<i2"))
        weight, sums = self._decode_limbs(signed[self.num_params :].tolist(), sites)
        if weight == 0:
            raise EncodingError("the weights sum to 0, so there is no mean")
        mean = signed[: self.num_params].astype(np.float64)
        start = 0
        for tensor in self.tensors:
            mean[start : start + tensor.size] *= self.w_max / (self.scale(tensor) * weight)
            start += tensor.size
        return DecodedSum(mean, weight, MappingProxyType(sums))

    def _decode_limbs(self, limbs: list[int], sites: int) -> tuple[int, dict[str, int]]:
        sums: list[int] = []
        for name, lowest, limit in [
            ("weight", 0, self.w_max),
            *((count.name, -count.limit, count.limit) for count in self.counts),
        ]:
            size = self._limbs(limit)
            value = sum(digit << (self._limb_bits * i) for i, digit in enumerate(limbs[:size]))
            limbs = limbs[size:]
            if not lowest * sites <= value <= limit * sites:
                raise EncodingError(
                    f"the sum of {name} must be in {lowest * sites} .. {limit * sites}, found {value}: "
                    "a site did not follow the encoding. Discard the round."
                )
            sums.append(value)
        return sums[0], dict(zip((count.name for count in self.counts), sums[1:], strict=True))


def _uniform(size: int, random_bytes: RandomBytes) -> NDArray[np.float64]:
    """`size` values k/2^32, uniform in [0, 1), from AES-256-CTR under a fresh key."""
    uniform = keystream(Secret(random_bytes(KEY_BYTES)), size, 32).astype(np.float64)
    uniform *= 2.0**-32
    return uniform
