"""Comparisons of two runs (`harness judge`) beside the ratings and win rates a paper prints: a row an evaluator and metric."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from harness.judge.pairwise_record import DIMENSIONS, PairRecord
from harness.publish.tables.differences import difference
from harness.publish.tables.grid import MISSING, Entry, Grid, Line
from harness.publish.tables.measured import changed_options
from harness.publish.tables.missing import Gap
from harness.publish.tables.published import Table
from harness.publish.tables.sources import Sources, View
from harness.records.schema import RunRecord, SelectionConfig


def build(table: Table, sources: Sources, view: View) -> Grid:
    """The table with what comparisons have for it; a model's are those of its runs."""
    grid = Grid(table)
    shown: dict[tuple[str, str], tuple[Path, PairRecord]] = {}
    left_out = 0
    for folder, record in sources.comparisons if view.measured else ():
        if _fits(record, table) and view.model in (None, record.config.runs[0].model.name):
            key = (_evaluator(record, table), record.config.runs[0].model.name)
            left_out += key in shown
            shown[key] = max(shown.get(key, (folder, record)), (folder, record), key=lambda found: _rank(found[1]))
    printed = list(dict.fromkeys(row.keys["evaluator"] for row in table.rows))
    for evaluator in [*printed, *sorted({name for name, _ in shown} - set(printed))]:
        published = [Line.printed(table, row) for row in table.rows if row.keys["evaluator"] == evaluator]
        grid.add(published if view.published else [])
        for (name, of), (folder, record) in sorted(shown.items()):
            if name == evaluator:
                lines = list(_measured(grid, evaluator, of, folder, record))
                grid.add(list(_with_differences(lines, published)) if view.published else lines)
    if left_out:
        grid.remarks.append(f"{left_out} more comparisons are not shown beside larger or later ones")
    if view.measured and not shown:
        grid.remarks.append(
            "nothing compared yet: 'harness judge pairs RUN_A RUN_B' writes the records this table reads"
        )
    return grid


def gaps(table: Table, sources: Sources, model: str | None) -> Iterator[Gap | str]:
    """The comparison by the paper's judge, or the two runs it needs, of the first model of the paper that has them."""
    judge = next(row.keys["evaluator"] for row in table.rows if row.keys["evaluator"] != "human")
    models = list(table.names["model"]) if model is None else [model]
    for _, record in sources.comparisons:
        if _fits(record, table) and record.config.runs[0].model.name in models and _evaluator(record, table) == judge:
            return
    methods = [column.keys["method"] for column in table.columns]
    for name in models:
        runs = [_latest(sources.records, name, method, table.keys["task"]) for method in methods]
        if all(runs):
            data = ["--data", sources.data] if sources.data else []
            folders = [str(run.folder) for run in runs if run]
            yield shlex.join(["harness", "judge", "pairs", *folders, "--judge", f"openai/{judge}", *data])
            return
    official = models[0] in table.names["model"]
    yield from (Gap(models[0], method, table.keys["task"], official=official) for method in methods)


def _latest(records: Sequence[RunRecord], model: str, method: str, task: str) -> RunRecord | None:
    """Of the method as it is by default, on all items."""
    found = [
        record
        for record in records
        if (record.config.model.name, record.config.method.name, record.config.task.name) == (model, method, task)
        and record.status == "complete"
        and record.config.selection == SelectionConfig()
        and not changed_options(record)
    ]
    return max(found, key=lambda record: record.started or "", default=None)


def _with_differences(measured: Sequence[Line], published: Sequence[Line]) -> Iterator[Line]:
    by_metric = {line.keys["metric"]: line for line in published}
    for line in measured:
        yield line
        between = difference(by_metric[line.keys["metric"]], line) if line.keys["metric"] in by_metric else None
        if between:
            yield between


def _fits(record: PairRecord, table: Table) -> bool:
    runs = record.config.runs
    wanted = {column.keys["method"] for column in table.columns}
    own_history = all(run.selection.control == "none" for run in runs)  # what a control scores is not the method's
    return {run.method.name for run in runs} == wanted and runs[0].task.name == table.keys["task"] and own_history


def _evaluator(record: PairRecord, table: Table) -> str:
    """As the table calls it, where it does: `gpt-5.2` for openai/gpt-5.2-2025-12-11."""
    if record.config.judge is None:
        return "human"
    name = record.config.judge.name.rpartition("/")[2]
    printed = {row.keys["evaluator"] for row in table.rows}
    return next((known for known in sorted(printed) if name == known or name.startswith(f"{known}-20")), name)


def _rank(record: PairRecord) -> tuple[bool, int, str]:
    return (record.status == "complete", record.compared, record.started or "")


def _measured(grid: Grid, evaluator: str, model: str, folder: Path, record: PairRecord) -> Iterator[Line]:
    table, runs = grid.table, record.config.runs
    marks = grid.mark(_why_not_comparable(record, table))
    label = f"{table.printed('evaluator', evaluator)} on {table.printed('model', model)}"
    sides = {run.method.name: record.metrics.get(side, {}) for run, side in zip(runs, ("a", "b"), strict=True)}
    for metric in ("alignment_win", *DIMENSIONS):
        if metric not in sides[runs[0].method.name]:
            continue
        scale, digits = (100, 0) if metric == "alignment_win" else (1, 2)
        entries = []
        for column in table.columns:
            value = sides[column.keys["method"]][metric]
            low, high = (None if end is None else scale * end for end in (value.low, value.high))
            text = "-" if value.value is None else f"{scale * value.value:.{digits}f}"
            entries.append(
                replace(MISSING, marks=marks)
                if value.value is None
                else Entry(text, scale * value.value, low, high, value.n, marks)
            )
        keys = {**table.keys, "evaluator": evaluator, "metric": metric, "model": model, "comparison": str(folder)}
        labels = (label, table.printed("metric", metric))
        yield Line(labels, "measured", keys, tuple(entries), (None,) * len(entries))


def _why_not_comparable(record: PairRecord, table: Table) -> list[str]:
    """Each reason as a clause for a footnote."""
    description = record.config.runs[0].data.description.lower()
    reasons = ["synthetic lamp-mini data"] if "lamp-mini" in description else []
    model = record.config.runs[0].model.name
    if model not in table.names["model"]:
        reasons.append(f"{model} is none of the paper's models, one of which it is")
    official = next((int(row.keys["n"]) for row in table.rows if "n" in row.keys), None)
    if official and record.compared != official:
        reasons.append(f"{record.compared} pairs, published {official}")
    if record.failed:
        reasons.append(f"{record.failed} pairs have no answer of the judge")
    return reasons
