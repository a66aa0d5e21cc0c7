"""Framing and field checks that all messages share.

    "CFSA" · version u8 · kind u8 · body · CRC-32 of all before, little-endian

The CRC is against accidents: a bit that flips in a masked vector would otherwise end in the sum.
It is no protection against anybody. That is what the signatures and the protocol's checks are for.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from typing import ClassVar, Self

from common.secagg.binary import Reader, Writer
from common.secagg.errors import MessageError
from common.secagg.transcript import MAX_ID

MAGIC = b"CFSA"
VERSION = 1
CRC_BYTES = 4
HEADER_BYTES = len(MAGIC) + 2

MAX_SITES = 2**16 - 1


class Framed(ABC):
    """A message. A subclass has `kind`, `_write` and `_read`."""

    kind: ClassVar[int]

    def encode(self) -> bytes:
        writer = Writer().fixed(MAGIC).u8(VERSION).u8(self.kind)
        self._write(writer)
        return writer.fixed(writer.crc32().to_bytes(CRC_BYTES, "little")).done()

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """The message that these bytes encode; `decode(m.encode()) == m`, and no other bytes give m.

        Raises:
            MessageError: another kind or version, damaged, too short, too long, or out of range.
        """
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise MessageError(f"a message must be bytes, found {type(data).__name__}")
        view = memoryview(data).cast("B")
        if len(view) < HEADER_BYTES + CRC_BYTES:
            raise MessageError(f"a message has at least {HEADER_BYTES + CRC_BYTES} bytes, found {len(view)}")
        if bytes(view[: len(MAGIC)]) != MAGIC:
            raise MessageError("not a secure aggregation message")
        if view[len(MAGIC)] != VERSION:
            raise MessageError(f"version {VERSION} expected, found {view[len(MAGIC)]}")
        if view[len(MAGIC) + 1] != cls.kind:
            raise MessageError(
                f"{cls.__name__} is kind {cls.kind}, found kind {view[len(MAGIC) + 1]}: out of order?"
            )
        body, crc = view[:-CRC_BYTES], view[-CRC_BYTES:]
        if zlib.crc32(body).to_bytes(CRC_BYTES, "little") != bytes(crc):
            raise MessageError("the message was damaged on its way: its CRC-32 does not match")
        reader = Reader(body[HEADER_BYTES:])
        message = cls._read(reader)
        reader.finish()
        return message

    @abstractmethod
    def _write(self, writer: Writer) -> None: ...

    @classmethod
    @abstractmethod
    def _read(cls, reader: Reader) -> Self: ...


def check_bytes(name: str, value: object, length: int) -> None:
    if not isinstance(value, bytes) or len(value) != length:
        found = f"{len(value)} bytes" if isinstance(value, bytes) else type(value).__name__
        raise MessageError(f"{name} must be {length} bytes, found {found}")


def check_integer(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        found = value if type(value) is int else type(value).__name__
        raise MessageError(f"{name} must be an integer in {low} .. {high}, found {found}")


def check_ids(name: str, value: object) -> None:
    if not isinstance(value, tuple) or len(value) > MAX_SITES:
        raise MessageError(f"{name} must be a tuple of at most {MAX_SITES} ids")
    if not all(type(site) is int and 1 <= site <= MAX_ID for site in value):
        raise MessageError(f"each id of {name} must be an integer in 1 .. {MAX_ID}")


def check_table(name: str, value: object, length: int) -> None:
    if not isinstance(value, tuple) or not all(isinstance(row, tuple) and len(row) == 2 for row in value):
        raise MessageError(f"{name} must be a tuple of pairs")
    check_ids(name, tuple(site for site, _ in value))
    if not all(isinstance(data, bytes) and len(data) == length for _, data in value):
        raise MessageError(f"each entry of {name} must be {length} bytes")
