"""n clients and a server in memory, with chosen drops: what every test of the protocol drives."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fedoppu.client.policy import ClientPolicy
from fedoppu.client.secagg import Pins, SecAggClient
from fedoppu.common.config import ThresholdSettings
from fedoppu.common.errors import ProtocolError
from fedoppu.common.quantization import VectorLayout
from fedoppu.common.roster import Roster
from fedoppu.common.rounds import (
    ClientEvent,
    Exchange,
    Outgoing,
    RoundPlan,
    ServerEvent,
    StageEnded,
    SumReady,
    UpdateReady,
    Words,
)
from fedoppu.common.signing import Identity
from fedoppu.common.thresholds import plan_thresholds
from fedoppu.server.secagg import SecAggServer

CONFIG_HASH = "c0" * 32
Tamper = Callable[[ClientEvent], ClientEvent]


class HashKeys:
    """Deterministic keys, for tests alone."""

    def __init__(self, name: str) -> None:
        self.name = name

    def secret(self, purpose: str, length: int) -> bytes:
        return hashlib.shake_256(f"{self.name} {purpose}".encode()).digest(length)


def identities(n: int) -> list[Identity]:
    return [Identity(i, hashlib.sha256(b"identity %d" % i).digest()) for i in range(n)]


def roster_of(people: Sequence[Identity]) -> Roster:
    return Roster(tuple(person.enrolled for person in people))


def make_plan(
    n: int, roster: Roster, *, settings: ThresholdSettings | None = None, num_params: int = 3
) -> RoundPlan:
    """A plan for n invited members with 16-bit levels in 32-bit words."""
    thresholds = plan_thresholds(n, settings or ThresholdSettings())
    return RoundPlan(
        run_id="aa" * 16,
        round=1,
        attempt=0,
        config_hash=CONFIG_HASH,
        roster_hash=roster.hash(),
        model_hash="d0" * 32,
        num_params=num_params,
        factors="B",
        clip=1.0,
        value_range=0.5,
        word_bits=32,
        level_bits=16,
        max_weight=64,
        threshold=thresholds.threshold,
        neighbours=thresholds.neighbours,
        min_cohort=thresholds.min_cohort,
        max_drops=thresholds.max_drops,
    )


@dataclass
class Federation:
    """One attempt: a plan, a server, clients, and everything that was said.

    Attributes:
        drops: Stage: members that do not answer it, nor any later one.
        tamper: Member: what is done to its answers before the server sees them.
        spoof: Member: what a malicious server does to what it sends it.
        refusals: Member: why it broke off. A member that is in it from the start may do so.
    """

    n: int
    settings: ThresholdSettings = field(default_factory=ThresholdSettings)
    policy: ClientPolicy = field(default_factory=ClientPolicy.for_simulation)
    narrow: bool = False
    hybrid: bool = False
    num_params: int = 3
    drops: Mapping[Exchange, frozenset[int]] = field(default_factory=dict)
    tamper: Mapping[int, Tamper] = field(default_factory=dict)
    spoof: Mapping[int, Callable[[ServerEvent], ServerEvent]] = field(default_factory=dict)
    reload: bool = False
    refusals: dict[int, str] = field(default_factory=dict)
    sent: list[ClientEvent] = field(default_factory=list)
    delivered: list[Outgoing] = field(default_factory=list)

    def __post_init__(self) -> None:
        people = identities(self.n)
        self.roster = roster_of(people)
        plan = make_plan(self.n, self.roster, settings=self.settings, num_params=self.num_params)
        plan = replace(plan, hybrid=self.hybrid)
        self.plan = replace(plan, word_bits=16, level_bits=8) if self.narrow else plan
        self.pins = Pins(self.roster, CONFIG_HASH)
        self.clients = {
            person.member: SecAggClient(
                person, self.pins, policy=self.policy, keys=HashKeys(f"client {person.member}")
            )
            for person in people
        }
        self.people = people
        self.server = SecAggServer(
            self.plan, self.roster, invited=range(self.n), corrupt=self.settings.corrupt
        )
        self.gone: set[int] = set()

    def words(self, member: int) -> Words:
        """The released integers of a member: any levels at all."""
        layout = VectorLayout.of(self.plan)
        most = min(2 * layout.middle, 255)
        stream = np.random.default_rng([member, self.n])
        return stream.integers(0, most + 1, layout.length).astype(layout.dtype)

    def plain_sum(self, members: Sequence[int]) -> Words:
        """The control: the integer sum that the server must arrive at."""
        layout = VectorLayout.of(self.plan)
        total = sum((self.words(m).astype(np.uint64) for m in members), np.zeros((), np.uint64))
        return np.asarray(total % (1 << layout.word_bits)).astype(layout.dtype)

    def answer(self, outgoing: Outgoing) -> list[ClientEvent]:
        """One client's answer to one event, its own update included."""
        client = self.clients[outgoing.member]
        if self.reload:
            client = self.reloaded(client)
        answers = client.receive(outgoing.event)
        if self.server.stage is Exchange.MASKED:
            if self.reload:
                client = self.reloaded(client)
            answers = client.receive(UpdateReady(self.words(outgoing.member)))
        return answers

    def spoofed(self, outgoing: Outgoing) -> Outgoing:
        """A message as the member gets it."""
        if outgoing.member not in self.spoof:
            return outgoing
        return replace(outgoing, event=self.spoof[outgoing.member](outgoing.event))

    def answer_or_refuse(self, outgoing: Outgoing) -> list[ClientEvent]:
        """The answer, or none of a member that may break off and does."""
        if outgoing.member not in self.refusals:
            return self.answer(outgoing)
        try:
            return self.answer(outgoing)
        except ProtocolError as error:
            self.refusals[outgoing.member] = str(error)
            self.gone.add(outgoing.member)
            return []

    def reloaded(self, client: SecAggClient) -> SecAggClient:
        """The client after a restart: dumped, and loaded into a new object."""
        again = SecAggClient.load(
            client.dump(),
            self.people[client.member],
            self.pins,
            policy=self.policy,
            keys=HashKeys(f"client {client.member}"),
        )
        self.clients[client.member] = again
        return again

    def step(self, outgoing: Sequence[Outgoing]) -> list[Outgoing | SumReady]:
        """One exchange: everyone who is there answers, then the stage ends."""
        assert isinstance(self.server.stage, Exchange)
        self.gone |= self.drops.get(self.server.stage, frozenset())
        for message in map(self.spoofed, outgoing):
            self.delivered.append(message)
            if message.member in self.gone:
                continue
            for event in self.answer_or_refuse(message):
                changed = self.tamper.get(message.member, _same)(event)
                self.sent.append(changed)
                self.server.receive(changed)
        if self.reload:
            self.server = SecAggServer.load(
                self.server.dump(), self.roster, corrupt=self.settings.corrupt
            )
        return self.server.receive(StageEnded())

    def until(self, stage: Exchange) -> list[Outgoing]:
        """Runs up to a stage and returns its events, not yet delivered."""
        outgoing = self.server.pending()
        while self.server.stage is not stage:
            outgoing = [item for item in self.step(outgoing) if isinstance(item, Outgoing)]
        return outgoing

    def run(self) -> SumReady:
        """The whole attempt."""
        return self.finish(self.server.pending())

    def finish(self, outgoing: Sequence[Outgoing]) -> SumReady:
        """From the events of any stage to the end."""
        follows: list[Outgoing | SumReady] = list(outgoing)
        while isinstance(self.server.stage, Exchange):
            follows = self.step([item for item in follows if isinstance(item, Outgoing)])
        (ready,) = follows
        assert isinstance(ready, SumReady)
        return ready


def _same(event: ClientEvent) -> ClientEvent:
    return event


def unevenness(words: Words) -> float:
    """How far the bytes are from uniform: chi-square of 256 bins, in standard deviations."""
    seen = np.bincount(words.view(np.uint8), minlength=256)
    expected = seen.sum() / 256
    statistic = float(np.sum((seen - expected) ** 2) / expected)
    return (statistic - 255) / math.sqrt(2 * 255)


def event_for(outgoing: Sequence[Outgoing], member: int) -> ServerEvent:
    """What is sent to one member."""
    return next(item.event for item in outgoing if item.member == member)
