"""Extracts difference vectors: sampled answers, a judge's filter, activations pooled in the hook, differences of means.

Answers are kept as they are made, so that a killed extraction goes on and another of the same prompts (a universal vector
after single ones) costs no generation. Only sums [layers, D] are held, whatever the number and length of answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from harness.engine.capture import pooled
from harness.engine.prompt_variants import ROW_TOKENS
from harness.engine.rows import Request
from harness.errors import HarnessError
from harness.fit.difference_vectors import Extraction, Pair, Pooling
from harness.fit.kit import ModelKit, by_length
from harness.method import Fitted
from harness.plan import GENERATED, LAST_PROMPT, Layout, Plan, Sampling, Site, Stream, Where
from harness.task import Rating, Sample

AT_ONCE = 256
"""Answers of one stored part."""
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)


@dataclass(frozen=True)
class _WholePrompt:
    """The prompt without its BOS."""

    def __call__(self, positions: np.ndarray, layout: Layout) -> np.ndarray:
        return (positions >= (1 if layout.bos else 0)) & (positions < layout.prompt_len)


_WHERE: dict[Pooling, Where] = {"response": GENERATED, "prompt": _WholePrompt(), "last_prompt": LAST_PROMPT}


@dataclass(frozen=True)
class Answer:
    """A sampled answer of one side of a pair."""

    pair: int
    side: int
    """0 = positive, 1 = negative."""
    rollout: int
    request: Request
    ids: tuple[int, ...]
    """Without the end token."""
    text: str


def contrast(kit: ModelKit, by_trait: Mapping[str, Sequence[Pair]], how: Extraction) -> Fitted:
    """Vectors of every trait and pooling; see `Contrasts.fit`. Raises HarnessError where no answer of a side is kept."""
    tensors: dict[str, Tensor] = {}
    yields: dict[str, Any] = {}
    halves: dict[str, list[float]] = {}
    for trait, pairs in by_trait.items():
        answers = rollouts(kit, trait, pairs, how)
        kept, yields[trait] = _filtered(kit, trait, pairs, answers, how)
        sums = _Sums(kit, trait, kept)
        for number, pooling in enumerate(POOLINGS):
            tensors[f"{trait}.{pooling}.vector"] = sums.vector(number)
            tensors[f"{trait}.{pooling}.neutral"] = sums.mean("true", 1)[number].float()
            tensors[f"{trait}.{pooling}.shuffled"] = (
                sums.mean("shuffled", 0)[number] - sums.mean("shuffled", 1)[number]
            ).float()
        tensors[f"{trait}.residual_norm"] = sums.residual_norm()
        halves[trait] = sums.split_half_cosine()
    meta = {"traits": list(by_trait), "poolings": list(POOLINGS), "yields": yields, "split_half_cosine": halves}
    return Fitted(tensors, meta)


def rollouts(kit: ModelKit, trait: str, pairs: Sequence[Pair], how: Extraction) -> list[Answer]:
    """Sampled answers to both prompts of every pair, in the order of pairs, rollouts and sides; noise keyed by item."""
    room, sampling = kit.max_new_tokens or 256, Sampling(how.temperature, seed=kit.seed)
    asked: list[Answer] = []
    for number, pair in enumerate(pairs):
        for side, prompt in enumerate((pair.positive, pair.negative)):
            request = kit.decoder.prepare(pair.ids[side], Plan((Stream(prompt),)), room)
            asked += [
                Answer(number, side, r, replace(request, key=f"{pair.ids[side]}/r{r}"), (), "")
                for r in range(how.rollouts)
            ]
    asked.sort(key=lambda a: (a.pair, a.rollout, a.side))
    found: list[Answer] = []
    for start in range(0, len(asked), AT_ONCE):
        kit.progress(f"answering ({trait})", start, len(asked))
        part = asked[start : start + AT_ONCE]
        for answer, ids in zip(part, _answered(kit, [a.request for a in part], room, sampling), strict=True):
            words = tuple(i for i in ids if i not in kit.lm.encoder.eos_ids)
            found.append(replace(answer, ids=words, text=kit.lm.encoder.decode(words).strip()))
    kit.progress(f"answering ({trait})", len(asked), len(asked))
    return found


def _answered(kit: ModelKit, requests: Sequence[Request], room: int, sampling: Sampling) -> list[Sequence[int]]:
    lm = kit.lm
    content = {
        "rollouts": [lm.name, lm.revision, lm.dtype, room, sampling.temperature, sampling.seed],
        "asked": [[request.key, request.prompts[0].encoded.ids] for request in requests],
    }
    key = kit.store.key(content)
    kept = kit.store.get(key) if lm.revision else None
    if kept is not None:
        return kept.meta["ids"]
    found: dict[int, Sequence[int]] = {}
    for batch in by_length([request.tokens + room for request in requests], ROW_TOKENS[lm.device.type]):
        answers = kit.decoder.generate([requests[n] for n in batch], max_new_tokens=room, sampling=sampling)
        found.update({n: answer.ids for n, answer in zip(batch, answers, strict=True)})
    ids = [found[n] for n in range(len(requests))]
    if lm.revision:
        kit.store.put(key, Fitted(meta={"ids": ids}), {"rollouts": content["rollouts"]})
    return ids


def _filtered(
    kit: ModelKit, trait: str, pairs: Sequence[Pair], answers: Sequence[Answer], how: Extraction
) -> tuple[list[Answer], dict[str, Any]]:
    """The answers to extract from, and what became of the others."""
    asked = [a for a in answers if a.text]
    report: dict[str, Any] = {"answers": len(answers), "empty": len(answers) - len(asked)}
    if how.judge is not None:
        samples = [Sample(pairs[a.pair].ids[a.side], pairs[a.pair].user, response=a.text) for a in asked]
        ratings = kit.rate(how.judge, samples)
        report["unrated"] = sum(any(r.score is None for r in rated.values()) for rated in ratings)
        replies = {rating.key: rating for rated in ratings for rating in rated.values()}.values()
        tokens = [sum(r.input_tokens for r in replies), sum(r.output_tokens for r in replies)]
        if any(tokens):  # paid by the first fit that asked
            report["judge_tokens"] = tokens
        asked = [a for a, rated in zip(asked, ratings, strict=True) if passes(rated, a.side, how)]
    if how.paired:
        sides = {(a.pair, a.rollout, a.side) for a in asked}
        asked = [a for a in asked if (a.pair, a.rollout, 1 - a.side) in sides]
    report["kept"] = [sum(a.side == side for a in asked) for side in (0, 1)]
    if min(report["kept"]) == 0:
        raise HarnessError(
            f"{trait}: no {'positive' if report['kept'][0] == 0 else 'negative'} answer of {len(answers)} was kept; lower "
            "threshold or coherence_min, set paired=false, or give prompts the model follows"
        )
    return asked, report


def passes(rated: Mapping[str, Rating], side: int, how: Extraction) -> bool:
    """Whether an answer shows its side of the trait and is coherent. One without a rating is no evidence of either."""
    trait, coherence = rated["trait"].score, rated["coherence"].score
    if trait is None or coherence is None or coherence < how.coherence_min:
        return False
    return trait >= how.threshold if side == 0 else trait < 100 - how.threshold


class _Sums:
    """Sums of pooled activations [poolings, layers, D] over answers: by side, by half of the pairs, by shuffled label."""

    def __init__(self, kit: ModelKit, trait: str, kept: Sequence[Answer]) -> None:
        sites = [Site(layer, "block_out") for layer in range(kit.lm.sites.layers)]
        shape = (len(POOLINGS), len(sites), kit.lm.sites.width)
        sides = np.array([a.side for a in kept])
        labels = {"true": sides, "shuffled": np.random.Generator(np.random.Philox(kit.seed)).permutation(sides)}
        for half in (0, 1):
            inside = np.array([a.pair % 2 == half for a in kept])
            labels[f"half{half}"] = np.where(inside, sides, -1)
        self._sums = {(name, side): torch.zeros(shape, dtype=torch.float64) for name in labels for side in (0, 1)}
        self._counts = {(name, side): int((labels[name] == side).sum()) for name, side in self._sums}
        self._norms = torch.zeros(shape[1], dtype=torch.float64)
        done = 0
        for batch in by_length([a.request.tokens + len(a.ids) for a in kept], ROW_TOKENS[kit.lm.device.type]):
            kit.progress(f"reading activations ({trait})", done, len(kept))
            chosen = [kept[n] for n in batch]
            where = [_WHERE[pooling] for pooling in POOLINGS]
            means, norms = pooled(kit.lm, [a.request for a in chosen], sites, where, [a.ids for a in chosen])
            for (name, side), total in self._sums.items():
                total += means[torch.from_numpy(labels[name][batch] == side)].double().sum(dim=0)
            self._norms += norms[torch.from_numpy(sides[batch] == 1), 0].double().sum(dim=0)
            done += len(batch)
        kit.progress(f"reading activations ({trait})", len(kept), len(kept))

    def mean(self, name: str, side: int) -> Tensor:
        return self._sums[name, side] / self._counts[name, side]

    def vector(self, pooling: int) -> Tensor:
        """[layers, D], fp32."""
        return (self.mean("true", 0)[pooling] - self.mean("true", 1)[pooling]).float()

    def residual_norm(self) -> Tensor:
        """Mean norm of the negative answers' activations, [layers], fp32."""
        return (self._norms / self._counts["true", 1]).float()

    def split_half_cosine(self) -> list[float]:
        """Cosine of the vectors of the even and the odd pairs, by block; none with a single pair."""
        if not all(self._counts[f"half{half}", side] for half in (0, 1) for side in (0, 1)):
            return []
        a, b = ((self.mean(f"half{h}", 0) - self.mean(f"half{h}", 1))[0] for h in (0, 1))
        return [round(c, 4) for c in torch.nn.functional.cosine_similarity(a, b, dim=-1).tolist()]
