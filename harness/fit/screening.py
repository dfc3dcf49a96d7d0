"""First-order screening: which heads may matter, from one forward and one backward pass for all heads.

With a_h the output of head h (its slice of the output projection's input), a'_h what the mask makes of it and g_h the
gradient of a reference's mean token NLL at a_h, masking h alone changes that loss by about
    sum over masked positions of  g_h . (a'_h - a_h)
`zero` makes a'_h zero. `uniform` makes it the mean of the visible values, which no small change of the query reaches, so
a'_h is computed: a second row of the batch reads the first one's residual at every block, and its queries are zero.
Heads are ranked by the mean over samples of the estimate's size (Michel et al., Are Sixteen Heads Really Better than
One?, NeurIPS 2019, section 4.1): its sign is unsure for the very heads whose effect is large and so not linear.
`until_sure` measures heads in this order until the next one's estimate, times the worst underestimation seen so far, is below
the K-th best exact score. AtP* (Kramár et al., 2024) corrects what makes estimates too small: saturated attention, which
masking the output does not meet, and effects that cancel out, with a backward pass a layer (GradDrop); that costs as much as
measuring the heads exactly here, where they share a prefill, so the margin stands for it.
`bench/screening.py` measures how many of the best heads are found. The backward pass keeps the activations of the
masked positions of one sample, so `scope=all` takes memory in proportion to the prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from harness.engine.encoder import Encoded
from harness.engine.model import LanguageModel
from harness.engine.prompt_variants import first_position
from harness.engine.sites import Transform
from harness.errors import ContextTooLong
from harness.fit.heads import Head, Operator, mask
from harness.plan import Site, Where


def first_order(
    lm: LanguageModel, prompt: Encoded, continuation: Sequence[int], operator: Operator, where: Where
) -> Tensor:
    """Estimated rise of the continuation's mean token NLL in nats when each head alone is masked: [layers, H] float64.

    Positions below the first masked one run without a gradient. Raises ContextTooLong as `score_variants` does.
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
    cache = lm.new_cache() if start else None
    if start:
        with torch.no_grad():
            lm.hidden(tokens[:1, :start], mask=ones[:1, :start], positions=positions[:1, :start], cache=cache)
        assert cache is not None
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


def until_sure(
    estimates: Tensor, best: int, groups: Sequence[Sequence[int]], measure: Callable[[list[Head]], Tensor]
) -> tuple[Tensor, list[Head]]:
    """Exact scores [n, layers, H], NaN where not measured, and the heads that were, in their order.

    `measure` gives the exact scores [n, heads] of some heads; `best` is how many of the best have to be right, in each group.
    """
    _, layers, heads = estimates.shape
    order = shortlist(estimates, layers * heads, groups)
    exact = torch.full_like(estimates, math.nan)
    done, step = 0, 4 * best
    while done < len(order) and not (done and sure(estimates, exact, best, groups)):
        part = order[done : done + step]
        exact[:, [layer for layer, _ in part], [head for _, head in part]] = measure(part).to(exact)
        done += len(part)
        step = done
    return exact, order[:done]


def sure(estimates: Tensor, exact: Tensor, best: int, groups: Sequence[Sequence[int]] = ()) -> bool:
    """Whether no head that was not measured (NaN in `exact`) can be among the `best`, in any group of samples.

    A head's exact score is taken to be at most `margin` times its estimate, the margin being the largest such ratio of those
    that were measured, at least 1. Where the K-th best score is not positive nothing is sure.
    """
    for group in [list(group) for group in groups if group] or [list(range(len(exact)))]:
        size, score = estimates[group].abs().mean(0).flatten(), exact[group].mean(0).flatten()
        known = ~score.isnan()
        least = score[known].topk(min(best, int(known.sum()))).values[-1]
        margin = (score[known] / size[known].clamp_min(1e-300)).amax().clamp_min(1.0)
        left = size[~known]
        if left.numel() and not (least > 0 and float(left.amax() * margin) < float(least)):
            return False
    return True


def recall(exact: Tensor, estimates: Tensor, top: int, candidates: int) -> float:
    """Share of the `top` heads of highest mean exact score that are on the shortlist of `candidates`; [n, layers, H] both."""
    best = {divmod(i, exact.shape[2]) for i in exact.mean(0).flatten().topk(top).indices.tolist()}
    return len(best & set(shortlist(estimates, candidates))) / top
