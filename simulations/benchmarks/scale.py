"""The command `python -m fedoppu.simulations.benchmarks.scale`: is memory flat in the number of users?

Each measurement is `fedoppu simulate` in a process of its own, of which the whole tree is measured:
as many base users as target users, one round, one personal adapter for each target user, trained on
one item, scored with its wrong-user control, the table and the report. So little is done for a user
that whatever grows with their number shows; how fast a user is trained is the personal phase's own
benchmark. Start-up costs the same at any size: of CPU time the slopes between sizes are compared.

A process takes some hundred MB before it has a user, which hides growth in a ratio: what a further
user adds is a row of its own. Not covered: many rounds, whose records are kept, and Ray.
"""

import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console

from fedoppu.common.cli import run_command
from fedoppu.common.errors import ClientFailed, UsageError
from fedoppu.simulations.benchmarks.bench import Row, check_options, measure, one_thread
from fedoppu.simulations.benchmarks.meters import TreeCost, run_tree
from fedoppu.simulations.run_folder import LAST

PACKAGES = ("fedoppu", "torch", "transformers", "numpy")
GOAL = 1.1  # of the largest size over the smallest
SETTINGS = (
    *("task=LaMP_3", "queries=1", "rounds=1", "cohort=16", "group_users=8", "workers=1"),
    *("arms=base,personal,majority,oracle", "personal.wrong_users=1", "resamples=200"),
    *("personal.training.epochs=1", "personal.training.newest=1"),
)

app = typer.Typer(pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Cost:
    """One run.

    Attributes:
        tree: Of all its processes.
        resumed: Of the same run, finished but for its table and report, taken up again.
        files: Files and folders in its folder.
        size: Bytes of the files.
    """

    tree: TreeCost
    resumed: TreeCost
    files: int
    size: int


@app.command()
def benchmark(
    sizes: Annotated[
        str, typer.Option(help="Target users, with commas, ascending; as many base users.")
    ] = "200,2000,10000",
    pairs: Annotated[int, typer.Option(help="Runs of each size but the largest.")] = 3,
    base: Annotated[str, typer.Option(help="pocket, or a transformers folder.")] = "pocket",
    json: Annotated[Path | None, typer.Option(help="File for the results.")] = None,
) -> None:
    """Measures memory and CPU time of whole runs of more and more users."""

    def command() -> dict[str, Any]:
        wanted = sizes_of(sizes)
        check_options(json, pairs)
        one_thread()
        costs = run_all(wanted, pairs, base=base)
        return measure(scale_rows(costs), packages=PACKAGES, json=json)

    run_command(command, "text")


def sizes_of(text: str) -> tuple[int, ...]:
    """The sizes that an option names.

    Raises:
        UsageError: They are not at least two ascending numbers of users.
    """
    words = text.split(",")
    sizes = tuple(int(word) for word in words if word.isdigit())
    ascending = all(less < more for less, more in pairwise(sizes))
    if len(sizes) < max(2, len(words)) or not ascending or sizes[0] < 2:
        raise UsageError(f"--sizes takes at least two ascending numbers from 2, got {text}")
    return sizes


def run_all(sizes: Sequence[int], pairs: int, *, base: str) -> dict[int, list[Cost]]:
    """Runs all sizes by turns, the largest once, in the first turn."""
    costs: dict[int, list[Cost]] = {size: [] for size in sizes}
    for turn in range(pairs):
        for size in sizes if turn == 0 else sizes[:-1]:
            with tempfile.TemporaryDirectory() as folder:
                cost = run_one(size, Path(folder) / "run", base)
            costs[size].append(cost)
            _tell(f"{size} users: {_megabytes(cost)}, {cost.tree.cpu_seconds:.1f} s of CPU time")
    return costs


def run_one(users: int, folder: Path, base: str) -> Cost:
    """One run and its end once more.

    Raises:
        ClientFailed: The run failed; its own message is above.
    """
    command = [sys.executable, "-m", "fedoppu", "simulate", "--quiet", "--format=json"]
    settings = [*SETTINGS, f"base={base}", f"users={users}", f"base_users={max(users, 16)}"]
    tree = _run([*command, *settings, f"out={folder}"])
    found = list(folder.rglob("*"))
    size = sum(path.stat().st_size for path in found if path.is_file())
    (folder / LAST).unlink()
    resumed = _run([*command, f"--resume={folder}"])
    shutil.rmtree(folder)
    return Cost(tree, resumed, len(found), size)


def _run(command: Sequence[str]) -> TreeCost:
    cost = run_tree(command, quiet=True)
    if cost.exit_code:
        raise ClientFailed(f"a run ended with exit code {cost.exit_code}")
    return cost


def scale_rows(costs: Mapping[int, Sequence[Cost]]) -> Iterator[Row]:
    """Rows of all sizes.

    Args:
        costs: Runs by number of users, ascending.
    """
    sizes = list(costs)
    least, most = sizes[0], sizes[-1]
    peaks = {size: median(cost.tree.peak_bytes for cost in costs[size]) for size in sizes}
    times = {size: median(cost.tree.cpu_seconds for cost in costs[size]) for size in sizes}
    for size in sizes:
        yield Row(f"peak memory, {size:,} users", peaks[size], kind="bound", unit="B")
        yield Row(f"CPU time, {size:,} users", times[size], kind="bound", unit="s")
    name = f"{most:,} users over {least:,}"
    ratio, growth = peaks[most] / peaks[least], (peaks[most] - peaks[least]) / (most - least)
    yield Row(f"peak memory, {name}", ratio, kind="bound", goal=GOAL, unit="x")
    yield Row("peak memory, a further user", growth, kind="bound", unit="B")
    yield from _slopes(times)
    last = costs[most][0]
    yield Row("files and folders, a user", last.files / most, kind="bound", unit="")
    yield Row("disk, a user", last.size / most, kind="bound", unit="B")
    resumed = last.resumed.cpu_seconds
    note = "everything is done but the table and the report; start-up included"
    yield Row(f"--resume, {most:,} users", resumed, kind="bound", unit="s", note=note)


def _slopes(times: Mapping[int, float]) -> Iterator[Row]:
    """CPU time of a further user: between the two largest sizes, and over that of the two smallest."""
    each = [
        (times[more] - times[less]) / (more - less) for less, more in pairwise(times)
    ]  # start-up is the same in both and falls out
    yield Row("CPU time, a further user", each[-1], kind="bound", unit="s")
    if len(each) > 1 and each[0] > 0:
        note = "between the two largest sizes, over that between the two smallest"
        ratio = each[-1] / each[0]
        yield Row("CPU time a user", ratio, kind="bound", goal=GOAL, unit="x", note=note)


def _megabytes(cost: Cost) -> str:
    return f"{cost.tree.peak_bytes / 1e6:.0f} MB"


def _tell(line: str) -> None:
    Console(stderr=True, highlight=False).print(line, markup=False, soft_wrap=True)


if __name__ == "__main__":
    app(prog_name="python -m fedoppu.simulations.benchmarks.scale")
