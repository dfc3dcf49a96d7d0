"""`harness table`: the papers' tables, what would fill them, and whether what is measured agrees."""

from __future__ import annotations

import shutil
import sys
from typing import Annotated

import typer

from harness.cli.commands import RecordsOption, completing
from harness.cli.declarations import folder_text
from harness.errors import OutsideTolerance, UsageError
from harness.files.shown import say


def table(
    ids: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ID", help="Such as dps-1; all of them by default.", autocompletion=completing("tables")
        ),
    ] = None,
    records: RecordsOption = [],  # noqa: B006
    fmt: Annotated[
        str,
        typer.Option(
            "--format", help="terminal, md, csv, json or latex.", autocompletion=completing("formats", "latex")
        ),
    ] = "terminal",
    model: Annotated[
        str | None, typer.Option(help="Rows of this model only.", autocompletion=completing("models"))
    ] = None,
    published_only: Annotated[bool, typer.Option("--published_only", help="The published numbers alone.")] = False,
    measured_only: Annotated[bool, typer.Option("--measured_only", help="The measured numbers alone.")] = False,
    data: Annotated[
        str | None, typer.Option(help="Folder of LaMP files whose statistics are counted, and commands are given.")
    ] = None,
    missing: Annotated[
        bool, typer.Option("--missing", help="Print the commands that would fill the tables, and nothing else.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Exit 5 where a measured interval misses the published number.")
    ] = False,
) -> None:
    """The papers' tables: published, measured, and the difference.

    Statistics of data (dps-5, perfit-5) are those of --data, else of the embedded users.
    """
    from harness.publish.tables import grids, write
    from harness.records.select import select

    data, results = folder_text("--data", data), select(records)

    if missing:
        from harness.publish.tables import commands
        from harness.publish.tables.missing import estimate

        unread = {
            "--format": fmt != "terminal",
            "--published_only": published_only,
            "--measured_only": measured_only,
            "--check": check,
        }
        if any(unread.values()):
            names = " and ".join(name for name, given in unread.items() if given)
            raise UsageError(f"--missing prints commands and no table; leave {names} out")
        lines = commands(ids or (), results, model=model, data=data)
        takes = estimate(lines) if lines else "nothing is missing"
        if (
            not sys.stdout.isatty()
        ):  # a shell that reads the commands begins with the first: what they take is said before
            say(takes, stream=sys.stderr)
        for line in lines:
            say(line)
        if sys.stdout.isatty():
            say(takes, stream=sys.stderr)
        return
    if check and (published_only or measured_only):
        only = "--published_only" if published_only else "--measured_only"
        raise UsageError(f"--check holds measured numbers against published ones; leave {only} out")
    made = grids(ids or (), results, model=model, published_only=published_only, measured_only=measured_only, data=data)
    width, shown = shutil.get_terminal_size((120, 40)).columns, fmt == "terminal" and sys.stdout.isatty()
    say(write(made, fmt, color=shown, width=width), bold=shown)
    if check:
        from harness.publish.tables.differences import verdict

        found = verdict(made)
        for line in found.outside:
            say(line, stream=sys.stderr)
        if found.outside:
            raise OutsideTolerance(f"{len(found.outside)} of {found.compared} comparable cells are outside tolerance")
        say(f"{found.compared} comparable cells, none outside tolerance", stream=sys.stderr)
