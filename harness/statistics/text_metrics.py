"""What a text is measured by against gold texts, by name: ROUGE, METEOR, chrF, BLEU, exact match, and what packages add.

Each is of one answer, and of several golds the one that fits best; BLEU, as it is defined, knows the n-grams of them all. chrF
and BLEU are sacrebleu's sentence scores divided by 100: a mean of BLEU over sentences is not a corpus BLEU, and cannot be
compared with one.

One of your own is a function of an answer and its golds that returns a number, and an entry point in the group
`harness.metrics`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from harness.errors import UsageError, did_you_mean
from harness.plugins.entry_points import added, load_added
from harness.statistics import metrics
from harness.statistics.intervals import UNIT, Bounds

GROUP = "harness.metrics"


@dataclass(frozen=True)
class TextMetric:
    of: Callable[[str, Sequence[str]], float | None]
    """An answer and its golds -> a number; None where it cannot be computed."""
    says: str
    """For `harness list metrics`."""
    bounds: Bounds | None = UNIT
    missing: Callable[[], str] = str
    """Why there is no number."""


def _exact(answer: str, golds: Sequence[str]) -> float:
    return float(" ".join(answer.split()) in [" ".join(gold.split()) for gold in golds])


def _meteor(answer: str, golds: Sequence[str]) -> float | None:
    found = [metrics.meteor(answer, gold).split for gold in golds]
    known = [value for value in found if value is not None]
    return max(known) if len(known) == len(found) else None


def _chrf(answer: str, golds: Sequence[str]) -> float:
    import sacrebleu

    return min(1.0, sacrebleu.sentence_chrf(answer, list(golds)).score / 100)


def _bleu(answer: str, golds: Sequence[str]) -> float:
    import sacrebleu

    return min(1.0, sacrebleu.sentence_bleu(answer, list(golds)).score / 100)


def _no_meteor() -> str:
    return metrics.wordnet_missing() or f"an answer or a gold needs NLTK's punkt_tab: {metrics.PUNKT_HINT}"


TEXT: Mapping[str, TextMetric] = {
    "rouge1": TextMetric(
        lambda answer, golds: max(metrics.rouge(answer, gold).rouge1 for gold in golds), "ROUGE-1, F of words"
    ),
    "rougeL": TextMetric(
        lambda answer, golds: max(metrics.rouge(answer, gold).rougeL for gold in golds),
        "ROUGE-L, F of the longest common sequence of words",
    ),
    "meteor": TextMetric(_meteor, "METEOR, which also knows stems and synonyms (needs WordNet)", missing=_no_meteor),
    "chrf": TextMetric(_chrf, "chrF of sacrebleu, F of characters, for any script"),
    "bleu": TextMetric(_bleu, "BLEU of sacrebleu, a sentence at a time"),
    "exact": TextMetric(_exact, "whether the answer is the gold, white space aside"),
}


def text_metric(name: str) -> TextMetric:
    """The metric called `name`. Raises UsageError where there is none."""
    if name in TEXT:
        return TEXT[name]
    if name in added(GROUP):
        return TextMetric(load_added(GROUP, name), all_metrics()[name], None)
    known = all_metrics()
    raise UsageError(f"unknown metric {name!r}{did_you_mean(name, known)} Choose from: {', '.join(known)}")


def all_metrics() -> dict[str, str]:
    """Name -> one line, those among them that installed packages add."""
    mine = {name: metric.says for name, metric in TEXT.items()}
    return {**mine, **dict.fromkeys(added(GROUP), f"added by an installed package ({GROUP})")}
