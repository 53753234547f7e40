"""One exchange with the members of a cohort: messages out, replies in, over a Flower Grid.

A reply is attributed by the message that it answers, never by its sender's node id: Flower's own
Error replies for a vanished node come from the SuperLink.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedoppu.common.errors import ProtocolError
from fedoppu.common.messages import Reply, ReplyCode, Stage, payload_bytes, read_reply

# why a member did not answer; only the last two are its own fault
Silence = Literal["dropped", "gone", "late", "refused", "failed", "malformed"]
LATE: Silence = "late"


@dataclass(frozen=True)
class Fault:
    """Why a member gave no usable reply.

    Attributes:
        silence: dropped (simulated), gone (Flower lost the node), late (the deadline passed),
            refused (its own policy), failed (an exception), malformed (not of the wire form).
        reason: One line, without any of the member's data.
    """

    silence: Silence
    reason: str


@dataclass(frozen=True)
class Answers:
    """What came of an exchange.

    Attributes:
        replies: Member: its reply.
        faults: Member: why there is none.
        bytes_up: Of the replies.
        bytes_down: Of the messages.
    """

    replies: Mapping[int, Reply] = field(repr=False)
    faults: Mapping[int, Fault]
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True)
class Exchanger:
    """Exchanges messages with members.

    Attributes:
        grid: Flower's Grid.
        nodes: Member: node id.
        deadline: Seconds that a stage waits.
        poll: Seconds between two looks for replies.
        clock: Seconds, monotonic.
    """

    grid: Grid = field(repr=False)
    nodes: Mapping[int, int] = field(repr=False)
    deadline: float = 600.0
    poll: float = 0.05
    clock: Callable[[], float] = time.monotonic

    def exchange(self, stage: Stage, requests: Mapping[int, RecordDict], group: str) -> Answers:
        """Sends each member its message and waits for the replies, at most `deadline` seconds.

        Args:
            stage: Message type of all of them.
            requests: Member: its message.
            group: Flower's group id, the round.
        """
        messages = {
            member: Message(
                content, dst_node_id=self.nodes[member], message_type=stage, group_id=group
            )
            for member, content in requests.items()
        }
        down = sum(payload_bytes(content) for content in requests.values())
        return _sort(stage, sorted(requests), self._send(messages), down)

    def _send(self, messages: Mapping[int, Message]) -> dict[int, Message]:
        """Replies by member."""
        list(self.grid.push_messages(list(messages.values())))
        # the ids are read off the messages: a Grid may skip one that it could not push
        waiting = {
            message.metadata.message_id: member
            for member, message in messages.items()
            if message.metadata.message_id
        }
        end = self.clock() + self.deadline
        replies: dict[int, Message] = {}
        while waiting:
            for reply in self.grid.pull_messages(list(waiting)):
                member = waiting.pop(reply.metadata.reply_to_message_id, None)
                if member is not None:
                    replies[member] = reply
            if waiting and self.clock() > end:
                break
            if waiting:
                time.sleep(self.poll)
        return replies


def _sort(
    stage: Stage, members: Sequence[int], messages: Mapping[int, Message], down: int
) -> Answers:
    replies: dict[int, Reply] = {}
    faults: dict[int, Fault] = {}
    up = 0
    for member in members:
        if member not in messages:
            faults[member] = Fault(LATE, "no reply before the deadline")
            continue
        message = messages[member]
        if message.has_error():
            faults[member] = _fault(message)
            continue
        up += payload_bytes(message.content)
        reply = _read(stage, message, member)
        if isinstance(reply, Fault):
            faults[member] = reply
        else:
            replies[member] = reply
    return Answers(replies, faults, up, down)


def _read(stage: Stage, message: Message, member: int) -> Reply | Fault:
    try:
        reply = read_reply(stage, message.content, f"member {member}")
    except ProtocolError as error:
        return Fault("malformed", str(error))
    if reply.member != member and stage != "query.hello":
        return Fault("malformed", f"{stage} of member {member}: names member {reply.member}")
    return reply


_SILENCE: Mapping[int, Silence] = {
    ReplyCode.DROPPED: "dropped",
    ReplyCode.REFUSED: "refused",
    ReplyCode.FAILED: "failed",
    # Flower's: message, reply or node unavailable
    3: "gone",
    4: "gone",
    5: "gone",
}


def _fault(message: Message) -> Fault:
    error = message.error
    lines = (error.reason or "").splitlines() or ["no reason given"]
    # anything else of Flower's is an exception in the client's app or its process
    # the text is a stranger's: no control characters get to a terminal or a log
    reason = "".join(each for each in lines[0][:300] if each.isprintable())
    return Fault(_SILENCE.get(error.code, "failed"), reason)
