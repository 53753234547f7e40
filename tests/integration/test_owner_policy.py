"""What an owner's word does in whole rounds: config consent, unchanged models, distance of sums, range."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedoppu.client.handler import Handler
from fedoppu.client.jobs import ClientFailure, LocalUpdate
from fedoppu.client.policy import ClientPolicy
from fedoppu.common.agreed import range_bounds
from fedoppu.common.config import FederationConfig
from fedoppu.common.errors import RefusedByPolicy, RoundAborted
from fedoppu.common.messages import Opening, write_request
from fedoppu.common.rounds import RoundOpened, RoundPlan
from fedoppu.simulations.grid import node_id
from tests.client.test_app import opening, plan_for
from tests.fake_federation import CONFIG, FakeExecutor, Federation, federation, made_up

SIMULATION = ClientPolicy.for_simulation()


def with_policy(made: Federation, policy: ClientPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives every member of a federation an owner with this policy."""
    member = made.users.member
    monkeypatch.setattr(
        made.users, "member", lambda context: replace(member(context), policy=policy)
    )


def nothing(member: int, plan: RoundPlan) -> LocalUpdate:
    """An update of zeros: a client that learned nothing."""
    return LocalUpdate(plan.context, np.zeros(plan.num_params, np.float32), 1, 1.0)


# --- consent to a config ---------------------------------------------------------------------------


def test_owner_who_consented_to_one_config_takes_no_other(tmp_path: Path) -> None:
    made = federation(tmp_path)
    member = made.users.member(made.grid.node(node_id(0)).context)
    policy = replace(SIMULATION, config_hash=made.config.hash().hex())
    handler = Handler(replace(member, policy=policy))
    other: FederationConfig = replace(CONFIG, k=3)
    plan = replace(plan_for(made), config_hash=other.hash().hex())
    request = write_request(Opening(RoundOpened(plan), other.canonical()))
    with pytest.raises(RefusedByPolicy, match="the owner consented to"):
        handler.answer("query.keys", request)
    assert handler.seat.config is None
    handler.answer("query.keys", opening(made))
    assert handler.seat.config == made.config.canonical()
    # without consent beforehand the first that comes is pinned: trust on first use
    control = made.users.member(made.grid.node(node_id(1)).context)
    Handler(control).answer("query.keys", request)


# --- a model that does not change -----------------------------------------------------------------


def test_members_answer_one_round_from_a_model_and_then_sit_out(tmp_path: Path) -> None:
    config = replace(CONFIG, rounds=5, cohort=3)
    made = federation(tmp_path, config, executor=FakeExecutor(nothing))
    with pytest.raises(RoundAborted, match=r"0 members may still be asked|drawn"):
        made.run()
    assert len({record.model_hash for record in made.records}) == 1
    survivors = [member for record in made.records for member in record.survivors or ()]
    assert len(survivors) == len(set(survivors)) >= 6
    assert made.users.failures == []  # the server kept to the rule: nobody had to refuse


def test_server_that_asks_again_from_one_model_is_refused(tmp_path: Path) -> None:
    made = federation(tmp_path, replace(CONFIG, rounds=1, cohort=8), executor=FakeExecutor(nothing))
    made.run()
    member = made.users.member(made.grid.node(node_id(0)).context)
    plan = plan_for(made, number=2)
    request = write_request(Opening(RoundOpened(plan), made.config.canonical()))
    with pytest.raises(RefusedByPolicy, match="in round 1 of this run; two sums from one model"):
        Handler(member).answer("query.keys", request)
    allowed = replace(member, policy=replace(SIMULATION, same_model=True))  # the owner's word
    Handler(allowed).answer("query.keys", request)


# --- survivor sets -------------------------------------------------------------------------------


def failing_in_round_two(member: int, plan: RoundPlan) -> LocalUpdate | ClientFailure:
    if (plan.round, member) == (2, 7):
        return ClientFailure("7", "gone")
    return made_up(member, plan)


@pytest.mark.parametrize("floor", [0, 1, 2])
def test_nearly_equal_survivor_sets_are_refused_where_the_owner_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, floor: int
) -> None:
    config = replace(CONFIG, rounds=2, cohort=8)
    executor = FakeExecutor(failing_in_round_two)
    made = federation(tmp_path, config, executor=executor, tolerate_failures=True)
    with_policy(made, replace(SIMULATION, difference_floor=floor), monkeypatch)
    if floor < 2:  # one member more or less is one honest member
        made.run()
        assert [len(record.survivors or ()) for record in made.records] == [8, 7]
        return
    with pytest.raises(RoundAborted, match="round 2 was given up"):
        made.run()
    told = [failure for failure in made.users.failures if "difference_floor is 2" in failure]
    assert "differs from an earlier one by 1 members, 1 of them honest" in told[0]


def test_equal_survivor_sets_are_signed_round_after_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = federation(tmp_path, replace(CONFIG, rounds=3, cohort=8))
    with_policy(made, replace(SIMULATION, difference_floor=5), monkeypatch)
    made.run()
    assert {record.survivors for record in made.records} == {tuple(range(8))}


# --- the range -----------------------------------------------------------------------------------


def test_honest_server_keeps_the_range_where_clients_take_it(tmp_path: Path) -> None:
    """Updates that vanish beside the clip bound would lead the range below what clients allow."""

    def tiny(member: int, plan: RoundPlan) -> LocalUpdate:
        update = made_up(member, plan)
        return replace(update, vector=update.vector * np.float32(1e-4))

    encoding: Any = replace(CONFIG.encoding, clip=1000.0)
    made = federation(
        tmp_path, replace(CONFIG, rounds=8, encoding=encoding), executor=FakeExecutor(tiny)
    )
    made.run()
    finest, _ = range_bounds(1000.0)
    assert made.records[-1].value_range == finest
