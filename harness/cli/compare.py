"""`harness compare` and `harness figure`: what records say of each other, and pictures of them. Imports no torch."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from harness.cli.commands import RecordsOption, completing
from harness.cli.declarations import folder_text
from harness.errors import DataMissing, UsageError, did_you_mean
from harness.files.shown import say

if TYPE_CHECKING:
    from harness.statistics.matched import NoneAgree


def compare(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN", help="Records: folders, hashes, globs or names of methods; all are held against the first."
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of all records, those of this task.", autocompletion=completing("tasks")),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of all records, those of this model.", autocompletion=completing("models")),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD|RUN",
            autocompletion=completing("methods"),
            help="What the others are held against [default: the first; of --task or a glob, plain].",
        ),
    ] = None,
    control: Annotated[
        Literal["wrong_user", "shuffled"] | None,
        typer.Option(help="Hold one run against its own record under this control: the personalization gain."),
    ] = None,
    matched: Annotated[
        Literal["tokens", "flops"] | None,
        typer.Option(help="Of each method the run whose cost a sample agrees with the others', chosen by cost alone."),
    ] = None,
    min_history: Annotated[
        int, typer.Option("--min_history", min=0, help="Compare users with this many items of history, or more.")
    ] = 0,
    metric: Annotated[
        list[str], typer.Option(metavar="NAME", help="Compare this metric, or all. Repeatable [default: the main one].")
    ] = [],  # noqa: B006
    details: Annotated[
        bool, typer.Option("--details", help="Effect sizes, who gains and who loses, gain by length of history.")
    ] = False,
    data: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="The task's files, for the lengths of histories.")
    ] = None,
    fmt: Annotated[
        str, typer.Option("--format", help="terminal, md, csv or json.", autocompletion=completing("formats"))
    ] = "terminal",
) -> None:
    """Which runs are better on the same samples, is it real, and what does it cost.

    Runs are paired by user and item and tested against each other; the last sentence says what follows.
    """
    from harness.statistics.answer import brief
    from harness.statistics.compare import MAIN, compare, control_of
    from harness.statistics.formats import FORMATS, terminal

    if fmt not in FORMATS:
        raise UsageError(f"unknown format {fmt!r}{did_you_mean(fmt, FORMATS)} choose from {', '.join(FORMATS)}")
    data = folder_text("--data", data)
    if control is not None:
        if len(runs or ()) != 1:
            raise UsageError(f"--control {control} compares one run with its control; {len(runs or ())} runs given")
        one = _uncontrolled((runs or [""])[0])
        folders = [control_of(one, control), one]
    else:
        asked, searched = _asked(runs or [], task, model, variants=matched is not None)
        if matched is not None:
            from harness.statistics.matched import NoneAgree
            from harness.statistics.matched import matched as of_equal_cost

            try:
                points, what = of_equal_cost(asked, matched)
            except NoneAgree as far:
                raise _with_commands(far, matched, data) from None
            asked = [point.folder for point in points]
            say(what, stream=sys.stderr)
        folders = _with_baseline(asked, searched, baseline)
    wanted = [] if metric == ["all"] else metric or [MAIN]
    found = compare(folders, wanted, data, min_history=min_history)
    width = shutil.get_terminal_size((80, 40)).columns
    if fmt != "terminal":
        say(FORMATS[fmt](found))
    elif details or len(wanted) != 1:
        say(terminal(found, width))
    else:
        say(brief(found, min(width, 100)))


def _with_commands(far: NoneAgree, by: str, data: str | None) -> UsageError:
    """Prints what makes runs between those that do not agree."""
    from harness.publish.equal_cost import FOLDER, sweeps

    found = sweeps(far.nearest, data)
    for line in found:
        say(line)
    if not found:
        return UsageError(
            f"{far}; no method of them has a number of history items (k) or of answers that could be changed"
        )
    return UsageError(
        f"{far}. The commands above make runs between them on the fit split; 'harness compare {FOLDER} --matched {by}' then chooses "
        "the run of each, whose k or number of answers you take to the split that you report"
    )


def _uncontrolled(wanted: str) -> Path:
    """The record that `wanted` names; of one and its controls, the one with everyone's own history."""
    from harness.records.select import find_run, record_folders, select
    from harness.records.store import read_record

    own = [f for f in record_folders(select([wanted])) if read_record(f).config.selection.control == "none"]
    return own[0] if len(own) == 1 else find_run(wanted)


def _asked(runs: list[str], task: str | None, model: str | None, *, variants: bool = False) -> tuple[list[Path], bool]:
    """The records to compare, points of sweeps among them with `variants`, and whether they were searched for, so that their
    order says nothing."""
    from harness.plugins.registry import task_name
    from harness.publish.leaderboard import rankings
    from harness.records.select import find_records, said, select
    from harness.records.store import find_runs

    if task is None and model is None:
        each = [find_records([run]) for run in runs]
        searched = any(len(some) > 1 for some in each)
        return _with_answers(find_records(runs)) if searched else [some[0] for some in each], searched
    places = select(runs)
    name = None if task is None else task_name(task)
    found = [r for r in rankings(find_runs(places, model=model, task=name)) if r.control == "none"]
    titles = list(dict.fromkeys((ranking.model, ranking.task) for ranking in found))
    if not found:
        raise DataMissing(f"no finished run of {' on '.join(filter(None, [model, name]))} in {said(places)}")
    if len(titles) > 1:
        some = ", ".join(f"--model {m} --task {t}" for m, t in titles[:6]) + (", ..." if len(titles) > 6 else "")
        raise UsageError(f"runs of several models or tasks; name one of each: {some}")
    most = max(found, key=lambda ranking: len(ranking.rows))
    others = [ranking.title for ranking in found if ranking is not most]
    if others:
        say(f"compared: {most.title}; under other conditions, so left out: {', '.join(others)}", stream=sys.stderr)
    wanted = [row.run for row in most.rows if variants or not row.variant]
    return _with_answers([run.folder for run in wanted if run.folder]), True


def _with_answers(found: list[Path]) -> list[Path]:
    """Those of the records found whose answers are there; the others are named. Raises DataMissing where no two have them."""
    there = [folder for folder in found if (folder / "samples.jsonl").is_file()]
    without = ", ".join(folder.name for folder in found if folder not in there)
    if len(there) < 2 and without:
        raise DataMissing(
            f"a comparison takes the answers of two runs (samples.jsonl), and {len(there)} of {len(found)} found have theirs; not "
            f"{without}. The command that made a run makes its answers again, in runs"
        )
    if without:
        say(f"without answers, so left out: {without}", stream=sys.stderr)
    return there


def _with_baseline(folders: list[Path], searched: bool, baseline: str | None) -> list[Path]:
    """The baseline first."""
    from harness.records.select import find_run
    from harness.records.store import read_record

    methods = [read_record(folder).config.method.name for folder in folders]
    wanted = baseline or ("plain" if searched else None)
    if wanted in methods:
        place = methods.index(wanted)
        return [folders[place], *folders[:place], *folders[place + 1 :]]
    if baseline is None:
        return folders
    first = find_run(baseline)
    return [first, *(folder for folder in folders if folder.resolve() != first.resolve())]


def figure(
    ids: Annotated[
        list[str],
        typer.Argument(
            metavar="ID",
            help="Such as dps-3, or all; 'harness list figures' names them.",
            autocompletion=completing("figures", "all"),
        ),
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
        say(path)
    console = Terminal()
    for name, commands in drawn.missing.items():
        console.say(f"{name} has no records; make them: {' && '.join(commands)}")
    if drawn.missing and "all" not in ids:
        raise typer.Exit(4)
