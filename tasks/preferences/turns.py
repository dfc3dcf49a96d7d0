"""A conversation as a history: one record an exchange, shown as the turns they were, oldest first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from harness.data import HistoryItem, Message
from harness.errors import DataMissing

Role: TypeAlias = Literal["system", "user", "assistant"]
ROLES: Mapping[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class Conversation:
    """The chosen exchanges in the order they took place, then the question as the last turn of the user.

    Whatever order a retriever gives them, they are shown in their own. A summary of the user is a system turn, as `system` is.
    """

    system: str = ""
    turns_only: bool = False
    """Whether system turns are written into the turn behind them, `[System]: ...`, and turns of one role are joined."""

    def __call__(self, text: str, items: Sequence[HistoryItem], summary: str) -> tuple[Message, ...]:
        first = [Message("system", said) for said in (self.system, summary) if said]
        told = [turn for item in sorted(items, key=_place) for turn in _turns(item)]
        turns = [*first, *told, Message("user", text)]
        return tuple(_joined(turns)) if self.turns_only else tuple(turns)


def exchanges(turns: Iterable[tuple[str, str]], where: str) -> tuple[HistoryItem, ...]:
    """Records of the turns (role, content): each begins with a user's turn, and a system turn is one by itself.

    A record's date is its place, so that `recency` takes the latest ones. Raises DataMissing for a role there is not.
    """
    groups: list[list[tuple[str, str]]] = []
    for role, content in turns:
        if role not in ROLES:
            raise DataMissing(f"{where}: role {role!r} is none of {', '.join(ROLES)}")
        if role == "assistant" and groups and groups[-1][0][0] != "system":
            groups[-1].append((role, content))
        else:
            groups.append([(role, content)])
    return tuple(
        HistoryItem(
            str(place),
            {f"{number} {role}": content for number, (role, content) in enumerate(group)},
            "\n".join(content for _, content in group),
            str(place),
        )
        for place, group in enumerate(groups, start=1)
    )


def _turns(item: HistoryItem) -> list[Message]:
    return [Message(ROLES[name.partition(" ")[2]], content) for name, content in item.fields.items()]


def _place(item: HistoryItem) -> int:
    return int(item.id)


def _joined(turns: Iterable[Message]) -> list[Message]:
    found: list[Message] = []
    waiting = ""
    for turn in turns:
        if turn.role == "system":
            waiting += f"[System]: {turn.content}\n"
            continue
        content, waiting = waiting + turn.content, ""
        if found and found[-1].role == turn.role:
            found[-1] = Message(turn.role, f"{found[-1].content}\n{content}")
        else:
            found.append(Message(turn.role, content))
    return found
