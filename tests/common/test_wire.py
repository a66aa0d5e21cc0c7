"""Messages on the wire: what was written is read back, and nothing else is read at all."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from common import wire
from common.errors import ProtocolError, StatusCode
from common.secagg.messages import AdvertiseRequest, ConsistReply, ConsistRequest, MaskReply

VECTORS = npst.arrays(np.float32, st.integers(1, 20), elements=st.floats(width=32, allow_nan=False))
NUMBERS = st.integers(1, 2**32 - 1)
TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=64)
HASHES = st.binary(min_size=32, max_size=32)
MESSAGES = st.one_of(
    st.builds(wire.Hello, st.integers(0, 2**32 - 1), st.just(b"") | HASHES),
    st.builds(wire.TrainRequest, TEXTS, NUMBERS, TEXTS, TEXTS, VECTORS),
    st.builds(wire.Ready, NUMBERS, NUMBERS),
    st.builds(wire.PlainUpdate, NUMBERS, NUMBERS, TEXTS, VECTORS),
    st.builds(ConsistRequest, HASHES, st.lists(NUMBERS, max_size=5).map(tuple)),
    st.builds(MaskReply, HASHES, NUMBERS, npst.arrays("<u4", st.integers(1, 20))),
    st.builds(wire.Refusal, st.integers(0, 2**32 - 1), st.sampled_from(StatusCode)),
)
EXAMPLES: dict[str, wire.Message] = {
    "hello": wire.Hello(3, bytes(32)),
    "train": wire.TrainRequest("run", 2, "a" * 64, "b" * 64, np.arange(5, dtype=np.float32)),
    "ready": wire.Ready(3, 2),
    "plain-update": wire.PlainUpdate(3, 2, "b" * 64, np.arange(5, dtype=np.float32)),
    "refusal": wire.Refusal(3, StatusCode.REFUSED_BUDGET),
    "advertise-request": AdvertiseRequest(b"run", 2, 1, (1, 2, 3), bytes(32), bytes(32), bytes(32)),
    "mask-reply": MaskReply(bytes(32), 3, np.arange(5, dtype="<u4")),
    "consist-reply": ConsistReply(bytes(32), 3, bytes(64)),
}
WITH_VECTOR = ("train", "plain-update")
WITH_BODY = ("advertise-request", "mask-reply", "consist-reply")
FIELDS = [(kind, name) for kind in EXAMPLES for name in wire.encode(EXAMPLES[kind])["confide"]]


def frozen(content: RecordDict) -> Any:
    """All that a RecordDict holds, types included, so that two can be compared."""
    configs = {
        name: {key: (type(value), value) for key, value in record.items()}
        for name, record in content.config_records.items()
    }
    arrays = {
        name: {key: (a.dtype, tuple(a.shape), a.stype, a.data) for key, a in record.items()}
        for name, record in content.array_records.items()
    }
    return configs, arrays, {name: dict(record) for name, record in content.metric_records.items()}


def fields(kind: str) -> ConfigRecord:
    record = wire.encode(EXAMPLES[kind])["confide"]
    assert isinstance(record, ConfigRecord)
    return record


def with_fields(kind: str, record: dict[str, Any]) -> RecordDict:
    content = wire.encode(EXAMPLES[kind])
    content["confide"] = ConfigRecord(record)
    return content


@pytest.fixture
def as_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short bodies too travel as arrays, so that what holds for long ones can be tried on short ones."""
    monkeypatch.setattr(wire, "INLINE_BYTES", 0)


@pytest.mark.parametrize("inline", [0, 16, wire.INLINE_BYTES])
@given(message=MESSAGES)
def test_round_trip(inline: int, message: wire.Message) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "INLINE_BYTES", inline)
        content = wire.encode(message)
        decoded = wire.decode(content)
        assert type(decoded) is type(message)
        assert frozen(wire.encode(decoded)) == frozen(content)


@pytest.mark.parametrize("kind", WITH_VECTOR + WITH_BODY)
def test_a_body_has_one_form(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among the fields where it is short, as an array where it is long; not the other way, and not twice."""
    inline = wire.encode(EXAMPLES[kind])
    assert len(inline) == 1 and wire.decode(inline) is not None
    size = len(inline.config_records["confide"]["data"])  # type: ignore[arg-type]
    monkeypatch.setattr(wire, "INLINE_BYTES", size - 1)
    array = wire.encode(EXAMPLES[kind])
    assert sorted(array) == ["array", "confide"] and wire.decode(array) is not None
    with pytest.raises(ProtocolError, match="'data' must be"):
        wire.decode(inline)
    inline["array"] = array["array"]
    with pytest.raises(ProtocolError, match="data"):
        wire.decode(inline)
    monkeypatch.setattr(wire, "INLINE_BYTES", size)
    with pytest.raises(ProtocolError, match="an array must have"):
        wire.decode(array)


@pytest.mark.parametrize("kind", WITH_VECTOR)
def test_a_vector_among_the_fields_is_whole(kind: str) -> None:
    for data in (bytes(19), bytes(3), b"", "x" * 20):
        with pytest.raises(ProtocolError, match="'data' must be"):
            wire.decode(with_fields(kind, {**fields(kind), "data": data}))


def test_a_vector_arrives_bit_for_bit_and_is_the_receiver_s_own() -> None:
    sent = np.array([0.1, -0.0, 3e38, 1e-45], dtype=np.float32)
    message = wire.decode(wire.encode(wire.PlainUpdate(1, 1, "x", sent)))
    assert isinstance(message, wire.PlainUpdate)
    assert message.vector.tobytes() == sent.tobytes()
    message.vector[0] = 9
    assert sent[0] == np.float32(0.1)


@pytest.mark.parametrize(("kind", "name"), [field for field in FIELDS if field != ("hello", "roster")])
def test_every_field_is_needed(kind: str, name: str) -> None:
    record = dict(fields(kind))
    del record[name]
    with pytest.raises(ProtocolError):
        wire.decode(with_fields(kind, record))


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_every_field_has_one_type(kind: str, name: str) -> None:
    right = type(fields(kind)[name])
    wrong: list[Any] = [0, -1, 1, 1.5, True, "", "1", b"1", [1], ["x"], [1.5], [], float("nan"), 2**40]
    for value in wrong:
        # A value of the right type is left to the next test, unless no such value can be right.
        if type(value) is right and value not in ("", -1, 2**40):
            continue
        with pytest.raises(ProtocolError):
            wire.decode(with_fields(kind, {**fields(kind), name: value}))


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("hello", "version", 2),
        ("hello", "version", 4),
        ("hello", "roster", bytes(31)),
        ("hello", "roster", "a" * 32),
        ("hello", "kind", "goodbye"),
        ("hello", "kind", "train"),
        ("refusal", "code", "a sentence about a record"),
        ("refusal", "code", ""),
        ("train", "run_id", "x" * 65),
        ("train", "plan_digest", "x" * 65),
        ("train", "round", 0),
        ("train", "round", 2**32),
        ("ready", "site", 0),
        ("ready", "round", 2**32),
        ("plain-update", "site", 0),
        ("consist-reply", "kind", "mask-reply"),
        ("consist-reply", "kind", "framed"),
    ],
)
def test_values_out_of_range_are_refused(kind: str, name: str, value: Any) -> None:
    with pytest.raises(ProtocolError):
        wire.decode(with_fields(kind, {**fields(kind), name: value}))


@pytest.mark.parametrize("kind", EXAMPLES)
def test_nothing_may_be_added(kind: str, as_arrays: None) -> None:
    vector = wire.encode(EXAMPLES["plain-update"])["array"]
    for name, record in {
        "more": ConfigRecord({"a": 1}),
        "metrics": MetricRecord({"loss": 0.5}),
        "second": vector,
    }.items():
        content = wire.encode(EXAMPLES[kind])
        content[name] = record
        with pytest.raises(ProtocolError):
            wire.decode(content)
    with pytest.raises(ProtocolError, match="note"):
        wire.decode(with_fields(kind, {**fields(kind), "note": "x"}))


@pytest.mark.parametrize("kind", ["hello", "ready", "refusal"])
def test_an_array_where_none_belongs_is_refused(kind: str, as_arrays: None) -> None:
    content = wire.encode(EXAMPLES[kind])
    content["array"] = wire.encode(EXAMPLES["plain-update"])["array"]
    with pytest.raises(ProtocolError, match="no array"):
        wire.decode(content)


BAD_ARRAYS: dict[str, Array] = {
    "bad_dtype": Array(dtype="float64", shape=(5,), stype="confide.float32.le", data=bytes(20)),
    "bad_pickle": Array(dtype="float32", shape=(5,), stype="numpy.ndarray", data=bytes(20)),
    "bad_short": Array(dtype="float32", shape=(5,), stype="confide.float32.le", data=bytes(19)),
    "bad_long": Array(dtype="float32", shape=(5,), stype="confide.float32.le", data=bytes(24)),
    "bad_empty": Array(dtype="float32", shape=(0,), stype="confide.float32.le", data=b""),
    "bad_negative": Array(dtype="float32", shape=(-5,), stype="confide.float32.le", data=bytes(20)),
    "bad_scalar": Array(dtype="float32", shape=(), stype="confide.float32.le", data=bytes(4)),
    "bad_matrix": Array(dtype="float32", shape=(5, 1), stype="confide.float32.le", data=bytes(20)),
    "bad_huge": Array(dtype="float32", shape=(2**40,), stype="confide.float32.le", data=bytes(20)),
}


@pytest.mark.parametrize("kind", WITH_VECTOR)
@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_a_vector_of_another_form_is_refused(kind: str, name: str, as_arrays: None) -> None:
    content = wire.encode(EXAMPLES[kind])
    content["array"] = ArrayRecord({"array": BAD_ARRAYS[name]})
    with pytest.raises(ProtocolError):
        wire.decode(content)


@pytest.mark.parametrize("kind", WITH_VECTOR + WITH_BODY)
@pytest.mark.parametrize("names", [(), ("other",), ("array", "other")])
def test_exactly_one_array(kind: str, names: tuple[str, ...], as_arrays: None) -> None:
    array = wire.encode(EXAMPLES[kind]).array_records["array"]["array"]
    content = wire.encode(EXAMPLES[kind])
    content["array"] = ArrayRecord(dict.fromkeys(names, array))
    with pytest.raises(ProtocolError, match="exactly one array"):
        wire.decode(content)
    del content["array"]
    with pytest.raises(ProtocolError, match="lacks the field 'data'"):
        wire.decode(content)


@pytest.mark.parametrize("kind", WITH_BODY)
def test_a_body_may_not_be_longer_than_expected(kind: str) -> None:
    content = wire.encode(EXAMPLES[kind])
    size = len(fields(kind)["data"])  # type: ignore[arg-type]
    assert wire.decode(content, size) == EXAMPLES[kind]
    with pytest.raises(ProtocolError, match=f"at most {size - 1}"):
        wire.decode(content, size - 1)


def test_the_ten_messages_of_secure_aggregation_have_kinds_of_their_own() -> None:
    kinds = {fields(kind)["kind"] for kind in EXAMPLES} | {"share-request", "unmask-reply"}
    assert set(wire._SECAGG) > {"advertise-request", "share-request", "mask-reply", "unmask-reply"}
    assert len(wire._SECAGG) == 10 and kinds - set(wire._SECAGG) == {
        "hello",
        "train",
        "ready",
        "plain-update",
        "refusal",
    }


def test_random_mutations_are_refused_or_mean_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand messages changed at random, some several times: the decoder raises ProtocolError, or
    what it read, written again, is what it was given."""
    rng = random.Random(0)
    refused = 0
    for _ in range(10_000):
        monkeypatch.setattr(wire, "INLINE_BYTES", rng.choice([0, 1 << 20]))
        content = wire.encode(rng.choice(list(EXAMPLES.values())))
        for _ in range(rng.randint(1, 3)):
            rng.choice(MUTATIONS)(rng, content)
        try:
            message = wire.decode(content)
        except ProtocolError:
            refused += 1
            continue
        assert frozen(wire.encode(message)) == frozen(content)
    assert 5000 < refused < 10_000


def any_value(rng: random.Random) -> Any:
    numbers = (0, 1, 7, -1, 2**32, 2**63 - 1, 0.0, 1.0, -1.5, float("nan"), float("inf"), True)
    texts = (
        "",
        "x",
        "é" * 80,
        "hello",
        "train",
        "ready",
        "mask-reply",
        "refusal",
        "failed-data",
        b"",
        b"\xff",
    )
    return rng.choice([*numbers, *texts, [], [1], ["x"], [0.5], [b"x"]])


def change_field(rng: random.Random, content: RecordDict) -> None:
    for record in content.config_records.values():
        record[rng.choice([*record, "note"])] = any_value(rng)


def remove_field(rng: random.Random, content: RecordDict) -> None:
    for record in content.config_records.values():
        if record:
            del record[rng.choice(list(record))]


def move_record(rng: random.Random, content: RecordDict) -> None:
    if content:
        name = rng.choice(list(content))
        content[rng.choice(["confide", "array", "", "other"])] = content.pop(name)


def add_record(rng: random.Random, content: RecordDict) -> None:
    extra: Any = rng.choice(
        [ConfigRecord({"a": 1}), MetricRecord({"a": 1.0}), ArrayRecord({}), ConfigRecord({})]
    )
    content[rng.choice(["more", "array", "confide"])] = extra


def change_array(rng: random.Random, content: RecordDict) -> None:
    for record in content.array_records.values():
        for name, array in list(record.items()):
            data = bytes(rng.randrange(256) for _ in range(rng.choice([0, 4, 19, 20, 20, 20, 24])))
            record[rng.choice([name, name, "other"])] = Array(
                dtype=rng.choice([array.dtype, array.dtype, "float64", "", "object"]),
                shape=rng.choice([array.shape, array.shape, (4,), (0,), (-1,), (5, 1), ()]),
                stype=rng.choice([array.stype, array.stype, "numpy.ndarray", ""]),
                data=rng.choice([array.data, data]),
            )


MUTATIONS: list[Callable[[random.Random, RecordDict], None]] = [
    change_field,
    change_field,
    remove_field,
    move_record,
    add_record,
    change_array,
]


def test_payload_counts_the_numbers_and_little_else() -> None:
    for size in (1, 1000):
        content = wire.encode(wire.PlainUpdate(1, 1, "b" * 64, np.ones(size, dtype=np.float32)))
        assert 4 * size < wire.payload_bytes(content) < 4 * size + 300
