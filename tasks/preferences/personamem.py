"""PersonaMem: which of four replies fits what a user said over many conversations, and how it changed.

Paper: Jiang et al., Know Me, Respond to Me: Benchmarking LLMs for Dynamic User Profiling and Personalized Responses at
Scale, 2504.14225. Code read: bowen-upenn/PersonaMem@041d82a (inference_standalone_openai.py). Files, in one folder:
    questions_32k.csv: persona_id, question_id, question_type, topic, user_question_or_message, correct_answer ("(c)"),
                       all_options ("['(a) ...', ...]"), shared_context_id, end_index_in_shared_context, ...
    shared_contexts_32k.jsonl: {"<shared_context_id>": [{"role": "system", "content": "Current user persona: ..."}, ...]}
A question's history is its context up to that index, one item an exchange. The official prompt is all of it in order:
`--method rag --set retriever=profile --set k=100000`; with `retriever=recency` the oldest exchanges go first where it does not
fit, with a smaller k a few are retrieved. Wording, and system turns written as `[System]: ...` into the turn behind them, are
the official ones.
`answer=choice` takes the most likely of "(a)" to "(d)"; `answer=text` lets the model write and reads it as the official code
does: the letters behind <final_answer>, and where those are not the right one alone, the letters of the whole reply.
"""

from __future__ import annotations

import ast
import csv
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from harness.data import Example, HistoryItem, Labelled, User
from harness.errors import DataMissing, UsageError
from harness.files.json_files import read_bytes
from harness.statistics import metrics
from harness.statistics.intervals import UNIT
from harness.task import GenerationDefaults, Metric, Sample, Selection, Task
from harness.tasks.preferences.turns import Conversation, exchanges
from harness.tasks.rows import file_rows, from_the_hub, text

INSTRUCTION = (
    "Find the most appropriate model response and give your final answer (a), (b), (c), or (d) after the special token "
    "<final_answer>."
)
LETTERS = ("(a)", "(b)", "(c)", "(d)")
TEMPLATE = Conversation(turns_only=True)
GET = from_the_hub("bowen-upenn/PersonaMem", "huggingface.co/datasets/bowen-upenn/PersonaMem names the licence")


class PersonaMem(Task):
    """Which of four replies fits what a user said over many conversations (PersonaMem)."""

    name = "personamem"
    closed = True
    how_to_get = GET
    ranges = {"correct": UNIT}
    per_sample = {"accuracy": "correct"}

    def __init__(
        self,
        data: str | None = None,
        size: Literal["32k", "128k", "1M"] = "32k",
        answer: Literal["choice", "text"] = "choice",
    ) -> None:
        """`data`, or $HARNESS_PERSONAMEM: the folder of the files; `size`: tokens of the contexts."""
        folder = data or os.environ.get("HARNESS_PERSONAMEM")
        self.folder, self.size, self.answer = Path(folder).expanduser() if folder else None, size, answer

    def items(self, selection: Selection) -> Sequence[Labelled]:
        if selection.split != "dev":
            raise UsageError(f"personamem has no split {selection.split!r}; it has dev alone, so fit on another task")
        return selection.of(self._labelled())

    def fingerprint(self, selection: Selection) -> str:
        contents = [read_bytes(self._file(name)) for name in ("questions", "contexts")]
        return sha256(b"".join(sha256(content).digest() for content in contents)).hexdigest()

    def generation(self) -> GenerationDefaults:
        return GenerationDefaults(max_new_tokens=256)

    def describe_data(self) -> str:
        return f"personamem: contexts of {self.size} tokens in {self.folder}"

    def grade(self, sample: Sample) -> Sample:
        if sample.response is None or sample.error is not None or not sample.targets:
            return sample
        gold = sample.targets[0].strip("() ")
        final = sample.response.rpartition("<final_answer>")[2].strip().removesuffix("</final_answer>")
        said = [_letters(part) for part in (final, sample.response)]
        right = {gold} in said
        parsed = gold if right else min(said[0]) if len(said[0]) == 1 else None
        return replace(sample, parsed=parsed and f"({parsed})", metrics={"correct": float(right)})

    def aggregate(self, samples: Sequence[Sample]) -> Mapping[str, Metric]:
        graded = [sample for sample in samples if sample.metrics]
        unparsed = sum(sample.parsed is None for sample in graded)
        note = f"{unparsed} answers name no single reply; counted wrong" if unparsed else ""
        found = {"accuracy": metrics.mean(graded, "correct", note=note, bounds=UNIT)}
        for kind in sorted({self._kinds.get(sample.id, "") for sample in graded} - {""}):
            own = [sample for sample in graded if self._kinds.get(sample.id) == kind]
            found[f"accuracy/{kind}"] = metrics.mean(own, "correct", bounds=UNIT)
        return found

    def _file(self, what: Literal["questions", "contexts"]) -> Path:
        name = f"questions_{self.size}.csv" if what == "questions" else f"shared_contexts_{self.size}.jsonl"
        if self.folder is None:
            raise DataMissing(f"personamem: give the folder of {name} as --data or $HARNESS_PERSONAMEM; {GET}")
        if not (path := self.folder / name).is_file():
            raise DataMissing(f"personamem: {self.folder} has no {name}; {GET}")
        return path

    @cached_property
    def _questions(self) -> list[dict[str, str]]:
        try:
            content = read_bytes(self._file("questions")).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataMissing(f"{self._file('questions')}: byte {error.start} is no UTF-8") from None
        csv.field_size_limit(1 << 24)
        read = csv.DictReader(io.StringIO(content, newline=""), strict=True)
        try:
            return [{k: v or "" for k, v in row.items() if k} for row in read]
        except csv.Error as error:
            where = f"{self._file('questions')}, line {read.line_num}"
            raise DataMissing(f"{where}: not valid CSV ({error}); is a quote not closed?") from None

    @cached_property
    def _kinds(self) -> Mapping[str, str]:
        """What a question is about, by its id; of no use where the files are not there any more."""
        try:
            return {row.get("question_id", ""): row.get("question_type", "").rstrip(".") for row in self._questions}
        except DataMissing:
            return {}

    @cached_property
    def _contexts(self) -> Mapping[str, list[tuple[str, str]]]:
        found: dict[str, list[tuple[str, str]]] = {}
        path = self._file("contexts")
        for number, row in enumerate(file_rows(path), start=1):
            for name, turns in row.items():
                if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
                    raise DataMissing(f"{path}, line {number}: expected a list of turns with role and content")
                at: dict[str, Any] = {"where": str(path), "row_number": number}
                found[name] = [(text(t, "role", **at), text(t, "content", empty=True, **at)) for t in turns]
        return found

    def _labelled(self) -> Iterator[Labelled]:
        path = self._file("questions")
        histories: dict[tuple[str, int], tuple[HistoryItem, ...]] = {}
        for number, row in enumerate(self._questions, start=1):
            at: dict[str, Any] = {"where": str(path), "row_number": number}
            user, name = text(row, "persona_id", "shared_context_id", **at), text(row, "question_id", **at)
            question, options = text(row, "user_question_or_message", "question", **at), text(row, "all_options", **at)
            gold, context = text(row, "correct_answer", **at).strip().lower(), text(row, "shared_context_id", **at)
            end = text(row, "end_index_in_shared_context", **at)
            if gold not in LETTERS or not _four(options):
                raise DataMissing(f"{path}, row {number}: expected four all_options and a correct_answer of (a) to (d)")
            if context not in self._contexts or not end.isdecimal():
                raise DataMissing(
                    f"{path}, row {number}: {self._file('contexts').name} has no context {context!r} up to {end}"
                )
            key = context, int(end)
            if key not in histories:
                histories[key] = exchanges(self._contexts[context][: key[1]], f"{path}, row {number}")
            asked = f"{question}\n\n{INSTRUCTION}\n\n{options}"
            choices = LETTERS if self.answer == "choice" else ()
            example = Example(name, User(user, histories[key]), asked, question, TEMPLATE, choices, labels=LETTERS)
            yield Labelled(example, (gold,))


def _four(options: str) -> bool:
    try:
        found = ast.literal_eval(options)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False
    return isinstance(found, list) and len(found) == 4


def _letters(said: str) -> set[str]:
    lowered = said.lower()
    return set(re.findall(r"\(([a-d])\)", lowered)) or set(re.findall(r"\b([a-d])\b", lowered))
