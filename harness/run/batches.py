"""Which samples of a run are computed together: planned before they run, kept in the record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat

from harness.errors import UsageError

AUTO_START, AUTO_MOST = 8, {"cpu": 32, "cuda": 256, "served": 256}
FIRST_OPERATIONS = {"cpu": 10**12}
"""Of the first batch under auto, half a minute of one core or less: whoever waits sees answers before the long batches run."""


@dataclass
class Batching:
    """Which samples run together. Planned before they run, and kept in the record: a resumed run repeats the batches it finds
    there, since a sample's last bits depend on its neighbours."""

    size: int | None = None
    """Samples a batch; None = auto, which doubles from batch to batch."""
    planned: list[list[str]] = field(default_factory=list)
    fits: int | None = None
    """Samples a batch under auto that the memory holds, where that is known."""
    first: int = AUTO_START
    """Samples of the first batch under auto."""
    done: frozenset[str] = frozenset()
    """Samples of planned batches that need not run again."""
    changed: Callable[[], None] = lambda: None
    """Called when `planned` changed, before any of it runs."""
    ahead: int = 4096
    """Samples of a window, which is put in order when its turn comes: the prompts of all would take minutes to measure."""
    whole: bool = False
    """Whether every window is put in order before the first batch, as a grid shares them out."""

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise UsageError(f"batch size {self.size} is not valid; allowed: auto, or a number >= 1")

    def plan(self, ids: Sequence[str], device: str) -> None:
        """Cut `ids` into batches, in their order and none across two windows."""
        most = self.most(device)
        sizes = [self.size or min(self.first, most)]
        while sum(sizes) < len(ids):
            sizes.append(self.size or min(2 * sizes[-1], most))
        self.planned += self._cut(ids, sizes, 0)

    def window(self, at: int) -> list[list[str]]:
        """The batches from number `at` on, where a window begins, up to the next one."""
        found: list[list[str]] = []
        while sum(map(len, found)) < self.ahead and at + len(found) < len(self.planned):
            found.append(self.planned[at + len(found)])
        return found

    def order(self, at: int, ids: Sequence[str], device: str) -> None:
        """Put the window that begins with batch `at` in this order, in batches no larger than the memory holds."""
        old = self.window(at)
        size = min(max(map(len, old)), self.most(device))
        self.planned[at : at + len(old)] = self._cut(ids, [size], 0)

    def most(self, device: str) -> int:
        """Samples of the largest batch."""
        if self.size is not None:
            return self.size
        # a power of two, so that a little more or less free memory plans the same batches
        fits = AUTO_MOST[device] if self.fits is None else 2 ** (max(1, self.fits).bit_length() - 1)
        return min(AUTO_MOST[device], fits)

    def halve(self, at: int) -> None:
        """Memory ran out in batch `at`: half as many samples a batch for it and all that come after it."""
        half = (len(self.planned[at]) + 1) // 2
        after = self.planned[at:]
        done = [ids for ids in after if self.done.issuperset(ids)]
        waiting = [i for ids in after if ids not in done for i in ids]
        before = sum(map(len, [*self.planned[:at], *done]))
        self.planned[at:] = done + self._cut(waiting, [half], before)
        self.changed()

    def sizes(self) -> list[int]:
        """In the order they were first used."""
        return list(dict.fromkeys(len(batch) for batch in self.planned))

    def _cut(self, ids: Sequence[str], sizes: Sequence[int], before: int) -> list[list[str]]:
        """Batches of these sizes, the last of them for all that follow, that end where a window does, `before` samples counted."""
        found: list[list[str]] = []
        start = 0
        for size in chain(sizes, repeat(sizes[-1])):
            if start == len(ids):
                break
            end = start + min(size, self.ahead - (before + start) % self.ahead, len(ids) - start)
            found.append(list(ids[start:end]))
            start = end
        return found


def longest_first(labels: Sequence[str], tokens: Sequence[int]) -> list[int]:
    """Longest first, equal labels next to each other, the label of the longest of all before the others."""
    longest: dict[str, int] = {}
    for label, count in zip(labels, tokens, strict=True):
        longest[label] = max(count, longest.get(label, 0))
    return sorted(range(len(labels)), key=lambda n: (-longest[labels[n]], labels[n], -tokens[n]))
