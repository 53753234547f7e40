"""The table of a run: every arm and control with its interval, and every difference as a gain.

A row is exactly {task, arm, k, profile, control, metric, value, low, high, users, queries}. Rows of
the same (task, k, profile) come from the same draws of users, so a difference is paired; it is
taken over the users that both sides have, and it is positive where the left side is better,
whatever the metric. A metric that an arm cannot have is a null row; a control that does not apply
(wrong-user with fewer than four target users) is null in every row.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from fedoppu.common.commit import commit_file
from fedoppu.common.config import TASKS
from fedoppu.simulations.panels import ALL, ArmScores, Key, Panel, Unit, panels_of, pooled_panels
from fedoppu.simulations.scores import METRICS, Metric
from fedoppu.simulations.statistics import (
    BootstrapSettings,
    Statistic,
    UserComparison,
    bootstrap,
    compare_users,
    holm,
)

WRONG_USER = "wrong_user"
ARMS = (
    *("base", "majority", "shared", "central", "prior_shift"),
    *("local", "population", "personal", "oracle"),
)
DIFFERENCES = (
    ("personal", "shared"),
    ("personal", WRONG_USER),
    ("personal", "majority"),
    ("personal", "prior_shift"),
    ("personal", "local"),
    ("personal", "population"),
    ("personal", "base"),
    ("local", WRONG_USER),
    ("local", "base"),
    ("prior_shift", "shared"),
    ("shared", "base"),
    ("central", "shared"),
    ("oracle", "personal"),
)


@dataclass(frozen=True)
class Row:
    """One line of table.json; value, low and high are None where there is none."""

    task: str
    arm: str
    k: int
    profile: str
    control: str | None
    metric: str
    value: float | None
    low: float | None
    high: float | None
    users: int
    queries: int


@dataclass(frozen=True)
class Comparison:
    """What a difference did to single users, for a metric that is a mean over users.

    Attributes:
        task: LaMP's name.
        k: Retrieved items.
        profile: none, template or llm.
        arm: The difference, for example personal-shared.
        metric: Its name.
        users: Shares helped and harmed, percentiles, signed-rank test.
        gains: Makes the gain of each user, positive where left is better.
        adjusted: The test's p-value after Holm's adjustment over tasks.
    """

    task: str
    k: int
    profile: str
    arm: str
    metric: str
    users: UserComparison
    gains: Callable[[], Mapping[Unit, float]] = field(repr=False)
    adjusted: float | None = None


@dataclass(frozen=True)
class Table:
    """All rows, and what the differences did to single users."""

    rows: tuple[Row, ...]
    comparisons: tuple[Comparison, ...] = ()


def build_table(
    scores: Iterable[ArmScores], settings: BootstrapSettings, *, same_users: bool = False
) -> Table:
    """Makes all rows, in an order that does not depend on the order of the scores.

    Args:
        scores: Of every (task, k, profile, seed, arm, control).
        settings: Of the bootstrap.
        same_users: The users of all seeds are the same people (data), not generated for each seed.

    Raises:
        DataError: An arm is given twice, or a task has two kinds.
    """
    panels = panels_of(scores, same_users=same_users)
    rows = [row for panel in panels + pooled_panels(panels) for row in _rows(panel, settings)]
    comparisons = [found for panel in panels for found in _comparisons(panel)]
    return Table(tuple(sorted(rows, key=_order)), _adjusted(comparisons))


def table_json(table: Table) -> bytes:
    """table.json: {"rows": [...]}, one row a line, sorted keys, shortest exact floats."""
    lines = [json.dumps(asdict(row), sort_keys=True, allow_nan=False) for row in table.rows]
    return ('{"rows": [\n' + ",\n".join(lines) + "\n]}\n").encode()


def write_table(path: Path, table: Table) -> None:
    """Commits table.json: whole or not at all, the same bytes for the same table."""
    commit_file(path, table_json(table))


def read_table(path: Path) -> Table:
    """Reads the rows of a table.json."""
    return Table(tuple(Row(**row) for row in json.loads(path.read_bytes())["rows"]))


def _rows(panel: Panel, settings: BootstrapSettings) -> list[Row]:
    drafts = [_arm(panel, key, metric) for key in panel.arms for metric in panel.metrics]
    for left, right in _pairs(panel):
        drafts += [
            draft
            for metric in panel.metrics
            if (draft := _difference(panel, left, right, metric=metric)) is not None
        ]
    strata = [(unit.task, unit.seed) for unit in panel.units]
    key = (panel.task, panel.k, panel.profile)
    estimates = bootstrap([statistic for _, statistic in drafts], strata, settings, key=key)
    return [
        replace(row, value=estimate.value, low=estimate.low, high=estimate.high)
        for (row, _), estimate in zip(drafts, estimates, strict=True)
    ]


def _arm(panel: Panel, key: Key, metric: Metric) -> tuple[Row, Statistic]:
    counted = panel.counted(key, metric)
    row = _row(panel, key, metric, users=int(counted.sum()), queries=panel.queries(key, counted))
    return row, panel.mean(key, metric)


def _difference(
    panel: Panel, left: Key, right: Key, *, metric: Metric
) -> tuple[Row, Statistic] | None:
    """The gain over the users that have both; None if a side that applies lacks the metric."""
    statistic, counted = panel.gain(left, right, metric)
    if not counted.any() and len(panel.arms[left]) and len(panel.arms[right]):
        return None
    name: Key = (difference_name(left, right), None)
    queries = panel.queries(left, counted)
    return _row(panel, name, metric, users=int(counted.sum()), queries=queries), statistic


def _row(panel: Panel, key: Key, metric: Metric, *, users: int, queries: int) -> Row:
    place = (panel.task, key[0], panel.k, panel.profile, key[1], metric.name)
    return Row(*place, None, None, None, users, queries)


def _pairs(panel: Panel) -> list[tuple[Key, Key]]:
    pairs: list[tuple[Key, Key]] = []
    for first, second in DIFFERENCES:
        left: Key = (first, None)
        right: Key = (first, second) if second == WRONG_USER else (second, None)
        if left in panel.arms and right in panel.arms:
            pairs.append((left, right))
    return pairs


def difference_name(left: Key, right: Key) -> str:
    """Arm of a difference row: personal-shared, personal-wrong_user."""
    return f"{left[0]}-{right[1] or right[0]}"


def _comparisons(panel: Panel) -> list[Comparison]:
    found = []
    for left, right in _pairs(panel):
        for metric in panel.metrics:
            if metric.combine is None:
                found += _comparison(panel, left, right, metric=metric)
    return found


def _comparison(panel: Panel, left: Key, right: Key, *, metric: Metric) -> list[Comparison]:
    users = compare_users(panel.gains(left, right, metric))
    if users is None:
        return []

    def each() -> dict[Unit, float]:
        """Made when it is asked for: all comparisons' together are many times the scores."""
        gains = panel.gains(left, right, metric)
        known = zip(panel.units, gains.values.tolist(), gains.known.tolist(), strict=True)
        return {unit: gain for unit, gain, has in known if has}

    name = difference_name(left, right)
    place = (panel.task, panel.k, panel.profile, name, metric.name)
    return [Comparison(*place, users, each)]


def _adjusted(found: Sequence[Comparison]) -> tuple[Comparison, ...]:
    """Holm over the tasks of the same difference and metric."""
    families: dict[tuple[int, str, str, str], list[int]] = {}
    for index, one in enumerate(found):
        families.setdefault((one.k, one.profile, one.arm, one.metric), []).append(index)
    result = list(found)
    for members in families.values():
        corrected = holm([found[index].users.p_value for index in members])
        for index, p_value in zip(members, corrected, strict=True):
            result[index] = replace(found[index], adjusted=p_value)
    return tuple(result)


def _order(row: Row) -> tuple[object, ...]:
    """Tasks as LaMP numbers them, the pooled one last; arms, then differences, then others."""
    tasks = (*TASKS, ALL)
    metrics = [metric.name for metric in METRICS]
    task = tasks.index(row.task) if row.task in tasks else len(tasks)
    arm = (*_arm_place(row.arm), row.arm, row.control or "")
    return (task, row.task, row.k, row.profile, *arm, metrics.index(row.metric))


def _arm_place(arm: str) -> tuple[int, int]:
    differences = [f"{left}-{right}" for left, right in DIFFERENCES]
    if arm in ARMS:
        return 0, ARMS.index(arm)
    if arm in differences:
        return 2, differences.index(arm)
    return 1, 0
