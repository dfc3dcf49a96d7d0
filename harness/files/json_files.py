"""JSON that others wrote: read whole or refused, and checked against the shape it should have.

`parse` is the one way in. What Python's reader lets through and something later breaks on is refused there, in one line:
deep nesting, a name twice in one object, NaN and numbers that no float holds, halves of surrogate pairs,
bytes that are no UTF-8. A text where a list belongs, a number where a text belongs or a field that is missing is one line
that names file and field; nothing is turned into something else.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

from harness.errors import DataMissing

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")

DEPTH = 100
"""Lists and objects inside each other."""
BOM = b"\xef\xbb\xbf"
WHITE = re.compile(r"[ \t\n\r]*")
LARGEST = 4 << 30
"""Bytes of a file: far above any benchmark's, far below what would fill a machine."""
_HALF_ESCAPED = re.compile(
    rb"\\u[dD](?:[89abAB]..(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]..\\u[dD])[c-fC-F])", re.DOTALL
)
"""Where the text hints at one: the values are looked at only then."""
_HALF = re.compile("[\ud800-\udfff]")
_FLAT = frozenset({str, int, float, bool, NoneType})
"""Types of values that hold no others."""


class Readable(Protocol):
    """A path, or a file of an installed package."""

    def read_bytes(self) -> bytes: ...


def parse(content: bytes | str, *, surrogates: bool = False) -> Any:
    """The value of a JSON text. Raises ValueError, in one line, for whatever is no JSON or more than a reader should hold.

    A byte order mark is no part of it. `surrogates` lets halves of pairs through, for text that a model wrote.
    """
    if isinstance(content, str):
        content = content.encode("utf-8", "surrogatepass")
    try:
        text = content.removeprefix(BOM).decode("utf-8", "surrogatepass" if surrogates else "strict")
        value, end = STRICT.raw_decode(text, WHITE.match(text, 0).end())  # type: ignore[union-attr]
        end = WHITE.match(text, end).end()  # type: ignore[union-attr]
        if end != len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is no UTF-8") from None
    except RecursionError:
        raise ValueError(f"nested more than {DEPTH} deep") from None
    check(value, b"" if surrogates else content)
    return value


def check(value: Any, content: bytes, where: str = "", depth: int = DEPTH) -> None:
    """Raises ValueError for halves of surrogate pairs, which only escapes in `content` can have made, and for nesting."""
    if b"\\u" in content and _HALF_ESCAPED.search(content):
        _no_halves(where, value)
    level = [value] if isinstance(value, list | dict) else []
    for _ in range(depth):
        inner: list[Any] = []
        for outer in level:
            parts = outer.values() if isinstance(outer, dict) else outer
            if not _FLAT.issuperset(map(type, parts)):
                inner += [part for part in parts if type(part) not in _FLAT]
        level = inner
    if level:
        raise ValueError(f"nested more than {DEPTH} deep")


def read_bytes(file: Readable) -> bytes:
    """Raises OSError where it cannot be read, ValueError where it is no file or too large to be what it should be."""
    if isinstance(file, Path):
        about = status(file)
        if about.st_size > LARGEST:
            raise ValueError(f"it has {about.st_size / 2**30:.1f} GiB, more than {LARGEST >> 30}")
    return file.read_bytes()


def status(file: Path) -> os.stat_result:
    """Raises OSError where there is none, ValueError where it is no file."""
    about = file.stat()
    if not stat.S_ISREG(about.st_mode):
        raise ValueError("it is no file")
    return about


def read_json(file: Readable, shape: type[T] | Any, what: str, expected: str) -> T:
    """The file's content as `shape`, a type pydantic can check; `what` names the file's kind, `expected` its form.

    Raises DataMissing where the file cannot be read, is no JSON, or has another shape.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        content = read_bytes(file)
        parse(content)
    except OSError as error:
        raise DataMissing(f"{what} {file} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise DataMissing(f"{what} {file} is not valid JSON ({error})") from None
    try:
        found: T = TypeAdapter(shape).validate_json(content.removeprefix(BOM), strict=True)
    except ValidationError as error:
        raise DataMissing(f"{what} {file}: {problem_of(error)}; expected {expected}") from None
    return found


def instance(cls: type[T], value: Any) -> T:
    """`value` as the dataclass: fields that it does not know, or whose types are others, raise ValueError in one line.

    Lists become tuples, and objects dataclasses, where the fields say so; nothing else is turned into something else.
    """
    from pydantic import ValidationError

    try:
        _shape(cls).validate_python(value)  # type: ignore[arg-type]
    except ValidationError as error:
        raise ValueError(problem_of(error)) from None
    made: T = _built(cls, value)
    return made


@cache
def _shape(cls: type) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(_object_of(cls))


@cache
def _object_of(cls: type) -> Any:
    """A type of JSON objects with the dataclass's fields."""
    from typing import NotRequired, Required

    from pydantic import ConfigDict
    from typing_extensions import TypedDict

    needed = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
    hints = {
        name: Required[_json_type(hint)] if name in needed else NotRequired[_json_type(hint)]
        for name, hint in get_type_hints(cls).items()
    }
    made = TypedDict(cls.__name__, hints)  # type: ignore[misc]
    made.__pydantic_config__ = ConfigDict(strict=True, extra="forbid")  # type: ignore[attr-defined]
    return made


def _json_type(hint: Any) -> Any:
    origin, inside = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return _object_of(hint)  # type: ignore[arg-type]
    if origin is tuple:
        return list[_json_type(inside[0])]  # type: ignore[misc]
    if origin in (list, dict):
        return origin[tuple(map(_json_type, inside))]
    if origin in (Union, UnionType):
        return Union[tuple(map(_json_type, inside))]  # noqa: UP007
    return hint


def _built(hint: Any, value: Any) -> Any:
    origin, inside = get_origin(hint), get_args(hint)
    if value is None:
        return None
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        return hint(**{name: _built(hints[name], part) for name, part in value.items()})  # type: ignore[operator]
    if origin is tuple:
        return tuple(_built(inside[0], part) for part in value)
    if origin is list:
        return [_built(inside[0], part) for part in value]
    if origin is dict and isinstance(value, dict):
        return {name: _built(inside[1], part) for name, part in value.items()}
    if origin in (Union, UnionType):
        (*_, named) = [NoneType, *(part for part in inside if is_dataclass(part) or get_origin(part))]
        return _built(named, value) if named is not NoneType else value
    return value


def problem_of(error: Any) -> str:
    """The first thing that a pydantic ValidationError finds wrong, in one line: field, reason and what was found."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    given = "" if first["type"] == "missing" else f", found {ascii(first['input'])[:60]}"
    return " ".join(f"{f'field {where}: ' if where else ''}{first['msg']}{given}".split())


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"field {twice!a} stands twice in one object")
    return made


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def _whole(digits: str) -> int:
    if len(digits) > 300:
        raise ValueError(f"{digits[:20]}... is a number of more than 300 digits")
    return int(digits)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is a number too large for a float")
    return value


def _no_halves(where: str, value: Any) -> None:
    waiting: list[tuple[str, Any]] = [(where, value)]
    while waiting:
        where, value = waiting.pop()
        if isinstance(value, list | dict):
            names = list(value) if isinstance(value, dict) else range(len(value))
            waiting += [(f"{where}.{name}" if where else str(name), value[name]) for name in names]
            waiting += [(where, name) for name in names if isinstance(name, str)]
        elif isinstance(value, str) and not value.isascii() and _HALF.search(value):
            place = f"field {ascii(where[:80])[1:-1]} holds" if where else "it is"
            raise ValueError(f"{place} half of a surrogate pair, which is no character")


STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_number, parse_int=_whole, parse_float=_finite)
