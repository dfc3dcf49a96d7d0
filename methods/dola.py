"""DoLa: contrast the last layer's next-token distribution with that of an earlier layer.

Paper: Chuang et al., DoLa: Decoding by Contrasting Layers Improves Factuality in Large Language Models, ICLR 2024,
eqs. 1-5: q_j = softmax of the LM head on layer j; M = the candidate j with the largest Jensen-Shannon divergence from
the last layer, JSD(q_N || q_j), chosen at every step; score log q_N(x) - log q_M(x) for tokens with
q_N(x) >= 0.1 max q_N, probability 0 for the others.
Code read: voidism/DoLa@805230e, the port in transformers (`dola_layers`), and its use in weixuzhang/DPS@5bbe129.
Differs from that code, which is preset `released` for everything but the first and the last point:
- The layer is chosen per row. Upstream takes the mean divergence over a batch, which is the same at its batch size 1.
- Early states pass the final norm, as the last one does. Upstream applies the LM head to them raw.
- The divergence is the paper's. Upstream swaps the arguments of KL: (KL(m || q_N) + KL(m || q_j)) / 2.
- No repetition penalty: upstream's scripts set 1.2 for DoLa and 1.0 for the baseline.
Layer j is upstream's number: the residual entering block j, so 0 is the embeddings and the last layer has no number.
Multiple choice wants `relative_top=0`, as upstream scores it: an option with an implausible token has probability 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

from harness.data import Example
from harness.errors import UsageError
from harness.method import Fitted, Method
from harness.mix import LayerContrast
from harness.plan import Exit, Plan, Site, Stream
from harness.plugins.options import Finite

Layers = Literal["low", "high"] | tuple[int, ...]


@dataclass(frozen=True)
class EarlyLayers:
    """The candidate layers as exits. `low`: the even layers below N / 2, N blocks; `high`: every second one from there on.

    Deeper than 40 blocks: the first, or the last, 20. With a tied LM head the embeddings would only repeat the input
    token, so `low` starts at 2 (at 1 of two blocks).
    """

    layers: Layers
    final_norm: bool

    def __call__(self, layers: int, *, tied: bool) -> tuple[Exit, ...]:
        return tuple(Exit(Site(layer, "block_in"), self.final_norm) for layer in self._candidates(layers, tied))

    def _candidates(self, depth: int, tied: bool) -> tuple[int, ...]:
        if isinstance(self.layers, tuple):
            if not all(0 <= layer < depth for layer in self.layers):
                given = ",".join(map(str, self.layers))
                raise UsageError(
                    f"dola: layers {given} do not all exist before the last; this model has 0 to {depth - 1}"
                )
            return self.layers
        if self.layers == "high":
            return tuple(range(depth // 2 if depth <= 40 else depth - 20, depth, 2))
        start = min(2, depth - 1) if tied else 0
        return tuple(range(start, depth // 2 if depth <= 40 else 20, 2)) or (start,)


@dataclass(frozen=True)
class DoLa(Method):
    """Contrast the last layer with the earlier layer that differs most from it."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {"released": {"divergence": "reversed", "final_norm": False}}

    layers: Layers = "low"
    """Candidates: `low`, `high`, or layer numbers as in `0,2,4`; one number is the paper's static form."""
    relative_top: float = 0.1
    """Tokens less likely than this share of the most likely one are ruled out; 0 rules out none."""
    final_norm: bool = True
    """Whether early states pass the final norm before the LM head."""
    divergence: Literal["jensen-shannon", "reversed"] = "jensen-shannon"
    strength: Finite = 1.0
    """Weight of the early layer's log-probability, >= 0; the paper has 1."""

    def __post_init__(self) -> None:
        if self.layers == ():
            raise UsageError("dola: layers names no layer; allowed: low, high, or numbers as in 0,2,4")
        if not 0 <= self.relative_top <= 1:
            raise UsageError(f"dola: relative_top {self.relative_top} is not a share; allowed: 0 to 1")
        if self.strength < 0:
            raise UsageError(f"dola: strength {self.strength} is negative; allowed: strength >= 0")

    def plan(self, example: Example, shared: Fitted | None, personal: Fitted | None) -> Plan:
        stream = Stream(self.retrieval.prompt(example), early=EarlyLayers(self.layers, self.final_norm))
        return Plan((stream,), LayerContrast(self.relative_top, self.strength, self.divergence == "reversed"))

    def neutral(self) -> Self:
        return replace(self, strength=0.0, relative_top=0.0)
