"""The contracts of a method and (in `tasks`) of a task, as tests anyone can run: `harness check ./mine.py`, or in a test.

`check_method` runs a method on a random model in float64, where exactness separates logic from rounding, and asserts
the engine's promises: generation and scoring agree, a row in a mixed batch equals the row alone, mixes are
normalised, the model is left as found, zero strength is neutral, plans are pure, an edit that does nothing is caught,
and no gold answer can leak. `tasks.check_task` has a task ask and grade: splits and limits are kept to, each item is answered
once, golds reach no prompt, and what comes back is what belongs there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from harness.data import Example, Labelled
from harness.engine.decode import Decoder
from harness.engine.model import LanguageModel
from harness.engine.rows import Request
from harness.errors import UserFailed
from harness.fit.kit import ModelKit
from harness.method import Fitted, Method
from harness.plan import Generated, Place, Plan, StreamOutput, apply
from harness.plugins.returned import adapted, fitted, mixed, plan_of
from harness.run.answers import by_value, without_mix
from harness.run.contract.toys import ContractBroken, ToyTemplate, broken, byte_tokenizer, random_lm, toy_examples
from harness.run.system import ModelSystem
from harness.task import Generation

__all__ = ["ContractBroken", "ToyTemplate", "byte_tokenizer", "check_method", "random_lm", "toy_examples"]


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

    states = {item.example.user.id: state for item, state in zip(test, personal, strict=True)}
    system = ModelSystem(lm, method, Generation(8), shared=shared, personal=states)
    examples = [item.example for item in test]
    decoder = Decoder(lm)
    if all(plan.answer is not None for plan in plans):
        _check_given(system, examples)
        say("its answers need no model: the same alone and together, for no forward pass")
        if _fingerprint(lm) != before:
            raise broken("the model is left as found", f"{type(method).__name__} changed weights, mode or hooks")
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
    if any(plan.draws for plan in plans):
        _check_drawn(system, examples)
        say("of several responses it chooses the same one alone and in a batch")
    neutral = method.neutral()
    if neutral is None:
        skip("zero strength: the method has no such setting (neutral() is None)")
    else:
        _check_neutral(neutral, lm, train, test)
        say("zero strength equals the prompt-only form (1e-10, same tokens)")
    if any(plan.changes for plan in plans):
        _check_fired(decoder, requests, together, plans)
        say("it fires: outputs differ from the unedited model's where the plan asks for a change")
    elif any(plan.draws for plan in plans):
        skip(
            "whether it fires: its plans draw from the unedited model; a run compares what they choose with its own answer"
        )
    else:
        skip("whether it fires: its plans are a prompt for the unedited model; a run compares it with the plain prompt")
    _check_left_as_found(method, lm, before, requests)
    say("the model is left as found, also after an exception")


def _check_given(system: ModelSystem, examples: Sequence[Example]) -> None:
    together = [sample.response for sample in system.answer(examples)]
    if together != [system.answer([example])[0].response for example in examples]:
        raise broken("a row equals the row alone", "an answer that needs no model differs with its neighbours")
    if system.decoder.cost.forward_passes:
        raise broken("an answer that needs no model runs none", f"{system.decoder.cost.forward_passes} passes were run")


def _check_drawn(system: ModelSystem, examples: Sequence[Example]) -> None:
    together = [(sample.response, sample.extra) for sample in system.answer(examples)]
    if together != [(sample.response, sample.extra) for example in examples for sample in system.answer([example])]:
        raise broken("a row equals the row alone", "what was drawn, or the choice of it, differs with its neighbours")


def _learnt(
    method: Method, kit: ModelKit, train: Sequence[Labelled], test: Sequence[Labelled]
) -> tuple[Fitted | None, list[Fitted | None]]:
    """What `fit` and `adapt` make, the latter of the test items' users."""
    shared = fitted(method, method.fit(kit, train)) if method.fits() else None
    users = [item.example.user for item in test]
    found = adapted(method, method.adapt(kit, users, shared), users)
    for state in found:
        if isinstance(state, UserFailed):
            raise broken("adapt makes every user's state", str(state))
    return shared, [state for state in found if not isinstance(state, UserFailed)]


def _plan(method: Method, example: Example, shared: Fitted | None, personal: Fitted | None) -> Plan:
    return plan_of(method, method.plan(example, shared, personal))


def _fingerprint(lm: LanguageModel) -> tuple[Any, ...]:
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules())
    weights = tuple((name, p.data_ptr(), float(p.detach().double().sum())) for name, p in lm.model.named_parameters())
    return hooks, lm.model.training, weights


def _check_purity(
    method: Method,
    test: Sequence[Labelled],
    shared: Fitted | None,
    personal: Sequence[Fitted | None],
    plans: Sequence[Plan],
) -> None:
    for item, mine, plan in zip(test, personal, plans, strict=True):
        again = _plan(method, item.example, shared, mine)
        if without_mix(again) != without_mix(plan):
            raise broken("plan is pure", f"two calls for example {item.example.id} gave different plans")
        if by_value(again.mix) != by_value(plan.mix):
            raise broken(
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
                raise broken("no gold leaks", "a plan holds a Labelled, which carries targets")
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
            raise broken("generation and scoring agree", f"sample {request.key} differs by {worst:.2e} nats")


def _check_rows(decoder: Decoder, requests: Sequence[Request], together: Sequence[Generated]) -> None:
    order = list(reversed(range(len(requests))))
    shuffled = decoder.generate([requests[i] for i in order], max_new_tokens=8)
    back = dict(zip(order, shuffled, strict=True))
    for i, request in enumerate(requests):
        (alone,) = decoder.generate([request], max_new_tokens=8)
        for name, other in (("mixed", together[i]), ("shuffled", back[i])):
            if alone.ids != other.ids:
                raise broken("a row equals the row alone", f"sample {request.key} has other tokens in a {name} batch")
            worst = max(abs(a - b) for a, b in zip(alone.logprobs, other.logprobs, strict=True))
            if not worst <= 1e-8:
                raise broken("a row equals the row alone", f"sample {request.key} differs by {worst:.2e} ({name})")


def _check_normalised(decoder: Decoder, requests: Sequence[Request], generated: Sequence[Generated]) -> None:
    for logp in decoder.distributions(requests, [g.ids for g in generated]):
        off = logp.logsumexp(-1).abs().max().item()
        if not off <= 1e-8:
            raise broken("a mix is normalised", f"log-sum-exp of its output is {off:.2e}, not 0")
    shape = (2, 1, decoder.lm.vocabulary)  # of the model's vocabulary: a mix may hold a number a token
    for request in requests:
        plan, ids = request.plan, request.prompts[0].encoded.ids
        outputs = [
            StreamOutput(
                torch.randn(shape, dtype=torch.float64),
                tuple(torch.randn(shape, dtype=torch.float64) for _ in stream.exits),
            )
            for stream in plan.streams
        ]
        logp = apply(plan.mix, outputs, Place((ids, ids), ((), ()), 0))
        off = mixed(plan.mix, logp, outputs[0].logits).logsumexp(-1).abs().max().item()
        if not off <= 1e-8:
            raise broken("a mix is normalised", f"log-sum-exp of {plan.mix!r} is {off:.2e} on random logits")


def _check_neutral(neutral: Method, lm: LanguageModel, train: Sequence[Labelled], test: Sequence[Labelled]) -> None:
    shared, personal = _learnt(neutral, ModelKit(lm, seed=0, max_new_tokens=8), train, test)
    decoder = Decoder(lm)
    for item, mine in zip(test, personal, strict=True):
        plan = _plan(neutral, item.example, shared, mine)
        bare = Plan((plan.streams[0].bare(),))
        request, plain = (decoder.prepare(item.example.id, p, 8) for p in (plan, bare))
        (a,), (b,) = (decoder.generate([r], max_new_tokens=8) for r in (request, plain))
        if a.ids != b.ids:
            raise broken("zero strength is neutral", f"sample {item.example.id} has other tokens than its prompt alone")
        (p,), (q,) = (decoder.distributions([r], [a.ids]) for r in (request, plain))
        worst = (p - q).abs().max().item()
        if not worst <= 1e-10:
            raise broken("zero strength is neutral", f"sample {item.example.id} differs by {worst:.2e}")


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
        raise broken("a method that changed nothing is caught", "its output equals the unedited model's everywhere")


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
        raise broken("the model is left as found", f"{type(method).__name__} changed weights, mode or hooks")
