"""LaMP: eight tasks of answering for a user whose history is given.

Paper: Salemi et al., LaMP: When Large Language Models Meet Personalization, ACL 2024. Code read:
LaMP-Benchmark/LaMP@38c9d4d. Files: https://lamp-benchmark.github.io/download, or `harness data get lamp4`:
    [{"id": "310", "input": "Generate a headline for the following article: ...", "profile": [{"id", "text", "title"}]}]
    {"task": "LaMP_4", "golds": [{"id": "310", "output": "Social Media Gone Awry: Tips for Teens to Stay Safe"}]}
The time split adds `user_id` to a question and `date` to a profile item. `lamp2m` (movie tags) and `lamp2n` (news
categories) are both called LaMP_2; the wording of the input tells which it is. OPPU's files are read too, see `oppu_data`.
Differs from the official evaluation: a lenient parse stands beside the official one; see also `harness.statistics.metrics`.
"""

from __future__ import annotations

import json
import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, cast

import numpy as np

from harness.data import Example, Labelled, User
from harness.errors import DataMissing, UsageError, did_you_mean
from harness.statistics import metrics
from harness.statistics.intervals import UNIT
from harness.task import GenerationDefaults, Metric, Sample, Selection, System, Task
from harness.tasks import lamp_prompts, oppu_data
from harness.tasks.lamp_export import official_name
from harness.tasks.lamp_files import Question, QuestionFile, Split, Synthetic, content_of, parsed_json, sha256_of

SPLITS = ("train", "dev", "test")
MINI = "lamp-mini"
"""The `data` of the embedded synthetic users; what is used where no data is given."""


class Lamp(Task):
    """What all eight share: files, users, prompts. `data` (or $HARNESS_DATA) is the folder of all tasks or of one.

    `split_by="time"` looks in `time/` first, and insists on dates and user ids. With `most_active=100` the 100 users with
    the longest histories among the dev questions are evaluated, and all but them are the train split, as OPPU and PerFit
    have it; with `train_from="dev"` the train split is the other users' dev questions, for files without a train split.
    `complete=true` keeps the questions that profile_provenance.json beside them calls so: {"610": {"complete": true}}.
    With `answers="scored"` the answer of a task with labels is the label with the highest log-probability a character, in place
    of what the model writes: small models write sentences, of which the official metrics find no label.
    """

    folders: ClassVar[tuple[str, ...]] = ()
    """Further places of the task's files below `data`, looked at before the official one."""
    max_new_tokens: ClassVar[int] = 64
    asked_by_name = True
    main: ClassVar[str]
    """The main metric, a mean of numbers that each sample has."""

    def __init__(
        self,
        data: str | None = None,
        split_by: str = "user",
        most_active: int | None = None,
        train_from: Literal["train", "dev"] = "train",
        complete: bool = False,
        answers: Literal["written", "scored"] = "written",
    ) -> None:
        if split_by not in ("user", "time"):
            raise UsageError(f"split_by={split_by!r} is not valid; choose from 'user', 'time'")
        if most_active is not None and most_active < 1:
            raise UsageError(f"most_active={most_active} leaves nobody to evaluate; allowed: most_active >= 1")
        if train_from == "dev" and most_active is None:
            raise UsageError("train_from=dev fits on the dev users who are not evaluated; give most_active=100 or so")
        if answers == "scored" and self.name not in lamp_prompts.LABELS:
            labelled = ", ".join(lamp_prompts.LABELS)
            raise UsageError(
                f"answers=scored needs labels to choose from, and {self.name} has texts; allowed for: {labelled}"
            )
        self.data = data or os.environ.get("HARNESS_DATA") or MINI
        self.split_by = split_by
        self.most_active = most_active
        self.train_from = train_from
        self.complete = complete
        self.answers = answers
        self._splits: dict[str, Split] = {}

    def items(self, selection: Selection) -> Sequence[Labelled]:
        split = self._split(selection.split)
        active = self._active if self.most_active else frozenset()
        chosen: list[Labelled] = []
        users: set[str] = set()
        questions = self._questions(selection.split)
        for question in questions:
            user = question.user
            if selection.limit is not None and len(chosen) >= selection.limit:
                break
            full = selection.users is not None and len(users) >= selection.users
            if user in selection.exclude_users or (full and user not in users):
                continue
            if self.most_active and (user in active) == (selection.split == "train"):
                continue
            users.add(user)
            chosen.append(self._labelled(split, question))
        for _ in questions:  # a file that is read for the first time is checked to its end
            pass
        return chosen

    def fingerprint(self, selection: Selection) -> str:
        sha256 = self._split(selection.split).sha256
        return sha256_of(sha256.encode(), self._provenance(selection.split)) if self.complete else sha256

    def generation(self) -> GenerationDefaults:
        return GenerationDefaults(self.max_new_tokens)

    def describe_data(self) -> str:
        if self.data == MINI:
            return f"{self.name}: lamp-mini (synthetic, embedded); real data: 'harness data get {self.name}'"
        return f"{self.name}: LaMP's {self.split_by} split in {self.data}"

    def questions_file(self, split: str) -> Path:
        """Where the split's questions are. Raises DataMissing where they are not."""
        oppu = oppu_data.find(self.name, Path(os.path.expanduser(self.data)), split)
        return oppu or _find(self, f"{split}_questions.json", split)

    @cached_property
    def _active(self) -> frozenset[str]:
        """The users with the longest histories among the dev questions, the first in file order of equals."""
        longest: dict[str, int] = {}
        for question in self._questions("dev"):
            longest[question.user] = max(question.items, longest.get(question.user, 0))
        return frozenset(sorted(longest, key=lambda user: -longest[user])[: self.most_active])

    def respond(self, system: System, items: Sequence[Labelled]) -> Iterator[Sample]:
        targets = {item.example.id: item.targets for item in items}
        for sample in system.respond([item.example for item in items]):
            yield replace(sample, targets=targets[sample.id])

    def grade(self, sample: Sample) -> Sample:
        if sample.response is None or sample.error is not None:
            return sample
        grade = self._grade(sample.response, sample.targets[0].strip() if sample.targets else None)
        return replace(sample, parsed=grade.parsed, metrics=grade.metrics, extra={**sample.extra, **grade.extra})

    def aggregate(self, samples: Sequence[Sample]) -> Mapping[str, Metric]:
        return self._aggregate([sample for sample in samples if sample.metrics])

    def analysis(self, samples: Sequence[Sample]) -> Mapping[str, Any]:
        """Of lamp-mini, whose habits are known, the best means that can be reached (`harness.tiny.oracle`)."""
        graded = [sample.id for sample in samples if sample.metrics]
        if self.data != MINI or not graded:
            return {}
        from harness.tiny import oracle

        return {"ceiling": {"metric": self.main, **oracle.ceilings(self.name, graded, self._score)}}

    def _score(self, answer: str, gold: str) -> float | None:
        """The number of the main metric, alone."""
        return self._grade(answer, gold).metrics[self.per_sample.get(self.main, self.main)]

    @abstractmethod
    def _grade(self, response: str, gold: str | None) -> _Grade:
        """Metrics are empty where there is no gold (LaMP keeps those of the test split)."""

    @abstractmethod
    def _aggregate(self, graded: Sequence[Sample]) -> Mapping[str, Metric]: ...

    def _provenance(self, split: str) -> bytes:
        return content_of(self.questions_file(self._source(split)).with_name("profile_provenance.json"))

    def _questions(self, split: str) -> Iterator[Question]:
        """Under `complete` those whose profile is whole."""
        if not self.complete:
            return iter(self._split(split))
        about = parsed_json(
            self.questions_file(self._source(split)).with_name("profile_provenance.json"), self._provenance(split)
        )
        if not isinstance(about, dict) or not all(isinstance(said, dict) for said in about.values()):
            raise DataMissing(f'{self.name}: profile_provenance.json should be as in {{"610": {{"complete": true}}}}')
        whole = {name: said.get("complete", False) for name, said in about.items()}
        if wrong := next((name for name, said in whole.items() if not isinstance(said, bool)), None):
            raise DataMissing(
                f"{self.name}: profile_provenance.json: complete of {wrong!r} is {whole[wrong]!r}; expected true or false"
            )
        return (one for one in self._split(split) if whole.get(str(one.id), False))

    def _source(self, split: str) -> str:
        return self.train_from if split == "train" else split

    def _split(self, split: str) -> Split:
        if split not in SPLITS:
            hint = did_you_mean(split, SPLITS)
            raise UsageError(f"{self.name} has no split {split!r}{hint} it has {', '.join(SPLITS)}")
        split = self._source(split)
        if self.complete and self.data == MINI:  # asked here: records are compared without their data
            raise DataMissing("complete=true is about LaMP's own files; give their folder as --data")
        if split not in self._splits:
            read = _read_mini if self.data == MINI else _read_files
            self._splits[split] = read(self, split)
        return self._splits[split]

    def _labelled(self, split: Split, question: Question) -> Labelled:
        text, user = split.text(question), question.user
        history = split.history(question)
        pairs = lamp_prompts.HistoryPairs(self.name, user, lamp_prompts.frame(self.name, text), history)
        query, template = lamp_prompts.query(self.name, text), lamp_prompts.LampTemplate(self.name)
        labels = lamp_prompts.LABELS.get(self.name, ())
        example = Example(str(question.id), User(user, history, pairs), text, query, template, labels=labels)
        if self.answers == "scored":
            example = replace(example, choices=labels, compared="character")
        return Labelled(example, () if split.golds is None else (split.golds[example.id],))


class Classification(Lamp):
    """Accuracy and macro-F1 over the full label list."""

    closed = True
    max_new_tokens = 16
    main = "accuracy"
    per_sample = {"accuracy": "correct", "accuracy_lenient": "correct_lenient"}

    def _grade(self, response: str, gold: str | None) -> _Grade:
        labels = lamp_prompts.LABELS[self.name]
        parsed, lenient = metrics.parse_label(response, labels), metrics.parse_label_leniently(response, labels)
        scores: dict[str, float | None] = {}
        if gold is not None:
            scores = {"correct": float(parsed == gold), "correct_lenient": float(lenient == gold)}
        return _Grade(parsed, scores, {"lenient": lenient})

    def _aggregate(self, graded: Sequence[Sample]) -> Mapping[str, Metric]:
        number = {label: i for i, label in enumerate(lamp_prompts.LABELS[self.name])}
        golds = np.array([number[sample.targets[0].strip()] for sample in graded], dtype=int)

        def f1(answers: Sequence[Any]) -> Metric:
            codes = np.array([number.get(answer, -1) for answer in answers], dtype=int)
            return metrics.macro_f1_metric(graded, golds, codes, list(number))

        official, lenient = [s.parsed for s in graded], [s.extra["lenient"] for s in graded]
        return {
            "accuracy": metrics.mean(graded, "correct", note=_unparsed(official, "counted wrong")),
            "f1": f1(official),
            "accuracy_lenient": metrics.mean(graded, "correct_lenient", note=_unparsed(lenient, "counted wrong")),
            "f1_lenient": f1(lenient),
        }


class Rating(Lamp):
    """MAE and RMSE; an answer that is no number counts as the farther of 1 and 5, and is counted as unparsed."""

    closed = True
    max_new_tokens = 16
    main = "mae"
    per_sample = {"mae": "abs_error", "mae_lenient": "abs_error_lenient"}
    # of ratings from 1 to 5; where an official answer lies outside, its error does too and the bounds are not used
    ranges = {
        f"{kind}_error{suffix}": (0, most) for kind, most in (("abs", 4), ("sq", 16)) for suffix in ("", "_lenient")
    }

    def _grade(self, response: str, gold: str | None) -> _Grade:
        parsed, lenient = metrics.parse_rating(response), metrics.parse_rating_leniently(response)
        errors: dict[str, float | None] = {}
        if gold is not None:
            for suffix, rating in (("", parsed), ("_lenient", lenient)):
                error = abs(metrics.rating_or_farthest(rating, float(gold)) - float(gold))
                errors |= {f"abs_error{suffix}": error, f"sq_error{suffix}": error * error}
        return _Grade(parsed, errors, {"lenient": lenient})

    def _aggregate(self, graded: Sequence[Sample]) -> Mapping[str, Metric]:
        official: list[Any] = [sample.parsed for sample in graded]
        outside = sum(rating is not None and not 1 <= rating <= 5 for rating in official)
        note = _unparsed(official, "counted as the farther of 1 and 5")
        if outside:
            note = "; ".join(filter(None, [note, f"{outside} outside 1 to 5, not clipped"]))
        lenient = _unparsed([sample.extra["lenient"] for sample in graded], "counted as the farther of 1 and 5")
        result = {}
        for suffix, text in (("", note), ("_lenient", lenient)):
            for metric, root in (("abs", False), ("sq", True)):
                name = f"{metric}_error{suffix}"
                result[f"{'rmse' if root else 'mae'}{suffix}"] = metrics.mean(
                    graded, name, note=text, root=root, higher_is_better=False, bounds=self.ranges[name]
                )
        return result


class Generation(Lamp):
    """ROUGE-1, ROUGE-L and METEOR (with and without a split into sentences, see `harness.statistics.metrics`)."""

    main = "rouge1"
    ranges = dict.fromkeys(("rouge1", "rougeL", "meteor", "meteor_unsplit"), UNIT)

    def _score(self, answer: str, gold: str) -> float | None:
        return metrics.rouge(answer, gold).rouge1

    def _grade(self, response: str, gold: str | None) -> _Grade:
        answer = response.strip()
        if gold is None:
            return _Grade(answer or None, {}, {})
        rouge, meteor = metrics.rouge(answer, gold), metrics.meteor(answer, gold)
        scores = {**rouge._asdict(), "meteor": meteor.split, "meteor_unsplit": meteor.unsplit}
        return _Grade(answer or None, scores, {})

    def _aggregate(self, graded: Sequence[Sample]) -> Mapping[str, Metric]:
        unsplit = sum(s.metrics["meteor"] is None and s.metrics["meteor_unsplit"] is not None for s in graded)
        note = f"{unsplit} answers or golds need NLTK's punkt_tab: {metrics.PUNKT_HINT}" if unsplit else ""
        return {
            "rouge1": metrics.mean(graded, "rouge1", bounds=UNIT),
            "rougeL": metrics.mean(graded, "rougeL", bounds=UNIT),
            "meteor": metrics.mean(graded, "meteor", missing=note or metrics.wordnet_missing(), bounds=UNIT),
            "meteor_unsplit": metrics.mean(graded, "meteor_unsplit", missing=metrics.wordnet_missing(), bounds=UNIT),
        }


class Lamp1(Classification):
    """Which of two papers a researcher cited, given titles of their own papers (LaMP-1)."""

    name = "lamp1"


class Lamp2M(Classification):
    """The tag a user gives a film, of 15, from its description (LaMP-2, movies)."""

    name = "lamp2m"
    folders = ("LaMP_2M", "LaMP_2/new", "new")


class Lamp2N(Classification):
    """The category of an author's news article, of 15 (LaMP-2, news)."""

    name = "lamp2n"
    folders = ("LaMP_2N",)


class Lamp3(Rating):
    """The stars, 1 to 5, a user gives with a review (LaMP-3)."""

    name = "lamp3"


class Lamp4(Generation):
    """The headline an author writes for an article (LaMP-4)."""

    name = "lamp4"


class Lamp5(Generation):
    """The title a researcher gives a paper, from its abstract (LaMP-5)."""

    name = "lamp5"


class Lamp6(Generation):
    """The subject line of a user's email (LaMP-6; its data needs a licence)."""

    name = "lamp6"


class Lamp7(Generation):
    """A tweet reworded the way its user writes (LaMP-7)."""

    name = "lamp7"


class _Grade(NamedTuple):
    parsed: str | float | None
    metrics: dict[str, float | None]
    extra: dict[str, Any]


def _unparsed(parsed: Sequence[Any], consequence: str) -> str:
    count = sum(answer is None for answer in parsed)
    return f"{count} of {len(parsed)} unparsed, {consequence}" if count else ""


def _read_mini(task: Lamp, split: str) -> Split:
    return _mini(task.name, split)


@cache
def _mini(task: str, split: str) -> Synthetic:
    """Written once a process: a command over several methods or records asks for it many times."""
    from harness.tiny import lamp_mini

    questions, golds = lamp_mini.load(task, cast("lamp_mini.Split", split))
    canonical = json.dumps([questions, golds], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    sha256 = sha256_of(canonical.encode())
    return Synthetic(task, questions, {gold["id"]: gold["output"] for gold in golds}, sha256)


def _read_files(task: Lamp, split: str) -> Split:
    questions = task.questions_file(split)
    golds = questions.with_name(f"{split}_outputs.json")
    # they stand in OPPU's own file; LaMP keeps those of its test split for its leaderboard
    apart = not oppu_data.is_oppu(questions) and (split != "test" or golds.is_file())
    if apart and not golds.is_file():
        raise DataMissing(f"{task.name}: {questions} has no {golds.name} beside it; fetch that file too")
    return QuestionFile(task.name, questions, golds if apart else None, dated=task.split_by == "time")


def _find(task: Lamp, file: str, split: str) -> Path:
    root = Path(os.path.expanduser(task.data))
    names = [*task.folders, official_name(task.name), ""]
    if task.split_by == "time":
        names = [f"time/{name}" for name in names] + names
    places = list(dict.fromkeys(Path(name) / inner / file for name in names for inner in (split, "")))
    for place in places:
        if (root / place).is_file():
            return root / place
    looked = ", ".join(map(str, places)) if root.is_dir() else "the folder does not exist"
    how = "says how to get its licensed emails;" if task.name == "lamp6" else "fetches it;"
    raise DataMissing(
        f"{task.name}: {root} has no {file} (looked for: {looked}); 'harness data get {task.name} --split "
        f"{task.split_by}' {how} then give the folder as --data or $HARNESS_DATA"
    )
