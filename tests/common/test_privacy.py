"""Sensitivity, noise scales, and what rounds cost in each view."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedoppu.common.accounting import (
    calibrate,
    gaussian_epsilon,
    poisson_excess,
    sampled_epsilon,
    sum_excess,
)
from fedoppu.common.config import PrivacySettings, ThresholdSettings
from fedoppu.common.errors import UsageError
from fedoppu.common.privacy import (
    Participation,
    affordable,
    amplifies,
    client_noise,
    largest_cohort,
    needed_multiplier,
    require_cohorts,
    require_scales,
    sensitivity,
    server_noise,
    spent,
    steady_ratio,
    top_up,
)
from fedoppu.common.quantization import VectorLayout, round_to_levels
from fedoppu.common.rotation import rotate
from fedoppu.common.thresholds import allowed_drops
from tests.integration.secagg_harness import identities, make_plan, roster_of

PLAN = replace(make_plan(4, roster_of(identities(4)), num_params=1000), metrics=False, max_weight=1)
CENTRAL = PrivacySettings(mechanism="central", noise_multiplier=1.0, sampling="poisson")
DISTRIBUTED = replace(CENTRAL, mechanism="distributed")
HUNDRED = Participation(members=1000, cohort=100, floor=20, rounds=100, most=22)


# --- sensitivity and scales ----------------------------------------------------------------------


@given(
    direction=st.sampled_from(["random", "one", "even", "alternating"]),
    clip=st.floats(0.1, 50.0),
    value_range=st.floats(0.01, 2.0),
    level_bits=st.sampled_from([4, 8, 16]),
    rotated=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_no_rounded_vector_is_longer_than_the_sensitivity(
    direction: str, clip: float, value_range: float, level_bits: int, rotated: bool
) -> None:
    plan = replace(PLAN, clip=clip, value_range=value_range, level_bits=level_bits, word_bits=32)
    vectors = {
        "random": np.random.default_rng(5).normal(size=1000),
        "one": np.eye(1, 1000)[0],
        "even": np.ones(1000),
        "alternating": np.tile([1.0, -1.0], 500),
    }
    update = (vectors[direction] * clip / np.linalg.norm(vectors[direction])).astype(np.float32)
    if rotated:
        update = rotate(update, "5a" * 32)
    layout = VectorLayout.of(plan)
    values = update.clip(-value_range, value_range)
    levels = round_to_levels(values, layout, key=bytes(32)).astype(np.float64) - layout.middle
    assert np.linalg.norm(levels) <= sensitivity(plan)


def test_sensitivity_counts_the_rounding_and_no_more_than_the_clamp() -> None:
    wide = replace(PLAN, clip=2.0, value_range=0.5, level_bits=16)
    exact = 2.0 * 32767 / 0.5
    assert exact + math.sqrt(1000) < sensitivity(wide) < exact * 1.0001 + math.sqrt(1000)
    assert sensitivity(replace(wide, clip=1e6)) == 32767 * math.sqrt(1000)


def test_noise_of_each_mechanism() -> None:
    privacy = replace(CENTRAL, noise_multiplier=0.5)
    assert server_noise(privacy, 80.0) == 40.0
    assert client_noise(privacy, 80.0, floor=20, corrupt=4) == 0.0
    privacy = replace(privacy, mechanism="distributed")
    assert server_noise(privacy, 80.0) == 0.0
    assert client_noise(privacy, 80.0, floor=20, corrupt=4) == 10.0
    for mechanism in ("none", "dp_ftrl"):
        other = replace(privacy, mechanism=mechanism)
        assert server_noise(other, 80.0) == client_noise(other, 80.0, floor=20, corrupt=4) == 0.0


@given(floor=st.integers(2, 500), corrupt=st.integers(0, 499), drops=st.integers(0, 100))
@settings(max_examples=50)
def test_honest_survivors_add_at_least_the_target(floor: int, corrupt: int, drops: int) -> None:
    privacy = replace(DISTRIBUTED, noise_multiplier=1.3)
    if corrupt >= floor:
        with pytest.raises(UsageError, match="needs more survivors than corrupt members"):
            client_noise(privacy, 50.0, floor=floor, corrupt=corrupt)
        return
    scale = client_noise(privacy, 50.0, floor=floor, corrupt=corrupt)
    honest = floor + drops - corrupt
    assert math.sqrt(honest) * scale >= 1.3 * 50.0 * (1 - 1e-12)


def test_noise_without_a_multiplier_is_refused() -> None:
    unset = PrivacySettings(mechanism="central", epsilon=8.0)
    with pytest.raises(UsageError, match=r"privacy.noise_multiplier is not set"):
        server_noise(unset, 10.0)
    with pytest.raises(UsageError, match=r"privacy.noise_multiplier is not set"):
        client_noise(replace(unset, mechanism="distributed"), 10.0, floor=3, corrupt=0)


@pytest.mark.parametrize(
    ("total", "client", "message"),
    [
        (15.9, math.inf, "noise of a sum must have a scale of at least 16 levels .* got 15.9"),
        (100.0, 3.99, "noise of each client must have a scale of at least 4 levels .* got 3.99"),
        (0.0, 0.0, "noise of a sum"),
    ],
)
def test_noise_that_integers_show_through_is_refused(
    total: float, client: float, message: str
) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        require_scales(total, client)
    assert "encoding.level_bits" in refused.value.hint


def test_the_least_scales_are_enough_and_are_allowed() -> None:
    require_scales(16.0, 4.0)
    require_scales(16.0)
    # epsilon of the largest run grows by 2 tau d T, delta by as much of itself
    assert 2 * sum_excess(4.0, 10**6) * 1e10 * 1e6 < 1e-30


# --- topping up ----------------------------------------------------------------------------------


@given(survivors=st.integers(0, 100), client=st.floats(4.0, 1e5))
def test_topped_up_noise_has_the_same_variance_for_any_number_of_survivors(
    survivors: int, client: float
) -> None:
    target = math.sqrt(100) * client
    own = top_up(target, client, survivors)
    assert math.hypot(own, math.sqrt(survivors) * client) == pytest.approx(target)


def test_too_much_noise_cannot_be_topped_up() -> None:
    with pytest.raises(UsageError, match="noise of 5 clients, 10 levels each, is above the target"):
        top_up(20.0, 10.0, 5)


@given(
    floor=st.integers(2, 30),
    corrupt=st.integers(0, 20),
    max_drop=st.sampled_from([0.0, 0.1, 0.3, 1 / 3, 0.5]),
    members=st.integers(1, 400),
)
@settings(max_examples=100)
def test_no_cohort_has_more_noise_than_the_steady_ratio(
    floor: int, corrupt: int, max_drop: float, members: int
) -> None:
    thresholds = ThresholdSettings(floor=floor, corrupt=corrupt, max_drop=max_drop)
    ratios = [1.0]
    for asked in range(floor + corrupt, members + 1):
        least = max(asked - allowed_drops(asked, max_drop), floor + corrupt)
        ratios.append(asked / (least - corrupt))
    assert steady_ratio(thresholds, members) == max(ratios)


def test_steady_ratio_of_a_huge_roster_is_quick() -> None:
    assert steady_ratio(ThresholdSettings(floor=20, corrupt=10), 10**9) == pytest.approx(2.1)


# --- what was spent ------------------------------------------------------------------------------


def test_central_with_poisson_sampling() -> None:
    cost = spent(CENTRAL, HUNDRED)
    assert cost.released == sampled_epsilon(1.0, 0.1, 100, 1e-5) == pytest.approx(7.05, abs=0.02)
    assert cost.adjacency == "add_remove"
    assert cost.peers == gaussian_epsilon(1.0, 22, 1e-5)
    assert cost.server == math.inf
    assert cost.rounds == 100
    assert 1e-5 <= cost.delta < 1.0001e-5


def test_central_with_fixed_cohorts() -> None:
    cost = spent(replace(CENTRAL, sampling="fixed"), HUNDRED)
    assert cost.released == cost.peers == gaussian_epsilon(1.0, 22, 1e-5)
    assert cost.adjacency == "zero_out"
    assert cost.server == math.inf
    assert cost.delta == 1e-5


@pytest.mark.parametrize("steady", [False, True])
def test_distributed_noise_amplifies_only_if_it_tells_no_cohort_size(steady: bool) -> None:
    cost = spent(DISTRIBUTED, HUNDRED, steady=steady)
    assert cost.server == cost.peers == gaussian_epsilon(1.0, 22, 1e-5)
    assert amplifies(DISTRIBUTED, steady=steady) == steady
    assert cost.adjacency == ("add_remove" if steady else "zero_out")
    assert cost.released == (sampled_epsilon(1.0, 0.1, 100, 1e-5) if steady else cost.server)


def test_variance_of_distributed_noise_tells_one_member_from_none_unless_topped_up() -> None:
    length, rounds, target = 100_000, 100, math.sqrt(120)
    rng = np.random.default_rng(1)

    def variance(survivors: int, own: float) -> float:
        """Of the noise of so many rounds, as whoever gets the sums estimates it."""
        draws = rng.chisquare(length, rounds) / length
        return float((draws * (survivors + own**2)).mean())

    error = 120 * math.sqrt(2 / length / rounds)
    told = variance(101, 0.0) - variance(100, 0.0)
    assert told > 10 * error
    hidden = variance(101, top_up(target, 1.0, 101)) - variance(100, top_up(target, 1.0, 100))
    assert abs(hidden) < 5 * error


def test_distributed_with_fixed_cohorts_costs_the_same_in_all_views() -> None:
    cost = spent(replace(DISTRIBUTED, sampling="fixed"), HUNDRED)
    assert cost.released == cost.peers == cost.server == gaussian_epsilon(1.0, 22, 1e-5)


def test_correlated_noise_costs_the_participations() -> None:
    privacy = PrivacySettings(mechanism="dp_ftrl", noise_multiplier=5.0, separation=10)
    cost = spent(privacy, replace(HUNDRED, most=10))
    assert cost.released == cost.peers == pytest.approx(2.59, abs=0.005)
    assert (cost.server, cost.adjacency) == (math.inf, "zero_out")


def test_without_a_mechanism_nothing_is_promised() -> None:
    cost = spent(PrivacySettings(), HUNDRED)
    assert cost.released == cost.peers == cost.server == math.inf


@pytest.mark.parametrize(
    "privacy",
    [PrivacySettings(), CENTRAL, DISTRIBUTED, PrivacySettings("dp_ftrl", noise_multiplier=1.0)],
)
def test_no_round_costs_nothing(privacy: PrivacySettings) -> None:
    cost = spent(privacy, replace(HUNDRED, rounds=0, most=0))
    assert (cost.released, cost.peers, cost.server) == (0.0, 0.0, 0.0)


def test_chance_of_too_small_cohorts_is_added_to_delta() -> None:
    risky = replace(HUNDRED, floor=60)
    cost = spent(CENTRAL, risky)
    assert cost.delta == pytest.approx(1e-5 + 100 * 2.4585e-6, rel=1e-4)
    assert spent(replace(CENTRAL, sampling="fixed"), risky).delta == 1e-5


def test_plans_in_which_cohorts_are_too_small_too_often_are_refused() -> None:
    require_cohorts(HUNDRED, 1e-5)
    with pytest.raises(
        UsageError, match=r"floor of 60 in 100 rounds with probability 0\.00025, above 1e-06"
    ) as refused:
        require_cohorts(replace(HUNDRED, floor=60), 1e-5)
    assert "privacy.sampling=fixed" in refused.value.hint
    with pytest.raises(UsageError, match="with probability 1, above"):
        require_cohorts(replace(HUNDRED, floor=150), 1e-5)


# --- the budget ----------------------------------------------------------------------------------


def test_rounds_are_affordable_up_to_the_budget() -> None:
    privacy = replace(CENTRAL, epsilon=7.0)
    assert affordable(privacy, replace(HUNDRED, rounds=98))
    assert not affordable(privacy, HUNDRED)
    assert affordable(CENTRAL, HUNDRED)  # without a budget
    assert affordable(PrivacySettings(epsilon=0.1), HUNDRED)  # without a mechanism


@pytest.mark.parametrize(
    ("privacy", "rate", "compositions"),
    [
        (PrivacySettings("central", epsilon=8.0, sampling="poisson"), 0.1, 100),
        (PrivacySettings("distributed", epsilon=8.0, sampling="poisson"), 0.1, 100),
        (PrivacySettings("central", epsilon=8.0), 1.0, 22),
        (PrivacySettings("dp_ftrl", epsilon=8.0, separation=5), 1.0, 22),
    ],
)
def test_needed_multiplier_is_calibrated_for_what_amplifies(
    privacy: PrivacySettings, rate: float, compositions: int
) -> None:
    z = needed_multiplier(privacy, HUNDRED, steady=True)
    assert z == calibrate(8.0, 1e-5, rate=rate, compositions=compositions)
    assert affordable(replace(privacy, noise_multiplier=z), HUNDRED, steady=True)


def test_a_configured_multiplier_is_kept_and_none_at_all_is_refused() -> None:
    assert needed_multiplier(CENTRAL, HUNDRED) == 1.0
    with pytest.raises(UsageError, match="central needs a budget or an amount of noise"):
        needed_multiplier(PrivacySettings("central"), HUNDRED)


@pytest.mark.parametrize(
    ("members", "cohort", "rounds"), [(1000, 100, 100), (60, 20, 5), (8, 8, 3)]
)
def test_largest_poisson_cohort_is_passed_with_a_tenth_of_delta_at_most(
    members: int, cohort: int, rounds: int
) -> None:
    privacy = PrivacySettings("central", noise_multiplier=1.0, sampling="poisson")
    planned = Participation(members, cohort, 2, rounds, rounds)
    largest = largest_cohort(privacy, planned)
    assert cohort <= largest <= members
    assert rounds * poisson_excess(members, planned.rate, largest) <= privacy.delta / 10
    if largest > cohort:
        assert rounds * poisson_excess(members, planned.rate, largest - 1) > privacy.delta / 10
    assert largest_cohort(replace(privacy, sampling="fixed"), planned) == cohort
