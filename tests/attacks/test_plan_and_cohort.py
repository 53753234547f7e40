"""Who is in a round, and on what terms: adverts, plans, cohorts, the roster."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from fedoppu.client.jobs import LocalUpdate
from fedoppu.client.policy import ClientPolicy, LastRound
from fedoppu.client.release import release
from fedoppu.client.secagg import Pins, SecAggClient
from fedoppu.common.adapters import Adapter
from fedoppu.common.config import ThresholdSettings
from fedoppu.common.errors import ProtocolError, RefusedByPolicy, UsageError
from fedoppu.common.masking import add_masks, self_mask
from fedoppu.common.quantization import VectorLayout
from fedoppu.common.randomness import Randomness
from fedoppu.common.roster import Member, Roster
from fedoppu.common.rounds import CohortFixed, RoundOpened, RoundPlan, Words
from fedoppu.common.signing import Identity, survivors_bytes
from tests.attacks.attacker import (
    SIMULATION,
    Rogue,
    World,
    attackers_key,
    forged_advert,
    less,
    same,
    secret_of,
    total,
)
from tests.attacks.devices import Script, devices, plan_for, usual_update
from tests.attacks.switches import without
from tests.fake_federation import CONFIG
from tests.integration.secagg_harness import CONFIG_HASH, HashKeys, identities

# --- adverts -------------------------------------------------------------------------------------


def substitute_keys() -> tuple[Words | None, Words]:
    """To its victim the server gives its own keys in the names of all others."""
    world, victim = World(4), 3
    rogue = Rogue.over(world, [victim])
    rogue.open()
    fakes = [forged_advert(rogue.plan, m, signer=world.people[victim]) for m in range(3)]
    rogue.tell(victim, CohortFixed((*fakes, rogue.adverts[victim])))
    rogue.deliver(victim, range(4))
    rogue.train(victim)
    rogue.agree(range(4), [victim])
    rogue.unmask([victim], dict.fromkeys(range(4), bytes(64)))
    keys = {member: attackers_key(member) for member in range(3)}
    return rogue.bare(victim, peer_keys=keys), secret_of(victim, rogue.plan)


def test_key_substitution() -> None:
    with pytest.raises(RefusedByPolicy, match="a cohort of 1 has 1 honest members"):
        substitute_keys()
    with without("signatures"):
        assert same(*substitute_keys())


def replay_adverts() -> tuple[Words | None, Words]:
    """Members that drop have their keys restored, rightly; later their old adverts come again."""
    world, victim = World(4), 3
    last: dict[int, LastRound | None] = {}
    adverts, keys, signed = {}, {}, {}
    for round_, dropped in enumerate((None, 0, 1, 2), start=1):
        rogue = Rogue.over(world, plan=world.plan(round=round_), last=last).until_masked()
        rogue.finish([member for member in range(4) if member != dropped])
        last = {member: client.last_round for member, client in rogue.clients.items()}
        if dropped is None:
            signed = rogue.signatures  # over "all survived"
        else:
            adverts[dropped], keys[dropped] = rogue.adverts[dropped], rogue.mask_key(dropped)
    rogue = Rogue.over(world, [victim], plan=world.plan(round=5), last=last)
    rogue.open()
    rogue.tell(victim, CohortFixed((*adverts.values(), rogue.adverts[victim])))
    rogue.deliver(victim, range(4))
    rogue.train(victim)
    rogue.agree(range(4), [victim])
    rogue.unmask([victim], signed)
    known = {member: key for member, key in keys.items() if key is not None}
    return rogue.bare(victim, peer_keys=known), secret_of(victim, rogue.plan)


def test_advert_replay_from_another_round() -> None:
    with pytest.raises(RefusedByPolicy, match="a cohort of 1 has 1 honest members"):
        replay_adverts()
    with without("context"):
        assert same(*replay_adverts())


def test_advert_of_another_config_is_no_advert_of_this_one() -> None:
    """The same keys under two configs: each context has signatures of its own."""
    world = World(4)
    here, there = world.plan(), world.plan(config_hash="ee" * 32)

    def cohort_of(plan: RoundPlan) -> int:
        rogue = Rogue.over(world, plan=here)
        rogue.open()
        identity = world.people[3]
        rogue.adverts[3] = forged_advert(plan, 3, signer=identity)
        rogue.tell(0, CohortFixed(tuple(rogue.adverts[m] for m in range(4))))
        return len(rogue.view(0))

    assert cohort_of(here) == 4  # colluding member 3 may sign what it likes for this plan
    assert cohort_of(there) == 3
    with without("context"):
        assert cohort_of(there) == 4


def impersonate(careless: bool) -> tuple[Words | None, Words]:
    """Three of five are the server's; it also forges the advert of the second honest member.

    Then the first honest one masks with nobody but the server. All five signatures are needed, so
    it is the impersonated member that can stop it, by looking for its own advert.
    """
    policy = ClientPolicy(floor=2, corrupt=3, max_drop=0.5)
    settings = ThresholdSettings(floor=2, corrupt=3, max_drop=0.0)
    world, victim, robbed = World(5, settings=settings, policy=policy), 3, 4
    rogue = Rogue.over(world)
    rogue.open()
    keys = {m: bytes(rogue.clients[m]._state.mask) for m in range(3)}
    forged = forged_advert(rogue.plan, robbed, signer=world.people[0])
    if careless:  # a client that does not look: any advert in its name is its own to it
        client = rogue.clients[robbed]
        client._state = replace(client._state, own=forged)
    rogue.share([*(rogue.adverts[m] for m in range(4)), forged])
    rogue.mask()
    rogue.finish(range(5))
    keys[robbed] = attackers_key(robbed)
    return rogue.bare(victim, peer_keys=keys), secret_of(victim, rogue.plan)


def test_own_advert_must_be_in_the_cohort() -> None:
    with without("signed adverts"):
        with pytest.raises(ProtocolError, match="does not hold the advert that member 4 sent"):
            impersonate(careless=False)
        assert same(*impersonate(careless=True))


def copy_keys() -> tuple[Words | None, Words]:
    """Members below the victim copy the keys of those above it: its pairwise masks cancel."""
    policy = ClientPolicy(floor=2, corrupt=2, max_drop=0.5)
    settings = ThresholdSettings(floor=2, corrupt=2, max_drop=0.0)
    world, victim = World(5, settings=settings, policy=policy), 2
    rogue = Rogue.over(world, [2, 3, 4])
    rogue.open()
    for copier, copied in ((0, 3), (1, 4)):
        key = rogue.adverts[copied].mask_key
        identity = world.people[copier]
        rogue.adverts[copier] = forged_advert(rogue.plan, copier, signer=identity, mask_key=key)
    rogue.share()
    for member in (2, 3, 4):
        rogue.deliver(member, range(5))
        rogue.train(member)
    everyone = range(5)
    rogue.agree(everyone, [2, 3, 4])
    message = survivors_bytes(rogue.view(victim).scope, everyone, everyone)
    rogue.signatures |= {m: world.people[m].sign(message) for m in (0, 1)}
    rogue.unmask([victim])
    words, seed = rogue.masked[victim].words.copy(), rogue.replies[victim].own_seed
    add_masks(words, [less(self_mask(seed, rogue.view(victim).scope, victim))])
    return words, secret_of(victim, rogue.plan)


def test_duplicate_keys() -> None:
    with pytest.raises(RefusedByPolicy, match="a cohort of 3 has 1 honest members"):
        copy_keys()
    with without("unique keys"):
        assert not same(*copy_keys())  # the masks' keys name their two members as well
    with without("unique keys", "pair in mask"):
        assert same(*copy_keys())


def test_member_that_is_listed_twice() -> None:
    """Once or thrice, it counts once: it cannot fill a cohort up to the floor."""
    world = World(6, policy=ClientPolicy(floor=5, corrupt=0))
    rogue = Rogue.over(world, [0, 1])
    rogue.open()
    thrice = (rogue.adverts[0], rogue.adverts[1], rogue.adverts[1], rogue.adverts[1])
    with pytest.raises(ProtocolError, match="sorted and name each member once"):
        rogue.tell(0, CohortFixed((*thrice, rogue.adverts[1])))
    with without("sorted"), pytest.raises(RefusedByPolicy, match="a cohort of 2"):
        rogue.tell(0, CohortFixed((*thrice, rogue.adverts[1])))


# --- the plan ------------------------------------------------------------------------------------


def another_range(width: float) -> tuple[Words, Words]:
    """All but the victim get a range in which their updates vanish: the sum is the victim's."""
    world, victim = World(5, num_params=64), 2
    plan = world.plan()
    wide = replace(plan, value_range=plan.value_range * width)
    rogue, told = Rogue.over(world), {}
    for member in range(5):
        told[member] = plan if member == victim else wide
        rogue.tell(member, RoundOpened(told[member]))
    rogue.share()
    for member in range(5):
        rogue.deliver(member)
        rogue.train(member, released(member, told[member]))
    rogue.finish(range(5))
    learned = rogue.sum_over(range(5))
    assert learned is not None
    others = 4 * VectorLayout.of(plan).middle
    return learned[:64] - np.uint32(others), released(victim, plan)[:64]


def released(member: int, plan: RoundPlan) -> Words:
    vector = np.random.default_rng(member).normal(0, 0.05, plan.num_params).astype(np.float32)
    update = LocalUpdate(plan.context, vector, plan.max_weight, None)
    return release(update, plan, Randomness.from_seed(member))


def test_another_range_for_one_victim() -> None:
    with pytest.raises(RefusedByPolicy, match=r"(the cohort has|a cohort of) \d"):
        another_range(1e6)
    with without("range in context"):
        learned, true = another_range(1e6)
        assert np.abs(learned.astype(int) - true.astype(int)).max() <= 4  # of 65,535 levels
        learned, true = another_range(1.0)  # the control: one range for all hides it
        assert np.abs(learned.astype(int) - true.astype(int)).max() > 1000


def test_range_that_jumps_from_round_to_round() -> None:
    """A range that the server narrows at will shows each update at a scale of its choice."""
    world = World(4, num_params=64)
    plan = world.plan()
    last = LastRound.of(plan, answered=True)
    narrow = world.plan(round=2, value_range=plan.value_range / 1000)
    with pytest.raises(RefusedByPolicy, match=r"value_range is .* by a factor of at most"):
        world.client(0, last).receive(RoundOpened(narrow))
    with without("range change"):
        world.client(0, last).receive(RoundOpened(narrow))
    middle = VectorLayout.of(plan).middle
    usual, seen = released(0, plan)[:64].astype(int), released(0, narrow)[:64].astype(int)
    assert np.abs(usual - middle).max() < middle / 2
    assert (np.abs(seen - middle) == middle).mean() > 0.9  # a vote on each coordinate's sign


# --- the model -----------------------------------------------------------------------------------


def another_model() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """All but the victim train on a model that leaves them nothing to learn."""
    victim = 2

    def train(member: int, plan: RoundPlan, shared: Adapter) -> NDArray[np.float32]:
        if np.max(np.abs(shared.spec.flatten(shared.tensors))) > 1e6:
            return np.zeros(plan.num_params, np.float32)
        return usual_update(member, plan, shared)

    members = devices(5, train=train)
    plan = plan_for(members)
    script = Script(members, plan)
    crafted = np.full_like(script.model, 1e7)
    script.model_of = {member: crafted for member in range(5) if member != victim}
    return script.updates(), usual_update(victim, plan, members[victim].initial_shared(CONFIG))


def test_different_models_for_different_members() -> None:
    with pytest.raises(ProtocolError, match="a server may have sent another model to this client"):
        another_model()
    with without("model in plan"):
        learned, true = another_model()
    assert np.abs(learned - true).max() < 1e-3


# --- cohorts -------------------------------------------------------------------------------------


def private_list() -> tuple[Words | None, Words]:
    """The victim is shown a cohort of its own, whose honest members drop out of the public one.

    Their keys are restored in the public cohort, rightly; so the victim masks with known keys.
    """
    policy = ClientPolicy(floor=3, corrupt=2)
    settings = ThresholdSettings(floor=3, corrupt=2, max_drop=0.3)
    world, victim = World(9, settings=settings, policy=policy), 0
    plan = world.plan(7, min_cohort=5)
    public = Rogue.over(world, [1, 2, 3, 4, 5, 7, 8], plan=plan)
    public.open()
    helpers = {m: bytes(public.clients[m]._state.mask) for m in (7, 8)}
    public.share()
    public.mask()
    public.finish([3, 4, 5, 7, 8])
    keys = {member: public.mask_key(member) for member in (1, 2)}

    rogue = Rogue.over(world, [victim, 7, 8], plan=plan)
    rogue.open()
    rogue.adverts |= {member: public.adverts[member] for member in (1, 2)}
    rogue.share()
    shown = [0, 1, 2, 7, 8]
    rogue.mask(shown)
    rogue.agree(shown, [victim, 7, 8])
    rogue.unmask([victim])
    known = {member: key for member, key in (keys | helpers).items() if key is not None}
    return rogue.bare(victim, peer_keys=known), secret_of(victim, plan)


def test_private_cohort_list_for_one_victim() -> None:
    with pytest.raises(ProtocolError, match="3 members of 5 signed this survivor set, 4 must"):
        private_list()
    with without("corrupt in quorum"):
        assert same(*private_list())


def small_cohort() -> tuple[Words, Words]:
    """A cohort of the victim and three of the server's members."""
    world = World(30, policy=ClientPolicy(floor=20, corrupt=3))
    plan = world.plan(4, threshold=4, neighbours=3, min_cohort=4, max_drops=0)
    rogue = Rogue.over(world, [0, 1, 2, 3], plan=plan).until_masked().finish(range(4))
    learned = rogue.sum_over(range(4))
    assert learned is not None
    return learned - total([1, 2, 3], plan), secret_of(0, plan)


def test_cohort_below_the_clients_floor() -> None:
    with pytest.raises(RefusedByPolicy, match=r"a cohort of 4 has 1 honest .* floor is 20"):
        small_cohort()
    with without("floor"):
        assert same(*small_cohort())


def corrupt_of_the_roster() -> tuple[Words, Words]:
    """Of a roster of a hundred the server holds ten, and asks them all, and one more."""
    policy = replace(ClientPolicy.for_roster(100), floor=10)
    world = World(100, policy=policy)
    plan = world.plan(11, threshold=7)
    rogue = Rogue.over(world, range(11), plan=plan).until_masked().finish(range(11))
    learned = rogue.sum_over(range(11))
    assert learned is not None
    return learned - total(range(1, 11), plan), secret_of(0, plan)


def test_corruption_is_counted_in_the_roster() -> None:
    with pytest.raises(RefusedByPolicy, match="a cohort of 11 has 1 honest members if 10"):
        corrupt_of_the_roster()
    with without("corruption of the roster"):
        assert same(*corrupt_of_the_roster())


# --- the roster ----------------------------------------------------------------------------------


def sybil_people() -> tuple[Identity, ...]:
    """The victim, and as many others as the server likes to make up."""
    made_up = [Identity(i, hashlib.sha256(b"sybil %d" % i).digest()) for i in range(1, 24)]
    return (identities(1)[0], *made_up)


def sybils(pinned: World) -> tuple[Words, Words]:
    """A roster of the server's own making, in which the victim is the only real member."""
    theirs = replace(pinned, enrolled=sybil_people())
    plan = theirs.plan()
    rogue = Rogue.over(theirs, plan=plan)
    rogue.clients[0] = pinned.client(0)
    rogue.until_masked().finish(range(24))
    learned = rogue.sum_over(range(24))
    assert learned is not None
    return learned - total(range(1, 24), plan), secret_of(0, plan)


def test_sybils_fail_against_a_pinned_roster_and_win_where_the_server_enrols() -> None:
    """No rule helps whoever takes the roster from the server: that is the trust root."""
    settings = ThresholdSettings(floor=20, corrupt=2)
    world = World(24, settings=settings, policy=ClientPolicy(floor=20, corrupt=2))
    with pytest.raises(ProtocolError, match=r"the plan is for roster .* this client pins"):
        sybils(world)
    assert same(*sybils(replace(world, enrolled=sybil_people())))


def one_person_as_three() -> tuple[Words, Words]:
    """One member of the server's is enrolled under three numbers, to fill the cohort."""
    seed = hashlib.sha256(b"thrice").digest()
    people = (identities(1)[0], *(Identity(i, seed) for i in range(1, 4)))
    world = World(4, policy=ClientPolicy(floor=3, corrupt=1), enrolled=people)
    plan = world.plan(threshold=3)
    rogue = Rogue.over(world, plan=plan).until_masked().finish(range(4))
    learned = rogue.sum_over(range(4))
    assert learned is not None
    return learned - total([1, 2, 3], plan), secret_of(0, plan)


def test_duplicate_identities() -> None:
    with pytest.raises(UsageError, match="two roster members have one identity"):
        one_person_as_three()
    with without("unique identities"):
        assert same(*one_person_as_three())


def test_identity_of_another_under_ones_own_number() -> None:
    """A roster that has the server's key in the owner's place is refused before any message."""
    people = identities(4)
    members = (Member(0, b"\x01" * 32), *(person.enrolled for person in people[1:]))
    pins = Pins(Roster(members), CONFIG_HASH)
    with pytest.raises(ProtocolError, match="does not hold the identity key of member 0"):
        SecAggClient(people[0], pins, policy=SIMULATION, keys=HashKeys("own"))
