"""What a run cost, over all the processes that worked on it: wall and CPU time of each phase.

    timing.jsonl of the run           a line for each process, then the lines of the federations
    timing.jsonl of a federation      a line for each round, then one for each process: its phases

Kept apart from the results, which do not depend on any of it. The file grows while the run works, so
that a process that is killed loses at most `WRITE_SECONDS` and the group that it was at.

Not covered: the start of a process and of its workers, whole users that are written or read, and
CPU time inside Flower's own engine.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from fedoppu.common.commit import commit_file
from fedoppu.common.config import RunConfig
from fedoppu.simulations.executors import GroupExecutor
from fedoppu.simulations.workers import Worker

G = TypeVar("G")
R = TypeVar("R")
Record = dict[str, Any]
Phase = Literal["shared", "personal"]

TIMING = "timing.jsonl"
WRITE_SECONDS = 1.0  # between two writes: a group may take less than the disk does


def begin_process(folder: Path, place: RunConfig) -> int:
    """Notes in a run's folder that another process works on it.

    Args:
        folder: Of the run.
        place: Where it works on groups.

    Returns:
        Its number; the first is 1, and each later one resumed the run.
    """
    earlier = processes(folder)
    own = {
        "kind": "process",
        "process": len(earlier) + 1,
        "engine": place.engine,
        "workers": place.workers,
    }
    write_lines(folder / TIMING, [*earlier, own])
    return len(earlier) + 1


def processes(folder: Path) -> list[Record]:
    """A line for each process that worked on the run in a folder, in their order."""
    return [line for line in read_lines(folder / TIMING) if line.get("kind") == "process"]


def read_lines(path: Path) -> list[Record]:
    """The objects in a file of JSON lines; what cannot be read is left out, as no result needs it."""
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def write_lines(path: Path, records: Iterable[Record]) -> None:
    """Writes a file of JSON lines, whole or not at all."""
    lines = (json.dumps(record, sort_keys=True) + "\n" for record in records)
    commit_file(path, "".join(lines).encode())


def total(lines: Sequence[Record], name: str) -> float:
    """Sum of one figure over the processes, seconds."""
    return float(sum(line.get(name, 0.0) for line in lines if line["kind"] == "phases"))


class Costs:
    """What one federation cost, kept in its folder."""

    def __init__(self, folder: Path, process: int) -> None:
        """Take up what earlier processes left there.

        Args:
            folder: Of the federation.
            process: Number of this process in the run.
        """
        self._path = folder / TIMING
        earlier = read_lines(self._path)
        self._rounds = {line["round"]: line for line in earlier if line.get("kind") == "round"}
        self._phases = [line for line in earlier if line.get("kind") == "phases"]
        self._own: Record = {"kind": "phases", "process": process}
        for phase in ("shared", "personal"):
            self._own |= {f"{phase}_seconds": 0.0, f"{phase}_cpu_seconds": 0.0}
        self._mark = (time.monotonic(), time.process_time())
        self._written = time.monotonic()

    @property
    def lines(self) -> tuple[Record, ...]:
        """Wall times of each round; then what each process spent in each phase."""
        rounds = [self._rounds[number] for number in sorted(self._rounds)]
        return (*rounds, *self._phases, self._own)

    def metered(self, executor: GroupExecutor, phase: Phase) -> "Metered":
        """The executor, its groups charged to a phase."""
        return Metered(executor, partial(self.spend, phase))

    def round_done(self, timing: Record) -> None:
        """Keeps the wall times of a round; of one that an earlier process did, those it left."""
        if timing["stages"] or timing["round"] not in self._rounds:
            self._rounds[timing["round"]] = timing
        self.spend("shared")

    def spend(self, phase: Phase, elsewhere: float = 0.0) -> None:
        """Charges a phase with what this process spent since the last time, and writes now and then.

        Args:
            phase: What it was spent on.
            elsewhere: CPU seconds of other processes, to be added.
        """
        now = (time.monotonic(), time.process_time())
        self._own[f"{phase}_seconds"] += now[0] - self._mark[0]
        self._own[f"{phase}_cpu_seconds"] += now[1] - self._mark[1] + elsewhere
        self._mark = now
        if now[0] - self._written >= WRITE_SECONDS:
            self.write()

    def write(self) -> None:
        """Makes the lines so far durable."""
        write_lines(self._path, self.lines)
        self._written = time.monotonic()


class Metered:
    """An executor that says what each group cost."""

    def __init__(self, executor: GroupExecutor, spend: Callable[[float], None]) -> None:
        """Keep the executor that works, and who is told the CPU seconds that others spent."""
        self._executor = executor
        self._spend = spend

    def map(self, work: Callable[[Worker, G], R], groups: Iterable[G]) -> Iterator[R]:
        """Yields `work(worker, group)` for each group."""
        here = _process()
        for place, seconds, result in self._executor.map(partial(_timed, work), groups):
            self._spend(0.0 if place == here else seconds)
            yield result


def _timed(
    work: Callable[[Worker, G], R], worker: Worker, group: G
) -> tuple[tuple[str, int], float, R]:
    """Where a group was worked on, the CPU seconds that it took there, and its result."""
    begun = time.process_time()
    result = work(worker, group)
    return _process(), time.process_time() - begun, result


def _process() -> tuple[str, int]:
    """Machine and process: numbers of processes are those of one machine."""
    return os.uname().nodename, os.getpid()
