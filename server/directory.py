"""Which Flower node answers for which member.

Flower starts a ServerApp before its nodes are there, so the first round would see a part of them:
nothing is sampled before every member has been heard of.
"""

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from flwr.app import ConfigRecord, RecordDict
from flwr.serverapp import Grid

from fedoppu.common.errors import DeadlineExceeded, ProtocolError
from fedoppu.common.messages import HELLO
from fedoppu.server.exchange import Exchanger


class Directory(Protocol):
    """Finds the members of a federation on a Grid."""

    def members(self, grid: Grid) -> Mapping[int, int]:
        """Member: node id.

        Raises:
            DeadlineExceeded: Too few members came in time.
        """


@dataclass(frozen=True)
class HelloDirectory:
    """Asks every node which member it is (`query.hello`) and waits until all are there.

    What a node says is only an address: keys, shares and vectors are signed by the member, so a
    node that lies learns nothing. It can keep a member from taking part, and a run from beginning
    (by claiming a member that another node claims too).

    Attributes:
        expected: Members to wait for.
        deadline: Seconds to wait for all of them.
        poll: Seconds between two looks.
        clock: Seconds, monotonic.
    """

    expected: Collection[int] = field(repr=False)
    deadline: float = 120.0
    poll: float = 0.1
    clock: Callable[[], float] = time.monotonic

    def members(self, grid: Grid) -> Mapping[int, int]:
        """Member: node id.

        Raises:
            DeadlineExceeded: Not all members came in time; the message says how many did.
            ProtocolError: Two nodes say that they are the same member.
        """
        end = self.clock() + self.deadline
        found: dict[int, int] = {}
        asked: set[int] = set()
        while True:
            new = sorted(set(grid.get_node_ids()) - asked)
            asked |= set(new)
            for node, member in self._ask(grid, new, end).items():
                if member in found:
                    raise ProtocolError(
                        f"nodes {found[member]} and {node} both say that they are member {member}",
                        hint="each member runs one node: stop the other",
                    )
                found[member] = node
            missing = sorted(set(self.expected) - set(found))
            if not missing:
                return {member: found[member] for member in sorted(self.expected)}
            if self.clock() > end:
                raise self._too_late(len(found), missing)
            time.sleep(self.poll)

    def _ask(self, grid: Grid, nodes: Collection[int], end: float) -> dict[int, int]:
        if not nodes:
            return {}
        left = max(end - self.clock(), self.poll)
        exchanger = Exchanger(grid, {node: node for node in nodes}, left, self.poll, self.clock)
        requests = {node: RecordDict({"event": ConfigRecord()}) for node in nodes}
        answers = exchanger.exchange(HELLO, requests, group="0")
        expected = set(self.expected)
        replies = {node: reply.member for node, reply in answers.replies.items()}
        return {node: member for node, member in replies.items() if member in expected}

    def _too_late(self, count: int, missing: Collection[int]) -> DeadlineExceeded:
        some = ", ".join(str(member) for member in list(missing)[:10])
        return DeadlineExceeded(
            f"{count} of {len(self.expected)} members answered within {self.deadline:g} s; "
            f"missing: {some}{', ...' if len(missing) > 10 else ''}",
            hint="start the missing clients, or raise the deadline",
        )


@dataclass(frozen=True)
class FixedDirectory:
    """A directory that is known beforehand.

    Attributes:
        nodes: Member: node id.
    """

    nodes: Mapping[int, int] = field(repr=False)

    def members(self, grid: Grid) -> Mapping[int, int]:
        """Member: node id."""
        return self.nodes
