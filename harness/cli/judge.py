"""`harness score` and `harness judge ...`: what is done with responses that are already there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness.errors import UsageError

if TYPE_CHECKING:
    from harness.judge.pairwise_record import PairRecord

JudgeName = Annotated[
    str | None, typer.Option("--judge", help="openai/<model>, hf/<model>, or lexicon (word lists; not comparable).")
]
JudgeUrl = Annotated[
    str | None,
    typer.Option(
        "--judge_base_url", "--judge-base-url", help="Server of an openai/ judge [default: $OPENAI_BASE_URL]."
    ),
]
JudgeSet = Annotated[
    list[str],
    typer.Option(
        "--judge_set",
        "--judge-set",
        help="mode, concurrency, timeout, retries, backoff, price_in or price_out = value. Repeatable.",
    ),
]
Data = Annotated[str | None, typer.Option(help="Folder of the task's files, where they are read again.")]
RunA = Annotated[Path, typer.Argument(metavar="RUN_A", help="A record's folder.")]
RunB = Annotated[Path, typer.Argument(metavar="RUN_B", help="Another record of the same task and data.")]
Count = Annotated[int, typer.Option("--limit", min=1, help="At most this many pairs, drawn by the seed.")]
Seed = Annotated[int, typer.Option(help="Decides which pairs, and which answer of each stands first.")]
ProfileItems = Annotated[
    int, typer.Option("--profile_items", "--profile-items", min=0, help="Newest items of the user's history shown.")
]

judge_app = typer.Typer(help="Compare two runs pair by pair, blind: by a language model or by people.")


@judge_app.callback(invoke_without_command=True)
def _judge(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


def score(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A record's folder.")],
    judge: JudgeName = None,
    judge_base_url: JudgeUrl = None,
    judge_settings: JudgeSet = [],  # noqa: B006
    data: Data = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
) -> None:
    """Judge and grade a run's saved responses again; nothing is generated.

    Asks its own judge for the ratings that failed. Another --judge makes a record of its own beside it.
    """
    from harness.cli.run import report
    from harness.publish.show import find_run
    from harness.run.console import Terminal
    from harness.run.score import score

    console = Terminal()
    done = score(find_run(run_folder), judge, judge_base_url, judge_settings, data=data, console=console)
    console.close()
    report(done, console, as_json=as_json)
    raise typer.Exit(done.exit_code)


@judge_app.command()
def pairs(
    run_a: RunA,
    run_b: RunB,
    judge: JudgeName = None,
    judge_base_url: JudgeUrl = None,
    judge_settings: JudgeSet = [],  # noqa: B006
    limit: Count = 100,
    seed: Seed = 0,
    profile_items: ProfileItems = 10,
    data: Data = None,
) -> None:
    """A language model rates both answers of each pair, in both orders, without knowing whose they are."""
    from harness.judge.judges import open_judge
    from harness.judge.pairwise import judge_pairs
    from harness.publish.show import find_run
    from harness.run.console import Terminal

    if judge is None:
        raise UsageError("give --judge openai/<model> or hf/<model>; 'harness judge export' is for people")
    console, a, b = Terminal(), find_run(run_a), find_run(run_b)
    opened = open_judge(judge, judge_base_url, judge_settings)
    folder, record = judge_pairs(
        a, b, opened, count=limit, seed=seed, profile_items=profile_items, data=data, console=console
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
def export(
    run_a: RunA,
    run_b: RunB,
    path: Annotated[Path | None, typer.Option(help="CSV file to write [default: in the comparison's folder].")] = None,
    limit: Count = 100,
    seed: Seed = 0,
    profile_items: ProfileItems = 10,
    data: Data = None,
) -> None:
    """Write blind pairs as a CSV file, a copy of which each annotator fills in: A, B or tie."""
    from harness.judge.annotations import export
    from harness.publish.show import find_run
    from harness.run.console import Terminal

    a, b = find_run(run_a), find_run(run_b)
    folder, file = export(a, b, path, count=limit, seed=seed, profile_items=profile_items, data=data)
    print(file)
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


def _report(folder: Path, record: PairRecord) -> None:
    from harness.publish.show import pairs_table

    print(pairs_table(record))
    print(folder)
