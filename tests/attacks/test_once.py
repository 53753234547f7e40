"""One answer to a round: over attempts, runs, restarts, crashes and restored disks.

The sums over {a, b, c} and {a, b} reveal c, so most attacks here end in a difference of two sums.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import Message
from numpy.typing import NDArray

from fedoppu.client.handler import Handler
from fedoppu.client.jobs import LocalUpdate
from fedoppu.client.policy import ClientPolicy
from fedoppu.client.release import release
from fedoppu.client.secagg import OsKeySource, SecAggClient
from fedoppu.common.adapters import Adapter
from fedoppu.common.errors import ProtocolError, RefusedByPolicy, RoundAborted
from fedoppu.common.masking import Mask, add_masks, self_mask
from fedoppu.common.messages import Opening, Reply, Request, Stage, Training
from fedoppu.common.rounds import (
    CohortFixed,
    Exchange,
    MaskedUpdate,
    RoundOpened,
    RoundPlan,
    ShareBundle,
    SharesDelivered,
    StageEnded,
    SumReady,
    UnmaskReply,
    UnmaskRequested,
    Words,
)
from fedoppu.common.shared_adapter import initial_shared
from fedoppu.simulations.grid import LocalGrid
from fedoppu.simulations.virtual_users import MemoryState
from tests.attacks.attacker import SIMULATION, Rogue, World, less, same, secret_of
from tests.attacks.devices import Device, Script, devices, plan_for, update_of, usual_update
from tests.attacks.switches import without
from tests.fake_federation import CONFIG, SPEC, federation
from tests.integration.secagg_harness import Federation as Secure
from tests.integration.secagg_harness import HashKeys, identities, roster_of

INITIAL = initial_shared(SPEC, CONFIG.public_seed)
ALL, LEFT, VICTIM = (0, 1, 2, 3, 4), (0, 1, 2, 3), 4


# --- within one attempt --------------------------------------------------------------------------


def two_survivor_sets() -> tuple[Words | None, Words]:
    """All sign that the victim survived, then the others sign that it dropped."""
    rogue = Rogue.over(World(5)).until_masked()
    rogue.agree(ALL)
    survived = dict(rogue.signatures)
    rogue.agree(LEFT)
    rogue.unmask(LEFT)
    rogue.unmask([VICTIM], survived)
    return rogue.bare(VICTIM), secret_of(VICTIM, rogue.plan)


def test_both_secrets_of_one_owner() -> None:
    with pytest.raises(ProtocolError, match="SurvivorsProposed does not belong after signed"):
        two_survivor_sets()
    with without("one survivor set"):
        assert same(*two_survivor_sets())


def unmask_twice() -> tuple[Words | None, Words]:
    """The round is unmasked as it should be; then once more, with the victim as a drop."""
    rogue = Rogue.over(World(5)).until_masked().finish(ALL)
    seed = rogue.replies[VICTIM]
    rogue.finish(LEFT)
    rogue.replies[VICTIM] = seed
    return rogue.bare(VICTIM), secret_of(VICTIM, rogue.plan)


def test_second_unmask() -> None:
    with pytest.raises(ProtocolError, match="does not belong after done"):
        unmask_twice()
    with without("one reply"):  # what it would tell is erased by then
        assert not same(*unmask_twice())
    with without("one reply", "erasure"):
        assert same(*unmask_twice())


def stolen_after_the_round() -> tuple[Words, Words]:
    """Who has all that was sent, and later the victim's device, looks for the round's secrets."""
    rogue = Rogue.over(World(5)).until_masked().finish(ALL)
    honest = rogue.world.client(VICTIM)
    stolen = SecAggClient.load(
        rogue.clients[VICTIM].dump(),
        honest._identity,
        honest._pins,
        policy=SIMULATION,
        keys=HashKeys("thief"),
    )._state
    words = rogue.masked[VICTIM].words.copy()
    seed = rogue.replies[VICTIM].own_seed
    masks = [less(self_mask(seed, rogue.view(VICTIM).scope, VICTIM))]
    masks += [Mask(bytes(key), negative=peer > VICTIM) for peer, key in stolen.pairs.items()]
    add_masks(words, masks)
    return words, secret_of(VICTIM, rogue.plan)


def test_no_key_outlives_its_use() -> None:
    assert not same(*stolen_after_the_round())
    with without("erasure"):
        assert same(*stolen_after_the_round())


# --- attempts ------------------------------------------------------------------------------------


def two_attempts(second: Callable[[RoundPlan], RoundPlan]) -> tuple[Words, Words]:
    """The same round twice, the second time without the victim."""
    world = World(5)
    first = Rogue.over(world).until_masked().finish(ALL)
    last = {member: client.last_round for member, client in first.clients.items()}
    again = Rogue.over(world, plan=second(first.plan), last=last).until_masked().finish(LEFT)
    one, other = first.sum_over(ALL), again.sum_over(LEFT)
    assert one is not None
    assert other is not None
    return one - other, secret_of(VICTIM, first.plan)


def test_round_replay() -> None:
    with pytest.raises(RefusedByPolicy, match="round 1 attempt 0 is not after round 1 attempt 0"):
        two_attempts(lambda plan: plan)
    with without("memory"):
        assert same(*two_attempts(lambda plan: plan))


def test_second_attempt_at_a_round_that_was_answered() -> None:
    def next_attempt(plan: RoundPlan) -> RoundPlan:
        return replace(plan, attempt=1)

    with pytest.raises(RefusedByPolicy, match="round 1 was answered at attempt 0"):
        two_attempts(next_attempt)
    with without("memory"):
        assert same(*two_attempts(next_attempt))


Updates = NDArray[np.float32]


def nearly(learned: Updates, true: Updates) -> bool:
    """The same but for the rounding of some vectors to 65,535 levels of +- 0.5."""
    return bool(np.abs(learned - true).max() < 1e-3)


def two_rounds(policy: ClientPolicy = SIMULATION, **second: Any) -> tuple[Updates, Updates]:
    """Two rounds with one model, the second one without the victim."""
    members = devices(5, policy=policy)
    plan = plan_for(members)
    learned = Script(members, plan).updates()
    learned -= Script(members[:4], plan_for(members[:4], **second)).updates()
    return learned, update_of(members[VICTIM], plan)


@pytest.mark.parametrize(
    ("second", "where"),
    [({"run_id": "cd" * 16}, "in another run"), ({"round": 2}, "in round 1 of this run")],
)
def test_second_run_or_round_with_the_same_model(second: dict[str, Any], where: str) -> None:
    with pytest.raises(RefusedByPolicy, match=f"this client answered for task LaMP_3 .* {where}"):
        two_rounds(**second)
    with without("one round for a model"):
        assert nearly(*two_rounds(**second))
    # the same, by the word of the owner
    assert nearly(*two_rounds(replace(SIMULATION, same_model=True), **second))


def test_nearly_equal_survivor_sets_are_refused_by_owners_who_ask_for_distance() -> None:
    """What stays in the threat model otherwise: two rounds whose members differ by one."""
    near = replace(SIMULATION, same_model=True)
    assert nearly(*two_rounds(near, round=2))
    with pytest.raises(RefusedByPolicy, match="differs from an earlier one by 1 members, 1 of"):
        two_rounds(replace(near, difference_floor=2), round=2)


@dataclass
class Hurried(Device):
    """It gets its unmask request while the opening of another run, from the same model, is judged."""

    opening: Opening | None = None
    waiting: list[UnmaskRequested] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)

    def drops(self, stage: Stage, plan: RoundPlan) -> bool:
        if stage == "query.keys" and self.waiting:
            self.replies.append(super().ask("query.unmask", self.waiting.pop()))
        return False

    def ask(self, stage: Stage, request: Request) -> Reply:
        if not isinstance(request, UnmaskRequested) or self.opening is None:
            return super().ask(stage, request)
        self.waiting.append(request)
        self.replies.append(super().ask("query.keys", self.opening))
        return self.replies[0]


def test_opening_of_another_run_does_not_overtake_an_unmask_reply() -> None:
    """What the opening was judged by is no longer so when its keys would go out."""
    people = identities(5)
    members: list[Device] = [Hurried(person, roster_of(people)) for person in people]
    other = plan_for(members, run_id="cd" * 16)
    members[VICTIM].opening = Opening(RoundOpened(other), CONFIG.canonical())  # type: ignore[attr-defined]
    script = Script(members, plan_for(members))
    script.run()
    replies = members[VICTIM].replies  # type: ignore[attr-defined]
    assert [type(reply) for reply in replies] == [UnmaskReply]
    assert "another message was answered meanwhile" in str(script.refusals[VICTIM])


# --- crashes, restarts, restored disks -----------------------------------------------------------


def until_training(members: list[Device], plan: RoundPlan) -> Training:
    """Runs a round up to the victim's message to train, and returns it."""
    adverts = [m.ask("query.keys", Opening(RoundOpened(plan), CONFIG.canonical())) for m in members]
    cohort = CohortFixed(tuple(adverts))  # type: ignore[arg-type]
    bundles = {m.identity.member: m.ask("query.shares", cohort) for m in members}
    mine = {
        dealer: replace(
            bundle,
            packages={VICTIM: bundle.packages[VICTIM]},
            share_hashes={VICTIM: bundle.share_hashes[VICTIM]},
        )
        for dealer, bundle in bundles.items()
        if isinstance(bundle, ShareBundle) and dealer != VICTIM
    }
    return Training(SharesDelivered(ALL, mine), Script(members, plan).model)


def train_twice(change: Callable[[Training], Training]) -> tuple[Words, Words]:
    """The victim's device is off before its vector is sent; it trains anew, and comes out other.

    Two vectors under the same masks: their difference is that of the two updates.
    """
    made: list[Words] = []

    def train(member: int, plan: RoundPlan, shared: Adapter) -> np.ndarray:
        vector = usual_update(member + 100 * len(made), plan, shared)
        if member == VICTIM:
            update = LocalUpdate(plan.context, vector, plan.max_weight, None)
            made.append(release(update, plan, members[VICTIM].dither))
        return vector

    members = devices(5, train=train)
    plan = plan_for(members)
    request = until_training(members, plan)
    first = members[VICTIM].ask("train.masked", request)
    second = members[VICTIM].ask("train.masked", change(request))
    assert isinstance(first, MaskedUpdate)
    assert isinstance(second, MaskedUpdate)
    return second.words - first.words, made[-1] - made[0]


def test_vector_is_sent_once_or_repeated_byte_for_byte() -> None:
    learned, true = train_twice(lambda request: request)
    assert not learned.any()
    assert not true.any()  # it did not train again
    with without("durable state at training"):
        learned, true = train_twice(lambda request: request)
    assert true.any()
    assert same(learned, true)


def test_other_request_for_a_vector_that_was_sent() -> None:
    def without_one_package(request: Training) -> Training:
        bundles = {m: b for m, b in request.event.bundles.items() if m}
        return replace(request, event=replace(request.event, bundles=bundles))

    with pytest.raises(ProtocolError, match="SharesDelivered does not belong after masked"):
        train_twice(without_one_package)
    with without("durable state at training"):
        assert same(*train_twice(without_one_package))


def restore_disk(silent: bool) -> tuple[Updates, Updates]:
    """The victim's protocol state is put back to before the round, as a backup would."""
    members = devices(5)
    plan = plan_for(members)
    before = [dict(member.state._values) for member in members]
    learned = Script(members, plan).updates()
    if silent:
        for member, values in zip(members, before, strict=True):
            member.state = MemoryState()
            member.state._values |= values
    learned -= Script(members[:4], plan).updates()
    return learned, update_of(members[VICTIM], plan)


def test_disk_that_is_silently_rolled_back_counts_as_a_corrupt_client() -> None:
    """Nothing in a client sees it (rule 13 says so); what helps is that state is in no backup."""
    with pytest.raises(RefusedByPolicy, match="is not after round 1 attempt 0"):
        restore_disk(silent=False)
    assert nearly(*restore_disk(silent=True))


def reused_keys(keys: Callable[[int], HashKeys | OsKeySource]) -> bool:
    """Whether a client that forgot a round sends the keys of before."""
    world = World(5)
    adverts = []
    for _ in range(2):
        client = world.client(0, keys=keys(0))
        adverts += client.receive(RoundOpened(world.plan()))
    return adverts[0] == adverts[1]


def test_restart_never_uses_a_mask_key_again() -> None:
    """Even a client that lost its memory draws new keys from the operating system."""
    assert not reused_keys(lambda member: OsKeySource())
    assert reused_keys(lambda member: HashKeys("the same for ever"))  # keys from a seed


def test_new_attempt_overwrites_the_keys_of_the_old_one() -> None:
    members = devices(5)
    old = plan_for(members)
    until_training(members, old)
    mask = load(members[VICTIM])._state.mask
    assert any(mask)
    opening = Opening(RoundOpened(replace(old, attempt=1)), CONFIG.canonical())
    members[VICTIM].ask("query.keys", opening)
    stored = b"".join(members[VICTIM].state._values.values())
    assert mask.hex().encode() not in stored
    assert load(members[VICTIM])._state.mask.hex().encode() in stored  # the control


def load(device: Device) -> SecAggClient:
    return Handler(device)._machine()


# --- the server ----------------------------------------------------------------------------------


class Deaf:
    """A Grid that loses all unmask messages of the first attempt, and notes who is asked what."""

    def __init__(self, inner: LocalGrid) -> None:
        self.inner = inner
        self.attempts: list[set[int]] = []
        self.asked: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        pushed = list(messages)
        nodes = {message.metadata.dst_node_id for message in pushed}
        stage = pushed[0].metadata.message_type if pushed else ""
        if stage == "query.keys":
            self.attempts.append(nodes)
        if stage == "query.unmask" and len(self.attempts) == 1:
            self.asked |= nodes
            return []
        return self.inner.push_messages(pushed)


def asked_twice(folder: Path) -> set[int]:
    """Members that were asked to unmask in an attempt that failed, and are asked again."""
    config = replace(CONFIG, rounds=1, cohort=5)
    made = federation(folder, config, members=12, wrap_grid=Deaf, deadline=0.02)
    try:
        made.run()
    except RoundAborted:
        assert len(made.grid.attempts) > 1  # type: ignore[attr-defined]
    grid = cast(Deaf, made.grid)
    assert len(grid.asked) == 5
    return set.union(*grid.attempts[1:]) & grid.asked


def test_members_that_were_asked_sit_out(tmp_path: Path) -> None:
    assert asked_twice(tmp_path / "on") == set()
    with without("the asked sit out"):
        assert asked_twice(tmp_path / "off")


def late_replies() -> tuple[Words | None, Words]:
    """Unmask replies that come after the round was given up; the machine may still have the sum."""
    made = Secure(5, drops={Exchange.UNMASK: frozenset(range(5))})
    outgoing = made.until(Exchange.UNMASK)
    made.drops = {}
    answers = [event for out in outgoing for event in made.answer(out)]
    with pytest.raises(RoundAborted, match=r"ended in query\.unmask"):
        made.server.receive(StageEnded())
    for answer in answers:
        made.server.receive(answer)
    ((ready),) = made.server.receive(StageEnded())
    assert isinstance(ready, SumReady)
    return ready.words, made.plain_sum(range(5))


def test_giving_up_is_final() -> None:
    with pytest.raises(ProtocolError, match="UnmaskReply came after the round was aborted"):
        late_replies()
    with without("giving up is final"):
        assert same(*late_replies())
