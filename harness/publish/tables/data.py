"""Statistics of LaMP files beside those that papers print: users, questions, lengths in words, classes.

What is counted is what the tasks read. Without a folder it is lamp-mini, the embedded synthetic users, and of it the dev
split alone, which is quick to make.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean

from harness.data import Labelled
from harness.errors import DataMissing
from harness.plugins.options import build_task
from harness.plugins.registry import task_class
from harness.publish.tables.grid import MISSING, Entry, Grid, Line, Mark
from harness.publish.tables.missing import DOWNLOADED, chosen_users, data_get, has_files
from harness.publish.tables.published import Table
from harness.publish.tables.sources import Sources, View
from harness.task import Selection
from harness.tasks.lamp import MINI, Classification, Lamp, Rating

STAGES = {"1": "train", "2": "dev"}
"""Stage of training -> the split whose users it has."""


@dataclass(frozen=True)
class Split:
    """What is counted of one split."""

    users: frozenset[str]
    queries: int
    input_words: float
    """Mean, instruction included."""
    output_words: float | None
    """Mean; None of classes, and where the split has no golds."""
    history_items: float
    """Mean a user."""
    classes: int | None
    """Different golds; None of texts."""


def build(table: Table, sources: Sources, view: View) -> Grid:
    """A line of counts under each task's. A model's rows alone are all rows: data has no model."""
    grid = Grid(table)
    data, found = sources.data or MINI, False
    for row in table.rows:
        lines, task = [Line.printed(table, row)] if view.published else [], row.keys["task"]
        users = chosen_users(table, data) if data != MINI else {}
        as_published = not users or has_files(task, data, users["split_by"])
        splits: Mapping[str, Split] = {}
        try:
            if view.measured:
                splits = _splits(task, data, tuple(users.items()) if as_published else ())
        except DataMissing as problem:  # of one task; the others can be counted
            grid.remarks.append(str(problem).rstrip("."))
        if splits:
            found = True
            reasons = ["synthetic lamp-mini data"] if data == MINI else []
            if not as_published:
                reasons = [f"the user split, published the {users['split_by']} split"]
            marks = grid.mark(reasons)
            entries = tuple(_entry(column.keys, task, splits, marks) for column in table.columns)
            lines.append(
                Line(table.label(row), "measured", {**row.keys, "data": data}, entries, (None,) * len(entries))
            )
        grid.add(lines)
    if found:
        which = "the dev split of lamp-mini" if data == MINI else f"the splits in {data}"
        grid.remarks.append(
            f"measured = counted in {which}; stage 1 = train, stage 2 = dev; lengths are words of inputs, instruction "
            "included, and of golds"
        )
    elif view.measured:
        grid.remarks.append(f"{data} has no files of these tasks; 'harness data get lamp4' fetches some")
    return grid


def gaps(table: Table, sources: Sources, model: str | None) -> Iterator[str]:
    """Downloads of the tasks whose files the folder lacks."""
    data = sources.data or DOWNLOADED
    split_by = chosen_users(table, data).get("split_by", "user")
    for row in table.rows if model is None else ():
        if not has_files(row.keys["task"], data, split_by):
            yield data_get(row.keys["task"], data, split_by)


def count(items: Sequence[Labelled], *, texts: bool) -> Split:
    """`texts`: whether golds are texts and not classes."""
    golds = [item.targets[0] for item in items if item.targets]
    histories = {item.example.user.id: len(item.example.user.history) for item in items}
    return Split(
        users=frozenset(histories),
        queries=len(items),
        input_words=fmean(len(item.example.text.split()) for item in items),
        output_words=fmean(len(gold.split()) for gold in golds) if texts and golds else None,
        history_items=fmean(histories.values()),
        classes=None if texts else len(set(golds)),
    )


@cache
def _splits(task: str, data: str, users: tuple[tuple[str, str], ...]) -> Mapping[str, Split]:
    """Split -> its counts, of those that are there; OPPU's dev and test users are the same, and count as dev.

    Raises DataMissing where a file cannot be read.
    """
    cls, files = task_class(task), set()
    assert issubclass(cls, Lamp)
    reader, _ = build_task(cls, task, [f"{name}={value}" for name, value in users], data)
    assert isinstance(reader, Lamp)
    counted = {}
    for split in ("dev",) if data == MINI else ("train", "dev", "test"):
        try:
            file = None if data == MINI else reader.questions_file(split)
        except DataMissing:
            continue
        if file in files:
            continue
        files.add(file)
        items = reader.items(Selection(split=split))
        if items:
            counted[split] = count(items, texts=not issubclass(cls, (Classification, Rating)))
    return counted


_OF_SPLIT: Mapping[str, Callable[[Split], str | None]] = {
    "queries": lambda split: f"{split.queries:,}",
    "input_length": lambda split: f"{split.input_words:.1f}",
    "output_length": lambda split: None if split.output_words is None else f"{split.output_words:.1f}",
    "history_items": lambda split: f"{split.history_items:.1f}",
    "classes": lambda split: None if split.classes is None else str(split.classes),
}


def _entry(column: Mapping[str, str], task: str, splits: Mapping[str, Split], marks: tuple[Mark, ...]) -> Entry:
    metric, stage = column["metric"], column.get("stage")
    text: str | None
    if metric == "type":
        cls = task_class(task)
        text = "Cls." if issubclass(cls, Classification) else "Reg." if issubclass(cls, Rating) else "Gen."
    elif metric == "users" and stage:
        both = [f"{len(splits[split].users):,}" if split in splits else "-" for split in STAGES.values()]
        text = " / ".join(both)
    elif metric == "users":
        text = f"{len(frozenset().union(*(split.users for split in splits.values()))):,}"
    elif metric == "instances":
        text = f"{sum(split.queries for split in splits.values()):,}"
    else:
        split = splits.get(STAGES[stage or "2"])
        text = _OF_SPLIT[metric](split) if split else None
    if text is None:
        return MISSING
    number = text.replace(",", "")
    return Entry(text, float(number) if number.replace(".", "", 1).isdigit() else None, marks=marks)
