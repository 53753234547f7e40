"""How few may restore a secret, and who is said to have dropped: numbers that a server would pick."""

from dataclasses import replace
from itertools import count

import pytest

from fedoppu.client.policy import ClientPolicy
from fedoppu.client.secagg import Phase
from fedoppu.common.config import ThresholdSettings
from fedoppu.common.errors import ProtocolError, RefusedByPolicy
from fedoppu.common.graph import Graph
from fedoppu.common.rounds import Advert, Words
from fedoppu.common.secret_sharing import Share, restore
from fedoppu.common.signing import hash_cohort
from tests.attacks.attacker import (
    Rogue,
    World,
    attackers_key,
    forged_advert,
    same,
    secret_of,
    strip,
    total,
)
from tests.attacks.switches import without
from tests.integration.secagg_harness import unevenness

ALL = (0, 1, 2, 3, 4)


# --- t and k -------------------------------------------------------------------------------------


def low_threshold() -> tuple[Words | None, Words]:
    """With t = 2, the server's two members restore both secrets of the victim by themselves."""
    policy = ClientPolicy(floor=4, corrupt=2)
    world, victim, plan = World(8, policy=policy), 0, World(8).plan(threshold=2)
    rogue = Rogue.over(world, plan=plan).until_masked()
    packages = {spy: bytes(rogue.clients[spy]._state.held[victim]) for spy in (6, 7)}
    half = len(packages[6]) // 2
    seed = restore([Share(spy, package[:half]) for spy, package in packages.items()], 2)
    key = restore([Share(spy, package[half:]) for spy, package in packages.items()], 2)
    dealers = range(8)
    found = strip(rogue.view(victim), rogue.masked[victim], dealers, seed=seed, own_key=key)
    return found, secret_of(victim, plan)


def test_threshold_that_the_server_sets_too_low() -> None:
    match = "threshold is 2; with 8 holders and 2 corrupt members it must be between 6 and 8"
    with pytest.raises(RefusedByPolicy, match=match):
        low_threshold()
    with without("thresholds"):
        assert same(*low_threshold())


def surround(neighbours: int) -> tuple[Words | None, Words]:
    """The server tries adverts of its own members until both neighbours of the victim are its own.

    The graph comes from the cohort hash, so each set of adverts is another draw.
    """
    n, spies, victim = 66, range(54, 66), 0
    policy = ClientPolicy(floor=20, corrupt=12, max_drop=0.3)
    world = World(n, policy=policy)
    plan = World(n).plan(neighbours=neighbours, threshold=neighbours, min_cohort=40)
    rogue = Rogue.over(world, [*range(54)], plan=plan)
    rogue.open()
    for spy in spies:
        rogue.adverts[spy] = forged_advert(plan, spy, signer=world.people[spy])
    keys = _search(rogue, victim, spy=65)
    rogue.share()
    everyone = range(n)
    rogue.mask(everyone)
    rogue.agree(everyone, range(54))
    rogue.unmask([victim])
    return rogue.bare(victim, peer_keys=keys), secret_of(victim, plan)


def _search(rogue: Rogue, victim: int, *, spy: int) -> dict[int, bytes]:
    """Changes one advert of the server's until the victim has its members as neighbours."""
    plan, identity = rogue.plan, rogue.world.people[spy]
    for trial in count():
        if trial == 2000:
            break
        rogue.adverts[spy] = forged_advert(
            plan, spy, signer=identity, seed_commitment=trial.to_bytes(32, "big")
        )
        ring = Graph(hash_cohort(plan.context, _sorted(rogue)), rogue.adverts, plan.neighbours)
        around = ring.neighbours(victim)
        if all(member >= 54 for member in around):
            return {member: attackers_key(member) for member in around}
    raise AssertionError("the victim was never surrounded")


def _sorted(rogue: Rogue) -> list[Advert]:
    return [rogue.adverts[member] for member in sorted(rogue.adverts)]


def test_too_few_neighbours() -> None:
    match = r"threshold is 2; with 2 holders and 12 corrupt members it must be between"
    with pytest.raises(RefusedByPolicy, match=match):
        surround(2)
    with without("thresholds"):
        assert same(*surround(2))


def test_neighbours_that_the_calculator_gives_are_not_surrounded_by_a_search() -> None:
    settings = ThresholdSettings(floor=20, corrupt=12, max_drop=0.1)
    plan = World(100, settings=settings).plan()
    rogue = Rogue.over(World(100, settings=settings), [], plan=plan)
    people = rogue.world.people
    rogue.adverts = {m: forged_advert(plan, m, signer=people[m]) for m in range(100)}
    most = 0
    for trial in range(60):
        rogue.adverts[99] = replace(rogue.adverts[99], seed_commitment=trial.to_bytes(32, "big"))
        cohort = hash_cohort(plan.context, _sorted(rogue))
        around = Graph(cohort, range(100), plan.neighbours).neighbours(0)
        most = max(most, sum(member >= 88 for member in around))
    assert plan.threshold > (plan.neighbours + most) / 2


# --- survivor sets -------------------------------------------------------------------------------


def split_views() -> tuple[Words | None, Words]:
    """The victim hears that it survived and the others that it dropped: both its secrets."""
    victim = 4
    rogue = Rogue.over(World(5)).until_masked()
    rogue.agree(ALL, [victim])
    rogue.agree((0, 1, 2, 3))
    rogue.unmask(ALL)
    return rogue.bare(victim), secret_of(victim, rogue.plan)


def test_split_survivor_views() -> None:
    with pytest.raises(ProtocolError, match="1 members of 5 signed this survivor set, 3 must"):
        split_views()
    with without("quorum"):
        assert same(*split_views())


def few_survivors() -> tuple[Words | None, Words]:
    """Of a cohort of six, four are said to have survived: a sum over two fewer than was agreed."""
    world = World(6, policy=ClientPolicy(floor=6, corrupt=0, max_drop=0.5))
    plan = world.plan(max_drops=3, threshold=4, min_cohort=4)
    rogue = Rogue.over(world, plan=plan).until_masked().finish((0, 1, 2, 3))
    return rogue.sum_over((0, 1, 2, 3)), total((0, 1, 2, 3), plan)


def test_survivors_below_the_floor() -> None:
    with pytest.raises(RefusedByPolicy, match=r"survivor set of 4 has 4 honest .* floor is 6"):
        few_survivors()
    with without("floor"):
        assert same(*few_survivors())


@pytest.mark.parametrize("claimed", [4, 1])
def test_more_drops_than_the_plan_or_the_owner_allows(claimed: int) -> None:
    """Four of ten are missing. The owner allows three, or the plan only one."""
    world = World(10, policy=ClientPolicy(floor=4, corrupt=0, max_drop=0.3))
    plan = world.plan(max_drops=claimed, min_cohort=4)
    chosen = tuple(range(4, 10))

    def attack() -> tuple[Words | None, Words]:
        rogue = Rogue.over(world, plan=plan).until_masked().finish(chosen)
        return rogue.sum_over(chosen), total(chosen, plan)

    most = min(claimed, 3)
    with pytest.raises(RefusedByPolicy, match=f"4 of 10 members are missing, at most {most} may"):
        attack()
    with without("drops"):
        assert same(*attack())


def cut_ring() -> tuple[Words | None, Words, int]:
    """Ten chosen drops of seventy cut five members off the ring: a sum over the five."""
    world = World(70, num_params=2)
    plan = world.plan(neighbours=10, threshold=6, min_cohort=50, max_drops=20)
    rogue = Rogue.over(world, plan=plan)
    rogue.until_masked()
    ring = rogue.view(0).graph._ring
    arc, gaps = ring[5:10], {*ring[:5], *ring[10:15]}
    rogue.finish([member for member in range(70) if member not in gaps])
    return rogue.sum_over(arc), total(arc, plan), len(arc)


def test_drops_that_cut_the_graph_in_two() -> None:
    with pytest.raises(RefusedByPolicy, match="live holders of its shares"):
        cut_ring()
    with without("live holders"):
        learned, true, size = cut_ring()
        assert same(learned, true)
        assert size < 60  # of sixty survivors, whose sum is all that anyone agreed to


# --- the late ------------------------------------------------------------------------------------


def late_client(num_params: int) -> tuple[Words | None, Words, Words]:
    """The victim's vector came, but the server says that it dropped and has its mask key restored.

    Returns:
        The vector without its pairwise masks, the victim's words, and the vector that was sent.
    """
    victim = 4
    rogue = Rogue.over(World(5, num_params=num_params)).until_masked()
    rogue.agree((0, 1, 2, 3))
    rogue.unmask((0, 1, 2, 3))
    rogue.tell(victim, rogue.proposal(victim, (0, 1, 2, 3)))
    assert rogue.clients[victim].phase is Phase.EXCLUDED
    with pytest.raises(ProtocolError, match="does not belong after excluded"):
        rogue.unmask([victim])
    key = rogue.mask_key(victim)
    assert key is not None
    seed = bytes(32)  # not known: stripped of a seed that is none, only pairwise masks go
    bare = strip(rogue.view(victim), rogue.masked[victim], ALL, seed=seed, own_key=key)
    return bare, secret_of(victim, rogue.plan), rogue.masked[victim].words


def test_late_client_stays_hidden() -> None:
    learned, true, _ = late_client(20_000)
    assert learned is not None
    assert not same(learned, true)
    assert unevenness(learned) < 5  # the self mask is on it: as good as random
    assert unevenness(true) > 100
    with without("self mask"):
        learned, true, _ = late_client(64)
        assert same(learned, true)


def ask_outside() -> tuple[Words | None, Words]:
    """Everybody else has unmasked without the victim; then the victim is asked as well."""
    victim, left = 4, (0, 1, 2, 3)
    rogue = Rogue.over(World(5)).until_masked().finish(left)
    rogue.tell(victim, rogue.proposal(victim, left))
    rogue.unmask([victim], {m: signed for m, signed in rogue.signatures.items() if m in left})
    return rogue.bare(victim), secret_of(victim, rogue.plan)


def test_client_outside_the_survivor_set_never_unmasks() -> None:
    with pytest.raises(ProtocolError, match="UnmaskRequested does not belong after excluded"):
        ask_outside()
    with without("silence of the excluded"):
        assert same(*ask_outside())
