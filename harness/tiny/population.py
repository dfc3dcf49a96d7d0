"""Who lamp-mini's users are: how habits are shared, broken and given up. Each property is one number of a `Population`.

A habit is a choice among values, such as one of 16 opening phrases. A user has it from the group, or drawn freely; it may
change once; and whatever the user writes, the question's gold included, breaks it with the user's slip rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import NamedTuple


@dataclass(frozen=True)
class Population:
    """What makes a question hard."""

    items: tuple[int, int] = (5, 60)
    """Fewest and most items of a history. Sizes are even on a logarithmic scale: half of them are below 18."""
    long: float = 0.1
    """Share of users whose texts are longer, by one to three sentences that say nothing."""
    themes: int = 4
    """Themes a user writes on, each with habits of its own, so all but one in four items is beside a question's point."""
    passing: float = 0.3
    """Share of movies and articles whose second cue is of another topic, so that search finds items of another habit."""
    slip: tuple[float, float] = (0.15, 0.3)
    """Range of the users' slip rates: how often a user does anything but the habit, each habit by itself."""
    drift: float = 0.3
    """Chance that a habit changes once, after any item of the history, so that newer items tell more."""
    groups: int = 5
    """Groups of users that share habits. Group g has a share of users in proportion to 1 / (g + 1); 0: no groups."""
    loyalty: float = 0.6
    """Chance that a habit is the group's; otherwise any value is as likely."""

    @property
    def mean_slip(self) -> float:
        return sum(self.slip) / 2

    def group_shares(self) -> list[float]:
        """Of users, by group."""
        weights = [1 / (group + 1) for group in range(self.groups)]
        return [weight / sum(weights) for weight in weights]


SPLITS = Population()
"""Of the splits: train, dev and test have the same groups."""
WORLD = Population(groups=0)
"""What the embedded model was trained on: other users, and no groups, so what a group shares is left to be learned."""


class Habit(NamedTuple):
    """One value before item `since` of the history (0-based), another from it on; the question comes after the last item."""

    before: int
    now: int
    since: int


@dataclass(frozen=True)
class Crowd:
    """The groups of a task's users, the same in every split."""

    task: str
    population: Population

    def habit(self, group: int, name: str, values: int) -> int:
        return Random(f"{self.task}/group {group}/{name}").randrange(values)


class Habits:
    """One user's habits, drawn as they are asked for in a fixed order."""

    def __init__(self, crowd: Crowd, rng: Random, size: int) -> None:
        self._crowd, self._rng, self.size = crowd, rng, size
        population = crowd.population
        self.slip = rng.uniform(*population.slip)
        shares = population.group_shares()
        self.group = rng.choices(range(len(shares)), shares)[0] if shares else None
        self.drawn: dict[str, Habit] = {}
        self.values: dict[str, int] = {}

    def draw(self, name: str, values: int) -> None:
        before = now = self._value(name, values)
        since = 0
        if self._rng.random() < self._crowd.population.drift:
            now, since = self._value(name, values), self._rng.randint(1, self.size)
        self.drawn[name], self.values[name] = Habit(before, now, since), values

    def _value(self, name: str, values: int) -> int:
        if self.group is not None and self._rng.random() < self._crowd.population.loyalty:
            return self._crowd.habit(self.group, name, values)
        return self._rng.randrange(values)

    def now(self, name: str) -> int:
        """What the user would do at the question."""
        return self.drawn[name].now

    def act(self, content: Random, name: str, place: int) -> int:
        """What the user does in item `place`: the habit of that time, or by a slip any other value."""
        habit, values = self.drawn[name], self.values[name]
        usual = habit.now if place >= habit.since else habit.before
        if content.random() >= self.slip:
            return usual
        return (usual + content.randrange(1, values)) % values


Shown = Mapping[str, int]
"""What one text shows of its writer's habits, slips included: habit to value."""
