"""The audit of a ledger, from its export alone, offline. Nine checks, in this order; the first that fails is
raised, with its number.

1 format     every line is canonical, of a known kind, its values in range
2 chain      numbers, hashes and what each entry names as the one before
3 signatures every entry is signed by the site's key
4 life cycle reserve, start, complete; cancel only before start; scopes opened once, before use
5 filter     at every entry the charges lie within each budget, recomputed
6 accountants the same events, read by two accountants; ε by loss distributions never above
7 head       the signed head is that of the last entry
8 receipts   every head that the server has kept is in the chain
9 claims     what a run has cost is not more than what is claimed for it

What it cannot see: a computation that was never charged. The mechanism's own audit looks for that.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from common.errors import PrivacyError
from common.ledger import Entry, Genesis, Reserve, Scope, canonical, check_link, check_signature
from common.ledger_errors import (
    AccountantsDisagreeError,
    ClaimError,
    FilterError,
    ForkError,
    HeadError,
    HeadSignatureError,
    HeadWentBackError,
    LedgerFormatError,
    ReceiptError,
)
from common.ledger_head import SignedHead
from common.ledger_replay import Balance, History, count_steps, epsilon_at, filter_budget, rho
from common.privacy import ORDERS, epsilon_rdp

_HEADER = canonical({"format": "confide-ledger", "version": 1})

# The auditor's processor and libraries may round otherwise than the site's. The site itself compares exactly.
_ROUNDING = 1e-9
_AGREEMENT = 1e-3  # between accountants, relative
_NOTHING = 1e-4  # in ε: below it both are rounding, and the step of the loss distributions is as large

# Within these loss distributions take seconds.
_PLD_STEPS = 2_000_000
_PLD_SETTINGS = 256
_PLD_NOISE = 0.1
_PLD_EPSILON = 200.0
_FINE_GRID = 1e-5


@dataclass(frozen=True)
class Claim:
    """What is said about a run: ε at `delta`, for one record, add-or-remove-one."""

    run: str
    epsilon: float
    delta: float


@dataclass(frozen=True)
class ScopeReport:
    """One data source: what all charges on it, and on data that overlap, have cost.

    second_epsilon: by Opacus at the same orders; None where Opacus is not installed. epsilon_pld: None
    where it was not asked for, or would take too long.
    """

    scope: Scope
    reservations: int
    rho: float
    epsilon_rdp: float
    second_epsilon: float | None
    epsilon_pld: float | None


@dataclass(frozen=True)
class LedgerReport:
    """All checks passed, but those in `skipped`, each with the reason. runs: the ε that each claim met."""

    site: int
    public_key: str
    head: SignedHead
    scopes: tuple[ScopeReport, ...]
    receipts: int
    runs: Mapping[str, float]
    skipped: tuple[str, ...]


def export_ledger(entries: Sequence[Entry], head: SignedHead) -> bytes:
    """JSON lines: a header, the entries, the signed head. `entries` must not be empty."""
    last = canonical({"head": head.encode().hex()})
    return "\n".join([_HEADER, *(entry.line() for entry in entries), last, ""]).encode()


def verify_export(
    data: bytes,
    *,
    public: bytes | None = None,
    receipts: Iterable[SignedHead] = (),
    claims: Iterable[Claim] = (),
    pld: bool = True,
) -> LedgerReport:
    """Make all nine checks.

    public: the site's Ed25519 key in the federation's roster. Without it the key in the ledger is
    believed, and all that is shown is that the ledger agrees with itself. receipts: heads of this site
    that others have kept. pld: whether to compute ε by loss distributions too, which can take seconds.

    Raises:
        LedgerError: the subclass of the first check that failed, with its number in `check`.
    """
    # (1)
    entries, head = read_export(data)
    # (2) to (6)
    found = verify_entries(entries, public=public, pld=pld)
    genesis = found.genesis
    # (7)
    check_head(head, genesis.site, entries[-1], found.key)
    # (8)
    kept = list(receipts)
    for receipt in kept:
        check_receipt(receipt, genesis.site, entries, found.key)
    # (9)
    runs = {claim.run: check_claim(claim, found.history) for claim in claims}
    return LedgerReport(genesis.site, genesis.public_key, head, found.scopes, len(kept), runs, found.skipped)


@dataclass(frozen=True)
class Verified:
    """What checks 2 to 6 have found. key: whose signatures were checked. skipped: as in `LedgerReport`."""

    genesis: Genesis
    key: bytes
    history: History
    scopes: tuple[ScopeReport, ...]
    skipped: tuple[str, ...]


def verify_entries(entries: Sequence[Entry], *, public: bytes | None = None, pld: bool = True) -> Verified:
    """Checks 2 to 6, of a ledger that need not have a signed head. `public`, `pld`: as in `verify_export`.

    Raises:
        LedgerError: the subclass of the first check that failed.
    """
    # (2)
    for number, entry in enumerate(entries):
        check_link(entries[number - 1] if number else None, entry)
    # (3) Whose ledger it is stands in its first entry.
    genesis = entries[0].record if entries else None
    if not isinstance(genesis, Genesis):
        raise LedgerFormatError(f"{type(genesis).__name__} as first entry")
    key = bytes.fromhex(genesis.public_key) if public is None else public
    for entry in entries:
        check_signature(entry, key)
    # (4) and (5)
    history = _replay(entries)
    # (6)
    skipped = [] if pld else ["ε by privacy loss distributions: not asked for"]
    if _opacus_step(1.0, 1.0) is None:
        skipped.append("the second accountant: Opacus is not installed")
    scopes = tuple(_check_accountants(history.balance(name), pld) for name in history.scopes)
    if pld and any(scope.epsilon_pld is None for scope in scopes):
        skipped.append("ε by privacy loss distributions: too many steps, or too little noise, to compute it")
    return Verified(genesis, key, history, scopes, tuple(skipped))


# 1 Format


def read_export(data: bytes) -> tuple[list[Entry], SignedHead]:
    """The entries and the signed head of an export, each in the one spelling that `export_ledger` writes.

    Raises:
        LedgerFormatError: check 1 fails.
    """
    try:
        text = data.decode("ascii")
    except UnicodeDecodeError as error:
        raise LedgerFormatError(f"a byte that is not ASCII at {error.start}") from error
    lines = text.split("\n")
    if len(lines) < 4 or lines[0] != _HEADER or lines[-1]:
        raise LedgerFormatError(
            f"{len(lines) - 1} lines, the first {lines[0]!r:.80}: an export has a header, entries and a "
            "head, and ends with a line break"
        )
    return [_parse_entry(line) for line in lines[1:-2]], _parse_head(lines[-2])


def _parse_entry(line: str) -> Entry:
    try:
        fields = json.loads(line)
        body, digest, signature = canonical(fields["body"]), fields["hash"], fields["signature"]
        entry = Entry.read(body, bytes.fromhex(digest), bytes.fromhex(signature))
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise LedgerFormatError(f"{line!r:.120} ({type(error).__name__})") from error
    if entry.line() != line:
        raise LedgerFormatError(f"{line!r:.120} with another spelling or field")
    return entry


def _parse_head(line: str) -> SignedHead:
    try:
        head = SignedHead.decode(bytes.fromhex(json.loads(line)["head"]))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise LedgerFormatError(f"{line!r:.120} as last line, which must be the signed head") from error
    if canonical({"head": head.encode().hex()}) != line:
        raise LedgerFormatError(f"{line!r:.120} with another spelling or field")
    return head


# 4 Life cycle, 5 Filter


def _replay(entries: Iterable[Entry]) -> History:
    history = History()
    for entry in entries:
        history.apply(entry.record)
        match entry.record:
            case Scope(name) as scope:
                budget = filter_budget(scope.target_epsilon, scope.delta, scope.order)
                if not math.isclose(scope.budget, budget, rel_tol=_ROUNDING):
                    raise FilterError(
                        f"budget {scope.budget} of data source {name!r} where {budget} is right"
                    )
                _check_filter(history, name, entry.seq)
            case Reserve(charge=charge):
                _check_filter(history, charge.scope, entry.seq)
            case _:
                pass  # nothing else adds to what is spent
    return history


def _check_filter(history: History, name: str, seq: int) -> None:
    try:
        over = history.over_budget(name, 1 + _ROUNDING)
    except PrivacyError as error:
        raise FilterError(f"a charge without a bound in entry {seq}: {error}") from error
    if over is not None:
        raise FilterError(f"data source {over.name!r} over its budget at entry {seq}")


# 6 Accountants


@lru_cache(maxsize=4096)
def _opacus_step(sample_rate: float, noise_multiplier: float) -> tuple[float, ...] | None:
    """Rényi divergence of one step at each of `ORDERS`, not finite where Opacus finds none.

    None where Opacus is not installed: imported here because it brings all of torch.
    """
    try:
        from opacus.accountants.analysis import rdp as opacus
    except ImportError:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = opacus.compute_rdp(
            q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=list(ORDERS)
        )
    return tuple(float(value) for value in values)


def _second_epsilon(balance: Balance) -> float | None:
    """ε by Opacus. Raises AccountantsDisagreeError if an event costs another amount there.

    Events are compared at whole orders, where both sum one finite series. At the others dp-accounting
    adds up absolute values, so ours may lie above (0.7% at ε = 6, more beyond): never below.
    """
    steps = count_steps(balance.events)
    theirs = [0.0] * len(ORDERS)
    for (sample_rate, noise_multiplier), count in steps.items():
        step = _opacus_step(sample_rate, noise_multiplier)
        if step is None:
            return None
        for place, order in enumerate(ORDERS):
            cost = count * step[place]
            theirs[place] += cost
            own = rho({(sample_rate, noise_multiplier): count}, order)
            if order == int(order) and not math.isclose(cost, own, rel_tol=_AGREEMENT, abs_tol=_NOTHING):
                raise AccountantsDisagreeError(
                    f"a divergence of {own} and of {cost} at order {order:g} for {count} steps with "
                    f"sample_rate {sample_rate}, noise_multiplier {noise_multiplier}"
                )
    delta = balance.scope.delta
    found = (epsilon_at(r, order, delta) for r, order in zip(theirs, ORDERS, strict=True) if math.isfinite(r))
    return max(0.0, min(found, default=math.inf)) if steps else 0.0


def _epsilon_pld(balance: Balance) -> float | None:
    """ε by loss distributions; None where that would take minutes or gigabytes: a ledger can be made so.

    Where the usual grid is too coarse to stay below the Rényi bound, a finer one says who is right.
    """
    steps = count_steps(balance.events)
    if (
        sum(steps.values()) > _PLD_STEPS
        or len(steps) > _PLD_SETTINGS
        or any(noise < _PLD_NOISE for _, noise in steps)
        or balance.epsilon_rdp > _PLD_EPSILON
    ):
        return None
    found = balance.epsilon_pld
    if found > balance.epsilon_rdp * (1 + _AGREEMENT) + _NOTHING:
        found = min(found, balance.epsilon_pld_on(_FINE_GRID))
    return found


def _check_accountants(balance: Balance, pld: bool) -> ScopeReport:
    own, second = balance.epsilon_rdp, _second_epsilon(balance)
    others = {"Opacus": second, "privacy loss distributions": _epsilon_pld(balance) if pld else None}
    for name, other in others.items():
        if other is not None and other > own * (1 + _AGREEMENT) + _NOTHING:
            raise AccountantsDisagreeError(
                f"ε = {own} by Rényi divergences and {other} by {name} for data source {balance.scope.name!r}"
            )
    return ScopeReport(
        balance.scope,
        len(balance.reservations),
        balance.rho,
        own,
        second,
        others["privacy loss distributions"],
    )


# 7 Head, 8 Receipts


def check_head(head: SignedHead, site: int, last: Entry, key: bytes) -> None:
    """Check 7. Raises HeadError, HeadSignatureError."""
    if (head.site, head.seq, head.hash) != (site, last.seq, last.hash):
        raise HeadError(
            f"the head of entry {head.seq} of site {head.site} after entry {last.seq} of site {site}"
        )
    if not head.is_signed_by(key):
        raise HeadSignatureError("another signature on the last line")


def check_receipt(receipt: SignedHead, site: int, entries: Sequence[Entry], key: bytes) -> None:
    """Check 8. Raises ReceiptError, HeadWentBackError, ForkError."""
    if receipt.site != site or not receipt.is_signed_by(key):
        raise ReceiptError(f"a receipt of entry {receipt.seq} that site {site} has not signed")
    if receipt.seq > len(entries):
        raise HeadWentBackError(f"{len(entries)} entries where the site has signed {receipt.seq}")
    if entries[receipt.seq - 1].hash != receipt.hash:
        raise ForkError(f"another entry {receipt.seq} than the site has signed")


# 9 Claims


def check_claim(claim: Claim, history: History) -> float:
    """Check 9, and what the run has cost one record: the most among data sources that share no records.

    Raises:
        ClaimError: that is more than is claimed, or the run was never charged.
    """
    costs = []
    for name in history.scopes:
        charges = [r.charge for r in history.balance(name).reservations if r.charge.run == claim.run]
        if charges:
            costs.append(epsilon_rdp([event for c in charges for event in c.events], claim.delta))
    if not costs:
        raise ClaimError(f"no charge of run {claim.run!r}, for which ε = {claim.epsilon} is claimed")
    if (cost := max(costs)) > claim.epsilon * (1 + _ROUNDING):
        raise ClaimError(f"ε = {cost} for run {claim.run!r} where {claim.epsilon} is claimed")
    return cost
