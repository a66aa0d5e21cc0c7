"""The five exchanges at the site: which policy, which update, which state; client/secagg.py does the rest."""

from __future__ import annotations

import numpy as np

from client.secagg import SecAggClient
from client.secagg_state import Journal, Update
from client.secagg_state import Site as Member
from client.site import Pinned, Site
from client.store import WaitingUpdate, drop_waiting, load_waiting, save_waiting
from common import wire
from common.aggregation import policy_of
from common.errors import ConfigError, ProtocolError
from common.secagg.errors import Blame, Exchange
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

_REQUESTS: dict[Exchange, type[Framed]] = {
    Exchange.ADVERTISE: AdvertiseRequest,
    Exchange.SHARE: ShareRequest,
    Exchange.MASK: MaskRequest,
    Exchange.CONSIST: ConsistRequest,
    Exchange.UNMASK: UnmaskRequest,
}
# Stand in for an update where none waits, so that the checks before 0.9 and 2.7 still come first.
_NO_CONTEXT = b""
_NO_UPDATE = Update(0, np.empty(0, dtype="<u4"))


def answer(site: Site, exchange: Exchange, request: wire.Message) -> wire.Message:
    """The reply to the request of `exchange`.

    Raises:
        ProtocolError: with the number of the check that failed. Whatever is raised, `close` comes next.
    """
    if type(request) is not _REQUESTS[exchange]:
        raise ProtocolError(f"{exchange.name} does not begin with {type(request).__name__}")
    pinned = _pinned(site)
    with pinned.store.lock():
        match request:
            case AdvertiseRequest():
                session = _session(site, pinned, request.round)
                found = _waiting(site, pinned)
                asked = (request.round, session.site.policy.hash)
                # One that a crash has left, used up, would open a session only to fail at MASK.
                if (
                    found is None
                    or (found.round, found.policy_hash) != asked
                    or found.number <= session.consumed
                ):
                    return session.advertise(request, _NO_CONTEXT)
                return session.advertise(request, found.context)
            case ShareRequest():
                return _session(site, pinned).share(request)
            case MaskRequest():
                session = _session(site, pinned)
                found = _waiting(site, pinned)
                update = _NO_UPDATE if found is None else Update(found.number, found.vector)
                reply = session.mask(request, update)
                drop_waiting(site.waiting)
                return reply
            case ConsistRequest():
                return _session(site, pinned).consist(request)
            case UnmaskRequest():
                return _session(site, pinned).unmask(request)
            case _:
                raise ProtocolError(f"no exchange begins with {type(request).__name__}")


def close(site: Site) -> None:
    """After anything that went wrong in an exchange, even bytes that are no message: no session stays open,
    and no secret of one."""
    pinned = _pinned(site)
    with pinned.store.lock():
        if _open_round(pinned) is not None:
            _session(site, pinned).abort()


def waits(site: Site, round_number: int, context: bytes) -> bool:
    """Whether the update for this round and context is there and was never uploaded.

    Raises:
        RollbackError, PolicyError: this site could not take part in the sum, so it need not train.
    """
    pinned = _pinned(site)
    with pinned.store.lock():
        session = _session(site, pinned, round_number)
        consumed = session.consumed  # in any case: this is where an old state is noticed
        found = _waiting(site, pinned)
        asked = (round_number, context, session.site.policy.hash)
        return (
            found is not None
            and (found.round, found.context, found.policy_hash) == asked
            and found.number > consumed
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
    return max(encoded_limit(kind, sites, 0, 32) for kind in _REQUESTS.values())


def _pinned(site: Site) -> Pinned:
    if site.pinned is None:
        raise ConfigError("this site takes part in a study without secure aggregation")
    return site.pinned


def _waiting(site: Site, pinned: Pinned) -> WaitingUpdate | None:
    return load_waiting(site.waiting, pinned.local_key)


def _session(site: Site, pinned: Pinned, round_number: int | None = None) -> SecAggClient:
    """The state machine over the site's store, with the policy of `round_number` or of the open session."""
    if round_number is None:
        round_number = _open_round(pinned)
        if round_number is None:
            raise ProtocolError("no session is open: ADVERTISE comes first")

    def log(blame: Blame) -> None:
        site.log(f"site {blame.site} did not follow the protocol: {blame}")

    policy = policy_of(site.config, site.model, site.plan.round(round_number))
    member = Member(site.site_id, pinned.identity, pinned.roster, policy, site.run_id.encode())
    return SecAggClient(member, pinned.store, pinned.random_bytes, witness=pinned.store.witness, blame=log)


def _open_round(pinned: Pinned) -> int | None:
    """The round of the newest session, open or closed; None if there was none yet."""
    data = pinned.store.load()
    mark = None if data is None else Journal.decode(data).mark
    return None if mark is None else mark[0]
