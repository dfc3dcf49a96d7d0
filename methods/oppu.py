"""OPPU: one PEFT per user, a personal LoRA adapter stacked on one that all users share.

Paper: Tan et al., Democratizing Large Language Models via Personalized Parameter-Efficient Fine-tuning, 2024. Stage 1 trains
a collective adapter on other users' questions, stage 2 a personal one on each user's history with the collective one below.
Code read: TamSiuhin/OPPU@9fb3f46. Settings as in `lora_c` and `lora_p`; besides what is said there, differs from that code:
- Each user starts fresh and learns from their own history. Upstream's list of training data is never cleared, so that user
  i also learns from users 0 to i - 1, and the order of users decides the result.
- Nothing is merged into the model: upstream adds the collective adapter to the weights, and unmerging is not exact.
- With `k` items retrieved into the prompts (OPPU + RAG), an item of the history sees earlier items alone, as upstream
  (`k=0`, OPPU itself). With `profile` a summary of the history stands before them (OPPU + PAG), written as `pag` has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from harness.data import Example, Labelled, User
from harness.errors import HarnessError, UsageError, UserFailed
from harness.fit.trains import TrainsUsers, adapter_identity, lora
from harness.method import Fitted, Kit
from harness.plan import LoRA, Plan, Stream
from harness.plugins.options import Count, Finite
from harness.training import Adapter


@dataclass(frozen=True)
class OPPU(TrainsUsers):
    """A collective LoRA adapter, and a personal one on top of it."""

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
        return self.personal(kit, users, part, adapters=(self._collective(shared),))

    def plan(self, example: Example, shared: Fitted | None, personal: Fitted | None) -> Plan:
        own = (lora(personal),) if personal is not None and personal.tensors else ()
        adapters = (self._collective(shared), *own)
        return Plan((Stream(self.prompt(example, personal), adapters=adapters),))

    def neutral(self) -> Self:
        return replace(self, epochs=0, collective_epochs=0, adapter=None, adapters=None)

    def _collective(self, shared: Fitted | None) -> LoRA:
        if shared is None or not shared.tensors:
            raise HarnessError("oppu: no collective adapter was trained; run 'harness fit --method oppu' first")
        return lora(shared)
