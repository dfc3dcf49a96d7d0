"""A judge on this machine, through our own engine: the probability of every number it could answer, not of a top 20.

The probability of `8` is that the answer begins with `8` and the next token is no digit, so a tokenizer that writes 85 as
`8` `5` gives the same kind of score as one that has a token for it. All strings share the prompt's prefill.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Self

import torch

from harness.data import HistoryItem, Message, Prompt
from harness.engine.decode import Decoder
from harness.engine.loading import load_model
from harness.engine.machine import attempt
from harness.engine.model import LanguageModel
from harness.engine.rows import Request
from harness.errors import ContextTooLong
from harness.plan import Plan, Stream
from harness.plugins.registry import model_row
from harness.servers.chat import Ask, NoReply, Reply
from harness.task import REFUSAL, TOO_LARGE

NUMBERS = tuple(str(n) for n in range(101))
_TEXTS = 8
"""Answers written in one batch."""
_CACHED = 32768
"""Prompt tokens cached at once, over the rows of a batch of numbers."""


@dataclass(frozen=True)
class _AsGiven:
    """A conversation that is rendered as it is."""

    messages: tuple[Message, ...]

    def __call__(self, text: str, items: Sequence[HistoryItem], summary: str) -> tuple[Message, ...]:
        return self.messages


def _plan(ask: Ask) -> Plan:
    messages = tuple(Message(role, content) for role, content in ask.messages)  # type: ignore[arg-type]
    return Plan((Stream(Prompt(_AsGiven(messages), "")),))


class LocalModel:
    """Answers requests one after the other; those for a text, several in one batch."""

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
        self._decoder = Decoder(lm)
        self._at_once, self._tokens = _TEXTS, _CACHED

    @classmethod
    def load(cls, name: str) -> Self:
        """An alias, hub id or folder. Raises as loading a model does."""
        return cls(load_model(model_row(name)))

    def ask(
        self, asks: Sequence[Ask], done: Callable[[int, Reply | NoReply], None] = lambda number, reply: None
    ) -> list[Reply | NoReply]:
        found: dict[int, Reply | NoReply] = {}

        def keep(number: int, reply: Reply | NoReply) -> None:
            found[number] = reply
            done(number, reply)

        texts: dict[int, Request] = {}
        for number, ask in enumerate(asks):
            try:
                if ask.numbers:
                    keep(number, self._numbers(ask))
                else:
                    texts[number] = self._decoder.prepare(str(number), _plan(ask), ask.max_tokens)
            except ContextTooLong as error:
                keep(number, NoReply(f"{self.lm.name}: {error}"))
        waiting = list(texts)
        while waiting:
            batch = waiting[: self._at_once]
            longest = max(asks[number].max_tokens for number in batch)
            replies = attempt(partial(self._texts, [texts[n] for n in batch], longest))
            if replies is None and len(batch) > 1:
                self._at_once = (len(batch) + 1) // 2
                continue
            waiting = waiting[len(batch) :]
            rated: Sequence[Reply | NoReply] = replies or [self._too_large()]
            for number, reply in zip(batch, rated, strict=True):
                keep(number, reply)
        return [found[number] for number in range(len(asks))]

    def _too_large(self) -> NoReply:
        return NoReply(f"{self.lm.name}: {TOO_LARGE}; free the device of other work, and the same command asks again")

    def _texts(self, requests: Sequence[Request], max_tokens: int) -> list[Reply]:
        answers = self._decoder.generate(requests, max_new_tokens=max_tokens)
        return [
            self._spent(request, Reply(answer.text, finish=answer.finish, output_tokens=len(answer.ids)))
            for request, answer in zip(requests, answers, strict=True)
        ]

    def _numbers(self, ask: Ask) -> Reply | NoReply:
        """`candidates` are the 101 numbers; `text` is the likeliest of them and REFUSAL."""
        plan = _plan(ask)
        messages = plan.streams[0].prompt.render()
        ids = [self.lm.encoder.answer(text, messages) for text in (*NUMBERS, REFUSAL)]
        request = self._decoder.prepare("judge", plan, max(map(len, ids)) + 1)
        logprobs: list[float] = []
        while len(logprobs) < len(ids):
            some = ids[len(logprobs) : len(logprobs) + max(1, self._tokens // request.tokens)]
            found = attempt(partial(self._beginnings, request, some))
            if found is None and len(some) == 1:
                return self._too_large()
            if found is None:
                self._tokens = (len(some) + 1) // 2 * request.tokens
            logprobs += found or []
        best = max(range(len(ids)), key=logprobs.__getitem__)
        candidates = tuple(zip(NUMBERS, logprobs, strict=False))
        return self._spent(request, Reply((*NUMBERS, REFUSAL)[best], candidates))

    def _beginnings(self, request: Request, answers: Sequence[tuple[int, ...]]) -> list[float]:
        """Log-probability that the answer begins with these ids and goes on with no digit, in nats."""
        # one more token, whichever, since the distribution after a number is what says where it ends
        rows = self._decoder.distributions([request] * len(answers), [(*answer, answer[-1]) for answer in answers])
        found = []
        for answer, row in zip(answers, rows, strict=True):
            said = row[torch.arange(len(answer)), torch.tensor(answer, device=row.device)].double().sum()
            goes_on = row[-1, self._digits].double().exp().sum()
            found.append(float(said + torch.log1p(-goes_on.clamp(max=1))))
        return found

    def _spent(self, request: Request, reply: Reply) -> Reply:
        return replace(reply, model=self.lm.name, input_tokens=request.tokens, sent={"temperature": 0})

    @cached_property
    def _digits(self) -> torch.Tensor:
        """Ids of tokens that would carry a number on."""
        texts = self.lm.encoder.tokenizer.convert_ids_to_tokens(range(len(self.lm.encoder.tokenizer)))
        carry_on = [i for i, text in enumerate(texts) if text and text[0] in "0123456789"]
        return torch.tensor(carry_on, device=self.lm.device)
