"""The commands that would fill what is empty in the published tables, one a line, a model loaded as rarely as they allow.

A cell of a model the paper has is empty until a run that can be compared fills it; of another model, until any run does.
Which those are says `gaps` of the module that a table is filled by: runs it lacks, or whole commands.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from harness.plugins.registry import task_class
from harness.publish.tables.published import Table
from harness.publish.tables.sources import Sources
from harness.records.select import places_of, select
from harness.servers.address import ENDPOINT, OPENAI
from harness.servers.prices import price_of

Options = tuple[tuple[str, str], ...]

DOWNLOADED = "data/lamp"
"""Where `harness data get` puts files unless it is told where."""


@dataclass(frozen=True)
class Gap:
    """A run that is not there."""

    model: str
    method: str
    task: str
    options: Options = ()
    """Of the method, besides its defaults."""
    flags: tuple[str, ...] = ()
    """Further arguments of `harness run`, such as how the paper samples."""
    official: bool = True
    """Whether it needs the benchmark's files; the embedded users will do for a model that no paper has."""


def commands(tables: Sequence[Table], sources: Sources, model: str | None = None) -> list[str]:
    """What a shell would run, in order: downloads, runs by model, comparisons of runs that are there.

    `model` asks for that model's rows. People's votes (dps-4) no command can give.
    """
    found = [
        gap
        for table in tables
        for gap in import_module(f"harness.publish.tables.{table.measured}").gaps(table, sources, model)
    ]
    gaps = list(dict.fromkeys(gap for gap in found if isinstance(gap, Gap)))
    downloads = [line for gap in gaps for line in _downloads(gap, sources)]
    whole = [line for line in found if isinstance(line, str)]
    first = [line for line in whole if line.startswith("harness data get ")]
    lines = [*downloads, *first, *_runs(gaps, sources), *whole]
    return list(dict.fromkeys(lines))


ITEMS, READ, WRITTEN, BATCH = 1500, 1000, 50, 16
"""Of a run, about: samples, tokens of a prompt, tokens of an answer, samples a batch."""
COMPUTE, BANDWIDTH = 2e14, 3e12
"""Operations and bytes a second that one H100 reaches in practice."""


QUESTIONS, QUESTION, RATING = 2, 600, 5
"""What a judge is asked of an answer, about: questions, and tokens of one and of its reply."""
PAIRS, PAIR, VERDICT = 200, 1500, 200
"""Of a comparison of two runs, about: questions (100 pairs in both orders), and tokens of one and of its reply."""


def estimate(lines: Sequence[str]) -> str:
    """What the commands take, in one line: runs, disk, hours on one H100, and money for judges. A rough guess."""
    runs, hours, judged = 0, 0.0, 0
    weights: dict[str, float] = {}
    dollars: list[float | None] = []
    for words in map(shlex.split, lines):
        if words[:3] == ["harness", "judge", "pairs"]:
            judged += 1
            dollars += [_paid(words, PAIRS, PAIR, VERDICT)]
        if words[:2] not in (["harness", "run"], ["harness", "sweep"]):
            continue
        model = words[words.index("--model") + 1] if "--model" in words else "tiny"
        size = re.search(r"(\d+(?:\.\d+)?)b\b", model.lower())
        parameters = float(size[1]) * 1e9 if size else 0.0
        points = max((word.count("|") + 1 for word in words if "=" in word), default=1)
        count = words.count("--method") * words.count("--task") * (points if words[1] == "sweep" else 1)
        seconds = 2 * parameters * (1.5 * READ / COMPUTE + WRITTEN / BANDWIDTH / BATCH)
        runs, hours = runs + count, hours + count * ITEMS * seconds / 3600
        weights[model] = 2 * parameters / 1e9
        if "--judge" in words:
            judged += count
            dollars += [_paid(words, count * ITEMS * QUESTIONS, QUESTION, RATING)]
    known = sum(filter(None, dollars))
    unknown = dollars.count(None)
    paid = (
        "no judge" if not judged else f"{judged} judged for about ${known:.2f}, where the model's list price is known"
    )
    paid += f" (not of {unknown})" if unknown else ""
    return (
        f"about {runs} runs: {sum(weights.values()):.0f} GB of disk for weights; very roughly {hours:.1f} hours on one H100, "
        f"fitting not counted; {paid}"
    )


def _paid(words: Sequence[str], questions: int, read: int, written: int) -> float | None:
    """US dollars for a judge at a server; None where its price is not known, 0 of one on this machine."""
    judge = words[words.index("--judge") + 1]
    if not judge.startswith(ENDPOINT):
        return 0.0
    price = price_of({}, judge.removeprefix(ENDPOINT), OPENAI)
    return price.usd(questions * read, questions * written) if price else None


def chosen_users(table: Table, data: str | None) -> Mapping[str, str]:
    """Task options that choose the paper's users; none where the files in `data` are OPPU's, which hold those alone."""
    from harness.tasks import oppu_data

    tasks = {cell.keys["task"] for row in table.rows for cell in row.cells if "task" in cell.keys}
    chosen = data and any(oppu_data.find(task, Path(os.path.expanduser(data)), "dev") for task in tasks)
    return {} if chosen else table.users


def data_get(task: str, data: str, split: str) -> str:
    dest = [] if data == DOWNLOADED else ["--dest", data]
    return shlex.join(["harness", "data", "get", task, "--split", split, *dest])


def has_files(task: str, data: str, split_by: str = "user") -> bool:
    """Whether `data` holds the dev questions of a LaMP task, those of the time split where it asks for them."""
    from harness.errors import DataMissing
    from harness.tasks.lamp import Lamp
    from harness.tasks.oppu_data import is_oppu

    cls = task_class(task)
    assert issubclass(cls, Lamp)
    try:
        found = cls(data=data, split_by=split_by).questions_file("dev")
    except DataMissing:
        return False
    return split_by == "user" or "time" in found.parts or is_oppu(found)


def _downloads(gap: Gap, sources: Sources) -> Iterator[str]:
    settings = dict(flag.split("=", 1) for flag in gap.flags if "=" in flag)
    task, data, split_by = settings.get("task", gap.task), _data(gap, sources), settings.get("split_by", "user")
    if data and task.startswith("lamp") and not has_files(task, data, split_by):
        yield data_get(task, data, split_by)


def _data(gap: Gap, sources: Sources) -> str | None:
    return sources.data or (DOWNLOADED if gap.official else None)


def _runs(gaps: Sequence[Gap], sources: Sources) -> Iterator[str]:
    """Methods that lack the same tasks in one command, and values of one option in one sweep."""
    alike: dict[tuple[str, tuple[str, ...], bool], list[Gap]] = {}
    for gap in gaps:
        alike.setdefault((gap.model, gap.flags, gap.official), []).append(gap)
    for model in dict.fromkeys(gap.model for gap in gaps):
        for (name, flags, _), group in alike.items():
            if name == model:
                yield from _commands_of(group, flags, sources)


@dataclass(frozen=True)
class _Command:
    """What runs must share to be one command: a `run` of several methods, or a `sweep` of one method's option."""

    method: str
    """Empty where methods can stand side by side."""
    options: Options
    """What is set once; empty of a sweep."""
    swept: str
    tasks: tuple[str, ...]


def _commands_of(gaps: Sequence[Gap], flags: tuple[str, ...], sources: Sources) -> Iterator[str]:
    """Of one model and one set of flags."""
    lacking: dict[tuple[str, Options], list[str]] = {}
    for gap in gaps:
        lacking.setdefault((gap.method, gap.options), []).append(gap.task)
    together: dict[_Command, list[tuple[str, Options]]] = {}
    for (method, options), tasks in lacking.items():
        swept = options[0][0] if len(options) == 1 else ""
        command = _Command(method if options else "", () if swept else options, swept, tuple(tasks))
        together.setdefault(command, []).append((method, options))
    data = _data(gaps[0], sources)
    of_lamp = any("lamp" in text for gap in gaps for text in (gap.task, *gap.flags))
    shared = [*flags, "--model", gaps[0].model, *(["--data", data] if data and of_lamp else [])]
    places = places_of(sources.results)
    if len(places) == 1 and places[0] not in select():
        shared += ["--output_path", str(places[0])]
    for command, variants in together.items():
        settings = [f"{name}={value}" for name, value in command.options]
        if command.swept:
            settings = [f"{command.swept}={'|'.join(dict(options)[command.swept] for _, options in variants)}"]
        verb = "sweep" if command.swept and len(variants) > 1 else "run"
        words = [("--method", method) for method in dict.fromkeys(method for method, _ in variants)]
        words += [("--set", setting) for setting in settings] + [("--task", task) for task in command.tasks]
        yield shlex.join(["harness", verb, *(word for pair in words for word in pair), *shared])
