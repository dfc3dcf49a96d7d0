"""Your own users: one line an example, from .jsonl, .json, .csv, .parquet or a Hugging Face data set.

    --task users:./mine.jsonl     {"user": "ann", "input": "Reply to: ...", "target": "Sure!", "history": ["a", "b"]}
    --task csv:mine.csv           columns user, text, reply; then a user's earlier lines are the history,
                                  by their dates where all have one, else by their place
    --task users:hf:NAME          a data set of the hub, or a folder of one (users:hf:./folder)

Optional fields: `choices` (a list: the most likely one is the answer), `id`, `split` (dev where it is not said; train to fit
on), `date`. A history is a list of texts, or of {input, output, date}. Other names of columns are read as they are (text,
prompt, question; reply, output, answer, label) or by option: --task_set input_column=mail. Histories may lie in a second
file, --task_set histories=./users.jsonl: one line a user with a `history`, or one line an item.

The kind decides what is measured: `choice` where lines have choices (accuracy, macro-F1), `number` where all targets are
numbers (MAE, RMSE), else `text` (ROUGE, METEOR, chrF, BLEU, exact match). --task_set metrics=chrf,rouge1 measures these,
--task_set rubric=./rubric.txt has a judge rate answers. The prompt is a jinja template; `--dry_run` shows it.

A task of your own is this one with another `read`, as --task ./mine.py:
    class Mails(Users):
        name = "mails"
        wording = "{% for item in history %}{{ item.output }}\n{% endfor %}Reply to: {{ input }}"
        def read(self):
            return [{"user": "ann", "input": "lunch?", "target": "Sure!"}]
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import numpy as np

from harness.data import Example, HistoryItem, Labelled, User, written_twice
from harness.errors import DataMissing, UsageError
from harness.files.rows import HUB, SUFFIXES, Row, rows_of
from harness.statistics import metrics
from harness.statistics.intervals import UNIT
from harness.statistics.text_metrics import TEXT, text_metric, unread
from harness.task import REFUSAL, GenerationDefaults, Metric, Question, Sample, Selection, System, Task
from harness.tasks.users_lines import (
    TEMPLATE,
    HistoryLine,
    Item,
    JinjaTemplate,
    Line,
    oldest_first,
    read_lines,
    record_of,
    records,
    rendered,
    text_or_file,
    with_answers,
)

Kind: TypeAlias = Literal["text", "choice", "number"]

LISTS = ("history", "choices")
MOST_LABELS = 1000
"""Different answers, above which they are no list to choose from."""
OWN: Mapping[str, tuple[str, ...]] = {"choice": ("accuracy", "macro_f1"), "number": ("mae", "rmse"), "text": ()}
"""What is measured of a kind beside the metrics of texts."""
RUBRIC = ("input", "response", "target", "history")
"""What a rubric may name."""
RATE = f"Answer with one number from 0 (worst) to 100 (best) and nothing else, or {REFUSAL} where it cannot be rated."


class Users(Task):
    """Your own users, from a file: users:./mine.jsonl, csv:mine.csv, users:hf:NAME (.json, .parquet)."""

    name = "users"
    source: ClassVar[str] = ""
    """The file: what stands behind `users:`."""
    wording: ClassVar[str] = TEMPLATE
    """Its prompt, where the option `template` does not say another."""
    answers: ClassVar[Kind | Literal["auto"]] = "auto"
    """Its kind, where the option does not say one."""
    measured: ClassVar[tuple[str, ...]] = ()
    """Its metrics, the main one first, where the option does not name any; empty = those of the kind."""
    per_sample = {"mae": "abs_error"}
    grades_with_data = True
    ranges = {"judge": (0, 100), **dict.fromkeys(TEXT, UNIT)}
    _unanswered: Sequence[str] = ()
    """Splits that are there and have no targets."""

    def __init__(
        self,
        kind: Literal["auto", "text", "choice", "number"] = "auto",
        template: str | None = None,
        template_without: str = "",
        histories: str | None = None,
        metrics: str | None = None,
        rubric: str | None = None,
        compared: Literal["sum", "token", "character"] = "sum",
        user_column: str | None = None,
        input_column: str | None = None,
        target_column: str | None = None,
        history_column: str | None = None,
        choices_column: str | None = None,
        config: str | None = None,
        max_new_tokens: int = 64,
    ) -> None:
        """`template`, the one without history and `rubric` are jinja texts, or files that end in .jinja or .txt.

        `config` names the configuration of a hub data set.
        """
        if not self.source and type(self).read is Users.read:
            raise UsageError("users: name a file behind it, as in --task users:./mine.jsonl")
        if max_new_tokens < 1:
            raise UsageError(f"users: max_new_tokens={max_new_tokens} leaves no room for an answer; allowed: >= 1")
        self.asked_kind = self.answers if kind == "auto" else kind
        kinds = ("auto", *get_args(Kind))
        if self.asked_kind not in kinds:
            raise UsageError(f"{self.name}: kind {self.asked_kind!r} is not valid; allowed: {', '.join(kinds)}")
        if not isinstance(self.measured, tuple | list):
            raise UsageError(
                f"{self.name}: measured is {self.measured!r}; expected a tuple of metrics' names, as in ('exact',)"
            )
        self.histories, self.compared, self.config, self.max_new_tokens = histories, compared, config, max_new_tokens
        self.columns = {"user": user_column, "input": input_column, "target": target_column}
        self.columns |= {"history": history_column, "choices": choices_column}
        source = self.wording if template is None else text_or_file(template)
        self.template = JinjaTemplate(source, text_or_file(template_without))
        for items in ((), (HistoryItem("x", {"text": "x"}, "x"),)):
            replace(self.template, choices=("x", "y"))("x", items, "")
        self.rubric = None if rubric is None else text_or_file(rubric)
        if self.rubric is not None:
            rendered(self.rubric, {**dict.fromkeys(RUBRIC, "x"), "history": ["x"]}, texts=True)
        self.asked_metrics = tuple(metrics.split(",")) if metrics else self.measured

    @classmethod
    def member(cls, name: str) -> type[Task]:
        if not name.endswith(SUFFIXES) and not name.startswith(HUB):
            raise UsageError(
                f"users:{name} is no file of users; give one that ends in {', '.join(SUFFIXES)}, or a data set as in "
                "users:hf:NAME"
            )
        return type("Users", (cls,), {"source": name, "__doc__": cls.__doc__})

    def read(self) -> Iterable[Mapping[str, Any]]:
        """The lines, each with `user`, `input`, `target` and what else there is: what a task of your own overrides."""
        return [row.value for row in self._rows]

    @property
    def closed(self) -> bool:  # type: ignore[override]
        return self.kind != "text"

    @property
    def judged(self) -> bool:  # type: ignore[override]
        return self.rubric is not None

    def items(self, selection: Selection) -> Sequence[Labelled]:
        found = [line for line in self._lines if line.split == selection.split]
        if not found and selection.split in self._unanswered:
            raise DataMissing(
                f"{self._where}: no line of split {selection.split!r} has a target, so nothing can be scored there"
            )
        if not found:
            there = ", ".join(sorted({line.split for line in self._lines}))
            raise DataMissing(
                f"{self._where} has no split {selection.split!r}; it has {there} (field 'split'; --split evaluates another)"
            )
        return selection.of(self._labelled(line) for line in found)

    def fingerprint(self, selection: Selection) -> str:
        parts = [json.dumps([line.model_dump() for line in self._lines]), repr(self.template), repr(self.rubric)]
        if self.histories is not None:
            parts.append(repr(self._histories))
        elif self._moved:
            parts.append("histories by date")
        if selection.split == "train":
            self.items(replace(selection, limit=1))
        return hashlib.sha256("\0".join(parts).encode(errors="surrogatepass")).hexdigest()

    def generation(self) -> GenerationDefaults:
        return GenerationDefaults(self.max_new_tokens)

    def describe_data(self) -> str:
        users = len({line.user for line in self._lines})
        left = f"; without split {', '.join(self._unanswered)}, which has no targets" if self._unanswered else ""
        return f"{self.name}: {users} users with {len(self._lines)} lines in {Path(self._where).name}, kind {self.kind}{left}"

    def caveats(self, items: Sequence[Labelled]) -> Sequence[str]:
        golds = [gold for item in items for gold in item.targets]
        notes: dict[str, list[str]] = {}
        for name in self.metric_names:
            if name != "judge" and name not in OWN[self.kind] and (note := unread(name, golds)):
                notes.setdefault(note, []).append(name)
        said = [f"{', '.join(names)}: {note}" for note, names in notes.items()]
        users = dict.fromkeys(item.example.user.id for item in items)
        without = [] if self.histories is None else [user for user in users if user not in self._of_user]
        if without:
            said.append(
                f"{len(without)} of {len(users)} users, first {without[0]!r}, have no history in {self.histories}"
            )
        return said

    @cached_property
    def kind(self) -> Kind:
        """What is measured. Raises DataMissing where the lines are of another kind than asked for."""
        no_number = [n for n, line in enumerate(self._lines) if None in map(metrics.parse_rating, line.targets)]
        if self.asked_kind == "number" and no_number:
            line = self._lines[no_number[0]]
            raise DataMissing(
                f"{self._where}, line {self._places[no_number[0]]}: field target: {line.targets[0]!r} is no number (kind=number)"
            )
        if self.asked_kind != "auto":
            return self.asked_kind
        if any(line.choices for line in self._lines):
            return "choice"
        return "text" if no_number else "number"

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The choices, where they are the same on every line: of lines without any, all the answers there are."""
        if self.kind != "choice":
            return ()
        if not any(line.choices for line in self._lines):
            found = list(dict.fromkeys(target.strip() for line in self._lines for target in line.targets))
            if not 2 <= len(found) <= MOST_LABELS:
                raise DataMissing(
                    f"{self._where}: {len(found)} different answers are no choices; give each line 'choices', or kind=text"
                )
            return tuple(sorted(found))
        first = self._lines[0].choices or []
        return tuple(first) if all(set(line.choices or ()) == set(first) for line in self._lines) else ()

    @cached_property
    def metric_names(self) -> tuple[str, ...]:
        """The main one first. Raises UsageError for a name that is none."""
        own = tuple(name for name in OWN[self.kind] if name != "macro_f1" or self.labels)
        names = self.asked_metrics or own or tuple(TEXT)
        if (
            not self.asked_metrics
            and not own
            and unread("rouge1", [gold for line in self._lines for gold in line.targets])
        ):
            names = tuple(sorted(TEXT, key=lambda name: name != "chrf"))
        for name in names:
            if name == "macro_f1" and name not in own:
                raise UsageError(
                    f"{self._where}: macro_f1 is of kind choice where every line has the same choices; leave it out"
                )
            if name not in own:
                text_metric(name)
        return (*names, "judge") if self.rubric is not None and "judge" not in names else names

    def respond(self, system: System, items: Sequence[Labelled]) -> Iterator[Sample]:
        """Beside the answers, of each item what its judge is to read."""
        if self.rubric is None:
            yield from super().respond(system, items)
            return
        inputs = {item.example.id: item.example.text for item in items}
        for sample in super().respond(system, items):
            shown = {"input": inputs[sample.id], "history": [r.document for r in self._histories.get(sample.id, ())]}
            kept = {name: value for name, value in shown.items() if name in self.rubric}
            yield replace(sample, extra={**sample.extra, **kept})

    def to_judge(self, sample: Sample) -> Mapping[str, Question]:
        if self.rubric is None:
            return {}
        answer = (sample.response or "").strip()
        said = {"target": "\n".join(sample.targets), "response": answer, **dict.fromkeys(RUBRIC, ""), **sample.extra}
        said |= {"target": "\n".join(sample.targets), "response": answer}
        text = rendered(self.rubric, {name: said[name] for name in RUBRIC}, texts=True)
        return {"judge": Question(text if "100" in self.rubric else f"{text.rstrip()}\n\n{RATE}", answer)}

    def grade(self, sample: Sample) -> Sample:
        if sample.response is None or sample.error is not None:
            return sample
        answer, golds = sample.response.strip(), [target.strip() for target in sample.targets]
        found: dict[str, float | None] = {}
        parsed: str | float | None = answer or None
        if self.kind == "choice":
            found["accuracy"] = float(answer in golds)
        elif self.kind == "number":
            number, gold = metrics.parse_rating(answer), metrics.parse_rating(golds[0])
            # an answer that is no number has no error to average: it counts as unparsed, and is in no mean
            parsed, error = number, None if number is None or gold is None else abs(number - gold)
            found |= {"abs_error": error, "sq_error": None if error is None else error * error}
        for name in self.metric_names:
            if name == "judge":
                found[name] = sample.ratings[name].score if name in sample.ratings else None
            elif name not in OWN[self.kind]:
                found[name] = text_metric(name).of(answer, golds)
        return replace(sample, parsed=parsed, metrics=found)

    def aggregate(self, samples: Sequence[Sample]) -> Mapping[str, Metric]:
        graded = [sample for sample in samples if sample.metrics]
        return {name: self._metric(name, graded) for name in self.metric_names}

    def _metric(self, name: str, graded: Sequence[Sample]) -> Metric:
        if name == "judge":
            return metrics.mean_of_rated(graded, name, bounds=(0, 100))
        if name == "accuracy" and name in OWN[self.kind]:
            return metrics.mean(graded, name)
        if name == "macro_f1":
            number = {label.strip(): n for n, label in enumerate(self.labels)}
            answers = [str(sample.parsed or "") for sample in graded]
            golds = [a if s.metrics["accuracy"] else s.targets[0].strip() for s, a in zip(graded, answers, strict=True)]
            codes = [np.array([number.get(text, -1) for text in texts], dtype=int) for texts in (golds, answers)]
            return metrics.macro_f1_metric(graded, codes[0], codes[1], list(number))
        if name in OWN[self.kind]:
            rated = [sample for sample in graded if sample.parsed is not None]
            left = len(graded) - len(rated)
            note = f"{left} of {len(graded)} answers are no number and are left out" if left else ""
            of = {"mae": "abs_error", "rmse": "sq_error"}[name]
            return metrics.mean(rated, of, note=note, root=name == "rmse", higher_is_better=False)
        measure, note = text_metric(name), unread(name, [gold for sample in graded for gold in sample.targets])
        return metrics.mean(graded, name, note=note, missing=measure.missing(), bounds=measure.bounds)

    @property
    def _lists(self) -> set[str]:
        """Columns whose cells are lists."""
        return {*LISTS, *(self.columns[name] or "" for name in LISTS)}

    @property
    def _where(self) -> str:
        """Where the lines come from, for messages."""
        return self.source or f"{type(self).__name__}.read"

    @cached_property
    def _rows(self) -> list[Row]:
        """What the file or `read` gives, with places; without splits that have no answers."""
        if type(self).read is Users.read:
            found = rows_of(self.source, self.config, self._lists)
        else:
            found = [Row(number, value) for number, value in enumerate(self.read(), start=1)]
        rows, self._unanswered = with_answers(found, self.columns["target"])
        return rows

    @cached_property
    def _places(self) -> list[int]:
        return [row.line for row in self._rows]

    @cached_property
    def _lines(self) -> list[Line]:
        """Checked, each with an id of its own. Raises DataMissing, naming file, line and field."""
        of_histories = {"history": None} if self.histories is not None else {}
        lines: list[Line] = read_lines(self._where, self._rows, Line, self.columns | of_histories)
        named, seen = [], dict[str, int]()
        for number, (place, line) in enumerate(zip(self._places, lines, strict=True), start=1):
            name = str(number if line.id is None else line.id)
            if not name.strip() or name in seen:
                what = f"is taken by line {seen[name]}" if name in seen else "is empty"
                raise DataMissing(f"{self._where}, line {place}: field id: {name!r} {what}")
            seen[name] = place
            named.append(line.model_copy(update={"id": name, "user": str(line.user)}))
        self._check_users(lines)
        with_choices = sum(line.choices is not None for line in named)
        for place, line in zip(self._places, named, strict=True):
            if with_choices and line.choices is None:
                raise DataMissing(f"{self._where}, line {place}: field choices is missing, which other lines have")
            if line.choices and not set(line.targets) <= set(line.choices):
                raise DataMissing(
                    f"{self._where}, line {place}: field target: {line.targets[0]!r} is none of its choices"
                )
        return named

    def _check_users(self, lines: Sequence[Line]) -> None:
        """Raises DataMissing where one user is written in two ways, and so would be two, or two are one."""
        seen: dict[str, tuple[str | int, int]] = {}
        for place, line in zip(self._places, lines, strict=True):
            plain = unicodedata.normalize("NFC", str(line.user)).strip()
            first, at = seen.setdefault(plain, (line.user, place))
            if type(first) is not type(line.user) or first != line.user:
                raise DataMissing(
                    f"{self._where}, line {place}: field user: {line.user!r} is {first!r} of line {at} but for how it is written; "
                    "write a user the same way everywhere"
                )

    @cached_property
    def _histories(self) -> Mapping[str, tuple[HistoryItem, ...]]:
        """By the id of a line, what its user wrote before."""
        if self.histories is not None:
            return {str(line.id): self._of_user.get(str(line.user), ()) for line in self._lines}
        if any(line.history is not None for line in self._lines):
            return {str(line.id): records(line.history or ()) for line in self._lines}
        found = {}
        for own in self._by_user.values():
            before: list[HistoryItem] = []
            for line in map(own.__getitem__, oldest_first([line.date for line in own])):
                found[str(line.id)] = tuple(before)
                before.append(record_of(f"{line.id}", Item(input=line.input, output=line.targets[0], date=line.date)))
        return found

    @cached_property
    def _of_user(self) -> Mapping[str, tuple[HistoryItem, ...]]:
        """By user, what the file of histories holds."""
        if self.histories is None:
            return {}
        columns = {name: self.columns[name] for name in ("user", "history")} | {"input": None, "target": None}
        rows = rows_of(self.histories, self.config, self._lists)
        items: dict[str, list[str | Item]] = {}
        for user in read_lines(self.histories, rows, HistoryLine, columns):
            items.setdefault(str(user.user), []).extend(user.items)
        found = {user: records(everything) for user, everything in items.items()}
        if twice := written_twice(dict.fromkeys([*(str(line.user) for line in self._lines), *found])):
            raise DataMissing(
                f"{self.histories}: user {twice[1]!r} is {twice[0]!r} of {self._where} but for how it is written; write a user "
                "the same way in both"
            )
        if not any(str(line.user) in found for line in self._lines):
            raise DataMissing(
                f"{self.histories} has the history of no user of {self._where}; the first there is {self._lines[0].user!r}, "
                f"here {next(iter(found))!r}"
            )
        return found

    @property
    def _by_user(self) -> Mapping[str, list[Line]]:
        found: dict[str, list[Line]] = {}
        for line in self._lines:
            found.setdefault(str(line.user), []).append(line)
        return found

    @property
    def _moved(self) -> bool:
        """Whether dates give a history, in the file or of a user's lines, another order than the file."""
        given = [
            [getattr(item, "date", None) for item in line.history] for line in self._lines if line.history is not None
        ]
        lists = given or [[line.date for line in own] for own in self._by_user.values()]
        return any(oldest_first(dates) != list(range(len(dates))) for dates in lists)

    def _labelled(self, line: Line) -> Labelled:
        history = self._histories[str(line.id)]
        user = User(str(line.user), history, self._pairs(str(line.user), history))
        choices = tuple(line.choices or self.labels) if self.kind == "choice" else ()
        template = replace(self.template, choices=choices)
        return Labelled(
            Example(str(line.id), user, line.input, line.input, template, choices, self.compared), line.targets
        )

    def _pairs(self, user: str, history: tuple[HistoryItem, ...]) -> tuple[Labelled, ...]:
        """The items that have an input and an output, each as an example whose user has the items before it."""
        made, template = [], replace(self.template, choices=self.labels)
        for number, record in enumerate(history):
            if record.fields.get("output"):
                text = record.fields["input"]
                example = Example(f"{user}/{record.id}", User(user, history[:number]), text, text, template)
                made.append(Labelled(example, (record.fields["output"],)))
        return tuple(made)
