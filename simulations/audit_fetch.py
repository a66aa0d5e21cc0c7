"""Fetching ledgers over the network, for `confide audit remote`: the other end of client/look.py.

A site is not believed: what it sends is limited in size and time, and checked like any file.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from client.look import (
    EXPORT,
    HEAD,
    MAX_EXPORT_BYTES,
    MAX_TOTALS_BYTES,
    PIECE_BYTES,
    TOTALS,
    Certificates,
    totals,
)
from common.files import write_atomically
from common.ledger import Entry
from common.ledger_checks import read_export
from common.ledger_errors import ClaimError, LedgerError, LedgerFormatError
from common.ledger_head import HEAD_BYTES, SignedHead
from simulations.audit_types import Outcome, SiteAudit, Source

_PARALLEL = 16
_SAME = 1e-9  # the site's processor may round otherwise


class UnreachableError(LedgerError):
    """A site did not show its ledger, or not in time."""

    rule = "a site must show its ledger"
    advice = "Ask its people; the other sites were audited."


@dataclass(frozen=True)
class RemoteLook:
    """What one site has shown, unchecked; or why there is nothing."""

    site: int
    address: str
    head: bytes = b""
    totals: bytes = b""
    export: bytes = b""
    error: LedgerError | None = None


def fetch_all(addresses: Mapping[int, str], own: Certificates, timeout: float) -> list[RemoteLook]:
    """Of all sites at once; each fails alone. timeout: seconds, of each call.

    Raises:
        ConfigError: the certificates cannot be used.
    """
    own.check()
    credentials = grpc.ssl_channel_credentials(own.authority, own.key, own.chain)
    with ThreadPoolExecutor(_PARALLEL) as pool:
        return list(pool.map(lambda site: _fetch(site, addresses[site], credentials, timeout), addresses))


def _fetch(site: int, address: str, credentials: Any, timeout: float) -> RemoteLook:
    options = [
        ("grpc.max_receive_message_length", max(MAX_TOTALS_BYTES, PIECE_BYTES)),
        ("grpc.enable_retries", 0),
    ]
    try:
        with grpc.secure_channel(address, credentials, options) as channel:
            # In this order the export holds the other two, however much the site adds meanwhile.
            head = channel.unary_unary(HEAD)(b"", timeout=timeout)
            stated = channel.unary_unary(TOTALS)(b"", timeout=timeout)
            pieces, size = [], 0
            for piece in channel.unary_stream(EXPORT)(b"", timeout=timeout):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_EXPORT_BYTES:
                    raise LedgerFormatError(
                        f"an export of more than {MAX_EXPORT_BYTES:,} bytes from {address}"
                    )
    except grpc.RpcError as error:
        found = f"{error.code().name} from {address}: {error.details()!s:.200}"
        return RemoteLook(site, address, error=UnreachableError(found))
    except LedgerError as error:
        return RemoteLook(site, address, error=error)
    return RemoteLook(site, address, head, stated, b"".join(pieces))


def source_of(look: RemoteLook, before: SignedHead | None) -> Source:
    """What a site has shown, to be audited. before: the head of the export that was kept last time."""

    def read() -> tuple[Sequence[Entry], SignedHead | None]:
        if look.error is not None:
            raise look.error
        return read_export(look.export)

    def kept(site: int, key: bytes) -> Sequence[SignedHead]:
        if len(look.head) != HEAD_BYTES:
            raise LedgerFormatError(f"{len(look.head)} bytes from {look.address} that are no head")
        return [SignedHead.decode(look.head), *([before] if before else [])]

    return Source(
        f"{look.address}", read, look.site, kept, functools.partial(_check_totals, look.totals, look.address)
    )


def _check_totals(data: bytes, address: str, entries: Sequence[Entry]) -> str:
    """Part of check 9: what the site states is what its entries say. Raises ClaimError."""
    try:
        stated = json.loads(data)
        expected = totals(entries[: stated["entries"]])
        same = _same(stated, expected)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ClaimError(
            f"{data!r:.80} from {address}, which are no totals ({type(error).__name__})"
        ) from None
    if not same:
        raise ClaimError(f"totals from {address} that are not those of its entries: {data!r:.200}")
    return "its totals are those of its entries"


def _same(left: object, right: object) -> bool:
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, float) and isinstance(right, float):
        return math.isclose(left, right, rel_tol=_SAME, abs_tol=_SAME)
    return type(left) is type(right) and left == right


# What is kept from one audit to the next


def _file(folder: Path, site: int) -> Path:
    return folder / f"site-{site:04d}.jsonl"


def kept_before(folder: Path | None, site: int) -> SignedHead | None:
    """The head of the last export of this site that passed and was kept.

    Raises:
        LedgerFormatError: the file holds something else.
    """
    if folder is None or not _file(folder, site).is_file():
        return None
    return read_export(_file(folder, site).read_bytes())[1]


def keep(folder: Path, look: RemoteLook, found: SiteAudit) -> None:
    """The export, in the place of the last one if it passed, and otherwise beside it, as evidence."""
    if look.export:
        path = _file(folder, look.site)
        if any(check.outcome is Outcome.FAILED for check in found.checks):
            path = path.with_suffix(".failed.jsonl")
        write_atomically(path, look.export)
