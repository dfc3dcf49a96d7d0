"""Many edited variants of one prompt and continuation, scored together. Exact, not approximate.

Head discovery asks for the loss of one answer under a thousand single-head edits. Three things are shared:
- positions below the first edited one run once, and their keys and values serve every variant (`where=DECODE`: the
  whole prompt but its last token);
- blocks below the edited one run once: each variant starts from the unedited residual entering its lowest edited block,
  and where nothing is edited before the heads' outputs there, from the unedited outputs of its heads;
- the last block of rows gives keys and values at all positions, and runs whole only at those that are asked for;
- short tails of several variants are packed into one sequence [1, V * T] with explicit positions and a block mask, so a
  pack costs one pass with no copy of the prompt's cache; long tails, and those of a short cache, run as rows [V, T].
An edit never learns of the packing: `RowEdits` shows it [V, T, D].
"""

from __future__ import annotations

import contextlib
import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from harness.engine.attention import keys_only
from harness.engine.cache import fork
from harness.engine.encoder import Encoded
from harness.engine.flops import Cost
from harness.engine.model import LanguageModel
from harness.engine.row_edits import RowEdits
from harness.errors import ContextTooLong
from harness.plan import Edit, Layout, Site, places

PACK_TOKENS = {"cpu": 256, "cuda": 1024}
"""Tail tokens of one packed pass; longer packs spend more on masked attention than they save. Also the most positions
whose logits exist at once: 1,024 of a vocabulary of 128,256 are half a GiB."""
ROW_TOKENS = {"cpu": 4096, "cuda": 32768}
"""Tokens of one pass over unpacked rows, which bounds its memory."""


class Beginnings:
    """Keys and values of prompts' beginnings, kept as long as `room` bytes hold them: who reads the same prompts again and
    again runs their beginnings once. With no room each is run when it is asked for."""

    def __init__(self, lm: LanguageModel, room: int = 0) -> None:
        self.lm, self.room = lm, room
        self._kept: dict[tuple[int, ...], Any] = {}

    def of(self, ids: Sequence[int]) -> Any:
        """A cache that holds these tokens, and can grow on its own."""
        key = tuple(ids)
        if key in self._kept:
            return fork(self._kept[key])
        cache, tokens = self.lm.new_cache(), torch.tensor([key], device=self.lm.device)
        positions = torch.arange(len(key), device=self.lm.device)[None]
        with torch.inference_mode(False), torch.no_grad():  # a backward pass may read it
            self.lm.hidden(tokens, mask=torch.ones_like(tokens), positions=positions, cache=cache)
        sizes = self.lm.sizes
        bytes_ = 2 * sizes.layers * sizes.kv_heads * sizes.head_dim * len(key) * self.lm.model.dtype.itemsize
        if bytes_ <= self.room:
            self._kept[key], self.room = fork(cache), self.room - bytes_
        return cache


@torch.inference_mode()
def score_variants(
    lm: LanguageModel,
    prompt: Encoded,
    continuation: Sequence[int],
    variants: Sequence[Sequence[Edit]],
    begun: Beginnings | None = None,
) -> Tensor:
    """Log-probabilities in nats [V, T] of the continuation's tokens under each variant's edits; () is the model as it is.

    `begun` may hold the prompt's beginning from an earlier call. Equal to scoring each variant alone. Raises ContextTooLong
    where prompt and continuation exceed the context.
    """
    if not continuation:
        raise ValueError("empty continuation")
    ids, most = [*prompt.ids, *continuation[:-1]], PACK_TOKENS[lm.device.type]
    target = torch.tensor(continuation, device=lm.device)
    out = _wide(lm, len(variants), len(continuation))
    for members, hidden in _final(lm, ids, prompt.layout(), variants, len(continuation), Cost(), begun):
        predicted = target.repeat(len(members))
        before = hidden.flatten(0, 1)
        parts = [
            lm.logits(some).log_softmax(-1).gather(1, ids[:, None])[:, 0]
            for some, ids in zip(before.split(most), predicted.split(most), strict=True)
        ]
        out[members] = torch.cat(parts).view(len(members), -1).to(out.dtype)
    return out


@torch.inference_mode()
def choice_logprobs(
    lm: LanguageModel, prompt: Encoded, tokens: Sequence[int], variants: Sequence[Sequence[Edit]], cost: Cost
) -> Tensor:
    """Log-probabilities in nats [V, C] of each of C tokens to follow the prompt, under each variant's edits.

    As `score_variants`; what the passes take is added to `cost`.
    """
    out = _wide(lm, len(variants), len(tokens))
    index = torch.tensor(tokens, device=lm.device)
    for members, hidden in _final(lm, prompt.ids, prompt.layout(), variants, 1, cost):
        parts = [lm.logits(some).log_softmax(-1)[:, index] for some in hidden[:, 0].split(PACK_TOKENS[lm.device.type])]
        out[members] = torch.cat(parts).to(out.dtype)
    return out


def _wide(lm: LanguageModel, *shape: int) -> Tensor:
    """Empty, on the engine's device, in fp32 or wider."""
    return torch.empty(shape, device=lm.device, dtype=torch.promote_types(lm.model.dtype, torch.float32))


def _final(
    lm: LanguageModel,
    ids: Sequence[int],
    layout: Layout,
    variants: Sequence[Sequence[Edit]],
    wanted: int,
    cost: Cost,
    begun: Beginnings | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Variants that run together, and their final hidden states [V, wanted, D] at the last positions."""
    if len(ids) + 1 > lm.max_length:
        raise ContextTooLong(f"{len(ids) + 1} tokens exceed the context of {lm.max_length}")
    by_start: dict[int, list[int]] = defaultdict(list)
    for v, edits in enumerate(variants):
        by_start[first_position(edits, layout)].append(v)
    for start, members in sorted(by_start.items()):
        entries = {v: _entry(variants[v], lm.sites.layers) for v in members}
        trunk = _Trunk(lm, ids, start, {entry.block for entry in entries.values()}, cost, begun or Beginnings(lm))
        for pack in trunk.packs(entries):
            yield pack.members, trunk.run([variants[v] for v in pack.members], pack.entry, layout, wanted)


class _Entry(NamedTuple):
    """Where a variant leaves the unedited run."""

    block: int
    """Its lowest edited block; behind the last one where nothing is edited."""
    attends: bool
    """Whether the block's attention has to run: something is edited before its heads' outputs."""


class _Pack(NamedTuple):
    members: list[int]
    entry: _Entry


class _Trunk:
    """What variants that start at position `start` share: the cache below it and the residuals entering blocks."""

    def __init__(
        self, lm: LanguageModel, ids: Sequence[int], start: int, blocks: set[int], cost: Cost, begun: Beginnings
    ) -> None:
        self.lm = lm
        self.cost = cost
        self.start = start
        self.tail = len(ids) - start
        self.cache = begun.of(ids[:start]) if start else None
        self.positions = np.arange(start, len(ids))
        device = lm.device
        tokens = torch.tensor([list(ids)], device=device)
        everywhere = torch.arange(len(ids), device=device)[None]
        ones = torch.ones_like(tokens)
        self.inputs: dict[int, Tensor] = {}
        """Block -> the unedited residual entering it, [1, T, D]."""
        self.heads: dict[int, Tensor] = {}
        """Block -> the unedited outputs of its heads, [1, T, H * head_dim]."""
        self.calls: dict[int, dict[str, Any]] = {}
        """Block -> its named arguments."""
        lowest = min(blocks)
        handles = [
            block.register_forward_pre_hook(self._record(i, keep=i in blocks), with_kwargs=True)
            for i, block in enumerate(lm.sites.blocks)
            if i >= lowest
        ]
        reads = {Site(i, "heads_out"): [partial(self._read, i)] for i in blocks if i < lm.sites.layers}
        try:
            with lm.sites.hooked(reads):
                self.final = lm.hidden(
                    tokens[:, start:],
                    mask=ones,
                    positions=everywhere[:, start:],
                    cache=fork(self.cache) if self.cache is not None else None,
                )
        finally:
            for handle in handles:
                handle.remove()
        cost.forward_passes += 1 + bool(start)
        cost.prefill_tokens += len(ids)
        cost.flops += lm.sizes.blocks(start) + lm.sizes.blocks(self.tail, past=start)

    def _read(self, layer: int, x: Tensor) -> None:
        self.heads[layer] = x

    def _record(self, layer: int, *, keep: bool) -> Any:
        def hook(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named = dict(inspect.signature(block.forward).bind(*args, **kwargs).arguments)
            named.update(named.pop("kwargs", {}))
            hidden = named.pop("hidden_states")
            self.calls[layer] = named
            if keep:
                self.inputs[layer] = hidden

        return hook

    @property
    def packed(self) -> bool:
        # a short cache is cheaper to copy than tails are to mask from each other
        return self.start >= self.tail and 2 * self.tail <= PACK_TOKENS[self.lm.device.type]

    def packs(self, entries: Mapping[int, _Entry]) -> list[_Pack]:
        """Variants of one entry together, at most a pack's worth each."""
        budget = (PACK_TOKENS if self.packed else ROW_TOKENS)[self.lm.device.type]
        size = max(1, budget // self.tail)
        alike: dict[_Entry, list[int]] = defaultdict(list)
        for variant, entry in entries.items():
            alike[entry].append(variant)
        return [
            _Pack(variants[i : i + size], entry)
            for entry, variants in sorted(alike.items())
            for i in range(0, len(variants), size)
        ]

    def run(self, edits: Sequence[Sequence[Edit]], entry: _Entry, layout: Layout, wanted: int) -> Tensor:
        """Final hidden states [V, wanted, D] of the tails' last positions, from their entry upward."""
        sites, count, block = self.lm.sites, len(edits), entry.block
        if block == sites.layers:
            return self.final[:, -wanted:].expand(count, -1, -1)
        rows = RowEdits(edits, [layout] * count, sites)
        rows.at(np.broadcast_to(self.positions, (count, self.tail)))
        self.cost.edits_prefill += rows.fired_prompt
        self.cost.edits_decode += rows.fired_decode
        last, sizes = sites.layers - 1, self.lm.sizes
        ends = not self.packed and self.tail > wanted and self._attends(last)[1] is None
        batch, width = (1, count) if self.packed else (count, 1)
        hidden = self.inputs[block].repeat(batch, width, 1)
        cache = fork(self.cache) if self.cache is not None else None
        if cache is not None and batch > 1:
            cache.batch_repeat_interleave(batch)
        masks: dict[tuple[int, int | None], Tensor] = {}
        with sites.hooked(rows.transforms()):
            for layer in range(block, sites.layers):
                call = self.calls[layer]
                prefix, window = self._attends(layer)
                if (prefix, window) not in masks:
                    masks[prefix, window] = self._mask(prefix, window, width).to(hidden.device)
                call = {
                    **call,
                    "attention_mask": masks[prefix, window].to(hidden.device),
                    "past_key_values": cache,
                    "position_ids": call["position_ids"].repeat(1, width),
                }
                if "position_embeddings" in call:
                    call["position_embeddings"] = tuple(x.repeat(1, width, 1) for x in call["position_embeddings"])
                reused = layer == block and not entry.attends
                heads = self.heads[layer].repeat(batch, width, 1) if reused else None
                if layer == last and ends:
                    hidden = self._end(rows, hidden, call, heads, wanted)
                    self.cost.flops += (
                        count * sizes.blocks(wanted, past=self.start + self.tail - wanted) // sites.layers
                    )
                    continue
                with sites.attended(layer, heads) if heads is not None else contextlib.nullcontext():
                    hidden = sites.blocks[layer](hidden, **call)
                self.cost.flops += batch * sizes.blocks(width * self.tail, past=self.start) // sites.layers
                self.cost.flops -= batch * sizes.attention(width * self.tail, past=self.start) if reused else 0
        self.cost.forward_passes += 1
        self.cost.prefill_tokens += count * self.tail
        hidden = hidden.reshape(count, -1, hidden.shape[-1])[:, -wanted:]
        return sites.final_norm(hidden.to(next(sites.final_norm.parameters()).device))

    def _end(self, rows: RowEdits, hidden: Tensor, call: dict[str, Any], heads: Tensor | None, wanted: int) -> Tensor:
        """What leaves the last block at the last `wanted` positions; those before give it keys and values alone."""
        sites, cut, layer = self.lm.sites, self.tail - wanted, self.lm.sites.layers - 1
        before, after = slice(None, cut), slice(cut, None)
        seen = call["attention_mask"].shape[-1] - wanted
        positions = np.broadcast_to(self.positions, (rows.rows, self.tail))
        edited = any(site.layer == layer for site in rows.transforms())

        def run(part: slice, mask: Tensor) -> Tensor:
            if edited:
                rows.at(positions[:, part])
            named = {**call, "attention_mask": mask, "position_ids": call["position_ids"][:, part]}
            if "position_embeddings" in call:
                named["position_embeddings"] = tuple(x[:, part] for x in call["position_embeddings"])
            return sites.blocks[layer](hidden[:, part].contiguous(), **named)  # GPT-2 takes views

        mask = call["attention_mask"]
        if heads is not None:
            with sites.attended(layer, heads[:, after].contiguous()):
                return run(after, mask[..., after, :])
        if call["past_key_values"] is None:
            call = {**call, "past_key_values": self.lm.new_cache()}
        with keys_only(sites, layer):
            run(before, mask[..., before, :seen])
            split = 2 * sites.width * (2 * sites.heads + 2 * self.lm.sizes.kv_heads) * sites.head_dim * cut
            self.cost.flops += rows.rows * split
        return run(after, mask[..., after, :])

    def _attends(self, layer: int) -> tuple[int, int | None]:
        """Cached columns of a block, and its sliding window where it has one."""
        if self.cache is None:
            reference = self.lm.new_cache().layers[layer]
            return 0, getattr(reference, "sliding_window", None)
        kept = self.cache.layers[layer]
        return kept.keys.shape[-2], getattr(kept, "sliding_window", None)

    def _mask(self, prefix: int, window: int | None, width: int) -> Tensor:
        """Boolean [1, 1, Q, prefix + Q]: a tail sees the prefix and its own past, within the window."""
        at = torch.arange(self.start, self.start + self.tail).repeat(width)
        owner = torch.arange(width).repeat_interleave(self.tail)
        keys = torch.cat([torch.arange(self.start - prefix, self.start), at])
        owners = torch.cat([torch.full((prefix,), -1), owner])
        visible = (keys[None] <= at[:, None]) & ((owners[None] == owner[:, None]) | (owners[None] == -1))
        if window is not None:
            visible &= at[:, None] - keys[None] < window
        return visible[None, None]


def first_position(edits: Sequence[Edit], layout: Layout) -> int:
    """The first position any edit touches, at most the last prompt token: below it nothing differs."""
    last = layout.prompt_len - 1
    touched = np.zeros(last + 1, dtype=bool)
    touched[last] = True
    for edit in edits:
        touched |= places(edit.where, np.arange(last + 1), layout)
    return int(np.argmax(touched))


def _entry(edits: Sequence[Edit], layers: int) -> _Entry:
    block = min((edit.site.layer for edit in edits), default=layers)
    return _Entry(block, any(edit.site == Site(block, part) for edit in edits for part in ("block_in", "queries")))
