"""The driver's side alone: workers that are refused, late, silent or never ready, and drivers that get in each other's way."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.errors import HarnessError, UsageError
from harness.fit.artifacts import ArtifactStore
from harness.grid import pool as grid_pool
from harness.grid.pool import Pool
from harness.grid.worker import _Life
from harness.run.console import Console


class Noted:
    """An executor that starts nothing and notes what it is told."""

    def __init__(self, workers: int = 2) -> None:
        self.workers, self.told, self.over = workers, list[str](), dict[int, str]()
        self.refuses_to_start = -1

    def start(self, rank: int) -> None:
        if rank == self.refuses_to_start:
            raise HarnessError("sbatch: error: too many jobs")
        self.told.append(f"start {rank}")

    def ended(self, rank: int) -> str | None:
        return self.over.get(rank)

    def kill(self, rank: int) -> None:
        self.told.append(f"kill {rank}")

    def stop(self) -> None:
        self.told.append("stop")


class Said(Console):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Pool]:
    return lambda executor: Pool(tmp_path / "out/.grid/x", executor, {}, Said(), ArtifactStore(tmp_path / "store"))


def joins(pool: Pool, rank: int) -> _Life:
    """A worker as the driver sees it: it lives as long as it is made to beat."""
    life = _Life(pool.session, rank, None)
    pool.session.inbox(life.name).mkdir(parents=True)
    life.beat()
    life.say("starting")
    return life


def ready(life: _Life) -> None:
    life.say("ready", identity={"name": "m", "source": "s"}, hardware={"device": "cpu"})


def turns(pool: Pool, seconds: float, *living: _Life) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for life in living:
            life.beat()
        pool.turn()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> float:
    """Seconds in which silence is noticed."""
    monkeypatch.setattr(grid_pool, "PATIENCE_SECONDS", 0.2)
    return 0.6


def test_a_worker_that_was_refused_is_not_started_again(make: Callable[..., Pool], impatient: float) -> None:
    executor = Noted()
    with make(executor) as pool:
        good, bad = joins(pool, 0), joins(pool, 1)
        ready(good)
        bad.say("refused", line="it does not see the data", code=4)
        turns(pool, impatient, good)
        assert executor.told == ["start 0", "start 1", "kill 1"]
        assert pool.console.lines == ["warning: it does not see the data; going on without worker 1"]  # type: ignore[attr-defined]
        assert list(pool.mates) == [good.name]


def test_what_a_worker_says_after_it_was_taken_for_dead_costs_no_other(
    make: Callable[..., Pool], impatient: float
) -> None:
    executor = Noted(1)
    with make(executor) as pool:
        first = joins(pool, 0)
        ready(first)
        pool.turn()
        executor.over[0] = "its node is gone"
        pool.turn()
        executor.over.clear()
        second = joins(pool, 0)
        ready(second)
        first.say("done", task=1, value={"file": "x"}, seconds=1.0, said=[])
        turns(pool, impatient, second)
        assert executor.told == ["start 0", "start 0"] and list(pool.mates) == [second.name]


def test_a_silent_worker_takes_all_of_its_rank_with_it_and_not_the_ones_that_follow(
    make: Callable[..., Pool], impatient: float
) -> None:
    executor = Noted(1)
    with make(executor) as pool:
        ready(joins(pool, 0))
        ready(joins(pool, 0))  # as of a job that an earlier life of the driver had queued
        turns(pool, impatient)
        third = joins(pool, 0)
        ready(third)
        turns(pool, impatient, third)
        assert executor.told == ["start 0", "kill 0", "start 0"] and list(pool.mates) == [third.name]


def test_a_place_where_no_worker_gets_ready_is_left_out_and_the_others_go_on(make: Callable[..., Pool]) -> None:
    executor = Noted()
    with make(executor) as pool:
        good = joins(pool, 0)
        ready(good)
        executor.over[1] = "exit code 1"
        for _ in range(20):
            pool.turn()
        assert executor.told.count("start 1") == 3 and executor.told.count("start 0") == 1
        (line,) = pool.console.lines  # type: ignore[attr-defined]
        assert "worker 1 ended 3 times before it was ready (exit code 1)" in line and "going on without it" in line
        executor.over[0] = "killed by SIGKILL"
        with pytest.raises(HarnessError, match="workers end before they are ready"):
            turns(pool, 20)


def test_workers_that_have_begun_end_where_another_cannot(make: Callable[..., Pool]) -> None:
    executor = Noted()
    executor.refuses_to_start = 1
    pool = make(executor)
    with pytest.raises(HarnessError, match="too many jobs"):
        pool.__enter__()
    assert executor.told == ["start 0", "stop"] and not pool.root.exists()


def test_workers_end_with_a_driver_whose_folder_was_removed(make: Callable[..., Pool]) -> None:
    executor = Noted()
    pool = make(executor)

    def drive() -> None:
        with pool:
            shutil.rmtree(pool.root)
            pool.turn()

    with pytest.raises(FileNotFoundError):
        drive()
    assert executor.told[-1] == "stop"


def test_a_second_driver_of_the_same_command_is_refused_and_the_first_goes_on(make: Callable[..., Pool]) -> None:
    other = Noted()
    with make(Noted()) as pool:
        with pytest.raises(UsageError, match="is being written by another run"):
            make(other).__enter__()
        ready(joins(pool, 0))
        pool.turn()
        assert not other.told and pool.identity is not None
    with make(other):
        assert other.told


def test_a_driver_shows_that_it_lives_whatever_it_cannot_count(
    make: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid_pool, "BEAT_SECONDS", 0.02)
    with make(Noted()) as pool:
        monkeypatch.setattr(pool, "summary", lambda: {}["a job that was over in between"])
        time.sleep(0.1)
        monkeypatch.undo()
        before: Any = pool.session.driver.read_bytes()
        until = time.monotonic() + 20
        while pool.session.driver.read_bytes() == before:
            assert time.monotonic() < until
            time.sleep(0.01)
