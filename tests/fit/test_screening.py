"""First-order screening: the estimate is the derivative it claims to be, and its shortlist holds the heads that matter."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from harness.edits import Replace
from harness.engine.capture import capture
from harness.engine.decode import Decoder
from harness.engine.loading import load_model
from harness.engine.prompt_variants import Beginnings, score_variants
from harness.engine.sites import FAMILIES
from harness.errors import UsageError
from harness.fit.heads import Head, Operator, mask
from harness.fit.kit import ModelKit
from harness.fit.screening import SLACK, first_order, reach, recall, shortlist, until_sure
from harness.method import Fitted, Retrieval
from harness.methods.dps import DPS
from harness.plan import ALL, DECODE, Plan, Site, Stream, Where
from harness.plugins.registry import model_row, task_class
from harness.run.contract import check_method, random_lm, toy_examples
from harness.task import Selection


@pytest.mark.parametrize("where", [DECODE, ALL], ids=repr)
@pytest.mark.parametrize("operator", ["zero", "uniform"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_estimate_is_the_slope_of_the_loss_from_the_heads_output_to_the_masked_one(
    family: str, operator: Operator, where: Where
) -> None:
    lm, (item, *_) = random_lm(family), toy_examples(2)
    plan, answer = Plan((Stream(Retrieval().prompt(item.example)),)), (70, 90, 20, 50)
    request = Decoder(lm).prepare("x", plan, len(answer))
    prompt = request.prompts[0].encoded
    estimates = first_order(lm, prompt, answer, operator, where)
    assert estimates.shape == (lm.sites.layers, lm.sites.heads)
    for layer, head in [(0, 1), (1, 2), (2, 3)]:
        site = Site(layer, "heads_out")
        edits = mask({(layer, head): 0.0}, operator, lm.sites.head_dim, where)
        masked = Decoder(lm).prepare("x", Plan((Stream(plan.streams[0].prompt, edits),)), len(answer))
        was, becomes = (capture(lm, [r], [site], where, [answer[:-1]])[0][site] for r in (request, masked))
        start, step = (len(prompt.ids) - 1 if where is DECODE else 0), 2**-9
        ways = [(Replace(site, was + s * (becomes - was), where, start),) for s in (step, -step)]
        ahead, behind = -score_variants(lm, prompt, answer, ways).mean(dim=1)
        assert float(estimates[layer, head]) == pytest.approx(float(ahead - behind) / (2 * step), rel=1e-2, abs=2e-4)


def test_groups_of_samples_share_a_shortlist():
    first = torch.tensor([[4.0, 3.0], [2.0, 1.0]])
    second = torch.tensor([[0.0, 1.0], [2.0, -3.0]])  # size counts, not sign
    estimates = torch.stack([first, second, second])
    assert shortlist(first[None], 2) == [(0, 0), (0, 1)]
    assert shortlist(estimates, 2, [[0], [1, 2]]) == [(0, 0), (1, 1)]
    assert shortlist(estimates, 9, [[0], [], [1, 2]]) == [(0, 0), (1, 1), (0, 1), (1, 0)]
    assert recall(second[None], estimates, 2, 2) == 0.5


def test_the_heads_that_matter_to_the_embedded_model_are_on_a_short_list():
    lm, task = load_model(model_row("tiny"), device="cpu"), task_class("lamp3")()
    kit, sites = ModelKit(lm, max_new_tokens=8), lm.sites
    items = kit.sample(task.items(Selection("train")), 16)
    plans = [Plan((Stream(Retrieval().prompt(item.example)),)) for item in items]
    targets = [item.targets[0] for item in items]
    every = [(layer, head) for layer in range(sites.layers) for head in range(sites.heads)]
    losses = kit.losses(plans, targets, [(), *(mask({head: 0.0}, "zero", sites.head_dim, DECODE) for head in every)])
    exact = (losses[:, 1:] - losses[:, :1]).view(len(items), sites.layers, sites.heads)
    estimates = kit.screen(plans, targets, "zero", DECODE)
    assert recall(exact, estimates, 4, len(every)) == 1
    assert recall(exact, estimates, 4, 12) >= 0.5  # 0.3 by chance


@pytest.mark.parametrize("clusters", [0, 2])
def test_screened_heads_are_measured_as_without_screening_and_no_others(clusters: int) -> None:
    lm, train = random_lm(), toy_examples(6)
    method = DPS(samples=6, heads=2, clusters=clusters)
    whole = method.fit(ModelKit(lm), train).tensors["pcs"]
    shared = DPS(samples=6, heads=2, clusters=clusters, screen=5).fit(ModelKit(lm), train)
    pcs, listed = shared.tensors["pcs"], {(layer, head) for layer, head in shared.meta["shortlist"]}
    measured = ~pcs.isnan()
    assert {tuple(head) for head in measured[0].nonzero().tolist()} == listed
    assert len(listed) == 5
    assert torch.allclose(pcs[measured], whole[measured], atol=1e-12)
    assert {(layer, head) for layer, head in shared.meta["heads"]} == listed
    assert shared.meta["scores"] == sorted(shared.meta["scores"], reverse=True)
    assert not any(map(math.isnan, shared.meta["scores"]))


def test_heads_are_measured_until_no_other_can_be_among_the_best():
    exact = torch.tensor([[[5.0, 4.0, 0.1, 0.2], [0.0, -1.0, 0.3, 3.0]]])
    estimates = torch.tensor([[[4.0, -5.0, 0.1, 0.1], [0.1, 0.1, 0.1, 1.0]]])  # at most 3 times too small
    asked: list[list[Head]] = []

    def measure(heads: list[Head]) -> torch.Tensor:
        asked.append(heads)
        return torch.stack([exact[:, layer, head] for layer, head in heads], dim=1)

    found, measured, margin, closest = until_sure(estimates, 1, (), measure)
    assert asked == [[(0, 1), (0, 0), (1, 3), (1, 0)]], "the two of largest estimate, and two of each block"
    assert measured == asked[0]
    assert found.isnan().sum() == 4
    assert margin == 3 * SLACK, "head (1, 3) has 3 and was estimated 1"
    assert closest == pytest.approx(0.1 * margin / 5)
    found, measured, _, closest = until_sure(estimates, 3, (), measure)
    assert len(measured) == 6 and found.isnan().sum() == 2, "2 K, the others cannot reach 3"
    found, measured, _, closest = until_sure(estimates, 4, (), measure)
    assert len(measured) == 8 and torch.equal(found, exact) and closest == 0
    seen = torch.where(torch.tensor([[[True, True, False, False], [False] * 3 + [True]]]), exact, math.nan)
    assert float(reach(estimates, seen, 2)[0].amax()) < 1
    assert float(reach(estimates.clamp(max=0.1).abs(), seen, 3)[0].amax()) > 1, "those left are as large as any"
    assert reach(estimates, seen - 4.5, 3)[0].isinf().any(), "the third best is negative: anything may be better"


def test_a_margin_is_that_of_the_block_and_those_beside_it() -> None:
    estimates, exact = (
        torch.ones(1, 4, 2),
        torch.tensor([[[2.0, math.nan], [0.5, math.nan], [1.0, math.nan], [1.0, math.nan]]]),
    )
    share, margin = reach(estimates, exact, 1)
    assert share.tolist() == [[0, SLACK], [0, SLACK], [0, SLACK / 2], [0, SLACK / 2]]
    assert margin == 2 * SLACK


@pytest.mark.parametrize("clusters", [0, 2])
def test_the_bound_finds_the_best_heads_of_the_exact_ranking(clusters: int) -> None:
    lm, train = random_lm(num_hidden_layers=6), toy_examples(6)
    options = {"samples": 6, "heads": 2, "clusters": clusters}
    whole, shared = (DPS(**options, screen=screen).fit(ModelKit(lm), train) for screen in (None, "bound"))
    measured = ~shared.tensors["pcs"].isnan()
    assert torch.allclose(shared.tensors["pcs"][measured], whole.tensors["pcs"][measured], atol=1e-12)
    assert shared.meta["heads"][:2] == whole.meta["heads"][:2]
    assert len(shared.meta["shortlist"]) == int(measured[0].sum())
    said = DPS(**options, screen="bound").analysis(shared, {})["screening"]
    assert (said["measured"], said["of"], said["best"]) == (int(measured[0].sum()), 24, 2)
    assert said["guarantee"] == "empirical" and said["margin"] >= SLACK and said["closest"] < 1


def test_models_above_100_heads_are_screened_by_default_and_records_of_others_keep_their_names() -> None:
    method = DPS(samples=2, heads=2)
    assert method.decided(100).identity() == DPS(samples=2, heads=2, screen="all").identity()
    assert method.decided(100).identity()["screen"] is None, "as in the records of before"
    assert method.decided(101).identity()["screen"] == "bound"
    assert "heads" in method.decided(101).fit_reads() and not method.decided(100).fit_reads()
    for options in ({"scope": "all"}, {"discover_operator": "output_slice"}, {"screen": "all"}, {"screen": None}):
        assert replace(method, **options).decided(1000).identity()["screen"] is None
    small = random_lm()
    assert "shortlist" not in method.fit(ModelKit(small), toy_examples(2)).meta
    large = random_lm(num_hidden_layers=13, num_attention_heads=8, num_key_value_heads=4, hidden_size=32)
    shared = method.fit(ModelKit(large), toy_examples(2))
    assert shared.meta["bound"]["best"] == 2
    whole = replace(method, screen="all").fit(ModelKit(large), toy_examples(2)).tensors["pcs"]
    measured = ~shared.tensors["pcs"].isnan()
    assert torch.allclose(shared.tensors["pcs"][measured], whole[measured], atol=1e-12)


def test_a_prompt_that_is_kept_runs_once_and_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, (item, *_) = random_lm(), toy_examples(2)
    plan, answer = Plan((Stream(Retrieval().prompt(item.example)),)), (70, 90, 20, 50)
    prompt = Decoder(lm).prepare("x", plan, len(answer)).prompts[0].encoded
    ways = [(), mask({(1, 1): 0.0}, "zero", lm.sites.head_dim, DECODE)]
    estimates, scores = first_order(lm, prompt, answer, "uniform", DECODE), score_variants(lm, prompt, answer, ways)
    kept, ran, hidden = Beginnings(lm, 1 << 30), [], lm.hidden
    monkeypatch.setattr(lm, "hidden", lambda ids, **named: ran.append(ids.shape[1]) or hidden(ids, **named))
    for _ in range(2):
        assert torch.equal(score_variants(lm, prompt, answer, ways, kept), scores)
        assert torch.equal(first_order(lm, prompt, answer, "uniform", DECODE, kept), estimates)
    assert ran.count(len(prompt.ids) - 1) == 1
    ran.clear()
    score_variants(lm, prompt, answer, ways, Beginnings(lm))
    assert ran.count(len(prompt.ids) - 1) == 1


def test_a_shortlist_whose_end_holds_a_preference_head_is_called_too_short():
    heads = [[0, 1], [1, 0], [0, 0]]
    meta = {"heads": heads, "scores": [3.0, 2.0, 1.0], "layers": 2, "heads_a_layer": 2, "split_half_spearman": 1.0}
    method = DPS(heads=2, screen=3)
    assert not method.review(Fitted(meta={**meta, "shortlist": [[1, 0], [0, 1], [0, 0]]}))
    (line,) = method.review(Fitted(meta={**meta, "shortlist": [[1, 0], [0, 0], [0, 1]]}))
    assert "place 3 of the 3" in line
    with pytest.raises(UsageError, match="screen >= heads"):
        DPS(heads=3, screen=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"screen": 2}, "fewer than the 4 heads to mask"), ({"heads": 200}, "this model has 100")],
)
def test_heads_that_cannot_be_masked_are_refused_before_a_discovery(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, int], message: str
) -> None:
    monkeypatch.setattr(ModelKit, "_by_sample", lambda *_: pytest.fail("a discovery began"))
    lm = random_lm(num_hidden_layers=10, num_attention_heads=10, num_key_value_heads=5, hidden_size=40)
    with pytest.raises(UsageError, match=message):
        DPS(samples=2, **options).fit(ModelKit(lm), toy_examples(2))


def test_dps_with_screening_keeps_the_engines_promises():
    check_method(DPS(samples=4, heads=2, screen=6, clusters=2))
