"""What the report shows, as JSON values made from the records: rankings, trade-offs, answers, tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import UsageError
from harness.plugins.registry import task_class
from harness.publish import leaderboard
from harness.publish.labels import names_of_a_sample
from harness.publish.leaderboard import Ranking, Row
from harness.publish.report.items import Group, key
from harness.publish.tables import grids
from harness.publish.tables.formats import notes_of
from harness.records.schema import MetricValue, RunRecord
from harness.records.select import Places, said
from harness.task import Sample

if TYPE_CHECKING:
    from harness.publish.tables.grid import Grid

UTILITY = "mmlu"
"""The task that tells what a method costs the model's general ability."""


def overview(runs: Sequence[RunRecord], results: Places, groups: Sequence[Group]) -> dict[str, Any]:
    """What the page needs at once: every run in a few numbers, the rankings, and which runs share items.

    Models come as in `runs`, and of one model first what ranks more than one run.
    """
    models = list(dict.fromkeys(run.config.model.name for run in runs))
    rankings = sorted(
        leaderboard.rankings(runs), key=lambda ranking: (models.index(_model(ranking)), len(ranking.rows) == 1)
    )
    labels = {id(row.run): row.label for ranking in rankings for row in ranking.rows}
    grouped = {name for group in groups for name in group.keys}
    return {
        "results": said(results),
        "runs": {
            key(run): {
                "label": labels.get(id(run), run.config.method.name),
                "model": run.config.model.name,
                "task": run.config.task.name,
                "method": run.config.method.name,
                "control": run.config.selection.control,
                "status": run.status,
                "answers": key(run) in grouped,
                "heads": bool(run.analysis.get("heads")),
                "metrics": {name: _metric(metric) for name, metric in run.metrics.items()},
            }
            for run in runs
        },
        "rankings": [_ranking(ranking) for ranking in rankings],
        "groups": [_group(group) for group in groups],
        "trade_offs": trade_offs(rankings),
        "costs": costs(rankings),
    }


def _ranking(ranking: Ranking) -> dict[str, Any]:
    config = ranking.rows[0].run.config
    return {
        "title": ranking.title,
        "description": ranking.description,
        "model": config.model.name,
        "task": config.task.name,
        "control": config.selection.control,
        "metric": ranking.metric,
        "others": ranking.others,
        "higher_is_better": ranking.higher_is_better,
        "rows": [
            {
                "run": key(row.run),
                "place": row.place,
                "variant": row.variant,
                "gain": row.gain,
                "tokens": row.tokens,
                "operations": row.operations,
                "setup_seconds": row.run.cost.setup_seconds_per_user,
                "stored_bytes": row.run.cost.stored_bytes_per_user,
                "flags": [flag.strip("*") for flag in row.flags],
            }
            for row in ranking.rows
        ],
    }


def _group(group: Group) -> dict[str, Any]:
    """`metrics`: the per-sample numbers, whether more is better where that is known, the task's main one first."""
    config = group.runs[0].config
    try:
        own_name = task_class(config.task.name).per_sample
    except UsageError:  # a task that this version does not have
        own_name = {}
    called = names_of_a_sample(config.task.name)
    better = {
        own_name.get(name, name): metric.higher_is_better for run in group.runs for name, metric in run.metrics.items()
    }
    shown = {name: None for key in group.keys for sample in group.samples[key] for name in sample.metrics}
    order = [*(name for name in better if name in shown), *(name for name in shown if name not in better)]
    options = "".join(f", {name}={json.dumps(value)}" for name, value in sorted(config.task.options.items()))
    return {
        "name": group.name,
        "title": f"{config.task.name}{options}, {config.data.split}",
        "task": config.task.name,
        "data": config.data.description,
        "runs": [name for _, name in sorted(zip(group.runs, group.keys, strict=True), key=_standing)],
        "metrics": [
            {"name": name, "title": called.get(name, name), "higher_is_better": better.get(name)} for name in order
        ],
    }


def _standing(named: tuple[RunRecord, str]) -> tuple[bool, int, str]:
    """Baselines first, controls last, else by name."""
    config = named[0].config
    baselines = ("copy", "plain", "rag")
    place = baselines.index(config.method.name) if config.method.name in baselines else len(baselines)
    return config.selection.control != "none", place, named[1]


def trade_offs(rankings: Sequence[Ranking]) -> list[dict[str, Any]]:
    """What methods gain on a task against what they lose on MMLU, both against `plain` on the same samples.

    A method stands in one where both tasks have a run of it with equal options, fitted on the same. Gains are positive
    where it is better; `gain` and `utility` are [difference, low, high], the ends being those of the method's own 95 % interval.
    Those with most methods come first.
    """
    usual = [ranking for ranking in rankings if ranking.rows[0].run.config.selection.control == "none"]
    of_utility = [ranking for ranking in usual if _task(ranking) == UTILITY]
    found = []
    for utility in of_utility:
        for ranking in usual:
            if _task(ranking) == UTILITY or ranking.rows[0].run.weights != utility.rows[0].run.weights:
                continue
            lost = {_method(row): row for row in utility.rows}
            points = [
                {"run": key(row.run), "gain": gain, "utility": change}
                for row in ranking.rows
                if (other := lost.get(_method(row)))
                and (gain := _against_plain(row, ranking))
                and (change := _against_plain(other, utility))
            ]
            if len(points) > 1:
                names = {"gain": f"{_task(ranking)} {ranking.metric}", "utility": f"{UTILITY} {utility.metric}"}
                found.append({"title": f"{ranking.title} against {utility.title}", **names, "points": points})
    return sorted(found, key=lambda one: -len(one["points"]))


def costs(rankings: Sequence[Ranking]) -> list[dict[str, Any]]:
    """What methods gain on a task against the operations an answer takes, both against `plain` on the same samples.

    Points are as in `trade_offs`; `utility` is the ratio of operations, which has no interval. Variants are left out.
    """
    found = []
    for ranking in rankings:
        points = [
            {"run": key(row.run), "gain": gain, "utility": [row.operations, None, None]}
            for row in ranking.rows
            if not row.variant and row.operations and (gain := _against_plain(row, ranking))
        ]
        if ranking.control == "none" and len(points) > 1:
            names = {"gain": f"{ranking.task} {ranking.metric}", "utility": "operations an answer, relative to plain"}
            found.append({"title": f"{ranking.title} against operations", **names, "points": points})
    return found


def _task(ranking: Ranking) -> str:
    return ranking.rows[0].run.config.task.name


def _model(ranking: Ranking) -> str:
    return ranking.rows[0].run.config.model.name


def _method(row: Row) -> tuple[str, str | None]:
    """A method with its options, and what it was fitted on; without how it retrieves, where no history is read."""
    config, method = row.run.config, row.run.config.method
    reads_none = config.task.name.startswith("persona:") or method.name == "plain" or method.options.get("k") == 0
    of_retrieval = ("retriever", "k") if reads_none else ()
    options = {name: value for name, value in method.options.items() if name not in of_retrieval}
    return json.dumps([method.name, method.preset, options], sort_keys=True), config.data.fit_fingerprint


def _against_plain(row: Row, ranking: Ranking) -> list[float | None] | None:
    """Difference to `plain` with the ends of the method's interval, positive where better; None where a value is missing."""
    plain = next((other.run for other in ranking.rows if other.run.config.method.name == "plain"), None)
    base = plain.metrics.get(ranking.metric) if plain else None
    mine = row.run.metrics.get(ranking.metric)
    if base is None or mine is None or base.value is None or mine.value is None:
        return None
    sign = 1 if ranking.higher_is_better else -1
    low, high = (mine.low, mine.high) if sign == 1 else (mine.high, mine.low)
    return [None if end is None else sign * (end - base.value) for end in (mine.value, low, high)]


def tables(results: Places) -> list[dict[str, Any]]:
    """The papers' tables, line by line as `harness table` prints them."""
    return [_table(grid) for grid in grids((), results)]


def figures(results: Places, folder: Path) -> list[dict[str, Any]]:
    """The papers' figures, those that can be drawn from the records as SVG files in `folder`."""
    from harness.publish.figures import FIGURES, commands, write

    drawn = {path.stem for path in write(["all"], results, folder, ("svg",)).paths}
    return [
        {
            "id": id,
            "title": spec.title,
            "place": spec.place,
            "file": f"{folder.name}/{id}.svg" if id in drawn else None,
            "commands": () if id in drawn else commands(id),
        }
        for id, spec in FIGURES.items()
    ]


def _table(grid: Grid) -> dict[str, Any]:
    table = grid.table
    return {
        "id": table.id,
        "title": table.title,
        "header": [
            *(table.printed("row_keys", name) for name in table.row_keys),
            "",
            *(f"{column.group} {column.head}".strip() for column in table.columns),
        ],
        "lines": [
            {
                "labels": [*line.labels, line.source],
                "source": line.source,
                "starts_block": line.starts_block,
                "cells": [
                    {
                        "text": f"{entry.text}!" if entry.outside else entry.text,
                        "best": entry.best,
                        "beside": " ".join(filter(None, [entry.half_width(), f"n={entry.n}" if entry.n else ""])),
                        "marks": ",".join(entry.marks),
                        "reasons": [mark.reason for mark in entry.marks],
                    }
                    for entry in line.entries
                ],
            }
            for line in grid.lines
        ],
        "notes": notes_of(grid, "bold"),
    }


def record(run: RunRecord) -> dict[str, Any]:
    """run.json without the planned batches, which nobody reads."""
    return {**run.model_dump(mode="json", exclude={"batches", "batch_costs"}), "batches": len(run.batches)}


def answers(samples: Sequence[Sample]) -> dict[str, Any]:
    """By item: what was answered and what it scored, the numbers in the order of `metrics`."""
    names = list(dict.fromkeys(name for sample in samples for name in sample.metrics))
    return {
        "metrics": names,
        "samples": {
            s.id: {
                "response": s.response,
                "error": s.error,
                "parsed": s.parsed,
                "scores": [s.metrics.get(name) for name in names],
                "finish": s.finish,
                "prompt_tokens": s.prompt_tokens,
                "new_tokens": s.new_tokens,
                "history_items": s.history_items,
                "said": {name: rating.said for name, rating in s.ratings.items() if rating.said},
            }
            for s in samples
        },
    }


def _metric(metric: MetricValue) -> list[float | None]:
    return [metric.value, metric.low, metric.high, metric.n]
