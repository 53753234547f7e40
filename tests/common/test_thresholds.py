from math import comb, log2

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedoppu.common import thresholds
from fedoppu.common.config import ThresholdSettings
from fedoppu.common.errors import UsageError
from fedoppu.common.thresholds import (
    Thresholds,
    allowed_drops,
    corrupt_quantile,
    least_threshold,
    plan_thresholds,
    quorum,
    split_threshold,
    survives,
)

SMALL = [
    (0, 2, 2, 0),
    (0, 3, 2, 1),
    (0, 4, 3, 1),
    (0, 5, 3, 2),
    (0, 6, 4, 2),
    (0, 7, 4, 3),
    (1, 3, 3, 0),
    (1, 4, 3, 1),
    (1, 5, 4, 1),
    (1, 6, 4, 2),
    (1, 7, 5, 2),
]


@pytest.mark.parametrize(("corrupt", "n", "threshold", "drops"), SMALL)
def test_small_cohorts_have_these_thresholds_and_drops(
    corrupt: int, n: int, threshold: int, drops: int
) -> None:
    found = plan_thresholds(n, ThresholdSettings(floor=2, corrupt=corrupt, max_drop=0.5))
    assert found == Thresholds(n - 1, threshold, drops, n - drops)
    assert threshold == quorum(n, corrupt)
    assert drops <= n - threshold


def test_table_of_small_cohorts_is_in_the_module() -> None:
    """The docstring tells what the calculator gives, in its order."""
    rows = [line.split() for line in (thresholds.__doc__ or "").splitlines()]
    for corrupt, name in ((0, ["no", "corrupt", "member:"]), (1, ["one", "corrupt", "member:"])):
        at = next(place for place, row in enumerate(rows) if row[:3] == name)
        told = [(t, d) for t, d in zip(rows[at][4:], rows[at + 1][1:], strict=True) if t != "-"]
        assert told == [(str(t), str(d)) for c, _, t, d in SMALL if c == corrupt]


def test_two_members_of_whom_one_is_corrupt_are_no_cohort() -> None:
    with pytest.raises(UsageError, match=r"thresholds\.floor \+ thresholds\.corrupt = 3 members"):
        plan_thresholds(2, ThresholdSettings(floor=2, corrupt=1))


# Honest but curious, sigma = 40 and eta = 20 bits: corrupt share, drop share, n, k, t.
CURIOUS = [
    (0.2, 0.1, 100, 54, 21),
    (0.2, 0.1, 256, 56, 34),
    (0.2, 0.1, 1000, 68, 43),
    (0.2, 0.1, 4096, 74, 47),
    (0.2, 0.1, 10_000, 80, 51),
    (0.05, 0.1, 1000, 38, 19),
    (0.05, 0.1, 10_000, 42, 21),
    (0.33, 0.1, 1000, 102, 72),
    (0.2, 0.3, 1000, 140, 67),
]


@pytest.mark.parametrize(("corrupt", "drop", "n", "neighbours", "threshold"), CURIOUS)
def test_table_against_a_curious_server_is_met(
    corrupt: float, drop: float, n: int, neighbours: int, threshold: int
) -> None:
    quantile = corrupt_quantile(n - 1, neighbours, int(corrupt * n), bits=40, members=n)
    assert quantile + 1 == threshold
    assert survives(n, neighbours, threshold, drops=allowed_drops(n, drop))


# An active server, without the cuts of the ring, sigma = 40: corrupt share, n, least k, its t.
ACTIVE = [
    (0.2, 100, 42, 32),
    (0.2, 1000, 138, 102),
    (0.2, 10_000, 182, 134),
    (0.05, 1000, 74, 49),
    (0.05, 10_000, 94, 62),
]


@pytest.mark.parametrize(("corrupt", "n", "neighbours", "threshold"), ACTIVE)
def test_table_against_an_active_server_is_met(
    corrupt: float, n: int, neighbours: int, threshold: int
) -> None:
    def t(k: int) -> int:
        quantile = corrupt_quantile(n - 1, k, round(corrupt * n), bits=40, members=n)
        return split_threshold(k, quantile)

    def works(k: int) -> bool:
        return t(k) <= k and survives(n, k, t(k), drops=n // 10)

    assert t(neighbours) == threshold
    assert works(neighbours)
    assert not works(neighbours - 2)


def test_threshold_of_the_measured_graph_is_38() -> None:
    assert split_threshold(54, corrupt_quantile(99, 54, 20, bits=40, members=100)) == 38


@given(
    population=st.integers(5, 60),
    draws=st.integers(1, 60),
    corrupt=st.integers(0, 60),
    bits=st.integers(1, 40),
)
@settings(max_examples=80, deadline=None)
def test_quantile_is_the_least_that_keeps_the_bound(
    population: int, draws: int, corrupt: int, bits: int
) -> None:
    draws, corrupt = min(draws, population), min(corrupt, population)

    def chance(least: int) -> float:
        ways = sum(
            comb(corrupt, i) * comb(population - corrupt, draws - i)
            for i in range(least, draws + 1)
        )
        return ways / comb(population, draws)

    quantile = corrupt_quantile(population, draws, corrupt, bits=bits, members=1)
    assert chance(quantile + 1) <= 2.0**-bits * 1.000001
    assert quantile == 0 or chance(quantile) > 2.0**-bits * 0.999999


def test_survival_is_the_hypergeometric_tail() -> None:
    # 70 members, 4 neighbours, 2 drops: a member loses both with chance C(4,2)/C(69,2).
    assert not survives(70, 4, 3, drops=2)
    assert survives(70, 4, 2, drops=2)
    assert log2(70 * comb(4, 2) / comb(69, 2)) > -20


@given(n=st.integers(2, 150), share=st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.5]), data=st.data())
@settings(max_examples=60, deadline=None)
def test_every_cohort_that_a_plan_allows_passes_a_clients_own_check(
    n: int, share: float, data: st.DataObject
) -> None:
    corrupt = data.draw(st.integers(0, min(n - 2, n // 5)))
    found = plan_thresholds(n, ThresholdSettings(2, corrupt, share))
    assert found.max_drops <= allowed_drops(n, share)
    assert found.threshold <= found.min_cohort == n - found.max_drops
    for size in range(found.min_cohort, n + 1):
        assert found.threshold >= least_threshold(size, found.neighbours, corrupt)
    assert found.min_cohort >= quorum(n, corrupt) or found.max_drops == 0


def test_threshold_on_the_ring_leaves_no_cut() -> None:
    # A member beside a gap keeps k/2 neighbours and the corrupt ones in the gap: below t.
    threshold = least_threshold(1000, 126, 100)
    beside = corrupt_quantile(999, 63, 100, bits=32, members=1000)
    assert threshold > 63 + beside


def test_cohort_below_the_floor_is_refused_with_a_remedy() -> None:
    with pytest.raises(UsageError, match=r"thresholds.floor \+ thresholds.corrupt = 21 members"):
        plan_thresholds(20, ThresholdSettings(floor=20, corrupt=1))


def test_drop_share_is_read_as_the_decimal_that_was_written() -> None:
    assert [allowed_drops(10, share) for share in (0.3, 0.1, 0.7)] == [3, 1, 7]


@pytest.mark.parametrize(("n", "drops"), [(2, 0), (5, 1), (18, 5), (1000, 300)])
def test_without_a_graph_only_floors_and_drops_say_something(n: int, drops: int) -> None:
    found = plan_thresholds(n, ThresholdSettings(max_drop=0.3), graph=False)
    assert (found.neighbours, found.threshold) == (1, 1)
    assert (found.max_drops, found.min_cohort) == (drops, n - drops)
    with pytest.raises(UsageError, match=r"a cohort needs thresholds\.floor"):
        plan_thresholds(n, ThresholdSettings(floor=n, corrupt=1), graph=False)


def test_the_fewest_members_are_the_floor_and_those_assumed_corrupt() -> None:
    settings = ThresholdSettings(floor=20, corrupt=3)
    assert settings.least == 23
    with pytest.raises(UsageError, match=r"thresholds\.floor \+ thresholds\.corrupt = 23 members"):
        plan_thresholds(settings.least - 1, settings)
