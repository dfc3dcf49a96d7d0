"""A model behind a server that speaks OpenAI's chat completions: many requests at once, each answered or explained.

At most `concurrency` requests wait together. A 429, a 5xx, a timeout, a broken connection or an answer that is no JSON
is tried again after growing pauses; a wrong key, an unknown model or an empty account stops the rest, and so do many
failures in a row. What a server does not take (log-probabilities, `max_tokens`, a temperature) is left out once it has
said so. Ctrl-C sends nothing more and waits for the answers on their way, which are paid for; a second one does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from harness.errors import DataMissing

if TYPE_CHECKING:
    import openai

T = TypeVar("T")

ENDPOINT = "openai/"
OPENAI = "https://api.openai.com/v1"
TOP = 20
"""Candidates for the first token that a server is asked for: as many as OpenAI gives."""
THOUGHTS = 4096
"""Tokens left to a model that thinks before it answers and counts its thoughts as output."""
_PATIENCE = 8
"""Requests that fail one after the other before no more are sent."""


@dataclass(frozen=True)
class Limits:
    """How a server is treated. None of it changes an answer."""

    concurrency: int = 16
    timeout: float = 120.0
    """Seconds until an answer must be there, whole."""
    retries: int = 6
    """Further tries of one request."""
    backoff: float = 1.0
    """Seconds before the first of them, doubled for each that follows, 30 at most."""


@dataclass(frozen=True)
class Ask:
    """One request."""

    messages: tuple[tuple[str, str], ...]
    """(role, content)."""
    max_tokens: int
    numbers: Literal["", "wanted", "needed"] = ""
    """Whether the answer's likely first tokens are asked for; an answer without those needed is a broken one."""


@dataclass(frozen=True)
class Reply:
    text: str
    candidates: tuple[tuple[str, float], ...] | None = None
    """What the answer may begin with and its log-probability in nats; None where the server does not say."""
    tokens: tuple[str, ...] = ()
    """Of the text, where the server gives log-probabilities."""
    refused: bool = False
    """Whether the server marks it as a refusal."""
    finish: str = ""
    model: str = ""
    """How the server names the model that answered."""
    input_tokens: int = 0
    output_tokens: int = 0
    retries: int = 0


@dataclass(frozen=True)
class NoReply:
    reason: str
    hopeless: bool = False
    """Whether no other request to this server can be answered either."""


class Endpoint:
    """Asks one model. It cuts no prompt: one that is too long for the server has no reply."""

    def __init__(self, model: str, whose: str, base_url: str | None = None, limits: Limits = Limits()) -> None:
        """`whose` request it is (judge, writer) says the message where neither a key nor a server is given: DataMissing."""
        self.model = model
        self.limits = limits
        self._key = os.environ.get("OPENAI_API_KEY")
        base_url = base_url or os.environ.get("OPENAI_BASE_URL")
        if not self._key and not base_url:
            raise DataMissing(
                f"{whose} '{ENDPOINT}{model}' needs $OPENAI_API_KEY, or $OPENAI_BASE_URL of a server that needs no key"
            )
        self.base_url = (base_url or OPENAI).rstrip("/")
        self._dialect = _Dialect()

    def ask(
        self, asks: Sequence[Ask], done: Callable[[int, Reply | NoReply], None] = lambda number, reply: None
    ) -> list[Reply | NoReply]:
        """What came of each request; `done` hears of every one as it ends, so that nothing paid for is lost."""
        return _run(self._all(asks, done)) if asks else []

    async def _all(self, asks: Sequence[Ask], done: Callable[[int, Reply | NoReply], None]) -> list[Reply | NoReply]:
        import openai

        found: dict[int, Reply | NoReply] = {}
        waiting = iter(enumerate(asks))
        stop = _Stop()

        async def work() -> None:
            for number, ask in waiting:
                if stop.interrupted.is_set():
                    break
                found[number] = (
                    NoReply(stop.reason, stop.hopeless) if stop.reason else await self._one(client, ask, stop)
                )
                done(number, found[number])

        client = openai.AsyncOpenAI(
            api_key=self._key or "none", base_url=self.base_url, timeout=self.limits.timeout, max_retries=0
        )
        async with client:
            workers = [asyncio.create_task(work()) for _ in range(min(self.limits.concurrency, len(asks)))]
            try:
                await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
            except asyncio.CancelledError:
                stop.interrupted.set()
                await asyncio.wait(workers)
                raise
            for worker in workers:
                worker.cancel()  # they have ended, unless one of them raised
            await asyncio.gather(*workers)
        return [found[number] for number in range(len(asks))]

    async def _one(self, client: openai.AsyncOpenAI, ask: Ask, stop: _Stop) -> Reply | NoReply:
        import openai

        attempt = 0
        while True:
            dialect, asked_to_wait = self._dialect, 0.0
            try:
                async with asyncio.timeout(self.limits.timeout):
                    reply = await self._send(client, ask, dialect)
                if ask.numbers == "needed" and reply.candidates is None:
                    raise _Malformed("an answer without the log-probabilities that were asked for")
                stop.failures = 0
                return replace(reply, retries=attempt)
            except openai.APIStatusError as error:
                simpler = dialect.without_refused(error)
                if simpler is not None:
                    self._dialect = simpler
                    continue
                reason, asked_to_wait = _line(error), _retry_after(error)
                if error.status_code in (401, 403, 404) or error.code == "insufficient_quota":
                    stop.reason, stop.hopeless = f"{ENDPOINT}{self.model} at {self.base_url}: {reason}", True
                    return NoReply(stop.reason, hopeless=True)
                if error.status_code < 500 and error.status_code not in (408, 409, 425, 429):
                    return NoReply(reason)
            except (TimeoutError, openai.APITimeoutError):
                reason = f"no answer within {self.limits.timeout:g} s"
            except (openai.OpenAIError, _Malformed) as error:
                reason = _line(error)
            if attempt == self.limits.retries or stop.reason:
                break
            attempt += 1
            pause = min(30.0, self.limits.backoff * 2 ** (attempt - 1)) * random.uniform(0.5, 1)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.interrupted.wait(), max(pause, asked_to_wait))
                return NoReply(reason)
        tries = f"{attempt + 1} tries" if attempt else "1 try"
        reason = f"{ENDPOINT}{self.model} at {self.base_url}: {reason} ({tries})"
        stop.failures += 1
        if stop.failures >= max(_PATIENCE, self.limits.concurrency):
            stop.reason = f"not asked, since {stop.failures} requests in a row failed: {reason}"
        return NoReply(reason)

    async def _send(self, client: openai.AsyncOpenAI, ask: Ask, dialect: _Dialect) -> Reply:
        options: dict[str, Any] = {}
        if dialect.thinks:
            options["max_completion_tokens"] = ask.max_tokens + THOUGHTS
        else:
            options["max_tokens"] = ask.max_tokens
        if dialect.greedy:
            options |= {"temperature": 0, "seed": 0}
        if ask.numbers and dialect.log_probabilities:
            options |= {"logprobs": True, "top_logprobs": TOP}
        # a model may have answered half a surrogate pair, which cannot be sent
        messages: Any = [{"role": r, "content": c.encode(errors="replace").decode()} for r, c in ask.messages]
        raw = await client.chat.completions.with_raw_response.create(model=self.model, messages=messages, **options)
        return _reply(raw.http_response.content)


@dataclass
class _Stop:
    """Why no more requests are sent."""

    reason: str = ""
    hopeless: bool = False
    interrupted: asyncio.Event = field(default_factory=asyncio.Event)
    failures: int = 0
    """In a row."""


@dataclass(frozen=True)
class _Dialect:
    """What a server takes, as far as it has not said otherwise."""

    thinks: bool = False
    """Whether the limit is called `max_completion_tokens` and covers thoughts."""
    greedy: bool = True
    """Whether it can be told a temperature and a seed."""
    log_probabilities: bool = True

    def without_refused(self, error: openai.APIStatusError) -> _Dialect | None:
        """The dialect without what this error complains of; None where that is something else."""
        said = str(error.body).lower()
        if error.status_code not in (400, 403, 422):
            return None
        if self.log_probabilities and "logprobs" in said:
            return replace(self, log_probabilities=False)
        if not self.thinks and "max_completion_tokens" in said:
            return replace(self, thinks=True)
        if self.greedy and ("temperature" in said or "seed" in said):
            return replace(self, greedy=False)
        return None


class _Malformed(Exception):
    """An answer that is not what the protocol says."""


def _reply(content: bytes) -> Reply:
    try:
        body = json.loads(content)
        choice = body["choices"][0]
        message = choice["message"]
        text, usage = message.get("content") or message.get("refusal") or "", body.get("usage") or {}
        shown = (choice.get("logprobs") or {}).get("content") or []
        candidates = (
            [(str(top["token"]), float(top["logprob"])) for top in (shown[0].get("top_logprobs") or [])[:TOP]]
            if shown
            else []
        )
        if not isinstance(text, str):
            raise TypeError("content is no text")
        return Reply(
            text,
            tuple(candidates) or None,
            tuple(str(token["token"]) for token in shown),
            refused=bool(message.get("refusal")) or choice.get("finish_reason") == "content_filter",
            finish=str(choice.get("finish_reason") or ""),
            model=str(body.get("model") or ""),
            input_tokens=int(usage.get("prompt_tokens") or 0),
            output_tokens=int(usage.get("completion_tokens") or 0),
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        start = content[:80].decode(errors="replace")
        raise _Malformed(f"an answer that is no chat completion ({type(error).__name__}): {start!r}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _retry_after(error: openai.APIStatusError) -> float:
    """Seconds the server asks to wait, a minute at most."""
    try:
        return min(60.0, max(0.0, float(error.response.headers.get("retry-after", 0))))
    except ValueError:  # a date; the pauses of our own will do
        return 0.0


def _run(work: Coroutine[Any, Any, T]) -> T:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:  # a notebook's loop runs already, and cannot run two
        return pool.submit(asyncio.run, work).result()
