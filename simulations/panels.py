"""Panels of users: what is compared with what, before any number is made.

A panel is one (task, k, profile) with all its arms over the same users. On data, a user's scores
are averaged over seeds first; generated users of different seeds are different people. The pooled
panels of task "all" put the users of several tasks side by side, one metric at a time, where the
metric means the same in at least two tasks.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np

from fedoppu.common.errors import DataError
from fedoppu.simulations.columns import (
    Bools,
    Column,
    Numbers,
    UserColumns,
    averaged,
    joined,
    no_scores,
)
from fedoppu.simulations.metrics import Floats
from fedoppu.simulations.scores import METRICS, Kind, Metric, metrics_of
from fedoppu.simulations.statistics import Statistic, gains, mean_of

ALL = "all"
Key = tuple[str, str | None]  # (arm, control)


@dataclass(frozen=True)
class ArmScores:
    """The users' scores under one arm of one run.

    Attributes:
        task: LaMP's name.
        kind: Of the task.
        k: Retrieved items.
        profile: none, template or llm.
        seed: Of the run.
        arm: For example personal.
        users: Scores; empty where the arm or control does not apply: its rows are then null.
        control: None, or wrong_user (scores averaged over the other users' adapters).
    """

    task: str
    kind: Kind
    k: int
    profile: str
    seed: int
    arm: str
    users: UserColumns = field(repr=False)
    control: str | None = None


class Unit(NamedTuple):
    """One user of one task: what is resampled. On data the seed is the first, for all of them."""

    task: str
    seed: int
    user: str


@dataclass(frozen=True)
class Panel:
    """Arms over the same users.

    Attributes:
        task: LaMP's name, or all.
        k: Retrieved items.
        profile: none, template or llm.
        kinds: Kind of the task; of the pooled tasks.
        metrics: That are reported.
        units: Users, sorted.
        arms: Scores of these users by (arm, control); an arm may lack users.
    """

    task: str
    k: int
    profile: str
    kinds: frozenset[Kind]
    metrics: tuple[Metric, ...]
    units: tuple[Unit, ...] = field(repr=False)
    arms: Mapping[Key, UserColumns] = field(repr=False)

    def counted(self, key: Key, metric: Metric) -> Bools:
        """Whether a user has the metric under an arm, (users,)."""
        return self.values(key, metric).known if metric.combine is None else self.arms[key].present

    def values(self, key: Key, metric: Metric) -> Column:
        """The metric of each user."""
        return self.arms[key].column(metric.name)

    def queries(self, key: Key, counted: Bools) -> int:
        """Number of queries of some users."""
        return int(self.arms[key].queries[counted].sum())

    def mean(self, key: Key, metric: Metric) -> Statistic:
        """The metric under an arm: a mean over users, or official, over the users that have it."""
        if metric.combine is None:
            return mean_of(self.values(key, metric))
        return self._official(key, metric, self.counted(key, metric))

    def gain(self, left: Key, right: Key, metric: Metric) -> tuple[Statistic, Bools]:
        """The gain of left over right, and the users that have both sides."""
        counted = self.counted(left, metric) & self.counted(right, metric)
        if metric.combine is None:
            return mean_of(self.gains(left, right, metric)), counted
        sides = [self._official(key, metric, counted) for key in (left, right)]
        return _difference(sides[0], sides[1], metric.sign), counted

    def gains(self, left: Key, right: Key, metric: Metric) -> Column:
        """The gain of each user, of a metric that is a mean over users."""
        return gains(self.values(left, metric), self.values(right, metric), sign=metric.sign)

    def _official(self, key: Key, metric: Metric, counted: Bools) -> Statistic:
        """A function of summed columns, averaged over the replicas of the scores."""
        if metric.combine is None or not counted.any():
            return mean_of(no_scores(self.arms[key].users).column(metric.name))
        table = self.arms[key].sums[metric.name]
        combine = partial(_over_replicas, metric=metric, replicas=table.shape[1])
        return Statistic(partial(_flat, table, counted), combine)


def _flat(table: Numbers, counted: Bools) -> Floats:
    """Sums of the users that count, (users, replicas * width) float64."""
    flat = table.reshape(len(table), -1).astype(np.float64)
    flat[~counted] = 0.0
    return flat


def _over_replicas(sums: Floats, *, metric: Metric, replicas: int) -> Floats:
    assert metric.combine is not None  # noqa: S101 (only official metrics come here)
    each = sums.reshape(*sums.shape[:-1], replicas, -1)
    return np.asarray(metric.combine(each).mean(axis=-1))


def _difference(left: Statistic, right: Statistic, sign: int) -> Statistic:
    width = left.columns().shape[1]

    def columns() -> Floats:
        return np.concatenate([left.columns(), right.columns()], axis=1)

    def combine(sums: Floats) -> Floats:
        gain = left.combine(sums[..., :width]) - right.combine(sums[..., width:])
        return np.asarray(sign * gain)

    return Statistic(columns, combine)


def panels_of(scores: Iterable[ArmScores], *, same_users: bool) -> list[Panel]:
    """Sorts scores into panels, ordered by task, k and profile.

    Raises:
        DataError: An arm is given twice, or a task has two kinds.
    """
    cells: dict[tuple[str, int, str], list[ArmScores]] = {}
    for one in scores:
        cells.setdefault((one.task, one.k, one.profile), []).append(one)
    return [_panel(own, same_users=same_users) for _, own in sorted(cells.items())]


def _panel(own: list[ArmScores], *, same_users: bool) -> Panel:
    first = own[0]
    kinds = frozenset(one.kind for one in own)
    if len(kinds) > 1:
        raise DataError(f"task {first.task} is given as {' and '.join(sorted(kinds))}: choose one")
    by_arm = _by_arm(own)
    if same_users:
        by_arm = {key: _averaged(seeds) for key, seeds in by_arm.items()}
    people = _people(by_arm.values())
    units = [Unit(first.task, seed, user) for seed, users in people.items() for user in users]
    arms = {key: _over(seeds, people) for key, seeds in by_arm.items()}
    metrics = metrics_of(first.kind)
    return Panel(first.task, first.k, first.profile, kinds, metrics, tuple(units), arms)


Seeds = Mapping[int, UserColumns]


def _by_arm(own: list[ArmScores]) -> dict[Key, Seeds]:
    found: dict[Key, dict[int, UserColumns]] = {}
    for one in sorted(own, key=lambda one: (one.arm, one.control or "", one.seed)):
        seeds = found.setdefault((one.arm, one.control), {})
        if one.seed in seeds:
            where = f"{one.task}, k={one.k}, profile={one.profile}, seed={one.seed}"
            raise DataError(f"arm {one.arm} is given twice for {where}: give it once")
        seeds[one.seed] = one.users
    return {key: found[key] for key in found}


def _averaged(seeds: Seeds) -> Seeds:
    """The same people, counted under the first seed."""
    return {min(seeds): averaged([seeds[seed] for seed in sorted(seeds)])}


def _people(arms: Iterable[Seeds]) -> dict[int, tuple[str, ...]]:
    """The users of each seed under any arm, sorted."""
    found: dict[int, set[str]] = {}
    for seeds in arms:
        for seed, columns in seeds.items():
            found.setdefault(seed, set()).update(columns.users)
    return {seed: tuple(sorted(found[seed])) for seed in sorted(found)}


def _over(seeds: Seeds, people: Mapping[int, tuple[str, ...]]) -> UserColumns:
    """The scores of an arm over all users of all seeds."""
    parts = [
        seeds[seed].over(users) if seed in seeds else no_scores(users)
        for seed, users in people.items()
    ]
    return joined(parts)


def pooled_panels(panels: Sequence[Panel]) -> list[Panel]:
    """One panel for each (k, profile) and metric that at least two tasks share in meaning.

    It holds the arms that every such task has, so that arms stay comparable.
    """
    cells: dict[tuple[int, str], list[Panel]] = {}
    for panel in panels:
        cells.setdefault((panel.k, panel.profile), []).append(panel)
    found = []
    for own in cells.values():
        for metric in METRICS:
            tasks = [panel for panel in own if panel.kinds <= set(metric.pooled)]
            if len(tasks) > 1:
                found.append(_pool(tasks, metric))
    return found


def _pool(tasks: Sequence[Panel], metric: Metric) -> Panel:
    keys = [
        key
        for key in tasks[0].arms
        if all(key in task.arms and task.counted(key, metric).any() for task in tasks)
    ]
    arms = {key: joined([task.arms[key].only(metric.name) for task in tasks]) for key in keys}
    units = tuple(unit for task in tasks for unit in task.units)
    kinds = frozenset[Kind]().union(*(task.kinds for task in tasks))
    return Panel(ALL, tasks[0].k, tasks[0].profile, kinds, (metric,), units, arms)
