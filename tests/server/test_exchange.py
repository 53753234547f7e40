"""One exchange: each member's reply, or why there is none."""

from collections.abc import Iterable

import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict

from fedoppu.common.errors import ClientFailed
from fedoppu.common.messages import Hello, ReplyCode, Stage, write_reply
from fedoppu.common.rounds import SurvivorSignature
from fedoppu.server.exchange import Answers, Exchanger, Fault
from fedoppu.server.tally import Tally
from fedoppu.simulations.grid import LocalGrid, Unprepared, node_id

STAGE: Stage = "query.consistency"


def answer(message: Message, context: Context) -> Message:
    """Member 0 answers, 1 drops, 2 refuses, 3 fails, 4 is malformed, 5 names another, 6 raises."""
    member = int(context.node_config["partition-id"])
    errors = {
        1: Error(ReplyCode.DROPPED, "simulated"),
        2: Error(ReplyCode.REFUSED, "RefusedByPolicy: \x1b\u202eno\nand more"),
        3: Error(ReplyCode.FAILED, "KeyError at x.py:1"),
        7: Error(5, "node unavailable"),
        8: Error(2, None),
    }
    if member in errors:
        return Message(errors[member], reply_to=message)
    if member == 4:
        return Message(RecordDict({"event": ConfigRecord({"diary": "x"})}), reply_to=message)
    if member == 6:
        raise KeyError("dear diary")
    signer = 0 if member == 5 else member
    return Message(write_reply(SurvivorSignature(signer, b"s" * 64)), reply_to=message)


def exchange(grid: LocalGrid, members: Iterable[int], deadline: float = 5) -> Answers:
    nodes = {member: node_id(member) for member in range(9)}
    contents = {member: RecordDict({"event": ConfigRecord({"a": b"xy"})}) for member in members}
    return Exchanger(grid, nodes, deadline, poll=0.001).exchange(STAGE, contents, group="1")


def test_every_silence_has_its_kind_and_reason() -> None:
    answers = exchange(LocalGrid(answer, 9, Unprepared()), range(9))
    assert dict(answers.replies) == {0: SurvivorSignature(0, b"s" * 64)}
    kinds = {member: fault.silence for member, fault in answers.faults.items()}
    assert kinds == {
        1: "dropped",
        2: "refused",
        3: "failed",
        4: "malformed",
        5: "malformed",
        6: "failed",
        7: "gone",
        8: "failed",
    }
    assert answers.faults[2].reason == "RefusedByPolicy: no"  # without control characters
    assert answers.faults[5].reason == f"{STAGE} of member 5: names member 0"
    assert answers.faults[6].reason == "KeyError"
    assert answers.faults[8].reason == "no reason given"


def test_bytes_are_those_of_the_payload() -> None:
    answers = exchange(LocalGrid(answer, 9, Unprepared()), [0])
    assert (answers.bytes_up, answers.bytes_down) == (8 + 64, 2)


class Deaf(LocalGrid):
    """Pushes nothing to some nodes, as a Grid may that could not."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        kept = [each for each in messages if each.metadata.dst_node_id != node_id(1)]
        return super().push_messages(kept)


def test_message_that_was_not_pushed_is_late_at_once() -> None:
    answers = exchange(Deaf(answer, 9, Unprepared()), [0, 1], deadline=60)
    assert list(answers.replies) == [0]
    assert answers.faults[1].silence == "late"


class Mute(LocalGrid):
    """Never has a reply."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return []


def test_reply_that_does_not_come_is_late_at_the_deadline() -> None:
    answers = exchange(Mute(answer, 9, Unprepared()), [0], deadline=0.01)
    assert answers.faults[0] == Fault("late", "no reply before the deadline")


def test_exchange_with_nobody_is_empty() -> None:
    answers = exchange(LocalGrid(answer, 9, Unprepared()), [])
    assert answers == Answers({}, {}, 0, 0)


def test_tally_ends_the_run_at_a_failure_and_counts_the_others() -> None:
    tally = Tally()
    answers = exchange(LocalGrid(answer, 9, Unprepared()), range(9))
    with pytest.raises(
        ClientFailed, match=r"member 3 failed in .*KeyError at x.py:1 \(and 2 more\)"
    ):
        tally.add(STAGE, answers, tolerate_failures=False)
    tally.add(STAGE, answers, tolerate_failures=True)
    assert tally.drops == {STAGE: (1, 2, 3, 4, 5, 6, 7, 8)}
    assert tally.bytes_up == 2 * answers.bytes_up
    assert "member 1 dropped in query.consistency (simulated)" in tally.who()
    assert tally.who(most=2).endswith("and 6 more")


def test_tally_forgets_a_member_that_answered_the_second_time() -> None:
    tally = Tally()
    tally.add(STAGE, Answers({}, {3: Fault("late", "")}, 0, 0), tolerate_failures=False)
    signed = SurvivorSignature(3, b"s" * 64)
    tally.add(STAGE, Answers({3: signed}, {}, 0, 0), tolerate_failures=False)
    assert tally.drops == {}
    assert tally.who() == "nobody was missing"


def test_tally_begins_each_attempt_without_drops() -> None:
    tally = Tally()
    tally.name("query.keys", [4], {4: "sent a key of another member"})
    assert tally.drops == {"query.keys": (4,)}
    tally.begin(1)
    assert tally.drops == {}


def test_hello_may_name_any_member() -> None:
    def hello(message: Message, context: Context) -> Message:
        return Message(write_reply(Hello(42)), reply_to=message)

    grid = LocalGrid(hello, 1, Unprepared())
    nodes = {0: node_id(0)}
    contents = {0: RecordDict({"event": ConfigRecord()})}
    answers = Exchanger(grid, nodes, poll=0.001).exchange("query.hello", contents, group="0")
    assert dict(answers.replies) == {0: Hello(42)}
