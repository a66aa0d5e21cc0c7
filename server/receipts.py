"""The heads of sites' ledgers that the server has seen: a site whose ledger went back takes no part."""

from __future__ import annotations

import json
import os
from pathlib import Path

from common.errors import CheckpointError
from common.ledger_errors import LedgerError
from common.ledger_head import SignedHead, check_newer
from common.secagg.policy import Roster


class Receipts:
    """An append-only file of heads, one JSON line each, and the newest of each site.

    Heads are signed by the sites, so an auditor need not believe the server: it can only leave some out.
    A torn last line was never acted on, and is left out. roster: whose keys count; it may change.

    Raises:
        CheckpointError: the file holds something else.
    """

    def __init__(self, path: Path, roster: Roster) -> None:
        self.path = path
        self.roster = roster
        self.newest: dict[int, SignedHead] = {}
        for head in read_receipts(path):
            self.newest[head.site] = head

    def accept(self, site: int, head: SignedHead | None, *, refusal: bool = False) -> bool:
        """Keep the head of `site`, durably, where it is newer; whether all is well with it.

        A site that refuses may have no head to show: its ledger may be what it cannot open.
        """
        if head is None:
            return refusal
        public, before = self.roster.get(site), self.newest.get(site)
        if public is None or head.site != site:
            return False
        try:
            check_newer(before, head, public)
        except LedgerError:
            return False
        if before is None or head.seq > before.seq:
            self._append(head)
            self.newest[site] = head
        return True

    def _append(self, head: SignedHead) -> None:
        line = json.dumps({"site": head.site, "seq": head.seq, "head": head.encode().hex()})
        with self.path.open("a+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
                file.write(b"\n")  # ends a line that a crash tore
            file.write(line.encode() + b"\n")
            os.fsync(file.fileno())


def read_receipts(path: Path) -> list[SignedHead]:
    """All heads in `path`, in order; none where there is no file.

    Raises:
        CheckpointError: a line is no receipt.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(SignedHead.decode(bytes.fromhex(json.loads(line)["head"])))
        except (ValueError, TypeError, KeyError, LedgerError):
            if line and not _torn(line):
                raise CheckpointError(f"{path}, line {number}, is no receipt: restore the file") from None
    return found


def _torn(line: bytes) -> bool:
    """Whether `line` is the beginning of a receipt that a crash has cut off."""
    return line.startswith(b'{"site": '[: len(line)]) and not line.endswith(b"}")
