"""Personalization harness: one interface for every way of making a language model fit a user.

    import harness
    run = harness.evaluate(method="dps", task="lamp4", model="tiny", limit=20)

`evaluate`, `load`, `read`, `records`, `compare` and `table` are found when they are asked for (`harness.cli.python`), so
that `import harness` costs nothing.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from harness.records.version import VERSION as __version__  # noqa: F401

if TYPE_CHECKING:
    from harness.cli.python import Run, compare, evaluate, load, read, records, table

# read where torch loads: its threads sleep while they wait, and leave the processor to others
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

__all__ = ["HarnessError", "Run", "compare", "evaluate", "load", "read", "records", "table"]

_WHERE = dict.fromkeys(__all__, "harness.cli.python") | {"HarnessError": "harness.errors"}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "records":  # also a room; the package can be called
        return import_module("harness.records")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
