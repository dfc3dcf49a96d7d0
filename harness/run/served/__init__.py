"""A method on a model behind a server: prompt-only plans, many requests at once.

Differs from the engine: the server's chat template renders the messages, its sampler draws (each sample with a seed of its
own), and there is no comparison with the unedited model. All sampling fields are sent, since servers apply a model's own
generation_config where one is missing. A reply that was kept is not paid for again, so a killed run goes on for nothing.

Choices are scored where the server returns the log-probabilities of a prompt (`harness.servers.scoring`). Several prompts and a
mix that is `linear` (CAD, context steering) are then exact too, where every choice is one token: such a mix of the choices'
log-probabilities is that of the whole vocabulary up to a number that all of them share.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, cast

from harness.data import Example, Joint, Prompt, Rendered
from harness.engine.flops import Cost
from harness.errors import ContextTooLong, HarnessError, UsageError, UserFailed
from harness.mix import First
from harness.plan import Plan
from harness.records.schema import Serving
from harness.run.answers import RULED_OUT, Effect, given, response_of
from harness.run.compared import Compared
from harness.run.served.choices import chosen, why_not_mixed
from harness.run.system import ModelSystem
from harness.servers.chat import COMPLETE, Ask, NoReply, Reply
from harness.servers.endpoint import AGAIN
from harness.servers.model import ServedModel, turns
from harness.servers.tokenizer import at_once
from harness.task import Sample

_TOO_LONG = re.compile(r"context.{0,40}(length|window|size)|too long|max(imum)?[ _](model|context|seq)", re.I)
_CONTEXT = re.compile(r"(?:(?:context|model)[ _](?:length|len|window|size)|limit of)\D{0,24}?(\d+)", re.I)
_STATUS = re.compile(r"code['\"]?: ?\d+", re.I)
NEUTRAL: Mapping[str, Any] = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
}
"""Sent all the same; a server that has no such field cannot apply one."""


_LEDGER: Mapping[str, str] = {
    "requests": "requests",
    "cached": "cached",
    "retries": "retries",
    "paid_input_tokens": "input_tokens",
    "paid_output_tokens": "output_tokens",
}
"""What a batch's costs say of its requests -> what the record calls it."""


@dataclass
class _Spent:
    """Stands where a decoder does: what was spent."""

    model: ServedModel
    cost: Cost = field(default_factory=Cost)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        getattr(self.model, name)
        raise AssertionError


@dataclass
class _Waiting:
    """A prompt on its way to the server, with what was left out of it so far."""

    example: Example
    prompt: Prompt
    kept: int
    asks: Sequence[Ask] = ()
    """One of its own to be answered, or one for each choice to be scored."""
    heard: Sequence[Reply | NoReply] = ()

    @property
    def rendered(self) -> Rendered:
        return self.prompt.first(self.kept).render()

    @property
    def failed(self) -> str:
        """Why there is no answer; empty where there is."""
        return next((reply.reason for reply in self.heard if isinstance(reply, NoReply)), "")

    @property
    def too_long(self) -> str:
        """How the server says that a prompt does not fit; empty where it does not say so.

        What it says of being busy, as "rate limit exceeded", is about no prompt.
        """
        for reply in self.heard:
            if isinstance(reply, NoReply) and reply.status and reply.status not in AGAIN:
                exceeds = reply.status < 500 and "exceed" in reply.reason.lower()
                if exceeds or _TOO_LONG.search(reply.reason):
                    return reply.reason
        return ""

    @property
    def replies(self) -> list[Reply]:
        return [reply for reply in self.heard if isinstance(reply, Reply)]


class ServedSystem(ModelSystem):
    """A method on a served model, ready to answer."""

    model: ServedModel

    def _made_decoder(self) -> Any:
        self.model = cast(ServedModel, self.lm)
        self.ledger: Counter[str] = Counter()
        """Requests, those that another run paid for, tries that failed, tokens paid for: since it was last read."""
        self.sent: dict[str, dict[str, Any]] = {}
        """What requests said beside their messages."""
        self.scoring = ""
        """How choices were scored, where some were."""
        self.models: set[str] = set()
        """How the server names those that answered."""
        return _Spent(self.model)

    def plan(self, example: Example) -> Plan:
        """Raises UsageError for a plan that is more than a server can answer."""
        plan = super().plan(example)
        if plan.answer is not None:
            return plan
        bare = not any(s.edits or s.adapters or s.exits or s.early for s in plan.streams)
        what = "several passes" if len(plan.streams) > 1 else "a mix" if bare else "edits, adapters or early exits"
        why = ""
        if not bare:
            why = "which need a model's weights"
        elif len(plan.streams) > 1 or plan.mix != First():
            why = why_not_mixed(plan.mix, example)
        if why:
            raise UsageError(
                f"method {type(self.method).__name__!r} asks for {what}, {why}; {self.model.name} is behind a server: run it with "
                "a model on this machine"
            )
        if plan.draws is not None:
            raise UsageError(
                f"method {type(self.method).__name__!r} chooses among several responses, which a model behind a server is not "
                "asked for; run it with a model on this machine"
            )
        return plan

    def check(self, examples: Sequence[Example]) -> None:
        """Raises UsageError where the examples cannot be answered, as far as that can be known before they are."""
        for number, example in enumerate(examples):
            plan = self.plan(example)
            mixed = plan.mix != First()
            if plan.answer is not None or not example.choices or (number and not mixed):
                continue
            self.model.scoring.check()
            for stream in plan.streams:
                try:
                    asks = self.model.scoring.asks(stream.prompt.render(), example.choices)
                except UsageError:
                    raise
                except HarnessError:  # of this example alone
                    continue
                lengths = [ask.echo.answer for ask in asks if ask.echo and isinstance(ask.echo.answer, int)]
                longest = max(lengths, default=1)
                if mixed and longest > 1:
                    raise UsageError(
                        f"method {type(self.method).__name__!r} mixes several prompts, which {self.model.name} behind its server "
                        f"can where every choice is one token; {example.choices[lengths.index(longest)]!r} is {longest}"
                    )

    def respond(
        self, examples: Sequence[Example], *, alike: Callable[[Example], str] = lambda example: ""
    ) -> Iterator[Sample]:
        by_id = {example.id: example for example in examples}
        if len(by_id) != len(examples):
            raise UsageError("two examples of the selection have the same id")
        for number, _, sample in self.in_batches(list(by_id), lambda ids: self.answer([by_id[i] for i in ids])):
            assert sample is not None
            yield replace(sample, batch=number)

    def answer(self, examples: Sequence[Example]) -> list[Sample]:
        """Ungraded samples of examples that are asked about at once."""
        found: dict[str, Sample] = {}
        plans: dict[str, Plan] = {}
        waiting: dict[str, list[_Waiting]] = {}
        for example in examples:
            try:
                plan = plans[example.id] = self.plan(example)
                if plan.answer is not None:
                    asked = given(plan.answer, example.choices)
                    assert asked.given is not None
                    found[example.id] = self._sample(example, asked, asked.given)
                    continue
                waiting[example.id] = [_Waiting(example, s.prompt, len(s.prompt.items)) for s in plan.streams]
            except (ContextTooLong, UserFailed) as error:
                found[example.id] = Sample(example.id, example.user.id, error=str(error))
        for scored in (False, True):
            some = [one for parts in waiting.values() for one in parts if bool(one.example.choices) == scored]
            if scored and some:
                self.scoring = self.model.scoring.how
            self._fit(some, scored=scored)
            self._ask_all(some)
        for ident, parts in waiting.items():
            found[ident] = self._read(parts, plans[ident])
        return [found[example.id] for example in examples]

    def effect(
        self, examples: Sequence[Example], responses: Sequence[str], kept: Compared = Compared()
    ) -> Effect | None:
        return None

    def spent(self) -> dict[str, int | float]:
        """The ledger since this was last asked."""
        spent, self.ledger = dict(self.ledger), Counter()
        return {**spent}

    def serving(self, batches: Iterable[Mapping[str, int | float]], before: Serving | None) -> Serving:
        total: Counter[str] = Counter()
        for batch in batches:
            total.update({name: int(batch.get(name, 0)) for name in _LEDGER})
        sent = {json.dumps(fields, sort_keys=True): fields for fields in (before.sent if before else [])} | self.sent
        return Serving(
            base_url=self.model.endpoint.base_url,
            models=sorted(({*before.models} if before else set()) | self.models - {""}),
            **{_LEDGER[name]: total[name] for name in _LEDGER},
            usd=self.model.price.usd(total["paid_input_tokens"], total["paid_output_tokens"])
            if self.model.price
            else None,
            scoring=self.scoring or (before.scoring if before else ""),
            sent=[sent[key] for key in sorted(sent)],
        )

    def _fit(self, waiting: Sequence[_Waiting], *, scored: bool) -> None:
        """Leave out the last items of prompts that the server counts as too long, as few as there need be."""
        open_ = [
            (one, -1, one.kept + 1) for one in waiting
        ]  # it fits with the first number of items, and not with the second
        while open_:
            rooms = self.model.room([one.rendered for one, _, _ in open_], scored=scored)
            again = []
            for (one, low, high), left in zip(open_, rooms, strict=True):
                if left is None or left >= self._needs(one.example):
                    low = one.kept
                else:
                    high = one.kept
                if left is not None and high - low > 1:
                    one.kept = (low + high) // 2
                    again.append((one, low, high))
                elif low < 0:
                    one.heard = [NoReply("the prompt is longer than the server's context even without any history")]
                else:
                    one.kept = low
            open_ = again

    def _needs(self, example: Example) -> int:
        """Tokens that a prompt must leave: as many as on this machine, and where answers are scored the one that servers add."""
        if not example.choices:
            return self.generation.max_new_tokens
        apart = max(self.model.tokenizer.length(choice) for choice in example.choices)
        joint = isinstance(example.prompt().render(), Joint)
        return apart + 1 if joint else max(self.generation.max_new_tokens, apart + 1)

    def _ask_all(self, waiting: Sequence[_Waiting]) -> None:
        """Ask, and ask again with fewer items what the server says is too long."""
        open_ = [one for one in waiting if not one.heard]
        while open_:
            at_once(self._set_asks, open_)
            asked = [(one, ask) for one in open_ if not one.heard for ask in one.asks]
            found = self.model.replies.ask([ask for _, ask in asked], self.payer, self.progress, _fault)
            heard: dict[int, list[Reply | NoReply]] = {}
            for (one, _), answer in zip(asked, found, strict=True):
                heard.setdefault(id(one), []).append(answer.reply)
                if isinstance(answer.reply, Reply):
                    self._count(answer.reply, cached=answer.cached)
                elif answer.reply.hopeless:
                    raise HarnessError(answer.reply.reason)
            again = []
            for one in open_:
                one.heard = one.heard or heard[id(one)]
                if one.too_long and one.kept:
                    one.kept, one.heard = _fewer(one.kept, one.too_long, self._needs(one.example)), ()
                    again.append(one)
            open_ = again

    def _set_asks(self, one: _Waiting) -> None:
        if not one.example.choices:
            one.asks = [self._request(one)]
            return
        try:
            one.asks = self.model.scoring.asks(one.rendered, one.example.choices)
        except UsageError:
            raise
        except HarnessError as error:
            one.heard = [NoReply(str(error))]

    def _request(self, one: _Waiting) -> Ask:
        sampling, most = self.generation.sampling, self.generation.max_new_tokens
        seed = int(hashlib.sha256(f"{sampling.seed} {one.example.id}".encode()).hexdigest()[:7], 16)
        fields = {
            **NEUTRAL,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "seed": seed if sampling.temperature else 0,
        }
        if self.generation.stop:
            fields["stop"] = list(self.generation.stop)
        asked_for = {name for name, value in fields.items() if name in NEUTRAL and value != NEUTRAL[name]}
        # a server may know the limit by its other name, and must know it by one
        required = asked_for | ({"stop"} & fields.keys()) | {"temperature", "max_completion_tokens"}
        return Ask(turns(one.rendered), most, sampling=fields, required=frozenset(required), room_for_thoughts=False)

    def _count(self, reply: Reply, *, cached: bool) -> None:
        cost = self.decoder.cost
        cost.prefill_tokens += reply.input_tokens
        cost.decode_tokens += reply.output_tokens
        self.ledger["requests"] += 1
        self.ledger["cached"] += cached
        self.ledger["retries"] += 0 if cached else reply.retries
        self.ledger["paid_input_tokens"] += 0 if cached else reply.input_tokens
        self.ledger["paid_output_tokens"] += 0 if cached else reply.output_tokens
        said = {name: value for name, value in reply.sent.items() if name != "seed"}
        self.sent[json.dumps(said, sort_keys=True)] = said
        self.models.add(reply.model)

    def _read(self, parts: Sequence[_Waiting], plan: Plan) -> Sample:
        """The sample of an example from what came of its prompts, one a stream."""
        first, example = parts[0], parts[0].example
        asked = [[ask.echo.prompt if ask.echo else ask.messages for ask in one.asks] for one in parts]
        sample = Sample(
            example.id,
            example.user.id,
            prompt_hash=hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16],
            history_items=first.kept,
            dropped_items=sum(len(one.prompt.items) - one.kept for one in parts),
        )
        failed = next((one.failed for one in parts if one.failed), "")
        if failed:
            return replace(sample, error=failed)
        if example.choices:
            return self._chosen(sample, parts, plan)
        (reply,) = first.replies
        fault = _fault(reply)
        if fault:
            return replace(sample, error=f"{self.model.name} gave {fault}")
        sample = replace(sample, prompt_tokens=reply.input_tokens, new_tokens=reply.output_tokens)
        finish = "length" if reply.finish.lower() not in COMPLETE else "stop"
        return replace(sample, response=reply.answer, finish=finish)

    def _chosen(self, sample: Sample, parts: Sequence[_Waiting], plan: Plan) -> Sample:
        example = parts[0].example
        try:
            found, greedy = chosen([one.replies for one in parts], plan.mix, example)
        except HarnessError as error:
            return replace(sample, error=str(error))
        answers = [[len(reply.scored) for reply in one.replies] for one in parts]
        tokens = max(one.replies[0].input_tokens - lengths[0] for one, lengths in zip(parts, answers, strict=True))
        sample = replace(
            sample, finish="choice", prompt_tokens=tokens, extra={"logprobs": found.logprobs, "greedy": list(greedy)}
        )
        if max(found.logprobs) == -math.inf:
            return replace(sample, error=RULED_OUT)
        return replace(sample, response=response_of(example, found))


def _fault(reply: Reply) -> str:
    """Why a reply is no response; one that has as many tokens as it may have is, and an empty one too."""
    if reply.refused:
        return ""
    if reply.only_thoughts:
        return "nothing but thoughts; give it more --max_new_tokens"
    whole = reply.finish.lower() in COMPLETE or reply.finish.lower() in ("length", "max_tokens")
    return "" if whole else f"an answer that was cut off (finish_reason={reply.finish})"


def _fewer(kept: int, reason: str, answer: int) -> int:
    """Fewer items: as many as the sizes in the server's refusal let hope for, where the answer takes so many tokens.

    Half of them at least: of a number that is no size (a name's, an id's) a further request is the price, and no history.
    """
    said = _STATUS.sub("", reason)
    context = _CONTEXT.search(said)
    sizes = [int(size) for size in re.findall(r"\d+", said) if not context or size != context[1]]
    share = (int(context[1]) - answer) / max(sizes) if context and any(sizes) else 0.8
    return max(0, min(kept - 1, int(kept * max(0.5, share))))
