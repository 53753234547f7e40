"""A client's one message in the two-server mode."""

from dataclasses import replace

import numpy as np
import pytest

from fedoppu.client.policy import ClientPolicy, LastRound
from fedoppu.client.secagg import OsKeySource
from fedoppu.client.two_server import require_sealed_plan, seal_update
from fedoppu.common.errors import ProtocolError, RefusedByPolicy
from fedoppu.common.masking import add_masks
from fedoppu.common.signing import verify
from fedoppu.common.two_server import HelperKeys, claim_bytes, seal_info, seed_mask
from tests.integration.two_server_harness import TwoServers

LAST = LastRound("", 0, -1, False, value_range=0.5)


@pytest.mark.parametrize("narrow", [False, True])
def test_words_are_masked_in_place_with_the_sealed_seeds_stream(narrow: bool) -> None:
    made = TwoServers(narrow=narrow)
    words = made.words(2)
    update = made.update(2)
    seed = made.helper._keys.open(update.sealed, seal_info(made.plan.context, 2))
    assert seed is not None
    add_masks(words, [seed_mask(seed, made.plan.context, 2)])
    np.testing.assert_array_equal(update.words, words)


def test_no_clear_copy_is_left() -> None:
    made = TwoServers()
    words = made.words(2)
    update = seal_update(words, made.plan, made.people[2], helper=made.keys, keys=OsKeySource())
    assert update.words is words
    assert (words != made.words(2)).any()


def test_seed_is_overwritten_when_it_is_sealed(monkeypatch: pytest.MonkeyPatch) -> None:
    made, seen = TwoServers(), []
    seal = HelperKeys.seal_seed

    def watched(keys: HelperKeys, seed: bytearray, context: bytes, member: int) -> bytes:
        assert any(seed)
        seen.append(seed)
        return seal(keys, seed, context, member)

    monkeypatch.setattr(HelperKeys, "seal_seed", watched)
    made.update(2)
    assert seen == [bytes(32)]


def test_signature_is_the_members_over_words_and_seed() -> None:
    made = TwoServers()
    update = made.update(2)
    message = claim_bytes(made.plan.context, update.claim())
    assert verify(made.roster.identity(2), update.signature, message)
    swapped = replace(update, sealed=made.update(1).sealed).claim()
    assert not verify(
        made.roster.identity(2), update.signature, claim_bytes(made.plan.context, swapped)
    )


def test_attempts_share_no_seed_and_no_salt() -> None:
    made = TwoServers()
    first, second = made.update(2), made.update(2, made.plan_of(attempt=1))
    assert first.salt != second.salt
    assert (first.words != second.words).any()


def test_seed_is_new_at_every_call_with_the_systems_keys() -> None:
    made = TwoServers()
    sent = [
        seal_update(made.words(2), made.plan, made.people[2], helper=made.keys, keys=OsKeySource())
        for _ in range(2)
    ]
    assert sent[0].salt != sent[1].salt
    assert (sent[0].words != sent[1].words).any()


@pytest.mark.parametrize("hybrid", [False, True])
def test_helper_key_of_another_exchange_than_the_plans_is_refused(hybrid: bool) -> None:
    made, other = TwoServers(hybrid=hybrid), TwoServers(hybrid=not hybrid)
    with pytest.raises(ProtocolError, match=f"the plan's hybrid is {hybrid}, the helper's key is"):
        made.update(2, keys=other.keys)


# --- the plan -------------------------------------------------------------------------------------


def test_plan_of_the_federation_is_taken() -> None:
    require_sealed_plan(TwoServers().plan, ClientPolicy.for_simulation(), LAST)


def test_floor_holds_for_the_least_set_that_the_helper_may_take() -> None:
    made = TwoServers(n=40)
    policy = ClientPolicy(floor=20, corrupt=4, max_drop=0.5, config_hash="ab")
    assert made.plan.min_cohort == 20
    with pytest.raises(RefusedByPolicy, match="a helper's set of 20 has 16 honest members"):
        require_sealed_plan(made.plan, policy, LAST)
    require_sealed_plan(replace(made.plan, min_cohort=24, max_drops=16), policy, LAST)


def test_more_drops_than_the_policy_allows_are_refused() -> None:
    made = TwoServers(n=40)
    policy = ClientPolicy(floor=10, corrupt=1, max_drop=0.3, config_hash="ab")
    with pytest.raises(RefusedByPolicy, match=r"20 of the 40 members .* this client allows 12"):
        require_sealed_plan(made.plan, policy, LAST)
    require_sealed_plan(replace(made.plan, min_cohort=28, max_drops=12), policy, LAST)


def test_range_may_not_move_too_far() -> None:
    plan = replace(TwoServers().plan, value_range=1e6)
    with pytest.raises(RefusedByPolicy, match="the plan's value_range is"):
        require_sealed_plan(plan, ClientPolicy.for_simulation(), LAST)


def test_round_that_was_answered_is_not_taken_again() -> None:
    made = TwoServers()
    last = LastRound.of(made.plan, answered=True)
    with pytest.raises(RefusedByPolicy, match="round 1 was answered at attempt 0"):
        require_sealed_plan(made.plan_of(attempt=1), ClientPolicy.for_simulation(), last)


@pytest.mark.parametrize("changes", [{"neighbours": 4}, {"threshold": 3}])
def test_plan_that_speaks_of_a_graph_is_refused(changes: dict[str, int]) -> None:
    plan = replace(TwoServers().plan, **changes)  # type: ignore[arg-type]
    with pytest.raises(ProtocolError, match="a two-server plan has neighbours and threshold 1"):
        require_sealed_plan(plan, ClientPolicy.for_simulation(), LAST)


def test_plan_whose_sum_could_overflow_is_refused() -> None:
    plan = replace(TwoServers().plan, word_bits=16, level_bits=14)
    with pytest.raises(RefusedByPolicy, match="overflow 16-bit words"):
        require_sealed_plan(plan, ClientPolicy.for_simulation(), LAST)
