"""A roster that changes between two rounds, over a Grid: proposal, countersignatures, the new epoch."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from fedoppu.client.enrolment import Enrolment
from fedoppu.client.handler import Handler
from fedoppu.client.policy import ClientPolicy
from fedoppu.client.seat import Seat
from fedoppu.common.epochs import (
    EpochAnnounced,
    EpochAnswer,
    RosterEpoch,
    collect,
    found,
    propose,
)
from fedoppu.common.errors import ProtocolError, RefusedByPolicy, RoundAborted
from fedoppu.common.messages import ROSTER, Opening, write_request
from fedoppu.common.rounds import RoundOpened
from fedoppu.common.thresholds import quorum
from fedoppu.server.exchange import Exchanger
from fedoppu.server.rounds import Rounds, Standing
from fedoppu.simulations.grid import node_id
from fedoppu.simulations.runtime import SimulatedMember
from tests.client.test_app import plan_for
from tests.fake_federation import CONFIG, Federation, federation
from tests.rosters import AUTHORITY

FOUNDERS, EVERYONE = range(8), range(9)
POLICY = ClientPolicy(floor=2, corrupt=1, max_drop=0.5, simulation=True)


class Growing:
    """Eight founders and a newcomer; the server follows the authority's word."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        thresholds = replace(CONFIG.thresholds, corrupt=1)
        config = replace(CONFIG, cohort=9, rounds=9, thresholds=thresholds)
        self.made: Federation = federation(folder, config, members=9, replays=False)
        identity, member = self.made.members.identity, self.made.users.member
        known = [identity(index) for index in range(len(self.made.members.roster))]
        monkeypatch.setattr(
            self.made.users, "member", lambda context: replace(member(context), policy=POLICY)
        )
        self.epoch = found(AUTHORITY, [one.enrolled for one in known[:8]])
        for index in FOUNDERS:
            Enrolment(self.member(index).state).begin(self.epoch, self.epoch.digest.hex())
        self.newcomer = known[8].enrolled.identity
        self.standing = Standing.resume(self.made.runtime)
        self.run_id = self.made.runtime.run_id

    def member(self, index: int) -> SimulatedMember:
        return self.made.users.member(self.made.grid.node(node_id(index)).context)

    def exchanger(self, members: Sequence[int]) -> Exchanger:
        nodes = {index: node_id(index) for index in members}
        return Exchanger(self.made.grid, nodes, deadline=5, poll=0.001)

    def round(self, epoch: RosterEpoch, members: Sequence[int]) -> None:
        """A round under an epoch, with all of these members."""
        runtime = replace(self.made.runtime, roster=epoch.roster, young=epoch.young(2))
        after = Rounds(runtime, self.exchanger(members)).run(self.standing)
        assert after is not None
        self.standing = after

    def propose(self, first: int) -> RosterEpoch:
        where = (self.run_id, first)
        return propose(AUTHORITY, self.epoch, first=where, newcomers=[self.newcomer], revoked=[3])

    def announce(self, epoch: RosterEpoch) -> list[EpochAnswer]:
        """Shows an epoch to all members of the one before; those that refuse give no answer."""
        request = write_request(EpochAnnounced(epoch))
        answers = self.exchanger(FOUNDERS).exchange(ROSTER, dict.fromkeys(FOUNDERS, request), "1")
        return [reply for reply in answers.replies.values() if isinstance(reply, EpochAnswer)]

    def open(self, epoch: RosterEpoch, index: int) -> None:
        """Shows one member a plan of the next round, whoever it is."""
        runtime = replace(self.made.runtime, roster=epoch.roster)
        plan = plan_for(replace(self.made, runtime=runtime), number=self.standing.round + 1)
        now = {
            "model_hash": self.standing.adapter.digest(),
            "value_range": self.standing.value_range,
        }
        plan = replace(plan, **now)  # type: ignore[arg-type]
        request = write_request(Opening(RoundOpened(plan), self.made.config.canonical()))
        Handler(self.member(index)).answer("query.keys", request)

    def survivors(self) -> tuple[int, ...] | None:
        return self.made.records[-1].survivors


def test_roster_changes_between_two_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Growing(tmp_path, monkeypatch)
    made.round(made.epoch, FOUNDERS)
    assert made.announce(made.propose(first=2)) == []  # it would hold at once
    proposal = made.propose(first=3)
    full = collect(made.epoch, proposal, made.announce(proposal))
    assert len(full.countersignatures) == 8 >= quorum(8, 1)
    assert {answer.countersignature for answer in made.announce(full)} == {b""}
    Enrolment(made.member(8).state).begin(full, full.digest.hex())

    with pytest.raises(RoundAborted, match="the plan's roster_hash is"):
        made.round(full, EVERYONE)  # a round too early: every founder refuses
    made.round(made.epoch, FOUNDERS)
    assert made.survivors() == tuple(FOUNDERS)

    with pytest.raises(RoundAborted, match="the plan's roster_hash is"):
        made.round(made.epoch, FOUNDERS)  # the old roster is over
    made.round(full, EVERYONE)
    assert made.survivors() == (0, 1, 2, 4, 5, 6, 7, 8)  # 3 was revoked, 8 is new
    with pytest.raises(ProtocolError, match="roster does not hold the identity key of member 3"):
        made.open(full, 3)


def test_plan_that_counts_no_newcomer_as_corrupt_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cohort has c = 1 and one young member, so a plan for c = 1 alone has too low a threshold."""
    made = Growing(tmp_path, monkeypatch)
    made.round(made.epoch, FOUNDERS)
    proposal = made.propose(first=3)
    full = collect(made.epoch, proposal, made.announce(proposal))
    made.announce(full)
    Enrolment(made.member(8).state).begin(full, full.digest.hex())
    made.round(made.epoch, FOUNDERS)
    blind = replace(full, entries=tuple(replace(entry, epoch=0) for entry in full.entries))
    members = [index for index in EVERYONE if index != 3]
    with pytest.raises(RoundAborted, match=r"threshold is 5; with 8 holders and 2 corrupt"):
        made.round(blind, members)
    made.round(full, members)
    assert made.survivors() == tuple(members)


def test_announcement_in_the_middle_of_an_attempt_disturbs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Growing(tmp_path, monkeypatch)
    member = made.member(0)
    made.open(made.epoch, 0)
    stored = Seat(member.state).machine
    proposal = made.propose(first=4)
    made.announce(collect(made.epoch, proposal, made.announce(proposal)))
    made.open(made.epoch, 0)  # repeated byte for byte, as the reply was kept
    assert Seat(member.state).machine == stored is not None
    roster, _ = Enrolment(member.state).standing((made.epoch.roster, POLICY), made.run_id, 1)
    assert roster == made.epoch.roster


def test_member_without_epochs_answers_no_announcement(tmp_path: Path) -> None:
    made = federation(tmp_path)
    member = made.users.member(made.grid.node(node_id(0)).context)
    epoch = found(AUTHORITY, made.runtime.roster.members)
    with pytest.raises(RefusedByPolicy, match="pinned a roster that has no epochs"):
        Handler(member).answer(ROSTER, write_request(EpochAnnounced(epoch)))
