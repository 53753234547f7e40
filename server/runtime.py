"""What a server's side of a federation is made of; the ServerApp takes one of these."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from fedoppu.common.adapters import Adapter
from fedoppu.common.config import FederationConfig
from fedoppu.common.randomness import Randomness
from fedoppu.common.roster import Roster
from fedoppu.server.checkpoint import AttemptLog, Attempts, CheckpointStore, MemoryAttempts
from fedoppu.server.cohort import CohortSampler, UniformSampler
from fedoppu.server.directory import Directory
from fedoppu.server.metrics import RoundRecord, RoundTiming

logger = logging.getLogger(__name__)
Progress = Callable[[RoundRecord, RoundTiming], None]


def _silent(record: RoundRecord, timing: RoundTiming) -> None:
    """Nobody watches."""


@dataclass(frozen=True)
class ServerRuntime:
    """The server's side of one federation.

    Attributes:
        config: What all parties agree on.
        initial: The shared adapter before the first round: `initial_shared` of the config.
        roster: All members.
        randomness: Root of the cohorts: the run's seed in a simulation, a secret on a server.
        directory: Finds the members on a Grid.
        folder: Gets a folder for each committed round.
        run_id: Hex, fresh for a run; a resumed run keeps the one that it began with.
        progress: Is told of each committed round; first of those from before a restart, without
            their times.
        warn: Is told what weakens a promise.
        sampler: Of the cohorts; uniform of `config.cohort` by default.
        deadline: Seconds that a stage waits for replies.
        poll: Seconds between two looks for replies.
        replays: True in a simulation, whose clients forget an uncommitted round with their
            process: it is replayed from the seed. A deployed server remembers it instead (rule 5).
        tolerate_failures: Whether an exception in a client is a drop, and not the end of the run.
    """

    config: FederationConfig
    initial: Adapter = field(repr=False)
    roster: Roster = field(repr=False)
    randomness: Randomness
    directory: Directory = field(repr=False)
    folder: Path
    run_id: str
    progress: Progress = _silent
    warn: Callable[[str], None] = logger.warning
    sampler: CohortSampler | None = None
    deadline: float = 600.0
    poll: float = 0.05
    replays: bool = False
    tolerate_failures: bool = False

    @property
    def cohorts(self) -> CohortSampler:
        """The sampler in use."""
        return self.sampler or UniformSampler(self.config.cohort)

    @cached_property
    def checkpoints(self) -> CheckpointStore:
        """The committed rounds."""
        return CheckpointStore(self.folder, self.initial, self.config.hash().hex())

    @cached_property
    def attempts(self) -> Attempts:
        """The attempt under way."""
        return MemoryAttempts() if self.replays else AttemptLog(self.folder)
