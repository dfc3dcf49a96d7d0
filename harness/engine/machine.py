"""What the machine has free for a model on a CPU: the rows of a batch that its memory holds, and cores.

A GPU says when its memory is full, and a batch is halved; a CPU's process is killed instead. `bench/memory.py` holds the
estimate against what a process takes. A thread more than there are free cores waits at every step for one that does not
run: `bench/threads.py` measures what that costs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

from harness.engine.model import LanguageModel
from harness.errors import out_of_memory

T = TypeVar("T")

SHARE = 0.7
"""Of the free memory that a batch may take; the rest is for what else grows."""
_FIXED = 128 << 20
"""Bytes of a pass whatever its rows: the allocator's own."""


def attempt(run: Callable[[], T]) -> T | None:
    """What `run` returns; None where memory did not suffice for it."""
    try:
        return run()
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
    if torch.cuda.is_available():  # here the traceback, which holds the batch's tensors, is gone
        torch.cuda.empty_cache()
    return None


def rows_that_fit(lm: LanguageModel, prompt_tokens: int, new_tokens: int) -> int | None:
    """Rows of so many tokens that the free memory holds, at least 1; None where that is not known, or not needed."""
    free = free_bytes() if lm.device.type == "cpu" else None
    if free is None:
        return None
    return max(1, int((SHARE * free - _FIXED) // row_bytes(lm, prompt_tokens, new_tokens)))


def row_bytes(lm: LanguageModel, prompt_tokens: int, new_tokens: int) -> int:
    """What a row takes at its most: keys and values of all blocks, what one block computes of a prompt, and logits."""
    sizes, tokens = lm.sizes, prompt_tokens + new_tokens
    attends, reads = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    kept = 2 * sizes.layers * reads * tokens
    one_block = prompt_tokens * (6 * sizes.width + 4 * sizes.mlp + 3 * (attends + 2 * reads)) + 2 * tokens * attends
    masks = 5 * prompt_tokens**2  # which token sees which: as truth values, and as numbers to add
    return (kept + one_block) * lm.model.dtype.itemsize + masks + 6 * 4 * sizes.vocabulary


def free_bytes(root: Path = Path("/")) -> int | None:
    """What this process can still take: the machine's available memory, or what its control groups leave if that is less.

    Weights that lie in a file's pages count as available there, and are taken off. None where the system says nothing.
    """
    available = _numbers(root / "proc/meminfo").get("MemAvailable")
    if available is None:
        return None
    mapped = _numbers(root / "proc/self/status").get("RssFile", 0)
    return max(0, min([(available - mapped) * 1024, *_left_by_groups(root)]))


def room_to_keep(lm: LanguageModel) -> int:
    """Bytes that a computation may keep beside what it works on: half of what is free on the model's device."""
    if lm.device.type == "cuda":
        return int(torch.cuda.mem_get_info(lm.device)[0]) // 2
    return (free_bytes() or 0) // 2


def free_cores(root: Path = Path("/")) -> int:
    """Cores that nothing else computes on, of those this process may use; at least 1. By the load of the last minute."""
    cores = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return max(1, min([allowed, round(cores - os.getloadavg()[0]), *map(int, _shares_by_groups(root))]))


def _shares_by_groups(root: Path) -> Iterator[float]:
    """Cores that the limits of the process's control groups come to."""
    for base, path in _groups(root, "cpu"):
        for inner in [path, *path.parents]:
            old = [_text(base / inner / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
            numbers = _text(base / inner / "cpu.max").split() or old
            if all(number.isdigit() for number in numbers):  # "max" and -1 are no limit
                yield int(numbers[0]) / int(numbers[1])


def _groups(root: Path, kind: str) -> Iterator[tuple[Path, Path]]:
    """The process's control groups for `kind`, new and old: (the folder they lie in, the path inside it)."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, kinds, path = line.split(":", 2)
        if not kinds or kind in kinds.split(","):
            yield root / "sys/fs/cgroup" / (kind if kinds else ""), Path(path.strip("/"))


def _left_by_groups(root: Path) -> Iterator[int]:
    """What the limits of the process's control groups, old and new, and of those around them leave."""
    for base, path in _groups(root, "memory"):
        for inner in [path, *path.parents]:
            old = [_text(base / inner / f"memory.{name}_in_bytes").strip() for name in ("limit", "usage")]
            new = [_text(base / inner / f"memory.{name}").strip() for name in ("max", "current")]
            numbers = new if any(new) else old
            if all(number.isdigit() for number in numbers):  # "max" is no limit
                can_go = _numbers(base / inner / "memory.stat").get("inactive_file", 0)
                yield int(numbers[0]) - int(numbers[1]) + can_go


def _numbers(file: Path) -> dict[str, int]:
    """Lines as in `MemAvailable:  123 kB` or `inactive_file 123`."""
    return {name: int(value) for name, value in re.findall(r"^(\w+):?\s+(\d+)\b", _text(file), re.MULTILINE)}


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
