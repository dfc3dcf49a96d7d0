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

from dataclasses import dataclass, replace
from typing import Self

from harness.data import Example
from harness.fit.trains import TrainsTwice, lora
from harness.method import Fitted
from harness.plan import Plan, Stream


@dataclass(frozen=True)
class OPPU(TrainsTwice):
    """A collective LoRA adapter, and a personal one on top of it."""

    def plan(self, example: Example, shared: Fitted | None, personal: Fitted | None) -> Plan:
        own = (lora(personal),) if personal is not None and personal.tensors else ()
        return Plan((Stream(self.prompt(example, personal), adapters=(self.of_all(shared), *own)),))

    def neutral(self) -> Self:
        return replace(self, epochs=0, collective_epochs=0, adapter=None, adapters=None)
