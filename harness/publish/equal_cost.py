"""The commands that make runs of equal cost where `harness compare --matched` finds none."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from harness.errors import HarnessError
from harness.plugins.options import build_method, takes_data
from harness.plugins.registry import method_row, task_class
from harness.records.schema import RunRecord
from harness.records.store import read_record, read_samples
from harness.statistics.matched import Point

AROUND = (0.5, 0.75, 1.0, 1.5)
"""Of the number at which costs would agree if history items alone, or answers alone, made them."""
DEAREST = 16
"""Times as many answers as the run drew, at most: where the prompt is most of the cost, more would not make it agree."""
FOLDER = "equal_cost"


def sweeps(nearest: Sequence[Point], data: str | None) -> list[str]:
    """For each method a sweep over what its cost grows with, on the split to fit on, towards the middle of all costs.

    That is k, the items of history, and of a method that answers several times and chooses one how often it answers.
    Words in capitals are to be filled in: what a record does not know, a method's or a task's own file and the data's folder.
    """
    middle = math.exp(sum(math.log(point.cost) for point in nearest) / len(nearest))
    found = []
    for point in nearest:
        record = read_record(point.folder)
        k = record.config.method.options.get("k")
        varied: dict[str, tuple[int, float]] = {}
        if isinstance(k, int) and k > 0:
            varied["k"] = k, middle / point.cost
        drawn = _answers(record, point.folder)
        if drawn is not None:
            prompts, answers = record.cost.prefill_tokens or 0, record.cost.decode_tokens or 0
            share = answers / max(1, prompts + answers)
            name, count = drawn
            varied[name] = count, min(DEAREST, 1 + (middle / point.cost - 1) / share) if share else 1.0
        for option, (now, ratio) in varied.items():
            values = sorted({now, *(max(1, round(now * ratio * part)) for part in AROUND)})
            words = [*_words(record, data, option), "--set", f"{option}={'|'.join(map(str, values))}"]
            found.append(shlex.join(["harness", "sweep", *words]))
    return found


def _answers(record: RunRecord, folder: Path) -> tuple[str, int] | None:
    """The option that says how many answers are drawn of which one is chosen, and that number; None where there is one answer, or
    no option, or more than one, has the number that was drawn."""
    drawn = next((len(sample.extra["drawn"]) for sample in read_samples(folder) if sample.extra.get("drawn")), None)
    options = record.config.method.options.items()
    named = [name for name, value in options if name not in ("k", "seed") and isinstance(value, int) and value == drawn]
    return (named[0], drawn) if drawn is not None and len(named) == 1 else None


def _words(record: RunRecord, data: str | None, varied: str) -> list[str]:
    """What makes the record again, but for the option that varies, its split and its folder."""
    c = record.config
    options = {name: value for name, value in c.method.options.items() if name not in (varied, "seed", "source_sha256")}
    try:
        row = method_row(c.method.name)
        method, usual = row.name, build_method(row.cls, row.name, c.method.preset, []).options()
        options = {name: value for name, value in options.items() if usual.get(name) != value}
    except HarnessError:
        method = "./METHOD.py"
    reads = True
    try:
        reads = takes_data(task_class(c.task.name))
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
    if reads and (data or "lamp-mini" not in c.data.description):
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
