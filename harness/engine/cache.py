"""Key-value caches of a batch: gathered from several prefills with room for what comes, or forked to share a prompt.

A library cache grows by concatenation, which copies all of it at every token. `gather` copies once, where the rows of a
batch are put together, and reserves the columns of the response.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer


class Prefilled(NamedTuple):
    """The cache of some prompts, padded on the left."""

    cache: Any
    prompts: Sequence[int]
    """Number of the prompt in each of the cache's rows."""


class RoomyLayer(DynamicLayer):
    """One block's keys and values in a buffer longer than they are, so that a token is written and nothing is moved."""

    def __init__(self, keys: Tensor, values: Tensor, filled: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.buffers = keys, values
        self.filled = filled
        self._show()

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        start, end = self.filled, self.filled + key_states.shape[-2]
        if end > self.buffers[0].shape[-2]:
            raise RuntimeError(f"the cache has room for {self.buffers[0].shape[-2]} tokens; {end} were written")
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = new
        self.filled = end
        return self._show()

    def batch_select_indices(self, indices: Tensor) -> None:
        keys, values = (buffer[indices.to(buffer.device)] for buffer in self.buffers)
        self.buffers = keys, values
        self._show()

    def _show(self) -> tuple[Tensor, Tensor]:
        keys, values = (buffer[:, :, : self.filled] for buffer in self.buffers)
        self.keys, self.values = keys, values
        return keys, values


def gather(parts: Sequence[Prefilled], take: Sequence[int], room: int) -> Any:
    """One cache whose row r is the prompt take[r], right-aligned, with `room` more columns; the parts are used up.

    A prompt may be taken by several rows: a shared prefill fans out here.
    """
    out = max(parts, key=lambda part: part.cache.get_seq_length()).cache
    rows = {number: [r for r, prompt in enumerate(take) if prompt in part.prompts] for number, part in enumerate(parts)}
    sources = {
        number: torch.tensor([list(part.prompts).index(take[r]) for r in rows[number]])
        for number, part in enumerate(parts)
    }
    for index, layer in enumerate(out.layers):
        own = [part.cache.layers[index] for part in parts]
        widest = layer.keys.shape[-2]
        reserved = 0 if layer.is_sliding else room
        made = []
        for tensors in ([layer.keys for layer in own], [layer.values for layer in own]):
            shape = tensors[0].shape
            whole = tensors[0].new_zeros(len(take), shape[1], widest + reserved, shape[3])
            for number, tensor in enumerate(tensors):
                whole[rows[number], :, widest - tensor.shape[-2] : widest] = tensor[sources[number].to(tensor.device)]
            made.append(whole)
        for used in own:
            used.keys = used.values = None
        if layer.is_sliding:  # no longer than its window, so it may grow by concatenation
            layer.keys, layer.values = made
        else:
            out.layers[index] = RoomyLayer(made[0], made[1], widest)
    return out


def fan_out(cache: Any, rows: int) -> Any:
    """A library cache of one row as one of many that can grow on its own; nothing is copied until it does."""
    copied = fork(cache)
    for layer in copied.layers:
        layer.keys, layer.values = (tensor.expand(rows, -1, -1, -1) for tensor in (layer.keys, layer.values))
    return copied


def fork(cache: Any) -> Any:
    """A copy of a library cache that can grow on its own; the tensors are shared, because updates make new ones."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied
