"""A small federation for tests: a made-up adapter, made-up training, everything else as it is."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from fedoppu.client.app import build_client_app
from fedoppu.client.jobs import ClientFailure, LocalUpdate
from fedoppu.common.adapters import AdapterSpec, Target
from fedoppu.common.config import (
    EncodingSettings,
    FederationConfig,
    PromptSettings,
    ResearchSettings,
    RetrieverSettings,
    SharedSettings,
    ThresholdSettings,
)
from fedoppu.common.randomness import Randomness
from fedoppu.common.rounds import RoundPlan
from fedoppu.common.shared_adapter import initial_shared
from fedoppu.server.app import run_rounds
from fedoppu.server.checkpoint import RoundCheckpoint
from fedoppu.server.directory import HelloDirectory
from fedoppu.server.metrics import RoundRecord, RoundTiming
from fedoppu.server.runtime import ServerRuntime
from fedoppu.simulations.executors import GroupExecutor
from fedoppu.simulations.grid import LocalGrid
from fedoppu.simulations.key_source import GridMarker
from fedoppu.simulations.runtime import (
    SimulatedFederation,
    SimulatedUsers,
    TrainGroup,
    simulate_members,
)

SPEC = AdapterSpec("ab" * 32, (Target("layer.q_proj", 8, 6), Target("layer.v_proj", 4, 6)), rank=2)
CONFIG = FederationConfig(
    task="LaMP_3",
    k=0,
    profile="none",
    base_hash=SPEC.base_hash,
    rounds=2,
    cohort=5,
    public_seed=7,
    dtype="float32",
    shared=SharedSettings(max_weight=8),
    prompt=PromptSettings(),
    retriever=RetrieverSettings(),
    encoding=EncodingSettings(level_bits=16, clip=10.0, value_range=0.5),
    thresholds=ThresholdSettings(floor=2, corrupt=0, max_drop=0.3),
)
T = TypeVar("T")
Update = Callable[[int, RoundPlan], LocalUpdate | ClientFailure]


def made_up(member: int, plan: RoundPlan, *, size: float = 0.02) -> LocalUpdate:
    """An update that only member and round decide."""
    stream = Randomness.from_seed(99).stream("update", plan.round, member)
    vector = (stream.standard_normal(plan.num_params) * size + size).astype(np.float32)
    return LocalUpdate(plan.context, vector, weight=1 + member % 12, held_out_loss=1.0 + member)


class FakeExecutor:
    """Trains nothing: asks a function for each member's update, and remembers the groups."""

    def __init__(self, update: Update = made_up) -> None:
        self.update = update
        self.groups: list[tuple[int, ...]] = []

    def map(self, work: Any, groups: Sequence[TrainGroup]) -> Iterator[Any]:
        for group in groups:
            self.groups.append(group.members)
            yield {member: self.update(member, group.plan) for member in group.members}


@dataclass
class Federation:
    """One federation over a LocalGrid, ready to run."""

    config: FederationConfig
    members: SimulatedFederation
    users: SimulatedUsers
    grid: LocalGrid
    runtime: ServerRuntime
    records: list[RoundRecord]
    timings: list[RoundTiming]

    def run(self) -> RoundCheckpoint:
        run_rounds(self.runtime, self.grid)
        latest = self.runtime.checkpoints.latest()
        assert latest is not None
        return latest


def federation(
    folder: Path,
    config: FederationConfig = CONFIG,
    *,
    members: int = 8,
    executor: Any = None,
    research: ResearchSettings | None = None,
    seed: int = 3,
    group_users: int = 2,
    wrap_grid: Callable[[LocalGrid], Any] = lambda grid: grid,
    **changes: Any,
) -> Federation:
    """Builds a federation; `changes` are of the ServerRuntime."""
    root = Randomness.from_seed(seed)
    simulated = simulate_members(
        config, SPEC, root, members=members, marker=GridMarker(), group_users=group_users
    )
    simulated = replace(simulated, dropout=research.dropout if research else 0.0)
    users = SimulatedUsers(simulated, executor or cast(GroupExecutor, FakeExecutor()))
    grid = LocalGrid(build_client_app(users), members, users)
    records: list[RoundRecord] = []
    timings: list[RoundTiming] = []

    def progress(record: RoundRecord, timing: RoundTiming) -> None:
        records.append(record)
        timings.append(timing)

    settings: dict[str, Any] = {
        "config": config,
        "initial": initial_shared(SPEC, config.public_seed),
        "roster": simulated.roster,
        "randomness": root,
        "directory": HelloDirectory(range(members), deadline=5, poll=0.001),
        "folder": folder,
        "run_id": "ab" * 16,
        "progress": progress,
        "poll": 0.001,
        "deadline": 5.0,
        "replays": True,
        "helper": simulated.helper,
    }
    runtime = ServerRuntime(**(settings | changes))
    return Federation(config, simulated, users, wrap_grid(grid), runtime, records, timings)


def shown(value: T | None) -> T:
    """A field of a record that is None only with differential privacy."""
    assert value is not None
    return value


def shared_config(config: FederationConfig = CONFIG, **changes: Any) -> FederationConfig:
    """The config with changed shared settings."""
    return replace(config, shared=replace(config.shared, **changes))


def flat(checkpoint: RoundCheckpoint) -> NDArray[np.float32]:
    """All parameters of a checkpoint's adapter."""
    return checkpoint.adapter.spec.flatten(checkpoint.adapter.tensors)


def files(folder: Path) -> Mapping[str, bytes]:
    """Every file under a folder, by relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
