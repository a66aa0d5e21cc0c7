"""Hashes: nothing that is agreed on can change without the hash changing."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.secagg import transcript
from common.secagg.keys import Secret

SESSION = {
    "run": b"run",
    "round_number": 1,
    "attempt": 2,
    "roster": bytes(32),
    "policy": bytes(32),
    "cohort": (1, 2, 3),
    "context": bytes(32),
}


@pytest.mark.parametrize(
    "change",
    [
        {"run": b"ruN"},
        {"round_number": 2},
        {"attempt": 3},
        {"round_number": 2, "attempt": 1},
        {"roster": bytes(31) + b"\1"},
        {"policy": bytes(31) + b"\1"},
        {"cohort": (1, 2)},
        {"cohort": (1, 2, 4)},
        {"context": bytes(31) + b"\1"},
    ],
)
def test_every_part_of_the_session_is_in_its_id(change: dict[str, object]) -> None:
    assert transcript.session_id(**SESSION) != transcript.session_id(**(SESSION | change))


@given(st.lists(st.binary(max_size=5), max_size=4), st.lists(st.binary(max_size=5), max_size=4))
def test_different_fields_never_hash_the_same_bytes(left: list[bytes], right: list[bytes]) -> None:
    assert (transcript.digest(b"x", *left) == transcript.digest(b"x", *right)) == (left == right)


def test_labels_and_domain_separate() -> None:
    labels = [value for name, value in vars(transcript).items() if name.startswith("LABEL_")]
    assert len(labels) == len(set(labels)) == 8
    assert transcript.digest(b"a", b"b") != transcript.digest(b"b", b"b")
    assert transcript.digest(b"a") != hashlib.sha256(b"a").digest()


def test_the_digest_written_out() -> None:
    fields = (transcript.DOMAIN, b"label", b"one", b"")
    plain = b"".join(len(field).to_bytes(8, "little") + field for field in fields)
    assert transcript.digest(b"label", b"one", b"") == hashlib.sha256(plain).digest()


@given(st.lists(st.integers(1, 2**32 - 1), max_size=6))
def test_ascending_means_strictly(sites: list[int]) -> None:
    assert transcript.is_ascending(sites) == (sites == sorted(set(sites)))


@pytest.mark.parametrize("site", [0, -1, 2**32])
def test_ids_outside_u32_are_refused(site: int) -> None:
    with pytest.raises(ValueError):
        transcript.id_bytes(site)


def test_directions_and_pairs() -> None:
    h1 = bytes(32)
    assert transcript.share_info(h1, 1, 2) != transcript.share_info(h1, 2, 1)
    assert transcript.share_aad(h1, h1, 1, 2) != transcript.share_aad(h1, h1, 2, 1)
    assert transcript.pair_info(h1, 1, 2) == transcript.pair_info(h1, 2, 1)
    infos = {transcript.pair_info(h1, 1, 2), transcript.share_info(h1, 1, 2), transcript.INFO_MASK_KEY}
    assert len(infos | {transcript.INFO_SELF_MASK}) == 4


def test_signed_sets_cannot_trade_members() -> None:
    one = transcript.consist_digest(bytes(32), bytes(32), (1, 2, 3), (1, 2), 1)
    assert one != transcript.consist_digest(bytes(32), bytes(32), (1, 2), (3, 1, 2), 1)
    assert one != transcript.consist_digest(bytes(32), bytes(32), (1, 2, 3), (1, 2), 2)


def test_roster_order_does_not_matter_but_keys_do() -> None:
    keys = {2: bytes(32), 1: bytes([1] * 32)}
    assert transcript.roster_hash(keys) == transcript.roster_hash(dict(sorted(keys.items())))
    assert transcript.roster_hash(keys) != transcript.roster_hash({1: bytes(32), 2: bytes([1] * 32)})


def test_a_commitment_binds_session_site_and_secret() -> None:
    values = {
        transcript.commitment(sid, site, Secret(b))
        for sid in (bytes(32), bytes([1] * 32))
        for site in (1, 2)
        for b in (bytes(32), bytes([1] * 32))
    }
    assert len(values) == 8
