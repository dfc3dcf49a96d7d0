"""A command's cells on workers: what `harness run`, `sweep` and `fit` do with `--on`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from harness.files.shown import without_credentials
from harness.fit.artifacts import ArtifactStore
from harness.grid.driver import Remote, drive, first_worker
from harness.grid.executors import Executor, Local, Others, Where, command
from harness.grid.folder import root_of
from harness.grid.pool import Jobs, Pool
from harness.judge.judges import Judge
from harness.records.select import OWN
from harness.records.store import Outcome
from harness.run.cell import Cell
from harness.run.console import Console
from harness.run.steps import cell_steps

R = TypeVar("R")
Step = Callable[[Remote, Cell], Generator[None, None, R]]
Key = tuple[int, int]
"""Of a cell: its job, and in it its point."""


def on_workers(
    command: Literal["run", "sweep", "fit"],
    given: Mapping[str, Any],
    place: Where,
    jobs: Jobs,
    console: Console,
    judge: Judge | None,
    chosen: Sequence[int] | None = None,
) -> Callable[[Cell], Any]:
    """Run the command on workers; what came of a cell is then what the function returns or raises.

    `chosen` are the jobs by their numbers among all of the command, where some of those cannot run.
    """
    options = {name: value for name, value in given.items() if name not in _OF_THE_DRIVER}
    plan = {
        "command": command,
        "options": options,
        "records": str(given.get("output_path", OWN)),
        "line": without_credentials(shlex.join(["harness", *sys.argv[1:]])),
        "chosen": list(range(len(jobs))) if chosen is None else list(chosen),
    }
    mixed = bool(given.get("mixed_hardware"))
    found: dict[tuple[int, int], Any]
    if command == "fit":
        found = fit_on(place, jobs, plan, console, mixed_hardware=mixed)
    else:
        found = dict(run_on(place, jobs, plan, console, judge, mixed_hardware=mixed))
    by_cell = {id(cell): found.get((j, p)) for j, job in enumerate(jobs) for p, cell in enumerate(job)}

    def outcome(cell: Cell) -> Any:
        value = by_cell[id(cell)]
        if isinstance(value, BaseException):
            raise value
        return value

    return outcome


_OF_THE_DRIVER = {"on", "gpus_per_worker", "mixed_hardware", "json", "judge_base_url", "judge_set"}
"""Options that change nothing of what a worker does."""


def run_on(
    place: Where,
    jobs: Jobs,
    plan: Mapping[str, Any],
    console: Console,
    judge: Judge | None,
    *,
    mixed_hardware: bool = False,
) -> dict[Key, Outcome | BaseException]:
    """What `run_cell` returns or raises, for every cell; the record of each is complete, resumable or was already there.

    `plan` is the command and its options, from which workers make the same cells. Raises HarnessError where no worker can begin,
    KeyboardInterrupt with everything saved.
    """
    store = ArtifactStore()

    def step(remote: Remote, cell: Cell) -> Generator[None, None, Outcome]:
        return cell_steps(remote.lm, cell, store=store, console=console, judge=judge, hands=remote)

    return _on_workers(place, jobs, plan, console, judge, store, step, mixed_hardware)


def fit_on(
    place: Where, jobs: Jobs, plan: Mapping[str, Any], console: Console, *, mixed_hardware: bool = False
) -> dict[Key, Any]:
    """What the methods learnt, as `harness.fit.states.Shared`, for every cell."""
    store = ArtifactStore()
    return _on_workers(
        place, jobs, plan, console, None, store, lambda remote, cell: remote.fit(cell, store, console), mixed_hardware
    )


def _on_workers(
    place: Where,
    jobs: Jobs,
    plan: Mapping[str, Any],
    console: Console,
    judge: Judge | None,
    store: ArtifactStore,
    step: Step[R],
    mixed_hardware: bool,
) -> dict[Key, R | BaseException]:
    root = root_of(Path(plan["records"]), plan["command"], plan["options"]).resolve()
    starter = _executor(place, root)
    pool = Pool(root, starter, jobs, plan, console, store, mixed_hardware=mixed_hardware)
    with pool:
        if isinstance(starter, Others):
            console.say(
                f"start each worker, i from 0 to {starter.workers - 1}: "
                + " ".join(command(root, "i", starter.workers))
            )
        lm = first_worker(pool)
        keys = [(j, p) for j, job in enumerate(jobs) for p in range(len(job))]
        steps = {(j, p): step(Remote(pool, lm, j, p, judge), jobs[j][p]) for j, p in keys}
        done = drive(pool, steps, lambda key: pool.is_over(*key))
    pool.remove()
    return done


def _executor(place: Where, root: Path) -> Executor:
    """Raises UsageError where the packages it needs are missing."""
    if place.kind == "local":
        return Local(root, place.workers or 1, place.gpus)
    if place.kind == "workers":
        return Others(root, place.workers or 1)
    if place.kind == "ray":
        from harness.grid.on_ray import Ray

        return Ray(root, place)
    from harness.grid.on_slurm import Slurm

    return Slurm(root, place)
