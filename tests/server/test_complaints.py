"""Complaints of bad packages: who is named, who is not, and that nothing is revealed by one."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedoppu.common.config import ThresholdSettings
from fedoppu.common.errors import RoundAborted
from fedoppu.common.rounds import (
    ClientEvent,
    Exchange,
    MaskedUpdate,
    ShareBundle,
    UnmaskReply,
    UnmaskRequested,
)
from fedoppu.common.signing import bundle_bytes, masked_bytes
from fedoppu.server.complaints import judge, without_complainers
from tests.integration.secagg_harness import Federation

BOTH = pytest.mark.parametrize("hybrid", [False, True])


def test_more_complainers_than_can_be_corrupt_name_a_dealer() -> None:
    complaints = {1: (5,), 2: (5,), 3: (6,)}
    assert judge(complaints, 0) == {
        5: "dealt no good share to 2 members",
        6: "dealt no good share to 1 members",
    }
    assert judge(complaints, 1) == {5: "dealt no good share to 2 members"}
    assert judge(complaints, 2) == {}


def test_member_that_complains_of_too_many_is_named_and_not_believed() -> None:
    complaints = {1: (4, 5, 6), 2: (5,)}
    assert judge(complaints, 1) == {1: "complained of 3 dealers, at most 1 can have lied"}


@given(
    truthful=st.sets(st.integers(0, 9), max_size=4),
    lies=st.dictionaries(st.integers(0, 3), st.sets(st.integers(0, 19)), max_size=4),
)
def test_no_honest_member_is_named_while_liars_are_as_few_as_assumed(
    truthful: set[int], lies: dict[int, set[int]]
) -> None:
    """Members 0 to 3 are corrupt, complain at will and dealt badly to `truthful`."""
    complaints = {member: tuple(sorted(of)) for member, of in lies.items() if of}
    complaints |= {member: (0, 1, 2, 3) for member in truthful if member > 3}
    assert set(judge(complaints, 4)) <= {0, 1, 2, 3}


def test_complainer_does_not_count_as_a_holder() -> None:
    assert without_complainers({1, 2, 3}, 5, {2: (5,), 3: (4,)}) == {1, 3}


# --- in a round ----------------------------------------------------------------------------------


def bad_dealer(federation: Federation, dealer: int, holders: tuple[int, ...]) -> None:
    """A dealer that signs hashes which some holders' packages do not fit."""

    def cheat(event: ClientEvent) -> ClientEvent:
        if not isinstance(event, ShareBundle):
            return event
        wrong = dict.fromkeys(holders, bytes(20))
        changed = replace(event, share_hashes={**event.share_hashes, **wrong})
        message = bundle_bytes(federation.server._formed().scope, changed)
        return replace(changed, signature=federation.people[dealer].sign(message))

    federation.tamper = {**federation.tamper, dealer: cheat}


def complaining(federation: Federation, member: int, of: tuple[int, ...]) -> None:
    """A member that complains, rightly or not, in what it signs."""

    def cheat(event: ClientEvent) -> ClientEvent:
        if not isinstance(event, MaskedUpdate):
            return event
        server = federation.server
        changed = replace(event, complaints=of)
        dealers = sorted(server._state.bundles)
        message = masked_bytes(server._formed().scope, dealers, changed)
        return replace(changed, signature=federation.people[member].sign(message))

    federation.tamper = {**federation.tamper, member: cheat}


@BOTH
def test_bad_package_is_complained_of_its_dealer_named_and_the_sum_exact(hybrid: bool) -> None:
    federation = Federation(7, hybrid=hybrid, drops={Exchange.MASKED: frozenset({2})})
    bad_dealer(federation, 2, (4,))
    ready = federation.run()
    assert ready.liars == {2: "dealt no good share to 1 members"}
    assert (ready.words == federation.plain_sum((0, 1, 3, 4, 5, 6))).all()
    (reply,) = [e for e in federation.sent if isinstance(e, UnmaskReply) and e.member == 4]
    assert reply.key_shares == {}


@BOTH
def test_dealer_that_cannot_be_restored_ends_the_round_before_anything_is_asked(
    hybrid: bool,
) -> None:
    federation = Federation(7, hybrid=hybrid)  # t = 4 of 7
    bad_dealer(federation, 2, (0, 1, 3, 4))
    with pytest.raises(RoundAborted, match="member 2 has 3 live holders of its shares, 4 must be"):
        federation.run()
    assert federation.server.liars == {2: "dealt no good share to 4 members"}
    assert not any(isinstance(sent.event, UnmaskRequested) for sent in federation.delivered)
    assert federation.server.asked_to_unmask == ()


def test_dealer_that_those_who_signed_cannot_restore_ends_the_round_before_anything_is_asked() -> (
    None
):
    """All complaints were well when it was there; then it dropped, and three holders are left."""
    settings = ThresholdSettings(floor=2, corrupt=1, max_drop=0.3)
    drops = {Exchange.CONSISTENCY: frozenset({2})}
    federation = Federation(5, settings=settings, drops=drops)  # t = 4 of 5
    complaining(federation, 1, (2,))
    match = r"ended in query\.consistency: member 2 has 3 live holders of its shares, 4 must be"
    with pytest.raises(RoundAborted, match=match):
        federation.run()
    assert federation.server.asked_to_unmask == ()


def revealed(federation: Federation) -> dict[int, tuple[frozenset[int], frozenset[int]]]:
    return {
        event.member: (frozenset(event.seed_shares), frozenset(event.key_shares))
        for event in federation.sent
        if isinstance(event, UnmaskReply)
    }


@pytest.mark.parametrize("of", [(1,), (1, 3), (6,)])
def test_false_complaint_reveals_nothing_more(of: tuple[int, ...]) -> None:
    settings = ThresholdSettings(floor=2, corrupt=2, max_drop=0.1)
    drops = {Exchange.MASKED: frozenset({6})}
    calm = Federation(10, settings=settings, drops=drops)
    calm.run()
    loud = Federation(10, settings=settings, drops=drops)
    complaining(loud, 2, of)
    ready = loud.run()
    assert ready.liars == {}
    assert (ready.words == loud.plain_sum(ready.survivors)).all()
    assert revealed(loud) == revealed(calm)


def test_false_complaints_of_everyone_name_the_complainer() -> None:
    federation = Federation(7)
    complaining(federation, 2, (0, 1, 3, 4, 5, 6))
    ready = federation.run()
    assert ready.liars == {2: "complained of 6 dealers, at most 1 can have lied"}
    assert (ready.words == federation.plain_sum(range(7))).all()


@pytest.mark.parametrize("of", [(9,), (2,), (3, 1), (1, 1), (6,)])
def test_complaint_of_one_that_dealt_nothing_is_a_drop(of: tuple[int, ...]) -> None:
    federation = Federation(7, drops={Exchange.SHARES: frozenset({6})})
    complaining(federation, 2, of)
    ready = federation.run()
    assert ready.liars == {2: "complained about members that dealt it nothing"}
    assert ready.survivors == (0, 1, 3, 4, 5)


@pytest.mark.parametrize("change", [lambda of: (), lambda of: (1, 3)])
def test_complaint_is_signed(change: Callable[[tuple[int, ...]], tuple[int, ...]]) -> None:
    federation = Federation(7)
    bad_dealer(federation, 1, (2,))

    def alter(event: ClientEvent) -> ClientEvent:
        if isinstance(event, MaskedUpdate):
            return replace(event, complaints=change(event.complaints))
        return event

    federation.tamper = {**federation.tamper, 2: alter}
    assert "MaskedUpdate whose signature" in federation.run().liars[2]


def test_complaints_survive_a_restart_of_the_server() -> None:
    federation = Federation(7, reload=True)
    bad_dealer(federation, 1, (2,))
    assert federation.run().liars == {1: "dealt no good share to 1 members"}
