"""What every benchmark shares: rows, a table, a file, and what it was measured on.

The file is `{machine, command, rows: [{name, ours, theirs, ratio, goal, met, ...}]}`. `ratio` is
theirs / ours for a cost and ours / theirs for a rate, so that more is better, and `goal` is in that
unit. A row that is no ratio has `theirs` null, and its goal is the most that `ours` may be.

This module and `meters` load no numpy: `one_thread` must come before it is loaded.
"""

import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedoppu.common.commit import commit_file
from fedoppu.common.errors import UsageError

Kind = Literal["cost", "rate", "bound"]

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
FLAGS = (
    *("aes", "vaes", "sha_ni", "avx2", "avx512f", "avx512vl"),
    *("avx512_bf16", "amx_tile", "amx_bf16"),
)

FILE_WIDTH = 160


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
        low_share: The goal is met if `low` is at least this share of it; None: if the ratio is
            at least the goal.
    """

    name: str
    ours: float
    theirs: float | None = None
    kind: Kind = "cost"
    goal: float | None = None
    unit: str = "s"
    low: float | None = None
    note: str = ""
    low_share: float | None = None

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
        if self.low_share is not None:
            return self.low is not None and self.low >= self.low_share * self.goal
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
            "low_share": self.low_share,
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


def check_options(json: Path | None, pairs: int) -> None:
    """Refuses what would fail after minutes of measuring.

    Raises:
        UsageError: There is no pair, or the file could not be written.
    """
    if pairs < 1:
        raise UsageError(f"--pairs must be at least 1, got {pairs}")
    if json is not None:
        check_target(json)


def write_result(path: Path, rows: Sequence[Row], machine: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the file whole or not at all, and returns what is in it."""
    result = {
        "machine": dict(machine),
        "command": command_line(),
        "rows": [row.as_dict() for row in rows],
    }
    commit_file(path, (json.dumps(result, indent=1) + "\n").encode())
    return result


def measure(rows: Iterable[Row], *, packages: Sequence[str], json: Path | None) -> dict[str, Any]:
    """Measures rows, tells of each on standard error, prints the table and writes the file.

    Args:
        rows: Each is measured when it is asked for.
        packages: Distributions whose versions matter.
        json: File of the results, or None.

    Returns:
        What was written; empty without a file.
    """
    progress, begun = Console(stderr=True, highlight=False), machine(packages)
    done = []
    for row in rows:
        done.append(row)
        progress.print(f"  {in_words(row)}", markup=False, soft_wrap=True)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    print_rows(describe(begun), done, console)
    return write_result(json, done, begun) if json is not None else {}


def command_line() -> str:
    """How this process was called, without the folders of this machine."""
    arguments = [Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]
    return " ".join(arguments)


def print_rows(title: str, rows: Sequence[Row], console: Console) -> None:
    """Prints the rows as a table; a missed goal is red."""
    console.print(title, markup=False)
    grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    # notes give way first; names only where a terminal is too narrow for them
    grid.add_column("line", overflow="fold", min_width=max(len(row.name) for row in rows))
    for column in ("ours", "theirs", "ratio", "at least", "goal"):
        grid.add_column(column, justify="right", no_wrap=True, min_width=len(column))
    grid.add_column("note", style="dim")
    for row in rows:
        style = {True: "green", False: "bold red", None: ""}[row.met]
        shown = [with_unit(row.ours, row.unit), with_unit(row.theirs, row.unit)]
        ratios = [short(row.ratio), short(row.low), _goal(row)]
        grid.add_row(row.name, *shown, *(Text(cell, style=style) for cell in ratios), row.note)
    console.print(grid)


def in_words(row: Row) -> str:
    """A row in one line, for progress."""
    theirs = f", theirs {with_unit(row.theirs, row.unit)}" if row.theirs is not None else ""
    ratio = f", ratio {short(row.ratio)}" if row.ratio is not None else ""
    return f"{row.name}: {with_unit(row.ours, row.unit)}{theirs}{ratio} {_goal(row)}".rstrip()


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


# --- machine -------------------------------------------------------------------------------------


def one_thread() -> None:
    """Numeric libraries that are loaded after this use one thread."""
    os.environ.update(dict.fromkeys(THREADS, "1"))


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
