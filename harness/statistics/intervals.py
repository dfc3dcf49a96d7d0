"""Intervals that respect users: samples of one user are alike, so users are resampled, never samples.

95 % percentile bootstrap. Results depend on which samples belong to which user, not on the order they come in (up to
rounding of the sums). numpy only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000


class Interval(NamedTuple):
    low: float
    high: float


class Difference(NamedTuple):
    mean: float
    low: float
    high: float
    n: int
    """Pairs compared."""


def user_bootstrap(
    users: Sequence[str],
    statistic: Callable[[np.ndarray], float],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """95 % interval of `statistic`, which gets integer indices into the samples: all those of each user drawn.

    Users are drawn with replacement. With fewer than 2 users nothing can be said: (nan, nan). Resamples on which the
    statistic is NaN are left out.
    """
    names, inverse = np.unique(np.asarray(users, dtype=str), return_inverse=True)
    if len(names) < 2:
        return Interval(np.nan, np.nan)
    by_user = np.argsort(inverse, kind="stable")
    counts = np.bincount(inverse)
    starts = np.cumsum(counts) - counts
    values = [statistic(by_user[_spans(starts[draw], counts[draw])]) for draw in _draws(len(names), resamples, seed)]
    return _percentiles(np.asarray(values, dtype=float))


def mean_interval(
    values: Sequence[float] | np.ndarray, users: Sequence[str], *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """`user_bootstrap` of the mean over samples, from the same draws, by sums per user: for thousands of users.

    Raises ValueError on NaN: failed samples are left out by the caller, who also counts them.
    """
    array = np.asarray(values, dtype=float)
    if len(array) != len(users):
        raise ValueError(f"{len(array)} values for {len(users)} users")
    if np.isnan(array).any():
        raise ValueError("NaN among the values: leave failed samples out and count them")
    names, inverse = np.unique(np.asarray(users, dtype=str), return_inverse=True)
    if len(names) < 2:
        return Interval(np.nan, np.nan)
    sums, counts = np.bincount(inverse, weights=array), np.bincount(inverse)
    means = [sums[draw].sum() / counts[draw].sum() for draw in _draws(len(names), resamples, seed)]
    return _percentiles(np.asarray(means))


def ratio_intervals(
    numerators: np.ndarray,
    denominators: np.ndarray,
    users: Sequence[str],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """`user_bootstrap` of K ratios of sums over samples, from the same draws: low and high [K].

    numerators [N, K], denominators [N]; ones give means. With fewer than 2 users nothing can be said: NaN.
    """
    names, inverse = np.unique(np.asarray(users, dtype=str), return_inverse=True)
    if len(names) < 2:
        return np.full(numerators.shape[1], np.nan), np.full(numerators.shape[1], np.nan)
    sums = np.zeros((len(names), numerators.shape[1]))
    np.add.at(sums, inverse, numerators)
    below = np.bincount(inverse, weights=denominators)
    drawn = np.array([np.bincount(draw, minlength=len(names)) for draw in _draws(len(names), resamples, seed)])
    low, high = np.percentile(drawn @ sums / (drawn @ below)[:, None], [2.5, 97.5], axis=0)
    return low, high


def paired_difference(
    a: Sequence[float | None],
    b: Sequence[float | None],
    users: Sequence[str],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """Mean of a - b over the samples both runs scored, with its interval. a[i], b[i] and users[i] are one sample's.

    A sample that is None or NaN on either side is no pair. Without a pair the mean is NaN.
    """
    first, second = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if not len(first) == len(second) == len(users):
        raise ValueError(f"{len(first)} and {len(second)} values for {len(users)} users")
    difference = first - second
    both = ~np.isnan(difference)
    if not both.any():
        return Difference(np.nan, np.nan, np.nan, 0)
    paired_users = [user for user, paired in zip(users, both, strict=True) if paired]
    low, high = mean_interval(difference[both], paired_users, resamples=resamples, seed=seed)
    return Difference(float(difference[both].mean()), low, high, int(both.sum()))


def _draws(n: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    for _ in range(resamples):
        yield rng.integers(n, size=n)


def _spans(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """starts[0], starts[0]+1, ... counts[0] of them, then those of starts[1], ..."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1]) + np.repeat(starts - (ends - counts), counts)


def _percentiles(values: np.ndarray) -> Interval:
    values = values[~np.isnan(values)]
    if not len(values):
        return Interval(np.nan, np.nan)
    low, high = np.percentile(values, [2.5, 97.5])
    return Interval(float(low), float(high))
