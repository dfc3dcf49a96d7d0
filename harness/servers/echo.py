"""Log-probabilities of a prompt: `/v1/completions` with `echo` and `logprobs`, read so that no number stands at a wrong token.

A server that takes the fields need not obey them: llama.cpp's returns those of its own answer, transformers' none. So a reply
is believed only where it has a number for each token of the prompt, and the tokens are those that were sent.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from harness.servers.chat import Ask, Echo, Malformed, Reply, ScoredToken

ECHO: Mapping[str, Any] = MappingProxyType({"temperature": 0, "seed": 0, "echo": True, "logprobs": 1})
"""What is asked for. One token is generated, since some servers refuse to generate none."""
_ID = "token_id:"


def asking(echo: Echo) -> Ask:
    """Ids are answered as ids, where the server can (vLLM), so that they can be compared."""
    fields = ECHO if isinstance(echo.prompt, str) else {**ECHO, "return_tokens_as_token_ids": True}
    return Ask((), 1, sampling=fields, required=frozenset({"echo", "logprobs"}), room_for_thoughts=False, echo=echo)


def read_echo(content: bytes, echo: Echo) -> Reply:
    """The reply, `scored` being the answer's tokens. Raises Malformed where the numbers are not those that were asked for."""
    try:
        body = json.loads(content)
        usage = body.get("usage") or {}
        shown = body["choices"][0].get("logprobs") or {}
        sent = echo.prompt if isinstance(echo.prompt, tuple) else ()
        count = len(sent) or int(usage.get("prompt_tokens") or 0)
        tokens, numbers = shown.get("tokens") or [], shown.get("token_logprobs") or []
        tops = shown.get("top_logprobs") or [None] * len(tokens)
        if not count or len(numbers) not in (count, count + 1) or not len(tokens) == len(numbers) == len(tops):
            raise Malformed(f"log-probabilities of {len(numbers)} tokens for a prompt of {count or 'unknown length'}")
        read = [
            ScoredToken(str(t), _number(n, first=not i), _likeliest(n, tops[i]))
            for i, (t, n) in enumerate(zip(tokens, numbers, strict=True))
        ]
        named = [token.token.removeprefix(_ID) for token in read if token.token.startswith(_ID)]
        if sent and named and named[:count] != [str(i) for i in sent]:
            raise Malformed("log-probabilities of other tokens than those that were sent")
        return Reply(
            "",
            scored=tuple(read if echo.whole else _tail(read[:count], echo.answer)),
            finish="stop",
            model=str(body.get("model") or ""),
            input_tokens=int(usage.get("prompt_tokens") or count),
            output_tokens=int(usage.get("completion_tokens") or 0),
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        start = content[:80].decode(errors="replace")
        raise Malformed(f"an answer that is no completion ({type(error).__name__}): {start!r}") from error


def _number(value: Any, *, first: bool) -> float | None:
    """A log-probability; only the first token, which nothing stands before, may have none."""
    if value is None and first:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or value > 1e-4:
        raise Malformed(f"a log-probability of {str(value)[:20]!r}, which is none")
    return float(value)


def _likeliest(value: Any, top: Any) -> bool | None:
    """Whether no token is more likely; None where the server does not say."""
    if not isinstance(top, Mapping) or not top or not isinstance(value, int | float):
        return None
    return bool(value >= max(top.values()) - 1e-9)


def _tail(read: Sequence[ScoredToken], answer: int | str) -> Sequence[ScoredToken]:
    """The answer's tokens. Texts are matched from the end, since a begin token has one that nobody sent."""
    if isinstance(answer, int):
        return read[len(read) - answer :]
    said = ""
    for number in range(len(read) - 1, 0, -1):
        said = read[number].token + said
        if said == answer:
            return read[number:]
        if len(said) >= len(answer):
            break
    raise Malformed(f"tokens that do not end with the answer: {said[:40]!r} for {answer[:40]!r}")
