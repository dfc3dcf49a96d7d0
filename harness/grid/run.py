"""A command's cells on workers: what `harness run`, `sweep` and `fit` do with `--on`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from harness.files.shown import without_credentials
from harness.fit.artifacts import ArtifactStore
from harness.grid.driver import Remote, drive, first_worker
from harness.grid.executors import Executor, Local, Others, Where
from harness.grid.executors import command as worker_command
from harness.grid.folder import names, root_of
from harness.grid.pool import Jobs, Pool
from harness.judge.judges import Judge
from harness.records.select import OWN
from harness.run.cell import Cell
from harness.run.console import Console
from harness.run.kept import same_records
from harness.run.steps import cell_steps

Work = tuple[Jobs, Sequence[int], Judge | None]
"""The jobs that run, their numbers among all of the command, and who judges."""


def on_workers(
    command: Literal["run", "sweep", "fit"],
    given: Mapping[str, Any],
    place: Where,
    console: Console,
    prepare: Callable[[], Work],
) -> Callable[[Cell], Any]:
    """Run the command on workers; what came of a cell is then what the function returns or raises.

    `prepare` reads the data. Workers of this machine begin before that and read it at the same time; others are asked for
    after it, as a mistake should show before a cluster is. Raises HarnessError where no worker can begin, KeyboardInterrupt
    with everything saved.
    """
    options = {name: value for name, value in given.items() if name not in _OF_THE_DRIVER}
    records = str(given.get("output_path", OWN))
    line = without_credentials(shlex.join(["harness", *sys.argv[1:]]))
    plan = {"command": command, "options": options, "records": records, "line": line}
    root, store = root_of(Path(records), command, options).resolve(), ArtifactStore()
    work = None if place.kind == "local" else prepare()
    starter = _executor(place, root)
    done: dict[tuple[int, int], Any] = {}
    with Pool(root, starter, plan, console, store, mixed_hardware=bool(given.get("mixed_hardware"))) as pool:
        if isinstance(starter, Others):
            console.say(
                f"start each worker, i from 0 to {starter.workers - 1}: "
                + " ".join(worker_command(root, "i", starter.workers))
            )
        jobs, chosen, judge = work or prepare()

        def step(j: int, p: int) -> Generator[None, None, Any]:
            remote, cell = Remote(pool, lm, j, p, judge), jobs[j][p]
            if command == "fit":
                return remote.fit(cell, store, console)
            return cell_steps(lm, cell, store=store, console=console, judge=judge, hands=remote)

        if jobs:
            pool.give(jobs, chosen)
            lm = first_worker(pool)
            every = {(j, p): cell for j, job in enumerate(jobs) for p, cell in enumerate(job)}
            firsts = {key: key for key in every} if command == "fit" else same_records(lm, every, judge)
            for key, first in firsts.items():
                if key != first:
                    pool.is_over(*key)
            steps = {key: step(*key) for key in dict.fromkeys(firsts.values())}
            ended = drive(pool, steps, lambda key: pool.is_over(*key))
            done = {key: ended[first] for key, first in firsts.items()}
            failed = any(isinstance(value, BaseException) for value in done.values())
            pool.finished = not failed or not names(pool.session.results)  # what is answered and in no record is kept
    by_cell = {id(cell): done.get((j, p)) for j, job in enumerate(jobs) for p, cell in enumerate(job)}

    def outcome(cell: Cell) -> Any:
        value = by_cell[id(cell)]
        if isinstance(value, BaseException):
            raise value
        return value

    return outcome


_OF_THE_DRIVER = {"on", "gpus_per_worker", "mixed_hardware", "json", "judge_base_url", "judge_set"}
"""Options that change nothing of what a worker does."""


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
