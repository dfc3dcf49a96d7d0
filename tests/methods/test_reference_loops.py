"""Every contrastive method gives the tokens of an independent loop: batch 1, one pass after another, no engine.

The loops below know transformers and torch only. They follow the papers, and for the preset `released` the published
code: prefill the prompt without its last token, then feed one token at a time to every pass, each with its own cache.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from harness.data import Example, Message
from harness.engine.decode import Decoder
from harness.engine.loading import load_model
from harness.engine.sites import widen_norms
from harness.method import Fitted, Retrieval
from harness.plugins.options import build_method
from harness.plugins.registry import ModelRow, method_class, task_class
from harness.task import Selection
from harness.tiny import MODEL_DIR

SHARED = Path(os.environ.get("HARNESS_SHARED", "../shared/data"))
PROMPTS, NEW_TOKENS, ITEMS = 50, 6, 2
HEADS = [(1, 2), (2, 5), (3, 0), (4, 7)]
"""Heads that are masked; which ones does not matter here. Both models have 5 blocks of 8 heads."""

NEAR = 1 / (1 + math.exp(-(0.7 - 0.4) / 0.5))
"""Share in the first of two clusters of a user 0.4 from its centroid and 0.7 from the other's, at temperature 0.5."""
SCALES = [1 - NEAR, 1 - NEAR / 4, NEAR, 1 - (1 - NEAR) / 2]
"""What such a user's heads are scaled by, where the first cluster weighs the first two by 1 and 1/4, the second the others by 1
and 1/2."""


@dataclasses.dataclass
class Subject:
    """A model as transformers loads it, the examples it answers, and what the harness answered to them by case."""

    model: Any
    tokenizer: Any
    examples: Sequence[Example]
    answers: dict[str, list[list[int]]] = dataclasses.field(default_factory=dict)
    looped: dict[Callable[[Subject, Example], list[int]], list[list[int]]] = dataclasses.field(default_factory=dict)
    """What the reference loops answered."""

    def __post_init__(self) -> None:
        ends = self.model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])
        self._prefilled: dict[tuple[int, ...], DynamicCache] = {}

    def ids(self, rendered: str | tuple[Message, ...]) -> tuple[int, ...]:
        assert not isinstance(rendered, str)
        if self.tokenizer.chat_template:
            turns = [{"role": message.role, "content": message.content} for message in rendered]
            ids = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        else:
            (message,) = rendered
            ids = [self.tokenizer.bos_token_id, *self.tokenizer.encode(message.content, add_special_tokens=False)]
        assert ids.count(self.tokenizer.bos_token_id) == 1
        return tuple(ids)

    def prefilled(self, ids: tuple[int, ...]) -> DynamicCache:
        """Keys and values of a prompt without its last token, from an unedited pass."""
        if ids not in self._prefilled:
            cache = DynamicCache(config=self.model.config)
            self.model(torch.tensor([ids[:-1]]), past_key_values=cache, logits_to_keep=1)
            self._prefilled[ids] = cache
        return copy.deepcopy(self._prefilled[ids])


def _load(source: Path) -> Subject:
    model = AutoModelForCausalLM.from_pretrained(str(source), dtype=torch.float64, attn_implementation="sdpa")
    widen_norms(model)
    return Subject(model.eval(), AutoTokenizer.from_pretrained(str(source)), [])


def _answered(source: Path, subject: Subject) -> Subject:
    """With the harness's answers: every method and every example in one batch."""
    lm = load_model(ModelRow(source.name, str(source), local=True), dtype="float64", device="cpu")
    decoder = Decoder(lm)
    meta = {"heads": [list(head) for head in HEADS], "scores": [1.0] * len(HEADS), "head_dim": lm.sites.head_dim}
    pcs = torch.full((2, lm.sites.layers, lm.sites.heads), -0.1, dtype=torch.float64)
    for (layer, head), sample, score in zip(HEADS, (0, 0, 1, 1), (0.8, 0.2, 0.6, 0.3), strict=True):
        pcs[sample, layer, head] = score
    meta |= {"layers": lm.sites.layers, "heads_a_layer": lm.sites.heads, "cluster_of_sample": [0, 1]}
    everyone, own = (_adapter(subject.model, seed) for seed in SEEDS)
    shared = Fitted({"pcs": pcs, **everyone}, {**meta, "key": "everyone", "scale": 1.0})
    distances = torch.tensor([0.4, 0.7], dtype=torch.float64)
    user = Fitted({"distances": distances, **own}, {"key": "own", "scale": 1.0})
    requests = []
    for case, (name, preset, settings, _) in CASES.items():
        method = build_method(method_class(name), name, preset, [*settings, f"k={ITEMS}"])
        for example in subject.examples:
            requests.append(decoder.prepare(f"{case}/{example.id}", method.plan(example, shared, user), NEW_TOKENS))
    answers = [list(answer.ids) for answer in decoder.generate(requests, max_new_tokens=NEW_TOKENS)]
    for number, case in enumerate(CASES):
        subject.answers[case] = answers[number * PROMPTS : (number + 1) * PROMPTS]
    return subject


SEEDS = (1, 2)
"""Of the adapter that all users share, and of the user's own."""


def _adapter(model: Any, seed: int) -> dict[str, Tensor]:
    """Random rank-2 matrices for every q_proj and v_proj, named as PEFT names them; B A is a third as large as the weight."""
    draw = torch.Generator().manual_seed(seed)
    made = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "v_proj")):
            out, width = module.weight.shape
            up, down = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((out, 2), (2, width)))
            size = module.weight.norm() / (3 * (up @ down).norm())
            made |= {
                f"base_model.model.{name}.lora_A.weight": down,
                f"base_model.model.{name}.lora_B.weight": up * size,
            }
    return made


def _merged(subject: Subject, *seeds: int) -> Subject:
    """The model with the adapters of these seeds added to its weights."""
    adapters = [_adapter(subject.model, seed) for seed in seeds]
    model = copy.deepcopy(subject.model)
    for adapter in adapters:
        for name in (name for name in adapter if name.endswith("lora_A.weight")):
            module = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            module.weight.data += adapter[name.replace("lora_A", "lora_B")] @ adapter[name]
    return Subject(model, subject.tokenizer, [])


@pytest.fixture(scope="module")
def tiny() -> Subject:
    tasks = ("lamp1", "lamp2m", "lamp4", "lamp5", "lamp7")
    share = Selection(split="dev", limit=PROMPTS // len(tasks))
    subject = _load(MODEL_DIR)
    subject.examples = [item.example for task in tasks for item in task_class(task)().items(share)]
    return _answered(MODEL_DIR, subject)


@pytest.fixture(scope="module")
def stories() -> Subject:
    source, data = SHARED / "stories260K" / "hf", SHARED / "lamp"
    if not (source.is_dir() and (data / "LaMP_7").is_dir()):
        pytest.skip(f"no stories260K or no LaMP-7 in {SHARED} (set HARNESS_SHARED)")
    items = task_class("lamp7")(data=str(data)).items(Selection(split="dev", limit=2 * PROMPTS))
    subject = _load(source)
    short = [i.example for i in items if len(subject.ids(Retrieval(k=ITEMS).prompt(i.example).render())) <= 300]
    subject.examples = short[:PROMPTS]
    return _answered(source, subject)


# The loops


def _generate(
    subject: Subject,
    prompts: Sequence[tuple[int, ...]],
    mix: Callable[..., Tensor],
    masked: contextlib.AbstractContextManager[None] | None = None,
    **kwargs: bool,
) -> list[int]:
    """Greedy tokens of `mix(outputs)`, one pass for each prompt; the last one runs within the context `masked`."""
    caches = [subject.prefilled(ids) for ids in prompts]
    tokens = [ids[-1] for ids in prompts]
    answer: list[int] = []
    while len(answer) < NEW_TOKENS:
        outputs = []
        for number, (token, cache) in enumerate(zip(tokens, caches, strict=True), 1):
            with masked if masked and number == len(prompts) else contextlib.nullcontext():
                outputs.append(subject.model(torch.tensor([[token]]), past_key_values=cache, **kwargs))
        answer.append(int(mix(*outputs).argmax()))
        if answer[-1] in subject.ends:
            break
        tokens = [answer[-1]] * len(prompts)
    return answer


def _log_p(output: Any) -> Tensor:
    return output.logits[0, -1].log_softmax(-1)


class _Masked(contextlib.AbstractContextManager[None]):
    """Within the context HEADS are off: their slice of o_proj's input is zero, or their query is; or scaled, each by its own."""

    def __init__(self, model: Any, operator: str, scales: Sequence[float] = (0.0,) * len(HEADS)) -> None:
        self.model, self.operator, self.scales = model, operator, scales

    def __enter__(self) -> None:
        self.handles = []
        for (layer, head), scale in zip(HEADS, self.scales, strict=True):
            attention = self.model.model.layers[layer].self_attn
            part = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
            if self.operator == "zero":
                self.handles.append(
                    attention.o_proj.register_forward_pre_hook(lambda _, args, p=part, s=scale: _scaled(args[0], p, s))
                )
            else:
                self.handles.append(
                    attention.q_proj.register_forward_hook(lambda _, args, out, p=part, s=scale: _scaled(out, p, s))
                )

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def _scaled(x: Tensor, part: slice, scale: float) -> Tensor:
    x = x.clone()
    x[..., part] *= scale
    return x


def _contrast(base: Any, other: Any, weight: float) -> Tensor:
    return (1 + weight) * _log_p(base) - weight * _log_p(other)


def _entropy(output: Any) -> float:
    p = _log_p(output).exp()
    return -float((p * p.log()).sum())


def _entropy_contrast(base: Any, other: Any) -> Tensor:
    return _contrast(base, other, _entropy(base))


def cad_loop(subject: Subject, example: Example) -> list[int]:
    prompts = [subject.ids(Retrieval(k=ITEMS).prompt(example).render()), subject.ids(example.prompt().render())]

    def mix(with_history: Any, without: Any) -> Tensor:
        return 1.5 * with_history.logits[0, -1] - 0.5 * without.logits[0, -1]

    return _generate(subject, prompts, mix)


def cos_loop(subject: Subject, example: Example) -> list[int]:
    items = Retrieval(k=ITEMS).prompt(example).items
    prompts = [subject.ids(example.prompt(chosen).render()) for chosen in [(), *((item,) for item in items)]]

    def mix(without: Any, *contexts: Any) -> Tensor:
        score = _log_p(without)
        for strength, output in zip((1.5, 0.5), contexts, strict=False):
            score = score + strength * (_log_p(output) - _log_p(without))
        return score

    return _generate(subject, prompts, mix)


def _head_loop(
    operator: str, mix: Callable[..., Tensor], scales: Sequence[float] = (0.0,) * len(HEADS)
) -> Callable[[Subject, Example], list[int]]:
    def loop(subject: Subject, example: Example) -> list[int]:
        ids = subject.ids(Retrieval(k=ITEMS).prompt(example).render())
        return _generate(subject, [ids, ids], mix, _Masked(subject.model, operator, scales))

    return loop


def _dola_loop(*, released: bool) -> Callable[[Subject, Example], list[int]]:
    layers = (1, 2, 3)

    def divergence(p: Tensor, q: Tensor) -> float:
        m = (p + q) / 2
        pairs = [(m, p), (m, q)] if released else [(p, m), (q, m)]
        return sum(float((a * (a / b).log()).sum()) for a, b in pairs) / 2

    def loop(subject: Subject, example: Example) -> list[int]:
        def mix(output: Any) -> Tensor:
            final = _log_p(output)
            early = []
            for layer in layers:
                state = output.hidden_states[layer][0, -1]
                state = state if released else subject.model.model.norm(state)
                early.append(subject.model.lm_head(state).log_softmax(-1))
            farthest = max(early, key=lambda other: divergence(final.exp(), other.exp()))
            plausible = final >= final.max() + math.log(0.1)
            return torch.where(plausible, final - farthest, -math.inf)

        ids = subject.ids(Retrieval(k=ITEMS).prompt(example).render())
        return _generate(subject, [ids], mix, output_hidden_states=True)

    return loop


def _cope_loop(*, released: bool) -> Callable[[Subject, Example], list[int]]:
    """With plausible .1 and half of log p_base taken away; two models, each with its adapters merged."""
    models: dict[int, tuple[Subject, Subject]] = {}

    def scores(user: Tensor, base: Tensor) -> Tensor:
        plausible = user >= 0.1 * user.max()
        if not released:
            return torch.where(plausible, user.log() - 0.5 * base.log(), -math.inf)
        kept = user * plausible
        return (kept / (kept.sum() + 1e-8) + 1e-8).log() - 0.5 * (base + 1e-8).log()

    def loop(subject: Subject, example: Example) -> list[int]:
        if id(subject) not in models:
            models[id(subject)] = _merged(subject, *SEEDS), _merged(subject, SEEDS[0])
        pair = models[id(subject)]
        ids = subject.ids(Retrieval(k=ITEMS).prompt(example).render())
        caches, token, answer = [one.prefilled(ids) for one in pair], ids[-1], list[int]()
        while len(answer) < NEW_TOKENS and (not answer or answer[-1] not in subject.ends):
            outputs = [
                one.model(torch.tensor([[token]]), past_key_values=cache)
                for one, cache in zip(pair, caches, strict=True)
            ]
            token = int(scores(*(_log_p(output).exp() for output in outputs)).argmax())
            answer.append(token)
        return answer

    return loop


_ENTROPY_UNIFORM = _head_loop("uniform", _entropy_contrast)
CASES: dict[str, tuple[str, str | None, tuple[str, ...], Callable[[Subject, Example], list[int]]]] = {
    "cad": ("cad", None, ("alpha=0.5",), cad_loop),
    "cos item by item": ("cos", None, ("lam=1.5,0.5",), cos_loop),
    "dps": ("dps", None, ("gamma=2", "heads=4"), _head_loop("zero", lambda a, b: _contrast(a, b, 2.0))),
    "dps with clusters": (
        "dps",
        None,
        ("gamma=2", "heads=2", "clusters=2", "temperature=0.5"),
        _head_loop("zero", lambda a, b: _contrast(a, b, 2.0), SCALES),
    ),
    "dps released": ("dps", "released", ("heads=4",), _ENTROPY_UNIFORM),
    "decore": ("decore", None, ("heads=4",), _head_loop("zero", _entropy_contrast)),
    "decore gain": (
        "decore",
        None,
        ("heads=4", "alpha=entropy_gain"),
        _head_loop("zero", lambda a, b: _contrast(a, b, _entropy(b) - _entropy(a))),
    ),
    "decore released": ("decore", "released", ("heads=4",), _ENTROPY_UNIFORM),
    "cope": ("cope", None, ("contrast=0.5",), _cope_loop(released=False)),
    "cope released": ("cope", "released", ("contrast=0.5",), _cope_loop(released=True)),
    "dola": ("dola", None, ("layers=1,2,3",), _dola_loop(released=False)),
    "dola released": ("dola", "released", ("layers=1,2,3",), _dola_loop(released=True)),
}
"""Method, preset, settings, loop. With the same heads the released DPS and DeCoRe decode alike."""


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model", ["tiny", "stories"])
def test_a_method_gives_the_tokens_of_its_reference_loop(case: str, model: str, request: pytest.FixtureRequest) -> None:
    subject: Subject = request.getfixturevalue(model)
    loop = CASES[case][3]
    with torch.no_grad():
        if loop not in subject.looped:
            subject.looped[loop] = [loop(subject, example) for example in subject.examples]
    assert len(subject.looped[loop]) == PROMPTS
    assert subject.answers[case] == subject.looped[loop]


def test_the_methods_differ_from_each_other(stories: Subject) -> None:
    alike = ("decore released", "cope released")  # greedily no implausible token is chosen, floor or none
    answers = [stories.answers[case] for case in CASES if case not in alike]
    assert all(a != b for n, a in enumerate(answers) for b in answers[:n])
