"""Controls: the same items with another history, so that what a history gives can be told from what any text gives.

Personalization gain = a method with the user's own history minus the same method with somebody else's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Literal, NoReturn, overload

from harness.data import HistoryItem, Labelled, User
from harness.errors import UsageError

Control = Literal["none", "wrong_user", "shuffled"]


def controlled(items: Sequence[Labelled], control: Control, seed: int) -> Sequence[Labelled]:
    """The items with their users' histories changed: `wrong_user` gives everyone the history of another user of the
    selection, `shuffled` puts the own history in another order. Users keep their ids; who has no history is given none, and is
    still not the owner of what was learnt elsewhere under their id. Where a user's history grows from item to item, an item is
    given the other's as it was when it was as long, or nearly. Raises UsageError for one user.

    A shuffled history has no (input, output) pairs: whoever reads them raises UsageError, since what is learnt from a set of
    pairs does not depend on their order, and the control would be the run it is to be compared with.
    """
    if control == "none":
        return items
    if control == "shuffled":  # each item's own history: another item's of the same user may hold the answer
        own = {id(item.example.user): item.example.user for item in items}
        orders = {name: _shuffled(user, seed) for name, user in own.items()}
        return [replace(item, example=replace(item.example, user=orders[id(item.example.user)])) for item in items]
    histories_of: dict[str, dict[int, User]] = {}
    for item in items:
        histories_of.setdefault(item.example.user.id, {})[len(item.example.user.history)] = item.example.user
    longest = [histories[max(histories)] for histories in histories_of.values()]
    giver_of = _exchanged([user for user in longest if user.history], seed)
    givers, without = list(giver_of), [user.id for user in longest if not user.history]
    giver_of |= {user: givers[n % len(givers)] for n, user in enumerate(without)}
    given = {
        (user, size): _given(user, size, giver_of[user], histories_of[giver_of[user]])
        for user, histories in histories_of.items()
        for size in histories
    }
    return [
        replace(item, example=replace(item.example, user=given[item.example.user.id, len(item.example.user.history)]))
        for item in items
    ]


def _given(user: str, size: int, giver: str, histories: Mapping[int, User]) -> GivenUser:
    """In place of a history of that size the giver's of the nearest, which has an item at least; in place of none, none."""
    if not size:
        return GivenUser(user, giver=giver)
    other = histories[min(filter(None, histories), key=lambda theirs: (abs(theirs - size), theirs))]
    return GivenUser(user, other.history, other.pairs, other.owner)


def _exchanged(users: Sequence[User], seed: int) -> dict[str, str]:
    """User -> who gives theirs: in a seeded circle the next, or where that history is one like their own, the next who has another.

    Raises UsageError where there is no circle in which everyone gets another.
    """
    if len(users) < 2:
        raise UsageError("--control wrong_user needs two users with a history; this selection has fewer")
    circle = list(users)
    Random(f"wrong_user/{seed}").shuffle(circle)
    givers = [*circle[1:], circle[0]]
    if any(map(_alike, circle, givers)):
        groups: list[list[User]] = []
        for user in circle:
            group = next((group for group in groups if _alike(group[0], user)), None)
            if group is None:
                groups.append([user])
            else:
                group.append(user)
        most = max(map(len, groups))  # the circle group by group: that many places on nobody is in their own
        if 2 * most > len(circle):
            raise UsageError(
                f"--control wrong_user needs another history for everyone, and {most} of {len(circle)} users have the same one"
            )
        circle = [user for group in groups for user in group]
        givers = [*circle[most:], *circle[:most]]
    return {user.id: other.id for user, other in zip(circle, givers, strict=True)}


def _alike(one: User, other: User) -> bool:
    """Whether their histories say the same, under whatever ids."""
    return len(one.history) == len(other.history) and all(
        a is b or _said(a) == _said(b) for a, b in zip(one.history, other.history, strict=True)
    )


def _said(item: HistoryItem) -> dict[str, str]:
    return {name: value for name, value in item.fields.items() if name != "id"}


def _shuffled(user: User, seed: int) -> User:
    order = list(user.history)
    Random(f"shuffled/{seed}/{user.id}").shuffle(order)
    return ShuffledUser(user.id, tuple(order), NoPairs())


class NoPairs(Sequence[Labelled]):
    """The pairs of a shuffled history: not to be read."""

    def __len__(self) -> int:
        self._refuse()

    @overload
    def __getitem__(self, index: int) -> Labelled: ...
    @overload
    def __getitem__(self, index: slice) -> list[Labelled]: ...
    def __getitem__(self, index: int | slice) -> Labelled | list[Labelled]:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise UsageError(
            "--control shuffled puts a history in another order, and this method learns from its (input, output) pairs, whatever "
            "their order, so the control would change nothing; give --control wrong_user"
        )


@dataclass(frozen=True)
class GivenUser(User):
    """A user with the history of another, whose adapter is read with it also where the history makes no pairs."""

    giver: str = ""

    @property
    def owner(self) -> str:
        return self.giver


@dataclass(frozen=True)
class ShuffledUser(User):
    """A user whose own history is in another order."""

    @property
    def owner(self) -> str:
        return self.id
