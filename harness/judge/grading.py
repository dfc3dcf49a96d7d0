"""Judging and grading what a run has answered: needs its samples and no model of its own.

Responses are on disk before a judge hears of them. A judge's replies are kept one by one as they arrive, and the samples
get their ratings at the end; so whatever stops in between, nothing is lost and nothing is paid for again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from harness.errors import HarnessError
from harness.judge.judges import Judge, question_key
from harness.method import Progress
from harness.plugins.returned import analysis_of, graded, metrics_of, questions_of
from harness.records.schema import Judging, MetricValue, RunRecord, json_value
from harness.records.store import RunFolder
from harness.task import Question, Rating, Sample, Task


def judge_samples(task: Task, folder: RunFolder, record: RunRecord, judge: Judge | None, progress: Progress) -> None:
    """Have the folder's samples rated where they are not, and graded again; fills in `record.judging`.

    Without a judge the ratings that are there stay. A rating that failed is asked for again, any other is final.
    """
    if not task.judged:
        return
    samples = {sample.id: sample for sample in folder.samples()}
    if judge is not None:
        asked = [
            (sample.id, name, question)
            for sample in samples.values()
            for name, question in questions(task, sample).items()
        ]
        before = record.judging or Judging()
        waiting = [(i, name, question) for i, name, question in asked if not _final(samples[i], name, question)]
        if waiting and before.mode and judge.mode() not in (before.mode, ""):
            waiting = asked  # the server's numbers mean something else now, and two kinds make no mean
        start = time.perf_counter()
        ratings = judge.rate([question for _, _, question in waiting], record.hash, progress)
        seconds = before.seconds + (time.perf_counter() - start if waiting else 0.0)
        for (i, name, question), rating in zip(waiting, ratings, strict=True):
            rating = with_costs(replace(rating, key=question_key(question)), samples[i].ratings.get(name))
            samples[i] = replace(samples[i], ratings={**samples[i].ratings, name: rating})
        rated = [samples[i].ratings[name] for i, name, _ in asked]
        mode = judge.mode() if waiting else before.mode
        record.judging = ledger(rated, judge).model_copy(update={"mode": mode, "seconds": seconds})
    folder.keep([graded(task, sample) for sample in samples.values()])


def check_targets(samples: Sequence[Sample], file: Path) -> None:
    """Raises HarnessError where a sample has no gold answer though others have: every metric would leave it out in silence.

    Where none has (LaMP keeps those of its test split) there are no metrics, and that is seen.
    """
    without = [(number, sample) for number, sample in enumerate(samples, start=1) if not sample.targets]
    if without and len(without) < len(samples):
        number, sample = without[0]
        raise HarnessError(
            f"{file}, line {number} (id {sample.id!r}): field 'targets' is empty, while {len(samples) - len(without)} other "
            "samples have a gold answer; it would be left out of every metric. Put its gold answer back, or run it again"
        )


def questions(task: Task, sample: Sample) -> dict[str, Question]:
    """What a judge is asked about the sample; nothing about one that failed."""
    answered = sample.error is None and sample.response is not None
    return questions_of(task, sample) if answered else {}


def _final(sample: Sample, name: str, question: Question) -> bool:
    rating = sample.ratings.get(name)
    return rating is not None and rating.final and rating.outcome != "failed" and rating.key == question_key(question)


def with_costs(rating: Rating, before: Rating | None) -> Rating:
    """With what was paid for an answer that was not whole, where the question was asked again."""
    if before is None or before.final or before.cached or before.key != rating.key:
        return rating
    return replace(
        rating,
        input_tokens=(0 if rating.cached else rating.input_tokens) + before.input_tokens,
        output_tokens=(0 if rating.cached else rating.output_tokens) + before.output_tokens,
        cached=False,
    )


def ledger(ratings: Sequence[Rating], judge: Judge) -> Judging:
    """Outcomes of all ratings, and what those that this run paid for took."""
    paid = {rating.key: rating for rating in ratings if not rating.cached}.values()
    tokens = [sum(rating.input_tokens for rating in paid), sum(rating.output_tokens for rating in paid)]
    outcomes = [rating.outcome for rating in ratings]
    answered = [rating for rating in ratings if rating.outcome != "failed"]
    sent = {json.dumps(rating.sent, sort_keys=True): dict(rating.sent) for rating in answered if rating.sent}
    drawn = any(fields.get("temperature") != 0 for fields in sent.values())
    known = bool(answered) and all(rating.sent for rating in answered)
    return Judging(
        greedy=False if drawn else True if known else None,
        models=sorted({rating.model for rating in ratings} - {""}),
        ratings=len(ratings),
        cached=sum(rating.cached for rating in ratings),
        refused=outcomes.count("refused"),
        unparsable=outcomes.count("unparsable"),
        failed=outcomes.count("failed"),
        not_final=sum(not rating.final or rating.outcome == "failed" for rating in ratings),
        retries=sum(rating.retries for rating in paid),
        input_tokens=tokens[0],
        output_tokens=tokens[1],
        usd=judge.usd(*tokens),
        sent=[sent[key] for key in sorted(sent)],
    )


def settle(task: Task, samples: Sequence[Sample], record: RunRecord) -> None:
    """Metrics of graded samples, what is missing from them, and whether that leaves the record complete."""
    record.metrics = {name: MetricValue(**asdict(metric)) for name, metric in metrics_of(task, samples).items()}
    record.analysis = {**record.analysis, **json_value(analysis_of(task, task.analysis(samples)))}
    answered = [sample for sample in samples if not sample.error]
    health = record.health
    health.errors = len(samples) - len(answered)
    health.unparsed = sum(sample.parsed is None for sample in answered)
    if task.judged:
        outcomes = [[_outcome(sample, name) for name in questions(task, sample)] for sample in answered]
        health.unjudged = _having(("", "failed"), outcomes)
        health.unrated = _having(("refused", "unparsable"), outcomes)
        open_ = [any(not _settled(sample, name) for name in questions(task, sample)) for sample in answered]
        health.unsettled = sum(open_) if record.config.judge is not None else None
    waits = health.unsettled if task.judged else 0
    record.status = "partial" if health.errors or waits else "complete"


def _outcome(sample: Sample, name: str) -> str:
    return sample.ratings[name].outcome if name in sample.ratings else ""


def _settled(sample: Sample, name: str) -> bool:
    rating = sample.ratings.get(name)
    return rating is not None and rating.final and rating.outcome != "failed"


def _having(wanted: Iterable[str], outcomes: Iterable[Sequence[str]]) -> int:
    """Samples with any of these outcomes."""
    return sum(not set(wanted).isdisjoint(found) for found in outcomes)
