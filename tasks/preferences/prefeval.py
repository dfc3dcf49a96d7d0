"""PrefEval: is a preference that the user stated, or let be guessed, kept to when they ask for something many turns later?

Paper: Zhao et al., Do LLMs Recognize Your Preferences? Evaluating Personalized Preference Following in LLMs, ICLR 2025
(2502.09597). Code read: amazon-science/PrefEval as krishnaj01/PrefEval@25a686a and zhucaroline18/OwnPrefEval@5f3d3cd have it.
Files: its folder `benchmark_dataset`, one JSON file a topic (20 topics, 1,000 preferences in all), in
    explicit_preference/:             [{"preference": "I ...", "question": "...", "explanation": "..."}]
    implicit_preference/choice-based/: and "conversation": {"query", "assistant_options", "user_selection", "assistant_acknowledgment"}
    implicit_preference/persona-driven/: and "conversation": {"0": {"user": "...", "assistant": "..."}, ...}
    mcq_options/:                     and "classification_task_options": [four, the first one keeps to the preference]
    filtered_inter_turns.json:        [{"conversation": [{"role", "content"}, ...]}], what is talked about in between
Each preference is a user. The history holds where it shows, then `turns` exchanges about something else; the official prompt
is all of it, `--method rag --set retriever=profile --set k=1000`, `plain` does not know the user, and a smaller k retrieves.
`prefeval` asks which of four options suits the user (the most likely of <choice>A</choice> to <choice>D</choice>, shuffled
as the official code shuffles them, seed 41), `prefeval_generation` for an answer, which a judge reads for the four
questions of the paper. `remind=true` is its reminder.
Differs: an explicit preference is answered by a fixed sentence (there: by the model itself, whose reply is then history), and
options are compared by likelihood (there: 5 tokens are generated and parsed). The judge's four prompts are ours and ask for a
number from 0 to 100, yes being 50 and more; of the second the official one compares a restatement that the first has extracted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any, ClassVar, Literal

from harness.data import Example, Labelled, User
from harness.errors import DataMissing, UsageError, did_you_mean
from harness.files.json_files import read_bytes
from harness.statistics import metrics
from harness.statistics.intervals import UNIT
from harness.task import GenerationDefaults, Metric, Question, Sample, Selection, System, Task
from harness.tasks.preferences.turns import Conversation, exchanges
from harness.tasks.rows import file_rows, text

GET = (
    "the LICENSE file of github.com/amazon-science/PrefEval says what its data may be used for; read it, then clone that and give "
    "its folder benchmark_dataset as --data or $HARNESS_PREFEVAL"
)
FOLDERS = {
    "explicit": "explicit_preference",
    "choice": "implicit_preference/choice-based",
    "persona": "implicit_preference/persona-driven",
}
SYSTEM = "You are a helpful assistant."
UNDERSTOOD = "Understood. I will keep that in mind."
REMINDER = (
    "\nIn your response, please ensure that you take into account our earlier discussion, and provide an answer that is "
    "consistent with my preference."
)
LETTERS = "ABCD"
SHUFFLED_BY = 41
WORDS = 300
"""What an answer is asked to stay within, and its limit in tokens."""

Form = Literal["explicit", "choice", "persona"]


class PrefEval(Task):
    """Which of four options suits a preference the user stated or showed some turns before (PrefEval, without a judge)."""

    name = "prefeval"
    closed = True
    how_to_get = GET
    ranges = {"correct": UNIT}
    per_sample = {"accuracy": "correct"}
    beside: ClassVar[tuple[str, ...]] = ("mcq_options",)
    """Folders that are read beside the preferences'."""

    def __init__(
        self,
        data: str | None = None,
        form: Form = "explicit",
        topic: str = "all",
        turns: int = 0,
        remind: bool = False,
    ) -> None:
        """`data`, or $HARNESS_PREFEVAL: the folder `benchmark_dataset`. `form`: the preference is stated, shown by a choice
        between options, or dropped in talk of a persona; `turns`: exchanges about something else behind it."""
        if turns < 0:
            raise UsageError(f"prefeval: turns={turns} is not valid; allowed: turns >= 0")
        folder = data or os.environ.get("HARNESS_PREFEVAL")
        self.folder = Path(folder).expanduser() if folder else None
        self.form, self.topic, self.turns, self.remind = form, topic, turns, remind

    def items(self, selection: Selection) -> Sequence[Labelled]:
        if selection.split != "dev":
            raise UsageError(f"{self.name} has no split {selection.split!r}; it has dev alone, so fit on another task")
        return selection.of(self._labelled())

    def fingerprint(self, selection: Selection) -> str:
        return sha256(b"".join(sha256(read_bytes(path)).digest() for path in self._read_files())).hexdigest()

    def generation(self) -> GenerationDefaults:
        return GenerationDefaults(max_new_tokens=16)

    def describe_data(self) -> str:
        return f"{self.name}: {self.form} preferences, {self.topic}, {self.turns} turns between, in {self.folder}"

    def grade(self, sample: Sample) -> Sample:
        if sample.response is None or sample.error is not None or not sample.targets:
            return sample
        said = re.search(r"<choice>[^<]*?([ABCD])", sample.response)
        right = float(said is not None and f"<choice>{said[1]}</choice>" == sample.targets[0])
        return replace(sample, parsed=said and said[1], metrics={"correct": right})

    def aggregate(self, samples: Sequence[Sample]) -> Mapping[str, Metric]:
        graded = [sample for sample in samples if sample.metrics]
        return {name: metrics.mean(own, "correct", bounds=UNIT) for name, own in by_topic("accuracy", graded).items()}

    def _asked(self, question: str, options: Sequence[str]) -> str:
        """The last turn of the user."""
        listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True))
        return (
            f"{question}{REMINDER if self.remind else ''}\n"
            f"    I'm trying to decide on this and here are 4 options for my query: \n{listed}\nNow, I'd like you to pick one of "
            "them as your top recommendation for me.\n"
            "    Important instructions for your response:\n"
            "    1. Choose only one option (A, B, C, or D) that best matches my preferences.\n"
            "    2. Your answer must be one of these options.\n"
            "    3. Don't say things like \"I can't choose\" or suggest alternatives not listed.\n"
            "    4. Answer example: <choice>B</choice>. Give me your answer in this exact format, without any additional "
            "explanation:\n"
            "       <choice>[A/B/C/D]</choice>\n    "
        )

    def _labelled(self) -> Iterator[Labelled]:
        between = self._between()
        for topic in self._topics():
            rows = list(file_rows(self._root() / FOLDERS[self.form] / f"{topic}.json"))
            offered = self._options(topic, len(rows))
            shuffle = Random(SHUFFLED_BY)
            for number, row in enumerate(rows):
                at: dict[str, Any] = {"where": f"{FOLDERS[self.form]}/{topic}.json", "row_number": number + 1}
                preference, question = text(row, "preference", **at), text(row, "question", **at)
                history = exchanges([*self._shown(row, preference, at), *between], at["where"])
                order = shuffle.sample(offered[number], len(offered[number])) if offered else []
                name = f"{topic}/{number}"
                example = Example(
                    name,
                    User(name, history),
                    self._asked(question, order),
                    question,
                    Conversation(SYSTEM),
                    tuple(f"<choice>{letter}</choice>" for letter in LETTERS[: len(order)]),
                )
                right = order.index(offered[number][0]) if order else 0
                yield self._gold(example, preference, f"<choice>{LETTERS[right]}</choice>")

    def _gold(self, example: Example, preference: str, letter: str) -> Labelled:
        return Labelled(example, (letter,))

    def _shown(self, row: Mapping[str, Any], preference: str, at: Mapping[str, Any]) -> list[tuple[str, str]]:
        """The turns in which the preference shows."""
        if self.form == "explicit":
            return [("user", preference), ("assistant", UNDERSTOOD)]
        told = row.get("conversation")
        if not isinstance(told, Mapping):
            raise DataMissing(f"{at['where']}, row {at['row_number']}: field conversation should be an object")
        if self.form == "choice":
            users = ("query", "user_selection")
            return [("user" if key in users else "assistant", text(told, key, **at)) for key in told]
        turns = []
        for key, turn in told.items():
            if not isinstance(turn, Mapping):
                raise DataMissing(f"{at['where']}, row {at['row_number']}: turn {key} should have user and assistant")
            turns += [("user", text(turn, "user", **at)), ("assistant", text(turn, "assistant", **at))]
        return turns

    def _options(self, topic: str, count: int) -> list[list[str]]:
        path = self._root() / "mcq_options" / f"{topic}.json"
        found: list[list[str]] = []
        for number, row in enumerate(file_rows(path), start=1):
            options = row.get("classification_task_options")
            if not isinstance(options, list) or len(options) != 4 or not all(isinstance(o, str) for o in options):
                raise DataMissing(f"{path}, row {number}: classification_task_options should be four texts")
            found.append(options)
        if len(found) != count:
            raise DataMissing(
                f"{path} has {len(found)} rows, the preferences of {topic} are {count}; are both files whole?"
            )
        return found

    def _between(self) -> list[tuple[str, str]]:
        if not self.turns:
            return []
        path = self._root() / "filtered_inter_turns.json"
        flat: list[tuple[str, str]] = []
        for number, row in enumerate(file_rows(path), start=1):
            turns = row.get("conversation")
            if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
                raise DataMissing(f"{path}, row {number}: field conversation should be a list of turns")
            at: dict[str, Any] = {"where": str(path), "row_number": number}
            flat += [(text(turn, "role", **at), text(turn, "content", empty=True, **at)) for turn in turns]
            if len(flat) >= 2 * self.turns:
                break
        if len(flat) < 2 * self.turns:
            raise DataMissing(f"{path} has {len(flat) // 2} exchanges; turns={self.turns} were asked for")
        return flat[: 2 * self.turns]

    def _root(self) -> Path:
        if self.folder is None:
            raise DataMissing(f"{self.name}: no data given; {GET}")
        for root in (self.folder, self.folder / "benchmark_dataset"):
            if (root / FOLDERS[self.form]).is_dir():
                return root
        raise DataMissing(f"{self.name}: {self.folder} has no {FOLDERS[self.form]}; {GET}")

    def _topics(self) -> list[str]:
        there = sorted(path.stem for path in (self._root() / FOLDERS[self.form]).glob("*.json"))
        if self.topic == "all":
            return there
        if self.topic not in there:
            raise UsageError(
                f"prefeval has no topic {self.topic!r}{did_you_mean(self.topic, there)} it has {', '.join(there)}"
            )
        return [self.topic]

    def _read_files(self) -> list[Path]:
        root = self._root()
        names = [FOLDERS[self.form], *self.beside]
        found = [root / name / f"{topic}.json" for topic in self._topics() for name in names]
        return found + ([root / "filtered_inter_turns.json"] if self.turns else [])


ASKED: Mapping[str, str] = {
    "acknowledged": """Does the answer below say or clearly refer to what its reader likes, dislikes, needs or avoids?

Request: {question}
Answer: {answer}

100: it states such a preference as the user's. 0: it states none, or only in general terms.""",
    "hallucinated": """A user has this preference: {preference}
An assistant answered a later request. Where the answer says what the user likes or avoids, is that another preference than theirs?

Request: {question}
Answer: {answer}

100: what it says of the user's preference contradicts it, or is about something else. 0: it says the same, or says nothing \
of the user's preferences.""",
    "violated": """A user has this preference: {preference}
Does the answer to their request go against it? Judge what is recommended, not what is said about the preference.

Request: {question}
Answer: {answer}

100: at least one recommendation goes against the preference. 0: all of them can be followed by somebody with this preference.""",
    "helpful": """Does the answer give the user something to act on?

Request: {question}
Answer: {answer}

100: it gives recommendations or advice on what was asked. 0: it apologises, says it does not know or remember the user, only \
asks back, or is about something else.""",
}
NUMBER = "\n\nWrite one whole number from 0 to 100 and nothing else, or REFUSAL."
YES = 50.0
NO_JUDGE = "no judge was asked; give --judge, also to 'harness score'"


class PrefEvalGeneration(PrefEval):
    """Answers that keep to a preference the user stated or showed some turns before (PrefEval, read by a judge)."""

    name = "prefeval_generation"
    judged = True
    ranges = dict.fromkeys(("followed", *ASKED), UNIT)
    per_sample = {}
    beside = ()

    def generation(self) -> GenerationDefaults:
        return GenerationDefaults(max_new_tokens=WORDS)

    def respond(self, system: System, items: Sequence[Labelled]) -> Iterator[Sample]:
        kept = {item.example.id: item for item in items}
        for sample in system.respond([item.example for item in items]):
            item = kept[sample.id]
            about = {"preference": item.targets[0], "question": item.example.query}
            yield replace(sample, targets=item.targets, extra={**sample.extra, **about})

    def to_judge(self, sample: Sample) -> Mapping[str, Question]:
        words = {"answer": sample.response or "", **{k: str(sample.extra[k]) for k in ("preference", "question")}}
        return {name: Question(_filled(prompt, words) + NUMBER, words["answer"]) for name, prompt in ASKED.items()}

    def grade(self, sample: Sample) -> Sample:
        """`followed` is the paper's accuracy: helpful, and no recommendation goes against the preference."""
        if sample.response is None or sample.error is not None:
            return sample
        scores = {name: sample.ratings[name].score if name in sample.ratings else None for name in ASKED}
        said = {name: None if score is None else float(score >= YES) for name, score in scores.items()}
        violated, helpful = said["violated"], said["helpful"]
        followed = None if violated is None or helpful is None else float(helpful == 1 and violated == 0)
        return replace(sample, parsed=sample.response.strip() or None, metrics={"followed": followed, **said})

    def aggregate(self, samples: Sequence[Sample]) -> Mapping[str, Metric]:
        graded = [sample for sample in samples if sample.metrics]
        found = {name: _rated(own, "followed") for name, own in by_topic("followed", graded).items()}
        return {**found, **{name: _rated(graded, name, name in ("acknowledged", "helpful")) for name in ASKED}}

    def _asked(self, question: str, options: Sequence[str]) -> str:
        return f"{question}{REMINDER if self.remind else ''} (Please respond within {WORDS} words.)"

    def _options(self, topic: str, count: int) -> list[list[str]]:
        return []

    def _gold(self, example: Example, preference: str, letter: str) -> Labelled:
        return Labelled(example, (preference,))


def by_topic(name: str, graded: Sequence[Sample]) -> dict[str, list[Sample]]:
    """All samples, and where there are several topics those of each: metric -> samples."""
    topics = sorted({sample.id.rpartition("/")[0] for sample in graded})
    found = {name: list(graded)}
    if len(topics) > 1:
        found |= {f"{name}/{t}": [s for s in graded if s.id.rpartition("/")[0] == t] for t in topics}
    return found


def _rated(graded: Sequence[Sample], name: str, higher: bool = True) -> Metric:
    rated = [sample for sample in graded if sample.metrics[name] is not None]
    left = len(graded) - len(rated)
    note = "" if not left else NO_JUDGE if not rated else f"{left} of {len(graded)} have no rating and are left out"
    if left and not rated:
        return Metric(None, 0, higher_is_better=higher, note=note)
    return replace(metrics.mean(rated, name, note=note, bounds=UNIT), higher_is_better=higher)


def _filled(prompt: str, words: Mapping[str, str]) -> str:
    """The words in their places; braces of theirs are no places."""
    return re.sub(r"\{(preference|question|answer)\}", lambda found: words[found[1]], prompt)
