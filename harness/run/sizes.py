"""How large prompts are, before any of them is answered: batches are planned by that, and the memory they take is foreseen.

Prompts are tokenised many at once and not kept: those of 20,000 users would fill gigabytes. They are made again when their
batch comes. And they are measured a window of samples at a time, so that the first answers do not wait for all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from harness.data import Example, Rendered
from harness.engine.model import LanguageModel
from harness.errors import HarnessError, UserFailed
from harness.method import Progress
from harness.plan import Plan
from harness.run.answers import Asked, Size
from harness.run.batches import AUTO_START, FIRST_OPERATIONS, Batching, longest_first
from harness.task import Generation

TOGETHER = 256
"""Examples whose prompts are tokenised at once."""


class Asks(Protocol):
    """What makes prompts: `harness.run.system.ModelSystem`."""

    lm: LanguageModel
    generation: Generation
    progress: Progress
    batching: Batching

    def fits(self, sizes: Sequence[Size]) -> int | None: ...
    def plan(self, example: Example) -> Plan: ...
    def _try(self, example: Example) -> Asked | HarnessError: ...
    def _room(self, example: Example, tokens: int) -> int: ...
    def _answer_ids(self, example: Example, text: str) -> tuple[int, ...]: ...


def plan_windows(system: Asks, examples: Sequence[Example], alike: Callable[[Example], str]) -> None:
    """The batches of all examples: those of the first window in order, the others when they come, unless all are wanted."""
    batching, by_id = system.batching, {example.id: example for example in examples}
    first = _longest_first(system, examples[: batching.ahead], alike)
    batching.plan([*first, *(example.id for example in examples[batching.ahead :])], system.lm.device.type)
    at = len(batching.window(0))
    while batching.whole and at < len(batching.planned):
        order_window(system, by_id, alike, at)
        at += len(batching.window(at))
    batching.changed()


def order_window(system: Asks, by_id: Mapping[str, Example], alike: Callable[[Example], str], at: int) -> None:
    """Put the window that begins with batch `at` in order, unless it was when some of it was answered."""
    batches = system.batching.window(at)
    if not any(system.batching.done.issuperset(ids) for ids in batches):
        ids = _longest_first(system, [by_id[i] for batch in batches for i in batch], alike)
        system.batching.order(at, ids, system.lm.device.type)


def _longest_first(system: Asks, examples: Sequence[Example], alike: Callable[[Example], str]) -> list[str]:
    """Ids, equal `alike` next to each other and those that cannot be asked last; batches of them fit the memory."""
    sizes = sizes_of(system, examples)
    ready = [(example, size) for example, size in zip(examples, sizes, strict=True) if size is not None]
    order = longest_first([alike(example) for example, _ in ready], [size.tokens for _, size in ready])
    failed = [example.id for example, size in zip(examples, sizes, strict=True) if size is None]
    asked = [size for _, size in ready]
    system.batching.fits, system.batching.first = system.fits(asked), _first(system, asked)
    return [*(ready[n][0].id for n in order), *failed]


def _first(system: Asks, sizes: Sequence[Size]) -> int:
    """Samples of the first batch under auto. Told by operations and no clock, so that equal runs plan equal batches."""
    most, new = FIRST_OPERATIONS.get(system.lm.device.type), system.generation.max_new_tokens
    if most is None:
        return AUTO_START
    work = [size.rows * system.lm.sizes.blocks(size.tokens + (size.choice or new)) for size in sizes]
    return min(AUTO_START, 2 ** (max(1, most // max(1, *work, 1)).bit_length() - 1))


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
            streams[n] = plan.rows(scored=bool(example.choices)) if prompts else 0
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
