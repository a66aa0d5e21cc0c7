"""What a session's secrets become: mask keys, seeds and sealing keys, the same on both sides."""

from __future__ import annotations

from common.secagg import keys, masks, transcript
from common.secagg.keys import EphemeralKey, Secret
from common.secagg.messages import Advertisement
from common.secagg.policy import Roster


def mask_key(s: Secret, sid: bytes) -> EphemeralKey:
    """X25519(HKDF(s, salt sid)): the key that pair seeds are agreed with. s: 32-byte field element."""
    return EphemeralKey(keys.hkdf(s, sid, transcript.INFO_MASK_KEY))


def self_seed(b: Secret, sid: bytes) -> Secret:
    """HKDF(b, salt sid): the seed of a site's own mask. b: 32-byte field element."""
    return keys.hkdf(b, sid, transcript.INFO_SELF_MASK)


def pair_seed(key: EphemeralKey, peer: bytes, sid: bytes, h1: bytes, one: int, other: int) -> Secret:
    """HKDF(X25519(s_i, s_j), salt sid, info "pair" ‖ h1 ‖ min ‖ max). `key` is one's, `peer` other's.

    Raises:
        ValueError: `peer` has low order.
    """
    return keys.hkdf(key.agree(peer), sid, transcript.pair_info(h1, one, other))


def pair_sign(site: int, peer: int) -> int:
    """sign(site − peer): of a pair one adds the mask and the other takes it away, so the sum has none."""
    return masks.ADD if site > peer else masks.SUBTRACT


def share_key(agreed: Secret, sid: bytes, h1: bytes, sender: int, receiver: int) -> Secret:
    """key_ij = HKDF(X25519(c_i, c_j), salt sid, info "share" ‖ h1 ‖ i ‖ j): seals one message, i's to j."""
    return keys.hkdf(agreed, sid, transcript.share_info(h1, sender, receiver))


def is_signed(entry: Advertisement, sid: bytes, roster: Roster) -> bool:
    """Whether an advertisement is signed for this session by the key that the roster has for its id."""
    digest = transcript.advertisement_digest(sid, entry.site, entry.c, entry.s, entry.commitment)
    return entry.site in roster and keys.verify(roster[entry.site], digest, entry.signature)
