"""LaMP's question files, of any size: checked once from start to end, then read record by record where one is asked for.

In memory are the questions' inputs, and histories of `KEPT` bytes of JSON; the others are read again when somebody looks at them.
What the check of a large file found (its hash, and where its records lie) is kept in the user's cache by the file's path,
size and time, so that a later run of 50 samples reads 50 records.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol, overload

from harness.data import HistoryItem
from harness.errors import DataMissing, HarnessError
from harness.files import replace_file
from harness.files.json_files import parse, read_bytes, read_json, status
from harness.files.json_lists import NotAList, elements
from harness.files.user_cache import user_cache
from harness.tasks import lamp_prompts, oppu_data
from harness.tasks.lamp_export import official_name

KEPT = 32 << 20
"""Bytes of JSON whose histories stay in memory."""
_AT_HAND = 64
"""Histories beyond those that are at hand after they were looked at: more than a batch has."""
LARGE = 16 << 20
"""Bytes of a file from which on what its check found is kept."""
_SETTLED = 2 * 10**9
"""Nanoseconds after which a file that is written again has another time, on any file system."""
_CHECKS = 1
"""Counts up where files are checked otherwise, so that all are checked again."""


class Question(NamedTuple):
    """Where a question is."""

    place: int
    """Among the file's questions."""
    id: str | int
    """As in the file."""
    user: str
    items: int
    """Of its profile."""
    record: Hashable
    """Names what holds its profile: the first byte of the file's record."""
    size: int = 0
    """The record's bytes."""
    inside: int = 0
    """Number among the record's questions: OPPU's share their profile."""


class Split(Protocol):
    """One split's questions, checked, in file order; profiles are checked when they are used."""

    @property
    def golds(self) -> Mapping[str, str] | None: ...
    @property
    def sha256(self) -> str: ...
    def __iter__(self) -> Iterator[Question]: ...
    def text(self, question: Question) -> str:
        """Its input."""

    def history(self, question: Question) -> Sequence[HistoryItem]:
        """Raises DataMissing where the profile cannot be one."""


class Synthetic:
    """The embedded users, as a split."""

    def __init__(
        self, task: str, questions: Sequence[Mapping[str, Any]], golds: Mapping[str, str], sha256: str
    ) -> None:
        self.task, self.questions, self.golds, self.sha256 = task, questions, golds, sha256
        self._histories: dict[int, tuple[HistoryItem, ...]] = {}

    def __iter__(self) -> Iterator[Question]:
        for place, one in enumerate(self.questions):
            yield Question(place, one["id"], user_of(one), len(one["profile"]), place)

    def text(self, question: Question) -> str:
        return str(self.questions[question.place]["input"])

    def history(self, question: Question) -> tuple[HistoryItem, ...]:
        place = question.place
        if place not in self._histories:
            self._histories[place] = lamp_prompts.history(self.task, self.questions[place]["profile"], dated=False)
        return self._histories[place]


class QuestionFile:
    """A split of LaMP's or OPPU's files. The first look at its questions, hash or golds reads all of it."""

    def __init__(self, task: str, file: Path, golds_file: Path | None, *, dated: bool) -> None:
        self.task, self.file, self.dated = task, file, dated
        self.golds: dict[str, str] | None = None
        self._after = b"" if golds_file is None else b"\0" + content_of(golds_file)
        """What the hash covers behind the questions."""
        self._golds_file = golds_file
        self._oppu = oppu_data.is_oppu(file)
        self._found: list[Question] | None = None
        self._sha256 = ""
        self._stamp = _stamp(file)
        self._in_hand: tuple[Hashable, list[dict[str, Any]]] = None, []
        """A record and its questions."""
        self._texts: dict[int, str] = {}
        """Of questions, by place."""
        self._histories: dict[Hashable, Sequence[HistoryItem]] = {}
        """Of a file's records; OPPU's questions of one user share theirs, and what retrieval makes of it."""
        self._kept = 0
        self._at_hand: OrderedDict[Hashable, tuple[HistoryItem, ...]] = OrderedDict()
        self._recall()

    @property
    def sha256(self) -> str:
        if self._found is None:
            for _ in self:
                pass
        return self._sha256

    def __iter__(self) -> Iterator[Question]:
        return iter(self._found) if self._found is not None else self._checked()

    def text(self, question: Question) -> str:
        if question.place not in self._texts:
            self._texts[question.place] = self._content(question)["input"]
        return self._texts[question.place]

    def history(self, question: Question) -> Sequence[HistoryItem]:
        if question.record not in self._histories:
            items = self._made(question)
            fits = self._kept + question.size <= KEPT
            self._kept += question.size if fits else 0
            self._histories[question.record] = items if fits else StoredHistory(self, question, len(items))
        return self._histories[question.record]

    def look_up(self, question: Question) -> tuple[HistoryItem, ...]:
        """The items of a history that is not kept."""
        if question.record not in self._at_hand:
            self._at_hand[question.record] = self._made(question)
            if len(self._at_hand) > _AT_HAND:
                self._at_hand.popitem(last=False)
        self._at_hand.move_to_end(question.record)
        return self._at_hand[question.record]

    def _content(self, question: Question) -> Mapping[str, Any]:
        if self._in_hand[0] != question.record:
            self._in_hand = question.record, self._read(question)
        return self._in_hand[1][question.inside]

    def _made(self, question: Question) -> tuple[HistoryItem, ...]:
        try:
            return lamp_prompts.history(self.task, self._content(question)["profile"], dated=self.dated)
        except ValueError as problem:
            raise self._broken(question.place, question.id, str(problem)) from None

    def _broken(self, place: int, ident: object, problem: str) -> DataMissing:
        return DataMissing(f"{self.file}: record {place} (id {ident!r}): {problem}")

    def _checked(self) -> Iterator[Question]:
        """The first reading. Who stops early has checked nothing."""
        found: list[Question] = []
        seen: set[str] = set()
        named: bool | None = None
        self.golds = {} if self._oppu else self.golds
        content, began = hashlib.sha256(), time.time_ns()
        stamp = self._stamp
        for asked, start, size in self._records(content.update):
            self._in_hand = start, asked
            for inside, question in enumerate(asked):
                place = len(found)
                ident = question.get("id") if isinstance(question, dict) else None
                problem = lamp_prompts.problem(self.task, question, dated=self.dated)
                if not problem and str(ident) in seen:
                    problem = "field 'id' is taken by an earlier record"
                named = "user_id" in question if named is None and not problem else named
                if not problem and ("user_id" in question) != named:
                    problem = "field 'user_id' is in some records and not in others; whose question is this?"
                if not problem and not found:
                    self._read_golds()
                if not problem and self._golds_file is not None and str(ident) not in (self.golds or ()):
                    problem = f"{self._golds_file.name} has no gold for this id; do the two files belong together?"
                if problem:
                    raise self._broken(place, ident, problem)
                seen.add(str(ident))
                found.append(
                    Question(place, question["id"], user_of(question), len(question["profile"]), start, size, inside)
                )
                self._texts[place] = question["input"]
                yield found[-1]
        if not found:
            self._read_golds()
        content.update(self._after)
        self._unchanged()
        self._found, self._sha256 = found, content.hexdigest()
        if stamp.size >= LARGE and began - stamp.time >= _SETTLED:
            self._keep()

    def _records(self, seen: Callable[[bytes], object]) -> Iterator[tuple[list[dict[str, Any]], int, int]]:
        """The questions of each of the file's records, its first byte and its size; their golds are taken up."""
        try:
            for number, element in enumerate(elements(self.file, seen)):
                yield self._asked(element.value, number), element.start, element.size
        except OSError as error:
            raise DataMissing(f"{self.file} cannot be read ({error.strerror})") from None
        except NotAList as found:
            kind = "users" if self._oppu else "questions"
            raise DataMissing(f"{self.file}: expected a list of {kind}, found {found}") from None
        except ValueError as error:
            raise _no_json(self.file, error) from None

    def _read_golds(self) -> None:
        if self._golds_file is not None:
            content = parsed_json(self._golds_file, self._after[1:])
            self.golds = golds_of(self.task, self._golds_file, content)

    def _asked(self, value: Any, number: int) -> list[dict[str, Any]]:
        if not self._oppu:
            return [value]
        try:
            asked, golds = oppu_data.questions(value, number)
        except ValueError as problem:
            raise DataMissing(f"{self.file}: {problem}") from None
        assert self.golds is not None
        _take_golds(self.task, self.file, golds, self.golds, len(self.golds))
        return asked

    def _read(self, question: Question) -> list[dict[str, Any]]:
        """The questions of a record that was checked before."""
        self._unchanged()
        assert isinstance(question.record, int)
        try:
            with self.file.open("rb") as file:
                file.seek(question.record)
                value = parse(file.read(question.size))
        except OSError as error:
            raise DataMissing(f"{self.file} cannot be read ({error.strerror})") from None
        except ValueError:
            raise self._changed() from None
        asked = self._asked(value, 0)
        if len(asked) <= question.inside or asked[question.inside].get("id") != question.id:
            raise self._changed()
        return asked

    def _unchanged(self) -> None:
        if _stamp(self.file) != self._stamp:
            raise self._changed()

    def _changed(self) -> DataMissing:
        return DataMissing(f"{self.file} was written while it was read; run the command again")

    def _place(self) -> Path:
        """Where what the check finds is kept."""
        about = [_CHECKS, self.task, self.dated, *self._stamp, hashlib.sha256(self._after).hexdigest()]
        return user_cache() / "lamp" / f"{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]}.json"

    def _recall(self) -> None:
        if self._stamp.size < LARGE or not self._place().is_file():
            return
        with suppress(DataMissing):  # cut by a full disk, or another's: the file is checked again
            found: _Kept = read_json(self._place(), _Kept, "what is kept in", "hash, golds and questions")
            self._sha256, self.golds, questions = found
            self._read_golds()
            self._found = [Question(place, *fields) for place, fields in enumerate(questions)]

    def _keep(self) -> None:
        assert self._found is not None
        kept = [self._sha256, self.golds if self._oppu else None, [question[1:] for question in self._found]]
        with suppress(HarnessError, OSError):  # it saves time alone
            self._place().parent.mkdir(parents=True, exist_ok=True)
            replace_file(self._place(), json.dumps(kept).encode())


_Kept = tuple[str, dict[str, str] | None, list[tuple[str | int, str, int, int, int, int]]]
"""What is kept of a file: its hash, golds that stand in it, and its questions but for their places."""


class StoredHistory(Sequence[HistoryItem]):
    """A history that lies in its file until somebody looks at it. Equal to the tuple of its items."""

    def __init__(self, file: QuestionFile, question: Question, size: int) -> None:
        self._file, self._question, self._size = file, question, size

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, index: int) -> HistoryItem: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[HistoryItem, ...]: ...
    def __getitem__(self, index: int | slice) -> HistoryItem | tuple[HistoryItem, ...]:
        return self._file.look_up(self._question)[index]

    def __iter__(self) -> Iterator[HistoryItem]:
        return iter(self._file.look_up(self._question))

    def __eq__(self, other: object) -> bool:
        return tuple(self) == (tuple(other) if isinstance(other, StoredHistory) else other)

    __hash__ = None  # type: ignore[assignment]  # as a tuple of items, whose fields are a mapping

    def __repr__(self) -> str:
        return f"<{self._size} items>"

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, (tuple(self),)


class _Stamp(NamedTuple):
    """What says that a file is the one it was."""

    path: str
    size: int
    time: int
    """Nanoseconds."""


def _stamp(file: Path) -> _Stamp:
    try:
        about = status(file)
    except OSError as error:
        raise DataMissing(f"{file} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise DataMissing(f"{file} cannot be read: {error}") from None
    return _Stamp(str(file.resolve()), about.st_size, about.st_mtime_ns)


def user_of(question: Mapping[str, Any]) -> str:
    return str(question.get("user_id", question["id"]))


def content_of(file: Path) -> bytes:
    try:
        return read_bytes(file)
    except OSError as error:
        raise DataMissing(f"{file} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise DataMissing(f"{file} cannot be read: {error}") from None


def parsed_json(file: Path, content: bytes) -> Any:
    try:
        return parse(content)
    except ValueError as error:
        raise _no_json(file, error) from None


def _no_json(file: Path, error: ValueError) -> DataMissing:
    return DataMissing(f"{file} is not valid JSON ({error}); it may be truncated, fetch it again")


def golds_of(task: str, file: Path, content: Any) -> dict[str, str]:
    if not isinstance(content, dict) or not isinstance(content.get("golds"), list):
        raise DataMissing(f"{file}: field 'golds' is missing; expected {{'task': ..., 'golds': [...]}}")
    named = str(content.get("task", official_name(task))).replace("-", "_")
    if not named.startswith(official_name(task)):
        raise DataMissing(f"{file}: field 'task' is {named!r}, expected {official_name(task)!r} for {task}")
    golds: dict[str, str] = {}
    _take_golds(task, file, content["golds"], golds, 0)
    return golds


def _take_golds(task: str, file: Path, more: Sequence[Any], golds: dict[str, str], first: int) -> None:
    """Add golds, the first of which has this number in its file, to those there are."""
    labels = lamp_prompts.LABELS.get(task)
    for index, gold in enumerate(more, first):
        output = gold.get("output") if isinstance(gold, dict) else None
        text = isinstance(output, str) or (isinstance(output, int) and not isinstance(output, bool))
        if not isinstance(gold, dict) or not lamp_prompts.is_name(gold.get("id")) or not text:
            raise DataMissing(f"{file}: record {index} should have fields 'id' and 'output', found {str(gold)[:60]}")
        output = str(gold["output"])
        if labels and output.strip() not in labels:
            raise DataMissing(
                f"{file}: record {index} (id {gold['id']!r}): field 'output' is {output!r}, not a label of {task}"
            )
        if golds.setdefault(str(gold["id"]), output) != output:
            raise DataMissing(f"{file}: record {index}: field 'id' is {gold['id']!r}, taken by an earlier, other gold")


def sha256_of(*contents: bytes) -> str:
    return hashlib.sha256(b"\0".join(contents)).hexdigest()
