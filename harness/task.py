"""What a benchmark is: items, how a system answers them, how an answer is graded, how grades become metrics.

A task never owns a model or a loop over one. `respond` hands plans to a `System` and yields one `Sample` an item as its
batch finishes, so a run can be flushed and resumed; `grade` needs no model and can be repeated; `aggregate` is pure.

A task that needs a judge says what to ask of it (`to_judge`); the engine asks about all samples at once, keeps the
ratings in them, and grades: so `grade` reads `sample.ratings` and never waits for anybody.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeAlias, TypeVar

from harness.data import Example, Labelled
from harness.errors import UsageError
from harness.plan import GREEDY, Generated, Plan, Sampling, Scored, Site, Sites, Where

if TYPE_CHECKING:
    from torch import Tensor

Result = TypeVar("Result")

TOO_LARGE = "out of memory with a batch of one"
"""The error of a sample that is too large for the memory even alone."""


REFUSAL = "REFUSAL"
"""What a judge says where it rates nothing."""


Asks: TypeAlias = Literal["trait", "coherence", "rubric"]
"""What a judge can be asked about a text."""


@dataclass(frozen=True)
class Question:
    """What a judge is asked about one response; the answer is a number from 0 to 100."""

    prompt: str
    """All that a language model reads: the rubric with the texts in it. It must ask for the number alone, or REFUSAL."""
    text: str
    """The response; all that a judge by word lists reads."""
    trait: str | None = None
    """The persona whose expression is rated, where that is what is asked."""
    coherence: bool = False
    """Whether it is asked how far the text makes sense. What is neither is asked by a rubric, which stands in the prompt alone."""

    @property
    def asks(self) -> Asks:
        return "trait" if self.trait is not None else "coherence" if self.coherence else "rubric"


@dataclass(frozen=True)
class Rating:
    """What a judge made of a question. One without a number is missing: counted, never a 0."""

    outcome: Literal["rated", "refused", "unparsable", "failed"]
    """`failed`: no answer came, and another try may bring one. The other three are the judge's answer."""
    score: float | None = None
    """0 to 100; None unless `rated`, and where two responses were compared."""
    said: str = ""
    """The judge's words, or why none came."""
    final: bool = True
    """False where the answer is not whole (cut off, empty, nothing but thoughts) or none came: it is asked for again."""
    mass: float | None = None
    """Probability of all the numbers that `score` is the expectation over."""
    key: str = ""
    """Of the question: equal where judge, prompt and parameters are."""
    model: str = ""
    """How the server names the model that answered."""
    input_tokens: int = 0
    output_tokens: int = 0
    retries: int = 0
    cached: bool = False
    """Whether another run paid for it."""
    sent: Mapping[str, Any] = field(default_factory=dict)
    """What the judge was asked for beside the question: the fields of the request that its server took."""


@dataclass(frozen=True)
class Selection:
    """Which items of a split are evaluated. The order is the file's; the cut is by user first, then by item."""

    split: str = "dev"
    limit: int | None = None
    """At most this many items."""
    users: int | None = None
    """Items of at most this many users, the first in file order."""
    exclude_users: frozenset[str] = frozenset()
    """Users held out for fitting."""

    def of(self, items: Iterable[Labelled]) -> list[Labelled]:
        """The selected ones of a split's items; those behind the last of them are not made."""
        chosen: list[Labelled] = []
        users: set[str] = set()
        for item in items:
            if self.limit is not None and len(chosen) >= self.limit:
                break
            user = item.example.user.id
            full = self.users is not None and len(users) >= self.users
            if user not in self.exclude_users and (user in users or not full):
                users.add(user)
                chosen.append(item)
        return chosen


@dataclass
class Sample:
    """One item of a run: what was asked, answered and expected. One line of samples.jsonl."""

    id: str
    user: str
    prompt_hash: str = ""
    """Of the rendered token ids of the first stream."""
    response: str | None = None
    """None where the sample failed."""
    targets: tuple[str, ...] = ()
    parsed: str | float | None = None
    """What the official parse made of the response; None where it could not be parsed."""
    metrics: dict[str, float | None] = field(default_factory=dict)
    """Per-sample numbers. A failed sample has none: it is counted, never scored 0."""
    finish: str = ""
    """`stop` (an end token or stop string), `length` (hit max_new_tokens), `choice` (the most likely of those there are) or
    `given` (by the method, without a model)."""
    prompt_tokens: int = 0
    new_tokens: int = 0
    history_items: int = 0
    """Items of history in the prompt after cutting."""
    dropped_items: int = 0
    """Items the method asked for that did not fit."""
    cut_tokens: int = 0
    """Tokens cut from the left of a context that does not fit without history, over all streams (lm-eval's rule)."""
    batch: int = -1
    error: str | None = None
    ratings: dict[str, Rating] = field(default_factory=dict)
    """What the judge made of the questions of `Task.to_judge`, by their names."""
    extra: dict[str, Any] = field(default_factory=dict)
    """JSON values a task wants to keep, for its own aggregate."""


@dataclass(frozen=True)
class Metric:
    """One number of a run with its 95 % interval over users, where there is one (`harness.statistics.intervals`)."""

    value: float | None
    n: int
    low: float | None = None
    high: float | None = None
    higher_is_better: bool = True
    note: str = ""
    """Why the value is missing, or what a reader must know."""


@dataclass(frozen=True)
class GenerationDefaults:
    max_new_tokens: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Generation:
    """How responses are decoded."""

    max_new_tokens: int
    stop: tuple[str, ...] = ()
    sampling: Sampling = GREEDY


class Encoded(Protocol):
    @property
    def ids(self) -> tuple[int, ...]: ...


class CutPrompt(Protocol):
    """A prompt cut to the context."""

    @property
    def encoded(self) -> Encoded: ...
    @property
    def items(self) -> int:
        """History items left in the prompt."""

    @property
    def dropped(self) -> int:
        """History items that did not fit."""


class System(Protocol):
    """A method on a model, ready to answer: what a task hands its examples to (`harness.run.system.ModelSystem`)."""

    @property
    def generation(self) -> Generation:
        """How responses are decoded, by the command and the task's defaults."""

    @property
    def sites(self) -> Sites: ...

    def plan(self, example: Example) -> Plan:
        """The method's. Raises UserFailed where the user's state could not be made."""

    def prompt(self, example: Example) -> CutPrompt:
        """The first stream's prompt, cut to the context. Raises ContextTooLong."""

    def respond(
        self, examples: Sequence[Example], *, alike: Callable[[Example], str] = lambda example: ""
    ) -> Iterator[Sample]:
        """Ungraded samples, batch by batch. Of an example with choices, the most likely of them; examples of equal `alike` run
        next to each other and share the beginning of their prompts."""

    def answer(self, examples: Sequence[Example]) -> list[Sample]:
        """Ungraded samples of examples that run as one batch; for tasks that plan batches themselves, with `in_batches`."""

    def in_batches(
        self, ids: Sequence[str], run: Callable[[Sequence[str]], Sequence[Result]]
    ) -> Iterator[tuple[int, str, Result | None]]:
        """What `run` gives for the ids of each batch: (number of the batch, id, result; None = out of memory)."""

    def score(
        self,
        examples: Sequence[Example],
        continuations: Sequence[Sequence[str]],
        *,
        alike: Callable[[Example], str] = lambda example: "",
    ) -> list[tuple[Scored, ...]]:
        """Log-probabilities of several continuations of each example."""

    def generate(self, examples: Sequence[Example], generation: Generation) -> list[Generated]:
        """A response to each example, decoded as `generation` says."""

    def capture(
        self,
        examples: Sequence[Example],
        sites: Sequence[Site],
        where: Where,
        responses: Sequence[str] | None = None,
        *,
        plain: bool = False,
    ) -> list[dict[Site, Tensor]]:
        """Activations of each example's first stream, or of the unedited model's `plain` prompt."""


class Task(ABC):
    """A benchmark. Constructor arguments are its options (`--task_set key=value`), `data` first where it reads files."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    default_split: ClassVar[str] = "dev"
    """What is evaluated where the command does not say."""
    train_ignores: ClassVar[frozenset[str]] = frozenset()
    """Options that leave the train split as it is: what was fitted is reused where they change."""
    asked_by_name: ClassVar[bool] = False
    """Whether its name and version alone say in which words a history's pairs are asked, whatever its options. Else what is learnt
    of a user is kept for each wording."""
    closed: ClassVar[bool] = False
    """Whether answers come from a short list, as labels do: then a history that has one gives nothing away by itself."""
    how_to_get: ClassVar[str] = ""
    """Of data that `harness data get` does not fetch: its licence, and a command."""
    judged: ClassVar[bool] = False
    """Whether its metrics need a judge; then `to_judge` says what to ask."""
    asks: ClassVar[Collection[Asks]] = frozenset({"rubric"})
    """What the questions of `to_judge` ask, where there are any. A judge by word lists cannot be asked by a rubric."""
    grades_with_data: ClassVar[bool] = False
    """Whether grading, metrics or `to_judge` read the data again, beside the samples: then a record is graded again over its own
    data alone."""
    reads_model: ClassVar[bool] = False
    """Whether it reads activations or edits them itself: then a model behind a server cannot run it."""
    per_sample: ClassVar[Mapping[str, str]] = {}
    """Metric -> the number of a sample that it is the mean of, where that has another name."""
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {}
    """Number of a sample -> its least and greatest possible value, for those that have both and can be others than 0 and 1.
    With them an interval knows that all right so far is not always right."""
    independent: ClassVar[Literal["user", "item"]] = "user"
    """What is drawn for an interval, and exchanged in a test of two runs."""

    @classmethod
    def member(cls, name: str) -> type[Task]:
        """The class of `family:name`, for a task that is a family of them. Raises UsageError where it is none."""
        raise UsageError(f"task {cls.name!r} is no family of tasks; name it without ':{name}'")

    @abstractmethod
    def items(self, selection: Selection) -> Sequence[Labelled]:
        """The selected items, in file order. Raises DataMissing where files or fields are not there."""

    @abstractmethod
    def fingerprint(self, selection: Selection) -> str:
        """Hash of the data the selection reads; part of the record's hash."""

    @abstractmethod
    def generation(self) -> GenerationDefaults:
        """The task's own decoding limits, used unless the command line says otherwise."""

    def respond(self, system: System, items: Sequence[Labelled]) -> Iterator[Sample]:
        """Answer the items. Yields ungraded samples batch by batch, in the order batches finish; targets need not be copied."""
        yield from system.respond([item.example for item in items])

    def to_judge(self, sample: Sample) -> Mapping[str, Question]:
        """The questions about an answered sample, by name. Reads the sample alone, so that a record can be judged again."""
        return {}

    @abstractmethod
    def grade(self, sample: Sample) -> Sample:
        """The sample with `parsed` and `metrics` filled in; no model is run. A failed sample is returned unchanged.

        Where a question of `to_judge` has no rating with a score, the metrics that need it are None.
        """

    @abstractmethod
    def aggregate(self, samples: Sequence[Sample]) -> Mapping[str, Metric]:
        """Metrics over the graded samples. Failed samples are left out; the record counts them."""

    def analysis(self, samples: Sequence[Sample]) -> Mapping[str, Any]:
        """What the graded samples show beyond metrics, as JSON values for the record and its figures."""
        return {}

    def train_items(self) -> Sequence[Labelled]:
        """All items of the train split. Raises DataMissing where there is none."""
        return self.items(Selection(split="train"))

    def describe_data(self) -> str:
        """One line for the user: which data is read."""
        return self.name

    def caveats(self, items: Sequence[Labelled]) -> Sequence[str]:
        """What to know of these items before a number of them is read: notes of a run, and lines of `harness data check`."""
        return ()
