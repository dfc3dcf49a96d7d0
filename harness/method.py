"""What strangers write: a way of making a model fit a user.

A `Method` is a frozen dataclass of hyper-parameters and four functions, of which only `plan` is required. It owns no
loop, hook, cache or tokenizer: it says which forward passes it wants (see `harness.plan`) and the engine runs them, for
generation and for scoring alike. `harness check ./mine.py` tests what a method must keep (`harness.run.contract`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

from harness.data import Example, Labelled, Prompt, User
from harness.errors import UsageError, UserFailed
from harness.plan import Edit, Plan, Site, Sites

if TYPE_CHECKING:
    from torch import Tensor

    from harness.training import Adapter, Learner, Recipe, Shifts

RetrieverName = Literal["bm25", "profile", "recency", "random", "dense"]
"""Those of the harness; installed packages add others (`harness.plugins.retrieve.GROUP`)."""


@dataclass(frozen=True)
class Retrieval:
    """How much of a user's history goes into the prompt. Shared by all methods, so OPPU+RAG needs no copy of OPPU."""

    retriever: RetrieverName = "bm25"
    k: int = 5
    """Items asked for; the same for every user."""
    seed: int = 0
    """For the `random` retriever."""

    def __post_init__(self) -> None:
        if self.k < 0:
            raise UsageError(f"k={self.k} history items were asked for; allowed: k >= 0")

    def prompt(self, example: Example, summary: str = "") -> Prompt:
        """The example's prompt with its k best history items, best first, and a profile summary where there is one.

        No model call (but for `dense`).
        """
        from harness.plugins.retrieve import retrieve

        return example.prompt(retrieve(self.retriever, example, self.k, seed=self.seed), summary)


@dataclass(frozen=True)
class Fitted:
    """State a method fitted: named tensors and JSON values. Saved as safetensors + JSON by `harness.fit.artifacts`."""

    tensors: Mapping[str, Any] = field(default_factory=dict)
    """Name -> torch.Tensor (kept as Any here, so that listing methods never imports torch)."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)
    """What making it took, of prefill_tokens, decode_tokens, flops and seconds those that are known. Kept with it, so that
    a run that reuses it can say."""
    notes: Sequence[str] = ()
    """Warnings from when it was made; every run that uses it repeats them."""


class Progress(Protocol):
    """How far the job called `label` is."""

    def __call__(self, label: str, done: int, total: int) -> None: ...


@dataclass(frozen=True)
class Written:
    """A text that a writer wrote, and what it took."""

    text: str
    items: int
    """History items in the prompt the writer read."""
    dropped: int = 0
    """Items that did not fit its context."""
    cost: Mapping[str, float] = field(default_factory=dict)
    """As `Fitted.cost`."""


class Writer(Protocol):
    """Writes one text a prompt, of at most `max_new_tokens` tokens, in the prompts' order."""

    def __call__(self, prompts: Sequence[Prompt], max_new_tokens: int) -> Sequence[Written | UserFailed]: ...


@dataclass(frozen=True)
class HeadRanking:
    """Heads by mean score over samples, best first; ties in (layer, head) order."""

    heads: list[tuple[int, int]]
    scores: list[float]
    """Of `heads`, in their order."""
    split_half: float
    """Spearman correlation of the rankings of two random halves of the samples, mean of 20 splits."""


class Kit(Protocol):
    """What the engine lends a method while it fits and adapts; every draw is decided by `seed`.

    `harness.fit.kit.ModelKit` is the one that runs bring, and says of each function what it raises.
    """

    @property
    def seed(self) -> int: ...
    @property
    def max_new_tokens(self) -> int:
        """Room that prompts leave, as while decoding: history is cut exactly as it will be then."""

    @property
    def sites(self) -> Sites: ...
    @property
    def progress(self) -> Progress: ...
    @property
    def notes(self) -> list[str]:
        """Warnings for the reader of the numbers; append to it."""

    # text
    @property
    def vocabulary(self) -> int:
        """Size of the last axis of the logits: what a bias over tokens must have."""

    @property
    def end_tokens(self) -> frozenset[int]:
        """Ids that end a response."""

    def tokens(self, text: str) -> tuple[int, ...]:
        """Ids of a text that follows other text, without begin and end tokens."""

    # items, and the model's answers to them
    def sample(self, items: Sequence[Labelled], count: int) -> list[Labelled]:
        """`count` items drawn without replacement, in file order; those that fit the context."""

    def draw(self, total: int, count: int) -> list[int]:
        """`count` of the numbers below `total`, drawn without replacement, in order."""

    def generate(
        self, plans: Sequence[Plan], max_new_tokens: int, *, label: str = "generating"
    ) -> list[Written | UserFailed]:
        """One greedy response a plan."""

    def writer(self, name: str) -> Writer:
        """Who writes texts about users: `self` (the evaluated model), a model's alias, id or folder, or `openai/<model>`."""

    # what edits do
    def losses(
        self,
        plans: Sequence[Plan],
        targets: Sequence[str],
        variants: Sequence[Sequence[Edit]],
        *,
        label: str = "scoring variants",
    ) -> Tensor:
        """Mean token NLL in nats of each target after its plan's first stream under each variant's edits: [n, V] float64."""

    def rank(self, scores: Tensor) -> HeadRanking:
        """Heads by the mean of `scores` [n, layers, heads] over samples."""

    def last_tokens(self, plans: Sequence[Plan], texts: Sequence[str], site: Site) -> list[Tensor | None]:
        """The activation [D] at the last token of each text, read after its plan's prompt; None where there is none."""

    # training
    def train(
        self, learners: Sequence[Learner], parts: Sequence[Shifts | Adapter], recipe: Recipe
    ) -> list[Fitted | UserFailed]:
        """`parts` trained for each learner, all of them together (see `harness.training`)."""

    def read_adapter(self, folder: str) -> Fitted:
        """The LoRA adapter of a PEFT folder."""

    def read_adapters(self, folder: str, users: Sequence[User]) -> list[Fitted | UserFailed]:
        """Each user's adapter, from the PEFT folder of their id in `folder`."""


@dataclass(frozen=True)
class Method(ABC):
    """Base of every method. Subclass as a frozen dataclass; fields are hyper-parameters and nothing else."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Named sets of option values, for instance `released`: what the authors' code does where it differs."""

    decode_only: ClassVar[frozenset[str]] = frozenset()
    """Options `fit` and `adapt` do not read: changing them reuses what was fitted."""

    grouping: ClassVar[frozenset[str]] = frozenset()
    """Options that say how `fit` groups the samples it scores: changing them fits again and reuses the scores."""

    fits_without_train: ClassVar[bool] = False
    """Whether `fit` gets no items where there is no train split; else the run is refused there."""
    later: ClassVar[Mapping[str, Any]] = {}
    """Options that came after records were published -> the value that leaves everything as it was. At it an option is no
    part of what names a record or a fitted state, so that those of before are found again."""

    retrieval: Retrieval = Retrieval()

    @property
    def context(self) -> Retrieval:
        """`retrieval` by its first name, which methods of strangers read."""
        return self.retrieval

    @abstractmethod
    def plan(self, example: Example, shared: Fitted | None, personal: Fitted | None) -> Plan:
        """The forward passes and the mix for one example. Pure and cheap: no model call, equal arguments equal plans."""

    def fit(self, kit: Kit, train: Sequence[Labelled]) -> Fitted | None:
        """What is learnt once per model and task from the train split: head search, vectors, collective training."""
        return None

    def review(self, shared: Fitted | None) -> Sequence[str]:
        """Warnings about a fitted state under these options, for stderr and the record.

        Raises HarnessError where the state is of no use, so that nothing falls back in silence.
        """
        return ()

    def adapt(self, kit: Kit, users: Sequence[User], shared: Fitted | None) -> Sequence[Fitted | UserFailed | None]:
        """What is learnt of each user from their history, many users a call so that they can share batches.

        A UserFailed in a state's place makes the user's samples errors, and is tried again by the next run.
        """
        return [None] * len(users)

    def analysis(self, shared: Fitted | None, personal: Mapping[str, Fitted]) -> Mapping[str, Any]:
        """What the fitted states show, as JSON values for the record and its figures; `personal` by user id."""
        return {}

    def neutral(self) -> Self | None:
        """The same method at zero strength, every stream kept; None where it has no such setting."""
        return None

    @classmethod
    def fits(cls) -> bool:
        """Whether `fit` does anything."""
        return cls.fit is not Method.fit

    def decided(self, heads: int) -> Self:
        """With every option decided that depends on the model, which has so many attention heads in all its blocks.

        Records and fitted states are named by what this gives.
        """
        return self

    def fit_reads(self) -> frozenset[str]:
        """Options of `decode_only` that `fit` reads all the same under these options."""
        return frozenset()

    def personal_only(self) -> frozenset[str]:
        """Options that `fit` does not read, though `adapt` may: methods that differ in them share what `fit` learnt."""
        return frozenset()

    def needs_train(self) -> bool:
        """Whether `fit` reads a train split under these options; where not, it gets no items."""
        return self.fits()

    def adapts(self) -> bool:
        """Whether `adapt` does anything under these options."""
        return type(self).adapt is not Method.adapt

    def options(self) -> dict[str, Any]:
        """Every option with its value, those of `retrieval` among them: what a record holds."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "retrieval"}
        found = {**{f.name: getattr(self.retrieval, f.name) for f in fields(Retrieval)}, **own}
        if "dense" in self.retrievers():
            from harness.plugins.retrieve import encoder_identity

            found["encoder"] = encoder_identity()
        return found

    def retrievers(self) -> tuple[str, ...]:
        """Every retriever it may use."""
        return (self.retrieval.retriever,)

    def identity(self) -> dict[str, Any]:
        """The options that name a record and a fitted state: all but those of `later` that are as they ever were."""
        return {k: v for k, v in self.options().items() if k not in self.later or v != self.later[k]}

    def with_options(self, options: Mapping[str, Any]) -> Self:
        """A copy with options changed; names of `Retrieval` fields (k, retriever) reach into `retrieval`."""
        own = {f.name for f in fields(self)} - {"retrieval"}
        inside = {f.name for f in fields(Retrieval)} - own
        retrieval = replace(self.retrieval, **{k: v for k, v in options.items() if k in inside})
        return replace(self, retrieval=retrieval, **{k: v for k, v in options.items() if k not in inside})
