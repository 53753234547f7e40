"""Our secure aggregation, run by the real state machines: one client of a cohort, or a whole round.

Everything that a device would do is counted: keys, signatures, the checks of every peer's advert
(the process's memory of checked signatures is emptied before each measurement), the policy, the
release of the update, the masks, and the bytes of the vector. Keys come from a seed, so that the
peers' packages fit the client again in the next measurement; drawing them costs no more from the
operating system.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fedoppu.client.jobs import LocalUpdate
from fedoppu.client.policy import ClientPolicy
from fedoppu.client.release import release
from fedoppu.client.secagg import Pins, SecAggClient
from fedoppu.client.two_server import seal_update
from fedoppu.common.cohort import form_cohort
from fedoppu.common.masking import Mask, add_masks, public_key
from fedoppu.common.messages import write_reply
from fedoppu.common.quantization import VectorLayout, decode_sum
from fedoppu.common.randomness import Randomness
from fedoppu.common.roster import Roster
from fedoppu.common.rounds import (
    ClientEvent,
    CohortFixed,
    Exchange,
    MaskedUpdate,
    Outgoing,
    RoundPlan,
    ServerEvent,
    StageEnded,
    SumReady,
    UpdateReady,
    Words,
)
from fedoppu.common.signing import Identity, masked_bytes, verify, verify_public
from fedoppu.common.signing import Scope as Binding
from fedoppu.common.two_server import HelperKeys, SealedUpdate
from fedoppu.server.secagg import SecAggServer
from fedoppu.simulations.benchmarks.meters import Meter, Stopwatch, cpu_seconds
from fedoppu.simulations.benchmarks.secagg_cases import Case
from fedoppu.simulations.key_source import GridMarker, SeededKeySource

SHARES, RELEASE, MASKING = "share phase", "release", "masking"
CONFIG_HASH, MODEL_HASH, RUN_ID, SEED = "c0" * 32, "d0" * 32, "aa" * 16, "5e" * 32
MAX_WEIGHT = 64
RANDOMNESS = Randomness.from_seed(0)


@dataclass(frozen=True)
class Cohort:
    """Identities, roster and plan of a case, and the clients on demand.

    Attributes:
        case: Sizes.
        people: Identities by member.
        roster: Of them.
        plan: Without rotation.
        marker: Lets the seeded keys work.
    """

    case: Case
    people: tuple[Identity, ...] = field(repr=False)
    roster: Roster = field(repr=False)
    plan: RoundPlan
    marker: GridMarker = field(default_factory=GridMarker, repr=False)

    @classmethod
    def of(cls, case: Case, *, word_bits: int = 32, hybrid: bool = False) -> "Cohort":
        """The cohort of a case; 16-bit words hold 8-bit levels."""
        people = tuple(Identity(i, _seed("identity", i)) for i in range(case.size))
        roster = Roster(tuple(person.enrolled for person in people))
        plan = _plan(case, roster, word_bits)
        return cls(case, people, roster, replace(plan, hybrid=hybrid))

    def client(self, member: int) -> SecAggClient:
        """A new client that makes the same keys whenever it is made."""
        keys = SeededKeySource(RANDOMNESS, member, self.marker)
        pins = Pins(self.roster, CONFIG_HASH)
        return SecAggClient(self.people[member], pins, policy=_policy(self.case), keys=keys)

    def update(self) -> LocalUpdate:
        """An update that must be clipped and scaled by its weight."""
        vector = RANDOMNESS.stream("update").normal(size=self.plan.num_params)
        vector *= 2 * self.plan.clip / np.linalg.norm(vector)
        return LocalUpdate(self.plan.context, vector.astype(np.float32), MAX_WEIGHT // 2, 2.5)


def _seed(purpose: str, member: int) -> bytes:
    return hashlib.sha256(f"benchmark {purpose} {member}".encode()).digest()


def _plan(case: Case, roster: Roster, word_bits: int) -> RoundPlan:
    return RoundPlan(
        run_id=RUN_ID,
        round=1,
        attempt=0,
        config_hash=CONFIG_HASH,
        roster_hash=roster.hash(),
        model_hash=MODEL_HASH,
        num_params=case.num_params,
        factors="B",
        clip=1.0,
        value_range=6 / case.num_params**0.5,
        word_bits=word_bits,
        level_bits=word_bits // 2,
        max_weight=MAX_WEIGHT,
        threshold=case.threshold,
        neighbours=case.neighbours,
        min_cohort=len(case.live),
        max_drops=len(case.gone),
    )


def _policy(case: Case) -> ClientPolicy:
    """The default policy's floor where the cohort is large enough for it."""
    if not case.corrupt:
        return ClientPolicy.for_simulation()
    return replace(
        ClientPolicy.for_simulation(), floor=min(20, case.size // 5), corrupt=case.corrupt
    )


# --- one client ----------------------------------------------------------------------------------


class OurClient:
    """Member 0 of a cohort whose other members have sent what it needs.

    Attributes:
        sent: What it sent in its last run.
        inbox: What it is sent: plan, cohort, shares.
    """

    def __init__(self, cohort: Cohort) -> None:
        """Runs the cohort's first two exchanges, for what member 0 is sent in them."""
        self.cohort = cohort
        self.update = cohort.update()
        self.rotated = replace(cohort.plan, rotation=SEED)
        self.sent: list[ClientEvent] = []
        self.inbox = OurRound(cohort, Stopwatch()).inbox()

    def run(self) -> dict[str, float]:
        """From the plan to the bytes of the masked vector: CPU seconds of each part."""
        watch, client, plan = Stopwatch(), self.cohort.client(0), self.cohort.plan
        answers: list[ClientEvent] = []
        verify_public.cache_clear()
        with watch.part(SHARES):
            for event in self.inbox:
                answers += client.receive(event)
        with watch.part(RELEASE):
            words = release(self.update, plan, RANDOMNESS)
        with watch.part(MASKING):
            answers += client.receive(UpdateReady(words))
            write_reply(answers[-1])
        self.sent = answers
        return watch.seconds

    def run_checks(self) -> float:
        """CPU seconds of checking the adverts of the cohort: part of the share phase."""
        cohort = self.cohort
        fixed = next(event for event in self.inbox if isinstance(event, CohortFixed))
        verify_public.cache_clear()
        return cpu_seconds(lambda: form_cohort(cohort.plan, fixed.adverts, cohort.roster))

    def run_rotated_release(self) -> float:
        """CPU seconds of the release of the same update under a plan with rotation."""
        update = replace(self.update, context=self.rotated.context)
        return cpu_seconds(lambda: release(update, self.rotated, RANDOMNESS))


class TwoServerClient:
    """A member's part in the two-server mode: release, mask, seal, sign."""

    def __init__(self, case: Case) -> None:
        """Makes the helper's keys and a plan without a graph."""
        cohort = Cohort.of(case)
        self.plan = replace(cohort.plan, neighbours=1, threshold=1)
        self.update = replace(cohort.update(), context=self.plan.context)
        self.person = cohort.people[0]
        self.keys = SeededKeySource(RANDOMNESS, 0, cohort.marker)
        self.helper = HelperKeys(public_key(_seed("helper", 0)), self.person.enrolled.identity)

    def run(self) -> SealedUpdate:
        """The one message that a client sends."""
        words = release(self.update, self.plan, RANDOMNESS)
        sealed = seal_update(words, self.plan, self.person, helper=self.helper, keys=self.keys)
        write_reply(sealed)
        return sealed


# --- a whole round -------------------------------------------------------------------------------


class OurRound:
    """A server and all clients, in memory; a vector is held no longer than until it is added.

    Attributes:
        server: The machine that is measured.
        meter: Of the server alone, by exchange.
        seen: What was sent to member 0, and what it answered.
        own: CPU seconds of member 0, by exchange. It answers first, so it finds no signature that
            another has checked.
        held: Bytes of the server's state once the vectors are summed.
    """

    def __init__(self, cohort: Cohort, meter: Meter) -> None:
        """Makes server and clients."""
        self.cohort, self.meter = cohort, meter
        case = cohort.case
        self.server = SecAggServer(
            cohort.plan, cohort.roster, invited=range(case.size), corrupt=case.corrupt
        )
        self.clients = {person.member: cohort.client(person.member) for person in cohort.people}
        self.seen: list[ServerEvent | ClientEvent] = []
        self.own = Stopwatch()
        self.held = 0

    def inbox(self) -> list[ServerEvent]:
        """What member 0 is sent until it masks."""
        follows = self._ask()
        events = [follows[0].event]
        while self.server.stage is not Exchange.MASKED:
            follows = self._exchange(follows)
            events.append(follows[0].event)
        return events

    def run(self) -> None:
        """The round to its decoded sum.

        Raises:
            RuntimeError: The sum is not that of the survivors' vectors.
        """
        verify_public.cache_clear()
        follows = self._ask()
        while self.server.stage is not Exchange.UNMASK:
            follows = self._exchange(follows)
        self.held = len(self.server.dump())
        for message in follows:
            self._answer(message)
        with self.meter.part(Exchange.UNMASK):
            ready = self.server.receive(StageEnded())[0]
            if isinstance(ready, SumReady):
                decode_sum(ready.words, self.cohort.plan, ready.survivors)
        self._check(ready)

    def _ask(self) -> list[Outgoing]:
        with self.meter.part(Exchange.KEYS):
            return self.server.pending()

    def _exchange(self, follows: Sequence[Outgoing]) -> list[Outgoing]:
        stage = self.server.stage
        gone = set(self.cohort.case.gone) if stage is Exchange.MASKED else set()
        for message in follows:
            if message.member not in gone:
                self._answer(message)
        with self.meter.part(stage.value):
            ended = self.server.receive(StageEnded())
        return [message for message in ended if isinstance(message, Outgoing)]

    def _answer(self, message: Outgoing) -> None:
        client, stage = self.clients[message.member], self.server.stage
        with self.own.part(stage.value if message.member == 0 else "others"):
            answers = client.receive(message.event)
        if stage is Exchange.MASKED:
            answers = client.receive(UpdateReady(self._words(message.member)))
        if message.member == 0:
            self.seen += [message.event, *answers]
        for answer in answers:
            with self.meter.part(stage.value):
                self.server.receive(answer)

    def _words(self, member: int) -> Words:
        """Any levels, and zero for the scalars: what they say changes no cost of the server's."""
        layout = VectorLayout.of(self.cohort.plan)
        words = np.zeros(layout.length, layout.dtype)
        stream, most = RANDOMNESS.stream("levels", member), 2 * layout.middle
        levels = stream.integers(0, most, layout.num_params, dtype=layout.dtype, endpoint=True)
        words[: layout.num_params] = levels
        return words

    def _check(self, ready: Outgoing | SumReady) -> None:
        live = self.cohort.case.live
        expected = self._words(live[0])
        for member in live[1:]:
            expected += self._words(member)
        right = isinstance(ready, SumReady) and np.array_equal(expected, ready.words)
        if not right:
            raise RuntimeError("the sum is wrong: its figures would mean nothing")


class OurTerms:
    """What the server does once for each vector or mask, to be multiplied.

    For cohorts in which a whole round at this length would take many minutes: the rest of a round
    does not depend on the length, so a whole round at a smaller one gives it.
    """

    BATCH = 32  # masks in one pass, as many as a server takes off at once and more change no rate

    def __init__(self, cohort: Cohort) -> None:
        """Makes one signed vector."""
        self.cohort, layout = cohort, VectorLayout.of(cohort.plan)
        self.words = np.zeros(layout.length, layout.dtype)
        self.total = self.words.copy()
        person, binding = cohort.people[0], Binding(cohort.plan.context, bytes(32))
        message = masked_bytes(binding, (), MaskedUpdate(0, self.words, b""))
        self.update = MaskedUpdate(0, self.words, person.sign(message))
        self.binding, self.identity = binding, person.enrolled.identity

    def counted(self) -> float:
        """CPU seconds of all that depends on the length, of the terms measured now."""
        case = self.cohort.case
        live, gone = len(case.live), len(case.gone)
        pairs = gone * round(case.neighbours * live / (case.size - 1))
        masks = [Mask(bytes([number]) * 32) for number in range(self.BATCH)]
        mask = cpu_seconds(lambda: add_masks(self.total, masks)) / self.BATCH
        return live * cpu_seconds(self._add) + (live + pairs) * mask + cpu_seconds(self._decode)

    def _add(self) -> None:
        message = masked_bytes(self.binding, (), self.update)
        verify(self.identity, self.update.signature, message)
        np.add(self.total, self.words, out=self.total)

    def _decode(self) -> None:
        decode_sum(self.words, self.cohort.plan, self.cohort.case.live)
