"""`harness sweep`: one method under many values of its options."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness.cli.judge import JudgeName, JudgeSet, JudgeUrl
from harness.cli.run import (
    BatchSize,
    Data,
    Device,
    DeviceMap,
    Dtype,
    FitSet,
    FitSplit,
    FitTask,
    Limit,
    MaxNew,
    Model,
    ModelPath,
    Output,
    Preset,
    Seed,
    Split,
    Tasks,
    TaskSet,
    Temperature,
    TopK,
    TopP,
    Users,
    batch_size_of,
    load,
    open_judge_for,
)

if TYPE_CHECKING:
    from harness.records.store import MetricValue


def sweep(
    method: Annotated[str, typer.Option("--method", help="Registered name, or ./file.py:Class.")],
    task: Tasks,
    settings: Annotated[
        list[str], typer.Option("--set", help="Option key=value; layer=0..27 or coefficient=0.5|1|2 vary. Repeatable.")
    ],
    model: Model = "tiny",
    model_path: ModelPath = None,
    task_settings: TaskSet = [],  # noqa: B006
    preset: Preset = [],  # noqa: B006
    data: Data = None,
    split: Split = "",
    limit: Limit = None,
    users: Users = None,
    fit_split: FitSplit = None,
    fit_task: FitTask = None,
    fit_settings: FitSet = [],  # noqa: B006
    seed: Seed = 0,
    batch_size: BatchSize = "auto",
    max_new_tokens: MaxNew = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    output_path: Output = Path("results"),
    dtype: Dtype = "auto",
    device: Device = "auto",
    device_map: DeviceMap = None,
    judge: JudgeName = None,
    judge_base_url: JudgeUrl = None,
    judge_settings: JudgeSet = [],  # noqa: B006
    lowest: Annotated[bool, typer.Option(help="Look for the lowest point, as of a clamp, not for the peak.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a task.")] = False,
) -> None:
    """Run a method under many values of its options, all points in shared batches, one record a point.

    Prints each point's metrics with their intervals, and where the first metric peaks, among the points whose coherence is at
    least 75 where that is measured. The same command again resumes.
    """
    from harness.run.cell import Settings, grid
    from harness.run.console import Terminal
    from harness.run.sweep import peak, points, run_sweep

    chosen = Settings(
        split=split,
        limit=limit,
        users=users,
        fit_split=fit_split,
        batch_size=batch_size_of(batch_size),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        output_path=output_path,
        allow_noop=True,  # of a sweep, the point that does nothing is a result
    )
    by_task: dict[str, dict[str, object]] = {}
    cells = {
        name: grid([method], task, chosen, given, task_settings, preset, data, fit_task, None, fit_settings)
        for name, given in points(settings).items()
    }
    console = Terminal()
    everything = [cell for part in cells.values() for cell in part]
    for cell in everything:
        assert cell.items
    rater = open_judge_for(judge, judge_base_url, judge_settings, everything, console)
    lm = load(model, model_path, dtype, device, device_map, console)
    codes = []
    for number, task_name in enumerate(cell.task_name for cell in next(iter(cells.values()))):
        done = run_sweep(lm, {name: part[number] for name, part in cells.items()}, console=console, judge=rater)
        console.close()
        codes += [outcome.exit_code for outcome in done.values()]
        metrics = {name: outcome.record.metrics for name, outcome in done.items()}
        first = next(
            (m for m in next(iter(metrics.values())) if all(p[m].value is not None for p in metrics.values())), ""
        )
        coherent = [name for name, found in metrics.items() if _coherent(found)]
        best = peak({name: done[name] for name in coherent}, first, lowest=lowest)
        by_task[task_name] = {
            "points": {
                name: {"folder": str(done[name].folder), **{m: v.model_dump() for m, v in found.items()}}
                for name, found in metrics.items()
            },
            ("lowest" if lowest else "peak"): asdict(best) if best else None,
        }
        if as_json:
            print(json.dumps({"task": task_name, **by_task[task_name]}))
            continue
        from tabulate import tabulate

        whole = [m for m in next(iter(metrics.values())) if "/" not in m]  # parts of the task are in --json
        shown = [m for m in whole if any(p[m].value is not None for p in metrics.values())]
        rows = [
            [name, *(_cell(found[m].value, found[m].low, found[m].high) for m in shown), found[first].n if first else 0]
            for name, found in metrics.items()
        ]
        print(f"{method} on {task_name} with {lm.name}")
        print(tabulate(rows, headers=["point", *shown, "n"], tablefmt="simple", disable_numparse=True))
        if best:
            among = f"of {len(coherent)} coherent points " if len(coherent) < len(done) else ""
            where = "is lowest" if lowest else "peaks"
            print(f"{best.metric} {among}{where} at {best.point}; 95 % of resamples from {best.low} to {best.high}")
    raise typer.Exit(max(codes, default=0))


def _coherent(metrics: Mapping[str, MetricValue]) -> bool:
    """Whether the answers can be read, where that is measured: what scores high in gibberish is no peak."""
    from harness.tasks.persona import COHERENT

    value = metrics["coherence"].value if "coherence" in metrics else None
    return value is None or value >= COHERENT


def _cell(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if low is None or high is None else f"{value:.2f} [{low:.2f}, {high:.2f}]"
