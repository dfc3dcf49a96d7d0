"""A model behind a server: what a prompt-only plan needs of one, `--model openai/<name> --model_base_url URL`.

The server renders the messages with its own template and cuts nothing. Where it lends its tokenizer (vLLM's `/tokenize`),
prompts are counted before they are sent; elsewhere its refusals say which are too long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

from harness.data import Joint, Rendered
from harness.errors import HarnessError, UsageError
from harness.files.user_cache import user_cache
from harness.servers.address import ENDPOINT
from harness.servers.chat import Ask, NoReply
from harness.servers.endpoint import Endpoint, Limits
from harness.servers.prices import Price, limits_of, price_of, settings_of
from harness.servers.remembered import Remembered
from harness.servers.reply_cache import ReplyCache
from harness.servers.scoring import Scoring
from harness.servers.tokenizer import ServerTokenizer, Tokens, at_once

CONCURRENCY = 128
ALLOWED = "plain, rag, pag and copy, and cad and cos where the answer is chosen from choices of one token"


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
    heads = 0

    def __init__(
        self, model: str, base_url: str | None = None, limits: Limits | None = None, price: Price | None = None
    ) -> None:
        """Raises DataMissing without a server or key, UsageError for an address that is none."""
        limits = limits or Limits(concurrency=CONCURRENCY)
        self.endpoint = Endpoint(model, "model", base_url, limits)
        self._once = Endpoint(model, "model", base_url, replace(limits, retries=min(1, limits.retries)))
        self.name = f"{ENDPOINT}{model}"
        self.source = f"{self.name} at {self.endpoint.base_url}"
        self.device = Device()
        self.price = price
        identity = {"model": self.name, "server": self.endpoint.base_url}
        self.replies = Remembered(
            self.endpoint, self.name, identity, ReplyCache(user_cache() / "served.sqlite"), "asking the server"
        )
        self.tokenizer = ServerTokenizer(self.endpoint)
        self.scoring = Scoring(self.name, self.endpoint, self._once, self.tokenizer)

    @classmethod
    def open(cls, model: str, base_url: str | None, settings: Sequence[str] = ()) -> ServedModel:
        """`settings` are `key=value`. Raises as `__init__`, and UsageError for a setting that is not known or not valid."""
        given = settings_of(settings, f"model '{ENDPOINT}{model}'")
        found = cls(model, base_url, limits_of(given, Limits(concurrency=CONCURRENCY)))
        found.price = price_of(given, model, found.endpoint.base_url)
        return found

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UsageError(
            f"this method or task needs the weights of {self.name}, which a server does not give; a served model answers "
            f"{ALLOWED}; anything else needs a model on this machine"
        )

    def check(self) -> None:
        """Raises HarnessError where the server does not answer, or not this model."""
        (reply,) = self._once.ask([Ask((("user", "Say yes."),), 4)])
        if isinstance(reply, NoReply):
            raise HarnessError(f"{self.name} at {self.endpoint.base_url} does not answer: {reply.reason}")

    def room(self, prompts: Sequence[Rendered], *, scored: bool) -> list[int | None]:
        """Tokens that each prompt leaves of the context; None where the server does not count."""
        if not prompts or not self.tokenizer.lent:
            return [None] * len(prompts)
        counted = at_once(lambda rendered: self.count(rendered, scored=scored), prompts)
        return [None if one is None else one.context - len(one.ids) for one in counted]

    def count(self, rendered: Rendered, *, scored: bool) -> Tokens | None:
        """A prompt in the server's ids; None where it does not say them: asked all the same, it says what is too long.

        A prompt that an answer is `scored` after stands as it is; one that is to be answered is a conversation.
        """
        if not self.tokenizer.lent:
            return None
        try:
            return self.tokenizer.prompt(rendered) if scored else self.tokenizer.chat(turns(rendered))
        except HarnessError:
            return None


def turns(rendered: Rendered) -> tuple[tuple[str, str], ...]:
    """A prompt as a server takes it: raw text is one turn of the user."""
    content = rendered.content if isinstance(rendered, Joint) else rendered
    if isinstance(content, str):
        return (("user", content),)
    return tuple((message.role, message.content) for message in content)
