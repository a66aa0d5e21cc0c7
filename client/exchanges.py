"""The five exchanges at the site: which policy, which update, which state; client/secagg.py does the rest."""

from __future__ import annotations

from client.secagg import SecAggClient
from client.secagg_state import Journal, Update
from client.secagg_state import Site as Member
from client.site import Pinned, Site
from client.store import WaitingUpdate, drop_waiting, load_waiting, save_waiting
from common import wire
from common.aggregation import policy_of
from common.errors import ConfigError, ProtocolError
from common.secagg.errors import Blame
from common.secagg.framing import Framed
from common.secagg.masks import Ring
from common.secagg.messages import (
    AdvertiseRequest,
    ConsistRequest,
    MaskRequest,
    ShareRequest,
    UnmaskRequest,
    encoded_limit,
)

_REQUESTS: tuple[type[Framed], ...] = (
    AdvertiseRequest,
    ShareRequest,
    MaskRequest,
    ConsistRequest,
    UnmaskRequest,
)


def answer(site: Site, request: wire.Message) -> wire.Message:
    """The reply to one of the five requests.

    Raises:
        ProtocolError: with the number of the check that failed; the session is closed then.
    """
    pinned = _pinned(site)
    with pinned.store.lock():
        match request:
            case AdvertiseRequest():
                waiting = _waiting(site, pinned)
                if waiting is None or waiting.round != request.round:
                    raise ProtocolError(f"no update waits for round {request.round}: train first")
                session = _session(site, pinned, request.round)
                if waiting.policy_hash != session.site.policy.hash:
                    raise ProtocolError("the update that waits was encoded for another policy: train again")
                return session.advertise(request, waiting.context)
            case ShareRequest():
                return _session(site, pinned).share(request)
            case MaskRequest():
                session = _session(site, pinned)
                waiting = _waiting(site, pinned)
                if waiting is None:
                    raise ProtocolError("no update waits for its upload")
                reply = session.mask(request, Update(waiting.number, waiting.vector))
                drop_waiting(site.waiting)
                return reply
            case ConsistRequest():
                return _session(site, pinned).consist(request)
            case UnmaskRequest():
                return _session(site, pinned).unmask(request)
            case _:
                raise ProtocolError(f"no exchange begins with {type(request).__name__}")


def waits(site: Site, round_number: int, context: bytes) -> bool:
    """Whether the update for this round and context is there and was never uploaded."""
    pinned = _pinned(site)
    with pinned.store.lock():
        found = _waiting(site, pinned)
        session = _session(site, pinned, round_number)
        asked = (round_number, context, session.site.policy.hash)
        return (
            found is not None
            and (found.round, found.context, found.policy_hash) == asked
            and found.number > session.consumed
        )


def keep(site: Site, round_number: int, context: bytes, vector: Ring) -> None:
    """Let `vector` wait, under a number above every one that was uploaded.

    An open session is closed first: it was opened for the update that waited before, with its context.
    """
    pinned = _pinned(site)
    with pinned.store.lock():
        session = _session(site, pinned, round_number)
        session.abort()
        policy = session.site.policy
        update = WaitingUpdate(round_number, session.consumed + 1, context, policy.hash, vector)
        save_waiting(site.waiting, pinned.local_key, update, pinned.random_bytes)


def longest_request(site: Site) -> int:
    """Bytes of the longest secure-aggregation request that this site can be sent."""
    sites = max(site.config.sites.count, 1)
    return max(encoded_limit(kind, sites, 0, 32) for kind in _REQUESTS)


def _pinned(site: Site) -> Pinned:
    if site.pinned is None:
        raise ConfigError("this site takes part in a study without secure aggregation")
    return site.pinned


def _waiting(site: Site, pinned: Pinned) -> WaitingUpdate | None:
    return load_waiting(site.waiting, pinned.local_key)


def _session(site: Site, pinned: Pinned, round_number: int | None = None) -> SecAggClient:
    """The state machine over the site's store, with the policy of `round_number` or of the open session."""
    if round_number is None:
        data = pinned.store.load()
        mark = None if data is None else Journal.decode(data).mark
        if mark is None:
            raise ProtocolError("no session is open: ADVERTISE comes first")
        round_number = mark[0]

    def log(blame: Blame) -> None:
        site.log(f"site {blame.site} did not follow the protocol: {blame}")

    policy = policy_of(site.config, site.model, site.plan.round(round_number))
    member = Member(site.site_id, pinned.identity, pinned.roster, policy, site.run_id.encode())
    return SecAggClient(member, pinned.store, pinned.random_bytes, witness=pinned.store.witness, blame=log)
