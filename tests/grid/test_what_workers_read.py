"""A worker answers with what its driver has: the same files, and all that was learnt; or not at all."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.errors import DataMissing
from harness.fit.artifacts import ArtifactStore
from harness.grid import run as grid_run
from harness.grid.driver import Remote
from harness.grid.folder import Session, put, take
from harness.grid.worker import _Worker
from harness.records.store import find_runs, read_samples

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

Harness = Callable[[str], Any]
MINE = """
from dataclasses import dataclass
from harness.method import Method
from harness.plan import Plan, Stream

@dataclass(frozen=True)
class Mine(Method):
    def plan(self, example, shared, personal):
        return Plan((Stream(example.prompt()),), {more})
"""


def test_a_worker_that_would_run_another_file_than_the_driver_read_is_refused(
    harness: Harness, command: str, forked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("mine.py").write_text(MINE.format(more=""))
    made = grid_run._executor

    def edited(*args: Any) -> Any:
        Path("mine.py").write_text(MINE.format(more="answer='edited while the workers waited in a queue'"))
        return made(*args)

    monkeypatch.setattr(grid_run, "_executor", edited)
    done = harness(f"run --method ./mine.py:Mine {command} --allow_noop --output_path two --on local:1")
    assert done.code == DataMissing.exit_code and "mine" in done.error()
    assert "is not as the driver read it; leave it as it is while the command runs" in done.error()
    assert not find_runs(Path("two"))


def test_a_state_that_is_gone_stops_the_cell_and_nobody_is_answered_without_it(
    harness: Harness, command: str, forked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    perfit = f"run --method perfit --set ablation=stage2_p --set epochs=1 --set items=1 {command} --output_path two"
    answer = Remote.answer

    def cleared(self: Remote, *args: Any) -> Any:
        for state in Path("cache/artifacts").glob("[0-9a-f]*"):
            shutil.rmtree(state)
        return answer(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Remote, "answer", cleared)
        done = harness(f"{perfit} --on local:2")
    assert done.code == 1 and "was there and is not any more; give the command again" in done.error()
    assert not [sample for run in find_runs(Path("two")) if run.folder for sample in read_samples(run.folder)]
    assert harness(f"{perfit} --on local:2").code == 0


def test_a_worker_whose_session_went_away_leaves_no_answers_made_without_what_was_learnt(tmp_path: Path) -> None:
    life: Any = SimpleNamespace(session=Session(tmp_path, "s"))
    cell: Any = SimpleNamespace()
    worker = _Worker(life, [[cell]], cell, ArtifactStore(tmp_path / "store"))
    with pytest.raises(FileNotFoundError):
        worker._cell({"job": 0, "point": 0})


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_a_file_that_a_shared_file_system_will_not_give_for_a_moment_is_not_taken_for_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    put(tmp_path / "event", {"kind": "done"})
    assert take(tmp_path / "absent") is None
    read, left = Path.read_bytes, [failures]

    def stale(path: Path) -> bytes:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", stale)
    if failures == 3:
        with pytest.raises(OSError, match="Stale"):
            take(tmp_path / "event")
    else:
        assert take(tmp_path / "event") == {"kind": "done"}
