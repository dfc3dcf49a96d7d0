"""DoLa: the paper's equations by hand, its candidate layers, the contract in every family."""

from __future__ import annotations

import math

import pytest
import torch

from harness.engine.decode import Decoder
from harness.engine.sites import FAMILIES
from harness.errors import UsageError
from harness.methods.dola import DoLa, EarlyLayers
from harness.mix import LayerContrast
from harness.plan import Plan, StreamOutput
from harness.plugins.options import build_method
from harness.run.contract import check_method, random_lm, toy_examples

P_N = [0.6, 0.3, 0.1]
SHIFTED = [0.2, 0.4, 0.4]
SHARPER = [0.6999, 0.3, 0.0001]
"""Nearer to P_N than SHIFTED is, but with almost no weight on the last token, which the reversed KL punishes."""


def _logits(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()[:, None]


def _mixed(mix: LayerContrast, final: list[float], *exits: list[float]) -> list[float]:
    return mix([StreamOutput(_logits(final), tuple(_logits(e) for e in exits))])[0, 0].exp().tolist()


def test_the_score_is_the_ratio_to_the_farthest_layer_by_hand() -> None:
    # ratios to SHIFTED: 3, 0.75, 0.25, of which the last token is below 0.2 * 0.6
    assert _mixed(LayerContrast(0.2), P_N, P_N, SHIFTED, SHARPER) == pytest.approx([3 / 3.75, 0.75 / 3.75, 0])
    assert _mixed(LayerContrast(0.0), P_N, P_N, SHIFTED, SHARPER) == pytest.approx([0.75, 0.1875, 0.0625])


def test_half_the_strength_is_the_ratio_to_the_root_by_hand() -> None:
    ratios = [p / math.sqrt(q) for p, q in zip(P_N, SHIFTED, strict=True)]
    assert _mixed(LayerContrast(0.0, strength=0.5), P_N, SHIFTED) == pytest.approx([r / sum(ratios) for r in ratios])


def test_the_divergence_is_jensen_shannons_and_the_released_one_swaps_its_arguments() -> None:
    middle = [(p + q) / 2 for p, q in zip(P_N, SHIFTED, strict=True)]

    def kl(p: list[float], q: list[float]) -> float:
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))

    final, early = _logits(P_N), _logits(SHIFTED)
    paper = (kl(P_N, middle) + kl(SHIFTED, middle)) / 2
    assert LayerContrast()._distance(final, early).item() == pytest.approx(paper)
    released = (kl(middle, P_N) + kl(middle, SHIFTED)) / 2
    assert LayerContrast(reversed_kl=True)._distance(final, early).item() == pytest.approx(released)
    to_sharper = [p / q for p, q in zip(P_N, SHARPER, strict=True)]
    chosen = _mixed(LayerContrast(0.0, reversed_kl=True), P_N, SHIFTED, SHARPER)
    assert chosen == pytest.approx([r / sum(to_sharper) for r in to_sharper])


def test_each_row_and_position_chooses_its_own_layer() -> None:
    final = _logits(P_N).expand(2, 2, 3)
    near, far = _logits(P_N)[0, 0], _logits(SHIFTED)[0, 0]
    one = torch.stack([torch.stack([near, far]), torch.stack([far, near])])
    other = torch.stack([torch.stack([far, near]), torch.stack([near, far])])
    mixed = LayerContrast(0.0)([StreamOutput(final, (one, other))])
    assert torch.allclose(mixed.exp(), torch.tensor([0.75, 0.1875, 0.0625], dtype=torch.float64).expand(2, 2, 3))


def test_a_token_the_model_rules_out_stays_out_and_leaves_no_nan() -> None:
    final, early = torch.tensor([[[1.0, -math.inf, 0.0]]]), torch.tensor([[[0.0, -math.inf, 1.0]]])
    for mix in (LayerContrast(), LayerContrast(0.0), LayerContrast(strength=0.0), LayerContrast(reversed_kl=True)):
        out = mix([StreamOutput(final, (early, final))])
        assert not out.isnan().any()
        assert out[0, 0, 1] == -math.inf


@pytest.mark.parametrize(
    ("layers", "depth", "tied", "expected"),
    [
        ("low", 32, False, tuple(range(0, 16, 2))),
        ("high", 32, False, tuple(range(16, 32, 2))),
        ("low", 28, False, tuple(range(0, 14, 2))),
        ("low", 32, True, tuple(range(2, 16, 2))),
        ("low", 60, False, tuple(range(0, 20, 2))),
        ("high", 60, False, tuple(range(40, 60, 2))),
        ("low", 5, True, (2,)),
        ("low", 2, True, (1,)),
        ("low", 1, True, (0,)),
        ((0, 3), 5, True, (0, 3)),
    ],
)
def test_candidate_layers_are_those_of_the_released_code(
    layers: object, depth: int, tied: bool, expected: tuple[int, ...]
) -> None:
    exits = EarlyLayers(layers, True)(depth, tied=tied)  # type: ignore[arg-type]
    assert tuple(exit.site.layer for exit in exits) == expected
    assert {exit.site.part for exit in exits} == {"block_in"}


def test_layer_numbers_come_from_the_command_line_and_must_exist() -> None:
    method = build_method(DoLa, "dola", None, ["layers=0,7"])
    assert method.layers == (0, 7)
    lm = random_lm()
    (item,) = toy_examples(1)
    with pytest.raises(UsageError, match="layers 0,7 do not all exist before the last; this model has 0 to 2"):
        Decoder(lm).prepare("x", method.plan(item.example, None, None), 8)
    with pytest.raises(UsageError, match="'low' or 'high' or int numbers as in 1,2"):
        build_method(DoLa, "dola", None, ["layers=middle"])
    for option in ("relative_top=1.5", "strength=-1"):
        with pytest.raises(UsageError, match="allowed"):
            build_method(DoLa, "dola", None, [option])


def test_an_early_exit_is_the_head_on_the_residual_that_enters_the_block() -> None:
    lm = random_lm()
    decoder, (item,) = Decoder(lm), toy_examples(1)
    for final_norm in (True, False):
        method = DoLa(layers=(1,), final_norm=final_norm, relative_top=0.0)
        request = decoder.prepare("x", method.plan(item.example, None, None), 4)
        (logp,) = decoder.distributions([request], [(5, 6, 7)])
        ids = torch.tensor([[*request.prompts[0].encoded.ids, 5, 6]])
        with torch.no_grad():
            out = lm.model(ids, output_hidden_states=True)
            early = out.hidden_states[1][0, -3:]
            early = lm.model.lm_head(lm.model.model.norm(early) if final_norm else early).log_softmax(-1)
        expected = (out.logits[0, -3:].log_softmax(-1) - early).log_softmax(-1)
        assert torch.allclose(logp, expected, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_contract_holds_in_every_family(family: str) -> None:
    check_method(DoLa(layers=(0, 1, 2)), lm=random_lm(family))


@pytest.mark.parametrize("preset", [None, "released"])
def test_the_contract_holds_with_a_tied_head(preset: str | None) -> None:
    check_method(build_method(DoLa, "dola", preset, ()), lm=random_lm(tie_word_embeddings=True))


def test_a_plan_that_only_reads_early_layers_changes_something() -> None:
    (item,) = toy_examples(1)
    plan = DoLa().plan(item.example, None, None)
    assert isinstance(plan, Plan)
    assert plan.changes
