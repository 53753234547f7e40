"""What a handler does around the protocol: two messages at once, the privacy ledger, the two-server mode."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Barrier, Lock, Thread
from typing import Any

import numpy as np
import pytest
from flwr.app import RecordDict

from fedoppu.client.handler import Dropped, Handler
from fedoppu.client.jobs import LocalUpdate
from fedoppu.client.policy import ClientPolicy
from fedoppu.client.release import release as real_release
from fedoppu.common.config import FederationConfig, ResearchSettings, SecAggSettings
from fedoppu.common.errors import ProtocolError, RefusedByPolicy
from fedoppu.common.messages import (
    Opening,
    SealedTraining,
    Training,
    pack,
    read_reply,
    write_request,
)
from fedoppu.common.randomness import Randomness
from fedoppu.common.rounds import (
    CohortFixed,
    RoundOpened,
    RoundPlan,
    SharesDelivered,
    SurvivorsProposed,
)
from fedoppu.common.shared_adapter import sent_down
from fedoppu.common.two_server import SealedUpdate
from fedoppu.server.checkpoint import AttemptState
from fedoppu.server.exchange import Exchanger
from fedoppu.server.rounds import Rounds, Standing
from fedoppu.simulations.grid import node_id
from fedoppu.simulations.helper import pinned_helper
from tests.fake_federation import CONFIG, Federation, federation

ROOT = Randomness.from_seed(3)


def two_server(config: FederationConfig = CONFIG, **changes: Any) -> FederationConfig:
    """The config in the two-server mode, with the simulation's helper pinned."""
    return pinned_helper(replace(config, secagg=SecAggSettings("two_server", **changes)), ROOT)


SEALED_CONFIG = two_server()


def plan_for(made: Federation, *, number: int = 1, attempt: int = 0, run_id: str = "") -> RoundPlan:
    """The plan that the federation's own server would make for its first five members."""
    runtime = made.runtime
    standing = Standing(number - 1, runtime.initial, 0.5, run_id or runtime.run_id)
    state = AttemptState(standing.run_id, number, attempt, (0, 1, 2, 3, 4))
    return Rounds(runtime, Exchanger(made.grid, {}))._plan(standing, state)


def sealed_training(made: Federation, plan: RoundPlan | None = None) -> RecordDict:
    shared = made.runtime.initial
    model = shared.spec.flatten(shared.tensors, sent_down(made.config.shared.aggregation))
    event = RoundOpened(plan or plan_for(made))
    return write_request(SealedTraining(event, made.config.canonical(), model))


def handler_of(made: Federation, member: int = 0) -> Handler:
    """A handler as the app makes one for each message."""
    context = made.grid.node(node_id(member)).context
    return Handler(made.users.member(context))


def seal(made: Federation, plan: RoundPlan | None = None, member: int = 0) -> RecordDict:
    return handler_of(made, member).answer("train.sealed", sealed_training(made, plan))


# --- the two-server mode --------------------------------------------------------------------------


@pytest.mark.parametrize("exchange", ["x25519", "hybrid"])
def test_one_message_holds_the_whole_round(tmp_path: Path, exchange: Any) -> None:
    made = federation(tmp_path, two_server(key_exchange=exchange))
    reply = read_reply("train.sealed", seal(made), "member 0")
    assert isinstance(reply, SealedUpdate)
    assert reply.member == 0


def test_reply_is_repeated_byte_for_byte(tmp_path: Path) -> None:
    made = federation(tmp_path, SEALED_CONFIG)
    assert pack(seal(made)) == pack(seal(made))


def test_round_counts_as_answered_before_the_message_goes_out(tmp_path: Path) -> None:
    made = federation(tmp_path, SEALED_CONFIG)
    handler = handler_of(made)

    def crash(*_: Any) -> None:
        raise OSError("the battery is empty")

    broken = replace(handler, runtime=Failing(handler.runtime, crash))
    with pytest.raises(OSError, match="the battery is empty"):
        broken.answer("train.sealed", sealed_training(made))
    last = handler.seat.last
    assert last is not None
    assert last.answered
    with pytest.raises(RefusedByPolicy, match="which this client took"):
        seal(made)


@dataclass(frozen=True)
class Failing:
    """A runtime whose store breaks when a reply is to be kept."""

    inner: Any
    crash: Callable[..., None]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    @property
    def state(self) -> Any:
        return self

    def get(self, key: str) -> bytes | None:
        found: bytes | None = self.inner.state.get(key)
        return found

    def put(self, key: str, value: bytes) -> None:
        if key == "reply":
            self.crash()
        self.inner.state.put(key, value)


def test_other_attempt_of_a_sent_round_is_refused(tmp_path: Path) -> None:
    made = federation(tmp_path, SEALED_CONFIG)
    seal(made)
    with pytest.raises(RefusedByPolicy, match="round 1 was answered at attempt 0"):
        seal(made, plan_for(made, attempt=1))


@pytest.mark.parametrize(("number", "run_id"), [(1, "cd" * 16), (2, "")])
def test_other_round_from_the_same_model_is_refused(
    tmp_path: Path, number: int, run_id: str
) -> None:
    made = federation(tmp_path, SEALED_CONFIG)
    seal(made)
    with pytest.raises(RefusedByPolicy, match="this client answered for task LaMP_3 and model"):
        seal(made, plan_for(made, number=number, run_id=run_id))


def test_config_with_another_helper_than_the_pinned_one_is_refused(tmp_path: Path) -> None:
    made = federation(tmp_path, SEALED_CONFIG)
    seal(made)
    plain = replace(CONFIG, secagg=SecAggSettings("two_server"))
    other = pinned_helper(plain, Randomness.from_seed(4))
    plan = replace(plan_for(made, number=2), config_hash=other.hash().hex(), model_hash="00" * 32)
    event = SealedTraining(RoundOpened(plan), other.canonical(), np.zeros(24, np.float32))
    with pytest.raises(RefusedByPolicy, match="which this client took part with"):
        handler_of(made).answer("train.sealed", write_request(event))


@pytest.mark.parametrize("helper", ["", "zz", "00" * 64])
def test_config_without_a_usable_helper_is_refused(tmp_path: Path, helper: str) -> None:
    config = replace(CONFIG, secagg=SecAggSettings("two_server", helper=helper))
    made = federation(tmp_path, SEALED_CONFIG)
    plan = replace(plan_for(made), config_hash=config.hash().hex())
    event = SealedTraining(RoundOpened(plan), config.canonical(), np.zeros(24, np.float32))
    with pytest.raises(ProtocolError, match="the federation's config pins no helper: secagg"):
        handler_of(made).answer("train.sealed", write_request(event))


def test_server_cannot_choose_the_mode(tmp_path: Path) -> None:
    graph, sealed = federation(tmp_path / "a"), federation(tmp_path / "b", SEALED_CONFIG)
    with pytest.raises(ProtocolError, match=r"secagg\.mode is graph: it has no messages of two"):
        handler_of(graph).answer("train.sealed", sealed_training(graph))
    opening = Opening(RoundOpened(plan_for(sealed)), sealed.config.canonical())
    with pytest.raises(ProtocolError, match=r"secagg\.mode is two_server: it has no messages of g"):
        handler_of(sealed).answer("query.keys", write_request(opening))


def test_federation_of_clear_updates_has_no_seeds(tmp_path: Path) -> None:
    made = federation(tmp_path, replace(SEALED_CONFIG, plain_updates=True))
    with pytest.raises(ProtocolError, match="has no exchange of keys or seeds"):
        seal(made)


def test_another_model_than_the_plans_is_refused(tmp_path: Path) -> None:
    made = federation(tmp_path, SEALED_CONFIG)
    with pytest.raises(ProtocolError, match="a server may have sent another model"):
        seal(made, replace(plan_for(made), model_hash="00" * 32))
    assert handler_of(made).seat.last is None


def test_noise_that_does_not_follow_from_the_config_is_refused(tmp_path: Path) -> None:
    made = federation(tmp_path, SEALED_CONFIG)
    with pytest.raises(ProtocolError, match=r"the plan's noise_scale is 3\.0, the federation's"):
        seal(made, replace(plan_for(made), noise_scale=3.0))


@pytest.mark.parametrize("value_range", [0.0, -1.0])
def test_senseless_range_is_refused_and_no_exception(tmp_path: Path, value_range: float) -> None:
    made = federation(tmp_path, SEALED_CONFIG)
    with pytest.raises((ProtocolError, RefusedByPolicy), match="range"):
        seal(made, replace(plan_for(made), value_range=value_range))


def test_simulated_drop_sends_nothing_and_counts_as_no_answer(tmp_path: Path) -> None:
    made = federation(tmp_path, SEALED_CONFIG, research=ResearchSettings(dropout=1.0))
    with pytest.raises(Dropped):
        seal(made)
    assert handler_of(made).seat.last is None


# --- the privacy ledger ---------------------------------------------------------------------------


@dataclass
class Ledger:
    """Remembers its charges, and refuses when it is told to."""

    refuses: bool = False
    charged: list[bytes] = field(default_factory=list)
    young: list[int] = field(default_factory=list)

    def charge(self, plan: RoundPlan, config: FederationConfig, *, young: int = 0) -> None:
        if self.refuses:
            raise RefusedByPolicy("the budget is spent")
        self.charged.append(plan.context)
        self.young.append(young)


def with_ledger(made: Federation, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(handler_of(made).runtime)
    monkeypatch.setattr(kind, "ledger", property(lambda self: ledger))


def released(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the vectors that are made, and how many charges there were then."""
    made: list[int] = []

    def release(update: LocalUpdate, plan: RoundPlan, dither: Randomness) -> Any:
        made.append(1)
        return real_release(update, plan, dither)

    monkeypatch.setattr("fedoppu.client.handler.release", release)
    return made


@pytest.mark.parametrize("config", [CONFIG, SEALED_CONFIG], ids=["graph", "two_server"])
def test_every_vector_is_charged_in_both_modes(
    tmp_path: Path, config: FederationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = federation(tmp_path, config)
    ledger = Ledger()
    with_ledger(made, ledger, monkeypatch)
    vectors = released(monkeypatch)
    made.run()
    assert len(ledger.charged) == len(vectors) == 10
    assert len(set(ledger.charged)) == 2


@pytest.mark.parametrize(
    ("config", "counted"), [(CONFIG, {1}), (SEALED_CONFIG, {2})], ids=["graph", "two_server"]
)
def test_ledger_is_told_how_many_young_members_may_add_no_noise(
    tmp_path: Path, config: FederationConfig, counted: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the cohort; in two-server rounds, whose set nobody shows, all of the roster."""
    made = federation(tmp_path, replace(config, cohort=8, rounds=1), young=frozenset({3}))
    ledger, member = Ledger(), made.users.member
    policy = replace(ClientPolicy.for_simulation(), young=frozenset({3, 99}))
    with_ledger(made, ledger, monkeypatch)
    monkeypatch.setattr(
        made.users, "member", lambda context: replace(member(context), policy=policy)
    )
    made.run()
    assert len(ledger.young) == 8
    assert set(ledger.young) == counted


def test_no_vector_is_made_when_the_budget_is_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = federation(tmp_path, SEALED_CONFIG)
    with_ledger(made, Ledger(refuses=True), monkeypatch)
    vectors = released(monkeypatch)
    with pytest.raises(RefusedByPolicy, match="the budget is spent"):
        seal(made)
    assert vectors == []
    assert handler_of(made).seat.last is None


# --- two messages at once -------------------------------------------------------------------------


class Meeting:
    """A lock that two threads reach together before either may take it: the worst interleaving."""

    def __init__(self) -> None:
        self.barrier, self.lock = Barrier(2, timeout=10), Lock()

    @contextmanager
    def held(self) -> Iterator[None]:
        self.barrier.wait()
        with self.lock:
            yield

    def before_storing(self) -> None:
        """Nothing: only one thread gets here."""


class NoLock(Meeting):
    """The control: nothing is held, and both have compared before either stores."""

    @contextmanager
    def held(self) -> Iterator[None]:
        yield

    def before_storing(self) -> None:
        self.barrier.wait()


def masked_member(made: Federation) -> Handler:
    """Member 0 of a graph round, after it has sent its masked vector."""
    plan = plan_for(made)
    opening = write_request(Opening(RoundOpened(plan), made.config.canonical()))
    adverts = [ask(made, "query.keys", opening, member) for member in range(5)]
    cohort = write_request(CohortFixed(tuple(adverts)))
    bundles = [ask(made, "query.shares", cohort, member) for member in range(5)]
    cut = {
        bundle.member: replace(
            bundle,
            packages={0: bundle.packages[0]},
            share_hashes={0: bundle.share_hashes[0]},
        )
        for bundle in bundles
        if bundle.member != 0
    }
    shared = made.runtime.initial
    model = shared.spec.flatten(shared.tensors, sent_down(made.config.shared.aggregation))
    training = write_request(Training(SharesDelivered((0, 1, 2, 3, 4), cut), model))
    ask(made, "train.masked", training, 0)
    return handler_of(made)


def ask(made: Federation, stage: Any, content: RecordDict, member: int) -> Any:
    reply = handler_of(made, member).answer(stage, content)
    return read_reply(stage, reply, f"member {member}")


def at_once(handler: Handler, lock: Meeting, stage: Any, contents: list[RecordDict]) -> list[Any]:
    """Answers to messages that come in two threads: a record, or the error."""
    runtime: Any = Locked(handler.runtime, lock)
    answers: list[Any] = [None, None]

    def answer(at: int) -> None:
        try:
            answers[at] = Handler(runtime).answer(stage, contents[at])
        except Exception as error:
            answers[at] = error

    threads = [Thread(target=answer, args=(at,)) for at in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


@dataclass(frozen=True)
class Locked:
    """A runtime with another lock, which is told before a state machine is stored."""

    inner: Any
    meeting: Meeting

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    @property
    def lock(self) -> Any:
        return self.meeting.held()

    @property
    def state(self) -> Any:
        return self

    def get(self, key: str) -> bytes | None:
        found: bytes | None = self.inner.state.get(key)
        return found

    def put(self, key: str, value: bytes) -> None:
        if key == "machine":
            self.meeting.before_storing()
        self.inner.state.put(key, value)


def survivor_requests() -> list[RecordDict]:
    everyone = (0, 1, 2, 3, 4)
    return [
        write_request(SurvivorsProposed(everyone, survivors))
        for survivors in (everyone, (0, 1, 2, 3))
    ]


def signatures(answers: list[Any]) -> int:
    return sum(isinstance(each, RecordDict) for each in answers)


def test_two_survivor_sets_at_once_get_one_signature(tmp_path: Path) -> None:
    handler = masked_member(federation(tmp_path))
    answers = at_once(handler, Meeting(), "query.consistency", survivor_requests())
    assert signatures(answers) == 1
    (error,) = [each for each in answers if isinstance(each, Exception)]
    assert isinstance(error, ProtocolError)
    assert "another message was answered meanwhile" in str(error)


def test_without_the_lock_two_survivor_sets_would_be_signed(tmp_path: Path) -> None:
    """The control."""
    handler = masked_member(federation(tmp_path))
    answers = at_once(handler, NoLock(), "query.consistency", survivor_requests())
    assert signatures(answers) == 2


def test_two_openings_at_once_get_one_advert(tmp_path: Path) -> None:
    made = federation(tmp_path)
    config = made.config.canonical()
    openings = [
        write_request(Opening(RoundOpened(plan_for(made, attempt=attempt)), config))
        for attempt in (0, 1)
    ]
    assert signatures(at_once(handler_of(made), Meeting(), "query.keys", openings)) == 1


def test_two_sealed_rounds_at_once_get_one_answer(tmp_path: Path) -> None:
    made = federation(tmp_path, SEALED_CONFIG)
    requests = [sealed_training(made, plan_for(made, attempt=attempt)) for attempt in (0, 1)]
    answers = at_once(handler_of(made), Meeting(), "train.sealed", requests)
    assert signatures(answers) == 1
    (error,) = [each for each in answers if isinstance(each, Exception)]
    assert isinstance(error, RefusedByPolicy)


def test_without_the_lock_two_sealed_rounds_would_be_answered(tmp_path: Path) -> None:
    """The control."""
    made = federation(tmp_path, SEALED_CONFIG)
    requests = [sealed_training(made, plan_for(made, attempt=attempt)) for attempt in (0, 1)]
    assert signatures(at_once(handler_of(made), NoLock(), "train.sealed", requests)) == 2


def test_members_do_not_wait_for_each_other(tmp_path: Path) -> None:
    made = federation(tmp_path)
    first, second = handler_of(made, 0).runtime.lock, handler_of(made, 1).runtime.lock
    assert first is handler_of(made, 0).runtime.lock
    assert first is not second
