"""What scores of users say about users in general: intervals, tests, who is helped or harmed.

The unit is the user. Users are resampled within their stratum (generated users within their seed,
pooled users within their task), all arms and metrics with the same draws, so that a difference is
paired. The interval is the percentile interval (Efron and Tibshirani 1993, chapter 13). Draws are a
pure function of (seed, key): nothing is carried.

Not covered: the uncertainty of training, except as far as several seeds are pooled.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fedoppu.common.config import require
from fedoppu.common.errors import DataError
from fedoppu.common.randomness import Key, Randomness
from fedoppu.simulations.columns import Column
from fedoppu.simulations.metrics import Floats, ratio

CHUNK = 500  # resamples that are drawn from one stream
HELD = 1 << 19  # numbers of a block (4 MB): what is held does not grow with the users


@dataclass(frozen=True)
class BootstrapSettings:
    """How intervals are made.

    Attributes:
        randomness: Root of the draws.
        resamples: Number of draws of all users.
        confidence: Of the percentile interval.
    """

    randomness: Randomness
    resamples: int = 10_000
    confidence: float = 0.95

    def __post_init__(self) -> None:
        """Check the ranges."""
        require("resamples", self.resamples, 1)
        require("confidence", self.confidence, 0.5, 0.9999)


@dataclass(frozen=True)
class Statistic:
    """A number that users' summed columns determine.

    Attributes:
        columns: Makes the columns, (users, width) float64, all zero for a user that is left out:
            those of all statistics together would be many times the scores that they are made of.
        combine: The number of summed columns, (..., width) to (...); NaN where there is none.
    """

    columns: Callable[[], Floats] = field(repr=False)
    combine: Callable[[Floats], Floats]


@dataclass(frozen=True)
class Estimate:
    """A number and its interval, None where there is none; it needs two users in a stratum."""

    value: float | None
    low: float | None
    high: float | None


NOTHING = Estimate(None, None, None)


def mean_of(column: Column) -> Statistic:
    """The mean over the users that have a value."""

    def columns() -> Floats:
        return np.stack([column.values, column.known.astype(np.float64)], axis=1)

    return Statistic(columns, ratio)


def gains(left: Column, right: Column, *, sign: int) -> Column:
    """Gives sign * (left - right) of each user that has both: positive if left is better."""
    known = left.known & right.known
    with np.errstate(invalid="ignore"):  # of two infinite losses the gain is NaN
        return Column(np.where(known, sign * (left.values - right.values), 0.0), known)


def bootstrap(
    statistics: Sequence[Statistic],
    strata: Sequence[object],
    settings: BootstrapSettings,
    *,
    key: tuple[Key, ...] = (),
) -> list[Estimate]:
    """Values and intervals of many statistics of the same users, all from the same draws.

    Args:
        statistics: Each with one row of columns for each user.
        strata: (users,) the stratum of each user; the number of users drawn from each is fixed.
        settings: Draws and confidence.
        key: Names the draws, beside the seed.

    Raises:
        DataError: A statistic has another number of users than the strata.
    """
    if not statistics:
        return []
    pool = _Pool.of(statistics, len(strata))
    groups = _groups(strata)
    if max((len(group) for group in groups), default=0) < 2:
        return [Estimate(_number(point), None, None) for point in pool.points]
    draws = np.empty((settings.resamples, len(statistics)))
    for start in range(0, settings.resamples, CHUNK):
        size = min(CHUNK, settings.resamples - start)
        stream = settings.randomness.stream("bootstrap", *key, start)
        sums = _resampled(pool, _counts(groups, size, stream))
        for index, statistic in enumerate(statistics):
            draws[start : start + size, index] = statistic.combine(sums[:, pool.places[index]])
    return [_estimate(p, draws[:, i], settings.confidence) for i, p in enumerate(pool.points)]


@dataclass(frozen=True)
class _Pool:
    """Each distinct column once, as arms share their counts and differences the columns of arms.

    Attributes:
        statistics: Make the columns.
        users: Number of users.
        sources: Of each distinct column, the statistic that makes it, and which of its columns it is.
        places: Of each statistic, which distinct columns are its own.
        points: The number of each statistic over the users as they are; NaN where there is none.
    """

    statistics: Sequence[Statistic]
    users: int
    sources: Sequence[tuple[int, int]]
    places: Sequence[NDArray[np.intp]]
    points: Sequence[float]

    @classmethod
    def of(cls, statistics: Sequence[Statistic], users: int) -> "_Pool":
        """Makes each statistic's columns once, and keeps none."""
        found: dict[bytes, tuple[int, int, int]] = {}
        places, points = [], []
        for number, statistic in enumerate(statistics):
            columns = statistic.columns()
            if len(columns) != users:
                raise DataError(f"a statistic of {len(columns)} users, not {users}: give all")
            points.append(float(statistic.combine(columns.sum(axis=0))) if users else np.nan)
            own = [
                found.setdefault(_digest(column), (len(found), number, which))[0]
                for which, column in enumerate(columns.T)
            ]
            places.append(np.array(own, dtype=np.intp))
        sources = [(number, which) for _, number, which in found.values()]
        return cls(statistics, users, sources, places, points)

    def blocks(self) -> Iterator[tuple[slice, Floats]]:
        """The distinct columns, (users, some) float64, a block at a time.

        Row by row in memory: the order in which einsum adds depends on it, and so do the last bits.
        """
        for some in _blocks(len(self.sources), self.users):
            wanted: dict[int, list[int]] = {}
            for number, which in self.sources[some]:
                wanted.setdefault(number, []).append(which)
            made = [self.statistics[number].columns()[:, own] for number, own in wanted.items()]
            yield some, np.ascontiguousarray(np.concatenate(made, axis=1))


def _digest(column: Floats) -> bytes:
    return hashlib.sha256(column.tobytes()).digest()


def _blocks(total: int, users: int) -> list[slice]:
    """Cuts rows or columns of so many users into blocks that are held at once.

    All but equal: a block of one would be added up in another order than it is within others.
    """
    parts = -(-total // max(8, HELD // max(users, 1)))
    ends = [total * part // parts for part in range(parts + 1)]
    return [slice(start, end) for start, end in pairwise(ends)]


def _groups(strata: Sequence[object]) -> list[NDArray[np.intp]]:
    members: dict[object, list[int]] = {}
    for index, stratum in enumerate(strata):
        members.setdefault(stratum, []).append(index)
    return [np.array(indices, dtype=np.intp) for indices in members.values()]


def _counts(
    groups: Sequence[NDArray[np.intp]], size: int, stream: np.random.Generator
) -> NDArray[np.unsignedinteger]:
    """How often each user is drawn, (size, users): a multinomial within each stratum."""
    users = sum(len(group) for group in groups)
    counts = np.zeros((size, users), np.min_scalar_type(users))
    for group in groups:
        even = np.full(len(group), 1 / len(group))
        for rows in _blocks(size, len(group)):
            drawn = stream.multinomial(len(group), even, size=rows.stop - rows.start)
            counts[rows, group] = drawn
    return counts


def _resampled(pool: _Pool, counts: NDArray[np.unsignedinteger]) -> Floats:
    """Sums of the distinct columns over the users of each resample, (size, columns) float64."""
    sums = np.empty((len(counts), len(pool.sources)))
    for some, columns in pool.blocks():
        for rows in _blocks(len(counts), pool.users):
            # einsum adds in a fixed order, whatever the number of BLAS threads: the same bytes.
            weights = counts[rows].astype(np.float64)
            sums[rows, some] = np.einsum("ru,uc->rc", weights, columns)
    return sums


def _estimate(point: float, draws: Floats, confidence: float) -> Estimate:
    finite = draws[np.isfinite(draws)]
    if not np.isfinite(point) or not finite.size:
        return Estimate(_number(point), None, None)
    tail = (1 - confidence) / 2
    low, high = np.quantile(finite, [tail, 1 - tail])
    return Estimate(point, float(low), float(high))


def _number(value: float) -> float | None:
    return value if np.isfinite(value) else None


@dataclass(frozen=True)
class UserComparison:
    """What a difference did to single users; gains are positive where left is better.

    Attributes:
        users: Users with both scores.
        helped: Share with a gain above zero.
        harmed: Share with a gain below zero.
        tenth: 10th percentile of the gains: how the worst-off fare.
        median: Median gain.
        p_value: Two-sided Wilcoxon signed-rank test; None if no gain differs from zero.
    """

    users: int
    helped: float
    harmed: float
    tenth: float
    median: float
    p_value: float | None


def compare_users(gains: Column) -> UserComparison | None:
    """Describes the gains of the users that have one; None if nobody has."""
    known = gains.values[gains.known]
    if not known.size:
        return None
    tenth, median = np.quantile(known, [0.1, 0.5])
    return UserComparison(
        users=int(known.size),
        helped=float((known > 0).mean()),
        harmed=float((known < 0).mean()),
        tenth=float(tenth),
        median=float(median),
        p_value=signed_rank(known),
    )


def signed_rank(gains: Floats) -> float | None:
    """Two-sided p-value of Wilcoxon's signed-rank test; users without a difference are dropped.

    None if no user has a difference. Exact up to 50 users without ties, else the normal
    approximation.
    """
    from scipy.stats import rankdata, wilcoxon  # type: ignore[import-untyped]  # seconds

    # Scores are means of few queries: equal gains differ in the last bits, and must tie.
    moved = np.round(gains[np.abs(gains) > 1e-12], 12)
    if not moved.size:
        return None
    ties = len(np.unique(rankdata(np.abs(moved)))) < moved.size
    method = "approx" if ties or moved.size > 50 else "exact"
    return float(wilcoxon(moved, method=method).pvalue)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment of a family of tests (Holm 1979); None stays None."""
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, index) in enumerate(order):
        highest = max(highest, min(1.0, p * (len(order) - rank)))
        adjusted[index] = highest
    return adjusted
