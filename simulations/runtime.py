"""The client side of a simulation: virtual users as members, and the groups in which they train.

A group is plain references (plan, members) and the round's model; a worker reads the vaults,
retrieves, tokenises and trains. Which members form a group depends on the cohort and `group_users`
alone, so the bytes of every update do too. Simulated drops happen after training, for the same
reason.

Not a device: identities, keys and rounding come from the run's seed, and the policy takes cohorts
of two.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from threading import Lock

import numpy as np
from flwr.app import ConfigRecord, Context, RecordDict
from numpy.typing import NDArray

from fedoppu.client.failure import describe
from fedoppu.client.jobs import ClientFailure, ClientJob, Example, LocalUpdate, TrainedAdapter
from fedoppu.client.ledger import VaultLedger
from fedoppu.client.policy import ClientPolicy
from fedoppu.client.secagg import KeySource
from fedoppu.client.vault import StateStore
from fedoppu.common.adapters import Adapter, AdapterSpec
from fedoppu.common.config import FederationConfig
from fedoppu.common.errors import ClientFailed, ProtocolError
from fedoppu.common.messages import (
    PLAIN,
    SEALED,
    Opening,
    Stage,
    Training,
    Whole,
    read_request,
)
from fedoppu.common.randomness import Randomness
from fedoppu.common.roster import Roster
from fedoppu.common.rounds import RoundPlan
from fedoppu.common.shared_adapter import initial_shared, rebuild_shared, sent_down, travelling
from fedoppu.common.signing import Identity
from fedoppu.server.directory import HelloDirectory
from fedoppu.server.helper import HelperLink
from fedoppu.server.runtime import Progress, ServerRuntime
from fedoppu.simulations.executors import GroupExecutor
from fedoppu.simulations.helper import simulated_helper
from fedoppu.simulations.key_source import GridMarker, SeededKeySource
from fedoppu.simulations.virtual_users import MemoryOutbox, MemoryState
from fedoppu.simulations.workers import Worker

RECENT = 256  # members whose keys are held
LEAST_HELD_OUT = 4  # fewer say nothing of a loss (spec of secure aggregation, rule 11)
# after training, so that a drop never changes a group
DROP_STAGES: tuple[Stage, ...] = ("train.masked", "query.consistency", "query.unmask")
WHOLE: tuple[Stage, ...] = (SEALED, PLAIN)  # a round in one message
STARTING = (
    900.0  # seconds that all members may take: Flower's engine starts slowly on a busy machine
)
Result = LocalUpdate | ClientFailure


@dataclass(frozen=True)
class TrainGroup:
    """Members that are trained in one pass.

    Attributes:
        plan: Of the attempt.
        members: Sorted.
        model: (num_params,) float32, the factors that the server sent.
    """

    plan: RoundPlan
    members: tuple[int, ...]
    model: NDArray[np.float32] = field(repr=False)


def train_group(worker: Worker, group: TrainGroup) -> Mapping[int, Result]:
    """Trains the shared adapter on each member's own examples.

    Returns:
        Member: its update, or what failed; one member's failure does not touch the others.
    """
    config = worker.config
    initial = initial_shared(worker.shared_spec, config.public_seed)
    received = rebuild_shared(initial, group.model, config.shared.aggregation)
    results: dict[int, Result] = {}
    jobs: list[ClientJob] = []
    for member in group.members:
        try:
            jobs.append(member_job(worker, member, plan=group.plan, received=received))
        except Exception as error:  # a malformed history is that member's failure alone
            results[member] = ClientFailure(str(member), describe(error))
    for trained in worker.trainer.update_many(jobs):
        results[int(trained.id)] = _result(trained, received, group.plan, config=config)
    return {member: _named(results[member], worker.users.base[member]) for member in group.members}


def _named(result: Result, user: str) -> Result:
    """Says whose failure it is; the name stays on the clients' side."""
    if isinstance(result, ClientFailure):
        return ClientFailure(result.id, f"user {user}: {result.message}")
    return result


def member_job(worker: Worker, member: int, *, plan: RoundPlan, received: Adapter) -> ClientJob:
    """What one member trains in a round: a function of the seed, the plan and its own history."""
    config = worker.config
    train, held_out = hold_out(member_examples(worker, member), config.shared.held_out)
    return ClientJob(
        id=str(member),
        start=received,
        frozen=(),
        settings=config.shared.training,
        examples=train,
        randomness=worker.randomness.child("train", plan.round, plan.attempt, member),
        trainable=travelling(config.shared.aggregation, plan.round),
        held_out=held_out,
    )


def member_examples(worker: Worker, member: int) -> list[Example]:
    """A member's own examples, oldest first: of its history (causal), its queries, or both."""
    user = worker.users.base[member]
    owned = worker.users.vault(user).history()
    history, queries = worker.task.history(owned), worker.task.queries(owned)
    profile = worker.profile(user, history)
    wanted = worker.config.shared.examples
    examples: list[Example] = []
    if wanted in ("history", "both"):
        examples += worker.prompts.history_examples(history, profile=profile)
    if wanted in ("queries", "both"):
        examples += worker.prompts.query_examples(history, queries, profile=profile)
    return examples


def hold_out(
    examples: Sequence[Example], count: int
) -> tuple[Sequence[Example], Sequence[Example]]:
    """Parts the newest `count` examples off, if at least four are on either side; else none."""
    if count < LEAST_HELD_OUT or len(examples) - count < LEAST_HELD_OUT:
        return examples, ()
    return examples[:-count], examples[-count:]


def _result(
    trained: TrainedAdapter | ClientFailure,
    received: Adapter,
    plan: RoundPlan,
    *,
    config: FederationConfig,
) -> Result:
    if isinstance(trained, ClientFailure):
        return trained
    factors = travelling(config.shared.aggregation, plan.round)
    flatten = received.spec.flatten
    vector = flatten(trained.adapter.tensors, factors) - flatten(received.tensors, factors)
    return LocalUpdate(plan.context, vector, trained.examples, trained.held_out_loss)


@dataclass(frozen=True)
class SimulatedFederation:
    """What the client side of one simulated federation is made of.

    Attributes:
        config: What its parties agree on.
        spec: Shapes of the shared adapter.
        identity: Signing key of a member, made when it is asked for.
        roster: All members.
        randomness: Root of the run.
        keys: Key source of a member.
        group_users: Members trained in one pass.
        dropout: Chance that a member drops out of a round, at a random stage from training on.
        helper: Reaches the helper; None in graph mode.
    """

    config: FederationConfig
    spec: AdapterSpec
    identity: Callable[[int], Identity] = field(repr=False)
    roster: Roster = field(repr=False)
    randomness: Randomness
    keys: Callable[[int], KeySource]
    group_users: int = 1
    dropout: float = 0.0
    helper: HelperLink | None = field(default=None, repr=False)

    @cached_property
    def initial(self) -> Adapter:
        """The shared adapter before the first round."""
        return initial_shared(self.spec, self.config.public_seed)


def simulate_members(
    config: FederationConfig,
    spec: AdapterSpec,
    randomness: Randomness,
    *,
    members: int,
    marker: GridMarker,
    group_users: int = 1,
) -> SimulatedFederation:
    """The members of a simulation, all of whose secrets come from the root.

    Args:
        config: Of the federation.
        spec: Shapes of the shared adapter.
        randomness: Root of the run.
        members: Number of members.
        marker: Of the Grid that they live in; their keys end with it.
        group_users: Members trained in one pass.
    """

    @lru_cache(RECENT)
    def identity(member: int) -> Identity:
        return Identity(member, randomness.secret("identity", member))

    # of ten thousand members the public keys are held, not the private ones
    roster = Roster(tuple(identity(member).enrolled for member in range(members)))
    return SimulatedFederation(
        config=config,
        spec=spec,
        identity=identity,
        roster=roster,
        randomness=randomness,
        keys=lambda member: SeededKeySource(randomness, member, marker),
        group_users=group_users,
        helper=simulated_helper(config, roster, randomness, marker=marker),
    )


def simulated_server(
    federation: SimulatedFederation,
    folder: Path,
    *,
    progress: Progress,
    warn: Callable[[str], None],
) -> ServerRuntime:
    """The server of a simulation; even the run id comes from the root.

    Args:
        federation: Its members.
        folder: Gets a folder for each committed round.
        progress: Is told of each committed round.
        warn: Is told what weakens a promise.
    """
    return ServerRuntime(
        config=federation.config,
        initial=federation.initial,
        roster=federation.roster,
        randomness=federation.randomness.child("server"),
        directory=HelloDirectory(range(len(federation.roster)), deadline=STARTING),
        folder=folder,
        run_id=federation.randomness.secret("run", length=16).hex(),
        progress=progress,
        warn=warn,
        helper=federation.helper,
        replays=True,
    )


class SimulatedUsers:
    """All members of a simulated federation in one process: a ClientRuntime and a StageRuntime.

    Attributes:
        failures: "member 3, train.masked: ..." for each error on the clients' side, in full.
    """

    def __init__(
        self, federation: SimulatedFederation, executor: GroupExecutor, *, in_context: bool = False
    ) -> None:
        """Keep the parts.

        Args:
            federation: Of the members.
            executor: Trains the groups.
            in_context: Keep protocol state in Flower's context, not in this object: Flower's own
                engine answers each message in whichever process is free.
        """
        self.federation = federation
        self.failures: list[str] = []
        self._executor = executor
        self._in_context = in_context
        self._states: dict[int, MemoryState] = {}
        self._outboxes: dict[int, MemoryOutbox] = {}
        self._locks: dict[int, Lock] = {}
        self._plan: RoundPlan | None = None
        self._ready: Mapping[int, Result] = {}

    def member(self, context: Context) -> "SimulatedMember":
        """The member at a node: its partition."""
        index = int(context.node_config["partition-id"])
        in_memory = self._states.setdefault(index, MemoryState())
        state = ContextState(context.state) if self._in_context else in_memory
        return SimulatedMember(self, index, state)

    def outbox(self, member: int) -> MemoryOutbox:
        """What a member sent."""
        return self._outboxes.setdefault(member, MemoryOutbox())

    def lock(self, member: int) -> Lock:
        """Held while a member's state is compared and stored: one for the threads of this process."""
        return self._locks.setdefault(member, Lock())

    # --- the stage, seen whole -------------------------------------------------------------------

    def ready(self, stage: Stage, requests: Mapping[int, RecordDict]) -> Iterator[tuple[int, ...]]:
        """Yields the members of a stage; those of a train stage group by group, each trained."""
        if stage not in ("query.keys", "train.masked", SEALED, PLAIN):
            yield tuple(requests)
            return
        try:
            request = read_request(stage, next(iter(requests.values())))
        except ProtocolError:  # each client says so itself
            yield tuple(requests)
            return
        if isinstance(request, Opening | Whole):
            self._plan = request.event.plan
        if isinstance(request, Training | Whole) and self._plan is not None:
            yield from self._train(self._plan, sorted(requests), request.model)
        else:
            yield tuple(requests)

    def _train(
        self, plan: RoundPlan, members: Sequence[int], model: NDArray[np.float32]
    ) -> Iterator[tuple[int, ...]]:
        size = self.federation.group_users
        starts = range(0, len(members), size)
        groups = [TrainGroup(plan, tuple(members[at : at + size]), model) for at in starts]
        results = self._executor.map(train_group, groups)
        for group, result in zip(groups, results, strict=True):
            self._ready = result
            yield group.members
        self._ready = {}

    def update(self, member: int, plan: RoundPlan, shared: Adapter) -> LocalUpdate:
        """A member's own update: trained with its group, or now, by itself.

        Raises:
            ClientFailed: Its training failed.
        """
        result = self._ready.get(member)
        if result is None:
            down = sent_down(self.federation.config.shared.aggregation)
            group = TrainGroup(plan, (member,), shared.spec.flatten(shared.tensors, down))
            result = next(iter(self._executor.map(train_group, [group])))[member]
        if isinstance(result, ClientFailure):
            raise ClientFailed(f"member {member}: {result.message}")
        return result


@dataclass(frozen=True)
class SimulatedMember:
    """One virtual user as a MemberRuntime.

    Attributes:
        users: All of them.
        index: Its member.
        state: Its protocol state.
    """

    users: SimulatedUsers = field(repr=False)
    index: int
    state: StateStore = field(repr=False)
    policy: ClientPolicy = field(default_factory=ClientPolicy.for_simulation)

    @property
    def identity(self) -> Identity:
        """The member's signing key."""
        return self.users.federation.identity(self.index)

    @property
    def roster(self) -> Roster:
        """All members."""
        return self.users.federation.roster

    @property
    def keys(self) -> KeySource:
        """Keys from the seed: they change no result."""
        return self.users.federation.keys(self.index)

    @property
    def dither(self) -> Randomness:
        """Root of the rounding."""
        return self.users.federation.randomness.child("member", self.index)

    @property
    def lock(self) -> Lock:
        """For this member alone."""
        return self.users.lock(self.index)

    @property
    def ledger(self) -> VaultLedger:
        """Without a budget: virtual users are charged, and refuse nothing."""
        return VaultLedger(self.state, corrupt=self.policy.corrupt)

    @property
    def outbox(self) -> MemoryOutbox:
        """What this member sent."""
        return self.users.outbox(self.index)

    @property
    def base_hash(self) -> str:
        """Hash of the base."""
        return self.users.federation.spec.base_hash

    @property
    def plain_updates(self) -> bool:
        """A researcher who sets the switch owns all virtual users."""
        return self.users.federation.config.plain_updates

    def initial_shared(self, config: FederationConfig) -> Adapter:
        """The shared adapter before the first round."""
        federation = self.users.federation
        if config == federation.config:
            return federation.initial
        return initial_shared(federation.spec, config.public_seed)

    def update(self, plan: RoundPlan, config: FederationConfig, shared: Adapter) -> LocalUpdate:
        """This member's own update.

        Raises:
            ClientFailed: Its training failed.
        """
        return self.users.update(self.index, plan, shared)

    def drops(self, stage: Stage, plan: RoundPlan) -> bool:
        """Whether this member drops out at this stage of this attempt: a function of the root."""
        federation = self.users.federation
        if federation.dropout == 0 or stage not in (*DROP_STAGES, *WHOLE):
            return False
        stream = federation.randomness.stream("drop", plan.round, plan.attempt, self.index)
        dropped, where = stream.random() < federation.dropout, stream.integers(len(DROP_STAGES))
        return bool(dropped) and stage in (DROP_STAGES[where], *WHOLE)

    def failed(self, stage: Stage, error: Exception) -> None:
        """Keeps an error in full."""
        self.users.failures.append(f"member {self.index}, {stage}: {describe(error)}")


@dataclass(frozen=True)
class ContextState:
    """A StateStore in Flower's context.state, which travels with a node's messages.

    Attributes:
        records: The node's state.
    """

    records: RecordDict = field(repr=False)

    def get(self, key: str) -> bytes | None:
        """The value, or None."""
        record = self.records.config_records.get("state")
        value = None if record is None else record.get(key)
        return value if isinstance(value, bytes) else None

    def put(self, key: str, value: bytes) -> None:
        """Keeps a value."""
        if "state" not in self.records.config_records:
            self.records["state"] = ConfigRecord()
        self.records.config_records["state"][key] = value
