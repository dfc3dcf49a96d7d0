"""Copying the input: what a metric gives for nothing, by no forward pass.

A paraphrase shares most of its words with the text it is of, and a rating near the middle is never far off: what a method
scores is worth what it adds to this row. The answer is, of a task whose answers are
- texts: the example's query, which is the text without the task's sentence around it (lamp7: the tweet, lamp4: the
  article), all of it or its first `words` words;
- labels: the most common one among the answers of the user's history, else among those of the train split;
- ratings, which are labels that are numbers, or answers of a history that all are: the median likewise, the lower of two
  in the middle.
Of labels equally common the first of the task's list; where nothing is known, the first label or the middle rating.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import median_low
from typing import ClassVar

from harness.data import Example, Labelled, User
from harness.errors import UsageError
from harness.method import Fitted, Kit, Method
from harness.plan import Plan, Stream


@dataclass(frozen=True)
class Copy(Method):
    """The input as the answer; of labels the most common one, of ratings the median."""

    fits_without_train: ClassVar[bool] = True

    words: int | None = None
    """Only the first so many words of the input; None = all of it."""

    def __post_init__(self) -> None:
        if self.words is not None and self.words < 1:
            raise UsageError(f"words={self.words} leaves nothing to answer with; allowed: words >= 1, or none")

    def fit(self, kit: Kit, train: Sequence[Labelled]) -> Fitted | None:
        """How often each label, or number, is the answer of a train item; None where there are neither."""
        counts = Counter(item.reference for item in train if _labels(item.example))
        if not counts and _are_numbers([item.reference for item in train]):
            counts = Counter(item.reference for item in train)
        return Fitted(meta={"counts": dict(counts)}) if counts else None

    def plan(self, example: Example, shared: Fitted | None, personal: Fitted | None) -> Plan:
        return Plan((Stream(example.prompt()),), answer=self._answer(example, shared))

    def _answer(self, example: Example, shared: Fitted | None) -> str:
        labels = _labels(example)
        in_train: Mapping[str, int] = shared.meta["counts"] if shared else {}
        if not labels:
            numbers = _numbers(example.user) or in_train
            if numbers:
                return _median(numbers, numbers)
            return example.query if self.words is None else " ".join(example.query.split()[: self.words])
        in_history = Counter(pair.reference for pair in example.user.pairs)
        counts = next(
            (c for c in (in_history, in_train) if any(label in c for label in labels)), dict.fromkeys(labels, 1)
        )
        if all(label.strip().isdecimal() for label in labels):
            return _median(labels, counts)
        return max(labels, key=lambda label: counts.get(label, 0))


def _labels(example: Example) -> Sequence[str]:
    return example.choices or example.labels


def _are_numbers(answers: Sequence[str]) -> bool:
    """Whether there are any and all are numbers."""
    try:
        return bool(answers) and all(math.isfinite(float(answer)) for answer in answers)
    except ValueError:
        return False


def _numbers(user: User) -> Mapping[str, int]:
    """How often each answer of the history is given, where all are numbers; empty elsewhere."""
    with suppress(UsageError):  # the pairs of a shuffled history are not to be read, and an input needs none
        if user.pairs and _are_numbers([user.pairs[0].reference]):  # of texts the first is read alone
            answers = [pair.reference for pair in user.pairs]
            return Counter(answers) if _are_numbers(answers) else {}
    return {}


def _median(labels: Iterable[str], counts: Mapping[str, int]) -> str:
    ratings = {float(label): label for label in labels}
    return ratings[median_low(number for number, label in ratings.items() for _ in range(counts.get(label, 0)))]
