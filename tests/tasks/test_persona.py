"""Persona tasks ask what trait files say, vectors are differences of means, and clamps take them out again."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from harness.data import Example, Prompt, User
from harness.engine.capture import capture, pooled
from harness.engine.decode import Decoder
from harness.engine.model import LanguageModel
from harness.errors import DataMissing, HarnessError, UsageError
from harness.fit.artifacts import ArtifactStore
from harness.fit.difference_vectors import Pair
from harness.fit.extraction import POOLINGS, Extraction, _WholePrompt, by_length, contrast, passes
from harness.fit.kit import ModelKit
from harness.method import Fitted
from harness.methods.clamp import PEAKS, Clamp, blocks_of
from harness.methods.persona_vector import PersonaVector
from harness.plan import ALL, GENERATED, LAST_PROMPT, Edit, Plan, Site, Stream
from harness.plugins.options import build_method
from harness.plugins.registry import method_class, task_class
from harness.records.store import MethodConfig, find_runs
from harness.run.contract import check_method, random_lm
from harness.task import Question, Rating, Sample, Selection
from harness.tasks.persona import SHIPPED, Persona, PersonaTemplate
from harness.tiny.personas import LEXICONS

RESULTS = Path(__file__).resolve().parents[2] / "results"
SHARED = Path(os.environ.get("HARNESS_SHARED", "../shared/data")).absolute()
needs_traits = pytest.mark.skipif(
    not (SHARED / "persona_traits").is_dir(), reason=f"no persona_traits in {SHARED} (set HARNESS_SHARED)"
)


def _persona(member: str, **options: Any) -> Persona:
    return cast(Persona, task_class(f"persona:{member}")(**options))


# Trait files and the task


@pytest.mark.parametrize("trait", SHIPPED)
def test_the_prompts_of_a_trait_are_english(trait: str) -> None:
    (read,) = _persona(trait).traits
    wrong = r"\b([Aa] [AEIaei]|[Aa]n [^AEIOaeiouh]|[Aa] (Christianity|Hinduism|Judaism|Islam)\b)"
    assert not [text for pair in read.pairs for text in pair if re.search(wrong, text)]


@pytest.mark.parametrize("trait", SHIPPED)
def test_a_shipped_trait_has_ten_pairs_and_twenty_questions_twice_none_of_them_shared(trait: str) -> None:
    (read,) = _persona(trait).traits
    assert read.name in LEXICONS
    assert len({*read.pairs}) == 10 and len({*read.extract}) == len({*read.evaluate}) == 20
    assert not set(read.extract) & set(read.evaluate)
    assert "REFUSAL" in read.rubric and read.rubric.count(read.name) >= 2


@needs_traits
def test_prompts_and_rubrics_are_in_our_own_words() -> None:
    given = " ".join(path.read_text() for path in sorted((SHARED / "persona_traits").rglob("*.json")))
    for member in ("religion", "race"):
        for trait in _persona(member).traits:
            texts = [*(text for pair in trait.pairs for text in pair), *trait.extract, *trait.evaluate]
            assert not [text for text in texts if text in given]
            assert not [line for line in trait.rubric.splitlines() if len(line.split()) > 4 and line in given]


def test_train_items_alternate_between_the_sides_of_a_pair() -> None:
    train = _persona("islam").train_items()
    assert len(train) == 2 * 10 * 20
    positive, negative = train[0], train[1]
    assert (positive.targets, negative.targets) == (("pos", "Islam"), ("neg", "Islam"))
    assert positive.example.text == negative.example.text
    assert positive.example.template != negative.example.template


@pytest.mark.parametrize("method", ["dps", "lora_c"])
def test_a_side_of_a_trait_is_no_answer_to_fit_on(method: str) -> None:
    train = task_class("persona:christianity")().items(Selection(split="train", limit=8))
    assert [item.side for item in train[:2]] == ["pos", "neg"]
    with pytest.raises(UsageError, match=r"no answer.*--fit_task lamp4"):
        build_method(method_class(method), method, None, []).fit(ModelKit(random_lm()), train)


def test_conditions_are_system_prompts_and_rollouts_have_ids_of_their_own() -> None:
    neutral, prompted = (_persona("islam", condition=c, rollouts=2).items(Selection()) for c in ("neutral", "prompted"))
    assert (len(neutral), len(prompted)) == (40, 400)
    assert [message.role for message in neutral[0].example.prompt().render()] == ["user"]  # type: ignore[union-attr]
    assert [message.role for message in prompted[0].example.prompt().render()] == ["system", "user"]  # type: ignore[union-attr]
    assert len({item.example.id for item in prompted}) == 400


def test_the_tune_split_asks_the_questions_of_the_extraction_as_dev_asks_its_own() -> None:
    task = _persona("islam", condition="prompted")
    tune, dev = (task.items(Selection(split=split)) for split in ("tune", "dev"))
    assert len(tune) == len(dev) == 200
    assert {item.example.text for item in tune} == set(task.traits[0].extract)
    assert {item.example.text for item in dev} == set(task.traits[0].evaluate)
    asked = task.to_judge(Sample(tune[30].example.id, "u", response="Yes."))
    assert tune[30].example.text in asked["trait"].prompt


def test_ten_users_are_ten_questions() -> None:
    chosen = _persona("islam", condition="prompted").items(Selection(users=10))
    assert len(chosen) == 100 and {item.example.id.split("/")[2] for item in chosen} == {f"q{n:02}" for n in range(10)}


def test_what_changes_no_vector_is_no_part_of_the_train_split() -> None:
    ids = [[i.example.id for i in _persona("islam", condition=c).train_items()] for c in ("neutral", "prompted")]
    assert ids[0] == ids[1]
    assert {"condition", "pairs", "rollouts"} == Persona.train_ignores


def test_the_judge_reads_the_question_that_was_asked() -> None:
    task = _persona("judaism")
    item = task.items(Selection())[3]
    asked = task.to_judge(Sample(item.example.id, "u", response="With {care}."))
    assert item.example.text in asked["trait"].prompt and "With {care}." in asked["trait"].prompt
    assert (asked["trait"].trait, asked["coherence"].trait) == ("Judaism", None)


def test_an_answer_without_a_rating_is_left_out_and_counted_never_a_zero() -> None:
    task = _persona("islam")
    item = task.items(Selection())[0]
    answered = Sample(item.example.id, item.example.user.id, response="The mosque.")
    rated = replace(answered, ratings={"trait": Rating("rated", 80.0), "coherence": Rating("rated", 90.0)})
    refused = replace(answered, ratings={"trait": Rating("refused"), "coherence": Rating("rated", 70.0)})
    found = task.aggregate([task.grade(sample) for sample in (rated, refused)])
    assert (found["trait"].value, found["trait"].n) == (80.0, 1)
    assert "1 of 2" in found["trait"].note
    assert found["refused"].value == 0.5
    unjudged = task.aggregate([task.grade(answered)])
    assert unjudged["trait"].value is None and "--judge" in unjudged["trait"].note
    assert unjudged["lexicon_share"].value == 0.5


def test_a_file_of_ones_own_is_a_trait(tmp_path: Path) -> None:
    content = {
        "instruction": [{"pos": "Be a pirate.", "neg": "Be plain."}],
        "questions": ["How are you?"],
        "eval_prompt": "Q {question} A {answer}: 0 to 100, or REFUSAL",
    }
    path = tmp_path / "pirate.json"
    path.write_text(json.dumps(content | {"eval_questions": ["Where are you?"]}))
    (trait,) = _persona(str(path)).traits
    assert (trait.key, trait.name, trait.evaluate) == ("pirate", "pirate", ("Where are you?",))
    path.write_text(json.dumps(content))
    with pytest.raises(DataMissing, match="eval_questions"):
        _persona(str(path)).items(Selection())
    path.write_text(json.dumps(content | {"eval_questions": ["How are you?"]}))
    with pytest.raises(DataMissing, match="is in both"):
        _persona(str(path)).items(Selection())
    path.write_text(json.dumps(content | {"eval_questions": ["Where are you?"]}))
    with pytest.raises(UsageError, match="the embedded model knows no pirate"):
        _persona(str(path), prompts="tiny").items(Selection())


WHOLE: dict[str, Any] = {
    "instruction": [{"pos": "Be a pirate.", "neg": "Be plain."}],
    "questions": ["How are you?"],
    "eval_questions": ["Where are you?"],
    "eval_prompt": "Q {question} A {answer}: 0 to 100, or REFUSAL",
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"questions": "How are you?"}, "field questions: Input should be a valid array, found 'How are you"),
        ({"eval_questions": "Where?"}, "field eval_questions: Input should be a valid array, found 'Where"),
        ({"questions": ["a", 5]}, "field questions.1: Input should be a valid string, found 5"),
        ({"questions": []}, "field questions: List should have at least 1 item"),
        ({"instruction": {"pos": "a", "neg": "b"}}, "field instruction: Input should be a valid array"),
        ({"instruction": [{"pos": "a"}]}, "field instruction.0.neg: Field required"),
        ({"instruction": [{"pos": "a", "neg": ["b"]}]}, "field instruction.0.neg: Input should be a valid string"),
        ({"eval_prompt": "Q {question}: 0 to 100"}, "field eval_prompt: .*no {answer} in it"),
        ({"eval_prompt": "A {answer}: 0 to 100"}, "field eval_prompt: .*no {question} in it"),
        ({"eval_prompt": "{question} {answer} {{}"}, "field eval_prompt: .*braces that are no field are doubled"),
        ({"eval_prompt": "{question} {answer.__class__}"}, "field eval_prompt: .*answer.__class__.* is none of its"),
        ({"eval_prompt": None}, "field eval_prompt: Input should be a valid string"),
    ],
)
def test_a_trait_file_of_another_shape_is_refused_naming_the_field(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    path = tmp_path / "pirate.json"
    path.write_text(json.dumps(WHOLE | change))
    with pytest.raises(DataMissing, match=f"pirate.json: {words}") as caught:
        _ = _persona(str(path)).traits
    assert "\n" not in str(caught.value)


@needs_traits
def test_the_two_folders_of_persona_vector_tools_are_read_as_they_are() -> None:
    extract = SHARED / "persona_traits" / "trait_data_extract" / "humorous.json"
    evaluate = SHARED / "persona_traits" / "trait_data_eval" / "humorous.json"
    (trait,) = _persona(str(extract)).traits
    assert list(trait.evaluate) == json.loads(evaluate.read_text())["questions"]


def test_mistakes_name_what_there_is(harness: Callable[[str], Any]) -> None:
    done = harness("run --method plain --task persona:islm")
    assert done.code == 2 and "did you mean 'islam'" in done.error()
    done = harness("run --method plain --task persona:islam --task_set rollouts=3")
    assert "--temperature" in done.error()


# Extraction


def _pairs(count: int = 3) -> list[Pair]:
    def prompt(system: str, question: str) -> Prompt:
        return Prompt(PersonaTemplate(system), question)

    return [
        Pair(prompt("Be loud." * (1 + i), "q" * i), prompt("Be quiet.", "q" * i), (f"t/pos{i}", f"t/neg{i}"), f"q{i}")
        for i in range(count)
    ]


def _kit(tmp_path: Path, lm: LanguageModel | None = None, **options: Any) -> ModelKit:
    return ModelKit(lm or random_lm(), max_new_tokens=6, store=ArtifactStore(tmp_path), **options)


ONCE = Extraction(rollouts=2, paired=False)


def test_batched_padded_means_equal_means_one_by_one(tmp_path: Path) -> None:
    kit = _kit(tmp_path)
    requests = [kit.decoder.prepare(p.ids[0], Plan((Stream(p.positive),)), 6) for p in _pairs()]
    answers = [(20, 30), (40,), (50, 60, 70)]
    sites = [Site(layer, "block_out") for layer in range(3)]
    wheres = [GENERATED, _WholePrompt(), LAST_PROMPT]
    together, norms = pooled(kit.lm, requests, sites, wheres, answers)
    for row, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        (whole,) = capture(kit.lm, [request], sites, ALL, [answer])
        length = request.tokens
        spans = (slice(length, None), slice(1, length), slice(length - 1, length))
        for w, span in enumerate(spans):
            for s, site in enumerate(sites):
                torch.testing.assert_close(together[row, w, s], whole[site][span].mean(0).float())
                torch.testing.assert_close(norms[row, w, s], whole[site][span].norm(dim=-1).mean().float())


def test_swapped_labels_give_the_negative_vector(tmp_path: Path) -> None:
    pairs = _pairs()
    swapped = [Pair(p.negative, p.positive, (p.ids[1], p.ids[0]), p.user) for p in pairs]
    kit = _kit(tmp_path)
    one, other = (contrast(kit, {"t": given}, ONCE) for given in (pairs, swapped))
    for pooling in POOLINGS:
        vector = one.tensors[f"t.{pooling}.vector"]
        assert vector.shape == (3, 32) and vector.dtype == torch.float32
        torch.testing.assert_close(vector, -other.tensors[f"t.{pooling}.vector"])
        assert not torch.allclose(vector, one.tensors[f"t.{pooling}.shuffled"])


def test_a_prompt_has_one_bos_and_the_mean_over_it_leaves_the_bos_out(tmp_path: Path) -> None:
    kit = _kit(tmp_path)
    request = kit.decoder.prepare("a", Plan((Stream(_pairs()[2].positive),)), 6)
    encoded = request.prompts[0].encoded
    assert encoded.ids.count(0) == 1 and encoded.bos
    import numpy as np

    positions = np.arange(-2, request.tokens + 3)
    assert positions[_WholePrompt()(positions, encoded.layout())].tolist() == list(range(1, request.tokens))


def test_rollouts_depend_on_the_seed_and_their_item_alone(tmp_path: Path) -> None:
    both = contrast(_kit(tmp_path / "a"), {"t": _pairs(3)}, ONCE)
    again = contrast(_kit(tmp_path / "b"), {"t": _pairs(3)}, ONCE)
    other = contrast(_kit(tmp_path / "c", seed=1), {"t": _pairs(3)}, ONCE)
    key = "t.response.vector"
    assert torch.equal(both.tensors[key], again.tensors[key])
    assert not torch.equal(both.tensors[key], other.tensors[key])


def test_answers_are_kept_so_that_a_killed_extraction_generates_none_of_them_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = random_lm()
    lm.revision = "r1"
    first = contrast(_kit(tmp_path, lm), {"t": _pairs()}, ONCE)
    monkeypatch.setattr(Decoder, "generate", lambda *_, **__: pytest.fail("generated again"))
    again = contrast(_kit(tmp_path, lm), {"t": _pairs()}, ONCE)
    assert torch.equal(first.tensors["t.response.vector"], again.tensors["t.response.vector"])


@pytest.mark.parametrize(
    ("trait", "coherence", "side", "kept"),
    [
        (50, 50, 0, True),
        (49, 90, 0, False),
        (90, 49, 0, False),
        (49, 50, 1, True),
        (50, 90, 1, False),
        (None, 90, 1, False),
    ],
)
def test_the_filter_keeps_coherent_answers_that_show_their_side(
    trait: float | None, coherence: float, side: int, kept: bool
) -> None:
    rated = {"trait": Rating("rated" if trait else "refused", trait), "coherence": Rating("rated", coherence)}
    assert passes(rated, side, Extraction()) is kept


def test_a_pair_goes_out_whole_and_the_yield_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rate(self: ModelKit, judge: str, samples: list[Sample]) -> list[dict[str, Rating]]:
        scores = [90.0 if "pos" in sample.id else 60.0 if sample.id == "t/neg1" else 10.0 for sample in samples]
        same = Rating("rated", 90.0, key="same", input_tokens=100, output_tokens=1)
        return [
            {"trait": Rating("rated", s, key=sample.id, input_tokens=7, output_tokens=2), "coherence": same}
            for sample, s in zip(samples, scores, strict=True)
        ]

    monkeypatch.setattr(ModelKit, "rate", rate)
    how = Extraction(rollouts=1, judge="lexicon")
    paired = contrast(_kit(tmp_path), {"t": _pairs()}, how)
    assert paired.meta["yields"]["t"]["kept"] == [2, 2] and paired.meta["yields"]["t"]["answers"] == 6
    assert paired.meta["yields"]["t"]["judge_tokens"] == [6 * 7 + 100, 6 * 2 + 1]
    alone = contrast(_kit(tmp_path), {"t": _pairs()}, replace(how, paired=False))
    assert alone.meta["yields"]["t"]["kept"] == [3, 2]
    with pytest.raises(HarnessError, match="no positive answer"):
        contrast(_kit(tmp_path), {"t": _pairs()}, replace(how, threshold=95, paired=False, coherence_min=0))


def test_a_task_that_asks_a_judge_nothing_cannot_be_filtered_by_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="leave judge out"):
        _kit(tmp_path).rate("lexicon", [Sample("a", "u", response="x")])
    asked = {"trait": Question("p", "mosque", "Islam")}
    (rated,) = _kit(tmp_path, to_judge=lambda sample: asked).rate("lexicon", [Sample("a", "u", response="mosque")])
    assert rated["trait"].score is not None


def test_batches_hold_no_more_tokens_than_allowed_and_every_row_once() -> None:
    tokens = [5, 9, 1, 7, 30, 2]
    batches = by_length(tokens, 20)
    assert sorted(n for batch in batches for n in batch) == list(range(6))
    assert all(len(batch) == 1 or len(batch) * max(tokens[n] for n in batch) <= 20 for batch in batches)


# Steering


def _state(layers: int = 3, width: int = 32, traits: tuple[str, ...] = ("a",)) -> Fitted:
    made = torch.Generator().manual_seed(0)
    tensors = {}
    for trait in traits:
        for part in ("vector", "neutral", "shuffled"):
            tensors[f"{trait}.response.{part}"] = torch.randn(layers, width, generator=made) * 3
        tensors[f"{trait}.residual_norm"] = torch.arange(1.0, layers + 1) * 10
    meta = {"traits": list(traits), "poolings": ["response"], "yields": {}, "split_half_cosine": {}}
    return Fitted(tensors, meta)


def _example() -> Example:
    return Example("e", User("u"), "How are you?", "", PersonaTemplate("Be kind."))


def _edits(method: PersonaVector | Clamp, state: Fitted) -> tuple[Edit, ...]:
    return method.plan(_example(), state, None).streams[0].edits


CONTRACT = [
    PersonaVector(rollouts=1),
    PersonaVector(rollouts=1, apply="all_layers", positions="all", scale="unit"),
    PersonaVector(rollouts=1, apply="all_layers_incremental", positions="generated", scale="residual"),
    PersonaVector(rollouts=1, layer=0, positions="prompt", control="random"),
    Clamp(rollouts=1, positions="all_but_bos"),
    Clamp(rollouts=1, op="project_out", universal="unit", band="1-2"),
    Clamp(rollouts=1, op="neutral", universal="per_layer", band="0-2", control="shuffled"),
    Clamp(rollouts=1, op="neutral", universal="per_layer", band="0-1", control="random"),
]


@pytest.mark.parametrize("method", CONTRACT, ids=lambda m: f"{type(m).__name__}-{m.positions}")
def test_steering_keeps_the_contract(method: PersonaVector | Clamp) -> None:
    check_method(method)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coefficient_zero_is_the_model_itself_bit_by_bit(family: str, dtype: torch.dtype) -> None:
    lm = random_lm(family, dtype=dtype)
    decoder = Decoder(lm)
    steered = PersonaVector(coefficient=0.0, positions="all", apply="all_layers").plan(_example(), _state(), None)
    requests = [decoder.prepare("e", p, 6) for p in (steered, Plan((steered.streams[0].bare(),)))]
    (a,), (b,) = (decoder.generate([request], max_new_tokens=6) for request in requests)
    assert (a.ids, a.logprobs) == (b.ids, b.logprobs)
    (p,), (q,) = (decoder.distributions([request], [a.ids]) for request in requests)
    assert torch.equal(p, q)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_vector_added_after_block_k_enters_block_k_plus_1_exactly_and_only_where_asked(family: str) -> None:
    lm = random_lm(family, dtype=torch.float32)
    decoder, state = Decoder(lm), _state()
    method = PersonaVector(layer=1, coefficient=2.0, positions="response")
    plan = method.plan(_example(), state, None)
    requests = [decoder.prepare("e", p, 4) for p in (plan, Plan((plan.streams[0].bare(),)))]
    site = Site(2, "block_in")
    with_it, without = (capture(lm, [request], [site], ALL, [(30, 31)])[0][site] for request in requests)
    before = requests[0].tokens - 1
    assert torch.equal(with_it[:before], without[:before])
    expected = without[before:] + 2.0 * state.tensors["a.response.vector"][1]
    assert torch.equal(with_it[before:], expected)


@pytest.mark.parametrize("positions", ["response", "generated", "prompt", "all_but_bos", "all"])
def test_generation_equals_a_teacher_forced_pass_at_all_positions_and_in_a_padded_batch(positions: Any) -> None:
    lm, state = random_lm(), _state()
    decoder = Decoder(lm)
    examples = [_example(), replace(_example(), id="f", text="Why, then? " * 5)]
    plans = [PersonaVector(layer=1, positions=positions).plan(e, state, None) for e in examples]
    requests = [decoder.prepare(e.id, p, 6) for e, p in zip(examples, plans, strict=True)]
    for request, answer in zip(requests, decoder.generate(requests, max_new_tokens=6), strict=True):
        (alone,) = decoder.generate([request], max_new_tokens=6)
        (scored,) = decoder.score([request], [answer.ids])
        assert alone.ids == answer.ids
        assert max(abs(a - b) for a, b in zip(scored.logprobs, answer.logprobs, strict=True)) < 1e-8


def test_the_three_readings_of_every_layer_differ_as_they_say() -> None:
    state = _state()
    v = state.tensors["a.response.vector"]
    same, every, steps = (
        _edits(PersonaVector(layer=1, apply=apply), state)
        for apply in ("same_layer", "all_layers", "all_layers_incremental")
    )
    assert [(e.site.layer, torch.equal(e.vector, v[1])) for e in same] == [(1, True)]  # type: ignore[attr-defined]
    assert [(e.site.layer, torch.equal(e.vector, v[1])) for e in every] == [(0, True), (1, True), (2, True)]  # type: ignore[attr-defined]
    assert [e.site.layer for e in steps] == [0, 1]
    torch.testing.assert_close(steps[0].vector + steps[1].vector, v[1])  # type: ignore[attr-defined]


def test_scale_says_how_long_the_vector_is() -> None:
    state = _state()
    lengths = [
        float(_edits(PersonaVector(layer=1, scale=scale), state)[0].vector.norm())  # type: ignore[attr-defined]
        for scale in ("raw", "unit", "residual")
    ]
    assert lengths == pytest.approx([float(state.tensors["a.response.vector"][1].norm()), 1.0, 20.0])


@pytest.mark.parametrize("control", ["random", "shuffled"])
def test_a_control_has_the_norm_of_the_vector_and_another_direction(control: Any) -> None:
    state = _state()
    (true,), (other,) = (_edits(PersonaVector(layer=1, control=c), state) for c in ("none", control))
    a, b = true.vector, other.vector  # type: ignore[attr-defined]
    assert float(b.norm()) == pytest.approx(float(a.norm()))
    assert abs(float(torch.cosine_similarity(a, b, dim=0))) < 0.6


def test_a_vector_moves_to_the_type_of_its_block() -> None:
    lm = random_lm(dtype=torch.bfloat16)
    decoder = Decoder(lm)
    request = decoder.prepare("e", PersonaVector(layer=1).plan(_example(), _state(), None), 4)
    (answer,) = decoder.generate([request], max_new_tokens=4)
    assert len(answer.ids) > 0


class _Eight(torch.nn.Module):
    """A linear layer with int8 weights and one scale, whose activations are of another type."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.scale = float(linear.weight.abs().max()) / 127
        self.weight = torch.nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight.to(x.dtype) * self.scale).T


def _quantised(lm: LanguageModel) -> None:
    for block in lm.sites.blocks:
        for name, module in list(block.named_modules()):
            if isinstance(module, torch.nn.Linear):
                block.set_submodule(name, _Eight(module))


def _offloaded(lm: LanguageModel) -> None:
    from accelerate import cpu_offload

    cpu_offload(lm.model, execution_device=torch.device("cpu"))


def _tuples(lm: LanguageModel) -> None:
    for block in lm.sites.blocks:
        block.register_forward_hook(lambda _, args, output: (output, None))
    for after in lm.sites.blocks[1:]:
        after.register_forward_pre_hook(lambda _, args: (args[0][0], *args[1:]))
    lm.sites.final_norm.register_forward_pre_hook(lambda _, args: (args[0][0],))


@pytest.mark.parametrize("change", [_quantised, _offloaded, _tuples])
def test_quantised_and_offloaded_models_and_blocks_that_return_tuples_are_steered_exactly(
    change: Callable[[LanguageModel], None],
) -> None:
    lm, state = random_lm(dtype=torch.float32), _state()
    change(lm)
    plan = PersonaVector(layer=1, coefficient=2.0, positions="all").plan(_example(), state, None)
    requests = [Decoder(lm).prepare("e", p, 4) for p in (plan, Plan((plan.streams[0].bare(),)))]
    site = Site(2, "block_in")
    with_it, without = (capture(lm, [request], [site], ALL, [(30, 31)])[0][site] for request in requests)
    assert torch.equal(with_it, without + 2.0 * state.tensors["a.response.vector"][1])
    (answer,) = Decoder(lm).generate([requests[0]], max_new_tokens=4)
    (scored,) = Decoder(lm).score([requests[0]], [answer.ids])
    assert max(abs(a - b) for a, b in zip(scored.logprobs, answer.logprobs, strict=True)) < 1e-4


# Clamping


def _at_the_site(op: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor, Fitted]:
    """The stream after a clamped block [P, D], the unit vector, and the state."""
    lm, state = random_lm(), _state(traits=("a", "b"))
    method = Clamp(op=op, band="1", peaks=(0, 2), positions="all", **options)
    request = Decoder(lm).prepare("e", method.plan(_example(), state, None), 4)
    site = Site(2, "block_in")
    u = method.directions(state)[1].double()
    return capture(lm, [request], [site], ALL)[0][site], u / u.norm(), state


def test_projecting_out_leaves_no_component_along_the_vector() -> None:
    x, unit, _ = _at_the_site("project_out")
    assert float((x @ unit).abs().max()) < 1e-5


def test_clamping_to_neutral_sets_the_component_to_that_of_neutral_answers() -> None:
    x, unit, state = _at_the_site("neutral")
    neutral = (state.tensors["a.response.neutral"][1] + state.tensors["b.response.neutral"][1]).double() / 2
    torch.testing.assert_close(x @ unit, (neutral @ unit).expand(len(x)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("op", ["subtract", "project_out", "neutral"])
def test_the_random_control_moves_each_position_as_far_in_another_direction(op: Any) -> None:
    lm, state, site = random_lm(), _state(traits=("a", "b")), Site(2, "block_in")
    method = Clamp(op=op, band="1", peaks=(0, 2), positions="all")
    plans = [
        method.plan(_example(), state, None),
        replace(method, control="random", draw=7).plan(_example(), state, None),
    ]
    plans.append(Plan((plans[0].streams[0].bare(),)))
    requests = [Decoder(lm).prepare("e", plan, 4) for plan in plans]
    true, random, without = (capture(lm, [request], [site], ALL)[0][site] for request in requests)
    torch.testing.assert_close((true - without).norm(dim=-1), (random - without).norm(dim=-1), rtol=1e-5, atol=0)
    assert float(torch.cosine_similarity(true - without, random - without, dim=-1).abs().max()) < 0.6


@pytest.mark.parametrize("control", ["random", "shuffled"])
def test_a_control_of_the_universal_vector_is_as_long_as_the_mean_of_vectors_that_partly_cancel(control: Any) -> None:
    state = _state(traits=("a", "b"))
    for universal in ("published", "per_layer"):
        true, other = (
            Clamp(universal=universal, control=c, band="1", peaks=(0, 2)).directions(state)[1]  # type: ignore[arg-type]
            for c in ("none", control)
        )
        assert float(other.norm()) == pytest.approx(float(true.norm()))


def test_the_universal_vector_is_one_of_three() -> None:
    state = _state(traits=("a", "b"))
    a, b = (state.tensors[f"{t}.response.vector"] for t in "ab")
    found = {
        u: Clamp(universal=u, band="1-2", peaks=(0, 2)).directions(state)  # type: ignore[arg-type]
        for u in ("published", "unit", "per_layer")
    }
    torch.testing.assert_close(found["published"][1], (a[0] + b[2]) / 2)
    assert found["published"][1] is found["published"][2]
    units = a[0] / a[0].norm() + b[2] / b[2].norm()
    assert float(torch.cosine_similarity(found["unit"][1], units, dim=0)) == pytest.approx(1)
    assert float(found["unit"][1].norm()) == pytest.approx(float(found["published"][1].norm()))
    torch.testing.assert_close(found["per_layer"][2], (a[2] + b[2]) / 2)
    assert not torch.allclose(found["unit"][1], found["published"][1])


@pytest.mark.parametrize("named", [str.title, str.lower], ids=["as ours", "as in other tools' files"])
def test_the_published_peaks_are_fractions_of_the_depth(named: Callable[[str], str]) -> None:
    peaks = {named(name): peak for name, peak in PEAKS.items()}
    assert list(peaks.values()) == [20, 10, 15, 13]
    state = _state(layers=28, width=4, traits=tuple(peaks))
    expected = torch.stack([state.tensors[f"{t}.response.vector"][p] for t, p in peaks.items()]).mean(0)
    directions = Clamp().directions(state)
    assert list(directions) == [11, 12, 13, 14, 15]
    torch.testing.assert_close(directions[11], expected)


def test_a_band_is_numbers_or_fractions_of_the_depth() -> None:
    assert blocks_of("11-15", 28) == blocks_of("0.39-0.57", 28) == [11, 12, 13, 14, 15]
    assert blocks_of("0.39-0.57", 5) == [2] and blocks_of("3", 5) == [3] and blocks_of("0.0-1.0", 3) == [0, 1, 2]
    for wrong in ("11-15", "a-b", "3-2", "0.95-0.96"):
        with pytest.raises(UsageError, match=f"band={wrong}"):
            blocks_of(wrong, 5)


def test_layers_can_be_numbered_as_hidden_states_which_are_one_block_later() -> None:
    state = _state(layers=28, width=4, traits=tuple(PEAKS))
    expected = torch.stack([state.tensors[f"{t}.response.vector"][p - 1] for t, p in PEAKS.items()]).mean(0)
    directions = Clamp(numbering="hidden_states").directions(state)
    assert list(directions) == [10, 11, 12, 13, 14]
    torch.testing.assert_close(directions[10], expected)
    assert list(Clamp(numbering="hidden_states", band="28").directions(state)) == [27]
    one = _state(layers=28, width=4)
    for numbering, layer, block in (("blocks", None, 20), ("hidden_states", None, 19), ("hidden_states", 28, 27)):
        (edit,) = _edits(PersonaVector(numbering=numbering, layer=layer), one)  # type: ignore[arg-type]
        assert edit.site.layer == block
    with pytest.raises(UsageError, match="layer 0 of the hidden states is the embeddings"):
        _edits(PersonaVector(numbering="hidden_states", layer=0), one)
    for band in ("0", "29"):
        with pytest.raises(UsageError, match="blocks 1 to 28"):
            Clamp(numbering="hidden_states", band=band).directions(state)


def test_an_option_that_came_later_leaves_the_records_of_before_their_names() -> None:
    records = [r for r in find_runs(RESULTS) if r.config.method.name in ("clamp", "persona_vector")]
    assert len(records) > 10
    for record in records:
        options = record.config.method.options
        if options["vectors"] is None:
            method = method_class(record.config.method.name)().with_options(options)
            same = MethodConfig(name=record.config.method.name, options=method.identity()).options
            assert {k: tuple(v) if isinstance(v, list) else v for k, v in same.items()} == {
                k: tuple(v) if isinstance(v, list) else v for k, v in options.items()
            }
        assert record.hash == record.config.hash8()
    assert Clamp(numbering="hidden_states").identity()["numbering"] == "hidden_states"
    assert "numbering" in Clamp().options()


def test_options_that_mean_nothing_together_are_refused() -> None:
    with pytest.raises(UsageError, match="direction alone"):
        Clamp(op="project_out", scale="unit")
    with pytest.raises(UsageError, match="one each"):
        Clamp(peaks=(1,)).directions(_state(traits=("a", "b")))
    with pytest.raises(UsageError, match="set trait to one of"):
        _edits(PersonaVector(), _state(traits=("a", "b")))
    with pytest.raises(UsageError, match="blocks 0 to 2"):
        _edits(PersonaVector(layer=3), _state())


def test_none_is_a_word_where_an_option_has_it_for_a_choice() -> None:
    assert build_method(Clamp, "clamp", None, ["control=none", "peaks=none"]) == Clamp(control="none", peaks=None)
