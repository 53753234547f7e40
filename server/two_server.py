"""The server's half of a round in the two-server mode, as a state machine without input or output.

Two stages: `train.sealed`, in which each member sends its masked words and its sealed seed, and
`helper.sum`, in which the helper is asked for the masks of those who did. In between, the set is
fixed: the caller makes `dump()` durable before it asks (spec of secure aggregation, rules 4 and 5).

Guaranteed: the sum is the exact sum over the set that the helper signed, or the round is aborted;
an answer for any other set, round or request is refused and changes nothing. A member's bad input
is its own drop, and is named. What server and helper learn is told in `common/two_server.py`.

A member whose seed does not open is seen only by the helper, when its words are in the sum already.
So all masked words are kept until the helper has answered, and the bad ones are taken off again.
They are not part of a dump, which holds the sum alone. A server that was restarted in between and
then hears of a bad seed asks the same members again (`pending`), and they repeat what they sent;
without the words of the bad ones, or of all others, the sum cannot be made.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NoReturn

import numpy as np

from fedoppu.common.errors import ProtocolError, RoundAborted
from fedoppu.common.plain import dump_plain, load_plain
from fedoppu.common.quantization import VectorLayout
from fedoppu.common.roster import Roster
from fedoppu.common.rounds import Outgoing, RoundOpened, RoundPlan, SumReady, Words
from fedoppu.common.signing import verify
from fedoppu.common.two_server import (
    HelperKeys,
    MaskSum,
    MaskSumRequest,
    SealedClaim,
    SealedUpdate,
    claim_bytes,
    mask_sum_bytes,
    sealed_bytes,
)
from fedoppu.server.masked_sum import (
    dump_with_sum,
    read_sum,
    require_invited,
    split_dump,
    zero_sum,
)


class SealedStage(StrEnum):
    """Where a round is."""

    SEALED = "train.sealed"
    HELPER = "helper.sum"
    DONE = "done"
    ABORTED = "aborted"


@dataclass(frozen=True)
class _State:
    """Plain data.

    Attributes:
        stage: Value of the stage.
        plan: Of the attempt.
        invited: Members that are asked, sorted.
        claims: By member, of those whose words are here.
        spoiled: Members whose answer was bad; nobody waits for another.
        liars: Member: what it did wrong.
    """

    stage: str
    plan: RoundPlan
    invited: tuple[int, ...]
    claims: Mapping[int, SealedClaim] = field(default_factory=dict)
    spoiled: tuple[int, ...] = ()
    liars: Mapping[int, str] = field(default_factory=dict)


class SealedServer:
    """The server in one attempt at one round."""

    def __init__(
        self, plan: RoundPlan, roster: Roster, *, invited: Iterable[int], helper: HelperKeys
    ) -> None:
        """Opens an attempt.

        Args:
            plan: Its plan.
            roster: All members.
            invited: Members that are asked.
            helper: The keys that the federation's config pins.

        Raises:
            UsageError: The invited are too many for the plan's words.
            ProtocolError: One of them is not in the roster, or the plan is for another roster.
        """
        members = require_invited(plan, roster, invited)
        self._roster = roster
        self._helper = helper
        self._state = _State(SealedStage.SEALED.value, plan, members)
        self._words: dict[int, Words] = {}
        self._sum = zero_sum(plan)

    @property
    def stage(self) -> SealedStage:
        """Where the round is."""
        return SealedStage(self._state.stage)

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
        """Members whose words are in the masked sum, sorted."""
        return tuple(sorted(self._state.claims))

    @property
    def invited(self) -> tuple[int, ...]:
        """Members that are asked; if the round is given up all of them sit out (rule 5)."""
        return self._state.invited

    @property
    def sufficient(self) -> bool:
        """Whether enough members have answered to ask the helper."""
        return len(self._state.claims) >= self.plan.min_cohort

    def pending(self) -> list[Outgoing]:
        """The event for those whose words are missing: to send, and to send again.

        Once the set is fixed, those are members of it whose words a restart has lost.
        """
        opened = RoundOpened(self.plan)
        return [Outgoing(member, opened) for member in sorted(self._missing())]

    def receive(self, event: SealedUpdate) -> None:
        """Takes an answer, or records what is wrong with it; later, only what was sent before.

        Raises:
            ProtocolError: It is too late; nothing has changed.
        """
        member, state = event.member, self._state
        if member in self._missing():
            if self.stage is SealedStage.SEALED:
                self._take(event)
            else:
                self._regain(event)
        elif self.stage is not SealedStage.SEALED:
            raise ProtocolError(
                f"SealedUpdate of member {member} came in stage {self.stage.value}: too late"
            )
        elif member not in state.invited:
            self._name(member, "answered train.sealed without being asked")
        elif member in state.claims and state.claims[member].signature != event.signature:
            self._name(member, "answered train.sealed twice")

    def close(self) -> None:
        """Ends `train.sealed`: the set is fixed, and nobody else is waited for.

        Raises:
            RoundAborted: Too few have answered; the round is over.
        """
        state = self._state
        if self.stage is not SealedStage.SEALED:
            raise ProtocolError(f"the set was fixed before: the round is in {self.stage.value}")
        if not self.sufficient:
            self._abort(
                f"{len(state.claims)} members of {len(state.invited)} asked sent masked words, "
                f"{self.plan.min_cohort} must"
            )
        for words in self._words.values():
            np.add(self._sum, words, out=self._sum)
        self._state = replace(state, stage=SealedStage.HELPER.value)

    def request(self) -> MaskSumRequest:
        """What the helper is asked: the same, however often.

        Raises:
            ProtocolError: The set is not fixed yet, or the round is over.
        """
        self._require_asking()
        claims = self._state.claims
        return MaskSumRequest(self.plan, tuple(claims[member] for member in sorted(claims)))

    def unmask(self, answer: MaskSum) -> SumReady:
        """Takes the helper's answer.

        Raises:
            ProtocolError: It is not for this round and set, or not the helper's; or a bad seed's
                words were lost in a restart.
            RoundAborted: Too few seeds were good; the attempt is over.
        """
        self._require_asking()
        self._require_answer(answer)
        total = self._without(answer.unsealed) if answer.survivors else self._sum
        for member in answer.unsealed:
            self._name(member, "sealed no seed that the helper can open")
        if not answer.survivors:
            self._abort(f"{len(answer.unsealed)} seeds do not open, too few are left")
        np.subtract(total, answer.words, out=total)
        self._end(SealedStage.DONE)
        return SumReady(total, answer.survivors, self.liars)

    def dump(self) -> bytes:
        """Everything but roster and keys: JSON, a line feed, the masked sum as little-endian words."""
        return dump_with_sum(dump_plain(self._dumped()), self._sum)

    @classmethod
    def load(cls, data: bytes, roster: Roster, *, helper: HelperKeys) -> "SealedServer":
        """Continues from a dump.

        Raises:
            DataError: The bytes are no dump.
        """
        head, tail = split_dump(data)
        state = load_plain(_State, head)
        server = cls(state.plan, roster, invited=state.invited, helper=helper)
        read_sum(server._sum, tail)
        server._state = state
        return server

    # --- answers ---------------------------------------------------------------------------------

    def _missing(self) -> frozenset[int]:
        """Members whose words are not here and may still come."""
        state = self._state
        if self.stage is SealedStage.SEALED:
            return frozenset(state.invited) - state.claims.keys() - set(state.spoiled)
        if self.stage is SealedStage.HELPER:
            return frozenset(state.claims.keys() - self._words.keys())
        return frozenset()

    def _dumped(self) -> _State:
        """Before the set is fixed, whoever answered is asked again: its words are in no dump."""
        if self.stage is SealedStage.SEALED:
            return replace(self._state, claims={}, spoiled=())
        return self._state

    def _take(self, event: SealedUpdate) -> None:
        state, claim = self._state, event.claim()
        fault = self._fault(event, claim)
        if fault is None:
            self._words[event.member] = event.words
            self._state = replace(state, claims={**state.claims, event.member: claim})
        else:
            self._name(event.member, fault)
            spoiled = (*self._state.spoiled, event.member)
            self._state = replace(self._state, spoiled=spoiled)

    def _regain(self, event: SealedUpdate) -> None:
        """Takes words again that a restart has lost, if they are the same."""
        if event.claim() == self._state.claims[event.member]:
            self._words[event.member] = event.words
        else:
            self._name(event.member, "sent other masked words than before")

    def _fault(self, event: SealedUpdate, claim: SealedClaim) -> str | None:
        """What is wrong with an answer; words and seed cannot be judged here."""
        layout, words = VectorLayout.of(self.plan), event.words
        if words.shape != (layout.length,) or words.dtype != layout.dtype:
            return (
                f"sent a vector of {words.shape} {words.dtype}, "
                f"not ({layout.length},) {layout.dtype}"
            )
        size = sealed_bytes(hybrid=self.plan.hybrid)
        if len(event.sealed) != size:
            return f"sealed its seed in {len(event.sealed)} bytes, not {size}"
        message = claim_bytes(self.plan.context, claim)
        if not verify(self._roster.identity(event.member), event.signature, message):
            return "sent a SealedUpdate whose signature is not its own for this round"
        return None

    def _name(self, member: int, fault: str) -> None:
        # The first fault is the one that is told; what follows from it would only hide it.
        self._state = replace(self._state, liars={member: fault, **self._state.liars})

    # --- the helper ------------------------------------------------------------------------------

    def _require_asking(self) -> None:
        if self.stage is not SealedStage.HELPER:
            raise ProtocolError(f"the helper has no part in stage {self.stage.value}")

    def _require_answer(self, answer: MaskSum) -> None:
        """Refuses an answer that is not the helper's own for exactly this round and set."""
        if not verify(self._helper.identity, answer.signature, mask_sum_bytes(answer)):
            raise ProtocolError("the mask sum is not signed by the helper that the config pins")
        if answer.context != self.plan.context:
            raise ProtocolError("the helper answered for another round or attempt")
        told = (*answer.survivors, *answer.unsealed)
        asked = (
            self.survivors
            if answer.survivors
            else tuple(member for member in self.survivors if member in answer.unsealed)
        )
        if tuple(sorted(told)) != asked:
            raise ProtocolError(
                f"the helper answered for {len(told)} members that are not the "
                f"{len(self.survivors)} it was asked for"
            )
        # a helper could call all but one seed bad, and have this server publish that one's words
        if 0 < len(answer.survivors) < self.plan.min_cohort:
            raise ProtocolError(
                f"the helper answered for {len(answer.survivors)} members, the plan's min_cohort "
                f"is {self.plan.min_cohort}"
            )
        words, shape = answer.words, self._sum.shape
        if answer.survivors and (words.shape != shape or words.dtype != self._sum.dtype):
            raise ProtocolError(
                f"the mask sum has {words.shape} words of {words.dtype}, not {shape} of "
                f"{self._sum.dtype}"
            )

    def _without(self, members: Iterable[int]) -> Words:
        """The masked sum without some members' words."""
        bad = set(members)
        kept = set(self._state.claims) - bad
        if bad <= self._words.keys():
            total = self._sum.copy()
            for member in bad:
                np.subtract(total, self._words[member], out=total)
            return total
        if not kept <= self._words.keys():
            raise ProtocolError(
                f"the seeds of {len(bad)} members do not open, and a restart has lost the words "
                "that must be taken off the sum; the helper answers for no other set"
            )
        total = zero_sum(self.plan)
        for member in kept:
            np.add(total, self._words[member], out=total)
        return total

    # --- the end ---------------------------------------------------------------------------------

    def _abort(self, lack: str) -> NoReturn:
        self._end(SealedStage.ABORTED)
        raise RoundAborted(
            f"round {self.plan.round} attempt {self.plan.attempt} ended: {lack}",
            hint="raise thresholds.max_drop or the deadline, or ask more members",
        )

    def _end(self, stage: SealedStage) -> None:
        """The round is over: masked words and sum are forgotten."""
        self._words, self._sum = {}, zero_sum(self.plan)
        self._state = replace(self._state, stage=stage.value)
