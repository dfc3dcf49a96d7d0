"""The words of lamp-mini's texts: what its users write about, and the phrases and labels that are their habits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PLACES = _words("village valley coast island city river forest hill lake town")
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
PEOPLE = _words(
    "baker farmer teacher doctor painter mayor pilot singer judge sailor nurse coach writer gardener driver chef "
    "tailor miner actor dancer"
)
GOODS = _words("phone camera radio clock kettle knife mug lamp chair table blanket guitar jacket bike tent bag")
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


@dataclass(frozen=True)
class Genre:
    """What a writing task's texts and titles are made of."""

    source: tuple[str, ...]
    bodies: tuple[str, ...]
    """Word orders; one is a user's habit."""
    slots: Mapping[str, tuple[str, ...]]
    choices: Mapping[str, tuple[str, ...]]
    """A plain word of the source and its synonyms; the column is a user's habit. Slot `verb` draws from the keys."""
    subject: str
    """The slot whose word tells a text's theme: its words are the themes' in equal parts, in order."""
    openers: tuple[str, ...]
    closers: tuple[str, ...]
    marks: tuple[str, ...] = (":", ",", "!", " -")


GENRES: Mapping[str, Genre] = {
    "lamp4": Genre(
        source=("On {day} our {who} {verb} this {what} near {place}.", "News from {place}: our {who} {verb} this {what} on {day}."),
        bodies=("our {who} {verb} this {what}", "this {what} our {who} {verb}"),
        slots={
            "who": PEOPLE, "place": PLACES, "day": DAYS,
            "what": _words("museum theater market factory garden harbor school stadium"),
        },
        choices={
            "opened": ("opens", "unveils", "launches"), "bought": ("buys", "acquires", "gets"),
            "fixed": ("fixes", "repairs", "mends"), "closed": ("closes", "shuts", "ends"),
            "found": ("finds", "discovers", "spots"), "praised": ("praises", "applauds", "hails"),
        },
        subject="what",
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
            "topic": tuple(word for row in FIELDS_OF_STUDY[:8:2] for word in row[:2]),
            "method": _words("kernels transformers sampling search voting clustering pruning forests filters games"),
            "data": _words("surveys logs maps sketches diaries"),
        },
        choices={
            "learn": ("learning", "studying", "reading"), "reason": ("reasoning", "arguing", "debating"),
            "ask": ("asking", "wondering", "questioning"), "talk": ("talking", "speaking", "chatting"),
            "think": ("thinking", "musing", "pondering"),
        },
        subject="topic",
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
            "what": _words("budget invoice agenda slides report draft printer badge"),
        },
        choices={
            "send": ("send", "forward", "share"), "check": ("check", "review", "verify"),
            "sign": ("sign", "approve", "confirm"), "change": ("change", "edit", "update"), "print": ("print", "copy", "issue"),
        },
        subject="what",
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
            "what": _words("coffee pizza movie song beach sunset train bike"),
            "when": _words("today tonight yesterday again now"),
        },
        choices={
            "like": ("love", "adore", "enjoy"), "hate": ("loathe", "despise", "detest"), "want": ("need", "crave", "desire"),
            "miss": ("skip", "forget", "lose"), "see": ("watch", "notice", "spy"),
        },
        subject="what",
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
