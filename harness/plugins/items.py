"""The items that a task gives, checked before anything reads them.

What lies in a tuple or list is looked at one by one, each user, record and pair once. Other sequences read a file when they are
looked at, as the histories of LaMP do: of these the kind alone is checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import get_args

from harness.data import Compared, Example, HistoryItem, Labelled, User, written_twice
from harness.errors import UsageError
from harness.plugins.returned import whose, wrong
from harness.task import Selection, Task


def items_of(task: Task, selection: Selection) -> Sequence[Labelled]:
    """What `Task.items` gives for a selection, which it must have kept to. Raises HarnessError where it has not."""
    items = task.items(selection)
    who = f"{whose(task)}: items"
    if not isinstance(items, Sequence) or isinstance(items, str | bytes):
        raise wrong(f"{who} returned", items, "a list of Labelled, as selection.of(...) gives")
    seen: set[int] = set()
    for item in items:
        _check_item(who, item, seen)
    users = dict.fromkeys(item.example.user.id for item in items)
    if twice := written_twice(users):
        raise UsageError(
            f"{who} gave users {twice[0]!r} and {twice[1]!r}, one but for how it is written; write a user one way"
        )
    held_out = [user for user in users if user in selection.exclude_users]
    kept_to = "; it keeps to the selection where it returns selection.of(all items of the split)"
    if selection.limit is not None and len(items) > selection.limit:
        raise UsageError(f"{who} gave {len(items)} items for --limit {selection.limit}{kept_to}")
    if selection.users is not None and len(users) > selection.users:
        raise UsageError(f"{who} gave items of {len(users)} users for --users {selection.users}{kept_to}")
    if held_out:
        raise UsageError(f"{who} gave items of user {held_out[0]!r}, who is held out for fitting{kept_to}")
    return items


def _check_item(who: str, item: object, seen: set[int]) -> None:
    """`seen` are the ids of the histories, records and pairs that were looked at, which all live as long as the items."""
    where = _check_asked(who, item)
    assert isinstance(item, Labelled)
    user = item.example.user
    history, pairs = user.history, user.pairs
    if not isinstance(history, Sequence) or isinstance(history, str):
        raise wrong(f"{where}: its user's history is", history, "a tuple of HistoryItem")
    for record in _not_seen(history, seen):
        _check_record(f"{where}: its user's history", record)
    if not isinstance(pairs, Sequence) or isinstance(pairs, str):
        raise wrong(f"{where}: its user's pairs are", pairs, "a tuple of Labelled")
    for pair in _not_seen(pairs, seen):
        _check_asked(f"{where}: its user's pairs", pair)


def _not_seen(values: Sequence[object], seen: set[int]) -> Iterator[object]:
    """What lies in a tuple or list and was not looked at yet."""
    if isinstance(values, tuple | list) and id(values) not in seen:
        for value in (values, *values):
            if id(value) not in seen:
                seen.add(id(value))
                if value is not values:
                    yield value


def _check_asked(who: str, item: object) -> str:
    """All of an item but what its user's history and pairs hold; which item it is, for a message."""
    if not isinstance(item, Labelled):
        raise wrong(f"{who} hold", item, "Labelled(example, targets) alone")
    example = item.example
    if not isinstance(example, Example) or not isinstance(example.user, User):
        raise wrong(f"{who}: example or its user is", example, "an Example with a User")
    for name, value in (("id", example.id), ("user id", example.user.id)):
        if not isinstance(value, str) or not value:
            raise wrong(f"{who}: {name} of example {example.id!r} is", value, "a text that names it")
    where = f"{who}: example {example.id!r}"
    for name, value in (("text", example.text), ("query", example.query)):
        if not isinstance(value, str):
            raise wrong(f"{where}: {name} is", value, "a text")
    for name, values in (("targets", item.targets), ("choices", example.choices), ("labels", example.labels)):
        if not isinstance(values, tuple | list) or not all(isinstance(value, str) for value in values):
            raise wrong(f"{where}: {name} is", values, "a tuple of texts, as in ('gold answer',)")
    if example.compared not in get_args(Compared):
        raise wrong(f"{where}: compared is", example.compared, " or ".join(map(repr, get_args(Compared))))
    if not callable(example.template):
        raise wrong(f"{where}: template is", example.template, "a Template, called with text, items and summary")
    return where


def _check_record(who: str, record: object) -> None:
    if not isinstance(record, HistoryItem):
        raise wrong(f"{who} holds", record, "a tuple of HistoryItem")
    where = f"{who}: item {record.id!r}"
    for name, text in (("id", record.id), ("document", record.document)):
        if not isinstance(text, str):
            raise wrong(f"{where}: {name} is", text, "a text")
    if record.date is not None and not isinstance(record.date, str):
        raise wrong(f"{where}: date is", record.date, "a text as in '2014-07-31', or None where there is none")
    fields = record.fields
    if not isinstance(fields, Mapping) or not all(isinstance(part, str) for pair in fields.items() for part in pair):
        raise wrong(f"{where}: fields is", fields, "a dict of texts by name, as in {'text': 'what was written'}")
