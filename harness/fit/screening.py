"""First-order screening: which heads may matter, from one forward and one backward pass for all heads.

With a_h the output of head h (its slice of the output projection's input), a'_h what the mask makes of it and g_h the
gradient of a reference's mean token NLL at a_h, masking h alone changes that loss by about
    sum over masked positions of  g_h . (a'_h - a_h)
`zero` makes a'_h zero. `uniform` makes it the mean of the visible values, which no small change of the query reaches, so
a'_h is computed: a second row of the batch reads the first one's residual at every block, and its queries are zero.
Heads are ranked by the mean over samples of the estimate's size (Michel et al., Are Sixteen Heads Really Better than
One?, NeurIPS 2019, section 4.1): its sign is unsure for the very heads whose effect is large and so not linear.
`until_sure` measures heads exactly: first the 2 K of largest estimate and the two of largest estimate in each block, then
all whose estimate times a margin reaches the K-th best exact score, until none is left. A block's margin is the worst
underestimation seen so far in it and the blocks beside it, at least 1, times `SLACK`: effects in the first blocks are
underestimated more than others. What this shows: the scores of the heads it measured are exact, and another head is among the
best only if its estimate is too small by more than that. It is no proof: a head that was not measured may be underestimated
more than all beside it. AtP* (Kramár et al., 2024) corrects what makes estimates too small: saturated attention, which
masking the output does not meet, and effects that cancel out, with a backward pass a layer (GradDrop). Here that costs about
as much as measuring the heads of a small model, which share a prefill; so a margin seen on the model itself stands for it.
`bench/screening.py` measures how many of the best heads are found. The backward pass keeps the activations of the
masked positions of one sample, so `scope=all` takes memory in proportion to the prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from harness.engine.encoder import Encoded
from harness.engine.model import LanguageModel
from harness.engine.prompt_variants import Beginnings, first_position
from harness.engine.sites import Transform
from harness.errors import ContextTooLong
from harness.fit.heads import Head, Operator, mask
from harness.plan import Site, Where

SLACK = 1.25
"""What a block's margin is multiplied by, for heads that are underestimated a little more than all that were measured."""


def first_order(
    lm: LanguageModel,
    prompt: Encoded,
    continuation: Sequence[int],
    operator: Operator,
    where: Where,
    begun: Beginnings | None = None,
) -> Tensor:
    """Estimated rise of the continuation's mean token NLL in nats when each head alone is masked: [layers, H] float64.

    Positions below the first masked one run without a gradient, or come from `begun`. Raises ContextTooLong as `score_variants` does.
    """
    sites, layout = lm.sites, prompt.layout()
    ids = [*prompt.ids, *continuation[:-1]]
    if len(ids) + 1 > lm.max_length:
        raise ContextTooLong(f"{len(ids) + 1} tokens exceed the context of {lm.max_length}")
    start = first_position(mask({(0, 0): 0.0}, operator, sites.head_dim, where), layout)
    rows = 2 if operator == "uniform" else 1
    tokens = torch.tensor([ids] * rows, device=lm.device)
    positions = torch.arange(len(ids), device=lm.device).expand(rows, -1)
    ones = torch.ones_like(tokens)
    cache = (begun or Beginnings(lm)).of(ids[:start]) if start else None
    if cache is not None and rows > 1:
        cache.batch_repeat_interleave(rows)
    outputs: dict[int, Tensor] = {}

    def read(layer: int, x: Tensor) -> Tensor:
        if not x.requires_grad:  # the first block's: no weight asks for a gradient
            x = x.detach().requires_grad_()
        outputs[layer] = x
        return x

    transforms: dict[Site, list[Transform]] = {
        Site(layer, "heads_out"): [partial(read, layer)] for layer in range(sites.layers)
    }
    if operator == "uniform":
        for layer in range(sites.layers):
            transforms[Site(layer, "block_in")] = [lambda x: torch.cat([x[:1], x[:1].detach()])]
            transforms[Site(layer, "queries")] = [lambda x: torch.cat([x[:1], torch.zeros_like(x[1:])])]
    with torch.enable_grad(), sites.hooked(transforms):
        hidden = lm.hidden(tokens[:, start:], mask=ones, positions=positions[:, start:], cache=cache)
        logp = lm.logits(hidden[:1, -len(continuation) :]).log_softmax(-1)[0]
        target = torch.tensor(continuation, device=logp.device)
        loss = -logp.gather(1, target[:, None]).mean()
        gradients = torch.autograd.grad(loss, [outputs[layer] for layer in range(sites.layers)])
    masked = torch.from_numpy(where(np.arange(start, len(ids)), layout))
    rises = []
    for layer, gradient in enumerate(gradients):
        output = outputs[layer].detach()
        change = -output[0] if rows == 1 else output[1] - output[0]
        by_position = (gradient[0].double() * change.double()).unflatten(-1, (sites.heads, -1)).sum(-1)
        rises.append(by_position[masked.to(by_position.device)].sum(0).cpu())
    return torch.stack(rises)


def shortlist(estimates: Tensor, count: int, groups: Sequence[Sequence[int]] = ()) -> list[Head]:
    """The `count` heads to measure, by estimates [n, layers, H], best first.

    With groups of samples these are the best head of each group, then the second best of each, and so on.
    """
    size = estimates.abs().flatten(1)
    means = torch.stack([size[list(group)].mean(0) for group in groups if group] or [size.mean(0)])
    places = means.argsort(dim=1, descending=True, stable=True).argsort(dim=1).amin(0)
    chosen = places.argsort(stable=True)[:count]
    return [divmod(i, estimates.shape[2]) for i in chosen.tolist()]


class Screened(NamedTuple):
    """What `until_sure` found."""

    exact: Tensor
    """Exact scores [n, layers, H], NaN where not measured."""
    measured: list[Head]
    """In the order of screening."""
    margin: float
    """The largest of any block and group."""
    closest: float
    """The largest estimate times margin of a head that was not measured, as a share of the K-th best score: below 1. 0 where all
    were measured."""


def until_sure(
    estimates: Tensor, best: int, groups: Sequence[Sequence[int]], measure: Callable[[list[Head]], Tensor]
) -> Screened:
    """Measures heads, by estimates [n, layers, H], until no other can be among the `best`, in any group of samples.

    `measure` gives the exact scores [n, heads] of some heads.
    """
    _, layers, heads = estimates.shape
    order = shortlist(estimates, layers * heads, groups)
    of_block = [[head for head in order if head[0] == layer][:2] for layer in range(layers)]
    first = {*order[: 2 * best], *(head for some in of_block for head in some)}
    exact = torch.full_like(estimates, math.nan)
    part = [head for head in order if head in first]
    while part:
        exact[:, [layer for layer, _ in part], [head for _, head in part]] = measure(part).to(exact)
        share, margin = reach(estimates, exact, best, groups)
        part = [head for head in order if share[head] >= 1]
    measured = [head for head in order if not exact[0][head].isnan()]
    return Screened(exact, measured, margin, float(share.amax()))


def reach(estimates: Tensor, exact: Tensor, best: int, groups: Sequence[Sequence[int]] = ()) -> tuple[Tensor, float]:
    """Estimate times margin of each head that was not measured (NaN in `exact`), as a share of the K-th best exact score: [layers, H].

    The largest of the groups, 0 for heads that were measured, infinite where the K-th best score is not positive: nothing is sure
    then. Also the largest margin.
    """
    shares, margins = [], []
    for group in [list(group) for group in groups if group] or [list(range(len(exact)))]:
        size, score = estimates[group].abs().mean(0), exact[group].mean(0)
        known = ~score.isnan()
        least = float(score[known].topk(min(best, int(known.sum()))).values[-1])
        ratio = (score / size.clamp_min(1e-300)).where(known, torch.zeros_like(size)).amax(1)
        margin = torch.nn.functional.max_pool1d(ratio[None], 3, 1, 1)[0].clamp_min(1.0) * SLACK
        share = size * margin[:, None] / least if least > 0 else torch.full_like(size, math.inf)
        shares.append(share.where(~known, torch.zeros_like(share)))
        margins.append(float(margin.amax()))
    return torch.stack(shares).amax(0), max(margins)


def recall(exact: Tensor, estimates: Tensor, top: int, candidates: int) -> float:
    """Share of the `top` heads of highest mean exact score that are on the shortlist of `candidates`; [n, layers, H] both."""
    best = {divmod(i, exact.shape[2]) for i in exact.mean(0).flatten().topk(top).indices.tolist()}
    return len(best & set(shortlist(estimates, candidates))) / top
