"""The ceilings of lamp-mini: exact Bayes for what was seen, calibrated on the golds, in the record of a run."""

from itertools import product

import numpy as np
import pytest

from harness.task import Sample
from harness.tasks.lamp import Lamp2M, Lamp4
from harness.tiny import lamp_mini, oracle
from harness.tiny.population import SPLITS, Population


def test_what_was_seen_is_weighed_as_summing_over_every_past_would():
    population = Population(groups=2, drift=0.4, slip=(0.2, 0.2))
    priors = np.array([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]])
    places, values, size = [1, 2, 5], [0, 2, 2], 7
    chance = lambda habit, value: 0.8 if habit == value else 0.1  # noqa: E731
    for group, now in product(range(2), range(3)):
        same = np.prod([chance(now, value) for value in values])
        changed = 0.0
        for since, before in product(range(1, size + 1), range(3)):
            habits = [now if place >= since else before for place in places]
            seen = np.prod([chance(habit, value) for habit, value in zip(habits, values, strict=True)])
            changed += priors[group, before] * seen / size
        expected = 0.6 * same + 0.4 * changed
        found = oracle.likelihood(population, priors, (places, values), size)
        assert found[group, now] == pytest.approx(expected)


@pytest.mark.parametrize("task", ["lamp2m", "lamp4"])
def test_beliefs_come_true_as_often_as_they_say(task):
    hits, believed = [], []
    for user in range(400):
        case = lamp_mini.case(task, "train", user)
        beliefs = oracle.beliefs_of(case, oracle.found(task, case.question)[:5])
        for name in case.author.asked:
            if name.startswith(("topic", "opener")):
                chances = beliefs(name)
                assert sum(chances) == pytest.approx(1)
                likely = int(np.argmax(chances))
                believed.append(max(chances))
                hits.append(_gold_shows(case, name, likely))
    assert np.mean(hits) == pytest.approx(np.mean(believed), abs=0.05)
    sure = np.array(believed) > np.median(believed)
    assert np.mean(np.array(hits)[sure]) > np.mean(np.array(hits)[~sure]) + 0.1


def _gold_shows(case: lamp_mini.Case, name: str, value: int) -> bool:
    author, gold = case.author, case.gold["output"]
    if isinstance(author, lamp_mini.Writer):
        return gold.startswith(author.genre.openers[value])
    assert isinstance(author, lamp_mini.Tagger)
    return gold == author.topics[int(name.removeprefix("topic "))].labels[value]


@pytest.mark.parametrize("task", [Lamp2M, Lamp4])
def test_a_record_of_lamp_mini_says_how_far_below_its_ceiling_it_is(task):
    lamp = task(data="lamp-mini")
    cases = [lamp_mini.case(lamp.name, "dev", user) for user in range(200)]
    samples = [
        lamp.grade(Sample(c.question["id"], c.question["user_id"], response="x", targets=(c.gold["output"],)))
        for c in cases
    ]
    ceiling = dict(lamp.analysis(samples)["ceiling"])
    assert ceiling.pop("metric") == next(iter(lamp.aggregate(samples)))
    assert ceiling["0"] < ceiling["1"] < ceiling["5"] < ceiling["all"] < ceiling["known"] < 0.9
    assert ceiling["known"] > ceiling["5"] + 0.05 > ceiling["0"] + 0.15
    assert task(data="elsewhere").analysis(samples) == {}


def test_who_knows_the_habits_keeps_to_them():
    for user in range(20):
        case = lamp_mini.case("lamp4", "dev", user)
        assert isinstance(case.author, lamp_mini.Writer)
        (name,) = (name for name in case.author.asked if name.startswith("opener"))
        assert oracle.known(case).startswith(case.author.genre.openers[case.author.habits.now(name)])
    assert SPLITS.slip == (0.15, 0.3)
