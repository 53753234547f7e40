"""The server's half of a round of secure aggregation, as a state machine without input or output.

The strategy drives it the same way in every stage: send `pending()`, hand each answer to `receive`,
and when nobody is in `waiting_for` or the time is up, `receive(StageEnded())`.

Guaranteed: the sum is the exact sum over the survivors, or the round is aborted; a client's bad
input that can be seen when it comes is that client's drop, is named, and never stops the others.
An honest server that runs this holds no one's self seed and mask key both, and asks for no secret
before it holds the signatures of more than (n + c) / 2 of the cohort over one survivor set. A
client does not rely on any of this: it has floors of its own.

Not guaranteed: that a round survives what is hidden until the end. A dealer of shares that fit
their hashes and no secret costs the round if it then drops, and is named; so does one whose offer
of a pair secret is none (`client/dealing.py`); and a vector that takes a total out of its range,
and nobody can tell whose it was. A dealer whose packages do not open is complained of
(`server/complaints.py`) before anybody is asked to unmask.

Giving up is final: an aborted machine has forgotten the masked sum and the replies, and everyone
who was asked to unmask must sit out until the model has changed (rule 5; the strategy's part).
Before that, `sufficient` says whether ending a stage now would abort, and `pending()` asks again
those who have not answered.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

import numpy as np

from fedoppu.common.cohort import Cohort, form_cohort
from fedoppu.common.errors import ProtocolError, RoundAborted
from fedoppu.common.masking import add_masks
from fedoppu.common.plain import dump_plain, load_plain
from fedoppu.common.roster import Roster
from fedoppu.common.rounds import (
    Advert,
    ClientEvent,
    CohortFixed,
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
    SurvivorsProposed,
    UnmaskReply,
    UnmaskRequested,
)
from fedoppu.common.signing import survivors_bytes
from fedoppu.common.thresholds import quorum
from fedoppu.server.answers import (
    cut_down,
    fault_in_advert,
    fault_in_bundle,
    fault_in_masked,
    fault_in_reply,
    proofs_of,
    unsigned,
)
from fedoppu.server.complaints import judge, without_complainers
from fedoppu.server.masked_sum import (
    dump_with_sum,
    read_sum,
    require_invited,
    split_dump,
    zero_sum,
)
from fedoppu.server.unmasking import Evidence, lacking, unmask


class End(StrEnum):
    """How a round ends."""

    DONE = "done"
    ABORTED = "aborted"


Stage = Exchange | End
# Every transition there is: in a stage the one kind of event, and the stage that follows when it
# ends well. A stage that ends badly leads to ABORTED.
TRANSITIONS: Mapping[Exchange, tuple[type[ClientEvent], Stage]] = {
    Exchange.KEYS: (Advert, Exchange.SHARES),
    Exchange.SHARES: (ShareBundle, Exchange.MASKED),
    Exchange.MASKED: (MaskedUpdate, Exchange.CONSISTENCY),
    Exchange.CONSISTENCY: (SurvivorSignature, Exchange.UNMASK),
    Exchange.UNMASK: (UnmaskReply, End.DONE),
}


@dataclass(frozen=True)
class _State:
    """Plain data; the mappings grow as answers come.

    Attributes:
        stage: Value of the stage.
        plan: Of the attempt.
        invited: Members that are asked, sorted.
        adverts: Valid ones, by member; after the first stage, the cohort.
        bundles: By dealer.
        masked: Members whose vectors are in the sum: their signatures.
        complaints: Sender: dealers whose shares it does not hold; only of those who complained.
        signatures: Over the survivor set.
        replies: By sender.
        spoiled: Members whose answer in this stage was bad; nobody waits for another.
        liars: Member: what it did wrong.
    """

    stage: str
    plan: RoundPlan
    invited: tuple[int, ...]
    adverts: Mapping[int, Advert] = field(default_factory=dict)
    bundles: Mapping[int, ShareBundle] = field(default_factory=dict, repr=False)
    masked: Mapping[int, bytes] = field(default_factory=dict)
    complaints: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    signatures: Mapping[int, bytes] = field(default_factory=dict)
    replies: Mapping[int, UnmaskReply] = field(default_factory=dict, repr=False)
    spoiled: tuple[int, ...] = ()
    liars: Mapping[int, str] = field(default_factory=dict)


class SecAggServer:
    """The server in one attempt at one round."""

    def __init__(
        self, plan: RoundPlan, roster: Roster, *, invited: Iterable[int], corrupt: int = 0
    ) -> None:
        """Opens an attempt.

        Args:
            plan: Its plan; its thresholds are those of `plan_thresholds` for the invited.
            roster: All members.
            invited: Members that are asked.
            corrupt: Members assumed corrupt, as in the federation's thresholds.

        Raises:
            UsageError: The invited are too many for the plan's words.
            ProtocolError: One of them is not in the roster, or the plan is for another roster.
        """
        members = require_invited(plan, roster, invited)
        self._roster = roster
        self._corrupt = corrupt
        self._state = _State(Exchange.KEYS.value, plan, members)
        self._sum = zero_sum(plan)
        self._cohort: Cohort | None = None
        self._proofs: dict[int, dict[int, tuple[bytes, ...]]] = {}  # made again after a load

    @property
    def stage(self) -> Stage:
        """Where the round is; an `Exchange`, or how it ended."""
        value = self._state.stage
        return Exchange(value) if value in list(Exchange) else End(value)

    @property
    def plan(self) -> RoundPlan:
        """The attempt's plan."""
        return self._state.plan

    @property
    def liars(self) -> Mapping[int, str]:
        """Member: what it did wrong, so far."""
        return dict(self._state.liars)

    @property
    def survivors(self) -> tuple[int, ...]:
        """Members whose vectors are in the masked sum, sorted."""
        return tuple(sorted(self._state.masked))

    @property
    def asked_to_unmask(self) -> tuple[int, ...]:
        """Members that were asked for shares; if the round is given up they sit out (rule 5)."""
        collecting = self._state.stage == Exchange.CONSISTENCY
        return () if collecting else tuple(sorted(self._state.signatures))

    @property
    def waiting_for(self) -> frozenset[int]:
        """Members whose answer in this stage is still to come."""
        state = self._state
        return self._expected() - self._answered().keys() - set(state.spoiled)

    @property
    def sufficient(self) -> bool:
        """Whether ending this stage now would go on instead of aborting the round."""
        return isinstance(self.stage, Exchange) and self._lack() is None

    def pending(self) -> list[Outgoing]:
        """The stage's events for those who have not answered: to send, and to send again."""
        return [Outgoing(member, self._event_for(member)) for member in sorted(self.waiting_for)]

    def receive(self, event: ClientEvent | StageEnded) -> list[Outgoing | SumReady]:
        """Takes an answer, or ends the stage and returns what follows.

        Returns:
            After `StageEnded` the next stage's events, or at the end one `SumReady`; else nothing.

        Raises:
            ProtocolError: The event does not belong in this stage (a late answer, for example);
                nothing has changed.
            RoundAborted: The stage ended below a threshold, or a secret is lost; the round is over
                and no sum was made.
        """
        stage = self.stage
        if isinstance(stage, End):
            raise ProtocolError(f"{type(event).__name__} came after the round was {stage.value}")
        if isinstance(event, StageEnded):
            return self._end(stage)
        wanted, _ = TRANSITIONS[stage]
        if not isinstance(event, wanted):
            raise ProtocolError(
                f"{type(event).__name__} of member {event.member} does not belong in stage "
                f"{stage.value}, which takes {wanted.__name__}: it is too late or too early"
            )
        self._take(event)
        return []

    def dump(self) -> bytes:
        """Everything but the roster: JSON, a line feed, the masked sum as little-endian words."""
        return dump_with_sum(dump_plain(self._state), self._sum)

    @classmethod
    def load(cls, data: bytes, roster: Roster, *, corrupt: int = 0) -> "SecAggServer":
        """Continues from a dump.

        Raises:
            DataError: The bytes are no dump.
        """
        head, tail = split_dump(data)
        state = load_plain(_State, head)
        server = cls(state.plan, roster, invited=state.invited, corrupt=corrupt)
        read_sum(server._sum, tail)
        server._state = state
        return server

    # --- answers ---------------------------------------------------------------------------------

    def _take(self, event: ClientEvent) -> None:
        """Records an answer, or what is wrong with it."""
        member = event.member
        if member not in self._expected():
            self._name(member, f"answered {self._state.stage} without being asked")
            return
        answered = self._answered()
        if member in answered:
            if answered[member] != event.signature:
                self._name(member, f"answered {self._state.stage} twice")
            return
        fault = self._fault(event)
        if fault is None:
            self._record(event)
        else:
            self._name(member, fault)
            self._state = replace(self._state, spoiled=(*self._state.spoiled, member))

    def _record(self, event: ClientEvent) -> None:
        state, member = self._state, event.member
        match event:
            case Advert():
                after = replace(state, adverts={**state.adverts, member: event})
            case ShareBundle():
                after = replace(state, bundles={**state.bundles, member: event})
            case MaskedUpdate():
                np.add(self._sum, event.words, out=self._sum)
                after = replace(state, masked={**state.masked, member: event.signature})
                if event.complaints:
                    complaints = {**state.complaints, member: event.complaints}
                    after = replace(after, complaints=complaints)
            case SurvivorSignature():
                after = replace(state, signatures={**state.signatures, member: event.signature})
            case UnmaskReply():
                after = replace(state, replies={**state.replies, member: event})
        self._state = after

    def _name(self, member: int, fault: str) -> None:
        # The first fault is the one that is told; what follows from it would only hide it.
        self._state = replace(self._state, liars={member: fault, **self._state.liars})

    def _expected(self) -> frozenset[int]:
        state = self._state
        asked: Mapping[str, Iterable[int]] = {
            Exchange.KEYS: state.invited,
            Exchange.SHARES: state.adverts,
            Exchange.MASKED: state.bundles,
            Exchange.CONSISTENCY: state.masked,
            Exchange.UNMASK: state.signatures,
        }
        return frozenset(asked.get(state.stage, ()))

    def _answered(self) -> Mapping[int, bytes]:
        """Who has answered this stage, with the signature, which stands for the whole answer."""
        state = self._state
        answers: Mapping[str, Mapping[int, Advert | ShareBundle | UnmaskReply]] = {
            Exchange.KEYS: state.adverts,
            Exchange.SHARES: state.bundles,
            Exchange.UNMASK: state.replies,
        }
        if state.stage == Exchange.MASKED:
            return state.masked
        if state.stage == Exchange.CONSISTENCY:
            return state.signatures
        return {m: answer.signature for m, answer in answers.get(state.stage, {}).items()}

    def _fault(self, event: ClientEvent) -> str | None:
        state, roster = self._state, self._roster
        dealers = sorted(state.bundles)
        match event:
            case Advert():
                others = state.adverts.values()
                return fault_in_advert(event, self.plan, roster, others=others)
            case ShareBundle():
                return fault_in_bundle(event, self._formed(), roster)
            case MaskedUpdate():
                return fault_in_masked(event, self._formed(), roster, dealers=dealers)
            case SurvivorSignature():
                message = survivors_bytes(self._formed().scope, dealers, self.survivors)
                return unsigned(event, message, roster)
            case UnmaskReply():
                return fault_in_reply(event, self._evidence(), roster)

    # --- the end of a stage ----------------------------------------------------------------------

    def _end(self, stage: Exchange) -> list[Outgoing | SumReady]:
        if stage is Exchange.KEYS:
            self._form()
        if stage is Exchange.MASKED:
            for member, fault in judge(self._state.complaints, self._corrupt).items():
                self._name(member, fault)
        lack = self._lack()
        if lack is not None:
            self._abort(stage, lack)
        if stage is Exchange.UNMASK:
            return [self._finish()]
        self._state = replace(self._state, stage=TRANSITIONS[stage][1].value, spoiled=())
        return list(self.pending())

    def _form(self) -> None:
        cohort, faults = form_cohort(self.plan, self._state.adverts.values(), self._roster)
        self._cohort = cohort
        liars = {**faults, **self._state.liars}
        self._state = replace(self._state, adverts=dict(cohort.adverts), liars=liars)

    def _lack(self) -> str | None:
        """What is missing for the next stage, or None."""
        state = self._state
        match self.stage:
            case Exchange.KEYS:
                return self._too_few(len(state.adverts))
            case Exchange.SHARES:
                return self._too_few(len(state.bundles)) or self._cut_off(state.bundles)
            case Exchange.MASKED:
                return self._too_few(len(state.masked)) or self._cut_off(state.bundles)
            case Exchange.CONSISTENCY:
                needed = quorum(len(state.adverts), self._corrupt)
                if len(state.signatures) < needed:
                    return f"{len(state.signatures)} signed the survivor set, {needed} must"
                return self._cut_off(state.bundles.keys() - state.signatures.keys())
            case _:
                lost = lacking(self._evidence())
                needed = self.plan.threshold
                return f"fewer than {needed} good shares of members {lost} came" if lost else None

    def _too_few(self, count: int) -> str | None:
        least, size = self.plan.min_cohort, len(self._state.adverts)
        if count < least:
            return f"{count} members of {len(self._state.invited)} asked are left, {least} must be"
        if size - count > self.plan.max_drops:
            return f"{size - count} of {size} dropped, at most {self.plan.max_drops} may"
        return None

    def _cut_off(self, owners: Iterable[int]) -> str | None:
        """Owners whose secrets could not be restored by those who answered this stage."""
        live, needed = self._answered().keys(), self.plan.threshold
        graph, complaints = self._formed().graph, self._state.complaints
        for owner in sorted(owners):
            holders = graph.live_holders(owner, without_complainers(live, owner, complaints))
            if holders < needed:
                return f"member {owner} has {holders} live holders of its shares, {needed} must be"
        return None

    def _abort(self, stage: Exchange, lack: str) -> None:
        """Ends the round for good and forgets everything that was received in confidence."""
        asked = self.asked_to_unmask
        self._sum = zero_sum(self.plan)
        self._state = replace(
            self._state,
            stage=End.ABORTED.value,
            signatures={member: self._state.signatures[member] for member in asked},
            replies={},
        )
        raise RoundAborted(
            f"round {self.plan.round} attempt {self.plan.attempt} ended in {stage.value}: {lack}",
            hint="raise thresholds.max_drop or the deadline, or ask more members",
        )

    def _finish(self) -> SumReady:
        result = unmask(self._evidence())
        liars = {**result.liars, **self._state.liars}
        self._state = replace(self._state, liars=liars)
        if result.lost:
            self._abort(Exchange.UNMASK, f"the secrets of members {result.lost} are lost")
        add_masks(self._sum, result.masks)
        ready = SumReady(self._sum, self.survivors, liars)
        self._sum = zero_sum(self.plan)
        self._state = replace(self._state, stage=End.DONE.value, replies={})
        return ready

    # --- the events of a stage -------------------------------------------------------------------

    def _event_for(self, member: int) -> ServerEvent:
        state = self._state
        match self.stage:
            case Exchange.KEYS:
                return RoundOpened(self.plan)
            case Exchange.SHARES:
                return CohortFixed(tuple(self._formed().adverts.values()))
            case Exchange.MASKED:
                return self._delivery(member)
            case Exchange.CONSISTENCY:
                return SurvivorsProposed(tuple(sorted(state.bundles)), self.survivors)
            case _:
                return UnmaskRequested(state.signatures)

    def _delivery(self, member: int) -> SharesDelivered:
        bundles = self._state.bundles
        cut = {
            dealer: cut_down(bundles[dealer], member, path=self._path(dealer, member))
            for dealer in self._formed().graph.neighbours(member)
            if dealer in bundles
        }
        return SharesDelivered(tuple(sorted(bundles)), cut)

    def _path(self, dealer: int, member: int) -> tuple[bytes, ...]:
        """What shows a member that its part of a bundle is signed, if the exchange needs it."""
        if self._formed().exchange.authentic:
            return ()
        if dealer not in self._proofs:
            self._proofs[dealer] = proofs_of(self._state.bundles[dealer])
        return self._proofs[dealer][member]

    def _evidence(self) -> Evidence:
        state = self._state
        survivors = frozenset(state.masked)
        return Evidence(self._formed(), state.bundles, survivors, state.replies)

    def _formed(self) -> Cohort:
        """The cohort, formed again after a load."""
        if self._cohort is None:
            self._cohort = Cohort(self.plan, dict(sorted(self._state.adverts.items())))
        return self._cohort
