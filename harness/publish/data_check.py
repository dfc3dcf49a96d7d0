"""`harness data check`: what a data set holds, before a model answers it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import median

from harness.data import Labelled
from harness.errors import DataMissing, UsageError
from harness.plugins.items import items_of
from harness.plugins.options import build_task, check_read
from harness.plugins.registry import task_class, task_name
from harness.plugins.returned import reviewed
from harness.run.leaks import leaks, said
from harness.statistics.paired_tests import FEWEST, smallest_effect
from harness.task import Selection, Task


def describe(what: str, data: str | None, settings: Sequence[str]) -> Iterator[str]:
    """Lines about a file of users, or a task. Raises HarnessError for data that cannot be read."""
    name = task_name(what)
    if data is not None:
        check_read(task_class(name), data)
    task, _ = build_task(task_class(name), name, settings, data)
    yield task.describe_data()
    found = False
    for split in ("train", "dev", "test"):
        try:
            items = items_of(task, Selection(split))
        except (DataMissing, UsageError):  # not every task has every split
            continue
        found = True
        if not items:
            yield f"{split}: no items"
            continue
        yield f"{split}: {', '.join(_facts(items))}"
        yield from (f"  {line}" for line in _warnings(task, items))
        if split != "train":
            yield f"  {_could_show(task, items)}"
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
    facts.append(f"{len(answers)} different answers")
    whole = sorted(sum(len(record.document) for record in user.history) for user in users.values())
    facts.append(
        f"about {median(whole) / CHARACTERS:.0f} tokens of history a user, {whole[-1] / CHARACTERS:.0f} at most"
    )
    return facts


CHARACTERS = 4
"""A token, of English text, as a rule of thumb; `--dry_run` counts a model's own."""


def _could_show(task: Task, items: Sequence[Labelled]) -> str:
    """The smallest difference that a paired test of as many users, or items, finds."""
    units = len({item.example.user.id if task.independent == "user" else item.example.id for item in items})
    if units < FEWEST:
        return f"{units} {task.independent}s are too few for a test to find any difference; {FEWEST} is the least"
    least = smallest_effect(units)
    return (
        f"{units} {task.independent}s show a difference of {least:.2f} standard deviations of their gains, or more (80 % power at "
        f"5 %): {least * math.sqrt(0.5):.2f} of accuracy between methods that disagree on half of the answers"
    )


def _warnings(task: Task, items: Sequence[Labelled]) -> Iterator[str]:
    given_away = said(leaks(task, items), len(items))
    if given_away:
        yield given_away
    yield from reviewed(task, task.caveats(items), "caveats")
    same = Counter((item.example.user.id, item.example.text, item.targets) for item in items)
    repeated = sum(count - 1 for count in same.values())
    if repeated:
        yield f"{repeated} items repeat another one of the same user, input and answer"
    without = sum(not item.example.user.history for item in items)
    twins = Counter(
        tuple(record.document for record in user.history)
        for user in {item.example.user.id: item.example.user for item in items}.values()
        if user.history
    )
    alike = sum(count for count in twins.values() if count > 1)
    if alike:
        yield f"{alike} users have the same history as another user: one person under several names counts several times"
    spelt = Counter(" ".join(name.split()).casefold() for name in {item.example.user.id for item in items})
    if len(spelt) < spelt.total():
        twice = next(name for name, count in spelt.items() if count > 1)
        yield f"names of users that differ in case or white space alone: {spelt.total() - len(spelt)}, first {twice!r}"
    if without:
        yield f"{without} items have no history, so that nothing can be personal about them"
