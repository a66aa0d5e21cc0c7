"""One typed message a stage ↔ Flower's RecordDict. The only room that knows Flower's records.

Decoding is strict: exact keys, types, lengths, dtypes; nothing is unpickled; sizes are bounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from common.adapter import Vector
from common.errors import ProtocolError, StatusCode

VERSION: Final = 1
MAX_NUMBERS: Final = 1 << 28  # 1 GiB of float32

_FIELDS: Final = "confide"
_VECTOR: Final = "vector"
_RAW: Final = "confide.float32.le"  # plain bytes, so that nothing has to be parsed or unpickled


@dataclass(frozen=True)
class Hello:
    """Server → site: who are you? Site → server: my id."""

    site: int  # 0 where the server asks


@dataclass(frozen=True)
class TrainRequest:
    """Server → site: train in round `round` of `run_id`, from the global adapter `vector`.

    The digests let the site refuse a plan or a layout that is not its own. Nothing here sets noise,
    clipping or steps: the site's own plan does.
    """

    run_id: str
    round: int
    attempt: int
    plan_digest: str
    layout_digest: str
    vector: Vector


@dataclass(frozen=True)
class Update:
    """Site → server: what training changed, to be summed with others.

    Until secure aggregation carries it, this is the vector in the clear.
    """

    site: int
    round: int
    attempt: int
    layout_digest: str
    weight: float
    vector: Vector


@dataclass(frozen=True)
class Refusal:
    """Site → server: a fixed code, never the text of an error, which could carry data."""

    site: int
    code: StatusCode


Message = Hello | TrainRequest | Update | Refusal
_Scalar = str | int | float


def encode(message: Message) -> RecordDict:
    """The records that carry `message`."""
    match message:
        case Hello(site):
            return _pack("hello", {"site": site})
        case TrainRequest(run_id, round_number, attempt, plan, layout, vector):
            fields: dict[str, _Scalar] = {
                "run_id": run_id,
                "round": round_number,
                "attempt": attempt,
                "plan_digest": plan,
                "layout_digest": layout,
            }
            return _pack("train", fields, vector)
        case Update(site, round_number, attempt, layout, weight, vector):
            fields = {
                "site": site,
                "round": round_number,
                "attempt": attempt,
                "layout_digest": layout,
                "weight": weight,
            }
            return _pack("update", fields, vector)
        case Refusal(site, code):
            return _pack("refusal", {"site": site, "code": code.value})


def decode(content: RecordDict) -> Message:
    """The message that `content` carries.

    Raises:
        ProtocolError: on anything that `encode` would not have written.
    """
    record = content.config_records.get(_FIELDS)
    if record is None or len(content.config_records) != 1 or len(content.metric_records) != 0:
        raise ProtocolError(
            f"a message must hold exactly one record {_FIELDS!r}, found {sorted(content)[:5]}"
        )
    reader = _Reader(dict(record))
    kind = reader.text("kind", 16)
    version = reader.whole("version", 1, 1 << 16)
    if version != VERSION:
        raise ProtocolError(f"expected message version {VERSION}, found {version}: update the older side")
    message: Message
    match kind:
        case "hello":
            message = Hello(reader.whole("site", 0, 1 << 32))
            _no_vector(content)
        case "refusal":
            site, code = reader.whole("site", 0, 1 << 32), reader.text("code", 32)
            if code not in {c.value for c in StatusCode}:
                raise ProtocolError("unknown status code in a refusal")
            message = Refusal(site, StatusCode(code))
            _no_vector(content)
        case "train":
            message = TrainRequest(
                reader.text("run_id", 64),
                reader.whole("round", 1, 1 << 32),
                reader.whole("attempt", 1, 1 << 32),
                reader.text("plan_digest", 64),
                reader.text("layout_digest", 64),
                _vector(content),
            )
        case "update":
            message = Update(
                reader.whole("site", 1, 1 << 32),
                reader.whole("round", 1, 1 << 32),
                reader.whole("attempt", 1, 1 << 32),
                reader.text("layout_digest", 64),
                reader.number("weight"),
                _vector(content),
            )
        case _:
            raise ProtocolError(f"unknown message kind {kind[:16]!r}")
    reader.finish()
    return message


def payload_bytes(content: RecordDict) -> int:
    """Bytes of the records as they travel, without the transport's own framing."""
    arrays = sum(len(a.data) for record in content.array_records.values() for a in record.values())
    return arrays + sum(record.count_bytes() for record in content.config_records.values())


def _pack(kind: str, fields: dict[str, _Scalar], vector: Vector | None = None) -> RecordDict:
    content = RecordDict({_FIELDS: ConfigRecord({"kind": kind, "version": VERSION, **fields})})
    if vector is not None:
        data = np.ascontiguousarray(vector, dtype="<f4").tobytes()
        array = Array(dtype="float32", shape=(vector.size,), stype=_RAW, data=data)
        content[_VECTOR] = ArrayRecord({_VECTOR: array})
    return content


def _no_vector(content: RecordDict) -> None:
    if len(content.array_records):
        raise ProtocolError("this kind of message carries no vector")


def _vector(content: RecordDict) -> Vector:
    record = content.array_records.get(_VECTOR)
    if record is None or len(content.array_records) != 1 or list(record) != [_VECTOR]:
        raise ProtocolError("this kind of message carries exactly one vector")
    array = record[_VECTOR]
    if array.stype != _RAW or array.dtype != "float32" or len(array.shape) != 1:
        raise ProtocolError("a vector must be one-dimensional float32 in raw bytes")
    size = array.shape[0]
    if not 0 < size <= MAX_NUMBERS or len(array.data) != 4 * size:
        raise ProtocolError(f"a vector of {size} numbers must have {4 * size} bytes, found {len(array.data)}")
    return np.frombuffer(array.data, dtype="<f4").astype(np.float32)


class _Reader:
    """Takes each field once, checking its type; `finish` refuses what is left over."""

    def __init__(self, fields: dict[str, object]) -> None:
        self._fields = fields

    def _take(self, name: str) -> object:
        if name not in self._fields:
            raise ProtocolError(f"the message lacks the field {name!r}")
        return self._fields.pop(name)

    def text(self, name: str, longest: int) -> str:
        value = self._take(name)
        if type(value) is not str or not 0 < len(value) <= longest:
            raise ProtocolError(f"field {name!r} must be text of 1 to {longest} characters")
        return value

    def whole(self, name: str, low: int, high: int) -> int:
        value = self._take(name)
        if type(value) is not int or not low <= value < high:
            raise ProtocolError(f"field {name!r} must be a whole number from {low} below {high}")
        return value

    def number(self, name: str) -> float:
        value = self._take(name)
        if type(value) is not float or not np.isfinite(value) or value <= 0:
            raise ProtocolError(f"field {name!r} must be a finite number > 0")
        return value

    def finish(self) -> None:
        if self._fields:
            raise ProtocolError(f"unexpected fields {sorted(self._fields)[:5]}")
