"""The client: one small handler per exchange. What fails becomes a fixed code; the text stays here."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import traceback
from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.budget import Charge
from client.site import Site
from client.training import check_shard, train
from common import wire
from common.adapter import Layout, check_vector
from common.errors import ConfideError, ConfigError, ProtocolError, status_of
from common.noise import NoiseStream


def make_app(open_site: Callable[[Context], Site]) -> ClientApp:
    """The Flower app of the site that `open_site` finds for a node."""
    app = ClientApp()

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        return _answer(message, context, open_site, lambda site, _: wire.Hello(site.site_id))

    @app.train()
    def on_train(message: Message, context: Context) -> Message:
        return _answer(message, context, open_site, _train)

    return app


def _answer(
    message: Message,
    context: Context,
    open_site: Callable[[Context], Site],
    handle: Callable[[Site, wire.Message], wire.Message],
) -> Message:
    """Decode, handle, encode. An exception's text could carry data, and Flower would send it verbatim."""
    site: Site | None = None
    try:
        site = open_site(context)
        return Message(wire.encode(handle(site, wire.decode(message.content))), reply_to=message)
    except Exception as error:
        text = str(error) if isinstance(error, ConfideError) else traceback.format_exc()
        with contextlib.suppress(Exception):  # a log that cannot be written must not speak either
            if site is None:
                logging.getLogger("confide.site").error("a site cannot be opened: %s", text)
            else:
                site.log(text)
        return Message(
            wire.encode(wire.Refusal(site.site_id if site else 0, status_of(error))), reply_to=message
        )


def _train(site: Site, request: wire.Message) -> wire.Message:
    """Check, charge, train, answer: in this order."""
    if not isinstance(request, wire.TrainRequest):
        raise ProtocolError(f"expected a train request, found {type(request).__name__}")
    # 1. The server may name a round of the plan that this site holds, and nothing else. Refusals come before
    #    the charge, so that they cost nothing.
    if request.plan_digest != site.plan_digest:
        raise ConfigError("the server follows another plan than this site: compare the two configurations")
    if request.layout_digest != site.model.layout.digest:
        raise ProtocolError("the server's adapter has another layout than this site's model")
    plan = site.plan.round(request.round)
    check_vector(site.model.layout, request.vector)
    check_shard(site.shard, plan)
    # 2. Charge before anything is computed. The context pins all that the output depends on.
    context = hashlib.sha256(
        b"".join(
            len(part).to_bytes(4, "little") + part
            for part in (
                b"confide/context/v1",
                request.run_id.encode(),
                request.round.to_bytes(4, "little"),
                request.attempt.to_bytes(4, "little"),
                site.plan_digest.encode(),
                site.setting,
                site.shard.digest,
                request.vector.tobytes(),
            )
        )
    ).digest()
    if plan.event is not None:
        charge = Charge(request.round, request.attempt, context.hex(), plan.event)
        site.budget.reserve(charge, repeatable=site.repeatable_noise)
    # 3. Train.
    noise = NoiseStream(site.noise_key(context))
    vector = train(site.model, site.shard, plan, request.vector, noise, site.features)
    # 4. The weight is one for every site: gradients are already normalised by one public batch size, so a
    #    site with more records weighs more without telling how many it has.
    digest = Layout.of(site.model.active(plan.part)).digest
    return wire.Update(site.site_id, request.round, request.attempt, digest, 1.0, vector)
