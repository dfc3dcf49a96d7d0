"""LoRA-P: a LoRA adapter for each user, trained on their history, on the model as it is.

Paper: Hu et al., LoRA, 2021, as the personal baseline of PerFit (anonymous ACL submission, Tables 2 to 4): stage 2 of OPPU
without its stage 1. Settings and differences from OPPU's code as in `lora_c`, but q and v, and 2 epochs. Users are rows of
one batch while they train and while they are answered; each starts fresh and learns from their own history alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from harness.data import Example, User
from harness.fit.trains import TrainsUsers, adapter_identity, lora
from harness.method import Fitted, Kit
from harness.plan import Plan, Stream
from harness.plugins.options import Count, Finite
from harness.training import Adapter

if TYPE_CHECKING:
    from harness.errors import UserFailed


@dataclass(frozen=True)
class LoRAP(TrainsUsers):
    """One LoRA adapter a user."""

    targets: str = "q_proj,v_proj"
    """Linear modules of every block, by the ends of their names."""
    rank: Count = 8
    alpha: Finite = 8.0
    """The adapter's output is scaled by alpha / rank."""
    adapters: str | None = None
    """A folder of PEFT folders named by user id, to use instead of training."""

    def options(self) -> dict[str, Any]:
        """As ever, but the folder by name and content, which decide the numbers and are the same everywhere."""
        return {**super().options(), "adapters": adapter_identity(self.adapters) if self.adapters else None}

    def adapt(self, kit: Kit, users: Sequence[User], shared: Fitted | None) -> list[Fitted | UserFailed]:
        """The user's adapter; no tensors where the task makes no pairs of the history."""
        if self.adapters is not None:
            return self.with_summaries(users, kit.read_adapters(self.adapters, users), self.summaries(kit, users))
        return self.personal(kit, users, Adapter.of(self.targets, self.rank, self.alpha))

    def plan(self, example: Example, shared: Fitted | None, personal: Fitted | None) -> Plan:
        adapters = (lora(personal),) if personal is not None and personal.tensors else ()
        return Plan((Stream(self.prompt(example, personal), adapters=adapters),))

    def neutral(self) -> Self:
        return replace(self, epochs=0, adapters=None)
