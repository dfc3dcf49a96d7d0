"""LaMP-QA: long answers to questions, and whether they cover what this user said they wanted to know.

Paper: Salemi and Zamani, LaMP-QA: A Benchmark for Personalized Long-form Question Answering, 2506.00137. Files: the hub data
set alireza7/LaMP-QA, one part a category, rows being
    {"id": "...", "question": "...", "narrative": "what the asker wrote below it", "profile": [{"id", "text", "category"}],
     "rubric_aspects": [{"aspect": "...", "reason": "...", "evidence": "..."}]}
The model reads the question, and earlier posts of the asker where they are retrieved; the narrative and the aspects taken from it
are the judge's. Each aspect is a question of its own to the judge, who gives 0, 1 or 2, divided by 2; the mean over aspects is an
answer's score. Splits here: `dev` = its validation.
Code read: what README and evaluate_responses.py of LaMP-Benchmark/LaMP-QA hand over (as oz03-hub/Asym-LaMP-QA@8874970 has them);
its evaluator's prompt is a picture in the paper and was not read. Differs: the judge's prompt and the model's are ours (there:
the answer is a JSON object), ratings are 0, 50 and 100 so that a judge's expectation over numbers holds; theirs was Qwen2.5-32B.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, Literal

from harness.data import Example, HistoryItem, Labelled, Message, User
from harness.errors import DataMissing, UsageError, did_you_mean
from harness.statistics import metrics
from harness.statistics.intervals import UNIT
from harness.task import GenerationDefaults, Metric, Question, Sample, Selection, System, Task
from harness.tasks.rows import Source, from_the_hub, text

HUB = "alireza7/LaMP-QA"
GET = from_the_hub(
    HUB, f"huggingface.co/datasets/{HUB} names the licence (the texts are StackExchange's, which are CC BY-SA)"
)
CATEGORIES = ("Art_and_Entertainment", "Lifestyle_and_Personal_Development", "Society_and_Culture")
SPLITS: Mapping[str, str] = {"train": "train", "dev": "validation", "test": "test"}
NO_JUDGE = "no judge was asked; give --judge, also to 'harness score'"
PROMPT = """You will read a question, what the person who asked it wrote about it, an answer, and one aspect that this person \
wants an answer to cover. Rate how far the answer covers that aspect, not whether it is right otherwise.

QUESTION
{question}

WHAT THE ASKER WROTE
{narrative}

ANSWER
{answer}

ASPECT
{aspect}
Why it matters to the asker: {reason}
Where they say so: {evidence}

0: the answer does not cover the aspect. 50: it touches on it, or covers a part. 100: it covers it as this person wants.

Write 0, 50 or 100 and nothing else, or REFUSAL."""


@dataclass(frozen=True)
class QuestionTemplate:
    """The question, after earlier posts of the asker where there are any."""

    def __call__(self, text: str, items: Sequence[HistoryItem], summary: str) -> tuple[Message, ...]:
        about = f"About the person who asks: {summary}\n\n" if summary else ""
        if items:
            posts = "\n\n".join(item.fields["text"] for item in items)
            about += f"Earlier posts of the person who asks, which show what they care about:\n{posts}\n\n"
        return (
            Message("user", f"{about}Answer this person's question in the way that suits them best.\nQuestion: {text}"),
        )


TEMPLATE = QuestionTemplate()


class LampQA(Task):
    """Long answers to questions, rated by what the asker wanted covered (LaMP-QA, needs a judge)."""

    name = "lamp_qa"
    judged = True
    how_to_get = GET
    ranges = {"aspects": UNIT}

    def __init__(
        self,
        data: str | None = None,
        category: Literal[
            "all", "Art_and_Entertainment", "Lifestyle_and_Personal_Development", "Society_and_Culture"
        ] = "all",
    ) -> None:
        """`data`, or $HARNESS_LAMP_QA: a folder of LaMP-QA's files; else they come from the hub, or its cache here."""
        self.categories: tuple[str, ...] = CATEGORIES if category == "all" else (category,)
        self.source = Source(HUB, data or os.environ.get("HARNESS_LAMP_QA"), GET)

    def items(self, selection: Selection) -> Sequence[Labelled]:
        return selection.of(self._rows(selection.split))

    def fingerprint(self, selection: Selection) -> str:
        split = self._split(selection.split)
        return sha256("".join(self.source.sha256(part, split) for part in self.categories).encode()).hexdigest()

    def generation(self) -> GenerationDefaults:
        return GenerationDefaults(max_new_tokens=1024)

    def describe_data(self) -> str:
        where = f"in {self.source.folder}" if self.source.folder else f"from the hub ({HUB})"
        return f"lamp_qa: {', '.join(self.categories)} {where}"

    def respond(self, system: System, items: Sequence[Labelled]) -> Iterator[Sample]:
        kept = {item.example.id: item for item in items}
        for sample in system.respond([item.example for item in items]):
            item = kept[sample.id]
            first = json.loads(item.targets[0])
            about = {"question": item.example.text, "narrative": first["narrative"], "category": first["category"]}
            yield replace(sample, targets=item.targets, extra={**sample.extra, **about})

    def to_judge(self, sample: Sample) -> Mapping[str, Question]:
        answer, asked = sample.response or "", {}
        for number, target in enumerate(sample.targets, start=1):
            words = {
                **json.loads(target),
                "answer": answer,
                **{k: str(sample.extra[k]) for k in ("question", "narrative")},
            }
            asked[f"aspect {number}"] = Question(_filled(PROMPT, words), answer)
        return asked

    def grade(self, sample: Sample) -> Sample:
        if sample.response is None or sample.error is not None:
            return sample
        scores = [_score(sample, f"aspect {number}") for number in range(1, len(sample.targets) + 1)]
        known = [score for score in scores if score is not None]
        mean = sum(known) / len(known) / 100 if known and len(known) == len(scores) else None
        return replace(sample, parsed=sample.response.strip() or None, metrics={"aspects": mean})

    def aggregate(self, samples: Sequence[Sample]) -> Mapping[str, Metric]:
        graded = [sample for sample in samples if sample.metrics]
        found = {"aspects": _mean(graded)}
        present = sorted({str(sample.extra.get("category", "")) for sample in graded})
        if len(present) > 1:
            for category in present:
                found[f"aspects/{category}"] = _mean([s for s in graded if s.extra.get("category") == category])
        return found

    def _split(self, split: str) -> str:
        if split not in SPLITS:
            raise UsageError(f"lamp_qa has no split {split!r}{did_you_mean(split, SPLITS)} it has {', '.join(SPLITS)}")
        return SPLITS[split]

    def _rows(self, split: str) -> Iterator[Labelled]:
        for part in self.categories:
            for number, row in enumerate(self.source.rows(part, self._split(split)), start=1):
                at: dict[str, Any] = {"where": f"{part}, {self._split(split)}", "row_number": number}
                name, question = text(row, "id", **at), text(row, "question", **at)
                narrative = text(row, "narrative", "details", empty=True, **at)
                history = tuple(
                    HistoryItem(str(n), {"text": found}, found)
                    for n, item in enumerate(_objects(row, ("profile",), at))
                    for found in [text(item, "text", empty=True, **at)]
                )
                aspects = [
                    {k: text(aspect, k, empty=True, **at) for k in ("aspect", "reason", "evidence")}
                    for aspect in _objects(row, ("rubric_aspects", "aspects"), at)
                ]
                if not aspects:
                    raise DataMissing(
                        f"{at['where']}, row {number}: no rubric_aspects, so there is nothing to judge by"
                    )
                # what the judge reads is gold: the asker's own words stand with the first aspect, and never in a prompt
                first = {"narrative": narrative, "category": part}
                golds = [json.dumps({**aspect, **(first if n == 0 else {})}) for n, aspect in enumerate(aspects)]
                example = Example(name, User(name, history), question, question, TEMPLATE)
                yield Labelled(example, tuple(golds))


def _objects(row: Mapping[str, Any], names: Sequence[str], at: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = next((row[name] for name in names if row.get(name) is not None), None)
    if not isinstance(found, list) or not all(isinstance(item, Mapping) for item in found):
        raise DataMissing(
            f"{at['where']}, row {at['row_number']}: field {' or '.join(names)} should be a list of objects"
        )
    return found


def _score(sample: Sample, name: str) -> float | None:
    return sample.ratings[name].score if name in sample.ratings else None


def _mean(graded: Sequence[Sample]) -> Metric:
    rated = [sample for sample in graded if sample.metrics["aspects"] is not None]
    left = len(graded) - len(rated)
    if left and not rated:
        return Metric(None, 0, note=NO_JUDGE)
    note = f"{left} of {len(graded)} lack a rating and are left out" if left else ""
    return metrics.mean(rated, "aspects", note=note, bounds=UNIT)


def _filled(prompt: str, words: Mapping[str, str]) -> str:
    """The words in their places; braces of theirs are no places."""
    return re.sub(r"\{(\w+)\}", lambda found: words.get(found[1], found[0]), prompt)
