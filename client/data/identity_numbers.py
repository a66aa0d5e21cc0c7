"""National identity numbers, by shape and check digit; python-stdnum knows how each is computed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module

_NEAR = 60  # characters before a number in which a word may say what it is
_SAYS_ID = r"\b(?:id|identity|national|insurance|social|security|tax|citizen|passport|personal)\b"


@dataclass(frozen=True)
class _Number:
    """`near`: the check is so weak, or the shape so common, that a word before it must say what it is."""

    name: str
    module: str | None  # of stdnum, whose is_valid decides; None: the shape decides
    shape: str
    near: str | None = None


_NUMBERS = (
    _Number("US social security number", "us.ssn", r"\d{3}-\d{2}-\d{4}"),
    _Number("German tax id", "de.idnr", r"\d{2} ?\d{3} ?\d{3} ?\d{3}"),
    _Number("French NIR", "fr.nir", r"[12] ?\d\d ?\d\d ?\d[\dAB] ?\d{3} ?\d{3} ?\d\d"),
    _Number("Spanish DNI", "es.dni", r"\d{8}-?[A-Z]"),
    _Number("Spanish NIE", "es.nie", r"[XYZ]-?\d{7}-?[A-Z]"),
    _Number("Italian codice fiscale", "it.codicefiscale", r"[A-Z]{6}\d{2}[A-Z]\d{2}[A-Z]\d{3}[A-Z]"),
    _Number("Swedish personnummer", "se.personnummer", r"(?:\d{2})?\d{6}[-+]\d{4}"),
    _Number("Finnish hetu", "fi.hetu", r"\d{6}[-+A]\d{3}[0-9A-Y]"),
    _Number("Danish CPR", "dk.cpr", r"\d{6}-\d{4}"),
    _Number("Norwegian fødselsnummer", "no.fodselsnummer", r"\d{6} ?\d{5}"),
    _Number("Polish PESEL", "pl.pesel", r"\d{11}"),
    _Number("Belgian national number", "be.nn", r"\d{2}[. ]?\d{2}[. ]?\d{2}[- ]?\d{3}[. ]?\d{2}"),
    _Number("Swiss AHV number", "ch.ssn", r"756[. ]?\d{4}[. ]?\d{4}[. ]?\d{2}"),
    _Number("Brazilian CPF", "br.cpf", r"\d{3}\.\d{3}\.\d{3}-\d{2}"),
    _Number("Irish PPS", "ie.pps", r"\d{7}[A-W][ABHWTX]?"),
    _Number("Korean RRN", "kr.rrn", r"\d{6}-\d{7}"),
    _Number("Chinese resident id", "cn.ric", r"\d{17}[\dX]"),
    _Number("Romanian CNP", "ro.cnp", r"\d{13}"),
    _Number("Mexican CURP", "mx.curp", r"[A-Z]{4}\d{6}[HM][A-Z]{5}[A-Z\d]\d"),
    _Number("UK national insurance number", None, r"[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?(?:\d\d ?){3}[A-D]"),
    _Number(
        "Dutch BSN", "nl.bsn", r"\d{4}[. ]?\d{2}[. ]?\d{3}|\d{3}[. ]?\d{3}[. ]?\d{3}", r"\bbsn\b|burger|sofi"
    ),
    _Number("UK NHS number", "gb.nhs", r"\d{3} \d{3} \d{4}|\d{10}", r"\bnhs\b"),
    _Number("Canadian SIN", "ca.sin", r"\d{3}[- ]?\d{3}[- ]?\d{3}", r"\bsin\b"),
    _Number("Portuguese NIF", "pt.nif", r"\d{3} ?\d{3} ?\d{3}", r"\bnif\b|contribuinte"),
    _Number("Austrian insurance number", "at.vnr", r"\d{4} ?\d{6}", r"\bsvnr\b|versicherung"),
    _Number("Australian TFN", "au.tfn", r"\d{3} ?\d{3} ?\d{3}", r"\btfn\b"),
    _Number("Indian Aadhaar", "in_.aadhaar", r"\d{4} ?\d{4} ?\d{4}", r"aadhaar"),
    _Number("Turkish identity number", "tr.tckimlik", r"\d{11}", r"kimlik|\bt\.?c\.?\b"),
    _Number("South African id", "za.idnr", r"\d{13}", r"south africa"),
)


@cache
def _compiled() -> tuple[tuple[_Number, re.Pattern[str], re.Pattern[str] | None, Callable[[str], bool]], ...]:
    found = []
    for number in _NUMBERS:
        shape = re.compile(rf"(?<![\w.+-])(?:{number.shape})(?![\w]|[-.]\d)")
        near = None if number.near is None else re.compile(f"{_SAYS_ID}|{number.near}", re.IGNORECASE)
        valid = (
            (lambda _: True) if number.module is None else import_module(f"stdnum.{number.module}").is_valid
        )
        found.append((number, shape, near, valid))
    return tuple(found)


def identity_numbers(text: str) -> Iterator[tuple[int, int, str]]:
    """Where each begins and ends in `text`, and what it is."""
    for number, shape, near, valid in _compiled():
        for match in shape.finditer(text):
            before = text[max(0, match.start() - _NEAR) : match.start()]
            if (near is None or near.search(before)) and valid(match.group()):
                yield match.start(), match.end(), number.name
