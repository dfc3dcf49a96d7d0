"""A sweep: one method under many values of its options, the points answered as rows of shared batches, a record a point.

All points run in step. When the first of them comes to a batch, the batch's prompts are answered under the plans of all
points that have the same batch before them, in the same forward passes; rows that differ in edits of generated positions
only share the prefill. Each point keeps its own record and its own samples, so that a killed sweep goes on, and a point
run alone is the same record: its cost is what it takes alone, and what sharing saved stands in fields of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, TypeVar

import numpy as np

from harness.data import Example
from harness.engine.model import LanguageModel
from harness.engine.replay import cost_of_generating, cost_of_scoring
from harness.engine.rows import Cost
from harness.errors import UsageError
from harness.fit.artifacts import ArtifactStore
from harness.judge.judges import Judge
from harness.plan import Generated
from harness.records.store import Outcome, read_samples
from harness.run.answers import Answer, Asked
from harness.run.cell import Cell
from harness.run.console import Console
from harness.run.steps import cell_steps
from harness.run.system import ModelSystem
from harness.task import Generation, Sample

POINT_ROWS = 8
"""Rows of a shared batch, in the largest batches of a single run; fewer where memory does not suffice."""

RESAMPLES = 1000
"""Of the users, to see where else the peak could be."""

T = TypeVar("T")


def points(settings: Sequence[str]) -> dict[str, list[str]]:
    """Settings of every point, by its name: `layer=0..27` and `coefficient=1|2` vary, the others are the same for all.

    Raises UsageError where nothing varies or a range has no end.
    """
    found: dict[str, list[str]] = {"": []}
    for setting in settings:
        key, _, text = setting.partition("=")
        values = _values(setting, text)
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


def _values(setting: str, text: str) -> list[str]:
    if ".." in text:
        first, _, last = text.partition("..")
        if not (first.isdigit() and last.isdigit() and int(first) <= int(last)):
            raise UsageError(f"--set {setting} is no range; give whole numbers as in layer=0..27, both ends included")
        return [str(value) for value in range(int(first), int(last) + 1)]
    return text.split("|")


def run_sweep(
    lm: LanguageModel,
    cells: Mapping[str, Cell],
    *,
    store: ArtifactStore | None = None,
    console: Console | None = None,
    judge: Judge | None = None,
) -> dict[str, Outcome]:
    """Run, resume or reuse the record of every point. Raises as `run_cell` does, with every point's state saved."""
    joint = Joint({item.example.id: item.example for item in next(iter(cells.values())).items})
    steps = {
        name: cell_steps(lm, cell, store=store, console=console, judge=judge, make_system=joint.make)
        for name, cell in cells.items()
    }
    done: dict[str, Outcome] = {}
    try:
        while len(done) < len(steps):
            for name, step in steps.items():
                if name not in done:
                    try:
                        next(step)
                    except StopIteration as end:
                        done[name] = end.value
    finally:
        for step in steps.values():
            step.close()
    return {name: done[name] for name in cells}


@dataclass
class Joint:
    """What the points have answered for each other."""

    examples: Mapping[str, Example]
    points: list[_Point] = field(default_factory=list)
    kept: dict[tuple[int, tuple[str, ...]], _Kept] = field(default_factory=dict)
    """(point, ids of a batch) -> its answers, until the point comes to the batch."""

    def make(self, *args: Any, **options: Any) -> _Point:
        point = _Point(*args, **options)
        point.joint, point.number = self, len(self.points)
        self.points.append(point)
        return point

    def answers(self, point: _Point, ids: tuple[str, ...]) -> list[Answer]:
        if (point.number, ids) not in self.kept:
            waiting = [point, *(p for p in self.points if p is not point and p.waits_for(ids))]
            asked = [[p._ask(self.examples[i]) for i in ids] for p in waiting]
            before = _minus(point.decoder.cost, Cost())
            rows = POINT_ROWS * point.batching.most(point.lm.device.type)
            rows = min(rows, max(len(ids), point.fits([one for part in asked for one in part]) or rows))
            start = time.perf_counter()
            found = list(point._in_pieces([one for part in asked for one in part], rows, point.answer_alone))
            seconds = time.perf_counter() - start
            spent, point.decoder.cost = _minus(point.decoder.cost, before), before
            parts = [found[n * len(ids) : (n + 1) * len(ids)] for n in range(len(waiting))]
            alone = [p.cost_alone(one, part) for p, one, part in zip(waiting, asked, parts, strict=True)]
            total = sum(cost.flops for cost in alone)
            for p, part, cost, share in zip(waiting, parts, alone, _shares(spent, len(waiting)), strict=True):
                own = seconds * cost.flops / total
                self.kept[p.number, ids] = _Kept(part, cost, _minus(cost, share), own - seconds if p is point else own)
        kept = self.kept.pop((point.number, ids))
        point.decoder.cost = _plus(point.decoder.cost, kept.alone)
        point.saved = _plus(point.saved, kept.saved)
        point.elsewhere += kept.elsewhere
        return kept.answers


class _Kept(NamedTuple):
    """A batch of a point, answered beside those of others."""

    answers: list[Answer]
    alone: Cost
    """What it takes in a run of its own."""
    saved: Cost
    """That less an equal share of what was spent."""
    elsewhere: float
    """See `ModelSystem.elsewhere`; seconds are shared out by operations."""


class _Point(ModelSystem):
    """A system that has its batches answered together with the other points'."""

    joint: Joint
    number: int
    _responding = False

    def respond(
        self, examples: Sequence[Example], *, alike: Callable[[Example], str] = lambda example: ""
    ) -> Iterator[Sample]:
        self._responding = True
        try:
            yield from super().respond(examples, alike=alike)
        finally:
            self._responding = False

    def waits_for(self, ids: tuple[str, ...]) -> bool:
        planned = self.batching.planned
        return not self.batching.done.issuperset(ids) and (not planned or list(ids) in planned)

    def answer_alone(self, asked: Sequence[Asked]) -> list[Answer]:
        return super()._answer(asked)

    def cost_alone(self, asked: Sequence[Asked], answers: Sequence[Answer]) -> Cost:
        """Of answering a batch that was answered beside others, had it been by itself."""
        written = [
            (a.requests[0], answer)
            for a, answer in zip(asked, answers, strict=True)
            if isinstance(answer, Generated) and a.given is None
        ]
        pairs = [pair for a in asked for pair in zip(a.requests, a.choices, strict=False)]
        g = self.generation
        generated = cost_of_generating(
            self.decoder, [r for r, _ in written], [a for _, a in written], max_new_tokens=g.max_new_tokens, stop=g.stop
        )
        return _plus(generated, cost_of_scoring(self.decoder, [r for r, _ in pairs], [c for _, c in pairs]))

    def _answer(self, asked: Sequence[Asked], generation: Generation | None = None) -> list[Answer]:
        if not self._responding or any(one.apart for one in asked):
            return super()._answer(asked, generation)
        return self.joint.answers(self, tuple(one.requests[0].key for one in asked))


def _plus(a: Cost, b: Cost) -> Cost:
    return Cost(**{f.name: getattr(a, f.name) + getattr(b, f.name) for f in fields(Cost)})


def _minus(a: Cost, b: Cost) -> Cost:
    return Cost(**{f.name: getattr(a, f.name) - getattr(b, f.name) for f in fields(Cost)})


def _shares(cost: Cost, count: int) -> list[Cost]:
    """Equal parts of whole numbers, the first of them with what is left over."""
    part = Cost(**{f.name: getattr(cost, f.name) // count for f in fields(Cost)})
    rest = cost
    for _ in range(count - 1):
        rest = _minus(rest, part)
    return [rest, *[part] * (count - 1)]


@dataclass(frozen=True)
class Peak:
    """Where a metric is highest (or lowest), and how sure that is: from resamples of the users (a persona task's questions)."""

    metric: str
    point: str
    low: str
    high: str
    """The points between which 95 % of the resampled peaks lie."""
    wins: Mapping[str, float]
    """Share of the resamples in which a point is it; points that never are are left out."""


def peak(outcomes: Mapping[str, Outcome], metric: str, *, lowest: bool = False) -> Peak | None:
    """Of means over the samples that have the number, as the records' are: one that a judge refused to rate is left out.

    None where a point has no such number at all, or answered other samples: then the points cannot be compared.
    """
    scores, asked = [], []
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
    _, inverse = np.unique(np.asarray([user for _, user in asked[0]]), return_inverse=True)
    count = inverse.max() + 1
    sums = np.stack([np.bincount(inverse, weights=row, minlength=count) for row in values])
    sizes = np.stack([np.bincount(inverse, weights=row, minlength=count) for row in rated])
    draws = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    above, below = sums[:, draws].sum(axis=-1), sizes[:, draws].sum(axis=-1)
    means = np.divide(above, below, out=np.full_like(above, -np.inf), where=below > 0)
    tops = np.sort(means.argmax(axis=0))
    low, high = tops[int(0.025 * RESAMPLES)], tops[int(0.975 * RESAMPLES) - 1]
    wins = {names[i]: float((tops == i).mean()) for i in np.unique(tops)}
    best = (values.sum(axis=1) / rated.sum(axis=1)).argmax()
    return Peak(metric, names[int(best)], names[low], names[high], wins)
