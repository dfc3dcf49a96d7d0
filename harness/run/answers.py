"""What a System asks and what comes of it: requests, choices, and what a method changes."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeAlias

import numpy as np

from harness.data import Example
from harness.engine.encoder import CutPrompt
from harness.errors import UsageError
from harness.plan import Draws, Generated, Plan, Scored
from harness.plugins.returned import chosen_of

if TYPE_CHECKING:
    from harness.engine.rows import Request

RULED_OUT = (
    "the method gives every choice probability 0, so none is the most likely; rule no token out (dola: relative_top=0)"
)


@dataclass(frozen=True)
class Difference:
    """One response under a method and under its base."""

    kl_nats: float
    """Sum over its tokens."""
    changed: int
    tokens: int
    identical: bool


@dataclass(frozen=True)
class Effect:
    """What a method changes against the unedited model, teacher-forced on its own responses."""

    samples: int
    kl_nats: float
    """Mean over response tokens of KL(method || base)."""
    changed_tokens: float
    """Share of response positions whose most likely token differs."""
    identical: float
    """Share of responses the base gives word for word."""

    @classmethod
    def of(cls, found: Sequence[Difference]) -> Self:
        tokens = sum(one.tokens for one in found)
        return cls(
            samples=len(found),
            kl_nats=max(0.0, sum(one.kl_nats for one in found) / tokens),
            changed_tokens=sum(one.changed for one in found) / tokens,
            identical=sum(one.identical for one in found) / len(found),
        )

    def nothing(self, dtype: str) -> bool:
        """Whether all of it is rounding of that type, as in "float32"."""
        noise = {"float64": 1e-14, "float32": 1e-9}.get(dtype, 1e-5)
        return self.kl_nats <= noise and self.changed_tokens == 0 and self.identical == 1


@dataclass(frozen=True)
class Chosen:
    """The choices of an example, scored."""

    scores: tuple[Scored, ...]

    @property
    def logprobs(self) -> list[float]:
        """Of each choice, in nats: the sum over its tokens."""
        return [sum(score.logprobs) for score in self.scores]

    def best(self, example: Example) -> int:
        """The most likely choice of the example, the first of equals."""
        found = self.logprobs
        if example.compared != "sum":
            lengths = [len(choice) - choice.startswith(" ") for choice in example.choices]
            if example.compared == "token":
                lengths = [len(score.logprobs) for score in self.scores]
            found = [logprob / max(1, length) for logprob, length in zip(found, lengths, strict=True)]
        return max(range(len(found)), key=found.__getitem__)


Answer: TypeAlias = Generated | Chosen


class Size(NamedTuple):
    """What an example takes of a batch."""

    tokens: int
    """Prompt tokens of the longest stream."""
    rows: int
    """One a stream, for each response that is drawn, and of choices for each beginning that they do not share."""
    choice: int
    """Tokens of the longest choice."""

    @classmethod
    def of(cls, tokens: int, rows: int, choices: Sequence[tuple[int, ...]]) -> Size:
        return cls(tokens, rows * len({c[:-1] for c in choices} or {()}), max(map(len, choices), default=0))


@dataclass(frozen=True)
class Asked:
    """An example encoded: one request a choice and the choices' ids, or one request alone to generate from."""

    requests: tuple[Request, ...]
    choices: tuple[tuple[int, ...], ...] = ()
    given: Answer | None = None
    """Of a plan that holds its answer: then there are no requests."""

    @property
    def request(self) -> Request:
        """What is generated from, or the first choice's. Raises UsageError where the answer is given."""
        if not self.requests:
            raise UsageError("this method answers without the model, so there is no prompt and no activation to read")
        return self.requests[0]

    @property
    def apart(self) -> bool:
        """Whether it is not answered in one row a stream, so that no other system can answer it beside its own."""
        return self.given is not None or self.request.plan.draws is not None

    @property
    def tokens(self) -> int:
        """Prompt tokens of the longest stream."""
        return max((request.tokens for request in self.requests), default=0)

    @property
    def size(self) -> Size:
        """In a batch."""
        rows = max((request.plan.rows(scored=bool(self.choices)) for request in self.requests), default=0)
        return Size.of(self.tokens, rows, self.choices)

    @property
    def cut_tokens(self) -> int:
        """Cut from the left of the contexts, over the streams of the request that lost most."""
        return max((sum(prompt.cut for prompt in different(request)) for request in self.requests), default=0)


def given(answer: str, choices: Sequence[str]) -> Asked:
    """An answer that needs no model: of choices the one with all the probability."""
    if not choices:
        return Asked((), given=Generated((), (), answer, "given"))
    is_it = [choice == answer for choice in choices]
    return Asked((), given=Chosen(tuple(Scored((0.0 if it else -math.inf,), (it,)) for it in is_it)))


def different(request: Request) -> Iterable[CutPrompt]:
    """Its prompts, once each where several streams have the same."""
    return {id(prompt): prompt for prompt in request.prompts}.values()


def response_of(example: Example, answer: Answer) -> str:
    return example.choices[answer.best(example)] if isinstance(answer, Chosen) else answer.text


def chosen_answers(answers: Sequence[Generated], draws: Draws) -> list[Generated]:
    """Of every `draws.count` answers the chosen one, which knows the others."""
    found = []
    for start in range(0, len(answers), draws.count):
        some = answers[start : start + draws.count]
        number = chosen_of(draws.choose, draws.choose(some), len(some))
        found.append(replace(some[number], drawn=tuple(one.text for one in some)))
    return found


def without_mix(plan: Plan) -> tuple[Any, ...]:
    """What tells a plan from another, but for their mix."""
    streams = tuple(
        (s.prompt.render(), by_value(s.edits), tuple(a.key for a in s.adapters), s.exits, s.early) for s in plan.streams
    )
    return streams, plan.answer, by_value(plan.draws)


def by_value(value: Any) -> Any:
    """What tells two edits or mixes apart, tensors by their content."""
    if "torch" in sys.modules and isinstance(value, sys.modules["torch"].Tensor):  # nobody has a tensor before
        numbers = value.detach().cpu()
        wide = numbers.to(sys.modules["torch"].complex128) if numbers.is_complex() else numbers.double()
        return (tuple(value.shape), str(value.dtype), wide.numpy().tobytes())
    if isinstance(value, np.ndarray):
        return (value.shape, str(value.dtype), value.tobytes())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return (type(value), *(by_value(getattr(value, f.name)) for f in dataclasses.fields(value)))
    if isinstance(value, tuple | list):
        return tuple(map(by_value, value))
    return value
