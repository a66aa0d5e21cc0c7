"""What ledgers are audited against, and what is found: a table in which nothing is passed silently."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from common.ledger import Entry
from common.ledger_checks import Claim, ScopeReport
from common.ledger_head import SignedHead
from common.roster import Member, SignedRoster

FIRST_EXIT = 20  # exit code: this and the number of the check that failed


@dataclass(frozen=True)
class Meaning:
    """A check's name, and what it shows in words for anyone."""

    name: str
    shows: str


MEANINGS = {
    1: Meaning("format", "The file is a ledger and nothing else; nothing in it can be read in two ways."),
    2: Meaning("chain", "Each entry names the one before it: none was changed, removed, added or moved."),
    3: Meaning("signatures", "Every entry was signed with this site's key, so nobody else wrote it."),
    4: Meaning(
        "life cycle", "Costs were booked before anything was computed, and given back only where nothing was."
    ),
    5: Meaning(
        "filter", "After every single entry, what was spent lay within the budget fixed at the start."
    ),
    6: Meaning("accountants", "Independent methods, from the events alone, agree on what was spent."),
    7: Meaning("signed head", "The site has signed that this is the whole ledger, up to its last entry."),
    8: Meaning(
        "receipts", "All that the site has shown before is still in it: it was not cut short or replaced."
    ),
    9: Meaning("claims", "What is said about the trained model is not less than what the ledger has spent."),
}


class Outcome(Enum):
    """How a check ended; the worst last. PARTLY: passed, with less than the whole of it made."""

    PASSED = "passed"
    PARTLY = "partly"
    SKIPPED = "skipped"
    UNREACHED = "not reached"
    FAILED = "failed"


@dataclass(frozen=True)
class Check:
    """number: 0 where there was no ledger to check. error: the name of the error that was raised."""

    number: int
    outcome: Outcome
    note: str
    error: str = ""


@dataclass(frozen=True)
class Source:
    """A ledger, wherever it is.

    read: its entries, and its signed head if it has one; None: there is no ledger there. site: whose it
    must be, if that is known. kept: heads of it that were kept elsewhere, given its site and key. also:
    what else check 9 asks of its entries.
    """

    origin: str
    read: Callable[[], tuple[Sequence[Entry], SignedHead | None]] | None
    site: int | None = None
    kept: Callable[[int, bytes], Sequence[SignedHead]] = lambda site, key: ()
    also: Callable[[Sequence[Entry]], str] | None = None


@dataclass(frozen=True)
class RunClaims:
    """What a run's folder claims, once its texts agree. epsilon, pld: for each record of any site.

    run: its id; None: the only one that the ledgers have. alone: whether the ledgers are of this run only.
    """

    run: str | None
    epsilon: float
    pld: float | None
    delta: float
    by_site: Mapping[int, float] = field(default_factory=dict)
    alone: bool = False


@dataclass(frozen=True)
class Terms:
    """What ledgers are held against. None: not given. confirmed: the roster's authority was named.

    about_run: checks of what belongs to no single site.
    """

    roster: SignedRoster | None = None
    confirmed: bool = False
    receipts: Sequence[SignedHead] | None = None
    claims: Sequence[Claim] = ()
    run: RunClaims | None = None
    no_claim: str = "no claim given"
    about_run: Sequence[Check] = ()
    pld: bool = True


@dataclass(frozen=True)
class SiteAudit:
    """What was found of one ledger. checks: those that were tried, in order. scopes: once 1 to 6 pass."""

    origin: str
    site: int | None
    member: Member | None
    public: str
    entries: int
    states: Mapping[str, int]
    scopes: tuple[ScopeReport, ...]
    policy: str
    checks: tuple[Check, ...]

    @property
    def called(self) -> str:
        """For people."""
        if self.site is None:
            return self.origin
        return f"{self.site} {self.member.name}" if self.member else str(self.site)


@dataclass(frozen=True)
class Audit:
    """absent: sites of the roster or with receipts of which no ledger was given."""

    sites: tuple[SiteAudit, ...]
    about_run: tuple[Check, ...]
    absent: tuple[int, ...]

    @property
    def checks(self) -> tuple[Check, ...]:
        return (*(check for site in self.sites for check in site.checks), *self.about_run)

    def exit_code(self, strict: bool) -> int:
        """0; or FIRST_EXIT and the least number that failed. What could not be read at all comes last."""
        bad = [c.number for c in self.checks if c.outcome is Outcome.FAILED]
        if not bad and strict:
            bad = [c.number for c in self.checks if c.outcome in (Outcome.PARTLY, Outcome.SKIPPED)]
            bad += [0] * bool(self.absent)
        return FIRST_EXIT + min([n for n in bad if n] or [0]) if bad else 0

    def failures(self) -> list[tuple[Check, str]]:
        """Each check that failed, and whose it is; the least number first."""
        about = [(check, "the run as a whole") for check in self.about_run]
        about += [(check, f"site {site.called}") for site in self.sites for check in site.checks]
        failed = [item for item in about if item[0].outcome is Outcome.FAILED]
        return sorted(failed, key=lambda item: item[0].number)

    def gaps(self) -> list[str]:
        """What was not, or not wholly, checked."""
        seen = {
            (check.number, check.outcome): None
            for check in sorted(self.checks, key=lambda check: check.number)
            if check.outcome in (Outcome.PARTLY, Outcome.SKIPPED)
        }
        named = [
            f"{n} {MEANINGS[n].name if n else 'reading'} {'in part' if end is Outcome.PARTLY else end.value}"
            for n, end in seen
        ]
        return named + ["ledgers are missing"] * bool(self.absent)


def plain(text: object) -> str:
    """For people: what a ledger's names could do to a terminal or a page is spelled out instead."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def worst(checks: Iterable[Check]) -> Outcome:
    order = list(Outcome)
    return max((check.outcome for check in checks), key=order.index, default=Outcome.UNREACHED)


def endings(checks: Iterable[Check]) -> str:
    """How many ended how."""
    ends = [check.outcome for check in checks]
    return ", ".join(f"{ends.count(end):,} {end.value}" for end in Outcome if end in ends)
