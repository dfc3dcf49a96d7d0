"""`harness run --dry_run` of a model behind a server: the first prompt, how many requests and tokens, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence

from harness.data import Example
from harness.plan import Plan
from harness.servers.model import ServedModel, turns

LETTERS = 4
"""A token of English, where the server does not count."""


def estimate(model: ServedModel, examples: Sequence[Example], plans: Sequence[Plan], max_new_tokens: int) -> list[str]:
    """What a run would ask, in lines, without asking it; `plans` are those of the first examples, whose prompts are measured.

    A server that lends its tokenizer counts them, which costs nothing.
    """
    first = plans[0]
    lines: list[str] = []
    for stream in first.streams:
        tokens = _tokens(model, Plan((stream,)), examples[0])
        about = "" if model.tokenizer.lent else "about "
        lines.append(f"--- prompt: {about}{tokens} tokens, {len(stream.prompt.items)} history items")
        lines += [f"{role}: {text}" for role, text in turns(stream.prompt.render())]
    requests = len(examples) * max(1, len(examples[0].choices)) * len(first.streams)
    mean = sum(_tokens(model, plan, example) for plan, example in zip(plans, examples, strict=False)) / len(plans)
    read = mean * requests / len(first.streams)
    written = requests if examples[0].choices else requests * max_new_tokens
    lines.append(f"--- {requests} requests: about {read:.0f} tokens read, up to {written} written")
    if model.price is None:
        lines.append(
            "no price is known: --model_set price_in=0.40 --model_set price_out=1.60 (US dollars a million tokens)"
        )
        return lines
    least, most = model.price.usd(read, 0), model.price.usd(read, written)
    lines.append(f"cost: ${least:.2g} to read, up to ${most:.2g} in all; what was paid for before costs nothing again")
    return lines


def _tokens(model: ServedModel, plan: Plan, example: Example) -> int:
    """Of the plan's prompts together."""
    found = 0
    for stream in plan.streams:
        rendered = stream.prompt.render()
        counted = model.count(rendered, scored=bool(example.choices))
        letters = sum(len(text) for _, text in turns(rendered))
        found += letters // LETTERS if counted is None else len(counted.ids)
    return found
