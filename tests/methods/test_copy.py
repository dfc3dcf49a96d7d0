"""Copying the input: what each kind of task gets, for no forward pass."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.data import Example, HistoryItem, Labelled, User
from harness.errors import UsageError
from harness.method import Fitted
from harness.methods.copy import Copy
from harness.run.contract import ToyTemplate, check_method, random_lm, toy_examples
from harness.run.system import ModelSystem
from harness.task import Generation

LAMP = Path(os.environ.get("HARNESS_SHARED", "../shared/data")).absolute() / "lamp"
RATINGS = ("1", "2", "3", "4", "5")


def _example(
    query: str = "", labels: tuple[str, ...] = (), history: tuple[str, ...] = (), choices: tuple[str, ...] = ()
) -> Example:
    pairs = tuple(
        Labelled(Example(f"u/{n}", User("u"), "", "", ToyTemplate(), labels=labels), (answer,))
        for n, answer in enumerate(history)
    )
    user = User("u", tuple(HistoryItem(str(n), {}, "") for n in range(len(history))), pairs)
    return Example("1", user, f"Paraphrase: {query}", query, ToyTemplate(), choices, labels=labels)


def _answer(example: Example, shared: Fitted | None = None, words: int | None = None) -> str | None:
    return Copy(words=words).plan(example, shared, None).answer


def test_a_text_is_answered_with_the_query_without_the_tasks_sentence() -> None:
    assert _answer(_example("such a long  day")) == "such a long  day"
    assert _answer(_example("such a long  day"), words=3) == "such a long"
    with pytest.raises(UsageError, match="words=0"):
        Copy(words=0)


def test_a_class_is_the_most_common_of_the_history_then_of_the_train_split_then_the_first() -> None:
    train = Fitted(meta={"counts": {"b": 1, "c": 5}})
    assert _answer(_example(labels=("a", "b", "c"), history=("b", "a", "b")), train) == "b"
    assert _answer(_example(labels=("a", "b", "c"), history=("b", "a"))) == "a"  # of equals the first of the list
    assert _answer(_example(labels=("a", "b", "c")), train) == "c"
    assert _answer(_example(labels=("a", "b", "c"))) == "a"
    assert _answer(_example(choices=(" A", " B")), Fitted(meta={"counts": {" B": 2, " A": 1}})) == " B"


def test_a_rating_is_the_median_and_never_between_two() -> None:
    assert _answer(_example(labels=RATINGS, history=("1", "5", "5"))) == "5"
    assert _answer(_example(labels=RATINGS, history=("2", "5"))) == "2"
    assert _answer(_example(labels=RATINGS)) == "3"


def test_answers_that_are_all_numbers_are_ratings_also_without_a_list_of_labels(
    harness: Callable[..., Any], tmp_path: Path
) -> None:
    assert _answer(_example("a film", history=("4.5", "1", "3"))) == "3"
    assert _answer(_example("a film", history=("4.5", "fine"))) == _answer(_example("a film")) == "a film"
    assert _answer(_example("a film"), Fitted(meta={"counts": {"2": 3, "10": 2}})) == "2"
    assert Copy().fit(None, toy_examples(2)) is None  # type: ignore[arg-type]
    lines = [{"user": u, "input": f"film {n}", "target": 1 + n} for u in ("ann", "bob") for n in range(3)]
    train = [{"user": "cleo", "input": "a film", "target": 2, "split": "train"}]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines + train)))
    done = harness(f"run --method copy --task users:{tmp_path}/mine.jsonl --model tiny --json --output_path r")
    metrics = json.loads(done.out)["metrics"]
    assert (metrics["mae"]["n"], metrics["mae"]["value"]) == (6, pytest.approx((1 + 1 + 2) / 3))


def test_it_keeps_what_of_the_contract_has_a_meaning_for_it() -> None:
    said: list[str] = []
    check_method(Copy(), say=said.append)
    assert any("no forward pass" in line for line in said)


def test_scored_it_gives_its_answer_all_the_probability_and_reads_no_activation() -> None:
    examples = [item.example for item in toy_examples(2)]
    system = ModelSystem(random_lm(), Copy(), Generation(8))
    ((own, other), _) = system.score(examples, [[examples[0].query, "else"], ["else"]])
    assert sum(own.logprobs) == 0.0 and sum(other.logprobs) == float("-inf")
    assert [answer.text for answer in system.generate(examples, Generation(1))] == [e.query for e in examples]
    assert system.decoder.cost.forward_passes == 0
    with pytest.raises(UsageError, match="without the model"):
        system.encode(examples[0])


def test_a_run_of_it_costs_nothing_and_needs_no_train_split(harness: Callable[..., Any]) -> None:
    assert harness("data mini mini").code == 0
    for split in ("train", "test"):
        for file in Path("mini").rglob(f"{split}_*.json"):
            file.unlink()
    for task, metric in {"lamp7": "rouge1", "lamp2m": "accuracy", "lamp3": "mae", "lamp1": "accuracy"}.items():
        done = harness(f"run --method copy --task {task} --data mini --users 4 --json --output_path r")
        assert done.code == 0, done.err
        record = json.loads(done.out)
        assert record["metrics"][metric]["n"] >= 4 and record["health"]["errors"] == 0
        assert record["cost"]["forward_passes"] == 0 and record["cost"]["flops"] == 0


@pytest.mark.skipif(not LAMP.is_dir(), reason=f"no {LAMP} (set HARNESS_SHARED)")
def test_copying_a_tweet_already_scores_rouge1_of_463(harness: Callable[..., Any]) -> None:
    done = harness(f"run --method copy --task lamp7 --data {LAMP} --json --output_path r")
    rouge1 = json.loads(done.out)["metrics"]["rouge1"]
    assert rouge1["n"] == 1500 and rouge1["value"] == pytest.approx(0.463, abs=5e-4)
