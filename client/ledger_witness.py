"""The witness: the last head of a ledger, kept outside the site's folder.

A ledger that was restored from a backup is intact and signed, and has forgotten charges. The witness has
not, as long as the two are not restored together. It guards against accidents; against somebody who
changes both, only the server's receipts help.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from client.ledger_file import whole_or_none
from common.errors import PrivacyError
from common.files import sync_folder
from common.ledger_errors import WitnessError
from common.ledger_head import HEAD_BYTES, SignedHead

# Two slots, written in turn and each within a disk sector of its own: while one is being written, the
# other still holds the head before. A signature that verifies says that a slot was written whole.
_SLOTS = (0, 512)
_FILE_BYTES = 1024


class Witness:
    """Raises WitnessError on construction if it would lie in the ledger's own folder."""

    def __init__(self, path: Path, *, ledger: Path, site: int, public: bytes) -> None:
        if path.resolve().is_relative_to(ledger.parent.resolve()):
            raise WitnessError(f"{path} in the folder of the ledger, where a backup would restore both")
        self.path = path
        self._site = site
        self._public = public
        self._seq = 0  # the newest that this object knows to be there

    def newest(self) -> SignedHead | None:
        """The head kept; None if there is no file, or nothing was ever written to it.

        Raises:
            WitnessError: the file holds something else: damage, or the witness of another ledger.
        """
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return None
        return self._newest(data)

    def create(self, head: SignedHead) -> None:
        """A file that holds `head`; if there is a file by now, that one stays."""
        with whole_or_none(self.path) as temporary, temporary.open("wb", buffering=0) as file:
            if file.write(head.encode()) != HEAD_BYTES:
                raise OSError(f"short write to {temporary}")
            os.fsync(file.fileno())

    def advance(self, head: SignedHead) -> None:
        """Durable when it returns. A head that is not newer than the one kept changes nothing.

        Raises:
            OSError: it could not be written; also when the witness has gone.
        """
        if head.seq <= self._seq:
            return
        descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            # Two processes that commit one after the other may come here in the other order.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            data = os.pread(descriptor, _FILE_BYTES, 0)
            kept = self._newest(data)
            # What can be read need not be on disk: whoever wrote it may have failed to sync it, and a
            # second sync may then do nothing. So an equal head is written again, into the other slot.
            if kept is None or kept.seq <= head.seq:
                slot = _SLOTS[kept is not None and self._slot(data, _SLOTS[0]) == kept]
                if os.pwrite(descriptor, head.encode(), slot) != HEAD_BYTES:
                    raise OSError(f"short write to {self.path}")
            os.fsync(descriptor)
            self._seq = head.seq
        finally:
            os.close(descriptor)

    def sync(self) -> None:
        """Make the file's name durable."""
        sync_folder(self.path.parent)

    def _newest(self, data: bytes) -> SignedHead | None:
        heads = [head for at in _SLOTS if (head := self._slot(data, at)) is not None]
        if not heads and data.strip(b"\0"):
            raise WitnessError(f"no head of site {self._site}'s ledger in {self.path}")
        return max(heads, key=lambda head: head.seq, default=None)

    def _slot(self, data: bytes, at: int) -> SignedHead | None:
        try:
            head = SignedHead.decode(data[at : at + HEAD_BYTES])
        except PrivacyError:
            return None
        return head if head.site == self._site and head.is_signed_by(self._public) else None
