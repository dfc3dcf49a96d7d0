"""Choose the k items of a user's history that go into a prompt, best first.

BM25 is rank_bm25 0.2.2's `BM25Okapi` as LaMP's code calls it: whitespace tokens, case and punctuation kept, k1 1.5,
b 0.75, a negative idf replaced by 0.25 times the mean idf. Terms are added in the same order, so scores are equal.
Differs from LaMP's code: ties keep the history's order (there: whatever a reversed argsort gives), and `random` draws
without replacement.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
import os
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, lru_cache, partial
from pathlib import Path
from random import Random
from typing import Any, TypeAlias

import numpy as np

from harness.data import Example, HistoryItem
from harness.errors import DataMissing, UsageError, did_you_mean
from harness.plugins.entry_points import added, load_added

GROUP = "harness.retrievers"
"""Entry points of packages that add retrievers: functions of an example and a seed that return places in its history, best
first. A record holds the name alone, so a retriever that changes should change its name."""
RETRIEVERS: Mapping[str, str] = {
    "bm25": "BM25 between the query and each item's text (rank_bm25's Okapi variant), ties in the history's order",
    "profile": "the first k items in the history's order (file order; oldest first where items have dates)",
    "recency": "the newest k items, newest first; needs dates (the time split)",
    "random": "k items drawn without replacement, the same for an example and a seed in every process",
    "dense": "dot product of embeddings by $HARNESS_ENCODER (facebook/contriever; a folder, ONNX too); needs the 'dense' extra",
}
"""Name -> one line for `harness list retrievers`."""

Encoder: TypeAlias = Callable[[Sequence[str]], np.ndarray]
"""Texts -> one row of floats each."""
ENCODER_TOKENS, ENCODER_BATCH = 512, 32
"""Of an ONNX encoder: tokens of a text that it reads, and texts at once."""


def retrieve(name: str, example: Example, k: int, *, seed: int = 0) -> tuple[HistoryItem, ...]:
    """The k best items of the example's history, best first; all of them where there are fewer, () for k = 0."""
    if name not in _ORDERS and name not in added(GROUP):
        known = retrievers()
        raise UsageError(f"unknown retriever {name!r}{did_you_mean(name, known)} Choose from: {', '.join(known)}")
    if k < 0:
        raise UsageError(f"k={k} history items were asked for; k must be 0 or more")
    history = example.user.history
    if k == 0 or not history:
        return ()
    order = _ORDERS[name](example, seed) if name in _ORDERS else _added_order(name, example, seed)
    return tuple(history[i] for i in order[:k])


def retrievers() -> dict[str, str]:
    """Name -> one line, those among them that installed packages add."""
    return {**RETRIEVERS, **dict.fromkeys(added(GROUP), f"added by an installed package ({GROUP})")}


def _added_order(name: str, example: Example, seed: int) -> Sequence[int]:
    """What a package's retriever says of the history. Raises UsageError where that is no order of its items."""
    order = list(load_added(GROUP, name)(example, seed))
    places = range(len(example.user.history))
    wrong = [place for place in order if isinstance(place, bool) or place not in places]
    if wrong or len(set(order)) < len(order):
        what = f"holds {wrong[0]!r}" if wrong else "names an item twice"
        raise UsageError(
            f"retriever {name!r} gave an order that {what}; expected places in the history, 0 to {len(places) - 1}, best first"
        )
    return order


@lru_cache(maxsize=1 << 14)  # a file has millions of dates, and few that differ
def date_key(date: str) -> tuple[int, ...]:
    """Sorts dates as LaMP does: `2014`, `2014-07` or `2014-07-31`, number by number. Raises ValueError for others."""
    return tuple(int(part) for part in date.split("-"))


class Bm25:
    """An inverted index over one history's documents, which `add` lets grow with the history."""

    k1, b, epsilon = 1.5, 0.75, 0.25

    def __init__(self, documents: Iterable[str] = ()) -> None:
        self._lengths = array("q")
        self._words = 0
        self._number: dict[str, int] = {}
        """Of each term, in the order they first came."""
        self._holds: list[array[int]] = []
        """By term: the numbers of the documents that hold it,"""
        self._times: list[array[int]] = []
        """and how often each does."""
        self._documents = array("q")
        """By term: in how many documents it is."""
        for document in documents:
            self.add(document)

    def __len__(self) -> int:
        return len(self._lengths)

    def add(self, document: str) -> None:
        """One more document, behind the others."""
        counts = Counter(document.split())
        for term, count in counts.items():
            number = self._number.setdefault(term, len(self._number))
            if number == len(self._holds):
                self._holds.append(array("q"))
                self._times.append(array("q"))
                self._documents.append(0)
            self._holds[number].append(len(self))
            self._times[number].append(count)
            self._documents[number] += 1
        self._lengths.append(counts.total())
        self._words += counts.total()

    def scores(self, query: str) -> np.ndarray:
        """One score a document, [N]. Terms are added in the query's order, repeats included."""
        terms = [self._number[term] for term in query.split() if term in self._number]
        if not terms:
            return np.zeros(len(self))
        sizes = np.array([self._documents[term] for term in terms])
        idf = np.repeat(self._idf()[sizes], sizes)
        documents = np.concatenate([self._holds[term] for term in terms], dtype=np.int64)
        times = np.concatenate([self._times[term] for term in terms], dtype=np.int64)
        mean_length = self._words / len(self)
        norm = self.k1 * (1 - self.b + self.b * np.array(self._lengths) / mean_length)
        weights = idf * (times * (self.k1 + 1) / (times + norm[documents]))
        return np.bincount(documents, weights, minlength=len(self))

    def _idf(self) -> np.ndarray:
        """By the number of documents that a term is in, [N + 1]; where that is negative, the floor."""
        documents = np.array(self._documents)
        table = np.zeros(len(self) + 1)
        for n in np.flatnonzero(np.bincount(documents)).tolist():
            table[n] = math.log(len(self) - n + 0.5) - math.log(n + 0.5)
        total = np.cumsum(table[documents])[-1]  # one after another, as rank_bm25 adds them
        table[table < 0] = self.epsilon * total / len(documents)
        return table


def use_encoder(encoder: Encoder | None) -> None:
    """Sets the encoder of the `dense` retriever for this process; None goes back to the default."""
    global _encoder_in_use
    _encoder_in_use = encoder
    _cached.clear()


_encoder_in_use: Encoder | None = None
_CACHED_HISTORIES = 256
_cached: OrderedDict[tuple[str, int], tuple[Sequence[HistoryItem], Any]] = OrderedDict()
"""(kind, id of the history) -> the history, held so that its id stays its own, and what was computed from it."""
_newest: dict[int, tuple[str, int]] = {}
"""Id of a history's first record -> where in `_cached` the newest BM25 index of such a history lies."""


def _per_history(kind: str, history: Sequence[HistoryItem], make: Callable[[], Any]) -> Any:
    key = kind, id(history)
    if key not in _cached:
        _cached[key] = history, make()
        if len(_cached) > _CACHED_HISTORIES:
            gone, (oldest, _) = _cached.popitem(last=False)
            if isinstance(oldest, tuple) and _newest.get(id(oldest[0])) == gone:
                del _newest[id(oldest[0])]
    _cached.move_to_end(key)
    return _cached[key][1]


def _index(history: Sequence[HistoryItem]) -> Bm25:
    """An index of the history: that of the history it goes on from where there is one, grown, else a new one.

    The items of a user that a method learns from are asked about one after another, each with those before it as history.
    """
    if not isinstance(history, tuple):  # its items are made anew when they are looked at
        return Bm25(item.document for item in history)
    before, index = _cached.get(_newest.get(id(history[0]), ("", 0)), ((), None))
    if index is not None and len(before) <= len(history) and all(map(operator.is_, before, history)):
        del _cached[_newest[id(history[0])]]
    else:
        before, index = (), Bm25()
    for record in history[len(before) :]:
        index.add(record.document)
    _newest[id(history[0])] = "bm25", id(history)
    return index


def _bm25(example: Example, seed: int) -> Sequence[int]:
    history = example.user.history
    index: Bm25 = _per_history("bm25", history, partial(_index, history))
    return np.argsort(-index.scores(example.query), kind="stable").tolist()


def _profile(example: Example, seed: int) -> Sequence[int]:
    return range(len(example.user.history))


def _recency(example: Example, seed: int) -> Sequence[int]:
    history = example.user.history
    dates: list[tuple[int, ...]] = []
    for record in history:
        if record.date is None:
            raise UsageError(
                f"retriever 'recency' needs dates, and item {record.id!r} of user {example.user.id!r} has none; "
                "use the time split's files, or another retriever"
            )
        try:
            dates.append(date_key(record.date))
        except ValueError:
            raise UsageError(
                f"retriever 'recency' cannot read date {record.date!r} of item {record.id!r}, user "
                f"{example.user.id!r}; expected YYYY-MM-DD"
            ) from None
    return sorted(range(len(history)), key=lambda i: (dates[i], i), reverse=True)


def _random(example: Example, seed: int) -> Sequence[int]:
    size = len(example.user.history)
    return Random(f"{seed}/{example.user.id}/{example.id}").sample(range(size), size)


def _dense(example: Example, seed: int) -> Sequence[int]:
    encode = _encoder_in_use or _default_encoder()
    history = example.user.history
    documents: np.ndarray = _per_history("dense", history, lambda: encode([record.document for record in history]))
    return np.argsort(-(documents @ encode([example.query])[0]), kind="stable").tolist()


_ORDERS: Mapping[str, Callable[[Example, int], Sequence[int]]] = {
    "bm25": _bm25,
    "profile": _profile,
    "recency": _recency,
    "random": _random,
    "dense": _dense,
}


def _default_encoder() -> Encoder:
    return sentence_encoder(_encoder_name(), "retriever 'dense'")


def _encoder_name() -> str:
    return os.environ.get("HARNESS_ENCODER", "facebook/contriever")


def encoder_identity() -> str:
    """What `dense` encodes with, for a record."""
    return "given by the program" if _encoder_in_use is not None else identity_of_encoder(_encoder_name())


def identity_of_encoder(name: str) -> str:
    """A hub id, or a folder's name and the hash of its content."""
    folder = Path(name).expanduser()
    return f"{folder.name} {_content_hash(folder)}" if folder.is_dir() else name


@cache
def _content_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as content:
            digest.update(
                path.relative_to(folder).as_posix().encode() + hashlib.file_digest(content, "sha256").digest()
            )
    return f"sha256:{digest.hexdigest()[:16]}"


@cache
def sentence_encoder(name: str, wanted_by: str) -> Encoder:
    """A sentence-transformers model by hub id or folder, or a folder that holds an ONNX model and its tokenizer.json.

    Raises DataMissing where it or the extra is not there.
    """
    folder = Path(name).expanduser()
    if folder.is_dir() and (model := _onnx_file(folder)):
        return _onnx_encoder(folder, model, wanted_by)
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise DataMissing(
            f"{wanted_by} needs sentence-transformers: pip install 'personalization-harness[dense]'"
        ) from None
    try:
        loaded = SentenceTransformer(str(folder) if folder.is_dir() else name)
    except Exception as error:
        raise DataMissing(
            f"{wanted_by} cannot load the encoder {name!r} ({type(error).__name__}); download it once, or point "
            "$HARNESS_ENCODER at a folder with a sentence-transformers or ONNX model"
        ) from error
    return lambda texts: np.asarray(loaded.encode(list(texts), show_progress_bar=False))


def _onnx_file(folder: Path) -> Path | None:
    """The ONNX model of a folder that has no weights of another kind."""
    if any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin")):
        return None
    return next((path for path in (folder / "model.onnx", folder / "onnx" / "model.onnx") if path.is_file()), None)


def _onnx_encoder(folder: Path, model: Path, wanted_by: str) -> Encoder:
    """The mean of the last hidden states over a text's tokens, or the first one where 1_Pooling/config.json asks for it."""
    try:
        import onnxruntime
    except ImportError:
        raise DataMissing(f"{wanted_by} needs onnxruntime: pip install 'personalization-harness[dense]'") from None
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
        pooling = folder / "1_Pooling" / "config.json"
        first = pooling.is_file() and bool(
            json.loads(pooling.read_text(encoding="utf-8")).get("pooling_mode_cls_token")
        )
    except Exception as error:
        raise DataMissing(
            f"{wanted_by} cannot load the encoder {str(folder)!r} ({type(error).__name__}: {error}); it should hold model.onnx and "
            "tokenizer.json"
        ) from error
    padding = tokenizer.token_to_id("[PAD]") or 0
    tokenizer.enable_padding(pad_id=padding)
    tokenizer.enable_truncation(ENCODER_TOKENS)
    wanted = {given.name for given in session.get_inputs()}

    def encode(texts: Sequence[str]) -> np.ndarray:
        found = []
        for start in range(0, len(texts), ENCODER_BATCH):
            made = tokenizer.encode_batch(list(texts[start : start + ENCODER_BATCH]))
            mask = np.array([one.attention_mask for one in made], dtype=np.int64)
            feed = {
                "input_ids": np.array([one.ids for one in made], dtype=np.int64),
                "attention_mask": mask,
                "token_type_ids": np.zeros_like(mask),
            }
            states = np.asarray(session.run(None, {name: feed[name] for name in feed if name in wanted})[0])
            if states.ndim == 3:
                weights = mask[:, :, None]
                states = states[:, 0] if first else (states * weights).sum(1) / np.maximum(weights.sum(1), 1)
            found.append(states)
        return np.concatenate(found)

    return encode
