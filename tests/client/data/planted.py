"""A data file in which each row is sound, and faults planted one by one into a copy of it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from client.data.findings import Code

LABELS = ("card", "loan", "transfer")
_WHAT = (
    "the branch at the harbour closed before noon",
    "nobody answered when I wrote about the fee",
    "my statement shows a purchase that I never made",
    "the app asks for the same code again and again",
    "how long does it take until money arrives abroad",
    "I would like to raise the limit before travelling",
    "the machine kept everything and returned nothing",
    "which documents are needed to open a second account",
    "interest was charged although all was repaid in time",
    "the letter came to an address where I moved out",
)
_WHEN = ("last winter", "since spring", "on a rainy evening", "during the holidays")


@dataclass
class Record:
    text: object
    label: object
    person: object

    def cells(self) -> dict[str, object]:
        return {"text": self.text, "label": self.label, "person": self.person}


def sound() -> list[Record]:
    """40 records without a fault: a person each, no two alike, labels often enough."""
    texts = [
        f"{when[0].upper()}{when[1:]} {what}, {extra}."
        for when, extra in zip(_WHEN, ("please help", "what now", "thanks", "is that usual"), strict=True)
        for what in _WHAT
    ]
    return [Record(text, LABELS[i % 3], f"p{i:03d}") for i, text in enumerate(texts)]


def as_csv(records: Iterable[Record], quoting: Literal[0, 1] = csv.QUOTE_MINIMAL) -> bytes:
    """Record i stands in line i + 2."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n", quoting=quoting)
    writer.writerow(["text", "label", "person"])
    writer.writerows([record.text, record.label, record.person] for record in records)
    return text.getvalue().encode()


def as_jsonl(records: Iterable[Record]) -> bytes:
    """Record i stands in line i + 1."""
    return b"".join(json.dumps(record.cells(), ensure_ascii=False).encode() + b"\n" for record in records)


def _text(text: object) -> Callable[[Record], None]:
    def plant(record: Record) -> None:
        record.text = text

    return plant


def _label(label: object) -> Callable[[Record], None]:
    def plant(record: Record) -> None:
        record.label = label

    return plant


def _person(person: object) -> Callable[[Record], None]:
    def plant(record: Record) -> None:
        record.person = person

    return plant


_SOUND = sound()
_AGAIN, _LIKE, _OTHER, _PUBLIC, _NEAR_PUBLIC = 1, 2, 4, 5, 6  # records that faults refer to

# What is planted in which record: the code that must name it, and how. Of both forms of file.
PLANTED: dict[int, tuple[Code, Callable[[Record], None]]] = {
    10: (Code.EMPTY_TEXT, _text("")),
    11: (Code.EMPTY_TEXT, _text("   \t ")),
    12: (Code.MOJIBAKE, _text("The cafÃ© next door said that the terminal wasnâ€™t theirs.")),
    13: (Code.REPLACEMENT, _text("My name is spelled M\ufffdller on the card, which is wrong.")),
    14: (Code.CONTROL, _text("The message ended in \x07 a strange way after the update.")),
    15: (Code.INVISIBLE, _text("Some\u200bone hid a character within this complaint here.")),
    16: (Code.NOT_NFC, _text("The resume\u0301 was attached to a request for a mortgage.")),
    17: (Code.HTML, _text("<p>Copied from a web page &amp; never tidied up by anybody</p>")),
    18: (Code.SPARE_SPACE, _text("  Two blanks   in a row and some at both ends of it ")),
    19: (Code.OVER_LONG, _text("A very long story. " * 1200)),
    20: (Code.DUPLICATE, lambda r: (_text(_SOUND[_AGAIN].text)(r), _label(_SOUND[_AGAIN].label)(r))[0]),
    21: (Code.NEAR_DUPLICATE, _text(str(_SOUND[_LIKE].text).replace("please help", "please, help!"))),
    22: (Code.CONFLICT, lambda r: (_text(_SOUND[_OTHER].text)(r), _label("transfer")(r))[0]),
    23: (Code.LABEL_VARIANTS, _label("Card")),
    24: (Code.LABEL_VARIANTS, _label(" loan")),
    25: (Code.RARE_LABEL, _label("mortgage")),
    26: (Code.EMAIL, _text("Write to jane.roe@example.org as soon as you know more.")),
    27: (Code.PHONE, _text("I can be reached at +44 20 7946 0958 in the afternoon.")),
    28: (Code.IBAN, _text("Send it back to DE89 3704 0044 0532 0130 00 instead.")),
    29: (Code.CARD, _text("It was charged to 4111 1111 1111 1111 on the same day.")),
    30: (Code.NATIONAL_ID, _text("They asked for 536-90-4399 although it is none of their business.")),
    31: (Code.NATIONAL_ID, _text("Meine Steuer-ID lautet 86095742719, bitte tragen Sie sie ein.")),
    32: (Code.NAME, _text("A clerk called Dr. Anna Schmidt refused to give any reason.")),
    33: (Code.BIRTH_DATE, _text("The holder, born on 12.03.1961, has since moved abroad.")),
    34: (Code.IP_ADDRESS, _text("Someone logged in from 203.0.113.77 while nobody was home.")),
    35: (Code.LABEL_PERSONAL, _label("jane.roe@example.org")),
    36: (Code.EMPTY_LABEL, _label("")),
    37: (Code.EMPTY_PERSON, _person("")),
    38: (Code.SEVERAL_RECORDS, _person("p000")),
    _PUBLIC: (Code.IN_TEST, lambda r: None),
    _NEAR_PUBLIC: (Code.NEAR_TEST, lambda r: None),
}


def planted() -> list[Record]:
    records = sound()
    for place, (_, plant) in PLANTED.items():
        plant(records[place])
    return records


def public(records: list[Record]) -> list[Record]:
    """An evaluation set that has one of `records`, and one that is nearly the same."""
    near = str(records[_NEAR_PUBLIC].text).upper() + "!!"
    own = [
        Record(f"Question number {word} is asked by nobody else", "card", "")
        for word in ("one", "two", "six")
    ]
    own[1].text, own[2].text = (
        "Something quite different stands in this row",
        "And this row has its own words too",
    )
    return [*own, Record(records[_PUBLIC].text, records[_PUBLIC].label, ""), Record(near, "loan", "")]


def write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path
