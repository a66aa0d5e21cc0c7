"""Records that are nearly the same: by the share of common stretches of five characters.

`datasketch` finds candidates (MinHash with locality-sensitive hashing, so that 100,000 texts take a minute
and not 5·10⁹ comparisons); each candidate is then compared exactly. Everything is deterministic.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence

SIMILARITY = 0.85  # Jaccard: of all stretches of both texts, the share that both have
_STRETCH = 5  # characters
_SHORT = 2 * _STRETCH  # characters: texts shorter than that are near only if they are equal
_SKETCHED = 2_000  # characters that candidates are found by; the comparison is of the whole
_PERMUTATIONS = 128
_APART = re.compile(r"[\W_]+")


def near_duplicates(
    records: Sequence[tuple[str, ...]], known: Iterable[tuple[str, ...]] = (), similarity: float = SIMILARITY
) -> dict[int, int | None]:
    """Which records are near an earlier one that is not near another itself; None: near one of `known`.

    A record's texts (prompt and text, say) must each be near the other's. Upper and lower case, blanks and
    punctuation do not count. What is left out of the answer is no two near each other, so leaving out what
    is in it leaves nothing to find.
    """
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=similarity, num_perm=_PERMUTATIONS)
    indexed: dict[int, tuple[str, ...]] = {}  # negative: a known one
    first: dict[tuple[str, ...], int] = {}
    found: dict[int, int | None] = {}
    template = MinHash(num_perm=_PERMUTATIONS, seed=1, hashfunc=zlib.crc32)

    def place(number: int, record: tuple[str, ...]) -> int | None:
        """The number of an earlier record near this one; else None, and this one is indexed."""
        bare = tuple(map(_bare, record))
        if not any(bare):
            return None
        if bare in first:
            return first[bare]
        sketch = template.copy()
        for part, text in enumerate(bare):
            sketch.update_batch([b"%d" % part + stretch for stretch in sorted(_stretches(text[:_SKETCHED]))])
        for other in sorted(index.query(sketch), key=abs):
            if _near(bare, indexed[other], similarity):
                return int(other)
        first[bare] = number
        indexed[number] = bare
        index.insert(number, sketch, check_duplication=False)
        return None

    for i, record in enumerate(known, start=1):
        place(-i, record)
    for i, record in enumerate(records):
        if (near := place(i, record)) is not None:
            found[i] = near if near >= 0 else None
    return found


def _bare(text: str) -> str:
    return _APART.sub(" ", text.casefold()).strip()


def _stretches(text: str) -> frozenset[bytes]:
    encoded = (text[i : i + _STRETCH] for i in range(max(1, len(text) - _STRETCH + 1)))
    return frozenset(part.encode("utf-8", "replace") for part in encoded)


def _near(one: tuple[str, ...], other: tuple[str, ...], similarity: float) -> bool:
    """Shortest texts first: they tell most records apart."""
    return all(_alike(a, b) >= similarity for a, b in sorted(zip(one, other, strict=True), key=_length))


def _length(pair: tuple[str, str]) -> int:
    return len(pair[0]) + len(pair[1])


def _alike(one: str, other: str) -> float:
    if one == other:
        return 1.0
    if min(len(one), len(other)) < _SHORT:
        return 0.0
    a, b = _stretches(one), _stretches(other)
    both = len(a & b)
    return both / (len(a) + len(b) - both)
