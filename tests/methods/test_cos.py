"""Context steering: the paper's equations by hand, its two zero points, the contract in every family."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from harness.engine.decode import Decoder
from harness.engine.model import LanguageModel
from harness.engine.sites import FAMILIES
from harness.errors import UsageError
from harness.methods.cad import CAD
from harness.methods.cos import CoS
from harness.mix import ContextSum, Contrast
from harness.plan import Mix, Plan, Stream, StreamOutput
from harness.plugins.options import build_method
from harness.run.contract import check_method, random_lm, toy_examples

WITHOUT = [0.5, 0.3, 0.2]
FIRST = [0.2, 0.6, 0.2]
SECOND = [0.4, 0.3, 0.3]


def _mixed(mix: Mix, *streams: list[float]) -> list[float]:
    return mix([StreamOutput(torch.tensor([[p]], dtype=torch.float64).log()) for p in streams])[0, 0].exp().tolist()


def _normalised(*weights: float) -> list[float]:
    return pytest.approx([w / sum(weights) for w in weights])


def test_one_context_is_amplified_by_hand() -> None:
    # p_C^(1 + lambda) / p_0^lambda
    assert _mixed(Contrast(2.0), FIRST, WITHOUT) == _normalised(0.2**3 / 0.5**2, 0.6**3 / 0.3**2, 0.2)
    assert _mixed(Contrast(-0.5), FIRST, WITHOUT) == _normalised(
        *((p * q) ** 0.5 for p, q in zip(FIRST, WITHOUT, strict=True))
    )


def test_several_contexts_are_added_by_hand() -> None:
    # p_0^(1 - 2 + 0.5) p_1^2 / p_2^0.5
    expected = [p0**-0.5 * p1**2 / p2**0.5 for p0, p1, p2 in zip(WITHOUT, FIRST, SECOND, strict=True)]
    assert _mixed(ContextSum((2.0, -0.5)), WITHOUT, FIRST, SECOND) == _normalised(*expected)


def test_the_two_forms_have_their_own_zero_points() -> None:
    assert _mixed(Contrast(0.0), FIRST, WITHOUT) == pytest.approx(FIRST)
    assert _mixed(Contrast(-1.0), FIRST, WITHOUT) == pytest.approx(WITHOUT)
    assert _mixed(ContextSum((0.0, 0.0)), WITHOUT, FIRST, SECOND) == pytest.approx(WITHOUT)
    assert _mixed(ContextSum((0.0, 1.0)), WITHOUT, FIRST, SECOND) == pytest.approx(SECOND)
    for lam in (-2.0, 0.5, 3.0):
        assert _mixed(ContextSum((lam + 1,)), WITHOUT, FIRST) == pytest.approx(_mixed(Contrast(lam), FIRST, WITHOUT))


def test_a_token_ruled_out_without_context_leaves_no_nan() -> None:
    ruled_out = torch.tensor([[[1.0, -math.inf, 0.0]]])
    for weights in ((1.0,), (0.0,), (0.5,)):
        out = ContextSum(weights)([StreamOutput(ruled_out), StreamOutput(torch.zeros(1, 1, 3))])
        assert not out.isnan().any()


def test_lambda_is_cads_alpha(lm: LanguageModel) -> None:
    decoder = Decoder(lm)
    for item in toy_examples(3):
        plans = [method.plan(item.example, None, None) for method in (CoS(lam=0.7), CAD(alpha=0.7))]
        (a, b) = decoder.distributions([decoder.prepare("x", plan, 4) for plan in plans], [(5, 6, 7)] * 2)
        assert torch.allclose(a, b, atol=1e-12)


def test_minus_one_is_the_plain_prompt(lm: LanguageModel) -> None:
    decoder, (item,) = Decoder(lm), toy_examples(1)
    plain = Plan((Stream(item.example.prompt()),))
    for method in (CoS(lam=-1.0), build_method(CoS, "cos", None, ["lam=0,0", "k=2"])):
        plans = method.plan(item.example, None, None), plain
        (a, b) = decoder.distributions([decoder.prepare("x", plan, 4) for plan in plans], [(5, 6, 7)] * 2)
        assert torch.allclose(a, b, atol=1e-10)


def test_each_item_is_a_context_of_its_own_and_a_short_history_has_fewer() -> None:
    (item,) = toy_examples(1)
    history = item.example.user.history
    method = build_method(CoS, "cos", None, ["lam=1,2,3,4,5", "k=5"])
    plan = method.plan(item.example, None, None)
    assert len(history) < 5
    best_first = method.retrieval.prompt(item.example).items
    assert [stream.prompt.items for stream in plan.streams] == [(), *((record,) for record in best_first)]
    assert plan.mix == ContextSum((1.0, 2.0, 3.0, 4.0, 5.0)[: len(history)])
    stranger = dataclasses.replace(item.example, user=dataclasses.replace(item.example.user, history=()))
    assert len(method.plan(stranger, None, None).streams) == 1


def test_a_lambda_without_an_item_is_an_error() -> None:
    with pytest.raises(UsageError, match="lam names 2 contexts and k=5"):
        build_method(CoS, "cos", None, ["lam=1,2"])
    with pytest.raises(UsageError, match="not finite"):
        CoS(lam=math.inf)
    assert build_method(CoS, "cos", None, ["lam=-2"]).lam == -2.0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_contract_holds_in_every_family(family: str) -> None:
    check_method(CoS(lam=-0.5), lm=random_lm(family))


def test_the_contract_holds_item_by_item() -> None:
    check_method(build_method(CoS, "cos", None, ["lam=1.5,-0.5,1", "k=3"]))
