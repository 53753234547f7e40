"""What scores of users say about users in general: intervals, tests, who is helped or harmed.

The unit is the user. Users are resampled within their stratum (generated users within their seed,
pooled users within their task), all arms and metrics with the same draws, so that a difference is
paired. The interval is the percentile interval (Efron and Tibshirani 1993, chapter 13). Draws are a
pure function of (seed, key): nothing is carried.

Not covered: the uncertainty of training, except as far as several seeds are pooled.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedoppu.common.config import require
from fedoppu.common.errors import DataError
from fedoppu.common.randomness import Key, Randomness
from fedoppu.simulations.metrics import Floats, ratio

CHUNK = 500  # resamples held at once: memory stays flat for any number of users


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
        columns: (users, width) float64; all zero for a user that is left out.
        combine: The number of summed columns, (..., width) to (...); NaN where there is none.
    """

    columns: Floats = field(repr=False)
    combine: Callable[[Floats], Floats]


@dataclass(frozen=True)
class Estimate:
    """A number and its interval, None where there is none; it needs two users in a stratum."""

    value: float | None
    low: float | None
    high: float | None


NOTHING = Estimate(None, None, None)


def mean_of(values: Sequence[float | None]) -> Statistic:
    """The mean over the users that have a value."""
    counted = np.array([value is not None for value in values], dtype=np.float64)
    filled = np.array([0.0 if value is None else value for value in values])
    return Statistic(np.stack([filled, counted], axis=1), ratio)


def gain_of(left: Sequence[float | None], right: Sequence[float | None], *, sign: int) -> Statistic:
    """Mean of sign * (left - right) over the users that have both: positive if left is better."""
    return mean_of(gains(left, right, sign=sign))


def gains(
    left: Sequence[float | None], right: Sequence[float | None], *, sign: int
) -> list[float | None]:
    """Gives sign * (left - right) of each user, None where one is missing."""
    pairs = zip(left, right, strict=True)
    return [None if a is None or b is None else sign * (a - b) for a, b in pairs]


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
    for statistic in statistics:
        if len(statistic.columns) != len(strata):
            raise DataError(
                f"a statistic of {len(statistic.columns)} users, not {len(strata)}: give all"
            )
    columns, places = _distinct_columns(statistics)
    points = [
        float(s.combine(s.columns.sum(axis=0))) if len(strata) else np.nan for s in statistics
    ]
    groups = _groups(strata)
    if max((len(group) for group in groups), default=0) < 2:
        return [Estimate(_number(point), None, None) for point in points]
    draws = np.empty((settings.resamples, len(statistics)))
    for start in range(0, settings.resamples, CHUNK):
        size = min(CHUNK, settings.resamples - start)
        weights = _weights(groups, size, settings.randomness.stream("bootstrap", *key, start))
        # einsum adds in a fixed order, whatever the number of BLAS threads: the same bytes.
        sums = np.einsum("ru,uc->rc", weights, columns)
        for index, statistic in enumerate(statistics):
            draws[start : start + size, index] = statistic.combine(sums[:, places[index]])
    return [_estimate(p, draws[:, i], settings.confidence) for i, p in enumerate(points)]


def _distinct_columns(statistics: Sequence[Statistic]) -> tuple[Floats, list[NDArray[np.intp]]]:
    """Each distinct column once, as arms share their counts, and where each statistic's are."""
    found: dict[bytes, int] = {}
    kept: list[Floats] = []
    places: list[NDArray[np.intp]] = []
    for statistic in statistics:
        own = []
        for column in statistic.columns.T:
            index = found.setdefault(column.tobytes(), len(kept))
            if index == len(kept):
                kept.append(column)
            own.append(index)
        places.append(np.array(own, dtype=np.intp))
    return np.stack(kept, axis=1), places


def _groups(strata: Sequence[object]) -> list[NDArray[np.intp]]:
    members: dict[object, list[int]] = {}
    for index, stratum in enumerate(strata):
        members.setdefault(stratum, []).append(index)
    return [np.array(indices, dtype=np.intp) for indices in members.values()]


def _weights(groups: list[NDArray[np.intp]], size: int, generator: np.random.Generator) -> Floats:
    """How often each user is drawn, (size, users): a multinomial within each stratum."""
    weights = np.zeros((size, sum(len(group) for group in groups)))
    for group in groups:
        even = np.full(len(group), 1 / len(group))
        weights[:, group] = generator.multinomial(len(group), even, size=size)
    return weights


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


def compare_users(gains: Sequence[float | None]) -> UserComparison | None:
    """Describes the gains of the users that have one; None if nobody has."""
    known = np.array([gain for gain in gains if gain is not None])
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
