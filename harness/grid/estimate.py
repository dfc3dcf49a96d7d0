"""What a cell will take on workers: `--dry_run --on ...` and `harness grid plan`."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from harness.data import Example
from harness.engine.decode import Decoder
from harness.engine.model import LanguageModel
from harness.engine.rows import Request
from harness.fit.artifacts import ArtifactStore
from harness.fit.states import shared_key
from harness.grid.scheduler import TARGET_SECONDS
from harness.grid.status import duration
from harness.plan import Plan, Stream
from harness.run.batches import AUTO_MOST, AUTO_START
from harness.run.cell import Cell
from harness.run.dry_run import fit_costs
from harness.run.together import SHARED_ROWS

SOME = 16
"""Items whose prompts are measured."""


def estimate(lm: LanguageModel, points: Sequence[Cell], workers: int | None) -> str:
    """Batches, shards, hours, operations and memory of cells that are answered together: one, or all points of a sweep.

    From some prompts and one pass timed on this machine. Counts one stream a sample, with the prompt that the method
    retrieves: what it fits, adds or contrasts comes on top, and what points share comes off.
    """
    cell, decoder = points[0], Decoder(lm)
    items = cell.items
    some = [item.example for item in items[:: max(1, len(items) // SOME)]][:SOME]
    by_point = [
        [decoder.prepare(e.id, Plan((Stream(point.method.retrieval.prompt(e)),)), cell.max_new_tokens) for e in some]
        for point in points
    ]
    prompts = sum(request.tokens for requests in by_point for request in requests) / len(some)
    decoded = 1 if _chooses(some[0]) else cell.max_new_tokens
    operations = 2.0 * lm.parameters * (prompts + decoded * len(points)) * len(items)
    longest = max((request for requests in by_point for request in requests), key=lambda request: request.tokens)
    seconds = operations / _pace(lm, decoder, longest)
    count, batches = workers or 1, _batches(len(items), cell.settings.batch_size, lm.device.type)
    shards = min(batches, max(count, round(seconds / TARGET_SECONDS)))
    rows = min(len(points), SHARED_ROWS) * (cell.settings.batch_size or AUTO_MOST[lm.device.type])
    what = f"{len(items)} samples" if len(points) == 1 else f"{len(items)} samples of each of {len(points)} points"
    return (
        f"on {_workers(workers)}: {what} in {batches} batches, about {shards} shards; {operations:.2g} operations, "
        f"{duration(seconds / count)} ({seconds / 3600 / count:.2g} hours) at what one sample alone reaches on this machine, "
        f"which batches beat\n"
        f"{_memory(lm, longest.tokens + decoded, rows)}"
    )


def estimate_fit(lm: LanguageModel, cell: Cell, workers: int | None) -> str:
    """Hours, operations and memory of fitting the cell's method, which is one worker's work; or that it is done."""
    key = shared_key(lm, cell)
    if ArtifactStore().get(key) is not None:
        return f"on {_workers(workers)}: nothing to do, it is fitted already: {key}"
    costs = fit_costs(lm, cell)
    if costs is None:
        return f"on {_workers(workers)}: one worker fits; it reads no items, so what it takes is not known before"
    decoder, example = Decoder(lm), cell.fit_data.items()[0].example
    plan = Plan((Stream(cell.method.retrieval.prompt(example)),))
    request = decoder.prepare(example.id, plan, cell.fit_max_new_tokens)
    seconds = costs.operations / _pace(lm, decoder, request)
    return (
        f"on {_workers(workers)}: one worker fits; {costs.said}, "
        f"{duration(seconds)} ({seconds / 3600:.2g} hours) at what one sample alone reaches on this machine, which batches beat\n"
        f"{_memory(lm, request.tokens, 1)}, and more where it trains"
    )


def _workers(count: int | None) -> str:
    return "a worker" if count is None else f"{count} workers"


def _pace(lm: LanguageModel, decoder: Decoder, request: Request) -> float:
    """Operations a second of one sample, measured."""
    start = time.perf_counter()
    decoder.generate([request], max_new_tokens=2)
    if lm.device.type == "cuda":
        torch.cuda.synchronize()
    return 2.0 * lm.parameters * (request.tokens + 1) / (time.perf_counter() - start)


def _memory(lm: LanguageModel, tokens: int, rows: int) -> str:
    size = torch.finfo(lm.model.dtype).bits // 8
    heads = getattr(lm.model.config, "num_key_value_heads", None) or lm.sites.heads
    cache = 2 * lm.sites.layers * heads * lm.sites.head_dim * size * tokens * rows
    return f"memory a worker: {(lm.parameters * size + cache) / 2**20:.0f} MiB for weights and the keys and values of a batch"


def _chooses(example: Example) -> bool:
    return bool(example.choices)


def _batches(items: int, size: int | None, device: str) -> int:
    """As `harness.run.batches` cuts them where memory suffices."""
    number, width = 0, size or AUTO_START
    while items > 0:
        items, number = items - width, number + 1
        width = size or min(2 * width, AUTO_MOST[device])
    return number
