"""The command line. Nothing here imports torch until a model is needed; stdout is data, everything else is stderr."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn, Unpack

import typer

from harness.cli import commands
from harness.cli.commands import OldResults, RecordsArgument, completing, width, with_options
from harness.cli.compare import compare, figure
from harness.cli.declarations import Options, folder_text, pairs, path_text
from harness.cli.grid import grid_app
from harness.cli.judge import certify, judge_app, recompute, score
from harness.cli.push import push
from harness.cli.run import fit, run
from harness.cli.sweep import sweep
from harness.cli.table import table
from harness.cli.vectors import vectors_app
from harness.errors import EXIT_CODES, HarnessError, OutsideTolerance, UsageError, one_line
from harness.files.shown import message, say

app = commands.app(
    help="Evaluate ways of making a language model fit a user.\n\n"
    "First result: harness run --method dps --task lamp4 --model tiny",
    epilog="\n".join(["\b", "Exit codes:", *(f"  {code:<4} {meaning}" for code, meaning in EXIT_CODES.items())]),
    completes=True,
)
data_app = commands.app(help="Fetch or write benchmark data.")
app.command()(run)
app.command()(fit)
app.command()(sweep)
app.command()(score)
app.command()(recompute)
app.command()(certify)
app.command()(compare)
app.command()(figure)
app.command()(table)
app.command()(push)


def main() -> None:
    """Entry point. What a user can mend is one line on stderr and an exit code; so is ctrl-C."""
    for stream in (sys.stdout, sys.stderr):  # what a terminal's encoding lacks is shown as its code
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        "".join(sys.argv[1:]).encode()
    except UnicodeEncodeError:
        _stop("the command holds bytes that are no UTF-8; rename the file, or check the terminal's encoding", 2)
    command = typer.main.get_command(app)
    if "_HARNESS_COMPLETE" in os.environ:
        command.main(prog_name="harness")
    try:
        with command.make_context("harness", sys.argv[1:]) as context:
            command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except typer.TyperException as error:
        path = getattr(getattr(error, "ctx", None), "command_path", "harness")
        _stop(f"{error.format_message().rstrip('.')}; see '{path} --help'", error.exit_code)
    except HarnessError as error:
        _stop(str(error), error.exit_code)
    except SystemExit as stop:  # of a method, task or library; whatever code it gives, nothing was finished
        _stop(f"something that was run ended the program with sys.exit({stop.code}); that is no result", 1)
    except KeyboardInterrupt:
        _stop("interrupted; the state is saved, the same command goes on from here", 130)
    except OSError as error:
        if error.filename is None:  # stdout is closed or full, and the interpreter would write to it when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if isinstance(error, BrokenPipeError):  # harness list methods | head -1
            sys.exit(1)
        _stop(f"{str(error.filename or 'output')[:300]}: {error.strerror or error}", 1)
    except Exception as error:
        line = one_line(error)
        if not line:
            raise
        _stop(line, 1)


def _stop(line: str, code: int) -> NoReturn:
    say(f"harness: {message(line)}", stream=sys.stderr)
    sys.exit(code)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from harness.records.version import VERSION

        say(VERSION)
        raise typer.Exit
    _need_command(context)


@data_app.callback(invoke_without_command=True)
def _data(context: typer.Context) -> None:
    _need_command(context)


def _need_command(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help(), file=sys.stderr)
        raise typer.Exit(2)


@app.command("list")
def list_(
    what: Annotated[
        str,
        typer.Argument(
            metavar="WHAT",
            help="methods, tasks, models, retrievers, metrics, tables or figures.",
            autocompletion=completing("lists"),
        ),
    ],
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="Of methods: explain this one.", autocompletion=completing("methods")),
    ] = None,
) -> None:
    """Name what is there, or explain one method and its options."""
    from harness.cli.listing import listing

    say(listing(what, name, width()))


@app.command()
def show(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RECORDS", help="Folders of records, records, hashes or globs; several stand side by side."
        ),
    ],
    samples: Annotated[int, typer.Option(help="Samples to show.", metavar="N", min=0)] = 5,
    beside: Annotated[list[str], typer.Option(hidden=True)] = [],  # noqa: B006
    data: Annotated[str | None, typer.Option(metavar="FOLDER", help="The task's files, for the questions.")] = None,
) -> None:
    """A record: configuration, metrics, health, cost and a few samples, side by side with other runs."""
    from harness.publish.show import show_runs
    from harness.records.select import find_records

    given = folder_text("--data", data)
    say(show_runs(find_records([*runs, *beside]), samples, width(), given))


@app.command()
def leaderboard(
    records: RecordsArgument = None,
    path: Annotated[
        Path | None,
        typer.Option(
            "--output_path",
            "--output",
            "--path",
            help="Write it as Markdown, leaderboard.md for instance.",
            metavar="FILE",
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Exit 5 where the file (leaderboard.md) is not up to date.")
    ] = False,
    everything: Annotated[bool, typer.Option("--all", help="Sweeps, ablations and controls too.")] = False,
    results: OldResults = [],  # noqa: B006
) -> None:
    """Methods ranked by task and model: printed, or written as Markdown with --output_path.

    leaderboard.md is made of the published records, those in results; other records never overwrite it.
    """
    from harness.publish import leaderboard as board
    from harness.records.select import PUBLISHED, said, select

    wanted = [*(records or []), *results]
    if path is None and not check:
        say(board.terminal(select(wanted), width(), everything=everything))
        return
    if everything:
        raise UsageError(
            "--all is of what is printed: the file holds sweeps, ablations and controls, folded; leave it out"
        )
    places = select(wanted) if wanted else [PUBLISHED]  # the file in git is of published records
    file = path or Path("leaderboard.md")
    if check:
        if not board.check(places, file):
            raise OutsideTolerance(
                f"{file} is not what {said(places)} gives; 'harness leaderboard --output_path {file}' writes it"
            )
        return
    board.write(places, file)
    say(file)


@app.command()
def report(
    records: RecordsArgument = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output_path", "--output", "--path", help="Folder to write; a report in it is replaced.", metavar="PATH"
        ),
    ] = Path("report"),
    open_: Annotated[bool, typer.Option("--open", help="Show the page in a browser.")] = False,
    results: OldResults = [],  # noqa: B006
    data: Annotated[
        list[str],
        typer.Option(help="Folder of a task's files, for queries and histories. Repeatable [default: $HARNESS_DATA]."),
    ] = [],  # noqa: B006
) -> None:
    """Write a page over the records: rankings, tables, every method's answers side by side, heads, costs."""
    from harness.publish.report import write
    from harness.records.select import select

    folders = [folder_text("--data", one) or "" for one in data]
    page = write(select([*(records or []), *results]), output, folders)
    say(page)
    if open_:
        import webbrowser

        if not webbrowser.open(page.resolve().as_uri()):
            say(f"no browser was found; open {page} in one", stream=sys.stderr)


@app.command("check")
@with_options("set", "model_path", help_set="Method option key=value. Repeatable.")
def check_(
    what: Annotated[
        str,
        typer.Argument(
            metavar="WHAT",
            help="./file.py, ./file.py:Class, or the name of a method or a task.",
            autocompletion=completing("methods", "tasks"),
        ),
    ],
    model: Annotated[
        str | None, typer.Option(help="Check a method on this model: alias, hub id, folder or .gguf file.")
    ] = None,
    blocks: Annotated[int | None, typer.Option(help="Its first blocks alone, which is quick.", min=1)] = None,
    **given: Unpack[Options],
) -> None:
    """Test that a method, or a task, keeps the engine's promises in float64, on a small random model or one of yours."""
    from harness.plugins.options import build_method, build_task
    from harness.plugins.registry import is_task, method_row, model_row, task_class, task_name
    from harness.run.console import Terminal

    if is_task(what):
        if model or blocks or given["model_path"]:
            raise UsageError("a task is checked on a random model; leave --model, --model_path and --blocks out")
        name = task_name(what)
        task, _ = build_task(task_class(name), name, pairs(given["set"]), None)
        Terminal().say(f"checking {name} on a random model")
        from harness.run.contract.tasks import check_task

        check_task(task, say=lambda line: say(f"ok  {line}"), skip=lambda line: say(f"--  not checked: {line}"))
        return
    row = method_row(what)
    built = build_method(row.cls, row.name, None, pairs(given["set"]))
    if model is None and (blocks or given["model_path"]):
        raise UsageError("--blocks and --model_path are about a model; name it: --model NAME")
    Terminal().say(f"checking {row.name} on {model or 'a random model'}")
    from harness.engine.loading import load_model
    from harness.run.contract import check_method

    lm = None
    if model is not None:
        named = model_row(model, path_text(given["model_path"]))
        lm = load_model(named, dtype="float64", device="cpu", blocks=blocks)
    check_method(built, lm=lm, say=lambda line: say(f"ok  {line}"), skip=lambda line: say(f"--  not checked: {line}"))


@data_app.command("get")
def data_get(
    context: typer.Context,
    task: Annotated[
        str,
        typer.Argument(
            metavar="TASK",
            help="Such as lamp4; or wordnet, which METEOR reads.",
            autocompletion=completing("tasks", "wordnet"),
        ),
    ],
    split: Annotated[str, typer.Option(help="user or time.")] = "user",
    part: Annotated[list[str], typer.Option(help="train, dev or test. Repeatable.")] = ["train", "dev", "test"],  # noqa: B006
    dest: Annotated[
        Path,
        typer.Option(
            "--output_path", "--output", "--path", "--dest", help="Folder to put the files in.", metavar="PATH"
        ),
    ] = Path("data/lamp"),
    source: Annotated[
        list[Path],
        typer.Option(
            "--from", metavar="PATH", help="Of wordnet: Debian's packages, or a folder of its files. Repeatable."
        ),
    ] = [],  # noqa: B006
) -> None:
    """Download a task's official files, with progress, resume and a recorded checksum; or make WordNet's for METEOR."""
    given = [
        name for name in ("split", "part", "dest") if str(context.get_parameter_source(name)).endswith("COMMANDLINE")
    ]
    if task == "wordnet":
        from harness.cli.fetch import wordnet

        if given:
            raise UsageError(
                "wordnet goes where METEOR looks for it, in the user's cache, which $HARNESS_CACHE moves; give --from alone"
            )
        say(wordnet.get(source))
        return
    if source:
        raise UsageError(f"--from {source[0]} is about wordnet; {task} is downloaded")
    from harness.cli.fetch import download
    from harness.plugins.registry import task_name

    say(download.get(task_name(task), split=split, parts=tuple(part), dest=dest))


@data_app.command("check")
def data_check(
    what: Annotated[
        str, typer.Argument(metavar="WHAT", help="A file of users (.jsonl, .json, .csv, .parquet), or a task.")
    ],
    data: Annotated[str | None, typer.Option(help="Folder of the task's files.")] = None,
    task_set: Annotated[list[str], typer.Option("--task_set", "--task-set", help="Task option key=value.")] = [],  # noqa: B006
) -> None:
    """Say what a data set holds: users, splits, histories, answers that a history gives away, lines that repeat."""
    from harness.publish.data_check import describe

    for line in describe(what, folder_text("--data", data), task_set):
        say(line)


@data_app.command("mini")
def data_mini(dest: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to write to.")]) -> None:
    """Write lamp-mini, the synthetic users, as files in the official LaMP shape."""
    from harness.tiny import lamp_mini

    lamp_mini.write(dest)
    say(dest)


app.add_typer(data_app, name="data")
app.add_typer(grid_app, name="grid")
app.add_typer(judge_app, name="judge")
app.add_typer(vectors_app, name="vectors")
