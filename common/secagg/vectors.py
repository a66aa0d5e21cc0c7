"""Known answers: one checker for each algorithm, for the tests and for `confide doctor`.

A document is one JSON file of tests/vectors/secagg: `algorithm`, `source`, and `cases`. In a file
whose name begins with "bad_" every case names the `error` that must be raised (or `refused`, where
the primitive answers None or False). Bytes are hex. Files are read by the caller.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from common.errors import ConfideError
from common.secagg import derivation, graph, keys, masks, messages, shamir, transcript
from common.secagg.encoding import Codec, Count, Tensor
from common.secagg.graph import GraphRule
from common.secagg.keys import EphemeralKey, IdentityKey, Secret

Case = Mapping[str, Any]


class VectorError(ConfideError):
    """A primitive does not give its known answer. Do not aggregate with this installation."""


def check_document(document: Mapping[str, Any]) -> int:
    """Check every case; returns how many there were.

    Raises:
        VectorError: naming the algorithm and the case.
    """
    algorithm = document["algorithm"]
    for number, case in enumerate(document["cases"]):
        expected = case.get("error")
        try:
            _CHECKS[algorithm](case)
            outcome = None
        except (ConfideError, ValueError) as error:
            outcome = type(error).__name__
            detail = str(error)
        if outcome != expected:
            what = f"{outcome}: {detail}" if outcome else "no error"
            raise VectorError(
                f"known answer {number} of {algorithm} ({case.get('comment', '')}): "
                f"{expected or 'no error'} expected, found {what}"
            )
    return len(document["cases"])


def replay(data: str) -> Callable[[int], bytes]:
    """`random_bytes` that hands out these bytes in order."""
    stream = bytes.fromhex(data)
    place = 0

    def random_bytes(size: int) -> bytes:
        nonlocal place
        part = stream[place : place + size]
        if len(part) != size:
            raise VectorError("the known answer has too few random bytes")
        place += size
        return part

    return random_bytes


def codec_of(case: Case) -> Codec:
    """The codec that a case of encoding describes."""
    return Codec(
        case["ring_bits"],
        case["n_max"],
        case["w_max"],
        tuple(Tensor(size, clip) for size, clip in case["tensors"]),
        tuple(Count(name, limit) for name, limit in case["counts"]),
        case["noise_bound"],
    )


def floats(data: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Little-endian IEEE 754 doubles, so that NaN and infinities can be written too."""
    raw = bytes.fromhex(data)
    return np.array(struct.unpack(f"<{len(raw) // 8}d", raw), dtype=np.float64)


def _hex(case: Case, name: str) -> bytes:
    return bytes.fromhex(case[name])


def _same(name: str, found: object, expected: object) -> None:
    if found != expected:
        raise VectorError(f"{name} differs")


def _refused(case: Case, refused: bool) -> None:
    _same("refusal", refused, case.get("refused", False))


def _x25519(case: Case) -> None:
    scalar, u = _hex(case, "scalar"), _hex(case, "u")
    for _ in range(case.get("times", 1)):
        scalar, u = EphemeralKey(Secret(scalar)).agree(u).reveal(), scalar
    _same("shared", scalar, _hex(case, "shared"))


def _point(case: Case) -> None:
    point = _hex(case, "u")
    _same("canonical", keys.is_canonical_point(point), case["canonical"])
    _same("low order", keys.is_low_order_point(point), case["low_order"])
    EphemeralKey(Secret(bytes(range(32)))).agree(point)


def _ed25519(case: Case) -> None:
    message, signature = _hex(case, "message"), _hex(case, "signature")
    _refused(case, not keys.verify(_hex(case, "public"), message, signature))
    if "seed" in case:
        identity = IdentityKey(Secret(_hex(case, "seed")))
        _same("public key", identity.public, _hex(case, "public"))
        _same("signature", identity.sign(message), signature)


def _hkdf(case: Case) -> None:
    okm = keys.hkdf(Secret(_hex(case, "ikm")), _hex(case, "salt"), _hex(case, "info"), case["length"])
    _same("okm", okm.reveal(), _hex(case, "okm"))


def _gcm(case: Case) -> None:
    key, aad = Secret(_hex(case, "key")), _hex(case, "aad")
    sealed = _hex(case, "nonce") + _hex(case, "ciphertext") + _hex(case, "tag")
    opened = keys.open_at_rest(key, sealed, aad)
    _refused(case, opened is None)
    if opened is not None:
        plaintext = _hex(case, "plaintext")
        _same("plaintext", opened, plaintext)
        _same("sealed", keys.seal_at_rest(key, plaintext, aad, replay(case["nonce"])), sealed)


def _seal_once(case: Case) -> None:
    key, aad, sealed = Secret(_hex(case, "key")), _hex(case, "aad"), _hex(case, "sealed")
    opened = keys.open_once(key, sealed, aad)
    _refused(case, opened is None)
    if opened is not None:
        _same("plaintext", opened.reveal(), _hex(case, "plaintext"))
        _same("sealed", keys.seal_once(key, opened, aad), sealed)


def _ctr(case: Case) -> None:
    """SP 800-38A's CTR vectors start at another counter, so the keystream is entered there."""
    vector = np.frombuffer(_hex(case, "plaintext"), dtype="<u4").copy()
    stream = np.zeros(len(vector), dtype="<u4")
    masks.add_keystream(stream, int(case["counter"], 16), [(Secret(_hex(case, "key")), masks.ADD)])
    _same("ciphertext", (vector ^ stream).tobytes(), _hex(case, "ciphertext"))


def _mask(case: Case) -> None:
    bits, words = case["ring_bits"], case["words"]
    vector = np.zeros(words, dtype=masks.ring_dtype(bits))
    masks.apply_masks(vector, [(Secret(bytes.fromhex(seed)), sign) for seed, sign in case["masks"]])
    _same("first words", vector[:8].tolist(), case["first"])
    _same("last words", vector[-8:].tolist(), case["last"])
    _same("all words", transcript.digest(b"vector", vector.tobytes()).hex(), case["digest"])


def _split(case: Case) -> None:
    secret = shamir.element(_hex(case, "secret"))
    shares = shamir.split(secret, case["threshold"], case["holders"], replay(case["random"]))
    _same("shares", [shamir.element_bytes(share).hex() for share in shares], case["shares"])
    chosen = shares[-case["threshold"] :]
    weights = shamir.coefficients(case["holders"][-case["threshold"] :])
    _same("secret", shamir.combine(weights, chosen), secret)


def _rebuild(case: Case) -> None:
    secret = shamir.element(_hex(case, "secret"))
    shares = [shamir.element(bytes.fromhex(share)) for share in case["shares"]]
    pool = shamir.ShareSet(case["holders"], case["threshold"], replay(case["random"]))
    found = pool.rebuild(shares, lambda value: value == secret)
    _refused(case, found is None)
    if found is not None:
        _same("wrong shares", list(found.wrong), case["wrong"])
        _same("certainty", found.certain, case["certain"])


def _encode(case: Case) -> None:
    codec = codec_of(case)
    vector = codec.encode(
        floats(case["update"]), case["weight"], replay(case["random"]), dict(case["reported"])
    )
    _same("vector", vector.tolist(), case["vector"])


def _decode_sum(case: Case) -> None:
    codec = codec_of(case)
    total: masks.Ring = np.asarray(case["vector"], dtype=masks.ring_dtype(codec.ring_bits))  # type: ignore[assignment]
    decoded = codec.decode_sum(total, case["sites"])
    _same("mean", decoded.mean.astype("<f8").tobytes().hex(), case["mean"])
    _same("weight", decoded.weight, case["weight"])
    _same("counts", dict(decoded.counts), dict(case["reported"]))


def _degree(case: Case) -> None:
    rule = GraphRule(dropout=Fraction(case["dropout"]))
    found = graph.regular_parameters(case["n"], case["min_cohort"], case["c_max"], rule)
    _same("degree and threshold", None if found is None else list(found), case["parameters"])
    _same("t", graph.threshold(case["n"], Fraction(1, 3)), case["t"])


def _ring(case: Case) -> None:
    members: Sequence[int] = case["members"]
    rule = GraphRule(complete_up_to=4, secrecy_bits=case["secrecy_bits"], abort_bits=case["abort_bits"])
    made = graph.build_graph(
        members,
        _hex(case, "h1"),
        t=graph.threshold(len(members), Fraction(1, 3)),
        min_cohort=case["min_cohort"],
        c_max=case["c_max"],
        rule=rule,
    )
    _same("ring", list(made.ring), case["ring"])
    _same("degree", [made.degree, made.share_threshold], case["parameters"])
    _same("neighbours", list(made.neighbours(members[0])), case["neighbours_of_first"])


def _session(case: Case) -> None:
    roster = {site: bytes.fromhex(key) for site, key in case["roster"]}
    sid = transcript.session_id(
        run=_hex(case, "run"),
        round_number=case["round"],
        attempt=case["attempt"],
        roster=transcript.roster_hash(roster),
        policy=_hex(case, "policy"),
        cohort=case["cohort"],
        context=transcript.context_hash(_hex(case, "adapter"), _hex(case, "config")),
    )
    _same("sid", sid.hex(), case["sid"])
    h1 = transcript.u1_hash(sid, [bytes.fromhex(entry) for entry in case["advertisements"]])
    _same("h1", h1.hex(), case["h1"])
    one, other, s, b = case["one"], case["other"], Secret(_hex(case, "s")), Secret(_hex(case, "b"))
    found = {
        "commitment": transcript.commitment(sid, one, b),
        "advertised": transcript.advertisement_digest(sid, one, bytes(32), bytes([1] * 32), bytes([2] * 32)),
        "ring_position": transcript.ring_position(h1, one),
        "consist": transcript.consist_digest(sid, h1, case["cohort"], case["cohort"][1:], one),
        "share_aad": transcript.share_aad(sid, h1, one, other),
        "mask_key": derivation.mask_key(s, sid).public,
        "self_seed": derivation.self_seed(b, sid).reveal(),
        "pair_seed": derivation.pair_seed(
            derivation.mask_key(s, sid), derivation.mask_key(b, sid).public, sid, h1, one, other
        ).reveal(),
        "share_key": derivation.share_key(s, sid, h1, one, other).reveal(),
    }
    for name, value in found.items():
        _same(name, value.hex(), case[name])


def _message(case: Case) -> None:
    kind = messages.MESSAGES[case["kind"]]
    data = _hex(case, "encoded")
    _same("encoding", kind.decode(data).encode(), data)


_CHECKS: dict[str, Callable[[Case], None]] = {
    "x25519": _x25519,
    "x25519-point": _point,
    "ed25519": _ed25519,
    "hkdf-sha256": _hkdf,
    "aes-256-gcm": _gcm,
    "seal-once": _seal_once,
    "aes-256-ctr": _ctr,
    "mask": _mask,
    "shamir-split": _split,
    "shamir-rebuild": _rebuild,
    "encode": _encode,
    "decode-sum": _decode_sum,
    "graph-degree": _degree,
    "graph-ring": _ring,
    "session": _session,
    "message": _message,
}
