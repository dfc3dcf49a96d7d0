"""Retrieval is rank_bm25's BM25, keeps ties in order, and never depends on the process."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rank_bm25 import BM25Okapi

from harness import retrieve as module
from harness.data import Example, HistoryItem, User
from harness.errors import DataMissing, UsageError
from harness.retrieve import RETRIEVERS, Bm25, retrieve, use_encoder
from harness.task import Selection
from harness.tasks.lamp import Lamp, Lamp1, Lamp2M, Lamp3, Lamp4, Lamp5, Lamp7
from harness.tasks.lamp_prompts import LampTemplate

SHARED = Path(os.environ.get("HARNESS_SHARED", "../shared/data"))
WORDS = st.text(alphabet="abcd ", max_size=20)


def example(*documents: str, query: str = "a", dates: tuple[str | None, ...] = (), ident: str = "e") -> Example:
    dated = dates or (None,) * len(documents)
    history = tuple(
        HistoryItem(str(i), {}, text, date) for i, (text, date) in enumerate(zip(documents, dated, strict=True))
    )
    return Example(ident, User("u", history), query, query, LampTemplate("lamp4"))


def chosen(name: str, asked: Example, k: int = 99, **options: int) -> list[str]:
    return [record.id for record in retrieve(name, asked, k, **options)]


@given(st.lists(WORDS, min_size=1, max_size=8).filter(lambda texts: any(map(str.split, texts))), WORDS)
def test_bm25_scores_equal_rank_bm25(documents, query):
    expected = BM25Okapi([document.split() for document in documents]).get_scores(query.split())
    np.testing.assert_allclose(Bm25(documents).scores(query), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("task", [Lamp1, Lamp2M, Lamp3, Lamp4, Lamp5, Lamp7], ids=lambda task: task.name)
def test_bm25_equals_rank_bm25_on_every_real_user(task: type[Lamp]):
    folder = SHARED / "lamp"
    if not folder.is_dir():
        pytest.skip(f"no LaMP files in {folder} (set HARNESS_SHARED)")
    for item in task(data=str(folder)).items(Selection()):
        history, query = item.example.user.history, item.example.query
        ours = Bm25([record.document for record in history]).scores(query)
        theirs = BM25Okapi([record.document.split() for record in history]).get_scores(query.split())
        assert np.abs(ours - theirs).max() <= 1e-12
        order = [history.index(record) for record in retrieve("bm25", item.example, len(history))]
        assert all(theirs[a] > theirs[b] or (theirs[a] == theirs[b] and a < b) for a, b in pairwise(order))


def test_ties_keep_the_histories_order():
    assert chosen("bm25", example("a b", "c d", "a b", "e f", "a b", query="a")) == ["0", "2", "4", "1", "3"]


def test_documents_without_a_word_score_nothing():
    assert chosen("bm25", example("", " ", query="a")) == ["0", "1"]


def test_an_index_is_made_once_for_a_history_and_the_cache_is_bounded(monkeypatch):
    made = []
    monkeypatch.setattr(module, "Bm25", lambda: made.append(1) or Bm25())
    asked = example("a", "b")
    chosen("bm25", asked)
    chosen("bm25", asked)
    assert len(made) == 1
    for _ in range(2 * module._CACHED_HISTORIES):
        chosen("bm25", example("a", "b"))
    assert len(module._cached) == module._CACHED_HISTORIES


def test_a_history_that_grows_keeps_its_index_and_gets_the_scores_of_a_new_one(monkeypatch):
    random.seed(0)
    texts = [" ".join(random.choices("abcdefghij", k=random.randint(0, 12))) for _ in range(40)]
    whole = example(*texts)
    parts = [whole.user.history[:n] for n in range(1, 41)]
    made = []
    monkeypatch.setattr(module, "Bm25", lambda: made.append(1) or Bm25())
    for history in [*parts, parts[7], parts[20], parts[39]]:
        asked = replace(whole, user=User("u", history), query="a b c a j")
        expected = Bm25([record.document for record in history]).scores(asked.query)
        order = np.argsort(-expected, kind="stable")
        assert [record.id for record in retrieve("bm25", asked, 99)] == [history[i].id for i in order]
    assert len(made) == 2  # the second where the history is shorter than what was indexed


def test_equal_lengths_of_history_are_not_mistaken_for_each_other():
    assert chosen("bm25", example("a", "b", "c", query="b"), 1) == ["1"]
    assert chosen("bm25", example("b", "a", "c", query="b"), 1) == ["0"]


def test_profile_takes_the_first_items_and_recency_the_newest():
    dated = example("x", "y", "z", dates=("2014-02-01", "2014-10-01", "2014-02-01"))
    assert chosen("profile", dated, 2) == ["0", "1"]
    assert chosen("recency", dated) == ["1", "2", "0"]  # of two items of one day, LaMP takes the later first


@pytest.mark.parametrize("dates", [(None, None), ("2014", "May 3")])
def test_recency_without_usable_dates_is_a_usage_error(dates):
    with pytest.raises(UsageError, match="recency"):
        chosen("recency", example("x", "y", dates=dates))


def test_random_is_a_draw_without_replacement_that_depends_on_seed_and_example():
    many = [f"{i}" for i in range(30)]
    drawn = chosen("random", example(*many), 10)
    assert len(set(drawn)) == 10
    assert drawn == chosen("random", example(*many), 10)
    assert drawn != chosen("random", example(*many), 10, seed=1)
    assert drawn != chosen("random", example(*many, ident="f"), 10)


def test_random_is_the_same_in_every_process():
    code = "from tests.test_retrieve import *; print(chosen('random', example(*'abcdefgh')))"
    printed = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert printed == {f"{chosen('random', example(*'abcdefgh'))}\n".encode()}


def test_dense_ranks_by_dot_product_with_any_encoder():
    use_encoder(lambda texts: np.array([[text.count("a"), text.count("b")] for text in texts], dtype=float))
    try:
        assert chosen("dense", example("a", "bb", "aaa", query="a")) == ["2", "0", "1"]
    finally:
        use_encoder(None)


def test_dense_without_its_extra_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(DataMissing, match=r"pip install 'personalization-harness\[dense\]'"):
        chosen("dense", example("a", "b"))


@pytest.mark.parametrize("name", [name for name in RETRIEVERS if name != "dense"])
def test_no_items_asked_for_or_there_is_an_empty_prompt(name):
    assert retrieve(name, example("a", "b", dates=("2014", "2015")), 0) == ()
    assert retrieve(name, example(), 5) == ()
    assert len(retrieve(name, example("a", "b", dates=("2014", "2015")), 5)) == 2


def test_bad_requests_name_what_is_allowed():
    with pytest.raises(UsageError, match=r"did you mean 'bm25'.*recency"):
        retrieve("bm52", example("a"), 1)
    with pytest.raises(UsageError, match="k=-1"):
        retrieve("bm25", example("a"), -1)


def test_every_listed_retriever_runs():
    assert set(RETRIEVERS) == set(module._ORDERS)


def test_a_cached_index_is_many_times_faster_than_rank_bm25():
    words = random.Random(0)
    documents = [" ".join(words.choices("abcdefghijklmnopqrst", k=50)) for _ in range(200)]
    asked = example(*documents, query=" ".join(words.choices("abcdefghijklmnopqrst", k=50)))
    chosen("bm25", asked)
    start = time.perf_counter()
    for _ in range(5):
        chosen("bm25", asked)
    ours = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(5):
        BM25Okapi([document.split() for document in documents]).get_scores(asked.query.split())
    assert ours < (time.perf_counter() - start) / 2
