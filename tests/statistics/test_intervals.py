"""Intervals are over users, cover what they say they cover, and say when they cannot say anything."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from scipy import stats as scipy_stats

from harness.statistics.intervals import (
    UNIT,
    gain_interval,
    jackknife,
    jackknife_interval,
    mean_interval,
    paired_difference,
    ratio_intervals,
)

RNG = np.random.default_rng(1)
USERS = [f"user{i % 37}" for i in range(200)]
VALUES = RNG.normal(size=200)


def _names(n: int) -> list[str]:
    return [f"u{i:05}" for i in range(n)]


def test_values_that_scatter_evenly_have_students_interval():
    values = RNG.normal(size=300)
    low, high = mean_interval(values, _names(300))
    theirs = scipy_stats.ttest_1samp(values, 0).confidence_interval()
    assert (low, high) == pytest.approx(theirs, abs=0.01)
    assert low <= theirs.low and high >= theirs.high


def test_skewed_values_have_more_room_on_the_side_of_their_tail():
    values = np.random.default_rng(2).lognormal(size=40)
    low, high = mean_interval(values, _names(40))
    assert high - values.mean() > 1.3 * (values.mean() - low)


@pytest.mark.parametrize(("right", "n"), [(0, 20), (1, 20), (10, 20), (20, 20), (199, 200)])
def test_0_and_1_of_one_sample_a_user_have_clopper_and_pearsons_interval(right: int, n: int):
    theirs = scipy_stats.binomtest(right, n).proportion_ci(method="exact")
    assert mean_interval([1.0] * right + [0.0] * (n - right), _names(n)) == pytest.approx((theirs.low, theirs.high))


def test_the_bound_of_any_values_is_clopper_and_pearsons_where_they_are_0_and_1():
    # two samples a user, alike: no case for the exact one, and all that is known is known of users
    values = np.repeat([1.0] * 18 + [0.0] * 2, 2)
    theirs = scipy_stats.binomtest(18, 20).proportion_ci(method="exact")
    low, high = mean_interval(values, np.repeat(_names(20), 2).tolist())
    assert low == pytest.approx(theirs.low, abs=0.01)
    assert high == pytest.approx(theirs.high, abs=0.01)


@pytest.mark.parametrize(("value", "bounds"), [(1.0, None), (0.0, None), (1.0, UNIT), (100.0, (0, 100)), (0.0, (0, 4))])
def test_a_ceiling_that_nobody_left_has_an_interval_of_some_width(value: float, bounds: tuple[float, float] | None):
    low, high = mean_interval([value] * 20, _names(20), bounds)
    low_bound, high_bound = bounds or UNIT
    assert high - low == pytest.approx(0.168 * (high_bound - low_bound), rel=0.01)
    assert low_bound <= low <= value <= high <= high_bound


def test_equal_values_without_bounds_say_nothing():
    assert all(math.isnan(end) for end in mean_interval([0.3] * 20, _names(20)))
    assert all(math.isnan(end) for end in gain_interval([0.0] * 20, _names(20)))


def test_users_of_whom_hardly_any_differ_say_nothing_without_bounds_and_little_with():
    values = [0.0] * 19 + [0.7]
    assert all(math.isnan(end) for end in mean_interval(values, _names(20)))
    low, high = mean_interval(values, _names(20), UNIT)
    assert 0 <= low < 0.035 < 0.17 < high < 0.25


def test_an_end_is_never_outside_the_bounds_and_the_mean_never_outside_the_ends():
    for seed in range(30):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(2, 30))
        values = np.round(rng.beta(*rng.uniform(0.05, 2, size=2), size=2 * n), 2)
        low, high = mean_interval(values, _names(n) * 2, UNIT)
        assert 0 <= low <= values.mean() + 1e-12 and values.mean() - 1e-12 <= high <= 1


def test_a_number_outside_its_bounds_has_none():
    values = [9.0, *RNG.uniform(0, 4, size=30)]
    assert mean_interval(values, _names(31), (0, 4)) == mean_interval(values, _names(31))


def test_the_scale_of_a_number_does_not_matter():
    low, high = mean_interval(VALUES, USERS)
    assert mean_interval(100 + 1000 * VALUES, USERS) == pytest.approx((100 + 1000 * low, 100 + 1000 * high))


def test_samples_of_one_user_are_not_independent_evidence():
    effects = np.repeat(RNG.normal(size=20), 50)
    by_user = mean_interval(effects, np.repeat(np.arange(20), 50).astype(str).tolist())
    by_sample = mean_interval(effects, np.arange(1000).astype(str).tolist())
    assert by_user.high - by_user.low > 4 * (by_sample.high - by_sample.low)


def test_users_whose_names_differ_in_a_last_sign_alone_are_two():
    values, users = np.linspace(0, 1, 12) ** 2, [f"user {n}" for n in range(12)]
    own = mean_interval(values, users)
    assert mean_interval(values, ["a", "a\0", *users[2:]]) == own and not np.isnan(own.low)


@pytest.mark.parametrize("bounds", [None, (-5.0, 5.0)])
def test_the_order_of_samples_does_not_matter(bounds: tuple[float, float] | None):
    order = RNG.permutation(200)
    shuffled = mean_interval(VALUES[order], [USERS[i] for i in order], bounds)
    assert shuffled == pytest.approx(mean_interval(VALUES, USERS, bounds), abs=1e-12)


def test_the_same_seed_gives_the_same_interval():
    assert mean_interval(VALUES, USERS, seed=1) == mean_interval(VALUES, USERS, seed=1)
    assert mean_interval(VALUES, USERS, seed=1) == pytest.approx(mean_interval(VALUES, USERS, seed=2), abs=0.02)


@pytest.mark.parametrize("users", [[], ["a"], ["a", "a", "a"]])
def test_fewer_than_two_users_have_no_interval(users: list[str]):
    values = [1.0] * len(users)
    assert all(math.isnan(end) for end in mean_interval(values, users))
    assert all(math.isnan(end) for end in jackknife(users, lambda i: 1.0))


def test_many_ratios_at_once_are_each_what_it_is_alone():
    above, below = RNG.normal(size=(200, 3)), RNG.uniform(0.5, 2, size=200)
    low, high = ratio_intervals(above, below, USERS)
    for k in range(3):
        alone = ratio_intervals(above[:, k : k + 1], below, USERS)
        assert (alone[0][0], alone[1][0]) == pytest.approx((low[k], high[k]))
    ones = ratio_intervals(above, np.ones(200), USERS)
    assert (ones[0][0], ones[1][0]) == pytest.approx(mean_interval(above[:, 0], USERS))
    assert np.isnan(ratio_intervals(above, below, ["u"] * 200)).all()


def test_a_nan_among_the_values_is_an_error():
    with pytest.raises(ValueError, match="leave failed samples out"):
        mean_interval([1.0, math.nan], ["a", "b"])


def test_values_and_users_must_be_of_one_length():
    with pytest.raises(ValueError, match="2 values for 1 users"):
        mean_interval([1.0, 2.0], ["a"])


def test_a_paired_difference_counts_only_samples_both_runs_scored():
    difference = paired_difference([1.0, 2.0, None, 4.0], [0.0, 1.0, 1.0, math.nan], ["a", "b", "c", "d"])
    assert (difference.n, difference.mean) == (2, 1.0)


def test_two_runs_that_answer_alike_may_still_differ_by_what_20_users_cannot_show():
    right = [1.0] * 15 + [0.0] * 5
    difference = paired_difference(right, right, _names(20))
    assert difference.mean == 0
    assert (difference.low, difference.high) == pytest.approx((-0.168, 0.168), abs=0.01)


def test_no_pair_is_no_difference():
    difference = paired_difference([None], [1.0], ["a"])
    assert difference.n == 0
    assert math.isnan(difference.mean)


def test_the_jackknife_of_a_mean_is_students_interval():
    values = RNG.normal(size=50)
    ours = jackknife(_names(50), lambda i: float(values[i].mean()))
    assert ours == pytest.approx(scipy_stats.ttest_1samp(values, 0).confidence_interval())


def test_a_jackknife_with_bounds_ends_inside_them():
    low, high = jackknife_interval(0.97, np.array([0.96, 0.99, 0.98, 0.97, 0.95]), UNIT)
    assert 0 < low < 0.97 < high < 1
    assert 0.97 - low > high - 0.97
    assert all(math.isnan(end) for end in jackknife_interval(1.0, np.ones(5), UNIT))


def test_intervals_cover():
    """`bench/coverage.py` in small: never below .90, where percentiles of resampled means cover .60 to .88."""
    rng = np.random.default_rng(0)
    kinds = {
        "right answers": (lambda: (rng.random(20) < 0.95).astype(float), 0.95, None),
        "many zeros": (lambda: (rng.random(20) < 0.2) * rng.random(20), 0.1, UNIT),
        "near the ceiling": (lambda: 1 - (rng.random(20) < 0.1) * rng.random(20), 0.95, UNIT),
        "skewed": (lambda: rng.lognormal(size=50), math.exp(0.5), None),
    }
    for name, (draw, mean, bounds) in kinds.items():
        drawn = [draw() for _ in range(200)]
        ends = [mean_interval(values, _names(len(values)), bounds) for values in drawn]
        assert np.mean([low <= mean <= high for low, high in ends]) >= 0.9, name


def test_two_thousand_users_take_under_a_second():
    values, users = RNG.normal(size=10_000), [str(i % 2000) for i in range(10_000)]
    start = time.process_time()
    mean_interval(values, users)
    assert time.process_time() - start < 1
