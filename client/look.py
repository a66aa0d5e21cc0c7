"""The remote look: an auditor reads a site's ledger over the network. Off unless the site starts it.

Three calls, each with an empty request, in the service `confide.look.v1.Look`:

    Head    the signed head of the ledger, HEAD_BYTES bytes
    Totals  JSON: per data source its budget, what is spent of it, and what is left
    Export  a stream of bytes: put together, what `Ledger.export` writes

and the standard `grpc.health.v1.Health`. All of it is the ledger's own content, so nothing here was
computed from a record. The ledger is read and never written, and where its witness holds its signed head,
no secret of the site is needed either. Both ends show certificates; who shows none, or one of another
authority, does not get as far as a call. What each certificate may ask for is limited in number, at once
and in time. An error is a fixed text: that of an exception stays here.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from client.budget import budgets
from client.ledger_reader import LedgerReader
from client.ledger_witness import Witness
from common.errors import ConfigError
from common.ledger import Entry, canonical
from common.ledger_checks import export_ledger
from common.ledger_errors import LedgerError, RolledBackError, WitnessError
from common.ledger_head import SignedHead
from common.ledger_replay import History
from common.secagg.keys import IdentityKey

SERVICE = "confide.look.v1.Look"
HEAD, TOTALS, EXPORT = (f"/{SERVICE}/{name}" for name in ("Head", "Totals", "Export"))
PIECE_BYTES = 64 * 1024
MAX_EXPORT_BYTES = 256 * 1024 * 1024
MAX_TOTALS_BYTES = 4 * 1024 * 1024
MAX_CERTIFICATES_BYTES = 1024 * 1024
MAX_SECONDS = 600.0  # of one call: its deadline frees what it holds
_REQUEST_BYTES = 1024  # a health request names a service; ours are empty
_AT_ONCE = 2  # calls of one certificate
_CALLS = 32  # of all
_PEERS = 1024  # buckets that are kept
_THREADS = 8

_log = logging.getLogger("confide.look")


# Limits


class TokenBuckets:
    """So many calls a second for each peer, and `burst` at once. clock: seconds, never going back."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float]) -> None:
        if not (rate > 0 and burst >= 1):
            raise ConfigError(f"a rate must be > 0 and a burst at least 1, found {rate} and {burst}")
        self._rate, self._burst, self._clock = rate, burst, clock
        self._lock = threading.Lock()
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # peer → tokens, when

    def take(self, peer: str) -> bool:
        """Whether this peer may make a call now; then it has made it."""
        with self._lock:
            now = self._clock()
            tokens, then = self._buckets.pop(peer, (self._burst, now))
            tokens = min(self._burst, tokens + self._rate * max(0.0, now - then))
            allowed = tokens >= 1
            self._buckets[peer] = (tokens - allowed, now)
            if len(self._buckets) > _PEERS:
                self._buckets.popitem(last=False)  # the one that was quiet for longest
            return allowed


class _Gate:
    """Stands before every call of every service. Has the shape of a `grpc.ServerInterceptor`."""

    def __init__(self, buckets: TokenBuckets) -> None:
        self._buckets = buckets
        self._lock = threading.Lock()
        self._active: dict[str, int] = {}

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        handler = continuation(details)
        if handler is None:
            return None
        coding = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.response_streaming:
            guarded = self._guarded(handler.unary_stream, details.method)
            return grpc.unary_stream_rpc_method_handler(guarded, **coding)
        guarded = self._guarded(handler.unary_unary, details.method)
        return grpc.unary_unary_rpc_method_handler(guarded, **coding)

    def _guarded(self, behave: Callable[..., Any], method: str) -> Callable[..., Any]:
        @functools.wraps(behave)  # the health service marks its `Watch` as one that needs no thread
        def call(request: Any, context: Any, *more: Any, **named: Any) -> Any:
            self._enter(context, method)
            return behave(request, context, *more, **named)

        return call

    def _enter(self, context: Any, method: str) -> None:
        certificate = context.auth_context().get("x509_pem_cert")
        if not certificate:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "a client certificate is needed")
        peer = hashlib.sha256(certificate[0]).hexdigest()
        if not self._buckets.take(peer):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls: wait and ask again")
        left = context.time_remaining()
        if method.startswith(f"/{SERVICE}/") and (left is None or left > MAX_SECONDS):
            context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, f"a deadline of at most {MAX_SECONDS:g} s is needed"
            )
        with self._lock:
            free = self._active.get(peer, 0) < _AT_ONCE
            if free:
                self._active[peer] = self._active.get(peer, 0) + 1
        if not free:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls at once")
        if not context.add_callback(lambda: self._leave(peer)):
            self._leave(peer)  # it has ended already
        _log.info("%s by certificate %s", method, peer[:16])

    def _leave(self, peer: str) -> None:
        with self._lock:
            self._active[peer] -= 1
            if not self._active[peer]:
                del self._active[peer]


# What is shown


@dataclass(frozen=True)
class Shown:
    """The ledger up to its newest signed head."""

    entries: tuple[Entry, ...]
    head: SignedHead


def witnessed(reader: LedgerReader, witness: Witness) -> Callable[[], Shown]:
    """Up to the head in the witness, which is at most the one commit behind that is being made.

    It raises RolledBackError: the ledger lacks what the witness has seen. WitnessError: it has seen nothing.
    """

    def show() -> Shown:
        head = witness.newest()
        if head is None:
            raise WitnessError(f"no head in {witness.path}")
        entries = reader.read()  # after the witness, so that they can only be newer
        if len(entries) < head.seq or entries[head.seq - 1].hash != head.hash:
            raise RolledBackError(f"{len(entries)} entries, and not the entry {head.seq} of {witness.path}")
        return Shown(entries[: head.seq], head)

    return show


def signed(reader: LedgerReader, identity: IdentityKey, site: int) -> Callable[[], Shown]:
    """All of it, under a head that is signed here."""

    def show() -> Shown:
        entries = reader.read()
        return Shown(entries, SignedHead.sign(site, entries[-1], identity))

    return show


def totals(entries: Sequence[Entry]) -> dict[str, Any]:
    """What `entries` say, as `confide client budget` says it; all of it is ε."""
    history = History()
    for entry in entries:
        history.apply(entry.record)
    scopes = [
        {
            "scope": one.scope.name,
            "target_epsilon": one.scope.target_epsilon,
            "delta": one.scope.delta,
            "spent": one.spent,
            "reserved": one.reserved,
            "left": one.left,
        }
        for one in budgets(history)
    ]
    return {"entries": len(entries), "scopes": scopes}


# The service


class Look:
    """The three calls. state: the health, set to not serving while the ledger cannot be relied on."""

    def __init__(self, show: Callable[[], Shown], state: Any) -> None:
        self._show = show
        self._state = state

    def handlers(self) -> Any:
        def unary(answer: Callable[[Shown], bytes]) -> Any:
            return grpc.unary_unary_rpc_method_handler(functools.partial(self._ask, answer))

        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Head": unary(lambda shown: shown.head.encode()),
                "Totals": unary(lambda shown: canonical(totals(shown.entries)).encode()),
                "Export": grpc.unary_stream_rpc_method_handler(self._stream),
            },
        )

    def _ask(self, answer: Callable[[Shown], bytes], request: bytes, context: Any) -> bytes:
        if request:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a request is empty")
        try:
            found = answer(self._show())
        except LedgerError as error:
            _log.error("the ledger: %s", error)
            self._state.set(SERVICE, health_pb2.HealthCheckResponse.NOT_SERVING)
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"the ledger: {type(error).__name__}")
        except Exception:
            _log.exception("a call failed")
            context.abort(grpc.StatusCode.INTERNAL, "failed-internal")
        self._state.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        if len(found) > MAX_EXPORT_BYTES:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the ledger is too long for a look")
        return found

    def _stream(self, request: bytes, context: Any) -> Iterator[bytes]:
        data = self._ask(lambda shown: export_ledger(shown.entries, shown.head), request, context)
        for start in range(0, len(data), PIECE_BYTES):
            yield data[start : start + PIECE_BYTES]


# The server


@dataclass(frozen=True)
class Certificates:
    """PEM: this end's certificate and its key, and the authority whose certificates the other end shows.

    `common.identity.read_private` reads keys; `check` says whether these can be used.
    """

    chain: bytes
    key: bytes = field(repr=False)
    authority: bytes

    def check(self) -> None:
        """Raises ConfigError: one of them cannot be read, or they do not belong together."""
        from cryptography import x509
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        def load(what: str, data: bytes) -> list[x509.Certificate]:
            try:
                return x509.load_pem_x509_certificates(data)
            except ValueError as error:
                raise ConfigError(f"{what} must be certificates in PEM ({error})") from None

        own = load("--cert", self.chain)
        for certificate in load("--ca", self.authority):
            try:
                constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
                authority = constraints.value.ca
            except (x509.ExtensionNotFound, ValueError):
                authority = False
            if not authority:
                name = certificate.subject.rfc4514_string()
                raise ConfigError(f"--ca must hold certificates of authorities, found that of {name!r:.100}")
        try:
            key = load_pem_private_key(self.key, None)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"--key must be a private key in PEM, under no passphrase ({error})") from None
        if key.public_key() != own[0].public_key():
            raise ConfigError("--key is not the key of the certificate in --cert")


class LookServer:
    """The service on `address`, for those who show a certificate of the authority; stops when told.

    Raises:
        ConfigError: the certificates cannot be used, or the address cannot be listened on.
    """

    def __init__(
        self,
        address: str,
        certificates: Certificates,
        show: Callable[[], Shown],
        buckets: TokenBuckets,
    ) -> None:
        certificates.check()
        state = health.HealthServicer()
        state.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        self._state = state
        self._server = grpc.server(
            ThreadPoolExecutor(_THREADS, thread_name_prefix="look"),
            interceptors=[_Gate(buckets)],
            maximum_concurrent_rpcs=_CALLS,
            options=[
                ("grpc.max_receive_message_length", _REQUEST_BYTES),
                ("grpc.max_metadata_size", 8 * 1024),
                ("grpc.so_reuseport", 0),
            ],
        )
        health_pb2_grpc.add_HealthServicer_to_server(state, self._server)
        self._server.add_generic_rpc_handlers((Look(show, state).handlers(),))
        credentials = grpc.ssl_server_credentials(
            [(certificates.key, certificates.chain)],
            root_certificates=certificates.authority,
            require_client_auth=True,
        )
        try:
            self.port: int = self._server.add_secure_port(address, credentials)
        except RuntimeError:
            self.port = 0
        if not self.port:
            raise ConfigError(
                f"--listen {address} cannot be listened on: it is taken, or not of this machine"
            )
        self._server.start()

    def wait(self) -> None:
        self._server.wait_for_termination()

    def stop(self, grace: float = 5.0) -> None:
        """Let calls end, for `grace` seconds; those who watch its health are told."""
        self._state.enter_graceful_shutdown()
        self._server.stop(grace).wait()
