"""Gets the users of a run into a folder: generated ones, or those of LaMP files.

The folder holds all that the workers read later; the run itself keeps only names. It is a pure function of the settings
that it depends on, so every process of a run, and every engine, finds the same users.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedoppu.client.importers.lamp import LampUser, read_lamp
from fedoppu.common.config import RunConfig
from fedoppu.common.errors import DataError
from fedoppu.simulations.lamp import split
from fedoppu.simulations.population import generate
from fedoppu.simulations.virtual_users import VirtualUsers, write_users

FACTS = "facts.json"


@dataclass(frozen=True)
class PreparedUsers:
    """The users of one task and seed.

    Attributes:
        folder: Where they are.
        target: Ids of the users who get personal adapters and are scored.
        base: Ids of the users who train the shared adapter; a member is an index into it.
        oracle: (user, query): answer of an oracle that knows the preferences; empty on data.
        recalled: On data, number of queries whose text is also in a base user's history.
    """

    folder: Path
    target: tuple[str, ...]
    base: tuple[str, ...]
    oracle: Mapping[tuple[str, str], str]
    recalled: int | None


def prepare_users(run: RunConfig, *, task: str, seed: int, folder: Path) -> PreparedUsers:
    """Writes the users of one task and seed into `folder`, unless they are there.

    Raises:
        UsageError: The data folder is missing.
        DataError: A record is malformed, or there are too few users.
    """
    if not (folder / FACTS).exists():
        if run.data is None:
            _write_generated(run, task, seed, folder)
        else:
            _write_imported(run, task, folder)
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    users = VirtualUsers(folder)
    oracle = {(user, query): answer for user, query, answer in facts["oracle"]}
    return PreparedUsers(folder, users.target, users.base, oracle, facts["recalled"])


def history_lengths(users: PreparedUsers, task: str) -> dict[str, int]:
    """Number of items in each target user's own history."""
    vaults = VirtualUsers(users.folder)
    return {
        user: sum(item.kind == task for item in vaults.vault(user).history())
        for user in users.target
    }


def _write_generated(run: RunConfig, task: str, seed: int, folder: Path) -> None:
    population = generate(
        task,
        population=run.population,
        seed=seed,
        target_users=run.users,
        base_users=run.base_users,
        queries=run.queries,
    )
    oracle = [[user, query, answer] for (user, query), answer in sorted(population.oracle.items())]
    write_users(folder, population.target, population.base)
    _write_facts(folder, {"oracle": oracle, "recalled": None})


def _write_imported(run: RunConfig, task: str, folder: Path) -> None:
    data = read_lamp(Path(run.data or ""), task)
    chosen = split(
        data.target, data.base, users=run.users, base_users=run.base_users, queries=run.queries
    )
    _require_users(chosen.target, 1, "target", run)
    _require_users(chosen.base, 2, "base", run)
    write_users(folder, chosen.target, chosen.base)
    _write_facts(folder, {"oracle": [], "recalled": chosen.recalled})


def _require_users(users: tuple[LampUser, ...], least: int, role: str, run: RunConfig) -> None:
    if len(users) < least:
        raise DataError(
            f"{run.data} has {len(users)} {role} users with enough items, at least {least} are needed",
            hint="give a folder with dev/ and train/, or fewer queries",
        )


def _write_facts(folder: Path, facts: Mapping[str, object]) -> None:
    (folder / FACTS).write_text(json.dumps(facts), encoding="utf-8")
