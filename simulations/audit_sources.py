"""Where ledgers are found, and what they are held against: files, a site's folder, the folder of a run.

Everything is read and nothing written.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from client.identity import SiteFolder
from client.ledger_reader import SQLITE_MAGIC, read_entries
from client.ledger_witness import Witness
from common.errors import ConfigError
from common.identity import fingerprint, is_named_by
from common.ledger import Entry, Genesis
from common.ledger_checks import Claim, read_export
from common.ledger_errors import ClaimError, LedgerFormatError, LedgerStorageError, WitnessError
from common.ledger_head import SignedHead
from common.privacy import epsilon_text
from common.roster import OtherAuthorityError, SignedRoster, load_roster
from server.receipts import read_receipts
from server.record import RunFolder
from simulations.audit_types import Check, Outcome, RunClaims, Source, Terms

MAX_EXPORT_BYTES = 256 * 1024 * 1024

_CLAIM = re.compile(r"\((\d+\.\d{3}), ([0-9.e+-]+)\)-differentially private")
_PLD = re.compile(r"(\d+\.\d{3}) by privacy loss distributions")
_DELTA = re.compile(r"\bdelta = ([0-9.e+-]+)")


# Ledgers


def find_sources(paths: Sequence[Path], run: Path | None) -> tuple[list[Source], RunFolder | None]:
    """The ledgers in `paths`, or those of the run's own sites if there is none; and the run's folder.

    Raises:
        ConfigError: a path is not there, or holds nothing of the kind.
    """
    sources: list[Source] = []
    for path in paths:
        place = SiteFolder(path)
        if place.ledger.is_file():
            sources.append(_witnessed_source(place.ledger, place.witness, None))
        elif path.is_dir() and run is None and _is_run(path):
            run = path
        elif path.is_file():
            sources.append(_file_source(path))
        else:
            raise ConfigError(
                f"{path} is no export, no ledger, and no folder of a site or of one run: check it"
            )
    if run is None:
        return sources, None
    if not _is_run(run):
        raise ConfigError(f"{run} is not the folder of a run: it has no roster, receipts or summary")
    folder = RunFolder(run)
    return sources or _site_sources(folder), folder


def _is_run(path: Path) -> bool:
    folder = RunFolder(path)
    return any(file.is_file() for file in (folder.summary, folder.receipts, folder.roster))


def _file_source(path: Path) -> Source:
    return Source(str(path), functools.partial(_read, path))


def _read(path: Path) -> tuple[Sequence[Entry], SignedHead | None]:
    try:
        with path.open("rb") as file:
            data = file.read(len(SQLITE_MAGIC))
            if data == SQLITE_MAGIC or path.suffix == ".sqlite":
                file.close()  # nothing else may have a file open while SQLite has it
                return read_entries(path), None
            data += file.read(MAX_EXPORT_BYTES)
    except OSError as error:
        raise LedgerStorageError(f"{path}: {error.strerror}") from error
    if len(data) > MAX_EXPORT_BYTES:
        raise LedgerFormatError(f"{path} with more than {MAX_EXPORT_BYTES:,} bytes")
    return read_export(data)


def _site_sources(folder: RunFolder) -> list[Source]:
    """One for each site of the roster, and for each ledger that there is besides."""
    roster = load_roster(folder.roster, None) if folder.roster.is_file() else None
    sites = set(roster.keys) if roster else set()
    for place in folder.path.glob("sites/*"):
        site = int(place.name) if place.name.isdecimal() else 0
        if site and place == folder.site(site) and folder.ledger(site).exists():
            sites.add(site)
    return [_site_source(folder, site) for site in sorted(sites)]


def _site_source(folder: RunFolder, site: int) -> Source:
    path = folder.ledger(site)
    if not path.exists():
        return Source(str(path), None, site)
    return _witnessed_source(path, folder.witness(site, "ledger"), site)


def _witnessed_source(path: Path, witness: Path, site: int | None) -> Source:
    """A ledger's file, held against the newest head in its witness."""
    seen: list[SignedHead | WitnessError] = []

    def read() -> tuple[Sequence[Entry], SignedHead | None]:
        entries = read_entries(path)
        genesis = entries[0].record if entries else None
        if isinstance(genesis, Genesis):
            try:
                public = bytes.fromhex(genesis.public_key)
                head = Witness(witness, ledger=path, site=genesis.site, public=public).newest()
            except WitnessError as error:
                seen.append(error)
            else:
                seen.extend([head] if head else [])
                if head is not None and head.seq > len(entries):
                    entries = read_entries(path)  # the site has gone on in between
        return entries, None

    def kept(_: int, key: bytes) -> Sequence[SignedHead]:
        for one in seen:
            if isinstance(one, WitnessError):
                raise one
        return [one for one in seen if isinstance(one, SignedHead)]

    return Source(str(path), read, site, kept)


# What they are held against


def read_terms(
    folder: RunFolder | None,
    *,
    own_sites: bool,
    roster: Path | None,
    authority: str | None,
    receipts: Path | None,
    claims: Sequence[str],
    pld: bool,
) -> Terms:
    """All that was given, and of a run's folder all that was not. own_sites: its sites' ledgers are audited.

    Raises:
        ConfigError, ProtocolError, CheckpointError: something is not what it should be.
    """
    signed, confirmed = _read_roster(roster, authority, folder)
    if receipts is not None and not receipts.is_file():
        raise ConfigError(f"{receipts} is not there: --receipts must be the server's receipts.jsonl")
    if receipts is None and folder is not None and folder.receipts.is_file():
        receipts = folder.receipts
    if folder is None:
        run, no_claim, about_run = None, "no claim given", list[Check]()
    else:
        run, no_claim, about_run = read_claims(folder, alone=own_sites)
    return Terms(
        roster=signed,
        confirmed=confirmed,
        receipts=None if receipts is None else read_receipts(receipts),
        claims=[read_claim(text) for text in claims],
        run=run,
        no_claim=no_claim,
        about_run=about_run,
        pld=pld,
    )


def _read_roster(
    path: Path | None, authority: str | None, folder: RunFolder | None
) -> tuple[SignedRoster | None, bool]:
    if path is None and folder is not None and folder.roster.is_file():
        path = folder.roster
    if path is None:
        if authority is not None:
            raise ConfigError("--authority says who has signed a roster: give it with --roster")
        return None, False
    roster = load_roster(path, None)
    if authority is not None and not is_named_by(roster.authority, authority):
        raise OtherAuthorityError(
            f"{path} is signed by the authority {fingerprint(roster.authority)}, not by the one given: ask "
            "the federation's people, over a channel of your own, which is theirs"
        )
    return roster, authority is not None


def read_claim(text: str) -> Claim:
    """RUN_ID:EPSILON:DELTA. Raises ConfigError."""
    run, *numbers = text.rsplit(":", 2)
    try:
        epsilon, delta = map(float, numbers)
    except ValueError:
        epsilon, delta = math.nan, math.nan
    if not (run and 0 <= epsilon < math.inf and 0 < delta < 1):
        raise ConfigError(f"--claim expects RUN_ID:EPSILON:DELTA, as 12ab:8.0:1e-5, found {text!r:.100}")
    return Claim(run, epsilon, delta)


# What a run's folder claims


def read_claims(folder: RunFolder, *, alone: bool) -> tuple[RunClaims | None, str, list[Check]]:
    """The claim of summary and model card; or why there is none; and whether they say the same."""
    if not folder.summary.is_file():
        return None, "no summary.json: the run has not ended", []
    try:
        summary = json.loads(folder.summary.read_bytes())
        private, statement = summary["private"], summary["privacy_statement"]
        if not isinstance(private, bool) or not isinstance(statement, str):
            raise TypeError("private, privacy_statement")
        claims = _claims(summary, alone) if private else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return None, "summary.json cannot be read", [_differ(f"no claim in summary.json ({error})")]
    except ClaimError as error:
        return None, "summary.json contradicts itself", [_failed(error)]
    try:
        files = _compare(folder, statement, claims)
    except ClaimError as error:
        return claims, "the run claims no privacy", [_failed(error)]
    said = f"says the same as {' and '.join(files)}" if files else "has no model card beside it"
    outcome = Outcome.PASSED if len(files) == 2 else Outcome.PARTLY
    return claims, "the run claims no privacy", [Check(9, outcome, f"summary.json {said}")]


def _failed(error: ClaimError) -> Check:
    return Check(9, Outcome.FAILED, f"{error.rule}, found {error.found}", type(error).__name__)


def _differ(found: str) -> Check:
    return _failed(ClaimError(found))


def _claims(summary: dict[str, Any], alone: bool) -> RunClaims:
    def number(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise TypeError(f"{value!r:.80} is no ε or δ")
        return float(value)

    run = summary.get("run_id")
    if run is not None and not isinstance(run, str):
        raise TypeError("run_id")
    by_site = {int(site): number(value) for site, value in summary["epsilon_by_site"].items()}
    epsilon, delta = number(summary["epsilon_rdp_max"]), number(summary["delta"])
    if not 0 < delta < 1:
        raise ValueError("delta")
    for site, value in by_site.items():
        if value > epsilon:
            raise ClaimError(f"ε = {value} for site {site} in summary.json, and at most {epsilon} for all")
    return RunClaims(run, epsilon, number(summary["epsilon_pld_max"]), delta, by_site, alone)


def _compare(folder: RunFolder, statement: str, claims: RunClaims | None) -> list[str]:
    """Which texts were compared with summary.json, whose numbers are `claims`. Raises ClaimError."""
    _check_sentence("summary.json", statement, claims)
    found = []
    card, described = folder.adapter / "README.md", folder.adapter / "confide.json"
    if card.is_file():
        text = card.read_text("utf-8", errors="replace")
        if text.count(statement) != 1:
            raise ClaimError(f"{text.count(statement)} times the sentence of summary.json in the model card")
        rest = text.replace(statement, "")
        if stray := re.search(r".*(differentially private|ε|epsilon =).*", rest):
            raise ClaimError(f"another claim in the model card: {stray.group().strip()!r:.120}")
        if claims is not None and set(_DELTA.findall(rest)) != {f"{claims.delta:g}"}:
            raise ClaimError(f"another delta in the model card than {claims.delta:g}")
        found.append("the model card")
    if described.is_file():
        try:
            said = json.loads(described.read_bytes())["privacy"]
        except (ValueError, TypeError, KeyError, RecursionError):
            said = None
        if said != statement:
            raise ClaimError(f"{said!r:.120} in adapter/confide.json, another sentence than in summary.json")
        found.append("adapter/confide.json")
    return found


def _check_sentence(where: str, text: str, claims: RunClaims | None) -> None:
    expected = (
        ([(epsilon_text(claims.epsilon), f"{claims.delta:g}")], [epsilon_text(claims.pld)])
        if claims is not None
        else ([], [])
    )
    said = _CLAIM.findall(text), _PLD.findall(text)
    if said != expected:
        raise ClaimError(f"{text!r:.120} in {where}, whose numbers are {expected[0] + expected[1]}")
