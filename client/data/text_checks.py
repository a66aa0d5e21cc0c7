"""What is wrong with texts: characters, lengths, personal data, and the same text again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from client.data.characters import FAULTS
from client.data.findings import Code, Finding
from client.data.near import near_duplicates
from client.data.personal import Personal, hits, veiled
from client.data.sheet import Sheet
from common.chat_template import TRAINING_DAY, answer_form, dialogue_ids
from common.errors import ModelError
from common.kinds import TaskKind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_EXAMPLES = 3
_BATCH = 1000  # records tokenised at a time: of each only the count is kept


@dataclass(frozen=True)
class Lengths:
    """Of prompt and text together, in characters or tokens. `beyond`: how many
    do not fit into `limit`: are dropped, or cut off."""

    unit: str
    least: int
    median: int
    most: int
    limit: int
    beyond: int


def lengths_of(unit: str, counts: Sequence[int], limit: int) -> Lengths:
    """counts: at least one."""
    ordered = sorted(counts)
    beyond = sum(count > limit for count in counts)
    return Lengths(unit, ordered[0], ordered[len(ordered) // 2], ordered[-1], limit, beyond)


def text_findings(sheet: Sheet) -> Iterator[Finding]:
    """Of one file alone."""
    yield from _empty(sheet)
    yield from _characters(sheet)
    yield from _long(sheet)
    yield from _constant(sheet)
    yield from _personal(sheet)
    yield from _again(sheet)


def _empty(sheet: Sheet) -> Iterator[Finding]:
    subject = sheet.subject
    texts = sheet.text if subject.columns.template is not None else sheet.column(subject.columns.text)
    rows = [n for n, text in zip(sheet.numbers, texts, strict=True) if text is not None and not text.strip()]
    if rows:
        yield _of(Code.EMPTY_TEXT, rows, "without text", _text_column(sheet))
    for name in subject.texts:
        if name in subject.columns.parts:
            continue
        cells = sheet.column(name)
        rows = [
            n for n, text in zip(sheet.numbers, cells, strict=True) if text is not None and not text.strip()
        ]
        if rows:
            yield _of(Code.EMPTY_TEXT, rows, "with nothing in it", name)


def _characters(sheet: Sheet) -> Iterator[Finding]:
    label = sheet.subject.columns.label
    for name in dict.fromkeys((*sheet.subject.texts, *([label] if label else []))):
        rows: dict[Code, list[int]] = defaultdict(list)
        for number, parts in zip(sheet.numbers, sheet.parts(name), strict=True):
            written = [part for part in parts if part.strip()]
            for fault in FAULTS:
                if any(map(fault.found, written)):
                    rows[fault.code].append(number)
        for fault in FAULTS:
            if rows[fault.code]:
                yield _of(fault.code, rows[fault.code], fault.says, name)


def _long(sheet: Sheet) -> Iterator[Finding]:
    limit = sheet.subject.max_characters
    rows = [n for n, texts in zip(sheet.numbers, sheet.records, strict=True) if sum(map(len, texts)) > limit]
    if rows:
        yield _of(Code.OVER_LONG, rows, f"longer than {limit:,} characters", _text_column(sheet))


def _constant(sheet: Sheet) -> Iterator[Finding]:
    label = sheet.subject.columns.label
    for name in dict.fromkeys((*sheet.subject.texts, *([label] if label else []))):
        values = {value for value in sheet.column(name) if value is not None}
        if len(values) == 1 and len(sheet) > 1:
            yield Finding(Code.CONSTANT_COLUMN, (), "Every row has the same value.", name)


def _personal(sheet: Sheet) -> Iterator[Finding]:
    label = sheet.subject.columns.label
    for name in sheet.subject.texts:
        rows: dict[Personal, list[int]] = defaultdict(list)
        shown: dict[Personal, list[str]] = defaultdict(list)
        for number, parts in zip(sheet.numbers, sheet.parts(name), strict=True):
            written = "\n".join(parts)
            for hit in hits(written):
                if rows[hit.kind][-1:] != [number]:
                    rows[hit.kind].append(number)
                    more = f" ({hit.what})" if hit.what != hit.kind.words else ""
                    shown[hit.kind].append(veiled(written, hit) + more)
        for kind in Personal:
            if rows[kind]:
                examples = "; ".join(shown[kind][:_EXAMPLES])
                yield _of(kind.code, rows[kind], f"with {kind.words}: {examples}", name)
    if label is not None and sheet.subject.classes:
        by_label: dict[str, list[int]] = defaultdict(list)
        for number, value in zip(sheet.numbers, sheet.label, strict=True):
            if value:
                by_label[value].append(number)
        found = {value: those for value in by_label if (those := hits(value))}
        if found:
            rows_ = sorted(number for value in found for number in by_label[value])
            examples = "; ".join(
                f"{veiled(v, h[0])} ({h[0].what})" for v, h in list(found.items())[:_EXAMPLES]
            )
            yield _of(Code.LABEL_PERSONAL, rows_, f"whose label shows personal data: {examples}", label)


def _again(sheet: Sheet) -> Iterator[Finding]:
    again = {sheet.numbers[i]: sheet.numbers[j] for i, j in duplicates(sheet.records, sheet.label).items()}
    if again:
        says = f"the same as an earlier one, label and all: {_pairs(again)}"
        yield _of(Code.DUPLICATE, list(again), says, _text_column(sheet))
    places: dict[tuple[str, ...], int] = {}
    for i, record in enumerate(sheet.records):
        if any(record):
            places.setdefault(record, i)  # exact copies are found already, or conflict
    numbers = [sheet.numbers[i] for i in places.values()]
    found = near_duplicates(list(places))
    near = {numbers[i]: numbers[j] for i, j in found.items() if j is not None}
    if near:
        says = f"nearly the same as an earlier one: {_pairs(near)}"
        yield _of(Code.NEAR_DUPLICATE, list(near), says, _text_column(sheet))


def duplicates(records: Sequence[tuple[str, ...]], labels: Sequence[str | None]) -> dict[int, int]:
    """Which records stand there before with the same label, and where. Empty ones are none."""
    first: dict[tuple[tuple[str, ...], str | None], int] = {}
    found: dict[int, int] = {}
    for i, (record, label) in enumerate(zip(records, labels, strict=True)):
        key = (record, label.strip() if label else label)
        if any(record) and first.setdefault(key, i) != i:
            found[i] = first[key]
    return found


def _pairs(pairs: dict[int, int]) -> str:
    shown = ", ".join(f"{a} as {b}" for a, b in list(pairs.items())[:_EXAMPLES])
    return shown + (f" and {len(pairs) - _EXAMPLES:,} more" if len(pairs) > _EXAMPLES else "")


def across_splits(train: Sheet, test: Sheet) -> Iterator[Finding]:
    """Records of `train` that stand in the public evaluation set, too."""
    public = {record for record in test.records if any(record)}
    same = [n for n, record in zip(train.numbers, train.records, strict=True) if record in public]
    if same:
        says = "found in the public evaluation set, too"
        yield _of(Code.IN_TEST, same, says, _text_column(train))
    others = [i for i, record in enumerate(train.records) if record not in public]
    found = near_duplicates([train.records[i] for i in others], sorted(public))
    near = [train.numbers[others[i]] for i, other in found.items() if other is None]
    if near:
        says = "nearly the same as one of the public evaluation set"
        yield _of(Code.NEAR_TEST, near, says, _text_column(train))


def token_findings(sheet: Sheet) -> tuple[Lengths | None, tuple[Finding, ...]]:
    """Lengths in the model's tokens, and rows of which it reads a part only. None: nothing is configured.

    Raises:
        ModelError: the model's tokenizer cannot be loaded.
    """
    model = sheet.subject.model
    if model is None or not len(sheet):
        return None, ()
    from common.models import load_tokenizer

    tokenizer = load_tokenizer(model)
    columns, causal = sheet.subject.columns, sheet.subject.kind is TaskKind.CAUSAL_LM
    refused: Mapping[str, Sequence[int]] = {}
    if columns.turns:
        try:
            tokens, refused = _turn_tokens(sheet, tokenizer, model.max_length)
        except ModelError as error:
            says = f"{model.name}: {error}."
            return None, (Finding(Code.NO_TEMPLATE, (), says, columns.conversations),)
    else:
        tokens = _tokens(sheet, tokenizer)
    findings = [
        _of(Code.BAD_TURNS, rows, says, columns.conversations or "") for says, rows in refused.items()
    ]
    counts = [sum(parts) for parts in tokens]
    rows = [n for n, parts in zip(sheet.numbers, tokens, strict=True) if _cut(sheet, parts, model.max_length)]
    lengths = replace(lengths_of("tokens", counts, model.max_length), beyond=len(rows))
    if rows:
        before = causal and (columns.prompt or columns.turns)
        more = ", or with more than half as many before the answer" if before else ""
        share = f"({len(rows) / len(counts):.1%})"
        says = f"of more than {model.max_length} tokens{more} {share}: their rest is not read"
        findings.append(_of(Code.CUT_OFF, rows, says, _text_column(sheet)))
    return lengths, tuple(findings)


def _tokens(sheet: Sheet, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, ...]]:
    """Of each record: tokens of its text, or of its prompt and of its text, as training counts them."""
    kind, columns = sheet.subject.kind, sheet.subject.columns
    pair = columns.prompt is not None and kind is not TaskKind.SEQ2SEQ
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    parts = [_counts(texts, tokenizer) for texts in zip(*sheet.records, strict=True)]
    if kind is TaskKind.CAUSAL_LM:
        parts[-1] = [count + 1 for count in parts[-1]]  # the end token
        start = 0 if tokenizer.bos_token_id is None else 1
        parts[0] = [count + start for count in parts[0]]
    elif kind is TaskKind.SEQ2SEQ:
        parts = [[count + special for count in part] for part in parts]
    else:
        parts[0] = [count + special for count in parts[0]]
    return list(zip(*parts, strict=True))


def _turn_tokens(
    sheet: Sheet, tokenizer: PreTrainedTokenizerBase, longest: int
) -> tuple[list[tuple[int, ...]], Mapping[str, Sequence[int]]]:
    """As `_tokens`, of conversations: up to the first answer, and from there; and the numbers of rows that
    cannot be trained on, by why.

    Raises:
        ModelError: the chat template cannot be used at all.
    """
    form = answer_form(tokenizer)
    counts: list[tuple[int, ...]] = []
    refused: dict[str, list[int]] = defaultdict(list)
    for number, (prompt, text) in zip(sheet.numbers, sheet.records, strict=True):
        ids: list[int] = []
        places = [0]
        try:
            if prompt:
                ids, places = dialogue_ids(tokenizer, prompt, text, form, TRAINING_DAY, longest)
        except ModelError as error:
            refused[f"that cannot be trained on: {error}"].append(number)
        counts.append((places[0], len(ids) - places[0]))
    return counts, refused


def _counts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    counts: list[int] = []
    for begin in range(0, len(texts), _BATCH):
        batch = list(texts[begin : begin + _BATCH])
        ids = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        counts += [len(one) for one in ids]
    return counts


def _cut(sheet: Sheet, parts: tuple[int, ...], longest: int) -> bool:
    """Whether training leaves out tokens of a record of so many."""
    match sheet.subject.kind:
        case TaskKind.CAUSAL_LM:
            return sum(parts) > longest or (len(parts) == 2 and parts[0] > longest // 2)
        case TaskKind.SEQ2SEQ:
            return max(parts) > longest
        case _:
            return sum(parts) > longest


def _text_column(sheet: Sheet) -> str:
    columns = sheet.subject.columns
    return columns.text if columns.template is None else ", ".join(columns.parts)


def _of(code: Code, rows: Sequence[int], says: str, column: str) -> Finding:
    return Finding(code, tuple(rows), f"{len(rows):,} row{'s' if len(rows) != 1 else ''} {says}.", column)
