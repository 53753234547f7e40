"""Splits LaMP's users: who is scored on which queries, and who trains the shared adapter.

Target and base users are disjoint. A target user has one query in LaMP's files, which is little for
an evaluation by user, so the newest items of its history become further queries, each with its
answer as gold, and leave the history. So every query comes after the whole history. At most a fifth
of a history is held out, and nothing of one with fewer than `MIN_HISTORY` items, nor of a task whose
items are no queries (LaMP_1, LaMP_7): such a user is scored on its own query alone.

A base user keeps its whole history and its own queries. Nothing is drawn at random: users are taken
in the order of the file.
"""

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, replace

from fedoppu.client.importers.lamp import LampUser
from fedoppu.client.tasks import Task, get_task
from fedoppu.client.vault import QUERY, HistoryItem
from fedoppu.common.config import require
from fedoppu.common.errors import DataError

HELD_OUT_SHARE = 0.2
MIN_HISTORY = 8


@dataclass(frozen=True)
class Split:
    """Target users and base users of one task.

    Attributes:
        target: Scored; `history` is what they train on, `queries` what they are scored on, oldest
            first.
        base: They train the shared adapter; none of them is a target user.
        overlapping: Users of the base pool that were left out because they are target users (in a
            time-based split a user is in both files).
        unasked: Users that could be no target, because there is nothing to score them on.
        recalled: Queries of target users whose text is also in a base user's history: the shared
            adapter may recall their answers, and a report must say how many there are.
        recalled_from_queries: Further ones, whose text is in a base user's query only.
    """

    target: tuple[LampUser, ...]
    base: tuple[LampUser, ...]
    overlapping: int
    unasked: int
    recalled: int
    recalled_from_queries: int


def split(
    pool: Sequence[LampUser],
    base_pool: Sequence[LampUser] | None,
    *,
    users: int,
    base_users: int,
    queries: int,
) -> Split:
    """Splits the users of one task.

    Args:
        pool: Users to be targets, in the order of the file.
        base_pool: Users to be base users; None or empty to take those of `pool` that are no targets.
        users: At most so many target users; there may be fewer in `pool`.
        base_users: At most so many base users; there may be fewer.
        queries: So many queries of each target user, the newest of its own first, then held-out
            items; fewer where a history is too short for them.

    Raises:
        UsageError: A number is less than 1.
        DataError: The users are of different tasks, or two of one pool have the same id.
    """
    for name, value in (("users", users), ("base_users", base_users), ("queries", queries)):
        require(name, value, 1)
    everyone = [*pool, *(base_pool or ())]
    if not everyone:
        return Split((), (), 0, 0, 0, 0)
    task = _one_task(everyone)
    _refuse_twice(pool)
    _refuse_twice(base_pool or ())
    held = [hold_out(user, task, queries=queries) for user in pool]
    asked = [user for user in held if user.queries]
    target = tuple(asked[:users])
    names = {user.user_id for user in target}
    rest = [user for user in (base_pool or pool) if user.user_id not in names]
    base = tuple(rest[:base_users])
    return Split(
        target=target,
        base=base,
        overlapping=len(base_pool) - len(rest) if base_pool else 0,
        unasked=len(held) - len(asked),
        recalled=count_recalled(target, _history_texts(base, task), task),
        recalled_from_queries=count_recalled(
            target, _query_texts(base, task) - _history_texts(base, task), task
        ),
    )


def hold_out(user: LampUser, task: Task, *, queries: int) -> LampUser:
    """Turns the newest items of a history into queries until there are `queries`.

    At most round(.2 n) of n items, none of fewer than `MIN_HISTORY`. Where the user's own queries
    are more than `queries`, the newest of them are kept.
    """
    size = len(user.history)
    own = user.queries[-queries:]
    count = min(queries - len(own), round(HELD_OUT_SHARE * size)) if size >= MIN_HISTORY else 0
    if not task.items_are_queries:
        count = 0
    newest = user.history[size - count :]
    held = tuple(_as_query(item, task) for item in newest)
    return replace(user, history=user.history[: size - count], queries=held + own)


def count_recalled(users: Iterable[LampUser], known: Set[str], task: Task) -> int:
    """Number of the users' queries whose text is in `known`, white space apart."""
    return sum(_query_text(query, task) in known for user in users for query in user.queries)


def _history_texts(users: Iterable[LampUser], task: Task) -> set[str]:
    return {_squeezed(item.fields[task.text]) for user in users for item in user.history}


def _query_texts(users: Iterable[LampUser], task: Task) -> set[str]:
    return {_query_text(query, task) for user in users for query in user.queries}


def _query_text(query: HistoryItem, task: Task) -> str:
    return _squeezed(task.parse_input(query.fields["input"])[task.text])


def _as_query(item: HistoryItem, task: Task) -> HistoryItem:
    pair = task.as_query(item.fields)
    if pair is None:
        raise DataError(f"{task.name}: its history items are no queries")
    return replace(item, kind=QUERY, fields={"input": pair[0], "gold": pair[1]})


def _one_task(users: Sequence[LampUser]) -> Task:
    names = sorted({user.task for user in users})
    if len(names) > 1:
        raise DataError(f"users must be of one task, got {', '.join(names)}")
    return get_task(names[0])


def _refuse_twice(users: Sequence[LampUser]) -> None:
    seen: set[str] = set()
    for user in users:
        if user.user_id in seen:
            raise DataError(f"the user {user.user_id} is there twice; merge its records into one")
        seen.add(user.user_id)


def _squeezed(text: str) -> str:
    return " ".join(text.split())
