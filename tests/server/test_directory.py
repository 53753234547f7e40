"""Finding the members: nobody is sampled before all are there."""

from collections.abc import Iterable

import pytest
from flwr.app import Context, Error, Message

from fedoppu.common.errors import DeadlineExceeded, ProtocolError
from fedoppu.common.messages import Hello, ReplyCode, write_reply
from fedoppu.server.directory import FixedDirectory, HelloDirectory
from fedoppu.simulations.grid import LocalGrid, Unprepared, node_id


def hello(message: Message, context: Context) -> Message:
    member = int(context.node_config["partition-id"])
    return Message(write_reply(Hello(member)), reply_to=message)


class Slow(LocalGrid):
    """A Grid whose nodes appear one at a time, as in Flower's own engine."""

    seen = 0

    def get_node_ids(self) -> Iterable[int]:
        self.seen += 1
        return list(super().get_node_ids())[: self.seen]


def test_all_members_are_waited_for() -> None:
    grid = Slow(hello, 5, Unprepared())
    found = HelloDirectory(range(5), deadline=5, poll=0.001).members(grid)
    assert found == {member: node_id(member) for member in range(5)}
    assert grid.seen >= 5


def test_missing_members_are_named_at_the_deadline() -> None:
    grid = LocalGrid(hello, 3, Unprepared())
    with pytest.raises(DeadlineExceeded, match=r"3 of 5 members answered within 0\.02 s.*3, 4"):
        HelloDirectory(range(5), deadline=0.02, poll=0.001).members(grid)


def test_many_missing_members_are_cut_short() -> None:
    grid = LocalGrid(hello, 1, Unprepared())
    with pytest.raises(DeadlineExceeded, match=r"missing: 1, 2, .*, 10, \.\.\."):
        HelloDirectory(range(20), deadline=0.02, poll=0.001).members(grid)


def test_two_nodes_of_one_member_are_refused() -> None:
    def same(message: Message, context: Context) -> Message:
        return Message(write_reply(Hello(0)), reply_to=message)

    with pytest.raises(ProtocolError, match="nodes 1000 and 1001 both say that they are member 0"):
        HelloDirectory(range(2), deadline=1, poll=0.001).members(LocalGrid(same, 2, Unprepared()))


def test_nodes_of_strangers_are_left_out() -> None:
    found = HelloDirectory([1], deadline=1, poll=0.001).members(LocalGrid(hello, 4, Unprepared()))
    assert found == {1: node_id(1)}


def test_node_that_answers_with_an_error_is_no_member() -> None:
    def failing(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1:
            return Message(Error(ReplyCode.FAILED, "KeyError at app.py:1"), reply_to=message)
        return hello(message, context)

    grid = LocalGrid(failing, 2, Unprepared())
    with pytest.raises(DeadlineExceeded, match="1 of 2 members answered"):
        HelloDirectory(range(2), deadline=0.02, poll=0.001).members(grid)


def test_fixed_directory_asks_nobody() -> None:
    grid = LocalGrid(hello, 1, Unprepared())
    assert FixedDirectory({3: 7}).members(grid) == {3: 7}
