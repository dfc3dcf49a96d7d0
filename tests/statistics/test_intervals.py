"""Intervals resample users, agree with each other, and say when they cannot say anything."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from scipy import stats as scipy_stats

from harness.statistics.intervals import mean_interval, paired_difference, user_bootstrap

RNG = np.random.default_rng(1)
USERS = [f"user{i % 37}" for i in range(200)]
VALUES = RNG.normal(size=200)


def test_the_fast_mean_equals_the_general_bootstrap():
    general = user_bootstrap(USERS, lambda i: float(VALUES[i].mean()), seed=3)
    assert mean_interval(VALUES, USERS, seed=3) == pytest.approx(general, abs=1e-12)


def test_a_statistic_sees_every_sample_of_a_drawn_user_equally_often():
    inverse = np.unique(USERS, return_inverse=True)[1]

    def check(indices: np.ndarray) -> float:
        times = np.bincount(indices, minlength=len(USERS))
        for user in range(37):
            assert len(set(times[inverse == user])) == 1
        return 0.0

    user_bootstrap(USERS, check, resamples=20)


def test_one_sample_a_user_gives_scipys_percentile_bootstrap_of_the_mean():
    values = RNG.exponential(size=300)
    ours = mean_interval(values, [str(i) for i in range(300)], resamples=5000)
    theirs = scipy_stats.bootstrap((values,), np.mean, n_resamples=5000, method="percentile", rng=0)
    assert ours == pytest.approx(theirs.confidence_interval, abs=0.02)


def test_samples_of_one_user_are_not_independent_evidence():
    effects = np.repeat(RNG.normal(size=20), 50)
    by_user = mean_interval(effects, np.repeat(np.arange(20), 50).astype(str).tolist())
    by_sample = mean_interval(effects, np.arange(1000).astype(str).tolist())
    assert by_user.high - by_user.low > 4 * (by_sample.high - by_sample.low)


def test_the_order_of_samples_does_not_matter():
    order = RNG.permutation(200)
    shuffled = mean_interval(VALUES[order], [USERS[i] for i in order])
    assert shuffled == pytest.approx(mean_interval(VALUES, USERS), abs=1e-12)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    assert mean_interval(VALUES, USERS, seed=1) == mean_interval(VALUES, USERS, seed=1)
    assert mean_interval(VALUES, USERS, seed=1) != mean_interval(VALUES, USERS, seed=2)


@pytest.mark.parametrize("users", [[], ["a"], ["a", "a", "a"]])
def test_fewer_than_two_users_have_no_interval(users: list[str]):
    values = [1.0] * len(users)
    assert all(math.isnan(bound) for bound in mean_interval(values, users))
    assert all(math.isnan(bound) for bound in user_bootstrap(users, lambda i: 1.0))


def test_resamples_without_a_value_are_left_out():
    calls = iter(range(1000))
    interval = user_bootstrap(USERS, lambda i: math.nan if next(calls) % 2 else 7.0)
    assert interval == (7.0, 7.0)


def test_a_nan_among_the_values_is_an_error():
    with pytest.raises(ValueError, match="leave failed samples out"):
        mean_interval([1.0, math.nan], ["a", "b"])


def test_values_and_users_must_be_of_one_length():
    with pytest.raises(ValueError, match="2 values for 1 users"):
        mean_interval([1.0, 2.0], ["a"])


def test_a_paired_difference_counts_only_samples_both_runs_scored():
    difference = paired_difference([1.0, 2.0, None, 4.0], [0.0, 1.0, 1.0, math.nan], ["a", "b", "c", "d"])
    assert (difference.n, difference.mean) == (2, 1.0)


def test_a_constant_gain_has_an_interval_of_no_width():
    difference = paired_difference((VALUES + 0.25).tolist(), VALUES.tolist(), USERS)
    assert (difference.mean, difference.low, difference.high) == pytest.approx((0.25, 0.25, 0.25))


def test_no_pair_is_no_difference():
    difference = paired_difference([None], [1.0], ["a"])
    assert difference.n == 0
    assert math.isnan(difference.mean)


def test_two_thousand_users_take_under_a_second():
    values, users = RNG.normal(size=10_000), [str(i % 2000) for i in range(10_000)]
    start = time.process_time()
    mean_interval(values, users)
    assert time.process_time() - start < 1
