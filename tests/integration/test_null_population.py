"""The null population has nothing personal, and the check that says so has teeth.

The claim of the README is checked on a population with preferences. Here the same pipeline runs on exchangeable users,
where a personal adapter must do no better than another user's; leaking the queries into the histories must be seen.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from fedoppu.client.importers.lamp import LampUser
from fedoppu.client.tasks import TASKS
from fedoppu.client.vault import HistoryItem
from fedoppu.common.config import load_run_config
from fedoppu.simulations.console import Console
from fedoppu.simulations.population import generate
from fedoppu.simulations.run import simulate
from fedoppu.simulations.table import read_table
from fedoppu.simulations.users import FACTS, ORACLE
from fedoppu.simulations.virtual_users import write_users

TASK, SEED, USERS, BASE_USERS, QUERIES = "LaMP_2N", 1, 40, 12, 20
BOUND = 0.03
SETTINGS = (
    f"task={TASK}",
    "population=null",
    f"seed={SEED}",
    f"users={USERS}",
    f"base_users={BASE_USERS}",
    f"queries={QUERIES}",
    "rounds=2",
    "cohort=12",
    "arms=personal",
    "confidence=0.99",
    "group_users=12",
)


def with_queries(user: LampUser) -> LampUser:
    """The user, its queries and their golds leaked into the history."""
    task = TASKS[TASK]
    leaked = [
        HistoryItem(
            id=f"leaked-{query.id}",
            time=query.time,
            source=query.source,
            kind=TASK,
            fields={
                **task.parse_input(query.fields["input"]),
                "title": "",
                "category": query.fields["gold"],
            },
        )
        for query in user.queries
    ]
    return replace(user, history=(*user.history, *leaked))


def write(folder: Path, target: Sequence[LampUser], base: Iterable[LampUser]) -> None:
    facts: dict[str, object] = {
        "recalled": None,
        "recalled_from_queries": 0,
        "notes": [],
    }
    write_users(folder, target, base)
    golds = [
        {"user": user.user_id, "answers": {q.id: q.fields["gold"] for q in user.queries}}
        for user in target
    ]
    (folder / ORACLE).write_text("".join(json.dumps(line) + "\n" for line in golds))
    (folder / FACTS).write_text(json.dumps(facts))


def gain(out: Path) -> tuple[float, float]:
    """personal - wrong_user in accuracy: the estimate and the low end of its 99 % interval."""
    simulate(load_run_config([*SETTINGS, f"out={out}"]), Console(progress=False, table=False))
    rows = read_table(out / "table.json").rows
    found = next(
        row for row in rows if (row.arm, row.metric) == ("personal-wrong_user", "accuracy")
    )
    assert found.value is not None
    assert found.low is not None
    return found.value, found.low


@pytest.mark.slow
def test_nothing_is_personal_in_the_null_population_unless_queries_leak(tmp_path: Path) -> None:
    people = generate(
        TASK,
        population="null",
        seed=SEED,
        target_users=USERS,
        base_users=BASE_USERS,
        queries=QUERIES,
    )
    leaked = [with_queries(user) for user in people.target]
    write(tmp_path / "leaked" / f"seed-{SEED}" / TASK / "users", leaked, people.base)
    value, low = gain(tmp_path / "clean")
    assert low <= 0
    assert abs(value) <= BOUND
    value, low = gain(tmp_path / "leaked")
    assert low > 0 or value > BOUND
