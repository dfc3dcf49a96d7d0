"""Run records: what run.json and samples.jsonl hold, written and read. Called, `harness.records()` is all of them as a table."""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    """This package and the Python door's function of the same name: whichever of the two a program reaches for, it gets."""

    def __call__(self, *places: Any) -> Any:
        return import_module("harness.cli.python").records(*places)


sys.modules[__name__].__class__ = _Room
