"""How many records each person has, and what that does to the promise made to them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from client.data.findings import Code, Finding
from client.data.sheet import Sheet

_BEARABLE = 8.0  # ε of a person that the proposed cap stays within, where one record allows it
EPSILON = 8.0  # of one record, where no configuration says it: privacy.target_epsilon's default


@dataclass(frozen=True)
class Cap:
    """At most `records` of each person: `kept` records stay, and a person has `epsilon` in all."""

    records: int
    kept: int
    epsilon: float


@dataclass(frozen=True)
class People:
    """counts: of each person's records, unordered; nobody is named."""

    counts: tuple[int, ...]
    epsilon: float  # of one record

    @property
    def most(self) -> int:
        return max(self.counts, default=0)

    @property
    def proposed(self) -> Cap:
        return self.cap(max(1, int(_BEARABLE / self.epsilon)))

    def cap(self, records: int) -> Cap:
        """Group privacy (Dwork & Roth 2014, theorem 2.2): k records are covered at k·ε; δ grows as well."""
        kept = sum(min(count, records) for count in self.counts)
        return Cap(records, kept, records * self.epsilon)

    @property
    def choices(self) -> tuple[Cap, ...]:
        sizes = {1, 2, 5, 10, self.proposed.records, self.most}
        return tuple(self.cap(size) for size in sorted(sizes) if size <= self.most)


def people_of(sheet: Sheet) -> People | None:
    """None: no person column was named, or it is not there."""
    if sheet.subject.person not in sheet.cells:
        return None
    names = (value.strip() for value in sheet.column(sheet.subject.person) if value)
    counts = Counter(name for name in names if name)
    return People(tuple(sorted(counts.values(), reverse=True)), sheet.subject.epsilon or EPSILON)


def people_findings(sheet: Sheet) -> Iterator[Finding]:
    people, column = people_of(sheet), sheet.subject.person
    if people is None or column is None:
        return
    rows: dict[str, list[int]] = defaultdict(list)
    empty: list[int] = []
    for number, value in zip(sheet.numbers, sheet.column(column), strict=True):
        if value is not None and not value.strip():
            empty.append(number)
        elif value is not None:
            rows[value.strip()].append(number)
    if empty:
        yield Finding(Code.EMPTY_PERSON, tuple(empty), f"{_rows(empty)} of nobody.", column)
    cap = people.proposed
    over = sorted(number for numbers in rows.values() if len(numbers) > 1 for number in numbers)
    if over:
        several = sum(count > 1 for count in people.counts)
        says = (
            f"{several:,} of {len(people.counts):,} people have several records, up to {people.most:,}. "
            f"Privacy is promised to a record: ε = {people.epsilon:g}. Whoever has {people.most:,} is "
            f"covered only at {people.most:,} × {people.epsilon:g} = {people.most * people.epsilon:g}. "
            f"Proposed: at most {cap.records} record{'s' if cap.records != 1 else ''} a person, "
            f"ε = {cap.epsilon:g} in all; "
            f"{cap.kept:,} of {sum(people.counts):,} records stay."
        )
        yield Finding(Code.SEVERAL_RECORDS, tuple(over), says, column)


def _rows(rows: Sequence[int]) -> str:
    return f"{len(rows):,} row{'s' if len(rows) != 1 else ''}"
