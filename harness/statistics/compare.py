"""Runs on the same samples against the first of them: `harness compare`. Reads records; no model is run.

Pairs are samples with the same id and user that both runs answered; what is left out is counted. Every metric that is a
mean over samples is compared, and the p values of all runs and metrics shown are one family, corrected by Holm.
With a control (another user's history, or a shuffled one) as the first run, the difference is the personalization gain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from harness.errors import DataMissing, HarnessError, UsageError, did_you_mean
from harness.plugins.options import defaults_of, rebuild_task
from harness.plugins.registry import task_class
from harness.records.schema import RunConfig, RunRecord
from harness.records.store import folder_of, read_record, read_samples
from harness.statistics.intervals import bounds_of
from harness.statistics.paired_tests import (
    LEVEL,
    ByLength,
    Effect,
    by_length,
    effect,
    flip_test,
    gains_by_user,
    holm,
    patterns,
)
from harness.task import Sample, Selection, Task


@dataclass(frozen=True)
class Side:
    """One run: A, the one the others are held against, or B, C, ..."""

    letter: str
    folder: Path
    record: RunRecord
    answered: Mapping[tuple[str, str], Sample]
    """By user and item; failed samples are not in it."""
    failed: int

    @property
    def config(self) -> RunConfig:
        return self.record.config


@dataclass(frozen=True)
class Compared:
    """One metric of one run against A."""

    letter: str
    metric: str
    higher_is_better: bool
    effect: Effect
    unpaired: int
    """Shared samples without a value in one of the two runs, as where a judge gave none."""
    lengths: ByLength | None
    """None where the users' histories are not known, or all of one length."""
    p_holm: float = math.nan


@dataclass(frozen=True)
class Between:
    """Whether two of the runs differ in the first metric."""

    first: str
    second: str
    gain: float
    """Mean over the samples both answered, positive where the second is better."""
    p: float
    p_holm: float = math.nan
    """Corrected for all pairs of runs."""

    @property
    def better(self) -> str:
        """The letter of the run that is better at 5 %; empty where nothing separates them."""
        if math.isnan(self.p_holm) or self.p_holm >= LEVEL:
            return ""
        return self.second if self.gain > 0 else self.first


@dataclass(frozen=True)
class Comparison:
    sides: tuple[Side, ...]
    unit: str
    """What is resampled: `user`, or `item`."""
    rows: tuple[Compared, ...]
    shared: Mapping[str, int] = field(default_factory=dict)
    """Letter -> samples that run and A both answered."""
    notes: tuple[str, ...] = ()
    between: tuple[Between, ...] = ()
    """Every two of the runs, in the first metric shown."""
    min_history: int = 0
    """Only users with as many items of history are compared."""

    def rank(self, letter: str) -> int:
        """1, and 1 more for each run that is better: what nothing separates shares a rank."""
        return 1 + sum(one.better not in ("", letter) for one in self.between if letter in (one.first, one.second))


MAIN = "main"
"""In place of a metric's name: the first one that is a mean over samples."""


def compare(
    folders: Sequence[Path], metrics: Sequence[str] = (), data: str | None = None, *, min_history: int = 0
) -> Comparison:
    """All runs against the first, in `metrics` (every metric that is a mean over samples, where none is named).

    With `min_history`, only users with as many items of history, or more, take part.

    Raises UsageError for runs of other tasks, data, splits or judges, DataMissing where a run's samples are not there.
    """
    sides = [_side(letter(number), folder) for number, folder in enumerate(folders)]
    if len(sides) < 2:
        raise UsageError("give two runs or more, or one and --control wrong_user")
    for side in sides[1:]:
        _check(sides[0], side)
    cls = task_class(sides[0].config.task.name)
    names, notes = _metrics(sides, cls.per_sample, metrics)
    lengths, why_not = _history_lengths(sides[0], cls, data)
    if min_history and lengths is None:
        raise UsageError(f"--min_history {min_history} needs the lengths of users' histories: {why_not}")
    varied = lengths if lengths and len(set(lengths.values())) > 1 else None
    if varied is None:
        notes.append(f"gain against history length is not shown: {why_not or 'all histories are of one length'}")
    rows: list[Compared] = []
    shared = {}
    for side in sides[1:]:
        everything = _shared(sides[0], side)
        pairs = _long_enough(everything, cls, lengths, min_history)
        shared[side.letter] = len(pairs)
        notes += _left_out(sides[0], side, len(everything))
        for name in names:
            rows.append(_compared(sides[0], side, pairs, name, cls, varied, tests=len(names) * (len(sides) - 1)))
            if rows[-1].unpaired:
                notes.append(f"{side.letter}, {name}: {rows[-1].unpaired} shared samples have no value and are no pair")
    adjusted = holm([row.effect.p for row in rows])
    final = tuple(replace(row, p_holm=p) for row, p in zip(rows, adjusted, strict=True))
    between = _between(sides, names[0], cls, lengths, min_history)
    return Comparison(tuple(sides), cls.independent, final, shared, tuple(notes), between, min_history)


def _long_enough(
    pairs: Sequence[tuple[str, str]], cls: type[Task], lengths: Mapping[str, int] | None, least: int
) -> Sequence[tuple[str, str]]:
    if not least or lengths is None:
        return pairs
    kept = [pair for pair in pairs if lengths[pair[0] if cls.independent == "user" else pair[1]] >= least]
    if not kept:
        raise UsageError(
            f"no {cls.independent} has {least} items of history; the longest history has {max(lengths.values())}"
        )
    return kept


def _between(
    sides: Sequence[Side], name: str, cls: type[Task], lengths: Mapping[str, int] | None, least: int
) -> tuple[Between, ...]:
    """Every two runs in one metric; runs that share no sample are left out."""
    found, most = [], patterns(len(sides) * (len(sides) - 1) // 2)
    for place, first in enumerate(sides):
        for second in sides[place + 1 :]:
            shared = sorted(first.answered.keys() & second.answered.keys())
            if not shared:
                continue
            x, y, units = _values(first, second, _long_enough(shared, cls, lengths, least), name, cls)
            if not x:
                continue
            better = first.record.metrics[name].higher_is_better
            sums, counts = gains_by_user(np.asarray(x), np.asarray(y), units, higher_is_better=better)
            found.append(Between(first.letter, second.letter, float(sums.sum() / counts.sum()), flip_test(sums, most)))
    return tuple(replace(one, p_holm=p) for one, p in zip(found, holm([one.p for one in found]), strict=True))


def control_of(folder: Path, control: str) -> Path:
    """The record of the same run under `control`. Raises DataMissing where there is none, with what makes it."""
    record = read_record(folder)
    config = record.config
    if config.selection.control != "none":
        raise UsageError(
            f"{folder} is a control itself ({config.selection.control}); give the run it is the control of"
        )
    selection = config.selection.model_copy(update={"control": control})
    beside = folder.parent if folder.name not in ("", "..") else folder.resolve().parent
    wanted = beside / folder_of(Path(), config.model_copy(update={"selection": selection})).name
    if not (wanted / "run.json").is_file():
        raise DataMissing(
            f"{folder} has no record under control {control}; make it with the command that made the run and "
            f"--control {control}"
        )
    return wanted


def differences(a: RunConfig, b: RunConfig) -> list[str]:
    """Where b is not configured as a, as `selection.control wrong_user -> none`; method options of one of them alone are left out.

    A record has the options of its task that the command gave: one that it lacks is the task's default. The revision is said
    where the names of the models do not tell their weights apart.
    """
    models = {"id"} if a.model.name == b.model.name else {"id", "revision"}
    unsaid: Any = {"model": models, "data": {"description", "fit_fingerprint"}, "judge": {"base_url"}}
    first, second = (_flat(config.model_dump(mode="json", exclude=unsaid)) for config in (a, b))
    for options, one, other in (
        ("task.options.", a.task.name, b.task.name),
        ("data.fit_options.", a.data.fit_task, b.data.fit_task),
    ):
        if one is not None and one == other:
            first, second = _completed(first, second, options, one), _completed(second, first, options, one)
    return [f"{key} {first[key]} -> {second[key]}" for key in first if key in second and first[key] != second[key]]


def _completed(mine: Mapping[str, Any], its: Mapping[str, Any], options: str, task: str) -> dict[str, Any]:
    """`mine` with what it lacks of the task's options that `its` has: the task's defaults; `default` where they are not known."""
    lacking = [key for key in its if key.startswith(options) and key not in mine]
    try:
        defaults = defaults_of(task_class(task)) if lacking else {}
    except UsageError:  # its file is not here
        defaults = {}
    return {**mine, **{key: defaults.get(key.removeprefix(options), "default") for key in lacking}}


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def letter(number: int) -> str:
    """A to Z, then AA, AB, ..."""
    first, last = divmod(number, 26)
    return (letter(first - 1) if first else "") + chr(ord("A") + last)


def _side(letter: str, folder: Path) -> Side:
    record, samples = read_record(folder), read_samples(folder)
    if not samples:
        raise DataMissing(
            f"{folder} has no samples.jsonl to compare; delete the folder and run the same command again to get it back"
        )
    if not record.metrics:
        raise DataMissing(
            f"{folder} is {record.status} and has no metrics yet; the command that made it goes on with it"
        )
    answered = {(sample.user, sample.id): sample for sample in samples if sample.error is None and sample.metrics}
    return Side(letter, folder, record, answered, len(samples) - len(answered))


def _check(a: Side, b: Side) -> None:
    one, other = a.config, b.config
    if a.record.hash == b.record.hash:
        raise UsageError(f"{a.folder} and {b.folder} are one run; give two")
    judges = [
        tuple(filter(None, (config.judge.name, config.judge.revision, config.judge.options)))
        if config.judge
        else "none"
        for config in (one, other)
    ]
    for what, mine, its in (
        ("tasks", (one.task.name, one.task.version), (other.task.name, other.task.version)),
        ("splits", one.data.split, other.data.split),
        ("data", one.data.fingerprint[:16], other.data.fingerprint[:16]),
        ("judges", judges[0], judges[1]),
    ):
        if mine != its:
            raise UsageError(
                f"runs of different {what} cannot be compared: {a.folder} has {_said(mine)}, {b.folder} {_said(its)}"
            )


def _said(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _metrics(
    sides: Sequence[Side], per_sample: Mapping[str, str], wanted: Sequence[str]
) -> tuple[list[str], list[str]]:
    """The metrics to compare, and a note on those that cannot be: macro-F1 is the mean of no number of a sample."""
    in_all = [name for name in sides[0].record.metrics if all(name in side.record.metrics for side in sides)]
    known = set.intersection(*({n for s in side.answered.values() for n in s.metrics} for side in sides))
    possible = [name for name in in_all if per_sample.get(name, name) in known]
    if not possible:
        raise UsageError("no metric of these runs is a mean over samples, so nothing can be compared")
    if list(wanted) == [MAIN]:
        return possible[:1], []
    for name in wanted:
        if name not in possible:
            hint = did_you_mean(name, possible)
            raise UsageError(f"metric {name!r} cannot be compared{hint} means over samples are: {', '.join(possible)}")
    others = [name for name in in_all if name not in possible and "/" not in name]
    notes = [f"not means over samples, so not compared: {', '.join(others)}"] if others and not wanted else []
    return [name for name in possible if not wanted or name in wanted], notes


def _shared(a: Side, b: Side) -> list[tuple[str, str]]:
    shared = sorted(a.answered.keys() & b.answered.keys())
    if not shared:
        raise UsageError(f"{a.folder} and {b.folder} have no answered sample in common")
    return shared


def _left_out(a: Side, b: Side, shared: int) -> list[str]:
    failed = a.failed + b.failed
    counts = {f"answered by {side.letter} alone": len(side.answered) - shared for side in (a, b)}
    counts |= {"failed": failed}
    said = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return [f"{b.letter}: left out: {said}"] if said else []


def _compared(
    a: Side,
    b: Side,
    pairs: Sequence[tuple[str, str]],
    name: str,
    cls: type[Task],
    lengths: Mapping[str, int] | None,
    tests: int,
) -> Compared:
    better = a.record.metrics[name].higher_is_better
    first, second, units = _values(a, b, pairs, name, cls)
    if not first:
        raise UsageError(f"{a.folder} and {b.folder} have no sample with {name} in common")
    bounds = cls.ranges.get(cls.per_sample.get(name, name)) or bounds_of(np.array(first), np.array(second))
    gains = [(y - x) * (1 if better else -1) for x, y in zip(first, second, strict=True)]
    return Compared(
        letter=b.letter,
        metric=name,
        higher_is_better=better,
        effect=effect(first, second, units, higher_is_better=better, bounds=bounds, tests=tests),
        unpaired=len(pairs) - len(first),
        lengths=by_length(gains, units, lengths, bounds) if lengths is not None else None,
    )


def _values(
    a: Side, b: Side, pairs: Sequence[tuple[str, str]], name: str, cls: type[Task]
) -> tuple[list[float], list[float], list[str]]:
    """Both runs' values of the samples that have one in both, and whose or which they are."""
    of_sample = cls.per_sample.get(name, name)
    first, second, units = [], [], []
    for pair in pairs:
        x, y = (side.answered[pair].metrics.get(of_sample) for side in (a, b))
        if x is not None and y is not None:
            first.append(x)
            second.append(y)
            units.append(pair[0] if cls.independent == "user" else pair[1])
    return first, second, units


def _history_lengths(side: Side, cls: type[Task], data: str | None) -> tuple[dict[str, int] | None, str]:
    """User (or item) -> items of history, read again from the data; or None and the reason."""
    config = side.config
    try:
        task = rebuild_task(cls, config.task.options, data)
        if task.fingerprint(Selection(config.data.split)) != config.data.fingerprint:
            return None, f"the runs read other data ({config.data.description}); give their --data"
        items = task.items(Selection(config.data.split))
    except HarnessError as error:
        return None, str(error)
    found: dict[str, int] = {}
    for item in items:
        unit = item.example.user.id if cls.independent == "user" else item.example.id
        found[unit] = max(found.get(unit, 0), len(item.example.user.history))
    return found, ""
