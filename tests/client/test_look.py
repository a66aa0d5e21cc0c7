"""The remote look: the ledger and nothing else, to those with the right certificate, and not too often."""

from __future__ import annotations

import functools
import json
import logging
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from client import look
from client.identity import SiteFolder
from client.ledger_reader import LedgerReader
from client.ledger_witness import Witness
from client.look import Certificates, LookServer, Shown, TokenBuckets, signed, witnessed
from common.errors import ConfideError, ConfigError
from common.identity import ExposedKeyError
from common.ledger_checks import verify_export
from common.ledger_errors import LedgerStorageError, RolledBackError, WitnessError
from tests import audit_world as world
from tests import certificates
from tests.certificates import Authority
from tests.e2e.command import ROOT, command, invoke

SITE = 3
LONG = 20.0  # seconds; on a busy machine a first handshake takes a while


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def auditor(authority: Authority) -> Certificates:
    return certificates.of(authority, "auditor", server=False)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "place" / "west"
    with world.open_ledger(folder, SITE) as ledger:
        world.live(ledger)
    return folder


def reader(site: Path) -> LedgerReader:
    return LedgerReader(site / "ledger.sqlite", SITE, world.identity(SITE).public)


def show(site: Path) -> Callable[[], Shown]:
    place = SiteFolder(site)
    public = world.identity(SITE).public
    return witnessed(reader(site), Witness(place.witness, ledger=place.ledger, site=SITE, public=public))


Serve = Callable[..., LookServer]


@pytest.fixture
def serve(authority: Authority) -> Iterator[Serve]:
    running: list[LookServer] = []

    def start(
        shown: Callable[[], Shown], *, rate: float = 1000.0, burst: float = 1000.0, clock: Clock | None = None
    ) -> LookServer:
        own = certificates.of(authority, "site", server=True)
        buckets = TokenBuckets(rate, burst, clock or Clock())
        running.append(LookServer("127.0.0.1:0", own, shown, buckets))
        return running[-1]

    yield start
    for server in running:
        server.stop(0)


def channel(server: LookServer, own: Certificates | None, trusted: bytes | None = None) -> Any:
    """Without `own`: one that shows no certificate."""
    address = f"127.0.0.1:{server.port}"
    if own is None:
        return grpc.secure_channel(address, grpc.ssl_channel_credentials(trusted))
    credentials = grpc.ssl_channel_credentials(trusted or own.authority, own.key, own.chain)
    return grpc.secure_channel(address, credentials)


def ask(open_channel: Any, method: str, request: bytes = b"", timeout: float | None = LONG) -> bytes:
    return bytes(open_channel.unary_unary(method)(request, timeout=timeout))


def fetch(open_channel: Any) -> bytes:
    return b"".join(open_channel.unary_stream(look.EXPORT)(b"", timeout=LONG))


def code_of(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as raised:
        call()
    return raised.value.code(), raised.value.details()


def healthy(open_channel: Any, service: str = look.SERVICE) -> int:
    stub = health_pb2_grpc.HealthStub(open_channel)
    return int(stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=LONG).status)


SERVING, NOT_SERVING = (
    health_pb2.HealthCheckResponse.SERVING,
    health_pb2.HealthCheckResponse.NOT_SERVING,
)


# What is shown


def test_it_shows_the_ledger_and_leaves_it_as_it_was(site: Path, serve: Serve, auditor: Certificates) -> None:
    with world.open_ledger(site, SITE) as ledger:
        expected, newest = ledger.export(), ledger.head()
    before = world.snapshot(site.parent)
    with channel(serve(show(site)), auditor) as opened:
        assert ask(opened, look.HEAD) == newest.encode()
        export = fetch(opened)
        totals = json.loads(ask(opened, look.TOTALS))
    assert export == expected
    report = verify_export(export, public=world.identity(SITE).public, receipts=[newest], pld=False)
    assert totals["entries"] == newest.seq
    for stated, scope in zip(totals["scopes"], report.scopes, strict=True):
        assert set(stated) == {"scope", "target_epsilon", "delta", "spent", "reserved", "left"}
        assert stated["scope"] == scope.scope.name
        assert stated["spent"] + stated["reserved"] + stated["left"] == pytest.approx(
            stated["target_epsilon"]
        )
        assert stated["left"] == pytest.approx(scope.scope.budget - scope.rho)
    assert world.snapshot(site.parent) == before


def test_it_follows_a_site_that_goes_on(site: Path, serve: Serve, auditor: Certificates) -> None:
    with channel(serve(show(site)), auditor) as opened, world.open_ledger(site, SITE) as ledger:
        for number in range(60, 63):
            ledger.reserve(world.charge(number))
            assert ask(opened, look.HEAD) == ledger.head().encode()
            assert fetch(opened) == ledger.export()


def test_an_entry_that_the_witness_has_not_seen_is_not_shown_yet(site: Path) -> None:
    """The site is between its commit and its witness, or died there."""
    place = SiteFolder(site)
    kept = place.witness.read_bytes()
    with world.open_ledger(site, SITE) as ledger:
        before = ledger.head()
        ledger.reserve(world.charge(60))
        after = ledger.head()
    newest = place.witness.read_bytes()
    place.witness.write_bytes(kept)
    shown = show(site)()
    assert (shown.head, shown.entries[-1].seq) == (before, before.seq)
    place.witness.write_bytes(newest)
    assert show(site)().head == after


def test_without_a_witness_the_identity_signs(site: Path) -> None:
    shown = signed(reader(site), world.identity(SITE), SITE)()
    assert shown.head.is_signed_by(world.identity(SITE).public)
    assert shown.head.hash == shown.entries[-1].hash
    SiteFolder(site).witness.unlink()
    with pytest.raises(WitnessError):
        show(site)()


def test_a_ledger_that_went_back_is_not_shown(site: Path, serve: Serve, auditor: Certificates) -> None:
    shutil.copy(site / "ledger.sqlite", site.parent / "backup")
    with world.open_ledger(site, SITE) as ledger:
        ledger.reserve(world.charge(60))
    server = serve(show(site))
    with channel(server, auditor) as opened:
        assert healthy(opened) == SERVING
        shutil.copy(site.parent / "backup", site / "ledger.sqlite")
        expected = (grpc.StatusCode.FAILED_PRECONDITION, "the ledger: RolledBackError")
        for method in (look.HEAD, look.TOTALS):
            assert code_of(lambda method=method: ask(opened, method)) == expected
        assert code_of(lambda: fetch(opened)) == expected
        assert healthy(opened) == NOT_SERVING
        assert healthy(opened, "") == SERVING  # the server itself
        with pytest.raises(RolledBackError):
            show(site)()


def test_health_recovers_with_the_ledger(serve: Serve, auditor: Certificates, site: Path) -> None:
    intact, broken = show(site), [True]

    def shown() -> Shown:
        if broken:
            raise LedgerStorageError("the disk")
        return intact()

    with channel(serve(shown), auditor) as opened:
        assert code_of(lambda: ask(opened, look.HEAD))[1] == "the ledger: LedgerStorageError"
        assert healthy(opened) == NOT_SERVING
        broken.clear()
        assert ask(opened, look.HEAD)
        assert healthy(opened) == SERVING


def test_the_text_of_an_exception_stays_at_the_site(
    serve: Serve, auditor: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> Shown:
        raise RuntimeError("record 17: Jane Doe")

    with caplog.at_level(logging.CRITICAL), channel(serve(broken), auditor) as opened:
        assert code_of(lambda: ask(opened, look.HEAD)) == (grpc.StatusCode.INTERNAL, "failed-internal")
        assert code_of(lambda: fetch(opened)) == (grpc.StatusCode.INTERNAL, "failed-internal")


# Who may look


def test_only_a_certificate_of_the_authority_opens_a_channel(
    site: Path, serve: Serve, authority: Authority, auditor: Certificates
) -> None:
    server, stranger = serve(show(site)), Authority("Somebody else")
    refused = {
        "no certificate": channel(server, None, authority.pem),
        "another authority": channel(
            server, certificates.of(stranger, "auditor", server=False, trusts=authority)
        ),
        "the site's own": channel(server, certificates.of(authority, "site", server=True)),
        "in the clear": grpc.insecure_channel(f"127.0.0.1:{server.port}"),
        "a site of another authority": channel(server, auditor, stranger.pem),
    }
    for why, opened in refused.items():
        with opened:
            for call in (functools.partial(ask, opened, look.HEAD), functools.partial(healthy, opened)):
                assert code_of(call)[0] is grpc.StatusCode.UNAVAILABLE, why
    with channel(server, auditor) as opened:
        assert healthy(opened) == SERVING


def test_it_does_not_start_without_someone_to_trust(
    site: Path, serve: Serve, authority: Authority, auditor: Certificates
) -> None:
    own = certificates.of(authority, "site", server=True)
    for chain, key, trusted, said in (
        (own.chain, own.key, b"", "--ca"),
        (own.chain, own.key, b"nobody", "--ca"),
        (own.chain, own.key, auditor.chain, "--ca must hold certificates of authorities"),
        (own.chain, own.key, authority.pem + auditor.chain, "--ca must hold certificates of authorities"),
        (b"", own.key, authority.pem, "--cert"),
        (own.chain, b"", authority.pem, "--key"),
        (own.chain, auditor.key, authority.pem, "--key is not the key of the certificate"),
    ):
        with pytest.raises(ConfigError, match=re.escape(said)):
            LookServer(
                "127.0.0.1:0", Certificates(chain, key, trusted), show(site), TokenBuckets(1, 1, Clock())
            )
    taken = serve(show(site))
    with pytest.raises(ConfigError, match="cannot be listened on"):
        LookServer(f"127.0.0.1:{taken.port}", own, show(site), TokenBuckets(1, 1, Clock()))
    assert "PRIVATE" not in repr(own)


# How often, how much


def test_a_bucket_fills_at_its_rate_and_no_higher_than_its_burst() -> None:
    clock = Clock()
    buckets = TokenBuckets(0.5, 3, clock)
    assert [buckets.take("a") for _ in range(4)] == [True, True, True, False]
    assert buckets.take("b")
    clock.now += 1.9
    assert not buckets.take("a")
    clock.now += 0.2
    assert buckets.take("a") and not buckets.take("a")
    clock.now += 3600
    assert [buckets.take("a") for _ in range(4)] == [True, True, True, False]
    clock.now -= 10  # a clock that goes back mints nothing
    assert not buckets.take("a")
    for peer in range(5000):
        buckets.take(str(peer))
    assert len(buckets._buckets) == look._PEERS
    for rate, burst in ((0, 1), (1, 0.5), (-1, 1)):
        with pytest.raises(ConfigError):
            TokenBuckets(rate, burst, clock)


def test_each_certificate_has_its_own_rate(
    site: Path, serve: Serve, authority: Authority, auditor: Certificates
) -> None:
    clock = Clock()
    server = serve(show(site), rate=1.0, burst=3.0, clock=clock)
    other = certificates.of(authority, "other", server=False)
    with channel(server, auditor) as first, channel(server, auditor) as second:
        ask(first, look.HEAD)
        healthy(second)
        fetch(first)
        for call in (lambda: ask(second, look.HEAD), lambda: fetch(first), lambda: healthy(second)):
            code, said = code_of(call)
            assert (code, said) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls: wait and ask again")
        with channel(server, other) as third:
            ask(third, look.HEAD)
        clock.now += 1.0
        ask(second, look.HEAD)


def test_one_certificate_cannot_hold_all_places(
    site: Path, serve: Serve, authority: Authority, auditor: Certificates
) -> None:
    server = serve(show(site))
    request = health_pb2.HealthCheckRequest(service=look.SERVICE)
    with channel(server, auditor) as opened:
        stub = health_pb2_grpc.HealthStub(opened)
        watched = [stub.Watch(request, timeout=60) for _ in range(look._AT_ONCE)]
        assert [next(one).status for one in watched] == [SERVING] * look._AT_ONCE
        code, said = code_of(lambda: ask(opened, look.HEAD))
        assert (code, said) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls at once")
        with channel(server, certificates.of(authority, "other", server=False)) as other:
            ask(other, look.HEAD)
        watched[0].cancel()
        for _ in range(100):  # until the server has seen it
            try:
                ask(opened, look.HEAD)
                break
            except grpc.RpcError:
                continue
        else:
            pytest.fail("a cancelled call kept its place")


def test_requests_are_empty_and_have_a_deadline(site: Path, serve: Serve, auditor: Certificates) -> None:
    with channel(serve(show(site)), auditor) as opened:
        invalid = grpc.StatusCode.INVALID_ARGUMENT
        assert code_of(lambda: ask(opened, look.HEAD, b"x")) == (invalid, "a request is empty")
        assert code_of(lambda: ask(opened, look.HEAD, timeout=None))[0] is invalid
        assert code_of(lambda: ask(opened, look.HEAD, timeout=3600))[0] is invalid
        assert code_of(lambda: ask(opened, look.HEAD, bytes(10_000)))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        unknown = f"/{look.SERVICE}/Records"
        assert code_of(lambda: ask(opened, unknown))[0] is grpc.StatusCode.UNIMPLEMENTED


def test_a_ledger_too_long_for_a_look_is_not_sent(
    site: Path, serve: Serve, auditor: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    with channel(serve(show(site)), auditor) as opened:
        monkeypatch.setattr(look, "PIECE_BYTES", 100)
        assert len(list(opened.unary_stream(look.EXPORT)(b"", timeout=LONG))) > 50
        monkeypatch.setattr(look, "MAX_EXPORT_BYTES", 1000)
        assert code_of(lambda: fetch(opened))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED


# The command


@pytest.fixture
def files(tmp_path: Path, authority: Authority) -> dict[str, Path]:
    return certificates.written(tmp_path / "tls", certificates.of(authority, "site", server=True))


def test_the_command_refuses_what_would_show_the_ledger_to_anyone(
    site: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    def refused(*arguments: str | Path) -> ConfideError:
        with pytest.raises(ConfideError) as raised:
            invoke("client", "serve", site, "--listen", "127.0.0.1:0", *arguments)
        return raised.value

    with pytest.raises(SystemExit):  # each of the three files must be named
        invoke(
            "client", "serve", site, "--listen", "127.0.0.1:0", "--cert", files["cert"], "--key", files["key"]
        )
    empty = tmp_path / "empty.pem"
    empty.touch()
    rest = ("--cert", files["cert"], "--key", files["key"])
    assert refused(*rest, "--ca", empty).exit_code == 2
    assert refused(*rest, "--ca", tmp_path / "nothing").exit_code == 2
    assert refused(*rest, "--ca", files["cert"]).exit_code == 2
    files["key"].chmod(0o644)
    assert isinstance(refused(*certificates.options(files)), ExposedKeyError)
    files["key"].chmod(0o600)
    SiteFolder(site).ledger.unlink()
    assert refused(*certificates.options(files)).exit_code == 2


def test_the_command_serves_until_it_is_told_to_stop(
    site: Path, files: dict[str, Path], auditor: Certificates, tmp_path: Path
) -> None:
    """In a process of its own. The identity is not needed: the witness has the signed head."""
    (site / "identity.pem").unlink()
    before = world.snapshot(site.parent)
    process = subprocess.Popen(
        command("client", "serve", site, "--listen", "127.0.0.1:0", *certificates.options(files)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"site 3: 18 entries, to be looked at on port (\d+); the witness has", line)
        assert found is not None, process.communicate(timeout=10)
        own = certificates.written(tmp_path / "auditor", auditor)
        address = f"3=127.0.0.1:{found[1]}"
        code, seen = world.audit("remote", address, *certificates.options(own), "--no-pld")
        assert (code, seen["sites"][0]["entries"]) == (0, 18)
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0
    assert f"{look.HEAD} by certificate " in log
    assert world.snapshot(site.parent) == before
