"""LoRA-C: one LoRA adapter for everyone, trained on other users' questions.

Paper: Hu et al., LoRA, 2021, as the collective baseline of PerFit (anonymous ACL submission, Tables 2 and 3) and stage 1 of
OPPU (Tan et al., Democratizing Large Language Models via Personalized Parameter-Efficient Fine-tuning, 2024). Code read:
TamSiuhin/OPPU@9fb3f46: rank and alpha 8, q, k and v, 3 epochs, batches of 16, AdamW 1e-4 with linear decay after a warm-up
over a tenth of the steps. Differs from that code:
- A target that matches no module is an error. Theirs names `out_proj`, which Llama does not have.
- No dropout (there 0.05). The model keeps its dtype (there fp32); adapters train in fp32.
- Prompts are the task's; they are cut item by item, never inside, so that no answer is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from harness.data import Example, Labelled
from harness.errors import HarnessError, UserFailed
from harness.fit.trains import Trains, adapter_identity, lora
from harness.method import Fitted, Kit
from harness.plan import Plan, Stream
from harness.plugins.options import Count, Finite
from harness.training import Adapter


@dataclass(frozen=True)
class LoRAC(Trains):
    """One LoRA adapter for all users."""

    epochs: int = 3
    targets: str = "q_proj,k_proj,v_proj"
    """Linear modules of every block, by the ends of their names."""
    rank: Count = 8
    alpha: Finite = 8.0
    """The adapter's output is scaled by alpha / rank."""
    adapter: str | None = None
    """A PEFT folder to use, instead of training one."""

    def options(self) -> dict[str, Any]:
        """As ever, but the folder by name and content, which decide the numbers and are the same everywhere."""
        return {**super().options(), "adapter": adapter_identity(self.adapter) if self.adapter else None}

    def needs_train(self) -> bool:
        return self.adapter is None

    def fit(self, kit: Kit, train: Sequence[Labelled]) -> Fitted:
        """The adapter, its tensors named as PEFT names them."""
        if self.adapter is not None:
            return kit.read_adapter(self.adapter)
        (state,) = kit.train(
            [self.collective(kit, train)], [Adapter.of(self.targets, self.rank, self.alpha)], self.recipe()
        )
        if isinstance(state, UserFailed):
            raise HarnessError(str(state))
        return state

    def plan(self, example: Example, shared: Fitted | None, personal: Fitted | None) -> Plan:
        if shared is None or not shared.tensors:
            raise HarnessError("lora_c: no adapter was trained; run 'harness fit --method lora_c' first")
        return Plan((Stream(self.retrieval.prompt(example), adapters=(lora(shared),)),))

    def neutral(self) -> Self:
        return replace(self, epochs=0, adapter=None)
