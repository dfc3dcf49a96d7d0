"""Answered shards: files that workers leave, until the driver has put their samples into the records."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

from harness.engine.flops import Cost
from harness.files.json_files import instance
from harness.grid.folder import names, take
from harness.plugins.returned import graded
from harness.run.cell import Cell
from harness.task import Sample


class Part(NamedTuple):
    """A batch that came back."""

    ids: tuple[str, ...]
    samples: list[Sample]
    costs: dict[str, int | float]
    peak: int
    file: str


_COSTS = (*(field.name for field in fields(Cost)), "seconds")


def given_up(cell: Cell, sample: str, why: str) -> Part:
    """A batch of one sample, which failed."""
    item = next(item for item in cell.items if item.example.id == sample)
    failed = Sample(sample, item.example.user.id, targets=item.targets, error=why)
    costs: dict[str, int | float] = dict.fromkeys(_COSTS, 0)
    return Part((sample,), [graded(cell.task, failed)], costs, 0, "")


class Results:
    """What came back and is in no record yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts: dict[tuple[str, tuple[str, ...]], list[Part]] = {}
        """(hash of a record, ids of a unit) -> its batches."""
        self.open_files: dict[str, int] = {}
        """File -> how many of its batches wait."""

    def begin(self) -> None:
        """Take over what an earlier life of the driver did not."""
        for name in names(self.folder):
            self.read(name)

    def read(self, name: str) -> None:
        """Take over what a shard's file holds."""
        content = take(self.folder / name) or []
        fresh: dict[tuple[str, tuple[str, ...]], list[Part]] = {}
        for batch in content:
            samples = [instance(Sample, sample) for sample in batch["samples"]]
            ids = tuple(sample.id for sample in samples)
            part = Part(ids, samples, batch["costs"], batch["peak"], name)
            fresh.setdefault((batch["hash"], tuple(batch["whole"])), []).append(part)
        fresh = {
            key: parts
            for key, parts in fresh.items()
            if key not in self.parts and sum(len(part.ids) for part in parts) == len(key[1])
        }
        self.parts |= fresh
        count = sum(map(len, fresh.values()))
        if count:
            self.open_files[name] = count
        else:
            (self.folder / name).unlink(missing_ok=True)

    def found(self, hash8: str, ids: tuple[str, ...]) -> list[Part] | None:
        """The batches of a unit, where all of them are back."""
        parts = self.parts.get((hash8, ids))
        if parts is None and len(ids) > 1:  # it was cut into its samples
            singles = [self.parts.get((hash8, (one,))) for one in ids]
            parts = [part for some in singles for part in some or ()] if all(singles) else None
        return parts

    def merged(self, hash8: str, part: Part, ids: tuple[str, ...]) -> None:
        """The part is in its record; a file that holds no other is removed."""
        self.parts.pop((hash8, ids), None)
        self.parts.pop((hash8, part.ids), None)
        if part.file in self.open_files:
            self.open_files[part.file] -= 1
            if not self.open_files[part.file]:
                del self.open_files[part.file]
                (self.folder / part.file).unlink(missing_ok=True)
