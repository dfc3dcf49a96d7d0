"""Tables of models and methods: what the paper prints, the run records' numbers under it, and the differences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from harness.judge.words import LEXICON, WORDS
from harness.publish.tables import parameters
from harness.publish.tables.differences import difference
from harness.publish.tables.grid import MISSING, Entry, Grid, Line
from harness.publish.tables.measured import Run, on_lamp_mini, shown_runs
from harness.publish.tables.missing import Gap, chosen_users
from harness.publish.tables.published import Column, Row, Table
from harness.publish.tables.sources import Sources, View
from harness.records.schema import RunRecord

FIRST = "copy"
"""What stands before a model's other rows: what the metric gives for nothing."""
BASELINES = ("plain", "rag")
"""Methods a paper may lack that come first among those it lacks."""

Shown = Mapping[tuple[str, str, str], Run]
"""(model, variant, task) -> the run shown."""


@dataclass(frozen=True)
class Slot:
    """A line's place in the block of each model."""

    variant: str
    metric: str | None = None
    """Where it is about parameters and not about scores."""

    @classmethod
    def of(cls, row: Row) -> Slot:
        return cls(row.variant, row.keys["metric"] if row.counts_parameters else None)


def build(table: Table, sources: Sources, view: View) -> Grid:
    """The table with what the records have for it, a block a model."""
    grid = Grid(table)
    runs = shown_runs(sources.records, table) if view.measured else {}
    of_paper = list(dict.fromkeys(row.keys["model"] for row in table.rows))
    measured = {name for name, _, _ in runs}
    for name in [*of_paper, *(name for name in sources.models if name in measured - set(of_paper))]:
        if view.model in (None, name):
            _add_block(grid, list(_model_lines(grid, name, runs, view)))
    for (name, variant, task), run in sorted(runs.items()):
        if run.others and view.model in (None, name):
            shown = run.record.folder.name if run.record.folder else run.record.hash
            grid.remarks.append(f"{run.others} more of {variant}, {name}, {task} not shown beside {shown}")
    if view.measured and not runs:
        grid.remarks.append("nothing measured yet: 'harness table --missing' prints the commands that fill this table")
    return grid


def gaps(table: Table, sources: Sources, model: str | None) -> Iterator[Gap]:
    """A row's method on a column's task, where no run fills it."""
    runs = shown_runs(sources.records, table)
    of_paper = dict.fromkeys(row.keys["model"] for row in table.rows)
    for name in of_paper if model is None else [model]:
        official = name in of_paper
        flags = _flags(table, name, official, sources.data)
        rows = [row for row in table.rows if not row.counts_parameters and (not official or row.keys["model"] == name)]
        for row in {row.variant: row for row in rows}.values():
            for task in dict.fromkeys(column.keys["task"] for column in table.columns):
                if official and all(cell.value is None for cell in row.cells if cell.keys["task"] == task):
                    continue  # the print has no number there
                run = runs.get((name, row.variant, task))
                if run is None or (official and run.reasons):
                    options = tuple(row.options.items())
                    yield Gap(name, row.keys["method"], task, options, flags, official)


def _flags(table: Table, model: str, official: bool, data: str | None) -> tuple[str, ...]:
    """What a run is given besides method and task; as the paper's was, where the model is of the paper."""
    settings = {**table.task_options, **(chosen_users(table, data) if official else {})}
    flags = [word for setting in settings.items() for word in ("--task_set", "=".join(setting))]
    if table.judge:
        flags += ["--judge", table.judge if official else LEXICON if model == "tiny" else WORDS]
    return (*flags, *(table.sampling if official else ()))


def _model_lines(grid: Grid, model: str, runs: Shown, view: View) -> Iterable[Line]:
    table = grid.table
    printed = {Slot.of(row): row for row in table.rows if row.keys["model"] == model}
    names = {Slot.of(row): table.label(row)[-1] for row in table.rows}
    extra = {variant for name, variant, _ in runs if name == model} - {slot.variant for slot in names}
    before = [variant for variant in sorted(extra) if variant.partition(" ")[0] == FIRST]
    behind_names = [*(b for b in BASELINES if b in extra), *sorted(extra - {*BASELINES, *before})]
    slots = [*map(Slot, before), *names, *map(Slot, behind_names)]
    label = table.printed("model", model)
    if not printed:
        label += _not_comparable(model, [run.record for (name, _, _), run in runs.items() if name == model])
    for slot in slots:
        labels = (label, names.get(slot) or table.printed("method", slot.variant))
        published = measured = None
        if slot in printed and view.published:
            published = Line.printed(table, printed[slot], labels)
            yield published
            if slot.metric and view.measured:
                yield parameters.computed(table, printed[slot], labels)
        behind = tuple(runs.get((model, slot.variant, column.keys["task"])) for column in table.columns)
        if slot.metric:
            row = next(row for row in table.rows if Slot.of(row) == slot)
            oppu = tuple(runs.get((model, "oppu", column.keys["task"])) for column in table.columns)
            measured = parameters.measured(grid, labels, model, row, behind, oppu)
        elif any(behind):
            measured = _measured_line(grid, labels, model, slot.variant, behind)
        if measured:
            yield measured
        if published and measured and not slot.metric:
            between = difference(published, measured)
            if between:
                yield between


def _not_comparable(model: str, records: Sequence[RunRecord]) -> str:
    """What a reader must know before holding this model's rows against the paper's."""
    parts = ["embedded"] if model == "tiny" else []
    if records and all(on_lamp_mini(record) for record in records):
        parts.append("synthetic lamp-mini data")
    return f" ({', '.join(parts)}; not comparable)" if parts else " (not in the paper)"


def _measured_line(
    grid: Grid, labels: tuple[str, ...], model: str, variant: str, behind: tuple[Run | None, ...]
) -> Line:
    entries = tuple(
        _measured_entry(grid, run, column, grid.table.decimals(i))
        for i, (run, column) in enumerate(zip(behind, grid.table.columns, strict=True))
    )
    return Line(labels, "measured", {"model": model, "method": variant}, entries, behind)


def _measured_entry(grid: Grid, run: Run | None, column: Column, decimals: int) -> Entry:
    metric = run.metric(column.keys["metric"]) if run else None
    if run is None or metric is None:
        return MISSING
    if metric.value is None:
        return replace(MISSING, marks=grid.mark([metric.note] if metric.note else []))
    marks = grid.mark([*run.reasons, *([metric.note] if metric.note else [])])
    return Entry(f"{metric.value:.{decimals}f}", metric.value, metric.low, metric.high, metric.n, marks)


def _add_block(grid: Grid, lines: list[Line]) -> None:
    """Add the lines of one model, the best of each column and source marked."""
    for source in ("published", "measured"):
        rows = [i for i, line in enumerate(lines) if line.source == source and line.ranked]
        for c, column in enumerate(grid.table.columns):
            for i in _best(column, [(i, lines[i].entries[c], lines[i].runs[c]) for i in rows]):
                entries = list(lines[i].entries)
                entries[c] = replace(entries[c], best=True)
                lines[i] = replace(lines[i], entries=tuple(entries))
    grid.add(lines)


def _best(column: Column, candidates: list[tuple[int, Entry, Run | None]]) -> list[int]:
    """Rows whose printed number is best; none where there is nothing to compare or the runs saw different samples.

    A run that failed on some samples takes no part: the others are the same without it.
    """
    if column.higher_is_better is None:
        return []
    whole = [(i, entry, run) for i, entry, run in candidates if not (run and run.record.health.errors)]
    valued = [(i, float(entry.text), run) for i, entry, run in whole if entry.value is not None]
    if len(valued) < 2 or len({run.population if run else None for _, _, run in valued}) != 1:
        return []
    top = (max if column.higher_is_better else min)(value for _, value, _ in valued)
    return [i for i, value, _ in valued if value == top]
