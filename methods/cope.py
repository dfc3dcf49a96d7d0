"""CoPe: the user's model contrasted with the model before it knew the user, at every token.

Paper: Bu et al., Personalized LLM Decoding via Contrasting Personal Preference, EMNLP 2025. What a user rewards is read off two
models, log pi_user - log pi_base, and no reward model is asked. Here: log p_user(y) - contrast * log p_base(y) over the tokens
with p_user(y) >= plausible * max p_user, both streams the same prompt. pi_user is a personal LoRA adapter on a collective one,
as in `oppu`; pi_base is the collective one alone. With equal options, seeds and adapters, `oppu` is contrast=0, plausible=0.
Code read: cleverscent/CoPe@a7551cc (scripts/OPPU_sft.py, OPPU_sft+dpo.py): contrast and plausible 0.1, adapters as in OPPU.
This is the variant without training on rewards: the paper's full method trains pi_user further by DPO against answers that the
models sample themselves, and so does that code's second script. Differs from the code:
- Its logarithms have 1e-8 added, so that a token that is not plausible keeps a score and can be sampled, and it learns in
  batches of 4 (8 for everyone): the preset `released`. Here such a token has probability 0.
- Its repetition penalty on long texts (1.2 or 1.3) is not here: a mix sees no tokens of the answer.
- One model holds both streams, each user's rows under that user's adapters; the code loads the model twice and merges.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

from harness.data import Example
from harness.errors import UsageError
from harness.fit.trains import TrainsTwice, lora
from harness.method import Fitted
from harness.mix import PlausibleContrast
from harness.plan import Plan, Stream
from harness.plugins.options import Finite


@dataclass(frozen=True)
class CoPe(TrainsTwice):
    """The user's adapter contrasted with the model without it."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {"released": {"floor": 1e-8, "batch_size": 4}}
    decode_only: ClassVar[frozenset[str]] = frozenset({"contrast", "plausible", "floor", "base"})

    contrast: Finite = 0.1
    """How much of log p_base is taken away, >= 0."""
    plausible: float = 0.1
    """Only tokens with at least this share of the likeliest token's probability under the user's model; 0 = all."""
    floor: float = 0.0
    """Added to probabilities before their logarithm."""
    base: Literal["collective", "model"] = "collective"
    """What is taken away: the model with the collective adapter, as published, or without any."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.contrast < 0 or not 0 <= self.plausible <= 1 or not 0 <= self.floor < 1:
            raise UsageError(
                f"cope: contrast {self.contrast}, plausible {self.plausible}, floor {self.floor}; allowed: contrast >= 0, plausible "
                "of 0 to 1, floor of 0 or more and below 1"
            )

    def plan(self, example: Example, shared: Fitted | None, personal: Fitted | None) -> Plan:
        prompt, everyone = self.prompt(example, personal), self.of_all(shared)
        own = (lora(personal),) if personal is not None and personal.tensors else ()
        user = Stream(prompt, adapters=(everyone, *own))
        base = Stream(prompt, adapters=(everyone,) if self.base == "collective" else ())
        return Plan((user, base), PlausibleContrast(self.contrast, self.plausible, self.floor))

    def neutral(self) -> Self:
        untrained = replace(self, epochs=0, collective_epochs=0, adapter=None, adapters=None)
        return replace(untrained, contrast=0.0, plausible=0.0, floor=0.0)
