"""Whole rounds over our own Grid: real protocol, real messages, made-up training."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from fedoppu.client import secagg
from fedoppu.client.dealing import Secrets, deal
from fedoppu.client.jobs import ClientFailure, LocalUpdate
from fedoppu.client.policy import ClientPolicy
from fedoppu.client.release import release
from fedoppu.common.cohort import Cohort
from fedoppu.common.config import Aggregation, ResearchSettings
from fedoppu.common.errors import ClientFailed, RoundAborted
from fedoppu.common.quantization import decode_sum
from fedoppu.common.rounds import RoundPlan
from fedoppu.common.shared_adapter import initial_shared, travelling
from fedoppu.common.signing import Identity
from fedoppu.server.checkpoint import AttemptState
from fedoppu.server.exchange import Exchanger
from fedoppu.server.metrics import RoundRecord, RoundTiming
from fedoppu.server.rounds import Rounds, Standing
from fedoppu.simulations.grid import LocalGrid, node_id
from tests.fake_federation import (
    CONFIG,
    SPEC,
    FakeExecutor,
    Federation,
    federation,
    files,
    flat,
    made_up,
    shared_config,
    shown,
)

Entropy = Callable[[str, int], bytes]


class Wrapped:
    """A Grid that a test changes: everything else goes to the LocalGrid inside."""

    def __init__(self, inner: LocalGrid) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def test_rounds_are_committed_with_their_record(tmp_path: Path) -> None:
    made = federation(tmp_path)
    latest = made.run()
    first, second = made.records
    assert (first.round, second.round) == (1, 2)
    assert len(shown(first.cohort)) == 5
    assert first.survivors == first.cohort
    assert first.held_out_loss == pytest.approx(1 + np.mean(shown(first.cohort)), abs=1e-3)
    assert second.model_hash == latest.adapter.digest()
    assert latest.record == second
    assert made.timings[0].stages[0][1] == "query.keys"
    assert made.runtime.checkpoints.rounds() == (1, 2)


def test_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    federation(tmp_path / "a").run()
    federation(tmp_path / "b").run()
    assert files(tmp_path / "a") == files(tmp_path / "b")
    federation(tmp_path / "c", seed=4).run()
    assert files(tmp_path / "a") != files(tmp_path / "c")


class Backwards(Wrapped):
    """Gives replies in another order, and each only at the second look."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        ids = list(message_ids)
        return list(self.inner.pull_messages(ids[len(ids) // 2 :]))[::-1]


def test_order_of_replies_changes_nothing(tmp_path: Path) -> None:
    federation(tmp_path / "a").run()
    federation(tmp_path / "b", wrap_grid=Backwards).run()
    assert files(tmp_path / "a") == files(tmp_path / "b")


@pytest.mark.parametrize("aggregation", ["ffa", "fedavg", "alternating"])
def test_new_adapter_is_the_mean_of_the_dequantised_updates(
    tmp_path: Path, aggregation: Aggregation
) -> None:
    made = federation(tmp_path, shared_config(aggregation=aggregation))
    made.run()
    before = initial_shared(SPEC, CONFIG.public_seed)
    for number in (1, 2):
        checkpoint = made.runtime.checkpoints.load(number)
        factors = travelling(aggregation, number)
        moved = SPEC.flatten(checkpoint.adapter.tensors, factors) - SPEC.flatten(
            before.tensors, factors
        )
        plans = plans_of(made, number)
        expected = dequantised_mean(made, plans, checkpoint.record)
        np.testing.assert_allclose(moved, expected, rtol=0, atol=1e-6)
        before = checkpoint.adapter


def plans_of(made: Federation, number: int) -> RoundPlan:
    """The plan of a round, made again from its record."""
    store, record = made.runtime.checkpoints, made.records[number - 1]
    before = store.load(number - 1).adapter if number > 1 else made.runtime.initial
    standing = Standing(number - 1, before, record.value_range, made.runtime.run_id)
    state = AttemptState(made.runtime.run_id, number, shown(record.attempt), shown(record.cohort))
    return Rounds(made.runtime, Exchanger(made.grid, {}))._plan(standing, state)


def dequantised(made: Federation, plan: RoundPlan, member: int) -> Any:
    """What a member's own released integers decode to, times its weight."""
    dither = made.members.randomness.child("member", member)
    words = release(made_up(member, plan), plan, dither)
    return decode_sum(words, plan, [member])


def dequantised_mean(made: Federation, plan: RoundPlan, record: RoundRecord) -> Any:
    """The weighted mean of the survivors' updates, each released and decoded by itself."""
    decoded = [dequantised(made, plan, member) for member in shown(record.survivors)]
    total = sum(each.total_weight * each.mean_update.astype(np.float64) for each in decoded)
    return total / sum(each.total_weight for each in decoded)


def products(vector: Any, start: Any, factors: Any) -> Any:
    """Delta W of all modules in one vector: scale * B A after minus before."""
    moved = SPEC.unflatten(np.asarray(vector, np.float32), factors)
    after = {name: start.tensors[name] + moved.get(name, 0) for name in start.tensors}
    return np.concatenate(
        [
            SPEC.scale
            * (
                after[f"{t.name}.B"].astype(float) @ after[f"{t.name}.A"].astype(float)
                - start.tensors[f"{t.name}.B"].astype(float)
                @ start.tensors[f"{t.name}.A"].astype(float)
            ).reshape(-1)
            for t in SPEC.targets
        ]
    )


@pytest.mark.parametrize(
    ("aggregation", "exact"), [("ffa", True), ("alternating", True), ("fedavg", False)]
)
def test_products_are_averaged_exactly_where_one_factor_moves(
    tmp_path: Path, aggregation: Aggregation, exact: bool
) -> None:
    """Rule R8: mean(B_i A_i) - mean(B_i) mean(A_i), quantisation apart."""
    made = federation(tmp_path, shared_config(aggregation=aggregation))
    made.run()
    start = made.runtime.checkpoints.load(1).adapter
    plan, record = plans_of(made, 2), made.records[1]
    factors = travelling(aggregation, 2)
    decoded = [dequantised(made, plan, member) for member in shown(record.survivors)]
    weights = np.array([each.total_weight for each in decoded], float)
    each_product = [products(each.mean_update, start, factors) for each in decoded]
    mean_product = np.average(each_product, axis=0, weights=weights)
    end = made.runtime.checkpoints.load(2).adapter
    ours = products(
        SPEC.flatten(end.tensors, factors) - SPEC.flatten(start.tensors, factors), start, factors
    )
    error = np.linalg.norm(ours - mean_product) / np.linalg.norm(mean_product)
    assert error < 1e-6 if exact else 1e-4 < error < 0.5


def test_quantisation_error_is_small_and_apart(tmp_path: Path) -> None:
    made = federation(tmp_path)
    made.run()
    plan, record = plans_of(made, 2), made.records[1]
    exact = [made_up(member, plan) for member in shown(record.survivors)]
    weights = [min(each.weight, plan.max_weight) for each in exact]
    mean = np.average([each.vector for each in exact], axis=0, weights=weights)
    rounded = dequantised_mean(made, plan, record)
    assert 0 < np.linalg.norm(rounded - mean) / np.linalg.norm(mean) < 1e-3


def test_range_follows_the_updates_from_far_too_wide(tmp_path: Path) -> None:
    wide = replace(CONFIG, rounds=6, encoding=replace(CONFIG.encoding, value_range=50.0))
    made = federation(tmp_path, wide)
    made.run()
    ranges = [record.value_range for record in made.records]
    assert ranges[-1] < 0.5
    most = ClientPolicy().range_change
    assert all(left / right <= most for left, right in pairwise(ranges))


def test_range_follows_the_updates_from_far_too_narrow(tmp_path: Path) -> None:
    narrow = replace(CONFIG, rounds=6, encoding=replace(CONFIG.encoding, value_range=1e-4))
    made = federation(tmp_path, narrow)
    made.run()
    assert shown(made.records[0].clipped_share) > 0.5
    assert shown(made.records[-1].clipped_share) < 0.02
    assert made.records[-1].value_range > 0.02


def test_simulated_drops_are_counted_and_are_no_failure(tmp_path: Path) -> None:
    config = replace(CONFIG, rounds=6, cohort=8)
    made = federation(tmp_path, config, research=ResearchSettings(dropout=0.2))
    made.run()
    dropped = [record for record in made.records if record.dropped]
    assert dropped
    for record in made.records:
        missing = set(shown(record.drops).get("train.masked", ()))
        assert set(shown(record.survivors)) == set(shown(record.cohort)) - missing
    assert any("query.consistency" in shown(record.drops) for record in made.records)
    again = federation(tmp_path / "again", config, research=ResearchSettings(dropout=0.2))
    again.run()
    assert again.records == made.records


def test_a_drop_never_changes_who_trains_with_whom(tmp_path: Path) -> None:
    with_drops, without = FakeExecutor(), FakeExecutor()
    config = replace(CONFIG, cohort=8, rounds=1)
    federation(
        tmp_path / "a", config, executor=with_drops, research=ResearchSettings(dropout=0.2)
    ).run()
    federation(tmp_path / "b", config, executor=without).run()
    assert with_drops.groups[:4] == without.groups == [(0, 1), (2, 3), (4, 5), (6, 7)]


def fail_member(member: int) -> FakeExecutor:
    def update(each: int, plan: RoundPlan) -> LocalUpdate | ClientFailure:
        if each == member:
            return ClientFailure(str(each), "ValueError: dear diary (training.py:7)")
        return made_up(each, plan)

    return FakeExecutor(update)


ALL = replace(CONFIG, cohort=8)


def test_exception_in_a_client_ends_the_run_without_its_text(tmp_path: Path) -> None:
    made = federation(tmp_path, ALL, executor=fail_member(3))
    with pytest.raises(ClientFailed, match=r"member 3 failed in train\.masked: ClientFailed at"):
        made.run()
    assert made.runtime.checkpoints.latest() is None
    assert "dear diary" in made.users.failures[0]
    assert made.users.failures[0].startswith("member 3, train.masked")


def test_exception_in_a_client_is_a_drop_where_the_runtime_allows_it(tmp_path: Path) -> None:
    made = federation(tmp_path, ALL, executor=fail_member(3), tolerate_failures=True)
    made.run()
    assert all(3 not in shown(record.survivors) for record in made.records)
    assert made.records[0].drops == {"train.masked": (3,)}


class Losing(Wrapped):
    """Loses the replies of some members in a stage, for the first so many exchanges of it."""

    def __init__(self, inner: LocalGrid, stage: str, members: Iterable[int], times: int) -> None:
        super().__init__(inner)
        self.stage, self.times = stage, times
        self.nodes = {node_id(member) for member in members}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        pushed = list(messages)
        if pushed and pushed[0].metadata.message_type == self.stage and self.times > 0:
            self.times -= 1
            kept = [each for each in pushed if each.metadata.dst_node_id not in self.nodes]
            return self.inner.push_messages(kept)
        return self.inner.push_messages(pushed)


def lose(stage: str, members: Iterable[int], times: int) -> Any:
    return lambda grid: Losing(grid, stage, members, times)


def test_late_members_are_named_and_the_round_goes_on(tmp_path: Path) -> None:
    made = federation(tmp_path, ALL, wrap_grid=lose("train.masked", [2, 5], times=1), deadline=0.2)
    made.run()
    assert made.records[0].drops == {"train.masked": (2, 5)}
    assert set(shown(made.records[0].survivors)) == set(range(8)) - {2, 5}


def test_failed_attempt_is_followed_by_one_with_a_new_cohort(tmp_path: Path) -> None:
    grid = lose("query.keys", range(5), times=1)
    made = federation(tmp_path, wrap_grid=grid, deadline=0.2)
    made.run()
    first = made.records[0]
    assert first.attempt == 1
    assert "attempt 0 ended in query.keys" in shown(first.aborted)[0]
    assert made.records[1].attempt == 0


def test_members_asked_to_unmask_sit_out_until_the_model_changes(tmp_path: Path) -> None:
    """The unmask replies of all but two are lost, again and again: giving up is final."""
    config = replace(CONFIG, rounds=2, cohort=4)
    made = federation(
        tmp_path, config, wrap_grid=lose("query.unmask", range(2, 8), times=4), deadline=0.05
    )
    made.run()
    first, second = made.records
    assert first.attempt == 1
    asked = set(range(8)) - set(shown(first.cohort))
    assert len(asked) == 4
    assert set(shown(second.cohort)) & asked


def test_dealer_of_wrong_shares_is_named_and_sits_out_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its shares are seen to be wrong only when it has dropped: the attempt is lost."""

    def lie(cohort: Cohort, identity: Identity, secrets: Secrets, *, entropy: Entropy) -> Any:
        mask = bytearray(b"\x05" * 32) if identity.member == 3 else secrets.mask
        return deal(cohort, identity, replace(secrets, mask=mask), entropy=entropy)

    monkeypatch.setattr(secagg, "deal", lie)
    config = replace(CONFIG, rounds=1, cohort=8)
    made = federation(
        tmp_path, config, members=15, executor=fail_member(3), tolerate_failures=True, seed=1
    )
    made.run()
    (record,) = made.records
    assert record.attempt == 1
    assert record.aborted == (
        "round 1 attempt 0 ended in query.unmask: the secrets of members [3] are lost",
    )
    assert record.liars == {3: "dealt shares that restore no secret of its advert"}
    assert 3 not in shown(record.cohort)
    assert len(shown(record.cohort)) == 7  # all that are left: 7 were asked to unmask, one lied


def test_too_few_left_to_ask_says_who_sits_out(tmp_path: Path) -> None:
    made = federation(
        tmp_path, ALL, wrap_grid=lose("query.unmask", range(8), times=9), deadline=0.02
    )
    with pytest.raises(RoundAborted, match="members 0, 1, 2, 3, 4, 5, 6, 7 were asked to unmask"):
        made.run()


def test_unmask_replies_that_were_lost_are_asked_for_again(tmp_path: Path) -> None:
    made = federation(
        tmp_path / "a", wrap_grid=lose("query.unmask", range(8), times=2), deadline=0.05
    )
    made.run()
    plain = federation(tmp_path / "b")
    plain.run()
    assert (
        flat(made.runtime.checkpoints.load(2)).tolist()
        == flat(plain.runtime.checkpoints.load(2)).tolist()
    )


def test_giving_up_says_who_was_missing(tmp_path: Path) -> None:
    made = federation(tmp_path, ALL, wrap_grid=lose("query.keys", range(6), times=9), deadline=0.02)
    with pytest.raises(
        RoundAborted, match=r"given up after 3 attempts.*member 0 late in query\.keys"
    ):
        made.run()


class Killed(Exception):
    """The process is gone."""


def test_killed_between_rounds_goes_on_with_the_same_bytes(tmp_path: Path) -> None:
    config = replace(CONFIG, rounds=4)
    federation(tmp_path / "whole", config).run()

    def kill(record: RoundRecord, timing: RoundTiming) -> None:
        if record.round == 2:
            raise Killed

    with pytest.raises(Killed):
        federation(tmp_path / "cut", config, progress=kill).run()
    made = federation(tmp_path / "cut", config)
    made.run()
    assert [record.round for record in made.records] == [1, 2, 3, 4]
    assert [bool(timing.stages) for timing in made.timings] == [False, False, True, True]
    assert files(tmp_path / "whole") == files(tmp_path / "cut")


class Killing(Wrapped):
    """Kills the server when a stage is about to be sent for the second time."""

    def __init__(self, inner: LocalGrid, stage: str) -> None:
        super().__init__(inner)
        self.stage, self.armed, self.stages = stage, True, list[str]()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        pushed = list(messages)
        stage = pushed[0].metadata.message_type
        if stage == self.stage and self.armed:
            self.armed = False
            raise Killed
        self.stages.append(stage)
        return self.inner.push_messages(pushed)


def test_deployed_server_killed_before_unmasking_asks_the_same_survivors(tmp_path: Path) -> None:
    federation(tmp_path / "whole").run()
    made = federation(
        tmp_path / "cut", replays=False, wrap_grid=lambda grid: Killing(grid, "query.unmask")
    )
    with pytest.raises(Killed):
        made.run()
    made.grid.stages.clear()  # type: ignore[attr-defined]
    made.runtime = replace(made.runtime)
    latest = made.run()
    assert made.grid.stages[:3] == ["query.hello", "query.unmask", "query.keys"]  # type: ignore[attr-defined]
    assert latest.adapter.digest() == federation(tmp_path / "other").run().adapter.digest()


@pytest.mark.parametrize("stage", ["query.shares", "train.masked", "query.consistency"])
def test_deployed_server_killed_earlier_begins_a_new_attempt(tmp_path: Path, stage: str) -> None:
    made = federation(tmp_path, replays=False, wrap_grid=lambda grid: Killing(grid, stage))
    with pytest.raises(Killed):
        made.run()
    made.runtime = replace(made.runtime)
    made.run()
    assert made.records[0].attempt == 1
    assert made.records[1].attempt == 0


def test_plain_updates_warn_and_give_nearly_the_same_mean(tmp_path: Path) -> None:
    warnings: list[str] = []
    secure = federation(tmp_path / "a").run()
    plain_config = replace(CONFIG, plain_updates=True)
    made = federation(tmp_path / "b", plain_config, warn=warnings.append)
    plain = made.run()
    assert len(warnings) == 1
    assert "updates travel in clear" in warnings[0]
    assert np.linalg.norm(flat(plain) - flat(secure)) < 1e-3 * np.linalg.norm(flat(secure))
    assert made.records[0].held_out_loss == pytest.approx(
        1 + np.mean(shown(made.records[0].survivors))
    )


def test_plain_updates_below_the_floor_are_given_up(tmp_path: Path) -> None:
    made = federation(
        tmp_path,
        replace(ALL, plain_updates=True),
        wrap_grid=lose("train.plain", range(7), times=9),
        deadline=0.02,
        warn=lambda line: None,
    )
    with pytest.raises(RoundAborted, match="1 of 8 members answered, 6 must"):
        made.run()


def test_outboxes_hold_a_chain_of_everything_that_was_sent(tmp_path: Path) -> None:
    made = federation(tmp_path, replace(ALL, rounds=1))
    made.run()
    sent = made.users.outbox(4).sent
    assert [record.kind for record in sent] == [
        "query.hello",
        "query.keys",
        "query.shares",
        "train.masked",
        "query.consistency",
        "query.unmask",
    ]
    assert all(b.previous == a.chained() for a, b in pairwise(sent))
    assert len(bytes.fromhex(sent[0].digest)) == hashlib.sha256().digest_size
