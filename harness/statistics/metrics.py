"""Numbers from answers: LaMP's official parse and a lenient one, accuracy, macro-F1, rating errors, ROUGE, METEOR.

Code read: LaMP's eval/evaluation.py and evaluate's `rouge`, `meteor`, `f1`. Nothing here needs the network.
Differs from that code: ROUGE is the plain mean, not the median of an unseeded bootstrap; a rating `nan` or `inf` counts
as not parsed, where LaMP lets it into the mean.
METEOR is evaluate's number or no number. It needs WordNet (see `wordnet_missing`) and, for a text where it matters
how sentences are split, NLTK's punkt_tab. Without punkt_tab such a text has no `split` score, only an `unsplit` one,
which takes every text as one sentence and is a metric of its own.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from functools import cache
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from unicodedata import normalize

import numpy as np

from harness.files.user_cache import nltk_cache
from harness.statistics.intervals import UNIT, Bounds, jackknife, jackknife_interval, mean_interval, units
from harness.task import Metric, Sample

if TYPE_CHECKING:
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

T = TypeVar("T")

# Labels and ratings


def parse_label(text: str, labels: Sequence[str]) -> str | None:
    """The official parse: the stripped answer is a label, case and all, or it is nothing."""
    stripped = text.strip()
    return stripped if stripped in labels else None


def parse_label_leniently(text: str, labels: Sequence[str]) -> str | None:
    """The label the answer begins with, else the only one its first line mentions, else the only one it mentions.

    Case, surrounding punctuation and brackets are ignored, `sci fi` is `sci-fi`, `&` is `and`; inside a longer label
    ("dark comedy") a shorter one ("comedy") is not a mention.
    """

    def mentions(part: str) -> list[tuple[int, str]]:
        found: list[tuple[int, str]] = []
        for label in sorted(labels, key=len, reverse=True):
            for match in _label_pattern(label).finditer(part):
                found.append((match.start(), label))
                part = part[: match.start()] + "\0" * len(match.group()) + part[match.end() :]
        return sorted(found)

    return _the_one_meant(text, mentions)


def parse_rating(text: str) -> float | None:
    """The official parse, Python's `float`, without nan, inf and numbers whose square is not finite; of own users too."""
    try:
        rating = float(text.strip())
    except ValueError:
        return None
    return rating if abs(rating) <= 1e150 else None


def parse_rating_leniently(text: str) -> float | None:
    """The rating from 1 to 5 the answer begins with, or the only one it mentions; "out of 5" is no mention."""
    text = re.sub(r"(?i)\b1\s*(?:to|-|–)\s*5\b|(?:\bout of|/)\s*5\b", " ", text)

    def mentions(part: str) -> list[tuple[int, float]]:
        numbers = [
            (match.start(), float(match.group())) for match in re.finditer(r"(?<![\w.-])\d+(?:\.\d+)?(?!\w)", part)
        ]
        return [(start, number) for start, number in numbers if 1 <= number <= 5]

    return _the_one_meant(text, mentions)


def rating_or_farthest(rating: float | None, gold: float) -> float:
    """LaMP's rule: an answer that is no rating counts as the farther of 1 and 5 from the gold (5 for a gold of 3)."""
    if rating is not None:
        return rating
    return 1.0 if abs(1 - gold) > abs(5 - gold) else 5.0


def _the_one_meant(text: str, mentions: Callable[[str], list[tuple[int, T]]]) -> T | None:
    lines = text.strip().splitlines()
    for part in (lines[0] if lines else "", text):
        found = mentions(part)
        if found and (not re.search(r"\w", part[: found[0][0]]) or len({value for _, value in found}) == 1):
            return found[0][1]
    return None


@cache
def _label_pattern(label: str) -> re.Pattern[str]:
    words = re.escape(label.strip("[]")).replace(r"\-", "[- ]?").replace(r"\&", "(?:&|and)").replace(r"\ ", r"\s+")
    return re.compile(rf"(?<!\w){words}(?!\w)", re.IGNORECASE)


def macro_f1(golds: np.ndarray, predictions: np.ndarray, labels: int) -> float:
    """Mean F1 over labels 0 .. labels-1, absent ones counting 0; a prediction of -1 is no label and costs recall only.

    Equal to scikit-learn's `f1_score(average="macro", labels=range(labels), zero_division=0)`. Both arrays are integers [N].
    """
    hits, sizes = _counts(golds, predictions, np.zeros_like(golds), labels)
    return float(_f1(hits[0], sizes[0]))


def _counts(
    golds: np.ndarray, predictions: np.ndarray, users: np.ndarray, labels: int
) -> tuple[np.ndarray, np.ndarray]:
    """Hits of each user and label, and golds plus predictions of it: [users, labels]."""
    shape = (int(users.max(initial=-1)) + 1, labels)
    hits, sizes = np.zeros(shape), np.zeros(shape)
    right, named = golds == predictions, predictions >= 0
    np.add.at(hits, (users[right], golds[right]), 1)
    np.add.at(sizes, (users, golds), 1)
    np.add.at(sizes, (users[named], predictions[named]), 1)
    return hits, sizes


def _f1(hits: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Mean over the last axis."""
    return np.mean(2 * hits / np.maximum(sizes, 1), axis=-1)


# From samples to a metric


def metric(
    graded: Sequence[Sample], statistic: Callable[[np.ndarray], float], *, note: str = "", higher_is_better: bool = True
) -> Metric:
    """`statistic` of all samples (it gets their indices), and its interval by leaving out each user in turn."""
    if not graded:
        return Metric(None, 0, higher_is_better=higher_is_better, note="no graded answer")
    ends = known(jackknife([sample.user for sample in graded], statistic))
    return Metric(float(statistic(np.arange(len(graded)))), len(graded), *ends, higher_is_better, note)


def known(interval: Sequence[float]) -> tuple[float | None, float | None]:
    """Its ends, None where it says nothing."""
    low, high = (None if np.isnan(end) else float(end) for end in interval)
    return low, high


def mean(
    graded: Sequence[Sample],
    name: str,
    *,
    note: str = "",
    missing: str = "",
    root: bool = False,
    higher_is_better: bool = True,
    bounds: Bounds | None = None,
) -> Metric:
    """The mean (its root) of a per-sample number; where a sample has none, no value and `missing` as the note.

    `bounds` are the least and the greatest value that the number can have, where it has both (`Task.ranges`).
    """
    if not graded:
        return Metric(None, 0, higher_is_better=higher_is_better, note=note or "no graded answer")
    values = np.array([sample.metrics[name] for sample in graded], dtype=float)
    if np.isnan(values).any():
        return Metric(None, int(np.isfinite(values).sum()), higher_is_better=higher_is_better, note=missing)
    ends: Sequence[float] = mean_interval(values, [sample.user for sample in graded], bounds)
    value = float(values.mean())
    if root:  # of a mean that is 0 or more; the interval of one without bounds may begin below
        value, ends = value**0.5, [max(end, 0.0) ** 0.5 for end in ends]
    return Metric(value, len(graded), *known(ends), higher_is_better, note)


NO_JUDGE = "no judge was asked; give --judge, also to 'harness score'"


def mean_of_rated(graded: Sequence[Sample], name: str, *, bounds: Bounds) -> Metric:
    """The mean over the answers that have a rating, with how many have none."""
    rated = [sample for sample in graded if sample.metrics[name] is not None]
    missing = len(graded) - len(rated)
    if not rated:
        return Metric(None, 0, note=NO_JUDGE if not any(s.ratings for s in graded) else "no answer has a rating")
    note = f"{missing} of {len(graded)} answers have no rating and are left out" if missing else ""
    return mean(rated, name, note=note, bounds=bounds)


FEWEST = 5
"""Users who have a label as their gold, below which macro-F1 has no interval: a label's F1 is then mostly chance."""


def macro_f1_metric(
    graded: Sequence[Sample], golds: np.ndarray, predictions: np.ndarray, labels: Sequence[str]
) -> Metric:
    """Macro-F1 of samples whose gold and answer are labels[golds[i]] and labels[predictions[i]] (-1: none of them).

    The interval is a jackknife over users on the log-odds scale; none, and a note, where a label has fewer than FEWEST users.
    """
    if not graded:
        return Metric(None, 0, note="no graded answer")
    _, users = units([sample.user for sample in graded])
    hits, sizes = _counts(golds, predictions, users, len(labels))
    value = float(_f1(hits.sum(axis=0), sizes.sum(axis=0)))
    having = np.zeros((len(hits), len(labels)), dtype=bool)
    having[users, golds] = True
    of_label = having.sum(axis=0)
    absent, rare = int((of_label == 0).sum()), int(((of_label > 0) & (of_label < FEWEST)).sum())
    if rare or absent:
        notes = [f"labels without a gold here, which count 0: {absent} of {len(labels)}"] if absent else []
        notes += [f"labels that are the gold of fewer than {FEWEST} users: {rare}"] if rare else []
        return Metric(value, len(graded), note="; ".join([*notes, "no interval"]))
    without = _f1(hits.sum(axis=0) - hits, sizes.sum(axis=0) - sizes)
    return Metric(value, len(graded), *known(jackknife_interval(value, without, UNIT)))


# ROUGE


class Rouge(NamedTuple):
    """F-measures of rouge_score without stemming. Its tokens are [a-z0-9]+, so other scripts score 0."""

    rouge1: float
    rougeL: float


def rouge(response: str, target: str) -> Rouge:
    scores = _rouge_scorer().score(target, response)
    return Rouge(scores["rouge1"].fmeasure, scores["rougeL"].fmeasure)


def rouge_reads(target: str) -> bool:
    """Whether all letters and digits of a target are in ROUGE's tokens, which drop the others of a word and count the rest."""
    lowered = target.lower()
    return lowered.isascii() or all(
        letter.isascii() or not (letter.isalpha() or letter.isdecimal()) for letter in normalize("NFC", lowered)
    )


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rougeL"], use_stemmer=False)


# METEOR


class Meteor(NamedTuple):
    split: float | None
    """evaluate's `meteor`; None where WordNet is missing, or where punkt_tab is and this text needs it."""
    unsplit: float | None
    """The same with every text taken as one sentence; None where WordNet is missing."""


PUNKT_HINT = "python -m nltk.downloader punkt_tab, or a copy in $NLTK_DATA/tokenizers/punkt_tab"
_WORDNET_HINT = "'harness data get wordnet' gets it (or python -m nltk.downloader wordnet)"
_DEBIAN_WORDNET = Path("/usr/share/wordnet")


def meteor(response: str, target: str) -> Meteor:
    """nltk's METEOR: exact, stem and synonym stages, alpha 0.9, beta 3, gamma 0.5."""
    wordnet = _wordnet()
    if isinstance(wordnet, str):
        return Meteor(None, None)
    from nltk.translate.meteor_score import single_meteor_score

    reference, hypothesis = tokenise(target), tokenise(response)
    unsplit = float(single_meteor_score(reference.unsplit, hypothesis.unsplit, wordnet=wordnet))
    if reference.split is None or hypothesis.split is None:
        return Meteor(None, unsplit)
    if (reference.split, hypothesis.split) == (reference.unsplit, hypothesis.unsplit):
        return Meteor(unsplit, unsplit)
    return Meteor(float(single_meteor_score(reference.split, hypothesis.split, wordnet=wordnet)), unsplit)


def wordnet_missing() -> str:
    """Why METEOR cannot be computed and how to get what it lacks; an empty string where WordNet is there."""
    wordnet = _wordnet()
    return wordnet if isinstance(wordnet, str) else ""


class Tokens(NamedTuple):
    split: list[str] | None
    """nltk's `word_tokenize`; None where it needs punkt_tab and has none."""
    unsplit: list[str]
    """nltk's word tokenizer on the whole text (`preserve_line=True`): only the last full stop becomes a token."""


def tokenise(text: str) -> Tokens:
    """The words of a text, with and without a split into sentences.

    punkt only chooses among the sentence ends its pattern offers, so where splitting at all of them and at none give
    the same tokens, no choice matters and punkt_tab is not needed.
    """
    from nltk.tokenize import word_tokenize

    text = text.strip()
    words, sentences = _tokenizers()
    unsplit = words.tokenize(text)
    if unsplit == [word for sentence in sentences.tokenize(text) for word in words.tokenize(sentence)]:
        return Tokens(unsplit, unsplit)
    try:
        return Tokens(word_tokenize(text), unsplit)
    except LookupError:
        return Tokens(None, unsplit)


@cache
def _tokenizers() -> tuple[Any, Any]:
    """nltk's word tokenizer, and one of sentences that splits wherever punkt could."""
    from nltk.tokenize.destructive import NLTKWordTokenizer
    from nltk.tokenize.punkt import PunktSentenceTokenizer

    class EverySentenceEnd(PunktSentenceTokenizer):
        def text_contains_sentbreak(self, text: str) -> bool:
            return True

    return NLTKWordTokenizer(), EverySentenceEnd()


@cache
def _wordnet() -> WordNetCorpusReader | str:
    """WordNet 3.0 from NLTK's data or Debian's package, or why there is none."""
    import nltk
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    class Reader(WordNetCorpusReader):
        """Needs no `lexnames` (Debian ships none; METEOR reads lemmas only) and no other WordNet to map to."""

        def open(self, file: str) -> Any:
            return StringIO("".join(f"{i:02d} - 0\n" for i in range(45))) if file == "lexnames" else super().open(file)

        def map_wn(self, version: str = "wordnet") -> None:
            return None

    if (cache := str(nltk_cache())) not in nltk.data.path:
        nltk.data.path.append(cache)
    roots = []
    for resource in ("corpora/wordnet", "corpora/wordnet.zip/wordnet/"):
        with contextlib.suppress(LookupError, OSError):
            roots.append(nltk.data.find(resource))
    if (_DEBIAN_WORDNET / "data.noun").is_file():
        nltk.data.path.append(str(_DEBIAN_WORDNET))  # newer NLTK opens nothing outside its data path
        roots.append(str(_DEBIAN_WORDNET))
    problems = []
    for root in roots:
        try:
            return Reader(root, object())
        except (OSError, LookupError, ValueError, AssertionError) as error:
            problems.append(f"{root} cannot be read: {type(error).__name__}: {error}".partition("\n")[0])
    return "; ".join(["METEOR needs WordNet", *problems, _WORDNET_HINT])
