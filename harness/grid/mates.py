"""A worker as the driver knows it, and the work that is no shard."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from harness.errors import HarnessError


@dataclass
class Chore:
    """Work that is no shard: a fit, users to adapt to, batches to plan, an effect to measure."""

    task: dict[str, Any]
    number: int = -1
    tries: int = 0
    done: bool = False
    value: Any = None
    error: HarnessError | None = None


@dataclass
class Mate:
    """A worker as the driver knows it."""

    rank: int
    ready: bool = False
    refused: bool = False
    chore: Chore | None = None
    shards: list[int] = field(default_factory=list)
    sent: int = 0
    beat: Any = None
    heard: float = 0.0
    """When its heartbeat last changed, by this process's clock."""
    trace: str = ""
    blamed: tuple[int, int] | None = None
