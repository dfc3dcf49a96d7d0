"""Attention patterns are read as the model computes them, in batches, and reading leaves no trace."""

from __future__ import annotations

import copy

import pytest
import torch

from harness.data import Prompt
from harness.edits import ScaleQueries
from harness.engine.capture import capture, most_attended
from harness.engine.decode import Decoder
from harness.engine.model import LanguageModel
from harness.engine.rows import Request
from harness.engine.sites import FAMILIES
from harness.plan import ALL, DECODE, Edit, Plan, Site, Stream
from harness.run.contract import ToyTemplate, random_lm

WINDOWED = {
    "mistral": {"sliding_window": 12},
    "qwen2": {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    "gemma3_text": {"sliding_window": 12},
}


@pytest.fixture(params=[(f, {}) for f in FAMILIES] + list(WINDOWED.items()), ids=str, scope="module")
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    family, config = request.param
    return random_lm(family, **config)


def _request(lm: LanguageModel, text: str, edits: tuple[Edit, ...] = ()) -> Request:
    return Decoder(lm).prepare(text, Plan((Stream(Prompt(ToyTemplate(), text), edits),)), 8)


def test_patterns_are_those_of_the_eager_model(lm: LanguageModel) -> None:
    request = _request(lm, "a prompt longer than twelve tokens")
    sites = [Site(layer, "pattern") for layer in range(lm.sites.layers)]
    (read,) = capture(lm, [request], sites, ALL)
    eager = copy.deepcopy(lm.model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = eager(torch.tensor([request.prompts[0].encoded.ids]), output_attentions=True).attentions
    for site in sites:
        assert torch.allclose(read[site], theirs[site.layer][0].transpose(0, 1), atol=1e-5)


def test_a_pattern_read_in_a_padded_batch_equals_the_row_alone(lm: LanguageModel) -> None:
    requests = [_request(lm, text) for text in ("short", "a much longer prompt than that", "middle one")]
    answers = [(5, 6, 7), (8,), (9, 10)]
    site = Site(1, "pattern")
    together = capture(lm, requests, [site], DECODE, answers)
    winners = most_attended(lm, requests, answers)
    for request, answer, batched, best in zip(requests, answers, together, winners, strict=True):
        (alone,) = capture(lm, [request], [site], DECODE, [answer])
        assert torch.allclose(batched[site], alone[site], atol=1e-10)
        assert best.shape == (len(answer), lm.sites.layers, lm.sites.heads)
        assert torch.equal(best[:, 1], alone[site][: len(answer)].argmax(-1))


def test_a_head_whose_query_is_zero_attends_uniformly() -> None:
    lm = random_lm()
    request = _request(lm, "some words", (ScaleQueries(1, ((2, 0.0),), lm.sites.head_dim, DECODE),))
    (read,) = capture(lm, [request], [Site(1, "pattern")], DECODE)
    length = request.tokens
    assert torch.allclose(read[Site(1, "pattern")][0, 2], torch.full((length,), 1 / length, dtype=torch.float64))
    assert not torch.allclose(read[Site(1, "pattern")][0, 1], read[Site(1, "pattern")][0, 2])


def test_reading_leaves_the_model_as_found_also_after_an_exception() -> None:
    lm = random_lm()
    request = _request(lm, "some words")
    configs = [lm.sites.attention(layer).config for layer in range(lm.sites.layers)]

    def explode(*_: object) -> None:
        raise RuntimeError("boom")

    handle = lm.sites.final_norm.register_forward_pre_hook(explode)
    with pytest.raises(RuntimeError, match="boom"):
        most_attended(lm, [request], [(5, 6)])
    handle.remove()
    assert [lm.sites.attention(layer).config for layer in range(lm.sites.layers)] == configs
    assert all(config._attn_implementation == "sdpa" for config in configs)
