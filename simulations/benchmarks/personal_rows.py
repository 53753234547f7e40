"""The lines of the personal phase's benchmark: rates of all sides, then whether they did the same."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from fedoppu.client.jobs import ClientJob
from fedoppu.client.model import Dtype
from fedoppu.simulations.benchmarks.bench import Row
from fedoppu.simulations.benchmarks.personal_cases import DTYPES, Case, Shape, Work, opened
from fedoppu.simulations.benchmarks.personal_exact import (
    cosine_row,
    distance_row,
    gradient_row,
    movements,
    score_row,
)
from fedoppu.simulations.benchmarks.personal_sides import (
    LeanLoop,
    OppuWay,
    Ours,
    Side,
    Trained,
    check_alike,
)
from fedoppu.simulations.benchmarks.personal_turns import Turns, silent, take_turns

GROUPS: Final = (1, 4, 16)
EXACT: Final = 4  # users of a group in float32
OPPU: Final = "OPPU's way"
LEAN: Final[Mapping[Dtype, str]] = {"float32": "lean fp32", "bfloat16": "lean bf16"}
# least ratio to OPPU's way, and to the lean loop in the same dtype, of the largest group
GOALS: Final[Mapping[Shape, tuple[float, float]]] = {
    "tiny": (8.5, 4.7),
    "house": (7.0, 4.2),
    "small": (11.0, 7.0),
    "135m": (6.5, 5.0),
}
ALONE: Final[Mapping[Shape, float]] = {"small": 3.0}  # one user a group, to the lean loop
# odd, so that each user is trained in some round, and beside the other task's
STRIDE: Final = 17


@dataclass(frozen=True)
class Scope:
    """How much is measured.

    Attributes:
        shapes: Of the bases.
        folders: Shape: folder of its base.
        pairs: Measurements of each side.
        work: What the users of a shape have; four of them for 135m.
        slow: Users that a side which trains one after another trains in a round.
        promised: Whether the goals are those of this work.
        tell: Called with a line after each round.
    """

    shapes: tuple[Shape, ...]
    folders: Mapping[Shape, Path] = field(default_factory=dict)
    pairs: int = 5
    work: Work = field(default_factory=Work)
    slow: int = 1
    promised: bool = True
    tell: Callable[[str], None] = silent

    def cases(self) -> Iterator[Case]:
        """Each shape's base and users, one after another."""
        for shape in self.shapes:
            work = replace(self.work, users=4) if shape == "135m" else self.work
            with opened(shape, self.folders.get(shape), work) as case:
                yield case


def groups_of(case: Case) -> tuple[int, ...]:
    """Sizes of groups that a case has users for."""
    return tuple(size for size in GROUPS if size <= len(case.jobs)) or (1,)


def ours_in(dtype: Dtype, group: int) -> str:
    """Name of one of our sides."""
    return f"ours {'fp32' if dtype == 'float32' else 'bf16'}, groups of {group}"


class Contest:
    """The sides of one case; each trains some of the users of a round's block.

    Attributes:
        trained: Name of a side: what it made in all rounds.
    """

    def __init__(self, case: Case, sides: Mapping[str, tuple[Side, int]]) -> None:
        """Take part with each side and its number of users a round."""
        self._case, self._sides = case, sides
        self.trained: dict[str, list[Trained]] = {name: [] for name in sides}

    def run(self, rounds: int, *, tell: Callable[[str], None] = silent) -> Turns:
        """Measures all sides by turns, after one short job of each that is not counted.

        Raises:
            FedoppuError: A side took other steps than the others.
        """
        for side, _ in self._sides.values():
            side([_shortened(self._case.jobs[0])])
        turns = take_turns(
            {name: self._turn(name) for name in self._sides},
            rounds,
            tell=lambda line: tell(f"{self._case.shape}, {line}"),
        )
        check_alike(self.trained)
        return turns

    def _turn(self, name: str) -> Callable[[int], int]:
        side, users = self._sides[name]

        def turn(index: int) -> int:
            jobs = block(self._case.jobs, index)[:users]
            self.trained[name] += side(jobs)
            return len(jobs)

        return turn


def block(jobs: Sequence[ClientJob], index: int) -> list[ClientJob]:
    """The users of a round, at most as many as the largest group; all sides take the first ones."""
    start = index * STRIDE % len(jobs)
    return [*jobs[start:], *jobs[:start]][: GROUPS[-1]]


def _shortened(job: ClientJob) -> ClientJob:
    examples = job.examples[: job.settings.batch_size]
    return ClientJob("warm-up", job.start, (), job.settings, examples, job.randomness)


def comparison_rows(scope: Scope) -> Iterator[Row]:
    """All shapes: ours beside OPPU's way and the lean loop."""
    for case in scope.cases():
        yield from _compare(case, scope)


def _compare(case: Case, scope: Scope) -> Iterator[Row]:
    yield case.lengths()
    with TemporaryDirectory() as folder:
        contest = Contest(case, _sides(case, scope, folder))
        turns = contest.run(scope.pairs, tell=scope.tell)
    yield from _rates(case, turns, promised=scope.promised)
    yield gradient_row(case)
    moved = {name: movements(case, trained) for name, trained in contest.trained.items()}
    best, exact = ours_in("bfloat16", groups_of(case)[-1]), ours_in("float32", EXACT)
    if exact in moved:
        yield distance_row(case, moved[exact], moved[LEAN["float32"]])
        yield cosine_row(case, moved[best], moved[LEAN["float32"]], theirs_in="fp32")
    yield cosine_row(case, moved[best], moved[LEAN["bfloat16"]], theirs_in="bf16")
    yield score_row(case, contest.trained[best], contest.trained[LEAN["bfloat16"]])


def _sides(case: Case, scope: Scope, folder: str) -> dict[str, tuple[Side, int]]:
    """By name, each side and how many users it trains in a round."""
    # a large base is slow enough without a second dtype
    dtypes: tuple[Dtype, ...] = ("bfloat16",) if case.shape == "135m" else DTYPES
    slow = 1 if case.shape == "135m" else scope.slow
    sides: dict[str, tuple[Side, int]] = {OPPU: (OppuWay(case, folder=folder), slow)}
    for dtype in dtypes:
        sides[LEAN[dtype]] = (LeanLoop(case, dtype=dtype), slow)
        for group in groups_of(case) if dtype == "bfloat16" else (EXACT,):
            ours = Ours(case, dtype=dtype, group=group)
            sides[ours_in(dtype, group)] = (ours, max(group, slow))
    return sides


def _rates(case: Case, turns: Turns, *, promised: bool) -> Iterator[Row]:
    groups, exact = groups_of(case), ours_in("float32", EXACT)
    pairs: dict[tuple[str, str], float | None] = {}
    for group in reversed(groups):
        goals = _goals(case.shape, group, largest=groups[-1])
        pairs[ours_in("bfloat16", group), OPPU] = goals[0]
        pairs[ours_in("bfloat16", group), LEAN["bfloat16"]] = goals[1]
    if exact in turns.rates:
        pairs[exact, OPPU] = None
        pairs[exact, LEAN["float32"]] = GOALS[case.shape][1]
    for (ours, theirs), goal in pairs.items():
        name = f"{case.shape}: {ours} / {theirs}"
        yield turns.row(name, ours=ours, theirs=theirs, goal=goal if promised else None)


def _goals(shape: Shape, group: int, *, largest: int) -> tuple[float | None, float | None]:
    """Least ratio to OPPU's way and to the lean loop, if promised for groups of that size."""
    if group == largest:
        return GOALS[shape]
    return None, ALONE.get(shape) if group == 1 else None
