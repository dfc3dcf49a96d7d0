"""Grids as text: terminal, Markdown and LaTeX in the paper's layout, CSV and JSON with one entry a cell."""

from __future__ import annotations

import csv
import io
import json
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest
from typing import Any

from tabulate import tabulate

from harness.files.shown import csv_cell, one_line
from harness.files.shown import markdown as text
from harness.publish.tables.grid import MISSING, Entry, Grid, Line
from harness.publish.tables.published import Column

LABEL = 32
"""Letters of a label before it goes on below."""


def terminal(grids: Sequence[Grid], color: bool, width: int) -> str:
    """A line for each of a model's rows; tables wider than `width` are folded between tasks."""
    return "\n\n".join("\n".join(_terminal_lines(grid, color, width)) for grid in grids)


def _terminal_lines(grid: Grid, color: bool, width: int) -> Iterator[str]:
    left = _left_columns(grid)
    space = width - sum(2 + len(rows[0]) for rows in left)
    columns = _terminal_columns(grid, color)
    yield from textwrap.wrap(_title(grid), width)
    for panel in _panels(grid, [column.width for column in columns], space):
        if grid.lines and all(line.entries[i] == MISSING for line in grid.lines for i in panel):
            continue
        yield ""
        shown = [columns[i] for i in panel]
        if any(grid.table.columns[i].group for i in panel):
            heads = [
                group.ljust(sum(2 + columns[i].width for i in places) - 2) for group, places in _groups(grid, panel)
            ]
            yield "  ".join([*(" " * len(rows[0]) for rows in left), *heads]).rstrip()
        yield "  ".join([*(rows[0] for rows in left), *(column.head for column in shown)]).rstrip()
        yield "  ".join("-" * n for n in [*(len(rows[0]) for rows in left), *(column.width for column in shown)])
        above = ""
        for n, line in enumerate(grid.lines):
            if all(line.entries[i] == MISSING for i in panel):
                continue
            if len(line.labels) > 1 and line.labels[0] != above:
                yield from ["", line.labels[0]] if above else [line.labels[0]]
                above = line.labels[0]
            elif line.starts_block and len(grid.table.row_keys) > 1:
                yield ""
            yield "  ".join([*(rows[n + 1] for rows in left), *(column.cells[n] for column in shown)]).rstrip()
            if left[0][n + 1].strip():
                yield from textwrap.wrap(line.labels[-1], LABEL)[1:]
    yield ""
    for note in notes_of(grid, "bold" if color else "*", [_samples(grid)]):
        yield from textwrap.wrap(note, width, subsequent_indent="   " if note[:1].isdigit() else "")


@dataclass(frozen=True)
class _Column:
    head: str
    cells: list[str]
    """All as wide as the head."""

    @property
    def width(self) -> int:
        return len(self.head)


def _terminal_columns(grid: Grid, color: bool) -> list[_Column]:
    """All columns, the last of a group as wide as the group's name asks for."""
    columns = [_terminal_column(grid, i, color) for i in range(len(grid.table.columns))]
    for group, places in _groups(grid, range(len(columns))):
        lacking = len(group) - sum(2 + columns[i].width for i in places) + 2
        if lacking > 0:
            last = columns[places[-1]]
            columns[places[-1]] = _Column(last.head + " " * lacking, [cell + " " * lacking for cell in last.cells])
    return columns


def _groups(grid: Grid, places: Iterable[int]) -> list[tuple[str, list[int]]]:
    """Neighbours that stand under one name; a column without a name stands alone."""
    columns = grid.table.columns
    groups = (list(group) for _, group in groupby(places, key=lambda i: columns[i].group or i))
    return [(columns[group[0]].group, group) for group in groups]


def _terminal_column(grid: Grid, place: int, color: bool) -> _Column:
    """The entries of one column, `±` under `±`. The width is that without colour codes."""
    entries = [line.entries[place] for line in grid.lines]
    numbers = [
        entry.text + ("*" if entry.best and not color else "!" if entry.outside else "") + _dagger(own)
        for entry, line in zip(entries, grid.lines, strict=True)
        for own in [[mark for mark in entry.marks if mark not in _shared_marks(line)]]
    ]
    halves = [entry.half_width().replace("±0.", "±.") for entry in entries]
    widest = max(map(len, numbers), default=0)
    if any(len(number) == widest and half and number[-1] != "*" for number, half in zip(numbers, halves, strict=True)):
        widest += 1
    cells = [number.ljust(widest) + half for number, half in zip(numbers, halves, strict=True)]
    head = grid.table.columns[place].head
    width = max(map(len, [head, *(cell.rstrip() for cell in cells)]))
    cells = [cell.rstrip().ljust(width) for cell in cells]
    if color:
        bold = [entry.best for entry in entries]
        cells = [
            f"\x1b[1m{entry.text}\x1b[0m{cell[len(entry.text) :]}" if best else cell
            for entry, cell, best in zip(entries, cells, bold, strict=True)
        ]
    return _Column(head.ljust(width), cells)


def _left_columns(grid: Grid) -> list[list[str]]:
    """The last label and the source of each line, below their heads. A label that the line above gave is left blank."""
    labels: list[str] = []
    above: tuple[str, ...] = ()
    for line in grid.lines:
        labels.append("" if line.labels == above else textwrap.wrap(line.labels[-1], LABEL)[0])
        above = line.labels
    sources = [f"{line.source} {_dagger(_shared_marks(line))}".rstrip() for line in grid.lines]
    columns = [[grid.table.printed("row_keys", grid.table.row_keys[-1]), *labels]]
    if any(line.source != "published" for line in grid.lines):
        columns.append(["Value", *sources])
    return [[text.ljust(max(map(len, column))) for text in column] for column in columns]


def _shared_marks(line: Line) -> list[str]:
    """The footnotes that all entries of the line have; they stand beside its source."""
    marked = [entry.marks for entry in line.entries if entry.text != "-" or entry.marks]
    return [mark for mark in (marked[0] if marked else ()) if all(mark in marks for marks in marked)]


def _panels(grid: Grid, widths: Sequence[int], space: int) -> Iterator[list[int]]:
    """Column numbers that fit side by side; those of one task stay together where they fit at all."""

    def wide(columns: Sequence[int]) -> bool:
        return sum(2 + widths[i] for i in columns) > space

    groups = [places for _, places in _groups(grid, range(len(widths)))]
    panel: list[int] = []
    for part in (part for group in groups for part in ([[i] for i in group] if wide(group) else [group])):
        if panel and wide([*panel, *part]):
            yield panel
            panel = []
        panel += part
    yield panel


def _samples(grid: Grid) -> str:
    """How many samples the measured cells are means over: what is usual of a model, and where it is otherwise."""
    texts = []
    for model, block in groupby(grid.lines, key=lambda line: line.labels[0] if len(line.labels) > 1 else ""):
        counts: dict[str, dict[str, int]] = {}
        for line in block:
            for column, entry in zip(grid.table.columns, line.entries, strict=True):
                if entry.n and line.source == "measured":
                    counts.setdefault(column.group, {}).setdefault(line.labels[-1], entry.n)
        usual = {group: Counter(of.values()).most_common(1)[0][0] for group, of in counts.items()}
        if not usual:
            continue
        same = len(set(usual.values())) == 1
        parts = [f"{n}" if same else f"{n} ({group})" for group, n in usual.items()][: 1 if same else None]
        parts += [
            f"{label} {group} {n}".replace("  ", " ")
            for group, of in counts.items()
            for label, n in of.items()
            if n != usual[group]
        ]
        texts.append(f"{model.partition(' (')[0]} {', '.join(parts)}".strip())
    return f"n of measured cells: {'; '.join(texts)}." if texts else ""


def markdown(grids: Sequence[Grid]) -> str:
    def cell(entry: Entry) -> str:
        return _in_line(f"**{text(entry.text)}**" if entry.best else entry.text.replace("|", "\\|"), entry)

    def draw(grid: Grid) -> str:
        header = [text(head, inside=True) for head in (*_row_heads(grid), *map(_head, grid.table.columns))]
        body = [
            [*(text(label, inside=True) for label in labels), *map(cell, line.entries)]
            for line, labels in zip(grid.lines, _labels(grid), strict=True)
        ]
        notes = [f"{text(note, inside=True)}  " for note in notes_of(grid, "bold")]
        return "\n".join([f"### {text(_title(grid))}", "", _tabulate(body, header, "github"), "", *notes])

    return "\n\n".join(draw(grid).rstrip() for grid in grids)


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "±": r"$\pm$",
    "×": r"$\times$", "†": r"$\dagger$", "≤": r"$\leq$", "‰": r"\textperthousand{}",
}  # fmt: skip


def latex(grids: Sequence[Grid]) -> str:
    def tex(text: str) -> str:
        return "".join(_LATEX.get(letter, letter) for letter in text)

    def cell(entry: Entry) -> str:
        number = tex(entry.text)
        return tex(_in_line("@", entry)).replace("@", rf"\textbf{{{number}}}" if entry.best else number)

    def draw(grid: Grid) -> str:
        header = [tex(head) for head in [*_row_heads(grid), *map(_head, grid.table.columns)]]
        body = [
            [*map(tex, labels), *map(cell, line.entries)]
            for line, labels in zip(grid.lines, _labels(grid), strict=True)
        ]
        notes = [f"% {one_line(note)}" for note in (_title(grid), *notes_of(grid, "bold"))]
        return "\n".join([*notes, _tabulate(body, header, "latex_raw")])

    return "\n\n".join(draw(grid) for grid in grids)


def as_json(grids: Sequence[Grid]) -> str:
    tables = [
        {
            "id": grid.table.id,
            "title": grid.table.title,
            "place": grid.table.place,
            "errata": grid.errata,
            "remarks": grid.remarks,
            "cells": list(_cells(grid)),
        }
        for grid in grids
    ]
    return json.dumps(tables, indent=1, ensure_ascii=False)


def rows(grids: Sequence[Grid]) -> list[dict[str, Any]]:
    """A row a number, with the keys of its line and column."""
    return [{"table": grid.table.id, **cell} for grid in grids for cell in _cells(grid)]


def as_csv(grids: Sequence[Grid]) -> str:
    lines = rows(grids)
    names = list(dict.fromkeys(name for line in lines for name in line))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {k: csv_cell("; ".join(v) if isinstance(v, list) else v) for k, v in line.items()} for line in lines
    )
    return out.getvalue().rstrip("\n")


FORMATS: Mapping[str, Callable[[Sequence[Grid]], str]] = {
    "md": markdown, "csv": as_csv, "json": as_json, "latex": latex,
}  # fmt: skip
"""Besides `terminal`, which alone depends on where it is shown."""


def _cells(grid: Grid) -> list[dict[str, Any]]:
    return [
        {
            **line.keys,
            **column.keys,
            **line.keys,  # a row's keys come first, and hold where its columns say otherwise
            **entry.keys,
            "source": line.source,
            "printed": entry.text,
            "value": entry.value,
            "low": entry.low,
            "high": entry.high,
            "n": entry.n,
            "best": entry.best,
            "outside_tolerance": entry.outside,
            "not_comparable": [mark.reason for mark in entry.marks],
            "record": run.record.folder.as_posix() if run and run.record.folder else None,
        }
        for line in grid.lines
        for column, entry, run in zip(grid.table.columns, line.entries, line.runs, strict=True)
        if entry.text != "-" or entry.marks
    ]


def _tabulate(body: Sequence[list[str]], header: list[str], style: str) -> str:
    text = tabulate(body, header, tablefmt=style, disable_numparse=True)
    return "\n".join(line.rstrip() for line in text.splitlines())


def _row_heads(grid: Grid) -> list[str]:
    return [*(grid.table.printed("row_keys", key) for key in grid.table.row_keys), "Value"]


def _labels(grid: Grid) -> list[list[str]]:
    """What stands left of each line's cells; a label that the line above already gave is left blank."""
    shown: list[list[str]] = []
    above: tuple[str, ...] = ()
    for line in grid.lines:
        new = next((i for i, (a, b) in enumerate(zip_longest(line.labels, above)) if a != b), len(line.labels))
        shown.append([*("" if i < new else label for i, label in enumerate(line.labels)), line.source])
        above = line.labels
    return shown


def _head(column: Column) -> str:
    return f"{column.group} {column.head}".strip()


def _title(grid: Grid) -> str:
    return f"{grid.table.id}: {grid.table.title}"


def _dagger(marks: Sequence[str]) -> str:
    return f"†{','.join(marks)}" if marks else ""


def _in_line(number: str, entry: Entry) -> str:
    n = f"(n={entry.n})" if entry.n else ""
    outside = "!" if entry.outside else ""
    return " ".join(part for part in (number + outside + _dagger(entry.marks), entry.half_width(), n) if part)


def notes_of(grid: Grid, best: str, more: Sequence[str] = ()) -> list[str]:
    """Where the numbers stand and what the signs mean; then, numbered, what is to be known of the published ones."""
    table = grid.table
    entries = [(line, entry) for line in grid.lines for entry in line.entries]
    sources = {line.source for line in grid.lines}
    tasks = list(dict.fromkeys(c.keys["task"] for c in table.columns if "task" in c.keys))
    notes = [", ".join(f"{task} = {table.printed('task', task)}" for task in tasks)] if tasks else []
    notes.append(f"Published: {table.place}.")
    if any(entry.best for _, entry in entries):
        notes.append(
            f"{best} = best of its column among one model's published rows, or measured ones if all saw the same samples; "
            "runs with failed samples take no part."
        )
    if any(entry.low is not None for _, entry in entries):
        notes.append("± = half the 95 % interval over users.")
    if "difference" in sources:
        notes.append(
            "difference = measured - published; ! where the published number is outside the measured interval by more "
            "than its rounding."
        )
    if grid.footnotes:
        reasons = "; ".join(f"{letter}: {reason}" for letter, reason in grid.footnotes.items())
        notes.append(f"† not comparable with the published number, and in no verdict. {reasons}.")
    notes += [note for note in more if note]
    notes += [f"Note: {remark}." for remark in grid.remarks]
    if grid.errata:
        notes.append("On the published numbers:")
    return notes + [f"{n}. {erratum}." for n, erratum in enumerate(grid.errata, start=1)]
