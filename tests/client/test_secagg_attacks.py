"""Attacks on a client from the share set on, each as a script: what an active server may try."""

from dataclasses import replace

import numpy as np
import pytest

from fedoppu.client.dealing import hash_package
from fedoppu.client.policy import ClientPolicy
from fedoppu.client.secagg import Phase, SecAggClient
from fedoppu.common.config import ThresholdSettings
from fedoppu.common.errors import ProtocolError, RefusedByPolicy
from fedoppu.common.rounds import (
    CohortFixed,
    Exchange,
    MaskedUpdate,
    SharesDelivered,
    SurvivorSignature,
    SurvivorsProposed,
    UnmaskReply,
    UnmaskRequested,
    UpdateReady,
)
from fedoppu.common.signing import Identity, survivors_bytes
from tests.integration.secagg_harness import Federation, event_for

# --- shares --------------------------------------------------------------------------------------


def delivery(federation: Federation) -> SharesDelivered:
    event = event_for(federation.until(Exchange.MASKED), 0)
    assert isinstance(event, SharesDelivered)
    return event


def test_share_for_another_recipient_or_from_another_dealer_is_not_held() -> None:
    federation = Federation(5)
    event = delivery(federation)
    to_three = federation.server._state.bundles[1].packages[3]
    bundles = dict(event.bundles)
    bundles[1] = replace(bundles[1], packages={0: to_three})
    bundles[2] = replace(bundles[2], packages=bundles[3].packages)
    bundles[4] = replace(bundles[4], member=3)
    federation.clients[0].receive(replace(event, bundles=bundles))
    assert set(federation.clients[0]._state.held) == {3}


def test_bundle_in_another_dealers_place_is_not_held() -> None:
    """Else its shares would be revealed as another's: a survivor's key, as if it had dropped."""
    federation = Federation(5)
    event = delivery(federation)
    client = federation.clients[0]
    client.receive(replace(event, bundles={**event.bundles, 4: event.bundles[3]}))
    assert set(client._state.held) == {1, 2, 3}
    assert client._state.complaints == (4,)


@pytest.mark.parametrize(("share", "held"), [(b"\x00" + b"\xff" * 32, True), (b"\xff" * 33, False)])
def test_share_that_is_no_field_element_is_not_held(share: bytes, held: bool) -> None:
    """Its dealer hashed it; a holder that revealed it would be named for the dealer's lie."""
    federation = Federation(5)
    event = delivery(federation)
    client, dealer = federation.clients[0], federation.clients[2]
    cohort = dealer._formed()
    link = cohort.channel_link(2, 0)
    package = cohort.exchange.load(dealer._state.channel).seal(2 * share, link)
    hashes = hash_package(cohort, 2, 0, 2 * share)
    bad = replace(event.bundles[2], packages={0: package}, share_hashes={0: hashes})
    client.receive(replace(event, bundles={**event.bundles, 2: bad}))
    assert (2 in client._state.held) == held


def test_private_keys_are_overwritten_when_the_packages_are_open() -> None:
    federation = Federation(5)
    event, client = delivery(federation), federation.clients[0]
    keys = (client._state.channel, client._state.mask)
    assert all(map(any, keys))
    client.receive(event)
    assert not any(map(any, keys))
    assert not client._state.channel
    assert not client._state.mask


@pytest.mark.parametrize(
    "change", [{"packages": {0: b"junk"}}, {"packages": {}}, {"share_hashes": {0: bytes(20)}}]
)
def test_bad_package_is_the_dealers_drop_and_the_masks_follow_the_share_set(
    change: dict[str, dict[int, bytes]],
) -> None:
    federation = Federation(5)
    event = delivery(federation)
    bad = replace(event.bundles[2], **change)  # type: ignore[arg-type]
    client = federation.clients[0]
    client.receive(replace(event, bundles={**event.bundles, 2: bad}))
    assert set(client._state.held) == {1, 3, 4}
    assert client._state.complaints == (2,)
    assert len(client._masks(client._formed())) == 5  # itself and four peers


@pytest.mark.parametrize(
    ("dealers", "error", "match"),
    [
        ((1, 2, 3, 4), ProtocolError, "must hold member 0"),
        ((0, 1, 2, 9), ProtocolError, "members of the cohort alone"),
        ((0, 2, 1, 3), ProtocolError, "share set must be sorted"),
        ((0, 1, 2), RefusedByPolicy, "2 of 5 members are missing, at most 1 may be"),
    ],
)
def test_share_set_must_hold_this_client_and_enough_of_the_cohort(
    dealers: tuple[int, ...], error: type[Exception], match: str
) -> None:
    federation = Federation(5)
    event = delivery(federation)
    with pytest.raises(error, match=match):
        federation.clients[0].receive(replace(event, dealers=dealers))
    assert federation.clients[0].phase is Phase.SHARED


def ready() -> tuple[Federation, SecAggClient]:
    """A federation of five, and its member 0 with the share set."""
    federation = Federation(5)
    federation.clients[0].receive(event_for(federation.until(Exchange.MASKED), 0))
    return federation, federation.clients[0]


@pytest.mark.parametrize("words", [np.zeros(3, np.uint32), np.zeros(10, np.uint16)])
def test_vector_of_another_layout_is_refused(words: np.ndarray) -> None:
    _, client = ready()
    with pytest.raises(ProtocolError, match="the update must have"):
        client.receive(UpdateReady(words))


def test_own_words_are_not_changed_by_masking() -> None:
    federation, client = ready()
    words = federation.words(0)
    (masked,) = client.receive(UpdateReady(words))
    assert isinstance(masked, MaskedUpdate)
    assert (words == federation.words(0)).all()
    assert (masked.words != words).any()


# --- survivors -----------------------------------------------------------------------------------


def masked_federation(n: int = 5, policy: ClientPolicy | None = None) -> Federation:
    federation = Federation(n, policy=policy or ClientPolicy.for_simulation())
    federation.until(Exchange.CONSISTENCY)
    return federation


ALL = (0, 1, 2, 3, 4)


@pytest.mark.parametrize(
    ("dealers", "survivors", "error", "match"),
    [
        (ALL, (0, 1, 2), RefusedByPolicy, "2 of 5 members are missing"),
        ((0, 1, 2, 3), (0, 1, 2, 3), ProtocolError, "not of the share set"),
        (ALL, (0, 1, 2, 3, 4, 5), ProtocolError, "not of the share set"),
        (ALL, (0, 1, 1, 2, 3), ProtocolError, "survivor set must be sorted"),
    ],
)
def test_other_survivor_set_is_refused(
    dealers: tuple[int, ...], survivors: tuple[int, ...], error: type[Exception], match: str
) -> None:
    client = masked_federation().clients[0]
    with pytest.raises(error, match=match):
        client.receive(SurvivorsProposed(dealers, survivors))
    assert client.phase is Phase.MASKED


def test_survivors_below_the_floor_are_refused() -> None:
    client = masked_federation(policy=ClientPolicy(floor=5, corrupt=0)).clients[0]
    with pytest.raises(RefusedByPolicy, match="survivor set of 4 has 4 honest members"):
        client.receive(SurvivorsProposed(ALL, (0, 1, 2, 3)))


def test_late_client_that_was_declared_dropped_stays_hidden() -> None:
    federation = masked_federation()
    client = federation.clients[4]
    assert client.receive(SurvivorsProposed(ALL, (0, 1, 2, 3))) == []
    assert client.phase is Phase.EXCLUDED
    assert client._state.seed == b""
    assert client._state.held == {}
    with pytest.raises(ProtocolError, match="does not belong after excluded"):
        client.receive(UnmaskRequested({}))


def test_members_that_are_shown_other_cohorts_cannot_agree() -> None:
    federation = Federation(6)
    adverts = {m.member: federation.answer(m)[0] for m in federation.server.pending()}
    views = {0: (0, 1, 2, 3, 4), 1: (0, 1, 2, 3, 4), 2: (0, 1, 2, 3, 5), 3: (0, 1, 2, 3, 5)}
    signatures = {}
    for member, view in views.items():
        client = federation.clients[member]
        client.receive(CohortFixed(tuple(adverts[m] for m in view)))  # type: ignore[misc]
        client.receive(SharesDelivered(view, {}))
        client.receive(UpdateReady(federation.words(member)))
        (signed,) = client.receive(SurvivorsProposed(view, view))
        signatures[member] = signed.signature
    for member in views:
        with pytest.raises(ProtocolError, match="2 members of 5 signed this survivor set"):
            federation.clients[member].receive(UnmaskRequested(signatures))


def test_second_survivor_set_is_not_signed() -> None:
    client = masked_federation().clients[0]
    client.receive(SurvivorsProposed(ALL, ALL))
    with pytest.raises(ProtocolError, match="does not belong after signed"):
        client.receive(SurvivorsProposed(ALL, (0, 1, 2, 3)))


def signature_of(federation: Federation, member: int, survivors: tuple[int, ...]) -> bytes:
    (signed,) = federation.clients[member].receive(SurvivorsProposed(ALL, survivors))
    assert isinstance(signed, SurvivorSignature)
    return signed.signature


def test_split_survivor_views_unmask_no_one() -> None:
    federation = masked_federation()
    without_four, without_three = (0, 1, 2, 3), (0, 1, 2, 4)
    shown = {0: without_four, 1: without_four, 2: without_three, 4: without_three}
    signatures = {m: signature_of(federation, m, view) for m, view in shown.items()}
    for member in shown:
        with pytest.raises(ProtocolError, match="2 members of 5 signed this survivor set, 3 must"):
            federation.clients[member].receive(UnmaskRequested(signatures))


def test_quorum_is_of_the_whole_cohort_and_of_those_assumed_corrupt() -> None:
    policy = ClientPolicy(floor=2, corrupt=2, max_drop=0.5)
    settings_ = ThresholdSettings(floor=2, corrupt=2, max_drop=0.3)
    federation = Federation(8, settings=settings_, policy=policy)
    federation.until(Exchange.CONSISTENCY)
    everyone = tuple(range(8))
    signatures = {}
    for member in range(8):
        proposed = SurvivorsProposed(everyone, everyone)
        (signed,) = federation.clients[member].receive(proposed)
        signatures[member] = signed.signature
    five = {member: signatures[member] for member in range(5)}
    with pytest.raises(ProtocolError, match=r"5 members of 8 .* 6 must have"):
        federation.clients[0].receive(UnmaskRequested(five))
    six = {**five, 5: signatures[5]}
    assert len(federation.clients[0].receive(UnmaskRequested(six))) == 1


def test_bad_signatures_are_not_counted_and_stop_no_one() -> None:
    federation = masked_federation()
    signatures = {m: signature_of(federation, m, ALL) for m in (0, 1, 2)}
    message = survivors_bytes(federation.clients[0]._formed().scope, ALL, ALL)
    stranger = Identity(9, b"\x09" * 32).sign(message)
    forged = {0: signatures[0], 1: signatures[1], 3: bytes(64), 4: signatures[0], 9: stranger}
    with pytest.raises(ProtocolError, match="2 members of 5"):
        federation.clients[0].receive(UnmaskRequested(forged))
    (reply,) = federation.clients[0].receive(UnmaskRequested({**forged, 2: signatures[2]}))
    assert isinstance(reply, UnmaskReply)


def test_signature_of_a_roster_member_outside_the_cohort_is_not_counted() -> None:
    federation = Federation(6, drops={Exchange.KEYS: frozenset({5})})
    federation.until(Exchange.CONSISTENCY)
    signatures = {m: signature_of(federation, m, ALL) for m in (0, 1, 2)}
    message = survivors_bytes(federation.clients[0]._formed().scope, ALL, ALL)
    outside = {0: signatures[0], 1: signatures[1], 5: federation.people[5].sign(message)}
    with pytest.raises(ProtocolError, match="2 members of 5 signed this survivor set, 3 must"):
        federation.clients[0].receive(UnmaskRequested(outside))


def test_second_unmask_is_refused() -> None:
    federation = masked_federation()
    signatures = {m: signature_of(federation, m, ALL) for m in (0, 1, 2)}
    federation.clients[0].receive(UnmaskRequested(signatures))
    with pytest.raises(ProtocolError, match="does not belong after done"):
        federation.clients[0].receive(UnmaskRequested(signatures))


def test_reply_holds_one_share_of_each_owner() -> None:
    federation = Federation(5, drops={Exchange.MASKED: frozenset({3})})
    federation.run()
    sent = [event for event in federation.sent if isinstance(event, UnmaskReply)]
    assert len(sent) == 4
    for reply in sent:
        assert set(reply.key_shares) == {3}
        assert set(reply.seed_shares) == {0, 1, 2, 4} - {reply.member}
