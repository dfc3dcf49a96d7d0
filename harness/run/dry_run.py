"""`harness run --dry_run`: the first prompt of each stream as the model reads it, tokens, forward passes, memory."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch

from harness.data import Example, each_once
from harness.engine.decode import Decoder
from harness.engine.model import LanguageModel
from harness.engine.rows import Request
from harness.fit.artifacts import ArtifactStore
from harness.fit.states import shared_key, stored_state
from harness.method import Fitted, Method
from harness.plan import Plan, Stream
from harness.plugins.returned import plan_of
from harness.run.cell import Cell, generation_of_cell
from harness.run.console import Console
from harness.run.served.estimate import estimate
from harness.run.served.refusals import check_served
from harness.servers.model import ServedModel


def dry_run(lm: LanguageModel, cell: Cell, store: ArtifactStore | None = None) -> str:
    """What a run of the cell would do, without fitting, generating or writing anything."""
    store = store or ArtifactStore()
    lines = [f"{cell.method_name} on {cell.task_name} with {lm.name}: {len(cell.items)} items"]
    served = isinstance(lm, ServedModel)
    if served and not cell.method.adapts():
        check_served(cast(ServedModel, lm), cell, generation_of_cell(cell), store, Console())
    example = cell.items[0].example
    method, key = cell.method, shared_key(lm, cell) if cell.method.fits() else None
    shared = store.get(key) if key else None
    if method.fits() and shared is None:
        fit = cell.fit_data
        on = f" on {fit.split} of {fit.task_name}, {len(fit.items())} items" if fit.split else ""
        lines.append(f"not fitted yet: a run first fits{on}")
        costs = None if served else fit_costs(lm, cell)
        lines += [costs.said] if costs else []
    fitted = shared is not None or not method.fits()
    personal = stored_state(lm, cell, key, example.user.id, store) if fitted and method.adapts() else None
    if fitted and method.adapts() and personal is None:
        lines.append("not adapted yet: a run first learns from each user's history")
    if not served and method.adapts() and personal is None and (takes := adapt_costs(lm, cell)):
        lines.append(takes)
    whole = fitted and (personal is not None or not method.adapts())
    plan = _plan(method, example, shared, personal, whole=whole) if fitted else None
    if not whole:
        lines.append(
            "below is the prompt without what a run still has to learn; that may add streams, edits, adapters or a mix"
        )
    if plan is not None and plan.answer is not None:
        return "\n".join([*lines, "--- no forward pass: the answer is", plan.answer])
    plan = plan or Plan((Stream(method.retrieval.prompt(example)),))
    if served:
        examples, learnt = [item.example for item in cell.items], whole and not method.adapts()
        found = [
            plan_of(method, method.plan(e, shared, None)) if learnt else Plan((Stream(method.retrieval.prompt(e)),))
            for e in examples[:SOME]
        ]
        return "\n".join([*lines, *estimate(cast(ServedModel, lm), examples, [plan, *found[1:]], cell.max_new_tokens)])
    request = Decoder(lm).prepare(example.id, plan, cell.max_new_tokens)
    for number, (stream, prompt) in enumerate(zip(plan.streams, request.prompts, strict=True)):
        what = f", {len(stream.edits)} edits, {len(stream.adapters)} adapters" if whole else ""
        lines.append(
            f"--- stream {number}: {len(prompt.encoded.ids)} tokens, {prompt.items} history items "
            f"({prompt.dropped} dropped){what}"
        )
        lines.append(lm.encoder.tokenizer.decode(list(prompt.encoded.ids)))
    if plan.draws is not None and not example.choices:
        lines.append(
            f"--- {plan.draws.count} responses drawn at temperature {plan.draws.temperature:g}, one of them chosen"
        )
    lines.append(f"--- mix {plan.mix!r}" if whole else "--- mix not known before that is learnt")
    lines.append(_costs(lm, cell, request, plan.rows(scored=bool(example.choices))))
    return "\n".join(lines)


def _plan(
    method: Method, example: Example, shared: Fitted | None, personal: Fitted | None, *, whole: bool
) -> Plan | None:
    """The plan; None where the method needs what was not learnt yet of the user."""
    try:
        return plan_of(method, method.plan(example, shared, personal))
    except Exception:  # a method may fail in any way without a state it counts on
        if whole:
            raise
        return None


SOME = 16
"""Items whose prompts are measured."""


class FitCosts(NamedTuple):
    """What fitting takes."""

    said: str
    operations: float


def fit_costs(lm: LanguageModel, cell: Cell) -> FitCosts | None:
    """As far as a method's options say it; None where it reads no items."""
    items = cell.fit_data.items() if cell.fit_data.split else ()
    if not items:
        return None
    options, decoder = cell.method.options(), Decoder(lm)
    read = min(len(items), options["samples"]) if isinstance(options.get("samples"), int) else len(items)
    tokens = 0
    for item in items[:SOME]:
        plan = Plan((Stream(cell.method.retrieval.prompt(item.example)),))
        tokens += decoder.prepare(item.example.id, plan, cell.fit_max_new_tokens).tokens
    length = tokens // len(items[:SOME])
    passes, why = 1, "the method may take several"
    epochs = next(
        (options[name] for name in ("collective_epochs", "epochs") if isinstance(options.get(name), int)), None
    )
    if epochs is not None:
        passes, why = 3 * epochs, f"{epochs} epochs, each a pass and twice as much backwards"
    elif "discover_operator" in options:
        passes, why = 1 + lm.sites.layers * lm.sites.heads, "at most: one a head"
    total = 2.0 * lm.parameters * length * read * passes
    times = "pass" if passes == 1 else "passes"
    said = f"fitting reads {read} items of about {length} tokens in {passes} {times} ({why}): {total:.2g} operations"
    return FitCosts(said, total)


def adapt_costs(lm: LanguageModel, cell: Cell) -> str:
    """What training for the users takes, in words; empty of a method that trains for none, or not here."""
    options, decoder = cell.method.options(), Decoder(lm)
    epochs = options.get("epochs")
    if not isinstance(epochs, int) or not epochs or options.get("adapters"):
        return ""
    users = each_once(item.example.user for item in cell.items)
    lessons = [min(len(user.pairs), options.get("items") or len(user.pairs)) for user in users]
    some = [user.pairs[-1].example for user in users if user.pairs][:SOME]
    if not some:
        return ""
    plans = [(one.id, Plan((Stream(cell.method.retrieval.prompt(one)),))) for one in some]
    length = sum(decoder.prepare(id, plan, cell.fit_max_new_tokens).tokens for id, plan in plans) // len(plans)
    total = 2.0 * lm.parameters * length * sum(lessons) * 3 * epochs
    return (
        f"adapting reads {sum(lessons)} items of {len(users)} users of about {length} tokens in {3 * epochs} passes "
        f"({epochs} epochs, each a pass and twice as much backwards): {total:.2g} operations"
    )


def _costs(lm: LanguageModel, cell: Cell, request: Request, rows: int) -> str:
    kv_heads = getattr(lm.model.config, "num_key_value_heads", None) or lm.sites.heads
    bytes_per_number = torch.finfo(lm.model.dtype).bits // 8
    tokens = request.tokens + cell.max_new_tokens
    cache = 2 * lm.sites.layers * kv_heads * lm.sites.head_dim * bytes_per_number * tokens * rows
    return (
        f"a batch takes 1 forward pass for its prompts and up to {cell.max_new_tokens} to decode, "
        f"with {rows} rows a sample\n"
        f"memory: {lm.parameters * bytes_per_number / 2**20:.1f} MiB of weights, and about {cache / 2**20:.1f} MiB of "
        f"keys and values a sample like this one"
    )
