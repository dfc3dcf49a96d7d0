"""Activation patching: put activations of one prompt into the run of another, site by site, as rows of shared passes.

Two prompts differ in a few tokens (the identity of a persona) and nowhere else, so position t of one is position t of
the other. Every patched run is a variant of one prompt (`harness.engine.prompt_variants`): a block's 2 + H sites at three sets of
positions are rows of the same passes, and blocks below the patched one are not run again.

Paper: Poonia and Jain, Dissecting Persona-Driven Reasoning in Language Models via Activation Patching, Findings of EMNLP
2025. Neither its prompts nor its metric nor code could be had, so conventions are ours; sites are those of TransformerLens
(mlp_out, attn_out, and z of query heads) without its folding of norms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from harness.data import Example
from harness.edits import Replace
from harness.engine.capture import attention_to, capture
from harness.engine.encoder import Encoded
from harness.engine.flops import Cost
from harness.engine.model import LanguageModel
from harness.engine.prompt_variants import choice_logprobs
from harness.engine.rows import Request
from harness.errors import UsageError
from harness.plan import ALL, LAST_PROMPT, At, Edit, Layout, Part, Plan, Site, Where
from harness.run.system import whole
from harness.task import System

WHOLE_PARTS: tuple[Part, ...] = ("mlp_out", "attn_out")
PARTS: tuple[Part, ...] = (*WHOLE_PARTS, "heads_out")
POSITIONS = ("all", "identity", "last")
TOLERANCE_NATS: Mapping[torch.dtype, float] = {torch.float64: 1e-8, torch.float32: 1e-3}
"""How far an identity that holds in exact arithmetic may be off; 16-bit numbers may be off by `COARSE_NATS`."""
COARSE_NATS = 0.25

Activations: TypeAlias = "Mapping[Site, Tensor]"
"""Site -> [T, D]."""


@dataclass(frozen=True)
class Decision:
    """A prompt up to the token in which the choices differ, and those tokens."""

    request: Request
    tokens: tuple[int, ...]

    @property
    def encoded(self) -> Encoded:
        return self.request.prompts[0].encoded

    @property
    def edits(self) -> tuple[Edit, ...]:
        """What the method does in every run, patched or not."""
        return self.request.plan.streams[0].edits


@dataclass(frozen=True)
class Patched:
    """One run with activations of the other prompt: log-probabilities in nats of the decision's C tokens."""

    base: Tensor
    """[C], unpatched."""
    source: Tensor
    """[C], of the prompt the activations come from."""
    sites: Mapping[tuple[Part, str], Tensor]
    """(part, positions) -> [layers, C], of `heads_out` [layers, H, C]."""
    itself: Tensor
    """[C], every mlp_out and attn_out replaced by the run's own."""
    embedding: Tensor
    """[C], what enters block 0 replaced at the identity alone."""
    stream: Tensor
    """[layers, C], what leaves a block replaced at all positions (those before the identity are the same in both)."""
    all_heads: Tensor | None
    """[layers, C], each head of a block replaced on its own, all at once; None where no heads are patched."""

    def checks(self) -> dict[str, float]:
        """Identities of patching, each with the most that a difference of two tokens is off, in nats."""
        found = {
            "self_patch_is_0": _off(self.itself, self.base),
            "identity_embedding_is_1": _off(self.embedding, self.source),
            "residual_stream_is_1": _off(self.stream, self.source),
        }
        if self.all_heads is not None:
            found["all_heads_are_attention"] = _off(self.all_heads, self.sites["attn_out", "all"])
        return found


@dataclass(frozen=True)
class Experiment:
    denoised: Patched
    """The corrupted run with clean activations."""
    noised: Patched
    """The clean run with corrupted activations."""
    attention: Mapping[str, Tensor]
    """Run -> [layers, H, 2], attention to the identity (`harness.engine.capture.attention_to`): clean, corrupted, and each of
    them with the first MLP's output at the identity from the other: denoised, noised."""


@dataclass(frozen=True)
class _From:
    first: int

    def __call__(self, positions: np.ndarray, layout: Layout) -> np.ndarray:
        return positions >= self.first


def decide(asked: System, example: Example) -> Decision:
    """The example's prompt and the words its choices begin with alike. Raises UsageError where no token decides."""
    system = whole(asked)
    plan = system.plan(example)
    stream = plan.streams[0]
    if plan.answer is not None or len(plan.streams) > 1 or stream.adapters or stream.exits or stream.early:
        raise UsageError(
            f"method {type(system.method).__name__!r} is more than one pass with edits; patching needs a method that is, "
            "as plain, persona_vector and clamp"
        )
    encoder, rendered = system.lm.encoder, stream.prompt.render()
    ids = [encoder.answer(choice, rendered) for choice in example.choices]
    shared = 0
    while min(map(len, ids)) > shared and len({some[shared] for some in ids}) == 1:
        shared += 1
    tokens = tuple(some[shared] for some in ids if len(some) > shared)
    if len(set(tokens)) < len(ids):
        pieces = ", ".join(f"{choice!r} = {list(some)}" for choice, some in zip(example.choices, ids, strict=True))
        raise UsageError(
            f"no single token decides between the choices ({pieces}); give words that an answer begins with, as in "
            "--task_set 'lead=('"
        )
    request = system.decoder.prepare(example.id, plan, shared + 1)
    (prompt,) = request.prompts
    encoded = replace(prompt.encoded, ids=(*prompt.encoded.ids, *ids[0][:shared]))
    return Decision(replace(request, prompts=(replace(prompt, encoded=encoded),)), tokens)


def identity(a: Encoded, b: Encoded) -> tuple[int, ...] | None:
    """Positions at which two prompts of equal length differ; None where they are not of equal length, or do not differ."""
    if len(a.ids) != len(b.ids):
        return None
    return tuple(at for at, (x, y) in enumerate(zip(a.ids, b.ids, strict=True)) if x != y) or None


def unpatched(lm: LanguageModel, decision: Decision, cost: Cost) -> Tensor:
    """Log-probabilities in nats [C] of the decision's tokens."""
    return choice_logprobs(lm, decision.encoded, decision.tokens, [decision.edits], cost)[0]


def experiment(
    lm: LanguageModel,
    clean: Decision,
    corrupted: Decision,
    identity: Sequence[int],
    cost: Cost,
    *,
    heads: bool = True,
) -> Experiment:
    """Every site patched in both directions; what the passes take is added to `cost`. Without `heads`, whole parts alone."""
    read: tuple[Part, ...] = (*(PARTS if heads else WHOLE_PARTS), "block_out")
    sites = [Site(0, "block_in"), *(Site(n, part) for n in range(lm.sites.layers) for part in read)]
    theirs, own = capture(lm, [clean.request, corrupted.request], sites, ALL)
    first, at = Site(0, "mlp_out"), At(tuple(identity))
    requests = {
        "clean": clean.request,
        "corrupted": corrupted.request,
        "denoised": _edited(corrupted.request, Replace(first, theirs[first], at)),
        "noised": _edited(clean.request, Replace(first, own[first], at)),
    }
    attention = attention_to(lm, list(requests.values()), [identity] * len(requests))
    tokens = len(clean.encoded.ids)
    cost.forward_passes += 2
    cost.prefill_tokens += (2 + len(requests)) * tokens
    cost.flops += (2 + len(requests)) * lm.sizes.blocks(tokens)
    denoised = _scores(lm, corrupted, variants(lm, theirs, own, identity, heads=heads), cost)
    noised = _scores(lm, clean, variants(lm, own, theirs, identity, heads=heads), cost)
    return Experiment(
        _patched(lm, denoised, noised["base",][0]),
        _patched(lm, noised, denoised["base",][0]),
        dict(zip(requests, attention, strict=True)),
    )


def variants(
    lm: LanguageModel, source: Activations, own: Activations, identity: Sequence[int], *, heads: bool = True
) -> dict[tuple[str, ...], list[tuple[Edit, ...]]]:
    """What is replaced in each run of one direction: by (part, positions), block by block; nothing (`base`); by check."""
    layers, width = range(lm.sites.layers), lm.sites.head_dim

    def head(layer: int, number: int, where: Where) -> Replace:
        site, column = Site(layer, "heads_out"), number * width
        return Replace(site, source[site][:, column : column + width], where, column=column)

    # before the identity both runs are the same: there is nothing to replace, and the rows share that beginning
    everywhere = _From(min(identity))
    places: dict[str, Where] = {"all": everywhere, "identity": At(tuple(identity)), "last": LAST_PROMPT}
    found: dict[tuple[str, ...], list[tuple[Edit, ...]]] = {("base",): [()]}
    for name, where in places.items():
        for part in WHOLE_PARTS:
            whole = [Site(n, part) for n in layers]
            found[part, name] = [(Replace(site, source[site], where),) for site in whole]
        if heads:
            found["heads_out", name] = [(head(n, h, where),) for n in layers for h in range(lm.sites.heads)]
    itself = [Site(n, part) for n in layers for part in ("attn_out", "mlp_out")]
    entry, leaving = Site(0, "block_in"), [Site(n, "block_out") for n in layers]
    found["itself",] = [tuple(Replace(site, own[site], everywhere) for site in itself)]
    found["embedding",] = [(Replace(entry, source[entry], places["identity"]),)]
    found["stream",] = [(Replace(site, source[site], everywhere),) for site in leaving]
    if heads:
        found["all_heads",] = [tuple(head(n, h, everywhere) for h in range(lm.sites.heads)) for n in layers]
    return found


def _scores(
    lm: LanguageModel, base: Decision, named: Mapping[tuple[str, ...], Sequence[tuple[Edit, ...]]], cost: Cost
) -> dict[tuple[str, ...], Tensor]:
    """Log-probabilities of the decision's tokens under each of the named edits, [runs, C] on the CPU."""
    rows = [(*base.edits, *edits) for some in named.values() for edits in some]
    scores = choice_logprobs(lm, base.encoded, base.tokens, rows, cost).cpu()
    return dict(zip(named, scores.split([len(some) for some in named.values()]), strict=True))


def _patched(lm: LanguageModel, found: Mapping[tuple[str, ...], Tensor], source: Tensor) -> Patched:
    sites: dict[tuple[Part, str], Tensor] = {}
    for part in PARTS:
        for name in (name for name in POSITIONS if (part, name) in found):
            rows = found[part, name]
            sites[part, name] = rows.unflatten(0, (-1, lm.sites.heads)) if part == "heads_out" else rows
    one = {name: found[name,][0] for name in ("base", "itself", "embedding")}
    return Patched(
        one["base"], source, sites, one["itself"], one["embedding"], found["stream",], found.get(("all_heads",))
    )


def tolerance_nats(dtype: torch.dtype) -> float:
    """How far a check may be off."""
    return TOLERANCE_NATS.get(dtype, COARSE_NATS)


def _edited(request: Request, edit: Edit) -> Request:
    (stream,) = request.plan.streams
    return replace(request, plan=Plan((replace(stream, edits=(*stream.edits, edit)),), request.plan.mix))


def _off(patched: Tensor, wanted: Tensor) -> float:
    """The most by which a difference of two of the C tokens is off."""
    error = patched - wanted
    return float((error.amax(-1) - error.amin(-1)).max())
