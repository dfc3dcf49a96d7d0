"""`harness compare --matched tokens|flops`: of each method the run whose cost agrees with the others', chosen by cost alone.

A method's runs differ in what they spend: k items of history, samples drawn, streams. Held against each other at whatever
setting each was run, methods also differ in cost. Here the runs at hand are the points; of all choices of one a method, that
is taken whose costs lie closest together (least ratio of the highest to the lowest). No metric is read, so the choice
favours nobody.

A cost is of one sample: its prompts and answers and, of methods that learn of each user, that user's part. Fitting once a
model is not in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from harness.errors import UsageError
from harness.records.schema import RunRecord
from harness.records.store import read_record

Cost: TypeAlias = Literal["tokens", "flops"]
WITHIN = 1.25
"""The ratio of the highest to the lowest cost up to which they agree."""


@dataclass(frozen=True)
class Point:
    """A run and what one of its samples costs."""

    folder: Path
    method: str
    cost: float


class NoneAgree(UsageError):
    """No choice of runs agrees in cost."""

    def __init__(self, message: str, nearest: Sequence[Point]) -> None:
        super().__init__(message)
        self.nearest = nearest
        """Of each method the run whose cost lies closest to the others'."""


def cost_of(record: RunRecord, by: Cost) -> float | None:
    """Of one sample; None where the record does not know it."""
    samples = sum(map(len, record.batches))
    c = record.cost
    if not samples:
        return None
    if by == "tokens":
        if c.prefill_tokens is None or c.decode_tokens is None:  # not answered to the end
            return None
        setup = (c.setup_prefill_tokens or 0) + (c.setup_decode_tokens or 0)
        return (c.prefill_tokens + c.decode_tokens + setup) / samples
    return None if c.flops is None else (c.flops + (c.setup_flops or 0.0)) / samples


def matched(folders: Sequence[Path], by: Cost) -> tuple[list[Point], str]:
    """One point a method, methods in the order they came, and what was matched in words. All are of one model and task, and of
    the same samples: of those there are, where most methods were run, of equals where costs lie closest.

    Raises UsageError where fewer than two methods have a cost, NoneAgree where no choice agrees within WITHIN.
    """
    groups: dict[str, dict[str, list[Point]]] = {}
    for folder in folders:
        record = read_record(folder)
        cost = cost_of(record, by) if record.config.selection.control == "none" else None
        if cost:  # an answer that needs no model costs nothing, and nothing is as cheap
            name = record.config.method.name
            groups.setdefault(record.conditions, {}).setdefault(name, []).append(Point(folder, name, cost))
    most = max(map(len, groups.values()), default=0)
    if most < 2:
        raise UsageError(
            f"--matched {by} needs runs of two methods or more, on one model and task, that say their cost; {most} found among "
            f"{len(folders)} runs"
        )
    candidates = []
    for points in (points for points in groups.values() if len(points) == most):
        for target in sorted({point.cost for some in points.values() for point in some}):
            chosen = [min(some, key=lambda point: abs(math.log(point.cost / target))) for some in points.values()]
            costs = [point.cost for point in chosen]
            candidates.append((max(costs) / min(costs), -min(costs), chosen))
    ratio, _, best = min(candidates, key=lambda one: one[:2])  # of equals the dearest: more of each method is seen
    listed = ", ".join(f"{point.method} {point.cost:.4g}" for point in best)
    if ratio > WITHIN:
        raise NoneAgree(
            f"no runs agree in {by}: the nearest, a sample, are {listed}, {ratio:.2f} times apart (allowed: {WITHIN})",
            best,
        )
    return best, f"matched by {by} a sample, chosen by cost alone: {listed} (within {100 * (ratio - 1):.0f} %)"
