"""What a member sends before its vector: the goal lines of the specification, counted."""

import pytest

from fedoppu.common.messages import payload_bytes, write_reply
from fedoppu.common.rounds import Advert, Exchange, ShareBundle
from tests.integration.secagg_harness import Federation


@pytest.mark.parametrize(("hybrid", "goal"), [(False, 5_000), (True, 135_000)])
def test_advert_and_own_shares_for_54_neighbours(hybrid: bool, goal: int) -> None:
    """The lowest member offers a pair secret to all others, so it sends most."""
    federation = Federation(55, hybrid=hybrid)
    outgoing = federation.until(Exchange.SHARES)
    (advert,) = [event for event in federation.sent if event.member == 0]
    (bundle,) = federation.answer(outgoing[0])
    assert isinstance(advert, Advert)
    assert isinstance(bundle, ShareBundle)
    assert len(bundle.packages) == 54
    assert len(bundle.offers) == (54 if hybrid else 0)
    sealed = [*bundle.packages.values(), *bundle.offers.values()]
    shares = payload_bytes(write_reply(advert)) + sum(map(len, sealed))
    assert shares <= goal
    assert shares == (131_380 if hybrid else 4_596)


@pytest.mark.parametrize("hybrid", [False, True])
def test_hashes_of_shares_and_signature_come_beside(hybrid: bool) -> None:
    """What names a liar: 20 bytes a neighbour, who it is, and one signature over all of it."""
    federation = Federation(55, hybrid=hybrid)
    (bundle,) = federation.answer(federation.until(Exchange.SHARES)[0])
    assert isinstance(bundle, ShareBundle)
    sealed = [*bundle.packages.values(), *bundle.offers.values()]
    assert payload_bytes(write_reply(bundle)) - sum(map(len, sealed)) <= 1_300
