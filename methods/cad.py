"""Context-aware decoding: contrast the prompt that has the user's history with the one that has none.

Paper: Shi et al., Trusting Your Evidence, NAACL 2024; (1 + alpha) logit(y | history, x) - alpha logit(y | x), raw
logits, no plausibility cut. Code read: xhan77/context-aware-decoding@1281d7f, and its LaMP port in weixuzhang/DPS@5bbe129
(alpha 0.5), whose choice of "context" for personalization, the retrieved profile block, is ours too.
Differs from that port: the prompt is a user turn, not a system turn; rows are batched.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from harness.data import Example
from harness.errors import UsageError
from harness.method import Fitted, Method
from harness.mix import Contrast
from harness.plan import Plan, Stream
from harness.plugins.options import Finite


@dataclass(frozen=True)
class CAD(Method):
    """Contrast with and without the user's history."""

    alpha: Finite = 0.5
    """Weight of the contrast, >= 0; 0 is `rag`."""

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise UsageError(f"cad: alpha {self.alpha} is negative; allowed: alpha >= 0")

    def plan(self, example: Example, shared: Fitted | None, personal: Fitted | None) -> Plan:
        streams = (Stream(self.retrieval.prompt(example)), Stream(example.prompt()))
        return Plan(streams, Contrast(self.alpha))

    def neutral(self) -> Self:
        return replace(self, alpha=0.0)
