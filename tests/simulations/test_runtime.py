"""Virtual users as members: groups, held-out items, drops; with the real trainer on a tiny base."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import RecordDict

from fedoppu.client.app import build_client_app
from fedoppu.client.jobs import ClientFailure, Example, LocalUpdate
from fedoppu.common.config import ResearchSettings, RunConfig, load_run_config
from fedoppu.common.messages import Training, write_request
from fedoppu.common.rounds import RoundPlan, SharesDelivered
from fedoppu.common.shared_adapter import initial_shared, sent_down, travelling
from fedoppu.server.app import run_rounds
from fedoppu.simulations.app import MemberSpec, members_of, spec_of
from fedoppu.simulations.executors import GroupExecutor, InProcess, Workforce
from fedoppu.simulations.grid import LocalGrid
from fedoppu.simulations.runtime import (
    DROP_STAGES,
    SimulatedUsers,
    TrainGroup,
    hold_out,
    member_examples,
    simulated_server,
    train_group,
)
from fedoppu.simulations.workers import Worker, open_worker
from tests.fake_federation import CONFIG, federation, files

SETTINGS = (
    "task=LaMP_3",
    "users=1",
    "base_users=5",
    "queries=2",
    "cohort=4",
    "rounds=2",
    "shared.adapter.rank=2",
    "prompt.text_tokens=12",
)


@pytest.fixture(scope="module")
def run(tiny_base: Path) -> RunConfig:
    return load_run_config([*SETTINGS, f"base={tiny_base}"])


@pytest.fixture(scope="module")
def spec(run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> MemberSpec:
    return spec_of(run, tmp_path_factory.mktemp("users"))


@pytest.fixture(scope="module")
def worker(spec: MemberSpec) -> Worker:
    return open_worker(spec.worker)


def plan_of(worker: Worker, *, number: int = 1) -> RoundPlan:
    factors = travelling(worker.config.shared.aggregation, number)
    return RoundPlan(
        run_id="ab" * 16,
        round=number,
        attempt=0,
        config_hash=worker.config.hash().hex(),
        roster_hash="cd" * 32,
        model_hash="ef" * 32,
        num_params=worker.shared_spec.num_params(factors),
        factors="".join(factors),
        clip=10.0,
        value_range=0.5,
        word_bits=32,
        level_bits=16,
        max_weight=64,
        threshold=2,
        neighbours=3,
        min_cohort=2,
        max_drops=1,
    )


def group_of(worker: Worker, *members: int, number: int = 1) -> TrainGroup:
    config = worker.config
    initial = initial_shared(worker.shared_spec, config.public_seed)
    model = initial.spec.flatten(initial.tensors, sent_down(config.shared.aggregation))
    return TrainGroup(plan_of(worker, number=number), members, model)


def update(result: LocalUpdate | ClientFailure) -> LocalUpdate:
    assert isinstance(result, LocalUpdate)
    return result


def test_group_trains_each_member_on_its_own_examples(worker: Worker) -> None:
    results = train_group(worker, group_of(worker, 1, 3))
    assert list(results) == [1, 3]
    for member, result in results.items():
        trained = update(result)
        count = len(member_examples(worker, member))
        held_out = worker.config.shared.held_out
        assert trained.weight == count - (held_out if count - held_out >= 4 else 0)
        assert trained.context == plan_of(worker).context
        assert np.linalg.norm(trained.vector) > 0
    assert not np.array_equal(update(results[1]).vector, update(results[3]).vector)


def test_update_is_the_same_whoever_is_in_the_group_to_float_precision(worker: Worker) -> None:
    together = update(train_group(worker, group_of(worker, 1, 3))[3])
    alone = update(train_group(worker, group_of(worker, 3))[3])
    again = update(train_group(worker, group_of(worker, 3))[3])
    np.testing.assert_array_equal(alone.vector, again.vector)
    np.testing.assert_allclose(together.vector, alone.vector, atol=2e-3)


def test_attempt_and_round_draw_another_order(worker: Worker) -> None:
    group = group_of(worker, 2)
    later = TrainGroup(replace(group.plan, attempt=1), group.members, group.model)
    first, second = (update(train_group(worker, each)[2]) for each in (group, later))
    assert not np.array_equal(first.vector, second.vector)
    assert first.held_out_loss == second.held_out_loss


def test_failure_of_one_member_leaves_the_others(worker: Worker) -> None:
    broken = replace(worker, users=Broken(worker.users, worker.users.base[3]))  # type: ignore[arg-type]
    results = train_group(broken, group_of(worker, 1, 3))
    failure = results[3]
    assert isinstance(failure, ClientFailure)
    assert "OSError: the disk is gone" in failure.message
    alone = update(train_group(worker, group_of(worker, 1))[1])
    np.testing.assert_array_equal(update(results[1]).vector, alone.vector)


class Broken:
    """Users of whom one has a vault that cannot be read."""

    def __init__(self, users: Any, user: str) -> None:
        self.users, self.user, self.base = users, user, users.base

    def vault(self, user: str) -> Any:
        if user == self.user:
            raise OSError("the disk is gone")
        return self.users.vault(user)


@pytest.mark.parametrize("wanted", ["queries", "history", "both"])
def test_examples_are_those_that_the_config_asks_for(worker: Worker, wanted: Any) -> None:
    config = replace(worker.config, shared=replace(worker.config.shared, examples=wanted))
    counts = {"queries": 2, "history": None, "both": None}
    owned = worker.users.vault(worker.users.base[0]).history()
    history = len(worker.task.history(owned))
    counts |= {"history": history, "both": history + len(worker.task.queries(owned))}
    counts["queries"] = len(worker.task.queries(owned))
    assert len(member_examples(replace(worker, config=config), 0)) == counts[wanted]


def example(number: int) -> Example:
    return Example(np.array([number], np.int32), np.array([number], np.int32))


@pytest.mark.parametrize(
    ("count", "held", "expected"),
    [(10, 4, 4), (8, 4, 4), (7, 4, 0), (10, 3, 0), (10, 0, 0), (20, 8, 8), (0, 4, 0)],
)
def test_held_out_are_the_newest_and_only_if_four_are_on_either_side(
    count: int, held: int, expected: int
) -> None:
    examples = [example(number) for number in range(count)]
    train, held_out = hold_out(examples, held)
    assert len(held_out) == expected
    assert [*train, *held_out] == examples


def shared_bytes(spec: MemberSpec, folder: Path, executor: GroupExecutor, group_users: int) -> Any:
    members = replace(members_of(spec), group_users=group_users)
    users = SimulatedUsers(members, executor)
    runtime = simulated_server(
        members, folder, progress=lambda record, timing: None, warn=lambda line: None
    )
    run_rounds(runtime, LocalGrid(build_client_app(users), spec.members, users))
    assert users.failures == []
    return files(folder)


def test_real_rounds_lower_the_federated_loss(spec: MemberSpec, tmp_path: Path) -> None:
    members = members_of(spec)
    users = SimulatedUsers(members, InProcess(spec.worker))
    losses: list[float | None] = []
    runtime = simulated_server(
        members,
        tmp_path,
        progress=lambda record, timing: losses.append(record.held_out_loss),
        warn=lambda line: None,
    )
    run_rounds(runtime, LocalGrid(build_client_app(users), spec.members, users))
    assert losses[0] is not None
    assert losses[1] is not None
    assert losses[1] < losses[0]


@pytest.mark.slow
def test_one_and_two_workers_give_the_same_bytes(spec: MemberSpec, tmp_path: Path) -> None:
    worker_spec = replace(spec.worker, group_users=2)
    in_process = shared_bytes(spec, tmp_path / "one", InProcess(worker_spec), 2)
    with Workforce(2) as force:
        in_two = shared_bytes(spec, tmp_path / "two", force.executor(worker_spec), 2)
    assert in_process == in_two


def test_drops_come_after_training_at_their_rate_and_are_the_same_for_a_seed(
    tmp_path: Path,
) -> None:
    made = federation(tmp_path, research=ResearchSettings(dropout=0.4), members=200)
    plan = RoundPlan("ab", 1, 0, "", "", "", 1, "B", 1.0, 1.0, 32, 16, 1, 1, 1, 1, 1)

    def dropping(stage: Any, number: int) -> list[int]:
        contexts = [made.grid.node(node).context for node in made.grid.get_node_ids()]
        members = [made.users.member(context) for context in contexts]
        return [m.index for m in members if m.drops(stage, replace(plan, round=number))]

    assert dropping("query.keys", 1) == dropping("query.shares", 1) == []
    by_stage = [dropping(stage, 1) for stage in DROP_STAGES]
    assert by_stage == [dropping(stage, 1) for stage in DROP_STAGES]
    assert len({m for each in by_stage for m in each}) == sum(map(len, by_stage))
    assert sum(map(len, by_stage)) == pytest.approx(80, abs=25)
    assert all(len(each) > 10 for each in by_stage)
    assert dropping("train.plain", 1) == sorted(m for each in by_stage for m in each)
    assert dropping("train.sealed", 1) == dropping("train.plain", 1)
    assert dropping("train.masked", 2) != by_stage[0]


def test_malformed_stage_is_left_to_the_clients(tmp_path: Path) -> None:
    users = federation(tmp_path).users
    requests = {2: RecordDict(), 1: RecordDict()}
    assert list(users.ready("train.masked", requests)) == [(2, 1)]


def test_train_stage_without_a_plan_trains_nobody(tmp_path: Path) -> None:
    users = federation(tmp_path).users
    content = write_request(Training(SharesDelivered((), {}), np.zeros(24, np.float32)))
    assert list(users.ready("train.masked", {4: content})) == [(4,)]


def test_one_group_of_updates_is_held_at_a_time(tmp_path: Path) -> None:
    held: list[int] = []

    class Watching:
        def map(self, work: Any, groups: Any) -> Iterator[Any]:
            for group in groups:
                held.append(len(made.users._ready))
                yield {m: ClientFailure(str(m), "no") for m in group.members}

    made = federation(
        tmp_path,
        replace(CONFIG, cohort=8),
        executor=Watching(),
        group_users=3,
        tolerate_failures=True,
    )
    with pytest.raises(Exception, match="given up"):
        made.run()
    assert max(held) == 3
    assert made.users._ready == {}
