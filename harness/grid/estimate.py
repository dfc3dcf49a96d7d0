"""What a cell will take on workers: `--dry_run --on ...` and `harness grid plan`."""

from __future__ import annotations

import time

import torch

from harness.data import Example
from harness.engine.decode import Decoder
from harness.engine.model import LanguageModel
from harness.grid.scheduler import TARGET_SECONDS
from harness.grid.status import duration
from harness.plan import Plan, Stream
from harness.run.batches import AUTO_MOST, AUTO_START
from harness.run.cell import Cell

SOME = 16
"""Items whose prompts are measured."""


def estimate(lm: LanguageModel, cell: Cell, workers: int | None) -> str:
    """Batches, shards, hours, operations and memory, from some prompts and one pass timed on this machine.

    Counts one stream a sample, with the prompt that the method retrieves: what it fits, adds or contrasts comes on top.
    """
    items = cell.items
    decoder = Decoder(lm)
    some = [item.example for item in items[:: max(1, len(items) // SOME)]][:SOME]
    requests = [
        decoder.prepare(e.id, Plan((Stream(cell.method.retrieval.prompt(e)),)), cell.max_new_tokens) for e in some
    ]
    prompt = sum(request.tokens for request in requests) / len(requests)
    decoded = 1 if _chooses(some[0]) else cell.max_new_tokens
    operations = 2.0 * lm.parameters * (prompt + decoded) * len(items)
    longest = max(requests, key=lambda request: request.tokens)
    start = time.perf_counter()
    decoder.generate([longest], max_new_tokens=2)
    if lm.device.type == "cuda":
        torch.cuda.synchronize()
    rate = 2.0 * lm.parameters * (longest.tokens + 1) / (time.perf_counter() - start)
    seconds = operations / rate
    count, batches = workers or 1, _batches(len(items), cell.settings.batch_size, lm.device.type)
    shards = min(batches, max(count, round(seconds / TARGET_SECONDS)))
    size = torch.finfo(lm.model.dtype).bits // 8
    heads = getattr(lm.model.config, "num_key_value_heads", None) or lm.sites.heads
    most = cell.settings.batch_size or AUTO_MOST[lm.device.type]
    cache = 2 * lm.sites.layers * heads * lm.sites.head_dim * size * (longest.tokens + decoded) * most
    each = "a worker" if workers is None else f"{workers} workers"
    return (
        f"on {each}: {len(items)} samples in {batches} batches, about {shards} shards; {operations:.2g} operations, "
        f"{duration(seconds / count)} ({seconds / 3600 / count:.2g} hours) at what one sample alone reaches on this machine, "
        f"which batches beat\n"
        f"memory a worker: {(lm.parameters * size + cache) / 2**20:.0f} MiB for weights and the keys and values of a batch"
    )


def _chooses(example: Example) -> bool:
    return bool(example.choices)


def _batches(items: int, size: int | None, device: str) -> int:
    """As `harness.run.batches` cuts them where memory suffices."""
    number, width = 0, size or AUTO_START
    while items > 0:
        items, number = items - width, number + 1
        width = size or min(2 * width, AUTO_MOST[device])
    return number
