"""The personal phase and the evaluation of one federation: groups of users to trained adapters, answers and scores."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedoppu.client.tasks import Task
from fedoppu.common.commit import commit_parts
from fedoppu.common.config import RunConfig
from fedoppu.common.errors import UsageError
from fedoppu.common.randomness import Randomness
from fedoppu.simulations.baselines import Pool, majority, prior_shift, wrong_users
from fedoppu.simulations.columns import ColumnBuilder, UserColumns
from fedoppu.simulations.console import Console
from fedoppu.simulations.executors import GroupExecutor
from fedoppu.simulations.ledger import Ledger
from fedoppu.simulations.personal import (
    SCORED_ARMS,
    TRAINED_ARMS,
    WRONG_USER,
    GroupAnswers,
    ScoreGroup,
    TrainedRow,
    TrainGroup,
    score_group,
    train_group,
)
from fedoppu.simulations.scores import QueryResult, UserScores, average_scores, score_users
from fedoppu.simulations.users import Oracle, PreparedUsers, history_lengths

ALL_ARMS = (*SCORED_ARMS, "majority", "prior_shift", "oracle")


@dataclass(frozen=True)
class Arm:
    """The scores of one arm, or of one control of it."""

    arm: str
    control: str | None
    users: UserColumns = field(repr=False)


@dataclass(frozen=True)
class GroupArm:
    """The same of one group of users."""

    arm: str
    control: str | None
    users: tuple[UserScores, ...] = field(repr=False)


@dataclass(frozen=True)
class Evaluation:
    """What the personal phase of one federation needs to know.

    Attributes:
        run: The settings.
        task: The task.
        users: Its users.
        newest: Items that a personal adapter is trained on at most; 0 for all.
        randomness: Root of the random choices.
        shared: Folder of the shared adapter.
        folder: Where adapters and records go.
    """

    run: RunConfig
    task: Task
    users: PreparedUsers
    newest: int
    randomness: Randomness
    shared: Path
    folder: Path

    @property
    def adapters(self) -> Path:
        """Folder of the personal adapters, "{arm}/{user}"."""
        return self.folder / "adapters"


def chosen_arms(run: RunConfig) -> tuple[str, ...]:
    """The arms of a run, in the order of the table.

    Raises:
        UsageError: An arm has no such name.
    """
    unknown = set(run.arms) - set(ALL_ARMS) - {"all"}
    if unknown:
        raise UsageError(
            f"arms must be all or some of {', '.join(ALL_ARMS)}, got {', '.join(sorted(unknown))}"
        )
    return ALL_ARMS if "all" in run.arms else tuple(arm for arm in ALL_ARMS if arm in run.arms)


def evaluate(work: Evaluation, executor: GroupExecutor, console: Console) -> tuple[Arm, ...]:
    """Trains every adapter and scores every arm; groups that are finished are not worked on again.

    Raises:
        ClientFailed: A user's job failed.
    """
    arms = chosen_arms(work.run)
    _train(work, executor, console, tuple(arm for arm in TRAINED_ARMS if arm in arms))
    scored = _score(work, executor, console, _answered(arms))
    return tuple(_together([arm for arm in part if arm.arm in arms] for part in scored))


def _answered(arms: Sequence[str]) -> tuple[str, ...]:
    """The arms whose answers are needed: the others of `ALL_ARMS` are made from those of another arm."""
    needed = {*arms, "shared"} if "prior_shift" in arms else set(arms)
    return tuple(arm for arm in SCORED_ARMS if arm in needed) or ("base",)


def _groups(work: Evaluation) -> list[tuple[str, ...]]:
    size = work.run.group_users
    target = work.users.target
    return [target[start : start + size] for start in range(0, len(target), size)]


def _train(
    work: Evaluation, executor: GroupExecutor, console: Console, arms: tuple[str, ...]
) -> None:
    """Leaves adapters/, and personal.jsonl: a line for each adapter."""
    groups = _groups(work) if arms else []
    ledger = Ledger(work.folder / "groups" / "trained", groups)
    pool = _pool(work) if "population" in arms else None

    def reference(number: int) -> TrainGroup:
        users = groups[number]
        drawn = {user: pool.items(user, work.newest) for user in users} if pool else {}
        return TrainGroup(users, arms, work.shared, work.adapters, drawn)

    def record(rows: Sequence[TrainedRow]) -> list[dict[str, Any]]:
        return [asdict(row) for row in rows]

    finished = ledger.finish(executor, train_group, reference=reference, record=record)
    _watch(console, "personal adapters", ledger, finished)
    commit_parts(work.folder / "personal.jsonl", map(_lines, ledger.records()))


def _pool(work: Evaluation) -> Pool:
    """What the population arms draw from."""
    return Pool(history_lengths(work.users), work.randomness)


def _watch(console: Console, name: str, ledger: Ledger, finished: Iterator[int]) -> None:
    """Works until the last group is finished, and says how far it is."""
    total, missing = len(ledger.groups), len(ledger.missing())
    if missing < total:
        console.say(f"  {name} {total - missing}/{total} were done before")
    for _ in console.steps(name, finished, total, before=total - missing):
        pass


def _score(
    work: Evaluation, executor: GroupExecutor, console: Console, arms: tuple[str, ...]
) -> Iterator[list[GroupArm]]:
    """The arms of each group, in the order of the groups, one group at a time."""
    groups = _groups(work)
    ledger = Ledger(work.folder / "groups" / "scored", groups)
    count, own = work.run.personal.wrong_users, "prior_shift" in chosen_arms(work.run)
    wrong = wrong_users(work.users.target, count, randomness=work.randomness)

    def reference(number: int) -> ScoreGroup:
        users = groups[number]
        others = {user: wrong(user) for user in users} if wrong else {}
        return ScoreGroup(users, arms, work.shared, work.adapters, others, own=own)

    def record(answers: GroupAnswers) -> list[dict[str, Any]]:
        return [_as_data(arm) for arm in _arms(work, answers)]

    finished = ledger.finish(executor, score_group, reference=reference, record=record)
    _watch(console, "scored groups", ledger, finished)
    return ([_from_data(arm) for arm in part] for part in ledger.records())


def _as_data(arm: GroupArm) -> dict[str, Any]:
    users = [
        vars(scores) | {"sums": {name: sums.tolist() for name, sums in scores.sums.items()}}
        for scores in arm.users
    ]
    return {"arm": arm.arm, "control": arm.control, "users": users}


def _from_data(data: Mapping[str, Any]) -> GroupArm:
    """The inverse of `_as_data`, exactly: sums are (replicas, width) float64."""
    users = tuple(
        UserScores(
            own["user"],
            own["queries"],
            own["values"],
            {name: np.array(sums, dtype=np.float64) for name, sums in own["sums"].items()},
        )
        for own in data["users"]
    )
    return GroupArm(data["arm"], data["control"], users)


def _together(parts: Iterable[Sequence[GroupArm]]) -> list[Arm]:
    """Each arm over the users of all groups, as columns: of a user, only numbers are held."""
    builders: dict[tuple[str, str | None], ColumnBuilder] = {}
    for part in parts:
        for arm in part:
            builders.setdefault((arm.arm, arm.control), ColumnBuilder()).extend(arm.users)
    return [Arm(arm, control, builder.finish()) for (arm, control), builder in builders.items()]


def _arms(work: Evaluation, answers: GroupAnswers) -> Iterator[GroupArm]:
    results, task = answers.results, work.task
    for arm in SCORED_ARMS:
        if (arm, None) in results:
            yield GroupArm(arm, None, score_users(results[arm, None], task))
    wrong = [
        score_users(values, task) for (_, index), values in results.items() if index is not None
    ]
    if ("personal", None) in results:
        yield GroupArm("personal", WRONG_USER, average_scores(wrong))
    any_arm = next(iter(results.values()))
    yield GroupArm(
        "majority", None, score_users(majority(any_arm, answers.answers, task.kind), task)
    )
    if ("shared", None) in results:
        known = [one for one in results["shared", None] if one.user in answers.histories]
        shifted = prior_shift(known, answers.histories, task.labels)
        yield GroupArm("prior_shift", None, score_users(shifted, task))
    if work.users.oracle is not None:
        answered = _oracle(any_arm, work.users.oracle)
        yield GroupArm("oracle", None, score_users(answered, task))


def _oracle(results: Sequence[QueryResult], oracle: Oracle) -> tuple[QueryResult, ...]:
    answers = {user: oracle.answers(user) for user in {result.user for result in results}}
    return tuple(
        replace(
            result,
            prediction=answers[result.user][result.query],
            label_log_likelihoods=None,
            gold_log_likelihood=None,
        )
        for result in results
    )


def _lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows).encode()
