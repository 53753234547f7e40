"""What replaces null: every default that depends on the task and on the size of the base."""

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from fedoppu.common.accounting import gaussian_epsilon, sampled_epsilon
from fedoppu.common.base import BaseFacts
from fedoppu.common.config import TASKS, FederationConfig, RunConfig, load_run_config
from fedoppu.common.defaults import (
    GENERATIVE,
    check_privacy,
    federation,
    personal_settings,
    rounds_of,
    shared_settings,
)
from fedoppu.common.errors import UsageError

SIZES = {"small": 1_000_000, "middle": 135_000_000, "large": 7_000_000_000}


def base(size: str = "small") -> BaseFacts:
    """Facts of a base that nobody loads."""
    return BaseFacts(
        name=size,
        path=Path(size),
        hash="ab" * 32,
        linear={"layer.q_proj": (8, 8)},
        num_parameters=SIZES[size],
        max_tokens=512,
    )


def nulls(settings: Any) -> list[str]:
    flat = {**asdict(settings)["adapter"], **asdict(settings)["training"]}
    return [name for name, value in flat.items() if value is None]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("task", TASKS)
def test_nothing_is_null_after_the_defaults(size: str, task: str) -> None:
    assert nulls(shared_settings(RunConfig(), base(size))) == []
    assert nulls(personal_settings(RunConfig(), base(size), task)) == []


@pytest.mark.parametrize("size", SIZES)
def test_what_is_set_stays_even_when_it_is_zero(size: str) -> None:
    run = load_run_config(
        [
            "personal.adapter.targets=o_proj",
            "personal.training.learning_rate=0",
            "personal.training.epochs=9",
            "personal.training.newest=0",
        ]
    )
    found = personal_settings(run, base(size), "LaMP_4")
    assert found.adapter.targets == ("o_proj",)
    assert (found.training.learning_rate, found.training.epochs, found.training.newest) == (0, 9, 0)


def test_with_a_frozen_b_alone_learns_ten_times_as_fast() -> None:
    for size in SIZES:
        frozen, both = (
            shared_settings(load_run_config([f"shared.aggregation={name}"]), base(size))
            for name in ("ffa", "fedavg")
        )
        assert frozen.training.learning_rate == pytest.approx(
            10 * (both.training.learning_rate or 0)
        )


def test_a_large_base_gets_the_modules_of_the_paper() -> None:
    assert shared_settings(RunConfig(), base("large")).adapter.targets == (
        *("q_proj", "k_proj", "v_proj"),
    )
    assert personal_settings(RunConfig(), base("large"), "LaMP_3").adapter.targets == (
        *("q_proj", "v_proj"),
    )


def test_text_to_be_written_adapts_more_than_labels_to_be_chosen() -> None:
    written = {task: personal_settings(RunConfig(), base("middle"), task) for task in TASKS}
    wide = {task for task, found in written.items() if found.adapter.targets == ("all-linear",)}
    assert wide == set(GENERATIVE)


@pytest.mark.parametrize(
    ("rounds", "base_users", "expected"), [(None, 60, 10), (None, 7, 3), (0, 60, 0), (5, 60, 5)]
)
def test_rounds_are_as_set_or_three_passes(
    rounds: int | None, base_users: int, expected: int
) -> None:
    assert rounds_of(replace(RunConfig(), rounds=rounds), base_users) == expected


def test_a_federation_has_no_larger_cohort_than_members_and_travels_whole() -> None:
    found = federation(
        RunConfig(), base(), task="LaMP_3", k=2, profile="template", base_users=5, seed=4
    )
    assert (found.cohort, found.public_seed, found.k, found.profile) == (5, 4, 2, "template")
    assert found.base_hash == base().hash
    assert FederationConfig.from_canonical(found.canonical()) == found


# --- differential privacy ------------------------------------------------------------------------


def private(*changes: str, base_users: int = 60) -> FederationConfig:
    run = load_run_config(["rounds=12", "cohort=18", *changes])
    return federation(
        run, base(), task="LaMP_3", k=0, profile="none", base_users=base_users, seed=0
    )


CENTRAL = "privacy.mechanism=central"


def test_with_a_mechanism_every_weight_is_one_and_no_loss_is_measured() -> None:
    found = private(CENTRAL, "privacy.noise_multiplier=1", "shared.max_weight=64")
    assert (found.shared.max_weight, found.shared.held_out) == (1, 0)
    assert private().shared == shared_settings(RunConfig(), base())


def test_noise_is_the_least_that_keeps_all_rounds_within_the_budget() -> None:
    found = private(CENTRAL, "privacy.epsilon=8").privacy.noise_multiplier
    assert found is not None
    assert gaussian_epsilon(found, 12, 1e-5) <= 8 < gaussian_epsilon(found * 0.99, 12, 1e-5)


def test_sampling_needs_less_noise() -> None:
    found = private(CENTRAL, "privacy.epsilon=8", "privacy.sampling=poisson").privacy
    fixed = private(CENTRAL, "privacy.epsilon=8").privacy
    assert found.noise_multiplier is not None
    assert fixed.noise_multiplier is not None
    assert found.noise_multiplier < fixed.noise_multiplier
    assert sampled_epsilon(found.noise_multiplier, 0.3, 12, 1e-5) <= 8


def test_noise_that_is_given_stays_beside_a_budget() -> None:
    found = private(CENTRAL, "privacy.epsilon=8", "privacy.noise_multiplier=0.7").privacy
    assert (found.noise_multiplier, found.epsilon) == (0.7, 8)


def test_correlated_noise_is_calibrated_to_a_members_turns() -> None:
    found = private("privacy.mechanism=dp_ftrl", "privacy.epsilon=8", "privacy.separation=3")
    z = found.privacy.noise_multiplier
    assert z is not None
    assert gaussian_epsilon(z, 4, 1e-5) <= 8 < gaussian_epsilon(z * 0.99, 4, 1e-5)


@pytest.mark.parametrize("aggregation", ["ffa", "fedavg", "alternating"])
def test_range_is_six_deviations_of_a_rotated_update(aggregation: str) -> None:
    found = private(CENTRAL, "privacy.epsilon=8", f"shared.aggregation={aggregation}")
    # one 8 x 8 module at rank 8: B has 64 parameters, and so has A
    fewest = 128 if aggregation == "fedavg" else 64
    expected = 6 * found.encoding.clip / math.sqrt(fewest)
    assert found.encoding.value_range == pytest.approx(expected, rel=5e-3)


def test_range_without_a_rotation_is_as_it_was_set() -> None:
    found = private(
        *(CENTRAL, "privacy.epsilon=8", "encoding.rotation=false", "encoding.value_range=0.125")
    )
    assert found.encoding.value_range == 0.125


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["privacy.epsilon=8"], "privacy.epsilon is set, but privacy.mechanism is none"),
        (["privacy.noise_multiplier=1"], "privacy.noise_multiplier is set, but"),
        (["privacy.sampling=poisson"], "amplifies nothing without a privacy.mechanism"),
        ([CENTRAL], "needs a budget or an amount of noise"),
        (
            [CENTRAL, "privacy.epsilon=8", "research.plain_updates=true"],
            "research.plain_updates cannot be private",
        ),
        (
            ["privacy.mechanism=dp_ftrl", "privacy.epsilon=8", "privacy.sampling=poisson"],
            "takes members in turn, which is no Poisson sampling",
        ),
        (
            ["privacy.mechanism=dp_ftrl", "privacy.epsilon=8", "shared.aggregation=alternating"],
            "alternating rounds move different factors",
        ),
        ([CENTRAL, "privacy.epsilon=8", "privacy.separation=2"], "for privacy.mechanism=dp_ftrl"),
        (
            ["privacy.mechanism=dp_ftrl", "privacy.epsilon=8", "privacy.separation=4"],
            "makes groups of 15 of 60 members, a cohort has 18",
        ),
        (
            [CENTRAL, "privacy.epsilon=8", "privacy.sampling=poisson", "cohort=5"],
            "fall below the floor of 2 in 12 rounds",
        ),
    ],
)
def test_privacy_settings_that_do_not_go_together_are_refused(
    changes: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as error:
        private(*changes)
    assert error.value.hint


def test_no_mechanism_needs_no_setting() -> None:
    check_privacy(RunConfig())
