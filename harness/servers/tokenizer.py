"""The tokenizer of a server that lends it (vLLM's `/tokenize`): ids, and how many of them its context holds."""

from __future__ import annotations

import http.client
import time
import urllib.error
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from harness.data import Joint, Rendered
from harness.errors import HarnessError
from harness.servers.endpoint import AGAIN, Endpoint

Job = TypeVar("Job")
Result = TypeVar("Result")

AT_ONCE = 16
"""Requests; they cost a server next to nothing."""
TRIES = 5
NOT_IMPLEMENTED = 501


@dataclass(frozen=True)
class Tokens:
    ids: tuple[int, ...]
    context: int
    """As many as the model takes, the answer's among them."""


class ServerTokenizer:
    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._answers: dict[str, tuple[int, ...]] = {}

    @cached_property
    def lent(self) -> bool:
        """Whether the server lends it."""
        try:
            self.ids({"prompt": "a b"}, known=False)
        except HarnessError:
            return False
        return True

    def ids(self, asked: Mapping[str, Any], *, known: bool = True) -> Tokens:
        """Raises HarnessError where the server does not say them, tried again while it is busy or broken.

        Of one that is not `known` to have a tokenizer an answer without ids is its last word.
        """
        pause = self._endpoint.limits.backoff
        for left in reversed(range(TRIES)):
            try:
                found: Any = self._endpoint.post("/tokenize", {"model": self._endpoint.model, **asked})
                return Tokens(tuple(int(i) for i in found["tokens"]), int(found["max_model_len"]))
            except urllib.error.HTTPError as error:
                reason = f"{error.code}: {_body(error)[:200].decode(errors='replace')}"
                if (error.code < 500 and error.code not in AGAIN) or error.code == NOT_IMPLEMENTED:
                    break
            except OSError as error:
                reason = f"{type(error).__name__}: {error}"
            except (ValueError, KeyError, TypeError) as error:
                reason = f"{type(error).__name__}: {error}"
                if not known:
                    break
            if left:
                time.sleep(min(pause, 30.0))
                pause *= 2
        raise HarnessError(self._endpoint.shown(f"{self._endpoint.base_url} does not tokenize: {reason[:200]}"))

    def prompt(self, rendered: Rendered) -> Tokens:
        """Of a prompt as it stands before an answer that is scored: the conversation in the server's template, or raw text."""
        if isinstance(rendered, str):
            return self.ids({"prompt": rendered})
        if not isinstance(rendered, Joint):
            return self.conversation(messages(rendered))
        if isinstance(rendered.content, str):
            return self.ids({"prompt": rendered.content.rstrip()})
        return self.conversation(messages(rendered.content), open_turn=rendered.open_turn)

    def conversation(self, turns: Sequence[Mapping[str, str]], *, open_turn: bool = True) -> Tokens:
        """`open_turn`: the answer is a turn of its own; else it goes on with the last one."""
        return self.ids(
            {"messages": turns, "add_generation_prompt": open_turn, "continue_final_message": not open_turn}
        )

    def chat(self, turns: Sequence[tuple[str, str]]) -> Tokens:
        """Of a conversation that the server is to go on with."""
        return self.conversation([{"role": r, "content": c.encode(errors="replace").decode()} for r, c in turns])

    def answer(self, rendered: Rendered, before: Tokens, text: str) -> tuple[int, ...]:
        """Ids of an answer that follows a prompt. Of a `Joint` one what both have beyond the prompt alone, as lm-eval reads it.

        Raises HarnessError where they begin with other ids than the prompt, so that no token is the answer's alone.
        """
        if not isinstance(rendered, Joint):
            lead = " " if isinstance(rendered, str) and not rendered[-1:].isspace() else ""
            return self._apart(lead + text)
        content = rendered.content
        if isinstance(content, str):
            both = self.ids({"prompt": content + text})
        elif rendered.open_turn:
            return self._apart(text)
        else:
            *first, last = messages(content)
            both = self.conversation([*first, {**last, "content": last["content"] + text}], open_turn=False)
        count = len(before.ids)
        if both.ids[:count] != before.ids or len(both.ids) == count:
            raise HarnessError(f"no token of the server's belongs to the answer {text[:40]!r} alone")
        return both.ids[count:]

    def length(self, text: str) -> int:
        """Tokens of a text by itself; where the server does not say, as many as it has words."""
        return len(self._apart(text)) if self.lent else len(text.split())

    def _apart(self, text: str) -> tuple[int, ...]:
        if text not in self._answers:
            self._answers[text] = self.ids({"prompt": text, "add_special_tokens": False}).ids
        return self._answers[text]


def messages(rendered: Sequence[Any]) -> list[dict[str, str]]:
    """As servers take them; a model may have written half a surrogate pair, which cannot be sent."""
    return [{"role": m.role, "content": m.content.encode(errors="replace").decode()} for m in rendered]


def _body(error: urllib.error.HTTPError) -> bytes:
    try:
        return error.read()
    except (OSError, http.client.HTTPException):
        return b""


def at_once(run: Callable[[Job], Result], jobs: Iterable[Job]) -> list[Result]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(run, jobs))
