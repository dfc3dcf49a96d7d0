"""A language model as the engine sees it: token ids to logits, with its sites, its limits and its adapters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.engine.encoder import Encoder
from harness.engine.flops import Sizes
from harness.engine.sites import Sites, widen_norms
from harness.errors import UsageError
from harness.plan import LoRA


class LanguageModel:
    """A causal language model with its tokenizer, its sites and its limits."""

    def __init__(
        self,
        model: Any,
        encoder: Encoder,
        *,
        name: str = "model",
        source: str = "",
        revision: str = "",
        device: torch.device | str = "cpu",
    ) -> None:
        model.eval()
        if model.dtype == torch.float64:
            widen_norms(model)
        self.model = model
        self.encoder = encoder
        self.name = name
        self.source = source
        self.revision = revision
        self.device = torch.device(device)
        self.sites = Sites(model)
        self.sizes = Sizes.of(model.config.to_dict())
        self.vocabulary: int = model.config.vocab_size
        encoder.vocabulary = model.get_input_embeddings().weight.shape[0]
        self.max_length: int = model.config.max_position_embeddings
        self._head = model.get_output_embeddings()
        for parameter in model.parameters():
            parameter.requires_grad_(False)

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @property
    def heads(self) -> int:
        """Attention heads of all blocks."""
        return self.sites.layers * self.sites.heads

    def new_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def hidden(
        self,
        ids: Tensor,
        *,
        mask: Tensor,
        positions: Tensor,
        cache: Any = None,
    ) -> Tensor:
        """Final hidden states after the final norm, [R, T, D]; `cache` grows by T tokens.

        ids [R, T]; mask [R, past + T], 1 where a token is real; positions [R, T], any value at padding.
        """
        out = self.sites.base(
            input_ids=ids,
            attention_mask=mask,  # always given: without it repeated positions switch on packed-sequence masking
            position_ids=positions.clamp_min(0),
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return out.last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits of final hidden states, fp32 or wider, on the engine's device."""
        logits = self._head(hidden).to(self.device)
        return logits if logits.dtype == torch.float64 else logits.float()

    def early_logits(self, hidden: Tensor, *, final_norm: bool) -> Tensor:
        """Logits of a block's activations, through the final norm or not."""
        weight = next(self.sites.final_norm.parameters())
        hidden = hidden.to(weight.device)
        return self.logits(self.sites.final_norm(hidden) if final_norm else hidden)

    @contextlib.contextmanager
    def adapted(self, adapters: Sequence[Sequence[LoRA]]) -> Iterator[None]:
        """Within the context row r runs under adapters[r]; nothing is merged into the shared weights."""
        for lora in {id(lora): lora for row in adapters for lora in row}.values():
            self._check(lora)
        names = sorted({name for row in adapters for lora in row for name in lora.weights})
        transforms = {name: _lora_transform(name, adapters) for name in names}
        with self.sites.hooked_modules(transforms):
            yield

    def _check(self, lora: LoRA) -> None:
        """Raises UsageError where the adapter names a module that is not there, or is of another shape."""
        for name, (down, up) in lora.weights.items():
            try:
                weight = self.model.get_parameter(f"{name}.weight")
            except AttributeError:
                raise UsageError(
                    f"adapter {lora.key!r} names {name!r}, which is no linear module of {self.name}"
                ) from None
            given = [list(down.shape), list(up.shape)]
            sizes = (up.shape[0], down.shape[1]) if down.ndim == up.ndim == 2 and down.shape[0] == up.shape[1] else None
            if sizes is None or sorted(sizes) != sorted(weight.shape):
                raise UsageError(
                    f"adapter {lora.key!r} is of shapes {given} at {name}; expected A [rank, in] and B [out, rank] for a weight "
                    f"{list(weight.shape)}"
                )


def _lora_transform(name: str, adapters: Sequence[Sequence[LoRA]]) -> Any:
    """y + sum of scale * B A x, each row with its own stack: all adapters of a row concatenated along the rank."""
    alike = len({tuple(lora.key for lora in row) for row in adapters}) == 1
    stacks = []
    for row in adapters[:1] if alike else adapters:
        pairs = [(lora.weights[name], lora.scale) for lora in row if name in lora.weights]
        downs = [a for (a, _), _ in pairs]
        ups = [scale * b for (_, b), scale in pairs]
        stacks.append((torch.cat(downs), torch.cat(ups, dim=1)) if pairs else None)
    some = next(stack for stack in stacks if stack is not None)
    if alike:
        return lambda x, y: y + (x @ some[0].to(x).T) @ some[1].to(x).T
    rank = max(stack[0].shape[0] for stack in stacks if stack is not None)
    down = some[0].new_zeros(len(adapters), rank, some[0].shape[1])
    up = some[1].new_zeros(len(adapters), some[1].shape[0], rank)
    for number, stack in enumerate(stacks):
        if stack is not None:
            down[number, : stack[0].shape[0]] = stack[0]
            up[number, :, : stack[1].shape[1]] = stack[1]
    down, up = down.transpose(1, 2).contiguous(), up.transpose(1, 2).contiguous()

    def run(x: Tensor, y: Tensor) -> Tensor:
        rows = x.reshape(len(adapters), -1, x.shape[-1])
        return y + torch.bmm(torch.bmm(rows, down.to(x)), up.to(x)).view_as(y)

    return run


def pad_left(rows: Sequence[Sequence[int]], fill: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids [R, T] padded on the left, and positions [R, T] counting from 0 at the first real token, -1 at padding."""
    longest = max((len(row) for row in rows), default=0)
    ids = np.full((len(rows), longest), fill, dtype=np.int64)
    positions = np.full((len(rows), longest), -1, dtype=np.int64)
    for r, row in enumerate(rows):
        if row:
            ids[r, longest - len(row) :] = row
            positions[r, longest - len(row) :] = np.arange(len(row))
    return ids, positions


def pad_right(rows: Sequence[Sequence[int]], starts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Ids [R, T] padded on the right, and positions [R, T] counting from each row's start, -1 at padding."""
    longest = max(len(row) for row in rows)
    ids = np.zeros((len(rows), longest), dtype=np.int64)
    positions = np.full((len(rows), longest), -1, dtype=np.int64)
    for r, row in enumerate(rows):
        ids[r, : len(row)] = row
        positions[r, : len(row)] = np.arange(starts[r], starts[r] + len(row))
    return ids, positions
