"""Rows of a batch: the streams of its samples, which of them share a prefill, and one forward pass over them.

A sample has one row a stream. Rows are padded on the left for the prompt and share a prefill when their tokens, adapters and
the edits acting below prompt_len - 1 are equal. Prompts that only begin alike (the examples of a few-shot task) share that
beginning.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from harness.engine.encoder import CutPrompt
from harness.engine.flops import Cost, adapter_flops
from harness.engine.model import LanguageModel
from harness.engine.row_edits import RowEdits, acts_before
from harness.plan import Plan, Site, Stream, places

Name = TypeVar("Name", int, str)

_LEAST_SHARED = 32
"""Tokens at which prompts must begin alike, and half of the longest of them, to share that beginning."""


@dataclass(frozen=True)
class Request:
    """A plan with its prompts encoded and cut to the context."""

    key: str
    """Names the sample: the key of its sampling noise."""
    plan: Plan
    prompts: tuple[CutPrompt, ...]

    @property
    def tokens(self) -> int:
        """Prompt tokens of the longest stream."""
        return max(len(prompt.encoded.ids) for prompt in self.prompts)


@dataclass
class Rows:
    """Streams of a batch, flattened: row r is stream `stream_of[r]` of sample `sample_of[r]`."""

    streams: list[Stream]
    prompts: list[CutPrompt]
    sample_of: list[int]
    stream_of: list[int]

    @classmethod
    def of(cls, requests: Sequence[Request]) -> Rows:
        rows = cls([], [], [], [])
        for sample, request in enumerate(requests):
            for number, (stream, prompt) in enumerate(zip(request.plan.streams, request.prompts, strict=True)):
                rows.streams.append(stream)
                rows.prompts.append(prompt)
                rows.sample_of.append(sample)
                rows.stream_of.append(number)
        return rows

    def pick(self, rows: Sequence[int]) -> Rows:
        return Rows(*([values[r] for r in rows] for values in vars(self).values()))

    def prompt_lengths(self) -> list[int]:
        return [len(prompt.encoded.ids) for prompt in self.prompts]

    def prefill_groups(self) -> list[list[int]]:
        """Rows whose prompts can run once: equal tokens, adapters and edits below the last prompt token."""
        groups: dict[Any, list[int]] = defaultdict(list)
        for row, (stream, prompt) in enumerate(zip(self.streams, self.prompts, strict=True)):
            layout = prompt.encoded.layout()
            below = tuple(id(edit) for edit in stream.edits if acts_before(edit, layout.prompt_len - 1, layout))
            adapters = tuple(lora.key for lora in stream.adapters)
            groups[(prompt.encoded.ids, adapters, below)].append(row)
        return list(groups.values())

    def families(self, prompts: Sequence[Sequence[int]]) -> list[tuple[int, list[int]]]:
        """Numbers of the rows whose prompts begin alike, each family with the number of first tokens that run once.

        Adapters and edits below that token are equal too. The rows that share nothing are one family with 0.
        """
        families: list[tuple[int, list[int]]] = []
        for number in sorted(range(len(prompts)), key=lambda n: tuple(prompts[n])):  # neighbours are most alike
            if families:
                members = [*families[-1][1], number]
                ends = [prompts[members[0]], prompts[number]]  # what the first and the last share, all share
                shared = min(_common(*ends), *(len(prompts[member]) - 1 for member in members))
                if shared >= max(_LEAST_SHARED, max(len(prompts[member]) for member in members) / 2):
                    families[-1] = shared, members
                    continue
            families.append((0, [number]))
        alone, found = [], []
        for shared, members in families:
            alike: dict[Any, list[int]] = defaultdict(list)
            for number in members:
                alike[self._acting_before(number, shared)].append(number)
            for same in alike.values():
                if shared and len(same) > 1:
                    found.append((shared, sorted(same)))
                else:
                    alone += same
        return [*found, (0, sorted(alone))] if alone else found

    def bare_below(self, end: int) -> bool:
        """Whether no row has adapters, or an edit that touches a position below `end`."""
        return all(self._acting_before(row, end) == ((), ()) for row in range(len(self.streams)))

    def _acting_before(self, row: int, end: int) -> tuple[Any, ...]:
        """The adapters of a row, and the edits that touch a position below `end` with the positions they touch."""
        stream, layout = self.streams[row], self.prompts[row].encoded.layout()
        touched = [(id(edit), places(edit.where, np.arange(end), layout)) for edit in stream.edits]
        edits = tuple((edit, where.tobytes()) for edit, where in touched if where.any())
        return (tuple(lora.key for lora in stream.adapters), edits)


class Pass:
    """Hooks of some rows, installed; runs forward passes over them."""

    def __init__(self, lm: LanguageModel, rows: Rows, cost: Cost) -> None:
        self.lm = lm
        self.rows = rows
        self.cost = cost
        layouts = [prompt.encoded.layout() for prompt in rows.prompts]
        self.edits = RowEdits([stream.edits for stream in rows.streams], layouts, lm.sites)
        self.exits: dict[Site, Tensor] = {}
        self._keep: slice | Tensor = slice(None)
        self._adapter_flops = adapter_flops([stream.adapters for stream in rows.streams])
        self._stack = contextlib.ExitStack()
        self._wanted = {exit.site for stream in rows.streams for exit in stream.exits}

    def __enter__(self) -> Pass:
        transforms = self.edits.transforms()
        for site in self._wanted:  # after the edits of the same site, so that exits see them
            transforms.setdefault(site, []).append(partial(self._read, site))
        try:
            self._stack.enter_context(self.lm.sites.hooked(transforms))
            if any(stream.adapters for stream in self.rows.streams):
                self._stack.enter_context(self.lm.adapted([stream.adapters for stream in self.rows.streams]))
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self.cost.edits_prefill += self.edits.fired_prompt
        self.cost.edits_decode += self.edits.fired_decode

    def _read(self, site: Site, x: Tensor) -> None:
        self.exits[site] = self._kept(x)

    def _kept(self, x: Tensor) -> Tensor:
        """x [R, T, D] at the columns to keep: the same of all rows, or each row's own [R, k]."""
        if isinstance(self._keep, slice):
            return x[:, self._keep]
        return x[torch.arange(len(x), device=x.device)[:, None], self._keep.to(x.device)]

    def run(
        self, ids: np.ndarray, positions: np.ndarray, mask: Tensor, cache: Any, *, keep: slice | Tensor = slice(None)
    ) -> Tensor:
        """Final hidden states [R, kept, D] of a pass over ids [R, T] at absolute positions [R, T] (-1 = padding)."""
        self._keep = keep
        self.count(ids, positions, mask)
        device = self.lm.device
        hidden = self.lm.hidden(
            torch.from_numpy(ids).to(device), mask=mask, positions=torch.from_numpy(positions).to(device), cache=cache
        )
        return self._kept(hidden)

    def count(self, ids: np.ndarray, positions: np.ndarray, mask: Tensor) -> None:
        """Add a pass to the cost, and prepare its edits."""
        self.edits.at(positions)
        lengths = np.asarray(self.rows.prompt_lengths())[:, None]
        real = positions >= 0
        prompt = int((real & (positions < lengths)).sum())
        self.cost.forward_passes += 1
        self.cost.prefill_tokens += prompt
        self.cost.decode_tokens += int(real.sum()) - prompt
        count, tokens = ids.shape
        row = self.lm.sizes.blocks(tokens, past=mask.shape[1] - tokens) + tokens * self._adapter_flops
        self.cost.flops += count * row


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens at which both begin alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def of_like_length(prompts: Mapping[Name, Sequence[int]]) -> list[list[Name]]:
    """Names of the prompts in groups to run together: none is padded by more than a quarter and 16 tokens."""
    groups: list[list[Name]] = []
    for number in sorted(prompts, key=lambda number: -len(prompts[number])):
        longest = len(prompts[groups[-1][0]]) if groups else 0
        if not prompts[number]:
            continue
        if not groups or longest - len(prompts[number]) > max(16, longest // 4):
            groups.append([])
        groups[-1].append(number)
    return [sorted(group) for group in groups]


def of_like_answers(requests: Sequence[Request], continuations: Sequence[Sequence[int]]) -> list[list[int]]:
    """Numbers of the requests in groups to score together, those of one sample in one, by the longest of its continuations."""
    longest: dict[str, Sequence[int]] = {}
    for request, continuation in zip(requests, continuations, strict=True):
        longest[request.key] = max(longest.get(request.key, ()), continuation, key=len)
    group_of = {key: number for number, group in enumerate(of_like_length(longest)) for key in group}
    groups: dict[int, list[int]] = defaultdict(list)
    for number, request in enumerate(requests):
        groups[group_of.get(request.key, 0)].append(number)
    return list(groups.values())
