"""What the parties agree on, as hashes: the session id, h1, and everything that is signed or bound.

Every hash is SHA-256 over length-prefixed fields behind a domain and a label, so no field can be
moved into another and no hash stands for two things. Ids are little-endian u32, id lists strictly
ascending. All of it is public but the commitment's secret.
"""

from __future__ import annotations

import hashlib
import itertools
import struct
from collections.abc import Iterable, Mapping, Sequence

from common.secagg.keys import Secret

DOMAIN = b"confide/secagg/1"
HASH_BYTES = 32
MAX_ID = 2**32 - 1

LABEL_ROSTER = b"roster"
LABEL_CONTEXT = b"context"
LABEL_SESSION = b"session"
LABEL_ADVERTISE = b"advertise"
LABEL_COMMIT = b"commit"
LABEL_U1 = b"U1"
LABEL_PERM = b"perm"
LABEL_CONSIST = b"consist"

_INFO_SHARE = DOMAIN + b" share"
_INFO_PAIR = DOMAIN + b" pair"
INFO_MASK_KEY = DOMAIN + b" mask key"
INFO_SELF_MASK = DOMAIN + b" self mask"


def digest(label: bytes, *fields: bytes | memoryview) -> bytes:
    """SHA-256 of domain, label and fields, each behind its length as little-endian u64.

    A sequence of length-prefixed strings is read back in one way only, so two different calls never
    hash the same bytes.
    """
    state = hashlib.sha256()
    for field in (DOMAIN, label, *fields):
        view = memoryview(field).cast("B")
        state.update(len(view).to_bytes(8, "little"))
        state.update(view)
    return state.digest()


def id_bytes(site: int) -> bytes:
    """An id as little-endian u32. Raises ValueError outside 1 … 2^32 − 1."""
    if not 1 <= site <= MAX_ID:
        raise ValueError(f"a site id must be in 1 .. {MAX_ID}, found {site}")
    return site.to_bytes(4, "little")


def id_list_bytes(sites: Sequence[int]) -> bytes:
    """Ids one after the other, each as `id_bytes`."""
    try:
        packed = struct.pack(f"<{len(sites)}I", *sites)
    except struct.error:
        packed = b""
    if sites and (not packed or min(sites) < 1):
        raise ValueError(f"site ids must be in 1 .. {MAX_ID}")
    return packed


def is_ascending(sites: Sequence[int]) -> bool:
    """Strictly: so the list has no duplicates either."""
    return all(left < right for left, right in itertools.pairwise(sites))


# Exchange 0


def roster_hash(roster: Mapping[int, bytes]) -> bytes:
    """H(roster): each id with its Ed25519 public key, in id order."""
    entries = (part for site in sorted(roster) for part in (id_bytes(site), roster[site]))
    return digest(LABEL_ROSTER, *entries)


def context_hash(global_adapter: bytes | memoryview, training_config: bytes) -> bytes:
    """ctx_hash = H(global adapter bytes, training config).

    It goes into the session id, so sites that were sent different models are in different sessions
    and never sum together (Pasquini, Francati, Ateniese 2022, "Eluding secure aggregation").
    """
    return digest(LABEL_CONTEXT, global_adapter, training_config)


def session_id(
    *,
    run: bytes,
    round_number: int,
    attempt: int,
    roster: bytes,
    policy: bytes,
    cohort: Sequence[int],
    context: bytes,
) -> bytes:
    """sid = H("session", run_id, round, attempt, H(roster), H(policy), U0, ctx_hash)."""
    return digest(
        LABEL_SESSION,
        run,
        round_number.to_bytes(4, "little"),
        attempt.to_bytes(4, "little"),
        roster,
        policy,
        id_list_bytes(cohort),
        context,
    )


def commitment(sid: bytes, site: int, b: Secret) -> bytes:
    """commit(b) = H("commit", sid, id, b). Hiding because b is uniform over 2^255 values."""
    return digest(LABEL_COMMIT, sid, id_bytes(site), b.reveal())


def advertisement_digest(sid: bytes, site: int, c: bytes, s: bytes, commit: bytes) -> bytes:
    """What an advertisement's signature is over."""
    return digest(LABEL_ADVERTISE, sid, id_bytes(site), c, s, commit)


# Exchange 1


def u1_hash(sid: bytes, advertisements: Iterable[bytes]) -> bytes:
    """h1 = H("U1", sid, all advertisements of U1 in id order), each as it was encoded."""
    return digest(LABEL_U1, sid, *advertisements)


def ring_position(h1: bytes, site: int) -> bytes:
    """H("perm", h1, id): the site's place in the order that the k-regular graph is laid on."""
    return digest(LABEL_PERM, h1, id_bytes(site))


def share_info(h1: bytes, sender: int, receiver: int) -> bytes:
    """HKDF info of key_ij. Directional: i to j and j to i have different keys."""
    return _INFO_SHARE + h1 + id_bytes(sender) + id_bytes(receiver)


def share_aad(sid: bytes, h1: bytes, sender: int, receiver: int) -> bytes:
    """AAD of a sealed share: sid ‖ h1 ‖ i ‖ j. Fixed widths, so no prefixes are needed."""
    return sid + h1 + id_bytes(sender) + id_bytes(receiver)


def pair_info(h1: bytes, one: int, other: int) -> bytes:
    """HKDF info of the pair seed: "pair" ‖ h1 ‖ min ‖ max, the same for both sites."""
    return _INFO_PAIR + h1 + id_bytes(min(one, other)) + id_bytes(max(one, other))


# Exchange 3


def consist_digest(sid: bytes, h1: bytes, u2: Sequence[int], u3: Sequence[int], site: int) -> bytes:
    """What `site` signs once in a session: (sid, h1, U2, U3, me)."""
    return digest(LABEL_CONSIST, sid, h1, id_list_bytes(u2), id_list_bytes(u3), id_bytes(site))
