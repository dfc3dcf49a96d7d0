"""What `harness judge` keeps of a comparison of two runs: pairs.json and one line a pair in pairs.jsonl.

A comparison lies in `results/<model>/<task>/pairs-<method>-<method>-<hash8>/`, beside the runs. Its two sides are `a` and
`b`, in the order they were named in; `first` says which of them stood first, as answer A, where a judge or an annotator saw
them without names.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from harness.errors import DataMissing, HarnessError
from harness.files import Lock, replace_file, writing
from harness.files.json_files import instance, parse, problem_of, read_bytes
from harness.files.shown import message, say
from harness.records.schema import JudgeConfig, Judging, MetricValue, RunConfig, Status, hash_of, json_value
from harness.records.select import LEVELS, Places, places_of
from harness.records.store import safe_name
from harness.task import Rating

Side = Literal["a", "b"]
Choice = Literal["a", "b", "tie"]
DIMENSIONS = ("relevance", "fluency", "style", "alignment", "factuality")
"""Rated from 1 to 5."""


@dataclass(frozen=True)
class Opinion:
    """What one reader makes of one pair."""

    winner: Choice | None = None
    alignment_winner: Choice | None = None
    """For this user's preferences alone."""
    a: dict[str, float] = field(default_factory=dict)
    """Dimension -> 1 to 5; empty where people choose and rate nothing."""
    b: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Look:
    """A pair as it was shown once."""

    first: Side
    rating: Rating
    """The judge's words and what they took; `rated` where they hold an opinion."""
    opinion: Opinion | None = None


@dataclass
class Pair:
    """Two answers to one item. One line of pairs.jsonl."""

    id: str
    """Of the item."""
    user: str
    code: str
    """What annotators know it by."""
    first: Side
    """Which side stands first where a pair is shown once."""
    looks: list[Look] = field(default_factory=list)
    votes: dict[str, Opinion] = field(default_factory=dict)
    """Annotator -> choice."""


class PairConfig(BaseModel):
    """Everything that can change a number on purpose."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    runs: tuple[RunConfig, RunConfig]
    count: int
    """Pairs drawn."""
    seed: int
    profile_items: int
    """Of the user's history, shown beside the answers."""
    evaluator: Literal["judge", "human"]
    judge: JudgeConfig | None = None
    version: int = 1
    """Of what is shown and asked."""

    def hash8(self) -> str:
        content = self.model_dump(mode="json", exclude={"runs": True, "judge": {"base_url"}})
        return hash_of({**content, "runs": [run.hash8() for run in self.runs]})


class PairRecord(BaseModel):
    """pairs.json."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    schema_version: Literal[1] = 1
    status: Status = "running"
    config: PairConfig
    hash: str = ""
    pairs: int = 0
    """Drawn; fewer than asked for where the runs share fewer."""
    compared: int = 0
    """With an opinion that counts: of a judge in both orders, of people by a majority of at least one vote."""
    failed: int = 0
    """Without an answer of the judge, or with one that is not whole; the same command asks again."""
    annotators: list[str] = []
    metrics: dict[str, dict[str, MetricValue]] = {}
    """`a` and `b`: what each side got; `both`: of the pair; `b-a`: differences of ratings. Shares are 0 to 1."""
    judging: Judging | None = None
    started: str | None = None
    finished: str | None = None

    def folder(self, root: Path) -> Path:
        a, b = self.config.runs
        name = f"pairs-{safe_name(a.method.name)}-{safe_name(b.method.name)}-{self.config.hash8()}"
        return root / safe_name(a.model.name) / safe_name(a.task.name) / name


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """A comparison's folder, made if need be, and written by this process alone. Raises UsageError where another does."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = Lock.take(folder / "lock")
    try:
        yield
    finally:
        lock.release()


def write(folder: Path, record: PairRecord, pairs: Sequence[Pair]) -> None:
    """Pairs first: a record never says more than is there."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(json_value(asdict(pair))) for pair in pairs]
    replace_file(folder / "pairs.jsonl", "".join(f"{line}\n" for line in lines).encode())
    content = json_value(record.model_dump(mode="json"))
    replace_file(folder / "pairs.json", f"{json.dumps(content, indent=1)}\n".encode())


def read(folder: Path) -> PairRecord:
    """Raises DataMissing where there is no comparison, HarnessError where it cannot be read."""
    path = folder / "pairs.json"
    if not path.is_file():
        raise DataMissing(f"{folder} holds no pairs.json; 'harness judge export RUN_A RUN_B' names the folder it made")
    try:
        return PairRecord.model_validate(parse(read_bytes(path)))
    except OSError as error:
        raise HarnessError(f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        raise HarnessError(f"{path}: {problem_of(error)}") from error
    except ValueError as error:
        raise HarnessError(f"{path}: not JSON: {error}") from error


def read_pairs(folder: Path) -> list[Pair]:
    """The pairs on disk; none where there are none yet."""
    path = folder / "pairs.jsonl"
    if not path.is_file():
        return []
    try:
        return [instance(Pair, parse(line, surrogates=True)) for line in read_bytes(path).splitlines()]
    except OSError as error:
        raise HarnessError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise HarnessError(f"{path}: not a list of pairs: {error}") from error


def find_pairs(places: Places) -> list[tuple[Path, PairRecord]]:
    """The comparisons at or below `places`, in path order. One that cannot be read is named on stderr and left out."""
    found = []
    for path in sorted(p for place in places_of(places) for level in LEVELS for p in place.glob(f"{level}pairs.json")):
        try:
            found.append((path.parent, read(path.parent)))
        except HarnessError as error:
            say(message(f"warning: skipped a comparison: {error}"), stream=sys.stderr)
    return found
