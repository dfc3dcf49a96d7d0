"""`harness recompute`: metrics and intervals of many records again, from the samples that are on disk.

Nothing is generated, judged or graded: what a sample was given stays, and what is computed from all samples is computed as
this version of the harness does it. A record whose samples are not kept cannot be recomputed and is named.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness.errors import HarnessError
from harness.judge.grading import settle
from harness.records.schema import MetricValue, RunRecord
from harness.records.store import RunFolder, find_runs, folder_of, read_samples
from harness.run.score import task_of

Outcome = Literal["same", "changed", "no samples", "not finished", "failed"]


@dataclass(frozen=True)
class Recomputed:
    folder: Path
    outcome: Outcome
    values: tuple[str, ...] = ()
    """Metrics whose value is another now, as `collective_share 0.17 -> 0.16`."""
    problem: str = ""


def recompute(root: Path, *, write: bool = True) -> Iterator[Recomputed]:
    """Every record under `root`, in path order, as it is written (`write=False`: as it would be)."""
    for record in find_runs(root):
        folder = record.folder
        assert folder is not None
        try:
            yield _recomputed(root, record, folder, write)
        except HarnessError as error:
            yield Recomputed(folder, "failed", problem=str(error))


def _recomputed(root: Path, record: RunRecord, folder: Path, write: bool) -> Recomputed:
    if record.status not in ("complete", "partial"):
        return Recomputed(folder, "not finished")
    samples = {sample.id: sample for sample in read_samples(folder)}
    order = [i for batch in record.batches for i in batch]
    if not samples or not samples.keys() >= set(order):
        return Recomputed(folder, "no samples")
    task = task_of(record, None)
    new = record.model_copy(deep=True)
    settle(task, [samples[i] for i in order or samples], new)
    for name, metric in new.metrics.items():  # summed in another order, the last bit of a value may differ
        old = record.metrics.get(name)
        if old is not None and _near(old.value, metric.value):
            new.metrics[name] = metric.model_copy(update={"value": old.value})
    if record.to_json() == new.to_json():
        return Recomputed(folder, "same")
    if write:
        if folder_of(root, record.config).resolve() != folder.resolve():
            raise HarnessError(f"{folder} is not where its configuration says: {folder_of(root, record.config)}")
        with RunFolder.open(root, record.config) as held:
            held.write(new)
    return Recomputed(folder, "changed", tuple(_moved(record.metrics, new.metrics)))


def _moved(old: Mapping[str, MetricValue], new: Mapping[str, MetricValue]) -> Iterator[str]:
    for name in dict.fromkeys([*old, *new]):
        before, after = (metrics[name].value if name in metrics else None for metrics in (old, new))
        if before != after:
            yield f"{name} {_said(before)} -> {_said(after)}"


def _near(a: float | None, b: float | None) -> bool:
    return a is not None and b is not None and math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)


def _said(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"
