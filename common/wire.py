"""One typed message a stage ↔ Flower's RecordDict. The only room that knows Flower's records.

Decoding is strict: exact keys, types, lengths, dtypes; nothing is unpickled; sizes are bounded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from common.adapter import Vector
from common.errors import ProtocolError, StatusCode
from common.ledger_errors import LedgerError
from common.ledger_head import SignedHead
from common.secagg.framing import Framed
from common.secagg.messages import MESSAGES

VERSION: Final = 2
MAX_BYTES: Final = 1 << 30  # of an array

_FIELDS: Final = "confide"
_ARRAY: Final = "array"
_LEDGER: Final = "ledger"
_HEAD: Final = "head"
# Plain bytes, so that nothing has to be parsed or unpickled.
_RAW: Final = "confide.float32.le"
_BODY: Final = "confide.secagg"


def _kind(message: type[Framed]) -> str:
    """AdvertiseRequest → "advertise-request"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", message.__name__).lower()


_SECAGG: Final[dict[str, type[Framed]]] = {_kind(kind): kind for kind in MESSAGES}


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
    plan_digest: str
    layout_digest: str
    vector: Vector


@dataclass(frozen=True)
class Ready:
    """Site → server: I have trained, and nothing else. The update waits at the site."""

    site: int
    round: int


@dataclass(frozen=True)
class PlainUpdate:
    """Site → server, in a study without secure aggregation: what training changed, in the clear."""

    site: int
    round: int
    layout_digest: str
    vector: Vector


@dataclass(frozen=True)
class Refusal:
    """Site → server: a fixed code, never the text of an error, which could carry data."""

    site: int
    code: StatusCode


Message = Hello | TrainRequest | Ready | PlainUpdate | Refusal | Framed
"""`Framed`: one of the ten of secure aggregation, common/secagg/messages.py."""
_Scalar = str | int | float


def encode(message: Message, head: bytes = b"") -> RecordDict:
    """The records that carry `message`, and beside it the signed head of the sending site's ledger."""
    content = _encode(message)
    if head:
        content[_LEDGER] = ConfigRecord({_HEAD: head})
    return content


def decode_reply(content: RecordDict, longest: int = MAX_BYTES) -> tuple[Message, SignedHead | None]:
    """What a site has sent: its message, and its ledger's head where there is one, not yet checked.

    Raises:
        ProtocolError: see `decode`.
    """
    rest = RecordDict({name: record for name, record in content.items() if name != _LEDGER})
    if _LEDGER not in content:
        return decode(rest, longest), None
    record = content[_LEDGER]
    data = record.get(_HEAD) if isinstance(record, ConfigRecord) and len(record) == 1 else None
    if type(data) is not bytes:
        raise ProtocolError("a ledger's head must be bytes, in a record of its own")
    try:
        head = SignedHead.decode(data)
    except LedgerError as error:
        raise ProtocolError(f"not the head of a ledger: {error}") from None
    return decode(rest, longest), head


def _encode(message: Message) -> RecordDict:
    match message:
        case Hello(site):
            return _pack("hello", {"site": site})
        case TrainRequest(run_id, round_number, plan, layout, vector):
            fields: dict[str, _Scalar] = {
                "run_id": run_id,
                "round": round_number,
                "plan_digest": plan,
                "layout_digest": layout,
            }
            return _pack("train", fields, _floats(vector))
        case Ready(site, round_number):
            return _pack("ready", {"site": site, "round": round_number})
        case PlainUpdate(site, round_number, layout, vector):
            fields = {"site": site, "round": round_number, "layout_digest": layout}
            return _pack("plain-update", fields, _floats(vector))
        case Refusal(site, code):
            return _pack("refusal", {"site": site, "code": code.value})
        case _:
            data = message.encode()
            body = Array(dtype="uint8", shape=(len(data),), stype=_BODY, data=data)
            return _pack(_kind(type(message)), {}, body)


def decode(content: RecordDict, longest: int = MAX_BYTES) -> Message:
    """The message that `content` carries; a secure-aggregation message of at most `longest` bytes.

    Raises:
        ProtocolError: on anything that `encode` would not have written.
    """
    record = content.config_records.get(_FIELDS)
    if record is None or len(content.config_records) != 1 or len(content.metric_records) != 0:
        raise ProtocolError(
            f"a message must hold exactly one record {_FIELDS!r}, found {sorted(content)[:5]}"
        )
    reader = _Reader(dict(record))
    kind = reader.text("kind", 24)
    version = reader.whole("version", 1, 1 << 16)
    if version != VERSION:
        raise ProtocolError(f"expected message version {VERSION}, found {version}: update the older side")
    message: Message
    match kind:
        case "hello":
            message = Hello(reader.whole("site", 0, 1 << 32))
            _no_array(content)
        case "ready":
            message = Ready(reader.whole("site", 1, 1 << 32), reader.whole("round", 1, 1 << 32))
            _no_array(content)
        case "refusal":
            site, code = reader.whole("site", 0, 1 << 32), reader.text("code", 32)
            if code not in {c.value for c in StatusCode}:
                raise ProtocolError("unknown status code in a refusal")
            message = Refusal(site, StatusCode(code))
            _no_array(content)
        case "train":
            message = TrainRequest(
                reader.text("run_id", 64),
                reader.whole("round", 1, 1 << 32),
                reader.text("plan_digest", 64),
                reader.text("layout_digest", 64),
                _vector(content),
            )
        case "plain-update":
            message = PlainUpdate(
                reader.whole("site", 1, 1 << 32),
                reader.whole("round", 1, 1 << 32),
                reader.text("layout_digest", 64),
                _vector(content),
            )
        case _ if kind in _SECAGG:
            message = _SECAGG[kind].decode(_body(content, longest))
        case _:
            raise ProtocolError(f"unknown message kind {kind!r}")
    reader.finish()
    return message


def payload_bytes(content: RecordDict) -> int:
    """Bytes of the records as they travel, without the transport's own framing."""
    arrays = sum(len(a.data) for record in content.array_records.values() for a in record.values())
    return arrays + sum(record.count_bytes() for record in content.config_records.values())


def _pack(kind: str, fields: dict[str, _Scalar], array: Array | None = None) -> RecordDict:
    content = RecordDict({_FIELDS: ConfigRecord({"kind": kind, "version": VERSION, **fields})})
    if array is not None:
        content[_ARRAY] = ArrayRecord({_ARRAY: array})
    return content


def _floats(vector: Vector) -> Array:
    data = np.ascontiguousarray(vector, dtype="<f4").tobytes()
    return Array(dtype="float32", shape=(vector.size,), stype=_RAW, data=data)


def _no_array(content: RecordDict) -> None:
    if len(content.array_records):
        raise ProtocolError("this kind of message carries no array")


def _array(content: RecordDict, dtype: str, stype: str, width: int) -> bytes:
    record = content.array_records.get(_ARRAY)
    if record is None or len(content.array_records) != 1 or list(record) != [_ARRAY]:
        raise ProtocolError("this kind of message carries exactly one array")
    array = record[_ARRAY]
    if array.stype != stype or array.dtype != dtype or len(array.shape) != 1:
        raise ProtocolError(f"the array must be one-dimensional {dtype} in raw bytes")
    size = array.shape[0]
    if size < 1 or size * width > MAX_BYTES or len(array.data) != size * width:
        raise ProtocolError(f"an array of {size} needs {size * width} bytes, found {len(array.data)}")
    return array.data


def _vector(content: RecordDict) -> Vector:
    return np.frombuffer(_array(content, "float32", _RAW, 4), dtype="<f4").astype(np.float32)


def _body(content: RecordDict, longest: int) -> bytes:
    data = _array(content, "uint8", _BODY, 1)
    if len(data) > longest:
        raise ProtocolError(f"a message of {len(data)} bytes, where at most {longest} are allowed")
    return data


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

    def finish(self) -> None:
        if self._fields:
            raise ProtocolError(f"unexpected fields {sorted(self._fields)[:5]}")
