"""Whole rounds of the two-server mode: exact sums, drops, restarts, and what is on the wire."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedoppu.client.jobs import LocalUpdate
from fedoppu.client.release import release
from fedoppu.common.config import (
    FederationConfig,
    PrivacySettings,
    ResearchSettings,
    SecAggSettings,
)
from fedoppu.common.errors import ConnectionFailed, ProtocolError, RoundAborted, UsageError
from fedoppu.common.messages import pack, write_mask_request, write_mask_sum
from fedoppu.common.quantization import decode_sum
from fedoppu.common.randomness import Randomness
from fedoppu.common.rounds import RoundPlan
from fedoppu.common.shared_adapter import initial_shared
from fedoppu.common.two_server import MaskSum, MaskSumRequest
from fedoppu.server.checkpoint import AttemptState
from fedoppu.server.exchange import Exchanger
from fedoppu.server.helper import HelperLink
from fedoppu.server.rounds import Rounds, Standing
from fedoppu.simulations.capture import CaptureGrid, Detector
from fedoppu.simulations.grid import LocalGrid, node_id
from fedoppu.simulations.helper import pinned_helper
from tests.fake_federation import (
    CONFIG,
    SPEC,
    FakeExecutor,
    Federation,
    federation,
    files,
    made_up,
)
from tests.integration.secagg_harness import Federation as Graph
from tests.integration.two_server_harness import TwoServers


def two_server(config: FederationConfig = CONFIG, **changes: Any) -> FederationConfig:
    return pinned_helper(
        replace(config, secagg=SecAggSettings("two_server", **changes)), Randomness.from_seed(3)
    )


SEALED = two_server()


# --- exact sums -----------------------------------------------------------------------------------


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("n", range(2, 21))
def test_sum_is_exact_for_every_number_of_members(n: int, narrow: bool) -> None:
    made = TwoServers(n=n, narrow=narrow)
    everyone = list(range(n))
    assert (made.run(everyone).words == made.plain_sum(everyone)).all()
    present = [m for m in everyone if m % 3 != 1][: max(n, 2)]
    if len(present) >= made.plan.min_cohort:
        later = made.plan_of(number=2)
        assert (made.run(present, later).words == made.plain_sum(present)).all()


@settings(max_examples=25)
@given(data=st.data(), n=st.integers(2, 20), narrow=st.booleans(), hybrid=st.booleans())
def test_sum_is_exact_for_any_drops(
    data: st.DataObject, n: int, narrow: bool, hybrid: bool
) -> None:
    made = TwoServers(n=n, narrow=narrow, hybrid=hybrid)
    drops = data.draw(st.sets(st.integers(0, n - 1), max_size=made.plan.max_drops))
    present = sorted(set(range(n)) - drops)
    ready = made.run(present)
    assert ready.survivors == tuple(present)
    assert (ready.words == made.plain_sum(present)).all()


@pytest.mark.parametrize("narrow", [False, True])
def test_sum_is_that_of_the_graph_mode(narrow: bool) -> None:
    """The same released words, the other protocol: rounding is bound to the config, sums are not."""
    graph, two = Graph(n=6, narrow=narrow), TwoServers(n=6, narrow=narrow)
    ready = graph.run()
    assert all((graph.words(member) == two.words(member)).all() for member in range(6))
    assert (two.run(range(6)).words == ready.words).all()


# --- rounds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("exchange", ["x25519", "hybrid"])
def test_new_adapter_is_the_mean_of_the_dequantised_updates(tmp_path: Path, exchange: Any) -> None:
    made = federation(tmp_path, two_server(key_exchange=exchange))
    made.run()
    before = initial_shared(SPEC, CONFIG.public_seed)
    for number in (1, 2):
        checkpoint = made.runtime.checkpoints.load(number)
        moved = SPEC.flatten(checkpoint.adapter.tensors, ("B",)) - SPEC.flatten(
            before.tensors, ("B",)
        )
        np.testing.assert_allclose(moved, expected_mean(made, number), rtol=0, atol=1e-6)
        before = checkpoint.adapter
    assert [stage for _, stage, _ in made.timings[0].stages] == ["train.sealed", "helper.sum"]


def expected_mean(made: Federation, number: int) -> Any:
    """The weighted mean of the survivors' updates, each released and decoded by itself."""
    plan, record = plan_of(made, number), made.records[number - 1]
    assert record.survivors is not None
    decoded = []
    for member in record.survivors:
        dither = made.members.randomness.child("member", member)
        words = release(made_up(member, plan), plan, dither)
        decoded.append(decode_sum(words, plan, [member]))
    total = sum(each.total_weight * each.mean_update.astype(np.float64) for each in decoded)
    return total / sum(each.total_weight for each in decoded)


def plan_of(made: Federation, number: int) -> RoundPlan:
    """The plan of a round, made again from its record."""
    store, record = made.runtime.checkpoints, made.records[number - 1]
    assert record.cohort is not None
    assert record.attempt is not None
    before = store.load(number - 1).adapter if number > 1 else made.runtime.initial
    standing = Standing(number - 1, before, record.value_range, made.runtime.run_id)
    state = AttemptState(made.runtime.run_id, number, record.attempt, record.cohort)
    return Rounds(made.runtime, Exchanger(made.grid, {}))._plan(standing, state)


def test_adapter_is_nearly_that_of_the_graph_mode(tmp_path: Path) -> None:
    """Not its bytes: the rounding is bound to the config, which names the mode."""
    graph, two = federation(tmp_path / "a"), federation(tmp_path / "b", SEALED)
    ours, theirs = (SPEC.flatten(made.run().adapter.tensors, ("B",)) for made in (graph, two))
    assert not np.array_equal(ours, theirs)
    assert np.linalg.norm(ours - theirs) < 1e-3 * np.linalg.norm(ours)
    same = ("cohort", "survivors", "weight", "held_out_clients", "value_range")
    for one, other in zip(graph.records, two.records, strict=True):
        assert {name: vars(one)[name] for name in same} == {
            name: vars(other)[name] for name in same
        }


@pytest.mark.parametrize("exchange", ["x25519", "hybrid"])
def test_same_seed_gives_the_same_bytes(tmp_path: Path, exchange: Any) -> None:
    """Though HPKE seals with randomness of the system: no sealed seed is in a result."""
    config = two_server(key_exchange=exchange)
    federation(tmp_path / "a", config).run()
    federation(tmp_path / "b", config).run()
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_simulated_drops_are_counted(tmp_path: Path) -> None:
    config = replace(SEALED, rounds=6, cohort=8)
    made = federation(tmp_path, config, research=ResearchSettings(dropout=0.15))
    made.run()
    assert any(record.drops for record in made.records)
    for record in made.records:
        assert record.cohort is not None
        assert record.survivors is not None
        assert record.drops is not None
        missing = set(record.drops.get("train.sealed", ()))
        assert set(record.survivors) == set(record.cohort) - missing


# --- what is lost ---------------------------------------------------------------------------------


class Losing:
    """A Grid that loses the messages to some members, so many times."""

    def __init__(self, inner: LocalGrid, members: Iterable[int], times: int) -> None:
        self.inner, self.times = inner, times
        self.nodes = {node_id(member) for member in members}
        self.asked: list[set[int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        pushed = list(messages)
        if pushed[0].metadata.message_type == "train.sealed":
            self.asked.append({each.metadata.dst_node_id - node_id(0) for each in pushed})
            if self.times > 0:
                self.times -= 1
                pushed = [each for each in pushed if each.metadata.dst_node_id not in self.nodes]
        return self.inner.push_messages(pushed)


def losing(members: Sequence[int], times: int) -> Callable[[LocalGrid], Any]:
    return lambda grid: Losing(grid, members, times)


ALL = replace(SEALED, cohort=8, rounds=1)


def test_missing_members_are_asked_again_while_too_few_answered(tmp_path: Path) -> None:
    grid = losing(range(4), times=2)
    made = federation(tmp_path, ALL, wrap_grid=grid, deadline=0.1)
    made.run()
    assert made.grid.asked == [set(range(8)), {0, 1, 2, 3}, {0, 1, 2, 3}]  # type: ignore[attr-defined]
    assert made.records[0].survivors == tuple(range(8))
    assert made.records[0].attempt == 0


def test_whoever_was_asked_sits_out_when_an_attempt_fails(tmp_path: Path) -> None:
    config = replace(SEALED, cohort=4, rounds=1)
    made = federation(tmp_path, config, wrap_grid=losing(range(8), times=4), deadline=0.05)
    made.run()
    (record,) = made.records
    assert record.attempt == 1
    first = made.grid.asked[0]  # type: ignore[attr-defined]
    assert record.cohort is not None
    assert not first & set(record.cohort)


def test_run_stops_and_says_why_when_nobody_is_left_to_ask(tmp_path: Path) -> None:
    made = federation(tmp_path, ALL, wrap_grid=losing(range(8), times=4), deadline=0.05)
    with pytest.raises(RoundAborted, match="0 members may still be asked"):
        made.run()


# --- the helper -----------------------------------------------------------------------------------


class Link:
    """A HelperLink that a test changes and listens to."""

    def __init__(
        self, inner: HelperLink | None, change: Callable[[MaskSum], MaskSum] = lambda told: told
    ) -> None:
        assert inner is not None
        self.inner, self.change, self.fails = inner, change, 0
        self.requests: list[MaskSumRequest] = []
        self.answers: list[MaskSum] = []

    def ask(self, request: MaskSumRequest) -> MaskSum:
        self.requests.append(request)
        if self.fails:
            self.fails -= 1
            raise ConnectionFailed("the helper cannot be reached")
        answer = self.inner.ask(request)
        self.answers.append(answer)
        return self.change(answer)


def with_link(
    folder: Path, config: FederationConfig = SEALED, **changes: Any
) -> tuple[Federation, Link]:
    made = federation(folder, config, **changes)
    link = Link(made.members.helper)
    object.__setattr__(made.runtime, "helper", link)
    return made, link


def test_set_and_sum_are_durable_before_the_helper_is_asked(tmp_path: Path) -> None:
    made, link = with_link(tmp_path, replace(SEALED, rounds=1), replays=False)
    link.fails = 1
    with pytest.raises(ConnectionFailed, match="cannot be reached"):
        made.run()
    stored = made.runtime.attempts.load()
    assert stored is not None
    assert stored.asked == stored.cohort
    asked = link.requests[0]
    # another process, the same folder, the same helper: nobody trains again
    again = federation(tmp_path, replace(SEALED, rounds=1), replays=False, helper=link)
    executor = FakeExecutor()
    object.__setattr__(again.users, "_executor", executor)
    again.run()
    assert link.requests == [asked, asked]
    assert executor.groups == []
    assert again.records[0].survivors == stored.cohort


def test_restart_before_the_set_is_fixed_asks_the_same_members_and_they_repeat(
    tmp_path: Path,
) -> None:
    config = replace(SEALED, rounds=1)
    made = federation(tmp_path, config, replays=False, wrap_grid=Dying)
    with pytest.raises(KeyboardInterrupt):
        made.run()
    stored = made.runtime.attempts.load()
    assert stored is not None
    made.grid.dies = False  # type: ignore[attr-defined]
    made.run()
    (record,) = made.records
    assert (record.attempt, record.cohort) == (0, stored.cohort)
    first, second = made.grid.replies[:5], made.grid.replies[5:]  # type: ignore[attr-defined]
    assert len(first) == len(second) == 5
    assert first == second


class Dying:
    """A Grid whose server is killed once all replies are there."""

    def __init__(self, inner: LocalGrid) -> None:
        self.inner, self.dies = inner, True
        self.replies: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(self.inner.pull_messages(message_ids))
        sealed = [each for each in replies if each.metadata.message_type == "train.sealed"]
        self.replies += [pack(each.content) for each in sealed]
        if sealed and self.dies:
            raise KeyboardInterrupt
        return replies


def test_answer_that_was_changed_ends_the_run(tmp_path: Path) -> None:
    made, link = with_link(tmp_path)
    link.change = lambda told: replace(told, survivors=told.survivors[:-1])
    with pytest.raises(ProtocolError, match="is not signed by the helper"):
        made.run()
    assert made.runtime.checkpoints.latest() is None


def test_sum_that_cannot_be_ends_the_run_as_the_helper_answers_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One member sends words out of range: the sum is discarded, and no other set is answered."""

    def too_much(update: LocalUpdate, plan: RoundPlan, dither: Randomness) -> Any:
        words = release(update, plan, dither)
        words[0] = 1 << 30
        return words

    monkeypatch.setattr("fedoppu.client.handler.release", too_much)
    made, link = with_link(tmp_path)
    with pytest.raises(ProtocolError, match="the helper has answered for round 1"):
        made.run()
    assert len(link.requests) == 1


def test_federation_without_a_link_to_its_helper_is_refused(tmp_path: Path) -> None:
    made = federation(tmp_path, SEALED, helper=None)
    with pytest.raises(UsageError, match="needs a link to the helper"):
        made.run()


# --- seeds that do not open -----------------------------------------------------------------------


def test_member_with_a_bad_seed_is_named_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_seeds(monkeypatch, {3})
    made = federation(tmp_path, replace(SEALED, cohort=8, rounds=1))
    made.run()
    (record,) = made.records
    assert record.liars == {3: "sealed no seed that the helper can open"}
    assert record.survivors == (0, 1, 2, 4, 5, 6, 7)
    assert made.runtime.checkpoints.latest() is not None


def test_too_many_bad_seeds_end_the_attempt_and_others_are_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = set(
        federation(tmp_path / "probe", replace(SEALED, cohort=4, rounds=1)).run().record.cohort
        or ()
    )
    spoil_seeds(monkeypatch, bad)
    made = federation(tmp_path / "run", replace(SEALED, cohort=4, rounds=1))
    made.run()
    (record,) = made.records
    assert record.attempt == 1
    assert record.cohort is not None
    assert not bad & set(record.cohort)
    assert set(record.liars or ()) == bad


def spoil_seeds(monkeypatch: pytest.MonkeyPatch, members: set[int]) -> None:
    """Makes some members seal their seed for another member."""
    from fedoppu.common.two_server import HelperKeys

    real = HelperKeys.seal_seed

    def seal(self: HelperKeys, seed: bytes, context: bytes, member: int) -> bytes:
        return real(self, seed, context, member + 100 if member in members else member)

    monkeypatch.setattr(HelperKeys, "seal_seed", seal)


# --- differential privacy -------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", ["central", "distributed", "dp_ftrl"])
def test_noise_and_charges_are_those_of_the_graph_mode(tmp_path: Path, mechanism: Any) -> None:
    shared = replace(CONFIG.shared, max_weight=1)
    settings = PrivacySettings(mechanism, noise_multiplier=1.0)
    graph = replace(CONFIG, cohort=8, shared=shared, privacy=settings)
    ours, theirs = (
        federation(tmp_path / config.secagg.mode, config) for config in (two_server(graph), graph)
    )
    for made in (ours, theirs):
        made.run()
    assert len(ours.records) == len(theirs.records) == 2
    assert [r.privacy for r in ours.records] == [r.privacy for r in theirs.records]
    assert ours.records[-1].privacy is not None
    charges = [made.runtime.charges.all(committed=2) for made in (ours, theirs)]
    assert len(charges[0]) == len(charges[1]) == 2
    assert ours.records[0].weight is None


# --- the wire -------------------------------------------------------------------------------------


def test_neither_wire_holds_an_update_or_a_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates: dict[str, Any] = {}
    seeds: list[bytes] = []

    def update(member: int, plan: RoundPlan) -> LocalUpdate:
        made = made_up(member, plan)
        updates[f"round {plan.round} member {member}"] = made.vector
        return made

    real = Randomness.secret

    def listen(self: Randomness, purpose: str, *key: Any, length: int = 32) -> bytes:
        found = real(self, purpose, *key, length=length)
        if purpose == "protocol key":
            seeds.append(found)
        return found

    monkeypatch.setattr(Randomness, "secret", listen)
    made, link = with_link(tmp_path, executor=FakeExecutor(update), wrap_grid=CaptureGrid)
    made.run()
    messages = made.grid.messages  # type: ignore[attr-defined]
    stages = {(m.direction, m.stage) for m in messages}
    assert stages == {(d, s) for d in ("down", "up") for s in ("query.hello", "train.sealed")}
    assert Detector(updates=updates).findings(messages) == []
    helper = [pack(write_mask_request(r)) for r in link.requests]
    helper += [pack(write_mask_sum(a)) for a in link.answers]
    everything = b"".join([*(m.data() for m in messages), *helper])
    assert len(updates) == 10
    assert seeds
    for secret in seeds:
        assert secret not in everything


def test_helper_sees_no_word_that_a_member_sent(tmp_path: Path) -> None:
    made, link = with_link(tmp_path, wrap_grid=CaptureGrid)
    made.run()
    asked = b"".join(pack(write_mask_request(request)) for request in link.requests)
    sent: list[RecordDict] = [
        m.content
        for m in made.grid.messages  # type: ignore[attr-defined]
        if (m.direction, m.stage) == ("up", "train.sealed")
    ]
    assert len(sent) == 10
    for content in sent:
        words = content.array_records["arrays"]["words"].data
        assert words[128:144] not in asked
        salt = content.config_records["event"]["salt"]
        assert isinstance(salt, bytes)
        assert salt not in asked
    # 8 bytes a member, a hash, a sealed seed, a signature; and the plan
    size = len(asked) / len(link.requests)
    assert size < 5 * (8 + 32 + 80 + 64) * 1.2 + 1200
