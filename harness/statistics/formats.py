"""A comparison of runs as text: terminal and Markdown tables, CSV with a row a run and metric, JSON with everything."""

from __future__ import annotations

import csv
import io
import json
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tabulate import tabulate

from harness.files.shown import csv_cell
from harness.files.shown import markdown as text
from harness.records.schema import json_value
from harness.statistics.compare import Compared, Comparison, Side, differences
from harness.statistics.paired_tests import ByLength, Group


def terminal(comparison: Comparison, width: int = 120) -> str:
    """No line longer than `width`: tables that are wider go on below, run and metric again before the rest."""

    def draw(lines: Sequence[Sequence[str]]) -> str:
        return "\n\n".join(_aligned([[line[i] for i in panel] for line in lines]) for panel in _panels(lines, width))

    runs = []
    for letter, name, folder, shared, differs in _runs(comparison):
        runs += [f"{letter}  {name}", f"   {folder}{f', {shared} samples shared with A' if shared else ''}"]
        if differs:
            runs += textwrap.wrap(
                f"differs from A in {differs}", width, initial_indent=" " * 3, subsequent_indent=" " * 3
            )
    notes = [textwrap.fill(f"- {note}", width, subsequent_indent="  ") for note in _notes(comparison)]
    return "\n\n".join(["\n".join(runs), *_tables(comparison, draw), "\n".join(notes)])


def markdown(comparison: Comparison) -> str:
    def draw(lines: Sequence[Sequence[str]]) -> str:
        head, *body = ([text(cell, inside=True) for cell in line] for line in lines)
        return tabulate(body, headers=head, tablefmt="github", disable_numparse=True)

    runs = draw([["", "run", "record", "shared", "differs from A in"], *_runs(comparison)])
    return "\n\n".join([runs, *_tables(comparison, draw), "\n".join(f"- {note}" for note in _notes(comparison))])


def as_json(comparison: Comparison) -> str:
    a = comparison.sides[0]
    runs = [
        {
            "letter": side.letter,
            "record": str(side.folder),
            "label": label(side),
            "differs": differences(a.config, side.config),
            "shared": comparison.shared.get(side.letter),
        }
        for side in comparison.sides
    ]
    rows = [
        {
            "run": row.letter,
            "metric": row.metric,
            "higher_is_better": row.higher_is_better,
            **row.effect._asdict(),
            "p_holm": row.p_holm,
            "unpaired": row.unpaired,
            "by_length": _lengths(row.lengths) if row.lengths else None,
        }
        for row in comparison.rows
    ]
    content = {
        "runs": runs,
        "unit": comparison.unit,
        "family": len(comparison.rows),
        "rows": rows,
        "notes": comparison.notes,
    }
    return json.dumps(json_value(content), indent=1)


def rows(comparison: Comparison) -> list[dict[str, Any]]:
    """A row a run and metric; a number that is not known is None."""
    folders = {side.letter: side.folder for side in comparison.sides}
    made = []
    for row in comparison.rows:
        lengths = {"rho_length": row.lengths.rho, "p_length": row.lengths.p} if row.lengths else {}
        numbers = {**row.effect._asdict(), "p_holm": row.p_holm, "rho_length": None, "p_length": None, **lengths}
        known = {name: None if number is None or math.isnan(number) else number for name, number in numbers.items()}
        runs = {"run_a": str(folders["A"]), "run_b": str(folders[row.letter])}
        made.append({**runs, "metric": row.metric, "higher_is_better": row.higher_is_better, **known})
    return made


def as_csv(comparison: Comparison) -> str:
    text, lines = io.StringIO(), rows(comparison)
    writer = csv.DictWriter(text, list(lines[0]) if lines else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: csv_cell(value) for name, value in line.items()} for line in lines)
    return text.getvalue().rstrip("\n")


FORMATS: Mapping[str, Callable[[Comparison], str]] = {
    "terminal": terminal,
    "md": markdown,
    "csv": as_csv,
    "json": as_json,
}


def label(side: Side) -> str:
    """`rag (tiny)`, with its control where it has one."""
    config = side.config
    control = "" if config.selection.control == "none" else f", control {config.selection.control}"
    return f"{config.method.name} ({config.model.name}){control}"


def _tables(comparison: Comparison, draw: Callable[[Sequence[Sequence[str]]], str]) -> list[str]:
    """The tests and the gains by length of history; `draw` makes a table of its head and rows."""
    config, unit = comparison.sides[0].config, comparison.unit
    head = ["", "metric", "A", "other", "difference [95 %]", "p", "p Holm", "d", f"{unit}s"]
    head += ["up/same/down", "worst", "least"]
    return [
        f"{config.task.name}, {config.data.split} split; {_family(len(comparison.rows))}",
        draw([head, *map(_row, comparison.rows)]),
        *(f"Gain against the length of the {unit}'s history\n\n{draw(table)}" for table in _length_tables(comparison)),
    ]


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    ruled = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in ruled)


def _panels(lines: Sequence[Sequence[str]], width: int) -> Iterator[list[int]]:
    """Numbers of the columns that fit side by side, the first two in every panel."""
    widths = [max(map(len, column)) + 2 for column in zip(*lines, strict=True)]
    panel = [0, 1]
    for place in range(2, len(widths)):
        if len(panel) > 2 and sum(widths[i] for i in [*panel, place]) - 2 > width:
            yield panel
            panel = [0, 1]
        panel.append(place)
    yield panel


def _runs(comparison: Comparison) -> list[list[str]]:
    a = comparison.sides[0]
    return [
        [
            side.letter,
            label(side),
            str(side.folder),
            str(comparison.shared.get(side.letter, "")),
            "; ".join(differences(a.config, side.config)),
        ]
        for side in comparison.sides
    ]


def _family(tests: int) -> str:
    return f"{tests} tests, one family" if tests > 1 else "one test"


def _row(row: Compared) -> list[str]:
    e = row.effect
    return [
        row.letter,
        f"{row.metric} {'↑' if row.higher_is_better else '↓'}",
        _number(e.a),
        _number(e.b),
        f"{_signed(e.difference)} {_interval(e.low, e.high)}",
        _probability(e.p),
        _probability(row.p_holm),
        "-" if math.isnan(e.size) else f"{e.size:.2f}",
        str(e.users),
        f"{100 * e.helped:.3g}/{100 * (1 - e.helped - e.harmed):.3g}/{100 * e.harmed:.3g}",
        _signed(e.worst_tenth),
        _number(e.detectable),
    ]


def _length_tables(comparison: Comparison) -> list[list[list[str]]]:
    """A table for each division of users into terciles: one, unless samples without a value changed who is in it."""
    tables: dict[tuple[str, ...], list[list[str]]] = {}
    for row in comparison.rows:
        if row.lengths:
            groups = row.lengths.groups
            gains = [f"{_signed(group.gain)} {_interval(group.low, group.high)}" for group in groups]
            rho = "-" if math.isnan(row.lengths.rho) else f"{row.lengths.rho:+.2f}"
            head = tuple(f"{_span(group)} items, n {group.users}" for group in groups)
            tables.setdefault(head, []).append([row.letter, row.metric, rho, _probability(row.lengths.p), *gains])
    return [[["", "gain in", "rho", "p", *head], *rows] for head, rows in tables.items()]


def _span(group: Group) -> str:
    return f"{group.shortest} to {group.longest}" if group.shortest < group.longest else str(group.shortest)


def _lengths(lengths: ByLength) -> dict[str, object]:
    return {"rho": lengths.rho, "p": lengths.p, "groups": [group._asdict() for group in lengths.groups]}


def _notes(comparison: Comparison) -> list[str]:
    unit = comparison.unit
    return [
        f"difference = other minus A; its 95 % interval is over {unit}s",
        f"p = permutation test, two-sided, that exchanges the runs for whole {unit}s; p Holm = corrected for all tests shown",
        f"gain = difference, positive where the other run is better; d = mean of the {unit}s' gains by their standard "
        "deviation",
        f"up, same, down = percentages of {unit}s helped, neither, and harmed: whose gain is positive, 0, negative",
        f"worst = mean gain of the tenth of {unit}s that gain least",
        f"least = the smallest true difference that this many {unit}s show with 80 % power at 5 %",
        "rho = Spearman's rank correlation of history length and gain",
        *comparison.notes,
    ]


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"


def _signed(value: float) -> str:
    return f"{value + 0.0:+.3f}" if abs(value) < 10 else f"{value:+.2f}"


def _interval(low: float, high: float) -> str:
    return "" if math.isnan(low) else f"[{_number(low + 0.0)}, {_number(high + 0.0)}]"


def _probability(p: float) -> str:
    return "-" if math.isnan(p) else f"{p:.4f}" if p < 0.001 else f"{p:.3f}"
