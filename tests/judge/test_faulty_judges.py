"""A judge's answer that is not whole is no rating: counted, said, asked for again, never kept. What was asked is recorded."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_server import Server

from harness.errors import UsageError
from harness.judge.expert import _aspects_in
from harness.judge.grading import ledger
from harness.judge.judges import CALIBRATION, ModelJudge, began_with_number, open_judge
from harness.judge.pairwise import _fault, _look
from harness.publish.show import warnings
from harness.records.schema import Judging, RunRecord
from harness.servers.chat import Ask, Reply, read_reply, refused_fields
from harness.servers.endpoint import THOUGHTS
from harness.servers.reply_cache import ReplyCache
from harness.task import Question, Rating


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def judge_at(server: Server, *settings: str) -> ModelJudge:
    judge = open_judge("openai/m", server.url, ["backoff=0.01", "retries=1", "timeout=5", *settings])
    assert isinstance(judge, ModelJudge)
    return judge


def rate(server: Server, *settings: str) -> Rating:
    (rating,) = judge_at(server, *settings).rate([Question("How much?", "text")])
    return rating


def completion(content: Any, finish: Any = "stop", *, top: Any = None, **message: Any) -> dict[str, Any]:
    shown = None if top is None else {"content": [{"token": "7", "logprob": 0.0, "top_logprobs": top}]}
    choice = {"index": 0, "finish_reason": finish, "message": {"content": content, **message}, "logprobs": shown}
    return {"model": "m-1", "choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 3}}


def says(body: dict[str, Any]) -> Callable[[dict[str, Any]], tuple[int, dict[str, Any]] | None]:
    """Says this to every question but the one that shows how numbers are written."""
    return lambda request: None if request["messages"][-1]["content"] == CALIBRATION else (200, body)


def kept() -> int:
    with sqlite3.connect(ReplyCache().path) as rows:
        return rows.execute("SELECT count(*) FROM replies WHERE asked NOT LIKE '%Repeat these%'").fetchone()[0]


# Not whole

CUT = {
    "half a sentence": completion("On a scale where 100 is the most, the answer shows the trait to", "length"),
    "half a number": completion("How far the response shows it could be put at 8", "length"),
    "a number alone": completion("8", "length"),
    "half a range": completion("70 to", "length"),
    "half a scale": completion("85 out of", "length"),
    "half a decimal": completion("8.", "length"),
    "another server's word for it": completion("Its score would be 8", "max_tokens"),
    "an abort": completion("70", "abort"),
    "an error": completion("70", "error"),
    "no word for it": completion("It is 8", None) | {"usage": {"prompt_tokens": 9, "completion_tokens": 64}},
    "empty": completion(""),
    "white": completion(" \n"),
    "nothing": completion(None),
    "thoughts in a tag": completion("<think>Between 0 and", "length"),
    "thoughts that ended, and no answer": completion("<think>It is 70.</think>"),
    "thoughts that never end": completion("<think>It is 70."),
    "thoughts in a field": completion("", "length", reasoning_content="It is 70"),
    "thoughts in a newer field": completion(None, "stop", reasoning="It is 70"),
    "thoughts in parts": completion([{"type": "thinking", "thinking": [{"type": "text", "text": "70"}]}]),
    "thoughts after a word": completion("Sure. <think>It is 70."),
    "second thoughts": completion("<think>It is 10.</think>\n<think>It is 70."),
    "no word for it and no count": completion(
        "Its score, all in all, and with every doubt there may be, would be 8", None
    )
    | {"usage": None},
    "thoughts of a channel": completion("<|channel|>analysis<|message|>It is 70", "length"),
}


@pytest.mark.parametrize("what", CUT)
def test_an_answer_that_is_not_whole_is_no_rating_and_is_asked_for_again(what: str, server: Server) -> None:
    server.gives_logprobs = False
    server.scripted = says(CUT[what])
    rating = rate(server)
    assert (rating.outcome, rating.score, rating.final) == ("unparsable", None, False)
    assert rating.said.startswith(
        ("an answer that ", "an answer whose thoughts", "an empty answer", "an answer of nothing but thoughts")
    )
    assert kept() == 0
    server.scripted = lambda request: None
    assert rate(server).score == server.number("How much?")
    assert kept() == 1


@pytest.mark.parametrize(
    ("body", "score"),
    [
        (completion("85. The answer speaks of", "length"), 85),
        (completion("85 because it", "length"), 85),
        (completion("<think>Is it 10? No.</think>\n\n85"), 85),
        (completion("Is it 10? No.</think>85"), 85),  # the template opened the tag
        (completion("[THINK]10[/THINK]85"), 85),
        (completion("<|channel|>analysis<|message|>10?<|end|><|start|>assistant<|channel|>final<|message|>85"), 85),
        (completion([{"type": "thinking", "thinking": "10"}, {"type": "text", "text": "85"}]), 85),
        (completion("85", None), 85),
        (completion("85", None) | {"usage": None}, 85),
        (completion("85", "eos"), 85),
    ],
)
def test_an_answer_that_is_whole_is_read(body: dict[str, Any], score: float, server: Server) -> None:
    server.gives_logprobs = False
    server.scripted = says(body)
    rating = rate(server)
    assert (rating.score, rating.final) == (score, True)


@pytest.mark.parametrize(
    "text", ["85. The", "85, since", "**85** is the", "85/100. It", "85\n\nThe", "7.5 (out of", "85% sure that"]
)
def test_a_number_that_is_sure_to_have_ended_counts(text: str) -> None:
    assert began_with_number(text)


@pytest.mark.parametrize(
    "text",
    [
        "85",
        "85 ",
        "8.",
        "85/1",
        "85 out",
        "85 to",
        "70 - 8",
        "70-",
        "85 because 90",
        "Score: 85. T",
        "-85. T",
        "1000. T",
        "85 t",
    ],
)
def test_a_number_that_may_go_on_does_not(text: str) -> None:
    assert not began_with_number(text)


def test_a_model_that_thinks_is_given_room_and_both_answers_are_paid_for(server: Server) -> None:
    server.gives_logprobs = False

    def think(request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        enough = request["max_tokens"] > THOUGHTS
        return 200, completion("85" if enough else "", "stop" if enough else "length", reasoning_content="hm")

    server.scripted = think
    judge = judge_at(server)
    ratings = judge.rate([Question(f"{n}?", "") for n in range(3)])
    assert [rating.score for rating in ratings] == [85] * 3
    assert (
        sum(request["max_tokens"] < THOUGHTS for request in server.asked) == 1
    )  # the one about how numbers are written


@pytest.mark.parametrize(
    "text", ["-5", "\u22125", "8/10", "85 to 90", ".85", "1e2", "1,000", "9.9.9", "half of \u0664\u0665"]
)
def test_a_text_that_says_no_single_number_of_the_scale_is_no_rating(text: str, server: Server) -> None:
    server.gives_logprobs = False
    server.scripted = says(completion(text))
    assert (rate(server).outcome, rate(server).score) == ("unparsable", None)


def test_evidence_that_is_one_text_is_not_taken_for_its_letters() -> None:
    aspect = {"aspect": "tone", "description": "dry", "evidence": ["so it goes"]}
    assert _aspects_in(json.dumps([aspect])) is not None
    assert _aspects_in(json.dumps([{**aspect, "evidence": "so it goes"}])) is None


# Log-probabilities that are none

TOPS = {
    "NaN": [["7", math.nan]],
    "positive": [["7", 0.5]],
    "absurd": [["7", 1e6]],
    "infinite": [["7", math.inf]],
    "null": [["7", None]],
    "text": [["7", "-0.1"]],
    "true": [["7", True]],
    "all certain": [["7", 0.0], ["8", 0.0], ["the", 0.0]],
}


@pytest.mark.parametrize("what", TOPS)
def test_log_probabilities_that_are_none_make_no_rating(what: str, server: Server) -> None:
    top = [{"token": token, "logprob": logprob} for token, logprob in TOPS[what]]
    server.scripted = says(completion("7", "length", top=top))
    rating = rate(server)
    assert (rating.outcome, rating.score) == ("failed", None)
    assert "which is none" in rating.said or "together" in rating.said
    assert kept() == 0
    server.scripted = lambda request: None
    assert rate(server).outcome == "rated"


def test_a_reply_that_an_earlier_version_kept_is_asked_for_again(server: Server) -> None:
    assert rate(server).outcome == "rated"
    with sqlite3.connect(ReplyCache().path) as rows:
        (reply,) = rows.execute("SELECT reply FROM replies WHERE asked NOT LIKE '%Repeat these%'").fetchone()
        old = {**json.loads(reply), "candidates": [["7", 1e6]]}
        del old["sent"], old["thoughts"]
        rows.execute("UPDATE replies SET reply = ? WHERE asked NOT LIKE '%Repeat these%'", (json.dumps(old),))
    assert rate(server).outcome == "rated" == rate(server).outcome
    assert len(server.prompts()) == 2


def test_log_probabilities_of_minus_infinity_and_of_rounding_are_fine(server: Server) -> None:
    top = [{"token": "7", "logprob": 1e-6}, {"token": "8", "logprob": -math.inf}, {"token": "9", "logprob": -9999.0}]
    server.scripted = says(completion("7", "length", top=top))
    assert rate(server).score == pytest.approx(7)


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"choices": [{"message": {"content": 1e999}}]}', b"{}", b"null", b"\xff"]
)
def test_a_body_that_is_no_completion_is_one(content: bytes) -> None:
    from harness.servers.chat import Malformed

    with pytest.raises(Malformed):
        read_reply(content, strict=False)


# What a server does not take


def forbids(*fields: str) -> Callable[[dict[str, Any]], tuple[int, dict[str, Any]] | None]:
    def script(request: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
        found = [name for name in fields if name in request]
        detail = [
            {"type": "extra_forbidden", "loc": ["body", name], "msg": "Extra inputs are not permitted"}
            for name in found
        ]
        return (422, {"object": "error", "message": {"detail": detail}}) if found else None

    return script


def test_only_the_field_that_was_refused_is_left_out(server: Server) -> None:
    server.scripted = forbids("seed")
    judge = judge_at(server)
    ratings = judge.rate([Question("How much?", "")])
    assert "seed" not in server.asked[-1] and server.asked[-1]["temperature"] == 0
    record = ledger(ratings, judge)
    assert record.greedy is True
    assert record.sent == [{"logprobs": True, "max_tokens": 1, "temperature": 0, "top_logprobs": 20}]


def test_a_judge_that_takes_no_temperature_is_said_to_have_drawn(server: Server) -> None:
    server.scripted = forbids("seed", "temperature")
    judge = judge_at(server)
    assert ledger(judge.rate([Question("How much?", "")]), judge).greedy is False


def test_what_was_asked_is_known_of_a_reply_that_was_kept(server: Server) -> None:
    server.scripted = forbids("seed")
    rate(server)
    judge = judge_at(server)
    assert ledger(judge.rate([Question("How much?", "")]), judge).greedy is True
    assert len(server.prompts()) == 1


ECHOES = [
    {"error": {"message": "Your prompt about temperature and seed is too long", "param": None}},
    {"error": {"message": "invalid prompt: 'Is seed or temperature or logprobs not supported?'"}},
    {"error": {"message": "Invalid request: {'temperature': 0, 'seed': 0, 'logprobs': True, 'max_tokens': 1}"}},
    {"error": {"message": "Invalid request: SamplingParams(temperature=0.0, seed=0, logprobs=20)"}},
    {"error": {"message": "content not allowed: temperature, seed", "param": "messages"}},
    {"error": {"message": "rejected"}, "request": {"temperature": 0, "seed": 0, "logprobs": True}},
    {"detail": [{"type": "string_type", "loc": ["body", "messages", 0, "content"], "msg": "bad", "input": "seed"}]},
    "temperature seed logprobs",
]


@pytest.mark.parametrize("echo", ECHOES)
def test_an_error_that_repeats_a_word_changes_nothing(echo: Any, server: Server) -> None:
    prompt = "Is seed or temperature or logprobs not supported?"
    server.scripted = lambda request: (400, echo) if request["messages"][0]["content"] == prompt else None
    judge = judge_at(server)
    (rating,) = judge.rate([Question(prompt, "")])
    assert rating.outcome == "failed"
    assert len(server.prompts()) <= 2
    judge.rate([Question("How much?", "")])
    assert {"temperature", "seed", "logprobs"} <= server.asked[-1].keys()


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        ("Unrecognized request argument supplied: seed", {"seed"}),
        ({"error": "json: unknown field \"seed\""}, {"seed"}),
        ({"message": "Unsupported value: 'temperature' does not support 0 with this model.", "param": None}, {"temperature"}),
        ({"message": "`temperature` must be strictly positive"}, {"temperature"}),
        ({"message": "You are not allowed to request logprobs from this model"}, {"logprobs"}),
        ({"message": "Requested sample logprobs of 20, which is greater than max allowed: 5"}, {"logprobs"}),
        ({"detail": [{"loc": ["body", "ChatRequest", "temperature", "float"], "msg": "no"}]}, {"temperature"}),
        ({"detail": "Unexpected fields in the request: {'seed', 'top_logprobs'}"}, {"seed", "top_logprobs"}),
        ({"message": "max_tokens is not supported. Use max_completion_tokens instead."}, {"max_tokens"}),
        ({"message": "max_tokens must be less than the context minus the prompt"}, set()),
    ],
)  # fmt: skip
def test_a_refusal_names_what_is_refused(body: Any, fields: set[str]) -> None:
    sent = {"max_tokens": 1, "temperature": 0, "seed": 0, "logprobs": True, "top_logprobs": 20}
    assert refused_fields(400, body, sent, Ask((("user", "How much?"),), 1)) == fields
    assert refused_fields(500, body, sent, Ask((("user", "How much?"),), 1)) == set()


# Pairs, and what is said


def test_an_opinion_that_was_cut_off_is_asked_for_again() -> None:
    from harness.judge.judges import Heard

    look = _look("a", "prompt", Heard(Reply('{"ratings": {"A": {"relevance": 5', finish="length"), "k", False))
    assert (look.rating.outcome, look.rating.final) == ("unparsable", False)
    assert _fault(Reply("No.", finish="stop")) == "" != _fault(Reply("<think>{}", finish="stop"))


def test_a_record_says_that_its_judge_drew_and_that_answers_were_cut(run_config: Any) -> None:
    record = RunRecord(config=run_config(), judging=Judging(greedy=False, not_final=2))
    record.health.unrated = record.health.unsettled = 2
    said = " ".join(warnings(record))
    assert "takes no temperature 0" in said and "'harness score RUN' asks again" in said


# Credentials


SECRET = "p4ssw0rd-of-mine"
ADDRESSES = ["http://me:{s}@{host}/v1", "http://{s}@{host}/v1", "http://{host}/v1?api_key={s}", "http://:{s}@{host}/v1/",
             "HTTP://me:{s}@{host}/v1?token={s}&api-version=2#x={s}"]  # fmt: skip


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("echoes", [False, True])
def test_a_server_gets_the_credentials_of_its_address_and_nobody_else(
    address: str, echoes: bool, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    full = address.format(s=SECRET, host=server.url[7:-3])
    echo = {"error": {"message": f"no such thing at {full}; Authorization was given, key {SECRET}"}}
    server.scripted = lambda request: (400, echo) if echoes else (200, completion("57 100"))
    judge = open_judge("openai/m", full, ["backoff=0.01", "retries=0"])
    (rating,) = judge.rate([Question("How much?", "")])
    sent = str(server.headers) + str(server.paths)
    assert SECRET in sent or "Basic" in sent
    assert all(path.startswith("/v1/chat/completions") for path in server.paths)
    assert SECRET not in f"{rating} {judge.config} {judge.check()}"
    assert judge.config.base_url is not None and judge.config.base_url.startswith(server.url)
    assert SECRET.encode() not in ReplyCache().path.read_bytes()


@pytest.mark.parametrize("address", ["me:{s}@host/v1", "host/v1?key={s}", "http://me:a/{s}@host/v1", "ftp://{s}@host", "http://", "http://me:1/{s}@h",
                                     "http://h:port{s}/v1", "http://me:{s}#@h/v1"])  # fmt: skip
def test_an_address_that_is_none_is_refused_without_repeating_it(address: str) -> None:
    with pytest.raises(UsageError, match="has no valid address") as raised:
        open_judge("openai/m", address.format(s=SECRET))
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize(
    "said", ["{}", "key_{}", "{}_of_you", "Bearer{}", "api-key%3D{}%26x", "{{'authorization': '{}'}}"]
)
def test_a_key_that_a_server_repeats_is_not_shown(said: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    server.scripted = lambda request: (400, {"error": {"message": f"Incorrect API key: {said.format(SECRET)}."}})
    assert SECRET not in judge_at(server).check()
