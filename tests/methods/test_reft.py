"""ReFT and PerFit: the shift by hand, the stages, who learns from what."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from harness.data import Example, HistoryItem, Labelled, User
from harness.edits import LowRankShift
from harness.engine.decode import Decoder
from harness.engine.model import LanguageModel
from harness.errors import HarnessError, UsageError, UserFailed
from harness.fit.kit import ModelKit
from harness.fit.states import shared_key
from harness.method import Fitted, Retrieval
from harness.methods.perfit import PerFit
from harness.methods.reft import ReFT
from harness.plan import ALL, Site
from harness.plugins.options import build_method
from harness.run.cell import Cell, Settings
from harness.run.contract import ToyTemplate, check_method, random_lm, toy_examples
from harness.tasks.lamp import Lamp4
from harness.training import Learner

QUICK = {"lr": 1e-2, "batch_size": 2}
USERS = [item.example.user for item in toy_examples(4, seed=2)]
TRAIN = toy_examples(5, seed=1)


def _fitted(states: Sequence[Fitted | UserFailed | None]) -> list[Fitted]:
    assert all(isinstance(state, Fitted) for state in states)
    return [state for state in states if isinstance(state, Fitted)]


def _equal(a: Fitted, b: Fitted) -> bool:
    return a.tensors.keys() == b.tensors.keys() and all(
        torch.allclose(a.tensors[name], b.tensors[name], atol=1e-9, rtol=0) for name in a.tensors
    )


def test_the_shift_by_hand() -> None:
    # R reads the second coordinate; W x + b = x0 + 2 x2 + 1 replaces it
    r, w, b = torch.tensor([[0.0, 1, 0]]), torch.tensor([[1.0, 0, 2]]), torch.tensor([1.0])
    x = torch.tensor([[[3.0, 5, 7]]])
    assert LowRankShift.bind([LowRankShift(Site(0, "block_out"), r, w, b)], x)(x).tolist() == [[[3, 18, 7]]]
    # a second one on top reads what the first one left: W x + b = x1 = 18 replaces the first coordinate
    second = LowRankShift(
        Site(0, "block_out"), torch.tensor([[1.0, 0, 0]]), torch.tensor([[0.0, 1, 0]]), torch.zeros(1)
    )
    y = LowRankShift.bind([LowRankShift(Site(0, "block_out"), r, w, b)], x)(x)
    assert LowRankShift.bind([second], y)(y).tolist() == [[[18, 18, 7]]]


@pytest.mark.parametrize("text", ["all", "last", "f3+l2"])
def test_reft_keeps_its_promises(text: str) -> None:
    check_method(ReFT(rank=2, positions=text))


def test_reft_keeps_its_promises_on_other_families_and_as_pyreft_starts() -> None:
    check_method(ReFT(rank=2, share_weights=False, positions="f2+l2", start="random"), lm=random_lm("gpt2"))


@pytest.mark.parametrize("init", ["identity", "fresh", "from_stage1"])
def test_perfit_keeps_its_promises(init: str) -> None:
    check_method(build_method(PerFit, "perfit", None, ["rank=3", "personal_rank=2", f"stage2_init={init}"]))


@pytest.mark.parametrize("preset", ["stage1", "stage2_cp", "stage2_p", "pyreft"])
def test_perfit_keeps_its_promises_in_its_ablations(preset: str) -> None:
    check_method(build_method(PerFit, "perfit", preset, ["rank=3", "personal_rank=2", "positions=f2+l2"]))


def test_stage_2_leaves_stage_1_as_it_is_and_comes_on_top_of_it(lm: LanguageModel) -> None:
    method, kit = PerFit(rank=3, personal_rank=2, layers=(1, 2), **QUICK), ModelKit(lm)
    shared = method.fit(kit, TRAIN)
    assert shared is not None
    before = {name: tensor.clone() for name, tensor in shared.tensors.items()}
    states = _fitted(method.adapt(kit, USERS, shared))
    assert all(torch.equal(tensor, before[name]) for name, tensor in shared.tensors.items())
    edits = method.plan(TRAIN[0].example, shared, states[0]).streams[0].edits
    assert [(edit.site.layer, edit.rotation.shape[0]) for edit in edits] == [(1, 3), (2, 3), (1, 2), (2, 2)]  # type: ignore[attr-defined]
    assert all(edit.where == ALL for edit in edits)
    assert not any(_equal(states[0], state) for state in states[1:])


def test_the_stages_learn_at_rates_of_their_own(lm: LanguageModel) -> None:
    method = PerFit(collective_lr=0.0, **QUICK)
    shared = method.fit(ModelKit(lm), TRAIN)
    (own,) = _fitted(method.adapt(ModelKit(lm), USERS[:1], shared))
    assert shared is not None
    assert torch.allclose(shared.tensors["collective.weight"], shared.tensors["collective.rotation"], atol=1e-6)
    assert not torch.allclose(own.tensors["personal.weight"], own.tensors["personal.rotation"], atol=1e-4)
    for name in ("collective_lr", "collective_epochs"):
        with pytest.raises(UsageError, match=f"{name} -1 is not valid"):
            PerFit(**{name: -1})


def test_the_order_of_users_changes_no_user(lm: LanguageModel) -> None:
    method, kit = PerFit(rank=3, personal_rank=2, **QUICK), ModelKit(lm)
    shared = method.fit(kit, TRAIN)
    forth = _fitted(method.adapt(kit, USERS, shared))
    back = _fitted(method.adapt(kit, USERS[::-1], shared))[::-1]
    alone = [_fitted(method.adapt(kit, [user], shared))[0] for user in USERS]
    for a, b, c in zip(forth, back, alone, strict=True):
        assert _equal(a, b) and _equal(a, c)


def test_an_untrained_user_is_where_stage_1_ended_and_a_fresh_start_is_not(lm: LanguageModel) -> None:
    def logp(method: PerFit) -> torch.Tensor:
        shared = method.fit(ModelKit(lm), TRAIN)
        (state,) = method.adapt(ModelKit(lm), USERS[:1], shared)
        decoder = Decoder(lm)
        assert isinstance(state, Fitted | None)
        return decoder.distributions([decoder.prepare("x", method.plan(TRAIN[0].example, shared, state), 4)], [(9, 8)])[
            0
        ]

    stage1 = logp(PerFit(rank=3, ablation="stage1", **QUICK))
    assert torch.equal(stage1, logp(PerFit(rank=3, epochs=0, **QUICK)))
    assert not torch.allclose(stage1, logp(PerFit(rank=3, epochs=0, stage2_init="fresh", **QUICK)), atol=1e-3)
    plain = logp(PerFit(rank=3, epochs=0, collective_epochs=0, **QUICK))
    assert torch.equal(plain, logp(ReFTAsPerFit(rank=3, epochs=0, **QUICK)))


class ReFTAsPerFit(PerFit):
    """Without any stage: an identity shift alone."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options, ablation="stage2_p")  # type: ignore[arg-type]


def test_what_stage_1_does_not_read_trains_it_once(lm: LanguageModel, tmp_path: Path) -> None:
    def key(**options: object) -> str:
        cell = Cell("perfit", PerFit(**options), "lamp4", Lamp4(), Settings(output_path=tmp_path))  # type: ignore[arg-type]
        return shared_key(lm, cell)

    usual, both = key(), key(stage2_init="from_stage1")
    assert all(
        key(**{name: value}) == usual
        for name, value in [
            ("personal_rank", 2), ("epochs", 5), ("items", 3), ("stage2_init", "fresh"), ("ablation", "stage1"),
        ]
    )  # fmt: skip
    assert len({usual, both, key(stage2_init="from_stage1", personal_rank=2), key(rank=2), key(layers=(0,))}) == 5
    one, other = (
        PerFit(rank=3, **options, **QUICK).fit(ModelKit(lm), TRAIN)
        for options in ({}, {"personal_rank": 1, "epochs": 0})
    )  # type: ignore[arg-type]
    assert one is not None and other is not None and _equal(one, other)


def test_from_stage1_every_user_goes_on_from_what_all_users_trained(lm: LanguageModel) -> None:
    method = PerFit(rank=3, personal_rank=2, stage2_init="from_stage1", epochs=0, **QUICK)
    shared = method.fit(ModelKit(lm), TRAIN)
    assert shared is not None and {name.partition(".")[0] for name in shared.tensors} == {"collective", "personal"}
    for state in _fitted(method.adapt(ModelKit(lm), USERS[:2], shared)):
        assert all(torch.equal(tensor, shared.tensors[name]) for name, tensor in state.tensors.items())
        after = method.plan(TRAIN[0].example, shared, state).streams[0].edits
    (without,) = method.adapt(ModelKit(lm), [User("new")], shared)
    assert isinstance(without, Fitted)
    for a, b in zip(after, method.plan(TRAIN[0].example, shared, without).streams[0].edits, strict=True):
        assert isinstance(a, LowRankShift) and isinstance(b, LowRankShift)
        assert a.site == b.site and torch.equal(a.weight, b.weight) and torch.equal(a.rotation, b.rotation)


def test_the_ablations_have_the_ranks_of_table_4(lm: LanguageModel) -> None:
    for ablation, rank in (("stage2_p", 2), ("stage2_cp", 5)):
        method = PerFit(rank=3, personal_rank=2, layers=(0,), ablation=ablation)  # type: ignore[arg-type]
        assert method.fit(ModelKit(lm), TRAIN) is None
        (state,) = _fitted(method.adapt(ModelKit(lm), USERS[:1], None))
        assert state.meta["parameters"] == rank * (2 * lm.sites.width + 1)
    assert list(PerFit(ablation="stage1").adapt(ModelKit(lm), USERS, None)) == [None] * len(USERS)
    with pytest.raises(UsageError, match="from_stage1 needs both stages"):
        PerFit(stage2_init="from_stage1", ablation="stage1")


def test_a_user_learns_from_pairs_whose_prompts_hold_earlier_items_alone() -> None:
    history = tuple(HistoryItem(str(n), {"text": f"word{n}"}, f"word{n}") for n in range(5))
    pairs = tuple(
        Labelled(Example(str(n), User("u", history[:n]), "word", "word", ToyTemplate()), (f"answer{n}",))
        for n in range(5)
    )
    (learner,) = ReFT(retrieval=Retrieval(k=9), items=3).learners([User("u", history, pairs)])
    assert isinstance(learner, Learner)
    assert [lesson.answer for lesson in learner.lessons] == ["answer2", "answer3", "answer4"]
    for n, lesson in zip((2, 3, 4), learner.lessons, strict=True):
        assert {item.id for item in lesson.stream.prompt.items} == {str(i) for i in range(n)}
        assert f"answer{n}" not in str(lesson.stream.prompt)


def test_a_user_without_pairs_gets_no_shift_of_their_own(lm: LanguageModel) -> None:
    user = User("new")
    for method, left in ((ReFT(), 0), (PerFit(rank=3, layers=(1,)), 1)):
        shared = method.fit(ModelKit(lm), TRAIN)
        (state,) = _fitted(method.adapt(ModelKit(lm), [user], shared))
        assert len(method.plan(TRAIN[0].example, shared, state).streams[0].edits) == left


def test_perfit_without_a_collective_stage_says_what_to_do() -> None:
    with pytest.raises(HarnessError, match="collective stage was not trained; run 'harness fit --method perfit'"):
        PerFit().plan(TRAIN[0].example, None, None)


def test_first_and_last_positions_never_overlap_and_may_have_weights_of_their_own(lm: LanguageModel) -> None:
    import numpy as np

    from harness.plan import FirstLast, Layout

    for prompt_len in range(1, 9):
        first, last = (where(np.arange(12), Layout(prompt_len)) for where in (FirstLast(3, 0), FirstLast(0, 3)))
        assert not (first & last).any()
        assert first.sum() == last.sum() == min(3, prompt_len // 2)
        assert ((first | last) == FirstLast(3, 3)(np.arange(12), Layout(prompt_len))).all()
    method = ReFT(rank=2, layers=(0, 1), positions="f3+l3", share_weights=False)
    (state,) = _fitted(method.adapt(ModelKit(lm), USERS[:1], None))
    assert state.tensors["personal.rotation"].shape == (4, 2, lm.sites.width)
    assert [e.where for e in method.plan(TRAIN[0].example, None, state).streams[0].edits] == [
        FirstLast(3, 0), FirstLast(0, 3), FirstLast(3, 0), FirstLast(0, 3),
    ]  # fmt: skip
