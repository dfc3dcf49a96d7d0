"""Whatever dies, a run on workers ends like the run in one process."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from left_behind import none_left, records, same

from harness.errors import DataMissing
from harness.grid import pool as grid_pool
from harness.grid.worker import _Worker
from harness.records.store import find_runs, read_samples

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

Harness = Callable[[str], Any]
BAD = '''
import os, signal
from dataclasses import dataclass
from harness.method import Method
from harness.plan import Plan, Stream

@dataclass(frozen=True)
class Bad(Method):
    """Takes the process with it at one user."""
    def plan(self, example, shared, personal):
        if example.user.id == os.environ["BAD_USER"] and os.environ.get("IN_WORKER"):
            {end}
        return Plan((Stream(example.prompt()),))
'''


def test_workers_that_are_killed_cost_their_shards_and_no_number(
    harness: Harness, forked: Any, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert harness(f"run --method plain {command} --output_path one").code == 0
    draw, left = random.Random(0), [3]
    back = grid_pool.Pool._back

    def kill_one(pool: Any, mate: Any, event: Mapping[str, Any]) -> None:
        back(pool, mate, event)
        if left[0] and draw.random() < 0.7:
            left[0] -= 1
            os.kill(forked().pids[draw.choice([0, 1])], signal.SIGKILL)

    monkeypatch.setattr(grid_pool.Pool, "_back", kill_one)
    done = harness(f"run --method plain {command} --output_path two --on local:2")
    assert done.code == 0 and not left[0], done.err
    same("one", "two")
    none_left(forked().pids.values())


def test_a_killed_driver_goes_on_where_it_stopped_and_its_workers_end(
    harness: Harness, command: str, monkeypatch: pytest.MonkeyPatch, forked: Any
) -> None:
    assert harness(f"run --method plain {command} --output_path one").code == 0
    finished = []
    back = grid_pool.Pool._back

    def stop(pool: Any, mate: Any, event: Mapping[str, Any]) -> None:
        back(pool, mate, event)
        finished.append(event)
        if len(finished) == 4:
            (pids,) = [dict(forked().pids)]
            Path("pids").write_text(json.dumps(list(pids.values())))
            os._exit(9)

    driver = os.fork()
    if not driver:
        monkeypatch.setattr(grid_pool.Pool, "_back", stop)
        harness(f"run --method plain {command} --output_path two --on local:2")
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(driver, 0)[1]) == 9
    none_left(json.loads(Path("pids").read_text()))
    status = harness("grid status two")
    assert "not running" in status.out and "it goes on with: harness run" in status.out
    (before,) = find_runs(Path("two"))
    assert before.status == "running"
    done = harness(f"run --method plain {command} --output_path two --on local:2")
    assert done.code == 0, done.err
    same("one", "two")


def test_ctrl_c_saves_and_the_same_command_goes_on(
    harness: Harness, command: str, monkeypatch: pytest.MonkeyPatch, forked: Any
) -> None:
    assert harness(f"run --method plain {command} --output_path one").code == 0
    read = grid_pool.Results.read

    seen: list[str] = []

    def stop(results: Any, name: str) -> None:
        read(results, name)
        seen.append(name)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(grid_pool.Results, "read", stop)
        assert harness(f"run --method plain {command} --output_path two --on local:2").code == 130
    assert {run.status for run in find_runs(Path("two"))} == {"interrupted"}
    none_left(forked().pids.values())
    assert harness(f"run --method plain {command} --output_path two --on local:2").code == 0
    same("one", "two")


@pytest.mark.parametrize(
    ("end", "reason"),
    [("os.kill(os.getpid(), signal.SIGKILL)", "its worker died"), ("raise ZeroDivisionError('far off')", "far off")],
)
def test_a_poisonous_sample_fails_itself_after_three_tries_and_not_the_grid(
    harness: Harness, command: str, forked: Any, monkeypatch: pytest.MonkeyPatch, end: str, reason: str
) -> None:
    Path("bad.py").write_text(BAD.replace("{end}", end))
    assert harness(f"run --method plain {command} --output_path names").code == 0
    ((_, names),) = records("names").values()
    assert names.folder is not None
    answered = read_samples(names.folder)
    monkeypatch.setenv("BAD_USER", answered[3].user)
    # only while answering: planning is one worker's work for all samples
    answer = _Worker._answer

    def poisoned(worker: _Worker, task: Any, relay: Any) -> Any:
        os.environ["IN_WORKER"] = "1"
        worker.opened.clear()
        return answer(worker, task, relay)

    monkeypatch.setattr(_Worker, "_answer", poisoned)
    done = harness(f"run --method ./bad.py:Bad {command} --allow_noop --output_path two --on local:2")
    assert done.code == 3, done.err
    ((_, run),) = records("two").values()
    assert run.folder is not None
    samples = read_samples(run.folder)
    bad = [sample for sample in samples if sample.user == answered[3].user]
    assert {sample.id for sample in samples if sample.error} == {sample.id for sample in bad}
    assert all(reason in (sample.error or "") and "3 times" in (sample.error or "") for sample in bad)
    whole = {sample.id: sample.response for sample in answered}
    assert all(sample.response == whole[sample.id] for sample in samples if not sample.error)
    assert run.status == "partial" and run.health.errors == len(bad)


def test_a_method_that_is_wrong_everywhere_fails_its_cell_with_the_reason(
    harness: Harness, command: str, forked: Any
) -> None:
    Path("wrong.py").write_text(BAD.replace("{end}", "pass").replace("Plan((Stream(example.prompt()),))", "None"))
    os.environ.setdefault("BAD_USER", "")
    done = harness(f"run --method ./wrong.py:Bad --method plain {command} --output_path two --on local:2")
    assert done.code == 1 and "plan returned None; expected a Plan" in done.error()
    assert {run.status for run in find_runs(Path("two"))} == {"failed", "complete"}


def test_a_worker_that_sees_another_store_says_so_before_it_loads_a_model(
    harness: Harness, command: str, forked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.cli.grid.load", None)
    put = grid_pool.put

    def elsewhere(path: Path, content: Any) -> None:
        put(path, "other" if path.parent.name == ".grid" and path.suffix == "" else content)

    monkeypatch.setattr(grid_pool, "put", elsewhere)
    done = harness(f"run --method plain {command} --output_path two --on local:1")
    assert done.code == DataMissing.exit_code
    assert "does not see the driver's store" in done.err and "set HARNESS_CACHE" in done.err


def test_a_worker_on_unlike_hardware_is_left_out_unless_allowed(
    harness: Harness, command: str, forked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    welcome = grid_pool.Pool._welcome

    def unlike(pool: Any, name: str, mate: Any, event: Mapping[str, Any]) -> None:
        event = {**event, "hardware": {**event["hardware"], "cpu": f"cpu{mate.rank}"}}
        welcome(pool, name, mate, event)
        both.add(mate.rank)

    both: set[int] = set()
    monkeypatch.setattr(grid_pool.Pool, "_welcome", unlike)
    monkeypatch.setattr(grid_pool.Pool, "_assign", _when(lambda: len(both) == 2, grid_pool.Pool._assign))
    done = harness(f"run --method plain {command} --output_path two --on local:2")
    assert done.code == 0 and "whose last bits differ; --mixed_hardware allows both" in done.err
    both.clear()
    done = harness(f"run --method plain {command} --output_path three --on local:2 --mixed_hardware")
    assert done.code == 0 and "last bits" not in done.err
    ((_, run),) = records("three").values()
    assert {run.hardware["workers"][rank]["cpu"] for rank in ("0", "1")} == {"cpu0", "cpu1"}


def _when(ready: Callable[[], bool], act: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda pool: act(pool) if ready() else False


def test_a_worker_ends_when_its_driver_shows_no_sign_of_life(tmp_path: Path) -> None:
    code = (
        "import sys, threading, pathlib, harness.grid.worker as w\n"
        "from harness.grid.folder import Session\n"
        "w.BEAT_SECONDS, w.PATIENCE_SECONDS = 0.05, 0.3\n"
        "session = Session(pathlib.Path(sys.argv[1]), 's')\n"
        "session.begin()\n"
        "w._Life(session, 0, None).begin()\n"
        "threading.Event().wait()\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60).returncode == 0
