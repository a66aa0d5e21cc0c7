"""A site's ledger as its own people look at it: from the site's folder alone, verified, nothing written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from client.identity import SiteFolder, own_card
from client.ledger_reader import read_entries
from client.ledger_witness import Witness
from common.errors import ConfigError
from common.ledger import Entry, Genesis, Policy, check_link, check_signature
from common.ledger_errors import LedgerFormatError, RolledBackError, WrongSiteError
from common.ledger_head import SignedHead
from common.ledger_replay import History


@dataclass(frozen=True)
class LedgerView:
    """The entries and what they say. witness: the newest head that it has; None where there is none."""

    site: int
    entries: tuple[Entry, ...]
    history: History
    witness: SignedHead | None

    @property
    def head(self) -> SignedHead | None:
        """The signed head of the last entry, if the witness has it: it may be one commit behind."""
        witness, last = self.witness, self.entries[-1]
        return witness if witness is not None and witness.seq == last.seq else None

    @property
    def policy(self) -> tuple[int, Policy] | None:
        """The newest policy that was recorded, with the number of its entry."""
        found = [(e.seq, e.record) for e in self.entries if isinstance(e.record, Policy)]
        return found[-1] if found else None


def look(place: SiteFolder, witness: Path | None = None) -> LedgerView:
    """The ledger in `place`, as it is now. Its signatures are compared with the site's own card.

    witness: where that lies, if not at `place.witness`. Without one a restored backup is not noticed.

    Raises:
        ConfigError: there is no site, or no ledger, in this folder.
        LedgerError: the ledger is not this site's intact one, or older than its witness.
    """
    card = own_card(place)
    if not place.ledger.is_file():
        raise ConfigError(
            f"no ledger at {place.ledger} yet: it is begun with the site's first data source (confide client "
            "scope) or its first round"
        )
    view = read_ledger(place.ledger, card.public)
    path = place.witness if witness is None else witness
    watch = Witness(path, ledger=place.ledger, site=view.site, public=card.public)
    seen = watch.newest()
    if seen is not None and seen.seq > len(view.entries):
        view = read_ledger(place.ledger, card.public)  # the site has gone on in between
    if seen is not None and not any((e.seq, e.hash) == (seen.seq, seen.hash) for e in view.entries):
        raise RolledBackError(
            f"{len(view.entries)} entries in {place.ledger}, and not the entry {seen.seq} of its witness"
        )
    return LedgerView(view.site, view.entries, view.history, seen)


def read_ledger(path: Path, public: bytes) -> LedgerView:
    """The ledger in `path`, whose every entry the holder of `public` has signed; without a witness.

    Raises:
        LedgerError: the check that failed.
    """
    history = History()
    entries = tuple(read_entries(path))
    genesis = entries[0].record if entries else None
    if not isinstance(genesis, Genesis):
        raise LedgerFormatError(f"{type(genesis).__name__} as first entry of {path}")
    if genesis.public_key != public.hex():
        raise WrongSiteError(f"{path} of the key {genesis.public_key}, in the folder of {public.hex()}")
    for place, entry in enumerate(entries):
        check_link(entries[place - 1] if place else None, entry)
        check_signature(entry, public)
        history.apply(entry.record)
    return LedgerView(genesis.site, entries, history, None)
