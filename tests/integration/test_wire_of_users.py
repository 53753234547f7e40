"""The wire of a federation of virtual users who really train: none of their text, adapters or updates is on it.

`test_wire.py` shows that the detector sees what it should. Here it reads every message of a run with the embedded base,
generated histories and trained updates; with the research switch on, the same detector finds the same updates.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedoppu.client.app import build_client_app
from fedoppu.client.jobs import LocalUpdate
from fedoppu.client.model import resolve_base
from fedoppu.common.adapter_files import load_adapter, save_adapter
from fedoppu.common.adapters import AdapterSpec
from fedoppu.common.config import RunConfig, load_run_config
from fedoppu.common.defaults import federation, personal_settings
from fedoppu.common.randomness import Randomness
from fedoppu.server.app import run_rounds
from fedoppu.simulations.capture import Captured, CaptureGrid, Detector
from fedoppu.simulations.executors import GroupExecutor, InProcess
from fedoppu.simulations.grid import LocalGrid
from fedoppu.simulations.key_source import simulation_grid
from fedoppu.simulations.personal import TrainGroup, train_group
from fedoppu.simulations.runtime import SimulatedUsers, simulate_members, simulated_server
from fedoppu.simulations.users import prepare_users
from fedoppu.simulations.virtual_users import VirtualUsers
from fedoppu.simulations.workers import Worker, WorkerSpec

SETTINGS = (
    "task=LaMP_2N",
    "users=2",
    "base_users=4",
    "queries=2",
    "rounds=2",
    "cohort=3",
    "personal.training.epochs=1",
)


@dataclass
class Listening:
    """A GroupExecutor that remembers the updates that went by."""

    inner: GroupExecutor
    updates: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    def map(self, work: Callable[[Worker, Any], Any], groups: Iterable[Any]) -> Iterator[Any]:
        for result in self.inner.map(work, groups):
            for member, update in result.items():
                assert isinstance(update, LocalUpdate)
                self.updates[f"member {member}, {update.context.hex()[:8]}"] = update.vector
            yield result


@dataclass(frozen=True)
class Run:
    """What a run put on the wire, and what its users own."""

    messages: Sequence[Captured]
    texts: tuple[str, ...]
    tensors: Mapping[str, NDArray[np.float32]]
    updates: Mapping[str, NDArray[np.float32]]


def run(folder: Path, *settings: str) -> Run:
    config = load_run_config([*SETTINGS, *settings])
    base = resolve_base(config.base)
    users = prepare_users(config, task="LaMP_2N", seed=0, folder=folder / "users")
    agreed = federation(config, base, task="LaMP_2N", k=0, profile="none", base_users=4, seed=0)
    personal = personal_settings(config, base, "LaMP_2N")
    spec = WorkerSpec("pocket", users.folder, agreed.canonical(), personal, 0, 1, 2)
    executor = Listening(InProcess(spec))
    shapes = AdapterSpec.from_base(base, agreed.shared.adapter.targets or (), rank=8, alpha=8.0)
    with simulation_grid() as marker:
        members = simulate_members(
            agreed, shapes, Randomness.from_seed(0), members=4, marker=marker, group_users=2
        )
        clients = SimulatedUsers(members, executor)
        grid = CaptureGrid(LocalGrid(build_client_app(clients), 4, clients))
        server = simulated_server(
            members, folder / "rounds", progress=lambda *_: None, warn=lambda line: None
        )
        run_rounds(server, grid)
    save_adapter(folder / "shared", members.initial, base_name="pocket")
    tensors = _personal_tensors(InProcess(spec), folder, (*users.target, *users.base))
    texts = tuple(_texts(spec, (*users.target, *users.base)))
    return Run(grid.messages, texts, tensors, executor.updates)


def _personal_tensors(
    executor: InProcess, folder: Path, users: tuple[str, ...]
) -> dict[str, NDArray[np.float32]]:
    """Every user's personal adapter, that of the members too."""
    group = TrainGroup(users, ("personal",), folder / "shared", folder / "adapters", {})
    next(iter(executor.map(train_group, [group])))
    return {
        f"{user} {name}": tensor
        for user in users
        for name, tensor in load_adapter(folder / "adapters" / "personal" / user).tensors.items()
    }


def _texts(spec: WorkerSpec, users: tuple[str, ...]) -> Iterator[str]:
    vaults = VirtualUsers(spec.users)
    for user in users:
        for item in vaults.vault(user).history():
            yield from item.fields.values()


def test_nothing_that_a_user_owns_is_on_the_wire(tmp_path: Path) -> None:
    made = run(tmp_path)
    assert len(made.texts) > 100
    assert len(made.updates) == 6
    detector = Detector(texts=made.texts, tensors=made.tensors, updates=made.updates)
    assert detector.findings(made.messages) == []


def test_the_research_switch_puts_each_update_on_the_wire_and_nothing_else(tmp_path: Path) -> None:
    made = run(tmp_path, "research.plain_updates=true")
    detector = Detector(texts=made.texts, tensors=made.tensors, updates=made.updates)
    findings = detector.findings(made.messages)
    assert {finding.kind for finding in findings} == {"plain update"}
    clip = RunConfig().encoding.clip  # a longer update travels scaled down
    whole = {name for name, update in made.updates.items() if np.linalg.norm(update) <= clip}
    assert len(whole) >= 3
    assert whole <= {finding.detail for finding in findings}
