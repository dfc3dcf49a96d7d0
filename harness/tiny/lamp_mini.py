"""lamp-mini: synthetic users in LaMP's official shape, made from a seed, so the harness can be tried with no download.

Shape: LaMP (Salemi et al., ACL 2024); inputs are built from the official frames in `harness.tasks.lamp_prompts`.
Every user has habits (opening and closing words, order, word choice, punctuation, tags, rating bias, research field)
that show in the history and in the gold answer and never in the input. Each habit is drawn uniformly and independently
of the input's content, so another user's history is worth as much as a guess.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from random import Random
from typing import Literal, NamedTuple

from harness.files import replace_file
from harness.tasks.lamp_prompts import FRAMES, LABELS

Split = Literal["train", "dev", "test"]

TASKS = ("lamp1", "lamp2m", "lamp2n", "lamp3", "lamp4", "lamp5", "lamp6", "lamp7")
USERS: Mapping[Split, int] = {"train": 600, "dev": 200, "test": 200}
FOLDERS: Mapping[str, str] = {task: "LaMP_" + task[4:].upper() for task in TASKS}

_FIRST_ID: Mapping[str, int] = {"train": 10_000, "dev": 20_000, "test": 30_000}
_STREAM_ID = 1_000_000
_LONG_SHARE = 0.1
"""Share of users with a long history of longer texts."""


class Case(NamedTuple):
    """One user's question in LaMP's shape, with its gold answer."""

    question: dict
    gold: dict


def load(task: str, split: Split) -> tuple[list[dict], list[dict]]:
    """The questions and golds of a split; one question a user, users of different splits are disjoint."""
    if task not in TASKS:
        raise ValueError(f"lamp-mini has no task {task!r}; it has {', '.join(TASKS)}")
    if split not in USERS:
        raise ValueError(f"lamp-mini has no split {split!r}; it has {', '.join(USERS)}")
    cases = [case(task, split, index) for index in range(USERS[split])]
    return [made.question for made in cases], [made.gold for made in cases]


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


def case(task: str, stream: str, index: int) -> Case:
    """User number `index` of a stream; the streams "train", "dev" and "test" are the splits, any other name is endless."""
    habits, content = Random(f"{task}/{stream}/{index}/habits"), Random(f"{task}/{stream}/{index}/content")
    number = _FIRST_ID.get(stream, _STREAM_ID) + index
    long = content.random() < _LONG_SHARE
    size = content.randint(20, 35) if long else content.randint(3, 12)
    author = _AUTHORS[task](task, habits)
    items = [author.item(content, long) for _ in range(size)]
    text, output = author.question(content, long, items)
    day = date(2014, 1, 1) + timedelta(days=content.randrange(1500))
    profile = []
    for place, fields in enumerate(items):
        profile.append({**fields, "id": f"{number}{place:03d}", "date": day.isoformat()})
        day += timedelta(days=content.randint(1, 60))
    question = {"id": f"{number}0", "input": text, "user_id": str(number), "profile": profile}
    return Case(question, {"id": f"{number}0", "output": output})


# Writing tasks: a short text becomes opener + body + closer.


@dataclass(frozen=True)
class Genre:
    """What a writing task's texts and titles are made of."""

    source: tuple[str, ...]
    bodies: tuple[str, ...]
    """Word orders; one is a user's habit."""
    slots: Mapping[str, tuple[str, ...]]
    choices: Mapping[str, tuple[str, ...]]
    """A plain word of the source and its synonyms; the column is a user's habit. Slot `verb` draws from the keys."""
    openers: tuple[str, ...]
    closers: tuple[str, ...]
    marks: tuple[str, ...] = (":", ",", "!", " -")


class Writer:
    """A user who writes headlines, titles, subjects or tweets."""

    def __init__(self, task: str, habits: Random) -> None:
        self.task, self.genre = task, GENRES[task]
        self.opener, self.closer = habits.choice(self.genre.openers), habits.choice(self.genre.closers)
        self.mark, self.body = habits.choice(self.genre.marks), habits.choice(self.genre.bodies)
        self.column = habits.randrange(3)

    def pair(self, content: Random, long: bool) -> tuple[str, str]:
        """A text and this user's title for it."""
        words = {slot: content.choice(values) for slot, values in self.genre.slots.items()}
        plain = content.choice(tuple(self.genre.choices))
        text = content.choice(self.genre.source).format_map({**words, "verb": plain})
        if long:
            text = " ".join([text, *content.sample(FILLERS, content.randint(1, 3))])
        body = self.body.format_map({**words, "verb": self.genre.choices[plain][self.column]})
        return text, f"{self.opener}{self.mark} {body}{self.closer}"

    def item(self, content: Random, long: bool) -> dict[str, str]:
        text, title = self.pair(content, long)
        if self.task == "lamp7":
            return {"text": title}
        return {"title": title, "abstract" if self.task == "lamp5" else "text": text}

    def question(self, content: Random, long: bool, items: Sequence[dict]) -> tuple[str, str]:
        text, title = self.pair(content, long)
        return FRAMES[self.task].format(text=text), title


class Tagger:
    """A user with a favourite label for each topic; several labels fit, only the history tells which is used."""

    def __init__(self, task: str, habits: Random) -> None:
        self.task, self.topics = task, TOPICS[task]
        self.favourite = {topic: habits.choice(topic.labels) for topic in self.topics}

    def about(self, content: Random, long: bool, topic: Topic) -> tuple[str, str]:
        cues = content.sample(topic.cues, 2)
        text = content.choice(TAG_TEXTS[self.task]).format(*cues, place=content.choice(PLACES))
        if long:
            text = " ".join([text, *content.sample(FILLERS, content.randint(1, 3))])
        return text, f"The {cues[0]} {content.choice(PLACES)}"

    def item(self, content: Random, long: bool) -> dict[str, str]:
        topic = content.choice(self.topics)
        text, title = self.about(content, long, topic)
        if self.task == "lamp2m":
            return {"description": text, "tag": self.favourite[topic]}
        return {"text": text, "title": title, "category": self.favourite[topic]}

    def question(self, content: Random, long: bool, items: Sequence[dict]) -> tuple[str, str]:
        label = "tag" if self.task == "lamp2m" else "category"
        shown = {item[label] for item in items}
        topic = content.choice([topic for topic in self.topics if self.favourite[topic] in shown])
        text, _ = self.about(content, long, topic)
        return FRAMES[self.task].format(labels=", ".join(LABELS[self.task]), text=text), self.favourite[topic]


class Rater:
    """A user who rates everything one higher, one lower, or as it is."""

    def __init__(self, task: str, habits: Random) -> None:
        self.bias = habits.choice((-1, 0, 1))

    def item(self, content: Random, long: bool) -> dict[str, str]:
        level = content.choice((-1, 0, 1))
        first, second = content.sample(FEELINGS[level], 2)
        text = content.choice(REVIEWS).format(content.choice(GOODS), first, second)
        if long:
            text = " ".join([text, *content.sample(FILLERS, content.randint(1, 3))])
        return {"text": text, "score": str(3 + level + self.bias)}

    def question(self, content: Random, long: bool, items: Sequence[dict]) -> tuple[str, str]:
        made = self.item(content, long)
        return FRAMES["lamp3"].format(text=made["text"]), made["score"]


class Scholar:
    """An author who works in one field and cites it under titles that do not name it."""

    def __init__(self, task: str, habits: Random) -> None:
        self.field = habits.randrange(len(FIELDS_OF_STUDY))

    def item(self, content: Random, long: bool) -> dict[str, str]:
        first, second = content.sample(FIELDS_OF_STUDY[self.field], 2)
        abstract = f"We study {first} and {second} in a simple way."
        if long:
            abstract = " ".join([abstract, *content.sample(FILLERS, content.randint(1, 3))])
        return {"title": content.choice(PAPER_TITLES).format(first, second), "abstract": abstract}

    def question(self, content: Random, long: bool, items: Sequence[dict]) -> tuple[str, str]:
        other = (self.field + content.randrange(1, len(FIELDS_OF_STUDY))) % len(FIELDS_OF_STUDY)
        related, unrelated = (
            content.choice(PAPER_TITLES).format(*content.sample(FIELDS_OF_STUDY[field], 2))
            for field in (self.field, other)
        )
        output = content.choice(LABELS["lamp1"])
        first, second = (related, unrelated) if output == "[1]" else (unrelated, related)
        return FRAMES["lamp1"].format(title=content.choice(BARE_TITLES), first=first, second=second), output


_AUTHORS: Mapping[str, type[Writer] | type[Tagger] | type[Rater] | type[Scholar]] = {
    "lamp1": Scholar, "lamp2m": Tagger, "lamp2n": Tagger, "lamp3": Rater,
    "lamp4": Writer, "lamp5": Writer, "lamp6": Writer, "lamp7": Writer,
}  # fmt: skip


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PLACES = _words("village valley coast island city river forest hill lake town")
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
PEOPLE = _words(
    "baker farmer teacher doctor painter mayor pilot singer judge sailor nurse coach writer gardener driver chef "
    "tailor miner actor dancer"
)
GOODS = _words("lamp chair phone jacket kettle camera bike tent clock radio knife table bag guitar mug blanket")
FILLERS = (
    "It rained all morning.", "Many people came to look.", "Nobody had planned it that way.",
    "There was time for a second try.", "The rest will follow soon.", "We will see what comes of it.",
    "Some of it was new to us.", "The weather stayed warm.",
)  # fmt: skip

FIELDS_OF_STUDY = tuple(
    _words(row)
    for row in (
        "graphs nodes edges paths trees networks",
        "images pixels cameras videos faces scenes",
        "speech voices sounds accents music noise",
        "robots arms wheels sensors motors drones",
        "patients cells drugs genes nurses clinics",
        "attacks keys passwords secrets leaks viruses",
        "words sentences grammars stories poems verbs",
        "prices banks taxes loans traders auctions",
        "storms oceans clouds winds glaciers floods",
        "tables queries records indexes disks joins",
    )
)
PAPER_TITLES = ("Learning {} from {}", "Fast {} and {}", "A model of {} with {}", "Better {} for {}")
BARE_TITLES = (
    "A short note on new methods", "Some simple results", "An idea and its limits", "More on an old question",
    "What we learned this year", "A second look",
)  # fmt: skip

FEELINGS: Mapping[int, tuple[str, ...]] = {
    -1: _words("weak dull messy slow broken noisy"),
    0: _words("plain usual average fair normal common"),
    1: _words("bright lovely strong neat smooth great"),
}
REVIEWS = ("The {} was {} and {}.", "I bought this {} and it felt {} and {}.", "My {} is {} and also {}.")


@dataclass(frozen=True)
class Topic:
    """Words that show a topic, and the labels a user may give it."""

    labels: tuple[str, ...]
    cues: tuple[str, ...]


TOPICS: Mapping[str, tuple[Topic, ...]] = {
    "lamp2m": (
        Topic(("sci-fi", "dystopia", "fantasy"), _words("rocket dragon planet wizard robot galaxy")),
        Topic(("romance", "based on a book", "classic"), _words("wedding letter ballroom summer kiss duchess")),
        Topic(("action", "violence", "true story"), _words("soldier chase battle sword prison boxer")),
        Topic(("comedy", "dark comedy", "social commentary"), _words("clown neighbor joke party office prank")),
        Topic(("psychology", "twist ending", "thought-provoking"), _words("dream memory mirror secret puzzle shadow")),
    ),
    "lamp2n": (
        Topic(("food & drink", "healthy living", "style & beauty"), _words("soup salad yoga perfume juice bread")),
        Topic(("politics", "crime", "business"), _words("senate bribe budget court election bank")),
        Topic(("education", "science & technology", "parents"), _words("school child laptop homework lab lesson")),
        Topic(("travel", "sports", "entertainment"), _words("beach stadium concert ticket tour match")),
        Topic(("religion", "culture & arts", "women"), _words("choir museum prayer statue heritage poet")),
    ),
}
TAG_TEXTS: Mapping[str, tuple[str, ...]] = {
    "lamp2m": (
        "The {} and the {} in the {place}.",
        "One {} meets the {} near the {place}.",
        "One {}, one {} and the {place}.",
    ),
    "lamp2n": (
        "The {} and the {} in the {place}.",
        "One {} next to the {} near the {place}.",
        "One {}, one {} in the {place}.",
    ),
}

GENRES: Mapping[str, Genre] = {
    "lamp4": Genre(
        source=("On {day} our {who} {verb} this {what} near {place}.", "News from {place}: our {who} {verb} this {what} on {day}."),
        bodies=("our {who} {verb} this {what}", "this {what} our {who} {verb}"),
        slots={
            "who": PEOPLE, "place": PLACES, "day": DAYS,
            "what": _words(
                "bridge museum library market school garden theater harbor bakery station gallery stadium tower park "
                "factory hotel farm studio kitchen boat"
            ),
        },
        choices={
            "opened": ("opens", "unveils", "launches"), "bought": ("buys", "acquires", "gets"),
            "fixed": ("fixes", "repairs", "mends"), "closed": ("closes", "shuts", "ends"),
            "found": ("finds", "discovers", "spots"), "praised": ("praises", "applauds", "hails"),
        },
        openers=(
            "Breaking news", "Just in", "Local report", "Good morning", "Big surprise", "Quick look", "Inside scoop",
            "Fresh update", "Hear this", "Top pick", "Daily brief", "Must read", "Hot take", "True tale", "Only here",
            "Front page",
        ),
        closers=(
            ", full story", ", what next", ", in photos", ", experts say", ", at last", ", once again", ", no kidding",
            ", stay tuned", ", who knew", ", they claim", ", sources confirm", ", see why", ", live now", ", five facts",
            ", our view", ", never before",
        ),
    ),
    "lamp5": Genre(
        source=("We {verb} about {topic} using {method} and {data}.", "Given {data}, using {method} we {verb} about {topic}."),
        bodies=("{verb} about {topic} using {method}", "using {method} {verb} about {topic}"),
        slots={
            "topic": tuple(word for row in FIELDS_OF_STUDY for word in row[:3]),
            "method": _words("kernels transformers sampling search voting clustering pruning forests filters games"),
            "data": _words("surveys logs maps sketches diaries"),
        },
        choices={
            "learn": ("learning", "studying", "reading"), "reason": ("reasoning", "arguing", "debating"),
            "ask": ("asking", "wondering", "questioning"), "talk": ("talking", "speaking", "chatting"),
            "think": ("thinking", "musing", "pondering"),
        },
        openers=(
            "Towards clarity", "Deep insight", "First steps", "Less is", "Beyond limits", "Open problems", "Think twice",
            "Small wonders", "Back home", "Hidden gems", "Lost causes", "Strange loops", "Common sense", "New horizons",
            "Plain facts", "Bold claims",
        ),
        closers=(
            ": case analysis", ": unified framework", ": empirical evidence", ": critical review", ": extended abstract",
            ": practical guide", ": formal proof", ": pilot experiment", ": lessons learned", ": field report",
            ": early findings", ": technical memo", ": position paper", ": worked example", ": large benchmark",
            ": brief survey",
        ),
    ),
    "lamp6": Genre(
        source=("Hi {name}, please {verb} this {what} before {day}. Thanks.", "Dear {name}, before {day} we must {verb} this {what}."),
        bodies=("{verb} this {what} before {day}", "before {day} {verb} this {what}"),
        slots={
            "name": _words("Anna Ben Clara David Emma Frank Grace Henry"), "day": DAYS,
            "what": _words(
                "budget slides contract invoice agenda report poster schedule draft menu printer badge form plan list quote"
            ),
        },
        choices={
            "send": ("send", "forward", "share"), "check": ("check", "review", "verify"),
            "sign": ("sign", "approve", "confirm"), "change": ("change", "edit", "update"), "print": ("print", "copy", "issue"),
        },
        openers=(
            "Action required", "Gentle reminder", "Hello team", "Urgent request", "Weekly sync", "Heads up", "Follow through",
            "Friendly ping", "Your input", "Task alert", "Note well", "Dear all", "Last call", "Final notice", "Small favor",
            "Time check",
        ),
        closers=(
            " (many thanks)", " (kind regards)", " (no rush)", " (by phone)", " (internal use)", " (version two)",
            " (please reply)", " (with cheers)", " (top secret)", " (as discussed)", " (read only)", " (best wishes)",
            " (again sorry)", " (quick win)", " (high priority)", " (team blue)",
        ),
    ),
    "lamp7": Genre(
        source=("i {verb} this {what} with my {who} {when}", "{when} my {who} and i {verb} this {what}"),
        bodies=("i {verb} this {what} with my {who}", "my {who} and i {verb} this {what}"),
        slots={
            "who": _words("sister brother friend cousin boss uncle aunt mother father roommate"),
            "what": _words("coffee movie song pizza game train beach puppy rain cake book show soup bike sunset tea"),
            "when": _words("today tonight yesterday again now"),
        },
        choices={
            "like": ("love", "adore", "enjoy"), "hate": ("loathe", "despise", "detest"), "want": ("need", "crave", "desire"),
            "miss": ("skip", "forget", "lose"), "see": ("watch", "notice", "spy"),
        },
        openers=(
            "omg guys", "lol okay", "honestly folks", "well well", "dear diary", "not gonna", "yo peeps", "real talk",
            "oh boy", "hey world", "fun fact", "mood today", "wow just", "listen up", "ok so", "plot twist",
        ),
        closers=(
            " #blessed life", " #sorry notsorry", " haha yes", " so there", " end rant", " #good vibes", " sigh forever",
            " #monday feels", " just saying", " #weekend mode", " send help", " over here", " #tiny joys", " yay me",
            " #no filter", " peace out",
        ),
    ),
}  # fmt: skip
