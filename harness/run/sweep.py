"""A sweep: one method under many values of its options, the points answered as rows of shared batches, a record a point.

How cells run together is in `harness.run.together`: here is which points there are, and where a metric peaks among them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from harness.engine.model import LanguageModel
from harness.errors import UsageError
from harness.fit.artifacts import ArtifactStore
from harness.judge.judges import Judge
from harness.records.store import Outcome, read_samples
from harness.run.cell import Cell
from harness.run.console import Console
from harness.run.kept import same_records
from harness.run.together import Together
from harness.statistics.intervals import units

MOST_POINTS = 10_000
"""A record each; more is a slip of the finger."""

RESAMPLES = 1000
"""Of the users (or independent items), to see where else the peak could be."""


def points(settings: Sequence[str]) -> dict[str, list[str]]:
    """Settings of every point, by its name: `layer=0..27` and `coefficient=1|2` vary, the others are the same for all.

    Raises UsageError where nothing varies, where a range is empty, and for more than MOST_POINTS.
    """
    found: dict[str, list[str]] = {"": []}
    for setting in settings:
        key, _, text = setting.partition("=")
        values = _values(setting, text)
        if len(found) * len(values) > MOST_POINTS:
            raise UsageError(
                f"--set {setting} makes {len(found) * len(values)} points, a record each; allowed: up to {MOST_POINTS} in a sweep"
            )
        found = {
            f"{name} {key}={value}".strip() if len(values) > 1 else name: [*chosen, f"{key}={value}"]
            for name, chosen in found.items()
            for value in values
        }
    if list(found) == [""]:
        raise UsageError(
            "nothing varies; give a range as in --set layer=0..27, or values as in --set coefficient=0.5|1|2"
        )
    return found


def _values(setting: str, text: str) -> Sequence[object]:
    if re.fullmatch(r"[0-9]+\.\.[0-9]+", text):  # any other `..` may be of a path
        first, _, last = text.partition("..")
        if max(len(first), len(last)) > 9 or int(first) > int(last):
            raise UsageError(f"--set {setting} is no range; give whole numbers as in layer=0..27, both ends included")
        return range(int(first), int(last) + 1)
    return text.split("|")


def run_sweep(
    lm: LanguageModel,
    cells: Mapping[str, Cell],
    *,
    store: ArtifactStore | None = None,
    console: Console | None = None,
    judge: Judge | None = None,
) -> dict[str, Outcome]:
    """Run, resume or reuse the record of every point. Raises as `run_cell` does, with every point's state saved.

    Points with one record have one outcome.
    """
    firsts, consoles = same_records(lm, cells, judge), dict.fromkeys(cells, console or Console())
    distinct = {name: cells[name] for name in firsts.values()}
    together = Together(lm, distinct, store=store, consoles=consoles, judge=judge)
    try:
        return {name: together.finish(first) for name, first in firsts.items()}
    finally:
        together.close()


def twice(outcomes: Mapping[str, Outcome]) -> dict[str, str]:
    """Points whose record is that of an earlier one -> that one."""
    firsts: dict[Path, str] = {}
    found = {name: firsts.setdefault(outcome.folder, name) for name, outcome in outcomes.items()}
    return {name: first for name, first in found.items() if name != first}


@dataclass(frozen=True)
class Peak:
    """Where a metric is highest (or lowest), and how sure that is: from resamples of the users (of a persona task its questions),
    or of the items where these are independent."""

    metric: str
    point: str
    low: str
    high: str
    """The points between which 95 % of the resampled peaks lie; of equal points all are the peak."""
    wins: Mapping[str, float]
    """Share of the resamples in which a point is it; points that never are are left out."""


def peak(
    outcomes: Mapping[str, Outcome],
    metric: str,
    *,
    lowest: bool = False,
    independent: Literal["user", "item"] = "user",
) -> Peak | None:
    """Of means over the samples that have the number, as the records' are: one that a judge refused to rate is left out.
    Of points with one record the first alone is counted.

    None where a point has no such number at all, or answered other samples: then the points cannot be compared.
    """
    scores, asked = [], []
    again = twice(outcomes)
    outcomes = {name: outcome for name, outcome in outcomes.items() if name not in again}
    for outcome in outcomes.values():
        samples = sorted(read_samples(outcome.folder), key=lambda sample: sample.id)
        scores.append([sample.metrics.get(metric) for sample in samples])
        asked.append([(sample.id, sample.user) for sample in samples])
    if not asked or any(some != asked[0] for some in asked):
        return None
    values, names = np.asarray(scores, dtype=float) * (-1 if lowest else 1), list(outcomes)
    rated = ~np.isnan(values)
    if not rated.any(axis=1).all():
        return None
    values = np.where(rated, values, 0.0)
    names_of_units, inverse = units([user if independent == "user" else item for item, user in asked[0]])
    count = len(names_of_units)
    sums = np.stack([np.bincount(inverse, weights=row, minlength=count) for row in values])
    sizes = np.stack([np.bincount(inverse, weights=row, minlength=count) for row in rated])
    draws = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    above, below = sums[:, draws].sum(axis=-1), sizes[:, draws].sum(axis=-1)
    means = np.divide(above, below, out=np.full_like(above, -np.inf), where=below > 0)
    tops, lasts = means.argmax(axis=0), len(names) - 1 - means[::-1].argmax(axis=0)
    low, high = np.sort(tops)[int(0.025 * RESAMPLES)], np.sort(lasts)[int(0.975 * RESAMPLES) - 1]
    wins = {names[i]: float((tops == i).mean()) for i in np.unique(tops)}
    best = (values.sum(axis=1) / rated.sum(axis=1)).argmax()
    return Peak(metric, names[int(best)], names[low], names[high], wins)
