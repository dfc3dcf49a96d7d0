"""Given answers scored by a server: the log-probability of each after a prompt, from `/v1/completions` with `echo`.

Not every server that takes these fields obeys them, and a wrong number is a wrong result that looks like one. So it has to
prove first, on three short prompts, that it returns one number a token of the prompt, that the last token's number is
what the server itself says of that token when it generates it, and that another token there has another number.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from harness.data import Joint, Rendered
from harness.errors import HarnessError, UsageError
from harness.servers.chat import Ask, Echo, NoReply, Reply, ScoredToken
from harness.servers.echo import asking
from harness.servers.endpoint import Endpoint
from harness.servers.tokenizer import ServerTokenizer, Tokens

KNOWN = "Paris is the capital of France, and Berlin is the capital of"
OTHERS = (" seven", " green")
"""What it would hardly go on with."""
SAME = 0.1
"""Nats by which a server may differ from itself: numbers of 8 or 16 bits move with the batch."""


class Scoring:
    """Scores answers where the server has proved that it can."""

    def __init__(self, name: str, endpoint: Endpoint, once: Endpoint, tokenizer: ServerTokenizer) -> None:
        """`once` is the same server, asked without patience."""
        self._name, self._endpoint, self._once, self.tokenizer = name, endpoint, once, tokenizer
        self._proved = False

    @cached_property
    def how(self) -> str:
        """For the record. Raises as `check`."""
        self.check()
        return "prompt log-probabilities, " + ("the server's ids" if self.tokenizer.lent else "texts")

    def check(self) -> None:
        """Raises UsageError where the server does not return the log-probabilities of a prompt, or not the right ones."""
        if self._proved:
            return
        why = self._why_not()
        if why:
            raise UsageError(
                f"{self._name} at {self._endpoint.base_url} cannot score given answers, since it does not return the "
                f"log-probabilities of a prompt: {why}; vLLM does (/v1/completions with echo), or run a model on this machine"
            )
        self._proved = True

    def _why_not(self) -> str:
        known = self._hear(self._known(""))
        if isinstance(known, str):
            return known
        before, said = known[:-1], known[-1]
        texts = [said.token, next(text for text in OTHERS if text != said.token)]
        ids: list[tuple[int, ...]] = [(), ()]
        if self.tokenizer.lent:
            mine = said.token.removeprefix("token_id:")
            likely = (int(mine),) if mine != said.token else self._apart(mine)
            ids = [likely, next(other for text in OTHERS if (other := self._apart(text)) != likely)]
        both = []
        for text, more in zip(texts, ids, strict=True):
            found = self._hear(self._known(text, more))
            if isinstance(found, str):
                return found
            both.append(found[:-1])
        for numbers in both:
            if len(numbers) <= len(before) or not all(map(_alike, before, numbers)):
                return "the same tokens have other numbers when more follow"
        likely_one, other_one = both[0][len(before)], both[1][len(before)]
        if len(both[0]) != len(before) + 1:
            return f"the token it goes on with, {said.token!r}, is another one in the prompt"
        if not _alike(likely_one, said):
            return f"a token it generates at {said.logprob or 0:.2f} has {likely_one.logprob or 0:.2f} in the prompt"
        if likely_one.logprob == other_one.logprob:
            return f"unlike tokens have the same number, {likely_one.logprob}"
        return ""

    def _apart(self, text: str) -> tuple[int, ...]:
        return self.tokenizer.ids({"prompt": text, "add_special_tokens": False}).ids

    def _known(self, more: str, ids: tuple[int, ...] = ()) -> Echo:
        if self.tokenizer.lent:
            return Echo((*self.tokenizer.ids({"prompt": KNOWN}).ids, *ids), whole=True)
        return Echo(KNOWN + more, whole=True)

    def _hear(self, echo: Echo) -> Sequence[ScoredToken] | str:
        """Every token of the prompt and the one that follows; or why not."""
        (reply,) = self._once.ask([asking(echo)])
        if isinstance(reply, NoReply):
            return reply.reason.removeprefix(f"{self._name} at {self._endpoint.base_url}: ")
        count = len(echo.prompt) if isinstance(echo.prompt, tuple) else reply.input_tokens
        if len(reply.scored) != count + 1:
            return f"it gives {len(reply.scored)} numbers for a prompt of {count} tokens and an answer of one"
        return reply.scored

    def context(self, rendered: Rendered) -> Tokens | None:
        """The prompt in the server's ids; None where it does not lend its tokenizer."""
        return self.tokenizer.prompt(rendered) if self.tokenizer.lent else None

    def asks(self, rendered: Rendered, answers: Sequence[str]) -> list[Ask]:
        """One request an answer. Raises UsageError for a conversation whose text nobody here knows, HarnessError for an answer
        that has no token to itself."""
        self.check()
        before = self.context(rendered)
        if before is not None:
            found = [self.tokenizer.answer(rendered, before, text) for text in answers]
            return [asking(Echo((*before.ids, *ids), len(ids))) for ids in found]
        text = rendered.content if isinstance(rendered, Joint) else rendered
        if not isinstance(text, str):
            raise UsageError(
                f"{self._name} at {self._endpoint.base_url} does not say how it writes a conversation (vLLM's /tokenize), so an "
                "answer cannot be scored after one; ask without a chat template where the task offers that"
            )
        lead = "" if isinstance(rendered, Joint) or text[-1:].isspace() else " "
        head = text.rstrip() if isinstance(rendered, Joint) else text
        between = text[len(head) :] + lead
        return [asking(Echo(head + between + answer, between + answer)) for answer in answers]


def logprobs(reply: Reply) -> tuple[float, ...]:
    """Of each of the answer's tokens, in nats."""
    if not reply.scored or any(token.logprob is None for token in reply.scored):
        raise HarnessError("the server gave no number for a token of the answer")
    return tuple(float(token.logprob or 0.0) for token in reply.scored)


def _alike(one: ScoredToken, other: ScoredToken) -> bool:
    if one.logprob is None or other.logprob is None:
        return one.logprob is other.logprob
    return abs(one.logprob - other.logprob) <= SAME + 0.05 * abs(one.logprob)
