"""Read what attention heads attend to, under the same fused attention that runs everything else.

A fused kernel never forms the weights, and the eager model is no substitute (in float64 its mask gives NaN at padding).
So a reader is handed the rotated queries and the keys as the kernel gets them, and forms the weights of the positions
it asks for. The attention modules of the read blocks get a copy of the configuration that names the reading function;
weights, hooks and the shared configuration are untouched, and the copy goes on the way out.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from harness.engine.sites import Sites

_NAME = "harness_reading"
_KEYS_ONLY = "harness_keys_only"
_READERS: WeakKeyDictionary[nn.Module, Callable[[Attention], None]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Attention:
    """One block's attention in one forward pass: R rows, H query heads, KV key heads, T queries, K keys."""

    queries: Tensor
    """[R, H, T, d], after rotary embedding."""
    keys: Tensor
    """[R, KV, K, d]; the last T are those of the queries' own positions."""
    visible: Tensor | None
    """Boolean, broadcasts to [R, H, T, K]; None = causal."""
    scale: float

    def weights(self, queries: slice = slice(None)) -> Tensor:
        """softmax(scale q k^T) over the visible keys, [R, H, t, K] for the chosen queries, in fp32 or wider."""
        total, keys = self.queries.shape[-2], self.keys.shape[-2]
        wide = torch.promote_types(self.keys.dtype, torch.float32)  # as the kernel sums; bf16 products would tie
        q = self.queries[:, :, queries].to(wide)
        q = q.unflatten(1, (self.keys.shape[1], -1))  # consecutive query heads share a key head
        scores = torch.einsum("rkgtd,rksd->rkgts", q, self.keys.to(wide)).flatten(1, 2) * self.scale
        if self.visible is None:
            at = torch.arange(total, device=scores.device)[queries] + keys - total
            visible = torch.arange(keys, device=scores.device) <= at[:, None]
        else:
            visible = self.visible[..., queries, :]
        # not -inf: a padded query sees nothing, and NaN in it would spread through later reductions
        return scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1)


@contextlib.contextmanager
def reading(sites: Sites, readers: Mapping[int, Callable[[Attention], None]]) -> Iterator[None]:
    """Within the context every forward pass shows the attention of block `layer` to `readers[layer]`."""
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _attend)
    kept: list[tuple[Any, Any]] = []
    try:
        for layer, reader in readers.items():
            module: Any = sites.attention(layer)
            kept.append((module, module.config))
            config = copy.copy(module.config)
            config._attn_implementation = _NAME
            module.config = config
            _READERS[module] = reader
        yield
    finally:
        for module, config in kept:
            module.config = config
            _READERS.pop(module, None)


@contextlib.contextmanager
def keys_only(sites: Sites, layer: int) -> Iterator[None]:
    """Within the context the block puts keys and values into its cache; attention and MLP are left out, its output is void."""
    from transformers import AttentionInterface

    AttentionInterface.register(_KEYS_ONLY, lambda module, query, *_, **__: (query.transpose(1, 2), None))
    module: Any = sites.attention(layer)
    kept, config = module.config, copy.copy(module.config)
    config._attn_implementation = _KEYS_ONLY
    module.config = config
    try:
        with sites.skipped_mlp(layer):
            yield
    finally:
        module.config = kept


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    scale = kwargs.get("scaling")
    visible = attention_mask if attention_mask is None or attention_mask.dtype == torch.bool else attention_mask >= 0
    _READERS[module](Attention(query, key, visible, scale if scale is not None else 1 / math.sqrt(query.shape[-1])))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
