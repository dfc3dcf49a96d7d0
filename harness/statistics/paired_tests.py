"""What two runs' values on the same samples say of each other: difference, test, effect, who gains and who loses.

Samples of one user are alike, so users are what is resampled, flipped and counted (or items, where a task says that they
are independent). A gain is a difference with its sign turned where less is better: positive is always good.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from harness.statistics.intervals import Bounds, gain_interval, paired_difference, units

PERMUTATIONS = 9999
"""Random sign patterns of a test. None gives a p below 2 of as many and one, which by so many tests as Holm corrects for must stay
below LEVEL, or nothing could differ: see `patterns`."""
POWER, LEVEL = 0.8, 0.05
ROUNDING = 1e-12
"""Differences below this share of the values are rounding."""
FEWEST = 6
"""Users below which no sign pattern is rarer than LEVEL: 2 of 2^5 are 6 %, 2 of 2^6 are 3 %."""


class Effect(NamedTuple):
    a: float
    """Mean over the shared samples, of the first run and of the other."""
    b: float
    difference: float
    """b - a, with its 95 % interval over users."""
    low: float
    high: float
    n: int
    """Samples with a value in both."""
    users: int
    p: float
    """Two-sided, of a permutation test that exchanges the runs for whole users."""
    size: float
    """Cohen's d of paired values: mean of the users' gains by their standard deviation; NaN where they are all equal."""
    helped: float
    """Share of users whose mean gain is above 0, and below."""
    harmed: float
    worst_tenth: float
    """Mean gain of the tenth of users who gain least (at least one user)."""
    detectable: float
    """Smallest true difference that a t-test on as many users finds with 80 % power at 5 %; NaN where no two differ."""


class Group(NamedTuple):
    """Users whose histories have from `shortest` to `longest` items."""

    shortest: int
    longest: int
    users: int
    gain: float
    """Mean over their samples, with its 95 % interval."""
    low: float
    high: float


class ByLength(NamedTuple):
    rho: float
    """Spearman's rank correlation of users' history lengths and mean gains; NaN where either is the same for all."""
    p: float
    groups: tuple[Group, ...]
    """Terciles of history length; users of one length stay together, so there may be fewer, and of unequal size."""


def effect(
    a: Sequence[float],
    b: Sequence[float],
    users: Sequence[str],
    *,
    higher_is_better: bool = True,
    bounds: Bounds | None = None,
    tests: int = 1,
) -> Effect:
    """What run b's values differ from run a's. a[i], b[i] and users[i] belong to one sample; no value is missing.

    `bounds` are the least and the greatest value that the number can have, where it has both (`Task.ranges`); `tests` are
    those that p will be corrected for.
    """
    first, second = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    change = paired_difference(b, a, users, bounds)
    sums, counts = gains_by_user(first, second, users, higher_is_better=higher_is_better)
    means = sums / counts
    worst = np.sort(means)[: max(1, round(len(means) / 10))]
    deviation = means.std(ddof=1) if len(means) > 1 else 0.0
    deviation = 0.0 if deviation <= ROUNDING * np.abs(means).max() else deviation
    return Effect(
        a=float(first.mean()),
        b=float(second.mean()),
        difference=change.mean,
        low=change.low,
        high=change.high,
        n=change.n,
        users=len(means),
        p=flip_test(sums, patterns(tests)),
        size=float(means.mean() / deviation) if deviation > 0 else math.nan,
        helped=float((means > 0).mean()),
        harmed=float((means < 0).mean()),
        worst_tenth=float(worst.mean()),
        detectable=detectable(sums, counts),
    )


def gains_by_user(
    a: np.ndarray, b: np.ndarray, users: Sequence[str], *, higher_is_better: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of each user's gains, as `by_user`; a sum that is rounding, as of .3 - .5 and .7 - .5, is 0."""
    sums, counts = by_user((b - a) * (1 if higher_is_better else -1), users)
    return np.where(np.abs(sums) <= ROUNDING * (np.abs(a).max() + np.abs(b).max()), 0.0, sums), counts


def patterns(tests: int) -> int:
    """Random sign patterns that each of so many tests takes: the smallest p there is, times the tests, is half of LEVEL at most."""
    return max(PERMUTATIONS, math.ceil(4 * tests / LEVEL))


def flip_test(sums: np.ndarray, most: int = PERMUTATIONS) -> float:
    """Two-sided p of the mean gain: each user's sum of gains has either sign with equal chance. NaN for one user.

    Exact where there are fewer sign patterns than `most`, else from as many random ones.
    """
    from scipy.stats import permutation_test

    if len(sums) < 2:
        return math.nan
    differing = sums[sums != 0]  # flipping a 0 changes nothing, so without them the test is the same, and sooner exact
    if len(differing) < 2:
        return 1.0
    found = permutation_test(
        (differing, np.zeros_like(differing)),
        lambda x, y, axis: (x - y).sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=most,
        batch=1000,
        random_state=np.random.default_rng(0),
    )
    return float(found.pvalue)


def detectable(sums: np.ndarray, counts: np.ndarray) -> float:
    """Smallest true mean gain that a t-test finds with POWER at LEVEL, given how the users' sums scatter.

    The standard error is that of a mean over samples clustered by user, sqrt(U / (U - 1) sum((s - m c)^2)) / sum(c).
    """
    users = len(sums)
    mean = sums.sum() / counts.sum()
    scatter = ((sums - mean * counts) ** 2).sum()
    if users < 2 or scatter <= (ROUNDING * np.abs(sums).max()) ** 2:
        return math.nan
    error = math.sqrt(users / (users - 1) * scatter) / counts.sum()
    return error * math.sqrt(users) * smallest_effect(users)


def smallest_effect(users: int) -> float:
    """Smallest true mean gain of as many users, in standard deviations of theirs, that a t-test finds with POWER at LEVEL."""
    from scipy.optimize import brentq
    from scipy.stats import nct, t

    critical = t.ppf(1 - LEVEL / 2, users - 1)
    shift = brentq(lambda shift: nct.sf(critical, users - 1, shift) - POWER, 0, 2 * critical + 20)
    return float(shift / math.sqrt(users))


def by_length(
    gains: Sequence[float], users: Sequence[str], length: Mapping[str, int], bounds: Bounds | None = None
) -> ByLength:
    """How users' gains, differences of numbers with these bounds, go with the lengths of their histories."""
    from scipy.stats import spearmanr

    sums, counts = by_user(np.asarray(gains, dtype=float), users)
    means, lengths = sums / counts, np.array([length[user] for user in units(users)[0]])
    rho, p = math.nan, math.nan
    ranked = with_ties(means)
    if len(set(lengths.tolist())) > 1 and len(set(ranked.tolist())) > 1:
        rho, p = map(float, spearmanr(lengths, ranked))
    of_sample = np.array([length[user] for user in users])
    cuts = np.quantile(lengths, [1 / 3, 2 / 3], method="lower")
    tercile = np.searchsorted(cuts, of_sample, side="left")
    groups = []
    for number in range(3):
        inside = np.flatnonzero(tercile == number).tolist()
        if inside:
            values, those = np.asarray(gains, dtype=float)[inside], [users[i] for i in inside]
            low, high = gain_interval(values, those, bounds)
            span = of_sample[inside]
            groups.append(Group(int(span.min()), int(span.max()), len(set(those)), float(values.mean()), low, high))
    return ByLength(rho, p, tuple(groups))


def with_ties(values: np.ndarray) -> np.ndarray:
    """For ranks: values that differ in rounding alone, as 1/2 - 1/3 and 2/3 - 1/2, are equal."""
    return np.round(values / (np.abs(values).max() or 1.0), 12)


def holm(values: Sequence[float]) -> list[float]:
    """Holm's adjusted p of each: below 5 % among them all, the chance of one false alarm is below 5 %. NaN takes no part."""
    order = sorted((i for i, p in enumerate(values) if not math.isnan(p)), key=lambda i: values[i])
    adjusted, highest = [math.nan] * len(values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * values[i]))
        adjusted[i] = highest
    return adjusted


def by_user(values: np.ndarray, users: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of each user's values, users in the order of `units`."""
    _, inverse = units(users)
    return np.bincount(inverse, weights=values), np.bincount(inverse)
