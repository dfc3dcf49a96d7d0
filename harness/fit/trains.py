"""Bases of the methods that train, and what a plan holds of a trained adapter (see `harness.training`)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from harness.data import Example, Labelled, Prompt, User, each_once
from harness.engine.weights.adapters import adapter_identity as adapter_identity
from harness.errors import HarnessError, UsageError, UserFailed
from harness.fit.writer import Summaries, as_recorded
from harness.method import Fitted, Kit, Method, Retrieval, Written
from harness.plan import Edit, LoRA, Stream
from harness.plugins.options import Count, Finite
from harness.training import PEFT_A, Adapter, Learner, Lesson, Recipe, Shifts, peft_name

if TYPE_CHECKING:
    from torch import Tensor


def lora(state: Fitted) -> LoRA:
    """What a stream holds, from a trained or loaded state; its tensors are named as PEFT names them."""
    names = [found[1] for name in state.tensors if (found := re.fullmatch(PEFT_A, name))]
    pairs = {name: (state.tensors[peft_name(name, "A")], state.tensors[peft_name(name, "B")]) for name in names}
    scale = state.meta["scale"]
    return LoRA(f"{state.meta['key']} x {scale}", pairs, scale)  # rows of one key run as one


@dataclass(frozen=True)
class Trains(Recipe, Method):
    """Base of the methods that train: the recipe as options."""

    retrieval: Retrieval = Retrieval(k=0)

    def collective(self, kit: Kit, train: Sequence[Labelled]) -> Learner:
        """All users of the train split as one learner, who learns from their questions."""
        return Learner("all users", [Lesson(Stream(self.retrieval.prompt(i.example)), i.reference) for i in train])

    def analysis(self, shared: Fitted | None, personal: Mapping[str, Fitted]) -> Mapping[str, Any]:
        """What training did: parameters, lessons, and the mean loss in the first and the last epoch, nats per token."""
        made = {"collective": [shared] if shared else [], "personal": list(personal.values())}
        return {name: _training(states) for name, states in made.items() if any(state.tensors for state in states)}

    def recipe(self, epochs: int | None = None, lr: float | None = None) -> Recipe:
        own = Recipe(**{field.name: getattr(self, field.name) for field in fields(Recipe)})
        return replace(own, epochs=own.epochs if epochs is None else epochs, lr=own.lr if lr is None else lr)


@dataclass(frozen=True)
class TrainsUsers(Trains):
    """Base of the methods that train for each user: a history as lessons."""

    items: int | None = None
    """Newest history items a user learns from; None = all."""
    profile: str | None = None
    """Who writes a summary of each user's history, which stands before their prompts in training too: `self`, a model, or
    `openai/<model>` (see `harness.fit.writer`); None = nobody. As published it is of the whole history, lessons included."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.profile is not None:
            Summaries(self.profile)
        if self.items is not None and self.items < 1:
            raise UsageError(f"items {self.items} leaves nothing to learn from; allowed: items >= 1")

    def options(self) -> dict[str, Any]:
        """As ever, but a writer in a folder by name and content."""
        return {**super().options(), "profile": as_recorded(self.profile) if self.profile else None}

    def prompt(self, example: Example, personal: Fitted | None) -> Prompt:
        """The context's, after the user's summary where there is one."""
        return self.retrieval.prompt(example, personal.meta.get("summary", "") if personal else "")

    def collective(self, kit: Kit, train: Sequence[Labelled]) -> Learner:
        """As ever, each question after its user's summary, which of several histories is of the shortest, as that of evaluated
        users is; without users whom nobody could write one of."""
        written = self.summaries(kit, each_once(item.example.user for item in train))
        failed = {user for user, text in written.items() if isinstance(text, UserFailed)}
        if failed:
            kit.notes.append(f"{len(failed)} train users left out: no profile of them could be written")
        lessons = [
            Lesson(Stream(self.retrieval.prompt(i.example, _text(written.get(i.example.user.id)))), i.reference)
            for i in train
            if i.example.user.id not in failed
        ]
        return Learner("all users", lessons)

    def personal(
        self,
        kit: Kit,
        users: Sequence[User],
        part: Shifts | Adapter | None,
        edits: tuple[Edit, ...] = (),
        adapters: tuple[LoRA, ...] = (),
        trained: Mapping[str, Tensor] | None = None,
    ) -> list[Fitted | UserFailed]:
        """`part` trained for each user, with their summary in `meta`; the summary alone where `part` is None."""
        written = self.summaries(kit, users)
        states: Sequence[Fitted | UserFailed] = [Fitted()] * len(users)
        if part is not None:
            states = kit.train(self.learners(users, edits, adapters, trained, written), [part], self.recipe())
        return self.with_summaries(users, states, written)

    def with_summaries(
        self, users: Sequence[User], states: Sequence[Fitted | UserFailed], written: Mapping[str, Written | UserFailed]
    ) -> list[Fitted | UserFailed]:
        """The states with their users' summaries; a summary that could not be written stands in its user's place."""
        found: list[Fitted | UserFailed] = []
        for user, state in zip(users, states, strict=True):
            text = written.get(user.id)
            if isinstance(state, Fitted) and isinstance(text, Written):
                cost = {name: state.cost.get(name, 0) + text.cost.get(name, 0) for name in {*state.cost, *text.cost}}
                state = replace(state, meta={**state.meta, "summary": text.text}, cost=cost)
            found.append(text if isinstance(text, UserFailed) else state)
        return found

    def summaries(self, kit: Kit, users: Sequence[User]) -> Mapping[str, Written | UserFailed]:
        """By user; of nobody where no profile is asked for."""
        return Summaries(self.profile).write(kit, users) if self.profile else {}

    def learners(
        self,
        users: Sequence[User],
        edits: tuple[Edit, ...] = (),
        adapters: tuple[LoRA, ...] = (),
        trained: Mapping[str, Tensor] | None = None,
        written: Mapping[str, Written | UserFailed] = {},
    ) -> list[Learner]:
        """One a user, who learns from the history's own (input, output) pairs under what is frozen.

        A pair's user has the earlier items alone, so what is retrieved into its prompt is never later than it. A learner is
        named after whose pairs they are: under `--control wrong_user` another user's adapter is just that.
        """
        newest = slice(-self.items, None) if self.items else slice(None)
        return [
            Learner(
                user.owner,
                [
                    Lesson(
                        Stream(self.retrieval.prompt(pair.example, _text(written.get(user.id))), edits, adapters),
                        pair.targets[0],
                    )
                    for pair in user.pairs[newest]
                ],
                trained,
            )
            for user in users
        ]


@dataclass(frozen=True)
class TrainsTwice(TrainsUsers):
    """Base of the methods with two stages: an adapter that all users share, and one of each user's own on top of it."""

    collective_epochs: int = 3
    collective_lr: float | None = None
    """Of the collective stage, which takes a hundred times the steps; None = lr, as published."""
    targets: str = "q_proj,k_proj,v_proj"
    """Linear modules of the collective adapter, by the ends of their names."""
    personal_targets: str = "q_proj,v_proj"
    rank: Count = 8
    alpha: Finite = 8.0
    """An adapter's output is scaled by alpha / rank."""
    adapter: str | None = None
    """A PEFT folder to use as the collective adapter."""
    adapters: str | None = None
    """A folder of PEFT folders named by user id, to use as personal adapters."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("collective_epochs", "collective_lr"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise UsageError(f"{name} {value} is not valid; allowed: {name} >= 0")

    def options(self) -> dict[str, Any]:
        """As ever, but folders by name and content, which decide the numbers and are the same everywhere."""
        folders = {"adapter": self.adapter, "adapters": self.adapters}
        named = {name: adapter_identity(folder) if folder else None for name, folder in folders.items()}
        return {**super().options(), **named}

    def needs_train(self) -> bool:
        return self.adapter is None

    def personal_only(self) -> frozenset[str]:
        return frozenset({"epochs", "items", "personal_targets", "adapters"})

    def fit(self, kit: Kit, train: Sequence[Labelled]) -> Fitted:
        """Stage 1: the collective adapter."""
        if self.adapter is not None:
            return kit.read_adapter(self.adapter)
        part = Adapter.of(self.targets, self.rank, self.alpha)
        (state,) = kit.train(
            [self.collective(kit, train)], [part], self.recipe(self.collective_epochs, self.collective_lr)
        )
        if isinstance(state, UserFailed):
            raise HarnessError(str(state))
        return state

    def adapt(self, kit: Kit, users: Sequence[User], shared: Fitted | None) -> list[Fitted | UserFailed]:
        """Stage 2: the user's adapter; no tensors where the task makes no pairs of the history."""
        if self.adapters is not None:
            return self.with_summaries(users, kit.read_adapters(self.adapters, users), self.summaries(kit, users))
        part = Adapter.of(self.personal_targets, self.rank, self.alpha)
        return self.personal(kit, users, part, adapters=(self.of_all(shared),))

    def of_all(self, shared: Fitted | None) -> LoRA:
        """The collective adapter. Raises HarnessError where there is none."""
        if shared is None or not shared.tensors:
            name = type(self).__name__.lower()
            raise HarnessError(f"{name}: no collective adapter was trained; run 'harness fit --method {name}' first")
        return lora(shared)


def _text(written: Written | UserFailed | None) -> str:
    return written.text if isinstance(written, Written) else ""


def _training(states: Sequence[Fitted]) -> dict[str, Any]:
    """Sizes of one state, means over those that were trained here."""
    trained = [state for state in states if state.meta.get("losses")]
    of = {"parameters": next(state.meta["parameters"] for state in states if state.tensors)}
    if not trained:
        return of
    values = {
        "lessons": [state.meta["lessons"] for state in trained],
        "steps": [state.meta["steps"] for state in trained],
        "first_epoch_loss": [state.meta["losses"][0] for state in trained],
        "last_epoch_loss": [state.meta["losses"][-1] for state in trained],
    }
    return {**of, "trained": len(trained), **{name: sum(own) / len(own) for name, own in values.items()}}
