"""A model behind a server that speaks OpenAI's chat completions: many requests at once, each answered or explained.

Requests begin with ten at a time; while all of them are answered and more wait they double, up to `concurrency`, and a
429 or a timeout takes a fifth of them away. A 429, a 5xx, a timeout, a broken connection or an answer that is no JSON
is tried again after growing pauses; a wrong key, an unknown model or an empty account stops the rest, and so do many
failures in a row. A field that a server does not take (`seed`, a temperature, log-probabilities, `max_tokens`) is left out
once the server has named it as the reason and taken the request without it; every reply says what it was asked with. A
model that spends its tokens on thoughts is given more of them. Ctrl-C sends nothing more and waits for the answers on
their way, which are paid for; a second one does not.

A server's address may hold credentials (`http://me:word@host/v1?api_key=...`): they are sent, and appear nowhere else.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import http.client
import json
import math
import os
import random
import time
import urllib.request
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlencode

from harness.errors import DataMissing
from harness.servers.address import ENDPOINT, OPENAI, Address
from harness.servers.chat import TOP, Ask, Malformed, NoReply, Reply, read_reply, refused_fields, words_of
from harness.servers.echo import read_echo

if TYPE_CHECKING:
    import openai

T = TypeVar("T")

THOUGHTS = 4096
"""Tokens left to a model that thinks before it answers and counts its thoughts as output."""
AGAIN = (408, 409, 425, 429)
"""Refusals of now, and not of the request."""
_PATIENCE = 8
"""Requests that fail one after the other before no more are sent."""
_LONGEST_PAUSE = 60.0
"""Seconds."""
_START = 10
"""Requests that are sent at once before anything is known of a server."""
_OPENAI_FIELDS = frozenset(
    ("max_tokens", "max_completion_tokens", "temperature", "seed", "logprobs", "top_logprobs", "top_p", "stop",
     "presence_penalty", "frequency_penalty", "echo")
)  # fmt: skip
"""What OpenAI's own client has names for."""


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


def server_of(model: str, whose: str, base_url: str | None) -> Address:
    """Where the model is asked. `whose` request it is (model, judge, writer) say the messages.

    Raises DataMissing where neither a key nor a server is given, UsageError for an address that is none.
    """
    base_url = base_url or os.environ.get("OPENAI_BASE_URL")
    if not os.environ.get("OPENAI_API_KEY") and not base_url:
        raise DataMissing(
            f"{whose} '{ENDPOINT}{model}' needs $OPENAI_API_KEY, or $OPENAI_BASE_URL of a server that needs no key"
        )
    return Address.at(base_url or OPENAI, whose)


class Endpoint:
    """Asks one model. It cuts no prompt: one that is too long for the server has no reply."""

    def __init__(self, model: str, whose: str, base_url: str | None = None, limits: Limits = Limits()) -> None:
        """Raises as `server_of`."""
        self.model = model
        self.limits = limits
        self._key = os.environ.get("OPENAI_API_KEY")
        self._server = server_of(model, whose, base_url)
        self._dialect = _Dialect()

    @property
    def base_url(self) -> str:
        """Where the server is, without credentials."""
        return self._server.shown

    def ask(
        self, asks: Sequence[Ask], done: Callable[[int, Reply | NoReply], None] = lambda number, reply: None
    ) -> list[Reply | NoReply]:
        """What came of each request; `done` hears of every one as it ends, so that nothing paid for is lost."""
        return _run(self._all(asks, done)) if asks else []

    def post(self, path: str, content: Mapping[str, Any]) -> Any:
        """What the server says to a request beside OpenAI's protocol, at its root. Raises OSError, ValueError."""
        root = self._server.url.removesuffix("/v1")
        query = f"?{urlencode(self._server.query)}" if self._server.query else ""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key or 'none'}"}
        request = urllib.request.Request(
            f"{root}{path}{query}", json.dumps(content).encode(), {**headers, **self._server.headers}
        )
        try:
            with urllib.request.urlopen(request, timeout=self.limits.timeout) as reply:
                return json.loads(reply.read())
        except http.client.HTTPException as error:  # an answer that ends before its end
            raise OSError(f"{type(error).__name__}: {error}") from error

    async def _all(self, asks: Sequence[Ask], done: Callable[[int, Reply | NoReply], None]) -> list[Reply | NoReply]:
        import openai

        found: dict[int, Reply | NoReply] = {}
        waiting = iter(enumerate(asks))
        stop = _Stop()

        gate = _Gate(self.limits.concurrency)

        async def work() -> None:
            for number, ask in waiting:
                async with gate:
                    if stop.interrupted.is_set():
                        break
                    found[number] = (
                        NoReply(stop.reason, stop.hopeless) if stop.reason else await self._one(client, ask, stop, gate)
                    )
                done(number, found[number])

        client = openai.AsyncOpenAI(
            api_key=self._key or "none",
            base_url=self._server.url,
            default_query=dict(self._server.query),
            default_headers=dict(self._server.headers),
            timeout=self.limits.timeout,
            max_retries=0,
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

    async def _one(self, client: openai.AsyncOpenAI, ask: Ask, stop: _Stop, gate: _Gate) -> Reply | NoReply:
        import openai

        attempt, spent = 0, (0, 0)
        trial: _Dialect | None = None
        """What the server may take, until it has."""
        while True:
            dialect, asked_to_wait, status = trial or self._dialect, 0.0, 0
            try:
                async with asyncio.timeout(self.limits.timeout):
                    reply = await self._send(client, ask, dialect)
                if ask.numbers == "needed" and reply.candidates is None:
                    raise Malformed("an answer without the log-probabilities that were asked for")
                if trial is not None:
                    self._dialect, trial = self._dialect.and_(trial), None
                stop.failures = 0
                await gate.answered()
                reply = replace(
                    reply,
                    retries=attempt,
                    input_tokens=reply.input_tokens + spent[0],
                    output_tokens=reply.output_tokens + spent[1],
                )
                if reply.only_thoughts and ask.room_for_thoughts and ask.numbers != "needed" and not dialect.roomy:
                    self._dialect = replace(self._dialect, roomy=True)
                    spent = reply.input_tokens, reply.output_tokens
                    continue
                return reply
            except openai.APIStatusError as error:
                refused = refused_fields(error.status_code, error.body, self._fields(ask, dialect), ask)
                needed = refused & ask.required
                if needed:
                    return NoReply(f"the server does not take {', '.join(sorted(needed))}: {self._line(error)}")
                other = dialect.leaving(refused)
                if self._fields(ask, other) != self._fields(ask, dialect):
                    trial = other
                    continue  # else it is told the same again, and says the same
                reason, asked_to_wait, status = self._line(error), _retry_after(error), error.status_code
                if status == 429:
                    gate.busy()
                if status in (401, 403, 404) or error.code == "insufficient_quota":
                    stop.reason, stop.hopeless = f"{ENDPOINT}{self.model} at {self.base_url}: {reason}", True
                    return NoReply(stop.reason, hopeless=True)
                if status < 500 and status not in AGAIN:
                    return NoReply(reason, status=status)
            except (TimeoutError, openai.APITimeoutError):
                reason = f"no answer within {self.limits.timeout:g} s"
                gate.busy()  # more at once than it computes: what is sent again it computes again
            except (openai.OpenAIError, Malformed) as error:
                reason = self._line(error)
            if attempt == self.limits.retries or stop.reason:
                break
            attempt += 1
            pause = min(30.0, self.limits.backoff * 2 ** (attempt - 1)) * random.uniform(0.5, 1)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.interrupted.wait(), max(pause, asked_to_wait))
                return NoReply(reason, status=status)
        tries = f"{attempt + 1} tries" if attempt else "1 try"
        reason = f"{ENDPOINT}{self.model} at {self.base_url}: {reason} ({tries})"
        stop.failures += 1
        if stop.failures >= max(_PATIENCE, gate.limit):
            stop.reason = f"not asked, since {stop.failures} requests in a row failed: {reason}"
        return NoReply(reason, status=status)

    def _fields(self, ask: Ask, dialect: _Dialect) -> dict[str, Any]:
        """What a request says beside its messages."""
        room = ask.max_tokens + (THOUGHTS if dialect.roomy and ask.room_for_thoughts else 0)
        renamed = dialect.renamed and ask.echo is None
        fields = {"max_completion_tokens" if renamed else "max_tokens": room, **ask.sampling}
        if ask.numbers:
            fields |= {"logprobs": True, "top_logprobs": TOP}
        return {n: value for n, value in fields.items() if n not in dialect.without or n in ask.required}

    async def _send(self, client: openai.AsyncOpenAI, ask: Ask, dialect: _Dialect) -> Reply:
        fields = self._fields(ask, dialect)
        known = {name: value for name, value in fields.items() if name in _OPENAI_FIELDS}
        others = {name: value for name, value in fields.items() if name not in _OPENAI_FIELDS} or None
        if ask.echo is not None:
            prompt: Any = ask.echo.prompt if isinstance(ask.echo.prompt, str) else list(ask.echo.prompt)
            said: Any = await client.completions.with_raw_response.create(
                model=self.model, prompt=prompt, extra_body=others, **known
            )
            reply = read_echo(said.http_response.content, ask.echo)
            return replace(reply, sent=fields, model=self.shown(reply.model))
        # a model may have answered half a surrogate pair, which cannot be sent
        messages: Any = [{"role": r, "content": c.encode(errors="replace").decode()} for r, c in ask.messages]
        raw = await client.chat.completions.with_raw_response.create(
            model=self.model, messages=messages, extra_body=others, **known
        )
        reply = read_reply(raw.http_response.content, strict=ask.numbers == "needed")
        return replace(reply, sent=fields, model=self.shown(reply.model))

    def _line(self, error: Exception) -> str:
        """An error in one line, as it may be shown, with what the server says of it."""
        body, line = getattr(error, "body", None), " ".join(str(error).split())
        said = " ".join(" ".join(words_of(body)).split())
        if said and " - " not in line:
            line = f"{line} - {said}"
        return self.shown(line)[:200] or type(error).__name__

    def shown(self, text: str) -> str:
        """As it may be shown: without credentials."""
        return self._server.hide(text, self._key or "")


class _Gate:
    """How many requests are on their way at once. Used by one event loop."""

    def __init__(self, most: int) -> None:
        self.limit, self._most = min(_START, most), most
        self._inside, self._answered = 0, 0
        self._changed = asyncio.Condition()

    async def __aenter__(self) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._inside < self.limit)
            self._inside += 1

    async def __aexit__(self, *_: object) -> None:
        async with self._changed:
            self._inside -= 1
            self._changed.notify()

    async def answered(self) -> None:
        """One more was; when as many were as may be out, twice as many may be, if as many were out."""
        self._answered += 1
        if self._answered >= self.limit and self._inside >= self.limit and self.limit < self._most:
            self.limit, self._answered = min(self._most, 2 * self.limit), 0
            async with self._changed:
                self._changed.notify_all()

    def busy(self) -> None:
        self.limit, self._answered = max(1, self.limit * 4 // 5), 0


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

    renamed: bool = False
    """Whether the limit is called `max_completion_tokens`. It covers thoughts."""
    roomy: bool = False
    """Whether the model thinks before it answers, and needs tokens for that."""
    without: frozenset[str] = frozenset()
    """Fields it does not take."""

    def leaving(self, refused: Collection[str]) -> _Dialect:
        """Without these fields, or with the other name of the limit."""
        renamed = self.renamed or "max_tokens" in refused
        numbers = {"logprobs", "top_logprobs"} if {"logprobs", "top_logprobs"} & set(refused) else set()
        left_out = self.without | (set(refused) - {"max_tokens"}) | numbers
        return _Dialect(renamed, self.roomy or renamed, frozenset(left_out))

    def and_(self, other: _Dialect) -> _Dialect:
        return _Dialect(self.renamed or other.renamed, self.roomy or other.roomy, self.without | other.without)


def _retry_after(error: openai.APIStatusError) -> float:
    """Seconds the server asks to wait, a minute at most; it may say a date."""
    said = error.response.headers.get("retry-after", "0")
    try:
        seconds = float(said)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(said).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return min(_LONGEST_PAUSE, max(0.0, seconds)) if not math.isnan(seconds) else 0.0


def _run(work: Coroutine[Any, Any, T]) -> T:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:  # a notebook's loop runs already, and cannot run two
        return pool.submit(asyncio.run, work).result()
