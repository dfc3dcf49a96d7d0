"""Runs plans: batched generation and teacher-forced scoring, one decoder for every method.

A batch holds samples; a sample has one row a stream, all fed the same response tokens. Where rows share a prefill, the
prompt but its last token runs once a group, the cache is fanned out to rows, and the last prompt token is the first
position the streams see apart (`harness.engine.rows`).
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from harness.engine.cache import Prefilled, fan_out, gather
from harness.engine.encoder import CutPrompt
from harness.engine.flops import Cost
from harness.engine.model import LanguageModel, pad_left, pad_right
from harness.engine.rows import Pass, Request, Rows, of_like_answers, of_like_length
from harness.errors import ContextTooLong, HarnessError
from harness.plan import (
    GREEDY,
    Exit,
    Generated,
    Mix,
    Place,
    PlacedMix,
    Plan,
    Sampling,
    Scored,
    Site,
    Stream,
    StreamOutput,
    apply,
)
from harness.plugins.returned import mixed

_LOGITS_BYTES = 256 * 2**20
"""Logits held at once while scoring; positions are chunked to stay below."""


class Chooser(Protocol):
    def __call__(self, logp: Tensor, samples: Sequence[int], step: int) -> list[int]:
        """The next token of each of `samples` from their log-probabilities [len(samples), V]."""
        ...


def _numbers(logprobs: Sequence[float]) -> None:
    if any(math.isnan(value) for value in logprobs):
        raise HarnessError(
            "the log-probabilities are NaN: the model's numbers overflow, or the method's options do; try --dtype float32 or "
            "smaller strengths"
        )


class Decoder:
    """Generation and scoring of plans on one language model."""

    passes: ClassVar[type[Pass]] = Pass

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
        self.cost = Cost()
        self.written: Callable[[float], None] = lambda part: None
        """Told after each token of a batch which part of its longest possible answer is there."""
        # a sliding window counts columns of the cache, and padding behind a shared beginning would be counted with them
        self._begins_once = not any(layer.is_sliding for layer in lm.new_cache().layers)
        self._begun: tuple[tuple[int, ...], Any] = (), None
        """The beginning that a batch's prompts shared last, with its keys and values: the next batch's may be the same."""

    def chooser(self, sampling: Sampling, requests: Sequence[Request], steps: int) -> Chooser:
        """What chooses the samples' tokens."""
        return _Chooser(sampling, [request.key for request in requests], steps)

    def prepare(self, key: str, plan: Plan, new_tokens: int) -> Request:
        """The plan with every prompt encoded and cut so that `new_tokens` more fit the context.

        Raises ContextTooLong where a stream's input alone does not fit.
        """
        room = self.lm.max_length - new_tokens
        cut: dict[int, CutPrompt] = {}
        for stream in plan.streams:
            if id(stream.prompt) not in cut:
                cut[id(stream.prompt)] = self.lm.encoder.encode_within(stream.prompt, room)
        prompts = tuple(cut[id(stream.prompt)] for stream in plan.streams)
        if any(stream.early for stream in plan.streams):
            plan = replace(plan, streams=tuple(self._with_exits(stream) for stream in plan.streams))
        return Request(key, plan, prompts)

    def _with_exits(self, stream: Stream) -> Stream:
        """The stream with the exits its rule names for this model."""
        sites = self.lm.sites
        named = stream.early(sites.layers, tied=sites.tied) if stream.early is not None else ()
        return replace(stream, exits=(*stream.exits, *named), early=None)

    @torch.inference_mode()
    def generate(
        self,
        requests: Sequence[Request],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
    ) -> list[Generated]:
        """One response a request, as one batch. Stops on any end-of-text id, on a stop string, or at the limit."""
        for request in requests:
            self._check_room(request, max_new_tokens)
        chooser = self.chooser(sampling, requests, max_new_tokens)
        answers = [_Answer(self.lm, stop) for _ in requests]
        live = list(range(len(requests)))
        rows = Rows.of(requests)
        with contextlib.ExitStack() as stack:
            state = self._prefill(rows, max_new_tokens)
            current = stack.enter_context(self.passes(self.lm, rows, self.cost))
            hidden = state.hidden
            if hidden is None:
                hidden = state.step(current, [prompt.encoded.ids[-1] for prompt in rows.prompts])
            else:
                current.exits = state.exits
            for step in range(max_new_tokens):
                told = [answers[i].ids for i in live]
                (logp,) = (part for _, part in self._mixed(current, [requests[i] for i in live], hidden, told, step))
                tokens = chooser(logp[:, 0], live, step)
                chosen = logp[:, 0].gather(1, torch.tensor(tokens, device=logp.device)[:, None])[:, 0].tolist()
                _numbers(chosen)
                for i, token, value in zip(live, tokens, chosen, strict=True):
                    answers[i].add(token, value)
                going = [n for n, i in enumerate(live) if not answers[i].done]
                if not going or step == max_new_tokens - 1:
                    break
                self.written((step + 1) / max_new_tokens)
                if 2 * len(going) <= len(live):  # drop finished samples once they are half of the batch
                    kept = [r for r, n in enumerate(current.rows.sample_of) if n in set(going)]
                    rows = current.rows.pick(kept)
                    renumber = {n: k for k, n in enumerate(going)}
                    rows.sample_of = [renumber[n] for n in rows.sample_of]
                    live, tokens = [live[n] for n in going], [tokens[n] for n in going]
                    state.select(kept)
                    stack.close()
                    current = stack.enter_context(self.passes(self.lm, rows, self.cost))
                hidden = state.step(current, [tokens[n] for n in current.rows.sample_of])
        return [answer.result() for answer in answers]

    def score(self, requests: Sequence[Request], continuations: Sequence[Sequence[int]]) -> list[Scored]:
        """Log-probabilities of one continuation a request, teacher-forced, in nats. Nothing is cut silently.

        Every stream of a plan is fed the same continuation ids. Requests with equal prompts share the prefill, and
        continuations of one request that differ in their last token only are read from the same pass. Samples whose
        continuations are much longer than others' run apart from them.
        """
        found: dict[int, Scored] = {}
        for numbers in of_like_answers(requests, continuations):
            some = self._score([requests[i] for i in numbers], [continuations[i] for i in numbers])
            found.update(zip(numbers, some, strict=True))
        return [found[i] for i in range(len(requests))]

    def _score(self, requests: Sequence[Request], continuations: Sequence[Sequence[int]]) -> list[Scored]:
        """Of continuations that are padded to the longest of them."""
        values = [[0.0] * len(c) for c in continuations]
        greedy = [[False] * len(c) for c in continuations]
        longest = max(len(c) for c in continuations)
        target = torch.zeros(len(requests), longest, dtype=torch.long, device=self.lm.device)
        for i, continuation in enumerate(continuations):
            target[i, : len(continuation)] = torch.tensor(continuation, device=self.lm.device)
        rows: dict[tuple[int, tuple[int, ...]], int] = {}
        row_of = [
            rows.setdefault((id(r), tuple(c[:-1])), len(rows)) for r, c in zip(requests, continuations, strict=True)
        ]
        first = [row_of.index(row) for row in range(len(rows))]
        row = torch.tensor(row_of, device=self.lm.device)[:, None]
        for span, logp in self.teacher_forced([requests[i] for i in first], [continuations[i] for i in first]):
            place = torch.arange(logp.shape[1], device=logp.device)
            wanted = logp[row, place, target[:, span]].tolist()
            _numbers([value for row_values in wanted for value in row_values])
            best = (logp.argmax(-1)[row_of] == target[:, span]).tolist()
            for i, continuation in enumerate(continuations):
                for k, t in enumerate(range(span.start, min(span.stop, len(continuation)))):
                    values[i][t], greedy[i][t] = wanted[i][k], best[i][k]
        return [Scored(tuple(v), tuple(g)) for v, g in zip(values, greedy, strict=True)]

    def distributions(self, requests: Sequence[Request], continuations: Sequence[Sequence[int]]) -> list[Tensor]:
        """Log-probabilities over the vocabulary at each continuation position: one [T, V] a request."""
        parts = [logp for _, logp in self.teacher_forced(requests, continuations)]
        whole = torch.cat(parts, dim=1)
        return [whole[i, : len(c)] for i, c in enumerate(continuations)]

    @torch.inference_mode()
    def teacher_forced(
        self, requests: Sequence[Request], continuations: Sequence[Sequence[int]]
    ) -> Iterator[tuple[slice, Tensor]]:
        """Log-probabilities over the vocabulary by chunks of continuation positions: (their span, [B, t, V]).

        Behind the end of a request's own continuation the values mean nothing.
        """
        for request, continuation in zip(requests, continuations, strict=True):
            if not continuation:
                raise ValueError(f"request {request.key!r} has an empty continuation")
            self._check_room(request, len(continuation) - 1)  # the last token is predicted, never fed
        rows = Rows.of(requests)
        longest = max(len(c) for c in continuations)
        state = self._prefill(rows, longest, hold_last=longest > 1, feeds=longest > 1)
        tails = [
            [prompt.encoded.ids[-1], *continuations[sample][:-1]]
            for prompt, sample in zip(rows.prompts, rows.sample_of, strict=True)
        ]
        with self.passes(self.lm, rows, self.cost) as current:
            hidden = state.tail(current, tails) if state.hidden is None else state.hidden
            current.exits = current.exits or state.exits
            yield from self._mixed(current, requests, hidden, continuations)

    def _check_room(self, request: Request, new_tokens: int) -> None:
        if request.tokens + new_tokens > self.lm.max_length:
            raise ContextTooLong(
                f"sample {request.key!r}: {request.tokens} prompt tokens and {new_tokens} new ones exceed "
                f"the context of {self.lm.max_length}"
            )

    def _prefill(self, rows: Rows, new_tokens: int, *, hold_last: bool = False, feeds: bool = True) -> _State:
        """The prompt's keys and values. Where rows share a prefill, or `hold_last`, the last prompt token is left out.

        Without `feeds` nothing follows the prompt, and no keys and values are kept where its last token has run.
        """
        groups = rows.prefill_groups()
        shared = hold_last or len(groups) < len(rows.streams)
        kept = feeds or shared
        leaders = rows.pick([group[0] for group in groups]) if shared else rows
        prompts = [prompt.encoded.ids[:-1] if shared else prompt.encoded.ids for prompt in leaders.prompts]
        number_of = {row: number for number, group in enumerate(groups) for row in group}
        take = [number_of[row] if shared else row for row in range(len(rows.streams))]
        filled = max(map(len, prompts))
        mask = torch.zeros(len(take), filled + new_tokens + 1, dtype=torch.long, device=self.lm.device)
        state = _State(None, mask, filled, rows.prompt_lengths(), shared)
        parts = []
        everyone = [(0, list(range(len(prompts))))]
        for start, family in leaders.families(prompts) if self._begins_once else everyone:
            beginning = self._beginning(leaders.pick(family[:1]), prompts[family[0]][:start]) if start else None
            for numbers in of_like_length({number: prompts[number][start:] for number in family}):
                rest = [prompts[number][start:] for number in numbers]
                cache = self.lm.new_cache() if kept else None
                if beginning is not None:
                    cache = fan_out(beginning, len(numbers))
                keep: slice | Tensor
                if kept:
                    parts.append(Prefilled(cache, numbers))
                    ids, positions = pad_left(rest, 0)
                    positions[positions >= 0] += start
                    real = np.concatenate([np.ones((len(numbers), start), dtype=bool), positions >= 0], axis=1)
                    seen, keep = torch.from_numpy(real).to(mask), slice(ids.shape[1] - 1, None)
                else:  # no token looks at padding on the right, and attention without a mask is faster
                    ids, positions = pad_right(rest, [start] * len(rest))
                    seen = torch.ones(len(rest), start + ids.shape[1], dtype=torch.long, device=mask.device)
                    keep = torch.tensor([[len(tokens) - 1] for tokens in rest], device=mask.device)
                with self.passes(self.lm, leaders.pick(numbers), self.cost) as current:
                    hidden = current.run(ids, positions, seen, cache, keep=keep)
                if not shared:
                    state.keep(numbers, hidden, current.exits)
                row_of = {number: row for row, number in enumerate(numbers)}
                for row, number in enumerate(take):
                    if number in row_of:
                        mask[row, filled - seen.shape[1] : filled] = seen[row_of[number]]
        # empty where every prompt is one token that the first step runs
        state.cache = gather(parts, take, new_tokens + 1) if parts else self.lm.new_cache()
        return state

    def _beginning(self, row: Rows, ids: Sequence[int]) -> Any:
        """Keys and values of the tokens a family's prompts begin with, [1, ...]. Those of the last family without edits and
        adapters there are kept, and taken where the tokens are the very same: so they are bit for bit what a pass gives."""
        begun, tokens = tuple(ids), np.asarray([ids])
        bare = row.bare_below(len(ids))
        with self.passes(self.lm, row, self.cost) as current:
            positions = np.arange(len(ids))[None]
            everything = torch.ones(tokens.shape, dtype=torch.long, device=self.lm.device)
            if bare and self._begun[0] == begun:
                # counted with each batch, so that a run that was killed costs what an unbroken one does
                current.count(tokens, positions, everything)
                return self._begun[1]
            cache = self.lm.new_cache()
            current.run(tokens, positions, everything, cache, keep=slice(0))
        if bare:
            self._begun = begun, cache
        return cache

    def _mixed(
        self,
        current: Pass,
        requests: Sequence[Request],
        hidden: Tensor,
        responses: Sequence[Sequence[int]],
        step: int = 0,
    ) -> Iterator[tuple[slice, Tensor]]:
        """Mixed log-probabilities [B, t, V] of hidden states [R, T, D], by chunks of positions.

        `responses` are the tokens known of each, and the first of the positions predicts the one numbered `step`.
        """
        rows, mixes = current.rows, [request.plan.mix for request in requests]
        row_of = {(s, n): r for r, (s, n) in enumerate(zip(rows.sample_of, rows.stream_of, strict=True))}
        groups: dict[tuple[Mix | PlacedMix, tuple[tuple[Exit, ...], ...]], list[int]] = defaultdict(list)
        for sample, mix in enumerate(mixes):
            exits: list[tuple[Exit, ...]] = []
            while (sample, len(exits)) in row_of:
                exits.append(rows.streams[row_of[sample, len(exits)]].exits)
            groups[mix, tuple(exits)].append(sample)
        width = 4 * self.lm.vocabulary * sum(1 + len(stream.exits) for stream in rows.streams)
        chunk = max(1, _LOGITS_BYTES // width)
        for start in range(0, hidden.shape[1], chunk):
            span = slice(start, min(start + chunk, hidden.shape[1]))
            out: Tensor | None = None
            for (mix, exits_of), samples in groups.items():
                outputs = []
                for number, stream_exits in enumerate(exits_of):
                    index = torch.tensor([row_of[sample, number] for sample in samples], device=hidden.device)
                    early = [
                        self.lm.early_logits(current.exits[e.site][index, span], final_norm=e.final_norm)
                        for e in stream_exits
                    ]
                    outputs.append(StreamOutput(self.lm.logits(hidden[index, span]), tuple(early)))
                    self.cost.flops += self.lm.sizes.head(outputs[-1].logits[..., 0].numel() * (1 + len(early)))
                place = Place(
                    tuple(requests[sample].prompts[0].encoded.ids for sample in samples),
                    tuple(tuple(responses[sample]) for sample in samples),
                    step + span.start,
                )
                logp = mixed(mix, apply(mix, outputs, place), outputs[0].logits)
                if len(groups) == 1:
                    out = logp
                    break
                if out is None:
                    out = logp.new_empty(len(mixes), *logp.shape[1:])
                out[samples] = logp
            assert out is not None
            yield span, out


@dataclass
class _State:
    """Keys, values and masks of a batch while it decodes."""

    cache: Any
    mask: Tensor
    """[R, prompt + new], filled as tokens come."""
    filled: int
    """Columns of the mask in use = tokens in the cache."""
    next: list[int]
    """Position of each row's next token."""
    shared: bool
    hidden: Tensor | None = None
    """Final hidden states of the last prompt token, where the prefill ran over it."""
    exits: dict[Site, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.shared:
            self.next = [n - 1 for n in self.next]

    def keep(self, rows: Sequence[int], hidden: Tensor, exits: Mapping[Site, Tensor]) -> None:
        """What a prefill gave at the last prompt token of some rows."""
        if self.hidden is None:
            self.hidden = hidden.new_empty(self.mask.shape[0], *hidden.shape[1:])
        self.hidden[rows] = hidden
        for site, read in exits.items():
            self.exits.setdefault(site, read.new_empty(self.mask.shape[0], *read.shape[1:]))[rows] = read

    def select(self, rows: Sequence[int]) -> None:
        index = torch.tensor(rows, device=self.mask.device)
        self.mask = self.mask[index]
        self.cache.batch_select_indices(index)
        self.next = [self.next[r] for r in rows]

    def step(self, current: Pass, tokens: Sequence[int]) -> Tensor:
        """One token a row: hidden states [R, 1, D]."""
        return self.tail(current, [[token] for token in tokens])

    def tail(self, current: Pass, tails: Sequence[Sequence[int]]) -> Tensor:
        """Tokens after what the cache holds, padded on the right: hidden states [R, T, D]."""
        ids, positions = pad_right(tails, self.next)
        longest = ids.shape[1]
        self.mask[:, self.filled : self.filled + longest] = torch.from_numpy(positions >= 0)
        self.filled += longest
        self.next = [n + longest for n in self.next]
        return current.run(ids, positions, self.mask[:, : self.filled], self.cache)


class _Answer:
    """One growing response."""

    def __init__(self, lm: LanguageModel, stop: Sequence[str]) -> None:
        self.encoder = lm.encoder
        self.stop = [s for s in stop if s]
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.done = False
        self.text: str | None = None

    def add(self, token: int, logprob: float) -> None:
        if self.done:
            return
        self.ids.append(token)
        self.logprobs.append(logprob)
        if token in self.encoder.eos_ids:
            self.done = True
        elif self.stop:
            self.text = self.encoder.before(self.ids, self.stop)
            self.done = self.text is not None

    def result(self) -> Generated:
        text = self.encoder.decode(self.ids) if self.text is None else self.text
        return Generated(tuple(self.ids), tuple(self.logprobs), text, "stop" if self.done else "length")


class _Chooser:
    """The next token of each sample: the most likely one, or a draw whose noise depends on (seed, sample, step) only."""

    def __init__(self, sampling: Sampling, keys: Sequence[str], steps: int) -> None:
        self.sampling = sampling
        self.noise = [_uniforms(sampling.seed, key, steps) for key in keys] if sampling.temperature > 0 else []

    def __call__(self, logp: Tensor, samples: Sequence[int], step: int) -> list[int]:
        s = self.sampling
        if s.temperature == 0:
            return logp.argmax(-1).tolist()
        values, order = (logp / s.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
        if s.top_k:
            values[:, s.top_k :] = 0
        if s.top_p < 1:
            before = values.cumsum(-1) - values
            cut = before >= s.top_p * values.sum(-1, keepdim=True)
            cut[:, 0] = False  # the most likely token stays, however little of it is asked for
            values = values.masked_fill(cut, 0)
        cumulative = values.cumsum(-1)
        draw = torch.tensor([self.noise[i][step] for i in samples], dtype=cumulative.dtype, device=logp.device)
        rank = torch.searchsorted(cumulative, (draw * cumulative[:, -1])[:, None], right=True)
        last = (values > 0).sum(-1, keepdim=True) - 1
        return order.gather(1, torch.minimum(rank, last))[:, 0].tolist()


def _uniforms(seed: int, key: str, steps: int) -> np.ndarray:
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest[:8], "little"))).random(steps)
