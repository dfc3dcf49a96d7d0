"""`harness compare` and `harness figure`: what records say of each other, and pictures of them. Imports no torch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Literal

import typer

from harness.cli.commands import RecordsOption
from harness.errors import UsageError, did_you_mean


def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN_A RUN_B...", help="Records; all are held against the first.")
    ],
    control: Annotated[
        Literal["wrong_user", "shuffled"] | None,
        typer.Option(help="Hold one run against its own record under this control: the personalization gain."),
    ] = None,
    metric: Annotated[list[str], typer.Option(help="Compare this metric. Repeatable [default: all means].")] = [],  # noqa: B006
    data: Annotated[str | None, typer.Option(help="Folder of the task's files, for the lengths of histories.")] = None,
    fmt: Annotated[str, typer.Option("--format", help="terminal, md, csv or json.")] = "terminal",
) -> None:
    """Runs on the same samples, paired by user and item: differences, tests, who gains, and what n could show."""
    from harness.records.select import find_run
    from harness.statistics.compare import compare, control_of
    from harness.statistics.formats import FORMATS, terminal

    if fmt not in FORMATS:
        raise UsageError(f"unknown format {fmt!r}{did_you_mean(fmt, FORMATS)} choose from {', '.join(FORMATS)}")
    folders = [find_run(run) for run in runs]
    if control is not None:
        if len(folders) > 1:
            raise UsageError(f"--control {control} compares one run with its control; {len(folders)} runs given")
        folders = [control_of(folders[0], control), *folders]
    found = compare(folders, metric, data)
    width = shutil.get_terminal_size((120, 40)).columns
    print(terminal(found, width) if fmt == "terminal" else FORMATS[fmt](found))


def figure(
    ids: Annotated[
        list[str], typer.Argument(metavar="ID...|all", help="Such as dps-3; 'harness list figures' names them.")
    ],
    records: RecordsOption = [],  # noqa: B006
    output: Annotated[
        Path, typer.Option("--output_path", "--output", "--path", help="Folder to write to.", metavar="PATH")
    ] = Path("figures"),
    fmt: Annotated[list[str], typer.Option("--format", help="png or svg. Repeatable [default: both].")] = [],  # noqa: B006
    model: Annotated[
        str | None,
        typer.Option(help="Whose records [default: of the models that have them the one with most real users]."),
    ] = None,
    task: Annotated[str | None, typer.Option(help="Which task's records, where a figure shows one.")] = None,
) -> None:
    """The papers' figures, drawn from the records, with intervals, n, and published values where the paper prints them."""
    from harness.publish.figures import FORMATS, write
    from harness.records.select import select
    from harness.run.console import Terminal

    drawn = write(ids, select(records), output, fmt or FORMATS, model=model, task=task)
    for path in drawn.paths:
        print(path)
    console = Terminal()
    for name, commands in drawn.missing.items():
        console.say(f"{name} has no records; make them: {' && '.join(commands)}")
    if drawn.missing and "all" not in ids:
        raise typer.Exit(4)
