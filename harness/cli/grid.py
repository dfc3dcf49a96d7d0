"""`harness grid`: how far a command is that runs on many workers, what it would take, and being one of the workers."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Unpack

import typer

from harness.cli import commands
from harness.cli.commands import with_options
from harness.cli.declarations import Command
from harness.cli.run import FIT, RUN, cells_of, load
from harness.cli.sweep import OWN as SWEPT
from harness.cli.sweep import SWEEP, Lowest, cells_by_point
from harness.errors import DataMissing, UsageError
from harness.files.shown import say, without_credentials

if TYPE_CHECKING:
    from harness.run.cell import Cell

grid_app = commands.app(help="Runs of many processes and machines (--on): how far they are, and their workers.")


@grid_app.callback(invoke_without_command=True)
def _grid(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


@grid_app.command("status")
def status_(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder of records, as --output_path was; or a record in it.")
    ] = Path("runs"),
) -> None:
    """Shards done, running and waiting, samples failed, time left, and the command that goes on."""
    from harness.grid.status import grids, status

    for number, root in enumerate(grids(folder)):
        if number:
            say()
        for line in status(root):
            say(line)


plan_app = commands.app(
    default="run",
    help="What a command would take on its workers: shards, memory a worker, hours and operations.\n\n"
    "Takes the command with its options, --on among them, as in grid plan sweep --method rag --set 'k=1|4' ... --on local:2, and "
    "says after the plan what starts it. With --on workers:N that command prints the line of each worker, for a scheduler "
    "that the harness does not know.",
)


@plan_app.callback(invoke_without_command=True)
def _plan(context: typer.Context) -> None:
    _grid(context)


@plan_app.command("run")
@with_options(*RUN)
def plan_run(**given: Unpack[Command]) -> None:
    """What harness run would take on its workers, cell by cell."""
    _say_plan("run", given)


@plan_app.command("sweep")
@with_options(*SWEEP, **SWEPT)
def plan_sweep(lowest: Lowest = False, **given: Unpack[Command]) -> None:
    """What harness sweep would take on its workers, task by task: a shard has the same batches of all points."""
    _say_plan("sweep", given)


@plan_app.command("fit")
@with_options(*FIT)
def plan_fit(**given: Unpack[Command]) -> None:
    """What harness fit would take on its workers: each fit is one worker's work, fits of several methods run side by side."""
    _say_plan("fit", given)


def _say_plan(command: Literal["run", "sweep", "fit"], given: Command) -> None:
    from harness.grid.estimate import estimate, estimate_fit
    from harness.grid.executors import place_of
    from harness.run.cell import check_fit
    from harness.run.console import Terminal

    place = place_of(given)
    if place is None:
        raise UsageError("give the workers to plan for, as in --on local:2, --on ray or --on workers:8")
    jobs = jobs_of(command, given)
    for cell in (cell for job in jobs for cell in job):
        if command == "fit":
            check_fit(cell)
        else:
            assert cell.items
    lm = load(given["model"], given, Terminal())
    for job in jobs:
        say(f"{job[0].method_name} on {job[0].task_name} with {lm.name}")
        say(estimate_fit(lm, job[0], place.workers) if command == "fit" else estimate(lm, job, place.workers))
    line = sys.argv[sys.argv.index("plan") + 1 :]
    say(without_credentials(f"start it: {shlex.join(['harness', *([] if line[0] == command else [command]), *line])}"))


@grid_app.command("worker")
def worker_(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The grid's folder, as its driver names it.")],
    rank: Annotated[str, typer.Option(help="Which of the workers this is: i/n, i from 0 to n-1.", metavar="I/N")],
    parent: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Be a worker of a grid: load its model, answer shards until its driver ends."""
    match = re.fullmatch(r"(\d+)/(\d+)", rank)
    if match is None or int(match[1]) >= int(match[2]):
        raise UsageError(f"--rank {rank} is not valid; give I/N with I from 0 to N-1, as in 0/8")
    from harness.grid.folder import take
    from harness.grid.worker import work
    from harness.run.console import Terminal

    plan = take(folder / "plan.json")
    if plan is None:
        raise DataMissing(
            f"{folder} holds no grid that goes on; its driver names the folder, which must be on a shared path"
        )
    given = plan["options"]
    code = work(
        folder.resolve(),
        int(match[1]),
        parent,
        lambda: jobs_of(plan["command"], given),
        lambda: load(given["model"], given, Terminal()),
    )
    raise typer.Exit(code)


def jobs_of(command: str, given: Command) -> list[list[Cell]]:
    """The cells of a command, those that are answered together in one list."""
    if command == "sweep":
        by_point = list(cells_by_point(given).values())
        return [list(points) for points in zip(*by_point, strict=True)]
    return [[cell] for cell in cells_of(given["method"], given["task"], given)]


grid_app.add_typer(plan_app, name="plan")
