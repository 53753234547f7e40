"""A client whose disk is rolled back in silence: what it can be made to do, and what holds all the same.

It counts among the c corrupt members that every policy assumes: these tests show why it must, and
that it does no harm where it does.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedoppu.client.handler import Handler
from fedoppu.client.policy import ClientPolicy
from fedoppu.client.secagg import SecAggClient
from fedoppu.common.config import ThresholdSettings
from fedoppu.common.errors import ProtocolError, RefusedByPolicy
from fedoppu.common.messages import Opening, read_reply, write_request
from fedoppu.common.rounds import (
    Advert,
    Exchange,
    MaskedUpdate,
    Outgoing,
    RoundOpened,
    StageEnded,
    SumReady,
    SurvivorSignature,
    UnmaskRequested,
)
from fedoppu.server.secagg import SecAggServer
from fedoppu.simulations.grid import node_id
from tests.client.test_app import plan_for
from tests.fake_federation import CONFIG, federation
from tests.integration.secagg_harness import Federation, HashKeys

VIEWS = {"one": ((0, 1, 2, 3), (0, 1, 2)), "other": ((0, 1, 3, 4), (0, 3, 4))}


class Split:
    """A server that shows two survivor sets, and a member 0 that is rolled back in between."""

    def __init__(self, corrupt: int) -> None:
        self.corrupt = corrupt
        self.made = Federation(
            5,
            settings=ThresholdSettings(floor=2, corrupt=corrupt, max_drop=0.3),
            policy=ClientPolicy(floor=2, corrupt=corrupt, max_drop=0.5, simulation=True),
        )
        delivered = self.made.until(Exchange.MASKED)
        self.masked = {item.member: self.made.answer(item)[0] for item in delivered}
        self.disk = self.made.clients[0].dump()

    def roll_back(self) -> None:
        made = self.made
        made.clients[0] = SecAggClient.load(
            self.disk, made.people[0], made.pins, policy=made.policy, keys=HashKeys("client 0")
        )

    def propose(self, view: str) -> tuple[SecAggServer, list[Outgoing]]:
        """A server that has the vectors of one view's survivors alone."""
        made = self.made
        server = SecAggServer.load(made.server.dump(), made.roster, corrupt=self.corrupt)
        for member in VIEWS[view][0]:
            masked = self.masked[member]
            assert isinstance(masked, MaskedUpdate)
            server.receive(masked)
        told = [item for item in server.receive(StageEnded()) if isinstance(item, Outgoing)]
        return server, [item for item in told if item.member in VIEWS[view][1]]

    def sign(self, proposals: Sequence[Outgoing]) -> list[SurvivorSignature]:
        answers = [self.made.clients[item.member].receive(item.event)[0] for item in proposals]
        return [answer for answer in answers if isinstance(answer, SurvivorSignature)]

    def whole(self, view: str) -> SumReady:
        """The sum of one view's survivors."""
        server, proposals = self.propose(view)
        for signature in self.sign(proposals):
            server.receive(signature)
        for item in server.receive(StageEnded()):
            assert isinstance(item, Outgoing)
            if item.member in VIEWS[view][1]:
                server.receive(self.made.clients[item.member].receive(item.event)[0])
        (ready,) = server.receive(StageEnded())
        assert isinstance(ready, SumReady)
        return ready


def test_without_the_assumption_a_rolled_back_client_gives_two_sums_of_one_round() -> None:
    split = Split(corrupt=0)
    one = split.whole("one")
    split.roll_back()
    other = split.whole("other")
    # the difference of two members' vectors, which no single sum shows
    expected = split.made.words(2) - split.made.words(4)
    np.testing.assert_array_equal(one.words - other.words, expected)


def test_client_that_was_not_rolled_back_signs_one_set() -> None:
    split = Split(corrupt=0)
    split.whole("one")
    _, proposals = split.propose("other")
    with pytest.raises(ProtocolError, match="SurvivorsProposed does not belong after done"):
        split.sign(proposals)


def test_where_it_counts_as_corrupt_no_second_set_finds_its_quorum() -> None:
    """Honest members sign once: of 5 with c = 1 four must sign, and two sets of four share three."""
    split = Split(corrupt=1)
    refused = 0
    for view, (_, signers) in VIEWS.items():
        split.roll_back()
        _, proposals = split.propose(view)
        signatures = {sign.member: sign.signature for sign in split.sign(proposals)}
        assert sorted(signatures) == list(signers)
        for member in signers[1:]:
            with pytest.raises(ProtocolError, match=r"3 members of 5 signed .* 4 must have"):
                split.made.clients[member].receive(UnmaskRequested(signatures))
            refused += 1
    assert refused == 4


def test_rolled_back_vault_opens_a_round_again_that_it_answered(tmp_path: Path) -> None:
    made = federation(tmp_path, replace(CONFIG, rounds=1, cohort=8))
    member = made.users.member(made.grid.node(node_id(0)).context)
    backup = deepcopy(member.state)
    made.run()
    opening = Opening(RoundOpened(plan_for(made, attempt=1)), made.config.canonical())
    with pytest.raises(RefusedByPolicy, match="round 1 was answered at attempt 0"):
        Handler(member).answer("query.keys", write_request(opening))
    # its memory is all that keeps it from a second sum over nearly the same members
    restored = Handler(replace(member, state=backup))
    reply = restored.answer("query.keys", write_request(opening))
    assert isinstance(read_reply("query.keys", reply, "member 0"), Advert)
