"""A method on a model behind a server: prompt-only plans, many requests at once.

Differs from the engine: the server's chat template renders the messages, its sampler draws (each sample with a seed of its
own), and there is no comparison with the unedited model. All sampling fields are sent, since servers apply a model's own
generation_config where one is missing. A reply that was kept is not paid for again, so a killed run goes on for nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from harness.data import Example, Joint, Prompt
from harness.engine.rows import Cost
from harness.errors import ContextTooLong, HarnessError, UsageError, UserFailed
from harness.method import Fitted, Method, Progress
from harness.mix import First
from harness.plan import Plan
from harness.records.schema import Serving
from harness.run.answers import Effect
from harness.run.batches import Batching
from harness.run.system import ModelSystem
from harness.servers.chat import COMPLETE, Ask, NoReply, Reply
from harness.servers.model import ServedModel, turns
from harness.task import Generation, Sample

_TOO_LONG = re.compile(r"context.{0,40}(length|window|size)|too long|max(imum)?[ _](model|context|seq)|exceed", re.I)
_SIZES = re.compile(r"\d{3,}")
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

    cost: Cost = field(default_factory=Cost)


@dataclass
class _Waiting:
    """A prompt on its way to the server, with what was left out of it so far."""

    example: Example
    prompt: Prompt
    kept: int
    heard: Reply | NoReply | None = None

    @property
    def messages(self) -> tuple[tuple[str, str], ...]:
        return turns(self.prompt.first(self.kept).render())


class ServedSystem(ModelSystem):
    """A method on a served model, ready to answer."""

    def __init__(
        self,
        lm: ServedModel,
        method: Method,
        generation: Generation,
        *,
        shared: Fitted | None = None,
        personal: Mapping[str, Fitted | UserFailed | None] | None = None,
        batching: Batching | None = None,
        progress: Progress = lambda label, done, total: None,
        payer: str = "",
    ) -> None:
        self.lm = lm  # type: ignore[assignment]
        self.model = lm
        self.method, self.generation = method, generation
        self.shared, self.personal = shared, personal or {}
        self.batching, self.progress, self.payer = batching or Batching(), progress, payer
        self.decoder = _Spent()  # type: ignore[assignment]
        self.saved, self.elsewhere = Cost(), 0.0
        self.cut_tokens = {}
        self.ledger: Counter[str] = Counter()
        """Requests, those that another run paid for, tries that failed, tokens paid for: since it was last read."""
        self.sent: dict[str, dict[str, Any]] = {}
        """What requests said beside their messages."""
        self.models: set[str] = set()
        """How the server names those that answered."""

    def plan(self, example: Example) -> Plan:
        """Raises UsageError for a plan that is more than a prompt."""
        plan = super().plan(example)
        (stream, *more) = plan.streams
        if plan.answer is None and (more or stream.edits or stream.adapters or stream.exits or plan.mix != First()):
            what = "several passes" if more else "edits, adapters or early exits" if plan.mix == First() else "a mix"
            raise UsageError(
                f"method {type(self.method).__name__!r} asks for {what}, which need a model's weights; {self.model.name} is "
                "behind a server: run it with a model on this machine"
            )
        return plan

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
        waiting: list[_Waiting] = []
        for example in examples:
            try:
                plan = self.plan(example)
                if plan.answer is not None:
                    given = self._given(plan.answer, example.choices)
                    assert given.given is not None
                    found[example.id] = self._sample(example, given, given.given)
                    continue
                self._check_written(example)
                prompt = plan.streams[0].prompt
                waiting.append(_Waiting(example, prompt, len(prompt.items)))
            except (ContextTooLong, UserFailed) as error:
                found[example.id] = Sample(example.id, example.user.id, error=str(error))
        self._fit(waiting)
        self._ask_all(waiting)
        for one in waiting:
            found[one.example.id] = self._read(one)
        return [found[example.id] for example in examples]

    def effect(self, examples: Sequence[Example], responses: Sequence[str]) -> Effect | None:
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
            sent=[sent[key] for key in sorted(sent)],
        )

    def _check_written(self, example: Example) -> None:
        """Raises UsageError where an answer is not written but chosen, or a prompt is lm-eval's."""
        if example.choices or isinstance(example.prompt().render(), Joint):
            raise UsageError(
                f"this task scores given answers, which needs log-probabilities of a prompt; {self.model.name} is asked for "
                "written answers alone: run it with a model on this machine"
            )

    def _fit(self, waiting: Sequence[_Waiting]) -> None:
        """Leave out the last items of prompts that the server counts as too long, as few as there need be."""
        open_ = [
            (one, -1, one.kept + 1) for one in waiting
        ]  # it fits with the first number of items, and not with the second
        while open_:
            rooms = self.model.room([one.messages for one, _, _ in open_])
            again = []
            for (one, low, high), left in zip(open_, rooms, strict=True):
                if left is None or left >= self.generation.max_new_tokens:
                    low = one.kept
                else:
                    high = one.kept
                if left is not None and high - low > 1:
                    one.kept = (low + high) // 2
                    again.append((one, low, high))
                elif low < 0:
                    one.heard = NoReply("the prompt is longer than the server's context even without any history")
                else:
                    one.kept = low
            open_ = again

    def _ask_all(self, waiting: Sequence[_Waiting]) -> None:
        """Ask, and ask again with fewer items what the server says is too long."""
        open_ = [one for one in waiting if one.heard is None]
        while open_:
            asks = [self._request(one) for one in open_]
            found = self.model.replies.ask(asks, self.payer, self.progress, _fault)
            again = []
            for one, heard in zip(open_, found, strict=True):
                one.heard = heard.reply
                if isinstance(heard.reply, NoReply):
                    if heard.reply.hopeless:
                        raise HarnessError(heard.reply.reason)
                    if _TOO_LONG.search(heard.reply.reason) and one.kept:
                        one.kept = _fewer(one.kept, heard.reply.reason)
                        again.append(one)
                    continue
                self._count(heard.reply, cached=heard.cached)
            open_ = again

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
        required = asked_for | ({"stop"} & fields.keys()) | {"temperature"}
        return Ask(one.messages, most, sampling=fields, required=frozenset(required), room_for_thoughts=False)

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

    def _read(self, one: _Waiting) -> Sample:
        example, reply = one.example, one.heard
        digest = hashlib.sha256(json.dumps(one.messages).encode()).hexdigest()[:16]
        sample = Sample(
            example.id,
            example.user.id,
            prompt_hash=digest,
            history_items=one.kept,
            dropped_items=len(one.prompt.items) - one.kept,
        )
        assert reply is not None
        if isinstance(reply, NoReply):
            return replace(sample, error=reply.reason)
        fault = _fault(reply)
        if fault:
            return replace(sample, error=f"{self.model.name} gave {fault}")
        sample = replace(sample, prompt_tokens=reply.input_tokens, new_tokens=reply.output_tokens)
        finish = "length" if reply.finish.lower() not in COMPLETE else "stop"
        return replace(sample, response=reply.answer, finish=finish)


def _fault(reply: Reply) -> str:
    """Why a reply is no response; one that has as many tokens as it may have is, and an empty one too."""
    if reply.refused:
        return ""
    if reply.only_thoughts:
        return "nothing but thoughts; give it more --max_new_tokens"
    whole = reply.finish.lower() in COMPLETE or reply.finish.lower() in ("length", "max_tokens")
    return "" if whole else f"an answer that was cut off (finish_reason={reply.finish})"


def _fewer(kept: int, reason: str) -> int:
    """Fewer items: as many as the sizes in the server's refusal let hope for."""
    sizes = [int(size) for size in _SIZES.findall(reason)]
    share = min(sizes) / max(sizes) if len(sizes) > 1 and max(sizes) else 0.8
    return max(0, min(kept - 1, int(kept * share)))
