"""What exists before any model: users, their history, examples, prompts. Plain frozen dataclasses, no torch.

An `Example` holds no gold answer, so a plan built from one can never see it; only a `Task`, and `Method.fit` on the
train split, ever hold a `Labelled`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, TypeAlias, get_args
from unicodedata import normalize

from harness.errors import HarnessError, UsageError

Role: TypeAlias = Literal["system", "user", "assistant"]
Compared: TypeAlias = Literal["sum", "token", "character"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True)
class Joint:
    """A context and its continuation are tokenised together, and it may be cut from the left: lm-eval's rules.

    The one exception: the answer to any other prompt is tokenised apart, and an input is never cut.
    """

    content: tuple[Message, ...] | str
    open_turn: bool = True
    """Of messages: whether the continuation is a turn of its own. Else it goes on with the last message."""
    scored: bool = True
    """Whether the continuation is given, not generated. White space that ends the context then belongs to it."""


Rendered: TypeAlias = "tuple[Message, ...] | str | Joint"
"""Messages go through the model's chat template; a string is raw text and reaches the model as it is."""


@dataclass(frozen=True)
class HistoryItem:
    """One item of a user's history, as the task's file gives it."""

    id: str
    fields: Mapping[str, str]
    document: str
    """The text a retriever indexes. Never holds the item's label (LaMP convention)."""
    date: str | None = None


class Template(Protocol):
    """How a task turns an input and some history into a prompt. Must be a value: equal templates render equally."""

    def __call__(self, text: str, items: Sequence[HistoryItem], summary: str) -> Rendered: ...


@dataclass(frozen=True)
class Prompt:
    """A prompt whose history can still be cut: the engine drops `items` from the tail until it fits the context.

    The input is never cut.
    """

    template: Template
    text: str
    items: tuple[HistoryItem, ...] = ()
    """History, best first."""
    summary: str = ""

    def render(self) -> Rendered:
        """Raises HarnessError where the template gives something else."""
        found: object = self.template(self.text, self.items, self.summary)
        if isinstance(found, str):
            return found
        turns = found.content if isinstance(found, Joint) else found
        if isinstance(turns, tuple | list) and turns and all(isinstance(one, Message) for one in turns):
            for one in turns:
                if one.role not in get_args(Role) or not isinstance(one.content, str):
                    raise self._wrong(one, f"a role of {', '.join(get_args(Role))} and a text")
            return found if isinstance(found, Joint) else tuple(turns)
        if isinstance(found, Joint) and isinstance(turns, str):
            return found
        raise self._wrong(found, "a text, or a tuple of one Message(role, content) or more")

    def _wrong(self, found: object, expected: str) -> HarnessError:
        shown = " ".join(repr(found).split())[:60]
        return HarnessError(f"template {type(self.template).__name__} gave {shown}; expected {expected}")

    def first(self, n: int) -> Prompt:
        """The same prompt with only the n best items."""
        return replace(self, items=self.items[:n])


def written_twice(users: Iterable[str]) -> tuple[str, str] | None:
    """Two ids that are one but for white space around them or what their accents are made of; None where there are none."""
    seen: dict[str, str] = {}
    for user in users:
        first = seen.setdefault(user.strip() if user.isascii() else normalize("NFC", user).strip(), user)
        if first != user:
            return first, user
    return None


@dataclass(frozen=True)
class User:
    id: str
    history: Sequence[HistoryItem] = ()
    """Oldest first where the data has dates, else in file order. Of a large file it is read when it is looked at."""
    pairs: Sequence[Labelled] = field(default=(), repr=False, compare=False)
    """(input, output) examples the task makes from the history, each seeing earlier records only."""

    @property
    def owner(self) -> str:
        """Whose pairs these are: under `--control wrong_user` another user's."""
        return self.pairs[0].example.user.id if self.pairs else self.id


def each_once(users: Iterable[User]) -> list[User]:
    """Each user once, in order, with the shortest of their histories: nothing in it is later than one of their questions."""
    chosen: dict[str, User] = {}
    for user in users:
        if user.id not in chosen or len(user.history) < len(chosen[user.id].history):
            chosen[user.id] = user
    return list(chosen.values())


@dataclass(frozen=True)
class Example:
    id: str
    user: User
    text: str
    """The input as the task's file gives it."""
    query: str
    """What a retriever searches the history with."""
    template: Template
    choices: tuple[str, ...] = ()
    """The answers there are: the most likely one is the response. Empty = the response is generated."""
    compared: Compared = "sum"
    """How choices are compared: by the sum of their tokens' log-probabilities, its mean a token, or a character, where a
    space before them is not counted."""
    labels: tuple[str, ...] = ()
    """What a generated response is meant to be one of, in the task's order. Empty = any text."""

    def prompt(self, items: Sequence[HistoryItem] = (), summary: str = "") -> Prompt:
        """The prompt for this example with `items` of history, best first, and an optional profile summary."""
        return Prompt(self.template, self.text, tuple(items), summary)


@dataclass(frozen=True)
class Labelled:
    """An example with its gold answers. Held by tasks and by `Method.fit`, never by a plan."""

    example: Example
    targets: tuple[str, ...]

    @property
    def side(self) -> str | None:
        """`pos` or `neg` where the targets are a side and its trait, as of a task that shows what to contrast."""
        return self.targets[0] if len(self.targets) == 2 and self.targets[0] in ("pos", "neg") else None

    @property
    def reference(self) -> str:
        """The first gold answer. Raises UsageError where the targets are a side, which is no answer."""
        if self.side:
            raise UsageError(
                f"a train item of {self.targets[1]} is a side of a trait and no answer, so this method has nothing to fit on; fit "
                "on a task that has answers, as in --fit_task lamp4"
            )
        return self.targets[0]
