"""Measured minus published, and whether that is more than chance and rounding allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from harness.publish.tables.grid import MISSING, Entry, Grid, Line
from harness.publish.tables.published import decimals


@dataclass(frozen=True)
class Verdict:
    """What `harness table --check` says."""

    compared: int
    """Comparable cells."""
    outside: tuple[str, ...]
    """A line for each that is outside its tolerance."""


def difference(published: Line, measured: Line) -> Line | None:
    """The line of differences; None where no cell has both numbers."""
    entries = tuple(map(_difference, published.entries, measured.entries))
    if all(entry.value is None for entry in entries):
        return None
    keys = {**published.keys, **measured.keys}
    return Line(measured.labels, "difference", keys, entries, measured.runs, ranked=False)


def outside_tolerance(published: Entry, measured: Entry) -> bool:
    """Whether the published number is outside the measured 95 % interval by more than half its last printed digit.

    The tolerance is the interval alone: the papers print none. A number without an interval stands for one of width 0.
    """
    assert published.value is not None and measured.value is not None
    low = measured.value if measured.low is None else measured.low
    high = measured.value if measured.high is None else measured.high
    rounding = 0.5 * 10 ** -decimals(published.text) + 1e-12
    return not low - rounding <= published.value <= high + rounding


def verdict(grids: Sequence[Grid]) -> Verdict:
    """Of all cells that have both numbers and no dagger."""
    compared, outside = 0, []
    for grid in grids:
        for line in grid.lines:
            for column, entry in zip(grid.table.columns, line.entries, strict=True):
                compared += entry.outside is not None
                if entry.outside:
                    keys = {**column.keys, **line.keys, **entry.keys}
                    names = (keys.get(key) for key in ("model", "evaluator", "method", "task", "metric"))
                    where = " ".join(name for name in names if name)
                    outside.append(f"{grid.table.id} {where}: measured - published = {entry.text}, {entry.note}")
    return Verdict(compared, tuple(outside))


def _difference(published: Entry, measured: Entry) -> Entry:
    if published.value is None or measured.value is None:
        return MISSING
    digits = decimals(published.text)
    value = measured.value - published.value
    entry = Entry(f"{round(value, digits) + 0.0:+.{digits}f}", value, marks=measured.marks)  # + 0.0: no -0.0000
    if measured.marks:
        return entry
    interval = (
        "no interval" if measured.low is None else f"95 % {measured.low:.{digits}f} to {measured.high:.{digits}f}"
    )
    return replace(entry, outside=outside_tolerance(published, measured), note=f"{interval}, n={measured.n}")
