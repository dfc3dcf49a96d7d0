"""`harness table`: the papers' tables, what would fill them, and whether what is measured agrees."""

from __future__ import annotations

import shutil
import sys
from typing import Annotated

import typer

from harness.cli.commands import RecordsOption
from harness.errors import OutsideTolerance
from harness.files.shown import say


def table(
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="ID", help="Such as dps-1; all of them by default.")
    ] = None,
    records: RecordsOption = [],  # noqa: B006
    fmt: Annotated[str, typer.Option("--format", help="terminal, md, csv, json or latex.")] = "terminal",
    model: Annotated[str | None, typer.Option(help="Rows of this model only.")] = None,
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

    results = select(records)

    if missing:
        from harness.publish.tables import commands

        lines = commands(ids or (), results, model=model, data=data)
        for line in lines:
            say(line)
        if lines:
            from harness.publish.tables.missing import estimate

            say(estimate(lines), stream=sys.stderr)
        if not lines:
            say("nothing is missing", stream=sys.stderr)
        return
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
