"""Retrieval is rank_bm25's BM25, keeps ties in order, and never depends on the process."""

from __future__ import annotations

import base64
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

from harness.data import Example, HistoryItem, User
from harness.errors import DataMissing, UsageError
from harness.plugins import retrieve as module
from harness.plugins.retrieve import RETRIEVERS, Bm25, retrieve, use_encoder
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


TOY_ONNX = (
    "CAg6ywEKKQoBdwoJaW5wdXRfaWRzEhFsYXN0X2hpZGRlbl9zdGF0ZSIGR2F0aGVyEgN0b3kqKwgECAIQAUIBd0ogAAAAAAAAAAAAABBBAAAQQQAAgD8AAAAAAAAAAAAA"
    "gD9aHQoJaW5wdXRfaWRzEhAKDggHEgoKAxIBQgoDEgFUWiIKDmF0dGVudGlvbl9tYXNrEhAKDggHEgoKAxIBQgoDEgFUYikKEWxhc3RfaGlkZGVuX3N0YXRlEhQK"
    "EggBEg4KAxIBQgoDEgFUCgIIAkIECgAQDQ=="
)
"""An encoder of four tokens: [PAD] is (0, 0), [UNK] (9, 9), `a` (1, 0) and `b` (0, 1)."""


def onnx_folder(folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir()
    (folder / "model.onnx").write_bytes(base64.b64decode(TOY_ONNX))
    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2, "b": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_dense_reads_a_folder_with_an_onnx_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime", reason="the extra 'dense' is not installed")
    monkeypatch.setenv("HARNESS_ENCODER", str(onnx_folder(tmp_path / "toy")))
    encode = module.sentence_encoder(str(tmp_path / "toy"), "the test")
    np.testing.assert_allclose(
        encode(["a", "a b", "b b a b"]), [[1, 0], [0.5, 0.5], [0.25, 0.75]]
    )  # padding weighs nothing
    asked = example("a b", "a a", "b", query="a")
    assert chosen("dense", asked, 3) == ["1", "0", "2"]
    (tmp_path / "toy" / "1_Pooling").mkdir()
    (tmp_path / "toy" / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    module.sentence_encoder.cache_clear()
    np.testing.assert_allclose(module.sentence_encoder(str(tmp_path / "toy"), "the test")(["a b"]), [[1, 0]])
    (tmp_path / "toy" / "tokenizer.json").unlink()
    module.sentence_encoder.cache_clear()
    with pytest.raises(DataMissing, match=r"cannot load the encoder .*it should hold model.onnx and tokenizer.json"):
        module.sentence_encoder(str(tmp_path / "toy"), "the test")


def test_dense_reads_a_folder_of_sentence_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip("sentence_transformers", reason="the extra 'dense' is not installed")
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    parts = library.models if hasattr(library, "models") else library.sentence_transformer.modules
    word = parts.Transformer(str(tmp_path / "bert"))
    model = library.SentenceTransformer(modules=[word, parts.Pooling(8), parts.Normalize()], device="cpu")
    model.save(str(tmp_path / "encoder"))
    monkeypatch.setenv("HARNESS_ENCODER", str(tmp_path / "encoder"))
    encode = module.sentence_encoder(str(tmp_path / "encoder"), "the test")
    np.testing.assert_allclose(encode(["a b"]), model.encode(["a b"]), atol=1e-6)
    assert chosen("dense", example("b b", "a a b", "a", query="a"), 1) == ["2"]


def test_a_record_says_which_encoder_found_the_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from harness.method import Retrieval
    from harness.methods.rag import RAG
    from harness.methods.rspg import RSPG

    assert "encoder" not in RAG().options()
    dense = RAG(retrieval=Retrieval("dense"))
    monkeypatch.delenv("HARNESS_ENCODER", raising=False)
    assert dense.options()["encoder"] == "facebook/contriever"
    monkeypatch.setenv("HARNESS_ENCODER", str(onnx_folder(tmp_path / "toy")))
    named = dense.options()["encoder"]
    assert named.startswith("toy sha256:") and RSPG(pool="none,dense").options()["encoder"] == named
    (tmp_path / "toy" / "model.onnx").write_bytes(b"another")
    module._content_hash.cache_clear()
    assert dense.options()["encoder"] != named


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


def test_a_package_adds_a_retriever_by_entry_point_and_its_order_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    from harness.plugins import entry_points
    from harness.plugins.options import build_method
    from harness.plugins.registry import method_class

    point = EntryPoint("last", "builtins:min", "harness.retrievers")
    monkeypatch.setattr(entry_points, "_found", lambda group: {"last": point} if group == "harness.retrievers" else {})
    history = tuple(HistoryItem(str(n), {"text": str(n)}, str(n)) for n in range(4))
    example = Example("1", User("u", history), "q", "q", lambda text, items, summary: text)
    order: list[object] = [3, 1]
    monkeypatch.setattr(EntryPoint, "load", lambda self: lambda example, seed: order)
    method = build_method(method_class("rag"), "rag", None, ["retriever=last", "k=2"])
    assert [item.id for item in method.retrieval.prompt(example).items] == ["3", "1"]
    for wrong, words in (([0, 7], "holds 7"), ([1, 1], "names an item twice"), (["a"], "holds 'a'")):
        order[:] = wrong
        with pytest.raises(UsageError, match=f"retriever 'last' gave an order that {words}; expected places"):
            retrieve("last", example, 2)
    with pytest.raises(UsageError, match=r"allowed: .*'dense' or 'last'"):
        build_method(method_class("rag"), "rag", None, ["retriever=first"])
