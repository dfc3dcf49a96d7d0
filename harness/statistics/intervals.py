"""95 % intervals that respect users and hold what they promise: `bench/coverage.py` counts how often they do.

Samples of one user are alike, so users are the units, never samples. A mean is a ratio of sums over users, and its
interval is, on each side, the wider of two:
- Student's t with the standard error of a ratio, for values that scatter evenly;
- the bootstrap-t (Efron 1981), which learns from resampled users how skewed they are.
Where a number has a least and a greatest value (`bounds`), neither end goes beyond Gaffke's (Learned-Miller and Thomas
2019, "A new confidence interval for the mean of a bounded random variable"): the mean under random weights for the users
and one more user at the bound. It knows that all right so far is not always right, and for 0/1 values of one sample a
user it is Clopper and Pearson's exact interval, which is used there.
Anything but a mean has a jackknife over users. Without bounds, users who do not differ (or hardly any who do) say nothing
of how far another user could be: no interval, (nan, nan).

Draws are fixed by the seed; results depend on which samples belong to which user, not on their order (up to rounding).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 1999
_TAIL = 49
"""Draws below the lower end and above the upper one: (RESAMPLES + 1) / 40 - 1."""
_MANY = 20_000
"""Users from whom on Student's interval stands alone: a mean of so many is normal, and resampling them takes its time."""
_AT_ONCE = 4_000_000
"""Numbers drawn in one go: 32 MB."""
_EQUAL = 1e-12
"""Scatter below this share of the values is rounding."""

Bounds = tuple[float, float]
"""The least and the greatest value a number can have."""
UNIT: Bounds = (0.0, 1.0)


class Interval(NamedTuple):
    low: float
    high: float


NONE = Interval(np.nan, np.nan)


class Difference(NamedTuple):
    mean: float
    low: float
    high: float
    n: int
    """Pairs compared."""


def bounds_of(*values: np.ndarray) -> Bounds | None:
    """0 and 1 where every value is one of the two; else None: what was not seen may be anything."""
    return UNIT if all(np.isin(some, UNIT).all() for some in values) else None


def mean_interval(
    values: Sequence[float] | np.ndarray, users: Sequence[str], bounds: Bounds | None = None, *, seed: int = 0
) -> Interval:
    """Of the mean over samples. Values that are all 0 or 1 are taken to have these bounds.

    Raises ValueError on NaN: failed samples are left out by the caller, who also counts them.
    """
    array = np.asarray(values, dtype=float)
    return _interval(array, users, bounds or (bounds_of(array) if len(array) else None), seed)


def gain_interval(
    gains: Sequence[float] | np.ndarray, users: Sequence[str], bounds: Bounds | None = None, *, seed: int = 0
) -> Interval:
    """Of the mean of differences of two numbers that both have `bounds`."""
    return _interval(np.asarray(gains, dtype=float), users, _of_difference(bounds), seed)


def ratio_intervals(
    numerators: np.ndarray, denominators: np.ndarray, users: Sequence[str], *, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Of K ratios of sums over samples: low and high [K], NaN where nothing can be said.

    numerators [N, K], denominators [N] above 0 in sum for every user; ones give means.
    """
    names, inverse = units(users)
    if len(names) < 2:
        return np.full(numerators.shape[1], np.nan), np.full(numerators.shape[1], np.nan)
    sums = np.zeros((len(names), numerators.shape[1]))
    np.add.at(sums, inverse, numerators)
    return _ratios(sums, np.bincount(inverse, weights=denominators), None, seed)


def paired_difference(
    a: Sequence[float | None],
    b: Sequence[float | None],
    users: Sequence[str],
    bounds: Bounds | None = None,
    *,
    seed: int = 0,
) -> Difference:
    """Mean of a - b over the samples both runs scored, with its interval. a[i], b[i] and users[i] are one sample's.

    A sample that is None or NaN on either side is no pair. Without a pair the mean is NaN. `bounds` are those of a and b.
    """
    first, second = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if not len(first) == len(second) == len(users):
        raise ValueError(f"{len(first)} and {len(second)} values for {len(users)} users")
    both = ~np.isnan(first - second)
    if not both.any():
        return Difference(np.nan, np.nan, np.nan, 0)
    first, second = first[both], second[both]
    of = [user for user, paired in zip(users, both, strict=True) if paired]
    low, high = gain_interval(first - second, of, bounds or bounds_of(first, second), seed=seed)
    return Difference(float((first - second).mean()), low, high, int(both.sum()))


def jackknife_interval(estimate: float, without: np.ndarray, bounds: Bounds | None = None) -> Interval:
    """Of any smooth statistic: `without` [U] has its value with each of the users left out.

    With `bounds` it is made on the log-odds scale and mapped back, so that it ends inside them and is wider on the side that
    has more room.
    """
    from scipy.special import stdtrit

    users = len(without)
    if users < 2 or not (np.isfinite(estimate) and np.isfinite(without).all()):
        return NONE
    error = float(np.sqrt((users - 1) / users * ((without - without.mean()) ** 2).sum()))
    reach = float(stdtrit(users - 1, 0.975)) * error
    if error <= _EQUAL * max(abs(estimate), float(np.abs(without).max())):
        return NONE
    if bounds is None:
        return Interval(estimate - reach, estimate + reach)
    low, high = bounds
    share = (estimate - low) / (high - low)
    if not 0 < share < 1:
        return NONE
    odds, step = share / (1 - share), np.exp(min(reach / (high - low) / (share * (1 - share)), 700.0))
    ends = odds / step, odds * step
    return Interval(*(float(low + (high - low) * end / (1 + end)) for end in ends))


def jackknife(users: Sequence[str], statistic: Callable[[np.ndarray], float], bounds: Bounds | None = None) -> Interval:
    """`jackknife_interval` of a statistic that gets the indices of samples: all but those of one user, each in turn."""
    names, inverse = units(users)
    if len(names) < 2:
        return NONE
    without = np.array([statistic(np.flatnonzero(inverse != left_out)) for left_out in range(len(names))], dtype=float)
    return jackknife_interval(float(statistic(np.arange(len(users)))), without, bounds)


def units(users: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The users in order, and the number of each sample's. numpy's texts lose a NUL at their end, and two users would be one."""
    names = sorted(set(users))
    number = {name: n for n, name in enumerate(names)}
    return names, np.array([number[user] for user in users], dtype=int)


def _of_difference(bounds: Bounds | None) -> Bounds | None:
    return None if bounds is None else (bounds[0] - bounds[1], bounds[1] - bounds[0])


def _interval(values: np.ndarray, users: Sequence[str], bounds: Bounds | None, seed: int) -> Interval:
    if len(values) != len(users):
        raise ValueError(f"{len(values)} values for {len(users)} users")
    if np.isnan(values).any():
        raise ValueError("NaN among the values: leave failed samples out and count them")
    names, inverse = units(users)
    if len(names) < 2:
        return NONE
    if bounds is not None and not (bounds[0] <= values.min() and values.max() <= bounds[1]):
        bounds = None  # the number has no such bounds after all
    if bounds is not None and len(names) == len(values) and np.isin(values, bounds).all():
        low, high = _exact(int((values == bounds[1]).sum()), len(values))
        return Interval(*(bounds[0] + (bounds[1] - bounds[0]) * end for end in (low, high)))
    sums, counts = np.bincount(inverse, weights=values), np.bincount(inverse).astype(float)
    low_ends, high_ends = _ratios(sums[:, None], counts, bounds, seed)
    return Interval(float(low_ends[0]), float(high_ends[0]))


def _exact(successes: int, n: int) -> Interval:
    """Clopper and Pearson's."""
    from scipy.special import betaincinv

    low = float(betaincinv(successes, n - successes + 1, 0.025)) if successes else 0.0
    high = float(betaincinv(successes + 1, n - successes, 0.975)) if successes < n else 1.0
    return Interval(low, high)


def _ratios(sums: np.ndarray, counts: np.ndarray, bounds: Bounds | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Of K ratios sum(sums) / sum(counts), sums [U, K] and counts [U] a user: low and high [K]."""
    from scipy.special import stdtrit

    users, whole = len(sums), counts.sum()
    # in units of a power of two, which rounds nothing: squares of large numbers are numbers too
    unit = np.ldexp(1.0, np.frexp(np.abs(sums).max(axis=0))[1] - 1) if bounds is None else np.float64(1.0)
    sums = sums / unit
    value = sums.sum(axis=0) / whole
    rest = sums - value * counts[:, None]
    error = np.sqrt(users / (users - 1) * (rest**2).sum(axis=0)) / whole
    equal = error <= _EQUAL * np.abs(sums).max(axis=0) / whole
    most = float(stdtrit(users - 1, 0.975))
    below, above = _bootstrap_t(rest, counts, error, seed) if users < _MANY else (-most, most)
    with np.errstate(invalid="ignore"):
        low, high = value - np.maximum(above, most) * error, value - np.minimum(below, -most) * error
    if bounds is not None:
        ends = _gaffke(rest, counts, value, bounds, seed)
        low = np.where(equal, ends[0], np.maximum(low, ends[0]))
        high = np.where(equal, ends[1], np.minimum(high, ends[1]))
        return low, high
    with np.errstate(over="ignore", invalid="ignore"):
        low, high = low * unit, high * unit
    known = ~equal & np.isfinite(low) & np.isfinite(high)
    return np.where(known, low, np.nan), np.where(known, high, np.nan)


def _bootstrap_t(rest: np.ndarray, counts: np.ndarray, error: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The 2.5th and 97.5th percentile [K] of how many of its own standard errors a resample's ratio is from the ratio.

    rest [U, K] are the users' sums less the ratio times their counts [U], error [K] the ratio's standard error.
    """
    users = len(counts)
    steps, spread = [], []
    for times in _resampled(users, seed):
        total = times @ counts
        step = times @ rest / total[:, None]  # how far the resample's ratio is from the ratio
        scatter = times @ rest**2 - 2 * step * (times @ (rest * counts[:, None]))
        scatter += step**2 * (times @ counts**2)[:, None]
        steps.append(step)
        spread.append(np.sqrt(users / (users - 1) * np.maximum(scatter, 0)) / total[:, None])
    step, own = np.concatenate(steps), np.concatenate(spread)
    own = np.where(own <= 1e-7 * error, 0.0, own)
    with np.errstate(divide="ignore", invalid="ignore"):
        student = np.where(step == 0, 0.0, step / own)
    student.partition((_TAIL, RESAMPLES - 1 - _TAIL), axis=0)
    return student[_TAIL], student[RESAMPLES - 1 - _TAIL]


def _gaffke(
    rest: np.ndarray, counts: np.ndarray, value: np.ndarray, bounds: Bounds, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the mean under Dirichlet weights, with one more user of average size at the lower or the upper bound."""
    shares, size = [], counts.mean()
    for weights in _weights(len(rest) + 1, seed):
        total = weights[:, :-1] @ counts + weights[:, -1] * size
        shares.append((weights[:, :-1] @ rest / total[:, None], (weights[:, -1] * size / total)[:, None]))
    own, extra = (np.concatenate(parts) for parts in zip(*shares, strict=True))
    low, high = (own + extra * (bound - value) for bound in bounds)
    low.partition(_TAIL, axis=0)
    high.partition(RESAMPLES - 1 - _TAIL, axis=0)
    return value + np.minimum(low[_TAIL], 0), value + np.maximum(high[RESAMPLES - 1 - _TAIL], 0)


def _resampled(users: int, seed: int) -> Iterator[np.ndarray]:
    """How often each user is drawn: RESAMPLES rows [., users] in parts."""
    rng = np.random.default_rng(seed)
    for count in _parts(users):
        drawn = rng.integers(users, size=(count, users)) + users * np.arange(count)[:, None]
        yield np.bincount(drawn.ravel(), minlength=count * users).reshape(count, users).astype(float)


def _weights(users: int, seed: int) -> Iterator[np.ndarray]:
    """Exponential weights: divided by their sum they are Dirichlet's."""
    rng = np.random.default_rng(seed)
    for count in _parts(users):
        yield rng.standard_exponential(size=(count, users))


def _parts(users: int) -> Iterator[int]:
    most = max(1, _AT_ONCE // users)
    for start in range(0, RESAMPLES, most):
        yield min(most, RESAMPLES - start)
