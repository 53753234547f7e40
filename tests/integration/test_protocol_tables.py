"""The tables of docs/protocol.md say what the code does: each field's name, type and bounds, each state.

Bounds are not compared with constants: a message is made, one field is set out of its bounds, and what the reader says
it takes is what the page must say.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict

from fedoppu.client import secagg as client
from fedoppu.common.epochs import EpochAnnounced, EpochAnswer
from fedoppu.common.errors import ProtocolError
from fedoppu.common.messages import (
    Hello,
    Opening,
    PlainUpdate,
    ReplyCode,
    Request,
    SealedTraining,
    Training,
    payload_bytes,
    read_mask_request,
    read_mask_sum,
    read_reply,
    read_request,
    write_mask_request,
    write_mask_sum,
    write_reply,
    write_request,
)
from fedoppu.common.plan_fields import PLAN_FIELDS
from fedoppu.common.rounds import (
    Exchange,
    Outgoing,
    RoundOpened,
    ServerEvent,
    SharesDelivered,
    SumReady,
)
from fedoppu.server import secagg as server
from tests import rosters
from tests.integration.secagg_harness import Federation
from tests.integration.two_server_harness import TwoServers

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "protocol.md").read_text()
CONFIG, MODEL = b'{"a":1}', np.ones(3, np.float32)
Rows = list[list[str]]


def table(heading: str, level: int = 4) -> Rows:
    """The rows of the first table under a heading; none where the next heading comes first."""
    _, _, after = PAGE.partition(f"\n{'#' * level} {heading}\n")
    assert after, f"no heading {heading}"
    section = after.split("\n#")[0]
    lines = [line for line in section.split("\n\n") if line.lstrip().startswith("| ")]
    if not lines:
        return []
    rows = [
        [cell.strip() for cell in line.split(" | ")] for line in lines[0].split("\n")[2:] if line
    ]
    return [[cell.strip("| ") for cell in row] for row in rows]


def bound(text: str) -> int:
    base, _, power = text.partition("^")
    return int(base) ** int(power) if power else int(text.replace(",", ""))


# --- one message of each kind ----------------------------------------------------------------------


@cache
def requests() -> Mapping[str, RecordDict]:
    """A server's messages, hybrid, with a drop, so that no list is empty."""
    federation, made = _federation(), dict[str, Request]()
    follows: Any = federation.server.pending()
    while isinstance(stage := federation.server.stage, Exchange):
        made[stage.value] = _request(follows[2].event)  # it stays, and lower members offer to it
        follows = federation.step(follows)
    epoch = rosters.completed(rosters.founded(), rosters.proposed(rosters.founded()))
    made["query.roster"] = EpochAnnounced(epoch)
    made["train.sealed"] = SealedTraining(RoundOpened(TwoServers().plan), CONFIG, MODEL)
    return {stage: write_request(request) for stage, request in made.items()}


def _request(event: ServerEvent) -> Request:
    if isinstance(event, RoundOpened):
        return Opening(event, CONFIG)
    return Training(event, MODEL) if isinstance(event, SharesDelivered) else event


@cache
def replies() -> Mapping[str, RecordDict]:
    """A client's messages, of member 0, who offers a pair secret to all others."""
    federation = _federation()
    federation.run()
    names = [stage.value for stage in Exchange]
    made = dict(zip(names, (e for e in federation.sent if e.member == 0), strict=True))
    written = {stage: write_reply(event) for stage, event in made.items()}
    return written | {
        "query.hello": write_reply(Hello(1)),
        "query.roster": write_reply(EpochAnswer(1, 1, bytes(64))),
        "train.sealed": write_reply(TwoServers().update(1)),
    }


def _federation() -> Federation:
    return Federation(4, hybrid=True, drops={Exchange.MASKED: frozenset({3})})


@cache
def helper() -> Mapping[str, RecordDict]:
    made = TwoServers()
    request = made.asking(range(5)).request()
    return {
        "request": write_mask_request(request),
        "answer": write_mask_sum(made.helper.answer(request)),
    }


def test_every_kind_of_message_is_on_the_page() -> None:
    told = set(re.findall(r"^#### Fields: `([\w.]+)` (\w+)$", PAGE, re.MULTILINE))
    wanted = {(stage, "down") for stage in requests()} | {(stage, "up") for stage in replies()}
    assert told == wanted | {
        ("query.hello", "down"),
        ("helper.sum", "request"),
        ("helper.sum", "answer"),
    }
    assert PlainUpdate.__name__ in PAGE  # named as what is not specified


Reader = Callable[[RecordDict], object]


def messages() -> list[tuple[str, RecordDict, Reader]]:
    found: list[tuple[str, RecordDict, Reader]] = []
    for stage, content in requests().items():
        found.append((f"`{stage}` down", content, lambda c, s=stage: read_request(s, c)))  # type: ignore[misc]
    for stage, content in replies().items():
        found.append((f"`{stage}` up", content, lambda c, s=stage: read_reply(s, c, "member 0")))  # type: ignore[misc]
    found.append(("`helper.sum` request", helper()["request"], read_mask_request))
    found.append(("`helper.sum` answer", helper()["answer"], read_mask_sum))
    return found


MESSAGES = {name: (content, read) for name, content, read in messages()}
WITH_PLAN = ("`query.keys` down", "`train.sealed` down", "`helper.sum` request")


def rows_of(name: str) -> Rows:
    return [*(table("Fields: plan") if name in WITH_PLAN else []), *table(f"Fields: {name}")]


FIELDS = [(name, row[0].strip("`"), row[1]) for name in MESSAGES for row in rows_of(name)]


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_has_the_fields_of_its_table_and_no_other(name: str) -> None:
    content, read = MESSAGES[name]
    assert {row[0].strip("`") for row in rows_of(name)} == set(_event(content))
    read(content)
    with pytest.raises(ProtocolError, match="1 unknown fields"):
        read(_with(content, "surplus", 1))


def test_the_plan_has_the_fields_of_its_table() -> None:
    assert {row[0].strip("`") for row in table("Fields: plan")} == set(PLAN_FIELDS)


def test_a_hello_has_no_field_down() -> None:
    assert table("Fields: `query.hello` down") == []


def _event(content: RecordDict) -> dict[str, Any]:
    record = content["event"]
    assert isinstance(record, ConfigRecord)
    return dict(record)


def _with(content: RecordDict, name: str, value: Any) -> RecordDict:
    changed = RecordDict(dict(content))
    changed["event"] = ConfigRecord(_event(content) | {name: value})
    return changed


def refusal(name: str, field: str, value: Any) -> str:
    content, read = MESSAGES[name]
    with pytest.raises(ProtocolError, match=f"field {field} ") as caught:
        read(_with(content, field, value))
    return str(caught.value)


def asks_for_order(name: str, field: str, value: list[int]) -> bool:
    content, read = MESSAGES[name]
    try:
        read(_with(content, field, value))
    except ProtocolError as error:
        return f"field {field} must be strictly ascending" in str(error)
    return False


@pytest.mark.parametrize(("name", "field", "kind"), FIELDS)
def test_a_field_has_the_type_and_bounds_of_its_table(name: str, field: str, kind: str) -> None:
    sample = _event(MESSAGES[name][0])[field]
    word, *sizes = re.findall(r"^(?:list of )?\w+|[\d^]+", kind)
    low, high = (bound(sizes[0]), bound(sizes[-1])) if sizes else (0, 0)
    match word:
        case "int":
            assert f"between {low} and {high}," in refusal(name, field, low - 1)
            assert "must be an integer" in refusal(name, field, b"")
        case "float":
            assert "must be finite" in refusal(name, field, float("inf"))
            assert "must be a float" in refusal(name, field, 1)
        case "bytes":
            size = f"{low}" if low == high else f"{low} to {high}"
            assert f"must have {size} bytes" in refusal(name, field, bytes(high + 1))
        case "members":
            assert "strictly ascending" in refusal(name, field, [1, 0])
            assert "integers from 0 to 1048576" in refusal(name, field, [(1 << 20) + 1])
        case "ints":
            assert sample, "an empty list shows nothing"
            assert "integers from 0 to 1048576" in refusal(name, field, [-1] * len(sample))
            assert not asks_for_order(name, field, [*range(len(sample), 0, -1)])
        case "list of bytes":
            size = f"{low}" if low == high else f"{low} to {high}"
            wrong = [bytes(high + 1)] * len(sample)
            assert sample, "an empty list shows nothing"
            assert f"must have {size} bytes" in refusal(name, field, wrong)
        case "packed":
            assert "shortest form" in refusal(name, field, b"\x80\x00")
        case _:
            pytest.fail(f"the table of {name} has an unknown type, {kind}")


# --- states and codes ------------------------------------------------------------------------------


def test_states_of_the_client_are_those_of_the_code() -> None:
    told = {}
    for phase, takes, to in table("States: client"):
        names = re.findall(r"`(\w+)`", takes)
        told[phase.strip("`")] = {name: tuple(re.findall(r"`(\w+)`", to)) for name in names}
    assert told == {
        phase.value: {kind.__name__: tuple(p.value for p in to) for kind, to in kinds.items()}
        for phase, kinds in client.TRANSITIONS.items()
    }


def test_states_of_the_server_are_those_of_the_code() -> None:
    told = {
        row[0].strip("`"): (row[1].strip("`"), row[3].strip("`")) for row in table("States: server")
    }
    assert told == {
        stage.value: (kind.__name__, after.value)
        for stage, (kind, after) in server.TRANSITIONS.items()
    }


def test_codes_of_errors_are_those_of_the_code() -> None:
    told = re.findall(r"^\| (\d{4}) \|.*?([A-Z]{2,})", PAGE.split("Reply", 1)[1], re.MULTILINE)
    assert {name: int(code) for code, name in told} == {code.name: code.value for code in ReplyCode}


# --- sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("hybrid", [False, True])
def test_sizes_of_a_round_are_those_of_the_table(hybrid: bool) -> None:
    """The lowest and the highest member, without config, model and words."""
    federation = Federation(55, hybrid=hybrid, drops={Exchange.MASKED: frozenset({27})})
    told = [[row[0].strip("`"), *row[3 if hybrid else 1 :][:2]] for row in table("Sizes", level=2)]
    found, follows = [], _messages(federation.server.pending())
    while isinstance(stage := federation.server.stage, Exchange):
        before = len(federation.sent)
        ends = [write_request(_request(follows[place].event)) for place in (0, -1)]
        answers = federation.step(follows)
        replies_ = {event.member: write_reply(event) for event in federation.sent[before:]}
        up = [_size(replies_[member]) for member in (0, 54)]
        found.append([stage.value, _range(map(_size, ends)), _range(up)])
        follows = _messages(answers)
    assert found == told


def _messages(follows: Sequence[Outgoing | SumReady]) -> list[Outgoing]:
    return [each for each in follows if isinstance(each, Outgoing)]


def _size(content: RecordDict) -> int:
    fields = _event(content)
    return payload_bytes(RecordDict({"event": content["event"]})) - len(fields.get("config", b""))


def _range(sizes: Iterable[int]) -> str:
    return " to ".join(f"{size:,}" for size in sorted(set(sizes)))
