"""Personal data in a text, by rules: found, and masked.

What rules cannot see: names that are in no list, addresses, illnesses, what somebody is recognised by. A text
without a finding here is not anonymous.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from client.data.findings import Code
from client.data.given_names import GIVEN_NAMES
from client.data.identity_numbers import identity_numbers


class Personal(Enum):
    """What is looked for; the value names it in a recipe. Where two overlap, the first here counts."""

    EMAIL = ("email", "[EMAIL]", Code.EMAIL, "an e-mail address")
    IBAN = ("iban", "[IBAN]", Code.IBAN, "a bank account's IBAN")
    NATIONAL_ID = ("national-id", "[ID]", Code.NATIONAL_ID, "a national identity number")
    CARD = ("payment-card", "[CARD]", Code.CARD, "a payment card's number")
    BIRTH_DATE = ("date-of-birth", "[DATE]", Code.BIRTH_DATE, "a date of birth")
    IP_ADDRESS = ("ip-address", "[IP]", Code.IP_ADDRESS, "an IP address")
    PHONE = ("phone", "[PHONE]", Code.PHONE, "a telephone number")
    NAME = ("name", "[NAME]", Code.NAME, "a person's name, it seems")

    def __init__(self, label: str, tag: str, code: Code, words: str) -> None:
        self.label = label
        self.tag = tag
        self.code = code
        self.words = words


@dataclass(frozen=True)
class Hit:
    """Characters `start` to `end` of a text. `what`: more exactly, if more is known."""

    kind: Personal
    start: int
    end: int
    what: str


def hits(text: str, kinds: Collection[Personal] = tuple(Personal)) -> list[Hit]:
    """In the order of the text; none overlaps another."""
    found: list[Hit] = []
    for kind in Personal:
        for start, end, what in _RULES[kind](text) if kind in kinds else ():
            at = bisect_left(found, start, key=lambda hit: hit.start)
            apart = at == 0 or found[at - 1].end <= start
            if apart and (at == len(found) or end <= found[at].start):
                found.insert(at, Hit(kind, start, end, what or kind.words))
    return found


def mask(text: str, kinds: Collection[Personal]) -> str:
    """`text` with a tag such as [EMAIL] in place of each hit."""
    return mask_parts([text], kinds)[0]


def mask_parts(parts: Sequence[str], kinds: Collection[Personal]) -> list[str]:
    """The same for a text in several parts, such as turns, found as they are read: one after the other."""
    text, found = "\n".join(parts), []
    these, begin = hits(text, kinds), 0
    for part in parts:
        end, at, pieces = begin + len(part), begin, []
        for hit in these:
            if hit.start < end and hit.end > begin:
                pieces += [text[at : max(hit.start, begin)], hit.kind.tag]
                at = min(hit.end, end)
        found.append("".join([*pieces, text[at:end]]))
        begin = end + 1
    return found


def veiled(text: str, hit: Hit) -> str:
    """A hit that may be shown: two characters at most, the others as dots."""
    shown = text[hit.start : hit.end]
    keep = 1 if len(shown) < 8 else 2
    return shown[:keep] + re.sub(r"\w", "•", shown[keep:24])


# The rules. Each has bounds on its repetitions: a line may be as long as a file.

_Found = Iterator[tuple[int, int, str]]

_EMAIL = re.compile(r"(?<![\w.+%-])[\w.+%-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}", re.UNICODE)
_IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}(?!\w)")
_CARD = re.compile(r"(?<![\w.-])[2-6](?:[ -]?\d){12,18}(?![\w-])")
_IP = re.compile(r"(?<![\w.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\w]|\.\d)")
_MONTH = (
    r"(?:jan|feb|mar|mär|apr|may|mai|jun|jul|aug|sep|oct|okt|nov|dec|dez|"
    r"juin|juil|août|enero|abril|mayo|ago|dic)"
)
_DATE = (
    rf"(?:\d{{1,2}}[./-]\d{{1,2}}[./-](?:\d{{4}}|\d{{2}})|\d{{4}}-\d{{2}}-\d{{2}}"
    rf"|\d{{1,2}}(?:st|nd|rd|th|\.)? {_MONTH}\w{{0,6}}\.?,? \d{{4}}"
    rf"|{_MONTH}\w{{0,6}}\.? \d{{1,2}}(?:st|nd|rd|th)?,? \d{{4}})"
)
_BIRTH = re.compile(
    r"\b(?:born|d\.?o\.?b\.?|date of birth|birth ?da(?:te|y)|geboren|"
    r"geb\.|geburtsdatum|née?|nacid[oa]|nat[oa]|geboortedatum)"
    rf"\W{{0,4}}(?:\w{{1,12}}\W{{1,3}}){{0,3}}?(?P<it>{_DATE})(?!\d)",
    re.IGNORECASE,
)
_PHONES = (
    re.compile(r"(?<![\w+])(?:\+|00)[1-9](?:[ ()./-]{0,3}\d){7,13}(?![\w])"),
    re.compile(r"(?<![\w+.-])(?:1[ .-])?\(?[2-9]\d{2}\)?[ .-]{1,2}\d{3}[ .-]\d{4}(?![\w-])"),
    re.compile(r"(?<![\w+.,-])\(?0[1-9]\d{1,4}\)?(?: ?[/-] ?| )\d{3,8}(?:[ -]\d{2,5}){0,3}(?![\w-])"),
    re.compile(r"(?<![\w+.,-])0[1-9](?:[ .]\d{2}){4}(?![\w.-])"),
    re.compile(
        r"\b(?:phone|telephone|tel|call|mobile|cell|fax|whatsapp|telefon|handy|téléphone|teléfono|móvil)\b\W{1,3}"
        r"(?:\w{1,12}\W{1,3}){0,3}?(?P<it>\d(?:[ -]?\d){5,12})(?![\w])",
        re.IGNORECASE,
    ),
)
_WORD = r"[A-ZÀ-ÖØ-ÞŁŚŠŽČ][a-zà-öø-ÿłśšžčěřůńąęćźż]+(?:[-'’][A-ZÀ-ÖØ-Þ][a-zà-öø-ÿ]+)?"
_TITLED = re.compile(
    r"\b(?:Mr|Mrs|Ms|Miss|Dr|Prof|Professor|Herrn?|Frau|Mme|Mlle|Monsieur|Madame|Señora?|Sra?|Sig|Signora?|Mevrouw|"
    rf"Patient|Patientin)\b\.?:? (?:(?:Dr|Prof)\. )?(?P<it>{_WORD}(?: [A-Z]\.)?(?: {_WORD}){{0,2}})"
)
_INTRODUCED = re.compile(
    r"\b(?:[Mm]y name is|[Mm]y name's|I am called|[Ii]ch heiße|[Mm]ein Name ist|"
    r"[Jj]e m'appelle|[Mm]e llamo|[Mm]i chiamo|"
    rf"[Ii]k heet|[Nn]ame:|[Nn]ame of (?:the )?patient:?) (?P<it>{_WORD}(?: {_WORD}){{0,2}})"
)
_PAIR = re.compile(rf"(?<![\w-])(?P<it>(?P<given>{_WORD})(?: [A-Z]\.)?(?: {_WORD}){{1,2}})(?!\w)")


def _all(pattern: re.Pattern[str], text: str) -> _Found:
    for match in pattern.finditer(text):
        start, end = match.span("it") if "it" in pattern.groupindex else match.span()
        yield start, end, ""


def _emails(text: str) -> _Found:
    return _all(_EMAIL, text) if "@" in text else iter(())


def _digits(text: str) -> bool:
    return any(digit in text for digit in "0123456789")


def _ibans(text: str) -> _Found:
    from stdnum import iban

    for match in _IBAN.finditer(text) if _digits(text) else ():
        groups = match.group().split(" ")
        while groups:  # words in capitals may follow
            number = " ".join(groups)
            if iban.is_valid(number, check_country=False):
                yield match.start(), match.start() + len(number), ""
                break
            groups.pop()


def _identities(text: str) -> _Found:
    return identity_numbers(text) if _digits(text) else iter(())


def _cards(text: str) -> _Found:
    from stdnum import luhn

    for match in _CARD.finditer(text) if _digits(text) else ():
        if luhn.is_valid(re.sub("[ -]", "", match.group())):
            yield match.start(), match.end(), ""


def _births(text: str) -> _Found:
    return _all(_BIRTH, text) if _digits(text) else iter(())


def _addresses(text: str) -> _Found:
    return _all(_IP, text) if text.count(".") >= 3 and _digits(text) else iter(())


def _phones(text: str) -> _Found:
    for pattern in _PHONES if _digits(text) else ():
        yield from _all(pattern, text)


def _names(text: str) -> _Found:
    yield from _all(_TITLED, text)
    yield from _all(_INTRODUCED, text)
    for match in _PAIR.finditer(text):
        if match["given"].casefold() in GIVEN_NAMES:
            yield *match.span("it"), ""


_RULES = {
    Personal.EMAIL: _emails,
    Personal.IBAN: _ibans,
    Personal.NATIONAL_ID: _identities,
    Personal.CARD: _cards,
    Personal.BIRTH_DATE: _births,
    Personal.IP_ADDRESS: _addresses,
    Personal.PHONE: _phones,
    Personal.NAME: _names,
}
