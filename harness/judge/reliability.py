"""`harness judge reliability`: how far a judge agrees with itself, with another judge, and with people.

    of a run            test-retest: the same questions asked again without what was kept of them; against another judge
    of a comparison     position bias: how often both orders name one winner, how often the answer shown first wins
    of two comparisons  of the same two runs: agreement of their winners, judge with judge or judge with people's votes

Krippendorff's alpha (the `krippendorff` package) is 1 for the same answers, 0 for what chance gives: of ratings by their
distance, of winners by name. Intervals are 95 % over users.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from harness.errors import UsageError
from harness.judge.annotations import majority
from harness.judge.grading import questions
from harness.judge.judges import Judge, question_key
from harness.judge.pairwise import mean, settled
from harness.judge.pairwise_record import Pair, PairRecord, read, read_pairs
from harness.method import Progress
from harness.records.schema import MetricValue, RunRecord
from harness.task import Question, Sample, Task


@dataclass(frozen=True)
class Finding:
    """One line of the answer."""

    what: str
    of: str
    """Whose: a judge, two judges, a judge and people."""
    value: MetricValue


def alpha(raters: Sequence[Sequence[float | None]], level: Literal["interval", "nominal"]) -> float | None:
    """Krippendorff's alpha of ratings [rater][item], of which some may be missing.

    None where no item has two ratings, or all are the same, which leaves nothing to expect.
    """
    import krippendorff

    data = np.array([[math.nan if value is None else value for value in one] for one in raters], dtype=float)
    data = data[:, (~np.isnan(data)).sum(axis=0) > 1]
    if not data.size or len(np.unique(data[~np.isnan(data)])) < 2:
        return None
    return float(krippendorff.alpha(reliability_data=data, level_of_measurement=level))


def of_run(
    task: Task,
    record: RunRecord,
    samples: Sequence[Sample],
    judge: Judge,
    *,
    count: int,
    progress: Progress,
) -> list[Finding]:
    """A judge asked afresh about `count` answers, against the ratings that the run has; where it has none, asked twice.

    `judge` keeps no replies. Raises UsageError where the task asks no judge.
    """
    if not task.judged:
        raise UsageError(f"{record.config.task.name} asks no judge; give a comparison: harness judge pairs RUN_A RUN_B")
    asked = [(s, name, q) for s in samples for name, q in questions(task, s).items()][:count]
    if not asked:
        raise UsageError("the run has no answer to ask about")
    kept = [_kept(sample, name, question) for sample, name, question in asked]
    own = record.config.judge
    name = judge.config.name
    whose = f"{own.name} and {name}" if own is not None and own.name != name else f"{name}, twice"
    if own is None or all(value is None for value in kept):
        kept, whose = _rate(judge, asked, progress), f"{name}, twice"
    again = _rate(judge, asked, progress)
    return _of_ratings(whose, [sample.user for sample, _, _ in asked], kept, again)


def _rate(judge: Judge, asked: Sequence[tuple[Sample, str, Question]], progress: Progress) -> list[float | None]:
    return [rating.score for rating in judge.rate([question for _, _, question in asked], "", progress)]


def _kept(sample: Sample, name: str, question: Question) -> float | None:
    rating = sample.ratings.get(name)
    return rating.score if rating is not None and rating.key == question_key(question) else None


def _of_ratings(
    whose: str, users: Sequence[str], one: Sequence[float | None], other: Sequence[float | None]
) -> list[Finding]:
    both = [(a, b, user) for a, b, user in zip(one, other, users, strict=True) if a is not None and b is not None]
    of = [user for _, _, user in both]
    away = mean([abs(a - b) for a, b, _ in both], of, (0, 100))
    same = mean([float(a == b) for a, b, _ in both], of)
    return [
        Finding("alpha of ratings", whose, MetricValue(value=alpha([one, other], "interval"), n=len(both))),
        Finding("points between two ratings, of 100", whose, away),
        Finding("the same rating", whose, same),
    ]


def of_comparisons(folders: Sequence[Path]) -> list[Finding]:
    """Position bias of each judge, and how far every two agree on the winners of the pairs that both saw.

    Raises UsageError where the comparisons are of other runs.
    """
    read_ones = [(read(folder), read_pairs(folder)) for folder in folders]
    runs = [frozenset(run.hash8() for run in record.config.runs) for record, _ in read_ones]
    if len(set(runs)) > 1:
        raise UsageError("the comparisons are of different runs; what two judges say of different answers cannot agree")
    found = []
    for record, _ in read_ones:
        both = record.metrics.get("both", {})
        for name, what in (
            ("orders_agree", "position bias: both orders name one winner"),
            ("first_wins", "position bias: the answer shown first wins (.5 = none)"),
            ("better_agreement", "people who say the same"),
            ("better_alpha", "alpha of people's votes"),
        ):
            if name in both:
                found.append(Finding(what, _who(record), both[name]))
    for i, (one, pairs) in enumerate(read_ones):
        for other, more in read_ones[i + 1 :]:
            found += _of_winners(one, pairs, other, more)
    return found


def _of_winners(one: PairRecord, pairs: Sequence[Pair], other: PairRecord, more: Sequence[Pair]) -> list[Finding]:
    first = _winners(one, pairs)
    second = _winners(other, more)
    ids = [pair.id for pair in pairs if pair.id in first and pair.id in second]
    user = {pair.id: pair.user for pair in pairs}
    whose = f"{_who(one)} and {_who(other)}"
    # by the run that wins, whichever stood as `a` in a comparison
    code = {name: n for n, name in enumerate(sorted({*first.values(), *second.values()}))}
    values = [[float(code[winner[i]]) for i in ids] for winner in (first, second)]
    same = mean([float(first[i] == second[i]) for i in ids], [user[i] for i in ids])
    known = alpha(values, "nominal") if ids else None
    return [
        Finding("the same winner", whose, same),
        Finding("alpha of winners", whose, MetricValue(value=known, n=len(ids))),
    ]


def _winners(record: PairRecord, pairs: Sequence[Pair]) -> Mapping[str, str]:
    """By item, the run that wins, or `tie`."""
    a, b = (run.hash8() for run in record.config.runs)
    runs = {"a": a, "b": b, "tie": "tie"}
    found = {}
    for pair in pairs:
        votes = [vote.winner for vote in pair.votes.values() if vote.winner is not None]
        opinion = settled(pair)
        winner = majority(votes) if votes else opinion.winner if opinion else None
        if winner is not None:
            found[pair.id] = runs[winner]
    return found


def _who(record: PairRecord) -> str:
    if record.config.judge is not None:
        return record.config.judge.name
    return f"{len(record.annotators)} people"
