"""MMLU: 14,042 questions of 57 subjects with four choices, scored by the likelihood of the letters or of the choices' texts.

Paper: Hendrycks et al., Measuring Massive Multitask Language Understanding, ICLR 2021. Files: its original CSVs without
header, `{dev,val,test}/{subject}_{split}.csv` (https://people.eecs.berkeley.edu/~hendrycks/data.tar), a row being
    "Find the degree for the given field extension Q(sqrt(2), sqrt(3), sqrt(18)) over Q.",0,4,2,6,B
Prompts, letters and categories are those of lm-eval 0.4 (EleutherAI/lm-evaluation-harness@4e7e0d4, tasks/mmlu/default):
no chat template unless asked for, examples from `dev` in file order. The paper counts anatomy among `other`, lm-eval
among `stem`.

`format=cloze` shows no choices: each choice's text is scored as the answer, and that with the highest log-probability a
character wins. Small models know what fits long before they know what a letter stands for. Prompt and normalisation are those
of `mmlu_cf` in SmolLM's evaluation (huggingface/smollm@c552527, text/evaluation/tasks.py; the metric is lighteval's
`loglikelihood_acc_norm_nospace`), without examples:
    "The following are questions about abstract algebra.\nQuestion: Find the degree ...\nAnswer:" + " 4"
Published with it for SmolLM2-135M: 31.5, -Instruct: 29.3, of which the second is with the chat template (its README:
`--use_chat_template`), as `apply_chat_template=true` has it: the whole prompt is the user's turn, and an answer begins with a space.
Differs from that code: where two choices read alike both are right; examples, where asked for, are the first of `dev` and stand
between the first line and the question.
 Splits here: `train` = its dev, `dev` = its val, `test`.
A method that needs a user gets one from a pool (`harness.run.lm_eval.contexts`), and the user's history stands before everything.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from harness.data import Example, Labelled
from harness.errors import DataMissing, UsageError, did_you_mean
from harness.run.lm_eval.contexts import MINI, ContextTemplate, UserPool, written
from harness.statistics.intervals import mean_interval, ratio_intervals
from harness.statistics.metrics import known
from harness.task import GenerationDefaults, Metric, Sample, Selection, System, Task

CATEGORIES: Mapping[str, tuple[str, ...]] = {
    "stem": (
        "abstract_algebra", "anatomy", "astronomy", "college_biology", "college_chemistry", "college_computer_science",
        "college_mathematics", "college_physics", "computer_security", "conceptual_physics", "electrical_engineering",
        "elementary_mathematics", "high_school_biology", "high_school_chemistry", "high_school_computer_science",
        "high_school_mathematics", "high_school_physics", "high_school_statistics", "machine_learning",
    ),
    "humanities": (
        "formal_logic", "high_school_european_history", "high_school_us_history", "high_school_world_history",
        "international_law", "jurisprudence", "logical_fallacies", "moral_disputes", "moral_scenarios", "philosophy",
        "prehistory", "professional_law", "world_religions",
    ),
    "social_sciences": (
        "econometrics", "high_school_geography", "high_school_government_and_politics", "high_school_macroeconomics",
        "high_school_microeconomics", "high_school_psychology", "human_sexuality", "professional_psychology",
        "public_relations", "security_studies", "sociology", "us_foreign_policy",
    ),
    "other": (
        "business_ethics", "clinical_knowledge", "college_medicine", "global_facts", "human_aging", "management",
        "marketing", "medical_genetics", "miscellaneous", "nutrition", "professional_accounting",
        "professional_medicine", "virology",
    ),
}  # fmt: skip
SUBJECTS = sorted(subject for subjects in CATEGORIES.values() for subject in subjects)
LETTERS = "ABCD"

_SPLITS: Mapping[str, str] = {"train": "dev", "dev": "val", "val": "val", "test": "test"}
_FETCH = (
    "fetch https://people.eecs.berkeley.edu/~hendrycks/data.tar, unpack it and give its folder, the one that holds dev, "
    "val and test, as --data or $HARNESS_DATA"
)


class Row(NamedTuple):
    question: str
    choices: tuple[str, str, str, str]
    letter: str

    def cloze(self) -> str:
        return f"Question: {self.question}\nAnswer:"

    @property
    def answer(self) -> str:
        """The text of the right choice."""
        return self.choices[LETTERS.index(self.letter)]

    def text(self) -> str:
        lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=True)]
        return "\n".join([self.question.strip(), *lines, "Answer:"])


class MMLU(Task):
    """Questions of 57 subjects with four choices (accuracy overall, a category, a subject, the mean of subjects)."""

    name = "mmlu"
    default_split = "test"
    independent = "item"

    def __init__(
        self,
        data: str | None = None,
        subjects: str = "all",
        num_fewshot: int = 0,
        per_subject: int | None = None,
        apply_chat_template: bool = False,
        fewshot_as_multiturn: bool = False,
        users_from: str = "lamp4",
        users_data: str = MINI,
        users_split: str = "dev",
        users_seed: int = 0,
        format: Literal["letters", "cloze"] = "letters",
    ) -> None:
        """`subjects` are names and categories as in `stem,virology`; `per_subject` keeps the first questions of each.

        Not of `train`, which has five.
        """
        if num_fewshot < 0:
            raise UsageError(f"num_fewshot={num_fewshot} is not valid; allowed: 0 to 5, as many as dev has")
        if per_subject is not None and per_subject < 1:
            raise UsageError(f"per_subject={per_subject} is not valid; allowed: per_subject >= 1")
        self.data = data or os.environ.get("HARNESS_DATA")
        self.subjects = _subjects(subjects)
        self.num_fewshot = num_fewshot
        self.per_subject = per_subject
        self.chat = apply_chat_template
        self.multiturn = fewshot_as_multiturn
        self.cloze = format == "cloze"
        self.users = UserPool(users_from, users_data, users_split, users_seed)
        self._files: dict[tuple[str, str], bytes] = {}

    def items(self, selection: Selection) -> Sequence[Labelled]:
        return selection.of(self._questions(self._split(selection.split)))

    def fingerprint(self, selection: Selection) -> str:
        digest = hashlib.sha256(self.users.fingerprint().encode())
        for split in dict.fromkeys([self._split(selection.split), *(["dev"] if self.num_fewshot else [])]):
            for subject in self.subjects:
                digest.update(hashlib.sha256(self._file(subject, split)).digest())
        return digest.hexdigest()

    def generation(self) -> GenerationDefaults:
        return GenerationDefaults(max_new_tokens=1)

    def describe_data(self) -> str:
        return f"mmlu: {len(self.subjects)} subjects in {self.data or 'no folder'}; {self.users.describe()}"

    def respond(self, system: System, items: Sequence[Labelled]) -> Iterator[Sample]:
        targets = {item.example.id: item.targets for item in items}
        examples = [item.example for item in items]
        # a subject's questions begin with the same examples
        for sample in system.respond(examples, alike=lambda e: _subject(e.id) if self.num_fewshot else ""):
            yield replace(sample, targets=targets[sample.id])

    def grade(self, sample: Sample) -> Sample:
        if sample.response is None or sample.error is not None:
            return sample
        correct = float(sample.response == sample.targets[0])
        return replace(sample, parsed=sample.response.strip(), metrics={"accuracy": correct})

    def aggregate(self, samples: Sequence[Sample]) -> Mapping[str, Metric]:
        """Means over questions, as lm-eval's, and of subjects, as lighteval's; intervals over questions, whoever their users are."""
        graded = [sample for sample in samples if sample.metrics]
        cut = sum(sample.cut_tokens > 0 for sample in graded)
        note = f"{cut} of {len(graded)} contexts cut from the left" if cut else ""
        found = {"accuracy": replace(_accuracy(graded), note=note)}
        for category, subjects in CATEGORIES.items():
            if set(subjects) & set(self.subjects):
                found[f"accuracy_{category}"] = _accuracy([s for s in graded if _subject(s.id) in subjects])
        if len(self.subjects) > 1:
            found["accuracy_macro"] = _macro(graded)
        for subject in self.subjects:
            found[f"accuracy/{subject}"] = _accuracy([s for s in graded if _subject(s.id) == subject])
        return found

    def _split(self, split: str) -> str:
        if split not in _SPLITS:
            raise UsageError(f"mmlu has no split {split!r}{did_you_mean(split, _SPLITS)} it has {', '.join(_SPLITS)}")
        return _SPLITS[split]

    def _questions(self, split: str) -> Iterator[Labelled]:
        template = ContextTemplate()
        before = "" if self.chat and not self.cloze else " "
        for subject in self.subjects:
            shots = self._rows(subject, "dev") if self.num_fewshot else []
            if len(shots) < self.num_fewshot:
                raise UsageError(
                    f"num_fewshot={self.num_fewshot} asked for; {subject} has {len(shots)} examples in dev"
                )
            for number, row in enumerate(self._rows(subject, split)[: None if split == "dev" else self.per_subject]):
                name = f"{subject}/{number}"
                itself = number if split == "dev" else None
                others = [shot for n, shot in enumerate(shots) if n != itself][: self.num_fewshot]
                context = self._context(subject, others, row)
                choices = tuple(before + choice for choice in (row.choices if self.cloze else LETTERS))
                user = self.users.user(name)
                example = Example(
                    name, user, context, row.question, template, choices, compared="character" if self.cloze else "sum"
                )
                yield Labelled(example, (before + self._answer(row),))

    def _context(self, subject: str, shots: Sequence[Row], row: Row) -> str:
        topic = subject.replace("_", " ")
        about = f"The following are multiple choice questions (with answers) about {topic}.\n\n"
        if self.cloze:
            about = f"The following are questions about {topic}.\n"
        asked = Row.cloze if self.cloze else Row.text
        if not self.chat:
            return about + self._solved(shots) + asked(row)
        turns = [("user", self._solved(shots) + asked(row))]
        if self.multiturn:
            solved = [turn for shot in shots for turn in (("user", asked(shot)), ("assistant", self._answer(shot)))]
            turns = [*solved, ("user", asked(row))]
        # lighteval puts what a task is about into the first turn of the user, lm-eval into a turn of the system
        turns = [("user", about + turns[0][1]), *turns[1:]] if self.cloze else [("system", about), *turns]
        return written([{"role": role, "content": content} for role, content in turns])

    def _solved(self, shots: Sequence[Row]) -> str:
        asked = Row.cloze if self.cloze else Row.text
        return "".join(f"{asked(shot)} {self._answer(shot)}\n\n" for shot in shots)

    def _answer(self, row: Row) -> str:
        return row.answer if self.cloze else row.letter

    def _rows(self, subject: str, split: str) -> list[Row]:
        rows = []
        for number, cells in enumerate(_cells(self._file(subject, split), f"{subject}_{split}.csv")):
            if len(cells) != 6 or cells[5] not in tuple(LETTERS):
                raise DataMissing(
                    f"{subject}_{split}.csv, row {number}: expected question, four choices and a letter of {LETTERS}, "
                    f"found {len(cells)} cells ending in {cells[-1:]}; fetch the file again"
                )
            rows.append(Row(cells[0], (cells[1], cells[2], cells[3], cells[4]), cells[5]))
        if not rows:
            raise DataMissing(f"{subject}_{split}.csv holds no question; fetch the file again")
        return rows

    def _file(self, subject: str, split: str) -> bytes:
        if self.data is None:
            raise DataMissing(f"mmlu: no folder of its CSV files was given; {_FETCH}")
        if (subject, split) not in self._files:
            name = f"{split}/{subject}_{split}.csv"
            places = [Path(os.path.expanduser(self.data)) / inner / name for inner in ("", "data", "mmlu", "mmlu/data")]
            found = next((place for place in places if place.is_file()), None)
            if found is None:
                raise DataMissing(f"mmlu: {self.data} holds no {name}; {_FETCH}")
            self._files[subject, split] = found.read_bytes()
        return self._files[subject, split]


def _cells(content: bytes, name: str, *, whole: bool = True) -> list[list[str]]:
    """The rows of a CSV file in UTF-8; a byte order mark is no part of the first. Raises DataMissing for other bytes, and of a
    `whole` file for a quote that is not closed, which would swallow the rows behind it."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = _cells(content[: error.start], name, whole=False)
        row, cell = max(0, len(before) - 1), max(0, len(before[-1]) - 1 if before else 0)
        raise DataMissing(
            f"{name}, row {row}, cell {cell}: byte {content[error.start]:#04x} is no UTF-8, and would change the question; "
            "fetch the file again, or convert it to UTF-8"
        ) from None
    rows = csv.reader(io.StringIO(text, newline=""), strict=whole)
    try:
        return list(rows)
    except csv.Error as error:
        raise DataMissing(f"{name}, line {rows.line_num}: not valid CSV ({error}); is a quote not closed?") from None


def _subjects(text: str) -> list[str]:
    """Names and categories, in alphabetical order."""
    chosen: set[str] = set()
    for name in (part.strip() for part in text.split(",")):
        if name != "all" and name not in CATEGORIES and name not in SUBJECTS:
            hint = did_you_mean(name, [*CATEGORIES, *SUBJECTS])
            raise UsageError(
                f"mmlu has no subject {name!r}{hint} subjects are all, {', '.join(CATEGORIES)}, or names as in virology"
            )
        chosen.update(SUBJECTS if name == "all" else CATEGORIES.get(name, (name,)))
    return sorted(chosen)


def _subject(question: str) -> str:
    return question.partition("/")[0]


def _accuracy(graded: Sequence[Sample]) -> Metric:
    if not graded:
        return Metric(None, 0, note="no graded answer")
    values = np.array([sample.metrics["accuracy"] for sample in graded], dtype=float)
    return Metric(float(values.mean()), len(graded), *known(mean_interval(values, [sample.id for sample in graded])))


def _macro(graded: Sequence[Sample]) -> Metric:
    """The mean of the subjects' accuracies, whatever their size: each question weighs one over its subject's questions."""
    if not graded:
        return Metric(None, 0, note="no graded answer")
    sizes = Counter(_subject(sample.id) for sample in graded)
    weights = np.array([1 / sizes[_subject(sample.id)] for sample in graded])
    values = np.array([sample.metrics["accuracy"] for sample in graded])
    low, high = ratio_intervals((weights * values)[:, None], weights, [sample.id for sample in graded])
    note = f"the mean of {len(sizes)} subjects, whatever their size"
    return Metric(float((weights * values).sum() / weights.sum()), len(graded), *known((low[0], high[0])), note=note)
