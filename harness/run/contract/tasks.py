"""The contract of a task: `harness check ./mine.py` asserts it on a small random model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from harness.data import Labelled
from harness.errors import DataMissing, UsageError
from harness.plugins.items import items_of
from harness.plugins.registry import method_class
from harness.plugins.returned import (
    described,
    fingerprint_of,
    generation_of,
    graded,
    metrics_of,
    reviewed,
    samples_of,
)
from harness.run.contract.toys import broken, random_lm
from harness.run.leaks import check_apart, unlike_histories
from harness.run.system import ModelSystem
from harness.task import Generation, Sample, Selection, Task


def check_task(
    task: Task, *, say: Callable[[str], None] = lambda _: None, skip: Callable[[str], None] = lambda _: None
) -> None:
    """Raises HarnessError at the first promise `task` does not keep; `say` and `skip` as in `check_method`."""
    split = task.default_split
    items = items_of(task, Selection(split))
    if not items:
        raise broken("there is something to evaluate", f"split {split!r} has no items")
    users = list(dict.fromkeys(item.example.user.id for item in items))
    say(f"its items are what they should be: {len(items)} of {len(users)} users in split {split}")
    narrowed: list[dict[str, Any]] = [{"limit": 1}, {"users": 1}, {"exclude_users": frozenset(users[:1])}]
    for kept in narrowed:
        items_of(task, Selection(split, **kept))
    say("it keeps to --limit, --users and the users held out")
    if fingerprint_of(task, Selection(split)) != fingerprint_of(task, Selection(split)):
        raise broken("a fingerprint names the data", "the same selection has another one each time")
    reviewed(task, task.caveats(items), "caveats")
    say(f"its data has a name: {described(task)}")
    unlike = unlike_histories(items)
    if unlike:
        say(
            f"but {len(unlike)} users, first {next(iter(unlike))!r}, have items under histories of which none is in all others"
        )
    try:
        train = items_of(task, Selection("train"))
    except (DataMissing, UsageError) as error:
        skip(f"whether train and evaluated items are apart: {' '.join(str(error).split())[:80]}")
    else:
        check_apart(task, items, train, same_task=True)
        say("no item is evaluated and fitted on")
    asked = items[:4]
    answered = _answers(task, asked)
    say("each item is answered once")
    poisoned = _answers(task, [dataclasses.replace(item, targets=("POISON",)) for item in asked])
    if [(s.prompt_hash, s.response) for s in answered] != [(s.prompt_hash, s.response) for s in poisoned]:
        raise broken("no gold leaks", "answers change with the targets of their items")
    say("no gold leaks: other targets, the same prompts and answers")
    done = [graded(task, sample) for sample in answered]
    if done != [graded(task, sample) for sample in done]:
        raise broken("a sample can be graded again", "its numbers change when it is")
    failed = Sample(asked[0].example.id, asked[0].example.user.id, targets=asked[0].targets, error="failed")
    if graded(task, failed).metrics:
        raise broken("a failed sample is no score", f"it got {graded(task, failed).metrics}")
    say("grading twice is grading once, and a failed sample has no numbers")
    say(f"its metrics: {', '.join(metrics_of(task, [*done, failed]))}")


def _answers(task: Task, items: Sequence[Labelled]) -> list[Sample]:
    """In the order of `items`, by a small random model as it is."""
    lm, generation = random_lm(max_position_embeddings=4096), Generation(4, generation_of(task).stop)
    system = ModelSystem(lm, method_class("plain")(), generation)
    batches = samples_of(task, task.respond(system, items), items, system.batching.planned)
    by_id = {sample.id: sample for batch in batches for sample in batch}
    return [by_id[item.example.id] for item in items]
