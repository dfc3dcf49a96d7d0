"""How often the 95 % intervals hold the true value: python -m bench.coverage [--draws 1000] > bench/results/coverage.txt

Each line draws so many data sets of n users from a distribution whose true value is known. `hold`: of the intervals given,
how many hold it. `given`: of the data sets, how many get one; users who do not differ say nothing of a number without
bounds. `low` and `high`: how many lie above and below the true value. `width`: the median. `percentiles`: what the 2.5th and
97.5th percentile of means of resampled users hold (macro-F1: of resampled macro-F1s).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from tabulate import tabulate

from harness.statistics.intervals import UNIT, Bounds, Interval, jackknife_interval, mean_interval, paired_difference
from harness.statistics.metrics import macro_f1_metric
from harness.task import Sample
from harness.tasks.delta_vectors import collective_share, cosine_to_mean

SIZES = (20, 50, 200)
RESAMPLED = 300
"""Resamples of the percentile intervals."""

Drawn = tuple[Interval, Interval]
"""Ours, and percentiles."""
Draw = Callable[[np.random.Generator, int], Drawn]


class Case(NamedTuple):
    name: str
    true: float
    draw: Draw


def of_means(draw: Callable[[np.random.Generator, int], np.ndarray], bounds: Bounds | None = None) -> Draw:
    """One sample a user."""

    def case(rng: np.random.Generator, n: int) -> Drawn:
        values = draw(rng, n)
        drawn = values[rng.integers(n, size=(RESAMPLED, n))].mean(axis=1)
        return mean_interval(values, users(n), bounds), percentiles(drawn)

    return case


def of_clusters(draw: Callable[[np.random.Generator, np.ndarray], np.ndarray], bounds: Bounds | None = None) -> Draw:
    """1 to 9 samples a user; `draw` gets the user of each."""

    def case(rng: np.random.Generator, n: int) -> Drawn:
        sizes = rng.integers(1, 10, size=n)
        of = np.repeat(np.arange(n), sizes)
        values = draw(rng, of)
        chosen = rng.integers(n, size=(RESAMPLED, n))
        sums = np.bincount(of, weights=values, minlength=n)
        drawn = sums[chosen].sum(axis=1) / sizes[chosen].sum(axis=1)
        return mean_interval(values, [f"{u:04}" for u in of], bounds), percentiles(drawn)

    return case


def of_pairs(gain: float, loss: float) -> Draw:
    """Two runs whose answers are right or wrong: how often only the one, or only the other, is right."""

    def case(rng: np.random.Generator, n: int) -> Drawn:
        change = rng.choice([1.0, -1.0, 0.0], p=[gain, loss, 1 - gain - loss], size=n)
        other = np.where(change == 0, (rng.random(n) < 0.6).astype(float), change < 0)
        found = paired_difference(other + change, other, users(n))
        drawn = change[rng.integers(n, size=(RESAMPLED, n))].mean(axis=1)
        return Interval(found.low, found.high), percentiles(drawn)

    return case


def of_f1(joint: np.ndarray) -> Draw:
    """Golds and answers from their joint probabilities [labels, labels + 1]; the last answer is none of the labels."""
    labels = [f"label {i}" for i in range(len(joint))]

    def case(rng: np.random.Generator, n: int) -> Drawn:
        cells = rng.choice(joint.size, p=joint.ravel(), size=n)
        golds, answers = np.divmod(cells, joint.shape[1])
        answers = np.where(answers == len(joint), -1, answers)
        found = macro_f1_metric([Sample(u, u) for u in users(n)], golds, answers, labels)
        ends = [np.nan if end is None else end for end in (found.low, found.high)]
        tables = rng.multinomial(n, np.bincount(cells, minlength=joint.size) / n, size=RESAMPLED)
        return Interval(*ends), percentiles(f1_of(tables.reshape(RESAMPLED, *joint.shape)))

    return case


def of_vectors(statistic: Callable, plain: Callable[[np.ndarray], float], shift: float) -> Draw:
    """Users' difference vectors around one that all share."""

    def case(rng: np.random.Generator, n: int) -> Drawn:
        found = vectors(rng, n, shift)
        drawn = [plain(found[rng.integers(n, size=n)]) for _ in range(100)]
        return jackknife_interval(*statistic(found)), percentiles(np.array(drawn))

    return case


def vectors(rng: np.random.Generator, n: int, shift: float) -> np.ndarray:
    width = 64
    found = rng.normal(size=(n, width)) * np.linspace(2, 0.2, width)
    found[:, 5] += shift
    return found


def plain_share(found: np.ndarray) -> float:
    return float((found.mean(axis=0) ** 2).sum() / (found**2).sum(axis=1).mean())


def plain_cosine(found: np.ndarray) -> float:
    others = found.sum(axis=0) - found
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(others, axis=1)
    return float(((found * others).sum(axis=1) / lengths).mean())


def f1_of(tables: np.ndarray) -> np.ndarray:
    labels = tables.shape[-2]
    hits = np.einsum("...ii->...i", tables[..., :labels])
    sizes = tables.sum(axis=-1) + tables[..., :labels].sum(axis=-2)
    return (2 * hits / np.where(sizes > 0, sizes, 1)).mean(axis=-1)


def joint_of(labels: int, skew: float, right: float) -> np.ndarray:
    """The r-th label has a frequency of r^-skew; wrong answers are drawn by frequency, one in twenty is no label."""
    frequency = np.arange(1, labels + 1) ** -skew
    frequency /= frequency.sum()
    table = np.zeros((labels, labels + 1))
    for gold in range(labels):
        others = np.where(np.arange(labels) == gold, 0, frequency)
        table[gold, :labels] = 0.95 * (1 - right) * others / others.sum()
        table[gold, gold] += right
        table[gold, labels] = 0.05 * (1 - right)
    return table * frequency[:, None]


def users(n: int) -> list[str]:
    return [f"{u:04}" for u in range(n)]


def percentiles(drawn: np.ndarray) -> Interval:
    return Interval(*map(float, np.percentile(drawn, [2.5, 97.5])))


def beta_binomial(right: float, alike: float) -> Callable[[np.random.Generator, np.ndarray], np.ndarray]:
    """Right or wrong, with this correlation between two answers to one user."""
    scale = 1 / alike - 1

    def draw(rng: np.random.Generator, of: np.ndarray) -> np.ndarray:
        rates = rng.beta(right * scale, (1 - right) * scale, size=of.max() + 1)
        return (rng.random(len(of)) < rates[of]).astype(float)

    return draw


def right_or_wrong(right: float) -> Draw:
    return of_means(lambda rng, n: (rng.random(n) < right).astype(float))


def cases() -> Iterator[Case]:
    yield Case("normal", 0, of_means(lambda rng, n: rng.normal(size=n)))
    yield Case("lognormal", np.exp(0.5), of_means(lambda rng, n: rng.lognormal(size=n)))
    yield Case(
        "zero-inflated lognormal, 70 % zeros",
        0.3 * np.exp(0.5),
        of_means(lambda rng, n: (rng.random(n) < 0.3) * rng.lognormal(size=n)),
    )
    yield Case(
        "zero-inflated uniform in 0..1, 80 % zeros",
        0.1,
        of_means(lambda rng, n: (rng.random(n) < 0.2) * rng.random(n), UNIT),
    )
    yield Case("ROUGE-like in 0..1, mean .4", 0.4, of_means(lambda rng, n: rng.beta(2, 3, size=n), UNIT))
    yield Case(
        "ROUGE-like in 0..1, 90 % at 1", 0.95, of_means(lambda rng, n: 1 - (rng.random(n) < 0.1) * rng.random(n), UNIT)
    )
    for right in (0.05, 0.5, 0.95, 1.0):
        yield Case(f"Bernoulli {right:g}", right, right_or_wrong(right))
    yield Case("difference of 0/1, 10 % gain and 5 % lose", 0.05, of_pairs(0.10, 0.05))
    yield Case("difference of 0/1, nobody differs", 0.0, of_pairs(0.0, 0.0))
    yield Case(
        "clustered normal",
        0,
        of_clusters(lambda rng, of: rng.normal(size=of.max() + 1)[of] + rng.normal(size=len(of))),
    )
    for right, alike in ((0.5, 0.3), (0.95, 0.3), (0.95, 0.02), (0.05, 0.7)):
        name = f"clustered Bernoulli {right:g}, correlation {alike:g}"
        yield Case(name, right, of_clusters(beta_binomial(right, alike)))
    for labels, skew, right in ((2, 0.0, 0.7), (2, 0.0, 0.97), (4, 1.0, 0.9), (15, 0.0, 0.7), (15, 0.5, 0.98)):
        joint = joint_of(labels, skew, right)
        yield Case(f"macro-F1, {labels} labels r^-{skew:g}, {right:g} right", float(f1_of(joint)), of_f1(joint))
    big = vectors(np.random.default_rng(1), 200_000, 3.0)
    mean = np.zeros(64)
    mean[5] = 3.0
    share = float(mean @ mean / (big**2).sum(axis=1).mean())
    cosine = float((big @ mean / np.linalg.norm(big, axis=1)).mean() / np.linalg.norm(mean))
    yield Case("collective share", share, of_vectors(collective_share, plain_share, 3.0))
    yield Case("collective share, none", 0.0, of_vectors(collective_share, plain_share, 0.0))
    yield Case("cosine to the mean", cosine, of_vectors(cosine_to_mean, plain_cosine, 3.0))


def measured(case: Case, n: int, draws: int) -> list[object]:
    rng = np.random.default_rng(n)
    pairs = [case.draw(rng, n) for _ in range(draws)]
    ours, theirs = (np.array(ends) for ends in zip(*pairs, strict=True))
    ours_given = ours[~np.isnan(ours).any(axis=1)]
    held = (theirs[:, 0] <= case.true + 1e-12) & (case.true - 1e-12 <= theirs[:, 1])
    if not len(ours_given):
        return [case.name, n, None, 0.0, None, None, None, held.mean()]
    above, below = ours_given[:, 0] > case.true + 1e-12, ours_given[:, 1] < case.true - 1e-12
    return [
        case.name,
        n,
        1 - above.mean() - below.mean(),
        len(ours_given) / draws,
        above.mean(),
        below.mean(),
        np.median(ours_given[:, 1] - ours_given[:, 0]),
        held.mean(),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000, help="data sets a line")
    draws = parser.parse_args().draws
    sizes = {"macro-F1": (50, 200, 500)}
    rows = [measured(case, n, draws) for case in cases() for n in sizes.get(case.name.partition(",")[0], SIZES)]
    print(f"{draws} data sets a line; a share of .95 has a standard error of {np.sqrt(0.95 * 0.05 / draws):.4f}\n")
    headers = ["true value of", "n", "hold", "given", "low", "high", "width", "percentiles"]
    print(tabulate(rows, headers=headers, floatfmt=".3f", missingval="-"))


if __name__ == "__main__":
    main()
