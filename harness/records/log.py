"""What the finished batches of a run took, a line each in `batches.jsonl`, until run.json holds it.

run.json of 20,000 samples has megabytes: written again after every batch they would be tens of gigabytes. So a batch adds
a line here, and run.json is written where a run starts, changes its batches, or stops. A line that was cut off when its
writer was killed is no line: its batch runs again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from harness.errors import HarnessError
from harness.files import append, replace_file
from harness.files.json_files import instance, parse, read_bytes
from harness.records.schema import RunRecord

LOG = "batches.jsonl"


@dataclass(frozen=True)
class Finished:
    """A batch that was answered."""

    first: str
    """Its first sample."""
    costs: dict[str, int | float]
    """As in `RunRecord.batch_costs`."""
    peak_memory_bytes: int
    """Of the run so far."""

    def line(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"


def read_log(folder: Path) -> list[Finished]:
    """The batches logged in `folder`, oldest first; none where there is no log.

    Raises HarnessError, naming file and line, where it cannot be read.
    """
    path = folder / LOG
    try:
        lines = read_bytes(path).split(b"\n")
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise HarnessError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    found = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline was cut off, or is empty
        try:
            found.append(instance(Finished, parse(line)))
        except ValueError as error:
            if number == len(lines) - 1:
                break
            raise HarnessError(f"{path}, line {number}: not a batch: {error}") from error
    return found


def log_batches(folder: Path, costs: Mapping[str, Mapping[str, int | float]], peak_memory_bytes: int) -> None:
    """Add batches, by their first samples; they are on disk when this returns, and nothing of them is if it raises."""
    lines = [Finished(first, dict(spent), peak_memory_bytes).line() for first, spent in costs.items()]
    append(folder / LOG, b"".join(lines))


def mend_log(folder: Path) -> None:
    """Drop a line that was cut off, which must not run into the next one."""
    path = folder / LOG
    content = b"".join(one.line() for one in read_log(folder))
    if path.exists() and path.read_bytes() != content:
        replace_file(path, content)


def with_log(record: RunRecord, logged: Sequence[Finished]) -> RunRecord:
    """The record with what the log has and it has not; what both have is the same in both."""
    for one in logged:
        record.batch_costs[one.first] = one.costs
        record.cost.peak_memory_bytes = max(one.peak_memory_bytes, record.cost.peak_memory_bytes or 0)
    return record


def drop_log(folder: Path) -> None:
    """To be called once run.json holds what the log says."""
    (folder / LOG).unlink(missing_ok=True)
