"""`harness sweep`: one method under many values of its options."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Unpack

import typer

from harness.cli.commands import with_options
from harness.cli.declarations import NEEDED, OUTPUT, Command, check_model, pairs
from harness.cli.run import RUN, cells_of, load, open_judge_for
from harness.errors import UsageError, gravest
from harness.files.shown import say

if TYPE_CHECKING:
    from harness.judge.judges import Judge
    from harness.records.store import MetricValue
    from harness.run.cell import Cell


SWEEP = tuple(name for name in RUN if name not in {"control", "fit_data", "allow_noop", "retry_failed"})
OWN = {
    "help_method": "Registered name, or ./file.py:Class; one alone.",
    "help_set": "Option key=value; layer=0..27 or coefficient=0.5|1|2 vary. Repeatable.",
    "help_json": "Print one JSON object a task.",
    "set": NEEDED,
}
Lowest = Annotated[
    bool, typer.Option("--lowest", help="Look for the lowest point, not the peak.", rich_help_panel=OUTPUT)
]


@with_options(*SWEEP, **OWN)
def sweep(
    lowest: Lowest = False,
    **given: Unpack[Command],
) -> None:
    """Run a method under many values of its options, all points in shared batches, one record a point.

    Prints each point's metrics with their intervals, and where the first metric peaks (is lowest, where less is better), among
    the points whose coherence is at least 75 where that is measured. The same command again resumes.
    """
    from harness.grid.executors import place_of
    from harness.run.console import Terminal
    from harness.run.sweep import peak, run_sweep, twice

    method = given["method"][0]
    by_task: dict[str, dict[str, object]] = {}
    check_model(given["model"], given, served=False)
    cells = cells_by_point(given)
    console = Terminal()
    everything = [cell for part in cells.values() for cell in part]

    def prepare() -> tuple[list[list[Cell]], range, Judge | None]:
        from harness.plugins.returned import fingerprint_of

        for cell in everything:
            assert cell.items
            if place:  # workers are told
                fingerprint_of(cell.task, cell.selection)
        jobs = [list(points) for points in zip(*cells.values(), strict=True)]
        return jobs, range(len(jobs)), open_judge_for(given, everything, console)

    place, outcomes = place_of(given), None
    if place:
        from harness.grid.run import on_workers

        outcomes = on_workers("sweep", given, place, console, prepare)
    else:
        rater = prepare()[2]
        lm = load(given["model"], given, console)
    codes = []
    for number, task_name in enumerate(cell.task_name for cell in next(iter(cells.values()))):
        here = {name: part[number] for name, part in cells.items()}
        if outcomes is None:
            done = run_sweep(lm, here, console=console, judge=rater)
        else:
            done = {name: outcomes(cell) for name, cell in here.items()}
        console.close()
        for name, first in twice(done).items():
            console.say(f"{name} is the same record as {first}: the options say the same")
        codes += [outcome.exit_code for outcome in done.values()]
        metrics = {name: outcome.record.metrics for name, outcome in done.items()}
        shared = [m for m in next(iter(metrics.values())) if all(m in found for found in metrics.values())]
        first = next((m for m in shared if all(found[m].value is not None for found in metrics.values())), "")
        coherent = [name for name, found in metrics.items() if _coherent(found)]
        down = lowest or any(found[first].higher_is_better is False for found in metrics.values() if first in found)
        task = next(iter(here.values())).task
        of_samples = task.per_sample.get(first, first)  # what a sample calls it
        among = {name: done[name] for name in coherent}
        best = peak(among, of_samples, lowest=down, independent=task.independent)
        best = replace(best, metric=first) if best else None
        by_task[task_name] = {
            "points": {
                name: {"folder": str(done[name].folder), **{m: v.model_dump() for m, v in found.items()}}
                for name, found in metrics.items()
            },
            ("lowest" if down else "peak"): asdict(best) if best else None,
        }
        if given["json"]:
            say(json.dumps({"task": task_name, **by_task[task_name]}))
            continue
        from tabulate import tabulate

        whole = [m for m in shared if "/" not in m]  # parts of the task are in --json, with what not all points have
        shown = [m for m in whole if any(p[m].value is not None for p in metrics.values())]
        rows = [
            [name, *(_cell(found[m].value, found[m].low, found[m].high) for m in shown), found[first].n if first else 0]
            for name, found in metrics.items()
        ]
        say(f"{method} on {task_name} with {next(iter(done.values())).record.config.model.name}")
        say(tabulate(rows, headers=["point", *shown, "n"], tablefmt="simple", disable_numparse=True))
        if best:
            of = f"of {len(coherent)} coherent points " if len(coherent) < len(done) else ""
            where = "is lowest" if down else "peaks"
            say(f"{best.metric} {of}{where} at {best.point}; 95 % of resamples from {best.low} to {best.high}")
    raise typer.Exit(gravest(codes))


def cells_by_point(given: Command) -> dict[str, list[Cell]]:
    """Each point's cells, one a task. Raises UsageError where there are several methods, or nothing varies."""
    from harness.run.sweep import points

    (method, *others), tasks = given["method"], given["task"]
    if others:
        raise UsageError(f"a sweep is of one method; {1 + len(others)} were given: {method}, {', '.join(others)}")
    found: dict[str, list[Cell]] = {}
    for name, varied in points(pairs(given["set"])).items():
        point: Command = {**given, "set": varied, "allow_noop": True}  # of a sweep, to do nothing is a result
        found[name] = cells_of([method], tasks, point)
    return found


def _coherent(metrics: Mapping[str, MetricValue]) -> bool:
    """Whether the answers can be read, where that is measured: what scores high in gibberish is no peak."""
    from harness.tasks.persona import COHERENT

    value = metrics["coherence"].value if "coherence" in metrics else None
    return value is None or value >= COHERENT


def _cell(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if low is None or high is None else f"{value:.2f} [{low:.2f}, {high:.2f}]"
