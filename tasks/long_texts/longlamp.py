"""LongLaMP: abstracts, posts and product reviews, written for a user whose earlier ones are given.

Paper: Kumar et al., LongLaMP: A Benchmark for Personalized Long-form Text Generation, 2407.11016. Files: the hub data set
LongLaMP/LongLaMP, one part a task and setting (`topic_writing_user`, `product_review_temporal`, ...), rows being
    {"author": "...", "input": "Generate the content for a reddit post ...", "output": "...",
     "profile": [{"summary": "...", "content": "..."}]}
with `name` and {title, abstract} for abstracts, `reviewerId` and {overall, summary, description, reviewText} for reviews. The
user setting has other users in each split, the temporal one later texts of the same users; its splits here: `dev` = its val.
Code read: prompts and queries of LongLaMP-benchmark's code as JIJI5647/longLaMP@9dafd2f has them (prompts/prompt.py): of an
abstract's input what stands behind `items:` is the query, 750 words of an abstract are shown, retrieved items are joined by
`, and `. The item's own text is indexed too, unlike LaMP's rule. Metrics as in `lamp4`: ROUGE-1, ROUGE-L, METEOR.
Differs: items are dropped whole where they do not fit (there: cut by tokens). Their fourth task, emails, is licensed and not
read. A history's pair, for methods that train, has the task's own wording, of abstracts without the list of items.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeAlias, overload

from harness.data import Example, HistoryItem, Labelled, Message, User
from harness.errors import DataMissing, UsageError, did_you_mean
from harness.statistics import metrics
from harness.statistics.intervals import UNIT
from harness.task import GenerationDefaults, Metric, Sample, Selection, Task
from harness.tasks.rows import Source, from_the_hub, text

HUB = "LongLaMP/LongLaMP"
GET = from_the_hub(
    HUB,
    f"huggingface.co/datasets/{HUB} names the licence (the texts are Amazon reviews, Reddit posts and paper abstracts)",
)
SPLITS: Mapping[str, str] = {"train": "train", "dev": "val", "test": "test"}
SHOWN_WORDS = 750
"""Of an abstract in the history."""

Kind: TypeAlias = Literal["abstract", "topic", "review"]


@dataclass(frozen=True)
class _Shape:
    part: str
    user: str
    """Field that says who."""
    fields: tuple[tuple[str, ...], ...]
    """Of an item of the profile; the first of equals that is there."""
    output: str
    """Which of them is what the user wrote."""
    link: str
    """Between the history and the input."""


SHAPES: Mapping[Kind, _Shape] = {
    "abstract": _Shape(
        "abstract_generation",
        "name",
        (("title",), ("abstract",)),
        "abstract",
        ". Use the above abstracts as context to understand the style and language of the user and, ",
    ),
    "topic": _Shape(
        "topic_writing",
        "author",
        (("summary", "input"), ("content", "output")),
        "content",
        ". Following the given patterns, ",
    ),
    "review": _Shape(
        "product_review",
        "reviewerId",
        (("overall",), ("summary",), ("description",), ("reviewText",)),
        "reviewText",
        ". Following the given patterns ",
    ),
}


@dataclass(frozen=True)
class LongLampTemplate:
    """The official prompt, with a summary of the user before it where there is one."""

    kind: Kind

    def __call__(self, text: str, items: Sequence[HistoryItem], summary: str) -> tuple[Message, ...]:
        shown = ", and ".join(_shown(self.kind, item.fields) for item in items)
        prompt = f"{shown}{SHAPES[self.kind].link}{text}" if items else text
        return (Message("user", f"{summary}\n{prompt}" if summary else prompt),)


def _shown(kind: Kind, item: Mapping[str, str]) -> str:
    if kind == "abstract":
        abstract = " ".join(item["abstract"].split()[:SHOWN_WORDS])
        return f'"{abstract}" is the abstract for the title "{item["title"]}"'
    if kind == "topic":
        return f'"{item["summary"]}" is a summary for "{item["content"]}" '
    return (
        f'"{item["overall"]}" is a rating for the product with description "{item["description"]}". "{item["summary"]}" is '
        f'summary for "{item["reviewText"]}" '
    )


def _asked(kind: Kind, item: Mapping[str, str]) -> str:
    """The input whose answer is this item of a history."""
    if kind == "abstract":
        return f'Generate an abstract for the title "{item["title"]}"'
    if kind == "topic":
        return f"Generate the content for a reddit post {item['summary']}"
    return (
        f'Generate the review text written by a reviewer who has a given an overall rating of "{item["overall"]}" for a product '
        f'with description "{item["description"]}". The summary of the review text is "{item["summary"]}".'
    )


def _query(kind: Kind, text: str) -> str:
    return text.partition("items:")[2].strip() or text if kind == "abstract" else text


class LongLamp(Task):
    """Long texts in a user's manner: longlamp:abstract, longlamp:topic, longlamp:review (LongLaMP's abstracts, posts, reviews)."""

    name = "longlamp"
    how_to_get = GET
    ranges = dict.fromkeys(("rouge1", "rougeL", "meteor", "meteor_unsplit"), UNIT)
    kind: ClassVar[Kind]

    def __init__(self, data: str | None = None, setting: Literal["user", "temporal"] = "user") -> None:
        """`data`, or $HARNESS_LONGLAMP: a folder of LongLaMP's files; else they come from the hub, or its cache here."""
        if not hasattr(self, "kind"):
            raise UsageError(f"longlamp: say which task, as in longlamp:topic; there are {', '.join(SHAPES)}")
        self.setting = setting
        self.source = Source(HUB, data or os.environ.get("HARNESS_LONGLAMP"), GET)

    @classmethod
    def member(cls, name: str) -> type[Task]:
        if name not in SHAPES:
            raise UsageError(f"longlamp has no task {name!r}{did_you_mean(name, SHAPES)} it has {', '.join(SHAPES)}")
        return type(f"LongLamp[{name}]", (cls,), {"kind": name, "__doc__": cls.__doc__})

    def items(self, selection: Selection) -> Sequence[Labelled]:
        return selection.of(self._labelled(self._split(selection.split)))

    def fingerprint(self, selection: Selection) -> str:
        return self.source.sha256(self.part, self._split(selection.split))

    def generation(self) -> GenerationDefaults:
        return GenerationDefaults(max_new_tokens=512)

    def describe_data(self) -> str:
        where = f"in {self.source.folder}" if self.source.folder else f"from the hub ({HUB})"
        return f"longlamp:{self.kind}: LongLaMP's {self.part} {where}"

    def grade(self, sample: Sample) -> Sample:
        if sample.response is None or sample.error is not None or not sample.targets:
            return sample
        answer, gold = sample.response.strip(), sample.targets[0]
        meteor = metrics.meteor(answer, gold)
        scores = {**metrics.rouge(answer, gold)._asdict(), "meteor": meteor.split, "meteor_unsplit": meteor.unsplit}
        return replace(sample, parsed=answer or None, metrics=scores)

    def aggregate(self, samples: Sequence[Sample]) -> Mapping[str, Metric]:
        graded = [sample for sample in samples if sample.metrics]
        unsplit = sum(s.metrics["meteor"] is None and s.metrics["meteor_unsplit"] is not None for s in graded)
        note = f"{unsplit} answers or golds need NLTK's punkt_tab: {metrics.PUNKT_HINT}" if unsplit else ""
        return {
            "rouge1": metrics.mean(graded, "rouge1", bounds=UNIT),
            "rougeL": metrics.mean(graded, "rougeL", bounds=UNIT),
            "meteor": metrics.mean(graded, "meteor", note=note, bounds=UNIT),
            "meteor_unsplit": metrics.mean(graded, "meteor_unsplit", bounds=UNIT),
        }

    @cached_property
    def part(self) -> str:
        return f"{SHAPES[self.kind].part}_{self.setting}"

    def _split(self, split: str) -> str:
        if split not in SPLITS:
            raise UsageError(f"longlamp has no split {split!r}{did_you_mean(split, SPLITS)} it has {', '.join(SPLITS)}")
        return SPLITS[split]

    def _labelled(self, split: str) -> Iterator[Labelled]:
        shape, template = SHAPES[self.kind], LongLampTemplate(self.kind)
        for number, row in enumerate(self.source.rows(self.part, split), start=1):
            at: dict[str, Any] = {"where": f"{self.part}, {split}", "row_number": number}
            user, question, answer = (text(row, name, **at) for name in (shape.user, "input", "output"))
            profile = row.get("profile")
            if not isinstance(profile, list) or not all(isinstance(item, Mapping) for item in profile):
                raise DataMissing(f"{at['where']}, row {number}: field profile should be a list of objects")
            history = tuple(self._record(str(n), item, at) for n, item in enumerate(profile))
            owner = User(user, history, _Pairs(self.kind, user, history))
            example = Example(f"{split}/{number}", owner, question, _query(self.kind, question), template)
            yield Labelled(example, (answer,))

    def _record(self, name: str, item: Mapping[str, Any], at: Mapping[str, Any]) -> HistoryItem:
        fields = {names[0]: text(item, *names, empty=True, **at) for names in SHAPES[self.kind].fields}
        return HistoryItem(name, fields, " ".join(fields.values()))


@dataclass(frozen=True)
class _Pairs(Sequence[Labelled]):
    """A history as examples: each item is an answer, the items before it are its user's history. Made when asked for."""

    kind: Kind
    user: str
    history: tuple[HistoryItem, ...]

    def __len__(self) -> int:
        return len(self.history)

    @overload
    def __getitem__(self, index: int) -> Labelled: ...
    @overload
    def __getitem__(self, index: slice) -> list[Labelled]: ...
    def __getitem__(self, index: int | slice) -> Labelled | list[Labelled]:
        places = range(len(self))[index]
        return [self._pair(i) for i in places] if isinstance(places, range) else self._pair(places)

    def _pair(self, i: int) -> Labelled:
        item = self.history[i]
        asked, owner = _asked(self.kind, item.fields), User(self.user, self.history[:i])
        query = _query(self.kind, asked)
        example = Example(f"{self.user}/{item.id}", owner, asked, query, LongLampTemplate(self.kind))
        return Labelled(example, (item.fields[SHAPES[self.kind].output],))
