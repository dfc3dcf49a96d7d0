"""How large prompts are, before any of them is answered: batches are planned by that, and the memory they take is foreseen.

Prompts are tokenised many at once and not kept: those of 20,000 users would fill gigabytes. They are made again when their
batch comes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Protocol

from harness.data import Example, Rendered
from harness.engine.model import LanguageModel
from harness.errors import HarnessError, UserFailed
from harness.method import Progress
from harness.plan import Plan
from harness.run.answers import Asked, Size
from harness.task import Generation

TOGETHER = 256
"""Examples whose prompts are tokenised at once."""


class Asks(Protocol):
    """What makes prompts: `harness.run.system.ModelSystem`."""

    lm: LanguageModel
    generation: Generation
    progress: Progress

    def plan(self, example: Example) -> Plan: ...
    def _try(self, example: Example) -> Asked | HarnessError: ...
    def _room(self, example: Example, tokens: int) -> int: ...
    def _answer_ids(self, example: Example, text: str) -> tuple[int, ...]: ...


def sizes_of(system: Asks, examples: Sequence[Example]) -> list[Size | None]:
    """Of each example, None where it cannot be asked."""
    found: list[Size | None] = []
    for start in range(0, len(examples), TOGETHER):
        found += _some(system, examples[start : start + TOGETHER])
        system.progress("measuring prompts", len(found), len(examples))
    return found


def _some(system: Asks, examples: Sequence[Example]) -> list[Size | None]:
    streams, tokens = [-1] * len(examples), [0] * len(examples)
    rendered: list[tuple[int, Rendered]] = []
    for n, example in enumerate(examples):
        with contextlib.suppress(UserFailed):
            plan = system.plan(example)
            prompts = {id(s.prompt): s.prompt for s in plan.streams} if plan.answer is None else {}
            streams[n] = len(plan.streams) if prompts else 0
            rendered += [(n, prompt.render()) for prompt in prompts.values()]
    for (n, _), count in zip(rendered, system.lm.encoder.lengths([one for _, one in rendered]), strict=True):
        tokens[n] = max(count, tokens[n])
    found: list[Size | None] = []
    for n, example in enumerate(examples):
        choices = [system._answer_ids(example, text) for text in example.choices] if streams[n] > 0 else []
        room = max((system._room(example, len(c)) for c in choices), default=system.generation.max_new_tokens)
        size = Size.of(tokens[n], streams[n], choices) if streams[n] >= 0 else None
        if streams[n] > 0 and tokens[n] + room > system.lm.max_length:  # history is cut, and what is left counts
            asked = system._try(example)
            size = asked.size if isinstance(asked, Asked) else None
        found.append(size)
    return found
