"""Who writes texts about users, such as profile summaries: the evaluated model, another one, or an endpoint.

    self              the evaluated model, its prompts batched through the engine
    alias, id, folder another model, loaded beside the evaluated one
    openai/<model>    any server that speaks OpenAI's chat completions: $OPENAI_BASE_URL, $OPENAI_API_KEY

All write greedily. A text that could not be had is a `UserFailed` in its place, never an empty one. Texts are kept in
the artifact store by writer, prompt and length, whatever run asked for them, so that none is paid for twice.

`Summaries` are profiles in words: a summary of a user's history, written once, that stands on a line before their prompts.
Paper: Richardson et al., Integrating Summarization and Retrieval for Enhanced Personalization via Large Language Models,
2023. `pag` is this alone; the methods that train take it as `profile`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from random import Random

from harness.data import HistoryItem, Joint, Message, Prompt, Rendered, User
from harness.engine.weights.identity import as_recorded as as_recorded
from harness.errors import HarnessError, UserFailed
from harness.fit.artifacts import ArtifactStore
from harness.method import Fitted, Kit, Writer, Written
from harness.plugins.registry import model_row
from harness.servers.address import ENDPOINT as ENDPOINT
from harness.servers.address import model_and_server
from harness.servers.chat import Ask, NoReply, Reply
from harness.servers.endpoint import Endpoint


@dataclass(frozen=True)
class Kept:
    """A writer that is asked for each text once; failures are asked for again."""

    writer: Writer
    identity: Sequence[str]
    """What a text depends on beside its prompt and length: the weights."""
    store: ArtifactStore

    def __call__(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Written | UserFailed]:
        asked = [
            {"writer": list(self.identity), "messages": _messages(p.render()), "max_new_tokens": max_new_tokens}
            for p in prompts
        ]
        keys = [self.store.key(content) for content in asked]
        kept = {key: self.store.get(key) for key in keys}
        found: dict[str, Written | UserFailed] = {k: Written(**state.meta) for k, state in kept.items() if state}
        new = {key: n for n, key in enumerate(keys) if key not in found}
        answers = self.writer([prompts[n] for n in new.values()], max_new_tokens) if new else ()
        for (key, n), answer in zip(new.items(), answers, strict=True):
            found[key] = answer
            if isinstance(answer, Written):
                self.store.put(key, Fitted(meta=asdict(answer)), asked[n])
        return [found[key] for key in keys]


class EndpointWriter:
    """A model behind an OpenAI-compatible server. It cuts no prompt: one that is too long for it is a failure."""

    def __init__(self, name: str, endpoint: Endpoint | None = None) -> None:
        """`name` is as an option or a record has it. Raises DataMissing where neither a key nor a server of one's own is given."""
        model, server = model_and_server(name)
        self._endpoint = endpoint or Endpoint(model, "writer", server)

    def __call__(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Written | UserFailed]:
        """Raises HarnessError where the server refuses the key or has no such model: nothing could be written then."""
        start = time.perf_counter()
        replies = self._endpoint.ask([Ask(_turns(prompt.render()), max_new_tokens) for prompt in prompts])
        seconds = (time.perf_counter() - start) / max(1, len(prompts))
        return [self._written(prompt, reply, seconds) for prompt, reply in zip(prompts, replies, strict=True)]

    def _written(self, prompt: Prompt, reply: Reply | NoReply, seconds: float) -> Written | UserFailed:
        nothing = f"{ENDPOINT}{self._endpoint.model} wrote nothing"
        if isinstance(reply, NoReply):
            if reply.hopeless:
                raise HarnessError(reply.reason)
            return UserFailed(f"{nothing}: {reply.reason}")
        text = reply.answer.strip()
        if not text:
            return UserFailed(f"{nothing}: it gave {reply.fault}")
        tokens = {"prefill_tokens": reply.input_tokens, "decode_tokens": reply.output_tokens}
        return Written(text, len(prompt.items), cost={"seconds": seconds, **tokens})


def _turns(rendered: Rendered) -> tuple[tuple[str, str], ...]:
    return tuple((turn["role"], turn["content"]) for turn in _messages(rendered))


def _messages(rendered: Rendered) -> list[dict[str, str]]:
    rendered = rendered.content if isinstance(rendered, Joint) else rendered
    turns = [("user", rendered)] if isinstance(rendered, str) else [(m.role, m.content) for m in rendered]
    return [{"role": role, "content": content} for role, content in turns]


# Profiles in words


INSTRUCTION = (
    "Below are records of one person. In at most five sentences, describe this person for someone who will have to answer "
    "in their place: which subjects they deal with, what they prefer, how they judge, and how they write (wording, "
    "length, tone, format). Write the description only."
)


@dataclass(frozen=True)
class HistoryTemplate:
    """An instruction, then numbered history items with all their fields, each cut to `words` words."""

    words: int

    def __call__(self, text: str, items: Sequence[HistoryItem], summary: str) -> tuple[Message, ...]:
        lines = [f"{number}. {self._line(item)}" for number, item in enumerate(items, 1)]
        return (Message("user", "\n".join([text, "", *lines])),)

    def _line(self, item: HistoryItem) -> str:
        return "; ".join(f"{name}: {' '.join(value.split()[: self.words])}" for name, value in item.fields.items())


@dataclass(frozen=True)
class Summaries:
    """Who writes them, and from what."""

    writer: str = "self"
    """`self` (the evaluated model), a model's alias, hub id or folder, or `openai/<model>`."""
    items: int = 10
    """History items the writer reads, drawn by the seed; newest first where they have dates."""
    words: int = 200
    """Words the writer reads of each field of an item."""
    tokens: int = 128
    """Length of a summary at most."""
    instruction: str = INSTRUCTION

    def __post_init__(self) -> None:
        if self.writer != "self" and not self.writer.startswith(ENDPOINT):
            model_row(self.writer)  # an unknown name is heard of before any model is loaded

    def write(self, kit: Kit, users: Sequence[User]) -> dict[str, Written | UserFailed]:
        """By user; a user without a history has none."""
        prompts = {user.id: self._prompt(user, kit.seed) for user in users if user.history}
        return dict(zip(prompts, kit.writer(self.writer)(list(prompts.values()), self.tokens), strict=True))

    def _prompt(self, user: User, seed: int) -> Prompt:
        size = len(user.history)
        drawn = Random(f"{seed}/{user.id}").sample(range(size), min(size, self.items))
        items = tuple(user.history[place] for place in sorted(drawn, reverse=True))
        return Prompt(HistoryTemplate(self.words), self.instruction, items)
