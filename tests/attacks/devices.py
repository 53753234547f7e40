"""Members whose memory matters: a `Handler` over a store, and a server that is scripted."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedoppu.client.handler import Handler
from fedoppu.client.jobs import LocalUpdate
from fedoppu.client.ledger import PrivacyBudget, VaultLedger
from fedoppu.client.policy import ClientPolicy
from fedoppu.client.secagg import KeySource, OsKeySource
from fedoppu.common.adapters import Adapter
from fedoppu.common.agreed import agreed
from fedoppu.common.config import FederationConfig
from fedoppu.common.errors import FedoppuError, RoundAborted
from fedoppu.common.messages import (
    Opening,
    Reply,
    Request,
    Stage,
    Training,
    read_reply,
    write_request,
)
from fedoppu.common.quantization import decode_sum
from fedoppu.common.randomness import Randomness
from fedoppu.common.roster import Roster
from fedoppu.common.rotation import rotation_seed
from fedoppu.common.rounds import (
    ClientEvent,
    Exchange,
    Outgoing,
    RoundOpened,
    RoundPlan,
    SharesDelivered,
    StageEnded,
    SumReady,
    Words,
)
from fedoppu.common.shared_adapter import initial_shared, sent_down
from fedoppu.common.signing import Identity
from fedoppu.common.thresholds import plan_thresholds
from fedoppu.server.secagg import SecAggServer
from fedoppu.simulations.virtual_users import MemoryOutbox, MemoryState
from tests.fake_federation import CONFIG, SPEC
from tests.integration.secagg_harness import identities, roster_of

Train = Callable[[int, RoundPlan, Adapter], NDArray[np.float32]]


def usual_update(member: int, plan: RoundPlan, shared: Adapter) -> NDArray[np.float32]:
    """The same update whenever it is asked for, as of a user whose data do not change."""
    return np.random.default_rng(member).normal(0, 0.05, plan.num_params).astype(np.float32)


@dataclass
class Device:
    """One member, as a daemon would hold it: keys of the operating system, a store, a policy."""

    identity: Identity
    roster: Roster
    policy: ClientPolicy = field(default_factory=ClientPolicy.for_simulation)
    keys: KeySource = field(default_factory=OsKeySource)
    state: MemoryState = field(default_factory=MemoryState)
    outbox: MemoryOutbox = field(default_factory=MemoryOutbox)
    budget: PrivacyBudget | None = None
    lock: AbstractContextManager[object] = field(default_factory=nullcontext)
    vault: MemoryState = field(default_factory=MemoryState)
    train: Train = usual_update
    base_hash: str = SPEC.base_hash
    plain_updates: bool = False

    @property
    def ledger(self) -> VaultLedger:
        return VaultLedger(self.vault, self.budget, self.policy.corrupt)

    @property
    def dither(self) -> Randomness:
        return Randomness.from_seed(self.identity.member)

    def initial_shared(self, config: FederationConfig) -> Adapter:
        return initial_shared(SPEC, config.public_seed)

    def update(self, plan: RoundPlan, config: FederationConfig, shared: Adapter) -> LocalUpdate:
        vector = self.train(self.identity.member, plan, shared)
        return LocalUpdate(plan.context, vector, plan.max_weight, None)

    def drops(self, stage: Stage, plan: RoundPlan) -> bool:
        return False

    def failed(self, stage: Stage, error: Exception) -> None:
        pass

    def ask(self, stage: Stage, request: Request) -> Reply:
        """One message and its reply, both over the wire form."""
        reply = Handler(self).answer(stage, write_request(request))
        return read_reply(stage, reply, f"member {self.identity.member}")


def devices(n: int, **changes: Any) -> list[Device]:
    people = identities(n)
    roster = roster_of(people)
    return [Device(person, roster, **changes) for person in people]


def plan_for(
    members: Iterable[Device], *, config: FederationConfig = CONFIG, **changes: Any
) -> RoundPlan:
    """The plan of a first round among some members; `changes` are the server's."""
    chosen = list(members)
    adapter = initial_shared(SPEC, config.public_seed)
    limits = plan_thresholds(len(chosen), config.thresholds)
    values: dict[str, Any] = {
        "run_id": "ab" * 16,
        "round": 1,
        "attempt": 0,
        "config_hash": config.hash().hex(),
        "roster_hash": chosen[0].roster.hash(),
        "model_hash": adapter.digest(),
        "value_range": float(config.encoding.value_range),
        **vars(limits),
        **agreed(config, SPEC, 1),
    }
    plan = RoundPlan(**values)
    changed = replace(plan, **changes)
    return replace(changed, rotation=rotation_seed(config, changed.round))


def update_of(member: Device, plan: RoundPlan) -> NDArray[np.float32]:
    """What a member's own training gives."""
    return member.train(member.identity.member, plan, initial_shared(SPEC, CONFIG.public_seed))


def summed(words: Words, plan: RoundPlan, survivors: Iterable[int]) -> NDArray[np.float32]:
    """The sum of the updates that a sum of words says, (num_params,) float32."""
    decoded = decode_sum(words, plan, list(survivors))
    return decoded.mean_update * np.float32(decoded.total_weight / plan.max_weight)


@dataclass
class Script:
    """An attempt that a server drives, with lies where the attack has them.

    Attributes:
        members: Whom it asks.
        plan: Of the attempt.
        silent: Members whose masked vectors the server pretends not to have.
        model_of: Member: another model than the plan's.
        refusals: Member: what it said.
    """

    members: list[Device]
    plan: RoundPlan
    config: FederationConfig = CONFIG
    silent: frozenset[int] = frozenset()
    model_of: Mapping[int, NDArray[np.float32]] = field(default_factory=dict)
    refusals: dict[int, FedoppuError] = field(default_factory=dict)

    def updates(self) -> NDArray[np.float32]:
        """What the server learns: the sum of the survivors' updates.

        Raises:
            FedoppuError: What the first client that refused says.
        """
        try:
            ready = self.run()
        except RoundAborted as error:
            raise next(iter(self.refusals.values()), error) from None
        return summed(ready.words, self.plan, ready.survivors)

    def run(self) -> SumReady:
        """The attempt to its end.

        Raises:
            RoundAborted: Too many refused.
        """
        by_member = {device.identity.member: device for device in self.members}
        machine = SecAggServer(self.plan, self.members[0].roster, invited=by_member)
        result: list[Outgoing | SumReady] = []
        while isinstance(stage := machine.stage, Exchange):
            for out in machine.pending():
                reply = self._ask(by_member[out.member], stage, out)
                if reply is not None:
                    machine.receive(reply)
            result = machine.receive(StageEnded())
        (ready,) = result
        assert isinstance(ready, SumReady)
        return ready

    def _ask(self, device: Device, stage: Exchange, out: Outgoing) -> ClientEvent | None:
        try:
            reply = device.ask(stage.value, self._request(out))
        except FedoppuError as error:
            self.refusals[out.member] = error
            return None
        if stage is Exchange.MASKED and out.member in self.silent:
            return None
        assert isinstance(reply, ClientEvent)
        return reply

    def _request(self, out: Outgoing) -> Request:
        match out.event:
            case RoundOpened():
                return Opening(out.event, self.config.canonical())
            case SharesDelivered():
                return Training(out.event, self.model_of.get(out.member, self.model))
            case _:
                return out.event

    @property
    def model(self) -> NDArray[np.float32]:
        """The factors that travel down before the first round."""
        adapter = initial_shared(SPEC, self.config.public_seed)
        return adapter.spec.flatten(adapter.tensors, sent_down(self.config.shared.aggregation))
