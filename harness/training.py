"""What a method that trains says: what is learnt from, what is trained, and how. `harness.engine.training.train` does it.

    Lesson    a prompt under what stays frozen, and the answer whose tokens are the loss
    Learner   a user with their lessons, or all users taken as one
    Shifts    LoReFT's low-rank shifts of the residual stream, at some blocks and positions
    Adapter   LoRA on some linear modules
    Recipe    epochs, batches, AdamW; the options of every method that trains

Learners share no parameters, so any number of them train as rows of one batch. What is trained comes back as `Fitted`
tensors, and `Shifts.edits` and `harness.fit.trains.lora` turn those into what a plan holds. Bases of methods that train are
there too.

Papers: Wu et al., ReFT: Representation Finetuning for Language Models, 2024; Hu et al., LoRA, 2021. Defaults are those of
PerFit (harness/methods/perfit.py) and OPPU: AdamW 1e-4, decay 0.01, clipping at norm 0.3, batches of 16.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self, get_args

from harness.edits import LowRankShift
from harness.errors import UsageError
from harness.plan import ALL, LAST_PROMPT, FirstLast, Site, Stream, Where

if TYPE_CHECKING:
    from torch import Tensor

Start = Literal["identity", "random"]
"""`identity` changes nothing before the first step; `random` is pyreft's start, a change of relative size sqrt(4 r / 3 D)."""
Schedule = Literal["linear", "constant"]


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

    def __post_init__(self) -> None:
        _check_word("start", self.start, get_args(Start))

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
    schedule: Schedule = "linear"
    """After the warm-up the learning rate falls towards 0, or stays."""
    warmup: float = 0.1
    """Share of a user's steps in which it rises from 0."""

    def __post_init__(self) -> None:
        _check_word("schedule", self.schedule, get_args(Schedule))
        for name, least, most in (
            ("epochs", 0, 100_000),
            ("batch_size", 1, None),
            ("lr", 0, None),
            ("weight_decay", 0, None),
            ("clip", 0, None),
            ("warmup", 0, 1),
        ):
            value = getattr(self, name)
            if not value >= least or value == float("inf") or (most is not None and value > most):
                allowed = f"{name} >= {least}" if most is None else f"{name} from {least} to {most}"
                raise UsageError(f"{name} {value} is not valid; allowed: {allowed}")

    def rates(self, steps: int) -> list[float]:
        """The learning rate of each of a user's steps. The first is not 0, as a schedule counted from 0 has it."""
        rising = round(self.warmup * steps)
        falling = max(1, steps - rising)
        return [
            self.lr
            * ((n + 1) / (rising + 1) if n < rising else 1 - (n - rising) / falling if self.schedule == "linear" else 1)
            for n in range(steps)
        ]


def _check_word(name: str, word: str, allowed: Sequence[str]) -> None:
    if word not in allowed:
        raise UsageError(f"{name} {word!r} is not valid; allowed: {', '.join(allowed)}")


def positions(text: str, *, shared: bool = True) -> tuple[Where, ...]:
    """`all`, `last` (of the prompt) or ReFT's `f7+l7`, `f7`, `l7`; separate weights for first and last unless `shared`."""
    if text == "all":
        return (ALL,)
    if text == "last":
        return (LAST_PROMPT,)
    found = re.fullmatch(r"f(?P<first>[0-9]{1,9})(\+l(?P<last>[0-9]{1,9}))?|l(?P<only>[0-9]{1,9})", text)
    first, last = (int(found["first"] or 0), int(found["last"] or found["only"] or 0)) if found else (0, 0)
    if not first and not last:
        raise UsageError(f"positions={text} is not valid; allowed: all, last, or as in f7+l7 (first 7 and last 7)")
    if shared or not first or not last:
        return (FirstLast(first, last),)
    return FirstLast(first, 0), FirstLast(0, last)


def middle(layers: int) -> tuple[int, ...]:
    """The block or two in the middle of a model of `layers` blocks."""
    return tuple(sorted({max(0, (layers - 1) // 2), layers // 2}))
