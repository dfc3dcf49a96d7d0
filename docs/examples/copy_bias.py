"""Make tokens that the history holds more likely: an example of a mix that knows ids and step.

harness check docs/examples/copy_bias.py
harness run --method docs/examples/copy_bias.py --task lamp4 --set strength=0.5
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from harness.data import Example
from harness.method import Fitted, Method
from harness.plan import Place, Plan, Stream, StreamOutput
from harness.plugins.options import Finite


@dataclass(frozen=True)
class Bias:
    """Adds `strength` to the logits of the tokens in each row's own prompt; of the first token alone with `first_only`."""

    placed: ClassVar[bool] = True
    strength: float
    first_only: bool

    def __call__(self, outputs: Sequence[StreamOutput], place: Place) -> Tensor:
        logits = outputs[0].logits.clone()
        steps = slice(max(0, 1 - place.first)) if self.first_only else slice(None)
        for row, prompt in enumerate(place.prompts):
            logits[row, steps, sorted(set(prompt))] += self.strength
        return logits.log_softmax(-1)


@dataclass(frozen=True)
class CopyBias(Method):
    """Tokens of the prompt, its history among them, are more likely."""

    strength: Finite = 0.5
    first_only: bool = False

    def plan(self, example: Example, shared: Fitted | None, personal: Fitted | None) -> Plan:
        return Plan((Stream(self.context.prompt(example)),), Bias(self.strength, self.first_only))

    def neutral(self) -> CopyBias:
        return replace(self, strength=0.0)
