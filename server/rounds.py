"""Rounds and their attempts: cohort, plan, exchanges, the new adapter, the commit.

Guarantee: every choice is a function of root, round, attempt and members; sums are integers; so the
same root gives the same bytes whatever the transport, the order of replies or the node ids. A round
is committed whole. Members that were asked to unmask in an attempt that failed sit out until the
model has changed (spec of secure aggregation, rule 5).

With differential privacy (rule 14) an attempt is charged, durably, before anybody is asked for a
masked vector, and none is begun that the budget does not allow. Nothing that is computed from an
exact sum is kept: the sum is noised in place before anything reads it (server/privacy.py).
"""

import logging
from collections.abc import Collection
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from fedoppu.common.adapters import Adapter
from fedoppu.common.agreed import agreed, range_bounds
from fedoppu.common.config import ThresholdSettings
from fedoppu.common.errors import DataError, RoundAborted, UsageError
from fedoppu.common.privacy import PrivacySpent
from fedoppu.common.randomness import Randomness
from fedoppu.common.rounds import Exchange, RoundPlan
from fedoppu.common.shared_adapter import apply_mean, sent_down, travelling
from fedoppu.common.thresholds import plan_thresholds
from fedoppu.common.two_server import HelperKeys
from fedoppu.server.attempt import Attempt, Outcome
from fedoppu.server.charges import Charge
from fedoppu.server.checkpoint import AttemptState, RoundCheckpoint
from fedoppu.server.exchange import Exchanger
from fedoppu.server.metrics import RoundRecord, RoundTiming, privacy_text
from fedoppu.server.ranges import next_range
from fedoppu.server.runtime import ServerRuntime
from fedoppu.server.secagg import SecAggServer
from fedoppu.server.tally import Tally
from fedoppu.server.two_server import SealedServer

logger = logging.getLogger(__name__)
# exchanges that bring masked vectors
MASKED = ("train.masked", "train.sealed")


@dataclass(frozen=True)
class Standing:
    """Where the federation stands between two rounds.

    Attributes:
        round: The last committed one; 0 before the first.
        adapter: The shared adapter.
        value_range: Of the next round.
        run_id: Of the run.
    """

    round: int
    adapter: Adapter = field(repr=False)
    value_range: float
    run_id: str

    @classmethod
    def resume(cls, runtime: ServerRuntime) -> "Standing":
        """After the last committed round, or before the first."""
        latest = runtime.checkpoints.latest()
        if latest is None:
            value_range = runtime.config.encoding.value_range
            return cls(0, runtime.initial, value_range, runtime.run_id)
        record = latest.record
        return cls(record.round, latest.adapter, record.next_range, latest.run_id)


@dataclass(frozen=True)
class Rounds:
    """Runs rounds over a Grid.

    Attributes:
        runtime: The server's side of the federation.
        exchanger: Reaches the members.
    """

    runtime: ServerRuntime = field(repr=False)
    exchanger: Exchanger = field(repr=False)

    def run(self, standing: Standing) -> Standing | None:
        """One round, in as many attempts as it takes and the configuration allows.

        Returns:
            Where the federation stands after it; None if the privacy budget allows no attempt more.

        Raises:
            RoundAborted: No attempt succeeded, or too few members may still be asked.
            ClientFailed: An exception in a client.
        """
        state, tally = self._stored(standing), Tally()
        for _ in range(self.runtime.config.thresholds.attempts):
            if not state.machine:
                state = self._next(state)
            if not self._affords(state):
                return None
            tally.begin(state.attempt)
            try:
                attempt = self._attempt(standing, state, tally)
                outcome = self._outcome(attempt, state)
            except RoundAborted as error:
                tally.aborted.append(str(error))
                state = self._give_up(state, tally)
            else:
                return self._commit(standing, state, attempt.plan, outcome=outcome, tally=tally)
        raise RoundAborted(
            f"round {state.round} was given up after {len(tally.aborted)} attempts: "
            f"{tally.aborted[-1]}; "
            f"{tally.who()}",
            hint="start the missing clients, raise the deadline or thresholds.max_drop, or set "
            "thresholds.attempts",
        )

    # --- attempts --------------------------------------------------------------------------------

    def _thresholds(self, cohort: Collection[int]) -> ThresholdSettings:
        """The config's, with the young members of a cohort counted as corrupt, as clients do."""
        settings = self.runtime.config.thresholds
        young = len(self.runtime.young.intersection(cohort))
        return replace(settings, corrupt=settings.corrupt + young)

    def _least(self, cohort: Collection[int] = ()) -> int:
        """Fewest members of a cohort."""
        settings = self._thresholds(cohort)
        return settings.least

    def _stored(self, standing: Standing) -> AttemptState:
        """The attempt that a crash interrupted, or none yet."""
        stored = self.runtime.attempts.load()
        number = standing.round + 1
        if stored is not None and (stored.run_id, stored.round) == (standing.run_id, number):
            return stored
        return AttemptState(standing.run_id, number, attempt=-1)

    def _next(self, state: AttemptState) -> AttemptState:
        """A new attempt with a new cohort, both durable before anybody is asked."""
        runtime, number, least = self.runtime, state.attempt + 1, self._least()
        out = tuple(sorted({*state.sitting_out, *state.asked}))
        known = {member for member in self.exchanger.nodes if member in runtime.roster}
        eligible = sorted(known - set(out))
        if len(eligible) < least:
            raise RoundAborted(
                f"round {state.round}: {len(eligible)} members may still be asked, {least} are "
                f"needed; members {', '.join(map(str, out)) or 'none'} were asked to unmask, or "
                "lied, and sit out until the model has changed",
                hint="enrol more members; if rounds leave the model as it was, nothing is left to "
                "learn, or encoding.value_range is far too wide",
            )
        cohort = runtime.cohorts.sample(
            self._draws(state), eligible, round=state.round, attempt=number
        )
        after = AttemptState(state.run_id, state.round, number, cohort, sitting_out=out)
        runtime.attempts.save(after)
        return after

    def _draws(self, state: AttemptState) -> Randomness:
        """Root of the cohorts. Poisson draws are this run's and this federation's alone.

        Amplified epsilons compose over federations and runs only if each draws by itself: two that ask
        the same members at the same time are one round with less noise.
        """
        config, root = self.runtime.config, self.runtime.randomness
        if config.privacy.sampling != "poisson":
            return root
        return root.child("poisson", state.run_id, config.hash().hex())

    def _give_up(self, state: AttemptState, tally: Tally) -> AttemptState:
        """Final: the masked sum is deleted; whoever was asked to unmask, or lied, is remembered.

        A lie is what its author signed: a reply that came changed on the way is only a drop.
        """
        stored = self.runtime.attempts.load() or state
        out = tuple(sorted({*stored.sitting_out, *tally.liars}))
        after = replace(stored, sitting_out=out, machine=b"")
        self.runtime.attempts.save(after)
        return after

    def _attempt(self, standing: Standing, state: AttemptState, tally: Tally) -> Attempt:
        config, least = self.runtime.config, self._least(state.cohort)
        if len(state.cohort) < least:
            raise RoundAborted(
                f"round {state.round} attempt {state.attempt}: a cohort of {len(state.cohort)} was "
                f"drawn, {least} members are needed",
                hint="raise cohort, or lower thresholds.floor",
            )
        down = sent_down(config.shared.aggregation)
        return Attempt(
            plan=self._plan(standing, state),
            config=config.canonical(),
            model=standing.adapter.spec.flatten(standing.adapter.tensors, down),
            exchanger=self.exchanger,
            tally=tally,
            tolerate_failures=self.runtime.tolerate_failures,
            decode=self.runtime.privacy.decode,
        )

    def _plan(self, standing: Standing, state: AttemptState) -> RoundPlan:
        config, adapter = self.runtime.config, standing.adapter
        graph = config.secagg.mode == "graph"
        limits = plan_thresholds(len(state.cohort), self._thresholds(state.cohort), graph=graph)
        plan = RoundPlan(
            run_id=state.run_id,
            round=state.round,
            attempt=state.attempt,
            config_hash=config.hash().hex(),
            roster_hash=self.runtime.roster.hash(),
            model_hash=adapter.digest(),
            threshold=limits.threshold,
            neighbours=limits.neighbours,
            min_cohort=limits.min_cohort,
            max_drops=limits.max_drops,
            **(
                {"value_range": float(standing.value_range)}
                | agreed(config, adapter.spec, state.round)
            ),
        )
        return self.runtime.privacy.complete(plan, len(state.cohort))

    def _outcome(self, attempt: Attempt, state: AttemptState) -> Outcome:
        if self.runtime.config.plain_updates:
            return attempt.plain(state.cohort)
        if self.runtime.config.secagg.mode == "two_server":
            return self._sealed(attempt, state)
        machine = self._machine(attempt.plan, state)

        def before(machine: SecAggServer) -> None:
            if machine.stage in MASKED:
                self._charge(state)
            if machine.stage is Exchange.UNMASK:
                asked = tuple(out.member for out in machine.pending())
                self.runtime.attempts.save(replace(state, asked=asked, machine=machine.dump()))

        return attempt.secure(machine, before=before)

    def _machine(self, plan: RoundPlan, state: AttemptState) -> SecAggServer:
        """A fresh machine, or the one that was stored before anybody was asked to unmask."""
        corrupt, roster = self._thresholds(state.cohort).corrupt, self.runtime.roster
        if not state.machine:
            return SecAggServer(plan, roster, invited=state.cohort, corrupt=corrupt)
        machine = SecAggServer.load(state.machine, roster, corrupt=corrupt)
        _require_same(machine.plan, plan)
        return machine

    def _sealed(self, attempt: Attempt, state: AttemptState) -> Outcome:
        """The two-server mode: whoever is asked may have answered, and sits out if it fails."""
        runtime, secagg = self.runtime, self.runtime.config.secagg
        if runtime.helper is None:
            raise UsageError("secagg.mode=two_server needs a link to the helper, and there is none")
        keys = HelperKeys.parse(secagg.helper, hybrid=secagg.key_exchange == "hybrid")
        if state.machine:
            machine = SealedServer.load(state.machine, runtime.roster, helper=keys)
            _require_same(machine.plan, attempt.plan)
        else:
            machine = SealedServer(attempt.plan, runtime.roster, invited=state.cohort, helper=keys)

        def before(machine: SealedServer) -> None:
            if machine.stage in MASKED:
                self._charge(state)
            asked = machine.invited
            runtime.attempts.save(replace(state, asked=asked, machine=machine.dump()))

        return attempt.sealed(machine, runtime.helper, before=before)

    # --- the budget ------------------------------------------------------------------------------

    def _charges(self, number: int) -> tuple[Charge, ...]:
        """All that was charged before or in a round; the rounds before it are committed."""
        return self.runtime.charges.all(committed=number - 1)

    def _affords(self, state: AttemptState) -> bool:
        """Whether an attempt may be begun; one that was charged before a crash is paid already."""
        if self.runtime.config.privacy.mechanism == "none" or len(state.cohort) < self._least(
            state.cohort
        ):
            return True
        charges, own = self._charges(state.round), self._own(state)
        return own in charges or self.runtime.privacy.affords([*charges, own])

    def _charge(self, state: AttemptState) -> None:
        """Durable before it returns, whatever becomes of the attempt."""
        if self.runtime.config.privacy.mechanism != "none":
            self.runtime.charges.add(self._own(state), self._charges(state.round))

    def _own(self, state: AttemptState) -> Charge:
        """The charge of an attempt."""
        members = len(self.runtime.roster.members)
        return Charge(state.run_id, state.round, state.attempt, members)

    def _spent(self, number: int) -> PrivacySpent | None:
        if self.runtime.config.privacy.mechanism == "none":
            return None
        return self.runtime.privacy.spent(self._charges(number))

    # --- the commit ------------------------------------------------------------------------------

    def _commit(
        self,
        standing: Standing,
        state: AttemptState,
        plan: RoundPlan,
        *,
        outcome: Outcome,
        tally: Tally,
    ) -> Standing:
        factors = travelling(self.runtime.config.shared.aggregation, plan.round)
        adapter = apply_mean(standing.adapter, outcome.mean, factors)
        record = _record(state, plan, outcome, tally=tally, model_hash=adapter.digest())
        record = replace(record, privacy=self._spent(state.round))
        if record.privacy is not None:
            logger.info("round %d: %s", record.round, privacy_text(record.privacy))
        timing = RoundTiming(state.round, tuple(tally.stages))
        if self.runtime.config.privacy.sampling == "poisson":
            self.runtime.checkpoints.keep_private(record)
            record, timing = record.published(), RoundTiming(state.round, ())
        checkpoint = RoundCheckpoint(state.run_id, plan.config_hash, adapter, record)
        self.runtime.checkpoints.commit(checkpoint)
        unchanged = adapter.digest() == standing.adapter.digest()
        out = self._answered() if unchanged else ()
        after = AttemptState(state.run_id, state.round + 1, attempt=-1, sitting_out=out)
        self.runtime.attempts.save(after)
        self.runtime.progress(record, timing)
        return Standing(state.round, adapter, record.next_range, state.run_id)

    def _answered(self) -> tuple[int, ...]:
        """Who was asked to unmask a sum from this model, and so answers no other one from it."""
        stored = self.runtime.attempts.load()
        return tuple(sorted({*stored.sitting_out, *stored.asked})) if stored else ()


def _require_same(stored: RoundPlan, plan: RoundPlan) -> None:
    if stored != plan:
        raise DataError(
            f"the stored attempt at round {plan.round} has another plan than this run would "
            "make: configuration, roster or model were changed",
            hint="go on with those that the run began with",
        )


def _record(
    state: AttemptState, plan: RoundPlan, outcome: Outcome, *, tally: Tally, model_hash: str
) -> RoundRecord:
    """What is recorded; of an outcome with noise, nothing that was not made of the noised sum."""
    mean = outcome.mean.astype(np.float64)
    share = _clipped_share(outcome, plan)
    return RoundRecord(
        round=state.round,
        attempt=state.attempt,
        cohort=state.cohort,
        survivors=outcome.survivors,
        drops=tally.drops,
        bytes_up=tally.bytes_up,
        bytes_down=tally.bytes_down,
        held_out_loss=outcome.held_out_loss,
        held_out_clients=outcome.held_out_clients,
        weight=outcome.weight,
        update_norm=float(np.sqrt(np.sum(np.square(mean)))),
        clipped_share=share,
        clip=plan.clip,
        value_range=plan.value_range,
        next_range=_range_after(plan, outcome, mean, share),
        model_hash=model_hash,
        liars={**outcome.liars, **tally.liars},
        aborted=tuple(tally.aborted),
    )


def _clipped_share(outcome: Outcome, plan: RoundPlan) -> float | None:
    if outcome.clipped is None:
        return None
    return outcome.clipped / max(len(outcome.survivors) * plan.num_params, 1)


def _range_after(
    plan: RoundPlan, outcome: Outcome, mean: NDArray[np.float64], share: float | None
) -> float:
    """The range of the next round; without the masked count of clamped coordinates it stays."""
    if share is None or outcome.weight is None:
        return plan.value_range
    # what was released is the update times weight / max_weight
    released = mean * (outcome.weight / plan.max_weight)
    wanted = next_range(
        plan.value_range,
        share,
        total=released,
        clients=len(outcome.survivors),
        level_bits=plan.level_bits,
    )
    finest, coarsest = range_bounds(plan.clip)
    return min(max(wanted, finest), coarsest)
