"""Every way a privacy ledger can refuse, with the number of the auditor's check that it fails.

1 format, 2 chain, 3 signatures, 4 life cycle, 5 filter, 6 accountants, 7 signed head, 8 receipts, 9 claims.
The writer refuses by the same classes; a charge that does not fit is a `BudgetError`.
"""

from __future__ import annotations

from typing import ClassVar

from common.errors import PrivacyError

_RESTORE = (
    "Nothing may be computed on this site's data: restore the ledger file, and compare its head with the "
    "server's receipts."
)


class LedgerError(PrivacyError):
    """A ledger cannot be relied on, or was asked for what it must not record.

    `found` holds nothing that depends on a record: names, numbers and hashes of the ledger itself.
    """

    check: ClassVar[int] = 0  # 0: no check of an export can fail this way
    rule: ClassVar[str] = "the ledger must be intact"
    advice: ClassVar[str] = _RESTORE

    def __init__(self, found: str) -> None:
        self.found = found
        number = f", check {self.check}" if self.check else ""
        super().__init__(f"privacy ledger{number}: {self.rule}, found {found}. {self.advice}")


class LedgerFormatError(LedgerError):
    """Not a ledger, an unknown kind of entry, or a value out of its range."""

    check = 1
    rule = "every entry must be canonical JSON of a known kind, in a file of this format"


class ChainError(LedgerError):
    """An entry was changed, removed, added or moved."""

    check = 2
    rule = "every entry must have the next number and the hash of the entry before"


class EntrySignatureError(LedgerError):
    """An entry is not signed by the site's key."""

    check = 3
    rule = "every entry must be signed by the site's key"


class LifecycleError(LedgerError):
    """Entries in an order that cannot be: reserve, start, complete; cancel only before start."""

    check = 4
    rule = "the first entry must be the only genesis"
    advice = "Nothing was recorded."


class UnknownScopeError(LifecycleError):
    """A charge, or an overlap, names a data source that was never opened."""

    rule = "a data source must be opened before it is named"
    advice = "Nothing was recorded: open the data source with its budget first."


class ScopeTermsError(LifecycleError):
    """A data source is opened a second time with other terms."""

    rule = "the terms of a data source are fixed when it is opened"
    advice = "Nothing was recorded: keep the first terms; new terms would mint budget for the same records."


class UnknownReservationError(LifecycleError):
    """No reservation has this id."""

    rule = "an id must be that of a reservation"


class WrongStateError(LifecycleError):
    """The reservation is not in the state that this step needs."""

    rule = "a reservation is started once, completed after that, and cancelled only before"
    advice = "Nothing was recorded. To compute again with fresh noise, make a new reservation."


class OutputChangedError(LifecycleError):
    """A completed reservation is completed again with another output: a second release on one charge."""

    rule = "a reservation has one output"
    advice = "Do not send the second output: its noise was never charged. Send the stored bytes of the first."


class FilterError(LedgerError):
    """A charge was recorded that the site's own stopping rule forbids."""

    check = 5
    rule = "the charges on a data source must stay within its budget at the order fixed at opening"
    advice = "The site has spent more than it allowed: its claim does not hold."


class AccountantsDisagreeError(LedgerError):
    """Two accountants read different costs from the same events."""

    check = 6
    rule = "independent accountants must agree on what the events cost"
    advice = (
        "One of the accountants is wrong or of another version: trust the larger ε until it is known which."
    )


class HeadError(LedgerError):
    """The signed head is not that of this ledger."""

    check = 7
    rule = "the signed head must be that of the last entry"


class HeadSignatureError(HeadError):
    """A head is not signed by the site's key."""

    rule = "a head must be signed by the site's key"
    advice = "It proves nothing: ask the site again, and compare the key in the roster."


class ReceiptError(LedgerError):
    """A head that the site has signed before contradicts this ledger."""

    check = 8
    rule = "every head that this site has signed must be in its ledger"
    advice = "Accept no update of this site until its newest ledger has been found."


class HeadWentBackError(ReceiptError):
    """The ledger is shorter than one this site has signed: truncated, or restored from a backup."""

    rule = "a ledger never gets shorter"


class ForkError(ReceiptError):
    """Two histories of one site with the same number of entries: one of them hides spending."""

    rule = "a site has one history"


class ClaimError(LedgerError):
    """A claimed ε is lower than what the ledger says the run has cost."""

    check = 9
    rule = "the charges of a run must not cost more than is claimed for it"
    advice = "Correct the claim."


class WrongSiteError(LedgerError):
    """The ledger of another site, or of another key of this one."""

    rule = "a site must open its own ledger with its own key"
    advice = "Compare the site's id and identity key with those that the ledger was made with."


class LedgerStorageError(LedgerError):
    """The file system refused: full, read-only, failing, or locked by another process for too long."""

    rule = "an entry must be on disk before anything is computed"
    advice = (
        "The charge may or may not have been kept; nothing may be computed for it. Make space or repair the "
        "disk, then reserve again."
    )


class WitnessError(LedgerError):
    """The witness is missing, damaged, or in the folder that it is meant to watch."""

    rule = "a ledger with entries must come with its witness"
    advice = (
        "If the witness was lost and the ledger is known to be the newest, adopt a new witness; otherwise "
        "restore both."
    )


class RolledBackError(LedgerError):
    """The ledger lacks entries that its witness has seen: deleted, or restored from a backup."""

    rule = "the ledger must hold the entry that its witness saw last"
    advice = _RESTORE
