"""Models behind servers: prompt-only methods answer through one, nothing is lost or paid for twice, the rest is refused."""

from __future__ import annotations

import email.utils
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
from chat_server import Words, serving

from harness.data import Joint
from harness.errors import UsageError
from harness.method import Retrieval
from harness.methods.cad import CAD
from harness.methods.cos import CoS
from harness.methods.plain import Plain
from harness.records.store import read_record, read_samples
from harness.run.contract import toy_examples
from harness.run.served import ServedSystem
from harness.run.system import Generation
from harness.servers.chat import Ask, NoReply, Reply
from harness.servers.endpoint import Endpoint, Limits, _Gate
from harness.servers.model import ServedModel


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Words]:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    with serving(Words()) as running:
        yield running


@pytest.fixture
def run(harness: Callable, server: Words, tmp_path: Path) -> Callable[..., Any]:
    def call(method: str, more: str = "", task: str = "lamp4", limit: int = 6, output: str = "out") -> Any:
        line = f"run --method {method} --task {task} --limit {limit} --model openai/m --model_base_url {server.url}"
        done = harness(f"{line} --output_path {output} {more}")
        folders = sorted((tmp_path / output).glob(f"*/*/{method}-*"), key=lambda folder: folder.stat().st_mtime)
        return done, folders[-1] if folders else None

    return call


@pytest.mark.parametrize("method", ["plain", "rag", "pag", "copy"])
def test_methods_that_are_a_prompt_answer_through_a_server(method: str, run: Callable, server: Words) -> None:
    done, folder = run(method, "--max_new_tokens 5")
    assert done.code == 0, done.err
    record = read_record(folder)
    samples = read_samples(folder)
    assert record.status == "complete" and len(samples) == 6 and all(s.response for s in samples)
    assert (record.config.model.name, record.config.model.dtype) == ("openai/m", "served")
    assert record.serving is not None and record.serving.base_url == server.url
    assert record.cost.forward_passes is None
    if method != "copy":
        assert record.serving.models == ["m-1"] and record.serving.requests == 6
        assert record.cost.prefill_tokens == sum(s.prompt_tokens for s in samples)
        assert (samples[0].finish, samples[0].new_tokens) == ("length", 5)


def test_every_sampling_field_is_sent(run: Callable, server: Words) -> None:
    run("plain", "--max_new_tokens 5")
    sent = server.asked[-1]
    assert (sent["temperature"], sent["top_p"], sent["top_k"], sent["min_p"]) == (0, 1, 0, 0)
    assert (sent["repetition_penalty"], sent["presence_penalty"], sent["frequency_penalty"]) == (1, 0, 0)
    run("plain", "--max_new_tokens 5 --temperature 0.7 --top_k 7 --top_p 0.9")
    six = server.asked[-6:]
    assert {(r["temperature"], r["top_k"], r["top_p"]) for r in six} == {(0.7, 7, 0.9)}
    assert len({r["seed"] for r in six}) == 6  # a sample draws with noise of its own


def test_a_neutral_field_may_be_refused_and_one_that_was_asked_for_may_not(run: Callable, server: Words) -> None:
    server.refuses = ("top_k",)
    done, folder = run("plain", "--max_new_tokens 5")
    assert done.code == 0
    record = read_record(folder)
    assert record.serving is not None and all("top_k" not in sent for sent in record.serving.sent)
    done, folder = run("plain", "--max_new_tokens 5 --top_k 7 --temperature 1")
    assert done.code == 3
    assert all("does not take top_k" in str(sample.error) for sample in read_samples(folder))


@pytest.mark.parametrize("counts", [True, False])
def test_history_is_left_out_by_whole_items_and_never_cut(counts: bool, run: Callable, server: Words) -> None:
    server.context, server.counts = 90, counts
    done, folder = run("rag", "--max_new_tokens 5 --set k=8")
    samples = read_samples(folder)
    assert any(sample.dropped_items for sample in samples), done.err
    for sample in samples:
        assert sample.error is None and sample.prompt_tokens + 5 <= 90
    assert set(server.answered.values()) == {1}
    server.context = 6
    done, folder = run("rag", "--max_new_tokens 4 --set k=7")
    assert done.code == 3
    assert all(sample.response is None and sample.error for sample in read_samples(folder))


def test_what_needs_weights_is_one_line_and_leaves_no_record(
    run: Callable, server: Words, harness: Callable, tmp_path: Path
) -> None:
    for method in ("cad", "dps", "persona_vector", "lora_p"):
        done, folder = run(method, "--max_new_tokens 5", output="refused")
        assert done.code == 2, done.err
        assert "weights" in done.error() or "whole vocabulary" in done.error()
        assert folder is None and not (tmp_path / "refused").exists()
    for task in ("patching", "delta_vectors --split dev"):
        done, folder = run("plain", task=task, output="refused")
        assert done.code == 2 and "activations" in done.error() and folder is None
    for command in ("fit --method dps --task lamp4", "sweep --method plain --task lamp4 --set k=1,2"):
        assert harness(f"{command} --model openai/m").code == 2
    for option in ("--model_base_url http://h/v1", "--model_set retries=1"):
        assert harness(f"run --method plain --task lamp4 --model tiny {option}").code == 2


CHOICES = """\
{"user": "a", "input": "the red one is", "target": "red", "choices": ["red", "blue"], "history": [{"text": "red red"}]}
{"user": "b", "input": "the blue one is", "target": "blue", "choices": ["red", "blue"], "history": [{"text": "blue"}]}
{"user": "c", "input": "what is it then", "target": "blue", "choices": ["red", "blue"], "history": [{"text": "was blue"}]}
"""


def test_choices_are_scored_by_a_server_that_returns_the_log_probabilities_of_a_prompt(
    run: Callable, server: Words, tmp_path: Path
) -> None:
    server.scores, server.counts = "prompt", True
    (tmp_path / "mine.jsonl").write_text(CHOICES)
    for method in ("plain", "rag", "pag", "copy"):
        done, folder = run(method, task="users:./mine.jsonl")
        assert done.code == 0, done.err
        record, samples = read_record(folder), read_samples(folder)
        assert record.status == "complete" and {s.finish for s in samples} == {"choice"}
        assert record.serving is not None
        if method == "copy":
            continue
        assert record.serving.scoring == "prompt log-probabilities, the server's ids"
        assert record.serving.requests == 6 and record.serving.usd is None
        for sample in samples:
            best = max((0, 1), key=sample.extra["logprobs"].__getitem__)
            assert sample.response == ("red", "blue")[best] and len(set(sample.extra["logprobs"])) == 2
            assert sample.history_items == (method == "rag")


@pytest.mark.parametrize("counts", [True, False])
def test_a_choice_has_the_log_probability_of_its_tokens_alone(counts: bool, server: Words) -> None:
    server.scores, server.counts = "prompt", counts
    model = ServedModel("m", server.url, FAST)
    asks = model.scoring.asks(Joint("Which one?\nAnswer:"), (" A", " B", " A and B"))
    found = [heard.reply for heard in model.replies.ask(asks, "one")]
    before = server.ids("Which one?\nAnswer:")
    for reply, words in zip(found, (" A", " B", " A and B"), strict=True):
        ids = server.ids(words)
        right = [server.logprob([*before, *ids[:n]], i) for n, i in enumerate(ids)]
        assert isinstance(reply, Reply) and [token.logprob for token in reply.scored] == right


@pytest.mark.parametrize("scores", ["", "answer", "zeros", "late"])
@pytest.mark.parametrize("counts", [True, False])
def test_a_server_whose_numbers_are_not_the_prompts_is_refused_before_there_is_a_record(
    scores: Literal["", "answer", "zeros", "late"], counts: bool, run: Callable, server: Words, tmp_path: Path
) -> None:
    server.scores, server.counts = scores, counts
    (tmp_path / "mine.jsonl").write_text(CHOICES)
    done, folder = run("plain", "--model_set backoff=0", task="users:./mine.jsonl")
    assert done.code == 2 and "does not return the log-probabilities of a prompt" in done.error()
    assert folder is None and not (tmp_path / "out").exists()


def test_a_conversation_is_scored_only_after_a_server_that_says_how_it_writes_one(
    run: Callable, server: Words, tmp_path: Path
) -> None:
    server.scores = "prompt"
    (tmp_path / "mine.jsonl").write_text(CHOICES)
    done, folder = run("plain", task="users:./mine.jsonl")
    assert done.code == 2 and "how it writes a conversation" in done.error() and folder is None


@pytest.mark.parametrize("method", [CAD(alpha=0.5), CoS(lam=2.0), CoS(retrieval=Retrieval(k=2), lam=(0.5, -1.0))])
def test_a_linear_mix_of_choices_of_one_token_is_that_of_the_whole_vocabulary(method: Any, server: Words) -> None:
    """Up to a number that all choices share: the differences are those of the mix of all logits, normalised."""
    import torch

    from harness.plan import StreamOutput

    server.scores, server.counts = "prompt", True
    item = toy_examples(1)[0].example
    example = replace(item, choices=(" A", " B", " C"))
    model = ServedModel("m", server.url, FAST)
    server.ids("A B C and a few words more")
    (sample,) = ServedSystem(model, method, Generation(5)).answer([example])
    plan = method.plan(example, None, None)
    streams = []
    for stream in plan.streams:
        before = list(model.tokenizer.prompt(stream.prompt.render()).ids)
        numbers = [server.logprob(before, i) for i in range(len(server.vocabulary))]
        streams.append(StreamOutput(torch.tensor([[numbers]], dtype=torch.float64)))
    chosen = [server.ids(choice)[0] for choice in example.choices]
    whole = plan.mix(streams)[0, 0][chosen]
    mixed = torch.tensor(sample.extra["logprobs"], dtype=torch.float64)
    assert len(plan.streams) >= 2 and sample.error is None
    torch.testing.assert_close(mixed - mixed[0], whole - whole[0])
    assert mixed.exp().sum().item() == pytest.approx(1)


def test_cad_is_refused_where_a_choice_is_more_than_one_token(run: Callable, server: Words, tmp_path: Path) -> None:
    server.scores, server.counts = "prompt", True
    (tmp_path / "mine.jsonl").write_text(CHOICES.replace('["red", "blue"]', '["red", "blue", "a dark blue"]'))
    done, folder = run("cad", task="users:./mine.jsonl")
    assert done.code == 2 and "'a dark blue' is 3" in done.error() and folder is None
    (tmp_path / "mine.jsonl").write_text(CHOICES)
    done, folder = run("cad", task="users:./mine.jsonl")
    assert done.code == 0 and read_record(folder).serving.requests == 12  # two prompts of two choices each


def test_a_choice_compared_a_character_is_refused_under_a_mix_and_not_without(server: Words) -> None:
    server.scores, server.counts = "prompt", True
    item = toy_examples(1)[0].example
    example = replace(item, choices=(" A", " Bee"), compared="character")
    model = ServedModel("m", server.url, FAST)
    with pytest.raises(UsageError, match="a character"):
        ServedSystem(model, CAD(), Generation(5)).check([example])
    (sample,) = ServedSystem(model, Plain(), Generation(5)).answer([example])
    assert sample.response in example.choices


def test_history_before_choices_is_left_out_by_whole_items(server: Words) -> None:
    from harness.methods.rag import RAG

    server.scores, server.counts = "prompt", True
    example = replace(toy_examples(1)[0].example, choices=(" A", " B"))
    model = ServedModel("m", server.url, FAST)
    system = ServedSystem(model, RAG().with_options({"k": 3}), Generation(2))
    (whole,) = system.answer([example])
    server.context = whole.prompt_tokens + 1
    (less,) = system.answer([example])
    assert less.error is None and 0 < less.dropped_items < whole.history_items
    server.context = 5
    (none,) = system.answer([example])
    assert none.response is None and "longer than the server's context" in str(none.error)


def test_what_was_paid_is_in_the_record_and_what_it_will_be_in_the_dry_run(
    run: Callable, server: Words, harness: Callable
) -> None:
    server.counts = True
    prices = "--model_set price_in=2 --model_set price_out=8"
    done, _ = run("rag", f"--max_new_tokens 5 --dry_run {prices}", output="dry")
    asked = sum(path != "/tokenize" for path in server.paths)
    assert (
        done.code == 0 and "6 requests: about" in done.out and "cost: $" in done.out and asked == 1
    )  # whether it is there
    done, folder = run("rag", f"--max_new_tokens 5 {prices}")
    assert "server: http" in done.err and "; $0.00" in done.err
    serving = read_record(folder).serving
    assert serving is not None
    assert serving.usd == pytest.approx((serving.input_tokens * 2 + serving.output_tokens * 8) / 1e6)
    assert f"{serving.input_tokens} tokens read" in harness(f"show {folder}").out.replace("\n", " ")
    done, again = run("rag", f"--max_new_tokens 5 --seed 1 {prices}")
    serving = read_record(again).serving
    assert serving is not None and (serving.usd, serving.cached, serving.requests) == (0, 6, 6)
    assert run("rag", "--model_set price_in=-1")[0].code == 2


FAST = Limits(64, timeout=5, retries=30, backoff=0.005)
FAULTS = ["", "", "", "429", "500", "503", "closed", "half", "cut", "slow"]


def test_a_hundred_requests_through_a_server_that_fails_lose_and_pay_for_nothing_twice(server: Words) -> None:
    draw = random.Random(0)
    chances = [draw.choice(FAULTS[:-2] + FAULTS[-1:]) for _ in range(3000)]
    server.faults = lambda number: chances[number]
    model = ServedModel("m", server.url, FAST)
    asks = [Ask((("user", f"question {n}"),), 3) for n in range(100)]
    found = model.replies.ask(asks, "one")
    assert [heard.reply.text for heard in found if isinstance(heard.reply, Reply)] == [
        f"question {n}" for n in range(100)
    ]
    assert set(server.answered.values()) == {1}
    again = ServedModel("m", server.url).replies.ask(asks, "two")
    assert all(heard.cached for heard in again) and set(server.answered.values()) == {1}


def test_an_error_is_never_kept(server: Words) -> None:
    model, asks = ServedModel("m", server.url, replace(FAST, retries=0)), [Ask((("user", "a b"),), 3)]
    for fault in ("400", "429", "500", "closed", "cut"):
        server.faults = lambda number, fault=fault: fault
        (heard,) = model.replies.ask(asks, "one")
        assert isinstance(heard.reply, NoReply)
    server.faults = lambda number: ""
    (heard,) = model.replies.ask(asks, "one")
    assert isinstance(heard.reply, Reply) and not heard.cached


@pytest.mark.parametrize("dated", [False, True])
def test_a_server_that_asks_for_a_pause_gets_it(dated: bool, server: Words) -> None:
    server.retry_after = email.utils.formatdate(time.time() + 2, usegmt=True) if dated else "0.7"
    server.faults = lambda number: "429" if number == 1 else ""
    start = time.monotonic()
    (reply,) = Endpoint("m", "model", server.url, FAST).ask([Ask((("user", "a"),), 1)])
    assert isinstance(reply, Reply) and reply.retries == 1 and time.monotonic() - start > 0.5


def test_requests_double_while_a_server_keeps_up_and_a_429_takes_some_away(server: Words) -> None:
    model = Endpoint("m", "model", server.url, Limits(64, retries=40, backoff=0.005))
    model.ask([Ask((("user", f"q {n}"),), 1) for n in range(10)])
    assert server.most_waiting <= 10
    server.delay = 0.05
    model.ask([Ask((("user", f"q {n}"),), 1) for n in range(200)])
    assert 10 < server.most_waiting <= 64
    server.most_waiting, server.faults = 0, lambda number: "429" if number % 2 else ""
    found = model.ask([Ask((("user", f"r {n}"),), 1) for n in range(60)])
    assert not any(isinstance(reply, NoReply) for reply in found) and server.most_waiting <= 30
    gate = _Gate(64)
    assert gate.limit == 10
    gate.busy()
    assert gate.limit == 8


def test_a_server_too_slow_for_so_many_is_asked_fewer_at_once(server: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    fewer, busy = [], _Gate.busy
    monkeypatch.setattr(_Gate, "busy", lambda gate: (fewer.append(gate.limit), busy(gate)))
    server.faults = lambda number: "hang" if number <= 3 else ""
    found = Endpoint("m", "model", server.url, replace(FAST, timeout=1)).ask(
        [Ask((("user", f"q {n}"),), 1) for n in range(6)]
    )
    assert not any(isinstance(reply, NoReply) for reply in found) and fewer[:2] == [10, 8]


def test_a_run_that_was_stopped_goes_on_without_paying_twice(run: Callable, server: Words) -> None:
    server.faults = lambda number: "400" if number > 4 else ""
    done, folder = run("plain", "--max_new_tokens 5")
    assert done.code == 3
    server.faults = lambda number: ""
    done, folder = run("plain", "--max_new_tokens 5 --retry_failed")
    assert done.code == 0, done.err
    record = read_record(folder)
    assert {n for q, n in server.answered.items() if "Say yes" not in q} == {1}
    assert record.serving is not None and record.serving.requests == 6
    assert record.serving.input_tokens == record.cost.prefill_tokens


def test_a_record_never_holds_the_answers_of_two_servers_without_saying_so(
    run: Callable, server: Words, harness: Callable, tmp_path: Path
) -> None:
    server.faults = lambda number: "400" if number > 4 else ""
    run("plain", "--max_new_tokens 5")
    with serving(Words()) as other:
        line = "run --method plain --task lamp4 --limit 6 --max_new_tokens 5 --model openai/m --output_path out --retry_failed"
        said = f"answers here are of openai/m at {server.url}, and this command says openai/m at {other.url}"
        done = harness(f"{line} --model_base_url {other.url}")
        (folder,) = (tmp_path / "out").glob("*/*/plain-*")
        assert done.code == 0 and said in done.err
        assert [note for note in read_record(folder).notes if said in note]
        done = harness(f"{line} --model_base_url {other.url}")  # all is there
        assert "already there" in done.err and said in done.err
    server.faults = lambda number: ""
    done = harness(f"{line} --model_base_url {server.url}")
    assert said in done.err  # what is there is still of two


def test_a_server_that_is_not_there_is_one_line(harness: Callable, server: Words) -> None:
    done = harness("run --method plain --task lamp4 --limit 2 --model openai/m --model_base_url http://127.0.0.1:9/v1")
    assert done.code == 1 and "openai/m at http://127.0.0.1:9/v1 does not answer" in done.error()
