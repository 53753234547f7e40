"""Attacks on the hybrid exchange, whose packages anybody could seal: with the check on and off."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from fedoppu.client import dealing
from fedoppu.client.secagg import Phase
from fedoppu.common.cohort import form_cohort
from fedoppu.common.errors import ProtocolError, RoundAborted
from fedoppu.common.masking import add_masks, self_mask
from fedoppu.common.pairwise import HYBRID
from fedoppu.common.rounds import (
    Advert,
    ClientEvent,
    Exchange,
    MaskedUpdate,
    ServerEvent,
    ShareBundle,
    SharesDelivered,
    UnmaskReply,
    UpdateReady,
    Words,
)
from fedoppu.common.signing import advert_bytes, bundle_bytes
from tests.integration.secagg_harness import Federation, event_for

VICTIM = 4  # the highest of five: every pair secret of its is offered by another
SERVERS = b"\x07" * 32  # a mask key that the server made up


def delivery(federation: Federation, member: int = VICTIM) -> SharesDelivered:
    event = event_for(federation.until(Exchange.MASKED), member)
    assert isinstance(event, SharesDelivered)
    return event


def plant(federation: Federation) -> None:
    """The server offers the victim pair secrets of its own, sealed as the real ones are."""

    def change(event: ServerEvent) -> ServerEvent:
        if not isinstance(event, SharesDelivered):
            return event
        cohort, made = federation.server._formed(), HYBRID.load(SERVERS)
        bundles = {
            dealer: replace(bundle, offers={VICTIM: made.offer(cohort.mask_link(dealer, VICTIM))})
            for dealer, bundle in event.bundles.items()
        }
        return replace(event, bundles=bundles)

    federation.spoof = {VICTIM: change}


def read_by_the_server(federation: Federation) -> Words:
    """What a server makes of the victim's vector, with the self seed that it gets in the end."""
    sent = [event for event in federation.sent if event.member == VICTIM]
    (masked,) = [event for event in sent if isinstance(event, MaskedUpdate)]
    (reply,) = [event for event in sent if isinstance(event, UnmaskReply)]
    cohort, made = federation.server._formed(), HYBRID.load(SERVERS)
    masks = [replace(self_mask(reply.own_seed, cohort.scope, VICTIM), negative=True)]
    for dealer in range(VICTIM):
        mask = made.mask(cohort.mask_link(dealer, VICTIM), b"")
        assert mask is not None
        masks.append(mask)  # the victim's is its negative
    words = masked.words.copy()
    add_masks(words, masks)
    return words


def test_planted_pair_secrets_read_a_victim_that_does_not_check_signatures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dealing, "is_signed", lambda *_, **__: True)
    federation = Federation(5, hybrid=True)
    plant(federation)
    federation.run()
    assert (read_by_the_server(federation) == federation.words(VICTIM)).all()


def test_what_the_server_makes_of_a_vector_without_planted_secrets_is_noise() -> None:
    federation = Federation(5, hybrid=True)
    federation.run()
    assert (read_by_the_server(federation) != federation.words(VICTIM)).any()


def test_planted_pair_secrets_are_refused_and_no_vector_is_sent() -> None:
    federation = Federation(5, hybrid=True)
    plant(federation)
    with pytest.raises(ProtocolError, match="member 0 offered member 4 no pair secret that is"):
        federation.run()
    victim = federation.clients[VICTIM]
    assert victim.phase is Phase.SHARED
    with pytest.raises(ProtocolError, match="does not belong after shared"):
        victim.receive(UpdateReady(federation.words(VICTIM)))


Change = Callable[[ShareBundle], ShareBundle]


@pytest.mark.parametrize(
    "change",
    [
        lambda bundle: replace(bundle, offers={}),
        lambda bundle: replace(bundle, offers={VICTIM: b"junk"}),
        lambda bundle: replace(bundle, path=bundle.path[1:]),
        lambda bundle: replace(bundle, path=(bytes(32), *bundle.path[1:])),
        lambda bundle: replace(bundle, signature=bytes(64)),
        lambda bundle: replace(bundle, member=1),
        lambda bundle: replace(bundle, packages={}),
        lambda bundle: replace(bundle, share_hashes={VICTIM: bytes(20)}),
    ],
)
def test_nothing_that_its_dealer_did_not_sign_is_used(change: Change) -> None:
    federation = Federation(5, hybrid=True)
    event = delivery(federation)
    changed = replace(event, bundles={**event.bundles, 2: change(event.bundles[2])})
    with pytest.raises(ProtocolError, match="member 2 offered member 4 no pair secret"):
        federation.clients[VICTIM].receive(changed)
    federation.clients[VICTIM].receive(event)  # the refusal changed nothing


def test_withheld_offers_do_not_expose_the_highest_member() -> None:
    federation = Federation(5, hybrid=True)
    event = delivery(federation)
    with pytest.raises(ProtocolError, match="without that mask this client sends no vector"):
        federation.clients[VICTIM].receive(replace(event, bundles={}))


def test_bad_package_of_a_higher_dealer_is_a_complaint_and_the_mask_is_added() -> None:
    federation = Federation(5, hybrid=True)
    event = delivery(federation, 1)
    changed = replace(event, bundles={d: b for d, b in event.bundles.items() if d != 3})
    client = federation.clients[1]
    client.receive(changed)
    assert set(client._state.held) == {0, 2, 4}
    assert client._state.complaints == (3,)
    assert len(client._masks(client._formed())) == 5


# --- a dealer that lies --------------------------------------------------------------------------


def lying_dealer(
    change: Callable[[Federation, ShareBundle], ShareBundle], *, hybrid: bool = True
) -> Federation:
    """Seven members, of whom 2 signs a bundle with something else in it; 5 may break off."""
    federation = Federation(7, hybrid=hybrid, refusals={5: ""})

    def cheat(event: ClientEvent) -> ClientEvent:
        if not isinstance(event, ShareBundle):
            return event
        changed = change(federation, event)
        message = bundle_bytes(federation.server._formed().scope, changed)
        return replace(changed, signature=federation.people[2].sign(message))

    federation.tamper = {2: cheat}
    return federation


def junk_offer(federation: Federation, bundle: ShareBundle) -> ShareBundle:
    return replace(bundle, offers={**bundle.offers, 5: bytes(HYBRID.offer_bytes)})


def test_signed_offer_that_does_not_open_costs_the_round_and_names_its_dealer() -> None:
    """Its recipient drops out; its restored key shows who lied."""
    federation = lying_dealer(junk_offer)
    with pytest.raises(RoundAborted, match=r"the secrets of members \[5\] are lost"):
        federation.run()
    assert "member 2 offered member 5 no pair secret" in federation.refusals[5]
    assert federation.server.liars == {2: "offered member 5 another pair secret than it promised"}


def test_offer_of_another_secret_is_seen_when_its_dealer_drops() -> None:
    def other_secret(federation: Federation, bundle: ShareBundle) -> ShareBundle:
        cohort = federation.server._formed()
        made = HYBRID.load(SERVERS).offer(cohort.mask_link(2, 5))
        return replace(bundle, offers={**bundle.offers, 5: made})

    federation = lying_dealer(other_secret)
    federation.drops = {Exchange.MASKED: frozenset({2})}
    with pytest.raises(RoundAborted, match=r"the secrets of members \[2\] are lost"):
        federation.run()
    assert federation.refusals[5] == ""  # it opened, and fitted what was promised
    assert set(federation.server.liars) == {2}


@pytest.mark.parametrize("size", [0, 5, 1183])
def test_offer_of_another_size_is_the_dealers_drop(size: int) -> None:
    federation = lying_dealer(
        lambda _, bundle: replace(bundle, offers={**bundle.offers, 5: bytes(size)})
    )
    ready = federation.run()
    assert ready.liars == {2: "dealt shares of a wrong size"}
    assert ready.survivors == (0, 1, 3, 4, 5, 6)
    assert (ready.words == federation.plain_sum(ready.survivors)).all()


def test_missing_offer_is_the_dealers_drop() -> None:
    federation = lying_dealer(lambda _, bundle: replace(bundle, offers={}))
    assert federation.run().liars == {2: "dealt shares to others than its neighbours"}


def test_x25519_dealer_offers_nothing() -> None:
    federation = lying_dealer(junk_offer, hybrid=False)
    ready = federation.run()
    assert ready.liars == {2: "dealt shares to others than its neighbours"}
    assert (ready.words == federation.plain_sum(ready.survivors)).all()


# --- keys ----------------------------------------------------------------------------------------

GOOD = HYBRID.load(b"\x09" * 32).public


@pytest.mark.parametrize("name", ["channel_key", "mask_key"])
@pytest.mark.parametrize(
    "key", [b"", GOOD[:-1], GOOD[:-32] + bytes(32), b"\xff\xff\xff" + GOOD[3:], bytes(32)]
)
def test_malformed_hybrid_key_is_that_peers_drop_on_both_sides(key: bytes, name: str) -> None:
    federation = Federation(7, hybrid=True)

    def weaken(event: ClientEvent) -> ClientEvent:
        if not isinstance(event, Advert):
            return event
        advert = replace(event, **{name: key})  # type: ignore[arg-type]
        message = advert_bytes(federation.plan.context, advert)
        return replace(advert, signature=federation.people[2].sign(message))

    federation.tamper = {2: weaken}
    ready = federation.run()
    assert ready.survivors == (0, 1, 3, 4, 5, 6)
    assert ready.liars == {2: "sent a key of low order or wrong length"}
    adverts = [event for event in federation.sent if isinstance(event, Advert)]
    cohort, faults = form_cohort(federation.plan, adverts, federation.roster)
    assert cohort.members == ready.survivors
    assert faults == ready.liars
