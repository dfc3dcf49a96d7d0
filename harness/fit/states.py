"""Fitted state, shared and personal: found in the artifact store by what it is made from, or made and kept there."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from harness.data import Labelled, User, each_once
from harness.errors import UsageError, UserFailed
from harness.fit.artifacts import ArtifactStore
from harness.method import Fitted, Method
from harness.plugins.returned import adapted, fitted, reviewed
from harness.task import Task

if TYPE_CHECKING:
    from harness.engine.model import LanguageModel
    from harness.fit.kit import ModelKit

USERS_AT_ONCE, OF_A_LARGE_MODEL, LARGE = 64, 8, 10**9
"""Users of one `adapt` call, which is what a killed run loses: few where a user takes a minute, as from `LARGE` weights on."""


class Console(Protocol):
    """Who is told how it goes."""

    def say(self, line: str) -> None: ...
    def progress(self, label: str, done: int, total: int) -> None: ...


class FitData(Protocol):
    """Which items a method fits on."""

    @property
    def task_name(self) -> str: ...
    @property
    def task(self) -> Task: ...
    @property
    def task_options(self) -> Mapping[str, Any]: ...
    @property
    def split(self) -> str | None: ...
    @property
    def fingerprint(self) -> str | None: ...
    @property
    def held_out(self) -> frozenset[str]: ...
    def items(self) -> Sequence[Labelled]: ...


class Settings(Protocol):
    @property
    def seed(self) -> int: ...


class Cell(Protocol):
    """What fitting reads of a method on a task (`harness.run.cell.Cell`)."""

    @property
    def method_name(self) -> str: ...
    @property
    def method_source(self) -> str | None: ...
    @property
    def method(self) -> Method: ...
    @property
    def task_name(self) -> str: ...
    @property
    def task(self) -> Task: ...
    @property
    def task_options(self) -> Mapping[str, Any]: ...
    @property
    def settings(self) -> Settings: ...
    @property
    def max_new_tokens(self) -> int: ...
    @property
    def fit_max_new_tokens(self) -> int: ...
    @property
    def items(self) -> Sequence[Labelled]: ...
    @property
    def fit_data(self) -> FitData: ...


@dataclass(frozen=True)
class Shared:
    """What `fit` learnt; empty for a method without."""

    state: Fitted | None = None
    key: str | None = None
    noted: Sequence[str] = ()
    """Warnings from when no state was made that could keep them."""


@dataclass(frozen=True)
class Personal:
    """What `adapt` learnt of each user; empty for a method without."""

    states: Mapping[str, Fitted | UserFailed | None] = field(default_factory=dict)
    stored_bytes: int = 0
    noted: Sequence[str] = ()
    """Warnings from when no state was made that could keep them."""

    def fitted(self) -> dict[str, Fitted]:
        """By user, those that there are."""
        return {user: state for user, state in self.states.items() if isinstance(state, Fitted)}

    def notes(self) -> list[str]:
        """What was noted of users, each with how many it is true of."""
        counts = Counter(note for state in self.fitted().values() for note in state.notes)
        of_states = [f"{count} of {len(self.states)} users: {note}" for note, count in counts.items()]
        return [*of_states, *dict.fromkeys(self.noted)]


def shared_key(lm: LanguageModel, cell: Cell) -> str:
    """The key of what `fit` makes: a hash of everything it reads."""
    return ArtifactStore.key(_shared_from(lm, cell))


def shared_state(lm: LanguageModel, cell: Cell, store: ArtifactStore, console: Console) -> Shared:
    """What the method learns once. Raises UsageError or DataMissing where there is nothing to fit on."""
    if not cell.method.fits():
        return Shared()
    made_from = _shared_from(lm, cell)
    key = store.key(made_from)
    state = store.get(key)
    if state is None:
        with store.alone(key):
            state = store.get(key)
            if state is None:
                return _fit(lm, cell, store, console, made_from, key)
    console.say(f"{cell.method_name}: reusing the fitted state {key}")
    return Shared(state, key)


def _fit(
    lm: LanguageModel, cell: Cell, store: ArtifactStore, console: Console, made_from: Mapping[str, Any], key: str
) -> Shared:
    """What the method learns, kept under the key of `made_from`."""
    items = cell.fit_data.items()
    start = time.perf_counter()
    kit = _kit(lm, cell, store, console, cell.fit_max_new_tokens)
    ungrouped = {k: v for k, v in made_from["options"].items() if k not in cell.method.grouping}
    kit.checkpoint = checkpoint = store.checkpoint(store.key({**made_from, "options": ungrouped}))
    state = fitted(cell.method, cell.method.fit(kit, items))
    if state is not None:
        seconds = time.perf_counter() - start + checkpoint.restored_seconds
        state = _noted(_timed(state, seconds), kit)
        state = store.put(key, state, made_from)
    if not cell.method.grouping:
        checkpoint.remove()
    return Shared(state, key, () if state else tuple(kit.notes))


def personal_states(lm: LanguageModel, cell: Cell, shared: Shared, store: ArtifactStore, console: Console) -> Personal:
    """One state a user, kept one artifact a user, made for many users a call.

    Where a user's questions have different histories, of the shortest: nothing in it is later than one of the questions.
    """
    if not cell.method.adapts():
        return Personal()
    users = Users.of(lm, cell, shared.key)
    with store.alone(users.key):
        states: dict[str, Fitted | UserFailed | None] = {}
        for first in users.starts(lm):
            states |= users.adapt(first, lm, cell, shared, store, console)
    return users.personal(states, store)


class Users:
    """The users of a cell, and under which keys the states lie that are learnt of them."""

    def __init__(self, users: Sequence[User], made_from: Mapping[str, Mapping[str, Any]]) -> None:
        self.users, self.made_from = users, made_from
        self.keys = {name: ArtifactStore.key(content) for name, content in made_from.items()}
        self.noted: list[str] = []

    @classmethod
    def of(cls, lm: LanguageModel, cell: Cell, shared_key: str | None) -> Users:
        users = _users(cell)
        return cls(users, _personal_from(lm, cell, shared_key, users))

    @property
    def key(self) -> str:
        """Of all of them."""
        return ArtifactStore.key({"users": sorted(self.keys.values())})

    def starts(self, lm: LanguageModel) -> range:
        """The first user of each `adapt` call; the last bits of a state depend on the users it was made with."""
        return range(0, len(self.users), USERS_AT_ONCE if lm.parameters < LARGE else OF_A_LARGE_MODEL)

    def adapt(
        self,
        first: int,
        lm: LanguageModel,
        cell: Cell,
        shared: Shared,
        store: ArtifactStore,
        console: Console,
    ) -> dict[str, Fitted | UserFailed | None]:
        """By user of the call that begins with user `first`: found, or made and kept, all anew where one is missing."""
        part = self.users[first : first + self.starts(lm).step]
        states: dict[str, Fitted | UserFailed | None] = {user.id: store.get(self.keys[user.id]) for user in part}
        if any(state is None for state in states.values()):
            console.progress("adapting users", first, len(self.users))
            start = time.perf_counter()
            kit = _kit(lm, cell, store, console, cell.max_new_tokens)
            found = adapted(cell.method, cell.method.adapt(kit, part, shared.state), part)
            seconds = (time.perf_counter() - start) / len(part)
            for user, state in zip(part, found, strict=True):
                if isinstance(state, Fitted):
                    state = _noted(_timed(state, seconds), kit)
                    state = store.put(self.keys[user.id], state, self.made_from[user.id])
                states[user.id] = state
            if not any(isinstance(state, Fitted) for state in found):
                self.noted += kit.notes
        if first + len(part) == len(self.users):
            console.progress("adapting users", len(self.users), len(self.users))
        return states

    def personal(self, states: Mapping[str, Fitted | UserFailed | None], store: ArtifactStore) -> Personal:
        stored = sum(store.size(self.keys[name]) for name, state in states.items() if isinstance(state, Fitted))
        return Personal(states, stored, tuple(self.noted))


def stored_state(
    lm: LanguageModel, cell: Cell, shared_key: str | None, user: str, store: ArtifactStore
) -> Fitted | None:
    """What an earlier run learnt of the user; None where none did."""
    made_from = _personal_from(lm, cell, shared_key, [one for one in _users(cell) if one.id == user])
    return store.get(store.key(made_from[user]))


def _users(cell: Cell) -> list[User]:
    """Each user of the evaluated items once, with the shortest of their histories."""
    return each_once(item.example.user for item in cell.items)


def _personal_from(
    lm: LanguageModel, cell: Cell, shared_key: str | None, users: Sequence[User]
) -> dict[str, dict[str, Any]]:
    """By user, what a state is made from."""
    settings = _common(lm, cell) | {"shared": shared_key, "task": [cell.task_name, cell.task.version]}
    if (source := cell.task_options.get("source_sha256")) is not None:
        settings["task_source"] = source
    by_name = cell.task.asked_by_name
    return {user.id: settings | {"history": _digest(user)} | ({} if by_name else _asked(user)) for user in users}


def _asked(user: User) -> dict[str, str]:
    """What tells prompts apart that ask about the same history in other words: how its last pair is asked, with an item of history
    and a summary, and without."""
    with suppress(UsageError):  # the pairs of a shuffled history are not to be read, and nothing is learnt from them
        if user.pairs:
            pair = user.pairs[-1]
            prompts = pair.example.prompt(), pair.example.prompt(tuple(user.history[:1]), "summary")
            content = [*(repr(prompt.render()) for prompt in prompts), pair.targets]
            return {"asked": ArtifactStore.key({"asked": content})}
    return {}


def _digest(user: User) -> dict[str, Any]:
    """What tells a history apart, also from another user's of the same items: its owner decides the order of lessons and
    which adapter is read. Not its texts: what is stored of a user need not hold their words."""
    history = [[record.id, dict(record.fields), record.date] for record in user.history]
    content = {"owner": user.owner, "history": history}
    return {"items": len(user.history), "sha": ArtifactStore.key(content)}


def warnings_of(method: Method, shared: Shared) -> list[str]:
    """What a reader must know of the state. Raises HarnessError where it is of no use to the method."""
    if not method.fits():
        return []
    return [*(shared.state.notes if shared.state else shared.noted), *reviewed(method, method.review(shared.state))]


def _kit(lm: LanguageModel, cell: Cell, store: ArtifactStore, console: Console, max_new_tokens: int) -> ModelKit:
    from harness.fit.kit import ModelKit

    judged = cell.fit_data.task.to_judge
    return ModelKit(lm, cell.settings.seed, max_new_tokens, console.progress, store, to_judge=judged)


def _noted(state: Fitted, kit: ModelKit) -> Fitted:
    """With what was noted while it was made: of users, those made together."""
    return replace(state, notes=(*state.notes, *kit.notes))


def _timed(state: Fitted, seconds: float) -> Fitted:
    """With the seconds it took, where the method does not say itself."""
    return replace(state, cost={"seconds": seconds, **state.cost})


def _common(lm: LanguageModel, cell: Cell) -> dict[str, Any]:
    method = cell.method.decided(lm.heads)
    unread = frozenset(method.decode_only) - method.fit_reads()
    return {
        "artifact_version": 1,
        "model": [lm.name, lm.revision, lm.dtype],
        "method": [cell.method_name, cell.method_source, type(method).__qualname__],
        "options": {k: v for k, v in method.identity().items() if k not in unread},
        "seed": cell.settings.seed,
        "max_new_tokens": cell.max_new_tokens,
    }


def _shared_from(lm: LanguageModel, cell: Cell) -> dict[str, Any]:
    fit = cell.fit_data
    options = {k: v for k, v in fit.task_options.items() if k not in fit.task.train_ignores}
    common = _common(lm, cell)
    common["options"] = {k: v for k, v in common["options"].items() if k not in cell.method.personal_only()}
    return common | {
        "task": [fit.task_name, fit.task.version, options],
        "fit": [fit.split, fit.fingerprint, sorted(fit.held_out)],
        "max_new_tokens": cell.fit_max_new_tokens,
    }
