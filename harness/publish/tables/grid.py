"""A table ready to print: lines of entries, each with its source, and the footnotes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from harness.publish.tables.measured import Run
from harness.publish.tables.published import Row, Table

Source = Literal["published", "measured", "difference", "formula", "counted", "computed"]
"""Whose value it is. `computed`: by arithmetic from other numbers of the paper."""


class Mark(str):
    """The letter of a footnote, with the reason as its cell has it."""

    reason: str

    def __new__(cls, letter: str, reason: str) -> Mark:
        made = super().__new__(cls, letter)
        made.reason = reason
        return made


@dataclass(frozen=True)
class Entry:
    """One cell as it will be printed."""

    text: str
    """The number; `-` where there is none."""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    marks: tuple[Mark, ...] = ()
    """Letters of its footnotes, each a reason why it cannot be compared with the published cell."""
    best: bool = False
    outside: bool | None = None
    """Of a difference: whether it is outside the tolerance; None where nothing was, or may be, compared."""
    note: str = ""
    """What a verdict says beside the number."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Where it means something else than its line and column say, such as another unit."""

    def half_width(self) -> str:
        """Of the 95 % interval, as `±0.0100`; empty where there is none."""
        if self.low is None or self.high is None:
            return ""
        return f"±{(self.high - self.low) / 2:.{len(self.text.partition('.')[2])}f}"


MISSING = Entry("-")


@dataclass(frozen=True)
class Line:
    labels: tuple[str, ...]
    source: Source
    keys: Mapping[str, str]
    entries: tuple[Entry, ...]
    runs: tuple[Run | None, ...]
    """The run behind each entry."""
    ranked: bool = True
    """Whether its numbers can be best of their columns."""
    starts_block: bool = False

    @classmethod
    def printed(cls, table: Table, row: Row, labels: tuple[str, ...] | None = None) -> Line:
        """The row as the paper prints it."""
        entries = tuple(Entry(cell.text, cell.value, keys=cell.keys) for cell in row.cells)
        keys = {**table.keys, **row.keys}
        ranked = not row.counts_parameters
        return cls(labels or table.label(row), "published", keys, entries, (None,) * len(entries), ranked)


@dataclass
class Grid:
    table: Table
    lines: list[Line] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    """On what is measured."""
    errata: tuple[str, ...] = ()
    """On what is published."""
    _counts: dict[tuple[bool, str], list[int]] = field(default_factory=dict)
    """Of each footnote whether its reason begins with a number, what follows, and the numbers that were given."""

    def mark(self, reasons: Iterable[str]) -> tuple[Mark, ...]:
        """The letters of `reasons`: a, b, ... z, aa, ab, ... Reasons that differ only in how many have one."""
        letters = []
        for reason in reasons:
            count, space, rest = reason.partition(" ")
            counted = bool(space) and count.isdecimal()
            kind = (counted, rest if counted else reason)
            self._counts.setdefault(kind, []).extend([int(count)] if counted else [])
            letters.append(Mark(_letter(list(self._counts).index(kind)), reason))
        return tuple(letters)

    @property
    def footnotes(self) -> dict[str, str]:
        """Letter -> reason; of reasons that differ only in how many, from the least to the most."""
        return {
            _letter(n): f"{_span(counts)} {text}" if counted else text
            for n, ((counted, text), counts) in enumerate(self._counts.items())
        }

    def add(self, lines: Sequence[Line]) -> None:
        """Add a block of lines, such as those of one model."""
        self.lines += [replace(line, starts_block=n == 0 and bool(self.lines)) for n, line in enumerate(lines)]


def _letter(n: int) -> str:
    return (chr(96 + n // 26) if n >= 26 else "") + chr(97 + n % 26)


def _span(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"
