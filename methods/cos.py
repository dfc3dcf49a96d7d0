"""Context steering (CoS): scale what the user's history adds to the next-token log-probabilities.

Paper: He et al., Context Steering: Controllable Personalization at Inference Time, ICLR 2025 (arXiv 2405.01768). With
l_C the log-probabilities given context C and the prompt and l_0 those of the prompt alone, the influence of C is
l_C - l_0, and
    one context        l_C + lambda (l_C - l_0)            lambda 0 = the prompt with its context, -1 = without
    several contexts   l_0 + sum_i lambda_i (l_Ci - l_0)   lambda_i 1 = context i as it is, 0 = without it
Code read: sashrikap/context-steering@9711e4a, which has both zero points too: with one context the second form's lambda
is the first form's plus one.
The context is the retrieved history: all items in one prompt, or each of the `k` items as a context of its own.
Differs from that code: the task's own template joins history and input, not a space; logits are the model's own (its
code takes the scores of a sampling `generate`, tempered twice, with NaN where top-p cut); decoding is greedy unless a
temperature is given, where dividing the mix by it is the same as dividing each stream.
One context at temperature 0 is CAD (`cad`) with alpha = lambda, but lambda may be negative. A user without history has
no context to steer by: both streams are equal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

from harness.data import Example
from harness.errors import UsageError
from harness.method import Fitted, Method
from harness.mix import ContextSum, Contrast
from harness.plan import Plan, Stream
from harness.plugins.options import Finite


@dataclass(frozen=True)
class CoS(Method):
    """Contrast with and without the user's history, by a strength that may be negative, or item by item."""

    lam: Finite | tuple[Finite, ...] = 1.0
    """lambda of the whole history, any number; or one for each of the k items, best first, as in `1.5,1,-0.5`."""

    def __post_init__(self) -> None:
        several = self.lam if isinstance(self.lam, tuple) else ()
        if not all(map(math.isfinite, several or (self.lam,))):  # type: ignore[arg-type]
            raise UsageError(f"cos: lam {self.lam} is not finite; allowed: any number, or one for each of the k items")
        if isinstance(self.lam, tuple) and len(several) != self.retrieval.k:
            raise UsageError(
                f"cos: lam names {len(several)} contexts and k={self.retrieval.k}; give both the same count"
            )

    def plan(self, example: Example, shared: Fitted | None, personal: Fitted | None) -> Plan:
        prompt, without = self.retrieval.prompt(example), Stream(example.prompt())
        if not isinstance(self.lam, tuple):
            return Plan((Stream(prompt), without), Contrast(self.lam))
        contexts = [Stream(replace(prompt, items=(item,))) for item in prompt.items]
        return Plan((without, *contexts), ContextSum(self.lam[: len(contexts)]))

    def neutral(self) -> Self:
        return replace(self, lam=tuple(0.0 for _ in self.lam) if isinstance(self.lam, tuple) else 0.0)
