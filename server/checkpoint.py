"""What a server must not forget: each committed round, and the attempt under way.

    rounds/0001/shared.npy    the shared adapter after round 1: all factors in one vector
    rounds/0001/round.json    the record of the round, and what the next one starts from
    rounds/attempt.json       the attempt under way (spec of secure aggregation, rule 5)

With differential privacy what is not to be published is in a folder for the operator alone:

    rounds/private/attempt.json, charges.json
    rounds/private/0001.json  where the cohort is drawn by Poisson sampling: the whole record

Guarantee: a round is there whole or not at all, whenever the process is killed; an attempt number
that was begun is never used again, and nobody who was asked to unmask is forgotten.
"""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from fedoppu.common.adapters import Adapter
from fedoppu.common.commit import commit_file, commit_folder
from fedoppu.common.errors import DataError, ProtocolError, UsageError
from fedoppu.common.vectors import read_vector, write_vector
from fedoppu.server.metrics import RoundRecord

_RESTORE = "restore it; a simulation does it again if it and the rounds after it are deleted"
RECORD, VECTOR, ATTEMPT, PRIVATE = "round.json", "shared.npy", "attempt.json", "private"


@dataclass(frozen=True)
class RoundCheckpoint:
    """The federation after a round.

    Attributes:
        run_id: Hex, of the run.
        config_hash: Hex, of the FederationConfig.
        adapter: The shared adapter.
        record: What was recorded; holds the cohort, the survivors and the next range.
    """

    run_id: str
    config_hash: str
    adapter: Adapter = field(repr=False)
    record: RoundRecord


class CheckpointStore:
    """The committed rounds of one federation."""

    def __init__(self, folder: Path, initial: Adapter, config_hash: str) -> None:
        """Keep where the rounds are, and what they must fit.

        Args:
            folder: Gets one folder a round.
            initial: The adapter before the first round: shapes, and the frozen factors.
            config_hash: Hex, of the FederationConfig.
        """
        self.folder = folder
        self._initial = initial
        self._config_hash = config_hash

    def commit(self, checkpoint: RoundCheckpoint) -> None:
        """Makes a round durable, and then forgets the attempt that led to it."""
        spec, record = checkpoint.adapter.spec, checkpoint.record
        with commit_folder(self.folder / f"{record.round:04d}") as folder:
            (folder / VECTOR).write_bytes(write_vector(spec.flatten(checkpoint.adapter.tensors)))
            head = {"run_id": checkpoint.run_id, "config_hash": checkpoint.config_hash}
            (folder / RECORD).write_text(json.dumps(head | {"record": record.as_data()}, indent=1))

    def keep_private(self, record: RoundRecord) -> None:
        """Makes durable, for the operator alone, who took part in a round that is about to be committed.

        Nothing reads it: liars and members that dropped are named here and nowhere else.
        """
        folder = self.folder / PRIVATE
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        commit_file(
            folder / f"{record.round:04d}.json", json.dumps(record.as_data(), indent=1).encode()
        )

    def rounds(self) -> tuple[int, ...]:
        """Numbers of the committed rounds, ascending."""
        found = self.folder.glob(f"[0-9]*/{RECORD}")
        return tuple(sorted(int(path.parent.name) for path in found))

    def records(self) -> tuple[RoundRecord, ...]:
        """The records of all committed rounds, in their order.

        Raises:
            DataError: One cannot be read.
        """
        return tuple(self._record(number)[1] for number in self.rounds())

    def latest(self) -> RoundCheckpoint | None:
        """The newest committed round, or None."""
        rounds = self.rounds()
        return self.load(rounds[-1]) if rounds else None

    def load(self, round_number: int) -> RoundCheckpoint:
        """A committed round.

        Raises:
            UsageError: It belongs to another configuration.
            DataError: Its files were changed or are incomplete.
        """
        folder = self.folder / f"{round_number:04d}"
        head, record = self._record(round_number)
        try:
            adapter = self._adapter((folder / VECTOR).read_bytes())
        except (OSError, ProtocolError) as error:
            raise DataError(
                f"{folder} is not a committed round: {type(error).__name__}", hint=_RESTORE
            ) from None
        if head["config_hash"] != self._config_hash:
            raise UsageError(
                f"{folder} belongs to a federation with another configuration",
                hint="give another out folder, or the settings that the run began with",
            )
        if adapter.digest() != record.model_hash:
            raise DataError(
                f"{folder / VECTOR} was changed: its digest is not that of its record",
                hint=_RESTORE,
            )
        return RoundCheckpoint(head["run_id"], head["config_hash"], adapter, record)

    def _record(self, round_number: int) -> tuple[Mapping[str, Any], RoundRecord]:
        """What is in a round's file, and the record in it."""
        folder = self.folder / f"{round_number:04d}"
        try:
            head = json.loads((folder / RECORD).read_bytes())
            return head, RoundRecord.from_data(head["record"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{folder} is not a committed round: {type(error).__name__}", hint=_RESTORE
            ) from None

    def _adapter(self, data: bytes) -> Adapter:
        spec = self._initial.spec
        vector = read_vector("the vector", data, dtype="float32", length=spec.num_params())
        tensors = spec.unflatten(cast(NDArray[np.float32], vector))
        return Adapter(spec, tensors, self._initial.parent)


@dataclass(frozen=True)
class AttemptState:
    """The attempt under way, as far as it must not be forgotten.

    Attributes:
        run_id: Hex, of the run.
        round: From 1.
        attempt: The newest one that was begun; -1 before the first.
        cohort: Members asked in it, sorted.
        sitting_out: Members asked to unmask in earlier attempts at this round, or that lied in one,
            sorted.
        asked: Members asked to unmask in this attempt, sorted; empty before that.
        machine: The server's state machine with survivors and masked sum, dumped before anybody is
            asked to unmask; empty before that, and after giving up.
    """

    run_id: str
    round: int
    attempt: int
    cohort: tuple[int, ...] = ()
    sitting_out: tuple[int, ...] = ()
    asked: tuple[int, ...] = ()
    machine: bytes = field(default=b"", repr=False)


class Attempts(Protocol):
    """Remembers the attempt under way."""

    def save(self, state: AttemptState) -> None:
        """Makes a state durable before it returns; the state before it is gone."""

    def load(self) -> AttemptState | None:
        """The state that was saved last, or None."""


class AttemptLog:
    """Keeps the attempt under way in a file."""

    def __init__(self, folder: Path) -> None:
        """Keep where the file is."""
        self._path = folder / ATTEMPT

    def save(self, state: AttemptState) -> None:
        """Makes a state durable before it returns; the state before it is gone."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        data: dict[str, Any] = dict(vars(state))
        data["machine"] = base64.b64encode(state.machine).decode()
        commit_file(self._path, json.dumps(data).encode())

    def load(self) -> AttemptState | None:
        """The state that was saved last, or None.

        Raises:
            DataError: The file was changed; going on could answer a round twice.
        """
        if not self._path.exists():
            return None
        try:
            return _attempt(json.loads(self._path.read_bytes()))
        except (ValueError, KeyError, TypeError):
            raise DataError(
                f"{self._path} is malformed; without it a round could be answered twice",
                hint="restore the file, or begin a new run",
            ) from None


def _attempt(data: Mapping[str, Any]) -> AttemptState:
    members = {name: tuple(data[name]) for name in ("cohort", "sitting_out", "asked")}
    return AttemptState(**{**data, **members, "machine": base64.b64decode(data["machine"])})


class MemoryAttempts:
    """Remembers as long as its process: a simulation replays a killed attempt from its seed."""

    def __init__(self) -> None:
        """Start with nothing."""
        self._state: AttemptState | None = None

    def save(self, state: AttemptState) -> None:
        """Keeps a state."""
        self._state = state

    def load(self) -> AttemptState | None:
        """The state that was saved last, or None."""
        return self._state
