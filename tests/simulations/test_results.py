"""What the report is told of a run."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from fedoppu.client.model import resolve_base
from fedoppu.common.config import RunConfig, load_run_config
from fedoppu.common.defaults import federation
from fedoppu.simulations.columns import columns_of
from fedoppu.simulations.evaluation import Arm
from fedoppu.simulations.results import (
    FederationResult,
    command_line,
    named,
    privacy_lines,
    privacy_records,
    report_data,
)
from fedoppu.simulations.scores import UserScores
from fedoppu.simulations.shared import SharedPhase
from fedoppu.simulations.table import Table
from fedoppu.simulations.users import PreparedUsers

ROUND = {
    "round": 1,
    "held_out_loss": 1.5,
    "bytes_up": 10,
    "bytes_down": 20,
    "cohort": [0, 1, 2],
    "dropped": 1,
}
SPENT = {"kind": "phases", "shared_seconds": 3.0, "personal_seconds": 4.0}


def result(run: RunConfig, users: PreparedUsers, seed: int = 0) -> FederationResult:
    base = resolve_base("pocket")
    config = federation(run, base, task="LaMP_3", k=0, profile="none", base_users=3, seed=seed)
    phase = SharedPhase(run, base, config, seed, users, Path("run"))
    scored = columns_of(UserScores(user, 5, {}, {}) for user in users.target)
    lengths = dict.fromkeys(users.target, 12)
    return FederationResult(phase, (ROUND,), (SPENT,), (Arm("base", None, scored),), lengths)


GENERATED = PreparedUsers(Path("users"), ("t0", "t1"), ("b0", "b1", "b2"), None)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["users=3", "seed=4"],
        ["task=LaMP_3,LaMP_5", "k=0,2", "profile=none,template"],
        ["data=a folder", "research.plain_updates=true", "personal.training.learning_rate=0.002"],
        ["shared.adapter.targets=q_proj,v_proj", "arms=base,personal", "rounds=0"],
        ["population=null", "seeds=2"],
    ],
)
def test_the_command_line_gives_the_same_settings(words: list[str]) -> None:
    run = load_run_config(words)
    program, command, *said = shlex.split(command_line(run))
    assert (program, command) == ("fedoppu", "simulate")
    assert load_run_config(said) == run


def test_the_command_line_leaves_defaults_and_the_folder_out() -> None:
    assert command_line(load_run_config(["out=runs/1", "users=30"])) == "fedoppu simulate"


def test_records_get_the_names_of_their_federation() -> None:
    own = result(RunConfig(), GENERATED, seed=7)
    assert named(own, [{"round": 1}]) == [
        {"task": "LaMP_3", "k": 0, "profile": "none", "seed": 7, "round": 1}
    ]


def test_the_report_is_told_of_rounds_costs_and_lengths() -> None:
    data = report_data(RunConfig(), Table(()), [result(RunConfig(), GENERATED)])
    assert (data.generated, data.recalls) == (True, [])
    assert data.warnings == ["LaMP_3: no wrong-user control: 2 target users, 4 are needed."]
    point = data.rounds[0]
    assert (point.round, point.asked, point.dropped, point.bytes_up) == (1, 3, 1, 10)
    costs = dict(data.costs)
    assert costs["times that the run was resumed"] == "0"
    assert costs["LaMP_3 k=0 profile=none seed=0: shared phase"] == "3 s"
    assert costs["LaMP_3 k=0 profile=none seed=0: a target user, all arms"] == "2.0 s"
    assert {unit.user: length for unit, length in data.lengths.items()} == {"t0": 12, "t1": 12}


def test_on_data_recall_is_counted_once_a_task_whatever_the_seeds() -> None:
    run = load_run_config(["data=folder", "seeds=2"])
    users = replace(GENERATED, recalled=3, recalled_from_queries=2)
    data = report_data(run, Table(()), [result(run, users, seed) for seed in (0, 1)])
    assert not data.generated
    assert [(one.task, one.queries, one.seen, one.asked) for one in data.recalls] == [
        ("LaMP_3", 10, 3, 2)
    ]
    assert {unit.seed for unit in data.lengths} == {0}  # the same people


def test_generated_users_of_two_seeds_are_other_people() -> None:
    run = load_run_config(["seeds=2"])
    data = report_data(run, Table(()), [result(run, GENERATED, seed) for seed in (0, 1)])
    assert {unit.seed for unit in data.lengths} == {0, 1}


def test_clear_updates_are_a_warning_in_the_report() -> None:
    run = load_run_config(["research.plain_updates=true"])
    data = report_data(run, Table(()), [result(run, GENERATED)])
    assert data.plain_updates
    assert "the server saw each update in clear" in data.warnings[0]


# --- differential privacy ------------------------------------------------------------------------

PRIVACY = {
    "rounds": 1,
    "delta": 1e-5,
    "released": 4.3772,
    "server": None,
    "adjacency": "zero_out",
    "peers": 4.3772,
}
PRIVATE = ["privacy.mechanism=central", "privacy.epsilon=5", "privacy.noise_multiplier=1"]


def private(rounds: int) -> tuple[RunConfig, FederationResult]:
    run = load_run_config([*PRIVATE, "cohort=3", "rounds=2"])
    own = result(run, GENERATED)
    return run, replace(own, rounds=(ROUND | {"privacy": PRIVACY},) * rounds)


def test_a_run_without_a_mechanism_has_no_line_of_privacy() -> None:
    own = result(RunConfig(), GENERATED)
    assert (own.privacy, own.metrics) == (None, own.rounds)
    assert (privacy_lines([own]), privacy_records([own])) == ([], [])


def test_what_a_federation_spent_is_its_last_line_of_metrics() -> None:
    _, own = private(1)
    (record,) = privacy_records([own])
    assert record == named(own, own.metrics)[-1]
    assert (record["kind"], record["rounds_done"], record["rounds_planned"]) == ("privacy", 1, 2)
    assert (record["released"], record["server"], record["noise_multiplier"]) == (4.3772, None, 1.0)
    assert privacy_lines([own]) == [
        "LaMP_3 k=0 profile=none seed=0: epsilon 4.38 (members 4.38, server no bound; delta 1e-05, "
        "zero out one user) after 1 of 2 rounds"
    ]


def test_a_budget_that_ended_the_rounds_is_a_warning_in_the_report() -> None:
    run, own = private(1)
    data = report_data(run, Table(()), [own])
    assert data.privacy == privacy_lines([own])
    assert "the privacy budget ended the shared phase after 1 of 2 rounds." in data.warnings[-1]
    run, whole = private(2)
    assert not any("budget" in text for text in report_data(run, Table(()), [whole]).warnings)


def test_a_budget_that_allows_no_round_has_spent_nothing() -> None:
    _, own = private(0)
    (record,) = privacy_records([own])
    assert (record["rounds_done"], record["released"], record["server"]) == (0, 0.0, 0.0)
    assert "epsilon 0 (members 0, server 0;" in privacy_lines([own])[0]


def test_a_cohort_that_is_not_published_is_not_counted_in_the_report() -> None:
    run, own = private(1)
    hidden = dict.fromkeys(("cohort", "dropped", "bytes_up", "bytes_down"))
    own = replace(own, rounds=(own.rounds[0] | hidden,))
    (point,) = report_data(run, Table(()), [own]).rounds
    assert (point.asked, point.dropped, point.bytes_up, point.bytes_down) == (None,) * 4
