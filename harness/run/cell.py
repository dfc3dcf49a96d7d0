"""A cell of a grid: one method on one task under the command's settings, and the items it evaluates and fits on.

Reads data and no model, and imports no torch, so that a mistake shows before anything is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from harness.data import Labelled
from harness.errors import DataMissing, UsageError
from harness.method import Method
from harness.plan import TEMPERATURES, Sampling, sane_temperature
from harness.plugins.items import items_of
from harness.plugins.options import build_method, build_task, takes_data
from harness.plugins.registry import method_row, task_class, task_name, task_source
from harness.plugins.returned import described, fingerprint_of, generation_of
from harness.records.select import OWN
from harness.run.control import Control, controlled
from harness.run.leaks import check_apart, without_leaks
from harness.task import Generation, Selection, Task


@dataclass(frozen=True)
class Settings:
    """What the command line says beside model, method and task."""

    split: str = "dev"
    """Empty = the task's own, which `grid` fills in."""
    limit: int | None = None
    users: int | None = None
    control: Control = "none"
    """Whose history the items get; see `harness.run.control`."""
    fit_split: str | None = None
    """`train` where it exists; or `dev:0.2`, a seeded share of another split's users, kept out of the evaluation."""
    batch_size: int | None = None
    """Samples a batch; None = auto."""
    max_new_tokens: int | None = None
    """None = the task's."""
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    output_path: Path = OWN
    allow_noop: bool = False
    effect_samples: int = 32
    """Answers that are compared with the unedited model's, to see whether the method did anything; 0 = none."""
    exclude_leaks: bool = False
    """Whether items whose history holds the answer are left out (`harness.run.leaks`)."""
    retry_failed: bool = False
    """Whether the failed samples of a finished record are run again."""

    def __post_init__(self) -> None:
        """Raises UsageError where a number is none that can be meant."""
        for name, value, valid, allowed in (
            ("temperature", self.temperature, sane_temperature(self.temperature), TEMPERATURES),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, up to 1, which is no cut"),
            ("top_k", self.top_k, 0 <= self.top_k < 2**31, "0, which is no cut, to 2147483647"),
            ("seed", self.seed, 0 <= self.seed < 2**63, f"0 to {2**63 - 1}"),
            ("limit", self.limit, self.limit is None or self.limit >= 1, "1 or more"),
            ("users", self.users, self.users is None or self.users >= 1, "1 or more"),
            (
                "max_new_tokens",
                self.max_new_tokens,
                self.max_new_tokens is None or self.max_new_tokens >= 1,
                "1 or more",
            ),
            ("batch_size", self.batch_size, self.batch_size is None or self.batch_size >= 1, "auto, or 1 or more"),
            ("effect_samples", self.effect_samples, self.effect_samples >= 0, "0, which compares nothing, or more"),
        ):
            if not valid:
                raise UsageError(f"--{name} {value} is not valid; allowed: {allowed}")

    def sampling(self) -> Sampling:
        """Raises UsageError where the numbers make no distribution."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.seed)


@dataclass(frozen=True)
class FitData:
    """Which items a method fits on."""

    task_name: str
    task: Task
    task_options: Mapping[str, Any]
    split: str | None = None
    """`train`, or `dev:0.2`; None where nothing is fitted on and nobody held out."""
    fingerprint: str | None = None
    held_out: frozenset[str] = frozenset()
    """Users who belong to the fit and are not evaluated."""

    def items(self) -> Sequence[Labelled]:
        """None of them without a split. Raises DataMissing where a split has none."""
        if self.split is None:
            return []
        name, _, share = self.split.partition(":")
        items = items_of(self.task, Selection(split=name))
        if share:
            items = [item for item in items if item.example.user.id in self.held_out]
        if not items:
            raise DataMissing(f"{self.task_name}: nothing to fit on; split {self.split} is empty")
        return items


@dataclass(frozen=True)
class Cell:
    """A method on a task, both built and checked. Reading `items` or `fit_data` raises what is wrong with the data."""

    method_name: str
    method: Method
    task_name: str
    task: Task
    settings: Settings = Settings()
    task_options: Mapping[str, Any] = field(default_factory=dict)
    preset: str | None = None
    fit_task: tuple[str, Task] | None = None
    """Another task than the evaluated one to fit on."""
    fit_options: Mapping[str, Any] = field(default_factory=dict)
    """That task's options."""
    method_source: str | None = None
    """Hash of the file of a method that is not registered."""

    @property
    def max_new_tokens(self) -> int:
        return self.settings.max_new_tokens or generation_of(self.task).max_new_tokens

    @property
    def fit_max_new_tokens(self) -> int:
        """Of answers a method makes while it fits: as long as the task it fits on wants them."""
        _, task = self.fit_task or (self.task_name, self.task)
        return self.settings.max_new_tokens or generation_of(task).max_new_tokens

    @property
    def description(self) -> str:
        """One line on which data is read."""
        return described(self.task)

    @cached_property
    def selection(self) -> Selection:
        s = self.settings
        return Selection(s.split, s.limit, s.users, self.fit_data.held_out)

    @cached_property
    def items(self) -> Sequence[Labelled]:
        """What is evaluated, in file order, with the histories the control gives."""
        return controlled(self.own_items, self.settings.control, self.settings.seed)

    @cached_property
    def own_items(self) -> Sequence[Labelled]:
        """What is evaluated, under its users' own histories; which items these are no control changes."""
        items = items_of(self.task, self.selection)
        if not items:
            raise DataMissing(
                f"{self.task_name}: nothing to evaluate; split {self.settings.split} has no users besides the "
                f"{len(self.fit_data.held_out)} held out for fitting"
            )
        kept = without_leaks(self.task, items) if self.settings.exclude_leaks else items
        if not kept:
            raise DataMissing(f"{self.task_name}: nothing to evaluate; the history of each item holds its answer")
        return kept

    @cached_property
    def shared_with_fit(self) -> Sequence[str]:
        """Notes on what the evaluated items share with those that are fitted on. Raises UsageError where items are both."""
        fit = self.fit_data
        if fit.split is None or not self.method.needs_train():
            return ()
        return check_apart(self.task, self.own_items, fit.items(), same_task=self.fit_task is None)

    @cached_property
    def fit_data(self) -> FitData:
        """Where the method fits, and which users that takes out of the evaluation.

        A share (`dev:0.2`) takes its users out for every method of a command, so that all are scored on the same items.
        """
        name, task = self.fit_task or (self.task_name, self.task)
        options = self.fit_options if self.fit_task else self.task_options
        given = self.settings.fit_split or "train"
        split, colon, share = given.partition(":")
        if colon:
            held_out = _share_of_users(task, split, _fraction(given, share), self.settings.seed)
            return FitData(name, task, options, given, fingerprint_of(task, Selection(split)), held_out)
        if not self.method.needs_train():
            if split not in ("train", "dev", "test"):
                with suppress(DataMissing):
                    fingerprint_of(task, Selection(split))  # raises UsageError where the task has no such split
            return FitData(name, task, options)
        optional = self.method.fits_without_train
        if split == self.settings.split and self.fit_task is None:
            if optional and self.settings.fit_split is None:
                return FitData(name, task, options)
            raise UsageError(f"--fit_split {split} is the evaluated split; give a share of it, as in {split}:0.2")
        try:
            return FitData(name, task, options, split, fingerprint_of(task, Selection(split)))
        except DataMissing as error:
            if optional and self.settings.fit_split is None:
                return FitData(name, task, options)
            raise DataMissing(
                f"{self.method_name} fits on a {split} split and there is none: {error}. Or fit on a share of the "
                f"evaluated users, kept out of the evaluation: --fit_split {self.settings.split}:0.2"
            ) from error


def grid(
    methods: Sequence[str | Method],
    tasks: Sequence[str],
    settings: Settings,
    method_settings: Sequence[str] = (),
    task_settings: Sequence[str] = (),
    presets: Sequence[str] = (),
    data: str | None = None,
    fit_task: str | None = None,
    fit_data: str | None = None,
    fit_settings: Sequence[str] = (),
) -> list[Cell]:
    """Every method on every task, from names, or a method itself, and `key=value` strings.

    Raises UsageError for whatever is not known.

    A task to fit on has the options `fit_settings`, before them those of the evaluated task where it is of one family.
    A setting or preset `dps.gamma=1` is for that one of several methods, one without a method's name for all.
    """
    for option, of_fit in (("--fit_set", next(iter(fit_settings), None)), ("--fit_data", fit_data)):
        if of_fit is not None and fit_task is None:
            raise UsageError(
                f"{option} {of_fit} is about another task to fit on; name it, as in --fit_task persona:religion"
            )
    for option, given in (("--set", method_settings), ("--task_set", task_settings), ("--fit_set", fit_settings)):
        _check_once(option, given)
    rows = [method_row(name) for name in methods]
    names = {row.name for row in rows}
    for setting in method_settings:
        key = setting.partition("=")[0]
        having = [row.name for row in rows if key in row.cls().options()]
        if having and len(having) < len(rows):
            raise UsageError(
                f"--set {setting} is not for every method; for {having[0]} alone give --set {having[0]}.{setting}"
            )
    built = []
    for row in rows:
        (*others, preset) = [None, *_meant_for(row.name, presets, names)]
        if len(others) > 1:
            raise UsageError(f"method {row.name!r} can have one preset, not both {others[-1]} and {preset}")
        built.append(
            (
                row,
                preset,
                build_method(row.cls, row.name, preset, _meant_for(row.name, method_settings, names), row.made),
            )
        )
    cells = []
    unread = data is not None
    for task in map(task_name, tasks):
        made, options = build_task(task_class(task), task, task_settings, data)
        source = task_source(task)
        if source is not None:
            options["source_sha256"] = source
        unread &= not takes_data(type(made))
        chosen = replace(settings, split=settings.split or made.default_split)
        other: tuple[str, Task] | None = None
        fit_options: dict[str, Any] = {}
        if fit_task is not None and task_name(fit_task) != task:
            given = [*(task_settings if _alike(task_name(fit_task), task) else []), *fit_settings]
            fit_on, fit_options = build_task(task_class(fit_task), fit_task, given, fit_data or data)
            if (fit_source := task_source(fit_task)) is not None:
                fit_options["source_sha256"] = fit_source
            other = (task_name(fit_task), fit_on)
            unread &= not takes_data(type(fit_on))
            if fit_data is not None and not takes_data(type(fit_on)):
                raise UsageError(f"--fit_data {fit_data}: {fit_task} reads no folder of files; leave it out")
        elif fit_settings or fit_data not in (None, data):
            raise UsageError(
                f"--fit_set and --fit_data are about another task than {task}, which is evaluated; it is fitted on with its own "
                "options and files, so leave them out"
            )
        for row, preset, method in built:
            cells.append(Cell(row.name, method, task, made, chosen, options, preset, other, fit_options, row.source))
    if unread:
        names_of_tasks = ", ".join(map(task_name, tasks))
        raise UsageError(f"--data {data}: {names_of_tasks} reads no folder of files; leave it out")
    return cells


def _alike(task: str, other: str) -> bool:
    """Whether they are of one family, as persona:islam and persona:religion, and so have the same options."""
    return task.partition(":")[0] == other.partition(":")[0]


def _check_once(option: str, given: Sequence[str]) -> None:
    """Raises UsageError where one option has two values, of which all but the last would be lost."""
    seen: dict[str, str] = {}
    for setting in given:
        key, _, value = setting.partition("=")
        if seen.setdefault(key, value) != value:
            both = f"; harness sweep --set '{key}={seen[key]}|{value}' runs both" if option == "--set" else ""
            raise UsageError(f"{option} {key} is given as {seen[key]} and as {value}; give it once{both}")


def _meant_for(name: str, given: Sequence[str], names: Collection[str]) -> list[str]:
    """The values for all methods, then those that stand as `name.value`."""
    split = [(value.partition("."), value) for value in given]
    own = [rest for (prefix, _, rest), _ in split if prefix == name and prefix in names]
    return [value for (prefix, _, _), value in split if prefix not in names] + own


def check_fit(cell: Cell) -> None:
    """Raises UsageError where the method has nothing to fit, DataMissing where it has nothing to fit on."""
    if not cell.method.fits():
        raise UsageError(f"method {cell.method_name!r} has nothing to fit; 'harness run' is all it needs")
    cell.fit_data.items()


def _fraction(given: str, share: str) -> float:
    try:
        fraction = float(share)
    except ValueError:
        fraction = math.nan
    if not 0 < fraction < 1:
        raise UsageError(
            f"--fit_split {given} is not valid; give SPLIT, or SPLIT:SHARE with 0 < SHARE < 1, as in dev:0.2"
        )
    return fraction


def _share_of_users(task: Task, split: str, fraction: float, seed: int) -> frozenset[str]:
    import numpy as np

    users = list(dict.fromkeys(item.example.user.id for item in items_of(task, Selection(split))))
    if not users:
        return frozenset()
    count = max(1, round(fraction * len(users)))
    chosen = np.random.Generator(np.random.Philox(seed)).choice(len(users), count, replace=False)
    return frozenset(users[i] for i in chosen)


def generation_of_cell(cell: Cell) -> Generation:
    """How the cell's responses are decoded."""
    return Generation(cell.max_new_tokens, generation_of(cell.task).stop, cell.settings.sampling())
