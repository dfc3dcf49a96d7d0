"""Requests whose replies are kept: equal ones are sent once, those that were answered before not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from harness.servers.chat import GREEDY, Ask, NoReply, Reply, unsound
from harness.servers.reply_cache import ReplyCache

Progress = Callable[[str, int, int], None]


class Asker(Protocol):
    """A model that answers requests: an `Endpoint`, or one on this machine."""

    def ask(self, asks: Sequence[Ask], done: Callable[[int, Reply | NoReply], None]) -> list[Reply | NoReply]: ...


@dataclass(frozen=True)
class Heard:
    """What came of a request, or what had been kept of it."""

    reply: Reply | NoReply
    key: str
    cached: bool
    """Whether another run paid for it."""


@dataclass(frozen=True)
class Remembered:
    """A model and the replies that were kept of it. Every reply is kept as it arrives, so that none is paid for twice."""

    asker: Asker
    name: str
    identity: Mapping[str, Any]
    """What a reply depends on beside the request."""
    cache: ReplyCache
    label: str
    """Of the progress bar."""

    def ask(
        self,
        asks: Sequence[Ask],
        payer: str,
        progress: Progress = lambda label, done, total: None,
        fault: Callable[[Reply], str] = lambda reply: "",
    ) -> list[Heard]:
        """What came of each request, for the record called `payer`.

        A reply with a `fault`, or with log-probabilities that are none, is not kept; nor is what is no reply.
        """
        asked = [self._content(ask) for ask in asks]
        keys = [self.cache.key(content) for content in asked]
        first: dict[str, int] = {}
        for number, key in enumerate(keys):
            first.setdefault(key, number)
        with self.cache.open() as rows:
            found: dict[str, Heard] = {}
            for key in first:
                kept = rows.get(key)
                if kept and not unsound(kept.reply.candidates or ()) and not fault(kept.reply):
                    found[key] = Heard(kept.reply, key[:16], kept.payer != payer)
            new = [key for key in first if key not in found]

            def done(number: int, reply: Reply | NoReply) -> None:
                key = new[number]
                wrong = unsound(reply.candidates or ()) if isinstance(reply, Reply) else ""
                if wrong:
                    reply = NoReply(f"{self.name}: {wrong}")
                elif isinstance(reply, Reply) and not fault(reply):
                    rows.drop(key)
                    rows.put(key, asked[first[key]], reply, payer)
                found[key] = Heard(reply, key[:16], False)
                progress(self.label, len(found), len(first))

            if new:
                progress(self.label, len(found), len(first))
                self.asker.ask([asks[first[key]] for key in new], done)
        return [found[key] for key in keys]

    def _content(self, ask: Ask) -> dict[str, Any]:
        content = {"messages": ask.messages, "max_tokens": ask.max_tokens, "numbers": bool(ask.numbers)}
        sampling = {} if ask.sampling is GREEDY else {"sampling": dict(ask.sampling)}
        echo = {"prompt": ask.echo.prompt, "answer": ask.echo.answer} if ask.echo else {}
        return {**self.identity, **content, **sampling, **echo}
