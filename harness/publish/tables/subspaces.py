"""Ranks of user vectors as shares of the dimensions there are: the paper's arithmetic, and what runs of `delta_vectors` found.

N users' vectors of width d have at most min(N, d) dimensions; r of them are 1000 r / min(N, d) per mille. A line is shown
for each model that was run, of retrieval with one item (`rag k=1`), as the paper's template shows one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from harness.engine.flops import SIZES
from harness.publish.tables.differences import difference
from harness.publish.tables.grid import MISSING, Entry, Grid, Line, Mark
from harness.publish.tables.measured import Run, changed_options, is_another_method, why_incomplete
from harness.publish.tables.missing import Gap, chosen_users
from harness.publish.tables.published import Column, Row, Table
from harness.publish.tables.sources import Sources, View
from harness.records.schema import RunRecord

TASK, METHOD, OPTIONS = "delta_vectors", "rag", {"k": "1"}


def per_mille(rank: int, users: int, width: int) -> float:
    return 1000 * rank / min(users, width)


def build(table: Table, sources: Sources, view: View) -> Grid:
    """A block a task: printed, computed from the printed ranks, measured; then the tasks that the paper leaves out."""
    grid = Grid(table)
    of_paper = table.keys["model"]
    runs = list(_runs(sources.records, view.model)) if view.measured else []
    for row in table.rows:
        lines = []
        published = Line.printed(table, row) if view.published and view.model in (None, of_paper) else None
        if published:
            lines.append(published)
            if view.measured:
                lines.append(_computed(table, row, published))
        for run in (run for run in runs if _task(run.record) == row.keys["task"]):
            measured = _measured(grid, run, row)
            between = difference(published, measured) if published and _model(run) == of_paper else None
            lines += [measured, *([between] if between else [])]
        grid.add(lines)
    printed = {row.keys["task"] for row in table.rows}
    grid.add([_measured(grid, run, None) for run in runs if _task(run.record) not in printed])
    if view.measured and not runs:
        grid.remarks.append("nothing measured yet: 'harness table --missing' prints the commands that fill this table")
    return grid


def gaps(table: Table, sources: Sources, model: str | None) -> Iterator[Gap]:
    name = model or table.keys["model"]
    official = name == table.keys["model"]
    runs = {_task(run.record): run for run in _runs(sources.records, name)}
    for row in table.rows:
        run = runs.get(row.keys["task"])
        if run is None or (official and _why_not_comparable(run.record, row)):
            split_by = chosen_users(table, sources.data).get("split_by") if official else None
            settings = [f"task={row.keys['task']}", *([f"split_by={split_by}"] if split_by else [])]
            flags = tuple(word for setting in settings for word in ("--task_set", setting))
            yield Gap(name, METHOD, TASK, tuple(OPTIONS.items()), flags, official)


def _runs(records: Sequence[RunRecord], model: str | None) -> Iterator[Run]:
    """Of each model and task the run by the paper's retrieval, at its block, on all users; of equals on most users, the latest."""
    found: dict[tuple[str, str], list[RunRecord]] = {}
    for record in records:
        config = record.config
        of_users = config.task.name == TASK and config.method.name == METHOD and bool(record.metrics)
        if of_users and model in (None, config.model.name) and not is_another_method(record):
            found.setdefault((config.model.name, _task(record)), []).append(record)
    for runs in found.values():
        yield Run(max(runs, key=_preference), (), len(runs) - 1)


def _preference(record: RunRecord) -> tuple[int, bool, bool, bool, int, str]:
    return (
        -len(changed_options(record, OPTIONS)),
        not _other_k(record),
        "layer" not in record.config.task.options,
        not why_incomplete(record),
        max(metric.n for metric in record.metrics.values()),
        record.started or "",
    )


def _task(record: RunRecord) -> str:
    return str(record.config.task.options.get("task", "lamp4"))


def _model(run: Run) -> str:
    return run.record.config.model.name


def _other_k(record: RunRecord) -> bool:
    return any(str(record.config.method.options.get(name, value)) != value for name, value in OPTIONS.items())


def _why_not_comparable(record: RunRecord, row: Row | None) -> list[str]:
    reasons = why_incomplete(record)
    users = max(metric.n for metric in record.metrics.values())
    if row and users != int(row.keys["users"]) and not reasons:
        reasons.append(f"{users} users, the paper has {row.keys['users']}")
    if _other_k(record):
        reasons.append(f"{METHOD} with k={record.config.method.options.get('k')}")
    if "layer" in record.config.task.options:
        reasons.append(f"block {record.config.task.options['layer']}")
    return reasons


def _measured(grid: Grid, run: Run, row: Row | None) -> Line:
    table, model = grid.table, _model(run)
    marks = grid.mark(_why_not_comparable(run.record, row))
    entries = tuple(_entry(run, column, table.decimals(i), marks) for i, column in enumerate(table.columns))
    task = _task(run.record)
    label = f"{table.printed('task', task)} on {table.printed('model', model)}"
    return Line((label,), "measured", {"model": model, "task": task}, entries, (run,) * len(entries), ranked=False)


def _entry(run: Run, column: Column, decimals: int, marks: tuple[Mark, ...]) -> Entry:
    metric = run.metric(f"{column.keys['metric']}{round(100 * float(column.keys['energy']))}")
    if metric is None or metric.value is None:
        return MISSING
    return Entry(f"{metric.value:.{decimals}f}", metric.value, metric.low, metric.high, metric.n, marks)


def _computed(table: Table, row: Row, published: Line) -> Line:
    """Per mille of the printed ranks, with the printed digits."""
    entries = []
    for cell, rank in zip(row.cells, (None, *row.cells), strict=False):
        if rank is None or cell.keys["metric"] != "per_mille" or rank.value is None:
            entries.append(MISSING)
            continue
        value = per_mille(int(rank.value), int(row.keys["users"]), SIZES[table.keys["model"]].width)
        entries.append(Entry(f"{value:.{cell.decimals}f}", value, keys=cell.keys))
    return replace(published, source="computed", entries=tuple(entries), ranked=False)
