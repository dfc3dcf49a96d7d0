"""Persona vectors: add the direction in which answers under a persona differ from neutral ones.

Papers: Chen et al., Persona Vectors, 2507.21509; Phadke et al., Mechanistic Origins of Personalization Bias in LLMs,
section 3 and Figures 1 and 5. Extraction, filter and what differs from the authors' code: `harness.fit.difference_vectors`.
The second paper applies a layer's vector "to every layer" (section 3.3) and steers "with the layer-20 vector" (4.2), and
adds it as it is; so `apply` and `scale` are options, all three readings:
    same_layer               v[layer] after block `layer`
    all_layers               v[layer] after every block, so that it accumulates
    all_layers_incremental   v[l] - v[l-1] after block l up to `layer` (Chen et al., J.3): by then v[layer] in all
Whether its layer 20 is block 20 or hidden state 20, which block 19 gives, it does not say: `numbering`.
It states neither coefficient nor positions; 1 and `response`, the first paper's command line's, are the defaults here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

from harness.data import Example
from harness.edits import AddVector
from harness.errors import UsageError
from harness.fit.difference_vectors import WHERE, at_block
from harness.fit.steers import Contrasts
from harness.method import Fitted
from harness.plan import Plan, Site, Stream


@dataclass(frozen=True)
class PersonaVector(Contrasts):
    """Add a persona's vector to the residual stream."""

    decode_only: ClassVar[frozenset[str]] = Contrasts.decode_only | {"layer", "apply", "trait"}

    layer: int | None = None
    """Whose vector is taken, as `numbering` counts; by default the one 20/28 up, where the paper finds most peaks."""
    apply: Literal["same_layer", "all_layers", "all_layers_incremental"] = "same_layer"
    trait: str | None = None
    """Whose vector, where several were extracted."""

    def plan(self, example: Example, shared: Fitted | None, personal: Fitted | None) -> Plan:
        assert shared is not None
        trait = self._trait(shared)
        vectors = self._vector(shared, trait)
        layers = len(vectors)
        layer = self._block(layers * 20 // 28 if self.layer is None else self.layer)
        if self.apply == "same_layer":
            added = {layer: self._scaled(at_block(vectors, layer, shared, trait), shared, layer)}
        elif self.apply == "all_layers":
            added = {
                block: self._scaled(at_block(vectors, layer, shared, trait), shared, block) for block in range(layers)
            }
        else:
            up = [self._scaled(at_block(vectors, block, shared, trait), shared, block) for block in range(layer + 1)]
            added = {block: up[block] - up[block - 1] if block else up[0] for block in range(layer + 1)}
        edits = tuple(
            AddVector(Site(block, "block_out"), vector, self.coefficient, WHERE[self.positions])
            for block, vector in added.items()
        )
        return Plan((Stream(self.retrieval.prompt(example), edits),))

    def neutral(self) -> Self:
        return replace(self, coefficient=0.0)

    def _trait(self, shared: Fitted) -> str:
        traits: list[str] = shared.meta["traits"]
        if self.trait is None and len(traits) == 1:
            return traits[0]
        if self.trait is None or self.trait not in traits:
            raise UsageError(f"persona_vector: trait {self.trait!r} has no vector here; set trait to one of {traits}")
        return self.trait
