"""Your own users: one line an example, from .jsonl, .json, .csv or .parquet, as --task users:./mine.jsonl.

    {"user": "ann", "input": "Reply to: ...", "target": "Sure!", "history": ["earlier text", {"input": "...", "output": "..."}]}

Optional fields: `choices` (a list: the most likely one is the answer), `id`, `split` (dev where it is not said; train to fit
on), `date`. Where no line has a history, a user's earlier lines are it, so that a table of user, text and reply works at
once. Other names of columns are read as they are (text, prompt, question; reply, output, answer, label) or by option:
--task_set input_column=mail. A file of users beside the examples: --task_set histories=./users.jsonl, one line a user.

The kind decides what is measured: `choice` where lines have choices (accuracy), `number` where all targets are numbers (MAE,
RMSE), else `text` (ROUGE, chrF and BLEU by sacrebleu, exact match). The prompt is a jinja template, by default one that
writes history items before the input; `--dry_run` shows it.

A task of your own is this one with another `read`, as --task ./mine.py:
    class Mails(Users):
        name = "mails"
        def read(self):
            return [{"user": "ann", "input": "Reply to: lunch?", "target": "Sure!"}]
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, TypeAdapter, ValidationError, field_validator

from harness.data import Example, HistoryItem, Labelled, Message, User
from harness.errors import DataMissing, UsageError
from harness.retrieve import date_key
from harness.statistics import metrics
from harness.task import GenerationDefaults, Metric, Sample, Selection, Task

Kind: TypeAlias = Literal["text", "choice", "number"]

TEMPLATE = """\
{% if summary %}About the author: {{ summary }}

{% endif %}{% if history %}What the same person wrote before:
{% for item in history %}{% if item.output %}{{ item.input }}
{{ item.output }}{% else %}{{ item.text }}{% endif %}

{% endfor %}{% endif %}{{ input }}"""
ALIASES: Mapping[str, tuple[str, ...]] = {
    "user": ("user", "user_id", "author"),
    "input": ("input", "text", "prompt", "question", "query"),
    "target": ("target", "reply", "output", "answer", "label", "gold"),
}
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def _readable(date: str | None) -> str | None:
    try:
        date_key(date or "0")
    except ValueError:
        raise ValueError("expected a date as in 2024-05-31") from None
    return date


Date: TypeAlias = Annotated[str | None, AfterValidator(_readable)]


class _Item(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    text: str = ""
    input: str = ""
    output: str = ""
    date: Date = None


class _Line(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    user: str | int
    input: str
    target: str | int | float | list[str]
    history: list[str | _Item] | None = None
    choices: list[str] | None = None
    id: str | int | None = None
    split: str = "dev"
    date: Date = None

    @field_validator("user", "target", "choices", "input")
    @classmethod
    def _says_something(cls, value: Any) -> Any:
        if value in ("", []) or (isinstance(value, str) and not value.strip()):
            raise ValueError("it is empty")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError("it is no number")
        return value

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(self.target) if isinstance(self.target, list) else (str(self.target),)


class _UserLine(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    user: str | int
    history: list[str | _Item]


@dataclass(frozen=True)
class JinjaTemplate:
    """A prompt as one user turn; the source decides it, so equal templates render equally."""

    source: str = TEMPLATE

    def __call__(self, text: str, items: Sequence[HistoryItem], summary: str) -> tuple[Message, ...]:
        history = [{"text": "", "input": "", "output": "", **item.fields} for item in items]
        return (Message("user", _compiled(self.source).render(input=text, history=history, summary=summary)),)


@cache
def _compiled(source: str) -> Any:
    from jinja2 import StrictUndefined, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        made = ImmutableSandboxedEnvironment(undefined=StrictUndefined).from_string(source)
        made.render(input="x", history=[{"text": "x", "input": "", "output": ""}], summary="x")
    except TemplateError as error:
        raise UsageError(
            f"the template cannot be used ({error}); it may name input, summary, and history, whose items have text, input and "
            "output"
        ) from None
    return made


class Users(Task):
    """Your own users, from a file: users:./mine.jsonl (also .json, .csv, .parquet)."""

    name = "users"
    source: ClassVar[str] = ""
    """The file: what stands behind `users:`."""

    def __init__(
        self,
        kind: Literal["auto", "text", "choice", "number"] = "auto",
        template: str = TEMPLATE,
        histories: str | None = None,
        user_column: str | None = None,
        input_column: str | None = None,
        target_column: str | None = None,
        max_new_tokens: int = 64,
    ) -> None:
        """`template` is jinja text, or a file that ends in .jinja."""
        if not self.source and type(self).read is Users.read:
            raise UsageError("users: name a file behind it, as in --task users:./mine.jsonl")
        if max_new_tokens < 1:
            raise UsageError(f"users: max_new_tokens={max_new_tokens} leaves no room for an answer; allowed: >= 1")
        self.asked_kind, self.histories, self.max_new_tokens = kind, histories, max_new_tokens
        self.columns = {"user": user_column, "input": input_column, "target": target_column}
        if template.endswith(".jinja"):
            template = _content(Path(template)).decode("utf-8", errors="strict")
        self.template = JinjaTemplate(template)
        _compiled(self.template.source)

    @classmethod
    def member(cls, name: str) -> type[Task]:
        if not name.endswith(SUFFIXES):
            raise UsageError(f"users:{name} is no file of users; give one that ends in {', '.join(SUFFIXES)}")
        return type("Users", (cls,), {"source": name, "__doc__": cls.__doc__})

    def read(self) -> Sequence[Mapping[str, Any]]:
        """The lines, each with `user`, `input`, `target` and what else there is: what a task of your own overrides."""
        return _rows(Path(self.source))

    @property
    def closed(self) -> bool:  # type: ignore[override]
        return self.kind != "text"

    def items(self, selection: Selection) -> Sequence[Labelled]:
        found = [line for line in self._lines if line.split == selection.split]
        if not found:
            there = ", ".join(sorted({line.split for line in self._lines}))
            raise DataMissing(f"{self._where} has no split {selection.split!r}; it has {there} (field 'split')")
        return selection.of(self._labelled(line) for line in found)

    def fingerprint(self, selection: Selection) -> str:
        parts = [json.dumps([line.model_dump() for line in self._lines]).encode(), self.template.source.encode()]
        parts += [_content(Path(self.histories))] if self.histories else []
        if selection.split == "train":
            self.items(replace(selection, limit=1))
        return hashlib.sha256(b"\0".join(parts)).hexdigest()

    def generation(self) -> GenerationDefaults:
        return GenerationDefaults(self.max_new_tokens)

    def describe_data(self) -> str:
        users = len({line.user for line in self._lines})
        return f"{self.name}: {users} users with {len(self._lines)} lines in {Path(self._where).name}, kind {self.kind}"

    @cached_property
    def kind(self) -> Kind:
        """What is measured."""
        if self.asked_kind != "auto":
            return self.asked_kind
        if any(line.choices for line in self._lines):
            return "choice"
        return "number" if all(_number(t) is not None for line in self._lines for t in line.targets) else "text"

    def grade(self, sample: Sample) -> Sample:
        if sample.response is None or sample.error is not None:
            return sample
        answer, golds = sample.response.strip(), [target.strip() for target in sample.targets]
        if self.kind == "choice":
            return replace(sample, parsed=answer, metrics={"accuracy": float(answer in golds)})
        if self.kind == "number":
            parsed = _number(answer)
            gold = float(golds[0])
            # an answer that is no number has no error to average: it counts as unparsed, and is in no mean
            error = None if parsed is None else abs(parsed - gold)
            square = None if error is None else error * error
            return replace(sample, parsed=parsed, metrics={"abs_error": error, "sq_error": square})
        rouge = [metrics.rouge(answer, gold) for gold in golds]
        best = {name: max(getattr(one, name) for one in rouge) for name in ("rouge1", "rougeL")}
        exact = float(" ".join(answer.split()) in [" ".join(gold.split()) for gold in golds])
        return replace(sample, parsed=answer or None, metrics={**best, **_sacre(answer, golds), "exact": exact})

    def aggregate(self, samples: Sequence[Sample]) -> Mapping[str, Metric]:
        graded = [sample for sample in samples if sample.metrics]
        if self.kind == "choice":
            return {"accuracy": metrics.mean(graded, "accuracy")}
        if self.kind == "text":
            return {name: metrics.mean(graded, name) for name in ("rouge1", "rougeL", "chrf", "bleu", "exact")}
        rated = [sample for sample in graded if sample.parsed is not None]
        left = len(graded) - len(rated)
        note = f"{left} of {len(graded)} answers are no number and are left out" if left else ""
        return {
            "mae": metrics.mean(rated, "abs_error", note=note, higher_is_better=False),
            "rmse": metrics.mean(rated, "sq_error", note=note, root=True, higher_is_better=False),
        }

    @property
    def _where(self) -> str:
        """Where the lines come from, for messages."""
        return self.source or f"{type(self).__name__}.read"

    @cached_property
    def _lines(self) -> list[_Line]:
        """Checked, each with an id of its own. Raises DataMissing, naming file, line and field."""
        lines: list[_Line] = _read(self._where, self.read(), _Line, self.columns)
        named, seen = [], dict[str, int]()
        for number, line in enumerate(lines, start=1):
            name = str(number if line.id is None else line.id)
            if not name.strip() or name in seen:
                what = f"is taken by line {seen[name]}" if name in seen else "is empty"
                raise DataMissing(f"{self._where}, line {number}: field id: {name!r} {what}")
            seen[name] = number
            named.append(line.model_copy(update={"id": name, "user": str(line.user)}))
        with_choices = sum(line.choices is not None for line in named)
        if 0 < with_choices < len(named):
            lacks = next(n for n, line in enumerate(named, start=1) if line.choices is None)
            raise DataMissing(f"{self._where}, line {lacks}: field choices is missing, which other lines have")
        for number, line in enumerate(named, start=1):
            if line.choices and not set(line.targets) <= set(line.choices):
                raise DataMissing(
                    f"{self._where}, line {number}: field target: {line.targets[0]!r} is none of its choices"
                )
        return named

    @cached_property
    def _histories(self) -> Mapping[str, tuple[HistoryItem, ...]]:
        """By the id of a line, what its user wrote before."""
        if self.histories is not None:
            rows, columns = _rows(Path(self.histories)), {"user": self.columns["user"]}
            users: list[_UserLine] = _read(self.histories, rows, _UserLine, columns)
            of_user = {str(user.user): _records(user.history) for user in users}
            return {str(line.id): of_user.get(str(line.user), ()) for line in self._lines}
        if any(line.history is not None for line in self._lines):
            return {str(line.id): _records(line.history or ()) for line in self._lines}
        earlier: dict[str, list[HistoryItem]] = {}
        found = {}
        for line in self._lines:
            before = earlier.setdefault(str(line.user), [])
            found[str(line.id)] = tuple(before)
            before.append(_record(f"{line.id}", _Item(input=line.input, output=line.targets[0], date=line.date)))
        return found

    def _labelled(self, line: _Line) -> Labelled:
        history = self._histories[str(line.id)]
        user = User(str(line.user), history, self._pairs(str(line.user), history))
        choices = tuple(line.choices or ())
        example = Example(str(line.id), user, line.input, line.input, self.template, choices)
        return Labelled(example, line.targets)

    def _pairs(self, user: str, history: tuple[HistoryItem, ...]) -> tuple[Labelled, ...]:
        """The items that have an input and an output, each as an example whose user has the items before it."""
        made = []
        for number, record in enumerate(history):
            if record.fields.get("output"):
                text = record.fields["input"]
                example = Example(f"{user}/{record.id}", User(user, history[:number]), text, text, self.template)
                made.append(Labelled(example, (record.fields["output"],)))
        return tuple(made)


def _records(items: Sequence[str | _Item]) -> tuple[HistoryItem, ...]:
    return tuple(
        _record(str(number), item if isinstance(item, _Item) else _Item(text=item)) for number, item in enumerate(items)
    )


def _record(name: str, item: _Item) -> HistoryItem:
    fields = {"input": item.input, "output": item.output} if item.output else {"text": item.text or item.input}
    return HistoryItem(name, fields, " ".join(filter(None, fields.values())), item.date)


def _read(path: str, rows: Sequence[Any], shape: type[Any], columns: Mapping[str, str | None]) -> list[Any]:
    """The lines of a file as `shape`. Raises DataMissing naming file, line and field."""
    adapter = TypeAdapter(shape)
    found = []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise DataMissing(f"{path}, line {number}: expected an object with user, input and target")
        named = dict(row)
        for field, column in columns.items():
            chosen = column or next((alias for alias in ALIASES[field] if alias in row), field)
            if column is not None and column not in row:
                raise DataMissing(f"{path}, line {number}: no column {column!r}; it has {', '.join(map(str, row))}")
            if chosen in row:
                named[field] = row[chosen]
        try:
            found.append(adapter.validate_python(named))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"][:1])
            given = "" if first["type"] == "missing" else f", found {str(first['input'])[:60]!r}"
            raise DataMissing(f"{path}, line {number}: field {where}: {first['msg']}{given}") from None
    if not found:
        raise DataMissing(f"{path} has no lines")
    return found


def _rows(path: Path) -> list[Any]:
    content = _content(path)
    if path.suffix == ".parquet":
        return _parquet(path, content)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = content[: error.start].count(b"\n") + 1
        raise DataMissing(
            f"{path}, line {at}: byte {content[error.start]:#04x} is no UTF-8; convert the file"
        ) from None
    if path.suffix == ".csv":
        rows: list[Any] = [dict(row) for row in csv.DictReader(io.StringIO(text, newline=""))]
        return [{k: _cell(k, v) for k, v in row.items() if k is not None and v not in (None, "")} for row in rows]
    lines = text.split("\n") if path.suffix == ".jsonl" else [text]  # a text may hold other line ends as they are
    found = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                found.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise DataMissing(f"{path}, line {number}: not valid JSON ({error})") from None
    if path.suffix == ".json":
        if not isinstance(found and found[0], list):
            raise DataMissing(f"{path}: expected a list of objects with user, input and target")
        return list(found[0])
    return found


def _cell(name: str, text: str) -> Any:
    """A cell of a table; lists are written as JSON."""
    if name not in ("history", "choices"):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _parquet(path: Path, content: bytes) -> list[Any]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows: list[dict[str, Any]] = parquet.read_table(io.BytesIO(content)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataMissing(f"{path} is no parquet file ({str(error).splitlines()[0][:100]})") from None
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def _content(path: Path) -> bytes:
    try:
        return path.expanduser().read_bytes()
    except OSError as error:
        raise DataMissing(f"{path} cannot be read ({error.strerror}); give the path of a file of users") from None


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _sacre(answer: str, golds: Sequence[str]) -> dict[str, float]:
    """chrF and BLEU of one answer, 0 to 1, as sacrebleu's sentence_chrf and sentence_bleu."""
    import sacrebleu

    return {
        "chrf": sacrebleu.sentence_chrf(answer, list(golds)).score / 100,
        "bleu": sacrebleu.sentence_bleu(answer, list(golds)).score / 100,
    }
