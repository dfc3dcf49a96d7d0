"""`harness data check`: what a data set holds, before a model answers it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import median

from harness.data import Labelled
from harness.errors import DataMissing, UsageError
from harness.plugins.options import build_task
from harness.plugins.registry import task_class, task_name
from harness.plugins.returned import items_of
from harness.run.leaks import leaks, said
from harness.task import Selection, Task

FILES = (".jsonl", ".json", ".csv", ".parquet")


def describe(what: str, data: str | None, settings: Sequence[str]) -> Iterator[str]:
    """Lines about a file of users, or a task. Raises HarnessError for data that cannot be read."""
    name = task_name(f"users:{what}" if what.endswith(FILES) and ":" not in what else what)
    task, _ = build_task(task_class(name), name, settings, data)
    yield task.describe_data()
    found = False
    for split in ("train", "dev", "test"):
        try:
            items = items_of(task, Selection(split))
        except (DataMissing, UsageError):  # not every task has every split
            continue
        found = True
        yield f"{split}: {', '.join(_facts(items))}"
        yield from (f"  {line}" for line in _warnings(task, items))
    if not found:
        items_of(task, Selection())  # says what is missing


def _facts(items: Sequence[Labelled]) -> list[str]:
    users = {item.example.user.id: item.example.user for item in items}
    lengths = sorted(len(item.example.user.history) for item in items)
    answers = Counter(target for item in items for target in item.targets)
    facts = [f"{len(items)} items of {len(users)} users"]
    facts.append(f"histories of {lengths[0]} to {lengths[-1]} items (median {median(lengths):g})")
    words = sorted(len(item.example.text.split()) for item in items)
    facts.append(f"inputs of {words[0]} to {words[-1]} words (median {median(words):g})")
    return [*facts, f"{len(answers)} different answers"]


def _warnings(task: Task, items: Sequence[Labelled]) -> Iterator[str]:
    given_away = said(leaks(task, items), len(items))
    if given_away:
        yield given_away
    same = Counter((item.example.user.id, item.example.text, item.targets) for item in items)
    repeated = sum(count - 1 for count in same.values())
    if repeated:
        yield f"{repeated} items repeat another one of the same user, input and answer"
    without = sum(not item.example.user.history for item in items)
    if without:
        yield f"{without} items have no history, so that nothing can be personal about them"
