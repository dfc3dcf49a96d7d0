"""What installed packages add by name: entry points of the groups `harness.retrievers` and `harness.metrics`.

In a package's pyproject.toml:
    [project.entry-points."harness.metrics"]
    politeness = "my_package:politeness"
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from harness.errors import UsageError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint


@cache
def _found(group: str) -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points  # brings the email package with it

    return {point.name: point for point in entry_points(group=group)}


def added(group: str) -> Sequence[str]:
    """The names that installed packages add to a group."""
    return list(_found(group))


def load_added(group: str, name: str) -> Any:
    """What stands behind an added name. Raises UsageError where it cannot be imported."""
    point = _found(group)[name]
    try:
        return point.load()
    except Exception as error:
        raise UsageError(
            f"{name!r} is added by {point.value} ({group}), which cannot be imported: {type(error).__name__}: {error}"
        ) from error
