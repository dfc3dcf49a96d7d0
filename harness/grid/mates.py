"""A worker as the driver knows it, and the work that is no shard."""

from __future__ import annotations

from collections.abc import Mapping
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
    chore: Chore | None = None
    shards: list[int] = field(default_factory=list)
    sent: int = 0
    beat: Any = None
    heard: float = 0.0
    """When its heartbeat last changed, by this process's clock."""
    trace: str = ""
    blamed: tuple[int, int] | None = None


def why_unlike(
    first: tuple[Mapping[str, Any], Mapping[str, Any]],
    other: tuple[Mapping[str, Any], Mapping[str, Any]],
    *,
    mixed: bool,
) -> str:
    """Why two workers' numbers cannot stand in one record; empty where they can. Of each its model and its hardware."""
    if {**first[0], "source": ""} != {**other[0], "source": ""}:
        return "has another model, or another version of the harness, than the first worker"
    one, two = _kind_of(first[1]), _kind_of(other[1])
    if one != two and not mixed:
        return f"computes on {two} and the first on {one}, whose last bits differ; --mixed_hardware allows both"
    return ""


def _kind_of(hardware: Mapping[str, Any]) -> str:
    return ", ".join(str(hardware[name]) for name in ("device", "gpu", "cpu") if hardware.get(name))
