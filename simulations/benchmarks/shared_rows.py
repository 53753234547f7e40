"""The lines of the shared phase's benchmark.

A cost beside pfl is CPU seconds of one user's part of a round, the server's mean among them. Every
comparison is preceded by one round in which both sides must come to the same shared adapter.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from fedoppu.client.model import Dtype
from fedoppu.common.errors import FedoppuError
from fedoppu.simulations.benchmarks.bench import Row
from fedoppu.simulations.benchmarks.meters import Paired, TreeCost, cpu_seconds, interleave
from fedoppu.simulations.benchmarks.personal_turns import LOW_SHARE
from fedoppu.simulations.benchmarks.shared_cases import (
    Case,
    Vector,
    Work,
    cohorts,
    relative,
    write_base,
)
from fedoppu.simulations.benchmarks.shared_child import GROUP
from fedoppu.simulations.benchmarks.shared_ours import Ours
from fedoppu.simulations.benchmarks.shared_tree import run_marked

COHORT = 20
SMALL, LARGE, FLOWER_GOAL = 3.0, 2.0, 5.0
DEFAULT_GROUP = 6  # group_users where a run sets none
EQUAL = 2e-4
FEW = 4  # learnt tokens of an example, as in LaMP's classification tasks
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Scope:
    """How much is measured.

    Attributes:
        pairs: Measurements beside pfl.
        flower_pairs: Measurements beside Flower.
        dtypes: Of the base, for pfl; Flower is measured in float32.
        quick: A tiny case without goals.
    """

    pairs: int
    flower_pairs: int
    dtypes: tuple[Dtype, ...]
    quick: bool = False

    @property
    def works(self) -> Iterator[tuple[Work, float | None]]:
        """What is measured beside pfl, and its goal."""
        shapes = ((32, 1, 8, SMALL), (64, 4, 4, LARGE))
        for dtype in self.dtypes:
            if self.quick:
                yield Work(8, 1, 2, 2, dtype), None
                continue
            for tokens, batch, steps, goal in shapes:
                for answer in (tokens, FEW):
                    yield Work(tokens, batch, steps, answer, dtype), goal


def rows_of(sides: Sequence[str], scope: Scope) -> Iterator[Row]:
    """The rows of some other sides, as they are measured."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        parameters = write_base(folder)
        if "pfl" in sides:
            for work, goal in scope.works:
                yield from pfl_rows(Case.open(folder, work), scope, goal)
        if "flower" in sides:
            yield from flower_rows(folder, scope, f"{parameters:,} parameters")


# --- pfl -----------------------------------------------------------------------------------------


def pfl_rows(case: Case, scope: Scope, goal: float | None) -> Iterator[Row]:
    """One round of a cohort in this process, ours in groups of the whole cohort and of the default."""
    from fedoppu.simulations.benchmarks.shared_pfl import Pfl

    size = 3 if scope.quick else COHORT
    plan = cohorts(size, size, 1)
    pfl, ours = Pfl(case, range(size)), Ours(case, group=GROUP)
    yield _equality("pfl", case, ours(plan), pfl(plan))
    found = interleave(_timed(ours, plan), _timed(pfl, plan), scope.pairs)["user"]
    yield _paired(f"pfl: {case.work.name}, groups of {GROUP}", found, goal)
    if case.work.dtype == "float32" and case.work.answer == case.work.tokens:
        small = Ours(case, group=DEFAULT_GROUP)
        small(plan)
        found = interleave(_timed(small, plan), _timed(pfl, plan), scope.pairs)["user"]
        yield _paired(f"pfl: {case.work.name}, groups of {DEFAULT_GROUP}", found, None)


def _timed(
    side: Callable[[Sequence[Sequence[int]]], Vector], plan: Sequence[Sequence[int]]
) -> Callable[[], Mapping[str, float]]:
    users = sum(map(len, plan))
    return lambda: {"user": cpu_seconds(partial(side, plan)) / users}


def _paired(name: str, found: Paired, goal: float | None) -> Row:
    note = f"{found.pairs} pairs, load {os.getloadavg()[0]:.1f}"
    share = None if goal is None else LOW_SHARE
    return Row(name, found.ours, found.theirs, goal=goal, low=found.low, low_share=share, note=note)


def _equality(other: str, case: Case, ours: Vector, theirs: Vector) -> Row:
    """In float32 the round's result must be the same; in bf16 each side rounds in its own places."""
    exact = case.work.dtype == "float32"
    return Row(
        f"- distance from {other}: {case.work.name}",
        relative(ours, theirs, case.vector(case.start)),
        kind="bound",
        goal=EQUAL if exact else None,
        unit="",
        note="L2, of the shared adapter after a round, relative to its movement",
    )


# --- Flower --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """Rounds in a process of their own."""

    folder: Path
    work: Work
    users: int
    cohort: int
    rounds: int

    def measure(self, side: str) -> TreeCost:
        """The cost of one side from start to end.

        Raises:
            FedoppuError: It failed.
        """
        numbers = map(str, (self.users, self.cohort, self.rounds))
        module = "fedoppu.simulations.benchmarks.shared_child"
        command = [sys.executable, "-m", module, side, str(self.folder), self.work.as_text()]
        cost = run_marked([*command, *numbers, str(self.result(side))], {**os.environ, **QUIET})
        if cost.exit_code:
            raise FedoppuError(f"the side {side} ended with exit code {cost.exit_code}")
        return cost

    def costs(self, side: str) -> Mapping[str, float]:
        """CPU seconds and memory."""
        cost = self.measure(side)
        return {"cpu": cost.cpu_seconds, "peak": float(cost.peak_bytes)}

    def result(self, side: str) -> Path:
        """Where a side leaves the shared adapter."""
        return self.folder / f"{side}.npy"


def flower_rows(folder: Path, scope: Scope, parameters: str) -> Iterator[Row]:
    """A whole run with its start-up and all its processes, and one round in which all are the same."""
    work = Work(8, 1, 2, 2) if scope.quick else Work(32, 1, 8, 32)
    yield _flower_equality(_Run(folder, work, users=4, cohort=4, rounds=1))
    users, cohort, rounds = (4, 2, 2) if scope.quick else (200, COHORT, 5)
    run = _Run(folder, work, users, cohort, rounds)
    found = interleave(partial(run.costs, "ours"), partial(run.costs, "flower"), scope.flower_pairs)
    name = f"Flower on Ray: {users} users x {rounds} rounds of {cohort}, {work.name}"
    yield _paired(f"{name}, with start-up", found["cpu"], None if scope.quick else FLOWER_GOAL)
    note = f"peak of all processes, shared pages in each; {parameters}"
    peak = found["peak"]
    yield Row(f"- memory: {users} users", peak.ours, peak.theirs, unit="B", low=peak.low, note=note)


def _flower_equality(run: _Run) -> Row:
    for side in ("ours", "flower"):
        run.measure(side)
    ours, theirs = (np.load(run.result(side)) for side in ("ours", "flower"))
    return _equality("Flower", Case.open(run.folder, run.work), ours, theirs)
