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
from fedoppu.simulations.metrics import Floats
from fedoppu.simulations.scores import (
    METRICS,
    Kind,
    Metric,
    UserScores,
    average_scores,
    metrics_of,
)
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
    users: tuple[UserScores, ...] = field(repr=False)
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
        arms: Scores by (arm, control); an arm may lack users.
    """

    task: str
    k: int
    profile: str
    kinds: frozenset[Kind]
    metrics: tuple[Metric, ...]
    units: tuple[Unit, ...] = field(repr=False)
    arms: Mapping[Key, Mapping[Unit, UserScores]] = field(repr=False)

    def counted(self, key: Key, metric: Metric) -> tuple[Unit, ...]:
        """The users that have the metric under an arm."""
        users = self.arms[key]
        if metric.combine is not None:
            return tuple(unit for unit in self.units if unit in users)
        values = zip(self.units, self.values(key, metric), strict=True)
        return tuple(unit for unit, value in values if value is not None)

    def values(self, key: Key, metric: Metric) -> list[float | None]:
        """The metric of each user, None where there is none."""
        found = [self.arms[key].get(unit) for unit in self.units]
        return [None if scores is None else scores.values.get(metric.name) for scores in found]

    def queries(self, key: Key, counted: Iterable[Unit]) -> int:
        """Number of queries of these users."""
        return sum(self.arms[key][unit].queries for unit in counted)

    def mean(self, key: Key, metric: Metric) -> Statistic:
        """The metric under an arm: a mean over users, or official, over the users that have it."""
        if metric.combine is None:
            return mean_of(self.values(key, metric))
        return self._official(key, metric, self.counted(key, metric))

    def gain(self, left: Key, right: Key, metric: Metric) -> tuple[Statistic, tuple[Unit, ...]]:
        """The gain of left over right, and the users that have both sides."""
        both = set(self.counted(right, metric))
        counted = tuple(unit for unit in self.counted(left, metric) if unit in both)
        if metric.combine is None:
            pairs = self.values(left, metric), self.values(right, metric)
            return mean_of(gains(*pairs, sign=metric.sign)), counted
        sides = [self._official(key, metric, counted) for key in (left, right)]
        return _difference(sides[0], sides[1], metric.sign), counted

    def _official(self, key: Key, metric: Metric, counted: Sequence[Unit]) -> Statistic:
        """A function of summed columns, averaged over the replicas of the scores."""
        if metric.combine is None or not counted:
            return mean_of([None] * len(self.units))
        users, chosen = self.arms[key], set(counted)
        blank = np.zeros_like(users[counted[0]].sums[metric.name])
        columns = [users[u].sums[metric.name] if u in chosen else blank for u in self.units]
        flat = np.stack(columns).reshape(len(self.units), -1)
        replicas = len(blank)
        return Statistic(flat, partial(_over_replicas, metric=metric, replicas=replicas))


def _over_replicas(sums: Floats, *, metric: Metric, replicas: int) -> Floats:
    assert metric.combine is not None  # noqa: S101 (only official metrics come here)
    each = sums.reshape(*sums.shape[:-1], replicas, -1)
    return np.asarray(metric.combine(each).mean(axis=-1))


def _difference(left: Statistic, right: Statistic, sign: int) -> Statistic:
    width = left.columns.shape[1]

    def combine(sums: Floats) -> Floats:
        gain = left.combine(sums[..., :width]) - right.combine(sums[..., width:])
        return np.asarray(sign * gain)

    return Statistic(np.concatenate([left.columns, right.columns], axis=1), combine)


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
    merge = _merge_same if same_users else _merge_generated
    arms = {key: merge(first.task, seeds) for key, seeds in _by_arm(own).items()}
    units = tuple(sorted({unit for users in arms.values() for unit in users}))
    metrics = metrics_of(first.kind)
    return Panel(first.task, first.k, first.profile, kinds, metrics, units, arms)


def _by_arm(own: list[ArmScores]) -> dict[Key, dict[int, tuple[UserScores, ...]]]:
    found: dict[Key, dict[int, tuple[UserScores, ...]]] = {}
    for one in sorted(own, key=lambda one: (one.arm, one.control or "", one.seed)):
        seeds = found.setdefault((one.arm, one.control), {})
        if one.seed in seeds:
            where = f"{one.task}, k={one.k}, profile={one.profile}, seed={one.seed}"
            raise DataError(f"arm {one.arm} is given twice for {where}: give it once")
        seeds[one.seed] = one.users
    return found


def _merge_same(task: str, seeds: Mapping[int, tuple[UserScores, ...]]) -> dict[Unit, UserScores]:
    averaged = average_scores([seeds[seed] for seed in sorted(seeds)])
    return {Unit(task, min(seeds), scores.user): scores for scores in averaged}


def _merge_generated(
    task: str, seeds: Mapping[int, tuple[UserScores, ...]]
) -> dict[Unit, UserScores]:
    return {Unit(task, seed, one.user): one for seed, users in seeds.items() for one in users}


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
        if all(key in task.arms and task.counted(key, metric) for task in tasks)
    ]
    arms = {key: {u: s for task in tasks for u, s in task.arms[key].items()} for key in keys}
    units = tuple(unit for task in tasks for unit in task.units)
    kinds = frozenset[Kind]().union(*(task.kinds for task in tasks))
    return Panel(ALL, tasks[0].k, tasks[0].profile, kinds, (metric,), units, arms)
