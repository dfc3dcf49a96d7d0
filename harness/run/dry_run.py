"""`harness run --dry_run`: the first prompt of each stream as the model reads it, tokens, forward passes, memory."""

from __future__ import annotations

import torch

from harness.data import Example
from harness.engine.decode import Decoder
from harness.engine.model import LanguageModel
from harness.engine.rows import Request
from harness.fit.artifacts import ArtifactStore
from harness.fit.states import shared_key
from harness.method import Fitted, Method
from harness.plan import Plan, Stream
from harness.run.cell import Cell


def dry_run(lm: LanguageModel, cell: Cell, store: ArtifactStore | None = None) -> str:
    """What a run of the cell would do, without fitting, generating or writing anything."""
    store = store or ArtifactStore()
    lines = [f"{cell.method_name} on {cell.task_name} with {lm.name}: {len(cell.items)} items"]
    example = cell.items[0].example
    shared = store.get(shared_key(lm, cell)) if cell.method.fits() else None
    fitted = shared is not None or not cell.method.fits()
    if not fitted:
        fit = cell.fit_data
        on = f" on {fit.split} of {fit.task_name}, {len(fit.items())} items" if fit.split else ""
        lines.append(f"not fitted yet: a run first fits{on}")
    plan = _plan(cell.method, example, shared) if fitted else None
    if plan is None:
        lines.append("below is the prompt without what a run still has to learn")
        plan = Plan((Stream(cell.method.context.prompt(example)),))
    if plan.answer is not None:
        return "\n".join([*lines, "--- no forward pass: the answer is", plan.answer])
    request = Decoder(lm).prepare(example.id, plan, cell.max_new_tokens)
    for number, (stream, prompt) in enumerate(zip(plan.streams, request.prompts, strict=True)):
        lines.append(
            f"--- stream {number}: {len(prompt.encoded.ids)} tokens, {prompt.items} history items "
            f"({prompt.dropped} dropped), {len(stream.edits)} edits, {len(stream.adapters)} adapters"
        )
        lines.append(lm.encoder.tokenizer.decode(list(prompt.encoded.ids)))
    lines.append(f"--- mix {plan.mix!r}")
    lines.append(_costs(lm, cell, request))
    return "\n".join(lines)


def _plan(method: Method, example: Example, shared: Fitted | None) -> Plan | None:
    """The plan without anything learnt of the user; None where the method needs that."""
    try:
        return method.plan(example, shared, None)
    except Exception:  # a method may fail in any way on a state it did not make
        if method.adapts():
            return None
        raise


def _costs(lm: LanguageModel, cell: Cell, request: Request) -> str:
    kv_heads = getattr(lm.model.config, "num_key_value_heads", None) or lm.sites.heads
    bytes_per_number = torch.finfo(lm.model.dtype).bits // 8
    rows, tokens = len(request.prompts), request.tokens + cell.max_new_tokens
    cache = 2 * lm.sites.layers * kv_heads * lm.sites.head_dim * bytes_per_number * tokens * rows
    return (
        f"a batch takes 1 forward pass for its prompts and up to {cell.max_new_tokens} to decode, "
        f"with {rows} rows a sample\n"
        f"memory: {lm.parameters * bytes_per_number / 2**20:.1f} MiB of weights, and about {cache / 2**20:.1f} MiB of "
        f"keys and values a sample like this one"
    )
