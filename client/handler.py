"""One client's answer to one message of a round: check, ask the runtime, drive the state machine.

Guarantee: nothing is answered unless plan, config, base and model fit what this client pinned and
derives itself, and its policy allows it; and each answer is stored before it is returned. Of two
messages to one member at the same time, one is answered: what a message changes is stored only over
the state that it was read from, compared and stored under the runtime's lock, so the other finds
that it was overtaken. A masked vector is charged to the owner's privacy budget before it is made.
"""

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from flwr.app import RecordDict
from numpy.typing import NDArray

from fedoppu.client.enrolment import Enrolment
from fedoppu.client.jobs import LocalUpdate
from fedoppu.client.ledger import PrivacyLedger
from fedoppu.client.policy import ClientPolicy, LastRound
from fedoppu.client.release import clip, release
from fedoppu.client.seat import Seat
from fedoppu.client.secagg import KeySource, Phase, Pins, SecAggClient
from fedoppu.client.two_server import require_sealed_plan, seal_update
from fedoppu.client.vault import Outbox, StateStore
from fedoppu.common.adapters import Adapter
from fedoppu.common.agreed import agreed, agreed_noise
from fedoppu.common.config import FederationConfig
from fedoppu.common.epochs import EpochAnnounced, EpochAnswer, RosterEpoch
from fedoppu.common.errors import ClientFailed, ProtocolError, RefusedByPolicy, UsageError
from fedoppu.common.messages import (
    PLAIN,
    SEALED,
    Opening,
    PlainTraining,
    PlainUpdate,
    Reply,
    Request,
    SealedTraining,
    Stage,
    Training,
    Whole,
    digest,
    payload_bytes,
    read_request,
    write_reply,
)
from fedoppu.common.plan_fields import read_config
from fedoppu.common.randomness import Randomness
from fedoppu.common.roster import Roster
from fedoppu.common.rounds import ClientEvent, RoundPlan, SurvivorsProposed, UpdateReady, Words
from fedoppu.common.shared_adapter import rebuild_shared
from fedoppu.common.signing import Identity
from fedoppu.common.two_server import HelperKeys, SealedUpdate


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
    def lock(self) -> AbstractContextManager[object]:
        """Held while this member's state is compared and stored; the same for all its messages.

        And the same for all federations of one vault, whose ledger is charged under it: two charges
        at once would be stored as one.

        A lock of threads is enough for one process. A daemon of several processes gives one that
        holds between them: a write transaction of the store, or a lock on its file.
        """

    @property
    def ledger(self) -> PrivacyLedger:
        """The owner's privacy budget, over all federations."""

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
            ClientFailed: Training failed, in a round without differential privacy.
            Dropped: The runtime wants this member gone at this stage.
        """
        reply = self.seat.repeat(stage, content)
        if reply is None:
            request = read_request(stage, content)
            reply = write_reply(self._reply(stage, request))
            if not isinstance(request, EpochAnnounced):  # which is no step of the attempt under way
                self.seat.keep(stage, content, reply)
        self.runtime.outbox.append(stage, payload_bytes(reply), digest(reply))
        return reply

    def _reply(self, stage: Stage, request: Request) -> Reply:
        match request:
            case EpochAnnounced(epoch):
                return self._consider(epoch)
            case PlainTraining():
                return self._train_plain(request)
            case SealedTraining():
                return self._train_sealed(request)
            case Opening():
                return self._open(request)
            case Training():
                return self._train(request)
            case _:
                return self._step(stage, request)

    # --- the round -------------------------------------------------------------------------------

    def _open(self, opening: Opening) -> ClientEvent:
        stored = self.seat.machine  # before all checks: what is answered meanwhile changes it
        plan = opening.event.plan
        config = self._agree(plan, opening.config)
        _require_mode(config, "graph")
        self._admit(plan, config, opening.config)
        self._drop("query.keys", plan)
        last = self.seat.last_in(plan.run_id) or _before_first(config)
        roster, policy = self._standing(plan)
        machine = SecAggClient(
            self.runtime.identity,
            Pins(roster, plan.config_hash, last),
            policy=policy,
            keys=self.runtime.keys,
        )
        advert = _only(machine.receive(opening.event))
        with self._stored(machine, over=stored):
            self.seat.pin(opening.config)  # not before: a refused plan pins nothing
        return advert

    def _admit(self, plan: RoundPlan, config: FederationConfig, config_bytes: bytes) -> None:
        """Whether this client may take part in another round, by what it remembers."""
        self.seat.require_pinned(config_bytes)
        if not self.runtime.policy.same_model:
            self.seat.require_unanswered(config.task, plan)

    def _train(self, training: Training) -> ClientEvent:
        stored, machine, config = self.seat.machine, self._machine(), self._config()
        plan = machine.plan
        machine.receive(training.event)
        self._drop("train.masked", plan)
        _, policy = self._standing(plan)
        young = len(policy.young.intersection(machine.members))
        words = self._words("train.masked", plan, config=config, model=training.model, young=young)
        masked = _only(machine.receive(UpdateReady(words)))
        with self._stored(machine, over=stored):
            pass
        return masked

    def _words(
        self,
        stage: Stage,
        plan: RoundPlan,
        *,
        config: FederationConfig,
        model: NDArray[np.float32],
        young: int,
    ) -> Words:
        """The integers to mask: of the update, or of zeros if it failed in a private round.

        Whether training diverges depends on this member's data, and a drop would tell the server so.
        """
        try:
            update = self._update(plan, config, model)
            return self._release(update, plan, config=config, young=young)
        except ClientFailed as error:
            if plan.metrics:
                raise
            self.runtime.failed(stage, error)
        nothing = LocalUpdate(plan.context, np.zeros(plan.num_params, np.float32), weight=1)
        # a repeated charge changes nothing
        return self._release(nothing, plan, config=config, young=young)

    def _release(
        self, update: LocalUpdate, plan: RoundPlan, *, config: FederationConfig, young: int
    ) -> Words:
        """The integers to mask, after they were charged."""
        with self.runtime.lock:
            self.runtime.ledger.charge(plan, config, young=young)
        return release(update, plan, self.runtime.dither)

    def _step(self, stage: Stage, request: Request) -> ClientEvent:
        """The exchanges that need nothing but the state machine."""
        stored, machine = self.seat.machine, self._machine()
        self._drop(stage, machine.plan)
        if isinstance(request, EpochAnnounced | Opening | Training | Whole):
            raise ProtocolError(f"{stage} carries a message of another stage")
        events = machine.receive(request)
        with self._stored(machine, over=stored):
            if events and isinstance(request, SurvivorsProposed):
                self._hold_apart(machine.plan, request.survivors)
            if machine.phase is Phase.DONE:
                self.seat.finish(self._config().task, machine.plan)
        if not events:
            raise RefusedByPolicy("this client is not in the survivor set and takes no more part")
        return _only(events)

    def _hold_apart(self, plan: RoundPlan, survivors: tuple[int, ...]) -> None:
        """Keeps a survivor set before its signature goes out, for owners who ask for distance."""
        _, policy = self._standing(plan)
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
        dumped, config, last = self.seat.machine, self.seat.config, self.seat.last
        if dumped is None or config is None or last is None:
            raise ProtocolError("no attempt is under way for this client")
        roster, policy = self._standing(last)
        config_hash = hashlib.sha256(config).hexdigest()
        return SecAggClient.load(
            dumped,
            self.runtime.identity,
            Pins(roster, config_hash, last),
            policy=policy,
            keys=self.runtime.keys,
        )

    @contextmanager
    def _stored(self, machine: SecAggClient, *, over: bytes | None) -> Iterator[None]:
        """Stores the machine over the state that it came from, and over no other.

        What the block stores belongs to it; it comes first, so that a crash in between forgets no
        answer that was given.
        """
        with self.runtime.lock:
            if self.seat.machine != over:
                machine.erase()
                raise ProtocolError(
                    "another message was answered meanwhile: a server sends the next one when it "
                    "has the reply to the last"
                )
            yield
            self.seat.save(machine.dump(), machine.last_round)

    def _config(self) -> FederationConfig:
        pinned = self.seat.config
        if pinned is None:
            raise ProtocolError("no config was received yet")
        return read_config("the pinned config", pinned)

    # --- the roster ------------------------------------------------------------------------------

    def _standing(self, where: RoundPlan | LastRound) -> tuple[Roster, ClientPolicy]:
        """Roster and policy for a round."""
        pinned = (self.runtime.roster, self.runtime.policy)
        return Enrolment(self.runtime.state).standing(pinned, where.run_id, where.round)

    def _consider(self, epoch: RosterEpoch) -> EpochAnswer:
        """Follows or countersigns an announced epoch."""
        runtime = self.runtime
        with runtime.lock:
            return Enrolment(runtime.state).consider(
                epoch, runtime.identity, runtime.policy, last=self.seat.last
            )

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
        roster, _ = self._standing(plan)
        _require("roster_hash", plan.roster_hash, roster.hash())
        spec = self.runtime.initial_shared(config).spec
        for name, value in agreed(config, spec, plan.round).items():
            _require(name, vars(plan)[name], value)
        _require("noise_scale", plan.noise_scale, _noise(config, plan))
        return config

    # --- the two-server mode ---------------------------------------------------------------------

    def _train_sealed(self, request: SealedTraining) -> SealedUpdate:
        """The whole round in one message; to send it counts as having unmasked (rule 4)."""
        plan = request.event.plan
        config = self._agree(plan, request.config)
        _require_mode(config, "two_server")
        self._admit_sealed(plan, config, request.config)
        helper = _helper(config)
        self._drop(SEALED, plan)
        _, policy = self._standing(plan)
        young = len(policy.young)  # nobody shows this client the set: all may be in it
        words = self._words(SEALED, plan, config=config, model=request.model, young=young)
        runtime = self.runtime
        sealed = seal_update(words, plan, runtime.identity, helper=helper, keys=runtime.keys)
        with runtime.lock:
            # again: another message may have been answered while this one's update was trained
            self._admit_sealed(plan, config, request.config)
            self.seat.pin(request.config)
            self.seat.finish(config.task, plan)
            self.seat.save(b"", LastRound.of(plan, answered=True))
        return sealed

    def _admit_sealed(self, plan: RoundPlan, config: FederationConfig, config_bytes: bytes) -> None:
        self._admit(plan, config, config_bytes)
        last = self.seat.last_in(plan.run_id) or _before_first(config)
        _, policy = self._standing(plan)
        require_sealed_plan(plan, policy, last)

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
        with self.runtime.lock:  # a vault with a privacy budget sends none
            self.runtime.ledger.charge(plan, config)
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


def _require_mode(config: FederationConfig, mode: str) -> None:
    """Refuses the messages of another mode than the config's: a server cannot choose it."""
    if config.plain_updates:
        raise ProtocolError(
            "this federation sends plain updates: it has no exchange of keys or seeds"
        )
    if config.secagg.mode != mode:
        raise ProtocolError(
            f"this federation's secagg.mode is {config.secagg.mode}: it has no messages of {mode}"
        )


def _helper(config: FederationConfig) -> HelperKeys:
    hybrid = config.secagg.key_exchange == "hybrid"
    try:
        return HelperKeys.parse(config.secagg.helper, hybrid=hybrid)
    except UsageError as error:
        raise ProtocolError(f"the federation's config pins no helper: {error}") from None


def _noise(config: FederationConfig, plan: RoundPlan) -> float:
    """What the config says of the plan's noise."""
    try:
        return agreed_noise(config, plan)
    except (UsageError, ArithmeticError):
        raise ProtocolError("no noise_scale follows from the plan's range and min_cohort") from None


def _only(events: list[ClientEvent]) -> ClientEvent:
    if len(events) != 1:
        raise ProtocolError(f"a step of the protocol gave {len(events)} messages in place of one")
    return events[0]


def _require(name: str, value: object, agreed: object) -> None:
    if value != agreed:
        raise ProtocolError(f"the plan's {name} is {value}, the federation's is {agreed}")
