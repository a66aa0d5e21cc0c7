"""Rules for personal data: what they find, what they leave alone, and what they show of it."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.data.personal import Personal, hits, mask, veiled

FOUND = [
    ("write to j.doe+x@mail.example.co.uk.", "write to [EMAIL]."),
    ("IBAN GB82 WEST 1234 5698 7654 32 OK", "IBAN [IBAN] OK"),
    ("card 5500-0000-0000-0004 please", "card [CARD] please"),
    ("SSN 536-90-4399", "SSN [ID]"),
    ("IdNr 36 574 261 809", "IdNr [ID]"),
    ("mijn BSN is 111222333", "mijn BSN is [ID]"),
    ("NIR 2 95 10 99 126 111 93", "NIR [ID]"),
    ("DNI 54362315K", "DNI [ID]"),
    ("codice RCCMNL83S18D969H", "codice [ID]"),
    ("PESEL 44051401359", "PESEL [ID]"),
    ("personnummer 880320-0016", "personnummer [ID]"),
    ("CPR 211062-5629", "CPR [ID]"),
    ("AHV 756.9217.0769.85", "AHV [ID]"),
    ("CPF 390.533.447-05", "CPF [ID]"),
    ("NINO QQ 12 34 56 C or AB123456C", "NINO QQ 12 34 56 C or [ID]"),
    ("NHS 943 476 5870", "NHS [ID]"),
    ("call +49 (0)30 1234567 or 0176 12345678", "call [PHONE] or [PHONE]"),
    ("(555) 234-5678", "[PHONE]"),
    ("tel.: 06 12 34 56 78", "tel.: [PHONE]"),
    ("my mobile number is 5550199", "my mobile number is [PHONE]"),
    ("geboren am 3. März 1961 in Bern", "geboren am [DATE] in Bern"),
    ("DOB: 1961-03-12", "DOB: [DATE]"),
    ("from 198.51.100.7", "from [IP]"),
    ("I saw Maria Lopez and Mr. Kowalski", "I saw [NAME] and Mr. [NAME]"),
    ("ich heiße Grünwald", "ich heiße [NAME]"),
]


@pytest.mark.parametrize(("text", "masked"), FOUND)
def test_found_and_masked(text: str, masked: str) -> None:
    assert mask(text, tuple(Personal)) == masked
    assert mask(masked, tuple(Personal)) == masked


@pytest.mark.parametrize(
    "text",
    [
        "order 123456789, invoice 2024-00017, 12.03.1961",
        "version 10.2.1, at 10:30 on 2024-01-02, pages 100-200",
        "536-00-4399 is none, nor 4111 1111 1111 1112, nor DE00 3714 1144 1532 1131 11",
        "1706659200000 ms, 1,000,000.00 and 20240131",
        "me@home, a@b, @someone, half@ and #topic",
        "New York and May Day; Grace period; Will Power",
        "room 0123, chapter 0 12, 00 in all",
    ],
)
def test_left_alone(text: str) -> None:
    assert hits(text) == []


def test_only_the_kinds_that_are_asked_for() -> None:
    text = "jane@example.org, +44 20 7946 0958"
    assert mask(text, (Personal.PHONE,)) == "jane@example.org, [PHONE]"
    assert mask(text, ()) == text


def test_what_may_be_shown_is_two_characters() -> None:
    text = "SSN 536-90-4399"
    (hit,) = hits(text)
    assert hit.what == "US social security number"
    assert veiled(text, hit) == "53•-••-••••"


@given(st.text() | st.lists(st.sampled_from([text for text, _ in FOUND]), max_size=4).map(" ".join))
def test_hits_are_in_order_and_apart(text: str) -> None:
    found = hits(text)
    assert all(one.end <= other.start for one, other in pairwise(found))
    assert all(0 <= hit.start < hit.end <= len(text) for hit in found)
