"""Profiles in words: a summary of a user's history, written once, that stands on a line before their prompts.

Paper: Richardson et al., Integrating Summarization and Retrieval for Enhanced Personalization via Large Language Models,
2023. `pag` is this alone; the methods that train take it as `profile`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from harness.data import Message, Prompt, Record, User
from harness.errors import UserFailed
from harness.fit.writer import ENDPOINT
from harness.method import Kit, Written
from harness.registry import model_row

INSTRUCTION = (
    "Below are records of one person. In at most five sentences, describe this person for someone who will have to answer "
    "in their place: which subjects they deal with, what they prefer, how they judge, and how they write (wording, "
    "length, tone, format). Write the description only."
)


@dataclass(frozen=True)
class HistoryTemplate:
    """An instruction, then numbered history items with all their fields, each cut to `words` words."""

    words: int

    def __call__(self, text: str, items: Sequence[Record], summary: str) -> tuple[Message, ...]:
        lines = [f"{number}. {self._line(item)}" for number, item in enumerate(items, 1)]
        return (Message("user", "\n".join([text, "", *lines])),)

    def _line(self, item: Record) -> str:
        return "; ".join(f"{name}: {' '.join(value.split()[: self.words])}" for name, value in item.fields.items())


@dataclass(frozen=True)
class Summaries:
    """Who writes them, and from what."""

    writer: str = "self"
    """`self` (the evaluated model), a model's alias, hub id or folder, or `openai/<model>`."""
    items: int = 10
    """History items the writer reads, drawn by the seed; newest first where they have dates."""
    words: int = 200
    """Words the writer reads of each field of an item."""
    tokens: int = 128
    """Length of a summary at most."""
    instruction: str = INSTRUCTION

    def __post_init__(self) -> None:
        if self.writer != "self" and not self.writer.startswith(ENDPOINT):
            model_row(self.writer)  # an unknown name is heard of before any model is loaded

    def write(self, kit: Kit, users: Sequence[User]) -> dict[str, Written | UserFailed]:
        """By user; a user without a history has none."""
        prompts = {user.id: self._prompt(user, kit.seed) for user in users if user.history}
        return dict(zip(prompts, kit.writer(self.writer)(list(prompts.values()), self.tokens), strict=True))

    def _prompt(self, user: User, seed: int) -> Prompt:
        size = len(user.history)
        drawn = Random(f"{seed}/{user.id}").sample(range(size), min(size, self.items))
        items = tuple(user.history[place] for place in sorted(drawn, reverse=True))
        return Prompt(HistoryTemplate(self.words), self.instruction, items)
