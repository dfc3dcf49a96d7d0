"""One line of a file of users: its fields, checked, and the template that makes a prompt of it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from harness.data import HistoryItem, Message
from harness.errors import DataMissing, UsageError
from harness.files.rows import SPLITS, Row, content_of
from harness.plugins.retrieve import date_key

TEMPLATE = """\
{% if summary %}About the author: {{ summary }}

{% endif %}{% if history %}What the same person wrote before:
{% for item in history %}{% if item.output %}{{ item.input }}
{{ item.output }}{% else %}{{ item.text }}{% endif %}

{% endfor %}{% endif %}{{ input }}{% if choices %}

Answer with one of: {{ choices | join(" | ") }}{% endif %}"""
ALIASES: Mapping[str, tuple[str, ...]] = {
    "user": ("user", "user_id", "author"),
    "input": ("input", "text", "prompt", "question", "query"),
    "target": ("target", "reply", "output", "answer", "label", "gold"),
}


_DAY = re.compile(r"([12]\d{3})(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])", re.ASCII)
"""20240531."""


def _readable(date: str | None) -> str | None:
    """Year, month, day, or a number alone. Another order of the three would be sorted as if it were this one."""
    if date and (day := _DAY.fullmatch(date)):
        return "-".join(day.groups())
    try:
        first, *others = date_key(date or "0")
        sound = not others or (
            31 < first < 10_000
            and len(others) < 3
            and all(1 <= one <= most for one, most in zip(others, (12, 31), strict=False))
        )
    except ValueError:
        sound = False
    if not sound:
        raise ValueError("expected a date as in 2024-05-31")
    return date


def _is_number(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)


Date: TypeAlias = Annotated[str | None, AfterValidator(_readable)]


_OF_ITEMS: Mapping[str, str] = {"input": "input", "output": "target"}
"""A field of an item -> the field of a line that has its names."""


class Item(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    text: str = ""
    input: str = ""
    output: str = ""
    date: Date = None

    @model_validator(mode="before")
    @classmethod
    def _by_any_name(cls, value: Any) -> Any:
        """Its fields, which may have the names that those of lines have: nothing that the user wrote is left out unread."""
        if not isinstance(value, Mapping):
            return value
        named = {field: [name for name in ALIASES[of] if name in value] for field, of in _OF_ITEMS.items()}
        if not any(named.values()):
            raise ValueError("expected an item of history to have text, or input and output")
        read = {"date": value["date"]} if "date" in value else {}
        for field, names in named.items():
            said = {name: value[name] for name in names if value[name] not in (None, "")}
            for name, one in said.items():
                number = field == "output" and (type(one) is int or _is_number(one))
                if not isinstance(one, str) and not number:
                    raise ValueError(f"expected {name!r} of an item of history to be a text")
                if str(one) != str(next(iter(said.values()))):
                    raise ValueError(
                        f"an item of history has {' and '.join(map(repr, said))}, which are names of one field; leave one of them"
                    )
                read[name if name in cls.model_fields else field] = str(one)
        return read


class Line(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    user: str | int
    input: str
    target: str | int | float | list[str]
    history: list[str | Item] | None = None
    choices: list[str] | None = None
    id: str | int | None = None
    split: str = "dev"
    date: Date = None

    @field_validator("split")
    @classmethod
    def _our_name(cls, value: str) -> str:
        return SPLITS.get(value, value)

    @field_validator("user", "target", "choices", "input")
    @classmethod
    def _says_something(cls, value: Any) -> Any:
        if value == [] or any(
            isinstance(one, str) and not one.strip() for one in (value if isinstance(value, list) else [value])
        ):
            raise ValueError("it is empty, or a part of it is")
        if isinstance(value, float) and not _is_number(value):
            raise ValueError("it is no number")
        return value

    @field_validator("choices")
    @classmethod
    def _can_be_chosen(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and not 1 < len({choice.strip() for choice in value}) == len(value):
            raise ValueError("expected two different choices or more, each of them once")
        return value

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(self.target) if isinstance(self.target, list) else (str(self.target),)


class HistoryLine(BaseModel):
    """Of a file of histories: a user's whole history, or one item of it."""

    model_config = ConfigDict(strict=True, extra="ignore")

    user: str | int
    history: list[str | Item] | None = None
    input: str = ""
    target: str = ""
    date: Date = None

    @property
    def items(self) -> Sequence[str | Item]:
        one = Item(input=self.input, output=self.target, text="" if self.target else self.input, date=self.date)
        return [one] if self.history is None else self.history


@dataclass(frozen=True)
class JinjaTemplate:
    """A prompt as one user turn; the sources decide it, so equal templates render equally."""

    source: str = TEMPLATE
    plain: str = ""
    """Another one where the prompt has no history and no summary; empty = the same."""
    choices: tuple[str, ...] = ()

    def __call__(self, text: str, items: Sequence[HistoryItem], summary: str) -> tuple[Message, ...]:
        history = [{"text": "", "input": "", "output": "", **item.fields} for item in items]
        source = self.source if items or summary or not self.plain else self.plain
        said = {"input": text, "history": history, "summary": summary, "choices": self.choices}
        return (Message("user", rendered(source, said)),)


def rendered(source: str, said: Mapping[str, Any], *, texts: bool = False) -> str:
    """The template with these names in it; `texts`: items of its history are texts, as a rubric's are, and have no fields.

    Raises UsageError where it is none, uses other names, or cannot be filled in.
    """
    try:
        return str(_compiled(source).render(said))
    except Exception as error:  # a template is a program: besides jinja's errors there are those of its arithmetic
        items = "are texts" if texts else "have text, input and output"
        why = f"{error}" if type(error).__module__.startswith("jinja2") else f"{type(error).__name__}: {error}"
        raise UsageError(
            f"the template cannot be used ({why}); it may name {', '.join(said)}; items of history {items}, and there may be none"
        ) from None


@cache
def _compiled(source: str) -> Any:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(undefined=StrictUndefined).from_string(source)


def text_or_file(given: str) -> str:
    """The text itself, or of a .jinja or .txt file what is in it. Raises DataMissing where that cannot be read."""
    if "\n" in given or not given.endswith((".jinja", ".txt")):
        return given
    content = content_of(Path(given), "a text, or the path of a file that holds it")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataMissing(f"{given}: byte {error.start} is no UTF-8; convert the file") from None


def records(items: Sequence[str | Item]) -> tuple[HistoryItem, ...]:
    """Oldest first where all have dates, else as they stand."""
    made = [item if isinstance(item, Item) else Item(text=item) for item in items]
    return tuple(record_of(str(number), made[number]) for number in oldest_first([item.date for item in made]))


def oldest_first(dates: Sequence[str | None]) -> list[int]:
    """The places of these dates in their order, of equal ones in the file's; in the file's where one is missing."""
    keys = [date_key(date) for date in dates if date]
    places = range(len(dates))
    return sorted(places, key=keys.__getitem__) if len(keys) == len(dates) else list(places)


def record_of(name: str, item: Item) -> HistoryItem:
    asked, said = item.input or item.text, item.text or item.input
    fields = {"input": asked, "output": item.output} if item.output else {"text": said}
    return HistoryItem(name, fields, " ".join(filter(None, fields.values())), item.date)


def read_lines(path: str, rows: Sequence[Row], shape: type[Any], columns: Mapping[str, str | None]) -> list[Any]:
    """The lines of a file as `shape`. Raises DataMissing naming file, line and field."""
    adapter = TypeAdapter(shape)
    found = []
    chosen = _chosen(path, rows, columns)
    for number, row in rows:
        if not isinstance(row, Mapping):
            raise DataMissing(f"{path}, line {number}: expected an object with user, input and target")
        named = dict(row)
        for field, column in chosen.items():
            named.pop(field, None)
            if column in row:
                named[field] = row[column]
            elif shape.model_fields[field].is_required() and (
                other := next((name for name in ALIASES.get(field, ()) if name in row), "")
            ):
                raise DataMissing(
                    f"{path}, line {number}: field {field}: column {column!r} is empty or missing here, and {other!r} is not taken "
                    f"for it; fill it in, or name the column: --task_set {field}_column={other}"
                )
        try:
            found.append(adapter.validate_python(named))
        except ValidationError as error:
            first, *more = error.errors(include_url=False)
            ours = [one for one in more if one["type"] == "value_error" and one["loc"][:1] == first["loc"][:1]]
            first = ours[0] if ours else first  # of a text or an object, what the object lacks
            where = ".".join(str(part) for part in first["loc"][:1])
            given = f", found {str(first['input'])[:60]!r}"
            if first["type"] == "missing":
                given = f"; this line has {', '.join(repr(str(name)) for name in row)[:200]}"
            raise DataMissing(f"{path}, line {number}: field {where}: {first['msg']}{given}") from None
    if not found:
        raise DataMissing(f"{path} has no lines")
    _check_dates(path, rows, found)
    return found


def with_answers(rows: Sequence[Row], column: str | None) -> tuple[list[Row], list[str]]:
    """The rows without those of splits in which none has a target, as many a test split has it; and the names of these splits."""
    answered: dict[str, bool] = {}
    for _, row in rows:
        if isinstance(row, Mapping):
            says = any(row.get(name) is not None for name in ((column,) if column else ALIASES["target"]))
            answered[_split(row)] = answered.get(_split(row), False) or says
    without = [split for split, says in answered.items() if not says]
    if len(without) == len(answered):
        return list(rows), []
    return [row for row in rows if not isinstance(row.value, Mapping) or _split(row.value) not in without], without


def _split(row: Mapping[str, Any]) -> str:
    name = str(row.get("split", "dev"))
    return SPLITS.get(name, name)


def _check_dates(path: str, rows: Sequence[Row], lines: Sequence[Line | HistoryLine]) -> None:
    """Raises DataMissing where dates are written in two forms, whose numbers say nothing of which is earlier."""
    kept: set[str] = set()
    first = ""
    for row, line in zip(rows, lines, strict=True):
        for date in filter(None, [line.date, *(getattr(item, "date", None) for item in line.history or ())]):
            common = kept & _forms(date) if first else _forms(date)
            if not common:
                raise DataMissing(
                    f"{path}, line {row.line}: field date: {date!r} is written in another form than {first}; write all dates of a "
                    "file in one, as in 2024-05-31"
                )
            if common != kept:
                kept, first = common, f"{date!r} of line {row.line}"


def _forms(date: str) -> set[str]:
    """What it may be: a day (or month, or year), a count, or seconds or a part of them since 1970."""
    digits = len(date.strip())
    if "-" in date or digits == 4:
        return {"day"} if "-" in date else {"day", "count"}
    return {f"{digits // 3 * 3} digits" if digits > 8 else "count"}


def _chosen(path: str, rows: Sequence[Row], columns: Mapping[str, str | None]) -> dict[str, str]:
    """Field -> the column it is read from on all lines: where one is empty on a line, no other is taken for it."""
    there = dict.fromkeys(str(name) for _, row in rows if isinstance(row, Mapping) for name in row)
    for column in filter(None, columns.values()):
        if there and column not in there:
            raise DataMissing(f"{path}, line {rows[0].line}: no column {column!r}; it has {', '.join(there)}")
    return {
        field: column or next((name for name in ALIASES.get(field, ()) if name in there), field)
        for field, column in columns.items()
    }
