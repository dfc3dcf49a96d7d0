"""RSPG: of several retrievers the one whose items the model makes most of, for each user or for everyone.

Paper: Salemi, Kallumadi and Zamani, Optimization Methods for Personalizing Large Language Models through Retrieval
Augmentation, SIGIR 2024 (2404.05970): a pool of retrievers, one of them none at all, and for each query the one that a selector
chooses, which was trained on the model's own scores under each of them. Code read: LaMP-Benchmark/LaMP@de78cdb (RSPG/, and
LaMP/retriever_utilization_scorer.py, which scores the model's answer under each retriever by the task's metric).
The scores are kept, the selector is not. A retriever's score is the mean log-probability of a gold answer's tokens after the prompt
with its `k` items: of the train split's answers for everyone, and for a user of what they wrote themselves, each item of the
history asked about with the items before it. Differs from the paper, then:
- Who chooses: a user's own history (`choose=user`), or the train split alone (`choose=task`), and not a Longformer of 149M
  parameters that reads each query. Nothing is trained, and no query is looked at.
- Scores are likelihoods (theirs: ROUGE-1, accuracy or MAE of a generated answer), which need one pass each.
- The pool's learnt retrievers (ROPG) are not here; their contriever is `dense`, which needs the extra of that name.
A user with fewer than `least` own items to ask about gets everyone's retriever, and without a train split `bm25`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

from harness.data import Example, Labelled, Prompt, User
from harness.errors import HarnessError, UsageError, did_you_mean
from harness.method import Fitted, Kit, Method
from harness.plan import Plan, Stream
from harness.plugins.options import Count
from harness.plugins.retrieve import RETRIEVERS

NONE = "none"
FALLBACK = "bm25"


@dataclass(frozen=True)
class RSPG(Method):
    """Retrieval-augmented prompt, with the retriever that scores best on a user's history."""

    fits_without_train: ClassVar[bool] = True
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"pool": "none,recency,bm25,dense", "choose": "task", "k": 4}
    }

    pool: str = "none,bm25,profile"
    """What there is to choose from: retrievers, and `none`. `retriever` is not read."""
    choose: Literal["user", "task"] = "user"
    """Whose scores decide."""
    samples: Count = 200
    """Items of the train split that are scored."""
    items: Count = 8
    """Newest history items of a user that are scored."""
    least: Count = 3
    """Fewer of them decide nothing."""

    def __post_init__(self) -> None:
        for name in self.names:
            if name not in (NONE, *RETRIEVERS):
                known = (NONE, *RETRIEVERS)
                raise UsageError(
                    f"rspg: unknown retriever {name!r}{did_you_mean(name, known)} Choose from: {', '.join(known)}"
                )
        if not self.names or len(set(self.names)) < len(self.names):
            raise UsageError(
                f"rspg: pool {self.pool!r} names nothing, or one twice; give names as in none,bm25,profile"
            )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(filter(None, (name.strip() for name in self.pool.split(","))))

    def retrievers(self) -> tuple[str, ...]:
        return self.names

    def personal_only(self) -> frozenset[str]:
        return frozenset({"choose", "items", "least"})

    def fit(self, kit: Kit, train: Sequence[Labelled]) -> Fitted:
        """Everyone's retriever, and the mean log-probability under each."""
        chosen = kit.sample(train, min(self.samples, len(train))) if train else []
        if not chosen:
            kit.notes.append(f"rspg: no train split, so users whose history decides nothing get {self._fallback()}")
        return Fitted(meta=self._choice(kit, chosen, least=1, otherwise=self._fallback()))

    def adapt(self, kit: Kit, users: Sequence[User], shared: Fitted | None) -> list[Fitted]:
        """The user's retriever; everyone's where their history decides nothing."""
        everyone = str(shared.meta["retriever"]) if shared is not None else self._fallback()
        if self.choose == "task":
            return [Fitted(meta={"retriever": everyone, "scored": 0}) for _ in users]
        made = []
        for user in users:
            own = [pair for pair in user.pairs[-self.items :] if pair.example.user.history]
            try:
                own = kit.sample(own, len(own)) if own else []
            except HarnessError:  # none of them fits the context, so they decide nothing
                own = []
            made.append(Fitted(meta=self._choice(kit, own, least=self.least, otherwise=everyone)))
        return made

    def plan(self, example: Example, shared: Fitted | None, personal: Fitted | None) -> Plan:
        state = personal if personal is not None else shared
        return Plan(
            (Stream(self._prompt(example, self._fallback() if state is None else str(state.meta["retriever"]))),)
        )

    def analysis(self, shared: Fitted | None, personal: Any) -> dict[str, Any]:
        """How many users got which retriever, how many decided themselves, and everyone's scores."""
        given = [str(state.meta["retriever"]) for state in personal.values()]
        decided = sum(state.meta["scored"] >= self.least for state in personal.values())
        counts = {name: given.count(name) for name in self.names}
        return {
            "retrievers": counts,
            "decided_themselves": decided,
            "log_probability": shared.meta["scores"] if shared else {},
        }

    def neutral(self) -> Self:
        return replace(self, pool=NONE)

    def _choice(self, kit: Kit, items: Sequence[Labelled], *, least: int, otherwise: str) -> dict[str, Any]:
        """The best retriever for these items, the first in the pool of equals."""
        if len(items) < least or len(self.names) == 1:
            return {"retriever": otherwise if len(self.names) > 1 else self.names[0], "scored": 0, "scores": {}}
        answers = [item.reference for item in items]
        scores = {}
        for name in self.names:
            plans = [Plan((Stream(self._prompt(item.example, name)),)) for item in items]
            scores[name] = -float(kit.losses(plans, answers, [()], label=f"scoring {name}").mean())
        return {"retriever": max(self.names, key=lambda name: scores[name]), "scored": len(items), "scores": scores}

    def _prompt(self, example: Example, name: str) -> Prompt:
        if name == NONE:
            return example.prompt()
        chosen: Any = name  # checked where the pool is read
        return replace(self.retrieval, retriever=chosen).prompt(example)

    def _fallback(self) -> str:
        return FALLBACK if FALLBACK in self.names else self.names[0]
