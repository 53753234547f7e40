"""One attempt at a round: the exchanges that the protocol names, from a plan to a decoded sum.

Guarantee (spec of secure aggregation, rule 5): survivors and masked sum are durable before anybody
is asked to unmask, the helper of the two-server mode included; missing unmask replies are asked for
again, of the same survivors alone; giving up is final.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from flwr.app import RecordDict
from numpy.typing import NDArray

from fedoppu.common.errors import ProtocolError, RoundAborted
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
    write_request,
    write_requests,
)
from fedoppu.common.quantization import decode_sum
from fedoppu.common.rounds import (
    ClientEvent,
    Exchange,
    Outgoing,
    RoundOpened,
    RoundPlan,
    SharesDelivered,
    StageEnded,
    SumReady,
)
from fedoppu.common.two_server import SealedUpdate
from fedoppu.server.exchange import Exchanger, Silence
from fedoppu.server.helper import HelperLink
from fedoppu.server.secagg import SecAggServer
from fedoppu.server.tally import Tally
from fedoppu.server.two_server import SealedServer, SealedStage

ASK_AGAIN = 3  # times that missing replies are asked for, where who was asked cannot be replaced
FINAL: tuple[Silence, ...] = ("dropped", "refused", "malformed")  # no other answer would come
Machine = SecAggServer | SealedServer


@dataclass(frozen=True)
class Outcome:
    """What a successful attempt says.

    Attributes:
        mean: (num_params,) float32, the weighted mean update; with differential privacy the noised
            sum over the expected number of clients.
        weight: Sum of the weights; None where it does not travel.
        held_out_loss: Federated mean, nats, or None.
        held_out_clients: Clients in it, or None.
        clipped: Coordinates beyond the range, over all survivors; None where it does not travel.
        survivors: Sorted.
        liars: Member: what it did wrong.
    """

    mean: NDArray[np.float32] = field(repr=False)
    weight: int | None
    held_out_loss: float | None
    held_out_clients: int | None
    clipped: int | None
    survivors: tuple[int, ...]
    liars: Mapping[int, str]


def decode_exactly(ready: SumReady, plan: RoundPlan) -> Outcome:
    """The weighted mean and the metrics of a sum to which nothing is added.

    Raises:
        RoundAborted: A total is out of the survivors' reach.
    """
    decoded = decode_sum(ready.words, plan, ready.survivors)
    return Outcome(
        mean=decoded.mean_update,
        weight=decoded.total_weight,
        held_out_loss=decoded.held_out_loss,
        held_out_clients=decoded.held_out_clients,
        clipped=decoded.clipped,
        survivors=ready.survivors,
        liars=ready.liars,
    )


@dataclass(frozen=True)
class Attempt:
    """The parts of an attempt.

    Attributes:
        plan: Its plan.
        config: Canonical bytes of the federation's config.
        model: (num_params,) float32, the factors that are sent down.
        exchanger: Reaches the members.
        tally: Of the round.
        tolerate_failures: Whether an exception in a client is a drop.
        decode: Makes an outcome of the exact sum, and is the last to see it.
    """

    plan: RoundPlan
    config: bytes = field(repr=False)
    model: NDArray[np.float32] = field(repr=False)
    exchanger: Exchanger = field(repr=False)
    tally: Tally = field(repr=False)
    tolerate_failures: bool = False
    decode: Callable[[SumReady, RoundPlan], Outcome] = decode_exactly

    # --- secure ----------------------------------------------------------------------------------

    def secure(self, machine: SecAggServer, *, before: Callable[[SecAggServer], None]) -> Outcome:
        """Drives a machine from where it is to the sum.

        Args:
            machine: Fresh, or loaded where a crash left it.
            before: Is given the machine before each exchange, and makes durable what must be then.

        Raises:
            RoundAborted: A stage ended below a threshold, or the sum cannot be.
            ClientFailed: An exception in a client.
        """
        while isinstance(stage := machine.stage, Exchange):
            before(machine)
            with self.tally.timed(stage.value):
                self._ask(machine, stage.value)
                if stage is Exchange.UNMASK:
                    self._ask_again(machine, "query.unmask")
                following = self._end(machine)
            for event in following:
                if isinstance(event, SumReady):
                    return self.decode(event, self.plan)
        raise RoundAborted(f"round {self.plan.round} had been given up before")

    def _end(self, machine: SecAggServer) -> list[Outgoing | SumReady]:
        """Ends a stage; what is found only then is in what its author signed."""
        before = set(machine.liars)
        try:
            return machine.receive(StageEnded())
        finally:
            lies = machine.liars
            self.tally.accuse({member: lies[member] for member in lies if member not in before})

    def _ask(self, machine: Machine, name: Stage) -> None:
        """One exchange; what the machine does not accept counts as that member's drop."""
        requests = {out.member: self._request(out, name) for out in machine.pending()}
        contents = write_requests(requests)
        answers = self.exchanger.exchange(name, contents, str(self.plan.round))
        self.tally.add(name, answers, tolerate_failures=self.tolerate_failures)
        before = set(machine.liars)
        for member in sorted(answers.replies):
            _take(machine, answers.replies[member])
        self.tally.name(name, set(machine.liars) - before, machine.liars)

    def _ask_again(self, machine: Machine, name: Stage) -> None:
        for _ in range(ASK_AGAIN):
            silent = self.tally.faults.get(name, {}).values()
            if machine.sufficient or all(fault.silence in FINAL for fault in silent):
                return
            self._ask(machine, name)

    def _request(self, out: Outgoing, name: Stage) -> Request:
        match out.event:
            case RoundOpened() if name == SEALED:
                return SealedTraining(out.event, self.config, self.model)
            case RoundOpened():
                return Opening(out.event, self.config)
            case SharesDelivered():
                return Training(out.event, self.model)
            case _:
                return out.event

    # --- two servers -----------------------------------------------------------------------------

    def sealed(
        self,
        machine: SealedServer,
        helper: HelperLink,
        *,
        before: Callable[[SealedServer], None],
    ) -> Outcome:
        """The two-server mode: one exchange with the members, and one with the helper.

        Args:
            machine: Fresh, or loaded where a crash left it.
            helper: Is asked for the masks of those who answered.
            before: Is given the machine before each exchange, and makes it durable: whoever was
                asked may have answered, and takes part in no other attempt.

        Raises:
            RoundAborted: Too few sent masked words or a good seed; another attempt may be made.
            ProtocolError: The helper refuses, or its answer or the sum cannot be used. It answers
                for a round once, so there is no other attempt.
            ClientFailed: An exception in a client.
        """
        if machine.stage is SealedStage.SEALED:
            before(machine)
            with self.tally.timed(SEALED):
                self._ask(machine, SEALED)
                self._ask_again(machine, SEALED)
            machine.close()
        before(machine)
        return self._decode_once(self._unmasked(machine, helper))

    def _unmasked(self, machine: SealedServer, helper: HelperLink) -> SumReady:
        """The helper's part; whose seed is bad is in what its author signed."""
        before = set(machine.liars)
        try:
            with self.tally.timed(SealedStage.HELPER.value):
                answer = helper.ask(machine.request())
                if answer.unsealed and machine.pending():
                    self._ask(machine, SEALED)
                return machine.unmask(answer)
        finally:
            lies = machine.liars
            self.tally.accuse({member: lies[member] for member in lies if member not in before})

    def _decode_once(self, ready: SumReady) -> Outcome:
        try:
            return self.decode(ready, self.plan)
        except RoundAborted as error:
            raise ProtocolError(
                f"{error}; the helper has answered for round {self.plan.round} and answers for no "
                "other set",
                hint="the run ends here; see who took part in this round before beginning another",
            ) from None

    # --- research only ---------------------------------------------------------------------------

    def plain(self, cohort: Sequence[int]) -> Outcome:
        """One exchange in which updates travel in clear: the server sees each of them.

        Raises:
            RoundAborted: Fewer than the plan's min_cohort answered.
            ClientFailed: An exception in a client.
        """
        request = PlainTraining(RoundOpened(self.plan), self.config, self.model)
        content: RecordDict = write_request(request)
        with self.tally.timed(PLAIN):
            answers = self.exchanger.exchange(
                PLAIN, dict.fromkeys(cohort, content), str(self.plan.round)
            )
        self.tally.add(PLAIN, answers, tolerate_failures=self.tolerate_failures)
        updates = [
            reply
            for _, reply in sorted(answers.replies.items())
            if isinstance(reply, PlainUpdate) and reply.vector.shape == (self.plan.num_params,)
        ]
        if len(updates) < self.plan.min_cohort:
            raise RoundAborted(
                f"round {self.plan.round} attempt {self.plan.attempt}: {len(updates)} of "
                f"{len(cohort)} members answered, {self.plan.min_cohort} must"
            )
        return _mean_of(updates, self.plan)


def _take(machine: Machine, reply: Reply) -> None:
    """Hands a reply to the machine that it is for."""
    if isinstance(machine, SealedServer):
        if isinstance(reply, SealedUpdate):
            machine.receive(reply)
    elif isinstance(reply, ClientEvent):
        machine.receive(reply)


def _mean_of(updates: Sequence[PlainUpdate], plan: RoundPlan) -> Outcome:
    """The weighted mean of clear updates, summed in the order of the members."""
    weights = [min(update.weight, plan.max_weight) for update in updates]
    total = np.zeros(plan.num_params, np.float64)
    for update, weight in zip(updates, weights, strict=True):
        total += weight * update.vector.astype(np.float64)
    losses = [update.held_out_loss for update in updates if update.held_out]
    shown = len(losses) >= plan.min_cohort
    return Outcome(
        mean=(total / max(sum(weights), 1)).astype(np.float32),
        weight=sum(weights),
        held_out_loss=sum(losses) / len(losses) if shown else None,
        held_out_clients=len(losses) if shown else 0,
        clipped=0,
        survivors=tuple(update.member for update in updates),
        liars={},
    )
