"""What a client takes and what it refuses, message by message."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedoppu.client.app import MAX_REASON, build_client_app, place
from fedoppu.client.handler import Handler, MemberRuntime
from fedoppu.client.jobs import ClientFailure
from fedoppu.client.seat import Seat
from fedoppu.common.config import ResearchSettings
from fedoppu.common.errors import ClientFailed, ProtocolError
from fedoppu.common.messages import (
    Opening,
    PlainTraining,
    ReplyCode,
    Training,
    pack,
    read_reply,
    read_request,
    write_request,
)
from fedoppu.common.rounds import (
    RoundOpened,
    RoundPlan,
    SharesDelivered,
    SurvivorsProposed,
    UnmaskRequested,
)
from fedoppu.server.checkpoint import AttemptState
from fedoppu.server.exchange import Exchanger
from fedoppu.server.rounds import Rounds, Standing
from fedoppu.simulations.grid import node_id
from tests.fake_federation import CONFIG, SPEC, FakeExecutor, Federation, federation, shared_config

Change = Callable[[RecordDict], RecordDict]


def plan_for(made: Federation, *, number: int = 1, attempt: int = 0) -> RoundPlan:
    """The plan that the federation's own server would make for its first five members."""
    runtime = made.runtime
    standing = Standing(number - 1, runtime.initial, 0.5, runtime.run_id)
    state = AttemptState(runtime.run_id, number, attempt, (0, 1, 2, 3, 4))
    return Rounds(runtime, Exchanger(made.grid, {}))._plan(standing, state)


def ask(made: Federation, stage: str, content: RecordDict, member: int = 0) -> Message:
    """One message to one member, and its reply."""
    message = Message(content, dst_node_id=node_id(member), message_type=stage, group_id="1")
    replies = list(made.grid.send_and_receive([message]))
    assert len(replies) == 1
    return replies[0]


def opening(made: Federation, plan: RoundPlan | None = None, config: bytes = b"") -> RecordDict:
    event = RoundOpened(plan or plan_for(made))
    return write_request(Opening(event, config or made.config.canonical()))


def refusal(reply: Message) -> str:
    assert reply.has_error()
    assert reply.error.code == ReplyCode.REFUSED
    return reply.error.reason or ""


def test_hello_names_the_member(tmp_path: Path) -> None:
    made = federation(tmp_path)
    reply = ask(made, "query.hello", RecordDict({"event": ConfigRecord()}), member=6)
    assert read_reply("query.hello", reply.content, "node").member == 6
    assert [sent.kind for sent in made.users.outbox(6).sent] == ["query.hello"]


def test_advert_is_repeated_byte_for_byte(tmp_path: Path) -> None:
    made = federation(tmp_path)
    first, second = (ask(made, "query.keys", opening(made)) for _ in range(2))
    assert pack(first.content) == pack(second.content)
    assert len(made.users.outbox(0).sent) == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"config_hash": "00" * 32}, "the plan's config_hash is 0000"),
        ({"roster_hash": "00" * 32}, "the plan's roster_hash is 0000"),
        ({"factors": "AB"}, "the plan's factors is AB, the federation's is B"),
        ({"num_params": 23}, "the plan's num_params is 23, the federation's is 24"),
        ({"word_bits": 16, "level_bits": 8}, "the plan's word_bits is 16, the federation's is 32"),
        ({"level_bits": 20}, "the plan's level_bits is 20, the federation's is 16"),
        ({"max_weight": 9}, "the plan's max_weight is 9, the federation's is 8"),
        ({"value_range": 9.0}, "RefusedByPolicy: the plan's value_range is 9, the last was 0.5"),
        ({"clip": 100.0}, "ProtocolError: the plan's clip is 100.0, the federation's is 10.0"),
    ],
)
def test_plan_that_does_not_fit_is_refused_and_named(
    tmp_path: Path, changes: Mapping[str, Any], reason: str
) -> None:
    made = federation(tmp_path)
    reply = ask(made, "query.keys", opening(made, replace(plan_for(made), **changes)))
    assert reason in refusal(reply)
    assert made.users.member(context(made, 0)).state.get("machine") is None


def context(made: Federation, member: int) -> Any:
    return made.grid.node(node_id(member)).context


def test_malformed_message_is_refused_with_stage_and_field(tmp_path: Path) -> None:
    made = federation(tmp_path)
    content = opening(made)
    content.config_records["event"]["diary"] = "dear diary"
    reason = refusal(ask(made, "query.keys", content))
    assert "query.keys of the server: 1 unknown fields" in reason
    assert "dear" not in reason


def test_another_base_is_refused_with_both_hashes(tmp_path: Path) -> None:
    config = replace(CONFIG, base_hash="cd" * 32)
    made = federation(tmp_path, config)
    reason = refusal(ask(made, "query.keys", opening(made)))
    assert "the federation's base is cdcdcdcdcdcd, this client has abababababab" in reason


def test_second_config_is_refused(tmp_path: Path) -> None:
    made = federation(tmp_path)
    ask(made, "query.keys", opening(made))
    other = replace(CONFIG, k=3)
    plan = replace(plan_for(made, number=2), config_hash=other.hash().hex())
    reason = refusal(ask(made, "query.keys", opening(made, plan, other.canonical())))
    assert "is not" in reason
    assert "which this client took part with" in reason


@pytest.mark.parametrize(("number", "attempt"), [(2, 0), (1, 3), (2, 1)])
def test_only_a_higher_triple_is_taken(tmp_path: Path, number: int, attempt: int) -> None:
    made = federation(tmp_path)
    ask(made, "query.keys", opening(made, plan_for(made, number=2, attempt=1)))
    plan = replace(plan_for(made, number=number, attempt=attempt), value_range=0.6)
    assert "which this client took" in refusal(ask(made, "query.keys", opening(made, plan)))


def test_triple_is_stored_before_keys_are_sent(tmp_path: Path) -> None:
    made = federation(tmp_path)
    ask(made, "query.keys", opening(made, plan_for(made, number=2, attempt=1)))
    last = Seat(made.users.member(context(made, 0)).state).last
    assert last is not None
    assert (last.round, last.attempt, last.answered) == (2, 1, False)


@pytest.mark.parametrize(
    ("stage", "content"),
    [
        (
            "train.masked",
            write_request(Training(SharesDelivered((), {}), np.zeros(24, np.float32))),
        ),
        ("query.consistency", write_request(SurvivorsProposed((0,), (0,)))),
        ("query.unmask", write_request(UnmaskRequested({}))),
    ],
)
def test_message_without_an_attempt_is_refused(
    tmp_path: Path, stage: str, content: RecordDict
) -> None:
    made = federation(tmp_path)
    reason = refusal(ask(made, stage, content))
    assert "no attempt is under way" in reason
    (sent,) = made.users.outbox(0).sent
    assert (sent.kind, sent.size) == (f"{stage} error", len(reason))
    assert sent.digest == hashlib.sha256(reason.encode()).hexdigest()


def test_message_out_of_order_is_refused(tmp_path: Path) -> None:
    made = federation(tmp_path)
    ask(made, "query.keys", opening(made))
    reply = ask(made, "query.unmask", write_request(UnmaskRequested({})))
    assert "UnmaskRequested does not belong after advertised" in refusal(reply)


class Meddling:
    """A Grid in which a test changes the messages of a stage."""

    def __init__(self, inner: Any, stage: str, change: Change) -> None:
        self.inner, self.stage, self.change = inner, stage, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def push_messages(self, messages: Any) -> Any:
        pushed = list(messages)
        for message in pushed:
            if message.metadata.message_type == self.stage:
                message.content = self.change(message.content)
        return self.inner.push_messages(pushed)


def meddle(stage: str, change: Change) -> Any:
    return lambda grid: Meddling(grid, stage, change)


def another_model(content: RecordDict) -> RecordDict:
    request = read_request("train.masked", content)
    assert isinstance(request, Training)
    return write_request(Training(request.event, request.model + np.float32(1)))


def test_another_model_than_the_plan_names_is_refused_before_anything_is_sent(
    tmp_path: Path,
) -> None:
    made = federation(tmp_path, wrap_grid=meddle("train.masked", another_model))
    with pytest.raises(Exception, match="a server may have sent another model to this client"):
        made.run()
    assert all(
        "train.masked" not in [sent.kind for sent in made.users.outbox(member).sent]
        for member in range(8)
    )


def test_another_run_from_an_answered_model_is_refused(tmp_path: Path) -> None:
    made = federation(tmp_path, replace(CONFIG, rounds=1, cohort=8))
    made.run()
    plan = replace(plan_for(made), run_id="cd" * 16)
    reason = refusal(ask(made, "query.keys", opening(made, plan)))
    assert "in another run; two sums from one model reveal their difference" in reason


def test_answered_round_takes_no_other_attempt(tmp_path: Path) -> None:
    made = federation(tmp_path, replace(CONFIG, rounds=1, cohort=8))
    made.run()
    plan = plan_for(made, attempt=1)
    assert "round 1 was answered at attempt 0" in refusal(
        ask(made, "query.keys", opening(made, plan))
    )


@pytest.mark.parametrize("answered", [True, False])
def test_run_that_a_server_returns_to_is_remembered(tmp_path: Path, answered: bool) -> None:
    made = federation(tmp_path, replace(CONFIG, rounds=1, cohort=8))
    if answered:
        made.run()
    else:
        ask(made, "query.keys", opening(made, plan_for(made, attempt=1)))
    other = replace(plan_for(made), run_id="cd" * 16, model_hash="ef" * 32)
    assert not ask(made, "query.keys", opening(made, other)).has_error()
    back = opening(made, replace(plan_for(made, attempt=1), value_range=0.6))
    expected = "answered at attempt 0" if answered else "not after round 1 attempt 1"
    assert expected in refusal(ask(made, "query.keys", back))


def test_refused_plan_pins_no_config(tmp_path: Path) -> None:
    made = federation(tmp_path)
    other = replace(CONFIG, k=3)
    plan = replace(plan_for(made), config_hash=other.hash().hex(), value_range=50.0)
    assert "value_range" in refusal(ask(made, "query.keys", opening(made, plan, other.canonical())))
    assert not ask(made, "query.keys", opening(made)).has_error()


class Stopped(Exception):
    """The server is gone."""


def training_of_member_zero(tmp_path: Path) -> tuple[Federation, RecordDict]:
    """A federation in which training was about to be asked for, and what was to be sent."""
    captured: list[RecordDict] = []

    def capture(content: RecordDict) -> RecordDict:
        captured.append(content)
        raise Stopped

    config = replace(CONFIG, rounds=1, cohort=8)
    made = federation(tmp_path, config, wrap_grid=meddle("train.masked", capture))
    with pytest.raises(Stopped):
        made.run()
    return made, captured[0]


class Overtaken:
    """A member in whose training another message is answered."""

    def __init__(self, inner: Any, content: RecordDict) -> None:
        self.inner, self.content = inner, content

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def update(self, *arguments: Any) -> Any:
        Handler(self.inner).answer("train.masked", self.content)
        return self.inner.update(*arguments)


def test_message_that_another_overtook_is_not_answered(tmp_path: Path) -> None:
    """Else a long training would bring back a state whose secrets were revealed meanwhile."""
    made, content = training_of_member_zero(tmp_path)
    member = made.users.member(context(made, 0))
    with pytest.raises(ProtocolError, match="another message was answered meanwhile"):
        Handler(Overtaken(member, content)).answer("train.masked", content)
    assert [sent.kind for sent in made.users.outbox(0).sent].count("train.masked") == 1
    first = Handler(member).answer("train.masked", content)
    assert pack(first) == pack(Handler(member).answer("train.masked", content))


def test_member_outside_the_survivor_set_takes_no_more_part(tmp_path: Path) -> None:
    def without_member(content: RecordDict) -> RecordDict:
        request = read_request("query.consistency", content)
        assert isinstance(request, SurvivorsProposed)
        return write_request(SurvivorsProposed(request.dealers, request.survivors[1:]))

    config = replace(CONFIG, rounds=1, cohort=8)
    made = federation(tmp_path, config, wrap_grid=meddle("query.consistency", without_member))
    with pytest.raises(Exception, match="signed the survivor set"):
        made.run()
    told = [failure for failure in made.users.failures if failure.startswith("member 0")]
    assert "not in the survivor set" in told[0]


def test_error_of_training_is_told_without_its_message(tmp_path: Path) -> None:
    def broken(member: int, plan: RoundPlan) -> ClientFailure:
        return ClientFailure(str(member), "DataError: dear diary")

    made = federation(tmp_path, executor=FakeExecutor(broken), tolerate_failures=True)
    with pytest.raises(
        Exception, match=r"failed in train\.masked \(ClientFailed at runtime\.py:\d+\)"
    ):
        made.run()
    assert "dear diary" in made.users.failures[0]


@pytest.mark.parametrize("stage", ["query.hello", "query.keys", "train.masked"])
def test_error_before_there_is_a_member_is_told_without_its_message(
    stage: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def member(self, context: Context) -> MemberRuntime:
            raise ValueError("dear diary")

    message = Message(RecordDict(), dst_node_id=1, message_type=stage, group_id="1")
    state = Context(1, 1, {}, RecordDict(), {})
    reply = build_client_app(Broken())(message, state)
    assert reply.error.code == ReplyCode.FAILED
    assert (reply.error.reason or "").startswith("ValueError at test_app.py:")
    assert "dear diary" in caplog.text  # on this side alone


def test_place_names_the_error_and_our_line_alone() -> None:
    with pytest.raises(AttributeError) as caught:
        Seat(None).last  # type: ignore[arg-type] # noqa: B018
    assert place(caught.value).startswith("AttributeError at seat.py:")
    assert place(ClientFailed("dear diary")) == "ClientFailed"


def plain_request(made: Federation) -> RecordDict:
    model = SPEC.flatten(made.runtime.initial.tensors, ("B",))
    event = RoundOpened(plan_for(made))
    return write_request(PlainTraining(event, made.config.canonical(), model))


def test_error_line_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(self: Handler, stage: str, content: RecordDict) -> RecordDict:
        raise ProtocolError("the server sent " + "x" * 5000)

    monkeypatch.setattr(Handler, "answer", answer)
    made = federation(tmp_path)
    reason = refusal(ask(made, "query.keys", opening(made)))
    assert len(reason) == MAX_REASON == 300
    assert reason.startswith("ProtocolError: the server sent xxx")
    (sent,) = made.users.outbox(0).sent
    assert sent.size == 300
    assert len(made.users.failures[0]) > 5000  # this side keeps it whole


def test_simulated_drop_has_a_code_of_its_own(tmp_path: Path) -> None:
    config = replace(CONFIG, plain_updates=True)
    made = federation(tmp_path, config, research=ResearchSettings(dropout=1.0))
    assert ask(made, "train.plain", plain_request(made)).error.code == ReplyCode.DROPPED


def test_clear_update_is_refused_where_the_federation_does_not_say_so(tmp_path: Path) -> None:
    made = federation(tmp_path)
    assert "sends no update in clear" in refusal(ask(made, "train.plain", plain_request(made)))


def test_clear_update_is_refused_where_the_owner_does_not_allow_it(tmp_path: Path) -> None:
    made = federation(tmp_path, replace(CONFIG, plain_updates=True))
    made.users.federation = replace(made.members, config=CONFIG)
    assert "sends no update in clear" in refusal(ask(made, "train.plain", plain_request(made)))


def test_federation_of_clear_updates_has_no_keys(tmp_path: Path) -> None:
    made = federation(tmp_path, replace(CONFIG, plain_updates=True))
    assert "has no exchange of keys or seeds" in refusal(ask(made, "query.keys", opening(made)))


def test_clear_update_is_clipped_and_its_weight_bounded(tmp_path: Path) -> None:
    config = replace(CONFIG, plain_updates=True, encoding=replace(CONFIG.encoding, clip=0.01))
    made = federation(tmp_path, config)
    reply = ask(made, "train.plain", plain_request(made), member=7)
    update: Any = read_reply("train.plain", reply.content, "member 7")
    assert np.linalg.norm(update.vector) == pytest.approx(0.01, rel=1e-4)
    assert (update.weight, update.held_out, update.held_out_loss) == (8, True, 8.0)


def test_alternating_federation_sends_the_other_factor_in_even_rounds(tmp_path: Path) -> None:
    made = federation(tmp_path, shared_config(aggregation="alternating"))
    plan = replace(plan_for(made, number=2), factors="B")
    assert "factors is B, the federation's is A" in refusal(
        ask(made, "query.keys", opening(made, plan))
    )


def test_stored_reply_is_not_given_for_another_request(tmp_path: Path) -> None:
    made = federation(tmp_path)
    store = made.users.member(context(made, 0)).state
    seat, request = Seat(store), RecordDict({"event": ConfigRecord({"a": 1})})
    reply = RecordDict({"event": ConfigRecord({"b": 2})})
    seat.keep("query.keys", request, reply)
    assert seat.repeat("query.keys", request) == reply
    assert seat.repeat("query.shares", request) is None
    assert seat.repeat("query.keys", RecordDict({"event": ConfigRecord({"a": 2})})) is None
