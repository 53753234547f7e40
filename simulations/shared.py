"""The shared phase of one federation of a run: ServerApp and ClientApps over our own Grid, or Flower's engine."""

import math
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedoppu.client.app import build_client_app
from fedoppu.common.adapters import Adapter, AdapterSpec
from fedoppu.common.agreed import agreed
from fedoppu.common.base import BaseFacts
from fedoppu.common.config import FederationConfig, PersonalSettings, RunConfig
from fedoppu.common.defaults import adapter_spec, personal_settings, personal_spec
from fedoppu.common.errors import ClientFailed
from fedoppu.common.privacy import Participation, largest_cohort
from fedoppu.common.quantization import require_no_overflow
from fedoppu.common.randomness import Randomness
from fedoppu.common.rounds import RoundPlan
from fedoppu.common.shared_adapter import travelling
from fedoppu.common.thresholds import plan_thresholds
from fedoppu.server.app import run_rounds
from fedoppu.server.directory import FixedDirectory
from fedoppu.server.metrics import RoundRecord, RoundTiming
from fedoppu.server.privacy import privacy_of
from fedoppu.server.runtime import ServerRuntime
from fedoppu.simulations.app import MemberSpec, run_in_flower
from fedoppu.simulations.console import Console
from fedoppu.simulations.costs import Costs
from fedoppu.simulations.executors import GroupExecutor
from fedoppu.simulations.grid import LocalGrid, node_id
from fedoppu.simulations.key_source import GridMarker, simulation_grid
from fedoppu.simulations.runtime import (
    SimulatedFederation,
    SimulatedUsers,
    simulate_members,
    simulated_server,
)
from fedoppu.simulations.users import PreparedUsers
from fedoppu.simulations.workers import WorkerSpec

Record = dict[str, Any]


@dataclass(frozen=True)
class SharedPhase:
    """One federation of a run: one seed, task, k and profile.

    Attributes:
        run: The settings.
        base: Facts of the base.
        config: What its parties agree on.
        seed: Root of its random choices.
        users: Its users.
        folder: Where its results go.
    """

    run: RunConfig
    base: BaseFacts
    config: FederationConfig
    seed: int
    users: PreparedUsers
    folder: Path

    @property
    def name(self) -> str:
        """For people."""
        return (
            f"{self.config.task} k={self.config.k} profile={self.config.profile} seed={self.seed}"
        )

    @property
    def spec(self) -> WorkerSpec:
        """What a worker needs to know."""
        return WorkerSpec(
            base=self.run.base,
            users=self.users.folder,
            federation=self.config.canonical(),
            personal=personal_settings(self.run, self.base, self.config.task),
            seed=self.seed,
            threads=self.run.threads,
            group_users=self.run.group_users,
            device=self.run.device,
            checkpointing=self.run.checkpointing,
        )

    @property
    def randomness(self) -> Randomness:
        """Root of the run."""
        return Randomness.from_seed(self.seed)

    @property
    def noise_note(self) -> str:
        """How the noise compares with what it hides, or an empty string without noise."""
        config = self.config
        multiplier = config.privacy.noise_multiplier
        if config.privacy.mechanism == "none" or multiplier is None:
            return ""
        factors = travelling(config.shared.aggregation, 1)
        length = _spec(config, self.base).num_params(factors)
        signal = config.cohort / (multiplier * math.sqrt(length))
        return (
            f"{config.privacy.mechanism} noise of {multiplier:g} sensitivities: a mean of updates at "
            f"the clip bound of {config.encoding.clip:g} is {signal:.2g} times the noise in its "
            f"{length:,} parameters"
        )

    @staticmethod
    def check(config: FederationConfig, base: BaseFacts, personal: PersonalSettings) -> None:
        """Checks what would otherwise be found when users are there and a round begins.

        Raises:
            UsageError: No cohort can hold the thresholds, or its sum overflows the words.
            BaseModelError: The base lacks a module that an adapter names; the message lists its own.
        """
        if config.rounds:
            graph = config.secagg.mode == "graph"
            plan_thresholds(config.cohort, config.thresholds, graph=graph)
            require_no_overflow(config.encoding, config.cohort)
        adapter_spec(base, config.shared.adapter)
        personal_spec(base, personal.adapter)

    @staticmethod
    def check_noise(config: FederationConfig, base: BaseFacts, members: int) -> None:
        """Checks that the noise of a private round fits its words, and is large enough to be accounted for.

        Args:
            config: Of the federation.
            base: Facts of the base.
            members: Base users.

        Raises:
            UsageError: It is too large or too small; the message says what to set.
        """
        if config.privacy.mechanism == "none" or not config.rounds:
            return
        spec = _spec(config, base)
        floor = config.thresholds.least
        planned = Participation(members, config.cohort, floor, config.rounds, config.rounds)
        asked = largest_cohort(config.privacy, planned)
        limits = plan_thresholds(asked, config.thresholds)
        plan = RoundPlan(
            run_id="",
            round=config.rounds,
            attempt=0,
            config_hash="",
            roster_hash="",
            model_hash="",
            threshold=limits.threshold,
            neighbours=limits.neighbours,
            min_cohort=limits.min_cohort,
            max_drops=limits.max_drops,
            **agreed(config, spec, config.rounds),
        )
        root = Randomness.from_seed(0)  # nothing is drawn
        privacy_of(config, root, members).complete(plan, asked)


def train_shared(
    phase: SharedPhase, executor: GroupExecutor, costs: Costs, *, console: Console
) -> tuple[Adapter, tuple[Record, ...]]:
    """Runs the rounds of a federation, or as many as its privacy budget allows.

    Args:
        phase: The federation.
        executor: Trains the groups of a cohort.
        costs: Gets the wall times of each round.
        console: Says how far it is.

    Returns:
        The shared adapter, and the deterministic record of each round.

    Raises:
        RoundAborted: A round failed too often.
        ClientFailed: An exception in a client; the message names the member.
    """
    records: list[Record] = []
    begun, rounds = time.monotonic(), phase.config.rounds

    def progress(record: RoundRecord, timing: RoundTiming) -> None:
        records.append(record.as_data())
        costs.round_done(timing.as_data())
        if record.round > before:
            pace = (time.monotonic() - begun) / (record.round - before)
            console.round_done(records[-1], rounds, left=pace * (rounds - record.round))

    with simulation_grid() as marker:
        federation = _members(phase, marker)
        runtime = simulated_server(
            federation, phase.folder / "rounds", progress=progress, warn=console.warn
        )
        runtime = replace(runtime, stopped=lambda why: console.warn(f"{phase.name}: {why}"))
        before = _take_up(runtime)
        if before:
            console.say(f"  {before} of {rounds} rounds were done before")
        if phase.run.engine == "flower":
            members = MemberSpec(
                replace(phase.spec, group_users=1),
                len(phase.users.base),
                phase.run.research.dropout,
            )
            run_in_flower(runtime, members, workers=phase.run.workers)
        else:
            _run_locally(runtime, SimulatedUsers(federation, executor))
    latest = runtime.checkpoints.latest()
    return latest.adapter if latest else runtime.initial, tuple(records)


def _take_up(runtime: ServerRuntime) -> int:
    """Number of the committed rounds from which a simulation goes on.

    Who answered in a round that left the model as it was sits out the next (rule 5), and was known
    to the process that is gone alone: such rounds at the end are set aside and replayed.
    """
    store = runtime.checkpoints
    records = store.records()
    models = [runtime.initial.digest(), *(record.model_hash for record in records)]
    count = len(records)
    while 0 < count < runtime.config.rounds and models[count] == models[count - 1]:
        last = store.folder / f"{records[count - 1].round:04d}"
        aside = last.with_name(f".{last.name}.old")
        last.rename(aside)
        shutil.rmtree(aside)
        count -= 1
    return count


def _spec(config: FederationConfig, base: BaseFacts) -> AdapterSpec:
    """Of the shared adapter."""
    settings = config.shared.adapter
    return adapter_spec(base, settings)


def _members(phase: SharedPhase, marker: GridMarker) -> SimulatedFederation:
    members = simulate_members(
        phase.config,
        _spec(phase.config, phase.base),
        phase.randomness,
        members=len(phase.users.base),
        marker=marker,
        group_users=phase.run.group_users,
    )
    return replace(members, dropout=phase.run.research.dropout)


def _run_locally(runtime: ServerRuntime, users: SimulatedUsers) -> None:
    """Runs all rounds over our own Grid; a client's error is reported in full."""
    members = len(users.federation.roster)
    grid = LocalGrid(build_client_app(users), members, users)
    # which member is where is known here: asking ten thousand takes seconds, and a message each
    nodes = {member: node_id(member) for member in range(members)}
    try:
        run_rounds(replace(runtime, directory=FixedDirectory(nodes)), grid)
    except ClientFailed:
        if users.failures:
            raise ClientFailed(users.failures[0]) from None
        raise
