"""The client: one small handler per exchange. What fails becomes a fixed code; the text stays here."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import traceback
from collections.abc import Callable, Iterator

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client import exchanges
from client.metrics import measure
from client.policy_check import Asked, check
from client.site import Site
from client.training import check_shard, train
from common import wire
from common.adapter import Layout, check_vector
from common.aggregation import context_of, policy_of
from common.errors import (
    ChargedError,
    ConfideError,
    ConfigError,
    OtherRosterError,
    ProtocolError,
    status_of,
)
from common.ledger import Charge
from common.ledger_errors import LedgerStorageError, RolledBackError, WitnessError
from common.ledger_replay import Reservation, State
from common.noise import NoiseStream
from common.plan import RoundPlan
from common.secagg.errors import Exchange
from common.secagg.transcript import roster_hash


def make_app(open_site: Callable[[Context], Site]) -> ClientApp:
    """The Flower app of the site that `open_site` finds for a node."""
    app = ClientApp()

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        return _answer(message, context, open_site, _hello)

    @app.train()
    def on_train(message: Message, context: Context) -> Message:
        return _answer(message, context, open_site, _train)

    def on(exchange: Exchange) -> Callable[[Message, Context], Message]:
        def handle(site: Site, request: wire.Message) -> wire.Message:
            return exchanges.answer(site, exchange, request)

        return lambda message, context: _answer(message, context, open_site, handle, exchanges.close)

    for exchange in Exchange:
        app.query(exchange.name.lower())(on(exchange))
    return app


def _answer(
    message: Message,
    context: Context,
    open_site: Callable[[Context], Site],
    handle: Callable[[Site, wire.Message], wire.Message],
    close: Callable[[Site], None] = lambda _: None,
) -> Message:
    """Decode, handle, encode. An exception's text could carry data, and Flower would send it verbatim.

    close: what follows a failure, of whatever kind.
    """
    site: Site | None = None
    try:
        site = open_site(context)
        request = wire.decode(message.content, exchanges.longest_request(site))
        return Message(wire.encode(handle(site, request), _head(site)), reply_to=message)
    except Exception as error:
        text = str(error) if isinstance(error, ConfideError) else traceback.format_exc()
        with contextlib.suppress(Exception):  # a log that cannot be written must not speak either
            if site is None:
                logging.getLogger("confide.site").error("a site cannot be opened: %s", text)
            else:
                site.log(text)
        with contextlib.suppress(Exception):  # a state that is not this site's is left as it is
            if site is not None:
                close(site)
        head = b""
        with contextlib.suppress(Exception):
            head = _head(site) if site is not None else b""
        refusal = wire.Refusal(site.site_id if site else 0, status_of(error))
        return Message(wire.encode(refusal, head), reply_to=message)


def _head(site: Site) -> bytes:
    """The signed head of the site's ledger: who keeps it notices a ledger that forgets."""
    return b"" if site.ledger is None else site.ledger.head().encode()


def _hello(site: Site, request: wire.Message) -> wire.Message:
    if not isinstance(request, wire.Hello):
        raise ProtocolError(f"expected a hello, found {type(request).__name__}")
    if site.pinned is not None and request.roster != roster_hash(site.pinned.roster):
        # Said before anything is trained and charged: a sum of sites with different rosters is refused.
        raise OtherRosterError(
            "the server works with another roster than the one that is pinned here: take a newer kit with "
            "confide client join, or, where this site has it already, wait for the server"
        )
    return wire.Hello(site.site_id)


def _train(site: Site, request: wire.Message) -> wire.Message:
    """Check, ask the site's policy, charge, train, keep, say "ready": in this order."""
    if not isinstance(request, wire.TrainRequest):
        raise ProtocolError(f"expected a train request, found {type(request).__name__}")
    # 1. The server may name a round of the plan that this site holds, and nothing else. Refusals come before
    #    the charge, so that they cost nothing.
    if request.run_id != site.run_id:
        raise ProtocolError("the server asks in the name of another run than the one this site has joined")
    if request.plan_digest != site.plan_digest:
        raise ConfigError("the server follows another plan than this site: compare the two configurations")
    if request.layout_digest != site.model.layout.digest:
        raise ProtocolError("the server's adapter has another layout than this site's model")
    plan = site.plan.round(request.round)
    check_vector(site.model.layout, request.vector)
    _check_policy(site, request.round)
    check_shard(site.shard, plan)
    session = context_of(site.run_id, request.vector, site.plan_digest, request.layout_digest, request.round)
    # 2. An update that waits for this very question and was never uploaded is the answer to it: nothing is
    #    computed, so nothing is charged.
    if site.pinned is not None and exchanges.waits(site, request.round, session):
        return wire.Ready(site.site_id, request.round)
    # 3. Charge before anything is computed. The context pins all that the output depends on.
    context = hashlib.sha256(
        b"".join(
            len(part).to_bytes(4, "little") + part
            for part in (
                b"confide/context/v2",
                request.run_id.encode(),
                request.round.to_bytes(4, "little"),
                site.plan_digest.encode(),
                site.setting,
                site.shard.digest,
                request.vector.tobytes(),
            )
        )
    ).digest()
    reservation = None
    if site.ledger is not None:
        charge = Charge(
            scope=site.scope,
            run=request.run_id,
            round=request.round,
            context=context.hex(),
            model=request.layout_digest,
            plan=site.plan_digest,
            events=plan.events,
        )
        reservation = site.ledger.reserve(charge, repeatable=site.repeatable_noise, once=True)
    with _charged():
        return _compute(site, request, plan, session, context, reservation)


@contextlib.contextmanager
def _charged() -> Iterator[None]:
    """Inside, the round counts as charged: who keeps account of it must not be told of a refusal that costs
    nothing. An update may not be finite; the ledger's disk may be full when the charge is written."""
    try:
        yield
    except (ProtocolError, ConfigError, LedgerStorageError, WitnessError, RolledBackError) as error:
        raise ChargedError(f"after the charge: {error}") from error


def _compute(
    site: Site,
    request: wire.TrainRequest,
    plan: RoundPlan,
    session: bytes,
    context: bytes,
    reservation: Reservation | None,
) -> wire.Message:
    """Make the charge, train, keep the update, say "ready"."""
    if site.ledger is not None and reservation is not None:
        reservation = site.ledger.start(reservation.id)
    # 4. Train, and measure where the federation has metrics on.
    noise = NoiseStream(site.noise_key(context))
    vector = train(site.model, site.shard, plan, request.vector, noise, site.features)
    if site.pinned is None:
        _complete(site, reservation, vector.tobytes())
        digest = Layout.of(site.model.active(plan.part)).digest
        return wire.PlainUpdate(site.site_id, request.round, digest, vector)
    counts = measure(site.model, site.config, plan, site.shard, request.vector, noise, site.features)
    # 5. The update waits here until it is masked. Its weight is one for every site: gradients are already
    #    normalised by one public batch size, so a site with more records weighs more without telling.
    policy = policy_of(site.config, site.model, plan)
    encoded = policy.codec.encode(vector, 1, noise.random_bytes, counts)
    if reservation is not None and reservation.state is State.COMPLETED:
        _complete(site, reservation, encoded.tobytes())  # the same as before, or it must not wait
    exchanges.keep(site, request.round, session, encoded)
    _complete(site, reservation, encoded.tobytes())
    return wire.Ready(site.site_id, request.round)


def _check_policy(site: Site, round_number: int) -> None:
    """Raises PolicyRefusedError unless the site's own rules allow the round."""
    scope = None if site.ledger is None else site.ledger.balance(site.scope).scope
    asked = Asked(
        config=site.config,
        plan=site.plan,
        round=round_number,
        source=site.scope,
        scope=scope,
        model=site.model_digest,
        bundle=site.bundle,
    )
    check(site.policy, asked)


def _complete(site: Site, reservation: Reservation | None, output: bytes) -> None:
    """The charge has its one output: computing it again and getting another one is an error from now on."""
    if site.ledger is not None and reservation is not None:
        digest = hashlib.sha256(b"confide/output/v1" + output).hexdigest()
        site.ledger.complete(reservation.id, digest)
