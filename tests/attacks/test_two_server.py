"""The two-server mode against a server that does anything, and against a helper that does.

One of the two must be honest: the control shows that both together read everyone.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from fedoppu.client.jobs import LocalUpdate
from fedoppu.client.policy import ClientPolicy
from fedoppu.client.release import release
from fedoppu.common.config import FederationConfig
from fedoppu.common.errors import ProtocolError, RefusedByPolicy
from fedoppu.common.masking import add_masks
from fedoppu.common.messages import SealedTraining
from fedoppu.common.rounds import RoundOpened, RoundPlan, Words
from fedoppu.common.shared_adapter import initial_shared, sent_down
from fedoppu.common.signing import Identity
from fedoppu.common.two_server import (
    MaskSum,
    MaskSumRequest,
    SealedClaim,
    SealedUpdate,
    hash_words,
    seal_info,
    seed_mask,
)
from fedoppu.server.helper import HelperPolicy, HelperSecrets, _Opener
from tests.attacks.attacker import SIMULATION, less, same
from tests.attacks.devices import Device, devices, plan_for, update_of
from tests.attacks.switches import without
from tests.fake_federation import SPEC
from tests.integration.secagg_harness import HashKeys
from tests.integration.two_server_harness import TwoServers, config_with, resign

VICTIM = 4
Learned = tuple[Words, Words]


def unmasked(words: Words, secrets: HelperSecrets, update: SealedUpdate, plan: RoundPlan) -> Words:
    """Words without the mask of a seed that these secrets open."""
    info = seal_info(plan.context, update.member)
    seed = _Opener(secrets.seal).open(update.sealed, info)
    assert seed is not None
    bare = words.copy()
    add_masks(bare, [less(seed_mask(seed, plan.context, update.member))])
    return bare


def test_server_and_helper_together_read_everyone() -> None:
    """The trust assumption of this mode, shown."""
    two = TwoServers()
    update = two.update(VICTIM)
    assert same(unmasked(update.words, two.secrets, update, two.plan), two.words(VICTIM))
    assert not same(update.words, two.words(VICTIM))


# --- a server against the helper -----------------------------------------------------------------


def ask_twice() -> Learned:
    """Masks of everyone, then of everyone but the victim."""
    two = TwoServers()
    first = two.run(range(5))
    second = two.run(range(4))
    return first.words - second.words, two.words(VICTIM)


def test_helper_that_is_asked_twice() -> None:
    with pytest.raises(ProtocolError, match="round 1 was answered for another set"):
        ask_twice()
    with without("one set a round"):
        assert same(*ask_twice())


def two_attempts_at_the_helper(**second: str | int) -> Learned:
    """The same as another attempt, as another run, or as another round with one model."""
    two = TwoServers()
    plan = replace(two.plan, **second)  # type: ignore[arg-type]
    first, other = two.run(range(5)), two.run(range(4), plan)
    return first.words - other.words, two.words(VICTIM)


@pytest.mark.parametrize("second", [{"attempt": 1}, {"run_id": "bb" * 16}, {"round": 2}])
def test_helper_answers_once_for_a_round_and_for_a_model(second: dict[str, str | int]) -> None:
    with pytest.raises(ProtocolError, match="was answered for another set"):
        two_attempts_at_the_helper(**second)
    with without("one set a round"):
        assert same(*two_attempts_at_the_helper(**second))


def small_set() -> Learned:
    """The victim, and two members of the server's."""
    two = TwoServers(policy=HelperPolicy(floor=3, corrupt=2))
    ready = two.run((0, 1, VICTIM), replace(two.plan, min_cohort=2))
    return ready.words - two.plain_sum((0, 1)), two.words(VICTIM)


def test_set_below_the_helpers_floor() -> None:
    with pytest.raises(RefusedByPolicy, match=r"set of 3 .* this helper takes no fewer than 5"):
        small_set()
    with without("helper's floor"):
        assert same(*small_set())


def made_up_members() -> Learned:
    """Claims in the names of members that did not answer, with seeds that the server chose."""
    two, forger = TwoServers(), TwoServers()
    forger.people = [Identity(member, b"\x07" * 32) for member in range(5)]
    forged = [forger.update(member) for member in range(4)]
    victim, plan = two.update(VICTIM), two.plan
    claims = tuple(update.claim() for update in (*forged, victim))
    learned = victim.words - two.helper.answer(MaskSumRequest(plan, claims)).words
    for update in forged:  # what the server knows of the sum of the masks
        learned += update.words - two.words(update.member)
    return learned, two.words(VICTIM)


def test_claims_of_members_that_did_not_answer() -> None:
    with pytest.raises(ProtocolError, match="member 0 did not sign this claim for this plan"):
        made_up_members()
    with without("signed claims"):
        assert same(*made_up_members())


def move_the_seed() -> Learned | None:
    """In the next round two members of the server's hand in the victim's sealed seed as their own.

    All others send what they sent before. With s the sum of their words, v the victim's and m its
    mask, the server has s + v, v + m and s - 2 m, and so m.
    """
    two, spies, rest = TwoServers(n=6), (3, 5), (0, 1, 2)
    victim = two.update(VICTIM)
    with_victim = two.run((*rest, VICTIM)).words
    plan = two.plan_of(2)
    copied = [replace(two.update(spy, plan), sealed=victim.sealed) for spy in spies]
    copied = [resign(update, two.people[update.member], plan) for update in copied]
    honest = [two.update(member, plan) for member in rest]
    claims = sorted((u.claim() for u in (*honest, *copied)), key=lambda claim: claim.member)
    answer = two.helper.answer(MaskSumRequest(plan, tuple(claims)))
    if answer.unsealed:
        assert answer.unsealed == spies
        return None
    without_masks = sum((update.words for update in honest), np.zeros_like(victim.words))
    mask = with_victim - (without_masks - answer.words) - victim.words
    return victim.words - mask, two.words(VICTIM)


def test_sealed_seed_that_is_handed_in_by_another_or_in_another_round() -> None:
    assert move_the_seed() is None
    with without("seed is bound"):
        moved = move_the_seed()
    assert moved is not None
    assert same(*moved)


# --- a server against a member -------------------------------------------------------------------

MINE = HelperSecrets.make(HashKeys("the server's own").secret, hybrid=False)
PINNED = config_with(HelperSecrets.make(HashKeys("helper").secret, hybrid=False).public())


def sealed_plan(members: list[Device], config: FederationConfig, **changes: object) -> RoundPlan:
    shape = {"neighbours": 1, "threshold": 1, **changes}
    return plan_for(members, config=config, **shape)


def another_helper(policy: ClientPolicy, *, met: bool) -> tuple[Words, Words]:
    """The victim is sent a config with a helper's key whose other half the server has."""
    members = devices(5, policy=policy)
    victim, config = members[VICTIM], config_with(MINE.public())
    if met:  # it took part before, with the federation's config
        victim.ask("train.sealed", request(sealed_plan(members, PINNED), PINNED))
    plan = sealed_plan(members, config, round=2)
    sent = victim.ask("train.sealed", request(plan, config))
    assert isinstance(sent, SealedUpdate)
    update = LocalUpdate(plan.context, update_of(victim, plan), plan.max_weight, None)
    return unmasked(sent.words, MINE, sent, plan), release(update, plan, victim.dither)


def request(plan: RoundPlan, config: FederationConfig) -> SealedTraining:
    adapter = initial_shared(SPEC, config.public_seed)
    model = SPEC.flatten(adapter.tensors, sent_down(config.shared.aggregation))
    return SealedTraining(RoundOpened(plan), config.canonical(), model)


def test_helper_of_the_servers_own() -> None:
    """Whoever met the federation has its config; a newcomer has what its owner consented to."""
    open_, consented = SIMULATION, replace(SIMULATION, config_hash=PINNED.hash().hex())
    with pytest.raises(RefusedByPolicy, match=r"the server.s config .* is not .*, which this"):
        another_helper(replace(open_, same_model=True), met=True)
    with pytest.raises(RefusedByPolicy, match="the owner consented to"):
        another_helper(consented, met=False)
    with without("pinned config"):
        assert same(*another_helper(consented, met=False))
    assert same(*another_helper(open_, met=False))  # who takes the first config that comes


def newcomer(policy: ClientPolicy) -> tuple[Words, Words]:
    """The first config that a device of a graph federation gets is one with the server's helper."""
    members = devices(30, policy=policy)
    config, victim = config_with(MINE.public()), members[VICTIM]
    plan = sealed_plan(members, config, min_cohort=28, max_drops=2)
    sent = victim.ask("train.sealed", request(plan, config))
    assert isinstance(sent, SealedUpdate)
    update = LocalUpdate(plan.context, update_of(victim, plan), plan.max_weight, None)
    return unmasked(sent.words, MINE, sent, plan), release(update, plan, victim.dither)


def test_newcomer_whose_owner_consented_to_one_config_takes_no_helper_of_the_servers() -> None:
    consented = replace(ClientPolicy.for_roster(30), config_hash=PINNED.hash().hex())
    with pytest.raises(RefusedByPolicy, match="the owner consented to"):
        newcomer(consented)
    with without("pinned config"):
        assert same(*newcomer(consented))


def test_newcomer_takes_no_helper_that_its_owner_did_not_consent_to() -> None:
    with pytest.raises(RefusedByPolicy, match="consented to no config"):
        newcomer(ClientPolicy.for_roster(30))


def send_twice() -> tuple[Words, Words]:
    """To have sent a masked vector is to have unmasked: with what helper, nobody can tell."""
    members = devices(5)
    plan = sealed_plan(members, PINNED)
    sent = [
        members[VICTIM].ask("train.sealed", request(replace(plan, attempt=attempt), PINNED))
        for attempt in range(2)
    ]
    first, second = sent
    assert isinstance(first, SealedUpdate)
    assert isinstance(second, SealedUpdate)
    return first.words, second.words


def test_masked_vector_that_is_asked_for_again() -> None:
    with pytest.raises(RefusedByPolicy, match="round 1 was answered at attempt 0"):
        send_twice()
    with without("memory"):
        first, second = send_twice()
    assert not same(first, second)


# --- a helper against the server and the members -------------------------------------------------


def single_out() -> Learned:
    """The helper says that the seeds of all but the victim are bad."""
    two = TwoServers()
    server = two.asking(range(5))
    plan, victim = two.plan, two.update(VICTIM)
    mask = victim.words - two.words(VICTIM)
    answer = MaskSum(plan.context, (VICTIM,), (0, 1, 2, 3), mask, b"")
    return server.unmask(two.resigned(answer)).words, two.words(VICTIM)


def test_helper_that_has_the_server_publish_one_member() -> None:
    with pytest.raises(ProtocolError, match="the helper answered for 1 members, the plan's min"):
        single_out()
    with without("answers of the helper"):
        assert same(*single_out())


def change_on_the_way() -> Learned:
    """Somebody between helper and server changes the sum of the masks."""
    two = TwoServers()
    server = two.asking(range(5))
    answer = two.helper.answer(server.request())
    wrong = replace(answer, words=answer.words + np.uint32(1))
    return server.unmask(wrong).words, two.plain_sum(range(5))


def test_mask_sum_that_was_changed_on_the_way() -> None:
    with pytest.raises(ProtocolError, match="not signed by the helper that the config pins"):
        change_on_the_way()
    with without("signed mask sums"):
        assert not same(*change_on_the_way())


def guess(candidates: Sequence[Words]) -> list[int]:
    """The helper, who knows the victim's mask, tries what its words may be against their hash."""
    two = TwoServers()
    claim: SealedClaim = two.update(VICTIM).claim()
    seed = _Opener(two.secrets.seal).open(claim.sealed, seal_info(two.plan.context, VICTIM))
    assert seed is not None
    found = []
    for number, words in enumerate(candidates):
        masked = words.copy()
        add_masks(masked, [seed_mask(seed, two.plan.context, VICTIM)])
        if hash_words(b"", masked) == claim.words_hash:
            found.append(number)
    return found


def test_helper_that_guesses() -> None:
    true = TwoServers().words(VICTIM)
    candidates = [np.zeros_like(true), true + np.uint32(1), true]
    assert guess(candidates) == []
    with without("salted hash"):
        assert guess(candidates) == [2]
