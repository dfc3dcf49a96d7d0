"""`harness push`: records to a data set on the Hugging Face Hub, the report to a static space, numbers to wandb or trackio.

Nothing is sent without --yes: the command shows what it would send. Answers are quotes of the data they were asked with, so
samples go along only where that is the embedded synthetic data, or where --samples asks for those of licensed data too.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from harness.cli.commands import RecordsArgument
from harness.errors import DataMissing, HarnessError, UsageError
from harness.files.shown import first_line, say

if TYPE_CHECKING:
    from harness.records.schema import RunRecord

HUB = "hf://datasets/"
Tracker = Literal["wandb", "trackio"]
PROJECT = "personalization-harness"
SPACE_CARD = "---\ntitle: {title}\nsdk: static\n---\nThe records of {name}, written by `harness report`.\n"
DATA_CARD = "---\npretty_name: {title}\ntags: [personalization]\n---\n"


def push(
    target: Annotated[str | None, typer.Argument(metavar="hf://datasets/NAME", help="A data set on the Hub.")] = None,
    records: RecordsArgument = None,
    report: Annotated[bool, typer.Option("--report", help="The report too, as the static space of that name.")] = False,
    samples: Annotated[bool, typer.Option("--samples", help="Answers to licensed data too.")] = False,
    to: Annotated[Tracker | None, typer.Option("--to", help="Metrics to this tracker, where it is installed.")] = None,
    project: Annotated[str, typer.Option(help="The tracker's project.", metavar="NAME")] = PROJECT,
    yes: Annotated[bool, typer.Option("--yes", help="Send it; without, what would be sent is shown.")] = False,
) -> None:
    """Publish records: on the Hugging Face Hub, or their numbers in wandb or trackio. Shows what it would send until --yes."""
    from harness.records.select import said, select
    from harness.records.store import find_runs

    named = list(records or ())
    if to is not None and target is not None and not target.startswith(HUB):
        named, target = [target, *named], None  # a tracker has no address, so that the first word is a record
    if (target is None) == (to is None):
        raise UsageError(f"give one place to push to: {HUB}<user>/<name>, or --to wandb or trackio")
    if target is not None and (not target.startswith(HUB) or target.removeprefix(HUB).strip("/").count("/") != 1):
        raise UsageError(f"{target} is no data set's address; give {HUB}<user>/<name>")
    for option, given, about in (
        ("--report", report, HUB),
        ("--samples", samples, HUB),
        ("--project", project != PROJECT, "a tracker"),
    ):
        if given and (about == HUB) == (target is None):
            raise UsageError(f"{option} is about {about if about != HUB else f'{HUB}<user>/<name>'}; leave it out")
    places = select(named)
    runs = [run for run in find_runs(places) if run.status in ("complete", "partial")]
    if not runs:
        raise DataMissing(f"no finished records in {said(places)}")
    if target is not None:
        to_hub(target, runs, places, report=report, samples=samples, send=yes)
    elif to is not None:
        to_tracker(to, project, runs, send=yes)
    if not yes:
        say("nothing was sent; --yes sends it", stream=sys.stderr)


def to_hub(
    target: str, runs: Sequence[RunRecord], places: Sequence[Path], *, report: bool, samples: bool, send: bool
) -> None:
    """Upload the records as one commit, and with `report` the page to a space."""
    name = target.removeprefix(HUB)
    with tempfile.TemporaryDirectory() as scratch:
        folder = _data_set(Path(scratch) / "records", name, runs, places, samples=samples)
        uploads = [("dataset", folder)]
        if report:
            from harness.publish.report import write

            page = write(list(places), Path(scratch) / "report").parent
            card = SPACE_CARD.format(title=name.rpartition("/")[2], name=name)
            (page / "README.md").write_text(card, encoding="utf-8")
            if not samples:
                _without_licensed(page, runs)
            uploads.append(("space", page))
        for kind, content in uploads:
            files = [path for path in content.rglob("*") if path.is_file()]
            say(f"{kind} {name}: {len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.1f} MB")
            if kind == "dataset":
                for line in _listed(content):
                    say(f"  {line}")
            if send:
                say(_upload(content, name, kind, len(runs)))


def licensed(run: RunRecord) -> bool:
    """Whether the samples quote data that is not ours to give away: any but the embedded synthetic users."""
    return "synthetic" not in run.config.data.description


def _data_set(folder: Path, name: str, runs: Sequence[RunRecord], places: Sequence[Path], *, samples: bool) -> Path:
    """The records as they lie on disk, and the leaderboard as the data set's card."""
    from harness.publish import leaderboard

    left_out = 0
    for run in runs:
        assert run.folder is not None
        target = folder.joinpath(*run.folder.resolve().parts[-3:])
        target.mkdir(parents=True)
        shutil.copyfile(run.folder / "run.json", target / "run.json")
        answers = run.folder / "samples.jsonl"
        if answers.is_file() and (samples or not licensed(run)):
            shutil.copyfile(answers, target / "samples.jsonl")
        else:
            left_out += answers.is_file()
    if left_out:
        say(
            f"{left_out} records go without their answers, which quote licensed data; --samples sends them",
            stream=sys.stderr,
        )
    card = DATA_CARD.format(title=name.rpartition("/")[2]) + leaderboard.render(list(places))
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


LISTED = 30
"""Records that are named one by one."""


def _listed(folder: Path) -> list[str]:
    """The files of a data set, a line a record."""
    held = sorted(path.parent for path in folder.rglob("run.json"))
    lines = [f"{one.relative_to(folder)}: {', '.join(sorted(f.name for f in one.iterdir()))}" for one in held]
    more = [f"... and {len(held) - LISTED} records more"] if len(held) > LISTED else []
    return ["README.md: the leaderboard", *lines[:LISTED], *more]


def _without_licensed(page: Path, runs: Sequence[RunRecord]) -> None:
    """Take answers, queries and histories of licensed data out of the report."""
    if any(licensed(run) for run in runs):
        for folder in ("samples", "items"):
            shutil.rmtree(page / "data" / folder, ignore_errors=True)


def _upload(folder: Path, name: str, kind: str, count: int) -> str:
    """Where it lies now. Raises HarnessError with the Hub's reason."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi()
    try:
        if kind == "space":
            api.create_repo(name, repo_type=kind, exist_ok=True, space_sdk="static")
        else:
            api.create_repo(name, repo_type=kind, exist_ok=True)
        done = api.upload_folder(
            folder_path=folder,
            repo_id=name,
            repo_type=kind,
            commit_message=f"{count} records of personalization-harness",
        )
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        raise HarnessError(f"the Hub refused {name}: {first_line(error)}; 'hf auth login' signs in") from error
    return str(done)


def to_tracker(to: Tracker, project: str, runs: Sequence[RunRecord], *, send: bool) -> None:
    """One run of the tracker a record: its configuration, metrics, health and cost. Raises UsageError where it is not installed."""
    try:
        tracker: Any = import_module(to)
    except ImportError as error:
        raise UsageError(f"{to} is not installed; 'pip install {to}' installs it") from error
    for run in runs:
        config = run.config
        name = f"{config.model.name}/{config.task.name}/{config.method.name}-{run.hash}"
        numbers = {key: metric.value for key, metric in run.metrics.items() if metric.value is not None}
        ends = {f"{key}/{end}": getattr(m, end) for key, m in run.metrics.items() for end in ("low", "high")}
        more = {f"cost/{key}": value for key, value in run.cost.model_dump().items() if value is not None}
        say(f"{to} {project}: {name}, {len(numbers)} metrics")
        if send:
            tracker.init(project=project, name=name, config=config.model_dump(mode="json"))
            tracker.log({**numbers, **{key: value for key, value in ends.items() if value is not None}, **more})
            tracker.finish()
