"""Which samples of a run are computed together: planned whole before the first batch, kept in the record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from harness.errors import UsageError

AUTO_START, AUTO_MOST = 8, {"cpu": 32, "cuda": 256, "served": 256}


@dataclass
class Batching:
    """Which samples run together. Planned whole before the first batch runs, and kept in the record: a resumed run
    repeats the batches it finds there, since a sample's last bits depend on its neighbours."""

    size: int | None = None
    """Samples a batch; None = auto, which doubles from batch to batch."""
    planned: list[list[str]] = field(default_factory=list)
    fits: int | None = None
    """Samples a batch under auto that the memory holds, where that is known."""
    done: frozenset[str] = frozenset()
    """Samples of planned batches that need not run again."""
    changed: Callable[[], None] = lambda: None
    """Called when `planned` changed, before any of it runs."""

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise UsageError(f"batch size {self.size} is not valid; allowed: auto, or a number >= 1")

    def plan(self, ids: Sequence[str], device: str) -> None:
        """Cut `ids` into batches, in their order. Does nothing where batches are planned already."""
        if self.planned:
            return
        most = self.most(device)
        size, start = self.size or min(AUTO_START, most), 0
        while start < len(ids):
            self.planned.append(list(ids[start : start + size]))
            start += size
            size = self.size or min(2 * size, most)
        self.changed()

    def most(self, device: str) -> int:
        """Samples of the largest batch."""
        if self.size is not None:
            return self.size
        # a power of two, so that a little more or less free memory plans the same batches
        fits = AUTO_MOST[device] if self.fits is None else 2 ** (max(1, self.fits).bit_length() - 1)
        return min(AUTO_MOST[device], fits)

    def left(self, ids: Sequence[str]) -> Sequence[str]:
        """Those of `ids` that batches which are not done need: all of them where nothing is planned."""
        if not self.planned:
            return ids
        return [i for batch in self.planned if not self.done.issuperset(batch) for i in batch]

    def halve(self, at: int) -> None:
        """Memory ran out in batch `at`: half as many samples a batch for it and all that come after it."""
        half = (len(self.planned[at]) + 1) // 2
        after = self.planned[at:]
        done = [ids for ids in after if self.done.issuperset(ids)]
        waiting = [i for ids in after if ids not in done for i in ids]
        self.planned[at:] = done + [waiting[n : n + half] for n in range(0, len(waiting), half)]
        self.changed()

    def sizes(self) -> list[int]:
        """In the order they were first used."""
        return list(dict.fromkeys(len(batch) for batch in self.planned))


def longest_first(labels: Sequence[str], tokens: Sequence[int]) -> list[int]:
    """Longest first, equal labels next to each other, the label of the longest of all before the others."""
    longest: dict[str, int] = {}
    for label, count in zip(labels, tokens, strict=True):
        longest[label] = max(count, longest.get(label, 0))
    return sorted(range(len(labels)), key=lambda n: (-longest[labels[n]], labels[n], -tokens[n]))


def out_of_memory(error: Exception) -> bool:
    """As a GPU says it (torch.OutOfMemoryError), or a CPU."""
    return type(error).__name__ == "OutOfMemoryError" or any(
        words in str(error) for words in ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
    )
