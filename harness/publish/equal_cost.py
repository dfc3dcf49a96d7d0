"""The commands that make runs of equal cost where `harness compare --matched` finds none."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence

from harness.errors import HarnessError
from harness.plugins.options import build_method
from harness.plugins.registry import method_row, task_class
from harness.records.schema import RunRecord
from harness.records.store import read_record
from harness.statistics.matched import Point

AROUND = (0.5, 0.75, 1.0, 1.5)
"""Of the number of history items at which costs would agree if items alone made them."""
FOLDER = "equal_cost"


def sweeps(nearest: Sequence[Point], data: str | None) -> list[str]:
    """For each method that shows history, a sweep over k on the split to fit on, towards the middle of all costs.

    Words in capitals are to be filled in: what a record does not know, a method's or a task's own file and the data's folder.
    """
    middle = math.exp(sum(math.log(point.cost) for point in nearest) / len(nearest))
    found = []
    for point in nearest:
        record = read_record(point.folder)
        k = record.config.method.options.get("k")
        if isinstance(k, int) and k > 0:
            wanted = {max(1, round(k * middle / point.cost * part)) for part in AROUND} - {k}
            values = "|".join(map(str, sorted({k, *wanted})))
            found.append(shlex.join(["harness", "sweep", *_words(record, data), "--set", f"k={values}"]))
    return found


def _words(record: RunRecord, data: str | None) -> list[str]:
    """What makes the record again, but for k, its split and its folder."""
    c = record.config
    options = {name: value for name, value in c.method.options.items() if name not in ("k", "seed")}
    try:
        row = method_row(c.method.name)
        method, usual = row.name, build_method(row.cls, row.name, c.method.preset, []).options()
        options = {name: value for name, value in options.items() if usual.get(name) != value}
    except HarnessError:
        method = "./METHOD.py"
    try:
        task_class(c.task.name)
        task = c.task.name
    except HarnessError:
        task = "./TASK"
    words = ["--method", method, "--task", task, "--model", c.model.name, "--dtype", c.model.dtype]
    if c.method.preset:
        words += ["--preset", c.method.preset]
    words += [word for name, value in options.items() for word in ("--set", f"{name}={_text(value)}")]
    words += [word for name, value in c.task.options.items() for word in ("--task_set", f"{name}={_text(value)}")]
    split = c.data.fit_split if c.data.fit_split and ":" not in c.data.fit_split else "train"
    words += ["--split", split]
    if data or "lamp-mini" not in c.data.description:
        words += ["--data", data or "FOLDER"]
    for name in ("limit", "users"):
        if getattr(c.selection, name) is not None:
            words += [f"--{name}", str(getattr(c.selection, name))]
    words += ["--max_new_tokens", str(c.sampling.max_new_tokens), "--seed", str(c.sampling.seed)]
    if c.sampling.temperature:
        words += ["--temperature", str(c.sampling.temperature)]
    return [*words, "--output_path", FOLDER]


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_text, value))
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
