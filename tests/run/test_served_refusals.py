"""What a server says when it does not answer: a prompt that is too long, a field it does not take, or nothing about either."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from chat_server import Said, Words, serving

from harness.data import Example, HistoryItem
from harness.methods.rag import RAG
from harness.run.contract import toy_examples
from harness.run.served import ServedSystem, _fewer
from harness.servers.chat import NoReply, Reply
from harness.servers.echo import Echo, asking
from harness.servers.endpoint import Limits
from harness.servers.model import ServedModel
from harness.task import Generation, Sample

ONCE = Limits(4, timeout=5, retries=0, backoff=0.005)


@pytest.fixture(autouse=True)
def key_and_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))


@dataclass
class Scripted(Words):
    """Says these first, in order: of chats and completions, or of requests for tokens."""

    first: list[Said] = field(default_factory=list)
    first_tokens: list[Said] = field(default_factory=list)

    def react(self, path: str, request: dict[str, Any], headers: Mapping[str, str]) -> Said:
        script = self.first_tokens if path == "/tokenize" else self.first
        with self.lock:
            said = script.pop(0) if script else None
        return said or super().react(path, request, headers)


def error(status: int, message: str, **more: Any) -> Said:
    return Said({"error": {"message": message, "code": status, **more}}, status, {"Retry-After": "0"})


def with_history(items: int, words: int) -> Example:
    example = toy_examples(1)[0].example
    texts = [" ".join(f"w{n}x{place}" for place in range(words)) for n in range(items)]
    history = tuple(HistoryItem(str(n), {"text": text}, text) for n, text in enumerate(texts))
    return replace(example, user=replace(example.user, history=history))


def answer(server: Words, example: Example, new: int = 5, limits: Limits = ONCE) -> Sample:
    system = ServedSystem(ServedModel("m", server.url, limits), RAG().with_options({"k": 40}), Generation(new))  # type: ignore[arg-type]
    return system.answer([example])[0]


@pytest.mark.parametrize(
    "said",
    [
        error(429, "Rate limit exceeded, try again later"),
        error(503, "upstream request timeout exceeded"),
        error(500, "context deadline exceeded"),
    ],
)
def test_a_server_that_is_busy_costs_no_history(said: Said) -> None:
    with serving(Scripted(first=[said])) as server:
        busy = answer(server, with_history(40, 5))
        assert busy.response is None and str(said.status) in str(busy.error)
        later = answer(server, with_history(40, 5))
    assert (later.error, later.history_items, later.dropped_items) == (None, 40, 0)


def test_history_is_left_out_by_the_sizes_that_a_server_says_and_by_no_other_number() -> None:
    with serving(Words(context=1000)) as server:
        sample = answer(server, with_history(40, 50), new=200)
    assert sample.error is None
    assert 0.8 * (1000 - 200) < sample.prompt_tokens <= 1000 - 200


@pytest.mark.parametrize(
    ("message", "share"),
    [
        ("This model's maximum context length is 2048 tokens. However, you requested 3072 tokens (2972 in the messages, 100 in "
         "the completion).", (2048 - 100) / 3072),
        ("'max_tokens' or 'max_completion_tokens' is too large: 100. This model's maximum context length is 2048 tokens and your "
         "request has 2000 input tokens (100 > 2048 - 2000).", (2048 - 100) / 2000),
        ("request (3000 tokens) exceeds the available context size (2048 tokens), try increasing it", (2048 - 100) / 3000),
        ("Requested tokens (2400) exceed context window of 2048", (2048 - 100) / 2400),
        ("the prompt is too long", 0.8),
        ("the prompt of gpt-4-0613 is too long for its context window of 4096 (request 123456789)", 0.5),
    ],
)  # fmt: skip
def test_as_many_items_are_kept_as_a_refusal_lets_hope_for(message: str, share: float) -> None:
    line = f"Error code: 400 - {{'error': {{'message': \"{message}\", 'type': 'BadRequestError', 'code': 400}}}}"
    assert _fewer(1000, line, 100) == int(1000 * share)
    assert _fewer(1, line, 100) == 0


def test_an_answer_has_the_limit_that_was_asked_for_or_there_is_none() -> None:
    refuses = ("max_tokens", "max_completion_tokens")
    with serving(Words(refuses=refuses)) as server:
        sample = answer(server, with_history(2, 5))
    assert sample.response is None and "does not take max_completion_tokens" in str(sample.error)
    assert not server.answered


@pytest.mark.parametrize("message", ["max_tokens must be at least 16", "this is no request"])
def test_a_refusal_that_no_other_form_of_the_request_mends_is_told_once(message: str) -> None:
    said = error(400, message, param="max_tokens")
    with serving(Scripted(scores="prompt", first=[said] * 50)) as server:
        model = ServedModel("m", server.url, ONCE)
        (reply,) = model.endpoint.ask([asking(Echo("one two", " two"))])
        assert isinstance(reply, NoReply) and message in reply.reason and len(server.asked) == 1


def test_a_tokenizer_that_is_broken_for_a_moment_is_used_all_the_same() -> None:
    faults = [error(500, "not now"), error(429, "not now"), Said(broken="half"), Said(broken="closed")]
    with serving(Scripted(counts=True, first_tokens=[*faults])) as server:
        model = ServedModel("m", server.url, ONCE)
        assert model.tokenizer.lent
        server.first_tokens[:] = faults
        assert len(model.tokenizer.ids({"prompt": "a b c"}).ids) == 3
    with serving(Scripted(first_tokens=[Said("a page")])) as server:
        assert not ServedModel("m", server.url, ONCE).tokenizer.lent and len(server.asked) == 1


def test_a_prompt_that_is_too_long_is_no_refusal_of_the_field_that_it_leaves_no_room_for() -> None:
    said = error(
        400, "'max_tokens' is too large: 5. This model's maximum context length is 9 tokens", param="max_tokens"
    )
    with serving(Scripted(first=[said])) as server:
        sample = answer(server, with_history(4, 5))
        assert sample.error is None and sample.dropped_items == 1
        assert ["max_tokens" in request for request in server.asked if "messages" in request] == [True, True]
        (reply,) = ServedModel("m", server.url, ONCE).endpoint.ask([asking(Echo("one two", " two"))])
        assert not isinstance(reply, Reply)
