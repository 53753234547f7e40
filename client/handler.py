"""One client's answer to one message of a round: check, ask the runtime, drive the state machine.

Guarantee: nothing is answered unless plan, config, base and model fit what this client pinned and
derives itself, and its policy allows it; and each answer is stored before it is returned.
The caller's part: one message of a member at a time. A second one during training finds that it was
overtaken, and neither is answered twice; between two quick steps only the caller can see to that.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from flwr.app import RecordDict
from numpy.typing import NDArray

from fedoppu.client.jobs import LocalUpdate
from fedoppu.client.policy import ClientPolicy, LastRound
from fedoppu.client.release import clip, release
from fedoppu.client.seat import Seat
from fedoppu.client.secagg import KeySource, Phase, Pins, SecAggClient
from fedoppu.client.vault import Outbox, StateStore
from fedoppu.common.adapters import Adapter
from fedoppu.common.agreed import agreed
from fedoppu.common.config import FederationConfig
from fedoppu.common.errors import ProtocolError, RefusedByPolicy
from fedoppu.common.messages import (
    PLAIN,
    Opening,
    PlainTraining,
    PlainUpdate,
    Reply,
    Request,
    Stage,
    Training,
    digest,
    payload_bytes,
    read_request,
    write_reply,
)
from fedoppu.common.plan_fields import read_config
from fedoppu.common.randomness import Randomness
from fedoppu.common.roster import Roster
from fedoppu.common.rounds import ClientEvent, RoundPlan, SurvivorsProposed, UpdateReady
from fedoppu.common.shared_adapter import rebuild_shared
from fedoppu.common.signing import Identity


class MemberRuntime(Protocol):
    """What answers for one member: a device's vault, or one virtual user."""

    @property
    def identity(self) -> Identity:
        """The member's signing key."""

    @property
    def roster(self) -> Roster:
        """The roster that the owner pinned."""

    @property
    def policy(self) -> ClientPolicy:
        """The owner's floors."""

    @property
    def keys(self) -> KeySource:
        """Source of the protocol's keys: the operating system on a device."""

    @property
    def dither(self) -> Randomness:
        """Root of the rounding; a secret on a device."""

    @property
    def state(self) -> StateStore:
        """Where this member's protocol state is kept, of this federation alone."""

    @property
    def outbox(self) -> Outbox:
        """The record of what left."""

    @property
    def base_hash(self) -> str:
        """Hash of the base that this member would train on."""

    @property
    def plain_updates(self) -> bool:
        """Whether this member's owner allows updates in clear (research only)."""

    def initial_shared(self, config: FederationConfig) -> Adapter:
        """The shared adapter before the first round, derived from the public seed and the base."""

    def update(self, plan: RoundPlan, config: FederationConfig, shared: Adapter) -> LocalUpdate:
        """Trains on the member's own data.

        Raises:
            ClientFailed: Training failed.
        """

    def drops(self, stage: Stage, plan: RoundPlan) -> bool:
        """Whether this member drops out at this stage; False on a device."""

    def failed(self, stage: Stage, error: Exception) -> None:
        """Keeps the full story of an error on this side; the server gets its kind and place."""


class Dropped(Exception):
    """This member drops out at this stage, as its runtime wants it."""


@dataclass(frozen=True)
class Handler:
    """Answers the messages of one member.

    Attributes:
        runtime: The member's side.
    """

    runtime: MemberRuntime = field(repr=False)

    @property
    def seat(self) -> Seat:
        """The member's memory."""
        return Seat(self.runtime.state)

    def answer(self, stage: Stage, content: RecordDict) -> RecordDict:
        """The reply to a message, stored and recorded.

        Raises:
            ProtocolError: The message is malformed, out of place, or does not fit.
            RefusedByPolicy: The owner's policy forbids it.
            ClientFailed: Training failed.
            Dropped: The runtime wants this member gone at this stage.
        """
        reply = self.seat.repeat(stage, content)
        if reply is None:
            reply = write_reply(self._reply(stage, read_request(stage, content)))
            self.seat.keep(stage, content, reply)
        self.runtime.outbox.append(stage, payload_bytes(reply), digest(reply))
        return reply

    def _reply(self, stage: Stage, request: Request) -> Reply:
        match request:
            case PlainTraining():
                return self._train_plain(request)
            case Opening():
                return self._open(request)
            case Training():
                return self._train(request)
            case _:
                return self._step(stage, request)

    # --- the round -------------------------------------------------------------------------------

    def _open(self, opening: Opening) -> ClientEvent:
        plan = opening.event.plan
        config = self._agree(plan, opening.config)
        if config.plain_updates:
            raise ProtocolError("this federation sends plain updates: it has no exchange of keys")
        self.seat.require_pinned(opening.config)
        if not self.runtime.policy.same_model:
            self.seat.require_unanswered(config.task, plan)
        self._drop("query.keys", plan)
        stored = self.seat.machine
        last = self.seat.last_in(plan.run_id) or _before_first(config)
        machine = SecAggClient(
            self.runtime.identity,
            Pins(self.runtime.roster, plan.config_hash, last),
            policy=self.runtime.policy,
            keys=self.runtime.keys,
        )
        advert = _only(machine.receive(opening.event))
        self.seat.pin(opening.config)  # not before: a refused plan pins nothing
        self._save(machine, over=stored)
        return advert

    def _train(self, training: Training) -> ClientEvent:
        stored, machine, config = self.seat.machine, self._machine(), self._config()
        plan = machine.plan
        machine.receive(training.event)
        self._drop("train.masked", plan)
        words = release(self._update(plan, config, training.model), plan, self.runtime.dither)
        masked = _only(machine.receive(UpdateReady(words)))
        self._save(machine, over=stored)
        return masked

    def _step(self, stage: Stage, request: Request) -> ClientEvent:
        """The exchanges that need nothing but the state machine."""
        stored, machine = self.seat.machine, self._machine()
        self._drop(stage, machine.plan)
        if isinstance(request, Opening | Training | PlainTraining):
            raise ProtocolError(f"{stage} carries a message of another stage")
        events = machine.receive(request)
        if events and isinstance(request, SurvivorsProposed):
            self._hold_apart(request.survivors)
        self._save(machine, over=stored)
        if machine.phase is Phase.DONE:
            self.seat.finish(self._config().task, machine.plan)
        if not events:
            raise RefusedByPolicy("this client is not in the survivor set and takes no more part")
        return _only(events)

    def _hold_apart(self, survivors: tuple[int, ...]) -> None:
        """Keeps a survivor set before its signature goes out, for owners who ask for distance."""
        policy = self.runtime.policy
        if policy.difference_floor:
            policy.check_difference(survivors, self.seat.survivor_sets)
            self.seat.keep_survivors(survivors)

    def _update(
        self, plan: RoundPlan, config: FederationConfig, model: NDArray[np.float32]
    ) -> LocalUpdate:
        """The runtime's update, if the model that came is the one that the plan names."""
        initial = self.runtime.initial_shared(config)
        shared = rebuild_shared(initial, model, config.shared.aggregation)
        if shared.digest() != plan.model_hash:
            raise ProtocolError(
                f"the model has digest {shared.digest()[:12]}, the plan names "
                f"{plan.model_hash[:12]}: a server may have sent another model to this client"
            )
        return self.runtime.update(plan, config, shared)

    def _drop(self, stage: Stage, plan: RoundPlan) -> None:
        if self.runtime.drops(stage, plan):
            raise Dropped(stage)

    # --- the machine -----------------------------------------------------------------------------

    def _machine(self) -> SecAggClient:
        dumped, config = self.seat.machine, self.seat.config
        if dumped is None or config is None:
            raise ProtocolError("no attempt is under way for this client")
        config_hash = hashlib.sha256(config).hexdigest()
        return SecAggClient.load(
            dumped,
            self.runtime.identity,
            Pins(self.runtime.roster, config_hash, self.seat.last),
            policy=self.runtime.policy,
            keys=self.runtime.keys,
        )

    def _save(self, machine: SecAggClient, *, over: bytes | None) -> None:
        """Stores the machine over the state that it came from, and over no other."""
        if self.seat.machine != over:
            machine.erase()
            raise ProtocolError(
                "another message was answered meanwhile: a server sends the next one when it has "
                "the reply to the last"
            )
        self.seat.save(machine.dump(), machine.last_round)

    def _config(self) -> FederationConfig:
        pinned = self.seat.config
        if pinned is None:
            raise ProtocolError("no config was received yet")
        return read_config("the pinned config", pinned)

    # --- agreement -------------------------------------------------------------------------------

    def _agree(self, plan: RoundPlan, config_bytes: bytes) -> FederationConfig:
        """The config, if plan, config, base and roster belong together."""
        digest = hashlib.sha256(config_bytes).hexdigest()
        _require("config_hash", plan.config_hash, digest)
        self.runtime.policy.check_config(digest)
        config = read_config("query.keys of the server", config_bytes)
        if config.base_hash != self.runtime.base_hash:
            raise ProtocolError(
                f"the federation's base is {config.base_hash[:12]}, this client has "
                f"{self.runtime.base_hash[:12]}",
                hint="get the federation's base, or join another federation",
            )
        _require("roster_hash", plan.roster_hash, self.runtime.roster.hash())
        spec = self.runtime.initial_shared(config).spec
        for name, value in agreed(config, spec, plan.round).items():
            _require(name, vars(plan)[name], value)
        return config

    # --- research only ---------------------------------------------------------------------------

    def _train_plain(self, request: PlainTraining) -> PlainUpdate:
        """The clipped update in clear: only if the config says so and the owner allows it too."""
        plan = request.event.plan
        config = self._agree(plan, request.config)
        if not (config.plain_updates and self.runtime.plain_updates):
            raise RefusedByPolicy("this client sends no update in clear")
        self.seat.require_pinned(request.config)
        self._drop(PLAIN, plan)
        update = self._update(plan, config, request.model)
        self.seat.pin(request.config)
        loss = update.held_out_loss
        return PlainUpdate(
            member=self.runtime.identity.member,
            vector=clip(update.vector, plan.clip),
            weight=min(update.weight, plan.max_weight),
            held_out=loss is not None,
            held_out_loss=0.0 if loss is None else float(loss),
        )


def _before_first(config: FederationConfig) -> LastRound:
    """What the first plan of a run that this client sees is held against."""
    return LastRound("", 0, -1, False, value_range=config.encoding.value_range)


def _only(events: list[ClientEvent]) -> ClientEvent:
    if len(events) != 1:
        raise ProtocolError(f"a step of the protocol gave {len(events)} messages in place of one")
    return events[0]


def _require(name: str, value: object, agreed: object) -> None:
    if value != agreed:
        raise ProtocolError(f"the plan's {name} is {value}, the federation's is {agreed}")
