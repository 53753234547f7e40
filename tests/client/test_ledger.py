"""A vault's privacy ledger: what is charged, what is refused, what is remembered."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedoppu.client.ledger import STATE, PrivacyBudget, PrivacyLedger, VaultLedger
from fedoppu.common.accounting import distributed_epsilon, gaussian_epsilon
from fedoppu.common.agreed import agreed_noise
from fedoppu.common.config import FederationConfig, PrivacySettings, ThresholdSettings
from fedoppu.common.errors import DataError, RefusedByPolicy, UsageError
from fedoppu.common.privacy import sensitivity
from fedoppu.common.rounds import RoundPlan
from fedoppu.simulations.virtual_users import MemoryState
from tests.fake_federation import CONFIG

DELTA = 1e-5
PLAN = RoundPlan(
    run_id="ab" * 16,
    round=1,
    attempt=0,
    config_hash="cd" * 32,
    roster_hash="ef" * 32,
    model_hash="01" * 32,
    num_params=400,
    factors="B",
    clip=1.0,
    value_range=0.3,
    word_bits=32,
    level_bits=16,
    max_weight=1,
    threshold=8,
    neighbours=14,
    min_cohort=12,
    max_drops=3,
    metrics=False,
)


def config(mechanism: Any = "central", z: float | None = 2.0, **changes: Any) -> FederationConfig:
    return replace(CONFIG, privacy=PrivacySettings(mechanism, z, **changes))


def ledger(epsilon: float | None = None, *, corrupt: int = 0) -> VaultLedger:
    budget = None if epsilon is None else PrivacyBudget(epsilon, DELTA)
    return VaultLedger(MemoryState(), budget, corrupt)


def rounds(count: int) -> list[RoundPlan]:
    return [replace(PLAN, round=number) for number in range(1, count + 1)]


def test_vault_ledger_is_a_privacy_ledger() -> None:
    one: PrivacyLedger = ledger()
    one.charge(PLAN, config())


def test_rounds_compose_without_amplification() -> None:
    one = ledger()
    for plan in rounds(7):
        one.charge(plan, config(sampling="poisson"))
    assert one.epsilon(DELTA) == pytest.approx(gaussian_epsilon(2.0, 7, DELTA), rel=1e-8)


@given(st.lists(st.floats(0.3, 50.0), min_size=1, max_size=6))
def test_different_noise_composes_to_one_gaussian(multipliers: list[float]) -> None:
    one = ledger()
    for plan, z in zip(rounds(len(multipliers)), multipliers, strict=True):
        one.charge(plan, config(z=z))
    together = sum(z**-2 for z in multipliers) ** -0.5
    assert one.epsilon(DELTA) == pytest.approx(gaussian_epsilon(together, 1, DELTA), rel=1e-7)


def test_all_federations_and_runs_of_a_vault_count() -> None:
    one = ledger()
    one.charge(PLAN, config())
    one.charge(replace(PLAN, config_hash="99" * 32), config())
    one.charge(replace(PLAN, run_id="99" * 16), config())
    assert one.epsilon(DELTA) == pytest.approx(gaussian_epsilon(2.0, 3, DELTA), rel=1e-8)


def test_a_repeat_is_charged_once_and_another_attempt_again() -> None:
    one = ledger()
    one.charge(PLAN, config())
    VaultLedger(one.store).charge(PLAN, config())  # after a crash
    assert one.epsilon(DELTA) == pytest.approx(gaussian_epsilon(2.0, 1, DELTA), rel=1e-8)
    one.charge(replace(PLAN, attempt=1), config())
    assert one.epsilon(DELTA) == pytest.approx(gaussian_epsilon(2.0, 2, DELTA), rel=1e-8)


def test_another_plan_for_the_same_attempt_is_charged_again() -> None:
    one = ledger()
    one.charge(PLAN, config())
    one.charge(replace(PLAN, value_range=0.31), config())
    assert one.epsilon(DELTA) == pytest.approx(gaussian_epsilon(2.0, 2, DELTA), rel=1e-8)


def test_repeat_is_allowed_after_the_budget_is_spent() -> None:
    one = ledger(gaussian_epsilon(2.0, 1, DELTA) * 1.001)
    one.charge(PLAN, config())
    one.charge(PLAN, config())
    with pytest.raises(RefusedByPolicy, match="does not allow this round"):
        one.charge(replace(PLAN, round=2), config())


def test_refusal_tells_the_owner_what_is_spent_and_the_server_nothing_and_charges_nothing() -> None:
    one = ledger(3.5)
    one.charge(PLAN, config())
    one.charge(replace(PLAN, round=2), config())
    before = one.epsilon(DELTA)
    with pytest.raises(RefusedByPolicy, match="does not allow this round") as error:
        one.charge(replace(PLAN, round=3), config())
    assert not any(letter.isdigit() for letter in str(error.value))  # what is sent
    assert "epsilon 2.943 of 3.5 is spent (delta 1e-05)" in error.value.hint
    assert "it would be epsilon 3.709 in all" in error.value.hint
    assert "only the owner can raise the budget" in error.value.hint
    assert one.epsilon(DELTA) == before


def test_a_vault_with_a_budget_refuses_federations_without_noise() -> None:
    with pytest.raises(RefusedByPolicy, match="does not allow this round") as error:
        ledger(1e6).charge(PLAN, config("none", None))
    assert "with this round it would be no bound" in error.value.hint


def test_a_vault_without_a_budget_stores_nothing_for_federations_without_noise() -> None:
    one = ledger()
    one.charge(PLAN, config("none", None))
    assert one.store.get(STATE) is None


# --- distributed noise ---------------------------------------------------------------------------


def distributed(z: float = 2.0, corrupt: int = 2) -> tuple[RoundPlan, FederationConfig]:
    """A federation that assumes so many corrupt members, and its plan."""
    agreed = replace(
        config("distributed", z), thresholds=ThresholdSettings(floor=2, corrupt=corrupt)
    )
    return replace(PLAN, noise_scale=agreed_noise(agreed, PLAN)), agreed


def test_distributed_noise_counts_as_much_as_honest_survivors_add() -> None:
    plan, agreed = distributed(corrupt=2)
    same, doubtful = ledger(corrupt=2), ledger(corrupt=7)
    same.charge(plan, agreed)
    doubtful.charge(plan, agreed)
    assert same.epsilon(DELTA) == pytest.approx(gaussian_epsilon(2.0, 1, DELTA), rel=1e-6)
    # 5 of 12 honest members in place of 10 add half the variance
    assert doubtful.epsilon(DELTA) == pytest.approx(
        gaussian_epsilon(2.0 / math.sqrt(2), 1, DELTA), rel=1e-6
    )


def test_young_members_add_no_noise_either() -> None:
    plan, agreed = distributed()
    young, corrupt = ledger(corrupt=2), ledger(corrupt=7)
    young.charge(plan, agreed, young=5)
    corrupt.charge(plan, agreed)
    assert young.epsilon(DELTA) == corrupt.epsilon(DELTA) > gaussian_epsilon(2.0, 1, DELTA) * 1.3


def test_a_config_that_assumes_nobody_corrupt_lowers_no_charge() -> None:
    plan, agreed = distributed(corrupt=0)
    one = ledger(corrupt=3)
    one.charge(plan, agreed)
    expected = distributed_epsilon(sensitivity(plan), plan.noise_scale, clients=9, length=400)
    assert one.epsilon(DELTA) == pytest.approx(gaussian_epsilon(1 / expected, 1, DELTA), rel=1e-9)
    assert one.epsilon(DELTA) > gaussian_epsilon(2.0, 1, DELTA)


@pytest.mark.parametrize(
    ("changes", "corrupt"),
    [({"noise_scale": 0.0}, 0), ({"noise_scale": 3.9}, 0), ({"min_cohort": 3}, 3)],
)
def test_distributed_without_honest_noise_is_refused_by_a_budget(
    changes: dict[str, Any], corrupt: int
) -> None:
    plan, agreed = distributed()
    with pytest.raises(RefusedByPolicy, match="does not allow this round"):
        ledger(1e6, corrupt=corrupt).charge(replace(plan, **changes), agreed)


# --- correlated noise ----------------------------------------------------------------------------


def test_member_of_a_correlated_federation_waits_for_its_turn() -> None:
    one, agreed = ledger(), config("dp_ftrl", separation=4)
    one.charge(replace(PLAN, round=3), agreed)
    for number in (4, 6, 2):
        with pytest.raises(RefusedByPolicy, match=r"took part in round 3 and may again in round 7"):
            one.charge(replace(PLAN, round=number), agreed)
    one.charge(replace(PLAN, round=3, attempt=1), agreed)
    one.charge(replace(PLAN, round=7), agreed)
    assert one.epsilon(DELTA) == pytest.approx(gaussian_epsilon(2.0, 3, DELTA), rel=1e-8)


def test_turns_are_of_one_federation_alone() -> None:
    one, agreed = ledger(), config("dp_ftrl", separation=4)
    one.charge(PLAN, agreed)
    one.charge(replace(PLAN, round=2, config_hash="99" * 32), agreed)
    with pytest.raises(RefusedByPolicy, match="may again in round 5"):
        one.charge(replace(PLAN, round=2), agreed)


# --- what a store cannot know --------------------------------------------------------------------


def test_restored_vault_takes_a_burden_on() -> None:
    one = ledger(8.0)
    one.burden(6.0, DELTA)
    assert 6.0 <= one.epsilon(DELTA) < 6.0 + 1e-6
    with pytest.raises(RefusedByPolicy, match="does not allow this round") as error:
        one.charge(PLAN, config(z=0.7))
    assert "epsilon 6 of 8 is spent" in error.value.hint
    one.charge(PLAN, config(z=5.0))


@pytest.mark.parametrize("data", [b"{", b"[]", b'{"cost": 1}', b'{"cost": 1, "runs": {"a": [1]}}'])
def test_malformed_ledger_is_no_empty_one(data: bytes) -> None:
    one = ledger()
    one.store.put(STATE, data)
    with pytest.raises(DataError, match="what was spent is not known"):
        one.charge(PLAN, config())


def test_what_is_stored_is_small_and_plain() -> None:
    one = ledger()
    for plan in rounds(30):
        one.charge(plan, config())
    data = json.loads(one.store.get(STATE) or b"")
    assert set(data) == {"cost", "runs"}
    assert len(data["runs"]) == 1


@pytest.mark.parametrize(
    ("epsilon", "delta", "name"), [(0.0, 1e-5, "epsilon"), (1.0, 0.5, "delta")]
)
def test_budget_out_of_range_is_refused(epsilon: float, delta: float, name: str) -> None:
    with pytest.raises(UsageError, match=f"the vault's privacy {name} must be"):
        PrivacyBudget(epsilon, delta)
