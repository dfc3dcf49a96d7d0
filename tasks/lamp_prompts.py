"""LaMP's texts: how an input and history become a prompt, what is indexed and searched for, a history as examples.

Paper: Salemi et al., LaMP: When Large Language Models Meet Personalization, ACL 2024. The strings are those of the
official prompt code (LaMP-Benchmark/LaMP@38c9d4d), stray spaces included: they are part of the benchmark.
Differs from that code: the query for LaMP-1 is read from the frame of the sentence, so titles that contain quotes
do not break it; history items are dropped whole instead of being cut inside (the engine does that, see harness.engine.model).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from harness.data import Example, HistoryItem, Labelled, Message, User
from harness.plugins.retrieve import date_key

_CITATION = re.compile(r'\[1\]:\s*"(?P<first>.*)"\s*\[2\]:\s*"(?P<second>.*)"\s*$', re.DOTALL)

FRAMES: Mapping[str, str] = {
    "lamp1": 'For an author who has written the paper with the title "{title}", which reference is related? '
    'Just answer with [1] or [2] without explanation. [1]: "{first}" [2]: "{second}"',
    "lamp2n": "Which category does this article relate to among the following categories? Just answer with the "
    "category name without further explanation. categories: [{labels}] article: {text}",
    "lamp2m": "Which tag does this movie relate to among the following tags? Just answer with the tag name without "
    "further explanation. tags: [{labels}] description: {text}",
    "lamp3": "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, or 5 "
    "without further explanation. review: {text}",
    "lamp4": "Generate a headline for the following article: {text}",
    "lamp5": "Generate a title for the following abstract of a paper: {text}",
    "lamp6": "Generate a subject for the following email: {text}",
    "lamp7": "Paraphrase the following tweet without any explanation before or after it: {text}",
}
"""The input sentence of each task; `{labels}` is the comma-separated label list."""

LABELS: Mapping[str, tuple[str, ...]] = {
    "lamp1": ("[1]", "[2]"),
    "lamp2n": (
        "food & drink", "sports", "education", "parents", "religion", "travel", "business", "crime",
        "science & technology", "culture & arts", "entertainment", "politics", "women", "style & beauty",
        "healthy living",
    ),
    "lamp2m": (
        "sci-fi", "based on a book", "comedy", "action", "twist ending", "dystopia", "dark comedy", "classic",
        "psychology", "fantasy", "romance", "thought-provoking", "social commentary", "violence", "true story",
    ),
    "lamp3": ("1", "2", "3", "4", "5"),
}  # fmt: skip
"""The official label order; macro-F1 runs over all of them."""

FIELDS: Mapping[str, tuple[str, ...]] = {
    "lamp1": ("title", "abstract"),
    "lamp2n": ("text", "title", "category"),
    "lamp2m": ("description", "tag"),
    "lamp3": ("text", "score"),
    "lamp4": ("text", "title"),
    "lamp5": ("title", "abstract"),
    "lamp6": ("text", "title"),
    "lamp7": ("text",),
}
"""Fields every history item of a task must have."""

_INDEXED: Mapping[str, tuple[str, ...]] = {
    "lamp1": ("title", "abstract"),
    "lamp2n": ("title", "text"),
    "lamp2m": ("description",),
    "lamp3": ("text",),
    "lamp4": ("title", "text"),
    "lamp5": ("title", "abstract"),
    "lamp6": ("text",),
    "lamp7": ("text",),
}

_QUERY_AFTER: Mapping[str, str] = {
    "lamp2n": "article:", "lamp2m": "description:", "lamp3": "review:", "lamp4": "article:", "lamp5": "paper:",
    "lamp6": ":", "lamp7": ":",
}  # fmt: skip
"""The text behind the first of these is the query."""

_PIECES: Mapping[str, str] = {
    "lamp2n": 'the category for the article: "{text}" is "{category}" ',
    "lamp2m": 'the tag for the movie: "{description}" is "{tag}" ',
    "lamp3": '{score} is the score for "{text}" ',
    "lamp4": '"{title}" is the title for "{text}" ',
    "lamp5": '"{title}" is a title for "{abstract}" ',
    "lamp6": '"{title}" is the title for "{text}" ',
    "lamp7": '"{text}" ',
}

_TAILS: Mapping[str, str] = {
    "lamp5": ". Following the given patterns {input}",
    "lamp7": " are written by a person. Following the given patterns {input}",  # two spaces, as the piece ends in one
}


def document(task: str, fields: Mapping[str, str]) -> str:
    """The text of a history item that retrieval indexes; labels are never part of it."""
    names = _INDEXED[task]
    return fields[names[0]] if len(names) == 1 else " ".join([fields[name] for name in names])


def query(task: str, text: str) -> str:
    """What the official code searches the history with; the whole input where its frame is not recognised."""
    if task == "lamp1":
        found = _CITATION.search(text)
        return f"{found['first']} {found['second']}" if found else text
    _, mark, rest = text.partition(_QUERY_AFTER[task])
    return rest.strip() if mark else text


def frame(task: str, text: str) -> str:
    """The input without its text, `{text}` in its place: the official sentence, with this input's own label list."""
    head, mark, _ = text.partition(_QUERY_AFTER.get(task, "\0"))
    return f"{head}{mark} {{text}}" if mark else FRAMES[task].replace("{labels}", ", ".join(LABELS.get(task, ())))


def recognise(text: str) -> str | None:
    """The task whose sentence the input is, None for other wordings. LaMP_2 folders hold either of two tasks."""
    for task, sentence in FRAMES.items():
        if text.startswith(sentence.partition("{")[0].rstrip()):
            return task
    for task, marks in (("lamp2n", ("categories:", "article:")), ("lamp2m", ("tags:", "description:"))):
        if all(mark in text for mark in marks):
            return task
    return None


def prompt_text(task: str, text: str, items: Sequence[HistoryItem], summary: str = "") -> str:
    """The official prompt with profile; the raw input where there are no items. A summary goes on a line before it."""
    if items:
        text = _with_items(task, text, items)
    return f"{summary}\n{text}" if summary else text


def _with_items(task: str, text: str, items: Sequence[HistoryItem]) -> str:
    if task == "lamp1":  # spliced inside the sentence, right after its first "title"
        titles = "".join(f', and "{item.fields["title"]}"' for item in items)
        head, mark, rest = text.partition("title")
        return f"{head}{mark}{titles}{rest}"
    pieces = ", and ".join(_PIECES[task].format_map(item.fields) for item in items)
    return pieces + _TAILS.get(task, ". {input}").replace("{input}", text)


@dataclass(frozen=True)
class LampTemplate:
    """The prompt of one LaMP task as a single user turn."""

    task: str

    def __call__(self, text: str, items: Sequence[HistoryItem], summary: str) -> tuple[Message, ...]:
        return (Message("user", prompt_text(self.task, text, items, summary)),)


def is_name(value: object) -> bool:
    """Whether an id can tell one record, or one user, from another."""
    return (isinstance(value, str) and bool(value.strip())) or (isinstance(value, int) and not isinstance(value, bool))


def problem(task: str, question: object, *, dated: bool) -> str:
    """What is wrong with a question, the field named; an empty string where nothing is."""
    if not isinstance(question, dict):
        return f"expected an object, found {type(question).__name__}"
    for field, kinds in (("id", (str, int)), ("input", (str,)), ("profile", (list,))):
        if not isinstance(question.get(field), kinds) or isinstance(question[field], bool):
            found = type(question[field]).__name__ if field in question else "nothing"
            return f"field {field!r} should be a {kinds[0].__name__}, found {found}"
    for field in ("id", "user_id"):
        if field in question and not is_name(question[field]):
            return f"field {field!r} names nobody: {question[field]!r}; expected a text or a whole number"
    if dated and "user_id" not in question:
        return "field 'user_id' is missing, so this is not the time split"
    asked = recognise(question["input"])
    if asked != task and (asked is not None or task in ("lamp2m", "lamp2n")):
        return f"field 'input' should be a {task} question, found {asked or 'none'}: {question['input'][:60]!r}"
    return ""


def history(task: str, profile: Sequence[Any], *, dated: bool) -> tuple[HistoryItem, ...]:
    """A profile's items, oldest first where all have dates. Raises ValueError naming the item and the field."""
    names = ("id", *FIELDS[task], "date")
    items = tuple(_record(task, names, place, item, dated) for place, item in enumerate(profile))
    if any(item.date is None for item in items):
        return items
    return tuple(sorted(items, key=lambda item: date_key(item.date or "")))


def _record(task: str, names: Sequence[str], place: int, item: object, dated: bool) -> HistoryItem:
    if not isinstance(item, dict):
        raise ValueError(f"profile item {place} is {type(item).__name__}, not an object")
    fields: dict[str, str] = {}
    for name in names:
        value = item.get(name)
        if type(value) is str:  # nearly all
            fields[name] = value
        elif isinstance(value, (str, int, float)) and not isinstance(value, bool) and value == value:
            fields[name] = str(value)
        elif dated or name != "date":
            found = type(value).__name__ if name in item else "nothing"
            raise ValueError(f"profile item {place}: field {name!r} should be text, found {found}")
    record_id, date = fields.pop("id"), fields.pop("date", None)
    try:
        date_key(date or "0")
    except ValueError:
        raise ValueError(f"profile item {place}: field 'date' is {date!r}, expected YYYY-MM-DD") from None
    return HistoryItem(record_id, fields, document(task, fields), date)


@dataclass(frozen=True)
class HistoryPairs(Sequence[Labelled]):
    """A history as examples: item i is the question, items before it are its user's history. Made when asked for.

    Empty for lamp1 (an item has no two references to choose from). A tweet of lamp7 has no paraphrase either: the tweet is
    the answer to a bare request, as in OPPU, which trains on the history's tweets alone.
    """

    task: str
    user: str
    frame: str
    """The input sentence, with `{text}` for the text."""
    history: Sequence[HistoryItem]

    def __len__(self) -> int:
        return len(self.history) if self.task in _PAIRS else 0

    @overload
    def __getitem__(self, index: int) -> Labelled: ...
    @overload
    def __getitem__(self, index: slice) -> list[Labelled]: ...
    def __getitem__(self, index: int | slice) -> Labelled | list[Labelled]:
        places = range(len(self))[index]
        return [self._pair(i) for i in places] if isinstance(places, range) else self._pair(places)

    def _pair(self, i: int) -> Labelled:
        record = self.history[i]
        source, target = _PAIRS[self.task]
        text = self.frame.replace("{text}", record.fields[source]) if source else _REQUEST
        user, template = User(self.user, tuple(self.history[:i])), LampTemplate(self.task)
        labels = LABELS.get(self.task, ())
        example = Example(f"{self.user}/{record.id}", user, text, query(self.task, text), template, labels=labels)
        return Labelled(example, (record.fields[target],))


_REQUEST = "Write a tweet."
_PAIRS: Mapping[str, tuple[str | None, str]] = {
    "lamp2m": ("description", "tag"),
    "lamp2n": ("text", "category"),
    "lamp3": ("text", "score"),
    "lamp4": ("text", "title"),
    "lamp5": ("abstract", "title"),
    "lamp6": ("text", "title"),
    "lamp7": (None, "text"),
}
"""Fields of an item that are input and output; None where no field is the input."""
