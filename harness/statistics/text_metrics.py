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
    reads: Callable[[str], bool] = lambda gold: True
    """Whether it can measure against a gold: whether it reads all of its letters."""
    unread: str = ""
    """Which letters it does not read."""


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


def _rouge(of: Callable[[metrics.Rouge], float], says: str) -> TextMetric:
    return TextMetric(
        lambda answer, golds: max(of(metrics.rouge(answer, gold)) for gold in golds),
        says,
        reads=metrics.rouge_reads,
        unread="letters beyond a to z, which ROUGE does not read",
    )


TEXT: Mapping[str, TextMetric] = {
    "rouge1": _rouge(lambda scores: scores.rouge1, "ROUGE-1, F of words of a to z and 0 to 9"),
    "rougeL": _rouge(lambda scores: scores.rougeL, "ROUGE-L, F of the longest common sequence of such words"),
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


def unread(name: str, golds: Sequence[str]) -> str:
    """How many of these golds the metric cannot measure; empty where it reads them all."""
    metric = text_metric(name)
    count = sum(not metric.reads(gold) for gold in golds)
    return f"{count} of {len(golds)} targets have {metric.unread}; chrf reads any script" if count else ""


def all_metrics() -> dict[str, str]:
    """Name -> one line, those among them that installed packages add."""
    mine = {name: metric.says for name, metric in TEXT.items()}
    return {**mine, **dict.fromkeys(added(GROUP), f"added by an installed package ({GROUP})")}
