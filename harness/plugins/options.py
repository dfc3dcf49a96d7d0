"""Options from the command line (`--set key=value`) checked against the fields of a method or the arguments of a task."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import typing
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Le, Lt

from harness.errors import UsageError, did_you_mean
from harness.method import Method, Retrieval, RetrieverName
from harness.plugins.declared import check_declared
from harness.plugins.entry_points import added
from harness.task import Task

if TYPE_CHECKING:
    from pydantic import TypeAdapter


Count = Annotated[int, Ge(1)]
"""Of what there is at least one: a rank, samples, draws from a model."""
Many = Annotated[int, Ge(1), Le(10_000)]
"""Of what is made one by one, such as answers of a model: more is a slip of the finger."""
Draw = Annotated[int, Ge(0), Lt(2**63)]
"""A seed, or which of several random draws."""
Finite = Annotated[float, Ge(-1e6), Le(1e6)]
"""A strength or a coefficient: beyond these a float32 holds nothing but it."""


def build_method(
    cls: type[Method], name: str, preset: str | None, settings: Sequence[str], made: Method | None = None
) -> Method:
    """The method (at its defaults, or `made`) with its preset, then its settings. Raises UsageError naming what is allowed."""
    check_declared(cls, f"method {name!r}")
    allowed = _allowed(cls)
    options: dict[str, Any] = {}
    if preset is not None:
        if preset not in cls.presets:
            hint = did_you_mean(preset, cls.presets)
            raise UsageError(
                f"method {name!r} has no preset {preset!r}{hint} it has: {', '.join(cls.presets) or 'none'}"
            )
        options.update(cls.presets[preset])
    options.update(parse(settings, allowed, f"method {name!r}"))
    method = (made or cls()).with_options(options)
    _check(method, allowed, name)
    return method


def _allowed(cls: type[Method]) -> dict[str, Any]:
    """Option -> its type, with the range that the type says."""
    hints = typing.get_type_hints(cls, include_extras=True)
    own = {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.name != "retrieval"}
    of_retrieval = typing.get_type_hints(Retrieval, include_extras=True)
    if names := added("harness.retrievers"):
        of_retrieval["retriever"] = typing.Literal[(*typing.get_args(RetrieverName), *names)]
    return {**of_retrieval, **own}


def _check(method: Method, allowed: Mapping[str, Any], name: str) -> None:
    """What a preset, a class or a caller in Python set is in its range, or one of its words, too."""
    from pydantic import TypeAdapter, ValidationError

    values = {**vars(method.retrieval), **vars(method)}
    for option, hint in allowed.items():
        if _ranges(hint) or _choices(hint):
            try:
                TypeAdapter(hint).validate_python(values[option])
            except ValidationError:
                raise UsageError(
                    f"method {name!r}: {option}={values[option]} is not valid; allowed: {kind(hint)}"
                ) from None


def rebuild_method(cls: type[Method], options: Mapping[str, Any], settings: Sequence[str] = ()) -> Method:
    """The method of a record, from the options as it keeps them; `settings` say where the files and folders are of which it keeps
    name and content alone. Raises UsageError where one is not said or is another one, or the method has other options now."""
    from pydantic import TypeAdapter, ValidationError

    allowed = _allowed(cls)
    given = parse(settings, allowed, f"method {cls.__name__}")
    told = ("source_sha256", "encoder", "profile_encoder")  # of a file of one's own, of `dense`, of `dps` with minilm
    own = {key: value for key, value in options.items() if key not in (*told, *given)}
    for key, value in own.items():
        if _by_content(value):
            raise UsageError(
                f"the record says of {key} what is in it ({value}) and not where it is; give --set {key}=PATH"
            )
    try:
        rebuilt = {key: TypeAdapter(allowed[key]).validate_python(value) for key, value in own.items()}
        made = cls().with_options({**rebuilt, **given})
    except (KeyError, ValidationError) as error:
        raise UsageError(f"method {cls.__name__} has other options now than in the record: {error}") from None
    now = json.loads(json.dumps(made.options()))
    for key in given:
        if now[key] != options.get(key):
            raise UsageError(f"--set {key}={given[key]} is {now[key]}, and the record was made with {options.get(key)}")
    return made


def _by_content(value: Any) -> bool:
    """Whether an option of a record is the name and the content of a file or folder, or of several."""
    return any(isinstance(part, str) and " sha256:" in part for part in (value if isinstance(value, list) else [value]))


def build_task(cls: type[Task], name: str, settings: Sequence[str], data: str | None) -> tuple[Task, dict[str, Any]]:
    """The task with its options, and those options without `data`, which a record describes by its content."""
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    if missing:
        raise UsageError(f"task {name!r}: class {cls.__name__} lacks {', '.join(missing)} (see harness/task.py)")
    check_declared(cls, f"task {name!r}")
    allowed = _arguments(cls)
    options = parse(settings, {k: v for k, v in allowed.items() if k != "data"}, f"task {name!r}")
    given = {"data": data} if data is not None and takes_data(cls) else {}
    task = cls(**options, **given)
    check_declared(task, f"task {name!r}")
    return task, options


def _arguments(cls: type[Task]) -> dict[str, Any]:
    """Argument -> its type; a text where it says none."""
    hints = typing.get_type_hints(cls.__init__)
    return {name: hints.get(name, str) for name in inspect.signature(cls).parameters}


def check_read(cls: type[Task], data: str) -> None:
    """Raises UsageError where the task reads no folder, as one's own users, who are read from the file they are named by."""
    if not takes_data(cls):
        raise UsageError(f"--data {data}: {cls.name} reads no folder of files; leave it out")


def defaults_of(cls: type[Task]) -> dict[str, Any]:
    """The task's options where nobody gives them; `data` is none that a record keeps."""
    parameters = inspect.signature(cls).parameters.values()
    return {one.name: one.default for one in parameters if one.name != "data" and one.default is not one.empty}


def takes_data(cls: type[Task]) -> bool:
    """Whether the task reads a folder of files (`--data`)."""
    return "data" in inspect.signature(cls).parameters


def rebuild_task(cls: type[Task], options: Mapping[str, Any], data: str | None) -> Task:
    """The task of a record, from the options as it keeps them.

    Raises UsageError where the task has other options now, and for a folder that it would not read.
    """
    from pydantic import TypeAdapter, ValidationError

    allowed = _arguments(cls)
    own = {key: value for key, value in options.items() if key != "source_sha256"}  # of a task that is not registered
    if data is not None:
        check_read(cls, data)
    given: dict[str, Any] = {} if data is None else {"data": data}
    try:
        given |= {key: TypeAdapter(allowed[key]).validate_python(value) for key, value in own.items()}
        inspect.signature(cls).bind(**given)
    except (KeyError, TypeError, ValidationError):
        there = ", ".join(f"{key}={value}" for key, value in own.items()) or "none"
        raise UsageError(
            f"task {cls.name!r} has other options now than in the record: {', '.join(allowed) or 'none'} now, {there} there; put its "
            "file back, or run it again"
        ) from None
    return cls(**given)


def parse(settings: Sequence[str], allowed: Mapping[str, Any], whose: str) -> dict[str, Any]:
    """`key=value` strings as values of the `allowed` types."""
    from pydantic import TypeAdapter, ValidationError

    options: dict[str, Any] = {}
    names = ", ".join(allowed) or "no options"
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise UsageError(f"setting {setting!r} is not key=value; {whose} has: {names}")
        if key not in allowed:
            raise UsageError(f"{whose} has no option {key!r}{did_you_mean(key, allowed)} it has: {names}")
        if not _plain(text):
            raise UsageError(f"{whose}: {key} holds bytes that are no UTF-8, or a NUL; no record can hold those")
        try:
            value = _as_said(text, _typed(text, TypeAdapter(allowed[key])))
        except (ValidationError, ValueError):
            value = math.nan
        if isinstance(value, float) and math.isnan(value):
            hint = did_you_mean(text, _choices(allowed[key]))
            raise UsageError(f"{whose}: {key}={text} is not valid{hint} allowed: {kind(allowed[key])}") from None
        options[key] = value
    return options


def _typed(text: str, adapter: TypeAdapter[Any]) -> Any:
    """The text as a value of the type; as several where the type takes `0,2,4`. Raises ValidationError."""
    from pydantic import ValidationError

    try:
        return adapter.validate_python(None if text.lower() in ("none", "null") else text)
    except ValidationError:
        if text == "none":  # the word, where nothing is not allowed: control=none
            return adapter.validate_python(text)
        if text[:1] not in set("-.0123456789"):
            raise
        return adapter.validate_python(text.split(","))


def _plain(text: str) -> bool:
    return "\0" not in text and not any("\ud800" <= letter <= "\udfff" for letter in text)


def _as_said(text: str, value: Any) -> Any:
    """The value, where it is the number that the text says and no more than a file can hold. Raises ValueError elsewhere.

    pydantic reads `0-99` as -99, and a whole number of any size.
    """
    if isinstance(value, tuple):
        for part, one in zip(text.split(","), value, strict=True):
            _as_said(part, one)
    elif type(value) is int and not (float(text) == value and abs(value) < 2**63):
        raise ValueError(f"{text} is not {value}")
    return value


def _choices(hint: Any) -> list[str]:
    """The words an option of this type may be."""
    inside = () if _ranges(hint) and typing.get_origin(hint) is Annotated else typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return [str(choice) for choice in inside]
    return [choice for part in inside for choice in _choices(part)]


def _ranges(hint: Any) -> str:
    """The range that a type says, in words; empty where it says none."""
    if typing.get_origin(hint) is not Annotated:
        return next(filter(None, map(_ranges, typing.get_args(hint))), "")
    said = [
        part for info in hint.__metadata__ for part in getattr(info, "metadata", [info])
    ]  # a pydantic.Field has several
    ends = {name: value for part in said for name, value in _end(part)}
    words = {"ge": "{} or more", "gt": "above {}", "le": "up to {}", "lt": "below {}"}
    return ", ".join(words[name].format(f"{value:g}" if value < 2**53 else "2**63") for name, value in ends.items())


def _end(part: Any) -> list[tuple[str, Any]]:
    return [(name, getattr(part, name)) for name in ("ge", "gt", "le", "lt") if getattr(part, name, None) is not None]


def kind(hint: Any) -> str:
    """A type in words: `int`, `'low' or 'high'`, `numbers as in 1,2`."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return f"{kind(inside[0])}, {_ranges(hint)}"
    if origin is tuple:
        return f"{kind(inside[0])} numbers as in 1,2"
    if origin is typing.Literal:
        return " or ".join(map(repr, inside))
    if inside:
        return " or ".join(map(kind, inside))
    return "none" if hint is type(None) else getattr(hint, "__name__", str(hint))
