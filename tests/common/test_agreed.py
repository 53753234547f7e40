"""What a plan must say follows from the config; with noise, from the plan's own floor too."""

from dataclasses import replace
from typing import Any

import pytest

from fedoppu.common.agreed import agreed, agreed_noise
from fedoppu.common.config import FederationConfig, PrivacySettings, ThresholdSettings
from fedoppu.common.errors import UsageError
from fedoppu.common.privacy import sensitivity
from fedoppu.common.rounds import RoundPlan
from tests.fake_federation import CONFIG, SPEC


def config(mechanism: Any = "none", **changes: Any) -> FederationConfig:
    noise = None if mechanism == "none" else 2.0
    return replace(CONFIG, privacy=PrivacySettings(mechanism, noise, **changes))


def plan(own: FederationConfig, *, min_cohort: int = 6, number: int = 1) -> RoundPlan:
    fields = {"value_range": 0.25} | agreed(own, SPEC, number)
    return RoundPlan(
        run_id="ab" * 16,
        round=number,
        attempt=0,
        config_hash=own.hash().hex(),
        roster_hash="ef" * 32,
        model_hash="01" * 32,
        threshold=4,
        neighbours=7,
        min_cohort=min_cohort,
        max_drops=2,
        **fields,
    )


def test_range_is_agreed_only_where_nothing_exact_may_move_it() -> None:
    assert "value_range" not in agreed(config(), SPEC, 1)
    for mechanism in ("central", "distributed", "dp_ftrl"):
        assert agreed(config(mechanism), SPEC, 3)["value_range"] == CONFIG.encoding.value_range


def test_metrics_travel_only_without_differential_privacy() -> None:
    assert agreed(config(), SPEC, 1)["metrics"] is True
    assert agreed(config("central"), SPEC, 1)["metrics"] is False


def test_only_distributed_noise_is_in_the_plan() -> None:
    assert [agreed_noise(own, plan(own)) for own in (config(), config("central"))] == [0, 0]
    own = config("distributed")
    assert agreed_noise(own, plan(own)) == pytest.approx(2 * sensitivity(plan(own)) / 6**0.5)


def test_smaller_floor_and_more_corrupt_members_mean_more_noise_each() -> None:
    own = config("distributed")
    doubtful = replace(own, thresholds=ThresholdSettings(floor=2, corrupt=3))
    noises = [agreed_noise(own, plan(own)), agreed_noise(own, plan(own, min_cohort=4))]
    noises.append(agreed_noise(doubtful, plan(doubtful, min_cohort=4)))
    assert noises == sorted(noises)
    with pytest.raises(UsageError, match="distributed noise needs more survivors than corrupt"):
        agreed_noise(doubtful, plan(doubtful, min_cohort=3))


def test_the_plans_own_noise_scale_is_not_read() -> None:
    own = config("distributed")
    assert agreed_noise(own, replace(plan(own), noise_scale=1.0)) == agreed_noise(own, plan(own))


def test_rotation_changes_with_the_round_unless_noise_is_correlated() -> None:
    first, second = (agreed(config("central"), SPEC, number)["rotation"] for number in (1, 2))
    assert first != second
    first, second = (agreed(config("dp_ftrl"), SPEC, number)["rotation"] for number in (1, 2))
    assert first == second
