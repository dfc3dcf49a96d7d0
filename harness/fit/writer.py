"""Who writes texts about users, such as profile summaries: the evaluated model, another one, or an endpoint.

    self              the evaluated model, its prompts batched through the engine
    alias, id, folder another model, loaded beside the evaluated one
    openai/<model>    any server that speaks OpenAI's chat completions: $OPENAI_BASE_URL, $OPENAI_API_KEY

All write greedily. A text that could not be had is a `UserFailed` in its place, never an empty one. Texts are kept in
the artifact store by writer, prompt and length, whatever run asked for them, so that none is paid for twice.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from harness.data import Joint, Prompt, Rendered
from harness.errors import HarnessError, UserFailed
from harness.fit.artifacts import ArtifactStore
from harness.method import Fitted, Writer, Written
from harness.servers.chat import Ask, NoReply, Reply
from harness.servers.endpoint import ENDPOINT as ENDPOINT
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

    def __init__(self, model: str) -> None:
        """Raises DataMissing where neither a key nor a server of one's own is given."""
        self._endpoint = Endpoint(model, "writer")

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
