"""How the cells of a file become the strings of a table.

What a record holds stands in no message, since messages end up in logs: they tell its file, row and column,
and the kind of what was found there.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

from common.errors import CellError, DataError
from common.images import image_text

IMAGES = "images"  # in place of what joins lists: the text is an image
_SHOWN = 40  # characters of a name that may stand in a message
_DIGITS = 18  # of a place in a text, at most
_LISTED = 10  # names that a message lists before it says "and N more"


@dataclass(frozen=True)
class Cell:
    """Where a value stands, for messages."""

    path: Path
    row: int
    column: str

    def fault(self, expected: str, found: str, hint: str = "Correct the row, or remove it.") -> CellError:
        where = f"{self.path}, row {self.row}, column {short(self.column)}"
        return CellError(f"{where}: expected {expected}, found {found}. {hint}", expected)


def value_of(value: object, cell: Cell) -> str:
    """A cell as a string. What it held is not shown when it is refused."""
    match value:
        case str():
            if not value.isascii():
                try:
                    value.encode("utf-8")
                except UnicodeEncodeError:  # "\ud800" in JSON: no tokenizer takes it
                    raise _unusable(cell, "half a surrogate pair") from None
            return value
        case bool() | int():
            return str(value)
        case float() if math.isnan(value):
            raise _unusable(cell, "NaN")
        case float() if math.isinf(value):
            raise _unusable(cell, "an infinity")
        case float():
            return str(int(value)) if value.is_integer() else str(value)
        case _:
            raise _unusable(cell, type_name(value))


def filled(value: object, cell: Cell) -> str:
    """A cell that must hold something: without a label or a group a record cannot be placed."""
    found = value_of(value, cell)
    if not found.strip():
        raise _unusable(cell, "an empty value")
    return found


def text_of(
    cells: Mapping[str, object], template: str | None, column: str, joint: str | None, cell: Cell
) -> str:
    """The text of a record: of one column, or put together by a template. A null in a template is empty."""
    if joint == IMAGES:
        try:
            return image_text(cells[column], cell.path.parent)
        except DataError as error:
            where = f"{cell.path}, row {cell.row}, column {short(column)}"
            raise DataError(f"{where}: {error}. Correct the row, or remove it.") from None
    if template is None:
        value = cells[column]
        return (
            _joined(value, joint, cell) if joint == " " and isinstance(value, list) else value_of(value, cell)
        )
    made = ""
    for literal, name, _, _ in Formatter().parse(template):
        made += literal
        if name is not None and cells[name] is not None:
            made += value_of(cells[name], Cell(cell.path, cell.row, name))
    return made


def label_of(value: object, joint: str | None, cell: Cell) -> str:
    """A label; where the task takes several, a list of them or one string with `joint` between them."""
    if joint in (" ", "|") and isinstance(value, list):
        return _joined(value, joint, cell)
    if joint == "|":  # any number of labels: none, too
        return "" if value is None else value_of(value, cell)
    return filled(value, cell)


def _joined(values: list[object], joint: str, cell: Cell) -> str:
    items = [value_of(value, cell) for value in values]
    what = "white space" if joint == " " else f"a {joint!r}"
    for item in items:
        if joint in item or not item.strip() or (joint == " " and len(item.split()) != 1):
            found = f"one of {characters(item)} with it" if item.strip() else "an empty one"
            raise cell.fault(f"a list of words without {what} in them", found)
    return joint.join(items)


def span_of(text: str, value: object, start: object, cell: Cell) -> tuple[str, int]:
    """The answer and the character of `text` at which it begins.

    `value` is the answer, or an object as in SQuAD with lists `text` and `answer_start`: the first of each
    counts. Without a start the answer is where it first occurs.
    """
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = {name: [value[0].get(name)] for name in ("text", "answer_start")}
    if answerless(value):
        raise cell.fault(
            "an answer (questions without one, as SQuAD 2 has them, are not supported)",
            "none",
            "Leave such questions out, or take SQuAD 1.1; `confide client data check` lists their rows.",
        )
    if isinstance(value, dict):
        texts, starts = value.get("text"), value.get("answer_start")
        if not (isinstance(texts, list) and isinstance(starts, list) and texts and starts):
            raise cell.fault(
                "an answer, or an object with lists text and answer_start",
                "no answer in it",
                "Leave questions out that have none.",
            )
        value, start = texts[0], starts[0]
    answer = filled(value, cell)
    blanks = len(answer) - len(answer.lstrip())  # in front of the answer: no part of it
    if start is None:
        place = text.find(answer.strip())
        if place < 0:
            found = f"one of {characters(answer)} that does not"
            raise cell.fault("an answer that stands in the context word for word", found)
        return answer.strip(), place
    digits = value_of(start, cell).strip()
    if not digits.isdecimal() or len(digits) > _DIGITS:
        found = f"text of {characters(digits)} that is none"
        raise cell.fault("the place where the answer begins, a whole number from 0", found)
    place = int(digits)
    if text[place : place + len(answer)] != answer:
        near = text.find(answer)
        hint = f"It stands at character {near}, counted from 0." if near >= 0 else "It stands nowhere in it."
        expected = f"the answer, of {characters(answer)}, at character {place} of the context"
        raise cell.fault(expected, "other text", hint)
    return answer.strip(), place + blanks


def answerless(value: object) -> bool:
    """Whether a cell says, in the form of SQuAD 2, that its question has no answer."""
    return value == [] or (isinstance(value, dict) and value.get("text") == [])


def template_fields(template: str) -> tuple[str, ...]:
    """The columns that a template names, each once.

    Raises:
        DataError: it is malformed, or a field is not a plain name.
    """
    try:
        fields = [field for _, field, spec, conversion in Formatter().parse(template) if field is not None]
        plain = all(not spec and not conversion for _, _, spec, conversion in Formatter().parse(template))
    except ValueError as error:
        raise DataError(
            f"data.template is malformed: {error}. Write {{{{ for a brace that is text."
        ) from None
    if not plain or any(not field or set(field) & set(".[]") for field in fields):
        raise DataError(
            "data.template may hold names of columns in braces, and nothing else in the braces, found "
            f"{short(template)}"
        )
    return tuple(dict.fromkeys(fields))


def _unusable(cell: Cell, found: str) -> DataError:
    return DataError(unusable(cell.path, cell.row, cell.column, found))


def unusable(path: Path, row: int, column: str, found: str) -> str:
    return (
        f"{path}, row {row}, column {short(column)}: expected text or a number, found {found}. "
        "Fill it in, or remove the row."
    )


def type_name(value: object) -> str:
    return "null" if value is None else f"a value of type {type(value).__name__}"


# Words for messages


def other_delimiter(header: Sequence[str], delimiter: str) -> str:
    """What to do where a header is one field, since another mark stands between fields; else nothing."""
    marks = (mark for mark in ";\t,|" if mark != delimiter and len(header) == 1 and mark in header[0])
    other = next(marks, None)
    return "" if other is None else f"The header holds {other!r}: expected {delimiter!r} between fields."


def quoting_fault(error: Exception, lines: int) -> str:
    """What is wrong with the quotes of a record that was read on for `lines` beyond its first."""
    if "end of data" in str(error):
        return "a quote that opens in it is never closed"
    if lines > 0:
        return "a quote that opens in it goes on over lines, and text follows where the next quote closes it"
    return f"the quoting is broken ({error})"


def short(name: str) -> str:
    """A name, as of a column, quoted and cut to `_SHOWN` characters. Not for what a cell holds."""
    return repr(name if len(name) <= _SHOWN else name[: _SHOWN - 1] + "…")


def characters(value: str) -> str:
    """How long what a cell holds is: that much may be told."""
    return f"{len(value):,} character{'' if len(value) == 1 else 's'}"


def listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(map(short, names[:_LISTED])) + more if names else "none"


def nearest(name: str, names: Sequence[str]) -> str | None:
    by_fold = {other.casefold(): other for other in names if len(other) <= 4 * _SHOWN}
    near = difflib.get_close_matches(name.casefold()[: 4 * _SHOWN], list(by_fold), n=1)
    return by_fold[near[0]] if near else None
