"""Contexts that other benchmarks bring as they are, and users to answer them for.

lm-eval hands its contexts over as strings. A conversation stays one until the method has spoken: it travels as JSON
behind a mark, and only the engine, after a history has gone into it, writes it out with the model's chat template.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

from harness.data import HistoryItem, Joint, Message, User
from harness.errors import DataMissing, UsageError
from harness.plugins.options import build_task
from harness.plugins.registry import task_class, task_name
from harness.task import Selection, Task

_MARK = "\x02conversation\x03"
MINI = "lamp-mini"
"""The embedded synthetic users."""


def written(turns: Sequence[Mapping[str, str]], *, open_turn: bool = True) -> str:
    """A conversation as text that `ContextTemplate` reads; without `open_turn` its last message is to be continued."""
    return _MARK + json.dumps({"turns": [[turn["role"], turn["content"]] for turn in turns], "open": open_turn})


@dataclass(frozen=True)
class ContextTemplate:
    """The context as it is, the user's history before it: in front of the text, or of the first user turn."""

    scored: bool = True
    """Whether continuations are scored, not generated."""

    def __call__(self, text: str, items: Sequence[HistoryItem], summary: str) -> Joint:
        before = "\n".join([*_about(summary), *_records(items)])
        if not text.startswith(_MARK):
            return Joint("\n\n".join(part for part in (before, text) if part), scored=self.scored)
        told = json.loads(text.removeprefix(_MARK))
        turns = [Message(role, content) for role, content in told["turns"]]
        if before:
            place = next((i for i, turn in enumerate(turns) if turn.role == "user"), 0)
            turns[place] = replace(turns[place], content=f"{before}\n\n{turns[place].content}")
        return Joint(tuple(turns), told["open"], self.scored)


def _about(summary: str) -> list[str]:
    return [f"About the person who asks: {summary}"] if summary else []


def _records(items: Sequence[HistoryItem]) -> list[str]:
    lines = ["- " + "; ".join(f"{name}: {value}" for name, value in item.fields.items()) for item in items]
    return ["Records of the person who asks:", *lines] if items else []


def query(context: str) -> str:
    """What a history is searched with: what stands behind the last blank line of the context, or of its last turn."""
    if context.startswith(_MARK):
        context = json.loads(context.removeprefix(_MARK))["turns"][-1][1]
    return context.rstrip().rpartition("\n\n")[2]


@dataclass(frozen=True)
class UserPool:
    """Users of a task, dealt to the questions of another by a seed, so that methods that need a user have one."""

    task: str = "lamp4"
    """`none` = everyone is a user without a history."""
    data: str = MINI
    """Folder of that task's files."""
    split: str = "dev"
    seed: int = 0

    def user(self, question: str) -> User:
        """Of the question with this id: the same whatever other questions are asked."""
        if self.task == "none":
            return User("none")
        users = _users(self.task, self.data, self.split)
        digest = hashlib.sha256(f"{self.seed}/{question}".encode()).digest()
        return users[int.from_bytes(digest[:8], "little") % len(users)]

    def fingerprint(self) -> str:
        """Hash of whoever may be dealt to whom."""
        content = "" if self.task == "none" else _task(self.task, self.data).fingerprint(Selection(self.split))
        return hashlib.sha256(f"{content} {self.seed}".encode()).hexdigest()

    def describe(self) -> str:
        return "no users" if self.task == "none" else f"users of {task_name(self.task)} ({self.data})"


@cache
def _task(name: str, data: str) -> Task:
    cls = task_class(name)
    if "users_from" in inspect.signature(cls).parameters:
        raise UsageError(f"users_from={name}: its users are borrowed too; name a task that has its own, as lamp4")
    return build_task(cls, task_name(name), [], data)[0]


@cache
def _users(name: str, data: str, split: str) -> tuple[User, ...]:
    items = _task(name, data).items(Selection(split))
    users = tuple({item.example.user.id: item.example.user for item in items}.values())
    if not any(user.history for user in users):
        raise DataMissing(f"users_from={name}: no user of split {split} has a history")
    return users
