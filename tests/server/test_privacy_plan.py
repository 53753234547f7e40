"""What a federation would need, against the figures of the specification and the code that runs it."""

import math
from dataclasses import replace

import numpy as np
import pytest

from fedoppu.common import accounting
from fedoppu.common.config import EncodingSettings, PrivacySettings, ThresholdSettings
from fedoppu.common.defaults import fitting_range
from fedoppu.common.errors import UsageError
from fedoppu.common.integer_noise import discrete_gaussian
from fedoppu.server import privacy_plan
from fedoppu.server.privacy_plan import Federation, plan_privacy

FIXED = PrivacySettings("central", noise_multiplier=1.0)
BASE = Federation(privacy=replace(FIXED, sampling="poisson"))


@pytest.mark.parametrize(("cohort", "most"), [(100, 10_000), (1000, 1_000_000)])
def test_signal_survives_up_to_the_parameters_of_the_specification(cohort: int, most: int) -> None:
    plan = plan_privacy(replace(BASE, users=10_000, cohort=cohort, parameters=most))
    assert plan.most_parameters == most
    assert plan.signal == pytest.approx(1.0)
    more = plan_privacy(replace(BASE, users=10_000, cohort=cohort, parameters=4 * most))
    assert more.signal == pytest.approx(0.5)
    assert more.least_cohort == 2 * cohort
    assert not more.survives


def test_signal_is_what_a_simulated_round_shows() -> None:
    """Equal updates at the clip bound, summed in levels with the plan's noise."""
    federation = replace(BASE, parameters=2500)
    plan = plan_privacy(federation)
    update = np.random.default_rng(1).normal(size=2500)
    levels = np.rint(update / np.linalg.norm(update) * plan.sensitivity) * federation.cohort
    noise = discrete_gaussian(bytes(32), plan.total_scale, 2500)
    assert np.linalg.norm(levels) / np.linalg.norm(noise) == pytest.approx(plan.signal, rel=0.05)


def test_needed_noise_of_the_specification() -> None:
    plan = plan_privacy(
        replace(BASE, privacy=PrivacySettings("central", epsilon=8.0, sampling="poisson"))
    )
    assert plan.noise_multiplier == pytest.approx(0.936, abs=0.0011)
    assert plan.spent.released <= 8.0
    assert plan.affordable_rounds == 100
    assert plan.effective_multiplier == pytest.approx(plan.noise_multiplier)


def test_distributed_noise_is_counted_as_clients_add_it() -> None:
    privacy = PrivacySettings("distributed", noise_multiplier=1.0)
    thresholds = ThresholdSettings(floor=20, corrupt=10, max_drop=0.3)
    plan = plan_privacy(replace(BASE, privacy=privacy, thresholds=thresholds))
    assert plan.client_scale == pytest.approx(plan.sensitivity / math.sqrt(70 - 10))
    assert plan.total_scale == pytest.approx(10 * plan.client_scale)
    assert plan.effective_multiplier == pytest.approx(math.sqrt(100 / 60))
    steady = plan_privacy(
        replace(BASE, privacy=replace(privacy, sampling="poisson"), thresholds=thresholds)
    )
    assert steady.effective_multiplier == pytest.approx(math.sqrt(2.1))  # a cohort of 42
    assert steady.amplified
    assert not plan.amplified


def test_correlated_noise_leaves_less_error() -> None:
    privacy = PrivacySettings("dp_ftrl", noise_multiplier=5.0, separation=10)
    plan = plan_privacy(replace(BASE, privacy=privacy))
    assert plan.spent.released == pytest.approx(2.59, abs=0.005)
    assert plan.effective_multiplier < 2.2
    assert plan.total_scale > 5 * plan.sensitivity


def test_budget_ends_before_the_rounds_do() -> None:
    privacy = replace(FIXED, epsilon=10.0)
    plan = plan_privacy(replace(BASE, privacy=privacy))
    assert plan.affordable_rounds == 4
    assert plan.spent.rounds == 4
    assert (
        accounting.gaussian_epsilon(1.0, 4, 1e-5) <= 10 < accounting.gaussian_epsilon(1.0, 5, 1e-5)
    )


def test_a_budget_below_one_round_affords_none() -> None:
    plan = plan_privacy(replace(BASE, privacy=replace(FIXED, epsilon=0.5)))
    assert plan.affordable_rounds == 0
    assert plan.spent.released == 0.0


def test_words_hold_the_largest_poisson_cohort_and_its_noise() -> None:
    narrow = EncodingSettings(word_bits=16, level_bits=8, clip=10.0, value_range=0.6)
    fixed = plan_privacy(
        replace(BASE, encoding=narrow, privacy=replace(FIXED, noise_multiplier=0.1))
    )
    assert fixed.fits
    assert fixed.used_values > 100 * 255
    poisson = plan_privacy(
        replace(
            BASE,
            encoding=narrow,
            privacy=replace(FIXED, noise_multiplier=0.1, sampling="poisson"),
        )
    )
    assert poisson.used_values > fixed.used_values + 40 * 255
    noisy = plan_privacy(replace(BASE, encoding=narrow))
    assert not noisy.fits


def test_fitting_range_holds_a_rotated_update() -> None:
    update = np.random.default_rng(2).normal(size=10_000)
    update *= 10.0 / np.linalg.norm(update)
    assert abs(update).max() < fitting_range(10.0, 10_000) == 0.6


def test_accounting_without_the_extra_needs_more_noise_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    federation = replace(BASE, privacy=PrivacySettings("central", epsilon=3.0, sampling="poisson"))
    exact = plan_privacy(federation)
    for module in (accounting, privacy_plan):
        monkeypatch.setattr(module, "has_pld", lambda: False)
    accounting.calibrate.cache_clear()
    bound = plan_privacy(federation)
    accounting.calibrate.cache_clear()
    assert bound.noise_multiplier > exact.noise_multiplier
    assert exact.exact_accounting
    assert not bound.exact_accounting


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cohort": 1001}, "cohort must be at most the number of users, 1000, got 1001"),
        ({"cohort": 1}, "cohort must be at least 2, got 1"),
        ({"users": 0}, "users must be between 2 and"),
        ({"rounds": -1}, "rounds must be between 1 and"),
        ({"parameters": 0}, "parameters must be between 1 and"),
        ({"privacy": PrivacySettings()}, "mechanism=none promises nothing"),
        (
            {"privacy": PrivacySettings("dp_ftrl", noise_multiplier=1.0, sampling="poisson")},
            "takes members in turn",
        ),
        (
            {"privacy": PrivacySettings("dp_ftrl", noise_multiplier=1.0, separation=11)},
            r"separation must be at most users / cohort = 10, got 11",
        ),
    ],
)
def test_federations_that_cannot_be_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(BASE, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"thresholds": ThresholdSettings(floor=90)}, "fall below the floor of 90"),
        (
            {"privacy": FIXED, "thresholds": ThresholdSettings(floor=101)},
            "cohort needs thresholds.floor",
        ),
        ({"privacy": PrivacySettings("central")}, "needs a budget or an amount of noise"),
        (
            {
                "privacy": replace(FIXED, noise_multiplier=0.01),
                "encoding": EncodingSettings(level_bits=2, value_range=10.0, clip=1.0),
            },
            "must have a scale of at least 16 levels",
        ),
    ],
)
def test_plans_that_would_be_refused_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan_privacy(replace(BASE, **changes))  # type: ignore[arg-type]
