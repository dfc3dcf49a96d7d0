"""The Python door: what the commands do, for notebooks and scripts. `import harness` finds its functions by name.

    run = harness.evaluate(method="dps", task="lamp4", model="tiny", limit=20, set={"gamma": 1.0})
    run.metrics["rouge1"].value, run.metrics["rouge1"].interval
    run.samples                                        # a DataFrame, one row a sample
    harness.records()                                  # every record as one DataFrame

Records, resume and errors are those of the commands: what a command says in one line and an exit code is raised here as a
`HarnessError` with the same text. Keyword arguments are the commands' options (`harness.cli.declarations`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Unpack

from harness.cli.declarations import AnyPath, Names, Options, check_model, checked, folder_text, names, with_defaults
from harness.errors import HarnessError
from harness.records.schema import MetricValue, RunRecord
from harness.records.store import read_record, read_samples
from harness.run.console import terminal_or_notebook
from harness.task import Sample

if TYPE_CHECKING:
    import pandas as pd

    from harness.engine.model import LanguageModel
    from harness.method import Method


@dataclass(frozen=True)
class Run:
    """A run that ended: its record, and what is on disk beside it."""

    folder: Path
    record: RunRecord = field(repr=False)
    warnings: tuple[str, ...] = ()
    """What must be known before the numbers are quoted."""

    @property
    def metrics(self) -> Mapping[str, MetricValue]:
        """By name, the task's main one first: `.value`, `.interval` (95 %), `.n`."""
        return self.record.metrics

    @cached_property
    def samples(self) -> pd.DataFrame:
        """One row a sample, in the order they finished: what was asked, answered and expected, and a column a metric."""
        return _frame([_sample(sample) for sample in read_samples(self.folder)])

    def __str__(self) -> str:
        from harness.publish.show import metrics_table

        config = self.record.config
        title = f"{config.method.name} on {config.task.name} with {config.model.name}"
        return "\n".join([title, metrics_table(self.record), str(self.folder)])


AnyRun: TypeAlias = AnyPath | Run


def evaluate(method: str | Method, task: str, model: str | LanguageModel = "tiny", **options: Unpack[Options]) -> Run:
    """Run a method on a task as `harness run` does; goes on with a run that was killed, reads one that is there.

    `method` is a registered name, `./file.py:Class`, or a `Method`; `model` an alias, hub id or folder, or what `load` gave.
    """
    from harness.cli.run import cells_of, load, open_judge_for
    from harness.publish.show import warnings
    from harness.run.kept import kept_outcomes, say_kept

    options, console = checked(options), terminal_or_notebook()
    if isinstance(model, str):
        check_model(model, options)
    (cell,) = cells_of([method], [task], options)
    assert cell.items  # a mistake in the data shows before the model is loaded
    judge = open_judge_for(options, [cell], console)
    kept = kept_outcomes(model, with_defaults(options), [cell], judge) if isinstance(model, str) else {}
    if kept:
        done = kept[id(cell)]
        say_kept(done.record, done.folder, console)
    else:
        from harness.run.steps import run_cell

        lm = load(model, options, console, served=True) if isinstance(model, str) else model
        try:
            done = run_cell(lm, cell, console=console, judge=judge)
        except SystemExit as stop:  # of a method or task; nothing was finished, and a script or notebook goes on
            raise HarnessError(
                f"the method or task ended the program with sys.exit({stop.code}); that is no result"
            ) from stop
        finally:
            console.close()
    said = tuple(warnings(done.record))
    for line in said:
        console.say(f"warning: {line}")
    return Run(done.folder, done.record, said)


def load(model: str = "tiny", **options: Unpack[Options]) -> LanguageModel:
    """A model to give to several calls of `evaluate`; `dtype`, `device`, `device_map` and `model_path` are those of `harness run`."""
    from harness.cli.run import load

    return load(model, checked(options), terminal_or_notebook(), served=True)


def read(run: AnyRun) -> Run:
    """A run that is on disk: its folder or hash, or a folder above it that holds no other."""
    if isinstance(run, Run):
        return run
    from harness.publish.show import warnings
    from harness.records.select import find_run

    folder = find_run(run)
    record = read_record(folder)
    return Run(folder, record, tuple(warnings(record)))


def records(*places: AnyPath) -> pd.DataFrame:
    """Every record that `places` name (all of `results` and `runs` by default), a row each.

    Columns: model, task, method, preset, options, what was evaluated, status, folder; `<metric>`, `<metric>.low` and
    `<metric>.high`; and `cost.<what>`.
    """
    from harness.records.select import select
    from harness.records.store import find_runs

    return _frame([_row(run) for run in find_runs(select(places))])


def compare(a: AnyRun, b: AnyRun, *others: AnyRun, metric: Names = (), data: AnyPath | None = None) -> pd.DataFrame:
    """Each run against `a`, paired by user and item: the rows of `harness compare --format csv`."""
    from harness.statistics.compare import compare
    from harness.statistics.formats import rows

    return _frame(
        rows(compare([read(run).folder for run in (a, b, *others)], names(metric), folder_text("data", data)))
    )


def table(*ids: str, records: Sequence[AnyPath] = (), data: AnyPath | None = None) -> pd.DataFrame:
    """The papers' tables, a row a number: published, measured, and the difference. All of them where none is named."""
    from harness.publish.tables import grids
    from harness.publish.tables.formats import rows
    from harness.records.select import select

    return _frame(rows(grids(ids, select(records), data=folder_text("data", data))))


def _row(run: RunRecord) -> dict[str, Any]:
    config = run.config
    row: dict[str, Any] = {
        "model": config.model.name,
        "task": config.task.name,
        "method": config.method.name,
        "preset": config.method.preset,
        "options": config.method.options,
        "task_options": config.task.options,
        "split": config.data.split,
        "limit": config.selection.limit,
        "users": config.selection.users,
        "control": config.selection.control,
        "judge": config.judge.name if config.judge else None,
        "status": run.status,
        "n": max((metric.n for metric in run.metrics.values()), default=0),
    }
    for name, metric in run.metrics.items():
        row |= {name: metric.value, f"{name}.low": metric.low, f"{name}.high": metric.high}
    row |= {f"cost.{name}": value for name, value in run.cost.model_dump().items()}
    return {**row, "folder": str(run.folder)}


def _sample(sample: Sample) -> dict[str, Any]:
    kept = {f.name: getattr(sample, f.name) for f in fields(Sample) if f.name not in ("metrics", "extra", "ratings")}
    return {**kept, **sample.metrics}


def _frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(list(rows))
