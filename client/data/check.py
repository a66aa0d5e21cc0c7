"""Check a data file: everything that is wrong with it, and what is in it. Nothing is changed or sent."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from client.data.findings import Code, Finding, in_order
from client.data.label_checks import class_counts, label_findings, labels_in_test
from client.data.people import People, people_findings, people_of
from client.data.personal import Personal, mask
from client.data.reading import RawFile, read_raw
from client.data.sheet import Sheet, headless, sheet_of
from client.data.subject import Subject
from client.data.text_checks import Lengths, across_splits, lengths_of, text_findings, token_findings


@dataclass(frozen=True)
class Checked:
    """What a check found. `lengths`: in characters, and in tokens where a model is configured."""

    subject: Subject
    raw: RawFile
    test: RawFile | None
    findings: tuple[Finding, ...]
    lengths: tuple[Lengths, ...]
    classes: Counter[str]
    people: People | None

    @property
    def columns(self) -> tuple[str, ...]:
        """Their names, but for those that may be a record's contents."""
        return () if headless(self.raw, self.subject) else self.raw.columns

    def _labels(self) -> dict[str, int]:
        """Records of each label; those that show personal data are masked, and counted together."""
        shown: Counter[str] = Counter()
        for name, count in self.classes.items():
            shown[mask(name, tuple(Personal))] += count
        return dict(shown.most_common())

    def to_json(self) -> dict[str, Any]:
        people = None
        if self.people is not None:
            people = {
                "people": len(self.people.counts),
                "most_records": self.people.most,
                "epsilon_a_record": self.people.epsilon,
                "caps": [vars(cap) for cap in self.people.choices],
                "proposed_cap": self.people.proposed.records,
            }
        return {
            "file": str(self.raw.path),
            "sha256": self.raw.sha256,
            "rows_read": len(self.raw.rows),
            "row_numbers_count": f"{self.raw.unit}s",
            "test": None if self.test is None else str(self.test.path),
            "columns": list(self.columns),
            "lengths": [vars(lengths) for lengths in self.lengths],
            "labels": self._labels(),
            "people": people,
            "findings": [finding.to_json() for finding in self.findings],
        }


def check(subject: Subject) -> Checked:
    """Look at the subject's file, and at the public evaluation set beside it.

    Raises:
        DataError: a file is not there, or is no data file at all.
        ModelError: the configured tokenizer cannot be loaded.
    """
    raw = read_raw(subject.train)
    sheet, findings = _of_one(raw, subject)
    tokens, cut = token_findings(sheet)
    findings += cut
    test = None
    if subject.test is not None:
        test = read_raw(subject.test)
        other, beside = _of_one(test, replace(subject, person=None))
        if subject.columns.turns:
            beside += tuple(f for f in token_findings(other)[1] if f.code is Code.BAD_TURNS)
        findings += tuple(replace(finding, in_test=True) for finding in beside)
        findings += tuple(across_splits(sheet, other))
        findings += tuple(labels_in_test(sheet, other))
    characters = [sum(map(len, record)) for record in sheet.records]
    lengths = [lengths_of("characters", characters, subject.max_characters)] if characters else []
    return Checked(
        subject=subject,
        raw=raw,
        test=test,
        findings=in_order(findings),
        lengths=tuple(lengths + ([tokens] if tokens else [])),
        classes=class_counts(sheet),
        people=people_of(sheet),
    )


def _of_one(raw: RawFile, subject: Subject) -> tuple[Sheet, tuple[Finding, ...]]:
    """Everything that can be said of one file without the other."""
    sheet, types = sheet_of(raw, subject)
    return sheet, (
        *raw.findings,
        *types,
        *text_findings(sheet),
        *label_findings(sheet),
        *people_findings(sheet),
    )
