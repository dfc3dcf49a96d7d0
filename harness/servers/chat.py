"""Chat completions as servers speak them: what is asked, what came of it, and which fields a refusal names.

A reply is read strictly. What is cut off, empty, nothing but thoughts, or has log-probabilities that are none is marked as such,
so that nobody takes a part of an answer for the answer.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

TOP = 20
"""Candidates for the first token that a server is asked for: as many as OpenAI gives."""
GREEDY: Mapping[str, Any] = MappingProxyType({"temperature": 0, "seed": 0})
LIMITS = frozenset(("max_tokens", "max_completion_tokens"))
"""The names of the most tokens of an answer."""
COMPLETE = frozenset(
    ("", "stop", "eos", "eos_token", "end_turn", "stop_sequence", "complete", "completed", "tool_calls")
)
"""What servers give as `finish_reason` of an answer that ended by itself; all else cut it."""
_AFTER_THOUGHTS = re.compile(
    r".*(?:</(?:think|thinking|thought|thoughts|reasoning|reflection|seed:think)>|\[/THINK\]|<\|end_of_thought\|>|◁/think▷"
    r"|<\|channel\|>final<\|message\|>)",
    re.DOTALL | re.IGNORECASE,
)
_THOUGHTS = re.compile(
    r"(?:<(?:think|thinking|thought|thoughts|reasoning|reflection|seed:think)\b|\[THINK\]|<\|begin_of_thought\|>|◁think▷"
    r"|<\|channel\|>analysis)",
    re.IGNORECASE,
)


class ScoredToken(NamedTuple):
    """A token of a prompt."""

    token: str
    logprob: float | None
    """In nats; None of the first one, which nothing stands before."""
    likeliest: bool | None
    """Whether no token is more likely there; None where the server does not say."""


@dataclass(frozen=True)
class Echo:
    """A context and an answer to it whose tokens' log-probabilities are asked for (see `harness.servers.echo`)."""

    prompt: tuple[int, ...] | str
    """Both, as ids where the server's tokenizer says them, else as text."""
    answer: int | str = 0
    """The answer's part of it: its last so many ids, or the text it ends with."""
    whole: bool = False
    """Whether the numbers of the context are kept too, and the token that the server would go on with."""


@dataclass(frozen=True)
class Ask:
    """One request."""

    messages: tuple[tuple[str, str], ...]
    """(role, content)."""
    max_tokens: int
    numbers: Literal["", "wanted", "needed"] = ""
    """Whether the answer's likely first tokens are asked for; an answer without those needed is a broken one."""
    sampling: Mapping[str, Any] = field(default_factory=lambda: GREEDY)
    """Further fields of the request, left out where a server does not take them."""
    required: frozenset[str] = frozenset()
    """Those of them without which it would be another request: where one is refused, so is the request."""
    room_for_thoughts: bool = True
    """Whether a model that thinks gets more tokens than `max_tokens` for that."""
    echo: Echo | None = None
    """A prompt whose log-probabilities are asked for; there are no messages then."""

    @property
    def texts(self) -> tuple[str, ...]:
        """What a server may repeat of the request."""
        prompt = self.echo.prompt if self.echo else ""
        return (*(content for _, content in self.messages), prompt if isinstance(prompt, str) else str(list(prompt)))


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
    thoughts: bool = False
    """Whether the server says that the model thought before it answered."""
    sent: Mapping[str, Any] = field(default_factory=dict)
    """What was asked for beside the messages: the fields that the server took."""
    input_tokens: int = 0
    output_tokens: int = 0
    retries: int = 0
    scored: tuple[ScoredToken, ...] = ()
    """Of a prompt that was to be scored: the tokens of its answer."""

    @property
    def answer(self) -> str:
        """The text without thoughts before it, or behind it that did not end; empty where there is nothing else."""
        return _THOUGHTS.split(_AFTER_THOUGHTS.sub("", self.text, count=1), maxsplit=1)[0]

    @property
    def only_thoughts(self) -> bool:
        """Whether the model thought, and answered nothing."""
        return not self.answer.strip() and (self.thoughts or bool(self.text.strip()))

    @property
    def fault(self) -> str:
        """Why the text is not the model's whole answer; empty where it is."""
        if self.refused:
            return ""
        if not self.answer.strip():
            return "an answer of nothing but thoughts" if self.only_thoughts else "an empty answer"
        if _THOUGHTS.search(_AFTER_THOUGHTS.sub("", self.text, count=1)):
            return "an answer whose thoughts did not end"
        limit = self.sent.get("max_tokens", self.sent.get("max_completion_tokens"))
        most = self.output_tokens or len(self.text)  # no token is shorter than a letter
        if not self.finish and isinstance(limit, int) and most >= limit:
            return f"an answer that may have been cut off after {limit} tokens (no finish_reason)"
        return "" if self.finish.lower() in COMPLETE else f"an answer that was cut off (finish_reason={self.finish})"


@dataclass(frozen=True)
class NoReply:
    reason: str
    hopeless: bool = False
    """Whether no other request to this server can be answered either."""
    status: int = 0
    """Of HTTP, that the server refused it with; 0 where it said nothing, or was not asked."""


class Malformed(Exception):
    """An answer that is not what the protocol says."""


def read_reply(content: bytes, *, strict: bool) -> Reply:
    """A chat completion, read. Log-probabilities that are none are an error where `strict`, else as if not given."""
    try:
        body = json.loads(content)
        choice = body["choices"][0]
        message = choice["message"]
        usage = body.get("usage") or {}
        text, thought = _text(message.get("content"))
        text = text or message.get("refusal") or ""
        shown = (choice.get("logprobs") or {}).get("content") or []
        candidates, wrong = _candidates(shown)
        if wrong and strict:
            raise Malformed(wrong)
        if not isinstance(text, str):
            raise TypeError("content is no text")
        details = usage.get("completion_tokens_details") or {}
        return Reply(
            text,
            candidates,
            tuple(str(token["token"]) for token in shown),
            refused=bool(message.get("refusal")) or choice.get("finish_reason") == "content_filter",
            finish=str(choice.get("finish_reason") or ""),
            model=str(body.get("model") or ""),
            thoughts=thought
            or bool(message.get("reasoning_content") or message.get("reasoning") or details.get("reasoning_tokens")),
            input_tokens=max(0, int(usage.get("prompt_tokens") or 0)),
            output_tokens=max(0, int(usage.get("completion_tokens") or 0)),
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        start = content[:80].decode(errors="replace")
        raise Malformed(f"an answer that is no chat completion ({type(error).__name__}): {start!r}") from error


def _text(content: Any) -> tuple[Any, bool]:
    """A message's text, which some servers give in parts, and whether a part of it is thoughts."""
    if not isinstance(content, list):
        return content, False
    parts = [part if isinstance(part, Mapping) else {"type": "text", "text": part} for part in content]
    text = "".join(part["text"] for part in parts if part.get("type") in ("text", "output_text"))
    return text, any(part.get("type") in ("thinking", "reasoning") for part in parts)


def _candidates(shown: Any) -> tuple[tuple[tuple[str, float], ...] | None, str]:
    """What the first token could have been, and why that is not to be believed; None where it is not given or not so."""
    found = []
    for top in (shown[0].get("top_logprobs") or [])[:TOP] if shown else ():
        logprob = top["logprob"]
        if isinstance(logprob, bool) or not isinstance(logprob, int | float):
            return None, f"a log-probability of {str(logprob)[:20]!r}, which is none"
        found.append((str(top["token"]), float(logprob)))
    wrong = unsound(found)
    return (None if wrong else tuple(found) or None), wrong


def unsound(candidates: Sequence[tuple[str, float]]) -> str:
    """Why these are no log-probabilities of different tokens; empty where they are."""
    wrong = [logprob for _, logprob in candidates if math.isnan(logprob) or logprob > 1e-4]
    if wrong:
        return f"a log-probability of {wrong[0]:g}, which is none"
    mass = sum(math.exp(logprob) for _, logprob in candidates)
    return f"log-probabilities of tokens that have {mass:.2f} of 1 together" if mass > 1.02 else ""


_COMPLAINT = re.compile(
    r"unsupported|unrecogni[sz]ed|unknown|unexpected|extra|invalid|forbidden|disallowed|deprecated|unavailable|no such"
    r"|(?:must|should|ha[sd] to) (?:not )?be|(?:greater|less|more) than|out of range|not (?:a )?valid|exist"
    r"|(?:not|n't|cannot|can ?not)(?: be| been| currently| yet)?"
    r" (?:allow|permit|support|accept|availab|enabl|recogni|implement|expect|use|set|specif|request)\w*",
    re.IGNORECASE,
)


def refused_fields(status: int, body: object, sent: Mapping[str, Any], ask: Ask) -> set[str]:
    """The fields of a request that a server names as the reason for its refusal; none where it merely repeats them."""
    if status not in (400, 403, 422):
        return set()
    named = {name for name in _named(body) if name}
    if named & {"messages", "prompt", "input", "content", "model"}:
        return set()
    text = " ".join(words_of(body))
    if named & sent.keys():  # vLLM names the limit where the prompt leaves no room for it
        return named & sent.keys() - (LIMITS if re.search(r"context (length|window|size)", text) else frozenset())
    for content in ask.texts:  # what a server repeats of the request complains of nothing
        for form in (content, json.dumps(content)[1:-1], json.dumps(content, ensure_ascii=False)[1:-1]):
            text = text.replace(form, " ") if form else text
    text = re.sub(r"\{[^}]*:.*\}|\w+\([^)]*\)|\w+=[^\s,)]+|\w+[\"']?\s*:\s*-?\d", " ", text, flags=re.DOTALL)
    found = set()
    for sentence in re.split(r"[.;!?\n](?=\s|$)", text):
        if _COMPLAINT.search(sentence):
            found |= {name for name in sent if re.search(rf"(?<![\w.-]){name}(?![\w-])", sentence)}
            if re.search(r"context|prompt|input", sentence):  # too long, whatever the limit is called
                found -= LIMITS
    return found


def _named(body: object, depth: int = 0) -> Iterator[str]:
    """What an error's own fields say is wrong: OpenAI's `param`, pydantic's `loc`."""
    if isinstance(body, str) and body.lstrip()[:1] in ("{", "[") and depth < 9:
        with contextlib.suppress(ValueError, RecursionError):
            yield from _named(json.loads(body), depth + 1)
    elif isinstance(body, Mapping) and depth < 9:
        if isinstance(body.get("param"), str):
            yield re.split(r"[.\[]", body["param"])[0]
        loc = body.get("loc")
        yield from (part for part in loc if isinstance(part, str)) if isinstance(loc, list) else ()
        for value in body.values():
            yield from _named(value, depth + 1)
    elif isinstance(body, list) and depth < 9:
        for value in body:
            yield from _named(value, depth + 1)


def words_of(body: object, depth: int = 0) -> Iterator[str]:
    """The words of an error, wherever a server puts them."""
    if isinstance(body, str):
        yield body
    elif isinstance(body, Mapping) and depth < 9:
        for name, value in body.items():
            if name in ("message", "msg", "detail", "details", "error", "errors", "description", "reason"):
                yield from words_of(value, depth + 1)
    elif isinstance(body, list) and depth < 9:
        for value in body:
            yield from words_of(value, depth + 1)
