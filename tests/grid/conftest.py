"""Workers that need no time to begin: copies of the test's own process, which has everything imported."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from harness.grid import run as grid_run
from harness.grid.executors import Others, Where, exit_reason


class Forked:
    """An executor whose workers are forks; otherwise they are what `harness grid worker` is."""

    def __init__(self, root: Path, workers: int, *, own: bool = True) -> None:
        self.root, self.workers, self.own = root, workers, own
        self.pids: dict[int, int] = {}
        self.codes: dict[int, int] = {}

    def start(self, rank: int) -> None:
        self.codes.pop(rank, None)
        parent = os.getpid()
        pid = os.fork()
        if pid:
            self.pids[rank] = pid
            return
        code = 1
        try:
            (self.root / "logs").mkdir(exist_ok=True)
            log = os.open(self.root / "logs" / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1), os.dup2(log, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            torch.set_num_threads(1)
            from harness.cli.app import main

            line = ["grid", "worker", str(self.root), "--rank", f"{rank}/{self.workers}"]
            sys.argv = ["harness", *line, *(["--parent", str(parent)] if self.own else [])]
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)

    def ended(self, rank: int) -> str | None:
        if rank not in self.codes:
            pid, status = os.waitpid(self.pids[rank], os.WNOHANG)
            if not pid:
                return None
            self.codes[rank] = os.waitstatus_to_exitcode(status)
        return exit_reason(self.codes[rank])

    def kill(self, rank: int) -> None:
        if rank not in self.codes:
            with suppress(ProcessLookupError):
                os.kill(self.pids[rank], signal.SIGKILL)
            _, status = os.waitpid(self.pids[rank], 0)
            self.codes[rank] = os.waitstatus_to_exitcode(status)

    def stop(self) -> None:
        for rank in self.pids:
            self.kill(rank)


class Scheduler(Others):
    """One that the harness does not know: it starts workers once, and the driver hears of them through the folder alone."""

    def __init__(self, root: Path, workers: int) -> None:
        super().__init__(root, workers)
        self.forks = Forked(root, workers, own=False)

    def start(self, rank: int) -> None:
        assert rank not in self.forks.pids
        self.forks.start(rank)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In this process and in its workers: sums over two threads have other last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Forked]:
    """`--on local:N` and `--on workers:N` begin forks of this process; gives what started those of the last command."""
    made: list[Forked] = []

    def executor(place: Where, root: Path) -> Forked | Scheduler:
        if place.kind == "workers":
            scheduler = Scheduler(root, place.workers or 1)
            made.append(scheduler.forks)
            return scheduler
        made.append(Forked(root, place.workers or 1))
        return made[-1]

    monkeypatch.setattr(grid_run, "_executor", executor)
    return lambda: made[-1]


@pytest.fixture
def command(toy: Path) -> str:
    return f"--task lamp2m --model {toy} --limit 16 --batch_size 2 --max_new_tokens 3 --dtype float64"
