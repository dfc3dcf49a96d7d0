"""What run records have for the cells of a published table, and why a measured cell may not be compared with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from harness.judge.words import WORD_LISTS
from harness.publish.labels import usual
from harness.publish.tables.published import Table
from harness.records.schema import MetricValue, RunRecord, SamplingConfig

OTHER_METHODS = ("control", "ablation")
"""Options that make another thing of a method: unless `none`, a run with them is never the method's own number."""

CHOSEN_ON = ("train", "tune")
"""Splits that settings are chosen on: what a method scores there is no result of it."""


NOT_OFFICIAL: Mapping[str, str] = {
    "1fd63786b4e8a190f9696af043f61f023498152670f8cc0717986637f2b92aed": "3 of 250 lamp1 profiles are whole",
    "bd5e2dc86f2c9d3774932647d232bf24aaa0bb4a14c4fe237d3c4164f7d88f0a": "3 of 192 lamp2m profiles are whole",
    "77efeef604c6f3e0d10184baecb3cf6e3d095ea3882760cf9bc7fe192d756019": "lamp3 questions are items of other profiles",
    "8dcad942297c011288749ea310aa5c330965732caa73658e4455da4660601bf7": "96 of 1925 lamp4 profiles are whole",
    "a268de49367cf7ac2fc8f30569e5647ce24ba763f292c2d37880cbd5db65aafe": "lamp5 questions are items of profiles, cut short",
    "ff037a18095ff27653b331bb22488db5d4a0d8eb195e9940e24a9534567398a2": "1454 of 1500 lamp7 profiles are whole",
}
"""Fingerprint of data -> in what it is less than LaMP's dev split. It is that of the published records here: files collected where
they could be had, whose profile_provenance.json says of each question what is missing."""


@dataclass(frozen=True)
class Run:
    """The record shown for one (model, variant, task)."""

    record: RunRecord
    reasons: tuple[str, ...]
    """Why its numbers are not comparable with the published ones; empty where they are."""
    others: int
    """How many more records of the same model, variant and task are not shown."""

    def metric(self, name: str) -> MetricValue | None:
        return self.record.metrics.get(name)

    @cached_property
    def population(self) -> tuple[object, ...]:
        """What two runs must share for one to be called better than the other."""
        scored = max((metric.n for metric in self.record.metrics.values()), default=0)
        return (self.record.conditions, scored)


def shown_runs(records: Sequence[RunRecord], table: Table) -> Mapping[tuple[str, str, str], Run]:
    """(model, variant, task) -> the run shown; a variant is a method, or one with options that a row is about.

    The one with fewest options changed from the method's defaults; of equals without a preset, comparable, complete,
    with the fewest options of the task that the paper has not, largest, latest.
    """
    tasks = {column.keys.get("task") for column in table.columns}
    candidates: dict[tuple[str, str, str], list[RunRecord]] = {}
    for record in records:
        config = record.config
        if config.task.name not in tasks or not record.metrics or record.status not in ("complete", "partial"):
            continue
        if config.data.split in CHOSEN_ON:
            continue
        variant, options = _variant(record, table)
        if not is_another_method(record, options) and has_options(record, table):
            candidates.setdefault((config.model.name, variant, config.task.name), []).append(record)
    shown = {}
    for key, runs in candidates.items():
        best = max(runs, key=lambda record: _preference(record, table))
        shown[key] = Run(best, tuple(why_not_comparable(best, table)), len(runs) - 1)
    return shown


def _variant(record: RunRecord, table: Table) -> tuple[str, Mapping[str, str]]:
    """Of the rows that its options fit, the one that says most of them; its method where there is none."""
    method = record.config.method
    rows = [
        row
        for row in table.rows
        if row.keys["method"] == method.name
        and all(str(method.options.get(name)) == value for name, value in row.options.items())
    ]
    best = max(rows, key=lambda row: len(row.options), default=None)
    return (best.variant, best.options) if best else (method.name, {})


def is_another_method(record: RunRecord, of_row: Mapping[str, str] = {}) -> bool:
    """Whether what it scores is not the method's number: a control's, or an ablation's that the row is not about."""
    given = record.config.method.options
    changed = any(given.get(name, "none") != "none" and name not in of_row for name in OTHER_METHODS)
    return changed or record.config.selection.control != "none"


def has_options(record: RunRecord, table: Table) -> bool:
    """Whether its task was given what the table's cells ask for, for instance the same condition."""
    given = record.config.task.options
    return all(str(given.get(name)) == value for name, value in table.task_options.items())


def changed_options(record: RunRecord, of_row: Mapping[str, str] = {}) -> dict[str, Any]:
    """Options that are neither the method's defaults, nor of preset `released`, nor what the row is about."""
    method = record.config.method
    own = usual(method.name, "released" if method.preset == "released" else None)
    return {
        name: value
        for name, value in method.options.items()
        if name in own and value not in own[name] and name not in of_row
    }


def _preference(record: RunRecord, table: Table) -> tuple[int, bool, bool, bool, int, int, str, str]:
    return (
        -len(changed_options(record, _variant(record, table)[1])),
        record.config.method.preset is None,
        not why_not_comparable(record, table),
        record.status == "complete",
        -len(_unasked(record, table)),  # so that a column does not mix answers that were written and that were scored
        max(metric.n for metric in record.metrics.values()),
        record.started or "",
        record.hash,
    )


def _unasked(record: RunRecord, table: Table) -> dict[str, Any]:
    """Options of its task that are neither the paper's nor choose the paper's users."""
    given = record.config.task.options
    return {name: value for name, value in given.items() if name not in table.task_options and name not in table.users}


def on_lamp_mini(record: RunRecord) -> bool:
    return "lamp-mini" in record.config.data.description.lower()


def why_not_comparable(record: RunRecord, table: Table) -> list[str]:
    """Each reason as a clause for a footnote."""
    config, task = record.config, record.config.task.name
    reasons = [*why_incomplete(record), *table.apart.get("all", ()), *table.apart.get(config.method.name, ())]
    split = table.keys.get("split")
    if split and config.data.split != split:
        reasons.append(f"{task} split {config.data.split}, published {split}")
    if split and config.data.fit_split and config.data.fit_split.partition(":")[0] == split:
        reasons.append(f"{task} items of {config.data.fit_split} held out for fitting")
    if unasked := _unasked(record, table):
        reasons.append(f"{task} with {', '.join(f'{name}={value}' for name, value in unasked.items())}")
    judge = config.judge.name if config.judge else ""
    if table.judge and judge not in WORD_LISTS and not judge.startswith(table.judge):
        reasons.append(f"judged by {judge or 'nobody'}, published {table.judge}")
    if table.sampling and table.sampled_as != {name: getattr(config.sampling, name) for name in table.sampled_as}:
        reasons.append(f"{task} {_drawn(config.sampling)}, published with {' '.join(table.sampling)}")
    elif config.sampling.temperature > 0 and not table.sampling and not table.judge:
        reasons.append(f"{task} {_drawn(config.sampling)}")
    n = max((metric.n for metric in record.metrics.values()), default=0)
    official = table.official_items.get(task)
    if official and n != official and not reasons:
        reasons.append(f"{n} {task} items, the split of the paper has {official}")
    reasons += [NOT_OFFICIAL[config.data.fingerprint]] if config.data.fingerprint in NOT_OFFICIAL else []
    changed = changed_options(record, _variant(record, table)[1])
    if changed:
        reasons.append(f"{config.method.name} with {', '.join(f'{name}={value}' for name, value in changed.items())}")
    return reasons


def _drawn(sampling: SamplingConfig) -> str:
    if not sampling.temperature:
        return "answered greedily"
    cuts = [("top_k", sampling.top_k or 0, 0), ("top_p", 1.0 if sampling.top_p is None else sampling.top_p, 1)]
    said = [f"{name} {value:g}" for name, value, none in cuts if value != none]
    return ", ".join([f"sampled at temperature {sampling.temperature:g}", *said])


def why_incomplete(record: RunRecord) -> list[str]:
    """What makes it less than the paper's run, whatever the table."""
    config, task, health = record.config, record.config.task.name, record.health
    reasons = ["synthetic lamp-mini data"] if on_lamp_mini(record) else []
    if config.selection.limit is not None:
        reasons.append(f"{task} --limit {config.selection.limit}")
    if config.selection.users is not None:
        reasons.append(f"{task} --users {config.selection.users}")
    if config.selection.exclude_leaks:
        reasons.append(f"{task} --exclude_leaks")
    if config.judge and config.judge.name in WORD_LISTS:
        reasons.append("judged by word lists")
    if health.unjudged:
        reasons.append(f"{health.unjudged} {task} samples not judged")
    if health.errors:
        reasons.append(f"{health.errors} {task} samples failed")
    elif record.status == "partial":
        reasons.append(f"{task} run incomplete")
    return reasons
