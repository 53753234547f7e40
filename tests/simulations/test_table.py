"""The table: its rows, the sign of gains, seeds, pooled tasks, nulls, and bytes that do not change."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from fedoppu.common.errors import DataError
from fedoppu.common.randomness import Randomness
from fedoppu.simulations.columns import columns_of
from fedoppu.simulations.panels import ArmScores, Unit
from fedoppu.simulations.printing import heading, interval, is_clear, number, print_table
from fedoppu.simulations.scores import (
    Kind,
    QueryResult,
    UserScores,
    average_scores,
    labelled_result,
    metrics_of,
    score_users,
)
from fedoppu.simulations.statistics import BootstrapSettings
from fedoppu.simulations.table import (
    Row,
    Table,
    build_table,
    difference_name,
    read_table,
    table_json,
    write_table,
)

SETTINGS = BootstrapSettings(Randomness.from_seed(0), resamples=400)
COLUMNS = {
    *("task", "arm", "k", "profile", "control", "metric"),
    *("value", "low", "high", "users", "queries"),
}


@dataclass(frozen=True)
class FakeTask:
    name: str
    kind: Kind
    labels: Sequence[str]


NEWS = FakeTask("LaMP_2N", "classification", ("a", "b", "c"))
MOVIES = FakeTask("LaMP_2M", "classification", ("x", "y"))
STARS = FakeTask("LaMP_3", "rating", ("1", "2", "3", "4", "5"))
TITLES = FakeTask("LaMP_4", "generation", ())


def answers(
    task: FakeTask, strength: float, *, seed: int = 0, users: int = 6, queries: int = 5
) -> tuple[UserScores, ...]:
    """Scores of users whose gold label is raised by `strength` over noise; the golds are fixed."""
    rng = np.random.default_rng([seed, int(strength * 10)])
    results = []
    for user in range(users):
        for query in range(queries):
            results.append(_answer(task, strength, f"u{user}", f"q{query}", rng))
    return score_users(results, task)


def _answer(
    task: FakeTask, strength: float, user: str, query: str, rng: np.random.Generator
) -> QueryResult:
    if task.kind == "generation":
        gold, found = "one two three", "one two" if rng.random() < strength / 5 else "four"
        return QueryResult(user, query, gold, found, None, strength - 9, 3)
    index = (int(user[1:]) + int(query[1:])) % len(task.labels)
    scores = rng.normal(size=len(task.labels))
    scores[index] += strength
    return labelled_result(
        user, query, gold=task.labels[index], scores=scores, labels=task.labels, gold_tokens=2
    )


def arm(
    task: FakeTask, name: str, users: tuple[UserScores, ...], *, seed: int = 0, **place: str
) -> ArmScores:
    return ArmScores(
        task.name, task.kind, 0, "none", seed, name, columns_of(users), place.get("control")
    )


def ordinary(task: FakeTask, seed: int = 0) -> list[ArmScores]:
    wrong = average_scores([answers(task, 0.2, seed=seed + 10 + i) for i in range(3)])
    return [
        arm(task, "base", answers(task, 0.0, seed=seed), seed=seed),
        arm(task, "shared", answers(task, 1.0, seed=seed), seed=seed),
        arm(task, "personal", answers(task, 3.0, seed=seed), seed=seed),
        arm(task, "personal", wrong, seed=seed, control="wrong_user"),
    ]


def only(table: Table, arm_name: str, metric: str, *, task: str = "LaMP_2N", **place: str) -> Row:
    rows = [
        row
        for row in table.rows
        if (row.task, row.arm, row.metric) == (task, arm_name, metric)
        and row.control == place.get("control")
    ]
    assert len(rows) == 1
    return rows[0]


def test_rows_have_exactly_the_agreed_columns(tmp_path: Path) -> None:
    write_table(tmp_path / "table.json", build_table(ordinary(NEWS), SETTINGS))
    loaded = json.loads((tmp_path / "table.json").read_text())
    assert set(loaded) == {"rows"}
    assert all(set(row) == COLUMNS for row in loaded["rows"])
    assert {row["control"] for row in loaded["rows"]} == {None, "wrong_user"}


def test_every_arm_has_a_row_for_every_metric_of_its_task() -> None:
    table = build_table([arm(STARS, "base", answers(STARS, 1.0))], SETTINGS)
    assert [row.metric for row in table.rows] == [metric.name for metric in metrics_of("rating")]


def test_a_value_is_the_mean_over_users_and_its_interval_holds_it() -> None:
    users = answers(NEWS, 1.0)
    row = only(build_table([arm(NEWS, "shared", users)], SETTINGS), "shared", "accuracy")
    assert row.value == pytest.approx(np.mean([one.values["accuracy"] for one in users]))
    assert row.low is not None
    assert row.high is not None
    assert row.low < (row.value or 0) < row.high
    assert (row.users, row.queries) == (6, 30)


@pytest.mark.parametrize("task", [NEWS, STARS, TITLES])
def test_a_gain_is_positive_for_the_better_arm_in_every_metric(task: FakeTask) -> None:
    table = build_table(
        [arm(task, "shared", answers(task, 0.5)), arm(task, "personal", answers(task, 4.9))],
        SETTINGS,
    )
    gains = [row for row in table.rows if row.arm == "personal-shared"]
    moving = [row for row in gains if row.metric != "parse_failures"]
    assert {row.metric for row in gains} == {metric.name for metric in metrics_of(task.kind)}
    assert all(row.value is not None and row.value > 0 for row in moving)


def test_differences_name_both_sides_and_the_control_is_that_of_the_left_arm() -> None:
    table = build_table(ordinary(NEWS), SETTINGS)
    found = {row.arm for row in table.rows if "-" in row.arm}
    assert found == {"personal-shared", "personal-wrong_user", "personal-base", "shared-base"}
    own = only(table, "personal", "accuracy").value
    wrong = only(table, "personal", "accuracy", control="wrong_user").value
    assert own is not None
    assert wrong is not None
    assert only(table, "personal-wrong_user", "accuracy").value == pytest.approx(own - wrong)
    assert difference_name(("local", None), ("local", "wrong_user")) == "local-wrong_user"


def test_a_metric_that_one_side_lacks_has_no_difference() -> None:
    table = build_table([*ordinary(NEWS), arm(NEWS, "majority", _unscored())], SETTINGS)
    assert only(table, "majority", "loss").value is None
    assert only(table, "majority", "loss").users == 0
    gains = {row.metric for row in table.rows if row.arm == "personal-majority"}
    assert "accuracy" in gains
    assert gains.isdisjoint({"loss", "within_user_auc"})


def _unscored() -> tuple[UserScores, ...]:
    results = [
        QueryResult(f"u{u}", f"q{q}", NEWS.labels[(u + q) % 3], "a", None, None, 2)
        for u in range(6)
        for q in range(5)
    ]
    return score_users(results, NEWS)


def test_a_control_that_does_not_apply_is_null_in_every_row() -> None:
    scores = [*ordinary(NEWS)[:3], arm(NEWS, "personal", (), control="wrong_user")]
    table = build_table(scores, SETTINGS)
    null = [row for row in table.rows if row.control == "wrong_user"]
    null += [row for row in table.rows if row.arm == "personal-wrong_user"]
    assert len(null) == 2 * len(metrics_of("classification"))
    assert {(row.value, row.low, row.high, row.users) for row in null} == {(None, None, None, 0)}


def test_generated_users_of_different_seeds_are_different_people() -> None:
    scores = [arm(NEWS, "shared", answers(NEWS, 1.0, seed=seed), seed=seed) for seed in range(3)]
    row = only(build_table(scores, SETTINGS), "shared", "accuracy")
    assert (row.users, row.queries) == (18, 90)


def test_on_data_a_user_is_averaged_over_seeds_first() -> None:
    by_seed = [answers(NEWS, 1.0, seed=seed) for seed in range(3)]
    scores = [arm(NEWS, "shared", users, seed=seed) for seed, users in enumerate(by_seed)]
    row = only(build_table(scores, SETTINGS, same_users=True), "shared", "accuracy")
    assert (row.users, row.queries) == (6, 30)
    every = [[one.values["accuracy"] for one in users] for users in by_seed]
    assert row.value == pytest.approx(np.mean(np.asarray(every, dtype=float)))


def test_macro_f1_of_repetitions_is_averaged_after_it_is_computed() -> None:
    by_seed = [answers(NEWS, 1.0, seed=seed) for seed in range(3)]
    each = [
        only(build_table([arm(NEWS, "shared", users)], SETTINGS), "shared", "macro_f1").value
        for users in by_seed
    ]
    scores = [arm(NEWS, "shared", users, seed=seed) for seed, users in enumerate(by_seed)]
    merged = only(build_table(scores, SETTINGS, same_users=True), "shared", "macro_f1")
    assert merged.value == pytest.approx(np.mean(np.asarray(each, dtype=float)))


def test_seeds_are_strata_so_that_their_level_is_no_noise() -> None:
    level = [score_users(_constant(seed), NEWS) for seed in range(2)]
    scores = [arm(NEWS, "shared", users, seed=seed) for seed, users in enumerate(level)]
    row = only(build_table(scores, SETTINGS), "shared", "accuracy")
    assert (row.value, row.low, row.high) == (0.5, 0.5, 0.5)


def _constant(right: int) -> list[QueryResult]:
    found = "a" if right else "b"
    return [QueryResult(f"u{u}", "q", "a", found, None, None, 1) for u in range(4)]


def test_tasks_are_pooled_only_where_a_metric_means_the_same() -> None:
    scores = [one for task in (NEWS, MOVIES, STARS) for one in ordinary(task)]
    table = build_table(scores, SETTINGS)
    pooled = {row.metric: row for row in table.rows if row.task == "all" and row.arm == "shared"}
    assert set(pooled) == {"accuracy", "content_gain", "within_user_auc", "loss"}
    assert (pooled["accuracy"].users, pooled["loss"].users) == (12, 18)
    values = [only(table, "shared", "accuracy", task=t.name).value for t in (NEWS, MOVIES)]
    assert pooled["accuracy"].value == pytest.approx(np.mean(np.asarray(values, dtype=float)))
    assert only(table, "personal-shared", "accuracy", task="all").users == 12


def test_one_task_is_not_pooled() -> None:
    table = build_table([*ordinary(NEWS), *ordinary(STARS)], SETTINGS)
    assert {row.metric for row in table.rows if row.task == "all"} == {"loss"}
    table = build_table(ordinary(NEWS), SETTINGS)
    assert "all" not in {row.task for row in table.rows}


def test_an_arm_that_one_task_lacks_is_not_pooled() -> None:
    scores = [*ordinary(NEWS), *ordinary(MOVIES)[:2]]
    pooled = {row.arm for row in build_table(scores, SETTINGS).rows if row.task == "all"}
    assert pooled == {"base", "shared", "shared-base"}


def test_the_order_of_the_scores_changes_no_byte(tmp_path: Path) -> None:
    scores = [one for task in (NEWS, TITLES) for seed in (0, 1) for one in ordinary(task, seed)]
    first = build_table(scores, SETTINGS)
    assert table_json(first) == table_json(build_table(scores[::-1], SETTINGS))
    write_table(tmp_path / "a", first)
    assert (tmp_path / "a").read_bytes() == table_json(first)
    assert read_table(tmp_path / "a").rows == first.rows


def test_rows_are_ordered_for_reading() -> None:
    rows = build_table([*ordinary(STARS), *ordinary(NEWS)], SETTINGS).rows
    assert list(dict.fromkeys(row.task for row in rows)) == ["LaMP_2N", "LaMP_3", "all"]
    arms = list(dict.fromkeys(row.arm for row in rows if row.task == "LaMP_2N"))
    assert arms[:4] == ["base", "shared", "personal", "personal-shared"]


def test_an_official_error_that_nan_poisons_is_null() -> None:
    results = [QueryResult("u", "0", "4", "nan", None, None, 1)]
    results.append(QueryResult("v", "0", "4", "4", None, None, 1))
    table = build_table([arm(STARS, "base", score_users(results, STARS))], SETTINGS)
    assert only(table, "base", "mae_official", task="LaMP_3").value is None
    assert only(table, "base", "mae", task="LaMP_3").value == 1.5
    assert only(table, "base", "parse_failures", task="LaMP_3").value == 0.5


def test_comparisons_tell_who_is_helped_and_adjust_over_tasks() -> None:
    table = build_table([*ordinary(NEWS), *ordinary(MOVIES)], SETTINGS)
    found = [c for c in table.comparisons if (c.arm, c.metric) == ("personal-shared", "loss")]
    assert [one.task for one in found] == ["LaMP_2M", "LaMP_2N"]
    assert found[1].users.helped == 1.0
    assert Unit("LaMP_2N", 0, "u0") in found[1].gains()
    assert found[1].users.p_value == pytest.approx(2 / 2**6)
    assert found[1].adjusted is not None
    assert found[1].adjusted > 2 / 2**6


def test_an_arm_that_is_given_twice_is_refused() -> None:
    with pytest.raises(DataError, match="arm base is given twice for LaMP_2N, k=0, profile=none"):
        build_table(ordinary(NEWS) + ordinary(NEWS)[:1], SETTINGS)


def test_a_task_of_two_kinds_is_refused() -> None:
    other = ArmScores("LaMP_2N", "rating", 0, "none", 0, "shared", columns_of(()))
    with pytest.raises(DataError, match="LaMP_2N is given as classification and rating"):
        build_table([ordinary(NEWS)[0], other], SETTINGS)


@pytest.mark.parametrize(
    ("value", "text", "signed"),
    [
        (0.7314, ".731", "+.731"),
        (-0.0122, "-.012", "-.012"),
        (-0.0001, ".000", "+.000"),
        (1.2546, "1.25", "+1.25"),
        (-12.34, "-12.3", "-12.3"),
        (1.0, "1.00", "+1.00"),
        (None, "-", "-"),
    ],
)
def test_numbers_have_three_digits(value: float | None, text: str, signed: str) -> None:
    assert number(value) == text
    assert number(value, signed=True) == signed


def test_an_interval_that_leaves_zero_out_is_clear_only_for_a_gain() -> None:
    gain = Row("t", "personal-shared", 0, "none", None, "loss", 0.2, 0.1, 0.3, 9, 9)
    level = Row("t", "personal", 0, "none", None, "loss", 0.2, 0.1, 0.3, 9, 9)
    assert interval(gain) == "+.200 [.100, .300]"
    assert (is_clear(gain), is_clear(level), is_clear(None)) == (True, False, False)


def test_the_printed_table_fits_100_columns() -> None:
    scores = [one for task in (NEWS, STARS, TITLES) for one in ordinary(task)]
    console = Console(file=StringIO(), width=100)
    print_table(build_table(scores, SETTINGS), console)
    assert isinstance(console.file, StringIO)
    text = console.file.getvalue()
    assert "LaMP_2N, k=0: 6 users, 30 queries" in text
    assert "gain of personal over" in text
    assert "…" not in text


def test_a_cell_is_named_by_what_sets_it_apart() -> None:
    row = Row("all", "base", 2, "llm", None, "loss", 0.1, None, None, 1, 10)
    assert heading(("all", 2, "llm"), [row]) == "all tasks, k=2, llm profile: 1 user, 10 queries"
