"""`harness list`: what is there, in 80 columns, and one method in full. Imports no torch."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields

from harness.errors import UsageError, did_you_mean
from harness.files.shown import first_line

Rows = Sequence[Sequence[str]]


def listing(what: str, name: str | None, width: int) -> str:
    """The list called `what`, or of its members the one called `name`; no line longer than `width`."""
    if what not in LISTS:
        raise UsageError(f"unknown list {what!r}{did_you_mean(what, LISTS)} allowed: {', '.join(LISTS)}")
    if name is not None and what != "methods":
        raise UsageError(f"only methods are explained one by one; 'harness list {what}' has all that is known of them")
    if name is not None:
        return method_in_full(name, width)
    headers, make, after = LISTS[what]
    rows = make()
    first = max(len(row[0]) for row in (headers, *rows))
    ruled = [headers, ("-" * first, "-" * (width - first - 2)), *rows]
    lines = [line for name, text in ruled for line in _hanging(name.ljust(first + 2), text, width)]
    return "\n".join([*lines, *(["", textwrap.fill(after, width)] if after else [])])


def method_in_full(name: str, width: int) -> str:
    """What a method does, its presets, and each option with its default, what it may be, and what it is for."""
    from harness.method import Retrieval
    from harness.plugins.options import kind
    from harness.plugins.registry import method_row

    row = method_row(name)
    made = row.cls()
    hints = {**typing.get_type_hints(Retrieval), **typing.get_type_hints(row.cls)}
    said = {**field_docs(Retrieval), **field_docs(row.cls)}
    text = inspect.getdoc(row.cls) or ""
    parts = [textwrap.fill(paragraph, width) for paragraph in (f"{row.name}: {text}").split("\n\n")]
    for preset, options in row.cls.presets.items():
        sets = ", ".join(f"{key}={value}" for key, value in options.items())
        parts.append(textwrap.fill(f"--preset {preset}: {sets}", width, subsequent_indent="    "))
    own = [f.name for f in fields(row.cls) if f.name != "retrieval"]
    lines = []
    for option in [*own, *(f.name for f in fields(Retrieval) if f.name not in own)]:
        lines += _hanging(f"  --set {option}=", str(getattr(made, option, made.options()[option])), width)
        facts = f"{kind(hints[option])}. {said.get(option, '')}".rstrip()
        lines += textwrap.wrap(facts, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n\n".join([*parts, "options, with their defaults:\n" + "\n".join(lines)])


def _hanging(name: str, text: str, width: int) -> list[str]:
    """The text behind the name, further lines below where it began."""
    return textwrap.wrap(text, width, initial_indent=name, subsequent_indent=" " * len(name)) or [name.rstrip()]


def field_docs(cls: type) -> dict[str, str]:
    """Field -> the text under it, of the class and those it is made from."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        try:
            (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        except (OSError, TypeError, ValueError, SyntaxError):
            continue
        lines = body.body if isinstance(body, ast.ClassDef) else []
        for line, after in itertools.pairwise(lines):
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(after, ast.Expr):
                value = after.value
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    found[line.target.id] = " ".join(value.value.split())
    return found


def _methods() -> Rows:
    from harness.methods import METHODS
    from harness.plugins.registry import method_class

    return [[name, first_line(method_class(name).__doc__)] for name in METHODS]


def _tasks() -> Rows:
    from harness.plugins.registry import task_class
    from harness.tasks import TASKS

    return [[name, first_line(task_class(name).__doc__)] for name in TASKS]


def _models() -> Rows:
    from harness.plugins.registry import MODELS

    return [[name, source or "embedded, works offline"] for name, source in MODELS.items()]


def _retrievers() -> Rows:
    from harness.plugins.retrieve import retrievers

    return [[name, text] for name, text in retrievers().items()]


def _metrics() -> Rows:
    from harness.statistics.text_metrics import all_metrics

    return [[name, text] for name, text in all_metrics().items()]


def _tables() -> Rows:
    from harness.publish.tables import TABLES

    return [[name, title] for name, title in TABLES.items()]


def _figures() -> Rows:
    from harness.publish.figures import FIGURES

    return [[name, spec.title] for name, spec in FIGURES.items()]


LISTS: Mapping[str, tuple[Sequence[str], Callable[[], Rows], str]] = {
    "methods": (
        ("method", "what it does"),
        _methods,
        "'harness list methods dps' explains one, its options and presets.",
    ),
    "tasks": (("task", "what it asks"), _tasks, ""),
    "models": (("alias", "hub id (any hub id or folder works too)"), _models, ""),
    "retrievers": (("retriever", "order of the history"), _retrievers, ""),
    "metrics": (
        ("metric", "of one's own users' texts"),
        _metrics,
        "--task_set metrics=NAME,NAME chooses; choice and number have accuracy, macro_f1, mae and rmse of their own.",
    ),
    "tables": (("table", "title"), _tables, ""),
    "figures": (("figure", "title"), _figures, ""),
}
