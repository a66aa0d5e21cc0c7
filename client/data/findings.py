"""What a check of a data file can find: fixed codes, how bad each is, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

WARNINGS_EXIT = 10  # of `confide client data check`: the worst finding is a warning
ERRORS_EXIT = 11  # the worst finding is an error


class Severity(Enum):
    ERROR = "error"  # training refuses the file, or learns something wrong from it
    WARNING = "warning"  # training goes on, and is worse or says more than it should
    NOTE = "note"  # worth knowing

    @property
    def rank(self) -> int:
        """0 is the worst."""
        return list(Severity).index(self)


class Code(Enum):
    """A kind of finding: its name in every output, its severity, and what to do."""

    # The file
    NO_RECORDS = ("no-records", Severity.ERROR, "Put records in the file, or point at another one.")
    UNREADABLE_ROW = (
        "unreadable-row",
        Severity.ERROR,
        "Correct the row by hand; the step drop-unreadable leaves such rows out.",
    )
    INVALID_UTF8 = (
        "invalid-utf8",
        Severity.ERROR,
        "Save the file as UTF-8; the step decode reads such lines in the encoding that you name.",
    )
    BYTE_ORDER_MARK = ("byte-order-mark", Severity.NOTE, "Harmless; any step of clean writes without it.")
    MIXED_NEWLINES = (
        "mixed-newlines",
        Severity.WARNING,
        "Files were joined, perhaps: look at where the line ends change. clean writes one kind.",
    )
    # Columns
    MISSING_COLUMN = (
        "missing-column",
        Severity.ERROR,
        "Name the right column (data.text, data.label, … or --text, --label, …), or add it.",
    )
    DUPLICATE_COLUMN = ("duplicate-column", Severity.ERROR, "Rename all but one of them.")
    EXTRA_COLUMN = (
        "extra-column",
        Severity.NOTE,
        "Training does not read it. Leave out what nobody needs, above all what identifies people.",
    )
    CONSTANT_COLUMN = (
        "constant-column",
        Severity.WARNING,
        "Nothing can be learnt from it: name another column, or look at how the file was made.",
    )
    MISSING_VALUE = ("missing-value", Severity.ERROR, "Fill it in, or remove the row.")
    WRONG_TYPE = ("wrong-type", Severity.ERROR, "Write text or a number there, or remove the row.")
    MIXED_TYPES = ("mixed-types", Severity.WARNING, "Write all values of the column in one way.")
    # Text
    EMPTY_TEXT = (
        "empty-text",
        Severity.WARNING,
        "Training leaves such rows out; so does the step drop-empty.",
    )
    OVER_LONG = (
        "over-long",
        Severity.WARNING,
        "Training leaves such rows out (data.max_characters): split them, or the step drop-long.",
    )
    CUT_OFF = ("cut-off", Severity.NOTE, "Raise model.max_length, or shorten them: the rest is not read.")
    SPARE_SPACE = ("spare-space", Severity.NOTE, "The step collapse-space.")
    REPLACEMENT = (
        "replacement-character",
        Severity.WARNING,
        "Export the data again as UTF-8: what stood there is lost, and no step brings it back.",
    )
    MOJIBAKE = ("mojibake", Severity.WARNING, "Export the data again as UTF-8, or the step fix-mojibake.")
    CONTROL = ("control-character", Severity.WARNING, "The step strip-invisible.")
    INVISIBLE = ("invisible-character", Severity.WARNING, "The step strip-invisible.")
    NOT_NFC = (
        "unnormalised-unicode",
        Severity.NOTE,
        "Training normalises to NFC, so nothing is lost; the step normalise-unicode does it in the file.",
    )
    HTML = ("html", Severity.WARNING, "The step strip-html.")
    # The same record again
    DUPLICATE = ("duplicate", Severity.WARNING, "The step drop-duplicates keeps the first of each.")
    NEAR_DUPLICATE = (
        "near-duplicate",
        Severity.WARNING,
        "Look at them: the same record told twice has twice the say, and only half the protection. The step "
        "drop-near-duplicates keeps the first of each.",
    )
    IN_TEST = (
        "in-test",
        Severity.WARNING,
        "The evaluation set is public: these records are no secret, and their scores say nothing. The step "
        "drop-in-test leaves them out.",
    )
    NEAR_TEST = ("near-test", Severity.NOTE, "Look at them, for the same reasons as in-test.")
    # Labels
    EMPTY_LABEL = ("empty-label", Severity.ERROR, "Label the row, or remove it.")
    UNKNOWN_LABEL = (
        "unknown-label",
        Severity.ERROR,
        "Correct it, add it to task.labels, or the step map-labels.",
    )
    LABEL_VARIANTS = ("label-variants", Severity.WARNING, "Write them in one way: the step map-labels.")
    RARE_LABEL = (
        "rare-label",
        Severity.WARNING,
        "Under privacy so few records teach next to nothing: merge labels, or collect more.",
    )
    IMBALANCE = ("imbalance", Severity.NOTE, "task.class_weights helps; look at macro F1, not at accuracy.")
    CONFLICT = (
        "conflicting-labels",
        Severity.WARNING,
        "Decide which one is right; the step drop-conflicts leaves all of them out.",
    )
    BAD_NUMBER = ("bad-number", Severity.ERROR, "Correct it, or widen task.range.")
    BAD_TAGS = ("bad-tags", Severity.ERROR, "One tag a word: correct the row.")
    BROKEN_ENTITY = ("broken-entity", Severity.WARNING, "An entity begins with B-: correct the tag.")
    BAD_TURNS = (
        "bad-turns",
        Severity.ERROR,
        "A system turn or none, then user and assistant by turns, the user first: up to the answer, or where "
        "there is no data.prompt a whole dialogue; each with role and content, and nothing else.",
    )
    NO_TEMPLATE = (
        "no-chat-template",
        Severity.ERROR,
        "Choose a model that was tuned on conversations, or mend its chat template.",
    )
    NO_ANSWER = (
        "no-answer",
        Severity.ERROR,
        "Questions without an answer are not supported: leave them out, or take SQuAD 1.1.",
    )
    BAD_ANSWER = ("bad-answer", Severity.ERROR, "The answer must stand in the context, word for word.")
    # People
    EMPTY_PERSON = ("empty-person", Severity.ERROR, "Fill in whose record it is, or remove the row.")
    SEVERAL_RECORDS = ("several-records-a-person", Severity.WARNING, "The step cap-person.")
    EMAIL = ("email", Severity.WARNING, "The step mask.")
    PHONE = ("phone", Severity.WARNING, "The step mask.")
    IBAN = ("iban", Severity.WARNING, "The step mask.")
    CARD = ("payment-card", Severity.WARNING, "The step mask.")
    NATIONAL_ID = ("national-id", Severity.WARNING, "The step mask.")
    IP_ADDRESS = ("ip-address", Severity.WARNING, "The step mask.")
    BIRTH_DATE = ("date-of-birth", Severity.WARNING, "The step mask.")
    NAME = (
        "person-name",
        Severity.NOTE,
        "Not every name is a secret. The step mask, with names among its kinds, takes them out.",
    )
    LABEL_PERSONAL = (
        "personal-data-in-label",
        Severity.ERROR,
        "Names of labels are public and stand in the model: privacy noise does not hide them. Relabel.",
    )

    def __init__(self, label: str, severity: Severity, remedy: str) -> None:
        self.label = label
        self.severity = severity
        self.remedy = remedy


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong in one column (or in the file).

    `rows` are numbers as an editor shows them: lines of a csv, tsv, jsonl or conll file, else records from 1;
    all of them, sorted. `says` holds personal data masked, and excerpts cut.
    """

    code: Code
    rows: tuple[int, ...]
    says: str
    column: str | None = None
    in_test: bool = False  # it is the test file that has it

    @property
    def severity(self) -> Severity:
        return self.code.severity

    def to_json(self) -> dict[str, Any]:
        return {
            "code": self.code.label,
            "severity": self.severity.value,
            "file": "test" if self.in_test else "train",
            "column": self.column,
            "rows": list(self.rows),
            "says": self.says,
            "do": self.code.remedy,
        }


def in_order(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The worst first, then by code and place."""
    order = {code: i for i, code in enumerate(Code)}
    return tuple(
        sorted(findings, key=lambda f: (f.severity.rank, order[f.code], f.in_test, f.column or "", f.rows))
    )


def exit_code(findings: Sequence[Finding]) -> int:
    worst = min((finding.severity.rank for finding in findings), default=Severity.NOTE.rank)
    return {Severity.ERROR.rank: ERRORS_EXIT, Severity.WARNING.rank: WARNINGS_EXIT}.get(worst, 0)


def listed_rows(rows: Sequence[int], most: int) -> str:
    """`3, 7–9 and 12 more`: runs drawn together, at most `most` runs."""
    runs: list[tuple[int, int]] = []
    for row in rows:
        if runs and row == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], row)
        else:
            runs.append((row, row))
    shown = ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs[:most])
    rest = sum(b - a + 1 for a, b in runs[most:])
    return f"{shown} and {rest:,} more" if rest else shown
