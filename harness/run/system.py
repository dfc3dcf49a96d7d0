"""LanguageModel + Method + fitted state = what a Task evaluates.

A ModelSystem turns examples into plans, plans into batches and batches into samples; an example with choices gets the most
likely of them for its response. It also answers, on request, whether the method did anything at all (`effect`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from harness.data import Example, Joint
from harness.engine.capture import capture
from harness.engine.decode import Decoder
from harness.engine.encoder import CutPrompt, Encoded
from harness.engine.flops import Cost
from harness.engine.machine import attempt, rows_that_fit
from harness.engine.model import LanguageModel
from harness.errors import ContextTooLong, HarnessError, UsageError, UserFailed
from harness.method import Fitted, Method, Progress
from harness.mix import First
from harness.plan import Generated, Plan, Scored, Site, Sites, Stream, Where
from harness.plugins.returned import plan_of
from harness.records.schema import Serving
from harness.run.answers import (
    RULED_OUT,
    Answer,
    Asked,
    Chosen,
    Difference,
    Effect,
    Size,
    chosen_answers,
    different,
    given,
    response_of,
)
from harness.run.batches import Batching, longest_first
from harness.run.compared import Compared
from harness.run.sizes import order_window, plan_windows
from harness.task import TOO_LARGE, Generation, Sample, System

COMPARING = "comparing with the unedited model"
EFFECT_BATCH = 8
Job = TypeVar("Job")
Result = TypeVar("Result")


class ModelSystem:
    """A method on a model, ready to answer: the `harness.task.System` that runs bring.

    It has a name of its own, since it has more than tasks are promised: the model, the decoder and what they cost.
    """

    def __init__(
        self,
        lm: LanguageModel,
        method: Method,
        generation: Generation,
        *,
        shared: Fitted | None = None,
        personal: Mapping[str, Fitted | UserFailed | None] | None = None,
        batching: Batching | None = None,
        progress: Progress = lambda label, done, total: None,
        payer: str = "",
    ) -> None:
        """`payer` names the record that pays for the answers of a model behind a server."""
        self.lm = lm
        self.method = method
        self.generation = generation
        self.shared = shared
        self.personal = personal or {}
        self.batching = batching or Batching()
        self.progress = progress
        self.payer = payer
        self.decoder = self._made_decoder()
        self.saved = Cost()
        """What sharing forward passes with other systems saved; `decoder.cost` counts what this one costs alone."""
        self.elsewhere = 0.0
        """Seconds of this system's part of what others ran, less theirs of what it ran."""
        self.cut_tokens: dict[str, int] = {}
        """Of the examples asked so far whose context was cut from the left: the tokens cut, over all streams."""

    def _made_decoder(self) -> Decoder:
        return Decoder(self.lm)

    @property
    def sites(self) -> Sites:
        return self.lm.sites

    def plan(self, example: Example) -> Plan:
        """Raises UserFailed where the user's state could not be made."""
        personal = self.personal.get(example.user.id)
        if isinstance(personal, UserFailed):
            raise personal
        return plan_of(self.method, self.method.plan(example, self.shared, personal))

    def encode(self, example: Example) -> Encoded:
        """The prompt of the plan's first stream, cut to the context."""
        return self.prompt(example).encoded

    def prompt(self, example: Example) -> CutPrompt:
        """As `encode`, with what the cut cost."""
        return self._ask(example).request.prompts[0]

    def respond(
        self, examples: Sequence[Example], *, alike: Callable[[Example], str] = lambda example: ""
    ) -> Iterator[Sample]:
        """Ungraded samples, batch by batch, longest prompts first. A prompt that does not fit is a failed sample.

        Examples of equal `alike` run next to each other: where their prompts begin alike, that beginning runs once.
        """
        by_id = {example.id: example for example in examples}
        if len(by_id) != len(examples):
            raise UsageError("two examples of the selection have the same id")
        self.plan_batches(examples, alike=alike)
        run, ahead = lambda ids: self.answer([by_id[i] for i in ids]), partial(order_window, self, by_id, alike)
        for number, i, sample in self.in_batches(list(by_id), run, ahead=ahead):
            yield replace(sample or Sample(i, by_id[i].user.id, error=TOO_LARGE), batch=number)

    def plan_batches(
        self, examples: Sequence[Example], *, alike: Callable[[Example], str] = lambda example: ""
    ) -> None:
        """As `respond` would. Does nothing where batches are planned already."""
        if not self.batching.planned:
            plan_windows(self, examples, alike)

    def answer(self, examples: Sequence[Example]) -> list[Sample]:
        """Ungraded samples of examples that run as one batch."""
        return self._samples(examples, [self._try(example) for example in examples])

    def in_batches(
        self,
        ids: Sequence[str],
        run: Callable[[Sequence[str]], Sequence[Result]],
        *,
        ahead: Callable[[int], None] | None = None,
    ) -> Iterator[tuple[int, str, Result | None]]:
        """What `run` gives for the ids of each batch: (number of the batch, id, result; None = out of memory).

        Batches are cut from `ids` in their order and halved where memory does not suffice; those done are left out.
        `ahead` is told the number of the batch that begins each window but the first, before it runs.
        """
        batching, number, finished = self.batching, 0, 0
        if not batching.planned:
            batching.plan(ids, self.lm.device.type)
            batching.changed()
        while number < len(batching.planned):
            if ahead and finished and finished % batching.ahead == 0:
                ahead(number)
                batching.changed()
            batch = batching.planned[number]
            if not batching.done.issuperset(batch):
                self.decoder.written = partial(self._written, finished, len(batch), len(ids))
                found = self._attempt(partial(run, batch))
                if found is None and len(batch) > 1:
                    batching.halve(number)
                    continue
                results: Sequence[Result | None] = [None] if found is None else found
                for i, result in zip(batch, results, strict=True):
                    yield number, i, result
            number += 1
            finished += len(batch)
            self.decoder.written = lambda part: None
            self.progress("answering", finished, len(ids))

    def _written(self, finished: int, batch: int, total: int, part: float) -> None:
        """The bar moves within a batch, which on a CPU takes minutes: it stands where equal answers would."""
        self.progress("answering", finished + int(part * batch), total)

    def fits(self, sizes: Sequence[Size]) -> int | None:
        """How many samples as large as the largest of these the memory holds; None where that is not known."""
        if not any(size.rows for size in sizes):
            return None
        new = max(self.generation.max_new_tokens, *(size.choice for size in sizes), 1)
        found = rows_that_fit(self.lm, max(size.tokens for size in sizes if size.rows), new)
        return None if found is None else max(1, found // max(size.rows for size in sizes))

    def _attempt(self, run: Callable[[], Result]) -> Result | None:
        """What `run` returns; None, and nothing spent, where memory did not suffice."""
        before = replace(self.decoder.cost)
        found = attempt(run)
        if found is None:
            self.decoder.cost = before
        return found

    def _in_pieces(
        self, jobs: Sequence[Job], size: int, run: Callable[[Sequence[Job]], Sequence[Result]]
    ) -> Iterator[Result]:
        """The results of all jobs, `size` of them at a time, and fewer once memory runs out."""
        start = 0
        while start < len(jobs):
            results = self._attempt(partial(run, jobs[start : start + size]))
            if results is not None:
                yield from results
                start += size
            elif size > 1:
                size = (size + 1) // 2
            else:
                raise HarnessError("out of memory with a single prompt; use a larger device, or a shorter context")

    def _try(self, example: Example) -> Asked | HarnessError:
        """What is asked, or why it cannot be."""
        try:
            return self._ask(example)
        except (ContextTooLong, UserFailed) as error:
            return error

    def _samples(self, examples: Sequence[Example], asked: Sequence[Asked | HarnessError]) -> list[Sample]:
        answers = iter(self._answer([one for one in asked if isinstance(one, Asked)]))
        return [
            self._sample(example, one, next(answers))
            if isinstance(one, Asked)
            else Sample(example.id, example.user.id, error=str(one))
            for example, one in zip(examples, asked, strict=True)
        ]

    def _answer(self, asked: Sequence[Asked], generation: Generation | None = None) -> list[Answer]:
        run = [one for one in asked if one.given is None]
        written = iter(self._generate([one for one in run if not one.choices], generation or self.generation))
        chosen = iter(self._choose([one for one in run if one.choices]))
        return [one.given or (next(chosen) if one.choices else next(written)) for one in asked]

    def _generate(self, asked: Sequence[Asked], g: Generation) -> list[Generated]:
        found: dict[int, Generated] = {}
        for draws in dict.fromkeys(one.request.plan.draws for one in asked):
            numbers = [n for n, one in enumerate(asked) if one.request.plan.draws == draws]
            requests, sampling = [asked[n].request for n in numbers], g.sampling
            if draws is not None:  # all draws of all requests are one batch, and those of one request share its prefill
                requests = [replace(r, key=f"{r.key}/draw{n}") for r in requests for n in range(draws.count)]
                sampling = replace(sampling, temperature=draws.temperature)
            answers = self.decoder.generate(requests, max_new_tokens=g.max_new_tokens, sampling=sampling, stop=g.stop)
            found.update(zip(numbers, chosen_answers(answers, draws) if draws else answers, strict=True))
        return [found[n] for n in range(len(asked))]

    def _choose(self, asked: Sequence[Asked]) -> list[Chosen]:
        pairs = [pair for one in asked for pair in zip(one.requests, one.choices, strict=True)]
        scores = iter(self.decoder.score([r for r, _ in pairs], [c for _, c in pairs]) if pairs else ())
        return [Chosen(tuple(next(scores) for _ in one.choices)) for one in asked]

    def _sample(self, example: Example, asked: Asked, answer: Answer) -> Sample:
        broken = None
        if any(value != value for value in answer.logprobs):
            broken = "the model returned non-finite log-probabilities"
        elif isinstance(answer, Chosen) and max(answer.logprobs) == -math.inf:
            broken = RULED_OUT
        sample = Sample(id=example.id, user=example.user.id, error=broken)
        if asked.requests:
            digest = hashlib.sha256(repr(asked.request.prompts[0].encoded.ids).encode()).hexdigest()
            sample = replace(
                sample,
                prompt_hash=digest[:16],
                prompt_tokens=asked.tokens,
                history_items=asked.request.prompts[0].items,
                dropped_items=sum(prompt.dropped for prompt in different(asked.request)),
                cut_tokens=asked.cut_tokens,
            )
        if isinstance(answer, Chosen):
            scores = {"logprobs": answer.logprobs, "greedy": [all(score.greedy) for score in answer.scores]}
            sample = replace(sample, finish="choice", extra=scores)
        else:
            sample = replace(sample, finish=answer.finish, new_tokens=len(answer.ids))
            if answer.drawn:
                sample = replace(sample, extra={"drawn": list(answer.drawn)})
        return sample if broken else replace(sample, response=response_of(example, answer))

    def score(
        self,
        examples: Sequence[Example],
        continuations: Sequence[Sequence[str]],
        *,
        alike: Callable[[Example], str] = lambda example: "",
    ) -> list[tuple[Scored, ...]]:
        """Log-probabilities of several continuations of each example, under the method's plan, in nats per token.

        Continuations of one example share its prefill, and those that differ in their last token only the whole pass.
        `alike` as in `respond`.
        """
        asked = [self._ask(example, texts) for example, texts in zip(examples, continuations, strict=True)]
        order = longest_first([alike(example) for example in examples], [one.tokens for one in asked])
        return [chosen.scores for chosen in self._sorted(order, asked, self._answer) if isinstance(chosen, Chosen)]

    def generate(self, examples: Sequence[Example], generation: Generation) -> list[Generated]:
        """A response to each example, decoded as `generation` says."""
        asked = [self._ask(example, (), room=generation.max_new_tokens) for example in examples]
        order = longest_first([""] * len(asked), [one.tokens for one in asked])
        answers = self._sorted(order, asked, partial(self._answer, generation=generation))
        return [answer for answer in answers if isinstance(answer, Generated)]

    def _sorted(
        self, order: Sequence[int], asked: Sequence[Asked], run: Callable[[Sequence[Asked]], Sequence[Result]]
    ) -> list[Result]:
        """What `run` gives for each of `asked`, run in `order` as memory allows."""
        self.batching.fits = self.fits([one.size for one in asked])
        size = self.batching.most(self.lm.device.type)
        found = dict(zip(order, self._in_pieces([asked[n] for n in order], size, run), strict=True))
        return [found[n] for n in range(len(asked))]

    def capture(
        self,
        examples: Sequence[Example],
        sites: Sequence[Site],
        where: Where,
        responses: Sequence[str] | None = None,
        *,
        plain: bool = False,
    ) -> list[dict[Site, Tensor]]:
        """Activations of each example's first stream, or of the unedited model's `plain` prompt (see `harness.engine.capture`)."""
        ids = None
        if responses is not None:
            ids = [self._answer_ids(e, text) for e, text in zip(examples, responses, strict=True)]
        asked = [self._ask(example, (), plan=_plain(example) if plain else None) for example in examples]
        return capture(self.lm, [one.request for one in asked], sites, where, ids)

    def spent(self) -> dict[str, int | float]:
        """Of a model behind a server: what was paid for since this was last asked."""
        return {}

    def serving(self, batches: Iterable[Mapping[str, int | float]], before: Serving | None) -> Serving | None:
        """Of a model behind a server: what a run paid for, from the costs of its batches and what an earlier sitting knew."""
        return None

    def effect(
        self, examples: Sequence[Example], responses: Sequence[str], kept: Compared = Compared()
    ) -> Effect | None:
        """The method against the unedited model on its own responses; None where there is nothing to compare.

        A plan that edits, contrasts, adapts or draws several responses is compared with its own bare prompt, a prompt-only one
        with the task's plain prompt; `plain` itself has no other and is exempt, and so is an answer that needs no model.
        """
        pairs = []
        for example, response in zip(examples, responses, strict=True):
            plan = self.plan(example)
            base = self._base(example, plan)
            if base is not None:
                pairs.append((example, response, plan, base))
        if not pairs:
            return None
        size = min(EFFECT_BATCH, max(self.batching.sizes(), default=EFFECT_BATCH))
        found = kept.read([(example.id, response) for example, response, *_ in pairs], size)
        self.progress(COMPARING, len(found), len(pairs))
        for difference in self._in_pieces(pairs[len(found) :], size, self._compare):
            example, response, *_ = pairs[len(found)]
            kept.add(example.id, response, difference)
            found.append(difference)
            self.progress(COMPARING, len(found), len(pairs))
        return Effect.of(found)

    def _compare(self, pairs: Sequence[tuple[Example, str, Plan, Plan]]) -> list[Difference]:
        """The response under the plan and under its base, for each (example, response, plan, base).

        Both are read in the same pass. A greedy answer of the base is the same where the base's most likely tokens are, the
        one behind the response included; one that is drawn or chosen is answered again.
        """
        most = self.generation.max_new_tokens
        ids = [self._answer_ids(e, response)[: None if e.choices else most] for e, response, _, _ in pairs]
        drawn = self.generation.sampling.temperature > 0
        again = [n for n, (example, _, plan, _) in enumerate(pairs) if drawn or plan.draws or example.choices]
        read = [i if n in again or len(i) == most else (*i, i[-1]) for n, i in enumerate(ids)]
        rooms = [self._room(example, len(i)) for i, (example, *_) in zip(ids, pairs, strict=True)]
        plans = [self.decoder.prepare(e.id, plan, room) for (e, _, plan, _), room in zip(pairs, rooms, strict=True)]
        bases = [self.decoder.prepare(e.id, base, room) for (e, _, _, base), room in zip(pairs, rooms, strict=True)]
        count, device = len(pairs), self.lm.device
        length = torch.tensor([len(i) for i in ids], device=device)[:, None]
        read_length = torch.tensor([len(i) for i in read], device=device)[:, None]
        kl, changed, parted = torch.zeros(3, count, device=device, dtype=torch.float64).unbind()
        for span, logp in self.decoder.teacher_forced([*plans, *bases], [*read, *read]):
            p, q = logp[:count], logp[count:]
            place = torch.arange(span.start, span.start + logp.shape[1], device=device)
            apart = p.argmax(-1) != q.argmax(-1)
            # sums that are 1 but for their rounding would be a divergence; of sums that are 1 in 53 bits it is none
            p, q = (one.double().log_softmax(-1) for one in (p, q))
            nats = (p.exp() * (p - q).nan_to_num(0.0, 0.0, 0.0)).sum(-1)
            kl += nats.masked_fill(place >= length, 0).sum(1)
            changed += (apart & (place < length)).sum(1)
            parted += (apart & (place < read_length)).sum(1)
        identical = (parted == 0).tolist()
        answers = self._answer([self._ask(pairs[n][0], plan=pairs[n][3]) for n in again])
        for n, answer in zip(again, answers, strict=True):
            identical[n] = response_of(pairs[n][0], answer) == pairs[n][1]
        tokens = [len(i) for i in ids]
        return list(map(Difference, kl.tolist(), map(int, changed.tolist()), tokens, identical))

    def _base(self, example: Example, plan: Plan) -> Plan | None:
        if plan.answer is not None:
            return None
        plain = _plain(example)
        alone = plan.streams[0].prompt == plain.streams[0].prompt
        draws = plan.draws is not None and (alone or not example.choices)  # choices are scored, whatever is drawn
        if plan.changes or draws:  # all streams stay in the batch, so that equal logits are equal bit by bit
            return Plan((plan.streams[0].bare(), *plan.streams[1:]), First())
        return None if alone else plain

    def _ask(
        self,
        example: Example,
        choices: Sequence[str] | None = None,
        *,
        plan: Plan | None = None,
        room: int | None = None,
    ) -> Asked:
        """By default the example's own choices, under the method's plan; without choices the prompt leaves `room` tokens."""
        plan = plan or self.plan(example)
        if plan.answer is not None:
            return given(plan.answer, example.choices if choices is None else choices)
        ids = [self._answer_ids(example, text) for text in (example.choices if choices is None else choices)]
        if ids:
            lengths = {len(i) for i in ids}
            by_length = {n: self.decoder.prepare(example.id, plan, self._room(example, n)) for n in lengths}
            asked = Asked(tuple(by_length[len(i)] for i in ids), tuple(ids))
        else:
            asked = Asked((self.decoder.prepare(example.id, plan, room or self.generation.max_new_tokens),))
        if asked.cut_tokens:
            self.cut_tokens[example.id] = asked.cut_tokens
        return asked

    def _room(self, example: Example, tokens: int) -> int:
        """Tokens the prompt must leave where so many are scored."""
        rendered = example.prompt().render()
        if isinstance(rendered, Joint) and rendered.scored:
            return tokens - 1  # the last one is predicted and never read: lm-eval cuts no token more
        return max(self.generation.max_new_tokens, tokens)

    def _answer_ids(self, example: Example, text: str) -> tuple[int, ...]:
        ids = self.lm.encoder.answer(text, example.prompt().render()) if text else ()
        return ids or (min(self.lm.encoder.eos_ids, default=0),)


def whole(system: System) -> ModelSystem:
    """The system with all that this package's own tasks use: model and decoder."""
    if not isinstance(system, ModelSystem):
        raise TypeError(
            f"{type(system).__name__} has what harness.task.System names; this task needs harness.run.system.ModelSystem"
        )
    return system


def _plain(example: Example) -> Plan:
    """The task's prompt without history, under the unedited model."""
    return Plan((Stream(example.prompt()),))
