"""How the streams of a plan become next-token log-probabilities.

First              the first stream alone
Contrast           (1 + w) l_0 - w l_1, CAD (Shi et al. 2024) and DPS (eq. 8) with constant w
EntropyContrast    the same with w = H(p_0) in nats, per position (DeCoRe, the released DPS)
ContextSum         l_0 + sum_i w_i (l_i - l_0), context steering with several contexts (He et al. 2025)
PlausibleContrast  log p_0 - w log p_1 over the plausible tokens (CoPe, Bu et al. 2025)
LayerContrast      l_0 - log p_M over the plausible tokens, M the layer farthest from the last (DoLa)

All return normalised log-probabilities [R, T, V]. Working on raw logits or on log-softmax gives the same result after
normalisation, because the weight is constant within a position. Methods import this module at their top and
`harness list` imports methods, so nothing here imports torch before it computes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from harness.plan import StreamOutput, _First

if TYPE_CHECKING:
    from torch import Tensor

First = _First


def contrast(expert: Tensor, amateur: Tensor, weight: Tensor) -> Tensor:
    """log softmax of (1 + w) expert - w amateur over the last axis; rows with w = 0 are the expert, exactly."""
    mixed = (1 + weight) * expert - weight * amateur
    return mixed.where(weight != 0, expert).log_softmax(-1)  # 0 * -inf would be NaN


def entropy_nats(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) in nats, last axis kept with size 1."""
    import torch

    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1, keepdim=True)


@dataclass(frozen=True)
class Contrast:
    """(1 + weight) * stream 0 - weight * stream 1, on logits."""

    linear: ClassVar[bool] = True
    """Whether it is a sum of the streams' logits with constant weights. What that gives a few tokens is then known, up to a
    number they share, from their log-probabilities alone: all that a server returns of a prompt."""

    weight: float

    def __call__(self, outputs: Sequence[StreamOutput]) -> Tensor:
        expert, amateur = outputs[0].logits, outputs[1].logits
        return contrast(expert, amateur, expert.new_tensor(self.weight))


@dataclass(frozen=True)
class EntropyContrast:
    """Contrast whose weight at each position is the entropy of stream 0 in nats, at most `cap`, times `strength`."""

    cap: float | None = None
    strength: float = 1.0
    gain: bool = False
    """Entropy of stream 1 minus that of stream 0 instead: what masking adds to the uncertainty, negative where it takes."""

    def __call__(self, outputs: Sequence[StreamOutput]) -> Tensor:
        expert, amateur = outputs[0].logits, outputs[1].logits
        weight = entropy_nats(amateur) - entropy_nats(expert) if self.gain else entropy_nats(expert)
        if self.cap is not None:
            weight = weight.clamp(max=self.cap)
        return contrast(expert, amateur, self.strength * weight)


@dataclass(frozen=True)
class ContextSum:
    """l_0 + sum_i weights[i] (l_i - l_0) on logits: stream 0 has no context, stream i >= 1 has context i."""

    linear: ClassVar[bool] = True

    weights: tuple[float, ...]

    def __call__(self, outputs: Sequence[StreamOutput]) -> Tensor:
        without = outputs[0].logits
        rest = 1 - sum(self.weights)
        mixed = without * rest if rest else without.new_zeros(())  # 0 * -inf would be NaN
        for weight, output in zip(self.weights, outputs[1:], strict=True):
            if weight:
                mixed = mixed + weight * output.logits
        return mixed.log_softmax(-1)


@dataclass(frozen=True)
class PlausibleContrast:
    """log p_0 - weight * log p_1 over the tokens with p_0(x) >= relative_top * max p_0; p_i is stream i's own distribution.

    Other tokens get probability 0. With a floor they stay: p_0 is 0 for them and made to sum to 1 without them, and both
    logarithms are of p + floor, as the released code of CoPe computes them.
    """

    weight: float
    relative_top: float = 0.0
    floor: float = 0.0

    def __call__(self, outputs: Sequence[StreamOutput]) -> Tensor:
        first, second = (output.logits.log_softmax(-1) for output in outputs)
        implausible = first == -math.inf
        if self.relative_top:
            implausible = implausible | (first < first.amax(-1, keepdim=True) + math.log(self.relative_top))
        if self.floor:
            kept = first.masked_fill(implausible, -math.inf).softmax(-1)
            return ((kept + self.floor).log() - self.weight * (second.exp() + self.floor).log()).log_softmax(-1)
        mixed = first - self.weight * second if self.weight else first  # 0 * -inf would be NaN
        return mixed.masked_fill(implausible, -math.inf).log_softmax(-1)


@dataclass(frozen=True)
class LayerContrast:
    """log p_N - strength * log p_M over the plausible tokens: p_N is stream 0, p_M the exit of it that is farthest from it.

    Farthest by Jensen-Shannon divergence, (KL(p_N || m) + KL(p_j || m)) / 2 with m = (p_N + p_j) / 2, for each row and
    position by itself; the first of equals. Plausible is p_N(x) >= relative_top * max p_N; other tokens get probability 0.
    """

    relative_top: float = 0.1
    strength: float = 1.0
    reversed_kl: bool = False
    """(KL(m || p_N) + KL(m || p_j)) / 2 instead."""

    def __call__(self, outputs: Sequence[StreamOutput]) -> Tensor:
        final = outputs[0].logits.log_softmax(-1)
        exits = [early.log_softmax(-1) for early in outputs[0].exits]
        chosen, farthest = exits[0], self._distance(final, exits[0])
        for early in exits[1:]:
            distance = self._distance(final, early)
            chosen = early.where(distance > farthest, chosen)
            farthest = distance.maximum(farthest)
        mixed = final - self.strength * chosen if self.strength else final
        impossible = final == -math.inf  # stays so, where -inf minus -inf would be NaN
        if self.relative_top:
            impossible = impossible | (final < final.amax(-1, keepdim=True) + math.log(self.relative_top))
        return mixed.masked_fill(impossible, -math.inf).log_softmax(-1)

    def _distance(self, final: Tensor, early: Tensor) -> Tensor:
        """Divergence of two log-distributions in nats, last axis kept with size 1."""
        middle = final.logaddexp(early) - math.log(2)
        if self.reversed_kl:
            return (_kl(middle, final) + _kl(middle, early)) / 2
        return (_kl(final, middle) + _kl(early, middle)) / 2


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats, last axis kept with size 1."""
    terms = log_p.exp() * (log_p - log_q)
    return terms.masked_fill(log_p == -math.inf, 0).sum(-1, keepdim=True)
