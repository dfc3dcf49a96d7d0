"""The query is never cut: history goes item by item from the tail until the prompt fits, and every cut is counted."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.data import Example, HistoryItem, Joint, Prompt, User
from harness.engine.decode import Decoder
from harness.engine.encoder import Encoder
from harness.engine.model import LanguageModel
from harness.errors import ContextTooLong
from harness.method import Fitted, Retrieval
from harness.methods.cad import CAD
from harness.methods.plain import Plain
from harness.methods.rag import RAG
from harness.mix import Contrast
from harness.plan import Plan, Stream
from harness.run.batches import Batching
from harness.run.contract import byte_tokenizer, random_lm
from harness.run.system import ModelSystem
from harness.task import Generation
from harness.tasks.lamp_prompts import FIELDS, LampTemplate

ENCODERS = {chat: Encoder(byte_tokenizer(chat=chat)) for chat in (True, False)}
TASKS = ("lamp1", "lamp3", "lamp4", "lamp7")


def items(texts: list[str], task: str = "lamp4") -> tuple[HistoryItem, ...]:
    return tuple(HistoryItem(str(i), dict.fromkeys(FIELDS[task], text), text) for i, text in enumerate(texts))


@given(
    st.sampled_from(TASKS),
    st.booleans(),
    st.text("abé \n", max_size=30),
    st.lists(st.text("ab ☕", max_size=20), max_size=9),
    st.text("s", max_size=5),
    st.integers(0, 700),
)
@settings(max_examples=300, deadline=None)
def test_the_longest_best_first_prefix_that_fits_is_kept(task, chat, query, texts, summary, room):
    encoder = ENCODERS[chat]
    prompt = Prompt(LampTemplate(task), query, items(texts, task), summary)
    lengths = [len(encoder.encode(prompt.first(kept).render()).ids) for kept in range(len(texts) + 1)]
    fitting = [kept for kept, length in enumerate(lengths) if length <= room]
    if not fitting:
        with pytest.raises(ContextTooLong, match=f"the query alone has {lengths[0]} tokens .* room for {room}; it is"):
            encoder.encode_within(prompt, room)
        return
    fitted = encoder.encode_within(prompt, room)
    assert (fitted.items, fitted.dropped) == (fitting[-1], len(texts) - fitting[-1])
    assert fitted.encoded == encoder.encode(prompt.first(fitting[-1]).render())
    assert query in fitted.encoded.text
    assert summary in fitted.encoded.text


@given(st.booleans(), st.lists(st.text("ab é☕\n", max_size=30), max_size=5))
@settings(max_examples=100, deadline=None)
def test_prompts_measured_together_are_as_long_as_each_by_itself(chat, queries):
    encoder = ENCODERS[chat]
    bos = encoder.tokenizer.bos_token or ""
    prompts = [Prompt(LampTemplate("lamp4"), query, items([query])).render() for query in queries]
    prompts += [f"{bos * n}{query}" for n, query in enumerate(queries)]
    assert encoder.lengths(prompts) == [len(encoder.encode(prompt).ids) for prompt in prompts]
    prompts += [Joint(query) for query in queries]
    assert encoder.lengths(prompts) == [len(encoder.encode(prompt).ids) for prompt in prompts]


def test_a_long_history_is_not_tokenised_once_an_item(monkeypatch):
    encoder, calls = ENCODERS[False], []
    plain = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, rendered: calls.append(1) or plain(self, rendered))
    fitted = encoder.encode_within(Prompt(LampTemplate("lamp7"), "query", items(["a tweet"] * 1000, "lamp7")), 500)
    assert 0 < fitted.items < 100
    assert len(calls) <= 12


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return random_lm(max_position_embeddings=200)


def example(ident: str, query: str, texts: list[str]) -> Example:
    return Example(ident, User(ident, items(texts)), query, query, LampTemplate("lamp4"))


def test_room_for_the_answer_is_kept_free_in_every_stream(lm):
    decoder = Decoder(lm)
    prompt = Prompt(LampTemplate("lamp4"), "query", items(["text " * 4] * 9))
    streams = (Stream(prompt), Stream(prompt.first(0)))
    for new_tokens in (1, 50, 150):
        request = decoder.prepare("x", Plan(streams), new_tokens)
        assert request.tokens + new_tokens <= lm.max_length
        assert request.prompts[0].items + request.prompts[0].dropped == 9
        assert request.prompts[1].dropped == 0
    with pytest.raises(ContextTooLong, match=r"the query alone has \d+ tokens and the context has room for 5"):
        decoder.prepare("x", Plan(streams), 195)


def test_cut_items_are_counted_and_a_query_that_does_not_fit_fails_alone(lm):
    examples = [
        example("fits", "short", ["a", "b"]),
        example("cut", "short", ["text " * 6] * 9),
        example("query", "long " * 60, ["a"]),
        example("empty", "short", []),
    ]
    system = ModelSystem(lm, RAG(Retrieval(k=9)), Generation(8))
    samples = {sample.id: sample for sample in system.respond(examples)}
    assert [samples[i].dropped_items for i in ("fits", "cut", "empty")] == [0, 9 - samples["cut"].history_items, 0]
    assert [samples[i].history_items for i in ("fits", "empty")] == [2, 0]
    assert samples["cut"].prompt_tokens <= 192
    assert "it is never cut" in (samples["query"].error or "")
    assert samples["query"].response is None
    assert all(samples[i].error is None for i in ("fits", "cut", "empty"))


def test_batches_are_planned_by_the_tokens_that_prompts_have_once_cut(lm):
    rng = np.random.Generator(np.random.Philox(0))
    examples = [
        replace(
            example(str(n), "word " * int(rng.integers(45)), ["text " * int(rng.integers(9))] * int(rng.integers(9))),
            choices=("[1]", "[2], or longer")[: int(rng.integers(3))],
        )
        for n in range(30)
    ]
    system = ModelSystem(lm, CAD(Retrieval(k=9)), Generation(8), batching=Batching(7))
    samples = list(system.respond(examples))
    asked = {}
    for one in examples:
        with contextlib.suppress(ContextTooLong):
            asked[one.id] = system._ask(one).tokens
    assert 0 < len(asked) < 30 and any(sample.dropped_items for sample in samples)
    longest_first = sorted(asked, key=lambda i: -asked[i])  # of equals the first comes first
    failed = [one.id for one in examples if one.id not in asked]
    assert [i for batch in system.batching.planned for i in batch] == [*longest_first, *failed]
    assert [sample.id for sample in samples if sample.error] == failed


def test_prompts_are_made_when_their_batch_comes_and_not_kept(lm, monkeypatch):
    examples = [example(str(n), "short", ["a"] * n) for n in range(9)]
    system = ModelSystem(lm, RAG(), Generation(2), batching=Batching(3))
    made: list[str] = []
    prepare = Decoder.prepare
    monkeypatch.setattr(Decoder, "prepare", lambda self, key, *rest: made.append(key) or prepare(self, key, *rest))
    samples = system.respond(examples)
    next(samples)
    assert made == system.batching.planned[0]
    list(samples)
    assert made == [i for batch in system.batching.planned for i in batch]


def test_many_samples_are_measured_and_put_in_order_a_window_at_a_time(lm, monkeypatch):
    rng = np.random.Generator(np.random.Philox(1))
    examples = [example(str(n), "word " * int(rng.integers(1, 30)), ["a"]) for n in range(25)]
    asked: list[str] = []
    plan = RAG.plan
    monkeypatch.setattr(RAG, "plan", lambda self, one, *rest: asked.append(one.id) or plan(self, one, *rest))

    def system(**options: object) -> ModelSystem:
        return ModelSystem(lm, RAG(), Generation(2), batching=Batching(4, ahead=10, **options))

    first = system()
    answers = first.respond(examples)
    next(answers)
    assert set(asked) == {str(n) for n in range(10)}, "of the others nothing is known before their turn"
    samples = [sample.id for sample in answers]
    planned = first.batching.planned
    assert [len(ids) for ids in planned] == [4, 4, 2, 4, 4, 2, 4, 1] and len(samples) == 24
    tokens = {one.id: first._ask(one).tokens for one in examples}
    for window in (range(10), range(10, 20), range(20, 25)):
        in_order = sorted(map(str, window), key=lambda i: -tokens[i])
        assert [i for ids in planned for i in ids if int(i) in window] == in_order

    whole = system(whole=True)
    whole.plan_batches(examples)
    assert whole.batching.planned == planned, "a grid shares out the same batches"

    stopped = system()
    answers = stopped.respond(examples)
    done = {next(answers).id for _ in range(12)} - {planned[3][1]}  # killed within a batch of the second window
    resumed = system(planned=[list(ids) for ids in stopped.batching.planned], done=frozenset(done))
    assert {sample.id for sample in resumed.respond(examples)} == {
        i for ids in planned if not done.issuperset(ids) for i in ids
    }
    assert resumed.batching.planned == planned

    halved = system()
    halved.plan_batches(examples)
    halved.batching.halve(1)
    list(halved.respond(examples))
    assert [len(ids) for ids in halved.batching.planned] == [4, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1]
    assert [i for ids in halved.batching.planned for i in ids] == [i for ids in planned for i in ids]


def test_a_cut_that_two_streams_share_is_counted_once(lm):
    class Twice(Plain):
        def plan(self, example: Example, shared: Fitted | None, personal: Fitted | None) -> Plan:
            prompt = example.prompt(example.user.history)
            return Plan((Stream(prompt), Stream(prompt), Stream(prompt.first(8))), Contrast(0.5))

    (sample,) = ModelSystem(lm, Twice(), Generation(8)).respond([example("cut", "short", ["text " * 6] * 9)])
    assert sample.error is None
    assert sample.dropped_items == (9 - sample.history_items) + (8 - sample.history_items)


def test_an_empty_history_is_the_plain_prompt(lm):
    asked = example("e", "short", [])
    for method in (RAG(), CAD()):
        plan = method.plan(asked, None, None)
        assert {stream.prompt.render() for stream in plan.streams} == {asked.prompt().render()}
    (answer,) = ModelSystem(lm, RAG(), Generation(8)).respond([asked])
    (plain,) = ModelSystem(lm, Plain(), Generation(8)).respond([asked])
    assert (answer.response, answer.prompt_hash) == (plain.response, plain.prompt_hash)
