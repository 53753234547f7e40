"""Gets the users of a run into a folder: generated ones, or those of LaMP files.

The folder holds all that the workers read later; the run itself keeps only names. It is a pure function of the settings
that it depends on, so every process of a run, and every engine, finds the same users.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedoppu.client.importers.lamp import LampUser, read_lamp
from fedoppu.common.commit import commit_file
from fedoppu.common.config import RunConfig
from fedoppu.common.errors import DataError
from fedoppu.simulations.lamp import split
from fedoppu.simulations.population import stream_users
from fedoppu.simulations.virtual_users import VirtualUsers, write_users

FACTS = "facts.json"
ORACLE = "oracle.jsonl"
HUGE = 500_000_000  # bytes: of larger files only the first records are read
RECORDS_A_USER = 4  # read of such a file for each user that is wanted


@dataclass(frozen=True)
class PreparedUsers:
    """The users of one task and seed.

    Attributes:
        folder: Where they are.
        target: Ids of the users who get personal adapters and are scored.
        base: Ids of the users who train the shared adapter; a member is an index into it.
        oracle: Knows the preferences of target users; None on data.
        recalled: On data, number of queries whose text is also in a base user's history.
        recalled_from_queries: Further ones, whose text is in a base user's query only.
        notes: On data, what was left out, for people: records that are known to be bad, and the
            rest of huge files.
    """

    folder: Path
    target: tuple[str, ...]
    base: tuple[str, ...]
    oracle: "Oracle | None"
    recalled: int | None = None
    recalled_from_queries: int = 0
    notes: tuple[str, ...] = ()


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
    oracle = None if run.data else Oracle.read(folder / ORACLE)
    return PreparedUsers(
        folder,
        users.target,
        users.base,
        oracle,
        facts["recalled"],
        facts["recalled_from_queries"],
        tuple(facts["notes"]),
    )


@dataclass(frozen=True)
class Oracle:
    """Answers of one who knows the preferences: a line a user in a file, read when it is asked for.

    Attributes:
        file: Of JSON lines.
        starts: User: first byte of the line.
    """

    file: Path
    starts: Mapping[str, int] = field(repr=False)

    @classmethod
    def read(cls, file: Path) -> "Oracle":
        """Looks where each user's line begins."""
        starts: dict[str, int] = {}
        place = 0
        with file.open("rb") as lines:
            for line in lines:
                starts[sys.intern(json.loads(line)["user"])] = place
                place += len(line)
        return cls(file, starts)

    def answers(self, user: str) -> Mapping[str, str]:
        """A user's true answer to each query."""
        with self.file.open("rb") as lines:
            lines.seek(self.starts[user])
            answers: dict[str, str] = json.loads(lines.readline())["answers"]
            return answers


def history_lengths(users: PreparedUsers) -> dict[str, int]:
    """Number of items in each target user's own history."""
    vaults = VirtualUsers(users.folder)
    return {user: vaults.length(user) for user in users.target}


def _write_generated(run: RunConfig, task: str, seed: int, folder: Path) -> None:
    """One user at a time; nothing is held of the others."""

    def drawn(role: str, count: int) -> Iterator[tuple[LampUser, dict[str, str]]]:
        return stream_users(
            task, role, count=count, population=run.population, seed=seed, queries=run.queries
        )

    def targets() -> Iterator[LampUser]:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ORACLE).open("w", encoding="utf-8") as stream:
            for user, truths in drawn("target", run.users):
                stream.write(json.dumps({"user": user.user_id, "answers": truths}) + "\n")
                yield user

    write_users(folder, targets(), (user for user, _ in drawn("base", run.base_users)))
    _write_facts(folder)


def _write_imported(run: RunConfig, task: str, folder: Path) -> None:
    limit = _record_limit(run, task)
    data = read_lamp(Path(run.data or ""), task, limit=limit)
    chosen = split(
        data.target, data.base, users=run.users, base_users=run.base_users, queries=run.queries
    )
    _require_users(chosen.target, 1, "target", run)
    _require_users(chosen.base, 2, "base", run)
    write_users(folder, chosen.target, chosen.base)
    left_out = [f"left out, known to be bad: {record}" for record in data.left_out]
    cut = [f"a file is huge: only its first {limit} records were read"] if limit else []
    _write_facts(
        folder,
        recalled=chosen.recalled,
        recalled_from_queries=chosen.recalled_from_queries,
        notes=[*left_out, *cut],
    )


def _record_limit(run: RunConfig, task: str) -> int | None:
    """Records of each file that are read: all, unless a file is huge; users are taken in its order."""
    data = Path(run.data or "")
    home = data / task if (data / task).is_dir() else data
    files = [home] if home.is_file() else home.rglob("*.json")
    largest = max((file.stat().st_size for file in files), default=0)
    return RECORDS_A_USER * (run.users + run.base_users) if largest > HUGE else None


def _require_users(users: tuple[LampUser, ...], least: int, role: str, run: RunConfig) -> None:
    if len(users) < least:
        raise DataError(
            f"{run.data} has {len(users)} {role} users with enough items, at least {least} are needed",
            hint="give a folder with dev/ and train/, or fewer queries",
        )


def _write_facts(
    folder: Path,
    *,
    recalled: int | None = None,
    recalled_from_queries: int = 0,
    notes: Sequence[str] = (),
) -> None:
    """Written last: it vouches for the users beside it."""
    facts = {
        "recalled": recalled,
        "recalled_from_queries": recalled_from_queries,
        "notes": notes,
    }
    commit_file(folder / FACTS, json.dumps(facts).encode())
