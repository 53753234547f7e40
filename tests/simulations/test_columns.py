"""Scores as columns: what goes in comes out, in the smallest types, over any users."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedoppu.simulations.columns import (
    Column,
    ColumnBuilder,
    UserColumns,
    averaged,
    columns_of,
    joined,
    no_scores,
)
from fedoppu.simulations.scores import UserScores, average_scores

NUMBERS = st.floats(allow_nan=False) | st.integers(-3, 70_000).map(float) | st.just(-0.0)
ROWS = st.tuples(st.none() | NUMBERS, st.lists(NUMBERS, min_size=4, max_size=4))


def scored(user: str, value: float | None, sums: list[float]) -> UserScores:
    return UserScores(
        user, 3, {"loss": value}, {"rmse": np.array(sums, dtype=np.float64).reshape(2, 2)}
    )


def plain(one: UserScores) -> tuple[object, ...]:
    """Everything, with the sign of zero."""
    return one.user, one.queries, str(one.values), {k: str(v.tolist()) for k, v in one.sums.items()}


@given(st.lists(ROWS, max_size=9), st.integers(1, 4))
def test_what_goes_in_comes_out_to_the_bit_sorted_by_user(
    rows: list[tuple[float | None, list[float]]], together: int
) -> None:
    scores = [scored(f"u{-index % 7}{index}", *row) for index, row in enumerate(rows)]
    builder = ColumnBuilder()
    for start in range(0, len(scores), together):
        builder.extend(scores[start : start + together])
    found = builder.finish()
    assert list(map(plain, found)) == sorted(map(plain, scores))
    assert len(found) == len(scores)


@pytest.mark.parametrize(
    ("numbers", "kind"),
    [
        ([0, 255], np.uint8),
        ([0, 256], np.uint16),
        ([0, 65_536], np.float64),
        ([0, 0.5], np.float64),
        ([0, -0.0], np.float64),
        ([0, -1], np.float64),
        ([0, float("nan")], np.float64),
        ([0, float("inf")], np.float64),
    ],
)
def test_sums_take_the_least_type_that_is_exact(numbers: list[float], kind: type) -> None:
    builder = ColumnBuilder()
    for index, number in enumerate(numbers):
        builder.extend([scored(f"u{index}", None, [number] * 4)])
    assert builder.finish().sums["rmse"].dtype == kind


def two() -> UserColumns:
    return columns_of([scored("b", 1.5, [1, 2, 3, 4]), scored("d", None, [5, 6, 7, 8])])


def test_over_more_users_the_new_ones_have_nothing() -> None:
    found = two().over(("a", "b", "c", "d"))
    assert found.present.tolist() == [False, True, False, True]
    assert found.queries.tolist() == [0, 3, 0, 3]
    assert found.column("loss").known.tolist() == [False, True, False, False]
    assert found.sums["rmse"][0].tolist() == [[0, 0], [0, 0]]
    assert list(map(plain, found)) == list(map(plain, two()))


def test_nobody_over_users_has_nothing() -> None:
    assert len(columns_of([]).over(("a",))) == 0


def test_parts_that_are_joined_may_lack_a_metric_or_everyone() -> None:
    other = columns_of([UserScores("b", 1, {"mae": 2.0}, {"macro_f1": np.ones((1, 3))})])
    found = joined([two(), no_scores(("x",)), other])
    assert found.users == ("b", "d", "x", "b")
    assert found.column("mae").values.tolist() == [0, 0, 0, 2]
    assert found.column("loss").known.tolist() == [True, False, False, False]
    assert found.sums["macro_f1"].sum() == 3
    assert found.sums["rmse"].shape == (4, 2, 2)


def test_averages_are_those_of_the_scores() -> None:
    first = [scored(f"u{index:03d}", index / 7, [index] * 4) for index in range(150)]
    second = [scored(f"u{index:03d}", None, [2] * 4) for index in range(20, 170)]
    found = averaged([columns_of(first), columns_of(second)])
    expected = average_scores([first, second])
    assert list(map(plain, found)) == list(map(plain, expected))
    assert len(found) == 130


def test_a_metric_that_is_not_there_nobody_has() -> None:
    assert not two().column("accuracy").known.any()
    alone = two().only("loss")
    assert (list(alone.values), list(alone.sums)) == (["loss"], [])


def test_a_column_of_none_and_numbers() -> None:
    column = Column.of([None, 2.0])
    assert (column.values.tolist(), column.known.tolist()) == ([0.0, 2.0], [False, True])
