"""Read activations at a Site, with the same positions and the same code path that edits use, so no off-by-one.

Reading while generating is reading the teacher-forced response: generation and scoring see the same activations
(promise 1 of `harness.run.contract`), and one pass over the whole sequence is faster than a hook in the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from harness.engine.attention import Attention, reading
from harness.engine.model import LanguageModel, pad_left
from harness.engine.row_edits import RowEdits
from harness.engine.rows import Request
from harness.engine.sites import Transform
from harness.plan import Site, Where, places

QUERIES = 256
"""Positions of a row whose attention weights exist at once."""


@torch.inference_mode()
def capture(
    lm: LanguageModel,
    requests: Sequence[Request],
    sites: Sequence[Site],
    where: Where,
    responses: Sequence[Sequence[int]] | None = None,
) -> list[dict[Site, Tensor]]:
    """Activations of each request's first stream, under its edits, at the positions of `where`: site -> [P, D].

    For `pattern` it is the attention weights of the query heads, [P, H, positions of the row]. `responses` are token
    ids fed after the prompts (none by default). A site's activation is read after its edits.
    """
    rows = [
        (*request.prompts[0].encoded.ids, *response)
        for request, response in zip(requests, responses or [()] * len(requests), strict=True)
    ]
    layouts = [request.prompts[0].encoded.layout() for request in requests]
    _, positions = pad_left(rows, 0)
    chosen = np.stack([places(where, p, layout) & (p >= 0) for p, layout in zip(positions, layouts, strict=True)])
    first = int(chosen.any(axis=0).argmax()) if chosen.any() else positions.shape[1]
    read: dict[Site, Tensor] = {}

    def read_pattern(site: Site, attention: Attention) -> None:
        read[site] = attention.weights(slice(first, None)).transpose(1, 2)

    transforms = {site: partial(read.__setitem__, site) for site in sites if site.part != "pattern"}
    readers = {site.layer: partial(read_pattern, site) for site in sites if site.part == "pattern"}
    _forward(lm, requests, rows, transforms, readers)
    out: list[dict[Site, Tensor]] = [{} for _ in requests]
    for r, row in enumerate(out):
        for site in sites:
            at = torch.from_numpy(chosen[r]).to(read[site].device)
            if site.part == "pattern":
                row[site] = read[site][r][at[first:]][..., -len(rows[r]) :]
            else:
                row[site] = read[site][r][at]
    return out


@torch.inference_mode()
def pooled(
    lm: LanguageModel,
    requests: Sequence[Request],
    sites: Sequence[Site],
    wheres: Sequence[Where],
    responses: Sequence[Sequence[int]],
) -> tuple[Tensor, Tensor]:
    """Means over the positions of each `where`, [R, W, S, D] on the CPU, and the mean norms there, [R, W, S]; fp32.

    As `capture`, but pooled in the hook: no activation outlives its block. A where that names no position gives NaN.
    """
    rows = [(*request.prompts[0].encoded.ids, *response) for request, response in zip(requests, responses, strict=True)]
    layouts = [request.prompts[0].encoded.layout() for request in requests]
    _, positions = pad_left(rows, 0)
    chosen = np.stack(
        [
            [places(where, p, layout) & (p >= 0) for where in wheres]
            for p, layout in zip(positions, layouts, strict=True)
        ]
    )
    padding = torch.from_numpy(positions < 0)[..., None]
    weights = torch.from_numpy(chosen).float()
    weights /= weights.sum(dim=-1, keepdim=True)
    means = torch.zeros(len(rows), len(wheres), len(sites), lm.sites.width)
    norms = torch.zeros(means.shape[:-1])

    def read(number: int, x: Tensor) -> None:
        x, weight = x.float().masked_fill(padding.to(x.device), 0), weights.to(x.device)  # 0 * NaN would be NaN
        means[:, :, number] = torch.bmm(weight, x).cpu()
        norms[:, :, number] = torch.bmm(weight, x.norm(dim=-1, keepdim=True))[..., 0].cpu()

    _forward(lm, requests, rows, {site: partial(read, number) for number, site in enumerate(sites)}, {})
    return means, norms


@torch.inference_mode()
def most_attended(lm: LanguageModel, requests: Sequence[Request], responses: Sequence[Sequence[int]]) -> list[Tensor]:
    """Where each head looks while it predicts each response token: positions [T, layers, H], first stream, as edited.

    The token at response index t is predicted from position prompt_len - 1 + t. Only the winners are kept, so memory
    holds the weights of one block at a time.
    """
    rows = [
        (*request.prompts[0].encoded.ids, *response[:-1]) for request, response in zip(requests, responses, strict=True)
    ]
    last = max(len(response) for response in responses)
    longest = max(len(row) for row in rows)
    best: dict[int, Tensor] = {}

    def read_best(layer: int, attention: Attention) -> None:
        best[layer] = attention.weights(slice(longest - last, None)).argmax(-1).cpu()

    _forward(lm, requests, rows, {}, {layer: partial(read_best, layer) for layer in range(lm.sites.layers)})
    columns = torch.stack([best[layer] for layer in range(lm.sites.layers)], dim=1)  # [R, layers, H, t]
    return [
        columns[r, :, :, last - len(response) :].permute(2, 0, 1) - (longest - len(rows[r]))
        for r, response in enumerate(responses)
    ]


@torch.inference_mode()
def attention_to(lm: LanguageModel, requests: Sequence[Request], keys: Sequence[Sequence[int]]) -> list[Tensor]:
    """How much each head attends to the positions `keys` of its row, summed over them: [layers, H, 2], first stream, as edited.

    [..., 0] is the mean over the prompt's positions behind the last key, [..., 1] that of the last position.
    """
    rows = [request.prompts[0].encoded.ids for request in requests]
    longest = max(len(row) for row in rows)
    padding = [longest - len(row) for row in rows]
    first = min(lead + max(at) + 1 for lead, at in zip(padding, keys, strict=True))
    found = torch.zeros(len(rows), lm.sites.layers, lm.sites.heads, 2, dtype=torch.float64)

    def read(layer: int, attention: Attention) -> None:
        for start in range(first, longest, QUERIES):  # the weights of a long prompt do not fit the memory at once
            weights = attention.weights(slice(start, start + QUERIES))
            for r, (lead, at) in enumerate(zip(padding, keys, strict=True)):
                to = weights[r, ..., [lead + key for key in at]].double().sum(-1).cpu()  # [H, t]
                behind = lead + max(at) + 1
                found[r, layer, :, 0] += to[:, max(0, behind - start) :].sum(-1) / (longest - behind)
                found[r, layer, :, 1] = to[:, -1]

    _forward(lm, requests, rows, {}, {layer: partial(read, layer) for layer in range(lm.sites.layers)})
    return list(found)


def _forward(
    lm: LanguageModel,
    requests: Sequence[Request],
    rows: Sequence[Sequence[int]],
    transforms: Mapping[Site, Transform],
    readers: Mapping[int, Callable[[Attention], None]],
) -> None:
    """One pass over token rows [R, T], each under the edits and adapters of its request's first stream."""
    streams = [request.plan.streams[0] for request in requests]
    layouts = [request.prompts[0].encoded.layout() for request in requests]
    ids, positions = pad_left(rows, 0)
    edits = RowEdits([stream.edits for stream in streams], layouts, lm.sites)
    edits.at(positions)
    hooks = edits.transforms()
    for site, transform in transforms.items():
        hooks.setdefault(site, []).append(transform)
    device = lm.device
    with lm.sites.hooked(hooks), lm.adapted([stream.adapters for stream in streams]), reading(lm.sites, readers):
        lm.hidden(
            torch.from_numpy(ids).to(device),
            mask=torch.from_numpy((positions >= 0).astype(np.int64)).to(device),
            positions=torch.from_numpy(positions).to(device),
        )
