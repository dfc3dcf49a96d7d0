"""Choices scored instead of generated, in as few passes as there are different beginnings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from harness.data import Example, HistoryItem, Prompt, User
from harness.edits import AddVector, ScaleHeads
from harness.engine.decode import Decoder
from harness.engine.model import LanguageModel
from harness.engine.rows import Pass, Request
from harness.engine.sites import FAMILIES
from harness.method import Fitted
from harness.methods.cad import CAD
from harness.methods.dola import DoLa
from harness.methods.plain import Plain
from harness.methods.rag import RAG
from harness.mix import Contrast
from harness.plan import ALL, DECODE, Edit, FirstLast, Plan, Site, Stream, Where
from harness.run.batches import Batching
from harness.run.contract import ToyTemplate, random_lm
from harness.run.system import ModelSystem
from harness.task import Generation

SHOTS = "Two questions and their answers, which stand before every question of this test. " * 2


@pytest.fixture(params=[*FAMILIES, "mistral with a window", "gemma3_text with a window"], scope="module")
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    family, _, windowed = request.param.partition(" ")
    return random_lm(family, **({"sliding_window": 12} if windowed else {}))


def _requests(decoder: Decoder, texts: list[str], edits: list[tuple[Edit, ...]] | None = None) -> list[Request]:
    plans = [
        Plan((Stream(Prompt(ToyTemplate(), SHOTS + text), own),))
        for text, own in zip(texts, edits or [()] * len(texts), strict=True)
    ]
    return [decoder.prepare(str(i), plan, 8) for i, plan in enumerate(plans)]


def _vector(lm: LanguageModel, where: Where) -> AddVector:
    generator = torch.Generator().manual_seed(1)
    return AddVector(
        Site(1, "block_out"), torch.randn(lm.sites.width, dtype=torch.float64, generator=generator), 2.0, where
    )


TEXTS = ["a", "a longer question", "another one", "the longest of all these questions here"]


def test_prompts_that_begin_alike_give_what_each_gives_alone(lm: LanguageModel) -> None:
    vector = _vector(lm, ALL)
    for edits in ([()] * 4, [(vector,)] * 4, [(vector,), (vector,), (), ()]):
        decoder = Decoder(lm)
        requests = _requests(decoder, TEXTS, edits)
        together = decoder.generate(requests, max_new_tokens=6)
        scored = decoder.score(requests, [answer.ids for answer in together])
        first = decoder.score(requests, [answer.ids[:1] for answer in together])
        for request, answer, score, one in zip(requests, together, scored, first, strict=True):
            (alone,) = decoder.generate([request], max_new_tokens=6)
            assert alone.ids == answer.ids
            for other in (answer.logprobs, score.logprobs):
                assert np.allclose(alone.logprobs, other, atol=1e-10, rtol=0)
            assert one.logprobs == pytest.approx(alone.logprobs[:1], abs=1e-10)


def test_what_prompts_begin_with_runs_once() -> None:
    lm = random_lm()
    decoder = Decoder(lm)
    requests = _requests(decoder, TEXTS)
    shared = len(lm.encoder.encode(ToyTemplate()(SHOTS, (), "")).ids) - len("\n<a>")
    decoder.score(requests, [(5,)] * 4)
    assert decoder.cost.prefill_tokens == shared + sum(request.tokens - shared for request in requests)


@pytest.mark.parametrize("where", [FirstLast(4, 4), ALL])
def test_prompts_share_no_beginning_that_an_edit_of_one_of_them_touches(where: Where) -> None:
    lm = random_lm()
    decoder, other = Decoder(lm), Decoder(lm)
    vector = _vector(lm, where)
    alike, apart = _requests(decoder, TEXTS[:2]), _requests(decoder, TEXTS[:2], [(vector,), ()])
    decoder.score(alike, [(5,)] * 2)
    other.score(apart, [(5,)] * 2)
    assert other.cost.prefill_tokens + other.cost.decode_tokens == sum(request.tokens for request in apart)
    assert decoder.cost.prefill_tokens < other.cost.prefill_tokens


def test_choices_much_longer_than_others_are_not_padded_to(lm: LanguageModel) -> None:
    decoder = Decoder(lm)
    short, long = _requests(decoder, ["a", "b"])
    choices = {short: [(5, 6), (7, 8, 9)], long: [(5,) * 40, (6,)]}
    requests = [request for request, some in choices.items() for _ in some]
    together = decoder.score(requests, [choice for some in choices.values() for choice in some])
    cost = decoder.cost.flops
    decoder.cost.flops = 0
    alone = [score for request, some in choices.items() for score in decoder.score([request] * len(some), some)]
    assert cost == decoder.cost.flops, (
        "what each costs by itself: no row is as long as the longest choice of another sample"
    )
    for one, other in zip(together, alone, strict=True):
        assert np.allclose(one.logprobs, other.logprobs, rtol=1e-9) and one.greedy == other.greedy


def test_choices_that_differ_in_their_last_token_cost_one_pass() -> None:
    lm = random_lm()
    request = _requests(Decoder(lm), ["which letter?"])[0]
    for prefix in ((), (9, 4)):
        choices = [(*prefix, token) for token in (40, 41, 42, 43)]
        decoder, one = Decoder(lm), Decoder(lm)
        scores = decoder.score([request] * 4, choices)
        one.score([request], choices[:1])
        assert decoder.cost == one.cost
        for choice, score in zip(choices, scores, strict=True):
            (alone,) = Decoder(lm).score([request], [choice])
            assert score.logprobs == pytest.approx(alone.logprobs, abs=1e-10)
            assert score.greedy == alone.greedy


def test_a_single_token_after_unshared_prompts_keeps_no_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = random_lm()
    decoder = Decoder(lm)
    requests = [decoder.prepare(t, Plan((Stream(Prompt(ToyTemplate(), t)),)), 2) for t in ("red", "blue")]
    caches = []
    hidden = lm.hidden
    monkeypatch.setattr(lm, "hidden", lambda ids, **given: caches.append(given["cache"]) or hidden(ids, **given))
    decoder.score(requests, [(5,), (6,)])
    assert caches == [None]


@pytest.mark.parametrize("texts", [["red", "a much longer question"], TEXTS], ids=["apart", "alike"])
def test_early_exits_are_read_at_each_prompts_last_token(texts: list[str]) -> None:
    lm = random_lm()
    decoder = Decoder(lm)
    start = SHOTS if texts is TEXTS else ""
    requests = [decoder.prepare(t, DoLa().plan(replace(_example(0), text=start + t), None, None), 4) for t in texts]
    one = decoder.score(requests, [(5,)] * len(texts))
    two = decoder.score(requests, [(5, 6)] * len(texts))
    for request, short, long in zip(requests, one, two, strict=True):
        (alone,) = decoder.score([request], [(5,)])
        assert short.logprobs == pytest.approx(alone.logprobs, abs=1e-10)
        assert short.logprobs == pytest.approx(long.logprobs[:1], abs=1e-10)


def _example(i: int, choices: tuple[str, ...] = ("no", "yes", "perhaps")) -> Example:
    history = tuple(HistoryItem(f"{i}.{j}", {"text": f"note {j} of {i}"}, f"note {j}") for j in range(3))
    return Example(str(i), User(f"u{i}", history), f"question {i}?", f"{i}", ToyTemplate(), choices)


def test_the_response_is_the_most_likely_choice() -> None:
    lm = random_lm()
    system = ModelSystem(lm, CAD(), Generation(4), batching=Batching(3))
    examples = [_example(i) for i in range(5)]
    samples = {sample.id: sample for sample in system.respond(examples)}
    scores = system.score(examples, [example.choices for example in examples])
    for example, scored in zip(examples, scores, strict=True):
        sums = [sum(score.logprobs) for score in scored]
        sample = samples[example.id]
        assert sample.response == example.choices[int(np.argmax(sums))]
        assert sample.extra["logprobs"] == pytest.approx(sums, abs=1e-10)
        assert (sample.finish, sample.new_tokens, sample.history_items) == ("choice", 0, 3)


def test_choices_that_are_all_ruled_out_are_a_failure_not_the_first_choice() -> None:
    lm, example = random_lm(), _example(0)
    (kept,) = ModelSystem(lm, DoLa(relative_top=0.0), Generation(4)).respond([example])
    assert kept.response in example.choices and kept.error is None
    (ruled_out,) = ModelSystem(lm, DoLa(relative_top=1.0), Generation(4)).respond([example])
    assert ruled_out.response is None
    assert ruled_out.error is not None and "relative_top=0" in ruled_out.error


def test_choices_and_generated_responses_may_stand_in_one_batch() -> None:
    lm = random_lm()
    examples = [_example(0), _example(1, ()), _example(2), _example(3, ())]
    together = {s.id: s for s in ModelSystem(lm, CAD(), Generation(4), batching=Batching(4)).respond(examples)}
    for example in examples:
        (alone,) = ModelSystem(lm, CAD(), Generation(4)).respond([example])
        assert replace(alone, extra={}) == replace(together[example.id], extra={})


class _Masked(Plain):
    """Masks heads with a given strength."""

    def plan(self, example: Example, shared: Fitted | None, personal: Fitted | None) -> Plan:
        scale = 1.0 if shared is None else 0.0
        edits = (ScaleHeads(0, ((0, scale), (1, scale)), 8, DECODE),)
        return Plan((Stream(example.prompt()), Stream(example.prompt(), edits)), Contrast(0.5))


def test_a_method_that_moves_no_choice_is_caught() -> None:
    lm = random_lm()
    examples = [_example(i) for i in range(6)]
    for shared, nothing in ((None, True), (Fitted(), False)):
        system = ModelSystem(lm, _Masked(), Generation(4), shared=shared)
        responses = {sample.id: sample.response or "" for sample in system.respond(examples)}
        effect = system.effect(examples, [responses[example.id] for example in examples])
        assert effect is not None and effect.nothing("float64") == nothing
        assert effect.identical == 1 or not nothing


def test_the_comparison_with_the_base_gives_what_two_separate_readings_and_a_generation_give() -> None:
    lm = random_lm()
    for method, choices in ((CAD(), ()), (_Masked(), ()), (RAG(), ()), (CAD(), ("yes", "no"))):
        examples = [replace(_example(i), choices=choices) for i in range(6)]
        system = ModelSystem(lm, method, Generation(5))
        responses = [sample.response or "" for sample in sorted(system.respond(examples), key=lambda s: s.id)]
        effect = system.effect(examples, responses)
        kl, changed, tokens, same = 0.0, 0, 0, 0
        for example, response in zip(examples, responses, strict=True):
            plan = method.plan(example, None, None)
            bare = plan.streams[0].bare() if plan.changes else Stream(example.prompt())
            base = Plan((bare, *plan.streams[1:])) if plan.changes else Plan((bare,))
            ids = system._answer_ids(example, response)[: None if choices else 5]
            decoder = Decoder(lm)
            (p,), (q,) = (decoder.distributions([decoder.prepare("", one, 5)], [ids]) for one in (plan, base))
            kl += float((p.exp() * (p - q)).sum())
            changed += int((p.argmax(-1) != q.argmax(-1)).sum())
            tokens += len(ids)
            if choices:
                asked = [decoder.prepare("", base, 5)] * 2
                scores = decoder.score(asked, [system._answer_ids(example, text) for text in choices])
                same += choices[int(sum(scores[1].logprobs) > sum(scores[0].logprobs))] == response
            else:
                same += decoder.generate([decoder.prepare("", base, 5)], max_new_tokens=5)[0].text == response
        assert effect is not None and effect.kl_nats == pytest.approx(kl / tokens, rel=1e-9)
        assert (effect.changed_tokens, effect.identical) == (changed / tokens, same / 6)


def test_examples_that_are_alike_run_next_to_each_other() -> None:
    lm = random_lm()
    examples = [_example(i) for i in range(4)]
    examples = [replace(example, text="x" * (10 * i + 1)) for i, example in enumerate(examples)]
    system = ModelSystem(lm, Plain(), Generation(4), batching=Batching(2))
    list(system.respond(examples, alike=lambda example: "odd" if int(example.id) % 2 else "even"))
    assert system.batching.planned == [["3", "1"], ["2", "0"]]


@pytest.mark.parametrize("edits", [(), (ScaleHeads(1, ((0, 0.0),), 8, DECODE),), (ScaleHeads(1, ((0, 0.0),), 8, ALL),)])
def test_a_beginning_that_batches_share_runs_once_and_every_bit_is_as_if_it_ran_again(monkeypatch, edits):
    lm = random_lm()
    one, ran = Decoder(lm), []

    def spied(self, ids, *rest, keep=slice(None), run=Pass.run, **named):
        ran.extend([ids.shape] if keep == slice(0) else [])
        return run(self, ids, *rest, keep=keep, **named)

    monkeypatch.setattr(Pass, "run", spied)
    asked = [_requests(one, [f"{n} question", f"{n + 1} other"], [edits, edits]) for n in (1, 3, 5)]
    answers = [tuple(lm.encoder.answer(text, "")) for text in ("yes", "no")]
    together = [one.score(requests, answers) for requests in asked]
    generated = one.generate(asked[0], max_new_tokens=3)
    runs, cost = len(ran), one.cost
    apart = []
    alone = [Decoder(lm) for _ in asked]
    for decoder, requests in zip(alone, asked, strict=True):
        apart.append(decoder.score(requests, answers))
    assert together == apart
    assert generated == alone[0].generate(asked[0], max_new_tokens=3)
    assert cost.flops == sum(decoder.cost.flops for decoder in alone)
    assert cost.forward_passes == sum(decoder.cost.forward_passes for decoder in alone)
    touched = bool(edits) and edits[0].where is ALL
    assert (runs, len(ran) - runs) == ((4, 4) if touched else (1, 3))
