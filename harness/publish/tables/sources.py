"""What tables are filled from: run records, comparisons of runs, a benchmark's files. Each is read when a table asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from harness.judge.pairwise_record import PairRecord, find_pairs
from harness.records.schema import RunRecord
from harness.records.select import Places
from harness.records.store import find_runs


@dataclass(frozen=True)
class View:
    """What of a table is shown."""

    model: str | None = None
    """This model's rows only."""
    published: bool = True
    measured: bool = True


@dataclass(frozen=True)
class Sources:
    results: Places
    data: str | None = None
    """Folder of a benchmark's files; the embedded lamp-mini where none is given."""

    @cached_property
    def records(self) -> Sequence[RunRecord]:
        return find_runs(self.results)

    @cached_property
    def comparisons(self) -> Sequence[tuple[Path, PairRecord]]:
        return find_pairs(self.results)
