"""Strict binary reading and writing. Little-endian; nothing optional, nothing left over."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterable

from common.secagg.errors import MessageError


class Writer:
    """Collects fields into bytes."""

    __slots__ = ("_parts",)

    def __init__(self) -> None:
        self._parts: list[bytes | memoryview] = []

    def fixed(self, data: bytes) -> Writer:
        """Bytes whose length the reader knows."""
        self._parts.append(data)
        return self

    def view(self, data: memoryview) -> Writer:
        """As `fixed`, without a copy until `done`."""
        self._parts.append(data)
        return self

    def u8(self, value: int) -> Writer:
        return self.fixed(value.to_bytes(1, "little"))

    def u32(self, value: int) -> Writer:
        return self.fixed(value.to_bytes(4, "little"))

    def u64(self, value: int) -> Writer:
        return self.fixed(value.to_bytes(8, "little"))

    def sized(self, data: bytes) -> Writer:
        """Bytes behind their length."""
        return self.u32(len(data)).fixed(data)

    def ids(self, sites: tuple[int, ...]) -> Writer:
        self.u32(len(sites))
        return self.fixed(b"".join(site.to_bytes(4, "little") for site in sites))

    def table(self, rows: Iterable[tuple[int, bytes]]) -> Writer:
        """Pairs of an id and bytes whose length the reader knows, behind their number."""
        rows = tuple(rows)
        self.u32(len(rows))
        return self.fixed(b"".join(site.to_bytes(4, "little") + data for site, data in rows))

    def crc32(self) -> int:
        """CRC-32 of all so far."""
        return functools.reduce(lambda crc, part: zlib.crc32(part, crc), self._parts, 0)

    def done(self) -> bytes:
        return b"".join(self._parts)


class Reader:
    """Takes fields out of bytes. Every method raises MessageError where they run out."""

    __slots__ = ("_data", "_place")

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = memoryview(data).cast("B")
        self._place = 0

    def view(self, length: int) -> memoryview:
        """The next `length` bytes, not copied."""
        end = self._place + length
        if end > len(self._data):
            raise MessageError(
                f"{length} bytes expected at offset {self._place}, found {len(self._data) - self._place}"
            )
        part = self._data[self._place : end]
        self._place = end
        return part

    def fixed(self, length: int) -> bytes:
        return bytes(self.view(length))

    def u8(self) -> int:
        return self.view(1)[0]

    def u32(self) -> int:
        return int.from_bytes(self.view(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self.view(8), "little")

    def sized(self, limit: int) -> bytes:
        return self.fixed(self.count(limit, 1))

    def count(self, limit: int, row_bytes: int) -> int:
        """A number of rows that is at most `limit` and whose rows are all there.

        Checked before anything is allocated, so a short message cannot ask for much memory.
        """
        count = self.u32()
        if count > limit:
            raise MessageError(f"at most {limit} entries allowed, found {count}")
        if count * row_bytes > len(self._data) - self._place:
            raise MessageError(f"{count} entries announced, but the message ends before")
        return count

    def ids(self, limit: int) -> tuple[int, ...]:
        data = self.view(4 * self.count(limit, 4))
        return tuple(int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4))

    def table(self, limit: int, length: int) -> tuple[tuple[int, bytes], ...]:
        row = 4 + length
        data = self.view(row * self.count(limit, row))
        return tuple(
            (int.from_bytes(data[i : i + 4], "little"), bytes(data[i + 4 : i + row]))
            for i in range(0, len(data), row)
        )

    def finish(self) -> None:
        """Raises MessageError if anything is left."""
        if self._place != len(self._data):
            raise MessageError(f"{len(self._data) - self._place} bytes left over")
