"""The audit of ledgers: nine numbered checks of each, against all that is known of it from elsewhere.

`common.ledger_checks` makes the checks of one ledger. Here they become a table in which nothing is passed
silently: a check is passed, passed as far as it went, skipped, failed, or was not reached.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from common.identity import fingerprint
from common.ledger import Entry, Genesis, Policy, Reserve
from common.ledger_checks import (
    Claim,
    Verified,
    check_claim,
    check_head,
    check_receipt,
    verify_entries,
)
from common.ledger_errors import (
    AccountantsDisagreeError,
    ClaimError,
    EntrySignatureError,
    HeadWentBackError,
    LedgerError,
)
from common.ledger_head import SignedHead
from common.ledger_replay import History
from common.privacy import epsilon_pld, epsilon_text
from common.roster import Member
from simulations.audit_types import MEANINGS, Audit, Check, Outcome, RunClaims, SiteAudit, Source, Terms

_SAME_PLD = 1e-6  # relative; the discretisation of loss distributions may differ between machines


class NotInRosterError(EntrySignatureError):
    """The ledger is of a site or a key that the federation's roster does not have, or of another site."""

    rule = "a ledger must be of the site that it is said to be, under its key in the roster"
    advice = "Do not rely on it: it may be anybody's. Ask the federation's people for the site's fingerprint."


@dataclass(frozen=True)
class _Read:
    source: Source
    entries: Sequence[Entry] = ()
    head: SignedHead | None = None
    error: LedgerError | None = None

    @property
    def genesis(self) -> Genesis | None:
        first = self.entries[0].record if self.entries else None
        return first if isinstance(first, Genesis) else None

    @property
    def site(self) -> int | None:
        return self.genesis.site if self.genesis else self.source.site

    @property
    def runs(self) -> set[str]:
        return {entry.record.charge.run for entry in self.entries if isinstance(entry.record, Reserve)}


def audit(sources: Sequence[Source], terms: Terms) -> Audit:
    """Every check of every ledger. Nothing that is found wrong is raised."""
    # Reading first: check 8 compares ledgers of one site, check 9 asks which runs there are at all.
    ledgers = [_read(source) for source in sources]
    runs = set().union(*(ledger.runs for ledger in ledgers))
    sites = tuple(_audit_site(ledger, ledgers, runs, terms) for ledger in ledgers)
    known = {member.id for member in terms.roster.members} if terms.roster else set()
    known |= {receipt.site for receipt in terms.receipts or ()}
    absent = known - {ledger.site for ledger in ledgers} - {ledger.source.site for ledger in ledgers}
    return Audit(sites, tuple(terms.about_run), tuple(sorted(absent)))


def _read(source: Source) -> _Read:
    if source.read is None:
        return _Read(source)
    try:
        return _Read(source, *source.read())
    except LedgerError as error:
        return _Read(source, error=error)


def _audit_site(ledger: _Read, others: Sequence[_Read], runs: set[str], terms: Terms) -> SiteAudit:
    checks: list[Check] = []
    verified: Verified | None = None
    member = _member(ledger, terms)
    if ledger.source.read is None:
        checks += _check_missing(ledger, terms)
    else:
        try:
            # (1) to (6)
            if ledger.error is not None:
                raise ledger.error
            verified = _verify(ledger, member, terms)
        except LedgerError as error:
            checks += [_before(number, terms) for number in range(1, error.check)]
            checks.append(_failed(error.check, error))
        else:
            checks += [_verified(number, ledger, verified, terms) for number in range(1, 7)]
            # (7) to (9), of which one can fail without the next
            kept: list[SignedHead] = []
            checks.append(_try(8, lambda: _check_receipts(ledger, others, verified, terms, kept)))
            checks.insert(6, _try(7, lambda: _check_head(ledger, verified, kept)))
            checks.append(_try(9, lambda: _check_claims(ledger, verified, runs, terms)))
    tried = {check.number for check in checks}
    checks += [Check(n, Outcome.UNREACHED, "") for n in MEANINGS if n not in tried]
    history = verified.history if verified else None
    return SiteAudit(
        origin=ledger.source.origin,
        site=ledger.site,
        member=member,
        public=ledger.genesis.public_key if ledger.genesis else "",
        entries=len(ledger.entries),
        states=Counter(r.state.value for r in history.reservations.values()) if history else {},
        scopes=verified.scopes if verified else (),
        policy=history.policy.sha256 if history and isinstance(history.policy, Policy) else "",
        checks=tuple(sorted(checks, key=lambda check: check.number)),
    )


def _try(number: int, make: Callable[[], Check]) -> Check:
    try:
        return make()
    except LedgerError as error:
        return _failed(number, error)


def _failed(number: int, error: LedgerError) -> Check:
    note = f"{error.rule}, found {error.found}. {error.advice}" if number else error.found
    return Check(number, Outcome.FAILED, note, type(error).__name__)


def _member(ledger: _Read, terms: Terms) -> Member | None:
    """Who the roster says that the ledger's site is; a retired one has signed what it has signed."""
    everybody = (*terms.roster.members, *terms.roster.retired) if terms.roster else ()
    return next((member for member in everybody if member.id == ledger.site), None)


# 1 to 6


def _verify(ledger: _Read, member: Member | None, terms: Terms) -> Verified:
    """Checks 2 to 6; what the roster says belongs to 3."""
    wrong = _stranger(ledger, member, terms)
    public = member.public if member and wrong is None else None
    try:
        verified = verify_entries(ledger.entries, public=public, pld=terms.pld)
    except LedgerError as error:
        raise wrong if wrong is not None and error.check >= wrong.check else error from None
    except (ArithmeticError, ValueError, MemoryError) as error:
        raise wrong or AccountantsDisagreeError(f"events that one of them cannot bound ({error})") from error
    if wrong is not None:
        raise wrong
    return verified


def _stranger(ledger: _Read, member: Member | None, terms: Terms) -> NotInRosterError | None:
    genesis, expected = ledger.genesis, ledger.source.site
    if genesis is None:
        return None
    if expected is not None and genesis.site != expected:
        return NotInRosterError(f"the ledger of site {genesis.site} where that of site {expected} must be")
    if terms.roster is None:
        return None
    if member is None:
        return NotInRosterError(f"site {genesis.site}, which is not in version {terms.roster.version} of it")
    if member.public.hex() != genesis.public_key:
        own = fingerprint(bytes.fromhex(genesis.public_key))
        return NotInRosterError(f"site {member.id} with the key {own}, not {fingerprint(member.public)}")
    return None


def _before(number: int, terms: Terms) -> Check:
    """A check that was passed on the way to one that failed."""
    return _check_keys(terms) if number == 3 else Check(number, Outcome.PASSED, "")


def _check_keys(terms: Terms) -> Check:
    if terms.roster is None:
        return Check(3, Outcome.PARTLY, "by the key that the ledger itself names: no roster given")
    version = f"by the key in version {terms.roster.version} of the roster"
    if not terms.confirmed:
        own = fingerprint(terms.roster.authority)
        return Check(3, Outcome.PARTLY, f"{version}; its authority was not confirmed: is it {own}?")
    return Check(3, Outcome.PASSED, version)


def _verified(number: int, ledger: _Read, verified: Verified, terms: Terms) -> Check:
    history, scopes = verified.history, verified.scopes
    match number:
        case 1:
            note = f"{len(ledger.entries):,} entries"
        case 3:
            return _check_keys(terms)
        case 4:
            states = Counter(r.state.value for r in history.reservations.values())
            note = f"charges: {', '.join(f'{n} {state}' for state, n in sorted(states.items())) or 'none'}"
        case 5:
            note = f"data sources: {', '.join(sorted(history.scopes)) or 'none'}"
        case 6:
            second = [
                name
                for name, made in (
                    ("loss distributions", all(s.epsilon_pld is not None for s in scopes)),
                    ("Opacus", all(s.second_epsilon is not None for s in scopes)),
                )
                if made
            ]
            if scopes and not second:
                return Check(6, Outcome.PARTLY, f"by Rényi divergences only: {'; '.join(verified.skipped)}")
            note = f"by Rényi divergences and {' and '.join(second)}" if scopes else "nothing to account for"
        case _:
            note = ""
    return Check(number, Outcome.PASSED, note)


# 7 and 8


def _check_head(ledger: _Read, verified: Verified, kept: Sequence[SignedHead]) -> Check:
    last = ledger.entries[-1]
    if ledger.head is not None:
        check_head(ledger.head, verified.genesis.site, last, verified.key)
        return Check(7, Outcome.PASSED, f"of entry {last.seq:,}")
    if any((head.seq, head.hash) == (last.seq, last.hash) for head in kept):
        return Check(7, Outcome.PASSED, f"of entry {last.seq:,}, as it was kept elsewhere")
    return Check(7, Outcome.SKIPPED, "no signed head: a ledger's own file has none, an export has")


def _check_receipts(
    ledger: _Read, others: Sequence[_Read], verified: Verified, terms: Terms, kept: list[SignedHead]
) -> Check:
    """`kept` takes in all heads that were held against the ledger and are in it."""
    site, key = verified.genesis.site, verified.key
    receipts = [head for head in terms.receipts or () if head.site == site]
    elsewhere = list(ledger.source.kept(site, key))
    # Of two exports of one site the longer must continue the shorter, which may just be older.
    elsewhere += [
        other.head
        for other in others
        if other is not ledger and other.site == site and other.head is not None
        and other.head.seq <= len(ledger.entries) and other.head.site == site
        and other.head.is_signed_by(key)
    ]  # fmt: skip
    for head in (*receipts, *elsewhere):
        check_receipt(head, site, ledger.entries, key)
        kept.append(head)
    if not kept:
        found = "no receipts given" if terms.receipts is None else f"no receipts of site {site}"
        return Check(8, Outcome.SKIPPED, found)
    over = f"the newest over {max(head.seq for head in kept):,} of {len(ledger.entries):,} entries"
    if receipts:
        others_too = f" and {len(elsewhere)} heads kept elsewhere" if elsewhere else ""
        return Check(8, Outcome.PASSED, f"{len(receipts):,} receipts{others_too}, {over}")
    return Check(
        8, Outcome.PARTLY, f"no receipts of the server, {len(elsewhere)} heads kept elsewhere, {over}"
    )


def _check_missing(ledger: _Read, terms: Terms) -> list[Check]:
    """Of a site that has no ledger: whether it should have one."""
    site = ledger.source.site
    found = [Check(0, Outcome.SKIPPED, "there is no ledger")]
    receipts = [head.seq for head in terms.receipts or () if head.site == site]
    if receipts:
        gone = HeadWentBackError(f"no ledger where site {site} has signed {max(receipts)} entries")
        found.append(_failed(8, gone))
    if terms.run is not None and site in terms.run.by_site:
        found.append(_failed(9, ClaimError(f"no ledger of site {site}, for which an ε is claimed")))
    return found


# 9


def _check_claims(ledger: _Read, verified: Verified, runs: set[str], terms: Terms) -> Check:
    own, site, history = ledger.runs, ledger.site, verified.history
    pld = all(scope.epsilon_pld is not None for scope in verified.scopes)
    notes = []
    # A claim on a run in which this site had no part says nothing of it; one on no site's run is wrong.
    for claim in terms.claims:
        if claim.run in own or claim.run not in runs:
            notes.append(_met(claim, check_claim(claim, history)))
    if terms.run is not None:
        notes += _check_run(terms.run, own, runs, history, site, pld)
    if ledger.source.also is not None:
        notes.append(ledger.source.also(ledger.entries))
    if not notes:
        found = "the run has not been charged here" if terms.claims or terms.run else terms.no_claim
        return Check(9, Outcome.SKIPPED, found)
    return Check(9, Outcome.PASSED, "; ".join(dict.fromkeys(notes)))


def _met(claim: Claim, cost: float) -> str:
    return f"run {claim.run}: ε = {epsilon_text(cost)} of {epsilon_text(claim.epsilon)} claimed"


def _check_run(
    claims: RunClaims, own: set[str], runs: set[str], history: History, site: int | None, pld: bool
) -> list[str]:
    run = claims.run
    if run is None:
        if len(runs) > 1:
            raise ClaimError(
                f"charges of {len(runs)} runs, and no run_id in summary.json: name it by --claim"
            )
        run = next(iter(runs), "")
    if claims.alone and (strangers := own - {run}):
        raise ClaimError(f"charges of another run, {min(strangers)!r:.80}, among those of {run!r:.80}")
    if run not in own:
        if runs and run not in runs:
            raise ClaimError(f"no charge of run {run!r:.80}, for which ε = {claims.epsilon} is claimed")
        return []
    whole = Claim(run, claims.epsilon, claims.delta)
    cost = check_claim(whole, history)
    if site is not None and claims.by_site:
        if site not in claims.by_site:
            raise ClaimError(f"no ε for site {site} in summary.json, and ε = {cost} in its ledger")
        check_claim(Claim(run, claims.by_site[site], claims.delta), history)
    if pld and claims.pld is not None:
        _check_pld(run, claims.pld, claims.delta, history)
    return [_met(whole, cost)]


def _check_pld(run: str, claimed: float, delta: float, history: History) -> None:
    for name in history.scopes:
        charges = [r.charge for r in history.balance(name).reservations if r.charge.run == run]
        found = epsilon_pld([event for charge in charges for event in charge.events], delta)
        if found > claimed * (1 + _SAME_PLD):
            raise ClaimError(
                f"ε = {found} by privacy loss distributions for run {run!r} where {claimed} is claimed"
            )
