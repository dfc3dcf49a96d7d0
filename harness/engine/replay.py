"""What a batch that was answered beside others costs alone: the same decoding again, on a model that computes nothing.

The cost of a record is that of its method, whatever command made it, and a sweep answers the batches of many methods in shared
forward passes. So once the answers are known, each batch is decoded again by the very code that counts costs, with hidden
states of width 1, caches of one number a token, and the known tokens chosen: which prompts run once, when finished samples
leave the batch and how far rows are padded are what they are in a run of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from harness.engine.decode import Chooser, Decoder
from harness.engine.flops import Cost
from harness.engine.model import LanguageModel
from harness.engine.rows import Pass, Request
from harness.plan import Generated, Sampling, StreamOutput


def cost_of_generating(
    decoder: Decoder,
    requests: Sequence[Request],
    answers: Sequence[Generated],
    *,
    max_new_tokens: int,
    stop: Sequence[str],
) -> Cost:
    """Of `decoder.generate` for these requests, where it gave these answers."""
    idle = _Idle(decoder, answers)
    if requests:
        idle.generate(_unmixed(requests), max_new_tokens=max_new_tokens, stop=stop)
    return idle.cost


def cost_of_scoring(decoder: Decoder, requests: Sequence[Request], continuations: Sequence[Sequence[int]]) -> Cost:
    """Of `decoder.score` for these requests and continuations."""
    idle = _Idle(decoder, ())
    if requests:
        idle.score(_unmixed(requests), continuations)
    return idle.cost


def _unmixed(requests: Sequence[Request]) -> list[Request]:
    """The same requests, equal where they were the same object, with a mix that takes no time."""
    made = {id(request): replace(request, plan=replace(request.plan, mix=_Untouched())) for request in requests}
    return [made[id(request)] for request in requests]


@dataclass(frozen=True)
class _Untouched:
    """Every token as likely as any other, as a model says whose logits are all 0."""

    def __call__(self, outputs: Sequence[StreamOutput]) -> Tensor:
        logits = outputs[0].logits
        return torch.full((), -math.log(logits.shape[-1]), dtype=logits.dtype).expand(logits.shape)


class _IdleModel(LanguageModel):
    """A model of the same sizes whose numbers are all 0 and take no memory."""

    def __init__(self, lm: LanguageModel) -> None:
        self.__dict__.update(vars(lm))
        self.device = torch.device("cpu")

    def new_cache(self) -> Any:
        return DynamicCache()

    def logits(self, hidden: Tensor) -> Tensor:
        return torch.zeros(()).expand(*hidden.shape[:-1], self.vocabulary)

    def early_logits(self, hidden: Tensor, *, final_norm: bool) -> Tensor:
        return self.logits(hidden)


class _IdlePass(Pass):
    """Counts, and keeps the lengths of caches."""

    def __enter__(self) -> Pass:
        return self

    def run(
        self, ids: np.ndarray, positions: np.ndarray, mask: Tensor, cache: Any, *, keep: slice | Tensor = slice(None)
    ) -> Tensor:
        self._keep = keep
        self.count(ids, positions, mask)
        rows, tokens = ids.shape
        if cache is not None:
            nothing = torch.zeros(rows, 1, tokens, 1)
            cache.update(nothing, nothing, 0)
        hidden = self._kept(torch.zeros(rows, tokens, 1))
        self.exits = dict.fromkeys(self._wanted, hidden)
        return hidden


class _Idle(Decoder):
    """A decoder that gives the known answers."""

    passes = _IdlePass

    def __init__(self, decoder: Decoder, answers: Sequence[Generated]) -> None:
        super().__init__(_IdleModel(decoder.lm))
        self._begins_once = decoder._begins_once
        self.answers = answers

    def chooser(self, sampling: Sampling, requests: Sequence[Request], steps: int) -> Chooser:
        return self._known

    def _known(self, logp: Tensor, samples: Sequence[int], step: int) -> list[int]:
        """A sample that is done stays in the batch for a while, and what it is fed does not matter."""
        answers = [self.answers[sample].ids for sample in samples]
        return [ids[step] if step < len(ids) else 0 for ids in answers]
