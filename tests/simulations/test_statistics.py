"""Bootstrap, signed ranks and multiple tests: coverage, strata, degenerate sets, repeatability."""

from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedoppu.common.errors import DataError, UsageError
from fedoppu.common.randomness import Randomness
from fedoppu.simulations import statistics
from fedoppu.simulations.columns import Column
from fedoppu.simulations.metrics import root_ratio
from fedoppu.simulations.statistics import (
    CHUNK,
    BootstrapSettings,
    Estimate,
    Statistic,
    bootstrap,
    compare_users,
    gains,
    holm,
    mean_of,
    signed_rank,
)

ROOT = Randomness.from_seed(0)
FAST = BootstrapSettings(ROOT, resamples=2000)


def mean(values: Sequence[float | None]) -> Statistic:
    return mean_of(Column.of(values))


def gain(left: Sequence[float | None], right: Sequence[float | None], *, sign: int) -> Statistic:
    return mean_of(gains(Column.of(left), Column.of(right), sign=sign))


def one(values: Sequence[float | None], strata: Sequence[object] | None = None) -> Estimate:
    return bootstrap([mean(values)], strata or [0] * len(values), FAST)[0]


def test_the_interval_is_that_of_all_resamples_of_three_users() -> None:
    values = [0.0, 1.0, 5.0]
    means = [np.mean(draw) for draw in product(values, repeat=3)]
    many = BootstrapSettings(ROOT, resamples=20_000, confidence=0.8)
    found = bootstrap([mean(values)], [0, 0, 0], many)[0]
    assert found.value == 2.0
    assert (found.low, found.high) == pytest.approx(np.quantile(means, [0.1, 0.9]))


def test_nine_of_ten_intervals_at_90_percent_hold_the_truth() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for trial in range(200):
        values = rng.normal(loc=1.0, size=40).tolist()
        quick = BootstrapSettings(Randomness.from_seed(trial), resamples=500, confidence=0.9)
        found = bootstrap([mean(values)], [0] * 40, quick)[0]
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 1.0 <= found.high
    assert 168 <= held <= 192  # 180 expected, standard deviation 4.2; percentile is a bit narrow


def test_users_are_resampled_within_their_stratum() -> None:
    values = [0.0, 0.0, 10.0, 10.0]
    found = one(values, strata=["a", "a", "b", "b"])
    assert (found.value, found.low, found.high) == (5.0, 5.0, 5.0)
    mixed = one(values)
    assert mixed.low == 0.0
    assert mixed.high == 10.0


def test_a_difference_is_paired() -> None:
    left = [0.1, 0.5, 0.9, 0.3]
    right = [value - 0.25 for value in left]
    found = bootstrap([gain(left, right, sign=1)], [0] * 4, FAST)[0]
    assert (found.value, found.low, found.high) == pytest.approx((0.25, 0.25, 0.25))


def test_a_gain_is_positive_where_lower_is_better_and_left_is_lower() -> None:
    found = bootstrap([gain([0.5, 0.5], [1.0, 2.0], sign=-1)], [0, 0], FAST)[0]
    assert found.value == 1.0
    assert found.low is not None
    assert found.low > 0


def test_users_without_a_score_are_left_out() -> None:
    assert one([1.0, None, 3.0]).value == 2.0
    found = bootstrap([gain([1.0, None, 4.0], [0.0, 1.0, None], sign=1)], [0] * 3, FAST)[0]
    assert found.value == 1.0


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], Estimate(None, None, None)),
        ([None, None], Estimate(None, None, None)),
        ([0.5], Estimate(0.5, None, None)),
        ([0.5, 0.5, 0.5], Estimate(0.5, 0.5, 0.5)),
    ],
)
def test_degenerate_sets(values: list[float | None], expected: Estimate) -> None:
    assert one(values) == expected


def test_one_user_in_each_stratum_has_no_interval() -> None:
    assert one([0.1, 0.9], strata=["a", "b"]) == Estimate(0.5, None, None)


def test_no_statistics_give_no_estimates() -> None:
    assert bootstrap([], [0, 0], FAST) == []


def test_a_function_of_sums_is_resampled_with_its_users() -> None:
    squares = np.array([[4.0, 1.0], [16.0, 1.0], [1.0, 1.0]])
    found = bootstrap([Statistic(lambda: squares, root_ratio)], [0] * 3, FAST)[0]
    assert found.value == pytest.approx(np.sqrt(7.0))
    assert found.low == pytest.approx(1.0)
    assert found.high == pytest.approx(4.0)


def test_the_same_seed_gives_the_same_draws_whatever_else_is_asked() -> None:
    rng = np.random.default_rng(1)
    values, others = rng.normal(size=20).tolist(), rng.normal(size=20).tolist()
    alone = bootstrap([mean(values)], [0] * 20, FAST)
    together = bootstrap([mean(others), mean(values)], [0] * 20, FAST)
    assert alone[0] == together[1]
    other_seed = BootstrapSettings(Randomness.from_seed(1), resamples=2000)
    assert bootstrap([mean(values)], [0] * 20, other_seed) != alone
    assert bootstrap([mean(values)], [0] * 20, FAST, key=("LaMP_3",)) != alone


def test_more_resamples_begin_with_the_same_draws() -> None:
    values = np.random.default_rng(2).normal(size=9).tolist()
    short = bootstrap([mean(values)], [0] * 9, BootstrapSettings(ROOT, resamples=CHUNK))
    again = bootstrap([mean(values)], [0] * 9, BootstrapSettings(ROOT, resamples=CHUNK))
    longer = bootstrap([mean(values)], [0] * 9, BootstrapSettings(ROOT, resamples=CHUNK + 1))
    assert short == again
    assert longer[0].low == pytest.approx(short[0].low, abs=0.02)


@pytest.mark.parametrize("held", [1, 900, 3000])
def test_what_is_held_at_once_changes_no_bit(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    many = [mean(rng.normal(size=60).tolist()) for _ in range(17)]
    many.append(Statistic(lambda: np.ones((60, 5)), lambda sums: sums[..., 0]))
    strata = [0] * 23 + [1] * 37
    whole = bootstrap(many, strata, BootstrapSettings(ROOT, resamples=CHUNK + 33))
    monkeypatch.setattr(statistics, "HELD", held)  # blocks of 8, of 15 and of 50
    assert bootstrap(many, strata, BootstrapSettings(ROOT, resamples=CHUNK + 33)) == whole


@settings(max_examples=30)
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=12))
def test_an_interval_lies_within_the_values(values: list[float]) -> None:
    found = one(values)
    assert found.low is not None
    assert found.high is not None
    assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9


def test_too_few_users_for_the_strata_are_refused() -> None:
    with pytest.raises(DataError, match="a statistic of 1 users, not 2"):
        bootstrap([mean([1.0])], [0, 0], FAST)


def test_ranges_of_the_settings_are_checked() -> None:
    with pytest.raises(UsageError, match="resamples must be at least 1, got 0"):
        BootstrapSettings(ROOT, resamples=0)
    with pytest.raises(UsageError, match="confidence must be between"):
        BootstrapSettings(ROOT, confidence=1.0)


def test_users_are_helped_harmed_or_neither() -> None:
    found = compare_users(Column.of([0.5, 0.25, -0.25, 0.0, None]))
    assert found is not None
    assert (found.users, found.helped, found.harmed) == (4, 0.5, 0.25)
    assert found.tenth == pytest.approx(-0.175)
    assert found.median == 0.125


def test_nobody_to_compare() -> None:
    assert compare_users(Column.of([None, None])) is None
    assert compare_users(Column.of([])) is None


def test_signed_rank_is_exact_for_few_users_without_ties() -> None:
    # All five of five signs agree: 2 of 2 ** 5 sign patterns are as extreme.
    assert signed_rank(np.array([0.1, 0.2, 0.3, 0.4, 0.5])) == pytest.approx(2 / 32)
    assert signed_rank(np.zeros(5)) is None


def test_signed_rank_ties_gains_that_differ_in_the_last_bit() -> None:
    almost = np.array([0.3, 0.1 + 0.2, -0.1, 0.5, 0.7, 0.9])
    exact = np.array([0.3, 0.3, -0.1, 0.5, 0.7, 0.9])
    assert signed_rank(almost) == signed_rank(exact)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, None, 0.03]) == pytest.approx([0.03, 0.06, None, 0.06])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_never_lowers_a_p_value_and_never_passes_one(p_values: list[float]) -> None:
    for raw, adjusted in zip(p_values, holm(p_values), strict=True):
        assert adjusted is not None
        assert raw <= adjusted <= 1.0
