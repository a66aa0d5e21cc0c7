"""Every decoder against bytes that nobody has encoded: it raises ProtocolError, or has read them exactly.

Half of the mutations have a checksum that fits, so that they get past it to the fields.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from common import wire
from common.errors import ProtocolError, StatusCode
from common.ledger_head import HEAD_BYTES
from common.secagg.framing import CRC_BYTES, HEADER_BYTES, Framed
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
)

FEW, MANY = 2_000, 100_000
BOUNDARIES = (0, 1, 2, 3, 16, 17, 32, 255, 256, 2**16 - 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1)


def ids(rng: random.Random) -> tuple[int, ...]:
    return tuple(sorted(rng.sample(range(1, 40), rng.randrange(6))))


def table(rng: random.Random, size: int) -> tuple[tuple[int, bytes], ...]:
    return tuple((site, rng.randbytes(size)) for site in ids(rng))


def advertisement(rng: random.Random) -> Advertisement:
    return Advertisement(rng.randrange(1, 2**32), *(rng.randbytes(32) for _ in range(3)), rng.randbytes(64))


def vector(rng: random.Random) -> Any:
    dtype = rng.choice(["<u4", "<u2"])
    size = rng.randrange(1, 12)
    return np.frombuffer(rng.randbytes(size * np.dtype(dtype).itemsize), dtype=dtype)


MAKERS: dict[type[Framed], Callable[[random.Random], Framed]] = {
    AdvertiseRequest: lambda rng: AdvertiseRequest(
        rng.randbytes(rng.randrange(1, 65)),
        rng.choice(BOUNDARIES),
        rng.choice(BOUNDARIES),
        ids(rng),
        *(rng.randbytes(32) for _ in range(3)),
    ),
    AdvertiseReply: lambda rng: AdvertiseReply(rng.randbytes(32), advertisement(rng)),
    ShareRequest: lambda rng: ShareRequest(
        rng.randbytes(32), tuple(advertisement(rng) for _ in range(rng.randrange(4)))
    ),
    ShareReply: lambda rng: ShareReply(rng.randbytes(32), rng.randrange(1, 99), table(rng, SEALED_BYTES)),
    MaskRequest: lambda rng: MaskRequest(rng.randbytes(32), ids(rng), table(rng, SEALED_BYTES)),
    MaskReply: lambda rng: MaskReply(rng.randbytes(32), rng.randrange(1, 99), vector(rng)),
    ConsistRequest: lambda rng: ConsistRequest(rng.randbytes(32), ids(rng)),
    ConsistReply: lambda rng: ConsistReply(rng.randbytes(32), rng.randrange(1, 99), rng.randbytes(64)),
    UnmaskRequest: lambda rng: UnmaskRequest(rng.randbytes(32), table(rng, 64)),
    UnmaskReply: lambda rng: UnmaskReply(
        rng.randbytes(32), rng.randrange(1, 99), table(rng, 32), table(rng, 32)
    ),
}


def framed(body: bytes) -> bytes:
    return body + zlib.crc32(body).to_bytes(CRC_BYTES, "little")


def mutate(rng: random.Random, data: bytes) -> bytes:
    """Cut, extended, spliced, overwritten, a number replaced, a bit flipped, or noise; once or more."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        place = rng.randrange(len(changed)) if changed else 0
        match rng.randrange(8):
            case 0:
                del changed[place:]
            case 1:
                changed += rng.randbytes(rng.choice([1, 4, 36, 100]))
            case 2:
                del changed[place : place + rng.randrange(1, 9)]
            case 3:
                changed[place:place] = rng.randbytes(rng.randrange(1, 9))
            case 4:
                changed[place : place + 4] = rng.choice(BOUNDARIES).to_bytes(4, "little")
            case 5 if changed:
                changed[place] ^= 1 << rng.randrange(8)
            case 6:  # a piece of it somewhere else
                start = rng.randrange(len(changed) + 1)
                changed[place:place] = changed[start : start + rng.randrange(1, 40)]
            case _:
                changed[HEADER_BYTES:] = rng.randbytes(rng.randrange(150))
    if rng.random() < 0.5:
        return framed(bytes(changed[:-CRC_BYTES]))
    return bytes(changed)


def fuzz(kind: type[Framed], times: int) -> int:
    """How many were accepted; each of them is what its message encodes to."""
    rng = random.Random(kind.kind)
    accepted = 0
    for _ in range(times):
        data = MAKERS[kind](rng).encode()
        changed = mutate(rng, data)
        reader = kind if rng.random() < 0.9 else rng.choice(MESSAGES)
        try:
            message = reader.decode(changed)
        except ProtocolError:
            assert changed != data or reader is not kind
            continue
        accepted += 1
        assert type(message) is reader and message.encode() == changed
    return accepted


by_kind = pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)


@by_kind
def test_two_thousand_mutations_of_each_message(kind: type[Framed]) -> None:
    assert fuzz(kind, FEW) < FEW // 2


@by_kind
@pytest.mark.slow
def test_a_hundred_thousand_mutations_of_each_message(kind: type[Framed]) -> None:
    accepted = fuzz(kind, MANY)
    print(f"{kind.__name__}: {accepted} of {MANY} were messages")
    assert 0 < accepted < MANY // 2


# Flower's records


def any_message(rng: random.Random) -> wire.Message:
    number, text = rng.randrange(1, 2**32), rng.choice(["a", "x" * 64, "é", "run-7"])
    floats = np.frombuffer(rng.randbytes(4 * rng.randrange(1, 9)), dtype="<f4")
    match rng.randrange(7):
        case 0:
            return wire.Hello(rng.choice(BOUNDARIES), rng.choice([b"", rng.randbytes(32)]))
        case 1:
            return wire.TrainRequest(text, number, text, text, floats)
        case 2:
            return wire.Ready(number, number)
        case 3:
            return wire.PlainUpdate(number, number, text, floats)
        case 4:
            return wire.Refusal(number, rng.choice(list(StatusCode)))
        case _:
            return MAKERS[rng.choice(MESSAGES)](rng)


def any_head(rng: random.Random) -> bytes:
    site, seq = rng.randrange(1, 99), rng.randrange(1, 99)
    fields = site.to_bytes(4, "little") + seq.to_bytes(8, "little")
    return rng.choice([b"", fields + rng.randbytes(HEAD_BYTES - 12)])


def any_value(rng: random.Random) -> Any:
    return rng.choice(
        [
            *(0, 1, -1, 2, 2**32, 2**63 - 1, 0.0, 1.5, float("nan"), float("inf"), True, False),
            *(
                "",
                "x",
                "é" * 80,
                "hello",
                "train",
                "mask-reply",
                "failed-data",
                b"",
                b"\xff",
                b"x" * HEAD_BYTES,
            ),
            *([], [1], ["x"], [0.5], [b"x"], [True]),
        ]
    )


def change_field(rng: random.Random, content: RecordDict) -> None:
    for record in content.config_records.values():
        if rng.random() < 0.5:
            record[rng.choice([*record, "note"])] = any_value(rng)


def remove_field(rng: random.Random, content: RecordDict) -> None:
    for record in content.config_records.values():
        if record:
            del record[rng.choice(list(record))]


def move_record(rng: random.Random, content: RecordDict) -> None:
    if content:
        content[rng.choice(["confide", "array", "ledger", ""])] = content.pop(rng.choice(list(content)))


def add_record(rng: random.Random, content: RecordDict) -> None:
    record: Any = rng.choice(
        [
            ConfigRecord({"ledger": any_head(rng) or b"x"}),
            ConfigRecord({"a": 1}),
            MetricRecord({"a": 1.0}),
            ArrayRecord({}),
            ConfigRecord({}),
        ]
    )
    content[rng.choice(["ledger", "more", "array", "confide"])] = record


def change_array(rng: random.Random, content: RecordDict) -> None:
    for record in content.array_records.values():
        for name, array in list(record.items()):
            data = mutate(rng, array.data) if rng.random() < 0.7 else array.data
            shape = rng.choice([(len(data),), (len(data),), array.shape, (0,), (-1,), (5, 1), (), (2**40,)])
            record[rng.choice([name] * 4 + ["other"])] = Array(
                dtype=rng.choice([array.dtype] * 4 + ["float64", "", "object"]),
                shape=shape,
                stype=rng.choice([array.stype] * 4 + ["numpy.ndarray", ""]),
                data=data,
            )


CHANGES = [change_field, remove_field, move_record, add_record, change_array, change_array]


def frozen(content: RecordDict) -> Any:
    """All that the records hold, types included."""

    def value(item: Any) -> Any:
        return (type(item), repr(item))  # NaN equals itself

    return (
        {name: {k: value(v) for k, v in r.items()} for name, r in content.config_records.items()},
        {
            name: {k: (a.dtype, tuple(a.shape), a.stype, a.data) for k, a in r.items()}
            for name, r in content.array_records.items()
        },
        {name: {k: value(v) for k, v in r.items()} for name, r in content.metric_records.items()},
    )


def fuzz_records(times: int, patch: pytest.MonkeyPatch) -> int:
    """How many of so many records were accepted."""
    rng = random.Random(0)
    accepted = met = 0
    inline = wire.INLINE_BYTES
    while met < times:
        patch.setattr(wire, "INLINE_BYTES", rng.choice([0, 40, inline]))
        head = any_head(rng)
        content = wire.encode(any_message(rng), head)
        if rng.random() < 0.7:
            for _ in range(rng.choice([1, 1, 2, 3])):
                rng.choice(CHANGES)(rng, content)
        else:  # the bytes on Flower's transport
            data = mutate(rng, recorddict_to_proto(content).SerializeToString())
            try:
                content = recorddict_from_proto(ProtoRecordDict.FromString(data))
            except Exception:
                continue  # Flower's own parser has refused it: no site and no server of ours sees it
        met += 1
        sent = frozen(content)
        try:
            message, found = wire.decode_reply(content)
        except ProtocolError:
            with pytest.raises(ProtocolError):
                wire.decode(content)
            continue
        assert frozen(content) == sent, "reading it has changed it"
        accepted += 1
        assert frozen(wire.encode(message, b"" if found is None else found.encode())) == sent
        if found is None:
            assert type(wire.decode(content)) is type(message)
        else:
            with pytest.raises(ProtocolError):  # a server has no ledger
                wire.decode(content)
    return accepted


def test_two_thousand_mutations_of_records(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < fuzz_records(FEW, monkeypatch) < FEW // 2


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_thousand_mutations_of_records(monkeypatch: pytest.MonkeyPatch) -> None:
    accepted = fuzz_records(MANY, monkeypatch)
    print(f"records: {accepted} of {MANY} were messages")
    assert 0 < accepted < MANY // 2
