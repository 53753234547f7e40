"""What replaces null: every default that depends on the task and on the size of the base."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from fedoppu.common.base import BaseFacts
from fedoppu.common.config import TASKS, FederationConfig, RunConfig, load_run_config
from fedoppu.common.defaults import (
    GENERATIVE,
    federation,
    personal_settings,
    rounds_of,
    shared_settings,
)

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
