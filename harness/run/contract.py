"""The contracts of a method and of a task, as tests anyone can run: `harness check ./mine.py`, or `check_method` in a test.

`check_method` runs a method on a random model in float64, where exactness separates logic from rounding, and asserts
the engine's promises: generation and scoring agree, a row in a mixed batch equals the row alone, mixes are
normalised, the model is left as found, zero strength is neutral, plans are pure, an edit that does nothing is caught,
and no gold answer can leak. `check_task` has a task ask and grade: splits and limits are kept to, each item is answered
once, golds reach no prompt, and what comes back is what belongs there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from harness.data import Example, HistoryItem, Labelled, Message, User
from harness.engine.decode import Decoder
from harness.engine.encoder import Encoder
from harness.engine.model import LanguageModel
from harness.engine.rows import Request
from harness.engine.sites import FAMILIES
from harness.errors import DataMissing, HarnessError, UsageError, UserFailed
from harness.fit.kit import ModelKit
from harness.method import Fitted, Method
from harness.plan import Generated, Plan, StreamOutput
from harness.plugins.registry import method_class
from harness.plugins.returned import (
    adapted,
    fitted,
    generation_of,
    graded,
    items_of,
    metrics_of,
    mixed,
    plan_of,
    samples_of,
)
from harness.run.leaks import check_apart
from harness.run.system import ModelSystem
from harness.task import Generation, Sample, Selection, Task

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


class ContractBroken(HarnessError):
    """A method does not keep a promise; the message names the promise and what was measured."""


def byte_tokenizer(*, chat: bool = True) -> Any:
    """A tokenizer of 256 bytes and three special tokens, made in memory."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1, "<pad>": 2, **{c: i + 3 for i, c in enumerate(alphabet)}}
    raw = Tokenizer(models.BPE(vocabulary, [], unk_token=None))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def random_lm(
    family: str = "llama", *, dtype: torch.dtype = torch.float64, seed: int = 0, chat: bool = True, **config: Any
) -> LanguageModel:
    """A small random model of a supported family; large initial weights make its logits differ."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; supported: {', '.join(FAMILIES)}")
    tokenizer = byte_tokenizer(chat=chat)
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
    }
    if family == "qwen3":
        settings["head_dim"] = 12  # not hidden_size / heads, as in the real ones
    if family == "mistral":
        settings["sliding_window"] = None
    if family == "gemma3_text":
        kinds = ["sliding_attention", "full_attention", "sliding_attention"]
        settings |= {"head_dim": 12, "query_pre_attn_scalar": 9, "layer_types": kinds, "sliding_window": 512}
    if family == "gpt2":
        settings["n_inner"] = settings.pop("intermediate_size")
        settings.pop("num_key_value_heads")
        settings = {
            **settings, "n_embd": settings.pop("hidden_size"), "n_layer": settings.pop("num_hidden_layers"),
            "n_head": settings.pop("num_attention_heads"), "n_positions": settings.pop("max_position_embeddings"),
        }  # fmt: skip
    settings.update(config)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **settings), attn_implementation="sdpa", dtype=dtype
    )
    return LanguageModel(model.to(dtype), Encoder(tokenizer), name=f"random-{family}", source="random")


@dataclasses.dataclass(frozen=True)
class ToyTemplate:
    """Histories as lines before the input."""

    def __call__(self, text: str, items: Sequence[HistoryItem], summary: str) -> tuple[Message, ...]:
        lines = [summary] if summary else []
        return (Message("user", " ".join([*lines, *(item.fields["text"] for item in items), text])),)


def toy_examples(count: int, *, seed: int = 0) -> list[Labelled]:
    """Examples of different lengths, each with its own user and history."""
    random = np.random.default_rng(seed)
    words = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen"]

    def text(low: int, high: int) -> str:
        return " ".join(random.choice(words, int(random.integers(low, high))))

    out = []
    for i in range(count):
        texts = [text(2, 5) for _ in range(int(random.integers(2, 5)))]
        history = tuple(HistoryItem(f"{seed}.{i}.{j}", {"text": t}, t) for j, t in enumerate(texts))
        query = text(1, 8)
        name = f"user-{seed}.{i}"
        example = Example(f"{seed}.{i}", User(name, history, _pairs(name, history)), query, query, ToyTemplate())
        out.append(Labelled(example, (text(1, 3),)))
    return out


def _pairs(user: str, history: tuple[HistoryItem, ...]) -> tuple[Labelled, ...]:
    """Each item as an example whose answer is its last word."""
    made = []
    for i, record in enumerate(history):
        text, _, answer = record.fields["text"].rpartition(" ")
        example = Example(f"{user}/{record.id}", User(user, history[:i]), text, text, ToyTemplate())
        made.append(Labelled(example, (answer,)))
    return tuple(made)


def check_method(
    method: Method,
    *,
    lm: LanguageModel | None = None,
    say: Callable[[str], None] = lambda _: None,
    skip: Callable[[str], None] = lambda _: None,
) -> None:
    """Raises HarnessError at the first promise `method` does not keep: ContractBroken, or what it gave back that is no plan.

    `say` gets a line for each kept one, `skip` one for each that says nothing about this method, and why.
    """
    lm = lm or random_lm()
    before = _fingerprint(lm)
    train, test = toy_examples(4, seed=1), toy_examples(5, seed=2)
    kit = ModelKit(lm, seed=0, max_new_tokens=8)
    shared, personal = _learnt(method, kit, train, test)
    plans = [_plan(method, item.example, shared, p) for item, p in zip(test, personal, strict=True)]

    _check_purity(method, test, shared, personal, plans)
    say("plan is pure: equal arguments give equal prompts, edits and mix")
    _check_no_gold(plans)
    say("no gold leaks: no plan can reach a target")

    decoder = Decoder(lm)
    if all(plan.answer is not None for plan in plans):
        _check_given(lm, method, shared, personal, test)
        say("its answers need no model: the same alone and together, for no forward pass")
        if _fingerprint(lm) != before:
            raise _broken("the model is left as found", f"{type(method).__name__} changed weights, mode or hooks")
        say("the model is left as found")
        return
    requests = [decoder.prepare(item.example.id, plan, 8) for item, plan in zip(test, plans, strict=True)]
    together = decoder.generate(requests, max_new_tokens=8)
    _check_scoring(decoder, requests, together)
    say("scoring a generated answer returns the log-probabilities generation saw (1e-8)")
    _check_rows(decoder, requests, together)
    say("a row in a mixed or shuffled batch equals the row alone (1e-8, same tokens)")
    _check_normalised(decoder, requests, together)
    say("the mix returns normalised log-probabilities")
    neutral = method.neutral()
    if neutral is None:
        skip("zero strength: the method has no such setting (neutral() is None)")
    else:
        _check_neutral(neutral, lm, train, test)
        say("zero strength equals the prompt-only form (1e-10, same tokens)")
    if any(plan.changes for plan in plans):
        _check_fired(decoder, requests, together, plans)
        say("it fires: outputs differ from the unedited model's where the plan asks for a change")
    else:
        skip("whether it fires: its plans are a prompt for the unedited model; a run compares it with the plain prompt")
    _check_left_as_found(method, lm, before, requests)
    say("the model is left as found, also after an exception")


def _check_given(
    lm: LanguageModel,
    method: Method,
    shared: Fitted | None,
    personal: Sequence[Fitted | None],
    test: Sequence[Labelled],
) -> None:
    states = {item.example.user.id: state for item, state in zip(test, personal, strict=True)}
    system = ModelSystem(lm, method, Generation(8), shared=shared, personal=states)
    examples = [item.example for item in test]
    together = [sample.response for sample in system.answer(examples)]
    if together != [system.answer([example])[0].response for example in examples]:
        raise _broken("a row equals the row alone", "an answer that needs no model differs with its neighbours")
    if system.decoder.cost.forward_passes:
        raise _broken(
            "an answer that needs no model runs none", f"{system.decoder.cost.forward_passes} passes were run"
        )


def _learnt(
    method: Method, kit: ModelKit, train: Sequence[Labelled], test: Sequence[Labelled]
) -> tuple[Fitted | None, list[Fitted | None]]:
    """What `fit` and `adapt` make, the latter of the test items' users."""
    shared = fitted(method, method.fit(kit, train)) if method.fits() else None
    users = [item.example.user for item in test]
    found = adapted(method, method.adapt(kit, users, shared), users)
    for state in found:
        if isinstance(state, UserFailed):
            raise _broken("adapt makes every user's state", str(state))
    return shared, [state for state in found if not isinstance(state, UserFailed)]


def _plan(method: Method, example: Example, shared: Fitted | None, personal: Fitted | None) -> Plan:
    return plan_of(method, method.plan(example, shared, personal))


def _fingerprint(lm: LanguageModel) -> tuple[Any, ...]:
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules())
    weights = tuple((name, p.data_ptr(), float(p.detach().double().sum())) for name, p in lm.model.named_parameters())
    return hooks, lm.model.training, weights


def _broken(promise: str, detail: str) -> ContractBroken:
    return ContractBroken(f"promise broken: {promise}: {detail}")


def _signature(plan: Plan) -> tuple[Any, ...]:
    return tuple(
        (
            s.prompt.render(),
            tuple(_by_value(e) for e in s.edits),
            tuple(a.key for a in s.adapters),
            s.exits,
            s.early,
        )
        for s in plan.streams
    )


def _by_value(value: Any) -> Any:
    """What tells two edits or mixes apart, tensors by their content."""
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), str(value.dtype), value.detach().cpu().double().numpy().tobytes())
    if isinstance(value, np.ndarray):
        return (value.shape, str(value.dtype), value.tobytes())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return (type(value), *(_by_value(getattr(value, f.name)) for f in dataclasses.fields(value)))
    if isinstance(value, tuple | list):
        return tuple(map(_by_value, value))
    return value


def _check_purity(
    method: Method,
    test: Sequence[Labelled],
    shared: Fitted | None,
    personal: Sequence[Fitted | None],
    plans: Sequence[Plan],
) -> None:
    for item, mine, plan in zip(test, personal, plans, strict=True):
        again = _plan(method, item.example, shared, mine)
        if _signature(again) != _signature(plan) or again.answer != plan.answer:
            raise _broken("plan is pure", f"two calls for example {item.example.id} gave different plans")
        if _by_value(again.mix) != _by_value(plan.mix):
            raise _broken(
                "plan is pure",
                f"two calls for example {item.example.id} gave mixes that are not equal, {plan.mix!r} and {again.mix!r}; "
                "make the mix a frozen dataclass",
            )


def _check_no_gold(plans: Sequence[Plan]) -> None:
    for plan in plans:
        stack: list[Any] = [plan]
        while stack:
            value = stack.pop()
            if isinstance(value, Labelled):
                raise _broken("no gold leaks", "a plan holds a Labelled, which carries targets")
            if dataclasses.is_dataclass(value) and not isinstance(value, type):
                # User.pairs holds the history's own outputs by design; a plan needs prompts and edits only
                stack.extend(getattr(value, f.name) for f in dataclasses.fields(value) if f.name != "pairs")
            elif isinstance(value, tuple | list):
                stack.extend(value)


def _check_scoring(decoder: Decoder, requests: Sequence[Request], generated: Sequence[Generated]) -> None:
    scored = decoder.score(requests, [g.ids for g in generated])
    for request, g, s in zip(requests, generated, scored, strict=True):
        worst = max(abs(a - b) for a, b in zip(g.logprobs, s.logprobs, strict=True))
        if not worst <= 1e-8:
            raise _broken("generation and scoring agree", f"sample {request.key} differs by {worst:.2e} nats")


def _check_rows(decoder: Decoder, requests: Sequence[Request], together: Sequence[Generated]) -> None:
    order = list(reversed(range(len(requests))))
    shuffled = decoder.generate([requests[i] for i in order], max_new_tokens=8)
    back = dict(zip(order, shuffled, strict=True))
    for i, request in enumerate(requests):
        (alone,) = decoder.generate([request], max_new_tokens=8)
        for name, other in (("mixed", together[i]), ("shuffled", back[i])):
            if alone.ids != other.ids:
                raise _broken("a row equals the row alone", f"sample {request.key} has other tokens in a {name} batch")
            worst = max(abs(a - b) for a, b in zip(alone.logprobs, other.logprobs, strict=True))
            if not worst <= 1e-8:
                raise _broken("a row equals the row alone", f"sample {request.key} differs by {worst:.2e} ({name})")


def _check_normalised(decoder: Decoder, requests: Sequence[Request], generated: Sequence[Generated]) -> None:
    for logp in decoder.distributions(requests, [g.ids for g in generated]):
        off = logp.logsumexp(-1).abs().max().item()
        if not off <= 1e-8:
            raise _broken("a mix is normalised", f"log-sum-exp of its output is {off:.2e}, not 0")
    shape = (2, 1, decoder.lm.vocabulary)  # of the model's vocabulary: a mix may hold a number a token
    for plan in (request.plan for request in requests):
        outputs = [
            StreamOutput(
                torch.randn(shape, dtype=torch.float64),
                tuple(torch.randn(shape, dtype=torch.float64) for _ in stream.exits),
            )
            for stream in plan.streams
        ]
        off = mixed(plan.mix, plan.mix(outputs), shape).logsumexp(-1).abs().max().item()
        if not off <= 1e-8:
            raise _broken("a mix is normalised", f"log-sum-exp of {plan.mix!r} is {off:.2e} on random logits")


def _check_neutral(neutral: Method, lm: LanguageModel, train: Sequence[Labelled], test: Sequence[Labelled]) -> None:
    shared, personal = _learnt(neutral, ModelKit(lm, seed=0, max_new_tokens=8), train, test)
    decoder = Decoder(lm)
    for item, mine in zip(test, personal, strict=True):
        plan = _plan(neutral, item.example, shared, mine)
        bare = Plan((plan.streams[0].bare(),))
        request, plain = (decoder.prepare(item.example.id, p, 8) for p in (plan, bare))
        (a,), (b,) = (decoder.generate([r], max_new_tokens=8) for r in (request, plain))
        if a.ids != b.ids:
            raise _broken(
                "zero strength is neutral", f"sample {item.example.id} has other tokens than its prompt alone"
            )
        (p,), (q,) = (decoder.distributions([r], [a.ids]) for r in (request, plain))
        worst = (p - q).abs().max().item()
        if not worst <= 1e-10:
            raise _broken("zero strength is neutral", f"sample {item.example.id} differs by {worst:.2e}")


def _check_fired(
    decoder: Decoder, requests: Sequence[Request], generated: Sequence[Generated], plans: Sequence[Plan]
) -> None:
    bare = [Plan((plan.streams[0].bare(),)) for plan in plans]
    base = [decoder.prepare(r.key, p, 8) for r, p in zip(requests, bare, strict=True)]
    ids = [g.ids for g in generated]
    moved = max(
        (p - q).abs().max().item()
        for p, q in zip(decoder.distributions(requests, ids), decoder.distributions(base, ids), strict=True)
    )
    if moved <= 1e-10:
        raise _broken("a method that changed nothing is caught", "its output equals the unedited model's everywhere")


def _check_left_as_found(
    method: Method, lm: LanguageModel, before: tuple[Any, ...], requests: Sequence[Request]
) -> None:
    class Boom(Exception):
        pass

    def explode(*_: Any, **__: Any) -> None:
        raise Boom

    handle = lm.sites.final_norm.register_forward_pre_hook(explode)
    try:
        Decoder(lm).generate(requests, max_new_tokens=2)
    except Boom:
        pass
    finally:
        handle.remove()
    if _fingerprint(lm) != before:
        raise _broken("the model is left as found", f"{type(method).__name__} changed weights, mode or hooks")


def check_task(
    task: Task, *, say: Callable[[str], None] = lambda _: None, skip: Callable[[str], None] = lambda _: None
) -> None:
    """Raises HarnessError at the first promise `task` does not keep; `say` and `skip` as in `check_method`."""
    split = task.default_split
    items = items_of(task, Selection(split))
    if not items:
        raise _broken("there is something to evaluate", f"split {split!r} has no items")
    users = list(dict.fromkeys(item.example.user.id for item in items))
    say(f"its items are what they should be: {len(items)} of {len(users)} users in split {split}")
    narrowed: list[dict[str, Any]] = [{"limit": 1}, {"users": 1}, {"exclude_users": frozenset(users[:1])}]
    for kept in narrowed:
        items_of(task, Selection(split, **kept))
    say("it keeps to --limit, --users and the users held out")
    try:
        train = items_of(task, Selection("train"))
    except (DataMissing, UsageError) as error:
        skip(f"whether train and evaluated items are apart: {' '.join(str(error).split())[:80]}")
    else:
        check_apart(task, items, train, same_task=True)
        say("no item is evaluated and fitted on")
    asked = items[:4]
    answered = _answers(task, asked)
    say("each item is answered once")
    poisoned = _answers(task, [dataclasses.replace(item, targets=("POISON",)) for item in asked])
    if [(s.prompt_hash, s.response) for s in answered] != [(s.prompt_hash, s.response) for s in poisoned]:
        raise _broken("no gold leaks", "answers change with the targets of their items")
    say("no gold leaks: other targets, the same prompts and answers")
    done = [graded(task, sample) for sample in answered]
    if done != [graded(task, sample) for sample in done]:
        raise _broken("a sample can be graded again", "its numbers change when it is")
    failed = Sample(asked[0].example.id, asked[0].example.user.id, targets=asked[0].targets, error="failed")
    if graded(task, failed).metrics:
        raise _broken("a failed sample is no score", f"it got {graded(task, failed).metrics}")
    say("grading twice is grading once, and a failed sample has no numbers")
    say(f"its metrics: {', '.join(metrics_of(task, [*done, failed]))}")


def _answers(task: Task, items: Sequence[Labelled]) -> list[Sample]:
    """In the order of `items`, by a small random model as it is."""
    lm, generation = random_lm(max_position_embeddings=4096), Generation(4, generation_of(task).stop)
    system = ModelSystem(lm, method_class("plain")(), generation)
    batches = samples_of(task, task.respond(system, items), items, system.batching.planned)
    by_id = {sample.id: sample for batch in batches for sample in batch}
    return [by_id[item.example.id] for item in items]
