"""Intervals and tests of a difference: against published tables, on simulated data, and their laws."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkd.pipeline.evaluate.statistics import (
    Difference,
    percentile_interval,
    resampled_sums,
    two_sided_p,
    wilson_interval,
)

_NEWCOMBE = [
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0, 0.1611),
    (1, 29, 0.0061, 0.1718),
]
"""R. G. Newcombe, Two-sided confidence intervals for the single proportion, Statist. Med. 17 (1998), table I, method 3."""


def share(sums):
    return sums[..., 0] / sums[..., 1]


def pictures(random, count, questions=4, rate=0.6, spread=0.3):
    """Right answers and questions of each picture; questions about one picture share their rate."""
    rates = np.clip(random.normal(rate, spread, count), 0, 1)
    return np.stack([random.binomial(questions, rates), np.full(count, questions)], axis=1).astype(float)


def one_stratum(sums):
    return np.zeros(len(sums), dtype=np.int64)


@pytest.mark.parametrize(("correct", "total", "low", "high"), _NEWCOMBE)
def test_wilsons_interval_is_that_of_the_published_table(correct, total, low, high):
    assert wilson_interval(correct, total, z=1.959964) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 20_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_interval_solves_its_equation_and_mirrors(counts):
    correct, total = counts
    p = correct / total
    low, high = wilson_interval(correct, total)
    assert 0 <= low <= high <= 1
    for bound in (low, high):
        assert (p - bound) ** 2 == pytest.approx(1.96**2 * bound * (1 - bound) / total, abs=1e-9)
    assert low - 1e-12 <= p <= high + 1e-12
    mirrored = wilson_interval(total - correct, total)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-9)


def test_the_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
    random, truth = np.random.default_rng(0), 0.6
    hits = 0
    for trial in range(200):
        sums = pictures(random, 150, rate=truth, spread=0.1)
        low, high = percentile_interval(share(resampled_sums(sums, one_stratum(sums), (trial,), 400)))
        hits += low <= truth <= high
    assert 0.89 <= hits / 200 <= 0.99


def test_an_interval_by_picture_is_wider_than_one_that_takes_questions_for_independent():
    sums = pictures(np.random.default_rng(1), 200, questions=10, spread=0.35)
    low, high = percentile_interval(share(resampled_sums(sums, one_stratum(sums), (0,), 1000)))
    naive = wilson_interval(int(sums[:, 0].sum()), int(sums[:, 1].sum()))
    assert high - low > 1.5 * (naive[1] - naive[0])


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.lists(st.integers(0, 2), min_size=3, max_size=40))
def test_a_resample_keeps_the_size_of_every_stratum(seed, strata):
    strata = np.array(strata)
    sums = (strata[:, None] == np.arange(3)).astype(float)
    assert (resampled_sums(sums, strata, (seed,), 50) == sums.sum(axis=0)).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31))
def test_models_put_side_by_side_are_compared_on_the_same_draws(seed):
    sums = pictures(np.random.default_rng(seed), 30)
    both = resampled_sums(np.concatenate([sums, sums], axis=1), one_stratum(sums), (seed, 1), 60)
    alone = resampled_sums(sums, one_stratum(sums), (seed, 1), 60)
    assert np.allclose(both[:, :2], alone)
    assert np.allclose(both[:, 2:], alone)


def test_draws_that_do_not_fit_at_once_are_made_in_parts(monkeypatch):
    sums = pictures(np.random.default_rng(0), 50)
    monkeypatch.setattr("alignkd.pipeline.evaluate.statistics._DRAWS_AT_A_TIME", 175)
    values = share(resampled_sums(sums, one_stratum(sums), (3,), 1000))
    assert np.isfinite(values).all()
    assert values.mean() == pytest.approx(share(sums.sum(axis=0)), abs=0.02)


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=200))
def test_p_is_symmetric_and_a_probability(differences):
    values = np.array(differences)
    assert two_sided_p(values) == two_sided_p(-values)
    assert 2 / (len(values) + 1) <= two_sided_p(values) <= 1


def test_equal_models_differ_by_nothing_with_p_one():
    difference = Difference.of(0.0, np.zeros(2000))
    assert (difference.value, difference.interval, difference.p) == (0.0, None, 1.0)


def test_p_is_small_about_where_the_interval_leaves_zero_out():
    random = np.random.default_rng(2)
    for shift in np.linspace(-4, 4, 33):
        values = random.normal(shift, 1, 4000)
        low, high = percentile_interval(values)
        if abs(abs(shift) - 1.96) > 0.15:
            assert (two_sided_p(values) < 0.05) == (not low <= 0 <= high)


def test_p_of_two_equal_models_is_rarely_small():
    random = np.random.default_rng(4)
    small = 0
    for trial in range(200):
        first, second = pictures(random, 120), pictures(random, 120)
        drawn = resampled_sums(np.concatenate([first, second], axis=1), one_stratum(first), (trial,), 300)
        small += two_sided_p(share(drawn[:, :2]) - share(drawn[:, 2:])) < 0.05
    assert small / 200 <= 0.1


def test_resamples_without_a_figure_are_left_out():
    values = np.array([np.nan, 1.0, 2.0, 3.0])
    assert percentile_interval(values) == pytest.approx((1.05, 2.95))
    assert two_sided_p(values) == 2 / 4
    assert percentile_interval(np.array([np.nan])) is None
