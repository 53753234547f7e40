"""Cohorts: pure functions of root, round and attempt, over members alone."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedoppu.common.config import PrivacySettings
from fedoppu.common.errors import UsageError
from fedoppu.common.randomness import Randomness
from fedoppu.server.cohort import (
    CohortSampler,
    CyclicSampler,
    PoissonSampler,
    UniformSampler,
    sampler_of,
)
from tests.fake_federation import CONFIG

ROOT = Randomness.from_seed(1)
MEMBERS = st.sets(st.integers(0, 500), max_size=40)


@given(MEMBERS, st.integers(1, 30), st.integers(1, 9), st.integers(0, 3))
def test_uniform_cohort_is_sorted_of_its_size_and_the_same_in_any_order(
    members: set[int], size: int, number: int, attempt: int
) -> None:
    sampler = UniformSampler(size)
    cohort = sampler.sample(ROOT, sorted(members), round=number, attempt=attempt)
    backwards = sorted(members, reverse=True)
    assert cohort == sampler.sample(ROOT, backwards, round=number, attempt=attempt)
    assert list(cohort) == sorted(set(cohort) & members)
    assert len(cohort) == min(size, len(members))


@pytest.mark.parametrize("sampler", [UniformSampler(10), PoissonSampler(0.3)])
def test_round_and_attempt_and_root_each_draw_anew(sampler: CohortSampler) -> None:
    draws = {
        sampler.sample(Randomness.from_seed(seed), range(40), round=number, attempt=attempt)
        for seed, number, attempt in [(1, 1, 0), (1, 2, 0), (1, 1, 1), (2, 1, 0)]
    }
    assert len(draws) == 4


def mean_count(sampler: CohortSampler, eligible: Collection[int]) -> float:
    rounds = range(1, 400)
    return float(np.mean([len(sampler.sample(ROOT, eligible, round=n, attempt=0)) for n in rounds]))


def test_poisson_cohorts_vary_around_their_rate_and_may_be_empty() -> None:
    assert mean_count(PoissonSampler(0.25), range(40)) == pytest.approx(10, rel=0.05)
    sampler = PoissonSampler(0.05)
    assert any(not sampler.sample(ROOT, range(5), round=n, attempt=0) for n in range(1, 20))


def test_every_member_is_drawn_equally_often() -> None:
    sampler = UniformSampler(5)
    counts = np.zeros(20)
    for number in range(1, 1001):
        counts[list(sampler.sample(ROOT, range(20), round=number, attempt=0))] += 1
    assert counts.sum() == 5000
    assert np.sum(np.square(counts - 250)) / 250 < 45  # chi-square, 19 degrees of freedom


def test_cohort_of_none_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="cohort must be at least 1, got 0"):
        UniformSampler(0)


@pytest.mark.parametrize("rate", [0.0, 1.5])
def test_rate_that_cannot_be_is_a_usage_error(rate: float) -> None:
    with pytest.raises(UsageError, match="the rate must be above 0 and at most 1"):
        PoissonSampler(rate)


@given(st.integers(1, 6), st.integers(1, 12), st.integers(2, 60), st.integers(0, 2))
def test_nobody_is_asked_again_before_its_turn(
    separation: int, size: int, members: int, attempt: int
) -> None:
    sampler, last = CyclicSampler(size, separation), dict[int, int]()
    for number in range(1, 3 * separation + 2):
        for member in sampler.sample(ROOT, range(members), round=number, attempt=attempt):
            assert number - last.get(member, -separation) >= separation
            last[member] = number


def test_groups_are_nearly_equal_and_not_who_enrolled_when() -> None:
    sampler = CyclicSampler(100, 4)
    groups = [sampler.sample(ROOT, range(42), round=number, attempt=0) for number in (1, 2, 3, 4)]
    assert sorted(member for group in groups for member in group) == list(range(42))
    assert {len(group) for group in groups} == {10, 11}
    assert groups[0] != tuple(range(0, 42, 4))
    again = [sampler.sample(ROOT, range(42), round=number, attempt=0) for number in (5, 6, 7, 8)]
    assert again == groups


def test_group_is_that_of_the_member_whoever_else_may_be_asked() -> None:
    sampler = CyclicSampler(100, 4)
    whole = sampler.sample(ROOT, range(42), round=2, attempt=0)
    fewer = sampler.sample(ROOT, range(10, 30), round=2, attempt=1)
    assert fewer == tuple(member for member in whole if 10 <= member < 30)


@pytest.mark.parametrize(("size", "separation"), [(0, 2), (2, 0)])
def test_cyclic_sampler_needs_both_sizes(size: int, separation: int) -> None:
    with pytest.raises(UsageError, match="cohort and separation must be at least 1"):
        CyclicSampler(size, separation)


def test_sampler_is_the_one_that_the_privacy_of_a_config_assumes() -> None:
    def of(*settings: Any, **changes: Any) -> CohortSampler:
        privacy = PrivacySettings(*settings, **changes)
        return sampler_of(replace(CONFIG, privacy=privacy), 20)

    assert of() == UniformSampler(5)
    assert of("central", 1.0, sampling="poisson") == PoissonSampler(0.25)
    assert of("central", 1.0) == UniformSampler(5)
    assert of("dp_ftrl", 1.0, separation=3) == CyclicSampler(5, 3)
