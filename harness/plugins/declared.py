"""What a class of a method or a task says of itself, checked where the class comes in: nothing else would look at it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Set
from functools import cached_property
from typing import Any, TypeAlias, get_args, get_type_hints

from harness.errors import UsageError
from harness.method import Method
from harness.plugins.returned import is_number, shown_as
from harness.task import Asks, Task

_Check: TypeAlias = "tuple[Callable[[Any], bool], str]"


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _are_names(value: object) -> bool:
    return isinstance(value, Set | tuple | list) and all(map(_is_text, value))


def _by_name(value: object, of: Callable[[Any], bool] = lambda part: True) -> bool:
    return isinstance(value, Mapping) and all(_is_text(name) and of(part) for name, part in value.items())


def _is_range(value: object) -> bool:
    if not isinstance(value, tuple | list) or len(value) != 2 or not all(map(is_number, value)):
        return False
    return bool(value[0] <= value[1])


def _word(cls: type, name: str) -> _Check:
    """One of those that the annotation lists."""
    words = get_args(get_args(get_type_hints(cls)[name])[0])
    return (lambda value: _is_text(value) and value in words), " or ".join(map(repr, words))


_TEXT: _Check = _is_text, "a text"
_NAMES: _Check = _are_names, "a set of names, as in frozenset({'gamma'})"
_FLAG: _Check = (lambda value: isinstance(value, bool)), "True or False"

DECLARED: Mapping[type, Mapping[str, _Check]] = {
    Method: {
        "presets": ((lambda value: _by_name(value, _by_name)), "a dict by name, of options with their values each"),
        "decode_only": _NAMES,
        "grouping": _NAMES,
        "fits_without_train": _FLAG,
        "later": (_by_name, "a dict by name"),
    },
    Task: {
        "name": _TEXT,
        "version": ((lambda value: isinstance(value, int) and not isinstance(value, bool)), "a whole number"),
        "default_split": _TEXT,
        "train_ignores": _NAMES,
        "asks": (
            (lambda value: _are_names(value) and set(value) <= set(get_args(Asks))),
            f"a set of names out of {', '.join(map(repr, get_args(Asks)))}",
        ),
        "asked_by_name": _FLAG,
        "closed": _FLAG,
        "how_to_get": _TEXT,
        "judged": _FLAG,
        "grades_with_data": _FLAG,
        "reads_model": _FLAG,
        "per_sample": ((lambda value: _by_name(value, _is_text)), "a dict by name, of texts"),
        "ranges": (
            (lambda value: _by_name(value, _is_range)),
            "a dict by name, of (least, greatest) as in {'stars': (1, 5)}",
        ),
        "independent": _word(Task, "independent"),
    },
}
"""Base -> every attribute that it declares for its classes -> whether a value can stand there, and which can in words."""


def check_declared(given: type[Method] | type[Task] | Task, whose: str) -> None:
    """Raises UsageError where a class, or a task in its constructor, says something that its base does not allow."""
    cls = given if isinstance(given, type) else type(given)
    for name, (allowed, words) in DECLARED[Task if issubclass(cls, Task) else Method].items():
        value = inspect.getattr_static(given, name, None)
        if not isinstance(value, property | cached_property) and not allowed(value):
            raise UsageError(f"{whose}: {name} of class {cls.__name__} is {shown_as(value)}; expected {words}")
