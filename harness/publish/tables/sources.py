"""What tables are filled from: run records, comparisons of runs, a benchmark's files. Each is read when a table asks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from harness.judge.pairwise_record import PairRecord, find_pairs
from harness.records.schema import RunRecord
from harness.records.select import Places
from harness.records.store import find_runs, models_first_to_last, of_one_weights


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
    def all_records(self) -> Sequence[RunRecord]:
        return find_runs(self.results)

    @cached_property
    def records(self) -> Sequence[RunRecord]:
        """Of each model's name those of one set of weights and one dtype, since a table has a row for a name."""
        return of_one_weights(self.all_records)

    @cached_property
    def models(self) -> Sequence[str]:
        """Those of the records, in the order a reader should meet them."""
        return models_first_to_last(self.all_records)

    def left_out(self, model: str | None) -> list[str]:
        """A remark on each model's name whose other weights' records are not shown."""
        every, shown = (Counter(r.config.model.name for r in found) for found in (self.all_records, self.records))
        return [
            f"of {name}, runs with other weights or another dtype are not shown: {count - shown[name]} beside the {shown[name]} of one"
            for name, count in sorted(every.items())
            if count > shown[name] and model in (None, name)
        ]

    @cached_property
    def comparisons(self) -> Sequence[tuple[Path, PairRecord]]:
        return find_pairs(self.results)
