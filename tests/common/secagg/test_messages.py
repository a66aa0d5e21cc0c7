"""Messages: what is encoded comes back, and nothing else is accepted."""

from __future__ import annotations

import dataclasses
import random
import zlib
from typing import Any

import numpy as np
import pytest

from common.secagg.errors import MessageError
from common.secagg.framing import CRC_BYTES, HEADER_BYTES
from common.secagg.messages import (
    MESSAGES,
    SEALED_BYTES,
    Advertisement,
    AdvertiseReply,
    AdvertiseRequest,
    ConsistReply,
    ConsistRequest,
    MaskReply,
    MaskRequest,
    ShareReply,
    ShareRequest,
    UnmaskReply,
    UnmaskRequest,
    encoded_limit,
)
from tests.secagg_world import Stream

RANDOM = Stream(1)
SID = RANDOM(32)


def table(size: int, rows: int = 3) -> tuple[tuple[int, bytes], ...]:
    return tuple((site, RANDOM(size)) for site in range(1, rows + 1))


ENTRY = Advertisement(2, RANDOM(32), RANDOM(32), RANDOM(32), RANDOM(64))
EXAMPLES: list[Any] = [
    AdvertiseRequest(b"run-7", 3, 1, (1, 2, 9), RANDOM(32), RANDOM(32), RANDOM(32)),
    AdvertiseReply(SID, ENTRY),
    ShareRequest(SID, (ENTRY, ENTRY)),
    ShareReply(SID, 2, table(SEALED_BYTES)),
    MaskRequest(SID, (1, 2, 9), table(SEALED_BYTES)),
    MaskReply(SID, 2, np.arange(7, dtype="<u4")),
    ConsistRequest(SID, (1, 2, 9)),
    ConsistReply(SID, 2, RANDOM(64)),
    UnmaskRequest(SID, table(64)),
    UnmaskReply(SID, 2, table(32), table(32, 1)),
]
by_name = pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)


def framed(body: bytes) -> bytes:
    return body + zlib.crc32(body).to_bytes(CRC_BYTES, "little")


@by_name
def test_what_is_encoded_comes_back(message: Any) -> None:
    data = message.encode()
    assert type(message).decode(data) == message
    assert type(message).decode(bytearray(data)) == message
    assert type(message).decode(data).encode() == data


def test_sixteen_bit_vectors_keep_their_width() -> None:
    reply = MaskReply(SID, 2, np.arange(7, dtype="<u2"))
    assert MaskReply.decode(reply.encode()) == reply
    assert MaskReply.decode(reply.encode()) != MaskReply(SID, 2, np.arange(7, dtype="<u4"))


def test_a_decoded_vector_is_not_a_copy() -> None:
    data = EXAMPLES[5].encode()
    vector = MaskReply.decode(data).vector
    assert not vector.flags.owndata and not vector.flags.writeable


@by_name
def test_no_message_is_taken_for_another(message: Any) -> None:
    data = message.encode()
    for kind in MESSAGES:
        if kind is not type(message):
            with pytest.raises(MessageError):
                kind.decode(data)


@by_name
def test_every_truncation_and_extension_is_refused(message: Any) -> None:
    data = message.encode()
    body = data[:-CRC_BYTES]
    for length in range(len(data)):
        with pytest.raises(MessageError):
            type(message).decode(data[:length])
        if length < len(body):
            with pytest.raises(MessageError):  # with a CRC that fits
                type(message).decode(framed(body[:length]))
    for extra in (b"\0", b"\0" * 4, bytes(100)):
        for extended in (data + extra, framed(body + extra)):
            with pytest.raises(MessageError):
                type(message).decode(extended)


@by_name
def test_every_single_bit_flip_is_refused(message: Any) -> None:
    data = bytearray(message.encode())
    for place in range(len(data)):
        for bit in range(8):
            data[place] ^= 1 << bit
            with pytest.raises(MessageError):
                type(message).decode(bytes(data))
            data[place] ^= 1 << bit


@by_name
@pytest.mark.parametrize("other", ["text", None, 5, [1, 2], object()])
def test_other_types_are_refused(message: Any, other: object) -> None:
    with pytest.raises(MessageError):
        type(message).decode(other)


def test_large_counts_are_refused_before_anything_is_allocated() -> None:
    for message in EXAMPLES:
        body = bytearray(message.encode()[:-CRC_BYTES])
        for place in range(HEADER_BYTES, len(body) - 3):
            huge = bytes(body[:place]) + b"\xff\xff\xff\x7f" + bytes(body[place + 4 :])
            try:
                decoded = type(message).decode(framed(huge))
            except MessageError:
                continue
            assert len(decoded.encode()) == len(huge) + CRC_BYTES  # it was no count


WRONG: dict[str, list[Any]] = {
    "run": [b"", b"x" * 65, "run", None],
    "round": [-1, 2**32, 1.0, True, "1"],
    "attempt": [-1, 2**32, None],
    "cohort": [[1, 2], (0,), (2**32,), (1.0,), (True,), None],
    "session": [b"", bytes(31), bytes(33), "x" * 32, None, bytearray(32)],
    "site": [0, 2**32, -1, 1.0, None, True],
    "signature": [bytes(63), bytes(65), None],
    "advertisement": [None, b"", (1, 2)],
    "advertisements": [None, [ENTRY], (None,), (b"",)],
    "rows": [
        None,
        [(1, bytes(SEALED_BYTES))],
        ((1, bytes(SEALED_BYTES - 1)),),
        ((0, bytes(SEALED_BYTES)),),
        ((1,),),
    ],
    "sealed": [None, ((1, bytes(SEALED_BYTES + 1)),), (1, 2)],
    "sharers": [None, [1], (0,)],
    "survivors": [None, [1], (2**32,)],
    "signatures": [None, ((1, bytes(63)),), ((1, bytes(64), 3),)],
    "b_shares": [None, ((1, bytes(31)),)],
    "s_shares": [None, ((0, bytes(32)),)],
    "vector": [
        None,
        [1, 2],
        np.zeros(3),
        np.zeros(3, dtype="<i4"),
        np.zeros(3, dtype=">u4"),
        np.zeros((2, 2), dtype="<u4"),
        np.zeros(0, dtype="<u4"),
        np.zeros(6, dtype="<u4")[::2],
    ],
    "roster_hash": [bytes(31), None],
    "policy_hash": [bytes(33), None],
    "context_hash": ["", None],
    "c": [bytes(31), None],
    "s": [bytes(33), None],
    "commitment": [b"", None],
}


@pytest.mark.parametrize("message", [*EXAMPLES, ENTRY], ids=lambda message: type(message).__name__)
def test_constructing_checks_every_field(message: Any) -> None:
    for field in dataclasses.fields(message):
        for wrong in WRONG[field.name]:
            with pytest.raises(MessageError):
                dataclasses.replace(message, **{field.name: wrong})


def mutate(rng: random.Random, data: bytes) -> bytes:
    """Random bytes, or a valid message that was cut, spliced, extended or overwritten."""
    choice = rng.randrange(6)
    if choice == 0:
        return rng.randbytes(rng.randrange(200))
    if choice == 1:
        return data[:HEADER_BYTES] + rng.randbytes(rng.randrange(200))
    place = rng.randrange(len(data))
    if choice == 2:
        return data[:place] + data[place + 1 + rng.randrange(8) :]
    if choice == 3:
        return data[:place] + rng.randbytes(1 + rng.randrange(8)) + data[place:]
    if choice == 4:
        return data[:place] + rng.randbytes(1 + rng.randrange(8)) + data[place + 8 :]
    # A body of noise under a CRC that fits. With the right length, messages of fixed length would take
    # it: then it *is* a message, and the state machines refuse its signature.
    length = rng.randrange(200)
    return framed(data[:HEADER_BYTES] + rng.randbytes(length + (length == len(data) - 10)))


def fuzz(message: Any, times: int) -> None:
    rng, data = random.Random(message.kind), message.encode()
    for _ in range(times):
        mutated = mutate(rng, data)
        if mutated == data:
            continue
        with pytest.raises(MessageError):
            type(message).decode(mutated)


@by_name
def test_fuzzed_messages_are_refused(message: Any) -> None:
    fuzz(message, 3_000)


@by_name
@pytest.mark.slow
def test_100_000_fuzzed_messages_are_refused(message: Any) -> None:
    fuzz(message, 100_000)


@by_name
def test_the_transport_limit_fits(message: Any) -> None:
    assert len(message.encode()) <= encoded_limit(type(message), 9, 7, 32)


def test_the_transport_limit_is_tight() -> None:
    rows = tuple((site, bytes(SEALED_BYTES)) for site in range(1, 101))
    reply = ShareReply(SID, 2, rows)
    assert len(reply.encode()) == encoded_limit(ShareReply, 100, 1, 32)
    vector = MaskReply(SID, 2, np.zeros(1000, dtype="<u2"))
    assert len(vector.encode()) == encoded_limit(MaskReply, 100, 1000, 16)


def test_shares_do_not_show_in_repr() -> None:
    reply = EXAMPLES[9]
    assert repr(reply) == "UnmaskReply(site=2, 3 b, 1 s)"
