"""The lines of the decoding benchmark: label scores and greedy answers of mixed users."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from fedoppu.client.jobs import ModelQuery
from fedoppu.client.model import POCKET, Dtype
from fedoppu.client.prediction import BatchedPredictor
from fedoppu.simulations.benchmarks.bench import Row
from fedoppu.simulations.benchmarks.decoding_cases import (
    Answer,
    PeftWay,
    Scores,
    check_answers,
    check_scores,
    questions,
)
from fedoppu.simulations.benchmarks.meters import Paired, cpu_seconds, interleave
from fedoppu.simulations.benchmarks.personal_cases import Case, Work, opened
from fedoppu.simulations.benchmarks.personal_turns import LOW_SHARE

# of the issue; the specification's figures are bf16 beside peft on the base as it comes, in float32
GOAL = 25.0
PROMISED = ("tiny", "house")
SHORT: Mapping[Dtype, str] = {"float32": "fp32", "bfloat16": "bf16"}
SIDES: tuple[tuple[Dtype, Dtype], ...] = (
    ("bfloat16", "float32"),
    ("bfloat16", "bfloat16"),
    ("float32", "float32"),
)


@dataclass(frozen=True)
class Scope:
    """How much is measured.

    Attributes:
        shapes: Of the bases; pocket is the embedded one.
        folders: Bases of shapes; random weights without, but for pocket.
        pairs: Measurements of each side.
        work: What the users have.
        promised: Whether the goal holds for what is measured.
        max_tokens: Longest answer.
    """

    shapes: tuple[str, ...]
    folders: Mapping[str, Path]
    pairs: int
    work: Work
    promised: bool = True
    max_tokens: int = 24


def decoding_rows(scope: Scope) -> Iterator[Row]:
    """Rows of one shape after another."""
    for shape in scope.shapes:
        folder = POCKET if shape == "pocket" else scope.folders.get(shape)
        # without a folder the shape names the size of the random weights
        with opened("house" if shape == "house" else "tiny", folder, scope.work) as case:
            contest = _Contest.of(case, questions(case, max_tokens=scope.max_tokens))
            goal = GOAL if scope.promised and shape in PROMISED else None
            yield from _label_rows(shape, contest, scope.pairs, goal=goal)
            yield from _answer_rows(shape, contest, scope.pairs)


@dataclass(frozen=True)
class _Contest:
    """Both sides in both dtypes, and the queries."""

    queries: Sequence[ModelQuery] = field(repr=False)
    ours: Mapping[Dtype, BatchedPredictor] = field(repr=False)
    theirs: Mapping[Dtype, PeftWay] = field(repr=False)

    @classmethod
    def of(cls, case: Case, queries: Sequence[ModelQuery]) -> "_Contest":
        """Loads both sides."""
        ours = {dtype: BatchedPredictor(base) for dtype, base in case.bases.items()}
        theirs = {dtype: PeftWay.of(base, case.spec, queries) for dtype, base in case.bases.items()}
        return cls(queries, ours, theirs)

    def our_scores(self, dtype: Dtype) -> list[Scores]:
        return list(self.ours[dtype].score(self.queries))

    def their_scores(self, dtype: Dtype) -> list[Scores]:
        return [self.theirs[dtype].score(query) for query in self.queries]

    def our_answers(self, dtype: Dtype) -> list[Answer]:
        return list(self.ours[dtype].generate(self.queries))

    def their_answers(self, dtype: Dtype) -> list[Answer]:
        return [self.theirs[dtype].answer(query) for query in self.queries]

    def costs(self, work: Callable[[Dtype], object]) -> dict[Dtype, float]:
        """CPU seconds a query of each dtype."""
        seconds = {dtype: cpu_seconds(partial(work, dtype)) for dtype in SHORT}
        return {dtype: spent / len(self.queries) for dtype, spent in seconds.items()}

    def measured(
        self, ours: Callable[[Dtype], object], theirs: Callable[[Dtype], object], pairs: int
    ) -> dict[str, Paired]:
        """Both sides by turns, by the dtypes of both."""

        def by_sides(work: Callable[[Dtype], object], side: int) -> dict[str, float]:
            costs = self.costs(work)
            return {_sides(both): costs[both[side]] for both in SIDES}

        return interleave(lambda: by_sides(ours, 0), lambda: by_sides(theirs, 1), pairs)


def _sides(both: tuple[Dtype, Dtype]) -> str:
    ours, theirs = (SHORT[dtype] for dtype in both)
    return f"{ours}, peft {theirs}"


def _label_rows(shape: str, contest: _Contest, pairs: int, *, goal: float | None) -> Iterator[Row]:
    """Label scores, checked first; the warm-up of both sides."""
    mine = {dtype: contest.our_scores(dtype) for dtype in SHORT}
    others = {dtype: contest.their_scores(dtype) for dtype in SHORT}
    check_scores(mine["float32"], others["float32"])
    found = contest.measured(contest.our_scores, contest.their_scores, pairs)
    labels = max(len(query.labels) for query in contest.queries)
    for both in SIDES:
        pair = found[_sides(both)]
        promised = goal is not None and both == SIDES[0]
        note = f"a query; {pairs} pairs; {_compared(mine[both[0]], others[both[1]])}"
        yield Row(
            f"{shape}: {labels} labels, {_sides(both)}",
            pair.ours,
            pair.theirs,
            goal=goal if promised else None,
            low=pair.low,
            low_share=LOW_SHARE if promised else None,
            note=note,
        )


def _compared(ours: Sequence[Scores], theirs: Sequence[Scores]) -> str:
    pairs = list(zip(ours, theirs, strict=True))
    same = sum(int(a.argmax() == b.argmax()) for a, b in pairs)
    apart = max(float(np.abs(a - b).max()) for a, b in pairs)
    return f"same label in {same} of {len(pairs)}, scores within {apart:.1g} nats"


def _answer_rows(shape: str, contest: _Contest, pairs: int) -> Iterator[Row]:
    """Greedy answers, checked first."""
    mine = {dtype: contest.our_answers(dtype) for dtype in SHORT}
    others = {dtype: contest.their_answers(dtype) for dtype in SHORT}
    check_answers(mine["float32"], others["float32"])
    found = contest.measured(contest.our_answers, contest.their_answers, pairs)
    for both in SIDES:
        pair, answers = found[_sides(both)], mine[both[0]]
        same = sum(a == b for a, b in zip(answers, others[both[1]], strict=True))
        length = sum(map(len, answers)) / len(answers)
        note = (
            f"a query; {pairs} pairs; {same} of {len(answers)} the same, {length:.0f} tokens each"
        )
        name = f"{shape}: greedy answers, {_sides(both)}"
        yield Row(name, pair.ours, pair.theirs, low=pair.low, note=note)
