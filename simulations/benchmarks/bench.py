"""What every benchmark shares: CPU time and memory, both sides by turns, rows, a table, a file.

The file is `{machine, command, rows: [{name, ours, theirs, ratio, goal, met, ...}]}`. `ratio` is
theirs / ours for a cost and ours / theirs for a rate, so that more is better, and `goal` is in that
unit. A row that is no ratio has `theirs` null, and its goal is the most that `ours` may be.

CPU seconds are those of all threads of this process, whatever else runs on the machine; what they
do not hide is a slower clock or a cache that others fill, so both sides take turns. This module
loads no numpy: `one_thread` must come before it is loaded.
"""

import gc
import json
import os
import platform
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Literal, Protocol

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedoppu.common.commit import commit_file
from fedoppu.common.errors import UsageError

Kind = Literal["cost", "rate", "bound"]
Parts = Mapping[str, float]
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
FLAGS = ("aes", "vaes", "sha_ni", "avx2", "avx512f", "avx512vl", "amx_tile")
SAMPLE_SECONDS = 0.02
FILE_WIDTH = 150


# --- rows ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of a benchmark.

    Attributes:
        name: What was measured.
        ours: Our value, in `unit`.
        theirs: The other side's, in the same unit; None where there is none.
        kind: A cost (less is better), a rate (more is better), or a bound, which is no ratio.
        goal: Least ratio, or for a bound the most that `ours` may be; None where nothing is promised.
        unit: Of ours and theirs.
        low: Lower bound of the ratio: the least of any pair; None if it was not measured in pairs.
        note: What was measured and what was counted.
    """

    name: str
    ours: float
    theirs: float | None = None
    kind: Kind = "cost"
    goal: float | None = None
    unit: str = "s"
    low: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """More is better; None for a bound."""
        if self.theirs is None or self.kind == "bound":
            return None
        ours, theirs = (self.ours, self.theirs) if self.kind == "rate" else (self.theirs, self.ours)
        return ours / theirs if theirs else None

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None without a goal."""
        if self.goal is None:
            return None
        if self.kind == "bound":
            return self.ours <= self.goal
        return self.ratio is not None and self.ratio >= self.goal

    def as_dict(self) -> dict[str, Any]:
        """The row of the file; a bound has no `theirs` there, its note may name one."""
        return {
            "name": self.name,
            "ours": self.ours,
            "theirs": None if self.kind == "bound" else self.theirs,
            "ratio": self.ratio,
            "goal": self.goal,
            "met": self.met,
            "kind": self.kind,
            "unit": self.unit,
            "low": self.low,
            "note": self.note,
        }


def check_target(path: Path) -> None:
    """Refuses a result file that could not be written, before minutes are spent on it.

    Raises:
        UsageError: It is a folder, or its folder is not there.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(
            f"cannot write the results to {path}: "
            + ("it is a folder" if path.is_dir() else f"there is no folder {path.parent}"),
            hint="name a file in a folder that exists",
        )


def write_result(path: Path, rows: Sequence[Row], machine: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the file whole or not at all, and returns what is in it."""
    result = {
        "machine": dict(machine),
        "command": command_line(),
        "rows": [row.as_dict() for row in rows],
    }
    commit_file(path, (json.dumps(result, indent=1) + "\n").encode())
    return result


def command_line() -> str:
    """How this process was called, without the folders of this machine."""
    arguments = [Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]
    return " ".join(arguments)


def print_rows(title: str, rows: Sequence[Row], console: Console) -> None:
    """Prints the rows as a table; a missed goal is red."""
    console.print(title, markup=False)
    grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    grid.add_column("line", overflow="fold", min_width=38)
    for column in ("ours", "theirs", "ratio", "at least", "goal"):
        grid.add_column(column, justify="right", no_wrap=True, min_width=len(column))
    grid.add_column("note", style="dim")
    for row in rows:
        style = {True: "green", False: "bold red", None: ""}[row.met]
        shown = [with_unit(row.ours, row.unit), with_unit(row.theirs, row.unit)]
        ratios = [short(row.ratio), short(row.low), _goal(row)]
        grid.add_row(row.name, *shown, *(Text(cell, style=style) for cell in ratios), row.note)
    console.print(grid)


def _goal(row: Row) -> str:
    if row.goal is None:
        return ""
    bound = with_unit(row.goal, row.unit) if row.kind == "bound" else short(row.goal)
    verdict = "met" if row.met else "missed"
    return f"{'<=' if row.kind == 'bound' else '>='} {bound} {verdict}"


def short(value: float | None) -> str:
    """Three digits: 0.82, 14.6, 259."""
    if value is None:
        return ""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def with_unit(value: float | None, unit: str) -> str:
    """A value for people: seconds below one as ms, bytes as kB or MB."""
    if value is None:
        return ""
    if unit == "s" and abs(value) < 1:
        return f"{short(value * 1000)} ms"
    if unit == "B" and abs(value) >= 1000:
        return f"{short(value / 1e6)} MB" if abs(value) >= 1e6 else f"{short(value / 1000)} kB"
    return f"{short(value)} {unit}"


# --- CPU time ------------------------------------------------------------------------------------


def one_thread() -> None:
    """Numeric libraries that are loaded after this use one thread."""
    os.environ.update(dict.fromkeys(THREADS, "1"))


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


def run_tree(command: Sequence[str], env: Mapping[str, str] | None = None) -> TreeCost:
    """Runs a command to its end and measures it with its descendants (Linux).

    Args:
        command: Program and arguments.
        env: Its environment; this one's by default.
    """
    begun = time.monotonic()
    process = subprocess.Popen(command, env=env)  # noqa: S603  # the benchmark's own command
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


# --- machine -------------------------------------------------------------------------------------


def machine(packages: Sequence[str]) -> dict[str, Any]:
    """What the figures were measured on; no host name, no path.

    Args:
        packages: Distributions whose versions matter.
    """
    return {
        "cpu": _cpu_field("model name") or platform.machine(),
        "flags": [flag for flag in FLAGS if flag in _cpu_field("flags").split()],
        "cores": os.cpu_count(),
        "load": [round(load, 2) for load in os.getloadavg()],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "threads": os.environ.get(THREADS[0], "not set"),
        "versions": {name: version(name) for name in packages},
    }


def describe(facts: Mapping[str, Any]) -> str:
    """A machine in one line, for a table's title."""
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    load = " ".join(str(load) for load in facts["load"])
    return (
        f"{facts['cpu']} ({' '.join(facts['flags'])}), {facts['cores']} cores, load {load}, "
        f"{facts['system']}, Python {facts['python']}, {versions}"
    )


def _cpu_field(name: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")
