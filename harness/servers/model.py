"""A model behind a server: what a prompt-only plan needs of one, `--model openai/<name> --model_base_url URL`.

The server renders the messages with its own template and cuts nothing. Where it tells a prompt's tokens and its context
(vLLM's `/tokenize`), prompts are counted before they are sent; elsewhere its refusals say which are too long.
"""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from harness.data import Joint, Rendered
from harness.errors import HarnessError, UsageError
from harness.files.user_cache import user_cache
from harness.servers.chat import Ask, NoReply
from harness.servers.endpoint import ENDPOINT, Endpoint, Limits
from harness.servers.remembered import Remembered
from harness.servers.reply_cache import ReplyCache

CONCURRENCY = 128
ALLOWED = "plain, rag, pag and copy"


@dataclass(frozen=True)
class Device:
    """Where a model computes, as far as anything here can know."""

    type: str = "served"


class ServedModel:
    """Stands where a `LanguageModel` does; whatever needs weights says in one line that there are none."""

    dtype = "served"
    revision = "served"
    """A server does not say which weights it has; the record says its address and what it calls the model."""
    parameters = 0

    def __init__(self, model: str, base_url: str | None = None, limits: Limits | None = None) -> None:
        """Raises DataMissing without a server or key, UsageError for an address that is none."""
        self.endpoint = Endpoint(model, "model", base_url, limits or Limits(concurrency=CONCURRENCY))
        self._base_url = base_url
        self.name = f"{ENDPOINT}{model}"
        self.source = f"{self.name} at {self.endpoint.base_url}"
        self.device = Device()
        identity = {"model": self.name, "server": self.endpoint.base_url}
        self.replies = Remembered(
            self.endpoint, self.name, identity, ReplyCache(user_cache() / "served.sqlite"), "asking the server"
        )
        self._counts: bool | None = None

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UsageError(
            f"this method or task needs the weights of {self.name}, which a server does not give; a served model answers "
            f"{ALLOWED} on tasks whose answers are written, anything else needs a model on this machine"
        )

    def check(self) -> None:
        """Raises HarnessError where the server does not answer, or not this model."""
        once = Endpoint(self.endpoint.model, "model", self._base_url, replace(self.endpoint.limits, retries=1))
        (reply,) = once.ask([Ask((("user", "Say yes."),), 4)])
        if isinstance(reply, NoReply):
            raise HarnessError(f"{self.name} at {self.endpoint.base_url} does not answer: {reply.reason}")

    def room(self, prompts: Sequence[Sequence[tuple[str, str]]]) -> list[int | None]:
        """Tokens that each conversation leaves of the context; None where the server does not count."""
        if self._counts is None:
            self._counts = bool(prompts) and self._left(prompts[0]) is not None
        if not self._counts:
            return [None] * len(prompts)
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(self._left, prompts))

    def _left(self, messages: Sequence[tuple[str, str]]) -> int | None:
        turns = [{"role": r, "content": c.encode(errors="replace").decode()} for r, c in messages]
        try:
            found: Any = self.endpoint.post(
                "/tokenize", {"model": self.endpoint.model, "messages": turns, "add_generation_prompt": True}
            )
            return int(found["max_model_len"]) - int(found["count"])
        except (OSError, urllib.error.URLError, ValueError, KeyError, TypeError):
            return None


def turns(rendered: Rendered) -> tuple[tuple[str, str], ...]:
    """A prompt as a server takes it: raw text is one turn of the user."""
    content = rendered.content if isinstance(rendered, Joint) else rendered
    if isinstance(content, str):
        return (("user", content),)
    return tuple((message.role, message.content) for message in content)
