"""A whole attempt: every message of four members and a server, the sum, and what it says."""

from dataclasses import dataclass, field

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedoppu.client.policy import ClientPolicy
from fedoppu.client.secagg import Pins, SecAggClient
from fedoppu.common.messages import Opening, Request, Training, write_reply, write_request
from fedoppu.common.quantization import (
    CLIPPED,
    LOSS,
    LOSS_COUNT,
    WEIGHT,
    VectorLayout,
    decode_sum,
    write_scalars,
)
from fedoppu.common.randomness import Randomness
from fedoppu.common.rounds import (
    Advert,
    ClientEvent,
    Exchange,
    MaskedUpdate,
    Outgoing,
    RoundOpened,
    RoundPlan,
    ServerEvent,
    ShareBundle,
    SharesDelivered,
    StageEnded,
    SumReady,
    SurvivorSignature,
    UnmaskReply,
    UpdateReady,
    Words,
)
from fedoppu.common.signing import (
    Scope,
    advert_bytes,
    bundle_bytes,
    hash_cohort,
    masked_bytes,
    reply_bytes,
    survivors_bytes,
)
from fedoppu.server.secagg import SecAggServer
from fedoppu.simulations.key_source import GridMarker, SeededKeySource, simulation_grid
from fedoppu.simulations.vectors.material import (
    CONFIG,
    MODEL,
    Case,
    make_plan,
    person,
    roster_of,
    secret,
)


@dataclass(frozen=True)
class Recorder:
    """A key source that shows what it gave, by use."""

    source: SeededKeySource
    given: dict[str, bytes] = field(default_factory=dict, repr=False)

    def secret(self, purpose: str, length: int) -> bytes:
        """What the source gives."""
        use = purpose.rsplit(" ", 2)[0]  # the rest is context and member
        self.given[use] = self.source.secret(purpose, length)
        return self.given[use]


@dataclass
class Attempt:
    """Four members and a server; the last member deals shares and drops."""

    plan: RoundPlan
    marker: GridMarker

    def __post_init__(self) -> None:
        """Everyone before the first message."""
        roster, root = roster_of(4), Randomness.from_seed(0)
        self.keys = [Recorder(SeededKeySource(root, member, self.marker)) for member in range(4)]
        self.clients = [
            SecAggClient(
                person(member),
                Pins(roster, self.plan.config_hash),
                policy=ClientPolicy.for_simulation(),
                keys=self.keys[member],
            )
            for member in range(4)
        ]
        self.server = SecAggServer(self.plan, roster, invited=range(4))
        self.scope = Scope(self.plan.context, b"")
        self.adverts: list[Advert] = []

    def words(self, member: int) -> Words:
        """The released integers of a member."""
        layout = VectorLayout.of(self.plan)
        levels = layout.middle + np.array([member, -10 * member, 100 - member])
        scalars = {WEIGHT: 1 + member, LOSS: 1000 * member, LOSS_COUNT: 1, CLIPPED: member % 2}
        return np.concatenate([levels.astype(layout.dtype), write_scalars(layout, scalars)])

    def run(self) -> Case:
        """All messages, the sum and what it says."""
        exchanges, follows = [], list[Outgoing | SumReady](self.server.pending())
        while isinstance(stage := self.server.stage, Exchange):
            told = [out for out in follows if isinstance(out, Outgoing)]
            exchanges.append(
                {"stage": stage.value, "messages": [self.exchange(out) for out in told]}
            )
            if stage is Exchange.KEYS:
                self.scope = Scope(self.plan.context, hash_cohort(self.plan.context, self.adverts))
            follows = self.server.receive(StageEnded())
        (ready,) = (each for each in follows if isinstance(each, SumReady))
        return self.told(ready) | {"exchanges": exchanges}

    def exchange(self, out: Outgoing) -> Case:
        """One message and what its member answers."""
        told = {"member": out.member, "down": fields_of(write_request(self.request(out.event)))}
        if out.member == 3 and self.server.stage is Exchange.MASKED:
            return told | {"up": None}
        events = self.clients[out.member].receive(out.event)
        if isinstance(out.event, SharesDelivered):
            events = self.clients[out.member].receive(UpdateReady(self.words(out.member)))
        (event,) = events
        self.adverts += [event] if isinstance(event, Advert) else []
        self.server.receive(event)
        return told | {"up": fields_of(write_reply(event)), "signed": self.signed(event)}

    def request(self, event: ServerEvent) -> Request:
        """The message that carries an event."""
        if isinstance(event, RoundOpened):
            return Opening(event, CONFIG)
        return Training(event, MODEL) if isinstance(event, SharesDelivered) else event

    def signed(self, event: ClientEvent) -> bytes:
        """What an event's signature is over."""
        dealers, survivors = range(4), self.server.survivors
        match event:
            case Advert():
                return advert_bytes(self.plan.context, event)
            case ShareBundle():
                return bundle_bytes(self.scope, event)
            case MaskedUpdate():
                return masked_bytes(self.scope, dealers, event)
            case SurvivorSignature():
                return survivors_bytes(self.scope, dealers, survivors)
            case UnmaskReply():
                return reply_bytes(self.scope, survivors, event)

    def told(self, ready: SumReady) -> Case:
        """Secrets and words of everyone, and the end."""
        return {
            "context": self.plan.context,
            "cohort_hash": self.scope.cohort,
            "identities": [person(member).enrolled.identity for member in range(4)],
            "secrets": [keys.given for keys in self.keys],
            "words": [self.words(member) for member in range(4)],
            "survivors": ready.survivors,
            "sum": ready.words,
            "decoded": vars(decode_sum(ready.words, self.plan, ready.survivors)),
        }


def attempt_u32() -> Case:
    """Words of 32 bits, levels of 16."""
    with simulation_grid() as marker:
        return Attempt(make_plan(), marker).run()


def attempt_u16() -> Case:
    """Words of 16 bits, levels of 8, rotated."""
    changed = make_plan(word_bits=16, level_bits=8, rotation=secret("rotation").hex())
    with simulation_grid() as marker:
        return Attempt(changed, marker).run()


def fields_of(content: RecordDict) -> Case:
    """The fields of a message, an array as its .npy bytes."""
    told: Case = {}
    for record in content.values():
        if isinstance(record, ArrayRecord):
            told |= {name: array.data for name, array in record.items()}
        elif isinstance(record, ConfigRecord):
            told |= dict(record)
    return told
