"""The server's machine: its table, its faults, and what it does with liars."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from fedoppu.client.dealing import Secrets, deal
from fedoppu.common.config import ThresholdSettings
from fedoppu.common.errors import DataError, ProtocolError, RoundAborted, UsageError
from fedoppu.common.masking import KeyAgreement, seal
from fedoppu.common.rounds import (
    Advert,
    ClientEvent,
    Exchange,
    MaskedUpdate,
    ShareBundle,
    StageEnded,
    SurvivorSignature,
    UnmaskReply,
)
from fedoppu.common.secret_sharing import PRIME, SHARE_BYTES
from fedoppu.common.signing import (
    advert_bytes,
    bundle_bytes,
    hash_share,
    masked_bytes,
    reply_bytes,
)
from fedoppu.server.secagg import TRANSITIONS, End, SecAggServer
from tests.integration.secagg_harness import Federation, identities, make_plan, roster_of

EVENTS: dict[Exchange, ClientEvent] = {
    Exchange.KEYS: Advert(0, bytes(32), bytes(32), bytes(32), bytes(64)),
    Exchange.SHARES: ShareBundle(0, {}, {}, bytes(64)),
    Exchange.MASKED: MaskedUpdate(0, np.zeros(1, np.uint32), bytes(64)),
    Exchange.CONSISTENCY: SurvivorSignature(0, bytes(64)),
    Exchange.UNMASK: UnmaskReply(0, {}, {}, b"", bytes(64)),
}


# --- the table -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", list(Exchange))
def test_event_of_another_stage_raises_and_nothing_changes(stage: Exchange) -> None:
    federation = Federation(4)
    federation.until(stage)
    before = federation.server.dump()
    for other in set(Exchange) - {stage}:
        kind = TRANSITIONS[other][0].__name__
        with pytest.raises(ProtocolError, match=f"{kind} of member 0 does not belong in stage"):
            federation.server.receive(EVENTS[other])
    assert federation.server.dump() == before


@pytest.mark.parametrize("event", [*EVENTS.values(), StageEnded()])
def test_nothing_is_taken_after_the_end(event: ClientEvent | StageEnded) -> None:
    federation = Federation(2)
    federation.run()
    with pytest.raises(ProtocolError, match="came after the round was done"):
        federation.server.receive(event)


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("stage", list(Exchange))
def test_state_survives_a_dump_in_the_middle_of_a_stage(stage: Exchange, hybrid: bool) -> None:
    federation = Federation(5, hybrid=hybrid)
    outgoing = federation.until(stage)
    half, rest = outgoing[:3], outgoing[3:]
    for message in half:
        for event in federation.answer(message):
            federation.server.receive(event)
    again = SecAggServer.load(federation.server.dump(), federation.roster)
    assert again.dump() == federation.server.dump()
    assert again.waiting_for == frozenset(message.member for message in rest)
    assert again.pending() == federation.server.pending()
    federation.server = again
    ready = federation.finish(rest)
    assert (ready.words == federation.plain_sum(ready.survivors)).all()


def test_dump_of_something_else_is_refused() -> None:
    federation = Federation(2)
    with pytest.raises(DataError, match="the stored sum has"):
        SecAggServer.load(federation.server.dump()[:-1], federation.roster)
    with pytest.raises(DataError, match="stored state"):
        SecAggServer.load(b"{}\n", federation.roster)


def test_attempt_that_cannot_be_is_not_opened() -> None:
    roster = roster_of(identities(5))
    plan = make_plan(5, roster)
    with pytest.raises(ProtocolError, match=r"members \[7\] are not in it"):
        SecAggServer(plan, roster, invited=(0, 7))
    with pytest.raises(ProtocolError, match="for another roster"):
        SecAggServer(replace(plan, roster_hash="ee" * 32), roster, invited=range(5))
    narrow = replace(plan, word_bits=16, level_bits=14)
    with pytest.raises(UsageError, match="5 members with 14-bit levels overflow"):
        SecAggServer(narrow, roster, invited=range(5))


def test_strategy_sees_whom_it_waits_for_and_whether_it_may_go_on() -> None:
    federation = Federation(10)  # at least 7 must be left
    outgoing = federation.server.pending()
    assert federation.server.waiting_for == frozenset(range(10))
    for message in outgoing[:7]:
        assert not federation.server.sufficient
        (advert,) = federation.answer(message)
        federation.server.receive(advert)
        federation.server.receive(advert)  # repeated byte for byte: no fault
    assert federation.server.waiting_for == {7, 8, 9}
    assert [message.member for message in federation.server.pending()] == [7, 8, 9]
    assert federation.server.sufficient
    assert federation.server.liars == {}
    assert len(federation.server.receive(StageEnded())) == 7
    assert federation.server.stage is Exchange.SHARES


@pytest.mark.parametrize("hybrid", [False, True])
def test_missing_reply_can_be_asked_for_again(hybrid: bool) -> None:
    federation = Federation(4, hybrid=hybrid)
    outgoing = federation.until(Exchange.UNMASK)
    for message in outgoing[:2]:
        for event in federation.answer(message):
            federation.server.receive(event)
    assert not federation.server.sufficient  # 3 of 4 must answer
    again = federation.server.pending()
    assert [message.member for message in again] == [2, 3]
    ready = federation.finish(again)
    assert (ready.words == federation.plain_sum(ready.survivors)).all()


# --- faults: the sender's drop, named, and never an exception ------------------------------------


def spoil(event: ClientEvent) -> ClientEvent:
    return replace(event, signature=bytes(64))


def run_with(
    kind: type[ClientEvent], change: Callable[[ClientEvent], ClientEvent], n: int = 7
) -> tuple[Federation, dict[int, str]]:
    """A round in which member 2 changes its message of a kind."""
    federation = Federation(n)
    federation.tamper = {2: lambda event: change(event) if isinstance(event, kind) else event}
    ready = federation.run()
    assert (ready.words == federation.plain_sum(ready.survivors)).all()
    assert set(ready.liars) <= {2}
    return federation, dict(ready.liars)


@pytest.mark.parametrize(
    ("stage", "survives"),
    [
        (Exchange.KEYS, False),
        (Exchange.SHARES, False),
        (Exchange.MASKED, False),
        (Exchange.CONSISTENCY, True),
        (Exchange.UNMASK, True),
    ],
)
def test_bad_signature_is_a_drop_at_every_stage(stage: Exchange, survives: bool) -> None:
    kind = TRANSITIONS[stage][0]
    federation, liars = run_with(kind, spoil)
    assert "signature" in liars[2]
    assert (2 in federation.server.survivors) is survives


def test_spoiled_answer_is_not_waited_for_but_a_good_one_still_counts() -> None:
    federation = Federation(4)
    first = federation.server.pending()[0]
    (advert,) = federation.answer(first)
    federation.server.receive(spoil(advert))
    assert 0 not in federation.server.waiting_for
    federation.server.receive(advert)
    assert federation.finish(federation.server.pending()).survivors == (0, 1, 2, 3)


@pytest.mark.parametrize("key", [bytes(32), b"\x01" + bytes(31), b"short"])
def test_low_order_key_is_a_drop(key: bytes) -> None:
    federation = Federation(7)

    def weaken(event: ClientEvent) -> ClientEvent:
        if not isinstance(event, Advert):
            return event
        advert = replace(event, mask_key=key)
        message = advert_bytes(federation.plan.context, advert)
        return replace(advert, signature=federation.people[2].sign(message))

    federation.tamper = {2: weaken}
    ready = federation.run()
    assert ready.survivors == (0, 1, 3, 4, 5, 6)
    assert ready.liars == {2: "sent a key of low order or wrong length"}


def test_copied_key_is_the_copiers_drop() -> None:
    federation = Federation(7)
    adverts = {m.member: federation.answer(m)[0] for m in federation.server.pending()}
    first, last = adverts[1], adverts[0]
    assert isinstance(first, Advert)
    assert isinstance(last, Advert)
    copied = replace(last, mask_key=first.mask_key)
    message = advert_bytes(federation.plan.context, copied)
    copied = replace(copied, signature=federation.people[0].sign(message))
    for event in (*(adverts[m] for m in range(1, 7)), copied):
        federation.server.receive(event)
    assert federation.server.liars == {0: "sent a key of another member"}
    assert federation.finish(federation.server.pending()).survivors == (1, 2, 3, 4, 5, 6)


def test_stranger_and_second_answer_are_ignored() -> None:
    federation = Federation(5)
    adverts = [federation.answer(message)[0] for message in federation.server.pending()]
    server = SecAggServer(federation.plan, federation.roster, invited=range(4))
    for advert in adverts:
        server.receive(advert)
    server.receive(replace(adverts[1], signature=bytes(64)))
    assert server.liars == {
        4: "answered query.keys without being asked",
        1: "answered query.keys twice",
    }
    assert not server.waiting_for


def bundle_with(**changes: object) -> Callable[[ClientEvent], ClientEvent]:
    return lambda event: replace(event, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"packages": {}}, "to others than its neighbours"),
        ({"share_hashes": {}}, "to others than its neighbours"),
        ({"packages": dict.fromkeys((0, 1, 3, 4, 5, 6), b"x")}, "of a wrong size"),
        ({"share_hashes": dict.fromkeys((0, 1, 3, 4, 5, 6), b"x")}, "of a wrong size"),
    ],
)
def test_malformed_bundle_is_a_drop(changes: dict[str, object], fault: str) -> None:
    _, liars = run_with(ShareBundle, bundle_with(**changes))
    assert fault in liars[2]


@pytest.mark.parametrize("words", [np.zeros(2, np.uint32), np.zeros(10, np.uint16)])
def test_vector_of_another_shape_is_a_drop(words: object) -> None:
    federation, liars = run_with(MaskedUpdate, bundle_with(words=words))
    assert "sent a vector of" in liars[2]
    assert 2 not in federation.server.survivors


def test_vector_that_was_changed_on_the_way_is_a_drop() -> None:
    def flip(event: ClientEvent) -> ClientEvent:
        assert isinstance(event, MaskedUpdate)
        return replace(event, words=event.words + np.uint32(1))

    _, liars = run_with(MaskedUpdate, flip)
    assert "MaskedUpdate whose signature" in liars[2]


def test_vector_masked_for_another_share_set_is_a_drop() -> None:
    federation = Federation(7)

    def rebind(event: ClientEvent) -> ClientEvent:
        if not isinstance(event, MaskedUpdate):
            return event
        message = masked_bytes(federation.server._formed().scope, (0, 1, 2), event)
        return replace(event, signature=federation.people[2].sign(message))

    federation.tamper = {2: rebind}
    assert 2 in federation.run().liars


# --- liars: wrong shares and seeds ---------------------------------------------------------------


def resign(federation: Federation, reply: UnmaskReply) -> UnmaskReply:
    server = federation.server
    message = reply_bytes(server._formed().scope, server.survivors, reply)
    return replace(reply, signature=federation.people[reply.member].sign(message))


def lying_replies(
    federation: Federation, member: int, change: Callable[[UnmaskReply], UnmaskReply]
) -> None:
    def lie(event: ClientEvent) -> ClientEvent:
        return resign(federation, change(event)) if isinstance(event, UnmaskReply) else event

    federation.tamper = {**federation.tamper, member: lie}


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("share", [bytes(SHARE_BYTES), b"", b"\xff" * SHARE_BYTES])
def test_wrong_share_is_skipped_and_its_holder_named(share: bytes, hybrid: bool) -> None:
    federation = Federation(7, hybrid=hybrid, drops={Exchange.MASKED: frozenset({6})})
    lying_replies(federation, 2, lambda reply: replace(reply, key_shares={6: share}))
    ready = federation.run()
    assert (ready.words == federation.plain_sum((0, 1, 2, 3, 4, 5))).all()
    assert ready.liars == {2: "revealed a wrong share of member 6"}


def test_share_that_is_no_field_element_is_skipped_though_its_dealer_hashed_it() -> None:
    """Dealer and holder lie together: restoring from it would raise, and end more than the round."""
    federation = Federation(7, drops={Exchange.MASKED: frozenset({6})})
    share = b"\xff" * SHARE_BYTES

    def cheat(event: ClientEvent) -> ClientEvent:
        if not isinstance(event, ShareBundle):
            return event
        scope = federation.server._formed().scope
        hashed = bytes(10) + hash_share(scope, "key", 6, holder=2, share=share)
        changed = replace(event, share_hashes={**event.share_hashes, 2: hashed})
        signature = federation.people[6].sign(bundle_bytes(scope, changed))
        return replace(changed, signature=signature)

    lying_replies(federation, 2, lambda reply: replace(reply, key_shares={6: share}))
    federation.tamper = {**federation.tamper, 6: cheat}
    ready = federation.run()
    assert (ready.words == federation.plain_sum((0, 1, 2, 3, 4, 5))).all()
    assert 2 in ready.liars


def test_too_many_wrong_shares_end_the_round() -> None:
    federation = Federation(7, drops={Exchange.MASKED: frozenset({6})})  # t = 4 of 6
    for member in (1, 2, 3):
        lying_replies(
            federation, member, lambda reply: replace(reply, key_shares={6: bytes(SHARE_BYTES)})
        )
    with pytest.raises(RoundAborted, match=r"fewer than 4 good shares of members \[6\] came"):
        federation.run()


def test_wrong_own_seed_is_named_and_restored_from_shares() -> None:
    federation = Federation(7)
    lying_replies(federation, 2, lambda reply: replace(reply, own_seed=bytes(32)))
    ready = federation.run()
    assert (ready.words == federation.plain_sum(range(7))).all()
    assert ready.liars == {2: "revealed a self seed that is not the one it committed to"}


@pytest.mark.parametrize(
    "change",
    [
        lambda reply: replace(reply, key_shares={1: bytes(SHARE_BYTES)}),
        lambda reply: replace(reply, seed_shares={2: bytes(SHARE_BYTES)}),
        lambda reply: replace(reply, seed_shares={6: bytes(SHARE_BYTES)}),
        lambda reply: replace(reply, key_shares={99: bytes(SHARE_BYTES)}),
    ],
)
def test_share_that_was_not_asked_for_is_not_taken(
    change: Callable[[UnmaskReply], UnmaskReply],
) -> None:
    federation = Federation(7, drops={Exchange.MASKED: frozenset({6})})
    lying_replies(federation, 2, change)
    ready = federation.run()
    assert (ready.words == federation.plain_sum((0, 1, 2, 3, 4, 5))).all()
    assert ready.liars == {2: "revealed shares that were not asked for"}
    assert 2 not in federation.server._state.replies


def redeal(federation: Federation, member: int, secrets: Secrets) -> ShareBundle:
    cohort = federation.server._formed()
    person = federation.people[member]
    return deal(cohort, person, secrets, entropy=lambda use, length: bytes(length))


@pytest.mark.parametrize("hybrid", [False, True])
def test_dealer_of_another_seed_is_named_and_the_round_ends(hybrid: bool) -> None:
    federation = Federation(
        7, hybrid=hybrid, drops={Exchange.UNMASK: frozenset({2})}
    )  # so that its seed must be restored

    def cheat(event: ClientEvent) -> ClientEvent:
        if not isinstance(event, ShareBundle):
            return event
        state = federation.clients[2]._state
        return redeal(federation, 2, Secrets(state.channel, state.mask, bytearray(32)))

    federation.tamper = {2: cheat}
    with pytest.raises(RoundAborted, match=r"secrets of members \[2\] are lost"):
        federation.run()
    assert federation.server.liars == {2: "dealt shares that restore no secret of its advert"}


def test_wrong_share_of_a_dealer_is_skipped_and_the_dealer_named() -> None:
    federation = Federation(7, drops={Exchange.MASKED: frozenset({2})})

    def cheat(event: ClientEvent) -> ClientEvent:
        return one_wrong_share(federation, event, 2, 4) if isinstance(event, ShareBundle) else event

    federation.tamper = {2: cheat}
    ready = federation.run()
    assert (ready.words == federation.plain_sum((0, 1, 3, 4, 5, 6))).all()
    assert ready.liars == {2: "dealt a wrong share to member 4"}


def one_wrong_share(
    federation: Federation, bundle: ShareBundle, dealer: int, holder: int
) -> ShareBundle:
    """The bundle with one package that holds a share off the polynomial, signed all the same."""
    cohort = federation.server._formed()
    scope = cohort.scope
    wrong = (PRIME - 5).to_bytes(SHARE_BYTES, "big")
    agreement = KeyAgreement(federation.clients[dealer]._state.channel)
    peer = cohort.adverts[holder].channel_key
    bound = scope.bind("package", dealer, holder)
    package = seal(agreement.channel_key(peer, bound), wrong + wrong, bound)
    hashed = hash_share(scope, "seed", dealer, holder=holder, share=wrong) + hash_share(
        scope, "key", dealer, holder=holder, share=wrong
    )
    changed = replace(
        bundle,
        packages={**bundle.packages, holder: package},
        share_hashes={**bundle.share_hashes, holder: hashed},
    )
    signature = federation.people[dealer].sign(bundle_bytes(scope, changed))
    return replace(changed, signature=signature)


@pytest.mark.parametrize("hybrid", [False, True])
def test_restored_mask_key_is_that_of_the_advert(hybrid: bool) -> None:
    federation = Federation(7, hybrid=hybrid, drops={Exchange.MASKED: frozenset({2})})

    def cheat(event: ClientEvent) -> ClientEvent:
        if not isinstance(event, ShareBundle):
            return event
        state = federation.clients[2]._state
        other = Secrets(state.channel, bytearray(b"\x05" * 32), state.seed)
        cohort = federation.server._formed()
        assert cohort.exchange.load(other.mask).public != cohort.adverts[2].mask_key
        return redeal(federation, 2, other)

    federation.tamper = {2: cheat}
    with pytest.raises(RoundAborted, match=r"secrets of members \[2\] are lost"):
        federation.run()
    assert 2 in federation.server.liars


# --- thresholds ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "match"),
    [
        (Exchange.KEYS, "6 members of 10 asked are left, 7 must be"),
        (Exchange.SHARES, "6 members of 10 asked are left, 7 must be"),
        (Exchange.MASKED, "6 members of 10 asked are left, 7 must be"),
    ],
)
def test_drops_add_up_over_the_stages(stage: Exchange, match: str) -> None:
    drops = {Exchange.KEYS: frozenset({0}), Exchange.SHARES: frozenset({1})}
    more = frozenset({2, 3, *drops.get(stage, ())}) | (
        frozenset({4}) if stage is Exchange.KEYS else frozenset()
    )
    missing = {**drops, stage: more}
    if stage is Exchange.SHARES:
        missing[stage] = frozenset({1, 2, 3})
    with pytest.raises(RoundAborted, match=match) as caught:
        Federation(10, drops=missing).run()
    assert "raise thresholds.max_drop" in caught.value.hint


def test_quorum_counts_the_members_assumed_corrupt() -> None:
    settings_ = ThresholdSettings(floor=2, corrupt=3, max_drop=0.3)
    drops = {Exchange.CONSISTENCY: frozenset({0, 1, 2, 3})}
    with pytest.raises(RoundAborted, match="6 signed the survivor set, 7 must"):
        Federation(10, settings=settings_, drops=drops).run()


def test_aborted_round_is_over() -> None:
    federation = Federation(4, drops={Exchange.KEYS: frozenset({0, 1})})
    with pytest.raises(RoundAborted):
        federation.run()
    assert federation.server.stage is End.ABORTED
    assert federation.server.waiting_for == frozenset()
    assert not federation.server.sufficient
    with pytest.raises(ProtocolError, match="came after the round was aborted"):
        federation.server.receive(StageEnded())


def test_aborted_round_has_forgotten_the_masked_sum_and_the_replies() -> None:
    drops = {Exchange.UNMASK: frozenset(range(3))}
    federation = Federation(5, drops=drops)
    federation.until(Exchange.UNMASK)
    assert federation.server._sum.any()
    with pytest.raises(RoundAborted):
        federation.step(federation.server.pending())
    assert not federation.server._sum.any()
    assert not federation.server._state.replies
