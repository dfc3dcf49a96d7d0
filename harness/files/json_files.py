"""JSON files that people write by hand: read, and checked against the shape they should have.

A text where a list belongs, a number where a text belongs or a field that is missing is one line that names file and field;
nothing is turned into something else.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

from harness.errors import DataMissing

T = TypeVar("T")


class Readable(Protocol):
    """A path, or a file of an installed package."""

    def read_bytes(self) -> bytes: ...


def read_json(file: Readable, shape: type[T] | Any, what: str, expected: str) -> T:
    """The file's content as `shape`, a type pydantic can check; `what` names the file's kind, `expected` its form.

    Raises DataMissing where the file cannot be read, is no JSON, or has another shape.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataMissing(f"{what} {file} cannot be read ({error.strerror})") from None
    try:
        found: T = TypeAdapter(shape).validate_json(content.removeprefix(b"\xef\xbb\xbf"), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "json_invalid":
            raise DataMissing(
                f"{what} {file} is not valid JSON ({first['msg'].removeprefix('Invalid JSON: ')})"
            ) from None
        where = ".".join(str(part) for part in first["loc"])
        given = "" if first["type"] == "missing" else f", found {str(first['input'])[:60]!r}"
        raise DataMissing(
            f"{what} {file}: {f'field {where}: ' if where else ''}{first['msg']}{given}; expected {expected}"
        ) from None
    return found
