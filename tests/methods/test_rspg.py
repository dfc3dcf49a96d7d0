"""RSPG: the retriever whose items make a user's own texts likeliest, for each user or for everyone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.data import Example, HistoryItem, Labelled, User
from harness.errors import UsageError
from harness.fit.artifacts import Checkpoint
from harness.fit.kit import ModelKit
from harness.method import Retrieval
from harness.methods.rspg import RSPG
from harness.plan import Plan
from harness.run.contract import ToyTemplate, random_lm, toy_examples


class Scored(ModelKit):
    """A prompt is the better the more of its items say `good`; `calls` counts what was scored."""

    calls = 0

    def losses(self, plans: Sequence[Plan], targets: Sequence[str], variants: Any, *, label: str = "") -> torch.Tensor:
        self.calls += len(plans)
        assert list(variants) == [()] and all(targets)
        good = [sum(item.document.startswith("good") for item in plan.streams[0].prompt.items) for plan in plans]
        return -torch.tensor(good, dtype=torch.float64)[:, None]

    def sample(self, items: Sequence[Labelled], count: int) -> list[Labelled]:
        return list(items)[:count]


def user(name: str, documents: Sequence[str], pairs: int = 4) -> User:
    history = tuple(HistoryItem(str(n), {"text": text}, text) for n, text in enumerate(documents))
    made = tuple(
        Labelled(Example(f"{name}/{n}", User(name, history), "asked", "asked", ToyTemplate()), ("answer",))
        for n in range(pairs)
    )
    return User(name, history, made)


FIRST_IS_GOOD = ("good", "asked", "other")
"""`profile` takes the first item, `bm25` one that has the words of the query."""
NEAREST_IS_GOOD = ("bad", "good asked", "bad")
METHOD = RSPG(Retrieval(k=1), pool="none,bm25,profile")


@pytest.fixture
def kit() -> Scored:
    return Scored(random_lm())


def test_each_user_gets_the_retriever_that_makes_their_own_texts_likeliest(kit: Scored) -> None:
    ann, bob = user("ann", FIRST_IS_GOOD), user("bob", NEAREST_IS_GOOD)
    states = METHOD.adapt(kit, [ann, bob], None)
    assert [state.meta["retriever"] for state in states] == ["profile", "bm25"]
    assert states[0].meta["scores"] == {"none": 0.0, "bm25": 0.0, "profile": 1.0} and kit.calls == 2 * 3 * 4
    (stream,) = METHOD.plan(ann.pairs[0].example, None, states[0]).streams
    assert [item.document for item in stream.prompt.items] == ["good"]
    found = METHOD.analysis(None, {"ann": states[0], "bob": states[1]})
    assert found["retrievers"] == {"none": 0, "bm25": 1, "profile": 1} and found["decided_themselves"] == 2


def test_who_has_too_little_history_gets_everyones(kit: Scored) -> None:
    train = [Labelled(pair.example, pair.targets) for pair in user("eve", FIRST_IS_GOOD).pairs]
    shared = METHOD.fit(kit, train)
    assert shared.meta["retriever"] == "profile"
    (state,) = METHOD.adapt(kit, [user("new", NEAREST_IS_GOOD, pairs=2)], shared)
    assert (state.meta["retriever"], state.meta["scored"]) == ("profile", 0)
    (state,) = replace(METHOD, choose="task").adapt(kit, [user("bob", NEAREST_IS_GOOD)], shared)
    assert state.meta["retriever"] == "profile"
    nothing = METHOD.fit(kit, [])
    assert nothing.meta["retriever"] == "bm25" and "no train split" in kit.notes[0]


def test_of_equal_retrievers_the_first_of_the_pool_is_taken_and_none_is_one(kit: Scored) -> None:
    (state,) = METHOD.adapt(kit, [user("ann", ("bad", "bad"))], None)
    assert state.meta["retriever"] == "none"
    assert METHOD.plan(user("ann", ("bad", "bad")).pairs[0].example, None, state).streams[0].prompt.items == ()


def test_a_real_models_scores_are_log_probabilities(kit: Scored) -> None:
    real = ModelKit(random_lm())
    train = toy_examples(4, seed=1)
    shared = METHOD.fit(real, train)
    assert set(shared.meta["scores"]) == {"none", "bm25", "profile"} and all(
        s < 0 for s in shared.meta["scores"].values()
    )


def test_a_fit_that_keeps_its_parts_scores_each_retriever_by_itself(tmp_path: Path) -> None:
    train = toy_examples(4, seed=1)
    alone = METHOD.fit(ModelKit(random_lm()), train).meta["scores"]
    kept = ModelKit(random_lm(), checkpoint=Checkpoint(tmp_path / "parts"))
    assert METHOD.fit(kept, train).meta["scores"] == pytest.approx(alone)
    parts = len(list((tmp_path / "parts").iterdir()))  # equal prompts share one
    assert len(set(alone.values())) > 1 and len(train) < parts <= 3 * len(train)
    again = ModelKit(random_lm(), checkpoint=kept.checkpoint)
    assert METHOD.fit(again, train).meta["scores"] == pytest.approx(alone)


def test_a_pool_of_what_there_is_not_is_one_line() -> None:
    with pytest.raises(UsageError, match="rspg: unknown retriever 'bm52'; did you mean 'bm25'"):
        RSPG(pool="none,bm52")
    with pytest.raises(UsageError, match="names nothing, or one twice"):
        RSPG(pool="bm25,bm25")
