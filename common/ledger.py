"""A site's privacy ledger: what an entry is, and what a chain of entries says. Pure: writes nothing.

An entry is a canonical JSON body that names the hash of the entry before it, the SHA-256 of that body,
and the site's Ed25519 signature of that hash. Everything else is replayed: the data sources ("scopes")
with their budgets, the reservations and their states. `common.ledger_replay` does that,
`client.ledger` writes entries, and `common.ledger_checks` lets anyone verify an export. Time decides
nothing, so no entry has one.

Unit: one training record. Neighbours: two data sets of which one has a record more (add-or-remove-one).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.errors import PrivacyError
from common.ledger_errors import ChainError, EntrySignatureError, LedgerFormatError
from common.privacy import ORDERS, SampledGaussianEvent
from common.secagg.keys import PUBLIC_BYTES, SIGNATURE_BYTES, IdentityKey, verify

VERSION = 1
HASH_BYTES = 32
UNIT = "record"
NEIGHBOURS = "add-or-remove-one"
NO_HASH = bytes(HASH_BYTES)  # what the first entry names as the one before it

# No label is the beginning of another, and each ends in a zero byte, so nothing that is signed or hashed
# for one purpose can stand for another. `common.ledger_head` has the third.
_ENTRY_HASH = b"confide/ledger/v1\0"
_ENTRY_SIGNATURE = b"confide/ledger-entry/v1\0"

MAX_NAME = 200  # characters of a name or digest
MAX_TEXT = 1_000_000  # characters of a policy or note
MAX_SITE = 2**32 - 1
MAX_NUMBER = 2**53  # the largest count that every JSON reader keeps exactly


# Values


def whole(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise PrivacyError(f"{name} must be a whole number in {low} .. {high}, found {value!r:.80}")


def _number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e300:
        raise PrivacyError(f"{name} must be a finite number > 0, found {value!r:.80}")


def _text(name: str, value: object, shortest: int = 1, longest: int = MAX_NAME) -> None:
    if not isinstance(value, str) or not shortest <= len(value) <= longest:
        raise PrivacyError(f"{name} must be text of {shortest} .. {longest} characters, found {value!r:.80}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise PrivacyError(f"{name} must be valid Unicode, found {value!r:.80}") from error


def _hex(name: str, value: object, size: int | None = None) -> None:
    """Lower case, so that one value has one text. `size` in bytes; None: up to 64."""
    count = f"{{{size}}}" if size is not None else "{1,64}"
    if not isinstance(value, str) or not re.fullmatch(rf"([0-9a-f]{{2}}){count}", value):
        raise PrivacyError(f"{name} must be lower-case hex of {size or '1 .. 64'} bytes, found {value!r:.80}")


@dataclass(frozen=True)
class Charge:
    """What a computation on `scope` will cost, and what it is for.

    context: hex of the hash of everything that the output depends on, noise included.
    model, plan: digests of the model sent in and of the training plan, as the site names them.
    events: every mechanism that is run; their costs add up.

    Raises:
        PrivacyError: on construction, when a value is out of its range.
    """

    scope: str
    run: str
    round: int
    context: str
    model: str
    plan: str
    events: tuple[SampledGaussianEvent, ...]

    def __post_init__(self) -> None:
        for name in ("scope", "run", "model", "plan"):
            _text(name, getattr(self, name))
        whole("round", self.round, 0, MAX_NUMBER)
        _hex("context", self.context)
        if not self.events or any(type(event) is not SampledGaussianEvent for event in self.events):
            raise PrivacyError(
                "a charge must have at least one event: a computation that costs nothing has no charge"
            )
        for event in self.events:
            if event.steps > MAX_NUMBER or event.batch_size > MAX_NUMBER:
                raise PrivacyError(f"steps and batch_size must be at most {MAX_NUMBER}, found {event}")


# Entries


@dataclass(frozen=True)
class Genesis:
    """The first entry: whose ledger this is. public_key: hex of the site's Ed25519 key."""

    site: int
    public_key: str
    version: int = VERSION

    def __post_init__(self) -> None:
        whole("site", self.site, 1, MAX_SITE)
        _hex("public_key", self.public_key, PUBLIC_BYTES)
        whole("version", self.version, VERSION, VERSION)


@dataclass(frozen=True)
class Scope:
    """A data source of the site and its budget, fixed for ever.

    A budget belongs to records, not to a run, a model or a content hash: editing one record must not mint
    budget. Opening a scope with no `inherits` is the site's signed statement that its records are in no
    other scope.

    target_epsilon, delta: the (ε, δ) that every record keeps. order: α* of the filter. budget: B, the
    Rényi divergence that may be spent at α*. inherits: the scopes that may hold some of its records.
    """

    name: str
    target_epsilon: float
    delta: float
    order: float
    budget: float
    inherits: tuple[str, ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        _text("scope", self.name)
        _number("target_epsilon", self.target_epsilon)
        _number("delta", self.delta)
        if self.delta >= 1:
            raise PrivacyError(f"delta must lie between 0 and 1, found {self.delta}")
        if self.order not in ORDERS:
            raise PrivacyError(
                f"the order must be one of the accountant's {len(ORDERS)}, found {self.order!r:.80}"
            )
        _number("budget", self.budget)
        for other in self.inherits:
            _text("an inherited scope", other)
        if len({self.name, *self.inherits}) != 1 + len(self.inherits):
            raise PrivacyError(f"inherited scopes must be distinct and others, found {self.inherits!r:.200}")
        _text("note", self.note, shortest=0, longest=MAX_TEXT)


@dataclass(frozen=True)
class Reserve:
    """The full cost, charged from here on. id: this entry's own number.

    repeatable: the noise is a function of `charge.context`, so that computing it again releases the same
    numbers, which is free. A deployed site never says so: whoever knows its noise could subtract it.
    """

    id: int
    charge: Charge
    repeatable: bool = False

    def __post_init__(self) -> None:
        whole("id", self.id, 1, MAX_NUMBER)
        if not isinstance(self.repeatable, bool):
            raise PrivacyError(f"repeatable must be true or false, found {self.repeatable!r:.80}")


@dataclass(frozen=True)
class Start:
    """From here on something may have been computed, so the charge can never be given back."""

    id: int

    def __post_init__(self) -> None:
        whole("id", self.id, 1, MAX_NUMBER)


@dataclass(frozen=True)
class Complete:
    """The one output of the reservation exists and is sealed. output_sha256: hex, of the sealed bytes."""

    id: int
    output_sha256: str

    def __post_init__(self) -> None:
        whole("id", self.id, 1, MAX_NUMBER)
        _hex("output_sha256", self.output_sha256, HASH_BYTES)


@dataclass(frozen=True)
class Cancel:
    """Nothing was computed: the charge is given back. Only before a start."""

    id: int

    def __post_init__(self) -> None:
        whole("id", self.id, 1, MAX_NUMBER)


@dataclass(frozen=True)
class Policy:
    """The rules that the site has pinned from here on, in full. sha256: hex, of the text in UTF-8."""

    text: str
    sha256: str

    def __post_init__(self) -> None:
        _text("policy", self.text, longest=MAX_TEXT)
        found = hashlib.sha256(self.text.encode()).hexdigest()
        if self.sha256 != found:
            raise PrivacyError(f"the policy's sha256 must be {found}, found {self.sha256!r:.80}")

    @classmethod
    def of(cls, text: str) -> Policy:
        _text("policy", text, longest=MAX_TEXT)
        return cls(text, hashlib.sha256(text.encode()).hexdigest())


Record = Genesis | Scope | Reserve | Start | Complete | Cancel | Policy


def _to_json(record: Record) -> dict[str, Any]:
    match record:
        case Genesis(site, public_key, version):
            return {"kind": "genesis", "site": site, "public_key": public_key, "version": version}
        case Scope(name, epsilon, delta, order, budget, inherits, note):
            terms = {"target_epsilon": epsilon, "delta": delta, "unit": UNIT, "neighbours": NEIGHBOURS}
            rule = {"order": order, "budget": budget, "inherits": list(inherits), "note": note}
            return {"kind": "open-scope", "scope": name, **terms, **rule}
        case Reserve(number, charge, repeatable):
            fields = {**vars(charge), "events": [event.to_json() for event in charge.events]}
            return {"kind": "reserve", "id": number, "repeatable": repeatable, **fields}
        case Start(number):
            return {"kind": "start", "id": number}
        case Complete(number, output):
            return {"kind": "complete", "id": number, "output_sha256": output}
        case Cancel(number):
            return {"kind": "cancel", "id": number}
        case Policy(text, sha256):
            return {"kind": "policy", "sha256": sha256, "text": text}


def _from_json(kind: object, data: Mapping[str, Any]) -> Record:
    """The constructors check every value, and `Entry.read` that nothing was left over or left out."""
    match kind:
        case "genesis":
            return Genesis(data["site"], data["public_key"], data["version"])
        case "open-scope":
            return Scope(
                data["scope"],
                data["target_epsilon"],
                data["delta"],
                data["order"],
                data["budget"],
                tuple(data["inherits"]),
                data["note"],
            )
        case "reserve":
            events = tuple(SampledGaussianEvent.from_json(event) for event in data["events"])
            named = {key: data[key] for key in ("scope", "run", "round", "context", "model", "plan")}
            return Reserve(data["id"], Charge(**named, events=events), data["repeatable"])
        case "start":
            return Start(data["id"])
        case "complete":
            return Complete(data["id"], data["output_sha256"])
        case "cancel":
            return Cancel(data["id"])
        case "policy":
            return Policy(data["text"], data["sha256"])
        case _:
            raise PrivacyError(f"no kind of entry is called {kind!r:.80}")


def canonical(data: Mapping[str, Any]) -> str:
    """The one JSON text of a value: sorted keys, no spaces, ASCII, floats by their shortest exact digits."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True)
class Entry:
    """One line of the chain. seq: from 1. prev, hash: 32 bytes. signature: 64 bytes."""

    seq: int
    prev: bytes
    record: Record
    body: str
    hash: bytes
    signature: bytes

    @classmethod
    def make(cls, previous: Entry | None, record: Record, identity: IdentityKey) -> Entry:
        """The next entry, signed."""
        seq, prev = (previous.seq + 1, previous.hash) if previous else (1, NO_HASH)
        body = _body(seq, prev, record)
        digest = _entry_hash(body)
        return cls(seq, prev, record, body, digest, identity.sign(_ENTRY_SIGNATURE + digest))

    @classmethod
    def read(cls, body: str, digest: bytes, signature: bytes) -> Entry:
        """Raises LedgerFormatError unless these are exactly the bytes that `make` would write."""
        try:
            data = json.loads(body)
            seq, prev = data["seq"], data["prev"]
            whole("seq", seq, 1, MAX_NUMBER)
            _hex("prev", prev, HASH_BYTES)
            record = _from_json(data["kind"], data)
            same = _body(seq, bytes.fromhex(prev), record) == body
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError, PrivacyError) as error:
            raise LedgerFormatError(f"{body!r:.120} ({type(error).__name__}: {error!s:.300})") from error
        if not same or len(digest) != HASH_BYTES or len(signature) != SIGNATURE_BYTES:
            raise LedgerFormatError(f"{body!r:.120} with another spelling, field or length")
        return cls(seq, bytes.fromhex(prev), record, body, digest, signature)

    def line(self) -> str:
        """The entry in an export."""
        return f'{{"body":{self.body},"hash":"{self.hash.hex()}","signature":"{self.signature.hex()}"}}'


def _body(seq: int, prev: bytes, record: Record) -> str:
    return canonical({"seq": seq, "prev": prev.hex(), **_to_json(record)})


def _entry_hash(body: str) -> bytes:
    return hashlib.sha256(_ENTRY_HASH + body.encode()).digest()


def check_link(previous: Entry | None, entry: Entry) -> None:
    """Raises ChainError unless `entry` is the one after `previous` and unchanged."""
    seq, prev = (previous.seq + 1, previous.hash) if previous else (1, NO_HASH)
    if entry.seq != seq:
        raise ChainError(f"number {entry.seq} where {seq} must be")
    if entry.prev != prev:
        raise ChainError(f"entry {seq} after another entry than {seq - 1}")
    if _entry_hash(entry.body) != entry.hash:
        raise ChainError(f"entry {seq} with another content than its hash says")


def check_signature(entry: Entry, public: bytes) -> None:
    """Raises EntrySignatureError unless the holder of `public` has signed this entry."""
    if not verify(public, _ENTRY_SIGNATURE + entry.hash, entry.signature):
        raise EntrySignatureError(f"a signature of entry {entry.seq} by another key, or of another entry")
