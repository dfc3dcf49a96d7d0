"""What the runs of a task answered: queries, references, and an excerpt of each user's history.

A record keeps answers and references, not the queries and histories; these are read again from the task's data, where it is
the data that the runs read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.data import Example, Labelled
from harness.errors import DataMissing, HarnessError
from harness.plugins.options import rebuild_task, takes_data
from harness.plugins.registry import task_class
from harness.plugins.retrieve import retrieve
from harness.records.schema import RunRecord, hash_of
from harness.run.control import Control, controlled
from harness.run.leaks import without_leaks
from harness.run.lm_eval.contexts import MINI
from harness.task import Sample, Selection, Task

EXCERPT = 3
"""History items shown with a query, those nearest to it by BM25."""
_WORDS = 60
"""Of each field of a history item."""
_LETTERS = 4000
"""Of a query."""


def key(run: RunRecord) -> str:
    """What the page calls a run: `tiny/lamp4/dps-1a2b3c4d`."""
    assert run.folder is not None
    return "/".join(run.folder.resolve().parts[-3:])


@dataclass(frozen=True)
class Group:
    """Runs that answered items of one data set, so that their answers can stand side by side."""

    name: str
    """Of its file."""
    runs: tuple[RunRecord, ...]
    keys: tuple[str, ...]
    samples: Mapping[str, Sequence[Sample]]
    """By the run's key; runs whose samples were not kept have none."""

    def targets(self) -> dict[str, dict[str, Any]]:
        """All that the samples themselves tell of the items."""
        every = (sample for run in self.keys for sample in self.samples[run])
        return {s.id: {"user": s.user, "targets": s.targets} for s in every}


def groups(runs: Sequence[RunRecord], samples: Mapping[str, Sequence[Sample]]) -> list[Group]:
    """By task, its options and its data, in path order; those whose samples are at hand."""
    found: dict[str, list[RunRecord]] = {}
    for run in runs:
        if samples[key(run)]:
            found.setdefault(_group(run), []).append(run)
    return [Group(name, tuple(members), tuple(key(run) for run in members), samples) for name, members in found.items()]


def _group(run: RunRecord) -> str:
    config = run.config
    content = {"options": config.task.options, "split": config.data.split, "data": config.data.fingerprint}
    return f"{re.sub(r'[^a-z0-9]', '_', config.task.name.lower())}-{hash_of(content)}"


def read_items(group: Group, data: Sequence[str] = ()) -> dict[str, Any]:
    """By id: user, query, references, the history's size, and by control the excerpt of the history that was given.

    Raises HarnessError where the data is not to be had.
    """
    task, texts = _task(group.runs[0], data), group.targets()
    histories: dict[Control, dict[str, Example]] = {}
    for run in group.runs:
        control = run.config.selection.control
        if control not in histories:
            given = _evaluated(task, run)
            histories[control] = {item.example.id: item.example for item in given if item.example.id in texts}
    for control, examples in histories.items():
        for id, example in examples.items():
            texts[id] |= {"query": example.text[:_LETTERS]}
            if example.user.history:
                texts[id].setdefault("history", {})[control] = _excerpt(example)
                texts[id].setdefault("history_size", {})[control] = len(example.user.history)
    return {"items": texts}


def histories(group: Group, run: RunRecord, data: Sequence[str] = ()) -> dict[str, list[str]]:
    """By user, the texts of their history, for users who have one. Raises HarnessError where the data is not to be had."""
    found: dict[str, list[str]] = {}
    for item in _evaluated(_task(run, data), run):
        documents = [record.document for record in item.example.user.history]
        if len(documents) > len(found.get(item.example.user.id, ())):
            found[item.example.user.id] = documents
    return found


def _evaluated(task: Task, run: RunRecord) -> Sequence[Labelled]:
    """The items of a run, with the histories it gave."""
    asked, items = run.config.selection, task.items(_selection(run))
    kept = without_leaks(task, items) if asked.exclude_leaks else items
    return controlled(kept, asked.control, run.config.sampling.seed)


def _selection(run: RunRecord) -> Selection:
    asked = run.config.selection
    return Selection(run.config.data.split, asked.limit, asked.users, frozenset(run.held_out_users))


def _task(run: RunRecord, data: Sequence[str]) -> Task:
    """The run's task over the data the run read: one of the folders given, the one of $HARNESS_DATA, or the embedded one."""
    config = run.config
    cls = task_class(config.task.name)
    missing: HarnessError = DataMissing(
        f"the data is not at hand ({config.data.description}); give its folder as --data"
    )
    for place in (*data, None, MINI) if takes_data(cls) else (None,):
        try:
            task = rebuild_task(cls, config.task.options, place)
            if task.fingerprint(_selection(run)) == config.data.fingerprint:
                return task
        except DataMissing:  # not there; another place may be
            continue
        except HarnessError as error:  # of the task, wherever its data is
            missing = error
    raise missing


def reads_folder(run: RunRecord) -> bool:
    """Whether the run's task reads a folder of files; False too of a task that this version does not have."""
    try:
        return takes_data(task_class(run.config.task.name))
    except HarnessError:
        return False


def _excerpt(example: Example) -> list[list[list[str]]]:
    """The items nearest to the query as [name, text] of their fields, best first."""
    items = retrieve("bm25", example, EXCERPT)
    return [[[name, _cut(text)] for name, text in item.fields.items() if text] for item in items]


def _cut(text: str) -> str:
    words = text.split()
    return " ".join(words) if len(words) <= _WORDS else " ".join(words[:_WORDS]) + " ..."
