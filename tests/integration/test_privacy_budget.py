"""A run stops before its budget is exceeded, and forgets nothing that it spent, whenever it is killed."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedoppu.client.ledger import PrivacyBudget, VaultLedger
from fedoppu.common.accounting import gaussian_epsilon, sampled_epsilon
from fedoppu.common.config import FederationConfig, PrivacySettings, SecAggSettings
from fedoppu.common.errors import DataError, RoundAborted
from fedoppu.common.privacy import PrivacySpent
from fedoppu.common.randomness import Randomness
from fedoppu.server.charges import Charge, ChargeLedger
from fedoppu.server.checkpoint import PRIVATE, AttemptLog, AttemptState
from fedoppu.server.cohort import PoissonSampler
from fedoppu.simulations.helper import pinned_helper
from fedoppu.simulations.runtime import SimulatedMember
from tests.fake_federation import CONFIG, Federation, federation, files, shared_config

RUN = "ab" * 16


def private(rounds: int = 6, mechanism: Any = "central", **changes: Any) -> FederationConfig:
    """The small federation with a budget."""
    settings = replace(PrivacySettings(mechanism, noise_multiplier=2.0, epsilon=4.0), **changes)
    return replace(shared_config(CONFIG, max_weight=1), rounds=rounds, privacy=settings)


def test_run_stops_at_the_last_round_that_the_budget_allows(tmp_path: Path) -> None:
    told: list[str] = []
    made = federation(tmp_path, private(), stopped=told.append)
    made.run()
    done = len(made.records)
    assert 0 < done < 6
    assert gaussian_epsilon(2.0, done, 1e-5) <= 4.0 < gaussian_epsilon(2.0, done + 1, 1e-5)
    assert told == [
        f"stopped after round {done} of 6: one more would exceed the privacy budget of epsilon 4 "
        "(delta 1e-05)"
    ]


def test_run_without_a_budget_goes_on(tmp_path: Path) -> None:
    made = federation(tmp_path, private(epsilon=None))
    made.run()
    assert len(made.records) == 6


def test_budget_that_allows_no_round_changes_no_model(tmp_path: Path) -> None:
    told: list[str] = []
    made = federation(tmp_path, private(epsilon=0.5), stopped=told.append)
    with pytest.raises(AssertionError):  # there is no checkpoint
        made.run()
    assert made.records == []
    assert told[0].startswith("stopped after round 0 of 6")
    assert not (tmp_path / PRIVATE / "charges.json").exists()


def test_both_epsilons_of_every_record_are_the_accountants(tmp_path: Path) -> None:
    made = federation(tmp_path, private(3, epsilon=None))
    made.run()
    for count, record in enumerate(made.records, 1):
        unamplified = gaussian_epsilon(2.0, count, 1e-5)
        assert record.privacy == PrivacySpent(
            count, 1e-5, unamplified, math.inf, "zero_out", unamplified
        )
        assert record.as_data()["privacy"]["server"] is None


def test_poisson_sampling_amplifies_for_those_who_get_the_model(tmp_path: Path) -> None:
    made = federation(tmp_path, private(2, epsilon=None, sampling="poisson"))
    made.run()
    last = made.records[-1].privacy
    assert last is not None
    assert last.released == sampled_epsilon(2.0, 5 / 8, 2, 1e-5)
    assert last.peers == gaussian_epsilon(2.0, 2, 1e-5)
    assert last.adjacency == "add_remove"
    assert last.delta > 1e-5  # the chance of a cohort below the floor


def test_distributed_noise_bounds_the_server_too(tmp_path: Path) -> None:
    made = federation(tmp_path, private(2, "distributed", epsilon=None))
    made.run()
    last = made.records[-1].privacy
    assert last is not None
    assert last.server == last.released == gaussian_epsilon(2.0, 2, 1e-5)


def test_members_of_a_correlated_federation_are_charged_for_their_own_turns(
    tmp_path: Path,
) -> None:
    config = replace(private(4, "dp_ftrl", epsilon=None, separation=2), cohort=3)
    made = federation(tmp_path, config)
    made.run()
    last = made.records[-1].privacy
    assert last is not None
    assert last.released == gaussian_epsilon(2.0, 2, 1e-5)
    cohorts = [set(record.cohort or ()) for record in made.records]
    assert not any(cohorts[number] & cohorts[number + 1] for number in range(3))


# --- failures and kills --------------------------------------------------------------------------


class Killed(Exception):
    """The process is gone."""


class KilledAfterCharge(ChargeLedger):
    """A ledger whose process dies when the charge of a round is durable."""

    def __init__(self, folder: Path, round: int) -> None:
        super().__init__(folder)
        self._round = round

    def add(self, charge: Charge, before: tuple[Charge, ...]) -> tuple[Charge, ...]:
        super().add(charge, before)
        if charge.round == self._round:
            raise Killed
        return (*before, charge)


class KilledBeforeUnmasking(AttemptLog):
    """An AttemptLog whose process dies once the masked sum of a round is durable."""

    def __init__(self, folder: Path, round: int) -> None:
        super().__init__(folder)
        self._round = round

    def save(self, state: AttemptState) -> None:
        super().save(state)
        if state.machine and state.round == self._round:
            raise Killed


def resumed(made: Federation) -> Federation:
    """The same members, a new server process."""
    made.records.clear()
    return replace(made, runtime=replace(made.runtime))


def kill(made: Federation, part: str, log: Any) -> Federation:
    made.runtime.__dict__[part] = log
    with pytest.raises(Killed):
        made.run()
    return resumed(made)


def charged(folder: Path) -> list[tuple[int, int]]:
    return [(one.round, one.attempt) for one in ChargeLedger(folder / PRIVATE).all(committed=0)]


def test_deployed_server_killed_between_charge_and_release_has_spent_it(tmp_path: Path) -> None:
    config = private(2)
    made = federation(tmp_path, config, replays=False)
    after = kill(made, "charges", KilledAfterCharge(made.runtime.books, 2))
    after.run()
    assert charged(tmp_path) == [(1, 0), (2, 0), (2, 1)]
    assert after.records[-1].privacy is not None
    assert after.records[-1].privacy.rounds == 3
    assert after.records[-1].privacy.released == gaussian_epsilon(2.0, 3, 1e-5)


def test_attempt_that_was_charged_before_a_kill_is_finished_and_charged_once(
    tmp_path: Path,
) -> None:
    whole = federation(tmp_path / "whole", private(2)).run()
    made = federation(tmp_path / "cut", private(2), replays=False)
    after = kill(made, "attempts", KilledBeforeUnmasking(made.runtime.books, 2))
    assert after.run().adapter.digest() == whole.adapter.digest()  # the same noise, too
    assert charged(tmp_path / "cut") == [(1, 0), (2, 0)]


@pytest.mark.parametrize("mechanism", ["central", "distributed", "dp_ftrl"])
def test_killed_simulation_replays_the_same_attempt_with_the_same_noise(
    tmp_path: Path, mechanism: str
) -> None:
    config = private(3, mechanism, epsilon=None)
    federation(tmp_path / "whole", config).run()
    made = federation(tmp_path / "cut", config)
    kill(made, "charges", KilledAfterCharge(made.runtime.books, 2))
    federation(tmp_path / "cut", config).run()
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_last_affordable_round_is_not_lost_to_a_kill(tmp_path: Path) -> None:
    whole = federation(tmp_path / "whole", private())
    whole.run()
    made = federation(tmp_path / "cut", private())
    kill(made, "charges", KilledAfterCharge(made.runtime.books, len(whole.records)))
    again = federation(tmp_path / "cut", private())
    again.run()
    assert again.records == whole.records


def test_run_that_had_stopped_stays_stopped(tmp_path: Path) -> None:
    told: list[str] = []
    first = federation(tmp_path, private(), stopped=told.append)
    first.run()
    spent = charged(tmp_path)
    again = federation(tmp_path, private(), stopped=told.append)
    again.run()
    assert again.records == first.records
    assert charged(tmp_path) == spent
    assert len(told) == 2


@pytest.mark.parametrize("mode", ["graph", "two_server"])
def test_charge_is_durable_before_anybody_is_asked_for_a_vector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    config = private(2, epsilon=None)
    if mode == "two_server":
        secagg = SecAggSettings("two_server")
        config = pinned_helper(replace(config, secagg=secagg), Randomness.from_seed(3))
    seen: list[bool] = []

    def look(member: SimulatedMember, stage: str, plan: Any) -> bool:
        if stage in ("train.masked", "train.sealed"):
            seen.append((plan.round, plan.attempt) in charged(tmp_path))
        return False

    monkeypatch.setattr(SimulatedMember, "drops", look)
    federation(tmp_path, config).run()
    assert seen == [True] * 2 * config.cohort


def test_attempt_that_fails_after_vectors_were_sent_stays_charged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = federation(tmp_path, private(2, epsilon=None))
    monkeypatch.setattr(SimulatedMember, "drops", fail_first_attempt)
    made.run()
    assert charged(tmp_path) == [(1, 0), (1, 1), (2, 0)]
    assert made.records[0].privacy is not None
    assert made.records[0].privacy.rounds == 2


def fail_first_attempt(member: SimulatedMember, stage: str, plan: Any) -> bool:
    return bool(stage == "query.consistency" and (plan.round, plan.attempt) == (1, 0))


def test_attempt_that_ends_before_vectors_are_asked_for_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = federation(tmp_path, private(1, epsilon=None))
    monkeypatch.setattr(
        SimulatedMember,
        "drops",
        lambda member, stage, plan: stage == "query.shares" and plan.attempt == 0,
    )
    made.run()
    assert charged(tmp_path) == [(1, 1)]


def test_poisson_cohort_below_the_floor_costs_nothing_and_is_drawn_again(tmp_path: Path) -> None:
    config = private(3, epsilon=None, sampling="poisson", delta=1e-3)
    config = replace(config, thresholds=replace(CONFIG.thresholds, floor=4, attempts=30))
    made = federation(tmp_path, config, sampler=PoissonSampler(0.4))
    made.run()
    attempts = [attempt for _, attempt in charged(tmp_path)]
    assert len(attempts) == 3
    assert max(attempts) > 0


def test_budget_can_end_a_round_between_two_attempts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = gaussian_epsilon(2.0, 1, 1e-5)
    made = federation(tmp_path, private(1, epsilon=one * 1.01))
    monkeypatch.setattr(SimulatedMember, "drops", fail_first_attempt)
    with pytest.raises(AssertionError):
        made.run()
    assert charged(tmp_path) == [(1, 0)]


def test_lost_ledger_stops_the_run(tmp_path: Path) -> None:
    made = federation(tmp_path, private(1))
    made.run()
    (tmp_path / PRIVATE / "charges.json").unlink()
    again = federation(tmp_path, private(1))
    again.run()  # nothing is left to do
    more = federation(tmp_path / "other", private(2))
    kill(more, "charges", KilledAfterCharge(more.runtime.books, 2))
    (tmp_path / "other" / PRIVATE / "charges.json").write_text("[]")
    with pytest.raises(DataError, match="lacks some of the 1 committed rounds"):
        federation(tmp_path / "other", private(2)).run()


# --- the members' own budgets --------------------------------------------------------------------


def with_budget(epsilon: float, corrupt: int = 0) -> Callable[[SimulatedMember], VaultLedger]:
    return lambda member: VaultLedger(member.state, PrivacyBudget(epsilon), corrupt)


def test_members_refuse_when_their_own_budget_is_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SimulatedMember, "ledger", property(with_budget(3.0)))
    config = replace(private(6, epsilon=None), cohort=8)
    made = federation(tmp_path, config)
    with pytest.raises(RoundAborted, match=r"refused in train\.masked .*privacy budget.* does not"):
        made.run()
    done = len(made.records)
    assert gaussian_epsilon(2.0, done, 1e-5) <= 3.0 < gaussian_epsilon(2.0, done + 1, 1e-5)


def test_members_with_a_budget_refuse_a_federation_without_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SimulatedMember, "ledger", property(with_budget(100.0)))
    with pytest.raises(RoundAborted, match=r"privacy budget.* does not allow"):
        federation(tmp_path, replace(CONFIG, cohort=8)).run()


def test_members_with_a_budget_send_no_update_in_clear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SimulatedMember, "ledger", property(with_budget(100.0)))
    config = replace(CONFIG, cohort=8, plain_updates=True)
    made = federation(tmp_path, config, warn=lambda line: None)
    with pytest.raises(RoundAborted, match=r"refused in train\.plain .*privacy budget.* does not"):
        made.run()


def test_virtual_users_are_charged_for_what_they_sent(tmp_path: Path) -> None:
    config = replace(private(3, epsilon=None), cohort=8)
    made = federation(tmp_path, config)
    made.run()
    ledger = VaultLedger(made.users._states[4])
    assert ledger.epsilon(1e-5) == pytest.approx(gaussian_epsilon(2.0, 3, 1e-5), rel=1e-6)
