"""The main job: every federation of a run, from users to a table, in a run folder.

    runs/<time>/                       config.yaml, metrics.jsonl, timing.jsonl, table.json, report.html
      seed-0/LaMP_2N/users/            the virtual users
      seed-0/LaMP_2N/k0-none/          one federation: config.yaml, metrics.jsonl, timing.jsonl, table.json
        rounds/                        a checkpoint for each round; the last holds the shared adapter
        shared/                        the shared adapter, a PEFT folder
        adapters/{arm}/{user}/         personal adapters, PEFT folders

`metrics.jsonl`, `table.json` and the adapters depend on the settings alone: not on the number of workers, the machine's
load or the time. What does is in `timing.jsonl`.
"""

import json
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from fedoppu.client.model import resolve_base
from fedoppu.client.tasks import TASKS
from fedoppu.common.adapter_files import save_adapter
from fedoppu.common.adapters import Adapter
from fedoppu.common.base import BaseFacts
from fedoppu.common.commit import commit_file
from fedoppu.common.config import FederationConfig, RunConfig, as_flat, to_yaml
from fedoppu.common.defaults import federation, personal_settings
from fedoppu.common.errors import UsageError
from fedoppu.common.randomness import Randomness
from fedoppu.simulations.console import Console
from fedoppu.simulations.executors import GroupExecutor, Workforce
from fedoppu.simulations.users import PreparedUsers, prepare_users
from fedoppu.simulations.workers import WorkerSpec


@dataclass(frozen=True)
class FederationRun:
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
        return f"{self.config.task} k={self.config.k} profile={self.config.profile} seed={self.seed}"

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
        )

    @property
    def randomness(self) -> Randomness:
        """Root of the random choices."""
        return Randomness.from_seed(self.seed)
