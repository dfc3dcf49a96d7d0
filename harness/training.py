"""What a method that trains says: what is learnt from, what is trained, and how. `harness.engine.train` does it.

    Lesson    a prompt under what stays frozen, and the answer whose tokens are the loss
    Learner   a user with their lessons, or all users taken as one
    Shifts    LoReFT's low-rank shifts of the residual stream, at some blocks and positions
    Adapter   LoRA on some linear modules
    Recipe    epochs, batches, AdamW; the options of every method that trains

Learners share no parameters, so any number of them train as rows of one batch. What is trained comes back as `Fitted`
tensors, and `Shifts.edits` and `lora` turn those into what a plan holds.

Papers: Wu et al., ReFT: Representation Finetuning for Language Models, 2024; Hu et al., LoRA, 2021. Defaults are those of
PerFit (harness/methods/perfit.py) and OPPU: AdamW 1e-4, decay 0.01, clipping at norm 0.3, batches of 16.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, Self

from harness.data import Example, Labelled, Prompt, User
from harness.edits import LowRankShift
from harness.errors import UsageError, UserFailed
from harness.fit.summaries import Summaries
from harness.fit.writer import Written
from harness.method import Context, Fitted, Method
from harness.plan import ALL, LAST_PROMPT, Edit, FirstLast, LoRA, Site, Stream, Where

if TYPE_CHECKING:
    from torch import Tensor

    from harness.fit.kit import Kit

Start = Literal["identity", "random"]
"""`identity` changes nothing before the first step; `random` is pyreft's start, a change of relative size sqrt(4 r / 3 D)."""


@dataclass(frozen=True)
class Lesson:
    """One example to learn from. The stream's own edits and adapters are there while training, and stay as they are."""

    stream: Stream
    answer: str


@dataclass(frozen=True)
class Learner:
    """Who gets parameters of their own: a user, or all users as one."""

    name: str
    """Said in errors; with the seed it decides the order of the lessons and the first values."""
    lessons: Sequence[Lesson]
    trained: Mapping[str, Tensor] | None = None
    """Tensors to go on from, as an earlier training gave them."""


@dataclass(frozen=True)
class Shifts:
    """x + R^T (W x + b - R x) with R, W [rank, D], b [rank], one at each layer and each of `wheres`, on block outputs.

    R keeps orthonormal rows. Trainable parameters: (2 D + 1) * rank for each.
    """

    name: str
    layers: tuple[int, ...]
    rank: int
    wheres: tuple[Where, ...] = (ALL,)
    start: Start = "identity"

    @property
    def places(self) -> list[tuple[Site, Where]]:
        """Site and positions of each shift; places is the first axis [S] of the tensors."""
        return [(Site(layer, "block_out"), where) for layer in self.layers for where in self.wheres]

    def edits(self, tensors: Mapping[str, Tensor]) -> tuple[LowRankShift, ...]:
        """What a stream holds, from `<name>.rotation` and `<name>.weight` [S, rank, D] and `<name>.bias` [S, rank]."""
        rotation, weight, bias = (tensors[f"{self.name}.{part}"] for part in ("rotation", "weight", "bias"))
        return tuple(
            LowRankShift(site, rotation[i], weight[i], bias[i], where) for i, (site, where) in enumerate(self.places)
        )


@dataclass(frozen=True)
class Adapter:
    """y + alpha / rank * B A x on every module whose name ends in one of `targets`; A [rank, in], B [out, rank]."""

    targets: tuple[str, ...]
    rank: int = 8
    alpha: float = 8.0

    @classmethod
    def of(cls, targets: str, rank: int, alpha: float) -> Self:
        """With targets as an option has them: `q_proj,v_proj`."""
        return cls(tuple(filter(None, (target.strip() for target in targets.split(",")))), rank, alpha)


def lora(state: Fitted) -> LoRA:
    """What a stream holds, from a trained or loaded state; its tensors are named as PEFT names them."""
    names = [found[1] for name in state.tensors if (found := re.fullmatch(PEFT_A, name))]
    pairs = {name: (state.tensors[peft_name(name, "A")], state.tensors[peft_name(name, "B")]) for name in names}
    scale = state.meta["scale"]
    return LoRA(f"{state.meta['key']} x {scale}", pairs, scale)  # rows of one key run as one


PEFT_A = r"base_model\.model\.(.+)\.lora_A\.weight"


def peft_name(module: str, part: Literal["A", "B"]) -> str:
    """The name of a LoRA matrix in PEFT's files, and in ours."""
    return f"base_model.model.{module}.lora_{part}.weight"


@dataclass(frozen=True)
class Recipe:
    """How to train. Each learner takes the same steps with the same numbers as if alone."""

    epochs: int = 2
    batch_size: int = 16
    """Lessons of one user a step."""
    lr: float = 1e-4
    """Of AdamW, betas 0.9 and 0.999; biases and R are not decayed (decay would take R out of its manifold)."""
    weight_decay: float = 1e-2
    clip: float = 0.3
    """Largest norm of a user's gradient, over all their parameters; 0 is no limit."""
    schedule: Literal["linear", "constant"] = "linear"
    """After the warm-up the learning rate falls towards 0, or stays."""
    warmup: float = 0.1
    """Share of a user's steps in which it rises from 0."""

    def __post_init__(self) -> None:
        for name, least in (
            ("epochs", 0),
            ("batch_size", 1),
            ("lr", 0),
            ("weight_decay", 0),
            ("clip", 0),
            ("warmup", 0),
        ):
            value = getattr(self, name)
            if not value >= least or value == float("inf"):
                raise UsageError(f"{name} {value} is not valid; allowed: {name} >= {least}")

    def rates(self, steps: int) -> list[float]:
        """The learning rate of each of a user's steps. The first is not 0, as a schedule counted from 0 has it."""
        rising = round(self.warmup * steps)
        falling = max(1, steps - rising)
        return [
            self.lr
            * ((n + 1) / (rising + 1) if n < rising else 1 - (n - rising) / falling if self.schedule == "linear" else 1)
            for n in range(steps)
        ]


@dataclass(frozen=True)
class Trains(Recipe, Method):
    """Base of the methods that train: the recipe as options."""

    context: Context = Context(k=0)

    def collective(self, kit: Kit, train: Sequence[Labelled]) -> Learner:
        """All users of the train split as one learner, who learns from their questions."""
        return Learner("all users", [Lesson(Stream(self.context.prompt(i.example)), i.reference) for i in train])

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
    `openai/<model>` (see `harness.fit.summaries`); None = nobody. As published it is of the whole history, lessons included."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.profile is not None:
            Summaries(self.profile)
        if self.items is not None and self.items < 1:
            raise UsageError(f"items {self.items} leaves nothing to learn from; allowed: items >= 1")

    def prompt(self, example: Example, personal: Fitted | None) -> Prompt:
        """The context's, after the user's summary where there is one."""
        return self.context.prompt(example, personal.meta.get("summary", "") if personal else "")

    def collective(self, kit: Kit, train: Sequence[Labelled]) -> Learner:
        """As ever, each question after its user's summary; without users whom nobody could write one of."""
        written = self.summaries(kit, list({item.example.user.id: item.example.user for item in train}.values()))
        failed = {user for user, text in written.items() if isinstance(text, UserFailed)}
        if failed:
            kit.notes.append(f"{len(failed)} train users left out: no profile of them could be written")
        lessons = [
            Lesson(Stream(self.context.prompt(i.example, _text(written.get(i.example.user.id)))), i.reference)
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
                        Stream(self.context.prompt(pair.example, _text(written.get(user.id))), edits, adapters),
                        pair.targets[0],
                    )
                    for pair in user.pairs[newest]
                ],
                trained,
            )
            for user in users
        ]


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


def positions(text: str, *, shared: bool = True) -> tuple[Where, ...]:
    """`all`, `last` (of the prompt) or ReFT's `f7+l7`, `f7`, `l7`; separate weights for first and last unless `shared`."""
    if text == "all":
        return (ALL,)
    if text == "last":
        return (LAST_PROMPT,)
    found = re.fullmatch(r"f(?P<first>\d+)(\+l(?P<last>\d+))?|l(?P<only>\d+)", text)
    first, last = (int(found["first"] or 0), int(found["last"] or found["only"] or 0)) if found else (0, 0)
    if not first and not last:
        raise UsageError(f"positions={text} is not valid; allowed: all, last, or as in f7+l7 (first 7 and last 7)")
    if shared or not first or not last:
        return (FirstLast(first, last),)
    return FirstLast(first, 0), FirstLast(0, last)


def middle(layers: int) -> tuple[int, ...]:
    """The block or two in the middle of a model of `layers` blocks."""
    return tuple(sorted({max(0, (layers - 1) // 2), layers // 2}))
