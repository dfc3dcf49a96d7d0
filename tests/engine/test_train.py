"""Training many users as rows of one batch: each user's result is that of training them alone, by the textbook."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from harness.data import Prompt
from harness.edits import AddVector, LowRankShift
from harness.engine.decode import Decoder
from harness.engine.model import LanguageModel
from harness.engine.sites import FAMILIES
from harness.engine.training.parameter_stacks import retract
from harness.engine.training.train import train
from harness.errors import UsageError, UserFailed
from harness.fit.trains import lora
from harness.method import Fitted
from harness.plan import ALL, GENERATED, FirstLast, LoRA, Plan, Site, Stream
from harness.run.contract import ToyTemplate, random_lm
from harness.training import Adapter, Learner, Lesson, Recipe, Shifts, positions

WINDOWED = ("qwen2", {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1})
MODELS = [*((family, {}) for family in FAMILIES), WINDOWED]
SHIFTS = Shifts("s", (1, 2), 3, (FirstLast(2, 3), GENERATED), "random")
QUICK = Recipe(epochs=2, batch_size=2, lr=1e-2)


@pytest.fixture(params=MODELS, ids=str, scope="module")
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    family, config = request.param
    return random_lm(family, **config)


def _lesson(text: str, answer: str, **stream: object) -> Lesson:
    return Lesson(Stream(Prompt(ToyTemplate(), text), **stream), answer)  # type: ignore[arg-type]


def _learner(name: str, count: int, **stream: object) -> Learner:
    lessons = [
        _lesson(f"{name} asks " + "on and on " * (n % 3), f"{name} {n}" * (1 + n % 2), **stream) for n in range(count)
    ]
    return Learner(name, lessons)


def _class() -> list[Learner]:
    """Users with as many lessons as make one to four steps an epoch."""
    return [_learner(name, count) for name, count in [("ann", 1), ("bob", 7), ("cat", 2), ("dan", 4)]]


def _difference(a: Fitted | UserFailed, b: Fitted | UserFailed) -> float:
    assert isinstance(a, Fitted) and isinstance(b, Fitted)
    assert a.tensors.keys() == b.tensors.keys() and a.tensors
    return max(float((a.tensors[name] - b.tensors[name]).abs().max()) for name in a.tensors)


@pytest.mark.parametrize("kind", ["shifts", "lora"])
def test_users_trained_together_get_what_each_gets_alone_in_any_order(lm: LanguageModel, kind: str) -> None:
    targets = ("c_attn", "mlp.c_proj") if lm.name == "random-gpt2" else ("q_proj", "up_proj")
    part = SHIFTS if kind == "shifts" else Adapter(targets, rank=2)
    learners = _class()
    together = train(lm, learners, [part], QUICK)
    backwards = train(lm, learners[::-1], [part], QUICK)[::-1]
    for learner, state, other in zip(learners, together, backwards, strict=True):
        (alone,) = train(lm, [learner], [part], QUICK)
        assert _difference(state, alone) < 1e-9
        assert _difference(state, other) < 1e-9
        assert isinstance(state, Fitted) and isinstance(alone, Fitted)
        assert state.meta["losses"] == pytest.approx(alone.meta["losses"], abs=1e-9)


def test_users_who_train_in_groups_for_want_of_memory_get_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, learners = random_lm(), _class()
    whole = train(lm, learners, [SHIFTS], QUICK)
    monkeypatch.setattr(
        "harness.engine.training.train.STATE_BYTES", 16 * 2 * SHIFTS.rank * len(SHIFTS.places) * (2 * 32 + 1)
    )
    monkeypatch.setattr("harness.engine.training.train.PASS_TOKENS", {"cpu": 60})
    for a, b in zip(whole, train(lm, learners, [SHIFTS], QUICK), strict=True):
        assert _difference(a, b) < 1e-9


def test_a_kept_trunk_changes_nothing(lm: LanguageModel) -> None:
    below = AddVector(Site(0, "mlp_out"), torch.ones(lm.sites.width, dtype=torch.float64))
    at = AddVector(Site(1, "block_out"), torch.ones(lm.sites.width, dtype=torch.float64), where=GENERATED)
    above = AddVector(Site(2, "attn_out"), torch.ones(lm.sites.width, dtype=torch.float64))
    learners = [_learner("ann", 3, edits=(below, at, above)), _learner("bob", 5, edits=(below, at, above))]
    kept = train(lm, learners, [SHIFTS], QUICK)
    anew = train(lm, learners, [SHIFTS], QUICK, trunk_bytes=0)
    some = train(lm, learners, [SHIFTS], QUICK, trunk_bytes=3 * 30 * lm.sites.width * 8)
    for a, b, c in zip(kept, anew, some, strict=True):
        assert max(_difference(a, b), _difference(a, c)) < 1e-9


# One user by the textbook


def _textbook(
    lm: LanguageModel, learner: Learner, first: Fitted, shifts: Shifts, recipe: Recipe, steps: int
) -> dict[str, Tensor]:
    """All lessons in every step, each a forward pass of its own through the whole model, torch's own AdamW and clipping."""
    parameters = {name: tensor.clone().requires_grad_() for name, tensor in first.tensors.items()}
    rotation, weight, bias = (parameters[f"{shifts.name}.{kind}"] for kind in ("rotation", "weight", "bias"))
    optimizer = torch.optim.AdamW(
        [{"params": [rotation, bias], "weight_decay": 0.0}, {"params": [weight]}],
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
    )
    decoder = Decoder(lm)
    for step in range(steps):
        total, count = torch.zeros((), dtype=torch.float64), 0
        for lesson in learner.lessons:
            (prompt,) = decoder.prepare("x", Plan((lesson.stream,)), 0).prompts
            answer = [*lm.encoder.answer(lesson.answer, lesson.stream.prompt.render()), 1]
            ids = torch.tensor([[*prompt.encoded.ids, *answer]])
            handles = []
            for place, (site, where) in enumerate(shifts.places):
                at = torch.from_numpy(where(torch.arange(ids.shape[1]).numpy(), prompt.encoded.layout()))

                def shift(_: object, __: object, x: Tensor, place: int = place, at: Tensor = at) -> Tensor:
                    r, w, b = rotation[place], weight[place], bias[place]
                    return torch.where(at[:, None], x + (x @ w.T + b - x @ r.T) @ r, x)

                handles.append(lm.sites.blocks[site.layer].register_forward_hook(shift))
            logits = lm.model(ids, attention_mask=torch.ones_like(ids)).logits[0]
            for handle in handles:
                handle.remove()
            logp = logits[-len(answer) - 1 : -1].log_softmax(-1)
            total = total - logp.gather(1, torch.tensor(answer)[:, None]).sum()
            count += len(answer)
        optimizer.zero_grad()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), recipe.clip)
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * (1 - step / steps)
        optimizer.step()
        with torch.no_grad():
            for place in range(len(shifts.places)):
                q, upper = torch.linalg.qr(rotation[place].T)
                rotation[place] = (q * upper.diagonal().sign()).T
    return {name: tensor.detach() for name, tensor in parameters.items()}


def test_shifts_train_as_by_the_textbook(lm: LanguageModel) -> None:
    learner, recipe = _learner("ann", 3), Recipe(epochs=4, batch_size=3, lr=1e-2, warmup=0.0)
    (first,) = train(lm, [learner], [SHIFTS], dataclasses.replace(recipe, epochs=0))
    (state,) = train(lm, [learner, _learner("bob", 9)], [SHIFTS], recipe)[:1]
    assert isinstance(first, Fitted) and isinstance(state, Fitted)
    expected = _textbook(lm, learner, first, SHIFTS, recipe, steps=4)
    for name, tensor in expected.items():
        assert torch.allclose(state.tensors[name], tensor, atol=1e-8, rtol=0), name
    assert _difference(state, first) > 1e-3


def test_the_loss_is_of_the_answers_tokens_and_its_end_alone() -> None:
    lm, learner = random_lm(), _learner("ann", 3)
    (state,) = train(lm, [learner], [SHIFTS], Recipe(epochs=1))
    (first,) = train(lm, [learner], [SHIFTS], Recipe(epochs=0))
    assert isinstance(state, Fitted) and isinstance(first, Fitted)
    decoder, edits = Decoder(lm), SHIFTS.edits(first.tensors)
    requests, answers = [], []
    for lesson in learner.lessons:
        requests.append(decoder.prepare("x", Plan((dataclasses.replace(lesson.stream, edits=edits),)), 20))
        answers.append([*lm.encoder.answer(lesson.answer, lesson.stream.prompt.render()), 1])
    scored = decoder.score(requests, answers)
    nll = -sum(sum(s.logprobs) for s in scored) / sum(map(len, answers))
    assert state.meta["losses"] == pytest.approx([nll], abs=1e-10)


def test_training_lowers_the_loss_on_what_was_learnt_and_in_bf16_too() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        lm = random_lm(dtype=dtype, initializer_range=0.1)
        for part in (Shifts("s", (1,), 8), Adapter(("q_proj", "v_proj", "down_proj"))):
            (state,) = train(lm, [_learner("ann", 4)], [part], Recipe(epochs=30, lr=1e-2))
            assert isinstance(state, Fitted)
            assert state.meta["losses"][-1] < 0.8 * state.meta["losses"][0], (dtype, part)


# R stays what it is


def test_r_stays_orthonormal_through_200_steps_with_weight_decay_and_after_going_on() -> None:
    lm = random_lm(dtype=torch.float32)
    learner, recipe = _learner("ann", 2), Recipe(epochs=200, lr=1e-2, weight_decay=1e-2, schedule="constant")
    (first,) = train(lm, [learner], [SHIFTS], recipe)
    assert isinstance(first, Fitted) and first.meta["steps"] == 200
    (again,) = train(
        lm, [dataclasses.replace(learner, trained=first.tensors)], [SHIFTS], dataclasses.replace(recipe, epochs=5)
    )
    for state in (first, again):
        assert isinstance(state, Fitted)
        rotation = state.tensors["s.rotation"]
        assert (rotation @ rotation.mT - torch.eye(3)).abs().max() < 1e-5
    assert 0 < _difference(first, again) < _difference(first, train(lm, [learner], [SHIFTS], Recipe(epochs=0))[0])
    assert first.meta["parameters"] == len(SHIFTS.places) * (2 * 3 * 32 + 3)


def test_retraction_is_the_identity_on_orthonormal_rows_and_the_sign_of_r_is_kept() -> None:
    rotation = retract(torch.randn(2, 3, 8, dtype=torch.float64))
    assert torch.allclose(retract(rotation), rotation, atol=1e-12)
    assert torch.allclose(retract(-2 * rotation), -rotation, atol=1e-12)


def test_an_identity_start_changes_no_activation_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        lm = random_lm(dtype=dtype)
        (state,) = train(lm, [_learner("ann", 1)], [Shifts("s", (0,), 4)], Recipe(epochs=0))
        assert isinstance(state, Fitted)
        (edit,) = Shifts("s", (0,), 4).edits(state.tensors)
        x = torch.randn(1, 5, 32).to(dtype)
        assert torch.equal(LowRankShift.bind([edit], x)(x), x)


# What can go wrong


def test_a_learner_whose_loss_is_not_finite_is_named_and_the_others_go_on() -> None:
    lm = random_lm()
    nan = AddVector(Site(0, "block_out"), torch.full((32,), float("nan"), dtype=torch.float64))
    learners = [_learner("ann", 3), _learner("bob", 5, edits=(nan,)), _learner("cat", 2)]
    for part in (SHIFTS, Adapter(("q_proj",))):
        ann, bob, cat = train(lm, learners, [part], QUICK)
        assert isinstance(bob, UserFailed)
        assert str(bob) == "training 'bob': the loss is nan at step 1 of 6; lower the learning rate (--set lr=...)"
        for learner, state in ((learners[0], ann), (learners[2], cat)):
            assert _difference(state, train(lm, [learner], [part], QUICK)[0]) < 1e-9


def test_a_lesson_that_does_not_fit_or_has_no_answer_is_left_out_and_counted() -> None:
    lm = random_lm(max_position_embeddings=64)
    good, long, empty = _lesson("short", "yes"), _lesson("x" * 80, "no"), _lesson("short", "")
    mixed, only, none = train(
        lm, [Learner("a", [good, long, empty]), Learner("a", [good]), Learner("b", [long])], [SHIFTS], QUICK
    )
    assert _difference(mixed, only) < 1e-12
    assert isinstance(mixed, Fitted) and isinstance(none, Fitted)
    assert (mixed.meta["lessons"], mixed.meta["left_out"]) == (1, 2)
    assert (none.tensors, none.meta["lessons"], none.meta["left_out"]) == ({}, 0, 1)


def test_prompts_are_cut_as_while_decoding() -> None:
    lm = random_lm(max_position_embeddings=64)
    (fits,) = train(lm, [Learner("a", [_lesson("x" * 40, "yes")])], [SHIFTS], QUICK, new_tokens=8)
    (cut,) = train(lm, [Learner("a", [_lesson("x" * 40, "yes")])], [SHIFTS], QUICK, new_tokens=40)
    assert isinstance(fits, Fitted) and isinstance(cut, Fitted)
    assert (fits.meta["lessons"], cut.meta["lessons"]) == (1, 0)


def test_a_pass_that_does_not_fit_memory_is_halved_and_its_gradient_is_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm, learners = random_lm(), [_learner("ann", 6)]
    recipe = dataclasses.replace(QUICK, batch_size=6)
    expected = train(lm, learners, [SHIFTS], recipe)
    hidden = lm.hidden

    def small(ids: Tensor, **kwargs: Tensor) -> Tensor:
        if ids.shape[0] > 2 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError
        return hidden(ids, **kwargs)

    monkeypatch.setattr(lm, "hidden", small)
    assert _difference(train(lm, learners, [SHIFTS], recipe)[0], expected[0]) < 1e-9


def test_the_model_is_left_as_found_also_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = random_lm()
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}

    def broken(*_: object) -> Tensor:
        raise RuntimeError("broken")

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules())

    count = hooks()
    with monkeypatch.context() as patch:
        patch.setattr(lm, "logits", broken)
        with pytest.raises(RuntimeError, match="broken"):
            train(lm, _class(), [SHIFTS, Adapter(("v_proj",))], QUICK)
    assert not any("forward" in module.__dict__ for module in lm.model.modules())
    assert hooks() == count
    train(lm, _class(), [SHIFTS], QUICK)
    assert not any("forward" in module.__dict__ for module in lm.model.modules())
    assert all(torch.equal(value, before[name]) for name, value in lm.model.state_dict().items())


def test_a_block_or_module_that_the_model_does_not_have_is_named() -> None:
    lm = random_lm()
    with pytest.raises(UsageError, match="block 7 does not exist"):
        train(lm, _class(), [Shifts("s", (7,), 2)], QUICK)
    with pytest.raises(UsageError, match=r"'out_proj' matches no module .* have: down_proj, gate_proj, k_proj, o_proj"):
        train(lm, _class(), [Adapter(("q_proj", "out_proj"))], QUICK)
    with pytest.raises(UsageError, match="'lm_head' matches no module"):
        train(lm, _class(), [Adapter(("lm_head",))], QUICK)
    with pytest.raises(UsageError, match="rank 33 is not valid"):
        train(lm, _class(), [Shifts("s", (1,), 33)], QUICK)


# Schedules, positions, adapters


def test_the_learning_rate_rises_over_the_warm_up_and_falls_to_the_last_step() -> None:
    assert Recipe(lr=1.0, warmup=0.25).rates(8) == pytest.approx([1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert Recipe(lr=1.0, warmup=0.0, schedule="constant").rates(3) == [1.0, 1.0, 1.0]
    assert Recipe(lr=1.0).rates(2) == [1.0, 0.5]


@pytest.mark.parametrize("setting", [{"epochs": -1}, {"batch_size": 0}, {"lr": float("nan")}, {"clip": -0.1}])
def test_a_recipe_out_of_range_is_named(setting: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(setting))} .* is not valid; allowed"):
        Recipe(**setting)  # type: ignore[arg-type]


def test_positions_are_read_as_reft_writes_them() -> None:
    assert positions("all") == (ALL,)
    assert positions("f7+l7") == (FirstLast(7, 7),)
    assert positions("f7+l2", shared=False) == (FirstLast(7, 0), FirstLast(0, 2))
    assert positions("l2", shared=False) == (FirstLast(0, 2),)
    for wrong in ("", "f", "f0+l0", "first", "l7+f7"):
        with pytest.raises(UsageError, match=r"allowed: all, last, or as in f7\+l7"):
            positions(wrong)


def test_a_trained_adapter_scores_as_its_last_training_pass_did() -> None:
    lm, learner, part = random_lm(), _learner("ann", 3), Adapter(("q_proj", "v_proj"), rank=4, alpha=2.0)
    (state,) = train(lm, [learner], [part], Recipe(epochs=3, lr=1e-2))
    assert isinstance(state, Fitted) and state.meta["scale"] == 0.5
    (after,) = train(lm, [dataclasses.replace(learner, trained=state.tensors)], [part], Recipe(epochs=1))
    frozen = [
        dataclasses.replace(x, stream=dataclasses.replace(x.stream, adapters=(lora(state),))) for x in learner.lessons
    ]
    (under,) = train(lm, [Learner("bob", frozen)], [part], Recipe(epochs=1))
    assert isinstance(after, Fitted) and isinstance(under, Fitted)
    assert under.meta["losses"] == pytest.approx(after.meta["losses"], abs=1e-10)


def _random_lora(lm: LanguageModel, names: Sequence[str]) -> LoRA:
    modules = {name: lm.model.get_submodule(name) for name in names}
    pairs = {
        name: (
            torch.randn(2, module.in_features, dtype=torch.float64),
            torch.randn(module.out_features, 2, dtype=torch.float64),
        )
        for name, module in modules.items()
    }
    return LoRA("frozen", pairs, 0.1)


def test_adapters_below_and_above_the_trunk_stay_frozen_and_act() -> None:
    lm = random_lm()
    names = ["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj"]
    frozen = _random_lora(lm, names)
    learners = [_learner("ann", 3, adapters=(frozen,)), _learner("bob", 2, adapters=(frozen,))]
    kept = train(lm, learners, [SHIFTS], QUICK)
    with torch.no_grad():
        for name in names:
            down, up = frozen.weights[name]
            lm.model.get_submodule(name).weight += 0.1 * up @ down
    merged = train(lm, [_learner("ann", 3), _learner("bob", 2)], [SHIFTS], QUICK)
    for a, b in zip(kept, merged, strict=True):
        assert _difference(a, b) < 1e-9


def test_a_word_of_a_recipe_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="schedule 'cosine' is not valid; allowed: linear, constant"):
        Recipe(schedule="cosine")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="start 'zero' is not valid; allowed: identity, random"):
        Shifts("shift", (0,), 1, start="zero")  # type: ignore[arg-type]
