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

VERSION: Final = 3
MAX_BYTES: Final = 1 << 30  # of an array
# Flower moves each record, array and piece of an array as an object of its own, by a request of its own: a
# body in the record of the fields is one instead of four. Beyond a megabyte an array can come in pieces.
INLINE_BYTES: Final = 1 << 20

_FIELDS: Final = "confide"
_DATA: Final = "data"
_ARRAY: Final = "array"
_LEDGER: Final = "ledger"
# Plain bytes, so that nothing has to be parsed or unpickled.
_RAW: Final = "confide.float32.le"
_BODY: Final = "confide.secagg"
_FORMS: Final = {_RAW: ("float32", 4), _BODY: ("uint8", 1)}  # dtype, and bytes of one element


def _kind(message: type[Framed]) -> str:
    """AdvertiseRequest → "advertise-request"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", message.__name__).lower()


_SECAGG: Final[dict[str, type[Framed]]] = {_kind(kind): kind for kind in MESSAGES}


@dataclass(frozen=True)
class Hello:
    """Server → site: who are you, and do we hold the same roster? Site → server: my id."""

    site: int  # 0 where the server asks
    roster: bytes = b""  # the asking server's, hashed; empty in a study without secure aggregation


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
_Scalar = str | int | float | bytes


def encode(message: Message, head: bytes = b"") -> RecordDict:
    """The records that carry `message`, and with it the signed head of the sending site's ledger."""
    content = _encode(message)
    if head:
        content.config_records[_FIELDS][_LEDGER] = head
    return content


def decode_reply(content: RecordDict, longest: int = MAX_BYTES) -> tuple[Message, SignedHead | None]:
    """What a site has sent: its message, and its ledger's head where there is one, not yet checked.

    Raises:
        ProtocolError: see `decode`.
    """
    record = content.config_records.get(_FIELDS)
    if record is None or _LEDGER not in record:
        return decode(content, longest), None
    data = record[_LEDGER]
    if type(data) is not bytes:
        raise ProtocolError("a ledger's head must be bytes")
    try:
        head = SignedHead.decode(data)
    except LedgerError as error:
        raise ProtocolError(f"not the head of a ledger: {error}") from None
    fields = ConfigRecord({name: value for name, value in record.items() if name != _LEDGER})
    rest = RecordDict({name: fields if name == _FIELDS else other for name, other in content.items()})
    return decode(rest, longest), head


def _encode(message: Message) -> RecordDict:
    match message:
        case Hello(site, roster):
            fields: dict[str, _Scalar] = {"site": site}
            return _pack("hello", fields | ({"roster": roster} if roster else {}))
        case TrainRequest(run_id, round_number, plan, layout, vector):
            fields = {
                "run_id": run_id,
                "round": round_number,
                "plan_digest": plan,
                "layout_digest": layout,
            }
            return _pack("train", fields, _floats(vector), _RAW)
        case Ready(site, round_number):
            return _pack("ready", {"site": site, "round": round_number})
        case PlainUpdate(site, round_number, layout, vector):
            fields = {"site": site, "round": round_number, "layout_digest": layout}
            return _pack("plain-update", fields, _floats(vector), _RAW)
        case Refusal(site, code):
            return _pack("refusal", {"site": site, "code": code.value})
        case _:
            return _pack(_kind(type(message)), {}, message.encode(), _BODY)


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
            message = Hello(reader.whole("site", 0, 1 << 32), reader.digest_or_none("roster"))
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
                _vector(reader, content),
            )
        case "plain-update":
            message = PlainUpdate(
                reader.whole("site", 1, 1 << 32),
                reader.whole("round", 1, 1 << 32),
                reader.text("layout_digest", 64),
                _vector(reader, content),
            )
        case _ if kind in _SECAGG:
            message = _SECAGG[kind].decode(_body(reader, content, longest))
        case _:
            raise ProtocolError(f"unknown message kind {kind!r}")
    reader.finish()
    return message


def payload_bytes(content: RecordDict) -> int:
    """Bytes of the records as they travel, without the transport's own framing."""
    arrays = sum(len(a.data) for record in content.array_records.values() for a in record.values())
    return arrays + sum(record.count_bytes() for record in content.config_records.values())


def _pack(kind: str, fields: dict[str, _Scalar], data: bytes = b"", form: str = "") -> RecordDict:
    """form: what `data` is, `_RAW` or `_BODY`."""
    record: dict[str, _Scalar] = {"kind": kind, "version": VERSION, **fields}
    if 0 < len(data) <= INLINE_BYTES:
        record[_DATA] = data
    content = RecordDict({_FIELDS: ConfigRecord({**record})})
    if len(data) > INLINE_BYTES:
        dtype, width = _FORMS[form]
        array = Array(dtype=dtype, shape=(len(data) // width,), stype=form, data=data)
        content[_ARRAY] = ArrayRecord({_ARRAY: array})
    return content


def _floats(vector: Vector) -> bytes:
    return np.ascontiguousarray(vector, dtype="<f4").tobytes()


def _no_array(content: RecordDict) -> None:
    if len(content.array_records):
        raise ProtocolError("this kind of message carries no array")


def _data(reader: _Reader, content: RecordDict, form: str) -> bytes:
    """What stands beside the fields: among them where it is short, as an array where it is long."""
    dtype, width = _FORMS[form]
    if not len(content.array_records):
        return reader.data(_DATA, width, INLINE_BYTES)
    record = content.array_records.get(_ARRAY)
    if record is None or len(content.array_records) != 1 or list(record) != [_ARRAY]:
        raise ProtocolError("this kind of message carries exactly one array")
    array = record[_ARRAY]
    if array.stype != form or array.dtype != dtype or len(array.shape) != 1:
        raise ProtocolError(f"the array must be one-dimensional {dtype} in raw bytes")
    size = array.shape[0] * width
    if not INLINE_BYTES < size <= MAX_BYTES or len(array.data) != size:
        raise ProtocolError(
            f"an array must have {INLINE_BYTES + 1} to {MAX_BYTES} bytes, and as many as its shape says: "
            f"found {len(array.data)} and {size}"
        )
    return array.data


def _vector(reader: _Reader, content: RecordDict) -> Vector:
    return np.frombuffer(_data(reader, content, _RAW), dtype="<f4").astype(np.float32)


def _body(reader: _Reader, content: RecordDict, longest: int) -> bytes:
    data = _data(reader, content, _BODY)
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

    def digest_or_none(self, name: str) -> bytes:
        """32 bytes; none where the field is left out, since Flower cannot count an empty one."""
        if name not in self._fields:
            return b""
        value = self._take(name)
        if type(value) is not bytes or len(value) != 32:
            raise ProtocolError(f"field {name!r} must be 32 bytes, or be left out")
        return value

    def data(self, name: str, width: int, longest: int) -> bytes:
        value = self._take(name)
        if type(value) is not bytes or not 0 < len(value) <= longest or len(value) % width:
            raise ProtocolError(f"field {name!r} must be 1 to {longest} bytes, a multiple of {width}")
        return value

    def whole(self, name: str, low: int, high: int) -> int:
        value = self._take(name)
        if type(value) is not int or not low <= value < high:
            raise ProtocolError(f"field {name!r} must be a whole number from {low} below {high}")
        return value

    def finish(self) -> None:
        if self._fields:
            raise ProtocolError(f"unexpected fields {sorted(self._fields)[:5]}")
