"""Run records on disk: run.json and samples.jsonl, written so that a killed run can go on, read by everything else.

While a run goes on, what its finished batches took is in a log beside run.json (`harness.records.log`).

A record lies in `results/<model>/<task>/<method>-<hash8>/`. Two processes never write the same one.

Resume: batches are planned from the full selection and stored in the record before they run. A batch is done when every
one of its samples is on disk; the samples of any other batch are dropped and the batch is repeated whole, since a
sample's last bits depend on its neighbours.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import ValidationError

from harness.errors import HarnessError
from harness.files import Lock, append, replace_file, writing
from harness.files.json_files import instance, parse, problem_of, read_bytes
from harness.files.shown import message, say, without_credentials
from harness.records.log import drop_log, log_batches, mend_log, read_log, with_log
from harness.records.schema import (
    Batching,
    Cost,
    DataConfig,
    Health,
    JudgeConfig,
    Judging,
    MethodConfig,
    MetricValue,
    ModelConfig,
    RunConfig,
    RunRecord,
    SamplingConfig,
    SelectionConfig,
    Status,
    TaskConfig,
    json_value,
)
from harness.records.select import Places, record_folders
from harness.task import Sample

__all__ = [
    "Batching",
    "Cost",
    "DataConfig",
    "Health",
    "JudgeConfig",
    "Judging",
    "MethodConfig",
    "MetricValue",
    "ModelConfig",
    "Outcome",
    "RunConfig",
    "RunFolder",
    "RunRecord",
    "SamplingConfig",
    "SelectionConfig",
    "Status",
    "TaskConfig",
    "find_runs",
    "folder_of",
    "json_value",
    "models_first_to_last",
    "read_record",
    "read_samples",
    "safe_name",
]


@dataclass(frozen=True)
class Outcome:
    """What a command leaves behind."""

    record: RunRecord
    folder: Path
    exit_code: int


def folder_of(root: Path, config: RunConfig) -> Path:
    """Where the record of `config` lies."""
    method = f"{safe_name(config.method.name)}-{config.hash8()}"
    return root / safe_name(config.model.name) / safe_name(config.task.name) / method


def safe_name(name: str) -> str:
    """`meta-llama/Llama-3` -> `meta-llama--Llama-3`; never empty, hidden or above the folder it is put in."""
    plain = re.sub(r"[^\w.+-]", "_", re.sub(r"[/\\]+", "--", name), flags=re.ASCII)
    return plain.strip("._-")[:120] or "unnamed"


def read_record(folder: Path) -> RunRecord:
    """The record in `folder`, with what its log has. Raises HarnessError, naming file and field, where it cannot be read."""
    path, logged = folder / "run.json", read_log(folder)
    try:
        record = RunRecord.model_validate(parse(read_bytes(path)))
    except OSError as error:
        raise HarnessError(f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        raise HarnessError(f"{path}: {problem_of(error)}") from error
    except ValueError as error:
        raise HarnessError(f"{path}: not JSON: {error}") from error
    record.folder = folder
    return with_log(record, logged)


def models_first_to_last(records: Iterable[RunRecord]) -> list[str]:
    """Models in the order a reader should meet them: those measured on most real LaMP users first, then those run most."""
    of_real_users: Counter[str] = Counter()
    runs: Counter[str] = Counter()
    for record in records:
        config = record.config
        runs[config.model.name] += 1
        real = config.task.name.startswith("lamp") and "lamp-mini" not in config.data.description
        of_real_users[config.model.name] += real
    return sorted(runs, key=lambda name: (-of_real_users[name], -runs[name], name))


def of_one_weights(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Of each model's name the records under those weights and that dtype which most have; of equals those made last.

    For what calls a model by its name alone: an alias may stand for another file tomorrow, or run in another dtype.
    """
    last: dict[tuple[str, str, str], tuple[int, str]] = {}
    for record in records:
        count, started = last.get(record.weights, (0, ""))
        last[record.weights] = count + 1, max(started, record.started or "")
    chosen = {weights[0]: weights for weights in sorted(last, key=lambda weights: (last[weights], weights))}
    return [record for record in records if chosen[record.weights[0]] == record.weights]


def find_runs(
    places: Places, *, model: str | None = None, task: str | None = None, method: str | None = None
) -> list[RunRecord]:
    """The records at or below `places`, in path order. One that cannot be read is named on stderr and left out."""
    found = []
    for folder in record_folders(places):
        try:
            record = read_record(folder)
        except HarnessError as error:
            say(message(f"warning: skipped a record: {error}"), stream=sys.stderr)
            continue
        names = (record.config.model.name, record.config.task.name, record.config.method.name)
        if all(wanted in (None, name) for wanted, name in zip((model, task, method), names, strict=True)):
            found.append(record)
    return found


def read_samples(folder: Path) -> list[Sample]:
    """The samples on disk, in the order they finished. A last line that was cut off is left out."""
    path = folder / "samples.jsonl"
    try:
        lines = read_bytes(path).split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise HarnessError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise HarnessError(f"cannot read {path}: {error}") from error
    samples = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline was cut off, or is empty
        try:
            content = parse(line, surrogates=True)
        except ValueError as error:
            if number == len(lines) - 1:
                break
            raise HarnessError(f"{path}, line {number}: not a sample: {error}") from error
        try:
            samples.append(instance(Sample, content))
        except ValueError as error:
            raise HarnessError(f"{path}, line {number}: not a sample: {error}") from error
    return samples


def _line(sample: Sample) -> bytes:
    content = json_value(sample)
    if sample.error is not None:
        content["error"] = without_credentials(sample.error)
    if not sample.ratings:  # as of most tasks
        del content["ratings"]
    # ASCII: a model may answer half a surrogate pair, which UTF-8 cannot hold and an escape can
    return json.dumps(content).encode() + b"\n"


class RunFolder:
    """One run's record, held by this process alone until `close`. Use as a context manager."""

    def __init__(self, path: Path, lock: Lock):
        self.path = path
        self._lock: Lock | None = lock

    @classmethod
    def open(cls, root: Path, config: RunConfig) -> Self:
        """Make the folder if need be and lock it. Raises UsageError where another process holds it."""
        path = folder_of(Path(root), config)
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            folder = cls(path, Lock.take(path / "lock"))
        try:
            folder.keep(folder.samples())  # a line that was cut off must not run into the next one
            mend_log(path)
        except HarnessError:
            folder.close()
            raise
        return folder

    def record(self) -> RunRecord | None:
        """The record on disk; None where there is none yet."""
        return read_record(self.path) if (self.path / "run.json").exists() else None

    def samples(self) -> list[Sample]:
        return read_samples(self.path)

    def resume(self, batches: Sequence[Sequence[str]]) -> list[Sample]:
        """The samples of the batches that are done; all others are dropped from disk, for their batch to run again."""
        found = {sample.id: sample for sample in self.samples()}
        done = {id for batch in batches if all(id in found for id in batch) for id in batch}
        kept = [sample for id, sample in found.items() if id in done]
        self.keep(kept)
        return kept

    def keep(self, samples: Sequence[Sample]) -> None:
        """Have these on disk and no others."""
        path = self.path / "samples.jsonl"
        content = b"".join(_line(sample) for sample in samples)
        if content != (path.read_bytes() if path.exists() else b""):
            replace_file(path, content)

    def append(self, samples: Sequence[Sample]) -> None:
        """Add samples; they are on disk when this returns, and none of them is if it raises."""
        append(self.path / "samples.jsonl", b"".join(_line(sample) for sample in samples))

    def log(self, record: RunRecord, *firsts: str) -> None:
        """Add what the batches that begin with these samples took to the log; it is on disk when this returns."""
        costs = {first: record.batch_costs[first] for first in firsts}
        log_batches(self.path, costs, record.cost.peak_memory_bytes or 0)

    def write(self, record: RunRecord) -> None:
        """Replace run.json; a reader sees the old record or the new one, never half of either."""
        replace_file(self.path / "run.json", record.to_json().encode())
        drop_log(self.path)  # a record that was read from here holds it

    def close(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
