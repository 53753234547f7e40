"""What a benchmark measures with: CPU time, both sides by turns, memory, a command with its processes.

CPU seconds are those of all threads of this process, whatever else runs on the machine; what they
do not hide is a slower clock or a cache that others fill, so both sides take turns.
"""

import gc
import os
import subprocess
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Protocol

from fedoppu.common.errors import UsageError

Parts = Mapping[str, float]
SAMPLE_SECONDS = 0.02


@dataclass
class Stopwatch:
    """CPU seconds of named parts; a part may be entered many times.

    Attributes:
        seconds: Part: CPU seconds so far.
    """

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds the CPU seconds of the block to a part."""
        begun = time.process_time()
        try:
            yield
        finally:
            spent = time.process_time() - begun
            self.seconds[name] = self.seconds.get(name, 0.0) + spent

    @property
    def total(self) -> float:
        """All parts together."""
        return sum(self.seconds.values())


class Meter(Protocol):
    """Measures named parts: a `Stopwatch` their CPU seconds, a `PeakMeter` their memory."""

    def part(self, name: str) -> AbstractContextManager[None]:
        """Measures the block as one of a part."""


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU seconds of one call, all threads of this process."""
    watch = Stopwatch()
    with watch.part("work"):
        work()
    return watch.total


@dataclass(frozen=True)
class Paired:
    """Both sides of one part, measured by turns.

    Attributes:
        ours: Median of our costs.
        theirs: Median of their costs.
        low: Least ratio theirs / ours of any pair. With five pairs the median ratio of all that
            could be measured lies below it with probability 1/32, whatever its distribution.
        pairs: How many.
    """

    ours: float
    theirs: float
    low: float
    pairs: int


def interleave(
    ours: Callable[[], Parts], theirs: Callable[[], Parts], pairs: int
) -> dict[str, Paired]:
    """Measures both sides by turns, A B A B.

    Args:
        ours: One measurement of our side: part: cost.
        theirs: The same parts of the other side.
        pairs: How often.

    Raises:
        UsageError: There is no pair.
    """
    if pairs < 1:
        raise UsageError(f"pairs must be at least 1, got {pairs}")
    costs = []
    for _ in range(pairs):
        gc.collect()
        mine = ours()
        gc.collect()
        costs.append((mine, theirs()))
    return {part: _pair([(a[part], b[part]) for a, b in costs]) for part in costs[0][0]}


def _pair(costs: Sequence[tuple[float, float]]) -> Paired:
    return Paired(
        ours=median(ours for ours, _ in costs),
        theirs=median(theirs for _, theirs in costs),
        low=min(theirs / max(ours, 1e-9) for ours, theirs in costs),
        pairs=len(costs),
    )


# --- memory and other processes ------------------------------------------------------------------


def peak_bytes(work: Callable[[], object]) -> int:
    """Most bytes that one call holds at once beyond what was there before: Python and numpy memory.

    Traced, so slow: never time the same call. Memory of other native libraries is not seen; a
    process of its own is measured by `run_tree`.
    """
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        work()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


@dataclass
class PeakMeter:
    """Most memory that any one block takes beyond what was there before it; see `peak_bytes`.

    Attributes:
        peak: Bytes so far, over all parts. Memory must be traced already.
    """

    peak: int = 0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measures a block; its name tells nothing here."""
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        yield
        self.peak = max(self.peak, tracemalloc.get_traced_memory()[1] - before)


@dataclass(frozen=True)
class TreeCost:
    """What a command and all its descendants took.

    Attributes:
        cpu_seconds: User and system time of those that were waited for.
        peak_bytes: Most resident memory at once, sampled; shared pages count once for each process.
        wall_seconds: From start to end.
        exit_code: Of the command.
    """

    cpu_seconds: float
    peak_bytes: int
    wall_seconds: float
    exit_code: int


def run_tree(
    command: Sequence[str], env: Mapping[str, str] | None = None, *, quiet: bool = False
) -> TreeCost:
    """Runs a command to its end and measures it with its descendants (Linux).

    Args:
        command: Program and arguments.
        env: Its environment; this one's by default.
        quiet: Its standard output goes nowhere; errors are still seen.
    """
    begun = time.monotonic()
    output = subprocess.DEVNULL if quiet else None
    process = subprocess.Popen(command, env=env, stdout=output)  # noqa: S603  # the benchmark's own
    peak = [0]
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            peak[0] = max(peak[0], _resident(process.pid))

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    _, status, usage = os.wait4(process.pid, 0)
    ended.set()
    sampler.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - begun
    largest = max(peak[0], usage.ru_maxrss * 1024)
    return TreeCost(usage.ru_utime + usage.ru_stime, largest, seconds, process.returncode)


def _resident(pid: int) -> int:
    """Resident bytes of a process and its descendants; those that just ended count nothing."""
    folder = Path(f"/proc/{pid}")
    try:
        pages = int((folder / "statm").read_text().split()[1])
        children = [
            int(child)
            for task in (folder / "task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(_resident(child) for child in children)
