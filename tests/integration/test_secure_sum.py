"""The unmasked sum is the plain integer sum, or the round ends and nothing was revealed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedoppu.client.secagg import Phase
from fedoppu.common.config import ThresholdSettings
from fedoppu.common.errors import RoundAborted
from fedoppu.common.rounds import (
    Exchange,
    MaskedUpdate,
    Outgoing,
    StageEnded,
    UnmaskReply,
    UnmaskRequested,
    UpdateReady,
)
from fedoppu.server.secagg import End
from tests.integration.secagg_harness import Federation, unevenness

STAGES = list(Exchange)


def by_stage(drops: dict[int, Exchange]) -> dict[Exchange, frozenset[int]]:
    return {stage: frozenset(m for m, at in drops.items() if at is stage) for stage in STAGES}


def replies(federation: Federation) -> list[UnmaskReply]:
    return [event for event in federation.sent if isinstance(event, UnmaskReply)]


def assert_exact(federation: Federation) -> None:
    ready = federation.run()
    assert (ready.words == federation.plain_sum(ready.survivors)).all()
    assert ready.words.dtype == (np.uint16 if federation.narrow else np.uint32)
    assert ready.liars == {}
    before = (Exchange.KEYS, Exchange.SHARES, Exchange.MASKED)
    early = {member for stage in before for member in federation.drops.get(stage, ())}
    assert ready.survivors == tuple(m for m in range(federation.n) if m not in early)
    assert federation.server.stage is End.DONE
    assert_one_secret_of_each(federation)


def assert_one_secret_of_each(federation: Federation) -> None:
    """No owner's self seed and mask key are both among everything that clients revealed."""
    seeds = {owner for reply in replies(federation) for owner in reply.seed_shares}
    seeds |= {reply.member for reply in replies(federation) if reply.own_seed}
    keys = {owner for reply in replies(federation) for owner in reply.key_shares}
    assert not seeds & keys


@st.composite
def drop_patterns(
    draw: st.DrawFn, beyond: bool, least: int = 2, largest: int = 20
) -> tuple[int, dict[int, Exchange]]:
    """Cohort size, and who drops at which stage: within what t was computed for, or beyond it.

    Beyond, they drop before the survivor set is signed.
    """
    n = draw(st.integers(least, largest))
    most = Federation(n).plan.max_drops
    low, high = (most + 1, n) if beyond else (0, most)
    members = draw(st.lists(st.integers(0, n - 1), min_size=low, max_size=high, unique=True))
    stages = st.sampled_from(STAGES[:3] if beyond else STAGES)
    return n, {member: draw(stages) for member in members}


@given(pattern=drop_patterns(beyond=False), narrow=st.booleans(), reload=st.booleans())
@settings(max_examples=25, deadline=None)
def test_sum_is_exact_whoever_drops_within_the_plan(
    pattern: tuple[int, dict[int, Exchange]], narrow: bool, reload: bool
) -> None:
    n, drops = pattern
    assert_exact(Federation(n, narrow=narrow, reload=reload, drops=by_stage(drops)))


@given(pattern=drop_patterns(beyond=False), narrow=st.booleans(), reload=st.booleans())
@settings(max_examples=12, deadline=None)
def test_hybrid_sum_is_exact_whoever_drops_within_the_plan(
    pattern: tuple[int, dict[int, Exchange]], narrow: bool, reload: bool
) -> None:
    n, drops = pattern
    assert_exact(Federation(n, hybrid=True, narrow=narrow, reload=reload, drops=by_stage(drops)))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("member", [0, 3, 6])
@pytest.mark.parametrize("narrow", [False, True])
def test_hybrid_sum_is_exact_if_the_lowest_a_middle_or_the_highest_member_drops(
    stage: Exchange, member: int, narrow: bool
) -> None:
    drops = {stage: frozenset({member})}
    assert_exact(Federation(7, hybrid=True, narrow=narrow, reload=narrow, drops=drops))


@given(pattern=drop_patterns(beyond=True, largest=12), hybrid=st.booleans())
@settings(max_examples=30, deadline=None)
def test_beyond_the_plan_the_round_ends_before_anything_is_asked(
    pattern: tuple[int, dict[int, Exchange]], hybrid: bool
) -> None:
    n, drops = pattern
    federation = Federation(n, hybrid=hybrid, drops=by_stage(drops))
    with pytest.raises(RoundAborted, match="round 1 attempt 0 ended in"):
        federation.run()
    assert federation.server.stage is End.ABORTED
    assert not any(isinstance(sent.event, UnmaskRequested) for sent in federation.delivered)
    assert replies(federation) == []
    assert not federation.server._sum.any()
    assert federation.server.asked_to_unmask == ()


@pytest.mark.parametrize("stage", [Exchange.CONSISTENCY, Exchange.UNMASK])
def test_too_few_at_the_end_is_a_round_without_a_sum_that_is_given_up_for_good(
    stage: Exchange,
) -> None:
    federation = Federation(10, drops={stage: frozenset(range(5))})  # t = 6 of 10
    with pytest.raises(RoundAborted, match=f"ended in {stage.value}"):
        federation.run()
    assert federation.server._state.replies == {}
    assert not federation.server._sum.any()
    asked = () if stage is Exchange.CONSISTENCY else tuple(range(10))
    assert federation.server.asked_to_unmask == asked
    assert_one_secret_of_each(federation)


def spread(n: int, most: int) -> dict[Exchange, frozenset[int]]:
    """`most` drops in all, some at every stage."""
    chosen = np.random.default_rng(n).permutation(n)[:most]
    return {stage: frozenset(int(m) for m in chosen[i::5]) for i, stage in enumerate(STAGES)}


@pytest.mark.parametrize(("n", "share"), [(33, 0.3), (66, 0.1)])
@pytest.mark.parametrize("narrow", [False, True])
def test_sum_is_exact_in_larger_cohorts(n: int, share: float, narrow: bool) -> None:
    settings_ = ThresholdSettings(floor=2, corrupt=1, max_drop=share)
    federation = Federation(n, settings=settings_, narrow=narrow)
    federation.drops = spread(n, federation.plan.max_drops)
    assert_exact(federation)
    assert federation.plan.neighbours < n - 1 or n <= 64


@pytest.mark.slow
@given(pattern=drop_patterns(beyond=False, least=21, largest=100), narrow=st.booleans())
@settings(max_examples=12, deadline=None)
def test_sum_is_exact_in_any_cohort_up_to_a_hundred(
    pattern: tuple[int, dict[int, Exchange]], narrow: bool
) -> None:
    n, drops = pattern
    assert_exact(Federation(n, narrow=narrow, drops=by_stage(drops)))


@pytest.mark.slow
@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("n", [64, 65, 100])
def test_sum_is_exact_with_corrupt_members_assumed(n: int, narrow: bool, hybrid: bool) -> None:
    settings_ = ThresholdSettings(floor=2, corrupt=n // 10, max_drop=0.2)
    federation = Federation(n, settings=settings_, narrow=narrow, hybrid=hybrid)
    federation.drops = spread(n, federation.plan.max_drops)
    assert_exact(federation)


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("narrow", [False, True])
def test_masked_vectors_look_uniform_and_plain_ones_do_not(narrow: bool, hybrid: bool) -> None:
    federation = Federation(4, narrow=narrow, hybrid=hybrid, num_params=20_000)
    federation.run()
    masked = [event for event in federation.sent if isinstance(event, MaskedUpdate)]
    assert len(masked) == 4
    for event in masked:
        assert unevenness(event.words) < 5
        assert unevenness(federation.words(event.member)) > 100


def test_sum_of_all_but_one_masked_vector_still_looks_uniform() -> None:
    federation = Federation(4, num_params=20_000)
    federation.run()
    masked = [event.words for event in federation.sent if isinstance(event, MaskedUpdate)]
    total = sum(masked[1:], np.zeros_like(masked[0]))
    assert unevenness(total) < 5


@pytest.mark.parametrize("hybrid", [False, True])
def test_no_secret_is_left_in_a_client_after_the_round(hybrid: bool) -> None:
    federation = Federation(5, hybrid=hybrid, drops={Exchange.CONSISTENCY: frozenset({4})})
    before: list[bytearray] = []
    outgoing = federation.until(Exchange.SHARES)
    for client in federation.clients.values():
        before += client._state.buffers()
    outgoing = [out for out in federation.step(outgoing) if isinstance(out, Outgoing)]
    for message in outgoing:
        client = federation.clients[message.member]
        client.receive(message.event)
        before += [*client._state.held.values(), *client._state.pairs.values()]
        (masked,) = client.receive(UpdateReady(federation.words(message.member)))
        federation.server.receive(masked)
        assert client._state.pairs == {}
        assert client._state.mask == client._state.channel == b""
    assert len(before) == 5 * (3 + 4 + 4)
    outgoing = [out for out in federation.server.receive(StageEnded()) if isinstance(out, Outgoing)]
    assert all(any(client._state.seed) for client in federation.clients.values())
    federation.finish(outgoing)
    for member, client in federation.clients.items():
        if member != 4:
            assert client.phase is Phase.DONE
            assert b"".join(client._state.buffers()) == b""
    federation.clients[4].erase()
    assert not any(any(buffer) for buffer in before)
