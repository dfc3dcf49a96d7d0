"""`harness score`: a record's saved responses judged and graded again. Nothing is generated.

With the record's own judge the ratings that failed are asked for again, in place. With another judge, or a first one, the
responses are copied to a record of their own, since the judge is part of what a number means.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness.errors import HarnessError, UsageError
from harness.judge.grading import check_targets, judge_samples, settle
from harness.judge.judges import LOCAL, Judge, open_judge
from harness.plugins.options import rebuild_task, takes_data
from harness.plugins.registry import MODELS, task_class, task_source
from harness.plugins.returned import described, fingerprint_of, graded
from harness.records import provenance
from harness.records.schema import JudgeConfig, RunRecord
from harness.records.store import Outcome, RunFolder, folder_of, read_record, read_samples
from harness.run.console import Console
from harness.servers.address import with_credentials
from harness.task import Selection, Task


def score(
    folder: Path,
    judge: str | None = None,
    base_url: str | None = None,
    settings: Sequence[str] = (),
    *,
    data: str | None = None,
    console: Console | None = None,
) -> Outcome:
    """Judge the record in `folder` (by its own judge where none is named), grade it, and write its metrics.

    Raises UsageError where it was not answered to the end, or by another version of the task, or over other data.
    """
    console, record = console or Console(), read_record(folder)
    task = task_of(record, data)
    answered = {sample.id for sample in read_samples(folder)}
    if not record.batches or not answered.issuperset(i for batch in record.batches for i in batch):
        raise UsageError(f"{folder} was not answered to the end; the same 'harness run' command goes on with it")
    asked = _judge(record, task, judge, base_url, settings)
    if asked is not None:
        why_not = asked.check()
        if why_not:
            console.say(f"warning: the judge does not answer: {why_not}")
    config = record.config.model_copy(update={"judge": asked.config}) if asked is not None else record.config
    root = folder.resolve().parents[2]
    if folder_of(root, record.config) != folder.resolve():
        raise UsageError(f"{folder} is not where its configuration says; move it to {folder_of(root, record.config)}")
    with RunFolder.open(root, config) as target:
        if target.path != folder.resolve():
            record = _copied(record, target, folder, config.hash8())
        record.config = config
        _score(task, target, record, asked, console)
        return Outcome(record, target.path, 3 if record.status == "partial" else 0)


def task_of(record: RunRecord, data: str | None) -> Task:
    """The task that made the record. Raises UsageError where it is of another version now, or its file or data are others;
    HarnessError where it grades with data that cannot be read."""
    config = record.config.task
    task = rebuild_task(task_class(config.name), config.options, data)
    if task.version != config.version:
        raise UsageError(
            f"{record.folder} was made by version {config.version} of {config.name}, and this is version "
            f"{task.version}; run it again"
        )
    if task_source(config.name) != config.options.get("source_sha256"):
        raise UsageError(f"{record.folder}: {config.name} has changed since; run it again, or put the file back")
    _check_data(record, task, data)
    return task


def _check_data(record: RunRecord, task: Task, data: str | None) -> None:
    """Raises UsageError where the data at hand is not what was answered."""
    config, read_from = record.config, takes_data(type(task))
    if read_from and data is None and not task.grades_with_data:
        return  # which folder was read no record says, and samples hold all that is graded
    chosen, held_out = config.selection, frozenset(record.held_out_users)
    try:
        found = fingerprint_of(task, Selection(config.data.split, chosen.limit, chosen.users, held_out))
    except (HarnessError, OSError):
        if task.grades_with_data:
            raise
        return
    if found == config.data.fingerprint:
        return
    if read_from:
        raise UsageError(f"{record.folder} read other data ({config.data.description}); give its folder as --data")
    named = [config.task.name.partition(":")[2], *map(str, config.task.options.values())]
    files = " or ".join(name for name in named if Path(name).is_file()) or "its data"
    raise UsageError(
        f"{record.folder}: {files} has changed since (then {config.data.description}; now {described(task)}); run it again, or "
        "put the file back"
    )


def _judge(
    record: RunRecord, task: Task, name: str | None, base_url: str | None, settings: Sequence[str]
) -> Judge | None:
    own = record.config.judge
    if not task.judged:
        if name is not None:
            raise UsageError(f"{record.config.task.name} asks no judge; leave --judge out to grade its responses again")
        return None
    if name is None and own is not None:
        _check_found(own)
        kept = [f"mode={own.options['mode']}"] if "mode" in own.options else []
        return open_judge(own.name, base_url or with_credentials(own.base_url), [*kept, *settings], asks=task.asks)
    return open_judge(name, base_url, settings, asks=task.asks) if name is not None else None


def _check_found(judge: JudgeConfig) -> None:
    """Raises UsageError for a model of a folder, of which a record keeps the name and not where it lies."""
    model = judge.name.removeprefix(LOCAL)
    if judge.name.startswith(LOCAL) and model not in MODELS and "/" not in model and not Path(model).exists():
        raise UsageError(
            f"the record says of its judge that it is {model} and not where it lies; give --judge {LOCAL}FOLDER"
        )


def _copied(record: RunRecord, target: RunFolder, source: Path, hash8: str) -> RunRecord:
    """The source's record and responses for `target`, with the ratings that are there already."""
    there, rated = target.record(), {sample.id: sample.ratings for sample in target.samples()}
    samples = read_samples(source)
    for sample in samples:
        sample.ratings = rated.get(sample.id, {})
    target.keep(samples)
    changed = {
        "hash": hash8,
        "judging": there.judging if there else None,
        "notes": [*record.notes, f"responses of {record.hash}"],
    }
    return record.model_copy(update=changed, deep=True)


def _score(task: Task, folder: RunFolder, record: RunRecord, judge: Judge | None, console: Console) -> None:
    """Fill the record, whatever happens, as a run does."""
    check_targets(folder.samples(), folder.path / "samples.jsonl")
    record.status, record.error, record.started = "running", None, record.started or provenance.now()
    folder.write(record)
    try:
        judge_samples(task, folder, record, judge, console.progress)
        if not task.judged:
            folder.keep([graded(task, sample) for sample in folder.samples()])
        settle(task, folder.samples(), record)
    except BaseException as error:
        record.status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        record.error = None if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
        folder.write(record)
        raise
    record.finished = provenance.now()
    folder.write(record)
