"""What a method that steers by difference vectors says: which answers are contrasted, how they are filtered and pooled.

    vector[block] = mean over kept positive answers - mean over kept negative answers, of the block's output

Positive and negative are the sides of a task's train items (target `pos` or `neg`, then the trait); for a task without
sides, the prompt with history and the same prompt without. `harness.fit.extraction` answers, filters and pools. Vectors may
also come from files (`harness.fit.vector_files`).
Papers: Chen et al., Persona Vectors, 2507.21509; Phadke et al., Mechanistic Origins of Personalization Bias in LLMs,
section 3. Code read: safety-research/persona_vectors@5faebb1. Differs from that code:
- Blocks are 0-based and every vector is that of a block's output; theirs has the embeddings as row 0, block k - 1 as row
  k, and as last row what the final norm makes of the last block, which is no place to add anything.
- Their layer L is therefore our block L - 1; the second paper prints layers and does not say which it means, so that is
  the option `numbering`, and its numbers are read as blocks unless it is set.
- An empty answer is left out and counted; theirs makes the whole vector NaN.
- The mean over the prompt leaves out the BOS token, whose activation is huge and weighted by 1 / length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from harness.data import Prompt
from harness.errors import UsageError
from harness.method import Fitted
from harness.plan import ALL, ALL_BUT_BOS, DECODE, GENERATED, PROMPT, Where
from harness.plugins.options import Many

if TYPE_CHECKING:
    from torch import Tensor

Pooling: TypeAlias = Literal["response", "prompt", "last_prompt"]
Scale: TypeAlias = Literal["raw", "unit", "residual"]
Positions: TypeAlias = Literal["response", "generated", "prompt", "all_but_bos", "all"]
Numbering: TypeAlias = Literal["blocks", "hidden_states"]
Control: TypeAlias = Literal["none", "random", "shuffled"]

WHERE: Mapping[Positions, Where] = {
    "response": DECODE,
    "generated": GENERATED,
    "prompt": PROMPT,
    "all_but_bos": ALL_BUT_BOS,
    "all": ALL,
}
"""`response` is the last prompt token and all generated ones, as persona-vector tools mean it."""


@dataclass(frozen=True)
class Pair:
    """Two prompts that differ in what the vector is to show."""

    positive: Prompt
    negative: Prompt
    ids: tuple[str, str]
    """Of the two train items; a rollout's noise and its judge's question are keyed by them."""
    user: str


@dataclass(frozen=True)
class Extraction:
    """How vectors are extracted from pairs of prompts."""

    rollouts: Many = 5
    """Sampled answers to each prompt."""
    temperature: float = 1.0
    judge: str | None = None
    """Who rates answers for the filter: openai/<model>, hf/<model>, words or lexicon; None = every answer is kept."""
    paired: bool = True
    """Whether an answer goes out with the one it is paired with; else each side is filtered by itself."""
    threshold: float = 50.0
    """Positive answers are kept from this score on, negative ones below 100 minus it (0 to 100)."""
    coherence_min: float = 50.0


def at_block(vectors: Tensor, layer: int, shared: Fitted, trait: str) -> Tensor:
    """One of the vectors [layers, D]. Raises UsageError where the model has no such block, a file no vector for it, or what was
    extracted is no number."""
    if not 0 <= layer < len(vectors):
        raise UsageError(f"block {layer} does not exist; this model has blocks 0 to {len(vectors) - 1}")
    if vectors[layer].isnan().any():
        why = (
            shared.meta.get("missing", {}).get(trait) or "what was extracted there is not finite; give a wider --dtype"
        )
        raise UsageError(f"no vector of {trait} for block {layer}: {why}")
    return vectors[layer]
