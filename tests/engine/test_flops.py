"""Operations are counted as torch counts them, and the DPS paper's estimate gives its six numbers."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from harness.data import Prompt
from harness.edits import ScaleHeads
from harness.engine.decode import Decoder
from harness.engine.flops import SIZES, Sizes, decoding, dps_estimate
from harness.engine.model import LanguageModel
from harness.engine.sites import FAMILIES
from harness.mix import Contrast, First
from harness.plan import Exit, Generated, LoRA, Plan, Sampling, Site, Stream
from harness.run.contract import ToyTemplate, random_lm

WINDOWED = {
    "mistral": {"sliding_window": 12},
    "qwen2": {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    "gemma3_text": {"sliding_window": 12},
}
MODELS = [(family, {}) for family in FAMILIES] + list(WINDOWED.items())
PUBLIC = {
    "llama3-8b": ("llama", 8_030_261_248),
    "llama3.2-1b": ("llama", 1_235_814_400),
    "llama2-7b": ("llama", 6_738_415_616),
    "qwen2-7b": ("qwen2", 7_615_616_512),
    "qwen2.5-7b": ("qwen2", 7_615_616_512),
    "mistral-7b": ("mistral", 7_248_023_552),
    "vicuna-13b": ("llama", 13_015_864_320),
}
"""Alias -> architecture and number of parameters, as the model pages give it."""


def _counted(run: Any) -> int:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        run()
    return counter.get_total_flops()


def _eager(family: str, config: dict[str, Any]) -> Any:
    lm = random_lm(family, dtype=torch.float32, **config)
    lm.model.set_attn_implementation("eager")
    return lm


@pytest.mark.parametrize(("family", "config"), MODELS, ids=str)
def test_blocks_and_head_equal_torchs_counter(family: str, config: dict[str, Any]) -> None:
    lm = _eager(family, config)
    sizes = Sizes.of(lm.model.config.to_dict())
    cache = lm.new_cache()
    for tokens, past in ((20, 0), (1, 20), (3, 21), (1, 24)):  # beyond the window of twelve, then on its cache
        ids = torch.randint(3, 200, (2, tokens))
        positions = torch.arange(past, past + tokens).expand(2, -1)
        mask = torch.ones(2, past + tokens, dtype=torch.long)
        hidden: list[torch.Tensor] = []

        def run(ids=ids, mask=mask, positions=positions, hidden=hidden) -> None:
            hidden.append(lm.hidden(ids, mask=mask, positions=positions, cache=cache))

        assert _counted(run) == 2 * sizes.blocks(tokens, past)
        assert _counted(lambda hidden=hidden: lm.logits(hidden[0])) == sizes.head(2 * tokens)


def _plans(lm: LanguageModel) -> list[Plan]:
    """Prompts of different lengths; a shared prefill, an unshared one, an early exit, an adapter."""
    a, b, c, d = (Prompt(ToyTemplate(), "word " * n) for n in (2, 9, 5, 14))
    sites = lm.sites
    masked = (ScaleHeads(1, ((0, 0.0),), sites.head_dim),)
    plans = [
        Plan((Stream(a), Stream(a, masked)), Contrast(0.5)),
        Plan((Stream(b), Stream(c)), Contrast(0.5)),
        Plan((Stream(d, exits=(Exit(Site(0, "block_out")),)),)),
    ]
    if lm.model.config.model_type != "gpt2":
        name = "model.layers.1.self_attn.q_proj"
        out, into = lm.model.get_submodule(name).weight.shape
        lora = LoRA("one", {name: (torch.ones(3, into), torch.ones(out, 3))})
        plans.append(Plan((Stream(c, adapters=(lora,)),)))
    return plans


@pytest.mark.parametrize(("family", "config"), MODELS, ids=str)
def test_the_cost_of_a_run_equals_torchs_counter_on_the_same_passes(family: str, config: dict[str, Any]) -> None:
    lm = _eager(family, config)
    decoder = Decoder(lm)
    requests = [decoder.prepare(str(i), plan, 12) for i, plan in enumerate(_plans(lm))]
    answers: list[Generated] = []
    sampling = Sampling(temperature=2.0)  # answers end at different steps, so that finished rows are dropped
    lm.encoder.eos_ids = frozenset(range(3, 60))
    assert _counted(lambda: answers.extend(decoder.generate(requests, max_new_tokens=12, sampling=sampling))) == (
        decoder.cost.flops
    )
    assert len({len(answer.ids) for answer in answers}) > 1
    decoder = Decoder(lm)  # one that keeps no beginning: what is reused is counted as if it ran again
    scored = _counted(lambda: decoder.score(requests, [answer.ids for answer in answers]))
    assert scored == decoder.cost.flops


@pytest.mark.parametrize("streams", [1, 2])
def test_the_tables_count_is_what_the_engine_does_for_one_sample(streams: int) -> None:
    lm = random_lm()
    lm.encoder.eos_ids = frozenset()
    decoder = Decoder(lm)
    prompt = Prompt(ToyTemplate(), "some words to answer")
    masked = Stream(prompt, (ScaleHeads(1, ((0, 0.0),), lm.sites.head_dim),))
    plan = Plan((Stream(prompt), masked)[:streams], Contrast(0.5) if streams == 2 else First())
    request = decoder.prepare("x", plan, 7)
    decoder.generate([request], max_new_tokens=7)
    assert decoder.cost.flops == decoding(lm.sizes, request.tokens, 7, streams)


@pytest.mark.parametrize("alias", SIZES)
def test_an_alias_has_the_sizes_of_its_public_model(alias: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    s, (family, parameters) = SIZES[alias], PUBLIC[alias]
    config = AutoConfig.for_model(
        family, num_hidden_layers=s.layers, hidden_size=s.width, num_attention_heads=s.heads, head_dim=s.head_dim,
        num_key_value_heads=s.kv_heads, intermediate_size=s.mlp, vocab_size=s.vocabulary, sliding_window=None,
        tie_word_embeddings=alias == "llama3.2-1b",
    )  # fmt: skip
    assert Sizes.of(config.to_dict()) == s
    with torch.device("meta"):  # shapes without weights
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.bfloat16)
        ids = torch.ones(1, 512, dtype=torch.long)
    assert model.num_parameters() == parameters
    counted = _counted(lambda: model(input_ids=ids, attention_mask=ids, logits_to_keep=7, use_cache=False))
    assert counted == s.blocks(512) + s.head(7)


@pytest.mark.parametrize(
    ("prompt", "baseline", "dps"), [(512, "6.57", "6.96"), (1024, "13.04", "13.43"), (2048, "26.80", "27.21")]
)
def test_the_reconstructed_estimate_gives_the_papers_six_numbers(prompt: int, baseline: str, dps: str) -> None:
    sizes = SIZES["llama3-8b"]
    printed = [f"{dps_estimate(sizes, prompt, 32, streams) / 1e12:.2f}" for streams in (1, 2)]
    assert printed == [baseline, dps]


def test_counting_needs_no_torch() -> None:
    code = "import sys, harness.engine.flops; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
