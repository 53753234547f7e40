"""How a client follows a roster: every attack of rule 13, with the rule on and off, and a restored vault."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedoppu.client.enrolment import Enrolment, Link, follow, for_epoch, restored
from fedoppu.client.ledger import PrivacyBudget, VaultLedger
from fedoppu.client.policy import ClientPolicy, LastRound
from fedoppu.common.accounting import gaussian_epsilon
from fedoppu.common.agreed import agreed_noise
from fedoppu.common.config import PrivacySettings, ThresholdSettings
from fedoppu.common.epochs import EpochAnswer, RosterEpoch, collect, propose
from fedoppu.common.errors import FedoppuError, ProtocolError, RefusedByPolicy
from tests.fake_federation import CONFIG
from tests.integration.secagg_harness import make_plan
from tests.rosters import AUTHORITY, RUN, Store, completed, founded, person, proposed, signed_by

POLICY = ClientPolicy(floor=3, corrupt=1)
FIRST = founded()
SECOND = completed(FIRST, proposed(FIRST, add=2))


def member(anchor: RosterEpoch = FIRST) -> Enrolment:
    """A client whose owner pinned an epoch."""
    enrolment = Enrolment(Store())
    enrolment.begin(anchor, anchor.digest.hex())
    return enrolment


def newest(enrolment: Enrolment) -> RosterEpoch:
    chain = enrolment.chain
    assert chain is not None
    return chain.newest


def at(round: int, run_id: str = RUN) -> LastRound:
    """A last attempt at a round."""
    return LastRound(run_id, round, 0, False, 0.5)


def ask(
    enrolment: Enrolment,
    epoch: RosterEpoch,
    *,
    index: int = 0,
    policy: ClientPolicy = POLICY,
    last: LastRound | None = None,
) -> bytes:
    """The countersignature that a member gives, if any."""
    return enrolment.consider(epoch, person(index), policy, last=last).countersignature


# --- following -----------------------------------------------------------------------------------


def test_members_countersign_a_proposal_and_follow_what_enough_of_them_countersigned() -> None:
    people = {index: member() for index in range(8)}
    proposal = proposed(FIRST)
    answers = [
        people[index].consider(proposal, person(index), POLICY, last=at(1)) for index in range(5)
    ]
    for count in (4, 5):
        announced = collect(FIRST, proposal, answers[:count])
        reply = ask(people[7], announced, index=7, last=at(1))
        assert bool(reply) == (count == 4)  # more than (8 + 1) / 2 are enough
    assert newest(people[7]) == announced
    assert newest(people[0]) == FIRST  # it countersigned, and has not seen the others' yet


def test_followed_epoch_is_answered_again_without_a_signature() -> None:
    enrolment = member()
    assert [ask(enrolment, SECOND) for _ in range(2)] == [b"", b""]
    assert newest(enrolment) == SECOND


def test_client_that_was_away_follows_each_epoch_in_turn() -> None:
    third = completed(SECOND, proposed(SECOND, add=1, revoked={8}))
    enrolment = member()
    with pytest.raises(ProtocolError, match="epoch 2 does not follow epoch 0: send each"):
        ask(enrolment, third, last=at(2))
    for epoch in (SECOND, third):
        ask(enrolment, epoch, last=at(2))
    chain = enrolment.chain
    assert chain is not None
    numbers = [chain.at(RUN, round).number for round in (3, 4, 7, 8, 30)]
    assert numbers == [0, 1, 1, 2, 2]
    assert chain.at("cd" * 16, 1).number == 2  # of a run that this client never saw


def test_epochs_that_no_round_can_use_any_more_are_forgotten() -> None:
    enrolment, before = member(), FIRST
    for number in range(1, 6):
        epoch = completed(before, proposed(before, add=0))
        ask(enrolment, epoch, last=at(4 * number))
        before = epoch
    chain = enrolment.chain
    assert chain is not None
    assert [link.epoch.number for link in chain.links] == [4, 5]


def test_owner_pins_the_hash_that_came_out_of_band_and_only_once() -> None:
    enrolment = Enrolment(Store())
    with pytest.raises(ProtocolError, match=r"has hash .*, the owner pinned 0000"):
        enrolment.begin(FIRST, "00" * 32)
    unsigned = replace(FIRST, signature=bytes(64))
    with pytest.raises(ProtocolError, match="epoch 0 is not signed by the roster authority"):
        enrolment.begin(unsigned, unsigned.digest.hex())
    enrolment.begin(FIRST, FIRST.digest.hex())
    with pytest.raises(RefusedByPolicy, match="this client follows a roster already"):
        enrolment.begin(SECOND, SECOND.digest.hex())


def test_client_without_epochs_keeps_the_roster_that_its_owner_pinned() -> None:
    enrolment = Enrolment(Store())
    assert enrolment.standing((FIRST.roster, POLICY), RUN, 1) == (FIRST.roster, POLICY)
    with pytest.raises(RefusedByPolicy, match="pinned a roster that has no epochs"):
        ask(enrolment, SECOND)


def test_newcomer_waits_for_the_first_round_of_its_epoch() -> None:
    enrolment = member(SECOND)  # which holds from round 4
    with pytest.raises(RefusedByPolicy, match="epoch 1, which this client pins, does not hold"):
        enrolment.standing((FIRST.roster, POLICY), RUN, 3)
    roster, policy = enrolment.standing((FIRST.roster, POLICY), RUN, 4)
    assert roster == SECOND.roster
    assert policy.young == {8, 9}


@given(
    steps=st.lists(st.tuples(st.integers(0, 2), st.sets(st.integers(0, 20))), max_size=4),
    policy=st.builds(
        ClientPolicy,
        floor=st.just(3),
        corrupt=st.integers(1, 2),
        roster_growth=st.just(0.25),
        young_epochs=st.integers(0, 1),
    ),
)
@settings(max_examples=30)
def test_random_chains_are_followed_to_their_end(
    steps: list[tuple[int, set[int]]], policy: ClientPolicy
) -> None:
    enrolment, before = member(founded(12)), founded(12)
    for add, revoked in steps:
        gone = set(sorted(revoked & before.members)[:1])
        epoch = completed(before, proposed(before, add=add, revoked=gone))
        assert ask(enrolment, epoch, policy=policy) == b""
        before = epoch
    assert newest(enrolment) == before


@given(data=st.data())
@settings(max_examples=60)
def test_any_single_change_leaves_the_client_where_it_is(data: st.DataObject) -> None:
    """With the fewest countersignatures that are enough, so that each of them counts."""
    epoch = signed_by(FIRST, proposed(FIRST), data.draw(st.permutations(range(8)))[:5])
    signature = bytearray(epoch.signature)
    where = data.draw(st.integers(0, 63))
    signature[where] ^= 1 << data.draw(st.integers(0, 7))
    one = data.draw(st.sampled_from(sorted(epoch.countersignatures)))
    counter = bytearray(epoch.countersignatures[one])
    counter[where] ^= 1 << data.draw(st.integers(0, 7))
    fewer = {who: got for who, got in epoch.countersignatures.items() if who != one}
    changed: Sequence[RosterEpoch] = (
        replace(epoch, signature=bytes(signature)),
        replace(epoch, countersignatures=fewer | {one: bytes(counter)}),
        replace(epoch, countersignatures=fewer),
        replace(epoch, countersignatures=fewer | {20: epoch.countersignatures[one]}),
        replace(epoch, first_round=epoch.first_round + 1),
    )
    assert follow(FIRST, epoch, POLICY) == epoch
    for mutation in changed:
        with pytest.raises(FedoppuError):
            follow(FIRST, mutation, POLICY)


# --- the attacks of rule 13, with the rule on and off ------------------------------------------------


def fork(policy: ClientPolicy, *, liars: set[int]) -> list[RosterEpoch]:
    """The authority shows half of the members one epoch and half another; liars sign both."""
    ones, others = {0, 1, 2, 3}, {4, 5, 6, 7}
    branches = []
    for seen, first in ((ones, 4), (others, 5)):
        proposal = proposed(FIRST, first=first)
        answers = [
            member().consider(proposal, person(index), policy, last=None)
            for index in sorted(seen | liars)
        ]
        branches.append(collect(FIRST, proposal, answers))
    return branches


def followed(branch: RosterEpoch, policy: ClientPolicy) -> bool:
    try:
        follow(FIRST, branch, policy)
    except RefusedByPolicy:
        return False
    return True


def test_two_victims_cannot_be_led_into_two_rosters() -> None:
    branches = fork(POLICY, liars=set())
    assert [len(branch.countersignatures) for branch in branches] == [4, 4]
    for branch in branches:
        with pytest.raises(RefusedByPolicy, match=r"4 of 8 members countersigned .* 5 must have"):
            follow(FIRST, branch, POLICY)


def test_corrupt_members_that_sign_both_branches_complete_one_at_most() -> None:
    """Of 8 with c = 1 five must sign: two sets of five share two, so an honest member signed twice."""
    for liar in range(8):
        assert sum(followed(branch, POLICY) for branch in fork(POLICY, liars={liar})) <= 1
    # the control: one more liar than the policy assumes
    assert all(followed(branch, POLICY) for branch in fork(POLICY, liars={0, 4}))


def test_member_countersigns_one_epoch_per_number_over_restarts() -> None:
    enrolment = member()
    one, other = proposed(FIRST, first=4), proposed(FIRST, first=5)
    signature = ask(enrolment, one)
    again = Enrolment(enrolment.store)
    assert ask(again, one) == signature
    with pytest.raises(RefusedByPolicy, match="countersigned another roster epoch 1"):
        ask(again, other)
    # what makes it so is what is stored: without it, the fork succeeds
    enrolment.store.put("countersigned", b"")
    assert ask(again, other)


def test_member_that_countersigned_a_branch_still_follows_the_one_that_won() -> None:
    enrolment = member()
    ask(enrolment, proposed(FIRST, first=4))
    assert ask(enrolment, completed(FIRST, proposed(FIRST, first=5))) == b""


def test_fork_of_what_was_followed_is_refused() -> None:
    enrolment = member()
    ask(enrolment, SECOND)
    rival = completed(FIRST, proposed(FIRST, add=1, revoked={1}))
    with pytest.raises(ProtocolError, match="epoch 1 does not follow epoch 1"):
        ask(enrolment, rival)
    beyond = completed(rival, proposed(rival))
    with pytest.raises(ProtocolError, match=r"this client's epoch 1 is .*: the roster was forked"):
        ask(enrolment, beyond)


@pytest.mark.parametrize(("growth", "most"), [(0.25, 2), (0.01, 1), (0.0, 0), (1.0, 8)])
def test_growth_of_an_epoch_is_limited(growth: float, most: int) -> None:
    policy = replace(POLICY, roster_growth=growth)
    assert ask(member(), proposed(FIRST, add=most), policy=policy)
    for epoch in (proposed(FIRST, add=most + 1), completed(FIRST, proposed(FIRST, add=most + 1))):
        with pytest.raises(RefusedByPolicy, match=f"adds {most + 1} members to 8, .* takes {most}"):
            ask(member(), epoch, policy=policy)


def flooded(policy: ClientPolicy, *, hours: float) -> int:
    """Members of the roster after twelve epochs of the authority's own people, one after the other.

    They name no run, so they need not wait for any round.
    """
    now = 0.0
    people = {index: Enrolment(Store(), clock=lambda: now) for index in range(8)}
    for enrolment in people.values():
        enrolment.begin(FIRST, FIRST.digest.hex())
    before = FIRST
    for _ in range(12):
        free, add = 1 + before.entries[-1].index, len(before.members) // 4
        keys = [person(free + place).enrolled.identity for place in range(add)]
        proposal = propose(AUTHORITY, before, first=("", 0), newcomers=keys)
        epoch = signed_by(before, proposal, before.members - people.keys())
        epoch = collect(before, epoch, answers(people, proposal, policy))
        answers(people, epoch, policy)
        if any(newest(enrolment).digest != epoch.digest for enrolment in people.values()):
            break
        before, now = epoch, now + hours * 3600
    return len(before.members)


def answers(
    people: Mapping[int, Enrolment], epoch: RosterEpoch, policy: ClientPolicy
) -> list[EpochAnswer]:
    """What these members answer; those that refuse are silent."""
    given = []
    for index, enrolment in people.items():
        with suppress(RefusedByPolicy):
            given.append(enrolment.consider(epoch, person(index), policy, last=at(1)))
    return given


def test_roster_is_not_flooded_by_many_epochs_at_once() -> None:
    """Growth and youth are counted in epochs, which cost an authority that works with a server nothing."""
    assert flooded(POLICY, hours=0) == 10
    assert flooded(POLICY, hours=25) > 50  # a quarter in a day is what the owner allows
    assert flooded(replace(POLICY, epoch_hours=0), hours=0) > 50  # the rule is off


def test_clock_that_is_set_back_lets_no_epoch_through() -> None:
    times = [1e6, 0.0]
    enrolment = Enrolment(Store(), clock=lambda: times.pop(0))
    enrolment.begin(FIRST, FIRST.digest.hex())
    ask(enrolment, proposed(FIRST))
    ask(enrolment, completed(FIRST, proposed(FIRST)))
    with pytest.raises(RefusedByPolicy, match="epoch 1 less than 24 hours ago"):
        ask(enrolment, proposed(proposed(FIRST)))


def test_growth_is_of_newcomers_and_not_made_up_for_by_revocations() -> None:
    with pytest.raises(RefusedByPolicy, match="adds 4 members to 8"):
        ask(member(), proposed(FIRST, add=4, revoked={1, 2, 3, 4}))


def test_countersignatures_of_strangers_and_newcomers_count_for_nothing() -> None:
    proposal = proposed(FIRST, add=2)
    crowd = signed_by(FIRST, proposal, {0, 1, 2, 3, *range(8, 40)})
    assert not followed(crowd, POLICY)
    assert followed(signed_by(FIRST, proposal, {0, 1, 2, 3, 4, *range(8, 40)}), POLICY)


def test_countersignature_under_other_members_names_counts_once() -> None:
    epoch = signed_by(FIRST, proposed(FIRST), {0})
    copied = replace(epoch, countersignatures=dict.fromkeys(range(8), epoch.countersignatures[0]))
    with pytest.raises(RefusedByPolicy, match="1 of 8 members countersigned"):
        follow(FIRST, copied, POLICY)


def test_revoked_member_countersigns_no_later_epoch() -> None:
    second = completed(FIRST, proposed(FIRST, add=0, revoked={3, 4, 5}))
    third = proposed(second, add=0)
    with pytest.raises(RefusedByPolicy, match="3 of 5 members countersigned roster epoch 2, 4"):
        follow(second, signed_by(second, third, {0, 1, 2, 3, 4, 5}), POLICY)


def test_old_epoch_that_is_replayed_is_refused() -> None:
    enrolment, before = member(), FIRST
    old = [FIRST]
    for number in range(1, 4):
        before = completed(before, proposed(before, add=0))
        old.append(before)
        ask(enrolment, before, last=at(4 * number + 3))
    for epoch in old[:2]:  # epochs 2 and 3 are still known, and answered as before
        with pytest.raises(ProtocolError, match="does not follow epoch 3"):
            ask(enrolment, epoch)
    assert newest(enrolment) == before


def test_epoch_that_holds_at_once_is_not_countersigned() -> None:
    for first in (1, 4, 5):
        with pytest.raises(ProtocolError, match=f"holds from round {first}, but round 4 was the"):
            ask(member(), proposed(FIRST, first=first), last=at(4))
    assert ask(member(), proposed(FIRST, first=6), last=at(4))
    with pytest.raises(ProtocolError, match="holds from round 1, but round 0 was the last"):
        ask(member(), proposed(FIRST, first=1))


def test_epoch_that_names_no_run_does_not_hold_at_once_in_the_run_under_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    enrolment = member()
    epoch = completed(FIRST, propose(AUTHORITY, FIRST, first=("", 0)))
    ask(enrolment, epoch, last=at(5))
    chain = enrolment.chain
    assert chain is not None
    assert [chain.at(RUN, round).number for round in (5, 6, 7)] == [0, 0, 1]
    monkeypatch.setattr(Link, "holds", lambda *_: True)  # the control: without the rule it does
    assert chain.at(RUN, 6).number == 1


def test_epoch_that_was_announced_late_is_used_late() -> None:
    """Enough others countersigned it in time; this client heard of it when it held already."""
    enrolment = member()
    ask(enrolment, completed(FIRST, proposed(FIRST, first=6)), last=at(5))
    chain = enrolment.chain
    assert chain is not None
    assert [chain.at(RUN, round).number for round in (5, 6, 7)] == [0, 0, 1]
    assert chain.at("cd" * 16, 1).number == 1


def test_epoch_begins_later_than_the_one_before() -> None:
    enrolment = member()
    ask(enrolment, SECOND)
    with pytest.raises(ProtocolError, match="from round 4: a later epoch begins later"):
        ask(enrolment, completed(SECOND, proposed(SECOND, first=4)))


def test_young_members_that_fill_a_cohort_count_as_corrupt() -> None:
    policy = ClientPolicy(floor=4, corrupt=1, max_drop=0.5)
    crowd = [0, 1, 2, 3, 8, 9]
    plan = make_plan(6, SECOND.roster, settings=ThresholdSettings(2, 1, 0.3))
    with pytest.raises(RefusedByPolicy, match="cohort of 6 has 3 honest members if 3 are corrupt"):
        for_epoch(policy, SECOND).check_cohort(plan, crowd)
    # with the rule off they are counted as honest, and the victim is with three others
    for_epoch(replace(policy, young_epochs=0), SECOND).check_cohort(plan, crowd)


def test_young_members_raise_threshold_and_quorum_of_the_cohorts_that_they_are_in() -> None:
    policy = for_epoch(ClientPolicy(floor=2, corrupt=2, max_drop=0.5), SECOND)
    assert (policy.quorum(range(8)), policy.quorum(range(2, 10))) == (6, 7)
    plan = make_plan(8, SECOND.roster, settings=ThresholdSettings(2, 2, 0.3))
    policy.check_cohort(plan, range(8))
    with pytest.raises(RefusedByPolicy, match="4 corrupt members it must be between 7 and 8"):
        policy.check_cohort(plan, range(2, 10))


def test_young_members_cannot_enrol_the_next_ones() -> None:
    """Of 10 members two are young: with c = 1, seven must sign, and none of them has aged yet."""
    third = proposed(SECOND)
    with pytest.raises(RefusedByPolicy, match="6 of 10 members countersigned roster epoch 2, 7"):
        follow(SECOND, signed_by(SECOND, third, {0, 1, 2, 3, 8, 9}), POLICY)
    off = replace(POLICY, young_epochs=0)
    assert follow(SECOND, signed_by(SECOND, third, {0, 1, 2, 3, 8, 9}), off).number == 2


# --- a restored vault ------------------------------------------------------------------------------


def private(mechanism: str, **changes: Any) -> Any:
    settings_ = {"mechanism": mechanism, "noise_multiplier": 4.0, **changes}
    thresholds = ThresholdSettings(floor=16, corrupt=4)
    return replace(CONFIG, privacy=PrivacySettings(**settings_), thresholds=thresholds)


@pytest.mark.parametrize(
    ("config", "multiplier", "parts"),
    [
        (private("central"), 4.0, 100),
        (private("dp_ftrl", separation=8), 4.0, 13),
        # 20 members less 4 add the promised variance; of this owner's 8 corrupt ones 12 are left
        (private("distributed"), 4.0 * math.sqrt(12 / 16), 100),
    ],
)
def test_restored_vault_is_charged_for_every_round(
    config: Any, multiplier: float, parts: int
) -> None:
    ledger = VaultLedger(Store(), corrupt=8)
    epsilon = restored(ledger, config, rounds=100)
    assert epsilon == pytest.approx(gaussian_epsilon(multiplier, parts, 1e-5))
    assert ledger.epsilon(1e-5) == pytest.approx(epsilon, rel=1e-6)
    restored(ledger, config, rounds=100)  # of another federation
    both = gaussian_epsilon(multiplier, 2 * parts, 1e-5)
    assert ledger.epsilon(1e-5) == pytest.approx(both, rel=1e-6)


@given(
    mechanism=st.sampled_from(["central", "distributed"]),
    corrupt=st.integers(0, 12),
    cohorts=st.lists(st.integers(20, 60), min_size=1, max_size=5),
)
@settings(max_examples=40)
def test_restored_charge_is_no_less_than_what_the_lost_vault_was_charged(
    mechanism: str, corrupt: int, cohorts: list[int]
) -> None:
    """Whatever the cohorts were, and however many more or fewer the owner assumes corrupt."""
    config, plan = private(mechanism), make_plan(20, FIRST.roster)
    lost, new = VaultLedger(Store(), corrupt=corrupt), VaultLedger(Store(), corrupt=corrupt)
    for number, least in enumerate(cohorts, 1):
        asked = replace(plan, round=number, min_cohort=least)
        lost.charge(replace(asked, noise_scale=agreed_noise(config, asked)), config)
    restored(new, config, rounds=len(cohorts))
    assert new.epsilon(1e-5) >= lost.epsilon(1e-5) * (1 - 1e-6)


def test_restored_vault_of_a_spent_budget_takes_no_part() -> None:
    config = private("central")
    ledger = VaultLedger(Store(), PrivacyBudget(8.0))
    restored(ledger, config, rounds=400)
    with pytest.raises(RefusedByPolicy, match=r"privacy budget.* does not allow"):
        ledger.charge(make_plan(20, FIRST.roster), config)
    VaultLedger(Store(), PrivacyBudget(8.0)).charge(make_plan(20, FIRST.roster), config)  # control


def test_federation_without_noise_or_rounds_charges_nothing() -> None:
    ledger = VaultLedger(Store(), corrupt=1)
    assert restored(ledger, CONFIG, rounds=100) == 0
    assert restored(ledger, private("central"), rounds=0) == 0
    assert ledger.epsilon(1e-5) == 0


def test_charge_that_nothing_bounds_is_refused() -> None:
    with pytest.raises(RefusedByPolicy, match=r"names no privacy\.noise_multiplier"):
        restored(VaultLedger(Store()), private("central", noise_multiplier=None), rounds=1)
    with pytest.raises(RefusedByPolicy, match="noise of a cohort of 20 is not bounded if 20"):
        restored(VaultLedger(Store(), corrupt=20), private("distributed"), rounds=1)
