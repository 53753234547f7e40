"""Scores of many users under one arm as columns: what is held of a user is about 0.2 kB, not 2.

A `UserScores` is two dictionaries and an array for each official metric, which is right for a group
of users and far too much for ten thousand. Here each metric of an arm is one array over all its
users, in the smallest type that holds every value exactly: most official sums are counts of queries
and take a byte each. Nothing is rounded: `UserColumns` gives back the scores that went in.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedoppu.simulations.metrics import Floats
from fedoppu.simulations.scores import UserScores, average_scores

Bools = NDArray[np.bool_]
Numbers = NDArray[Any]  # uint8, uint16 or float64
TYPES = (np.uint8, np.uint16)  # of counts; everything else is float64
TOGETHER = 64  # users whose scores are held as objects at once


@dataclass(frozen=True)
class Column:
    """One number of each user.

    Attributes:
        values: (users,) float64; 0 where there is none.
        known: (users,) whether there is one.
    """

    values: Floats = field(repr=False)
    known: Bools = field(repr=False)

    @classmethod
    def of(cls, values: Sequence[float | None]) -> "Column":
        """A column of these values, None where there is none."""
        filled = np.array([0.0 if value is None else value for value in values], dtype=np.float64)
        return cls(filled, np.array([value is not None for value in values], dtype=np.bool_))


@dataclass(frozen=True)
class UserColumns:
    """Scores of users under one arm.

    Attributes:
        users: Ids, sorted; among them may be some that have no scores.
        present: (users,) whether a user has scores; all else of one who has none is 0.
        queries: (users,) number of queries.
        values: Score of each user by metric.
        sums: Of each official metric, (users, replicas, width), see `UserScores`.
    """

    users: tuple[str, ...] = field(repr=False)
    present: Bools = field(repr=False)
    queries: Numbers = field(repr=False)
    values: Mapping[str, Column] = field(repr=False)
    sums: Mapping[str, Numbers] = field(repr=False)

    def __len__(self) -> int:
        """Number of users that have scores."""
        return int(self.present.sum())

    def __iter__(self) -> Iterator[UserScores]:
        """The users that have scores, one at a time."""
        return (self._row(int(index)) for index in np.flatnonzero(self.present))

    def _row(self, index: int) -> UserScores:
        values = {
            name: float(column.values[index]) if column.known[index] else None
            for name, column in self.values.items()
        }
        sums = {name: table[index].astype(np.float64) for name, table in self.sums.items()}
        return UserScores(self.users[index], int(self.queries[index]), values, sums)

    def of(self, users: Sequence[str]) -> list[UserScores]:
        """Scores of some of the users that have them."""
        places = np.searchsorted(np.array(self.users, dtype=object), np.array(users, dtype=object))
        return [self._row(int(index)) for index in places]

    def column(self, metric: str) -> Column:
        """A metric of each user; nobody has one that is not there."""
        found = self.values.get(metric)
        return found if found is not None else _nothing(len(self.users))

    def only(self, metric: str) -> "UserColumns":
        """The same users with one metric alone, a mean over users."""
        return replace(self, values={metric: self.column(metric)}, sums={})

    def over(self, users: tuple[str, ...]) -> "UserColumns":
        """The same scores over other users, sorted, among whom are all of these."""
        if users == self.users:
            return replace(self, users=users)  # one tuple for all arms
        place = {user: index for index, user in enumerate(self.users)}
        rows = np.array([place.get(user, -1) for user in users], dtype=np.intp)
        return UserColumns(
            users,
            _taken(self.present, rows),
            _taken(self.queries, rows),
            {
                name: Column(_taken(column.values, rows), _taken(column.known, rows))
                for name, column in self.values.items()
            },
            {name: _taken(table, rows) for name, table in self.sums.items()},
        )


def _nothing(users: int) -> Column:
    return Column(np.zeros(users), np.zeros(users, dtype=np.bool_))


def _taken(table: Numbers, rows: NDArray[np.intp]) -> Numbers:
    """Rows of a table, zeros where there is none (-1)."""
    if not len(table):
        return np.zeros((len(rows), *table.shape[1:]), table.dtype)
    taken = table[rows]
    taken[rows < 0] = 0
    return taken


def no_scores(users: tuple[str, ...]) -> UserColumns:
    """Users without scores."""
    none = np.zeros(len(users), dtype=np.bool_)
    return UserColumns(users, none, np.zeros(len(users), dtype=np.uint8), {}, {})


# --- building ------------------------------------------------------------------------------------


class ColumnBuilder:
    """Takes the scores of a few users at a time."""

    def __init__(self) -> None:
        """Start with nobody."""
        self._users: list[str] = []
        self._queries = _Rows()
        self._values: dict[str, tuple[_Rows, _Rows]] = {}
        self._sums: dict[str, _Rows] = {}

    def extend(self, scores: Sequence[UserScores]) -> None:
        """Adds users, in any order; all have the same metrics."""
        if not scores:
            return
        self._users += [sys.intern(one.user) for one in scores]
        self._queries.extend(np.array([one.queries for one in scores], dtype=np.float64))
        for name in scores[0].values:
            column = Column.of([one.values[name] for one in scores])
            values, known = self._values.setdefault(name, (_Rows(), _Rows()))
            values.extend(column.values)
            known.extend(column.known.astype(np.float64))
        for name in scores[0].sums:
            stacked = np.stack([one.sums[name] for one in scores])
            self._sums.setdefault(name, _Rows()).extend(stacked)

    def finish(self) -> UserColumns:
        """All users, sorted."""
        order = np.array(sorted(range(len(self._users)), key=self._users.__getitem__), np.intp)
        values = {
            name: Column(
                numbers.sorted(order).astype(np.float64, copy=False),
                known.sorted(order).astype(np.bool_),
            )
            for name, (numbers, known) in self._values.items()
        }
        return UserColumns(
            tuple(self._users[index] for index in order),
            np.ones(len(order), dtype=np.bool_),
            self._queries.sorted(order),
            values,
            {name: rows.sorted(order) for name, rows in self._sums.items()},
        )


class _Rows:
    """Rows of one shape in one array that grows, of the smallest type that holds each value exactly."""

    def __init__(self) -> None:
        self._table: Numbers | None = None
        self._count = 0

    def extend(self, rows: Floats) -> None:
        """Adds rows, (n, ...) float64."""
        count, kind = self._count + len(rows), _smallest(rows)
        if self._table is None:
            self._table = np.zeros(rows.shape, kind)
        kind = np.promote_types(kind, self._table.dtype)
        if count > len(self._table) or kind != self._table.dtype:
            room = max(len(self._table), count + count // 2)
            grown: Numbers = np.zeros((room, *self._table.shape[1:]), kind)
            grown[: self._count] = self._table[: self._count]
            self._table = grown
        self._table[self._count : count] = rows
        self._count = count

    def sorted(self, order: NDArray[np.intp]) -> Numbers:
        """The rows in another order, without room for more."""
        return np.zeros(0, np.uint8) if self._table is None else self._table[order]


def _smallest(rows: Floats) -> np.dtype[Any]:
    """The least of the types that holds every value, a negative zero included, exactly."""
    if (rows == np.floor(rows)).all() and not np.signbit(rows).any():
        for kind in TYPES:
            if rows.max(initial=0) <= np.iinfo(kind).max:
                return np.dtype(kind)
    return np.dtype(np.float64)


def columns_of(scores: Iterable[UserScores]) -> UserColumns:
    """The columns of some users' scores."""
    builder = ColumnBuilder()
    builder.extend(list(scores))
    return builder.finish()


def joined(parts: Sequence[UserColumns]) -> UserColumns:
    """At least one part, one after the other; a metric that a part lacks is 0 and unknown there.

    Users of different parts are different people, even if their ids are the same.
    """
    if len(parts) == 1:
        return parts[0]
    names = dict.fromkeys(name for part in parts for name in part.values)
    columns = {name: [part.column(name) for part in parts] for name in names}
    return UserColumns(
        tuple(user for part in parts for user in part.users),
        np.concatenate([part.present for part in parts]),
        np.concatenate([part.queries for part in parts]),
        {
            name: Column(
                np.concatenate([column.values for column in own]),
                np.concatenate([column.known for column in own]),
            )
            for name, own in columns.items()
        },
        {name: _joined_sums(name, parts) for part in parts for name in part.sums},
    )


def _joined_sums(name: str, parts: Sequence[UserColumns]) -> Numbers:
    shape = next(part.sums[name].shape[1:] for part in parts if name in part.sums)
    blank = [np.zeros((len(part.users), *shape), np.uint8) for part in parts]
    return np.concatenate(
        [part.sums.get(name, zeros) for part, zeros in zip(parts, blank, strict=True)]
    )


def averaged(replicas: Sequence[UserColumns]) -> UserColumns:
    """Averages each user's scores over repetitions; users that one of them lacks are left out."""
    if len(replicas) == 1:
        return replicas[0]
    common = sorted(set(replicas[0].users).intersection(*(one.users for one in replicas[1:])))
    builder = ColumnBuilder()
    for start in range(0, len(common), TOGETHER):
        some = common[start : start + TOGETHER]
        builder.extend(average_scores([replica.of(some) for replica in replicas]))
    return builder.finish()
