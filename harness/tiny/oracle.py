"""What a perfect reader could reach on lamp-mini: the ceiling that stands beside every record.

`known`: the best answers when the user's habits at the time of the question are known; golds slip, so this is not 1.
`seen`: the best answers when the k items that `bm25` finds are seen, and of habits only what those show. The reader knows
the population (`harness.tiny.population`) and its groups, and weighs slips, drift and groups by Bayes' rule, exactly;
the slip rate is the population's mean. Answers are graded as the task grades; each is the best for the task's main metric.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from harness.plugins.retrieve import Bm25
from harness.tasks.lamp_prompts import document, query
from harness.tiny.lamp_mini import Beliefs, Case, find
from harness.tiny.population import Crowd, Population

SEEN = ("0", "1", "5", "all")
"""How many items of `bm25` are seen."""
Observed = tuple[Sequence[int], Sequence[int]]
"""Places in the history, ascending, and the values shown there."""


def ceilings(task: str, idents: Sequence[str], score: Callable[[str, str], float | None]) -> Mapping[str, float]:
    """Mean score of the best answers to these questions: `known`, and by the number of items seen.

    `score` grades an answer by the gold.
    """
    scores: dict[str, list[float]] = {}
    for ident in idents:
        gold, answers = _best(task, ident)
        for name, answer in answers.items():
            scores.setdefault(name, []).append(score(answer, gold) or 0.0)
    return {name: round(sum(values) / len(values), 4) for name, values in scores.items()}


@cache
def _best(task: str, ident: str) -> tuple[str, Mapping[str, str]]:
    """Gold and best answers of one question."""
    case = find(task, ident)
    best_first = found(task, case.question)
    answers = {count: seen(case, best_first[: None if count == "all" else int(count)]) for count in SEEN}
    return case.gold["output"], {"known": known(case), **answers}


def found(task: str, question: Mapping[str, Any]) -> list[int]:
    """Places of the profile's items as the retriever `bm25` orders them."""
    index = Bm25([document(task, item) for item in question["profile"]])
    return np.argsort(-index.scores(query(task, question["input"])), kind="stable").tolist()


def known(case: Case) -> str:
    """The best answer for whom nothing but the question's own slip is unknown."""
    habits = case.author.habits

    def beliefs(name: str) -> Sequence[float]:
        chances = np.zeros(habits.values[name])
        chances[habits.now(name)] = 1
        return _shown(chances, habits.slip)

    return case.author.best(beliefs)


def seen(case: Case, places: Sequence[int]) -> str:
    """The best answer when the items at these places of the profile are seen."""
    return case.author.best(beliefs_of(case, places))


def beliefs_of(case: Case, places: Sequence[int]) -> Beliefs:
    habits, population, crowd = (
        case.author.habits,
        case.author.population,
        Crowd(case.author.task, case.author.population),
    )
    observed: dict[str, tuple[list[int], list[int]]] = {}
    for place in sorted(places):
        for name, value in case.shown[place].items():
            at, values = observed.setdefault(name, ([], []))
            at.append(place)
            values.append(value)
    priors = {name: _priors(crowd, name, habits.values[name]) for name in {*observed, *case.author.asked}}
    likelihoods = {name: likelihood(population, priors[name], observed[name], habits.size) for name in observed}
    group = np.log(np.array(population.group_shares() or [1.0]))
    for name, given in likelihoods.items():
        group = group + np.log((priors[name] * given).sum(axis=1))
    weights = np.exp(group - group.max())
    weights /= weights.sum()

    @cache
    def beliefs(name: str) -> Sequence[float]:
        posterior = priors[name] * likelihoods.get(name, 1.0)
        posterior /= posterior.sum(axis=1, keepdims=True)
        return _shown(weights @ posterior, population.mean_slip)

    return beliefs


def likelihood(population: Population, priors: np.ndarray, observed: Observed, size: int) -> np.ndarray:
    """How likely what was seen is, by group and the habit's value at the question: [groups, values].

    Sums over where the habit may have changed, and over what it may have been before.
    """
    places, values = observed
    chances = np.full((len(values), priors.shape[1]), population.mean_slip / (priors.shape[1] - 1))
    chances[np.arange(len(values)), values] = 1 - population.mean_slip
    ones = np.ones((1, priors.shape[1]))
    before = np.concatenate([ones, np.cumprod(chances, axis=0)])  # of the first j items seen
    after = np.concatenate([np.cumprod(chances[::-1], axis=0)[::-1], ones])  # of the others
    edges = np.array([0, *places, size])  # it changed after item number edges[j] - 1 and before the next one seen
    change = np.diff(edges) / size
    mixed = (priors @ before.T) * change @ after
    return (1 - population.drift) * after[0] + population.drift * mixed


def _priors(crowd: Crowd, name: str, values: int) -> np.ndarray:
    """The habit's chances in each group, [groups, values]; one row where there are no groups."""
    population = crowd.population
    if not population.groups:
        return np.full((1, values), 1 / values)
    chances = np.full((population.groups, values), (1 - population.loyalty) / values)
    for group in range(population.groups):
        chances[group, crowd.habit(group, name, values)] += population.loyalty
    return chances


def _shown(habit: np.ndarray, slip: float) -> Sequence[float]:
    """Chances of what the gold shows, from those of the habit."""
    return ((1 - slip) * habit + slip * (1 - habit) / (len(habit) - 1)).tolist()
