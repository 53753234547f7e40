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
    spent = payload_bytes(write_reply(advert)) + payload_bytes(write_reply(bundle))
    assert spent <= goal
    assert spent == (132_586 if hybrid else 4_938)
