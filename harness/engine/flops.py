"""What decoding costs in floating-point operations: the true count of an architecture, and the DPS paper's estimate.

A matrix product [m, k] x [k, n] is 2 m k n operations; nothing else is counted, as in torch's FlopCounterMode, which
`Sizes` equals to the digit under eager attention. (Under fused attention kernels on a CPU that counter misses attention
itself.) Attention is counted as computed: every query against every cached column, causal or not, padding included.

The vocabulary head is paid where logits are computed: at the answer's positions, in each stream, and at each early
exit; never over the rest of a prompt. Edits are not counted; they are element-wise, or far below 1 % of a block.

Paper: Zhang et al., Preference Heads in Large Language Models, Table 3, prints no formula. `dps_estimate` is the one
that gives its six numbers to the digit; it differs from the true count in four ways:
- keys and values as wide as queries (no grouped-query attention), and an MLP of two matrices (no gate);
- no vocabulary head;
- a decoding step attends to the prompt alone, not to the tokens decoded before;
- T decoding steps although the prompt's pass gives the first token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from harness.plan import LoRA


@dataclass
class Cost:
    """What the forward passes so far have cost."""

    forward_passes: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    flops: int = 0
    """Operations of the matrix products, padding included."""
    edits_prefill: int = 0
    """(row, position) pairs edited below the last prompt token."""
    edits_decode: int = 0


@dataclass(frozen=True)
class Sizes:
    """Of a decoder-only transformer; all that its operations depend on."""

    layers: int
    width: int
    heads: int
    """Query heads."""
    kv_heads: int
    head_dim: int
    mlp: int
    """Hidden units of the MLP."""
    vocabulary: int
    gated: bool = True
    """Whether the MLP has a gate, and so three matrices."""
    window: int | None = None
    """Tokens a sliding layer sees, itself included."""
    windowed_layers: int = 0

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """From a config.json: Llama, Mistral, Qwen2, Qwen3, Gemma 3 or GPT-2."""
        gpt2 = config["model_type"] == "gpt2"
        names = ("n_layer", "n_embd", "n_head") if gpt2 else ("num_hidden_layers", "hidden_size", "num_attention_heads")
        layers, width, heads = (config[name] for name in names)
        window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
        kinds = config.get("layer_types") or ["sliding_attention"] * layers
        return cls(
            layers=layers,
            width=width,
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or width // heads,
            mlp=(config.get("n_inner") or 4 * width) if gpt2 else config["intermediate_size"],
            vocabulary=config["vocab_size"],
            gated=not gpt2,
            window=window,
            windowed_layers=kinds.count("sliding_attention") if window else 0,
        )

    @property
    def block_weights(self) -> int:
        """Entries of one block's matrices."""
        attention = 2 * self.width * (self.heads + self.kv_heads) * self.head_dim
        return attention + (3 if self.gated else 2) * self.width * self.mlp

    def blocks(self, tokens: int, past: int = 0) -> int:
        """Operations of all blocks for one row that feeds `tokens` after `past` cached columns. No vocabulary head."""
        seen = self.layers * (past + tokens)
        if self.window is not None:  # a sliding layer's cache keeps window - 1 columns
            seen -= self.windowed_layers * max(0, past - (self.window - 1))
        attention = 4 * self.heads * self.head_dim * tokens * seen
        return 2 * self.layers * self.block_weights * tokens + attention

    def attention(self, tokens: int, past: int = 0) -> int:
        """Operations of one full-attention block before its output projection, of those `blocks` counts."""
        projections = 2 * self.width * (self.heads + 2 * self.kv_heads) * self.head_dim * tokens
        return projections + 4 * self.heads * self.head_dim * tokens * (past + tokens)

    def head(self, positions: int) -> int:
        """Operations of the vocabulary head at `positions`."""
        return 2 * self.width * self.vocabulary * positions


SIZES: Mapping[str, Sizes] = {
    "llama3-8b": Sizes(32, 4096, 32, 8, 128, 14336, 128256),
    "llama3.2-1b": Sizes(16, 2048, 32, 8, 64, 8192, 128256),
    "llama2-7b": Sizes(32, 4096, 32, 32, 128, 11008, 32000),
    "qwen2-7b": Sizes(28, 3584, 28, 4, 128, 18944, 152064),
    "qwen2.5-7b": Sizes(28, 3584, 28, 4, 128, 18944, 152064),
    "mistral-7b": Sizes(32, 4096, 32, 8, 128, 14336, 32768),
    "vicuna-13b": Sizes(40, 5120, 40, 40, 128, 13824, 32000),
}
"""Alias -> sizes, from the public config.json files, so that tables need no model."""


def decoding(sizes: Sizes, prompt: int, new: int, streams: int = 1) -> int:
    """True count of one sample: `prompt` tokens read once, `new` tokens generated by `streams` that share the prompt.

    One stream's prompt pass gives the first token, so new - 1 steps follow. Several share the prompt but its last
    token, and then each take `new` steps. Each stream pays the vocabulary head `new` times.
    """
    shared, steps = (prompt, new - 1) if streams == 1 else (prompt - 1, new)
    tail = sum(sizes.blocks(1, past=shared + step) for step in range(steps))
    return sizes.blocks(shared) + streams * (tail + sizes.head(new))


def dps_estimate(sizes: Sizes, prompt: int, new: int, streams: int = 1) -> int:
    """The DPS paper's Table 3: 2 W S + 4 L d S^2 for the prompt, 2 W T + 4 L d S T for each stream's decoding.

    S prompt and T new tokens, L layers of width d, W = L (4 d^2 + 2 d d_ff); DPS decodes two streams.
    """
    weights = sizes.layers * (4 * sizes.width**2 + 2 * sizes.width * sizes.mlp)
    attention = 4 * sizes.layers * sizes.width * prompt

    def read(tokens: int) -> int:
        return (2 * weights + attention) * tokens

    return read(prompt) + streams * read(new)


def adapter_flops(rows: Sequence[Sequence[LoRA]]) -> int:
    """Operations of low-rank adapters at one position of one row; the rows of a batch are padded to equal rank."""
    total = 0
    for name in {name for row in rows for lora in row for name in lora.weights}:
        stacks = [[lora.weights[name] for lora in row if name in lora.weights] for row in rows]
        (down, up) = next(stack for stack in stacks if stack)[0]
        rank = max(sum(a.shape[0] for a, _ in stack) for stack in stacks)
        total += 2 * rank * (down.shape[1] + up.shape[0])
    return total
