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
from fedoppu.server.charges import ChargeLedger
from fedoppu.server.checkpoint import PRIVATE, AttemptLog, Attempts, CheckpointStore, MemoryAttempts
from fedoppu.server.cohort import CohortSampler, sampler_of
from fedoppu.server.directory import Directory
from fedoppu.server.helper import HelperLink
from fedoppu.server.metrics import RoundRecord, RoundTiming
from fedoppu.server.privacy import PrivacyMechanism, privacy_of

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
        randomness: Root of the cohorts and of the server's noise: the run's seed in a simulation, a
            secret on a server.
        directory: Finds the members on a Grid.
        folder: Gets a folder for each committed round; with differential privacy also `private/`, for
            the operator alone.
        run_id: Hex, fresh for a run; a resumed run keeps the one that it began with.
        progress: Is told of each committed round; first of those from before a restart, without
            their times.
        warn: Is told what weakens a promise.
        sampler: Of the cohorts; by default the one that the config's privacy assumes.
        helper: Reaches the helper of the two-server mode; None in graph mode.
        young: Members of the roster whom clients count as corrupt, because they joined a short
            while ago (`RosterEpoch.young`).
        stopped: Is told why a run ends before its last round.
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
    helper: HelperLink | None = field(default=None, repr=False)
    young: frozenset[int] = frozenset()
    stopped: Callable[[str], None] = logger.info
    deadline: float = 600.0
    poll: float = 0.05
    replays: bool = False
    tolerate_failures: bool = False

    @property
    def cohorts(self) -> CohortSampler:
        """The sampler in use."""
        return self.sampler or sampler_of(self.config, len(self.roster.members))

    @cached_property
    def privacy(self) -> PrivacyMechanism:
        """The config's mechanism, with noise from this server's own root."""
        return privacy_of(self.config, self.randomness, len(self.roster.members))

    @property
    def books(self) -> Path:
        """Where attempts and charges are kept: with differential privacy out of what may be published."""
        private = self.config.privacy.mechanism != "none"
        return self.folder / PRIVATE if private else self.folder

    @cached_property
    def charges(self) -> ChargeLedger:
        """What was spent of the privacy budget."""
        return ChargeLedger(self.books)

    @cached_property
    def checkpoints(self) -> CheckpointStore:
        """The committed rounds."""
        return CheckpointStore(self.folder, self.initial, self.config.hash().hex())

    @cached_property
    def attempts(self) -> Attempts:
        """The attempt under way."""
        return MemoryAttempts() if self.replays else AttemptLog(self.books)
