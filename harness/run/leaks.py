"""Histories that hold the answer: items whose user's history has the gold answer, and train items that are evaluated too.

A property of the data, not of a method: of LaMP's dev users some have the article that is asked about in their history, with
its headline. A run counts such items and names them, and `--exclude_leaks` leaves them out.

    question   a history item has the question itself, with the gold answer
    answer     a history item has the gold answer word for word
    near       the same but for case, punctuation and white space, which ROUGE does not see

Where answers come from a short list (labels, ratings, choices), holding one gives nothing away: there only `question` counts.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Literal, TypeAlias

from harness.data import HistoryItem, Joint, Labelled
from harness.errors import UsageError
from harness.task import Task

Leak: TypeAlias = Literal["question", "answer", "near"]
KINDS: Mapping[Leak, str] = {
    "question": "the question too",
    "answer": "the answer word for word",
    "near": "it but for case and punctuation",
}
_WORD = re.compile(r"[^\W_]+")
_LEAST = 3
"""Words below which a text in a history is not the question."""
_SHARE = 0.5
"""Of the evaluated items: from here on a train split that has their questions and answers is the evaluated one."""


def leak_of(item: Labelled, *, closed: bool) -> Leak | None:
    """How the item's history holds its answer; None where it does not. `closed`: answers come from a short list."""
    example = item.example
    exactly = {target.strip() for target in item.targets if target.strip()}
    golds = [_Words(target) for target in exactly]
    asked = [words for words in map(_Words, dict.fromkeys((example.query, example.text))) if len(words.all) >= _LEAST]
    closed = closed or bool(example.choices)
    found: set[Leak] = set()
    for record in example.user.history if golds else ():
        values = [str(value) for value in record.fields.values()]
        exact = any(value.strip() in exactly for value in values)
        near = not exact and any(gold.are_of(value) for value in values for gold in golds)
        if (exact or near) and any(question.are_of(value) for value in values for question in asked):
            return "question"
        if not closed and (exact or near):
            found.add("answer" if exact else "near")
    return "answer" if "answer" in found else "near" if found else None


def leaks(task: Task, items: Iterable[Labelled]) -> dict[str, Leak]:
    """By the id of an item, those whose history holds the answer."""
    found = {item.example.id: leak_of(item, closed=task.closed) for item in items}
    return {name: leak for name, leak in found.items() if leak is not None}


def without_leaks(task: Task, items: Sequence[Labelled]) -> list[Labelled]:
    """The items whose history does not hold the answer."""
    found = leaks(task, items)
    return [item for item in items if item.example.id not in found]


def unlike_histories(items: Sequence[Labelled], *, read: bool = True) -> dict[str, list[Labelled]]:
    """By user, the items whose history lacks some of the shortest of that user's, each with that shortest one.

    What is learnt of a user is learnt from the shortest, which elsewhere holds nothing that an item does not have before it.
    Without `read` histories that lie in a file are left alone.
    """
    by_user: dict[str, list[Labelled]] = {}
    for item in items:
        by_user.setdefault(item.example.user.id, []).append(item)
    found: dict[str, list[Labelled]] = {}
    for name, own in by_user.items():
        histories = [item.example.user.history for item in own]
        if len(own) < 2 or not (read or all(isinstance(history, tuple | list) for history in histories)):
            continue
        user = min((item.example.user for item in own), key=lambda one: len(one.history))
        unlike = [item for item in own if not _holds(item.example.user.history, user.history)]
        if unlike:
            found[name] = [replace(item, example=replace(item.example, user=user)) for item in unlike]
    return found


def _holds(history: Sequence[HistoryItem], part: Sequence[HistoryItem]) -> bool:
    """Whether every item of `part` is in the history, under whatever id."""
    if history is part or all(one is other for one, other in zip(part, history, strict=False)):
        return True
    there = Counter(tuple(sorted(item.fields.items())) for item in history)
    return Counter(tuple(sorted(item.fields.items())) for item in part) <= there


class _Words:
    """The words of a text, in any case; to find other texts with the same ones among many."""

    def __init__(self, text: str) -> None:
        self.all = [found[0].casefold() for found in _WORD.finditer(_composed(text))]

    def are_of(self, other: str) -> bool:
        """Looks at no more of the text than it has to: most differ in the first word."""
        theirs = (found[0].casefold() for found in _WORD.finditer(_composed(other)))
        return bool(self.all) and all(a == b for a, b in zip_longest(self.all, theirs))


def _composed(text: str) -> str:
    """Letters with their accents as one character, wide ones as plain ones: texts that look alike are alike."""
    return text if text.isascii() else unicodedata.normalize("NFKC", text)


def check_apart(
    task: Task, evaluated: Sequence[Labelled], fitted_on: Sequence[Labelled], *, same_task: bool
) -> list[str]:
    """Notes on what the evaluated items share with those that are fitted on.

    Raises UsageError where an item is among both: the same prompt under the same id, the same prompt and answer of the same
    user, or the same prompts and answers, whoever's, of half of the evaluated items.
    """
    by_id = {(item.example.id, _prompt(item)) for item in fitted_on} if same_task else set()
    by_user = {(item.example.user.id, _prompt(item), item.targets) for item in fitted_on}
    by_text = {_plainly(item) for item in fitted_on}
    prompts = [_prompt(item) for item in evaluated]
    same = [
        item.example.id
        for item, prompt in zip(evaluated, prompts, strict=True)
        if (item.example.id, prompt) in by_id or (item.example.user.id, prompt, item.targets) in by_user
    ]
    alike = sum(_plainly(item) in by_text for item in evaluated)
    if same or (evaluated and alike >= _SHARE * len(evaluated) and alike > 1):
        what = (
            f"{len(same)} of {len(evaluated)} evaluated items, first {same[0]!r}, are also fitted on"
            if same
            else f"{alike} of {len(evaluated)} evaluated items have the prompt and answer of an item that is fitted on"
        )
        raise UsageError(
            f"{task.name}: {what}, so the number would be of what was learnt by heart; fit on other items: a train split of its "
            "own, --fit_split SPLIT:SHARE as in dev:0.2, or --fit_task"
        )
    return [f"{alike} of {len(evaluated)} evaluated items have the prompt and answer of a train item"] if alike else []


def _prompt(item: Labelled) -> bytes:
    """Of the item's prompt without history."""
    return hashlib.sha256(repr(item.example.prompt().render()).encode(errors="surrogatepass")).digest()


def _plainly(item: Labelled) -> tuple[bytes, frozenset[str]]:
    """Its prompt and answers, but for case and white space."""
    rendered = item.example.prompt().render()
    content = rendered.content if isinstance(rendered, Joint) else rendered
    text = content if isinstance(content, str) else "\n".join(f"{turn.role}: {turn.content}" for turn in content)
    digest = hashlib.sha256(_loosely(text).encode(errors="surrogatepass")).digest()
    return digest, frozenset(map(_loosely, item.targets))


def _loosely(text: str) -> str:
    return " ".join(_composed(text).casefold().split())


def said(found: Mapping[str, str], total: int) -> str:
    """One line for the user; empty where nothing leaks."""
    if not found:
        return ""
    counts = [(kind, list(found.values()).count(kind)) for kind in KINDS]
    parts = ", ".join(f"{count} {KINDS[kind]}" for kind, count in counts if count)
    some = ", ".join(list(found)[:5]) + (", ..." if len(found) > 5 else "")
    return f"{len(found)} of {total} histories hold the answer ({parts}): {some}; --exclude_leaks leaves them out"
