"""lamp-mini: synthetic users in LaMP's official shape, made from a seed, so the harness can be tried with no download.

Shape: LaMP (Salemi et al., ACL 2024); inputs are built from the official frames in `harness.tasks.lamp_prompts`.
Every user has habits (opening and closing words, order, word choice, punctuation, tags, rating bias, research field)
that show in the history and in the gold answer and never in the input. Habits slip, drift and are shared by groups, and
most of a history is beside the point of a question: `harness.tiny.population` says how much, `harness.tiny.oracle` what
can be reached. Version 2; in version 1 a habit was never broken, so five items told everything.
"""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from datetime import date, timedelta
from itertools import product
from pathlib import Path
from random import Random
from typing import ClassVar, Literal, NamedTuple

from harness.files import replace_file
from harness.tasks.lamp_prompts import FRAMES, LABELS
from harness.tiny.population import SPLITS, Crowd, Habits, Population, Shown
from harness.tiny.words import (
    BARE_TITLES,
    FEELINGS,
    FIELDS_OF_STUDY,
    FILLERS,
    GENRES,
    GOODS,
    PAPER_TITLES,
    PLACES,
    REVIEWS,
    TAG_TEXTS,
    TOPICS,
    Topic,
)  # fmt: skip

Split = Literal["train", "dev", "test"]

TASKS = ("lamp1", "lamp2m", "lamp2n", "lamp3", "lamp4", "lamp5", "lamp6", "lamp7")
USERS: Mapping[Split, int] = {"train": 600, "dev": 200, "test": 200}
FOLDERS: Mapping[str, str] = {task: "LaMP_" + task[4:].upper() for task in TASKS}

_FIRST_ID: Mapping[str, int] = {"train": 10_000, "dev": 20_000, "test": 30_000}
_STREAM_ID = 1_000_000

Beliefs = Callable[[str], Sequence[float]]
"""How likely each value of a habit is to show in the gold."""


class Case(NamedTuple):
    """One user's question in LaMP's shape with its gold answer, and what the generator knows about them."""

    question: dict
    gold: dict
    author: Author
    shown: tuple[Shown, ...]
    """What each item of the profile shows of the habits."""


def load(task: str, split: Split) -> tuple[list[dict], list[dict]]:
    """The questions and golds of a split; one question a user, users of different splits are disjoint."""
    if task not in TASKS:
        raise ValueError(f"lamp-mini has no task {task!r}; it has {', '.join(TASKS)}")
    if split not in USERS:
        raise ValueError(f"lamp-mini has no split {split!r}; it has {', '.join(USERS)}")
    cases = [case(task, split, index) for index in range(USERS[split])]
    return [made.question for made in cases], [made.gold for made in cases]


def find(task: str, ident: str) -> Case:
    """The case of a question's id in any split."""
    number = int(ident[:-1])
    split = max((name for name in USERS if _FIRST_ID[name] <= number), key=_FIRST_ID.__getitem__)
    return case(task, split, number - _FIRST_ID[split])


def write(folder: Path) -> None:
    """Writes LaMP's official files, `{folder}/LaMP_4/dev/dev_questions.json` and `dev_outputs.json`, for all tasks."""
    for task in TASKS:
        for split in USERS:
            questions, golds = load(task, split)
            target = Path(folder) / FOLDERS[task] / split
            target.mkdir(parents=True, exist_ok=True)
            outputs = {"task": FOLDERS[task], "golds": golds}
            replace_file(target / f"{split}_questions.json", json.dumps(questions, indent=1).encode())
            replace_file(target / f"{split}_outputs.json", json.dumps(outputs, indent=1).encode())


def case(task: str, stream: str, index: int, population: Population = SPLITS) -> Case:
    """User number `index` of a stream; the streams "train", "dev" and "test" are the splits, any other name is endless."""
    rng, content = Random(f"{task}/{stream}/{index}/habits"), Random(f"{task}/{stream}/{index}/content")
    number = _FIRST_ID.get(stream, _STREAM_ID) + index
    fewest, most = population.items
    size = math.floor(math.exp(content.uniform(math.log(fewest), math.log(most + 1))))
    author = _AUTHORS[task](task, population, Habits(Crowd(task, population), rng, size))
    author.long = content.random() < population.long
    items = [author.item(content, place) for place in range(size)]
    text, output = author.question(content, [shown for _, shown in items])
    day = date(2014, 1, 1) + timedelta(days=content.randrange(1500))
    profile = []
    for place, (fields, _) in enumerate(items):
        profile.append({**fields, "id": f"{number}{place:03d}", "date": day.isoformat()})
        day += timedelta(days=content.randint(1, 60))
    question = {"id": f"{number}0", "input": text, "user_id": str(number), "profile": profile}
    return Case(question, {"id": f"{number}0", "output": output}, author, tuple(shown for _, shown in items))


class Author(ABC):
    """A user: writes the items and the question's gold."""

    long: bool = False
    best: Callable[[Beliefs], str]
    """The answer to the question of highest expected score, given what is believed about the habits; set by `question`."""
    asked: frozenset[str]
    """Habits that the gold depends on; set by `question`."""

    def __init__(self, task: str, population: Population, habits: Habits) -> None:
        self.task, self.population, self.habits = task, population, habits

    @abstractmethod
    def item(self, content: Random, place: int) -> tuple[dict[str, str], Shown]:
        """Item number `place` of the history, and what it shows of the habits."""

    @abstractmethod
    def question(self, content: Random, shown: Sequence[Shown]) -> tuple[str, str]:
        """Input and gold, on something the history shows a habit of."""

    def padded(self, content: Random, text: str) -> str:
        return " ".join([text, *content.sample(FILLERS, content.randint(1, 3))]) if self.long else text

    def act(self, content: Random, names: Sequence[str], place: int) -> Shown:
        return {name: self.habits.act(content, name, place) for name in names}


class Writer(Author):
    """Writes headlines, titles, subjects or tweets: opener + body + closer. Opener and closer go with the theme."""

    WHEREVER: ClassVar = ("mark", "body", "column")

    def __init__(self, task: str, population: Population, habits: Habits) -> None:
        super().__init__(task, population, habits)
        self.genre = GENRES[task]
        for theme in range(population.themes):
            habits.draw(f"opener {theme}", len(self.genre.openers))
            habits.draw(f"closer {theme}", len(self.genre.closers))
        for name, values in zip(self.WHEREVER, (len(self.genre.marks), len(self.genre.bodies), 3), strict=True):
            habits.draw(name, values)

    def source(self, content: Random, theme: int) -> tuple[str, dict[str, str]]:
        """A text on a theme, and its words."""
        words = {slot: content.choice(values) for slot, values in self.genre.slots.items()}
        subject = self.genre.subject
        words[subject] = content.choice(_part(self.genre.slots[subject], theme, self.population.themes))
        words["verb"] = content.choice(tuple(self.genre.choices))
        return self.padded(content, content.choice(self.genre.source).format_map(words)), words

    def title(
        self, words: Mapping[str, str], opener: int | None, closer: int | None, wherever: Mapping[str, int]
    ) -> str:
        genre, verb = self.genre, self.genre.choices[words["verb"]][wherever["column"]]
        body = genre.bodies[wherever["body"]].format_map({**words, "verb": verb})
        head = "" if opener is None else f"{genre.openers[opener]}{genre.marks[wherever['mark']]} "
        return f"{head}{body}{'' if closer is None else genre.closers[closer]}"

    def names(self, theme: int) -> tuple[str, ...]:
        return f"opener {theme}", f"closer {theme}", *self.WHEREVER

    def pair(self, content: Random, theme: int, place: int) -> tuple[str, str, dict[str, str], Shown]:
        text, words = self.source(content, theme)
        shown = self.act(content, self.names(theme), place)
        title = self.title(words, shown[f"opener {theme}"], shown[f"closer {theme}"], shown)
        return text, title, words, shown

    def item(self, content: Random, place: int) -> tuple[dict[str, str], Shown]:
        text, title, _, shown = self.pair(content, content.randrange(self.population.themes), place)
        if self.task == "lamp7":
            return {"text": title}, shown
        return {"title": title, "abstract" if self.task == "lamp5" else "text": text}, shown

    def question(self, content: Random, shown: Sequence[Shown]) -> tuple[str, str]:
        theme = content.choice(
            [t for t in range(self.population.themes) if any(f"opener {t}" in item for item in shown)]
        )
        text, title, words, _ = self.pair(content, theme, self.habits.size)
        self.asked = frozenset(self.names(theme))

        def best(beliefs: Beliefs) -> str:
            """Of the likeliest phrases those that raise expected ROUGE-1: 2 x words in common / (words of both titles)."""
            likely = {name: max(range(len(p)), key=p.__getitem__) for name in self.asked for p in [beliefs(name)]}
            opener, closer, most = likely[f"opener {theme}"], likely[f"closer {theme}"], len(_tokens(title))

            def expected(with_opener: bool, with_closer: bool) -> float:
                phrases = (
                    with_opener * beliefs(f"opener {theme}")[opener] + with_closer * beliefs(f"closer {theme}")[closer]
                )
                base = most - 4  # an opener has two words, and so has a closer; one word of the body is the synonym
                common = base - 1 + beliefs("column")[likely["column"]] + 2 * phrases
                return 2 * common / (most + base + 2 * with_opener + 2 * with_closer)

            chosen = max(product((True, False), repeat=2), key=lambda included: expected(*included))
            return self.title(words, opener if chosen[0] else None, closer if chosen[1] else None, likely)

        self.best = best
        return FRAMES[self.task].format(text=text), title


class Tagger(Author):
    """Has a favourite label for each topic; several labels fit, only the history tells which is used."""

    def __init__(self, task: str, population: Population, habits: Habits) -> None:
        super().__init__(task, population, habits)
        self.topics = TOPICS[task]
        for number, topic in enumerate(self.topics):
            habits.draw(f"topic {number}", len(topic.labels))

    def about(self, content: Random, topic: Topic) -> tuple[str, str]:
        """A text and a title; the first cue is of the topic, the second of another one in passing, at times."""
        first, second = content.sample(topic.cues, 2)
        if content.random() < self.population.passing:
            second = content.choice(content.choice([other for other in self.topics if other != topic]).cues)
        text = content.choice(TAG_TEXTS[self.task]).format(first, second, place=content.choice(PLACES))
        return self.padded(content, text), f"The {first} {content.choice(PLACES)}"

    def item(self, content: Random, place: int) -> tuple[dict[str, str], Shown]:
        number = content.randrange(len(self.topics))
        text, title = self.about(content, self.topics[number])
        shown = self.act(content, [f"topic {number}"], place)
        label = self.topics[number].labels[shown[f"topic {number}"]]
        if self.task == "lamp2m":
            return {"description": text, "tag": label}, shown
        return {"text": text, "title": title, "category": label}, shown

    def question(self, content: Random, shown: Sequence[Shown]) -> tuple[str, str]:
        name = content.choice(sorted({name for item in shown for name in item}))
        topic = self.topics[int(name.removeprefix("topic "))]
        text, _ = self.about(content, topic)
        self.asked = frozenset({name})
        self.best = lambda beliefs: topic.labels[max(range(len(topic.labels)), key=beliefs(name).__getitem__)]
        labels = ", ".join(LABELS[self.task])
        return FRAMES[self.task].format(labels=labels, text=text), topic.labels[
            self.habits.act(content, name, self.habits.size)
        ]


class Rater(Author):
    """Rates the goods of a theme one higher, one lower, or as they are."""

    def __init__(self, task: str, population: Population, habits: Habits) -> None:
        super().__init__(task, population, habits)
        for theme in range(population.themes):
            habits.draw(f"bias {theme}", 3)

    def review(self, content: Random, theme: int, place: int) -> tuple[str, int, Shown]:
        level = content.choice((-1, 0, 1))
        first, second = content.sample(FEELINGS[level], 2)
        text = content.choice(REVIEWS).format(
            content.choice(_part(GOODS, theme, self.population.themes)), first, second
        )
        return self.padded(content, text), level, self.act(content, [f"bias {theme}"], place)

    def item(self, content: Random, place: int) -> tuple[dict[str, str], Shown]:
        theme = content.randrange(self.population.themes)
        text, level, shown = self.review(content, theme, place)
        return {"text": text, "score": str(2 + level + shown[f"bias {theme}"])}, shown

    def question(self, content: Random, shown: Sequence[Shown]) -> tuple[str, str]:
        name = content.choice(sorted({name for item in shown for name in item}))
        text, level, gold = self.review(content, int(name.removeprefix("bias ")), self.habits.size)
        self.asked = frozenset({name})

        def best(beliefs: Beliefs) -> str:
            error = [sum(p * abs(bias - other) for other, p in enumerate(beliefs(name))) for bias in range(3)]
            return str(2 + level + min(range(3), key=error.__getitem__))

        self.best = best
        return FRAMES["lamp3"].format(text=text), str(2 + level + gold[name])


class Scholar(Author):
    """Works with half of the words of a field and cites under titles that hold one of them and do not name the field."""

    def __init__(self, task: str, population: Population, habits: Habits) -> None:
        super().__init__(task, population, habits)
        habits.draw("field", 2 * len(FIELDS_OF_STUDY))

    def item(self, content: Random, place: int) -> tuple[dict[str, str], Shown]:
        shown = self.act(content, ["field"], place)
        first, second = content.sample(_field_words(shown["field"]), 2)
        abstract = self.padded(content, f"We study {first} and {second} in a simple way.")
        return {"title": content.choice(PAPER_TITLES).format(first, second), "abstract": abstract}, shown

    def question(self, content: Random, shown: Sequence[Shown]) -> tuple[str, str]:
        own = self.habits.now("field")
        other = (own + 2 * content.randrange(1, len(FIELDS_OF_STUDY))) % (2 * len(FIELDS_OF_STUDY))
        cited, left = (own, other) if content.random() >= self.habits.slip else (other, own)
        output = content.choice(LABELS["lamp1"])
        fields = (cited, left) if output == "[1]" else (left, cited)
        first, second = (content.choice(PAPER_TITLES).format(*content.sample(_field_words(f), 2)) for f in fields)
        self.asked = frozenset({"field"})
        self.best = lambda beliefs: LABELS["lamp1"][beliefs("field")[fields[1]] > beliefs("field")[fields[0]]]
        return FRAMES["lamp1"].format(title=content.choice(BARE_TITLES), first=first, second=second), output


_AUTHORS: Mapping[str, type[Author]] = {
    "lamp1": Scholar, "lamp2m": Tagger, "lamp2n": Tagger, "lamp3": Rater,
    "lamp4": Writer, "lamp5": Writer, "lamp6": Writer, "lamp7": Writer,
}  # fmt: skip


def _part(words: Sequence[str], number: int, parts: int) -> Sequence[str]:
    """Part `number` of the words cut into equal parts."""
    return words[len(words) * number // parts : len(words) * (number + 1) // parts]


def _field_words(field: int) -> Sequence[str]:
    """Three words: half of a field's."""
    return _part(FIELDS_OF_STUDY[field // 2], field % 2, 2)


def _tokens(text: str) -> list[str]:
    """As ROUGE counts words."""
    return re.findall(r"[a-z0-9]+", text.lower())
