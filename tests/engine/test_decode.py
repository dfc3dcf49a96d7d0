"""The engine: rows of one batch may carry different prompts, edits and adapters, and each equals the row alone."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from harness.data import Prompt
from harness.edits import AddVector, ClampTo, LowRankShift, ProjectOut, Replace, ScaleHeads, ScaleQueries
from harness.engine.cache import RoomyLayer
from harness.engine.decode import Decoder
from harness.engine.encoder import Encoder
from harness.engine.model import LanguageModel
from harness.engine.prompt_variants import score_variants
from harness.engine.rows import Request
from harness.engine.sites import FAMILIES, Sites
from harness.errors import ContextTooLong, UnsupportedModel, UsageError
from harness.mix import Contrast, EntropyContrast
from harness.plan import (
    ALL,
    ALL_BUT_BOS,
    DECODE,
    GENERATED,
    LAST_PROMPT,
    PROMPT,
    At,
    Edit,
    Exit,
    FirstLast,
    Layout,
    LoRA,
    Part,
    Plan,
    Sampling,
    Site,
    Stream,
    Text,
)
from harness.run.contract import ToyTemplate, random_lm, toy_examples

WINDOWED = {
    "mistral": {"sliding_window": 12},
    "qwen2": {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    "gemma3_text": {"sliding_window": 12},
}
MODELS = [(family, {}) for family in FAMILIES] + list(WINDOWED.items())


def _id(value: object) -> str:
    return str(value)


@pytest.fixture(params=MODELS, ids=_id, scope="module")
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    family, config = request.param
    return random_lm(family, **config)


def _request(decoder: Decoder, key: str, text: str, edits: tuple[Edit, ...] = (), **kwargs: object) -> Request:
    return decoder.prepare(key, Plan((Stream(Prompt(ToyTemplate(), text), edits),), **kwargs), 8)  # type: ignore[arg-type]


def _vector(lm: LanguageModel, seed: int) -> torch.Tensor:
    return torch.randn(lm.sites.width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _assorted_edits(lm: LanguageModel) -> list[tuple[Edit, ...]]:
    sites, v = lm.sites, _vector(lm, 1)
    rotation, _ = torch.linalg.qr(torch.randn(sites.width, 2, dtype=torch.float64))
    weight, bias = torch.randn(2, sites.width, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    return [
        (),
        (ScaleHeads(0, ((1, 0.0), (3, 0.5)), sites.head_dim),),
        (ScaleQueries(1, ((0, 0.0),), sites.head_dim, ALL),),
        (AddVector(Site(2, "block_out"), v, 2.0, ALL_BUT_BOS), AddVector(Site(2, "block_out"), v, -1.0, GENERATED)),
        (AddVector(Site(1, "block_in"), v, 1.0, LAST_PROMPT), ProjectOut(Site(1, "block_in"), v, 1.0, PROMPT)),
        (ClampTo(Site(0, "mlp_out"), v, 1.5, FirstLast(2, 3)),),
        (LowRankShift(Site(1, "attn_out"), rotation.T, weight, bias, At((1, -2))),),
        (Replace(Site(1, "block_out"), torch.randn(4, sites.width, dtype=torch.float64), At((2, 3)), start=2),),
        (ProjectOut(Site(0, "block_out"), v), ScaleHeads(0, ((2, 0.0),), sites.head_dim, ALL)),
    ]


def test_a_row_equals_the_row_alone_whatever_its_neighbours_edits(lm: LanguageModel) -> None:
    decoder = Decoder(lm)
    requests = [_request(decoder, str(i), "abc " * (1 + 2 * i), edits) for i, edits in enumerate(_assorted_edits(lm))]
    together = decoder.generate(requests, max_new_tokens=8)
    for request, answer in zip(requests, together, strict=True):
        (alone,) = decoder.generate([request], max_new_tokens=8)
        assert alone.ids == answer.ids
        assert np.allclose(alone.logprobs, answer.logprobs, atol=1e-10, rtol=0)
    scored = decoder.score(requests, [a.ids for a in together])
    for answer, score in zip(together, scored, strict=True):
        assert np.allclose(answer.logprobs, score.logprobs, atol=1e-10, rtol=0)


def test_every_edit_changes_the_output(lm: LanguageModel) -> None:
    decoder = Decoder(lm)
    bare = _request(decoder, "bare", "one")
    (answer,) = decoder.generate([bare], max_new_tokens=8)
    (base,) = decoder.distributions([bare], [answer.ids])
    for edits in _assorted_edits(lm)[1:]:
        (edited,) = decoder.distributions([_request(decoder, "x", "one", edits)], [answer.ids])
        assert (edited - base).abs().max() > 1e-6, edits


def test_a_prompt_of_one_token_decodes_like_any_other(lm: LanguageModel) -> None:
    decoder = Decoder(lm)
    one = dataclasses.replace(_request(decoder, "one", "x"))
    encoded = dataclasses.replace(one.prompts[0].encoded, ids=(5,), offsets=())
    one = Request("one", one.plan, (dataclasses.replace(one.prompts[0], encoded=encoded),))
    twin = Request("two", Plan((one.plan.streams[0],) * 2, Contrast(0.3)), one.prompts * 2)
    long = _request(decoder, "long", "many words here")
    together = decoder.generate([one, long, twin], max_new_tokens=6)
    for request, answer in zip([one, long, twin], together, strict=True):
        (alone,) = decoder.generate([request], max_new_tokens=6)
        assert alone.ids == answer.ids
        assert np.allclose(alone.logprobs, answer.logprobs, atol=1e-10, rtol=0)


def test_streams_that_differ_in_decode_edits_only_share_the_prefill() -> None:
    lm = random_lm()
    heads = (ScaleHeads(1, ((0, 0.0),), lm.sites.head_dim, DECODE),)
    prompt = Prompt(ToyTemplate(), "shared words")
    plan = Plan((Stream(prompt), Stream(prompt, heads)), Contrast(0.5))
    decoder = Decoder(lm)
    request = decoder.prepare("a", plan, 4)
    decoder.generate([request], max_new_tokens=1)
    assert decoder.cost.prefill_tokens == request.tokens - 1 + 2
    assert decoder.cost.edits_prefill == 0
    assert decoder.cost.edits_decode == 1

    everywhere = Plan((Stream(prompt), Stream(prompt, (dataclasses.replace(heads[0], where=ALL),))), Contrast(0.5))
    decoder = Decoder(lm)
    decoder.generate([decoder.prepare("a", everywhere, 4)], max_new_tokens=1)
    assert decoder.cost.prefill_tokens == 2 * request.tokens
    assert decoder.cost.edits_prefill == request.tokens - 1


@pytest.mark.parametrize("where", [DECODE, ALL, LAST_PROMPT, At((4, 7))], ids=_id)
def test_packed_variants_equal_each_variant_alone(lm: LanguageModel, where: object) -> None:
    sites = lm.sites
    variants: list[tuple[Edit, ...]] = [()]
    for layer in range(sites.layers):
        for head in range(sites.heads):
            variants.append((ScaleHeads(layer, ((head, 0.0),), sites.head_dim, where),))  # type: ignore[arg-type]
    variants.append((ScaleQueries(1, ((1, 0.0),), sites.head_dim, where), ScaleHeads(2, ((0, 0.0),), sites.head_dim)))  # type: ignore[arg-type]
    decoder = Decoder(lm)
    request = _request(decoder, "x", "a prompt that is longer than the window of twelve")
    answer = lm.encoder.answer("an answer", request.plan.streams[0].prompt.render())
    packed = score_variants(lm, request.prompts[0].encoded, answer, variants)
    for row, edits in zip(packed, variants, strict=True):
        (alone,) = decoder.score([_request(decoder, "x", request.plan.streams[0].prompt.text, edits)], [answer])
        assert np.allclose(row.numpy(), alone.logprobs, atol=1e-10, rtol=0), edits


def test_a_block_whose_attention_is_given_is_left_as_found(lm: LanguageModel) -> None:
    attention, heads = lm.sites.attention(1), torch.zeros(1, 3, lm.sites.heads * lm.sites.head_dim, dtype=torch.float64)
    with contextlib.suppress(ZeroDivisionError), lm.sites.attended(1, heads):
        assert "forward" in vars(attention)
        raise ZeroDivisionError
    assert "forward" not in vars(attention)


@pytest.mark.parametrize("part", ["block_in", "queries", "heads_out", "mlp_out", "block_out"])
def test_variants_of_long_tails_equal_each_variant_alone(lm: LanguageModel, part: Part) -> None:
    decoder = Decoder(lm)
    request = _request(decoder, "x", "a prompt that is longer than the window of twelve")
    answer = lm.encoder.answer("an answer", request.plan.streams[0].prompt.render())
    width = lm.sites.width if part not in ("queries", "heads_out") else lm.sites.heads * lm.sites.head_dim
    vector = torch.randn(width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    edits = [AddVector(Site(layer, part), vector, 1.0, At((at,))) for layer in range(lm.sites.layers) for at in (3, -1)]
    rows = score_variants(lm, request.prompts[0].encoded, answer, [(edit,) for edit in edits] + [tuple(edits)])
    for row, some in zip(rows, [*((edit,) for edit in edits), tuple(edits)], strict=True):
        (alone,) = decoder.score([_request(decoder, "x", request.plan.streams[0].prompt.text, some)], [answer])
        assert np.allclose(row.numpy(), alone.logprobs, atol=1e-10, rtol=0), some


def test_masking_all_heads_of_a_block_removes_what_attention_adds() -> None:
    lm = random_lm()
    sites, decoder = lm.sites, Decoder(lm)
    zero = ScaleHeads(1, tuple((h, 0.0) for h in range(sites.heads)), sites.head_dim, ALL)
    gone = Replace(Site(1, "attn_out"), torch.zeros(1, sites.width, dtype=torch.float64), ALL)
    a, b = (_request(decoder, "x", "some words", (edit,)) for edit in (zero, gone))
    (p,), (q,) = (decoder.distributions([r], [(5, 6, 7)]) for r in (a, b))
    assert torch.allclose(p, q, atol=1e-12)


def test_a_vector_added_and_subtracted_steers_nothing() -> None:
    lm = random_lm()
    site, v, decoder = Site(1, "block_out"), _vector(lm, 3), Decoder(lm)
    both = _request(decoder, "x", "some words", (AddVector(site, v, 1.0), AddVector(site, -v, 1.0)))
    (p,), (q,) = (decoder.distributions([r], [(5, 6)]) for r in (both, _request(decoder, "x", "some words")))
    assert torch.allclose(p, q, atol=1e-12)


def test_an_edit_of_minus_infinity_times_zero_leaves_no_nan() -> None:
    run = ScaleHeads.bind([ScaleHeads(0, ((0, 0.0),), 2)], torch.zeros(1))
    out = run(torch.tensor([[[float("-inf"), float("inf"), 1.0, 2.0]]]))
    assert out.tolist() == [[[0.0, 0.0, 1.0, 2.0]]]


def test_adapters_differ_by_row_and_are_never_merged() -> None:
    lm = random_lm()
    name = "model.layers.1.self_attn.q_proj"
    module = lm.model.get_submodule(name)
    before = module.weight.clone()

    def lora(seed: int, rank: int) -> LoRA:
        g = torch.Generator().manual_seed(seed)
        down = torch.randn(rank, module.in_features, dtype=torch.float64, generator=g)
        up = torch.randn(module.out_features, rank, dtype=torch.float64, generator=g)
        return LoRA(str(seed), {name: (down, up)}, scale=0.5)

    decoder = Decoder(lm)
    stacks = [(), (lora(1, 2),), (lora(2, 4), lora(1, 2))]
    prompts = [Prompt(ToyTemplate(), text) for text in ("short", "a longer text", "short")]
    requests = [
        decoder.prepare(str(i), Plan((Stream(p, adapters=s),)), 4)
        for i, (p, s) in enumerate(zip(prompts, stacks, strict=True))
    ]
    together = decoder.distributions(requests, [(7, 8, 9)] * 3)
    for stack, request, logp in zip(stacks, requests, together, strict=True):
        with torch.no_grad():
            for adapter in stack:
                down, up = adapter.weights[name]
                module.weight += adapter.scale * up @ down
        bare = Request("m", Plan((dataclasses.replace(request.plan.streams[0], adapters=()),)), request.prompts)
        (merged,) = decoder.distributions([bare], [(7, 8, 9)])
        with torch.no_grad():
            module.weight.copy_(before)
        assert torch.allclose(logp, merged, atol=1e-10)


def test_an_exit_at_the_last_block_through_the_final_norm_is_the_models_own_output() -> None:
    lm = random_lm()
    last = Exit(Site(lm.sites.layers - 1, "block_out"))

    @dataclasses.dataclass(frozen=True)
    class FromExit:
        def __call__(self, outputs):
            return outputs[0].exits[0].log_softmax(-1)

    decoder = Decoder(lm)
    prompt = Prompt(ToyTemplate(), "read early")
    early = decoder.prepare("a", Plan((Stream(prompt, exits=(last,)),), FromExit()), 4)
    plain = decoder.prepare("a", Plan((Stream(prompt),)), 4)
    (a,), (b,) = (decoder.generate([r], max_new_tokens=4) for r in (early, plain))
    assert a.ids == b.ids
    (p,), (q,) = (decoder.distributions([r], [a.ids]) for r in (early, plain))
    assert torch.allclose(p, q, atol=1e-12)


def test_greedy_generation_equals_the_models_own_generate(lm: LanguageModel) -> None:
    decoder = Decoder(lm)
    request = _request(decoder, "x", "compare with transformers")
    (ours,) = decoder.generate([request], max_new_tokens=12)
    ids = torch.tensor([request.prompts[0].encoded.ids])
    theirs = lm.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=1, pad_token_id=2
    )
    assert list(ours.ids) == theirs[0, ids.shape[1] :].tolist()


def test_sampling_noise_depends_on_seed_sample_and_step_only() -> None:
    lm = random_lm()
    decoder = Decoder(lm)
    hot = Sampling(temperature=1.5, top_k=40, top_p=0.9, seed=7)
    requests = [_request(decoder, f"s{i}", "word " * (i + 1)) for i in range(5)]
    together = decoder.generate(requests, max_new_tokens=10, sampling=hot)
    (alone,) = decoder.generate([requests[3]], max_new_tokens=10, sampling=hot)
    assert together[3].ids == alone.ids
    other = decoder.generate(requests, max_new_tokens=10, sampling=dataclasses.replace(hot, seed=8))
    assert [a.ids for a in other] != [a.ids for a in together]
    cold = decoder.generate(requests, max_new_tokens=10, sampling=Sampling(temperature=1e-3))
    greedy = decoder.generate(requests, max_new_tokens=10)
    assert [a.ids for a in cold] == [a.ids for a in greedy]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_top_k_one_is_greedy_and_a_small_top_p_keeps_the_best_token(dtype: torch.dtype) -> None:
    lm = random_lm(dtype=dtype)
    decoder = Decoder(lm)
    requests = [_request(decoder, "a", "first"), _request(decoder, "b", "second one")]
    greedy = [a.ids for a in decoder.generate(requests, max_new_tokens=6)]
    for sampling in (Sampling(2.0, top_k=1), Sampling(1.0, top_p=1e-9), Sampling(1.0, top_p=1e-300)):
        assert [a.ids for a in decoder.generate(requests, max_new_tokens=6, sampling=sampling)] == greedy


ROPE = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LONG = ROPE | {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("family", "config", "named"),
    [
        (
            "llama",
            {"rope_parameters": LONG},
            "rope_type 'longrope' is not supported: a row would be computed with other",
        ),
        ("llama", {"rope_scaling": {"type": "su", "factor": 4.0}}, "rope_type 'su' is not supported: unknown"),
        ("qwen3", {"rope_parameters": LONG | {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6}}, "longrope"),
        (
            "gemma3_text",
            {"final_logit_softcapping": 30.0},
            "final_logit_softcapping=30.0 of config.json is not supported",
        ),
        (
            "gemma3_text",
            {"attn_logit_softcapping": 50.0},
            "attn_logit_softcapping=50.0 of config.json is not supported",
        ),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True of config.json"),
    ],
)
def test_a_model_whose_rows_depend_on_each_other_or_whose_logits_are_others_is_refused(family, config, named) -> None:
    with pytest.raises(UnsupportedModel, match=re.escape(named)):
        random_lm(family, **config)


OF_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("rope_type", sorted({*ROPE_INIT_FUNCTIONS, "default"} - {"longrope"}))
def test_a_row_beside_a_longer_one_has_its_own_frequencies(rope_type: str, family: str) -> None:
    """Of every kind that transformers knows; of Gemma's that of its full attention."""
    rope: dict[str, Any] = {**ROPE, **(OF_LLAMA3 if rope_type == "llama3" else {}), "rope_type": rope_type}
    if family == "gemma3_text":
        rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    decoder = Decoder(random_lm(family, rope_parameters=rope))
    long, short = _request(decoder, "a", "word " * 90), _request(decoder, "b", "short")
    assert long.tokens > 400
    (alone,) = decoder.generate([short], max_new_tokens=6)
    for requests in ([long, short], [short]):  # also after the long one
        answer = decoder.generate(requests, max_new_tokens=6)[-1]
        assert answer.ids == alone.ids
        assert np.allclose(answer.logprobs, alone.logprobs, atol=1e-8)


def test_the_norms_of_a_float64_model_compute_in_float64(lm: LanguageModel) -> None:
    narrow = random_lm(lm.model.config.model_type, dtype=torch.float32)
    x = torch.randn(2, 5, lm.sites.width, dtype=torch.float64)
    norm, own = lm.sites.final_norm, narrow.sites.final_norm
    for weights in (norm, own):
        torch.nn.init.constant_(weights.weight, 0.7)
    exact = norm(x)
    assert exact.dtype == torch.float64
    assert torch.allclose(exact, own(x.float()).double(), atol=1e-5)
    assert not torch.equal(exact, exact.float().double())
    assert torch.allclose(norm(x * (1 + 1e-12)), exact, atol=1e-13)
    assert "Wide" not in type(own).__name__


def test_a_stop_string_of_special_tokens_ends_an_answer_though_answers_never_show_them() -> None:
    lm = random_lm()
    lm.encoder.tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    encoder = Encoder(lm.encoder.tokenizer)
    (turn,) = encoder.special_ids - {*lm.encoder.special_ids}
    ids = [*encoder.tokenizer.encode("ab", add_special_tokens=False), turn]
    more = [*ids, *encoder.tokenizer.encode("cd", add_special_tokens=False)]
    assert encoder.decode(more) == "abcd"
    assert encoder.before(ids[:2], ["<|turn|>"]) is None
    assert encoder.before(ids, ["<|turn|>"]) == encoder.before(more, ["<|turn|>"]) == "ab"
    assert encoder.before(more, ["b<|turn|>c"]) == encoder.before(more, ["bc"]) == "a"
    assert encoder.before(more, ["<|turn|>", "b"]) == "a"
    assert encoder.before([turn, *more], ["<|turn|>"]) == ""
    assert encoder.before(more, ["d"]) == "abc"


def test_generation_stops_on_any_end_id_and_on_stop_strings() -> None:
    lm = random_lm()
    decoder = Decoder(lm)
    request = _request(decoder, "x", "stop here")
    (free,) = decoder.generate([request], max_new_tokens=10)
    lm.encoder.eos_ids = lm.encoder.eos_ids | {free.ids[3]}
    (ended,) = decoder.generate([request], max_new_tokens=10)
    first = free.ids.index(free.ids[3])
    assert ended.ids == free.ids[: first + 1]
    assert ended.finish == "stop"
    lm.encoder.eos_ids = frozenset({1})
    letter = free.text[4]
    (cut,) = decoder.generate([request], max_new_tokens=10, stop=[letter])
    assert cut.text == free.text[: free.text.index(letter)]
    assert cut.finish == "stop"


def test_where_splits_a_row_into_prompt_and_decode() -> None:
    layout = Layout(prompt_len=5, bos=True, offsets=((0, 0), (0, 3), (3, 4), (4, 7), (7, 9)), text="the cat is")
    at = np.arange(8)

    def hit(where: object) -> list[int]:
        return at[where(at, layout)].tolist()  # type: ignore[operator]

    assert hit(ALL) == list(range(8))
    assert sorted(hit(PROMPT) + hit(DECODE)) == hit(ALL)
    assert hit(DECODE) == [4, 5, 6, 7]
    assert hit(LAST_PROMPT) == [4]
    assert hit(GENERATED) == [5, 6, 7]
    assert hit(ALL_BUT_BOS) == [1, 2, 3, 4, 5, 6, 7]
    assert hit(FirstLast(1, 2)) == [0, 3, 4]
    assert hit(At((0, -1, 6))) == [0, 4, 6]
    assert hit(Text("cat")) == [3]


def test_a_query_that_does_not_fit_is_an_error_and_history_is_dropped_before_it() -> None:
    lm = random_lm(max_position_embeddings=64)
    decoder = Decoder(lm)
    item = toy_examples(1, seed=3)[0].example
    long = dataclasses.replace(item, text="y" * 40)
    prompt = long.prompt(item.user.history)
    request = decoder.prepare("x", Plan((Stream(prompt),)), 8)
    assert request.prompts[0].items + request.prompts[0].dropped == len(item.user.history)
    assert request.prompts[0].dropped > 0
    assert "y" * 40 in request.prompts[0].encoded.text
    assert request.tokens <= 64 - 8
    with pytest.raises(ContextTooLong, match="never cut"):
        decoder.prepare("x", Plan((Stream(dataclasses.replace(prompt, text="y" * 80)),)), 8)


def test_an_unknown_family_names_the_supported_ones_and_the_file_to_extend() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("opt", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16)
    with pytest.raises(UnsupportedModel, match=r"'opt'.*llama.*harness/sites\.py"):
        Sites(AutoModelForCausalLM.from_config(config))


def test_a_block_that_does_not_exist_is_named() -> None:
    lm = random_lm()
    with pytest.raises(UsageError, match="block 9 does not exist; this model has blocks 0 to 2"):
        lm.sites.check(Site(9, "block_out"))


def test_contrast_by_hand_on_three_tokens() -> None:
    from harness.plan import StreamOutput

    expert = torch.tensor([[[1.0, 0.0, -1.0]]], dtype=torch.float64)
    amateur = torch.tensor([[[0.0, 0.0, 1.0]]], dtype=torch.float64)
    outputs = [StreamOutput(expert), StreamOutput(amateur)]
    by_hand = torch.tensor([1.5, 0.0, -2.0], dtype=torch.float64)  # 1.5 * expert - 0.5 * amateur
    assert torch.allclose(Contrast(0.5)(outputs)[0, 0].exp(), by_hand.exp() / by_hand.exp().sum())
    assert torch.equal(Contrast(0.0)(outputs), expert.log_softmax(-1))

    p = expert[0, 0].softmax(-1)
    weight = -(p * p.log()).sum()
    entropy = (1 + weight) * expert[0, 0] - weight * amateur[0, 0]
    assert torch.allclose(EntropyContrast()(outputs)[0, 0], entropy.log_softmax(-1))
    capped = 1.25 * expert[0, 0] - 0.25 * amateur[0, 0]
    assert torch.allclose(EntropyContrast(cap=0.25)(outputs)[0, 0], capped.log_softmax(-1))


def test_a_masked_token_of_minus_infinity_survives_every_mix() -> None:
    from harness.plan import StreamOutput

    expert = torch.tensor([[[1.0, float("-inf"), 0.0]]])
    for mix in (Contrast(0.0), Contrast(0.5), EntropyContrast(), EntropyContrast(strength=0.0)):
        out = mix([StreamOutput(expert), StreamOutput(torch.zeros(1, 1, 3))])
        assert not out.isnan().any()
        assert out[0, 0, 1] == float("-inf")


def test_streams_of_unlike_length_are_prefilled_apart_and_answer_the_same(lm):
    decoder = Decoder(lm)
    request, other = _request(decoder, "0", "abc " * 15), _request(decoder, "1", "x y")
    assert request.tokens > 2 * other.tokens + 16
    before = decoder.cost.prefill_tokens
    together = decoder.generate([request, other, request], max_new_tokens=6)
    spent = decoder.cost.prefill_tokens - before
    # the repeated prompt runs once but for its last token, which every row runs; padding is not counted
    assert spent == request.tokens - 1 + other.tokens - 1 + 3
    for made, alone in zip(together, (request, other, request), strict=True):
        assert made.ids == decoder.generate([alone], max_new_tokens=6)[0].ids


def test_a_roomy_cache_refuses_more_than_it_reserved():
    part = torch.zeros(1, 2, 3, 4)
    layer = RoomyLayer(part, part.clone(), 2)
    layer.update(part[:, :, :1] + 1, part[:, :, :1] + 2)
    assert layer.keys[0, 0, 2, 0] == 1
    with pytest.raises(RuntimeError, match="room for 3"):
        layer.update(part[:, :, :1], part[:, :, :1])
