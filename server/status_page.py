"""The operator's status page: read-only, on the loopback; /status.json, and /metrics for Prometheus.

It answers only under this machine's own names, so that a page of somebody else's in the operator's browser
cannot read it under a name of its own (DNS rebinding).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from common.errors import ConfideError
from server.federation import FederationFolder
from server.jobs import Standing
from server.status import ServerStatus, look
from server.status_html import SCRIPT, body, whole

_KEEP_SECONDS = 1.0  # many may look at once; SuperLink is asked once
_HOSTS = ["localhost", "127.0.0.1", "[::1]"]
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
}


class Looker:
    """The status, at most a second old."""

    def __init__(self, folder: FederationFolder, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._clock = clock
        self._lock = threading.Lock()
        self._found: tuple[float, ServerStatus] | None = None

    def __call__(self) -> ServerStatus:
        with self._lock:
            if self._found is None or self._clock() - self._found[0] > _KEEP_SECONDS:
                self._found = self._clock(), look(self._folder)
            return self._found[1]


def make_page(folder: FederationFolder) -> Starlette:
    """The ASGI app. Nothing in it writes, and it has no way to."""
    now = Looker(folder)
    registry = CollectorRegistry()
    registry.register(Metrics(now))

    def page(request: Request) -> Response:
        return HTMLResponse(whole(now()), headers=_HEADERS)

    def part(request: Request) -> Response:
        return HTMLResponse(body(now()), headers=_HEADERS)

    def script(request: Request) -> Response:
        return Response(SCRIPT, media_type="text/javascript", headers=_HEADERS)

    def as_json(request: Request) -> Response:
        return JSONResponse(now().to_json(), headers=_HEADERS)

    def metrics(request: Request) -> Response:
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    def health(request: Request) -> Response:
        return PlainTextResponse("ok" if now().serving else "not serving", 200 if now().serving else 503)

    def failed(request: Request, error: Exception) -> Response:
        return PlainTextResponse(str(error), 500)

    return Starlette(
        routes=[
            Route("/", page),
            Route("/part", part),
            Route("/page.js", script),
            Route("/status.json", as_json),
            Route("/metrics", metrics),
            Route("/health", health),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=_HOSTS)],
        exception_handlers={ConfideError: failed},
    )


class Metrics(Collector):
    """The status as Prometheus reads it. Sites by their id: no value of theirs is in it."""

    def __init__(self, now: Callable[[], ServerStatus]) -> None:
        self._now = now

    def describe(self) -> Iterator[Metric]:
        return iter(())  # nothing is looked at before somebody asks

    def collect(self) -> Iterator[Metric]:
        found = self._now()
        yield GaugeMetricFamily("confide_serving", "Whether the server is at work.", value=found.serving)
        healthy = GaugeMetricFamily("confide_healthy", "Whether a program serves.", labels=["process"])
        for name, well in found.healthy.items():
            healthy.add_metric([name], well)
        yield healthy
        restarts = CounterMetricFamily("confide_restarts", "Restarts of a process.", labels=["process"])
        for name, count in found.restarts.items():
            restarts.add_metric([name], count)
        yield restarts
        online = GaugeMetricFamily("confide_site_online", "Whether a site's node is there.", labels=["site"])
        sums = CounterMetricFamily("confide_site_sums", "Rounds in whose sum a site was.", labels=["site"])
        bytes_ = CounterMetricFamily(
            "confide_site_bytes", "Bytes of messages of a site.", labels=["site", "direction"]
        )
        receipts = GaugeMetricFamily(
            "confide_site_ledger_entries", "Entries under a site's newest signed head.", labels=["site"]
        )
        for site in found.sites:
            label = str(site.id)
            online.add_metric([label], site.node == "online")
            sums.add_metric([label], site.rounds)
            bytes_.add_metric([label, "up"], site.bytes_up)
            bytes_.add_metric([label, "down"], site.bytes_down)
            receipts.add_metric([label], site.receipts)
        yield from (online, sums, bytes_, receipts)
        rounds = GaugeMetricFamily("confide_job_round", "The newest round of a job.", labels=["job"])
        failed = CounterMetricFamily(
            "confide_job_rounds_without_sum", "Rounds without a sum.", labels=["job"]
        )
        running = GaugeMetricFamily("confide_job_running", "Whether a job runs.", labels=["job"])
        for job in found.jobs:
            rounds.add_metric([job.id], job.round)
            failed.add_metric([job.id], sum(not counted for counted in job.counted))
            running.add_metric([job.id], job.standing == Standing.RUNNING.value)
        yield from (rounds, failed, running)
