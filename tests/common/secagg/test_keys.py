"""Keys, secrets and sealing. Known answers are in test_vectors.py."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.secagg import keys
from common.secagg.keys import FIELD_PRIME, EphemeralKey, IdentityKey, Secret
from tests.secagg_world import Stream

P = FIELD_PRIME


def low_order_points() -> list[int]:
    """Computed here, not copied: u-coordinates of points whose eightfold is the neutral element."""
    # x-only doubling on y² = x³ + 486662x² + x: u → (u² − 1)² / 4u(u² + 486662u + 1)
    found = {0, 1, P - 1}  # order 2 (v = 0), and the u with u² = 1, which double to 0
    # order 8: they double to 1 (curve): (u² − 1)² = 4u(u² + Au + 1), as a quartic over GF(P) it factors
    # into (u² − 2u − 1 ± …); solved by the square roots of A + 2
    a = 486662
    root = pow(a + 2, (P + 3) // 8, P)
    if root * root % P != (a + 2) % P:
        root = root * pow(2, (P - 1) // 4, P) % P
    for sign in (root, P - root):  # u² − 2(1 ± √(A+2))u + 1 = 0
        half = (1 + sign) % P
        square = (half * half - 1) % P
        sqrt = pow(square, (P + 3) // 8, P)
        if sqrt * sqrt % P != square:
            sqrt = sqrt * pow(2, (P - 1) // 4, P) % P
        if sqrt * sqrt % P == square:
            found |= {(half + sqrt) % P, (half - sqrt) % P}
    return sorted(found)


def test_the_list_of_low_order_points_is_complete() -> None:
    assert low_order_points() == sorted(keys._LOW_ORDER)


@pytest.mark.parametrize("u", low_order_points())
@pytest.mark.parametrize("form", ["as is", "top bit", "plus P"])
def test_low_order_points_are_refused_in_every_encoding(u: int, form: str) -> None:
    encoded = u + {"as is": 0, "top bit": 2**255, "plus P": P}[form]
    if form == "plus P" and encoded >= 2**255:
        pytest.skip("has no such encoding")
    public = encoded.to_bytes(32, "little")
    assert keys.is_low_order_point(public)
    assert keys.is_canonical_point(public) == (form == "as is")
    with pytest.raises(ValueError):
        EphemeralKey(Secret(bytes(range(32)))).agree(public)


@given(st.binary(min_size=32, max_size=32))
def test_other_points_are_not(scalar: bytes) -> None:
    public = EphemeralKey(Secret(scalar)).public
    assert keys.is_canonical_point(public) and not keys.is_low_order_point(public)


def test_agreement_is_the_same_on_both_sides() -> None:
    random = Stream(1)
    one, other = (EphemeralKey(Secret(random(32))) for _ in range(2))
    assert one.agree(other.public) == other.agree(one.public)


def test_a_secret_never_shows(caplog: pytest.LogCaptureFixture) -> None:
    value = b"\x11\x22\x33tell nobody"
    secret = Secret(value)
    with caplog.at_level(logging.INFO):
        logging.info("%s %r %s", secret, secret, [secret])
    shown = f"{secret} {secret!r} {caplog.text} { ({'k': secret})!r}"
    assert "nobody" not in shown and value.hex() not in shown and "Secret(14 bytes)" in shown
    for copier in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            copier(secret)
    with pytest.raises(TypeError):
        hash(secret)


def test_secrets_compare() -> None:
    assert Secret(b"a") == Secret(b"a")
    assert Secret(b"a") != Secret(b"b")
    assert Secret(b"a") != b"a"


def test_identity_repr_has_only_the_public_half() -> None:
    identity = IdentityKey(Secret(bytes(range(32))))
    assert repr(identity) == f"IdentityKey(public={identity.public.hex()})"
    assert bytes(range(32)).hex() not in repr(EphemeralKey(Secret(bytes(range(32)))))


@pytest.mark.parametrize("field", ["public", "message", "signature"])
def test_a_signature_stands_for_key_and_message(field: str) -> None:
    identity = IdentityKey.generate(Stream(2))
    parts = {"public": identity.public, "message": b"hello", "signature": identity.sign(b"hello")}
    assert keys.verify(**parts)
    for place in range(len(parts[field])):
        spoiled = bytearray(parts[field])
        spoiled[place] ^= 0x10
        assert not keys.verify(**(parts | {field: bytes(spoiled)}))
    assert not keys.verify(**(parts | {field: parts[field][:-1]}))
    assert not keys.verify(**(parts | {field: parts[field] + b"\0"}))


def test_a_signature_cannot_be_altered_into_another() -> None:
    """S + L would verify where an implementation forgets RFC 8032's range check."""
    order = 2**252 + 27742317777372353535851937790883648493
    identity = IdentityKey.generate(Stream(3))
    signature = identity.sign(b"m")
    s = int.from_bytes(signature[32:], "little") + order
    assert not keys.verify(identity.public, b"m", signature[:32] + s.to_bytes(32, "little"))


def test_hkdf_separates_by_salt_and_info() -> None:
    secret = Secret(b"x" * 32)
    outputs = [keys.hkdf(secret, salt, info).reveal() for salt in (b"1", b"2") for info in (b"a", b"b")]
    assert len(set(outputs)) == 4


def test_sealed_shares_open_only_as_sealed() -> None:
    random = Stream(4)
    key, aad = Secret(random(32)), random(72)
    sealed = keys.seal_once(key, Secret(b"s" * 64), aad)
    assert keys.open_once(key, sealed, aad) == Secret(b"s" * 64)
    for place in range(len(sealed)):
        spoiled = bytearray(sealed)
        spoiled[place] ^= 1
        assert keys.open_once(key, bytes(spoiled), aad) is None
    for length in range(len(sealed)):
        assert keys.open_once(key, sealed[:length], aad) is None


def test_records_at_rest_open_only_as_sealed_and_have_fresh_nonces() -> None:
    random = Stream(5)
    key = Secret(random(32))
    one, other = (keys.seal_at_rest(key, b"state", b"site 3", random) for _ in range(2))
    assert one != other
    assert keys.open_at_rest(key, one, b"site 3") == b"state"
    assert keys.open_at_rest(key, one, b"site 4") is None
    for length in range(len(one)):
        assert keys.open_at_rest(key, one[:length], b"site 3") is None
