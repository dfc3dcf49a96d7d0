"""`harness score` and `harness judge ...`: what is done with responses that are already there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Unpack

import typer

from harness.cli import commands
from harness.cli.commands import with_options
from harness.cli.declarations import Command, folder_text, path_text
from harness.cli.declarations import pairs as pairs_of
from harness.errors import DataMissing, UsageError
from harness.files.shown import say

if TYPE_CHECKING:
    from harness.judge.pairwise_record import PairRecord

RunA = Annotated[str, typer.Argument(metavar="RUN_A", help="A record's folder.")]
RunB = Annotated[str, typer.Argument(metavar="RUN_B", help="Another record of the same task and data.")]
PAIRS = {
    "limit": 100,
    "help_limit": "At most this many pairs, drawn by the seed.",
    "help_seed": "Decides which pairs, and which answer of each stands first.",
    "help_data": "Folder of the task's files, where they are read again.",
}
ProfileItems = Annotated[int, typer.Option("--profile_items", min=0, help="Newest items of the user's history shown.")]

judge_app = commands.app(
    help="Compare two runs pair by pair, blind, by a language model or by people; rate one by ExPerT."
)


@judge_app.callback(invoke_without_command=True)
def _judge(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        say(context.get_help(), stream=sys.stderr)
        raise typer.Exit(2)


@with_options("judge", "judge_base_url", "judge_set", "data", "json", help_data=PAIRS["help_data"])
def score(
    run_folder: Annotated[str, typer.Argument(metavar="RUN", help="A record's folder, or its hash.")],
    **given: Unpack[Command],
) -> None:
    """Judge and grade a run's saved responses again; nothing is generated.

    Asks its own judge for the ratings that failed. Another --judge makes a record of its own beside it.
    """
    from harness.cli.run import report
    from harness.records.select import find_run
    from harness.run.console import Terminal
    from harness.run.score import score

    console = Terminal()
    done = score(
        find_run(run_folder),
        given["judge"],
        given["judge_base_url"],
        pairs_of(given["judge_set"]),
        data=folder_text("--data", given["data"]),
        console=console,
    )
    console.close()
    report(done, console, as_json=given["json"])
    raise typer.Exit(done.exit_code)


@with_options(
    "set",
    "data",
    "model_path",
    "device",
    "json",
    help_set="Where a file or folder is that the record names by its content, as in writer=./folder. Repeatable.",
    help_data="Folder of the task's files.",
)
def certify(
    run_folder: Annotated[str, typer.Argument(metavar="RUN", help="A record's folder, or its hash.")],
    samples: Annotated[int, typer.Option(min=1, help="Samples to answer again.")] = 20,
    file: Annotated[
        str | None, typer.Option("--method", metavar="FILE", help="The file of a method of your own.")
    ] = None,
    **given: Unpack[Command],
) -> None:
    """Answer 20 samples of a run again in other batches, with other threads and in another process; say what moved.

    Exit 5 where the recorded batches give other answers than the record holds.
    """
    from harness.publish.show import certificate_table
    from harness.records.select import find_run
    from harness.run.console import Terminal
    from harness.run.contract.certify import Asked, certify

    console = Terminal()
    asked = Asked(
        find_run(run_folder),
        folder_text("--data", given["data"]),
        path_text(given["model_path"]),
        file,
        given["device"],
        samples,
        tuple(pairs_of(given["set"])),
    )
    found = certify(asked, console)
    console.close()
    say(found.to_json() if given["json"] else certificate_table(found))
    raise typer.Exit(0 if found.reproduced else 5)


def recompute(
    results: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of records.")] = Path("results"),
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit 5 where a record would change.")] = False,
) -> None:
    """Compute metrics and intervals of all records again, from their saved samples; no model and no judge is asked.

    For records that an older version of the harness made. Those without samples are named: run their commands again.
    """
    from collections import Counter

    from harness.run.recompute import recompute

    if not results.is_dir():
        raise DataMissing(f"{results} is not a folder; give the folder that holds the records")
    counts: Counter[str] = Counter()
    for done in recompute(results, write=not check):
        counts[done.outcome] += 1
        if done.outcome != "same":
            say(": ".join(filter(None, [f"{done.outcome}  {done.folder}", "; ".join(done.values), done.problem])))
    say(", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())) or "no records", stream=sys.stderr)
    raise typer.Exit(1 if counts["failed"] else 5 if check and counts["changed"] else 0)


@judge_app.command()
@with_options("judge", "judge_base_url", "judge_set", "data", "limit", "seed", **PAIRS)
def pairs(run_a: RunA, run_b: RunB, profile_items: ProfileItems = 10, **given: Unpack[Command]) -> None:
    """A language model rates both answers of each pair, in both orders, without knowing whose they are."""
    from harness.judge.judges import open_judge
    from harness.judge.pairwise import judge_pairs
    from harness.records.select import find_run
    from harness.run.console import Terminal

    if given["judge"] is None:
        raise UsageError("give --judge openai/<model> or hf/<model>; 'harness judge export' is for people")
    console, a, b = Terminal(), find_run(run_a), find_run(run_b)
    opened = open_judge(given["judge"], given["judge_base_url"], pairs_of(given["judge_set"]))
    folder, record = judge_pairs(
        a,
        b,
        opened,
        count=given["limit"] or 1,
        seed=given["seed"],
        profile_items=profile_items,
        data=folder_text("--data", given["data"]),
        progress=console.progress,
    )
    console.close()
    _report(folder, record)
    if record.failed:
        console.say(f"warning: {record.failed} pairs have no answer of the judge; the same command asks again")
    missing = record.pairs - record.compared - record.failed
    if missing:
        console.say(f"warning: {missing} pairs are in no number: the judge refused or gave no ratings in one order")
    raise typer.Exit(3 if record.status == "partial" else 0)


@judge_app.command()
@with_options(
    "judge",
    "judge_base_url",
    "judge_set",
    "data",
    "limit",
    limit=None,
    help_limit="At most this many samples, the first ones.",
    help_data=PAIRS["help_data"],
)
def expert(
    run_folder: Annotated[str, typer.Argument(metavar="RUN", help="A record's folder, or its hash.")],
    **given: Unpack[Command],
) -> None:
    """ExPerT: how far answers speak about what the user's own text does, in content and in style, aspect by aspect."""
    from harness.judge.expert import judge_run
    from harness.judge.judges import open_judge
    from harness.publish.show import expert_table
    from harness.records.select import find_run
    from harness.run.console import Terminal

    if given["judge"] is None:
        raise UsageError("give --judge openai/<model> or hf/<model>, which lists and compares aspects")
    console, run = Terminal(), find_run(run_folder)
    opened = open_judge(given["judge"], given["judge_base_url"], pairs_of(given["judge_set"]))
    folder, found = judge_run(
        run, opened, limit=given["limit"], data=folder_text("--data", given["data"]), progress=console.progress
    )
    console.close()
    say(expert_table(found))
    say(folder)
    if found["unread"]:
        console.say(f"warning: {found['unread']} replies could not be read and count as no counterpart or no agreement")
    if found["missing"]:
        console.say(
            f"warning: {found['missing']} of {found['samples']} samples are missing; the same command asks again"
        )
    raise typer.Exit(3 if found["missing"] else 0)


@judge_app.command()
@with_options(
    "data",
    "limit",
    "seed",
    "output_path",
    **PAIRS,
    output_path=None,
    help_output_path="CSV file to write [default: in the comparison's folder].",
)
def export(run_a: RunA, run_b: RunB, profile_items: ProfileItems = 10, **given: Unpack[Command]) -> None:
    """Write blind pairs as a CSV file, a copy of which each annotator fills in: A, B or tie."""
    from harness.judge.annotations import export
    from harness.records.select import find_run
    from harness.run.console import Terminal

    a, b = find_run(run_a), find_run(run_b)
    path = given["output_path"]
    folder, file = export(
        a,
        b,
        Path(path) if path else None,
        count=given["limit"] or 1,
        seed=given["seed"],
        profile_items=profile_items,
        data=folder_text("--data", given["data"]),
    )
    say(file)
    Terminal().say(f"count the votes with: harness judge import {folder} ANNOTATOR.csv ...")


@judge_app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(metavar="COMPARISON", help="The folder that export named.")],
    votes: Annotated[list[Path], typer.Argument(metavar="VOTES.csv...", help="One filled-in file an annotator.")],
) -> None:
    """Count annotators' votes: majority a pair, win rates with intervals, and how far they agree."""
    from harness.judge.annotations import import_votes
    from harness.run.console import Terminal

    record = import_votes(folder, votes)
    _report(folder, record)
    if record.compared < record.pairs:
        Terminal().say(f"warning: {record.pairs - record.compared} of {record.pairs} pairs have no vote")
    raise typer.Exit(3 if record.status == "partial" else 0)


@judge_app.command()
@with_options(
    "judge", "judge_base_url", "judge_set", "data", "limit", "json", limit=50, help_limit="Questions asked again."
)
def reliability(
    records: Annotated[
        list[str],
        typer.Argument(metavar="RECORD...", help="A run that a judge rated, or comparisons of the same two runs."),
    ],
    **given: Unpack[Command],
) -> None:
    """How far a judge agrees with itself, with another judge, and with people.

    Of a run its judge (or --judge) is asked again, afresh. Of comparisons nothing is asked: position bias, and the
    agreement of every two of them, by judges or by people.
    """
    import json
    import tempfile
    from dataclasses import asdict

    from harness.judge.judges import open_judge
    from harness.judge.reliability import of_comparisons, of_run
    from harness.publish.show import reliability_table
    from harness.records.select import find_run
    from harness.records.store import read_record, read_samples
    from harness.run.console import Terminal
    from harness.run.score import task_of
    from harness.servers.reply_cache import ReplyCache

    if all((Path(folder) / "pairs.json").is_file() for folder in records):
        found = of_comparisons([Path(folder) for folder in records])
    elif len(records) > 1:
        raise UsageError(
            "give one run, or comparisons alone ('harness judge pairs' and 'judge import' name their folders)"
        )
    else:
        console, folder = Terminal(), find_run(records[0])
        record = read_record(folder)
        own = record.config.judge
        name = given["judge"] or (own.name if own else None)
        if name is None:
            raise UsageError("the run was rated by no judge; name one: --judge openai/<model>")
        address = given["judge_base_url"] or (own.base_url if own and own.name == name else None)
        task, count = task_of(record, folder_text("--data", given["data"])), given["limit"] or 1
        asks = task.asks if task.judged else ()
        with tempfile.TemporaryDirectory() as fresh:
            cache = ReplyCache(Path(fresh) / "judge.sqlite")
            judge = open_judge(name, address, pairs_of(given["judge_set"]), cache, asks=asks)
            found = of_run(task, record, read_samples(folder), judge, count=count, progress=console.progress)
        console.close()
    if given["json"]:
        say(json.dumps([{**asdict(one), "value": one.value.model_dump()} for one in found]))
    else:
        say(reliability_table(found))


def _report(folder: Path, record: PairRecord) -> None:
    from harness.publish.show import pairs_table

    say(pairs_table(record))
    say(folder)
