"""The split of LaMP users into targets, whose newest items become queries, and base users."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedoppu.client.importers.lamp import LampUser, read_lamp
from fedoppu.client.tasks import TASKS
from fedoppu.client.vault import HistoryItem
from fedoppu.common.errors import DataError, UsageError
from fedoppu.simulations.lamp import Split, hold_out, split

LAMP = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "lamp_style"
TASK = TASKS["LaMP_3"]


def query(id: str, text: str, task: str = "LaMP_3") -> HistoryItem:
    input_fields = dict.fromkeys(TASKS[task].input_fields, text)
    fields = {"input": TASKS[task].render_input(input_fields), "gold": "3"}
    return HistoryItem(id, "", "lamp", "query", fields)


def user(name: str, size: int, *, own: int = 1, task: str = "LaMP_3") -> LampUser:
    """A user with texts of its own; item n has the score n % 5 + 1."""
    history = tuple(
        HistoryItem(
            f"{name}-{n}",
            f"20{n:02}",
            "lamp",
            task,
            dict.fromkeys(TASKS[task].item_fields, f"{name} {n}") | {"score": str(n % 5 + 1)},
        )
        for n in range(size)
    )
    queries = tuple(query(f"{name}-q{n}", f"{name} asks {n}", task) for n in range(own))
    return LampUser(name, task, history, queries)


def of(pool: list[LampUser], base: list[LampUser] | None, **numbers: int) -> Split:
    wanted = {"users": 100, "base_users": 100, "queries": 10} | numbers
    return split(pool, base, **wanted)


def test_the_newest_items_become_queries_and_leave_the_history() -> None:
    (target,) = of([user("u", 20)], [user("b", 3)], queries=4).target
    assert [item.id for item in target.history] == [f"u-{n}" for n in range(17)]
    assert [item.id for item in target.queries] == ["u-17", "u-18", "u-19", "u-q0"]
    held = target.queries[0]
    assert (held.kind, held.time, held.fields["gold"]) == ("query", "2017", "3")
    assert TASK.parse_input(held.fields["input"]) == {"text": "u 17"}


@pytest.mark.parametrize(
    ("size", "queries", "held"),
    [(0, 10, 0), (7, 10, 0), (8, 10, 2), (20, 10, 4), (100, 10, 9), (100, 21, 20), (100, 1, 0)],
)
def test_at_most_a_fifth_is_held_out_and_nothing_of_a_short_history(
    size: int, queries: int, held: int
) -> None:
    (target,) = of([user("u", size)], [user("b", 3)], queries=queries).target
    assert (len(target.history), len(target.queries)) == (size - held, held + 1)


@given(size=st.integers(0, 40), own=st.integers(0, 4), queries=st.integers(1, 30))
def test_history_and_held_out_items_are_what_there_was(size: int, own: int, queries: int) -> None:
    before = user("u", size, own=own)
    after = hold_out(before, TASK, queries=queries)
    held = [item.id for item in after.queries if "q" not in item.id]
    assert [item.id for item in after.history] + held == [item.id for item in before.history]
    assert len(after.queries) <= queries
    texts = {TASK.parse_input(item.fields["input"])["text"] for item in after.queries}
    assert texts.isdisjoint(item.fields["text"] for item in after.history)


def test_of_too_many_own_queries_the_newest_are_kept() -> None:
    held = hold_out(user("u", 20, own=4), TASK, queries=2)
    assert [item.id for item in held.queries] == ["u-q2", "u-q3"]
    assert len(held.history) == 20


@pytest.mark.parametrize("name", ["LaMP_1", "LaMP_7"])
def test_items_that_are_no_queries_are_never_held_out(name: str) -> None:
    (target,) = of([user("u", 30, task=name)], [user("b", 3, task=name)]).target
    assert (len(target.history), len(target.queries)) == (30, 1)


def test_users_are_taken_in_the_order_of_the_file() -> None:
    pool = [user(name, 9) for name in "cab"]
    base = [user(name, 9) for name in "zyx"]
    chosen = of(pool, base, users=2, base_users=2)
    assert [one.user_id for one in chosen.target] == ["c", "a"]
    assert chosen.base == tuple(base[:2])


def test_base_users_keep_history_and_own_queries() -> None:
    base = user("b", 30, own=2)
    assert of([user("u", 9)], [base]).base == (base,)


def test_a_target_user_is_no_base_user() -> None:
    chosen = of([user("u", 9), user("v", 9)], [user("u", 12), user("w", 9)], users=1)
    assert [one.user_id for one in chosen.target] == ["u"]
    assert [one.user_id for one in chosen.base] == ["w"]
    assert chosen.overlapping == 1


@pytest.mark.parametrize("base", [None, []])
def test_without_a_base_pool_the_other_users_are_base_users(base: list[LampUser] | None) -> None:
    pool = [user(name, 20) for name in "abcd"]
    chosen = of(pool, base, users=1)
    assert [one.user_id for one in chosen.target] == ["a"]
    assert chosen.base == tuple(pool[1:])  # whole: nothing is held out of them
    assert chosen.overlapping == 0


def test_fewer_users_than_wanted_is_no_error() -> None:
    chosen = of([user("u", 9)], [user("b", 9)])
    assert (len(chosen.target), len(chosen.base)) == (1, 1)
    assert of([], []) == Split((), (), 0, 0, 0, 0)


def test_a_user_without_anything_to_score_is_no_target_and_is_counted() -> None:
    chosen = of([user("u", 5, own=0), user("v", 9)], [user("b", 9)])
    assert [one.user_id for one in chosen.target] == ["v"]
    assert chosen.unasked == 1


def test_queries_that_base_users_have_seen_are_counted() -> None:
    target = user("u", 10)
    seen = HistoryItem("s", "", "lamp", "LaMP_3", {"text": " u  9\n", "score": "1"})
    base = LampUser("b", "LaMP_3", (seen,), (query("x", "u asks 0"), query("y", "u 9")))
    chosen = of([target], [base])
    assert [item.id for item in chosen.target[0].queries] == ["u-8", "u-9", "u-q0"]
    assert (chosen.recalled, chosen.recalled_from_queries) == (1, 1)


def test_users_of_different_tasks_are_refused() -> None:
    with pytest.raises(DataError, match="users must be of one task, got LaMP_3, LaMP_7"):
        of([user("u", 3)], [user("v", 3, task="LaMP_7")])


@pytest.mark.parametrize("twice_in_base", [True, False])
def test_a_user_twice_in_a_pool_is_refused(twice_in_base: bool) -> None:
    one, two = [user("u", 9)], [user("v", 9), user("v", 9)]
    with pytest.raises(DataError, match="the user v is there twice"):
        of(*((one, two) if twice_in_base else (two, one)))


@pytest.mark.parametrize("name", ["users", "base_users", "queries"])
def test_numbers_below_one_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} must be at least 1, got 0"):
        of([user("u", 9)], None, **{name: 0})


@pytest.mark.skipif(not LAMP.is_dir(), reason="needs ../shared/data/lamp_style")
@pytest.mark.parametrize(
    ("name", "held", "recalled"),
    [
        ("LaMP_1", 0, 0),
        ("LaMP_2M", 135, 58),
        ("LaMP_2N", 265, 0),
        ("LaMP_3", 245, 0),
        ("LaMP_5", 632, 54),
    ],
)
def test_the_real_data_gives_the_queries_of_the_specification(
    name: str, held: int, recalled: int
) -> None:
    data = read_lamp(LAMP, name)
    chosen = split(data.target, data.base, users=1000, base_users=1000, queries=21)
    own = sum(len(one.queries) for one in data.target)
    assert sum(len(one.queries) for one in chosen.target) == own + held
    assert chosen.recalled == recalled
    assert {one.user_id for one in chosen.target}.isdisjoint(one.user_id for one in chosen.base)
    for before, after in zip(data.target, chosen.target, strict=True):
        assert len(after.history) + len(after.queries) == len(before.history) + len(before.queries)
