"""Profile-augmented generation: a summary of the user's history, written once, stands before every input.

Paper: Richardson et al., Integrating Summarization and Retrieval for Enhanced Personalization via Large Language Models,
2023; as OPPU (Tan et al. 2024) and PerFit use it: summary, line break, prompt, with k retrieved items or none. Code read:
TamSiuhin/OPPU@9fb3f46, whose writer is Vicuna. Differs from that code:
- The writer may be the evaluated model (default), another one, or an endpoint, and writes greedily (there: sampled).
- One instruction serves all tasks; there each task asks its own question (most frequent tag, common score, style).
- The 10 items it reads are drawn by the seed and written out (there: unseeded, and printed as a Python list).
A user without a history gets no summary; a summary that could not be written makes the user's samples errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from harness.data import Example, User
from harness.errors import UsageError, UserFailed
from harness.fit.writer import INSTRUCTION, Summaries, as_recorded
from harness.method import Fitted, Kit, Method, Retrieval, Written
from harness.plan import Plan, Stream


@dataclass(frozen=True)
class PAG(Method):
    """Profile-augmented prompt: a summary of the user's history before the input, and `k` history items."""

    decode_only: ClassVar[frozenset[str]] = frozenset({"retriever", "k", "seed"})

    retrieval: Retrieval = Retrieval(k=0)
    writer: str = "self"
    """`self` (the evaluated model), a model's alias, hub id or folder, or `openai/<model>`."""
    profile_items: int = 10
    """History items the writer reads, drawn by the seed; newest first where they have dates."""
    profile_words: int = 200
    """Words the writer reads of each field of an item."""
    profile_tokens: int = 128
    """Length of the summary at most."""
    instruction: str = INSTRUCTION
    """What the writer is asked, before the items."""

    def __post_init__(self) -> None:
        for name in ("profile_items", "profile_words", "profile_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"pag: {name} {getattr(self, name)} leaves nothing to write; allowed: {name} >= 1")
        self._summaries()

    def options(self) -> dict[str, Any]:
        """As ever, but a writer in a folder by name and content."""
        return {**super().options(), "writer": as_recorded(self.writer)}

    def adapt(self, kit: Kit, users: Sequence[User], shared: Fitted | None) -> list[Fitted | UserFailed]:
        """The summary of each user, in `meta`; empty where there is no history."""
        written = self._summaries().write(kit, users)
        return [self._state(written.get(user.id)) for user in users]

    def plan(self, example: Example, shared: Fitted | None, personal: Fitted | None) -> Plan:
        if personal is None:
            raise UserFailed(f"pag: no profile of user {example.user.id!r} was written")
        return Plan((Stream(self.retrieval.prompt(example, personal.meta["summary"])),))

    def _summaries(self) -> Summaries:
        return Summaries(self.writer, self.profile_items, self.profile_words, self.profile_tokens, self.instruction)

    def _state(self, written: Written | UserFailed | None) -> Fitted | UserFailed:
        if isinstance(written, UserFailed):
            return written
        if written is None:
            return Fitted(meta={"summary": "", "items": 0, "dropped": 0})
        meta = {"summary": written.text, "items": written.items, "dropped": written.dropped}
        return Fitted(meta=meta, cost=written.cost)
